// Engine fused: its kernels. The protocol that they keep: fused.h.
#pragma once

#include <type_traits>

#include "fused_exchange.cuh"
#include "ops.h"

namespace {

// ---- number types and activations -----------------------------------------------------------------------------------

__device__ __forceinline__ float4 floats_of(uint4 v) {
    return make_float4(__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w));
}

// Two f16 as two bf16 each, hi + lo exactly: 11 bits of significand are 8 and 3.
__device__ __forceinline__ void split_f16(uint32_t pair, uint32_t &hi, uint32_t &lo) {
    float2 v = __half22float2(*(const __half2 *)&pair);
    __nv_bfloat162 h = __floats2bfloat162_rn(v.x, v.y);
    float2 rest = __bfloat1622float2(h);
    __nv_bfloat162 l = __floats2bfloat162_rn(v.x - rest.x, v.y - rest.y);
    hi = *(uint32_t *)&h;
    lo = *(uint32_t *)&l;
}

// The weights of a kernel's products, and how many activation rows it has at most. A kernel for one kind of them alone
// has fewer registers to save and less code to fetch than one for any: 4 to 6 % of a step of quantised weights, with
// held activations 5 to 10.
enum WeightKinds { KIND_16, KIND_ANY, KIND_CODES };
template <int ROWS> struct Weights16 { // of 16 bits
    static constexpr WeightKinds KIND = KIND_16;
    static constexpr int MAX_ROWS = ROWS;
};
template <int ROWS> struct WeightsOfAnyKind { // of 16 bits or quantised, each product's own
    static constexpr WeightKinds KIND = KIND_ANY;
    static constexpr int MAX_ROWS = ROWS;
};
// Quantised alike: Codes, SCALES and Scale are consume_packed_tiles'.
template <class Codes_, int SCALES_, typename Scale_, int ROWS> struct WeightsOf {
    typedef Codes_ Codes;
    typedef Scale_ Scale;
    static constexpr WeightKinds KIND = KIND_CODES;
    static constexpr int SCALES = SCALES_, MAX_ROWS = ROWS;
};

// What a kernel computes in. W: the stored weights' type, of those that have 16 bits; TERMS: activation rows of a
// token, 1, or 3 (bf16x3); E: the type of an activation row; KV: the cache's type; GROUPS of MMA_WEIGHT_ROWS in a tile;
// STEPS: mmas of a warp along a whole slice; Weights: as above; PACKED: may they be quantised? MAX_ROWS, MAX_TOKENS:
// activation rows and tokens that a launch has at most.
template <typename W_, int TERMS_, int GROUPS_, class Weights_> struct Numbers {
    typedef W_ W;
    typedef Weights_ Weights;
    static constexpr WeightKinds KIND = Weights::KIND;
    static constexpr bool PACKED = KIND != KIND_16;
    static constexpr int TERMS = TERMS_, GROUPS = GROUPS_, TILE = GROUPS * MMA_WEIGHT_ROWS,
                         MAX_ROWS = Weights::MAX_ROWS, MAX_TOKENS = MAX_ROWS / TERMS,
                         STEPS = MAX_SLICE / GROUPS / CONSUMER_WARPS / MMA_COLUMNS;
    typedef typename std::conditional<TERMS == 1, W, bf16>::type E;
    typedef typename std::conditional<TERMS == 1, W, float>::type KV;
};

// Writes elements i .. i+3, i % 4 = 0, of a token to its activation rows, `stride` bytes apart: rounded, or their
// bf16x3 split.
template <typename N> __device__ __forceinline__ void store_split(char *row, size_t stride, int i, float4 v) {
#pragma unroll
    for (int t = 0; t < N::TERMS; t++) {
        union {
            typename N::E each[4];
            uint32_t words[2];
        } packed = {{from_float<typename N::E>(v.x), from_float<typename N::E>(v.y), from_float<typename N::E>(v.z),
                     from_float<typename N::E>(v.w)}};
        *(uint32_t *)(row + t * stride + 2 * permuted_index(i)) = packed.words[0];
        *(uint32_t *)(row + t * stride + 2 * permuted_index(i + 2)) = packed.words[1];
        v.x -= to_float(packed.each[0]);
        v.y -= to_float(packed.each[1]);
        v.z -= to_float(packed.each[2]);
        v.w -= to_float(packed.each[3]);
    }
}

// ---- the ring -------------------------------------------------------------------------------------------------------

// A ring of buffers in shared memory, full and empty barriers, and how far along this warp is. Parity is that of
// `full`; a fresh `empty` barrier counts as complete.
struct Ring {
    uint32_t full, empty;
    int n, slot, parity;
    __device__ __forceinline__ void next() {
        if (++slot == n) slot = 0, parity ^= 1;
    }
    __device__ __forceinline__ void wait_full() const {
        mbarrier_wait(full + 8 * slot, parity);
    }
    __device__ __forceinline__ void wait_empty() const {
        mbarrier_wait(empty + 8 * slot, parity ^ 1);
    }
};

// What the warps of a block share, in shared memory.
struct Block {
    uint32_t stages, act;           // addresses: the ring of weights, the activations
    char *shared;                   // the activations again
    float *partials;                // [PARTIAL_BUFFERS][partial_floats]: partial sums
    float *sums;                    // [4][CONSUMER_WARPS]: of squares
    int *stage_tile, *partial_tile; // [n_stages], [PARTIAL_BUFFERS]: which tile it belongs to
    float2 *rope;                   // [n_rows][head_dim/2]: cosine and sine
    float *residuals;               // [RESIDUAL_BUFFERS][n_rows][tile rows]: what a tile of PRODUCT_OUT is added to
    float *scales;                  // [RESIDUAL_BUFFERS][tile rows]: what a tile's sums are multiplied by
    float *code_sums;               // sums of activations that meet one scale: sum_activations
    volatile int *started;          // products whose input the consumers have
};

__device__ __forceinline__ int first_tile(const Product &f) {
    int at = (int)blockIdx.x - f.first_block;
    return at < 0 ? at + gridDim.x : at;
}

// A row of a tile in memory. A tile of gate_up has as many rows of gate, then of up.
template <int TILE> __device__ __forceinline__ const char *tile_row(const Product &f, int tile, int row) {
    constexpr int HALF = TILE / 2;
    if (f.kind == PRODUCT_GATE_UP)
        return (row < HALF ? f.weights : f.up) + (size_t)(tile * HALF + row % HALF) * f.row_bytes;
    return f.weights + (size_t)(tile * TILE + row) * f.row_bytes + f.first_byte;
}

