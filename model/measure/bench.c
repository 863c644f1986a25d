#include "bench_report.h"

#include <stdlib.h>
#include <string.h>

#include "../generate/generate.h"

enum {
    WARM_UPS = 4, // steps before those that count
    WINDOW = 32,  // a row's steps go so many positions beyond its context, then start over
    MIN_SAMPLES = 3,
    MAX_SAMPLES = 256 // of a row
};
static const double PROMPT_SECONDS = 1.5, STEP_SECONDS = 0.8; // for a row, after its warm-up, if that is enough
// After a start nothing counts for so long: a driver may still be wiping the memory that was given back before it.
static const double SETTLE_SECONDS = 0.3;
// Tokens of the first prompts of processes. Each is measured in so many processes, or fewer where they take long.
static const int FRESH_PROMPTS[BENCH_FRESH] = {1, 17, 64, 200, 1000};
enum { FRESH_SAMPLES = 3 };
static const double FRESH_SECONDS = 3;

typedef struct {
    Model *m;
    const BenchOptions *o;
    const Platform *platform;
    BenchResult r;
    int n_measured;   // rows so far, for the progress line
    uint64_t random;  // the state of the tokens' random numbers
    double counts_at; // on the clock: what is measured earlier does not count
} Bench;

// ---- work -----------------------------------------------------------------------------------------------------------

// Elements of a layer's matrices.
static double layer_weights(const Config *c) {
    return (double)c->dim * ((double)c->q_dim * 2 + (double)c->kv_dim * 2 + (double)c->hidden_dim * 3);
}

static double embedding_weights(const Config *c) {
    return (double)c->dim * c->vocab_size;
}

// Bytes of keys and values that a step reads for all its sequences, in the middle of the window that begins at `start`.
static double kv_read(const Model *m, int batch, int start) {
    double position = (double)model_page_bytes(m) / KV_PAGE;
    return batch * position * (start + (WINDOW + 1) / 2.0);
}

// Floating-point operations of a prompt of T tokens: two for each weight of the layers and token, lm_head once, and
// scores and sums of attention over the causal half.
static double prompt_operations(const Config *c, double T) {
    return c->n_layers * (2 * layer_weights(c) * T + 2 * T * (T + 1) * c->q_dim) + 2 * embedding_weights(c);
}

// ---- measuring ------------------------------------------------------------------------------------------------------

static void show(Bench *b, const char *what, const BenchRow *row) {
    if (!b->o->progress) return;
    fprintf(stderr, "\r\033[K");
    if (!row) return;
    fprintf(stderr, "llama: measuring %d of %d: %s %d", ++b->n_measured,
            1 + 2 * b->r.n_fresh + b->r.n_prompts + b->r.n_steps, what, row->length);
    if (row->batch > 1) fprintf(stderr, ", batch %d", row->batch);
}

// Every step begins with it, so that an interrupt is not left waiting.
static bool check_interrupt(const Bench *b, Error *err) {
    return !model_interrupted(b->m) || fail_interrupted(err);
}

static bool needs_more(int n, double start, double seconds) {
    return n < MIN_SAMPLES || (n < MAX_SAMPLES && clock_seconds() - start < seconds);
}

static bool logits_are_finite(const Bench *b, int rows, Error *err) {
    for (int i = 0; i < rows; i++)
        if (b->m->argmax[i] < 0) return fail(err, "logits that are not finite after position %d", b->m->kv.len[i] - 1);
    return true;
}

// A prompt into an empty context, and the token that follows it.
static bool time_prompt(Bench *b, int n, double *seconds, Error *err) {
    int *tokens = malloc((size_t)n * sizeof *tokens);
    if (!tokens) return fail(err, "out of memory: %d tokens", n);
    for (int i = 0; i < n; i++) tokens[i] = (int)((uint32_t)i * 2654435761u % (uint32_t)b->m->config.vocab_size);
    kv_reset(&b->m->kv, 0);
    double start = clock_seconds();
    bool ok = check_interrupt(b, err) && model_prefill(b->m, 0, tokens, n, 1, err) && logits_are_finite(b, 1, err);
    *seconds = clock_seconds() - start;
    free(tokens);
    return ok;
}

static bool measure_prompt(Bench *b, BenchRow *row, Error *err) {
    double samples[MAX_SAMPLES] = {0}, start;
    int n = 0;
    show(b, "a prompt of", row);
    if (!time_prompt(b, row->length, samples, err)) return false; // warm-up
    for (start = clock_seconds(); needs_more(n, start, PROMPT_SECONDS); n++)
        if (!time_prompt(b, row->length, &samples[n], err)) return false;
    row->seconds = statistic_of(samples, n);
    row->work = prompt_operations(&b->m->config, row->length);
    return true;
}

