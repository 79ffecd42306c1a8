// The body of the conversion kernels: every byte is read once and written once, and the checksum is taken on the way.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "lmkv/convert_batch.h"
#include "lmkv/packets.h"
#include "lmkv/warp.h"

namespace lmkv {

// A mover moves one lane's share of a piece and returns its share of the checksum (0 unless kSum).

// Both sides have the numbers of a row side by side: rows are moved in packets. Several are read before the first is
// written, so that a lane has several requests under way.
template <int kPacket, bool kWithSum>
struct Packets {
    static constexpr bool kSum = kWithSum;
    static constexpr int kChunk = kSum && kPacket < 8 ? 8 : kPacket; // a sum needs whole words
    static constexpr int kInFlight = kChunk > kPacket ? 2 : 4;       // chunks

    LMKV_HD static uint64_t move(const Convert& c, const Deal& deal, const Piece& p, int lane) {
        const PartMap& from = c.source[p.part];
        const PartMap& to = c.target[p.part];
        const int width = width_of(c.source_type);
        const int64_t source_stride = from.n1 * width;
        const int64_t target_stride = to.n1 * width;
        const uint8_t* source = p.source + p.source_token * source_stride;
        uint8_t* target = p.target + p.target_token * target_stride;
        const bool merged = deal.merged[p.part];
        const int64_t bytes = static_cast<int64_t>(c.dims[p.part]) * width * (merged ? p.tokens : 1);
        const uint32_t rows = merged ? 1 : p.tokens;

        uint64_t sum = 0;
        for (Walk at(lane, (bytes + kChunk - 1) / kChunk); at.slow < rows;) {
            Chunk<kPacket, kChunk> chunks[kInFlight];
            Walk ahead = at;
            LMKV_UNROLL
            for (int i = 0; i < kInFlight; ++i, ahead.next()) {
                const int64_t byte = static_cast<int64_t>(ahead.fast) * kChunk;
                if (ahead.slow < rows) chunks[i].read(source + ahead.slow * source_stride + byte, bytes - byte);
            }
            LMKV_UNROLL
            for (int i = 0; i < kInFlight; ++i, at.next()) {
                if (at.slow >= rows) continue;
                const int64_t byte = static_cast<int64_t>(at.fast) * kChunk;
                chunks[i].write(target + at.slow * target_stride + byte, bytes - byte);
                if constexpr (kSum) {
                    const uint64_t row = p.word + static_cast<uint64_t>(at.slow) * c.page.words;
                    sum += chunks[i].mixed(row + static_cast<uint64_t>(at.fast) * (kChunk / 8));
                }
            }
        }
        return sum;
    }
};

template <class From, class To>
LMKV_HD To cast(From x) {
    if constexpr (std::is_same_v<From, To>) {
        return x;
    } else {
        return from_float<To>(to_float(x));
    }
}

template <class T>
LMKV_HD uint64_t raw_bits(T x) {
    typename PacketOf<sizeof(T)>::type raw;
    memcpy(&raw, &x, sizeof(T));
    return raw;
}

// Any map to any map, element by element; From and To differ where the type is converted.
template <class From, class To, bool kWithSum>
struct Elements {
    static constexpr bool kSum = kWithSum;
    static constexpr int kInFlight = 4;

    LMKV_HD static uint64_t move(const Convert& c, const Deal& deal, const Piece& p, int lane) {
        if constexpr (kSum) {
            return move_words(c, deal, p, lane);
        } else {
            move_singly(c, deal, p, lane);
            return 0;
        }
    }

  private:
    LMKV_HD static From read(const Convert& c, const Piece& p, uint32_t n, uint32_t d) {
        const PartMap& m = c.source[p.part];
        const int64_t at = token_offset(m, p.source_token + static_cast<int64_t>(n)) + dim_offset(m, d);
        return load<From>(p.source + at * static_cast<int64_t>(sizeof(From)));
    }

    LMKV_HD static void write(const Convert& c, const Piece& p, uint32_t n, uint32_t d, To x) {
        const PartMap& m = c.target[p.part];
        const int64_t at = token_offset(m, p.target_token + static_cast<int64_t>(n)) + dim_offset(m, d);
        store(p.target + at * static_cast<int64_t>(sizeof(To)), x);
    }

