// Fuzz target: where special and added tokens are found in text, beside a plain search. The input is up to 15 tokens,
// each a byte of choices (bit 0: special; 1: of the second pass; 2: never to be found; 3 to 5: length - 1) and its
// text; a byte with bits 6 and 7 set ends them, and what follows is text.
#include "fuzz.h"

#include "../tokenizer/encode.h"

enum { PAIRS = 4, ORDINARY = 256 + PAIRS, MOST_ADDED = 15, MOST_LENGTH = 8 };

// What tokenizer_encode_added promises, word for word: by going through all tokens at every byte.
static void find_plainly(const Tokenizer *t, const uint8_t *in_second, int pass, const AddedTokens *which,
                         const uint8_t *text, size_t n, TokenList *out, Error *err) {
    static int all[MOST_ADDED];
    size_t start = 0;
    if (pass == 2) { // ordinary text: no token is to be found
        AddedTokens none = {.never = all};
        for (int id = ORDINARY; id < t->vocab_size; id++) all[none.n_never++] = id;
        MUST(tokenizer_encode_added(t, text, n, none, out, err));
        return;
    }
    for (size_t at = 0; at < n;) {
        int best = -1;
        size_t longest = 0, length;
        for (int id = ORDINARY; id < t->vocab_size; id++) {
            const uint8_t *token = tokenizer_bytes(t, id, &length);
            if ((t->kind[id] != TOKEN_SPECIAL && t->kind[id] != TOKEN_ADDED) ||
                (in_second[id - ORDINARY] != 0) != (pass == 1))
                continue;
            if (length <= longest || length > n - at || memcmp(token, text + at, length) != 0) continue;
            best = id;
            longest = length;
        }
        bool counts = best >= 0 && (which->special || t->kind[best] == TOKEN_ADDED);
        for (int i = 0; i < which->n_never; i++) counts = counts && which->never[i] != best;
        if (counts) {
            find_plainly(t, in_second, pass + 1, which, text + start, at - start, out, err);
            MUST(tokens_append(out, best, err));
            start = at + longest;
        }
        at += best >= 0 ? longest : 1;
    }
    find_plainly(t, in_second, pass + 1, which, text + start, n - start, out, err);
}

static void check_text(const Tokenizer *t, const uint8_t *in_second, AddedTokens which, const uint8_t *text, size_t n) {
    TokenList ids = {0}, plain = {0};
    Error err = {""};
    size_t at = 0;
    MUST(tokenizer_encode_added(t, text, n, which, &ids, &err));
    for (size_t i = 0; i < ids.n; i++) {
        size_t length;
        MUST(ids.ids[i] >= 0 && ids.ids[i] < t->vocab_size);
        const uint8_t *token = tokenizer_bytes(t, ids.ids[i], &length);
        MUST(length <= n - at && memcmp(token, text + at, length) == 0);
        at += length;
    }
    MUST(at == n);
    find_plainly(t, in_second, 0, &which, text, n, &plain, &err);
    MUST(plain.n == ids.n && (ids.n == 0 || memcmp(plain.ids, ids.ids, ids.n * sizeof *ids.ids) == 0));
    tokens_free(&ids);
    tokens_free(&plain);
}

// The bytes and a few pairs, with room for added tokens: every input has its own, in one tokenizer whose tables of
// ordinary tokens stay.
static void make_tokenizer(Tokenizer *t) {
    static const char *const pairs[PAIRS] = {"ab", "<|", "|>", "  "};
    uint32_t *offsets = malloc((ORDINARY + MOST_ADDED + 1) * sizeof *offsets);
    uint8_t *kind = calloc(ORDINARY + MOST_ADDED, 1), *bytes = malloc(256 + 2 * PAIRS + MOST_ADDED * MOST_LENGTH);
    MUST(offsets && kind && bytes);
    for (int i = 0; i < 256; i++) bytes[offsets[i] = (uint32_t)i] = (uint8_t)i;
    for (int i = 0; i < PAIRS; i++) memcpy(bytes + (offsets[256 + i] = 256 + 2 * (uint32_t)i), pairs[i], 2);
    offsets[ORDINARY] = 256 + 2 * PAIRS;
    Error err = {""};
    MUST(tokenizer_init(t, ORDINARY, offsets, kind, bytes, offsets[ORDINARY], &err));
}

int LLVMFuzzerTestOneInput(const uint8_t *input, size_t n) {
    static Tokenizer t;
    if (!t.offsets) make_tokenizer(&t);
    int second[MOST_ADDED], never[MOST_ADDED], n_second = 0, n_never = 0;
    uint8_t in_second[MOST_ADDED] = {0};
    size_t at = 0;
    t.vocab_size = ORDINARY;
    while (at < n && t.vocab_size < ORDINARY + MOST_ADDED && input[at] < 0xC0) {
        uint8_t choices = input[at++];
        int id = t.vocab_size;
        size_t length = (size_t)(choices >> 3 & 7) + 1;
        if (length > n - at) return 0;
        memcpy(t.bytes + t.offsets[id], input + at, length);
        t.offsets[id + 1] = t.offsets[id] + (uint32_t)length;
        t.kind[id] = choices & 1 ? TOKEN_SPECIAL : TOKEN_ADDED;
        if (choices & 2) second[n_second++] = id, in_second[id - ORDINARY] = 1;
        if (choices & 4) never[n_never++] = id;
        at += length;
        t.vocab_size++;
    }
    at += at < n;
    Error err = {""};
    MUST(tokenizer_second_pass(&t, second, n_second, &err));
    for (int special = 0; special < 2; special++)
        check_text(&t, in_second, (AddedTokens){special, never, n_never}, input + at, n - at);
    return 0;
}
