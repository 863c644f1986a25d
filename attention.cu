// attention.cu: causal grouped-query attention over the KV cache: prefill, split-KV decode, fold.
// Interface and promises: model/attention.h. Reading order: the cache, primitives, decode (the deal of work, the step, the
// fold, the kernel), prefill (append, the kernel for any GPU), and the C interface with its checks at the end. Two rooms
// of their own: model/attention_f32.cuh, the float32 kernels, and model/attention_sm90.cuh, prefill on Hopper.
#include <float.h>
#include <limits.h>
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

// From the L2 cache: a block that starts before the kernels before it are over may find old lines in L1.
__device__ __forceinline__ int load_early(const int *p) { return __ldcg(p); }

// Offset in elements of the K (and V) row of one position. Rows of 16 positions that start on a multiple of 16 lie one
// after another, in a paged cache as well: block_size is a multiple of 16 there.
template <typename T> __device__ __forceinline__ size_t cache_row(const Cache<T> &c, int seq, int kv_head, int pos) {
    int block = seq;
    if (c.table) {
        block = load_early(c.table + (size_t)seq * c.table_width + pos / c.block_size);
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
// The same for what is read once, or by several blocks at about the same time: such lines leave the L2 cache first, so that
// lengths, queries and results stay.
__device__ __forceinline__ uint64_t read_once() {
    uint64_t policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
__device__ __forceinline__ void copy_async16(uint32_t dst, const void *src, uint64_t policy) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "l"(policy) : "memory");
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

// Asks for a line to be brought to L2.
__device__ __forceinline__ void prefetch_L2(const void *p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// A cluster of blocks (Hopper and later). All threads say that they are there, with the barriers that they have set up, and
// wait for all to be. (A release of more than that would wait for every copy under way.)
__device__ __forceinline__ void cluster_arrive() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
// Where the first block of the cluster has what this one has at `address` in shared memory.
__device__ __forceinline__ uint32_t of_first_in_cluster(uint32_t address) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("mapa.shared::cluster.u32 %0, %0, 0;" : "+r"(address));
#endif
    return address;
}
// A barrier in shared memory for bytes that another block sends: it is over when all of them are there.
__device__ __forceinline__ void expect_bytes(uint32_t barrier, int bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;\n"
                 "fence.mbarrier_init.release.cluster;\n"
                 "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
#endif
}
__device__ __forceinline__ void wait_for_bytes(uint32_t barrier) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("{\n"
                 ".reg .pred done;\n"
                 "again: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], 0;\n"
                 "@!done bra again;\n"
                 "}" ::"r"(barrier) : "memory");
#endif
}
// Sends 16 bytes to another block: `to` and `barrier` are addresses in its shared memory, from here.
__device__ __forceinline__ void send16(uint32_t to, float4 x, uint32_t barrier) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];"
                 ::"r"(to), "r"(__float_as_uint(x.x)), "r"(__float_as_uint(x.y)), "r"(__float_as_uint(x.z)), "r"(__float_as_uint(x.w)), "r"(barrier) : "memory");
#endif
}

// After what this thread, or others before a barrier, have written; before what it, or others after a barrier, read.
__device__ __forceinline__ unsigned atomic_add_acq_rel(unsigned *to, unsigned x) {
    unsigned before;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(to), "r"(x) : "memory");
    return before;
}

__device__ __forceinline__ uint4 load_shared16(uint32_t address) {
    uint4 x;
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(address) : "memory");
    return x;
}
__device__ __forceinline__ void store_shared16(uint32_t address, uint4 x) {
    asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
}
__device__ __forceinline__ float2 load_shared_float2(uint32_t address) {
    float2 x;
    asm volatile("ld.shared.v2.f32 {%0,%1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(address) : "memory");
    return x;
}
__device__ __forceinline__ void store_shared(uint32_t address, float2 x) {
    asm volatile("st.shared.v2.f32 [%0], {%1,%2};" ::"r"(address), "f"(x.x), "f"(x.y) : "memory");
}
__device__ __forceinline__ void store_shared(uint32_t address, uint32_t x) { asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(x) : "memory"); }

