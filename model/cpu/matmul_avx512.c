// Prompts: rows of W are widened to float32 a panel at a time, which serves all rows of x.
#include "../threads.h"
#include "products_avx512.h"
#include "widen_avx512.h"

enum {
    W_ROWS = 16,   // rows of a panel ...
    K_BLOCK = 512, // ... and columns: 32 KB
    X_TILE = 6,    // rows of x that are multiplied at a time, by W_TILE rows of W: so many sums stay in registers
    W_TILE = 4,
    ALONE = 1 << 18, // multiply-adds that one thread does sooner than it wakes the others ...
    PART = 1 << 20   // ... and those that a thread takes at a time
};

typedef struct {
    float *y;
    const float *x;
    const Matrix *w;
    int T;
} Product;

// ---- the panel ------------------------------------------------------------------------------------------------------

// What widen took apart, in order: n vectors, a power of two.
INLINE void put_together(__m512 *v, int n) {
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23),
                  high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    for (int stride = 1; stride < n; stride *= 2) {
        __m512 from[8];
        for (int i = 0; i < n; i++) from[i] = v[i];
        for (int i = 0; i < n / 2; i++) {
            v[2 * i] = _mm512_permutex2var_ps(from[i], low, from[n / 2 + i]);
            v[2 * i + 1] = _mm512_permutex2var_ps(from[i], high, from[n / 2 + i]);
        }
    }
}

// The weights of a line in order, still without their scale.
INLINE void widen_line(__m512 *v, const char *at, DType dtype) {
    const int n = weights_of_lane(dtype);
    Line line = load_line(at, dtype);
    v[0] = widen(line, 0, dtype);
    if (n > 1) v[1] = widen(line, 1, dtype);
    if (n > 2) v[2] = widen(line, 2, dtype);
    if (n > 2) v[3] = widen(line, 3, dtype);
    if (n > 4) v[4] = widen(line, 4, dtype);
    if (n > 4) v[5] = widen(line, 5, dtype);
    if (n > 4) v[6] = widen(line, 6, dtype);
    if (n > 4) v[7] = widen(line, 7, dtype);
    if (dtype == DTYPE_F8_E4M3) {
        put_together(v, 2);
        put_together(v + 2, 2);
    } else if (dtype != DTYPE_F16) {
        put_together(v, n);
    }
}

// n columns of a row of W from `col` on, a multiple of K_BLOCK, as float32; zeros up to a whole line. A quantised weight
// is code × scale, rounded.
INLINE void widen_row(float *out, const Matrix *w, int row, int col, int n, DType dtype, bool grouped) {
    const int unit = columns_of_line(dtype), shift = group_shift(w);
    const char *at = (const char *)w->data + (size_t)row * row_bytes(w, dtype) + (size_t)col / (size_t)unit * LINE;
    float scales[K_BLOCK / 32 + LANES] = {1};
    if (grouped) {
        size_t groups = (size_t)(w->cols + w->group - 1) >> shift;
        widen_scales(scales, w->scale, w->scale_dtype, (size_t)row * groups + (size_t)(col >> shift),
                     (n + w->group - 1) >> shift);
    } else if (matrix_is_quantised(w)) {
        widen_scales(scales, w->scale, w->scale_dtype, (size_t)row, 1);
    }
    char tail[LINE];
    for (int i = 0; i < n; i += unit, at += LINE) {
        __m512 v[8];
        if (n - i < unit) {
            memset(tail, 0, sizeof tail);
            at = memcpy(tail, at, (size_t)(n - i) * LINE / (size_t)unit);
        }
        widen_line(v, at, dtype);
        for (int k = 0; k < unit / LANES; k++) {
            int column = i + k * LANES;
            if (dtype == DTYPE_F8_E4M3) v[k] = _mm512_mul_ps(v[k], _mm512_set1_ps(256));
            if (matrix_is_quantised(w))
                v[k] = _mm512_mul_ps(v[k], _mm512_set1_ps(scales[grouped ? column >> shift : 0]));
            __mmask16 mask = n - column >= LANES ? 0xFFFF : n > column ? (__mmask16)((1u << (n - column)) - 1) : 0;
            _mm512_storeu_ps(out + column, _mm512_maskz_mov_ps(mask, v[k]));
        }
    }
}

// ---- products -------------------------------------------------------------------------------------------------------

