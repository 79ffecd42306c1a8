#include "lmkv/gpu.h"
#include "lmkv/rotate_plan.h"
#include "rotate.h"

namespace lmkv::gpu {
namespace {

constexpr int kLayers = 64;
constexpr int kRuns = static_cast<int>((kParamBytes - sizeof(RotateBatch<kLayers, 1>)) / sizeof(Run));
using Batch = RotateBatch<kLayers, kRuns>;
static_assert(sizeof(Batch) <= kParamBytes, "kernel parameters");

template <class Mover>
LMKV_KERNEL rotate_kernel(const LMKV_GRID_CONSTANT Batch batch) {
    rotate_body<Mover>(DeviceWarp(), batch);
}

template <class Mover>
void launch(const Batch& batch, int device, Stream stream) {
    const unsigned blocks = blocks_for(slice_count(batch), device);
    rotate_kernel<Mover><<<blocks, kThreads, 0, stream>>>(batch);
    LMKV_GPU_CHECK(LMKV_GPU(GetLastError)());
}

} // namespace

void rotate(const Rotate& r, const RotateData& d, int device, void* stream) {
    with_turner(r, d, [&](auto mover) {
        for_each_rotate_batch<Batch>(
            r, d, [&](const Batch& batch) { launch<decltype(mover)>(batch, device, static_cast<Stream>(stream)); });
    });
}

} // namespace lmkv::gpu
