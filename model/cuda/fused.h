// Engine fused: decode at the memory limit, for one to a few tokens at a time. A step has to read every weight once;
// what is here serves to keep that stream from stopping. This header is the protocol: what the kernels of a step, the
// blocks of a kernel and the warps of a block promise each other. fused_kernel.cuh keeps it, fused.cu launches,
// fused_plan.h has sizes and tuning rules; fused_exchange.cuh says what differs where several GPUs share a model. "Row"
// alone is a row of weights; a token's activations are an activation row, three of them in f32.
//
// ---- The chain of kernels of a step ---------------------------------------------------------------------------------
//
//   kernel                       grid × block    may start when                      may start the next when
//   decode_embed_kernel          n_rows × 256    the kernel before is complete       at once
//   decode_products_kernel 0     SMs × 384*      embed has started  (PDL)            its consumers are past their wait
//   for each layer:
//     decode attention           ≤ 2 SMs × 128   products is past its wait  (PDL)    its blocks are past their wait
//     decode_products_kernel i   SMs × 384*      attention is past its wait  (PDL)   its consumers are past their wait
//   decode_argmax_kernel         1 × 256         products is past its wait  (PDL)    it is complete
//
// * 352 where weights are quantised.
//
// PDL: programmatic dependent launch; "its wait" is griddepcontrol.wait, which returns when the kernel before is
// complete. So at any time one kernel computes and the next one prepares, and whatever came earlier is complete.
//
// A products kernel computes all matrix products between two attentions: out (wo), gate_up (w1 and w3), down (w2), qkv
// of the next layer. Kernel 0 has qkv alone; the last one ends with lm_head in place of qkv. Down is several products,
// each of some columns of K, where its activations would not leave room for a ring (split_down).
//
// ---- A block of decode_products_kernel: eleven warps or twelve, one block on every SM -------------------------------
//
//   producer (1 warp)    copies the block's tiles of weights to a ring in shared memory, over all products without a
//                        stop. Weights depend on nothing, so it starts before the kernel before is complete
//   consumers (8 warps)  bring the product's activations to shared memory; each multiplies its columns of every K slice
//   epilogue (2 warps)   each every second tile: adds up its partial sums and does what follows: residual sum, SwiGLU,
//                        RoPE, argmax
//   one warp more        where weights have 16 bits: has nothing to do, but registers move between whole warpgroups
//
// A tile is 4 rows (one group) or 8, or 16 where weights are quantised, its columns in K slices, one stage of the ring
// each. The first tile of a product is given (first_tile), the next ones go to whichever block asks first (an atomic
// counter), as SMs read at different speeds.
//
//   barrier                      arrivals                              waits                 protects
//   full[stage], mbarrier        1: producer lane 0; the bytes copied  consumers, producer   stage, stage_tile
//   empty[stage], mbarrier       8: lane 0 of each consumer warp       producer              the same
//   partials full[4], mbarrier   8: lane 0 of each consumer warp       epilogue              partials, partial_tile
//   partials empty[4], mbarrier  1: lane 0 of the tile's epilogue warp consumers             the same
//   BARRIER_FUSED_CONSUMERS      256: consumer threads                 the same              activations, squares
//   BARRIER_FUSED_EPILOGUE       64: epilogue threads                  the same              RoPE table, x, h
//   BARRIER_FUSED_SETUP          352: producer arrives, others sync    consumers, epilogue   mbarriers, `started`
//   done[product], global        1: epilogue lane 0 of every block     consumer thread 0     x, h (below)
//   rows_normalised[product]     1: consumer thread 0, for a row       consumer thread 0     normed (below)
//
// The producer waits for `full` too, of the oldest copies, so that few are in flight. `empty` is arrived at when the
// warp's sums exist (mbarrier_arrive_after): its loads are complete then. A product ends with END_OF_PRODUCT in
// stage_tile and, by way of the consumers, in partial_tile: one stage, and a buffer for each epilogue warp, without a
// tile. The epilogue warps wait for each other at the end of a product: so none waits for a buffer of the next one that
// may still be full of the one before, and one thread counts for both.
//
// ---- Shared memory, LLaMA 3.1 8B, bf16, one token (fused_plan; static_assert below) ---------------------------------
//
//     offset    bytes   what
//          0   28,672   activations, 16-bit [activation row][columns], of the longest input (down's 14,336)
//     28,672    2,048   partial sums, float [4 buffers][slice][consumer warp][activation row][tile row]
//     30,720      512   RoPE table, float2 [token][head_dim / 2]
//     31,232      512   residuals, float [32 buffers][token][tile row]
//     31,744  196,608   ring, 16-bit [6 stages][tile row][slice]; 2 stages (64 KB) in flight, 1 while input is awaited
//    228,352            of the 231,424 that a block may have; 452 more are the kernel's own variables
//
// Where weights are quantised two more are between residuals and ring: scales of rows, float [32 buffers][tile row],
// and sums of activations, float [chunk of 128 columns][1, or each 32 columns: 4][even number of activation rows].
//
// ---- Global buffers -------------------------------------------------------------------------------------------------
//
//   buffer         type [shape]              written by               read by                         edge
//   x              f32 [n][dim]              embed                    consumers (qkv of kernel 0)     K
//                                            epilogue (out)           consumers (gate_up)             D
//                                            epilogue (out)           epilogue (down)                 D, then B
//                                            epilogue (down)          consumers (qkv, lm_head)        D
//                                            epilogue (down), embed   producer (out, next kernel)     P
//   h, × h_factor  16-bit [n × terms][hidden]  epilogue (gate_up)     consumers (down)                D
//   qkv            KV type [heads][n][hd]    epilogue (qkv)           attention                       K
//   att            KV type [n][q_dim]        attention                consumers (out)                 K
//   normed         16-bit [n][dim]           consumers, one block     consumers (qkv, gate_up,        D, by
//                                            for a row                lm_head)                        rows_normalised
//   down_partial   f32 [n][dim]              epilogue (down)          epilogue (next part of down)    same lane
//   rope           float2 [n][hd / 2]        embed                    epilogue                        K
//   logits, best   f32 [n][vocab], int2      epilogue (lm_head)       argmax kernel, host             K
//   done           u32 [product]             epilogue                 consumers                       D; zeroed: K
//   rows_normalised  the same                consumers                consumers                       D; zeroed: K
//   next_tile      s32 [product]             producer (atomic)        the same                        none; zeroed: K
//
//   K  kernel to kernel. The reader has called griddepcontrol.wait. Whoever writes global memory has called it before,
//      the epilogue warp too, so nothing is overwritten that a kernel before still reads. decode_embed_kernel is
//      launched without PDL, so that a step, its producers included, begins after the argmax kernel before it has
//      left the counters at zero.
//   D  block to block, within a kernel. Writer: stores of the epilogue warps, BARRIER_FUSED_EPILOGUE, red.release.gpu
//      on done[product] by one of their threads (release is cumulative: for both warps). Reader: consumer thread 0
//      polls with ld.acquire.gpu until all blocks are there, then BARRIER_FUSED_CONSUMERS. Loads are past L1
//      (ld.global.cg, cp.async.cg). Where rows are normalised once (NORMALISE_ONCE_ROWS) the writers are the consumers
//      of one block for each row, with their barrier and rows_normalised[product] in place of those. A row of `normed`
//      is written again for the next product with a norm, when every block has finished what it was for.
//   B  the epilogue warp reads x in down, which other blocks' epilogue warps wrote in out, without acquiring. The order
//      is out's stores, D to this block's consumers (before gate_up), program order, their arrival at partials full
//      (release), its wait for partials full (acquire), its load. Each edge synchronises, so the whole does. It writes
//      x in down when done[gate_up] is complete: no block normalises x any more. An element of x is read and written by
//      one lane.
//   P  the producer copies x for out before this kernel has waited for anything. This kernel runs because every block
//      of attention is past its wait for the kernel that wrote x: that one is complete, and its writes are in L2, where
//      bulk copies read. (The PTX manual promises visibility to those who wait themselves; this is by the hardware's
//      order.) Until out is done only the block that has the tile reads these elements, and it overwrites them after
//      the copy has landed.
//
// Buffers of residuals and of scales have no barrier of their own: a copy for tile j starts when tile j - n_stages is
// released, whose partial sums may be waiting for a buffer, that is for the epilogue warp to be done with tile
// j - n_stages - 4, whose residuals and scales it reads first. 32 buffers are more than n_stages + 4 (static_assert).
// They land with the tile's weights, on `full`.
//
// ---- Why it cannot deadlock -----------------------------------------------------------------------------------------
//
//   co-residency   blocks poll `done` of all others, so all must run at once: one block fits an SM, the grid is one per
//                  SM. What holds SMs meanwhile is the attention before, which waits for complete kernels only, so it
//                  ends. The next kernel is let in only when all blocks of this one have arrived at their
//                  let_next_kernel_start
//   order          a block's tiles are produced, consumed and finished product by product. By induction: a product's
//                  input is complete when all blocks have finished the one before; then every block's tiles of it are
//                  computed, its producer finds none left, and END_OF_PRODUCT reaches every epilogue warp, which counts
//                  in `done`
//   normed         who normalises a row has the product's input, and waits for no other block before it counts
//   run-ahead      the producer may be products ahead. It waits for `empty`, which consumers free in that order, and
//                  for copies, which land by themselves. Tiles that it took early wait in the ring; nobody else needs
//                  them before the product's turn
//   rings          a consumer waits for partials empty after it has released the stage, an epilogue warp for partials
//                  full, and at the end of a product for the other one, which then waits for nobody: no cycle.
//                  stages_in_flight <= n_stages, so the producer never waits for a copy that it has not started, and a
//                  parity never laps
//   steps          the counters are zero at the start of a step; each product has its own, none is used twice
//
// ---- How rows meet the tensor cores ---------------------------------------------------------------------------------
//
// A lane takes 16 bytes of a row from shared memory, and these four registers are a whole left operand of an m16n8k16,
// without a move. Lane = 4g + t. Weight row r = g / 2 of the group; half h = g % 2 of its 64 columns; words 0 to 3 are
// the 8 columns 32h + 8t .. +7, two each.
//
//   left operand (weights)               right operand (activations)           result, lane 4g + t
//     k:      2t,2t+1    2t+8,2t+9         k:       2t,2t+1    2t+8,2t+9         column:  2t    2t+1
//   row g     word 0     word 2          column g:  b 0        b 1               row g    c[0]  c[1]
//   row g+8   word 1     word 3                                                  row g+8  c[2]  c[3]
//
//   - rows 2r + h of the left operand are words 0 and 2, rows 2r + h + 8 words 1 and 3 of half h of weight row r
//   - columns 4b + 2h of the right operand are words 0 and 2, columns 4b + 2h + 1 words 1 and 3 of half h of activation
//     row b
//   - so half h of the dot product r · b is c[0] + c[3] of the lane with g = 2r + h, t = 2b + h; the lane with the
//     other half is this one xor 5. The other elements are products of parts that do not belong together, and are not
//     used
//
// An mma computes 4 rows × 2 activation rows × 64 columns, a quarter of what it could; the tensor cores are idle most
// of the time. Activations are stored with words 1 and 2 of every four exchanged (permuted_index), so that a lane's b
// is 8 bytes in one place. tests/test_plan.c computes products by this table.
//
// ---- Quantised weights ----------------------------------------------------------------------------------------------
//
// The stream carries codes and scales as they are packed (packed.h): a K slice is whole blocks of 1024 columns, of
// whose chunks of 128 each consumer warp takes every eighth. A lane's bytes of a row are in the order in which an mma
// wants them, so that its left operand is 16 whole rows and its right one up to 8 activation rows: a tile takes as many
// mmas for 8 tokens as for one (fused_packed.cuh).
//
// Codes become bf16 by being alone in their 16 bits. A byte u as the low half of a bf16 is u × 2^-133: the last bit of
// the exponent counts on where the mantissa ends, and tensor cores take subnormal numbers. So of an int4 one bitwise
// operation gives two codes, or two times 16, which the sum of their mmas is divided by; an int8 has its sign bit
// inverted besides; an e4m3 has its bits in bf16's places, times 2^-120. All of it is exact. What codes then have too
// much, 8 or 128, times the sum of the activations that they meet, is taken from the sum: a warp computes these sums,
// of its chunks, before a product's first tile (sum_activations).
//
// Activations that meet codes come times 2^16 (ACT_FACTOR) from whoever stores them: the norm's scale has the factor,
// attention's output gets it on its way to shared memory, and gate_up's epilogue leaves h times h_factor. Sums of mmas
// are multiplied by a power of two that has its inverse. (Products of numbers so small keep their bits: float32 goes
// down to 2^-149, and activations of 2^-12 and more have 24 bits above that.)
//
// A group's scale multiplies the sum of the group's mmas, in the consumer warp; a row's multiplies the finished sum, in
// the epilogue warp: it comes with the tile, as residuals do. A kernel's products may have weights of different types,
// 16-bit ones too; where all have one kind, or 16 bits, the kernel is for that alone (for_numbers in fused_state.h),
// with registers for activations that stay from tile to tile. In bf16 every kernel of quantised weights is there for up
// to 2 and for up to 8 activation rows (of 16-bit weights 2, 4, 8): for fewer tokens a lane of the epilogue has fewer
// rows of a tile. The bits are the same.
//
// ---- Numerics -------------------------------------------------------------------------------------------------------
//
// Inputs of products are rounded to 16 bits as in engine cublas. In --precision f32 they are split in three bf16, x1 +
// x2 + x3 = x to 24 bits (bf16x3), an activation row each, and f16 weights in two, exactly; products of 16-bit numbers
// are exact in float32. The sums of a token have one order, whatever else is in the batch and whichever block computes
// them. In a consumer warp: the mmas of a slice in two chains, the slices (down: each for itself), the two halves of 64
// columns. In the epilogue warp: the consumer warps, the bf16x3 terms, smallest first, and of down the slices.
//
// ---- What was measured (H200; shares of a step of LLaMA 3.1 8B at batch 1) ------------------------------------------
//
//   - the epilogue warp may not wait for memory, or it holds up everyone: x comes with a tile of out, the RoPE table is
//     in shared memory (2 %). It may not poll a barrier in a loop of its own either (8 % more)
//   - one warp of a block asks whether a product is done; all eight asking is 2 % more
//   - what is between two products costs by the instruction: code for four tokens where there is one is 1 %, parameters
//     that are fetched one line after another and a producer that starts after the others are another 1 %
//   - the stream drives everything else out of L2, instructions too, and every launch fetches them again: weights are
//     marked to leave first (1 %), and what runs once in a launch is short (attention's combine: 5 us to 3)
//   - fetching ahead into L2, while the ring is full or after a kernel's last copy, costs what it brings
//   - no gain at batch 1: a product's activations in registers (at 8 rows 5 %: 32 of 41 loads from shared memory that a
//     warp makes for a stage); stages that only some products have room for
//   - registers that are saved to local memory cost more than what they are for, as that is not in L1 beside the
//     stream: with activations held, one kernel for all rows and kinds of weights made a bf16 step 6 % longer. A kernel
//     for each kind has few or none to save: quantised steps take 5 to 8 % less
//   - quantised, contexts of 100 to 250, ms: int4 1.82, int4:32 2.23, int8 2.50, fp8 2.56, where reading takes 0.9
//     (int4) and 1.6 (8 bits); eight sequences int4 2.44, int8 3.18, fp8 3.21. Before activations were stored times
//     2^16, their sums were mmas of four chunks at once, epilogue lanes shared a tile's rows by the number of tokens,
//     chains of two chunks were side by side and rows normalised once: 1.95, 2.30, 2.57, 2.67; 2.53, 3.29, 3.40
//   - int4, by leaving out (1.87 ms then): without the tiles' multiplications 1.48, without the epilogue's sums too
//     1.43. Multiplications are bound by integer operations: of a tile of 16 rows × 4096 columns a warp widens its
//     codes by 160 of them, two cycles each, and a scheduler has two such warps; with the others that is 760 of the
//     1,650 cycles that memory takes for the tile. They add to what a product waits for, and more warps do not help
//     (16 consumer warps 1.89, 4 epilogue warps 2.02); nor does a shift by a multiplication, in another pipe (3 % more)
//   - int4, by a trace of a layer, 57 us: from the last tile of QKV to the first input of out 12.6 (products' end 4.5,
//     attention 5, its end 3), waits for other blocks 2 to 3 a product, input and norm 0.6 to 1, a tile 0.9 whether it
//     comes from memory or is in the ring. Every launch begins without its instructions, which come from L2 behind the
//     stream. A load of 16 bytes a lane takes 4 cycles however few bytes are different: lanes without an activation
//     row load nothing
//   - quantised, no gain: two teams of 8 consumer warps that take tiles in turns (4 % more: fewer registers); rows of a
//     stage 16 bytes apart from banks' multiples, against conflicts of scales (6 % more: a copy for each row, to
//     addresses that are no multiple of 128); rows of 8-bit codes at multiples of 128 in place of 64 (1 % less, for
//     halves of chunks exchanged in odd rows)
//   - 8 rows, by a trace (cycles of a layer, 240,000): input of out 7,500, of gate_up and QKV 15,000 each (2,000 for
//     one row), tiles of gate_up as fast as memory, of the others 1,300 to 1,600 each from the ring. Rows normalised
//     once, and registers that other warps leave to the consumers: 3 % less each; an input of gate_up or QKV then takes
//     6,000 (of 5 rows and more: of 4 it is no gain). No gain: x and attention by asynchronous copies to shared memory;
//     blocks that begin with different rows; the next stage's weights on their way to registers while a tile's sums are
//     left (batch 2 2 % less, 4 4 % more); all 8 rows of attention's output under way at once
//   - attention between two kernels: by a clock that all SMs share, batch 1, context 200: blocks of attention start at
//     once when products end; 2.6 us until they have their range, pages and copies under way, 0.5 for queries, 2.3 for
//     two steps, 1.4 to combine two splits, 0.4 until products' consumers see the end. No gain: the same computed by
//     four consumer warps within this kernel, so that few launches have all layers and the ring goes on (bf16 4 % more,
//     int4 4, 8 rows 15: what attention waits for is as long, in 236 KB of code with registers saved to memory); keys
//     and values fetched to L2 meanwhile by the idle warp (context 200 0.5 % less, 2,000 1 % more)
//   - a second epilogue warp brought 3 %; one alone took 1.7 us for a tile of 16 rows, where memory brings one in 1.0.
//     Addresses that a loop keeps, and does not compute again from the number of the thread, brought 3 %; codes widened
//     by one instruction a pair where there were three, 2 %
#ifndef FUSED_H
#define FUSED_H

