// Decode: the copies of keys and values to shared memory, and of the new token's to the cache.
#pragma once

// 16-bit decode, on tensor cores. A block of four warps walks over its groups, their chunks, and these in steps of STEP
// positions, with a ring of steps in shared memory ahead of it. Keys are the rows and query heads the columns of S^T = K
// Q^T, and likewise O^T = V^T P^T, so a group of up to 8 heads fills the instruction's 8 columns (NT such column blocks)
// and each K/V element is loaded once for all heads. For the scores the warps share out the positions, for the output the
// dims of the head: the weights cross over through shared memory, and no sums across warps are left to do. P enters the
// second product as the sum of two 16-bit terms: there is room, the kernel waits for memory, and the result is exact to the
// output's rounding.
constexpr int DECODE_THREADS = 128;
// Steps in the ring: two, one of them in use. With head_dim 64 and groups of up to 8 heads three, where two such blocks fit on
// an SM: the more of a call is under way before its queries may be read, the sooner memory is busy. That is worth 2 % there;
// with head_dim 128 short contexts gain from it and long ones lose, as the blocks' shares of memory grow unequal.
template <int D, int NT> __host__ __device__ constexpr int decode_most_stages() { return D == 64 && NT == 1 ? 3 : 2; }
template <int D> __host__ __device__ constexpr int decode_step() { return D == 64 ? 128 : 64; }
template <int D> __host__ __device__ constexpr int decode_stage_bytes() { return 2 * decode_step<D>() * D * 2; }    // K and V
template <int D> __host__ __device__ constexpr int decode_q_pitch() { return D * 2 + 16; }    // free of bank conflicts
// The ring, P [hi, lo][column block][position][8 heads], the warps' largest scores [warp][head], and queries [head][pitch].
template <int D, int NT> __host__ __device__ constexpr int decode_smem_bytes(int stages) {
    return stages * decode_stage_bytes<D>() + 2 * NT * decode_step<D>() * 16 + 4 * 8 * NT * (int)sizeof(float) + 8 * NT * decode_q_pitch<D>();
}
// Behind it, in a cluster's first block: a barrier, and what its second sends, [eight][16 bytes][thread].
constexpr int DECODE_SENT = DECODE_EIGHTS / 2;    // eights, at most: half of them
template <int D, int NT> __host__ __device__ constexpr int decode_sent_bytes() { return 16 + DECODE_SENT * DECODE_THREADS * NT * (((D / 16 + 3) / 4) + 1) * 16; }

// As cache_row, for a cursor's sequence and head.
template <typename T> __device__ __forceinline__ size_t decode_row(const Cache<T> &c, const DecodeCursor &item, int pos) {
    int block = item.block;
    if (c.table_width > 1) {
        int i = pos / c.block_size;
        block = load_l2(c.table + (size_t)item.seq * c.table_width + i);
        pos -= i * c.block_size;
    }
    return (((size_t)block * c.n_kv_heads + item.kv_head) * c.block_size + pos) * c.head_dim;
}

