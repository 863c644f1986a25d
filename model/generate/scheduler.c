#include "scheduler.h"

#include <limits.h>

void scheduler_init(Scheduler *s, Model *m, Sequence *seqs, int n) {
    *s = (Scheduler){.model = m, .seqs = seqs, .n = n};
    for (int i = 0; i < m->kv.n_slots; i++) kv_truncate(&m->kv, i, i == 0 && n > 0 ? seqs[0].n_cached : 0);
}

void scheduler_free(Scheduler *s) {
    while (s->n_left > 0) model_free_pages(s->model, &s->left[--s->n_left].saved);
    tokens_free(&s->tokens);
}

// Positions that a sequence in this slot has computed, of prompt and answer.
static int computed(const Scheduler *s, int slot) {
    return s->model->kv.len[slot];
}

static bool decodes(const Sequence *seq) {
    return seq->ids.n > 0;
}

// ---- pages ----------------------------------------------------------------------------------------------------------

// Whether so many pages are free, and one more where others run: they will need one before long, and nobody should come
// only to leave.
static bool has_pages(const Scheduler *s, int pages) {
    return pages + (s->n_live > 0) <= kv_free_pages(&s->model->kv);
}

// Positions that a sequence with `len` of them needs pages for before it runs: the whole prompt's, or the next token's.
static int positions_needed(const Sequence *seq, int len) {
    return decodes(seq) ? len + 1 : (int)seq->prompt.n;
}

// The newest sequence's keys and values go to host memory.
static bool leave(Scheduler *s, Error *err) {
    int slot = s->by_age[s->n_live - 1];
    Sequence *seq = s->live[slot];
    if (!model_save_pages(s->model, slot, &s->left[s->n_left].saved, err)) return false;
    seq->n_left++;
    s->left[s->n_left++].seq = seq;
    s->live[slot] = NULL;
    s->n_live--;
    return true;
}

// Every sequence that decodes has a page for its next position, the oldest first; where none is free, the newest
// leaves, which may be itself.
static bool reserve_next_positions(Scheduler *s, Error *err) {
    for (int i = 0; i < s->n_live; i++) {
        int slot = s->by_age[i], positions = positions_needed(s->live[slot], computed(s, slot));
        while (i < s->n_live && !kv_reserve(&s->model->kv, slot, positions))
            if (!leave(s, err)) return false;
    }
    return true;
}

// ---- coming ---------------------------------------------------------------------------------------------------------

static int free_slot(const Scheduler *s) {
    int i = 0;
    while (i < s->model->kv.n_slots && s->live[i]) i++;
    return i < s->model->kv.n_slots ? i : -1;
}

static void enter(Scheduler *s, int slot, Sequence *seq) {
    s->live[slot] = seq;
    s->by_age[s->n_live++] = slot;
    s->n_filled++;
    if (seq->config.speculation) speculation_begin(seq->config.speculation, slot);
}

// Those that left come back, the oldest first, as soon as their pages are free.
static bool bring_back(Scheduler *s, Error *err) {
    while (s->n_left > 0) {
        int slot = free_slot(s), last = s->n_left - 1;
        Sequence *seq = s->left[last].seq;
        int positions = positions_needed(seq, s->left[last].saved.len);
        if (slot < 0 || !has_pages(s, kv_pages(positions))) return true;
        if (!model_restore_pages(s->model, slot, &s->left[last].saved, err)) return false;
        s->n_left--;
        kv_reserve(&s->model->kv, slot, positions);
        enter(s, slot, seq);
    }
    return true;
}

// Pages of a prompt are another's when it begins with the same ids. Alone, or where its own logits are wanted, it has
// none but its own: a conversation writes after what it keeps of them.
static bool shares(const Scheduler *s, const Sequence *seq) {
    return s->n > 1 && !seq->config.prompt_logprobs;
}

