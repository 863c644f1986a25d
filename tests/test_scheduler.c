// Which rows each step has, on an engine that computes no model: its cache has the tokens themselves, and the next
// token is a hash of all that a sequence's pages hold. So every answer shows whether each position is in its place,
// whatever was shared, or left and came back; and the engine notes what it was asked for.
#include "../model/generate/generate.h"
#include "../model/generate/scheduler.h"
#include "../model/synthetic.h"
#include "check.h"

enum { VOCAB = 256, MAX_SEQS = 300, MAX_BATCHES = 20000, FAKE_ROWS = 700 };

// ---- the engine -----------------------------------------------------------------------------------------------------

typedef struct {
    int n_decode, n_seq, prompt_rows;
    bool ends;
} Step;

static struct {
    int n_steps, prompt_rows, copies_out, copies_in, fail_copy, interrupt_at;
    volatile sig_atomic_t interrupted;
    Step steps[MAX_BATCHES];
    float logits[MAX_STEP_ROWS * VOCAB];
} fake;

static Model model;

static bool usable(const Model *m, Error *err) {
    (void)m, (void)err;
    return true;
}

static bool open_engine(Model *m, Error *err) {
    m->max_rows = FAKE_ROWS;
    m->state = &fake;
    m->logits = fake.logits;
    if (!model_size_cache(m, sizeof(float), 0, err)) return false;
    m->kv.k = calloc((size_t)m->kv.n_pages * KV_PAGE, sizeof(int));
    return m->kv.k || fail(err, "out of memory: tokens");
}

static void close_engine(Model *m) {
    if (m->state) free(m->kv.k);
    m->state = NULL;
}

// The place of a slot's position.
static int *token_at(const Model *m, int slot, int pos) {
    return (int *)m->kv.k + (size_t)kv_slot_pages(&m->kv, slot)[pos / KV_PAGE] * KV_PAGE + pos % KV_PAGE;
}

static uint64_t mix(uint64_t h, int id) {
    return (h ^ (uint64_t)(id + 1)) * 0x9E3779B97F4A7C15u >> 1;
}

static int token_of(uint64_t h) {
    return (int)((h ^ h >> 31) % 200);
}

// Whether a page is written that another slot has as well.
static bool is_shared(const Model *m, int slot, int page) {
    for (int i = 0; i < m->kv.n_slots; i++)
        for (int p = 0; i != slot && p < m->kv.held[i]; p++)
            if (kv_slot_pages(&m->kv, i)[p] == page) return true;
    return false;
}

static bool forward(Model *m, const Batch *b, int first_logit, Error *err) {
    CHECK(b->n_rows > 0 && b->n_rows <= m->max_rows && b->start[0] == 0 && b->start[b->n_seq] == b->n_rows);
    for (int i = 0, l = 0; i < b->n_seq; i++) {
        int slot = b->slot[i], len = m->kv.len[slot], n = b->start[i + 1] - b->start[i];
        uint64_t h = 0;
        CHECK(n > 0 && (i >= b->n_decode || n == 1) && kv_pages(len + n) <= m->kv.held[slot]);
        for (int p = 0; p < i; p++) CHECK(b->slot[p] != slot);
        for (int p = len / KV_PAGE; p < kv_pages(len + n); p++)
            CHECK(!is_shared(m, slot, kv_slot_pages(&m->kv, slot)[p]));
        for (int pos = 0; pos < len; pos++) h = mix(h, *token_at(m, slot, pos));
        for (int r = b->start[i]; r < b->start[i + 1]; r++) {
            int id = *token_at(m, slot, len + r - b->start[i]) = b->tokens[r];
            h = mix(h, id);
            if (l >= b->n_logits || b->logit_rows[l] != r) continue;
            m->argmax[first_logit + l] = token_of(h);
            l++;
        }
        CHECK(i >= b->n_decode || (l > 0 && b->logit_rows[l - 1] == b->start[i]));
    }
    Step *step = &fake.steps[fake.n_steps < MAX_BATCHES - 1 ? fake.n_steps : MAX_BATCHES - 1];
    *step = (Step){b->n_decode, b->n_seq, b->n_rows - b->start[b->n_decode], b->ends};
    fake.prompt_rows += step->prompt_rows;
    if (++fake.n_steps == fake.interrupt_at) {
        fake.interrupted = 1;
        return fail_interrupted(err);
    }
    return true;
}

