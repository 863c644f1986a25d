// Every operation of every path of engine cpu against plain float64 code, at awkward sizes (ops_check.h). What bf16 has
// of its own is in test_ops_bf16.c.
#include "ops_check.h"

// ---- widen ----------------------------------------------------------------------------------------------------------

// All 65536 values at once, and each alone: the vector path and the one for what is left over.
static void test_widen_is_exact(const Ops *ops, DType dtype) {
    enum { ALL = 65536 };
    uint16_t *row = malloc(ALL * sizeof *row);
    for (int i = 0; i < ALL; i++) row[i] = (uint16_t)i;
    float *x = poisoned(ALL);
    ops->widen(x, row, dtype, ALL);
    for (int i = 0; i < ALL; i++) {
        float alone[1 + GUARD];
        for (int g = 0; g <= GUARD; g++) alone[g] = NAN;
        ops->widen(alone, row + i, dtype, 1);
        double want = weight_value(row, dtype, (size_t)i);
        bool same = isnan(want) ? isnan(x[i]) && isnan(alone[0])
                                : (double)x[i] == want && (double)alone[0] == want &&
                                      !signbit(x[i]) == !signbit(want) && !signbit(alone[0]) == !signbit(want);
        if (!same)
            test_fail("%s 0x%04X is %a in a row and %a alone, expected %a", dtype_names[dtype], (unsigned)i,
                      (double)x[i], (double)alone[0], want);
    }
    CHECK(guard_is_whole(x, ALL));
    free(row);
    free(x);
    end(dtype == DTYPE_F16 ? "test_widen_all_f16_exactly" : "test_widen_all_bf16_exactly", ops);
}

static void test_widen_any_length(const Ops *ops) {
    for (int dtype = 0; dtype <= DTYPE_F32; dtype++)
        for (int n = 1; n <= 70; n++) {
            void *row = random_weights((DType)dtype, (size_t)n);
            float *x = poisoned((size_t)n);
            ops->widen(x, row, (DType)dtype, n);
            for (int i = 0; i < n; i++) CHECK((double)x[i] == weight_value(row, (DType)dtype, (size_t)i));
            CHECK(guard_is_whole(x, (size_t)n));
            free(row);
            free(x);
        }
    end("test_widen_any_length", ops);
}

// ---- matmul ---------------------------------------------------------------------------------------------------------

static void check_product(Matmul *matmul, DType dtype, int T, int n, int k, const float *x, const void *w) {
    check_matrix(matmul, T, x, &(Matrix){.data = w, .dtype = dtype, .rows = n, .cols = k});
}

static void check_matmul(const Ops *ops, DType dtype, int T, int n, int k, const float *x, const void *w) {
    check_product(ops->matmul, dtype, T, n, k, x, w);
    check_product(ops->matmul_step, dtype, T, n, k, x, w);
}

static void check_alone(Matmul *matmul, const char *name, DType dtype, int T, int n, int k) {
    void *w = random_weights(dtype, (size_t)(n * k));
    check_alone_matrix(matmul, name, T, &(Matrix){.data = w, .dtype = dtype, .rows = n, .cols = k});
    free(w);
}

// Speculation and batches rest on it: a row is what it is alone, to the bit.
static void test_matmul_gives_a_row_the_bits_that_it_has_alone(const Ops *ops) {
    static const int rows[] = {1, 4, 5, 16, 19, 70}, columns[] = {1, 7, 15, 16, 17, 100, 511, 512, 530, 1040, 1055};
    for (int dtype = 0; dtype <= DTYPE_F32; dtype++)
        for (int b = 0; b < LENGTH(rows); b++)
            for (int c = 0; c < LENGTH(columns); c++) {
                for (int T = 1; T <= 20; T += T < 10 ? 1 : 5)
                    check_alone(ops->matmul_step, "matmul_step", (DType)dtype, T, rows[b], columns[c]);
                for (int T = 5; T <= 29; T += 24)
                    check_alone(ops->matmul, "matmul", (DType)dtype, T, rows[b], columns[c]);
            }
    end("test_matmul_gives_a_row_the_bits_that_it_has_alone", ops);
}

static void test_matmul_at_awkward_sizes(const Ops *ops, DType dtype) {
    static const int rows[] = {1, 3, 4, 5, 7, 15, 16, 17, 33, 50};
    static const int columns[] = {1, 2, 7, 8, 9, 15, 16, 17, 31, 64, 100, 511, 512, 513, 530, 1025};
    for (int a = 0; a < LENGTH(token_counts); a++)
        for (int b = 0; b < LENGTH(rows); b++)
            for (int c = 0; c < LENGTH(columns); c++) {
                int T = token_counts[a], n = rows[b], k = columns[c];
                if (T == 65 && n * k > 10000 && (a + b + c) % 4) continue; // a few of the largest are enough
                float *x = random_floats((size_t)(T * k), 1);
                void *w = random_weights(dtype, (size_t)(n * k));
                check_matmul(ops, dtype, T, n, k, x, w);
                free(x);
                free(w);
            }
    char name[64];
    snprintf(name, sizeof name, "test_matmul_%s_at_awkward_sizes", dtype_names[dtype]);
    end(name, ops);
}

