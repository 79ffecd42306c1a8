// Element types and their conversion, rounded to nearest even, as lmkv/oracle.py has it.
#pragma once

#include <cstdint>
#include <cstring>

#include "lmkv/macros.h"

namespace lmkv {

// Index of the type in WIDTHS of lmkv/layout.py.
enum class Type : int32_t { kBfloat16 = 0, kFloat16 = 1, kFloat32 = 2, kFloat8E4m3 = 3, kInt8 = 4, kUint8 = 5 };

LMKV_HD constexpr int width_of(Type t) {
    return t == Type::kFloat32 ? 4 : (t == Type::kBfloat16 || t == Type::kFloat16) ? 2 : 1;
}

struct Bf16 {
    uint16_t bits;
};
struct Fp16 {
    uint16_t bits;
};

LMKV_HD uint32_t bits_of(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    return u;
}
LMKV_HD float float_of(uint32_t u) {
    float x;
    memcpy(&x, &u, 4);
    return x;
}

LMKV_HD float to_float(float x) { return x; }
LMKV_HD float to_float(Bf16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
LMKV_HD float to_float(Fp16 x) {
    const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
    const uint32_t rest = x.bits & 0x7fffu;
    // Place the mantissa under an exponent that the multiplication corrects: right for subnormals too.
    const uint32_t finite = bits_of(float_of(rest << 13) * float_of(0x77800000u)); // 2^112
    const uint32_t other = 0x7f800000u | ((rest & 0x3ffu) << 13);                  // inf, NaN
    return float_of(sign | (rest >= 0x7c00u ? other : finite)); // both are computed: without a branch, for vectors
}

template <class T>
LMKV_HD T from_float(float x);

template <>
LMKV_HD float from_float<float>(float x) {
    return x;
}
template <>
LMKV_HD Bf16 from_float<Bf16>(float x) {
    const uint32_t u = bits_of(x);
    if ((u & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((u >> 16) | 0x40u)}; // NaN, made quiet
    return {static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}
template <>
LMKV_HD Fp16 from_float<Fp16>(float x) {
    const uint32_t u = bits_of(x);
    const uint32_t sign = (u >> 16) & 0x8000u;
    const uint32_t magnitude = u & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu))};
    if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)}; // rounds to infinity
    if (magnitude < 0x38800000u) { // subnormal: the float addition rounds for us
        const float shifted = float_of(magnitude) + float_of(0x3f000000u); // + 0.5
        return {static_cast<uint16_t>(sign | (bits_of(shifted) - 0x3f000000u))};
    }
    const uint32_t rounded = magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u);
    return {static_cast<uint16_t>(sign | (rounded >> 13))};
}

} // namespace lmkv
