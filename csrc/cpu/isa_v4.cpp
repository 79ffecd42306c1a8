// x86-64-v4: AVX-512.
#include <cstring>

#include "isa.h"
#if LMKV_MULTIVERSION
#pragma GCC target("arch=x86-64-v4")
#define LMKV_ISA v4
#define LMKV_VECTOR_BYTES 64
#include "sums.h"
#include "unit.h"
#endif
