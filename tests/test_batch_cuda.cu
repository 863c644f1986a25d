// Sequences side by side on a GPU: a row has the bits that it has alone, whatever is computed beside it, and whether or
// not its step ran ahead; tokens that are drawn on the GPU.
#include "engine_check.cuh"
extern "C" {
#include "../model/generate/sampler.h"
}

// A sequence gets the same bits alone and among others of other lengths, in a run of few sequences and in one of many,
// whose steps have another order of sums. (Engine fused promises this.)
// LLaMA's shapes: weights in tiles of several sizes.
static void same_bits_among(int slots, const char *shape, Precision precision) {
    enum { LONGEST = 150, STEPS = 6, MOST = 40 };
    static const int counts[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 17, 40};
    Model m;
    Error err = {""};
    if (start_shape(&m, shape, engine, precision, slots, LONGEST + STEPS)) {
        size_t vocab = (size_t)m.config.vocab_size, bytes = vocab * sizeof(float);
        float *alone = (float *)malloc((size_t)slots * STEPS * bytes), *among = (float *)malloc((size_t)slots * bytes);
        int tokens[LONGEST + STEPS], all[MOST], lens[MOST], next[MOST];
        random_tokens(tokens, LONGEST + STEPS, &m);
        for (int i = 0; i < slots; i++) lens[i] = 1 + i * (LONGEST - 2) / (slots - 1), all[i] = i;
        for (int n : counts) {
            if (n > slots || (slots > 8 && n > 1 && n < 8)) continue;
            for (int i = 0; i < slots; i++) {
                kv_reset(&m.kv, i);
                if (!model_prefill(&m, i, tokens, lens[i], 1, &err)) test_fail("%s", err.text);
            }
            for (int k = 0; k < STEPS; k++)
                for (int first = 0; first < slots; first += n) {
                    int count = slots - first < n ? slots - first : n;
                    for (int i = 0; i < count; i++) next[i] = tokens[lens[first + i] + k];
                    step(&m, count, all + first, next, among);
                    for (int i = 0; i < count; i++) {
                        float *reference = alone + ((size_t)k * (size_t)slots + (size_t)(first + i)) * vocab;
                        if (n == 1)
                            memcpy(reference, among + (size_t)i * vocab, bytes);
                        else if (memcmp(reference, among + (size_t)i * vocab, bytes) != 0)
                            test_fail("%s, %s, %d slots: sequence %d, step %d: other bits among %d", called(shape),
                                      precision_names[precision], slots, first + i, k, count);
                    }
                }
        }
        free(alone);
        free(among);
    }
    model_close(&m);
}

static void test_same_bits_alone_and_among_others(void) {
    const char *const shapes[] = {NULL,
                                  "llama-3.2-1b",
                                  "llama-3.1-8b",
                                  "stories fp8/fp8",
                                  "stories int4:32/int8",
                                  "small int4:128/int8:64",
                                  "llama-3.2-1b int8:32+bf16+int4:128/int8",
                                  "llama-3.1-8b fp8/fp8",
                                  "llama-3.1-8b int4/int8"};
    for (const char *shape : shapes) {
        same_bits_among(8, shape, PRECISION_BF16);
        same_bits_among(8, shape, PRECISION_F32);
        same_bits_among(16, shape, PRECISION_BF16);
        same_bits_among(32, shape, PRECISION_BF16);
        same_bits_among(40, shape, PRECISION_BF16);
    }
    for (int slots : {8, 16, 40})
        if (has_fp8) same_bits_among(slots, "stories fp8/fp8", PRECISION_FP8);
    if (has_fp8) same_bits_among(8, "llama-3.1-8b fp8", PRECISION_FP8);
    end("same_bits_alone_and_among_others");
}

