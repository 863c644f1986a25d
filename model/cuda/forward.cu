// Engine cublas: the steps of model/cpu/forward.c on the GPU, one call or one small kernel each. Matrix products and
// RoPE are cuBLAS, attention is attention.cu. What differs from the CPU is where things are:
// - The rows of wq and wk are interleaved as they are uploaded, first half with second half, so that RoPE's pairs are
//   adjacent, as complex numbers are. No dot product of q and k changes.
// - Q and K come out as [head][row][head_dim], so that one cublasCdgmm rotates all of them: a diagonal of the RoPE
//   table of all rows, times a matrix with a column for each head.
// Residual stream, norms and sums are float32; `type` is what enters a product and what the cache holds (DESIGN: bf16,
// f16, or float32 with --precision f32). Matrices that are held in another type are widened as they enter a product.
// With --precision fp8 what enters a prompt's products, but the output matrix's, are codes (ops.cu) in place of bf16.
#include <string.h>

#include "fused_rows.h"
#include "gemm.h"
#include "ops.h"
#include "widen.h"

bool first_launch(const Model *m, bool *said) {
    bool first = m->verbose && m->shard.rank == 0 && !*said && !((CudaState *)m->state)->warming_up;
    *said = *said || first;
    return first;
}

int attention_dtype(DType dtype) {
    return dtype == DTYPE_F32 ? ATTENTION_F32 : dtype == DTYPE_F16 ? ATTENTION_F16 : ATTENTION_BF16;
}

AttentionArgs attention_args(const Model *m, const CudaState *s, int n_seq, int T, int layer) {
    const Config *c = &m->config;
    size_t at = (size_t)layer * own_layer_elements(m) * s->element;
    AttentionArgs a;
    memset(&a, 0, sizeof a);
    a.dtype = attention_dtype(s->type);
    a.n_seq = n_seq;
    a.n_heads = own_heads(m);
    a.n_kv_heads = own_kv_heads(m);
    a.head_dim = c->head_dim;
    a.causal = 1;
    a.append = 1;
    size_t head = (size_t)T * (size_t)c->head_dim * s->element;
    a.q = s->qkv_in;
    a.k_new = (char *)s->qkv_in + (size_t)a.n_heads * head;
    a.v_new = (char *)s->qkv_in + (size_t)(a.n_heads + a.n_kv_heads) * head;
    a.q_token_stride = a.k_token_stride = a.v_token_stride = c->head_dim;
    a.q_head_stride = a.k_head_stride = a.v_head_stride = (int64_t)T * c->head_dim;
    a.out = s->att;
    a.out_token_stride = a.n_heads * c->head_dim;
    a.out_head_stride = c->head_dim;
    a.k_cache = (char *)m->kv.k + at;
    a.v_cache = (char *)m->kv.v + at;
    a.cache_max_len = m->kv.max_len;
    a.block_size = KV_PAGE;
    a.block_table = s->block_table;
    a.block_rows = s->slots;
    a.kv_stable = 1; // of a step: what runs before it writes neither cache nor table nor lengths
    a.workspace = s->attention_workspace;
    a.workspace_bytes = s->attention_workspace_bytes;
    return a;
}

void attention_step(AttentionArgs *a, const Model *m, const CudaState *s, int first, int n, bool several) {
    const StepInput *step = s->step;
    a->seq_lens_device = several ? step->seq_lens : step->lens + first;
    a->block_table = s->step_table + (size_t)first * (size_t)m->kv.table_width;
    a->block_rows = NULL;
    if (!several) return;
    a->n_seq = m->kv.n_slots; // of any number of sequences, so that one graph serves them all
    a->n_new = n < MAX_CANDIDATES + 1 ? n : MAX_CANDIDATES + 1;
    a->n_tokens = n;
    a->q_start_device = step->start;
}