// In place of a tile. Every epilogue warp gets one: END_OF_PRODUCT, END_OF_PRODUCT - 1, ..
constexpr int END_OF_PRODUCT = -1;

// What a lane copies of a K slice of a tile: rows that are as close in a stage as in memory, or one row.
struct CopyRange {
    const char *from;
    int first, bytes; // the first row's number in the tile; 0 bytes: nothing
};
template <int TILE> __device__ __forceinline__ CopyRange copy_range(const Product &f, int tile, int p) {
    int each = f.weight_pitch != f.row_bytes ? 1 : f.kind == PRODUCT_GATE_UP ? TILE / 2 : TILE;
    int first = threadIdx.x % 32 * each, n = max(0, min(each, min(TILE, f.rows - tile * TILE) - first));
    return {tile_row<TILE>(f, tile, first) + (size_t)p * f.slice_bytes, first,
            n * min(f.slice_bytes, f.bytes - p * f.slice_bytes)};
}

// The scales of a tile's rows: half of them from each of gate and up.
template <int TILE>
__device__ __forceinline__ void copy_scales(float *to, const Product &f, int tile, uint32_t barrier) {
    constexpr int HALF = TILE / 2;
    const bool both = f.kind == PRODUCT_GATE_UP;
    const float *first = f.scales + tile * (both ? HALF : TILE),
                *second = both ? f.up_scales + tile * HALF : first + HALF;
    copy_bulk(shared_address(to), first, HALF * sizeof(float), barrier);
    copy_bulk(shared_address(to + HALF), second, HALF * sizeof(float), barrier);
}

// A tile of a product that no block has yet, for lane 0. The answer is not waited for here: under load it takes as long
// as a tile.
__device__ __forceinline__ int take_tile(int *next_tile) {
    int before = 0;
    if (threadIdx.x % 32 == 0) before = atomic_increment_relaxed(next_tile);
    return before + gridDim.x;
}

// The producer warp: every K slice of every tile of this block, in order. Its first tile of a product is given, the
// others go to whoever asks first, as SMs read at different speeds. All that can be known before the last wait is, so
// that a copy follows at once when another lands.
template <typename N, class Params>
__device__ __forceinline__ void produce(const Params &s, const Block &block, Ring ring) {
    constexpr int TILE = N::TILE;
    int lane = threadIdx.x % 32, in_flight = 0, n_residuals = 0, n_scales = 0;
    Ring landed = ring;
    const uint64_t policy = l2_evict_first();
    for (int i = 0; i < s.n_products; i++) {
        const Product &f = s.product[i];
        const int n_tiles = (f.rows + TILE - 1) / TILE;
        const bool fixed = f.adds_partial || f.leaves_partial; // tiles stay with their block over all parts of K
        for (int tile = first_tile(f), next = 0;; tile = __shfl_sync(~0u, next, 0)) {
            bool end = tile >= n_tiles;
            if (!end) next = fixed ? tile + gridDim.x : take_tile(s.next_tile + i);
            for (int p = 0; p < (end ? 1 : f.n_slices); p++) {
                CopyRange share = copy_range<TILE>(f, tile, p);
                uint32_t to = block.stages + ring.slot * s.stage_bytes + share.first * f.weight_pitch,
                         full = ring.full + 8 * ring.slot;
                int bytes = min(TILE, f.rows - tile * TILE) * min(f.slice_bytes, f.bytes - p * f.slice_bytes);
                int most = *block.started > i ? s.stages_in_flight : s.stages_ahead;
                // Of x as the kernel before attention left it: see edge P in fused.h.
                bool adds = f.kind == PRODUCT_OUT && p == 0 && !end, scales = N::PACKED && f.scales && p == 0 && !end;
                if (scales) bytes += TILE * (int)sizeof(float);
                ring.wait_empty();
                if (lane == 0) block.stage_tile[ring.slot] = end ? END_OF_PRODUCT : tile;
                for (; in_flight >= most; in_flight--) {
                    landed.wait_full();
                    landed.next();
                }
                in_flight++;
                if (lane == 0 && end) mbarrier_arrive(full);
                if (lane == 0 && !end)
                    mbarrier_arrive_expect_tx(full, bytes + (adds ? s.n_rows * TILE * (int)sizeof(float) : 0));
                __syncwarp();
                if (share.bytes > 0) copy_bulk(to, share.from, share.bytes, full, policy);
                if (adds && lane < s.n_rows)
                    copy_bulk(
                        shared_address(block.residuals + (n_residuals % RESIDUAL_BUFFERS * s.n_rows + lane) * TILE),
                        own_x(s) + (size_t)lane * s.dim + tile * TILE, TILE * sizeof(float), full);
                if (adds) n_residuals++;
                if (scales && lane == 0)
                    copy_scales<TILE>(block.scales + n_scales % RESIDUAL_BUFFERS * TILE, f, tile, full);
                if (scales) n_scales++;
                ring.next();
            }
            if (end) break;
        }
    }
}

// ---- input of a product ---------------------------------------------------------------------------------------------

__device__ __forceinline__ float squares(float4 v) {
    return (v.x * v.x + v.y * v.y) + (v.z * v.z + v.w * v.w);
}
__device__ __forceinline__ float4 scaled(float4 v, float scale, float4 w) {
    return make_float4(w.x * (v.x * scale), w.y * (v.y * scale), w.z * (v.z * scale), w.w * (v.w * scale));
}

// The norm's weights, which depend on nothing: read before the wait for what is normalised.
template <int EACH> __device__ __forceinline__ void load_norm(const Product &f, float4 (&w)[EACH]) {
#pragma unroll
    for (int j = 0; j < EACH; j++) {
        int i = threadIdx.x + j * CONSUMER_THREADS;
        w[j] = i < f.cols / 4 ? __ldg((const float4 *)f.norm + i) : make_float4(0, 0, 0, 0);
    }
}

