#include "sequence.h"

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

// ---- log-probabilities ----------------------------------------------------------------------------------------------

static bool logprobs_init(Logprobs *l, size_t n, int k, Error *err) {
    l->values = calloc(n * (size_t)(1 + k) + 1, sizeof *l->values);
    l->top_ids = calloc(n * (size_t)k + 1, sizeof *l->top_ids);
    return (l->values && l->top_ids) || fail(err, "out of memory: log-probabilities of %zu tokens", n);
}

static void logprobs_free(Logprobs *l) {
    free(l->values);
    free(l->top_ids);
    *l = (Logprobs){0};
}

// Those of position i, where the token is id.
static void logprobs_set(Logprobs *l, size_t i, int k, const float *logits, int vocab, int id) {
    float *values = l->values + i * (size_t)(1 + k);
    int *top = l->top_ids + i * (size_t)k;
    double z = log_sum_exp(logits, vocab);
    values[0] = (float)((double)logits[id] - z);
    top_ids(logits, vocab, k, top);
    for (int j = 0; j < k; j++) values[1 + j] = (float)((double)logits[top[j]] - z);
}

// ---- one sequence ---------------------------------------------------------------------------------------------------

void sequence_free_results(Sequence *seq) {
    free(seq->text.data);
    free(seq->pending.data);
    free(seq->latencies);
    logprobs_free(&seq->logprobs);
    logprobs_free(&seq->prompt_logprobs);
    seq->text = seq->pending = (Bytes){0};
    seq->latencies = NULL;
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

bool sequence_begin(Sequence *seq, const Model *m, Error *err) {
    GenerateConfig *g = &seq->config;
    int room = kv_longest(&m->kv) - (int)seq->prompt.n;
    if (g->logprobs > m->config.vocab_size) g->logprobs = m->config.vocab_size; // of a small vocabulary all
    seq->n_max = g->n < room ? g->n : room;
    seq->admitted = clock_seconds();
    seq->latencies = malloc(((size_t)seq->n_max + 1) * sizeof *seq->latencies);
    if (!seq->latencies) return fail(err, "out of memory: times of %d tokens", seq->n_max);
    if (g->logprobs && !logprobs_init(&seq->logprobs, (size_t)seq->n_max, g->logprobs, err)) return false;
    if (g->prompt_logprobs && !logprobs_init(&seq->prompt_logprobs, seq->prompt.n, g->logprobs, err)) return false;
    if (!sampler_init(&seq->sampler, g->sampler, m->config.vocab_size, g->seed, g->stream, err)) return false;
    sampler_see(&seq->sampler, seq->prompt.ids, seq->prompt.n);
    return true;
}

bool sequence_is_drawn(const Sequence *seq) {
    const GenerateConfig *g = &seq->config;
    return seq->n_max > 0 && g->logprobs == 0 && sampler_draws(&g->sampler);
}

bool sequence_reads_logits(const Sequence *seq) {
    const GenerateConfig *g = &seq->config;
    return !sequence_is_drawn(seq) && (sampler_reads_logits(&g->sampler) || g->logprobs > 0);
}

bool sequence_check_finite(Model *m, int row, size_t position, Error *err) {
    if (m->argmax[row] >= 0) return true;
    if (!m->engine->read_logits(m, err)) return false;
    const float *logits = m->logits + (size_t)row * (size_t)m->config.vocab_size;
    int bad = find_not_finite(logits, m->config.vocab_size);
    return fail(err, "position %zu: logit %d is %f; the weights or the arithmetic are broken", position, bad,
                (double)logits[bad < 0 ? 0 : bad]);
}

bool sequence_score_prompt(Sequence *seq, Model *m, int slot, Error *err) {
    const int *ids = seq->prompt.ids;
    int n = (int)seq->prompt.n - 1;
    for (int at = 0, rows; at < n; at += rows) {
        rows = n - at < LOGIT_ROWS ? n - at : LOGIT_ROWS;
        if (!model_prefill(m, slot, ids + at, rows, rows, err) || !m->engine->read_logits(m, err)) return false;
        for (int r = 0; r < rows; r++, seq->n_scored++) {
            const float *logits = m->logits + (size_t)r * (size_t)m->config.vocab_size;
            if (!sequence_check_finite(m, r, (size_t)(at + r), err)) return false;
            logprobs_set(&seq->prompt_logprobs, (size_t)(at + r), seq->config.logprobs, logits, m->config.vocab_size,
                         ids[at + r + 1]);
        }
        if (m->progress && n > m->max_rows) m->progress("scoring", (uint64_t)(at + rows), (uint64_t)n);
    }
    return true;
}

bool sequence_end(Sequence *seq, const char *reason, const GenerateSink *sink, Error *err) {
    seq->finish_reason = reason;
    sampler_free(&seq->sampler);
    return text_out(seq, sink, seq->pending.n, err);
}

static bool contains(const int *ids, int n, int id) {
    for (int i = 0; i < n; i++)
        if (ids[i] == id) return true;
    return false;
}

static bool is_end(const Model *m, const GenerateConfig *g, int id) {
    return contains(m->config.eos_ids, m->config.n_eos, id) || contains(g->turn_ends, g->n_turn_ends, id);
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

int sequence_choose(Sequence *seq, const Model *m, int row) {
    const GenerateConfig *g = &seq->config;
    const float *logits = m->logits + (size_t)row * (size_t)m->config.vocab_size;
    int id = m->argmax[row];
    if (seq->n_max == 0) return id;
    if (sampler_reads_logits(&g->sampler)) id = sampler_next(&seq->sampler, logits);
    if (g->logprobs) logprobs_set(&seq->logprobs, seq->ids.n, g->logprobs, logits, m->config.vocab_size, id);
    return id;
}

bool sequence_take(Sequence *seq, const Model *m, const GenerateSink *sink, int id, Error *err) {
    const GenerateConfig *g = &seq->config;
    if (seq->n_max == 0) return sequence_end(seq, "length", sink, err);
    if (!tokens_append(&seq->ids, id, err)) return false;
    sampler_see(&seq->sampler, &id, 1);
    double now = clock_seconds();
    if (seq->ids.n == 1) seq->first = now;
    if (seq->ids.n > 1) seq->latencies[seq->ids.n - 2] = (float)(now - seq->last);
    seq->last = now;
    bool end = is_end(m, g, id);
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
