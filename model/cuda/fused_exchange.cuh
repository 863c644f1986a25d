// Engine fused: what the kernels of a step do where several GPUs share the model and reach each other's memory. All
// else is as on one GPU (fused.h): the same kernels, over a shard's rows; Params is FusedParams on one GPU,
// SharedParams here, and what differs has both forms below.
//
// What ranks exchange lies in one region of memory on each of them, with the same layout everywhere (fused_shards.cu):
// so what is at address a here is at a + to_peer[r] on another rank. Whoever has finished a number stores it to its own
// region and to all others; whoever needs the numbers of all ranks reads its own.
//
//   in a set of the region   type [shape]                 stored by, everywhere      read by
//   x_out                    f32 [n][dim]                 epilogue (out)             consumers (gate_up's norm),
//                                                                                    epilogue (down)
//   h                        16-bit [n × terms][hidden]   epilogue (gate_up)         consumers (down)
//   x_down                   f32 [n][dim]                 epilogue (down)            consumers (QKV's, lm_head's norm)
//   att                      KV type [n][q_dim]           consumers, before out      consumers (out)
//
//   outside of the sets: best (epilogue of lm_head; argmax kernel), finished, step
//
// QKV, attention and the cache need nobody: heads are a rank's own. So are x, to whose own columns out adds what
// attention brought (down adds to what out left, and stores it in x, too), and what attention (attention.h) leaves in
// att; the first blocks of the kernel after it send that to all. Logits go to rank 0.
//
// Up to two rows numbers go to the other ranks one by one, as tiles are finished. With more of them the many small
// stores would take longer than the product: then the consumers send whole rows when all of this rank's blocks have
// counted.
//
// ---- How a number says that it is there -----------------------------------------------------------------------------
//
// A counter behind the data would cost a round trip: the fence before it waits until all stores have arrived. So the
// data speaks for itself: memory that waits for a number holds ABSENT, all bits one, a NaN that no arithmetic gives
// (results of instructions have 0x7fff.. for NaN; of attention's output, which may have copied one, send_attention
// makes sure). A reader loads until no word, or no half of one, is ABSENT. So `done`, in which a rank's own blocks
// count as on one GPU, orders nothing here: it says when it is worth looking. All of these loads and stores are
// relaxed, at system scope, or stores that are followed by such loads until they are seen.
//
// There are two sets, and a kernel clears the other one than it uses (clear_other_set). Let K be the kernel in which a
// rank R clears set s, K - 1 the one before it that used s, K + 1 the next that does.
//
//   - R's readers of s are done: kernel K - 1 is complete on R before K writes anything (edge K).
//   - All that was sent to s in K - 1 has arrived: somebody on R had to read all of it.
//   - Nobody sends to s before it is clear. A peer sends the first of K + 1, att, when its own K is complete, so after
//     it has seen x_down of all of R's columns. R's blocks store x_down when they have seen done[gate_up] of all of R's
//     blocks, each of which had cleared its part before it counted (fence.acq_rel.gpu by who cleared,
//     BARRIER_FUSED_EPILOGUE, red). What is visible to all of a GPU is in its L2, where other GPUs' stores arrive. At
//     the end of a step `finished` says the same.
//
// A block that has no tile of a product may still be reading the product's input when others are a product further;
// what it reads is used by nobody, and stays what it is until the kernel is complete, on all ranks.
//
// best: the argmax kernel waits for `finished`, a counter that is never set back, as a rank may be a step ahead of
// another: a step waits for its number times the blocks of all ranks. fence.acq_rel.sys and red.relaxed.sys by one
// thread of the epilogue warps after they have met; ld.acquire.sys by the reader. It is stored to again when every rank
// has sent attention's output in the next step, so after that kernel. Which set a kernel has depends on the step's
// number, too, if a step has an odd number of them: it is read from memory, since graphs replay constants.
//
// ---- Why it cannot deadlock ---------------------------------------------------------------------------------------
//
// As on one GPU, if every rank's kernels run by themselves: one launch on each rank for each step, in the same order;
// nothing between two launches of a step waits for another rank but what is here; and whatever a launch needs, code
// included, is loaded before the first (open_exchange, load_step_kernels), as a rank that loads may wait for all that
// runs. Ranks that share one GPU (tests) have its SMs divided among them, and no kernel starts before the one before it
// is complete: its blocks would hold SMs that another rank's kernel needs. A rank that waits for longer than wait_limit
// traps: so another one that has failed is no wait without end.
//
// ---- What was measured (two H200, 8B bf16, context 1 to 300) --------------------------------------------------------
//
//   counters of all blocks at system scope, behind the data: 2.25 ms a token, 3.62 on one GPU; int4 1.80 and 2.05
//   data that says that it is there: 2.15; int4 1.71. What a product's input takes longer than on one GPU: out 1.6 us,
//   down 1.2, the others 0.3; the rest are the waits of one GPU, which do not get shorter
//   counters that order nothing, memory cleared by the epilogue warps: 2.07; int4 1.69
//   8 rows, numbers one by one: 4.5 ms a step, 4.6 on one GPU; whole rows 3.7: 6 to 10 us an input more than on one
//   GPU, while all of it is asked for again and again. Weak stores in place of relaxed ones: the same
#pragma once

