// What one call of checksum_runs is asked to sum: the bytes of runs of one tensor, one after the other, as if they lay
// in one piece, filled up with zero bytes to whole words. Word i of that stream adds mix(word, first + i). How the
// stream is cut into runs therefore does not matter, and their order does.
//
// The host's plan turns the runs into stretches of whole words that lie in one piece, and odd words, whose bytes lie
// here and there (at the border of two runs, or at the end of the stream). No CUDA in it, so tests run it as it is.
#pragma once

#include <cstdint>
#include <vector>

#include "lmkv/checksum.h"

namespace lmkv {

struct ByteRun {
    int64_t offset; // from the beginning of the tensor
    int64_t bytes;
};
static_assert(sizeof(ByteRun) == 16, "a row of the int64 table of runs");

struct WordRun {
    int64_t offset; // of its first byte
    int64_t words;
    uint64_t index; // of its first word
};

constexpr int kWordBytes = 8;
constexpr int64_t kNoByte = -1; // behind the end of the stream: zero

struct OddWord {
    int64_t offsets[kWordBytes]; // of each byte; kNoByte
    uint64_t index;
};

struct WordPlan {
    std::vector<WordRun> runs;
    std::vector<OddWord> odd;
};

// Stretches that go on where the one before has ended become one.
inline void append_words(std::vector<WordRun>& runs, const WordRun& next) {
    if (next.words == 0) return;
    if (!runs.empty()) {
        WordRun& last = runs.back();
        const bool goes_on = last.offset + last.words * kWordBytes == next.offset &&
                             last.index + static_cast<uint64_t>(last.words) == next.index;
        if (goes_on) {
            last.words += next.words;
            return;
        }
    }
    runs.push_back(next);
}

// `first`: index of the stream's first word.
inline WordPlan plan_words(const ByteRun* runs, int64_t count, uint64_t first) {
    WordPlan plan;
    uint64_t index = first;
    OddWord open{};
    int have = 0; // bytes of it
    for (int64_t i = 0; i < count; ++i) {
        int64_t offset = runs[i].offset, left = runs[i].bytes;
        for (; have > 0 && left > 0; --left) {
            open.offsets[have++] = offset++;
            if (have < kWordBytes) continue;
            open.index = index++;
            plan.odd.push_back(open);
            have = 0;
        }
        const int64_t words = left / kWordBytes;
        append_words(plan.runs, {offset, words, index});
        index += static_cast<uint64_t>(words);
        offset += words * kWordBytes;
        for (left -= words * kWordBytes; left > 0; --left) open.offsets[have++] = offset++;
    }
    if (have > 0) {
        while (have < kWordBytes) open.offsets[have++] = kNoByte;
        open.index = index;
        plan.odd.push_back(open);
    }
    return plan;
}

LMKV_HD uint64_t odd_word(const uint8_t* data, const OddWord& odd) {
    uint64_t word = 0;
    LMKV_UNROLL
    for (int i = 0; i < kWordBytes; ++i) {
        if (odd.offsets[i] >= 0) word |= static_cast<uint64_t>(data[odd.offsets[i]]) << (8 * i);
    }
    return word;
}

} // namespace lmkv
