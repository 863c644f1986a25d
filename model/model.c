#include "model.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "checkpoint.h"

// ---- engines: the only #ifdef ---------------------------------------------------------------------------------------

extern const Engine engine_cpu;
#ifdef LLAMA_CUDA
extern const Engine engine_fused, engine_cublas;
#endif

static const Engine *const engines[] = {
// the fastest first
#ifdef LLAMA_CUDA
    &engine_fused,
    &engine_cublas,
#endif
    &engine_cpu,
};
enum { N_ENGINES = sizeof engines / sizeof *engines };

bool model_has_engine(const char *name) {
    for (int i = 0; i < N_ENGINES; i++)
        if (strcmp(name, engines[i]->name) == 0) return true;
    return false;
}

const char *model_engines(void) {
    static char list[64];
    for (int i = 0, n = 0; i < N_ENGINES; i++) {
        const Engine *e = engines[i]; // never NULL, but an analyser cannot see that
        n += snprintf(list + n, sizeof list - (size_t)n, "%s%s", i ? ", " : "", e->name); // NOLINT
    }
    return list;
}

// ---- weights --------------------------------------------------------------------------------------------------------

uint64_t matrix_row_bytes(const Matrix *m) {
    return (uint64_t)m->cols * (uint64_t)dtype_bytes[m->dtype];
}

uint64_t matrix_bytes(const Matrix *m) {
    uint64_t groups = m->group ? ((uint64_t)m->cols + (uint64_t)m->group - 1) / (uint64_t)m->group : 0;
    return (uint64_t)m->rows * (matrix_row_bytes(m) + groups * sizeof(float));
}

uint64_t weight_bytes(const Weight *w) {
    return w->matrix ? matrix_bytes(w->matrix) : (uint64_t)w->n * sizeof **w->norm;
}

typedef struct {
    WeightVisitor *visit;
    void *context;
} Visit;

static bool visit_matrix(const Visit *v, const char *name, Matrix *matrix, int rows, int cols, Error *err) {
    matrix->rows = rows;
    matrix->cols = cols;
    return v->visit(v->context, &(Weight){.name = name, .matrix = matrix}, err);
}

static bool visit_norm(const Visit *v, const char *name, const float **norm, int n, Error *err) {
    return v->visit(v->context, &(Weight){.name = name, .norm = norm, .n = n}, err);
}

static bool visit_layer(const Visit *v, const Config *c, int i, LayerWeights *l, Error *err) {
    const struct {
        const char *name;
        const float **norm;
        Matrix *matrix;
        int rows, cols;
    } tensors[] = {
        {"attention_norm", &l->attention_norm, NULL, 0, c->dim},
        {"wq", NULL, &l->wq, c->q_dim, c->dim},
        {"wk", NULL, &l->wk, c->kv_dim, c->dim},
        {"wv", NULL, &l->wv, c->kv_dim, c->dim},
        {"wo", NULL, &l->wo, c->dim, c->q_dim},
        {"ffn_norm", &l->ffn_norm, NULL, 0, c->dim},
        {"w1", NULL, &l->w1, c->hidden_dim, c->dim},
        {"w2", NULL, &l->w2, c->dim, c->hidden_dim},
        {"w3", NULL, &l->w3, c->hidden_dim, c->dim},
    };
    for (size_t t = 0; t < sizeof tensors / sizeof *tensors; t++) {
        char name[64];
        snprintf(name, sizeof name, "layers.%d.%s", i, tensors[t].name);
        if (!(tensors[t].norm ? visit_norm(v, name, tensors[t].norm, tensors[t].cols, err)
                              : visit_matrix(v, name, tensors[t].matrix, tensors[t].rows, tensors[t].cols, err)))
            return false;
    }
    return true;
}

bool weights_visit(Model *m, WeightVisitor *visit, void *context, Error *err) {
    const Config *c = &m->config;
    Weights *w = &m->weights;
    const Visit v = {visit, context};
    if (!w->layers) w->layers = calloc((size_t)c->n_layers, sizeof *w->layers);
    if (!w->layers) return fail(err, "out of memory: %d layers", c->n_layers);

    if (!visit_matrix(&v, "tok_embeddings", &w->tok_embeddings, c->vocab_size, c->dim, err)) return false;
    for (int i = 0; i < c->n_layers; i++)
        if (!visit_layer(&v, c, i, &w->layers[i], err)) return false;
    if (!visit_norm(&v, "norm", &w->norm, c->dim, err)) return false;
    if (!c->tie_embeddings) return visit_matrix(&v, "output", &w->output, c->vocab_size, c->dim, err);
    w->output = w->tok_embeddings;
    return true;
}

// ---- RoPE -----------------------------------------------------------------------------------------------------------

