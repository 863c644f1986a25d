// The LLaMA 3 forward pass on the CPU, one step a line: read this file to understand the model.
// (Touvron et al. 2023; Grattafiori et al. 2024. The names are those of llama2.c and Meta's own code.)
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "bench.h"
#include "checkpoint.h"
#include "model.h"
#include "ops_cpu.h"
#include "sampler.h"
#include "synthetic.h"

enum { MAX_TOKENS = 512 }; // the weights are read once for so many tokens of a prompt

typedef struct {
    const Ops *ops;
    float *x;         // [T][dim]: the residual stream
    float *xb;        // [T][dim]: normalised, or what a block adds
    float *q;         // [T][q_dim]
    float *k, *v;     // [T][kv_dim]: the new tokens', before they go to the cache
    float *att;       // [T][q_dim]: what attention gives
    float *hb, *hb2;  // [T][hidden_dim]: gate and up
    float *cos, *sin; // [T][head_dim/2]: the angles of these positions
    int *pos;         // [T]
    char *weights;
} CpuState;

// ---- one part of a batch --------------------------------------------------------------------------------------------

// The position of every row: behind what its sequence has.
static void row_positions(const Model *m, const Batch *b, int *pos) {
    for (int i = 0; i < b->n_seq; i++)
        for (int r = b->start[i]; r < b->start[i + 1]; r++) pos[r] = m->kv.len[b->slot[i]] + r - b->start[i];
}

// The angle is the float32 product position × frequency, as HuggingFace computes it, then accurately its cosine and
// sine.
static void rope_angles(const Model *m, CpuState *s, int T) {
    int half = m->config.head_dim / 2;
    for (int t = 0; t < T; t++)
        for (int i = 0; i < half; i++) {
            float angle = (float)s->pos[t] * m->rope_freq[i];
            s->cos[t * half + i] = (float)cos((double)angle);
            s->sin[t * half + i] = (float)sin((double)angle);
        }
}

// src[T][n_kv_heads][head_dim] to positions pos .. pos+T-1 of cache[n_kv_heads][max_len][head_dim], one slot of one
// layer.
static void cache_append(const Model *m, float *cache, const float *src, int pos, int T) {
    size_t head_dim = (size_t)m->config.head_dim, stream = (size_t)m->kv.max_len * head_dim;
    for (int t = 0; t < T; t++)
        for (int h = 0; h < m->config.n_kv_heads; h++, src += head_dim)
            memcpy(cache + (size_t)h * stream + (size_t)(pos + t) * head_dim, src, head_dim * sizeof *src);
}

// Every sequence's new tokens into its slot, then every token attends to itself and to all before it.
static void attend(Model *m, CpuState *s, const Batch *b, int layer) {
    const Config *c = &m->config;
    for (int i = 0; i < b->n_seq; i++) {
        size_t slot = kv_elements(layer, m->kv.n_slots, c->n_kv_heads, m->kv.max_len, c->head_dim) +
                      kv_elements(1, b->slot[i], c->n_kv_heads, m->kv.max_len, c->head_dim);
        float *k = (float *)m->kv.k + slot, *v = (float *)m->kv.v + slot;
        int pos = m->kv.len[b->slot[i]], T = b->start[i + 1] - b->start[i];
        size_t q_row = (size_t)b->start[i] * (size_t)c->q_dim, kv_row = (size_t)b->start[i] * (size_t)c->kv_dim;
        cache_append(m, k, s->k + kv_row, pos, T);
        cache_append(m, v, s->v + kv_row, pos, T);
        s->ops->attention(s->att + q_row, s->q + q_row, k, v, T, pos, c->n_heads, c->n_kv_heads, c->head_dim,
                          m->kv.max_len);
    }
}

static void add(float *x, const float *y, size_t n) {
    for (size_t i = 0; i < n; i++) x[i] += y[i];
}

