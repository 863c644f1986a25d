// Pages of a GPU's cache that are scattered, taken away, brought back and shared change no bit; how many there are.
#include "engine_check.cuh"

enum { PAGED = 5, PAGED_STEPS = 45, PAGED_LONGEST = 700 };

// Sequences that go on with the most likely token, so that steps run ahead. The first 300 ids of all prompts are alike.
struct Paged {
    Model m;
    size_t vocab;
    int lens[PAGED], tokens[PAGED][PAGED_LONGEST + 1]; // of the prompts; then what each takes alone
    float *alone;                                      // [PAGED][PAGED_STEPS][vocab]: logits of each alone

    float *logits_of(int sequence, int k) {
        return alone + ((size_t)sequence * PAGED_STEPS + (size_t)k) * vocab;
    }
    // Rows [from, end) of a prompt; the token after it.
    int prefill(int slot, int sequence, int from) {
        Error err = {""};
        if (!model_prefill(&m, slot, tokens[sequence] + from, lens[sequence] - from, 1, &err))
            test_fail("%s", err.text);
        return m.argmax[0];
    }
    // Starts with that memory, and has each sequence's logits from a run of its own in a cache of pages in order.
    bool begin(const char *shape) {
        static const int lengths[PAGED] = {300, 333, 384, 511, 640};
        alone = NULL;
        if (!start_shape(&m, shape, engine, PRECISION_BF16, 1, PAGED_LONGEST)) return false;
        vocab = (size_t)m.config.vocab_size;
        alone = (float *)malloc(PAGED * PAGED_STEPS * vocab * sizeof(float));
        int ids[PAGED_LONGEST], slot = 0;
        random_tokens(ids, PAGED_LONGEST, &m);
        for (int i = 0; i < PAGED; i++) {
            lens[i] = lengths[i];
            memcpy(tokens[i], ids, sizeof ids);
            for (int j = 300; j < lens[i]; j++) tokens[i][j] = (ids[j] + i) % m.config.vocab_size;
            kv_reset(&m.kv, 0);
            tokens[i][lens[i]] = prefill(0, i, 0);
            for (int k = 0; k < PAGED_STEPS; k++) {
                step(&m, 1, &slot, &tokens[i][lens[i] + k], logits_of(i, k));
                tokens[i][lens[i] + k + 1] = m.argmax[0];
            }
        }
        return true;
    }
    // The next steps of n sequences in these slots, which have had so many; as one batch or one by one.
    void check_steps(const char *what, int n, const int *slots, const int *sequences, int *next, bool together) {
        float *got = (float *)malloc((size_t)n * vocab * sizeof(float));
        int input[PAGED];
        for (int i = 0; i < n; i++) input[i] = tokens[sequences[i]][lens[sequences[i]] + next[sequences[i]]];
        for (int first = 0; first < n; first += together ? n : 1) {
            int count = together ? n : 1;
            step(&m, count, slots + first, input + first, got);
            for (int i = first; i < first + count; i++) {
                int sequence = sequences[i], k = next[sequence]++;
                if (memcmp(got + (size_t)(i - first) * vocab, logits_of(sequence, k), vocab * sizeof(float)) != 0)
                    test_fail("%s: sequence %d, step %d: other bits than alone", what, sequence, k);
            }
        }
        free(got);
    }
    void end() {
        free(alone);
        model_close(&m);
    }
};

// The pages of the slots lie between each other's, from the last to the first.
static void scatter(Model *m, int n, int len) {
    for (int i = n - 1; i >= 0; i--) kv_reset(&m->kv, i);
    for (int at = 1; at <= len; at += KV_PAGE)
        for (int i = n - 1; i >= 0; i--)
            if (!kv_reserve(&m->kv, i, at)) test_fail("no page for position %d of slot %d", at, i);
}

