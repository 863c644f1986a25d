// Synthetic models with quantised weights: their codes and scales, and engine cpu on a small one.
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "../model/synthetic.h"
#include "check.h"

static const char *const names[] = {"fp8", "int8", "int8:32", "int8:128", "int4:32", "int4:64", "int4:128"};
enum { N_NAMES = sizeof names / sizeof *names };

static QuantType type_of(const char *name) {
    QuantType type = {.dtype = DTYPE_BF16};
    if (strcmp(name, "bf16") != 0 && !quant_parse(name, &type)) test_fail("%s is no type", name);
    return type;
}

// A model of one layer and small matrices, and its own matrix for the output.
static void open_small(Model *m, const char *layers, const char *output, uint64_t seed) {
    Error err = {""};
    if (!synthetic_open(m, "llama-3.2-1b", seed, &err)) test_fail("%s", err.text);
    Config *c = &m->config;
    c->dim = 256, c->hidden_dim = 576, c->n_layers = 1, c->n_heads = 4, c->n_kv_heads = 2, c->vocab_size = 320;
    config_derive(c);
    if (!synthetic_set_types(m, type_of(layers), type_of(output), &err)) test_fail("%s", err.text);
}

// Every code but those that are never written, each as often as the others; scales of both signs, and within 3/4 to 5/4
// of their mean.
static void test_codes_cover_the_range(void) {
    for (int i = 0; i < N_NAMES; i++) {
        QuantType type = type_of(names[i]);
        int group = type.group ? type.group : WHOLE_ROW, n_codes = type.dtype == DTYPE_U8 ? 16 : 256;
        Matrix m = {.rows = 256, .cols = 4096, .dtype = type.dtype, .group = group};
        m.scale_dtype = quant_scale_dtype(type);
        SyntheticCursor cursor = {.seed = 7, .at = 640};
        SyntheticTensor t = synthetic_next(&cursor, &(Weight){.matrix = &m});
        int counts[256] = {0}, per_word = n_codes == 16 ? 8 : 4, n = m.rows * m.cols;
        for (int w = 0; w < n / per_word; w++) {
            uint32_t codes = synthetic_codes((uint64_t)w, &t);
            CHECK(codes == synthetic_codes((uint64_t)w, &t));
            for (int c = 0; c < per_word; c++, codes /= (uint32_t)n_codes) counts[codes % (uint32_t)n_codes]++;
        }
        for (int c = 0; c < n_codes; c++) {
            bool never = type.dtype == DTYPE_F8_E4M3 ? (c & 127) == 127 : type.dtype == DTYPE_I8 && c == 0x80;
            bool twice = type.dtype == DTYPE_F8_E4M3 ? (c & 127) == 126 : type.dtype == DTYPE_I8 && c == 0;
            double expected = never ? 0 : (twice ? 2.0 : 1.0) * n / n_codes;
            if (fabs(counts[c] - expected) > 6 * sqrt(expected))
                test_fail("%s: code %d occurs %d times, expected %.0f", names[i], c, counts[c], expected);
        }
        int n_scales = m.rows * quant_groups(group, m.cols), negative = 0;
        for (int s = 0; s < n_scales; s++) {
            uint32_t bits = synthetic_scale_bits((uint64_t)s, &t);
            float scale;
            memcpy(&scale, &bits, sizeof scale);
            CHECK(fabsf(scale) > 0.74f * t.scale && fabsf(scale) < 1.251f * t.scale);
            CHECK(m.scale_dtype == DTYPE_F32 || (bits & 0xFFFF) == 0);
            negative += scale < 0;
        }
        CHECK(abs(2 * negative - n_scales) < 6 * sqrt(n_scales));
        // Where the next tensor starts.
        uint64_t codes = 256 * 4096 / (n_codes == 16 ? 2 : 1);
        CHECK(t.at == 640 && t.scale_at == 640 + codes && cursor.at == 640 + (matrix_bytes(&m) + 63) / 64 * 64);
    }
    test_end("test_codes_cover_the_range");
}

