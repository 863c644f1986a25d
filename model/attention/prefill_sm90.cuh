// Prefill attention on Hopper. The tensor memory accelerator (TMA) brings tiles to shared memory, wgmma multiplies them
// from there.
#pragma once

#include <cuda.h> // types of tensor maps only; the one driver function is found at run time

#include "prefill.cuh"

// A tile in shared memory: panels of 64 columns, [panel][row][64], 128 bytes per row, whose eight 16-byte chunks are
// permuted by the row (what TMA and wgmma call the 128-byte swizzle). head_dim 96 takes two panels, the rest zero.
constexpr int PANEL_BYTES = 128 * 128;
template <int D> __host__ __device__ constexpr int sm90_panels() {
    return (D + 63) / 64;
}
template <int D> __host__ __device__ constexpr int sm90_tile_bytes() {
    return sm90_panels<D>() * PANEL_BYTES;
}
// 1024: alignment.
template <int D> constexpr size_t sm90_smem_bytes() {
    return 1024 + (1 + 2 * SM90_STAGES) * sm90_tile_bytes<D>() + 128;
}

struct TensorMaps {
    CUtensorMap q, k, v;
};

static_assert(sm90_smem_bytes<128>() <= 227 * 1024, "shared memory of a block on Hopper");
static_assert(sizeof(PrefillParams) + sizeof(PrefillBatch) + sizeof(TensorMaps) + 128 <= 4096,
              "parameters of a kernel");
static_assert(SM90_ROWS == SM90_WARPGROUPS * 64 && SM90_KEYS == 128, "wgmma: 64 rows a warpgroup, 128 keys");

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDA_ARCH__)

// One warp of the block fills the ring, with K a tile ahead of V, in the order in which the stages become empty. What
// is between an empty stage and its copies has to be short: a tile takes little longer than its way through L2.

// Where a lane's box of a tile is: from row y of a head's part of a block of the cache, number z.
struct TileBox {
    int y, z;
};
template <typename T>
__device__ __forceinline__ TileBox sm90_box(const Cache<T> &cache, int own_row, int kv_head, int pos) {
    int block = own_row;
    if (cache.table) {
        const int i = pos / cache.block_size;
        block = load_l2(cache.table + (size_t)own_row * cache.table_width + i);
        pos -= i * cache.block_size;
    }
    return {pos, block * cache.n_kv_heads + kv_head};
}
// K or V rows of one KV head to `dst`, in so many boxes: each lane's own. A box is box_bytes of a panel.
template <int D>
__device__ __forceinline__ void sm90_load_tile(const CUtensorMap *map, TileBox box, int boxes, int box_bytes,
                                               uint32_t dst, uint32_t full, int lane) {
    if (lane == 0) mbarrier_arrive_expect_tx(full, sm90_panels<D>() * boxes * box_bytes);
    __syncwarp();
    if (lane < boxes)
#pragma unroll
        for (int panel = 0; panel < sm90_panels<D>(); panel++)
            copy_tensor_3d(dst + panel * PANEL_BYTES + lane * box_bytes, map, panel * 64, box.y, box.z, full);
}
// Of a tile of V whose rows from n_rows on count for nothing, these as zeros, as 0 x NaN would be NaN; once it has
// landed. (Scores of such keys are not read.)
template <int D> __device__ __forceinline__ void sm90_clear_rows(uint32_t tile, int n_rows, int lane) {
#pragma unroll
    for (int panel = 0; panel < sm90_panels<D>(); panel++)
        for (int i = n_rows * 8 + lane; i < SM90_KEYS * 8; i += 32)
            store_shared16(tile + panel * PANEL_BYTES + i * 16, make_uint4(0, 0, 0, 0));
    fence_proxy_async(); // ordinary writes, which wgmma reads next
    __syncwarp();
}

// Scores of one tile to weights, in place: 2^(s * scale - m). Updates the rows' maxima m (of unscaled scores) and this
// thread's sums l, and returns in alpha what the output so far must be multiplied by. n_keys: keys of this tile that
// the thread's two rows attend to; read only if masked.
template <bool MASKED>
__device__ __forceinline__ void sm90_softmax(float (&s)[64], float (&m)[2], float (&l)[2], float (&alpha)[2],
                                             const int (&n_keys)[2], float scale_log2, int t) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float top = m[r];
#pragma unroll
        for (int n = 0; n < 16; n++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float &x = s[4 * n + 2 * r + i];
                if (MASKED && n * 8 + 2 * t + i >= n_keys[r]) x = -INFINITY;
                top = fmaxf(top, x);
            }
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
        // Finite: every row attends to key 0, which is in the first tile.
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
        alpha[r] = exp2_fast((m[r] - top) * scale_log2);
        m[r] = top;
        float base = top * scale_log2, sum = 0.0f;
