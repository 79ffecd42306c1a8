// What g++, nvcc and hipcc spell differently in code that all of them compile. See gpu.h for what only GPUs have.
#pragma once

#if defined(__HIPCC__)
#include <hip/hip_runtime.h> // nvcc includes its own by itself
#endif

#if defined(__CUDACC__) || defined(__HIPCC__)
#define LMKV_DEVICE_COMPILER 1
#define LMKV_HD __host__ __device__ __forceinline__
#else
#define LMKV_DEVICE_COMPILER 0
#define LMKV_HD inline
#endif

// Not in nvcc's pass for the host, whose compiler does not know it.
#if defined(__CUDA_ARCH__) || defined(__HIPCC__)
#define LMKV_UNROLL _Pragma("unroll")
#else
#define LMKV_UNROLL
#endif
