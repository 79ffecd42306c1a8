#include "isa.h"

namespace lmkv::cpu {

const Isa& best_isa() {
#if LMKV_MULTIVERSION
    static constexpr Isa kV4{v4::convert_unit, v4::sum_words}, kV3{v3::convert_unit, v3::sum_words};
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd"))
        return kV4;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("fma")) return kV3;
#endif
    static constexpr Isa kBaseline{baseline::convert_unit, baseline::sum_words};
    return kBaseline;
}

} // namespace lmkv::cpu
