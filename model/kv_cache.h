// The K/V cache of several sequences: [layer][slot][kv_head][position][head_dim], n_kv_heads only, so that one head's
// keys are one stream for the attention that reads them. A slot is one sequence's place. The engine allocates and
// writes keys and values; how many positions count as filled is written here alone.
#ifndef KV_CACHE_H
#define KV_CACHE_H

#include <stddef.h>
#include <stdint.h>

#include "../tokenizer/error.h"
#include "batch.h"

typedef struct {
    int n_slots;    // sequences at most
    int max_len;    // positions allocated for each
    const int *len; // [n_slots]: positions filled, in host memory; const: kv_cache.c alone writes it
    void *k, *v;    // the engine's memory and dtype
    uint64_t bytes; // of both
} KVCache;

// n_slots empty sequences of max_len positions; k and v are the engine's to allocate. False: out of memory.
bool kv_init(KVCache *kv, int n_slots, int max_len, Error *err);
// Frees the lengths. (The engine has freed k and v.)
void kv_free(KVCache *kv);
// Positions that a slot has left.
static inline int kv_room(const KVCache *kv, int slot) {
    return kv->max_len - kv->len[slot];
}
// Refuses a batch that its slots have no room for.
bool kv_check_room(const KVCache *kv, const Batch *batch, Error *err);
// n more positions of a slot are filled, 0 <= n <= kv_room.
void kv_append(KVCache *kv, int slot, int n);
// The rows of a batch, all of them.
void kv_append_batch(KVCache *kv, const Batch *batch);
// A slot keeps its first len positions, 0 <= len <= kv->len[slot].
void kv_truncate(KVCache *kv, int slot, int len);
// A slot is empty.
void kv_reset(KVCache *kv, int slot);

// Elements of K, or of V, of so many layers and slots; so also the index of (layer, slot 0) and, with one layer, of (0,
// slot).
static inline size_t kv_elements(int n_layers, int n_slots, int n_kv_heads, int max_len, int head_dim) {
    return (size_t)n_layers * (size_t)n_slots * (size_t)n_kv_heads * (size_t)max_len * (size_t)head_dim;
}

#endif
