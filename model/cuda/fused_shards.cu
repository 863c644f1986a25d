// Engine fused on several GPUs: the launches of a step over the rows that each of them has (parallel/shard.h). A row's
// sums have the same order in whichever tile of whichever GPU it is, so all bits are those of one GPU's chain in
// fused.h.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "fused_state.h"

// ---- exchange in kernels --------------------------------------------------------------------------------------------
//
// The chain of one GPU, on each; its kernels are decode_products_kernel with SharedParams (fused_exchange.cuh).

static const unsigned long long WAIT_LIMIT = 4000000000; // ns that a kernel waits for another GPU

// Where things are in a region: the same on every rank.
static void lay_out(const Model *m, const FusedState *f, size_t element, Exchange *e) {
    const Config *c = &m->config;
    const size_t rows = (size_t)fused_min(f->max_rows, model_step_rows(m));
    size_t at = 0;
    auto take = [&](size_t bytes) {
        size_t here = at;
        at += (bytes + 255) / 256 * 256;
        return here;
    };
    take(rows * (size_t)c->dim * sizeof(float));
    e->x_down = take(rows * (size_t)c->dim * sizeof(float));
    e->h = take(rows * (size_t)(f->terms * c->hidden_dim) * 2);
    e->att = take(rows * (size_t)c->q_dim * element);
    e->set_bytes = at;
    at = 2 * e->set_bytes;
    e->best = take(rows * (size_t)(m->shard.count * f->n_blocks * EPILOGUE_WARPS) * sizeof(int2));
    e->finished = take(sizeof(unsigned));
    e->step = take(sizeof(unsigned));
    e->bytes = at;
}

static SharedParams shared_params(const Model *m, const CudaState *s, const FusedPlan *plan, int i, int first, int n) {
    const Config *c = &m->config;
    const Shard *shard = &m->shard;
    const FusedState *f = s->fused;
    const Exchange *e = f->exchange;
    const int head_bytes = c->head_dim * c->group * (int)s->element; // of the queries of a K/V head
    SharedParams p;
    memset(&p, 0, sizeof p);
    (FusedParams &)p = fused_params(m, s, plan, i, first, n);
    p.x = s->x_all;
    p.att = s->att;
    p.h = NULL;
    p.logits = e->logits[s->buffer] + (size_t)first * c->vocab_size + shard->vocab.first;
    p.logits_pitch = c->vocab_size;
    p.best = (int2 *)(e->region + e->best) + shard->rank * p.best_pitch;
    p.best_pitch *= shard->count;
    p.first_token = shard->vocab.first;
    for (int r = 0; r < shard->count; r++)
        if (r != shard->rank) p.to_peer[p.n_peers++] = e->regions[r] - e->region;
    p.sets = e->region;
    p.set_bytes = (unsigned)e->set_bytes;
    p.x_down = (unsigned)e->x_down;
    p.h_all = (unsigned)e->h;
    p.att_all = (unsigned)e->att;
    p.number = (unsigned)i;
    p.n_layers = (unsigned)c->n_layers;
    p.first_x = shard->dim.first;
    p.first_h = shard->hidden.first;
    p.own_x = shard->dim.n;
    p.own_h = shard->hidden.n;
    p.sends_products = n * f->terms > 2;
    p.first_attention = shard->kv_heads.first * head_bytes / 16;
    p.attention_words = shard->kv_heads.n * head_bytes / 16;
    p.attention_pitch = c->n_kv_heads * head_bytes / 16;
    p.finished = (unsigned *)(e->region + e->finished);
    p.step = (const unsigned *)(e->region + e->step);
    p.wait_limit = WAIT_LIMIT;
    p.shares_gpu = m->one_gpu;
    return p;
}

