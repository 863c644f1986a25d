// What the tests of engine cpu's operations share: random numbers and weights, plain float64 products to compare with,
// and bounds. Outputs are poisoned with NaN first. No tolerance is tuned: each is what rounding can do, counted in
// units of 2^-24 (half an ulp of float32).
#ifndef OPS_CHECK_H
#define OPS_CHECK_H

#include <math.h>

#include "../model/cpu/ops.h"
#include "../model/quant.h"
#include "../model/threads.h"
#include "check.h"

#define SHARED __attribute__((unused)) static

#define UNIT 0x1p-24 // the largest relative error of one float32 rounding
#define LENGTH(array) ((int)(sizeof(array) / sizeof *(array)))

enum { GUARD = 16 }; // poisoned floats after each output, to see a write past its end

// ---- what the tests share -------------------------------------------------------------------------------------------

static uint64_t random_state = 1;

SHARED uint32_t random_bits(void) { // PCG's multiplier; the high half is random enough for test data
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(random_state >> 32);
}

SHARED float random_float(float range) { // in ±range
    return ((float)random_bits() * 0x1p-31f - 1.0f) * range;
}

SHARED float *random_floats(size_t n, float range) {
    float *x = malloc(n * sizeof *x);
    for (size_t i = 0; i < n; i++) x[i] = random_float(range);
    return x;
}

SHARED float *poisoned(size_t n) {
    float *x = malloc((n + GUARD) * sizeof *x);
    for (size_t i = 0; i < n + GUARD; i++) x[i] = NAN;
    return x;
}

SHARED bool guard_is_whole(const float *x, size_t n) {
    for (size_t i = n; i < n + GUARD; i++)
        if (!isnan(x[i])) return false;
    return true;
}

static double worst; // the largest error of the test at hand as a fraction of its bound

SHARED bool within(double got, double want, double bound) {
    if (isnan(want)) return isnan(got);
    if (isinf(want) || got == want) return got == want;
    double error = fabs(got - want);
    if (!(error <= bound)) return false;
    if (error / bound > worst) worst = error / bound;
    return true;
}

SHARED void end(const char *name, const Ops *ops) {
    char full[160];
    snprintf(full, sizeof full, "%s (%s)", name, ops->name);
    bool failed = test_failure[0];
    test_end(full);
    if (worst > 0 && !failed && test_wanted(full)) printf("   largest error: %.3f of its bound\n", worst);
    worst = 0;
}

SHARED double f16_value(uint16_t h) {
    int exponent = h >> 10 & 31, fraction = h & 1023;
    double v = exponent == 31  ? fraction ? NAN : INFINITY
               : exponent == 0 ? ldexp(fraction, -24)
                               : ldexp(1024 + fraction, exponent - 25);
    return h >> 15 ? -v : v;
}

SHARED double bf16_value(uint16_t h) {
    int exponent = h >> 7 & 255, fraction = h & 127;
    double v = exponent == 255 ? fraction ? NAN : INFINITY
               : exponent == 0 ? ldexp(fraction, -133)
                               : ldexp(128 + fraction, exponent - 134);
    return h >> 15 ? -v : v;
}

SHARED double weight_value(const void *w, DType dtype, size_t i) {
    return dtype == DTYPE_F32    ? (double)((const float *)w)[i]
           : dtype == DTYPE_BF16 ? bf16_value(((const uint16_t *)w)[i])
                                 : f16_value(((const uint16_t *)w)[i]);
}

// Of magnitudes from nothing to 16, subnormals of f16 among them.
SHARED void *random_weights(DType dtype, size_t n) {
    if (dtype == DTYPE_F32) return random_floats(n, 2);
    uint16_t *w = malloc(n * sizeof *w);
    for (size_t i = 0; i < n; i++) {
        uint32_t r = random_bits(), sign = r & 0x8000;
        if (dtype == DTYPE_F16) w[i] = (uint16_t)(sign | (r >> 16) % 19 << 10 | (r & 1023));
        if (dtype == DTYPE_BF16) w[i] = (uint16_t)(sign | (110 + (r >> 16) % 21) << 7 | (r & 127));
    }
    return w;
}

// ---- products -------------------------------------------------------------------------------------------------------

SHARED const int token_counts[] = {1, 2, 3, 4, 5, 7, 17, 65};

