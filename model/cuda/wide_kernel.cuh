// Engine fused, steps of many rows: the kernels. The protocol that they keep: wide.h.
#pragma once

#include "ops.h"
#include "wide.h"

namespace {

// Panels of a stage, at most. A cluster's part of out and down is one tile: three panels of it are a stage as long as
// that of three tiles.
constexpr int WIDE_PANELS = 3;
// Bytes of a stage: panels of weights, [panel][tile][row], then of N rows of activations.
constexpr int WIDE_STAGE_WEIGHTS = WIDE_TILES * WIDE_TILE * WIDE_COLUMNS * 2;
template <int N> constexpr int WIDE_STAGE = WIDE_STAGE_WEIGHTS + WIDE_PANELS * N * WIDE_COLUMNS * 2;
// Partial sums of 16 rows of a tile, by one block.
template <int N> constexpr int WIDE_FRAGMENT = 16 * N * 4;
// What a block is sent: 64 rows of each tile in all, shared out among the WIDE_CLUSTER blocks of the cluster, by each of them.
template <int N> constexpr int WIDE_SUMS = WIDE_TILES * (WIDE_TILE / 16) * WIDE_FRAGMENT<N>;
template <int N> constexpr int WIDE_SHARED_FIXED = 1024 + WIDE_SUMS<N> + N * 4;

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDA_ARCH__)

// Where a warp is in the ring of stages.
struct WideRing {
    uint32_t weights, input, empty, stages; // addresses of the barriers [n] and of the stages
    int n, stage_bytes;
    int slot = 0, parity = 0; // parity of weights and input; a fresh `empty` counts as complete
    __device__ __forceinline__ void next() {
        if (++slot == n) slot = 0, parity ^= 1;
    }
    __device__ __forceinline__ void wait_weights() const {
        mbarrier_wait(weights + 8 * slot, parity);
    }
    __device__ __forceinline__ void wait_full() const {
        mbarrier_wait(weights + 8 * slot, parity);
        mbarrier_wait(input + 8 * slot, parity);
    }
    __device__ __forceinline__ void wait_empty() const {
        mbarrier_wait(empty + 8 * slot, parity ^ 1);
    }
    __device__ __forceinline__ uint32_t stage() const {
        return stages + slot * stage_bytes;
    }
};

// What the warps of a block share: addresses in shared memory.
struct WideBlock {
    uint32_t sums;                  // [tile][fragment of 16 rows][block][column / 8][lane] of float4
    uint32_t sums_full, sums_empty; // barriers [tile], [tile][block]
    uint32_t ready;
    float *scale;          // [N]
    volatile int *started; // products whose input is there
    int rank;
};

// The tiles of a product that this cluster has.
struct WideTiles {
    int begin, end;
};
__device__ __forceinline__ WideTiles wide_tiles(const WideProduct &f) {
    int cluster = blockIdx.x / WIDE_CLUSTER, n = gridDim.x / WIDE_CLUSTER;
    return {f.tiles * cluster / n, f.tiles * (cluster + 1) / n};
}

// A pass: its tiles, what a panel of one takes, and how many panels fill a stage.
struct WidePass {
    int tiles, tile_bytes, panels;
};
__device__ __forceinline__ WidePass wide_pass(const WideProduct &f, int tile, int end) {
    int n = min(WIDE_TILES, end - tile), tile_bytes = f.tile_rows * WIDE_COLUMNS * 2;
    return {n, tile_bytes, min(WIDE_PANELS, WIDE_STAGE_WEIGHTS / (n * tile_bytes))};
}

