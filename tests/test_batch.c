// Batches: the parts they are cut into, and that many sequences together give what each gives alone.
#include <math.h>

#include "../model/file/checkpoint.h"
#include "../model/generate/generate.h"
#include "../tokenizer/encode.h"
#include "check.h"

enum { MODEL_SEQS = 5, TOKENS = 24 };

// Every row of a batch must come up once, in its own sequence, and every logit row with it.
static void test_batch_part_covers_every_row_once(void) {
    int tokens[40], slot[4] = {3, 0, 7, 5}, start[5] = {0, 1, 18, 18, 40}, rows[5] = {0, 5, 17, 38, 39};
    for (int i = 0; i < 40; i++) tokens[i] = 1000 + i;
    Batch b = {
        .n_rows = 40, .n_seq = 4, .n_logits = 5, .tokens = tokens, .slot = slot, .start = start, .logit_rows = rows};
    for (int step = 1; step <= 41; step++) {
        int next = 0, logits = 0;
        for (int first = 0; first < 40; first += step) {
            int n = 40 - first < step ? 40 - first : step;
            BatchPart p;
            batch_part(&b, first, n, &p);
            CHECK(p.batch.n_rows == n && p.batch.tokens == tokens + first && p.first_logit == logits);
            CHECK(p.batch.start[0] == 0 && p.batch.start[p.batch.n_seq] == n);
            for (int i = 0; i < p.batch.n_seq; i++)
                for (int r = p.batch.start[i]; r < p.batch.start[i + 1]; r++, next++) {
                    int seq = next < 1 ? 0 : next < 18 ? 1 : 3;
                    CHECK(p.batch.slot[i] == slot[seq]);
                    CHECK(p.batch.tokens[r] == 1000 + next);
                }
            for (int i = 0; i < p.batch.n_logits; i++, logits++) CHECK(p.batch.logit_rows[i] + first == rows[logits]);
        }
        CHECK(next == 40 && logits == 5);
    }
    test_end("test_batch_part_covers_every_row_once");
}

// Where a part's end would cut the rows of a decoded sequence, it is before them; prompts are cut anywhere.
static void test_batch_part_keeps_decode_rows_together(void) {
    int tokens[30] = {0}, slot[5] = {4, 0, 3, 1, 2}, start[6] = {0, 3, 4, 11, 20, 30}, rows[13];
    for (int i = 0; i < 11; i++) rows[i] = i; // all of the three that are decoded, and the last of each prompt
    rows[11] = 19;
    rows[12] = 29;
    Batch b = {.n_rows = 30,
               .n_seq = 5,
               .n_logits = 13,
               .n_decode = 3,
               .tokens = tokens,
               .slot = slot,
               .start = start,
               .logit_rows = rows};
    for (int most = 7; most <= 30; most++) {
        BatchPart p;
        int logits = 0, decoded = 0;
        for (int first = 0; first < 30; first += p.batch.n_rows) {
            batch_part(&b, first, 30 - first < most ? 30 - first : most, &p);
            const Batch *part = &p.batch;
            CHECK(part->n_rows > 0 && part->n_rows <= most && p.first_logit == logits);
            for (int i = 0; i < part->n_decode; i++, decoded++) {
                CHECK(part->slot[i] == slot[decoded] && part->start[i] + first == start[decoded]);
                CHECK(part->start[i + 1] + first == start[decoded + 1]);
            }
            CHECK(part->n_decode == part->n_seq || first + part->start[part->n_decode] >= start[3]);
            logits += part->n_logits;
        }
        CHECK(decoded == 3 && logits == 13);
    }
    test_end("test_batch_part_keeps_decode_rows_together");
}

static Model model;

static bool start(int slots, int max_len) {
    Error err = {""};
    if (checkpoint_open(&model, "model/stories.bin", false, &err) &&
        model_start(&model, "cpu", PRECISION_F32, slots, max_len, &err))
        return true;
    test_fail("%s", err.text);
    return false;
}

static bool keep(void *context, Sequence *seq, Error *err) {
    (void)context, (void)seq, (void)err;
    return true;
}

static int finished_order[MODEL_SEQS], n_finished;

static bool note_order(void *context, Sequence *seq, Error *err) {
    (void)context, (void)err;
    if (n_finished < MODEL_SEQS) finished_order[n_finished++] = seq->index;
    return true;
}

// configs: one for each sequence, used in turn.
static void run(Sequence *seqs, int n, int slots, const GenerateConfig *configs, int n_configs,
                bool (*finished)(void *, Sequence *, Error *)) {
    Error err = {""};
    GenerateSink sink = {.finished = finished};
    const char *texts[MODEL_SEQS] = {"Once upon a time", "The king", "x",
                                     "In the morning, when the sun rose over the hills,", "\n\n"};
    if (!start(slots, 100)) return;
    for (int i = 0; i < n; i++) {
        seqs[i] = (Sequence){.config = configs[i % n_configs], .index = i};
        seqs[i].config.stream = (uint64_t)i;
        CHECK(tokens_append(&seqs[i].prompt, model.config.bos_id, &err));
        CHECK(tokenizer_encode(&model.tokenizer, (const uint8_t *)texts[i], strlen(texts[i]), false, &seqs[i].prompt,
                               &err));
    }
    if (!generate(&model, seqs, n, &sink, &err)) test_fail("%s", err.text);
    model_close(&model);
}

