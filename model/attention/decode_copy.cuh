// Decode attention: copies of keys and values to shared memory, and of the new token's to the cache.
#pragma once

#include "decode_schedule.cuh"

// As cache_row, for a cursor's sequence and KV head.
template <typename T>
__device__ __forceinline__ size_t decode_row(const Cache<T> &c, const DecodeCursor &item, int pos) {
    int block = item.cache_block;
    if (c.table_width > 1) {
        int i = pos / c.block_size;
        block = load_l2(c.table + (size_t)block * c.table_width + i);
        pos -= i * c.block_size;
    }
    return (((size_t)block * c.n_kv_heads + item.kv_head) * c.block_size + pos) * c.head_dim;
}

// The copies of a block's steps, one after another: positions pos .. pos+STEP-1 of one KV head to K and V at `stage`;
// zeros from the sequence's end on. A thread copies 16 bytes of every ROWS-th row. Nearly all steps are plain, and cost
// no more than their copies: what finds the next place is out of their way.
template <typename T, int D> struct DecodeCopies {
    static constexpr int STEP = decode_step(D), CHUNKS = D / 8, COPIERS = D == 96 ? 96 : 128, ROWS = COPIERS / CHUNKS,
                         V = STEP * D * 2;
    DecodeCursor item; // the query tile
    int pos, end;      // the next step, and where the block's part of the query tile ends
    int plain;         // steps from here on that are whole and in one block of the cache
    const T *k, *v;    // where this thread's part of the next step is, if it is plain
    uint32_t dst;      // and where in the tile it goes

    __device__ __forceinline__ void start(const DecodeParams &p, const DecodeCursor &first) {
        item = first;
        dst = tile_offset<T, D>(threadIdx.x / CHUNKS, threadIdx.x % CHUNKS);
        enter(p);
    }
    __device__ __forceinline__ bool done() const {
        return item.work_left <= 0;
    }
    __device__ __forceinline__ void enter(const DecodeParams &p) { // a query tile
        if (done()) return;
        pos = item.begin();
        end = min(item.total, (item.split + item.count()) << item.split_log2);
        find(p);
    }
    __device__ __forceinline__ void find(const DecodeParams &p) {
        const Cache<T> &cache = (const Cache<T> &)p.cache;
        int in_cache = min(end, item.total - p.append); // after it there is one new token at most
        size_t at = decode_row(cache, item, pos) + threadIdx.x * 8;
        k = cache.k + at;
        v = cache.v + at;
        if (cache.table_width > 1) in_cache = min(in_cache, (pos / cache.block_size + 1) * cache.block_size);
        plain = max(in_cache - pos, 0) / STEP;
    }
    // Starts the copies of the next step, and goes on to the one after. Without with_new it leaves a new token out.
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
        } else
            copy_rows(p, stage, with_new);
        pos += STEP;
        if (__builtin_expect(plain > 0, 1)) return;
        if (pos >= end) {
            item.next(p, item.count());
            enter(p);
        } else
            find(p);
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
    __device__ __forceinline__ DecodeNew() : row(-1) {
    }
    __device__ __forceinline__ DecodeNew(const DecodeParams &p, const DecodeCursor &item, int pos, int step)
        : seq(item.seq), kv_head(item.kv_head),
          row(p.append && item.total - 1 < pos + step ? item.total - 1 - pos : -1) {
    }
    // Starts the copy of 16 bytes of its K and V, which are at k_tile and v_tile.
    template <typename T, int D>
    __device__ __forceinline__ void load(const DecodeParams &p, uint32_t k_tile, uint32_t v_tile, int chunk) const {
        uint32_t at = tile_offset<T, D>(row, chunk);
        copy_async16(k_tile + at, (const T *)p.k_new + seq * p.k_token_stride + kv_head * p.k_head_stride +
                                      chunk * (16 / sizeof(T)));
        copy_async16(v_tile + at, (const T *)p.v_new + seq * p.v_token_stride + kv_head * p.v_head_stride +
                                      chunk * (16 / sizeof(T)));
    }
};

// Writes 16 bytes of the new token's K or V, row `row` of a tile in shared memory, to their place in the cache: not
// from where they came from, as the way to L2 and back would hold up everyone.
template <typename T, int D>
__device__ __forceinline__ void decode_append(const DecodeParams &p, const DecodeCursor &item, uint32_t tile, int row,
                                              bool is_v, int chunk) {
    uint4 *to =
        (uint4 *)((T *)(is_v ? p.cache.v : p.cache.k) + decode_row((const Cache<T> &)p.cache, item, item.total - 1));
    to[chunk] = load_shared16(tile + tile_offset<T, D>(row, chunk));
}
