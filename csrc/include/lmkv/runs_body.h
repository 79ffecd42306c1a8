// The body of checksum_runs: every byte is read once. A warp sums all that it is dealt before it adds to the result, so
// that there is one atomic addition a warp and launch.
#pragma once

#include <cstdint>

#include "lmkv/packets.h"
#include "lmkv/runs.h"
#include "lmkv/warp.h"

namespace lmkv {

constexpr int64_t kSumSliceWords = 1024; // 8 KB: 16 packets of 16 bytes for each lane

// A kernel's parameters. Nothing in it is in host memory, so nothing has to outlive the launch.
template <int kRuns, int kOdd>
struct RunsBatch {
    static constexpr int kMaxRuns = kRuns;
    static constexpr int kMaxOdd = kOdd;

    const uint8_t* data;
    uint64_t* sum;
    int32_t slices; // of the longest run in the batch
    int32_t run_count;
    int32_t odd_count;
    WordRun runs[kRuns];
    OddWord odd[kOdd];
};

template <class Batch>
LMKV_HD int64_t sum_slices(const Batch& b) {
    return static_cast<int64_t>(b.run_count) * b.slices;
}

// Reads words in packets of kPacket bytes; with 16 there is an even number of words in every run.
template <int kPacket>
struct SumWords {
    static constexpr int kChunk = kPacket < kWordBytes ? kWordBytes : kPacket;
    static constexpr int kChunkWords = kChunk / kWordBytes;
    static constexpr int kInFlight = kPacket < kWordBytes ? 2 : 4; // chunks, read before the first is mixed

    // One lane's share of a slice of `words` words.
    LMKV_HD static uint64_t sum(const uint8_t* p, int64_t words, uint64_t index, int lane) {
        const uint32_t chunks = static_cast<uint32_t>(words / kChunkWords);
        uint64_t total = 0;
        for (uint32_t at = lane; at < chunks; at += kInFlight * kWarpLanes) {
            Chunk<kPacket, kChunk> read[kInFlight];
            LMKV_UNROLL
            for (int i = 0; i < kInFlight; ++i) {
                const uint32_t chunk = at + i * kWarpLanes;
                if (chunk < chunks) read[i].read(p + static_cast<int64_t>(chunk) * kChunk, kChunk);
            }
            LMKV_UNROLL
            for (int i = 0; i < kInFlight; ++i) {
                const uint32_t chunk = at + i * kWarpLanes;
                if (chunk < chunks) total += read[i].mixed(index + uint64_t{chunk} * kChunkWords);
            }
        }
        return total;
    }
};

template <class Mover, class Batch>
LMKV_HD uint64_t lane_sum(const Batch& b, int64_t warp, int64_t warps, int lane) {
    uint64_t total = 0;
    const int64_t slices = sum_slices(b);
    for (int64_t i = warp; i < slices; i += warps) {
        const uint32_t slice = static_cast<uint32_t>(i); // below 2^31 (runs_plan.h)
        const uint32_t number = slice / static_cast<uint32_t>(b.slices);
        const WordRun& run = b.runs[number];
        const int64_t first = (slice - number * b.slices) * kSumSliceWords;
        const int64_t left = run.words - first;
        if (left <= 0) continue; // the run is shorter than the batch's longest
        const int64_t words = left < kSumSliceWords ? left : kSumSliceWords;
        total +=
            Mover::sum(b.data + run.offset + first * kWordBytes, words, run.index + static_cast<uint64_t>(first), lane);
    }
    for (int64_t i = warp * kWarpLanes + lane; i < b.odd_count; i += warps * kWarpLanes) {
        total += mix(odd_word(b.data, b.odd[i]), b.odd[i].index);
    }
    return total;
}

template <class Mover, class Warp, class Batch>
LMKV_HD void checksum_body(const Warp& warp, const Batch& batch) {
    warp.add(batch.sum, warp.sum([&](int lane) { return lane_sum<Mover>(batch, warp.index(), warp.count(), lane); }));
}

} // namespace lmkv
