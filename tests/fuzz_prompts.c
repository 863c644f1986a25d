// Fuzz target: what a user gives as a prompt. The input's first byte says how to read the rest: a prompts file ('p'),
// ids ('i') or text (any other).
#include "fuzz.h"

#include "../cli/input.h"

static Model model;

int LLVMFuzzerInitialize(int *argc, char ***argv) {
    (void)argc, (void)argv;
    uint32_t *offsets = malloc((FUZZ_VOCAB + 1) * sizeof *offsets);
    uint8_t *kind = malloc(FUZZ_VOCAB), *bytes = malloc(FUZZ_VOCAB_BYTES);
    Error err = {""};
    MUST(offsets && kind && bytes);
    byte_tables(offsets, kind, bytes);
    model.config = (Config){.vocab_size = FUZZ_VOCAB, .bos_id = 256, .max_seq_len = 1000};
    MUST(tokenizer_init(&model.tokenizer, FUZZ_VOCAB, offsets, kind, bytes, FUZZ_VOCAB_BYTES, &err));
    return 0;
}

static void must_be_ids(const TokenList *ids) {
    for (size_t i = 0; i < ids->n; i++) MUST(ids->ids[i] >= 0 && ids->ids[i] < FUZZ_VOCAB);
}

int LLVMFuzzerTestOneInput(const uint8_t *input, size_t n) {
    if (n == 0) return 0;
    Options o = flags_default();
    Error err = {""};
    char *copy = malloc(n); // the input without its first byte, and a NUL
    MUST(copy);
    memcpy(copy, input + 1, n - 1);
    copy[n - 1] = 0;
    Bytes text = {.data = copy, .n = n - 1};
    if (input[0] == 'p') {
        Sequence *seqs = NULL;
        int count = 0;
        o.prompts = "prompts";
        must_explain(parse_prompts(&o, &model, &text, &seqs, &count, &err), &err);
        for (int i = 0; i < count; i++) {
            must_be_ids(&seqs[i].prompt);
            sequence_free(&seqs[i]);
        }
        free(seqs);
    } else {
        TokenList ids = {0};
        o.ids = input[0] == 'i';
        o.special = input[0] == 's';
        must_explain(encode_prompt(&o, &model, &text, &ids, &err), &err);
        must_be_ids(&ids);
        tokens_free(&ids);
    }
    free(copy);
    return 0;
}
