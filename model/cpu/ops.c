// Written with the vectors of vectors.h; what they become is the Makefile's choice: this file is compiled once for each
// instruction set, with OPS_TABLE naming the table it fills.
#include "ops.h"

#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "../threads.h"
#include "vectors.h"

enum {
    W_ROWS = 16,                  // rows of W widened to float32 at a time ...
    K_BLOCK = 512,                // ... this many columns of them: 32 KB, which stays in the L1 cache
    STEP_ROWS = 9,                // rows of x that a step multiplies at a time ...
    STEP_W_ROWS = 32,             // ... by so many rows of W ...
    STEP_COLUMNS = 1024,          // ... this many columns of them
    STEP_AHEAD = 4,               // rows of W that are fetched before they are multiplied: 1.2 to 1.5 times as fast
    OUTER_ROWS = 6,               // rows of attention whose sums stay in registers
    Q_ROWS = 60,                  // (token, head) rows of one attention task
    Q_STRIDE = MAX_HEAD_DIM + 16, // of their queries, so that rows do not want the same places of the L1 cache
    KV_TILE = KV_PAGE,            // positions per step of the online softmax
    // In multiply-adds:
    ALONE = 1 << 18, // what one thread does sooner than it wakes the others
    PART = 1 << 16   // what a thread takes at a time: a thread that loses its core holds up no more
};

// How many of n indices, of so many multiply-adds each, make a part of parallel_for.
static int64_t part_of(int64_t n, int64_t cost) {
    return n * cost <= ALONE ? n : (PART + cost - 1) / cost;
}

// ---- matmul ---------------------------------------------------------------------------------------------------------

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
static void dot_block(float *c, size_t c_row, size_t c_col, const float *a, size_t lda, int a_rows, const float *b,
                      size_t ldb, int b_rows, int n) {
    int j = 0;
    for (; j + 3 <= b_rows; j += 3)
        dot_columns(c + (size_t)j * c_col, c_row, c_col, a, lda, b + (size_t)j * ldb, ldb, n, a_rows, 3);
    for (; j < b_rows; j++)
        dot_columns(c + (size_t)j * c_col, c_row, c_col, a, lda, b + (size_t)j * ldb, ldb, n, a_rows, 1);
}

// One row of x against R rows of W, straight from their dtype: decode reads each weight once. A quantised weight is code
// × scale, rounded to float32, in all products: it is multiplied as it is widened.
INLINE void matvec_rows(float *y, const float *x, const Matrix *w, DType dtype, int row, int R) {
    Float8 sum1[4], sum2[4], scale[4];
    int k = w->cols, whole = k / (2 * LANES) * (2 * LANES), l = 0;
    for (int i = 0; i < R; i++) sum1[i] = sum2[i] = splat8(0);
    while (l < whole) {
        int end = scale_end(w, dtype, l, whole);
        for (int i = 0; i < R && is_code(dtype); i++) scale[i] = splat8(scale_at(w, row + i, l));
        for (; l < end; l += 2 * LANES) {
            Float8 x1, x2;
            load16(x + l, dtype, &x1, &x2);
            for (int i = 0; i < R; i++) {
                Float8 w1, w2;
                widen16(w->data, dtype, (size_t)(row + i) * (size_t)k + (size_t)l, &w1, &w2);
                if (is_code(dtype)) w1 *= scale[i], w2 *= scale[i];
                sum1[i] += w1 * x1;
                sum2[i] += w2 * x2;
            }
        }
    }
    for (int i = 0; i < R; i++) {
        float sum = sum8(sum1[i] + sum2[i]);
        for (int r = whole; r < k; r++) sum += weight_at(w, dtype, row + i, r) * x[r];
        y[row + i] = sum;
    }
}

INLINE void matvec_block(float *y, const float *x, const Matrix *w, DType dtype, int row) {
    if (row + 4 <= w->rows)
        matvec_rows(y, x, w, dtype, row, 4);
    else
        for (; row < w->rows; row++) matvec_rows(y, x, w, dtype, row, 1);
}

typedef struct {
    float *y;
    const float *x;
    Matrix w;
    int T;
    bool round; // prompts: weights whose scale is of a group of columns, to bf16
} Product;

// Blocks of four rows of W.
static void matvec_part(void *product, int64_t begin, int64_t end) {
    Product p = *(const Product *)product;
    for (int block = (int)begin; block < (int)end; block++)
        WITH_DTYPE(p.w.dtype, D, matvec_block(p.y, p.x, &p.w, D, block * 4))
}

