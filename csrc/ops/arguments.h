// From the arguments of an op to Convert and ConvertData. Everything is checked here; kernels trust what they get.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <vector>

#include "lmkv/convert.h"

namespace lmkv {

using torch::stable::Tensor;
using Ints = std::vector<int64_t>;

struct Request {
    Convert convert;
    ConvertData data;
};

inline std::vector<PartMap> part_maps(const Ints& fields, int64_t parts, const char* side) {
    STD_TORCH_CHECK(static_cast<int64_t>(fields.size()) == parts * kPartMapFields, side, " map has ", fields.size(),
                    " fields, not ", parts * kPartMapFields);
    std::vector<PartMap> maps;
    for (int64_t i = 0; i < parts; ++i) {
        const int64_t* f = fields.data() + i * kPartMapFields;
        for (int k = 0; k < kPartMapFields; ++k) STD_TORCH_CHECK(f[k] >= 0, side, " map has a negative field");
        STD_TORCH_CHECK(f[7] < 31 && f[8] < 31, side, " map has a tile of 2^31 or more");
        maps.push_back(
            {f[0], f[1], f[2], f[3], f[4], f[5], f[6], static_cast<int32_t>(f[7]), static_cast<int32_t>(f[8])});
    }
    return maps;
}

// The largest offset of a digit sum is reached at the largest digits, which the last index need not have: bound both.
inline int64_t largest(int64_t last, int64_t s1, int64_t s0, int32_t tile) {
    const int64_t low = last < (int64_t{1} << tile) - 1 ? last : (int64_t{1} << tile) - 1;
    return (last >> tile) * s1 + low * s0;
}

// Raises unless every element that the call touches lies within the tensor.
inline void check_range(const char* side, const Tensor& data, const int64_t* layers, int64_t layer_count,
                        const PartMap* maps, const Convert& c, int64_t first_head, Type type, int64_t last_block,
                        int64_t last_token) {
    for (int64_t p = 0; p < c.parts; ++p) {
        const PartMap& m = maps[p];
        const int64_t last = area_offset(m, last_block, first_head + c.heads - 1) +
                             largest(last_token, m.n1, m.n0, m.tn) + largest(c.dims[p] - 1, m.d1, m.d0, m.td);
        const int64_t end_bytes = (last + 1) * width_of(type);
        for (int64_t i = 0; i < layer_count; ++i) {
            STD_TORCH_CHECK(layers[i] >= 0 && layers[i] + end_bytes <= data.numel(), side, " of ", data.numel(),
                            " bytes is too small: layer ", i, " at ", layers[i], " reaches ", end_bytes,
                            " bytes for block ", last_block, ", token ", last_token);
        }
    }
}

inline void check_bytes(const Tensor& t, const char* name) {
    STD_TORCH_CHECK(t.scalar_type() == torch::headeronly::ScalarType::Byte && t.dim() == 1 && t.is_contiguous(), name,
                    " must be a contiguous uint8 tensor of one dimension");
}

inline const int64_t* layer_offsets(const Tensor& t, const char* name) {
    STD_TORCH_CHECK(
        t.is_cpu() && t.scalar_type() == torch::headeronly::ScalarType::Long && t.dim() == 1 && t.is_contiguous(), name,
        " must be a contiguous int64 CPU tensor of one dimension");
    return static_cast<const int64_t*>(t.data_ptr());
}

inline const Segment* segment_rows(const Tensor& t) {
    STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == torch::headeronly::ScalarType::Int && t.dim() == 2 &&
                        t.size(1) == 5 && t.is_contiguous(),
                    "segments must be a contiguous int32 CPU tensor of shape (S, 5)");
    return static_cast<const Segment*>(t.data_ptr());
}

