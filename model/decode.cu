// Engine fused: decode at the memory limit, for one to a few rows. One token has to read every weight once; everything
// here serves to keep that stream from ever stopping.
//
// A step is a chain of kernels: begin, then for each layer attention (attention.cu) and one resident kernel, the segment,
// that computes all matrix products between two attentions: output projection, gate and up, down, and the next layer's
// queries, keys and values; the last one ends with the logits. In a segment every SM holds one block. One warp of it, the
// producer, streams the block's share of the weights through a ring in shared memory. Weights do not depend on what is
// computed, so it runs ahead across phases, and even starts before the attention in front of the segment is done. Eight
// warps, the consumers, follow on tensor cores: 8 rows of weights are the columns of an m16n8k16 product, the rows of
// activations its first 8 rows, so that up to 8 rows cost what one costs. Between two phases the blocks wait for each
// other at a counter; the ring fills meanwhile.
//
// The queue of copies is kept short (WINDOW) although the ring is deep: with more in flight every other access, counters
// and activations among them, waits behind them (measured, README of the benchmark).
//
// Numerics: inputs of products are rounded to 16 bits as in the cublas engine. In --precision f32 they are split into
// three bf16 terms, x = x1 + x2 + x3 to 24 bits, that take a row each; products of 16-bit numbers are exact in float32. A
// row's sums have one order, whatever else is in the batch.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <type_traits>

#include "forward_cuda.h"

namespace {

typedef __nv_bfloat16 bf16;
typedef __half f16;

constexpr int CONSUMERS = 8, THREADS = 32 * (CONSUMERS + 1); // warps that compute; and one that copies
constexpr int TILE = 8;                                      // rows of weights that are computed together
constexpr int PIECE = 2048;                                  // of their columns in one stage of the ring, at most
constexpr int STAGE_BYTES = TILE * (PIECE * 2 + 64);         // rows 64 bytes apart from a multiple of 128: no bank conflicts
#ifndef FUSED_WINDOW
#define FUSED_WINDOW 2
#define FUSED_STAGES 6
#define FUSED_PREFETCH 65536
#endif
constexpr int WINDOW = FUSED_WINDOW;                                    // stages in flight
constexpr int PARTS = 8;                                     // buffers of partial sums; more than there are stages
constexpr int MAX_STAGES = FUSED_STAGES;
constexpr int MAX_TERM_ROWS = 8;                             // rows of an m16n8k16 product that are used
constexpr int MAX_PHASES = 4;
constexpr int HELD = 8;                                      // float4s of a normalised row that a thread keeps

enum PhaseKind { PHASE_QKV, PHASE_OUT, PHASE_GATE_UP, PHASE_DOWN, PHASE_HEAD };

// One matrix product of a segment.
struct Phase {
    PhaseKind kind;
    int rows, cols;            // of the weights; gate and up together
    const char *weights;       // 16-bit [rows][cols]; PHASE_GATE_UP: gate
    const char *up;            // PHASE_GATE_UP
    const float *norm;         // [cols], or NULL: the input is not normalised
    int n_pieces, piece;       // columns are taken in pieces of so many, a multiple of 256
    int pitch;                 // bytes between rows of the activations in shared memory
    bool direct;               // activations do not fit there: read from where they are
};

struct Segment {
    Phase phase[MAX_PHASES];
    int n_phases, n_rows, n_stages, ring_offset, parts_offset; // n_rows: sequences; offsets in shared memory
    int n_heads, n_kv_heads, head_dim, dim, hidden_dim, q_dim, vocab_size;
    float eps;
    float *x;                  // [n_rows][dim]: the residual stream
    void *qkv;                 // KV type [n_heads + 2 n_kv_heads][n_rows][head_dim]
    const void *att;           // KV type [n_rows][q_dim]
    void *h;                   // 16-bit [n_rows × terms][hidden_dim]
    const float2 *phases;      // [n_rows][head_dim/2]: cosine and sine
    float *logits;             // [n_rows][vocab_size]
    unsigned *done;            // [n_phases]: blocks that are through with a phase
    const char *next;          // what the next segment reads first, and how much of it each block may fetch into L2
    size_t next_bytes;
    int next_share;
};

// ---- primitives -----------------------------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t shared_address(const void *p) { return (uint32_t)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void wait_for_previous_kernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void let_next_kernel_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

__device__ __forceinline__ void barrier_init(uint32_t barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void barrier_expect(uint32_t barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_wait(uint32_t barrier, int parity) {
    asm volatile("{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}"
                 ::"r"(barrier), "r"(parity) : "memory");
}
__device__ __forceinline__ void copy_bulk(uint32_t to, const void *from, int bytes, uint32_t barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 ::"r"(to), "l"(from), "r"(bytes), "r"(barrier) : "memory");
}
__device__ __forceinline__ void prefetch_bulk(const void *from, int bytes) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}

__device__ __forceinline__ uint4 load_shared16(uint32_t address) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address) : "memory");
    return v;
}

