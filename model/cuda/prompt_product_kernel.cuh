// Products of many rows and 16-bit weights: the kernel. The protocol that it keeps: prompt_product.h.
#pragma once

#include "ops.h"
#include "prompt_product.h"

namespace {

constexpr int PROMPT_INPUT_BYTES = PROMPT_TOKENS * PROMPT_COLUMNS * 2; // of a stage
template <int N> constexpr int PROMPT_STAGE = PROMPT_INPUT_BYTES + N * PROMPT_COLUMNS * 2;
template <int N> constexpr int PROMPT_STAGES = (PROMPT_SHARED - 1024) / PROMPT_STAGE<N>;

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDA_ARCH__)

// The ring of stages, and how far along a warp is. Parity is that of `full`; a fresh `empty` counts as complete.
template <int N> struct PromptRing {
    uint32_t full, empty, stages; // addresses of the barriers and of the stages
    int slot = 0, parity = 0;
    __device__ __forceinline__ void next() {
        if (++slot == PROMPT_STAGES<N>) slot = 0, parity ^= 1;
    }
    __device__ __forceinline__ uint32_t stage() const {
        return stages + slot * PROMPT_STAGE<N>;
    }
};

// A block's tile: its first token, and its number among those of the weights.
struct PromptPlace {
    int token, tile;
};
// Tile number i of the clusters. `together` tiles of tokens go through the weights side by side, then the next ones.
template <bool SHARES_TOKENS>
__device__ __forceinline__ PromptPlace prompt_place(const PromptParams &p, int i, int rank) {
    const int group = i / (p.together * p.row_tiles), first = group * p.together, within = i - first * p.row_tiles,
              n = min(p.together, p.token_tiles - first);
    const int tokens = first + within % n, rows = within / n;
    if (SHARES_TOKENS) return {tokens * PROMPT_TOKENS, rows * PROMPT_CLUSTER + rank};
    return {(tokens * PROMPT_CLUSTER + rank) * PROMPT_TOKENS, rows};
}

template <int N, PromptKind KIND, bool SHARES_TOKENS>
__device__ __forceinline__ void prompt_produce(const PromptParams &p, PromptRing<N> ring, int rank) {
    constexpr int HALF = N / 2, HALF_BYTES = HALF * PROMPT_COLUMNS * 2, BOTH = (1 << PROMPT_CLUSTER) - 1;
    for (int i = blockIdx.x / PROMPT_CLUSTER; i < p.row_tiles * p.token_tiles; i += gridDim.x / PROMPT_CLUSTER) {
        const PromptPlace place = prompt_place<SHARES_TOKENS>(p, i, rank);
        // Rows of weights: the first of gate and of up, or of both halves.
        const int first = place.tile * (KIND == PROMPT_SWIGLU ? HALF : N),
                  second = KIND == PROMPT_SWIGLU ? first : first + HALF;
        for (int k = 0; k < p.cols; k += PROMPT_COLUMNS, ring.next()) {
            const uint32_t full = ring.full + 8 * ring.slot, to = ring.stage(), weights = to + PROMPT_INPUT_BYTES;
            mbarrier_wait(ring.empty + 8 * ring.slot, ring.parity ^ 1);
            mbarrier_arrive_expect_tx(full, PROMPT_STAGE<N>);
            if constexpr (SHARES_TOKENS) {
                copy_tensor_2d_to_blocks(to + rank * (PROMPT_INPUT_BYTES / 2), &p.input, k,
                                         place.token + rank * (PROMPT_TOKENS / 2), full, BOTH);
                copy_tensor_2d(weights, &p.weights[0], k, first, full);
                copy_tensor_2d(weights + HALF_BYTES, &p.weights[1], k, second, full);
            } else {
                copy_tensor_2d(to, &p.input, k, place.token, full);
                copy_tensor_2d_to_blocks(weights + rank * HALF_BYTES, &p.weights[rank], k, rank == 0 ? first : second,
                                         full, BOTH);
            }
        }
    }
}

// ---- what follows a product -----------------------------------------------------------------------------------------
// A thread has two tokens, 8 apart, and of every 8 rows of weights two: acc[4j], acc[4j + 1] are rows 8j + 2t and the
// next one of the first token, acc[4j + 2], acc[4j + 3] of the second.

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

