// Decode attention, one new token per sequence: the protocol, and which block computes what.
//
// A sequence's positions are cut into KV splits of a fixed length (decode_plan.h). A query tile is the query heads of
// one sequence and one KV head, as many as the kernel takes at once (8 NT in 16 bits, 4 in float32; more heads are more
// tiles). A work item is one KV split of one query tile. As many blocks as the GPU holds take a range of neighbouring
// items each, all about equally long. The splits of a query tile are combined in their order by groups of 8, first
// within the groups, then the groups: in registers where one block has all of them, or the two blocks of a cluster;
// else from the workspace, by the block that finishes last. The operations are the same everywhere. So nothing depends
// on what else is in the batch: a sequence gets the same bits alone and among others. Several new tokens per sequence:
// decode_rows.cuh.
//
// ---- Programmatic dependent launch ----------------------------------------------------------------------------------
//
// Calls follow one another closely: a call's blocks take the places of the last call's one by one, before that is
// complete.
//
//   before its wait (griddepcontrol.wait)    if kv_stable: finds its range, fills its ring with keys and values of
//                                            positions before the new one. Reads lengths, block table and cache; writes
//                                            no global memory
//   after it                                 reads q, k_new and v_new; writes the cache (append), workspace and out
//   let_next_kernel_start                    right after the wait, by every block, also by one without work: no call
//                                            ends before the one before
//
// When a call follows another, or any kernel that lets the next start after its own wait only, just that one can be
// incomplete, whatever came earlier: it is all that kv_stable speaks of.
//
// ---- Barriers of a block of the 16-bit kernel, four warps -----------------------------------------------------------
//
//   barrier                     arrivals                           waits              protects
//   cp.async groups             the thread's own copies of a step  the same thread    its part of a stage of the ring
//   __syncthreads, each step    all, past their copies' wait       all                the stage: landed for all; of
//                                                                                     the step before may be filled
//   __syncthreads, each step    largest scores written             all                `tops` of the four warps
//   __syncthreads, each step    weights written                    all                `weights`, read by all warps
//   __syncthreads, each tile    queries written                    all                `queries`
//   cluster barrier, once       all threads of both blocks         the same           mbarrier is initialised
//   mbarrier, first block       1: thread 0; bytes from the        all threads of     the second block's groups, in
//                               second block's st.async            the first block    shared memory of the first
//   arrived[first_block]        splits of each block that has      nobody: the last   partial_ml, partial_o
//                               a part of the query tile           one combines
//
// ---- Shared memory, LLaMA 3.1 8B (head_dim 128, 4 query heads: NT = 1) ----------------------------------------------
//
//     offset    bytes   what
//          0   65,536   ring, 2 stages of K and V, 64 positions each
//     65,536    2,048   weights P, 16-bit [hi, lo][position][8 heads]
//     67,584      128   largest scores, float [warp][8 heads]
//     67,712    2,176   queries [8 heads][272 bytes]
//     69,888   12,304   in clusters: mbarrier (16), the second block's groups [2][3][128 threads][16 bytes]
//     82,192            twice this and 2 KB for the system fit the 228 KB of an SM; never three times (decode_plan.h)
//
// ---- Global memory --------------------------------------------------------------------------------------------------
//
//   buffer               written by                       read by                      order
//   cache, old rows      calls before, or a prompt        copies, before the wait      kv_stable (attention.h)
//   cache, the new row   the block that has its step, of  nobody in this call: all     -
//                        head tile 0                      take it from k_new, v_new
//   partial_ml, _o       each block: splits, or whole     the last block, from L2      __syncthreads, atom.acq_rel
//                        groups, of query tiles that                                   by one thread, atom.acq_rel,
//                        others have a part of                                         __syncthreads
//   arrived[]            atom.acq_rel                     the same                     the last one sets it to 0 for
//                                                                                      the next call, which waits
//
// A block shares two query tiles with others at most: the first and the last of its range. The counter of a tile is
// that of the block with its first split, and a block has the first split of one shared tile at most: no counter serves
// two.
//
// ---- Why it cannot deadlock -----------------------------------------------------------------------------------------
//
// No block waits for another, but for a cluster's: the hardware starts both or none. The first waits for the second's
// bytes; the second waits for nothing after the cluster barrier, and the first does not end before they have arrived,
// so that its shared memory is there. A block that shares a tile counts and leaves; whoever comes last has all there
// is.
#pragma once

