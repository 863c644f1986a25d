// Engine fused: its kernels. The protocol that they keep: fused.h.
#pragma once

#include <type_traits>

#include "fused.h"
#include "ops.h"

namespace {

// ---- primitives -----------------------------------------------------------------------------------------------------

__device__ __forceinline__ float4 floats_of(uint4 v) {
    return make_float4(__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w));
}

// Two f16 as two bf16 terms each, hi + lo exactly: 11 bits of significand are 8 and 3.
__device__ __forceinline__ void split_f16(uint32_t pair, uint32_t &hi, uint32_t &lo) {
    float2 v = __half22float2(*(const __half2 *)&pair);
    __nv_bfloat162 h = __floats2bfloat162_rn(v.x, v.y);
    float2 rest = __bfloat1622float2(h);
    __nv_bfloat162 l = __floats2bfloat162_rn(v.x - rest.x, v.y - rest.y);
    hi = *(uint32_t *)&h;
    lo = *(uint32_t *)&l;
}

// What a kernel computes in: W the stored weights, TERMS rows for each row of activations, E their type, KV the cache's;
// GROUPS of rows in a tile, and a warp's share of a piece in CHUNKS, products of 64 columns.
template <typename W_, int TERMS_, int GROUPS_> struct Numbers {
    typedef W_ W;
    static constexpr int TERMS = TERMS_, GROUPS = GROUPS_, TILE = GROUPS * GROUP, CHUNKS = MAX_PIECE / GROUPS / CONSUMERS / 64;
    typedef typename std::conditional<TERMS == 1, W, bf16>::type E;
    typedef typename std::conditional<TERMS == 1, W, float>::type KV;
};

// Where element i of a row of activations lies: words 1 and 2 of every four change places.
__device__ __forceinline__ int place_of(int i) { return (i & ~6) | (i & 2) << 1 | (i & 4) >> 1; }

// Writes activations i .. i+3, i % 4 = 0, to their rows of 16-bit terms, `stride` bytes apart.
template <typename N> __device__ __forceinline__ void store_terms(char *row, size_t stride, int i, float4 v) {
    #pragma unroll
    for (int t = 0; t < N::TERMS; t++) {
        union {
            typename N::E each[4];
            uint32_t words[2];
        } packed = {{from_float<typename N::E>(v.x), from_float<typename N::E>(v.y), from_float<typename N::E>(v.z), from_float<typename N::E>(v.w)}};
        *(uint32_t *)(row + t * stride + 2 * place_of(i)) = packed.words[0];
        *(uint32_t *)(row + t * stride + 2 * place_of(i + 2)) = packed.words[1];
        v.x -= to_float(packed.each[0]);
        v.y -= to_float(packed.each[1]);
        v.z -= to_float(packed.each[2]);
        v.w -= to_float(packed.each[3]);
    }
}

// ---- the ring -------------------------------------------------------------------------------------------------------

// A ring of buffers in shared memory, and how far along a warp is: full and empty barriers in turn.
struct Ring {
    uint32_t full, empty;
    int n, slot, parity;
    __device__ __forceinline__ void next() {
        if (++slot == n) slot = 0, parity ^= 1;
    }
    __device__ __forceinline__ void wait_full() const { mbarrier_wait(full + 8 * slot, parity); }
    __device__ __forceinline__ void wait_empty() const { mbarrier_wait(empty + 8 * slot, parity ^ 1); }
};

// What the warps of a block share.
struct Block {
    uint32_t stages, act;   // shared addresses: the ring of weights, the activations
    char *shared;           // the activations again
    float *parts;           // [PARTS][part_floats]: partial sums
    float *sums;            // [4][CONSUMERS]: squares
    int *tile_of, *part_of; // [stage], [PARTS]: which tile it belongs to
    float2 *turns;          // [n_rows][head_dim/2]: cosine and sine
    float4 *residuals;      // [RESIDUALS][n_rows][groups]: what the rows of a tile of PHASE_OUT are added to
    volatile int *begun;    // phases whose input the consumers have
};

__device__ __forceinline__ int first_tile(const Phase &f) {
    int at = (int)blockIdx.x - f.first_block;
    return at < 0 ? at + gridDim.x : at;
}

