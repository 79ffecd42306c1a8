// What is not rows on both sides goes through rows in cache, a tile of tokens at a time: out of the source's packing,
// cast, into the target's packing.
#pragma once

#include "cast.h"
#include "nest.h"
#include "packing.h"

namespace lmkv::cpu::LMKV_ISA {

// Rows as they lie at one side.
inline Nest rows_nest(int64_t tokens, int64_t source_step, int64_t target_step, int64_t words, int64_t row_bytes) {
    return {{{tokens, source_step, target_step, words}}, 1, row_bytes, 0};
}

// One head and part of a unit. `index` is the page word of its first token, where a side is pages.
struct Strip {
    const Convert& c;
    Area source;
    Area target;
    int64_t tokens;
    uint64_t index;
    int64_t next; // how far off at the source the next strip lies
    bool streams;
};

// Rows of a tile, without a copy where they already lie together.
inline uint8_t* rows_of_source(const Strip& s, int64_t n, int64_t tokens, uint8_t* buffer, Sum& sum) {
    const Area a = s.source.from(n);
    if (!is_rows(a.map)) {
        move<Way::kToRows>(a, buffer, tokens, false);
        return buffer;
    }
    const bool sums = s.c.sum_side == SumSide::kSource;
    const int64_t row = a.row_bytes(), step = a.map.n1 * a.width;
    const uint64_t index = s.index + static_cast<uint64_t>(n * s.c.page.words);
    const bool together = step == row;
    if (together && !sums) return a.row(0);
    Nest nest = rows_nest(tokens, step, row, s.c.page.words, row);
    simplify(nest, sums);
    nest.next = s.next;
    if (together) {
        walk<true, Write::kNothing>(nest, a.row(0), buffer, index, sum);
        return a.row(0);
    }
    copy_nest(nest, a.row(0), buffer, index, sums, false, sum);
    return buffer;
}

inline void rows_to_target(const Strip& s, int64_t n, int64_t tokens, uint8_t* rows, Sum& sum) {
    const Area a = s.target.from(n);
    if (!is_rows(a.map)) return move<Way::kToArea>(a, rows, tokens, s.streams);
    const bool sums = s.c.sum_side == SumSide::kTarget;
    Nest nest = rows_nest(tokens, a.row_bytes(), a.map.n1 * a.width, s.c.page.words, a.row_bytes());
    simplify(nest, sums);
    copy_nest(nest, rows, a.row(0), s.index + static_cast<uint64_t>(n * s.c.page.words), sums, s.streams, sum);
}

inline void convert_strip(const Strip& s, uint8_t* scratch, Sum& sum) {
    const int64_t source_row = s.source.row_bytes(), target_row = s.target.row_bytes();
    const int64_t most = tile_tokens(source_row > target_row ? source_row : target_row);
    // Tiles end where cache lines of columns do.
    const int64_t first = (is_rows(s.target.map) ? s.source : s.target).token;
    for (int64_t n = 0; n < s.tokens;) {
        const int64_t room = most - (first + n) % kTileTokens;
        const int64_t here = room < s.tokens - n ? room : s.tokens - n;
        uint8_t* rows = rows_of_source(s, n, here, scratch, sum);
        if (s.c.source_type != s.c.target_type) {
            uint8_t* cast = scratch + most * (source_row > target_row ? source_row : target_row);
            for (int64_t i = 0; i < here; ++i) {
                cast_row(rows + i * source_row, s.c.source_type, cast + i * target_row, s.c.target_type, s.source.dims);
            }
            rows = cast;
        }
        rows_to_target(s, n, here, rows, sum);
        n += here;
    }
}

} // namespace lmkv::cpu::LMKV_ISA
