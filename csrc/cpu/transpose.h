// Rows of tokens ↔ columns: the tokens of one dimension (or pair of dimensions) side by side. K of vec and of amx.
#pragma once

#include "vectors.h"

namespace lmkv::cpu::LMKV_ISA {

// Which way elements go between rows (of the same token) and an area (in a packing of its own).
enum class Way { kToRows, kToArea };

template <class T>
using Short = Vector<T, 16>;

inline Short<uint8_t>::Type low(Short<uint8_t>::Type a, Short<uint8_t>::Type b) {
    return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
inline Short<uint8_t>::Type high(Short<uint8_t>::Type a, Short<uint8_t>::Type b) {
    return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}
inline Short<uint16_t>::Type low(Short<uint16_t>::Type a, Short<uint16_t>::Type b) {
    return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
}
inline Short<uint16_t>::Type high(Short<uint16_t>::Type a, Short<uint16_t>::Type b) {
    return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
}
inline Short<uint32_t>::Type low(Short<uint32_t>::Type a, Short<uint32_t>::Type b) {
    return __builtin_shufflevector(a, b, 0, 4, 1, 5);
}
inline Short<uint32_t>::Type high(Short<uint32_t>::Type a, Short<uint32_t>::Type b) {
    return __builtin_shufflevector(a, b, 2, 6, 3, 7);
}

// A square of 16 bytes by as many rows as a vector has elements. Zipping the two halves of the rows with each other
// rotates the bits of the row number into the column number; after log2 of the size they have changed places.
template <class T>
inline void transpose_square(const uint8_t* source, int64_t source_step, uint8_t* target, int64_t target_step) {
    constexpr int kSide = 16 / sizeof(T);
    typename Short<T>::Type a[kSide], b[kSide];
    for (int i = 0; i < kSide; ++i) a[i] = Short<T>::load(source + i * source_step);
    for (int stage = 1; stage < kSide; stage *= 2) {
        for (int i = 0; i < kSide / 2; ++i) {
            b[2 * i] = low(a[i], a[i + kSide / 2]);
            b[2 * i + 1] = high(a[i], a[i + kSide / 2]);
        }
        for (int i = 0; i < kSide; ++i) a[i] = b[i];
    }
    for (int i = 0; i < kSide; ++i) Short<T>::store(target + i * target_step, a[i]);
}

// `dims` columns of `tokens` elements T in the area, `tokens` rows of `dims` elements. Columns are gone through in full
// before the next ones, so that the area's cache lines are touched once.
template <class T, Way kWay>
void transpose(uint8_t* area, int64_t column_step, uint8_t* rows, int64_t row_step, int64_t dims, int64_t tokens) {
    constexpr int64_t kSide = 16 / sizeof(T);
    const auto element = [&](int64_t d, int64_t n) {
        uint8_t* in_area = area + d * column_step + n * static_cast<int64_t>(sizeof(T));
        uint8_t* in_rows = rows + n * row_step + d * static_cast<int64_t>(sizeof(T));
        std::memcpy(kWay == Way::kToRows ? in_rows : in_area, kWay == Way::kToRows ? in_area : in_rows, sizeof(T));
    };
    int64_t d = 0;
    for (; d + kSide <= dims; d += kSide) {
        int64_t n = 0;
        for (; n + kSide <= tokens; n += kSide) {
            uint8_t* in_area = area + d * column_step + n * static_cast<int64_t>(sizeof(T));
            uint8_t* in_rows = rows + n * row_step + d * static_cast<int64_t>(sizeof(T));
            if constexpr (kWay == Way::kToRows) {
                transpose_square<T>(in_area, column_step, in_rows, row_step);
            } else {
                transpose_square<T>(in_rows, row_step, in_area, column_step);
            }
        }
        for (; n < tokens; ++n) {
            for (int64_t i = 0; i < kSide; ++i) element(d + i, n);
        }
    }
    for (; d < dims; ++d) {
        for (int64_t n = 0; n < tokens; ++n) element(d, n);
    }
}

} // namespace lmkv::cpu::LMKV_ISA
