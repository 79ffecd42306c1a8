#include "codec.h"

#include <cstring>

#include "clones.h"

namespace lmkv::cpu {
namespace {

template <class T, class C>
struct Encode {
    static void group(const Group& g) {
        const auto* numbers = reinterpret_cast<const T*>(g.numbers);
        int32_t magnitude = 0;
        for (int32_t i = 0; i < g.count; ++i) {
            const int32_t other = finite_magnitude(to_float(numbers[i]));
            magnitude = other > magnitude ? other : magnitude;
        }
        const Scale scale = scale_of(float_of(static_cast<uint32_t>(magnitude)), C::kLargest);
        uint8_t* codes = g.codes;
        LMKV_INDEPENDENT
        for (int32_t i = 0; i < g.count; ++i) codes[i] = encoded<C>(to_float(numbers[i]), scale.inverse);
        std::memcpy(g.scale, &scale.scale, sizeof(float));
    }
};

template <class T, class C>
struct Decode {
    static void group(const Group& g) {
        auto* numbers = reinterpret_cast<T*>(g.numbers);
        const uint8_t* codes = g.codes;
        float scale;
        std::memcpy(&scale, g.scale, sizeof(float));
        LMKV_INDEPENDENT
        for (int32_t i = 0; i < g.count; ++i) numbers[i] = decoded<C, T>(codes[i], scale);
    }
};

template <class Work>
void work_units(const Codec& c, const CodecData& d, int64_t lo, int64_t hi) {
    const int32_t groups = group_count(c);
    for (int64_t unit = lo; unit < hi; ++unit) {
        const int64_t layer = unit % d.layer_count;
        const int64_t head = unit / d.layer_count % c.heads;
        const Move& move = d.moves[unit / d.layer_count / c.heads];
        const uint8_t* page = d.pages + d.page_layers[layer];
        const uint8_t* coded = d.coded + d.coded_layers[layer];
        for (int32_t part = 0; part < c.parts; ++part) {
            for (int32_t g = 0; g < groups; ++g) Work::group(group_of(c, page, coded, move, head, part, g));
        }
    }
}

template <template <class, class> class Work, class T>
void work_type(const Codec& c, const CodecData& d, int64_t lo, int64_t hi) {
    if (c.code == Code::kFp8E4m3) return work_units<Work<T, Fp8>>(c, d, lo, hi);
    work_units<Work<T, Int8>>(c, d, lo, hi);
}

template <template <class, class> class Work>
void work(const Codec& c, const CodecData& d, int64_t lo, int64_t hi) {
    if (c.type == Type::kBfloat16) return work_type<Work, Bf16>(c, d, lo, hi);
    if (c.type == Type::kFloat16) return work_type<Work, Fp16>(c, d, lo, hi);
    work_type<Work, float>(c, d, lo, hi);
}

LMKV_CLONES void encode_units(const Codec& c, const CodecData& d, int64_t lo, int64_t hi) {
    work<Encode>(c, d, lo, hi);
}
LMKV_CLONES void decode_units(const Codec& c, const CodecData& d, int64_t lo, int64_t hi) {
    work<Decode>(c, d, lo, hi);
}

} // namespace

void encode(const Codec& c, const CodecData& d, int64_t lo, int64_t hi) { encode_units(c, d, lo, hi); }
void decode(const Codec& c, const CodecData& d, int64_t lo, int64_t hi) { decode_units(c, d, lo, hi); }

} // namespace lmkv::cpu