// What is not finite shows in the outputs that it belongs to, and in no other.
static void test_matmul_propagates_nan_and_inf(const Ops *ops) {
    static const uint16_t inf[] = {[DTYPE_BF16] = 0x7F80, [DTYPE_F16] = 0x7C00},
                          nan[] = {[DTYPE_BF16] = 0x7FC1, [DTYPE_F16] = 0x7E01};
    enum { N = 21, K = 37 };
    for (int dtype = 0; dtype <= DTYPE_F32; dtype++)
        for (int T = 1; T <= 5; T += 4)
            for (int place = 0; place < K; place++) {
                float *x = random_floats((size_t)T * K, 1);
                void *w = random_weights((DType)dtype, N * K);
                for (int j = 0; j < N; j += 3) { // rows of +inf, -inf and NaN, with a finite one between
                    int at = j * K + place, which = j / 3 % 3;
                    if (dtype == DTYPE_F32)
                        ((float *)w)[at] = which == 0 ? INFINITY : which == 1 ? -INFINITY : NAN;
                    else
                        ((uint16_t *)w)[at] = which == 0   ? inf[dtype]
                                              : which == 1 ? (uint16_t)(inf[dtype] | 0x8000)
                                                           : nan[dtype];
                }
                check_matmul(ops, (DType)dtype, T, N, K, x, w);
                x[(T - 1) * K + place] = INFINITY; // of the last token
                check_matmul(ops, (DType)dtype, T, N, K, x, w);
                x[(T - 1) * K + place] = 0; // 0 × inf is NaN
                check_matmul(ops, (DType)dtype, T, N, K, x, w);
                free(x);
                free(w);
            }
    end("test_matmul_propagates_nan_and_inf", ops);
}

// ---- matmul of quantised weights ------------------------------------------------------------------------------------

static void test_matmul_of_codes_at_awkward_sizes(const Ops *ops) {
    static const int rows[] = {1, 4, 5, 17, 33},
                     columns[] = {2, 14, 16, 30, 32, 34, 64, 100, 128, 130, 512, 530, 688, 1030};
    for (int q = 0; q < LENGTH(quant_all); q++)
        for (int b = 0; b < LENGTH(rows); b++)
            for (int c = 0; c < LENGTH(columns); c++)
                for (int T = 1; T <= 19; T += T < 5 ? 2 : 7) {
                    Matrix m = random_codes(quant_all[q], (DType)((q + b + c) % 3), rows[b], columns[c]);
                    float *x = random_floats((size_t)(T * columns[c]), 1);
                    check_matrix(ops->matmul, T, x, &m);
                    check_matrix(ops->matmul_step, T, x, &m);
                    check_alone_matrix(ops->matmul, "matmul", T, &m);
                    check_alone_matrix(ops->matmul_step, "matmul_step", T, &m);
                    free(x);
                    free_codes(&m);
                }
    end("test_matmul_of_codes_at_awkward_sizes", ops);
}

// More columns than are multiplied at a time.
static void test_matmul_of_codes_of_many_columns(const Ops *ops) {
    for (int q = 0; q < LENGTH(quant_all); q++)
        for (int T = 1; T <= 10; T += 3) {
            Matrix m = random_codes(quant_all[q], (DType)(q % 3), 6, 8258);
            float *x = random_floats((size_t)(T * m.cols), 1);
            check_matrix(ops->matmul_step, T, x, &m);
            check_alone_matrix(ops->matmul_step, "matmul_step", T, &m);
            free(x);
            free_codes(&m);
        }
    end("test_matmul_of_codes_of_many_columns", ops);
}

// A row of x that is 1 in one column gives that column's weights: in every product they are what they decode to.
static void test_matmul_of_codes_has_decoded_weights(const Ops *ops) {
    enum { N = 5, K = 174 }; // two whole groups of 64, and 46 columns; sixteen do not divide them
    static float x[K * K], y[K * N], decoded[K];
    for (int i = 0; i < K; i++) x[i * K + i] = 1;
    for (int q = 0; q < LENGTH(quant_all); q++)
        for (int scales = 0; scales <= DTYPE_F32; scales++) {
            Matrix m = random_codes(quant_all[q], (DType)scales, N, K);
            for (int way = 0; way < 3; way++) {
                if (way == 0) ops->matmul(y, x, &m, K);
                if (way == 1) ops->matmul_step(y, x, &m, K);
                for (int i = 0; i < K && way == 2; i++) ops->matmul_step(y + i * N, x + i * K, &m, 1);
                for (int j = 0; j < N; j++) {
                    quant_decode_row(decoded, &m, j);
                    for (int i = 0; i < K; i++)
                        if (y[i * N + j] != decoded[i])
                            test_fail("%s in groups of %d, scales %s: row %d, column %d is %a, expected %a",
                                      dtype_names[m.dtype], m.group, dtype_names[scales], j, i, (double)y[i * N + j],
                                      (double)decoded[i]);
                }
            }
            free_codes(&m);
        }
    end("test_matmul_of_codes_has_decoded_weights", ops);
}

