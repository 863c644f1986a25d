// attention_decode.cuh: decode, a part of attention.cu (which includes it after the cache and the primitives): the deal of
// work, the copies, the fold, the step, and the kernel for 16-bit types. attention_f32.cuh deals and folds with what is here.
#pragma once

// Decode. One new token per sequence. A sequence's positions are cut into chunks of a fixed length; a work item is one
// chunk of one KV head, with as many query heads of its group as a tile holds. As many blocks as the GPU holds share the
// work out evenly, each taking a run of neighbours, so the launch does not depend on the lengths and can be replayed from
// a graph. Copies run ahead through a ring in shared memory, on from item to item. The chunks of a group are folded in
// their order, first to last, by eights: in registers where one block has them all, or the two blocks of a cluster, of which the
// second sends its eights to the first; else from the workspace, by the block that finishes last. The operations are the
// same. So nothing depends on what else is in the batch: a sequence gets the same bits alone and among others.
//
// Calls follow one another closely (programmatic dependent launch): a call's blocks take the places of the last call's one
// by one. What they may read before the kernels before them are over is for the caller to say. If cache, table and
// lengths are settled, a block finds its share and fills its ring first, and waits only then, for q and the new K and V.
// The next kernel may start once every block of this one is past its wait, so when a call follows another, or any kernel
// that does likewise, only that one can be unfinished, whatever came earlier: it is all that `settled` speaks of. All
// writes (cache, workspace, out) come after the wait. A block without work waits too: no call ends before the one before.

// The length of a chunk depends on the length of its own sequence only: 32 chunks at most up to 131,072 positions.
__host__ __device__ inline int decode_chunk_log2(int total) {
    return 7 + (total > 4096) + (total > 8192) + (total > 16384) + (total > 32768) + (total > 65536);    // without branches
}
__host__ __device__ inline int decode_chunk(int total) { return 1 << decode_chunk_log2(total); }
__host__ __device__ inline int decode_chunks(int total) { return (total + decode_chunk(total) - 1) >> decode_chunk_log2(total); }
constexpr int DECODE_EIGHTS = 4;    // of chunks, up to there
__host__ __device__ inline int decode_weight(int total) { return decode_chunk(total) >> 7; }    // a chunk's share of work

struct DecodeParams {    // what a block needs to begin stands together, at the front
    int n_seq, n_heads, group, head_blocks;   // head_blocks: items per chunk and KV head, for groups larger than a tile
    int cache_max_len, max_chunks, append;
    int settled;                              // cache, table and lengths may be read before the kernel before this one is over
    int cluster;                              // blocks in one: 2, for DECODE_EIGHTS at most, or 1
    int parts;                                // blocks for each group, where all are equally long; 0: there are more groups than blocks
    int wide;                                 // is most of the GPU busy even with one block for each?
    float scale_log2;
    const int *seq_lens;                      // [seq] positions in the cache before the new token
    Cache<char> cache;
    const void *q; void *out;                 // [seq][head][D]
    const void *k_new, *v_new;                // [seq][kv head][D]
    int64_t q_token_stride, q_head_stride, out_token_stride, out_head_stride;
    int64_t k_token_stride, k_head_stride, v_token_stride, v_head_stride;
    unsigned *arrived;                        // [block] chunks done of the group that starts in the block and ends in another
    float2 *part_ml;                          // [seq][head][max_chunks]    a chunk's largest score (log2) and its sum
    float *part_o;                            // [seq][head][max_chunks][D] and its weighted sum of V
};

// Positions that sequence seq sees, the new one included; 0 for one that would overflow its cache.
__device__ __forceinline__ int decode_total(const DecodeParams &p, int seq) {
    int total = load_early(p.seq_lens + seq) + 1;
    return total >= 1 && total <= p.cache_max_len ? total : 0;
}
__device__ __forceinline__ unsigned decode_group_weight(int total) { return decode_chunks(total) * decode_weight(total); }

// x / y for x < 2^18: the quotient of x + 1/2 is at least 1/(2y) away from a whole number, the error of the division less.
__device__ __forceinline__ unsigned small_quotient(unsigned x, unsigned y) { return (unsigned)__fdividef((float)x + 0.5f, (float)y); }

// A block's place in its run of items: chunk innermost, then head block, KV head, sequence.
struct DecodeCursor {
    int seq, kv_head, head_block, chunk;
    int total, n_chunks;    // of seq
    int log2;               // of its chunks' length
    int block;              // of the cache that has seq, if one has it all
    int left;               // work of this block, the present item included: its items are those that begin in it
    int owner;              // the block that has the group's first chunk: a counter belongs to it
    bool within;            // does the block's cluster share the group, parted between eights of chunks?
    bool refused;           // is there a sequence that would overflow its cache?

