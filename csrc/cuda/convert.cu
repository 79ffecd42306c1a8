#include "convert.h"
#include "lmkv/convert_batch.h"
#include "lmkv/convert_movers.h"
#include "lmkv/convert_plan.h"
#include "lmkv/gpu.h"

namespace lmkv::gpu {
namespace {

constexpr int kLayers = 64;
constexpr size_t kFixedBytes = sizeof(ConvertBatch<kLayers, 1>);
constexpr int kSegments = static_cast<int>((kParamBytes - kFixedBytes) / sizeof(Segment));
using Batch = ConvertBatch<kLayers, kSegments>;
static_assert(sizeof(Batch) <= kParamBytes, "kernel parameters");

template <class Mover>
LMKV_KERNEL convert_kernel(const LMKV_GRID_CONSTANT Batch batch) {
    convert_body<Mover>(DeviceWarp(), batch);
}

template <class Mover>
void launch(const Batch& batch, int device, Stream stream) {
    const unsigned blocks = blocks_for(piece_count(batch), device);
    convert_kernel<Mover><<<blocks, kThreads, 0, stream>>>(batch);
    LMKV_GPU_CHECK(LMKV_GPU(GetLastError)());
}

} // namespace

void convert(const Convert& c, const ConvertData& d, int device, void* stream) {
    const Deal deal = deal_for(c, d);
    with_mover(c, deal, [&](auto mover) {
        for_each_batch<Batch>(c, d, deal, [&](const Batch& batch) {
            launch<decltype(mover)>(batch, device, static_cast<Stream>(stream));
        });
    });
}

} // namespace lmkv::gpu
