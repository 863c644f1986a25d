// Byte-pair encoding of one pre-token, tiktoken's way: of all adjacent pairs whose joined bytes are a token, merge the
// one of lowest rank, leftmost first, until there is none. A short pre-token is searched for that pair after every
// merge, a long one keeps its pairs in a heap. Pre-tokens that come again are found in a cache.
#include "bpe.h"

#include <stdlib.h>
#include <string.h>

#include "split.h"

enum { SHORT_PRE_TOKEN = 64 }; // up to here a search along the pre-token beats a heap

// ---- short pre-tokens: O(n²), all on the stack ----------------------------------------------------------------------

enum { NO_PAIR = INT32_MAX, LANES = 8 };

// What pair[] holds for part i and the next, joined to this id (of 24 bits); -1: they make no token.
static inline int pair_value(int id, uint32_t i) {
    return id < 0 ? NO_PAIR : id << 6 | (int)i;
}

// Part i begins at byte i. The least of pair[], which are rank << 6 | i, is the merge that is due: the lowest rank, and
// the leftmost of equals.
static bool merge_short(const Tokenizer *t, const uint8_t *pre_token, size_t n, TokenList *out, Error *err) {
    uint8_t padded[SHORT_PRE_TOKEN + 8] = {0}, next[SHORT_PRE_TOKEN + 1], prev[SHORT_PRE_TOKEN + 1];
    int id[SHORT_PRE_TOKEN], pair[SHORT_PRE_TOKEN];
    size_t lanes = (n + LANES - 1) / LANES * LANES; // whole vectors, for the compiler's sake
    memcpy(padded, pre_token, n);
    for (uint32_t i = 0; i < n; i++) {
        id[i] = t->byte_ids[pre_token[i]];
        next[i] = (uint8_t)(i + 1);
        prev[i + 1] = (uint8_t)i;
        pair[i] = i + 1 < n ? pair_value(t->pair_ids[pre_token[i]][pre_token[i + 1]], i) : NO_PAIR;
    }
    for (size_t i = n; i < lanes; i++) pair[i] = NO_PAIR;
    for (;;) {
        int least = NO_PAIR, lane[LANES];
        for (size_t k = 0; k < LANES; k++) lane[k] = pair[k];
        for (size_t i = LANES; i < lanes; i += LANES)
            for (size_t k = 0; k < LANES; k++) lane[k] = pair[i + k] < lane[k] ? pair[i + k] : lane[k];
        for (size_t k = 0; k < LANES; k++) least = lane[k] < least ? lane[k] : least;
        if (least == NO_PAIR) break;
        uint32_t begin = (uint32_t)least & 63, middle = next[begin], end = next[middle];
        id[begin] = least >> 6;
        next[begin] = (uint8_t)end;
        prev[end] = (uint8_t)begin;
        pair[middle] = NO_PAIR;
        pair[begin] = NO_PAIR;
        if (end < n) pair[begin] = pair_value(tokenizer_find_padded(t, padded + begin, next[end] - begin), begin);
        if (begin == 0) continue;
        uint32_t before = prev[begin];
        pair[before] = pair_value(tokenizer_find_padded(t, padded + before, end - before), before);
    }
    if (!tokens_reserve(out, n, err)) return false;
    for (size_t i = 0; i < n; i = next[i]) out->ids[out->n++] = id[i];
    return true;
}

// ---- long pre-tokens: O(n log n), 32 bytes of memory for each of the pre-token --------------------------------------

typedef struct {
    uint32_t prev, next; // where the neighbours begin; next of the last is n
    int id;              // -1: no part begins here any more
    int rank;            // of this part joined with the next; -1: no merge
} Part;

// A heap of rank << 32 | begin: the lowest rank, then the leftmost, first. Four children each: half the levels of two,
// and those of one parent lie together. A pair that has changed since it was pushed is known by its part's rank, and is
// passed over.
typedef struct {
    uint64_t *keys;
    size_t n;
} Heap;