// ---- rmsnorm --------------------------------------------------------------------------------------------------------

static void test_rmsnorm_at_awkward_sizes(const Ops *ops) {
    static const int sizes[] = {1, 2, 7, 8, 9, 63, 64, 66, 96, 1000, 4099};
    static const float ranges[] = {1e-4f, 1, 1000};
    for (int a = 0; a < LENGTH(token_counts); a++)
        for (int b = 0; b < LENGTH(sizes); b++)
            for (int c = 0; c < LENGTH(ranges); c++) {
                int T = token_counts[a], n = sizes[b];
                float eps = 1e-5f, *x = random_floats((size_t)(T * n), ranges[c]),
                      *weight = random_floats((size_t)n, 2);
                if (T > 1) memset(x, 0, (size_t)n * sizeof *x); // a row of zeros
                float *y = poisoned((size_t)(T * n));
                ops->rmsnorm(y, x, weight, eps, T, n);
                for (int t = 0; t < T; t++) {
                    double squares = 0;
                    for (int i = 0; i < n; i++) squares += (double)x[t * n + i] * (double)x[t * n + i];
                    double scale = 1 / sqrt(squares / n + (double)eps);
                    for (int i = 0; i < n; i++) {
                        double want = (double)weight[i] * (double)x[t * n + i] * scale;
                        // n squares and n-1 sums of one sign; division by n and eps; all that is halved by the root;
                        // then the root, the reciprocal and two products.
                        double bound = ((n + 2) / 2.0 + 4) * UNIT * fabs(want);
                        if (!within((double)y[t * n + i], want, bound))
                            test_fail("T %d n %d: y[%d][%d] is %.9g, expected %.9g", T, n, t, i, (double)y[t * n + i],
                                      want);
                    }
                }
                CHECK(guard_is_whole(y, (size_t)(T * n)));
                free(x);
                free(weight);
                free(y);
            }
    end("test_rmsnorm_at_awkward_sizes", ops);
}

// ---- rope -----------------------------------------------------------------------------------------------------------

static const int head_dims[] = {2, 64, 66, 96, 128, 256};

static void test_rope_rotates_halves(const Ops *ops) {
    static const int head_counts[] = {1, 3, 8};
    for (int a = 0; a < LENGTH(token_counts); a++)
        for (int b = 0; b < LENGTH(head_counts); b++)
            for (int c = 0; c < LENGTH(head_dims); c++) {
                int T = token_counts[a], heads = head_counts[b], head_dim = head_dims[c], half = head_dim / 2;
                size_t n = (size_t)(T * heads * head_dim), angles = (size_t)(T * half);
                float *before = random_floats(n, 3), *x = poisoned(n), *cosine = malloc(angles * sizeof *cosine),
                      *sine = malloc(angles * sizeof *sine);
                double *angle = malloc(angles * sizeof *angle);
                memcpy(x, before, n * sizeof *x);
                for (size_t i = 0; i < angles; i++) {
                    angle[i] = (double)(random_bits() % 131072) * pow(500000, -(double)(i % (size_t)half) / half);
                    cosine[i] = (float)cos(angle[i]);
                    sine[i] = (float)sin(angle[i]);
                }
                ops->rope(x, cosine, sine, T, heads, head_dim);
                for (int t = 0; t < T; t++)
                    for (int h = 0; h < heads; h++)
                        for (int i = 0; i < half; i++) {
                            const float *from = before + (t * heads + h) * head_dim,
                                        *to = x + (t * heads + h) * head_dim;
                            double re = (double)from[i], im = (double)from[i + half];
                            double co = cos(angle[t * half + i]), si = sin(angle[t * half + i]);
                            // A rounded cosine or sine, a product and a sum: three roundings of each term.
                            double re_bound = 3.01 * UNIT * (fabs(re * co) + fabs(im * si));
                            double im_bound = 3.01 * UNIT * (fabs(im * co) + fabs(re * si));
                            if (!within((double)to[i], re * co - im * si, re_bound) ||
                                !within((double)to[i + half], im * co + re * si, im_bound))
                                test_fail("T %d heads %d head_dim %d: pair %d of head %d, token %d is (%g, %g)", T,
                                          heads, head_dim, i, h, t, (double)to[i], (double)to[i + half]);
                        }
                CHECK(guard_is_whole(x, n));
                free(before);
                free(x);
                free(cosine);
                free(sine);
                free(angle);
            }
    end("test_rope_rotates_halves", ops);
}

// ---- swiglu ---------------------------------------------------------------------------------------------------------