// ---- producers ------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void wide_produce_weights(const WideParams &s, const WideBlock &block, WideRing ring) {
    const uint64_t policy = l2_evict_first();
    WideRing landed = ring;
    int in_flight = 0;
    for (int i = 0; i < s.n_products; i++) {
        const WideProduct &f = s.product[i];
        const WideTiles tiles = wide_tiles(f);
        const int part = f.cols / WIDE_CLUSTER, first = block.rank * part;
        for (int tile = tiles.begin; tile < tiles.end; tile += WIDE_TILES) {
            const WidePass pass = wide_pass(f, tile, tiles.end);
            for (int k = 0; k < part; k += pass.panels * WIDE_COLUMNS, ring.next()) {
                const uint32_t full = ring.weights + 8 * ring.slot;
                const int panels = min(pass.panels, (part - k) / WIDE_COLUMNS);
                uint32_t to = ring.stage();
                ring.wait_empty();
                for (; in_flight >= (*block.started > i ? WIDE_IN_FLIGHT : WIDE_AHEAD); in_flight--) {
                    landed.wait_weights();
                    landed.next();
                }
                in_flight++;
                mbarrier_arrive_expect_tx(full, panels * pass.tiles * pass.tile_bytes);
                for (int p = 0; p < panels; p++)
                    for (int t = 0; t < pass.tiles; t++, to += pass.tile_bytes)
                        copy_tensor_4d(to, &f.weights, first + k + p * WIDE_COLUMNS, 0, 0,
                                       (tile + t) * (f.tile_rows / 16), full, policy);
            }
        }
    }
}

template <int N>
__device__ __forceinline__ void wide_produce_input(const WideParams &s, const WideBlock &block, WideRing ring) {
    for (int i = 0; i < s.n_products; i++) {
        const WideProduct &f = s.product[i];
        const WideTiles tiles = wide_tiles(f);
        const int part = f.cols / WIDE_CLUSTER, first = block.rank * part;
        if (i > 0)
            while (load_acquire(s.done + i - 1) < gridDim.x) {
            }
        fence_proxy_async_global();
        *block.started = i + 1;
        mbarrier_arrive(block.ready);
        for (int tile = tiles.begin; tile < tiles.end; tile += WIDE_TILES) {
            const WidePass pass = wide_pass(f, tile, tiles.end);
            for (int k = 0; k < part; k += pass.panels * WIDE_COLUMNS, ring.next()) {
                const uint32_t full = ring.input + 8 * ring.slot, to = ring.stage() + WIDE_STAGE_WEIGHTS;
                const int panels = min(pass.panels, (part - k) / WIDE_COLUMNS);
                ring.wait_empty();
                mbarrier_arrive_expect_tx(full, panels * N * WIDE_COLUMNS * 2);
                for (int p = 0; p < panels; p++)
                    copy_tensor_2d(to + p * N * WIDE_COLUMNS * 2, &f.input, first + k + p * WIDE_COLUMNS, 0, full);
            }
        }
    }
}

// ---- consumers ------------------------------------------------------------------------------------------------------