// x / sqrt(mean(x²) + eps) * weight of the tokens from `first` to `end`, to their activation rows, `pitch` bytes apart;
// ROWS tokens at a time, EACH float4s of each a thread. A token's sum of squares has one order: thread i of 256 adds
// elements 4i .. 4i+3 and those 1024 further on, then lanes, then warps.
template <typename N, int ROWS, int EACH, class Input>
__device__ __forceinline__ void store_normalised(const FusedParams &s, const Product &f, int first, int end,
                                                 const Input &input, const float4 (&w)[EACH], char *to, int pitch,
                                                 float *sums) {
    int tid = threadIdx.x, n = f.cols / 4;
    for (int b0 = first; b0 < end; b0 += ROWS) {
        float4 x[ROWS][EACH];
        input.load_until_there([&](auto load) {
#pragma unroll
            for (int r = 0; r < ROWS; r++)
#pragma unroll
                for (int j = 0; j < EACH; j++) {
                    bool there = b0 + r < end && tid + j * CONSUMER_THREADS < n;
                    x[r][j] = floats_of(load((size_t)(b0 + r) * (f.cols / 4) + tid + j * CONSUMER_THREADS, there));
                }
        });
        if (b0 > first) consumers_sync(); // all have read the sums of the tokens before
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            float sum = 0;
#pragma unroll
            for (int j = 0; j < EACH; j++) sum += squares(x[r][j]);
            sum = warp_sum(sum);
            if (tid % 32 == 0) sums[r * CONSUMER_WARPS + tid / 32] = sum;
        }
        consumers_sync();
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            if (b0 + r >= end) break;
            float sum = 0;
#pragma unroll
            for (int i = 0; i < CONSUMER_WARPS; i++) sum += sums[r * CONSUMER_WARPS + i];
            float scale = 1.0f / sqrtf(sum / (float)f.cols + s.eps);
            if (N::PACKED && f.codes != CODES_NONE) scale *= ACT_FACTOR;
            char *row = to + (size_t)(b0 + r) * N::TERMS * pitch;
#pragma unroll
            for (int j = 0; j < EACH; j++)
                if (tid + j * CONSUMER_THREADS < n)
                    store_split<N>(row, pitch, 4 * (tid + j * CONSUMER_THREADS), scaled(x[r][j], scale, w[j]));
        }
    }
}

// The same of product i with one block for each token, which leaves its row to all. Every block reads 2 bytes of an
// element in place of 4, and has no sums to wait for.
template <typename N, int EACH>
__device__ __forceinline__ void store_normalised_once(const FusedParams &s, const Product &f, int i, char *to,
                                                      float *sums) {
    const int apart = gridDim.x / s.n_rows, row = blockIdx.x / apart;
    if (blockIdx.x % apart == 0 && row < s.n_rows) {
        float4 w[EACH];
        load_norm(f, w);
        store_normalised<N, 1, EACH>(s, f, row, row + 1, OwnInput{(const uint4 *)s.x}, w, (char *)s.normed, 2 * f.cols,
                                     sums);
        consumers_sync();
        if (threadIdx.x == 0) reduce_add_release(s.rows_normalised + i, 1);
    }
    if (threadIdx.x == 0)
        while (load_acquire(s.rows_normalised + i) < (unsigned)s.n_rows);
    consumers_sync();
    for (int r = 0; r < s.n_rows; r++) // all copies are under way at once
        for (int j = threadIdx.x; j < f.cols / 8; j += CONSUMER_THREADS)
            copy_async16_from_l2(shared_address(to + (size_t)r * f.act_pitch + j * 16),
                                 (const uint4 *)s.normed + (size_t)r * f.cols / 8 + j);
    copy_async_wait_all();
}

// Loads n × 16 bytes of each of `rows` rows, pitch × 16 bytes apart, and hands them to store(row, column, what was
// loaded). Of a thread's loads ROWS × DEPTH are under way.
template <int ROWS, int DEPTH, class Input, class Store>
__device__ __forceinline__ void for_rows(const Input &input, int pitch, int n, int rows, Store store) {
    for (int row = 0; row < rows; row += ROWS)
        for (int first = threadIdx.x; first < n; first += DEPTH * CONSUMER_THREADS) {
            uint4 v[ROWS][DEPTH];
            input.load_until_there([&](auto load) {
#pragma unroll
                for (int r = 0; r < ROWS; r++)
#pragma unroll
                    for (int j = 0; j < DEPTH; j++)
                        v[r][j] = load((size_t)(row + r) * pitch + first + j * CONSUMER_THREADS,
                                       row + r < rows && first + j * CONSUMER_THREADS < n);
            });
#pragma unroll
            for (int r = 0; r < ROWS; r++)
#pragma unroll
                for (int j = 0; j < DEPTH; j++)
                    if (row + r < rows && first + j * CONSUMER_THREADS < n)
                        store(row + r, first + j * CONSUMER_THREADS, v[r][j]);
        }
}

// 8 numbers of 16 bits times ACT_FACTOR, if they meet codes.
template <typename N> __device__ __forceinline__ uint4 for_codes(const Product &f, uint4 v) {
    if constexpr (N::PACKED)
        if (f.codes != CODES_NONE) {
            const __nv_bfloat162 factor = __float2bfloat162_rn(ACT_FACTOR);
            uint32_t *words = &v.x;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                __nv_bfloat162 x = __hmul2(*(__nv_bfloat162 *)&words[i], factor);
                words[i] = *(uint32_t *)&x;
            }
        }
    return v;
}

// Attention's output, to activation rows: as it is, or its bf16x3 split.
template <typename N, class Input>
__device__ __forceinline__ void store_attention(const FusedParams &s, const Product &f, const Input &input, char *to) {
    constexpr int EACH = 16 / sizeof(typename N::KV);
    for_rows<N::TERMS == 1 ? 4 : 1, N::TERMS == 1 ? 2 : 4>(
        input, f.cols / EACH, f.cols / EACH, s.n_rows, [&](int b, int column, uint4 v) {
            char *row = to + b * N::TERMS * f.act_pitch;
            if constexpr (N::TERMS == 1) {
                v = for_codes<N>(f, v);
                *(uint4 *)(row + column * 16) = make_uint4(v.x, v.z, v.y, v.w);
            } else {
                const float factor = N::PACKED && f.codes != CODES_NONE ? ACT_FACTOR : 1.0f;
                store_split<N>(row, f.act_pitch, column * EACH, scaled(floats_of(v), factor, make_float4(1, 1, 1, 1)));
            }
        });
}

