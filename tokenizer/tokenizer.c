#include "tokenizer.h"

#include <stdlib.h>
#include <string.h>

// ---- the vocabulary -------------------------------------------------------------------------------------------------

static uint64_t hash_mix(uint64_t h) {
    h = (h ^ h >> 32) * 0x9E3779B97F4A7C15u;
    return h ^ h >> 29;
}

static uint64_t load64(const uint8_t *s) {
    uint64_t v;
    memcpy(&v, s, sizeof v);
    return v;
}

// Of a token longer than eight bytes: eight at a time, the last ones again if they fill no eight.
static uint64_t long_key(const uint8_t *s, size_t n) {
    uint64_t h = n;
    for (size_t i = 0; i + 8 < n; i += 8) h = hash_mix(h ^ load64(s + i));
    return hash_mix(h ^ load64(s + n - 8));
}

// Where the token of these bytes is, or the empty slot where it would be.
static inline TokenSlot *find_slot(const Tokenizer *t, const uint8_t *s, size_t n, uint64_t key) {
    for (uint32_t at = (uint32_t)hash_mix(key + n) & (t->n_slots - 1);; at = (at + 1) & (t->n_slots - 1)) {
        TokenSlot *slot = &t->slots[at];
        if (!slot->length) return slot;
        if (slot->key == key && slot->length == n && (n <= 8 || memcmp(t->bytes + t->offsets[slot->id], s, n) == 0))
            return slot;
    }
}

// An empty slot's id is -1.
int tokenizer_find_padded(const Tokenizer *t, const uint8_t *s, size_t n) {
    static const uint64_t masks[9] = {
        0, 0xFF, 0xFFFF, 0xFFFFFF, 0xFFFFFFFF, 0xFFFFFFFFFF, 0xFFFFFFFFFFFF, 0xFFFFFFFFFFFFFF, 0xFFFFFFFFFFFFFFFF};
    if (n > t->max_token_bytes) return -1;
    return find_slot(t, s, n, n <= 8 ? load64(s) & masks[n] : long_key(s, n))->id;
}

int tokenizer_find(const Tokenizer *t, const uint8_t *s, size_t n) {
    if (n >= 8) return tokenizer_find_padded(t, s, n);
    uint8_t padded[8] = {0};
    if (n) memcpy(padded, s, n);
    return n ? tokenizer_find_padded(t, padded, n) : -1;
}

int tokenizer_special(const Tokenizer *t, const char *text) {
    size_t n = strlen(text);
    for (int i = 0; i < t->n_special; i++)
        if (t->special[i].length == n && memcmp(t->bytes + t->offsets[t->special[i].id], text, n) == 0)
            return t->special[i].id;
    return -1;
}

static bool check_tables(Tokenizer *t, uint32_t n_bytes, Error *err) {
    if (t->vocab_size > 1 << 24) return fail(err, "tokenizer: %d ids, expected at most %d", t->vocab_size, 1 << 24);
    if (t->offsets[0] != 0) return fail(err, "tokenizer.offsets begins with %u, expected 0", t->offsets[0]);
    if (t->offsets[t->vocab_size] != n_bytes)
        return fail(err, "tokenizer.offsets ends with %u, tokenizer.bytes has %u bytes", t->offsets[t->vocab_size],
                    n_bytes);
    bool ended = false; // mergeable ids are ranks: they come first
    for (int id = 0; id < t->vocab_size; id++) {
        if (t->offsets[id] > t->offsets[id + 1] || t->offsets[id + 1] > n_bytes)
            return fail(err, "tokenizer.offsets: token %d runs from %u to %u of %u bytes", id, t->offsets[id],
                        t->offsets[id + 1], n_bytes);
        uint32_t length = t->offsets[id + 1] - t->offsets[id];
        if (t->kind[id] > TOKEN_ADDED)
            return fail(err, "tokenizer.kind of token %d is %d, expected 0 to 3", id, t->kind[id]);
        if (t->kind[id] != TOKEN_UNUSED && length == 0) return fail(err, "tokenizer: token %d is empty", id);
        if (t->kind[id] == TOKEN_SPECIAL) t->n_special++;
        if (t->kind[id] != TOKEN_MERGEABLE)
            ended = true;
        else if (ended)
            return fail(err, "tokenizer: mergeable token %d after one that is not; ids must be ranks", id);
        if ((t->kind[id] == TOKEN_MERGEABLE || t->kind[id] == TOKEN_ADDED) && length > t->max_token_bytes)
            t->max_token_bytes = length;
    }
    return true;
}