template <int N>
__device__ __forceinline__ void wide_consume(const WideParams &s, const WideBlock &block, WideRing ring) {
    constexpr int FRAGMENTS = WIDE_TILE / 16 / WIDE_CLUSTER; // of a tile, for each block
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, own = warp / 4, fragment = warp % 4,
              to_rank = fragment / FRAGMENTS;
    const uint32_t sums = address_in_block(block.sums, to_rank) +
                          (own * FRAGMENTS + fragment % FRAGMENTS) * WIDE_CLUSTER * WIDE_FRAGMENT<N> +
                          block.rank * WIDE_FRAGMENT<N> + lane * 16,
                   sums_full = address_in_block(block.sums_full + 8 * own, to_rank),
                   sums_empty = block.sums_empty + 8 * (own * WIDE_CLUSTER + to_rank);
    int parity = 1; // of sums_empty: fresh, it counts as complete
    for (int i = 0; i < s.n_products; i++) {
        const WideProduct &f = s.product[i];
        const WideTiles tiles = wide_tiles(f);
        const int part = f.cols / WIDE_CLUSTER;
        for (int tile = tiles.begin; tile < tiles.end; tile += WIDE_TILES) {
            const WidePass pass = wide_pass(f, tile, tiles.end);
            const int step = pass.panels * WIDE_COLUMNS;
            if (own >= pass.tiles) { // the tiles that are left are other warpgroups'
                for (int k = 0; k < part; k += step, ring.next()) {
                    ring.wait_full();
                    if (lane == 0) mbarrier_arrive(ring.empty + 8 * ring.slot);
                }
                continue;
            }
            float acc[N / 2] = {};
            uint32_t before = 0, weights = 0, input = 0; // the empty barrier of the stage before; the panel's
            for (int k = 0, p = 0; k < part; k += WIDE_COLUMNS) {
                if (p == 0) {
                    ring.wait_full();
                    weights = ring.stage() + own * pass.tile_bytes;
                    input = ring.stage() + WIDE_STAGE_WEIGHTS;
                }
                uint64_t w = wgmma_operand(weights, 1024), in = wgmma_operand(input, 1024);
                wgmma_fence();
#pragma unroll
                for (int j = 0; j < WIDE_COLUMNS / 16; j++) wgmma_rows<N>(acc, w + 2 * j, in + 2 * j);
                wgmma_commit();
                wgmma_wait<1>(); // so what comes before this panel has been read
                if (p == 0 && k > 0 && lane == 0) mbarrier_arrive(before);
                before = ring.empty + 8 * ring.slot;
                weights += pass.tiles * pass.tile_bytes;
                input += N * WIDE_COLUMNS * 2;
                if (++p == pass.panels || k + WIDE_COLUMNS == part) {
                    ring.next();
                    p = 0;
                }
            }
            wgmma_wait<0>();
            wgmma_pin(acc);
            if (lane == 0) mbarrier_arrive(before);
            if (to_rank * FRAGMENTS * 16 >= f.tile_rows) continue; // the tile has no rows for that block
            mbarrier_wait_cluster(sums_empty, parity);
            parity ^= 1;
            if (fragment * 16 >= f.tile_rows) continue;
#pragma unroll
            for (int j = 0; j < N / 8; j++)
                store_async16(sums + j * 32 * 16,
                              make_float4(acc[4 * j], acc[4 * j + 1], acc[4 * j + 2], acc[4 * j + 3]), sums_full);
        }
    }
}

// ---- the epilogue ---------------------------------------------------------------------------------------------------

__device__ __forceinline__ void wide_epilogue_sync() {
    named_barrier_sync(BARRIER_WIDE_EPILOGUE, 32 * WIDE_EPILOGUE_WARPS);
}

// scale[token] = 1 / rms(x), from the squares of every 16 columns of x: a warp a token, lanes in steps of 32 × 4, then
// a tree.
__device__ __forceinline__ void wide_scales(const WideParams &s, float *scale, int warp, int lane) {
    const int n = s.dim / WIDE_SQUARES; // a multiple of 16 (wide_takes)
    for (int b = warp; b < s.n_rows; b += WIDE_EPILOGUE_WARPS) {
        float sum = 0;
        for (int i = 4 * lane; i < n; i += 128) {
            uint4 v = load_l2_16(s.squares + (size_t)b * n + i, true);
            sum += (__uint_as_float(v.x) + __uint_as_float(v.y)) + (__uint_as_float(v.z) + __uint_as_float(v.w));
        }
        sum = warp_sum(sum);
        if (lane == 0) scale[b] = 1.0f / sqrtf(sum / (float)s.dim + s.eps);
    }
}

