// The benchmark's own logic, on an engine and a machine that only count: medians, what a step reads, what does not fit,
// failures. (test_bench.py runs it on a real engine.)
#include <math.h>

#include "../model/measure/bench.h"
#include "../model/synthetic.h"
#include "check.h"

// ---- a machine with room for 600,000 positions, and an engine that computes nothing
// ----------------------------------

enum { ROOM = 600000 };

static struct {
    int opened, closed, filled, prompts, steps, draws, longest, not_finite_from, fail_from;
    int processes, no_process_of,
        interrupt_at; // of first prompts: started; tokens that fail; the one that is interrupted
    volatile sig_atomic_t interrupted;
} fake;

static bool usable(const Model *m, Error *err) {
    (void)m, (void)err;
    return true;
}

static bool open_engine(Model *m, Error *err) {
    long long positions = (long long)m->kv.n_slots * m->kv.max_len;
    if (positions > ROOM) return fail(err, "a \"cache\" of %lld positions, there is room for %d", positions, ROOM);
    if (!kv_init(&m->kv, m->kv.n_slots, m->kv.max_len, 0, err)) return false;
    m->kv.bytes = (uint64_t)m->kv.n_pages * KV_PAGE * 131072;
    fake.opened++;
    m->max_rows = 1 << 20;
    m->state = &fake;
    return true;
}

static void close_engine(Model *m) {
    if (m->state) fake.closed++;
    m->state = NULL;
}

static bool compute(Model *m, const Batch *b, Error *err) {
    for (int i = 0; i < b->n_seq; i++) {
        int len = m->kv.len[b->slot[i]] + b->start[i + 1] - b->start[i];
        if (len > fake.longest) fake.longest = len;
    }
    for (int i = 0; i < b->n_rows; i++)
        if (b->tokens[i] < 0 || b->tokens[i] >= m->config.vocab_size) return fail(err, "token %d", b->tokens[i]);
    for (int i = 0; i < b->n_logits; i++)
        m->argmax[i] = fake.not_finite_from && fake.steps >= fake.not_finite_from ? -1 : i;
    return true;
}

static bool forward(Model *m, const Batch *b, int first_logit, Error *err) {
    (void)first_logit;
    if (!b->n_decode) {
        fake.prompts++;
        return compute(m, b, err);
    }
    if (++fake.steps == fake.fail_from) return fail(err, "step %d broke", fake.steps);
    if (fake.fail_from < 0 && fake.steps == -fake.fail_from) fake.interrupted = 1;
    return compute(m, b, err);
}

static bool sample(Model *m, const SampleRow *rows, int n, int *ids, Error *err) {
    (void)err;
    for (int i = 0; i < n; i++) {
        CHECK(rows[i].row == i && rows[i].config->temperature > 0 && rows[i].u >= 0 && rows[i].u < 1);
        ids[i] = (m->argmax[i] + 1) % m->config.vocab_size;
    }
    fake.draws += n;
    return true;
}

static bool measure(Roofline *r, int gpus, Error *err) {
    r->gpus = gpus;
    (void)err;
    snprintf(r->name, sizeof r->name, "a \"machine\"");
    snprintf(r->software, sizeof r->software, "none");
    snprintf(r->read_how, sizeof r->read_how, "said");
    snprintf(r->product_how, sizeof r->product_how, "said");
    r->memory_bytes = (uint64_t)100 << 30;
    r->read = (Statistic){4e12, 4e12, 4e12, 1};
    r->product = (Statistic){8e14, 8e14, 8e14, 1};
    return true;
}

static bool fill(Model *m, Error *err) {
    (void)m, (void)err;
    fake.filled++;
    return true;
}

static bool fresh_prompt(void *context, int tokens, double *seconds, Error *err) {
    CHECK(context == &fake && fake.opened == fake.closed); // no engine holds memory meanwhile
    if (++fake.processes == fake.interrupt_at) fake.interrupted = 1;
    if (fake.interrupted) return fail_interrupted(err);
    if (tokens == fake.no_process_of) return fail(err, "a \"process\" of %d tokens", tokens);
    *seconds = 0.25 * (1 + fake.processes % 3);
    return true;
}

static const Platform platform = {
    measure, fill, {512, 2048, 8192, 32768}, {128, 2048, 8192, 32768, 131072}, {1, 2, 4, 8, 16, 64}};
static const Engine engine = {
    .name = "fake", .usable = usable, .open = open_engine, .close = close_engine, .forward = forward, .sample = sample};

static Model model;

