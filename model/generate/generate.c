#include "generate.h"

#include "../threads.h"
#include "scheduler.h"

typedef struct {
    Model *model;
    const GenerateSink *sink;
    Scheduler scheduler;
    // The next tokens of the batch's sequences with logits, and whether the engine draws them.
    int ids[MAX_STEP_ROWS];
    bool drawn[MAX_STEP_ROWS];
} Run;

// Those of the next tokens that the engine draws.
static bool draw_tokens(Run *r, Error *err) {
    SampleRow rows[MAX_STEP_ROWS];
    int ids[MAX_STEP_ROWS], n = 0;
    for (int i = 0; i < r->scheduler.batch.n_logits; i++) {
        Sequence *seq = r->scheduler.of_logits[i];
        r->drawn[i] = sequence_is_drawn(seq);
        if (r->drawn[i]) rows[n++] = (SampleRow){i, &seq->config.sampler, random_uniform(&seq->sampler.state)};
    }
    if (n == 0) return true;
    if (!r->model->engine->sample(r->model, rows, n, ids, err)) return false;
    for (int i = 0; i < n; i++) r->ids[rows[i].row] = ids[i];
    return true;
}

static void choose_tokens(void *context, int64_t begin, int64_t end) {
    Run *r = context;
    for (int64_t i = begin; i < end; i++)
        if (!r->drawn[i]) r->ids[i] = sequence_choose(r->scheduler.of_logits[i], r->model, (int)i);
}

// Computes the scheduler's batch, and lets each sequence that has logits in it take its next token. A vocabulary's
// worth of exponentials for each row takes longer than a GPU's step: they are shared out among the threads.
static bool run_batch(Run *r, Error *err) {
    Model *m = r->model;
    Scheduler *s = &r->scheduler;
    int n = s->batch.n_logits;
    bool needs_logits = false;
    for (int i = 0; i < n; i++) needs_logits = needs_logits || sequence_reads_logits(s->of_logits[i]);
    if (!model_forward(m, &s->batch, err)) return false;
    scheduler_computed(s);
    if (needs_logits && !m->engine->read_logits(m, err)) return false;
    for (int i = 0; i < n; i++)
        if (!sequence_check_finite(m, i, s->of_logits[i]->prompt.n + s->of_logits[i]->ids.n - 1, err)) return false;
    if (!draw_tokens(r, err)) return false;
    parallel_for(n, needs_logits ? 1 : n, choose_tokens, r);
    for (int i = 0; i < n; i++)
        if (!sequence_take(s->of_logits[i], m, r->sink, r->ids[i], err)) return false;
    scheduler_release(s);
    return true;
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
