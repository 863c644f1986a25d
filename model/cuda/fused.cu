// Engine fused: its launches. What they launch: fused_kernel.cuh, by the protocol in fused.h.
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "fused_kernel.cuh"
#include "fused_state.h"
#include "wide.h"

// Calls visit(matrix) for the matrices of products, one for those that are alike: of QKV, of gate and up.
template <class Visit> static void for_products(const Model *m, Visit visit) {
    for (int i = 0; i < m->config.n_layers; i++) {
        const LayerWeights *l = &m->weights.layers[i];
        visit(l->wq), visit(l->wo), visit(l->w1), visit(l->w2);
    }
    visit(m->weights.output);
}

// Bytes of a row in a K slice, where a matrix is quantised.
static int slice_bytes(const Matrix *w) {
    if (!matrix_is_quantised(w)) return 2 * packed_slice(16);
    const Packing packing = matrix_packing(w);
    return packed_slice(packing.bits) / PACK_COLUMNS * packing.block_bytes;
}

FusedShape fused_shape(const Model *m, const FusedState *f, int n_rows) {
    const Config *c = &m->config;
    FusedShape s = {c->dim, c->q_dim, c->hidden_dim, c->head_dim, n_rows, f->terms, f->shared_limit, 0};
    if (weights_are_quantised(m))
        for_products(
            m, [&](const Matrix &w) { s.packed_pitch = fused_max(s.packed_pitch, packed_pitch(slice_bytes(&w))); });
    return s;
}

// The part of a product that is its weights': w, and the same of `up`. packed: a matrix of the model is quantised.
static void set_weights(Product *f, const FusedPlan *plan, const Matrix *w, const Matrix *up, bool packed) {
    f->weights = (const char *)w->data;
    f->up = up ? (const char *)up->data : NULL;
    f->row_bytes = f->bytes = (int)device_row_bytes(w);
    if (!packed) {
        f->slice = fused_slice_of(w->cols, plan->slice);
        f->slice_bytes = 2 * f->slice;
        f->n_slices = fused_n_slices(w->cols, plan->slice);
        f->weight_pitch = f->n_slices > 1 ? f->slice_bytes : f->row_bytes;
        f->act_pitch = (int)fused_act_bytes(w->cols, 1);
        return;
    }
    f->slice_bytes = slice_bytes(w);
    f->weight_pitch = packed_pitch(f->slice_bytes);
    if (!matrix_is_quantised(w)) {
        f->slice = packed_slice(16);
        f->act_pitch = (int)fused_act_bytes(w->cols, 1);
    } else {
        const Packing packing = matrix_packing(w);
        f->codes = w->dtype == DTYPE_U8 ? CODES_INT4 : w->dtype == DTYPE_I8 ? CODES_INT8 : CODES_FP8;
        f->scales = (const float *)w->scale;
        f->up_scales = up ? (const float *)up->scale : NULL;
        while (1 << f->group_log2 < packing.group) f->group_log2++;
        f->scale_bytes = packing.scale_bytes;
        f->block_bytes = packing.block_bytes;
        f->slice = packed_slice(packing.bits);
        f->act_pitch = packed_act_pitch(w->cols);
    }
    f->n_slices = fused_n_slices(w->cols, f->slice);
}

// rows: of w, or of all matrices that follow it or alternate with it.
static void add_product(FusedParams *p, const FusedPlan *plan, int n_blocks, ProductKind kind, const Matrix *w,
                        const Matrix *up, const float *norm, int rows, bool packed_model) {
    const int cols = w->cols;
    Product *f = &p->product[p->n_products++];
    f->kind = kind;
    f->rows = rows;
    f->cols = f->row_length = cols;
    f->norm = norm;
    set_weights(f, plan, w, up, packed_model);
    f->slices_per_sum = kind == PRODUCT_DOWN ? plan->slice / f->slice : f->n_slices;
    if (p->n_products > 1) f->first_block = (f[-1].first_block + fused_ceil(f[-1].rows, plan->tile_rows)) % n_blocks;
}

// Splits the last product, down, over K: a product for each part that is summed as one, that adds to what the ones
// before left in down_partial.
static void split_last_product(FusedParams *p) {
    Product whole = p->product[--p->n_products];
    const int part = whole.slices_per_sum * whole.slice;
    for (int first = 0; first < whole.cols; first += part) {
        Product *f = &p->product[p->n_products++];
        *f = whole;
        f->first_col = first;
        f->cols = fused_min(whole.cols - first, part);
        f->n_slices = fused_n_slices(f->cols, f->slice);
        f->first_byte = first / whole.slice * whole.slice_bytes;
        f->bytes = fused_min(whole.bytes - f->first_byte, whole.slices_per_sum * whole.slice_bytes);
        f->act_pitch = whole.codes != CODES_NONE ? packed_act_pitch(f->cols) : (int)fused_act_bytes(f->cols, 1);
        f->adds_partial = first > 0;
        f->leaves_partial = first + f->cols < whole.cols;
        if (f->leaves_partial) f->scales = NULL;
    }
}

