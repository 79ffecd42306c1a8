// The bodies of encode_pages and decode_pages as CPU ops in `lmkv_shim`: what the GPU runs, one lane after the other.
// They take what the ops in `lmkv` take and of how many warps the grid is, and return whether they used vectors.
#include <torch/csrc/stable/library.h>

#include "lmkv/codec_plan.h"
#include "ops/codec_arguments.h"

namespace lmkv {
namespace {

using Batch = CodecBatch<2, 3>; // small, so that tests need several launches

bool encode_pages(const Tensor& pages, const Tensor& page_layers, const Ints& page_map, Tensor coded,
                  const Tensor& coded_layers, const Ints& coded_map, const Tensor& moves, const Ints& shape,
                  int64_t type, int64_t code, int64_t warps) {
    const CodecRequest r =
        parse(pages, page_layers, page_map, coded, coded_layers, coded_map, moves, shape, type, code);
    with_coder(r.codec, r.data, [&](auto coder) {
        for_each_codec_batch<Batch>(r.codec, r.data, [&](const Batch& batch) {
            for (int64_t w = 0; w < warps; ++w) encode_body<decltype(coder)>(HostWarp{w, warps}, batch);
        });
    });
    return codes_vectors(r.codec, r.data);
}

bool decode_pages(const Tensor& coded, const Tensor& coded_layers, const Ints& coded_map, Tensor pages,
                  const Tensor& page_layers, const Ints& page_map, const Tensor& moves, const Ints& shape, int64_t type,
                  int64_t code, int64_t warps) {
    const CodecRequest r =
        parse(pages, page_layers, page_map, coded, coded_layers, coded_map, moves, shape, type, code);
    with_coder(r.codec, r.data, [&](auto coder) {
        for_each_codec_batch<Batch>(r.codec, r.data, [&](const Batch& batch) {
            for (int64_t w = 0; w < warps; ++w) decode_body<decltype(coder)>(HostWarp{w, warps}, batch);
        });
    });
    return codes_vectors(r.codec, r.data);
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(lmkv_shim, CPU, m) {
    m.impl("encode_pages", TORCH_BOX(&encode_pages));
    m.impl("decode_pages", TORCH_BOX(&decode_pages));
}

} // namespace lmkv
