// Engine fused: its state, and what its launches on one GPU (fused.cu) and on several (fused_shards.cu) share.
#ifndef FUSED_STATE_H
#define FUSED_STATE_H

#include "fused_kernel.cuh"

// What a rank exchanges with others within kernels (fused_exchange.cuh), in one block of memory.
struct Exchange {
    char *region;                       // two sets are at 0
    size_t set_bytes, x_down, h, att;   // of a set, and where they begin in it; x_out is at 0
    size_t best, finished, step, bytes; // where they begin in the region
    char *regions[MAX_SHARDS];          // of all ranks, as they are reached from this one's GPU
    float *logits[2];                   // rank 0's, by CudaState.buffer
};

struct FusedState {
    int n_blocks, max_rows, terms; // max_rows: tokens of one pass over the weights
    bool packed;                   // is a matrix quantised?
    size_t shared_limit;           // dynamic shared memory that a block may have
    void *h;                       // 16-bit [MAX_ACT_ROWS][own hidden_dim]
    void *h_all;                   // 16-bit [MAX_ACT_ROWS][hidden_dim], gathered; on one GPU h
    float *down_partial;           // [MAX_ACT_ROWS][dim]
    void *normed;                  // 16-bit [MAX_ACT_ROWS][dim]
    unsigned *done;                // [n_layers + 1][MAX_PRODUCTS]; after them as many next_tile, and rows_normalised
    int2 *best;                    // [MAX_ACT_ROWS][n_blocks][EPILOGUE_WARPS]
    Exchange *exchange;            // NULL: there is one GPU, or ranks gather what they need between kernels
};

// ---- which kernel -------------------------------------------------------------------------------------------------
// Each calls body with the Numbers of a kernel.

// Of 16-bit weights: by the rows of a tile and of activations.
template <typename W, int TERMS, int GROUPS, class Body> static auto with_pairs(int act_rows, Body body) {
    if constexpr (TERMS == 1)
        if (act_rows <= 2) return body(Numbers<W, TERMS, GROUPS, Weights16<2>>());
    return act_rows <= 4 ? body(Numbers<W, TERMS, GROUPS, Weights16<4>>())
                         : body(Numbers<W, TERMS, GROUPS, Weights16<8>>());
}
template <typename W, int TERMS, class Body> static auto with_tile(const FusedParams &p, Body body) {
    return p.tile_rows == MMA_WEIGHT_ROWS ? with_pairs<W, TERMS, 1>(p.n_rows * TERMS, body)
                                          : with_pairs<W, TERMS, MAX_TILE_GROUPS>(p.n_rows * TERMS, body);
}

// Of quantised weights in bf16: by their kind, if all products have one that a kernel is made for, and by the rows of
// activations.
static bool has_kind(const Product &f, CodeType codes, int scale_bytes, int smallest_group, int largest_group) {
    return f.codes == codes && f.scale_bytes == scale_bytes &&
           (scale_bytes == 0 || (1 << f.group_log2 >= smallest_group && 1 << f.group_log2 <= largest_group));
}
template <int ROWS, class Body> static auto with_kind(const FusedParams &p, Body body) {
    auto all_have = [&](CodeType codes, int scale_bytes, int smallest_group, int largest_group) {
        bool all = true;
        for (int i = 0; i < p.n_products; i++)
            all = all && has_kind(p.product[i], codes, scale_bytes, smallest_group, largest_group);
        return all;
    };
    if (all_have(CODES_FP8, 0, 0, 0))
        return body(Numbers<bf16, 1, PACKED_TILE_GROUPS, WeightsOf<CodesFp8, 0, float, ROWS>>());
    if (all_have(CODES_INT8, 0, 0, 0))
        return body(Numbers<bf16, 1, PACKED_TILE_GROUPS, WeightsOf<CodesInt8, 0, float, ROWS>>());
    if (all_have(CODES_INT8, 2, 32, 64))
        return body(Numbers<bf16, 1, PACKED_TILE_GROUPS, WeightsOf<CodesInt8, 4, bf16, ROWS>>());
    if (all_have(CODES_INT4, 2, 32, 64))
        return body(Numbers<bf16, 1, PACKED_TILE_GROUPS, WeightsOf<CodesInt4, 4, bf16, ROWS>>());
    if (all_have(CODES_INT4, 2, 128, 128))
        return body(Numbers<bf16, 1, PACKED_TILE_GROUPS, WeightsOf<CodesInt4, 1, bf16, ROWS>>());
    return body(Numbers<bf16, 1, PACKED_TILE_GROUPS, WeightsOfAnyKind<ROWS>>());
}