// A prompt gets the same bits alone, cut in two, and in one batch with others, which is itself computed in parts: the
// logits of its last token and, for what it left in the cache, of a step after it.
static void test_prompts_have_the_same_bits_in_any_batch(void) {
    static const struct {
        const char *shape;
        Precision precision;
    } models[] = {{NULL, PRECISION_BF16},
                  {"llama-3.2-1b", PRECISION_BF16},
                  {"llama-3.1-8b", PRECISION_BF16},
                  {"stories int4:128/int8", PRECISION_BF16},
                  {"llama-3.2-1b int8+int4+fp8/int8:64", PRECISION_BF16},
                  {"stories fp8/fp8", PRECISION_FP8},
                  {"llama-3.1-8b fp8", PRECISION_FP8}};
    enum { SEQUENCES = 20, LONGEST = 900 };
    static const int more[] = {300, 257, 256, 255, 2, 640};
    for (const auto &model : models) {
        const char *shape = model.shape;
        Model m;
        Error err = {""};
        if (model.precision == PRECISION_FP8 && !has_fp8) continue;
        if (start_shape(&m, shape, engine, model.precision, SEQUENCES, LONGEST + 1)) {
            size_t vocab = (size_t)m.config.vocab_size, bytes = vocab * sizeof(float);
            float *alone = (float *)malloc(2 * SEQUENCES * bytes), *one = (float *)malloc(SEQUENCES * bytes);
            int tokens[LONGEST + 1], slots[SEQUENCES], lens[SEQUENCES], last[SEQUENCES], start_at[SEQUENCES + 1] = {0};
            int *batch = (int *)malloc(SEQUENCES * LONGEST * sizeof(int)), n_rows = 0;
            random_tokens(tokens, LONGEST + 1, &m);
            for (int i = 0; i < SEQUENCES; i++) {
                lens[i] = i < 6 ? more[i] : 1 + i * (LONGEST - 1) / (SEQUENCES - 1);
                slots[i] = (i * 7 + 3) % SEQUENCES;
                memcpy(batch + n_rows, tokens, (size_t)lens[i] * sizeof(int));
                start_at[i + 1] = n_rows += lens[i];
                last[i] = n_rows - 1;
            }
            for (int how = 0; how < 3; how++) { // alone, cut, together
                for (int i = 0; i < SEQUENCES; i++) kv_reset(&m.kv, i);
                Batch together = {n_rows, SEQUENCES, SEQUENCES, 0, batch, slots, start_at, last, false};
                if (how == 2 && (!model_forward(&m, &together, &err) || !m.engine->read_logits(&m, &err)))
                    test_fail("%s", err.text);
                for (int i = 0; i < SEQUENCES; i++) {
                    const float *row = how == 2 ? m.logits + (size_t)i * vocab : m.logits;
                    int cut = how == 1 ? lens[i] / 3 : 0;
                    if (how < 2 && ((cut && !model_prefill(&m, slots[i], tokens, cut, 0, &err)) ||
                                    !model_prefill(&m, slots[i], tokens + cut, lens[i] - cut, 1, &err) ||
                                    !m.engine->read_logits(&m, &err)))
                        test_fail("%s", err.text);
                    if (how == 0)
                        memcpy(alone + (size_t)i * vocab, row, bytes);
                    else if (memcmp(alone + (size_t)i * vocab, row, bytes) != 0)
                        test_fail("%s: prompt of %d tokens: other bits %s", called(shape), lens[i],
                                  how == 1 ? "cut in two" : "among others");
                }
                for (int i = 0; i < SEQUENCES; i++) {
                    step(&m, 1, slots + i, tokens + lens[i], one);
                    if (how == 0)
                        memcpy(alone + (size_t)(SEQUENCES + i) * vocab, one, bytes);
                    else if (memcmp(alone + (size_t)(SEQUENCES + i) * vocab, one, bytes) != 0)
                        test_fail("%s: step after %d tokens: other bits %s", called(shape), lens[i],
                                  how == 1 ? "cut in two" : "among others");
                }
            }
            free(alone);
            free(one);
            free(batch);
        }
        model_close(&m);
    }
    end("prompts_have_the_same_bits_in_any_batch");
}