static void check_swiglu(const Ops *ops, const float *g, const float *up, int64_t n) {
    // exp8 promises about an ulp, two units; then 1 + e, the quotient and, if up is not one, the product: one each.
    const double roundings = 2 + 3, exact_product = 2 + 2;
    // Past 88, where exp leaves float32, silu(-g) may be 0 at once: it is at most this. (And products down there are
    // subnormal: rounded to 2^-149.)
    const double cut = 88 * exp(-88.0);
    float *y = poisoned((size_t)n);
    memcpy(y, g, (size_t)n * sizeof *y);
    ops->swiglu(y, up, n);
    for (int64_t i = 0; i < n; i++) {
        double x = (double)g[i], want = x / (1 + exp(-x)) * (double)up[i];
        double bound = (up[i] == 1 ? exact_product : roundings) * UNIT * fabs(want) +
                       (x < -88 ? cut * fabs((double)up[i]) : 0) + 0x1p-149 * (1 + fabs((double)up[i]));
        if (x == (double)-INFINITY ? isfinite(y[i]) : !within((double)y[i], want, bound))
            test_fail("n %d: gate %.9g up %.9g gives %.9g, expected %.9g ± %.2g", (int)n, x, (double)up[i],
                      (double)y[i], want, bound);
    }
    CHECK(guard_is_whole(y, (size_t)n));
    free(y);
}

static void test_swiglu_any_length(const Ops *ops) {
    static const int64_t sizes[] = {1, 2, 3, 7, 8, 9, 15, 16, 17, 65, 1000, 65535, 65536, 65537, 100003};
    for (int i = 0; i < LENGTH(sizes); i++) {
        float *g = random_floats((size_t)sizes[i], 12), *up = random_floats((size_t)sizes[i], 3);
        check_swiglu(ops, g, up, sizes[i]);
        free(g);
        free(up);
    }
    end("test_swiglu_any_length", ops);
}

static void test_swiglu_of_extreme_gates(const Ops *ops) {
    static const float extreme[] = {0,     -0.0f, 1e-45f, 1e-30f, 1e-7f, 1,     20,    86.9f, 87,       87.4f, 88,
                                    88.5f, 89,    100,    1000,   1e4f,  1e10f, 1e25f, 3e38f, INFINITY, NAN};
    float g[2 * LENGTH(extreme)], up[2 * LENGTH(extreme)];
    for (int scale = 0; scale < 3; scale++) {
        for (int i = 0; i < LENGTH(g); i++) {
            g[i] = i % 2 ? -extreme[i / 2] : extreme[i / 2];
            up[i] = scale == 0 ? 1 : scale == 1 ? -0.37f : 1e-3f;
        }
        check_swiglu(ops, g, up, LENGTH(g));
        for (int i = 0; i < LENGTH(g); i++) check_swiglu(ops, g + i, up + i, 1);
    }
    end("test_swiglu_of_extreme_gates", ops);
}

// With a negative gate, silu(g) · exp(-g) is near g: the error of exp8 shows undiluted.
static void test_exp_is_accurate(const Ops *ops) {
    enum { STEPS = 1 << 18 };
    float *g = malloc(STEPS * sizeof *g), *up = malloc(STEPS * sizeof *up);
    for (int i = 0; i < STEPS; i++) {
        g[i] = -87.0f * (float)i / STEPS;
        up[i] = 1;
    }
    check_swiglu(ops, g, up, STEPS);
    free(g);
    free(up);
    end("test_exp_is_accurate", ops);
}

// ---- attention ------------------------------------------------------------------------------------------------------

typedef struct {
    int T, pos, n_heads, n_kv_heads, head_dim, max_len;
    float *q, *k, *v; // [T][n_heads][head_dim], [n_kv_heads][max_len][head_dim] twice
} Attention;

static size_t q_size(const Attention *a) {
    return (size_t)a->T * (size_t)a->n_heads * (size_t)a->head_dim;
}

static size_t page_stride(const Attention *a) {
    return 2 * kv_page_elements(a->n_kv_heads, a->head_dim);
}

// The cache is NaN beyond pos + T: nothing there may be touched.
static Attention attention_make(int T, int pos, int n_kv_heads, int group, int head_dim, int spare, float q_range) {
    Attention a = {T, pos, n_kv_heads * group, n_kv_heads, head_dim, pos + T + spare, NULL, NULL, NULL};
    size_t cache = (size_t)n_kv_heads * (size_t)a.max_len * (size_t)head_dim;
    a.q = random_floats(q_size(&a), q_range);
    a.k = random_floats(cache, 1);
    a.v = random_floats(cache, 1);
    for (int h = 0; h < n_kv_heads; h++)
        for (size_t i = (size_t)(pos + T) * (size_t)head_dim; i < (size_t)a.max_len * (size_t)head_dim; i++)
            a.k[(size_t)h * (size_t)a.max_len * (size_t)head_dim + i] =
                a.v[(size_t)h * (size_t)a.max_len * (size_t)head_dim + i] = NAN;
    return a;
}

static void attention_free(Attention *a) {
    free(a->q);
    free(a->k);
    free(a->v);
}

// k or v as the cache has them: in pages, here from the last to the first, each with as much after it that is others'.
// What is nobody's is NaN.
static float *in_pages(const Attention *a, const float *from, int *pages) {
    int n = kv_pages(a->max_len), d = a->head_dim;
    float *to = malloc((size_t)n * page_stride(a) * sizeof *to);
    for (size_t i = 0; i < (size_t)n * page_stride(a); i++) to[i] = NAN;
    for (int i = 0; i < n; i++) pages[i] = n - 1 - i;
    for (int h = 0; h < a->n_kv_heads; h++)
        for (int j = 0; j < a->max_len; j++, from += d)
            memcpy(to + (size_t)pages[j / KV_PAGE] * page_stride(a) + (size_t)((h * KV_PAGE + j % KV_PAGE) * d), from,
                   (size_t)d * sizeof *to);
    return to;
}

