// Speculation: what it proposes, how many it verifies, and that the output is, byte for byte, what it is without.
#include <math.h>

#include "../model/file/checkpoint.h"
#include "../model/generate/generate.h"
#include "../tokenizer/encode.h"
#include "check.h"

#define LENGTH(array) ((int)(sizeof(array) / sizeof *(array)))

static uint64_t random_state = 7;

static int random_below(int n) {
    return (int)(random_uniform(&random_state) * n);
}

// ---- lookup ---------------------------------------------------------------------------------------------------------

// The longest of 1, 2, 4 and 8 last tokens that came before, where they came last; 0: none. *kind: which.
static int find_earlier(const int *text, int n, int *kind) {
    for (*kind = 3; *kind >= 0; --*kind) {
        int length = 1 << *kind;
        for (int end = n - 1; end >= length; end--)
            if (length < n && memcmp(text + end - length, text + n - length, (size_t)length * sizeof *text) == 0)
                return end;
    }
    return 0;
}

static void check_lookup(const int *text, int n, const Proposal *p) {
    int kind, end = find_earlier(text, n, &kind);
    CHECK(p->n == (end ? p->most : 0));
    if (p->n == 0 || p->n != p->most) return;
    CHECK(p->kind == kind);
    for (int i = 0; i < p->n; i++)
        CHECK(p->candidates[i] == (end + i < n ? text[end + i] : p->candidates[end + i - n]));
}

static void test_lookup_finds_what_followed_the_longest_suffix_last(void) {
    enum { N = 600 };
    static const int alphabets[] = {1, 2, 3, 12, 1000};
    Speculation s;
    Error err = {""};
    CHECK(lookup_open(&s, NULL, 2, &err));
    for (int a = 0; a < LENGTH(alphabets); a++) {
        int text[N];
        for (int i = 0; i < N; i++) text[i] = i % 50 < 30 || i < 100 ? random_below(alphabets[a]) : text[i - 97];
        for (int slot = 0; slot < 2; slot++) { // a slot's text has nothing of another's, nor of the one before
            int n_prompt = slot ? 37 : 1;
            speculation_begin(&s, slot);
            for (int n = n_prompt + 1; n <= N; n += slot ? 1 + random_below(8) : 1) {
                Proposal p = {.slot = slot,
                              .prompt = text,
                              .n_prompt = (size_t)n_prompt,
                              .ids = text + n_prompt,
                              .n_ids = (size_t)(n - n_prompt),
                              .most = random_below(8)};
                CHECK(s.proposer.propose(s.proposer.context, &p, 1, &err));
                check_lookup(text, n, &p);
            }
        }
    }
    speculation_close(&s);
    test_end("test_lookup_finds_what_followed_the_longest_suffix_last");
}

// ---- how many -------------------------------------------------------------------------------------------------------

typedef struct {
    double right; // the probability that a candidate is
} Guess;

static bool propose_guesses(void *context, Proposal *proposals, int n, Error *err) {
    (void)context, (void)err;
    for (int i = 0; i < n; i++) proposals[i].n = proposals[i].most;
    return true;
}

// Steps of one row that N tokens of each of n sequences take, in all their steps; each candidate is right with that
// probability.
static double cost_of_tokens(const char *engine, int n_seq, double right, double prior, int n_tokens) {
    const Engine e = {.name = engine};
    const Model m = {.engine = &e};
    Proposer proposer = {.propose = propose_guesses, .prior = {prior, prior, prior, prior}};
    Speculation s;
    Acceptance acceptance[8] = {{{0}, {0}}}, *each[8];
    double cost = 0;
    Error err = {""};
    speculation_init(&s, &m, &proposer);
    for (int i = 0; i < 8; i++) each[i] = &acceptance[i];
    for (int done = 0; done < n_seq * n_tokens;) {
        Proposal p[8];
        int rows = n_seq;
        for (int i = 0; i < n_seq; i++) p[i] = (Proposal){.slot = i, .most = 7};
        CHECK(speculation_propose(&s, p, each, n_seq, n_seq, 8 * n_seq, &err));
        for (int i = 0; i < n_seq; i++) {
            rows += p[i].n;
            while (p[i].accepted < p[i].n && random_uniform(&random_state) < right) p[i].accepted++;
            done += 1 + p[i].accepted;
        }
        speculation_learn(&s, p, each, n_seq, n_seq);
        cost += speculation_step_cost(&m, rows) / speculation_step_cost(&m, n_seq);
    }
    return cost;
}

