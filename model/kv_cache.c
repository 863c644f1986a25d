#include "kv_cache.h"

#include <assert.h>
#include <stdlib.h>

// The lengths as they may be written.
static int *lengths(KVCache *kv) {
    return (int *)kv->len;
}

bool kv_init(KVCache *kv, int n_slots, int max_len, Error *err) {
    *kv = (KVCache){.n_slots = n_slots, .max_len = max_len, .len = calloc((size_t)n_slots, sizeof *kv->len)};
    return kv->len || fail(err, "out of memory: lengths of %d slots", n_slots);
}

void kv_free(KVCache *kv) {
    free(lengths(kv));
    *kv = (KVCache){0};
}

bool kv_check_room(const KVCache *kv, const Batch *b, Error *err) {
    for (int i = 0; i < b->n_seq; i++) {
        int more = b->start[i + 1] - b->start[i];
        if (more > kv_room(kv, b->slot[i]))
            return fail(err, "%d more tokens after %d, the context holds %d", more, kv->len[b->slot[i]], kv->max_len);
    }
    return true;
}

void kv_append(KVCache *kv, int slot, int n) {
    assert(n >= 0 && n <= kv_room(kv, slot));
    lengths(kv)[slot] += n;
}

void kv_append_batch(KVCache *kv, const Batch *b) {
    for (int i = 0; i < b->n_seq; i++) kv_append(kv, b->slot[i], b->start[i + 1] - b->start[i]);
}

void kv_truncate(KVCache *kv, int slot, int len) {
    assert(len >= 0 && len <= kv->len[slot]);
    lengths(kv)[slot] = len;
}

void kv_reset(KVCache *kv, int slot) {
    kv_truncate(kv, slot, 0);
}
