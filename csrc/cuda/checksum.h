// The GPU's checksum_runs.
#pragma once

#include "lmkv/runs.h"

namespace lmkv::gpu {

// Enqueues on `stream` (a cudaStream_t or hipStream_t) of `device`, which must be the current one, an addition of the
// plan's checksum to *sum. `data` and `sum` are device memory and have to last until the stream gets there; the plan is
// not needed afterwards. Raises std::runtime_error.
void checksum(const uint8_t* data, WordPlan plan, uint64_t* sum, int device, void* stream);

} // namespace lmkv::gpu