static bool of_steps; // whether the order is that of steps or of prompts

static void end_attention(const char *name, const Ops *ops) {
    char full[128];
    snprintf(full, sizeof full, "%s%s", name, of_steps ? "_in_steps" : "");
    end(full, ops);
}

static float *attention_run(const Ops *ops, const Attention *a) {
    int pages[16];
    CHECK(kv_pages(a->max_len) <= LENGTH(pages));
    float *out = poisoned(q_size(a)), *k = in_pages(a, a->k, pages), *v = in_pages(a, a->v, pages);
    (of_steps ? ops->attention_step : ops->attention)(out, a->q, k, v, DTYPE_F32, pages, page_stride(a), a->T, a->pos,
                                                      a->n_heads, a->n_kv_heads, a->head_dim);
    free(k);
    free(v);
    if (!guard_is_whole(out, q_size(a))) test_fail("T %d pos %d: a write past out", a->T, a->pos);
    return out;
}

// One query head of one token, from the definition: softmax(q · kᵀ / √head_dim) · v over the positions up to its own.
static void check_attention_row(const Attention *a, int t, int head, const float *out) {
    int d = a->head_dim, visible = a->pos + t + 1;
    size_t at = (size_t)(head / (a->n_heads / a->n_kv_heads)) * (size_t)a->max_len * (size_t)d;
    const float *q = a->q + ((size_t)t * (size_t)a->n_heads + (size_t)head) * (size_t)d, *k = a->k + at, *v = a->v + at;
    double p[400], max = -INFINITY, min = INFINITY, largest = 0, sum = 0;
    for (int j = 0; j < visible; j++) {
        double dot = 0, magnitude = 0;
        for (int i = 0; i < d; i++) {
            dot += (double)q[i] * (double)k[j * d + i];
            magnitude += fabs((double)q[i] * (double)k[j * d + i]);
        }
        p[j] = dot / sqrt(d);
        max = fmax(max, p[j]);
        min = fmin(min, p[j]);
        largest = fmax(largest, magnitude / sqrt(d));
    }
    for (int j = 0; j < visible; j++) sum += p[j] = exp(p[j] - max);
    // Each weight is wrong by a factor of 1 ± w: its score is a dot product of d terms whose query was scaled (3 more
    // roundings); the difference from the maximum, at most 88 where the weight counts at all, is rounded, once here and
    // once in the rescaling; exp to an ulp or two, here and for each tile of at least 16 positions that raised the
    // maximum.
    double range = fmin(max - min, 88);
    double w = UNIT * ((d + 4) * largest + 2 * range + 4 + 5 * (visible / 16 + 1));
    // Both sums of the quotient have that error and that of adding up `visible` terms.
    double relative = 2 * expm1(w) + (2 * visible + 8) * UNIT;
    for (int i = 0; i < d; i++) {
        double want = 0, magnitude = 0;
        for (int j = 0; j < visible; j++) {
            want += p[j] / sum * (double)v[j * d + i];
            magnitude += p[j] / sum * fabs((double)v[j * d + i]);
        }
        double got = (double)out[((size_t)t * (size_t)a->n_heads + (size_t)head) * (size_t)d + (size_t)i];
        // (e^-87 and less is cut to nothing: 1e-37 of the largest value here)
        if (!within(got, want, relative * magnitude + 1e-37))
            test_fail("T %d pos %d heads %d/%d head_dim %d max_len %d: out[%d][%d][%d] is %.9g, expected %.9g ± %.2g",
                      a->T, a->pos, a->n_heads, a->n_kv_heads, d, a->max_len, t, head, i, got, want,
                      relative * magnitude);
    }
}

static const int offsets[] = {0, 1, 63, 64, 65, 200};

static void check_attention(const Ops *ops, float q_range, int spare) {
    static const struct {
        int group, n_kv_heads;
    } heads[] = {{1, 3}, {3, 2}, {4, 2}, {7, 2}, {32, 1}};
    int turn = 0;
    for (int a = 0; a < LENGTH(token_counts); a++)
        for (int b = 0; b < LENGTH(offsets); b++)
            for (int c = 0; c < LENGTH(head_dims); c++, turn++) {
                // Another grouping each time, and over the rounds every one with every size.
                int g = (turn + turn / LENGTH(heads)) % LENGTH(heads);
                Attention att = attention_make(token_counts[a], offsets[b], heads[g].n_kv_heads, heads[g].group,
                                               head_dims[c], spare, q_range);
                float *out = attention_run(ops, &att);
                for (int t = 0; t < att.T; t++)
                    for (int h = 0; h < att.n_heads; h++)
                        if (att.T * att.n_heads < 400 || (t * att.n_heads + h) % 5 == turn % 5 || t == att.T - 1)
                            check_attention_row(&att, t, h, out);
                for (size_t i = 0; i < q_size(&att); i++)
                    if (!isfinite(out[i])) test_fail("out[%zu] is %f", i, (double)out[i]);
                free(out);
                attention_free(&att);
            }
}

