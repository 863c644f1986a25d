// PTX instructions as functions, for attention.cu and the CUDA engines: what each does, its shapes, and what it orders.
//
// Three memory spaces: addresses of shared memory are 32-bit numbers in the window .shared::cta (shared_address), those
// of global memory are pointers. "memory" among the clobbers of an asm keeps the compiler, and nothing else, from
// moving accesses across it; what the hardware orders is said at each function. Loads from shared memory return out of
// line: the instruction after one may be executed before its value has arrived.
//
// ASM_SM90: an instruction that GPUs before Hopper do not have, in code that is compiled for them too. There it is
// nothing, and the launchers see to it that no such GPU depends on it.
#pragma once

#include <stdint.h>
#include <type_traits>

#include "numbers.cuh"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define ASM_SM90(...)
#else
#define ASM_SM90(...) asm volatile(__VA_ARGS__)
#endif

__device__ __forceinline__ uint32_t shared_address(const void *p) {
    return (uint32_t)__cvta_generic_to_shared(p);
}

// ---- programmatic dependent launch (Hopper and later) ---------------------------------------------------------------
// A kernel launched with the attribute programmaticStreamSerialization may start while the one before it in the stream
// still runs. griddepcontrol.wait: until all kernels before are complete and their writes visible to this thread.
// griddepcontrol.launch_dependents: once every block has called it (or ended), the next kernel may be scheduled; it
// promises nothing about memory.
__device__ __forceinline__ void wait_for_previous_kernel() {
    ASM_SM90("griddepcontrol.wait;" :: : "memory");
}
__device__ __forceinline__ void let_next_kernel_start() {
    ASM_SM90("griddepcontrol.launch_dependents;" :: : "memory");
}

// ---- mbarrier: a barrier in shared memory, 8 bytes, with phases -----------------------------------------------------
// A phase completes when `count` arrivals have been made and every byte that was announced (expect_tx) has been
// delivered (complete_tx, by asynchronous copies). A fresh barrier is in phase 0: waiting for parity 1 returns at once,
// for parity 0 when the phase has completed.