// The products between the attention of layer i - 1 and that of layer i. Nothing else here knows the weights.
static void add_products(const Model *m, const FusedState *f, const FusedPlan *plan, int i, FusedParams *p) {
    const Config *c = &m->config;
    const Weights *w = &m->weights;
    auto add = [&](ProductKind kind, const Matrix *weights, const Matrix *up, const float *norm, int rows) {
        add_product(p, plan, f->n_blocks, kind, weights, up, norm, rows, f->packed);
    };
    if (i > 0) {
        const LayerWeights *l = &w->layers[i - 1];
        add(PRODUCT_OUT, &l->wo, NULL, NULL, l->wo.rows);
        add(PRODUCT_GATE_UP, &l->w1, &l->w3, l->ffn_norm, 2 * l->w1.rows);
        add(PRODUCT_DOWN, &l->w2, NULL, NULL, l->w2.rows);
        if (plan->split_down) split_last_product(p);
    }
    if (i < c->n_layers) {
        const LayerWeights *l = &w->layers[i];
        add(PRODUCT_QKV, &l->wq, NULL, l->attention_norm, l->wq.rows + 2 * l->wk.rows);
    } else
        add(PRODUCT_LM_HEAD, &w->output, NULL, w->norm, w->output.rows);
}

FusedParams fused_params(const Model *m, const CudaState *s, const FusedPlan *plan, int i, int first, int n) {
    const Config *c = &m->config;
    const FusedState *f = s->fused;
    FusedParams p;
    memset(&p, 0, sizeof p);
    p.n_rows = n;
    p.tile_rows = plan->tile_rows;
    p.n_stages = plan->n_stages;
    p.stage_bytes = plan->stage_bytes;
    p.partial_floats = plan->partial_floats;
    p.stages_in_flight = plan->stages_in_flight;
    p.stages_ahead = plan->stages_ahead;
    p.ring_offset = plan->ring_offset;
    p.partials_offset = plan->partials_offset;
    p.rope_offset = plan->rope_offset;
    p.residuals_offset = plan->residuals_offset;
    p.scales_offset = plan->scales_offset;
    p.code_sums_offset = plan->code_sums_offset;
    p.n_heads = own_heads(m);
    p.n_kv_heads = own_kv_heads(m);
    p.head_dim = c->head_dim;
    p.head_dim_inverse = 0xffffffffu / (unsigned)c->head_dim + 1;
    p.dim = c->dim;
    p.hidden_dim = c->hidden_dim;
    p.q_dim = c->q_dim;
    p.logits_pitch = m->shard.vocab.n;
    p.best_pitch = f->n_blocks * EPILOGUE_WARPS;
    p.eps = c->norm_eps;
    p.x = s->x;
    p.qkv = s->qkv_in;
    p.att = s->att_all;
    p.h = f->h;
    p.down_partial = f->down_partial;
    p.normed = f->normed;
    p.rope = s->rope_table;
    p.logits = own_logits(m, s, first);
    p.best = f->best;
    p.done = f->done + i * MAX_PRODUCTS;
    p.next_tile = (int *)f->done + (c->n_layers + 1 + i) * MAX_PRODUCTS;
    p.rows_normalised = f->done + (2 * (c->n_layers + 1) + i) * MAX_PRODUCTS;
    add_products(m, f, plan, i, &p);
    p.h_factor = 1;
    for (int k = 0; k < p.n_products; k++)
        if (p.product[k].kind == PRODUCT_DOWN && p.product[k].codes != CODES_NONE) p.h_factor = ACT_FACTOR;
    return p;
}

int n_counters(const Model *m) {
    return 3 * (m->config.n_layers + 1) * MAX_PRODUCTS;
}

bool embed_pass(const Model *m, CudaState *s, float *x, int first, int n, Error *err) {
    const Config *c = &m->config;
    const Matrix *table = &m->weights.tok_embeddings;
    CUDA_TRY(with_type(table->dtype, [&](auto type) {
        return launch_kernel(decode_embed_kernel<decltype(type)>, n, 256, 0, false, s->stream, x,
                             (const decltype(type) *)table->data, (const int *)s->step->tokens + first, c->dim,
                             s->rope_table, (const int *)s->step->lens + first, (const float *)s->rope_freq,
                             c->head_dim / 2);
    }));
    return true;
}