// Runs the benchmark; what it printed, to be freed.
static char *bench(BenchOptions options, bool expected, Error *err) {
    char *text = NULL;
    size_t n;
    FILE *out = open_memstream(&text, &n);
    *err = (Error){""};
    fake.opened = fake.closed = fake.filled = fake.prompts = fake.steps = fake.draws = fake.longest = 0;
    fake.interrupted = 0;
    if (!synthetic_open(&model, "llama-3.1-8b", 0, err)) test_fail("%s", err->text);
    model.engine = &engine;
    model.interrupted = &fake.interrupted;
    options.version = "0";
    options.synthetic = "llama-3.1-8b";
    bool ok = bench_run(&model, &platform, &options, out, err);
    if (ok != expected) test_fail("%s: %s", ok ? "it passed" : "it failed", err->text);
    model_close(&model);
    fclose(out);
    CHECK(fake.opened == fake.closed);
    return text;
}

static int count(const char *text, const char *what) {
    int n = 0;
    for (; (text = strstr(text, what)); text += strlen(what)) n++;
    return n;
}

// ---- figures --------------------------------------------------------------------------------------------------------

static void test_bench_figures(void) {
    double odd[] = {5, 1, 9, 3, 7}, even[] = {4, 1, 2, 3}, one[] = {2};
    Statistic f = statistic_of(odd, 5);
    CHECK(f.median == 5 && f.least == 1 && f.most == 9 && f.n == 5);
    f = statistic_of(even, 4);
    CHECK(f.median == 2.5 && f.least == 1 && f.most == 4 && f.n == 4);
    f = statistic_of(one, 1);
    CHECK(f.median == 2 && f.least == 2 && f.most == 2 && f.n == 1);
    test_end("test_bench_figures");
}

static bool set_dtype(void *context, const Weight *w, Error *err) {
    (void)err;
    if (w->matrix) w->matrix->dtype = *(const DType *)context;
    return true;
}