static bool read_logits(Model *m, Error *err) {
    (void)m, (void)err;
    return true;
}

static void *allocate_host(size_t bytes) {
    return malloc(bytes);
}

static bool copy_pages(Model *m, const int *pages, int n, void *const *host, bool to_host, Error *err) {
    if (fake.fail_copy) return fail(err, "no copy");
    for (int i = 0; i < n; i++) {
        int *page = (int *)m->kv.k + (size_t)pages[i] * KV_PAGE;
        size_t bytes = KV_PAGE * sizeof *page;
        memcpy(to_host ? host[i] : page, to_host ? page : host[i], bytes);
    }
    *(to_host ? &fake.copies_out : &fake.copies_in) += 1;
    return true;
}

static const Engine engine = {.name = "fake",
                              .usable = usable,
                              .open = open_engine,
                              .close = close_engine,
                              .forward = forward,
                              .read_logits = read_logits,
                              .allocate_host = allocate_host,
                              .free_host = free,
                              .copy_pages = copy_pages};

// pages: of all slots; 0: as many as they can use.
static bool start(int slots, int max_len, int pages) {
    Error err = {""};
    if (!synthetic_open(&model, "llama-3.2-1b", 0, &err)) test_fail("%s", err.text);
    Config *c = &model.config;
    c->n_layers = c->n_heads = c->n_kv_heads = 1;
    c->head_dim = 2;
    c->vocab_size = VOCAB;
    config_derive(c);
    model.engine = &engine;
    model.interrupted = &fake.interrupted;
    memset(&fake, 0, sizeof fake);
    model.kv_memory = (uint64_t)pages * 2 * kv_page_elements(1, 2) * sizeof(float);
    if (model_start(&model, NULL, PRECISION_F32, slots, max_len, &err)) return true;
    test_fail("%s", err.text);
    return false;
}

// ---- sequences ------------------------------------------------------------------------------------------------------

static Sequence seqs[MAX_SEQS];
static int n_finished;

static bool finish(void *context, Sequence *seq, Error *err) {
    (void)context, (void)err;
    CHECK(seq->index == n_finished++ && seq->finish_reason);
    return true;
}

static const GenerateSink sink = {.finished = finish};

// A prompt of n ids, the first `same` of which depend on `group` alone, and n_new tokens after it.
static void set_sequence(int i, int n, int same, int group, int n_new) {
    Error err = {""};
    seqs[i] = (Sequence){.config = {.n = n_new}, .index = i};
    for (int k = 0; k < n; k++)
        CHECK(
            tokens_append(&seqs[i].prompt, (k < same ? group * 31 + k * 7 : i * 13 + k * 5 + (k >> 5)) % VOCAB, &err));
}

// What the hash says that comes after the prompt.
static void check_answer(const Sequence *seq, size_t n) {
    uint64_t h = 0;
    for (size_t k = 0; k < seq->prompt.n; k++) h = mix(h, seq->prompt.ids[k]);
    if (seq->ids.n != n) test_fail("sequence %d: %zu tokens, expected %zu", seq->index, seq->ids.n, n);
    for (size_t k = 0; k < seq->ids.n; k++) {
        if (seq->ids.ids[k] != token_of(h)) {
            test_fail("sequence %d: token %zu of %zu is another", seq->index, k, n);
            return;
        }
        h = mix(h, seq->ids.ids[k]);
    }
}

static void run(int n) {
    Error err = {""};
    n_finished = 0;
    if (!generate(&model, seqs, n, &sink, &err)) test_fail("%s", err.text);
    CHECK(n_finished == n);
    for (int i = 0; i < n; i++) check_answer(&seqs[i], (size_t)seqs[i].config.n);
}

// Frees what a run had. A run of several leaves nothing in the slots.
static void end(const char *name, int n) {
    for (int i = 0; i < n; i++) sequence_free(&seqs[i]);
    if (n > 1 && model.state) CHECK(kv_free_pages(&model.kv) == model.kv.n_pages);
    model_close(&model);
    test_end(name);
}