// c[16×8] += a[16×16] b[16×8], rows 8 to 15 of a being zero.
template <typename E> __device__ __forceinline__ void mma(float c[4], uint32_t a0, uint32_t a2, uint32_t b0, uint32_t b1) {
    if constexpr (std::is_same<E, bf16>::value)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%5}, {%7,%8}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(0), "r"(a2), "r"(b0), "r"(b1));
    else
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%5}, {%7,%8}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(0), "r"(a2), "r"(b0), "r"(b1));
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

// What a kernel computes in: W the stored weights, TERMS rows for each row of activations, E their type, KV the cache's.
template <typename W_, int TERMS_> struct Numbers {
    typedef W_ W;
    static constexpr int TERMS = TERMS_;
    typedef typename std::conditional<TERMS == 1, W, bf16>::type E;
    typedef typename std::conditional<TERMS == 1, W, float>::type KV;
};

// Writes four neighbouring activations to their rows of 16-bit terms, `stride` bytes apart.
template <typename N> __device__ __forceinline__ void store_terms(char *row, size_t stride, int i, float4 v) {
    #pragma unroll
    for (int t = 0; t < N::TERMS; t++) {
        union {
            typename N::E each[4];
            uint2 all;
        } packed = {{from_float<typename N::E>(v.x), from_float<typename N::E>(v.y), from_float<typename N::E>(v.z), from_float<typename N::E>(v.w)}};
        *(uint2 *)(row + t * stride + 2 * i) = packed.all;
        v.x -= to_float(packed.each[0]);
        v.y -= to_float(packed.each[1]);
        v.z -= to_float(packed.each[2]);
        v.w -= to_float(packed.each[3]);
    }
}

// ---- the ring -------------------------------------------------------------------------------------------------------

// Where the barriers are, and how far along a warp is. Producer and consumers count stages alike.
struct Ring {
    uint32_t full, empty, data;
    int slot, parity, n_stages;
    __device__ __forceinline__ void next() {
        if (++slot == n_stages) slot = 0, parity ^= 1;
    }
};

// Tiles are dealt in turn, on from phase to phase, so that shares even out.
__device__ __forceinline__ int first_tile(int dealt) {
    int at = (int)blockIdx.x - dealt % (int)gridDim.x;
    return at < 0 ? at + gridDim.x : at;
}

__device__ __forceinline__ const char *weight_row(const Phase &f, int tile, int row) {
    if (f.kind == PHASE_GATE_UP) return (row < 4 ? f.weights : f.up) + (size_t)(tile * 4 + row % 4) * f.cols * 2;
    return f.weights + (size_t)(tile * TILE + row) * f.cols * 2;
}