    // The block's share of all work; every warp computes it for itself. Equal lengths: a part of one group, or whole groups;
    // else an even share of the chunks' lengths, wherever that begins and ends. No copy can start before it is found, so the
    // usual case, p.parts for each group, is ready but for the lengths when these arrive; meanwhile(*this) runs until they do,
    // when seq and kv_head are those of that case (a seq too large for a block without work; kv_head counts head blocks too).
    template <class F> __device__ __forceinline__ void start(const DecodeParams &p, int lane, F meanwhile) {
        unsigned per_seq = p.cache.n_kv_heads * p.head_blocks, groups = p.n_seq * per_seq, parts = p.parts;
        unsigned group = small_quotient(blockIdx.x, max(parts, 1)), part = blockIdx.x - group * parts;
        bool few = p.n_seq <= 32;
        int mine_is = min(lane, p.n_seq - 1), length = decode_total(p, mine_is), own_block = block_of(p, mine_is);
        owner = group * parts;
        seq = small_quotient(group, per_seq);
        kv_head = group - seq * per_seq;
        head_block = 0;
        meanwhile(*this);
        unsigned mine = decode_group_weight(length), n = decode_chunks(length), weight = decode_weight(length), sum, least, most;
        int equal;
        __match_all_sync(~0u, mine, &equal);
        if (few && equal) {
            sum = mine * p.n_seq;
            least = most = mine;
        } else if (few) {
            sum = __reduce_add_sync(~0u, lane < p.n_seq ? mine : 0);
            least = __reduce_min_sync(~0u, mine);
            most = __reduce_max_sync(~0u, mine);
        } else {
            sum = most = 0;
            least = ~0u;
            for (int i = lane; i < p.n_seq; i += 32) {
                mine = decode_group_weight(decode_total(p, i));
                sum += mine;
                least = min(least, mine);
                most = max(most, mine);
            }
            sum = __reduce_add_sync(~0u, sum);
            least = __reduce_min_sync(~0u, least);
            most = __reduce_max_sync(~0u, most);
        }
        unsigned work = sum * per_seq;
        within = false;
        refused = least == 0;
        left = 0;
        if (work == 0) return;
        if (least == most && parts > 0) {    // a part of one group, if that costs no more than 1/8
            bool alone = n <= 2 && p.wide;
            if (alone || n < parts) {
                parts = alone ? 1 : n;
                group = small_quotient(blockIdx.x, parts);
                part = blockIdx.x - group * parts;
                owner = group * parts;
                seq = small_quotient(group, per_seq);
                kv_head = group - seq * per_seq;
            }
            unsigned longest = small_quotient(n + parts - 1, parts) * weight;
            if (alone || longest * gridDim.x <= work + work / 8 || (longest - 1) * gridDim.x < work) {
                if (group >= groups) return;
                chunk = small_quotient(part * n, parts);
                left = (small_quotient((part + 1) * n, parts) - chunk) * weight;
                within = parts == 2 && p.cluster == 2 && n / 2 % 8 == 0;
                find(p, few ? __shfl_sync(~0u, length, seq) : decode_total(p, seq), few ? __shfl_sync(~0u, own_block, seq) : block_of(p, seq));
                return;
            }
        }
        owner = blockIdx.x;
        mine = few && lane >= p.n_seq ? 0 : decode_group_weight(length);
        unsigned share = work / gridDim.x, rest = work - share * gridDim.x;
        if (least == most) {    // whole groups
            unsigned even = (share + (rest > 0) + most - 1) / most * most;
            if (even * gridDim.x <= work + work / 8) {
                share = even;
                rest = 0;
            }
        }
        unsigned at = share * blockIdx.x + min(blockIdx.x, rest);
        if (at >= work) return;
        left = min(share + (blockIdx.x < rest), work - at);
        if (left == 0) return;
        unsigned index = at;
        for (int base = 0;; base += 32) {    // find the sequence that has `at`
            if (p.n_seq > 32) mine = decode_group_weight(length = base + lane < p.n_seq ? decode_total(p, base + lane) : 0);
            unsigned upto = mine;
            #pragma unroll
            for (int x = 1; x < 32; x *= 2) {
                unsigned y = __shfl_up_sync(~0u, upto, x);
                if (lane >= x) upto += y;
            }
            unsigned beyond = __ballot_sync(~0u, upto * per_seq > at);
            if (beyond) {
                int first = __ffs(beyond) - 1;
                seq = base + first;
                at -= __shfl_sync(~0u, upto - mine, first) * per_seq;
                length = __shfl_sync(~0u, length, first);
                break;
            }
            at -= __shfl_sync(~0u, upto, 31) * per_seq;
        }
        unsigned log2_weight = decode_chunk_log2(length) - 7, group_weight = decode_chunks(length) << log2_weight;
        kv_head = at / group_weight;
        at -= kv_head * group_weight;
        chunk = (at + (1 << log2_weight) - 1) >> log2_weight;
        find(p, length, p.n_seq <= 32 ? __shfl_sync(~0u, own_block, seq) : block_of(p, seq));
        if (at > 0) {    // `at` is within a group, maybe within a chunk: that one belongs to the block before
            index -= at;
            owner = index < rest * (share + 1) ? index / (share + 1) : rest + (index - rest * (share + 1)) / share;
            left -= (chunk << log2_weight) - at;
            if (chunk == n_chunks) {    // on to the next group
                chunk--;
                left += 1 << (log2 - 7);
                next(p);
            }
        }
    }
    __device__ __forceinline__ void start(const DecodeParams &p, int lane) {
        start(p, lane, [](const DecodeCursor &) {});
    }
    __device__ __forceinline__ static int block_of(const DecodeParams &p, int seq) {
        return p.cache.table && p.cache.table_width == 1 ? load_early(p.cache.table + seq) : seq;
    }
    // The rest of a place: kv_head counts head blocks as well.
    __device__ __forceinline__ void find(const DecodeParams &p, int length, int cache_block) {
        total = length;
        block = cache_block;
        log2 = decode_chunk_log2(total);
        n_chunks = (total + (1 << log2) - 1) >> log2;
        head_block = 0;
        if (p.head_blocks > 1) {
            head_block = kv_head % p.head_blocks;
            kv_head /= p.head_blocks;
        }
    }
    __device__ __forceinline__ void next(const DecodeParams &p, int n = 1) {    // n chunks of this group on
        left -= n << (log2 - 7);
        if (left <= 0 || (chunk += n) < n_chunks) return;
        chunk = 0;
        owner = blockIdx.x;
        if (++head_block < p.head_blocks) return;
        head_block = 0;
        if (++kv_head < p.cache.n_kv_heads) return;
        kv_head = 0;
        do total = decode_total(p, ++seq);
        while (total == 0);    // there is another item, so there is another sequence
        log2 = decode_chunk_log2(total);
        n_chunks = (total + (1 << log2) - 1) >> log2;
        block = block_of(p, seq);
    }
    __device__ __forceinline__ int begin() const { return chunk << log2; }
    __device__ __forceinline__ int end() const { return min(total, (chunk + 1) << log2); }
    __device__ __forceinline__ bool reaches(int c) const { return left > (c - chunk) << (log2 - 7); }    // is chunk c of this group the block's too?
    __device__ __forceinline__ int count() const {    // chunks of this group from here on that are the block's
        return min(n_chunks - chunk, (left + (1 << (log2 - 7)) - 1) >> (log2 - 7));
    }
};

