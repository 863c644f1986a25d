// matmul_step of quantised weights with AVX-512; a table has it in the place of the one of ops.c.
#ifndef STEP_AVX512_H
#define STEP_AVX512_H

#include <stdbool.h>

#include "../model.h"

// Whether this processor has the instructions.
bool step_avx512_supported(void);

// y[T][rows] = x[T][cols] · wᵀ, w quantised. Codes are widened exactly and multiplied by x; the scale multiplies the sum of
// its group. A row of x has the bits that it has alone.
void step_avx512(float *y, const float *x, const Matrix *w, int T);

#endif
