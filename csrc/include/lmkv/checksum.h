// The checksum of pages: a sum over 8-byte words of a mixed value that depends on the word and its position in the
// page. A sum commutes, so threads, ranks and devices may add in any order, and shares of a page add up to the page's.
//
// mix is a bijection of the word (each of its steps is), so any change within one word always changes the sum.
#pragma once

#include <cstdint>

#include "lmkv/macros.h"

namespace lmkv {

constexpr uint64_t kWordKey = 0x9E3779B97F4A7C15u; // 2^64 / golden ratio: keys of neighbours differ in all bits
constexpr uint64_t kWordPrime = 0x9E3779B1u;       // 32 bits, so that the product takes two 32-bit multiplications

LMKV_HD constexpr uint64_t mix(uint64_t word, uint64_t index) {
    uint64_t x = word ^ ((index + 1) * kWordKey);
    x ^= x >> 32;
    x *= kWordPrime;
    x ^= x >> 32;
    return x;
}

// Where the rows of a share lie within the whole page. A row is the numbers of one head, layer, part and token, filled
// up with zero bytes to words; row r has the words r·words … r·words + words − 1.
struct PageMap {
    int32_t first_head;
    int32_t first_layer;
    int32_t layers; // of the model
    int32_t parts;
    int32_t page_tokens;
    int32_t words; // of the longest part's row
};

LMKV_HD constexpr uint64_t row_word(const PageMap& p, int64_t head, int64_t layer, int64_t part, int64_t token) {
    const int64_t row =
        (((p.first_head + head) * p.layers + p.first_layer + layer) * p.parts + part) * p.page_tokens + token;
    return static_cast<uint64_t>(row) * static_cast<uint64_t>(p.words);
}

static_assert(mix(0, 0) != mix(0, 1), "position matters");
static_assert(mix(1, 0) != mix(0, 0), "value matters");

} // namespace lmkv