template <int N>
__device__ __forceinline__ void prompt_store_added(const PromptParams &p, const float (&acc)[N / 2], int token, int row,
                                                   int t) {
    constexpr int EACH = 4; // groups of 8 rows whose loads are under way at once
    float *first = p.x + (size_t)token * p.pitch + row + 2 * t, *second = first + 8 * (size_t)p.pitch;
#pragma unroll
    for (int j0 = 0; j0 < N / 8; j0 += EACH) {
        float2 x[EACH][2], scale[EACH];
#pragma unroll
        for (int j = 0; j < EACH; j++) {
            scale[j] = prompt_scale(p, 0, row + 8 * (j0 + j) + 2 * t);
#pragma unroll
            for (int i = 0; i < 2; i++)
                if (token + 8 * i < p.T && row + 8 * (j0 + j) < p.rows)
                    x[j][i] = __ldcg((const float2 *)((i == 0 ? first : second) + 8 * (j0 + j)));
        }
#pragma unroll
        for (int j = 0; j < EACH; j++)
#pragma unroll
            for (int i = 0; i < 2; i++)
                if (token + 8 * i < p.T && row + 8 * (j0 + j) < p.rows) {
                    const float *pair = acc + 4 * (j0 + j) + 2 * i;
                    *(float2 *)((i == 0 ? first : second) + 8 * (j0 + j)) = make_float2(
                        __fmaf_rn(pair[0], scale[j].x, x[j][i].x), __fmaf_rn(pair[1], scale[j].y, x[j][i].y));
                }
    }
}

