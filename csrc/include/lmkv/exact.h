// Single float operations, each rounded to nearest and never fused with another, so that every device computes the same
// bits. On the host the compiler's flag -ffp-contract=off sees to it (CMakeLists.txt).
#pragma once

#include <cstdint>

#include "lmkv/macros.h"
#include "lmkv/types.h"

#if defined(__HIPCC__)
#pragma clang fp contract(off)
#endif

namespace lmkv {

#if defined(__CUDA_ARCH__)
LMKV_HD float mul(float a, float b) { return __fmul_rn(a, b); }
LMKV_HD float add(float a, float b) { return __fadd_rn(a, b); }
LMKV_HD float sub(float a, float b) { return __fsub_rn(a, b); }
LMKV_HD float div(float a, float b) { return __fdiv_rn(a, b); }
#else
LMKV_HD float mul(float a, float b) { return a * b; }
LMKV_HD float add(float a, float b) { return a + b; }
LMKV_HD float sub(float a, float b) { return a - b; }
LMKV_HD float div(float a, float b) { return a / b; }
#endif

// Devices differ in the bits of the NaNs that arithmetic makes: `rounded` makes all of them this one. Otherwise it is
// from_float, to nearest even, but without a branch, so that compilers make vectors of it.
constexpr uint32_t kNanBits = 0x7fc00000u;
LMKV_HD bool is_nan(uint32_t bits) { return (bits & 0x7fffffffu) > 0x7f800000u; }

template <class T>
LMKV_HD T rounded(float x);

template <>
LMKV_HD float rounded<float>(float x) {
    const uint32_t u = bits_of(x);
    return float_of(is_nan(u) ? kNanBits : u);
}
template <>
LMKV_HD Bf16 rounded<Bf16>(float x) {
    const uint32_t any = bits_of(x);
    const uint32_t u = is_nan(any) ? kNanBits : any; // which rounds to a NaN
    return {static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}
template <>
LMKV_HD Fp16 rounded<Fp16>(float x) {
    const uint32_t u = bits_of(x);
    const uint32_t magnitude = u & 0x7fffffffu;
    const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    const uint32_t subnormal = bits_of(add(float_of(magnitude), 0.5f)) - 0x3f000000u;
    const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
    const uint32_t number = (magnitude >= 0x477ff000u ? 0x7c00u : finite) | ((u >> 16) & 0x8000u);
    return {static_cast<uint16_t>(is_nan(u) ? 0x7e00u : number)};
}

} // namespace lmkv
