// The parts of a model that N GPUs have; all on one, if the machine has fewer: what each computes, what they gather and
// in which order is the same. test_shard.c has the cuts.
#include "engine_check.cuh"

enum { TRACE_STEPS = 14, TRACE_SEQUENCES = 40 };

// The logits of a run, in the order in which they come, and keys and values: compared with those of another, or kept;
// and its tokens, which the others take.
struct Trace {
    float *logits;
    char *pages; // as SavedPages has them, one after another
    int tokens[TRACE_STEPS][TRACE_SEQUENCES];
    size_t n, at;
    bool compares;
    double error, size; // sums of squares, of differences and of what was expected
    bool same;
    char logits_differ[128], pages_differ[128]; // where first: of a product before the last, both do

    void begin(bool compare) {
        compares = compare;
        at = 0;
        error = size = 0;
        same = true;
        logits_differ[0] = pages_differ[0] = 0;
    }
    // what, number: what was computed.
    void add(const Model *m, int rows, const char *what, int number) {
        size_t count = (size_t)rows * (size_t)m->config.vocab_size;
        if (!compares) {
            logits = (float *)realloc(logits, (at + count) * sizeof *logits);
            n = at + count;
            memcpy(logits + at, m->logits, count * sizeof *logits);
        } else if (at + count > n) {
            same = false;
        } else {
            for (size_t i = 0; i < count; i++) {
                if (memcmp(logits + at + i, m->logits + i, sizeof *logits) != 0 && same) {
                    const int vocab = m->config.vocab_size;
                    snprintf(logits_differ, sizeof logits_differ, "; %s %d, row %d of %d, from logit %d on", what,
                             number, (int)i / vocab, rows, (int)i % vocab);
                    same = false;
                }
                double d = (double)m->logits[i] - (double)logits[at + i];
                error += d * d;
                size += (double)logits[at + i] * (double)logits[at + i];
            }
        }
        at += count;
    }
    // Keys and values in bf16, of a sequence that has left. (A layer's depend on all products of the layers before.)
    void add_pages(const Model *m, const SavedPages *saved) {
        const Config *c = &m->config;
        const size_t row = (size_t)c->head_dim * 2, layer = kv_page_elements(c->n_kv_heads, c->head_dim) * 2,
                     page = 2 * (size_t)c->n_layers * layer;
        if (!compares) pages = (char *)calloc((size_t)saved->n, page);
        for (int i = 0; i < saved->n && !compares; i++) memcpy(pages + (size_t)i * page, saved->pages[i], page);
        for (int l = 0; l < c->n_layers; l++)
            for (int pos = 0; pos < saved->len; pos++)
                for (int k = 0; k < 2 * c->n_kv_heads; k++) {
                    const bool value = k >= c->n_kv_heads;
                    const size_t at = (size_t)(value * c->n_layers + l) * layer +
                                      (size_t)(k % c->n_kv_heads * KV_PAGE + pos % KV_PAGE) * row;
                    if (memcmp(pages + (size_t)(pos / KV_PAGE) * page + at, (char *)saved->pages[pos / KV_PAGE] + at,
                               row) == 0 ||
                        pages_differ[0])
                        continue;
                    snprintf(pages_differ, sizeof pages_differ, "; %s of layer %d, head %d, position %d of %d",
                             value ? "values" : "keys", l, k % c->n_kv_heads, pos, saved->len);
                }
    }
};

