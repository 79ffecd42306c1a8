// Rows on both sides: nested loops over runs of bytes, as few and long as they can be.
#pragma once

#include "runs.h"

namespace lmkv::cpu::LMKV_ISA {

// A loop: how often, and how far it moves in bytes at either side and in words of the page.
struct Axis {
    int64_t count;
    int64_t source;
    int64_t target;
    int64_t words;
};

constexpr int kMaxAxes = 3; // head, part and token

struct Nest {
    Axis axes[kMaxAxes];
    int rank;
    int64_t run;  // bytes
    int64_t next; // how far off from a run lies what is read after it, if not right behind: see copy_run
};

// Axes whose steps join one run to the next become part of the run. The others are put in the order in which the source
// is read from front to back: reads like to be foreseen, writes may go anywhere in whole lines.
inline void simplify(Nest& nest, bool sums) {
    for (int i = 0; i < nest.rank;) {
        const Axis& a = nest.axes[i];
        const bool joins = a.source == nest.run && a.target == nest.run && (!sums || a.words * 8 == nest.run);
        if (a.count > 1 && !joins) {
            ++i;
            continue;
        }
        const bool longer = a.count > 1;
        nest.run *= a.count;
        for (int k = i; k + 1 < nest.rank; ++k) nest.axes[k] = nest.axes[k + 1];
        --nest.rank;
        if (longer) i = 0; // the longer run may reach to the steps of an axis seen before
    }
    for (int i = 1; i < nest.rank; ++i) {
        for (int k = i; k > 0 && nest.axes[k - 1].source < nest.axes[k].source; --k) {
            const Axis a = nest.axes[k];
            nest.axes[k] = nest.axes[k - 1];
            nest.axes[k - 1] = a;
        }
    }
    for (; nest.rank < kMaxAxes; ++nest.rank) {
        for (int k = nest.rank; k > 0; --k) nest.axes[k] = nest.axes[k - 1];
        nest.axes[0] = {1, 0, 0, 0};
    }
    // The source is read in stretches: a run, or all runs of the inner loop where they follow each other.
    const Axis &y = nest.axes[1], &z = nest.axes[2];
    const bool together = z.source == nest.run;
    const int64_t far = together ? y.source : z.source;
    nest.next = far == nest.run * z.count ? 0 : far;
}

// Whether every run is made of whole cache lines at the target.
inline bool whole_lines(const Nest& nest, const uint8_t* target) {
    auto bits = reinterpret_cast<uintptr_t>(target) | static_cast<uintptr_t>(nest.run);
    for (const Axis& a : nest.axes) bits |= static_cast<uintptr_t>(a.target);
    return bits % 64 == 0;
}

template <bool kSum, Write kWrite>
void walk(const Nest& nest, const uint8_t* source, uint8_t* target, uint64_t index, Sum& sum) {
    const auto& [x, y, z] = nest.axes;
    Sum local = sum; // in registers
    const bool together = z.source == nest.run;
    for (int64_t i = 0; i < x.count; ++i) {
        for (int64_t k = 0; k < y.count; ++k) {
            const uint8_t* s = source + i * x.source + k * y.source;
            uint8_t* t = target + i * x.target + k * y.target;
            uint64_t word = index + static_cast<uint64_t>(i * x.words + k * y.words);
            for (int64_t n = 0; n < z.count; ++n) {
                copy_run<kSum, kWrite>(s, t, nest.run, together && n * nest.run >= kUnforeseenBytes ? 0 : nest.next,
                                       word, local);
                s += z.source;
                t += z.target;
                word += static_cast<uint64_t>(z.words);
            }
        }
    }
    sum = local;
}

inline void copy_nest(const Nest& nest, const uint8_t* source, uint8_t* target, uint64_t index, bool sums, bool streams,
                      Sum& sum) {
    if (streams && whole_lines(nest, target)) {
        return sums ? walk<true, Write::kStream>(nest, source, target, index, sum)
                    : walk<false, Write::kStream>(nest, source, target, index, sum);
    }
    return sums ? walk<true, Write::kStore>(nest, source, target, index, sum)
                : walk<false, Write::kStore>(nest, source, target, index, sum);
}

} // namespace lmkv::cpu::LMKV_ISA
