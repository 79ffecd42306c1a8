// The CPU's encode_pages and decode_pages: one head and layer of one page at a time.
#pragma once

#include "lmkv/codec.h"

namespace lmkv::cpu {

inline int64_t units(const Codec& c, const CodecData& d) { return d.move_count * c.heads * d.layer_count; }

// Units [lo, hi) of units(c, d). Thread-safe for disjoint ranges, if no coded page, or page, is written twice.
void encode(const Codec& c, const CodecData& d, int64_t lo, int64_t hi);
void decode(const Codec& c, const CodecData& d, int64_t lo, int64_t hi);

} // namespace lmkv::cpu