bool launch_products(const Model *m, const CudaState *s, const FusedPlan *plan, bool pdl, const FusedParams &p,
                     Error *err) {
    CUDA_TRY(launch_products_kernel(m, s, plan, pdl, p));
    return true;
}

bool argmax_pass(const Model *m, CudaState *s, bool pdl, const int2 *best, int n_best, int first, int n,
                 const RanksToWaitFor &ranks, Error *err) {
    CUDA_TRY(launch_kernel(decode_argmax_kernel, 1, 32 * MAX_ACT_ROWS, 0, pdl, s->stream, best, n_best,
                           m->config.vocab_size, s->argmax + first, s->argmax_host + first, s->step, first, n,
                           s->fused->done, n_counters(m), ranks));
    return true;
}

void log_products(const FusedParams *p, const FusedPlan *plan, int n_blocks, const char *exchange) {
    fprintf(stderr,
            "decode: decode_products_kernel %d products, %d rows, tiles of %d, grid %d, block %d, shared %zu: "
            "a ring of %d x %d bytes, %d in flight%s\n",
            p->n_products, p->n_rows, p->tile_rows, n_blocks, plan->threads, plan->shared_bytes, p->n_stages,
            p->stage_bytes, p->stages_in_flight, exchange);
}

// A pass over n rows from row `first` of the batch on: the chain of kernels in fused.h.
static bool decode_pass(Model *m, const FusedPlan *plan, int first, int n, bool several, Error *err) {
    CudaState *s = (CudaState *)m->state;
    FusedState *f = s->fused;
    bool verbose = first_launch(m, &s->logged_decode);
    if (!embed_pass(m, s, s->x, first, n, err)) return false;
    for (int i = 0; i <= m->config.n_layers; i++) {
        // (every layer is launched alike)
        if (i > 0 && !attend_step_rows(m, s, i - 1, first, n, several, verbose && i == 1, err)) return false;
        FusedParams p = fused_params(m, s, plan, i, first, n);
        if (verbose && i <= 1) log_products(&p, plan, f->n_blocks, "");
        if (!launch_products(m, s, plan, true, p, err)) return false;
    }
    return argmax_pass(m, s, true, f->best, f->n_blocks * EPILOGUE_WARPS, first, n, RanksToWaitFor{}, err);
}

// Whether the run's steps are those of wide.h: see enqueue_step_fused.
static bool steps_are_wide(const Model *m) {
    const CudaState *s = (const CudaState *)m->state;
    const int sequences = model_sequences(m);
    return s->fused->terms == 1 && sequences > s->fused->max_rows && sequences <= MAX_WIDE_ROWS && s->wide;
}

// Whether a step of n rows is engine cublas's: see enqueue_step_fused.
static bool steps_are_cublas(const Model *m, const FusedState *f, int n) {
    return f->terms == 1 ? model_sequences(m) > f->max_rows || n > f->max_rows : n > 8;
}

// A step of n rows. Steps of few rows, of many (wide.h) and of more (engine cublas) have other orders of sums; a
// sequence's must not depend on how many others are left, so which one it is depends on the sequences that the run's
// steps may have: up to what one pass takes, up to MAX_WIDE_ROWS, more. In f32, where tokens are equal in any order,
// passes of max_rows for up to 8 rows.
static bool enqueue_step_fused(Model *m, int n, bool several, Error *err) {
    CudaState *s = (CudaState *)m->state;
    FusedState *f = s->fused;
    if (steps_are_wide(m)) return enqueue_step_wide(m, n, several, err);
    if (steps_are_cublas(m, f, n)) return enqueue_step_cublas(m, n, several, err);
    for (int first = 0; first < n; first += f->max_rows) {
        int rows = fused_min(n - first, f->max_rows);
        FusedShape shape = fused_shape(m, f, rows);
        FusedPlan plan;
        if (!fused_plan(&shape, &plan))
            return fail(err, "%d rows do not fit in %zu bytes of shared memory", rows, f->shared_limit);
        if (f->exchange ? decode_pass_by_exchange(m, &plan, first, rows, several, err)
            : s->comm   ? decode_pass_by_gathers(m, &plan, first, rows, several, err)
                        : decode_pass(m, &plan, first, rows, several, err))
            continue;
        // No argmax kernel follows what was launched.
        cudaMemsetAsync(f->done, 0, n_counters(m) * sizeof *f->done, s->stream);
        return false;
    }
    return !s->comm || f->exchange || publish_step(m, n, several, err);
}