static void check_same(const Sequence *a, const Sequence *b) {
    CHECK(a->ids.n == b->ids.n && a->text.n == b->text.n);
    if (a->ids.n && a->ids.n == b->ids.n) CHECK(memcmp(a->ids.ids, b->ids.ids, a->ids.n * sizeof *a->ids.ids) == 0);
    if (a->text.n && a->text.n == b->text.n) CHECK(memcmp(a->text.data, b->text.data, a->text.n) == 0);
    CHECK(a->finish_reason && b->finish_reason && strcmp(a->finish_reason, b->finish_reason) == 0);
}

static void check_same_logprobs(const Logprobs *a, const Logprobs *b, size_t n, int k) {
    for (size_t i = 0; i < n * (size_t)(1 + k); i++) CHECK(fabsf(a->values[i] - b->values[i]) < 1e-4f);
    CHECK(n == 0 || memcmp(a->top_ids, b->top_ids, n * (size_t)k * sizeof *a->top_ids) == 0);
}

static void test_batch_of_any_size_gives_the_tokens_of_single_runs(const char *name, const GenerateConfig *configs,
                                                                   int n_configs) {
    Sequence alone[MODEL_SEQS], together[MODEL_SEQS];
    run(alone, MODEL_SEQS, 1, configs, n_configs, keep);
    for (int i = 0; i < MODEL_SEQS; i++) CHECK((alone[i].ids.n > 0) == (alone[i].config.n > 0));
    for (int slots = 2; slots <= MODEL_SEQS; slots++) {
        run(together, MODEL_SEQS, slots, configs, n_configs, keep);
        for (int i = 0; i < MODEL_SEQS; i++) {
            const GenerateConfig *g = &alone[i].config;
            check_same(&alone[i], &together[i]);
            check_same_logprobs(&alone[i].logprobs, &together[i].logprobs, g->logprobs ? alone[i].ids.n : 0,
                                g->logprobs);
            CHECK(alone[i].n_scored == (g->prompt_logprobs ? (int)alone[i].prompt.n - 1 : 0));
            CHECK(alone[i].n_scored == together[i].n_scored);
            check_same_logprobs(&alone[i].prompt_logprobs, &together[i].prompt_logprobs, (size_t)alone[i].n_scored,
                                g->logprobs);
            sequence_free(&together[i]);
        }
    }
    for (int i = 0; i < MODEL_SEQS; i++) sequence_free(&alone[i]);
    test_end(name);
}

// With a stop text the sequences end at different steps, their slots go to the next, and the output keeps the input's
// order.
static void test_batch_finishes_in_input_order(void) {
    static const char *const stops[] = {" the", "King"};
    Sequence seqs[MODEL_SEQS];
    GenerateConfig config = {
        .n = TOKENS, .n_stops = 2, .stops = stops, .seed = 5, .sampler = {.temperature = 0.9f, .top_p = 0.9f}};
    n_finished = 0;
    run(seqs, MODEL_SEQS, 2, &config, 1, note_order);
    CHECK(n_finished == MODEL_SEQS);
    bool stopped = false;
    for (int i = 0; i < MODEL_SEQS; i++) {
        CHECK(finished_order[i] == i);
        stopped = stopped || strcmp(seqs[i].finish_reason, "stop_string") == 0;
        for (size_t at = 0; at + 4 <= seqs[i].text.n; at++) CHECK(memcmp(seqs[i].text.data + at, " the", 4) != 0);
        sequence_free(&seqs[i]);
    }
    CHECK(stopped);
    test_end("test_batch_finishes_in_input_order");
}

// A prompt that fills the context is computed, and nothing comes after it.
static void test_batch_no_new_tokens_in_a_full_context(void) {
    Error err = {""};
    Sequence seq = {.config = {.logprobs = 1, .prompt_logprobs = true}};
    GenerateSink sink = {.finished = keep};
    if (start(1, 100)) {
        for (int i = 0; i < 100; i++) CHECK(tokens_append(&seq.prompt, 300 + i, &err));
        CHECK(generate(&model, &seq, 1, &sink, &err));
        CHECK(seq.ids.n == 0 && seq.text.n == 0 && seq.n_scored == 99 && model.kv.len[0] == 100);
        CHECK(seq.finish_reason && strcmp(seq.finish_reason, "length") == 0);
        for (int i = 0; i < seq.n_scored; i++) CHECK(seq.prompt_logprobs.values[2 * i] < 0);
    }
    sequence_free(&seq);
    model_close(&model);
    test_end("test_batch_no_new_tokens_in_a_full_context");
}

