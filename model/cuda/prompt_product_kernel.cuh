// Products of many rows and 16-bit weights: the kernel. The protocol that it keeps: prompt_product.h.
#pragma once

#include "ops.h"
#include "prompt_product.h"

namespace {

// A tile, and how a block computes it: a warpgroup has up to 64 tokens and all rows of weights.
template <PromptKind KIND_, int TOKENS_, int ROWS_, bool SHARES_TOKENS_> struct PromptShape {
    static constexpr PromptKind KIND = KIND_;
    static constexpr int TOKENS = TOKENS_, ROWS = ROWS_;
    static constexpr bool SHARES_TOKENS = SHARES_TOKENS_, FEW = TOKENS == PROMPT_FEW_TOKENS;
    static constexpr int CONSUMERS = TOKENS / 16; // warps
    // The producer is a warp; where registers are moved from it to two warpgroups, a warpgroup has to give them.
    static constexpr int THREADS = 32 * CONSUMERS + (FEW ? 32 : 128);
    // Panels of a stage: enough that the tensor cores take longer than it takes to start its copies.
    static constexpr int PANELS = FEW ? 2 : 1;
    static constexpr int TOKEN_BYTES = PROMPT_COLUMNS * 2, // of a token or a row in a panel
        INPUT_BYTES = PANELS * TOKENS * TOKEN_BYTES, WEIGHTS_BYTES = PANELS * ROWS * TOKEN_BYTES,
                         STAGE = INPUT_BYTES + WEIGHTS_BYTES;
    static constexpr int FIT = (PROMPT_SHARED - 1024) / STAGE,
                         STAGES = FIT < PROMPT_MAX_STAGES ? FIT : PROMPT_MAX_STAGES;
    static_assert(STAGES >= 2, "a stage is released when the next one has been copied");
    // What one copy brings: of what the blocks share half of the panels, or of the only one half of the tokens or rows.
    static constexpr bool HALVES = PANELS == 1;
    static constexpr int MATRICES = KIND == PROMPT_SWIGLU ? 2 : 1;
    static constexpr int TOKEN_PANELS = SHARES_TOKENS && !HALVES ? PANELS / 2 : PANELS,
                         WEIGHT_PANELS = SHARES_TOKENS || HALVES ? PANELS : PANELS / 2,
                         BOX_MATRICES = !SHARES_TOKENS && HALVES ? 1 : MATRICES,
                         BOX_ROWS = !SHARES_TOKENS && HALVES ? ROWS / 2 : ROWS / MATRICES;
    // Tokens of one copy, of a tile that has so many.
    static constexpr int token_box(int tokens) {
        return SHARES_TOKENS && HALVES ? tokens / 2 : tokens;
    }
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDA_ARCH__)

// The ring of stages, and how far along a warp is. Parity is that of `full`; a fresh `empty` counts as complete.
template <class Shape> struct PromptRing {
    uint32_t full, empty, stages; // addresses of the barriers and of the stages
    int slot = 0, parity = 0;
    __device__ __forceinline__ void next() {
        if (++slot == Shape::STAGES) slot = 0, parity ^= 1;
    }
    __device__ __forceinline__ uint32_t stage() const {
        return stages + slot * Shape::STAGE;
    }
};

// A block's tile: its first token, the end of its tokens, and its number among those of the weights.
struct PromptPlace {
    int token, end, tile;
};
// Tile number i of the clusters. `together` tiles of tokens go through the weights side by side, then the next ones.
template <class Shape> __device__ __forceinline__ PromptPlace prompt_place(const PromptParams &p, int i, int rank) {
    const int group = i / (p.together * p.row_tiles), first = group * p.together, within = i - first * p.row_tiles,
              n = min(p.together, p.token_tiles - first);
    const int cluster = first + within % n, rows = within / n;
    const int token = (Shape::SHARES_TOKENS ? cluster : cluster * PROMPT_CLUSTER + rank) * p.tile_tokens;
    return {token, min(token + p.tile_tokens, p.T), Shape::SHARES_TOKENS ? rows * PROMPT_CLUSTER + rank : rows};
}

constexpr int PROMPT_BOTH = (1 << PROMPT_CLUSTER) - 1; // blocks of a cluster

// A stage's weights, from panel k on, of which the other block may need the same: then half of them, for both.
template <class Shape>
__device__ __forceinline__ void prompt_copy_weights(const PromptParams &p, const PromptRing<Shape> &ring, int tile,
                                                    int k, int rank) {
    const uint32_t full = ring.full + 8 * ring.slot, to = ring.stage() + Shape::INPUT_BYTES,
                   half = to + rank * (Shape::WEIGHTS_BYTES / 2);
    const int row = tile * (Shape::ROWS / Shape::MATRICES);
    if constexpr (Shape::SHARES_TOKENS)
        copy_tensor_4d(to, &p.weights, 0, row, 0, k, full);
    else if constexpr (!Shape::HALVES)
        copy_tensor_4d_to_blocks(half, &p.weights, 0, row, 0, k + rank * Shape::WEIGHT_PANELS, full, PROMPT_BOTH);
    else if constexpr (Shape::MATRICES == 2)
        copy_tensor_4d_to_blocks(half, &p.weights, 0, row, rank, k, full, PROMPT_BOTH);
    else
        copy_tensor_4d_to_blocks(half, &p.weights, 0, row + rank * Shape::BOX_ROWS, 0, k, full, PROMPT_BOTH);
}
// The same of its tokens.
template <class Shape>
__device__ __forceinline__ void prompt_copy_tokens(const PromptParams &p, const PromptRing<Shape> &ring, int token,
                                                   int k, int rank) {
    const uint32_t full = ring.full + 8 * ring.slot, to = ring.stage(),
                   half = to + rank * (Shape::PANELS * p.tile_tokens * Shape::TOKEN_BYTES / 2);
    if constexpr (!Shape::SHARES_TOKENS)
        copy_tensor_4d(to, &p.input, 0, token, 0, k, full);
    else if constexpr (!Shape::HALVES)
        copy_tensor_4d_to_blocks(half, &p.input, 0, token, 0, k + rank * Shape::TOKEN_PANELS, full, PROMPT_BOTH);
    else
        copy_tensor_4d_to_blocks(half, &p.input, 0, token + rank * (p.tile_tokens / 2), 0, k, full, PROMPT_BOTH);
}

// Bytes that a stage gets. (Those that the other block copies may come before this one expects any: the phase is not
// complete before the producer's own arrival.)
template <class Shape> __device__ __forceinline__ int prompt_stage_bytes(const PromptParams &p) {
    return Shape::WEIGHTS_BYTES + Shape::PANELS * p.tile_tokens * Shape::TOKEN_BYTES;
}
// How many stages get their weights before the kernel before is complete, as it does not write them.
template <class Shape> __device__ __forceinline__ int prompt_early(const PromptParams &p) {
    const int panels = p.cols / PROMPT_COLUMNS;
    return p.weights_are_stable ? min(Shape::STAGES, (panels + Shape::PANELS - 1) / Shape::PANELS) : 0;
}
template <class Shape>
__device__ __forceinline__ void prompt_produce_early(const PromptParams &p, PromptRing<Shape> ring, int rank) {
    const int tile = prompt_place<Shape>(p, blockIdx.x / PROMPT_CLUSTER, rank).tile;
    for (int i = prompt_early<Shape>(p), k = 0; i > 0; i--, k += Shape::PANELS, ring.next()) {
        mbarrier_arrive_expect_tx(ring.full + 8 * ring.slot, prompt_stage_bytes<Shape>(p));
        prompt_copy_weights(p, ring, tile, k, rank);
    }
}
template <class Shape>
__device__ __forceinline__ void prompt_produce(const PromptParams &p, PromptRing<Shape> ring, int rank) {
    int early = prompt_early<Shape>(p);
    for (int i = blockIdx.x / PROMPT_CLUSTER; i < p.row_tiles * p.token_tiles; i += gridDim.x / PROMPT_CLUSTER) {
        const PromptPlace place = prompt_place<Shape>(p, i, rank);
        for (int k = 0; k < p.cols / PROMPT_COLUMNS; k += Shape::PANELS, ring.next()) {
            if (early-- <= 0) {
                mbarrier_wait(ring.empty + 8 * ring.slot, ring.parity ^ 1);
                mbarrier_arrive_expect_tx(ring.full + 8 * ring.slot, prompt_stage_bytes<Shape>(p));
                prompt_copy_weights(p, ring, place.tile, k, rank);
            }
            prompt_copy_tokens(p, ring, place.token, k, rank);
        }
    }
}

// ---- what follows a product -----------------------------------------------------------------------------------------
// A thread has two tokens, 8 apart, and of every 8 rows of weights two: acc[4j], acc[4j + 1] are rows 8j + 2t and the
// next one of the first token, acc[4j + 2], acc[4j + 3] of the second.

// Where a thread is: its first token, the end of the tile's tokens, the tile's first row of weights, and t, the
// thread's number in its quad.
struct PromptPart {
    int token, end, row, t;
};

// Transposes the 4 × 4 words w of a quad of lanes: lane t gets what the four lanes had as w[t]. So of four groups of 8
// rows each lane comes to have one, whole: 16 bytes.
__device__ __forceinline__ void transpose_quad(uint32_t (&w)[4], int t) {
#pragma unroll
    for (int step = 1; step <= 2; step *= 2)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (i & step) continue;
            const bool upper = t & step;
            const uint32_t got = __shfl_xor_sync(~0u, upper ? w[i] : w[i + step], step);
            w[i] = upper ? got : w[i];
            w[i + step] = upper ? w[i + step] : got;
        }
}

