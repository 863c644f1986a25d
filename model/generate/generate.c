#include "generate.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "../../tokenizer/utf8.h"
#include "../logits.h"

double clock_seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

// ---- text -----------------------------------------------------------------------------------------------------------

const uint8_t *printed_bytes(const Model *m, bool special, int id, size_t *n) {
    const uint8_t *bytes = tokenizer_bytes(&m->tokenizer, id, n);
    if (m->tokenizer.kind[id] == TOKEN_SPECIAL && !special) *n = 0;
    return bytes;
}

// How many bytes at the end of the pending text begin the stop text.
static size_t stop_overlap(const Bytes *pending, const char *stop) {
    size_t length = strlen(stop), most = pending->n < length - 1 ? pending->n : length - 1;
    for (size_t n = most; n > 0; n--)
        if (memcmp(pending->data + pending->n - n, stop, n) == 0) return n;
    return 0;
}

// Where the first stop text in the pending text begins; its end if there is none.
static size_t find_stop(const GenerateConfig *g, const Bytes *pending) {
    size_t end = pending->n;
    for (int i = 0; i < g->n_stops; i++) {
        size_t length = strlen(g->stops[i]);
        for (size_t at = 0; at + length <= pending->n && at < end; at++)
            if (memcmp(pending->data + at, g->stops[i], length) == 0) end = at;
    }
    return end;
}

static bool text_out(Sequence *seq, const GenerateSink *sink, size_t n, Error *err) {
    if (n == 0) return true;
    bool ok = sink->text ? sink->text(sink->context, seq, seq->pending.data, n, err)
                         : bytes_append(&seq->text, seq->pending.data, n, err);
    seq->pending.n -= n;
    memmove(seq->pending.data, seq->pending.data + n, seq->pending.n);
    return ok;
}

// One token's bytes on their way out. What may be part of a character or of a stop text waits. *stopped: one was found.
static bool text_add(Sequence *seq, const GenerateConfig *g, const GenerateSink *sink, const uint8_t *bytes, size_t n,
                     bool *stopped, Error *err) {
    if (!bytes_append(&seq->pending, bytes, n, err)) return false;
    size_t end = find_stop(g, &seq->pending), wait = 0;
    *stopped = end < seq->pending.n;
    if (*stopped) {
        seq->pending.n = end;
        return true;
    }
    if (seq->pending.n) wait = utf8_incomplete_tail((uint8_t *)seq->pending.data, seq->pending.n);
    for (int i = 0; i < g->n_stops; i++) {
        size_t overlap = stop_overlap(&seq->pending, g->stops[i]);
        wait = overlap > wait ? overlap : wait;
    }
    return text_out(seq, sink, end - wait, err);
}

// ---- one sequence ---------------------------------------------------------------------------------------------------

void sequence_free_results(Sequence *seq) {
    free(seq->text.data);
    free(seq->pending.data);
    free(seq->logprobs);
    free(seq->latencies);
    free(seq->top_ids);
    seq->text = seq->pending = (Bytes){0};
    seq->logprobs = seq->latencies = NULL;
    seq->top_ids = NULL;
}

void sequence_free(Sequence *seq) {
    sequence_free_results(seq);
    tokens_free(&seq->prompt);
    tokens_free(&seq->ids);
    sampler_free(&seq->sampler);
    *seq = (Sequence){0};
}

