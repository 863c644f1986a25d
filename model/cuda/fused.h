// Engine fused: decode at the memory limit, for one to a few rows. One token has to read every weight once; everything
// here serves to keep that stream from stopping.
//
// A step is a chain of kernels: begin, then for each layer attention (attention.cu) and one resident kernel, the segment,
// that computes all matrix products between two attentions: output projection, gate and up, down, and the next layer's
// queries, keys and values; the last segment ends with the logits, and the kernel `end` chooses the token. In a segment every
// SM holds one block of ten warps:
//   producer     streams the block's share of the weights through a ring in shared memory. Weights do not depend on what is
//                computed, so it runs ahead across phases, and starts before the attention in front is done
//   consumers    eight warps, each with its columns of every piece of a row, multiply on tensor cores
//   finisher     adds up the eight partial sums of a row and does what follows: residual sum, SwiGLU, RoPE, a block's best logit
// Between two phases the blocks wait for each other at a counter; the ring fills meanwhile.
//
// How a product meets the tensor cores: it takes a group of four rows of weights. A lane takes 16 bytes of a row, and these four
// registers are the whole left operand of an m16n8k16 product, without a move: rows 2r, 2r + 1, 2r + 8 and 2r + 9 of that
// operand are the same row r of weights, the first and the second 32 of 64 columns, words 0 and 2 of a lane's four, and 1
// and 3. So a row of activations takes four columns of the right operand, one for each of these quarters, and its result
// is the sum of the four elements where they meet; the others are of no use. There is room for that: the tensor cores are
// idle most of the time. Two rows of activations fill the eight columns. (Activations are stored with words 1 and 2 of
// every four exchanged, so that a lane's two words lie together.)
//
// What was measured on the way (H200; shares of a step of LLaMA 3.1 8B at batch 1):
//   - copies to shared memory run at 4.6 TB/s if their rows there start on 128 bytes, at 4.0 if on 64
//   - with more than 64 KB an SM in flight every other access waits behind them. Between two phases 32 KB are better still:
//     stores, counter and input of a phase take 4 us in place of 6 (3 %)
//   - fetching ahead into L2, while the ring is full or behind a segment's last copy, costs what it brings
//   - the finisher may not wait for memory, or it holds up everyone: x comes along with a tile of the output projection,
//     cosines and sines lie in shared memory (2 %). It may not poll a barrier in a loop of its own either (8 % more)
//   - one warp of a block asks whether a phase is over; all eight asking is 2 % more
//   - what stands between two phases costs by the instruction: code for four rows where there is one is 1 %, parameters that
//     are fetched one line after another and a producer that starts after the others are another 1 %
//   - of a tile of 16 KB (1B's dim) neither the claim nor the wait for it are over when the next one is due: two groups in a
//     tile where rows are short made 1B's step a third shorter
//   - no gain: activations of a phase in registers; stages that only some phases have room for; 96 KB in flight
//   - an arrival at an mbarrier does not queue behind loads from shared memory that are still on their way: the slot of such
//     a load may be filled anew (mbarrier_arrive_after)
//   - the stream drives everything else out of L2, instructions too, and every launch fetches them again: weights are marked
//     to go first (1 %), and what runs once in a launch is short (attention's fold: 5 us to 3)
//
// Numerics: inputs of products are rounded to 16 bits as in the cublas engine. In --precision f32 they are split into
// three bf16 terms, x = x1 + x2 + x3 to 24 bits, that take a row each; products of 16-bit numbers are exact in float32. A
// row's sums have one order, whatever else is in the batch and whichever block computes it.
#ifndef FUSED_H
#define FUSED_H

#include "state.h"

namespace {

constexpr int CONSUMERS = 8, FINISHER = CONSUMERS, PRODUCER = CONSUMERS + 1, THREADS = 32 * (CONSUMERS + 2); // warps
constexpr int GROUP = 4;                                     // rows of weights that one product takes
constexpr int MAX_GROUPS = 2;                                // of a tile, which is what a stage of the ring holds: a piece of its rows
constexpr int MAX_PIECE = 4096;                              // columns of a tile of one group in one stage, at most; half of that of two
constexpr int WINDOW_BYTES = 65536;                          // in flight
constexpr int MAX_STAGES = 12;
constexpr int PARTS = 4;                                     // buffers of partial sums
constexpr int RESIDUALS = 32;                                // of tiles: more than lie between the producer and the finisher
constexpr int MAX_TERM_ROWS = 8;                             // rows of terms of one pass
constexpr int MAX_PHASES = 10;
constexpr int MAX_DIM = 8192;

enum PhaseKind { PHASE_QKV, PHASE_OUT, PHASE_GATE_UP, PHASE_DOWN, PHASE_HEAD };

// One matrix product of a segment.
struct Phase {
    PhaseKind kind;
    int rows, cols;            // of the weights; gate and up together
    const char *weights;       // 16-bit [rows][cols]; PHASE_GATE_UP: gate
    const char *up;            // PHASE_GATE_UP
    const float *norm;         // [cols], or NULL: the input is not normalised
    int n_pieces, piece;       // columns are taken in pieces of so many, a multiple of 512
    int column, stride;        // the first of cols columns, of rows of `stride`: down may come in sections, a phase each
    int section;               // pieces that are added up as one; the sums of sections are added in order
    bool carry_in, carry_out;  // the sum of the sections before comes from s.carry, and goes there
    int weight_pitch;          // bytes between rows of the weights in a stage
    int pitch;                 // bytes between rows of the activations in shared memory
    int first_block;           // the one that has the first tile; on from phase to phase, so that shares even out
};

struct Segment {
    Phase phase[MAX_PHASES];
    int n_phases, n_rows;      // n_rows: sequences
    int tile;                  // rows of weights in a tile
    int n_stages, stage_bytes, part_floats;
    int window, window_ahead;  // stages in flight: within a phase, and ahead of it
    int ring_offset, parts_offset, turns_offset, residuals_offset; // in shared memory
    int n_heads, n_kv_heads, head_dim, dim, hidden_dim, q_dim, vocab_size;
    unsigned head_dim_inverse; // 2^32 / head_dim, rounded up: row / head_dim is the upper half of their product
    float eps;
    float *x;                  // [n_rows][dim]: the residual stream
    void *qkv;                 // KV type [n_heads + 2 n_kv_heads][n_rows][head_dim]
    const void *att;           // KV type [n_rows][q_dim]
    float *carry;              // [n_rows][dim]: sums of sections of down
    void *h;                   // 16-bit [n_rows × terms][hidden_dim]
    const float2 *phases;      // [n_rows][head_dim/2]: cosine and sine
    float *logits;             // [n_rows][vocab_size]
    int2 *best;                // [n_rows][blocks]: of a block's logits the largest (its bits) and its token; -1: one is not finite
    unsigned *done;            // [n_phases]: blocks that are through with a phase
    int *claimed;              // [n_phases]: tiles taken, beyond each block's first
};

} // namespace

#endif
