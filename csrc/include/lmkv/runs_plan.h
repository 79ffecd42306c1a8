// The host's part of checksum_runs on a GPU: how it is done, cut into launches. No CUDA in it, so tests run it as it
// is.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "lmkv/runs_body.h"

namespace lmkv {

// The largest power of two up to 16 that divides every address at which a run begins.
inline int32_t sum_packet(const uint8_t* data, const WordPlan& plan) {
    uint64_t all = 16;
    for (const WordRun& run : plan.runs) all |= reinterpret_cast<uintptr_t>(data) + static_cast<uint64_t>(run.offset);
    return static_cast<int32_t>(all & -all);
}

// Packets of 16 bytes are two words: the last word of an odd number is summed by itself.
inline void make_even(WordPlan& plan) {
    for (WordRun& run : plan.runs) {
        if (run.words % 2 == 0) continue;
        --run.words;
        OddWord last{};
        for (int i = 0; i < kWordBytes; ++i) last.offsets[i] = run.offset + run.words * kWordBytes + i;
        last.index = run.index + static_cast<uint64_t>(run.words);
        plan.odd.push_back(last);
    }
    const auto empty = [](const WordRun& run) { return run.words == 0; };
    plan.runs.erase(std::remove_if(plan.runs.begin(), plan.runs.end(), empty), plan.runs.end());
}

// Calls use(mover) with the one that reads packets of this size.
template <class Use>
void with_sum_packets(int32_t packet_bytes, Use&& use) {
    switch (packet_bytes) {
        case 16:
            return use(SumWords<16>{});
        case 8:
            return use(SumWords<8>{});
        case 4:
            return use(SumWords<4>{});
        case 2:
            return use(SumWords<2>{});
        default:
            return use(SumWords<1>{});
    }
}

// Calls launch(batch) for one batch after the other; they may run in any order.
template <class Batch, class Launch>
void for_each_runs_batch(const uint8_t* data, uint64_t* sum, const WordPlan& plan, Launch&& launch) {
    const auto runs = static_cast<int64_t>(plan.runs.size()), odd = static_cast<int64_t>(plan.odd.size());
    Batch b{};
    b.data = data;
    b.sum = sum;
    for (int64_t r = 0, o = 0; r < runs || o < odd; r += b.run_count, o += b.odd_count) {
        b.run_count = static_cast<int32_t>(std::min<int64_t>(Batch::kMaxRuns, runs - r));
        b.odd_count = static_cast<int32_t>(std::min<int64_t>(Batch::kMaxOdd, odd - o));
        std::copy_n(plan.runs.data() + r, b.run_count, b.runs);
        std::copy_n(plan.odd.data() + o, b.odd_count, b.odd);
        int64_t longest = 1, slices = 0;
        for (int i = 0; i < b.run_count; ++i) longest = std::max(longest, b.runs[i].words);
        slices = (longest - 1) / kSumSliceWords + 1;
        if (slices * std::max(b.run_count, 1) >= int64_t{1} << 31) { // the kernels count them in 32 bits
            throw std::runtime_error(std::to_string(longest) +
                                     " words are too long a run for one launch · sum fewer bytes at once");
        }
        b.slices = static_cast<int32_t>(slices);
        launch(static_cast<const Batch&>(b));
    }
}

// Warps that have something to do.
template <class Batch>
int64_t sum_warps(const Batch& b) {
    return std::max<int64_t>({1, sum_slices(b), (int64_t{b.odd_count} + kWarpLanes - 1) / kWarpLanes});
}

} // namespace lmkv
