#include "rotate.h"

#include "clones.h"

namespace lmkv::cpu {
namespace {

struct Angles {
    const float* cosines;
    const float* sines;
};

template <class T>
void turn_halves(T* a, T* b, const Angles& by, int64_t pairs) {
    LMKV_INDEPENDENT
    for (int64_t i = 0; i < pairs; ++i) turn(a[i], b[i], by.cosines[i], by.sines[i]);
}

template <class T>
void turn_neighbours(T* row, const Angles& by, int64_t pairs) {
    LMKV_INDEPENDENT
    for (int64_t i = 0; i < pairs; ++i) turn(row[2 * i], row[2 * i + 1], by.cosines[i], by.sines[i]);
}

template <class T>
void turn_tokens(T* a, T* b, float cosine, float sine, int64_t tokens) {
    LMKV_INDEPENDENT
    for (int64_t n = 0; n < tokens; ++n) turn(a[n], b[n], cosine, sine);
}

template <class T>
void turn_row(const Rotate& r, T* row, const Angles& by) {
    if (r.interleaved) {
        turn_neighbours(row + r.first, by, r.pairs);
    } else {
        turn_halves(row + r.first, row + r.first + r.pairs, by, r.pairs);
    }
}

// The dimensions of a token lie side by side. Memory is walked in its own order: whichever of tokens and heads is
// further apart is the outer loop.
template <class T>
void turn_rows(const Rotate& r, T* block, const Run& run, const Angles& by) {
    const PartMap& m = r.map;
    const bool heads_inside = m.head < m.n1;
    const int64_t outer = heads_inside ? run.tokens : r.heads;
    const int64_t inner = heads_inside ? r.heads : run.tokens;
    for (int64_t o = 0; o < outer; ++o) {
        for (int64_t i = 0; i < inner; ++i) {
            const int64_t head = heads_inside ? i : o;
            const int64_t token = run.token + (heads_inside ? o : i);
            turn_row(r, block + head * m.head + token_offset(m, token), by);
        }
    }
}

// The tokens of a dimension lie side by side, or nothing of use does.
template <class T>
void turn_columns(const Rotate& r, T* area, const Run& run, const Angles& by) {
    const PartMap& m = r.map;
    for (int32_t i = 0; i < r.pairs; ++i) {
        T* a = area + dim_offset(m, first_of_pair(r, i));
        T* b = area + dim_offset(m, second_of_pair(r, i));
        if (m.tn == 0 && m.n1 == 1) {
            turn_tokens(a + run.token, b + run.token, by.cosines[i], by.sines[i], run.tokens);
            continue;
        }
        for (int64_t n = run.token; n < int64_t{run.token} + run.tokens; ++n) {
            const int64_t at = token_offset(m, n);
            turn(a[at], b[at], by.cosines[i], by.sines[i]);
        }
    }
}

template <class T>
void turn_units(const Rotate& r, const RotateData& d, int64_t lo, int64_t hi) {
    const bool rows = r.map.td == 0 && r.map.d1 == 1;
    for (int64_t unit = lo; unit < hi; ++unit) {
        const Run& run = d.runs[unit / d.layer_count];
        T* block = reinterpret_cast<T*>(d.keys + d.layers[unit % d.layer_count]) + area_offset(r.map, run.block, 0);
        const float* cosines = d.turns + int64_t{run.turn} * 2 * r.pairs;
        const Angles by{cosines, cosines + r.pairs};
        if (rows) {
            turn_rows(r, block, run, by);
            continue;
        }
        for (int32_t h = 0; h < r.heads; ++h) turn_columns(r, block + h * r.map.head, run, by);
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
