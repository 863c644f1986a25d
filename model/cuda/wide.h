// Engine fused, steps of many rows: 9 to 64 tokens at a time (MAX_WIDE_ROWS). As for few rows, one kernel computes all
// matrix products between two attentions, on every SM at once, and a stream of weights that depends on nothing runs
// ahead of it. What differs is how the work is cut. wide_kernel.cuh keeps what is promised here, wide.cu launches.
//
// ---- How the work is cut --------------------------------------------------------------------------------------------
//
// Four blocks, a cluster, share a tile of 64 rows of weights; each has a quarter of its columns (of K). So a block needs
// a quarter of the activations only, 4096 columns of LLaMA 3.1 8B's `out` are 64 tiles, two for each of 32 clusters, and
// wgmma takes its 64 rows. A block computes up to two tiles at a time (a pass), so that what it copies of the
// activations, from L2, serves 128 rows of weights. Clusters have consecutive tiles, always the same ones.
//
//   weights, 64 rows   block 0: columns 0 .. K/4   block 1   block 2   block 3       partial sums [64][tokens] each
//   rows  0 .. 15      their four partial sums are added up in block 0, in the order of the blocks
//   rows 16 .. 31      in block 1; and so on: a warp of wgmma has 16 rows, and sends them where they are finished
//
// A stage of the ring is 64 columns: of two tiles of weights, and of the activations.
//
// ---- A block of wide_products_kernel --------------------------------------------------------------------------------
//
//   weights producer (1 warp)   copies the block's part of weights to the ring, over all products without a stop
//   input producer (1 warp)     copies the activations beside them, once the product before is done everywhere
//   consumers (2 × 4 warps)     a warpgroup has one tile of the pass; sends its sums over the cluster
//   epilogue (4 warps)          two for each tile: adds up what the four blocks sent, and does what follows
//
//   barrier                  arrivals                                   waits               protects
//   weights[stage]           1: their producer; the bytes copied        consumers, itself   stage
//   input[stage]             1: the input producer; the bytes copied    consumers           stage
//   empty[stage]             8: lane 0 of each consumer warp            both producers      the same
//   sums_full[tile]          1: an epilogue warp; the bytes sent        epilogue            sums[tile]
//   sums_empty[tile][block]  2: the epilogue warps of that block        consumers           sums[tile] of that block
//   ready                    1: the input producer                      epilogue            squares; once a product
//   BARRIER_WIDE_EPILOGUE    128: epilogue threads                      the same            scale, squares of a block
//   done[product], global    1: the epilogue of every block             input producer      x, in, h
//
// ---- Norms ----------------------------------------------------------------------------------------------------------
//
// RMSNorm is x · w / rms(x), and rms(x) is a number for each token: it can follow the product. So whoever finishes x
// writes x · w, rounded to bf16 (the same relative error), and the squares of its part of x; who needs the product
// multiplies it by 1 / rms(x). So no block ever reads all of x. (f16 has not the range for what is not normalised.)
//
// ---- Order ----------------------------------------------------------------------------------------------------------
//
//   - in of gate_up and qkv, x, squares: written by the epilogue of out and down, where done[...] of the product that
//     reads them is complete: out's by the kernel before, down's since its input, h, needs gate_up done everywhere
//   - copies read in and h by the asynchronous proxy: a writer fences (fence_proxy_async_global) before it counts in
//     done, and the reader after it has seen it
//   - an element of x belongs to one thread in out and down alike: tiles and blocks are the same
//   - no deadlock: all clusters are resident (the grid is what fits at once); a block's tiles come product by product,
//     and what a product waits for is the one before. Partial sums wait for room in another block, whose epilogue waits
//     for sums of the pass before only
//
// A row's bits depend on K, and on the number of clusters (squares), not on how many rows there are or which.
#ifndef WIDE_H
#define WIDE_H

#include <cuda.h>

#include "state.h"

enum {
    MAX_WIDE_ROWS = 32,
    MAX_PAIR_ROWS = 16, // clusters of two blocks, up to here; of four from there on
    WIDE_TILE = 64,    // rows of weights, at most: those of a wgmma
    WIDE_TILES = 3,    // of a pass
    WIDE_COLUMNS = 64, // of a panel: 128 bytes, the width of the swizzle
    WIDE_PANELS = 3,   // of a stage, at most
    WIDE_MAX_STAGES = 16,
    // Stages of weights on their way at once; while a product waits for its input. With more, every other access waits
    // behind them, the input's too.
    WIDE_IN_FLIGHT = 3,
    WIDE_AHEAD = 1,
    WIDE_EPILOGUE_WARP = 4 * WIDE_TILES,
    WIDE_EPILOGUE_WARPS = 2 * WIDE_TILES,
    WIDE_WEIGHTS_WARP = WIDE_EPILOGUE_WARP + WIDE_EPILOGUE_WARPS,
    WIDE_INPUT_WARP,
    WIDE_THREADS = 32 * (WIDE_INPUT_WARP + 1),
    MAX_WIDE_PRODUCTS = 4,
};

enum WideKind { WIDE_QKV, WIDE_OUT, WIDE_GATE_UP, WIDE_DOWN, WIDE_LM_HEAD };

// One matrix product of a kernel.
struct WideProduct {
    CUtensorMap weights;   // bf16, four dimensions: column, row of 8, gate or up (else: upper or lower 8), group of 16
    CUtensorMap input;     // bf16 [rows of activations][cols]
    const float *norm;     // [rows]: WIDE_OUT, WIDE_DOWN: of the norm that reads x next
    WideKind kind;
    int tiles, tile_rows, rows, cols; // of the weights; gate and up together
};

struct WideParams {
    WideProduct product[MAX_WIDE_PRODUCTS];
    int n_products, n_rows, n_stages;
    int n_heads, n_kv_heads, head_dim, dim, hidden_dim, vocab_size;
    float eps;
    float *x;           // [n_rows][dim]: the residual stream
    bf16 *in;           // [n_rows][dim]: x × the norm's weight
    float *squares;     // [n_rows][blocks]: sums of squares of x
    bf16 *h;            // [n_rows][hidden_dim]
    bf16 *qkv;          // [n_heads + 2 n_kv_heads][n_rows][head_dim]
    const float2 *rope; // [n_rows][head_dim/2]: cosine and sine
    float *logits;      // [n_rows][vocab_size]
    unsigned *done;     // [n_products]: blocks that have finished a product
};
static_assert(sizeof(WideParams) <= 4096, "parameters of a kernel");

// ---- wide.cu --------------------------------------------------------------------------------------------------------

struct WideState;
// The state for the model's steps of up to MAX_WIDE_ROWS rows; NULL in *wide where the GPU, the shapes or the dtypes are
// not what the kernel takes.
bool wide_open(Model *m, WideState **wide, Error *err);
void wide_close(WideState *wide);
// Enqueues a step of n rows, as CudaState.enqueue_step.
bool enqueue_step_wide(Model *m, WideState *wide, int n, Error *err);

#endif