#include "cache.cuh"
#include "decode_plan.h"

static_assert(decode_smem_bytes(128, 1, 2) == 69888 && decode_cluster_bytes(128, 1) == 12304,
              "the table of shared memory");
static_assert(two_blocks_fit(82192, 228 * 1024) && !two_blocks_fit(228 * 1024 / 2, 228 * 1024), "two blocks on an SM");
static_assert(kv_splits(131072) == 32 && max_kv_splits(131072) == 32, "contexts that are promised, in 32 KV splits");
static_assert(CLUSTER_MAX_GROUPS * KV_GROUP == 32, "clusters serve them");
static_assert(DECODE_THREADS == 4 * 32, "four warps: `tops`, out_tiles and the last block's combining count on them");

// What a block needs to begin is together, at the front.
struct DecodeParams {
    int n_seq, n_heads, heads_per_kv, head_tiles; // head_tiles: query tiles of one sequence and KV head
    int cache_max_len, max_splits, append;
    int kv_stable;                                // cache, table and lengths may be read before the wait
    int cluster, blocks_per_tile, tiles_fill_gpu; // see DecodePlan
    float scale_log2;
    const int *seq_lens; // [seq] positions in the cache before the new token
    Cache<char> cache;
    const void *q;
    void *out;                 // [seq][head][D]
    const void *k_new, *v_new; // [seq][kv head][D]
    int64_t q_token_stride, q_head_stride, out_token_stride, out_head_stride;
    int64_t k_token_stride, k_head_stride, v_token_stride, v_head_stride;
    unsigned *arrived;  // [block] splits done of the query tile that starts in the block
    float2 *partial_ml; // [seq][head][max_splits]: largest score (log2), sum of weights
    float *partial_o;   // [seq][head][max_splits][D]: weighted sum of V
    // Several new tokens per sequence (decode_rows.cuh); seq above is then the token.
    const int *q_start;  // [seq+1] first new token of each
    int n_new, n_tokens; // of a sequence and in all, at most
};

// Positions that sequence seq attends to, the new one included; 0 for one that would overflow its cache.
__device__ __forceinline__ int total_after(const DecodeParams &p, int seq_len) {
    int total = seq_len + 1;
    return total >= 1 && total <= p.cache_max_len ? total : 0;
}
__device__ __forceinline__ int decode_total(const DecodeParams &p, int seq) {
    return total_after(p, load_l2(p.seq_lens + seq));
}
// Units of a query tile.
__device__ __forceinline__ unsigned tile_work(int total) {
    return kv_splits(total) * kv_split_work(total);
}

// x / y for x < 2^18: the quotient of x + 1/2 is at least 1/(2y) away from a whole number, the error of the division
// less.
__device__ __forceinline__ unsigned small_quotient(unsigned x, unsigned y) {
    return (unsigned)__fdividef((float)x + 0.5f, (float)y);
}

// Where a column of a query tile is: the token, which is the row of q and out, and the query head.
struct DecodeColumn {
    int token, head;
};

// A query tile of which this block has some splits and others have the rest: the first or the last of the block's
// range.
struct SharedTile {
    int seq, head0, rows, n_splits, first_block, visited; // rows: its query heads; visited: splits of this block
    int is_last;

    __device__ __forceinline__ DecodeColumn column(const DecodeParams &, int i) const {
        return {seq, head0 + i};
    }
    __device__ __forceinline__ int splits(const DecodeParams &, int) const { // of that column
        return n_splits;
    }
};

// Where a block is in its range of items: split innermost, then head tile, KV head, sequence.
struct DecodeCursor {
    static constexpr bool ROWS = false; // one new token per sequence
    typedef SharedTile Shared;
    int seq, kv_head, head_tile, split;
    int total, n_splits; // of seq
    int split_log2;      // of the length of its splits
    int cache_block;     // of the cache that has seq, if one has it all; else its row of the block table
    int work_left;       // units of this block, the present item included; its items begin in its range
    int first_block;     // the block that has the query tile's first split: its counter is the tile's
    bool in_cluster;     // does the block's cluster share the tile, each block having whole groups?
    bool overflow;       // is there a sequence that would overflow its cache?