// Of gate and up a tile has as many rows of the one, then of the other.
template <int TILE> __device__ __forceinline__ const char *weight_row(const Phase &f, int tile, int row) {
    constexpr int HALF = TILE / 2;
    if (f.kind == PHASE_GATE_UP) return (row < HALF ? f.weights : f.up) + (size_t)(tile * HALF + row % HALF) * f.cols * 2;
    return f.weights + ((size_t)(tile * TILE + row) * f.stride + f.column) * 2;
}

constexpr int END_OF_PHASE = -1; // in place of a tile

// What a lane copies of a piece of a tile: rows that lie together in a stage as they do in memory, or one row.
struct Share {
    const char *from;
    int first, bytes; // the first row's number in the tile; 0 bytes: nothing
};
template <int TILE> __device__ __forceinline__ Share share_of(const Phase &f, int tile, int p) {
    int each = f.weight_pitch != f.stride * 2 ? 1 : f.kind == PHASE_GATE_UP ? TILE / 2 : TILE;
    int first = threadIdx.x % 32 * each, n = max(0, min(each, min(TILE, f.rows - tile * TILE) - first));
    return {weight_row<TILE>(f, tile, first) + (size_t)p * f.piece * 2, first, n * 2 * min(f.piece, f.cols - p * f.piece)};
}

// A tile of a phase that no block has yet, for lane 0. The answer is not waited for here: under load it takes as long as a
// tile. (An increment, since ptxas makes an addition one for the whole warp, and waits at once to share out the answer.)
__device__ __forceinline__ int claim_tile(int *claimed) {
    int before = 0;
    if (threadIdx.x % 32 == 0) before = atomic_increment_relaxed(claimed);
    return before + gridDim.x;
}

// The producer warp: every piece of every tile of this block, in order. Its first tile of a phase is given, the others go to
// whoever asks first: the SMs' shares of the memory's speed are not equal. While the consumers still wait for a phase's
// input, fewer copies are in flight: what they wait for has to get past them. All that can be known before the last wait is,
// so that a copy follows at once upon the one that landed.
template <int TILE> __device__ __forceinline__ void produce(const Segment &s, const Block &block, Ring ring) {
    int lane = threadIdx.x % 32, in_flight = 0, n_residuals = 0;
    Ring landed = ring;
    const uint64_t policy = l2_evict_first();
    for (int i = 0; i < s.n_phases; i++) {
        const Phase &f = s.phase[i];
        const int n_tiles = (f.rows + TILE - 1) / TILE;
        const bool fixed = f.carry_in || f.carry_out; // every section's tiles stay with their block: see wait
        for (int tile = first_tile(f), next = 0;; tile = __shfl_sync(~0u, next, 0)) {
            bool end = tile >= n_tiles;
            if (!end) next = fixed ? tile + gridDim.x : claim_tile(s.claimed + i);
            for (int p = 0; p < (end ? 1 : f.n_pieces); p++) {
                Share share = share_of<TILE>(f, tile, p);
                uint32_t to = block.stages + ring.slot * s.stage_bytes + share.first * f.weight_pitch, full = ring.full + 8 * ring.slot;
                int bytes = min(TILE, f.rows - tile * TILE) * 2 * min(f.piece, f.cols - p * f.piece);
                int most = *block.begun > i ? s.window : s.window_ahead;
                // To x of the segment before, which is over: attention lets this one start when it has waited for that.
                bool adds = f.kind == PHASE_OUT && p == 0 && !end;
                ring.wait_empty();
                if (lane == 0) block.tile_of[ring.slot] = end ? END_OF_PHASE : tile;
                for (; in_flight >= most; in_flight--) {
                    landed.wait_full();
                    landed.next();
                }
                in_flight++;
                if (lane == 0 && end) mbarrier_arrive(full);
                if (lane == 0 && !end) mbarrier_arrive_expect_tx(full, bytes + (adds ? s.n_rows * TILE * (int)sizeof(float) : 0));
                __syncwarp();
                if (share.bytes > 0) copy_bulk(to, share.from, share.bytes, full, policy);
                if (adds && lane < s.n_rows)
                    copy_bulk(shared_address(block.residuals + (n_residuals % RESIDUALS * s.n_rows + lane) * (TILE / GROUP)),
                              s.x + (size_t)lane * s.dim + tile * TILE, TILE * sizeof(float), full);
                if (adds) n_residuals++;
                ring.next();
            }
            if (end) break;
        }
    }
}

// ---- activations ----------------------------------------------------------------------------------------------------

