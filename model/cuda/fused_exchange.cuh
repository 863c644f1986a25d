// Engine fused: what the kernels of a step do where several GPUs share the model and reach each other's memory. All else
// is as on one GPU (fused.h): the same kernels, over a shard's rows; Params is FusedParams on one GPU, SharedParams here,
// and each function below has both forms.
//
// What ranks exchange lies in one region of memory on each of them, with the same layout everywhere (fused_shards.cu): so
// what is at address a here is at a + to_peer[r] on another rank. An epilogue warp stores a finished row to its own region
// and to all others (publish); whoever needs the rows of all reads its own.
//
//   in the region   type [shape]                  written by, everywhere     read by, its own       counter
//   x               f32 [n][dim]                  epilogue (out, down)       as on one GPU          done[product]
//   h               16-bit [n × terms][hidden]    epilogue (gate_up)         as on one GPU          done[product]
//   att             KV type [n][q_dim]            consumers before out       consumers (out)        done_attention
//   best            int2 [n][ranks × ...]         epilogue (lm_head)         argmax kernel          done[product]
//   done, done_attention                          whoever has written        whoever reads
//
// Logits go to rank 0 alone. QKV, attention and the cache need nobody: heads are a rank's own. Attention (attention.h)
// writes its output to the rank's own memory; the first blocks of the kernel after it copy that to all regions.
//
// ---- Edges --------------------------------------------------------------------------------------------------------
//
//   D  as fused.h's, at system scope: stores, BARRIER_FUSED_EPILOGUE (or _CONSUMERS), fence.acq_rel.sys and red.relaxed.sys
//      on the counter of every rank by one thread; the reader polls its own rank's counter with ld.acquire.sys until the
//      blocks of all ranks are there.
//
// Counters are never set back: a rank may be a product ahead of another, or a step, and what it had counted would be
// lost. A step waits for its number times the blocks that count in one; the number is in memory, as graphs replay
// constants, and the argmax kernel counts it on. Differences decide, so that 2^32 is no limit.
//
// Who may overwrite what another rank still reads: a block stores to x, h or att for the second time only when a counter
// of all ranks says that the readers of the first have gone on:
//
//   buffer   read by                    before that block counts in      which its writer waits for before it stores
//   att      consumers (out)            done[out]                        att of the next layer: after QKV, after done[down]
//   x        consumers (gate_up's norm) done[gate_up]                    down: it starts after done[gate_up]
//   x        consumers (QKV's norm)     done_attention, next layer       out: it starts after that
//   x        consumers (lm_head's norm) done[lm_head]                    the next step, after the argmax kernel
//   h        consumers (down)           done[down]                       gate_up of the next layer
//   best     argmax kernel              done_attention, next step        lm_head of the next step
//
// decode_embed_kernel writes a rank's own x: its argmax kernel before it waited for done[lm_head] of all ranks, after
// which nobody stores to x before that rank has sent its attention. Residuals are a rank's own rows of x (edges P and B).
//
// ---- Why it cannot deadlock ---------------------------------------------------------------------------------------
//
// As on one GPU, if every rank's kernels run by themselves: one launch on each rank for each step, in the same order;
// nothing between two launches of a step waits for another rank but these counters; and whatever a launch needs, code
// included, is loaded before the first (prepare_exchange), as a rank that loads may wait for all that runs. Ranks that
// share one GPU (tests) have its SMs divided among them, and no kernel starts before the one before it is complete: its
// blocks would hold SMs that another rank's kernel needs. A rank that waits for longer than wait_limit traps: so another
// one that has failed is no wait without end.
#pragma once

#include "fused.h"

