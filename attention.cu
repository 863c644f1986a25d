// attention.cu: causal grouped-query attention over the KV cache: prefill, split-KV decode, merge.
// Interface and promises: model/attention.h. Reading order: the cache, the tensor-core primitives, decode (16-bit tiles,
// float32 tiles, the split kernel, the merge), prefill (append, the plain kernel, float32; Hopper's own kernel is in
// model/attention_sm90.cuh), and the C interface with its checks at the end.
#include <float.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <type_traits>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "model/attention.h"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900 && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#error "build sm_90 as compute_90a/sm_90a: the Hopper prefill kernel uses wgmma"
#endif

typedef __nv_bfloat16 bf16;
typedef __half f16;

constexpr float LOG2E = 1.44269504088896340736f;

// ---------------------------------------------------------------------------------------------------------------------
// The cache and its addresses

template <typename T> struct Cache {
    T *k, *v;            // [block][n_kv_heads][block_size][head_dim]
    const int *table;    // [n_seq][table_width], or NULL: sequence i owns block i
    int n_kv_heads, head_dim, block_size, table_width;
};

// Offset in elements of the K (and V) row of one position. Rows of 16 positions that start on a multiple of 16 lie one
// after another, in a paged cache as well: block_size is a multiple of 16 there.
template <typename T> __device__ __forceinline__ size_t cache_row(const Cache<T> &c, int seq, int kv_head, int pos) {
    int block = seq;
    if (c.table) {
        block = c.table[(size_t)seq * c.table_width + pos / c.block_size];
        pos %= c.block_size;
    }
    return (((size_t)block * c.n_kv_heads + kv_head) * c.block_size + pos) * c.head_dim;
}

// ---------------------------------------------------------------------------------------------------------------------
// Primitives

__device__ __forceinline__ uint32_t smem_address(const void *p) { return (uint32_t)__cvta_generic_to_shared(p); }

// 2^x; 2^-inf = 0. Results below 2^-126 are flushed to zero, which no softmax weight can notice.
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Asynchronous 16-byte copy to shared memory; writes zeros if not valid (the address must be legal all the same).
__device__ __forceinline__ void copy_async16(uint32_t dst, const void *src, bool valid) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(valid ? 16 : 0) : "memory");
}
__device__ __forceinline__ void copy_async16(uint32_t dst, const void *src) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(dst), "l"(src) : "memory");
}
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> __device__ __forceinline__ void copy_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

