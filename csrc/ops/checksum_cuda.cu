// The GPU implementation of checksum_runs, which lmkv/kernels/checksum.py declares. It enqueues on torch's current
// stream.
#include <torch/csrc/stable/library.h>

#include <utility>

#include "../cuda/checksum.h"
#include "device.h"
#include "runs_arguments.h"

namespace lmkv {
namespace {

void checksum_runs(const Tensor& data, const Tensor& runs, int64_t first, Tensor sum) {
    STD_TORCH_CHECK(data.is_cuda(), "data is not on a GPU, but another tensor of the call is · move it there");
    RunsRequest r = parse_runs(data, runs, first, sum);
    const OnDevice on(data.get_device_index());
    gpu::checksum(r.data, std::move(r.plan), r.sum, on.index(), on.stream());
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(lmkv, CUDA, m) { m.impl("checksum_runs", TORCH_BOX(&checksum_runs)); }

} // namespace lmkv