    // The next sequences' lengths are at hand in the lanes of every warp, for a load from L2 takes as long as a
    // quarter of a step: lane i has those of sequence `near + i`.
    int near, near_length, near_block; // near_block: its cache_block

    // What the schedules depend on: all sequences' lengths, read by every warp for itself, at once up to MANY. Lane i
    // has sequences i, i + 32 and so on; more are gone through again where they are needed. (H200: a block has its range
    // after 0.7 us of one sequence, 1.1 of 32, 2.1 of 64, 3 of 256; then the first two steps' copies take 1.5 to 2.7.)
    static constexpr int ROUNDS = 8, MANY = 32 * ROUNDS;
    struct Lengths {
        bool few;                  // 32 sequences at most
        int length[ROUNDS];        // of the lane's sequences; without meaning where there is none
        int block;                 // the first one's cache_block
        unsigned sum, least, most; // units of a query tile: of all sequences together, of the shortest and the longest
    };

    // The block's range. Equal lengths: a part of one query tile, or whole query tiles; else an even part of the work,
    // wherever that begins and ends. No copy can start before it is found, so the usual case, p.blocks_per_tile for
    // each tile, is ready but for the lengths when these arrive; meanwhile(*this) runs until they do, when seq and
    // kv_head are those of that case (a seq too large for a block without work; kv_head counts head tiles too).
    template <class F> __device__ __forceinline__ void start(const DecodeParams &p, int lane, F meanwhile) {
        unsigned per_seq = p.cache.n_kv_heads * p.head_tiles, blocks = p.blocks_per_tile;
        unsigned tile = small_quotient(blockIdx.x, max(blocks, 1)), part = blockIdx.x - tile * blocks;
        Lengths l;
        l.few = p.n_seq <= 32;
        l.length[0] = load_l2(p.seq_lens + min(lane, p.n_seq - 1));
        if (!l.few)
#pragma unroll
            for (int j = 1; j < ROUNDS; j++)
                if (32 * j < p.n_seq) l.length[j] = load_l2(p.seq_lens + min(32 * j + lane, p.n_seq - 1));
        l.block = block_of(p, min(lane, p.n_seq - 1));
        first_block = tile * blocks;
        seq = small_quotient(tile, per_seq);
        kv_head = tile - seq * per_seq;
        head_tile = 0;
        meanwhile(*this);
        l.length[0] = total_after(p, l.length[0]);
        if (!l.few)
#pragma unroll
            for (int j = 1; j < ROUNDS; j++) l.length[j] = total_after(p, l.length[j]);
        measure(p, lane, l);
        unsigned work = l.sum * per_seq;
        in_cluster = false;
        overflow = l.least == 0;
        work_left = 0;
        if (work == 0) return;
        if (l.least == l.most && blocks > 0 && start_in_tile(p, l, lane, tile, part, work)) return;
        start_anywhere(p, l, lane, work);
    }
    __device__ __forceinline__ static void measure(const DecodeParams &p, int lane, Lengths &l) {
        unsigned mine = tile_work(l.length[0]);
        int equal;
        __match_all_sync(~0u, mine, &equal);
        if (l.few && equal) {
            l.sum = mine * p.n_seq;
            l.least = l.most = mine;
            return;
        }
        l.sum = lane < p.n_seq ? mine : 0;
        l.least = l.most = mine;
        auto count = [&](int length) {
            mine = tile_work(length);
            l.sum += mine;
            l.least = min(l.least, mine);
            l.most = max(l.most, mine);
        };
        if (!l.few) {
#pragma unroll
            for (int j = 1; j < ROUNDS; j++)
                if (32 * j + lane < p.n_seq) count(l.length[j]);
            for (int i = MANY + lane; i < p.n_seq; i += 32) count(decode_total(p, i));
        }
        l.sum = __reduce_add_sync(~0u, l.sum);
        l.least = __reduce_min_sync(~0u, l.least);
        l.most = __reduce_max_sync(~0u, l.most);
    }
    // Equal lengths: part `part` of query tile `tile`. False if that is too uneven a partition.
    __device__ __forceinline__ bool start_in_tile(const DecodeParams &p, const Lengths &l, int lane, unsigned tile,
                                                  unsigned part, unsigned work) {
        unsigned per_seq = p.cache.n_kv_heads * p.head_tiles, blocks = p.blocks_per_tile, n = kv_splits(l.length[0]),
                 split_work = kv_split_work(l.length[0]);
        bool alone = n <= 2 && p.tiles_fill_gpu;
        if (alone || n < blocks) {
            blocks = alone ? 1 : n;
            tile = small_quotient(blockIdx.x, blocks);
            part = blockIdx.x - tile * blocks;
            first_block = tile * blocks;
            seq = small_quotient(tile, per_seq);
            kv_head = tile - seq * per_seq;
        }
        unsigned longest = small_quotient(n + blocks - 1, blocks) * split_work;
        if (!alone && !partition_is_even(longest, gridDim.x, work) && (longest - 1) * gridDim.x >= work) return false;
        if (tile >= p.n_seq * per_seq) return true;
        split = small_quotient(part * n, blocks);
        work_left = (small_quotient((part + 1) * n, blocks) - split) * split_work;
        in_cluster = blocks == 2 && p.cluster == 2 && halves_are_groups(n);
        come_near(p, l, lane);
        look_up(p);
        find(p);
        return true;
    }
    // Whole query tiles if all are equally long and that is even enough, else an even part of the work.
    __device__ __forceinline__ void start_anywhere(const DecodeParams &p, const Lengths &l, int lane, unsigned work) {
        const unsigned per_seq = p.cache.n_kv_heads * p.head_tiles;
        first_block = blockIdx.x;
        unsigned share = work / gridDim.x, rest = work - share * gridDim.x;
        if (l.least == l.most) {
            unsigned even = (share + (rest > 0) + l.most - 1) / l.most * l.most;
            if (partition_is_even(even, gridDim.x, work)) {
                share = even;
                rest = 0;
            }
        }
        unsigned at = share * blockIdx.x + min(blockIdx.x, rest);
        if (at >= work) return;
        work_left = min(share + (blockIdx.x < rest), work - at);
        if (work_left == 0) return;
        unsigned index = at;
        // Find the 32 sequences, and among them the one, that have `at`.
        auto work_of = [&](int i, int length) { return i < p.n_seq ? tile_work(length) : 0; };
        int base = 0;
        unsigned mine = work_of(lane, l.length[0]), all = 0;
        int length = l.length[0];
        auto go_on = [&](int next) { // past the 32 from `base` on
            at -= all * per_seq;
            base += 32;
            length = next;
            mine = work_of(base + lane, length);
        };
        if (!l.few) {
#pragma unroll
            for (int j = 1; j < ROUNDS; j++)
                if (base == 32 * (j - 1) && (all = __reduce_add_sync(~0u, mine)) * per_seq <= at) go_on(l.length[j]);
            if (base == MANY - 32)
                while ((all = __reduce_add_sync(~0u, mine)) * per_seq <= at)
                    go_on(base + 32 + lane < p.n_seq ? decode_total(p, base + 32 + lane) : 0);
        }
        unsigned upto = mine;
#pragma unroll
        for (int x = 1; x < 32; x *= 2) {
            unsigned y = __shfl_up_sync(~0u, upto, x);
            if (lane >= x) upto += y;
        }
        const int first = __ffs(__ballot_sync(~0u, upto * per_seq > at)) - 1;
        seq = base + first;
        at -= __shfl_sync(~0u, upto - mine, first) * per_seq;
        come_near(p, l, lane);
        total = __shfl_sync(~0u, length, first);
        cache_block = l.few ? __shfl_sync(~0u, near_block, first) : block_of(p, seq);
        unsigned log2_work = kv_split_log2(total) - 7, work_of_tile = kv_splits(total) << log2_work;
        kv_head = at / work_of_tile;
        at -= kv_head * work_of_tile;
        split = (at + (1 << log2_work) - 1) >> log2_work;
        find(p);
        if (at > 0) { // `at` is within a query tile, maybe within a split: that one belongs to the block before
            index -= at;
            first_block =
                index < rest * (share + 1) ? index / (share + 1) : rest + (index - rest * (share + 1)) / share;
            work_left -= (split << log2_work) - at;
            if (split == n_splits) { // on to the next query tile
                split--;
                work_left += 1 << (split_log2 - 7);
                next(p);
            }
        }
    }
    __device__ __forceinline__ void start(const DecodeParams &p, int lane) {
        start(p, lane, [](const DecodeCursor &) {});
    }
    __device__ __forceinline__ static int block_of(const DecodeParams &p, int seq) {
        int row = table_row(p.cache, seq);
        return p.cache.table && p.cache.table_width == 1 ? load_l2(p.cache.table + row) : row;
    }
    // Sequences from `near` on are in the lanes: all of few, else those from the present one on.
    __device__ __forceinline__ void come_near(const DecodeParams &p, const Lengths &l, int lane) {
        near = 0;
        near_length = l.length[0];
        near_block = l.block;
        if (!l.few) {
            const int mine_is = min(seq + lane, p.n_seq - 1);
            near = seq;
            near_length = decode_total(p, mine_is);
            near_block = block_of(p, mine_is);
        }
    }
    __device__ __forceinline__ void look_up(const DecodeParams &p) { // of the present sequence
        const bool at_hand = seq - near < 32;
        total = at_hand ? __shfl_sync(~0u, near_length, seq - near) : decode_total(p, seq);
        cache_block = at_hand ? __shfl_sync(~0u, near_block, seq - near) : block_of(p, seq);
    }
    // The rest of a place: kv_head counts head tiles as well.
    __device__ __forceinline__ void find(const DecodeParams &p) {
        split_log2 = kv_split_log2(total);
        n_splits = (total + (1 << split_log2) - 1) >> split_log2;
        head_tile = 0;
        if (p.head_tiles > 1) {
            head_tile = kv_head % p.head_tiles;
            kv_head /= p.head_tiles;
        }
    }
    __device__ __forceinline__ void next(const DecodeParams &p, int n = 1) { // n splits of this query tile on
        work_left -= n << (split_log2 - 7);
        if (work_left <= 0 || (split += n) < n_splits) return;
        split = 0;
        first_block = blockIdx.x;
        if (++head_tile < p.head_tiles) return;
        head_tile = 0;
        if (++kv_head < p.cache.n_kv_heads) return;
        kv_head = 0;
        do {
            seq++;
            look_up(p);
        } while (total == 0); // there is another item, so there is another sequence
        split_log2 = kv_split_log2(total);
        n_splits = (total + (1 << split_log2) - 1) >> split_log2;
    }
    __device__ __forceinline__ int begin() const {
        return split << split_log2;
    }
    __device__ __forceinline__ int end() const {
        return min(total, (split + 1) << split_log2);
    }
    // Positions of the sequence that are in the cache before the call.
    __device__ __forceinline__ int cached(const DecodeParams &p) const {
        return total - p.append;
    }
    __device__ __forceinline__ bool is_new(const DecodeParams &p, int pos) const { // not in the cache yet
        return p.append && pos == total - 1;
    }
    __device__ __forceinline__ int token(int) const { // the new one at a position
        return seq;
    }
    // Of the query tile: its columns, of up to `heads`; where one is; what others need to know to combine it.
    __device__ __forceinline__ int columns(const DecodeParams &p, int heads) const {
        return min(heads, p.heads_per_kv - head_tile * heads);
    }
    __device__ __forceinline__ DecodeColumn column(const DecodeParams &, int head0, int i) const {
        return {seq, head0 + i};
    }
    __device__ __forceinline__ SharedTile share(const DecodeParams &p, int heads) const {
        return {seq, kv_head * p.heads_per_kv + head_tile * heads, columns(p, heads), n_splits, first_block, count(),
                0};
    }
    // Is split i of this query tile the block's too?
    __device__ __forceinline__ bool reaches(int i) const {
        return work_left > (i - split) << (split_log2 - 7);
    }
    __device__ __forceinline__ int count() const { // splits of this query tile from here on that are the block's
        return min(n_splits - split, (work_left + (1 << (split_log2 - 7)) - 1) >> (split_log2 - 7));
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
