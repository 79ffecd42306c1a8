// Rows of tokens ↔ two tokens zipped: their elements take turns. V of amx.
#pragma once

#include "transpose.h"

namespace lmkv::cpu::LMKV_ISA {

using Halves = Short<uint16_t>;

// 8 elements of two tokens, side by side in the area.
template <Way kWay, bool kStream>
inline void zip(uint8_t* area, uint8_t* even, uint8_t* odd) {
    if constexpr (kWay == Way::kToRows) {
        const auto a = Halves::load(area), b = Halves::load(area + 16);
        Halves::store(even, __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14));
        Halves::store(odd, __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15));
    } else {
        const auto a = Halves::load(even), b = Halves::load(odd);
        if constexpr (kStream) {
            stream_short(area, low(a, b));
            stream_short(area + 16, high(a, b));
        } else {
            Halves::store(area, low(a, b));
            Halves::store(area + 16, high(a, b));
        }
    }
}

// `pairs` of tokens one after the other in the area, `dims` (a multiple of 8) elements of each; rows are `row_step`
// bytes apart.
template <Way kWay, bool kStream>
void zip_pairs(uint8_t* area, uint8_t* rows, int64_t row_step, int64_t pairs, int64_t dims) {
    for (int64_t p = 0; p < pairs; ++p, area += 4 * dims, rows += 2 * row_step) {
        for (int64_t d = 0; d < dims; d += 8) {
            zip<kWay, kStream>(area + 4 * d, rows + 2 * d, rows + row_step + 2 * d);
        }
    }
}

} // namespace lmkv::cpu::LMKV_ISA
