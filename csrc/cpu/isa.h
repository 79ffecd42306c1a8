// The levels of instruction set that the kernels are compiled for. Each isa_*.cpp names its level (LMKV_ISA), the bytes
// of its vectors (LMKV_VECTOR_BYTES), and includes sums.h and unit.h under it.
#pragma once

#include "lmkv/convert.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

// clang has no pragma for this: there, and on other machines, the level that the compiler's flags ask for is all.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define LMKV_MULTIVERSION 1
#else
#define LMKV_MULTIVERSION 0
#endif

namespace lmkv::cpu {

// Unit `unit` of the call. `scratch` has room for scratch_bytes(c) bytes, aligned to 64.
using UnitFn = void(const Convert& c, const ConvertData& d, int64_t unit, bool stream, uint8_t* scratch);

// The checksum of `words` words from `p` on, the first of which has this index.
using SumFn = uint64_t(const uint8_t* p, int64_t words, uint64_t index);

namespace baseline {
UnitFn convert_unit;
SumFn sum_words;
} // namespace baseline
#if LMKV_MULTIVERSION
namespace v3 {
UnitFn convert_unit;
SumFn sum_words;
} // namespace v3
namespace v4 {
UnitFn convert_unit;
SumFn sum_words;
} // namespace v4
#endif

struct Isa {
    UnitFn* convert_unit;
    SumFn* sum_words;
};

// The best that this machine has.
const Isa& best_isa();

// Rows that do not fit from place to place directly go through two buffers of a tile of tokens each, in cache.
constexpr int64_t kTileBytes = 64 << 10;
constexpr int64_t kTileTokens = 32; // at least, and a multiple of: a full cache line of 2-byte elements

inline int64_t tile_tokens(int64_t row_bytes) {
    const int64_t tokens = kTileBytes / row_bytes / kTileTokens * kTileTokens;
    return tokens > kTileTokens ? tokens : kTileTokens;
}

} // namespace lmkv::cpu