__device__ __forceinline__ void mbarrier_init(uint32_t barrier, int count) {
    ASM_SM90("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
// Makes this thread's initialised barriers visible to asynchronous copies, and to the cluster.
__device__ __forceinline__ void fence_mbarrier_init() {
    ASM_SM90("fence.mbarrier_init.release.cluster;" :: : "memory");
}
// One arrival. Release: what this thread wrote (and read, if the values have arrived) comes before what a waiter does.
__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
    ASM_SM90("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// The same once `result` has been computed: an arrival does not queue after loads from shared memory that are under
// way, so a slot whose loads are not complete could be filled anew. The count is 1 whatever the result: a false
// dependency.
__device__ __forceinline__ void mbarrier_arrive_after(uint32_t barrier, float result) {
    asm volatile("{\n.reg .b32 count;\nor.b32 count, %1, 1;\nmin.u32 count, count, 1;\nmbarrier.arrive.shared::cta.b64 "
                 "_, [%0], count;\n}" ::"r"(barrier),
                 "r"(__float_as_uint(result))
                 : "memory");
}
// One arrival, and an announcement of so many bytes.
__device__ __forceinline__ void mbarrier_arrive_expect_tx(uint32_t barrier, int bytes) {
    ASM_SM90("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// A value that the compiler may not compute again, as it does with what special registers give: it is the same in all
// lanes, or each lane's own.
__device__ __forceinline__ uint32_t held_uniform(uint32_t x) {
    return __shfl_sync(~0u, x, 0);
}
__device__ __forceinline__ uint32_t held(uint32_t x) {
    return __shfl_sync(~0u, x, threadIdx.x % 32);
}
// Waits until the phase of this parity has completed. Acquire, for the block: arrivals' writes and the bytes copied are
// visible.
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, int parity) {
    asm volatile("{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1, "
                 "1000000;\n@!done bra again;\n}" ::"r"(barrier),
                 "r"(parity)
                 : "memory");
}
// Whether it has; if so, as if waited for.
__device__ __forceinline__ bool mbarrier_is_complete(uint32_t barrier, int parity) {
    int complete = 0;
    ASM_SM90("{\n.reg .pred done;\nmbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\nselp.b32 %0, 1, 0, "
             "done;\n}" : "=r"(complete) : "r"(barrier),
             "r"(parity) : "memory");
    return complete;
}
// The same for what other blocks of the cluster sent or arrived with: acquire, for the cluster.
__device__ __forceinline__ void mbarrier_wait_cluster(uint32_t barrier, int parity) {
    ASM_SM90("{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], "
             "%1;\n@!done bra again;\n}" ::"r"(barrier),
             "r"(parity) : "memory");
}
// One arrival at a barrier of another block of the cluster (a .shared::cluster address). Release, for the cluster.
__device__ __forceinline__ void mbarrier_arrive_cluster(uint32_t barrier) {
    ASM_SM90("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// The same where nothing that was written is to be seen there: what this thread has read, or a wgmma that is complete,
// comes before what a waiter has copied to that place. (A release for the cluster waits for every access under way.)
__device__ __forceinline__ void mbarrier_arrive_read(uint32_t barrier) {
    ASM_SM90("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// The same once `read` has come from shared memory (as mbarrier_arrive_after).
__device__ __forceinline__ void mbarrier_arrive_read_after(uint32_t barrier, uint32_t read) {
    ASM_SM90("{\n.reg .b32 count;\nor.b32 count, %1, 1;\nmin.u32 count, count, 1;\nmbarrier.arrive.shared::cluster.b64 "
             "_, [%0], count;\n}" ::"r"(barrier),
             "r"(read) : "memory");
}
// What this thread wrote to global memory, or others before it acquired that, before what the asynchronous proxy (bulk
// copies) reads there.
__device__ __forceinline__ void fence_proxy_async_global() {
    ASM_SM90("fence.proxy.async.global;" :: : "memory");
}
// What this thread wrote to shared memory with ordinary stores or cp.async, before what the asynchronous proxy (wgmma,
// bulk copies) reads there.
__device__ __forceinline__ void fence_proxy_async() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---- named barriers: 16 in hardware for each block ------------------------------------------------------------------

enum NamedBarrier {
    BARRIER_ALL_THREADS = 0,     // __syncthreads
    BARRIER_FUSED_CONSUMERS = 1, // fused_kernel.cuh: among the consumer warps
    BARRIER_FUSED_SETUP = 2,     // once, when the mbarriers are initialised
    BARRIER_FUSED_EPILOGUE = 3,  // among the epilogue warps
    BARRIER_WIDE_EPILOGUE = 1,   // wide_kernel.cuh: among the epilogue warps
    BARRIER_PREFILL_TURN_0 = 1,  // prefill_sm90.cuh: consumer warpgroup 0 may issue its products
    BARRIER_PREFILL_TURN_1 = 2,  // and warpgroup 1
};

// sync: waits until `threads` threads, in whole warps, have come with sync or arrive; orders memory among them, within
// the block. arrive: is counted and does not wait.
__device__ __forceinline__ void named_barrier_sync(NamedBarrier barrier, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"((int)barrier), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_barrier_arrive(NamedBarrier barrier, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"((int)barrier), "r"(threads) : "memory");
}

// ---- clusters of blocks (Hopper and later) --------------------------------------------------------------------------

// All threads of a cluster arrive, and wait for all to have arrived. The arrival is relaxed: it orders nothing but what
// a fence has made visible (fence_mbarrier_init). A release would wait for every copy under way.
__device__ __forceinline__ void cluster_arrive() {
    ASM_SM90("barrier.cluster.arrive.relaxed.aligned;" :: : "memory");
}
__device__ __forceinline__ void cluster_wait() {
    ASM_SM90("barrier.cluster.wait.acquire.aligned;" :: : "memory");
}
// An arrival that releases, for the cluster, what this thread has done.
__device__ __forceinline__ void cluster_arrive_release() {
    ASM_SM90("barrier.cluster.arrive.release.aligned;" :: : "memory");
}
__device__ __forceinline__ int rank_in_cluster() {
    int rank = 0;
    ASM_SM90("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
// The address, in .shared::cluster, of what the cluster's block `rank` has at this block's `address`.
__device__ __forceinline__ uint32_t address_in_block(uint32_t address, int rank) {
    uint32_t there = 0;
    ASM_SM90("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
    return there;
}
// The address, in .shared::cluster, of what the cluster's first block has at this block's `address`.
__device__ __forceinline__ uint32_t address_in_first_block(uint32_t address) {
    ASM_SM90("mapa.shared::cluster.u32 %0, %0, 0;" : "+r"(address));
    return address;
}
// Sends 16 bytes to another block's shared memory, asynchronously: `to` and `barrier` are .shared::cluster addresses in
// that block. Weak; the bytes are counted at the barrier, and visible to whoever waits there.
__device__ __forceinline__ void store_async16(uint32_t to, float4 x, uint32_t barrier) {
    ASM_SM90(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to),
        "r"(__float_as_uint(x.x)), "r"(__float_as_uint(x.y)), "r"(__float_as_uint(x.z)), "r"(__float_as_uint(x.w)),
        "r"(barrier) : "memory");
}

// ---- copies from global to shared memory ----------------------------------------------------------------------------

// A cache policy: lines that it touches leave L2 first. For what is read once, so that what is read again soon stays
// (lengths, queries, results; instructions too).
__device__ __forceinline__ uint64_t l2_evict_first() {
    uint64_t policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

// cp.async: 16 bytes a thread, both addresses multiples of 16, past L1; L2 fetches the 128 bytes around. Complete, for
// this thread, after copy_async_wait; for others after a barrier then. Not valid: zeros, and `src` is not read (it must
// be legal).
__device__ __forceinline__ void copy_async16(uint32_t dst, const void *src, bool valid) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(valid ? 16 : 0)
                 : "memory");
}
__device__ __forceinline__ void copy_async16(uint32_t dst, const void *src) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(dst), "l"(src) : "memory");
}
__device__ __forceinline__ void copy_async16(uint32_t dst, const void *src, uint64_t policy) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2;" ::"r"(dst), "l"(src),
                 "l"(policy)
                 : "memory");
}
// The same without the 128 bytes around: for what L2 has already.
__device__ __forceinline__ void copy_async16_from_l2(uint32_t dst, const void *src) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(dst), "l"(src) : "memory");
}
// Closes this thread's group of copies; waits until at most N groups, or no copies at all, are under way.
__device__ __forceinline__ void copy_async_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int N> __device__ __forceinline__ void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
__device__ __forceinline__ void copy_async_wait_all() {
    asm volatile("cp.async.wait_all;" ::: "memory");
}

// cp.async.bulk: `bytes` in one copy by the asynchronous proxy; addresses and size are multiples of 16. The bytes are
// counted at `barrier`, and visible to whoever waits there.
__device__ __forceinline__ void copy_bulk(uint32_t to, const void *from, int bytes, uint32_t barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barrier)
                 : "memory");
}
__device__ __forceinline__ void copy_bulk(uint32_t to, const void *from, int bytes, uint32_t barrier, uint64_t policy) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
            "r"(to),
        "l"(from), "r"(bytes), "r"(barrier), "l"(policy)
        : "memory");
}
// The box of a tensor map (a CUtensorMap) at element x, row y(, slice z), completed in the same way.
__device__ __forceinline__ void copy_tensor_2d(uint32_t dst, const void *map, int x, int y, uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
            dst),
        "l"(map), "r"(x), "r"(y), "r"(barrier)
        : "memory");
}
__device__ __forceinline__ void copy_tensor_2d(uint32_t dst, const void *map, int x, int y, uint32_t barrier,
                                               uint64_t policy) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, "
        "{%2, %3}], [%4], %5;" ::"r"(dst),
        "l"(map), "r"(x), "r"(y), "r"(barrier), "l"(policy)
        : "memory");
}
// The same to every block of the cluster whose bit is in `blocks`: at the same place, and counted at the same barrier,
// in each of them.
__device__ __forceinline__ void copy_tensor_2d_to_blocks(uint32_t dst, const void *map, int x, int y, uint32_t barrier,
                                                         int blocks) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
                 "[%1, {%2, %3}], [%4], %5;" ::"r"(dst),
                 "l"(map), "r"(x), "r"(y), "r"(barrier), "h"((uint16_t)blocks)
                 : "memory");
}
__device__ __forceinline__ void copy_tensor_4d_to_blocks(uint32_t dst, const void *map, int x, int y, int z, int w,
                                                         uint32_t barrier, int blocks) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
                 "[%1, {%2, %3, %4, %5}], [%6], %7;" ::"r"(dst),
                 "l"(map), "r"(x), "r"(y), "r"(z), "r"(w), "r"(barrier), "h"((uint16_t)blocks)
                 : "memory");
}
__device__ __forceinline__ void copy_tensor_4d(uint32_t dst, const void *map, int x, int y, int z, int w,
                                               uint32_t barrier) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], "
                 "[%1, {%2, %3, %4, %5}], [%6];" ::"r"(dst),
                 "l"(map), "r"(x), "r"(y), "r"(z), "r"(w), "r"(barrier)
                 : "memory");
}
__device__ __forceinline__ void copy_tensor_4d(uint32_t dst, const void *map, int x, int y, int z, int w,
                                               uint32_t barrier, uint64_t policy) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
                 "[%1, {%2, %3, %4, %5}], [%6], %7;" ::"r"(dst),
                 "l"(map), "r"(x), "r"(y), "r"(z), "r"(w), "r"(barrier), "l"(policy)
                 : "memory");
}
__device__ __forceinline__ void copy_tensor_3d(uint32_t dst, const void *map, int x, int y, int z, uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::
            "r"(dst),
        "l"(map), "r"(x), "r"(y), "r"(z), "r"(barrier)
        : "memory");
}

