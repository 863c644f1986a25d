// Decode: which block computes what.
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
    int total = load_l2(p.seq_lens + seq) + 1;
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
        return p.cache.table && p.cache.table_width == 1 ? load_l2(p.cache.table + seq) : seq;
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