// Four 8x8 matrices of 16-bit elements; lane i gives the address of row i % 8 of matrix i / 8.
__device__ __forceinline__ void load_matrix4(uint32_t r[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}
__device__ __forceinline__ void load_matrix4(uint32_t a[2], uint32_t b[2], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(a[0]), "=r"(a[1]), "=r"(b[0]), "=r"(b[1]) : "r"(address) : "memory");
}
__device__ __forceinline__ void load_matrix4_transposed(uint32_t r[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
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
    extern __shared__ __align__(1024) char smem[];
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

#include "model/attention_f32.cuh"
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
struct Device { int known, n_sms, block_smem, sm_smem, hopper, dependent_launch; };

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
        TRY_CUDA(cudaDeviceGetAttribute(&d.sm_smem, cudaDevAttrMaxSharedMemoryPerMultiprocessor, id));
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
                  int cluster, cudaStream_t stream, A... args) {
    if (grid > 0x7fffffff) return refuse("%s: a grid of %lld blocks, expected at most 2147483647", name, grid);
    if (smem > 48 * 1024) TRY_CUDA(cudaFuncSetAttribute((const void *)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)smem));
    cudaLaunchAttribute attributes[2];
    int n = 0;
    if (dependent) {
        attributes[n].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[n++].val.programmaticStreamSerializationAllowed = 1;
    }
    if (cluster > 1) {
        attributes[n].id = cudaLaunchAttributeClusterDimension;
        attributes[n].val.clusterDim.x = cluster;
        attributes[n].val.clusterDim.y = attributes[n].val.clusterDim.z = 1;
        n++;
    }
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)grid);
    config.blockDim = dim3(block);
    config.dynamicSmemBytes = smem;
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = n;
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
    for (int length = 4096; length < cache_max_len && length <= 65536; length *= 2)
        if (n < decode_chunks(length)) n = decode_chunks(length);
    return n;
}

// The workspace: arrived, of one size for all shapes, as it must stay zero; part_ml; part_o.
constexpr int DECODE_MAX_BLOCKS = 1024;
constexpr size_t ARRIVED_BYTES = DECODE_MAX_BLOCKS * sizeof(unsigned);
static size_t part_ml_bytes(const AttentionArgs *a) {
    return round_up((size_t)a->n_seq * a->n_heads * max_chunks(a->cache_max_len) * sizeof(float2), 256);
}

size_t attention_workspace_bytes(const AttentionArgs *a) {
    if (check_dimensions("attention_workspace_bytes", a)) return SIZE_MAX;
    return ARRIVED_BYTES + part_ml_bytes(a) + (size_t)a->n_seq * a->n_heads * max_chunks(a->cache_max_len) * a->head_dim * sizeof(float);
}

size_t attention_cache_bytes(const AttentionArgs *a) {
    if (check_dimensions("attention_cache_bytes", a)) return SIZE_MAX;
    return (size_t)a->n_seq * a->n_kv_heads * a->cache_max_len * a->head_dim * element_bytes(a->dtype);
}

// Has an SM room for two blocks with so much shared memory each? The system takes a kilobyte of each, and the variables of
// the kernel another one, as the rest is aligned to that.
static bool two_fit(const Device &device, size_t smem) { return 2 * (smem + 2048) <= (size_t)device.sm_smem; }

// cluster_smem: what a block needs more if clusters are worth while; 0: they are not.
static int decode_launch(const AttentionArgs *a, DecodeParams p, void (*kernel)(DecodeParams), int heads, int block, size_t smem, size_t cluster_smem,
                         const Device &device, cudaStream_t stream) {
    int blocks_per_sm;
    p.head_blocks = (p.group + heads - 1) / heads;
    bool clusters = cluster_smem && device.dependent_launch && two_fit(device, smem + cluster_smem);
    if (clusters) smem += cluster_smem;
    TRY_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)smem));
    TRY_CUDA(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks_per_sm, kernel, block, smem));
    if (blocks_per_sm < 1) return refuse("attention_decode: no room on this GPU for a block with %zu bytes of shared memory", smem);
    while (blocks_per_sm > 2) {    // no room for a third: see decode_kernel
        smem += 4096;
        TRY_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)smem));
        TRY_CUDA(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks_per_sm, kernel, block, smem));
    }
    long long groups = (long long)p.n_seq * p.cache.n_kv_heads * p.head_blocks;
    long long items = (long long)p.n_seq * p.cache.n_kv_heads * p.head_blocks * p.max_chunks, grid = device.n_sms * blocks_per_sm;
    long long work = (long long)p.n_seq * p.cache.n_kv_heads * p.head_blocks * (p.cache_max_len / 128 + 32);
    if (work > 0x7fffffff) return refuse("attention_decode: %lld work items, expected at most 2147483647", work);
    if (grid > items) grid = items;
    if (grid > DECODE_MAX_BLOCKS) grid = DECODE_MAX_BLOCKS;
    // Clusters of four find room too late; with 8 chunks there is no eight for each, and there is room for the second's of DECODE_EIGHTS.
    if (clusters && grid / groups == 2 && p.max_chunks > 8 && p.max_chunks <= 8 * DECODE_EIGHTS) p.cluster = 2;
    grid -= grid % p.cluster;
    p.parts = (int)(grid / groups);
    p.wide = 8 * groups >= 3 * grid;
    return launch("decode_kernel", a, kernel, grid, block, smem, device.dependent_launch, p.cluster, stream, p);
}