// ---- global memory --------------------------------------------------------------------------------------------------

// Loads from L2, past L1: what other blocks, or a kernel that is not over, may have written. They order nothing
// themselves, and stay after what is in front of them (volatile, "memory"). Not valid: zeros, by a predicate in place
// of a branch, so that many loads can be under way.
__device__ __forceinline__ int load_l2(const int *p) {
    return __ldcg(p);
}
__device__ __forceinline__ float load_l2(const float *p) {
    float v;
    asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(v) : "l"(p) : "memory");
    return v;
}
__device__ __forceinline__ uint4 load_l2_16(const void *p, bool valid) {
    uint4 v = {0, 0, 0, 0};
    asm volatile("{\n.reg .pred valid;\nsetp.ne.s32 valid, %5, 0;\n@valid ld.global.cg.v4.u32 {%0,%1,%2,%3}, [%4];\n}"
                 : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
                 : "l"(p), "r"((int)valid)
                 : "memory");
    return v;
}
// Asks for a line to be brought to L2.
__device__ __forceinline__ void prefetch_l2(const void *p) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}

// x more; the value before. Acquire and release at GPU scope: after what this thread wrote, or others before a barrier
// of the block; before what it, or others after a barrier, read.
__device__ __forceinline__ unsigned atomic_add_acq_rel(unsigned *to, unsigned x) {
    unsigned before;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(to), "r"(x) : "memory");
    return before;
}
// 1 more, of a number below 2^31; the value before. Relaxed: it orders nothing. (An increment, since ptxas makes an
// addition one for the whole warp and waits at once to share out the answer; this one is waited for where it is used.)
__device__ __forceinline__ int atomic_increment_relaxed(int *to) {
    int before;
    asm volatile("atom.relaxed.gpu.global.inc.u32 %0, [%1], 0x7fffffff;" : "=r"(before) : "l"(to) : "memory");
    return before;
}
// x more, without an answer. Release at GPU scope.
__device__ __forceinline__ void reduce_add_release(unsigned *to, unsigned x) {
    asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(to), "r"(x) : "memory");
}
// Acquire at GPU scope: what a thread wrote before the release that this load sees is visible.
__device__ __forceinline__ unsigned load_acquire(const unsigned *from) {
    unsigned x;
    asm volatile("ld.acquire.gpu.u32 %0, [%1];" : "=r"(x) : "l"(from) : "memory");
    return x;
}