// Counted by hand from the shapes: layers, head, and rows of an embedding table that is not the head.
static void test_bench_weights_read(void) {
    static const struct {
        const char *shape;
        double read; // elements
        int dim;     // of a row that each further sequence adds
    } cases[] = {{"llama-3.2-1b", 1235746816, 0},
                 {"llama-3.2-3b", 3212574720, 0},
                 {"llama-3.1-8b", 7504658432 + 4096, 4096},
                 {"llama-3.1-70b", 69501714432 + 8192, 8192},
                 {"smollm2-135m", 134479872, 0}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        for (int element = 2; element <= 4; element += 2) {
            Model m;
            DType dtype = element == 2 ? DTYPE_F16 : DTYPE_F32;
            Error err = {""};
            CHECK(synthetic_open(&m, cases[i].shape, 0, &err));
            CHECK(weights_visit(&m, set_dtype, &dtype, &err));
            double one = (double)weights_read(&m, 1), eight = (double)weights_read(&m, 8);
            if (one != cases[i].read * element) test_fail("%s: %.0f bytes", cases[i].shape, one);
            CHECK(eight - one == 7.0 * element * cases[i].dim);
            model_close(&m);
        }
    // Four scales a row; then one.
    Matrix coded = {.dtype = DTYPE_U8, .scale_dtype = DTYPE_BF16, .rows = 3, .cols = 100, .group = 32};
    CHECK(matrix_row_bytes(&coded) == 50 && matrix_bytes(&coded) == 3 * (50 + 4 * 2));
    coded = (Matrix){.dtype = DTYPE_I8, .scale_dtype = DTYPE_F32, .rows = 3, .cols = 100, .group = WHOLE_ROW};
    CHECK(matrix_row_bytes(&coded) == 100 && matrix_bytes(&coded) == 3 * (100 + 4));
    test_end("test_bench_weights_read");
}

// ---- a run ----------------------------------------------------------------------------------------------------------

static void test_bench_says_what_does_not_fit(void) {
    Error err;
    char *text = bench((BenchOptions){.json = true}, true, &err);
    CHECK(count(text, "\"tokens\": ") == 5 && count(text, "\"context\": ") == 30);
    // 32768 × 64, and 131072 × 8, 16, 64
    CHECK(count(text, "\"not_run\"") == 4);
    CHECK(
        strstr(text, "\"batch\": 64, \"not_run\": \"a \\\"cache\\\" of 2099200 positions, there is room for 600000\""));
    CHECK(strstr(text, "{\"context\": 131072, \"batch\": 8, \"not_run\": \"a \\\"cache\\\" of 1048576 positions"));
    CHECK(strstr(text, "{\"context\": 131072, \"batch\": 4, \"ms\": {\"median\": "));
    CHECK(strstr(text, "\"step_bytes\": 15009325056"));
    CHECK(strstr(text, "\"load\": null"));
    CHECK(fake.opened == 6 && fake.filled == 6); // one for prompts, and one for each context
    CHECK(fake.longest == 131072);               // the model's longest: no step goes beyond it
    // weights, four rows of the embedding, and 131072 bytes for each position: on average 144.5 of each sequence
    CHECK(strstr(text, "\"bytes\": 15085109248"));
    free(text);

    text = bench((BenchOptions){.json = false}, true, &err);
    CHECK(count(text, "not run: a \"cache\" of ") == 4 && strstr(text, "15.009 GB of them read by one step"));
    free(text);
    test_end("test_bench_says_what_does_not_fit");
}

static void test_bench_first_prompts_of_processes(void) {
    Error err;
    BenchOptions options = {.json = true, .context = 512, .batch = 1, .fresh_prompt = fresh_prompt};
    options.fresh_context = &fake;
    fake.no_process_of = 64;
    fake.processes = 0;
    char *text = bench(options, true, &err);
    CHECK(fake.processes == 3 + 3 + 1 + 3); // 1000 tokens are beyond -c
    CHECK(strstr(text, "\"first_prompt_of_a_process\": [\n  {\"tokens\": 1, \"ms\": {\"median\": 500, \"min\": 250, "
                       "\"max\": 750, \"samples\": 3}, \"warm_ms\": {\"median\": "));
    CHECK(strstr(text, "{\"tokens\": 64, \"not_run\": \"a \\\"process\\\" of 64 tokens\"},\n  {\"tokens\": 200, "));
    CHECK(count(text, "\"warm_ms\"") == 3 && count(text, "\"not_run\"") == 1);
    free(text);

    options.json = false;
    options.context = 0;
    text = bench(options, true, &err);
    const char *table = strstr(text, "\nfirst prompt of a process\n");
    CHECK(table && strstr(table, "\n              64   not run: a \"process\" of 64 tokens\n"));
    CHECK(table && strstr(table, "\n            1000       500.00 [250.00, 750.00]"));
    free(text);
    fake.no_process_of = 0;

    fake.processes = 0;
    fake.interrupt_at = 5;
    text = bench(options, false, &err);
    CHECK(strcmp(err.text, "interrupted") == 0 && fake.processes == 5 && fake.opened == 0 && !*text);
    free(text);
    fake.interrupt_at = 0;
    test_end("test_bench_first_prompts_of_processes");
}

static void test_bench_limits(void) {
    Error err;
    char *text = bench((BenchOptions){.json = true, .context = 2048, .batch = 5}, true, &err);
    CHECK(count(text, "\"tokens\": ") == 3 && count(text, "\"context\": ") == 6 && fake.opened == 3);
    CHECK(fake.longest == 2048 + 32);
    free(text);
    free(bench((BenchOptions){.context = 100}, false, &err));
    CHECK(strstr(err.text, "-c 100: --bench measures contexts from 128 on"));
    free(bench((BenchOptions){.context = 131073}, false, &err));
    CHECK(strstr(err.text, "a context of 131073 tokens, the model's maximum is 131072"));
    test_end("test_bench_limits");
}

// With a temperature every step's tokens are drawn, and the report says so; without, none are.
static void test_bench_draws_tokens(void) {
    Error err;
    BenchOptions options = {.json = true, .context = 128, .batch = 1};
    char *text = bench(options, true, &err);
    CHECK(fake.steps > 0 && fake.draws == 0 && !strstr(text, "sampling"));
    free(text);
    options.sampler = (SamplerConfig){.temperature = 0.5f, .top_k = 3, .top_p = 0.25f};
    text = bench(options, true, &err);
    CHECK(fake.steps > 0 && fake.draws == fake.steps);
    CHECK(strstr(text, "\"sampling\": {\"temperature\": 0.5, \"top_k\": 3, \"top_p\": 0.25, \"min_p\": 0},\n"));
    free(text);
    options.json = false;
    text = bench(options, true, &err);
    CHECK(strstr(text, "\ntokens are drawn at temperature 0.5, top-k 3, top-p 0.25, min-p 0\n"));
    free(text);
    test_end("test_bench_draws_tokens");
}

static void test_bench_failures_end_it(void) {
    Error err;
    fake.fail_from = 300;
    char *text = bench((BenchOptions){.json = true}, false, &err);
    CHECK(strcmp(err.text, "step 300 broke") == 0 && !*text);
    free(text);
    fake.fail_from = -300;
    text = bench((BenchOptions){.json = true}, false, &err);
    CHECK(strcmp(err.text, "interrupted") == 0 && fake.steps == 300 && !*text);
    free(text);
    fake.fail_from = 0;
    fake.not_finite_from = 1;
    text = bench((BenchOptions){.json = true}, false, &err);
    CHECK(strstr(err.text, "logits that are not finite after position 128") && !*text);
    free(text);
    fake.not_finite_from = 0;
    test_end("test_bench_failures_end_it");
}

int main(void) {
    test_bench_figures();
    test_bench_weights_read();
    test_bench_says_what_does_not_fit();
    test_bench_first_prompts_of_processes();
    test_bench_limits();
    test_bench_draws_tokens();
    test_bench_failures_end_it();
    return tests_summary();
}
