#include <utility>

#include "checksum.h"
#include "lmkv/gpu.h"
#include "lmkv/runs_plan.h"

namespace lmkv::gpu {
namespace {

constexpr int kOdd = 32;
constexpr int kRuns = static_cast<int>((kParamBytes - sizeof(RunsBatch<1, kOdd>)) / sizeof(WordRun));
using Batch = RunsBatch<kRuns, kOdd>;
static_assert(sizeof(Batch) <= kParamBytes, "kernel parameters");

template <class Mover>
LMKV_KERNEL checksum_kernel(const LMKV_GRID_CONSTANT Batch batch) {
    checksum_body<Mover>(DeviceWarp(), batch);
}

template <class Mover>
void launch(const Batch& batch, int device, Stream stream) {
    const unsigned blocks = blocks_for(sum_warps(batch), device);
    checksum_kernel<Mover><<<blocks, kThreads, 0, stream>>>(batch);
    LMKV_GPU_CHECK(LMKV_GPU(GetLastError)());
}

} // namespace

void checksum(const uint8_t* data, WordPlan plan, uint64_t* sum, int device, void* stream) {
    const int32_t packet_bytes = sum_packet(data, plan);
    if (packet_bytes == 16) make_even(plan);
    with_sum_packets(packet_bytes, [&](auto mover) {
        for_each_runs_batch<Batch>(data, sum, plan, [&](const Batch& batch) {
            launch<decltype(mover)>(batch, device, static_cast<Stream>(stream));
        });
    });
}

} // namespace lmkv::gpu