// The producer warp: every piece of every tile of this block, in order. A lane copies a row.
__device__ __forceinline__ void produce(const Segment &s, Ring ring) {
    int lane = threadIdx.x % 32, dealt = 0, issued = 0, landed_slot = 0, landed_parity = 0;
    for (int i = 0; i < s.n_phases; i++) {
        const Phase &f = s.phase[i];
        int n_tiles = (f.rows + TILE - 1) / TILE;
        for (int tile = first_tile(dealt); tile < n_tiles; tile += gridDim.x) {
            int rows = min(TILE, f.rows - tile * TILE);
            const char *row = weight_row(f, tile, lane % TILE);
            for (int p = 0; p < f.n_pieces; p++) {
                int bytes = 2 * min(f.piece, f.cols - p * f.piece);
                barrier_wait(ring.empty + 8 * ring.slot, ring.parity ^ 1);
                if (issued >= WINDOW) {
                    barrier_wait(ring.full + 8 * landed_slot, landed_parity);
                    if (++landed_slot == ring.n_stages) landed_slot = 0, landed_parity ^= 1;
                }
                issued++;
                if (lane == 0) barrier_expect(ring.full + 8 * ring.slot, rows * bytes);
                __syncwarp();
                if (lane < rows)
                    copy_bulk(ring.data + ring.slot * STAGE_BYTES + lane * (f.piece * 2 + 64), row + (size_t)p * f.piece * 2, bytes,
                              ring.full + 8 * ring.slot);
                ring.next();
            }
        }
        dealt += n_tiles;
    }
    // The next segment's first tiles, into L2: its ring is not there yet.
    if (lane == 0)
        for (int at = 0; at < s.next_share; at += 8192) {
            size_t from = ((size_t)(at / 8192) * gridDim.x + blockIdx.x) * 8192;
            if (from < s.next_bytes) prefetch_bulk(s.next + from, (int)min((size_t)8192, s.next_bytes - from));
        }
}

// ---- activations ----------------------------------------------------------------------------------------------------

__device__ __forceinline__ void consumers_sync() { asm volatile("bar.sync 1, %0;" ::"n"(32 * CONSUMERS) : "memory"); }

__device__ __forceinline__ float squares(float4 v) { return (v.x * v.x + v.y * v.y) + (v.z * v.z + v.w * v.w); }
__device__ __forceinline__ float warp_sum(float x) {
    #pragma unroll
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
    return x;
}
__device__ __forceinline__ float4 scaled(float4 v, float scale, float4 w) {
    return make_float4(w.x * (v.x * scale), w.y * (v.y * scale), w.z * (v.z * scale), w.w * (v.w * scale));
}

// x / sqrt(mean(x²) + eps) * weight of every row, as terms in shared memory. The sum's order is the same for one row as
// for several: thread i of 256 adds elements 4i .. 4i+3, and those 1024 further on; then lanes, then warps.
template <typename N> __device__ __forceinline__ void load_normalised(const Segment &s, const Phase &f, char *to, float *sums) {
    int tid = threadIdx.x, n = f.cols / 4;
    for (int b = 0; b < s.n_rows; b++) {
        const float4 *x = (const float4 *)(s.x + (size_t)b * f.cols);
        float4 held[HELD];
        float sum = 0;
        #pragma unroll
        for (int j = 0; j < HELD; j++) held[j] = tid + j * 256 < n ? __ldcg(x + tid + j * 256) : make_float4(0, 0, 0, 0);
        #pragma unroll
        for (int j = 0; j < HELD; j++) sum += squares(held[j]);
        for (int i = tid + HELD * 256; i < n; i += 256) sum += squares(__ldcg(x + i));
        sum = warp_sum(sum);
        float *parts = sums + (b & 1) * CONSUMERS;
        if (tid % 32 == 0) parts[tid / 32] = sum;
        consumers_sync();
        sum = 0;
        #pragma unroll
        for (int w = 0; w < CONSUMERS; w++) sum += parts[w];
        float scale = 1.0f / sqrtf(sum / (float)f.cols + s.eps);
        char *row = to + (size_t)b * N::TERMS * f.pitch;
        #pragma unroll
        for (int j = 0; j < HELD; j++)
            if (tid + j * 256 < n) store_terms<N>(row, f.pitch, 4 * (tid + j * 256), scaled(held[j], scale, __ldg((const float4 *)f.norm + tid + j * 256)));
        for (int i = tid + HELD * 256; i < n; i += 256)
            store_terms<N>(row, f.pitch, 4 * i, scaled(__ldcg(x + i), scale, __ldg((const float4 *)f.norm + i)));
    }
}

