// What engine cpu computes with in --precision bf16, of every path of this machine: numbers rounded to 16 bits,
// products of prompts and of steps, attention over a cache of 16 bits.
#include "ops_check.h"

static void end_bf16(const char *name, const Ops *ops) {
    Ops named = *ops;
    named.name = ops->name_bf16;
    end(name, &named);
}

// ---- rounding -------------------------------------------------------------------------------------------------------

static const DType sixteen[] = {DTYPE_BF16, DTYPE_F16};

static float value_of(DType dtype, uint16_t bits) {
    return (float)(dtype == DTYPE_BF16 ? bf16_value(bits) : f16_value(bits));
}

// x rounded, by narrow and by round, alone and among others.
static void check_rounded(const Ops *ops, DType dtype, float x, uint16_t want) {
    float many[19], in_place[19];
    uint16_t bits[19], alone;
    for (int i = 0; i < LENGTH(many); i++) many[i] = in_place[i] = i == 3 || i == 18 ? x : 1.5f;
    ops->narrow(bits, many, dtype, LENGTH(many));
    ops->narrow(&alone, &x, dtype, 1);
    ops->round(in_place, dtype, LENGTH(many));
    if (bits[3] != want || bits[18] != want || alone != want)
        test_fail("%s of %a is 0x%04X, expected 0x%04X", dtype_names[dtype], (double)x, (unsigned)bits[3],
                  (unsigned)want);
    float value = value_of(dtype, want);
    if (memcmp(&in_place[3], &value, sizeof value) != 0 || memcmp(&in_place[18], &value, sizeof value) != 0)
        test_fail("%s of %a, as a float, is %a", dtype_names[dtype], (double)x, (double)in_place[3]);
    CHECK(bits[0] == (dtype == DTYPE_BF16 ? 0x3FC0 : 0x3E00) && in_place[0] == 1.5f);
}

// Every value is itself; the number half-way to the next goes to the even one of the two,
// those beside it to the nearer.
static void test_rounding_to_nearest_even(const Ops *ops) {
    for (int d = 0; d < LENGTH(sixteen); d++) {
        const DType dtype = sixteen[d];
        const uint16_t infinity = dtype == DTYPE_BF16 ? 0x7F80 : 0x7C00;
        for (int sign = 0; sign < 2; sign++)
            for (uint16_t bits = 0; bits < infinity; bits++) {
                const uint16_t s = (uint16_t)(sign << 15), at = bits | s, next = (uint16_t)(bits + 1) | s;
                // Beyond the largest value comes what would be next: half-way to it is infinite.
                double low = (double)value_of(dtype, at),
                       high = bits + 1 < infinity ? (double)value_of(dtype, next)
                                                  : ldexp(sign ? -1 : 1, dtype == DTYPE_BF16 ? 128 : 16);
                float half = (float)((low + high) / 2);
                check_rounded(ops, dtype, value_of(dtype, at), at);
                check_rounded(ops, dtype, half, bits % 2 ? next : at);
                check_rounded(ops, dtype, nextafterf(half, 0), at);
                check_rounded(ops, dtype, nextafterf(half, sign ? -INFINITY : INFINITY), next);
            }
        check_rounded(ops, dtype, INFINITY, infinity);
        check_rounded(ops, dtype, -INFINITY, infinity | 0x8000);
        check_rounded(ops, dtype, 3.4028235e38f, infinity);
        for (uint32_t fraction = 1; fraction < 1u << 23; fraction = fraction * 3 + 1) {
            uint32_t nan = 0x7F800000 | fraction;
            float x;
            uint16_t bits;
            memcpy(&x, &nan, sizeof x);
            ops->narrow(&bits, &x, dtype, 1);
            CHECK(isnan(value_of(dtype, bits)));
            ops->round(&x, dtype, 1);
            CHECK(isnan(x));
        }
    }
    end_bf16("test_rounding_to_nearest_even", ops);
}

// ---- products -------------------------------------------------------------------------------------------------------

static float *rounded_floats(const Ops *ops, DType dtype, size_t n) {
    float *x = random_floats(n, 1);
    ops->round(x, dtype, (int64_t)n);
    return x;
}

static void check_bf16(Matmul *matmul, int T, const float *x, const Matrix *w, const Matrix *reference) {
    check_sums(matmul, T, x, w, reference);
    int n = w->rows, k = w->cols;
    size_t size = (size_t)T * (size_t)n;
    float *together = poisoned(size), *alone = poisoned(size);
    matmul(together, x, w, T);
    for (int t = 0; t < T; t++) matmul(alone + t * n, x + t * k, w, 1);
    if (memcmp(together, alone, size * sizeof *alone) != 0)
        test_fail("%s T %d n %d k %d: other bits than row by row", dtype_names[w->dtype], T, n, k);
    free(together);
    free(alone);
}

