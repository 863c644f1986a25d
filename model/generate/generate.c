#include "generate.h"

#include "../threads.h"

typedef struct {
    Model *model;
    const GenerateSink *sink;
    Sequence *live[MAX_SLOTS]; // by slot; NULL: free
} Run;

// The next tokens of a batch's sequences, a row of each at a time.
typedef struct {
    const Run *run;
    int n;
    Sequence *seqs[MAX_SLOTS]; // [n]: those that take one
    Proposal *proposals[MAX_SLOTS]; // of each; NULL: there are no candidates
    int rows[MAX_SLOTS], ids[MAX_SLOTS]; // the row of logits, and the token chosen from it
} Choice;

static void choose_tokens(void *context, int64_t begin, int64_t end) {
    Choice *c = context;
    for (int64_t i = begin; i < end; i++) c->ids[i] = sequence_choose(c->seqs[i], c->run->model, c->rows[i]);
}

// Lets each sequence take the token of its row. Those of which that is the candidate that the next row has computed
// stay, for that row's token. A vocabulary's worth of exponentials for each row takes longer than a GPU's step: they are
// shared out among the threads.
static bool take_tokens(Choice *c, bool needs_logits, const GenerateSink *sink, Error *err) {
    Model *m = c->run->model;
    for (int i = 0; i < c->n; i++)
        if (!sequence_check_finite(m, c->rows[i], c->seqs[i]->prompt.n + c->seqs[i]->ids.n - 1, err)) return false;
    parallel_for(c->n, needs_logits ? 1 : c->n, choose_tokens, c);
    int n = c->n;
    c->n = 0;
    for (int i = 0; i < n; i++) {
        Proposal *p = c->proposals[i];
        if (!sequence_take(c->seqs[i], m, sink, c->ids[i], err)) return false;
        if (!p || p->accepted == p->n || p->candidates[p->accepted] != c->ids[i]) continue;
        p->accepted++;
        if (c->seqs[i]->finish_reason) continue;
        c->seqs[c->n] = c->seqs[i];
        c->proposals[c->n] = p;
        c->rows[c->n++] = c->rows[i] + 1;
    }
    return true;
}

// Computes a batch, and lets each sequence of it take its next token, those with candidates as many as are right.
// proposals [n_decode]: of those that are decoded; NULL: there are none.
static bool run_batch(Run *r, const Batch *batch, Proposal *proposals, Error *err) {
    Model *m = r->model;
    Choice choice = {.run = r, .n = batch->n_seq};
    bool needs_logits = false;
    for (int i = 0, row = 0; i < batch->n_seq; i++) {
        choice.seqs[i] = r->live[batch->slot[i]];
        choice.proposals[i] = proposals && i < batch->n_decode ? &proposals[i] : NULL;
        choice.rows[i] = row;
        row += i < batch->n_decode ? batch->start[i + 1] - batch->start[i] : 1;
        needs_logits = needs_logits || sequence_reads_logits(choice.seqs[i]);
    }
    if (!model_forward(m, batch, err)) return false;
    if (needs_logits && !m->engine->read_logits(m, err)) return false;
    while (choice.n)
        if (!take_tokens(&choice, needs_logits, r->sink, err)) return false;
    for (int i = 0; i < batch->n_seq; i++) {
        Sequence **place = &r->live[batch->slot[i]];
        if (i < batch->n_decode) kv_truncate(&m->kv, batch->slot[i], (int)((*place)->prompt.n + (*place)->ids.n) - 1);
        if ((*place)->finish_reason) *place = NULL;
    }
    return true;
}

// Gives free slots to the next sequences; their prompts are one batch.
static bool admit(Run *r, Sequence *seqs, int n, int *next, Error *err) {
    Model *m = r->model;
    int slot[MAX_SLOTS], start[MAX_SLOTS + 1] = {0}, last[MAX_SLOTS], n_seq = 0;
    TokenList tokens = {0};
    bool ok = true;
    for (int i = 0; ok && i < m->kv.n_slots && *next < n; i++) {
        if (r->live[i]) continue;
        Sequence *seq = r->live[i] = &seqs[(*next)++];
        kv_truncate(&m->kv, i, seq->n_cached);
        if (seq->config.speculation) speculation_begin(seq->config.speculation, i);
        ok = sequence_begin(seq, m, err) && (!seq->config.prompt_logprobs || sequence_score_prompt(seq, m, i, err));
        for (size_t t = (size_t)m->kv.len[i]; ok && t < seq->prompt.n; t++)
            ok = tokens_append(&tokens, seq->prompt.ids[t], err);
        slot[n_seq++] = i;
        start[n_seq] = (int)tokens.n;
        last[n_seq - 1] = start[n_seq] - 1;
    }
    Batch batch = {.n_rows = (int)tokens.n,
                   .n_seq = n_seq,
                   .n_logits = n_seq,
                   .tokens = tokens.ids,
                   .slot = slot,
                   .start = start,
                   .logit_rows = last};
    ok = ok && (n_seq == 0 || run_batch(r, &batch, NULL, err));
    tokens_free(&tokens);
    return ok;
}

