// The host's part of a conversion on a GPU: how it is done, cut into launches. No CUDA in it, so tests run it as it is.
#pragma once

#include <algorithm>
#include <cstdint>
#include <set>
#include <stdexcept>
#include <string>

#include "lmkv/convert_batch.h"
#include "lmkv/warp.h"

namespace lmkv {

constexpr int64_t kSliceBytes = 4096; // 8 packets of 16 bytes for each lane
constexpr int64_t kMostPieces = (int64_t{1} << 31) - 1;

// The largest power of two up to 16 that divides everything that is ever added up to an address.
inline int32_t widest_packet(const Convert& c, const ConvertData& d) {
    const int64_t width = width_of(c.source_type);
    int64_t all = static_cast<int64_t>(reinterpret_cast<uintptr_t>(d.source) | reinterpret_cast<uintptr_t>(d.target));
    for (int64_t i = 0; i < d.layers; ++i) all |= d.source_layers[i] | d.target_layers[i];
    for (int p = 0; p < c.parts; ++p) {
        all |= c.dims[p] * width;
        for (const PartMap* m : {&c.source[p], &c.target[p]}) {
            all |= (m->offset | m->block | m->head | m->n1) * width;
        }
    }
    return static_cast<int32_t>(std::min<int64_t>(16, all & -all));
}

inline bool has_rows(const PartMap& m) { return m.tn == 0 && m.td == 0 && m.d1 == 1; }

inline bool mergeable(const Convert& c, int part) {
    const int64_t dims = c.dims[part];
    if (c.source[part].n1 != dims || c.target[part].n1 != dims) return false;
    return c.sum_side == SumSide::kNone || dims * width_of(c.source_type) == int64_t{8} * c.page.words;
}

// Memory sectors that 32 neighbouring lanes touch, along tokens or along dimensions, and how many lanes there are.
struct Reach {
    int64_t sectors;
    int64_t lanes;
};

inline Reach reach(const PartMap& m, int64_t width, int64_t extent, bool along_tokens) {
    constexpr int64_t kSectorBytes = 32;
    const int64_t lanes = std::min<int64_t>(kWarpLanes, extent);
    std::set<int64_t> sectors;
    for (int64_t i = 0; i < lanes; ++i) {
        sectors.insert((along_tokens ? token_offset(m, i) : dim_offset(m, i)) * width / kSectorBytes);
    }
    return {static_cast<int64_t>(sectors.size()), lanes};
}

// Lanes along tokens, where that makes writes touch fewer sectors a lane.
inline bool writes_along_tokens(const Convert& c, int part, int64_t tokens) {
    const int64_t width = width_of(c.target_type);
    const Reach by_token = reach(c.target[part], width, tokens, true);
    const Reach by_dim = reach(c.target[part], width, c.dims[part], false);
    return by_token.sectors * by_dim.lanes < by_dim.sectors * by_token.lanes;
}

inline void require_aligned_elements(const Convert& c, const ConvertData& d) {
    const auto require = [&](const void* base, const int64_t* layers, Type type, const char* side) {
        for (int64_t i = 0; i < d.layers; ++i) {
            if ((reinterpret_cast<uintptr_t>(base) + layers[i]) % width_of(type) == 0) continue;
            throw std::runtime_error(std::string(side) + ": layer " + std::to_string(i) + " at byte " +
                                     std::to_string(layers[i]) + " is not aligned to its elements of " +
                                     std::to_string(width_of(type)) + " bytes · align it, or convert on the CPU");
        }
    };
    require(d.source, d.source_layers, c.source_type, "source");
    require(d.target, d.target_layers, c.target_type, "target");
}

inline Deal deal_for(const Convert& c, const ConvertData& d) {
    int64_t longest = 1, row = 1;
    for (int64_t i = 0; i < d.segment_count; ++i) longest = std::max<int64_t>(longest, d.segments[i].tokens);
    for (int p = 0; p < c.parts; ++p) row = std::max<int64_t>(row, int64_t{c.dims[p]} * width_of(c.source_type));
    if (row > kMostPieces) throw std::runtime_error("a row of " + std::to_string(row) + " bytes is too long");

    Deal deal{};
    bool rows = c.source_type == c.target_type;
    for (int p = 0; p < c.parts; ++p) rows = rows && has_rows(c.source[p]) && has_rows(c.target[p]);
    deal.slice_tokens = static_cast<int32_t>(std::max<int64_t>(1, kSliceBytes / row));
    if (rows) {
        deal.packet_bytes = widest_packet(c, d);
        for (int p = 0; p < c.parts; ++p) deal.merged[p] = mergeable(c, p);
        return deal;
    }
    require_aligned_elements(c, d);
    for (int p = 0; p < c.parts; ++p) {
        deal.tokens_first[p] = writes_along_tokens(c, p, longest);
        if (deal.tokens_first[p]) deal.slice_tokens = std::max(deal.slice_tokens, kWarpLanes);
    }
    return deal;
}

// Calls launch(batch) for one batch after the other; they may run in any order.
template <class Batch, class Launch>
void for_each_batch(const Convert& c, const ConvertData& d, const Deal& deal, Launch&& launch) {
    for (int64_t l = 0; l < d.layers; l += Batch::kMaxLayers) {
        Batch b{};
        b.convert = c;
        b.convert.page.first_layer += static_cast<int32_t>(l);
        b.deal = deal;
        b.source = d.source;
        b.target = d.target;
        b.sums = d.sums;
        b.layers = static_cast<int32_t>(std::min<int64_t>(Batch::kMaxLayers, d.layers - l));
        std::copy_n(d.source_layers + l, b.layers, b.source_layers);
        std::copy_n(d.target_layers + l, b.layers, b.target_layers);
        for (int64_t s = 0; s < d.segment_count; s += b.segments) {
            b.segments = static_cast<int32_t>(std::min<int64_t>(Batch::kMaxSegments, d.segment_count - s));
            std::copy_n(d.segments + s, b.segments, b.segment);
            int32_t longest = 0;
            for (int i = 0; i < b.segments; ++i) longest = std::max(longest, b.segment[i].tokens);
            b.deal.slices = (longest - 1) / deal.slice_tokens + 1;
            if (piece_count(b) > kMostPieces) { // the kernels count them in 32 bits
                throw std::runtime_error(std::to_string(piece_count(b)) +
                                         " slices are too many for one launch · convert fewer segments at once");
            }
            launch(static_cast<const Batch&>(b));
        }
    }
}

} // namespace lmkv