// What a step of many rows computes is, but for rounding, what the prompt with these tokens at its end does: in bf16,
// of sequences of other lengths, for steps of every order of sums.
static void test_steps_of_many_rows_continue_prompts(void) {
    enum { MOST = 80, LONGEST = 200 };
    static const int counts[] = {2, 3, 8, 9, 16, 31, 64, 80};
    const char *const shapes[] = {NULL,
                                  "llama-3.2-1b",
                                  "llama-3.1-8b",
                                  "stories fp8/fp8",
                                  "stories int4:32/int8",
                                  "llama-3.2-1b int4/int8",
                                  "llama-3.1-8b fp8+int4:64+int8+bf16/int8"};
    for (const char *shape : shapes)
        for (int n : counts) {
            // A prompt's weights with a scale for each group are rounded to bf16,
            // each by 0.16 % in the root mean square.
            const double bound = shape && strstr(shape, "int4") ? 0.04 : 0.02;
            Model m;
            Error err = {""};
            if (start_shape(&m, shape, engine, PRECISION_BF16, n, LONGEST + 1)) {
                size_t vocab = (size_t)m.config.vocab_size;
                float *whole = (float *)malloc((size_t)n * vocab * sizeof(float)),
                      *rows = (float *)malloc((size_t)n * vocab * sizeof(float));
                int tokens[LONGEST + 1], slots[MOST], next[MOST];
                double error = 0, all = 0;
                random_tokens(tokens, LONGEST + 1, &m);
                for (int i = 0; i < n; i++) {
                    int len = 1 + i * 37 % LONGEST;
                    slots[i] = n - 1 - i;
                    next[i] = tokens[len];
                    if (!model_prefill(&m, slots[i], tokens, len + 1, 1, &err) || !m.engine->read_logits(&m, &err))
                        test_fail("%s", err.text);
                    memcpy(whole + (size_t)i * vocab, m.logits, vocab * sizeof(float));
                    kv_truncate(&m.kv, slots[i], len);
                }
                step(&m, n, slots, next, rows);
                for (size_t i = 0; i < (size_t)n * vocab; i++) {
                    double d = (double)rows[i] - (double)whole[i];
                    error += d * d;
                    all += (double)whole[i] * (double)whole[i];
                }
                if (!(sqrt(error) <= bound * sqrt(all)))
                    test_fail("%s, %d rows: %.4f of the logits' size off", called(shape), n, sqrt(error / all));
                free(whole);
                free(rows);
            }
            model_close(&m);
        }
    end("steps_of_many_rows_continue_prompts");
}

// The engine begins the next step before it is asked for. Logits of steps that go on with the chosen token, of one that
// does not, and of one that follows an interruption by another sequence, are those of an engine that was never ahead.
static void steps_begun_ahead_change_nothing(const char *shape) {
    enum { STEPS = 24 };
    Model m;
    Error err = {""};
    int slots[2] = {0, 1}, first = 300, token = first, given[STEPS];
    if (start_shape(&m, shape, engine, PRECISION_BF16, 2, STEPS + 2)) {
        size_t vocab = (size_t)m.config.vocab_size, bytes = vocab * sizeof(float);
        float *ahead = (float *)malloc(STEPS * bytes), *never = (float *)malloc(bytes), *other = (float *)malloc(bytes);
        for (int k = 0; k < STEPS; k++) {
            if (k == 15 && !model_prefill(&m, 1, &first, 1, 1, &err)) test_fail("%s", err.text);
            given[k] = token;
            step(&m, 1, slots, &token, ahead + (size_t)k * vocab);
            token = k % 8 == 6 ? (m.argmax[0] + 1) % m.config.vocab_size : m.argmax[0];
        }
        kv_reset(&m.kv, 0);
        kv_reset(&m.kv, 1);
        for (int k = 0; k < STEPS; k++) { // by turns with another sequence, no step follows the one before
            step(&m, 1, slots, &given[k], never);
            if (memcmp(never, ahead + (size_t)k * vocab, bytes) != 0)
                test_fail("%s, step %d: other logits", called(shape), k);
            step(&m, 1, slots + 1, &given[k], other);
            if (memcmp(never, other, bytes) != 0)
                test_fail("%s, step %d: other logits in another slot", called(shape), k);
        }
        free(ahead);
        free(never);
        free(other);
    }
    model_close(&m);
}