// The scales of two neighbouring rows of a matrix. (Past its end those of the last two, for results that nobody keeps.)
__device__ __forceinline__ float2 prompt_scale(const PromptParams &p, int matrix, int row) {
    return __ldg((const float2 *)(p.scale[matrix] + min(row, p.rows - 2)));
}
__device__ __forceinline__ float2 times(float2 a, float2 b) {
    return make_float2(__fmul_rn(a.x, b.x), __fmul_rn(a.y, b.y));
}

// Of a thread's two tokens, groups of 8 rows from j0 on: what the results are added to.
template <int GROUPS> struct PromptAdded {
    float2 x[GROUPS][2];
};
template <int GROUPS>
__device__ __forceinline__ void prompt_load_x(const PromptParams &p, const PromptPart &at, int j0,
                                              PromptAdded<GROUPS> *own) {
    const float *first = p.x + (size_t)at.token * p.pitch + at.row + 2 * at.t;
#pragma unroll
    for (int j = 0; j < GROUPS; j++)
#pragma unroll
        for (int i = 0; i < 2; i++)
            if (at.token + 8 * i < at.end && at.row + 8 * (j0 + j) < p.rows)
                own->x[j][i] = __ldcg((const float2 *)(first + 8 * i * (size_t)p.pitch + 8 * (j0 + j)));
}
template <int N, bool SCALED, int GROUPS>
__device__ __forceinline__ void prompt_store_x(const PromptParams &p, const float (&acc)[N / 2],
                                               const PromptAdded<GROUPS> &own, const PromptPart &at, int j0) {
    float *first = p.x + (size_t)at.token * p.pitch + at.row + 2 * at.t;
#pragma unroll
    for (int j = 0; j < GROUPS; j++) {
        float2 scale = make_float2(1, 1);
        if (SCALED) scale = prompt_scale(p, 0, at.row + 8 * (j0 + j) + 2 * at.t);
#pragma unroll
        for (int i = 0; i < 2; i++)
            if (at.token + 8 * i < at.end && at.row + 8 * (j0 + j) < p.rows) {
                const float *pair = acc + 4 * (j0 + j) + 2 * i;
                *(float2 *)(first + 8 * i * (size_t)p.pitch + 8 * (j0 + j)) =
                    make_float2(__fmaf_rn(pair[0], scale.x, own.x[j][i].x), __fmaf_rn(pair[1], scale.y, own.x[j][i].y));
            }
    }
}

