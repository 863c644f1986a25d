// Rounding with error feedback against GPTQ as it was published, in float64 with the inverse of H; its error beside
// that of rounding to the nearest; the same bits for any number of threads and any rows beside a row.
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "../model/gptq.h"
#include "../model/threads.h"
#include "check.h"

static uint64_t state = 1;

static double normal(void) {
    double sum = 0;
    for (int i = 0; i < 12; i++) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        sum += (double)(state >> 11) * 0x1p-53;
    }
    return sum - 6;
}

static void *need(size_t bytes) {
    void *p = calloc(bytes + 1, 1);
    if (!p) abort();
    return p;
}

static const QuantType types[] = {{DTYPE_F8_E4M3, 0}, {DTYPE_I8, 0},  {DTYPE_I8, 32}, {DTYPE_I8, 64}, {DTYPE_I8, 128},
                                  {DTYPE_U8, 0},      {DTYPE_U8, 32}, {DTYPE_U8, 64}, {DTYPE_U8, 128}};
enum { N_TYPES = sizeof types / sizeof *types };

// Inputs [n][cols] of a few directions and some noise, their columns of different sizes, as activations have them.
static float *make_inputs(int n, int cols) {
    float *x = need((size_t)n * (size_t)cols * sizeof *x);
    int directions = cols / 4 + 1;
    float *mix = need((size_t)directions * (size_t)cols * sizeof *mix), *size = need((size_t)cols * sizeof *size);
    for (int i = 0; i < directions * cols; i++) mix[i] = (float)normal();
    for (int i = 0; i < cols; i++) size[i] = (float)exp(normal());
    for (int t = 0; t < n; t++)
        for (int d = 0; d <= directions; d++) {
            float by = (float)normal();
            for (int i = 0; i < cols; i++)
                x[t * cols + i] += size[i] * (d < directions ? by * mix[d * cols + i] : 0.5f * (float)normal());
        }
    free(mix);
    free(size);
    return x;
}

static float *make_weights(int rows, int cols) {
    float *w = need((size_t)rows * (size_t)cols * sizeof *w);
    for (int i = 0; i < rows * cols; i++) w[i] = (float)(0.02 * normal());
    return w;
}

// XᵀX in float64, all of it.
static double *gram_by_definition(const float *x, int n, int cols) {
    double *h = need((size_t)cols * (size_t)cols * sizeof *h);
    for (int t = 0; t < n; t++)
        for (int i = 0; i < cols; i++)
            for (int j = 0; j < cols; j++) h[i * cols + j] += (double)x[t * cols + i] * (double)x[t * cols + j];
    return h;
}

typedef struct {
    int rows, cols;
    QuantType type;
    uint8_t *codes;
    char *scales;
} Result;

static Result result_of(QuantType type, int rows, int cols) {
    Result r = {rows, cols, type, need((size_t)rows * (size_t)cols), need((size_t)rows * (size_t)cols * 4)};
    return r;
}

static void result_free(Result *r) {
    free(r->codes);
    free(r->scales);
}

static size_t code_bytes(const Result *r) {
    return (size_t)r->cols / (r->type.dtype == DTYPE_U8 ? 2 : 1);
}

static size_t scale_bytes(const Result *r) {
    return (size_t)quant_groups(r->type.group, r->cols) * (size_t)dtype_bytes[quant_scale_dtype(r->type)];
}

// tr(E H Eᵀ): the squared error of the products.
static double weighted_error(const Result *r, const float *w, const double *h) {
    Matrix m = {.data = r->codes,
                .scale = r->scales,
                .dtype = r->type.dtype,
                .scale_dtype = quant_scale_dtype(r->type),
                .rows = r->rows,
                .cols = r->cols,
                .group = r->type.group ? r->type.group : WHOLE_ROW};
    float *row = need((size_t)r->cols * sizeof *row);
    double sum = 0;
    for (int k = 0; k < r->rows; k++) {
        quant_decode_row(row, &m, k);
        for (int i = 0; i < r->cols; i++) row[i] = w[k * r->cols + i] - row[i];
        for (int i = 0; i < r->cols; i++)
            for (int j = 0; j < r->cols; j++) sum += (double)row[i] * h[i * r->cols + j] * (double)row[j];
    }
    free(row);
    return sum;
}

static void round_to_nearest(Result *r, const float *w) {
    float *scratch = need(((size_t)r->cols + 8) * sizeof *scratch);
    for (int k = 0; k < r->rows; k++)
        quant_encode_row(r->type, w + k * r->cols, r->cols, NULL, r->codes + (size_t)k * code_bytes(r),
                         r->scales + (size_t)k * scale_bytes(r), scratch);
    free(scratch);
}