// What gate_up left, split and permuted already; the columns of this product. All copies are under way at once.
template <typename N>
__device__ __forceinline__ void store_hidden(const FusedParams &s, const Product &f, Turn, char *to) {
    for (int r = 0; r < s.n_rows * N::TERMS; r++)
        for (int i = threadIdx.x; i < f.cols / 8; i += CONSUMER_THREADS)
            copy_async16_from_l2(shared_address(to + (size_t)r * f.act_pitch + i * 16),
                                 (const uint4 *)s.h + ((size_t)r * f.row_length + f.first_col) / 8 + i);
    copy_async_wait_all();
}
template <typename N>
__device__ __forceinline__ void store_hidden(const SharedParams &s, const Product &f, Turn turn, char *to) {
    const int rows = s.n_rows * N::TERMS, pitch = f.row_length / 8;
    auto store = [&](int r, int i, uint4 v) { *(uint4 *)(to + (size_t)r * f.act_pitch + i * 16) = v; };
    if (rows <= 2)
        for_rows<1, 7>(input_h(s, f, rows, turn), pitch, f.cols / 8, rows, store);
    else
        for_rows<4, 2>(input_h(s, f, rows, turn), pitch, f.cols / 8, rows, store);
}

// ---- the epilogue warp ----------------------------------------------------------------------------------------------

// Argmax of two candidates: the larger logit, of equals the lower token; -1 if one of them is (a logit is not finite).
__device__ __forceinline__ void take_best(float &best, int &row, float other, int other_row) {
    if (other_row < 0) row = -1;
    if (row >= 0 && (other > best || (other == best && other_row < row))) best = other, row = other_row;
}

// What a lane of an epilogue warp has of a tile: token b, and number n of each group of ROWS of its rows. ROWS is as
// many as the kernel's MAX_TOKENS leave lanes for: the fewer rows a lane has, the sooner a tile is done, and at the end
// of a product others wait for that.
template <typename N> struct EpilogueLane {
    static constexpr int TILE = N::TILE, ROWS = TILE < 32 / N::MAX_TOKENS ? TILE : 32 / N::MAX_TOKENS,
                         GROUPS = TILE / ROWS;
    static_assert(TILE % ROWS == 0 && 32 % ROWS == 0 && N::MAX_TOKENS * ROWS <= 32, "a lane for each token and row");
    static_assert(ROWS % 2 == 0, "RoPE's pairs are rows of one group");
    static_assert(N::PACKED || GROUPS < 4, "sums of four groups are loaded as neighbours");
    int n, b;
    bool in_batch; // is there a token b?

    // Where a row of a tile is among the partial sums of an activation row: those of a lane are neighbours.
    static __device__ __forceinline__ constexpr int partial_place(int row) {
        return N::PACKED ? row % ROWS * GROUPS + row / ROWS : row;
    }

    // Adds up the partial sums of a tile: slices in their order, bf16x3 terms, the smallest first, and consumer warps.
    __device__ __forceinline__ void add_partials(float (&sum)[GROUPS], const float *partials, int n_sums,
                                                 int act_rows) const {
        if (in_batch)
            for (int c = 0; c < n_sums; c++) {
                float slice_sum[GROUPS] = {};
#pragma unroll
                for (int t = N::TERMS - 1; t >= 0; t--) {
                    float term[GROUPS] = {};
#pragma unroll
                    for (int w = 0; w < CONSUMER_WARPS; w++) {
                        const float *from = partials + ((c * CONSUMER_WARPS + w) * act_rows + t) * TILE;
                        if constexpr (GROUPS == 4) {
                            float4 v = *(const float4 *)(from + partial_place(n));
                            term[0] += v.x, term[1] += v.y, term[2] += v.z, term[3] += v.w;
                        } else {
#pragma unroll
                            for (int g = 0; g < GROUPS; g++) term[g] += from[partial_place(g * ROWS + n)];
                        }
                    }
#pragma unroll
                    for (int g = 0; g < GROUPS; g++) slice_sum[g] += term[g];
                }
#pragma unroll
                for (int g = 0; g < GROUPS; g++) sum[g] += slice_sum[g];
            }
    }

    // Out: x = x + sum.
    template <class Params>
    __device__ __forceinline__ void out(const Params &s, XPlace place, float *to, int tile, const float (&x)[GROUPS],
                                        const float (&sum)[GROUPS]) const {
#pragma unroll
        for (int g = 0; g < GROUPS; g++)
            if (in_batch) store_x(s, place, to + tile * TILE + g * ROWS, x[g] + sum[g]);
    }

    // Gate and up: h = SwiGLU. The tile's first half is rows of gate, its second the same rows of up.
    template <class Params>
    __device__ __forceinline__ void gate_up(const Params &s, Turn turn, int tile, const float (&sum)[GROUPS]) const {
        constexpr int HALF = GROUPS > 1 ? GROUPS / 2 : 1;
#pragma unroll
        for (int g = 0; g < HALF; g++) {
            float up = GROUPS > 1 ? sum[GROUPS - HALF + g] : __shfl_down_sync(~0u, sum[0], TILE / 2),
                  v = sum[g] / (1.0f + expf(-sum[g])) * up;
            if (N::PACKED) v *= s.h_factor;
            typename N::E *h = (typename N::E *)own_h(s, turn) + (size_t)b * N::TERMS * s.hidden_dim +
                               permuted_index(tile * (TILE / 2) + g * ROWS + n);
            if (in_batch && n < TILE / 2)
#pragma unroll
                for (int t = 0; t < N::TERMS; t++) {
                    publish(s, h + (size_t)t * s.hidden_dim, from_float<typename N::E>(v));
                    v -= to_float(from_float<typename N::E>(v));
                }
        }
    }

    // Queries, keys and values: RoPE of the first two, by pairs of rows: (even + i odd) × (cosine + i sine).
    __device__ __forceinline__ void qkv(const FusedParams &s, const float2 *rope, int row, float (&sum)[GROUPS]) const {
        typedef typename N::KV KV;
#pragma unroll
        for (int g = 0; g < GROUPS; g++, row += ROWS) {
            int head = __umulhi((unsigned)row, s.head_dim_inverse), d = row - head * s.head_dim;
            float other = __shfl_xor_sync(~0u, sum[g], 1);
            if (!in_batch) continue;
            if (head < s.n_heads + s.n_kv_heads) {
                float2 turn = rope[b * (s.head_dim / 2) + d / 2];
                sum[g] = d % 2 ? __fmaf_rn(other, turn.y, __fmul_rn(sum[g], turn.x))
                               : __fmaf_rn(-other, turn.y, __fmul_rn(sum[g], turn.x));
            }
            ((KV *)s.qkv)[((size_t)head * s.n_rows + b) * s.head_dim + d] = from_float<KV>(sum[g]);
        }
    }

    // Output matrix: logits, and the argmax of this lane's.
    __device__ __forceinline__ void lm_head(const FusedParams &s, int row, int rows, const float (&sum)[GROUPS],
                                            float &best, int &best_row) const {
#pragma unroll
        for (int g = 0; g < GROUPS; g++, row += ROWS) {
            if (!in_batch || row >= rows) continue;
            s.logits[(size_t)b * s.logits_pitch + row] = sum[g];
            if (!isfinite(sum[g])) best_row = -1;
            if (best_row >= 0 && (sum[g] > best || (sum[g] == best && row < best_row))) best = sum[g], best_row = row;
        }
    }
};

