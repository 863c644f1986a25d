// Written with vectors of eight floats (a GCC and Clang extension); what they become is the Makefile's choice: this
// file is compiled once for each instruction set, with OPS_TABLE naming the table it fills.
#include "ops.h"

#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "../threads.h"

enum {
    LANES = 8,
    W_ROWS = 16,         // rows of W widened to float32 at a time ...
    K_BLOCK = 512,       // ... this many columns of them: 32 KB, which stays in the L1 cache
    STEP_ROWS = 9,       // rows of x that a step multiplies at a time ...
    STEP_W_ROWS = 32,    // ... by so many rows of W ...
    STEP_COLUMNS = 1024, // ... this many columns of them
    STEP_AHEAD = 4,      // rows of W that are fetched before they are multiplied: 1.2 to 1.5 times as fast
    Q_ROWS = 32,         // (token, head) rows of one attention task
    KV_TILE = KV_PAGE,   // positions per step of the online softmax
    // In multiply-adds:
    ALONE = 1 << 18, // what one thread does sooner than it wakes the others
    PART = 1 << 16   // what a thread takes at a time: a thread that loses its core holds up no more
};

typedef float Float8 __attribute__((vector_size(32)));
typedef int32_t Int8 __attribute__((vector_size(32)));
typedef uint32_t UInt8 __attribute__((vector_size(32)));
typedef uint64_t Word4 __attribute__((vector_size(32)));
typedef int16_t Pair8 __attribute__((vector_size(16)));
typedef uint8_t Byte16 __attribute__((vector_size(16)));

#define INLINE static inline __attribute__((always_inline))

// ---- vectors --------------------------------------------------------------------------------------------------------

