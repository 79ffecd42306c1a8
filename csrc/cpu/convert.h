// The CPU's convert: one segment, layer, head and part at a time, in the widest run that both maps allow.
#pragma once

#include "lmkv/convert.h"

namespace lmkv::cpu {

// Everything that segments [lo, hi) of the call ask for. Thread-safe for disjoint ranges; sums are added atomically.
void convert(const Convert& c, const ConvertData& d, int64_t lo, int64_t hi);

} // namespace lmkv::cpu