// Whether a step of n rows is launched on each GPU by itself: what its kernels need of the others they wait for.
static bool ranks_are_apart_fused(const Model *m, int n) {
    const FusedState *f = ((const CudaState *)m->state)->fused;
    return f->exchange && !steps_are_wide(m) && !steps_are_cublas(m, f, n);
}

// What the device gives, and how many rows of this model one pass takes: 0 if it has no room for one.
static bool size_fused(const Model *m, FusedState *f, Error *err) {
    int device = 0, limit = 0;
    CUDA_TRY(cudaGetDevice(&device));
    CUDA_TRY(cudaDeviceGetAttribute(&f->n_blocks, cudaDevAttrMultiProcessorCount, device));
    if (m->one_gpu) f->n_blocks /= m->gpus; // so that the blocks of all ranks run at once
    CUDA_TRY(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    f->terms = m->precision == PRECISION_F32 ? 3 : 1;
    f->shared_limit = (size_t)limit - FUSED_STATIC_BYTES;
    f->packed = weights_are_quantised(m);
    f->max_rows = fused_max_rows(fused_shape(m, f, 0));
    return true;
}

// Whether --precision f32 has products of the file's matrices: of codes, and of one dtype of 16 bits.
static bool have_f32_products(const Model *m, Error *err) {
    const Weights *w = &m->weights;
    if (weights_are_quantised(m)) {
        const Matrix *other = NULL; // in bf16 it would be rounded to it
        for_products(m, [&](const Matrix &w) {
            if (!matrix_is_quantised(&w) && w.dtype != DTYPE_BF16) other = &w;
        });
        return !other || fail(err, "engine fused: beside quantised matrices others are %s, expected BF16",
                              dtype_names[other->dtype]);
    }
    if (w->dtype == DTYPE_F32)
        return fail(err, "engine fused has no products of float32 weights, only of BF16 and F16");
    return w->output_dtype == w->dtype ||
           fail(err, "engine fused: the output matrix is %s, expected %s as the layers are",
                dtype_names[w->output_dtype], dtype_names[w->dtype]);
}

static bool usable_fused(const Model *m, Error *err) {
    if (!usable_cuda(m, err)) return false;
    int device = 0, major = 0;
    CUDA_TRY(cudaGetDevice(&device));
    CUDA_TRY(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    if (major < 9) return fail(err, "engine fused needs compute capability 9.0, the GPU has %d", major);
    // The kernels between the fused ones wait for those before them, which code for older GPUs does not.
    cudaFuncAttributes attributes;
    CUDA_TRY(kernel_attributes(&attributes));
    if (attributes.ptxVersion < 90)
        return fail(err, "engine fused needs code for compute capability 9.0, this program has that of %d.%d",
                    attributes.ptxVersion / 10, attributes.ptxVersion % 10);
    if (m->precision == PRECISION_F32 && !have_f32_products(m, err)) return false;
    if (weights_are_quantised(m) && m->config.dim % 16)
        return fail(err, "engine fused: dim is %d, with quantised weights it needs a multiple of 16", m->config.dim);
    if (m->config.dim > FUSED_MAX_DIM)
        return fail(err, "engine fused takes a dim of %d at most, this model has %d", FUSED_MAX_DIM, m->config.dim);
    FusedState f;
    memset(&f, 0, sizeof f);
    if (!size_fused(m, &f, err)) return false;
    return f.max_rows > 0 ||
           fail(err, "engine fused: rows of %d and %d columns do not fit in %zu bytes of shared memory", m->config.dim,
                m->config.hidden_dim, f.shared_limit);
}

// In bf16 a row's order of sums is that of the run's sequences (enqueue_step_fused), and candidates may not change it:
// a step has as many rows as are computed in that order. In f32 a pass takes fewer rows.
static int step_rows_fused(const Model *m, int n_slots, Error *err) {
    FusedState f;
    memset(&f, 0, sizeof f);
    if (!size_fused(m, &f, err)) return 0;
    const int most = n_slots <= f.max_rows ? f.max_rows : wide_most_rows(m, n_slots);
    if (f.terms > 1)
        fail(err, "engine fused computes float32 in passes of %d rows, so that steps of more gain nothing", f.max_rows);
    else if (n_slots == most)
        fail(err,
             "engine fused: %d sequences at a time (-b) leave no row for candidates in a step of at most %d, and more "
             "rows have another order of sums; expected fewer sequences, or more",
             n_slots, most);
    else
        return fused_min(most, n_slots * (MAX_CANDIDATES + 1));
    return 0;
}

// What engine fused has beside engine cublas's state, of one rank.
static bool prepare_rank(Model *m, CudaState *s, Error *err) {
    FusedState *f = s->fused = (FusedState *)calloc(1, sizeof *f);
    if (!f) return fail(err, "out of memory: the engine's state");
    s->enqueue_step = enqueue_step_fused;
    s->ranks_are_apart = ranks_are_apart_fused;
    if (!size_fused(m, f, err)) return false;
    if (!wide_open(m, s, err)) return false;
    CUDA_TRY(cudaMalloc(&f->h, (size_t)MAX_ACT_ROWS * m->shard.hidden.n * 2));
    f->h_all = f->h;
    if (s->comm) CUDA_TRY(cudaMalloc(&f->h_all, (size_t)MAX_ACT_ROWS * m->config.hidden_dim * 2));
    CUDA_TRY(cudaMalloc(&f->normed, (size_t)MAX_ACT_ROWS * m->config.dim * 2));
    CUDA_TRY(cudaMalloc((void **)&f->down_partial, (size_t)MAX_ACT_ROWS * m->config.dim * sizeof(float)));
    CUDA_TRY(cudaMalloc((void **)&f->done, n_counters(m) * sizeof *f->done));
    CUDA_TRY(cudaMalloc((void **)&f->best, (size_t)MAX_ACT_ROWS * f->n_blocks * EPILOGUE_WARPS * sizeof(int2)));
    // Once; every step leaves them so.
    CUDA_TRY(cudaMemsetAsync(f->done, 0, n_counters(m) * sizeof *f->done, s->stream));
    cudaFuncAttributes loads; // a kernel that is asked about: fused_exchange.cuh needs all of a step's beforehand
    CUDA_TRY(cudaFuncGetAttributes(&loads, decode_argmax_kernel));
    CUDA_TRY(with_type(m->weights.tok_embeddings.dtype,
                       [&](auto type) { return cudaFuncGetAttributes(&loads, decode_embed_kernel<decltype(type)>); }));
    return true;
}

// The kernels of the run's steps, if they are these; open_exchange has loaded its own.
static bool load_kernels_of_run(Model *m, CudaState *s, Error *err) {
    const FusedState *f = s->fused;
    if (f->exchange || steps_are_wide(m) || steps_are_cublas(m, f, 1)) return true;
    return load_products_kernels<FusedParams>(m, s, fused_min(f->max_rows, model_step_rows(m)), err);
}

// Beside the upload, which no step's kernel waits for.
static bool prepare_fused(Model *m, Error *err) {
    return for_shards(m, err, [&](Model *m, CudaState *s) { return prepare_rank(m, s, err); }) &&
           open_exchange(m, err) &&
           for_shards(m, err, [&](Model *m, CudaState *s) { return load_kernels_of_run(m, s, err); }) &&
           prepare_steps(m, err);
}

static void free_fused(FusedState *f) {
    if (!f) return;
    close_exchange(f);
    if (f->h_all != f->h) cudaFree(f->h_all);
    cudaFree(f->h);
    cudaFree(f->down_partial);
    cudaFree(f->normed);
    cudaFree(f->done);
    cudaFree(f->best);
    free(f);
}

static void close_fused(Model *m) {
    FusedState *fused[MAX_SHARDS] = {};
    WideState *wide[MAX_SHARDS] = {};
    CudaState *s = (CudaState *)m->state;
    for (int r = 0; s && r < (s->peers ? m->shard.count : 1); r++) {
        const CudaState *rank = (const CudaState *)model_of_rank(m, r)->state;
        if (rank) fused[r] = rank->fused, wide[r] = rank->wide;
    }
    close_cuda(m); // after which nothing runs
    for (int r = 0; r < MAX_SHARDS; r++) {
        free_fused(fused[r]);
        wide_close(wide[r]);
    }
}

static bool open_fused(Model *m, Error *err) {
    if (!open_cuda(m, prepare_fused, err)) return false;
    const CudaState *s = (CudaState *)m->state;
    // Rows of prompts have the order of sums of engine cublas's steps, and only of these; FP8 products are of no step.
    m->two_passes = s->fp8 || s->fused->terms > 1 || model_sequences(m) <= s->fused->max_rows || steps_are_wide(m);
    return true;
}

extern "C" const Engine engine_fused = {"fused",         PRECISION_BF16, usable_fused,     open_fused,
                                        close_fused,     forward_cuda,   read_logits_cuda, sample_cuda,
                                        allocate_pinned, free_pinned,    copy_pages_cuda,  step_rows_fused};
