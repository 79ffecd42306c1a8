// The host's part of rotate_keys on a GPU: how it is done, cut into launches. No CUDA in it, so tests run it as it is.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "lmkv/rotate_body.h"

namespace lmkv {

constexpr int64_t kKeySliceBytes = 4096;

// Whether everything that is ever added up to an address is a multiple of 16 bytes, and pairs come in 16 bytes.
inline bool turns_rows(const Rotate& r, const RotateData& d) {
    const PartMap& m = r.map;
    if (m.tn != 0 || m.td != 0 || m.d1 != 1) return false;
    int64_t all = static_cast<int64_t>(reinterpret_cast<uintptr_t>(d.keys) | reinterpret_cast<uintptr_t>(d.turns));
    for (int64_t i = 0; i < d.layer_count; ++i) all |= d.layers[i];
    all |= (m.offset | m.block | m.head | m.n1 | int64_t{r.first} | int64_t{r.pairs}) * width_of(r.type);
    return all % 16 == 0;
}

template <class T, class Use>
void with_turner_of(const Rotate& r, const RotateData& d, Use&& use) {
    if (!turns_rows(r, d)) return use(TurnPairs<T>{});
    if (r.interleaved) return use(TurnRows<T, true>{});
    use(TurnRows<T, false>{});
}

// Calls use(mover) with the one that fits the call.
template <class Use>
void with_turner(const Rotate& r, const RotateData& d, Use&& use) {
    if (r.type == Type::kBfloat16) return with_turner_of<Bf16>(r, d, use);
    if (r.type == Type::kFloat16) return with_turner_of<Fp16>(r, d, use);
    with_turner_of<float>(r, d, use);
}

// Calls launch(batch) for one batch after the other; they may run in any order.
template <class Batch, class Launch>
void for_each_rotate_batch(const Rotate& r, const RotateData& d, Launch&& launch) {
    const int64_t row_bytes = int64_t{2} * r.pairs * width_of(r.type);
    Batch b{};
    b.rotate = r;
    b.keys = d.keys;
    b.turns = d.turns;
    b.tokens_first = r.map.tn == 0 && r.map.n1 == 1;
    b.slice_tokens =
        static_cast<int32_t>(std::max<int64_t>(b.tokens_first ? kWarpLanes : 1, kKeySliceBytes / row_bytes));
    for (int64_t l = 0; l < d.layer_count; l += b.layer_count) {
        b.layer_count = static_cast<int32_t>(std::min<int64_t>(Batch::kMaxLayers, d.layer_count - l));
        std::copy_n(d.layers + l, b.layer_count, b.layers);
        for (int64_t i = 0; i < d.run_count; i += b.run_count) {
            b.run_count = static_cast<int32_t>(std::min<int64_t>(Batch::kMaxRuns, d.run_count - i));
            std::copy_n(d.runs + i, b.run_count, b.runs);
            int32_t longest = 0;
            for (int k = 0; k < b.run_count; ++k) longest = std::max(longest, b.runs[k].tokens);
            b.slices = (longest - 1) / b.slice_tokens + 1;
            if (slice_count(b) >= int64_t{1} << 31) { // the kernels count them in 32 bits
                throw std::runtime_error(std::to_string(slice_count(b)) +
                                         " slices are too many for one launch · rotate fewer tokens at once");
            }
            launch(static_cast<const Batch&>(b));
        }
    }
}

} // namespace lmkv