// shape: parts, dims of part 0 and 1, heads, first source head, first target head.
// page: first head, first layer, layers of the model, page tokens; empty without checksum.
inline Request parse(const Tensor& source, const Tensor& source_layers, const Ints& source_map, Tensor& target,
                     const Tensor& target_layers, const Ints& target_map, const Tensor& segments, const Ints& shape,
                     int64_t source_type, int64_t target_type, SumSide side, Tensor* sums, const Ints& page) {
    check_bytes(source, "source");
    check_bytes(target, "target");
    STD_TORCH_CHECK(shape.size() == 6, "shape has ", shape.size(), " fields, not 6");
    Request r{};
    Convert& c = r.convert;
    STD_TORCH_CHECK(shape[0] >= 1 && shape[0] <= kMaxParts, "parts must be 1 or 2, not ", shape[0]);
    for (int64_t v : shape) STD_TORCH_CHECK(v >= 0 && v < (int64_t{1} << 31), "shape has a field out of range: ", v);
    c.parts = static_cast<int32_t>(shape[0]);
    c.dims[0] = static_cast<int32_t>(shape[1]);
    c.dims[1] = static_cast<int32_t>(shape[2]);
    c.heads = static_cast<int32_t>(shape[3]);
    c.source_head = static_cast<int32_t>(shape[4]);
    c.target_head = static_cast<int32_t>(shape[5]);
    STD_TORCH_CHECK(c.heads >= 1 && c.dims[0] >= 1 && (c.parts == 1 || c.dims[1] >= 1), "heads and dims start at 1");
    STD_TORCH_CHECK(source_type >= 0 && source_type <= 5 && target_type >= 0 && target_type <= 5,
                    "unknown element type");
    c.source_type = static_cast<Type>(source_type);
    c.target_type = static_cast<Type>(target_type);
    const bool floats = source_type <= 2 && target_type <= 2;
    STD_TORCH_CHECK(source_type == target_type || floats, "only bfloat16, float16 and float32 are converted");
    const auto maps_s = part_maps(source_map, c.parts, "source");
    const auto maps_t = part_maps(target_map, c.parts, "target");
    for (int p = 0; p < c.parts; ++p) {
        c.source[p] = maps_s[p];
        c.target[p] = maps_t[p];
    }

    ConvertData& d = r.data;
    d.source_layers = layer_offsets(source_layers, "source_layers");
    d.target_layers = layer_offsets(target_layers, "target_layers");
    d.layers = source_layers.numel();
    STD_TORCH_CHECK(d.layers == target_layers.numel(), "source has ", d.layers, " layers, target ",
                    target_layers.numel());
    d.segments = segment_rows(segments);
    d.segment_count = segments.size(0);
    int64_t last[4] = {0, 0, 0, 0}; // source block and token, target block and token
    for (int64_t i = 0; i < d.segment_count; ++i) {
        const Segment& s = d.segments[i];
        STD_TORCH_CHECK(
            s.source_block >= 0 && s.source_token >= 0 && s.target_block >= 0 && s.target_token >= 0 && s.tokens >= 1,
            "segment ", i, " has a negative field or no tokens");
        last[0] = s.source_block > last[0] ? s.source_block : last[0];
        last[1] = s.source_token + s.tokens - 1 > last[1] ? s.source_token + s.tokens - 1 : last[1];
        last[2] = s.target_block > last[2] ? s.target_block : last[2];
        last[3] = s.target_token + s.tokens - 1 > last[3] ? s.target_token + s.tokens - 1 : last[3];
    }
    if (d.segment_count > 0) {
        check_range("source", source, d.source_layers, d.layers, c.source, c, c.source_head, c.source_type, last[0],
                    last[1]);
        check_range("target", target, d.target_layers, d.layers, c.target, c, c.target_head, c.target_type, last[2],
                    last[3]);
    }
    d.source = static_cast<const uint8_t*>(source.data_ptr());
    d.target = static_cast<uint8_t*>(target.data_ptr());

    c.sum_side = side;
    if (side != SumSide::kNone) {
        STD_TORCH_CHECK(page.size() == 4, "page has ", page.size(), " fields, not 4");
        const int64_t last_page = side == SumSide::kSource ? last[0] : last[2];
        STD_TORCH_CHECK(sums->scalar_type() == torch::headeronly::ScalarType::Long && sums->dim() == 1 &&
                            sums->is_contiguous() && (d.segment_count == 0 || sums->numel() > last_page),
                        "sums must be a contiguous int64 tensor with an entry for every page");
        d.sums = static_cast<uint64_t*>(sums->data_ptr());
        const int width = width_of(side == SumSide::kSource ? c.source_type : c.target_type);
        const int32_t widest = c.parts == 2 && c.dims[1] > c.dims[0] ? c.dims[1] : c.dims[0];
        c.page = {static_cast<int32_t>(page[0]), static_cast<int32_t>(page[1]), static_cast<int32_t>(page[2]), c.parts,
                  static_cast<int32_t>(page[3]), (widest * width + 7) / 8};
    }
    return r;
}

} // namespace lmkv