// In processes of their own, while this one has no engine: there may be no memory for two.
static bool measure_fresh(Bench *b, BenchRow *row, Error *err) {
    double samples[FRESH_SAMPLES] = {0}, start = clock_seconds();
    int n = 0;
    show(b, "the first prompt of a process, of", row);
    while (n < FRESH_SAMPLES && (n == 0 || clock_seconds() - start < FRESH_SECONDS)) {
        if (!check_interrupt(b, err)) return false;
        if (!b->o->fresh_prompt(b->o->fresh_context, row->length, &samples[n++], &row->why))
            return check_interrupt(b, err); // else the row says why
    }
    row->seconds = statistic_of(samples, n);
    return true;
}

// The tokens of the step after this one.
static bool choose_tokens(Bench *b, int batch, int *tokens, Error *err) {
    SampleRow rows[MAX_SLOTS];
    for (int i = 0; i < batch; i++) tokens[i] = b->m->argmax[i];
    if (b->o->sampler.temperature == 0) return true;
    for (int i = 0; i < batch; i++) rows[i] = (SampleRow){i, &b->o->sampler, random_uniform(&b->random)};
    return b->m->engine->sample(b->m, rows, batch, tokens, err);
}

// One more token for so many sequences, as generate() does it.
static bool time_step(Bench *b, int batch, int *tokens, double *seconds, Error *err) {
    int rows[MAX_SLOTS + 1];
    for (int i = 0; i <= MAX_SLOTS; i++) rows[i] = i;
    Batch step = {.n_rows = batch,
                  .n_seq = batch,
                  .n_logits = batch,
                  .n_decode = batch,
                  .tokens = tokens,
                  .slot = rows,
                  .start = rows,
                  .logit_rows = rows};
    double start = clock_seconds();
    bool ok = check_interrupt(b, err) && model_forward(b->m, &step, err) && logits_are_finite(b, batch, err) &&
              choose_tokens(b, batch, tokens, err);
    *seconds = clock_seconds() - start;
    return ok;
}

static bool measure_steps(Bench *b, BenchRow *row, Error *err) {
    double samples[MAX_SAMPLES] = {0}, seconds, began = 0;
    KVCache *kv = &b->m->kv;
    int tokens[MAX_SLOTS], last = kv->max_len - WINDOW, n = 0;
    int start = row->length < last ? row->length : last; // the model's longest context has no room after it
    bool warm = false;
    show(b, "a step at context length", row);
    b->m->sequences = row->batch; // as in a run of so many, whatever the cache has room for
    for (int i = 0; i < row->batch; i++) tokens[i] = (int)((uint32_t)i * 7919 % (uint32_t)b->m->config.vocab_size);
    for (int step = 0; !warm || needs_more(n, began, STEP_SECONDS); step++) {
        if (step % WINDOW == 0)
            for (int i = 0; i < row->batch; i++) {
                kv_reset(kv, i);
                kv_reserve(kv, i, start); // there is memory for all (start_with)
                kv_append(kv, i, start);
            }
        if (!time_step(b, row->batch, tokens, &seconds, err)) return false;
        // Not the first of a window: no generation jumps back, and an engine that works ahead has worked in vain.
        if (warm && step % WINDOW != 0) samples[n++] = seconds;
        if (warm || step + 1 < WARM_UPS || clock_seconds() < b->counts_at) continue;
        warm = true;
        began = clock_seconds();
        step = -1; // and from the start of the window
    }
    row->seconds = statistic_of(samples, n);
    row->work = (double)weights_read(b->m, row->batch) + kv_read(b->m, row->batch, start);
    return true;
}

// Starts the engine anew with a cache of that size, full of random numbers.
static bool start_with(Bench *b, int slots, int max_len, Error *err) {
    model_stop(b->m);
    b->m->kv_memory = KV_MEMORY_ALL;
    double start = clock_seconds();
    if (!check_interrupt(b, err) || !model_start(b->m, b->o->engine, b->o->precision, slots, max_len, err))
        return false;
    if (b->m->file.n_tensors && b->r.n_loads < BENCH_MAX_LOADS) b->r.loads[b->r.n_loads++] = clock_seconds() - start;
    bool ok = b->platform->fill_cache(b->m, err);
    b->counts_at = clock_seconds() + SETTLE_SECONDS;
    return ok;
}

