// How fast speculation is when each candidate is right with a given probability: the tokens of a plain run are known,
// and candidates are taken from them.
//
//   bench_speculate MODEL|SHAPE ENGINE PROBABILITY TOKENS [TEMPERATURE]
//
// One sequence after a prompt of 128 tokens, bf16. It prints milliseconds a token, plain and with speculation, and
// fails if a token differs.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../model/file/checkpoint.h"
#include "../model/generate/generate.h"
#include "../model/synthetic.h"

enum { PROMPT = 128 };

typedef struct {
    const Sequence *plain;
    double right;
    uint64_t random;
    int vocab_size;
} Known;

static bool propose_known(void *context, Proposal *p, int n, Error *err) {
    Known *k = context;
    (void)err;
    for (int i = 0; i < n; i++)
        for (p[i].n = 0; p[i].n < p[i].most; p[i].n++) {
            const TokenList *ids = &k->plain->ids;
            size_t at = p[i].n_ids + (size_t)p[i].n;
            int id = at < ids->n ? ids->ids[at] : 0;
            p[i].candidates[p[i].n] = random_uniform(&k->random) < k->right ? id : (id + 1) % k->vocab_size;
        }
    return true;
}

static bool finish(void *context, Sequence *seq, Error *err) {
    (void)context, (void)seq, (void)err;
    return true;
}

static bool start(Model *m, const char *name, const char *engine, bool speculates, int n, Error *err) {
    bool ok = model_has_shape(name) ? synthetic_open(m, name, 1, err) : checkpoint_open(m, name, false, err);
    return ok && model_choose(m, engine, PRECISION_BF16, err) && (!speculates || speculation_prepare(m, 1, err)) &&
           model_start(m, engine, PRECISION_BF16, 1, PROMPT + n, err);
}

// Seconds a token after the first; below 0: it failed.
static double run(Model *m, Sequence *seq, int n, float temperature, Speculation *s, Error *err) {
    *seq = (Sequence){.config = {.n = n,
                                 .ignore_eos = true,
                                 .sampler = {.temperature = temperature, .top_p = temperature > 0 ? 0.9f : 1},
                                 .speculation = s}};
    for (int i = 0; i < PROMPT; i++)
        if (!tokens_append(&seq->prompt, 3 + i * 37 % (m->config.vocab_size - 3), err)) return -1;
    if (!generate(m, seq, 1, &(GenerateSink){.finished = finish}, err)) return -1;
    return (seq->last - seq->first) / (double)(seq->ids.n - 1);
}

int main(int argc, char **argv) {
    Model plain = {.file.fd = -1}, model = {.file.fd = -1};
    Sequence a = {.index = 0}, warm = {.index = 0}, b = {.index = 0};
    Error err = {""};
    if (argc < 5) {
        fprintf(stderr, "usage: bench_speculate MODEL|SHAPE ENGINE PROBABILITY TOKENS [TEMPERATURE]\n");
        return 2;
    }
    int n = atoi(argv[4]);
    float temperature = argc > 5 ? (float)atof(argv[5]) : 0;
    double before = -1, after = -1;
    if (start(&plain, argv[1], argv[2], false, n, &err) && run(&plain, &warm, n, temperature, NULL, &err) >= 0)
        before = run(&plain, &a, n, temperature, NULL, &err);
    model_close(&plain);
    sequence_free(&warm);
    if (before >= 0 && start(&model, argv[1], argv[2], true, n, &err)) {
        Known known = {&a, atof(argv[3]), 1, model.config.vocab_size};
        const Proposer proposer = {
            .name = "known", .prior = {known.right}, .propose = propose_known, .context = &known};
        Speculation s;
        speculation_init(&s, &model, &proposer);
        if (run(&model, &warm, n, temperature, &s, &err) >= 0) after = run(&model, &b, n, temperature, &s, &err);
        bool same = after >= 0 && a.ids.n == b.ids.n && memcmp(a.ids.ids, b.ids.ids, a.ids.n * sizeof *a.ids.ids) == 0;
        if (after >= 0 && !same) fail(&err, "a token differs from the plain run's");
    }
    if (!err.text[0])
        printf("plain %.3f ms a token; %.0f %% right: %.3f ms, %.2f x; %.2f tokens a step, %.2f candidates\n",
               before * 1e3, 100 * atof(argv[3]), after * 1e3, before / after,
               (double)b.counts.tokens / (double)b.counts.steps, (double)b.counts.candidates / (double)b.counts.steps);
    else
        fprintf(stderr, "bench_speculate: %s\n", err.text);
    model_close(&model);
    sequence_free(&a);
    sequence_free(&warm);
    sequence_free(&b);
    return err.text[0] != 0;
}