// s->x_all normalised, as it enters a product: s->codes or s->xb.
static bool normalise(const Model *m, CudaState *s, const float *weight, int T, bool codes, Error *err) {
    const Config *c = &m->config;
    return codes ? rmsnorm_codes(s, weight, c->norm_eps, T, c->dim, err)
                 : rmsnorm(s, weight, c->norm_eps, T, c->dim, err);
}

// Queries of n_q heads and keys and values of n_kv, of T rows of the normalised stream, by the weights from `first` on:
// rotated and rounded, in s->qkv_in; of a prompt keys and values in the cache of `layer` instead,
// which is -1 in a step.
static bool project_qkv(Model *m, const Matrix *first, int T, int n_q, int n_kv, int layer, Error *err) {
    const Config *c = &m->config;
    CudaState *s = (CudaState *)m->state;
    if (s->one_order || (s->fp8 && layer >= 0)) return project_qkv_fused(m, first, T, n_q, n_kv, layer, err);
    const size_t head = (size_t)T * (size_t)c->head_dim, queries = (size_t)n_q * head;
    if (!matmul_heads(s, c, s->qkv, first, T, n_q + 2 * n_kv, err)) return false;
    if (!rope(s, s->qkv, T, n_q + n_kv, c->head_dim, err)) return false;
    if (layer >= 0 && n_kv > 0 && !append_kv(m, s, s->qkv + queries, T, layer, err)) return false;
    const size_t n = layer >= 0 ? queries : queries + 2 * (size_t)n_kv * head;
    return n == 0 || round_to_type(s, s->qkv_in, s->qkv, n, err);
}

bool attend_step_rows(const Model *m, CudaState *s, int layer, int first, int n, bool several, bool verbose,
                      Error *err) {
    AttentionArgs a = attention_args(m, s, n, n, layer);
    a.verbose = verbose;
    attention_step(&a, m, s, first, n, several);
    return attention_decode(&a, s->stream) == 0 || fail(err, "%s", attention_error());
}

// Attention of T rows, whose sequences and lengths are on the device, from the normalised stream on: s->att.
static bool attend_step(Model *m, int T, bool several, int layer, bool verbose, Error *err) {
    return project_qkv(m, &m->weights.layers[layer].wq, T, own_heads(m), own_kv_heads(m), -1, err) &&
           attend_step_rows(m, (CudaState *)m->state, layer, 0, T, several, verbose, err);
}

// Attention of the queries s->qkv_in [n_heads][T], whose keys and values are in the cache: s->att. The first n_decode
// rows are a step's, one of each sequence; the others are those of n_seq sequences, which are known on the host: start
// [n_seq+1], lens [n_seq], and on the device their rows of the block table.
static bool attend_rows(Model *m, int T, int n_decode, int n_seq, const int *start, const int *lens,
                        const int *block_rows, int layer, bool verbose, Error *err) {
    CudaState *s = (CudaState *)m->state;
    int q_start[MAX_STEP_ROWS + 1];
    if (n_decode > 0) {
        AttentionArgs a = attention_args(m, s, n_decode, T, layer);
        a.verbose = verbose;
        a.append = a.kv_stable = 0; // what appends (append_kv, project_qkv_fused) runs right before
        attention_step(&a, m, s, 0, n_decode, false);
        if (attention_decode(&a, s->stream) != 0) return fail(err, "%s", attention_error());
    }
    if (n_seq == 0) return true;
    for (int i = 0; i <= n_seq; i++) q_start[i] = start[i] - n_decode;
    AttentionArgs a = attention_args(m, s, n_seq, T, layer);
    a.verbose = verbose;
    a.append = 0;
    a.q = (const char *)a.q + (size_t)n_decode * m->config.head_dim * s->element;
    a.out = (char *)a.out + (size_t)n_decode * a.out_token_stride * s->element;
    a.block_rows = block_rows;
    a.q_start = q_start;
    a.seq_lens = lens;
    return attention_prefill(&a, s->stream) == 0 || fail(err, "%s", attention_error());
}

