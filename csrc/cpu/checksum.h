// The CPU's checksum_runs. Work comes in units of about as many words, so that one long run still keeps all cores busy.
#pragma once

#include <vector>

#include "lmkv/runs.h"

namespace lmkv::cpu {

struct SumWork {
    std::vector<WordRun> pieces;
    std::vector<int64_t> begins; // of each unit, and of what would be the next: an index into pieces

    int64_t units() const { return static_cast<int64_t>(begins.size()) - 1; }
};

SumWork plan(const WordPlan& words);

// The checksum of units [lo, hi). Thread-safe.
uint64_t checksum(const uint8_t* data, const SumWork& work, int64_t lo, int64_t hi);

// That of the words which lie in no run.
uint64_t odd_words(const uint8_t* data, const WordPlan& words);

} // namespace lmkv::cpu
