// From the types and packets that a call needs, known when it is made, to the mover compiled for them.
#pragma once

#include <cstdint>
#include <type_traits>

#include "lmkv/convert_body.h"

namespace lmkv {

template <bool kSum, class Use>
void with_packets(int32_t packet_bytes, Use&& use) {
    switch (packet_bytes) {
        case 16:
            return use(Packets<16, kSum>{});
        case 8:
            return use(Packets<8, kSum>{});
        case 4:
            return use(Packets<4, kSum>{});
        case 2:
            return use(Packets<2, kSum>{});
        default:
            return use(Packets<1, kSum>{});
    }
}

template <bool kSum, class From, class Use>
void with_cast(Type to, Use&& use) {
    if constexpr (!std::is_same_v<From, Bf16>) {
        if (to == Type::kBfloat16) return use(Elements<From, Bf16, kSum>{});
    }
    if constexpr (!std::is_same_v<From, Fp16>) {
        if (to == Type::kFloat16) return use(Elements<From, Fp16, kSum>{});
    }
    if constexpr (!std::is_same_v<From, float>) use(Elements<From, float, kSum>{});
}

template <bool kSum, class Use>
void with_elements(Type from, Type to, Use&& use) {
    if (from == to) {
        switch (width_of(from)) {
            case 4:
                return use(Elements<uint32_t, uint32_t, kSum>{});
            case 2:
                return use(Elements<uint16_t, uint16_t, kSum>{});
            default:
                return use(Elements<uint8_t, uint8_t, kSum>{});
        }
    }
    if (from == Type::kBfloat16) return with_cast<kSum, Bf16>(to, use);
    if (from == Type::kFloat16) return with_cast<kSum, Fp16>(to, use);
    with_cast<kSum, float>(to, use);
}

// Calls use(mover) with the one that the deal asks for.
template <class Use>
void with_mover(const Convert& c, const Deal& deal, Use&& use) {
    const bool sums = c.sum_side != SumSide::kNone;
    if (deal.packet_bytes > 0)
        return sums ? with_packets<true>(deal.packet_bytes, use) : with_packets<false>(deal.packet_bytes, use);
    sums ? with_elements<true>(c.source_type, c.target_type, use)
         : with_elements<false>(c.source_type, c.target_type, use);
}

} // namespace lmkv
