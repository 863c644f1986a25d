// Engine fused, steps of many rows: the launches. What they launch: wide_kernel.cuh, by the protocol in wide.h.
#include "wide.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "ops.h"
#include "tensor_map.h"
#include "wide_kernel.cuh"

// How the matrices are cut.
struct WidePlan {
    int blocks; // in all
    int tile_rows[WIDE_LM_HEAD + 1];
    CUtensorMap *weights; // host [n_layers][4] and one more: qkv, out, gate and up, down of each; lm_head
};

struct WideState {
    size_t shared_limit; // dynamic shared memory that a block may have
    WidePlan plan;
    float *squares; // [MAX_WIDE_ROWS][dim / WIDE_SQUARES]
    // Several GPUs: this one's part, of which `squares` and CudaState.xb have all. NULL: there is one.
    float *own_squares; // [MAX_WIDE_ROWS][own dim / WIDE_SQUARES]
    bf16 *own_in;       // [MAX_WIDE_ROWS][own dim]
    unsigned *done;     // [n_layers + 1][MAX_WIDE_PRODUCTS]
};

// Rows of a tile of a matrix, a multiple of 16: as many as leave the cluster that has most the least to copy; what it
// copies of activations in each pass counts as 16 rows.
static int wide_tile_rows(int rows, int clusters) {
    int best = 0, least = 0;
    for (int tile = WIDE_TILE; tile >= 16; tile -= 16) {
        int tiles = (rows + tile - 1) / tile, most = (tiles + clusters - 1) / clusters;
        int cost = most * tile + (most + WIDE_TILES - 1) / WIDE_TILES * 16;
        if (best == 0 || cost < least) best = tile, least = cost;
    }
    return best;
}

// Tiles of rows of a matrix; or, where `other` is not NULL, of 8 rows of one and 8 of the other by turns.
static bool weights_map(CUtensorMap *map, const void *data, const void *other, int rows, int cols, int tile_rows,
                        Error *err) {
    cuuint64_t pitch = (cuuint64_t)cols * 2;
    int groups = other ? rows / 8 : rows / 16;
    cuuint64_t dims[4] = {(cuuint64_t)cols, 8, 2, (cuuint64_t)groups};
    cuuint64_t strides[3] = {pitch, other ? (cuuint64_t)((const char *)other - (const char *)data) : 8 * pitch,
                             (other ? 8 : 16) * pitch};
    cuuint32_t box[4] = {WIDE_COLUMNS, 8, 2, (cuuint32_t)tile_rows / 16};
    return tensor_map(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, data, 4, dims, strides, box, WIDE_COLUMNS * 2, err);
}

static bool input_map(CUtensorMap *map, const void *data, int rows, int box_rows, int cols, Error *err) {
    cuuint64_t dims[2] = {(cuuint64_t)cols, (cuuint64_t)rows}, strides[1] = {(cuuint64_t)cols * 2};
    cuuint32_t box[2] = {WIDE_COLUMNS, (cuuint32_t)box_rows};
    return tensor_map(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, data, 2, dims, strides, box, WIDE_COLUMNS * 2, err);
}

// Calls body with the rows that a kernel for n tokens computes.
template <class Body> static auto with_rows(int n, Body body) {
    return n <= 8 ? body(std::integral_constant<int, 8>()) : body(std::integral_constant<int, MAX_WIDE_ROWS>());
}

template <int N> static int wide_stages(const WideState *w) {
    int n = (int)((w->shared_limit - WIDE_SHARED_FIXED<N>) / WIDE_STAGE<N>);
    return n < WIDE_MAX_STAGES ? n : WIDE_MAX_STAGES;
}
template <int N> static size_t wide_shared(const WideState *w) {
    return WIDE_SHARED_FIXED<N> + (size_t)wide_stages<N>(w) * WIDE_STAGE<N>;
}

