#include "bench.h"

#include <stdlib.h>
#include <string.h>

#include "generate.h"

enum {
    FIRST_PROMPT = 12, // tokens, of the time to the first new one
    WARM_UPS = 4,      // steps before those that count
    WINDOW = 32,       // a row's steps go so many positions beyond its context, then start over
    MIN_SAMPLES = 3,
    MAX_SAMPLES = 256, // of a row
    MAX_LISTED = 8,
    MAX_LOADS = 2 * MAX_LISTED
};
static const double PROMPT_SECONDS = 1.5, STEP_SECONDS = 0.8; // for a row, after its warm-up, if that is enough
// After a start nothing counts for so long: a driver may still be wiping the memory that was given back before it.
static const double SETTLE_SECONDS = 0.3;

// One line of the result: a prompt, or a step of some sequences.
typedef struct {
    int length, batch; // tokens of the prompt, or in the cache before the step; sequences
    Figure seconds;    // n 0: it was not run
    double work;       // operations of a prompt; bytes that a step reads
    Error why;         // it was not run
} Row;

typedef struct {
    Model *m;
    const BenchOptions *o;
    const Machine *machine;
    const volatile sig_atomic_t *interrupted;
    Yardstick yard;
    Row first, prompts[MAX_LISTED], steps[MAX_LISTED * MAX_LISTED];
    int n_prompts, n_steps, n_loads, n_done;
    double first_time; // seconds of the first prompt before any warm-up
    double settled;    // on the clock
    double loads[MAX_LOADS];
} Bench;

// ---- figures --------------------------------------------------------------------------------------------------------

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

Figure figure_of(double *samples, int n) {
    qsort(samples, (size_t)n, sizeof *samples, ascending);
    double median = n % 2 ? samples[n / 2] : (samples[n / 2 - 1] + samples[n / 2]) / 2;
    return (Figure){.median = median, .least = samples[0], .most = samples[n - 1], .n = n};
}

// Elements of a layer's matrices.
static double layer_weights(const Config *c) {
    return (double)c->dim * ((double)c->q_dim * 2 + (double)c->kv_dim * 2 + (double)c->hidden_dim * 3);
}

static double embedding_weights(const Config *c) {
    return (double)c->dim * c->vocab_size;
}

uint64_t weights_read(const Model *m, int batch) {
    const Config *c = &m->config;
    const Weights *w = &m->weights;
    uint64_t bytes = matrix_bytes(&w->output);
    if (!c->tie_embeddings) bytes += (uint64_t)batch * matrix_row_bytes(&w->tok_embeddings);
    for (int i = 0; i < c->n_layers; i++) {
        const LayerWeights *l = &w->layers[i];
        const Matrix *const matrices[] = {&l->wq, &l->wk, &l->wv, &l->wo, &l->w1, &l->w2, &l->w3};
        for (size_t k = 0; k < sizeof matrices / sizeof *matrices; k++) bytes += matrix_bytes(matrices[k]);
    }
    return bytes;
}

// Bytes of keys and values that a step reads for all its sequences, in the middle of the window that begins at `start`.
static double kv_read(const Model *m, int batch, int start) {
    double position = (double)m->kv.bytes / ((double)m->kv.n_slots * m->kv.max_len);
    return batch * position * (start + (WINDOW + 1) / 2.0);
}

// Floating-point operations of a prompt of T tokens: two for each weight of the layers and token, the head once, and
// scores and sums of attention over the causal half.
static double prompt_operations(const Config *c, double T) {
    return c->n_layers * (2 * layer_weights(c) * T + 2 * T * (T + 1) * c->q_dim) + 2 * embedding_weights(c);
}

// ---- measuring ------------------------------------------------------------------------------------------------------

static void show(Bench *b, const char *what, const Row *row) {
    if (!b->o->progress) return;
    fprintf(stderr, "\r\033[K");
    if (!row) return;
    fprintf(stderr, "llama: measuring %d of %d: %s %d", ++b->n_done, 1 + b->n_prompts + b->n_steps, what, row->length);
    if (row->batch > 1) fprintf(stderr, ", batch %d", row->batch);
}

// Every step begins with it, so that an interrupt is not left waiting.
static bool goes_on(const Bench *b, Error *err) {
    return !*b->interrupted || fail_interrupted(err);
}

static bool wants_more(int n, double start, double seconds) {
    return n < MIN_SAMPLES || (n < MAX_SAMPLES && clock_seconds() - start < seconds);
}

