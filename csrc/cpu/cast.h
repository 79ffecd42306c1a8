// Conversion of element types, row by row.
#pragma once

#include <cstring>

#include "isa.h"

namespace lmkv::cpu::LMKV_ISA {

template <class From, class To>
void cast_row(const uint8_t* source, uint8_t* target, int64_t dims) {
    for (int64_t d = 0; d < dims; ++d) {
        From x;
        std::memcpy(&x, source + d * static_cast<int64_t>(sizeof(From)), sizeof(From));
        const To y = from_float<To>(to_float(x));
        std::memcpy(target + d * static_cast<int64_t>(sizeof(To)), &y, sizeof(To));
    }
}

template <class From>
void cast_row_from(const uint8_t* source, uint8_t* target, int64_t dims, Type to) {
    if (to == Type::kBfloat16) return cast_row<From, Bf16>(source, target, dims);
    if (to == Type::kFloat16) return cast_row<From, Fp16>(source, target, dims);
    cast_row<From, float>(source, target, dims);
}

inline void cast_row(const uint8_t* source, Type from, uint8_t* target, Type to, int64_t dims) {
    if (from == Type::kBfloat16) return cast_row_from<Bf16>(source, target, dims, to);
    if (from == Type::kFloat16) return cast_row_from<Fp16>(source, target, dims, to);
    cast_row_from<float>(source, target, dims, to);
}

} // namespace lmkv::cpu::LMKV_ISA
