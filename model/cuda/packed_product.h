// Products of quantised weights (packed.h) and 1 to PACKED_ROWS rows of bf16 activations on Hopper. The weights come from
// memory as codes, and are widened in registers on their way into wgmma. The result has the bits that widen.h and
// cuBLASLt give (gemm.cu): the same weights in bf16, steps of 16 columns added in the order of K in one float32
// accumulator. packed_product_kernel.cuh keeps what is promised here, packed_product.cu launches.
//
// ---- How the work is cut --------------------------------------------------------------------------------------------
//
// A block has a tile: 64 W rows of weights (a warpgroup has 64 of them) and N rows of activations, all columns; W and N
// are the kernel's. C blocks, a cluster, have neighbouring rows of weights and the same activations, of which each copies
// one C-th, to all of them.
//
//   panel    64 columns: of activations N rows of 128 bytes, a stage of the ring of inputs
//   slice    128 bytes of codes of each row: 2 panels of 8 bits a code, 4 of 4; a stage of the ring of codes
//   scales   of a block of 1024 columns (packed.h), where groups have them: copied with the block's first slice
//
//   codes producer (1 warp)    depends on nothing but room in the ring: it starts before the kernel in front has ended
//   input producer (1 warp)    copies its part of each panel to all blocks of the cluster
//   consumers (W × 4 warps)    widen a panel's codes while the last panel's wgmmas run; the epilogue
//
//   barrier              arrivals                                        waits        protects
//   codes.full[stage]    1: the codes producer; the bytes copied         consumers    codes stage, and scales
//   codes.empty[stage]   4 W: lane 0 of each consumer warp               producer     the same
//   input.full[stage]    1: the input producer; the bytes of all C       consumers    input stage
//   input.empty[stage]   4 W C: consumer warps of all blocks             producer     the same stage of all blocks
//
// Buffer b % n_scales has the scales of block b. It is written with slice `first` of block b + n_scales, when slice
// first - n_codes has been released, which is one of block b's last slice or later ones: see packed_scale_buffers.
//
// Codes are released when the wgmmas that take them have been issued: their registers, and so the loads, were complete.
// A panel of activations is released when its wgmmas are complete, which is known once the next panel's are issued: so
// the ring of inputs has at least two stages.
//
// ---- Who has which column -------------------------------------------------------------------------------------------
//
// wgmma takes steps of 16 columns, and the bits depend on which 16 they are. Of a step lane 4g + t has columns 2t, 2t + 1
// and 2t + 8, 2t + 9, of rows g and g + 8 of its warp's 16; the activations in shared memory have columns in their own
// order. A chunk of a row (packed.h) has its columns in runs of 8: run r of 4, in the 16 bytes of lane r, has columns 8r ..
// 8r + 7 of each 32. So step s of the two of 32 columns is runs 2s and 2s + 1, and a lane needs one pair of columns of each
// run: nibbles t and t + 4 of its word, or a byte of its word t / 2 and the one 16 bits on (codes.cuh: pair). The four
// lanes of a row read the same word, or two neighbours, of which shared memory sends one copy; the swizzle of the copies
// keeps eight rows in different banks.
//
// ---- What limits it (H200) ------------------------------------------------------------------------------------------
//
// A panel of 64 rows takes a warp scheduler about 100 cycles to widen and the tensor cores 2 N; at 35 KB a microsecond an
// SM reads its 2 KB (of 4 bits) in 100. Tiles are not cut in K, so matrices of fewer tiles than there are SMs leave some
// idle. Activations come from L2, which gives all SMs together what memory does and little more: hence clusters.
#ifndef PACKED_PRODUCT_H
#define PACKED_PRODUCT_H

#include <cuda.h>

#include "state.h"

enum {
    PACKED_ROWS = 256, // of activations, at most: from there on widening costs less than it gives
    PACKED_PANEL = 64, // columns
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
    CUtensorMap codes[PACKED_MATRICES];  // bytes [rows][row_bytes], in boxes of PACKED_SLICE_BYTES x 64 W
    CUtensorMap scales[PACKED_MATRICES]; // the same in boxes of scale_pitch x 64 W; of no use if that is 0
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

// Buffers of scales for so many stages of codes, `slices` to a block of 1024 columns: the last slice of a block has been
// released before the first of the block that takes its buffer is copied.
RULE int packed_scale_buffers(int n_codes, int slices) {
    return 1 + (n_codes - 1 + slices - 1) / slices;
}

// ---- packed_product.cu ----------------------------------------------------------------------------------------------

// s->packed_rows: PACKED_ROWS where these kernels can run and s->type is bf16; else 0.
bool packed_open(CudaState *s, Error *err);
// Whether these kernels take a matrix: it is quantised, and its rows and columns are multiples of PACKED_UNIT. Of others
// cuBLASLt has kernels whose steps are other columns.
bool packed_takes(const Matrix *w);
// out[matrices][T][pitch] (+)= in[T][cols] · wᵀ, of w and, unless it is NULL, of `other`, which is alike (dtype, shape,
// group); in bf16, aligned to 16 bytes, out float32. The sums are multiplied by row_scales [rows], unless that is NULL.
// beta: 1 adds to out, rounding once; 0 does not read it. Any T > 0; cols % 8 = 0.
bool packed_product(CudaState *s, float *out, int pitch, const Matrix *w, const Matrix *other, const float *row_scales,
                    const void *in, int T, float beta, Error *err);

#endif