// `slots` sequences with prompts of other lengths, in parts; steps that go on with what the model takes, so that graphs
// replay and steps run ahead; in the middle a sequence that leaves for host memory and comes back and, but with 8
// sequences, which have no slot beside them, a step beside a prompt. All logits go to the trace.
static void run_of_shards(const char *shape, Precision precision, int slots, int gpus, bool gathers_only,
                          Trace *trace) {
    enum { STEPS = TRACE_STEPS, LONGEST = 700, MOST = TRACE_SEQUENCES };
    const bool beside = slots != 8; // a ninth would give the run another order of sums
    static const int lengths[] = {1, 65, 3, 300, 17, LONGEST, 2, 128};
    Model m;
    Error err = {""};
    SavedPages saved = {};
    int tokens[LONGEST], batch[MOST + 50], slot[MOST + 1], rows[MOST + 2], start_at[MOST + 2];
    if (start_shape(&m, shape, engine, precision, slots + beside, LONGEST + STEPS + 8, 0, gpus, gathers_only)) {
        auto compute = [&](const Batch &b, const char *what, int number) {
            if (!model_forward(&m, &b, &err) || !m.engine->read_logits(&m, &err)) {
                test_fail("%s: %s %d: %s", called(shape), what, number, err.text);
                return;
            }
            trace->add(&m, b.n_logits, what, number);
            for (int i = 0; i < b.n_logits; i++)
                CHECK(m.argmax[i] == argmax(m.logits + (size_t)i * m.config.vocab_size, m.config.vocab_size));
        };
        random_tokens(tokens, LONGEST, &m);
        for (int i = 0; i <= slots; i++) slot[i] = i, rows[i] = start_at[i] = i;
        for (int i = 0; i < slots && !err.text[0]; i++) {
            int n = lengths[(i + 5) % 8], cut = n / 3, last = n - cut - 1, start[2] = {0, n - cut}, at = slot[i];
            if (cut && !model_prefill(&m, at, tokens, cut, i % 2, &err)) test_fail("%s", err.text);
            compute({n - cut, 1, 1, 0, tokens + cut, &at, start, &last, false}, "prompt", i);
            if (!trace->compares) trace->tokens[0][i] = m.argmax[0];
        }
        for (int k = 0; k < STEPS && !err.text[0]; k++) {
            memcpy(batch, trace->tokens[k], (size_t)slots * sizeof(int));
            if (k == 8) { // sequence 0 leaves, and comes back
                CHECK(model_save_pages(&m, 0, &saved, &err) && m.kv.held[0] == 0);
                cudaDeviceSynchronize(); // the pages are on their way
                if (precision != PRECISION_F32) trace->add_pages(&m, &saved);
                CHECK(model_restore_pages(&m, 0, &saved, &err));
            }
            if (k == 10 && beside) { // a prompt, whose last two rows have logits
                for (int i = 0; i < 50; i++) batch[slots + i] = tokens[i];
                rows[slots] = slots + 48, rows[slots + 1] = slots + 49;
                start_at[slots + 1] = slots + 50;
                compute({slots + 50, slots + 1, slots + 2, slots, batch, slot, start_at, rows, false},
                        "a prompt beside step", k);
                kv_reset(&m.kv, slots);
            } else
                compute({slots, slots, slots, slots, batch, slot, start_at, rows, false}, "step", k);
            if (!trace->compares && k + 1 < STEPS) memcpy(trace->tokens[k + 1], m.argmax, (size_t)slots * sizeof(int));
        }
        model_free_pages(&m, &saved);
    }
    model_close(&m);
}

static void check_shards(const char *shape, Precision precision, int slots, int most) {
    Trace trace = {};
    const bool fused = strcmp(engine, "fused") == 0, exact = fused && precision != PRECISION_F32;
    const double bound = precision == PRECISION_F32 ? 1e-4 : 0.03; // of other orders of sums
    for (int gpus = 1; gpus <= most && !test_failure[0]; gpus *= 2)
        for (bool gathers_only : {false, true}) {
            if (gathers_only && (!fused || gpus != 2)) continue;
            trace.begin(gpus > 1);
            run_of_shards(shape, precision, slots, gpus, gathers_only, &trace);
            if (test_failure[0]) break;
            if (trace.at != trace.n)
                test_fail("%s, %d GPUs: %zu logits, expected %zu", called(shape), gpus, trace.at, trace.n);
            else if (exact ? !trace.same : !(trace.error <= bound * bound * trace.size) && gpus > 1)
                test_fail("%s, %s, %d sequences, %d GPUs%s: other logits than one GPU's, %.2g of their size off%s%s",
                          called(shape), precision_names[precision], slots, gpus, gathers_only ? ", which gather" : "",
                          sqrt(trace.error / trace.size), trace.logits_differ, trace.pages_differ);
        }
    free(trace.logits);
    free(trace.pages);
}