// The same for the rows of prompts, and of a step beside them, from the normalised stream on.
static bool attend_prompt(Model *m, const Batch *b, const int *lens, int layer, bool verbose, Error *err) {
    CudaState *s = (CudaState *)m->state;
    int T = b->n_rows;
    if (!project_qkv(m, &m->weights.layers[layer].wq, T, own_heads(m), own_kv_heads(m), layer, err)) return false;
    int n = b->n_decode;
    return attend_rows(m, T, n, b->n_seq - n, b->start + n, lens + n, s->slots + n, layer, verbose, err);
}

// The same in the last layer, where some rows have no logits: their keys and values are all that is still needed of
// them. From here on only rows with logits are in x and x_all, by way of gate_up; for attention each of a prompt is a
// sequence with one new token.
static bool attend_logits(Model *m, const Batch *b, const int *lens, int layer, bool verbose, Error *err) {
    const Config *c = &m->config;
    const LayerWeights *l = &m->weights.layers[layer];
    CudaState *s = (CudaState *)m->state;
    int T = b->n_rows, n = b->n_logits, n_decode = b->n_decode, start[MAX_STEP_ROWS + 1], pos[MAX_STEP_ROWS];
    if (!project_qkv(m, &l->wk, T, 0, own_kv_heads(m), layer, err)) return false;
    if (n == 0) return true;
    if (!keep_logit_rows(s, s->x_all, n, c->dim, err)) return false;
    if (s->comm && !keep_logit_rows(s, s->x, n, m->shard.dim.n, err)) return false;
    if (!normalise(m, s, l->attention_norm, n, s->fp8, err)) return false;
    if (!rope_table(s, c, s->logit_pos, n, err)) return false;
    if (!project_qkv(m, &l->wq, n, own_heads(m), 0, layer, err)) return false;
    for (int i = 0, seq = 0; i < n; i++) {
        while (b->logit_rows[i] >= b->start[seq + 1]) seq++;
        start[i] = i;
        pos[i] = lens[seq] + b->logit_rows[i] - b->start[seq];
    }
    start[n] = n;
    return attend_rows(m, n, n_decode, n - n_decode, start + n_decode, pos + n_decode, s->logit_slots + n_decode, layer,
                       verbose, err);
}

// The steps of cpu/forward.c over T rows whose tokens and positions are on the device. host: the batch, for prefill;
// NULL: a step, one row for each of T sequences, or several. After the last attention of a prompt only rows with logits
// are in x.
static bool forward_rows(Model *m, const Batch *host, const int *host_lens, int T, bool several, Error *err) {
    const Config *c = &m->config;
    bool verbose =
        first_launch(m, host ? &((CudaState *)m->state)->logged_prefill : &((CudaState *)m->state)->logged_decode);

    if (!for_shards(m, err, [&](Model *m, CudaState *s) {
            const int *tokens = host ? s->tokens : s->step->tokens, *pos = host ? s->pos : s->step->lens;
            return widen_begin(s, err) && embed(s, m, tokens, T, err) && take_own_x(m, s, T, err) &&
                   rope_table(s, c, pos, T, err);
        }))
        return false;

    for (int i = 0; i < c->n_layers; i++) {
        const bool codes = host && ((CudaState *)m->state)->fp8;
        bool some = host && i + 1 == c->n_layers && host->n_logits < T; // the others are of no use any more

        // attention: every token, of the normalised stream, to itself and to all before it
        if (!for_shards(m, err, [&](Model *m, CudaState *s) {
                bool log = verbose && i == 0 && m->shard.rank == 0; // all are launched alike, but a prompt's last layer
                return normalise(m, s, m->weights.layers[i].attention_norm, T, codes, err) &&
                       (some   ? attend_logits(m, host, host_lens, i, log, err)
                        : host ? attend_prompt(m, host, host_lens, i, log, err)
                               : attend_step(m, T, several, i, log, err));
            }))
            return false;
        if (some) T = host->n_logits;
        if (T == 0) return true;
        if (!gather_att(m, T, err)) return false;
        // back to the stream
        if (!for_shards(m, err, [&](Model *m, CudaState *s) {
                const Matrix *wo = &m->weights.layers[i].wo;
                if (!codes) return matmul(s, s->x, wo, s->att_all, T, 1, err);
                return encode_rows(s, s->att_all, T, wo->cols, err) && matmul_codes(s, s->x, wo, T, 1, err);
            }))
            return false;
        if (!gather_x(m, T, err)) return false;

        // feed-forward: down(silu(gate) * up)
        if (!for_shards(m, err, [&](Model *m, CudaState *s) {
                const LayerWeights *l = &m->weights.layers[i];
                if (!normalise(m, s, l->ffn_norm, T, codes, err)) return false;
                if (!codes && s->one_order) return feed_forward_fused(s, l, T, err);
                if (!codes) return matmul_gate_up(s, l, T, err) && swiglu(s, l, T, err);
                return matmul_gate_up_codes(s, l, T, err) &&
                       (s->comm ? swiglu_16(s, l, T, err) : swiglu_codes(s, l, T, err));
            }))
            return false;
        if (!gather_h(m, T, err)) return false;
        if (!for_shards(m, err, [&](Model *m, CudaState *s) {
                const Matrix *w2 = &m->weights.layers[i].w2;
                if (!codes) return matmul(s, s->x, w2, s->h_all, T, 1, err);
                return (!s->comm || encode_rows(s, s->h_all, T, w2->cols, err)) && matmul_codes(s, s->x, w2, T, 1, err);
            }))
            return false;
        if (!gather_x(m, T, err)) return false;
    }
    return true;
}