static bool logits_are_finite(const Bench *b, int rows, Error *err) {
    for (int i = 0; i < rows; i++)
        if (b->m->argmax[i] < 0) return fail(err, "logits that are not finite behind position %d", b->m->kv.len[i] - 1);
    return true;
}

// A prompt into an empty context, and the token that follows it.
static bool time_prompt(Bench *b, int n, double *seconds, Error *err) {
    int *tokens = malloc((size_t)n * sizeof *tokens);
    if (!tokens) return fail(err, "out of memory: %d tokens", n);
    for (int i = 0; i < n; i++) tokens[i] = (int)((uint32_t)i * 2654435761u % (uint32_t)b->m->config.vocab_size);
    kv_reset(&b->m->kv, 0);
    double start = clock_seconds();
    bool ok = goes_on(b, err) && model_prefill(b->m, 0, tokens, n, 1, err) && logits_are_finite(b, 1, err);
    *seconds = clock_seconds() - start;
    free(tokens);
    return ok;
}

static bool measure_prompt(Bench *b, Row *row, Error *err) {
    double samples[MAX_SAMPLES] = {0}, start;
    int n = 0;
    show(b, "a prompt of", row);
    if (!time_prompt(b, row->length, samples, err)) return false; // warm-up
    for (start = clock_seconds(); wants_more(n, start, PROMPT_SECONDS); n++)
        if (!time_prompt(b, row->length, &samples[n], err)) return false;
    row->seconds = figure_of(samples, n);
    row->work = prompt_operations(&b->m->config, row->length);
    return true;
}

// One more token for so many sequences, as generate() does it: the next step's tokens are this one's choice.
static bool time_step(Bench *b, int batch, int *tokens, double *seconds, Error *err) {
    int rows[MAX_SLOTS + 1];
    for (int i = 0; i <= MAX_SLOTS; i++) rows[i] = i;
    Batch step = {.n_rows = batch,
                  .n_seq = batch,
                  .n_logits = batch,
                  .decode = true,
                  .tokens = tokens,
                  .slot = rows,
                  .start = rows,
                  .logit_rows = rows};
    double start = clock_seconds();
    bool ok = goes_on(b, err) && model_forward(b->m, &step, err) && logits_are_finite(b, batch, err);
    for (int i = 0; ok && i < batch; i++) tokens[i] = b->m->argmax[i];
    *seconds = clock_seconds() - start;
    return ok;
}

static bool measure_steps(Bench *b, Row *row, Error *err) {
    double samples[MAX_SAMPLES] = {0}, seconds, began = 0;
    KVCache *kv = &b->m->kv;
    int tokens[MAX_SLOTS], last = kv->max_len - WINDOW, n = 0;
    int start = row->length < last ? row->length : last; // the model's longest context has no room behind it
    bool warm = false;
    show(b, "a step behind", row);
    for (int i = 0; i < row->batch; i++) tokens[i] = (int)((uint32_t)i * 7919 % (uint32_t)b->m->config.vocab_size);
    for (int step = 0; !warm || wants_more(n, began, STEP_SECONDS); step++) {
        if (step % WINDOW == 0)
            for (int i = 0; i < row->batch; i++) {
                kv_reset(kv, i);
                kv_append(kv, i, start);
            }
        if (!time_step(b, row->batch, tokens, &seconds, err)) return false;
        // Not the first of a window: no generation jumps back, and an engine that works ahead has worked in vain.
        if (warm && step % WINDOW != 0) samples[n++] = seconds;
        if (warm || step + 1 < WARM_UPS || clock_seconds() < b->settled) continue;
        warm = true;
        began = clock_seconds();
        step = -1; // and from the start of the window
    }
    row->seconds = figure_of(samples, n);
    row->work = (double)weights_read(b->m, row->batch) + kv_read(b->m, row->batch, start);
    return true;
}

// Starts the engine anew with a cache of that size, full of random numbers.
static bool start_with(Bench *b, int slots, int max_len, Error *err) {
    model_stop(b->m);
    double start = clock_seconds();
    if (!goes_on(b, err) || !model_start(b->m, b->o->engine, b->o->precision, slots, max_len, err)) return false;
    if (b->m->file.n_tensors && b->n_loads < MAX_LOADS) b->loads[b->n_loads++] = clock_seconds() - start;
    bool ok = b->machine->fill_cache(b->m, err);
    b->settled = clock_seconds() + SETTLE_SECONDS;
    return ok;
}