__device__ __forceinline__ void consumers_sync() { named_barrier_sync(1, 32 * CONSUMERS); }

__device__ __forceinline__ float squares(float4 v) { return (v.x * v.x + v.y * v.y) + (v.z * v.z + v.w * v.w); }
__device__ __forceinline__ float4 scaled(float4 v, float scale, float4 w) {
    return make_float4(w.x * (v.x * scale), w.y * (v.y * scale), w.z * (v.z * scale), w.w * (v.w * scale));
}

// The norm's weights, which depend on nothing: read before the wait for what is normalised.
template <int EACH> __device__ __forceinline__ void load_norm(const Phase &f, float4 (&w)[EACH]) {
    #pragma unroll
    for (int j = 0; j < EACH; j++) {
        int i = threadIdx.x + j * 256;
        w[j] = i < f.cols / 4 ? __ldg((const float4 *)f.norm + i) : make_float4(0, 0, 0, 0);
    }
}

// x / sqrt(mean(x²) + eps) * weight of every row, as terms in shared memory; ROWS rows at a time, EACH float4s of each a
// thread. A row's sum has one order: thread i of 256 adds elements 4i .. 4i+3 and those 1024 further on, then lanes, then
// warps.
template <typename N, int ROWS, int EACH>
__device__ __forceinline__ void store_normalised(const Segment &s, const Phase &f, const float4 (&w)[EACH], char *to, float *sums) {
    int tid = threadIdx.x, n = f.cols / 4;
    for (int b0 = 0; b0 < s.n_rows; b0 += ROWS) {
        float4 held[ROWS][EACH];
        #pragma unroll
        for (int r = 0; r < ROWS; r++)
            #pragma unroll
            for (int j = 0; j < EACH; j++) {
                bool there = b0 + r < s.n_rows && tid + j * 256 < n;
                held[r][j] = floats_of(load_l2_16(s.x + (size_t)(b0 + r) * f.cols + 4 * (tid + j * 256), there));
            }
        if (b0 > 0) consumers_sync(); // everyone has read the sums of the rows before
        #pragma unroll
        for (int r = 0; r < ROWS; r++) {
            float sum = 0;
            #pragma unroll
            for (int j = 0; j < EACH; j++) sum += squares(held[r][j]);
            sum = warp_sum(sum);
            if (tid % 32 == 0) sums[r * CONSUMERS + tid / 32] = sum;
        }
        consumers_sync();
        #pragma unroll
        for (int r = 0; r < ROWS; r++) {
            if (b0 + r >= s.n_rows) break;
            float sum = 0;
            #pragma unroll
            for (int i = 0; i < CONSUMERS; i++) sum += sums[r * CONSUMERS + i];
            float scale = 1.0f / sqrtf(sum / (float)f.cols + s.eps);
            char *row = to + (size_t)(b0 + r) * N::TERMS * f.pitch;
            #pragma unroll
            for (int j = 0; j < EACH; j++)
                if (tid + j * 256 < n) store_terms<N>(row, f.pitch, 4 * (tid + j * 256), scaled(held[r][j], scale, w[j]));
        }
    }
}

// Loads 16 bytes each of n × rows, rows from_pitch of them apart, and hands them to store(row, column, what was loaded).
// Of a thread's, ROWS × DEPTH are in flight.
template <int ROWS, int DEPTH, class Store> __device__ __forceinline__ void for_rows(const uint4 *from, int from_pitch, int n, int rows, Store store) {
    for (int row = 0; row < rows; row += ROWS)
        for (int first = threadIdx.x; first < n; first += DEPTH * 256) {
            uint4 v[ROWS][DEPTH];
            #pragma unroll
            for (int r = 0; r < ROWS; r++)
                #pragma unroll
                for (int j = 0; j < DEPTH; j++)
                    v[r][j] = load_l2_16(from + (size_t)(row + r) * from_pitch + first + j * 256, row + r < rows && first + j * 256 < n);
            #pragma unroll
            for (int r = 0; r < ROWS; r++)
                #pragma unroll
                for (int j = 0; j < DEPTH; j++)
                    if (row + r < rows && first + j * 256 < n) store(row + r, first + j * 256, v[r][j]);
        }
}