static void test_wrong_candidates_cost_at_most_four_percent(void) {
    static const char *const engines[] = {"cpu", "fused"};
    static const int n_seqs[] = {1, 3, 8};
    for (int e = 0; e < 2; e++)
        for (int n = 0; n < LENGTH(n_seqs); n++)
            for (double prior = 0.15; prior < 1; prior += 0.35) {
                double cost = cost_of_tokens(engines[e], n_seqs[n], 0, prior, 1000);
                if (cost > 1000 * 1.04) test_fail("%s, %d: %.0f steps for 1000", engines[e], n_seqs[n], cost);
                cost = cost_of_tokens(engines[e], n_seqs[n], 0.02, prior, 1000);
                if (cost > 1000 * 1.04) test_fail("%s, %d, 2 %%: %.0f steps for 1000", engines[e], n_seqs[n], cost);
            }
    test_end("test_wrong_candidates_cost_at_most_four_percent");
}

static void test_right_candidates_are_verified_seven_at_a_time(void) {
    double cost = cost_of_tokens("fused", 1, 1, 0.3, 800);
    if (cost > 100 * 1.257 * 1.05) test_fail("fused: %.1f steps for 800 tokens", cost);
    cost = cost_of_tokens("fused", 1, 0.8, 0.7, 2000);
    if (cost > 2000 / 3.1) test_fail("fused, 80 %%: %.1f steps for 2000 tokens", cost);
    cost = cost_of_tokens("cpu", 1, 1, 0.3, 800);
    if (cost > 100 * 3.0 * 1.12) test_fail("cpu: %.1f steps for 800 tokens", cost);
    test_end("test_right_candidates_are_verified_seven_at_a_time");
}

// ---- the same bytes -------------------------------------------------------------------------------------------------

enum { N_SEQS = 5, CONTEXT = 120, N_SLOTS = 3 };

static Model model;

// What the sequences are without speculation: from these a test's own candidates come, each right with a probability.
typedef struct {
    const Sequence *known; // [N_SEQS]
    double right;
    int wrong; // the token in place of one that is right; -1: a random one
} Oracle;

static bool propose_known(void *context, Proposal *proposals, int n, Error *err) {
    const Oracle *o = context;
    (void)err;
    for (int i = 0; i < n; i++) {
        Proposal *p = &proposals[i];
        const Sequence *seq = o->known;
        while (seq->prompt.n != p->n_prompt || memcmp(seq->prompt.ids, p->prompt, p->n_prompt * sizeof *p->prompt) != 0)
            seq++;
        for (p->n = 0; p->n < p->most; p->n++) {
            size_t at = p->n_ids + (size_t)p->n;
            bool right = at < seq->ids.n && random_uniform(&random_state) < o->right;
            p->candidates[p->n] = right          ? seq->ids.ids[at]
                                  : o->wrong < 0 ? random_below(model.config.vocab_size)
                                                 : o->wrong;
        }
    }
    return true;
}

static bool keep(void *context, Sequence *seq, Error *err) {
    (void)context, (void)seq, (void)err;
    return true;
}

