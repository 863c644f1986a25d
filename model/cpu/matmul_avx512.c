// Prompts in float32: a word is a float, widened from what W holds.
#include "products_avx512.h"
#include "prompt_avx512.h"
#include "widen_avx512.h"

#define WITH_TILE WITH_AVX512
#define MULTIPLY_ADD(sum, w, x) _mm512_fmadd_ps(w, x, sum)
#include "tile_avx512.h"

void matmul_avx512(float *y, const float *x, const Matrix *w, int T) {
    prompt_product(y, x, w, T, &(Multiplier){multiply_strip, TILE_X, .pairs = false, .round = false});
}

void matmul_rounded_avx512(float *y, const float *x, const Matrix *w, int T) {
    prompt_product(y, x, w, T, &(Multiplier){multiply_strip, TILE_X, .pairs = false, .round = true});
}

// ---- what the machine gives -----------------------------------------------------------------------------------------

WITH_AVX512 double multiply_add_avx512(int64_t rounds, float *sink) {
    enum { SUMS = 12 }; // more than latency × issue width asks for, and few enough for registers
    __m512 sum[SUMS], a = _mm512_set1_ps(0.999f), b = _mm512_set1_ps(*sink);
    for (int i = 0; i < SUMS; i++) sum[i] = _mm512_set1_ps((float)i);
    for (int64_t round = 0; round < rounds; round++)
        for (int i = 0; i < SUMS; i++) sum[i] = _mm512_fmadd_ps(sum[i], a, b);
    for (int i = 1; i < SUMS; i++) sum[0] = _mm512_add_ps(sum[0], sum[i]);
    *sink = _mm512_reduce_add_ps(sum[0]);
    return (double)rounds * SUMS * LANES * 2;
}
