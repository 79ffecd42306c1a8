// What g++, nvcc and hipcc spell differently.
#pragma once

#if defined(__CUDACC__) || defined(__HIPCC__)
#define LMKV_HD __host__ __device__ __forceinline__
#else
#define LMKV_HD inline
#endif
