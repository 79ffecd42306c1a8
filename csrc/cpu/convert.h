// The CPU's convert. Work comes in units, a segment in a layer each, so that one long segment still keeps all cores
// busy.
//
// The kernels (unit.h and what it includes) are compiled once for each level of instruction set in isa_*.cpp; one
// library is fast on every machine.
#pragma once

#include "lmkv/convert.h"

namespace lmkv::cpu {

struct Work {
    int64_t units;
    int64_t grain; // units worth the start of a thread
    bool stream;   // write past the caches: the target is too large to be read from there
};

Work plan(const Convert& c, const ConvertData& d);

// Units [lo, hi) of the call. Thread-safe for disjoint ranges; sums are added atomically.
void convert(const Convert& c, const ConvertData& d, const Work& work, int64_t lo, int64_t hi);

} // namespace lmkv::cpu