static int ascending(const void *a, const void *b) {
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

double sequence_latency(Sequence *seq, double quantile) {
    if (seq->ids.n < 2) return 0;
    size_t n = seq->ids.n - 1, rank = (size_t)ceil(quantile * (double)n);
    qsort(seq->latencies, n, sizeof *seq->latencies, ascending);
    return (double)seq->latencies[rank ? rank - 1 : 0];
}

static bool sequence_begin(Sequence *seq, const Model *m, const GenerateConfig *g, Error *err) {
    int room = m->kv.max_len - (int)seq->prompt.n;
    seq->n_max = g->n < room ? g->n : room;
    seq->admitted = clock_seconds();
    seq->latencies = malloc((size_t)seq->n_max * sizeof *seq->latencies);
    if (!seq->latencies && seq->n_max) return fail(err, "out of memory: times of %d tokens", seq->n_max);
    if (g->logprobs) {
        seq->logprobs = calloc((size_t)seq->n_max * (size_t)(1 + g->logprobs), sizeof *seq->logprobs);
        seq->top_ids = calloc((size_t)seq->n_max * (size_t)g->logprobs, sizeof *seq->top_ids);
        if (seq->n_max && (!seq->logprobs || !seq->top_ids))
            return fail(err, "out of memory: log-probabilities of %d tokens", seq->n_max);
    }
    return sampler_init(&seq->sampler, g->sampler, m->config.vocab_size, g->seed, (uint64_t)seq->index, err);
}

// Lets go of what only a running sequence needs, after its last bytes.
static bool sequence_end(Sequence *seq, const char *reason, const GenerateSink *sink, Error *err) {
    seq->finish_reason = reason;
    sampler_free(&seq->sampler);
    return text_out(seq, sink, seq->pending.n, err);
}

static bool contains(const int *ids, int n, int id) {
    for (int i = 0; i < n; i++)
        if (ids[i] == id) return true;
    return false;
}

static bool is_end(const Sequence *seq, const Model *m, const GenerateConfig *g, int id) {
    return contains(m->config.eos_ids, m->config.n_eos, id) ||
           (seq->turn && contains(g->turn_ends, g->n_turn_ends, id));
}

// Whether a special token is named by a stop text: printed or not, an answer ends there.
static bool is_stop_token(const Tokenizer *t, const GenerateConfig *g, int id) {
    if (t->kind[id] != TOKEN_SPECIAL) return false;
    size_t n;
    const uint8_t *bytes = tokenizer_bytes(t, id, &n);
    for (int i = 0; i < g->n_stops; i++)
        if (strlen(g->stops[i]) == n && memcmp(g->stops[i], bytes, n) == 0) return true;
    return false;
}

static void record_logprobs(Sequence *seq, int k, const float *logits, int vocab, int id) {
    size_t step = seq->ids.n;
    float *row = seq->logprobs + step * (size_t)(1 + k);
    int *top = seq->top_ids + step * (size_t)k;
    double z = log_sum_exp(logits, vocab);
    row[0] = (float)((double)logits[id] - z);
    top_ids(logits, vocab, k < vocab ? k : vocab, top);
    for (int i = 0; i < k && i < vocab; i++) row[1 + i] = (float)((double)logits[top[i]] - z);
}

// Chooses the sequence's next token from a row of logits, passes its text on, and notices the end.
static bool sequence_step(Sequence *seq, Model *m, const GenerateConfig *g, const GenerateSink *sink, int row,
                          Error *err) {
    if (seq->n_max == 0) return sequence_end(seq, "length", sink, err); // its prompt was computed, and that is all
    const float *logits = m->logits + (size_t)row * (size_t)m->config.vocab_size;
    int id = m->argmax[row];
    if (id < 0) {
        if (!m->engine->read_logits(m, err)) return false;
        int bad = find_not_finite(logits, m->config.vocab_size);
        return fail(err, "position %zu: logit %d is %f; the weights or the arithmetic are broken",
                    seq->prompt.n + seq->ids.n - 1, bad, (double)logits[bad < 0 ? 0 : bad]);
    }
    if (g->sampler.temperature > 0) id = sampler_next(&seq->sampler, logits);
    if (g->logprobs) record_logprobs(seq, g->logprobs, logits, m->config.vocab_size, id);
    if (!tokens_append(&seq->ids, id, err)) return false;
    double now = clock_seconds();
    if (seq->ids.n == 1) seq->first = now;
    if (seq->ids.n > 1) seq->latencies[seq->ids.n - 2] = (float)(now - seq->last);
    seq->last = now;
    bool end = is_end(seq, m, g, id);
    if ((end && !g->ignore_eos) || is_stop_token(&m->tokenizer, g, id))
        return sequence_end(seq, end ? "stop" : "stop_string", sink, err);
    size_t n;
    bool stopped;
    const uint8_t *bytes = printed_bytes(m, g->special, id, &n);
    if (!text_add(seq, g, sink, bytes, n, &stopped, err)) return false;
    if (stopped) return sequence_end(seq, "stop_string", sink, err);
    if ((int)seq->ids.n == seq->n_max) return sequence_end(seq, "length", sink, err);
    return true;
}

// ---- many -----------------------------------------------------------------------------------------------------------

typedef struct {
    Model *model;
    const GenerateConfig *config;
    const GenerateSink *sink;
    Sequence *live[MAX_SLOTS]; // by slot; NULL: free
} Run;

// Computes a batch with a logit row for each sequence of it, and lets each take its step.
static bool run_batch(Run *r, const Batch *batch, Error *err) {
    Model *m = r->model;
    bool needs_logits = r->config->sampler.temperature > 0 || r->config->logprobs > 0;
    if (!model_forward(m, batch, err)) return false;
    if (needs_logits && !m->engine->read_logits(m, err)) return false;
    for (int i = 0; i < batch->n_seq; i++) {
        Sequence **place = &r->live[batch->slot[i]];
        if (!sequence_step(*place, m, r->config, r->sink, i, err)) return false;
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
        ok = sequence_begin(seq, m, r->config, err);
        for (size_t t = (size_t)seq->n_cached; ok && t < seq->prompt.n; t++)
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
                   .decode = true,
                   .tokens = tokens,
                   .slot = slot,
                   .start = count,
                   .logit_rows = count};
    return n == 0 || run_batch(r, &batch, err);
}

bool generate(Model *m, const GenerateConfig *config, Sequence *seqs, int n, const GenerateSink *sink, Error *err) {
    Run r = {.model = m, .config = config, .sink = sink};
    int next = 0; // to be admitted
    for (int done = 0; done < n;) {
        if (!model_interrupted(m) && !(admit(&r, seqs, n, &next, err) && (model_interrupted(m) || step(&r, err)))) {
            if (!is_interrupt(err)) return false;
            *err = (Error){""}; // not a failure here: what there is will be passed on
        }
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