static void pages_scattered(const char *shape) {
    Paged p;
    if (p.begin(shape)) {
        Error err = {""};
        int slots[PAGED], all[PAGED], next[PAGED] = {0};
        model_stop(&p.m);
        if (!model_start(&p.m, engine, PRECISION_BF16, PAGED, PAGED_LONGEST, &err)) test_fail("%s", err.text);
        scatter(&p.m, PAGED, PAGED_LONGEST);
        for (int i = 0; i < PAGED; i++) {
            slots[i] = (i * 3 + 1) % PAGED;
            all[i] = i;
            if (p.prefill(slots[i], i, 0) != p.tokens[i][p.lens[i]]) test_fail("sequence %d: another token", i);
        }
        for (int k = 0; k < PAGED_STEPS; k++)
            p.check_steps("scattered", PAGED, slots, all, next, strcmp(engine, "fused") == 0);
    }
    p.end();
}

// Two slots, and pages for two sequences, for five: every few steps one leaves or two change slots, mostly while a step
// runs ahead of them. (Engine cublas decodes one by one: its bits depend on the number of rows.)
static void pages_saved_and_restored(const char *shape) {
    Paged p;
    if (p.begin(shape)) {
        Error err = {""};
        SavedPages saved[PAGED] = {};
        bool begun[PAGED] = {};
        int slots[2] = {1, 0}, here[2] = {-1, -1}, next[PAGED] = {0}, done = 0;
        model_stop(&p.m);
        p.m.kv_memory = 2 * (uint64_t)kv_pages(PAGED_LONGEST) * cache_page_bytes(&p.m.config, 2);
        if (!model_start(&p.m, engine, PRECISION_BF16, 2, PAGED_LONGEST, &err)) test_fail("%s", err.text);
        CHECK(p.m.kv.n_pages == 2 * kv_pages(PAGED_LONGEST));
        auto leave = [&](int at) {
            if (here[at] >= 0 && !model_save_pages(&p.m, slots[at], &saved[here[at]], &err)) test_fail("%s", err.text);
            CHECK(p.m.kv.held[slots[at]] == 0);
        };
        auto enter = [&](int at, int sequence) {
            if (!begun[sequence])
                p.prefill(slots[at], sequence, 0);
            else if (!model_restore_pages(&p.m, slots[at], &saved[sequence], &err))
                test_fail("%s", err.text);
            begun[sequence] = true;
            here[at] = sequence;
        };
        for (int turn = 0; done < PAGED - 1 && turn < 500; turn++) {
            int at = turn % 2, sequence = turn % PAGED;
            if (turn % 7 == 3 && here[0] >= 0 && here[1] >= 0) { // the two change slots, with no step between
                int first = here[0], second = here[1];
                leave(0);
                leave(1);
                enter(0, second);
                enter(1, first);
            } else if (next[sequence] < PAGED_STEPS && here[1 - at] != sequence && here[at] != sequence) {
                leave(at);
                enter(at, sequence);
            }
            if (here[0] < 0 || here[1] < 0) continue;
            for (int k = 0; k < 1 + turn % 6; k++)
                if (next[here[0]] < PAGED_STEPS && next[here[1]] < PAGED_STEPS)
                    p.check_steps("saved and restored", 2, slots, here, next, strcmp(engine, "fused") == 0);
            done = 0;
            for (int i = 0; i < PAGED; i++) done += next[i] == PAGED_STEPS;
        }
        CHECK(done >= PAGED - 1);
        for (int i = 0; i < PAGED; i++) model_free_pages(&p.m, &saved[i]);
    }
    p.end();
}

