#include "tokenizer.h"

#include <stdlib.h>
#include <string.h>

#include "utf8.h"

// ---- lists ----------------------------------------------------------------------------------------------------------

bool tokens_append(TokenList *list, int id, Error *err) {
    if (list->n == list->capacity) {
        size_t capacity = list->capacity ? 2 * list->capacity : 256;
        int *ids = realloc(list->ids, capacity * sizeof *ids);
        if (!ids) return fail(err, "out of memory: %zu token ids", capacity);
        list->ids = ids;
        list->capacity = capacity;
    }
    list->ids[list->n++] = id;
    return true;
}

void tokens_free(TokenList *list) {
    free(list->ids);
    *list = (TokenList){0};
}

// ---- the vocabulary -------------------------------------------------------------------------------------------------

// FNV-1a over the bytes, with a last mix so that the low bits depend on all of them.
static uint32_t hash_bytes(const uint8_t *s, size_t n) {
    uint32_t h = 2166136261u;
    for (size_t i = 0; i < n; i++) h = (h ^ s[i]) * 16777619u;
    h ^= h >> 15;
    h *= 0x2C1B3C6Du;
    return h ^ h >> 12;
}

int tokenizer_find(const Tokenizer *t, const uint8_t *s, size_t n) {
    if (n > t->max_token_bytes) return -1;
    for (uint32_t slot = hash_bytes(s, n) & (t->n_slots - 1);; slot = (slot + 1) & (t->n_slots - 1)) {
        int id = t->slots[slot];
        if (id < 0) return -1;
        size_t length;
        const uint8_t *bytes = tokenizer_bytes(t, id, &length);
        if (length == n && memcmp(bytes, s, n) == 0) return id;
    }
}

int tokenizer_special(const Tokenizer *t, const char *text) {
    size_t n = strlen(text);
    for (int i = 0; i < t->n_special; i++)
        if (t->special[i].length == n && memcmp(t->bytes + t->offsets[t->special[i].id], text, n) == 0)
            return t->special[i].id;
    return -1;
}

static bool check_tables(Tokenizer *t, uint32_t n_bytes, Error *err) {
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
        if (t->kind[id] > TOKEN_UNUSED)
            return fail(err, "tokenizer.kind of token %d is %d, expected 0 to 2", id, t->kind[id]);
        if (t->kind[id] != TOKEN_UNUSED && length == 0) return fail(err, "tokenizer: token %d is empty", id);
        if (t->kind[id] == TOKEN_SPECIAL) t->n_special++;
        if (t->kind[id] != TOKEN_MERGEABLE)
            ended = true;
        else if (ended)
            return fail(err, "tokenizer: mergeable token %d after one that is not; ids must be ranks", id);
        else if (length > t->max_token_bytes)
            t->max_token_bytes = length;
    }
    return true;
}

static int longest_first(const void *a, const void *b) {
    const SpecialToken *x = a, *y = b;
    if (x->length != y->length) return x->length < y->length ? 1 : -1;
    return (x->id > y->id) - (x->id < y->id);
}

static bool build_index(Tokenizer *t, Error *err) {
    t->n_slots = 1024;
    while (t->n_slots < 2 * (uint32_t)t->vocab_size) t->n_slots *= 2;
    t->slots = malloc(t->n_slots * sizeof *t->slots);
    t->special = malloc(((size_t)t->n_special + 1) * sizeof *t->special);
    if (!t->slots || !t->special) return fail(err, "out of memory: the index of %d tokens", t->vocab_size);
    memset(t->slots, -1, t->n_slots * sizeof *t->slots);
    t->n_special = 0;
    for (int id = 0; id < t->vocab_size; id++) {
        size_t n;
        const uint8_t *s = tokenizer_bytes(t, id, &n);
        if (t->kind[id] == TOKEN_SPECIAL) t->special[t->n_special++] = (SpecialToken){id, (uint32_t)n};
        if (t->kind[id] != TOKEN_MERGEABLE) continue;
        int same = tokenizer_find(t, s, n);
        if (same >= 0) return fail(err, "tokenizer: tokens %d and %d have the same bytes", same, id);
        uint32_t slot = hash_bytes(s, n) & (t->n_slots - 1);
        while (t->slots[slot] >= 0) slot = (slot + 1) & (t->n_slots - 1);
        t->slots[slot] = id;
    }
    for (int b = 0; b < 256; b++) {
        uint8_t byte = (uint8_t)b;
        t->byte_ids[b] = tokenizer_find(t, &byte, 1);
        if (t->byte_ids[b] < 0) return fail(err, "tokenizer: no token for the single byte 0x%02X", b);
    }
    qsort(t->special, (size_t)t->n_special, sizeof *t->special, longest_first);
    return true;
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
    free(t->slots);
    free(t->special);
    *t = (Tokenizer){0};
}

