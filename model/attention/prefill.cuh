// Prefill attention, any number of new tokens per sequence: the parameters, and the kernel that appends new K and V to
// the cache.
//
// A block owns a tile of query rows of one head and walks over the keys with an online softmax; tiles that causality
// hides entirely are never visited. The lengths arrive as kernel parameters, so one launch serves a ragged batch
// without a copy; larger batches take several launches. Tiles and their order: prefill_plan.h.
#pragma once

#include "cache.cuh"
#include "prefill_plan.h"

struct PrefillParams {
    const void *q;
    void *out;                 // [token][head][D]
    const void *k_new, *v_new; // [token][kv head][D]
    int64_t q_token_stride, q_head_stride, out_token_stride, out_head_stride;
    int64_t k_token_stride, k_head_stride, v_token_stride, v_head_stride;
    Cache<char> cache;
    int n_heads, heads_per_kv, causal;
    int n_tiles; // query tiles of all sequences and heads
    float scale_log2;
};

// Computes: the append of new K and V to the cache.
// Reads:    k_new and v_new [token][kv head][D], rows of row_bytes.
// Writes:   the cache rows seq_len .. seq_len + n_new - 1 of each sequence.
// Grid:     tokens × 128 threads; a block owns a token, a thread copies 16 bytes of any head at a time.
// Requires: 16-byte rows, room in the cache.
__global__ void __launch_bounds__(128)
    prefill_append_kernel(const __grid_constant__ PrefillParams p, const __grid_constant__ PrefillBatch b,
                          int element_bytes) {
    int token = b.q_start[0] + blockIdx.x, low = 0, high = b.n_seq - 1;
    while (low < high) { // the last sequence that starts at or before the token
        int mid = (low + high + 1) / 2;
        if (b.q_start[mid] <= token)
            low = mid;
        else
            high = mid - 1;
    }
    int pos = b.seq_len[low] + token - b.q_start[low], vectors = p.cache.head_dim * element_bytes / 16;
    int own_row = table_row(p.cache, b.first_seq + low);
    for (int i = threadIdx.x; i < p.cache.n_kv_heads * vectors; i += blockDim.x) {
        int head = i / vectors, vector = i % vectors;
        size_t row = cache_row(p.cache, own_row, head, pos) * element_bytes;
        const char *k = (const char *)p.k_new + (token * p.k_token_stride + head * p.k_head_stride) * element_bytes;
        const char *v = (const char *)p.v_new + (token * p.v_token_stride + head * p.v_head_stride) * element_bytes;
        ((uint4 *)(p.cache.k + row))[vector] = ((const uint4 *)k)[vector];
        ((uint4 *)(p.cache.v + row))[vector] = ((const uint4 *)v)[vector];
    }
}
