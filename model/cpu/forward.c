// The LLaMA 3 forward pass on the CPU, one step a line: read this file to understand the model.
// (Touvron et al. 2023; Grattafiori et al. 2024. The names are those of llama2.c and Meta's own code.)
// model/cuda/forward.cu has the same steps under the same names.
#include <math.h>
#include <string.h>

#include "../logits.h"
#include "../threads.h"
#include "state.h"

// The position of every row: after what its sequence has.
static void row_positions(const Model *m, const Batch *b, int *pos) {
    for (int i = 0; i < b->n_seq; i++)
        for (int r = b->start[i]; r < b->start[i + 1]; r++) pos[r] = m->kv.len[b->slot[i]] + r - b->start[i];
}

// Cosine and sine for each position. The angle is the float32 product position × frequency, as HuggingFace computes it,
// then accurately its cosine and sine.
static void rope_table(const Model *m, CpuState *s, int T) {
    int half = m->config.head_dim / 2;
    for (int t = 0; t < T; t++)
        for (int i = 0; i < half; i++) {
            float angle = (float)s->pos[t] * m->rope_freq[i];
            s->cos[t * half + i] = (float)cos((double)angle);
            s->sin[t * half + i] = (float)sin((double)angle);
        }
}

// The new tokens of a sequence: their keys and values [.][n_kv_heads][head_dim], and where they go, one layer's cache
// as attention reads it, from position pos on.
typedef struct {
    const CpuState *s;
    const float *k, *v;
    char *k_cache, *v_cache;
    const int *pages;
    size_t page_stride; // in elements
    int pos, n_kv_heads, head_dim;
} Append;

// One token's keys or values, to `at` elements after the beginning of the cache, and the same of each head.
static void append_row(const Append *a, char *cache, size_t at, const float *src) {
    const size_t head_dim = (size_t)a->head_dim, element = (size_t)dtype_bytes[a->s->cache];
    char *to = cache + at * element;
    for (int h = 0; h < a->n_kv_heads; h++, src += head_dim, to += KV_PAGE * head_dim * element)
        if (a->s->cache == DTYPE_F32)
            memcpy(to, src, head_dim * sizeof *src);
        else
            a->s->ops->narrow(to, src, a->s->cache, (int64_t)head_dim);
}

static void append_part(void *whole, int64_t begin, int64_t end) {
    const Append *a = whole;
    for (int64_t i = begin; i < end; i++) {
        const int t = a->pos + (int)i;
        const size_t at = (size_t)a->pages[t / KV_PAGE] * a->page_stride + (size_t)(t % KV_PAGE * a->head_dim),
                     row = (size_t)i * (size_t)(a->n_kv_heads * a->head_dim);
        append_row(a, a->k_cache, at, a->k + row);
        append_row(a, a->v_cache, at, a->v + row);
    }
}

// Every sequence's new tokens into its slot, then every token attends to itself and to all before it.
static void attend(Model *m, CpuState *s, const Batch *b, int layer) {
    const Config *c = &m->config;
    size_t of_layer = kv_page_elements(c->n_kv_heads, c->head_dim), page_stride = (size_t)c->n_layers * of_layer,
           at = (size_t)layer * of_layer * (size_t)dtype_bytes[s->cache];
    char *k = (char *)m->kv.k + at, *v = (char *)m->kv.v + at;
    for (int i = 0; i < b->n_seq; i++) {
        const int *pages = kv_slot_pages(&m->kv, b->slot[i]);
        int pos = m->kv.len[b->slot[i]], T = b->start[i + 1] - b->start[i];
        size_t q_row = (size_t)b->start[i] * (size_t)c->q_dim, kv_row = (size_t)b->start[i] * (size_t)c->kv_dim;
        Append new = {s, s->k + kv_row, s->v + kv_row, k, v, pages, page_stride, pos, c->n_kv_heads, c->head_dim};
        parallel_for(T, KV_PAGE, append_part, &new); // (memory is cleared by who first writes it: worth sharing)
        (i < b->n_decode ? s->ops->attention_step : s->ops->attention)(s->att + q_row, s->q + q_row, k, v, s->cache,
                                                                       pages, page_stride, T, pos, c->n_heads,
                                                                       c->n_kv_heads, c->head_dim);
    }
}

// x = the embedding of each token, widened; of F32 in --precision bf16 rounded, as the weights in memory are.
static bool embed(const Model *m, CpuState *s, const int *tokens, int T, Error *err) {
    const Matrix *table = &m->weights.tok_embeddings;
    const bool round = m->precision == PRECISION_BF16 && table->dtype == DTYPE_F32;
    for (int t = 0; t < T; t++) {
        const void *row = embedding_row(m, tokens[t], err);
        if (!row) return false;
        float *x = s->x + (size_t)t * (size_t)table->cols;
        s->ops->widen(x, row, table->dtype, table->cols);
        if (round) s->ops->round(x, DTYPE_BF16, table->cols);
    }
    return true;
}