static void test_steps_begun_ahead_change_nothing(void) {
    static const char *const shapes[] = {NULL, "stories int4:64/int8"};
    for (const char *shape : shapes) steps_begun_ahead_change_nothing(shape);
    end("steps_begun_ahead_change_nothing");
}

// Decode rows beside parts of prompts, in one batch: the logits of all rows that have some, in the batch's order, are
// those of each sequence in batches of its own, also where the next step has begun before the prompt came. Sequences in
// `decoding` slots decode; that in the last slot is a prompt in parts, with logits at the end of the last one. ends:
// the step before the first part says that a sequence ends, so that no step has begun.
static void decode_rows_beside_prompts(const char *shape, int slots, int decoding, bool ends) {
    enum { STEPS = 12, PART = 40, FIRST_PART = 4, PARTS = 3, MOST = 36 };
    const bool same_bits = strcmp(engine, "fused") == 0; // of cublas: but for rounding
    Model m;
    Error err = {""};
    if (start_shape(&m, shape, engine, PRECISION_BF16, slots, PART * PARTS + STEPS)) {
        if (slots == 3 || slots == 40) CHECK(m.two_passes == (same_bits && slots == 3)); // (12: if wide.h takes them)
        size_t vocab = (size_t)m.config.vocab_size, bytes = vocab * sizeof(float);
        size_t all_bytes = (size_t)decoding * bytes;
        float *apart = (float *)malloc(STEPS * all_bytes), *last = (float *)malloc(bytes);
        int tokens[PART * PARTS], slot[MOST + 1], next[STEPS + 1][MOST], rows[MOST + 1], start_at[MOST + 2];
        random_tokens(tokens, PART * PARTS, &m);
        for (int i = 0; i < decoding; i++) slot[i] = i + 1 < decoding ? i : slots - 2;
        slot[decoding] = slots - 1;
        for (int i = 0; i <= decoding; i++) rows[i] = start_at[i] = i;
        auto check = [&](const char *what, int step, const float *expected, const float *logits, size_t n) {
            double error = 0, all = 0;
            for (size_t i = 0; i < n; i++) {
                error += ((double)logits[i] - (double)expected[i]) * ((double)logits[i] - (double)expected[i]);
                all += (double)expected[i] * (double)expected[i];
            }
            if (same_bits ? memcmp(expected, logits, n * sizeof(float)) != 0 : !(sqrt(error) <= 0.02 * sqrt(all)))
                test_fail("%s, %d of %d slots, step %d: %s: other logits, %.4f of their size off", called(shape),
                          decoding, slots, step, what, sqrt(error / all));
        };
        for (int how = 0; how < 2; how++) { // apart, together
            for (int i = 0; i < slots; i++) kv_reset(&m.kv, i);
            for (int i = 0; i < decoding; i++) {
                if (!model_prefill(&m, slot[i], tokens + i, 5 + 7 * i % 71, 1, &err)) test_fail("%s", err.text);
                if (how == 0) next[0][i] = m.argmax[0];
            }
            if (how == 0 &&
                (!model_prefill(&m, slot[decoding], tokens, PART * PARTS, 1, &err) || !m.engine->read_logits(&m, &err)))
                test_fail("%s", err.text);
            if (how == 0) memcpy(last, m.logits, bytes);
            for (int k = 0; k < STEPS; k++) {
                int part = how == 0 ? -1 : k - FIRST_PART;
                bool mixed = part >= 0 && part < PARTS, whole = part + 1 == PARTS;
                int n = mixed ? decoding + PART : decoding, batch[MOST + PART];
                memcpy(batch, next[k], (size_t)decoding * sizeof(int));
                if (mixed) memcpy(batch + decoding, tokens + part * PART, PART * sizeof(int));
                rows[decoding] = n - 1;
                start_at[decoding + 1] = n;
                Batch b = {.n_rows = n,
                           .n_seq = mixed ? decoding + 1 : decoding,
                           .n_logits = whole ? decoding + 1 : decoding,
                           .n_decode = decoding,
                           .tokens = batch,
                           .slot = slot,
                           .start = start_at,
                           .logit_rows = rows,
                           .ends = ends && k + 1 == FIRST_PART};
                if (!model_forward(&m, &b, &err)) test_fail("step %d: %s", k, err.text);
                if (how == 0) memcpy(next[k + 1], m.argmax, (size_t)decoding * sizeof(int));
                if (!m.engine->read_logits(&m, &err)) test_fail("step %d: %s", k, err.text);
                float *kept = apart + (size_t)k * (size_t)decoding * vocab;
                if (how == 0) memcpy(kept, m.logits, all_bytes);
                check("a step beside a prompt", k, kept, m.logits, (size_t)decoding * vocab);
                const float *of_prompt = m.logits + (size_t)decoding * vocab;
                if (whole) CHECK(m.argmax[decoding] == argmax(of_prompt, (int)vocab));
                if (whole) check("a prompt beside steps", k, last, of_prompt, vocab);
            }
        }
        free(apart);
        free(last);
    }
    model_close(&m);
}

