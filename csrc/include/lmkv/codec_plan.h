// The host's part of encode_pages and decode_pages on a GPU: which coder, cut into launches. No CUDA in it, so tests
// run it as it is.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "lmkv/codec_body.h"

namespace lmkv {

constexpr int kCoderVector = 8; // numbers: 16 bytes and more of pages, 8 of codes

// Whether groups come in whole vectors, and everything that is ever added up to an address is a multiple of theirs.
inline bool codes_vectors(const Codec& c, const CodecData& d) {
    int64_t numbers = static_cast<int64_t>(reinterpret_cast<uintptr_t>(d.pages));
    int64_t codes = static_cast<int64_t>(reinterpret_cast<uintptr_t>(d.coded));
    for (int64_t i = 0; i < d.layer_count; ++i) {
        numbers |= d.page_layers[i];
        codes |= d.coded_layers[i];
    }
    for (int p = 0; p < c.parts; ++p) {
        const PartMap& from = c.page[p];
        const PartMap& to = c.coded[p];
        numbers |= (from.offset | from.block | from.head) * width_of(c.type);
        codes |= to.offset | to.block | to.head;
        const int64_t last_group = c.page_tokens % kGroupTokens;
        codes |= c.dims[p] * int64_t{kGroupTokens} | c.dims[p] * last_group;
    }
    return numbers % 16 == 0 && codes % kCoderVector == 0;
}

template <class T, class C, class Use>
void with_coder_of(const Codec& c, const CodecData& d, Use&& use) {
    if (codes_vectors(c, d)) return use(Coder<T, C, kCoderVector>{});
    use(Coder<T, C, 1>{});
}

template <class T, class Use>
void with_codes(const Codec& c, const CodecData& d, Use&& use) {
    if (c.code == Code::kFp8E4m3) return with_coder_of<T, Fp8>(c, d, use);
    with_coder_of<T, Int8>(c, d, use);
}

// Calls use(coder) with the one that fits the call.
template <class Use>
void with_coder(const Codec& c, const CodecData& d, Use&& use) {
    if (c.type == Type::kBfloat16) return with_codes<Bf16>(c, d, use);
    if (c.type == Type::kFloat16) return with_codes<Fp16>(c, d, use);
    with_codes<float>(c, d, use);
}

// Calls launch(batch) for one batch after the other; they may run in any order.
template <class Batch, class Launch>
void for_each_codec_batch(const Codec& c, const CodecData& d, Launch&& launch) {
    Batch b{};
    b.codec = c;
    b.pages = d.pages;
    b.coded = d.coded;
    for (int64_t l = 0; l < d.layer_count; l += b.layer_count) {
        b.layer_count = static_cast<int32_t>(std::min<int64_t>(Batch::kMaxLayers, d.layer_count - l));
        std::copy_n(d.page_layers + l, b.layer_count, b.page_layers);
        std::copy_n(d.coded_layers + l, b.layer_count, b.coded_layers);
        for (int64_t i = 0; i < d.move_count; i += b.move_count) {
            b.move_count = static_cast<int32_t>(std::min<int64_t>(Batch::kMaxMoves, d.move_count - i));
            std::copy_n(d.moves + i, b.move_count, b.moves);
            if (codec_groups(b) >= int64_t{1} << 31) { // the kernels count them in 32 bits
                throw std::runtime_error(std::to_string(codec_groups(b)) +
                                         " groups are too many for one launch · code fewer pages at once");
            }
            launch(static_cast<const Batch&>(b));
        }
    }
}

} // namespace lmkv
