// Copies a run of bytes that lies in one piece on both sides, and sums its words on the way.
#pragma once

#include <cstring>

#include "vectors.h"

namespace lmkv::cpu::LMKV_ISA {

// The checksum of what has been copied so far, a share in every lane.
class Sum {
  public:
    // (index + 1) · kWordKey of the vector that begins at word `index`.
    static Words keys(uint64_t index) {
        Words k{};
        for (int64_t i = 0; i < kVectorWords; ++i) k[i] = static_cast<uint64_t>(i) * kWordKey;
        return k + (index + 1) * kWordKey;
    }

    void add(Words x, Words keys) { // mix() of lmkv/checksum.h
        x ^= keys;
        x ^= x >> 32;
        x = times_prime(x);
        lanes_ += x ^ (x >> 32);
    }

    // Less than a vector, filled up with zeros to words.
    void add_rest(const uint8_t* p, int64_t bytes, uint64_t index) {
        for (int64_t at = 0; at < bytes; at += 8, ++index) {
            uint64_t word = 0;
            std::memcpy(&word, p + at, static_cast<size_t>(bytes - at < 8 ? bytes - at : 8));
            rest_ += mix(word, index);
        }
    }

    uint64_t total() const {
        uint64_t sum = rest_;
        for (int64_t i = 0; i < kVectorWords; ++i) sum += lanes_[i];
        return sum;
    }

  private:
    Words lanes_{};
    uint64_t rest_ = 0;
};

// Reads further than this from where a run begins are foreseen by the machine.
constexpr int64_t kUnforeseenBytes = 2048;

// What becomes of a run: a copy, a copy past the caches (whole aligned cache lines only), or nothing but its sum.
enum class Write { kStore, kStream, kNothing };

// `index`: of the run's first word in its page. `next`: how far off lies what will be read after the run; its beginning
// is fetched ahead.
template <bool kSum, Write kWrite>
inline void copy_run(const uint8_t* source, uint8_t* target, int64_t bytes, int64_t next, uint64_t index, Sum& sum) {
    Words keys = Sum::keys(index);
    const auto copy_vector = [&](int64_t at) {
        const Words x = Word::load(source + at);
        if constexpr (kSum) {
            sum.add(x, keys);
            keys += static_cast<uint64_t>(kVectorWords) * kWordKey;
        }
        if constexpr (kWrite == Write::kStream) {
            stream(target + at, x);
        } else if constexpr (kWrite == Write::kStore) {
            Word::store(target + at, x);
        }
    };
    const int64_t end = bytes / kVectorBytes * kVectorBytes;
    const int64_t first = next == 0 ? 0 : end < kUnforeseenBytes ? end : kUnforeseenBytes;
    int64_t at = 0;
    for (; at < first; at += kVectorBytes) {
        __builtin_prefetch(source + at + next);
        copy_vector(at);
    }
    for (; at < end; at += kVectorBytes) copy_vector(at);
    if (at == bytes) return;
    if constexpr (kWrite != Write::kNothing) std::memcpy(target + at, source + at, static_cast<size_t>(bytes - at));
    if constexpr (kSum) sum.add_rest(source + at, bytes - at, index + static_cast<uint64_t>(at / 8));
}

} // namespace lmkv::cpu::LMKV_ISA
