// --precision on engine cpu: what is rounded in bf16, beside this file's own forward pass in float64, and what is not;
// float32 where nothing is asked for. (Operations: test_ops_bf16.c.)
#include <math.h>

#include "../model/file/checkpoint.h"
#include "model_writer.h"

#define LENGTH(array) ((int)(sizeof(array) / sizeof *(array)))

enum { TOKENS = 40, STEPS = 8, DIM = 16, HIDDEN = 24, HEADS = 4, KV_HEADS = 2, HEAD_DIM = 4 };

static Model m;

static bool start_file(const char *path, Precision precision, int slots) {
    Error err = {""};
    if (checkpoint_open(&m, path, false, &err) && model_start(&m, "cpu", precision, slots, TOKENS + STEPS, &err))
        return true;
    test_fail("%s", err.text);
    return false;
}

static int token_of(int position) {
    return (position * 37 + 11) % BYTES;
}

// Logits [1 + STEPS][TINY_VOCAB]: after a prompt of TOKENS, and after each step.
static float *run_file(const char *path, Precision precision) {
    float *all = calloc((1 + STEPS) * TINY_VOCAB, sizeof *all);
    int ids[TOKENS];
    Error err = {""};
    for (int i = 0; i < TOKENS; i++) ids[i] = token_of(i);
    if (start_file(path, precision, 1)) {
        if (!model_prefill(&m, 0, ids, TOKENS, 1, &err)) test_fail("%s", err.text);
        memcpy(all, m.logits, TINY_VOCAB * sizeof *all);
        for (int k = 0; k < STEPS; k++) {
            if (!model_decode(&m, 0, token_of(TOKENS + k), &err)) test_fail("%s", err.text);
            memcpy(all + (1 + k) * TINY_VOCAB, m.logits, TINY_VOCAB * sizeof *all);
        }
    }
    model_close(&m);
    return all;
}

// ---- the forward pass in float64 ------------------------------------------------------------------------------------

static double nearest(double x, int bits, int least) { // with so many bits, and of no less than 2^least
    int exponent;
    frexp(x, &exponent);
    exponent = exponent - bits > least ? exponent - bits : least;
    return ldexp(nearbyint(ldexp(x, -exponent)), exponent);
}

static double nearest_bf16(double x) {
    return nearest(x, 8, -133);
}

static double nearest_f16(double x) {
    return nearest(x, 11, -24);
}

static double normal_f16(double x) { // as_dtype writes no others
    return fabs(x) < 0x1p-14 ? 0 : nearest_f16(x);
}

static double as_it_is(double x) {
    return x;
}

// How inputs of products and the cache are rounded.
static double (*rounding)(double x);

static const float *numbers(Draft *d, int layer, const char *name) {
    char full[64];
    snprintf(full, sizeof full, "layers.%d.%s", layer, name);
    return (const float *)draft_part(d, layer < 0 ? name : full)->data;
}

static void norm_row(double *y, const double *x, const float *weight) {
    double squares = 0;
    for (int i = 0; i < DIM; i++) squares += x[i] * x[i];
    for (int i = 0; i < DIM; i++) y[i] = rounding(x[i] / sqrt(squares / DIM + 1e-5) * (double)weight[i]);
}

static void multiply(double *y, const double *x, const float *w, int rows, int cols) {
    for (int r = 0; r < rows; r++) {
        y[r] = 0;
        for (int c = 0; c < cols; c++) y[r] += (double)w[r * cols + c] * x[c];
    }
}

static void rotate(double *x, int heads, int position) {
    for (int h = 0; h < heads; h++, x += HEAD_DIM)
        for (int i = 0; i < HEAD_DIM / 2; i++) {
            double angle = position * pow(500000, -2.0 * i / HEAD_DIM), a = x[i], b = x[i + HEAD_DIM / 2];
            x[i] = rounding(a * cos(angle) - b * sin(angle));
            x[i + HEAD_DIM / 2] = rounding(b * cos(angle) + a * sin(angle));
        }
}

