#include "synthetic.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static bool byte_vocabulary(Model *m, Error *err) {
    size_t n = (size_t)m->config.vocab_size;
    uint32_t *offsets = malloc((n + 1) * sizeof *offsets);
    uint8_t *kind = malloc(n), *bytes = malloc(256);
    if (!offsets || !kind || !bytes) {
        free(offsets);
        free(kind);
        free(bytes);
        return fail(err, "out of memory: a vocabulary of %zu", n);
    }
    for (size_t i = 0; i <= n; i++) offsets[i] = i < 256 ? (uint32_t)i : 256;
    for (size_t i = 0; i < n; i++) kind[i] = i < 256 ? TOKEN_MERGEABLE : TOKEN_UNUSED;
    for (int i = 0; i < 256; i++) bytes[i] = (uint8_t)i;
    return tokenizer_init(&m->tokenizer, (int)n, offsets, kind, bytes, 256, err);
}

// Shapes of Meta's models, and of a small one, from their config.json.
static const struct {
    const char *name;
    int dim, hidden_dim, n_layers, n_heads, n_kv_heads, head_dim, vocab_size, max_seq_len;
    float rope_theta, rope_factor; // factor 0: RoPE is not scaled
    bool tied;
} shapes[] = {{"llama-3.2-1b", 2048, 8192, 16, 32, 8, 64, 128256, 131072, 500000, 32, true},
              {"llama-3.2-3b", 3072, 8192, 28, 24, 8, 128, 128256, 131072, 500000, 32, true},
              {"llama-3.1-8b", 4096, 14336, 32, 32, 8, 128, 128256, 131072, 500000, 8, false},
              {"llama-3.1-70b", 8192, 28672, 80, 64, 8, 128, 128256, 131072, 500000, 8, false},
              {"smollm2-135m", 576, 1536, 30, 9, 3, 64, 49152, 8192, 100000, 0, true}};
enum { N_SHAPES = sizeof shapes / sizeof *shapes };

bool model_has_shape(const char *name) {
    for (int i = 0; i < N_SHAPES; i++)
        if (strcmp(name, shapes[i].name) == 0) return true;
    return false;
}

const char *model_shapes(void) {
    static char list[128];
    for (int i = 0, n = 0; i < N_SHAPES; i++)
        n += snprintf(list + n, sizeof list - (size_t)n, "%s%s", i ? ", " : "", shapes[i].name);
    return list;
}

static bool set_dtype(void *context, const Weight *w, Error *err) {
    (void)context, (void)err;
    if (w->matrix) w->matrix->dtype = DTYPE_BF16;
    return true;
}

bool synthetic_open(Model *m, const char *shape, uint64_t seed, Error *err) {
    *m = (Model){.file.fd = -1, .seed = seed};
    for (int i = 0; i < N_SHAPES; i++) {
        if (strcmp(shape, shapes[i].name) != 0) continue;
        m->config = (Config){.dim = shapes[i].dim,
                             .hidden_dim = shapes[i].hidden_dim,
                             .n_layers = shapes[i].n_layers,
                             .n_heads = shapes[i].n_heads,
                             .n_kv_heads = shapes[i].n_kv_heads,
                             .head_dim = shapes[i].head_dim,
                             .vocab_size = shapes[i].vocab_size,
                             .max_seq_len = shapes[i].max_seq_len,
                             .norm_eps = 1e-5f,
                             .rope_theta = shapes[i].rope_theta,
                             .rope_type = shapes[i].rope_factor > 0 ? ROPE_LLAMA3 : ROPE_DEFAULT,
                             .rope_factor = shapes[i].rope_factor,
                             .rope_low_freq_factor = 1,
                             .rope_high_freq_factor = 4,
                             .rope_original_max_seq_len = 8192,
                             .tie_embeddings = shapes[i].tied,
                             .bos_id = -1,
                             .chat_bos_id = -1};
        m->weights.dtype = DTYPE_BF16;
        config_derive(&m->config);
        return weights_visit(m, set_dtype, NULL, err) && byte_vocabulary(m, err);
    }
    return fail(err, "--synthetic %s: unknown shape, expected one of: %s", shape, model_shapes());
}

// WeightVisitor's context of synthetic_set_types: the types, with the groups that they have.
typedef struct {
    const Model *model;
    QuantType layers, output;
} Types;

static bool set_type(void *context, const Weight *w, Error *err) {
    const Types *t = context;
    (void)err;
    if (!w->matrix || w->matrix == &t->model->weights.tok_embeddings) return true;
    QuantType type = w->matrix == &t->model->weights.output ? t->output : t->layers;
    w->matrix->dtype = type.dtype;
    w->matrix->scale_dtype = quant_scale_dtype(type);
    w->matrix->group = type.dtype == DTYPE_BF16 ? 0 : type.group ? type.group : WHOLE_ROW;
    return true;
}

bool synthetic_set_types(Model *m, QuantType layers, QuantType output, Error *err) {
    Config *c = &m->config;
    const int cols[] = {c->dim, c->q_dim, c->hidden_dim};
    if (layers.group == QUANT_GROUP_FITS) layers.group = quant_fit(cols, 3);
    if (output.group == QUANT_GROUP_FITS) output.group = quant_fit(cols, 3);
    c->tie_embeddings = c->tie_embeddings && output.dtype == DTYPE_BF16;
    m->weights.output_dtype = output.dtype;
    return weights_visit(m, set_type, &(Types){m, layers, output}, err);
}

// The root of the mean square of all codes that synthetic_codes gives.
static float codes_deviation(DType dtype) {
    return dtype == DTYPE_F8_E4M3 ? 107.2f : dtype == DTYPE_I8 ? 73.5f : 4.64f;
}

static uint64_t padded(uint64_t bytes) {
    return (bytes + 63) / 64 * 64;
}

SyntheticTensor synthetic_next(SyntheticCursor *y, const Weight *w) {
    const Matrix *m = w->matrix;
    SyntheticTensor t = {.at = y->at, .salt = (uint32_t)((y->seed + y->at) * 0x9E3779B97F4A7C15u >> 32)};
    if (m) t.range = 2 * 1.7f * 1.7320508f / sqrtf((float)m->cols);
    if (m && matrix_is_quantised(m)) {
        uint64_t codes = (uint64_t)m->rows * matrix_row_bytes(m);
        t.scale_at = y->at + padded(codes);
        t.dtype = m->dtype;
        t.scale_dtype = m->scale_dtype;
        t.scale = 1.7f / sqrtf((float)m->cols) / codes_deviation(m->dtype);
        y->at = t.scale_at + padded(matrix_bytes(m) - codes);
    } else {
        y->at += padded(m ? 2 * (uint64_t)m->rows * (uint64_t)m->cols : (uint64_t)w->n * sizeof(float));
    }
    return t;
}
