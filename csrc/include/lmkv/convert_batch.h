// What one launch of a conversion is given, by value, and how it is dealt out to warps.
#pragma once

#include <cstdint>

#include "lmkv/convert.h"
#include "lmkv/macros.h"

namespace lmkv {

// How the host has decided to do it; see convert_plan.h.
struct Deal {
    int32_t packet_bytes;         // 16, 8, 4, 2 or 1; 0: element by element
    int32_t slice_tokens;         // a warp takes as many tokens at once
    int32_t slices;               // of the longest segment in the batch
    bool merged[kMaxParts];       // by part: the rows of consecutive tokens are one run, on both sides
    bool tokens_first[kMaxParts]; // by part: neighbouring lanes take neighbouring tokens, not dimensions
};

// A kernel's parameters. Nothing in it is in host memory, so nothing has to outlive the launch.
template <int kLayers, int kSegments>
struct ConvertBatch {
    static constexpr int kMaxLayers = kLayers;
    static constexpr int kMaxSegments = kSegments;

    Convert convert;
    Deal deal;
    const uint8_t* source;
    uint8_t* target;
    uint64_t* sums;
    int32_t layers;
    int32_t segments;
    int64_t source_layers[kLayers];
    int64_t target_layers[kLayers];
    Segment segment[kSegments];
};

// What a warp does at once: a slice of tokens of one segment, head, layer and part.
struct Piece {
    const uint8_t* source; // of token 0 and dimension 0 of the area
    uint8_t* target;
    int32_t part;
    int32_t source_token;
    int32_t target_token;
    int32_t tokens; // none where the segment is shorter than the batch's longest
    int32_t page;   // index of its checksum
    uint64_t word;  // position of the first word of the first token's row
};

template <class Batch>
LMKV_HD int64_t piece_count(const Batch& b) {
    return static_cast<int64_t>(b.segments) * b.convert.heads * b.layers * b.convert.parts * b.deal.slices;
}

// Neighbouring pieces lie next to each other in a canonical page. Piece counts are below 2^31 (convert_plan.h).
template <class Batch>
LMKV_HD Piece piece_of(const Batch& b, uint32_t index) {
    const Convert& c = b.convert;
    uint32_t rest = index / static_cast<uint32_t>(b.deal.slices);
    const int32_t first = static_cast<int32_t>(index - rest * b.deal.slices) * b.deal.slice_tokens;
    const int32_t part = c.parts == 2 ? static_cast<int32_t>(rest & 1u) : 0;
    rest = c.parts == 2 ? rest >> 1 : rest;
    uint32_t above = rest / static_cast<uint32_t>(b.layers);
    const int32_t layer = static_cast<int32_t>(rest - above * b.layers);
    const Segment& s = b.segment[above / static_cast<uint32_t>(c.heads)];
    const int32_t head = static_cast<int32_t>(above % static_cast<uint32_t>(c.heads));

    const PartMap& from = c.source[part];
    const PartMap& to = c.target[part];
    Piece p;
    p.source = b.source + b.source_layers[layer] +
               area_offset(from, s.source_block, c.source_head + head) * width_of(c.source_type);
    p.target = b.target + b.target_layers[layer] +
               area_offset(to, s.target_block, c.target_head + head) * width_of(c.target_type);
    p.part = part;
    p.source_token = s.source_token + first;
    p.target_token = s.target_token + first;
    p.tokens = s.tokens - first < b.deal.slice_tokens ? s.tokens - first : b.deal.slice_tokens;
    const bool at_source = c.sum_side == SumSide::kSource;
    p.page = at_source ? s.source_block : s.target_block;
    p.word = row_word(c.page, head, layer, part, at_source ? p.source_token : p.target_token);
    return p;
}

} // namespace lmkv
