// The K/V cache of several sequences, in pages of 64 positions: K and V are [layer][page][kv_head][64][head_dim] each
// (on the CPU [page][layer][..]), n_kv_heads only, so that one head's keys of a page are one stream for the attention
// that reads them. A slot is one sequence's place: how many positions it has filled, and which pages they are in. The
// engine allocates and writes keys and values; lengths and pages are given out here alone.
//
// A page that was computed for a prompt can be shared: slots whose sequences begin alike have it together, and nobody
// writes it. It stays, for sequences to come, after the last of them is gone, until its memory is needed.
#ifndef KV_CACHE_H
#define KV_CACHE_H

#include <stddef.h>
#include <stdint.h>

#include "../tokenizer/error.h"
#include "batch.h"

enum { KV_PAGE = 64 }; // positions

typedef struct {
    int n_slots; // sequences at most
    int max_len; // positions that each may have
    int n_pages; // of all together
    int table_width;
    // In host memory; const: kv_cache.c alone writes them.
    const int *len;   // [n_slots]: positions filled
    const int *held;  // [n_slots]: pages that a slot has, for at least len positions
    const int *table; // [n_slots][table_width]: the page of each 64 positions; beyond held any page's number, or 0
    struct KVPages *pages;
    void *k, *v;    // the engine's memory and dtype
    uint64_t bytes; // of both
} KVCache;

// Pages that so many positions are in.
static inline int kv_pages(int len) {
    return len / KV_PAGE + (len % KV_PAGE != 0);
}
// Elements of K, or of V, of a page of one layer.
static inline size_t kv_page_elements(int n_kv_heads, int head_dim) {
    return (size_t)n_kv_heads * KV_PAGE * (size_t)head_dim;
}

// n_slots empty sequences of at most max_len positions, and n_pages pages for all of them: never more than they can
// use, and as many where it is 0. k and v are the engine's to allocate. False: out of memory, or too many pages.
bool kv_init(KVCache *kv, int n_slots, int max_len, int64_t n_pages, Error *err);
// Frees lengths and tables. (The engine has freed k and v.)
void kv_free(KVCache *kv);

// Positions that a slot has left, if there are pages for them.
static inline int kv_room(const KVCache *kv, int slot) {
    return kv->max_len - kv->len[slot];
}
// Positions that a sequence can have which is alone.
static inline int kv_longest(const KVCache *kv) {
    return kv->n_pages < kv_pages(kv->max_len) ? kv->n_pages * KV_PAGE : kv->max_len;
}
// The slot's row of the table.
static inline const int *kv_slot_pages(const KVCache *kv, int slot) {
    return kv->table + (size_t)slot * (size_t)kv->table_width;
}
// Pages that kv_reserve could give now: those that nobody has, kept for sharing or not.
int kv_free_pages(const KVCache *kv);
// The slot has pages for len positions afterwards, 0 <= len <= max_len. False: too few are free, and nothing changed.
bool kv_reserve(KVCache *kv, int slot, int len);
// Pages for all rows of a batch and, where one is free, for the position after each that is decoded, so that an engine
// can compute the next step before it is asked for. Refuses, and changes nothing, where a slot has no room or too few
// pages are free.
bool kv_reserve_batch(KVCache *kv, const Batch *batch, Error *err);

// n more positions of a slot are filled, which it has pages for; n >= 0.
void kv_append(KVCache *kv, int slot, int n);
// The rows of a batch, all of them.
void kv_append_batch(KVCache *kv, const Batch *batch);
// A slot keeps its first len positions, 0 <= len <= kv->len[slot], and gives back the pages beyond. What comes after
// them will be written: len is not in the middle of a page that another slot has as well.
void kv_truncate(KVCache *kv, int slot, int len);
// A slot is empty and has no page.
void kv_reset(KVCache *kv, int slot);

// A slot is emptied, and takes the published pages of the longest beginning of ids [n] that there are any for: whole
// pages, and at most n - 1 positions, so that a token is left to compute. Returns the positions that it has now.
int kv_share(KVCache *kv, int slot, const int *ids, int n);
// The first n positions of a slot, 0 <= n <= kv->len[slot], were computed as a prompt's, of these ids: from now on
// kv_share can give their whole pages, also after the slot is reset, until other sequences need them; those not asked
// for the longest go first, later pages before earlier ones.
void kv_publish(KVCache *kv, int slot, const int *ids, int n);

// The entries of a slot's row of the table that changed since the last call for it: from *first on, their number is
// returned. For engines with a copy of the table.
int kv_take_changes(KVCache *kv, int slot, int *first);
// The same, and they stay changed.
int kv_changes(const KVCache *kv, int slot, int *first);
// A slot becomes what another process's cache of the same size has there: len positions in `held` pages, of which n
// from number `first` on have changed to these. Its pages are given out there;
// nothing else of this cache's bookkeeping holds.
void kv_follow(KVCache *kv, int slot, int len, int held, int first, int n, const int *pages);

#endif
