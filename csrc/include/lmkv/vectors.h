// Several neighbouring elements in registers, moved in 16-byte accesses where there are as many bytes.
#pragma once

#include <cstdint>
#include <cstring>

#include "lmkv/packets.h"

namespace lmkv {

template <class T, int kCount>
struct Vector {
    static constexpr int kBytes = kCount * static_cast<int>(sizeof(T));
    static constexpr int kPacket = kBytes < 16 ? kBytes : 16;
    using Packet = typename PacketOf<kPacket>::type;

    T x[kCount];

    LMKV_HD void read(const uint8_t* p) {
        Packet packets[kBytes / kPacket];
        LMKV_UNROLL
        for (int i = 0; i < kBytes / kPacket; ++i) packets[i] = load<Packet>(p + i * kPacket);
        memcpy(x, packets, kBytes);
    }

    LMKV_HD void write(uint8_t* p) const {
        Packet packets[kBytes / kPacket];
        memcpy(packets, x, kBytes);
        LMKV_UNROLL
        for (int i = 0; i < kBytes / kPacket; ++i) store(p + i * kPacket, packets[i]);
    }
};

} // namespace lmkv
