// Fuzz target: the tokenizer's tables, and then text with them. The input begins with edits of the 256 bytes' tables:
//   + kind length bytes...   one more token        o/k/b index(2) value   an offset, a kind or a byte changed
//   s index(2)               one more token of the second pass
// and what follows '.' is text: where the tables are good, its ids give it back.
#include "fuzz.h"

#include "../tokenizer/encode.h"

typedef struct {
    const uint8_t *at, *end;
} Input;

static uint32_t take(Input *in) {
    return in->at < in->end ? *in->at++ : 0;
}

static uint32_t take_index(Input *in) {
    uint32_t high = take(in) << 8;
    return high | take(in);
}

int LLVMFuzzerTestOneInput(const uint8_t *input, size_t n) {
    enum { MORE = 64, MOST_BYTES = FUZZ_VOCAB_BYTES + MORE * 256, MOST_SECOND = 16 };
    uint32_t *offsets = malloc((FUZZ_VOCAB + MORE + 1) * sizeof *offsets), n_bytes = 256;
    uint8_t *kind = malloc(FUZZ_VOCAB + MORE), *bytes = malloc(MOST_BYTES);
    MUST(offsets && kind && bytes);
    byte_tables(offsets, kind, bytes);
    int vocab = 256, second[MOST_SECOND], n_second = 0;
    Input in = {input, input + n};
    for (uint32_t edit; in.at < in.end && (edit = take(&in)) != '.';) {
        if (edit == '+' && vocab < FUZZ_VOCAB + MORE) {
            kind[vocab++] = (uint8_t)(take(&in) & 3);
            for (uint32_t length = take(&in); length > 0; length--) bytes[n_bytes++] = (uint8_t)take(&in);
            offsets[vocab] = n_bytes;
        } else if (edit == 's' && n_second < MOST_SECOND) {
            second[n_second++] = (int16_t)take_index(&in);
        } else if (edit == 'o' || edit == 'k' || edit == 'b') {
            uint32_t index = take_index(&in), value = take(&in);
            if (edit == 'o') offsets[index % (uint32_t)(vocab + 1)] += value - 128;
            if (edit == 'k') kind[index % (uint32_t)vocab] = (uint8_t)value;
            if (edit == 'b') bytes[index % n_bytes] = (uint8_t)value;
        }
    }
    Tokenizer t;
    Error err = {""};
    bool ok = tokenizer_init(&t, vocab, offsets, kind, bytes, n_bytes, &err);
    must_explain(ok, &err);
    if (!ok) return 0;
    ok = tokenizer_second_pass(&t, second, n_second, &err);
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
            uint8_t of = t.kind[ids.ids[i]];
            MUST(of == TOKEN_MERGEABLE || of == TOKEN_ADDED || (of == TOKEN_SPECIAL && special));
            at += token_length;
        }
        MUST(at == length);
        tokens_free(&ids);
    }
    tokenizer_free(&t);
    return 0;
}
