// What one call of encode_pages or decode_pages is asked to do: numbers of canonical pages as one byte each, with a
// scale for every group of tokens. docs/page-format.md has the bytes. Filled on the host, read by every kernel.
#pragma once

#include <cstdint>

#include "lmkv/codec_types.h"
#include "lmkv/layout.h"
#include "lmkv/types.h"

namespace lmkv {

constexpr int32_t kGroupTokens = 16;

// A page, and the coded page that belongs to it.
struct Move {
    int32_t page;
    int32_t coded;
};
static_assert(sizeof(Move) == 8, "a row of the int32 table of moves");

struct Codec {
    Code code;
    Type type; // of the pages
    int32_t parts;
    int32_t dims[kMaxParts]; // elements of one token and head, by part
    int32_t heads;           // to be coded; they begin at
    int32_t page_head;
    int32_t coded_head;
    int32_t page_tokens;
    PartMap page[kMaxParts];  // of elements; tokens follow each other
    PartMap coded[kMaxParts]; // of bytes, of areas
};

// Layer i begins `page_layers[i]` bytes after `pages`, and likewise in the coded pages. The op's name says which of the
// two is written.
struct CodecData {
    uint8_t* pages;
    uint8_t* coded;
    const int64_t* page_layers;
    const int64_t* coded_layers;
    int64_t layer_count;
    const Move* moves;
    int64_t move_count;
};

LMKV_HD constexpr int32_t group_count(const Codec& c) { return (c.page_tokens + kGroupTokens - 1) / kGroupTokens; }

// A group of tokens of one page, layer, head and part: its numbers, its codes, and its scale.
struct Group {
    uint8_t* numbers;
    uint8_t* codes;
    uint8_t* scale;
    int32_t count; // of numbers
};

LMKV_HD Group group_of(const Codec& c, const uint8_t* page_layer, const uint8_t* coded_layer, const Move& move,
                       int64_t head, int32_t part, int32_t group) {
    const PartMap& from = c.page[part];
    const int64_t dims = c.dims[part];
    const int64_t first = int64_t{group} * kGroupTokens;
    const int64_t left = c.page_tokens - first;
    const uint8_t* area = coded_layer + area_offset(c.coded[part], move.coded, c.coded_head + head);
    Group g;
    g.numbers = const_cast<uint8_t*>(page_layer) +
                (area_offset(from, move.page, c.page_head + head) + first * dims) * width_of(c.type);
    g.codes = const_cast<uint8_t*>(area) + first * dims;
    g.scale = const_cast<uint8_t*>(area) + c.page_tokens * dims + group * int64_t{4};
    g.count = static_cast<int32_t>((left < kGroupTokens ? left : kGroupTokens) * dims);
    return g;
}

} // namespace lmkv