    LMKV_HD static void move_singly(const Convert& c, const Deal& deal, const Piece& p, int lane) {
        const bool tokens_first = deal.tokens_first[p.part];
        const uint32_t dims = c.dims[p.part];
        const uint32_t slow = tokens_first ? dims : p.tokens;
        for (Walk at(lane, tokens_first ? p.tokens : dims); at.slow < slow;) {
            From x[kInFlight] = {};
            Walk ahead = at;
            LMKV_UNROLL
            for (int i = 0; i < kInFlight; ++i, ahead.next()) {
                const uint32_t n = tokens_first ? ahead.fast : ahead.slow;
                if (ahead.slow < slow) x[i] = read(c, p, n, tokens_first ? ahead.slow : ahead.fast);
            }
            LMKV_UNROLL
            for (int i = 0; i < kInFlight; ++i, at.next()) {
                const uint32_t n = tokens_first ? at.fast : at.slow;
                if (at.slow < slow) write(c, p, n, tokens_first ? at.slow : at.fast, cast<From, To>(x[i]));
            }
        }
    }

    // A lane takes the elements of a word of the page, so that it can mix the word.
    LMKV_HD static uint64_t move_words(const Convert& c, const Deal& deal, const Piece& p, int lane) {
        const bool at_source = c.sum_side == SumSide::kSource;
        const bool tokens_first = deal.tokens_first[p.part];
        const int page_width = at_source ? sizeof(From) : sizeof(To);
        const uint32_t dims = c.dims[p.part];
        const uint32_t in_word = 8 / page_width;
        const uint32_t words = (dims + in_word - 1) / in_word;
        const uint32_t slow = tokens_first ? words : p.tokens;
        uint64_t sum = 0;
        for (Walk at(lane, tokens_first ? p.tokens : words); at.slow < slow; at.next()) {
            const uint32_t n = tokens_first ? at.fast : at.slow;
            const uint32_t w = tokens_first ? at.slow : at.fast;
            const uint32_t left = dims - w * in_word;
            const uint32_t count = left < in_word ? left : in_word;
            const uint64_t word = move_word(c, p, n, w * in_word, count, at_source);
            sum += mix(word, p.word + static_cast<uint64_t>(n) * c.page.words + w);
        }
        return sum;
    }

    LMKV_HD static uint64_t move_word(const Convert& c, const Piece& p, uint32_t n, uint32_t d, uint32_t count,
                                      bool at_source) {
        constexpr uint32_t kMost = 8 / (sizeof(From) < sizeof(To) ? sizeof(From) : sizeof(To));
        From x[kMost] = {};
        LMKV_UNROLL
        for (uint32_t i = 0; i < kMost; ++i) {
            if (i < count) x[i] = read(c, p, n, d + i);
        }
        uint64_t word = 0;
        LMKV_UNROLL
        for (uint32_t i = 0; i < kMost; ++i) {
            if (i >= count) continue;
            const To y = cast<From, To>(x[i]);
            write(c, p, n, d + i, y);
            const uint64_t bits = at_source ? raw_bits(x[i]) : raw_bits(y);
            word |= bits << (8 * i * (at_source ? sizeof(From) : sizeof(To)));
        }
        return word;
    }
};

template <class Mover, class Warp, class Batch>
LMKV_HD void convert_body(const Warp& warp, const Batch& batch) {
    const int64_t pieces = piece_count(batch);
    for (int64_t i = warp.index(); i < pieces; i += warp.count()) {
        const Piece piece = piece_of(batch, static_cast<uint32_t>(i));
        if (piece.tokens <= 0) continue;
        if constexpr (Mover::kSum) {
            const auto share = [&](int lane) { return Mover::move(batch.convert, batch.deal, piece, lane); };
            warp.add(batch.sums + piece.page, warp.sum(share));
        } else {
            warp.each([&](int lane) { Mover::move(batch.convert, batch.deal, piece, lane); });
        }
    }
}

} // namespace lmkv
