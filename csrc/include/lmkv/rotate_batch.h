// What one launch of rotate_keys is given, by value, and how it is dealt out to warps.
#pragma once

#include <cstdint>

#include "lmkv/rotate.h"
#include "lmkv/warp.h"

namespace lmkv {

// A kernel's parameters. Nothing in it is in host memory, so nothing has to outlive the launch.
template <int kLayers, int kRuns>
struct RotateBatch {
    static constexpr int kMaxLayers = kLayers;
    static constexpr int kMaxRuns = kRuns;

    Rotate rotate;
    int32_t slice_tokens; // a warp takes as many at once
    int32_t slices;       // of the longest run in the batch
    int32_t tokens_first; // neighbouring lanes take neighbouring tokens, not pairs
    int32_t layer_count;
    int32_t run_count;
    uint8_t* keys;
    const float* turns;
    int64_t layers[kLayers];
    Run runs[kRuns];
};

// What a warp does at once: a slice of tokens of one run, head and layer.
struct KeySlice {
    uint8_t* keys; // of token 0 and dimension 0 of the area
    const float* cosines;
    const float* sines;
    int32_t token;
    int32_t tokens; // none where the run is shorter than the batch's longest
};

template <class Batch>
LMKV_HD int64_t slice_count(const Batch& b) {
    return static_cast<int64_t>(b.run_count) * b.layer_count * b.rotate.heads * b.slices;
}

// Slice counts are below 2^31 (rotate_plan.h).
template <class Batch>
LMKV_HD KeySlice slice_of(const Batch& b, uint32_t index) {
    const Rotate& r = b.rotate;
    uint32_t above = index / static_cast<uint32_t>(b.slices);
    const int32_t first = static_cast<int32_t>(index - above * b.slices) * b.slice_tokens;
    uint32_t rest = above;
    above = rest / static_cast<uint32_t>(r.heads);
    const int64_t head = rest - above * r.heads;
    const Run& run = b.runs[above / static_cast<uint32_t>(b.layer_count)];
    const uint32_t layer = above % static_cast<uint32_t>(b.layer_count);

    KeySlice s;
    s.keys = b.keys + b.layers[layer] + area_offset(r.map, run.block, head) * width_of(r.type);
    s.cosines = b.turns + int64_t{run.turn} * 2 * r.pairs;
    s.sines = s.cosines + r.pairs;
    s.token = run.token + first;
    s.tokens = run.tokens - first < b.slice_tokens ? run.tokens - first : b.slice_tokens;
    return s;
}

} // namespace lmkv
