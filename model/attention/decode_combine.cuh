// Decode: results of parts of a sequence, and how they are combined.
#pragma once

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
            store_async16(at + n * (TILES + 1) * DECODE_THREADS * 16, make_float4(m[n][0], m[n][1], l[n][0], l[n][1]), barrier);
            #pragma unroll
            for (int i = 0; i < TILES; i++)
                store_async16(at + (n * (TILES + 1) + 1 + i) * DECODE_THREADS * 16, make_float4(o[n][i][0], o[n][i][1], o[n][i][2], o[n][i][3]), barrier);
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
