// x86-64: AVX2 with FMA where the processor has both, and products with AVX-512 where it has that.
#include <pthread.h>

#include "ops.h"
#include "products_avx512.h"

extern const Ops ops_portable, ops_avx2;

static Ops ops_avx512;
static pthread_once_t made = PTHREAD_ONCE_INIT;

static void step(float *y, const float *x, const Matrix *w, int T) {
    (w->cols <= STEP_COLUMNS ? step_avx512 : ops_avx2.matmul_step)(y, x, w, T);
}

static void make_avx512(void) {
    ops_avx512 = ops_avx2;
    ops_avx512.name = "AVX-512";
    ops_avx512.matmul = matmul_avx512;
    ops_avx512.matmul_step = step;
    ops_avx512.multiply_add = multiply_add_avx512;
}

bool avx512_supported(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

const Ops *ops_select(void) {
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return &ops_portable;
    if (!avx512_supported()) return &ops_avx2;
    pthread_once(&made, make_avx512);
    return &ops_avx512;
}