static int longest_first(const void *a, const void *b) {
    const SpecialToken *x = a, *y = b;
    if (x->length != y->length) return x->length < y->length ? 1 : -1;
    return (x->id > y->id) - (x->id < y->id);
}

// ---- special and added tokens ---------------------------------------------------------------------------------------

// The child of a node for this byte; 0: none.
static uint32_t find_child(const AddedNode *tree, uint32_t node, uint8_t byte) {
    uint32_t child = tree[node].child;
    while (child && tree[child].byte != byte) child = tree[child].sibling;
    return child;
}

// The token with this very text; -1: none.
static int find_whole(const AddedPass *pass, const char *text) {
    uint32_t node = 0;
    for (const char *c = text; *c && pass->tree; c++)
        if (!(node = find_child(pass->tree, node, (uint8_t)*c))) return -1;
    return pass->tree ? pass->tree[node].id : -1;
}

int tokenizer_added(const Tokenizer *t, const char *text) {
    int id = find_whole(&t->passes[0], text);
    return id >= 0 ? id : find_whole(&t->passes[1], text);
}

int tokenizer_match(const AddedPass *pass, const uint8_t *text, size_t n) {
    int found = -1;
    uint32_t node = 0;
    for (size_t at = 0; at < n && pass->tree && (node = find_child(pass->tree, node, text[at])); at++)
        if (pass->tree[node].id >= 0) found = pass->tree[node].id;
    return found;
}

static bool is_added(const Tokenizer *t, int id) {
    return t->kind[id] == TOKEN_SPECIAL || t->kind[id] == TOKEN_ADDED;
}

// Adds a token to a tree of *n nodes. Of two with one text the first one stays.
static void grow_tree(AddedPass *pass, uint32_t *n, const uint8_t *text, size_t length, int id) {
    AddedNode *tree = pass->tree;
    pass->begins[text[0]] = true;
    uint32_t node = 0;
    for (size_t at = 0; at < length; at++) {
        uint32_t next = find_child(tree, node, text[at]);
        if (!next) {
            next = (*n)++;
            tree[next] = (AddedNode){.sibling = tree[node].child, .id = -1, .byte = text[at]};
            tree[node].child = next;
        }
        node = next;
    }
    if (tree[node].id < 0) tree[node].id = id;
}

// The passes' trees. ids [n], ascending: the tokens of the second pass.
static bool build_passes(Tokenizer *t, const int *ids, int n, Error *err) {
    size_t most[ADDED_PASSES] = {0}, length;
    uint32_t n_nodes[ADDED_PASSES] = {1, 1};
    for (int p = 0; p < ADDED_PASSES; p++) {
        free(t->passes[p].tree);
        t->passes[p] = (AddedPass){0};
    }
    for (int measured = 0; measured < 2; measured++) {
        for (int id = 0, next = 0; id < t->vocab_size; id++) {
            if (!is_added(t, id)) continue;
            while (next < n && ids[next] < id) next++;
            int p = next < n && ids[next] == id;
            const uint8_t *text = tokenizer_bytes(t, id, &length);
            if (measured) {
                grow_tree(&t->passes[p], &n_nodes[p], text, length, id);
                t->passes[p].n_added += t->kind[id] == TOKEN_ADDED;
            } else {
                most[p] += length;
            }
        }
        for (int p = 0; p < ADDED_PASSES && !measured; p++) {
            if (!most[p]) continue;
            t->passes[p].tree = malloc((most[p] + 1) * sizeof *t->passes[p].tree);
            if (!t->passes[p].tree) return fail(err, "out of memory: the texts of special and added tokens");
            t->passes[p].tree[0] = (AddedNode){.id = -1};
        }
    }
    return true;
}

bool tokenizer_second_pass(Tokenizer *t, const int *ids, int n, Error *err) {
    for (int i = 0; i < n; i++) {
        if (ids[i] < 0 || ids[i] >= t->vocab_size || !is_added(t, ids[i]))
            return fail(err, "tokenizer: token %d is in the second pass, expected a special or added token", ids[i]);
        if (i > 0 && ids[i] <= ids[i - 1])
            return fail(err, "tokenizer: token %d after token %d in the second pass, expected ascending ids", ids[i],
                        ids[i - 1]);
    }
    return build_passes(t, ids, n, err);
}

// ---- boundaries that tokens span ------------------------------------------------------------------------------------

// Boundaries before an ideograph, or to another character of three or four bytes, have a part of the bitmap of their
// own: they are fewer, and asked for more often.
enum { IDEOGRAPH_BITS = 17, OTHER_BITS = 20, SPAN_BITS = (1 << IDEOGRAPH_BITS) + (1 << OTHER_BITS) };

