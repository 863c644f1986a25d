// The K/V cache of one sequence: [layer][kv_head][position][head_dim], n_kv_heads only, so that one head's keys are one
// stream for the attention that reads them.
#ifndef KV_CACHE_H
#define KV_CACHE_H

#include <stddef.h>

typedef struct {
    int len;     // positions filled
    int max_len; // positions allocated
    void *k, *v; // the engine's memory and dtype
} KVCache;

// Element index of (layer, kv_head, position 0); each further position is head_dim elements on.
static inline size_t kv_index(int layer, int kv_head, int n_kv_heads, int max_len, int head_dim) {
    return ((size_t)layer * (size_t)n_kv_heads + (size_t)kv_head) * (size_t)max_len * (size_t)head_dim;
}

#endif
