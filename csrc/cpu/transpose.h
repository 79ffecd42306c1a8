// Rows of tokens ↔ columns: the tokens of one dimension (or pair of dimensions) side by side. K of vec and of amx.
#pragma once

#include <cstring>

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
template <class T, bool kStream>
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
    for (int i = 0; i < kSide; ++i) {
        if constexpr (kStream) {
            stream_short(target + i * target_step, a[i]);
        } else {
            Short<T>::store(target + i * target_step, a[i]);
        }
    }
}

// A matrix in an area, a column of tokens for each dimension, and the same in rows, a row of dimensions for each token.
struct Matrix {
    uint8_t* area;
    int64_t column_step; // bytes, from one column to the next
    uint8_t* rows;
    int64_t row_step;
    int64_t dims;
    int64_t tokens;
};

// Columns that are written soon: far enough off that their lines are there by then.
constexpr int64_t kColumnsAhead = 16;

inline void expect_columns(const Matrix& m, int64_t d, int64_t columns, int64_t n_bytes) {
    if (n_bytes % 64 != 0 || d + kColumnsAhead + columns > m.dims) return;
    for (int64_t i = kColumnsAhead; i < kColumnsAhead + columns; ++i) {
        __builtin_prefetch(m.area + (d + i) * m.column_step + n_bytes, 1);
    }
}

// Columns are gone through in full before the next ones, so that the area's cache lines are touched once.
template <class T, Way kWay, bool kStream>
void transpose_as(const Matrix& m) {
    constexpr int64_t kWidth = sizeof(T), kSide = 16 / kWidth;
    const auto element = [&](int64_t d, int64_t n) {
        uint8_t* in_area = m.area + d * m.column_step + n * kWidth;
        uint8_t* in_rows = m.rows + n * m.row_step + d * kWidth;
        std::memcpy(kWay == Way::kToRows ? in_rows : in_area, kWay == Way::kToRows ? in_area : in_rows, kWidth);
    };
    int64_t d = 0;
    for (; d + kSide <= m.dims; d += kSide) {
        int64_t n = 0;
        for (; n + kSide <= m.tokens; n += kSide) {
            uint8_t* in_area = m.area + d * m.column_step + n * kWidth;
            uint8_t* in_rows = m.rows + n * m.row_step + d * kWidth;
            if constexpr (kWay == Way::kToRows) {
                transpose_square<T, false>(in_area, m.column_step, in_rows, m.row_step);
            } else {
                if constexpr (!kStream) expect_columns(m, d, kSide, n * kWidth);
                transpose_square<T, kStream>(in_rows, m.row_step, in_area, m.column_step);
            }
        }
        for (; n < m.tokens; ++n) {
            for (int64_t i = 0; i < kSide; ++i) element(d + i, n);
        }
    }
    for (; d < m.dims; ++d) {
        for (int64_t n = 0; n < m.tokens; ++n) element(d, n);
    }
}

template <class T, Way kWay>
void transpose(const Matrix& m, bool streams) {
    const auto bits = reinterpret_cast<uintptr_t>(m.area) | static_cast<uintptr_t>(m.column_step) |
                      static_cast<uintptr_t>(m.tokens) * sizeof(T);
    const bool whole_lines = bits % 64 == 0 && m.dims * static_cast<int64_t>(sizeof(T)) % 16 == 0;
    if (kWay == Way::kToArea && streams && whole_lines) return transpose_as<T, kWay, true>(m);
    transpose_as<T, kWay, false>(m);
}

} // namespace lmkv::cpu::LMKV_ISA
