#include "generate.h"

#include "../threads.h"
#include "scheduler.h"

typedef struct {
    Model *model;
    const GenerateSink *sink;
    Scheduler scheduler;
} Run;

// The next tokens of a batch's sequences, from a row of each at a time.
typedef struct {
    Model *model;
    int n;
    Sequence *seqs[MAX_SLOTS];           // [n]: those that take one
    Proposal *proposals[MAX_SLOTS];      // of each; NULL: its row is a prompt's
    int rows[MAX_SLOTS], ids[MAX_SLOTS]; // the row of logits, and the token chosen from it
    int drawn[MAX_STEP_ROWS];            // by row: the token that the engine drew
} Choice;

// What the engine draws, of all rows at once: each row by the random number that it will have if the candidates before
// it are right. Rows that are not finite are left out; nobody may come to them.
static bool draw_tokens(Choice *c, Error *err) {
    SampleRow rows[MAX_STEP_ROWS];
    int ids[MAX_STEP_ROWS], n = 0;
    for (int i = 0; i < c->n; i++) {
        const Sequence *seq = c->seqs[i];
        uint64_t state = seq->sampler.state;
        int n_rows = c->proposals[i] ? 1 + c->proposals[i]->n : 1;
        for (int row = c->rows[i]; sequence_is_drawn(seq) && row < c->rows[i] + n_rows; row++) {
            double u = random_uniform(&state);
            if (c->model->argmax[row] >= 0) rows[n++] = (SampleRow){row, &seq->config.sampler, u};
        }
    }
    if (n == 0) return true;
    if (!c->model->engine->sample(c->model, rows, n, ids, err)) return false;
    for (int i = 0; i < n; i++) c->drawn[rows[i].row] = ids[i];
    return true;
}

static void choose_tokens(void *context, int64_t begin, int64_t end) {
    Choice *c = context;
    for (int64_t i = begin; i < end; i++) {
        Sequence *seq = c->seqs[i];
        if (sequence_is_drawn(seq)) {
            c->ids[i] = c->drawn[c->rows[i]];
            random_uniform(&seq->sampler.state); // the number that it was drawn by
        } else
            c->ids[i] = sequence_choose(seq, c->model, c->rows[i]);
    }
}

// Each sequence takes the token of its row. Where that is the candidate that the next row has computed, the sequence
// stays, for that row's token. A vocabulary's worth of exponentials for each row takes longer than a GPU's step: they
// are shared out among the threads.
static bool take_tokens(Choice *c, bool needs_logits, const GenerateSink *sink, Error *err) {
    int n = c->n;
    for (int i = 0; i < n; i++)
        if (!sequence_check_finite(c->model, c->rows[i], c->seqs[i]->prompt.n + c->seqs[i]->ids.n - 1, err))
            return false;
    parallel_for(n, needs_logits ? 1 : n, choose_tokens, c);
    c->n = 0;
    for (int i = 0; i < n; i++) {
        Sequence *seq = c->seqs[i];
        Proposal *p = c->proposals[i];
        if (!sequence_take(seq, c->model, sink, c->ids[i], err)) return false;
        if (p) seq->counts.tokens++;
        if (!p || p->accepted == p->n || p->candidates[p->accepted] != c->ids[i]) continue;
        p->accepted++;
        seq->counts.accepted++;
        if (seq->finish_reason) continue;
        c->seqs[c->n] = seq;
        c->proposals[c->n] = p;
        c->rows[c->n++] = c->rows[i] + 1;
    }
    return true;
}

// Computes the scheduler's batch, and lets each sequence that has logits in it take its next token, or as many as its
// candidates are right.
static bool run_batch(Run *r, Error *err) {
    Model *m = r->model;
    Scheduler *s = &r->scheduler;
    const Batch *b = &s->batch;
    Choice choice = {.model = m};
    bool needs_logits = false, ok;
    for (int row = 0, end; row < b->n_logits; row = end) {
        bool decoded = choice.n < b->n_decode;
        Proposal *p = decoded ? &s->proposals[choice.n] : NULL;
        Sequence *seq = s->of_logits[row];
        end = decoded ? b->start[choice.n + 1] : row + 1;
        choice.rows[choice.n] = row;
        choice.seqs[choice.n] = seq;
        choice.proposals[choice.n++] = p;
        needs_logits = needs_logits || sequence_reads_logits(seq);
        seq->counts.steps += decoded;
        if (p) seq->counts.candidates += p->n;
    }
    ok = model_forward(m, b, err);
    if (ok) scheduler_computed(s);
    ok = ok && (!needs_logits || m->engine->read_logits(m, err));
    ok = ok && draw_tokens(&choice, err);
    while (ok && choice.n) ok = take_tokens(&choice, needs_logits, r->sink, err);
    scheduler_took(s);
    if (ok) scheduler_release(s);
    return ok;
}

bool generate(Model *m, Sequence *seqs, int n, const GenerateSink *sink, Error *err) {
    Run r = {.model = m, .sink = sink};
    Scheduler *s = &r.scheduler;
    bool ok = true, interrupted = false;
    scheduler_init(s, m, seqs, n);
    for (int done = 0; ok && done < n && !interrupted;) {
        ok = model_interrupted(m) || (scheduler_next(s, err) && run_batch(&r, err));
        interrupted = model_interrupted(m);
        if (!ok && is_interrupt(err)) { // not a failure here: what there is will be passed on
            ok = true;
            *err = (Error){""};
        }
        if (ok && sink->stepped) sink->stepped(sink->context);
        for (int i = done; ok && interrupted && i < s->next; i++)
            if (!seqs[i].finish_reason) ok = sequence_end(&seqs[i], "interrupted", sink, err);
        for (; ok && done < n && seqs[done].finish_reason; done++) ok = sink->finished(sink->context, &seqs[done], err);
    }
    scheduler_free(s);
    return ok;
}