// ---- batches --------------------------------------------------------------------------------------------------------

// The slots are filled by whole prompts, in the engine's own parts, before anyone decodes; then prompts come in parts
// beside all that decode.
static void test_scheduler_fills_slots_then_cuts_prompts(void) {
    enum { N = 7 };
    static const int lengths[N] = {500, 30, 900, 300, 1000, 70, 1}, new[N] = {40, 30, 5, 3, 20, 5, 9};
    int rows = 0;
    for (int i = 0; i < N; i++) set_sequence(i, lengths[i], 0, 0, new[i]), rows += lengths[i];
    if (start(3, 1100, 0)) {
        run(N);
        CHECK(fake.prompt_rows == rows);
        // 500 + 30 + 900 in parts of 700, then steps of three
        CHECK(fake.steps[0].n_decode == 0 && fake.steps[0].prompt_rows == FAKE_ROWS && fake.steps[0].n_seq == 3);
        CHECK(fake.steps[1].prompt_rows == FAKE_ROWS && fake.steps[2].prompt_rows == 1430 - 2 * FAKE_ROWS);
        for (int k = 3; k < 7; k++) CHECK(fake.steps[k].n_decode == 3 && fake.steps[k].prompt_rows == 0);
        // the third ends with its fifth token, as the step that computes it knows, and 300 rows of the fourth take two
        // steps of two that decode
        for (int k = 3; k < 9; k++) CHECK(fake.steps[k].ends == (k == 6));
        for (int k = 7; k < 9; k++)
            CHECK(fake.steps[k].n_decode == 2 && fake.steps[k].n_seq == 3 &&
                  fake.steps[k].prompt_rows == (k < 8 ? PROMPT_ROWS : 300 - PROMPT_ROWS));
        CHECK(fake.steps[9].n_decode == 3);
        for (int k = 3; k < fake.n_steps; k++)
            CHECK(!fake.steps[k].n_decode || fake.steps[k].prompt_rows <= PROMPT_ROWS);
    }
    end("test_scheduler_fills_slots_then_cuts_prompts", N);
}

// Where prompts read the weights once more, their parts beside decoded sequences are smaller, and only these.
static void test_scheduler_cuts_prompts_by_passes(void) {
    enum { N = 3 };
    static const int lengths[N] = {600, 10, 300}, new[N] = {40, 3, 2};
    for (int i = 0; i < N; i++) set_sequence(i, lengths[i], 0, 0, new[i]);
    if (start(2, 700, 0)) {
        model.two_passes = true;
        run(N);
        CHECK(fake.steps[0].n_decode == 0 && fake.steps[0].prompt_rows == 610);
        for (int k = 3; k < 6; k++)
            CHECK(fake.steps[k].n_decode == 1 &&
                  fake.steps[k].prompt_rows == (k < 5 ? PROMPT_ROWS_APART : 300 - 2 * PROMPT_ROWS_APART));
        CHECK(fake.steps[6].n_decode == 2 && fake.steps[6].prompt_rows == 0);
    }
    end("test_scheduler_cuts_prompts_by_passes", N);
}

// Prompts share a part, the oldest first.
static void test_scheduler_parts_of_several_prompts(void) {
    enum { N = 260, SLOTS = 200 };
    for (int i = 0; i < N; i++) set_sequence(i, i < SLOTS ? 3 : 50, 0, 0, i < 10 ? 5 : 12);
    if (start(SLOTS, 80, 0)) {
        run(N);
        CHECK(fake.steps[0].prompt_rows == 3 * SLOTS && fake.steps[0].n_seq == SLOTS);
        for (int k = 1; k < 5; k++) CHECK(fake.steps[k].n_decode == SLOTS && fake.steps[k].prompt_rows == 0);
        // ten have ended: ten prompts of 50 come beside 190 that decode; five of them and a part are computed
        CHECK(fake.steps[5].n_decode == 190 && fake.steps[5].prompt_rows == PROMPT_ROWS);
        CHECK(fake.steps[5].n_seq == 190 + 6);
        CHECK(fake.steps[6].n_decode == 195 && fake.steps[6].prompt_rows == 500 - PROMPT_ROWS);
    }
    end("test_scheduler_parts_of_several_prompts", N);
}

