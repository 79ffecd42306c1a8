// x86-64 without extensions, and all other machines.
#define LMKV_ISA baseline
#define LMKV_VECTOR_BYTES 16
#include "sums.h"
#include "unit.h"