// Attention's output, to the places of activations: as it is, or split.
template <typename N> __device__ __forceinline__ void store_attention(const Segment &s, const Phase &f, char *to) {
    constexpr int EACH = 16 / sizeof(typename N::KV);
    for_rows<N::TERMS == 1 ? 4 : 1, N::TERMS == 1 ? 2 : 4>((const uint4 *)s.att, f.cols / EACH, f.cols / EACH, s.n_rows, [&](int b, int column, uint4 v) {
        char *row = to + b * N::TERMS * f.pitch;
        if constexpr (N::TERMS == 1) *(uint4 *)(row + column * 16) = make_uint4(v.x, v.z, v.y, v.w);
        else store_terms<N>(row, f.pitch, column * EACH, floats_of(v));
    });
}

// What gate and up left, split and in place already; a section of its columns. All of it is in flight at once.
template <typename N> __device__ __forceinline__ void store_hidden(const Segment &s, const Phase &f, char *to) {
    for (int r = 0; r < s.n_rows * N::TERMS; r++)
        for (int i = threadIdx.x; i < f.cols / 8; i += 256)
            copy_async16_from_l2(shared_address(to + (size_t)r * f.pitch + i * 16), (const uint4 *)s.h + ((size_t)r * f.stride + f.column) / 8 + i);
    copy_async_wait_all();
}

// ---- what is done with a product ------------------------------------------------------------------------------------

// The better of two candidates for the most likely token: the larger logit, of equals the lower token; none, -1, if one is.
__device__ __forceinline__ void take_best(float &best, int &row, float other, int other_row) {
    if (other_row < 0) row = -1;
    if (row >= 0 && (other > best || (other == best && other_row < row))) best = other, row = other_row;
}

