// What ops.c and attention.c share. Both are compiled once for each instruction set, OPS_ISA, as which the Makefile
// defines portable or avx2; OPS_NAME is its name in messages.
#ifndef OPS_SHARED_H
#define OPS_SHARED_H

#include "ops.h"
#include "vectors.h"

// The name of a function of this instruction set: FOR_ISA(attention) is attention_avx2, say.
#define FOR_ISA(name) JOIN_NAMES(name, OPS_ISA)
#define JOIN_NAMES(name, isa) JOIN_TOKENS(name, isa)
#define JOIN_TOKENS(name, isa) name##_##isa

enum { ALONE = 1 << 18 }; // multiply-adds that one thread does sooner than it wakes the others

// Members of Ops (ops.h).
void FOR_ISA(widen)(float *x, const void *row, DType dtype, int n);
void FOR_ISA(attention)(float *out, const float *q, const void *k, const void *v, DType dtype, const int *pages,
                        size_t page_stride, int T, int pos, int n_heads, int n_kv_heads, int head_dim);
void FOR_ISA(attention_step)(float *out, const float *q, const void *k, const void *v, DType dtype, const int *pages,
                             size_t page_stride, int T, int pos, int n_heads, int n_kv_heads, int head_dim);

// c[i][j] += a row i · b row j over n elements (a multiple of LANES), for R × C rows: the inner tile of everything that
// multiplies by a transposed matrix. R and C are constants after inlining, so the sums stay in registers.
INLINE void dot_tile(float *c, size_t c_row, size_t c_col, const float *a, size_t lda, const float *b, size_t ldb,
                     int n, int R, int C) {
    Float8 sum[4][3];
    for (int i = 0; i < R; i++)
        for (int j = 0; j < C; j++) sum[i][j] = splat8(0);
    for (int l = 0; l < n; l += LANES)
        for (int i = 0; i < R; i++) {
            Float8 ai = load8(a + (size_t)i * lda + l);
            for (int j = 0; j < C; j++) sum[i][j] += ai * load8(b + (size_t)j * ldb + l);
        }
    for (int i = 0; i < R; i++)
        for (int j = 0; j < C; j++) c[(size_t)i * c_row + (size_t)j * c_col] += sum8(sum[i][j]);
}

INLINE void dot_columns(float *c, size_t c_row, size_t c_col, const float *a, size_t lda, const float *b, size_t ldb,
                        int n, int rows, int C) {
    int i = 0;
    for (; i + 4 <= rows; i += 4)
        dot_tile(c + (size_t)i * c_row, c_row, c_col, a + (size_t)i * lda, lda, b, ldb, n, 4, C);
    for (; i < rows; i++) dot_tile(c + (size_t)i * c_row, c_row, c_col, a + (size_t)i * lda, lda, b, ldb, n, 1, C);
}

// c[i][j] += a row i · b row j, for any numbers of rows.
static inline void dot_block(float *c, size_t c_row, size_t c_col, const float *a, size_t lda, int a_rows,
                             const float *b, size_t ldb, int b_rows, int n) {
    int j = 0;
    for (; j + 3 <= b_rows; j += 3)
        dot_columns(c + (size_t)j * c_col, c_row, c_col, a, lda, b + (size_t)j * ldb, ldb, n, a_rows, 3);
    for (; j < b_rows; j++)
        dot_columns(c + (size_t)j * c_col, c_row, c_col, a, lda, b + (size_t)j * ldb, ldb, n, a_rows, 1);
}

#endif