namespace {

__device__ __forceinline__ void consumers_sync() {
    named_barrier_sync(BARRIER_FUSED_CONSUMERS, CONSUMER_THREADS);
}

// A rank's own columns of x and h.
__device__ __forceinline__ float *own_x(const FusedParams &s) {
    return s.x;
}
__device__ __forceinline__ float *own_x(const SharedParams &s) {
    return s.x + s.first_x;
}
__device__ __forceinline__ void *own_h(const FusedParams &s) {
    return s.h;
}
__device__ __forceinline__ void *own_h(const SharedParams &s) {
    return (uint16_t *)s.h + s.first_h;
}

// *to = value, `to` in the rank's own region: on all ranks.
template <typename T> __device__ __forceinline__ void publish(const FusedParams &, T *to, T value) {
    *to = value;
}
template <typename T> __device__ __forceinline__ void publish(const SharedParams &s, T *to, T value) {
    *to = value;
#pragma unroll 1
    for (int r = 0; r < s.n_peers; r++) *(T *)((char *)to + s.to_peer[r]) = value;
}

// Does anyone wait for product i of the kernel?
__device__ __forceinline__ bool is_waited_for(const FusedParams &s, int i) {
    return i + 1 < s.n_products;
}
__device__ __forceinline__ bool is_waited_for(const SharedParams &s, int i) {
    return s.product[i].kind != PRODUCT_QKV;
}

// One more block has done it: what the block's threads stored before they met is visible to who sees the count.
__device__ __forceinline__ void count_block(const FusedParams &, unsigned *done) {
    reduce_add_release(done, 1);
}
__device__ __forceinline__ void count_block(const SharedParams &s, unsigned *done) {
    fence_system();
    reduce_add_system(done, 1);
#pragma unroll 1
    for (int r = 0; r < s.n_peers; r++) reduce_add_system((unsigned *)((char *)done + s.to_peer[r]), 1);
}

// Steps before this one. May be read before the kernels before are complete, but for the step's first.
__device__ __forceinline__ unsigned step_of(const FusedParams &) {
    return 0;
}
__device__ __forceinline__ unsigned step_of(const SharedParams &s) {
    return *s.step;
}

// Until a counter has come as far as that. Gives up when it takes longer than the limit, in ns.
__device__ __forceinline__ void wait_for_count(const unsigned *count, unsigned until, unsigned long long limit) {
    unsigned long long since = 0;
    for (unsigned turn = 1; (int)(load_acquire_system(count) - until) < 0; turn++) {
        if (turn % 1024) continue;
        const unsigned long long now = nanoseconds();
        if (since == 0) since = now;
        if (now - since > limit) __trap();
    }
}

// Until `blocks` blocks, of every rank, have counted in a counter in each step so far and in this one.
__device__ __forceinline__ void wait_for_blocks(const FusedParams &, const unsigned *done, unsigned blocks, unsigned) {
    unsigned n;
    do n = load_acquire(done);
    while (n < blocks);
}
__device__ __forceinline__ void wait_for_blocks(const SharedParams &s, const unsigned *done, unsigned blocks,
                                                unsigned step) {
    wait_for_count(done, (step + 1) * blocks * (s.n_peers + 1), s.wait_limit);
}

__device__ __forceinline__ void let_next(const FusedParams &) {
    let_next_kernel_start();
}
__device__ __forceinline__ void let_next(const SharedParams &s) {
    if (!s.shares_gpu) let_next_kernel_start();
}

// The rank's part of attention's output, to all ranks; theirs to this one. By consumers, when attention is complete.
__device__ __forceinline__ void exchange_attention(const FusedParams &, unsigned) {
}
__device__ __forceinline__ void exchange_attention(const SharedParams &s, unsigned step) {
    const int n = s.attention_words, pieces = (n + CONSUMER_THREADS - 1) / CONSUMER_THREADS; // 16 bytes each
    for (int i = blockIdx.x; i < s.n_rows * pieces; i += s.attention_blocks) {
        if ((int)blockIdx.x >= s.attention_blocks) break;
        const int row = i / pieces, word = i % pieces * CONSUMER_THREADS + threadIdx.x;
        if (word < n)
            publish(s, (uint4 *)s.att + (size_t)row * s.attention_pitch + s.first_attention + word,
                    load_l2_16((const uint4 *)s.own_att + (size_t)row * n + word, true));
    }
    if ((int)blockIdx.x < s.attention_blocks) {
        consumers_sync();
        if (threadIdx.x == 0) count_block(s, s.done_attention);
    }
    if (threadIdx.x == 0) wait_for_blocks(s, s.done_attention, s.attention_blocks, step);
    consumers_sync();
}

} // namespace
