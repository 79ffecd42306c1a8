// The GPU implementation of rotate_keys, which lmkv/kernels/rotate.py declares. It enqueues on torch's current stream.
#include <torch/csrc/stable/library.h>

#include "../cuda/rotate.h"
#include "device.h"
#include "rotate_arguments.h"

namespace lmkv {
namespace {

void rotate_keys(Tensor keys, const Tensor& layers, const Ints& map, const Tensor& runs, const Tensor& turns,
                 const Ints& shape, int64_t type) {
    STD_TORCH_CHECK(keys.is_cuda(), "keys are not on a GPU, but the table of turns is · move them there");
    const RotateRequest r = parse(keys, layers, map, runs, turns, shape, type);
    const OnDevice on(keys.get_device_index());
    gpu::rotate(r.rotate, r.data, on.index(), on.stream());
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(lmkv, CUDA, m) { m.impl("rotate_keys", TORCH_BOX(&rotate_keys)); }

} // namespace lmkv
