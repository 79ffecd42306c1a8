// Codes of one byte, and the arithmetic between them and numbers. Without branches, so that compilers make vectors of
// it.
#pragma once

#include <cstdint>

#include "lmkv/exact.h"
#include "lmkv/types.h"

namespace lmkv {

enum class Code : int32_t { kFp8E4m3 = 0, kInt8 = 1 }; // index in CODECS of lmkv/codec.py

// All ones for a finite number, else 0. A mask, since compilers do not make vectors of selections that they take for
// branches; signed, since not all vectors compare unsigned.
LMKV_HD uint32_t finite_mask(uint32_t bits) {
    return -static_cast<uint32_t>(static_cast<int32_t>(bits & 0x7fffffffu) < 0x7f800000);
}

// The bits of a finite number's magnitude, which order as numbers do; 0 for others.
LMKV_HD int32_t finite_magnitude(float x) {
    const uint32_t u = bits_of(x);
    return static_cast<int32_t>(u & 0x7fffffffu & finite_mask(u));
}

struct Scale {
    float scale;
    float inverse;
};

// For a group whose largest magnitude is this. Scales that would be subnormal are 0.
LMKV_HD Scale scale_of(float magnitude, float largest_code) {
    constexpr uint32_t kSmallest = 0x00800000u; // 2^-126
    const float scale = div(magnitude, largest_code);
    if (bits_of(scale) < kSmallest) return {0.0f, 0.0f};
    return {scale, div(1.0f, scale)};
}

// 1 sign, 4 exponent and 3 mantissa bits; no infinity.
struct Fp8 {
    static constexpr float kLargest = 448.0f;
    static constexpr uint32_t kNan = 0x7f;

    // Of a magnitude up to 448 and its rounding errors, to nearest even.
    LMKV_HD static uint32_t from(float x) {
        const uint32_t u = bits_of(x);
        const uint32_t magnitude = u & 0x7fffffffu;
        const uint32_t normal = ((magnitude + 0x7ffffu + ((magnitude >> 20) & 1u)) >> 20) - (120u << 3);
        const uint32_t subnormal = bits_of(add(float_of(magnitude), 16384.0f)) - 0x46800000u; // whose last bit is 2^-9
        return (magnitude < 0x3c800000u ? subnormal : normal) | ((u >> 24) & 0x80u);
    }
    LMKV_HD static float value(uint32_t code) {
        const uint32_t rest = code & 0x7fu;
        const uint32_t normal = (rest << 20) + (120u << 23);
        const uint32_t subnormal = bits_of(sub(float_of((rest << 20) | (121u << 23)), 0.015625f)); // of 1.m · 2^-6
        const uint32_t number = rest < 8u ? subnormal : normal;
        return float_of((rest == kNan ? kNanBits : number) | ((code & 0x80u) << 24));
    }
};

struct Int8 {
    static constexpr float kLargest = 127.0f;
    static constexpr uint32_t kNan = 0x80;

    // Adding 1.5 · 2^23 rounds to an integer, to nearest even, in the last bits.
    LMKV_HD static uint32_t from(float x) { return bits_of(add(x, 12582912.0f)) & 0xffu; }
    LMKV_HD static float value(uint32_t code) {
        const float number = sub(float_of(0x4b400000u + (code ^ 0x80u)), 12583040.0f); // 1.5 · 2^23 + 128
        return code == kNan ? float_of(kNanBits) : number;
    }
};

template <class C>
LMKV_HD uint8_t encoded(float x, float inverse) {
    const uint32_t finite = finite_mask(bits_of(x));
    const uint32_t code = C::from(mul(float_of(bits_of(x) & finite), inverse));
    return static_cast<uint8_t>((code & finite) | (C::kNan & ~finite));
}

template <class C, class T>
LMKV_HD T decoded(uint8_t code, float scale) {
    return rounded<T>(mul(C::value(code), scale));
}

} // namespace lmkv
