// Products of quantised weights (packed.h) and 1 to PACKED_ROWS rows of bf16 activations on Hopper. The weights come
// from memory as codes, and are widened in registers on their way into the tensor cores. The result has the bits that
// widen.h and cuBLASLt give (gemm.cu): the same weights in bf16, steps of 16 columns added in the order of K in one
// float32 accumulator. packed_product_kernel.cuh keeps what is promised here, packed_product.cu launches.
//
// ---- How the work is cut --------------------------------------------------------------------------------------------
//
// A block has a tile: some rows of weights and N rows of activations, all columns. C blocks, a cluster, have
// neighbouring rows of weights and the same activations, of which each copies one C-th, to all of them.
//
//   panel    64 columns: of activations N rows of 128 bytes
//   slice    128 bytes of codes of each row: 2 panels of 8 bits a code, 4 of 4
//   scales   of a block of 1024 columns (packed.h), where groups have them: copied with the block's first slice
//
//   codes producer (1 warp)    depends on nothing but room in the ring: it starts before the kernel in front has ended
//   input producer (1 warp)    copies its part of the activations to all blocks of the cluster
//   consumers                  widen codes ahead of the products that take them; the epilogue
//
// By mma.sync, for up to 64 rows of activations and where tiles are few: a warp has 16 or 32 of the rows. One ring,
// whose stages are a slice of codes and the activations of its columns:
//
//   barrier         arrivals                                                waits        protects
//   full[stage]     2: both producers; the bytes copied, of all C           consumers    the stage, and scales
//   empty[stage]    consumer warps x C: lane i of each warp, at block i's   producers    the same stage of all blocks
//
// By wgmma, for 128 x 256 tiles: a warpgroup has 64 of the rows. Two rings, of slices of codes and of
// panels of activations:
//
//   codes.full[stage]    1: the codes producer; the bytes copied         consumers    codes stage, and scales
//   codes.empty[stage]   consumer warps: lane 0 of each                  producer     the same
//   input.full[stage]    1: the input producer; the bytes of all C       consumers    input stage
//   input.empty[stage]   consumer warps x C                              producer     the same stage of all blocks
//
// Buffer b % n_scales has the scales of block b. It is written with slice `first` of block b + n_scales, when slice
// first - n_codes has been released, which is one of block b's last slice or later ones: see packed_scale_buffers.
//
// A stage is released when what a warp loads of it has arrived in registers; of activations that wgmma reads itself,
// when the wgmmas are complete, which is known once the next panel's are issued: so that ring has at least two stages.
//
// ---- Who has which column -------------------------------------------------------------------------------------------
//
// The bits depend on which 16 columns are a step and on the order of steps, not on the order of columns within one. A
// chunk of a row (packed.h) has its columns in runs of 8: run r of 4, in the 16 bytes of lane r, has columns
// 8r .. 8r + 7 of each 32. So step s of the two of 32 columns is runs 2s and 2s + 1.
//
// By mma.sync, lane 4g + t has columns 4t .. 4t + 3 of a step: half of run 2s + t / 2, so one word of codes for each of
// its two rows, and 8 bytes of each row of activations. They stand for the columns 2t, 2t + 1 and 2t + 8, 2t + 9 of
// mma's operands. Of 8 rows, of weights and of activations, lane group g has row g % 4 * 2 + g / 4: then 16 lanes find
// their 8 bytes in different banks, as the swizzle of the copies has put them.
//
// wgmma takes the activations in their own order, so a lane has columns 2t, 2t + 1 and 2t + 8, 2t + 9: one pair of each
// run, and the four lanes of a row read the same word of codes, or two neighbours.
//
// ---- What limits it (H200) ------------------------------------------------------------------------------------------
//
// Tiles are not cut in K, so the product of a matrix of few rows takes as long as one warp's steps, one after the
// other: an mma of 16 rows waits about 33 cycles for the one before, and a warp that is alone on its scheduler needs 40
// to 50 to widen a step, by the compiler's own schedule. Of more rows memory is the limit (35 KB a microsecond for an
// SM), from about 64 activations on the tensor cores, of which mma.sync reaches two thirds. Activations come from L2,
// which gives all SMs together what memory does and little more: hence clusters.
#ifndef PACKED_PRODUCT_H
#define PACKED_PRODUCT_H