static Feedback feedback_of(const float *x, int n, int cols) {
    Feedback f;
    Error err = {""};
    float *h = need((size_t)cols * (size_t)cols * sizeof *h);
    for (int t = 0; t < n; t += 100) gram_add(h, cols, x + t * cols, n - t < 100 ? n - t : 100); // in parts
    if (!feedback_init(&f, h, cols, NULL, &err)) test_fail("%s", err.text);
    return f;
}

static void feedback_free(Feedback *f) {
    free(f->u);
    free(f->importance);
}

// at_once: rows.
static void round_with_feedback(Result *r, const float *w, const Feedback *f, int at_once) {
    float *scratch = need(feedback_scratch(r->cols) * sizeof *scratch);
    double errors[GPTQ_ROWS];
    for (int k = 0; k < r->rows; k += at_once) {
        int n = r->rows - k < at_once ? r->rows - k : at_once;
        feedback_round(f, r->type, w + k * r->cols, n, r->codes + (size_t)k * code_bytes(r),
                       r->scales + (size_t)k * scale_bytes(r), errors, scratch);
    }
    free(scratch);
}

// ---- XᵀX ------------------------------------------------------------------------------------------------------------

static void test_gram(void) {
    static const int sizes[][2] = {{1, 1}, {3, 7}, {300, 64}, {17, 65}, {600, 200}};
    for (size_t k = 0; k < sizeof sizes / sizeof *sizes; k++) {
        int n = sizes[k][0], cols = sizes[k][1];
        float *x = make_inputs(n, cols), *h = need((size_t)cols * (size_t)cols * sizeof *h);
        double *expected = gram_by_definition(x, n, cols);
        gram_add(h, cols, x, n);
        gram_add(h, cols, x, n);
        for (int i = 0; i < cols; i++)
            for (int j = i; j < cols; j++) {
                double size = sqrt(expected[i * cols + i] * expected[j * cols + j]);
                if (fabs((double)h[i * cols + j] - 2 * expected[i * cols + j]) > 1e-5 * size)
                    test_fail("%d x %d: [%d][%d] is %g, expected %g", n, cols, i, j, (double)h[i * cols + j],
                              2 * expected[i * cols + j]);
            }
        free(x);
        free(h);
        free(expected);
    }
    test_end("test_gram");
}

// ---- GPTQ as published ----------------------------------------------------------------------------------------------

// The upper triangular factor C of H⁻¹ = Cᵀ C, damped; by Gauss and Jordan, and Cholesky.
static double *inverse_factor(const double *h, int n) {
    double *a = need((size_t)n * (size_t)n * sizeof *a), *b = need((size_t)n * (size_t)n * sizeof *b), mean = 0;
    memcpy(a, h, (size_t)n * (size_t)n * sizeof *a);
    for (int i = 0; i < n; i++) mean += h[i * n + i] / n;
    for (int i = 0; i < n; i++) a[i * n + i] += 0.01 * mean, b[i * n + i] = 1;
    for (int p = 0; p < n; p++) {
        double pivot = a[p * n + p];
        for (int j = 0; j < n; j++) a[p * n + j] /= pivot, b[p * n + j] /= pivot;
        for (int i = 0; i < n; i++) {
            double by = a[i * n + p];
            for (int j = 0; i != p && j < n; j++) a[i * n + j] -= by * a[p * n + j], b[i * n + j] -= by * b[p * n + j];
        }
    }
    memset(a, 0, (size_t)n * (size_t)n * sizeof *a);
    for (int i = 0; i < n; i++)
        for (int j = i; j < n; j++) {
            double sum = b[i * n + j];
            for (int k = 0; k < i; k++) sum -= a[k * n + i] * a[k * n + j];
            a[i * n + j] = i == j ? sqrt(sum) : sum / a[i * n + i];
        }
    free(b);
    return a;
}

static double nearest(DType dtype, double v) {
    double least = dtype == DTYPE_U8 ? -8 : -127, most = dtype == DTYPE_U8 ? 7 : 127;
    double q = nearbyint(v);
    return q < least ? least : q > most ? most : q;
}