// Relaxed: in no order with what the thread stored or will load.
__device__ __forceinline__ void reduce_add_relaxed(unsigned *to, unsigned x) {
    asm volatile("red.relaxed.gpu.global.add.u32 [%0], %1;" ::"l"(to), "r"(x) : "memory");
}
__device__ __forceinline__ unsigned load_relaxed(const unsigned *from) {
    unsigned x;
    asm volatile("ld.relaxed.gpu.u32 %0, [%1];" : "=r"(x) : "l"(from) : "memory");
    return x;
}

// The same among several GPUs: what was stored, by this thread or by others that it has met,
// before what is stored next.
__device__ __forceinline__ void fence_system() {
    asm volatile("fence.acq_rel.sys;" ::: "memory");
}
__device__ __forceinline__ void reduce_add_system(unsigned *to, unsigned x) {
    asm volatile("red.relaxed.sys.global.add.u32 [%0], %1;" ::"l"(to), "r"(x) : "memory");
}
__device__ __forceinline__ unsigned load_acquire_system(const unsigned *from) {
    unsigned x;
    asm volatile("ld.acquire.sys.u32 %0, [%1];" : "=r"(x) : "l"(from) : "memory");
    return x;
}
// Relaxed: each word by itself, in no order with others.
__device__ __forceinline__ void store_system(float *to, float x) {
    asm volatile("st.relaxed.sys.global.f32 [%0], %1;" ::"l"(to), "f"(x) : "memory");
}
__device__ __forceinline__ void store_system(uint16_t *to, uint16_t x) {
    asm volatile("st.relaxed.sys.global.u16 [%0], %1;" ::"l"(to), "h"(x) : "memory");
}
template <typename T> __device__ __forceinline__ void store_system(T *to, T x) { // bf16, f16
    static_assert(sizeof(T) == 2, "");
    store_system((uint16_t *)to, *(const uint16_t *)&x);
}
__device__ __forceinline__ void store_system(int2 *to, int2 x) {
    asm volatile("st.relaxed.sys.global.v2.s32 [%0], {%1,%2};" ::"l"(to), "r"(x.x), "r"(x.y) : "memory");
}
__device__ __forceinline__ void store_system(uint4 *to, uint4 x) {
    asm volatile("st.relaxed.sys.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(to), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
                 : "memory");
}
__device__ __forceinline__ float load_system(const float *from) {
    float x;
    asm volatile("ld.relaxed.sys.global.f32 %0, [%1];" : "=f"(x) : "l"(from) : "memory");
    return x;
}
// 16 bytes, zeros where that is not valid.
__device__ __forceinline__ uint4 load_system16(const void *p, bool valid) {
    uint4 v = {0, 0, 0, 0};
    asm volatile(
        "{\n.reg .pred valid;\nsetp.ne.s32 valid, %5, 0;\n@valid ld.relaxed.sys.global.v4.u32 {%0,%1,%2,%3}, [%4];\n}"
        : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
        : "l"(p), "r"((int)valid)
        : "memory");
    return v;
}
__device__ __forceinline__ unsigned long long nanoseconds() {
    unsigned long long x;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(x));
    return x;
}