static void attend_row(double *out, const double *q, double (*k)[KV_HEADS * HEAD_DIM], double (*v)[KV_HEADS * HEAD_DIM],
                       int position) {
    for (int h = 0; h < HEADS; h++) {
        int at = h / (HEADS / KV_HEADS) * HEAD_DIM;
        double sum = 0, total[HEAD_DIM] = {0};
        for (int j = 0; j <= position; j++) {
            double score = 0;
            for (int i = 0; i < HEAD_DIM; i++) score += q[h * HEAD_DIM + i] * k[j][at + i];
            double p = exp(score / sqrt(HEAD_DIM));
            sum += p;
            for (int i = 0; i < HEAD_DIM; i++) total[i] += p * v[j][at + i];
        }
        for (int i = 0; i < HEAD_DIM; i++) out[h * HEAD_DIM + i] = rounding(total[i] / sum);
    }
}

// Logits of every row, of the tiny model of two layers that d has; the weights are those numbers.
static double *plain_logits(Draft *d) {
    enum { N = TOKENS + STEPS, KV_DIM = KV_HEADS * HEAD_DIM };
    static double keys[2][N][KV_DIM], values[2][N][KV_DIM];
    double *logits = malloc((size_t)N * TINY_VOCAB * sizeof *logits);
    for (int t = 0; t < N; t++) {
        double x[DIM], xb[DIM], q[DIM], att[DIM], gate[HIDDEN], up[HIDDEN];
        for (int i = 0; i < DIM; i++) x[i] = (double)numbers(d, -1, "tok_embeddings")[token_of(t) * DIM + i];
        for (int l = 0; l < 2; l++) {
            norm_row(xb, x, numbers(d, l, "attention_norm"));
            multiply(q, xb, numbers(d, l, "wq"), DIM, DIM);
            multiply(keys[l][t], xb, numbers(d, l, "wk"), KV_DIM, DIM);
            multiply(values[l][t], xb, numbers(d, l, "wv"), KV_DIM, DIM);
            rotate(q, HEADS, t);
            rotate(keys[l][t], KV_HEADS, t);
            for (int i = 0; i < KV_DIM; i++) values[l][t][i] = rounding(values[l][t][i]);
            attend_row(att, q, keys[l], values[l], t);
            multiply(xb, att, numbers(d, l, "wo"), DIM, DIM);
            for (int i = 0; i < DIM; i++) x[i] += xb[i];
            norm_row(xb, x, numbers(d, l, "ffn_norm"));
            multiply(gate, xb, numbers(d, l, "w1"), HIDDEN, DIM);
            multiply(up, xb, numbers(d, l, "w3"), HIDDEN, DIM);
            for (int i = 0; i < HIDDEN; i++) gate[i] = rounding(gate[i] / (1 + exp(-gate[i])) * up[i]);
            multiply(xb, gate, numbers(d, l, "w2"), DIM, HIDDEN);
            for (int i = 0; i < DIM; i++) x[i] += xb[i];
        }
        norm_row(xb, x, numbers(d, -1, "norm"));
        multiply(logits + t * TINY_VOCAB, xb, numbers(d, -1, "output"), TINY_VOCAB, DIM);
    }
    return logits;
}

// The mean distance of the logits from those of the plain pass.
static double distance(const float *got, const double *want) {
    double sum = 0;
    for (int i = 0; i < (1 + STEPS) * TINY_VOCAB; i++)
        sum += fabs((double)got[i] - want[(TOKENS - 1) * TINY_VOCAB + i]);
    return sum / ((1 + STEPS) * TINY_VOCAB);
}

// ---- tests ----------------------------------------------------------------------------------------------------------

static const Shape shape = {DIM, HIDDEN, 2, HEADS, KV_HEADS, HEAD_DIM, 128, "F32", false, false};

