// Fuzz target: the tokenizer's tables, and then text with them. The input begins with edits of the 256 bytes' tables:
//   + kind length bytes...   one more token        o/k/b index(2) value   an offset, a kind or a byte changed
// and what follows '.' is text: where the tables are good, its ids give it back.
#include "fuzz.h"

#include "../tokenizer/encode.h"

typedef struct {
    const uint8_t *at, *end;
} Input;

static uint32_t take(Input *in) {
    return in->at < in->end ? *in->at++ : 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *input, size_t n) {
    enum { MORE = 64, MOST_BYTES = FUZZ_VOCAB_BYTES + MORE * 256 };
    uint32_t *offsets = malloc((FUZZ_VOCAB + MORE + 1) * sizeof *offsets), n_bytes = 256;
    uint8_t *kind = malloc(FUZZ_VOCAB + MORE), *bytes = malloc(MOST_BYTES);
    MUST(offsets && kind && bytes);
    byte_tables(offsets, kind, bytes);
    int vocab = 256;
    Input in = {input, input + n};
    for (uint32_t edit; in.at < in.end && (edit = take(&in)) != '.';) {
        if (edit == '+' && vocab < FUZZ_VOCAB + MORE) {
            kind[vocab++] = (uint8_t)(take(&in) & 3);
            for (uint32_t length = take(&in); length > 0; length--) bytes[n_bytes++] = (uint8_t)take(&in);
            offsets[vocab] = n_bytes;
        } else if (edit == 'o' || edit == 'k' || edit == 'b') {
            uint32_t index = take(&in) << 8;
            index |= take(&in);
            uint32_t value = take(&in);
            if (edit == 'o') offsets[index % (uint32_t)(vocab + 1)] += value - 128;
            if (edit == 'k') kind[index % (uint32_t)vocab] = (uint8_t)value;
            if (edit == 'b') bytes[index % n_bytes] = (uint8_t)value;
        }
    }
    Tokenizer t;
    Error err = {""};
    bool ok = tokenizer_init(&t, vocab, offsets, kind, bytes, n_bytes, &err);
    must_explain(ok, &err);
    for (int special = 0; ok && special < 2; special++) {
        size_t length = (size_t)(in.end - in.at), at = 0;
        TokenList ids = {0};
        MUST(tokenizer_encode(&t, in.at, length, special, &ids, &err));
        for (size_t i = 0; i < ids.n; i++) {
            size_t token_length;
            MUST(ids.ids[i] >= 0 && ids.ids[i] < vocab);
            const uint8_t *token = tokenizer_bytes(&t, ids.ids[i], &token_length);
            MUST(token_length <= length - at && memcmp(token, in.at + at, token_length) == 0);
            MUST(t.kind[ids.ids[i]] == TOKEN_MERGEABLE || special);
            at += token_length;
        }
        MUST(at == length);
        tokens_free(&ids);
    }
    if (ok) tokenizer_free(&t);
    return 0;
}