// More sequences than prompts have rows with logits.
static void test_batch_of_the_most_sequences(void) {
    Error err = {""};
    Sequence *together = calloc(MAX_SLOTS, sizeof *together), alone[3];
    const int some[3] = {0, LOGIT_ROWS, MAX_SLOTS - 1};
    GenerateSink sink = {.finished = keep};
    CHECK(together != NULL);
    for (int slots = MAX_SLOTS; together && slots; slots = slots > 1 ? 1 : 0) {
        if (!start(slots, 10)) break;
        Sequence *seqs = slots > 1 ? together : alone;
        int n = slots > 1 ? MAX_SLOTS : 3;
        for (int i = 0; i < n; i++) {
            int first = slots > 1 ? i : some[i];
            seqs[i] = (Sequence){.config = {.n = 3, .logprobs = 1, .ignore_eos = true}, .index = i};
            CHECK(tokens_append(&seqs[i].prompt, model.config.bos_id, &err));
            CHECK(tokens_append(&seqs[i].prompt, 300 + first, &err));
        }
        CHECK(generate(&model, seqs, n, &sink, &err));
        model_close(&model);
    }
    for (int i = 0; together && i < 3; i++) {
        check_same(&alone[i], &together[some[i]]);
        check_same_logprobs(&alone[i].logprobs, &together[some[i]].logprobs, alone[i].ids.n, 1);
        CHECK(alone[i].ids.n == 3);
        sequence_free(&alone[i]);
    }
    for (int i = 0; together && i < MAX_SLOTS; i++) sequence_free(&together[i]);
    free(together);
    test_end("test_batch_of_the_most_sequences");
}

// More log-probabilities than ids: those of all.
static void test_batch_logprobs_of_all_ids(void) {
    Error err = {""};
    Sequence seq = {.config = {.n = 1}};
    GenerateSink sink = {.finished = keep};
    if (start(1, 10)) {
        int vocab = model.config.vocab_size;
        double sum = 0;
        seq.config.logprobs = vocab + 5;
        CHECK(tokens_append(&seq.prompt, 300, &err) && generate(&model, &seq, 1, &sink, &err));
        CHECK(seq.config.logprobs == vocab);
        for (int i = 0; i < seq.config.logprobs; i++) sum += exp((double)seq.logprobs.values[1 + i]);
        CHECK(fabs(sum - 1) < 1e-4);
        CHECK(seq.logprobs.values[vocab] <= seq.logprobs.values[vocab - 1]);
    }
    sequence_free(&seq);
    model_close(&model);
    test_end("test_batch_logprobs_of_all_ids");
}

static void test_batch_without_room_is_refused_and_nothing_is_written(void) {
    Error err = {""};
    int tokens[9] = {1, 2, 3, 4, 5, 6, 7, 8, 9};
    if (start(2, 8)) {
        CHECK(model_prefill(&model, 1, tokens, 5, 1, &err));
        CHECK(!model_prefill(&model, 1, tokens, 4, 1, &err));
        CHECK(strstr(err.text, "4 more tokens after 5, the context holds 8"));
        CHECK(model.kv.len[0] == 0 && model.kv.len[1] == 5);
        err.text[0] = 0;
        CHECK(!model_prefill(&model, 0, tokens, 9, 1, &err) && model.kv.len[0] == 0);
    }
    model_close(&model);
    test_end("test_batch_without_room_is_refused_and_nothing_is_written");
}

int main(void) {
    test_batch_part_covers_every_row_once();
    test_batch_part_keeps_decode_rows_together();
    static const char *const stops[] = {" the"};
    const GenerateConfig greedy = {.n = TOKENS, .ignore_eos = true},
                         sampled = {.n = TOKENS,
                                    .seed = 3,
                                    .sampler = {.temperature = 0.8f, .top_k = 50, .top_p = 0.95f}},
                         mixed[MODEL_SEQS] = {
                             {.n = 7, .logprobs = 3, .prompt_logprobs = true},
                             {.n = TOKENS, .seed = 9, .sampler = {.temperature = 1, .top_p = 0.9f}},
                             {.n = 0, .logprobs = 1, .prompt_logprobs = true},
                             {.n = TOKENS, .logprobs = 2, .ignore_eos = true, .sampler = {.repetition_penalty = 1.4f}},
                             {.n = 60,
                              .n_stops = 1,
                              .stops = stops,
                              .sampler = {
                                  .temperature = 0.7f, .top_p = 1, .min_p = 0.02f, .repetition_penalty = 1.1f}}};
    test_batch_of_any_size_gives_the_tokens_of_single_runs("test_batch_greedy_gives_the_tokens_of_single_runs", &greedy,
                                                           1);
    test_batch_of_any_size_gives_the_tokens_of_single_runs("test_batch_sampled_gives_the_tokens_of_single_runs",
                                                           &sampled, 1);
    test_batch_of_any_size_gives_the_tokens_of_single_runs("test_batch_of_all_kinds_gives_the_tokens_of_single_runs",
                                                           mixed, MODEL_SEQS);
    test_batch_finishes_in_input_order();
    test_batch_no_new_tokens_in_a_full_context();
    test_batch_of_the_most_sequences();
    test_batch_logprobs_of_all_ids();
    test_batch_without_room_is_refused_and_nothing_is_written();
    return tests_summary();
}
