// What one call of rotate_keys is asked to do: turn the keys of runs of tokens, in place. Filled on the host.
#pragma once

#include <cstdint>

#include "lmkv/exact.h"
#include "lmkv/layout.h"
#include "lmkv/types.h"

namespace lmkv {

// Tokens side by side in one block that turn by the same angles.
struct Run {
    int32_t block;
    int32_t token;
    int32_t tokens;
    int32_t turn; // index into RotateData::turns
};
static_assert(sizeof(Run) == 16, "a row of the int32 table of runs");

struct Rotate {
    PartMap map; // of the keys
    Type type;
    int32_t heads;
    int32_t first; // dimension
    int32_t pairs;
    int32_t interleaved; // pairs are neighbours; else they are `pairs` apart
};

struct RotateData {
    uint8_t* keys;
    const int64_t* layers; // bytes from `keys`
    int64_t layer_count;
    const Run* runs; // of different tokens
    int64_t run_count;
    const float* turns; // [turn][2][pairs]: cosines, then sines
};

LMKV_HD constexpr int32_t first_of_pair(const Rotate& r, int32_t i) { return r.first + (r.interleaved ? 2 * i : i); }
LMKV_HD constexpr int32_t second_of_pair(const Rotate& r, int32_t i) {
    return first_of_pair(r, i) + (r.interleaved ? 1 : r.pairs);
}

// The order of the operations, which decides the last bit: as here in all implementations.
template <class T>
LMKV_HD void turn(T& a, T& b, float cosine, float sine) {
    const float x = to_float(a);
    const float y = to_float(b);
    a = rounded<T>(sub(mul(x, cosine), mul(y, sine)));
    b = rounded<T>(add(mul(y, cosine), mul(x, sine)));
}

} // namespace lmkv