template <typename T, int N>
__device__ __forceinline__ void prompt_store_gated(const PromptParams &p, const float (&acc)[N / 2], int token, int row,
                                                   int t) {
#pragma unroll
    for (int i = 0; i < 2; i++) { // the token
        T *to = (T *)p.h + (size_t)(token + 8 * i) * p.pitch + row + 8 * t;
        const bool there = token + 8 * i < p.T;
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
__device__ __forceinline__ PromptTokens prompt_tokens(const PromptParams &p, int token, int t) {
    PromptTokens own;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int at = min(token + 8 * i, p.T - 1);
        own.rope[i] = p.rope + (size_t)at * (p.head_dim / 2) + t;
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
    for (int j = 0; j < 16; j++) {
#pragma unroll
        for (int i = 0; i < 2; i++) rope.by[i][j] = own.rope[i][d / 2];
        d += 8;
        if (d >= p.head_dim) d -= p.head_dim;
    }
    return rope;
}

template <typename T, int N>
__device__ __forceinline__ void prompt_store_heads(const PromptParams &p, const float (&acc)[N / 2], int token, int row,
                                                   int t, const PromptTokens &own, PromptRope rope) {
    const bool repeat = 128 % p.head_dim == 0; // every 128 columns have the same cosines and sines
    int head = (p.first_row + row) / p.head_dim, d = p.first_row + row - head * p.head_dim; // of group j
#pragma unroll
    for (int j0 = 0; j0 < N / 8; j0 += 4) {
        int own_head = 0, own_d = 0; // of group t
        uint32_t w[2][4];
        if (j0 > 0 && j0 % 16 == 0 && !repeat) rope = prompt_rope(p, own, d);
#pragma unroll
        for (int j = 0; j < 4; j++) {
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
            T *to =
                in_cache ? cache + own.cached[i] : (T *)p.out + ((size_t)own_head * p.T + token + 8 * i) * p.head_dim;
            if (token + 8 * i < p.T && row + 8 * (j0 + t) < p.rows)
                *(uint4 *)(to + own_d) = make_uint4(w[i][0], w[i][1], w[i][2], w[i][3]);
        }
    }
}

template <typename T, int N, PromptKind KIND, bool SHARES_TOKENS>
__device__ __forceinline__ void prompt_consume(const PromptParams &p, PromptRing<N> ring, int rank) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = warp / 4, t = lane % 4;
    const uint32_t emptied = address_in_block(ring.empty, lane % PROMPT_CLUSTER);
    float acc[N / 2];
    for (int i = blockIdx.x / PROMPT_CLUSTER; i < p.row_tiles * p.token_tiles; i += gridDim.x / PROMPT_CLUSTER) {
        const PromptPlace place = prompt_place<SHARES_TOKENS>(p, i, rank);
        const int token = place.token + warp * 16 + lane / 4, row = place.tile * (KIND == PROMPT_SWIGLU ? N / 2 : N);
        PromptTokens own;
        uint32_t before = 0; // the `empty` barrier of the panel before
        for (int k = 0; k < p.cols; k += PROMPT_COLUMNS, ring.next()) {
            mbarrier_wait(ring.full + 8 * ring.slot, ring.parity);
            const uint64_t in = wgmma_operand(ring.stage() + group * (PROMPT_INPUT_BYTES / 2), 1024),
                           w = wgmma_operand(ring.stage() + PROMPT_INPUT_BYTES, 1024);
            wgmma_fence();
#pragma unroll
            for (int j = 0; j < PROMPT_COLUMNS / 16; j++) wgmma_product<T, N>(acc, in + 2 * j, w + 2 * j, k + j > 0);
            wgmma_commit();
            // What the epilogue takes beside the results is looked up, and loaded, while wgmma works.
            if (KIND == PROMPT_QKV && k == 0) own = prompt_tokens(p, token, t);
            wgmma_wait<1>();
            if (k > 0 && lane < PROMPT_CLUSTER) mbarrier_arrive_read(before);
            before = emptied + 8 * ring.slot;
        }
        PromptRope rope;
        if constexpr (KIND == PROMPT_QKV) rope = prompt_rope(p, own, (p.first_row + row) % p.head_dim);
        wgmma_wait<0>();
        wgmma_pin(acc);
        if (lane < PROMPT_CLUSTER) mbarrier_arrive_read(before);
        if constexpr (KIND == PROMPT_QKV) prompt_store_heads<T, N>(p, acc, token, row, t, own, rope);
        if constexpr (KIND == PROMPT_SWIGLU) prompt_store_gated<T, N>(p, acc, token, row, t);
        if constexpr (KIND == PROMPT_ADD) prompt_store_added<N>(p, acc, token, row, t);
    }
}

// Computes: a product of the input and one or two matrices, and what follows it (KIND).
// Reads:    input, weights, of T; x; scales; what RoPE and the cache's places are found by.
// Writes:   h; or out, k and v; or x.
// Grid:     clusters of 2 × 384 threads, all resident at once.
// Requires: cols % 64 = 0, rows, first_row, pitch and head_dim % 8 = 0; the table has the pages of all pos; h, out, k
//           and v aligned to 16 bytes, x and scales to 8.
template <typename T, int N, PromptKind KIND, bool SHARES_TOKENS>
__global__ void __cluster_dims__(PROMPT_CLUSTER, 1, 1) __launch_bounds__(PROMPT_THREADS, 1)
    prompt_product_kernel(const __grid_constant__ PromptParams p) {
    extern __shared__ __align__(1024) char dynamic[];
    __shared__ uint64_t barriers[2 * PROMPT_MAX_STAGES];
    static_assert(PROMPT_STAGES<N> <= PROMPT_MAX_STAGES, "barriers");
    const int rank = rank_in_cluster();
    PromptRing<N> ring;
    ring.full = shared_address(barriers);
    ring.empty = ring.full + 8 * PROMPT_MAX_STAGES;
    ring.stages = (shared_address(dynamic) + 1023) & ~1023u;
    if (threadIdx.x == 0) {
        for (int i = 0; i < PROMPT_STAGES<N>; i++) {
            mbarrier_init(ring.full + 8 * i, 1);
            mbarrier_init(ring.empty + 8 * i, 8 * PROMPT_CLUSTER);
        }
        fence_mbarrier_init();
    }
    __syncthreads();
    cluster_arrive();
    cluster_wait();
    wait_for_previous_kernel();
    let_next_kernel_start(); // not before: attention relies on it (AttentionArgs.kv_stable)
    if (threadIdx.x >= 256) {
        decrease_registers<24>();
        if (threadIdx.x == 256) prompt_produce<N, KIND, SHARES_TOKENS>(p, ring, rank);
    } else {
        increase_registers<240>();
        prompt_consume<T, N, KIND, SHARES_TOKENS>(p, ring, rank);
    }
    // The other block may still copy to this one's shared memory, or arrive at its barriers.
    __syncwarp();
    cluster_arrive_release();
    cluster_wait();
}

#else

// In code for other GPUs, without launch bounds: prompt_open knows it by that, and it is never launched.
template <typename T, int N, PromptKind KIND, bool SHARES_TOKENS>
__global__ void prompt_product_kernel(const __grid_constant__ PromptParams p) {
}

#endif

} // namespace
