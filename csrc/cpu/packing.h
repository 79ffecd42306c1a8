// From the area of one head and part, in whatever packing its map describes, to rows in cache, and back.
#pragma once

#include <cstring>

#include "transpose.h"
#include "zip.h"

namespace lmkv::cpu::LMKV_ISA {

// One head and part at one side, and its tokens from `token` on.
struct Area {
    uint8_t* data; // of token 0 and dimension 0
    const PartMap& map;
    int64_t token;
    int64_t dims;
    int64_t width; // bytes an element

    int64_t row_bytes() const { return dims * width; }
    uint8_t* row(int64_t n) const { return data + token_offset(map, token + n) * width; } // of the n-th of them
    Area from(int64_t n) const { return {data, map, token + n, dims, width}; }
};

inline bool is_rows(const PartMap& m) { return m.td == 0 && m.d1 == 1 && m.tn == 0; }

// Elements of one token that stay together: one, or the low digit of the dimension.
inline int64_t unit_dims(const PartMap& m) { return m.d0 == 1 ? int64_t{1} << m.td : 1; }

inline bool is_columns(const Area& a) {
    const int64_t unit = unit_dims(a.map);
    const bool together = a.map.td == 0 || unit > 1;
    const int64_t step = a.map.tn == 0 ? a.map.n1 : a.map.n0;
    return together && step == unit && unit * a.width <= 4 && a.dims % unit == 0;
}

inline bool is_zip(const Area& a) {
    const PartMap& m = a.map;
    return m.tn == 1 && m.n0 == 1 && m.d0 == 2 && m.td >= 3 && a.dims % (1 << m.td) == 0 && a.width == 2;
}

template <Way kWay>
void move_columns(const Area& a, uint8_t* rows, int64_t tokens) {
    const int64_t unit = unit_dims(a.map), unit_bytes = unit * a.width;
    const int64_t tile = int64_t{1} << (a.map.tn == 0 ? 62 : a.map.tn);
    const int64_t dims = a.dims / unit, step = a.map.d1 * a.width;
    for (int64_t n = 0; n < tokens;) {
        const int64_t left = tile - ((a.token + n) & (tile - 1));
        const int64_t here = left < tokens - n ? left : tokens - n;
        uint8_t* row = rows + n * a.row_bytes();
        if (unit_bytes == 4) transpose<uint32_t, kWay>(a.row(n), step, row, a.row_bytes(), dims, here);
        if (unit_bytes == 2) transpose<uint16_t, kWay>(a.row(n), step, row, a.row_bytes(), dims, here);
        if (unit_bytes == 1) transpose<uint8_t, kWay>(a.row(n), step, row, a.row_bytes(), dims, here);
        n += here;
    }
}

// For packings that nothing faster knows, and for tokens that are left over.
template <Way kWay>
void move_elements(const Area& a, uint8_t* rows, int64_t tokens) {
    for (int64_t n = 0; n < tokens; ++n) {
        for (int64_t d = 0; d < a.dims; ++d) {
            uint8_t* in_area = a.row(n) + dim_offset(a.map, d) * a.width;
            uint8_t* in_rows = rows + n * a.row_bytes() + d * a.width;
            std::memcpy(kWay == Way::kToRows ? in_rows : in_area, kWay == Way::kToRows ? in_area : in_rows,
                        static_cast<size_t>(a.width));
        }
    }
}

template <Way kWay>
void move_zipped(const Area& a, uint8_t* rows, int64_t tokens) {
    const int64_t dims = int64_t{1} << a.map.td, step = a.map.d1 * a.width;
    int64_t n = a.token % 2;
    if (n == 1) move_elements<kWay>(a, rows, 1);
    for (; n + 2 <= tokens; n += 2) {
        uint8_t* even = rows + n * a.row_bytes();
        for (int64_t d = 0; d < a.dims; d += dims) {
            zip<kWay>(a.row(n) + d / dims * step, even + d * a.width, even + a.row_bytes() + d * a.width, dims);
        }
    }
    if (n < tokens) move_elements<kWay>(a.from(n), rows + n * a.row_bytes(), 1);
}

// `rows` follow each other without gaps.
template <Way kWay>
void move(const Area& a, uint8_t* rows, int64_t tokens) {
    if (is_rows(a.map)) {
        for (int64_t n = 0; n < tokens; ++n) {
            uint8_t* row = rows + n * a.row_bytes();
            std::memcpy(kWay == Way::kToRows ? row : a.row(n), kWay == Way::kToRows ? a.row(n) : row,
                        static_cast<size_t>(a.row_bytes()));
        }
    } else if (is_columns(a)) {
        move_columns<kWay>(a, rows, tokens);
    } else if (is_zip(a)) {
        move_zipped<kWay>(a, rows, tokens);
    } else {
        move_elements<kWay>(a, rows, tokens);
    }
}

} // namespace lmkv::cpu::LMKV_ISA
