// x86-64: AVX2 with FMA where the processor has both.
#include "ops.h"

extern const Ops ops_portable, ops_avx2;

const Ops *ops_select(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? &ops_avx2 : &ops_portable;
}