// Attention's output, or a row of terms that is ready: as they are, or split.
template <typename N> __device__ __forceinline__ void load_attention(const Segment &s, const Phase &f, char *to) {
    for (int b = 0; b < s.n_rows; b++)
        if constexpr (N::TERMS == 1)
            for (int i = threadIdx.x; i < f.cols / 8; i += 32 * CONSUMERS)
                *(uint4 *)(to + (size_t)b * f.pitch + 16 * i) = __ldcg((const uint4 *)s.att + (size_t)b * (f.cols / 8) + i);
        else
            for (int i = threadIdx.x; i < f.cols / 4; i += 32 * CONSUMERS)
                store_terms<N>(to + (size_t)b * N::TERMS * f.pitch, f.pitch, 4 * i, __ldcg((const float4 *)s.att + (size_t)b * (f.cols / 4) + i));
}
template <typename N> __device__ __forceinline__ void load_hidden(const Segment &s, const Phase &f, char *to) {
    for (int r = 0; r < s.n_rows * N::TERMS; r++)
        #pragma unroll 8
        for (int i = threadIdx.x; i < f.cols / 8; i += 32 * CONSUMERS)
            *(uint4 *)(to + (size_t)r * f.pitch + 16 * i) = __ldcg((const uint4 *)s.h + (size_t)r * (f.cols / 8) + i);
}

// ---- what is done with a product ------------------------------------------------------------------------------------

// One warp adds up the partial sums of a tile, in the order of warps and then of terms, and finishes it. A lane has rows
// b = lane / 8 and b + 4 of the batch, and row lane % 8 of the tile.
template <typename N> __device__ __forceinline__ void finish_tile(const Segment &s, const Phase &f, int tile, const float *parts) {
    typedef typename N::KV KV;
    int lane = threadIdx.x % 32, n = lane % TILE;
    #pragma unroll
    for (int half = 0; half < 2; half++) {
        if (half == 1 && s.n_rows <= 4) break;
        int b = lane / 8 + 4 * half, row = tile * TILE + n;
        bool there = b < s.n_rows;
        float old = 0;
        if ((f.kind == PHASE_OUT || f.kind == PHASE_DOWN) && there && row < f.rows) old = __ldcg(s.x + (size_t)b * s.dim + row);
        float sum = 0;
        if (there)
            #pragma unroll
            for (int t = 0; t < N::TERMS; t++) { // the smallest terms first
                float term = 0;
                #pragma unroll
                for (int w = 0; w < CONSUMERS; w++) term += parts[(w * s.n_rows * N::TERMS + b * N::TERMS + N::TERMS - 1 - t) * TILE + n];
                sum += term;
            }
        if (f.kind == PHASE_OUT || f.kind == PHASE_DOWN) {
            if (there && row < f.rows) s.x[(size_t)b * s.dim + row] = old + sum;
        } else if (f.kind == PHASE_GATE_UP) { // rows 0 to 3 are gates, 4 to 7 the same rows of up
            float up = __shfl_down_sync(~0u, sum, 4), v = sum / (1.0f + expf(-sum)) * up;
            typename N::E *to = (typename N::E *)s.h + (size_t)b * N::TERMS * s.hidden_dim + tile * 4 + n;
            if (there && n < 4)
                #pragma unroll
                for (int t = 0; t < N::TERMS; t++) {
                    to[(size_t)t * s.hidden_dim] = from_float<typename N::E>(v);
                    v -= to_float(from_float<typename N::E>(v));
                }
        } else if (f.kind == PHASE_QKV) {
            int head = row / s.head_dim, d = row % s.head_dim;
            float other = __shfl_xor_sync(~0u, sum, 1);
            if (there) {
                if (head < s.n_heads + s.n_kv_heads) { // (even + i odd) times the phase
                    float2 phase = s.phases[(size_t)b * (s.head_dim / 2) + d / 2];
                    sum = d % 2 ? __fmaf_rn(other, phase.y, __fmul_rn(sum, phase.x)) : __fmaf_rn(-other, phase.y, __fmul_rn(sum, phase.x));
                }
                ((KV *)s.qkv)[((size_t)head * s.n_rows + b) * s.head_dim + d] = from_float<KV>(sum);
            }
        } else if (there && row < f.rows) s.logits[(size_t)b * s.vocab_size + row] = sum;
    }
}

// ---- the consumers --------------------------------------------------------------------------------------------------

