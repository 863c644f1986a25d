// The LLaMA 3 forward pass on the CPU, one step a line: read this file to understand the model.
// (Touvron et al. 2023; Grattafiori et al. 2024. The names are those of llama2.c and Meta's own code.)
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "checkpoint.h"
#include "model.h"
#include "ops_cpu.h"

enum { MAX_TOKENS = 512 }; // the weights are read once for so many tokens of a prompt

typedef struct {
    const Ops *ops;
    int max_tokens;
    float *x;         // [T][dim]: the residual stream
    float *xb;        // [T][dim]: normalised, or what a block adds
    float *q;         // [T][q_dim]
    float *k, *v;     // [T][kv_dim]: the new tokens', before they go to the cache
    float *att;       // [T][q_dim]: what attention gives
    float *hb, *hb2;  // [T][hidden_dim]: gate and up
    float *cos, *sin; // [T][head_dim/2]: the angles of these positions
    char *weights;
} CpuState;

// ---- one block of tokens --------------------------------------------------------------------------------------------

// The angle is the float32 product position × frequency, as HuggingFace computes it, then accurately its cosine and sine.
static void rope_angles(const Model *m, CpuState *s, int pos, int T) {
    int half = m->config.head_dim / 2;
    for (int t = 0; t < T; t++)
        for (int i = 0; i < half; i++) {
            float angle = (float)(pos + t) * m->rope_freq[i];
            s->cos[t * half + i] = (float)cos((double)angle);
            s->sin[t * half + i] = (float)sin((double)angle);
        }
}

// src[T][n_kv_heads][head_dim] to positions pos .. pos+T-1 of a layer's cache.
static void cache_append(const Model *m, void *cache, const float *src, int layer, int pos, int T) {
    const Config *c = &m->config;
    for (int t = 0; t < T; t++)
        for (int h = 0; h < c->n_kv_heads; h++, src += c->head_dim) {
            size_t at = kv_index(layer, h, c->n_kv_heads, m->kv.max_len, c->head_dim);
            memcpy((float *)cache + at + (size_t)(pos + t) * (size_t)c->head_dim, src, (size_t)c->head_dim * sizeof *src);
        }
}

static void add(float *x, const float *y, size_t n) {
    for (size_t i = 0; i < n; i++) x[i] += y[i];
}

// Tokens [T] at positions kv.len on; T = 1 is decode. Leaves the logits of the last n_logits in m->logits.
static void forward(Model *m, const int *tokens, int T, int n_logits) {
    const Config *c = &m->config;
    const Weights *w = &m->weights;
    CpuState *s = m->state;
    const Ops *ops = s->ops;
    int pos = m->kv.len;
    size_t element = (size_t)dtype_bytes[w->dtype];

    // token ids to vectors
    for (int t = 0; t < T; t++)
        ops->widen(s->x + (size_t)t * (size_t)c->dim,
                   (const char *)w->tok_embeddings + (size_t)tokens[t] * (size_t)c->dim * element, w->dtype, c->dim);
    rope_angles(m, s, pos, T);

    for (int i = 0; i < c->n_layers; i++) {
        const LayerWeights *l = &w->layers[i];
        size_t layer = kv_index(i, 0, c->n_kv_heads, m->kv.max_len, c->head_dim);

        // attention: queries, keys and values of the normalised stream
        ops->rmsnorm(s->xb, s->x, l->attention_norm, c->norm_eps, T, c->dim);
        ops->matmul(s->q, s->xb, l->wq, w->dtype, T, c->q_dim, c->dim);
        ops->matmul(s->k, s->xb, l->wk, w->dtype, T, c->kv_dim, c->dim);
        ops->matmul(s->v, s->xb, l->wv, w->dtype, T, c->kv_dim, c->dim);
        // positions, as rotations of pairs
        ops->rope(s->q, s->cos, s->sin, T, c->n_heads, c->head_dim);
        ops->rope(s->k, s->cos, s->sin, T, c->n_kv_heads, c->head_dim);
        // every token attends to itself and to all before it
        cache_append(m, m->kv.k, s->k, i, pos, T);
        cache_append(m, m->kv.v, s->v, i, pos, T);
        ops->attention(s->att, s->q, (float *)m->kv.k + layer, (float *)m->kv.v + layer, T, pos, c->n_heads, c->n_kv_heads,
                       c->head_dim, m->kv.max_len);
        // back to the stream
        ops->matmul(s->xb, s->att, l->wo, w->dtype, T, c->dim, c->q_dim);
        add(s->x, s->xb, (size_t)T * (size_t)c->dim);

        // feed-forward: down(silu(gate) * up)
        ops->rmsnorm(s->xb, s->x, l->ffn_norm, c->norm_eps, T, c->dim);
        ops->matmul(s->hb, s->xb, l->w1, w->dtype, T, c->hidden_dim, c->dim);
        ops->matmul(s->hb2, s->xb, l->w3, w->dtype, T, c->hidden_dim, c->dim);
        ops->swiglu(s->hb, s->hb2, (int64_t)T * c->hidden_dim);
        ops->matmul(s->xb, s->hb, l->w2, w->dtype, T, c->dim, c->hidden_dim);
        add(s->x, s->xb, (size_t)T * (size_t)c->dim);
    }
    m->kv.len += T;

    // logits of the tokens that were asked for
    if (n_logits == 0) return;
    ops->rmsnorm(s->xb, s->x + (size_t)(T - n_logits) * (size_t)c->dim, w->norm, c->norm_eps, n_logits, c->dim);
    ops->matmul(m->logits, s->xb, w->output, w->dtype, n_logits, c->vocab_size, c->dim);
}

