// Fuzz target: sequences of random lengths, settings and common beginnings, in a cache of random slots and pages, on
// engine cpu and a model of two layers. Each has the tokens, the text, the log-probabilities and the end of its own run
// alone, to the bit.
//
// The input: slots, and whether candidates are looked up, some or as many as there are; positions of each, pages of all
// (0: as many as they can use); then 6 bytes a sequence: the prompt's length (two), how much of it is its group's, and
// the group, new tokens, and settings.
#include "fuzz.h"

#include "../model/generate/generate.h"
#include "../model/synthetic.h"
#include "../model/threads.h"

enum { MOST_SEQS = 12, MOST_SLOTS = 9, MOST_LEN = 400, VOCAB = 256, TOP = 2, BYTES_OF_SEQ = 6 };

static Model alone, together;

static void open_model(Model *m) {
    Error err = {""};
    MUST(synthetic_open(m, "llama-3.2-1b", 5, &err));
    Config *c = &m->config;
    c->n_layers = 2;
    c->n_heads = 2;
    c->n_kv_heads = 1;
    c->head_dim = 8;
    c->dim = 16;
    c->hidden_dim = 24;
    c->vocab_size = VOCAB;
    c->n_eos = 1;
    c->eos_ids[0] = 7;
    config_derive(c);
}

int LLVMFuzzerInitialize(int *argc, char ***argv) {
    (void)argc, (void)argv;
    Error err = {""};
    threads_set(1);
    open_model(&alone);
    open_model(&together);
    MUST(model_start(&alone, "cpu", PRECISION_F32, 1, MOST_LEN, &err));
    return 0;
}

static bool finish(void *context, Sequence *seq, Error *err) {
    (void)err;
    MUST(seq->index == *(int *)context); // in input order
    ++*(int *)context;
    return true;
}

// Sequence i of the input; where it would never fit, shorter.
static void set_sequence(Sequence *seq, int i, const uint8_t *in, int longest) {
    static const char *const stops[] = {"e", "th"};
    Error err = {""};
    int length = 1 + (in[0] | in[1] << 8) % 300, same = in[2] * 2, group = in[3] % 3, n_new = in[4] % 80;
    if (length > longest - 1) length = longest - 1;
    if (n_new > longest - length) n_new = longest - length;
    *seq = (Sequence){.index = i,
                      .config = {.n = n_new,
                                 .ignore_eos = in[5] & 1,
                                 .logprobs = in[5] & 2 ? TOP : 0,
                                 .prompt_logprobs = (in[5] & 6) == 6,
                                 .n_stops = in[5] & 8 ? 2 : 0,
                                 .stops = stops,
                                 .seed = in[1],
                                 .sampler = {.temperature = in[5] & 16 ? 0.8f : 0,
                                             .top_p = in[5] & 32 ? 0.9f : 1,
                                             .repetition_penalty = in[5] & 64 ? 1.2f : 1}}};
    for (int k = 0; k < length; k++)
        MUST(tokens_append(&seq->prompt, (k < same ? group * 31 + k * 7 : i * 13 + k * 5 + in[1]) % VOCAB, &err));
}

// own: its run alone, with log-probabilities, so that no token of it is drawn by the engine.
static void must_equal(const Sequence *own, const Sequence *seq) {
    MUST(own->ids.n == seq->ids.n && own->text.n == seq->text.n);
    MUST(own->ids.n == 0 || memcmp(own->ids.ids, seq->ids.ids, own->ids.n * sizeof *own->ids.ids) == 0);
    MUST(strcmp(own->finish_reason, seq->finish_reason) == 0);
    MUST(own->text.n == 0 || memcmp(own->text.data, seq->text.data, own->text.n) == 0);
    MUST(own->n_scored == seq->n_scored);
    if (!seq->config.logprobs) return;
    MUST(memcmp(own->logprobs.values, seq->logprobs.values, own->ids.n * (1 + TOP) * sizeof(float)) == 0);
    MUST(memcmp(own->logprobs.top_ids, seq->logprobs.top_ids, own->ids.n * TOP * sizeof(int)) == 0);
}

int LLVMFuzzerTestOneInput(const uint8_t *input, size_t n) {
    static Sequence seqs[MOST_SEQS];
    if (n < 4 + BYTES_OF_SEQ) return 0;
    int slots = 1 + input[0] % MOST_SLOTS, max_len = 2 + (input[1] | input[2] << 8) % (MOST_LEN - 1),
        pages = input[3] % 20;
    int n_seqs = (int)((n - 4) / BYTES_OF_SEQ < MOST_SEQS ? (n - 4) / BYTES_OF_SEQ : MOST_SEQS), done = 0;
    Error err = {""};
    GenerateSink sink = {.finished = finish, .context = &done};
    Speculation speculation = {.model = NULL};
    const Config *c = &together.config;
    together.kv_memory =
        (uint64_t)pages * 2 * (uint64_t)c->n_layers * kv_page_elements(c->n_kv_heads, c->head_dim) * sizeof(float);
    together.step_rows = 0;
    together.speculates = false;
    if (input[0] & 128) {
        MUST(model_choose(&together, "cpu", PRECISION_F32, &err) && speculation_prepare(&together, slots, &err));
        MUST(lookup_open(&speculation, &together, slots, &err));
        speculation.always = input[0] & 64;
    }
    MUST(model_start(&together, "cpu", PRECISION_F32, slots, max_len, &err));
    for (int i = 0; i < n_seqs; i++) {
        set_sequence(&seqs[i], i, input + 4 + i * BYTES_OF_SEQ, kv_longest(&together.kv));
        if (speculation.model) seqs[i].config.speculation = &speculation;
    }
    MUST(generate(&together, seqs, n_seqs, &sink, &err) && done == n_seqs);
    MUST(n_seqs == 1 || kv_free_pages(&together.kv) == together.kv.n_pages);
    MUST(seqs[0].n_left == 0);
    for (int i = 0; i < n_seqs; i++) {
        Sequence own;
        set_sequence(&own, i, input + 4 + i * BYTES_OF_SEQ, kv_longest(&together.kv));
        own.config.logprobs = TOP;
        done = i;
        MUST(generate(&alone, &own, 1, &sink, &err));
        must_equal(&own, &seqs[i]);
        sequence_free(&own);
        sequence_free(&seqs[i]);
    }
    speculation_close(&speculation);
    model_stop(&together);
    return 0;
}