// The first 256 ids are computed once. Sequences that share their pages have the bits of a run alone, also after the
// one that computed them has gone.
static void pages_shared(const char *shape) {
    Paged p;
    if (p.begin(shape)) {
        Error err = {""};
        int all[PAGED] = {0, 1, 2, 3, 4}, next[PAGED] = {0};
        model_stop(&p.m);
        if (!model_start(&p.m, engine, PRECISION_BF16, PAGED, PAGED_LONGEST, &err)) test_fail("%s", err.text);
        for (int round = 0; round < 2; round++) { // then from pages that no slot has
            memset(next, 0, sizeof next);
            for (int i = 0; i < PAGED; i++) {
                int shared = kv_share(&p.m.kv, i, p.tokens[i], p.lens[i]);
                int own = round ? (p.lens[i] - 1) / KV_PAGE * KV_PAGE : i == 0 ? 0 : 256;
                if (shared != own) test_fail("sequence %d takes %d positions, expected %d", i, shared, own);
                if (p.prefill(i, i, shared) != p.tokens[i][p.lens[i]]) test_fail("sequence %d: another token", i);
                kv_publish(&p.m.kv, i, p.tokens[i], p.lens[i]);
            }
            for (int k = 0; k < PAGED_STEPS; k++) p.check_steps("shared", PAGED, all, all, next, true);
            for (int i = 0; i < PAGED; i++) kv_reset(&p.m.kv, i);
        }
    }
    p.end();
}

static const char *const paged_shapes[] = {NULL, "llama-3.2-1b"};

static void test_pages_scattered_have_the_same_bits(void) {
    for (const char *shape : paged_shapes) pages_scattered(shape);
    end("pages_scattered_have_the_same_bits");
}

static void test_pages_saved_and_restored_have_the_same_bits(void) {
    for (const char *shape : paged_shapes) pages_saved_and_restored(shape);
    end("pages_saved_and_restored_have_the_same_bits");
}

static void test_pages_shared_have_the_same_bits(void) {
    for (const char *shape : paged_shapes) pages_shared(shape);
    end("pages_shared_have_the_same_bits");
}

// Where memory does not hold all contexts whole there are fewer pages, and a sequence still has a whole one.
static void test_memory_for_pages(void) {
    Model m;
    Error err = {""};
    uint64_t page = 0;
    if (start(&m, engine, PRECISION_BF16, 4, 1000)) {
        page = model_page_bytes(&m);
        CHECK(m.kv.n_pages == 4 * 16 && m.kv.bytes == 64 * page && page == cache_page_bytes(&m.config, 2));
    }
    model_close(&m);
    if (start_shape(&m, NULL, engine, PRECISION_BF16, 4, 1000, 20 * page + page / 2)) {
        int token = 300;
        CHECK(m.kv.n_pages == 20 && m.kv.max_len == 1000 && model_prefill(&m, 3, &token, 1, 1, &err));
        CHECK(kv_free_pages(&m.kv) == 19);
    }
    model_close(&m);
    CHECK(checkpoint_open(&m, "model/stories.bin", false, &err));
    m.kv_memory = page - 1;
    CHECK(!model_start(&m, engine, PRECISION_BF16, 4, 1000, &err) && strstr(err.text, "expected at least"));
    model_close(&m);
    if (start(&m, engine, PRECISION_BF16, MAX_SLOTS, 1 << 22)) {
        size_t free_bytes = 0, total = 0;
        cudaMemGetInfo(&free_bytes, &total);
        CHECK(m.kv.n_pages >= m.kv.table_width && m.kv.n_pages < MAX_SLOTS * m.kv.table_width);
        CHECK(free_bytes > (size_t)500 << 20 && free_bytes < (size_t)1100 << 20); // about 1 GB is left
    }
    model_close(&m);
    end("memory_for_pages");
}

int main(void) {
    static const EngineTest tests[] = {
        {"memory_for_pages", test_memory_for_pages},
        {"pages_scattered_have_the_same_bits", test_pages_scattered_have_the_same_bits},
        {"pages_saved_and_restored_have_the_same_bits", test_pages_saved_and_restored_have_the_same_bits},
        {"pages_shared_have_the_same_bits", test_pages_shared_have_the_same_bits, FUSED}};
    return run_with_both_engines(tests);
}
