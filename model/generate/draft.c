// Candidates from a smaller model of the same vocabulary: its greedy continuation. It has its own weights and its own
// cache of as many sequences, which keeps what it has of each text that was accepted.
#include <stdlib.h>
#include <string.h>

#include "../file/checkpoint.h"
#include "speculate.h"

// A text that a slot of the draft's cache has.
typedef struct {
    TokenList cached; // its tokens, with candidates at the end
    size_t accepted;  // of these so many are known to be the text's
} SlotText;

typedef struct {
    Model model;
    const Model *verifier;
    int n_slots;
    SlotText slots[];
} Draft;

// The first difference of two vocabularies ends the run.
static bool check_vocabulary(const Tokenizer *a, const Tokenizer *b, const char *path, Error *err) {
    if (a->vocab_size != b->vocab_size)
        return fail(err, "--draft %s: its vocabulary has %d tokens, expected %d as the model's", path, b->vocab_size,
                    a->vocab_size);
    for (int id = 0; id < a->vocab_size; id++) {
        size_t n, m;
        const uint8_t *x = tokenizer_bytes(a, id, &n), *y = tokenizer_bytes(b, id, &m);
        if (n != m || memcmp(x, y, n) != 0)
            return fail(err, "--draft %s: its token %d is \"%.*s\", expected \"%.*s\" as in the model", path, id,
                        (int)(m < 64 ? m : 64), (const char *)y, (int)(n < 64 ? n : 64), (const char *)x);
        if (a->kind[id] != b->kind[id])
            return fail(err, "--draft %s: its token %d is of kind %d, expected %d as in the model", path, id,
                        b->kind[id], a->kind[id]);
    }
    return true;
}

static void begin_draft(void *context, int slot) {
    ((Draft *)context)->slots[slot].accepted = 0; // what it has may be the beginning of the new text
}

// Gives back what the cache has beyond the text, and counts what it has of it, all but the last token at most.
static size_t keep_common(Draft *d, const Proposal *p) {
    SlotText *s = &d->slots[p->slot];
    size_t most = proposal_length(p) - 1, n = s->accepted;
    if (s->cached.n < most) most = s->cached.n;
    if ((size_t)d->model.kv.len[p->slot] < most) most = (size_t)d->model.kv.len[p->slot];
    if (n > most) n = most;
    while (n < most && s->cached.ids[n] == proposal_token(p, n)) n++;
    s->cached.n = s->accepted = n;
    kv_truncate(&d->model.kv, p->slot, (int)n);
    return n;
}

// A text that is in no step gives back what its slot has.
static void empty_others(Draft *d, const Proposal *proposals, int n) {
    for (int slot = 0; slot < d->n_slots; slot++) {
        bool other = true;
        for (int i = 0; i < n; i++) other = other && proposals[i].slot != slot;
        if (!other) continue;
        kv_reset(&d->model.kv, slot);
        d->slots[slot].cached.n = 0;
    }
}

// Pages for the text and the candidates that it computes, one less than it gives; where too few are free, for fewer
// candidates, or none.
static void reserve_pages(Draft *d, Proposal *proposals, int n, int i) {
    Proposal *p = &proposals[i];
    int length = (int)proposal_length(p) - 1;
    if (kv_reserve(&d->model.kv, p->slot, length + p->most)) return;
    empty_others(d, proposals, n);
    while (p->most > 0 && !kv_reserve(&d->model.kv, p->slot, length + p->most)) p->most--;
}

// One batch of the draft: the text that it has not seen, or its own last candidate.
typedef struct {
    TokenList tokens;
    Proposal *proposals[MAX_SLOTS];
    int slot[MAX_SLOTS], start[MAX_SLOTS + 1], rows[MAX_STEP_ROWS + LOGIT_ROWS], last[MAX_SLOTS];
    int n_seq, n_decode, n_logits;
} DraftBatch;

// Adds a sequence whose tokens have been appended, its last row's logits wanted; of a step all rows'.
static void add_sequence(DraftBatch *b, Proposal *p, bool decoded) {
    int from = b->start[b->n_seq], end = (int)b->tokens.n;
    b->proposals[b->n_seq] = p;
    b->slot[b->n_seq] = p->slot;
    for (int r = decoded ? from : end - 1; r < end; r++) b->rows[b->n_logits++] = r;
    b->last[b->n_seq++] = b->n_logits - 1;
    b->start[b->n_seq] = end;
    b->n_decode += decoded;
}

// Computes it, and takes the most likely token of each sequence as its next candidate.
static bool run_draft(Draft *d, DraftBatch *b, Error *err) {
    Batch batch = {.n_rows = (int)b->tokens.n,
                   .n_seq = b->n_seq,
                   .n_logits = b->n_logits,
                   .n_decode = b->n_decode,
                   .tokens = b->tokens.ids,
                   .slot = b->slot,
                   .start = b->start,
                   .logit_rows = b->rows};
    if (b->n_seq && !model_forward(&d->model, &batch, err)) return false;
    for (int i = 0; i < b->n_seq; i++) {
        Proposal *p = b->proposals[i];
        TokenList *cached = &d->slots[p->slot].cached;
        for (int r = b->start[i]; r < b->start[i + 1]; r++)
            if (!tokens_append(cached, b->tokens.ids[r], err)) return false;
        int id = d->model.argmax[b->last[i]];
        if (id >= 0)
            p->candidates[p->n++] = id;
        else
            p->most = p->n; // not finite: no candidate
    }
    b->n_seq = b->n_decode = b->n_logits = 0;
    b->tokens.n = 0;
    return true;
}

