// What the prefill kernels share: the batch, the work items, and the kernel that appends new K and V to the cache.
#pragma once

// Prefill. Any number of new tokens per sequence. A block owns a tile of query rows of one head and walks over the keys
// with an online softmax; tiles that causality hides entirely are never visited. The lengths arrive as kernel
// parameters, so one launch serves a ragged batch without a copy; larger batches take several launches.

constexpr int MAX_BATCH = 256;

struct Batch {
    int n_seq, first_seq;            // sequences in this launch; the number of the first in the call
    int q_start[MAX_BATCH + 1];      // first token of each
    int seq_len[MAX_BATCH];          // positions in the cache before the new tokens
    int order[MAX_BATCH];            // sequences by number of query tiles, most first
};

struct PrefillParams {
    const void *q; void *out;                 // [token][head][D]
    const void *k_new, *v_new;                // [token][kv head][D]
    int64_t q_token_stride, q_head_stride, out_token_stride, out_head_stride;
    int64_t k_token_stride, k_head_stride, v_token_stride, v_head_stride;
    Cache<char> cache;
    int n_heads, group, causal;
    int n_tiles;                              // query tiles of all sequences and heads
    float scale_log2;
};

struct PrefillTile { int seq, head, row0, n_rows, seq_len; };    // row0: first of its rows among the sequence's new tokens

// Work item -> query tile. Heads are innermost, so that the heads of a group share K and V in L2. Tiles come last first:
// those see most keys, and the short ones fill the gaps at the end.
__device__ __forceinline__ PrefillTile prefill_tile(const Batch &b, int n_heads, int tile_rows, int index) {
    int t = index / n_heads, level = 0, active = b.n_seq, seq, tiles;
    for (;;) {    // `active` sequences have more than `level` tiles
        seq = b.order[active - 1];
        tiles = (b.q_start[seq + 1] - b.q_start[seq] + tile_rows - 1) / tile_rows;
        if (t < (tiles - level) * active) break;
        t -= (tiles - level) * active;
        level = tiles;
        active--;
    }
    seq = b.order[t % active];
    int n_new = b.q_start[seq + 1] - b.q_start[seq];
    tiles = (n_new + tile_rows - 1) / tile_rows;
    return {seq, index % n_heads, (tiles - 1 - level - t / active) * tile_rows, n_new, b.seq_len[seq]};
}

// In bf16, a weight that enters the second product rounded is 2^-9 off, and where a row sees few keys nothing averages
// that out: measured on normal inputs, up to 1.8 x the bound of tests/test_attention.cu at 2 to 4 keys, 1.0 at 32, 0.73
// at 64 and 0.56 at 128. So query tiles whose first row sees fewer keys than this use P = hi + lo, as decode always does.
constexpr int PREFILL_EXACT_BELOW = 256;

// Computes: the append of new K and V to the cache.
// Reads:    k_new and v_new [token][kv head][D], rows of row_bytes.
// Writes:   the cache rows seq_len .. seq_len + n_new - 1 of each sequence.
// Grid:     a block of 128 threads per token; a thread copies 16-byte pieces of any head.
// Requires: 16-byte rows, room in the cache.
__global__ void __launch_bounds__(128) prefill_append_kernel(const __grid_constant__ PrefillParams p, const __grid_constant__ Batch b,
                                                             int element_bytes) {
    int token = b.q_start[0] + blockIdx.x, low = 0, high = b.n_seq - 1;
    while (low < high) {    // the last sequence that starts at or before the token
        int mid = (low + high + 1) / 2;
        if (b.q_start[mid] <= token) low = mid;
        else high = mid - 1;
    }
    int pos = b.seq_len[low] + token - b.q_start[low], pieces = p.cache.head_dim * element_bytes / 16;
    for (int i = threadIdx.x; i < p.cache.n_kv_heads * pieces; i += blockDim.x) {
        int head = i / pieces, piece = i % pieces;
        size_t row = cache_row(p.cache, b.first_seq + low, head, pos) * element_bytes;
        const char *k = (const char *)p.k_new + (token * p.k_token_stride + head * p.k_head_stride) * element_bytes;
        const char *v = (const char *)p.v_new + (token * p.v_token_stride + head * p.v_head_stride) * element_bytes;
        ((uint4 *)(p.cache.k + row))[piece] = ((const uint4 *)k)[piece];
        ((uint4 *)(p.cache.v + row))[piece] = ((const uint4 *)v)[piece];
    }
}