// The finisher warp adds up the partial sums of every tile, in the order of sections, of terms, the smallest first, and of
// warps, and does what follows. A lane has row b = lane / 4 of the batch, and row lane % 4 of each group of the tile. When a
// phase is done it says so to the other blocks.
template <typename N> __device__ __forceinline__ void finish(const Segment &s, const Block &block, Ring ring) {
    typedef typename N::KV KV;
    constexpr int GROUPS = N::GROUPS, TILE = N::TILE;
    int lane = threadIdx.x % 32, n = lane % GROUP, b = lane / GROUP;
    const int term_rows = s.n_rows * N::TERMS;
    bool in_batch = b < s.n_rows;
    int n_residuals = 0;
    wait_for_previous_kernel();
    for (int i = lane; i < s.n_rows * (s.head_dim / 2); i += 32) block.turns[i] = s.phases[i];
    __syncwarp();
    for (int i = 0; i < s.n_phases; i++) {
        const Phase &f = s.phase[i];
        const PhaseKind kind = f.kind;
        const int rows = f.rows, n_sections = (f.n_pieces + f.section - 1) / f.section;
        float *to = (f.carry_out ? s.carry : s.x) + (size_t)b * s.dim + n; // of residual sums
        float best = -INFINITY;           // PHASE_HEAD: of this lane's logits
        int best_row = rows;
        float held_sum[GROUPS] = {}, held_x[GROUPS] = {}; // the last tile's: what it adds to is on its way while the next is summed
        float *held = NULL;
        for (;;) {
            ring.wait_full();
            int tile = *(volatile const int *)(block.part_of + ring.slot), row = tile * TILE + n;
            if (tile == END_OF_PHASE) break;
            float x[GROUPS] = {}, sum[GROUPS] = {}, all = 0;
            if (kind == PHASE_OUT && in_batch) {
                const float *from = (const float *)(block.residuals + (n_residuals++ % RESIDUALS * s.n_rows + b) * GROUPS) + n;
                #pragma unroll
                for (int g = 0; g < GROUPS; g++) x[g] = from[g * GROUP];
            }
            if (kind == PHASE_DOWN && in_batch) // dim is a multiple of 8: a tile is whole
                #pragma unroll
                for (int g = 0; g < GROUPS; g++) {
                    if (!f.carry_out) x[g] = load_l2(to + tile * TILE + g * GROUP);
                    if (f.carry_in) sum[g] = load_l2(s.carry + (size_t)b * s.dim + row + g * GROUP);
                }
            const float *parts = block.parts + ring.slot * s.part_floats + b * N::TERMS * TILE + n;
            if (in_batch)
                for (int c = 0; c < n_sections; c++) {
                    #pragma unroll
                    for (int g = 0; g < GROUPS; g++) {
                        float section = 0;
                        #pragma unroll
                        for (int t = N::TERMS - 1; t >= 0; t--) {
                            float term = 0;
                            #pragma unroll
                            for (int w = 0; w < CONSUMERS; w++) term += parts[((c * CONSUMERS + w) * term_rows + t) * TILE + g * GROUP];
                            section += term;
                        }
                        sum[g] += section;
                    }
                }
            #pragma unroll
            for (int g = 0; g < GROUPS; g++) all += sum[g];
            __syncwarp();
            if (lane == 0) mbarrier_arrive_after(ring.empty + 8 * ring.slot, all);
            ring.next();
            if (kind == PHASE_OUT) {
                #pragma unroll
                for (int g = 0; g < GROUPS; g++)
                    if (in_batch) to[tile * TILE + g * GROUP] = x[g] + sum[g];
            } else if (kind == PHASE_DOWN) {
                #pragma unroll
                for (int g = 0; g < GROUPS; g++) {
                    if (held) held[g * GROUP] = held_x[g] + held_sum[g];
                    held_x[g] = x[g];
                    held_sum[g] = sum[g];
                }
                held = in_batch ? to + tile * TILE : NULL;
            } else if (kind == PHASE_GATE_UP) { // the first half of the tile's rows are gates, the second the same rows of up
                float up = GROUPS > 1 ? sum[GROUPS - 1] : __shfl_down_sync(~0u, sum[0], 2), v = sum[0] / (1.0f + expf(-sum[0])) * up;
                typename N::E *h = (typename N::E *)s.h + (size_t)b * N::TERMS * s.hidden_dim + place_of(tile * (TILE / 2) + n);
                if (in_batch && n < TILE / 2)
                    #pragma unroll
                    for (int t = 0; t < N::TERMS; t++) {
                        h[(size_t)t * s.hidden_dim] = from_float<typename N::E>(v);
                        v -= to_float(from_float<typename N::E>(v));
                    }
            } else if (kind == PHASE_QKV) {
                #pragma unroll
                for (int g = 0; g < GROUPS; g++, row += GROUP) {
                    int head = __umulhi((unsigned)row, s.head_dim_inverse), d = row - head * s.head_dim;
                    float other = __shfl_xor_sync(~0u, sum[g], 1);
                    if (!in_batch) continue;
                    if (head < s.n_heads + s.n_kv_heads) { // (even + i odd) times the phase
                        float2 phase = block.turns[b * (s.head_dim / 2) + d / 2];
                        sum[g] = d % 2 ? __fmaf_rn(other, phase.y, __fmul_rn(sum[g], phase.x)) : __fmaf_rn(-other, phase.y, __fmul_rn(sum[g], phase.x));
                    }
                    ((KV *)s.qkv)[((size_t)head * s.n_rows + b) * s.head_dim + d] = from_float<KV>(sum[g]);
                }
            } else {
                #pragma unroll
                for (int g = 0; g < GROUPS; g++, row += GROUP) {
                    if (!in_batch || row >= rows) continue;
                    s.logits[(size_t)b * s.vocab_size + row] = sum[g];
                    if (!isfinite(sum[g])) best_row = -1;
                    if (best_row >= 0 && (sum[g] > best || (sum[g] == best && row < best_row))) best = sum[g], best_row = row;
                }
            }
        }
        #pragma unroll
        for (int g = 0; g < GROUPS; g++)
            if (held) held[g * GROUP] = held_x[g] + held_sum[g];
        __syncwarp();
        if (kind == PHASE_HEAD) {
            for (int step = 1; step < GROUP; step *= 2) take_best(best, best_row, __shfl_xor_sync(~0u, best, step), __shfl_xor_sync(~0u, best_row, step));
            if (in_batch && n == 0) s.best[b * gridDim.x + blockIdx.x] = make_int2(__float_as_int(best), best_row);
        }
        if (lane == 0) mbarrier_arrive(ring.empty + 8 * ring.slot);
        ring.next();
        if (lane == 0 && i + 1 < s.n_phases && !f.carry_out) reduce_add_release(s.done + i, 1);
    }
}

// ---- the consumers --------------------------------------------------------------------------------------------------