#pragma unroll
        for (int n = 0; n < 16; n++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float &x = s[4 * n + 2 * r + i];
                x = exp2_fast(fmaf(x, scale_log2, -base));
                sum += x;
            }
        l[r] = l[r] * alpha[r] + sum;
    }
}

// Computes: attention of 128 query rows of one head to the cache, 16-bit, on Hopper.
// Reads:    q [token][head][D] T; K and V from the cache [block][kv head][position][D] T; through TMA, in tiles of 128.
// Writes:   out [token][head][D] T.
// Grid:     SMs × 384 threads; a block takes items (query tile, head) in turn. Warp 0 fills the ring of K and V tiles;
//           warpgroups 1 and 2 own 64 rows each: the softmax of one tile runs beside the products of the last.
// Requires: as prefill_sm80_kernel; tensor maps for boxes of 64 columns x 128 rows (K and V: box_rows rows).
template <typename T, int D>
__global__ void __launch_bounds__(SM90_THREADS, 1)
    prefill_sm90_kernel(const __grid_constant__ PrefillParams p, const __grid_constant__ PrefillBatch b,
                        const __grid_constant__ TensorMaps maps, int box_rows) {
    constexpr int TILE_BYTES = sm90_tile_bytes<D>();
    extern __shared__ char smem_raw[];
    uint32_t q_tile = (shared_address(smem_raw) + 1023) & ~1023u, k_tiles = q_tile + TILE_BYTES,
             v_tiles = k_tiles + SM90_STAGES * TILE_BYTES;
    // A tile is full (it has landed) or empty (all eight warps have used it); each state is a barrier of 8 bytes.
    uint32_t q_full = v_tiles + SM90_STAGES * TILE_BYTES, q_empty = q_full + 8, k_full = q_empty + 8,
             k_empty = k_full + 8 * SM90_STAGES, v_full = k_empty + 8 * SM90_STAGES, v_empty = v_full + 8 * SM90_STAGES,
             landed = v_empty + 8 * SM90_STAGES; // a tile of V in which a sequence ends, before it is full
    int warpgroup = threadIdx.x / 128, lane = threadIdx.x & 31;
    if (threadIdx.x == 0) {
        mbarrier_init(q_full, 1);
        mbarrier_init(q_empty, SM90_WARPGROUPS * 4);
        mbarrier_init(landed, 1);
        for (int i = 0; i < SM90_STAGES; i++) {
            mbarrier_init(k_full + 8 * i, 1);
            mbarrier_init(v_full + 8 * i, 1);
            mbarrier_init(k_empty + 8 * i, SM90_WARPGROUPS * 4);
            mbarrier_init(v_empty + 8 * i, SM90_WARPGROUPS * 4);
        }
        fence_mbarrier_init();
    }
    __syncthreads(); // the barriers exist
    wait_for_previous_kernel();
    let_next_kernel_start();
    int n_items = 0; // items so far

    if (warpgroup == 0) {
        decrease_registers<40>();
        if (threadIdx.x >= 32) return;
        const Cache<T> &cache = (const Cache<T> &)p.cache;
        int n = 0, n_ends = 0; // K/V tiles so far, and those in which a sequence ends
        const int box_log2 = 31 - __clz(box_rows);
        for (int round = 0; round * (int)gridDim.x < p.n_tiles; round++) {
            int item = sm90_item(round, blockIdx.x, gridDim.x);
            if (item >= p.n_tiles) continue;
            PrefillTile tile = prefill_tile(&b, p.n_heads, SM90_ROWS, item);
            int kv_head = tile.head / p.heads_per_kv, total = tile.seq_len + tile.n_rows;
            int own_row = table_row(cache, b.first_seq + tile.seq);
            int end = p.causal ? tile.seq_len + min(tile.row0 + SM90_ROWS, tile.n_rows) : total;
            mbarrier_wait(q_empty, (n_items & 1) ^ 1);
            n_items++;
            if (lane == 0) {
                mbarrier_arrive_expect_tx(q_full, TILE_BYTES);
                for (int panel = 0; panel < sm90_panels<D>(); panel++)
                    copy_tensor_3d(q_tile + panel * PANEL_BYTES, &maps.q, panel * 64, tile.head,
                                   b.q_start[tile.seq] + tile.row0, q_full);
            }
            // All boxes' places at once: one after another they would take longer than a product. What is after `total`
            // is memory that nobody wrote: boxes of that alone are not copied.
            auto box_of = [&](int base) {
                return sm90_box(cache, own_row, kv_head, min(base + lane * box_rows, total - 1));
            };
            auto boxes_of = [&](int base) { return (min(total - base, SM90_KEYS) + box_rows - 1) >> box_log2; };
            auto load_k = [&](int base, int n, TileBox box) {
                const int stage = n % SM90_STAGES, boxes = boxes_of(base);
                mbarrier_wait(k_empty + 8 * stage, (n / SM90_STAGES & 1) ^ 1); // a fresh barrier counts as empty
                sm90_load_tile<D>(&maps.k, box, boxes, box_rows * 128, k_tiles + stage * TILE_BYTES, k_full + 8 * stage,
                                  lane);
            };
            TileBox box = box_of(0), next = box;
            load_k(0, n, box);
            for (int base = 0; base < end; base += SM90_KEYS, n++, box = next) {
                const int stage = n % SM90_STAGES, boxes = boxes_of(base);
                const uint32_t v_tile = v_tiles + stage * TILE_BYTES;
                const bool ends = base + SM90_KEYS > total;
                if (base + SM90_KEYS < end) {
                    next = box_of(base + SM90_KEYS);
                    load_k(base + SM90_KEYS, n + 1, next);
                }
                mbarrier_wait(v_empty + 8 * stage, (n / SM90_STAGES & 1) ^ 1);
                sm90_load_tile<D>(&maps.v, box, boxes, box_rows * 128, v_tile, ends ? landed : v_full + 8 * stage,
                                  lane);
                if (!ends) continue;
                mbarrier_wait(landed, n_ends++ & 1);
                sm90_clear_rows<D>(v_tile, total - base, lane);
                if (lane == 0) mbarrier_arrive(v_full + 8 * stage);
            }
        }
    } else {
        increase_registers<232>();
        int half = warpgroup - 1, warp = threadIdx.x / 32 & 3, g = lane >> 2, t = lane & 3;
        uint64_t q_operand = wgmma_operand(q_tile + half * 64 * 128, PANEL_BYTES);
        auto qk = [&](float(&s)[64], int stage) { // starts s = Q K^T
            uint64_t k_operand = wgmma_operand(k_tiles + stage * TILE_BYTES, PANEL_BYTES);
            wgmma_fence();
#pragma unroll
            // 16 dims are 32 bytes; four steps to a panel. Operands count 16 bytes.
            for (int d = 0; d < D / 16; d++) {
                int step = d / 4 * (PANEL_BYTES >> 4) + d % 4 * 2;
                wgmma_product<T, 128>(s, q_operand + step, k_operand + step, d > 0);
            }
            wgmma_commit();
        };
        float o[D / 2], m[2], l[2];
        uint32_t w[32];            // the weights of one tile, in the layout of the second product's left operand
        auto pv = [&](int stage) { // starts O += P V
            uint64_t v_operand = wgmma_operand(v_tiles + stage * TILE_BYTES, PANEL_BYTES);
            wgmma_fence();
#pragma unroll
            for (int i = 0; i < SM90_KEYS / 16; i++) wgmma_pv<T, D>(o, w + 4 * i, v_operand + i * (16 * 128 >> 4));
            wgmma_commit();
        };
        auto release = [&](uint32_t barrier) {
            if (lane == 0) mbarrier_arrive(barrier);
        };
        // The two warpgroups take turns at the tensor cores, so that the softmax of one runs beside the products of the
        // other.
        auto my_turn = [&] { named_barrier_sync((NamedBarrier)(BARRIER_PREFILL_TURN_0 + half), 256); };
        auto your_turn = [&] { named_barrier_arrive((NamedBarrier)(BARRIER_PREFILL_TURN_1 - half), 256); };
        if (half == 1) your_turn(); // warpgroup 1 goes first

        int n = 0;
        for (int round = 0; round * (int)gridDim.x < p.n_tiles; round++) {
            int item = sm90_item(round, blockIdx.x, gridDim.x);
            if (item >= p.n_tiles) continue;
            PrefillTile tile = prefill_tile(&b, p.n_heads, SM90_ROWS, item);
            int total = tile.seq_len + tile.n_rows, row0 = tile.row0 + half * 64;
            int end = p.causal ? tile.seq_len + min(tile.row0 + SM90_ROWS, tile.n_rows) : total;
            int n_kv = (end + SM90_KEYS - 1) / SM90_KEYS;
            int all_keys = p.causal ? min(tile.seq_len + row0 + 1, total) : total; // keys that every row attends to
            int row_keys[2];
#pragma unroll
            for (int r = 0; r < 2; r++)
                row_keys[r] = p.causal ? min(tile.seq_len + row0 + warp * 16 + g + 8 * r + 1, end) : total;
            bool exact =
                std::is_same<T, bf16>::value && (p.causal ? tile.seq_len + tile.row0 + 1 : total) < PREFILL_EXACT_BELOW;
#pragma unroll
            for (int i = 0; i < D / 2; i++) o[i] = 0.0f;
            m[0] = m[1] = -INFINITY;
            l[0] = l[1] = 0.0f;
            float s[64], alpha[2];
            auto softmax = [&](int j) {
                int base = j * SM90_KEYS, n_keys[2] = {row_keys[0] - base, row_keys[1] - base};
                if (base + SM90_KEYS > all_keys)
                    sm90_softmax<true>(s, m, l, alpha, n_keys, p.scale_log2, t);
                else
                    sm90_softmax<false>(s, m, l, alpha, n_keys, p.scale_log2, t);
            };
            auto rescale = [&] {
#pragma unroll
                for (int i = 0; i < D / 2; i++) o[i] *= alpha[i >> 1 & 1];
            };
            auto pack = [&] {
#pragma unroll
                for (int i = 0; i < 32; i++) w[i] = pack2<T>(s[2 * i], s[2 * i + 1]);
            };

            mbarrier_wait(q_full, n_items & 1);
            n_items++;
            if (exact) { // rows with few keys: P = hi + lo, one thing after the other; rows with more: lo is 0
                for (int j = 0; j < n_kv; j++, n++) {
                    int stage = n % SM90_STAGES, parity = n / SM90_STAGES & 1;
                    mbarrier_wait(k_full + 8 * stage, parity);
                    qk(s, stage);
                    wgmma_wait<0>();
                    wgmma_pin(s);
                    release(k_empty + 8 * stage);
                    if (j == n_kv - 1) release(q_empty);
                    softmax(j);
                    rescale();
                    mbarrier_wait(v_full + 8 * stage, parity);
                    uint32_t rest[32];
#pragma unroll
                    for (int i = 0; i < 32; i++) {
                        rest[i] = pack2<T>(s[2 * i], s[2 * i + 1]);
                        w[i] =
                            row_keys[i & 1] < PREFILL_EXACT_BELOW ? pack2_rest<T>(s[2 * i], s[2 * i + 1], rest[i]) : 0;
                    }
                    pv(stage);
                    wgmma_wait<0>();
                    wgmma_pin(o);
#pragma unroll
                    for (int i = 0; i < 32; i++) w[i] = rest[i];
                    pv(stage);
                    wgmma_wait<0>();
                    wgmma_pin(o);
                    release(v_empty + 8 * stage);
                }
            } else {
                mbarrier_wait(k_full + 8 * (n % SM90_STAGES), n / SM90_STAGES & 1);
                my_turn();
                qk(s, n % SM90_STAGES);
                your_turn();
                wgmma_wait<0>();
                wgmma_pin(s);
                release(k_empty + 8 * (n % SM90_STAGES));
                softmax(0);
                pack();
                for (int j = 1; j < n_kv; j++, n++) { // scores of tile j beside the output of tile j - 1
                    int stage = n % SM90_STAGES, parity = n / SM90_STAGES & 1, next = (n + 1) % SM90_STAGES,
                        next_parity = (n + 1) / SM90_STAGES & 1;
                    mbarrier_wait(k_full + 8 * next, next_parity);
                    my_turn();
                    qk(s, next);
                    mbarrier_wait(v_full + 8 * stage, parity);
                    pv(stage);
                    your_turn();
                    wgmma_wait<1>();
                    wgmma_pin(s);
                    release(k_empty + 8 * next);
                    softmax(j);
                    wgmma_wait<0>();
                    wgmma_pin(o);
                    release(v_empty + 8 * stage);
                    rescale();
                    pack();
                }
                release(q_empty);
                int stage = n % SM90_STAGES, parity = n / SM90_STAGES & 1;
                mbarrier_wait(v_full + 8 * stage, parity);
                pv(stage);
                wgmma_wait<0>();
                wgmma_pin(o);
                release(v_empty + 8 * stage);
                n++;
            }

#pragma unroll
            for (int r = 0; r < 2; r++) {
                l[r] += __shfl_xor_sync(~0u, l[r], 1);
                l[r] += __shfl_xor_sync(~0u, l[r], 2);
                int row = row0 + warp * 16 + g + 8 * r;
                if (row >= tile.n_rows) continue;
                T *out = (T *)p.out + (b.q_start[tile.seq] + row) * p.out_token_stride + tile.head * p.out_head_stride;
                float inverse = 1.0f / l[r];
#pragma unroll
                for (int i = 0; i < D / 8; i++)
                    *(uint32_t *)(out + i * 8 + 2 * t) =
                        pack2<T>(o[4 * i + 2 * r] * inverse, o[4 * i + 2 * r + 1] * inverse);
            }
        }
        if (half == 0) my_turn(); // takes up warpgroup 2's last arrival: a barrier must end where it began
    }
}
#else
// Never launched.
template <typename T, int D>
__global__ void prefill_sm90_kernel(const __grid_constant__ PrefillParams p, const __grid_constant__ PrefillBatch b,
                                    const __grid_constant__ TensorMaps maps, int box_rows) {
}
#endif
