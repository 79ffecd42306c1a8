// The CPU's rotate_keys: one layer of one run at a time.
#pragma once

#include "lmkv/rotate.h"

namespace lmkv::cpu {

inline int64_t units(const RotateData& d) { return d.run_count * d.layer_count; }

// Units [lo, hi) of units(d). Thread-safe for disjoint ranges.
void rotate(const Rotate& r, const RotateData& d, int64_t lo, int64_t hi);

} // namespace lmkv::cpu