INLINE void widen_elements(float *x, const void *w, DType dtype, size_t first, int n) {
    int i = 0;
    for (; i + 2 * LANES <= n; i += 2 * LANES) {
        Float8 a, b;
        widen16(w, dtype, first + (size_t)i, &a, &b);
        store8(x + i, dtype == DTYPE_F32 ? a : __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11));
        store8(x + i + LANES, dtype == DTYPE_F32 ? b : __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15));
    }
    for (; i < n; i++) x[i] = widen1(w, dtype, first + (size_t)i);
}

// n weights of a row of W from column col on, in order.
INLINE void widen_weights(float *x, const Matrix *w, DType dtype, int row, int col, int n) {
    for (int end = col + n, next; col < end; x += next - col, col = next) {
        next = scale_end(w, dtype, col, end);
        widen_elements(x, w->data, dtype, (size_t)row * (size_t)w->cols + (size_t)col, next - col);
        if (!is_code(dtype)) continue;
        float scale = scale_at(w, row, col);
        for (int i = 0; i < next - col; i++) x[i] *= scale;
    }
}

static void widen_row(float *x, const Matrix *w, int row, int col,
                      int n){WITH_DTYPE(w -> dtype, D, widen_weights(x, w, D, row, col, n))}

// x [n], rounded to dtype where it is.
INLINE void round_numbers(float *x, DType dtype, int64_t n) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) store8(x + i, round8(load8(x + i), dtype));
    float last[LANES] = {0};
    memcpy(last, x + i, (size_t)(n - i) * sizeof *x);
    store8(last, round8(load8(last), dtype));
    memcpy(x + i, last, (size_t)(n - i) * sizeof *x);
}

// One panel of W, from row `first` on: it is widened once and serves all T rows of x.
static void matmul_panel(float *y, const float *x, const Matrix *w, int T, int first, bool round) {
    float panel[W_ROWS * K_BLOCK];
    int n = w->rows, k = w->cols;
    int rows = n - first < W_ROWS ? n - first : W_ROWS;
    for (int t = 0; t < T; t++) memset(y + (size_t)t * (size_t)n + first, 0, (size_t)rows * sizeof *y);
    for (int l = 0; l < k; l += K_BLOCK) {
        int width = k - l < K_BLOCK ? k - l : K_BLOCK, whole = width / LANES * LANES;
        for (int i = 0; i < rows; i++) widen_row(panel + i * K_BLOCK, w, first + i, l, width);
        for (int i = 0; i < rows && round; i++) round_numbers(panel + i * K_BLOCK, DTYPE_BF16, width);
        dot_block(y + first, 1, (size_t)n, panel, K_BLOCK, rows, x + l, (size_t)k, T, whole);
        for (int r = whole; r < width; r++) // the last columns of a width that is no multiple of LANES
            for (int t = 0; t < T; t++)
                for (int i = 0; i < rows; i++)
                    y[(size_t)t * (size_t)n + (size_t)(first + i)] +=
                        panel[i * K_BLOCK + r] * x[(size_t)t * (size_t)k + (size_t)(l + r)];
    }
}

static void matmul_part(void *product, int64_t begin, int64_t end) {
    const Product *p = product;
    for (int panel = (int)begin; panel < (int)end; panel++)
        matmul_panel(p->y, p->x, &p->w, p->T, panel * W_ROWS, p->round);
}

// Rows of prompts.
static void multiply_prompt(Product *p) {
    int64_t blocks = (p->w.rows + W_ROWS - 1) / W_ROWS;
    parallel_for(blocks, part_of(blocks, (int64_t)p->T * W_ROWS * p->w.cols), matmul_part, p);
}

static void matmul(float *y, const float *x, const Matrix *w, int T) {
    multiply_prompt(&(Product){y, x, *w, T, .round = false});
}

static void matmul_bf16(float *y, const float *x, const Matrix *w, int T) {
    multiply_prompt(&(Product){y, x, *w, T, .round = w->group && w->group != WHOLE_ROW});
}

// ---- matmul of a step -----------------------------------------------------------------------------------------------
// One row of x is matvec's. Several share what is read of W; each has matvec's sums in matvec's order.

// matvec's sum1 and sum2 of a block of W by rows of x, from one block of columns to the next.
typedef struct {
    Float8 sum1[STEP_W_ROWS][STEP_ROWS], sum2[STEP_W_ROWS][STEP_ROWS];
} StepSums;