static void test_attention_equals_its_definition(const Ops *ops) {
    check_attention(ops, 1, 0);
    end_attention("test_attention_equals_its_definition", ops);
}

static void test_attention_ignores_the_cache_beyond(const Ops *ops) {
    check_attention(ops, 2, 37);
    end_attention("test_attention_ignores_the_cache_beyond", ops);
}

// Scores of hundreds, whose exp would overflow without the shift by the maximum.
static void test_attention_of_large_scores(const Ops *ops) {
    check_attention(ops, 500, 3);
    end_attention("test_attention_of_large_scores", ops);
}

// V is one from position `first` on and zero before, so the output is the weight of what a token sees from there on.
static void test_attention_is_causal(const Ops *ops) {
    for (int b = 0; b < LENGTH(offsets); b++)
        for (int c = 0; c < LENGTH(head_dims); c++) {
            Attention a = attention_make(11, offsets[b], 2, 3, head_dims[c], 5, 1);
            for (int mark = 0; mark < a.T; mark++) {
                for (int h = 0; h < a.n_kv_heads; h++)
                    for (int j = 0; j < a.pos + a.T; j++)
                        for (int i = 0; i < a.head_dim; i++)
                            a.v[((size_t)h * (size_t)a.max_len + (size_t)j) * (size_t)a.head_dim + (size_t)i] =
                                j >= a.pos + mark;
                float *out = attention_run(ops, &a);
                size_t row = (size_t)(a.n_heads * a.head_dim);
                for (size_t i = 0; i < q_size(&a); i++) {
                    bool sees = (int)(i / row) >= mark;
                    if (sees ? !(out[i] > 0) : out[i] != 0)
                        test_fail("pos %d: token %d gives weight %g to position %d on", a.pos, (int)(i / row),
                                  (double)out[i], mark);
                }
                free(out);
            }
            attention_free(&a);
        }
    end_attention("test_attention_is_causal", ops);
}

// A token is what it is alone, to the bit, whatever comes after it in the call: other tokens, whose keys and values
// need not be finite.
static void test_attention_gives_a_token_the_bits_that_it_has_alone(const Ops *ops) {
    static const int heads[][2] = {{4, 4}, {8, 2}, {9, 3}}, positions[] = {0, 1, 60, 63, 64, 130}, dims[] = {8, 20, 64};
    for (int h = 0; h < LENGTH(heads); h++)
        for (int p = 0; p < LENGTH(positions); p++)
            for (int d = 0; d < LENGTH(dims); d++)
                for (int T = 1; T <= 9; T++) {
                    Attention a =
                        attention_make(T, positions[p], heads[h][1], heads[h][0] / heads[h][1], dims[d], 3, 1);
                    size_t row = (size_t)(a.n_heads * a.head_dim), stream = (size_t)(a.max_len * a.head_dim);
                    float *together = attention_run(ops, &a);
                    for (int bad = 0; bad < 2; bad++) {
                        for (int t = T - 1 - bad; t >= 0; t--) {
                            Attention one = a;
                            one.T = 1;
                            one.pos += t;
                            one.q += (size_t)t * row;
                            float *alone = attention_run(ops, &one);
                            if (memcmp(alone, together + (size_t)t * row, row * sizeof *alone) != 0)
                                test_fail("%d heads of %d, pos %d, token %d of %d%s: other bits than alone", a.n_heads,
                                          a.head_dim, a.pos, t, T, bad ? " before one that is not finite" : "");
                            free(alone);
                        }
                        for (int kv = 0; kv < a.n_kv_heads; kv++) { // of the last token
                            float *k = a.k + (size_t)kv * stream + (size_t)((a.pos + T - 1) * a.head_dim),
                                  *v = a.v + (size_t)kv * stream + (size_t)((a.pos + T - 1) * a.head_dim);
                            for (int i = 0; i < a.head_dim; i++) k[i] = NAN, v[i] = INFINITY;
                        }
                        free(together);
                        together = attention_run(ops, &a);
                    }
                    free(together);
                    attention_free(&a);
                }
    end_attention("test_attention_gives_a_token_the_bits_that_it_has_alone", ops);
}

// ---- threads --------------------------------------------------------------------------------------------------------

