// Engine fused: sizes and tuning rules, as functions of the model's shape and the GPU alone. No GPU is needed to call
// them; tests/test_plan.c does. What the words mean: fused.h.
#ifndef FUSED_PLAN_H
#define FUSED_PLAN_H

#include <stdbool.h>
#include <stddef.h>

#include "rule.h"

enum {
    // Warps of a block: consumers multiply, epilogue warps finish tiles, one producer warp copies weights.
    CONSUMER_WARPS = 8,
    EPILOGUE_WARPS = 2,
    EPILOGUE_WARP = CONSUMER_WARPS, // the first of them
    PRODUCER_WARP = EPILOGUE_WARP + EPILOGUE_WARPS,
    FUSED_WARPS = PRODUCER_WARP + 1,
    CONSUMER_THREADS = 32 * CONSUMER_WARPS,
    WORKER_THREADS = 32 * FUSED_WARPS,
    // Of 16-bit weights a block has three warpgroups, as registers move between whole ones: the last one, of which a
    // warp has nothing to do, leaves some of its 168 a thread to the consumers'. Of quantised weights it has those that
    // work alone: the epilogue, with four groups of sums where tokens are 3 or more, needs its registers, and a warp
    // more costs (int4 2 %, fp8 6).
    FUSED_THREADS = 384,
    CONSUMER_REGISTERS = 216,
    OTHER_REGISTERS = 72,

    // Rows of weights that one mma takes: 16 rows of its left operand hold 4 quarters of each (see the drawing in
    // fused.h).
    MMA_WEIGHT_ROWS = 4,
    // Rows of activations in one mma: 8 columns of its right operand hold 4 quarters of each.
    MMA_ACT_ROWS = 2,
    // Columns of weights in one mma: 16 bytes a lane, 8 lanes a row.
    MMA_COLUMNS = 64,

    // A tile is 4 rows of weights, or 8 where rows are short: with one group of 4 a tile of LLaMA 3.2 1B's dim is 16
    // KB, and neither its atomic counter's answer nor the wait for it is over when the next is due. Two groups made
    // 1B's step a third shorter.
    MAX_TILE_GROUPS = 2,
    // Columns of a K slice of a tile of one group, at most; half of that for two. So a stage of the ring is 32 KB at
    // most.
    MAX_SLICE = 4096,
    // Where weights are quantised: a tile is the 16 rows of an mma, a stage has so many bytes of codes (or of 16-bit
    // weights), and down is summed in parts of so many columns, whether they are products of their own or not.
    PACKED_TILE_GROUPS = 4,
    PACKED_STAGE = 32768,
    PACKED_PART = 4096,

    // A slice is a multiple of this: 64 columns for each consumer warp.
    SLICE_UNIT = CONSUMER_WARPS * MMA_COLUMNS,

    // Bytes of weights in flight from one SM. With more, every other access waits behind them; 96 KB brought nothing.
    MAX_BYTES_IN_FLIGHT = 65536,
    MAX_STAGES = 12,
    // Fewer stages than this and the ring does not bridge the time between two products: then down is split over K
    // instead, whose activations are what takes the room. If that has to be, two stages are enough to work at all.
    MIN_STAGES = 4,
    MIN_STAGES_SPLIT_K = 2,
    // Buffers of partial sums between consumers and epilogue warp.
    PARTIAL_BUFFERS = 4,
    // Residual rows on their way, in tiles. A copy for tile j starts when the consumers have released the stage of tile
    // j - n_stages; the epilogue warp may then still read that of tile j - n_stages - PARTIAL_BUFFERS.
    RESIDUAL_BUFFERS = 32,
    // Activation rows of one pass over the weights: tokens, times 3 where float32 is split in three (bf16x3).
    MAX_ACT_ROWS = 8,
    // From so many tokens on a row that enters products normalised is normalised by one block for all. Of fewer rows
    // every block does it sooner by itself.
    NORMALISE_ONCE_ROWS = 5,
    // Products of one kernel: out, gate and up, down (more than one if its K is split), then qkv or lm_head.
    MAX_PRODUCTS = 10,
    // dim at most: 16 float4s a thread of two rows are held while a row is normalised.
    FUSED_MAX_DIM = 8192,
    // Shared memory that the kernel's own variables may take: barriers, tile numbers, sums of squares.
    FUSED_STATIC_BYTES = 1024,
};