// Of a launch.
template <class Body> static auto for_numbers(const Model *m, const FusedParams &p, Body body) {
    bool f32 = m->precision == PRECISION_F32;
    if (weights_are_quantised(m))
        return f32             ? body(Numbers<bf16, 3, PACKED_TILE_GROUPS, WeightsOfAnyKind<MAX_ACT_ROWS>>())
               : p.n_rows <= 2 ? with_kind<2>(p, body)
                               : with_kind<MAX_ACT_ROWS>(p, body);
    if (m->weights.layers[0].wq.dtype == DTYPE_BF16)
        return f32 ? with_tile<bf16, 3>(p, body) : with_tile<bf16, 1>(p, body);
    return f32 ? with_tile<f16, 3>(p, body) : with_tile<f16, 1>(p, body);
}

// A kernel is loaded when something of it is asked for or set.
template <typename N, class Params> static cudaError_t allow_shared_memory(const FusedState *f) {
    return cudaFuncSetAttribute((const void *)decode_products_kernel<N, Params>,
                                cudaFuncAttributeMaxDynamicSharedMemorySize, (int)f->shared_limit);
}
template <class Params>
static cudaError_t launch_products_kernel(const Model *m, const CudaState *s, const FusedPlan *plan, bool pdl,
                                          const Params &p) {
    return for_numbers(m, p, [&](auto numbers) {
        typedef decltype(numbers) N;
        cudaError_t status = allow_shared_memory<N, Params>(s->fused);
        return status != cudaSuccess ? status
                                     : launch_kernel(decode_products_kernel<N, Params>, s->fused->n_blocks,
                                                     plan->threads, plan->shared_bytes, pdl, s->stream, p);
    });
}

// ---- fused.cu -------------------------------------------------------------------------------------------------------

FusedShape fused_shape(const Model *m, const FusedState *f, int n_rows);
// The parameters of kernel i of a pass over n rows from row `first` of the batch on.
FusedParams fused_params(const Model *m, const CudaState *s, const FusedPlan *plan, int i, int first, int n);
// Of a step, in FusedState.done.
int n_counters(const Model *m);
// What a pass over n rows from row `first` of the batch on begins with: their embeddings in x, and their RoPE table.
bool embed_pass(const Model *m, CudaState *s, float *x, int first, int n, Error *err);
// A kernel of a pass, as it is on one GPU.
bool launch_products(const Model *m, const CudaState *s, const FusedPlan *plan, bool pdl, const FusedParams &p,
                     Error *err);
// What a pass ends with: the argmax of its rows, to the host and as the next step's input.
bool argmax_pass(const Model *m, CudaState *s, bool pdl, const int2 *best, int n_best, int first, int n,
                 const RanksToWaitFor &ranks, Error *err);
// Loads the kernels of steps of up to so many rows, so that no step waits for one.
template <class Params> static bool load_products_kernels(const Model *m, const CudaState *s, int rows, Error *err) {
    const FusedState *f = s->fused;
    for (int n = 1; n <= rows; n++) {
        FusedShape shape = fused_shape(m, f, n);
        FusedPlan plan;
        if (!fused_plan(&shape, &plan)) return fail(err, "no plan for %d rows, where there is one for more", n);
        for (int i = 0; i <= m->config.n_layers; i++) {
            const FusedParams p = fused_params(m, s, &plan, i, 0, n);
            cudaFuncAttributes attributes;
            CUDA_TRY(for_numbers(m, p, [&](auto numbers) {
                typedef decltype(numbers) N;
                cudaError_t status = allow_shared_memory<N, Params>(f);
                return status != cudaSuccess
                           ? status
                           : cudaFuncGetAttributes(&attributes, (const void *)decode_products_kernel<N, Params>);
            }));
        }
    }
    return true;
}
// --verbose
void log_products(const FusedParams *p, const FusedPlan *plan, int n_blocks, const char *exchange);

// ---- fused_shards.cu ------------------------------------------------------------------------------------------------

// A pass over n rows on several GPUs: ranks exchange in kernels, or gather between them.
bool decode_pass_by_exchange(Model *m, const FusedPlan *plan, int first, int n, bool several, Error *err);
bool decode_pass_by_gathers(Model *m, const FusedPlan *plan, int first, int n, bool several, Error *err);
// Memory that all ranks reach, and every kernel of a pass loaded; nothing on one GPU,
// or where ranks have no such memory.
bool open_exchange(Model *m, Error *err);
void close_exchange(FusedState *f);

#endif
