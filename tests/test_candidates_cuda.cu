// Candidates: a step of several rows of each sequence, some of which are then rejected, gives every row the bits that
// one step after another gives.
#include "engine_check.cuh"
extern "C" {
#include "../model/generate/speculate.h"
}

// As --lookup and --draft start: with room for candidates in every step. gpus: as start_shape has it.
static bool start_speculating(Model *m, const char *shape, int slots, int max_len, int gpus) {
    Error err = {""};
    bool ok = open_model(m, shape, &err);
    m->gpus = gpus;
    m->one_gpu = gpus > n_gpus;
    if (ok && model_choose(m, engine, PRECISION_BF16, &err) && speculation_prepare(m, slots, &err) &&
        model_start(m, engine, PRECISION_BF16, slots, max_len, &err))
        return true;
    test_fail("%s", err.text);
    return false;
}

enum { CANDIDATE_SEQS = 3, CANDIDATE_PROMPT = 70, CANDIDATE_TOKENS = 24 };

// tokens [CANDIDATE_SEQS][CANDIDATE_PROMPT + CANDIDATE_TOKENS]; logits [CANDIDATE_SEQS][CANDIDATE_TOKENS][vocab]: after
// each token, by one step after another.
static void step_by_step(int slots, const char *shape, const int *slot, int n_seq, const int *tokens, float *logits) {
    Model m;
    Error err = {""};
    int length = CANDIDATE_PROMPT + CANDIDATE_TOKENS, rows[] = {0, 1, 2, 3}, next[CANDIDATE_SEQS];
    if (start_shape(&m, shape, engine, PRECISION_BF16, slots, length + 8)) {
        size_t vocab = (size_t)m.config.vocab_size;
        for (int i = 0; i < n_seq; i++)
            CHECK(model_prefill(&m, slot[i], tokens + i * length, CANDIDATE_PROMPT, 0, &err));
        for (int t = 0; t < CANDIDATE_TOKENS; t++) {
            Batch b = {n_seq, n_seq, n_seq, n_seq, next, slot, rows, rows, false};
            for (int i = 0; i < n_seq; i++) next[i] = tokens[i * length + CANDIDATE_PROMPT + t];
            if (!model_forward(&m, &b, &err) || !m.engine->read_logits(&m, &err)) test_fail("%s", err.text);
            for (int i = 0; i < n_seq; i++)
                memcpy(logits + ((size_t)i * CANDIDATE_TOKENS + t) * vocab, m.logits + i * vocab,
                       vocab * sizeof(float));
        }
    }
    model_close(&m);
}