#include "fused_plan.h"
#include "packed.h"
#include "state.h"

enum CodeType { CODES_NONE, CODES_FP8, CODES_INT8, CODES_INT4 }; // CODES_NONE: 16-bit weights
// What activations that meet codes are multiplied by, a power of two, so exactly: products with codes, which are
// multiples of 2^-133, would be subnormal numbers.
constexpr int ACT_EXPONENT = 16;
constexpr float ACT_FACTOR = 1 << ACT_EXPONENT;
enum ProductKind { PRODUCT_QKV, PRODUCT_OUT, PRODUCT_GATE_UP, PRODUCT_DOWN, PRODUCT_LM_HEAD };

// One matrix product of a kernel.
struct Product {
    ProductKind kind;
    int rows, cols;               // of the weights; gate and up together
    const char *weights;          // [rows] of row_bytes, 16-bit [cols] or packed (packed.h); PRODUCT_GATE_UP: gate
    const char *up;               // PRODUCT_GATE_UP
    const float *scales;          // [rows], what sums are multiplied by; NULL: nothing. PRODUCT_GATE_UP: gate's
    const float *up_scales;       // PRODUCT_GATE_UP
    const float *norm;            // [cols], or NULL: the input is not normalised
    int n_slices, slice;          // K slices, and the columns of one: a multiple of SLICE_UNIT; the last may be shorter
    int first_col, row_length;    // columns from first_col on, of rows of row_length: a part of down's K, or all
    int slices_per_sum;           // slices whose sum is rounded as one; these sums are added in their order
    bool adds_partial;            // the sum of the parts of K before is in down_partial
    bool leaves_partial;          // the sum goes to down_partial: more parts follow
    int row_bytes;                // of a row of weights in memory
    int first_byte, bytes;        // of it, what this product takes
    int slice_bytes;              // of a K slice
    int weight_pitch;             // bytes between rows of the weights in a stage
    CodeType codes;               // of the weights
    int group_log2;               // of the columns that share a scale
    int scale_bytes, block_bytes; // Packing's
    int act_pitch;                // bytes between activation rows in shared memory
    int first_block;              // has the first tile: goes on from product to product, so that blocks even out
};