static void make_prompts(Sequence *seqs) {
    static const char *const texts[N_SEQS] = {"Once upon a time", "The king said: The king said: The king",
                                              "In the morning, when the sun rose over the hills,", "\n\n",
                                              "a b c d e f g a b c d e f g a b c d"};
    Error err = {""};
    for (int i = 0; i < N_SEQS; i++) {
        seqs[i] = (Sequence){.index = i};
        CHECK(tokens_append(&seqs[i].prompt, model.config.bos_id, &err));
        CHECK(tokenizer_encode(&model.tokenizer, (const uint8_t *)texts[i], strlen(texts[i]), false, &seqs[i].prompt,
                               &err));
    }
}

static void run(Sequence *seqs, const GenerateConfig *config, Speculation *s) {
    Error err = {""};
    GenerateSink sink = {.finished = keep};
    make_prompts(seqs);
    for (int i = 0; i < N_SEQS; i++) {
        seqs[i].config = *config;
        seqs[i].config.stream = (uint64_t)i;
        seqs[i].config.speculation = s;
    }
    if (!generate(&model, seqs, N_SEQS, &sink, &err)) test_fail("%s", err.text);
}

static void check_same(const Sequence *a, const Sequence *b) {
    int k = a->config.logprobs;
    CHECK(a->ids.n == b->ids.n && a->text.n == b->text.n);
    if (a->ids.n != b->ids.n || a->text.n != b->text.n) return;
    if (a->ids.n) CHECK(memcmp(a->ids.ids, b->ids.ids, a->ids.n * sizeof *a->ids.ids) == 0);
    if (a->text.n) CHECK(memcmp(a->text.data, b->text.data, a->text.n) == 0);
    CHECK(a->finish_reason && b->finish_reason && strcmp(a->finish_reason, b->finish_reason) == 0);
    if (!k) return;
    CHECK(memcmp(a->logprobs.values, b->logprobs.values, a->ids.n * (size_t)(1 + k) * sizeof(float)) == 0);
    CHECK(memcmp(a->logprobs.top_ids, b->logprobs.top_ids, a->ids.n * (size_t)k * sizeof(int)) == 0);
}

static void free_all(Sequence *seqs) {
    for (int i = 0; i < N_SEQS; i++) sequence_free(&seqs[i]);
}

static void start(int slots) {
    Error err = {""};
    if (!checkpoint_open(&model, "model/stories.bin", false, &err) ||
        !model_choose(&model, "cpu", PRECISION_F32, &err) || !speculation_prepare(&model, slots, &err) ||
        !model_start(&model, "cpu", PRECISION_F32, slots, CONTEXT, &err))
        test_fail("%s", err.text);
}

// least: candidates of 100 that must be accepted.
static void check_speculation(const char *name, const Sequence *plain, const GenerateConfig *config, Speculation *s,
                              int least) {
    Sequence seqs[N_SEQS];
    int candidates = 0, accepted = 0, tokens = 0, steps = 0;
    run(seqs, config, s);
    for (int i = 0; i < N_SEQS; i++) {
        bool failed = test_failure[0] != 0;
        check_same(&plain[i], &seqs[i]);
        if (test_failure[0] && !failed) test_fail("%s", test_failure);
        candidates += seqs[i].counts.candidates;
        accepted += seqs[i].counts.accepted;
        steps += seqs[i].counts.steps;
        tokens += (int)seqs[i].ids.n;
    }
    if (candidates * least > accepted * 100 || (least && candidates == 0))
        test_fail("%s: %d of %d candidates are right, expected %d of 100", name, accepted, candidates, least);
    CHECK(steps + accepted >= tokens - N_SEQS && steps <= tokens);
    free_all(seqs);
}