// Programmatic dependent launch (Hopper and later): wait until the kernels before this one in the stream are complete;
// let the next one be scheduled while this one runs (it waits in the same way before it touches memory).
__device__ __forceinline__ void wait_for_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void let_next_kernel_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Four 8x8 matrices of 16-bit elements; lane i gives the address of row i % 8 of matrix i / 8.
__device__ __forceinline__ void load_matrix4(uint32_t r[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}
__device__ __forceinline__ void load_matrix4_transposed(uint32_t r[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}
// An 8x8 matrix held by the warp (lane 4i+j: row i, columns 2j and 2j+1), transposed.
__device__ __forceinline__ uint32_t transpose_matrix(uint32_t a) {
    uint32_t b;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(b) : "r"(a));
    return b;
}

// c[16x8] += a[16x16] b[16x8], 16-bit inputs, float32 accumulators.
template <typename T>
__device__ __forceinline__ void mma_16x8x16(float c[4], const uint32_t a[4], uint32_t b0, uint32_t b1) {
    if constexpr (std::is_same<T, bf16>::value)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    else
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <typename T> __device__ __forceinline__ uint32_t pack2(float lo, float hi) {
    uint32_t r;
    if constexpr (std::is_same<T, bf16>::value) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
    else asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
    return r;
}
template <typename T> __device__ __forceinline__ float2 unpack2(uint32_t r) {
    if constexpr (std::is_same<T, bf16>::value) return make_float2(__uint_as_float(r << 16), __uint_as_float(r & 0xffff0000u));
    else return __half22float2(*(const __half2 *)&r);
}
// What rounding x, y to T lost, itself rounded to T: x ~ hi + lo to 16 bits (bf16) or 22 (f16).
template <typename T> __device__ __forceinline__ uint32_t pack2_rest(float x, float y, uint32_t hi) {
    float2 h = unpack2<T>(hi);
    return pack2<T>(x - h.x, y - h.y);
}
template <typename T> __device__ __forceinline__ T from_float(float x) {
    if constexpr (std::is_same<T, float>::value) return x;
    else if constexpr (std::is_same<T, bf16>::value) return __float2bfloat16_rn(x);
    else return __float2half_rn(x);
}

// Byte offset of the 16-byte chunk `chunk` of row `row` in a tile of rows of D elements in shared memory. 16-bit tiles
// permute the chunks so that ldmatrix, which reads one chunk of eight rows, meets eight different bank groups.
template <typename T, int D> __device__ __forceinline__ uint32_t tile_offset(int row, int chunk) {
    if constexpr (sizeof(T) == 2) chunk ^= D == 96 ? (row >> 1) & 3 : row & 7;
    return (uint32_t)(row * D * (int)sizeof(T) + chunk * 16);
}

// ---------------------------------------------------------------------------------------------------------------------
// Decode. One new token per sequence. A sequence's positions are cut into chunks of a fixed length; a work item is one
// chunk of one KV head, with as many query heads of its group as a tile holds. As many blocks as the GPU holds share the
// items out evenly, each taking a run of neighbours, so the launch does not depend on the lengths and can be replayed from
// a graph. In a block each warp streams its own tiles through its own ring in shared memory, which runs on from item to
// item with no barrier; at the end of an item the warps' results are added up. The chunks of a group are then folded in
// their order, first to last: in registers where one block has them all, else by the block that finishes last, from the
// workspace, with the same operations. So nothing depends on what else is in the batch: a sequence gets the same bits
// alone and among others.

constexpr int DECODE_MAX_WARPS = 8;
constexpr int DECODE_STAGES = 2;    // tiles per warp in its ring; 8 KB each (K and V)

// The length of a chunk depends on the length of its own sequence only: 32 chunks at most up to 8192 positions, 128 at 131,072.
__host__ __device__ inline int decode_chunk(int total) { return total <= 8192 ? 256 : total <= 32768 ? 512 : 1024; }
__host__ __device__ inline int decode_chunks(int total) { int c = decode_chunk(total); return (total + c - 1) / c; }

struct DecodeParams {
    const void *q; void *out;                 // [seq][head][D]
    const void *k_new, *v_new;                // [seq][kv head][D]
    int64_t q_token_stride, q_head_stride, out_token_stride, out_head_stride;
    int64_t k_token_stride, k_head_stride, v_token_stride, v_head_stride;
    Cache<char> cache;
    const int *seq_lens;                      // [seq] positions in the cache before the new token
    unsigned *arrived;                        // [seq][kv head][head block] chunks done; zero between calls
    float2 *part_ml;                          // [seq][head][max_chunks]    a chunk's largest score (log2) and its sum
    float *part_o;                            // [seq][head][max_chunks][D] and its weighted sum of V
    int n_seq, n_heads, group, head_blocks;   // head_blocks: items per chunk and KV head, for groups larger than a tile
    int cache_max_len, max_chunks, append;
    float scale_log2;
};

// Positions that sequence seq sees, the new one included; 0 for one that would overflow its cache.
__device__ __forceinline__ int decode_total(const DecodeParams &p, int seq) {
    int total = p.seq_lens[seq] + 1;
    return total >= 1 && total <= p.cache_max_len ? total : 0;
}

// A block's place in its run of items: chunk innermost, then head block, KV head, sequence.
struct DecodeCursor {
    int seq, kv_head, head_block, chunk;
    int total, n_chunks;    // of seq
    int left;               // items of this block, the present one included

    // The block's share of all items; every warp computes it for itself.
    __device__ __forceinline__ void start(const DecodeParams &p, int lane) {
        int per_chunk = p.cache.n_kv_heads * p.head_blocks, sum = 0;
        for (int i = lane; i < p.n_seq; i += 32) sum += decode_chunks(decode_total(p, i));
        #pragma unroll
        for (int x = 1; x < 32; x *= 2) sum += __shfl_xor_sync(~0u, sum, x);
        long long items = (long long)sum * per_chunk;
        int begin = (int)(items * blockIdx.x / gridDim.x);
        left = (int)(items * (blockIdx.x + 1) / gridDim.x) - begin;
        if (left == 0) return;
        int first = begin / per_chunk, r = 0;    // which sequence holds chunk `first` of all sequences' chunks?
        for (int base = 0; base < p.n_seq; base += 32) {
            int mine = base + lane < p.n_seq ? decode_chunks(decode_total(p, base + lane)) : 0, upto = mine;
            #pragma unroll
            for (int x = 1; x < 32; x *= 2) {
                int y = __shfl_up_sync(~0u, upto, x);
                if (lane >= x) upto += y;
            }
            unsigned beyond = __ballot_sync(~0u, upto > first);
            if (beyond) {
                int at = __ffs(beyond) - 1;
                seq = base + at;
                n_chunks = __shfl_sync(~0u, mine, at);
                r = begin - __shfl_sync(~0u, upto - mine, at) * per_chunk;
                break;
            }
            first -= __shfl_sync(~0u, upto, 31);
            begin -= __shfl_sync(~0u, upto, 31) * per_chunk;
        }
        total = decode_total(p, seq);
        chunk = r % n_chunks;
        r /= n_chunks;
        head_block = r % p.head_blocks;
        kv_head = r / p.head_blocks;
    }
    __device__ __forceinline__ void next(const DecodeParams &p) {
        if (--left == 0 || ++chunk < n_chunks) return;
        chunk = 0;
        if (++head_block < p.head_blocks) return;
        head_block = 0;
        if (++kv_head < p.cache.n_kv_heads) return;
        kv_head = 0;
        do total = decode_total(p, ++seq);
        while (total == 0);    // there is another item, so there is another sequence
        n_chunks = decode_chunks(total);
    }
    __device__ __forceinline__ int begin() const { return chunk * decode_chunk(total); }
    __device__ __forceinline__ int end() const { return min(total, (chunk + 1) * decode_chunk(total)); }
};

// Tile arithmetic on tensor cores, 16-bit. Keys are the rows and query heads the columns of S^T = K Q^T, and likewise
// O^T = V^T P^T, so a group of up to 8 heads fills the instruction's 8 columns (NT such column blocks). Each K/V element
// is loaded once for all heads. P enters the second product as the sum of two 16-bit terms: there is room, the kernel
// waits for memory, and the result is exact to the rounding of the output.
template <typename T, int D, int NT> struct MmaTile {
    typedef T Elem;
    static constexpr int DIM = D, HEADS = 8 * NT, SUBS = D == 64 ? 2 : 1, TOKENS = 16 * SUBS;
    uint32_t q[NT][D / 16][2];
    float o[NT][D / 16][4];    // [column block][16 dims]: dims g, g+8 of heads 2t, 2t+1 (g = lane / 4, t = lane % 4)
    float m[NT][2], l[NT][2];  // largest score so far (log2 units), sum of this lane's weights

    __device__ __forceinline__ void load_q(const T *q_rows, int64_t head_stride, int n_rows, int lane) {
        int g = lane >> 2, t = lane & 3;
        #pragma unroll
        for (int n = 0; n < NT; n++) {
            const T *row = q_rows + (n * 8 + g) * head_stride + 2 * t;
            #pragma unroll
            for (int d = 0; d < D / 16; d++)
                #pragma unroll
                for (int i = 0; i < 2; i++) q[n][d][i] = n * 8 + g < n_rows ? *(const uint32_t *)(row + d * 16 + i * 8) : 0u;
        }
    }
    __device__ __forceinline__ void reset() {
        #pragma unroll
        for (int n = 0; n < NT; n++) {
            #pragma unroll
            for (int d = 0; d < D / 16; d++) o[n][d][0] = o[n][d][1] = o[n][d][2] = o[n][d][3] = 0.0f;
            m[n][0] = m[n][1] = -INFINITY;
            l[n][0] = l[n][1] = 0.0f;
        }
    }

    __device__ __forceinline__ void accumulate(uint32_t k_tile, uint32_t v_tile, int n_valid, float scale_log2, int lane) {
        int g = lane >> 2;
        float s[SUBS][NT][4];
        #pragma unroll
        for (int u = 0; u < SUBS; u++) {
            #pragma unroll
            for (int n = 0; n < NT; n++) s[u][n][0] = s[u][n][1] = s[u][n][2] = s[u][n][3] = 0.0f;
            #pragma unroll
            for (int d = 0; d < D / 16; d++) {
                uint32_t a[4];
                load_matrix4(a, k_tile + tile_offset<T, D>(u * 16 + (lane & 15), d * 2 + (lane >> 4)));
                #pragma unroll
                for (int n = 0; n < NT; n++) mma_16x8x16<T>(s[u][n], a, q[n][d][0], q[n][d][1]);
            }
        }
        uint32_t hi[SUBS][NT][2], lo[SUBS][NT][2];
        #pragma unroll
        for (int n = 0; n < NT; n++) {
            float top[2] = {-INFINITY, -INFINITY}, alpha[2];
            #pragma unroll
            for (int u = 0; u < SUBS; u++)
                #pragma unroll
                for (int i = 0; i < 4; i++) {
                    float &x = s[u][n][i];
                    x *= scale_log2;
                    if (n_valid < TOKENS && u * 16 + g + 8 * (i >> 1) >= n_valid) x = -INFINITY;
                    top[i & 1] = fmaxf(top[i & 1], x);
                }
            #pragma unroll
            for (int h = 0; h < 2; h++) {
                #pragma unroll
                for (int x = 4; x < 32; x *= 2) top[h] = fmaxf(top[h], __shfl_xor_sync(~0u, top[h], x));
                top[h] = fmaxf(top[h], m[n][h]);
                alpha[h] = exp2_fast(m[n][h] - top[h]);
                m[n][h] = top[h];
                l[n][h] *= alpha[h];
            }
            if (__any_sync(~0u, alpha[0] != 1.0f || alpha[1] != 1.0f))
                #pragma unroll
                for (int d = 0; d < D / 16; d++) {
                    o[n][d][0] *= alpha[0]; o[n][d][1] *= alpha[1];
                    o[n][d][2] *= alpha[0]; o[n][d][3] *= alpha[1];
                }
            #pragma unroll
            for (int u = 0; u < SUBS; u++)
                #pragma unroll
                for (int i = 0; i < 2; i++) {
                    float p0 = exp2_fast(s[u][n][2 * i] - m[n][0]), p1 = exp2_fast(s[u][n][2 * i + 1] - m[n][1]);
                    l[n][0] += p0;
                    l[n][1] += p1;
                    uint32_t h = pack2<T>(p0, p1);
                    hi[u][n][i] = transpose_matrix(h);
                    lo[u][n][i] = transpose_matrix(pack2_rest<T>(p0, p1, h));
                }
        }
        #pragma unroll
        for (int u = 0; u < SUBS; u++)
            #pragma unroll
            for (int d = 0; d < D / 16; d++) {
                uint32_t a[4];
                load_matrix4_transposed(a, v_tile + tile_offset<T, D>(u * 16 + ((lane >> 4) & 1) * 8 + (lane & 7),
                                                                      d * 2 + ((lane >> 3) & 1)));
                #pragma unroll
                for (int n = 0; n < NT; n++) {
                    mma_16x8x16<T>(o[n][d], a, lo[u][n][0], lo[u][n][1]);
                    mma_16x8x16<T>(o[n][d], a, hi[u][n][0], hi[u][n][1]);
                }
            }
    }

    // This warp's sums to shared memory: ml[head] and o[head * pitch + dim].
    __device__ __forceinline__ void store(float2 *ml, float *rows, int pitch, int n_rows, int lane) {
        int g = lane >> 2, t = lane & 3;
        #pragma unroll
        for (int n = 0; n < NT; n++)
            #pragma unroll
            for (int h = 0; h < 2; h++) {
                float sum = l[n][h];
                #pragma unroll
                for (int x = 4; x < 32; x *= 2) sum += __shfl_xor_sync(~0u, sum, x);
                int head = n * 8 + 2 * t + h;
                if (head < n_rows) {
                    if (g == 0) ml[head] = make_float2(m[n][h], sum);
                    #pragma unroll
                    for (int d = 0; d < D / 16; d++) {
                        rows[head * pitch + d * 16 + g] = o[n][d][h];
                        rows[head * pitch + d * 16 + g + 8] = o[n][d][2 + h];
                    }
                }
            }
    }
};

// Tile arithmetic in plain float32. Eight lanes share a key: lane i of them owns dims 4i..4i+3 of every 32. The four
// groups of eight keep their own running maximum and meet in store().
template <int D> struct FmaTile {
    typedef float Elem;
    static constexpr int DIM = D, HEADS = 4, TOKENS = D == 64 ? 16 : 8;
    float4 q[HEADS][D / 32], o[HEADS][D / 32];
    float m[HEADS], l[HEADS];

    __device__ __forceinline__ void load_q(const float *q_rows, int64_t head_stride, int n_rows, int lane) {
        #pragma unroll
        for (int h = 0; h < HEADS; h++)
            #pragma unroll
            for (int j = 0; j < D / 32; j++)
                q[h][j] = h < n_rows ? *(const float4 *)(q_rows + h * head_stride + (lane & 7) * 4 + j * 32) : make_float4(0, 0, 0, 0);
    }
    __device__ __forceinline__ void reset() {
        #pragma unroll
        for (int h = 0; h < HEADS; h++) {
            #pragma unroll
            for (int j = 0; j < D / 32; j++) o[h][j] = make_float4(0, 0, 0, 0);
            m[h] = -INFINITY;
            l[h] = 0.0f;
        }
    }

    __device__ __forceinline__ void accumulate(uint32_t k_tile, uint32_t v_tile, int n_valid, float scale_log2, int lane) {
        #pragma unroll
        for (int pass = 0; pass < TOKENS / 4; pass++) {
            int token = pass * 4 + (lane >> 3);
            float s[HEADS] = {};
            #pragma unroll
            for (int j = 0; j < D / 32; j++) {
                float4 k = load4(k_tile, token, j, lane);
                #pragma unroll
                for (int h = 0; h < HEADS; h++)
                    s[h] += q[h][j].x * k.x + q[h][j].y * k.y + q[h][j].z * k.z + q[h][j].w * k.w;
            }
            float p[HEADS];
            #pragma unroll
            for (int h = 0; h < HEADS; h++) {
                #pragma unroll
                for (int x = 1; x < 8; x *= 2) s[h] += __shfl_xor_sync(~0u, s[h], x);
                s[h] = token < n_valid ? s[h] * scale_log2 : -INFINITY;
                float top = fmaxf(m[h], s[h]), base = top == -INFINITY ? 0.0f : top;    // no key yet: all weights 0
                float alpha = exp2_fast(m[h] - base);
                p[h] = exp2_fast(s[h] - base);
                m[h] = top;
                l[h] = l[h] * alpha + p[h];
                if (__any_sync(~0u, alpha != 1.0f))
                    #pragma unroll
                    for (int j = 0; j < D / 32; j++) {
                        o[h][j].x *= alpha; o[h][j].y *= alpha; o[h][j].z *= alpha; o[h][j].w *= alpha;
                    }
            }
            #pragma unroll
            for (int j = 0; j < D / 32; j++) {
                float4 v = load4(v_tile, token, j, lane);
                #pragma unroll
                for (int h = 0; h < HEADS; h++) {
                    o[h][j].x += p[h] * v.x; o[h][j].y += p[h] * v.y;
                    o[h][j].z += p[h] * v.z; o[h][j].w += p[h] * v.w;
                }
            }
        }
    }

    static __device__ __forceinline__ float4 load4(uint32_t tile, int token, int j, int lane) {
        float4 r;
        asm volatile("ld.shared.v4.f32 {%0,%1,%2,%3}, [%4];" : "=f"(r.x), "=f"(r.y), "=f"(r.z), "=f"(r.w)
                     : "r"(tile + tile_offset<float, D>(token, (lane & 7) + j * 8)) : "memory");
        return r;
    }

    __device__ __forceinline__ void store(float2 *ml, float *rows, int pitch, int n_rows, int lane) {
        #pragma unroll
        for (int h = 0; h < HEADS; h++) {
            float top = fmaxf(m[h], __shfl_xor_sync(~0u, m[h], 8));
            top = fmaxf(top, __shfl_xor_sync(~0u, top, 16));
            float w = top == -INFINITY ? 0.0f : exp2_fast(m[h] - top), sum = l[h] * w;
            #pragma unroll
            for (int x = 8; x < 32; x *= 2) sum += __shfl_xor_sync(~0u, sum, x);
            #pragma unroll
            for (int j = 0; j < D / 32; j++) {
                float v[4] = {o[h][j].x * w, o[h][j].y * w, o[h][j].z * w, o[h][j].w * w};
                #pragma unroll
                for (int i = 0; i < 4; i++)
                    #pragma unroll
                    for (int x = 8; x < 32; x *= 2) v[i] += __shfl_xor_sync(~0u, v[i], x);
                if (h < n_rows && lane < 8) *(float4 *)(rows + h * pitch + lane * 4 + j * 32) = make_float4(v[0], v[1], v[2], v[3]);
            }
            if (h < n_rows && lane == 0) ml[h] = make_float2(top, sum);
        }
    }
};

template <class Tile> __host__ __device__ constexpr int decode_tile_bytes() { return Tile::TOKENS * Tile::DIM * (int)sizeof(typename Tile::Elem); }
// The rings, then for each warp o[rows][D + 4] (the 4 keeps store() free of bank conflicts) and ml[rows].
template <class Tile> inline size_t decode_smem_bytes(int warps, int rows) {
    return (size_t)warps * (DECODE_STAGES * 2 * decode_tile_bytes<Tile>() + rows * (sizeof(float2) + (Tile::DIM + 4) * sizeof(float)));
}

// Rows of a tile that are copied together: they lie one after another in the cache.
template <class Tile> __host__ __device__ constexpr int decode_copy_rows() { return Tile::TOKENS < 16 ? Tile::TOKENS : 16; }
template <class Tile> __host__ __device__ constexpr int decode_copies() { return decode_copy_rows<Tile>() * Tile::DIM * (int)sizeof(typename Tile::Elem) / 512; }

// A warp starts the copy of one tile: positions pos .. pos+TOKENS-1 of one KV head; zeros from `total` on. dst: where in
// the tile each of the lane's copies goes.
template <class Tile>
__device__ __forceinline__ void decode_load_tile(const DecodeParams &p, const DecodeCursor &item, int pos, uint32_t k_tile, uint32_t v_tile,
                                                 const uint32_t (&dst)[decode_copies<Tile>()], int lane) {
    typedef typename Tile::Elem T;
    constexpr int D = Tile::DIM, CHUNKS = D * (int)sizeof(T) / 16, ROWS = decode_copy_rows<Tile>();
    const Cache<T> &cache = (const Cache<T> &)p.cache;
    #pragma unroll
    for (int half = 0; half < Tile::TOKENS; half += ROWS, k_tile += ROWS * D * sizeof(T), v_tile += ROWS * D * sizeof(T), pos += ROWS) {
        size_t base = pos < item.total ? cache_row(cache, item.seq, item.kv_head, pos) : 0;
        const char *k = (const char *)(cache.k + base) + lane * 16, *v = (const char *)(cache.v + base) + lane * 16;
        if (pos + ROWS <= item.total - p.append) {
            #pragma unroll
            for (int i = 0; i < decode_copies<Tile>(); i++) {
                copy_async16(k_tile + dst[i], k + i * 512);
                copy_async16(v_tile + dst[i], v + i * 512);
            }
        } else {
            #pragma unroll
            for (int i = 0; i < decode_copies<Tile>(); i++) {
                int row = (i * 32 + lane) / CHUNKS, chunk = (i * 32 + lane) % CHUNKS;
                bool valid = pos + row < item.total;
                const char *ki = valid ? k + i * 512 : (const char *)cache.k, *vi = valid ? v + i * 512 : (const char *)cache.v;
                if (p.append && pos + row == item.total - 1) {    // the new token: not in the cache yet
                    ki = (const char *)((const T *)p.k_new + item.seq * p.k_token_stride + item.kv_head * p.k_head_stride) + chunk * 16;
                    vi = (const char *)((const T *)p.v_new + item.seq * p.v_token_stride + item.kv_head * p.v_head_stride) + chunk * 16;
                }
                copy_async16(k_tile + dst[i], ki, valid);
                copy_async16(v_tile + dst[i], vi, valid);
            }
        }
    }
}

// One element of a running result: largest score (log2), sum of weights, weighted sum of V. Rounding is spelled out, as
// the fold in registers and the fold from the workspace must give the same bits.
struct DecodeSum {
    float m, l, o;
    __device__ __forceinline__ void add(const DecodeSum &x) {
        float top = fmaxf(m, x.m), a = exp2_fast(m - top), b = exp2_fast(x.m - top);
        l = __fmaf_rn(x.l, b, __fmul_rn(l, a));
        o = __fmaf_rn(x.o, b, __fmul_rn(o, a));
        m = top;
    }
};

// Computes: attention of one new token per sequence to its cache, in chunks of fixed length; appends K and V if asked.
// Reads:    q [seq][head][D], k_new and v_new [seq][kv head][D], the cache, all T; seq_lens [seq] int32.
// Writes:   out [seq][head][D] T (NaN for a sequence that would overflow its cache); with append, row seq_lens[seq] of K
//           and V; for groups that several blocks share, part_ml and part_o [seq][head][chunk], float32, and arrived.
// Grid:     as many blocks of 4 or 8 warps as fit on the GPU, each with an even share of the items; a warp owns every
//           4th or 8th tile of an item's chunk, a thread some elements of the result.
// Requires: head_dim = Tile::DIM, 16-byte rows, scale > 0, arrived = 0; dynamic shared memory of decode_smem_bytes.
template <class Tile> __global__ void __launch_bounds__(DECODE_MAX_WARPS * 32, 1) decode_kernel(const __grid_constant__ DecodeParams p) {
    typedef typename Tile::Elem T;
    constexpr int D = Tile::DIM, PITCH = D + 4, TILE_BYTES = decode_tile_bytes<Tile>(), CHUNKS = D * (int)sizeof(T) / 16;
    constexpr int ELEMENTS = (Tile::HEADS * D + 127) / 128;    // of the result, per thread, in a block of 4 warps
    extern __shared__ __align__(128) char smem[];
    __shared__ int is_last;
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, n_warps = blockDim.x >> 5;
    int max_rows = min(p.group, Tile::HEADS);
    uint32_t ring = smem_address(smem) + warp * DECODE_STAGES * 2 * TILE_BYTES;
    float *sum_o = (float *)(smem + n_warps * DECODE_STAGES * 2 * TILE_BYTES);    // [warp][row][PITCH]
    float2 *sum_ml = (float2 *)(sum_o + n_warps * max_rows * PITCH);              // [warp][row]
    uint32_t dst[decode_copies<Tile>()];
    #pragma unroll
    for (int i = 0; i < decode_copies<Tile>(); i++) dst[i] = tile_offset<T, D>((i * 32 + lane) / CHUNKS, (i * 32 + lane) % CHUNKS);

    wait_for_previous_kernel();
    let_next_kernel_start();

    DecodeCursor item, ahead;    // ahead: the item whose tiles are being fetched
    item.start(p, lane);
    ahead = item;
    int ahead_tile = 0, stage = 0;
    auto fetch = [&](int to) {    // this warp's next tile, wherever it is
        for (; ahead.left > 0; ahead.next(p), ahead_tile = 0) {
            int pos = ahead.begin() + (ahead_tile * n_warps + warp) * Tile::TOKENS;
            if (pos >= ahead.end()) continue;
            uint32_t tile = ring + to * 2 * TILE_BYTES;
            decode_load_tile<Tile>(p, ahead, pos, tile, tile + TILE_BYTES, dst, lane);
            ahead_tile++;
            break;
        }
        copy_async_commit();    // always: the waits below count groups
    };
    #pragma unroll
    for (int i = 0; i < DECODE_STAGES; i++) fetch(i);

    Tile state;
    DecodeSum run[ELEMENTS];
    int visited = 0;         // chunks of the present group that this block has done
    bool whole = false;      // will it do all of them?
    for (; item.left > 0; item.next(p)) {
        int seq = item.seq, end = item.end(), head0 = item.kv_head * p.group + item.head_block * Tile::HEADS;
        int rows = min(Tile::HEADS, p.group - item.head_block * Tile::HEADS);
        if (visited == 0) {
            whole = item.chunk == 0 && item.left >= item.n_chunks;
            state.load_q((const T *)p.q + seq * p.q_token_stride + head0 * p.q_head_stride, p.q_head_stride, rows, lane);
        }
        if (p.append && item.head_block == 0 && end == item.total && threadIdx.x < 2 * CHUNKS) {
            int chunk = threadIdx.x % CHUNKS;
            size_t row = cache_row((const Cache<T> &)p.cache, seq, item.kv_head, item.total - 1);
            const T *k = (const T *)p.k_new + seq * p.k_token_stride + item.kv_head * p.k_head_stride;
            const T *v = (const T *)p.v_new + seq * p.v_token_stride + item.kv_head * p.v_head_stride;
            if (threadIdx.x < CHUNKS) ((uint4 *)((T *)p.cache.k + row))[chunk] = ((const uint4 *)k)[chunk];
            else ((uint4 *)((T *)p.cache.v + row))[chunk] = ((const uint4 *)v)[chunk];
        }

        state.reset();
        for (int pos = item.begin() + warp * Tile::TOKENS; pos < end; pos += n_warps * Tile::TOKENS) {
            copy_async_wait<DECODE_STAGES - 1>();
            __syncwarp();    // the other lanes' copies have landed too
            uint32_t tile = ring + stage * 2 * TILE_BYTES;
            state.accumulate(tile, tile + TILE_BYTES, end - pos, p.scale_log2, lane);
            __syncwarp();    // every lane has read the stage before it is filled again
            fetch(stage);
            stage = stage + 1 == DECODE_STAGES ? 0 : stage + 1;
        }

        __syncthreads();    // the sums of the item before have been read
        state.store(sum_ml + warp * rows, sum_o + warp * rows * PITCH, PITCH, rows, lane);
        __syncthreads();
        bool first = visited++ == 0, finished = item.chunk + 1 == item.n_chunks || item.left == 1;
        #pragma unroll
        for (int e = 0; e < ELEMENTS; e++) {
            int i = e * blockDim.x + threadIdx.x, row = i / D, d = i % D;
            if (i >= rows * D) break;
            DecodeSum x = {-INFINITY, 0.0f, 0.0f};
            for (int w = 0; w < n_warps; w++) x.m = fmaxf(x.m, sum_ml[w * rows + row].x);
            for (int w = 0; w < n_warps; w++) {
                float2 ml = sum_ml[w * rows + row];
                float weight = exp2_fast(ml.x - x.m);    // a warp without a key: 2^-inf = 0
                x.l += ml.y * weight;
                x.o += sum_o[(w * rows + row) * PITCH + d] * weight;
            }
            size_t head = (size_t)seq * p.n_heads + head0 + row, part = head * p.max_chunks + item.chunk;
            if (!whole) {
                p.part_o[part * D + d] = x.o;
                if (d == 0) p.part_ml[part] = make_float2(x.m, x.l);
            } else if (first) run[e] = x;
            else run[e].add(x);
        }
        if (!finished) continue;

        bool write = whole;
        if (!whole) {    // whoever brings the last chunks of the group folds them all
            __syncthreads();    // all of this block's parts are written
            if (threadIdx.x == 0) {
                __threadfence();
                unsigned *arrived = p.arrived + ((size_t)seq * p.cache.n_kv_heads + item.kv_head) * p.head_blocks + item.head_block;
                is_last = atomicAdd(arrived, visited) + visited == item.n_chunks;
                if (is_last) *arrived = 0;
                __threadfence();
            }
            __syncthreads();    // is_last is known
            write = is_last;
            if (write)
                #pragma unroll
                for (int e = 0; e < ELEMENTS; e++) {
                    int i = e * blockDim.x + threadIdx.x, row = i / D, d = i % D;
                    if (i >= rows * D) break;
                    size_t part = ((size_t)seq * p.n_heads + head0 + row) * p.max_chunks;
                    #pragma unroll 8
                    for (int c = 0; c < item.n_chunks; c++) {
                        float2 ml = __ldcg(p.part_ml + part + c);
                        DecodeSum x = {ml.x, ml.y, __ldcg(p.part_o + (part + c) * D + d)};
                        if (c == 0) run[e] = x;
                        else run[e].add(x);
                    }
                }
        }
        if (write)
            #pragma unroll
            for (int e = 0; e < ELEMENTS; e++) {
                int i = e * blockDim.x + threadIdx.x, row = i / D, d = i % D;
                if (i >= rows * D) break;
                ((T *)p.out)[seq * p.out_token_stride + (head0 + row) * p.out_head_stride + d] = from_float<T>(run[e].o / run[e].l);
            }
        visited = 0;
    }

    if (blockIdx.x == gridDim.x - 1)
        for (int seq = 0; seq < p.n_seq; seq++)
            if (decode_total(p, seq) == 0)
                for (int i = threadIdx.x; i < p.n_heads * D; i += blockDim.x)
                    ((T *)p.out)[seq * p.out_token_stride + i / D * p.out_head_stride + i % D] = from_float<T>(NAN);
}

// ---------------------------------------------------------------------------------------------------------------------
// Prefill. Any number of new tokens per sequence. A block owns a tile of query rows of one head and walks over the keys
// with an online softmax; tiles that causality hides entirely are never visited. The lengths arrive as kernel
// parameters, so one launch serves a ragged batch without a copy; larger batches take several launches.

constexpr int MAX_BATCH = 256;

struct Batch {
    int n_seq, first_seq;            // sequences in this launch; the number of the first in the call
    int q_start[MAX_BATCH + 1];      // first token of each
    int seq_len[MAX_BATCH];          // positions in the cache before the new tokens
    int order[MAX_BATCH];            // sequences by number of query tiles, most first
};

struct PrefillParams {
    const void *q; void *out;                 // [token][head][D]
    const void *k_new, *v_new;                // [token][kv head][D]
    int64_t q_token_stride, q_head_stride, out_token_stride, out_head_stride;
    int64_t k_token_stride, k_head_stride, v_token_stride, v_head_stride;
    Cache<char> cache;
    int n_heads, group, causal;
    int n_tiles;                              // query tiles of all sequences and heads
    float scale_log2;
};

struct PrefillTile { int seq, head, row0, n_rows, seq_len; };    // row0: first of its rows among the sequence's new tokens

// Work item -> query tile. Heads are innermost, so that the heads of a group share K and V in L2. Tiles come last first:
// those see most keys, and the short ones fill the gaps at the end.
__device__ __forceinline__ PrefillTile prefill_tile(const Batch &b, int n_heads, int tile_rows, int index) {
    int t = index / n_heads, level = 0, active = b.n_seq, seq, tiles;
    for (;;) {    // `active` sequences have more than `level` tiles
        seq = b.order[active - 1];
        tiles = (b.q_start[seq + 1] - b.q_start[seq] + tile_rows - 1) / tile_rows;
        if (t < (tiles - level) * active) break;
        t -= (tiles - level) * active;
        level = tiles;
        active--;
    }
    seq = b.order[t % active];
    int n_new = b.q_start[seq + 1] - b.q_start[seq];
    tiles = (n_new + tile_rows - 1) / tile_rows;
    return {seq, index % n_heads, (tiles - 1 - level - t / active) * tile_rows, n_new, b.seq_len[seq]};
}

// In bf16, a weight that enters the second product rounded is 2^-9 off, and where a row sees few keys nothing averages
// that out: measured on normal inputs, up to 1.8 x the bound of tests/test_attention.cu at 2 to 4 keys, 1.0 at 32, 0.73
// at 64 and 0.56 at 128. So query tiles whose first row sees fewer keys than this use P = hi + lo, as decode always does.
constexpr int PREFILL_EXACT_BELOW = 256;

// Computes: the append of new K and V to the cache.
// Reads:    k_new and v_new [token][kv head][D], rows of row_bytes.
// Writes:   the cache rows seq_len .. seq_len + n_new - 1 of each sequence.
// Grid:     a block of 128 threads per token; a thread copies 16-byte pieces of any head.
// Requires: 16-byte rows, room in the cache.
__global__ void __launch_bounds__(128) prefill_append_kernel(const __grid_constant__ PrefillParams p, const __grid_constant__ Batch b,
                                                             int element_bytes) {
    int token = b.q_start[0] + blockIdx.x, low = 0, high = b.n_seq - 1;
    while (low < high) {    // the last sequence that starts at or before the token
        int mid = (low + high + 1) / 2;
        if (b.q_start[mid] <= token) low = mid;
        else high = mid - 1;
    }
    int pos = b.seq_len[low] + token - b.q_start[low], pieces = p.cache.head_dim * element_bytes / 16;
    for (int i = threadIdx.x; i < p.cache.n_kv_heads * pieces; i += blockDim.x) {
        int head = i / pieces, piece = i % pieces;
        size_t row = cache_row(p.cache, b.first_seq + low, head, pos) * element_bytes;
        const char *k = (const char *)p.k_new + (token * p.k_token_stride + head * p.k_head_stride) * element_bytes;
        const char *v = (const char *)p.v_new + (token * p.v_token_stride + head * p.v_head_stride) * element_bytes;
        ((uint4 *)(p.cache.k + row))[piece] = ((const uint4 *)k)[piece];
        ((uint4 *)(p.cache.v + row))[piece] = ((const uint4 *)v)[piece];
    }
}

constexpr int PLAIN_ROWS = 64, PLAIN_KEYS = 64;

template <typename T, int D> constexpr size_t prefill_plain_smem_bytes() { return (size_t)(PLAIN_ROWS + 4 * PLAIN_KEYS) * D * sizeof(T); }

// Computes: attention of 64 query rows of one head to the cache, 16-bit, on any GPU since sm_80 (mma.sync, cp.async).
// Reads:    q [token][head][D] T; K and V from the cache [block][kv head][position][D] T.
// Writes:   out [token][head][D] T.
// Grid:     a block of 128 threads per (query tile, head); a warp owns 16 rows, all threads load K and V tiles of 64 keys.
// Requires: the new K and V in the cache, head_dim = D, 16-byte rows, scale > 0; shared memory for Q and two tile pairs.
template <typename T, int D> __global__ void __launch_bounds__(128) prefill_plain_kernel(const __grid_constant__ PrefillParams p,
                                                                                        const __grid_constant__ Batch b) {
    constexpr int CHUNKS = D / 8, TILE_BYTES = PLAIN_KEYS * D * (int)sizeof(T);
    extern __shared__ __align__(128) char smem[];
    const Cache<T> &cache = (const Cache<T> &)p.cache;
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    PrefillTile tile = prefill_tile(b, p.n_heads, PLAIN_ROWS, blockIdx.x);
    int kv_head = tile.head / p.group, total = tile.seq_len + tile.n_rows;
    int end = p.causal ? tile.seq_len + min(tile.row0 + PLAIN_ROWS, tile.n_rows) : total;    // keys that some row sees
    int first_sees = p.causal ? tile.seq_len + tile.row0 + 1 : total;                        // keys that every row sees
    bool exact = std::is_same<T, bf16>::value && first_sees < PREFILL_EXACT_BELOW;
    uint32_t q_tile = smem_address(smem), kv_tiles = q_tile + PLAIN_ROWS * D * sizeof(T);    // then (K, V), (K, V)

    const T *q = (const T *)p.q + b.q_start[tile.seq] * p.q_token_stride + tile.head * p.q_head_stride;
    for (int i = threadIdx.x; i < PLAIN_ROWS * CHUNKS; i += 128) {
        int row = i / CHUNKS, chunk = i % CHUNKS;
        bool valid = tile.row0 + row < tile.n_rows;
        copy_async16(q_tile + tile_offset<T, D>(row, chunk), q + (valid ? tile.row0 + row : 0) * p.q_token_stride + chunk * 8, valid);
    }
    auto load = [&](int j) {
        if (j * PLAIN_KEYS < end)
            for (int i = threadIdx.x; i < PLAIN_KEYS * CHUNKS; i += 128) {
                int row = i / CHUNKS, chunk = i % CHUNKS, pos = j * PLAIN_KEYS + row;
                bool valid = pos < end;    // beyond lies memory that nobody wrote: zeros, as 0 x NaN would be NaN
                size_t offset = cache_row(cache, b.first_seq + tile.seq, kv_head, valid ? pos : 0) + chunk * 8;
                uint32_t dst = kv_tiles + (j & 1) * 2 * TILE_BYTES + tile_offset<T, D>(row, chunk);
                copy_async16(dst, cache.k + offset, valid);
                copy_async16(dst + TILE_BYTES, cache.v + offset, valid);
            }
        copy_async_commit();
    };
    load(0);

    uint32_t qf[D / 16][4];
    float o[D / 8][4] = {}, m[2] = {-INFINITY, -INFINITY}, l[2] = {};    // rows g and g + 8 of the warp's 16
    for (int j = 0; j * PLAIN_KEYS < end; j++) {
        load(j + 1);
        copy_async_wait<1>();
        __syncthreads();    // everyone's share of tile j (and of Q) has landed
        if (j == 0)
            #pragma unroll
            for (int d = 0; d < D / 16; d++) load_matrix4(qf[d], q_tile + tile_offset<T, D>(warp * 16 + (lane & 15), d * 2 + (lane >> 4)));
        uint32_t k_tile = kv_tiles + (j & 1) * 2 * TILE_BYTES, v_tile = k_tile + TILE_BYTES;

        float s[PLAIN_KEYS / 8][4] = {};
        #pragma unroll
        for (int d = 0; d < D / 16; d++)
            #pragma unroll
            for (int n = 0; n < PLAIN_KEYS / 16; n++) {
                uint32_t k[4];
                load_matrix4(k, k_tile + tile_offset<T, D>(n * 16 + (lane >> 4) * 8 + (lane & 7), d * 2 + ((lane >> 3) & 1)));
                mma_16x8x16<T>(s[2 * n], qf[d], k[0], k[1]);
                mma_16x8x16<T>(s[2 * n + 1], qf[d], k[2], k[3]);
            }

        float alpha[2];
        #pragma unroll
        for (int r = 0; r < 2; r++) {
            int row = tile.row0 + warp * 16 + g + 8 * r, sees = (p.causal ? min(tile.seq_len + row + 1, end) : end) - j * PLAIN_KEYS;
            float top = -INFINITY;
            #pragma unroll
            for (int n = 0; n < PLAIN_KEYS / 8; n++)
                #pragma unroll
                for (int i = 0; i < 2; i++) {
                    float &x = s[n][2 * r + i];
                    x = n * 8 + 2 * t + i < sees ? x * p.scale_log2 : -INFINITY;
                    top = fmaxf(top, x);
                }
            top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
            top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
            top = fmaxf(top, m[r]);    // finite: every row sees key 0
            alpha[r] = exp2_fast(m[r] - top);
            m[r] = top;
            l[r] *= alpha[r];
            #pragma unroll
            for (int n = 0; n < PLAIN_KEYS / 8; n++)
                #pragma unroll
                for (int i = 0; i < 2; i++) l[r] += s[n][2 * r + i] = exp2_fast(s[n][2 * r + i] - top);
        }
        #pragma unroll
        for (int d = 0; d < D / 8; d++) {
            o[d][0] *= alpha[0]; o[d][1] *= alpha[0];
            o[d][2] *= alpha[1]; o[d][3] *= alpha[1];
        }
        #pragma unroll
        for (int n = 0; n < PLAIN_KEYS / 16; n++) {    // the scores' layout is that of the second product's left operand
            uint32_t hi[4], lo[4];
            #pragma unroll
            for (int i = 0; i < 4; i++) {
                float x = s[2 * n + (i >> 1)][2 * (i & 1)], y = s[2 * n + (i >> 1)][2 * (i & 1) + 1];
                hi[i] = pack2<T>(x, y);
                lo[i] = pack2_rest<T>(x, y, hi[i]);
            }
            #pragma unroll
            for (int d = 0; d < D / 16; d++) {
                uint32_t v[4];
                load_matrix4_transposed(v, v_tile + tile_offset<T, D>(n * 16 + ((lane >> 3) & 1) * 8 + (lane & 7), d * 2 + (lane >> 4)));
                if (exact) {
                    mma_16x8x16<T>(o[2 * d], lo, v[0], v[1]);
                    mma_16x8x16<T>(o[2 * d + 1], lo, v[2], v[3]);
                }
                mma_16x8x16<T>(o[2 * d], hi, v[0], v[1]);
                mma_16x8x16<T>(o[2 * d + 1], hi, v[2], v[3]);
            }
        }
        __syncthreads();    // everyone has read tile j before its place is filled again
    }

    #pragma unroll
    for (int r = 0; r < 2; r++) {
        l[r] += __shfl_xor_sync(~0u, l[r], 1);
        l[r] += __shfl_xor_sync(~0u, l[r], 2);
        int row = tile.row0 + warp * 16 + g + 8 * r;
        if (row >= tile.n_rows) continue;
        T *out = (T *)p.out + (b.q_start[tile.seq] + row) * p.out_token_stride + tile.head * p.out_head_stride;
        float inverse = 1.0f / l[r];
        #pragma unroll
        for (int d = 0; d < D / 8; d++) *(uint32_t *)(out + d * 8 + 2 * t) = pack2<T>(o[d][2 * r] * inverse, o[d][2 * r + 1] * inverse);
    }
}

constexpr int F32_ROWS = 64, F32_KEYS = 32, F32_P_PITCH = F32_KEYS + 4;

template <int D> constexpr size_t prefill_f32_smem_bytes() {
    return sizeof(float) * (F32_ROWS * (D + 4) + F32_KEYS * (D + 4) + F32_KEYS * D + F32_ROWS * F32_P_PITCH);
}

// Computes: attention of 64 query rows of one head to the cache, true float32 products.
// Reads:    q [token][head][D] float32; K and V from the cache [block][kv head][position][D] float32.
// Writes:   out [token][head][D] float32.
// Grid:     a block of 256 threads per (query tile, head); thread (ty, tx) of 16 x 16 owns rows ty + 16i, of them keys
//           tx + 16j of the scores and dims 2tx, 2tx+1 of every 32 of the output.
// Requires: the new K and V in the cache, head_dim = D, 16-byte rows, scale > 0; shared memory for Q, K, V and P.
template <int D> __global__ void __launch_bounds__(256, 2) prefill_f32_kernel(const __grid_constant__ PrefillParams p,
                                                                              const __grid_constant__ Batch b) {
    constexpr int PITCH = D + 4, CHUNKS = D / 4;    // the 4: eight rows in eight different bank groups
    extern __shared__ __align__(128) char smem[];
    float *q_tile = (float *)smem, *k_tile = q_tile + F32_ROWS * PITCH, *v_tile = k_tile + F32_KEYS * PITCH, *p_tile = v_tile + F32_KEYS * D;
    const Cache<float> &cache = (const Cache<float> &)p.cache;
    int tx = threadIdx.x & 15, ty = threadIdx.x >> 4;
    PrefillTile tile = prefill_tile(b, p.n_heads, F32_ROWS, blockIdx.x);
    int kv_head = tile.head / p.group, total = tile.seq_len + tile.n_rows;
    int end = p.causal ? tile.seq_len + min(tile.row0 + F32_ROWS, tile.n_rows) : total;

    const float *q = (const float *)p.q + b.q_start[tile.seq] * p.q_token_stride + tile.head * p.q_head_stride;
    for (int i = threadIdx.x; i < F32_ROWS * CHUNKS; i += 256) {
        int row = i / CHUNKS, chunk = i % CHUNKS;
        bool valid = tile.row0 + row < tile.n_rows;
        copy_async16(smem_address(q_tile + row * PITCH + chunk * 4), q + (valid ? tile.row0 + row : 0) * p.q_token_stride + chunk * 4, valid);
    }

    float o[4][D / 32][2] = {}, m[4], l[4];
    #pragma unroll
    for (int i = 0; i < 4; i++) { m[i] = -INFINITY; l[i] = 0.0f; }
    for (int base = 0; base < end; base += F32_KEYS) {
        for (int i = threadIdx.x; i < F32_KEYS * CHUNKS; i += 256) {
            int row = i / CHUNKS, chunk = i % CHUNKS;
            bool valid = base + row < end;
            size_t offset = cache_row(cache, b.first_seq + tile.seq, kv_head, valid ? base + row : 0) + chunk * 4;
            copy_async16(smem_address(k_tile + row * PITCH + chunk * 4), cache.k + offset, valid);
            copy_async16(smem_address(v_tile + row * D + chunk * 4), cache.v + offset, valid);
        }
        copy_async_commit();
        copy_async_wait<0>();
        __syncthreads();    // everyone's share of the tile has landed

        float s[4][2] = {};
        #pragma unroll 8
        for (int d = 0; d < D; d += 4) {
            float4 k[2];
            #pragma unroll
            for (int j = 0; j < 2; j++) k[j] = *(float4 *)(k_tile + (tx + 16 * j) * PITCH + d);
            #pragma unroll
            for (int i = 0; i < 4; i++) {
                float4 x = *(float4 *)(q_tile + (ty + 16 * i) * PITCH + d);
                #pragma unroll
                for (int j = 0; j < 2; j++) s[i][j] += x.x * k[j].x + x.y * k[j].y + x.z * k[j].z + x.w * k[j].w;
            }
        }
        #pragma unroll
        for (int i = 0; i < 4; i++) {
            int row = tile.row0 + ty + 16 * i, sees = (p.causal ? min(tile.seq_len + row + 1, end) : end) - base;
            float top = m[i];
            #pragma unroll
            for (int j = 0; j < 2; j++) {
                s[i][j] = tx + 16 * j < sees ? s[i][j] * p.scale_log2 : -INFINITY;
                top = fmaxf(top, s[i][j]);
            }
            #pragma unroll
            for (int x = 1; x < 16; x *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, x));    // finite: every row sees key 0
            float alpha = exp2_fast(m[i] - top);
            m[i] = top;
            l[i] *= alpha;
            #pragma unroll
            for (int j = 0; j < 2; j++) {
                float w = exp2_fast(s[i][j] - top);
                l[i] += w;
                p_tile[(ty + 16 * i) * F32_P_PITCH + tx + 16 * j] = w;
            }
            #pragma unroll
            for (int j = 0; j < D / 32; j++) { o[i][j][0] *= alpha; o[i][j][1] *= alpha; }
        }
        __syncwarp();    // a row's weights are written and read by the same half warp
        #pragma unroll 2
        for (int key = 0; key < F32_KEYS; key += 4) {
            float4 w[4];
            #pragma unroll
            for (int i = 0; i < 4; i++) w[i] = *(float4 *)(p_tile + (ty + 16 * i) * F32_P_PITCH + key);
            #pragma unroll
            for (int n = 0; n < 4; n++)
                #pragma unroll
                for (int j = 0; j < D / 32; j++) {
                    float2 v = *(float2 *)(v_tile + (key + n) * D + j * 32 + tx * 2);
                    #pragma unroll
                    for (int i = 0; i < 4; i++) {
                        float x = n == 0 ? w[i].x : n == 1 ? w[i].y : n == 2 ? w[i].z : w[i].w;
                        o[i][j][0] += x * v.x;
                        o[i][j][1] += x * v.y;
                    }
                }
        }
        __syncthreads();    // everyone has read the tile before the next one lands
    }
    #pragma unroll
    for (int i = 0; i < 4; i++) {
        #pragma unroll
        for (int x = 1; x < 16; x *= 2) l[i] += __shfl_xor_sync(~0u, l[i], x);
        int row = tile.row0 + ty + 16 * i;
        if (row >= tile.n_rows) continue;
        float *out = (float *)p.out + (b.q_start[tile.seq] + row) * p.out_token_stride + tile.head * p.out_head_stride;
        #pragma unroll
        for (int j = 0; j < D / 32; j++) *(float2 *)(out + j * 32 + tx * 2) = make_float2(o[i][j][0] / l[i], o[i][j][1] / l[i]);
    }
}

#include "model/attention_sm90.cuh"

// ---------------------------------------------------------------------------------------------------------------------
// The C interface

static thread_local char g_error[512];

const char *attention_error(void) { return g_error; }

static int refuse(const char *format, ...) {
    va_list list;
    va_start(list, format);
    vsnprintf(g_error, sizeof g_error, format, list);
    va_end(list);
    return 1;
}

#define TRY_CUDA(call)                                                                                             \
    do {                                                                                                           \
        cudaError_t try_error = (call);                                                                            \
        if (try_error != cudaSuccess)                                                                              \
            return refuse("%s:%d: %s: %s", __FILE__, __LINE__, #call, cudaGetErrorString(try_error));              \
    } while (0)

// What this build and this GPU can do together.
struct Device { int known, n_sms, block_smem, hopper, dependent_launch; };

static int device_find(Device *found) {
    static Device devices[64];    // filled once each; two threads that race write the same values
    int id;
    TRY_CUDA(cudaGetDevice(&id));
    if (id < 0 || id >= 64) return refuse("attention: device number %d, expected 0 to 63", id);
    Device d = devices[id];
    if (!d.known) {
        int major;
        cudaFuncAttributes f;
        TRY_CUDA(cudaDeviceGetAttribute(&d.n_sms, cudaDevAttrMultiProcessorCount, id));
        TRY_CUDA(cudaDeviceGetAttribute(&d.block_smem, cudaDevAttrMaxSharedMemoryPerBlockOptin, id));
        TRY_CUDA(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, id));
        TRY_CUDA(cudaFuncGetAttributes(&f, (const void *)prefill_append_kernel));
        d.dependent_launch = major >= 9 && f.ptxVersion >= 90;    // code for older GPUs does not wait for the kernel before it
        d.hopper = major == 9 && f.ptxVersion == 90;
        d.known = 1;
        devices[id] = d;
    }
    *found = d;
    return 0;
}

static int element_bytes(int dtype) { return dtype == ATTENTION_F32 ? 4 : 2; }

static int check_dimensions(const char *who, const AttentionArgs *a) {
    if (!a) return refuse("%s: args is NULL", who);
    if (a->dtype != ATTENTION_F32 && a->dtype != ATTENTION_F16 && a->dtype != ATTENTION_BF16)
        return refuse("%s: dtype %d, expected 0 (f32), 1 (f16) or 2 (bf16)", who, a->dtype);
    if (a->n_seq <= 0) return refuse("%s: n_seq %d, expected at least 1", who, a->n_seq);
    if (a->n_heads <= 0) return refuse("%s: n_heads %d, expected at least 1", who, a->n_heads);
    if (a->n_kv_heads <= 0) return refuse("%s: n_kv_heads %d, expected at least 1", who, a->n_kv_heads);
    if (a->n_heads % a->n_kv_heads) return refuse("%s: n_heads %d is not a multiple of n_kv_heads %d", who, a->n_heads, a->n_kv_heads);
    if (a->head_dim != 64 && a->head_dim != 96 && a->head_dim != 128)
        return refuse("%s: head_dim %d, expected 64, 96 or 128", who, a->head_dim);
    if (a->cache_max_len <= 0) return refuse("%s: cache_max_len %d, expected at least 1", who, a->cache_max_len);
    return 0;
}

static int check_pointer(const char *who, const char *name, const void *pointer) {
    if (!pointer) return refuse("%s: %s is NULL", who, name);
    if ((uintptr_t)pointer % 16) return refuse("%s: %s is at %p, expected a multiple of 16 bytes", who, name, pointer);
    return 0;
}

static int check_strides(const char *who, const char *name, int64_t token, int64_t head, const AttentionArgs *a) {
    int unit = 16 / element_bytes(a->dtype);
    if (token <= 0 || token % unit) return refuse("%s: %s_token_stride %lld, expected a positive multiple of %d", who, name, (long long)token, unit);
    if (head <= 0 || head % unit) return refuse("%s: %s_head_stride %lld, expected a positive multiple of %d", who, name, (long long)head, unit);
    return 0;
}

// Everything but the lengths.
static int check_args(const char *who, const AttentionArgs *a) {
    if (check_dimensions(who, a)) return 1;
    if (!(a->scale >= 0.0f && a->scale <= FLT_MAX)) return refuse("%s: scale %g, expected a positive number, or 0 for 1/sqrt(head_dim)", who, a->scale);
    if (check_pointer(who, "q", a->q) || check_strides(who, "q", a->q_token_stride, a->q_head_stride, a)) return 1;
    if (check_pointer(who, "out", a->out) || check_strides(who, "out", a->out_token_stride, a->out_head_stride, a)) return 1;
    if (check_pointer(who, "k_cache", a->k_cache) || check_pointer(who, "v_cache", a->v_cache)) return 1;
    if (a->append) {
        if (check_pointer(who, "k_new", a->k_new) || check_strides(who, "k", a->k_token_stride, a->k_head_stride, a)) return 1;
        if (check_pointer(who, "v_new", a->v_new) || check_strides(who, "v", a->v_token_stride, a->v_head_stride, a)) return 1;
    }
    if (a->block_table && (a->block_size <= 0 || (a->block_size % 16 && a->block_size != a->cache_max_len)))
        return refuse("%s: block_size %d, expected a positive multiple of 16, or cache_max_len (%d)", who, a->block_size, a->cache_max_len);
    return 0;
}

static int check_length(const char *who, int seq, int seq_len, int n_new, int cache_max_len) {
    if (seq_len < 0) return refuse("%s: seq_lens[%d] is %d, expected at least 0", who, seq, seq_len);
    if ((long long)seq_len + n_new > cache_max_len)
        return refuse("%s: sequence %d overflows the cache: %d positions + %d new > cache_max_len %d", who, seq, seq_len, n_new, cache_max_len);
    return 0;
}

static float scale_log2(const AttentionArgs *a) { return (a->scale != 0.0f ? a->scale : 1.0f / sqrtf((float)a->head_dim)) * LOG2E; }

static Cache<char> cache_view(const AttentionArgs *a) {
    int block_size = a->block_table ? a->block_size : a->cache_max_len;
    return {(char *)a->k_cache, (char *)a->v_cache, a->block_table, a->n_kv_heads, a->head_dim, block_size,
            (a->cache_max_len - 1) / block_size + 1};
}

// Launches a kernel of which several are instantiated: sets its shared memory, logs, checks.
template <typename... P, typename... A>
static int launch(const char *name, const AttentionArgs *a, void (*kernel)(P...), long long grid, int block, size_t smem, bool dependent,
                  cudaStream_t stream, A... args) {
    if (grid > 0x7fffffff) return refuse("%s: a grid of %lld blocks, expected at most 2147483647", name, grid);
    if (smem > 48 * 1024) TRY_CUDA(cudaFuncSetAttribute((const void *)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)smem));
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)grid);
    config.blockDim = dim3(block);
    config.dynamicSmemBytes = smem;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = dependent ? 1 : 0;
    if (a->verbose)
        fprintf(stderr, "attention: %s<%s,%d> %d:%d heads, %d sequences, grid %lld, block %d, shared %zu\n", name,
                a->dtype == ATTENTION_F32 ? "f32" : a->dtype == ATTENTION_F16 ? "f16" : "bf16", a->head_dim, a->n_heads, a->n_kv_heads,
                a->n_seq, grid, block, smem);
    TRY_CUDA(cudaLaunchKernelEx(&config, kernel, args...));
    return 0;
}