// The copies of a block's steps, one after another: positions pos .. pos+STEP-1 of one KV head to K and V at `stage`; zeros
// from the sequence's end on. A thread copies 16 bytes of every ROWS-th row. Nearly all steps are plain, and cost no more
// than their copies: what finds the next place lies out of their way.
template <typename T, int D> struct DecodeCopies {
    static constexpr int STEP = decode_step<D>(), CHUNKS = D / 8, COPIERS = D == 96 ? 96 : 128, ROWS = COPIERS / CHUNKS, V = STEP * D * 2;
    DecodeCursor item;      // the group
    int pos, end;           // the next step, and where the block's part of the group ends
    int plain;              // steps from here on that lie in one piece of the cache, as a whole
    const T *k, *v;         // where this thread's part of the next step is, if it is plain
    uint32_t dst;           // and where in the tile it goes

    __device__ __forceinline__ void start(const DecodeParams &p, const DecodeCursor &first) {
        item = first;
        dst = tile_offset<T, D>(threadIdx.x / CHUNKS, threadIdx.x % CHUNKS);
        enter(p);
    }
    __device__ __forceinline__ bool done() const { return item.left <= 0; }
    __device__ __forceinline__ void enter(const DecodeParams &p) {    // a group
        if (done()) return;
        pos = item.begin();
        end = min(item.total, (item.chunk + item.count()) << item.log2);
        find(p);
    }
    __device__ __forceinline__ void find(const DecodeParams &p) {
        const Cache<T> &cache = (const Cache<T> &)p.cache;
        int in_cache = min(end, item.total - p.append);    // behind it there is one new token at most
        size_t at = decode_row(cache, item, pos) + threadIdx.x * 8;
        k = cache.k + at;
        v = cache.v + at;
        if (cache.table_width > 1) in_cache = min(in_cache, (pos / cache.block_size + 1) * cache.block_size);
        plain = max(in_cache - pos, 0) / STEP;
    }
    // Starts the copies of the next step, and goes on to the one after. Without with_new it leaves out a new token.
    __device__ __forceinline__ void copy(const DecodeParams &p, uint32_t stage, bool with_new) {
        if (__builtin_expect(plain > 0, 1)) {
            uint64_t policy = l2_evict_first();
            if (COPIERS == DECODE_THREADS || threadIdx.x < COPIERS)
                #pragma unroll
                for (int i = 0; i < STEP / ROWS; i++) {
                    copy_async16(stage + dst + i * ROWS * D * 2, k + i * ROWS * D, policy);
                    copy_async16(stage + dst + V + i * ROWS * D * 2, v + i * ROWS * D, policy);
                }
            k += STEP * D;
            v += STEP * D;
            plain--;
        } else copy_rows(p, stage, with_new);
        pos += STEP;
        if (__builtin_expect(plain > 0, 1)) return;
        if (pos >= end) {
            item.next(p, item.count());
            enter(p);
        } else find(p);
    }
    __device__ __forceinline__ void copy_rows(const DecodeParams &p, uint32_t stage, bool with_new) {
        const Cache<T> &cache = (const Cache<T> &)p.cache;
        int at = pos + threadIdx.x / CHUNKS, dim = threadIdx.x % CHUNKS * 8;
        const T *k_new = (const T *)p.k_new + item.seq * p.k_token_stride + item.kv_head * p.k_head_stride;
        const T *v_new = (const T *)p.v_new + item.seq * p.v_token_stride + item.kv_head * p.v_head_stride;
        #pragma unroll 1
        for (int i = 0; i < STEP / ROWS && threadIdx.x < COPIERS; i++, at += ROWS) {
            bool is_new = p.append && at == item.total - 1, valid = at < item.total;
            if (is_new && !with_new) continue;
            size_t row = decode_row(cache, item, valid ? at : pos);
            copy_async16(stage + dst + i * ROWS * D * 2, (is_new ? k_new : cache.k + row) + dim, valid);
            copy_async16(stage + dst + V + i * ROWS * D * 2, (is_new ? v_new : cache.v + row) + dim, valid);
        }
    }
};

// A new token that a copy left out: its row in the step, -1 if there is none.
struct DecodeNew {
    int seq, kv_head, row;
    __device__ __forceinline__ DecodeNew() : row(-1) {}
    __device__ __forceinline__ DecodeNew(const DecodeParams &p, const DecodeCursor &item, int pos, int step)
        : seq(item.seq), kv_head(item.kv_head), row(p.append && item.total - 1 < pos + step ? item.total - 1 - pos : -1) {}
    // Starts the copy of 16 bytes of its K and V, which are at k_tile and v_tile.
    template <typename T, int D> __device__ __forceinline__ void load(const DecodeParams &p, uint32_t k_tile, uint32_t v_tile, int chunk) const {
        uint32_t at = tile_offset<T, D>(row, chunk);
        copy_async16(k_tile + at, (const T *)p.k_new + seq * p.k_token_stride + kv_head * p.k_head_stride + chunk * (16 / sizeof(T)));
        copy_async16(v_tile + at, (const T *)p.v_new + seq * p.v_token_stride + kv_head * p.v_head_stride + chunk * (16 / sizeof(T)));
    }
};

// Writes 16 bytes of the new token's K or V, row `row` of a tile in shared memory, to their place in the cache: not from
// where they came from, as the way to L2 and back would hold up everyone.
template <typename T, int D>
__device__ __forceinline__ void decode_append(const DecodeParams &p, const DecodeCursor &item, uint32_t tile, int row, bool is_v, int chunk) {
    uint4 *to = (uint4 *)((T *)(is_v ? p.cache.v : p.cache.k) + decode_row((const Cache<T> &)p.cache, item, item.total - 1));
    to[chunk] = load_shared16(tile + tile_offset<T, D>(row, chunk));
}