// Candidates give what there is without them: all kinds of them, or a few.
static void check_config(const GenerateConfig *config, bool all) {
    bool is_long = config->n >= 40 && !config->n_stops && !config->n_turn_ends,
         greedy = !sampler_reads_logits(&config->sampler);
    Sequence plain[N_SEQS];
    Speculation s;
    Error err = {""};
    run(plain, config, NULL);
    for (int always = 0; always < 2; always++) {
        if (!lookup_open(&s, &model, N_SLOTS, &err)) test_fail("%s", err.text);
        s.always = always;
        check_speculation("lookup", plain, config, &s, 0);
        speculation_close(&s);
    }
    for (int percent = all ? 0 : 80; percent <= 80; percent += 40) {
        Oracle oracle = {plain, percent * 0.01, -1};
        speculation_init(&s, &model, &(Proposer){.prior = {0.5}, .propose = propose_known, .context = &oracle});
        s.always = percent != 40;
        check_speculation("known tokens", plain, config, &s, is_long && percent == 80 ? 25 : 0);
    }
    if (!all) {
        free_all(plain);
        return;
    }
    if (!draft_open(&s, &model, "model/stories.bin", N_SLOTS, CONTEXT, &err)) test_fail("%s", err.text);
    s.always = true;
    check_speculation("draft", plain, config, &s, is_long && greedy ? 90 : 0);
    speculation_close(&s);
    free_all(plain);
}

static void test_speculation_changes_no_byte(const char *name, const GenerateConfig *config) {
    static const int slots[] = {1, N_SLOTS};
    for (int i = 0; test_wanted(name) && i < LENGTH(slots); i++) {
        start(slots[i]);
        check_config(config, slots[i] == N_SLOTS);
        model_close(&model);
    }
    test_end(name);
}

// A draft whose cache is smaller than the model's guesses as far as its pages go: those of one, two or four, where
// three texts of two pages each run.
static void test_draft_without_pages_guesses_less(void) {
    GenerateConfig config = {.n = 1000, .sampler = {.top_p = 1}, .ignore_eos = true};
    Sequence plain[N_SEQS];
    Speculation s;
    Error err = {""};
    start(N_SLOTS);
    run(plain, &config, NULL);
    for (int pages = 1; pages <= 4; pages *= 2) {
        model.kv_memory = (uint64_t)pages * model_page_bytes(&model);
        if (!draft_open(&s, &model, "model/stories.bin", N_SLOTS, CONTEXT, &err)) test_fail("%s", err.text);
        CHECK(s.draft && s.draft->kv.n_pages == pages);
        s.always = true;
        check_speculation("few pages", plain, &config, &s, 90);
        speculation_close(&s);
    }
    free_all(plain);
    model_close(&model);
    test_end("test_draft_without_pages_guesses_less");
}

// Candidates whose row is not finite, and is rejected, stop nothing.
static void test_rejected_candidate_may_be_nan(void) {
    const char *name = "test_rejected_candidate_may_be_nan";
    GenerateConfig config = {.n = 40, .sampler = {.temperature = 0.8f, .top_p = 1}, .seed = 5};
    Sequence plain[N_SEQS];
    start(N_SLOTS);
    run(plain, &config, NULL);
    int bad = -1; // a token that no text has
    for (int id = 0; id < model.config.vocab_size && bad < 0; id++) {
        bool seen = false;
        for (int i = 0; i < N_SEQS; i++) {
            for (size_t t = 0; t < plain[i].prompt.n; t++) seen = seen || plain[i].prompt.ids[t] == id;
            for (size_t t = 0; t < plain[i].ids.n; t++) seen = seen || plain[i].ids.ids[t] == id;
        }
        if (!seen) bad = id;
    }
    Matrix *table = &model.weights.tok_embeddings;
    size_t row = (size_t)matrix_row_bytes(table);
    char *copy = malloc(row * (size_t)table->rows);
    memcpy(copy, table->data, row * (size_t)table->rows);
    memset(copy + (size_t)bad * row, 0xFF, row); // NaN in every dtype
    table->data = copy;
    Oracle oracle = {plain, 0.5, bad};
    Speculation s;
    speculation_init(&s, &model, &(Proposer){.prior = {0.5}, .propose = propose_known, .context = &oracle});
    s.always = true;
    check_speculation("NaN", plain, &config, &s, 10);
    free_all(plain);
    model_close(&model);
    free(copy);
    test_end(name);
}