// All prompts with one cache, of the longest that there is memory for. What does not fit at all fails here.
static bool measure_prompts(Bench *b, Error *err) {
    bool started = false;
    for (int i = b->n_prompts; i >= 0 && !started; i--) {
        Row *row = i > 0 ? &b->prompts[i - 1] : &b->first;
        started = !row->why.text[0] && start_with(b, 1, row->length, &row->why);
    }
    if (!started) return fail(err, "%s", b->first.why.text);
    if (!time_prompt(b, FIRST_PROMPT, &b->first_time, err) || !measure_prompt(b, &b->first, err)) return false;
    for (int i = 0; i < b->n_prompts; i++)
        if (!b->prompts[i].why.text[0] && !measure_prompt(b, &b->prompts[i], err)) return false;
    return true;
}

// The rows of one context with one cache, of the largest batch that there is memory for.
static bool measure_context(Bench *b, Row *rows, int n, Error *err) {
    int longest = b->m->config.max_seq_len;
    int max_len = rows->length < longest - WINDOW ? rows->length + WINDOW : longest;
    while (n > 0) {
        Row *row = &rows[n - 1];
        if (!row->why.text[0] && start_with(b, row->batch, max_len, &row->why)) break;
        n--;
    }
    for (int i = 0; i < n; i++)
        if (!measure_steps(b, &rows[i], err)) return false;
    return goes_on(b, err);
}

static bool measure(Bench *b, Error *err) {
    if (!b->machine->measure(&b->yard, err) || !measure_prompts(b, err)) return false;
    for (int i = 0, n; i < b->n_steps; i += n) {
        for (n = 1; i + n < b->n_steps && b->steps[i + n].length == b->steps[i].length;) n++;
        if (!measure_context(b, &b->steps[i], n, err)) return false;
    }
    return true;
}

// ---- what is to be measured -----------------------------------------------------------------------------------------

static void add_row(Bench *b, Row *list, int *n, int length, int batch) {
    Row *row = &list[(*n)++];
    *row = (Row){.length = length, .batch = batch};
    int longest = b->m->config.max_seq_len;
    if (length > longest) fail(&row->why, "the model's longest context is %d", longest);
}

static bool plan(Bench *b, Error *err) {
    const Machine *machine = b->machine;
    const Config *c = &b->m->config;
    int context = b->o->context ? b->o->context : machine->contexts[0], n = 0;
    if (context > c->max_seq_len && b->o->context)
        return fail(err, "a context of %d tokens, the model's maximum is %d", context, c->max_seq_len);
    if (context < machine->contexts[0])
        return fail(err, "-c %d: --bench measures contexts from %d on", context, machine->contexts[0]);
    if (c->max_seq_len < machine->contexts[0])
        return fail(err, "--bench measures contexts from %d on, the model's longest is %d", machine->contexts[0],
                    c->max_seq_len);
    add_row(b, &b->first, &n, FIRST_PROMPT, 1);
    for (const int *at = machine->prompts; *at && (!b->o->context || *at <= context); at++)
        add_row(b, b->prompts, &b->n_prompts, *at, 1);
    for (const int *at = machine->contexts; *at && (!b->o->context || *at <= context); at++)
        for (const int *batch = machine->batches; *batch && (!b->o->batch || *batch <= b->o->batch); batch++)
            add_row(b, b->steps, &b->n_steps, *at, *batch);
    return true;
}

// ---- the result -----------------------------------------------------------------------------------------------------

static const char *precision_name(const Model *m) {
    return m->precision == PRECISION_F32 ? "f32" : "bf16";
}

static double share(const Row *row, const Figure *most) {
    return row->work / row->seconds.median / most->median;
}

static void json_text(FILE *out, const char *key, const char *text) {
    fprintf(out, "\"%s\": \"", key);
    for (; *text; text++) fprintf(out, *text == '"' || *text == '\\' ? "\\%c" : "%c", *text);
    fprintf(out, "\"");
}

static void json_figure(FILE *out, const char *key, Figure f, double unit) {
    fprintf(out, "\"%s\": {\"median\": %.6g, \"min\": %.6g, \"max\": %.6g, \"samples\": %d}", key, f.median / unit,
            f.least / unit, f.most / unit, f.n);
}

