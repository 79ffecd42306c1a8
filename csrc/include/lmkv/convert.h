// What one call of convert_blocks, pack_pages or unpack_pages is asked to do. Filled on the host, read by every kernel.
#pragma once

#include <cstdint>

#include "lmkv/checksum.h"
#include "lmkv/layout.h"
#include "lmkv/types.h"

namespace lmkv {

enum class SumSide : int32_t { kNone = 0, kSource = 1, kTarget = 2 };

struct Convert {
    int32_t parts;
    int32_t dims[kMaxParts]; // elements of one token and head, by part
    int32_t heads;           // to be copied; they begin at
    int32_t source_head;
    int32_t target_head;
    Type source_type;
    Type target_type;
    PartMap source[kMaxParts];
    PartMap target[kMaxParts];
    SumSide sum_side; // which side is pages, whose rows are summed
    PageMap page;
};

// Where they lie. Layer i begins `source_layers[i]` bytes after `source`, and likewise at the target.
struct ConvertData {
    const uint8_t* source;
    uint8_t* target;
    const int64_t* source_layers;
    const int64_t* target_layers;
    int64_t layers;
    const Segment* segments;
    int64_t segment_count;
    uint64_t* sums; // by page, added to; null without checksum
};

} // namespace lmkv