static void test_speculation_is_refused_with_the_reason(void) {
    const Engine other = {.name = "other"};
    Model m = {.engine = &other};
    Error err = {""};
    CHECK(!speculation_prepare(&m, 1, &err) && strstr(err.text, "engine other") && strstr(err.text, "how many rows"));
    start(1);
    err = (Error){""};
    CHECK(!speculation_prepare(&model, 33, &err) && strstr(err.text, "33 sequences") && strstr(err.text, "at most 32"));
    Speculation s;
    err = (Error){""};
    CHECK(!draft_open(&s, &model, "tests/vectors/none.bin", 1, CONTEXT, &err) && strstr(err.text, "none.bin"));
    model.tokenizer.bytes[model.tokenizer.offsets[300]] ^= 1;
    err = (Error){""};
    CHECK(!draft_open(&s, &model, "model/stories.bin", 1, CONTEXT, &err) && strstr(err.text, "token 300"));
    model.tokenizer.vocab_size--;
    err = (Error){""};
    CHECK(!draft_open(&s, &model, "model/stories.bin", 1, CONTEXT, &err) && strstr(err.text, "vocabulary"));
    model.tokenizer.vocab_size++;
    model_close(&model);
    test_end("test_speculation_is_refused_with_the_reason");
}

int main(void) {
    static const char *const stops[] = {" the", "ing"};
    static int ends[2]; // a full stop and a comma
    start(1);
    for (int id = 0; id < model.config.vocab_size; id++) {
        size_t n;
        const uint8_t *text = tokenizer_bytes(&model.tokenizer, id, &n);
        if (n == 1 && (*text == '.' || *text == ',')) ends[*text == ','] = id;
    }
    model_close(&model);
    SamplerConfig greedy = {.top_p = 1}, sampled = {.temperature = 0.8f, .top_p = 1}, cut = sampled, penalty = greedy;
    cut.top_p = 0.9f;
    cut.top_k = 40;
    penalty.repetition_penalty = 1.3f;
    test_lookup_finds_what_followed_the_longest_suffix_last();
    test_wrong_candidates_cost_at_most_four_percent();
    test_right_candidates_are_verified_seven_at_a_time();
    test_speculation_changes_no_byte("test_speculation_changes_no_byte_greedy",
                                     &(GenerateConfig){.n = 40, .sampler = greedy});
    test_speculation_changes_no_byte("test_speculation_changes_no_byte_sampled",
                                     &(GenerateConfig){.n = 40, .sampler = sampled, .seed = 3});
    test_speculation_changes_no_byte("test_speculation_changes_no_byte_top_k_top_p_logprobs",
                                     &(GenerateConfig){.n = 40, .sampler = cut, .seed = 4, .logprobs = 3});
    test_speculation_changes_no_byte("test_speculation_changes_no_byte_repetition_penalty",
                                     &(GenerateConfig){.n = 40, .sampler = penalty, .logprobs = 1});
    test_speculation_changes_no_byte("test_speculation_changes_no_byte_stops",
                                     &(GenerateConfig){.n = 40, .sampler = greedy, .stops = stops, .n_stops = 2});
    test_speculation_changes_no_byte(
        "test_speculation_changes_no_byte_end_ids", // of a turn, as an end-of-text id
        &(GenerateConfig){.n = 40, .sampler = greedy, .turn_ends = ends, .n_turn_ends = LENGTH(ends)});
    test_speculation_changes_no_byte("test_speculation_changes_no_byte_context_end",
                                     &(GenerateConfig){.n = 1000, .sampler = greedy, .ignore_eos = true});
    test_speculation_changes_no_byte("test_speculation_changes_no_byte_few",
                                     &(GenerateConfig){.n = 3, .sampler = sampled});
    test_draft_without_pages_guesses_less();
    test_rejected_candidate_may_be_nan();
    test_speculation_is_refused_with_the_reason();
    return tests_summary();
}
