// The execution context of kernel bodies. A body is a function template over a warp:
//
//     template <class Warp> LMKV_HD void body(Warp& warp, const Params& params)
//
// On the GPU a `__global__` wrapper calls it with DeviceWarp; in tests a loop calls it with HostWarp (csrc/tests/), so
// that every body is checked without a GPU. What a warp offers:
//
//     index(), count()   which warp of how many: work is dealt out in strides of count()
//     each(f)            f(lane) for every lane; nothing a lane computes outlives the call but what it writes to memory
//     max(f), sum(f)     the maximum (float) or sum (uint64_t) of f(lane) over the lanes, known to all of them
//     add(p, v)          one atomic addition a warp to *p
#pragma once

#include <cstdint>

#include "lmkv/macros.h"

namespace lmkv {

constexpr int kWarpLanes = 32;

#if defined(__CUDACC__) || defined(__HIPCC__)

// 32 neighbouring threads. On AMD a wavefront of 64 is two of them: shuffles stay within 32 lanes by their width.
struct DeviceWarp {
    int64_t first;
    int64_t all;
    int lane;

    __device__ __forceinline__ DeviceWarp()
        : first((static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kWarpLanes),
          all(static_cast<int64_t>(gridDim.x) * blockDim.x / kWarpLanes),
          lane(static_cast<int>(threadIdx.x) % kWarpLanes) {}

    __device__ __forceinline__ int64_t index() const { return first; }
    __device__ __forceinline__ int64_t count() const { return all; }

    template <class F>
    __device__ __forceinline__ void each(F&& f) const {
        f(lane);
    }
    template <class F>
    __device__ __forceinline__ float max(F&& f) const {
        float v = f(lane);
        for (int step = kWarpLanes / 2; step > 0; step /= 2) v = fmaxf(v, exchange(v, step));
        return v;
    }
    template <class F>
    __device__ __forceinline__ uint64_t sum(F&& f) const {
        unsigned long long v = f(lane);
        for (int step = kWarpLanes / 2; step > 0; step /= 2) v += exchange(v, step);
        return v;
    }
    __device__ __forceinline__ void add(uint64_t* p, uint64_t v) const {
        if (lane == 0) atomicAdd(reinterpret_cast<unsigned long long*>(p), static_cast<unsigned long long>(v));
    }

  private:
    template <class T>
    __device__ __forceinline__ T exchange(T v, int step) const {
#if defined(__HIPCC__)
        return __shfl_xor(v, step, kWarpLanes);
#else
        return __shfl_xor_sync(0xffffffffu, v, step, kWarpLanes);
#endif
    }
};

#endif

// One lane after the other. Sums and maxima come in lane order; both are the same in any order.
struct HostWarp {
    int64_t first;
    int64_t all;

    int64_t index() const { return first; }
    int64_t count() const { return all; }

    template <class F>
    void each(F&& f) const {
        for (int lane = 0; lane < kWarpLanes; ++lane) f(lane);
    }
    template <class F>
    float max(F&& f) const {
        float v = f(0);
        for (int lane = 1; lane < kWarpLanes; ++lane) {
            const float other = f(lane);
            v = other > v ? other : v;
        }
        return v;
    }
    template <class F>
    uint64_t sum(F&& f) const {
        uint64_t v = 0;
        for (int lane = 0; lane < kWarpLanes; ++lane) v += f(lane);
        return v;
    }
    void add(uint64_t* p, uint64_t v) const { *p += v; }
};

} // namespace lmkv