// Many that want one token only do not keep one that wants many from its second.
static void test_scheduler_fills_slots_once(void) {
    enum { N = 60 };
    for (int i = 0; i < N; i++) set_sequence(i, 20, 0, 0, i == 0 ? 30 : 1);
    if (start(4, 80, 0)) {
        run(N);
        CHECK(fake.steps[0].n_decode == 0 && fake.steps[1].n_decode == 1 && fake.steps[1].prompt_rows == 60);
        CHECK(fake.steps[2].n_decode == 1);
    }
    end("test_scheduler_fills_slots_once", N);
}

// A prompt without new tokens ends with its last part, and one whose context is full with its last token.
static void test_scheduler_ends_without_new_tokens(void) {
    enum { N = 3 };
    set_sequence(0, 200, 0, 0, 0);
    set_sequence(1, 190, 0, 0, 50);
    set_sequence(2, 10, 0, 0, 1);
    if (start(2, 200, 0)) {
        seqs[1].config.n = 10;
        run(N);
    }
    end("test_scheduler_ends_without_new_tokens", N);
}

// ---- pages ----------------------------------------------------------------------------------------------------------

// Where pages run out the newest leave, come back, and have the answers that they would have had.
static void test_scheduler_newest_leaves_and_comes_back(void) {
    enum { N = 12 };
    for (int i = 0; i < N; i++) set_sequence(i, 60 + i, 0, 0, 200);
    for (int pages = 5; pages <= 30; pages++) {
        int left = 0;
        if (pages > 5)
            for (int i = 0; i < N; i++) sequence_free(&seqs[i]), set_sequence(i, 60 + i, 0, 0, 200);
        if (start(6, 300, pages)) {
            run(N);
            for (int i = 0; i < N; i++) left += seqs[i].n_left;
            CHECK(seqs[0].n_left == 0); // the oldest never leaves
            CHECK(left == fake.copies_out && left == fake.copies_in && (left > 0) == (pages < 30));
            CHECK(kv_free_pages(&model.kv) == pages);
        }
        if (pages < 30) model_close(&model);
    }
    end("test_scheduler_newest_leaves_and_comes_back", N);
}

// A prompt leaves in the middle, too, and goes on where it was.
static void test_scheduler_prompt_leaves_and_goes_on(void) {
    set_sequence(0, 60, 0, 0, 400);
    set_sequence(1, 10, 0, 0, 2);
    set_sequence(2, 1000, 0, 0,
                 30); // seven parts beside the first sequence, which needs a page after four of its tokens
    if (start(2, 1100, 18)) {
        run(3);
        CHECK(seqs[0].n_left == 0 && seqs[2].n_left == 1 && fake.prompt_rows == 1070);
    }
    end("test_scheduler_prompt_leaves_and_goes_on", 3);
}

// Prompts are admitted while there are pages for all their tokens and for one more page; alone without that.
static void test_scheduler_admits_as_far_as_pages_go(void) {
    enum { N = 4 };
    for (int i = 0; i < N; i++) set_sequence(i, 128, 0, 0, 3);
    if (start(N, 200, 6)) {
        run(N);
        CHECK(fake.steps[0].n_seq == 2 && fake.steps[0].prompt_rows == 256); // two pages each, and two are left
        for (int i = 0; i < N; i++) CHECK(seqs[i].n_left == 0);
    }
    for (int i = 0; i < N; i++) sequence_free(&seqs[i]), set_sequence(i, 128, 0, 0, 1);
    model_close(&model);
    if (start(N, 200, 3)) {
        run(N);
        CHECK(fake.n_steps == N && fake.steps[0].n_seq == 1);
    }
    end("test_scheduler_admits_as_far_as_pages_go", N);
}