// ---- the engine -----------------------------------------------------------------------------------------------------

static bool prefill_cpu(Model *m, const int *tokens, int T, int n_logits, Error *err) {
    CpuState *s = m->state;
    if (T > m->kv.max_len - m->kv.len)
        return fail(err, "%d more tokens after %d, the context holds %d", T, m->kv.len, m->kv.max_len);
    // The last block is the one that gives logits: it must hold all the rows that were asked for.
    while (T > 0) {
        int n = T <= s->max_tokens ? T : T - s->max_tokens < n_logits ? T - n_logits : s->max_tokens;
        forward(m, tokens, n, n == T ? n_logits : 0);
        tokens += n;
        T -= n;
    }
    return true;
}

static bool decode_cpu(Model *m, int token, Error *err) {
    return prefill_cpu(m, &token, 1, 1, err);
}

// Memory for weights: on large pages, for a token walks through all of it.
static char *allocate_weights(uint64_t bytes) {
    enum { HUGE_PAGE = 2 << 20 };
    void *p;
    if (posix_memalign(&p, HUGE_PAGE, bytes ? bytes : 1) != 0) return NULL;
    madvise(p, bytes, MADV_HUGEPAGE); // a hint: without it everything works, a little slower
    return p;
}

// WeightVisitors for a synthetic model: the first lays the tensors out, the second fills them.
typedef struct {
    char *base;
    uint64_t at, seed;
    DType dtype;
} Synthesis;

static uint64_t synthetic_bytes(const Synthesis *y, uint64_t rows, uint64_t cols) {
    uint64_t bytes = cols ? rows * cols * (uint64_t)dtype_bytes[y->dtype] : rows * sizeof(float);
    return (bytes + 63) / 64 * 64;
}

static bool lay_out(void *context, const char *name, const void **slot, uint64_t rows, uint64_t cols, Error *err) {
    (void)name, (void)slot, (void)err;
    Synthesis *y = context;
    y->at += synthetic_bytes(y, rows, cols);
    return true;
}

// Norms of one; matrices uniform with a standard deviation of 1.7/√cols, so that attention has something to tell apart.
// Element i of a tensor depends on the seed, the tensor's place and i alone.
static bool synthesize(void *context, const char *name, const void **slot, uint64_t rows, uint64_t cols, Error *err) {
    (void)name, (void)err;
    Synthesis *y = context;
    char *to = y->base + y->at;
    *slot = to;
    if (!cols)
        for (uint64_t i = 0; i < rows; i++) ((float *)to)[i] = 1.0f;
    float range = 2 * 1.7f * 1.7320508f / sqrtf((float)(cols ? cols : 1));
    uint32_t salt = (uint32_t)((y->seed + y->at) * 0x9E3779B97F4A7C15u >> 32);
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < (int64_t)(rows * cols); i++) {
        uint32_t h = ((uint32_t)i + salt) * 0x9E3779B1u; // lowbias32, a mix of 32 bits (Wellons 2018)
        h = (h ^ h >> 16) * 0x21F0AAADu;
        h = (h ^ h >> 15) * 0xD35A2D97u;
        float value = ((float)(h >> 8) * 0x1p-24f - 0.5f) * range;
        uint32_t bits;
        memcpy(&bits, &value, sizeof bits);
        ((uint16_t *)to)[i] = (uint16_t)(bits >> 16);
    }
    y->at += synthetic_bytes(y, rows, cols);
    return true;
}