// Of int8 and int4. After each column the rest of the row makes up for its error.
static void round_as_published(Result *r, const float *w, const double *h) {
    int n = r->cols, width = r->type.group ? r->type.group : n;
    double *c = inverse_factor(h, n), *row = need((size_t)n * sizeof *row), mean = 0;
    float *x = need((size_t)n * sizeof *x), *scratch = need(((size_t)n + 8) * sizeof *scratch);
    float *importance = need(((size_t)n + 8) * sizeof *importance);
    uint8_t *codes = need((size_t)n);
    for (int i = 0; i < n; i++) mean += h[i * n + i] / n;
    for (int i = 0; i < n; i++) importance[i] = (float)(h[i * n + i] / mean + 0.01);
    for (int k = 0; k < r->rows; k++) {
        for (int i = 0; i < n; i++) row[i] = (double)w[k * n + i];
        double scale = 0;
        for (int j = 0; j < n; j++) {
            if (j % width == 0) {
                int have = n - j < width ? n - j : width;
                char *to = r->scales + (size_t)k * scale_bytes(r) +
                           (size_t)(j / width) * (size_t)dtype_bytes[quant_scale_dtype(r->type)];
                for (int i = 0; i < have; i++) x[i] = (float)row[j + i];
                quant_encode_row(r->type, x, have, importance + j, codes, to, scratch);
                scale = (double)quant_number(to, quant_scale_dtype(r->type), 0);
            }
            double q = nearest(r->type.dtype, row[j] / scale), e = (row[j] - q * scale) / c[j * n + j];
            for (int i = j; i < n; i++) row[i] -= e * c[j * n + i];
            if (r->type.dtype == DTYPE_U8)
                r->codes[(size_t)k * code_bytes(r) + (size_t)j / 2] |= (uint8_t)((int)(q + 8) << j % 2 * 4);
            else
                r->codes[(size_t)k * code_bytes(r) + (size_t)j] = (uint8_t)(int8_t)q;
        }
    }
    free(c);
    free(row);
    free(x);
    free(scratch);
    free(importance);
    free(codes);
}

static void test_as_published(void) {
    enum { ROWS = 70, COLS = 304, N = 500 }; // blocks, and a short last one, which has a short last group
    float *x = make_inputs(N, COLS), *w = make_weights(ROWS, COLS);
    double *h = gram_by_definition(x, N, COLS);
    Feedback f = feedback_of(x, N, COLS);
    for (int t = 1; t < N_TYPES; t++) {
        Result ours = result_of(types[t], ROWS, COLS), theirs = result_of(types[t], ROWS, COLS);
        round_with_feedback(&ours, w, &f, GPTQ_ROWS);
        round_as_published(&theirs, w, h);
        int differ = 0, bytes = (int)code_bytes(&ours) * ROWS;
        for (int i = 0; i < bytes; i++) differ += ours.codes[i] != theirs.codes[i];
        double a = weighted_error(&ours, w, h), b = weighted_error(&theirs, w, h);
        printf("# type %d: %d of %d bytes of codes differ, error %.6g, as published %.6g\n", t, differ, bytes, a, b);
        // In float32 a weight between two codes, or a scale beside another that is as good, may become the other one,
        // and what comes after it in the row differs, too.
        if (differ > bytes / 20) test_fail("type %d: %d of %d bytes of codes differ", t, differ, bytes);
        if (!(fabs(a / b - 1) < 0.03)) test_fail("type %d: error %g, as published %g", t, a, b);
        result_free(&ours);
        result_free(&theirs);
    }
    free(x);
    free(w);
    free(h);
    feedback_free(&f);
    test_end("test_as_published");
}

// ---- what it is for -------------------------------------------------------------------------------------------------

static void test_error_is_less_than_of_the_nearest(void) {
    static const int sizes[][3] = {{32, 64, 400}, {9, 176, 1000}, {130, 320, 200}, {64, 128, 20}}; // rows, cols, inputs
    for (size_t k = 0; k < sizeof sizes / sizeof *sizes; k++) {
        int rows = sizes[k][0], cols = sizes[k][1], n = sizes[k][2];
        float *x = make_inputs(n, cols), *w = make_weights(rows, cols);
        double *h = gram_by_definition(x, n, cols);
        Feedback f = feedback_of(x, n, cols);
        for (int t = 0; t < N_TYPES; t++) {
            Result with = result_of(types[t], rows, cols), without = result_of(types[t], rows, cols);
            round_with_feedback(&with, w, &f, GPTQ_ROWS);
            round_to_nearest(&without, w);
            double a = weighted_error(&with, w, h), b = weighted_error(&without, w, h);
            if (!(a < b)) test_fail("%d x %d, type %d: error %g, of the nearest %g", rows, cols, t, a, b);
            if (types[t].dtype == DTYPE_U8 && !(a < 0.7 * b))
                test_fail("%d x %d, int4: error %g, of the nearest %g, expected 0.7 of it", rows, cols, a, b);
            result_free(&with);
            result_free(&without);
        }
        free(x);
        free(w);
        free(h);
        feedback_free(&f);
    }
    test_end("test_error_is_less_than_of_the_nearest");
}

