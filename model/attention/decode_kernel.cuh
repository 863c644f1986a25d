// Decode attention: the kernel for 16-bit types, on tensor cores.
//
// A block of four warps walks over its query tiles, their splits, and these in steps of STEP positions, with a ring of
// steps in shared memory ahead of it. Keys are the rows and query heads the columns of S^T = K Q^T, and likewise O^T =
// V^T P^T, so a tile of up to 8 heads fills the instruction's 8 columns (NT such column blocks) and each K/V element is
// loaded once for all heads. The scores are partitioned among the warps by positions, the output by dims of the head:
// the weights cross over through shared memory, and no sums across warps are left to do. P enters the second product as
// the sum of two 16-bit numbers, hi + lo: the kernel waits for memory, so there is time for it, and the result is exact
// to the output's rounding.
#pragma once

#include "decode_combine.cuh"
#include "decode_copy.cuh"
#include "decode_rows.cuh"

// One step of a split: keys and values of STEP positions at `stage`, of which the first n_valid count, into `now`,
// whose m is not yet scaled: only differences are, so that the largest weight is 1 however large the scores. q: query
// fragments; weights and tops: where weights and largest scores cross over between the warps. ROWS: the columns are of
// several new tokens; `less`, of four bits for each of the thread's columns, says how many positions fewer count.
template <typename T, int D, int NT, bool ROWS, int TILES>
__device__ __forceinline__ void decode_accumulate(DecodeState<NT, TILES> &now, const uint32_t (&q)[NT][D / 16][2],
                                                  uint32_t stage, uint32_t weights, uint32_t tops, int n_valid,
                                                  unsigned less, float scale_log2) {
    constexpr int STEP = decode_step(D), SUBS = STEP / 64, HEADS = 8 * NT, ROW = D * 2, V = STEP * ROW;
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    // Where this lane's rows for ldmatrix are: K rows of its warp's positions, V rows of a 16-position step of the
    // product.
    uint32_t k_lane = tile_offset<T, D>(warp * 16 * SUBS + (lane & 15), lane >> 4);
    uint32_t v_lane = tile_offset<T, D>((lane >> 4) * 8 + (lane & 7), (lane >> 3) & 1);
    // 32 d bytes on, permuted.
    auto chunk_pair = [](uint32_t base, int d) {
        return D == 96 ? (base ^ (d & 1) << 5) + (d >> 1) * 64 : base ^ d << 5;
    };
    constexpr uint32_t ONE2 = std::is_same<T, bf16>::value ? 0x3f803f80u : 0x3c003c00u;
    const uint32_t ones[4] = {ONE2, ONE2, ONE2, ONE2};

    // Scores of this warp's positions.
    float s[SUBS][NT][4];
#pragma unroll
    for (int u = 0; u < SUBS; u++) {
#pragma unroll
        for (int n = 0; n < NT; n++) s[u][n][0] = s[u][n][1] = s[u][n][2] = s[u][n][3] = 0.0f;
        float odd[NT][4] = {}; // the sum of every second product: two chains, for their latency
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
    n_valid -= warp * 16 * SUBS; // of this warp's positions
    float top[NT][2];
#pragma unroll
    for (int n = 0; n < NT; n++) {
        top[n][0] = top[n][1] = -INFINITY;
#pragma unroll
        for (int u = 0; u < SUBS; u++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float &x = s[u][n][i];
                if constexpr (ROWS) {
                    int n_own = n_valid - (int)(less >> 4 * (2 * n + (i & 1)) & 15);
                    if (n_own < 16 * SUBS && u * 16 + g + 8 * (i >> 1) >= n_own) x = -INFINITY;
                } else if (n_valid < 16 * SUBS && u * 16 + g + 8 * (i >> 1) >= n_valid)
                    x = -INFINITY;
                top[n][i & 1] = fmaxf(top[n][i & 1], x);
            }
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
            for (int x = 4; x < 32; x *= 2) top[n][h] = fmaxf(top[n][h], __shfl_xor_sync(~0u, top[n][h], x));
        if (g == 0) store_shared(tops + (warp * HEADS + n * 8 + 2 * t) * 4, make_float2(top[n][0], top[n][1]));
    }
    __syncthreads(); // all warps' largest scores are there

    // Weights, relative to the largest score so far. What rounds, and where, is spelled out: several rows must get the
    // bits of one.
    float alpha[NT][2];
#pragma unroll
    for (int n = 0; n < NT; n++) {
#pragma unroll
        for (int w = 0; w < 4; w++) {
            float2 x = load_shared_float2(tops + (w * HEADS + n * 8 + 2 * t) * 4);
            top[n][0] = fmaxf(top[n][0], x.x);
            top[n][1] = fmaxf(top[n][1], x.y);
        }
#pragma unroll
        for (int h = 0; h < 2; h++) {
            // Finite: a step has at least one position. With several rows maybe not one for each: of a split without
            // any the weights are 0.
            top[n][h] = fmaxf(top[n][h], now.m[n][h]);
            const float largest = top[n][h];
            if (ROWS && largest == -INFINITY) top[n][h] = 0.0f;
            alpha[n][h] = exp2_fast((now.m[n][h] - top[n][h]) * scale_log2);
            now.m[n][h] = largest;
        }
#pragma unroll
        for (int i = 0; i < TILES; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) now.o[n][i][j] = __fmul_rn(now.o[n][i][j], alpha[n][j & 1]);
#pragma unroll
        for (int u = 0; u < SUBS; u++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float x = exp2_fast((s[u][n][2 * i] - top[n][0]) * scale_log2),
                      y = exp2_fast((s[u][n][2 * i + 1] - top[n][1]) * scale_log2);
                uint32_t hi = pack2<T>(x, y), row = (n * STEP + (warp * SUBS + u) * 16 + i * 8 + g) * 16 + t * 4;
                store_shared(weights + row, hi);
                store_shared(weights + NT * STEP * 16 + row, pack2_rest<T>(x, y, hi));
            }
    }
    __syncthreads(); // all weights are there

    // Output dims of this warp; their sum comes from the same product, with ones in place of V.
    float sums[NT][4] = {};
    float low[NT][TILES][4] = {}, low_sums[NT][4] = {}; // of P's lower part: again two chains
#pragma unroll
    for (int k = 0; k < STEP / 16; k++) {
        uint32_t w[NT][4]; // hi of positions 0-7 and 8-15, lo of both
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
            load_matrix4_transposed(a, D == 96 ? (at ^ (warp & 1) << 5) + (i * 4 + warp >> 1) * 64
                                               : at ^ (i * 4 + warp) << 5);
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
        now.l[n][0] = __fmaf_rn(now.l[n][0], alpha[n][0], sums[n][0]);
        now.l[n][1] = __fmaf_rn(now.l[n][1], alpha[n][1], sums[n][1]);
    }
}

// A block of the kernel: what its stages share.
template <typename T, int D, int NT, int STAGES, class Cursor> struct DecodeBlock {
    static constexpr int STEP = decode_step(D), HEADS = 8 * NT, TILES = decode_out_tiles(D), V = STEP * D * 2,
                         CHUNKS = D / 8;
    static constexpr int STAGE = decode_stage_bytes(D), Q_PITCH = decode_q_pitch(D);
    // A thread has 16 bytes of the queries of head threadIdx.x / CHUNKS, and of every QUERY_STEP-th from there.
    static constexpr int QUERY_STEP = DECODE_THREADS / CHUNKS;
    typedef DecodeState<NT, TILES> State;
    typedef DecodeCopies<T, D, Cursor> Copies;

    const DecodeParams &p;
    int lane, warp, g, t;
    uint32_t ring, weights, tops, queries; // shared memory
    char *sent;                            // mbarrier, and what the cluster's second block sends
    uint32_t send_to;                      // the same in the first block, from here
    bool loads_q, sends;

    // What a query tile begins with, of one new token per sequence: the thread's parts of its queries, and the page
    // that the new token goes to. They are loaded one query tile ahead.
    static constexpr int QUERIES = (HEADS + QUERY_STEP - 1) / QUERY_STEP;
    struct Begin {
        uint4 query[QUERIES];
        int page;
    };

    Cursor item;
    int head0, rows; // query heads of the tile, or its columns if they are of several new tokens
    Begin next;      // of the tile at hand, then of the next one
    int page;        // of the tile at hand
    Copies ahead;
    DecodeNew<Cursor> mine; // of the new tokens left out before the wait: that of step threadIdx.x / CHUNKS
    bool new_is_late;       // does any of these steps but the last have one?
    int n_shared;           // query tiles that it shares with others
    bool first;             // step of all
    uint32_t stage, before; // of this step and of the one before
    int early_steps;        // steps to come of those but the last that were copied before the wait
    uint32_t q[NT][D / 16][2];
    unsigned less; // of several new tokens: see decode_accumulate
    int bad_from;  // and the first position of the tile whose V is not finite
    State now;
    DecodeCombine<State> combine;

    __device__ __forceinline__ DecodeBlock(const DecodeParams &params, char *smem)
        : p(params), lane(threadIdx.x & 31), warp(threadIdx.x >> 5), g(lane >> 2), t(lane & 3),
          ring(shared_address(smem)), weights(ring + STAGES * STAGE), tops(weights + 2 * NT * STEP * 16),
          queries(tops + 4 * HEADS * 4), sent(smem + decode_smem_bytes(D, NT, STAGES)), send_to(0),
          loads_q(threadIdx.x < QUERY_STEP * CHUNKS), new_is_late(false), n_shared(0), first(true), stage(ring),
          before(ring), early_steps(STAGES - 1), less(0), bad_from(INT_MAX) {
    }

    __device__ __forceinline__ const T *own_query(const DecodeCursor &at) const { // of one new token per sequence
        int head = at.kv_head * p.heads_per_kv + at.head_tile * HEADS + threadIdx.x / CHUNKS;
        return (const T *)p.q + at.seq * p.q_token_stride + head * p.q_head_stride + threadIdx.x % CHUNKS * 8;
    }
    // Starts to load `next`, of a query tile.
    __device__ __forceinline__ void load_begin(const DecodeCursor &at) {
        const int n = at.columns(p, HEADS);
        const T *from = own_query(at);
#pragma unroll
        for (int i = 0; i < QUERIES; i++)
            next.query[i] = load_l2_16(from + i * QUERY_STEP * p.q_head_stride,
                                       loads_q && (int)threadIdx.x / CHUNKS + i * QUERY_STEP < n);
        const Cache<T> &cache = (const Cache<T> &)p.cache;
        if (p.append && Copies::in_pages(cache))
            next.page =
                load_l2(cache.table + (size_t)at.cache_block * cache.table_width + (at.total - 1) / Copies::PAGE);
    }
    __device__ __forceinline__ void find_heads() {
        head0 = item.kv_head * p.heads_per_kv + item.head_tile * HEADS;
        rows = item.columns(p, HEADS);
        if constexpr (Cursor::ROWS) {
            bad_from = INT_MAX;
            less = 0;
#pragma unroll
            for (int c = 0; c < NT; c++)
#pragma unroll
                for (int h = 0; h < 2; h++) less |= item.less(p, c * 8 + 2 * t + h) << 4 * (2 * c + h);
        }
    }

    // Before the wait: the block's range; queries to L2, before all keys and values.
    __device__ __forceinline__ void find_range() {
        if constexpr (Cursor::ROWS)
            item.start(p, lane);
        else
            item.start(p, lane, [&](const DecodeCursor &usual) {
                if (p.head_tiles == 1 && loads_q && threadIdx.x / CHUNKS < p.heads_per_kv && usual.seq < p.n_seq)
                    prefetch_l2(own_query(usual));
            });
        sends = item.in_cluster && (int)blockIdx.x != item.first_block;
    }
    // Before the wait: the ring is filled with all but new tokens.
    __device__ __forceinline__ void fill_ring() {
        ahead.start(p, item);
#pragma unroll 1
        for (int i = 0; i < STAGES; i++) {
            if (!ahead.done()) {
                DecodeNew<Cursor> left_out(p, ahead.item, ahead.pos, STEP);
                if (threadIdx.x / CHUNKS == i) mine = left_out;
                if (i + 1 < STAGES) new_is_late |= left_out.row >= 0;
                ahead.copy(p, ring + i * STAGE, false);
            }
            if (i + 1 < STAGES) copy_async_commit();
        }
    }
    // Before the wait: the first block's mbarrier.
    __device__ __forceinline__ void join_cluster() {
        if (!item.in_cluster) return;
        send_to = address_in_first_block(shared_address(sent));
        if (!sends && threadIdx.x == 0) {
            int bytes = groups_of_second_half(item.n_splits) * DECODE_THREADS * State::VECTORS * 16;
            mbarrier_init(shared_address(sent), 1);
            fence_mbarrier_init();
            mbarrier_arrive_expect_tx(shared_address(sent), bytes);
        }
        cluster_arrive();
    }
    // Before the wait: to L2 what is small and needed at the end, the counter and the place of the first results.
    __device__ __forceinline__ void prefetch_ends() const {
        if (Cursor::ROWS || item.work_left <= 0 || item.in_cluster) return;
        int i = threadIdx.x;
        if (i < rows)
            prefetch_l2(p.partial_ml + ((size_t)item.seq * p.n_heads + head0 + i) * p.max_splits + item.split);
        if (i == rows) prefetch_l2(p.arrived + item.first_block);
    }
    // After the wait: the new tokens that were left out.
    __device__ __forceinline__ void load_new() const {
        if (mine.row >= 0) {
            uint32_t tile = ring + threadIdx.x / CHUNKS * STAGE;
            mine.template load<T, D>(p, tile, tile + V, threadIdx.x % CHUNKS);
        }
        copy_async_commit();
    }

    // Queries of the tile to shared memory, zeros where there are none, and from there to fragments.
    __device__ __forceinline__ void store_queries() {
        if constexpr (Cursor::ROWS)
            for (int i = threadIdx.x / CHUNKS; loads_q && i < HEADS; i += QUERY_STEP) {
                DecodeColumn at = item.column(p, head0, min(i, rows - 1));
                const T *from = (const T *)p.q + at.token * p.q_token_stride + at.head * p.q_head_stride;
                store_shared16(queries + i * Q_PITCH + threadIdx.x % CHUNKS * 16,
                               i < rows ? __ldcg((const uint4 *)from + threadIdx.x % CHUNKS) : make_uint4(0, 0, 0, 0));
            }
        else {
#pragma unroll
            for (int i = 0; i < QUERIES; i++) {
                const int head = threadIdx.x / CHUNKS + i * QUERY_STEP;
                if (loads_q && head < HEADS)
                    store_shared16(queries + head * Q_PITCH + threadIdx.x % CHUNKS * 16, next.query[i]);
            }
            page = next.page;
        }
    }
    __device__ __forceinline__ void load_queries() {
#pragma unroll
        for (int c = 0; c < NT; c++)
#pragma unroll
            for (int d = 0; d < D / 16; d += 2)
                load_matrix4(q[c][d], q[c][d + 1],
                             queries + (c * 8 + (lane & 7)) * Q_PITCH + (2 * d + (lane >> 3)) * 16);
    }

    // Of several new tokens: of those in a step, from the first on whose V is not finite, V becomes 0, as 0 x NaN would
    // be NaN in the columns of the tokens before it. Its own columns and those after it are NaN in the end.
    __device__ __forceinline__ void clean_new(int pos) {
        const int begin = max(item.before, pos), end = min(item.total, pos + STEP);
        auto is_bad = [&](int at, int chunk) {
            uint4 x = load_shared16(stage + V + tile_offset<T, D>(at - pos, chunk));
            constexpr uint32_t EXPONENT = std::is_same<T, bf16>::value ? 0x7f80 : 0x7c00;
            bool bad = false;
            for (uint32_t two : {x.x, x.y, x.z, x.w})
                bad |= (two & EXPONENT) == EXPONENT || (two >> 16 & EXPONENT) == EXPONENT;
            return bad;
        };
        bool found = false;
#pragma unroll 1
        for (int at = begin; threadIdx.x < CHUNKS && at < end; at++) found |= is_bad(at, threadIdx.x);
        if (!__syncthreads_or(found)) return; // and the new tokens have been read, to be appended
        int at = begin;
        for (found = false; at < end; at++) {
#pragma unroll 1
            for (int chunk = 0; chunk < CHUNKS; chunk++) found |= is_bad(at, chunk);
            if (found) break;
        }
        bad_from = min(bad_from, at);
        __syncthreads(); // all have looked
        for (; threadIdx.x < CHUNKS && at < end; at++)
            store_shared16(stage + V + tile_offset<T, D>(at - pos, threadIdx.x), make_uint4(0, 0, 0, 0));
        __syncthreads(); // zeros are there
    }

    // Where the new token goes in the cache.
    __device__ __forceinline__ size_t new_row() const {
        const Cache<T> &cache = (const Cache<T> &)p.cache;
        if (!Copies::in_pages(cache)) return decode_row(cache, item, item.total - 1);
        return (((size_t)page * cache.n_kv_heads + item.kv_head) * Copies::PAGE + (item.total - 1) % Copies::PAGE) * D;
    }

    // The steps of a split, to `now`; from position append_from on the step has the new token, which goes to the cache.
    __device__ __forceinline__ void accumulate_split(int split, int append_from) {
#pragma unroll
        for (int c = 0; c < NT; c++) {
            now.m[c][0] = now.m[c][1] = -INFINITY;
            now.l[c][0] = now.l[c][1] = 0.0f;
#pragma unroll
            for (int i = 0; i < TILES; i++) now.o[c][i][0] = now.o[c][i][1] = now.o[c][i][2] = now.o[c][i][3] = 0.0f;
        }
        const int end = min(item.total, (split + 1) << item.split_log2);
#pragma unroll 1
        for (int pos = split << item.split_log2; pos < end; pos += STEP) {
            if (__builtin_expect(early_steps-- > 0, 0)) {
                if (new_is_late)
                    copy_async_wait<0>(); // new tokens came with the last of them
                else if (first)
                    copy_async_wait<STAGES - 1>();
                else
                    copy_async_wait<STAGES - 2>();
            } else
                copy_async_wait<STAGES - 2>();
            __syncthreads(); // everyone's copies of this step have landed; everyone is done with the step before
            const bool copies = !first & !ahead.done(), appends = pos >= append_from;
            if (copies | appends) {
                if (copies) ahead.copy(p, before, true);
                if (appends && threadIdx.x < 2 * CHUNKS) {
                    uint32_t tile = threadIdx.x < CHUNKS ? stage : stage + V;
                    bool is_v = threadIdx.x >= CHUNKS;
                    int chunk = threadIdx.x % CHUNKS;
                    if constexpr (Cursor::ROWS)
#pragma unroll 1
                        for (int at = max(item.cached(p), pos); at < min(item.total, pos + STEP); at++)
                            decode_append<T, D>(p, decode_row((const Cache<T> &)p.cache, item, at), tile, at - pos,
                                                is_v, chunk);
                    else
                        decode_append<T, D>(p, new_row(), tile, item.total - 1 - pos, is_v, chunk);
                }
            }
            if (!first) copy_async_commit(); // if of nothing, as they are counted
            first = false;
            if constexpr (Cursor::ROWS)
                if (pos + STEP > item.before) clean_new(pos);

            decode_accumulate<T, D, NT, Cursor::ROWS>(now, q, stage, weights, tops,
                                                      (Cursor::ROWS ? item.total : end) - pos, less, p.scale_log2);
            before = stage;
            stage = stage == ring + (STAGES - 1) * STAGE ? ring : stage + STAGE;
        }
#pragma unroll
        for (int c = 0; c < NT; c++) {
            now.m[c][0] = __fmul_rn(now.m[c][0], p.scale_log2);
            now.m[c][1] = __fmul_rn(now.m[c][1], p.scale_log2);
            if (Cursor::ROWS && bad_from < item.total)
#pragma unroll
                for (int h = 0; h < 2; h++)
                    if (bad_from < item.total - (int)(less >> 4 * (2 * c + h) & 15)) now.l[c][h] = NAN;
        }
    }

    // The block, or its cluster, has all splits of the tile.
    __device__ __forceinline__ void combine_split(int split) {
        if (!combine.add_to_group(now, split, item.n_splits)) return;
        if (sends)
            combine.group.send(
                send_to + 16 +
                    ((unsigned)(split - item.split) / KV_GROUP * State::VECTORS * DECODE_THREADS + threadIdx.x) * 16,
                send_to);
        else
            combine.add_group(split);
    }

    template <class F>
    __device__ __forceinline__ void
    each(F body) const { // body(column block, which of its two heads, head) for what this thread owns
#pragma unroll
        for (int c = 0; c < NT; c++)
#pragma unroll
            for (int h = 0; h < 2; h++)
                if (c * 8 + 2 * t + h < rows) body(c, h, c * 8 + 2 * t + h);
    }
    // Others have splits of the tile too: to the workspace, of n splits here; a group that this block has all of as
    // one.
    __device__ __forceinline__ void leave_split(int split, int n, bool &whole_group) {
        const int in_group = (unsigned)split % KV_GROUP;
        if (split == item.split || in_group == 0)
            whole_group = in_group == 0 && min(split + KV_GROUP, item.n_splits) <= item.split + n;
        if (whole_group && in_group > 0)
            combine.group.add(now);
        else
            combine.group = now;
        if (whole_group && in_group < KV_GROUP - 1 && split + 1 < item.n_splits) return;
        int slot = whole_group ? split - in_group : split;
        each([&](int c, int h, int head) {
            DecodeColumn at = item.column(p, head0, head);
            size_t part = ((size_t)at.token * p.n_heads + at.head) * p.max_splits + slot;
            decode_store_row<float, D>(p.partial_o + part * D, combine.group.o[c], h, warp, g,
                                       [](float x) { return x; });
            if (warp + g == 0) {
                p.partial_ml[part] = make_float2(combine.group.m[c][h], combine.group.l[c][h]);
                if (slot < split) p.partial_ml[part + 1] = make_float2(0.0f, IN_GROUP);
            }
        });
    }

    // The cluster's first block: the groups that the second one sent.
    __device__ __forceinline__ void receive_groups(int n) {
        mbarrier_wait_cluster(shared_address(sent), 0);
        for (int i = 0; i < (item.n_splits - n + KV_GROUP - 1) / KV_GROUP; i++) {
            now.receive((const float4 *)(sent + 16) + i * State::VECTORS * DECODE_THREADS + threadIdx.x);
            combine.all.add(now);
        }
    }
    __device__ __forceinline__ void write_out() const {
        each([&](int c, int h, int head) {
            float inverse = __frcp_rn(combine.all.l[c][h]);
            DecodeColumn at = item.column(p, head0, head);
            decode_store_row<T, D>((T *)p.out + at.token * p.out_token_stride + at.head * p.out_head_stride,
                                   combine.all.o[c], h, warp, g, [=](float x) { return from_combined<T>(x, inverse); });
        });
    }
};

// Computes: attention of one new token per sequence to its cache (Cursor: DecodeCursor), or of several
//           (DecodeRowsCursor), in KV splits; appends K and V if asked.
// Reads:    q [token][head][D], k_new and v_new [token][kv head][D], the cache, all T; seq_lens [seq] int32; of several
//           tokens q_start [seq+1] int32.
// Writes:   out [token][head][D] T (NaN for what would overflow its cache); with append the rows of K and V from
//           seq_lens[seq] on; of query tiles that several blocks share, partial_ml and partial_o [token][head][split],
//           float32, and arrived.
// Grid:     up to 2 SMs × 128 threads; a block owns a range of items, a warp a quarter of a step's positions in the
//           scores and every fourth 16 dims of the output.
// Requires: head_dim = D, heads_per_kv (of several tokens: times n_new) <= 8 NT * head_tiles, 16-byte rows, scale > 0,
//           arrived = 0; shared memory of decode_smem_bytes, and in clusters decode_cluster_bytes; two blocks on an SM
//           at most (DECODE_BLOCKS_PER_SM); of several tokens, blocks of a multiple of head_tiles.
template <typename T, int D, int NT, int STAGES, class Cursor>
__global__ void __launch_bounds__(DECODE_THREADS, 2) decode_kernel(const __grid_constant__ DecodeParams p) {
    typedef DecodeBlock<T, D, NT, STAGES, Cursor> Block;
    extern __shared__ __align__(1024) char smem[];
    Block b(p, smem);
    if (!p.kv_stable) {
        wait_for_previous_kernel();
        let_next_kernel_start();
    }
    b.find_range();
    b.fill_ring();
    b.join_cluster();
    b.find_heads();
    b.prefetch_ends();
    wait_for_previous_kernel(); // from here on q, k_new and v_new are there, and all may be written
    let_next_kernel_start();
    if (b.item.in_cluster) cluster_wait();
    b.load_new();
    if (!Cursor::ROWS && b.item.work_left > 0) b.load_begin(b.item);

    while (b.item.work_left > 0) { // query tiles
        b.find_heads();
        b.store_queries();
        const int n = b.item.count();
        Cursor next_item = b.item;
        if (!Cursor::ROWS) next_item.next(p, n);
        // Does this block, or its cluster, have all splits of the tile? Or at least this block all of the present
        // group?
        const bool whole = n == b.item.n_splits || b.item.in_cluster;
        bool whole_group = false;
        // The first position of a step with new tokens.
        const int append_from = p.append && b.item.head_tile == 0 ? b.item.cached(p) + 1 - Block::STEP : INT_MAX;
        if (!whole) share_tile(p, b.item, Block::HEADS, b.n_shared++);
        __syncthreads();
        b.load_queries();
        if (!Cursor::ROWS && next_item.work_left > 0) b.load_begin(next_item);
#pragma unroll 1
        for (int split = b.item.split; split < b.item.split + n; split++) {
            b.accumulate_split(split, append_from);
            if (__builtin_expect(whole, 1))
                b.combine_split(split);
            else
                b.leave_split(split, n, whole_group);
        }
        if (b.item.in_cluster) { // it is the block's only query tile
            if (b.sends) break;
            b.receive_groups(n);
        }
        if (whole) b.write_out();
        if (Cursor::ROWS)
            b.item.next(p, n);
        else
            b.item = next_item;
    }
    if (b.n_shared) combine_arrive<T, D, Cursor>(p, b.n_shared);
    if (!b.item.overflow) return;
    if constexpr (Cursor::ROWS)
        decode_refuse_rows<T, D>(p);
    else
        decode_refuse<T, D>(p);
}