template <typename N> __device__ __forceinline__ void consume(const Segment &s, Ring ring, char *shared, uint32_t parts_full, float *sums) {
    typedef typename N::E E;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    int term_rows = s.n_rows * N::TERMS, dealt = 0, part = 0, part_parity = 0;
    uint32_t act = shared_address(shared);
    float *parts = (float *)(shared + s.parts_offset);
    for (int i = 0; i < s.n_phases; i++) {
        const Phase &f = s.phase[i];
        if (i == 0) wait_for_previous_kernel();
        else {
            if (threadIdx.x == 0) {
                unsigned done;
                do asm volatile("ld.acquire.gpu.u32 %0, [%1];" : "=r"(done) : "l"(s.done + i - 1) : "memory");
                while (done < gridDim.x);
            }
            consumers_sync();
        }
        if (f.norm) load_normalised<N>(s, f, shared, sums);
        else if (f.kind == PHASE_OUT) load_attention<N>(s, f, shared);
        else if (!f.direct) load_hidden<N>(s, f, shared);
        consumers_sync();

        int n_tiles = (f.rows + TILE - 1) / TILE, span = f.piece / CONSUMERS; // columns of a piece that are this warp's
        uint32_t act_lane = act + g * f.pitch + (warp * span + t * 8) * 2;
        const char *direct_lane = (const char *)s.h + ((size_t)g * f.cols + warp * span + t * 8) * 2;
        uint32_t ring_lane = g * (f.piece * 2 + 64) + (warp * span + t * 8) * 2;
        for (int tile = first_tile(dealt); tile < n_tiles; tile += gridDim.x) {
            float sum0 = 0, sum1 = 0;
            for (int p = 0; p < f.n_pieces; p++) {
                int column = p * f.piece + warp * span + t * 8; // this lane's first
                uint4 a[PIECE / CONSUMERS / 32];
                if (f.direct)
                    #pragma unroll
                    for (int c = 0; c < PIECE / CONSUMERS / 32; c++)
                        a[c] = c * 32 < span && column + c * 32 < f.cols && g < term_rows ? __ldcg((const uint4 *)(direct_lane + (size_t)(p * f.piece + c * 32) * 2))
                                                                                           : make_uint4(0, 0, 0, 0);
                barrier_wait(ring.full + 8 * ring.slot, ring.parity);
                uint32_t tile_lane = ring.data + ring.slot * STAGE_BYTES + ring_lane;
                float acc[4][4] = {};
                #pragma unroll
                for (int c = 0; c < PIECE / CONSUMERS / 32; c++) {
                    if (c * 32 >= span) break;
                    bool inside = column + c * 32 < f.cols;
                    uint4 w = inside ? load_shared16(tile_lane + c * 64) : make_uint4(0, 0, 0, 0);
                    if (!f.direct) a[c] = inside && g < term_rows ? load_shared16(act_lane + (p * f.piece + c * 32) * 2) : make_uint4(0, 0, 0, 0);
                    if constexpr (std::is_same<E, typename N::W>::value) {
                        mma<E>(acc[c % 2 * 2], a[c].x, a[c].y, w.x, w.y);
                        mma<E>(acc[c % 2 * 2 + 1], a[c].z, a[c].w, w.z, w.w);
                    } else {
                        uint4 hi, lo;
                        split_f16(w.x, hi.x, lo.x), split_f16(w.y, hi.y, lo.y), split_f16(w.z, hi.z, lo.z), split_f16(w.w, hi.w, lo.w);
                        mma<E>(acc[c % 2 * 2], a[c].x, a[c].y, lo.x, lo.y);
                        mma<E>(acc[c % 2 * 2 + 1], a[c].z, a[c].w, lo.z, lo.w);
                        mma<E>(acc[c % 2 * 2], a[c].x, a[c].y, hi.x, hi.y);
                        mma<E>(acc[c % 2 * 2 + 1], a[c].z, a[c].w, hi.z, hi.w);
                    }
                }
                __syncwarp();
                if (lane == 0) barrier_arrive(ring.empty + 8 * ring.slot);
                ring.next();
                // Added here, rounded to nearest: tensor cores truncate, and a long chain of that would be a bias.
                sum0 += (acc[0][0] + acc[1][0]) + (acc[2][0] + acc[3][0]);
                sum1 += (acc[0][1] + acc[1][1]) + (acc[2][1] + acc[3][1]);
            }
            if (g < term_rows) *(float2 *)(parts + ((part * CONSUMERS + warp) * term_rows + g) * TILE + 2 * t) = make_float2(sum0, sum1);
            __syncwarp();
            if (lane == 0) barrier_arrive(parts_full + 8 * part);
            if (warp == part) { // the warps take turns; no buffer is needed again before its turn is over: PARTS > stages
                barrier_wait(parts_full + 8 * part, part_parity);
                finish_tile<N>(s, f, tile, parts + part * CONSUMERS * term_rows * TILE);
            }
            if (++part == PARTS) part = 0, part_parity ^= 1;
        }
        dealt += n_tiles;
        if (i + 1 < s.n_phases) {
            consumers_sync();
            if (threadIdx.x == 0) asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(s.done + i) : "memory");
        }
    }
}