// With the same weights, exact: whatever their scales, steps do not round them.
static void check_both(const Ops *ops, int T, const float *x, const Matrix *w, const Matrix *reference) {
    check_bf16(ops->matmul_bf16, T, x, w, reference);
    check_bf16(ops->matmul_step_bf16, T, x, w, w);
}

static const int tokens[] = {1, 2, 3, 4, 5, 8, 12, 17, 33, 47};

static void test_matmul_bf16_at_awkward_sizes(const Ops *ops) {
    static const int rows[] = {1, 5, 16, 17, 32, 33, 70, 130},
                     columns[] = {1, 2, 15, 31, 32, 33, 100, 511, 513, 530, 1055, 1290};
    for (int d = 0; d < LENGTH(sixteen); d++)
        for (int a = 0; a < LENGTH(tokens); a++)
            for (int b = 0; b < LENGTH(rows); b++)
                for (int c = 0; c < LENGTH(columns); c++) {
                    int T = tokens[a], n = rows[b], k = columns[c];
                    if (T * n * k > 200000 && (a + b + c) % 4) continue; // a few of the largest are enough
                    float *x = rounded_floats(ops, sixteen[d], (size_t)(T * k));
                    void *w = random_weights(sixteen[d], (size_t)(n * k));
                    Matrix m = {.data = w, .dtype = sixteen[d], .rows = n, .cols = k};
                    check_both(ops, T, x, &m, &m);
                    free(x);
                    free(w);
                }
    end_bf16("test_matmul_bf16_at_awkward_sizes", ops);
}

// The weights as they are to be: each with a scale of its group is rounded to bf16.
static Matrix rounded_weights(const Ops *ops, const Matrix *m) {
    float *rows = malloc((size_t)m->rows * (size_t)m->cols * sizeof *rows);
    for (int j = 0; j < m->rows; j++) quant_decode_row(rows + j * m->cols, m, j);
    if (m->group != WHOLE_ROW) ops->round(rows, DTYPE_BF16, (int64_t)m->rows * m->cols);
    return (Matrix){.data = rows, .dtype = DTYPE_F32, .rows = m->rows, .cols = m->cols};
}

static void test_matmul_bf16_of_codes(const Ops *ops) {
    static const int rows[] = {1, 5, 17, 33, 70}, columns[] = {2, 14, 32, 34, 100, 128, 130, 512, 530, 1030, 2400};
    for (int q = 0; q < LENGTH(quant_all); q++)
        for (int b = 0; b < LENGTH(rows); b++)
            for (int c = 0; c < LENGTH(columns); c++)
                for (int T = 1; T <= 14; T += T < 9 ? 2 : 5) {
                    Matrix m = random_codes(quant_all[q], (DType)((q + b + c) % 3), rows[b], columns[c]),
                           reference = rounded_weights(ops, &m);
                    float *x = rounded_floats(ops, DTYPE_BF16, (size_t)(T * columns[c]));
                    check_both(ops, T, x, &m, &reference);
                    free(x);
                    free((void *)reference.data);
                    free_codes(&m);
                }
    end_bf16("test_matmul_bf16_of_codes", ops);
}

// More columns than a step multiplies at a time.
static void test_matmul_bf16_of_codes_of_many_columns(const Ops *ops) {
    for (int q = 0; q < LENGTH(quant_all); q++)
        for (int T = 1; T <= 10; T += 3) {
            Matrix m = random_codes(quant_all[q], (DType)(q % 3), 6, 17034);
            float *x = rounded_floats(ops, DTYPE_BF16, (size_t)(T * m.cols));
            check_bf16(ops->matmul_step_bf16, T, x, &m, &m);
            free(x);
            free_codes(&m);
        }
    end_bf16("test_matmul_bf16_of_codes_of_many_columns", ops);
}

