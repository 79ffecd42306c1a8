// What g++, nvcc and hipcc spell differently.
#pragma once

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

// nvcc checks calls in templates before it knows which warp they are for: only __global__ functions take DeviceWarp.
#if defined(__CUDACC__) && !defined(__HIPCC__)
#define LMKV_BODY _Pragma("nv_exec_check_disable")
#else
#define LMKV_BODY
#endif
