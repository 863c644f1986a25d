// Engine fused, steps of runs of 9 to 16 sequences (MAX_WIDE_ROWS). As for fewer rows, one kernel computes all matrix
// products between two attentions, on every SM at once, and a stream of weights that depends on nothing runs ahead of
// it. What differs is how the work is cut. (More rows: prompt_product.h.) wide_kernel.cuh keeps what is promised here,
// wide.cu launches.
//
// ---- How the work is cut --------------------------------------------------------------------------------------------
//
// A cluster of two blocks shares a tile of up to 64 rows of weights; each block has half of its columns (of K). So a
// block copies half of the activations, from L2, and wgmma takes its 64 rows; a tile of whole rows for each block would
// copy more activations than weights in out and down. A block computes up to three tiles at a time (a pass), with the
// same activations. Clusters have consecutive tiles, always the same ones.
//
//   weights     block 0: columns 0 .. K/2   block 1             partial sums [64][tokens] each
//   rows  0 .. 31      their two partial sums are added up in block 0, in the order of the blocks
//   rows 32 .. 63      in block 1: a warp of wgmma has 16 rows (a fragment), and sends its sums there
//
// A stage of the ring is one to three panels: 64 columns of the pass's tiles, and of the activations.
//
// ---- A block of wide_products_kernel --------------------------------------------------------------------------------
//
//   weights producer (1 warp)   copies the block's part of weights to the ring, over all products without a stop
//   input producer (1 warp)     copies the activations beside them, once the product before is done everywhere
//   consumers (3 × 4 warps)     a warpgroup has one tile of the pass; sends its sums over the cluster
//   epilogue (6 warps)          two for each tile: adds up what the blocks sent, and does what follows
//
//   barrier                  arrivals                                   waits               protects
//   weights[stage]           1: their producer; the bytes copied        consumers, itself   stage
//   input[stage]             1: the input producer; the bytes copied    consumers           stage
//   empty[stage]             12: lane 0 of each consumer warp           both producers      the same
//   sums_full[tile]          1: an epilogue warp; the bytes sent        epilogue            sums[tile]
//   sums_empty[tile][block]  2: the epilogue warps of that block        consumers           sums[tile] of that block
//   ready                    1: the input producer                      epilogue            squares; once a product
//   BARRIER_WIDE_EPILOGUE    192: epilogue threads                      the same            scale
//   done[product], global    1: the epilogue of every block             input producer      x, in, h
//
// ---- Norms ----------------------------------------------------------------------------------------------------------
//
// RMSNorm is x · w / rms(x), and rms(x) is a number for each token: it can follow the product. So whoever finishes x
// writes x · w, rounded to bf16 (the same relative error), and the sum of the squares of each 16 columns of x; who
// needs the product adds these up and multiplies it by 1 / rms(x). So no block ever reads all of x. (f16 has not the
// range for what is not normalised.)
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
// A row's bits depend on K, not on how many rows there are or which, nor on the number of clusters or GPUs.
//
// ---- What was measured (H200, 8B; shares of what memory gives) ------------------------------------------------------
//
//   - a block reads 32 to 38 KB a microsecond, activations included, whatever is in flight beyond 64 KB; 132 blocks
//     read 10 % more than 120, which is how many fit in clusters of four (parts of the GPU have no multiple of 4)
//   - those, which copy half as many activations, for 17 to 32 rows: 4.67 ms a step of 32, prompt_product.h 4.42
//   - with the whole ring in flight (190 KB) everything else waits 5 us behind it: activations, x, RoPE (16 rows: 77 %)
//   - clusters with 3 tiles of 64 rows beside others with 2 cost 10 %: hence tiles of 48 rows
#ifndef WIDE_H
#define WIDE_H

#include <cuda.h>

#include "state.h"

enum {
    MAX_WIDE_ROWS = 16,
    WIDE_CLUSTER = 2,  // blocks
    WIDE_TILE = 64,    // rows of weights, at most: those of a wgmma
    WIDE_TILES = 3,    // of a pass
    WIDE_COLUMNS = 64, // of a panel: 128 bytes, the width of the swizzle
    WIDE_SQUARES = 16, // columns of x whose squares are added up by one warp: rows of a fragment
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
    CUtensorMap weights; // bf16, four dimensions: column, row of 8, gate or up (else: upper or lower 8), group of 16
    CUtensorMap input;   // bf16 [rows of activations][cols]
    const float *norm;   // [rows]: WIDE_OUT, WIDE_DOWN: of the norm that reads x next
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
    float *squares;     // [n_rows][dim / WIDE_SQUARES]: sums of squares of x
    bf16 *h;            // [n_rows][hidden_dim]
    bf16 *qkv;          // [n_heads + 2 n_kv_heads][n_rows][head_dim]
    const float2 *rope; // [n_rows][head_dim/2]: cosine and sine
    float *logits;      // [n_rows][vocab_size]
    unsigned *done;     // [n_products]: blocks that have finished a product
};
static_assert(sizeof(WideParams) <= 4096, "parameters of a kernel");

// ---- wide.cu --------------------------------------------------------------------------------------------------------

// Rows that a step may have in the order of sums of a run of so many sequences, more than engine fused's kernels for
// few rows take; MAX_STEP_ROWS: those steps are engine cublas's. Of a model that is not open yet.
int wide_most_rows(const Model *m, int sequences);
// s->wide, of a rank, for the model's steps of up to MAX_WIDE_ROWS rows; it stays NULL where the GPU, the shapes or the
// dtypes are not what the kernel takes.
bool wide_open(Model *m, CudaState *s, Error *err);
void wide_close(WideState *wide);
// Enqueues a step of n rows, as CudaState.enqueue_step.
bool enqueue_step_wide(Model *m, int n, bool several, Error *err);

#endif
