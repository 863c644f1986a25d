// Candidates from the sequence's own text (Saxena 2023: prompt lookup decoding). For each of a few lengths a hash table
// says where the last n-gram of that length ended before; the longest that is found counts.
#include <stdlib.h>
#include <string.h>

#include "speculate.h"

static const size_t lengths[CANDIDATE_KINDS] = {1, 2, 4, 8}; // of n-grams; kind k of candidates: those of lengths[k]

// Of n-grams of one length: an open hash table of the places where each ended last, that is the index of the token
// after it; 0: free. At most half of it is used.
typedef struct {
    int *ends;
    size_t size, used; // size: a power of two
} Ends;

typedef struct {
    Ends ends[CANDIDATE_KINDS];
    size_t indexed; // tokens of the text at whose ends n-grams are in the tables
} SlotIndex;

typedef struct {
    int n_slots;
    SlotIndex slots[];
} Lookup;

// Of the n tokens before `end`.
static size_t hash_ngram(const Proposal *p, size_t end, size_t n) {
    uint64_t h = 0;
    for (size_t i = end - n; i < end; i++) h = (h + (uint64_t)proposal_token(p, i) + 1) * 0x9E3779B97F4A7C15u;
    return (size_t)(h >> 32);
}

static bool same_ngram(const Proposal *p, size_t a, size_t b, size_t n) {
    for (size_t i = 1; i <= n; i++)
        if (proposal_token(p, a - i) != proposal_token(p, b - i)) return false;
    return true;
}

// Where the n-gram before `end` is in a table, or the free place where it would be.
static int *find_ngram(const Ends *e, const Proposal *p, size_t end, size_t n) {
    size_t at = hash_ngram(p, end, n) & (e->size - 1);
    while (e->ends[at] && !same_ngram(p, (size_t)e->ends[at], end, n)) at = (at + 1) & (e->size - 1);
    return &e->ends[at];
}

static bool grow(Ends *e, const Proposal *p, size_t n, Error *err) {
    enum { FIRST = 1024 };
    Ends larger = {.size = e->size ? 2 * e->size : FIRST, .used = e->used};
    larger.ends = calloc(larger.size, sizeof *larger.ends);
    if (!larger.ends) return fail(err, "out of memory: %zu places of tokens for --lookup", larger.size);
    for (size_t i = 0; i < e->size; i++)
        if (e->ends[i]) *find_ngram(&larger, p, (size_t)e->ends[i], n) = e->ends[i];
    free(e->ends);
    *e = larger;
    return true;
}

static bool insert_ngram(Ends *e, const Proposal *p, size_t end, size_t n, Error *err) {
    if (2 * (e->used + 1) > e->size && !grow(e, p, n, err)) return false;
    int *place = find_ngram(e, p, end, n);
    e->used += *place == 0;
    *place = (int)end;
    return true;
}

// The n-grams of the text that have a token after them.
static bool index_text(SlotIndex *s, const Proposal *p, Error *err) {
    for (; s->indexed + 1 < proposal_length(p); s->indexed++)
        for (int k = 0; k < CANDIDATE_KINDS; k++)
            if (lengths[k] <= s->indexed + 1 && !insert_ngram(&s->ends[k], p, s->indexed + 1, lengths[k], err))
                return false;
    return true;
}

// What followed: the text from `from` on, and where that ends the candidates themselves, as in a text that repeats.
static void follow(Proposal *p, size_t from) {
    size_t length = proposal_length(p);
    for (p->n = 0; p->n < p->most; p->n++) {
        size_t at = from + (size_t)p->n;
        p->candidates[p->n] = at < length ? proposal_token(p, at) : p->candidates[at - length];
    }
}

static void begin_lookup(void *context, int slot) {
    SlotIndex *s = &((Lookup *)context)->slots[slot];
    for (int k = 0; k < CANDIDATE_KINDS; k++) {
        if (s->ends[k].size) memset(s->ends[k].ends, 0, s->ends[k].size * sizeof *s->ends[k].ends);
        s->ends[k].used = 0;
    }
    s->indexed = 0;
}

static bool propose_lookup(void *context, Proposal *proposals, int n, Error *err) {
    for (int i = 0; i < n; i++) {
        Proposal *p = &proposals[i];
        SlotIndex *s = &((Lookup *)context)->slots[p->slot];
        size_t length = proposal_length(p);
        if (!index_text(s, p, err)) return false;
        p->n = 0;
        for (int k = CANDIDATE_KINDS - 1; k >= 0; k--) {
            if (lengths[k] >= length || s->ends[k].used == 0) continue;
            size_t end = (size_t)*find_ngram(&s->ends[k], p, length, lengths[k]);
            if (end == 0) continue;
            p->kind = k;
            follow(p, end);
            break;
        }
    }
    return true;
}

static void close_lookup(void *context) {
    Lookup *l = context;
    for (int i = 0; i < l->n_slots; i++)
        for (int k = 0; k < CANDIDATE_KINDS; k++) free(l->slots[i].ends[k].ends);
    free(l);
}

bool lookup_open(Speculation *s, const Model *m, int n_slots, Error *err) {
    Lookup *l = calloc(1, sizeof *l + (size_t)n_slots * sizeof l->slots[0]);
    if (!l) return fail(err, "out of memory: %d slots of --lookup", n_slots);
    l->n_slots = n_slots;
    const Proposer proposer = {.name = "lookup",
                               .prior = {0.15, 0.3, 0.55, 0.85},
                               .begin = begin_lookup,
                               .propose = propose_lookup,
                               .close = close_lookup,
                               .context = l};
    speculation_init(s, m, &proposer);
    return true;
}
