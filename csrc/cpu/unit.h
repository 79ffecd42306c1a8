// One segment in one layer: rows by nested loops, everything else through tiles.
#pragma once

#include "nest.h"
#include "tile.h"

namespace lmkv::cpu::LMKV_ISA {
namespace {

bool copies_rows(const Convert& c, int part) {
    return c.source_type == c.target_type && is_rows(c.source[part]) && is_rows(c.target[part]);
}

bool alike(const PartMap& a, const PartMap& b) { return a.block == b.block && a.head == b.head && a.n1 == b.n1; }

// K and V as one more loop over rows of one size.
bool one_nest(const Convert& c) {
    return c.parts == 2 && c.dims[0] == c.dims[1] && copies_rows(c, 0) && copies_rows(c, 1) &&
           alike(c.source[0], c.source[1]) && alike(c.target[0], c.target[1]);
}

Nest nest_of(const Convert& c, int part, int parts, int64_t tokens) {
    const PartMap &from = c.source[part], &to = c.target[part];
    const PageMap& p = c.page;
    const int64_t width = width_of(c.source_type);
    const int64_t head_words = int64_t{p.layers} * p.parts * p.page_tokens * p.words;
    Nest nest{{{c.heads, from.head * width, to.head * width, head_words},
               {1, 0, 0, 0},
               {tokens, from.n1 * width, to.n1 * width, p.words}},
              3,
              c.dims[part] * width,
              0};
    if (parts == 2) {
        nest.axes[1] = {2, (c.source[1].offset - from.offset) * width, (c.target[1].offset - to.offset) * width,
                        int64_t{p.page_tokens} * p.words};
    }
    simplify(nest, c.sum_side != SumSide::kNone);
    return nest;
}

} // namespace

void convert_unit(const Convert& c, const ConvertData& d, int64_t unit, bool stream, uint8_t* scratch) {
    const Segment& s = d.segments[unit % d.segment_count];
    const int64_t layer = unit / d.segment_count;
    const bool sums = c.sum_side != SumSide::kNone, at_source = c.sum_side == SumSide::kSource;
    const int64_t from_width = width_of(c.source_type), to_width = width_of(c.target_type);
    const int parts_a_nest = one_nest(c) ? 2 : 1;
    Sum sum;
    const auto area = [&](int part, int64_t head) -> Strip {
        const PartMap &from = c.source[part], &to = c.target[part];
        auto* source = const_cast<uint8_t*>(d.source); // NOLINT: an area can be either side; a source is only read
        return {c,
                {source + d.source_layers[layer] + area_offset(from, s.source_block, c.source_head + head) * from_width,
                 from, s.source_token, c.dims[part], from_width},
                {d.target + d.target_layers[layer] + area_offset(to, s.target_block, c.target_head + head) * to_width,
                 to, s.target_token, c.dims[part], to_width},
                s.tokens,
                row_word(c.page, head, layer, part, at_source ? s.source_token : s.target_token),
                from.head * from_width,
                stream};
    };
    for (int part = 0; part < c.parts; part += parts_a_nest) {
        if (copies_rows(c, part)) {
            const Strip first = area(part, 0);
            copy_nest(nest_of(c, part, parts_a_nest, s.tokens), first.source.row(0), first.target.row(0), first.index,
                      sums, stream, sum);
        } else {
            for (int64_t head = 0; head < c.heads; ++head) convert_strip(area(part, head), scratch, sum);
        }
    }
    if (sums) {
        __atomic_fetch_add(&d.sums[at_source ? s.source_block : s.target_block], sum.total(), __ATOMIC_RELAXED);
    }
}

} // namespace lmkv::cpu::LMKV_ISA