// acc += a stage's weights, rows `pitch` bytes apart, times activations: all of a warp's columns, or n products' worth.
template <typename N, int PAIRS, bool ALL>
__device__ __forceinline__ void multiply(float (&acc)[N::GROUPS][PAIRS][2][4], uint32_t weights, int pitch, const uint2 (&a)[PAIRS][N::CHUNKS], int n) {
    uint4 w[N::GROUPS][N::CHUNKS];
    #pragma unroll
    for (int g = 0; g < N::GROUPS; g++)
        #pragma unroll
        for (int c = 0; c < N::CHUNKS; c++) {
            uint32_t from = weights + g * GROUP * pitch + c * 128;
            w[g][c] = ALL ? load_shared16(from) : load_shared16(from, c < n);
        }
    #pragma unroll
    for (int c = 0; c < N::CHUNKS; c++)
        #pragma unroll
        for (int g = 0; g < N::GROUPS; g++) {
            uint4 v = w[g][c];
            if constexpr (std::is_same<typename N::E, typename N::W>::value) {
                #pragma unroll
                for (int r = 0; r < PAIRS; r++) mma_16x8x16<typename N::E>(acc[g][r][c % 2], v.x, v.y, v.z, v.w, a[r][c].x, a[r][c].y);
            } else {
                uint4 hi, lo;
                split_f16(v.x, hi.x, lo.x), split_f16(v.y, hi.y, lo.y), split_f16(v.z, hi.z, lo.z), split_f16(v.w, hi.w, lo.w);
                #pragma unroll
                for (int r = 0; r < PAIRS; r++) {
                    mma_16x8x16<typename N::E>(acc[g][r][c % 2], lo.x, lo.y, lo.z, lo.w, a[r][c].x, a[r][c].y);
                    mma_16x8x16<typename N::E>(acc[g][r][c % 2], hi.x, hi.y, hi.z, hi.w, a[r][c].x, a[r][c].y);
                }
            }
        }
}

// A phase's tiles. Every warp has its columns of every piece. PAIRS of rows of terms; rows that are not there are row 0
// again: a column of a product that no one reads.
template <typename N, int PAIRS>
__device__ __forceinline__ void consume_tiles(const Segment &s, const Phase &f, const Block &block, Ring &ring, Ring &parts_ring) {
    constexpr int GROUPS = N::GROUPS, CHUNKS = N::CHUNKS, TILE = N::TILE;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int term_rows = s.n_rows * N::TERMS, n_pieces = f.n_pieces, piece = f.piece, cols = f.cols, section = f.section, pitch = f.weight_pitch;
    const int span = piece / CONSUMERS; // columns of a piece that are this warp's
    const int weight_column = warp * span + g % 2 * 32 + t * 8, act_column = warp * span + g / 2 % 2 * 32 + t * 8;
    const int section_floats = CONSUMERS * term_rows * TILE, part_floats = s.part_floats, stage_bytes = s.stage_bytes;
    const uint32_t weights = block.stages + g / 2 * pitch + weight_column * 2;
    float *parts = block.parts + (warp * term_rows + t / 2) * TILE + g / 2;
    uint32_t act[PAIRS];
    #pragma unroll
    for (int r = 0; r < PAIRS; r++) {
        int row = r * 2 + g / 4 < term_rows ? r * 2 + g / 4 : 0;
        act[r] = block.act + row * f.pitch + act_column * 2 + g % 2 * 8;
    }
    for (;;) {
        int tile = 0, in_section = 0, part = 0;
        float sum[GROUPS][PAIRS] = {};
        for (int p = 0; p < n_pieces; p++) {
            int left = cols - p * piece;
            bool whole = span == CHUNKS * 64 && left >= piece;
            int n_act = whole ? CHUNKS : min(span, left - act_column + 63) >> 6;
            uint2 a[PAIRS][CHUNKS];
            #pragma unroll
            for (int r = 0; r < PAIRS; r++)
                #pragma unroll
                for (int c = 0; c < CHUNKS; c++) a[r][c] = load_shared8(act[r] + p * piece * 2 + c * 128, c < n_act);
            ring.wait_full();
            if (p == 0) tile = *(volatile const int *)(block.tile_of + ring.slot);
            float acc[GROUPS][PAIRS][2][4] = {};
            uint32_t stage = weights + ring.slot * stage_bytes;
            if (whole) multiply<N, PAIRS, true>(acc, stage, pitch, a, 0);
            else multiply<N, PAIRS, false>(acc, stage, pitch, a, min(span, left - weight_column + 63) >> 6);
            // Added here, rounded to nearest: tensor cores truncate, and a long chain of that would be a bias.
            float all = 0;
            #pragma unroll
            for (int i = 0; i < GROUPS; i++)
                #pragma unroll
                for (int r = 0; r < PAIRS; r++) {
                    sum[i][r] += (acc[i][r][0][0] + acc[i][r][0][3]) + (acc[i][r][1][0] + acc[i][r][1][3]);
                    all += sum[i][r];
                }
            if (lane == 0) mbarrier_arrive_after(ring.empty + 8 * ring.slot, all);
            ring.next();
            if (p == 0) {
                parts_ring.wait_empty();
                if (threadIdx.x == 0) *(volatile int *)(block.part_of + parts_ring.slot) = tile;
                if (tile == END_OF_PHASE) break; // what was computed is of no tile
            }
            if (++in_section < section && p + 1 < n_pieces) continue;
            float *to = parts + parts_ring.slot * part_floats + part++ * section_floats;
            in_section = 0;
            #pragma unroll
            for (int i = 0; i < GROUPS; i++)
                #pragma unroll
                for (int r = 0; r < PAIRS; r++) {
                    sum[i][r] += __shfl_xor_sync(~0u, sum[i][r], 5); // both halves of 64 columns
                    if (g % 2 == 0 && t % 2 == 0 && r * 2 + t / 2 < term_rows) to[r * 2 * TILE + i * GROUP] = sum[i][r];
                    sum[i][r] = 0;
                }
        }
        __syncwarp();
        if (lane == 0) mbarrier_arrive(parts_ring.full + 8 * parts_ring.slot);
        parts_ring.next();
        if (tile == END_OF_PHASE) return;
    }
}

