// Steps in float32: a word is a float, widened from what W holds.
#include "products_avx512.h"
#include "widen_avx512.h"

#define WITH_STEP WITH_AVX512
#define WITH_STEP_TYPE WITH_TYPE
#define COLUMNS_OF_WORD 1
#define StepLine Line
#define LOAD_LINE load_line
#define WIDEN(line, j, dtype) _mm512_castps_si512(widen(line, weight_of_vector(j, dtype), dtype))
#define MULTIPLY(w, x) _mm512_mul_ps(_mm512_castsi512_ps(w), _mm512_castsi512_ps(x))
#define MULTIPLY_ADD(sum, w, x) _mm512_fmadd_ps(_mm512_castsi512_ps(w), _mm512_castsi512_ps(x), sum)
#define CODE_UNIT(dtype) ((dtype) == DTYPE_F8_E4M3 ? 256.0f : 1.0f)

// Weight j of each lane, in an order in which int4's shifts are used at once.
INLINE int weight_of_vector(int j, DType dtype) {
    return dtype == DTYPE_U8 ? j / 2 + j % 2 * 4 : j;
}

INLINE void arrange_line(uint32_t *out, const float *x, DType dtype) {
    __m512 v[8];
    int n = weights_of_lane(dtype);
    for (int j = 0; j < n; j++) v[j] = _mm512_loadu_ps(x + j * LANES);
    if (dtype == DTYPE_F8_E4M3) {
        take_apart(v, 2);
        take_apart(v + 2, 2);
    } else if (dtype != DTYPE_F16) {
        take_apart(v, n);
    }
    for (int j = 0; j < n; j++) _mm512_store_ps(out + j * LANES, v[weight_of_vector(j, dtype)]);
}

#include "step_avx512.h"

void step_avx512(float *y, const float *x, const Matrix *w, int T) {
    multiply_step(y, x, w, T);
}
