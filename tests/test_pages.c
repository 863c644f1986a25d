// The cache's pages under a model, on engine cpu: sequences whose pages are scattered, taken away and brought back, and
// shared give the bits that each gives alone; what there is no page for is refused. (test_kv_cache.c has the rules by
// which pages are given out; test_pages_cuda.cu the same on GPUs.)
#include "../model/file/checkpoint.h"
#include "../model/generate/generate.h"
#include "../model/model.h"
#include "check.h"

enum { SEQUENCES = 4, PROMPT = 200, STEPS = 70, LENGTH = PROMPT + SEQUENCES * 30 + STEPS };

static Model m;
static Error err;
static size_t logits_bytes;
static Precision precision;

static void end(const char *name) {
    char full[96];
    snprintf(full, sizeof full, "%s (%s)", name, precision == PRECISION_F32 ? "f32" : "bf16");
    test_end(full);
}

static void start(int slots, int max_len, uint64_t kv_memory) {
    err.text[0] = 0;
    CHECK(checkpoint_open(&m, "model/stories.bin", false, &err));
    m.kv_memory = kv_memory;
    if (!model_start(&m, "cpu", precision, slots, max_len, &err)) test_fail("%s", err.text);
    logits_bytes = (size_t)m.config.vocab_size * sizeof(float);
}

// Prompts and what follows them: of all sequences the first 150 ids are the same.
static int id_of(int sequence, int position) {
    unsigned x = (unsigned)position * 2654435761u + (position < 150 ? 0 : (unsigned)sequence + 1) * 40503u;
    return (int)((x >> 7) % (unsigned)m.config.vocab_size);
}

static int prompt_length(int sequence) {
    return PROMPT + 30 * sequence;
}

static bool prefill(int slot, int sequence, int from) {
    int ids[LENGTH], n = prompt_length(sequence);
    for (int i = 0; i < n; i++) ids[i] = id_of(sequence, i);
    return model_prefill(&m, slot, ids + from, n - from, 1, &err);
}

// Step k of a sequence after its prompt; its logits.
static bool decode(int slot, int sequence, int k, float *logits) {
    bool ok = model_decode(&m, slot, id_of(sequence, prompt_length(sequence) + k), &err);
    if (ok) memcpy(logits, m.logits, logits_bytes);
    return ok;
}

// Logits [SEQUENCES][STEPS] of each sequence alone, in a cache of its own.
static float *alone(void) {
    float *all = NULL, *at = NULL;
    for (int i = 0; i < SEQUENCES; i++) {
        start(1, LENGTH, 0);
        if (!all) at = all = malloc(SEQUENCES * STEPS * logits_bytes);
        CHECK(prefill(0, i, 0));
        for (int k = 0; k < STEPS; k++, at += m.config.vocab_size)
            if (!decode(0, i, k, at)) test_fail("%s", err.text);
        model_close(&m);
    }
    return all;
}

static void check_step(const float *want, int slot, int sequence, int k) {
    float *got = malloc(logits_bytes);
    if (!decode(slot, sequence, k, got))
        test_fail("sequence %d, step %d: %s", sequence, k, err.text);
    else if (memcmp(got, want + (size_t)(sequence * STEPS + k) * (size_t)m.config.vocab_size, logits_bytes) != 0)
        test_fail("sequence %d, step %d: other logits than alone", sequence, k);
    free(got);
}

// By turns, a step each: every sequence's pages lie between the others'.
static void test_pages_scattered(const float *want) {
    start(SEQUENCES, LENGTH, 0);
    for (int i = 0; i < SEQUENCES; i++) CHECK(prefill(SEQUENCES - 1 - i, i, 0));
    for (int k = 0; k < STEPS; k++)
        for (int i = 0; i < SEQUENCES; i++) check_step(want, SEQUENCES - 1 - i, i, k);
    for (int s = 0; s < SEQUENCES; s++) {
        const int *pages = kv_slot_pages(&m.kv, s);
        CHECK(pages[m.kv.held[s] - 1] != pages[0] + m.kv.held[s] - 1);
    }
    model_close(&m);
    end("test_pages_scattered");
}

// Two slots for four sequences: every few steps one of those that are there leaves, and one that is not takes its slot,
// from where it was. Lengths at which it happens are in the middle of pages, at their ends and after them.
static void test_pages_saved_and_restored(const float *want) {
    SavedPages saved[SEQUENCES] = {{0}};
    int next[SEQUENCES] = {0}, here[2] = {-1, -1}, turns = 0;
    bool begun[SEQUENCES] = {false};
    start(2, LENGTH, 0);
    for (int done = 0; done < SEQUENCES; turns++) {
        int slot = turns % 2, sequence = turns % SEQUENCES;
        if (next[sequence] == STEPS || here[1 - slot] == sequence) continue;
        if (here[slot] >= 0 && here[slot] != sequence) {
            int leaving = here[slot];
            CHECK(model_save_pages(&m, slot, &saved[leaving], &err));
            CHECK(saved[leaving].len == prompt_length(leaving) + next[leaving]);
            CHECK(saved[leaving].n == kv_pages(saved[leaving].len));
            CHECK(m.kv.len[slot] == 0 && m.kv.held[slot] == 0);
        }
        if (here[slot] != sequence && begun[sequence]) {
            CHECK(model_restore_pages(&m, slot, &saved[sequence], &err));
            CHECK(saved[sequence].n == 0 && saved[sequence].pages == NULL);
        } else if (!begun[sequence]) {
            CHECK(prefill(slot, sequence, 0));
            begun[sequence] = true;
        }
        here[slot] = sequence;
        CHECK(m.kv.len[slot] == prompt_length(sequence) + next[sequence]);
        for (int k = 0; k < 1 + turns % 9 && next[sequence] < STEPS; k++)
            check_step(want, slot, sequence, next[sequence]++);
        done += next[sequence] == STEPS;
    }
    CHECK(turns > 40);
    for (int i = 0; i < SEQUENCES; i++) model_free_pages(&m, &saved[i]); // of those that had ended when they left
    model_close(&m);
    end("test_pages_saved_and_restored");
}

