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

// Devices differ in the bits of the NaNs that arithmetic makes: all of them become this one.
constexpr uint32_t kNanBits = 0x7fc00000u;
LMKV_HD float one_nan(float x) {
    const uint32_t u = bits_of(x);
    return float_of((u & 0x7fffffffu) > 0x7f800000u ? kNanBits : u);
}

} // namespace lmkv
