// Rows of tokens ↔ two tokens zipped: their elements take turns. V of amx.
#pragma once

#include "transpose.h"

namespace lmkv::cpu::LMKV_ISA {

using Halves = Short<uint16_t>;

// Tokens n and n + 1, `dims` elements each (a multiple of 8), side by side in the area.
template <Way kWay>
inline void zip(uint8_t* area, uint8_t* even, uint8_t* odd, int64_t dims) {
    for (int64_t d = 0; d < dims; d += 8) {
        if constexpr (kWay == Way::kToArea) {
            const auto a = Halves::load(even + 2 * d), b = Halves::load(odd + 2 * d);
            Halves::store(area + 4 * d, low(a, b));
            Halves::store(area + 4 * d + 16, high(a, b));
        } else {
            const auto a = Halves::load(area + 4 * d), b = Halves::load(area + 4 * d + 16);
            Halves::store(even + 2 * d, __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14));
            Halves::store(odd + 2 * d, __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15));
        }
    }
}

} // namespace lmkv::cpu::LMKV_ISA
