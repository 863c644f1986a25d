// Prefill attention with 16-bit types on any GPU since sm_80, with mma.sync and cp.async.
#pragma once

#include "prefill.cuh"

template <typename T, int D> constexpr size_t prefill_sm80_smem_bytes() {
    return (size_t)(SM80_ROWS + 4 * SM80_KEYS) * D * sizeof(T);
}
static_assert(prefill_sm80_smem_bytes<f16, 128>() <= 99 * 1024, "a block of any GPU since sm_80 may have that");

// Computes: attention of 64 query rows of one head to the cache, 16-bit, on any GPU since sm_80 (mma.sync, cp.async).
// Reads:    q [token][head][D] T; K and V from the cache [block][kv head][position][D] T.
// Writes:   out [token][head][D] T.
// Grid:     (query tiles × heads) × 128 threads; a warp owns 16 rows, all threads load K and V tiles of 64 keys.
// Requires: the new K and V in the cache, head_dim = D, 16-byte rows, scale > 0; shared memory for Q, two tile pairs.
template <typename T, int D>
__global__ void __launch_bounds__(128)
    prefill_sm80_kernel(const __grid_constant__ PrefillParams p, const __grid_constant__ PrefillBatch b) {
    constexpr int CHUNKS = D / 8, TILE_BYTES = SM80_KEYS * D * (int)sizeof(T);
    extern __shared__ __align__(1024) char smem[];
    const Cache<T> &cache = (const Cache<T> &)p.cache;
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    PrefillTile tile = prefill_tile(&b, p.n_heads, SM80_ROWS, blockIdx.x);
    int kv_head = tile.head / p.heads_per_kv, total = tile.seq_len + tile.n_rows;
    int own_row = table_row(cache, b.first_seq + tile.seq);
    // Keys that some row attends to, and those that every row does.
    int end = p.causal ? tile.seq_len + min(tile.row0 + SM80_ROWS, tile.n_rows) : total;
    int first_keys = p.causal ? tile.seq_len + tile.row0 + 1 : total;
    bool exact = std::is_same<T, bf16>::value && first_keys < PREFILL_EXACT_BELOW, row_exact[2];
#pragma unroll
    for (int r = 0; r < 2; r++)
        row_exact[r] = (p.causal ? tile.seq_len + tile.row0 + warp * 16 + g + 8 * r + 1 : total) < PREFILL_EXACT_BELOW;
    uint32_t q_tile = shared_address(smem), kv_tiles = q_tile + SM80_ROWS * D * sizeof(T); // then (K, V), (K, V)

    const T *q = (const T *)p.q + b.q_start[tile.seq] * p.q_token_stride + tile.head * p.q_head_stride;
    for (int i = threadIdx.x; i < SM80_ROWS * CHUNKS; i += 128) {
        int row = i / CHUNKS, chunk = i % CHUNKS;
        bool valid = tile.row0 + row < tile.n_rows;
        copy_async16(q_tile + tile_offset<T, D>(row, chunk),
                     q + (valid ? tile.row0 + row : 0) * p.q_token_stride + chunk * 8, valid);
    }
    auto load = [&](int j) {
        if (j * SM80_KEYS < end)
            for (int i = threadIdx.x; i < SM80_KEYS * CHUNKS; i += 128) {
                int row = i / CHUNKS, chunk = i % CHUNKS, pos = j * SM80_KEYS + row;
                bool valid = pos < end; // after it is memory that nobody wrote: zeros, as 0 x NaN would be NaN
                size_t offset = cache_row(cache, own_row, kv_head, valid ? pos : 0) + chunk * 8;
                uint32_t dst = kv_tiles + (j & 1) * 2 * TILE_BYTES + tile_offset<T, D>(row, chunk);
                copy_async16(dst, cache.k + offset, valid);
                copy_async16(dst + TILE_BYTES, cache.v + offset, valid);
            }
        copy_async_commit();
    };
    load(0);

    uint32_t qf[D / 16][4];
    float o[D / 8][4] = {}, m[2] = {-INFINITY, -INFINITY}, l[2] = {}; // rows g and g + 8 of the warp's 16
    for (int j = 0; j * SM80_KEYS < end; j++) {
        load(j + 1);
        copy_async_wait<1>();
        __syncthreads(); // everyone's copies of tile j (and of Q) have landed
        if (j == 0)
#pragma unroll
            for (int d = 0; d < D / 16; d++)
                load_matrix4(qf[d], q_tile + tile_offset<T, D>(warp * 16 + (lane & 15), d * 2 + (lane >> 4)));
        uint32_t k_tile = kv_tiles + (j & 1) * 2 * TILE_BYTES, v_tile = k_tile + TILE_BYTES;

        float s[SM80_KEYS / 8][4] = {};
#pragma unroll
        for (int d = 0; d < D / 16; d++)
#pragma unroll
            for (int n = 0; n < SM80_KEYS / 16; n++) {
                uint32_t k[4];
                load_matrix4(
                    k, k_tile + tile_offset<T, D>(n * 16 + (lane >> 4) * 8 + (lane & 7), d * 2 + ((lane >> 3) & 1)));
                mma_16x8x16<T>(s[2 * n], qf[d], k[0], k[1]);
                mma_16x8x16<T>(s[2 * n + 1], qf[d], k[2], k[3]);
            }

        float alpha[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            int row = tile.row0 + warp * 16 + g + 8 * r,
                n_keys = (p.causal ? min(tile.seq_len + row + 1, end) : end) - j * SM80_KEYS;
            float top = -INFINITY;
#pragma unroll
            for (int n = 0; n < SM80_KEYS / 8; n++)
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    float &x = s[n][2 * r + i];
                    x = n * 8 + 2 * t + i < n_keys ? x * p.scale_log2 : -INFINITY;
                    top = fmaxf(top, x);
                }
            top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
            top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
            top = fmaxf(top, m[r]); // finite: every row attends to key 0
            alpha[r] = exp2_fast(m[r] - top);
            m[r] = top;
            l[r] *= alpha[r];
#pragma unroll
            for (int n = 0; n < SM80_KEYS / 8; n++)
#pragma unroll
                for (int i = 0; i < 2; i++) l[r] += s[n][2 * r + i] = exp2_fast(s[n][2 * r + i] - top);
        }
#pragma unroll
        for (int d = 0; d < D / 8; d++) {
            o[d][0] *= alpha[0];
            o[d][1] *= alpha[0];
            o[d][2] *= alpha[1];
            o[d][3] *= alpha[1];
        }
#pragma unroll
        for (int n = 0; n < SM80_KEYS / 16; n++) { // the scores' layout is that of the second product's left operand
            uint32_t hi[4], lo[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float x = s[2 * n + (i >> 1)][2 * (i & 1)], y = s[2 * n + (i >> 1)][2 * (i & 1) + 1];
                hi[i] = pack2<T>(x, y);
                lo[i] = row_exact[i & 1] ? pack2_rest<T>(x, y, hi[i]) : 0;
            }
#pragma unroll
            for (int d = 0; d < D / 16; d++) {
                uint32_t v[4];
                load_matrix4_transposed(
                    v, v_tile + tile_offset<T, D>(n * 16 + ((lane >> 3) & 1) * 8 + (lane & 7), d * 2 + (lane >> 4)));
                if (exact) {
                    mma_16x8x16<T>(o[2 * d], lo, v[0], v[1]);
                    mma_16x8x16<T>(o[2 * d + 1], lo, v[2], v[3]);
                }
                mma_16x8x16<T>(o[2 * d], hi, v[0], v[1]);
                mma_16x8x16<T>(o[2 * d + 1], hi, v[2], v[3]);
            }
        }
        __syncthreads(); // everyone has read tile j before its place is filled again
    }

#pragma unroll
    for (int r = 0; r < 2; r++) {
        l[r] += __shfl_xor_sync(~0u, l[r], 1);
        l[r] += __shfl_xor_sync(~0u, l[r], 2);
        int row = tile.row0 + warp * 16 + g + 8 * r;
        if (row >= tile.n_rows) continue;
        T *out = (T *)p.out + (b.q_start[tile.seq] + row) * p.out_token_stride + tile.head * p.out_head_stride;
        float inverse = 1.0f / l[r];
#pragma unroll
        for (int d = 0; d < D / 8; d++)
            *(uint32_t *)(out + d * 8 + 2 * t) = pack2<T>(o[d][2 * r] * inverse, o[d][2 * r + 1] * inverse);
    }
}
