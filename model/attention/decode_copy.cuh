// Decode attention: copies of keys and values to shared memory, and of the new token's to the cache.
#pragma once

#include "decode_schedule.cuh"

// As cache_row, for a cursor's sequence and KV head.
template <typename T, class Cursor>
__device__ __forceinline__ size_t decode_row(const Cache<T> &c, const Cursor &item, int pos) {
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
// no more than their copies: what finds the next place is out of their way. In a cache of blocks of PAGE positions (the
// engines') a step has a block or two of its own: their numbers are loaded when the step before has been copied and
// looked at when it is copied itself, for a load from L2 takes as long as a quarter of a step.
// (H200: to start a step's copies takes 700 cycles of some 2,000. Boxes of the tensor memory accelerator, started by one
// thread, keys and values together or each when their place is free, were 9 % faster for 256 sequences of 63 or 127
// positions and 7 to 13 % slower for long ones.)
template <typename T, int D, class Cursor> struct DecodeCopies {
    static constexpr int STEP = decode_step(D), CHUNKS = D / 8, COPIERS = D == 96 ? 96 : 128, ROWS = COPIERS / CHUNKS,
                         V = STEP * D * 2, PAGE = 64, PAGES = STEP / PAGE;
    static_assert(STEP % PAGE == 0 && PAGES <= 2 && PAGE % ROWS == 0, "a step is whole pages");
    Cursor item;  // the query tile
    int pos, end; // the next step, and where the block's part of the query tile ends
    // Steps from here on that are whole and where k and v say, or in pages. 0: not all positions of the next one are in
    // the cache; -1: it is in small blocks of the cache, for each of which the block table has to be asked.
    int plain;
    const T *k, *v;   // where this thread's part of the next step begins; not in pages
    int pages[PAGES]; // the next step's blocks, in pages
    uint32_t dst;     // where in the tile this thread's part goes

    __device__ __forceinline__ void start(const DecodeParams &p, const Cursor &first) {
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
    static __device__ __forceinline__ bool in_pages(const Cache<T> &cache) {
        return cache.table_width > 1 && cache.block_size == PAGE;
    }
    __device__ __forceinline__ void load_pages(const Cache<T> &cache) {
        const int *row = cache.table + (size_t)item.cache_block * cache.table_width;
#pragma unroll
        for (int j = 0; j < PAGES; j++) pages[j] = __ldcg(row + min(pos / PAGE + j, cache.table_width - 1));
    }
    // Offset of a row of the next step, in pages.
    __device__ __forceinline__ size_t page_row(const Cache<T> &cache, int row) const {
        int page = PAGES == 1 || row < PAGE ? pages[0] : pages[PAGES - 1];
        return (((size_t)page * cache.n_kv_heads + item.kv_head) * PAGE + row % PAGE) * D;
    }
    __device__ __forceinline__ void find(const DecodeParams &p) {
        const Cache<T> &cache = (const Cache<T> &)p.cache;
        int in_cache = min(end, item.cached(p)); // after it there are new tokens
        plain = max(in_cache - pos, 0) / STEP;
        if (in_pages(cache)) {
            load_pages(cache);
            return;
        }
        size_t at = decode_row(cache, item, pos) + threadIdx.x * 8;
        k = cache.k + at;
        v = cache.v + at;
        if (cache.table_width > 1) {
            int in_block = cache.block_size - pos % cache.block_size; // positions from here on
            plain = in_block < STEP ? -1 : max(min(in_cache, pos + in_block) - pos, 0) / STEP;
        }
    }
    // Starts the copies of the next step, and goes on to the one after. Without with_new it leaves a new token out.
    __device__ __forceinline__ void copy(const DecodeParams &p, uint32_t stage, bool with_new) {
        const Cache<T> &cache = (const Cache<T> &)p.cache;
        if (__builtin_expect(plain > 0, 1)) {
            uint64_t policy = l2_evict_first();
            const bool paged = in_pages(cache);
#pragma unroll
            for (int j = 0; j < PAGES; j++) {
                if (paged) {
                    size_t at = page_row(cache, j * PAGE) + threadIdx.x * 8;
                    k = cache.k + at;
                    v = cache.v + at;
                }
                if (COPIERS == DECODE_THREADS || threadIdx.x < COPIERS)
#pragma unroll
                    for (int i = 0; i < PAGE / ROWS; i++) {
                        uint32_t to = stage + dst + (j * PAGE + i * ROWS) * D * 2;
                        copy_async16(to, k + i * ROWS * D, policy);
                        copy_async16(to + V, v + i * ROWS * D, policy);
                    }
                k += PAGE * D;
                v += PAGE * D;
            }
            plain--;
        } else if (!Cursor::ROWS && in_pages(cache))
            copy_last(p, stage, with_new);
        else
            copy_rows(p, stage, with_new);
        pos += STEP;
        if (__builtin_expect(plain > 0, 1)) {
            if (in_pages(cache)) load_pages(cache);
            return;
        }
        if (pos >= end) {
            item.next(p, item.count());
            enter(p);
        } else
            find(p);
    }
    // The step in which a sequence ends, in pages, with one new token at most. (A loop: unrolled it is faster where its
    // code is at hand, as in many short sequences, and slower where it is not, as in one step of one sequence.)
    __device__ __forceinline__ void copy_last(const DecodeParams &p, uint32_t stage, bool with_new) {
        const Cache<T> &cache = (const Cache<T> &)p.cache;
        // Rows of the step from this thread's first one on, and those in the cache.
        const int n = item.total - pos - (int)threadIdx.x / CHUNKS, n_cached = n - p.append;
        if (COPIERS < DECODE_THREADS && threadIdx.x >= COPIERS) return;
        uint32_t to = stage + dst;
#pragma unroll
        for (int j = 0; j < PAGES; j++) {
            const size_t at = page_row(cache, j * PAGE) + threadIdx.x * 8;
            k = cache.k + at;
            v = cache.v + at;
#pragma unroll 1
            for (int row = j * PAGE; row < (j + 1) * PAGE;
                 row += ROWS, to += ROWS * D * 2, k += ROWS * D, v += ROWS * D) {
                const T *k_from = k, *v_from = v;
                if (row >= n_cached && row < n) { // new
                    if (!with_new) continue;
                    const int dim = threadIdx.x % CHUNKS * 8;
                    k_from = (const T *)p.k_new + item.seq * p.k_token_stride + item.kv_head * p.k_head_stride + dim;
                    v_from = (const T *)p.v_new + item.seq * p.v_token_stride + item.kv_head * p.v_head_stride + dim;
                }
                copy_async16(to, k_from, row < n);
                copy_async16(to + V, v_from, row < n);
            }
        }
    }
    __device__ __forceinline__ void copy_rows(const DecodeParams &p, uint32_t stage, bool with_new) {
        const Cache<T> &cache = (const Cache<T> &)p.cache;
        int at = pos + threadIdx.x / CHUNKS, dim = threadIdx.x % CHUNKS * 8;
#pragma unroll 1
        for (int i = 0; i < STEP / ROWS && threadIdx.x < COPIERS; i++, at += ROWS) {
            bool is_new = item.is_new(p, at), valid = at < item.total;
            if (is_new && !with_new) continue;
            const T *k_from = cache.k, *v_from = cache.v; // legal, where nothing is read
            if (is_new) {
                k_from = (const T *)p.k_new + item.token(at) * p.k_token_stride + item.kv_head * p.k_head_stride + dim;
                v_from = (const T *)p.v_new + item.token(at) * p.v_token_stride + item.kv_head * p.v_head_stride + dim;
            } else if (valid) {
                size_t row = dim + (in_pages(cache) ? page_row(cache, at - pos) : decode_row(cache, item, at));
                k_from = cache.k + row;
                v_from = cache.v + row;
            }
            copy_async16(stage + dst + i * ROWS * D * 2, k_from, valid);
            copy_async16(stage + dst + V + i * ROWS * D * 2, v_from, valid);
        }
    }
};

// New tokens that a copy left out: the row of the first in the step, -1 if there is none.
template <class Cursor> struct DecodeNew {
    int token, kv_head, row, n; // n: several of a sequence only
    __device__ __forceinline__ DecodeNew() : row(-1) {
    }
    __device__ __forceinline__ DecodeNew(const DecodeParams &p, const Cursor &item, int pos, int step)
        : token(item.seq), kv_head(item.kv_head), row(-1) {
        if constexpr (Cursor::ROWS) {
            int first = max(item.cached(p), pos);
            n = min(item.total, pos + step) - first;
            token = item.token(first);
            if (n > 0) row = first - pos;
        } else if (p.append && item.total - 1 < pos + step)
            row = item.total - 1 - pos;
    }
    // Starts the copy of 16 bytes of their K and V, which are at k_tile and v_tile.
    template <typename T, int D>
    __device__ __forceinline__ void load(const DecodeParams &p, uint32_t k_tile, uint32_t v_tile, int chunk) const {
#pragma unroll 1
        for (int i = 0; i < (Cursor::ROWS ? n : 1); i++) {
            uint32_t at = tile_offset<T, D>(row + i, chunk);
            copy_async16(k_tile + at, (const T *)p.k_new + (token + i) * p.k_token_stride + kv_head * p.k_head_stride +
                                          chunk * (16 / sizeof(T)));
            copy_async16(v_tile + at, (const T *)p.v_new + (token + i) * p.v_token_stride + kv_head * p.v_head_stride +
                                          chunk * (16 / sizeof(T)));
        }
    }
};

// Writes 16 bytes of K or V of a new token, row `row` of a tile in shared memory, to their place in the cache, whose
// row begins at offset `to`: not from where they came from, as the way to L2 and back would hold up everyone.
template <typename T, int D>
__device__ __forceinline__ void decode_append(const DecodeParams &p, size_t to, uint32_t tile, int row, bool is_v,
                                              int chunk) {
    uint4 *cache = (uint4 *)((T *)(is_v ? p.cache.v : p.cache.k) + to);
    cache[chunk] = load_shared16(tile + tile_offset<T, D>(row, chunk));
}
