#include "codec.h"
#include "lmkv/codec_plan.h"
#include "lmkv/gpu.h"

namespace lmkv::gpu {
namespace {

constexpr int kLayers = 64;
constexpr int kMoves = static_cast<int>((kParamBytes - sizeof(CodecBatch<kLayers, 2>)) / sizeof(Move));
using Batch = CodecBatch<kLayers, kMoves>;
static_assert(sizeof(Batch) <= kParamBytes, "kernel parameters");

template <class Coder>
LMKV_KERNEL encode_kernel(const LMKV_GRID_CONSTANT Batch batch) {
    encode_body<Coder>(DeviceWarp(), batch);
}

template <class Coder>
LMKV_KERNEL decode_kernel(const LMKV_GRID_CONSTANT Batch batch) {
    decode_body<Coder>(DeviceWarp(), batch);
}

template <class Kernel>
void launch(Kernel kernel, const Batch& batch, int device, void* stream) {
    const unsigned blocks = blocks_for(codec_groups(batch), device);
    kernel<<<blocks, kThreads, 0, static_cast<Stream>(stream)>>>(batch);
    LMKV_GPU_CHECK(LMKV_GPU(GetLastError)());
}

} // namespace

void encode(const Codec& c, const CodecData& d, int device, void* stream) {
    with_coder(c, d, [&](auto coder) {
        for_each_codec_batch<Batch>(
            c, d, [&](const Batch& batch) { launch(encode_kernel<decltype(coder)>, batch, device, stream); });
    });
}

void decode(const Codec& c, const CodecData& d, int device, void* stream) {
    with_coder(c, d, [&](auto coder) {
        for_each_codec_batch<Batch>(
            c, d, [&](const Batch& batch) { launch(decode_kernel<decltype(coder)>, batch, device, stream); });
    });
}

} // namespace lmkv::gpu