// Rows i to i+R of the block that begins at row `first` of W, by rows t to t+C of x, over n columns from `col` on, a
// multiple of 16. x [..][STEP_COLUMNS]: these columns, each sixteen in the order in which widen16 gives the weights.
INLINE void step_tile(StepSums *sums, int i, int t, const float *x, const Matrix *w, DType dtype, int first, int col,
                      int n, int R, int C) {
    Float8 sum1[2][3], sum2[2][3], scale[2];
    size_t k = (size_t)w->cols, at = (size_t)(first + i) * k;
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) sum1[r][c] = sums->sum1[i + r][t + c], sum2[r][c] = sums->sum2[i + r][t + c];
    x += t * STEP_COLUMNS;
    for (int l = col, end = col + n; l < end;) {
        int next = scale_end(w, dtype, l, end);
        for (int r = 0; r < R && is_code(dtype); r++) scale[r] = splat8(scale_at(w, first + i + r, l));
        for (; l < next; l += 2 * LANES, x += 2 * LANES) {
            Float8 w1[2], w2[2];
            for (int r = 0; r < R; r++) {
                widen16(w->data, dtype, at + (size_t)r * k + (size_t)l, &w1[r], &w2[r]);
                if (is_code(dtype)) w1[r] *= scale[r], w2[r] *= scale[r];
                if (t == 0)
                    __builtin_prefetch((const char *)w->data +
                                       bytes_before(dtype, at + (size_t)(r + STEP_AHEAD) * k + (size_t)l));
            }
            for (int c = 0; c < C; c++) {
                Float8 xc = load8(x + c * STEP_COLUMNS);
                for (int r = 0; r < R; r++) sum1[r][c] += w1[r] * xc;
            }
            for (int c = 0; c < C; c++) {
                Float8 xc = load8(x + c * STEP_COLUMNS + LANES);
                for (int r = 0; r < R; r++) sum2[r][c] += w2[r] * xc;
            }
        }
    }
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) sums->sum1[i + r][t + c] = sum1[r][c], sums->sum2[i + r][t + c] = sum2[r][c];
}

INLINE void step_rows(StepSums *sums, int i, const float *x, int T, const Matrix *w, DType dtype, int first, int col,
                      int n, int R) {
    int t = 0;
    for (; t + 3 <= T; t += 3) step_tile(sums, i, t, x, w, dtype, first, col, n, R, 3);
    if (T - t == 2) step_tile(sums, i, t, x, w, dtype, first, col, n, R, 2);
    if (T - t == 1) step_tile(sums, i, t, x, w, dtype, first, col, n, R, 1);
}

// Rows of W from `first` on, by T <= STEP_ROWS rows of x.
INLINE void step_block(float *y, const float *x, const Matrix *w, DType dtype, int T, int first) {
    float columns[STEP_ROWS * STEP_COLUMNS];
    StepSums sums;
    int n = w->rows, k = w->cols;
    int rows = n - first < STEP_W_ROWS ? n - first : STEP_W_ROWS, whole = k / (2 * LANES) * (2 * LANES);
    memset(&sums, 0, sizeof sums);
    for (int l = 0; l < whole; l += STEP_COLUMNS) {
        int width = whole - l < STEP_COLUMNS ? whole - l : STEP_COLUMNS, i = 0;
        for (int t = 0; t < T; t++)
            for (int c = 0; c < width; c += 2 * LANES) {
                Float8 x1, x2;
                load16(x + (size_t)t * (size_t)k + (size_t)(l + c), dtype, &x1, &x2);
                store8(columns + t * STEP_COLUMNS + c, x1);
                store8(columns + t * STEP_COLUMNS + c + LANES, x2);
            }
        for (; i + 2 <= rows; i += 2) step_rows(&sums, i, columns, T, w, dtype, first, l, width, 2);
        if (i < rows) step_rows(&sums, i, columns, T, w, dtype, first, l, width, 1);
    }
    for (int i = 0; i < rows; i++)
        for (int t = 0; t < T; t++) {
            float sum = sum8(sums.sum1[i][t] + sums.sum2[i][t]);
            for (int r = whole; r < k; r++)
                sum += weight_at(w, dtype, first + i, r) * x[(size_t)t * (size_t)k + (size_t)r];
            y[(size_t)t * (size_t)n + (size_t)(first + i)] = sum;
        }
}

