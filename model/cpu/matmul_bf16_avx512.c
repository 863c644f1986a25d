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