// A thread of the epilogue finishes rows r and r + 8 of a fragment, of columns (tokens) 2t and 2t + 1 of every 8, t =
// lane % 4. Each of the two warps of a tile has one of the block's two fragments.
template <int N>
__device__ __forceinline__ void wide_epilogue(const WideParams &s, const WideBlock &block, const float4 *all_sums) {
    constexpr int FRAGMENTS = WIDE_TILE / 16 / WIDE_CLUSTER;
    static_assert(FRAGMENTS == 2, "two warps for each tile");
    constexpr int BLOCKS = N / 8; // of 8 columns
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 - WIDE_EPILOGUE_WARP, own = warp / 2;
    const int own_fragment = warp % 2, fragment = block.rank * FRAGMENTS + own_fragment;
    const int r = lane / 4, token = lane % 4 * 2;
    const float4 *sums = all_sums + (own * FRAGMENTS + own_fragment) * WIDE_CLUSTER * (N / 8) * 32 + lane;
    const uint32_t sums_full = block.sums_full + 8 * own;
    const uint32_t sums_empty =
        address_in_block(block.sums_empty + 8 * (own * WIDE_CLUSTER + block.rank), lane % WIDE_CLUSTER);
    int parity = 0;
    for (int i = 0; i < s.n_products; i++) {
        const WideProduct &f = s.product[i];
        const WideTiles tiles = wide_tiles(f);
        const WideKind kind = f.kind;
        const bool adds = kind == WIDE_OUT || kind == WIDE_DOWN;
        mbarrier_wait(block.ready, i & 1);
        if (!adds) {
            wide_scales(s, block.scale, warp, lane);
            wide_epilogue_sync();
        }
        // (A tile of fewer than 64 rows may have none for this block.)
        const int n_fragments = min(f.tile_rows / 16 - block.rank * FRAGMENTS, FRAGMENTS),
                  begin = n_fragments > 0 ? tiles.begin + own : tiles.end;
        const bool has_sums = own_fragment < n_fragments;
        for (int tile = begin; tile < tiles.end; tile += WIDE_TILES, parity ^= 1) {
            const int row = min(tile * f.tile_rows + fragment * 16 + r, f.rows - 16 + r); // and row + 8
            const int head = row / s.head_dim, d = row - head * s.head_dim;
            // What the sums meet, on its way while they are: x, or RoPE's cosines and sines.
            float other[BLOCKS][8];
            if (has_sums && (adds || (kind == WIDE_QKV && head < s.n_heads + s.n_kv_heads)))
#pragma unroll
                for (int j = 0; j < BLOCKS; j++)
#pragma unroll
                    for (int c = 0; c < 2; c++) {
                        const int b = min(token + 8 * j + c, s.n_rows - 1);
                        if (adds) {
                            other[j][c] = load_l2(s.x + (size_t)b * s.dim + row);
                            other[j][2 + c] = load_l2(s.x + (size_t)b * s.dim + row + 8);
                        } else {
                            const float2 *turns = s.rope + b * (s.head_dim / 2) + d / 2;
                            float2 lower = __ldg(turns), upper = __ldg(turns + 4);
                            other[j][4 * c] = lower.x, other[j][4 * c + 1] = lower.y;
                            other[j][4 * c + 2] = upper.x, other[j][4 * c + 3] = upper.y;
                        }
                    }
            float norm[2] = {adds ? __ldg(f.norm + row) : 0, adds ? __ldg(f.norm + row + 8) : 0};
            if (warp % 2 == 0 && lane == 0)
                mbarrier_arrive_expect_tx(sums_full, n_fragments * WIDE_CLUSTER * WIDE_FRAGMENT<N>);
            mbarrier_wait_cluster(sums_full, parity);
            float v[BLOCKS][4] = {};
            if (has_sums)
#pragma unroll
                for (int q = 0; q < WIDE_CLUSTER; q++)
#pragma unroll
                    for (int j = 0; j < BLOCKS; j++) {
                        float4 p = sums[(q * (N / 8) + j) * 32];
                        v[j][0] += p.x, v[j][1] += p.y, v[j][2] += p.z, v[j][3] += p.w;
                    }
            __syncwarp();
            if (lane < WIDE_CLUSTER) mbarrier_arrive_cluster(sums_empty);
            if (!has_sums || tile * f.tile_rows + fragment * 16 >= f.rows) continue;
            float squares[BLOCKS][2];
#pragma unroll
            for (int j = 0; j < BLOCKS; j++)
#pragma unroll
                for (int c = 0; c < 2; c++) { // a column: v[j][c] of row, v[j][2 + c] of row + 8
                    const int b = token + 8 * j + c;
                    const bool there = b < s.n_rows;
                    float lower = v[j][c], upper = v[j][2 + c];
                    if (adds) {
                        lower += other[j][c], upper += other[j][2 + c];
                        squares[j][c] = lower * lower + upper * upper;
                        if (there) {
                            size_t at = (size_t)b * s.dim + row;
                            s.x[at] = lower, s.x[at + 8] = upper;
                            s.in[at] = from_float<bf16>(lower * norm[0]);
                            s.in[at + 8] = from_float<bf16>(upper * norm[1]);
                        }
                        continue;
                    }
                    const float scale = there ? block.scale[b] : 0;
                    lower *= scale, upper *= scale;
                    if (kind == WIDE_GATE_UP) { // SwiGLU: rows of gate, and the same rows of up
                        if (there)
                            s.h[(size_t)b * s.hidden_dim + tile * (f.tile_rows / 2) + fragment * 8 + r] =
                                from_float<bf16>(lower / (1.0f + expf(-lower)) * upper);
                    } else if (kind == WIDE_QKV) {
                        // RoPE of queries and keys, by pairs of rows: (even + i odd) × (cosine + i sine)
                        float lower_pair = __shfl_xor_sync(~0u, lower, 4), upper_pair = __shfl_xor_sync(~0u, upper, 4);
                        if (head < s.n_heads + s.n_kv_heads) {
                            const float *turn = other[j] + 4 * c, sign = r % 2 ? 1 : -1;
                            lower = __fmaf_rn(sign * lower_pair, turn[1], __fmul_rn(lower, turn[0]));
                            upper = __fmaf_rn(sign * upper_pair, turn[3], __fmul_rn(upper, turn[2]));
                        }
                        bf16 *to = s.qkv + ((size_t)head * s.n_rows + b) * s.head_dim + d;
                        if (there) to[0] = from_float<bf16>(lower), to[8] = from_float<bf16>(upper);
                    } else if (there) {
                        float *logits = s.logits + (size_t)b * s.vocab_size + row;
                        logits[0] = lower, logits[8] = upper;
                    }
                }
            if (!adds) continue;
#pragma unroll
            for (int j = 0; j < BLOCKS; j++)
#pragma unroll
                for (int c = 0; c < 2; c++) { // the squares of the 16 rows, over the 8 lanes of a column
                    const int b = token + 8 * j + c;
                    float sum = squares[j][c];
                    for (int step = 4; step < 32; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
                    if (r == 0 && b < s.n_rows)
                        s.squares[(size_t)b * (s.dim / WIDE_SQUARES) +
                                  (tile * f.tile_rows + fragment * 16) / WIDE_SQUARES] = sum;
                }
        }
        fence_proxy_async_global();
        wide_epilogue_sync();
        if (warp == 0 && lane == 0 && i + 1 < s.n_products) reduce_add_release(s.done + i, 1);
    }
}

// Computes: the matrix products between two attentions, one after another, with what is around them: RMSNorm, residual
//           sums, SwiGLU, RoPE.
// Reads:    weights and activations bf16, x, rope; shapes in WideParams, who orders what in wide.h.
// Writes:   x, in, squares, h, qkv, logits, done.
// Grid:     clusters of WIDE_CLUSTER × 640 threads, all resident at once.
// Requires: done = 0; cols a multiple of 64 WIDE_CLUSTER, rows and head_dim of 16; n_rows <= N.
template <int N>
__global__ void __cluster_dims__(WIDE_CLUSTER, 1, 1) __launch_bounds__(WIDE_THREADS, 1)
    wide_products_kernel(const __grid_constant__ WideParams s) {
    extern __shared__ __align__(1024) char dynamic[];
    __shared__ int started;
    __shared__ uint64_t barriers[3 * WIDE_MAX_STAGES + WIDE_TILES + WIDE_TILES * WIDE_CLUSTER + 1];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const uint32_t base = (shared_address(dynamic) + 1023) & ~1023u, first = shared_address(barriers);
    const uint32_t offset = base - shared_address(dynamic) + s.n_stages * WIDE_STAGE<N>;
    WideRing ring = {first, first + 8 * WIDE_MAX_STAGES, first + 16 * WIDE_MAX_STAGES, base, s.n_stages, WIDE_STAGE<N>};
    WideBlock block;
    block.sums = shared_address(dynamic) + offset;
    block.sums_full = first + 24 * WIDE_MAX_STAGES;
    block.sums_empty = block.sums_full + 8 * WIDE_TILES;
    block.ready = block.sums_empty + 8 * WIDE_TILES * WIDE_CLUSTER;
    block.scale = (float *)(dynamic + offset + WIDE_SUMS<N>);
    block.started = &started;
    block.rank = rank_in_cluster();
    if (threadIdx.x == 0) {
        for (int i = 0; i < s.n_stages; i++) {
            mbarrier_init(ring.weights + 8 * i, 1);
            mbarrier_init(ring.input + 8 * i, 1);
            mbarrier_init(ring.empty + 8 * i, 4 * WIDE_TILES);
        }
        for (int i = 0; i < WIDE_TILES; i++) mbarrier_init(block.sums_full + 8 * i, 1);
        for (int i = 0; i < WIDE_TILES * WIDE_CLUSTER; i++) mbarrier_init(block.sums_empty + 8 * i, 2);
        mbarrier_init(block.ready, 1);
        started = 0;
        fence_mbarrier_init();
    }
    __syncthreads();
    cluster_arrive();
    if (warp == WIDE_WEIGHTS_WARP) { // waits for nobody: its barriers are this block's
        if (lane == 0) wide_produce_weights(s, block, ring);
        __syncwarp();
        cluster_wait();
    } else {
        cluster_wait();
        if (warp == WIDE_INPUT_WARP) {
            wait_for_previous_kernel();
            let_next_kernel_start(); // not before: attention relies on it (AttentionArgs.kv_stable)
            if (lane == 0) wide_produce_input<N>(s, block, ring);
            __syncwarp();
        } else if (warp >= WIDE_EPILOGUE_WARP) {
            wait_for_previous_kernel();
            wide_epilogue<N>(s, block, (const float4 *)(dynamic + offset));
        } else
            wide_consume<N>(s, block, ring);
    }
    // Others may still send to this block's shared memory, or count at its barriers.
    __syncwarp();
    cluster_arrive_release();
    cluster_wait();
}

#else

// In code for other GPUs, without launch bounds: wide.cu knows it by that, and never launches it.
template <int N> __global__ void wide_products_kernel(const __grid_constant__ WideParams s) {
}

#endif

// Computes: what a step begins with: the embedding of each token, what the first product needs of it, and the RoPE
//           table of its position; the counters at zero.
// Reads:    table [vocab][dim] bf16, norm [dim], tokens, pos [n_rows], freq [half].
// Writes:   x, in [n_rows][dim], squares [n_rows][dim / WIDE_SQUARES], rope [n_rows][half], done [n_done].
// Grid:     n_rows × 256 threads; a block owns a token.
// Requires: launched without PDL: the kernels before are complete.
template <typename W>
__global__ void wide_embed_kernel(float *x, bf16 *in, float *squares, const W *table, const float *norm,
                                  const int *tokens, int dim, float2 *rope, const int *pos, const float *freq, int half,
                                  unsigned *done, int n_done) {
    __shared__ float sums[8];
    let_next_kernel_start();
    const size_t at = (size_t)blockIdx.x * dim;
    const W *from = table + (size_t)tokens[blockIdx.x] * dim;
    float sum = 0;
    for (int i = threadIdx.x; i < dim; i += 256) {
        float v = to_float(from[i]);
        x[at + i] = v;
        in[at + i] = from_float<bf16>(v * norm[i]);
        sum += v * v;
    }
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
    __syncthreads();
    for (int i = threadIdx.x, n = dim / WIDE_SQUARES; i < n; i += 256) { // (the first stands for all)
        float all = 0;
        for (int w = 0; w < 8; w++) all += sums[w];
        squares[(size_t)blockIdx.x * n + i] = i == 0 ? all : 0;
    }
    for (int i = threadIdx.x; i < half; i += 256)
        rope[(size_t)blockIdx.x * half + i] = rope_angle(pos[blockIdx.x], freq[i]);
    if (blockIdx.x == 0)
        for (int i = threadIdx.x; i < n_done; i += 256) done[i] = 0;
}

} // namespace