// How many bytes on each side of a boundary distinguish it from others: two, and the three of an ideograph.
static size_t span_width(const uint8_t *after) {
    return *after >= 0xE0 ? 3 : 2;
}

// The bit in the bitmap of a boundary with n bytes on each side, 1 to 3.
static uint32_t span_bit(const uint8_t *after, size_t n) {
    uint64_t around = n;
    for (size_t i = 0; i < n; i++) around = around << 16 | (uint64_t)after[-1 - (ptrdiff_t)i] << 8 | after[i];
    around *= 0x9E3779B97F4A7C15u;
    return *after >= 0xE0 ? (uint32_t)(around >> (64 - IDEOGRAPH_BITS))
                          : (1u << IDEOGRAPH_BITS) + (uint32_t)(around >> (64 - OTHER_BITS));
}

// A token notes each of its boundaries with the bytes around it: as many on either side as it has on both,
// up to the width.
static void note_spans(Tokenizer *t, const uint8_t *s, size_t n) {
    for (size_t at = 1; at < n; at++) {
        size_t width = span_width(s + at), least = at < n - at ? at : n - at;
        uint32_t bit = span_bit(s + at, least < width ? least : width);
        t->spans[bit / 64] |= 1ull << bit % 64;
    }
}

bool tokenizer_spans(const Tokenizer *t, const uint8_t *text, size_t at, size_t n) {
    size_t width = span_width(text + at);
    for (size_t i = 1; i <= width && i <= at && i <= n - at; i++) {
        uint32_t bit = span_bit(text + at, i);
        if (t->spans[bit / 64] >> bit % 64 & 1) return true;
    }
    return false;
}

// ---- the index ------------------------------------------------------------------------------------------------------

static bool build_index(Tokenizer *t, Error *err) {
    t->n_slots = 1024;
    while (t->n_slots < 2 * (uint32_t)t->vocab_size) t->n_slots *= 2;
    t->slots = malloc(t->n_slots * sizeof *t->slots);
    t->pair_ids = malloc(256 * sizeof *t->pair_ids);
    t->spans = calloc(SPAN_BITS / 64, sizeof *t->spans);
    t->special = malloc(((size_t)t->n_special + 1) * sizeof *t->special);
    if (!t->slots || !t->pair_ids || !t->spans || !t->special)
        return fail(err, "out of memory: the index of %d tokens", t->vocab_size);
    for (uint32_t i = 0; i < t->n_slots; i++) t->slots[i] = (TokenSlot){0, 0, -1};
    memset(t->byte_ids, -1, sizeof t->byte_ids);
    memset(t->pair_ids, -1, 256 * sizeof *t->pair_ids);
    t->n_special = 0;
    for (int id = 0; id < t->vocab_size; id++) {
        size_t n;
        const uint8_t *s = tokenizer_bytes(t, id, &n);
        if (t->kind[id] == TOKEN_SPECIAL) t->special[t->n_special++] = (SpecialToken){id, (uint32_t)n};
        if (t->kind[id] != TOKEN_MERGEABLE) continue;
        uint64_t key = 0;
        if (n > 8)
            key = long_key(s, n);
        else
            memcpy(&key, s, n);
        TokenSlot *slot = find_slot(t, s, n, key);
        if (slot->length) return fail(err, "tokenizer: tokens %d and %d have the same bytes", slot->id, id);
        *slot = (TokenSlot){key, (uint32_t)n, id};
        if (n == 1) t->byte_ids[s[0]] = id;
        if (n == 2) t->pair_ids[s[0]][s[1]] = id;
        note_spans(t, s, n);
    }
    for (int b = 0; b < 256; b++)
        if (t->byte_ids[b] < 0) return fail(err, "tokenizer: no token for the single byte 0x%02X", b);
    qsort(t->special, (size_t)t->n_special, sizeof *t->special, longest_first);
    return build_passes(t, NULL, 0, err);
}

bool tokenizer_init(Tokenizer *t, int vocab_size, uint32_t *offsets, uint8_t *kind, uint8_t *bytes, uint32_t n_bytes,
                    Error *err) {
    *t = (Tokenizer){.vocab_size = vocab_size, .offsets = offsets, .kind = kind, .bytes = bytes};
    if (check_tables(t, n_bytes, err) && build_index(t, err)) return true;
    tokenizer_free(t);
    return false;
}

void tokenizer_free(Tokenizer *t) {
    free(t->offsets);
    free(t->kind);
    free(t->bytes);
    free(t->pair_ids);
    free(t->slots);
    free(t->spans);
    free(t->special);
    for (int p = 0; p < ADDED_PASSES; p++) free(t->passes[p].tree);
    *t = (Tokenizer){0};
}
