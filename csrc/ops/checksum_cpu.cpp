// The CPU implementation of checksum_runs, which lmkv/kernels/checksum.py declares.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../cpu/checksum.h"
#include "runs_arguments.h"

namespace lmkv {
namespace {

void checksum_runs(const Tensor& data, const Tensor& runs, int64_t first, Tensor sum) {
    const RunsRequest r = parse_runs(data, runs, first, sum);
    const cpu::SumWork work = cpu::plan(r.plan);
    torch::stable::parallel_for(0, work.units(), 1, [&](int64_t lo, int64_t hi) {
        __atomic_fetch_add(r.sum, cpu::checksum(r.data, work, lo, hi), __ATOMIC_RELAXED);
    });
    *r.sum += cpu::odd_words(r.data, r.plan);
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(lmkv, CPU, m) { m.impl("checksum_runs", TORCH_BOX(&checksum_runs)); }

} // namespace lmkv