// Calls body(T(), integral_constant<int, D>()) for the call's dtype and head_dim.
template <class Body> static int for_types(const AttentionArgs *a, Body body) {
    auto with_dim = [&](auto zero) {
        return a->head_dim == 64   ? body(zero, std::integral_constant<int, 64>())
               : a->head_dim == 96 ? body(zero, std::integral_constant<int, 96>())
                                   : body(zero, std::integral_constant<int, 128>());
    };
    return a->dtype == ATTENTION_F32 ? with_dim(0.0f) : a->dtype == ATTENTION_F16 ? with_dim(f16()) : with_dim(bf16());
}

static size_t round_up(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }

// The number of chunks does not grow steadily with the length: take the largest.
static int max_chunks(int cache_max_len) {
    int n = decode_chunks(cache_max_len);
    if (cache_max_len > 8192 && n < decode_chunks(8192)) n = decode_chunks(8192);
    if (cache_max_len > 32768 && n < decode_chunks(32768)) n = decode_chunks(32768);
    return n;
}

// The workspace: arrived, part_ml, part_o.
static size_t arrived_bytes(const AttentionArgs *a) { return round_up((size_t)a->n_seq * a->n_heads * sizeof(unsigned), 256); }
static size_t part_ml_bytes(const AttentionArgs *a) {
    return round_up((size_t)a->n_seq * a->n_heads * max_chunks(a->cache_max_len) * sizeof(float2), 256);
}