// Runs every operation at one size; the results one after another in memory.
static float *run_all(const Ops *ops, size_t *n_floats) {
    random_state = 99;
    enum { T = 65, N = 397, K = 1037, GATES = 100003 }; // each beyond what one thread does alone
    Attention a = attention_make(33, 70, 3, 4, 96, 9, 2);
    *n_floats = 9 * T * N + T * K + 33 * 12 * 96 + GATES;
    float *all = malloc(*n_floats * sizeof *all), *at = all;
    float *x = random_floats(T * K, 1), *gate = random_floats(GATES, 9), *up = random_floats(GATES, 1);
    for (int dtype = 0; dtype <= DTYPE_F32; dtype++) {
        void *w = random_weights((DType)dtype, N * K);
        Matrix matrix = {.data = w, .dtype = (DType)dtype, .rows = N, .cols = K};
        ops->matmul(at, x, &matrix, T);
        at += T * N;
        for (int t = 0; t < T; t++) ops->matmul_step(at + t * N, x + t * K, &matrix, 1);
        at += T * N;
        ops->matmul_step(at, x, &matrix, T);
        at += T * N;
        free(w);
    }
    ops->rmsnorm(at, x, x, 1e-5f, T, K);
    at += T * K;
    float *out = attention_run(ops, &a);
    memcpy(at, out, q_size(&a) * sizeof *out);
    at += q_size(&a);
    ops->swiglu(gate, up, GATES);
    memcpy(at, gate, GATES * sizeof *gate);
    CHECK(at + GATES == all + *n_floats);
    free(x);
    free(gate);
    free(up);
    free(out);
    attention_free(&a);
    return all;
}

static void test_threads_change_no_bit(const Ops *ops) {
    static const int counts[] = {2, 3, 4, 7, 16};
    size_t n;
    threads_set(1);
    float *one = run_all(ops, &n);
    for (int i = 0; i < LENGTH(counts); i++) {
        threads_set(counts[i]);
        float *many = run_all(ops, &n);
        if (memcmp(one, many, n * sizeof *one) != 0) test_fail("%d threads differ from one", counts[i]);
        free(many);
    }
    for (size_t i = 0; i < n; i++) CHECK(isfinite(one[i]));
    threads_set(1);
    free(one);
    end("test_threads_change_no_bit", ops);
}

// ---- what the benchmark measures with -------------------------------------------------------------------------------

static void test_benchmark_loops_do_what_they_say(const Ops *ops) {
    enum { WORDS = 3 << 17, ROUNDS = 1000 }; // 3 MiB
    uint64_t *data = malloc(WORDS * sizeof *data), sum = 0;
    for (int i = 0; i < WORDS; i++) sum += data[i] = (uint64_t)random_bits() << 32 | random_bits();
    CHECK(ops->read_all(data, (int64_t)(WORDS * sizeof *data)) == sum);
    float sink = 0;
    double operations = ops->multiply_add(ROUNDS, &sink);
    CHECK(operations > 0 && fmod(operations, 2.0 * ROUNDS) == 0);
    CHECK(isfinite(sink) && sink > 0); // a decaying sum of what it began with, so it was really computed
    free(data);
    end("test_benchmark_loops_do_what_they_say", ops);
}

// ---- RoPE's frequencies ---------------------------------------------------------------------------------------------

// Against the formulas of the LLaMA 3.1 paper's code in float64, through the tiniest model that starts.
static void test_rope_frequencies(void) {
    static const struct {
        float theta, factor; // factor 0: no scaling
        int head_dim, original;
    } cases[] = {{10000, 0, 64, 0},      {500000, 0, 128, 0},     {500000, 8, 128, 8192},
                 {500000, 32, 64, 8192}, {500000, 32, 128, 8192}, {10000, 4.5f, 96, 1000}};
    int kept = 0, slowed = 0, between = 0;
    for (int c = 0; c < LENGTH(cases); c++) {
        Model m = {.file.fd = -1,
                   .config = {.dim = 2,
                              .hidden_dim = 2,
                              .n_layers = 1,
                              .n_heads = 1,
                              .n_kv_heads = 1,
                              .vocab_size = 2,
                              .max_seq_len = 4,
                              .norm_eps = 1e-5f,
                              .rope_theta = cases[c].theta,
                              .tie_embeddings = true}};
        int d = m.config.head_dim = m.config.q_dim = m.config.kv_dim = cases[c].head_dim;
        m.config.group = 1;
        m.weights.dtype = DTYPE_BF16;
        if (cases[c].factor > 0) {
            m.config.rope_type = ROPE_LLAMA3;
            m.config.rope_factor = cases[c].factor;
            m.config.rope_low_freq_factor = 1;
            m.config.rope_high_freq_factor = 4;
            m.config.rope_original_max_seq_len = (float)cases[c].original;
        }
        Error err = {""};
        if (!model_start(&m, "cpu", PRECISION_F32, 1, 4, &err)) test_fail("%s", err.text);
        for (int i = 0; i < d / 2 && m.rope_freq; i++) {
            double want = pow((double)cases[c].theta, -2.0 * i / d);
            double turns = cases[c].original * want / 6.283185307179586; // in the original context
            if (cases[c].factor > 0 && turns < 1) {
                want /= (double)cases[c].factor;
                slowed++;
            } else if (cases[c].factor > 0 && turns <= 4) {
                double smooth = (turns - 1) / (4 - 1);
                want *= (1 - smooth) / (double)cases[c].factor + smooth;
                between++;
            } else
                kept++;
            // The exponent's rounding moves the power by ln theta = 13 units; the power, the reciprocal, and in the
            // smooth step a dozen roundings, of which those of `turns` weigh up to 4/3 × factor.
            double bound = (13 + 2 + 12 + 4 * 4 / 3.0 * fmax(1, (double)cases[c].factor)) * UNIT * want;
            if (!within((double)m.rope_freq[i], want, bound))
                test_fail("theta %g factor %g head_dim %d: frequency %d is %.9g, expected %.9g", (double)cases[c].theta,
                          (double)cases[c].factor, d, i, (double)m.rope_freq[i], want);
        }
        model_close(&m);
    }
    CHECK(kept > 0 && slowed > 0 && between > 0);
    end("test_rope_frequencies_with_and_without_scaling", &(Ops){.name = "float32"});
}

