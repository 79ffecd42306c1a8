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
void move_columns(const Area& a, uint8_t* rows, int64_t tokens, bool streams) {
    const int64_t unit = unit_dims(a.map), unit_bytes = unit * a.width, row = a.row_bytes();
    const int64_t tile = int64_t{1} << (a.map.tn == 0 ? 62 : a.map.tn);
    for (int64_t n = 0; n < tokens;) {
        const int64_t left = tile - ((a.token + n) & (tile - 1));
        const int64_t here = left < tokens - n ? left : tokens - n;
        const Matrix m{a.row(n), a.map.d1 * a.width, rows + n * row, row, a.dims / unit, here};
        if (unit_bytes == 4) transpose<uint32_t, kWay>(m, streams);
        if (unit_bytes == 2) transpose<uint16_t, kWay>(m, streams);
        if (unit_bytes == 1) transpose<uint8_t, kWay>(m, streams);
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
void move_zipped(const Area& a, uint8_t* rows, int64_t tokens, bool streams) {
    const int64_t dims = int64_t{1} << a.map.td, row = a.row_bytes();
    const int64_t first = a.token % 2; // half a pair, and half of one may be left at the end
    const int64_t pairs = (tokens - first) / 2, end = first + 2 * pairs;
    if (first == 1) move_elements<kWay>(a, rows, 1);
    if (end < tokens) move_elements<kWay>(a.from(end), rows + end * row, 1);
    for (int64_t d = 0; d < a.dims; d += dims) {
        uint8_t* in_area = a.row(first) + d / dims * a.map.d1 * a.width;
        uint8_t* in_rows = rows + first * row + d * a.width;
        const bool whole_lines = (reinterpret_cast<uintptr_t>(in_area) | static_cast<uintptr_t>(4 * dims)) % 64 == 0;
        if (kWay == Way::kToArea && streams && whole_lines) {
            zip_pairs<kWay, true>(in_area, in_rows, row, pairs, dims);
        } else {
            zip_pairs<kWay, false>(in_area, in_rows, row, pairs, dims);
        }
    }
}

// `rows` follow each other without gaps. The area is not rows itself. `streams`: an area that is written is not read
// soon.
template <Way kWay>
void move(const Area& a, uint8_t* rows, int64_t tokens, bool streams) {
    if (is_columns(a)) {
        move_columns<kWay>(a, rows, tokens, streams);
    } else if (is_zip(a)) {
        move_zipped<kWay>(a, rows, tokens, streams);
    } else {
        move_elements<kWay>(a, rows, tokens);
    }
}

} // namespace lmkv::cpu::LMKV_ISA