// What the rules depend on.
typedef struct FusedShape {
    int dim, q_dim, hidden_dim, head_dim;
    int n_rows;          // tokens of one pass
    int terms;           // activation rows of each: 1, or 3 (bf16x3)
    size_t shared_bytes; // dynamic shared memory that a block may have
    int packed_pitch;    // where a matrix is quantised: bytes of a row in a stage, the most of all; else 0
} FusedShape;

// Where things are in shared memory, in bytes from its start: activations at 0, then what has an offset here.
typedef struct FusedPlan {
    int threads;        // of a block
    int slice;          // columns of a K slice
    int tile_rows;      // rows of weights in a tile
    bool split_down;    // is down split over K, a product for each slice?
    int partial_floats; // of one buffer of partial sums
    int partials_offset, rope_offset, residuals_offset, scales_offset, code_sums_offset, ring_offset;
    int stage_bytes, n_stages;
    int stages_in_flight; // copies under way at most, while a product is computed
    int stages_ahead;     // and while the consumers wait for its input
    size_t shared_bytes;  // of all
} FusedPlan;

RULE int fused_min(int a, int b) {
    return a < b ? a : b;
}
RULE int fused_max(int a, int b) {
    return a > b ? a : b;
}
RULE int fused_ceil(int n, int unit) {
    return (n + unit - 1) / unit;
}

// Bytes of so many activation rows: 16-bit, each a multiple of 128 bytes, which 4.6 TB/s of copies to shared memory ask
// for (4.0 with multiples of 64).
RULE size_t fused_act_bytes(int cols, int act_rows) {
    return (size_t)act_rows * (size_t)(fused_ceil(cols, 64) * 128);
}

// A slice is as long as the model's dim, if that is not too long: then most rows have one.
RULE int fused_slice(int dim) {
    return fused_min(fused_ceil(dim, SLICE_UNIT) * SLICE_UNIT, MAX_SLICE);
}

// Slices of a row, and their length: a shorter row is one slice.
RULE int fused_n_slices(int cols, int slice) {
    return fused_ceil(cols, slice);
}
RULE int fused_slice_of(int cols, int slice) {
    return cols < slice ? fused_ceil(cols, SLICE_UNIT) * SLICE_UNIT : slice;
}

// Where element i of an activation row is: words 1 and 2 of every four are exchanged, so that a lane's two are
// neighbours.
RULE int permuted_index(int i) {
    return (i & ~6) | (i & 2) << 1 | (i & 4) >> 1;
}

// What a lane brings to an mma (fused.h has the drawing). Of the weights 8 columns, from mma_weight_column on, of row
// mma_weight_row of the group; of the activations pair 0 (words 0 and 2) or 1 (words 1 and 3) of the 8 columns from
// mma_act_column on, of row mma_act_row of the two.
RULE int mma_weight_row(int lane) {
    return lane / 8;
}
RULE int mma_weight_column(int lane) {
    return lane / 4 % 2 * 32 + lane % 4 * 8;
}
RULE int mma_act_row(int lane) {
    return lane / 16;
}
RULE int mma_act_column(int lane) {
    return lane / 8 % 2 * 32 + lane % 4 * 8;
}
RULE int mma_act_pair(int lane) {
    return lane / 4 % 2;
}

// Columns of a K slice where weights are quantised, of a matrix with so many bits to a weight.
RULE int packed_slice(int bits) {
    return PACKED_STAGE / (PACKED_TILE_GROUPS * MMA_WEIGHT_ROWS) * 8 / bits;
}
// Bytes between rows in a stage, from those of a row: two rows that lanes read at once are in other banks.
RULE int packed_pitch(int bytes) {
    return (bytes + 63) / 128 * 128 + 64;
}
// The same of activation rows, of a product with codes: as many columns as whole chunks have.
RULE int packed_act_pitch(int cols) {
    return fused_ceil(cols, 128) * 256 + 64;
}

// Sums of activations that meet codes: four of each 128 columns at most, of an even number of activation rows.
RULE int code_sums_floats(int cols, int act_rows) {
    return fused_ceil(cols, 128) * 4 * fused_ceil(act_rows, 2) * 2;
}