static void heap_down(Heap *heap, size_t i) {
    uint64_t key = heap->keys[i];
    for (size_t child; (child = 4 * i + 1) < heap->n; i = child) {
        size_t end = child + 4 < heap->n ? child + 4 : heap->n;
        for (size_t other = child + 1; other < end; other++)
            if (heap->keys[other] < heap->keys[child]) child = other;
        if (heap->keys[child] >= key) break;
        heap->keys[i] = heap->keys[child];
    }
    heap->keys[i] = key;
}

static void heap_push(Heap *heap, uint64_t key) {
    size_t i = heap->n++;
    for (size_t parent; i > 0 && key < heap->keys[parent = (i - 1) / 4]; i = parent) heap->keys[i] = heap->keys[parent];
    heap->keys[i] = key;
}

static uint64_t heap_pop(Heap *heap) {
    uint64_t top = heap->keys[0];
    heap->keys[0] = heap->keys[--heap->n];
    if (heap->n) heap_down(heap, 0);
    return top;
}

// Looks up the pair that begins at begin, notes it in the part, and pushes it if it makes a token.
static void push_pair(const Tokenizer *t, const uint8_t *pre_token, size_t n, Part *parts, uint32_t begin, Heap *heap) {
    uint32_t middle = parts[begin].next;
    parts[begin].rank = middle == n ? -1 : tokenizer_find(t, pre_token + begin, parts[middle].next - begin);
    if (parts[begin].rank >= 0) heap_push(heap, (uint64_t)parts[begin].rank << 32 | begin);
}

static bool merge_long(const Tokenizer *t, const uint8_t *pre_token, size_t n, TokenList *out, Error *err) {
    if (n > UINT32_MAX - 1) return fail(err, "a pre-token of %zu bytes, expected at most %u", n, UINT32_MAX - 1);
    Part *parts = malloc(n * sizeof *parts);
    // n-1 pairs at first; every merge takes at least one out, and puts at most two in.
    Heap heap = {malloc(2 * n * sizeof *heap.keys), 0};
    bool ok = parts && heap.keys;
    if (!ok) fail(err, "out of memory: a pre-token of %zu bytes", n);
    for (uint32_t i = 0; ok && i < n; i++) {
        int rank = i + 1 < n ? t->pair_ids[pre_token[i]][pre_token[i + 1]] : -1;
        parts[i] = (Part){i - 1, i + 1, t->byte_ids[pre_token[i]], rank};
        if (rank >= 0) heap.keys[heap.n++] = (uint64_t)rank << 32 | i;
    }
    for (size_t i = ok ? heap.n / 4 + 1 : 0; i-- > 0;)
        if (i < heap.n) heap_down(&heap, i);
    while (ok && heap.n > 0) {
        uint64_t key = heap_pop(&heap);
        uint32_t begin = (uint32_t)key;
        if (parts[begin].id < 0 || parts[begin].rank != (int)(key >> 32)) continue;
        uint32_t middle = parts[begin].next, next = parts[middle].next;
        parts[begin].id = parts[begin].rank;
        parts[begin].next = next;
        parts[middle].id = -1;
        if (next < n) parts[next].prev = begin;
        push_pair(t, pre_token, n, parts, begin, &heap);
        if (begin > 0) push_pair(t, pre_token, n, parts, parts[begin].prev, &heap);
    }
    for (size_t i = 0; ok && i < n; i = parts[i].next) ok = tokens_append(out, parts[i].id, err);
    free(parts);
    free(heap.keys);
    return ok;
}

// Where no token spans a boundary, its two sides merge apart: of a long pre-token often little is left together.
static bool merge(const Tokenizer *t, const uint8_t *pre_token, size_t n, TokenList *out, Error *err) {
    for (size_t begin = 0, end; begin < n; begin = end) {
        for (end = n > SHORT_PRE_TOKEN ? begin + 1 : n; end < n && tokenizer_spans(t, pre_token, end, n);) end++;
        bool ok = end - begin == 1                 ? tokens_append(out, t->byte_ids[pre_token[begin]], err)
                  : end - begin <= SHORT_PRE_TOKEN ? merge_short(t, pre_token + begin, end - begin, out, err)
                                                   : merge_long(t, pre_token + begin, end - begin, out, err);
        if (!ok) return false;
    }
    return true;
}