// The rows of a batch, after what their sequences have; rows of prompts and of steps alike.
static bool forward_cpu(Model *m, const Batch *b, int first_logit, Error *err) {
    const Config *c = &m->config;
    const Weights *w = &m->weights;
    CpuState *s = m->state;
    const Ops *ops = s->ops;
    int T = b->n_rows, vocab = c->vocab_size;
    const Matrix *table = &w->tok_embeddings;
    size_t dim = (size_t)c->dim, table_row = matrix_row_bytes(table);

    // token ids to vectors
    for (int t = 0; t < T; t++)
        ops->widen(s->x + (size_t)t * dim, (const char *)table->data + (size_t)b->tokens[t] * table_row, table->dtype,
                   c->dim);
    row_positions(m, b, s->pos);
    rope_angles(m, s, T);

    for (int i = 0; i < c->n_layers; i++) {
        const LayerWeights *l = &w->layers[i];
        if (model_interrupted(m)) return fail_interrupted(err);

        // attention: queries, keys and values of the normalised stream
        ops->rmsnorm(s->xb, s->x, l->attention_norm, c->norm_eps, T, c->dim);
        ops->matmul(s->q, s->xb, &l->wq, T);
        ops->matmul(s->k, s->xb, &l->wk, T);
        ops->matmul(s->v, s->xb, &l->wv, T);
        // positions, as rotations of pairs
        ops->rope(s->q, s->cos, s->sin, T, c->n_heads, c->head_dim);
        ops->rope(s->k, s->cos, s->sin, T, c->n_kv_heads, c->head_dim);
        attend(m, s, b, i);
        // back to the stream
        ops->matmul(s->xb, s->att, &l->wo, T);
        add(s->x, s->xb, (size_t)T * dim);

        // feed-forward: down(silu(gate) * up)
        ops->rmsnorm(s->xb, s->x, l->ffn_norm, c->norm_eps, T, c->dim);
        ops->matmul(s->hb, s->xb, &l->w1, T);
        ops->matmul(s->hb2, s->xb, &l->w3, T);
        ops->swiglu(s->hb, s->hb2, (int64_t)T * c->hidden_dim);
        ops->matmul(s->xb, s->hb, &l->w2, T);
        add(s->x, s->xb, (size_t)T * dim);
    }

    // logits of the rows that were asked for
    if (b->n_logits == 0) return true;
    for (int i = 0; i < b->n_logits; i++)
        ops->rmsnorm(s->xb + (size_t)i * dim, s->x + (size_t)b->logit_rows[i] * dim, w->norm, c->norm_eps, 1, c->dim);
    float *logits = m->logits + (size_t)first_logit * (size_t)vocab;
    ops->matmul(logits, s->xb, &w->output, b->n_logits);
    for (int i = 0; i < b->n_logits; i++, logits += vocab)
        m->argmax[first_logit + i] = find_not_finite(logits, vocab) < 0 ? argmax(logits, vocab) : -1;
    return true;
}

// ---- the engine -----------------------------------------------------------------------------------------------------

static bool read_logits_cpu(Model *m, Error *err) { // they are there already
    (void)m, (void)err;
    return true;
}

// Memory for weights: on large pages, for a token walks through all of it.
static char *allocate_weights(uint64_t bytes) {
    enum { HUGE_PAGE = 2 << 20 };
    void *p;
    if (posix_memalign(&p, HUGE_PAGE, bytes ? bytes : 1) != 0) return NULL;
    madvise(p, bytes, MADV_HUGEPAGE); // a hint: without it everything works, a little slower
    return p;
}

// WeightVisitors for a synthetic model: the first measures, the second makes the tensors.
typedef struct {
    const Model *model;
    char *base;
    SyntheticCursor cursor;
} Synthesis;

static bool measure_synthetic(void *context, const Weight *w, Error *err) {
    (void)err;
    synthetic_next(&((Synthesis *)context)->cursor, w);
    return true;
}

static bool make_synthetic(void *context, const Weight *w, Error *err) {
    Synthesis *y = context;
    SyntheticTensor t = synthetic_next(&y->cursor, w);
    if (model_interrupted(y->model)) return fail_interrupted(err);
    if (!w->matrix) {
        float *norm = (float *)(y->base + t.at);
        for (int i = 0; i < w->n; i++) norm[i] = 1.0f;
        *w->norm = norm;
        return true;
    }
    uint16_t *data = (uint16_t *)(y->base + t.at);
    int64_t n = (int64_t)w->matrix->rows * w->matrix->cols;
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < n; i++) data[i] = (uint16_t)(synthetic_bits((uint64_t)i, t.salt, t.range) >> 16);
    w->matrix->data = data;
    w->matrix->dtype = DTYPE_BF16;
    return true;
}