// ---- encoding -------------------------------------------------------------------------------------------------------

static bool encode_valid(const Tokenizer *t, const uint8_t *text, size_t n, TokenList *out, size_t *last_piece,
                         Error *err) {
    *last_piece = out->n;
    while (n > 0) {
        *last_piece = out->n;
        size_t piece = split_next(text, n);
        if (!bpe_encode(t, text, piece, out, err)) return false;
        text += piece;
        n -= piece;
    }
    return true;
}

static bool only_space(const Tokenizer *t, int id) {
    size_t n;
    const uint8_t *s = tokenizer_bytes(t, id, &n);
    for (size_t i = 0; i < n; i++)
        if (s[i] != ' ' && s[i] != '\n' && s[i] != '\t') return false;
    return true;
}

// Text without special tokens. Bytes that are not UTF-8 as tiktoken's _encode_bytes treats them: the last piece of the
// valid prefix, and tokens of white space before it, may have belonged to what follows; they and the rest are one
// piece.
static bool encode_ordinary(const Tokenizer *t, const uint8_t *text, size_t n, TokenList *out, Error *err) {
    size_t valid = 0, first = out->n, last_piece;
    uint32_t cp;
    for (int length; valid < n && (length = utf8_decode(text + valid, n - valid, &cp)) > 0;) valid += (size_t)length;
    if (!encode_valid(t, text, valid, out, &last_piece, err)) return false;
    if (valid == n) return true;
    size_t keep = last_piece;
    if (keep < out->n && only_space(t, out->ids[keep]))
        while (keep > first && only_space(t, out->ids[keep - 1])) keep--;
    size_t bad_start = valid, length;
    for (size_t i = keep; i < out->n; i++) {
        tokenizer_bytes(t, out->ids[i], &length);
        bad_start -= length;
    }
    out->n = keep;
    return bpe_encode(t, text + bad_start, n - bad_start, out, err);
}

// The special token whose text begins text[0..n), the longest if several do; -1 if none.
static int match_special(const Tokenizer *t, const uint8_t *text, size_t n) {
    for (int i = 0; i < t->n_special; i++) {
        SpecialToken token = t->special[i];
        const uint8_t *s = t->bytes + t->offsets[token.id];
        if (token.length <= n && text[0] == s[0] && memcmp(text, s, token.length) == 0) return token.id;
    }
    return -1;
}

bool tokenizer_encode(const Tokenizer *t, const uint8_t *text, size_t n, bool special, TokenList *out, Error *err) {
    if (!special) return encode_ordinary(t, text, n, out, err);
    bool begins[256] = {false};
    for (int i = 0; i < t->n_special; i++) begins[t->bytes[t->offsets[t->special[i].id]]] = true;
    size_t start = 0; // of the ordinary text not yet encoded
    for (size_t at = 0; at < n;) {
        int id = begins[text[at]] ? match_special(t, text + at, n - at) : -1;
        if (id < 0) {
            at++;
            continue;
        }
        if (!encode_ordinary(t, text + start, at - start, out, err) || !tokens_append(out, id, err)) return false;
        size_t length;
        tokenizer_bytes(t, id, &length);
        start = at += length;
    }
    return encode_ordinary(t, text + start, n - start, out, err);
}