static void step_part(void *product, int64_t begin, int64_t end) {
    Product p = *(const Product *)product;
    for (int block = (int)begin; block < (int)end; block++)
        for (int t = 0; t < p.T; t += STEP_ROWS) {
            float *y = p.y + (size_t)t * (size_t)p.w.rows;
            const float *x = p.x + (size_t)t * (size_t)p.w.cols;
            int T = p.T - t < STEP_ROWS ? p.T - t : STEP_ROWS, first = block * STEP_W_ROWS;
            WITH_DTYPE(p.w.dtype, D, step_block(y, x, &p.w, D, T, first))
        }
}

static void matmul_step(float *y, const float *x, const Matrix *w, int T) {
    Product p = {y, x, *w, T, .round = false};
    int64_t rows = T == 1 ? 4 : STEP_W_ROWS, blocks = (w->rows + rows - 1) / rows;
    parallel_for(blocks, part_of(blocks, T * rows * w->cols), T == 1 ? matvec_part : step_part, &p);
}

static void widen(float *x, const void *row, DType dtype, int n) {
    if (!is_code(dtype)) widen_row(x, &(Matrix){.data = row, .dtype = dtype, .cols = n}, 0, 0, n);
}

// ---- element by element ---------------------------------------------------------------------------------------------
// Rows or blocks of numbers, shared by the threads.

typedef struct {
    float *y;
    const float *x, *weight;
    float eps;
    int n;
} Norm;

static void rmsnorm_part(void *whole, int64_t begin, int64_t end) {
    const Norm a = *(const Norm *)whole;
    const int n = a.n;
    const float *x = a.x + begin * n;
    float *y = a.y + begin * n;
    for (int64_t t = begin; t < end; t++, x += n, y += n) {
        Float8 squares = splat8(0);
        int i = 0;
        for (; i + LANES <= n; i += LANES) squares += load8(x + i) * load8(x + i);
        float sum = sum8(squares);
        for (; i < n; i++) sum += x[i] * x[i];
        float scale = 1.0f / sqrtf(sum / (float)n + a.eps);
        for (i = 0; i < n; i++) y[i] = a.weight[i] * (x[i] * scale);
    }
}

static void rmsnorm(float *y, const float *x, const float *weight, float eps, int T, int n) {
    parallel_for(T, part_of(T, n), rmsnorm_part, &(Norm){y, x, weight, eps, n});
}

typedef struct {
    float *x;
    const float *cos, *sin;
    int n_heads, head_dim;
} Rotation;

static void rope_part(void *whole, int64_t begin, int64_t end) {
    const Rotation a = *(const Rotation *)whole;
    const int half = a.head_dim / 2;
    const float *cos = a.cos + begin * half, *sin = a.sin + begin * half;
    float *x = a.x + begin * a.n_heads * a.head_dim;
    for (int64_t t = begin; t < end; t++, cos += half, sin += half)
        for (int h = 0; h < a.n_heads; h++, x += a.head_dim)
            for (int i = 0; i < half; i++) {
                float first = x[i], second = x[i + half];
                x[i] = first * cos[i] - second * sin[i];
                x[i + half] = second * cos[i] + first * sin[i];
            }
}

static void rope(float *x, const float *cos, const float *sin, int T, int n_heads, int head_dim) {
    parallel_for(T, part_of(T, (int64_t)n_heads * head_dim), rope_part, &(Rotation){x, cos, sin, n_heads, head_dim});
}

typedef struct {
    float *x;
    const float *y;
    DType dtype;
    int64_t n;
} Numbers;

enum { BLOCK = 1024 }; // numbers

static void add_part(void *numbers, int64_t begin, int64_t end) { // in blocks
    const Numbers a = *(const Numbers *)numbers;
    int64_t last = end * BLOCK < a.n ? end * BLOCK : a.n;
    for (int64_t i = begin * BLOCK; i < last; i++) a.x[i] += a.y[i];
}

static void add(float *x, const float *y, int64_t n) {
    int64_t blocks = (n + BLOCK - 1) / BLOCK;
    parallel_for(blocks, part_of(blocks, BLOCK), add_part, &(Numbers){.x = x, .y = y, .n = n});
}

static void round_part(void *numbers, int64_t begin, int64_t end) { // in blocks
    const Numbers a = *(const Numbers *)numbers;
    int64_t first = begin * BLOCK, last = end * BLOCK < a.n ? end * BLOCK : a.n;
    if (a.dtype == DTYPE_BF16)
        round_numbers(a.x + first, DTYPE_BF16, last - first);
    else
        round_numbers(a.x + first, DTYPE_F16, last - first);
}

