// The GPU's rotate_keys.
#pragma once

#include "lmkv/rotate.h"

namespace lmkv::gpu {

// Enqueues the call on `stream` (a cudaStream_t or hipStream_t) of `device`, which must be the current one. `r` and `d`
// are not needed afterwards; what d.keys and d.turns point to is device memory and has to last until the stream gets
// there. Raises std::runtime_error.
void rotate(const Rotate& r, const RotateData& d, int device, void* stream);

} // namespace lmkv::gpu