static void json_shape(const Bench *b, FILE *out) {
    const Config *c = &b->m->config;
    fprintf(out, "\"model\": {");
    if (b->o->synthetic)
        json_text(out, "synthetic", b->o->synthetic);
    else
        fprintf(out, "\"synthetic\": null");
    fprintf(out,
            ", \"dim\": %d, \"hidden_dim\": %d, \"n_layers\": %d, \"n_heads\": %d, \"n_kv_heads\": %d, \"head_dim\": "
            "%d, \"vocab_size\": %d, \"dtype\": \"%s\", \"weights_bytes\": %llu, \"step_bytes\": %llu},\n",
            c->dim, c->hidden_dim, c->n_layers, c->n_heads, c->n_kv_heads, c->head_dim, c->vocab_size,
            dtype_names[b->m->weights.dtype], (unsigned long long)b->m->weights.bytes,
            (unsigned long long)weights_read(b->m, 1));
}

static void json_prompt(const Bench *b, FILE *out, const Row *r) {
    fprintf(out, "  {\"tokens\": %d, ", r->length);
    if (r->seconds.n == 0) {
        json_text(out, "not_run", r->why.text);
    } else {
        json_figure(out, "ms", r->seconds, 1e-3);
        fprintf(out, ", \"tokens_s\": %.6g, \"tflop_s\": %.6g, \"share\": %.4f", r->length / r->seconds.median,
                r->work / r->seconds.median * 1e-12, share(r, &b->yard.product));
    }
    fprintf(out, "}");
}

static void json_step(const Bench *b, FILE *out, const Row *r) {
    fprintf(out, "  {\"context\": %d, \"batch\": %d, ", r->length, r->batch);
    if (r->seconds.n == 0) {
        json_text(out, "not_run", r->why.text);
    } else {
        json_figure(out, "ms", r->seconds, 1e-3);
        fprintf(out, ", \"ms_token\": %.6g, \"tokens_s\": %.6g, \"bytes\": %.0f, \"gb_s\": %.6g, \"share\": %.4f",
                r->seconds.median / r->batch * 1e3, r->batch / r->seconds.median, r->work,
                r->work / r->seconds.median * 1e-9, share(r, &b->yard.read));
    }
    fprintf(out, "}");
}

static void print_json(const Bench *b, const Figure *loads, FILE *out) {
    const Yardstick *y = &b->yard;
    fprintf(out, "{\"program\": \"llama %s\", \"engine\": \"%s\", \"precision\": \"%s\",\n", b->o->version,
            b->m->engine->name, precision_name(b->m));
    fprintf(out, " \"machine\": {");
    json_text(out, "name", y->name);
    fprintf(out, ", ");
    json_text(out, "software", y->software);
    fprintf(out, ", \"memory_bytes\": %llu},\n ", (unsigned long long)y->memory_bytes);
    json_shape(b, out);
    fprintf(out, " \"read\": {");
    json_figure(out, "gb_s", y->read, 1e9);
    fprintf(out, ", ");
    json_text(out, "how", y->read_how);
    fprintf(out, "},\n \"product\": {");
    json_figure(out, "tflop_s", y->product, 1e12);
    fprintf(out, ", ");
    json_text(out, "how", y->product_how);
    fprintf(out, "},\n \"load\": ");
    if (b->n_loads) {
        fprintf(out, "{\"first_ms\": %.6g, ", b->loads[0] * 1e3);
        json_figure(out, "ms", *loads, 1e-3);
        fprintf(out, ", \"gb_s\": %.6g},\n", (double)b->m->weights.bytes / loads->median * 1e-9);
    } else {
        fprintf(out, "null,\n");
    }
    fprintf(out, " \"first_token\": {\"tokens\": %d, \"first_ms\": %.6g, ", FIRST_PROMPT, b->first_time * 1e3);
    json_figure(out, "ms", b->first.seconds, 1e-3);
    fprintf(out, "},\n \"prefill\": [\n");
    for (int i = 0; i < b->n_prompts; i++, fprintf(out, i < b->n_prompts ? ",\n" : ""))
        json_prompt(b, out, &b->prompts[i]);
    fprintf(out, "],\n \"decode\": [\n");
    for (int i = 0; i < b->n_steps; i++, fprintf(out, i < b->n_steps ? ",\n" : "")) json_step(b, out, &b->steps[i]);
    fprintf(out, "]}\n");
}