// Whether the kernels take the model on this GPU: wgmma is Hopper's alone, in sm_90a's code; f16 has not the range for
// what is not normalised; every part of K is whole panels.
static bool wide_takes(const Model *m, bool *takes, Error *err) {
    const Config *c = &m->config;
    int device = 0, major = 0;
    CUDA_TRY(cudaGetDevice(&device));
    CUDA_TRY(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    cudaFuncAttributes kernel;
    CUDA_TRY(cudaFuncGetAttributes(&kernel, (const void *)wide_products_kernel<8>));
    *takes = major == 9 && kernel.maxThreadsPerBlock == WIDE_THREADS && m->precision == PRECISION_BF16 &&
             !weights_are_quantised(m) && m->weights.dtype != DTYPE_F16 &&
             c->dim % (WIDE_CLUSTER * WIDE_COLUMNS) == 0 && c->q_dim % (WIDE_CLUSTER * WIDE_COLUMNS) == 0 &&
             c->hidden_dim % (WIDE_CLUSTER * WIDE_COLUMNS) == 0 && c->head_dim % 16 == 0 && c->vocab_size % 16 == 0;
    return true;
}

int wide_most_rows(const Model *m, int sequences) {
    Error err;
    bool takes = false;
    if (sequences > MAX_WIDE_ROWS || !wide_takes(m, &takes, &err) || !takes) return MAX_STEP_ROWS;
    return MAX_WIDE_ROWS;
}

// Rows of this rank's queries, keys and values.
static int qkv_rows(const Model *m) {
    return (own_heads(m) + 2 * own_kv_heads(m)) * m->config.head_dim;
}

static bool make_plan(const Model *m, const WideState *w, WidePlan *plan, Error *err) {
    const Config *c = &m->config;
    int clusters = 0;
    for (int n = 8; n <= MAX_WIDE_ROWS; n *= 2) {
        int fit = 0;
        if (!with_rows(n, [&](auto rows) {
                constexpr int N = decltype(rows)::value;
                cudaLaunchConfig_t config = {};
                config.gridDim = dim3(WIDE_CLUSTER);
                config.blockDim = dim3(WIDE_THREADS);
                config.dynamicSmemBytes = wide_shared<N>(w);
                CUDA_TRY(cudaFuncSetAttribute((const void *)wide_products_kernel<N>,
                                              cudaFuncAttributeMaxDynamicSharedMemorySize, (int)w->shared_limit));
                CUDA_TRY(cudaOccupancyMaxActiveClusters(&fit, (const void *)wide_products_kernel<N>, &config));
                return true;
            }))
            return false;
        if (clusters == 0 || fit < clusters) clusters = fit; // one number for all sizes
    }
    if (clusters == 0) return fail(err, "no cluster of %d blocks fits the GPU", WIDE_CLUSTER);
    plan->blocks = clusters * WIDE_CLUSTER;
    plan->weights = (CUtensorMap *)aligned_alloc(alignof(CUtensorMap), (c->n_layers * 4 + 1) * sizeof(CUtensorMap));
    if (!plan->weights) return fail(err, "out of memory: tensor maps");
    const Shard *own = &m->shard;
    int *rows = plan->tile_rows;
    rows[WIDE_QKV] = wide_tile_rows(qkv_rows(m), clusters);
    rows[WIDE_OUT] = rows[WIDE_DOWN] = wide_tile_rows(own->dim.n, clusters); // x's owners are the same
    rows[WIDE_GATE_UP] = wide_tile_rows(2 * own->hidden.n, clusters);
    rows[WIDE_LM_HEAD] = wide_tile_rows(own->vocab.n, clusters);
    for (int i = 0; i < c->n_layers; i++) {
        const LayerWeights *l = &m->weights.layers[i];
        CUtensorMap *map = plan->weights + 4 * i;
        if (!weights_map(map, l->wq.data, NULL, qkv_rows(m), c->dim, rows[WIDE_QKV], err) ||
            !weights_map(map + 1, l->wo.data, NULL, own->dim.n, c->q_dim, rows[WIDE_OUT], err) ||
            !weights_map(map + 2, l->w1.data, l->w3.data, own->hidden.n, c->dim, rows[WIDE_GATE_UP], err) ||
            !weights_map(map + 3, l->w2.data, NULL, own->dim.n, c->hidden_dim, rows[WIDE_DOWN], err))
            return false;
    }
    return weights_map(plan->weights + 4 * c->n_layers, m->weights.output.data, NULL, own->vocab.n, c->dim,
                       rows[WIDE_LM_HEAD], err);
}

static bool prepare_wide(Model *m, WideState *w, Error *err) {
    int device = 0, limit = 0;
    CUDA_TRY(cudaGetDevice(&device));
    CUDA_TRY(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    w->shared_limit = (size_t)limit - 1024; // the kernel's own variables
    if (!make_plan(m, w, &w->plan, err)) return false;
    CUDA_TRY(cudaMalloc((void **)&w->squares, (size_t)MAX_WIDE_ROWS * (m->config.dim / WIDE_SQUARES) * sizeof(float)));
    if (m->shard.count > 1) {
        size_t n = (size_t)MAX_WIDE_ROWS * m->shard.dim.n;
        CUDA_TRY(cudaMalloc((void **)&w->own_squares, n / WIDE_SQUARES * sizeof(float)));
        CUDA_TRY(cudaMalloc((void **)&w->own_in, n * sizeof(bf16)));
    }
    CUDA_TRY(cudaMalloc((void **)&w->done, (m->config.n_layers + 1) * MAX_WIDE_PRODUCTS * sizeof(unsigned)));
    return true;
}

bool wide_open(Model *m, CudaState *s, Error *err) {
    bool takes = false;
    if (!wide_takes(m, &takes, err)) return false;
    if (!takes) return true;
    if (!(s->wide = (WideState *)calloc(1, sizeof *s->wide))) return fail(err, "out of memory: the engine's state");
    return prepare_wide(m, s->wide, err);
}

void wide_close(WideState *w) {
    if (!w) return;
    free(w->plan.weights);
    cudaFree(w->squares);
    cudaFree(w->own_squares);
    cudaFree(w->own_in);
    cudaFree(w->done);
    free(w);
}

// One more product of a kernel for n rows, box_rows of them copied.
static bool add_product(WideParams *p, const WidePlan *plan, WideKind kind, const CUtensorMap *weights, const void *in,
                        int n, int box_rows, const float *norm, int rows, int cols, Error *err) {
    WideProduct *f = &p->product[p->n_products++];
    f->weights = *weights;
    f->kind = kind;
    f->norm = norm;
    f->rows = rows;
    f->cols = cols;
    f->tile_rows = plan->tile_rows[kind];
    f->tiles = (rows + f->tile_rows - 1) / f->tile_rows;
    return input_map(&f->input, in, n, box_rows, cols, err);
}

// The parameters of kernel i of a step of n rows: the products between the attention of layer i - 1 and that of layer
// i.
static bool wide_params(const Model *m, const WideState *w, const WidePlan *plan, int i, int n, int box_rows,
                        WideParams *p, Error *err) {
    const Config *c = &m->config;
    const Shard *own = &m->shard;
    const CudaState *s = (const CudaState *)m->state;
    const Weights *all = &m->weights;
    memset(p, 0, sizeof *p);
    p->n_rows = n;
    p->n_heads = own_heads(m);
    p->n_kv_heads = own_kv_heads(m);
    p->head_dim = c->head_dim;
    p->dim = c->dim;
    p->hidden_dim = own->hidden.n;
    p->vocab_size = own->vocab.n;
    p->eps = c->norm_eps;
    p->x = s->x;
    p->in = (bf16 *)s->xb;
    p->squares = w->squares;
    p->h = (bf16 *)s->h;
    p->qkv = (bf16 *)s->qkv_in;
    p->rope = s->rope_table;
    p->logits = own_logits(m, s, 0);
    p->done = w->done + i * MAX_WIDE_PRODUCTS;
    const float *next = (i < c->n_layers ? all->layers[i].attention_norm : all->norm) + own->dim.first;
    const CUtensorMap *before = plan->weights + 4 * (i - 1);
    if (i > 0 &&
        !(add_product(p, plan, WIDE_OUT, before + 1, s->att_all, n, box_rows,
                      all->layers[i - 1].ffn_norm + own->dim.first, own->dim.n, c->q_dim, err) &&
          add_product(p, plan, WIDE_GATE_UP, before + 2, s->xb, n, box_rows, NULL, 2 * own->hidden.n, c->dim, err) &&
          add_product(p, plan, WIDE_DOWN, before + 3, s->h_all, n, box_rows, next, own->dim.n, c->hidden_dim, err)))
        return false;
    if (i < c->n_layers)
        return add_product(p, plan, WIDE_QKV, plan->weights + 4 * i, s->xb, n, box_rows, NULL, qkv_rows(m), c->dim,
                           err);
    return add_product(p, plan, WIDE_LM_HEAD, plan->weights + 4 * i, s->xb, n, box_rows, NULL, own->vocab.n, c->dim,
                       err);
}

// What a step begins with.
static bool embed_wide(const Model *m, CudaState *s, int n, Error *err) {
    const Config *c = &m->config;
    const Matrix *table = &m->weights.tok_embeddings;
    CUDA_TRY(with_type(table->dtype, [&](auto type) {
        return launch_kernel(wide_embed_kernel<decltype(type)>, n, 256, 0, false, s->stream, s->x_all, (bf16 *)s->xb,
                             s->wide->squares, (const decltype(type) *)table->data, m->weights.layers[0].attention_norm,
                             (const int *)s->step->tokens, c->dim, s->rope_table, (const int *)s->step->lens,
                             (const float *)s->rope_freq, c->head_dim / 2, s->wide->done,
                             (c->n_layers + 1) * MAX_WIDE_PRODUCTS);
    }));
    return true;
}

// The products between the attention of layer i - 1 and that of layer i, in one launch. adjust(&params): before it.
template <class Adjust>
static bool launch_wide(const Model *m, CudaState *s, int i, int n, bool pdl, bool verbose, Adjust adjust, Error *err) {
    const WideState *w = s->wide;
    const WidePlan *plan = &w->plan;
    return with_rows(n, [&](auto rows) {
        constexpr int N = decltype(rows)::value;
        WideParams p;
        if (!wide_params(m, w, plan, i, n, N, &p, err)) return false;
        p.n_stages = wide_stages<N>(w);
        adjust(&p);
        if (verbose)
            fprintf(
                stderr,
                "decode: wide_products_kernel %d products, %d rows of %d, grid %d, clusters of %d, block %d, shared "
                "%zu: a ring of %d x %d bytes\n",
                p.n_products, n, N, plan->blocks, WIDE_CLUSTER, WIDE_THREADS, wide_shared<N>(w), p.n_stages,
                WIDE_STAGE<N>);
        CUDA_TRY(
            launch_kernel(wide_products_kernel<N>, plan->blocks, WIDE_THREADS, wide_shared<N>(w), pdl, s->stream, p));
        return true;
    });
}

// ---- several GPUs: a product in each launch, gathers between them, as fused.cu has it -------------------------------

static OwnColumns own_wide_in(const Model *m) {
    const CudaState *s = (const CudaState *)m->state;
    return {s->wide->own_in, s->xb, m->shard.dim, sizeof(bf16)};
}

static OwnColumns own_wide_squares(const Model *m) {
    const WideState *w = ((const CudaState *)m->state)->wide;
    const Rows own = m->shard.dim;
    return {w->own_squares, w->squares, {own.first / WIDE_SQUARES, own.n / WIDE_SQUARES}, sizeof(float)};
}

// The parameters of a launch with the product of that kind alone: what it adds to and writes is the shard's own.
static void keep_product(const Model *m, const CudaState *s, WideKind kind, WideParams *p) {
    int k = 0;
    while (p->product[k].kind != kind) k++;
    if (k > 0) p->product[0] = p->product[k];
    p->n_products = 1;
    if (kind != WIDE_OUT && kind != WIDE_DOWN) return;
    p->dim = m->shard.dim.n;
    p->in = s->wide->own_in;
    p->squares = s->wide->own_squares;
}

static bool product_by_shards(Model *m, int i, WideKind kind, int n, Error *err) {
    const Config *c = &m->config;
    if (!for_shards(m, err, [&](Model *m, CudaState *s) {
            return launch_wide(m, s, i, n, false, false, [&](WideParams *p) { keep_product(m, s, kind, p); }, err);
        }))
        return false;
    return kind == WIDE_QKV       ? true
           : kind == WIDE_GATE_UP ? gather_h(m, n, err)
           : kind == WIDE_LM_HEAD
               ? gather_logits(m, 0, n, err)
               : gather(m, n, c->dim, own_wide_in, err) && gather(m, n, c->dim / WIDE_SQUARES, own_wide_squares, err);
}

static bool step_by_shards(Model *m, int n, bool several, Error *err) {
    const Config *c = &m->config;
    bool verbose = first_launch(m, &((CudaState *)m->state)->logged_decode);
    if (verbose)
        fprintf(stderr, "decode: wide_products_kernel on %d GPUs, a launch for each product, %d rows\n", m->shard.count,
                n);
    if (!for_shards(m, err,
                    [&](Model *m, CudaState *s) { return embed_wide(m, s, n, err) && take_own_x(m, s, n, err); }))
        return false;
    for (int i = 0; i < c->n_layers; i++) {
        if (!product_by_shards(m, i, WIDE_QKV, n, err) || !for_shards(m, err, [&](Model *m, CudaState *s) {
                return attend_step_rows(m, s, i, 0, n, several, verbose && i == 0 && m->shard.rank == 0, err);
            }))
            return false;
        if (!gather_att(m, n, err) || !product_by_shards(m, i + 1, WIDE_OUT, n, err) ||
            !product_by_shards(m, i + 1, WIDE_GATE_UP, n, err) || !product_by_shards(m, i + 1, WIDE_DOWN, n, err))
            return false;
    }
    return product_by_shards(m, c->n_layers, WIDE_LM_HEAD, n, err) &&
           for_shards(m, err, [&](Model *, CudaState *s) { return argmax_rows(s, 0, n, c->vocab_size, err); });
}

// ---- one GPU --------------------------------------------------------------------------------------------------------

bool enqueue_step_wide(Model *m, int n, bool several, Error *err) {
    const Config *c = &m->config;
    CudaState *s = (CudaState *)m->state;
    if (s->comm) return step_by_shards(m, n, several, err) && publish_step(m, n, several, err);
    bool verbose = first_launch(m, &s->logged_decode);
    if (!embed_wide(m, s, n, err)) return false;
    for (int i = 0; i <= c->n_layers; i++) { // every layer is launched alike
        if (i > 0 && !attend_step_rows(m, s, i - 1, 0, n, several, verbose && i == 1, err)) return false;
        if (!launch_wide(m, s, i, n, true, verbose && i <= 1, [](WideParams *) {}, err)) return false;
    }
    return argmax_rows(s, 0, n, c->vocab_size, err) && publish_argmax(s, n, s->step, err);
}