static void test_scheduler_refuses_what_never_fits(void) {
    Error err = {""};
    set_sequence(0, 10, 0, 0, 4);
    set_sequence(1, 200, 0, 0, 4);
    n_finished = 0;
    if (start(2, 300, 3)) {
        CHECK(!generate(&model, seqs, 2, &sink, &err) && n_finished == 1);
        if (!strstr(err.text, "a prompt of 200 tokens needs 4 pages of 64 positions, the K/V cache has 3"))
            test_fail("%s", err.text);
        CHECK(kv_longest(&model.kv) == 192);
    }
    for (int i = 0; i < 2; i++) sequence_free(&seqs[i]);
    model_close(&model);
    test_end("test_scheduler_refuses_what_never_fits");
}

// ---- shared beginnings ----------------------------------------------------------------------------------------------

// What all prompts begin with is computed once: in the first steps, beside others' steps, and after the first has gone.
static void test_scheduler_computes_a_common_beginning_once(void) {
    enum { N = 40, SAME = 210, PAGES = SAME / KV_PAGE * KV_PAGE };
    for (int slots = 1; slots <= N; slots = slots < 5 ? slots + 1 : slots * 2) {
        int rows = 0;
        for (int i = 0; i < N; i++) {
            int n = SAME + 1 + i * 9 % 50;
            set_sequence(i, n, SAME, 1, 3 + i % 4);
            rows += n - (i ? PAGES : 0);
        }
        if (start(slots, 400, 0)) {
            run(N);
            if (fake.prompt_rows != rows) test_fail("%d slots: %d rows, expected %d", slots, fake.prompt_rows, rows);
            for (int i = 0; i < N; i++) CHECK(seqs[i].n_shared == (i ? PAGES : 0));
        }
        if (slots * 2 <= N || slots < 5) {
            for (int i = 0; i < N; i++) sequence_free(&seqs[i]);
            model_close(&model);
        }
    }
    end("test_scheduler_computes_a_common_beginning_once", N);
}

// A long one that is computed in parts beside a sequence that decodes: the next waits until it is there.
static void test_scheduler_waits_for_a_common_beginning(void) {
    enum { N = 4, SAME = 1000, PAGES = SAME / KV_PAGE * KV_PAGE };
    set_sequence(0, 5, 0, 0, 60);
    set_sequence(1, 5, 0, 0, 2);
    set_sequence(2, SAME + 50, SAME, 1, 5);
    set_sequence(3, SAME + 70, SAME, 1, 5);
    if (start(3, 1200, 0)) {
        seqs[2].config.n = seqs[3].config.n = 5;
        run(N);
        CHECK(fake.prompt_rows == 10 + SAME + 50 + SAME + 70 - PAGES);
        CHECK(seqs[2].n_shared == 0 && seqs[3].n_shared == PAGES);
    }
    end("test_scheduler_waits_for_a_common_beginning", N);
}

// Equal prompts: all but the last token's page. Less than a page in common: nothing. Log-probabilities of the prompt:
// nothing, either way.
static void test_scheduler_shares_whole_pages_only(void) {
    enum { N = 6 };
    static const int shared[N] = {0, 64, 0, 0, 64, 0};
    for (int i = 0; i < N; i++) set_sequence(i, i == 4 ? 65 : 128, i < 3 || i == 4 ? 128 : i == 3 ? 63 : 0, 1, 4);
    for (int i = 2; i < 3; i++) seqs[i].config.logprobs = 1, seqs[i].config.prompt_logprobs = true;
    if (start(N, 200, 0)) {
        run(N);
        for (int i = 0; i < N; i++)
            if (seqs[i].n_shared != shared[i]) test_fail("sequence %d shares %d tokens", i, seqs[i].n_shared);
        CHECK(seqs[2].n_scored == 127);
    }
    end("test_scheduler_shares_whole_pages_only", N);
}

// Few pages, common beginnings, and sequences that leave: nobody's tokens change.
static void test_scheduler_shares_where_pages_are_few(void) {
    enum { N = 30 };
    for (int pages = 7; pages < 40; pages += 3) {
        for (int i = 0; i < N; i++) set_sequence(i, 70 + i * 37 % 170, i % 3 ? 130 : 70, i % 3, 20 + i * 29 % 150);
        if (start(8, 400, pages)) {
            run(N);
            CHECK(kv_free_pages(&model.kv) == pages);
        }
        if (pages + 3 < 40) {
            for (int i = 0; i < N; i++) sequence_free(&seqs[i]);
            model_close(&model);
        }
    }
    end("test_scheduler_shares_where_pages_are_few", N);
}

