// The conversion kernels' bodies as CPU ops `lmkv_shim::…`: what the GPU runs, one lane after the other. They take what
// the ops in `lmkv` take, and two more: of how many warps the grid is, and the widest packet that may be used.
#include <torch/csrc/stable/library.h>

#include "lmkv/convert_batch.h"
#include "lmkv/convert_movers.h"
#include "lmkv/convert_plan.h"
#include "lmkv/warp.h"
#include "ops/arguments.h"

namespace lmkv {
namespace {

using Batch = ConvertBatch<2, 3>; // small, so that tests need several launches

void run(const Request& r, int64_t warps, int64_t widest_packet) {
    Deal deal = deal_for(r.convert, r.data);
    if (deal.packet_bytes > widest_packet) deal.packet_bytes = static_cast<int32_t>(widest_packet);
    with_mover(r.convert, deal, [&](auto mover) {
        for_each_batch<Batch>(r.convert, r.data, deal, [&](const Batch& batch) {
            for (int64_t w = 0; w < warps; ++w) convert_body<decltype(mover)>(HostWarp{w, warps}, batch);
        });
    });
}

void convert_blocks(const Tensor& source, const Tensor& source_layers, const Ints& source_map, Tensor target,
                    const Tensor& target_layers, const Ints& target_map, const Tensor& segments, const Ints& shape,
                    int64_t source_type, int64_t target_type, int64_t warps, int64_t widest_packet) {
    run(parse(source, source_layers, source_map, target, target_layers, target_map, segments, shape, source_type,
              target_type, SumSide::kNone, nullptr, {}),
        warps, widest_packet);
}

void pack_pages(const Tensor& source, const Tensor& source_layers, const Ints& source_map, Tensor pages,
                const Tensor& page_layers, const Ints& page_map, Tensor sums, const Tensor& segments, const Ints& shape,
                const Ints& page, int64_t source_type, int64_t page_type, int64_t warps, int64_t widest_packet) {
    run(parse(source, source_layers, source_map, pages, page_layers, page_map, segments, shape, source_type, page_type,
              SumSide::kTarget, &sums, page),
        warps, widest_packet);
}

void unpack_pages(const Tensor& pages, const Tensor& page_layers, const Ints& page_map, Tensor target,
                  const Tensor& target_layers, const Ints& target_map, Tensor sums, const Tensor& segments,
                  const Ints& shape, const Ints& page, int64_t page_type, int64_t target_type, int64_t warps,
                  int64_t widest_packet) {
    run(parse(pages, page_layers, page_map, target, target_layers, target_map, segments, shape, page_type, target_type,
              SumSide::kSource, &sums, page),
        warps, widest_packet);
}

// How convert_blocks would do it: packet bytes, slice tokens, and by part (0 where there is none) whether it is merged
// and whether lanes lie along tokens.
Ints deal(const Tensor& source, const Tensor& source_layers, const Ints& source_map, Tensor target,
          const Tensor& target_layers, const Ints& target_map, const Tensor& segments, const Ints& shape,
          int64_t source_type, int64_t target_type) {
    const Request r = parse(source, source_layers, source_map, target, target_layers, target_map, segments, shape,
                            source_type, target_type, SumSide::kNone, nullptr, {});
    const Deal d = deal_for(r.convert, r.data);
    return {d.packet_bytes, d.slice_tokens, d.merged[0], d.merged[1], d.tokens_first[0], d.tokens_first[1]};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(lmkv_shim, CPU, m) {
    m.impl("convert_blocks", TORCH_BOX(&convert_blocks));
    m.impl("pack_pages", TORCH_BOX(&pack_pages));
    m.impl("unpack_pages", TORCH_BOX(&unpack_pages));
    m.impl("deal", TORCH_BOX(&deal));
}

} // namespace lmkv