static bool decode_pass_of_rank(Model *m, CudaState *s, const FusedPlan *plan, int first, int n, bool several,
                                bool verbose, Error *err) {
    const FusedState *f = s->fused;
    const Exchange *e = f->exchange;
    const int n_layers = m->config.n_layers, n_best = m->shard.count * f->n_blocks * EPILOGUE_WARPS;
    const bool pdl = !m->one_gpu;
    const RanksToWaitFor ranks = {(unsigned)m->shard.count, (unsigned)f->n_blocks,
                                  (unsigned *)(e->region + e->finished), (unsigned *)(e->region + e->step), WAIT_LIMIT};
    if (!embed_pass(m, s, s->x_all, first, n, err)) return false;
    for (int i = 0; i <= n_layers; i++) {
        if (i > 0 && !attend_step_rows(m, s, i - 1, first, n, several, verbose && i == 1, err)) return false;
        const SharedParams p = shared_params(m, s, plan, i, first, n);
        if (verbose && i <= 1) log_products(&p, plan, f->n_blocks, "; GPUs exchange in it");
        CUDA_TRY(launch_products_kernel(m, s, plan, pdl, p));
    }
    return argmax_pass(m, s, pdl, (const int2 *)(e->region + e->best), n_best, first, n, ranks, err);
}

bool decode_pass_by_exchange(Model *m, const FusedPlan *plan, int first, int n, bool several, Error *err) {
    const bool verbose = first_launch(m, &((CudaState *)m->state)->logged_decode);
    return for_shards(m, err, [&](Model *own, CudaState *s) {
        return decode_pass_of_rank(own, s, plan, first, n, several, verbose && own->shard.rank == 0, err);
    });
}

// Where `of` a rank is, for all of them.
static bool reach(Model *m, void *(*of)(const CudaState *s), void **all, Error *err) {
    void *own[MAX_SHARDS];
    int n = 0;
    for_shards(m, err, [&](Model *, CudaState *s) { return own[n++] = of(s), true; });
    return comm_reach(((CudaState *)m->state)->comm, own, all, err);
}

bool open_exchange(Model *m, Error *err) {
    CudaState *first = (CudaState *)m->state;
    void *regions[MAX_SHARDS], *logits[2][MAX_SHARDS];
    if (!first->comm || m->gathers_only || !comm_reaches(first->comm)) return true;
    if (!for_shards(m, err, [&](Model *m, CudaState *s) {
            Exchange *e = s->fused->exchange = (Exchange *)calloc(1, sizeof *e);
            if (!e) return fail(err, "out of memory: what GPUs exchange");
            lay_out(m, s->fused, s->element, e);
            CUDA_TRY(cudaMalloc((void **)&e->region, e->bytes));
            CUDA_TRY(cudaMemsetAsync(e->region, 0xff, 2 * e->set_bytes, s->stream)); // ABSENT
            CUDA_TRY(cudaMemsetAsync(e->region + 2 * e->set_bytes, 0, e->bytes - 2 * e->set_bytes, s->stream));
            CUDA_TRY(cudaStreamSynchronize(s->stream)); // before another rank stores to it
            return load_products_kernels<SharedParams>(m, s, s->fused->max_rows, err);
        }))
        return false;
    if (!reach(
            m, [](const CudaState *s) { return (void *)s->fused->exchange->region; }, regions, err) ||
        !reach(
            m, [](const CudaState *s) { return (void *)s->logits; }, logits[first->buffer], err) ||
        !reach(m, [](const CudaState *s) { return (void *)s->other_logits; }, logits[!first->buffer], err))
        return false;
    return for_shards(m, err, [&](Model *m, CudaState *s) {
        Exchange *e = s->fused->exchange;
        for (int r = 0; r < m->shard.count; r++) e->regions[r] = (char *)regions[r];
        for (int i = 0; i < 2; i++) e->logits[i] = (float *)logits[i][0];
        return true;
    });
}

void close_exchange(FusedState *f) {
    if (f->exchange) cudaFree(f->exchange->region);
    free(f->exchange);
}

// ---- gathers between kernels ----------------------------------------------------------------------------------------
//
// Where GPUs do not reach each other's memory: the kernels of one GPU, but one product in each launch. What it needs of
// other GPUs is gathered between two, where blocks of one GPU would count in `done`.