// Waits until a phase of all blocks is through.
__device__ __forceinline__ void wait_for_phase(const unsigned *done) {
    if (threadIdx.x == 0) {
        unsigned n;
        do n = load_acquire(done);
        while (n < gridDim.x);
    }
    consumers_sync();
}

template <typename N> __device__ __forceinline__ void consume(const Segment &s, const Block &block, Ring ring, Ring parts_ring) {
    for (int i = 0; i < s.n_phases; i++) {
        const Phase &f = s.phase[i];
        auto wait = [&] {
            if (i == 0) {
                wait_for_previous_kernel();
                let_next_kernel_start(); // not before: attention relies on it (AttentionArgs.settled)
            } else if (f.carry_in) consumers_sync(); // the section before was this block's own
            else wait_for_phase(s.done + i - 1);
        };
        auto normalised = [&](auto rows, auto each) {
            float4 w[each.value];
            load_norm(f, w);
            wait();
            store_normalised<N, rows.value, each.value>(s, f, w, block.shared, block.sums);
        };
        if (f.norm) { // 16 float4s a thread at most
            if (s.n_rows == 1 && f.cols <= 4096) normalised(std::integral_constant<int, 1>(), std::integral_constant<int, 4>());
            else if (f.cols <= 4096) normalised(std::integral_constant<int, 4>(), std::integral_constant<int, 4>());
            else normalised(std::integral_constant<int, 2>(), std::integral_constant<int, MAX_DIM / 1024>());
        } else {
            wait();
            if (f.kind == PHASE_OUT) store_attention<N>(s, f, block.shared);
            else store_hidden<N>(s, f, block.shared);
        }
        consumers_sync();
        if (threadIdx.x == 0) *block.begun = i + 1;
        const int pairs = (s.n_rows * N::TERMS + 1) / 2;
        if (pairs == 1) consume_tiles<N, 1>(s, f, block, ring, parts_ring);
        else if (pairs == 2) consume_tiles<N, 2>(s, f, block, ring, parts_ring);
        else consume_tiles<N, 4>(s, f, block, ring, parts_ring);
    }
}