// Computes: up to four matrix products that follow each other, with what is around them: RMSNorm, the residual sums,
// SwiGLU, RoPE. Reads: weights 16-bit, x, att, phases. Writes: x, h, qkv, logits (see Segment), done.
// Grid × block: one block of nine warps per SM, all resident at once; tiles of 8 rows of weights are dealt in turn.
// Preconditions: done = 0; cols % 8 = 0; rows × terms <= 8; every block of the grid fits at the same time.
template <typename N> __global__ void __launch_bounds__(THREADS, 1) decode_segment_kernel(const __grid_constant__ Segment s) {
    extern __shared__ __align__(128) char shared[];
    __shared__ uint64_t barriers[2 * MAX_STAGES + PARTS];
    __shared__ float sums[2 * CONSUMERS];
    Ring ring = {shared_address(barriers), shared_address(barriers + MAX_STAGES), shared_address(shared) + s.ring_offset, 0, 0, s.n_stages};
    uint32_t parts_full = shared_address(barriers + 2 * MAX_STAGES);
    if (threadIdx.x == 0) {
        for (int i = 0; i < s.n_stages; i++) {
            barrier_init(ring.full + 8 * i, 1);
            barrier_init(ring.empty + 8 * i, CONSUMERS);
        }
        for (int i = 0; i < PARTS; i++) barrier_init(parts_full + 8 * i, CONSUMERS);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    let_next_kernel_start();
    if (threadIdx.x >= 32 * CONSUMERS) produce(s, ring);
    else consume<N>(s, ring, shared, parts_full, sums);
}

// Computes: what a step begins with: the embedding of each row's token; cosine and sine of its position's angles; the
// segments' counters at zero. Reads: table [vocab][dim] W, tokens [rows], pos [rows], freq [half]. Writes: x [rows][dim],
// phases [rows][half], done [n_done]. Grid × block: rows × 256; a block owns a row, the first also the counters.
template <typename W>
__global__ void decode_begin_kernel(float *x, const W *table, const int *tokens, int dim, float2 *phases, const int *pos, const float *freq,
                                    int half, unsigned *done, int n_done) {
    const W *from = table + (size_t)tokens[blockIdx.x] * dim;
    for (int i = threadIdx.x; i < dim; i += blockDim.x) x[(size_t)blockIdx.x * dim + i] = to_float(from[i]);
    for (int i = threadIdx.x; i < half; i += blockDim.x) phases[(size_t)blockIdx.x * half + i] = phase_of(pos[blockIdx.x], freq[i]);
    if (blockIdx.x == 0)
        for (int i = threadIdx.x; i < n_done; i += blockDim.x) done[i] = 0;
}

// ---- launches -------------------------------------------------------------------------------------------------------

// Whether a phase's activations of so many rows of terms lie in shared memory, and how many bytes that takes.
size_t activation_bytes(int cols, int term_rows) { return (size_t)term_rows * ((cols + 63) / 64 * 128 + 64); }

} // namespace

struct FusedState {
    int n_blocks, max_rows, terms;   // rows: of one pass over the weights
    size_t shared_limit;
    void *h;                         // 16-bit [MAX_TERM_ROWS][hidden_dim]
    unsigned *done;                  // [n_layers + 1][MAX_PHASES]
};

// What a segment of n rows keeps in shared memory: activations, partial sums, and a ring in the rest.
static bool segment_layout(const Model *m, const FusedState *f, int n, Segment *s) {
    const Config *c = &m->config;
    int rows = n * f->terms, widest = c->dim > c->q_dim ? c->dim : c->q_dim;
    size_t act = activation_bytes(widest, rows), hidden = activation_bytes(c->hidden_dim, rows);
    bool direct = hidden > act && hidden > 72 * 1024; // too much, in place of stages of the ring
    if (!direct && hidden > act) act = hidden;
    s->parts_offset = (int)((act + 127) / 128 * 128);
    s->ring_offset = s->parts_offset + PARTS * CONSUMERS * rows * TILE * (int)sizeof(float);
    int stages = ((int)f->shared_limit - s->ring_offset) / STAGE_BYTES;
    s->n_stages = stages < MAX_STAGES ? stages : MAX_STAGES;
    for (int i = 0; i < MAX_PHASES; i++) s->phase[i].direct = s->phase[i].kind == PHASE_DOWN && direct;
    return s->n_stages > WINDOW - 1 && s->n_stages >= 2;
}