// The plan with `groups` in a tile, down whole or split over K. Returns whether the ring has min_stages.
RULE bool fused_plan_with(const FusedShape *s, int groups, bool split_down, int min_stages, FusedPlan *p) {
    int act_rows = s->n_rows * s->terms, down_cols = split_down ? fused_min(s->hidden_dim, p->slice) : s->hidden_dim;
    int most_cols = fused_max(down_cols, fused_max(s->dim, s->q_dim));
    p->threads = s->packed_pitch ? WORKER_THREADS : FUSED_THREADS;
    p->tile_rows = groups * MMA_WEIGHT_ROWS;
    p->split_down = split_down;
    // Of down every slice's sum is left separately, to be added up in their order; whoever splits it does so between
    // products.
    p->partial_floats =
        (split_down ? 1 : fused_ceil(s->hidden_dim, p->slice)) * CONSUMER_WARPS * act_rows * p->tile_rows;
    p->partials_offset = s->packed_pitch ? fused_ceil(act_rows * packed_act_pitch(most_cols), 128) * 128
                                         : (int)fused_act_bytes(most_cols, act_rows);
    p->rope_offset = p->partials_offset + PARTIAL_BUFFERS * p->partial_floats * (int)sizeof(float);
    p->residuals_offset = p->rope_offset + s->n_rows * s->head_dim * (int)sizeof(float);
    p->scales_offset = p->residuals_offset + RESIDUAL_BUFFERS * s->n_rows * p->tile_rows * (int)sizeof(float);
    int scales_bytes = s->packed_pitch ? RESIDUAL_BUFFERS * p->tile_rows * (int)sizeof(float) : 0;
    p->code_sums_offset = p->scales_offset + scales_bytes;
    int sums_bytes = s->packed_pitch ? code_sums_floats(most_cols, act_rows) * (int)sizeof(float) : 0;
    p->ring_offset = fused_ceil(p->code_sums_offset + sums_bytes, 128) * 128;
    p->stage_bytes = s->packed_pitch ? p->tile_rows * s->packed_pitch : p->tile_rows * 2 * p->slice;
    p->n_stages = fused_min(((int)s->shared_bytes - p->ring_offset) / p->stage_bytes, MAX_STAGES);
    p->stages_in_flight = fused_min(fused_ceil(MAX_BYTES_IN_FLIGHT, p->stage_bytes), p->n_stages);
    // Half of that while a product's input is awaited, 32 KB: stores, counter and input have to get past the copies.
    // They take 4 us in place of 6, 3 % of a step of LLaMA 3.1 8B at batch 1 on an H200.
    p->stages_ahead = (p->stages_in_flight + 1) / 2;
    p->shared_bytes = (size_t)p->ring_offset + (size_t)p->n_stages * (size_t)p->stage_bytes;
    return p->n_stages >= min_stages;
}

// Activations, partial sums, and a ring in the rest. Two groups in a tile, if the slices are short and there is room;
// else one; else down is split over K. False: it does not fit.
RULE bool fused_plan(const FusedShape *s, FusedPlan *p) {
    if (s->packed_pitch) {
        p->slice = PACKED_PART;
        return fused_plan_with(s, PACKED_TILE_GROUPS, false, MIN_STAGES, p) ||
               (fused_plan_with(s, PACKED_TILE_GROUPS, true, MIN_STAGES_SPLIT_K, p) &&
                fused_n_slices(s->hidden_dim, p->slice) <= MAX_PRODUCTS - 3);
    }
    p->slice = fused_slice(s->dim);
    int most_groups = p->slice * MAX_TILE_GROUPS <= MAX_SLICE ? MAX_TILE_GROUPS : 1;
    for (int groups = most_groups; groups > 0; groups--)
        if (fused_plan_with(s, groups, false, MIN_STAGES, p)) return true;
    return fused_plan_with(s, 1, true, MIN_STAGES_SPLIT_K, p) &&
           fused_n_slices(s->hidden_dim, p->slice) <= MAX_PRODUCTS - 3;
}

// Tokens that one pass can take: 0 if not even one fits. Each pass reads all weights once.
static inline int fused_max_rows(FusedShape s) {
    FusedPlan p;
    for (s.n_rows = MAX_ACT_ROWS / s.terms; s.n_rows > 0; s.n_rows--)
        if (fused_plan(&s, &p)) break;
    return s.n_rows;
}

#endif