// Of the parameters of a kernel with all products between two attentions, those of a launch with the n from number k
// on: one, or the parts of down. Activations that are added to or written are the shard's own, those that enter the
// product were gathered.
static FusedParams params_of_launch(const Model *m, const CudaState *s, const FusedParams &all, int k, int n) {
    const FusedState *f = s->fused;
    FusedParams p = all;
    const ProductKind kind = all.product[k].kind;
    const bool adds = kind == PRODUCT_OUT || kind == PRODUCT_DOWN;
    p.n_products = n;
    for (int i = 0; i < n; i++) p.product[i] = all.product[k + i];
    p.x = adds ? s->x : s->x_all;
    p.dim = adds ? m->shard.dim.n : m->config.dim;
    p.h = kind == PRODUCT_GATE_UP ? f->h : f->h_all;
    p.hidden_dim = m->shard.hidden.n;
    p.done = all.done + k;
    p.next_tile = all.next_tile + k;
    p.rows_normalised = all.rows_normalised + k;
    return p;
}

static OwnColumns own_fused_h(const Model *m) {
    const FusedState *f = ((const CudaState *)m->state)->fused;
    return {f->h, f->h_all, m->shard.hidden, 2};
}

// The product of a kind between the attention of layer i - 1 and that of layer i, on all GPUs, and what follows it: its
// results to all of them.
static bool product_and_gather(Model *m, const FusedPlan *plan, int i, ProductKind kind, int first, int n, Error *err) {
    const int terms = ((const CudaState *)m->state)->fused->terms;
    if (!for_shards(m, err, [&](Model *m, CudaState *s) {
            const FusedParams all = fused_params(m, s, plan, i, first, n);
            int k = 0, parts = 0;
            while (all.product[k].kind != kind) k++;
            while (k + parts < all.n_products && all.product[k + parts].kind == kind) parts++;
            return launch_products(m, s, plan, false, params_of_launch(m, s, all, k, parts), err);
        }))
        return false;
    return kind == PRODUCT_QKV       ? true
           : kind == PRODUCT_GATE_UP ? gather(m, n * terms, m->config.hidden_dim, own_fused_h, err)
           : kind == PRODUCT_LM_HEAD ? gather_logits(m, first, n, err)
                                     : gather_x(m, n, err);
}

// The argmax of all passes is taken after the last.
bool decode_pass_by_gathers(Model *m, const FusedPlan *plan, int first, int n, bool several, Error *err) {
    const Config *c = &m->config;
    const bool verbose = first_launch(m, &((CudaState *)m->state)->logged_decode);
    auto product = [&](int i, ProductKind kind) { return product_and_gather(m, plan, i, kind, first, n, err); };
    if (verbose)
        fprintf(stderr, "decode: decode_products_kernel on %d GPUs, a launch for each product, %d rows, tiles of %d\n",
                m->shard.count, n, plan->tile_rows);
    if (!for_shards(m, err, [&](Model *m, CudaState *s) {
            CUDA_TRY(cudaMemsetAsync(s->fused->done, 0, n_counters(m) * sizeof *s->fused->done, s->stream));
            return embed_pass(m, s, s->x_all, first, n, err) && take_own_x(m, s, n, err);
        }))
        return false;
    for (int i = 0; i < c->n_layers; i++) {
        if (!product(i, PRODUCT_QKV)) return false;
        if (!for_shards(m, err, [&](Model *m, CudaState *s) {
                return attend_step_rows(m, s, i, first, n, several, verbose && i == 0 && m->shard.rank == 0, err);
            }))
            return false;
        if (!gather_att(m, n, err) || !product(i + 1, PRODUCT_OUT) || !product(i + 1, PRODUCT_GATE_UP) ||
            !product(i + 1, PRODUCT_DOWN))
            return false;
    }
    return product(c->n_layers, PRODUCT_LM_HEAD) &&
           for_shards(m, err, [&](Model *, CudaState *s) { return argmax_rows(s, first, n, c->vocab_size, err); });
}
