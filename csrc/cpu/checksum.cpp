#include "checksum.h"

#include <algorithm>

#include "isa.h"

namespace lmkv::cpu {
namespace {

constexpr int64_t kUnitWords = (256 << 10) / kWordBytes; // worth the start of a thread

} // namespace

SumWork plan(const WordPlan& words) {
    SumWork work{{}, {0}};
    int64_t room = kUnitWords;
    for (WordRun run : words.runs) {
        while (run.words > 0) {
            const int64_t taken = std::min(run.words, room);
            work.pieces.push_back({run.offset, taken, run.index});
            run = {run.offset + taken * kWordBytes, run.words - taken, run.index + static_cast<uint64_t>(taken)};
            room -= taken;
            if (room > 0) continue;
            work.begins.push_back(static_cast<int64_t>(work.pieces.size()));
            room = kUnitWords;
        }
    }
    if (room < kUnitWords) work.begins.push_back(static_cast<int64_t>(work.pieces.size()));
    return work;
}

uint64_t checksum(const uint8_t* data, const SumWork& work, int64_t lo, int64_t hi) {
    static SumFn* const sum = best_isa().sum_words;
    uint64_t total = 0;
    for (int64_t i = work.begins[lo]; i < work.begins[hi]; ++i) {
        const WordRun& piece = work.pieces[i];
        total += sum(data + piece.offset, piece.words, piece.index);
    }
    return total;
}

uint64_t odd_words(const uint8_t* data, const WordPlan& words) {
    uint64_t total = 0;
    for (const OddWord& odd : words.odd) total += mix(odd_word(data, odd), odd.index);
    return total;
}

} // namespace lmkv::cpu