bool bpe_encode(const Tokenizer *t, const uint8_t *pre_token, size_t n, TokenList *out, Error *err) {
    int whole = tokenizer_find(t, pre_token, n); // before any merging: some tokens no merge would reach
    return whole >= 0 ? tokens_append(out, whole, err) : merge(t, pre_token, n, out, err);
}

// ---- the cache ------------------------------------------------------------------------------------------------------

enum { MAX_CACHED_BYTES = 32, MAX_CACHED_IDS = 7, FEW_BYTES = 8 };

// A pre-token as the cache knows it: its bytes, with zeros after them.
typedef struct {
    uint64_t words[4]; // of up to 16 bytes only the first two are set and compared
    uint8_t n;         // bytes; 0: nothing
    bool segment;
} PreTokenKey;

// A line of the processor's cache (64 bytes). A later pre-token that belongs in the same entry replaces it.
struct CachedPreToken {
    uint64_t words[4];
    int ids[MAX_CACHED_IDS];
    uint8_t n, n_ids;
    bool segment;
};

bool pre_token_cache_init(PreTokenCache *c, const Tokenizer *t, size_t text_bytes, Error *err) {
    int bits = 4;
    while (bits < 16 && text_bytes >> (bits + 5)) bits++; // an entry for every 32 bytes of text, up to 4 MB
    *c = (PreTokenCache){.tokenizer = t, .shift = 64 - bits};
    c->entries = aligned_alloc(sizeof *c->entries, sizeof *c->entries << bits);
    if (!c->entries) return fail(err, "out of memory: a cache of %d pre-tokens", 1 << bits);
    memset(c->entries, 0, sizeof *c->entries << bits);
    return true;
}

void pre_token_cache_free(PreTokenCache *c) {
    free(c->entries);
    *c = (PreTokenCache){0};
}

// s[0..n), n <= MAX_CACHED_BYTES; readable: so many bytes from s on are memory of the text.
static inline void key_set(PreTokenKey *key, const uint8_t *s, size_t n, size_t readable, bool segment) {
    static const uint8_t masks[32] = // 16 bytes from masks + 16 - n on let n bytes through
        {255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255};
    key->n = (uint8_t)n;
    key->segment = segment;
    if (n <= 16 && readable >= 16) {
        uint64_t mask[2];
        memcpy(mask, masks + 16 - n, 16);
        memcpy(key->words, s, 16);
        key->words[0] &= mask[0];
        key->words[1] &= mask[1];
    } else {
        memset(key->words, 0, sizeof key->words);
        memcpy(key->words, s, n);
    }
}

static inline struct CachedPreToken *cache_entry(const PreTokenCache *c, const PreTokenKey *key) {
    uint64_t h = (key->words[0] + key->n) * 0x9E3779B97F4A7C15u ^ key->words[1] * 0xC2B2AE3D27D4EB4Fu;
    if (key->n > 16) h ^= key->words[2] * 0x165667B19E3779F9u ^ key->words[3] * 0xD6E8FEB86659FD93u;
    return &c->entries[(h ^ h >> 32) * 0x9E3779B97F4A7C15u >> c->shift];
}

static inline bool is_at(const struct CachedPreToken *entry, const PreTokenKey *key) {
    if (entry->n != key->n || entry->segment != key->segment) return false;
    if (((entry->words[0] ^ key->words[0]) | (entry->words[1] ^ key->words[1])) != 0) return false;
    return key->n <= 16 || (entry->words[2] == key->words[2] && entry->words[3] == key->words[3]);
}

// Room for MAX_CACHED_IDS must be there.
static inline void append_entry(const struct CachedPreToken *entry, TokenList *out) {
    memcpy(out->ids + out->n, entry->ids, sizeof entry->ids);
    out->n += entry->n_ids;
}

// Gives an entry to what was appended from out->ids[first] on.
static void keep(struct CachedPreToken *entry, const PreTokenKey *key, const TokenList *out, size_t first) {
    size_t n_ids = out->n - first;
    if (n_ids > MAX_CACHED_IDS) return;
    memcpy(entry->words, key->words, key->n <= 16 ? 16 : 32);
    memcpy(entry->ids, out->ids + first, n_ids * sizeof *out->ids);
    entry->n = key->n;
    entry->n_ids = (uint8_t)n_ids;
    entry->segment = key->segment;
}