template <int N>
__device__ __forceinline__ void prompt_store_added(const PromptParams &p, const float (&acc)[N / 2],
                                                   const PromptPart &at) {
    constexpr int EACH = 4; // groups of 8 rows whose loads are under way at once
#pragma unroll
    for (int j0 = 0; j0 < N / 8; j0 += EACH) {
        PromptAdded<EACH> own;
        prompt_load_x(p, at, j0, &own);
        prompt_store_x<N, true>(p, acc, own, at, j0);
    }
}

template <typename T, int N>
__device__ __forceinline__ void prompt_store_gated(const PromptParams &p, const float (&acc)[N / 2],
                                                   const PromptPart &at) {
    const int t = at.t, row = at.row;
#pragma unroll
    for (int i = 0; i < 2; i++) { // the token
        T *to = (T *)p.h + (size_t)(at.token + 8 * i) * p.pitch + row + 8 * t;
        const bool there = at.token + 8 * i < at.end;
#pragma unroll
        for (int j0 = 0; j0 < N / 16; j0 += 4) {
            uint32_t w[4] = {};
#pragma unroll
            for (int j = 0; j < 4 && j0 + j < N / 16; j++) {
                const float *pair = acc + 4 * (j0 + j) + 2 * i;
                float2 gate = make_float2(pair[0], pair[1]), up = make_float2(pair[N / 4], pair[N / 4 + 1]);
                if (p.scale[0]) {
                    gate = times(gate, prompt_scale(p, 0, row + 8 * (j0 + j) + 2 * t));
                    up = times(up, prompt_scale(p, 1, row + 8 * (j0 + j) + 2 * t));
                }
                w[j] = pack2<T>(silu_fast(gate.x) * up.x, silu_fast(gate.y) * up.y);
            }
            transpose_quad(w, t);
            if (there && j0 + t < N / 16 && row + 8 * (j0 + t) < p.rows)
                *(uint4 *)(to + 8 * j0) = make_uint4(w[0], w[1], w[2], w[3]);
        }
    }
}