// ---- bits -----------------------------------------------------------------------------------------------------------

// (x & MASK) | BITS, and (x & MASK) ^ BITS, in one instruction.
template <uint32_t MASK, uint32_t BITS> __device__ __forceinline__ uint32_t and_or(uint32_t x) {
    uint32_t y;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(y) : "r"(x), "n"(MASK), "n"(BITS));
    return y;
}
template <uint32_t MASK, uint32_t BITS = 0> __device__ __forceinline__ uint32_t and_xor(uint32_t x) {
    uint32_t y;
    asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(y) : "r"(x), "n"(MASK), "n"(BITS));
    return y;
}

// ---- shared memory --------------------------------------------------------------------------------------------------
// 4, 8 or 16 bytes at a multiple of as much; not valid: zeros, by a predicate.

__device__ __forceinline__ uint32_t load_shared4(uint32_t address) {
    uint32_t v;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
    return v;
}
__device__ __forceinline__ uint4 load_shared16(uint32_t address) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(address)
                 : "memory");
    return v;
}
__device__ __forceinline__ uint4 load_shared16(uint32_t address, bool valid) {
    uint4 v;
    asm volatile("{\n.reg .pred valid;\nsetp.ne.s32 valid, %5, 0;\nmov.b32 %0, 0;\nmov.b32 %1, 0;\nmov.b32 %2, "
                 "0;\nmov.b32 %3, 0;\n"
                 "@valid ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];\n}"
                 : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w)
                 : "r"(address), "r"((int)valid)
                 : "memory");
    return v;
}
__device__ __forceinline__ uint2 load_shared8(uint32_t address, bool valid) {
    uint2 v;
    asm volatile("{\n.reg .pred valid;\nsetp.ne.s32 valid, %3, 0;\nmov.b32 %0, 0;\nmov.b32 %1, 0;\n@valid "
                 "ld.shared.v2.u32 {%0,%1}, [%2];\n}"
                 : "=&r"(v.x), "=&r"(v.y)
                 : "r"(address), "r"((int)valid)
                 : "memory");
    return v;
}
__device__ __forceinline__ uint2 load_shared8(uint32_t address) {
    uint2 v;
    asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address) : "memory");
    return v;
}
// Two bytes, or four.
__device__ __forceinline__ uint32_t load_shared_2_or_4(uint32_t address, bool two) {
    uint32_t v;
    asm volatile("{\n.reg .pred two;\nsetp.ne.s32 two, %2, 0;\nmov.b32 %0, 0;\n@two ld.shared.u16 %0, [%1];\n"
                 "@!two ld.shared.u32 %0, [%1];\n}"
                 : "=&r"(v)
                 : "r"(address), "r"((int)two)
                 : "memory");
    return v;
}
__device__ __forceinline__ float2 load_shared_float2(uint32_t address) {
    float2 v;
    asm volatile("ld.shared.v2.f32 {%0,%1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(address) : "memory");
    return v;
}
__device__ __forceinline__ float4 load_shared_float4(uint32_t address) {
    float4 v;
    asm volatile("ld.shared.v4.f32 {%0,%1,%2,%3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "r"(address)
                 : "memory");
    return v;
}
__device__ __forceinline__ void store_shared16(uint32_t address, uint4 x) {
    asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
                 : "memory");
}
__device__ __forceinline__ void store_shared(uint32_t address, float2 x) {
    asm volatile("st.shared.v2.f32 [%0], {%1,%2};" ::"r"(address), "f"(x.x), "f"(x.y) : "memory");
}
__device__ __forceinline__ void store_shared(uint32_t address, uint32_t x) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(x) : "memory");
}