// NaN for every sequence that would overflow its cache, by the last block.
template <typename T, int D> __device__ __forceinline__ void decode_refuse(const DecodeParams &p) {
    if (blockIdx.x == gridDim.x - 1)
        for (int seq = 0; seq < p.n_seq; seq++)
            if (decode_total(p, seq) == 0)
                for (int i = threadIdx.x; i < p.n_heads * D; i += blockDim.x)
                    ((T *)p.out)[seq * p.out_token_stride + i / D * p.out_head_stride + i % D] = from_float<T>(NAN);
}

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
        block = load_early(c.table + (size_t)item.seq * c.table_width + i);
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
            uint64_t policy = read_once();
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

// A thread's part of a chunk's result, or of several: for heads 2t and 2t+1 of every column block the largest score (log2)
// and the sum of weights, and the weighted sum of V for dims g and g + 8 of the warp's tiles of 16. The order of additions
// and their rounding are fixed, so that folding in registers and folding from the workspace give the same bits.
template <int NT, int TILES> struct DecodeState {
    float m[NT][2], l[NT][2], o[NT][TILES][4];

    __device__ __forceinline__ void add(const DecodeState &x) {
        #pragma unroll
        for (int n = 0; n < NT; n++) {
            float a[2], b[2];
            #pragma unroll
            for (int h = 0; h < 2; h++) {
                float top = fmaxf(m[n][h], x.m[n][h]);
                a[h] = exp2_fast(m[n][h] - top);
                b[h] = exp2_fast(x.m[n][h] - top);
                m[n][h] = top;
                l[n][h] = __fmaf_rn(x.l[n][h], b[h], __fmul_rn(l[n][h], a[h]));
            }
            #pragma unroll
            for (int i = 0; i < TILES; i++)
                #pragma unroll
                for (int j = 0; j < 4; j++) o[n][i][j] = __fmaf_rn(x.o[n][i][j], b[j & 1], __fmul_rn(o[n][i][j], a[j & 1]));
        }
    }

    // To this thread's place in what the first block of a cluster receives, at `at` there, and from it.
    static constexpr int PIECES = NT * (TILES + 1);
    __device__ __forceinline__ void send(uint32_t at, uint32_t barrier) const {
        #pragma unroll
        for (int n = 0; n < NT; n++) {
            send16(at + n * (TILES + 1) * DECODE_THREADS * 16, make_float4(m[n][0], m[n][1], l[n][0], l[n][1]), barrier);
            #pragma unroll
            for (int i = 0; i < TILES; i++)
                send16(at + (n * (TILES + 1) + 1 + i) * DECODE_THREADS * 16, make_float4(o[n][i][0], o[n][i][1], o[n][i][2], o[n][i][3]), barrier);
        }
    }
    __device__ __forceinline__ void receive(const float4 *at) {
        #pragma unroll
        for (int n = 0; n < NT; n++) {
            float4 x = at[n * (TILES + 1) * DECODE_THREADS];
            m[n][0] = x.x, m[n][1] = x.y, l[n][0] = x.z, l[n][1] = x.w;
            #pragma unroll
            for (int i = 0; i < TILES; i++) {
                x = at[(n * (TILES + 1) + 1 + i) * DECODE_THREADS];
                o[n][i][0] = x.x, o[n][i][1] = x.y, o[n][i][2] = x.z, o[n][i][3] = x.w;
            }
        }
    }
};

// Writes the dims that a thread has of one head: the first or second (h) of its two in a column block.
template <typename X, int D, int TILES, class F>
__device__ __forceinline__ void decode_store_row(X *row, const float (&o)[TILES][4], int h, int warp, int g, F value) {
    #pragma unroll
    for (int i = 0; i < TILES; i++)
        if (D / 16 % 4 == 0 || i * 4 + warp < D / 16) {
            row[(i * 4 + warp) * 16 + g] = value(o[i][h]);
            row[(i * 4 + warp) * 16 + g + 8] = value(o[i][2 + h]);
        }
}