// ---- a text ---------------------------------------------------------------------------------------------------------

// Part of a pre-token. It is merged even if it is a token: only a whole pre-token may be one that no merge reaches.
static bool encode_segment(PreTokenCache *c, const uint8_t *s, size_t n, size_t readable, TokenList *out, Error *err) {
    if (n > MAX_CACHED_BYTES) return merge(c->tokenizer, s, n, out, err);
    PreTokenKey key;
    key_set(&key, s, n, readable, true);
    struct CachedPreToken *entry = cache_entry(c, &key);
    if (!tokens_reserve(out, MAX_CACHED_IDS, err)) return false;
    if (is_at(entry, &key)) {
        append_entry(entry, out);
        return true;
    }
    size_t first = out->n;
    if (!merge(c->tokenizer, s, n, out, err)) return false;
    keep(entry, &key, out, first);
    return true;
}

// Ideographs and other scripts without spaces come in pre-tokens of many words, which seldom come again. Where no token
// spans the boundary from one character to the next, the two sides merge apart: such segments are short and do come
// again.
static bool encode_pre_token(PreTokenCache *c, const uint8_t *pre_token, size_t n, size_t readable, TokenList *out,
                             Error *err) {
    int whole =
        readable >= 8 ? tokenizer_find_padded(c->tokenizer, pre_token, n) : tokenizer_find(c->tokenizer, pre_token, n);
    if (whole >= 0) return tokens_append(out, whole, err);
    size_t begin = 0;
    for (size_t i = 1; n > FEW_BYTES && i < n; i++) {
        if (pre_token[i] < 0xE0 || tokenizer_spans(c->tokenizer, pre_token, i, n)) continue;
        if (!encode_segment(c, pre_token + begin, i - begin, readable - begin, out, err)) return false;
        begin = i;
    }
    return begin ? encode_segment(c, pre_token + begin, n - begin, readable - begin, out, err)
                 : merge(c->tokenizer, pre_token, n, out, err);
}

bool bpe_encode_text(PreTokenCache *c, const uint8_t *text, size_t n, TokenList *out, size_t *last_pre_token,
                     Error *err) {
    enum { AHEAD = 16 }; // pre-tokens whose entries are on their way from memory
    struct {
        size_t begin, n;
        struct CachedPreToken *entry; // NULL: too long for one
        PreTokenKey key;
    } pre_tokens[AHEAD];
    *last_pre_token = out->n;
    for (size_t at = 0; at < n;) {
        int n_pre_tokens = 0;
        for (; n_pre_tokens < AHEAD && at < n; n_pre_tokens++) {
            size_t length = split_next(text + at, n - at);
            pre_tokens[n_pre_tokens].begin = at;
            pre_tokens[n_pre_tokens].n = length;
            pre_tokens[n_pre_tokens].entry = NULL;
            if (length <= MAX_CACHED_BYTES) {
                key_set(&pre_tokens[n_pre_tokens].key, text + at, length, n - at, false);
                pre_tokens[n_pre_tokens].entry = cache_entry(c, &pre_tokens[n_pre_tokens].key);
                __builtin_prefetch(pre_tokens[n_pre_tokens].entry);
            }
            at += length;
        }
        if (!tokens_reserve(out, AHEAD * MAX_CACHED_IDS, err)) return false;
        for (int i = 0; i < n_pre_tokens; i++) {
            struct CachedPreToken *entry = pre_tokens[i].entry;
            size_t first = *last_pre_token = out->n, begin = pre_tokens[i].begin;
            if (entry && is_at(entry, &pre_tokens[i].key)) {
                append_entry(entry, out);
                continue;
            }
            if (!encode_pre_token(c, text + begin, pre_tokens[i].n, n - begin, out, err)) return false;
            if (entry) keep(entry, &pre_tokens[i].key, out, first);
            if (!tokens_reserve(out, AHEAD * MAX_CACHED_IDS, err)) return false;
        }
    }
    return true;
}
