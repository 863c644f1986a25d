// Decode attention, several new tokens per sequence (candidates to be verified): which block computes what. The
// protocol is that of decode_schedule.cuh.
//
// Columns of a query tile are pairs of a new token and a query head, the tokens of a sequence one after another, 8 NT
// columns at most; more are further tiles. All columns of a tile walk over the same steps, up to the last token's
// position; each has weights of 0 from its own end on. Neither these nor a KV split without any position of a column
// change a bit of its sums: they are those of a call with that token alone, if the length of KV splits is the same.
// Tokens of one sequence on both sides of a length where KV splits get longer are two groups, computed like two
// sequences; there is at most one such length among 8.
//
// With several query tiles per KV head as many neighbouring blocks are a team. The teams have ranges of work, as blocks
// do elsewhere; block i of a team takes the i-th query tile of its range, so that keys and values come from memory once
// and for the others of the team from L2. A sequence without columns in the block's tile is passed over.
#pragma once

#include "decode_schedule.cuh"

// New tokens of a sequence that are computed together.
struct DecodeGroup {
    int before, first_token; // positions in the cache; the sequence's first new token
    int wanted, fit;         // new tokens of the sequence, and those that its cache has room for
    int first, n;            // the group's, of these
    int total;               // positions that the last one attends to; 0: an empty group

    // i: a sequence, or n_seq more: what its first group leaves.
    __device__ __forceinline__ DecodeGroup(const DecodeParams &p, int i) {
        int seq = i < p.n_seq ? i : i - p.n_seq;
        before = load_l2(p.seq_lens + seq);
        first_token = load_l2(p.q_start + seq);
        wanted = load_l2(p.q_start + seq + 1) - first_token;
        fit = min(min(wanted, p.n_new), min(p.cache_max_len - before, p.n_tokens - first_token));
        if (before < 0 || first_token < 0) fit = 0;
        int n_first = fit > 0 ? rows_of_equal_splits(before, fit) : 0;
        first = i < p.n_seq ? 0 : n_first;
        n = i < p.n_seq ? n_first : fit - n_first;
        total = n > 0 ? before + first + n : 0;
    }
    __device__ __forceinline__ bool two() const { // is there a second one?
        return fit > first + n;
    }
};

struct SharedRows {
    int token0, head0, group, column0; // the group's first token, the KV head's first query head and number of them
    int n_tokens, total, rows, n_splits, first_block, visited, is_last;

    __device__ __forceinline__ DecodeColumn column(const DecodeParams &, int i) const {
        int j = small_quotient(column0 + i, group);
        return {token0 + j, head0 + column0 + i - j * group};
    }
    __device__ __forceinline__ int splits(const DecodeParams &, int i) const {
        return kv_splits(total - (n_tokens - 1) + (int)small_quotient(column0 + i, group));
    }
};