template <typename T, int D, int NT> static int decode_16bit(const AttentionArgs *a, const DecodeParams &p, const Device &device, cudaStream_t stream) {
    auto with = [&](auto stages) {
        constexpr int STAGES = decltype(stages)::value;
        return decode_launch(a, p, decode_kernel<T, D, NT, STAGES>, 8 * NT, DECODE_THREADS, decode_smem_bytes<D, NT>(STAGES), decode_sent_bytes<D, NT>(),
                             device, stream);
    };
    constexpr int MOST = decode_most_stages<D, NT>();
    if (two_fit(device, decode_smem_bytes<D, NT>(MOST) + decode_sent_bytes<D, NT>())) return with(std::integral_constant<int, MOST>());
    return with(std::integral_constant<int, 2>());
}

// Eight warps where their rings fit, else four: a matter of the GPU only, as it shapes the sums.
template <int D> static int decode_f32(const AttentionArgs *a, const DecodeParams &p, const Device &device, cudaStream_t stream) {
    typedef FmaTile<D> Tile;
    int rows = p.group < Tile::HEADS ? p.group : Tile::HEADS;
    if (f32_smem_bytes<Tile>(8, Tile::HEADS) <= (size_t)device.block_smem)
        return decode_launch(a, p, decode_f32_kernel<Tile, 8>, Tile::HEADS, 256, f32_smem_bytes<Tile>(8, rows), 0, device, stream);
    return decode_launch(a, p, decode_f32_kernel<Tile, 4>, Tile::HEADS, 128, f32_smem_bytes<Tile>(4, rows), 0, device, stream);
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

    DecodeParams p = {a->n_seq, a->n_heads, a->n_heads / a->n_kv_heads, 1, a->cache_max_len, max_chunks(a->cache_max_len), a->append, a->settled, 1, 0, 0,
                      scale_log2(a), a->seq_lens_device, cache_view(a), a->q, a->out, a->k_new, a->v_new,
                      a->q_token_stride, a->q_head_stride, a->out_token_stride, a->out_head_stride,
                      a->k_token_stride, a->k_head_stride, a->v_token_stride, a->v_head_stride,
                      (unsigned *)a->workspace, (float2 *)((char *)a->workspace + ARRIVED_BYTES),
                      (float *)((char *)a->workspace + ARRIVED_BYTES + part_ml_bytes(a))};
    return for_types(a, [&](auto zero, auto dim) {
        typedef decltype(zero) T;
        constexpr int D = dim;
        if constexpr (std::is_same<T, float>::value) return decode_f32<D>(a, p, device, stream);
        else if (p.group <= 8) return decode_16bit<T, D, 1>(a, p, device, stream);
        else return decode_16bit<T, D, 2>(a, p, device, stream);
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
                  (1 + HOPPER_WARPGROUPS) * 128, hopper_smem_bytes<D>(), false, 1, stream, p, b, maps, box_rows);
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
        if (a->append && launch("prefill_append_kernel", a, prefill_append_kernel, tokens, 128, 0, false, 1, stream, p, b, element_bytes(a->dtype)))
            return 1;
        int failed = for_types(a, [&](auto zero, auto dim) {
            typedef decltype(zero) T;
            constexpr int D = dim;
            if constexpr (std::is_same<T, float>::value)
                return launch("prefill_f32_kernel", a, prefill_f32_kernel<D>, batch_order(&b, F32_ROWS) * a->n_heads, 256,
                              prefill_f32_smem_bytes<D>(), false, 1, stream, p, b);
            else if (device.hopper) return prefill_hopper<T, D>(a, p, b, device, stream);
            else
                return launch("prefill_plain_kernel", a, prefill_plain_kernel<T, D>, batch_order(&b, PLAIN_ROWS) * a->n_heads, 128,
                              prefill_plain_smem_bytes<T, D>(), false, 1, stream, p, b);
        });
        if (failed) return failed;
    }
    return 0;
}