// Candidates for what comes after each of the n sequences in these slots.
static bool propose(Run *r, const int *slot, Proposal *proposals, Acceptance **acceptance, int n, Error *err) {
    Speculation *s = NULL;
    for (int i = 0; i < n; i++) {
        Sequence *seq = r->live[slot[i]];
        proposals[i] = (Proposal){.slot = slot[i],
                                  .prompt = seq->prompt.ids,
                                  .n_prompt = seq->prompt.n,
                                  .ids = seq->ids.ids,
                                  .n_ids = seq->ids.n,
                                  .most = seq->n_max - (int)seq->ids.n - 1};
        acceptance[i] = &seq->acceptance;
        s = seq->config.speculation;
    }
    return !s || speculation_propose(s, proposals, acceptance, n, n, model_step_rows(r->model), err);
}

// One more token for every sequence that runs, or several.
static bool step(Run *r, Error *err) {
    int start[MAX_SLOTS + 1] = {0}, slot[MAX_SLOTS], tokens[MAX_STEP_ROWS], rows[MAX_STEP_ROWS], n = 0;
    Proposal proposals[MAX_SLOTS];
    Acceptance *acceptance[MAX_SLOTS];
    Speculation *s = NULL;
    for (int i = 0; i < r->model->kv.n_slots; i++)
        if (r->live[i]) slot[n++] = i, s = r->live[i]->config.speculation;
    if (!propose(r, slot, proposals, acceptance, n, err)) return false;
    for (int i = 0; i < n; i++) {
        Sequence *seq = r->live[slot[i]];
        int row = start[i];
        tokens[row++] = seq->ids.ids[seq->ids.n - 1];
        for (int k = 0; k < proposals[i].n; k++) tokens[row++] = proposals[i].candidates[k];
        start[i + 1] = row;
    }
    for (int i = 0; i < start[n]; i++) rows[i] = i;
    Batch batch = {.n_rows = start[n],
                   .n_seq = n,
                   .n_logits = start[n],
                   .n_decode = n,
                   .tokens = tokens,
                   .slot = slot,
                   .start = start,
                   .logit_rows = rows};
    if (n == 0) return true;
    for (int i = 0; i < n; i++) {
        SpeculationCounts *c = &r->live[slot[i]]->counts;
        c->steps++;
        c->tokens -= (int64_t)r->live[slot[i]]->ids.n;
        c->candidates += proposals[i].n;
    }
    Sequence *seqs[MAX_SLOTS];
    for (int i = 0; i < n; i++) seqs[i] = r->live[slot[i]];
    if (!run_batch(r, &batch, proposals, err)) return false;
    for (int i = 0; i < n; i++) {
        seqs[i]->counts.accepted += proposals[i].accepted;
        seqs[i]->counts.tokens += (int64_t)seqs[i]->ids.n;
    }
    if (s) speculation_learn(s, proposals, acceptance, n, n);
    return true;
}

bool generate(Model *m, Sequence *seqs, int n, const GenerateSink *sink, Error *err) {
    Run r = {.model = m, .sink = sink};
    int next = 0; // to be admitted
    for (int done = 0; done < n;) {
        if (!model_interrupted(m) && !(admit(&r, seqs, n, &next, err) && (model_interrupted(m) || step(&r, err)))) {
            if (!is_interrupt(err)) return false;
            *err = (Error){""}; // not a failure here: what there is will be passed on
        }
        if (sink->stepped) sink->stepped(sink->context);
        for (int i = 0; model_interrupted(m) && i < m->kv.n_slots; i++) {
            if (r.live[i] && !sequence_end(r.live[i], "interrupted", sink, err)) return false;
            r.live[i] = NULL;
        }
        for (; done < n && seqs[done].finish_reason; done++)
            if (!sink->finished(sink->context, &seqs[done], err)) return false;
        if (model_interrupted(m)) break;
    }
    return true;
}