// Down: x + sum, or a part of K to down_partial. What a tile adds to is on its way while the next one is summed.
template <typename N> struct PendingTile {
    static constexpr int GROUPS = EpilogueLane<N>::GROUPS, ROWS = EpilogueLane<N>::ROWS;
    float x[GROUPS], sum[GROUPS];
    float *to;
    template <class Params> __device__ __forceinline__ void store(const Params &s, XPlace place) const {
#pragma unroll
        for (int g = 0; g < GROUPS; g++)
            if (to) store_x(s, place, to + g * ROWS, x[g] + sum[g]);
    }
};

__device__ __forceinline__ void epilogue_sync() {
    named_barrier_sync(BARRIER_FUSED_EPILOGUE, 32 * EPILOGUE_WARPS);
}

// The epilogue warps finish the tiles of this block, each every EPILOGUE_WARPSth of a product. When a product is done
// they count the block in done[product].
template <typename N, class Params>
__device__ __forceinline__ void epilogue(const Params &s, const Block &block, Ring ring) {
    constexpr int TILE = N::TILE, ROWS = EpilogueLane<N>::ROWS, GROUPS = EpilogueLane<N>::GROUPS;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 - EPILOGUE_WARP;
    int first = 0, first_scales = 0; // buffers, and tiles with scales, of the products before
    const int act_rows = s.n_rows * N::TERMS;
    EpilogueLane<N> own;
    own.n = lane % ROWS;
    own.b = lane / ROWS;
    own.in_batch = own.b < s.n_rows;
    const Turn turn = turn_of(s);
    wait_for_previous_kernel();
    for (int i = threadIdx.x - 32 * EPILOGUE_WARP; i < s.n_rows * (s.head_dim / 2); i += 32 * EPILOGUE_WARPS)
        block.rope[i] = s.rope[i];
    clear_other_set(s, turn);
    epilogue_sync();
    for (int i = 0; i < s.n_products; i++) {
        const Product &f = s.product[i];
        const ProductKind kind = f.kind;
        const int rows = f.rows, n_sums = (f.n_slices + f.slices_per_sum - 1) / f.slices_per_sum;
        float *to = (f.leaves_partial ? s.down_partial : own_x(s)) + (size_t)own.b * s.dim + own.n;
        const XPlace place = x_place(s, f, turn);
        float best = -INFINITY;
        int best_row = rows, n_tiles;
        PendingTile<N> pending = {};
        for (int k = warp;; k += EPILOGUE_WARPS) {
            ring.slot = (first + k) % PARTIAL_BUFFERS, ring.parity = (first + k) / PARTIAL_BUFFERS % 2;
            ring.wait_full();
            int tile = *(volatile const int *)(block.partial_tile + ring.slot), row = tile * TILE + own.n;
            if (tile <= END_OF_PRODUCT) {
                n_tiles = k - (END_OF_PRODUCT - tile);
                break;
            }
            float x[GROUPS] = {}, sum[GROUPS] = {}, scale[GROUPS], all = 0;
            if (kind == PRODUCT_OUT && own.in_batch) {
                const float *from = block.residuals + (k % RESIDUAL_BUFFERS * s.n_rows + own.b) * TILE + own.n;
#pragma unroll
                for (int g = 0; g < GROUPS; g++) x[g] = from[g * ROWS];
            }
            if (kind == PRODUCT_DOWN && own.in_batch) // dim is a multiple of 8: a tile is whole
#pragma unroll
                for (int g = 0; g < GROUPS; g++) {
                    if (!f.leaves_partial) x[g] = after_out(s, turn, to + tile * TILE + g * ROWS);
                    if (f.adds_partial) sum[g] = load_l2(s.down_partial + (size_t)own.b * s.dim + row + g * ROWS);
                }
            if (N::PACKED && f.scales) {
                const float *from = block.scales + (first_scales + k) % RESIDUAL_BUFFERS * TILE + own.n;
#pragma unroll
                for (int g = 0; g < GROUPS; g++) scale[g] = from[g * ROWS];
            }
            own.add_partials(sum, block.partials + ring.slot * s.partial_floats + own.b * N::TERMS * TILE, n_sums,
                             act_rows);
            if (N::PACKED && f.scales)
#pragma unroll
                for (int g = 0; g < GROUPS; g++) sum[g] *= scale[g];
#pragma unroll
            for (int g = 0; g < GROUPS; g++) all += sum[g];
            __syncwarp();
            if (lane == 0) mbarrier_arrive_after(ring.empty + 8 * ring.slot, all);
            if (kind == PRODUCT_OUT)
                own.out(s, place, to, tile, x, sum);
            else if (kind == PRODUCT_DOWN) {
                pending.store(s, place);
#pragma unroll
                for (int g = 0; g < GROUPS; g++) pending.x[g] = x[g], pending.sum[g] = sum[g];
                pending.to = own.in_batch ? to + tile * TILE : NULL;
            } else if (kind == PRODUCT_GATE_UP)
                own.gate_up(s, turn, tile, sum);
            else if (kind == PRODUCT_QKV)
                own.qkv(s, block.rope, row, sum);
            else
                own.lm_head(s, row, rows, sum, best, best_row);
        }
        pending.store(s, place);
        __syncwarp();
        if (kind == PRODUCT_LM_HEAD) {
            for (int step = 1; step < ROWS; step *= 2)
                take_best(best, best_row, __shfl_xor_sync(~0u, best, step), __shfl_xor_sync(~0u, best_row, step));
            if (own.in_batch && own.n == 0)
                publish(s, s.best + own.b * s.best_pitch + blockIdx.x * EPILOGUE_WARPS + warp,
                        make_int2(__float_as_int(best), best_row < 0 ? best_row : best_row + s.first_token));
        }
        if (lane == 0) mbarrier_arrive(ring.empty + 8 * ring.slot);
        first += n_tiles + EPILOGUE_WARPS;
        if (N::PACKED && f.scales) first_scales += n_tiles;
        epilogue_sync(); // none goes on while another still looks for the end of this product
        if (warp == 0 && lane == 0 && i + 1 < s.n_products && !f.leaves_partial) count_product(s, s.done + i);
        if (warp == 0 && lane == 0 && kind == PRODUCT_LM_HEAD) count_block(s);
    }
}