// Computes: the matrix products of a segment, one after another, with what is around them: RMSNorm, the residual sums,
// SwiGLU, RoPE, each block's best logit. Reads: weights 16-bit, x, att, phases. Writes: x, h, qkv, logits, best (see Segment),
// done, claimed.
// Grid × block: one block of ten warps per SM, all resident at once, since they wait for each other; a tile of rows of
// weights is one block's. Preconditions: done = claimed = 0; cols % 8 = 0; rows × terms <= 8.
template <typename N> __global__ void __launch_bounds__(THREADS, 1) decode_segment_kernel(const __grid_constant__ Segment s) {
    extern __shared__ __align__(128) char shared[];
    __shared__ uint64_t barriers[2 * MAX_STAGES + 2 * PARTS];
    __shared__ float sums[4 * CONSUMERS];
    __shared__ int tile_of[MAX_STAGES], part_of[PARTS], begun;
    uint32_t first = shared_address(barriers);
    Block block = {shared_address(shared) + s.ring_offset, shared_address(shared), shared, (float *)(shared + s.parts_offset), sums,
                   tile_of, part_of, (float2 *)(shared + s.turns_offset), (float4 *)(shared + s.residuals_offset), &begun};
    Ring ring = {first, first + 8 * MAX_STAGES, s.n_stages, 0, 0};
    Ring parts_ring = {first + 16 * MAX_STAGES, first + 16 * MAX_STAGES + 8 * PARTS, PARTS, 0, 0};
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    // Parameters are constants that every launch fetches anew: all lines of them at once, a few a warp.
    for (int i = warp * 64; i < (int)sizeof s; i += 64 * THREADS / 32) asm volatile("" ::"r"(*(const int *)((const char *)&s + i)));
    if (warp == PRODUCER) { // does not wait for the others: memory has nothing to do before its first copy
        if (lane == 0) begun = 0;
        if (lane < s.n_stages) {
            mbarrier_init(ring.full + 8 * lane, 1);
            mbarrier_init(ring.empty + 8 * lane, CONSUMERS);
        }
        if (lane < PARTS) {
            mbarrier_init(parts_ring.full + 8 * lane, CONSUMERS);
            mbarrier_init(parts_ring.empty + 8 * lane, 1);
        }
        fence_mbarrier_init();
        __syncwarp();
        named_barrier_arrive(2, THREADS);
        produce<N::TILE>(s, block, ring);
        return;
    }
    named_barrier_sync(2, THREADS);
    if (warp == FINISHER) finish<N>(s, block, parts_ring);
    else consume<N>(s, block, ring, parts_ring);
}

// Computes: what a step begins with: the embedding of each row's token; cosine and sine of its position's angles.
// Reads: table [vocab][dim] W, tokens [rows], pos [rows], freq [half]. Writes: x [rows][dim], phases [rows][half].
// Grid × block: rows × 256; a block owns a row. Preconditions: the kernels before are over.
template <typename W>
__global__ void decode_begin_kernel(float *x, const W *table, const int *tokens, int dim, float2 *phases, const int *pos, const float *freq, int half) {
    let_next_kernel_start();
    const W *from = table + (size_t)tokens[blockIdx.x] * dim;
    for (int i = threadIdx.x; i < dim; i += blockDim.x) x[(size_t)blockIdx.x * dim + i] = to_float(from[i]);
    for (int i = threadIdx.x; i < half; i += blockDim.x) phases[(size_t)blockIdx.x * half + i] = rope_angle(pos[blockIdx.x], freq[i]);
}

// Computes: what a step ends with: each row's most likely token, -1 if a logit is not finite, to the host and as the next
// step's; the segments' counters at zero for that one.
// Reads: best [rows][n_best]. Writes: choice and choice_host [rows]; of step, from row `first` on, tokens and lens; done
// [n_done]. Grid × block: 1 × 32 rows at least; a warp owns a row. Preconditions: none.
__global__ void decode_end_kernel(const int2 *best, int n_best, int vocab, int *choice, int *choice_host, StepInput *step, int first, int rows,
                                  unsigned *done, int n_done) {
    wait_for_previous_kernel();
    int lane = threadIdx.x % 32, b = threadIdx.x / 32;
    for (int i = threadIdx.x; i < n_done; i += blockDim.x) done[i] = 0;
    if (b >= rows) return;
    float logit = -INFINITY;
    int token = vocab;
    for (int i = lane; i < n_best; i += 32) {
        int2 x = best[b * n_best + i];
        take_best(logit, token, __int_as_float(x.x), x.y);
    }
    #pragma unroll
    for (int i = 1; i < 32; i *= 2) take_best(logit, token, __shfl_xor_sync(~0u, logit, i), __shfl_xor_sync(~0u, token, i));
    if (lane > 0) return;
    choice[b] = choice_host[b] = token;
    step->tokens[first + b] = max(token, 0); // -1: the caller stops here
    step->lens[first + b]++;
}

} // namespace
