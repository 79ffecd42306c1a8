// The body of checksum_runs as a CPU op `lmkv_shim::checksum_runs`: what the GPU runs, one lane after the other. It
// takes what the op in `lmkv` takes, of how many warps the grid is, and the widest packet that may be used; it returns
// the packet that was.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "lmkv/runs_plan.h"
#include "ops/runs_arguments.h"

namespace lmkv {
namespace {

using Batch = RunsBatch<3, 2>; // small, so that tests need several launches

int64_t checksum_runs(const Tensor& data, const Tensor& runs, int64_t first, Tensor sum, int64_t warps,
                      int64_t widest_packet) {
    RunsRequest r = parse_runs(data, runs, first, sum);
    const auto packet_bytes = std::min(sum_packet(r.data, r.plan), static_cast<int32_t>(widest_packet));
    if (packet_bytes == 16) make_even(r.plan);
    with_sum_packets(packet_bytes, [&](auto mover) {
        for_each_runs_batch<Batch>(r.data, r.sum, r.plan, [&](const Batch& batch) {
            for (int64_t w = 0; w < warps; ++w) checksum_body<decltype(mover)>(HostWarp{w, warps}, batch);
        });
    });
    return packet_bytes;
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(lmkv_shim, CPU, m) { m.impl("checksum_runs", TORCH_BOX(&checksum_runs)); }

} // namespace lmkv