size_t attention_workspace_bytes(const AttentionArgs *a) {
    if (check_dimensions("attention_workspace_bytes", a)) return SIZE_MAX;
    return arrived_bytes(a) + part_ml_bytes(a) + (size_t)a->n_seq * a->n_heads * max_chunks(a->cache_max_len) * a->head_dim * sizeof(float);
}

size_t attention_cache_bytes(const AttentionArgs *a) {
    if (check_dimensions("attention_cache_bytes", a)) return SIZE_MAX;
    return (size_t)a->n_seq * a->n_kv_heads * a->cache_max_len * a->head_dim * element_bytes(a->dtype);
}

template <class Tile> static int decode_launch(const AttentionArgs *a, DecodeParams p, const Device &device, cudaStream_t stream) {
    int blocks_per_sm, rows = p.group < Tile::HEADS ? p.group : Tile::HEADS, warps = DECODE_MAX_WARPS;
    if (decode_smem_bytes<Tile>(warps, Tile::HEADS) > (size_t)device.block_smem) warps = 4;    // the same for all groups: it shapes the sums
    size_t smem = decode_smem_bytes<Tile>(warps, rows);
    p.head_blocks = (p.group + Tile::HEADS - 1) / Tile::HEADS;
    TRY_CUDA(cudaFuncSetAttribute(decode_kernel<Tile>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)smem));
    TRY_CUDA(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks_per_sm, decode_kernel<Tile>, warps * 32, smem));
    if (blocks_per_sm < 1) return refuse("attention_decode: no room on this GPU for a block with %zu bytes of shared memory", smem);
    long long items = (long long)p.n_seq * p.cache.n_kv_heads * p.head_blocks * p.max_chunks, fit = (long long)device.n_sms * blocks_per_sm;
    return launch("decode_kernel", a, decode_kernel<Tile>, items < fit ? items : fit, warps * 32, smem, device.dependent_launch, stream, p);
}