// The fold of a sequence's chunks in their order: eight at a time, then the eights.
template <class State> struct DecodeFold {
    State eight, all;
    __device__ __forceinline__ void add(const State &x, int chunk, int n_chunks) {
        if (add_to_eight(x, chunk, n_chunks)) add_eight(chunk);
    }
    // The steps of it: the first says whether its eight is complete, the second adds that one.
    __device__ __forceinline__ bool add_to_eight(const State &x, int chunk, int n_chunks) {
        if (chunk % 8 == 0) eight = x;
        else eight.add(x);
        return chunk % 8 == 7 || chunk + 1 == n_chunks;
    }
    __device__ __forceinline__ void add_eight(int chunk) {
        if (chunk < 8) all = eight;
        else all.add(eight);
    }
};

// A result; a zero always as +0, as its sign depends on who folds.
template <typename T> __device__ __forceinline__ T from_fold(float o, float inverse) { return from_float<T>(__fmul_rn(o, inverse) + 0.0f); }

// In place of the sum of weights of an eight's second chunk: the first one's place holds the whole eight.
constexpr float DECODE_IN_EIGHT = -1.0f;

// A group of which this block has some chunks and others have the rest: the first or the last of the block's run.
struct DecodeShared {
    int seq, head0, rows, n_chunks, owner, visited;    // visited: those of this block
    int is_last;
};

template <typename T> struct alignas(4 * sizeof(T)) Four { T x[4]; };

// The eights of a row's group, four dims of them, added up with the operations of DecodeFold.
struct DecodeSum {
    float m, l;
    float4 o;

    __device__ __forceinline__ DecodeSum() : m(0.0f), l(0.0f), o(make_float4(0.0f, 0.0f, 0.0f, 0.0f)) {}
    __device__ __forceinline__ void add(bool first, float xm, float xl, float4 x) {
        float top = first ? xm : fmaxf(m, xm), a = first ? 0.0f : exp2_fast(m - top), b = first ? 1.0f : exp2_fast(xm - top);
        m = top;
        l = __fmaf_rn(xl, b, __fmul_rn(l, a));
        o.x = __fmaf_rn(x.x, b, __fmul_rn(o.x, a));
        o.y = __fmaf_rn(x.y, b, __fmul_rn(o.y, a));
        o.z = __fmaf_rn(x.z, b, __fmul_rn(o.z, a));
        o.w = __fmaf_rn(x.w, b, __fmul_rn(o.w, a));
    }
    template <typename T> __device__ __forceinline__ void store(T *out) const {
        float inverse = __frcp_rn(l);
        *(Four<T> *)out = {{from_fold<T>(o.x, inverse), from_fold<T>(o.y, inverse), from_fold<T>(o.z, inverse), from_fold<T>(o.w, inverse)}};
    }
};

// The block that brought the last chunks of a group folds all of them from the workspace, with the operations of
// DecodeState and DecodeFold, element by element. A warp takes a row; lane k computes the weights of chunk k, for all
// lanes, and owns dims 4k .. 4k+3. It runs once, so what it costs is two ways through L2, of its data and of its code.
template <typename T, int D> __device__ __forceinline__ void decode_fold_parts(const DecodeParams &p, const DecodeShared &shared) {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, n_chunks = shared.n_chunks, dim = lane * 4;
    bool has_dims = lane < D / 4;
    for (int row = warp; row < shared.rows; row += blockDim.x >> 5) {
        size_t part = ((size_t)shared.seq * p.n_heads + shared.head0 + row) * p.max_chunks;
        DecodeSum all;
        #pragma unroll 1
        for (int c = 0; c < n_chunks; c += 16) {
            int n = min(16, n_chunks - c);
            float2 ml = lane < n ? __ldcg(p.part_ml + part + c + lane) : make_float2(-INFINITY, 0.0f);
            const float4 *from = (const float4 *)(p.part_o + (part + c) * D + dim);
            float4 x[16];
            #pragma unroll
            for (int k = 0; k < 16; k++) x[k] = k < n && has_dims ? __ldcg(from + k * (D / 4)) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            float top = ml.x;    // the largest score so far of the eight
            #pragma unroll
            for (int x = 1; x < 8; x *= 2) {
                float y = __shfl_up_sync(~0u, top, x, 8);
                if ((lane & 7) >= x) top = fmaxf(top, y);
            }
            float a = exp2_fast(__shfl_up_sync(~0u, top, 1, 8) - top), b = exp2_fast(ml.x - top);
            #pragma unroll
            for (int e = 0; e < 16; e += 8) {
                if (e >= n) break;
                bool in_eight = __shfl_sync(~0u, ml.y, e + 1) == DECODE_IN_EIGHT;
                float m = __shfl_sync(~0u, in_eight ? ml.x : top, in_eight ? e : e + 7), l = __shfl_sync(~0u, ml.y, e);
                float4 sum = x[e];
                if (!in_eight)
                    #pragma unroll
                    for (int i = 1; i < 8; i++) {    // past the end: adding nothing
                        float ai = __shfl_sync(~0u, a, e + i), bi = __shfl_sync(~0u, b, e + i), li = __shfl_sync(~0u, ml.y, e + i);
                        l = __fmaf_rn(li, bi, __fmul_rn(l, ai));
                        sum.x = __fmaf_rn(x[e + i].x, bi, __fmul_rn(sum.x, ai));
                        sum.y = __fmaf_rn(x[e + i].y, bi, __fmul_rn(sum.y, ai));
                        sum.z = __fmaf_rn(x[e + i].z, bi, __fmul_rn(sum.z, ai));
                        sum.w = __fmaf_rn(x[e + i].w, bi, __fmul_rn(sum.w, ai));
                    }
                all.add(c + e == 0, m, l, sum);
            }
        }
        if (has_dims) all.store((T *)p.out + shared.seq * p.out_token_stride + (shared.head0 + row) * p.out_head_stride + dim);
    }
}