// Of a thread's two tokens: their rows of the table of cosines and sines, from the thread's first pair on, and where
// they are in the cache, from K/V head 0 on, in elements.
struct PromptTokens {
    const float2 *rope[2];
    size_t cached[2];
};
__device__ __forceinline__ PromptTokens prompt_tokens(const PromptParams &p, const PromptPart &part) {
    PromptTokens own;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int at = min(part.token + 8 * i, p.T - 1);
        own.rope[i] = p.rope + (size_t)at * (p.head_dim / 2) + part.t;
        own.cached[i] = 0;
        if (!p.k) continue;
        const int pos = p.pos[at];
        const size_t page = p.table[(size_t)p.slots[at] * p.table_width + pos / KV_PAGE];
        own.cached[i] = (page * p.n_kv * KV_PAGE + pos % KV_PAGE) * p.head_dim;
    }
    return own;
}

// The cosines and sines of the thread's pairs in 128 columns from column d of a head on.
struct PromptRope {
    float2 by[2][16];
};
__device__ __forceinline__ PromptRope prompt_rope(const PromptParams &p, const PromptTokens &own, int d) {
    PromptRope rope;
#pragma unroll
    for (int j = 0; j < 16; j++) { // (of fewer columns the compiler drops the loads that nobody needs)
#pragma unroll
        for (int i = 0; i < 2; i++) rope.by[i][j] = own.rope[i][d / 2];
        d += 8;
        if (d >= p.head_dim) d -= p.head_dim;
    }
    return rope;
}

