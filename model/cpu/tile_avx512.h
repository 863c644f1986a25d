// A tile: TILE_X rows of x by the 32 rows of a panel, whose sums stay in registers. For files of functions with the
// attribute WITH_TILE; MULTIPLY_ADD(sum, w, x) is its instruction, of vectors of sixteen words.
#include <immintrin.h>

#include "prompt_avx512.h"

enum { TILE_X = 12 };

#define TILE_INLINE static inline __attribute__((always_inline)) WITH_TILE

// C rows of x from number c on.
TILE_INLINE void multiply_tile(const Strip *s, int c, int C) {
    __m512 sum[TILE_X][2];
    const uint32_t *w = s->panel, *x = s->x + (size_t)c * s->x_stride;
    const size_t stride = s->x_stride;
#pragma GCC unroll 12
    for (int i = 0; i < C; i++) sum[i][0] = sum[i][1] = _mm512_setzero_ps();
    for (int k = 0; k < s->n; k++, x++, w += PANEL_ROWS) {
        __m512 w0 = _mm512_load_ps(w), w1 = _mm512_load_ps(w + PANEL_ROWS / 2);
#pragma GCC unroll 12
        for (int i = 0; i < C; i++) {
            __m512 xi = _mm512_castsi512_ps(_mm512_set1_epi32((int)x[(size_t)i * stride]));
            sum[i][0] = MULTIPLY_ADD(sum[i][0], w0, xi);
            sum[i][1] = MULTIPLY_ADD(sum[i][1], w1, xi);
        }
    }
    const uint32_t rows = s->rows == PANEL_ROWS ? ~0u : (1u << s->rows) - 1;
    const __mmask16 low = (__mmask16)rows, high = (__mmask16)(rows >> 16);
    float *y = s->y + (size_t)c * s->y_stride;
#pragma GCC unroll 12
    for (int i = 0; i < C; i++, y += s->y_stride) {
        if (s->add) {
            sum[i][0] = _mm512_add_ps(_mm512_maskz_loadu_ps(low, y), sum[i][0]);
            sum[i][1] = _mm512_add_ps(_mm512_maskz_loadu_ps(high, y + PANEL_ROWS / 2), sum[i][1]);
        }
        _mm512_mask_storeu_ps(y, low, sum[i][0]);
        _mm512_mask_storeu_ps(y + PANEL_ROWS / 2, high, sum[i][1]);
    }
}

static WITH_TILE void multiply_strip(const Strip *s) {
    int c = 0;
    for (; c + TILE_X <= s->C; c += TILE_X) multiply_tile(s, c, TILE_X);
    for (; c + 4 <= s->C; c += 4) multiply_tile(s, c, 4);
    if (s->C - c == 3) multiply_tile(s, c, 3);
    if (s->C - c == 2) multiply_tile(s, c, 2);
    if (s->C - c == 1) multiply_tile(s, c, 1);
}