// The sums of the lanes of four vectors, each by a fixed tree.
INLINE __m128 sum_lanes(__m512 a, __m512 b, __m512 c, __m512 d) {
    __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)),
           cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d)),
           all = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xEE));
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// A vector of columns: sum[r][c] += panel row r × x row c, of x those columns that the mask names.
INLINE void multiply_vector(__m512 sum[W_TILE][X_TILE], const float *panel, const float *x, size_t x_stride,
                            __mmask16 mask, int R, int C) {
    __m512 w[W_TILE];
    for (int r = 0; r < R; r++) w[r] = _mm512_loadu_ps(panel + r * K_BLOCK);
    for (int c = 0; c < C; c++) {
        __m512 xc = _mm512_maskz_loadu_ps(mask, x + (size_t)c * x_stride);
        for (int r = 0; r < R; r++) sum[r][c] = _mm512_fmadd_ps(w[r], xc, sum[r][c]);
    }
}

// y[C][R] += x · panelᵀ over n columns, for R <= W_TILE rows of W and C of x.
INLINE void multiply_tile(float *y, size_t y_stride, const float *panel, const float *x, size_t x_stride, int n, int R,
                          int C) {
    __m512 sum[W_TILE][X_TILE];
    for (int r = 0; r < W_TILE; r++)
        for (int c = 0; c < C; c++) sum[r][c] = _mm512_setzero_ps();
    int i = 0;
    for (; i + LANES <= n; i += LANES) multiply_vector(sum, panel + i, x + i, x_stride, 0xFFFF, R, C);
    if (i < n) multiply_vector(sum, panel + i, x + i, x_stride, (__mmask16)((1u << (n - i)) - 1), R, C);
    const __mmask8 rows = (__mmask8)((1u << R) - 1);
    for (int c = 0; c < C; c++, y += y_stride)
        _mm_mask_storeu_ps(
            y, rows, _mm_add_ps(_mm_maskz_loadu_ps(rows, y), sum_lanes(sum[0][c], sum[1][c], sum[2][c], sum[3][c])));
}

INLINE void multiply_columns(float *y, size_t y_stride, const float *panel, int rows, const float *x, size_t x_stride,
                             int n, int C) {
    int r = 0;
    for (; r + W_TILE <= rows; r += W_TILE)
        multiply_tile(y + r, y_stride, panel + r * K_BLOCK, x, x_stride, n, W_TILE, C);
    for (; r < rows; r++) multiply_tile(y + r, y_stride, panel + r * K_BLOCK, x, x_stride, n, 1, C);
}

static WITH_AVX512 void multiply_panel(const Product *p, int first) {
    float panel[W_ROWS * K_BLOCK] __attribute__((aligned(64)));
    const Matrix *w = p->w;
    const size_t y_stride = (size_t)w->rows, x_stride = (size_t)w->cols;
    const int rows = w->rows - first < W_ROWS ? w->rows - first : W_ROWS;
    for (int t = 0; t < p->T; t++) memset(p->y + (size_t)t * y_stride + first, 0, (size_t)rows * sizeof *p->y);
    for (int col = 0; col < w->cols; col += K_BLOCK) {
        int n = w->cols - col < K_BLOCK ? w->cols - col : K_BLOCK, t = 0;
        for (int r = 0; r < rows; r++) {
#define WIDEN(D, G) widen_row(panel + r * K_BLOCK, w, first + r, col, n, D, G)
            WITH_TYPE(w, WIDEN)
        }
        float *y = p->y + first;
        const float *x = p->x + col;
        for (; t + X_TILE <= p->T; t += X_TILE, y += X_TILE * y_stride, x += X_TILE * x_stride)
            multiply_columns(y, y_stride, panel, rows, x, x_stride, n, X_TILE);
        for (; t + 2 <= p->T; t += 2, y += 2 * y_stride, x += 2 * x_stride)
            multiply_columns(y, y_stride, panel, rows, x, x_stride, n, 2);
        if (t < p->T) multiply_columns(y, y_stride, panel, rows, x, x_stride, n, 1);
    }
}

static void multiply_part(void *product, int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; panel++) multiply_panel(product, (int)panel * W_ROWS);
}

void matmul_avx512(float *y, const float *x, const Matrix *w, int T) {
    int64_t panels = (w->rows + W_ROWS - 1) / W_ROWS, cost = (int64_t)T * W_ROWS * w->cols;
    parallel_for(panels, panels * cost <= ALONE ? panels : (PART + cost - 1) / cost, multiply_part,
                 &(Product){y, x, w, T});
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