// ---- the consumers --------------------------------------------------------------------------------------------------

// acc += a stage's weights, rows `pitch` bytes apart, times activations: all of a warp's columns, or n mmas of them.
template <typename N, int PAIRS, bool ALL>
__device__ __forceinline__ void multiply(float (&acc)[N::GROUPS][PAIRS][2][4], uint32_t weights, int pitch,
                                         const uint2 (&a)[PAIRS][N::STEPS], int n) {
    uint4 w[N::GROUPS][N::STEPS];
#pragma unroll
    for (int g = 0; g < N::GROUPS; g++)
#pragma unroll
        for (int c = 0; c < N::STEPS; c++) {
            uint32_t from = weights + g * MMA_WEIGHT_ROWS * pitch + c * 128;
            w[g][c] = ALL ? load_shared16(from) : load_shared16(from, c < n);
        }
#pragma unroll
    for (int c = 0; c < N::STEPS; c++)
#pragma unroll
        for (int g = 0; g < N::GROUPS; g++) {
            uint4 v = w[g][c];
            if constexpr (std::is_same<typename N::E, typename N::W>::value) {
#pragma unroll
                for (int r = 0; r < PAIRS; r++)
                    mma_16x8x16<typename N::E>(acc[g][r][c % 2], v.x, v.y, v.z, v.w, a[r][c].x, a[r][c].y);
            } else {
                uint4 hi, lo;
                split_f16(v.x, hi.x, lo.x), split_f16(v.y, hi.y, lo.y), split_f16(v.z, hi.z, lo.z),
                    split_f16(v.w, hi.w, lo.w);
#pragma unroll
                for (int r = 0; r < PAIRS; r++) {
                    mma_16x8x16<typename N::E>(acc[g][r][c % 2], lo.x, lo.y, lo.z, lo.w, a[r][c].x, a[r][c].y);
                    mma_16x8x16<typename N::E>(acc[g][r][c % 2], hi.x, hi.y, hi.z, hi.w, a[r][c].x, a[r][c].y);
                }
            }
        }
}

// The end of a product, to the other epilogue warps.
__device__ __forceinline__ void end_product(const Block &block, Ring &partials_ring) {
    for (int e = 1; e < EPILOGUE_WARPS; e++) {
        partials_ring.wait_empty();
        if (threadIdx.x == 0) *(volatile int *)(block.partial_tile + partials_ring.slot) = END_OF_PRODUCT - e;
        __syncwarp();
        if (threadIdx.x % 32 == 0) mbarrier_arrive(partials_ring.full + 8 * partials_ring.slot);
        partials_ring.next();
    }
}

// The tiles of a product. Every warp has its columns of every K slice. PAIRS of activation rows; in place of rows that
// are not there it takes row 0 again, in columns of the mma that no one reads.
template <typename N, int PAIRS>
__device__ __forceinline__ void consume_tiles(const FusedParams &s, const Product &f, const Block &block, Ring &ring,
                                              Ring &partials_ring) {
    constexpr int GROUPS = N::GROUPS, STEPS = N::STEPS, TILE = N::TILE;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int act_rows = s.n_rows * N::TERMS, n_slices = f.n_slices, slice = f.slice, cols = f.cols,
              slices_per_sum = f.slices_per_sum, pitch = f.weight_pitch;
    const int span = slice / CONSUMER_WARPS; // columns of a slice that are this warp's
    const int weight_column = warp * span + mma_weight_column(lane), act_column = warp * span + mma_act_column(lane);
    const int sum_floats = CONSUMER_WARPS * act_rows * TILE, partial_floats = s.partial_floats,
              stage_bytes = s.stage_bytes;
    const uint32_t weights = block.stages + mma_weight_row(lane) * pitch + weight_column * 2;
    float *partials = block.partials + (warp * act_rows + t / 2) * TILE;
    uint32_t act[PAIRS];
#pragma unroll
    for (int r = 0; r < PAIRS; r++) {
        int row = r * MMA_ACT_ROWS + mma_act_row(lane) < act_rows ? r * MMA_ACT_ROWS + mma_act_row(lane) : 0;
        act[r] = block.act + row * f.act_pitch + act_column * 2 + mma_act_pair(lane) * 8;
    }
    uint2 a[PAIRS][STEPS];
    for (bool have_act = false;;) {
        int tile = 0, in_sum = 0, part = 0;
        float sum[GROUPS][PAIRS] = {};
        for (int p = 0; p < n_slices; p++) {
            int left = cols - p * slice;
            bool whole = span == STEPS * 64 && left >= slice;
            if (!have_act) {
                int n_act = whole ? STEPS : min(span, left - act_column + 63) >> 6;
#pragma unroll
                for (int r = 0; r < PAIRS; r++)
#pragma unroll
                    for (int c = 0; c < STEPS; c++) a[r][c] = load_shared8(act[r] + p * slice * 2 + c * 128, c < n_act);
                have_act = n_slices == 1; // they are the next tile's, too
            }
            ring.wait_full();
            if (p == 0) tile = *(volatile const int *)(block.stage_tile + ring.slot);
            float acc[GROUPS][PAIRS][2][4] = {};
            uint32_t stage = weights + ring.slot * stage_bytes;
            if (whole)
                multiply<N, PAIRS, true>(acc, stage, pitch, a, 0);
            else
                multiply<N, PAIRS, false>(acc, stage, pitch, a, min(span, left - weight_column + 63) >> 6);
            // A slice's mmas are added up here, rounded to nearest: tensor cores truncate, and a long chain of that is
            // a bias.
            float all = 0;
#pragma unroll
            for (int i = 0; i < GROUPS; i++)
#pragma unroll
                for (int r = 0; r < PAIRS; r++) {
                    sum[i][r] += (acc[i][r][0][0] + acc[i][r][0][3]) + (acc[i][r][1][0] + acc[i][r][1][3]);
                    all += sum[i][r];
                }
            if (lane == 0) mbarrier_arrive_after(ring.empty + 8 * ring.slot, all);
            ring.next();
            if (p == 0) {
                partials_ring.wait_empty();
                if (threadIdx.x == 0) *(volatile int *)(block.partial_tile + partials_ring.slot) = tile;
                if (tile == END_OF_PRODUCT) break; // what was computed is of no tile
            }
            if (++in_sum < slices_per_sum && p + 1 < n_slices) continue;
            float *to = partials + partials_ring.slot * partial_floats + part++ * sum_floats;
            in_sum = 0;
#pragma unroll
            for (int i = 0; i < GROUPS; i++)
#pragma unroll
                for (int r = 0; r < PAIRS; r++) {
                    sum[i][r] += __shfl_xor_sync(~0u, sum[i][r], 5); // both halves of 64 columns
                    if (g % 2 == 0 && t % 2 == 0 && r * 2 + t / 2 < act_rows)
                        to[r * 2 * TILE + EpilogueLane<N>::partial_place(i * MMA_WEIGHT_ROWS + g / 2)] = sum[i][r];
                    sum[i][r] = 0;
                }
        }
        __syncwarp();
        if (lane == 0) mbarrier_arrive(partials_ring.full + 8 * partials_ring.slot);
        partials_ring.next();
        if (tile == END_OF_PRODUCT) {
            end_product(block, partials_ring);
            return;
        }
    }
}