// The parameters of decode_products_kernel.
struct FusedParams {
    Product product[MAX_PRODUCTS];
    int n_products, n_rows; // n_rows: tokens, one of each sequence
    int tile_rows;          // from here to scales_offset: see FusedPlan
    int n_stages, stage_bytes, partial_floats;
    int stages_in_flight, stages_ahead;
    int ring_offset, partials_offset, rope_offset, residuals_offset, scales_offset, code_sums_offset;
    int n_heads, n_kv_heads, head_dim, dim, hidden_dim, q_dim, vocab_size;
    unsigned head_dim_inverse; // 2^32 / head_dim, rounded up: row / head_dim is the upper half of their product
    float eps;
    float *x;            // [n_rows][dim]: the residual stream
    void *qkv;           // KV type [n_heads + 2 n_kv_heads][n_rows][head_dim]
    const void *att;     // KV type [n_rows][q_dim]
    float *down_partial; // [n_rows][dim]: split-K partial sums of down
    void *normed;        // 16-bit [n_rows][dim], permuted: x normalised, as it enters a product
    void *h;             // 16-bit [n_rows × terms][hidden_dim], times h_factor
    float h_factor;      // ACT_FACTOR if down's weights are codes, else 1
    const float2 *rope;  // [n_rows][head_dim/2]: RoPE table, cosine and sine
    float *logits;       // [n_rows], logits_pitch apart
    int2 *best;          // [n_rows], best_pitch apart: largest logit (its bits), token; -1: one is not finite
    int logits_pitch, best_pitch;
    int first_token;           // that of row 0 of the output matrix
    unsigned *done;            // [n_products]: blocks that have finished a product
    int *next_tile;            // [n_products]: tiles taken, after each block's first
    unsigned *rows_normalised; // [n_products]: rows in `normed`
};

