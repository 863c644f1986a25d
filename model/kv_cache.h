// The K/V cache of several sequences: [layer][slot][kv_head][position][head_dim], n_kv_heads only, so that one head's
// keys are one stream for the attention that reads them. A slot is one sequence's place.
#ifndef KV_CACHE_H
#define KV_CACHE_H

#include <stddef.h>
#include <stdint.h>

typedef struct {
    int n_slots;    // sequences at most
    int max_len;    // positions allocated for each
    int *len;       // [n_slots]: positions filled, in host memory
    void *k, *v;    // the engine's memory and dtype
    uint64_t bytes; // of both
} KVCache;

// Elements of K, or of V, of so many layers and slots; so also the index of (layer, slot 0) and, with one layer, of (0,
// slot).
static inline size_t kv_elements(int n_layers, int n_slots, int n_kv_heads, int max_len, int head_dim) {
    return (size_t)n_layers * (size_t)n_slots * (size_t)n_kv_heads * (size_t)max_len * (size_t)head_dim;
}

#endif