// At the end of a block, when all its threads have written their parts: says so in each of the groups it shares, at most
// the first and the last of its run. Whoever brings a group's last chunks folds it.
__device__ __forceinline__ DecodeShared *decode_shared() {
    __shared__ DecodeShared shared[2];
    return shared;
}
template <typename T, int D> __device__ __forceinline__ void decode_arrive(const DecodeParams &p, int n_shared) {
    DecodeShared *shared = decode_shared();
    __syncthreads();    // all of this block's parts are written
    if (threadIdx.x < n_shared) {
        DecodeShared &s = shared[threadIdx.x];
        s.is_last = (int)atomic_add_acq_rel(p.arrived + s.owner, s.visited) + s.visited == s.n_chunks;
        if (s.is_last) p.arrived[s.owner] = 0;
    }
    __syncthreads();    // is_last is known
    #pragma unroll 1
    for (int i = 0; i < n_shared; i++)
        if (shared[i].is_last) decode_fold_parts<T, D>(p, shared[i]);
}
// Thread 0 notes the group that the block is about to begin its part of.
__device__ __forceinline__ void decode_share(const DecodeParams &p, const DecodeCursor &item, int heads, int i) {
    if (threadIdx.x == 0)
        decode_shared()[i] = {item.seq, item.kv_head * p.group + item.head_block * heads, min(heads, p.group - item.head_block * heads), item.n_chunks,
                              item.owner, item.count(), 0};
}