static Phase phase_of_kind(PhaseKind kind, const void *weights, const void *up, const float *norm, int rows, int cols) {
    Phase f;
    memset(&f, 0, sizeof f);
    f.kind = kind;
    f.rows = rows;
    f.cols = cols;
    f.weights = (const char *)weights;
    f.up = (const char *)up;
    f.norm = norm;
    f.n_pieces = (cols + PIECE - 1) / PIECE;
    f.piece = ((cols + f.n_pieces - 1) / f.n_pieces + 255) / 256 * 256;
    f.pitch = (cols + 63) / 64 * 128 + 64;
    return f;
}

// Launches a kernel that may start while the one before it runs; it waits for it itself.
template <typename... P, typename... A>
static bool launch(void (*kernel)(P...), int blocks, int threads, size_t shared, bool early, cudaStream_t stream, Error *err, A... args) {
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = early ? 1 : 0;
    CUDA_TRY(cudaLaunchKernelEx(&config, kernel, args...));
    return true;
}

template <typename N> static bool step_of(Model *m, int first, int n, Error *err) {
    const Config *c = &m->config;
    const Weights *w = &m->weights;
    CudaState *s = (CudaState *)m->state;
    FusedState *f = s->fused;
    int n_done = (c->n_layers + 1) * MAX_PHASES;
    if (!launch(decode_begin_kernel<typename N::W>, n, 256, 0, false, s->stream, err, s->x, (const typename N::W *)w->tok_embeddings,
                (const int *)s->step->tokens + first, c->dim, s->phases, (const int *)s->step->lens + first, (const float *)s->rope_freq,
                c->head_dim / 2, f->done, n_done))
        return false;
    for (int i = 0; i <= c->n_layers; i++) {
        const LayerWeights *l = &w->layers[i], *before = l - 1;
        Segment g;
        memset(&g, 0, sizeof g);
        if (i > 0) {
            AttentionArgs a = attention_args(m, s, n, n, i - 1);
            a.seq_lens_device = s->step->lens + first;
            a.block_table = s->step->slots + first;
            if (attention_decode(&a, s->stream) != 0) return fail(err, "%s", attention_error());
            g.phase[g.n_phases++] = phase_of_kind(PHASE_OUT, before->wo, NULL, NULL, c->dim, c->q_dim);
            g.phase[g.n_phases++] = phase_of_kind(PHASE_GATE_UP, before->w1, before->w3, before->ffn_norm, 2 * c->hidden_dim, c->dim);
            g.phase[g.n_phases++] = phase_of_kind(PHASE_DOWN, before->w2, NULL, NULL, c->dim, c->hidden_dim);
        }
        if (i < c->n_layers) g.phase[g.n_phases++] = phase_of_kind(PHASE_QKV, l->wq, NULL, l->attention_norm, c->q_dim + 2 * c->kv_dim, c->dim);
        else g.phase[g.n_phases++] = phase_of_kind(PHASE_HEAD, w->output, NULL, w->norm, c->vocab_size, c->dim);
        if (!segment_layout(m, f, n, &g)) return fail(err, "%d rows do not fit in %zu bytes of shared memory", n, f->shared_limit);
        g.n_rows = n;
        g.n_heads = c->n_heads;
        g.n_kv_heads = c->n_kv_heads;
        g.head_dim = c->head_dim;
        g.dim = c->dim;
        g.hidden_dim = c->hidden_dim;
        g.q_dim = c->q_dim;
        g.vocab_size = c->vocab_size;
        g.eps = c->norm_eps;
        g.x = s->x;
        g.qkv = s->qkv_in;
        g.att = s->att;
        g.h = f->h;
        g.phases = s->phases;
        g.logits = s->logits + (size_t)first * c->vocab_size;
        g.done = f->done + i * MAX_PHASES;
        if (i < c->n_layers) {
            g.next = (const char *)l->wo;
            g.next_bytes = (size_t)c->dim * c->q_dim * 2;
            g.next_share = FUSED_PREFETCH;
        }
        if (!launch(decode_segment_kernel<N>, f->n_blocks, THREADS, g.ring_offset + (size_t)g.n_stages * STAGE_BYTES, i > 0, s->stream, err, g))
            return false;
    }
    return choose(s, first, n, c->vocab_size, err);
}

