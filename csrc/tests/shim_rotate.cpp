// The body of rotate_keys as a CPU op `lmkv_shim::rotate_keys`: what the GPU runs, one lane after the other. It takes
// what the op in `lmkv` takes and of how many warps the grid is, and returns whether rows were turned in vectors.
#include <torch/csrc/stable/library.h>

#include "lmkv/rotate_plan.h"
#include "ops/rotate_arguments.h"

namespace lmkv {
namespace {

using Batch = RotateBatch<2, 3>; // small, so that tests need several launches

bool rotate_keys(Tensor keys, const Tensor& layers, const Ints& map, const Tensor& runs, const Tensor& turns,
                 const Ints& shape, int64_t type, int64_t warps) {
    const RotateRequest r = parse(keys, layers, map, runs, turns, shape, type);
    with_turner(r.rotate, r.data, [&](auto mover) {
        for_each_rotate_batch<Batch>(r.rotate, r.data, [&](const Batch& batch) {
            for (int64_t w = 0; w < warps; ++w) rotate_body<decltype(mover)>(HostWarp{w, warps}, batch);
        });
    });
    return turns_rows(r.rotate, r.data);
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(lmkv_shim, CPU, m) { m.impl("rotate_keys", TORCH_BOX(&rotate_keys)); }

} // namespace lmkv
