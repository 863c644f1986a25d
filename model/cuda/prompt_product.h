// Products of many rows and 16-bit weights on Hopper, and what follows them: SwiGLU, RoPE and the way into the cache,
// or the residual sum. The sums have the bits of cuBLASLt's kernels that do not cut K (gemm.cu): steps of 16 columns
// are added in the order of K in one float32 accumulator. prompt_product_kernel.cuh keeps what is promised here,
// prompt_product.cu launches.
//
// ---- How the work is cut --------------------------------------------------------------------------------------------
//
// A block computes tiles of 128 tokens and N rows of weights, all columns: 2 warpgroups by wgmma, each with 64 of the
// tokens, so that a row's results are a thread's, or its neighbours'. Of up to 128 tokens in all there are tiles of up
// to 64 tokens as well, for one warpgroup: the tokens are shared out evenly, in multiples of 8, and N is one SM's share
// of the weights, or nearly. Of gate and up a tile has N / 2 rows each, and one thread has an element of both. Two
// blocks, a cluster, have the same weights and neighbouring tokens, or the same tokens and neighbouring weights: of
// what they share each copies half to both. All clusters are resident, and take tiles in turn, in an order that keeps
// the weights and tokens that are in use at one time in L2.
//
//   panel    64 columns: 128 bytes of each row, the width of the swizzle
//   stage    a panel of the tile's tokens and weights; of few tokens two
//
//   producer (1 warp)           copies, as far ahead as the ring has stages, over all tiles of the block; the first
//                               weights while the kernel before still runs
//   consumers (4 or 8 warps)    multiply; what follows the product, from their registers
//
//   barrier         arrivals                                              waits        protects
//   full[stage]     1: the producer; the bytes copied, of both blocks     consumers    the stage
//   empty[stage]    lane i of the consumers of both blocks, at block i's  producers    the same stage of both blocks
//
// A stage is released when the wgmmas that read it are complete, which is known once the next stage's are issued.
//
// ---- What limits it (H200) ------------------------------------------------------------------------------------------
//
// Many tokens: power. In loops of 512 rows and more the GPU runs at 1.3 to 1.45 GHz, at its 700 W, and there the
// products take 1.00 to 1.04 times the cycles of their wgmmas (1024 for a panel of 128 × 256), so what counts is what
// an operation costs. Wide tiles cost least (8192 tokens, gate and up: 256 rows 664, 128 rows 642, 96 rows 555 TFLOP/s;
// cuBLAS 643 without SwiGLU), and what follows a product, by itself, costs more than the same in its registers: SwiGLU
// there 2,400 of 68,000 cycles. The residual sum of weights without scales stays cuBLAS's, which is 2 to 4 % faster
// there: x is read and written in one burst (10,000 cycles for 128 × 256, by loads and stores or by reductions in L2
// alike).
//
// Few tokens: memory, if nothing else is in the way. To start a copy takes the producer 60 to 140 cycles, and a wgmma
// 40 to 60 at least, however few its rows: 8B's down, 64 tokens, took 49 to 79 us with a panel in a stage and two to
// four copies for it, and takes 34 with two panels and two copies (26: its bytes alone). Rows of a box beyond the last
// token take longer than others. A branch among the wgmmas makes the compiler wait for each (45 us). Rings of half the
// shared memory, so that the next kernel's blocks find room, cost 20 percent.
#ifndef PROMPT_PRODUCT_H
#define PROMPT_PRODUCT_H

#include <cuda.h>

#include "prompt_plan.h"
#include "state.h"

enum {
    PROMPT_COLUMNS = 64, // of a panel
    PROMPT_MAX_STAGES = 16,
    PROMPT_SHARED = 226 << 10, // bytes of dynamic shared memory, at most
};

struct PromptParams {
    // Of 16 bits, in four dimensions: column of a panel, token or row, matrix, panel (PromptShape says which boxes).
    CUtensorMap input;                    // [T][cols]
    CUtensorMap weights;                  // [rows][cols], of one matrix, or of gate and up
    int weights_are_stable;               // what runs before does not write them
    int T, rows, cols;                    // rows of one matrix
    int tile_tokens;                      // of a tile: PROMPT_TOKENS, or as many as few tokens need, a multiple of 8
    int row_tiles, token_tiles, together; // a cluster's tiles (prompt_plan.h); of the tokens', those that take turns
                                          // with the same weights
    // What the results are multiplied by first: [rows] of each matrix, or NULL: nothing.
    const float *scale[2];
    void *h;   // PROMPT_SWIGLU: 16 bits [T][pitch]
    float *x;  // PROMPT_ADD: [T][pitch], added to, rounding once
    int pitch; // elements from one row of h or x to the next
    // PROMPT_QKV: rows of queries, keys and values, from first_row of them on.
    int first_row;
    const float2 *rope; // [T][head_dim/2]: cosine and sine
    void *out;          // 16 bits [n_q + 2 n_kv][T][head_dim]
    int n_q, n_kv, head_dim;
    // Where keys and values go; NULL: to out.
    void *k, *v;            // 16 bits [page][n_kv][KV_PAGE][head_dim]
    const int *pos, *slots; // [T]: where each token is in the cache
    const int *table;       // [slot][table_width]: the pages of each slot
    int table_width;
};

// ---- prompt_product.cu ----------------------------------------------------------------------------------------------

// s->prompt_clusters: 0 where these kernels cannot run. s->prompt_least: of each kind the utilisation, with the
// allowance (prompt_plan.h), from which on they are worth it, in percent. (H200, bf16, 8B, us, beside cuBLAS and what
// follows it. Gate and up: 320 tokens, 75 percent, 139 / 130; 512, 90 percent, 185 / 190.)
bool prompt_open(CudaState *s, Error *err);
// Whether these kernels take, and are worth it for, a product of T rows of these weights, or of two alike (SwiGLU), in
// s->type. (PROMPT_ADD without scales: in tiles for few tokens only; of more cuBLAS does as well.)
bool prompt_takes(const CudaState *s, PromptKind kind, const Matrix *w, int T);
// h[T][pitch] = silu(gate) × up of in[T][cols] · wᵀ of both, rounded to s->type. The results are multiplied by
// scales [rows] of each first, unless those are NULL. up is after gate in memory, by a multiple of 16 bytes.
bool prompt_swiglu(CudaState *s, void *h, int pitch, const Matrix *gate, const Matrix *up, const float *gate_scale,
                   const float *up_scale, const void *in, int T, Error *err);
// x[T][pitch] += in[T][cols] · wᵀ × scale [rows], rounding once. scale NULL: without, where prompt_takes that.
bool prompt_add(CudaState *s, float *x, int pitch, const Matrix *w, const float *scale, const void *in, int T,
                Error *err);
// What p says of PROMPT_QKV, from `scale` on, of in[T][cols] · wᵀ, queries and keys rotated, all rounded to s->type.
bool prompt_qkv(CudaState *s, PromptParams *p, const Matrix *w, const void *in, int T, Error *err);

#endif
