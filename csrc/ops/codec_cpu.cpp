// The CPU implementations of encode_pages and decode_pages, which lmkv/kernels/codec.py declares.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../cpu/codec.h"
#include "codec_arguments.h"

namespace lmkv {
namespace {

void encode_pages(const Tensor& pages, const Tensor& page_layers, const Ints& page_map, Tensor coded,
                  const Tensor& coded_layers, const Ints& coded_map, const Tensor& moves, const Ints& shape,
                  int64_t type, int64_t code) {
    const CodecRequest r =
        parse(pages, page_layers, page_map, coded, coded_layers, coded_map, moves, shape, type, code);
    torch::stable::parallel_for(0, cpu::units(r.codec, r.data), 1,
                                [&](int64_t lo, int64_t hi) { cpu::encode(r.codec, r.data, lo, hi); });
}

void decode_pages(const Tensor& coded, const Tensor& coded_layers, const Ints& coded_map, Tensor pages,
                  const Tensor& page_layers, const Ints& page_map, const Tensor& moves, const Ints& shape, int64_t type,
                  int64_t code) {
    const CodecRequest r =
        parse(pages, page_layers, page_map, coded, coded_layers, coded_map, moves, shape, type, code);
    torch::stable::parallel_for(0, cpu::units(r.codec, r.data), 1,
                                [&](int64_t lo, int64_t hi) { cpu::decode(r.codec, r.data, lo, hi); });
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(lmkv, CPU, m) {
    m.impl("encode_pages", TORCH_BOX(&encode_pages));
    m.impl("decode_pages", TORCH_BOX(&decode_pages));
}

} // namespace lmkv
