// Prompts in bf16 with AVX512-BF16: a word is a pair of bf16, whose products an instruction adds to a float32.
#include "products_avx512.h"
#include "prompt_avx512.h"

#define WITH_TILE __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")))
#define MULTIPLY_ADD(sum, w, x) _mm512_dpbf16_ps(sum, (__m512bh)(x), (__m512bh)(w))
#include "tile_avx512.h"

bool avx512_bf16_supported(void) {
    return avx512_supported() && __builtin_cpu_supports("avx512bf16");
}

void matmul_bf16_avx512(float *y, const float *x, const Matrix *w, int T) {
    prompt_product(y, x, w, T, &(Multiplier){multiply_strip, TILE_X, .pairs = true, .round = true});
}

WITH_TILE double multiply_add_bf16_avx512(int64_t rounds, float *sink) {
    enum { SUMS = 12, LANES = 16 }; // as many as multiply_add_avx512 has
    __m512 sum[SUMS];
    __m512i pairs = _mm512_set1_epi32(0x3F003F00); // halves
    for (int i = 0; i < SUMS; i++) sum[i] = _mm512_set1_ps((float)i + *sink);
    for (int64_t round = 0; round < rounds; round++)
        for (int i = 0; i < SUMS; i++) sum[i] = MULTIPLY_ADD(sum[i], pairs, pairs);
    for (int i = 1; i < SUMS; i++) sum[0] = _mm512_add_ps(sum[0], sum[i]);
    *sink = _mm512_reduce_add_ps(sum[0]);
    return (double)rounds * SUMS * LANES * 4;
}