// Columns that were never used, all or some: they are rounded by themselves, and nothing is NaN.
// Rows of zeros stay zeros.
static void test_unused_columns(void) {
    enum { ROWS = 5, COLS = 160, N = 50 };
    for (int used = 0; used <= 40; used += 40) {
        float *x = make_inputs(N, COLS), *w = make_weights(ROWS, COLS);
        double identity[COLS * COLS] = {0};
        for (int i = 0; i < N * COLS; i++) x[i] *= (float)(i % COLS < used);
        for (int i = used; i < COLS; i++) identity[i * COLS + i] = 1;
        memset(w + 2 * COLS, 0, COLS * sizeof *w);
        Feedback f = feedback_of(x, N, COLS);
        for (int t = 0; t < N_TYPES; t++) {
            Result with = result_of(types[t], ROWS, COLS), without = result_of(types[t], ROWS, COLS);
            round_with_feedback(&with, w, &f, 3);
            round_to_nearest(&without, w);
            double a = weighted_error(&with, w, identity), b = weighted_error(&without, w, identity);
            // (With columns that are used they share a scale, in which they count as much as a hundredth of the mean.)
            if (!(a < (used ? 10 : 1.05) * b)) test_fail("type %d, %d columns used: error %g, %g", t, used, a, b);
            Matrix m = {.data = with.codes, .scale = with.scales, .dtype = types[t].dtype, .rows = ROWS, .cols = COLS};
            m.scale_dtype = quant_scale_dtype(types[t]);
            m.group = types[t].group ? types[t].group : WHOLE_ROW;
            float row[COLS];
            quant_decode_row(row, &m, 2);
            for (int i = 0; i < COLS; i++) CHECK(row[i] == 0);
            result_free(&with);
            result_free(&without);
        }
        free(x);
        free(w);
        feedback_free(&f);
    }
    test_end("test_unused_columns");
}

static void test_same_bits(void) {
    enum { ROWS = 100, COLS = 432, N = 300 };
    static const int threads[] = {1, 2, 5}, at_once[] = {64, 1, 7};
    float *x = make_inputs(N, COLS), *w = make_weights(ROWS, COLS);
    Feedback f[3];
    for (int k = 0; k < 3; k++) {
        threads_set(threads[k]);
        f[k] = feedback_of(x, N, COLS);
        CHECK(memcmp(f[k].importance, f[0].importance, COLS * sizeof(float)) == 0);
        for (int i = 0; i < COLS; i++)
            CHECK(memcmp(f[k].u + i * COLS + i + 1, f[0].u + i * COLS + i + 1,
                         (size_t)(COLS - 1 - i) * sizeof(float)) == 0);
    }
    for (int t = 0; t < N_TYPES; t++) {
        Result r[3];
        for (int k = 0; k < 3; k++) {
            r[k] = result_of(types[t], ROWS, COLS);
            round_with_feedback(&r[k], w, &f[k], at_once[k]);
            CHECK(memcmp(r[k].codes, r[0].codes, code_bytes(&r[0]) * ROWS) == 0);
            CHECK(memcmp(r[k].scales, r[0].scales, scale_bytes(&r[0]) * ROWS) == 0);
        }
        for (int k = 0; k < 3; k++) result_free(&r[k]);
    }
    for (int k = 0; k < 3; k++) feedback_free(&f[k]);
    threads_set(0);
    free(x);
    free(w);
    test_end("test_same_bits");
}

static void test_refusals(void) {
    Error err = {""};
    Feedback f;
    float *h = need(16 * sizeof *h);
    volatile sig_atomic_t interrupted = 1;
    h[5] = INFINITY;
    CHECK(!feedback_init(&f, h, 4, NULL, &err) && strcmp(err.text, "calibration: the activations are not finite") == 0);
    free(f.importance);
    h[5] = 1;
    err = (Error){""};
    CHECK(!feedback_init(&f, h, 4, &interrupted, &err) && is_interrupt(&err));
    free(f.importance);
    free(h);
    test_end("test_refusals");
}

int main(void) {
    test_gram();
    test_as_published();
    test_error_is_less_than_of_the_nearest();
    test_unused_columns();
    test_same_bits();
    test_refusals();
    return tests_summary();
}