template <typename T, int N>
__device__ __forceinline__ void prompt_store_heads(const PromptParams &p, const float (&acc)[N / 2],
                                                   const PromptPart &at, const PromptTokens &own, PromptRope rope) {
    const int t = at.t, row = at.row;
    const bool repeat = 128 % p.head_dim == 0; // every 128 columns have the same cosines and sines
    int head = (p.first_row + row) / p.head_dim, d = p.first_row + row - head * p.head_dim; // of group j
#pragma unroll
    for (int j0 = 0; j0 < N / 8; j0 += 4) {
        int own_head = 0, own_d = 0; // of group t
        uint32_t w[2][4];
        if (N % 32) memset(w, 0, sizeof w);
        if (j0 > 0 && j0 % 16 == 0 && !repeat) rope = prompt_rope(p, own, d);
#pragma unroll
        for (int j = 0; j < 4 && j0 + j < N / 8; j++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float2 x = make_float2(acc[4 * (j0 + j) + 2 * i], acc[4 * (j0 + j) + 2 * i + 1]);
                if (p.scale[0]) x = times(x, prompt_scale(p, 0, row + 8 * (j0 + j) + 2 * t));
                if (head < p.n_q + p.n_kv) x = rotated(x, rope.by[i][j0 % 16 + j]);
                w[i][j] = pack2<T>(x.x, x.y);
            }
            if (j == t) own_head = head, own_d = d;
            d += 8;
            if (d >= p.head_dim) d -= p.head_dim, head++;
        }
        const bool in_cache = p.k && own_head >= p.n_q, is_key = own_head < p.n_q + p.n_kv;
        T *cache =
            (T *)(is_key ? p.k : p.v) + (size_t)(own_head - p.n_q - (is_key ? 0 : p.n_kv)) * KV_PAGE * p.head_dim;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            transpose_quad(w[i], t);
            T *to = in_cache ? cache + own.cached[i]
                             : (T *)p.out + ((size_t)own_head * p.T + at.token + 8 * i) * p.head_dim;
            if (at.token + 8 * i < at.end && (N % 32 == 0 || j0 + t < N / 8) && row + 8 * (j0 + t) < p.rows)
                *(uint4 *)(to + own_d) = make_uint4(w[i][0], w[i][1], w[i][2], w[i][3]);
        }
    }
}

template <typename T, class Shape>
__device__ __forceinline__ void prompt_consume(const PromptParams &p, PromptRing<Shape> ring, int rank) {
    constexpr PromptKind KIND = Shape::KIND;
    constexpr int N = Shape::ROWS;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = warp / 4, panels = p.cols / PROMPT_COLUMNS,
              tile_bytes = p.tile_tokens * Shape::TOKEN_BYTES;
    const uint32_t emptied = address_in_block(ring.empty, lane % PROMPT_CLUSTER);
    float acc[N / 2];
    for (int i = blockIdx.x / PROMPT_CLUSTER; i < p.row_tiles * p.token_tiles; i += gridDim.x / PROMPT_CLUSTER) {
        const PromptPlace place = prompt_place<Shape>(p, i, rank);
        const PromptPart at = {place.token + warp * 16 + lane / 4, place.end, place.tile * (N / Shape::MATRICES),
                               lane % 4};
        PromptTokens own;
        PromptAdded<N / 8> added;
        uint32_t before = 0; // the `empty` barrier of the stage before
        for (int k = 0; k < panels; k += Shape::PANELS, ring.next()) {
            mbarrier_wait(ring.full + 8 * ring.slot, ring.parity);
            const uint64_t in = wgmma_operand(ring.stage() + group * 64 * Shape::TOKEN_BYTES, 1024),
                           w = wgmma_operand(ring.stage() + Shape::INPUT_BYTES, 1024);
            // Panels beyond the last are zeros. (No branch among the wgmmas: the compiler would wait for each.)
            wgmma_fence();
#pragma unroll
            for (int q = 0; q < Shape::PANELS; q++)
#pragma unroll
                for (int j = 0; j < PROMPT_COLUMNS / 16; j++)
                    wgmma_product<T, N>(acc, in + q * (tile_bytes / 16) + 2 * j,
                                        w + q * (N * Shape::TOKEN_BYTES / 16) + 2 * j, q + j > 0 || k > 0);
            wgmma_commit();
            // What the epilogue takes beside the results is looked up, and loaded, while wgmma works.
            if (KIND == PROMPT_QKV && k == 0) own = prompt_tokens(p, at);
            if constexpr (KIND == PROMPT_ADD && Shape::FEW)
                if (k == 0) prompt_load_x(p, at, 0, &added);
            wgmma_wait<1>();
            if (k > 0 && lane < PROMPT_CLUSTER) mbarrier_arrive_read(before);
            before = emptied + 8 * ring.slot;
        }
        PromptRope rope;
        if constexpr (KIND == PROMPT_QKV) rope = prompt_rope(p, own, (p.first_row + at.row) % p.head_dim);
        wgmma_wait<0>();
        wgmma_pin(acc);
        if (lane < PROMPT_CLUSTER) mbarrier_arrive_read(before);
        if constexpr (KIND == PROMPT_QKV) prompt_store_heads<T, N>(p, acc, at, own, rope);
        if constexpr (KIND == PROMPT_SWIGLU) prompt_store_gated<T, N>(p, acc, at);
        if constexpr (KIND == PROMPT_ADD && Shape::FEW) {
            if (p.scale[0])
                prompt_store_x<N, true>(p, acc, added, at, 0);
            else
                prompt_store_x<N, false>(p, acc, added, at, 0);
        }
        if constexpr (KIND == PROMPT_ADD && !Shape::FEW) prompt_store_added<N>(p, acc, at);
    }
}