// Whether a prompt begins with whole pages that are just being computed for another: it takes them once they are there.
static bool is_being_computed(const Scheduler *s, const Sequence *seq) {
    for (int i = 0; shares(s, seq) && i < s->model->kv.n_slots; i++) {
        const Sequence *other = s->live[i];
        if (!other || decodes(other) || !shares(s, other)) continue;
        size_t most = seq->prompt.n - 1 < other->prompt.n ? seq->prompt.n - 1 : other->prompt.n, n = 0;
        while (n < most && seq->prompt.ids[n] == other->prompt.ids[n]) n++;
        if ((int)(n / KV_PAGE * KV_PAGE) > computed(s, i)) return true;
    }
    return false;
}

// Free slots go to the next sequences, in input order, as far as there are pages for their prompts.
static bool admit(Scheduler *s, Error *err) {
    KVCache *kv = &s->model->kv;
    while (s->n_left == 0 && s->next < s->n) {
        Sequence *seq = &s->seqs[s->next];
        int slot = free_slot(s);
        if (slot < 0 || is_being_computed(s, seq)) return true;
        int shared = shares(s, seq) ? kv_share(kv, slot, seq->prompt.ids, (int)seq->prompt.n) : 0;
        int pages = kv_pages((int)seq->prompt.n);
        if (!has_pages(s, pages - kv_pages(kv->len[slot]))) {
            if (shared) kv_reset(kv, slot);
            return s->n_live > 0 ||
                   fail(err, "a prompt of %zu tokens needs %d pages of %d positions, the K/V cache has %d",
                        seq->prompt.n, pages, KV_PAGE, kv->n_pages);
        }
        kv_reserve(kv, slot, (int)seq->prompt.n);
        seq->n_shared = shared;
        s->next++;
        enter(s, slot, seq);
        if (!sequence_begin(seq, s->model, err)) return false;
        if (seq->config.prompt_logprobs && !sequence_score_prompt(seq, s->model, slot, err)) return false;
    }
    return true;
}

// ---- the batch ------------------------------------------------------------------------------------------------------

// The next n tokens of the batch's last sequence. wanted: the last one's logits are.
static bool add_rows(Scheduler *s, const int *ids, int n, bool wanted, Error *err) {
    Batch *b = &s->batch;
    for (int i = 0; i < n; i++)
        if (!tokens_append(&s->tokens, ids[i], err)) return false;
    s->start[b->n_seq] = b->n_rows += n;
    if (!wanted) return true;
    s->of_logits[b->n_logits] = s->live[s->slot[b->n_seq - 1]];
    s->logit_rows[b->n_logits++] = b->n_rows - 1;
    return true;
}

// One more sequence of the batch.
static void add_sequence(Scheduler *s, int slot) {
    s->slot[s->batch.n_seq++] = slot;
    s->start[s->batch.n_seq] = s->batch.n_rows;
}

// Of the sequences that are decoded.
static Speculation *speculation(const Scheduler *s) {
    return s->batch.n_decode ? s->live[s->slot[0]]->config.speculation : NULL;
}

static void list_acceptance(Scheduler *s, Acceptance **acceptance) {
    for (int i = 0; i < s->batch.n_decode; i++) acceptance[i] = &s->live[s->slot[i]]->acceptance;
}

// Candidates for what comes after each decoded sequence, as far as there are pages for them.
static bool propose(Scheduler *s, int n, Error *err) {
    Acceptance *acceptance[MAX_SLOTS];
    for (int i = 0; i < n; i++) {
        const Sequence *seq = s->live[s->slot[i]];
        s->proposals[i] = (Proposal){.slot = s->slot[i],
                                     .prompt = seq->prompt.ids,
                                     .n_prompt = seq->prompt.n,
                                     .ids = seq->ids.ids,
                                     .n_ids = seq->ids.n,
                                     .most = seq->n_max - (int)seq->ids.n - 1};
    }
    if (!speculation(s)) return true;
    list_acceptance(s, acceptance);
    if (!speculation_propose(speculation(s), s->proposals, acceptance, n, n, model_step_rows(s->model), err))
        return false;
    for (int i = 0; i < n; i++) {
        Proposal *p = &s->proposals[i];
        while (p->n && !kv_reserve(&s->model->kv, p->slot, computed(s, p->slot) + 1 + p->n)) p->n--;
    }
    return true;
}