// The model with its matrices rounded, still as F32, and a second of the same numbers as dtype.
static void write_rounded(Draft *d, const char *dtype, double (*round)(double), const char *path) {
    Draft other;
    draft_tiny(d, shape, 5);
    draft_tiny(&other, shape, 5);
    for (int p = 0; p < d->n_parts; p++) {
        Part *part = &d->parts[p], *to = &other.parts[p];
        if (part->n_dims != 2) continue;
        float *x = (float *)part->data, *y = (float *)to->data;
        size_t n = part->n / sizeof *x;
        for (size_t i = 0; i < n; i++) x[i] = y[i] = (float)round((double)x[i]);
        to->data = as_dtype(y, n, dtype);
        snprintf(to->dtype, sizeof to->dtype, "%s", dtype);
        if (strcmp(dtype, "F32") != 0) to->n = 2 * n;
    }
    draft_write(&other, path);
    draft_free(&other);
}

// In float32 the engine is at the plain pass but for float32's rounding. In bf16 it is nearer to the pass that rounds
// than that is to the one that does not, by far: what is left are numbers that lie so near the middle of two that
// float32's sums take them to the other. f16 the same, where the weights are.
static void test_inputs_of_products_are_rounded(void) {
    static const struct {
        const char *dtype;
        double (*weight)(double), (*round)(double);
        double nearer; // f16 is eight times as fine: more numbers are near the middle of two
    } cases[] = {{"BF16", nearest_bf16, nearest_bf16, 40}, {"F16", normal_f16, nearest_f16, 5}};
    for (int i = 0; i < LENGTH(cases); i++) {
        Draft d;
        write_rounded(&d, cases[i].dtype, cases[i].weight, temporary("16.bin"));
        float *f32 = run_file(temporary("16.bin"), PRECISION_F32),
              *bf16 = run_file(temporary("16.bin"), PRECISION_BF16);
        rounding = as_it_is;
        double *exact = plain_logits(&d);
        rounding = cases[i].round;
        double *rounded = plain_logits(&d);
        double apart = distance(bf16, exact), left = distance(bf16, rounded), plain = distance(f32, exact);
        if (!(plain < apart / 200) || !(left < apart / cases[i].nearer))
            test_fail(
                "%s: float32 is %.2g from the plain pass, bf16 %.2g from the one that rounds, %.2g from the other",
                cases[i].dtype, plain, left, apart);
        free(f32), free(bf16), free(exact), free(rounded);
        draft_free(&d);
    }
    test_end("test_inputs_of_products_are_rounded");
}

// A file of F32 weights computes in bf16 as one of the nearest BF16 does, to the bit.
static void test_f32_weights_are_rounded_at_load(void) {
    Draft d;
    write_rounded(&d, "BF16", nearest_bf16, temporary("bf16.bin"));
    draft_free(&d);
    draft_tiny(&d, shape, 5);
    draft_write(&d, temporary("f32.bin"));
    draft_free(&d);
    float *f32 = run_file(temporary("f32.bin"), PRECISION_BF16),
          *bf16 = run_file(temporary("bf16.bin"), PRECISION_BF16);
    CHECK(memcmp(f32, bf16, (1 + STEPS) * TINY_VOCAB * sizeof *f32) == 0);
    free(f32), free(bf16);
    uint64_t bytes[2];
    for (int i = 0; i < 2; i++) {
        if (start_file(temporary(i ? "bf16.bin" : "f32.bin"), PRECISION_BF16, 1))
            CHECK(m.weights.layers[1].w2.dtype == DTYPE_BF16 && m.weights.output.dtype == DTYPE_BF16);
        bytes[i] = m.weights.bytes;
        model_close(&m);
    }
    CHECK(bytes[0] == bytes[1]);
    test_end("test_f32_weights_are_rounded_at_load");
    Run r = run_program(NULL, temporary("f32.bin"), "-p", "a", "-n", "1", "--engine", "cpu", "--precision", "bf16",
                        "--verbose", NULL);
    check_status(&r, 0);
    if (!strstr(r.err, "weights rounded to bf16")) test_fail("%s", shown(r.err, r.n_err));
    test_end("test_verbose_says_that_weights_are_rounded");
    run_free(&r);
}

