// The CPU implementations of the ops that lmkv/kernels/ops.py declares.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../cpu/convert.h"
#include "arguments.h"

namespace lmkv {
namespace {

void run(const Request& r) {
    const cpu::Work work = cpu::plan(r.convert, r.data);
    torch::stable::parallel_for(0, work.units, work.grain,
                                [&](int64_t lo, int64_t hi) { cpu::convert(r.convert, r.data, work, lo, hi); });
}

void convert_blocks(const Tensor& source, const Tensor& source_layers, const Ints& source_map, Tensor target,
                    const Tensor& target_layers, const Ints& target_map, const Tensor& segments, const Ints& shape,
                    int64_t source_type, int64_t target_type) {
    run(parse(source, source_layers, source_map, target, target_layers, target_map, segments, shape, source_type,
              target_type, SumSide::kNone, nullptr, {}));
}

void pack_pages(const Tensor& source, const Tensor& source_layers, const Ints& source_map, Tensor pages,
                const Tensor& page_layers, const Ints& page_map, Tensor sums, const Tensor& segments, const Ints& shape,
                const Ints& page, int64_t source_type, int64_t page_type) {
    run(parse(source, source_layers, source_map, pages, page_layers, page_map, segments, shape, source_type, page_type,
              SumSide::kTarget, &sums, page));
}

void unpack_pages(const Tensor& pages, const Tensor& page_layers, const Ints& page_map, Tensor target,
                  const Tensor& target_layers, const Ints& target_map, Tensor sums, const Tensor& segments,
                  const Ints& shape, const Ints& page, int64_t page_type, int64_t target_type) {
    run(parse(pages, page_layers, page_map, target, target_layers, target_map, segments, shape, page_type, target_type,
              SumSide::kSource, &sums, page));
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(lmkv, CPU, m) {
    m.impl("convert_blocks", TORCH_BOX(&convert_blocks));
    m.impl("pack_pages", TORCH_BOX(&pack_pages));
    m.impl("unpack_pages", TORCH_BOX(&unpack_pages));
}

} // namespace lmkv