// beside_prompt: with a prompt in another slot, so of more than CANDIDATE_SEQS. gpus: of the run with candidates; the
// other has one.
static void check_candidates(int slots, const char *shape, bool beside_prompt, int gpus = 1) {
    Model m;
    Error err = {""};
    int slot[CANDIDATE_SEQS + 1] = {slots - 1, 0, slots / 2, 1},
                              n_seq = slots < CANDIDATE_SEQS ? slots : CANDIDATE_SEQS;
    int length = CANDIDATE_PROMPT + CANDIDATE_TOKENS, tokens[CANDIDATE_SEQS * (CANDIDATE_PROMPT + CANDIDATE_TOKENS)];
    int batch[MAX_STEP_ROWS], start[CANDIDATE_SEQS + 2] = {0}, rows[MAX_STEP_ROWS], done[CANDIDATE_SEQS] = {0},
                                                     turn = 0;
    if (!start_speculating(&m, shape, slots, length + 8, gpus)) return;
    size_t vocab = (size_t)m.config.vocab_size;
    float *expected = (float *)malloc((size_t)CANDIDATE_SEQS * CANDIDATE_TOKENS * vocab * sizeof *expected);
    random_tokens(tokens, CANDIDATE_SEQS * length, &m);
    step_by_step(slots, shape, slot, n_seq, tokens, expected);
    for (int i = 0; i < n_seq; i++) CHECK(model_prefill(&m, slot[i], tokens + i * length, CANDIDATE_PROMPT, 0, &err));
    for (; done[0] < CANDIDATE_TOKENS && !test_failure[0]; turn++) {
        int n = 0, most = m.step_rows / n_seq;
        for (int i = 0; i < n_seq; i++) { // as many rows as fit, of those after the first some wrong tokens
            int left = CANDIDATE_TOKENS - done[i], want = 1 + (turn * 3 + i * 5) % 8;
            if (want > left) want = left;
            if (want > most) want = most;
            for (int r = 0; r < want; r++) batch[n++] = tokens[i * length + CANDIDATE_PROMPT + done[i] + r];
            if (want > 2 && turn % 2) batch[n - 1] = 5; // the last candidate is another
            start[i + 1] = n;
        }
        for (int r = 0; r < n + 1; r++) rows[r] = r;
        int n_logits = n, n_rows = n, n_batch = n_seq;
        if (beside_prompt && turn % 2) { // of a sequence that goes away again
            for (int t = 0; t < 9; t++) batch[n_rows++] = 300 + t;
            rows[n_logits++] = n_rows - 1;
            start[++n_batch] = n_rows;
        }
        Batch b = {n_rows, n_batch, n_logits, n_seq, batch, slot, start, rows, false};
        if (!model_forward(&m, &b, &err) || !m.engine->read_logits(&m, &err)) {
            test_fail("%d slots: %s", slots, err.text);
            break;
        }
        if (n_batch > n_seq) kv_reset(&m.kv, slot[n_seq]);
        for (int i = 0; i < n_seq; i++) {
            int right = start[i + 1] - start[i] - (start[i + 1] - start[i] > 2 && turn % 2);
            for (int r = 0; r < right; r++) {
                const float *got = m.logits + (start[i] + r) * vocab;
                int at = done[i] + r;
                if (memcmp(got, expected + ((size_t)i * CANDIDATE_TOKENS + at) * vocab, vocab * sizeof *got) != 0)
                    test_fail("%d slots, sequence %d, token %d, row %d of %d: other bits than in a step of its own",
                              slots, i, at, r, start[i + 1] - start[i]);
                CHECK(m.argmax[start[i] + r] == argmax(got, m.config.vocab_size));
            }
            done[i] += right;
            kv_truncate(&m.kv, slot[i], CANDIDATE_PROMPT + done[i]);
        }
    }
    free(expected);
    model_close(&m);
}

static void test_candidates_have_the_bits_of_one_step_after_another(void) {
    check_candidates(1, NULL, false);
    check_candidates(3, NULL, false);
    check_candidates(20, NULL, false);
    check_candidates(20, NULL, true);
    check_candidates(1, "llama-3.2-1b", false);
    check_candidates(20, "llama-3.2-1b", false);
    check_candidates(1, "llama-3.1-8b int4/int8", false);
    check_candidates(3, "stories int8:32/int8", false);
    check_candidates(20, "llama-3.2-1b fp8+int4:64/fp8", true);
    end("candidates_have_the_bits_of_one_step_after_another");
}

// Several rows of a sequence in a step.
static void test_candidates_by_shards(void) {
    static const char *const shapes[] = {"odd", "stories int8:32/int8"};
    for (const char *shape : shapes) {
        check_candidates(1, shape, false, 2);
        check_candidates(4, shape, true, 2);
    }
    check_candidates(3, "odd", false, 8);
    end("candidates_by_shards");
}

int main(void) {
    static const EngineTest tests[] = {{"candidates_have_the_bits_of_one_step_after_another",
                                        test_candidates_have_the_bits_of_one_step_after_another, FUSED},
                                       {"candidates_by_shards", test_candidates_by_shards, FUSED}};
    return run_with_both_engines(tests);
}
