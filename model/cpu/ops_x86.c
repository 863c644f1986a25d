// x86-64: AVX2 with FMA where the processor has both, and products with AVX-512 where it has that; in bf16 with AVX512-BF16,
// or AMX.
#include <pthread.h>

#include "ops.h"
#include "products_avx512.h"

extern const Ops ops_portable, ops_avx2;

enum { AVX512, AVX512_BF16, AMX, N_AVX512 };
static Ops tables[N_AVX512];
static const Ops *paths[2 + N_AVX512];
static int n_paths;
static pthread_once_t made = PTHREAD_ONCE_INIT;

static void step(float *y, const float *x, const Matrix *w, int T) {
    (w->cols <= STEP_COLUMNS ? step_avx512 : ops_avx2.matmul_step)(y, x, w, T);
}

// Products by F16 are in float32, of inputs that are f16.
static bool takes_pairs(const Matrix *w) {
    return w->dtype != DTYPE_F16 && w->dtype != DTYPE_F32;
}

static void step_bf16(float *y, const float *x, const Matrix *w, int T) {
    (takes_pairs(w) && w->cols <= STEP_COLUMNS ? step_bf16_avx512 : step)(y, x, w, T);
}

static void multiply_bf16(float *y, const float *x, const Matrix *w, int T) {
    (takes_pairs(w) ? matmul_bf16_avx512 : matmul_avx512)(y, x, w, T);
}

static void multiply_amx(float *y, const float *x, const Matrix *w, int T) {
    (takes_pairs(w) ? matmul_amx : matmul_avx512)(y, x, w, T);
}

static void make_avx512(void) {
    Ops *t = &tables[AVX512];
    *t = ops_avx2;
    t->name = t->name_bf16 = "AVX-512";
    t->matmul = matmul_avx512;
    t->matmul_bf16 = matmul_rounded_avx512;
    t->matmul_step = t->matmul_step_bf16 = step;
    t->multiply_add = multiply_add_avx512;
    paths[n_paths++] = t;
    if (avx512_bf16_supported()) {
        t = &tables[AVX512_BF16];
        *t = tables[AVX512];
        t->name_bf16 = "AVX-512 with BF16";
        t->matmul_bf16 = multiply_bf16;
        if (step_bf16_supported()) t->matmul_step_bf16 = step_bf16;
        t->multiply_add_bf16 = multiply_add_bf16_avx512;
        paths[n_paths++] = t;
    }
    if (amx_supported()) {
        const Ops *before = paths[n_paths - 1];
        t = &tables[AMX];
        *t = *before;
        t->name_bf16 = "AVX-512 with AMX";
        t->matmul_bf16 = multiply_amx;
        paths[n_paths++] = t;
    }
}

static void make_paths(void) {
    paths[n_paths++] = &ops_portable;
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return;
    paths[n_paths++] = &ops_avx2;
    if (avx512_supported()) make_avx512();
}

bool avx512_supported(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

const Ops *ops_path(int i) {
    pthread_once(&made, make_paths);
    return i < n_paths ? paths[i] : NULL;
}

const Ops *ops_select(void) {
    pthread_once(&made, make_paths);
    return paths[n_paths - 1];
}