static void round_to(float *x, DType dtype, int64_t n) {
    int64_t blocks = (n + BLOCK - 1) / BLOCK;
    if (dtype != DTYPE_F32)
        parallel_for(blocks, part_of(blocks, BLOCK), round_part, &(Numbers){.x = x, .dtype = dtype, .n = n});
}

static void narrow(void *to, const float *x, DType dtype, int64_t n) {
    uint16_t *bits = to;
    for (int64_t i = 0; i < n; i += LANES) {
        int64_t count = n - i < LANES ? n - i : LANES;
        float in[LANES] = {0};
        memcpy(in, x + i, (size_t)count * sizeof *x);
        UInt8 narrowed = dtype == DTYPE_F16 ? narrow8(load8(in), DTYPE_F16) : narrow8(load8(in), DTYPE_BF16);
        Half8 out = __builtin_convertvector(narrowed, Half8);
        memcpy(bits + i, &out, (size_t)count * sizeof *bits);
    }
}

typedef struct {
    float *gate;
    const float *up;
    int64_t n;
} Gate;

INLINE Float8 swiglu8(Float8 gate, Float8 up) {
    return gate / (1.0f + exp8(-gate)) * up;
}

static void swiglu_part(void *whole, int64_t begin, int64_t end) { // in blocks of LANES
    Gate a = *(const Gate *)whole;
    int64_t i = begin * LANES, last = end * LANES < a.n ? end * LANES : a.n;
    for (; i + LANES <= last; i += LANES) store8(a.gate + i, swiglu8(load8(a.gate + i), load8(a.up + i)));
    float g[LANES] = {0}, u[LANES] = {0};
    size_t bytes = (size_t)(last - i) * sizeof *g;
    memcpy(g, a.gate + i, bytes);
    memcpy(u, a.up + i, bytes);
    store8(g, swiglu8(load8(g), load8(u)));
    memcpy(a.gate + i, g, bytes);
}

static void swiglu(float *gate, const float *up, int64_t n) {
    enum { EXP_COST = 16 }; // an exponential costs as much as so many multiply-adds
    int64_t blocks = (n + LANES - 1) / LANES;
    parallel_for(blocks, part_of(blocks, LANES * EXP_COST), swiglu_part, &(Gate){gate, up, n});
}

// ---- attention ------------------------------------------------------------------------------------------------------

// out[R][.] += a[R][n] · b[n][.] for C vectors of columns: rows of out are out_row apart, of a a_row, of b b_row. R and C
// are constants after inlining.
INLINE void outer_tile(float *out, int out_row, const float *a, int a_row, const float *b, int b_row, int n, int R,
                       int C) {
    Float8 sum[OUTER_ROWS][2];
#pragma GCC unroll 6
    for (int i = 0; i < R; i++)
        for (int c = 0; c < C; c++) sum[i][c] = load8(out + i * out_row + c * LANES);
    for (int l = 0; l < n; l++, a++, b += b_row) {
        Float8 column[2];
        for (int c = 0; c < C; c++) column[c] = load8(b + c * LANES);
#pragma GCC unroll 6
        for (int i = 0; i < R; i++) {
            Float8 factor = splat8(a[i * a_row]);
            for (int c = 0; c < C; c++) sum[i][c] += factor * column[c];
        }
    }
#pragma GCC unroll 6
    for (int i = 0; i < R; i++)
        for (int c = 0; c < C; c++) store8(out + i * out_row + c * LANES, sum[i][c]);
}

// The same for R rows and all `columns`.
INLINE void outer_rows(float *out, int out_row, const float *a, int a_row, const float *b, int b_row, int n,
                       int columns, int R) {
    int c = 0;
    for (; c + 2 * LANES <= columns; c += 2 * LANES) outer_tile(out + c, out_row, a, a_row, b + c, b_row, n, R, 2);
    for (; c + LANES <= columns; c += LANES) outer_tile(out + c, out_row, a, a_row, b + c, b_row, n, R, 1);
    for (int r = 0; r < R && c < columns; r++) // columns left over
        for (int l = 0; l < n; l++)
            for (int i = c; i < columns; i++) out[r * out_row + i] += a[r * a_row + l] * b[l * b_row + i];
}

// OUTER_ROWS rows. (Not inlined: their sums would not stay in registers, of which they take nearly all.)
__attribute__((noinline)) static void outer_most(float *out, int out_row, const float *a, int a_row, const float *b,
                                                 int b_row, int n, int columns) {
    outer_rows(out, out_row, a, a_row, b, b_row, n, columns, OUTER_ROWS);
}