static bool load_weights(Model *m, CpuState *s, Error *err) {
    Synthesis y = {.seed = m->seed, .dtype = m->weights.dtype};
    bool synthetic = m->file.n_tensors == 0;
    if (synthetic) {
        if (!weights_visit(m, lay_out, &y, err)) return false;
        m->weights.bytes = y.at;
    }
    s->weights = y.base = allocate_weights(m->weights.bytes);
    if (!s->weights) return fail(err, "out of memory: %.2f GB of weights", (double)m->weights.bytes * 1e-9);
    if (!synthetic) return checkpoint_load(m, s->weights, err);
    y.at = 0;
    return weights_visit(m, synthesize, &y, err);
}

static bool allocate_state(Model *m, CpuState *s, Error *err) {
    const Config *c = &m->config;
    s->max_tokens = m->kv.max_len < MAX_TOKENS ? m->kv.max_len : MAX_TOKENS;
    int widest = c->dim > c->q_dim ? c->dim : c->q_dim;
    size_t logit_rows = s->max_tokens < LOGIT_ROWS ? (size_t)s->max_tokens : LOGIT_ROWS;
    size_t kv = kv_index(c->n_layers, 0, c->n_kv_heads, m->kv.max_len, c->head_dim);
    const struct {
        float **buffer;
        size_t rows, columns;
    } buffers[] = {{&s->x, (size_t)s->max_tokens, (size_t)c->dim},
                   {&s->xb, (size_t)s->max_tokens, (size_t)widest},
                   {&s->q, (size_t)s->max_tokens, (size_t)c->q_dim},
                   {&s->k, (size_t)s->max_tokens, (size_t)c->kv_dim},
                   {&s->v, (size_t)s->max_tokens, (size_t)c->kv_dim},
                   {&s->att, (size_t)s->max_tokens, (size_t)c->q_dim},
                   {&s->hb, (size_t)s->max_tokens, (size_t)c->hidden_dim},
                   {&s->hb2, (size_t)s->max_tokens, (size_t)c->hidden_dim},
                   {&s->cos, (size_t)s->max_tokens, (size_t)c->head_dim / 2},
                   {&s->sin, (size_t)s->max_tokens, (size_t)c->head_dim / 2},
                   {&m->logits, logit_rows, (size_t)c->vocab_size},
                   {(float **)&m->kv.k, 1, kv},
                   {(float **)&m->kv.v, 1, kv}};
    for (size_t i = 0; i < sizeof buffers / sizeof *buffers; i++) {
        size_t bytes;
        if (!__builtin_mul_overflow(buffers[i].rows * sizeof(float), buffers[i].columns, &bytes))
            *buffers[i].buffer = malloc(bytes);
        if (!*buffers[i].buffer)
            return fail(err, "out of memory: %.3f GB for a context of %d (the cache takes %.3f GB in all); try a smaller -c",
                        (double)buffers[i].rows * (double)buffers[i].columns * 4e-9, m->kv.max_len, (double)kv * 8e-9);
    }
    return true;
}

static bool open_cpu(Model *m, Error *err) {
    CpuState *s = m->state = calloc(1, sizeof *s);
    if (!s) return fail(err, "out of memory: the engine's state");
    s->ops = ops_select();
    m->precision = PRECISION_F32; // always: there is nothing to gain here from less
    return allocate_state(m, s, err) && load_weights(m, s, err);
}

static void close_cpu(Model *m) {
    CpuState *s = m->state;
    if (!s) return;
    float *buffers[] = {s->x, s->xb, s->q, s->k, s->v, s->att, s->hb, s->hb2, s->cos, s->sin, m->logits, m->kv.k, m->kv.v};
    for (size_t i = 0; i < sizeof buffers / sizeof *buffers; i++) free(buffers[i]);
    free(s->weights);
    free(s);
    m->state = NULL;
}

const Engine engine_cpu = {"cpu", open_cpu, close_cpu, prefill_cpu, decode_cpu};
