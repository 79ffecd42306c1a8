#include "rotate.h"

#include "clones.h"

namespace lmkv::cpu {
namespace {

struct Angles {
    const float* cosines;
    const float* sines;
};

template <class T>
void turn_halves(T* __restrict a, T* __restrict b, const Angles& by, int64_t pairs) {
    for (int64_t i = 0; i < pairs; ++i) turn(a[i], b[i], by.cosines[i], by.sines[i]);
}

template <class T>
void turn_neighbours(T* __restrict row, const Angles& by, int64_t pairs) {
    for (int64_t i = 0; i < pairs; ++i) turn(row[2 * i], row[2 * i + 1], by.cosines[i], by.sines[i]);
}

template <class T>
void turn_tokens(T* __restrict a, T* __restrict b, float cosine, float sine, int64_t tokens) {
    for (int64_t n = 0; n < tokens; ++n) turn(a[n], b[n], cosine, sine);
}

// One (block, head) area, by what lies side by side in it: the dimensions of a token, the tokens of a dimension, or
// nothing of use.
template <class T>
void turn_area(const Rotate& r, T* area, const Run& run, const Angles& by) {
    const PartMap& m = r.map;
    if (m.td == 0 && m.d1 == 1) {
        for (int64_t n = 0; n < run.tokens; ++n) {
            T* row = area + token_offset(m, run.token + n) + r.first;
            if (r.interleaved) {
                turn_neighbours(row, by, r.pairs);
            } else {
                turn_halves(row, row + r.pairs, by, r.pairs);
            }
        }
        return;
    }
    for (int32_t i = 0; i < r.pairs; ++i) {
        T* a = area + dim_offset(m, first_of_pair(r, i));
        T* b = area + dim_offset(m, second_of_pair(r, i));
        if (m.tn == 0 && m.n1 == 1) {
            turn_tokens(a + run.token, b + run.token, by.cosines[i], by.sines[i], run.tokens);
            continue;
        }
        for (int64_t n = run.token; n < run.token + run.tokens; ++n) {
            const int64_t at = token_offset(m, n);
            turn(a[at], b[at], by.cosines[i], by.sines[i]);
        }
    }
}

template <class T>
void turn_units(const Rotate& r, const RotateData& d, int64_t lo, int64_t hi) {
    for (int64_t unit = lo; unit < hi; ++unit) {
        const Run& run = d.runs[unit / d.layer_count];
        T* layer = reinterpret_cast<T*>(d.keys + d.layers[unit % d.layer_count]);
        const float* cosines = d.turns + int64_t{run.turn} * 2 * r.pairs;
        for (int32_t h = 0; h < r.heads; ++h) {
            turn_area(r, layer + area_offset(r.map, run.block, h), run, Angles{cosines, cosines + r.pairs});
        }
    }
}

LMKV_CLONES void turn_bf16(const Rotate& r, const RotateData& d, int64_t lo, int64_t hi) {
    turn_units<Bf16>(r, d, lo, hi);
}
LMKV_CLONES void turn_fp16(const Rotate& r, const RotateData& d, int64_t lo, int64_t hi) {
    turn_units<Fp16>(r, d, lo, hi);
}
LMKV_CLONES void turn_fp32(const Rotate& r, const RotateData& d, int64_t lo, int64_t hi) {
    turn_units<float>(r, d, lo, hi);
}

} // namespace

void rotate(const Rotate& r, const RotateData& d, int64_t lo, int64_t hi) {
    if (r.type == Type::kBfloat16) return turn_bf16(r, d, lo, hi);
    if (r.type == Type::kFloat16) return turn_fp16(r, d, lo, hi);
    turn_fp32(r, d, lo, hi);
}

} // namespace lmkv::cpu