// The same for any number of rows. A row's sums have one order, whatever rows are beside it.
static void outer_product(float *out, int out_row, const float *a, int a_row, const float *b, int b_row, int n,
                          int columns, int rows) {
    int i = 0;
    for (; i + OUTER_ROWS <= rows; i += OUTER_ROWS)
        outer_most(out + i * out_row, out_row, a + i * a_row, a_row, b, b_row, n, columns);
    for (; i + 4 <= rows; i += 4) outer_rows(out + i * out_row, out_row, a + i * a_row, a_row, b, b_row, n, columns, 4);
    for (; i < rows; i++) outer_rows(out + i * out_row, out_row, a + i * a_row, a_row, b, b_row, n, columns, 1);
}

// out[rows][n] += p[rows][KV_TILE] · v[n], of v as many positions as the row attends to, visible[rows], ascending: what
// comes after it is not multiplied by zero but left alone, for it may be infinite.
static void accumulate(float *out, const float *p, const float *v, int rows, const int *visible, int n) {
    for (int i = 0, end; i < rows; i = end) {
        for (end = i + 1; end < rows && visible[end] == visible[i];) end++;
        outer_product(out + i * n, n, p + i * KV_TILE, KV_TILE, v, n, visible[i], n, end - i);
    }
}

// to[8][KV_TILE] = the transpose of from[8][from_row].
INLINE void transpose8(float *to, const float *from, int from_row) {
    Float8 a[8], b[8];
    for (int i = 0; i < 8; i++) a[i] = load8(from + i * from_row);
    for (int i = 0; i < 4; i++) { // pairs of rows i and i+4, then of these, then of those: all elements are in place
        b[2 * i] = __builtin_shufflevector(a[i], a[i + 4], 0, 8, 1, 9, 2, 10, 3, 11);
        b[2 * i + 1] = __builtin_shufflevector(a[i], a[i + 4], 4, 12, 5, 13, 6, 14, 7, 15);
    }
    for (int i = 0; i < 4; i++) {
        a[2 * i] = __builtin_shufflevector(b[i], b[i + 4], 0, 8, 1, 9, 2, 10, 3, 11);
        a[2 * i + 1] = __builtin_shufflevector(b[i], b[i + 4], 4, 12, 5, 13, 6, 14, 7, 15);
    }
    for (int i = 0; i < 4; i++) {
        b[2 * i] = __builtin_shufflevector(a[i], a[i + 4], 0, 8, 1, 9, 2, 10, 3, 11);
        b[2 * i + 1] = __builtin_shufflevector(a[i], a[i + 4], 4, 12, 5, 13, 6, 14, 7, 15);
    }
    for (int i = 0; i < 8; i++) store8(to + i * KV_TILE, b[i]);
}

// to[n][KV_TILE] from k[count][n]; zeros in the place of positions that are not there.
static void transpose_tile(float *to, const float *k, int count, int n) {
    int whole = n / LANES * LANES, j = 0;
    if (count < KV_TILE) memset(to, 0, (size_t)(n * KV_TILE) * sizeof *to);
    for (; j + LANES <= count; j += LANES) {
        for (int i = 0; i < whole; i += LANES) transpose8(to + i * KV_TILE + j, k + j * n + i, n);
        for (int i = whole; i < n; i++)
            for (int l = 0; l < LANES; l++) to[i * KV_TILE + j + l] = k[(j + l) * n + i];
    }
    for (; j < count; j++)
        for (int i = 0; i < n; i++) to[i * KV_TILE + j] = k[j * n + i];
}

// score[rows][KV_TILE] = queries[rows][Q_STRIDE] · k[count][n]. Rows of prompts are many: keys are transposed for them, so that
// no sum is spread over a vector.
static void prompt_scores(float *score, const float *queries, const float *k, int rows, int count, int n) {
    float keys[MAX_HEAD_DIM * KV_TILE];
    transpose_tile(keys, k, count, n);
    memset(score, 0, (size_t)(rows * KV_TILE) * sizeof *score);
    outer_product(score, KV_TILE, queries, Q_STRIDE, keys, KV_TILE, n, KV_TILE, rows);
}