static void test_shards_have_the_bits_of_one_gpu(void) {
    static const struct {
        const char *shape;
        int most;
        bool large; // fewer runs, of the sizes that have kernels of their own: wide.h takes 16-bit weights of them
    } shapes[] = {{NULL, 2, false},
                  {"odd", 8, false},
                  {"stories fp8/fp8", 2, false},
                  {"odd int8+fp8+bf16/int8", 8, false},
                  {"odd int4:32+int8:64/int4:128", 8, false},
                  {"llama-3.2-1b", 4, true},
                  {"llama-3.1-8b", 2, true},
                  {"llama-3.1-8b int4/int8", 2, true}};
    for (const auto &shape : shapes) {
        for (int slots : {1, 8, 12, 20, 40})
            if (!shape.large || (slots != 8 && slots != 40))
                check_shards(shape.shape, PRECISION_BF16, slots, shape.most);
        check_shards(shape.shape, PRECISION_F32, 1, shape.most);
        if (!shape.large) check_shards(shape.shape, PRECISION_F32, 8, shape.most);
    }
    for (int slots : {1, 12, 40})
        if (has_fp8) check_shards("stories fp8/fp8", PRECISION_FP8, slots, 2);
    if (has_fp8) check_shards("llama-3.2-1b fp8", PRECISION_FP8, 12, 4);
    end("shards_have_the_bits_of_one_gpu");
}

// Bytes that this process has read of files; 0: the system does not say.
static unsigned long long bytes_read(void) {
    unsigned long long bytes = 0;
    FILE *f = fopen("/proc/self/io", "r");
    if (f && fscanf(f, "rchar: %llu", &bytes) != 1) bytes = 0;
    if (f) fclose(f);
    return bytes;
}

// However many GPUs there are, also of what all of them have (embeddings, norms).
static void test_shards_read_every_byte_once(void) {
    unsigned long long once = 0, slack = 256 << 10; // the driver reads, too
    if (bytes_read() == 0) test_fail("/proc/self/io does not say what was read");
    for (int gpus : {1, 1, 2}) { // the first start loads libraries
        Model m;
        unsigned long long before = bytes_read();
        if (start_shape(&m, NULL, engine, PRECISION_BF16, 1, 64, 0, gpus)) {
            unsigned long long bytes = bytes_read() - before;
            if (gpus == 2 && (bytes > once + slack || bytes + slack < once))
                test_fail("%llu bytes on 2 GPUs, %llu on one", bytes, once);
            once = bytes;
        }
        model_close(&m);
    }
    end("shards_read_every_byte_once");
}

// A model that does not fit: the message says on how many GPUs it would; on more, with what there is, it starts.
static void test_message_says_how_many_gpus_would_do(void) {
    const uint64_t limit = 3100000000;
    Model m;
    for (int gpus : {1, 2}) {
        Error err = {""};
        CHECK(open_model(&m, "llama-3.1-8b", &err)); // 2.97 GB of weights, 2.01 GB each on two
        m.gpus = gpus;
        m.one_gpu = true;
        m.gpu_memory = limit * (uint64_t)gpus; // of one that has the parts of two
        bool ok = model_start(&m, engine, PRECISION_BF16, 1, 64, &err);
        if (gpus == 1 && (ok || !strstr(err.text, "; on 2 GPUs it would fit (--gpus 2)"))) test_fail("%s", err.text);
        if (gpus == 2 && !ok) test_fail("%s", err.text);
        model_close(&m);
    }
    Error err = {""};
    CHECK(open_model(&m, "llama-3.2-1b", &err));
    m.gpus = 8;
    if (n_gpus < 8 &&
        (model_start(&m, engine, PRECISION_BF16, 1, 64, &err) || !strstr(err.text, "--gpus 8: this machine has ")))
        test_fail("%s", err.text);
    model_close(&m);
    end("message_says_how_many_gpus_would_do");
}

int main(void) {
    static const EngineTest tests[] = {
        {"shards_have_the_bits_of_one_gpu", test_shards_have_the_bits_of_one_gpu},
        {"shards_read_every_byte_once", test_shards_read_every_byte_once},
        {"message_says_how_many_gpus_would_do", test_message_says_how_many_gpus_would_do}};
    return run_with_both_engines(tests);
}
