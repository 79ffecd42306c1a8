// x86-64-v3: AVX2.
#include <cstring>

#include "isa.h"
#if LMKV_MULTIVERSION
#pragma GCC target("arch=x86-64-v3")
#define LMKV_ISA v3
#define LMKV_VECTOR_BYTES 32
#include "sums.h"
#include "unit.h"
#endif