#include "fused_packed.cuh"

// The tiles of a product of the kernel's kind of weights.
template <typename N>
__device__ __forceinline__ void consume_product(const FusedParams &s, const Product &f, const Block &block, Ring &ring,
                                                Ring &partials_ring) {
    typedef typename N::Weights Weights;
    const int rows = s.n_rows * N::TERMS;
    if constexpr (N::KIND == KIND_CODES)
        consume_packed<N, typename Weights::Codes, Weights::SCALES, typename Weights::Scale>(s, f, block, ring,
                                                                                             partials_ring);
    else if constexpr (N::KIND == KIND_16)
        consume_tiles<N, N::MAX_ROWS / MMA_ACT_ROWS>(s, f, block, ring, partials_ring);
    else if (f.codes != CODES_NONE)
        consume_packed_product<N>(s, f, block, ring, partials_ring);
    else if (N::MAX_ROWS <= 2 || rows <= 2)
        consume_tiles<N, 1>(s, f, block, ring, partials_ring);
    else if constexpr (N::MAX_ROWS > 2) {
        if (rows <= 4)
            consume_tiles<N, 2>(s, f, block, ring, partials_ring);
        else
            consume_tiles<N, 4>(s, f, block, ring, partials_ring);
    }
}

// Waits until all blocks have finished a product: edge D in fused.h.
template <class Params> __device__ __forceinline__ void wait_for_product(const Params &s, const unsigned *done) {
    if (threadIdx.x == 0) {
        unsigned n;
        do n = blocks_done(s, done);
        while (n < gridDim.x);
    }
    consumers_sync();
}

// May rows be normalised once for all blocks? By the kernel for so many rows; not across GPUs, and not as bf16x3.
template <typename N, class Params>
constexpr bool normalises_once =
    N::TERMS == 1 && N::MAX_ROWS >= NORMALISE_ONCE_ROWS && std::is_same<Params, FusedParams>::value;

template <typename N, class Params>
__device__ __forceinline__ void consume(const Params &s, const Block &block, Ring ring, Ring partials_ring) {
    const Turn turn = turn_of(s);
    for (int i = 0; i < s.n_products; i++) {
        const Product &f = s.product[i];
        auto wait = [&] {
            if (i == 0) {
                wait_for_previous_kernel();
                let_next(s); // not before: attention relies on it (AttentionArgs.kv_stable)
            } else if (f.adds_partial)
                consumers_sync(); // done with the part of K before; h is complete
            else {
                wait_for_product(s, s.done + i - 1);
                send_product<N>(s, f, turn);
            }
        };
        auto normalised = [&](auto rows, auto each) {
            float4 w[each.value];
            load_norm(f, w);
            wait();
            store_normalised<N, rows.value, each.value>(s, f, 0, s.n_rows, input_x(s, f, turn), w, block.shared,
                                                        f.act_pitch, block.sums);
        };
        if (f.norm) { // 16 float4s a thread at most
            typedef std::integral_constant<int, 1024 / CONSUMER_THREADS> Short;
            typedef std::integral_constant<int, FUSED_MAX_DIM / 4 / CONSUMER_THREADS> Long;
            if (normalises_once<N, Params> && s.n_rows >= NORMALISE_ONCE_ROWS) {
                wait();
                if (f.cols <= 4096)
                    store_normalised_once<N, Short::value>(s, f, i, block.shared, block.sums);
                else
                    store_normalised_once<N, Long::value>(s, f, i, block.shared, block.sums);
            } else if (s.n_rows == 1 && f.cols <= 4096)
                normalised(std::integral_constant<int, 1>(), Short());
            else if (f.cols <= 4096)
                normalised(std::integral_constant<int, 4>(), Short());
            else
                normalised(std::integral_constant<int, 2>(), Long());
        } else {
            wait();
            if (f.kind == PRODUCT_OUT) {
                send_attention<typename N::KV>(s, turn);
                store_attention<N>(s, f, input_attention<typename N::KV>(s, turn), block.shared);
            } else
                store_hidden<N>(s, f, turn, block.shared);
        }
        if (N::PACKED && f.codes != CODES_NONE && f.cols % PACK_CHUNK)
            clear_last_chunk(f, s.n_rows * N::TERMS, block.shared);
        consumers_sync();
        if (threadIdx.x == 0) *block.started = i + 1;
        consume_product<N>(s, f, block, ring, partials_ring);
    }
}

