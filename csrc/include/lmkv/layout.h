// Where every number of a KV cache lies: lmkv/layout.py's index map for compiled code. No torch, no CUDA headers.
// Offsets and strides are elements unless a name says bytes.
#pragma once

#include <cstdint>

#include "lmkv/macros.h"

namespace lmkv {

constexpr int kMaxParts = 2;      // K and V, or one latent
constexpr int kPartMapFields = 9; // PartMap::fields() in Python

// Token n = n1·2^tn + n0 and dimension d = d1·2^td + d0 of one part lie at
//   offset + block·b + head·h + n1·s(n1) + n0·s(n0) + d1·s(d1) + d0·s(d0)
struct PartMap {
    int64_t offset;
    int64_t block;
    int64_t head;
    int64_t n1;
    int64_t n0;
    int64_t d1;
    int64_t d0;
    int32_t tn;
    int32_t td;
};

LMKV_HD constexpr int64_t token_offset(const PartMap& m, int64_t n) {
    return (n >> m.tn) * m.n1 + (n & ((int64_t{1} << m.tn) - 1)) * m.n0;
}

LMKV_HD constexpr int64_t dim_offset(const PartMap& m, int64_t d) {
    return (d >> m.td) * m.d1 + (d & ((int64_t{1} << m.td) - 1)) * m.d0;
}

LMKV_HD constexpr int64_t area_offset(const PartMap& m, int64_t block, int64_t head) {
    return m.offset + block * m.block + head * m.head;
}

LMKV_HD constexpr int64_t element(const PartMap& m, int64_t block, int64_t head, int64_t n, int64_t d) {
    return area_offset(m, block, head) + token_offset(m, n) + dim_offset(m, d);
}

// A run of tokens that lies in one block on either side.
struct Segment {
    int32_t source_block;
    int32_t source_token;
    int32_t target_block;
    int32_t target_token;
    int32_t tokens;
};
static_assert(sizeof(Segment) == 20, "a row of the int32 table of segments");

// Examples, and the first test. Block of 32 tokens, 2 heads, D = 64, K and V.
namespace example {
constexpr PartMap kHnd{0, 2 * 32 * 128, 32 * 128, 128, 0, 1, 0, 0, 0};             // LBHNC, K
constexpr PartMap kNhd{64, 2 * 32 * 128, 128, 2 * 128, 0, 1, 0, 0, 0};             // LBNHC, V
constexpr PartMap kAmxKey{0, 2 * 32 * 128, 32 * 128, 16 * 64, 2, 32, 1, 4, 1};     // [N/16][D/2][16][2]
constexpr PartMap kAmxValue{32 * 64, 2 * 32 * 128, 32 * 128, 32, 1, 512, 2, 1, 4}; // [D/16][N/2][16][2]
static_assert(element(kHnd, 0, 1, 3, 5) == 32 * 128 + 3 * 128 + 5, "HND: head outside token");
static_assert(element(kNhd, 1, 1, 3, 5) == 64 + 2 * 32 * 128 + 128 + 3 * 256 + 5, "NHD: token outside head");
static_assert(element(kAmxKey, 0, 0, 17, 3) == 1 * (64 / 2) * 32 + 1 * 32 + 1 * 2 + 1, "AMX key");
static_assert(element(kAmxValue, 0, 0, 3, 17) == 32 * 64 + 1 * (32 / 2) * 32 + 1 * 32 + 1 * 2 + 1, "AMX value");
} // namespace example

} // namespace lmkv