// x [n] before products by w, in --precision bf16: rounded to what w is computed with, f16 or bf16.
static void round_inputs(const Model *m, float *x, const Matrix *w, int64_t n) {
    const CpuState *s = m->state;
    if (m->precision == PRECISION_BF16) s->ops->round(x, w->dtype == DTYPE_F16 ? DTYPE_F16 : DTYPE_BF16, n);
}

// Logits of the rows that were asked for, into model->logits from row first_logit on, and the most likely token of
// each.
static void lm_head(Model *m, CpuState *s, const Batch *b, int first_logit) {
    const Config *c = &m->config;
    size_t dim = (size_t)c->dim, vocab = (size_t)c->vocab_size;
    if (b->n_logits == 0) return;
    for (int i = 0; i < b->n_logits; i++)
        s->ops->rmsnorm(s->xb + (size_t)i * dim, s->x + (size_t)b->logit_rows[i] * dim, m->weights.norm, c->norm_eps, 1,
                        c->dim);
    float *logits = m->logits + (size_t)first_logit * vocab;
    round_inputs(m, s->xb, &m->weights.output, (int64_t)b->n_logits * c->dim);
    if (m->watch_inputs) m->watch_inputs(m->watch_context, &m->weights.output, s->xb, b->n_logits);
    (m->precision == PRECISION_BF16 ? s->ops->matmul_step_bf16 : s->ops->matmul_step)(logits, s->xb, &m->weights.output,
                                                                                      b->n_logits);
    for (int i = 0; i < b->n_logits; i++, logits += vocab)
        m->argmax[first_logit + i] = find_not_finite(logits, c->vocab_size) < 0 ? argmax(logits, c->vocab_size) : -1;
}

// y[T][rows] = x[T][cols] · wᵀ for the rows of a batch: the order of a row's sums depends on whether it is decoded, and
// on nothing else.
static void product(const Model *m, float *y, const float *x, const Matrix *w, const Batch *b) {
    const CpuState *s = m->state;
    if (m->watch_inputs) m->watch_inputs(m->watch_context, w, x, b->n_rows);
    const bool bf16 = m->precision == PRECISION_BF16;
    int decoded = b->start[b->n_decode];
    if (decoded) (bf16 ? s->ops->matmul_step_bf16 : s->ops->matmul_step)(y, x, w, decoded);
    if (b->n_rows > decoded)
        (bf16 ? s->ops->matmul_bf16 : s->ops->matmul)(y + (size_t)decoded * (size_t)w->rows,
                                                      x + (size_t)decoded * (size_t)w->cols, w, b->n_rows - decoded);
}

// The rows of a batch, after what their sequences have; rows of prompts and of steps alike.
bool forward_cpu(Model *m, const Batch *b, int first_logit, Error *err) {
    const Config *c = &m->config;
    CpuState *s = m->state;
    const Ops *ops = s->ops;
    int T = b->n_rows;
    int64_t n = (int64_t)T * c->dim, n_q = (int64_t)T * c->q_dim, n_hidden = (int64_t)T * c->hidden_dim;

    // token ids to vectors
    if (!embed(m, s, b->tokens, T, err)) return false;
    row_positions(m, b, s->pos);
    rope_table(m, s, T);

    for (int i = 0; i < c->n_layers; i++) {
        const LayerWeights *l = &m->weights.layers[i];
        if (model_interrupted(m)) return fail_interrupted(err);

        // attention: queries, keys and values of the normalised stream
        ops->rmsnorm(s->xb, s->x, l->attention_norm, c->norm_eps, T, c->dim);
        round_inputs(m, s->xb, &l->wq, n);
        product(m, s->q, s->xb, &l->wq, b);
        product(m, s->k, s->xb, &l->wk, b);
        product(m, s->v, s->xb, &l->wv, b);
        // positions, as rotations of pairs
        ops->rope(s->q, s->cos, s->sin, T, c->n_heads, c->head_dim);
        ops->rope(s->k, s->cos, s->sin, T, c->n_kv_heads, c->head_dim);
        ops->round(s->q, s->cache, n_q);
        attend(m, s, b, i);
        // back to the stream
        round_inputs(m, s->att, &l->wo, n_q);
        product(m, s->xb, s->att, &l->wo, b);
        ops->add(s->x, s->xb, n);

        // feed-forward: down(silu(gate) * up)
        ops->rmsnorm(s->xb, s->x, l->ffn_norm, c->norm_eps, T, c->dim);
        round_inputs(m, s->xb, &l->w1, n);
        product(m, s->hb, s->xb, &l->w1, b);
        product(m, s->hb2, s->xb, &l->w3, b);
        ops->swiglu(s->hb, s->hb2, n_hidden);
        round_inputs(m, s->hb, &l->w2, n_hidden);
        product(m, s->xb, s->hb, &l->w2, b);
        ops->add(s->x, s->xb, n);
    }

    // logits
    lm_head(m, s, b, first_logit);
    return true;
}