// Logits, and their argmax, of the n rows in x, from row `first` of the logits on.
static bool lm_head(Model *m, int first, int n, Error *err) {
    const Config *c = &m->config;
    return for_shards(m, err,
                      [&](Model *m, CudaState *s) {
                          return rmsnorm(s, m->weights.norm, c->norm_eps, n, c->dim, err) &&
                                 matmul(s, own_logits(m, s, first), &m->weights.output, s->xb, n, 0, err);
                      }) &&
           gather_logits(m, first, n, err) &&
           for_shards(m, err, [&](Model *, CudaState *s) { return argmax_rows(s, first, n, c->vocab_size, err); });
}

bool forward_prompt(Model *m, const Batch *b, int first_logit, Error *err) {
    CudaState *s = (CudaState *)m->state;
    int lens[MAX_SLOTS], *pos = s->pos_host, *slots = s->pos_host + m->max_rows;
    for (int i = 0; i < b->n_seq; i++) {
        lens[i] = m->kv.len[b->slot[i]];
        for (int r = b->start[i]; r < b->start[i + 1]; r++) {
            pos[r] = lens[i] + r - b->start[i];
            slots[r] = b->slot[i];
        }
    }
    if (!for_shards(m, err, [&](Model *, CudaState *s) {
            auto upload = [&](int *to, const int *from, int n) {
                CUDA_TRY(cudaMemcpyAsync(to, from, (size_t)n * sizeof *to, cudaMemcpyHostToDevice, s->stream));
                return true;
            };
            return upload(s->tokens, b->tokens, b->n_rows) && upload(s->pos, pos, b->n_rows) &&
                   upload(s->row_slots, slots, b->n_rows) && upload(s->slots, b->slot, b->n_seq) &&
                   upload(s->logit_rows, b->logit_rows, b->n_logits);
        }))
        return false;
    if (!forward_rows(m, b, lens, b->n_rows, false, err)) return false;
    return b->n_logits == 0 || lm_head(m, first_logit, b->n_logits, err);
}

bool enqueue_step_cublas(Model *m, int n, bool several, Error *err) {
    return forward_rows(m, NULL, NULL, n, several, err) && lm_head(m, 0, n, err) && publish_step(m, n, several, err);
}
