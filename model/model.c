#include "model.h"

#include <inttypes.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "parallel/lead.h"
#include "parallel/processes.h"
#include "parallel/shard.h"
#include "quant.h"

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

const char *const precision_names[N_PRECISIONS] = {"bf16", "f32", "fp8"};

static bool check_fp8_weights(const Model *m, Error *err) {
    char name[MATRIX_NAME], type[QUANT_NAME];
    const Matrix *other = weights_not_fp8(m, name);
    return !other || fail(err, "--precision fp8 takes FP8 weights: %s is %s, expected fp8 as --quantize writes it",
                          name, quant_name(other, type));
}

bool model_choose(Model *m, const char *engine, Precision precision, Error *err) {
    const char *start = m->by_processes ? "mpirun -n" : "--gpus";
    if (precision == PRECISION_FP8 && !check_fp8_weights(m, err)) return false;
    if (m->gpus > 1 && !shard_check(&m->config, start, m->gpus, err)) return false;
    for (int i = 0; i < N_ENGINES && !m->engine; i++) {
        Error why = {""};
        m->precision = precision == PRECISION_DEFAULT ? engines[i]->precision : precision;
        if (engine && strcmp(engine, engines[i]->name) != 0) continue;
        if (engines[i]->usable(m, &why))
            m->engine = engines[i];
        else if (engine)
            return fail(err, "--engine %s: %s", engine, why.text);
        else if (!m->not_used.text[0])
            m->not_used = why;
    }
    if (m->engine) {
        m->precision = precision == PRECISION_DEFAULT ? m->engine->precision : precision;
        if (m->by_processes && processes.rank == 0) m->engine = lead_engine(m->engine);
        return true;
    }
    // engine cpu is usable for all that one GPU is asked for but FP8 products
    if (!engine && precision == PRECISION_FP8) return fail(err, "--precision fp8: %s", m->not_used.text);
    if (!engine) return fail(err, "%s %d: %s", start, m->gpus, m->not_used.text);
    return fail(err, "--engine %s: this build has: %s", engine, model_engines());
}

bool model_start(Model *m, const char *engine, Precision precision, int n_slots, int max_len, Error *err) {
    const Config *c = &m->config;
    if (!model_choose(m, engine, precision, err)) return false;
    m->shard = shard_of(c, m->by_processes ? processes.rank : 0, m->gpus > 1 ? m->gpus : 1);
    m->kv = (KVCache){.n_slots = n_slots, .max_len = max_len};
    m->rope_freq = malloc((size_t)c->head_dim / 2 * sizeof *m->rope_freq);
    if (!m->rope_freq) return fail(err, "out of memory: RoPE frequencies");
    rope_frequencies(c, m->rope_freq);
    return m->engine->open(m, err) && (m->file.n_tensors == 0 || safetensors_unchanged(&m->file, err));
}

uint64_t cache_page_bytes(const Config *c, size_t element_bytes) {
    return 2 * (uint64_t)c->n_layers * kv_page_elements(c->n_kv_heads, c->head_dim) * element_bytes;
}

bool model_size_cache(Model *m, size_t element_bytes, int64_t pages, Error *err) {
    uint64_t page = cache_page_bytes(&m->config, element_bytes);
    if (m->kv_memory) pages = m->kv_memory / page < INT_MAX ? (int64_t)(m->kv_memory / page) : INT_MAX;
    if (m->kv_memory && pages == 0)
        return fail(err, "--kv-memory %" PRIu64 ": expected at least %" PRIu64 ", the bytes of a page of %d positions",
                    m->kv_memory, page, KV_PAGE);
    if (!kv_init(&m->kv, m->kv.n_slots, m->kv.max_len, pages, err)) return false;
    m->kv.bytes = (uint64_t)m->kv.n_pages * page;
    return true;
}

bool model_forward(Model *m, const Batch *b, Error *err) {
    if (!kv_reserve_batch(&m->kv, b, err)) return false;
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

// ---- pages that leave and come back ---------------------------------------------------------------------------------

// Host memory for a page: what an earlier one has given back, or new.
static void *take_host_page(Model *m) {
    if (m->n_spare_pages) return m->spare_pages[--m->n_spare_pages];
    return m->engine->allocate_host((size_t)model_page_bytes(m));
}

// (A GPU may still read it: whatever it is used for next comes after that.)
static void give_host_page(Model *m, void *page) {
    if (m->n_spare_pages == m->max_spare_pages) {
        int most = m->max_spare_pages ? 2 * m->max_spare_pages : 64;
        void **more = realloc(m->spare_pages, (size_t)most * sizeof *more);
        if (!more) {
            m->engine->free_host(page);
            return;
        }
        m->spare_pages = more;
        m->max_spare_pages = most;
    }
    m->spare_pages[m->n_spare_pages++] = page;
}

void model_free_pages(Model *m, SavedPages *saved) {
    for (int i = 0; i < saved->n; i++) give_host_page(m, saved->pages[i]);
    free(saved->pages);
    *saved = (SavedPages){0};
}

bool model_save_pages(Model *m, int slot, SavedPages *saved, Error *err) {
    int len = m->kv.len[slot], n = kv_pages(len);
    *saved = (SavedPages){.len = len, .pages = calloc((size_t)n + 1, sizeof *saved->pages)};
    bool ok = saved->pages != NULL;
    while (ok && saved->n < n) {
        saved->pages[saved->n] = take_host_page(m);
        ok = saved->pages[saved->n] != NULL;
        saved->n += ok;
    }
    if (!ok)
        fail(err, "out of memory: %.3f MB of keys and values of %d positions", (double)model_page_bytes(m) * n * 1e-6,
             len);
    ok = ok && m->engine->copy_pages(m, kv_slot_pages(&m->kv, slot), n, saved->pages, true, err);
    if (ok)
        kv_reset(&m->kv, slot);
    else
        model_free_pages(m, saved);
    return ok;
}

bool model_restore_pages(Model *m, int slot, SavedPages *saved, Error *err) {
    kv_reset(&m->kv, slot);
    if (!kv_reserve(&m->kv, slot, saved->len))
        return fail(err, "K/V cache, in pages of %d positions: %d needed, %d of %d are free", KV_PAGE, saved->n,
                    kv_free_pages(&m->kv), m->kv.n_pages);
    if (!m->engine->copy_pages(m, kv_slot_pages(&m->kv, slot), saved->n, saved->pages, false, err)) return false;
    kv_append(&m->kv, slot, saved->len);
    model_free_pages(m, saved);
    return true;
}

// ---- the end --------------------------------------------------------------------------------------------------------

void model_stop(Model *m) {
    while (m->n_spare_pages) m->engine->free_host(m->spare_pages[--m->n_spare_pages]);
    free(m->spare_pages);
    m->spare_pages = NULL;
    m->max_spare_pages = 0;
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