// All prompts with one cache, of the longest that there is memory for. What does not fit at all fails here.
static bool measure_prompts(Bench *b, Error *err) {
    bool started = false;
    int least = b->r.n_fresh ? b->r.warm[b->r.n_fresh - 1].length : 0;
    for (int i = b->r.n_prompts; i >= 0 && !started; i--) {
        BenchRow *row = i > 0 ? &b->r.prompts[i - 1] : &b->r.first;
        int length = row->length < least ? least : row->length;
        started = !row->why.text[0] && start_with(b, 1, length, &row->why);
    }
    if (!started) return fail(err, "%s", b->r.first.why.text);
    if (!time_prompt(b, BENCH_FIRST_PROMPT, &b->r.first_seconds, err) || !measure_prompt(b, &b->r.first, err))
        return false;
    for (int i = 0; i < b->r.n_fresh; i++)
        if (!measure_prompt(b, &b->r.warm[i], err)) return false;
    for (int i = 0; i < b->r.n_prompts; i++)
        if (!b->r.prompts[i].why.text[0] && !measure_prompt(b, &b->r.prompts[i], err)) return false;
    return true;
}

// The rows of one context with one cache, of the largest batch that there is memory for.
static bool measure_context(Bench *b, BenchRow *rows, int n, Error *err) {
    int longest = b->m->config.max_seq_len;
    int max_len = rows->length < longest - WINDOW ? rows->length + WINDOW : longest;
    while (n > 0) {
        BenchRow *row = &rows[n - 1];
        b->m->sequences = rows[0].batch; // a start may prepare the steps that come first
        if (!row->why.text[0] && start_with(b, row->batch, max_len, &row->why)) break;
        n--;
    }
    for (int i = 0; i < n; i++)
        if (!measure_steps(b, &rows[i], err)) return false;
    return check_interrupt(b, err);
}

static bool measure(Bench *b, Error *err) {
    for (int i = 0; i < b->r.n_fresh; i++)
        if (!measure_fresh(b, &b->r.fresh[i], err)) return false;
    if (!b->platform->measure(&b->r.roofline, b->m->gpus > 1 ? b->m->gpus : 1, err) || !measure_prompts(b, err))
        return false;
    for (int i = 0, n; i < b->r.n_steps; i += n) {
        for (n = 1; i + n < b->r.n_steps && b->r.steps[i + n].length == b->r.steps[i].length;) n++;
        if (!measure_context(b, &b->r.steps[i], n, err)) return false;
    }
    return true;
}

// ---- what is to be measured -----------------------------------------------------------------------------------------

static void add_row(Bench *b, BenchRow *list, int *n, int length, int batch) {
    BenchRow *row = &list[(*n)++];
    *row = (BenchRow){.length = length, .batch = batch};
    int longest = b->m->config.max_seq_len;
    if (length > longest) fail(&row->why, "the model's longest context is %d", longest);
}

static bool plan(Bench *b, Error *err) {
    const Platform *platform = b->platform;
    const Config *c = &b->m->config;
    int context = b->o->context ? b->o->context : platform->contexts[0], n = 0;
    if (context > c->max_seq_len && b->o->context)
        return fail(err, "a context of %d tokens, the model's maximum is %d", context, c->max_seq_len);
    if (context < platform->contexts[0])
        return fail(err, "-c %d: --bench measures contexts from %d on", context, platform->contexts[0]);
    if (c->max_seq_len < platform->contexts[0])
        return fail(err, "--bench measures contexts from %d on, the model's longest is %d", platform->contexts[0],
                    c->max_seq_len);
    add_row(b, &b->r.first, &n, BENCH_FIRST_PROMPT, 1);
    int longest = b->o->context ? context : c->max_seq_len;
    for (int i = 0; i < BENCH_FRESH && b->o->fresh_prompt && FRESH_PROMPTS[i] <= longest; i++) {
        int at = b->r.n_fresh;
        add_row(b, b->r.warm, &at, FRESH_PROMPTS[i], 1);
        add_row(b, b->r.fresh, &b->r.n_fresh, FRESH_PROMPTS[i], 1);
    }
    for (const int *at = platform->prompts; *at && (!b->o->context || *at <= context); at++)
        add_row(b, b->r.prompts, &b->r.n_prompts, *at, 1);
    for (const int *at = platform->contexts; *at && (!b->o->context || *at <= context); at++)
        for (const int *batch = platform->batches; *batch && (!b->o->batch || *batch <= b->o->batch); batch++)
            add_row(b, b->r.steps, &b->r.n_steps, *at, *batch);
    return true;
}

bool bench_run(Model *m, const Platform *platform, const BenchOptions *o, FILE *out, Error *err) {
    Bench *b = calloc(1, sizeof *b);
    if (!b) return fail(err, "out of memory: the benchmark's rows");
    b->m = m;
    b->o = o;
    b->platform = platform;
    bool ok = plan(b, err) && measure(b, err);
    show(b, NULL, NULL);
    if (ok) (o->json ? bench_report_json : bench_report_table)(m, o, &b->r, out);
    free(b);
    return ok;
}
