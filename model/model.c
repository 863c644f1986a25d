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

bool weights_visit(Model *m, WeightVisitor *visit, void *context, Error *err) {
    const Config *c = &m->config;
    Weights *w = &m->weights;
    uint64_t dim = (uint64_t)c->dim, hidden = (uint64_t)c->hidden_dim, vocab = (uint64_t)c->vocab_size;
    uint64_t q_dim = (uint64_t)c->n_heads * (uint64_t)c->head_dim,
             kv_dim = (uint64_t)c->n_kv_heads * (uint64_t)c->head_dim;
    if (!w->layers) w->layers = calloc((size_t)c->n_layers, sizeof *w->layers);
    if (!w->layers) return fail(err, "out of memory: %d layers", c->n_layers);

    if (!visit(context, "tok_embeddings", &w->tok_embeddings, vocab, dim, err)) return false;
    for (int i = 0; i < c->n_layers; i++) {
        LayerWeights *l = &w->layers[i];
        const struct {
            const char *name;
            const void **slot;
            uint64_t rows, cols;
        } parts[] = {
            {"attention_norm", (const void **)&l->attention_norm, dim, 0},
            {"wq", &l->wq, q_dim, dim},
            {"wk", &l->wk, kv_dim, dim},
            {"wv", &l->wv, kv_dim, dim},
            {"wo", &l->wo, dim, q_dim},
            {"ffn_norm", (const void **)&l->ffn_norm, dim, 0},
            {"w1", &l->w1, hidden, dim},
            {"w2", &l->w2, dim, hidden},
            {"w3", &l->w3, hidden, dim},
        };
        for (size_t p = 0; p < sizeof parts / sizeof *parts; p++) {
            char name[64];
            snprintf(name, sizeof name, "layers.%d.%s", i, parts[p].name);
            if (!visit(context, name, parts[p].slot, parts[p].rows, parts[p].cols, err)) return false;
        }
    }
    if (!visit(context, "norm", (const void **)&w->norm, dim, 0, err)) return false;
    if (!c->tie_embeddings) return visit(context, "output", &w->output, vocab, dim, err);
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

static void derive_dims(Config *c) {
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
    if (m->config.n_layers) derive_dims(&m->config);
    return true;
}

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

// Shapes of Meta's models, from their config.json.
static const struct {
    const char *name;
    int dim, hidden_dim, n_layers, n_heads, head_dim;
    float rope_factor;
    bool tied;
} shapes[] = {{"llama-3.2-1b", 2048, 8192, 16, 32, 64, 32, true},
              {"llama-3.2-3b", 3072, 8192, 28, 24, 128, 32, true},
              {"llama-3.1-8b", 4096, 14336, 32, 32, 128, 8, false},
              {"llama-3.1-70b", 8192, 28672, 80, 64, 128, 8, false}};
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

bool model_open_synthetic(Model *m, const char *shape, uint64_t seed, Error *err) {
    *m = (Model){.file.fd = -1, .seed = seed};
    for (int i = 0; i < N_SHAPES; i++) {
        if (strcmp(shape, shapes[i].name) != 0) continue;
        m->config = (Config){.dim = shapes[i].dim,
                             .hidden_dim = shapes[i].hidden_dim,
                             .n_layers = shapes[i].n_layers,
                             .n_heads = shapes[i].n_heads,
                             .n_kv_heads = 8,
                             .head_dim = shapes[i].head_dim,
                             .vocab_size = 128256,
                             .max_seq_len = 131072,
                             .norm_eps = 1e-5f,
                             .rope_theta = 500000,
                             .rope_type = ROPE_LLAMA3,
                             .rope_factor = shapes[i].rope_factor,
                             .rope_low_freq_factor = 1,
                             .rope_high_freq_factor = 4,
                             .rope_original_max_seq_len = 8192,
                             .tie_embeddings = shapes[i].tied,
                             .bos_id = -1};
        m->weights.dtype = DTYPE_BF16;
        derive_dims(&m->config);
        return byte_vocabulary(m, err);
    }
    return fail(err, "--synthetic %s: unknown shape, expected one of: %s", shape, model_shapes());
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