int attention_decode(const AttentionArgs *a, void *cuda_stream) {
    const char *who = "attention_decode";
    cudaStream_t stream = (cudaStream_t)cuda_stream;
    Device device;
    if (check_args(who, a)) return 1;
    if (!a->seq_lens_device) return refuse("%s: seq_lens_device is NULL", who);
    for (int i = 0; a->seq_lens && i < a->n_seq; i++)
        if (check_length(who, i, a->seq_lens[i], 1, a->cache_max_len)) return 1;
    if (check_pointer(who, "workspace", a->workspace)) return 1;
    if (a->workspace_bytes < attention_workspace_bytes(a))
        return refuse("%s: workspace of %zu bytes, expected at least %zu", who, a->workspace_bytes, attention_workspace_bytes(a));
    if (device_find(&device)) return 1;

    DecodeParams p = {a->q, a->out, a->k_new, a->v_new, a->q_token_stride, a->q_head_stride, a->out_token_stride, a->out_head_stride,
                      a->k_token_stride, a->k_head_stride, a->v_token_stride, a->v_head_stride, cache_view(a), a->seq_lens_device,
                      (unsigned *)a->workspace, (float2 *)((char *)a->workspace + arrived_bytes(a)),
                      (float *)((char *)a->workspace + arrived_bytes(a) + part_ml_bytes(a)), a->n_seq, a->n_heads,
                      a->n_heads / a->n_kv_heads, 1, a->cache_max_len, max_chunks(a->cache_max_len), a->append, scale_log2(a)};
    return for_types(a, [&](auto zero, auto dim) {
        typedef decltype(zero) T;
        constexpr int D = dim;
        if constexpr (std::is_same<T, float>::value) return decode_launch<FmaTile<D>>(a, p, device, stream);
        else if (p.group <= 8) return decode_launch<MmaTile<T, D, 1>>(a, p, device, stream);
        else return decode_launch<MmaTile<T, D, 2>>(a, p, device, stream);
    });
}

