// The bodies of encode_pages and decode_pages: a warp takes a group of tokens at a time.
#pragma once

#include <cstdint>

#include "lmkv/codec.h"
#include "lmkv/vectors.h"
#include "lmkv/warp.h"

namespace lmkv {

// A kernel's parameters. Nothing in it is in host memory, so nothing has to outlive the launch.
template <int kLayers, int kMoves>
struct CodecBatch {
    static constexpr int kMaxLayers = kLayers;
    static constexpr int kMaxMoves = kMoves;

    Codec codec;
    int32_t layer_count;
    int32_t move_count;
    uint8_t* pages;
    uint8_t* coded;
    int64_t page_layers[kLayers];
    int64_t coded_layers[kLayers];
    Move moves[kMoves];
};

template <class Batch>
LMKV_HD int64_t codec_groups(const Batch& b) {
    const Codec& c = b.codec;
    return static_cast<int64_t>(b.move_count) * c.heads * b.layer_count * c.parts * group_count(c);
}

// Neighbouring groups lie next to each other in a page. Group counts are below 2^31 (codec_plan.h).
template <class Batch>
LMKV_HD Group group_at(const Batch& b, uint32_t index) {
    const Codec& c = b.codec;
    const uint32_t groups = group_count(c);
    uint32_t rest = index / groups;
    const int32_t group = static_cast<int32_t>(index - rest * groups);
    const int32_t part = c.parts == 2 ? static_cast<int32_t>(rest & 1u) : 0;
    rest = c.parts == 2 ? rest >> 1 : rest;
    const uint32_t above = rest / static_cast<uint32_t>(b.layer_count);
    const uint32_t layer = rest - above * b.layer_count;
    const Move& move = b.moves[above / static_cast<uint32_t>(c.heads)];
    const int32_t head = static_cast<int32_t>(above % static_cast<uint32_t>(c.heads));
    return group_of(c, b.pages + b.page_layers[layer], b.coded + b.coded_layers[layer], move, head, part, group);
}

// A coder of T and the codes C does one lane's share of a group, kCount neighbouring numbers at a time.
template <class T, class C, int kCount>
struct Coder {
    using Number = T;
    using Codes = C;

    LMKV_HD static float largest(const Group& g, int lane) {
        int32_t magnitude = 0;
        for (int32_t i = lane * kCount; i < g.count; i += kWarpLanes * kCount) {
            Vector<T, kCount> numbers;
            numbers.read(g.numbers + i * sizeof(T));
            LMKV_UNROLL
            for (int k = 0; k < kCount; ++k) {
                const int32_t other = finite_magnitude(to_float(numbers.x[k]));
                magnitude = other > magnitude ? other : magnitude;
            }
        }
        return float_of(static_cast<uint32_t>(magnitude));
    }

    LMKV_HD static void encode(const Group& g, const Scale& scale, int lane) {
        for (int32_t i = lane * kCount; i < g.count; i += kWarpLanes * kCount) {
            Vector<T, kCount> numbers;
            numbers.read(g.numbers + i * sizeof(T));
            Vector<uint8_t, kCount> codes;
            LMKV_UNROLL
            for (int k = 0; k < kCount; ++k) codes.x[k] = encoded<C>(to_float(numbers.x[k]), scale.inverse);
            codes.write(g.codes + i);
        }
        if (lane == 0) store(g.scale, scale.scale);
    }

    LMKV_HD static void decode(const Group& g, int lane) {
        const float scale = load<float>(g.scale);
        for (int32_t i = lane * kCount; i < g.count; i += kWarpLanes * kCount) {
            Vector<uint8_t, kCount> codes;
            codes.read(g.codes + i);
            Vector<T, kCount> numbers;
            LMKV_UNROLL
            for (int k = 0; k < kCount; ++k) numbers.x[k] = decoded<C, T>(codes.x[k], scale);
            numbers.write(g.numbers + i * sizeof(T));
        }
    }
};

// The numbers are read twice, the second time from the cache, where the warp has just brought them.
template <class Coder, class Warp, class Batch>
LMKV_HD void encode_body(const Warp& warp, const Batch& batch) {
    const int64_t groups = codec_groups(batch);
    for (int64_t i = warp.index(); i < groups; i += warp.count()) {
        const Group group = group_at(batch, static_cast<uint32_t>(i));
        const float magnitude = warp.max([&](int lane) { return Coder::largest(group, lane); });
        const Scale scale = scale_of(magnitude, Coder::Codes::kLargest);
        warp.each([&](int lane) { Coder::encode(group, scale, lane); });
    }
}

template <class Coder, class Warp, class Batch>
LMKV_HD void decode_body(const Warp& warp, const Batch& batch) {
    const int64_t groups = codec_groups(batch);
    for (int64_t i = warp.index(); i < groups; i += warp.count()) {
        const Group group = group_at(batch, static_cast<uint32_t>(i));
        warp.each([&](int lane) { Coder::decode(group, lane); });
    }
}

} // namespace lmkv