#include "fused.h"

namespace {

__device__ __forceinline__ void consumers_sync() {
    named_barrier_sync(BARRIER_FUSED_CONSUMERS, CONSUMER_THREADS);
}

// For loops that wait for another GPU: gives up after the limit, in ns.
struct Patience {
    unsigned long long limit, since = 0;
    unsigned turns = 0;
    __device__ __forceinline__ Patience(unsigned long long limit) : limit(limit) {
    }
    __device__ __forceinline__ void turn() {
        if (++turns % 1024) return;
        const unsigned long long now = nanoseconds();
        if (since == 0) since = now;
        if (now - since > limit) __trap();
    }
};

// ---- the region -----------------------------------------------------------------------------------------------------

// Which set a kernel has: where it begins.
typedef unsigned Turn;

// The step's number may be read before the kernels before are complete, but by the first kernel of a step.
__device__ __forceinline__ Turn turn_of(const FusedParams &) {
    return 0;
}
__device__ __forceinline__ Turn turn_of(const SharedParams &s) {
    return (load_relaxed(s.step) * s.n_layers + s.number) % 2 * s.set_bytes;
}

constexpr uint32_t ABSENT = ~0u;

__device__ __forceinline__ bool has_absent_half(uint32_t v) { // is a half of ~v zero?
    return ((~v - 0x00010001u) & v & 0x80008000u) != 0;
}
// T: what the words are, 4 bytes or 2.
template <typename T> __device__ __forceinline__ bool has_absent(uint4 v) {
    if constexpr (sizeof(T) == 4)
        return v.x == ABSENT || v.y == ABSENT || v.z == ABSENT || v.w == ABSENT;
    else
        return has_absent_half(v.x) || has_absent_half(v.y) || has_absent_half(v.z) || has_absent_half(v.w);
}
// The same NaN, but for one that is ABSENT.
template <typename T> __device__ __forceinline__ uint32_t never_absent(uint32_t v) {
    if constexpr (sizeof(T) == 4)
        return v == ABSENT ? 0x7fffffffu : v;
    else
        return v ^ (__vcmpeq2(v, ABSENT) & 0x80008000u);
}

// *to = value, `to` in the rank's own region: on the other ranks, on all.
template <typename T> __device__ __forceinline__ void store_at_peers(const SharedParams &s, T *to, T value) {
#pragma unroll 1
    for (int r = 0; r < s.n_peers; r++) store_system((T *)((char *)to + s.to_peer[r]), value);
}
template <typename T> __device__ __forceinline__ void store_everywhere(const SharedParams &s, T *to, T value) {
    store_system(to, value);
    store_at_peers(s, to, value);
}

// Best, of h: on all ranks, or on this one until send_product.
template <typename T> __device__ __forceinline__ void publish(const FusedParams &, T *to, T value) {
    *to = value;
}
template <typename T> __device__ __forceinline__ void publish(const SharedParams &s, T *to, T value) {
    if (s.sends_products && sizeof(T) == 2)
        *to = value;
    else
        store_everywhere(s, to, value);
}

// ---- what is stored -------------------------------------------------------------------------------------------------

// This rank's own columns of x; and of h, of which all ranks have all.
__device__ __forceinline__ float *own_x(const FusedParams &s) {
    return s.x;
}
__device__ __forceinline__ float *own_x(const SharedParams &s) {
    return s.x + s.first_x;
}
__device__ __forceinline__ void *own_h(const FusedParams &s, Turn) {
    return s.h;
}
__device__ __forceinline__ void *own_h(const SharedParams &s, Turn turn) {
    return (uint16_t *)(s.sets + turn + s.h_all) + s.first_h;
}

// Where an element of x, or of down_partial, goes: there, and to its place in the region, so many bytes from it
// (0: not). What out leaves is read in this kernel alone, in the region.
struct XPlace {
    ptrdiff_t region;
    bool there;
};
__device__ __forceinline__ XPlace x_place(const FusedParams &, const Product &, Turn) {
    return {0, true};
}
__device__ __forceinline__ XPlace x_place(const SharedParams &s, const Product &f, Turn turn) {
    if (f.leaves_partial) return {0, true};
    return {s.sets + turn + (f.kind == PRODUCT_OUT ? 0 : s.x_down) - (char *)s.x, f.kind == PRODUCT_DOWN};
}
// What down adds to, of the element of x that it writes.
__device__ __forceinline__ float after_out(const FusedParams &, Turn, const float *x) {
    return load_l2(x);
}
__device__ __forceinline__ float after_out(const SharedParams &s, Turn turn, const float *x) {
    return load_system((const float *)((const char *)x + (s.sets + turn - (char *)s.x)));
}
__device__ __forceinline__ void store_x(const FusedParams &, XPlace, float *to, float value) {
    *to = value;
}
__device__ __forceinline__ void store_x(const SharedParams &s, XPlace place, float *to, float value) {
    if (place.there) *to = value;
    float *all = (float *)((char *)to + place.region);
    if (place.region && s.sends_products)
        *all = value;
    else if (place.region)
        store_everywhere(s, all, value);
}

// One more block has finished a product. (What it left says for itself that it is there.)
__device__ __forceinline__ void count_product(const FusedParams &, unsigned *done) {
    reduce_add_release(done, 1);
}
__device__ __forceinline__ void count_product(const SharedParams &, unsigned *done) {
    reduce_add_relaxed(done, 1);
}
__device__ __forceinline__ unsigned blocks_done(const FusedParams &, const unsigned *done) {
    return load_acquire(done);
}
__device__ __forceinline__ unsigned blocks_done(const SharedParams &, const unsigned *done) {
    return load_relaxed(done);
}

// One more block has come to the end of a step: what its epilogue warps stored before they met is visible to who sees
// it.
__device__ __forceinline__ void count_block(const FusedParams &) {
}
__device__ __forceinline__ void count_block(const SharedParams &s) {
    fence_system();
    reduce_add_system(s.finished, 1);
    for (int r = 0; r < s.n_peers; r++) reduce_add_system((unsigned *)((char *)s.finished + s.to_peer[r]), 1);
}

__device__ __forceinline__ void let_next(const FusedParams &) {
    let_next_kernel_start();
}
__device__ __forceinline__ void let_next(const SharedParams &s) {
    if (!s.shares_gpu) let_next_kernel_start();
}

// The other set is for the next kernel. By the epilogue warps, which have nothing to do yet. The fence is here, where
// nobody waits for it: the block counts later.
__device__ __forceinline__ void clear_other_set(const FusedParams &, Turn) {
}
__device__ __forceinline__ void clear_other_set(const SharedParams &s, Turn turn) {
    constexpr unsigned THREADS = 32 * EPILOGUE_WARPS;
    uint4 *set = (uint4 *)(s.sets + (s.set_bytes - turn));
    if (s.number == 0) return; // it has none
    for (unsigned i = blockIdx.x * THREADS + threadIdx.x % THREADS; i < s.set_bytes / 16; i += gridDim.x * THREADS)
        store_system(set + i, make_uint4(ABSENT, ABSENT, ABSENT, ABSENT));
    __threadfence();
}

// Attention is complete: this rank's part of its output, to all ranks. By the consumers of the first blocks.
template <typename KV> __device__ __forceinline__ void send_attention(const FusedParams &, Turn) {
}
template <typename KV> __device__ __forceinline__ void send_attention(const SharedParams &s, Turn turn) {
    const int n = s.attention_words, pieces = (n + CONSUMER_THREADS - 1) / CONSUMER_THREADS; // 16 bytes each
    uint4 *to = (uint4 *)(s.sets + turn + s.att_all) + s.first_attention;
    for (int i = blockIdx.x; i < s.n_rows * pieces; i += gridDim.x) {
        const int row = i / pieces, word = i % pieces * CONSUMER_THREADS + threadIdx.x;
        if (word >= n) continue;
        uint4 v = load_l2_16((const uint4 *)s.att + (size_t)row * n + word, true);
        v.x = never_absent<KV>(v.x), v.y = never_absent<KV>(v.y), v.z = never_absent<KV>(v.z),
        v.w = never_absent<KV>(v.w);
        store_everywhere(s, to + (size_t)row * s.attention_pitch + word, v);
    }
}

// `words` × 16 bytes of each of n rows, from own [n][pitch] on, which are in this rank's region, to the others.
template <typename T>
__device__ __forceinline__ void send_rows(const SharedParams &s, uint4 *own, int words, int pitch, int n) {
    const int pieces = (words + CONSUMER_THREADS - 1) / CONSUMER_THREADS;
    Patience patience(s.wait_limit);
    for (int i = blockIdx.x; i < n * pieces; i += gridDim.x) {
        const int word = i % pieces * CONSUMER_THREADS + threadIdx.x;
        uint4 *at = own + (size_t)(i / pieces) * pitch + word, v;
        if (word >= words) continue;
        while (has_absent<T>(v = load_system16(at, true))) patience.turn(); // counted, but not there yet
        store_at_peers(s, at, v);
    }
}

// What enters product f and the product before left in this rank's region, to the others; by the consumers, when that
// one is done.
template <typename N> __device__ __forceinline__ void send_product(const FusedParams &, const Product &, Turn) {
}
template <typename N> __device__ __forceinline__ void send_product(const SharedParams &s, const Product &f, Turn turn) {
    if (!s.sends_products) return;
    char *set = s.sets + turn;
    if (f.kind == PRODUCT_DOWN)
        send_rows<uint16_t>(s, (uint4 *)(set + s.h_all + s.first_h * 2), s.own_h / 8, s.hidden_dim / 8,
                            s.n_rows * N::TERMS);
    else
        send_rows<float>(s, (uint4 *)(set + (f.kind == PRODUCT_GATE_UP ? 0 : s.x_down) + s.first_x * 4), s.own_x / 4,
                         s.dim / 4, s.n_rows);
}

// ---- what is read ---------------------------------------------------------------------------------------------------

// Activations in global memory. load_until_there(body) calls body(load), load(i, valid): 16 bytes at i × 16, zeros
// where that is not valid.
struct OwnInput {
    const uint4 *from;
    template <class Body> __device__ __forceinline__ void load_until_there(Body body) const {
        body([this](size_t i, bool valid) { return load_l2_16(from + i, valid); });
    }
};
// The same of all ranks, of type T: until none is absent. complete: no other rank has any of it.
template <typename T> struct GatheredInput {
    const uint4 *from;
    bool complete;
    const uint4 *probe; // what comes late, or NULL: to look at this until it is there loads less
    unsigned long long wait_limit;
    template <class Body> __device__ __forceinline__ void load_until_there(Body body) const {
        Patience patience(wait_limit);
        while (probe && has_absent<T>(load_system16(probe, true))) patience.turn();
        for (;;) {
            bool absent = false;
            body([&](size_t i, bool valid) {
                uint4 v = load_system16(from + i, valid);
                absent = absent || has_absent<T>(v);
                return v;
            });
            if (complete || !absent) return;
            patience.turn();
        }
    }
};

// The first of a neighbour's columns in the last row, where products are sent whole: from [n][pitch], of which `end` is
// where this rank's columns end; all in 16 bytes.
__device__ __forceinline__ const uint4 *probe_of(const SharedParams &s, const uint4 *from, int n, int pitch, int end) {
    return s.sends_products ? from + (size_t)(n - 1) * pitch + (end < pitch ? end : 0) : NULL;
}

// Of a product with a norm.
__device__ __forceinline__ OwnInput input_x(const FusedParams &s, const Product &, Turn) {
    return {(const uint4 *)s.x};
}
__device__ __forceinline__ GatheredInput<float> input_x(const SharedParams &s, const Product &f, Turn turn) {
    if (s.number == 0) return {(const uint4 *)s.x, true, NULL, 0}; // the embedding
    const uint4 *from = (const uint4 *)(s.sets + turn + (f.kind == PRODUCT_GATE_UP ? 0 : s.x_down));
    return {from, false, probe_of(s, from, s.n_rows, s.dim / 4, (s.first_x + s.own_x) / 4), s.wait_limit};
}
// Of out.
template <typename KV> __device__ __forceinline__ OwnInput input_attention(const FusedParams &s, Turn) {
    return {(const uint4 *)s.att};
}
template <typename KV> __device__ __forceinline__ GatheredInput<KV> input_attention(const SharedParams &s, Turn turn) {
    return {(const uint4 *)(s.sets + turn + s.att_all), false, NULL, s.wait_limit};
}
// Of down, or of a part of it: n activation rows.
__device__ __forceinline__ GatheredInput<uint16_t> input_h(const SharedParams &s, const Product &f, int n, Turn turn) {
    const uint4 *from = (const uint4 *)(s.sets + turn + s.h_all);
    return {from + f.first_col / 8, false, probe_of(s, from, n, f.row_length / 8, (s.first_h + s.own_h) / 8),
            s.wait_limit};
}

} // namespace