// The same for rows of steps.
static void step_scores(float *score, const float *queries, const float *k, int rows, int count, int n) {
    int whole = n / LANES * LANES;
    memset(score, 0, (size_t)(rows * KV_TILE) * sizeof *score);
    dot_block(score, KV_TILE, 1, queries, Q_STRIDE, rows, k, (size_t)n, count, whole);
    for (int r = 0; r < rows; r++)
        for (int i = whole; i < n; i++)
            for (int c = 0; c < count; c++) score[r * KV_TILE + c] += queries[r * Q_STRIDE + i] * k[c * n + i];
}

// One row of scores [KV_TILE], of which the first `visible` count: to exp(score - max), zero beyond; keeps the running
// maximum and sum, and rescales what was accumulated under an older maximum.
static void softmax_step(float *score, int visible, float *max, float *sum, float *out, int n) {
    for (int j = visible; j < KV_TILE; j++) score[j] = -INFINITY;
    Float8 most = splat8(*max);
    for (int j = 0; j < KV_TILE; j += LANES) {
        Float8 s = load8(score + j);
        most = select8(s > most, s, most);
    }
    float new_max = *max;
    for (int j = 0; j < LANES; j++) new_max = most[j] > new_max ? most[j] : new_max;
    if (new_max != *max) {
        float rescale = expf(*max - new_max); // 0 at first, when the maximum is -inf
        *sum *= rescale;
        for (int l = 0; l < n; l++) out[l] *= rescale;
        *max = new_max;
    }
    Float8 total = splat8(0);
    for (int j = 0; j < KV_TILE; j += LANES) {
        Float8 p = exp8(load8(score + j) - new_max);
        store8(score + j, p);
        total += p;
    }
    *sum += sum8(total);
}

// n numbers of the cache from number `at` on: where they are, or widened.
static const float *tile_of(float *widened, const void *cache, size_t at, DType dtype, int n) {
    if (dtype == DTYPE_F32) return (const float *)cache + at;
    widen(widened, (const uint16_t *)cache + at, dtype, n);
    return widened;
}

// Rows [first, first+rows) of one K/V head's queries, numbered token × group + head of the group. k and v: the head's
// first page, page_stride elements before the next.
static void attention_task(float *out, const float *q, const void *k, const void *v, DType dtype, const int *pages,
                           size_t page_stride, int first, int rows, int pos, int n_heads, int group, int head_dim,
                           bool prompt) {
    float queries[Q_ROWS * Q_STRIDE], result[Q_ROWS * MAX_HEAD_DIM], score[Q_ROWS * KV_TILE], max[Q_ROWS], sum[Q_ROWS],
        widened[KV_TILE * MAX_HEAD_DIM];
    int visible[Q_ROWS]; // positions of a tile that a row attends to
    float scale = 1.0f / sqrtf((float)head_dim);
    for (int r = 0; r < rows; r++) {
        int token = (first + r) / group, head = (first + r) % group;
        const float *from = q + ((size_t)token * (size_t)n_heads + (size_t)head) * (size_t)head_dim;
        for (int i = 0; i < head_dim; i++) queries[r * Q_STRIDE + i] = from[i] * scale;
        max[r] = -INFINITY;
        sum[r] = 0;
    }
    memset(result, 0, (size_t)(rows * head_dim) * sizeof *result);
    int end = pos + (first + rows - 1) / group + 1; // positions that the last row attends to
    for (int j = 0; j < end; j += KV_TILE) {
        int count = end - j < KV_TILE ? end - j : KV_TILE;
        size_t page = (size_t)pages[j / KV_TILE] * page_stride;
        const float *kj = tile_of(widened, k, page, dtype, count * head_dim);
        (prompt ? prompt_scores : step_scores)(score, queries, kj, rows, count, head_dim);
        for (int r = 0; r < rows; r++) {
            int sees = pos + (first + r) / group + 1 - j; // the causal mask
            visible[r] = sees < 0 ? 0 : sees > count ? count : sees;
            if (visible[r] > 0)
                softmax_step(score + r * KV_TILE, visible[r], max + r, sum + r, result + r * head_dim, head_dim);
        }
        const float *vj = tile_of(widened, v, page, dtype, count * head_dim);
        accumulate(result, score, vj, rows, visible, head_dim);
    }
    for (int r = 0; r < rows; r++) {
        int token = (first + r) / group, head = (first + r) % group;
        float *to = out + ((size_t)token * (size_t)n_heads + (size_t)head) * (size_t)head_dim;
        for (int i = 0; i < head_dim; i++) to[i] = result[r * head_dim + i] / sum[r];
    }
}

typedef struct {
    float *out;
    const float *q;
    const char *k, *v;
    DType dtype;
    const int *pages;
    int T, pos, n_heads, n_kv_heads, head_dim;
    bool prompt;
} Attention;