// What engine cpu holds: codes and scales that may be in a file, weights whose mean is 0 and whose standard deviation
// is that of the weights in BF16, 1.7/√cols; another seed, other weights; the same seed, the same.
static void test_weights_of_each_type(void) {
    for (int i = -1; i < N_NAMES; i++) {
        const char *name = i < 0 ? "bf16" : names[i];
        Model m, same, other;
        Error err = {""};
        Model *models[] = {&m, &same, &other};
        for (int k = 0; k < 3; k++) {
            open_small(models[k], name, "int8", k == 2 ? 4 : 3);
            if (!model_start(models[k], "cpu", PRECISION_F32, 1, 64, &err)) test_fail("%s: %s", name, err.text);
        }
        Matrix *matrices[] = {&m.weights.layers[0].wq, &m.weights.layers[0].wv, &m.weights.layers[0].w1,
                              &m.weights.layers[0].w2, &m.weights.output};
        const Matrix *again[] = {&same.weights.layers[0].wq, &same.weights.layers[0].wv, &same.weights.layers[0].w1,
                                 &same.weights.layers[0].w2, &same.weights.output};
        for (int k = 0; !test_failure[0] && k < 5; k++) {
            const Matrix *x = matrices[k];
            uint64_t codes = (uint64_t)x->rows * matrix_row_bytes(x);
            float row[576];
            double sum = 0, squares = 0, n = (double)x->rows * x->cols;
            CHECK(memcmp(x->data, again[k]->data, codes) == 0);
            if (matrix_is_quantised(x)) {
                CHECK(memcmp(x->scale, again[k]->scale, matrix_bytes(x) - codes) == 0);
                CHECK(quant_find_bad_scale(x) < 0 && quant_find_nan(x) < 0);
            }
            for (int r = 0; r < x->rows; r++) {
                quant_decode_row(row, x, r);
                for (int c = 0; c < x->cols; c++) sum += (double)row[c], squares += (double)row[c] * (double)row[c];
            }
            double deviation = sqrt(squares / n) / (1.7 / sqrt(x->cols));
            // Of 32,768 weights at least; that of scales adds 1 %.
            if (!(fabs(deviation - 1) < 0.03)) test_fail("%s, matrix %d: deviation %.4f", name, k, deviation);
            if (!(fabs(sum) < 8 * sqrt(squares))) test_fail("%s, matrix %d: mean %.3g", name, k, sum / n);
        }
        CHECK(memcmp(m.weights.layers[0].w1.data, other.weights.layers[0].w1.data, 64) != 0);
        char text[WEIGHTS_DTYPES], expected[WEIGHTS_DTYPES];
        snprintf(expected, sizeof expected, "%s%s, output int8", i < 0 ? "BF16" : name,
                 i < 0 ? "" : ", embeddings BF16");
        CHECK(strcmp(weights_dtypes(&m, text), expected) == 0);
        int tokens[20], found[2];
        for (int k = 0; k < 20; k++) tokens[k] = 37 * k % 320;
        for (int k = 0; k < 2; k++) { // logits are finite, and not one token's whatever comes before
            CHECK(model_prefill(&m, 0, tokens, 10 + 10 * k, 1, &err));
            found[k] = m.argmax[0];
            kv_reset(&m.kv, 0);
        }
        float *logits = malloc((size_t)m.config.vocab_size * sizeof *logits);
        CHECK(logits != NULL);
        if (logits) memcpy(logits, m.logits, (size_t)m.config.vocab_size * sizeof *logits);
        CHECK(found[0] >= 0 && found[1] >= 0 && found[0] != found[1]);
        // Rows of the embedding table are made as they are needed: the same as if all of it were there.
        Matrix *table = &m.weights.tok_embeddings;
        uint16_t *all = malloc((size_t)table->rows * matrix_row_bytes(table));
        SyntheticCursor cursor = {.seed = 3};
        SyntheticTensor t = synthetic_next(&cursor, &(Weight){.name = "tok_embeddings", .matrix = table});
        for (int k = 0; all && k < table->rows * table->cols; k++)
            all[k] = (uint16_t)(synthetic_bits((uint64_t)k, t.salt, t.range) >> 16);
        CHECK(all && !table->data);
        table->data = all;
        CHECK(model_prefill(&m, 0, tokens, 20, 1, &err) && m.argmax[0] == found[1]);
        CHECK(memcmp(m.logits, logits, (size_t)m.config.vocab_size * sizeof *logits) == 0);
        free(all);
        free(logits);
        for (int k = 0; k < 3; k++) model_close(models[k]);
    }
    test_end("test_weights_of_each_type");
}

