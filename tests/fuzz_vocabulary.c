// Fuzz target: the tokenizer's tables, and then text with them. The input begins with edits of the 256 bytes' tables:
//   + kind length bytes...   one more token        o/k/b index(2) value   an offset, a kind or a byte changed
//   s/n index(2)             one more token of the second pass, or of those that are never to be found
// and what follows '.' is text: where the tables are good, its ids give it back, and special and added tokens are where a
// plain search finds them.
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

enum { MORE = 64, MOST_LISTED = 16, MOST_BYTES = FUZZ_VOCAB_BYTES + MORE * 256 };

typedef struct {
    int ids[MOST_LISTED], n;
} Listed;

static bool is_listed(const Listed *list, int id) {
    for (int i = 0; i < list->n; i++)
        if (list->ids[i] == id) return true;
    return false;
}

// What tokenizer_encode_added promises, word for word: by going through all tokens at every byte.
static void find_plainly(const Tokenizer *t, const Listed *second, int pass, const AddedTokens *which,
                         const uint8_t *text, size_t n, TokenList *out, Error *err) {
    static int all[FUZZ_VOCAB + MORE];
    size_t start = 0;
    if (pass == 2) { // ordinary text: no token is to be found
        AddedTokens none = {.never = all};
        for (int id = 256; id < t->vocab_size; id++) all[none.n_never++] = id;
        MUST(tokenizer_encode_added(t, text, n, none, out, err));
        return;
    }
    for (size_t at = 0; at < n;) {
        int best = -1;
        size_t longest = 0, length;
        for (int id = 256; id < t->vocab_size; id++) {
            const uint8_t *token = tokenizer_bytes(t, id, &length);
            if ((t->kind[id] != TOKEN_SPECIAL && t->kind[id] != TOKEN_ADDED) || is_listed(second, id) != (pass == 1))
                continue;
            if (length <= longest || length > n - at || memcmp(token, text + at, length) != 0) continue;
            best = id;
            longest = length;
        }
        bool counts = best >= 0 && (which->special || t->kind[best] == TOKEN_ADDED);
        for (int i = 0; i < which->n_never; i++) counts = counts && which->never[i] != best;
        if (counts) {
            find_plainly(t, second, pass + 1, which, text + start, at - start, out, err);
            MUST(tokens_append(out, best, err));
            start = at + longest;
        }
        at += best >= 0 ? longest : 1;
    }
    find_plainly(t, second, pass + 1, which, text + start, n - start, out, err);
}

static void check_text(const Tokenizer *t, const Listed *second, AddedTokens which, const uint8_t *text, size_t n) {
    TokenList ids = {0}, plain = {0};
    Error err = {""};
    size_t at = 0;
    MUST(tokenizer_encode_added(t, text, n, which, &ids, &err));
    for (size_t i = 0; i < ids.n; i++) {
        size_t length;
        MUST(ids.ids[i] >= 0 && ids.ids[i] < t->vocab_size);
        const uint8_t *token = tokenizer_bytes(t, ids.ids[i], &length);
        MUST(length <= n - at && memcmp(token, text + at, length) == 0);
        uint8_t kind = t->kind[ids.ids[i]];
        MUST(kind == TOKEN_MERGEABLE || kind == TOKEN_ADDED || (kind == TOKEN_SPECIAL && which.special));
        at += length;
    }
    MUST(at == n);
    find_plainly(t, second, 0, &which, text, n, &plain, &err);
    MUST(plain.n == ids.n && (ids.n == 0 || memcmp(plain.ids, ids.ids, ids.n * sizeof *ids.ids) == 0));
    tokens_free(&ids);
    tokens_free(&plain);
}

int LLVMFuzzerTestOneInput(const uint8_t *input, size_t n) {
    uint32_t *offsets = malloc((FUZZ_VOCAB + MORE + 1) * sizeof *offsets), n_bytes = 256;
    uint8_t *kind = malloc(FUZZ_VOCAB + MORE), *bytes = malloc(MOST_BYTES);
    MUST(offsets && kind && bytes);
    byte_tables(offsets, kind, bytes);
    int vocab = 256;
    Listed second = {.n = 0}, never = {.n = 0};
    Input in = {input, input + n};
    for (uint32_t edit; in.at < in.end && (edit = take(&in)) != '.';) {
        if (edit == '+' && vocab < FUZZ_VOCAB + MORE) {
            kind[vocab++] = (uint8_t)(take(&in) & 3);
            for (uint32_t length = take(&in); length > 0; length--) bytes[n_bytes++] = (uint8_t)take(&in);
            offsets[vocab] = n_bytes;
        } else if (edit == 's' || edit == 'n') {
            Listed *list = edit == 's' ? &second : &never;
            int id = (int)(int16_t)take_index(&in);
            if (list->n < MOST_LISTED) list->ids[list->n++] = id;
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
    ok = tokenizer_second_pass(&t, second.ids, second.n, &err);
    must_explain(ok, &err);
    for (int special = 0; ok && special < 2; special++)
        check_text(&t, &second, (AddedTokens){special, never.ids, never.n}, in.at, (size_t)(in.end - in.at));
    tokenizer_free(&t);
    return 0;
}
