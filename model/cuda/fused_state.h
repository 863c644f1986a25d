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
    unsigned *done;                // [n_layers + 1][MAX_PRODUCTS]; after them as many counters next_tile
    int2 *best;                    // [MAX_ACT_ROWS][n_blocks][EPILOGUE_WARPS]
    Exchange *exchange;            // NULL: there is one GPU, or ranks gather what they need between kernels
};

// Calls body with the Numbers for the model's weights and precision, and tiles of so many rows.
template <typename W, int TERMS, class Body> static auto with_tile(int tile_rows, Body body) {
    return tile_rows == MMA_WEIGHT_ROWS ? body(Numbers<W, TERMS, 1>()) : body(Numbers<W, TERMS, MAX_TILE_GROUPS>());
}
template <class Body> static auto for_numbers(const Model *m, int tile_rows, Body body) {
    bool f32 = m->precision == PRECISION_F32;
    if (weights_are_quantised(m))
        return f32 ? body(Numbers<bf16, 3, PACKED_TILE_GROUPS, true>())
                   : body(Numbers<bf16, 1, PACKED_TILE_GROUPS, true>());
    if (m->weights.layers[0].wq.dtype == DTYPE_BF16)
        return f32 ? with_tile<bf16, 3>(tile_rows, body) : with_tile<bf16, 1>(tile_rows, body);
    return f32 ? with_tile<f16, 3>(tile_rows, body) : with_tile<f16, 1>(tile_rows, body);
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