// int4 alone has the groups that divide all columns; a tied model whose output is quantised has a matrix of its own
// there, and codes and scales count in what a step reads.
static void test_types_of_a_shape(void) {
    Model m;
    Error err = {""};
    CHECK(synthetic_open(&m, "llama-3.1-70b", 0, &err));
    CHECK(synthetic_set_types(&m, type_of("int4"), type_of("int8"), &err));
    CHECK(m.weights.layers[79].w2.group == 128 && m.weights.layers[79].w2.scale_dtype == DTYPE_BF16);
    CHECK(m.weights.output.group == WHOLE_ROW && m.weights.output.dtype == DTYPE_I8);
    CHECK(m.weights.tok_embeddings.group == 0 && m.weights.tok_embeddings.dtype == DTYPE_BF16);
    double layers = 80.0 * (2.0 * 8192 * 8192 + 2.0 * 1024 * 8192 + 3.0 * 28672 * 8192), output = 128256.0 * 8192;
    CHECK((double)weights_read(&m, 1) == layers / 2 + layers / 128 * 2 + output + 128256 * 4 + 8192 * 2);
    model_close(&m);

    for (int quantised = 0; quantised < 2; quantised++) {
        CHECK(synthetic_open(&m, "llama-3.2-1b", 0, &err));
        CHECK(synthetic_set_types(&m, type_of("fp8"), type_of(quantised ? "fp8" : "bf16"), &err));
        CHECK(m.config.tie_embeddings == !quantised &&
              m.weights.output.dtype == (quantised ? DTYPE_F8_E4M3 : DTYPE_BF16));
        CHECK(m.weights.tok_embeddings.dtype == DTYPE_BF16 && m.weights.tok_embeddings.group == 0);
        model_close(&m);
    }
    test_end("test_types_of_a_shape");
}

// A matrix that is not FP8 is named, before any engine is asked; engine cpu has no FP8 products.
static void test_fp8_products_take_fp8_weights(void) {
    static const struct {
        const char *layers;
        bool changed; // the last matrix is int8
        const char *message;
    } cases[] = {
        {"fp8", false, "--engine cpu: engine cpu has no FP8 products, it computes in float32 or bf16"},
        {"fp8", true, "--precision fp8 takes FP8 weights: layers.0.w3 is int8, expected fp8 as --quantize writes it"},
        {"bf16", false, "--precision fp8 takes FP8 weights: layers.0.wq is BF16, expected fp8 as --quantize writes it"},
        {"int8:32", false,
         "--precision fp8 takes FP8 weights: layers.0.wq is int8:32, expected fp8 as --quantize writes it"}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        Model m;
        Error err = {""};
        open_small(&m, cases[i].layers, "bf16", 1);
        if (cases[i].changed) m.weights.layers[0].w3.dtype = DTYPE_I8;
        CHECK(!model_choose(&m, "cpu", PRECISION_FP8, &err));
        if (strcmp(err.text, cases[i].message) != 0) test_fail("%s", err.text);
        model_close(&m);
    }
    test_end("test_fp8_products_take_fp8_weights");
}

int main(void) {
    test_fp8_products_take_fp8_weights();
    test_codes_cover_the_range();
    test_types_of_a_shape();
    test_weights_of_each_type();
    return tests_summary();
}