// One step of a chunk: keys and values of STEP positions at `stage`, of which the first n_valid count, into `now`, whose m is
// not yet scaled: only differences are, so that the largest weight is 1 however large the scores. q: query fragments;
// weights and tops: where weights and largest scores cross over between the warps.
template <typename T, int D, int NT, int TILES>
__device__ __forceinline__ void decode_accumulate(DecodeState<NT, TILES> &now, const uint32_t (&q)[NT][D / 16][2], uint32_t stage, uint32_t weights,
                                                  uint32_t tops, int n_valid, float scale_log2) {
    constexpr int STEP = decode_step<D>(), SUBS = STEP / 64, HEADS = 8 * NT, ROW = D * 2, V = STEP * ROW;
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    // Where this lane's rows for ldmatrix are: K rows of its warp's positions, V rows of a 16-position step of the product.
    uint32_t k_lane = tile_offset<T, D>(warp * 16 * SUBS + (lane & 15), lane >> 4);
    uint32_t v_lane = tile_offset<T, D>((lane >> 4) * 8 + (lane & 7), (lane >> 3) & 1);
    auto chunk_pair = [](uint32_t base, int d) { return D == 96 ? (base ^ (d & 1) << 5) + (d >> 1) * 64 : base ^ d << 5; };    // 32 d bytes on, permuted
    constexpr uint32_t ONE2 = std::is_same<T, bf16>::value ? 0x3f803f80u : 0x3c003c00u;
    const uint32_t ones[4] = {ONE2, ONE2, ONE2, ONE2};

    // Scores of this warp's positions.
    float s[SUBS][NT][4];
    #pragma unroll
    for (int u = 0; u < SUBS; u++) {
        #pragma unroll
        for (int n = 0; n < NT; n++) s[u][n][0] = s[u][n][1] = s[u][n][2] = s[u][n][3] = 0.0f;
        float odd[NT][4] = {};    // the sum of every second product: two chains, for their latency
        #pragma unroll
        for (int d = 0; d < D / 16; d++) {
            uint32_t a[4];
            load_matrix4(a, chunk_pair(stage + k_lane + u * 16 * ROW, d));
            #pragma unroll
            for (int n = 0; n < NT; n++) mma_16x8x16<T>(d % 2 ? odd[n] : s[u][n], a, q[n][d][0], q[n][d][1]);
        }
        #pragma unroll
        for (int n = 0; n < NT; n++)
            #pragma unroll
            for (int i = 0; i < 4; i++) s[u][n][i] += odd[n][i];
    }
    n_valid -= warp * 16 * SUBS;    // of this warp's positions
    float top[NT][2];
    #pragma unroll
    for (int n = 0; n < NT; n++) {
        top[n][0] = top[n][1] = -INFINITY;
        #pragma unroll
        for (int u = 0; u < SUBS; u++)
            #pragma unroll
            for (int i = 0; i < 4; i++) {
                float &x = s[u][n][i];
                if (n_valid < 16 * SUBS && u * 16 + g + 8 * (i >> 1) >= n_valid) x = -INFINITY;
                top[n][i & 1] = fmaxf(top[n][i & 1], x);
            }
        #pragma unroll
        for (int h = 0; h < 2; h++)
            #pragma unroll
            for (int x = 4; x < 32; x *= 2) top[n][h] = fmaxf(top[n][h], __shfl_xor_sync(~0u, top[n][h], x));
        if (g == 0) store_shared(tops + (warp * HEADS + n * 8 + 2 * t) * 4, make_float2(top[n][0], top[n][1]));
    }
    __syncthreads();    // all warps' largest scores are there

    // Weights, relative to the largest score so far.
    #pragma unroll
    for (int n = 0; n < NT; n++) {
        #pragma unroll
        for (int w = 0; w < 4; w++) {
            float2 x = load_shared_float2(tops + (w * HEADS + n * 8 + 2 * t) * 4);
            top[n][0] = fmaxf(top[n][0], x.x);
            top[n][1] = fmaxf(top[n][1], x.y);
        }
        float alpha[2];
        #pragma unroll
        for (int h = 0; h < 2; h++) {
            top[n][h] = fmaxf(top[n][h], now.m[n][h]);    // finite: a step has at least one position
            alpha[h] = exp2_fast((now.m[n][h] - top[n][h]) * scale_log2);
            now.m[n][h] = top[n][h];
            now.l[n][h] *= alpha[h];
        }
        #pragma unroll
        for (int i = 0; i < TILES; i++)
            #pragma unroll
            for (int j = 0; j < 4; j++) now.o[n][i][j] *= alpha[j & 1];
        #pragma unroll
        for (int u = 0; u < SUBS; u++)
            #pragma unroll
            for (int i = 0; i < 2; i++) {
                float x = exp2_fast((s[u][n][2 * i] - top[n][0]) * scale_log2), y = exp2_fast((s[u][n][2 * i + 1] - top[n][1]) * scale_log2);
                uint32_t hi = pack2<T>(x, y), row = (n * STEP + (warp * SUBS + u) * 16 + i * 8 + g) * 16 + t * 4;
                store_shared(weights + row, hi);
                store_shared(weights + NT * STEP * 16 + row, pack2_rest<T>(x, y, hi));
            }
    }
    __syncthreads();    // all weights are there

    // Output dims of this warp; their sum comes from the same product, with ones in place of V.
    float sums[NT][4] = {};
    float low[NT][TILES][4] = {}, low_sums[NT][4] = {};    // of the lower terms: again two chains
    #pragma unroll
    for (int k = 0; k < STEP / 16; k++) {
        uint32_t w[NT][4];    // hi of positions 0-7 and 8-15, lo of both
        #pragma unroll
        for (int n = 0; n < NT; n++) {
            load_matrix4_transposed(w[n], weights + ((lane >> 4) * NT * STEP + n * STEP + k * 16 + (lane & 15)) * 16);
            mma_16x8x16<T>(low_sums[n], ones, w[n][2], w[n][3]);
            mma_16x8x16<T>(sums[n], ones, w[n][0], w[n][1]);
        }
        #pragma unroll
        for (int i = 0; i < TILES; i++) {
            if (D / 16 % 4 && i * 4 + warp >= D / 16) break;
            uint32_t a[4], at = stage + V + v_lane + k * 16 * ROW;
            load_matrix4_transposed(a, D == 96 ? (at ^ (warp & 1) << 5) + (i * 4 + warp >> 1) * 64 : at ^ (i * 4 + warp) << 5);
            #pragma unroll
            for (int n = 0; n < NT; n++) {
                mma_16x8x16<T>(low[n][i], a, w[n][2], w[n][3]);
                mma_16x8x16<T>(now.o[n][i], a, w[n][0], w[n][1]);
            }
        }
    }
    #pragma unroll
    for (int n = 0; n < NT; n++) {
        sums[n][0] += low_sums[n][0];
        sums[n][1] += low_sums[n][1];
        #pragma unroll
        for (int i = 0; i < TILES; i++)
            #pragma unroll
            for (int j = 0; j < 4; j++) now.o[n][i][j] += low[n][i][j];
        now.l[n][0] += sums[n][0];
        now.l[n][1] += sums[n][1];
    }
}