#include <cuda.h>

#include "state.h"

enum {
    // Rows of activations, at most, from which on widening costs less than it gives: of 8B's out and down, 4096 rows,
    // 256 rows take 52 and 166 us where widened ones take 27 and 88, 64 rows 18 and 56 against 21 and 67.
    PACKED_ROWS = 256,
    PACKED_ROWS_OF_FEW = 64, // the same for matrices of up to PACKED_FEW_ROWS
    PACKED_PANEL = 64,       // columns
    PACKED_SLICE_BYTES = 128,
    PACKED_MAX_STAGES = 16,
    PACKED_MATRICES = 2,
    PACKED_UNIT = 64,          // of rows and columns, see packed_takes
    PACKED_FEW_ROWS = 8192,    // of weights: up to there tiles are small
    PACKED_LARGE_BLOCKS = 128, // blocks of 128 rows of weights x 256 of activations that are worth their size
};

// Whose scales are multiplied into the weights: of groups, or none, since rows have them.
enum PackedScales { SCALES_OF_ROWS, SCALES_BF16_OF_32, SCALES_BF16, SCALES_FLOAT32 }; // of groups of 32; 64 or 128; any

struct PackedParams {
    CUtensorMap codes[PACKED_MATRICES];  // bytes [rows][row_bytes], in boxes of PACKED_SLICE_BYTES x the tile's rows
    CUtensorMap scales[PACKED_MATRICES]; // the same in boxes of scale_pitch x as many; of no use if that is 0
    CUtensorMap input;                   // bf16 [T][cols], in boxes of PACKED_PANEL x N / C
    float *out;                          // [matrices][T][pitch]
    const float *row_scales;             // [rows], or NULL: 1
    int matrices, rows, cols;            // of each matrix
    int T, pitch;                        // pitch: elements from one row of out to the next
    int tiles, token_tiles;              // of a matrix; of the activations
    bool adds;                           // to out
    int block_bytes, code_bytes;         // of a block of 1024 columns; of its codes
    int group_log2, scale_pitch;         // bytes of a block's scales: 16, 32, 64 or 128; 0: none
    int n_codes, n_inputs, n_scales;     // stages of codes and of activations; buffers of scales
};

// Buffers of scales for so many stages of codes, `slices` to a block of 1024 columns: the last slice of a block has
// been released before the first of the block that takes its buffer is copied.
RULE int packed_scale_buffers(int n_codes, int slices) {
    return 1 + (n_codes - 1 + slices - 1) / slices;
}

// ---- packed_product.cu ----------------------------------------------------------------------------------------------

// s->packed_rows: PACKED_ROWS where these kernels can run and s->type is bf16; else 0.
bool packed_open(CudaState *s, Error *err);
// Whether these kernels take a matrix: it is quantised, and its rows and columns are multiples of PACKED_UNIT. Of
// others cuBLASLt has kernels whose steps are other columns.
bool packed_takes(const Matrix *w);
// out[matrices][T][pitch] (+)= in[T][cols] · wᵀ, of w and, unless it is NULL, of `other`, which is alike (dtype, shape,
// group); in bf16, aligned to 16 bytes, out float32. The sums are multiplied by row_scales [rows], unless that is NULL.
// beta: 1 adds to out, rounding once; 0 does not read it. Any T > 0, of what
// packed_takes.
bool packed_product(CudaState *s, float *out, int pitch, const Matrix *w, const Matrix *other, const float *row_scales,
                    const void *in, int T, float beta, Error *err);

#endif