// Bit for bit what transformers computes, of every type: scripts/gen_vectors.py wrote the file.
static void test_rope_frequencies_are_those_of_transformers(void) {
    static const char *const types[] = {"default", "llama3", "linear"};
    FILE *in = fopen("tests/vectors/rope.tsv", "r");
    char line[4096], type[16];
    int seen[LENGTH(types)] = {0}, compared = 0;
    for (int number = 1; in && fgets(line, sizeof line, in); number++) {
        Config c = {.rope_low_freq_factor = 1, .rope_high_freq_factor = 4};
        int used;
        if (line[0] == '#') continue;
        if (sscanf(line, "%f %d %15s %f %f%n", &c.rope_theta, &c.head_dim, type, &c.rope_factor,
                   &c.rope_original_max_seq_len, &used) != 5 ||
            c.head_dim > MAX_HEAD_DIM) {
            test_fail("line %d is not as expected", number);
            break;
        }
        while ((int)c.rope_type < LENGTH(types) - 1 && strcmp(types[c.rope_type], type) != 0) c.rope_type++;
        seen[c.rope_type]++;
        float freq[MAX_HEAD_DIM / 2];
        rope_frequencies(&c, freq);
        char *at = line + used;
        for (int i = 0; i < c.head_dim / 2; i++, compared++) {
            uint32_t want = (uint32_t)strtoul(at, &at, 16), got;
            memcpy(&got, &freq[i], sizeof got);
            if (got != want) test_fail("line %d: frequency %d has the bits %08x, expected %08x", number, i, got, want);
        }
    }
    if (in) fclose(in);
    for (int i = 0; i < LENGTH(types); i++) CHECK(seen[i] >= 2);
    CHECK(compared > 300);
    end("test_rope_frequencies_are_those_of_transformers", &(Ops){.name = "float32"});
}

// ---- all of it ------------------------------------------------------------------------------------------------------

static void test_table(const Ops *ops) {
    random_state = 1;
    test_widen_is_exact(ops, DTYPE_BF16);
    test_widen_is_exact(ops, DTYPE_F16);
    test_widen_any_length(ops);
    test_matmul_at_awkward_sizes(ops, DTYPE_BF16);
    test_matmul_at_awkward_sizes(ops, DTYPE_F16);
    test_matmul_at_awkward_sizes(ops, DTYPE_F32);
    test_matmul_propagates_nan_and_inf(ops);
    test_matmul_of_codes_at_awkward_sizes(ops);
    test_matmul_of_codes_of_many_columns(ops);
    test_matmul_of_codes_has_decoded_weights(ops);
    test_matmul_gives_a_row_the_bits_that_it_has_alone(ops);
    test_rmsnorm_at_awkward_sizes(ops);
    test_rope_rotates_halves(ops);
    test_swiglu_any_length(ops);
    test_swiglu_of_extreme_gates(ops);
    test_exp_is_accurate(ops);
    for (int i = 0; i < 2; i++) {
        of_steps = i == 1;
        test_attention_equals_its_definition(ops);
        test_attention_ignores_the_cache_beyond(ops);
        test_attention_of_large_scores(ops);
        test_attention_is_causal(ops);
        test_attention_gives_a_token_the_bits_that_it_has_alone(ops);
    }
    test_threads_change_no_bit(ops);
    test_benchmark_loops_do_what_they_say(ops);
}

// What AVX-512 has of its own.
static void test_products(const Ops *ops) {
    random_state = 1;
    for (int dtype = 0; dtype <= DTYPE_F32; dtype++) test_matmul_at_awkward_sizes(ops, (DType)dtype);
    test_matmul_propagates_nan_and_inf(ops);
    test_matmul_of_codes_at_awkward_sizes(ops);
    test_matmul_of_codes_of_many_columns(ops);
    test_matmul_of_codes_has_decoded_weights(ops);
    test_matmul_gives_a_row_the_bits_that_it_has_alone(ops);
    test_threads_change_no_bit(ops);
    test_benchmark_loops_do_what_they_say(ops);
}

int main(void) {
    threads_set(1); // thousands of tiny calls: on a busy machine threads would mostly wait for each other
    test_table(ops_path(0));
    if (ops_path(1))
        test_table(ops_path(1));
    else
        test_skip("all operations (AVX2)", "this processor has no AVX2 with FMA");
    if (ops_path(1) && ops_path(2))
        test_products(ops_path(2));
    else
        test_skip("products (AVX-512)", "this processor has no AVX-512");
    test_rope_frequencies();
    test_rope_frequencies_are_those_of_transformers();
    return tests_summary();
}