// Computes: attention of one new token per sequence to its cache, in chunks of fixed length; appends K and V if asked.
// Reads:    q [seq][head][D], k_new and v_new [seq][kv head][D], the cache, all T; seq_lens [seq] int32.
// Writes:   out [seq][head][D] T (NaN for a sequence that would overflow its cache); with append, row seq_lens[seq] of K
//           and V; for groups that several blocks share, part_ml and part_o [seq][head][chunk], float32, and arrived.
// Grid:     as many blocks of 128 threads as fit on the GPU, each with an even share of the work; a warp owns a quarter
//           of a step's positions in the scores and every fourth 16 dims of the output.
// Requires: head_dim = D, group <= 8 NT * head_blocks, 16-byte rows, scale > 0, arrived = 0; shared memory of decode_smem_bytes,
//           and in clusters decode_sent_bytes.
// Two blocks per SM, which the launcher sees to. Were there room for a third, blocks of the next call would wait in it, then
// three of them be on one SM and one on another: B = 64 at 2048 took a third longer. Nor did room for a whole second call help:
// one block on an SM cannot keep up, and blocks of half the step need more time for their steps than they save at the ends.
template <typename T, int D, int NT, int STAGES>
__global__ void __launch_bounds__(DECODE_THREADS, 2) decode_kernel(const __grid_constant__ DecodeParams p) {
    constexpr int STEP = decode_step<D>(), HEADS = 8 * NT, TILES = (D / 16 + 3) / 4, V = STEP * D * 2, CHUNKS = D / 8, STAGE = decode_stage_bytes<D>();
    constexpr int Q_PITCH = decode_q_pitch<D>();
    typedef DecodeState<NT, TILES> State;
    extern __shared__ __align__(1024) char smem[];
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    uint32_t ring = smem_address(smem), weights = ring + STAGES * STAGE, tops = weights + 2 * NT * STEP * 16, queries = tops + 4 * HEADS * 4;
    char *sent = smem + decode_smem_bytes<D, NT>(STAGES);    // barrier, and results

    if (!p.settled) {
        wait_for_previous_kernel();
        let_next_kernel_start();
    }
    DecodeCursor item;
    // Where this thread's 16 bytes of the group's queries are: of head threadIdx.x / CHUNKS, and of every QUERY_STEP-th from there.
    constexpr int QUERY_STEP = DECODE_THREADS / CHUNKS;
    const bool loads_q = threadIdx.x < QUERY_STEP * CHUNKS;
    auto own_query = [&](const DecodeCursor &at) {
        int head = at.kv_head * p.group + at.head_block * HEADS + threadIdx.x / CHUNKS;
        return (const T *)p.q + at.seq * p.q_token_stride + head * p.q_head_stride + threadIdx.x % CHUNKS * 8;
    };
    item.start(p, lane, [&](const DecodeCursor &usual) {    // to L2 with them, ahead of all the keys and values
        if (p.head_blocks == 1 && loads_q && threadIdx.x / CHUNKS < p.group && usual.seq < p.n_seq) prefetch_L2(own_query(usual));
    });
    DecodeCopies<T, D> ahead;
    ahead.start(p, item);
    DecodeNew mine;          // of the new tokens that are left out before the wait: the one of step threadIdx.x / CHUNKS
    bool new_is_late = false;    // does any of these steps but the last have one?
    #pragma unroll 1
    for (int i = 0; i < STAGES; i++) {
        if (!ahead.done()) {
            DecodeNew left_out(p, ahead.item, ahead.pos, STEP);
            if (threadIdx.x / CHUNKS == i) mine = left_out;
            if (i + 1 < STAGES) new_is_late |= left_out.row >= 0;
            ahead.copy(p, ring + i * STAGE, false);
        }
        if (i + 1 < STAGES) copy_async_commit();
    }
    const bool sends = item.within && (int)blockIdx.x != item.owner;
    uint32_t send_to = 0;
    if (item.within) {
        send_to = of_first_in_cluster(smem_address(sent));
        if (!sends && threadIdx.x == 0) {
            int eights = (item.n_chunks + 7) / 8 - item.n_chunks / 2 / 8;    // of the second block
            expect_bytes(smem_address(sent), eights * DECODE_THREADS * State::PIECES * 16);
        }
        cluster_arrive();    // the first block's barrier is there
    }
    const T *query = own_query(item);
    if (item.left > 0 && !item.within) {    // to L2 what is small and needed at the end: the counter and the place of the first results
        int head0 = item.kv_head * p.group + item.head_block * HEADS, rows = min(HEADS, p.group - item.head_block * HEADS), i = threadIdx.x;
        if (i < rows) prefetch_L2(p.part_ml + ((size_t)item.seq * p.n_heads + head0 + i) * p.max_chunks + item.chunk);
        if (i == rows) prefetch_L2(p.arrived + item.owner);
    }
    wait_for_previous_kernel();    // from here on q, k_new and v_new are there, and all may be written
    let_next_kernel_start();
    if (item.within) cluster_wait();
    if (mine.row >= 0) {
        uint32_t tile = ring + threadIdx.x / CHUNKS * STAGE;
        mine.load<T, D>(p, tile, tile + V, threadIdx.x % CHUNKS);
    }
    copy_async_commit();

    int n_shared = 0;        // groups that it shares with others
    bool first = true;       // step of all
    uint32_t stage = ring, before = ring;    // of this step and of the one before
    int early = STAGES - 1;  // steps to come of those but the last that were copied before the wait
    uint32_t q[NT][D / 16][2];
    State now;
    DecodeFold<State> fold;

    while (item.left > 0) {    // groups
        int head0 = item.kv_head * p.group + item.head_block * HEADS, rows = min(HEADS, p.group - item.head_block * HEADS);
        // Queries to shared memory; zeros where there are none.
        for (int head = threadIdx.x / CHUNKS; loads_q && head < HEADS; head += QUERY_STEP, query += QUERY_STEP * p.q_head_stride)
            store_shared16(queries + head * Q_PITCH + threadIdx.x % CHUNKS * 16, head < rows ? __ldcg((const uint4 *)query) : make_uint4(0, 0, 0, 0));
        const int n = item.count();
        const bool whole = n == item.n_chunks || item.within;    // does this block, or its cluster, do all chunks of the group?
        bool eight = false;                                      // or at least this block all of the present eight?
        const int append_from = p.append && item.head_block == 0 ? item.total - STEP : INT_MAX;    // the step that has the new token
        if (!whole) decode_share(p, item, HEADS, n_shared++);
        __syncthreads();
        #pragma unroll
        for (int c = 0; c < NT; c++)
            #pragma unroll
            for (int d = 0; d < D / 16; d += 2)
                load_matrix4(q[c][d], q[c][d + 1], queries + (c * 8 + (lane & 7)) * Q_PITCH + (2 * d + (lane >> 3)) * 16);
        size_t first_head = (size_t)item.seq * p.n_heads + head0;
        auto each = [&](auto body) {    // body(column block, which of its two heads, head) for what this thread owns
            #pragma unroll
            for (int c = 0; c < NT; c++)
                #pragma unroll
                for (int h = 0; h < 2; h++)
                    if (c * 8 + 2 * t + h < rows) body(c, h, c * 8 + 2 * t + h);
        };
        #pragma unroll 1
        for (int chunk = item.chunk; chunk < item.chunk + n; chunk++) {
            #pragma unroll
            for (int c = 0; c < NT; c++) {
                now.m[c][0] = now.m[c][1] = -INFINITY;
                now.l[c][0] = now.l[c][1] = 0.0f;
                #pragma unroll
                for (int i = 0; i < TILES; i++) now.o[c][i][0] = now.o[c][i][1] = now.o[c][i][2] = now.o[c][i][3] = 0.0f;
            }
            const int end = min(item.total, (chunk + 1) << item.log2);
            #pragma unroll 1
            for (int pos = chunk << item.log2; pos < end; pos += STEP) {
                if (__builtin_expect(early-- > 0, 0)) {
                    if (new_is_late) copy_async_wait<0>();    // new tokens came with the last of them
                    else if (first) copy_async_wait<STAGES - 1>();
                    else copy_async_wait<STAGES - 2>();
                } else copy_async_wait<STAGES - 2>();
                __syncthreads();    // everyone's copies of this step have landed; everyone is done with the step before
                const bool copies = !first & !ahead.done(), appends = pos >= append_from;
                if (copies | appends) {
                    if (copies) ahead.copy(p, before, true);
                    if (appends && threadIdx.x < 2 * CHUNKS)
                        decode_append<T, D>(p, item, threadIdx.x < CHUNKS ? stage : stage + V, item.total - 1 - pos, threadIdx.x >= CHUNKS, threadIdx.x % CHUNKS);
                }
                if (!first) copy_async_commit();    // if of nothing, as they are counted
                first = false;

                decode_accumulate<T, D>(now, q, stage, weights, tops, end - pos, p.scale_log2);
                before = stage;
                stage = stage == ring + (STAGES - 1) * STAGE ? ring : stage + STAGE;
            }

            // The chunk is done: fold it, or leave it for the fold.
            #pragma unroll
            for (int c = 0; c < NT; c++) now.m[c][0] *= p.scale_log2, now.m[c][1] *= p.scale_log2;
            const int in_eight = (unsigned)chunk % 8;
            if (__builtin_expect(whole, 1)) {
                if (!fold.add_to_eight(now, chunk, item.n_chunks)) continue;
                if (sends) fold.eight.send(send_to + 16 + ((unsigned)(chunk - item.chunk) / 8 * State::PIECES * DECODE_THREADS + threadIdx.x) * 16, send_to);
                else fold.add_eight(chunk);
                continue;
            }
            // Eight chunks that lie in this block are left as one.
            if (chunk == item.chunk || in_eight == 0) eight = in_eight == 0 && min(chunk + 8, item.n_chunks) <= item.chunk + n;
            if (eight && in_eight > 0) fold.eight.add(now);
            else fold.eight = now;
            if (eight && in_eight < 7 && chunk + 1 < item.n_chunks) continue;
            int slot = eight ? chunk - in_eight : chunk;
            each([&](int c, int h, int head) {
                size_t part = (first_head + head) * p.max_chunks + slot;
                decode_store_row<float, D>(p.part_o + part * D, fold.eight.o[c], h, warp, g, [](float x) { return x; });
                if (warp + g == 0) {
                    p.part_ml[part] = make_float2(fold.eight.m[c][h], fold.eight.l[c][h]);
                    if (slot < chunk) p.part_ml[part + 1] = make_float2(0.0f, DECODE_IN_EIGHT);
                }
            });
        }
        if (item.within) {    // it is the block's only group
            if (sends) break;
            wait_for_bytes(smem_address(sent));
            for (int i = 0; i < (item.n_chunks - n + 7) / 8; i++) {    // its eights
                now.receive((const float4 *)(sent + 16) + i * State::PIECES * DECODE_THREADS + threadIdx.x);
                fold.all.add(now);
            }
        }
        if (whole)
            each([&](int c, int h, int head) {
                float inverse = __frcp_rn(fold.all.l[c][h]);
                decode_store_row<T, D>((T *)p.out + item.seq * p.out_token_stride + (head0 + head) * p.out_head_stride, fold.all.o[c], h, warp, g,
                                       [=](float x) { return from_fold<T>(x, inverse); });
            });
        item.next(p, n);
        if (item.left > 0) query = own_query(item);
    }
    if (n_shared) decode_arrive<T, D>(p, n_shared);
    if (item.refused) decode_refuse<T, D>(p);
}
