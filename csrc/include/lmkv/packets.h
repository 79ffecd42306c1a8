// The pieces that a lane moves at once, and how pieces are dealt out to the lanes of a warp.
#pragma once

#include <cstdint>
#include <cstring>

#include "lmkv/checksum.h"
#include "lmkv/macros.h"
#include "lmkv/warp.h"

#if !LMKV_DEVICE_COMPILER
#include <stdexcept>
#endif

namespace lmkv {

#if LMKV_DEVICE_COMPILER
using Packet16 = ulonglong2; // one 128-bit access
#else
struct alignas(16) Packet16 {
    uint64_t x;
    uint64_t y;
};
#endif

template <int kBytes>
struct PacketOf;
template <>
struct PacketOf<1> {
    using type = uint8_t;
};
template <>
struct PacketOf<2> {
    using type = uint16_t;
};
template <>
struct PacketOf<4> {
    using type = uint32_t;
};
template <>
struct PacketOf<8> {
    using type = uint64_t;
};
template <>
struct PacketOf<16> {
    using type = Packet16;
};

// The device traps on an access that is not aligned to its size, so the host, which would not mind, refuses it too.
template <class T>
LMKV_HD T load(const uint8_t* p) {
#if LMKV_DEVICE_COMPILER
    return *reinterpret_cast<const T*>(p);
#else
    if (reinterpret_cast<uintptr_t>(p) % sizeof(T) != 0) throw std::logic_error("load that is not aligned to its size");
    T value;
    std::memcpy(&value, p, sizeof(T));
    return value;
#endif
}

template <class T>
LMKV_HD void store(uint8_t* p, T value) {
#if LMKV_DEVICE_COMPILER
    *reinterpret_cast<T*>(p) = value;
#else
    if (reinterpret_cast<uintptr_t>(p) % sizeof(T) != 0) {
        throw std::logic_error("store that is not aligned to its size");
    }
    std::memcpy(p, &value, sizeof(T));
#endif
}

// `kBytes` bytes in registers, moved in packets of `kPacket`; `bytes` says how many of them there are.
template <int kPacket, int kBytes>
struct Chunk {
    using Packet = typename PacketOf<kPacket>::type;

    uint64_t words[kBytes > 8 ? kBytes / 8 : 1] = {};

    LMKV_HD void read(const uint8_t* p, int64_t bytes) {
        if constexpr (kPacket == 16) {
            const Packet both = load<Packet>(p);
            words[0] = both.x;
            words[1] = both.y;
        } else {
            LMKV_UNROLL
            for (int at = 0; at < kBytes; at += kPacket) {
                if (at < bytes) words[0] |= static_cast<uint64_t>(load<Packet>(p + at)) << (8 * at);
            }
        }
    }

    LMKV_HD void write(uint8_t* p, int64_t bytes) const {
        if constexpr (kPacket == 16) {
            store(p, Packet{words[0], words[1]});
        } else {
            LMKV_UNROLL
            for (int at = 0; at < kBytes; at += kPacket) {
                if (at < bytes) store(p + at, static_cast<Packet>(words[0] >> (8 * at)));
            }
        }
    }

    // The checksum of its words, the first of which has position `index`.
    LMKV_HD uint64_t mixed(uint64_t index) const {
        if constexpr (kBytes == 16) return mix(words[0], index) + mix(words[1], index + 1);
        return mix(words[0], index);
    }
};

// A lane's way through a grid of fast × slow cells: cells lane, lane + 32, … in the order of the grid. It divides once.
struct Walk {
    uint32_t fast;
    uint32_t slow;
    uint32_t extent; // of fast
    uint32_t fast_step;
    uint32_t slow_step;

    LMKV_HD Walk(int lane, int64_t fast_extent) : extent(static_cast<uint32_t>(fast_extent)) {
        slow = static_cast<uint32_t>(lane) / extent;
        fast = static_cast<uint32_t>(lane) - slow * extent;
        slow_step = kWarpLanes / extent;
        fast_step = kWarpLanes - slow_step * extent;
    }

    LMKV_HD void next() {
        fast += fast_step;
        slow += slow_step;
        if (fast >= extent) {
            fast -= extent;
            ++slow;
        }
    }
};

} // namespace lmkv