// A row of x that is 1 in one column gives that column's weights: they are to the bit what they are rounded to, in steps
// what they decode to.
static void test_matmul_bf16_of_codes_has_their_weights(const Ops *ops) {
    enum { N = 5, K = 174 };
    static float x[K * K], y[K * N], decoded[K];
    for (int i = 0; i < K; i++) x[i * K + i] = 1;
    for (int q = 0; q < LENGTH(quant_all); q++)
        for (int scales = 0; scales <= DTYPE_F32; scales++) {
            Matrix m = random_codes(quant_all[q], (DType)scales, N, K), rounded = rounded_weights(ops, &m);
            for (int steps = 0; steps < 2; steps++) {
                (steps ? ops->matmul_step_bf16 : ops->matmul_bf16)(y, x, &m, K);
                for (int j = 0; j < N; j++) {
                    const float *want = steps ? decoded : (const float *)rounded.data + j * K;
                    quant_decode_row(decoded, &m, j);
                    for (int i = 0; i < K; i++)
                        if (y[i * N + j] != want[i])
                            test_fail("%s in groups of %d, scales %s%s: row %d, column %d is %a, expected %a",
                                      dtype_names[m.dtype], m.group, dtype_names[scales], steps ? ", a step" : "", j, i,
                                      (double)y[i * N + j], (double)want[i]);
                }
            }
            free((void *)rounded.data);
            free_codes(&m);
        }
    end_bf16("test_matmul_bf16_of_codes_has_their_weights", ops);
}

// Numbers that are under 2^-126, in x, in W, as products or as sums, may become 0, and that is all that they lose.
static void test_steps_in_bf16_of_tiny_numbers(const Ops *ops) {
    enum { N = 7, K = 70, T = 3 };
    for (int turn = 0; turn < 60; turn++) {
        float *x = random_floats(T * K, 1), y[T * N];
        uint16_t *w = random_weights(DTYPE_BF16, N * K);
        for (int i = 0; i < T * K; i++) x[i] = ldexpf(x[i], -60 - (int)(random_bits() % 80));
        ops->round(x, DTYPE_BF16, T * K);
        for (int i = 0; i < N * K; i++) w[i] = (uint16_t)((w[i] & 0x807F) | (random_bits() % 70) << 7);
        ops->matmul_step_bf16(y, x, &(Matrix){.data = w, .dtype = DTYPE_BF16, .rows = N, .cols = K}, T);
        for (int t = 0; t < T; t++)
            for (int j = 0; j < N; j++) {
                double sum = 0, magnitude = 0, lost = 0;
                for (int i = 0; i < K; i++) {
                    double a = (double)x[t * K + i], b = bf16_value(w[j * K + i]);
                    sum += a * b;
                    magnitude += fabs(a * b);
                    lost += fabs(a) + fabs(b) + 2; // of x, of W, of the product and of the sum
                }
                double bound = (K + 1) * UNIT * magnitude + 0x1p-126 * lost;
                if (!within((double)y[t * N + j], sum, bound))
                    test_fail("y[%d][%d] is %a, expected %a ± %.2g", t, j, (double)y[t * N + j], sum, bound);
            }
        free(x);
        free(w);
    }
    end_bf16("test_steps_in_bf16_of_tiny_numbers", ops);
}

// What is not finite shows in the outputs that it belongs to, and in no other.
static void test_matmul_bf16_propagates_nan_and_inf(const Ops *ops) {
    enum { N = 37, K = 45, T = 14 };
    for (int place = 0; place < K; place++) {
        float *x = rounded_floats(ops, DTYPE_BF16, (size_t)T * K);
        uint16_t *w = random_weights(DTYPE_BF16, N * K);
        Matrix m = {.data = w, .dtype = DTYPE_BF16, .rows = N, .cols = K};
        w[2 * K + place] = 0x7F80;
        w[20 * K + place] = 0xFF80;
        w[36 * K + place] = 0x7FC1;
        check_both(ops, T, x, &m, &m);
        x[(T - 1) * K + place] = INFINITY; // of the last token
        check_both(ops, T, x, &m, &m);
        x[(T - 1) * K + place] = 0; // 0 × inf is NaN
        check_both(ops, T, x, &m, &m);
        free(x);
        free(w);
    }
    end_bf16("test_matmul_bf16_propagates_nan_and_inf", ops);
}

static void test_threads_change_no_bit_of_bf16(const Ops *ops) {
    enum { T = 40, N = 397, K = 1037, K_CODES = 1038, STEPS = 3 };
    static float y[2][(T + STEPS * 2 + 1) * N];
    float *x = rounded_floats(ops, DTYPE_BF16, T * K_CODES);
    void *w = random_weights(DTYPE_BF16, N * K);
    Matrix m = {.data = w, .dtype = DTYPE_BF16, .rows = N, .cols = K},
           codes[] = {random_codes((QuantType){DTYPE_I8, 32}, DTYPE_BF16, N, K_CODES),
                      random_codes((QuantType){DTYPE_U8, 32}, DTYPE_BF16, N, K_CODES)};
    for (int threads = 1; threads <= 16; threads += threads < 4 ? 1 : 6) {
        threads_set(threads);
        float *at = y[threads > 1];
        ops->matmul_bf16(at, x, &m, T);
        ops->matmul_step_bf16(at + T * N, x, &m, 1);
        for (int i = 0; i < 2; i++) ops->matmul_step_bf16(at + (T + 1 + i * STEPS) * N, x, &codes[i], STEPS);
        if (threads > 1 && memcmp(y[0], y[1], sizeof y[0]) != 0) test_fail("%d threads differ from one", threads);
    }
    threads_set(1);
    free(x);
    free(w);
    for (int i = 0; i < 2; i++) free_codes(&codes[i]);
    end_bf16("test_threads_change_no_bit_of_bf16", ops);
}