// Fills in b and p.n_tiles for query tiles of tile_rows; returns the number of new tokens.
static int batch_tokens(const AttentionArgs *a, int first, int n, Batch *b) {
    b->n_seq = n;
    b->first_seq = first;
    memcpy(b->q_start, a->q_start + first, (n + 1) * sizeof(int));
    memcpy(b->seq_len, a->seq_lens + first, n * sizeof(int));
    return b->q_start[n] - b->q_start[0];
}

static long long batch_order(Batch *b, int tile_rows) {
    long long n_tiles = 0;
    auto tiles = [&](int seq) { return (b->q_start[seq + 1] - b->q_start[seq] + tile_rows - 1) / tile_rows; };
    for (int i = 0; i < b->n_seq; i++) {    // insertion sort, most tiles first
        int j = i;
        for (; j > 0 && tiles(b->order[j - 1]) < tiles(i); j--) b->order[j] = b->order[j - 1];
        b->order[j] = i;
        n_tiles += tiles(i);
    }
    return n_tiles;
}

// A tensor map for boxes of 64 elements x rows, in tiles swizzled as the kernel expects; dims and strides innermost first.
static int tensor_map(CUtensorMap *map, int dtype, const void *base, int rank, const cuuint64_t *dims, const cuuint64_t *stride_bytes, const cuuint32_t *box) {
    typedef CUresult (*Encode)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *, const cuuint64_t *, const cuuint64_t *, const cuuint32_t *,
                               const cuuint32_t *, CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
    static Encode encode;    // found once, without linking the driver's library; threads that race find the same
    if (!encode) {
        void *found = NULL;
        cudaDriverEntryPointQueryResult result;
        TRY_CUDA(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result));
        if (!found) return refuse("attention_prefill: the driver has no cuTensorMapEncodeTiled");
        encode = (Encode)found;
    }
    cuuint32_t unit[3] = {1, 1, 1};
    CUresult error = encode(map, dtype == ATTENTION_BF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, rank, (void *)base, dims,
                            stride_bytes, box, unit, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                            CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (error != CUDA_SUCCESS) return refuse("attention_prefill: cuTensorMapEncodeTiled failed: driver error %d", (int)error);
    return 0;
}

