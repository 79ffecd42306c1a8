// The GPU implementations of encode_pages and decode_pages, which lmkv/kernels/codec.py declares. They enqueue on
// torch's current stream.
#include <torch/csrc/stable/library.h>

#include "../cuda/codec.h"
#include "codec_arguments.h"
#include "device.h"

namespace lmkv {
namespace {

using Enqueue = void(const Codec&, const CodecData&, int, void*);

void run(Enqueue enqueue, const CodecRequest& r, const Tensor& pages, const Tensor& coded) {
    STD_TORCH_CHECK(pages.is_cuda(), "pages are not on a GPU, but coded pages are · move them there");
    check_device(coded, "the tensor of coded pages", pages.get_device_index());
    const OnDevice on(pages.get_device_index());
    enqueue(r.codec, r.data, on.index(), on.stream());
}

void encode_pages(const Tensor& pages, const Tensor& page_layers, const Ints& page_map, Tensor coded,
                  const Tensor& coded_layers, const Ints& coded_map, const Tensor& moves, const Ints& shape,
                  int64_t type, int64_t code) {
    run(gpu::encode, parse(pages, page_layers, page_map, coded, coded_layers, coded_map, moves, shape, type, code),
        pages, coded);
}

void decode_pages(const Tensor& coded, const Tensor& coded_layers, const Ints& coded_map, Tensor pages,
                  const Tensor& page_layers, const Ints& page_map, const Tensor& moves, const Ints& shape, int64_t type,
                  int64_t code) {
    run(gpu::decode, parse(pages, page_layers, page_map, coded, coded_layers, coded_map, moves, shape, type, code),
        pages, coded);
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(lmkv, CUDA, m) {
    m.impl("encode_pages", TORCH_BOX(&encode_pages));
    m.impl("decode_pages", TORCH_BOX(&decode_pages));
}

} // namespace lmkv
