// Decode attention: results of KV splits, and how they are combined: in groups of 8, then the groups, in their order.
// In registers (DecodeState, DecodeCombine) or from the workspace (combine_partials), with the same operations.
#pragma once

#include "decode_schedule.cuh"

// A thread's part of the result of a split, or of several: for heads 2t and 2t+1 of every column block the largest
// score (log2) and the sum of weights, and the weighted sum of V for dims g and g + 8 of the warp's tiles of 16. The
// order of additions and their rounding are fixed, so that combining in registers and from the workspace give the same
// bits.
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
                for (int j = 0; j < 4; j++)
                    o[n][i][j] = __fmaf_rn(x.o[n][i][j], b[j & 1], __fmul_rn(o[n][i][j], a[j & 1]));
        }
    }

    // To this thread's place in what the first block of a cluster receives, at `at` there, and from it: [16
    // bytes][thread].
    static constexpr int VECTORS = NT * (TILES + 1);
    __device__ __forceinline__ void send(uint32_t at, uint32_t barrier) const {
#pragma unroll
        for (int n = 0; n < NT; n++) {
            store_async16(at + n * (TILES + 1) * DECODE_THREADS * 16, make_float4(m[n][0], m[n][1], l[n][0], l[n][1]),
                          barrier);
#pragma unroll
            for (int i = 0; i < TILES; i++)
                store_async16(at + (n * (TILES + 1) + 1 + i) * DECODE_THREADS * 16,
                              make_float4(o[n][i][0], o[n][i][1], o[n][i][2], o[n][i][3]), barrier);
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

// Combines the splits of a query tile in their order: a group at a time, then the groups.
template <class State> struct DecodeCombine {
    State group, all;
    __device__ __forceinline__ void add(const State &x, int split, int n_splits) {
        if (add_to_group(x, split, n_splits)) add_group(split);
    }
    // The steps of it: the first says whether the split completes its group, the second adds that group.
    __device__ __forceinline__ bool add_to_group(const State &x, int split, int n_splits) {
        if (split % KV_GROUP == 0)
            group = x;
        else
            group.add(x);
        return split % KV_GROUP == KV_GROUP - 1 || split + 1 == n_splits;
    }
    __device__ __forceinline__ void add_group(int split) {
        if (split < KV_GROUP)
            all = group;
        else
            all.add(group);
    }
};

// A result; a zero always as +0, as its sign depends on who combines.
template <typename T> __device__ __forceinline__ T from_combined(float o, float inverse) {
    return from_float<T>(__fmul_rn(o, inverse) + 0.0f);
}

// In place of the sum of weights of a group's second split: the first one's place has the whole group.
constexpr float IN_GROUP = -1.0f;

template <typename T> struct alignas(4 * sizeof(T)) Four {
    T x[4];
};

// The groups of one query head, four dims of them, added up with the operations of DecodeCombine.
struct RowSum {
    float m, l;
    float4 o;

    __device__ __forceinline__ RowSum() : m(0.0f), l(0.0f), o(make_float4(0.0f, 0.0f, 0.0f, 0.0f)) {
    }
    __device__ __forceinline__ void add(bool first, float xm, float xl, float4 x) {
        float top = first ? xm : fmaxf(m, xm), a = first ? 0.0f : exp2_fast(m - top),
              b = first ? 1.0f : exp2_fast(xm - top);
        m = top;
        l = __fmaf_rn(xl, b, __fmul_rn(l, a));
        o.x = __fmaf_rn(x.x, b, __fmul_rn(o.x, a));
        o.y = __fmaf_rn(x.y, b, __fmul_rn(o.y, a));
        o.z = __fmaf_rn(x.z, b, __fmul_rn(o.z, a));
        o.w = __fmaf_rn(x.w, b, __fmul_rn(o.w, a));
    }
    template <typename T> __device__ __forceinline__ void store(T *out) const {
        float inverse = __frcp_rn(l);
        *(Four<T> *)out = {{from_combined<T>(o.x, inverse), from_combined<T>(o.y, inverse),
                            from_combined<T>(o.z, inverse), from_combined<T>(o.w, inverse)}};
    }
};

// The block that brought the last splits of a query tile combines all of them from the workspace, with the operations
// of DecodeState and DecodeCombine, element by element. A warp takes a query head; lane k computes the weights of split
// k, for all lanes, and owns dims 4k .. 4k+3. It runs once, so what it costs is two ways through L2, of its data and of
// its code.
template <typename T, int D, class Shared>
__device__ __forceinline__ void combine_partials(const DecodeParams &p, const Shared &shared) {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, dim = lane * 4;
    bool has_dims = lane < D / 4;
    for (int row = warp; row < shared.rows; row += blockDim.x >> 5) {
        const DecodeColumn at = shared.column(p, row);
        const int n_splits = shared.splits(p, row);
        size_t part = ((size_t)at.token * p.n_heads + at.head) * p.max_splits;
        RowSum all;
#pragma unroll 1
        for (int c = 0; c < n_splits; c += 16) {
            int n = min(16, n_splits - c);
            float2 ml = lane < n ? __ldcg(p.partial_ml + part + c + lane) : make_float2(-INFINITY, 0.0f);
            const float4 *from = (const float4 *)(p.partial_o + (part + c) * D + dim);
            float4 x[16];
#pragma unroll
            for (int k = 0; k < 16; k++)
                x[k] = k < n && has_dims ? __ldcg(from + k * (D / 4)) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            float top = ml.x; // the largest score so far of the group
#pragma unroll
            for (int x = 1; x < 8; x *= 2) {
                float y = __shfl_up_sync(~0u, top, x, 8);
                if ((lane & 7) >= x) top = fmaxf(top, y);
            }
            float a = exp2_fast(__shfl_up_sync(~0u, top, 1, 8) - top), b = exp2_fast(ml.x - top);
#pragma unroll
            for (int e = 0; e < 16; e += 8) {
                if (e >= n) break;
                bool in_group = __shfl_sync(~0u, ml.y, e + 1) == IN_GROUP;
                float m = __shfl_sync(~0u, in_group ? ml.x : top, in_group ? e : e + 7), l = __shfl_sync(~0u, ml.y, e);
                float4 sum = x[e];
                if (!in_group)
#pragma unroll
                    for (int i = 1; i < 8; i++) { // after the end: adding nothing
                        float ai = __shfl_sync(~0u, a, e + i), bi = __shfl_sync(~0u, b, e + i),
                              li = __shfl_sync(~0u, ml.y, e + i);
                        l = __fmaf_rn(li, bi, __fmul_rn(l, ai));
                        sum.x = __fmaf_rn(x[e + i].x, bi, __fmul_rn(sum.x, ai));
                        sum.y = __fmaf_rn(x[e + i].y, bi, __fmul_rn(sum.y, ai));
                        sum.z = __fmaf_rn(x[e + i].z, bi, __fmul_rn(sum.z, ai));
                        sum.w = __fmaf_rn(x[e + i].w, bi, __fmul_rn(sum.w, ai));
                    }
                all.add(c + e == 0, m, l, sum);
            }
        }
        if (has_dims) all.store((T *)p.out + at.token * p.out_token_stride + at.head * p.out_head_stride + dim);
    }
}

// At the end of a block, when all its threads have written their partial results: counts them in each query tile that
// it shares, at most the first and the last of its range. Whoever brings a tile's last splits combines it.
template <class Shared> __device__ __forceinline__ Shared *shared_tiles() {
    __shared__ Shared shared[2];
    return shared;
}
template <typename T, int D, class Cursor>
__device__ __forceinline__ void combine_arrive(const DecodeParams &p, int n_shared) {
    typedef typename Cursor::Shared Shared;
    Shared *shared = shared_tiles<Shared>();
    __syncthreads(); // all of this block's partial results are written
    if (threadIdx.x < n_shared) {
        Shared &s = shared[threadIdx.x];
        s.is_last = (int)atomic_add_acq_rel(p.arrived + s.first_block, s.visited) + s.visited == s.n_splits;
        if (s.is_last) p.arrived[s.first_block] = 0;
    }
    __syncthreads(); // is_last is known
#pragma unroll 1
    for (int i = 0; i < n_shared; i++)
        if (shared[i].is_last) combine_partials<T, D>(p, shared[i]);
}
// Thread 0 notes the query tile that the block is about to begin its part of.
template <class Cursor>
__device__ __forceinline__ void share_tile(const DecodeParams &p, const Cursor &item, int heads, int i) {
    if (threadIdx.x == 0) shared_tiles<typename Cursor::Shared>()[i] = item.share(p, heads);
}