static void test_default_is_f32(void) {
    if (start_file("model/stories.bin", PRECISION_DEFAULT, 1)) CHECK(m.precision == PRECISION_F32);
    uint64_t f32 = m.kv.bytes;
    model_close(&m);
    if (start_file("model/stories.bin", PRECISION_BF16, 1)) CHECK(m.precision == PRECISION_BF16);
    CHECK(f32 == 2 * m.kv.bytes);
    model_close(&m);
    test_end("test_default_is_f32_and_bf16_has_half_the_cache");
}

// Rows of a step, and of prompts beside it, have in bf16, too, the bits that each has alone.
static void test_rows_have_the_bits_that_they_have_alone(void) {
    enum { SLOTS = 8, PROMPT = 20 };
    Error err = {""};
    int ids[SLOTS + 1][PROMPT];
    for (int i = 0; i <= SLOTS; i++)
        for (int t = 0; t < PROMPT; t++) ids[i][t] = 300 + 97 * i + 31 * t;
    if (!start_file("model/stories.bin", PRECISION_BF16, SLOTS + 1)) return;
    const size_t vocab = (size_t)m.config.vocab_size;
    float *alone = malloc((SLOTS + 1) * vocab * sizeof *alone);
    for (int i = 0; i <= SLOTS; i++) {
        int n = PROMPT - (i == SLOTS ? 0 : 1);
        CHECK(model_prefill(&m, i, ids[i], n, 1, &err));
        if (i < SLOTS) CHECK(model_decode(&m, i, ids[i][n], &err));
        memcpy(alone + (size_t)i * vocab, m.logits, vocab * sizeof *alone);
        kv_reset(&m.kv, i);
    }
    for (int n = 2; n <= SLOTS; n++) {
        int tokens[SLOTS + PROMPT], slots[SLOTS + 1], starts[SLOTS + 2], rows[SLOTS + 1];
        for (int i = 0; i < n; i++) {
            CHECK(model_prefill(&m, i, ids[i], PROMPT - 1, 1, &err));
            tokens[i] = ids[i][PROMPT - 1];
            slots[i] = starts[i] = rows[i] = i;
        }
        for (int t = 0; t < PROMPT; t++) tokens[n + t] = ids[SLOTS][t];
        slots[n] = SLOTS;
        starts[n] = n;
        starts[n + 1] = n + PROMPT;
        rows[n] = n + PROMPT - 1;
        Batch b = {.n_rows = n + PROMPT,
                   .n_seq = n + 1,
                   .n_logits = n + 1,
                   .n_decode = n,
                   .tokens = tokens,
                   .slot = slots,
                   .start = starts,
                   .logit_rows = rows};
        if (!model_forward(&m, &b, &err)) test_fail("%s", err.text);
        for (int i = 0; i <= n; i++) {
            const float *want = alone + (size_t)(i == n ? SLOTS : i) * vocab;
            if (memcmp(m.logits + (size_t)i * vocab, want, vocab * sizeof *want) != 0)
                test_fail("%d sequences: row %d has other bits than alone", n, i);
        }
        for (int i = 0; i <= SLOTS; i++) kv_reset(&m.kv, i);
    }
    free(alone);
    model_close(&m);
    test_end("test_rows_have_the_bits_that_they_have_alone");
}

int main(void) {
    test_inputs_of_products_are_rounded();
    test_f32_weights_are_rounded_at_load();
    test_default_is_f32();
    test_rows_have_the_bits_that_they_have_alone();
    return tests_summary();
}