template <typename T, int D> static int prefill_hopper(const AttentionArgs *a, PrefillParams p, Batch &b, const Device &device, cudaStream_t stream) {
    HopperMaps maps;
    // Boxes stay within a block of the cache: as many rows as divide both the block and the tile.
    int box_rows = HOPPER_KEYS;
    if (a->block_table && a->block_size != a->cache_max_len)
        while (a->block_size % box_rows) box_rows /= 2;
    cuuint64_t q_dims[3] = {(cuuint64_t)D, (cuuint64_t)a->n_heads, (cuuint64_t)b.q_start[b.n_seq]};
    cuuint64_t q_strides[2] = {(cuuint64_t)a->q_head_stride * 2, (cuuint64_t)a->q_token_stride * 2};
    cuuint64_t kv_dims[2] = {(cuuint64_t)D, (cuuint64_t)1 << 31}, kv_strides[1] = {(cuuint64_t)D * 2};    // how many rows a paged cache has is not known
    cuuint32_t q_box[3] = {64, 1, HOPPER_ROWS}, kv_box[2] = {64, (cuuint32_t)box_rows};
    if (tensor_map(&maps.q, a->dtype, a->q, 3, q_dims, q_strides, q_box) || tensor_map(&maps.k, a->dtype, a->k_cache, 2, kv_dims, kv_strides, kv_box) ||
        tensor_map(&maps.v, a->dtype, a->v_cache, 2, kv_dims, kv_strides, kv_box))
        return 1;
    long long n_tiles = batch_order(&b, HOPPER_ROWS) * a->n_heads;
    if (n_tiles > 0x7fffffff - device.n_sms) return refuse("attention_prefill: %lld query tiles in one launch", n_tiles);
    p.n_tiles = (int)n_tiles;
    return launch("prefill_hopper_kernel", a, prefill_hopper_kernel<T, D>, n_tiles < device.n_sms ? n_tiles : device.n_sms,
                  (1 + HOPPER_WARPGROUPS) * 128, hopper_smem_bytes<D>(), false, stream, p, b, maps, box_rows);
}