static void print_head(const Bench *b, const Figure *loads, FILE *out) {
    const Yardstick *y = &b->yard;
    const Model *m = b->m;
    double unit = y->product.median < 1e12 ? 1e9 : 1e12;
    fprintf(out, "llama %s, engine %s, %s%s%s%s; %s, %s\n", b->o->version, m->engine->name, precision_name(m),
            m->not_used.text[0] ? " (" : "", m->not_used.text, m->not_used.text[0] ? ")" : "", y->name, y->software);
    fprintf(out, "%s%s%.3f GB of weights (%s), %.3f GB of them read by one step; medians [smallest, largest]\n\n",
            b->o->synthetic ? b->o->synthetic : "", b->o->synthetic ? ": " : "", (double)m->weights.bytes * 1e-9,
            dtype_names[m->weights.dtype], (double)weights_read(m, 1) * 1e-9);
    fprintf(out, "reading, at most      %10.1f GB/s [%.1f, %.1f]  %s\n", y->read.median * 1e-9, y->read.least * 1e-9,
            y->read.most * 1e-9, y->read_how);
    fprintf(out, "products, at most     %10.1f %s [%.1f, %.1f]  %s\n", y->product.median / unit,
            unit > 1e9 ? "TFLOP/s" : "GFLOP/s", y->product.least / unit, y->product.most / unit, y->product_how);
    if (b->n_loads)
        fprintf(out, "load                  %10.1f ms [%.1f, %.1f], %.1f GB/s; the first time %.1f ms\n",
                loads->median * 1e3, loads->least * 1e3, loads->most * 1e3,
                (double)m->weights.bytes / loads->median * 1e-9, b->loads[0] * 1e3);
    fprintf(out, "first token, of %2d    %10.2f ms [%.2f, %.2f]; the first time %.1f ms\n", FIRST_PROMPT,
            b->first.seconds.median * 1e3, b->first.seconds.least * 1e3, b->first.seconds.most * 1e3,
            b->first_time * 1e3);
}

static void print_rows(const Bench *b, FILE *out) {
    double unit = b->yard.product.median < 1e12 ? 1e9 : 1e12;
    char between[48];
    if (b->n_prompts)
        fprintf(out, "\n%16s %12s %-20s %14s %10s %8s\n", "prompt", "ms", "[smallest, largest]", "tokens/s",
                unit > 1e9 ? "TFLOP/s" : "GFLOP/s", "of peak");
    for (int i = 0; i < b->n_prompts; i++) {
        const Row *r = &b->prompts[i];
        if (r->seconds.n == 0) {
            fprintf(out, "%16d   not run: %s\n", r->length, r->why.text);
            continue;
        }
        snprintf(between, sizeof between, "[%.2f, %.2f]", r->seconds.least * 1e3, r->seconds.most * 1e3);
        fprintf(out, "%16d %12.2f %-20s %14.1f %10.1f %6.1f %%\n", r->length, r->seconds.median * 1e3, between,
                r->length / r->seconds.median, r->work / r->seconds.median / unit, 100 * share(r, &b->yard.product));
    }
    fprintf(out, "\n%10s %5s %12s %-20s %10s %10s %10s %8s\n", "context", "batch", "ms/step", "[smallest, largest]",
            "ms/token", "tokens/s", "GB/s", "of peak");
    for (int i = 0; i < b->n_steps; i++) {
        const Row *r = &b->steps[i];
        if (r->seconds.n == 0) {
            fprintf(out, "%10d %5d   not run: %s\n", r->length, r->batch, r->why.text);
            continue;
        }
        snprintf(between, sizeof between, "[%.3f, %.3f]", r->seconds.least * 1e3, r->seconds.most * 1e3);
        fprintf(out, "%10d %5d %12.3f %-20s %10.3f %10.1f %10.1f %6.1f %%\n", r->length, r->batch,
                r->seconds.median * 1e3, between, r->seconds.median / r->batch * 1e3, r->batch / r->seconds.median,
                r->work / r->seconds.median * 1e-9, 100 * share(r, &b->yard.read));
    }
}

bool bench_run(Model *m, const BenchOptions *o, FILE *out, const volatile sig_atomic_t *interrupted, Error *err) {
    if (!model_choose(m, o->engine, o->precision, err)) return false;
    Bench *b = calloc(1, sizeof *b);
    if (!b) return fail(err, "out of memory: the benchmark's rows");
    b->m = m;
    b->o = o;
    b->machine = m->engine->machine;
    b->interrupted = interrupted;
    bool ok = plan(b, err) && measure(b, err);
    show(b, NULL, NULL);
    if (ok) {
        Figure loads = {0}; // the first may have come from the disk
        int later = b->n_loads > 1;
        if (b->n_loads) loads = figure_of(b->loads + later, b->n_loads - later);
        if (o->json) {
            print_json(b, &loads, out);
        } else {
            print_head(b, &loads, out);
            print_rows(b, out);
        }
    }
    free(b);
    return ok;
}