// ---- one sequence alone, and the end --------------------------------------------------------------------------------

// A conversation: what the slot has stays after a run, and the next one goes on with it.
static void test_scheduler_alone_keeps_its_positions(void) {
    Error err = {""};
    set_sequence(0, 150, 0, 0, 20);
    if (start(1, 400, 0)) {
        run(1);
        CHECK(model.kv.len[0] == 169 && fake.prompt_rows == 150);
        Sequence next = {.config = {.n = 7}, .n_cached = 140};
        for (int k = 0; k < 200; k++)
            CHECK(tokens_append(&next.prompt, k < 145 ? seqs[0].prompt.ids[k] : k % 50, &err));
        n_finished = 0;
        CHECK(generate(&model, &next, 1, &sink, &err) && n_finished == 1);
        check_answer(&next, 7);
        CHECK(fake.prompt_rows == 150 + 60 && next.n_shared == 0);
        sequence_free(&next);
    }
    end("test_scheduler_alone_keeps_its_positions", 1);
}

// An interrupt ends all that have begun, those that have left as well, and nobody else begins.
static void test_scheduler_interrupt_ends_those_that_left(void) {
    enum { N = 12 };
    int ended = 0, away = 0, begun = 0;
    for (int at = 1; at < 400; at += 7) {
        Error err = {""};
        for (int i = 0; i < N; i++) set_sequence(i, 60 + i, 0, 0, 200);
        if (!start(6, 300, 8)) break;
        fake.interrupt_at = at;
        n_finished = 0;
        if (!generate(&model, seqs, N, &sink, &err)) test_fail("%s", err.text);
        for (int i = 0; i < N; i++) {
            CHECK((seqs[i].finish_reason != NULL) == (i < n_finished) && (seqs[i].admitted > 0) == (i < n_finished));
            if (!seqs[i].finish_reason) continue;
            bool interrupted = strcmp(seqs[i].finish_reason, "interrupted") == 0;
            check_answer(&seqs[i], seqs[i].ids.n);
            CHECK(interrupted || seqs[i].ids.n == 200);
            begun += interrupted;
            ended += !interrupted;
        }
        away += fake.copies_out > fake.copies_in;
        for (int i = 0; i < N; i++) sequence_free(&seqs[i]);
        model_close(&model);
    }
    CHECK(ended > 0 && begun > 0 && away > 0);
    test_end("test_scheduler_interrupt_ends_those_that_left");
}

// A copy of pages that fails ends the run with its message.
static void test_scheduler_failed_copy_ends_the_run(void) {
    enum { N = 12 };
    Error err = {""};
    for (int i = 0; i < N; i++) set_sequence(i, 60 + i, 0, 0, 200);
    if (start(6, 300, 8)) {
        fake.fail_copy = 1;
        CHECK(!generate(&model, seqs, N, &sink, &err) && strcmp(err.text, "no copy") == 0);
    }
    for (int i = 0; i < N; i++) sequence_free(&seqs[i]);
    model_close(&model);
    test_end("test_scheduler_failed_copy_ends_the_run");
}

int main(void) {
    test_scheduler_fills_slots_then_cuts_prompts();
    test_scheduler_cuts_prompts_by_passes();
    test_scheduler_parts_of_several_prompts();
    test_scheduler_fills_slots_once();
    test_scheduler_ends_without_new_tokens();
    test_scheduler_newest_leaves_and_comes_back();
    test_scheduler_prompt_leaves_and_goes_on();
    test_scheduler_admits_as_far_as_pages_go();
    test_scheduler_refuses_what_never_fits();
    test_scheduler_computes_a_common_beginning_once();
    test_scheduler_waits_for_a_common_beginning();
    test_scheduler_shares_whole_pages_only();
    test_scheduler_shares_where_pages_are_few();
    test_scheduler_alone_keeps_its_positions();
    test_scheduler_interrupt_ends_those_that_left();
    test_scheduler_failed_copy_ends_the_run();
    return tests_summary();
}