// Computes: the matrix products between two attentions, one after another, with what is around them: RMSNorm,
//           residual sums, SwiGLU, RoPE, each block's argmax of its logits.
// Reads:    weights 16-bit, x, att, rope; shapes in FusedParams, who orders what in fused.h.
// Writes:   x, h, qkv, logits, best, normed, down_partial, done, next_tile, rows_normalised.
// Grid:     SMs × 384 threads, of quantised weights 352: one block on every SM, all resident at once; a tile is one
//           block's.
// Requires: done = next_tile = rows_normalised = 0; cols % 8 = 0; n_rows <= N::MAX_TOKENS; dynamic shared memory as
//           FusedPlan says.
template <typename N, class Params>
__global__ void __launch_bounds__(N::PACKED ? WORKER_THREADS : FUSED_THREADS, 1)
    decode_products_kernel(const __grid_constant__ Params s) {
    extern __shared__ __align__(128) char shared[];
    __shared__ uint64_t barriers[2 * MAX_STAGES + 2 * PARTIAL_BUFFERS];
    __shared__ float sums[4 * CONSUMER_WARPS];
    __shared__ int stage_tile[MAX_STAGES], partial_tile[PARTIAL_BUFFERS], started;
    static_assert(sizeof barriers + sizeof sums + sizeof stage_tile + sizeof partial_tile + sizeof started == 452,
                  "fused.h says so");
    static_assert(452 <= FUSED_STATIC_BYTES, "fused_plan leaves room for them");
    uint32_t first = shared_address(barriers);
    Block block = {shared_address(shared) + s.ring_offset,
                   shared_address(shared),
                   shared,
                   (float *)(shared + s.partials_offset),
                   sums,
                   stage_tile,
                   partial_tile,
                   (float2 *)(shared + s.rope_offset),
                   (float *)(shared + s.residuals_offset),
                   (float *)(shared + s.scales_offset),
                   (float *)(shared + s.code_sums_offset),
                   &started};
    Ring ring = {first, first + 8 * MAX_STAGES, s.n_stages, 0, 0};
    Ring partials_ring = {first + 16 * MAX_STAGES, first + 16 * MAX_STAGES + 8 * PARTIAL_BUFFERS, PARTIAL_BUFFERS, 0,
                          0};
    constexpr bool MOVES_REGISTERS = !N::PACKED;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    // Every launch fetches its parameters anew: all lines of them at once, a few a warp.
    for (int i = warp * 64; i < (int)sizeof s; i += 64 * FUSED_WARPS)
        asm volatile("" ::"r"(*(const int *)((const char *)&s + i)));
    if (MOVES_REGISTERS && warp < EPILOGUE_WARP) {
        increase_registers<CONSUMER_REGISTERS>();
        named_barrier_sync(BARRIER_FUSED_SETUP, WORKER_THREADS);
        consume<N>(s, block, ring, partials_ring);
        return;
    }
    if (MOVES_REGISTERS) decrease_registers<OTHER_REGISTERS>();
    if (warp == PRODUCER_WARP) { // does not wait for the others: memory has nothing to do before its first copy
        if (lane == 0) started = 0;
        if (lane < s.n_stages) {
            mbarrier_init(ring.full + 8 * lane, 1);
            mbarrier_init(ring.empty + 8 * lane, CONSUMER_WARPS);
        }
        if (lane < PARTIAL_BUFFERS) {
            mbarrier_init(partials_ring.full + 8 * lane, CONSUMER_WARPS);
            mbarrier_init(partials_ring.empty + 8 * lane, 1);
        }
        fence_mbarrier_init();
        __syncwarp();
        named_barrier_arrive(BARRIER_FUSED_SETUP, WORKER_THREADS);
        produce<N>(s, block, ring);
        return;
    }
    if (MOVES_REGISTERS && warp > PRODUCER_WARP) return;
    named_barrier_sync(BARRIER_FUSED_SETUP, WORKER_THREADS);
    if (warp >= EPILOGUE_WARP)
        epilogue<N>(s, block, partials_ring);
    else
        consume<N>(s, block, ring, partials_ring);
}

// Computes: what a step begins with: the embedding of each token, and the RoPE table of its position.
// Reads:    table [vocab][dim] W, tokens [n_rows], pos [n_rows], freq [half].
// Writes:   x [n_rows][dim] float32, rope [n_rows][half]: cosine and sine.
// Grid:     n_rows × 256 threads; a block owns a token.
// Requires: launched without PDL: the kernels before are complete.
template <typename W>
__global__ void decode_embed_kernel(float *x, const W *table, const int *tokens, int dim, float2 *rope, const int *pos,
                                    const float *freq, int half) {
    let_next_kernel_start();
    const W *from = table + (size_t)tokens[blockIdx.x] * dim;
    for (int i = threadIdx.x; i < dim; i += blockDim.x) x[(size_t)blockIdx.x * dim + i] = to_float(from[i]);
    for (int i = threadIdx.x; i < half; i += blockDim.x)
        rope[(size_t)blockIdx.x * half + i] = rope_angle(pos[blockIdx.x], freq[i]);
}

// Computes: what a step ends with: each row's next token (argmax), -1 if a logit is not finite, to the host and as the
//           next step's input; the counters at zero for that one.
// Reads:    best [rows][n_best]; of several GPUs (ranks.n > 0), when all of them have written theirs.
// Writes:   next and next_host [rows]; of step, from row `first` on, tokens and lens; done [n_done], all counters of
//           the step; of several GPUs the number of steps.
// Grid:     1 × 32 threads for each row, at least; a warp owns a row.
// Requires: rows <= MAX_ACT_ROWS.
__global__ void decode_argmax_kernel(const int2 *best, int n_best, int vocab, int *next, int *next_host,
                                     StepInput *step, int first, int rows, unsigned *done, int n_done,
                                     RanksToWaitFor ranks) {
    wait_for_previous_kernel();
    int lane = threadIdx.x % 32, b = threadIdx.x / 32;
    for (int i = threadIdx.x; i < n_done; i += blockDim.x) done[i] = 0;
    if (ranks.n > 0) {
        if (threadIdx.x == 0) {
            const unsigned steps = *ranks.step + 1;
            Patience patience(ranks.wait_limit);
            while ((int)(load_acquire_system(ranks.done) - steps * ranks.blocks * ranks.n) < 0) patience.turn();
            *ranks.step = steps;
        }
        __syncthreads();
    }
    if (b >= rows) return;
    float logit = -INFINITY;
    int token = vocab;
    for (int i = lane; i < n_best; i += 32) {
        int2 x = __ldcg(best + b * n_best + i);
        take_best(logit, token, __int_as_float(x.x), x.y);
    }
#pragma unroll
    for (int i = 1; i < 32; i *= 2)
        take_best(logit, token, __shfl_xor_sync(~0u, logit, i), __shfl_xor_sync(~0u, token, i));
    if (lane > 0) return;
    next[b] = next_host[b] = token;
    step->tokens[first + b] = max(token, 0); // -1: the caller stops here
    step->lens[first + b]++;
}

} // namespace
