// From the arguments of encode_pages and decode_pages to Codec and CodecData. Everything is checked here; kernels trust
// what they get.
#pragma once

#include "arguments.h"
#include "lmkv/codec.h"

namespace lmkv {

struct CodecRequest {
    Codec codec;
    CodecData data;
};

inline const Move* move_rows(const Tensor& t) {
    STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == torch::headeronly::ScalarType::Int && t.dim() == 2 &&
                        t.size(1) == 2 && t.is_contiguous(),
                    "moves must be a contiguous int32 CPU tensor of 2 columns");
    return static_cast<const Move*>(t.data_ptr());
}

// Raises unless the areas, each `area_elements` long, lie within the tensor, aligned to their elements.
inline void check_areas(const char* side, const Tensor& data, const int64_t* layers, int64_t layer_count,
                        const PartMap& m, int64_t last_block, int64_t last_head, int64_t area_elements, int64_t width,
                        int64_t alignment) {
    const int64_t end_bytes = (area_offset(m, last_block, last_head) + area_elements) * width;
    STD_TORCH_CHECK(((m.offset | m.block | m.head) * width) % alignment == 0, side,
                    " have areas that are not aligned to ", alignment, " bytes");
    for (int64_t i = 0; i < layer_count; ++i) {
        STD_TORCH_CHECK(layers[i] >= 0 && layers[i] + end_bytes <= data.numel(), side, " of ", data.numel(),
                        " bytes are too small: layer ", i, " at ", layers[i], " reaches ", end_bytes,
                        " bytes for page ", last_block);
        STD_TORCH_CHECK((reinterpret_cast<uintptr_t>(data.data_ptr()) + layers[i]) % alignment == 0, side, ": layer ",
                        i, " at byte ", layers[i], " is not aligned to ", alignment, " bytes");
    }
}

inline void check_codec_ranges(const Tensor& pages, const Tensor& coded, const Codec& c, const CodecData& d) {
    int64_t page = 0, target = 0;
    for (int64_t i = 0; i < d.move_count; ++i) {
        const Move& m = d.moves[i];
        STD_TORCH_CHECK(m.page >= 0 && m.coded >= 0, "move ", i, " has a negative field");
        page = m.page > page ? m.page : page;
        target = m.coded > target ? m.coded : target;
    }
    if (d.move_count == 0) return;
    for (int p = 0; p < c.parts; ++p) {
        const PartMap& m = c.page[p];
        STD_TORCH_CHECK(m.tn == 0 && m.td == 0 && m.d1 == 1 && m.n1 == c.dims[p], "pages must be canonical");
        const int64_t numbers = int64_t{c.page_tokens} * c.dims[p];
        check_areas("pages", pages, d.page_layers, d.layer_count, m, page, c.page_head + c.heads - 1, numbers,
                    width_of(c.type), width_of(c.type));
        STD_TORCH_CHECK(numbers % 4 == 0, "the scales behind ", numbers, " codes would not be aligned to 4 bytes");
        check_areas("coded pages", coded, d.coded_layers, d.layer_count, c.coded[p], target, c.coded_head + c.heads - 1,
                    numbers + int64_t{4} * group_count(c), 1, 4);
    }
}

inline Codec parse_codec(const Ints& page_map, const Ints& coded_map, const Ints& shape, int64_t type, int64_t code) {
    Codec c{};
    STD_TORCH_CHECK(shape.size() == 7, "shape has ", shape.size(), " fields, not 7");
    STD_TORCH_CHECK(type >= 0 && type <= 2, "pages are coded from and to bfloat16, float16 and float32 only");
    STD_TORCH_CHECK(code == 0 || code == 1, "codec ", code, " is unknown");
    STD_TORCH_CHECK(shape[0] == 1 || shape[0] == 2, "one or two parts");
    STD_TORCH_CHECK(shape[1] >= 1 && (shape[0] == 1 || shape[2] >= 1) && shape[3] >= 1 && shape[4] >= 0 &&
                        shape[5] >= 0 && shape[6] >= 1,
                    "sizes start at 1, heads at 0");
    c.code = static_cast<Code>(code);
    c.type = static_cast<Type>(type);
    c.parts = static_cast<int32_t>(shape[0]);
    const auto from = part_maps(page_map, c.parts, "pages'");
    const auto to = part_maps(coded_map, c.parts, "coded pages'");
    for (int p = 0; p < c.parts; ++p) {
        c.dims[p] = static_cast<int32_t>(shape[1 + p]);
        c.page[p] = from[p];
        c.coded[p] = to[p];
    }
    c.heads = static_cast<int32_t>(shape[3]);
    c.page_head = static_cast<int32_t>(shape[4]);
    c.coded_head = static_cast<int32_t>(shape[5]);
    c.page_tokens = static_cast<int32_t>(shape[6]);
    return c;
}

inline CodecRequest parse(const Tensor& pages, const Tensor& page_layers, const Ints& page_map, const Tensor& coded,
                          const Tensor& coded_layers, const Ints& coded_map, const Tensor& moves, const Ints& shape,
                          int64_t type, int64_t code) {
    check_bytes(pages, "pages");
    check_bytes(coded, "coded pages");
    CodecRequest r{parse_codec(page_map, coded_map, shape, type, code), {}};
    CodecData& d = r.data;
    d.pages = static_cast<uint8_t*>(pages.data_ptr());
    d.coded = static_cast<uint8_t*>(coded.data_ptr());
    d.page_layers = layer_offsets(page_layers, "page_layers");
    d.coded_layers = layer_offsets(coded_layers, "coded_layers");
    d.layer_count = page_layers.numel();
    STD_TORCH_CHECK(d.layer_count == coded_layers.numel(), "pages have ", d.layer_count, " layers, coded pages ",
                    coded_layers.numel());
    d.moves = move_rows(moves);
    d.move_count = moves.size(0);
    check_codec_ranges(pages, coded, r.codec, d);
    return r;
}

} // namespace lmkv