// Computes: a product of the input and one or two matrices, and what follows it (KIND).
// Reads:    input, weights, of T; x; scales; what RoPE and the cache's places are found by.
// Writes:   h; or out, k and v; or x.
// Grid:     clusters of 2 × (of few tokens 160, else 384) threads, all resident at once.
// Requires: up after gate, by a multiple of 16 bytes; cols % 64 = 0, rows, first_row, pitch and head_dim % 8 = 0; the
//           table has the pages of all pos; h, out, k and v aligned to 16 bytes, x and scales to 8.
template <typename T, class Shape>
__global__ void __cluster_dims__(PROMPT_CLUSTER, 1, 1) __launch_bounds__(Shape::THREADS, 1)
    prompt_product_kernel(const __grid_constant__ PromptParams p) {
    extern __shared__ __align__(1024) char dynamic[];
    __shared__ uint64_t barriers[2 * PROMPT_MAX_STAGES];
    const int rank = rank_in_cluster();
    PromptRing<Shape> ring;
    ring.full = shared_address(barriers);
    ring.empty = ring.full + 8 * PROMPT_MAX_STAGES;
    ring.stages = (shared_address(dynamic) + 1023) & ~1023u;
    const bool producer = threadIdx.x == 32 * Shape::CONSUMERS;
    if (producer) {
        for (int i = 0; i < Shape::STAGES; i++) {
            mbarrier_init(ring.full + 8 * i, 1);
            mbarrier_init(ring.empty + 8 * i, Shape::CONSUMERS * PROMPT_CLUSTER);
        }
        fence_mbarrier_init();
        if (Shape::SHARES_TOKENS) prompt_produce_early(p, ring, rank); // the weights are the block's own
    }
    __syncthreads();
    cluster_arrive();
    cluster_wait();
    if (producer && !Shape::SHARES_TOKENS) prompt_produce_early(p, ring, rank);
    wait_for_previous_kernel();
    let_next_kernel_start(); // not before: attention relies on it (AttentionArgs.kv_stable)
    if (threadIdx.x >= 32 * Shape::CONSUMERS) {
        if constexpr (!Shape::FEW) decrease_registers<24>();
        if (producer) prompt_produce(p, ring, rank);
    } else {
        if constexpr (!Shape::FEW) increase_registers<240>();
        prompt_consume<T>(p, ring, rank);
    }
    // The other block may still copy to this one's shared memory, or arrive at its barriers.
    __syncwarp();
    cluster_arrive_release();
    cluster_wait();
}

#else

// In code for other GPUs, without launch bounds: prompt_open knows it by that, and it is never launched.
template <typename T, class Shape> __global__ void prompt_product_kernel(const __grid_constant__ PromptParams p) {
}

#endif

} // namespace
