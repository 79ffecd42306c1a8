// A function compiled for several levels of instruction set, of which the machine's best is taken when it is loaded.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
// What it calls is part of it: a clone is worth nothing if it calls code for the baseline.
#define LMKV_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default"), flatten))
#else
#define LMKV_CLONES
#endif

// Before a loop whose rounds do not depend on each other, which the compiler cannot see where pointers are computed.
#if defined(__clang__)
#define LMKV_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define LMKV_INDEPENDENT _Pragma("GCC ivdep")
#endif
