// The GPU's encode_pages and decode_pages.
#pragma once

#include "lmkv/codec.h"

namespace lmkv::gpu {

// Enqueue the call on `stream` (a cudaStream_t or hipStream_t) of `device`, which must be the current one. `c` and `d`
// are not needed afterwards; what d.pages and d.coded point to is device memory and has to last until the stream gets
// there. Raise std::runtime_error.
void encode(const Codec& c, const CodecData& d, int device, void* stream);
void decode(const Codec& c, const CodecData& d, int device, void* stream);

} // namespace lmkv::gpu