// Blocks of Q_ROWS rows of one K/V head, the longest first.
static void attention_part(void *whole, int64_t begin, int64_t end) {
    const Attention *a = whole;
    int group = a->n_heads / a->n_kv_heads, rows = a->T * group, blocks = (rows + Q_ROWS - 1) / Q_ROWS;
    for (int64_t i = begin; i < end; i++) {
        int task = blocks * a->n_kv_heads - 1 - (int)i, kv_head = task % a->n_kv_heads,
            first = task / a->n_kv_heads * Q_ROWS;
        size_t at = (size_t)kv_head * KV_PAGE * (size_t)a->head_dim, head = (size_t)(kv_head * group * a->head_dim);
        at *= (size_t)dtype_bytes[a->dtype];
        attention_task(a->out + head, a->q + head, a->k + at, a->v + at, a->dtype, a->pages,
                       kv_page_elements(a->n_kv_heads, a->head_dim), first,
                       rows - first < Q_ROWS ? rows - first : Q_ROWS, a->pos, a->n_heads, group, a->head_dim,
                       a->prompt);
    }
}

static void attend(const Attention *a) {
    int64_t tasks = (int64_t)(a->T * (a->n_heads / a->n_kv_heads) + Q_ROWS - 1) / Q_ROWS * a->n_kv_heads;
    bool alone = (int64_t)a->T * (a->pos + a->T) * a->n_heads * a->head_dim <= ALONE;
    parallel_for(tasks, alone ? tasks : 1, attention_part, (void *)a);
}

static void attention(float *out, const float *q, const void *k, const void *v, DType dtype, const int *pages, int T,
                      int pos, int n_heads, int n_kv_heads, int head_dim) {
    attend(&(Attention){out, q, k, v, dtype, pages, T, pos, n_heads, n_kv_heads, head_dim, .prompt = true});
}

static void attention_step(float *out, const float *q, const void *k, const void *v, DType dtype, const int *pages,
                           int T, int pos, int n_heads, int n_kv_heads, int head_dim) {
    attend(&(Attention){out, q, k, v, dtype, pages, T, pos, n_heads, n_kv_heads, head_dim, .prompt = false});
}

// ---- what the machine gives -----------------------------------------------------------------------------------------

enum { READ_CHUNK = 1 << 20 };

typedef struct {
    const char *data;
    atomic_ullong sum;
} Reading;

static void read_part(void *reading, int64_t begin, int64_t end) {
    Reading *r = reading;
    Word4 sum[8] = {{0}};
    for (const char *p = r->data + begin * READ_CHUNK; p < r->data + end * READ_CHUNK; p += sizeof sum)
        for (int j = 0; j < 8; j++) {
            Word4 word;
            memcpy(&word, p + j * (int)sizeof word, sizeof word);
            sum[j] += word;
        }
    for (int j = 0; j < 8; j++) r->sum += sum[j][0] + sum[j][1] + sum[j][2] + sum[j][3];
}

static uint64_t read_all(const void *data, int64_t bytes) {
    Reading r = {.data = data};
    parallel_for(bytes / READ_CHUNK, 1, read_part, &r);
    return r.sum;
}

static double multiply_add(int64_t rounds, float *sink) {
    Float8 sum[10]; // more than latency × issue width asks for, and few enough for registers
    Float8 a = splat8(0.999f), b = splat8(*sink);
    for (int i = 0; i < 10; i++) sum[i] = splat8((float)i);
    for (int64_t round = 0; round < rounds; round++)
        for (int i = 0; i < 10; i++) sum[i] = sum[i] * a + b;
    for (int i = 1; i < 10; i++) sum[0] += sum[i];
    *sink = sum8(sum[0]);
    return (double)rounds * 10 * LANES * 2;
}

const Ops OPS_TABLE = {.name = OPS_NAME,
                       .name_bf16 = OPS_NAME,
                       .matmul = matmul,
                       .matmul_bf16 = matmul_bf16,
                       .matmul_step = matmul_step,
                       .matmul_step_bf16 = matmul_step,
                       .widen = widen,
                       .narrow = narrow,
                       .round = round_to,
                       .rmsnorm = rmsnorm,
                       .rope = rope,
                       .attention = attention,
                       .attention_step = attention_step,
                       .swiglu = swiglu,
                       .add = add,
                       .read_all = read_all,
                       .multiply_add = multiply_add};
