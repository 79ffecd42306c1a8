// Vectors, by the compilers' generic extension: g++ and clang make of them what the machine has.
#pragma once

#include <cstdint>
#include <cstring>

#include "isa.h"
#include "lmkv/checksum.h"

namespace lmkv::cpu::LMKV_ISA {

template <class T, int kBytes>
struct Vector {
    typedef T Type __attribute__((vector_size(kBytes)));
    typedef T Anywhere __attribute__((vector_size(kBytes), aligned(1), may_alias));

    static Type load(const void* p) { return *static_cast<const Anywhere*>(p); }
    static void store(void* p, Type v) { *static_cast<Anywhere*>(p) = v; }
};

constexpr int64_t kVectorBytes = LMKV_VECTOR_BYTES;
constexpr int64_t kVectorWords = kVectorBytes / 8;
using Word = Vector<uint64_t, LMKV_VECTOR_BYTES>;
using Words = Word::Type;

// A store past the caches, for whole cache lines that nobody reads soon.
inline void stream(void* p, Words v) {
#if LMKV_VECTOR_BYTES == 64
    _mm512_stream_si512(static_cast<__m512i*>(p), reinterpret_cast<__m512i>(v));
#elif LMKV_VECTOR_BYTES == 32
    _mm256_stream_si256(static_cast<__m256i*>(p), reinterpret_cast<__m256i>(v));
#elif defined(__SSE2__)
    _mm_stream_si128(static_cast<__m128i*>(p), reinterpret_cast<__m128i>(v));
#else
    Word::store(p, v);
#endif
}

// The same of 16 bytes: neighbours that fill the line soon after each other leave as one.
template <class V>
inline void stream_short(void* p, V v) {
#if defined(__SSE2__)
    _mm_stream_si128(static_cast<__m128i*>(p), reinterpret_cast<__m128i>(v));
#else
    std::memcpy(p, &v, sizeof v);
#endif
}

// x · kWordPrime. The factor has 32 bits, so two 32-bit multiplications do where there is no 64-bit one.
inline Words times_prime(Words x) {
#if LMKV_VECTOR_BYTES == 32
    const __m256i prime = _mm256_set1_epi64x(kWordPrime);
    const auto low = reinterpret_cast<Words>(_mm256_mul_epu32(reinterpret_cast<__m256i>(x), prime));
    return low + (reinterpret_cast<Words>(_mm256_mul_epu32(reinterpret_cast<__m256i>(x >> 32), prime)) << 32);
#elif LMKV_VECTOR_BYTES == 16 && defined(__SSE2__)
    const __m128i prime = _mm_set1_epi64x(kWordPrime);
    const auto low = reinterpret_cast<Words>(_mm_mul_epu32(reinterpret_cast<__m128i>(x), prime));
    return low + (reinterpret_cast<Words>(_mm_mul_epu32(reinterpret_cast<__m128i>(x >> 32), prime)) << 32);
#else
    return x * kWordPrime;
#endif
}

} // namespace lmkv::cpu::LMKV_ISA