// Calls body with the Numbers that the model's weights and precision ask for.
template <class Body> static bool for_numbers(const CudaState *s, Body body) {
    bool f32 = s->type == CUDA_R_32F;
    if (s->weight_type == CUDA_R_16BF) return f32 ? body(Numbers<bf16, 3>()) : body(Numbers<bf16, 1>());
    return f32 ? body(Numbers<f16, 3>()) : body(Numbers<f16, 1>());
}

// A step of n rows: in passes of max_rows, each of which reads all weights once; more than one pass of bf16 is cublas's.
static bool decode_step_fused(Model *m, int n, Error *err) {
    CudaState *s = (CudaState *)m->state;
    FusedState *f = s->fused;
    if (n > f->max_rows && (f->terms == 1 || n > 8)) return decode_step_cublas(m, n, err);
    for (int first = 0; first < n; first += f->max_rows) {
        int rows = n - first < f->max_rows ? n - first : f->max_rows;
        if (!for_numbers(s, [&](auto numbers) { return step_of<decltype(numbers)>(m, first, rows, err); })) return false;
    }
    return true;
}

static bool usable_fused(const Model *m, Error *err) {
    if (!usable_cuda(m, err)) return false;
    int device = 0, major = 0;
    CUDA_TRY(cudaGetDevice(&device));
    CUDA_TRY(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    if (major < 9) return fail(err, "engine fused needs compute capability 9.0, the GPU has %d", major);
    if (m->weights.dtype == DTYPE_F32 && m->precision == PRECISION_F32)
        return fail(err, "engine fused has no products of float32 weights, only of BF16 and F16");
    return true;
}

static bool prepare_fused(Model *m, Error *err) {
    CudaState *s = (CudaState *)m->state;
    FusedState *f = s->fused;
    int device = 0, limit = 0;
    CUDA_TRY(cudaGetDevice(&device));
    CUDA_TRY(cudaDeviceGetAttribute(&f->n_blocks, cudaDevAttrMultiProcessorCount, device));
    CUDA_TRY(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    f->terms = s->type == CUDA_R_32F ? 3 : 1;
    f->shared_limit = (size_t)limit - 1024; // the kernel's own barriers
    Segment g;
    memset(&g, 0, sizeof g);
    for (f->max_rows = MAX_TERM_ROWS / f->terms; f->max_rows > 0 && !segment_layout(m, f, f->max_rows, &g);) f->max_rows--;
    if (f->max_rows == 0) return true; // rows too long: every step goes through cublas
    CUDA_TRY(cudaMalloc(&f->h, (size_t)MAX_TERM_ROWS * m->config.hidden_dim * 2));
    CUDA_TRY(cudaMalloc((void **)&f->done, (size_t)(m->config.n_layers + 1) * MAX_PHASES * sizeof(unsigned)));
    return for_numbers(s, [&](auto numbers) {
        CUDA_TRY(cudaFuncSetAttribute((const void *)decode_segment_kernel<decltype(numbers)>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      (int)f->shared_limit));
        return true;
    });
}

static void close_fused(Model *m) {
    CudaState *s = (CudaState *)m->state;
    FusedState *f = s ? s->fused : NULL;
    close_cuda(m);
    if (!f) return;
    cudaFree(f->h);
    cudaFree(f->done);
    free(f);
}

static bool open_fused(Model *m, Error *err) {
    if (!open_cuda(m, true, err)) return false;
    CudaState *s = (CudaState *)m->state;
    if (!(s->fused = (FusedState *)calloc(1, sizeof *s->fused))) return fail(err, "out of memory: the engine's state");
    s->decode_step = decode_step_fused;
    return prepare_fused(m, err);
}

extern "C" const Engine engine_fused = {"fused", usable_fused, open_fused, close_fused, prefill_cuda, decode_cuda, read_logits_cuda, &machine_cuda};