// ---- tensor cores, by one warp --------------------------------------------------------------------------------------
// A lane is 4g + t: g = lane / 4 is its row group, t = lane % 4 its column pair.

// ldmatrix: four 8 × 8 matrices of 16-bit elements; lane i gives the address of row i % 8 of matrix i / 8, and gets
// elements 2t and 2t + 1 of row g of each matrix (transposed: of column g).
__device__ __forceinline__ void load_matrix4(uint32_t r[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}
__device__ __forceinline__ void load_matrix4(uint32_t a[2], uint32_t b[2], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(a[0]), "=r"(a[1]), "=r"(b[0]), "=r"(b[1])
                 : "r"(address)
                 : "memory");
}
__device__ __forceinline__ void load_matrix4_transposed(uint32_t r[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

// mma: c[16 × 8] += a[16 × 16] b[16 × 8], inputs of type T (bf16 or f16), accumulators float32.
//   a[0]: row g, columns 2t, 2t+1      a[1]: row g+8, the same        a[2], a[3]: as a[0], a[1], columns 8 further on
//   b0: rows 2t, 2t+1 of column g      b1: rows 2t+8, 2t+9
//   c[0], c[1]: row g, columns 2t, 2t+1      c[2], c[3]: row g+8
template <typename T>
__device__ __forceinline__ void mma_16x8x16(float c[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                            uint32_t b1) {
    if constexpr (std::is_same<T, bf16>::value)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    else
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
template <typename T>
__device__ __forceinline__ void mma_16x8x16(float c[4], const uint32_t a[4], uint32_t b0, uint32_t b1) {
    mma_16x8x16<T>(c, a[0], a[1], a[2], a[3], b0, b1);
}

// ---- tensor cores, by a warpgroup (sm_90a only) ---------------------------------------------------------------------
// wgmma: 64 rows × N columns × 16, by the four warps of a warpgroup together, asynchronously. An accumulator of N
// columns is N / 2 floats a thread: for every 8 columns, rows g and g + 8 of the warp's 16, columns 2t and 2t + 1 (as
// in mma.sync).

// Before the first wgmma, and where registers that one reads have been written by other instructions.
__device__ __forceinline__ void wgmma_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
// Closes a group of wgmmas; waits until at most N groups are under way.
__device__ __forceinline__ void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int N> __device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
// Keeps the compiler from moving uses of an accumulator across a wgmma_wait. (No instruction.)
template <int N> __device__ __forceinline__ void wgmma_pin(float (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(x[i])::"memory");
}
// Gives registers of this warpgroup back to the block's pool, or takes some: N per thread from here on. By all warps of
// the warpgroup. In other code than sm_90a's, nothing.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
template <int N> __device__ __forceinline__ void decrease_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N> __device__ __forceinline__ void increase_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
#else
template <int N> __device__ __forceinline__ void decrease_registers() {
}
template <int N> __device__ __forceinline__ void increase_registers() {
}
#endif

// The descriptor of an operand in shared memory with the 128-byte swizzle: its address, panel_bytes from one panel of
// 64 columns to the next, 1024 bytes from 8 rows to the next 8. All in units of 16 bytes.
__device__ __forceinline__ uint64_t wgmma_operand(uint32_t address, int panel_bytes) {
    return ((uint64_t)1 << 62) | ((uint64_t)(1024 >> 4) << 32) | ((uint64_t)(panel_bytes >> 4) << 16) |
           ((address & 0x3ffff) >> 4);
}

#define COMMA ,
#define ACC_0_7 "%0, %1, %2, %3, %4, %5, %6, %7"
#define ACC_0_15 ACC_0_7 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define ACC_0_23 ACC_0_15 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define ACC_0_31 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define ACC_0_47 ACC_0_31 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define ACC_0_63 ACC_0_47 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define ACC_64_95 \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84" \
    ", %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define ACC_96_111 ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"
#define ACC_112_127 ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define REGS_8(x, i) \
    "+f"(x[i]), "+f"(x[i + 1]), "+f"(x[i + 2]), "+f"(x[i + 3]), "+f"(x[i + 4]), "+f"(x[i + 5]), "+f"(x[i + 6]), \
        "+f"(x[i + 7])
#define REGS_16(x) REGS_8(x, 0), REGS_8(x, 8)
#define REGS_24(x) REGS_16(x), REGS_8(x, 16)
#define REGS_32(x) REGS_24(x), REGS_8(x, 24)
#define REGS_48(x) REGS_32(x), REGS_8(x, 32), REGS_8(x, 40)
#define REGS_64(x) REGS_48(x), REGS_8(x, 48), REGS_8(x, 56)
#define REGS_96(x) REGS_64(x), REGS_8(x, 64), REGS_8(x, 72), REGS_8(x, 80), REGS_8(x, 88)
#define REGS_112(x) REGS_96(x), REGS_8(x, 96), REGS_8(x, 104)
#define REGS_128(x) REGS_112(x), REGS_8(x, 112), REGS_8(x, 120)

// x[64 rows x N] += w[64 x 16] in[N x 16]^T, both in shared memory, for one of these N
#define WGMMA_ROWS(n, acc, regs, a, b) \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" n "k16.f32.bf16.bf16 {" acc "}, " a ", " b ", 1, 1, 1, 0, 0;" \
                 : regs \
                 : "l"(w), "l"(in))
template <int N> __device__ __forceinline__ void wgmma_rows(float (&x)[N / 2], uint64_t w, uint64_t in) {
    static_assert(N == 8 || N == 16 || N == 32, "rows of activations");
    if constexpr (N == 8)
        WGMMA_ROWS("8", "%0, %1, %2, %3", "+f"(x[0])COMMA "+f"(x[1])COMMA "+f"(x[2])COMMA "+f"(x[3]), "%4", "%5");
    if constexpr (N == 16) WGMMA_ROWS("16", ACC_0_7, REGS_8(x, 0), "%8", "%9");
    if constexpr (N == 32) WGMMA_ROWS("32", ACC_0_15, REGS_8(x, 0) COMMA REGS_8(x, 8), "%16", "%17");
}

// The same with w in registers: each warp has 16 of the rows, in registers as mma's a.
#define WGMMA_HELD_ROWS(n, acc, regs, a0, a1, a2, a3, b) \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" n "k16.f32.bf16.bf16 {" acc "}, {" a0 "," a1 "," a2 "," a3 \
                 "}, " b ", 1, 1, 1, 0;" \
                 : regs \
                 : "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3]), "l"(in))
template <int N> __device__ __forceinline__ void wgmma_rows(float (&x)[N / 2], const uint32_t (&w)[4], uint64_t in) {
    static_assert(N == 16 || N == 32 || N == 64 || N == 128 || N == 256, "rows of activations");
    if constexpr (N == 16) WGMMA_HELD_ROWS("16", ACC_0_7, REGS_8(x, 0), "%8", "%9", "%10", "%11", "%12");
    if constexpr (N == 32)
        WGMMA_HELD_ROWS("32", ACC_0_15, REGS_8(x, 0) COMMA REGS_8(x, 8), "%16", "%17", "%18", "%19", "%20");
    if constexpr (N == 64) WGMMA_HELD_ROWS("64", ACC_0_31, REGS_32(x), "%32", "%33", "%34", "%35", "%36");
    if constexpr (N == 128) WGMMA_HELD_ROWS("128", ACC_0_63, REGS_64(x), "%64", "%65", "%66", "%67", "%68");
    if constexpr (N == 256)
        WGMMA_HELD_ROWS("256", ACC_0_63 ACC_64_95 ACC_96_111 ACC_112_127, REGS_128(x), "%128", "%129", "%130", "%131",
                        "%132");
}

// x[64 rows x N] (+)= a[64 x 16] b[N x 16]^T, both in shared memory, for one of these N
#define WGMMA_PRODUCT(type, n, acc, regs, a_, b_, accumulate_) \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " accumulate_ ", 0;\n" \
                 "wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type " {" acc "}, " a_ ", " b_ \
                 ", p, 1, 1, 0, 0;\n}" \
                 : regs \
                 : "l"(a), "l"(b), "r"(accumulate))
template <typename T, int N>
__device__ __forceinline__ void wgmma_product(float (&x)[N / 2], uint64_t a, uint64_t b, int accumulate) {
    constexpr bool B = std::is_same<T, bf16>::value;
    static_assert(N == 32 || N == 48 || N == 64 || N == 96 || N == 128 || N == 192 || N == 224 || N == 256, "columns");
    if constexpr (N == 32 && B) WGMMA_PRODUCT("bf16", "32", ACC_0_15, REGS_16(x), "%16", "%17", "%18");
    if constexpr (N == 32 && !B) WGMMA_PRODUCT("f16", "32", ACC_0_15, REGS_16(x), "%16", "%17", "%18");
    if constexpr (N == 48 && B) WGMMA_PRODUCT("bf16", "48", ACC_0_23, REGS_24(x), "%24", "%25", "%26");
    if constexpr (N == 48 && !B) WGMMA_PRODUCT("f16", "48", ACC_0_23, REGS_24(x), "%24", "%25", "%26");
    if constexpr (N == 64 && B) WGMMA_PRODUCT("bf16", "64", ACC_0_31, REGS_32(x), "%32", "%33", "%34");
    if constexpr (N == 64 && !B) WGMMA_PRODUCT("f16", "64", ACC_0_31, REGS_32(x), "%32", "%33", "%34");
    if constexpr (N == 96 && B) WGMMA_PRODUCT("bf16", "96", ACC_0_47, REGS_48(x), "%48", "%49", "%50");
    if constexpr (N == 96 && !B) WGMMA_PRODUCT("f16", "96", ACC_0_47, REGS_48(x), "%48", "%49", "%50");
    if constexpr (N == 128 && B) WGMMA_PRODUCT("bf16", "128", ACC_0_63, REGS_64(x), "%64", "%65", "%66");
    if constexpr (N == 128 && !B) WGMMA_PRODUCT("f16", "128", ACC_0_63, REGS_64(x), "%64", "%65", "%66");
    if constexpr (N == 192 && B) WGMMA_PRODUCT("bf16", "192", ACC_0_63 ACC_64_95, REGS_96(x), "%96", "%97", "%98");
    if constexpr (N == 192 && !B) WGMMA_PRODUCT("f16", "192", ACC_0_63 ACC_64_95, REGS_96(x), "%96", "%97", "%98");
    if constexpr (N == 224 && B)
        WGMMA_PRODUCT("bf16", "224", ACC_0_63 ACC_64_95 ACC_96_111, REGS_112(x), "%112", "%113", "%114");
    if constexpr (N == 224 && !B)
        WGMMA_PRODUCT("f16", "224", ACC_0_63 ACC_64_95 ACC_96_111, REGS_112(x), "%112", "%113", "%114");
    if constexpr (N == 256 && B)
        WGMMA_PRODUCT("bf16", "256", ACC_0_63 ACC_64_95 ACC_96_111 ACC_112_127, REGS_128(x), "%128", "%129", "%130");
    if constexpr (N == 256 && !B)
        WGMMA_PRODUCT("f16", "256", ACC_0_63 ACC_64_95 ACC_96_111 ACC_112_127, REGS_128(x), "%128", "%129", "%130");
}

// o[64 rows x D dims] += p[64 x 16] v[16 x D], p in registers, v in shared memory with its keys as rows
#define WGMMA_PV(type, n, acc, regs, a0, a1, a2, a3, b) \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type " {" acc "}, {" a0 "," a1 "," a2 \
                 "," a3 "}, " b ", 1, 1, 1, 1;" \
                 : regs \
                 : "r"(p[0]), "r"(p[1]), "r"(p[2]), "r"(p[3]), "l"(v))
template <typename T, int D>
__device__ __forceinline__ void wgmma_pv(float (&o)[D / 2], const uint32_t p[4], uint64_t v) {
    constexpr bool B = std::is_same<T, bf16>::value;
    if constexpr (D == 64 && B) WGMMA_PV("bf16", "64", ACC_0_31, REGS_32(o), "%32", "%33", "%34", "%35", "%36");
    if constexpr (D == 64 && !B) WGMMA_PV("f16", "64", ACC_0_31, REGS_32(o), "%32", "%33", "%34", "%35", "%36");
    if constexpr (D == 96 && B) WGMMA_PV("bf16", "96", ACC_0_47, REGS_48(o), "%48", "%49", "%50", "%51", "%52");
    if constexpr (D == 96 && !B) WGMMA_PV("f16", "96", ACC_0_47, REGS_48(o), "%48", "%49", "%50", "%51", "%52");
    if constexpr (D == 128 && B) WGMMA_PV("bf16", "128", ACC_0_63, REGS_64(o), "%64", "%65", "%66", "%67", "%68");
    if constexpr (D == 128 && !B) WGMMA_PV("f16", "128", ACC_0_63, REGS_64(o), "%64", "%65", "%66", "%67", "%68");
}
