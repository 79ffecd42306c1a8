// The GPU's convert.
#pragma once

#include "lmkv/convert.h"

namespace lmkv::gpu {

// Enqueues everything that the call asks for on `stream` (a cudaStream_t or hipStream_t) of `device`, which must be the
// current one. `c` and `d` are not needed afterwards; what d.source, d.target and d.sums point to is device memory and
// has to last until the stream gets there. Raises std::runtime_error.
void convert(const Convert& c, const ConvertData& d, int device, void* stream);

} // namespace lmkv::gpu