// The frequency of each pair of elements, in radians per position: 1 / theta^(2i/head_dim), and for llama3 the scaling
// of long wavelengths by a factor, with a smooth step between. Every operation is the float32 one, in the order, of
// transformers' modeling_rope_utils.py (there a number divided by a tensor is the number times the reciprocal).
static void rope_frequencies(const Config *c, float *freq) {
    for (int i = 0; i < c->head_dim / 2; i++) {
        float exponent = (float)(2 * i) / (float)c->head_dim;
        float f = 1.0f / (float)pow((double)c->rope_theta, (double)exponent);
        if (c->rope_type == ROPE_LLAMA3) {
            float low_wavelength = c->rope_original_max_seq_len / c->rope_low_freq_factor;
            float high_wavelength = c->rope_original_max_seq_len / c->rope_high_freq_factor;
            float wavelength = (1.0f / f) * 6.283185307179586f;
            float slowed = wavelength > low_wavelength ? f / c->rope_factor : f;
            if (wavelength >= high_wavelength && wavelength <= low_wavelength) {
                float smooth = ((1.0f / wavelength) * c->rope_original_max_seq_len - c->rope_low_freq_factor) /
                               (c->rope_high_freq_factor - c->rope_low_freq_factor);
                slowed = (1.0f - smooth) * slowed / c->rope_factor + smooth * slowed;
            }
            f = slowed;
        }
        freq[i] = f;
    }
}

// ---- opening --------------------------------------------------------------------------------------------------------

void config_derive(Config *c) {
    c->q_dim = c->n_heads * c->head_dim;
    c->kv_dim = c->n_kv_heads * c->head_dim;
    c->group = c->n_heads / c->n_kv_heads;
}

bool model_open(Model *m, const char *path, bool vocab_only, Error *err) {
    *m = (Model){.file.fd = -1};
    if (!checkpoint_open(m, path, vocab_only, err)) {
        model_close(m);
        return false;
    }
    return true;
}

bool model_choose(Model *m, const char *engine, Precision precision, Error *err) {
    m->precision = precision;
    for (int i = 0; i < N_ENGINES && !m->engine; i++) {
        Error why = {""};
        if (engine && strcmp(engine, engines[i]->name) != 0) continue;
        if (engines[i]->usable(m, &why))
            m->engine = engines[i];
        else if (engine)
            return fail(err, "--engine %s: %s", engine, why.text);
        else if (!m->not_used.text[0])
            m->not_used = why;
    }
    return m->engine || fail(err, "--engine %s: this build has: %s", engine, model_engines());
}

bool model_start(Model *m, const char *engine, Precision precision, int n_slots, int max_len, Error *err) {
    const Config *c = &m->config;
    if (!model_choose(m, engine, precision, err)) return false;
    if (!kv_init(&m->kv, n_slots, max_len, err)) return false;
    m->rope_freq = malloc((size_t)c->head_dim / 2 * sizeof *m->rope_freq);
    if (!m->rope_freq) return fail(err, "out of memory: RoPE frequencies");
    rope_frequencies(c, m->rope_freq);
    return m->engine->open(m, err) && (m->file.n_tensors == 0 || safetensors_unchanged(&m->file, err));
}

bool model_forward(Model *m, const Batch *b, Error *err) {
    if (!kv_check_room(&m->kv, b, err)) return false;
    for (int first = 0; first < b->n_rows; first += m->max_rows) {
        BatchPart part;
        batch_part(b, first, b->n_rows - first < m->max_rows ? b->n_rows - first : m->max_rows, &part);
        if (model_interrupted(m)) return fail_interrupted(err);
        if (!m->engine->forward(m, &part.batch, part.first_logit, err)) return false;
        kv_append_batch(&m->kv, &part.batch);
        if (m->progress && b->n_rows > m->max_rows)
            m->progress("prefilling", (uint64_t)(first + part.batch.n_rows), (uint64_t)b->n_rows);
    }
    return true;
}

bool model_prefill(Model *m, int slot, const int *tokens, int n, int n_logits, Error *err) {
    int start[2] = {0, n}, rows[LOGIT_ROWS];
    for (int i = 0; i < n_logits; i++) rows[i] = n - n_logits + i;
    Batch batch = {.n_rows = n,
                   .n_seq = 1,
                   .n_logits = n_logits,
                   .tokens = tokens,
                   .slot = &slot,
                   .start = start,
                   .logit_rows = rows};
    return model_forward(m, &batch, err);
}

bool model_decode(Model *m, int slot, int token, Error *err) {
    static const int start[2] = {0, 1};
    Batch batch = {.n_rows = 1,
                   .n_seq = 1,
                   .n_logits = 1,
                   .decode = true,
                   .tokens = &token,
                   .slot = &slot,
                   .start = start,
                   .logit_rows = start};
    return model_forward(m, &batch, err);
}

void model_stop(Model *m) {
    if (m->engine) m->engine->close(m);
    free(m->rope_freq);
    kv_free(&m->kv);
    m->rope_freq = NULL;
    m->logits = NULL; // the engine's
}

void model_close(Model *m) {
    model_stop(m);
    safetensors_close(&m->file);
    tokenizer_free(&m->tokenizer);
    free(m->weights.layers);
    *m = (Model){.file.fd = -1};
}