// The same where several GPUs exchange what they compute (fused_exchange.cuh). x and h: dim and hidden_dim are the
// model's; of x only this rank's columns are kept up to date; best is in the region, with those of all ranks.
struct SharedParams : FusedParams {
    int n_peers;                                // the other ranks
    ptrdiff_t to_peer[MAX_SHARDS - 1];          // from an address in this rank's region to the same in another's
    char *sets;                                 // [2][set_bytes]: what is exchanged, in a kernel and in the next
    unsigned set_bytes, x_down, h_all, att_all; // where they begin in a set; x_out is at 0
    unsigned number, n_layers;                  // of the kernel in its step, 0 to n_layers
    int first_x, first_h, first_attention;      // this rank's columns: floats, 16-bit elements, 16 bytes
    int own_x, own_h;                           // how many
    bool sends_products;                        // in whole rows, when a product is done; else each number at once
    int attention_words, attention_pitch; // 16 bytes: of a row of att, which is this rank's alone, and of all ranks'
    unsigned *finished;                   // blocks of all ranks at the end of a step, in all steps
    const unsigned *step;                 // steps so far
    unsigned long long wait_limit;        // ns
    bool shares_gpu;                      // with other ranks
};

// What a step's argmax kernel waits for where several GPUs exchange: the blocks of n ranks, at the output matrix.
struct RanksToWaitFor {
    unsigned n, blocks; // n: 0: nothing
    const unsigned *done;
    unsigned *step;                // steps so far: counted on
    unsigned long long wait_limit; // ns
};