// ---- attention ------------------------------------------------------------------------------------------------------

// Over a cache of 16 bits it has the bits that it has over the same numbers as float32.
static void test_attention_over_16_bits(const Ops *ops) {
    static const int heads[][2] = {{4, 4}, {8, 2}, {9, 3}}, positions[] = {0, 1, 63, 64, 130},
                     dims[] = {8, 20, 64, 128};
    for (int h = 0; h < LENGTH(heads); h++)
        for (int p = 0; p < LENGTH(positions); p++)
            for (int d = 0; d < LENGTH(dims); d++)
                for (int T = 1; T <= 18; T += 17) {
                    const DType dtype = sixteen[(h + p + d + T) % 2];
                    const int n_heads = heads[h][0], kv_heads = heads[h][1], dim = dims[d], pages[] = {2, 0, 3, 1};
                    const size_t page = kv_page_elements(kv_heads, dim), cache = 4 * page,
                                 out = (size_t)(T * n_heads * dim);
                    float *q = random_floats(out, 1), *k = rounded_floats(ops, dtype, cache),
                          *v = rounded_floats(ops, dtype, cache), *want = poisoned(out), *got = poisoned(out);
                    uint16_t *k16 = malloc(cache * sizeof *k16), *v16 = malloc(cache * sizeof *v16);
                    ops->narrow(k16, k, dtype, (int64_t)cache);
                    ops->narrow(v16, v, dtype, (int64_t)cache);
                    for (int steps = 0; steps < 2; steps++) {
                        (steps ? ops->attention_step : ops->attention)(want, q, k, v, DTYPE_F32, pages, page, T,
                                                                       positions[p], n_heads, kv_heads, dim);
                        (steps ? ops->attention_step : ops->attention)(got, q, k16, v16, dtype, pages, page, T,
                                                                       positions[p], n_heads, kv_heads, dim);
                        CHECK(guard_is_whole(got, out) && isfinite(got[0]));
                        if (memcmp(want, got, out * sizeof *got) != 0)
                            test_fail("%s, %d heads of %d, pos %d, T %d: other bits than over float32",
                                      dtype_names[dtype], n_heads, dim, positions[p], T);
                    }
                    free(q), free(k), free(v), free(want), free(got), free(k16), free(v16);
                }
    end_bf16("test_attention_over_16_bits", ops);
}

static void test_benchmark_loop_of_pairs(const Ops *ops) {
    enum { ROUNDS = 1000 };
    float sink = 0;
    double operations = ops->multiply_add_bf16(ROUNDS, &sink);
    CHECK(operations > 0 && fmod(operations, 4.0 * ROUNDS) == 0);
    CHECK(isfinite(sink) && sink > 0);
    end_bf16("test_benchmark_loop_of_pairs", ops);
}

int main(void) {
    threads_set(1); // as in test_ops.c
    for (int i = 0; ops_path(i); i++) {
        const Ops *ops = ops_path(i);
        random_state = 1;
        if (i == 0 || ops->round != ops_path(i - 1)->round) {
            test_rounding_to_nearest_even(ops);
            test_attention_over_16_bits(ops);
        }
        test_matmul_bf16_at_awkward_sizes(ops);
        test_matmul_bf16_of_codes(ops);
        test_matmul_bf16_of_codes_of_many_columns(ops);
        test_matmul_bf16_of_codes_has_their_weights(ops);
        test_steps_in_bf16_of_tiny_numbers(ops);
        test_matmul_bf16_propagates_nan_and_inf(ops);
        test_threads_change_no_bit_of_bf16(ops);
        if (ops->multiply_add_bf16) test_benchmark_loop_of_pairs(ops);
    }
    if (!ops_select()->multiply_add_bf16)
        test_skip("products (AVX-512 with BF16)", "this processor has no AVX512-BF16");
    if (strcmp(ops_select()->name_bf16, "AVX-512 with AMX") != 0)
        test_skip("products (AVX-512 with AMX)", "this processor has no AMX");
    return tests_summary();
}
