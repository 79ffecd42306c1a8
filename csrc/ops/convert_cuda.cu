// The GPU implementations of the ops that lmkv/kernels/ops.py declares. They enqueue on torch's current stream.
#include <torch/csrc/stable/library.h>

#include "../cuda/convert.h"
#include "arguments.h"
#include "device.h"

namespace lmkv {
namespace {

void run(const Request& r, const Tensor& source, const Tensor& target, const Tensor* sums) {
    STD_TORCH_CHECK(source.is_cuda(), "source is not on a GPU, but another tensor of the call is · move it there");
    const int32_t device = source.get_device_index();
    check_device(target, "target", device);
    if (sums != nullptr) check_device(*sums, "sums", device);
    const OnDevice on(device);
    gpu::convert(r.convert, r.data, on.index(), on.stream());
}

void convert_blocks(const Tensor& source, const Tensor& source_layers, const Ints& source_map, Tensor target,
                    const Tensor& target_layers, const Ints& target_map, const Tensor& segments, const Ints& shape,
                    int64_t source_type, int64_t target_type) {
    const Request r = parse(source, source_layers, source_map, target, target_layers, target_map, segments, shape,
                            source_type, target_type, SumSide::kNone, nullptr, {});
    run(r, source, target, nullptr);
}

void pack_pages(const Tensor& source, const Tensor& source_layers, const Ints& source_map, Tensor pages,
                const Tensor& page_layers, const Ints& page_map, Tensor sums, const Tensor& segments, const Ints& shape,
                const Ints& page, int64_t source_type, int64_t page_type) {
    const Request r = parse(source, source_layers, source_map, pages, page_layers, page_map, segments, shape,
                            source_type, page_type, SumSide::kTarget, &sums, page);
    run(r, source, pages, &sums);
}

void unpack_pages(const Tensor& pages, const Tensor& page_layers, const Ints& page_map, Tensor target,
                  const Tensor& target_layers, const Ints& target_map, Tensor sums, const Tensor& segments,
                  const Ints& shape, const Ints& page, int64_t page_type, int64_t target_type) {
    const Request r = parse(pages, page_layers, page_map, target, target_layers, target_map, segments, shape, page_type,
                            target_type, SumSide::kSource, &sums, page);
    run(r, pages, target, &sums);
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(lmkv, CUDA, m) {
    m.impl("convert_blocks", TORCH_BOX(&convert_blocks));
    m.impl("pack_pages", TORCH_BOX(&pack_pages));
    m.impl("unpack_pages", TORCH_BOX(&unpack_pages));
}

} // namespace lmkv