// A kernel has 4 KB of parameters on every architecture and driver.
static_assert(sizeof(SharedParams) <= 4096, "parameters of a kernel");
static_assert(WORKER_THREADS == 352 && CONSUMER_THREADS == 256, "the table of barriers");
static_assert(FUSED_THREADS == 3 * 128 && CONSUMER_THREADS == 2 * 128, "warpgroups");
static_assert(2 * CONSUMER_REGISTERS + OTHER_REGISTERS == 3 * 168, "registers of a thread, of 65,536 for all");
static_assert(RESIDUAL_BUFFERS > MAX_STAGES + PARTIAL_BUFFERS, "a residual buffer is filled anew before it is read");
static_assert(SLICE_UNIT == 512 && MAX_SLICE % SLICE_UNIT == 0, "every consumer warp has whole mmas of a slice");
static_assert(MAX_SLICE % (MAX_TILE_GROUPS * SLICE_UNIT) == 0, "the same where a slice is half as long");
static_assert(MAX_ACT_ROWS * MMA_WEIGHT_ROWS == 32, "a lane of the epilogue warp is a token and a row of a group");
static_assert(MAX_ACT_ROWS % MMA_ACT_ROWS == 0, "pairs of activation rows");
static_assert(FUSED_MAX_DIM <= 2 * MAX_SLICE && FUSED_MAX_DIM == CONSUMER_THREADS * 4 * 8,
              "8 float4s a thread normalise a row");

// The table of shared memory.
constexpr FusedPlan fused_plan_8b() {
    FusedShape shape = {4096, 4096, 14336, 128, 1, 1, 232448 - FUSED_STATIC_BYTES, 0};
    FusedPlan plan = {};
    return fused_plan(&shape, &plan) ? plan : FusedPlan{};
}
static_assert(fused_plan_8b().partials_offset == 28672 && fused_plan_8b().rope_offset == 30720, "shared memory of 8B");
static_assert(fused_plan_8b().residuals_offset == 31232 && fused_plan_8b().ring_offset == 31744, "shared memory of 8B");
static_assert(fused_plan_8b().n_stages == 6 && fused_plan_8b().stage_bytes == 32768, "shared memory of 8B");
static_assert(fused_plan_8b().stages_in_flight == 2 && fused_plan_8b().stages_ahead == 1, "shared memory of 8B");
static_assert(fused_plan_8b().shared_bytes == 228352, "shared memory of 8B");

#endif
