#include "model.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

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

// ---- starting -------------------------------------------------------------------------------------------------------

void config_derive(Config *c) {
    c->q_dim = c->n_heads * c->head_dim;
    c->kv_dim = c->n_kv_heads * c->head_dim;
    c->group = c->n_heads / c->n_kv_heads;
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
    BatchPart part;
    for (int first = 0; first < b->n_rows; first += part.batch.n_rows) {
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
                   .n_decode = 1,
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