// The first 150 ids are computed once, for the first sequence; the others take its two whole pages, compute the rest,
// also after it has gone, when one of them leaves with shared pages, and comes back.
static void test_pages_shared(const float *want) {
    SavedPages saved = {0};
    int ids[LENGTH];
    start(SEQUENCES, LENGTH, 0);
    CHECK(prefill(0, 0, 0));
    for (int i = 0; i < prompt_length(0); i++) ids[i] = id_of(0, i);
    kv_publish(&m.kv, 0, ids, prompt_length(0));
    for (int i = 1; i < SEQUENCES; i++) {
        for (int p = 0; p < prompt_length(i); p++) ids[p] = id_of(i, p);
        CHECK(kv_share(&m.kv, i, ids, prompt_length(i)) == 128);
        CHECK(prefill(i, i, 128));
    }
    for (int k = 0; k < 30; k++)
        for (int i = 0; i < SEQUENCES; i++) check_step(want, i, i, k);
    kv_reset(&m.kv, 0);
    CHECK(model_save_pages(&m, 2, &saved, &err));
    for (int k = 30; k < STEPS; k++) check_step(want, 1, 1, k);
    CHECK(model_restore_pages(&m, 0, &saved, &err));
    CHECK(kv_slot_pages(&m.kv, 0)[0] != kv_slot_pages(&m.kv, 1)[0]); // its own copies now
    for (int k = 30; k < STEPS; k++) check_step(want, 0, 2, k);
    kv_reset(&m.kv, 1);
    kv_reset(&m.kv, 3); // now nobody has the shared pages, and they are still there
    for (int p = 0; p < prompt_length(3); p++) ids[p] = id_of(3, p);
    CHECK(kv_share(&m.kv, 3, ids, prompt_length(3)) == 128 && prefill(3, 3, 128));
    for (int k = 0; k < STEPS; k++) check_step(want, 3, 3, k);
    model_close(&m);
    end("test_pages_shared");
}

// A cache of four pages: what does not fit is refused by a line, and what is there is as it was.
static void test_pages_run_out(void) {
    int ids[300] = {0}, rows[3] = {0, 1, 2}, slots[2] = {0, 1}, tokens[2] = {300, 301};
    SavedPages saved = {0};
    start(2, 300, 0);
    uint64_t page = model_page_bytes(&m);
    CHECK(m.kv.n_pages == 10 && page == cache_page_bytes(&m.config, precision == PRECISION_F32 ? 4 : 2) &&
          m.kv.bytes == 10 * page);
    model_close(&m);
    start(2, 300, 5 * page - 1);
    CHECK(m.kv.n_pages == 4 && m.kv.bytes == 4 * page && m.kv.max_len == 300);
    CHECK(!model_prefill(&m, 0, ids, 257, 1, &err) && strstr(err.text, "5 more needed, 4 of 4 are free"));
    CHECK(strstr(err.text, "--kv-memory") && m.kv.len[0] == 0 && kv_free_pages(&m.kv) == 4);
    err.text[0] = 0;
    CHECK(model_prefill(&m, 0, ids, 127, 1, &err) && model_prefill(&m, 1, ids, 128, 1, &err));
    Batch step = {2, 2, 2, 2, tokens, slots, rows, rows, false};
    CHECK(!model_forward(&m, &step, &err) && strstr(err.text, "1 more needed, 0 of 4 are free"));
    CHECK(m.kv.len[0] == 127 && m.kv.len[1] == 128); // neither was computed
    CHECK(model_save_pages(&m, 1, &saved, &err));
    err.text[0] = 0;
    CHECK(model_decode(&m, 0, 300, &err) && model_decode(&m, 0, 300, &err)); // the third page, from the other's two
    CHECK(kv_free_pages(&m.kv) == 1 && !model_restore_pages(&m, 1, &saved, &err) && saved.n == 2);
    CHECK(strstr(err.text, "2 needed, 1 of 4 are free"));
    err.text[0] = 0;
    kv_reset(&m.kv, 0);
    CHECK(model_restore_pages(&m, 1, &saved, &err) && m.kv.len[1] == 128);
    model_close(&m);
    CHECK(checkpoint_open(&m, "model/stories.bin", false, &err));
    m.kv_memory = page - 1;
    CHECK(!model_start(&m, "cpu", precision, 1, 300, &err) && strstr(err.text, "--kv-memory"));
    char least[64];
    snprintf(least, sizeof least, "expected at least %llu", (unsigned long long)page);
    CHECK(strstr(err.text, least));
    model_close(&m);
    end("test_pages_run_out");
}

int main(void) {
    static const Precision precisions[] = {PRECISION_F32, PRECISION_BF16};
    for (int i = 0; i < 2; i++) {
        precision = precisions[i];
        float *want = alone();
        test_pages_scattered(want);
        test_pages_saved_and_restored(want);
        test_pages_shared(want);
        test_pages_run_out();
        free(want);
    }
    return tests_summary();
}
