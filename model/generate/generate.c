#include "generate.h"

#include "../threads.h"

typedef struct {
    Model *model;
    const GenerateSink *sink;
    Sequence *live[MAX_SLOTS]; // by slot; NULL: free
} Run;

// The next tokens of a batch's sequences.
typedef struct {
    const Run *run;
    const Batch *batch;
    bool drawn[MAX_SLOTS];
    int ids[MAX_SLOTS];
} Choice;

// Those of them that the engine draws.
static bool draw_tokens(Choice *c, Error *err) {
    Model *m = c->run->model;
    SampleRow rows[MAX_SLOTS];
    int ids[MAX_SLOTS], n = 0;
    for (int i = 0; i < c->batch->n_seq; i++) {
        Sequence *seq = c->run->live[c->batch->slot[i]];
        c->drawn[i] = sequence_is_drawn(seq);
        if (c->drawn[i]) rows[n++] = (SampleRow){i, &seq->config.sampler, random_uniform(&seq->sampler.state)};
    }
    if (n == 0) return true;
    if (!m->engine->sample(m, rows, n, ids, err)) return false;
    for (int i = 0; i < n; i++) c->ids[rows[i].row] = ids[i];
    return true;
}

static void choose_tokens(void *context, int64_t begin, int64_t end) {
    Choice *c = context;
    for (int64_t i = begin; i < end; i++)
        if (!c->drawn[i]) c->ids[i] = sequence_choose(c->run->live[c->batch->slot[i]], c->run->model, (int)i);
}

// Computes a batch with a logit row for each sequence of it, and lets each take its step. A vocabulary's worth of
// exponentials for each row takes longer than a GPU's step: they are shared out among the threads.
static bool run_batch(Run *r, const Batch *batch, Error *err) {
    Model *m = r->model;
    Choice choice = {.run = r, .batch = batch};
    bool needs_logits = false;
    for (int i = 0; i < batch->n_seq; i++)
        needs_logits = needs_logits || sequence_reads_logits(r->live[batch->slot[i]]);
    if (!model_forward(m, batch, err)) return false;
    if (needs_logits && !m->engine->read_logits(m, err)) return false;
    for (int i = 0; i < batch->n_seq; i++) {
        const Sequence *seq = r->live[batch->slot[i]];
        if (!sequence_check_finite(m, i, seq->prompt.n + seq->ids.n - 1, err)) return false;
    }
    if (!draw_tokens(&choice, err)) return false;
    parallel_for(batch->n_seq, needs_logits ? 1 : batch->n_seq, choose_tokens, &choice);
    for (int i = 0; i < batch->n_seq; i++) {
        Sequence **place = &r->live[batch->slot[i]];
        if (!sequence_take(*place, m, r->sink, choice.ids[i], err)) return false;
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
    ok = ok && (n_seq == 0 || run_batch(r, &batch, err));
    tokens_free(&tokens);
    return ok;
}

// One more token for every sequence that runs.
static bool step(Run *r, Error *err) {
    int count[MAX_SLOTS + 1]; // a row each
    int slot[MAX_SLOTS], tokens[MAX_SLOTS], n = 0;
    for (int i = 0; i <= MAX_SLOTS; i++) count[i] = i;
    for (int i = 0; i < r->model->kv.n_slots; i++) {
        const Sequence *seq = r->live[i];
        if (!seq) continue;
        slot[n] = i;
        tokens[n++] = seq->ids.ids[seq->ids.n - 1];
    }
    Batch batch = {.n_rows = n,
                   .n_seq = n,
                   .n_logits = n,
                   .n_decode = n,
                   .tokens = tokens,
                   .slot = slot,
                   .start = count,
                   .logit_rows = count};
    return n == 0 || run_batch(r, &batch, err);
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