int attention_prefill(const AttentionArgs *a, void *cuda_stream) {
    const char *who = "attention_prefill";
    cudaStream_t stream = (cudaStream_t)cuda_stream;
    Device device;
    if (check_args(who, a)) return 1;
    if (!a->q_start) return refuse("%s: q_start is NULL", who);
    if (!a->seq_lens) return refuse("%s: seq_lens is NULL", who);
    if (a->q_start[0] < 0) return refuse("%s: q_start[0] is %d, expected at least 0", who, a->q_start[0]);
    for (int i = 0; i < a->n_seq; i++) {
        if (a->q_start[i + 1] < a->q_start[i])
            return refuse("%s: q_start[%d] is %d, expected at least q_start[%d] = %d", who, i + 1, a->q_start[i + 1], i, a->q_start[i]);
        if (check_length(who, i, a->seq_lens[i], a->q_start[i + 1] - a->q_start[i], a->cache_max_len)) return 1;
    }
    if (a->q_start[a->n_seq] == a->q_start[0]) return refuse("%s: 0 new tokens in %d sequences, expected at least 1", who, a->n_seq);
    if (device_find(&device)) return 1;

    PrefillParams p = {a->q, a->out, a->k_new, a->v_new, a->q_token_stride, a->q_head_stride, a->out_token_stride, a->out_head_stride,
                       a->k_token_stride, a->k_head_stride, a->v_token_stride, a->v_head_stride, cache_view(a), a->n_heads,
                       a->n_heads / a->n_kv_heads, a->causal, 0, scale_log2(a)};
    for (int first = 0; first < a->n_seq; first += MAX_BATCH) {
        Batch b;
        int tokens = batch_tokens(a, first, a->n_seq - first < MAX_BATCH ? a->n_seq - first : MAX_BATCH, &b);
        if (tokens == 0) continue;
        if (a->append && launch("prefill_append_kernel", a, prefill_append_kernel, tokens, 128, 0, false, stream, p, b, element_bytes(a->dtype)))
            return 1;
        int failed = for_types(a, [&](auto zero, auto dim) {
            typedef decltype(zero) T;
            constexpr int D = dim;
            if constexpr (std::is_same<T, float>::value)
                return launch("prefill_f32_kernel", a, prefill_f32_kernel<D>, batch_order(&b, F32_ROWS) * a->n_heads, 256,
                              prefill_f32_smem_bytes<D>(), false, stream, p, b);
            else if (device.hopper) return prefill_hopper<T, D>(a, p, b, device, stream);
            else
                return launch("prefill_plain_kernel", a, prefill_plain_kernel<T, D>, batch_order(&b, PLAIN_ROWS) * a->n_heads, 128,
                              prefill_plain_smem_bytes<T, D>(), false, stream, p, b);
        });
        if (failed) return failed;
    }
    return 0;
}