typedef void Matmul(float *y, const float *x, const Matrix *w, int T);

// The weights of row j, by this file's own reading of numbers.
SHARED void matrix_row(double *row, const Matrix *m, int j) {
    if (matrix_is_quantised(m)) {
        float *decoded = malloc((size_t)m->cols * sizeof *decoded);
        quant_decode_row(decoded, m, j);
        for (int l = 0; l < m->cols; l++) row[l] = (double)decoded[l];
        free(decoded);
        return;
    }
    for (int l = 0; l < m->cols; l++) row[l] = weight_value(m->data, m->dtype, (size_t)j * (size_t)m->cols + (size_t)l);
}

// reference: a matrix of the same weights, of which the sums are expected.
SHARED void check_sums(Matmul *matmul, int T, const float *x, const Matrix *matrix, const Matrix *reference) {
    int n = matrix->rows, k = matrix->cols;
    DType dtype = matrix->dtype;
    float *y = poisoned((size_t)T * (size_t)n);
    matmul(y, x, matrix, T);
    double *row = malloc((size_t)k * sizeof *row);
    for (int j = 0; j < n; j++) {
        matrix_row(row, reference, j);
        for (int t = 0; t < T; t++) {
            double sum = 0, magnitude = 0;
            for (int l = 0; l < k; l++) {
                double product = (double)x[t * k + l] * row[l];
                sum += product;
                magnitude += fabs(product);
            }
            // k products and k-1 sums, in any order, each rounded once: Higham's bound on a dot product.
            double bound = (k + 1) * UNIT * magnitude, got = (double)y[t * n + j];
            if (!within(got, sum, bound))
                test_fail("%s T %d n %d k %d: y[%d][%d] is %.9g, expected %.9g ± %.2g", dtype_names[dtype], T, n, k, t,
                          j, got, sum, bound);
        }
    }
    free(row);
    if (!guard_is_whole(y, (size_t)T * (size_t)n)) test_fail("T %d n %d k %d: a write past y", T, n, k);
    free(y);
}

SHARED void check_matrix(Matmul *matmul, int T, const float *x, const Matrix *matrix) {
    check_sums(matmul, T, x, matrix, matrix);
}

SHARED void check_alone_matrix(Matmul *matmul, const char *name, int T, const Matrix *matrix) {
    int n = matrix->rows, k = matrix->cols;
    size_t size = (size_t)T * (size_t)n;
    float *x = random_floats((size_t)(T * k), 1), *together = poisoned(size), *alone = poisoned(size);
    matmul(together, x, matrix, T);
    for (int t = 0; t < T; t++) matmul(alone + t * n, x + t * k, matrix, 1);
    if (memcmp(together, alone, size * sizeof *alone) != 0)
        test_fail("%s %s T %d n %d k %d: other bits than row by row", name, dtype_names[matrix->dtype], T, n, k);
    free(x);
    free(together);
    free(alone);
}

SHARED const QuantType quant_all[] = {{DTYPE_F8_E4M3, 0}, {DTYPE_I8, 0},   {DTYPE_I8, 32},
                                      {DTYPE_I8, 64},     {DTYPE_I8, 128}, {DTYPE_U8, 0},
                                      {DTYPE_U8, 32},     {DTYPE_U8, 64},  {DTYPE_U8, 128}};

// All codes but NaN; scales of either sign, of that dtype.
SHARED Matrix random_codes(QuantType type, DType scales, int n, int k) {
    Matrix m = {
        .dtype = type.dtype, .scale_dtype = scales, .rows = n, .cols = k, .group = type.group ? type.group : WHOLE_ROW};
    size_t bytes = (size_t)n * (size_t)matrix_row_bytes(&m);
    uint8_t *codes = malloc(bytes);
    for (size_t i = 0; i < bytes; i++) {
        codes[i] = (uint8_t)random_bits();
        if (type.dtype == DTYPE_F8_E4M3 && (codes[i] & 127) == 127) codes[i] ^= 1;
    }
    m.data = codes;
    m.scale = random_weights(scales, (size_t)n * (size_t)quant_groups(m.group, k));
    return m;
}

SHARED void free_codes(Matrix *m) {
    free((void *)m->data);
    free((void *)m->scale);
}

#endif
