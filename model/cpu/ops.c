// Written with the vectors of vectors.h; what they become is the Makefile's choice: this file and attention.c are
// compiled once for each instruction set.
#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "../threads.h"
#include "ops.h"
#include "ops_shared.h"
#include "vectors.h"

enum {
    W_ROWS = 16,         // rows of W widened to float32 at a time ...
    K_BLOCK = 512,       // ... this many columns of them: 32 KB, which stays in the L1 cache
    STEP_ROWS = 9,       // rows of x that a step multiplies at a time ...
    STEP_W_ROWS = 32,    // ... by so many rows of W ...
    STEP_COLUMNS = 1024, // ... this many columns of them
    STEP_AHEAD = 4,      // rows of W that are fetched before they are multiplied: 1.2 to 1.5 times as fast
    PART = 1 << 16       // multiply-adds that a thread takes at a time: one that loses its core holds up no more
};

// How many of n indices, of so many multiply-adds each, make a part of parallel_for.
static int64_t part_of(int64_t n, int64_t cost) {
    return n * cost <= ALONE ? n : (PART + cost - 1) / cost;
}

// ---- matmul ---------------------------------------------------------------------------------------------------------

// One row of x against R rows of W, straight from their dtype: decode reads each weight once. A quantised weight is
// code × scale, rounded to float32, in all products: it is multiplied as it is widened.
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

void FOR_ISA(widen)(float *x, const void *row, DType dtype, int n) {
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

const Ops FOR_ISA(ops) = {.name = OPS_NAME,
                          .name_bf16 = OPS_NAME,
                          .matmul = matmul,
                          .matmul_bf16 = matmul_bf16,
                          .matmul_step = matmul_step,
                          .matmul_step_bf16 = matmul_step,
                          .widen = FOR_ISA(widen),
                          .narrow = narrow,
                          .round = round_to,
                          .rmsnorm = rmsnorm,
                          .rope = rope,
                          .attention = FOR_ISA(attention),
                          .attention_step = FOR_ISA(attention_step),
                          .swiglu = swiglu,
                          .add = add,
                          .read_all = read_all,
                          .multiply_add = multiply_add};