// COLUMNS: of a query tile, at most.
template <int COLUMNS> struct DecodeRowsCursor : DecodeCursor {
    static constexpr bool ROWS = true;
    typedef SharedRows Shared;

    int group;               // see DecodeGroup
    int before, first_token; // of the sequence
    int first, n_tokens;     // of the group

    __device__ __forceinline__ void enter(const DecodeParams &p, int i) {
        DecodeGroup g(p, i);
        group = i;
        seq = i < p.n_seq ? i : i - p.n_seq;
        before = g.before;
        first_token = g.first_token;
        first = g.first;
        n_tokens = g.n;
        total = g.total;
        split_log2 = kv_split_log2(total);
        n_splits = kv_splits(total);
        cache_block = block_of(p, seq);
    }
    // The block's range: its team's even part of the work.
    __device__ __forceinline__ void start(const DecodeParams &p, int lane) {
        unsigned tiles = p.head_tiles, team = blockIdx.x / tiles, teams = gridDim.x / tiles, sum = 0;
        bool two = false, refuses = false;
        for (int i = lane; i < p.n_seq; i += 32) {
            DecodeGroup g(p, i);
            sum += tile_work(g.total);
            two |= g.two();
            refuses |= g.wanted > g.fit;
        }
        two = __any_sync(~0u, two);
        overflow = __any_sync(~0u, refuses);
        int n_groups = two ? 2 * p.n_seq : p.n_seq;
        for (int i = p.n_seq + lane; i < n_groups; i += 32) sum += tile_work(DecodeGroup(p, i).total);
        unsigned work = __reduce_add_sync(~0u, sum) * p.cache.n_kv_heads;
        in_cluster = false;
        head_tile = blockIdx.x - team * tiles;
        first_block = blockIdx.x;
        work_left = seq = kv_head = split = total = n_splits = cache_block = n_tokens = first = before = 0;
        split_log2 = 7;
        unsigned share = work / teams, rest = work - share * teams, at = share * team + min(team, rest);
        if (at >= work) return;
        work_left = min(share + (team < rest), work - at);
        if (work_left == 0) return;
        unsigned index = at;
        for (int base = 0;; base += 32) { // find the group that has `at`
            unsigned mine = base + lane < n_groups ? tile_work(DecodeGroup(p, base + lane).total) : 0, upto = mine;
#pragma unroll
            for (int x = 1; x < 32; x *= 2) {
                unsigned y = __shfl_up_sync(~0u, upto, x);
                if (lane >= x) upto += y;
            }
            unsigned beyond = __ballot_sync(~0u, upto * p.cache.n_kv_heads > at);
            if (beyond) {
                int lane_of = __ffs(beyond) - 1;
                at -= __shfl_sync(~0u, upto - mine, lane_of) * p.cache.n_kv_heads;
                enter(p, base + lane_of);
                break;
            }
            at -= __shfl_sync(~0u, upto, 31) * p.cache.n_kv_heads;
        }
        unsigned log2_work = split_log2 - 7, work_of_tile = n_splits << log2_work;
        kv_head = at / work_of_tile;
        at -= kv_head * work_of_tile;
        split = (at + (1 << log2_work) - 1) >> log2_work;
        if (at > 0) { // `at` is within a query tile, maybe within a split: that one belongs to the team before
            index -= at;
            unsigned first_team =
                index < rest * (share + 1) ? index / (share + 1) : rest + (index - rest * (share + 1)) / share;
            first_block = first_team * tiles + head_tile;
            work_left -= (split << log2_work) - at;
            if (split == n_splits) { // on to the next query tile
                split--;
                work_left += 1 << log2_work;
                advance(p, 1);
            }
        }
        pass_over(p);
    }
    __device__ __forceinline__ void advance(const DecodeParams &p, int n) { // n splits of this query tile on
        work_left -= n << (split_log2 - 7);
        if (work_left <= 0 || (split += n) < n_splits) return;
        split = 0;
        first_block = blockIdx.x;
        if (++kv_head < p.cache.n_kv_heads) return;
        kv_head = 0;
        do enter(p, group + 1);
        while (total == 0); // there is another item, so there is another group
    }
    __device__ __forceinline__ void pass_over(const DecodeParams &p) { // query tiles without columns
        while (work_left > 0 && columns(p, COLUMNS) <= 0) advance(p, count());
    }
    __device__ __forceinline__ void next(const DecodeParams &p, int n) {
        advance(p, n);
        pass_over(p);
    }

    __device__ __forceinline__ int cached(const DecodeParams &p) const {
        return p.append ? before : total;
    }
    __device__ __forceinline__ bool is_new(const DecodeParams &p, int pos) const {
        return p.append && pos >= before && pos < total;
    }
    __device__ __forceinline__ int token(int pos) const {
        return first_token + pos - before;
    }
    __device__ __forceinline__ int columns(const DecodeParams &p, int) const {
        return min(COLUMNS, n_tokens * p.heads_per_kv - head_tile * COLUMNS);
    }
    __device__ __forceinline__ DecodeColumn column(const DecodeParams &p, int, int i) const {
        return share(p, COLUMNS).column(p, i);
    }
    // How many positions fewer than `total` column i attends to.
    __device__ __forceinline__ unsigned less(const DecodeParams &p, int i) const {
        int last = n_tokens - 1;
        return last - min((int)small_quotient(head_tile * COLUMNS + i, p.heads_per_kv), last);
    }
    __device__ __forceinline__ SharedRows share(const DecodeParams &p, int) const {
        return {first_token + first,
                kv_head * p.heads_per_kv,
                p.heads_per_kv,
                head_tile * COLUMNS,
                n_tokens,
                total,
                columns(p, COLUMNS),
                n_splits,
                first_block,
                count(),
                0};
    }
};

// NaN for every new token that would overflow its sequence's cache, by the last block.
template <typename T, int D> __device__ __forceinline__ void decode_refuse_rows(const DecodeParams &p) {
    if (blockIdx.x != gridDim.x - 1) return;
    for (int seq = 0; seq < p.n_seq; seq++) {
        DecodeGroup g(p, seq);
        for (int token = g.first_token + max(g.fit, 0); token < min(g.first_token + g.wanted, p.n_tokens); token++)
            for (int i = threadIdx.x; token >= 0 && i < p.n_heads * D; i += blockDim.x)
                ((T *)p.out)[token * p.out_token_stride + i / D * p.out_head_stride + i % D] = from_float<T>(NAN);
    }
}