static bool load_weights(Model *m, CpuState *s, Error *err) {
    Synthesis y = {.model = m, .cursor = {.seed = m->seed}};
    if (model_is_synthetic(m)) {
        if (!weights_visit(m, measure_synthetic, &y, err)) return false;
        m->weights.bytes = y.cursor.at;
    }
    s->weights = y.base = allocate_weights(m->weights.bytes);
    if (!s->weights)
        return fail(err, "out of memory: %.2f GB of weights, this machine has %.2f GB in all",
                    (double)m->weights.bytes * 1e-9,
                    (double)sysconf(_SC_PHYS_PAGES) * (double)sysconf(_SC_PAGESIZE) * 1e-9);
    if (!model_is_synthetic(m)) return checkpoint_load(m, s->weights, err);
    y.cursor.at = 0;
    return weights_visit(m, make_synthetic, &y, err);
}

static bool allocate_state(Model *m, CpuState *s, Error *err) {
    const Config *c = &m->config;
    int widest = c->dim > c->q_dim ? c->dim : c->q_dim;
    size_t positions = (size_t)m->kv.n_slots * (size_t)m->kv.max_len;
    m->max_rows = positions < MAX_TOKENS ? (int)positions : MAX_TOKENS;
    size_t logit_rows = positions < LOGIT_ROWS ? positions : LOGIT_ROWS;
    size_t kv = kv_elements(c->n_layers, m->kv.n_slots, c->n_kv_heads, m->kv.max_len, c->head_dim);
    m->kv.bytes = 2 * kv * sizeof(float);
    const struct {
        float **buffer;
        size_t rows, columns;
    } buffers[] = {{&s->x, (size_t)m->max_rows, (size_t)c->dim},
                   {&s->xb, (size_t)m->max_rows, (size_t)widest},
                   {&s->q, (size_t)m->max_rows, (size_t)c->q_dim},
                   {&s->k, (size_t)m->max_rows, (size_t)c->kv_dim},
                   {&s->v, (size_t)m->max_rows, (size_t)c->kv_dim},
                   {&s->att, (size_t)m->max_rows, (size_t)c->q_dim},
                   {&s->hb, (size_t)m->max_rows, (size_t)c->hidden_dim},
                   {&s->hb2, (size_t)m->max_rows, (size_t)c->hidden_dim},
                   {&s->cos, (size_t)m->max_rows, (size_t)c->head_dim / 2},
                   {&s->sin, (size_t)m->max_rows, (size_t)c->head_dim / 2},
                   {(float **)&s->pos, (size_t)m->max_rows, sizeof *s->pos / sizeof(float)},
                   {&m->logits, logit_rows, (size_t)c->vocab_size},
                   {(float **)&m->kv.k, 1, kv},
                   {(float **)&m->kv.v, 1, kv}};
    for (size_t i = 0; i < sizeof buffers / sizeof *buffers; i++) {
        size_t bytes;
        if (!__builtin_mul_overflow(buffers[i].rows * sizeof(float), buffers[i].columns, &bytes))
            *buffers[i].buffer = malloc(bytes);
        if (!*buffers[i].buffer)
            return fail(
                err,
                "out of memory: %.3f GB for %d contexts of %d (their cache takes %.3f GB in all); try a smaller -c",
                (double)buffers[i].rows * (double)buffers[i].columns * 4e-9, m->kv.n_slots, m->kv.max_len,
                (double)m->kv.bytes * 1e-9);
        m->buffer_bytes += bytes;
    }
    m->buffer_bytes -= m->kv.bytes;
    return true;
}

static bool usable_cpu(const Model *m, Error *err) { // always
    (void)m, (void)err;
    return true;
}

static int count_threads(void) {
    int n = 0;
#pragma omp parallel reduction(+ : n)
    n++;
    return n;
}

static bool open_cpu(Model *m, Error *err) {
    CpuState *s = m->state = calloc(1, sizeof *s);
    if (!s) return fail(err, "out of memory: the engine's state");
    s->ops = ops_select();
    snprintf(m->note, sizeof m->note, "%s, %d threads", s->ops->name, count_threads());
    m->precision = PRECISION_F32; // always: there is nothing to gain here from less
    return allocate_state(m, s, err) && load_weights(m, s, err);
}

static void close_cpu(Model *m) {
    CpuState *s = m->state;
    if (!s) return;
    float *buffers[] = {s->x,   s->xb,           s->q,      s->k,    s->v,   s->att, s->hb, s->hb2, s->cos,
                        s->sin, (float *)s->pos, m->logits, m->kv.k, m->kv.v};
    for (size_t i = 0; i < sizeof buffers / sizeof *buffers; i++) free(buffers[i]);
    free(s->weights);
    free(s);
    m->state = NULL;
}

const Engine engine_cpu = {"cpu", usable_cpu, open_cpu, close_cpu, forward_cpu, read_logits_cpu, &machine_cpu};
