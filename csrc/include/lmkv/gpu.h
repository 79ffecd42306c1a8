// What CUDA and HIP spell differently, and what all launches share. Included by .cu files alone.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "lmkv/warp.h"

#if defined(__HIPCC__)
#include <hip/hip_runtime.h>
#define LMKV_GPU(name) hip##name
#define LMKV_GRID_CONSTANT
#else
#include <cuda_runtime.h>
#define LMKV_GPU(name) cuda##name
#define LMKV_GRID_CONSTANT __grid_constant__
#endif

namespace lmkv::gpu {

#if defined(__HIPCC__)
constexpr size_t kParamBytes = 4096;
constexpr auto kMultiprocessors = hipDeviceAttributeMultiprocessorCount;
#else
// Volta and newer take 32764 bytes from CUDA 12.1 on. Every launch copies all of them, so not more than is of use.
constexpr size_t kParamBytes = 16384;
constexpr auto kMultiprocessors = cudaDevAttrMultiProcessorCount;
#endif

using Stream = LMKV_GPU(Stream_t);

inline void check(LMKV_GPU(Error_t) error, const char* what) {
    if (error == LMKV_GPU(Success)) return;
    throw std::runtime_error(std::string(what) + " failed: " + LMKV_GPU(GetErrorString)(error));
}

#define LMKV_GPU_CHECK(call) ::lmkv::gpu::check((call), #call)

constexpr int kThreads = 256; // of a block
// Of kThreads threads with 64 registers each, the budget of scripts/check_cuda.py.
constexpr int kBlocksPerMultiprocessor = 4;
#define LMKV_KERNEL __global__ void __launch_bounds__(::lmkv::gpu::kThreads)

// Blocks for work that `warps` warps could share: not more than run at a time, since the warps go on by themselves.
inline unsigned blocks_for(int64_t warps, int device) {
    int multiprocessors = 0;
    LMKV_GPU_CHECK(LMKV_GPU(DeviceGetAttribute)(&multiprocessors, kMultiprocessors, device));
    const int64_t wanted = (warps * kWarpLanes + kThreads - 1) / kThreads;
    const int64_t most = int64_t{multiprocessors} * kBlocksPerMultiprocessor;
    return static_cast<unsigned>(wanted < most ? wanted : most);
}

} // namespace lmkv::gpu
