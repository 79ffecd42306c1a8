// A function compiled for several levels of instruction set, of which the machine's best is taken when it is loaded.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
// What it calls is part of it: a clone is worth nothing if it calls code for the baseline.
#define LMKV_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default"), flatten))
#else
#define LMKV_CLONES
#endif