// Rows of text that a sequence has in a step: more are a prompt's.
static bool is_step(const Draft *d, const Proposal *p) {
    return proposal_length(p) - (size_t)d->model.kv.len[p->slot] <= MAX_CANDIDATES + 1;
}

static bool propose_draft(void *context, Proposal *proposals, int n, Error *err) {
    Draft *d = context;
    DraftBatch b = {.n_seq = 0};
    bool ok = true;
    for (int i = 0; i < n; i++) {
        Proposal *p = &proposals[i];
        p->n = p->kind = 0;
        int room = d->model.kv.max_len - (int)proposal_length(p) + 1; // it computes one candidate less than it gives
        if (p->most > room) p->most = room < 0 ? 0 : room;
        if (p->most) keep_common(d, p);
    }
    for (int i = 0; i < n; i++)
        if (proposals[i].most) reserve_pages(d, proposals, n, i);
    for (int prompts = 0; prompts < 2; prompts++) // those of a step first
        for (int i = 0; ok && i < n; i++) {
            Proposal *p = &proposals[i];
            if (p->most == 0 || is_step(d, p) == prompts) continue;
            for (size_t t = (size_t)d->model.kv.len[p->slot]; ok && t < proposal_length(p); t++)
                ok = tokens_append(&b.tokens, proposal_token(p, t), err);
            add_sequence(&b, p, !prompts);
        }
    ok = ok && run_draft(d, &b, err);
    for (int round = 1; ok && round < MAX_CANDIDATES; round++) {
        for (int i = 0; ok && i < n; i++)
            if (proposals[i].n == round && proposals[i].most > round) {
                ok = tokens_append(&b.tokens, proposals[i].candidates[round - 1], err);
                add_sequence(&b, &proposals[i], true);
            }
        ok = ok && run_draft(d, &b, err);
    }
    for (int i = 0; i < n; i++) // of what is in the cache now: the text
        if (proposals[i].most) d->slots[proposals[i].slot].accepted = proposal_length(&proposals[i]);
    tokens_free(&b.tokens);
    return ok;
}

// Steps read weights, and nothing else that counts: one of the draft for each candidate of all sequences.
static double draft_cost(void *context) {
    const Draft *d = context;
    return (double)weights_read(&d->model, 1) / (double)weights_read(d->verifier, 1);
}

static void close_draft(void *context) {
    Draft *d = context;
    for (int i = 0; i < d->n_slots; i++) tokens_free(&d->slots[i].cached);
    model_close(&d->model);
    free(d);
}

// Of --kv-memory, where it is given: for as many positions as the model has.
static uint64_t draft_memory(const Model *m, const Config *draft) {
    uint64_t page = cache_page_bytes(draft, 1), pages = m->kv_memory / cache_page_bytes(&m->config, 1);
    if (pages < sizeof(float)) pages = sizeof(float); // the model refuses what is less than a page, in its own numbers
    return m->kv_memory && pages < UINT64_MAX / page ? pages * page : 0;
}

bool draft_open(Speculation *s, const Model *m, const char *path, int n_slots, int max_len, Error *err) {
    Draft *d = calloc(1, sizeof *d + (size_t)n_slots * sizeof d->slots[0]);
    if (!d) return fail(err, "out of memory: %d slots of --draft", n_slots);
    d->n_slots = n_slots;
    d->verifier = m;
    d->model.file.fd = -1;
    Error why = {""};
    bool ok = checkpoint_open(&d->model, path, false, &why) &&
              check_vocabulary(&m->tokenizer, &d->model.tokenizer, path, &why);
    if (ok) {
        int most = d->model.config.max_seq_len;
        d->model.interrupted = m->interrupted;
        d->model.kv_memory = draft_memory(m, &d->model.config);
        d->model.step_rows = n_slots * (MAX_CANDIDATES + 1);
        d->model.speculates = true; // it computes what was accepted, and the token after it, in one step
        // (its weights need not be FP8)
        Precision precision = m->precision == PRECISION_FP8 ? PRECISION_BF16 : m->precision;
        ok = model_start(&d->model, m->engine->name, precision, n_slots, max_len < most ? max_len : most, &why);
    }
    if (!ok) {
        close_draft(d);
        if (is_interrupt(&why)) return fail_interrupted(err);
        return fail(err, "%s", why.text);
    }
    speculation_init(s, m,
                     &(Proposer){.name = "draft",
                                 .prior = {0.7, 0.7, 0.7, 0.7},
                                 .cost = draft_cost,
                                 .begin = begin_draft,
                                 .propose = propose_draft,
                                 .close = close_draft,
                                 .context = d});
    s->draft = &d->model;
    return true;
}