// The last token of every sequence that decodes, and its candidates.
static bool add_decoded(Scheduler *s, Error *err) {
    for (int i = 0; i < s->model->kv.n_slots; i++)
        if (s->live[i] && decodes(s->live[i])) s->slot[s->batch.n_decode++] = i;
    if (!propose(s, s->batch.n_decode, err)) return false;
    for (int i = 0; i < s->batch.n_decode; i++) {
        const Sequence *seq = s->live[s->slot[i]];
        s->batch.ends = s->batch.ends || (int)seq->ids.n + 1 == seq->n_max;
        add_sequence(s, s->slot[i]);
        if (!add_rows(s, &seq->ids.ids[seq->ids.n - 1], 1, true, err)) return false;
        for (int c = 0; c < s->proposals[i].n; c++)
            if (!add_rows(s, &s->proposals[i].candidates[c], 1, true, err)) return false;
    }
    return true;
}

// At most so many rows of the prompts that are not computed, the oldest sequence's first.
static bool add_prompts(Scheduler *s, int most, Error *err) {
    for (int i = 0; i < s->n_live && most > 0; i++) {
        int slot = s->by_age[i];
        const Sequence *seq = s->live[slot];
        if (decodes(seq)) continue;
        int at = computed(s, slot), left = (int)seq->prompt.n - at, n = left < most ? left : most;
        add_sequence(s, slot);
        if (!add_rows(s, seq->prompt.ids + at, n, n == left, err)) return false;
        most -= n;
    }
    return true;
}

static int count_decoding(const Scheduler *s) {
    int n = 0;
    for (int i = 0; i < s->n_live; i++) n += decodes(s->live[s->by_age[i]]);
    return n;
}

static int prompt_rows(const Scheduler *s) {
    if (s->filling) return INT_MAX;
    return s->model->two_passes ? PROMPT_ROWS_APART : PROMPT_ROWS;
}

bool scheduler_next(Scheduler *s, Error *err) {
    s->batch = (Batch){.n_rows = 0};
    s->tokens.n = 0;
    if (count_decoding(s) == 0) s->filling = true, s->n_filled = s->n_live;
    if (!reserve_next_positions(s, err) || !bring_back(s, err) || !admit(s, err)) return false;
    // Where nobody decodes, the slots are filled first, by whole prompts: a step of few sequences would take as long as
    // one of many. That may take several batches, as some prompts wait for others' pages.
    int decoded = count_decoding(s);
    s->filling = s->filling && decoded < s->n_live && s->n_filled <= s->model->kv.n_slots;
    if (!s->filling && !add_decoded(s, err)) return false;
    if (!add_prompts(s, prompt_rows(s), err)) return false;
    s->batch.tokens = s->tokens.ids;
    s->batch.slot = s->slot;
    s->batch.start = s->start;
    s->batch.logit_rows = s->logit_rows;
    return true;
}

void scheduler_computed(Scheduler *s) {
    for (int i = s->batch.n_decode; i < s->batch.n_seq; i++) {
        const Sequence *seq = s->live[s->slot[i]];
        if (shares(s, seq)) kv_publish(&s->model->kv, s->slot[i], seq->prompt.ids, computed(s, s->slot[i]));
    }
}

void scheduler_took(Scheduler *s) {
    Acceptance *acceptance[MAX_SLOTS];
    KVCache *kv = &s->model->kv;
    int n = s->batch.n_decode;
    for (int i = 0; i < n; i++) { // all but the last token, which the next step computes
        const Sequence *seq = s->live[s->slot[i]];
        int known = (int)(seq->prompt.n + seq->ids.n) - 1;
        if (kv->len[s->slot[i]] > known) kv_truncate(kv, s->slot[i], known);
    }
    list_acceptance(s, acceptance);
    if (speculation(s)) speculation_learn(speculation(s), s->proposals, acceptance, n, n);
}

void scheduler_release(Scheduler *s) {
    int n = s->n_live;
    s->n_live = 0;
    for (int i = 0; i < n; i++) {
        int slot = s->by_age[i];
        if (!s->live[slot]->finish_reason) {
            s->by_age[s->n_live++] = slot;
            continue;
        }
        s->live[slot] = NULL;
        if (s->n > 1) kv_reset(&s->model->kv, slot); // what one sequence alone has computed is there for its next run
    }
}
