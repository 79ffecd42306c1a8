// The checksum of words that lie in one piece.
#pragma once

#include "runs.h"

namespace lmkv::cpu::LMKV_ISA {

uint64_t sum_words(const uint8_t* p, int64_t words, uint64_t index) {
    Sum sum;
    copy_run<true, Write::kNothing>(p, nullptr, words * 8, 0, index, sum);
    return sum.total();
}

} // namespace lmkv::cpu::LMKV_ISA