INLINE Float8 load8(const float *p) {
    Float8 v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE void store8(float *p, Float8 v) {
    memcpy(p, &v, sizeof v);
}

INLINE Float8 splat8(float x) {
    return (Float8){x, x, x, x, x, x, x, x};
}

INLINE Float8 select8(Int8 mask, Float8 yes, Float8 no) {
    return (Float8)(((Int8)yes & mask) | ((Int8)no & ~mask));
}

INLINE float sum8(Float8 v) { // a fixed tree
    return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

// f16 in the low half of each lane: put exponent and fraction in place and let a multiplication move the exponent's
// bias from 15 to 127; it normalises the subnormals too. Infinities and NaN get the exponent of ones back.
INLINE Float8 f16_to_float(UInt8 bits) {
    Float8 f = (Float8)((bits & 0x7FFF) << 13) * 0x1p112f;
    UInt8 special = (UInt8)((bits & 0x7C00) == 0x7C00) & 0x7F800000;
    return (Float8)((UInt8)f | special | (bits & 0x8000) << 16);
}

// e4m3 in the low byte of each lane, none of them NaN. Below 2^-6 the fraction is a whole number of 2^-9.
INLINE Float8 fp8_to_float(UInt8 bits) {
    Int8 magnitude = (Int8)(bits & 0x7F);
    Float8 normal = (Float8)((magnitude << 20) + (120 << 23));
    Float8 tiny = __builtin_convertvector(magnitude, Float8) * 0x1p-9f;
    return (Float8)((UInt8)select8(magnitude < 8, tiny, normal) | (bits & 0x80) << 24);
}

// Codes of quantised weights.
INLINE bool is_code(DType dtype) {
    return dtype > DTYPE_F32;
}

// Bytes before element i; of int4 an even one.
INLINE size_t bytes_before(DType dtype, size_t i) {
    return dtype == DTYPE_U8 ? i / 2 : is_code(dtype) ? i : dtype == DTYPE_F32 ? 4 * i : 2 * i;
}

// Sixteen codes from element i on, as numbers, the even and the odd elements: so a pair of bytes, or of nibbles, is taken
// apart.
INLINE void widen16_codes(const char *w, DType dtype, Float8 *first, Float8 *second) {
    if (dtype == DTYPE_U8) {
        Byte16 bytes = {0}, zero = {0};
        memcpy(&bytes, w, LANES);
        bytes = __builtin_shufflevector(bytes, zero, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
        Int8 pairs = __builtin_convertvector((Pair8)bytes, Int8);
        *first = __builtin_convertvector((pairs & 15) - 8, Float8);
        *second = __builtin_convertvector((pairs >> 4) - 8, Float8);
        return;
    }
    Pair8 words;
    memcpy(&words, w, sizeof words);
    Int8 pairs = __builtin_convertvector(words, Int8);
    if (dtype == DTYPE_I8) {
        *first = __builtin_convertvector(pairs << 24 >> 24, Float8);
        *second = __builtin_convertvector(pairs >> 8, Float8);
    } else {
        *first = fp8_to_float((UInt8)pairs & 0xFF);
        *second = fp8_to_float((UInt8)(pairs >> 8) & 0xFF);
    }
}

// Sixteen weights from element i on, widened; exact for every value. Two-byte weights come as the even and the odd
// elements: that is how a 32-bit lane holds a pair, and taking it apart costs a shift and a mask. So do codes, without
// their scale. F32 comes in order.
INLINE void widen16(const void *w, DType dtype, size_t i, Float8 *first, Float8 *second) {
    if (dtype == DTYPE_F32) {
        *first = load8((const float *)w + i);
        *second = load8((const float *)w + i + LANES);
        return;
    }
    if (is_code(dtype)) {
        widen16_codes((const char *)w + bytes_before(dtype, i), dtype, first, second);
        return;
    }
    UInt8 pairs;
    memcpy(&pairs, (const uint16_t *)w + i, sizeof pairs);
    if (dtype == DTYPE_BF16) {
        *first = (Float8)(pairs << 16);
        *second = (Float8)(pairs & 0xFFFF0000);
    } else {
        *first = f16_to_float(pairs & 0xFFFF);
        *second = f16_to_float(pairs >> 16);
    }
}

// Sixteen floats of x in the order in which widen16 gives the weights.
INLINE void load16(const float *x, DType dtype, Float8 *first, Float8 *second) {
    Float8 a = load8(x), b = load8(x + LANES);
    *first = dtype == DTYPE_F32 ? a : __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14);
    *second = dtype == DTYPE_F32 ? b : __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
}

INLINE float widen1(const void *w, DType dtype, size_t i) {
    if (dtype == DTYPE_F32) return ((const float *)w)[i];
    if (dtype == DTYPE_I8) return ((const int8_t *)w)[i];
    if (dtype == DTYPE_U8) return (float)((((const uint8_t *)w)[i / 2] >> i % 2 * 4 & 15) - 8);
    if (dtype == DTYPE_F8_E4M3) return fp8_to_float((UInt8){((const uint8_t *)w)[i]})[0];
    uint16_t padded[2 * LANES] = {((const uint16_t *)w)[i]};
    Float8 first, second;
    widen16(padded, dtype, 0, &first, &second);
    return first[0];
}

// What the codes of a row are multiplied by, from column `col` on.
INLINE float scale_at(const Matrix *w, int row, int col) {
    size_t groups = (size_t)((w->cols + w->group - 1) / w->group), i = (size_t)row * groups + (size_t)(col / w->group);
    if (w->scale_dtype == DTYPE_F32) return ((const float *)w->scale)[i];
    if (w->scale_dtype == DTYPE_F16) return widen1(w->scale, DTYPE_F16, i);
    uint32_t bits = (uint32_t)((const uint16_t *)w->scale)[i] << 16;
    float scale;
    memcpy(&scale, &bits, sizeof scale);
    return scale;
}

INLINE float weight_at(const Matrix *w, DType dtype, int row, int col) {
    float x = widen1(w->data, dtype, (size_t)row * (size_t)w->cols + (size_t)col);
    return is_code(dtype) ? x * scale_at(w, row, col) : x;
}

// The column, at most end, up to which those from `col` on share a scale; of numbers, which have none, end.
INLINE int scale_end(const Matrix *w, DType dtype, int col, int end) {
    if (!is_code(dtype)) return end;
    int next = col / w->group * w->group;
    return end - next < w->group ? end : next + w->group;
}

// statement with D for the dtype of a matrix, a constant: so no inner loop asks for it.
#define DTYPE_CASE(constant, D, statement) \
    case constant: { \
        const DType D = constant; \
        statement; \
        break; \
    }
#define WITH_DTYPE(dtype, D, statement) \
    switch (dtype) { \
        DTYPE_CASE(DTYPE_BF16, D, statement) \
        DTYPE_CASE(DTYPE_F16, D, statement) \
        DTYPE_CASE(DTYPE_F32, D, statement) \
        DTYPE_CASE(DTYPE_U8, D, statement) \
        DTYPE_CASE(DTYPE_I8, D, statement) \
        DTYPE_CASE(DTYPE_F8_E4M3, D, statement) \
    default: \
        break; /* others are not of matrices */ \
    }

// exp(x) to about 1 ulp; 0 below -87, infinite above 88.4. 2^n · e^r with r in ±ln2/2, a polynomial of degree 6
// (Cephes' expf).
INLINE Float8 exp8(Float8 x) {
    Float8 low = splat8(-87.0f), high = splat8(89.0f);
    Int8 zero = x < low;
    x = select8(x > high, high, select8(zero, low, x));
    Float8 magic = splat8(0x1.8p23f); // adding it rounds to a whole number
    Float8 n = (x * 1.44269504088896341f + magic) - magic;
    Float8 r = x - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    Float8 p = splat8(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    Int8 scale = (__builtin_convertvector(n, Int8) + 127) << 23;
    return (Float8)((Int8)(p * (Float8)scale) & ~zero);
}

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

static void widen_row(float *x, const Matrix *w, int row, int col, int n) {
    WITH_DTYPE(w->dtype, D, widen_weights(x, w, D, row, col, n))
}

// One panel of W, from row `first` on: it is widened once and serves all T rows of x.
static void matmul_panel(float *y, const float *x, const Matrix *w, int T, int first) {
    float panel[W_ROWS * K_BLOCK];
    int n = w->rows, k = w->cols;
    int rows = n - first < W_ROWS ? n - first : W_ROWS;
    for (int t = 0; t < T; t++) memset(y + (size_t)t * (size_t)n + first, 0, (size_t)rows * sizeof *y);
    for (int l = 0; l < k; l += K_BLOCK) {
        int width = k - l < K_BLOCK ? k - l : K_BLOCK, whole = width / LANES * LANES;
        for (int i = 0; i < rows; i++) widen_row(panel + i * K_BLOCK, w, first + i, l, width);
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
    for (int panel = (int)begin; panel < (int)end; panel++) matmul_panel(p->y, p->x, &p->w, p->T, panel * W_ROWS);
}

// Rows of prompts.
static void matmul(float *y, const float *x, const Matrix *w, int T) {
    Product p = {y, x, *w, T};
    int64_t blocks = (w->rows + W_ROWS - 1) / W_ROWS;
    parallel_for(blocks, part_of(blocks, (int64_t)T * W_ROWS * w->cols), matmul_part, &p);
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
    Product p = {y, x, *w, T};
    int64_t rows = T == 1 ? 4 : STEP_W_ROWS, blocks = (w->rows + rows - 1) / rows;
    parallel_for(blocks, part_of(blocks, T * rows * w->cols), T == 1 ? matvec_part : step_part, &p);
}

static void widen(float *x, const void *row, DType dtype, int n) {
    if (!is_code(dtype)) widen_row(x, &(Matrix){.data = row, .dtype = dtype, .cols = n}, 0, 0, n);
}

// ---- element by element ---------------------------------------------------------------------------------------------

static void rmsnorm(float *y, const float *x, const float *weight, float eps, int T, int n) {
    for (int t = 0; t < T; t++, x += n, y += n) {
        Float8 squares = splat8(0);
        int i = 0;
        for (; i + LANES <= n; i += LANES) squares += load8(x + i) * load8(x + i);
        float sum = sum8(squares);
        for (; i < n; i++) sum += x[i] * x[i];
        float scale = 1.0f / sqrtf(sum / (float)n + eps);
        for (i = 0; i < n; i++) y[i] = weight[i] * (x[i] * scale);
    }
}

static void rope(float *x, const float *cos, const float *sin, int T, int n_heads, int head_dim) {
    int half = head_dim / 2;
    for (int t = 0; t < T; t++, cos += half, sin += half)
        for (int h = 0; h < n_heads; h++, x += head_dim)
            for (int i = 0; i < half; i++) {
                float a = x[i], b = x[i + half];
                x[i] = a * cos[i] - b * sin[i];
                x[i + half] = b * cos[i] + a * sin[i];
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

// out[R][n] += p[R][KV_TILE] · v[count][n], for C vectors of columns.
INLINE void accumulate_tile(float *out, const float *p, const float *v, int count, int n, int R, int C) {
    Float8 sum[4][2];
    for (int i = 0; i < R; i++)
        for (int c = 0; c < C; c++) sum[i][c] = load8(out + i * n + c * LANES);
    for (int j = 0; j < count; j++, v += n)
        for (int i = 0; i < R; i++)
            for (int c = 0; c < C; c++) sum[i][c] += splat8(p[i * KV_TILE + j]) * load8(v + c * LANES);
    for (int i = 0; i < R; i++)
        for (int c = 0; c < C; c++) store8(out + i * n + c * LANES, sum[i][c]);
}

// out[R][n] += p[R][KV_TILE] · v[count][n] for R = 4 or 1 rows.
INLINE void accumulate_rows(float *out, const float *p, const float *v, int count, int n, int R) {
    int c = 0;
    if (R == 4)
        for (; c + 2 * LANES <= n; c += 2 * LANES) accumulate_tile(out + c, p, v + c, count, n, 4, 2);
    else
        for (; c + LANES <= n; c += LANES) accumulate_tile(out + c, p, v + c, count, n, 1, 1);
    for (int r = 0; r < R; r++) // columns left over
        for (int j = 0; j < count; j++)
            for (int l = c; l < n; l++) out[r * n + l] += p[r * KV_TILE + j] * v[j * n + l];
}

// out[rows][n] += p[rows][KV_TILE] · v[n], of v as many positions as the row attends to, visible[rows], ascending: what
// comes after it is not multiplied by zero but left alone, for it may be infinite.
static void accumulate(float *out, const float *p, const float *v, int rows, const int *visible, int n) {
    for (int i = 0; i < rows;) {
        int together = rows - i >= 4 ? 4 : 1, count = visible[i];
        if (together == 4) accumulate_rows(out + i * n, p + i * KV_TILE, v, count, n, 4);
        for (int end = i + together; i < end; i++) {
            int from = together == 4 ? count : 0;
            if (visible[i] > from)
                accumulate_rows(out + i * n, p + i * KV_TILE + from, v + from * n, visible[i] - from, n, 1);
        }
    }
}

// One row of scores [KV_TILE], of which the first `visible` count: to exp(score - max), zero beyond; keeps the running
// maximum and sum, and rescales what was accumulated under an older maximum.
static void softmax_step(float *score, int visible, float *max, float *sum, float *out, int n) {
    float new_max = *max;
    for (int j = 0; j < visible; j++) new_max = score[j] > new_max ? score[j] : new_max;
    for (int j = visible; j < KV_TILE; j++) score[j] = -INFINITY;
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

// Rows [first, first+rows) of one K/V head's queries, numbered token × group + head of the group. k and v: the head's
// first page, page_stride elements before the next.
static void attention_task(float *out, const float *q, const float *k, const float *v, const int *pages,
                           size_t page_stride, int first, int rows, int pos, int n_heads, int group, int head_dim) {
    float queries[Q_ROWS * MAX_HEAD_DIM], result[Q_ROWS * MAX_HEAD_DIM], score[Q_ROWS * KV_TILE], max[Q_ROWS],
        sum[Q_ROWS];
    int visible[Q_ROWS]; // positions of a tile that a row attends to
    float scale = 1.0f / sqrtf((float)head_dim);
    int whole = head_dim / LANES * LANES;
    for (int r = 0; r < rows; r++) {
        int token = (first + r) / group, head = (first + r) % group;
        const float *from = q + ((size_t)token * (size_t)n_heads + (size_t)head) * (size_t)head_dim;
        for (int i = 0; i < head_dim; i++) queries[r * head_dim + i] = from[i] * scale;
        max[r] = -INFINITY;
        sum[r] = 0;
    }
    memset(result, 0, (size_t)(rows * head_dim) * sizeof *result);
    int end = pos + (first + rows - 1) / group + 1; // positions that the last row attends to
    for (int j = 0; j < end; j += KV_TILE) {
        int count = end - j < KV_TILE ? end - j : KV_TILE;
        size_t page = (size_t)pages[j / KV_TILE] * page_stride;
        const float *kj = k + page, *vj = v + page;
        memset(score, 0, sizeof score);
        dot_block(score, KV_TILE, 1, queries, (size_t)head_dim, rows, kj, (size_t)head_dim, count, whole);
        for (int r = 0; r < rows; r++) {
            for (int i = whole; i < head_dim; i++)
                for (int c = 0; c < count; c++)
                    score[r * KV_TILE + c] += queries[r * head_dim + i] * kj[c * head_dim + i];
            int sees = pos + (first + r) / group + 1 - j; // the causal mask
            visible[r] = sees < 0 ? 0 : sees > count ? count : sees;
            if (visible[r] > 0)
                softmax_step(score + r * KV_TILE, visible[r], max + r, sum + r, result + r * head_dim, head_dim);
        }
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
    const float *q, *k, *v;
    const int *pages;
    int T, pos, n_heads, n_kv_heads, head_dim;
} Attention;

// Blocks of Q_ROWS rows of one K/V head, the longest first.
static void attention_part(void *whole, int64_t begin, int64_t end) {
    const Attention *a = whole;
    int group = a->n_heads / a->n_kv_heads, rows = a->T * group, blocks = (rows + Q_ROWS - 1) / Q_ROWS;
    for (int64_t i = begin; i < end; i++) {
        int task = blocks * a->n_kv_heads - 1 - (int)i, kv_head = task % a->n_kv_heads,
            first = task / a->n_kv_heads * Q_ROWS;
        size_t at = (size_t)kv_head * KV_PAGE * (size_t)a->head_dim, head = (size_t)(kv_head * group * a->head_dim);
        attention_task(a->out + head, a->q + head, a->k + at, a->v + at, a->pages,
                       kv_page_elements(a->n_kv_heads, a->head_dim), first,
                       rows - first < Q_ROWS ? rows - first : Q_ROWS, a->pos, a->n_heads, group, a->head_dim);
    }
}

static void attention(float *out, const float *q, const float *k, const float *v, const int *pages, int T, int pos,
                      int n_heads, int n_kv_heads, int head_dim) {
    Attention a = {out, q, k, v, pages, T, pos, n_heads, n_kv_heads, head_dim};
    int64_t tasks = (int64_t)(T * (n_heads / n_kv_heads) + Q_ROWS - 1) / Q_ROWS * n_kv_heads;
    bool alone = (int64_t)T * (pos + T) * n_heads * head_dim <= ALONE;
    parallel_for(tasks, alone ? tasks : 1, attention_part, &a);
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

const Ops OPS_TABLE = {OPS_NAME, matmul, matmul_step, widen, rmsnorm, rope, attention, swiglu, read_all, multiply_add};
