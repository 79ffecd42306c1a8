// The body of rotate_keys: every key is read once and written once, in place, by the lane that has read it.
#pragma once

#include <cstdint>

#include "lmkv/rotate_batch.h"
#include "lmkv/vectors.h"

namespace lmkv {

// A mover turns one lane's share of a slice.

// Rows of dimensions side by side: a lane takes kPairs neighbouring pairs.
template <class T, bool kInterleaved>
struct TurnRows {
    static constexpr int kPairs = 16 / sizeof(T);

    LMKV_HD static void move(const Rotate& r, int32_t, const KeySlice& s, int lane) {
        const int64_t stride = r.map.n1 * static_cast<int64_t>(sizeof(T));
        uint8_t* keys = s.keys + s.token * stride + r.first * static_cast<int64_t>(sizeof(T));
        const uint32_t tokens = s.tokens;
        for (Walk at(lane, r.pairs / kPairs); at.slow < tokens; at.next()) {
            const uint32_t pair = at.fast * kPairs;
            Vector<float, kPairs> cosines, sines;
            cosines.read(reinterpret_cast<const uint8_t*>(s.cosines + pair));
            sines.read(reinterpret_cast<const uint8_t*>(s.sines + pair));
            uint8_t* row = keys + at.slow * stride;
            if constexpr (kInterleaved) {
                turn_neighbours(row + pair * 2 * sizeof(T), cosines, sines);
            } else {
                turn_halves(row + pair * sizeof(T), r.pairs * sizeof(T), cosines, sines);
            }
        }
    }

  private:
    using Angles = Vector<float, kPairs>;

    LMKV_HD static void turn_neighbours(uint8_t* p, const Angles& cosines, const Angles& sines) {
        Vector<T, 2 * kPairs> both;
        both.read(p);
        LMKV_UNROLL
        for (int i = 0; i < kPairs; ++i) turn(both.x[2 * i], both.x[2 * i + 1], cosines.x[i], sines.x[i]);
        both.write(p);
    }

    LMKV_HD static void turn_halves(uint8_t* p, int64_t apart, const Angles& cosines, const Angles& sines) {
        Vector<T, kPairs> a, b;
        a.read(p);
        b.read(p + apart);
        LMKV_UNROLL
        for (int i = 0; i < kPairs; ++i) turn(a.x[i], b.x[i], cosines.x[i], sines.x[i]);
        a.write(p);
        b.write(p + apart);
    }
};

// Any map, pair by pair.
template <class T>
struct TurnPairs {
    LMKV_HD static void move(const Rotate& r, int32_t tokens_first, const KeySlice& s, int lane) {
        const uint32_t slow = tokens_first ? r.pairs : s.tokens;
        for (Walk at(lane, tokens_first ? s.tokens : r.pairs); at.slow < slow; at.next()) {
            const uint32_t pair = tokens_first ? at.slow : at.fast;
            const int64_t row = token_offset(r.map, s.token + static_cast<int64_t>(tokens_first ? at.fast : at.slow));
            uint8_t* p = s.keys + (row + dim_offset(r.map, first_of_pair(r, pair))) * static_cast<int64_t>(sizeof(T));
            uint8_t* q = s.keys + (row + dim_offset(r.map, second_of_pair(r, pair))) * static_cast<int64_t>(sizeof(T));
            Vector<T, 1> a, b;
            a.read(p);
            b.read(q);
            turn(a.x[0], b.x[0], s.cosines[pair], s.sines[pair]);
            a.write(p);
            b.write(q);
        }
    }
};

template <class Mover, class Warp, class Batch>
LMKV_HD void rotate_body(const Warp& warp, const Batch& batch) {
    const int64_t slices = slice_count(batch);
    for (int64_t i = warp.index(); i < slices; i += warp.count()) {
        const KeySlice slice = slice_of(batch, static_cast<uint32_t>(i));
        if (slice.tokens <= 0) continue;
        warp.each([&](int lane) { Mover::move(batch.rotate, batch.tokens_first, slice, lane); });
    }
}

} // namespace lmkv
