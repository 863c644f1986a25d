// For libFuzzer (make fuzz FUZZ=tokenizer): any bytes through splitting, encoding, decoding, the stream's UTF-8 and the
// chat frame, each held against what it promises. --vocabulary=FILE takes another model.bin than the story model.
#include "../model/file/checkpoint.h"
#include "../model/model.h"
#include "../tokenizer/bpe.h"
#include "../tokenizer/chat.h"
#include "../tokenizer/encode.h"
#include "../tokenizer/split.h"
#include "../tokenizer/utf8.h"
#include "vocabulary.h"

static Tokenizer chat_tokenizer;
static Model model;

// Stops where the fuzzer sees it.
static void expect(bool held, const char *what) {
    if (held) return;
    fprintf(stderr, "fuzz_tokenizer: %s\n", what);
    abort();
}

int LLVMFuzzerInitialize(int *argc, char ***argv) {
    const char *path = "model/stories.bin", *flag = "--vocabulary=";
    for (int i = 1; i < *argc; i++)
        if (strncmp((*argv)[i], flag, strlen(flag)) == 0) path = (*argv)[i] + strlen(flag);
    Error err = {""};
    bool ok = checkpoint_open(&model, path, true, &err) && init_chat_vocabulary(&chat_tokenizer, &err);
    expect(ok, err.text);
    return 0;
}

// The text comes back whole, from ordinary tokens unless special ones were asked for.
static void check_encode(const Tokenizer *t, const uint8_t *text, size_t n, bool special) {
    TokenList ids = {0};
    Error err = {""};
    expect(tokenizer_encode(t, text, n, special, &ids, &err), err.text);
    expect(decodes_to(t, &ids, text, n), "the ids do not decode to the text");
    for (size_t i = 0; i < ids.n; i++)
        expect(t->kind[ids.ids[i]] == TOKEN_MERGEABLE || (special && t->kind[ids.ids[i]] == TOKEN_SPECIAL),
               "an id of the wrong kind");
    tokens_free(&ids);
}

// Pieces cover valid text character by character, and encode the same one by one as all together.
static void check_pieces(const Tokenizer *t, const uint8_t *text, size_t n) {
    TokenList together = {0}, one_by_one = {0};
    Error err = {""};
    n = utf8_valid_prefix(text, n);
    for (size_t at = 0, length; at < n; at += length) {
        length = split_next(text + at, n - at);
        expect(length > 0 && length <= n - at, "a piece outside the text");
        expect(at + length == n || (text[at + length] & 0xC0) != 0x80, "a piece that cuts a character");
        expect(bpe_encode(t, text + at, length, &one_by_one, &err), err.text);
    }
    expect(tokenizer_encode(t, text, n, false, &together, &err), err.text);
    expect(same_ids(&together, &one_by_one), "other ids together than one by one");
    tokens_free(&together);
    tokens_free(&one_by_one);
}

// A stream of tokens, whichever they are, as generate.c lets it out: at most three bytes wait, and of valid text only
// whole characters are shown.
static void check_stream(const Tokenizer *t, const uint8_t *data, size_t n) {
    uint8_t *text = malloc(n * (t->max_token_bytes + 1) + 1);
    size_t total = 0, shown = 0, *cuts = malloc((n + 1) * sizeof *cuts), n_cuts = 0;
    for (size_t i = 0; i + 3 <= n; i += 3) {
        int id = (int)((data[i] | (unsigned)data[i + 1] << 8 | (unsigned)data[i + 2] << 16) % (unsigned)t->vocab_size);
        size_t length;
        const uint8_t *bytes = tokenizer_bytes(t, id, &length);
        if (t->kind[id] != TOKEN_MERGEABLE) continue;
        memcpy(text + total, bytes, length);
        total += length;
        size_t wait = utf8_incomplete_tail(text + shown, total - shown);
        expect(wait <= 3 && wait <= total - shown, "more than three bytes wait");
        cuts[n_cuts++] = shown = total - wait;
    }
    size_t valid = utf8_valid_prefix(text, total);
    for (size_t i = 0; i < n_cuts && cuts[i] <= valid; i++)
        expect(cuts[i] == valid || (text[cuts[i]] & 0xC0) != 0x80, "a character shown in parts");
    free(text);
    free(cuts);
}

static bool is_white(const uint8_t *s, size_t n) {
    uint32_t cp;
    for (int length; n > 0; s += length, n -= (size_t)length) {
        if ((length = utf8_decode(s, n, &cp)) == 0) return false;
        bool white = (cp >= 0x09 && cp <= 0x0D) || (cp >= 0x1C && cp <= 0x20) || cp == 0x85 || cp == 0xA0 ||
                     cp == 0x1680 || (cp >= 0x2000 && cp <= 0x200A) || cp == 0x2028 || cp == 0x2029 || cp == 0x202F ||
                     cp == 0x205F || cp == 0x3000;
        if (!white) return false;
    }
    return true;
}

// A message adds the frame's special tokens and no others, and its text, of which only white space at the ends is lost.
static void check_chat(const uint8_t *text, size_t n) {
    const Tokenizer *t = &chat_tokenizer;
    Chat c;
    Error err = {""};
    TokenList ids = {0};
    expect(chat_init(&c, t, n & 1 ? CHAT_LLAMA3 : CHAT_LLAMA3_1, BOS, &err), err.text);
    expect(chat_begin(&c, n & 2 ? text : NULL, n, CHAT_DATE, &ids, &err), err.text);
    size_t begin = ids.n, specials = 0, decoded = 0;
    expect(chat_message(&c, "user", text, n, &ids, &err), err.text);
    uint8_t *body = malloc(n + 16);
    for (size_t i = begin; i < ids.n; i++) {
        size_t length;
        const uint8_t *bytes = tokenizer_bytes(t, ids.ids[i], &length);
        if (t->kind[ids.ids[i]] == TOKEN_SPECIAL) {
            specials++;
            continue;
        }
        expect(decoded + length <= n + 6, "a message longer than it was");
        memcpy(body + decoded, bytes, length);
        decoded += length;
    }
    expect(specials == 3 && ids.ids[begin] == START && ids.ids[ids.n - 1] == EOT, "another frame");
    expect(decoded >= 6 && memcmp(body, "user\n\n", 6) == 0, "another header");
    decoded -= 6;
    bool found = false; // somewhere in the text, with nothing but white space before and behind it
    for (size_t at = 0; at + decoded <= n && !found; at++)
        found = memcmp(text + at, body + 6, decoded) == 0 && is_white(text, at) &&
                is_white(text + at + decoded, n - at - decoded);
    expect(found, "more than white space is lost of a message");
    expect(chat_reply_header(&c, &ids, &err), err.text);
    free(body);
    tokens_free(&ids);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n) {
    for (int special = 0; special <= 1; special++) check_encode(&model.tokenizer, data, n, special);
    check_encode(&chat_tokenizer, data, n, true);
    check_pieces(&model.tokenizer, data, n);
    check_stream(&model.tokenizer, data, n);
    check_chat(data, n);
    return 0;
}
