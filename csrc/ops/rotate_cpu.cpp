// The CPU implementation of rotate_keys, which lmkv/kernels/rotate.py declares.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../cpu/rotate.h"
#include "rotate_arguments.h"

namespace lmkv {
namespace {

void rotate_keys(Tensor keys, const Tensor& layers, const Ints& map, const Tensor& runs, const Tensor& turns,
                 const Ints& shape, int64_t type) {
    const RotateRequest r = parse(keys, layers, map, runs, turns, shape, type);
    torch::stable::parallel_for(0, cpu::units(r.data), 1,
                                [&](int64_t lo, int64_t hi) { cpu::rotate(r.rotate, r.data, lo, hi); });
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(lmkv, CPU, m) { m.impl("rotate_keys", TORCH_BOX(&rotate_keys)); }

} // namespace lmkv