static void test_decode_rows_beside_prompts(void) {
    const char *const shapes[] = {NULL, "llama-3.2-1b", "stories int8:32/int8", "llama-3.2-1b int4:32+bf16+fp8/int8"};
    for (const char *shape : shapes) {
        for (int slots : {3, 12, 40}) decode_rows_beside_prompts(shape, slots, 2, slots == 12);
        for (bool ends : {false, true}) decode_rows_beside_prompts(shape, 40, 36, ends);
    }
    end("decode_rows_beside_prompts");
}

// What is drawn is what sample_token chooses from the same logits: beside a step that runs ahead, and where every
// step's tokens are drawn.
static void test_draws_equal_sample_token(void) {
    enum { STEPS = 24, SLOTS = 3 };
    Model m;
    Error err = {""};
    SamplerConfig configs[SLOTS] = {};
    for (int i = 0; i < SLOTS; i++) {
        configs[i].temperature = 0.8f + (float)i;
        configs[i].top_p = i == 0 ? 1 : 0.9f;
        configs[i].top_k = i == 2 ? 40 : 0;
    }
    int slots[SLOTS] = {0, 1, 2}, tokens[SLOTS] = {300, 301, 302}, ids[SLOTS];
    uint64_t random = 1;
    if (start(&m, engine, PRECISION_BF16, SLOTS, STEPS + 1)) {
        int vocab = m.config.vocab_size;
        float *logits = (float *)malloc(SLOTS * (size_t)vocab * sizeof(float));
        for (int k = 0; k < STEPS; k++) {
            step(&m, SLOTS, slots, tokens, logits);
            for (int i = 0; i < SLOTS; i++) tokens[i] = m.argmax[i];
            if (k < STEPS / 2 && k % 4 != 3) continue; // the step after the next one runs ahead
            SampleRow rows[SLOTS];
            for (int i = 0; i < SLOTS; i++) rows[i] = {SLOTS - 1 - i, &configs[i], random_uniform(&random)};
            if (!m.engine->sample(&m, rows, SLOTS, ids, &err)) test_fail("%s", err.text);
            for (int i = 0; i < SLOTS; i++) {
                int want = sample_token(&configs[i], logits + (size_t)rows[i].row * vocab, vocab, rows[i].u);
                if (ids[i] != want) test_fail("step %d: row %d draws %d, expected %d", k, rows[i].row, ids[i], want);
            }
            for (int i = 0; k >= STEPS / 2 && i < SLOTS; i++) tokens[rows[i].row] = ids[i];
        }
        free(logits);
    }
    model_close(&m);
    end("draws_equal_sample_token");
}

int main(void) {
    static const EngineTest tests[] = {
        {"steps_of_many_rows_continue_prompts", test_steps_of_many_rows_continue_prompts},
        {"steps_begun_ahead_change_nothing", test_steps_begun_ahead_change_nothing},
        {"decode_rows_beside_prompts", test_decode_rows_beside_prompts},
        {"draws_equal_sample_token", test_draws_equal_sample_token},
        {"same_bits_alone_and_among_others", test_same_bits_alone_and_among_others, FUSED},
        {"prompts_have_the_same_bits_in_any_batch", test_prompts_have_the_same_bits_in_any_batch, FUSED}};
    return run_with_both_engines(tests);
}
