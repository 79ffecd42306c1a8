#include "convert.h"

#include <cstring>

namespace lmkv::cpu {
namespace {

// One part of one segment, layer and head.
struct Piece {
    const uint8_t* source; // of token 0 and dimension 0 of the area
    uint8_t* target;
    const PartMap& from;
    const PartMap& to;
    int64_t source_token;
    int64_t target_token;
    int64_t tokens;
    int64_t dims;
};

bool rows_contiguous(const PartMap& m) { return m.td == 0 && m.d1 == 1; }

template <class From, class To>
To cast(From x) {
    return from_float<To>(to_float(x));
}

template <class From, class To, bool kSame>
void copy_elements(const Piece& p) {
    const auto* source = reinterpret_cast<const From*>(p.source);
    auto* target = reinterpret_cast<To*>(p.target);
    for (int64_t n = 0; n < p.tokens; ++n) {
        const From* s = source + token_offset(p.from, p.source_token + n);
        To* t = target + token_offset(p.to, p.target_token + n);
        for (int64_t d = 0; d < p.dims; ++d) {
            if constexpr (kSame) {
                t[dim_offset(p.to, d)] = s[dim_offset(p.from, d)];
            } else {
                t[dim_offset(p.to, d)] = cast<From, To>(s[dim_offset(p.from, d)]);
            }
        }
    }
}

template <class From>
void cast_elements(const Piece& p, Type to) {
    if (to == Type::kBfloat16) return copy_elements<From, Bf16, false>(p);
    if (to == Type::kFloat16) return copy_elements<From, Fp16, false>(p);
    copy_elements<From, float, false>(p);
}

void copy_rows(const Piece& p, int width) {
    const int64_t row = p.dims * width;
    for (int64_t n = 0; n < p.tokens; ++n) {
        std::memcpy(p.target + token_offset(p.to, p.target_token + n) * width,
                    p.source + token_offset(p.from, p.source_token + n) * width, row);
    }
}

void copy(const Piece& p, Type from, Type to) {
    const int width = width_of(from);
    if (from != to) {
        if (from == Type::kBfloat16) return cast_elements<Bf16>(p, to);
        if (from == Type::kFloat16) return cast_elements<Fp16>(p, to);
        return cast_elements<float>(p, to);
    }
    if (rows_contiguous(p.from) && rows_contiguous(p.to)) return copy_rows(p, width);
    if (width == 4) return copy_elements<uint32_t, uint32_t, true>(p);
    if (width == 2) return copy_elements<uint16_t, uint16_t, true>(p);
    copy_elements<uint8_t, uint8_t, true>(p);
}

// The sum over the rows of a piece on its page side. Rows of pages are contiguous.
uint64_t row_sums(const Convert& c, const Piece& p, int64_t head, int64_t layer, int64_t part) {
    const bool at_source = c.sum_side == SumSide::kSource;
    const int width = width_of(at_source ? c.source_type : c.target_type);
    const int64_t bytes = p.dims * width;
    uint64_t sum = 0;
    for (int64_t n = 0; n < p.tokens; ++n) {
        const int64_t token = (at_source ? p.source_token : p.target_token) + n;
        const uint8_t* row =
            at_source ? p.source + token_offset(p.from, token) * width : p.target + token_offset(p.to, token) * width;
        uint64_t index = row_word(c.page, head, layer, part, token);
        for (int64_t at = 0; at < bytes; at += 8, ++index) {
            uint64_t word = 0;
            std::memcpy(&word, row + at, static_cast<size_t>(bytes - at < 8 ? bytes - at : 8));
            sum += mix(word, index);
        }
    }
    return sum;
}

} // namespace

void convert(const Convert& c, const ConvertData& d, int64_t lo, int64_t hi) {
    const int from_width = width_of(c.source_type);
    const int to_width = width_of(c.target_type);
    for (int64_t i = lo; i < hi; ++i) {
        const Segment& s = d.segments[i];
        uint64_t sum = 0;
        for (int64_t h = 0; h < c.heads; ++h) {
            for (int64_t l = 0; l < d.layers; ++l) {
                for (int part = 0; part < c.parts; ++part) {
                    const PartMap& from = c.source[part];
                    const PartMap& to = c.target[part];
                    const Piece piece{
                        d.source + d.source_layers[l] +
                            area_offset(from, s.source_block, c.source_head + h) * from_width,
                        d.target + d.target_layers[l] + area_offset(to, s.target_block, c.target_head + h) * to_width,
                        from,
                        to,
                        s.source_token,
                        s.target_token,
                        s.tokens,
                        c.dims[part]};
                    copy(piece, c.source_type, c.target_type);
                    if (c.sum_side != SumSide::kNone) sum += row_sums(c, piece, h, l, part);
                }
            }
        }
        if (c.sum_side != SumSide::kNone) {
            const int32_t page = c.sum_side == SumSide::kSource ? s.source_block : s.target_block;
            __atomic_fetch_add(&d.sums[page], sum, __ATOMIC_RELAXED);
        }
    }
}

} // namespace lmkv::cpu
