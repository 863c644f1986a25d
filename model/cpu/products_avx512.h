// The products of ops.h with AVX-512, and its multiply_add; a table has them in the place of those of ops.c.
#ifndef PRODUCTS_AVX512_H
#define PRODUCTS_AVX512_H

#include <stdbool.h>

#include "../model.h"

// Whether this processor has the instructions.
bool avx512_supported(void);

// matmul_step, of matrices with at most STEP_COLUMNS columns, and matmul. Codes are widened exactly; in a step the scale
// multiplies the sum of its group, in matmul the code.
enum { STEP_COLUMNS = 1 << 17 };
void step_avx512(float *y, const float *x, const Matrix *w, int T);
void matmul_avx512(float *y, const float *x, const Matrix *w, int T);
// matmul_bf16 in float32.
void matmul_rounded_avx512(float *y, const float *x, const Matrix *w, int T);
// The same with the instructions of AVX512-BF16, and whether the processor has them: of W that is not F16 or F32.
bool avx512_bf16_supported(void);
void matmul_bf16_avx512(float *y, const float *x, const Matrix *w, int T);
// matmul_step_bf16 of such W with at most STEP_COLUMNS columns, which has look-ups of AVX512-VBMI besides. (Of all
// processors with AVX512-BF16 only Cooper Lake has none.)
bool step_bf16_supported(void);
void step_bf16_avx512(float *y, const float *x, const Matrix *w, int T);
// And with AMX; to ask gives this process leave to use it.
bool amx_supported(void);
void matmul_amx(float *y, const float *x, const Matrix *w, int T);
double multiply_add_bf16_avx512(int64_t rounds, float *sink);
double multiply_add_avx512(int64_t rounds, float *sink);

#endif
