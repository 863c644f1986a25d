// What the tests of the tokenizer share: files of golden vectors, ids, a vocabulary of a few tokens, and LLaMA 3's from
// ../shared/tokenizer, where its README explains the files.
#ifndef VOCABULARY_H
#define VOCABULARY_H

#include <sys/stat.h>

#include "../tokenizer/tokenizer.h"
#include "check.h"

#define SHARED "../shared/tokenizer/"
#define LENGTH(array) ((int)(sizeof(array) / sizeof *(array)))

__attribute__((unused)) static uint64_t random_state = 1;

static inline uint32_t random_below(uint32_t n) {
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)((random_state >> 32) * n >> 32);
}

// A whole file, with a NUL after it; NULL if there is none.
static inline char *read_file(const char *path, size_t *n) {
    struct stat info;
    FILE *f = fopen(path, "rb");
    if (!f) return NULL;
    char *text = fstat(fileno(f), &info) == 0 ? malloc((size_t)info.st_size + 1) : NULL;
    *n = text ? fread(text, 1, (size_t)info.st_size, f) : 0;
    if (text) text[*n] = 0;
    fclose(f);
    return text;
}

// The next line of *at, without its end; NULL after the last.
static inline char *next_line(char **at) {
    char *line = *at;
    if (!*line) return NULL;
    char *end = strchr(line, '\n');
    *at = end ? end + 1 : line + strlen(line);
    if (end) *end = 0;
    return line;
}

// Cuts a line at its tabs into at most max fields.
static inline int split_fields(char *line, char **fields, int max) {
    int n = 0;
    for (fields[n++] = line; n < max && (line = strchr(line, '\t')); fields[n++] = ++line) *line = 0;
    return n;
}

static inline uint8_t *from_hex(const char *hex, size_t *n) {
    *n = strlen(hex) / 2;
    uint8_t *bytes = malloc(*n + 1);
    for (size_t i = 0; i < *n; i++) {
        unsigned byte = 0;
        sscanf(hex + 2 * i, "%2x", &byte);
        bytes[i] = (uint8_t)byte;
    }
    return bytes;
}

static inline TokenList parse_ids(const char *text) {
    TokenList list = {0};
    Error err = {""};
    for (char *end; *text; text = end) {
        int id = (int)strtol(text, &end, 10);
        if (end == text) break;
        tokens_append(&list, id, &err);
    }
    return list;
}

static inline TokenList encode(const Tokenizer *t, const uint8_t *text, size_t n, bool special) {
    TokenList list = {0};
    Error err = {""};
    uint8_t *exact = malloc(n ? n : 1); // of just that size: the sanitizers see a byte read too many
    memcpy(exact, text, n);
    if (!tokenizer_encode(t, exact, n, special, &list, &err)) test_fail("tokenizer_encode: %s", err.text);
    free(exact);
    return list;
}

static inline bool same_ids(const TokenList *a, const TokenList *b) {
    return a->n == b->n && (a->n == 0 || memcmp(a->ids, b->ids, a->n * sizeof *a->ids) == 0);
}

// Whether the tokens' bytes, one after another, are the text.
static inline bool decodes_to(const Tokenizer *t, const TokenList *list, const uint8_t *text, size_t n) {
    size_t at = 0;
    for (size_t i = 0; i < list->n; i++) {
        size_t length;
        if (list->ids[i] < 0 || list->ids[i] >= t->vocab_size) return false;
        const uint8_t *bytes = tokenizer_bytes(t, list->ids[i], &length);
        if (length > n - at || memcmp(bytes, text + at, length) != 0) return false;
        at += length;
    }
    return at == n;
}

// ---- vocabularies ---------------------------------------------------------------------------------------------------

typedef struct {
    int vocab_size;
    uint32_t offsets[300];
    uint8_t kind[300], bytes[600];
} Vocabulary;

// Every single byte, then "ab", a special token, and an unused id without text.
static inline Vocabulary small_vocabulary(void) {
    Vocabulary v = {.vocab_size = 259};
    for (uint32_t b = 0; b < 256; b++) {
        v.offsets[b] = b;
        v.bytes[b] = (uint8_t)b;
    }
    memcpy(v.bytes + 256, "ab<end>", 7);
    v.offsets[256] = 256;
    v.offsets[257] = 258;
    v.kind[257] = TOKEN_SPECIAL;
    v.offsets[258] = v.offsets[259] = 263;
    v.kind[258] = TOKEN_UNUSED;
    return v;
}

static inline bool init_vocabulary(Tokenizer *t, const Vocabulary *v, uint32_t n_bytes, Error *err) {
    size_t n = (size_t)v->vocab_size;
    uint32_t *offsets = malloc((n + 1) * sizeof *offsets);
    uint8_t *kind = malloc(n + 1), *bytes = malloc(n_bytes + 1);
    memcpy(offsets, v->offsets, (n + 1) * sizeof *offsets);
    memcpy(kind, v->kind, n);
    memcpy(bytes, v->bytes, n_bytes);
    return tokenizer_init(t, v->vocab_size, offsets, kind, bytes, n_bytes, err);
}

enum { BOS = 259, START, END, EOT };

// The small vocabulary, with the tokens of a chat frame.
static inline bool init_chat_vocabulary(Tokenizer *t, Error *err) {
    static const char *const specials[] = {"<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
                                           "<|eot_id|>"};
    Vocabulary v = small_vocabulary();
    for (int i = 0; i < LENGTH(specials); i++) {
        int id = v.vocab_size++;
        memcpy(v.bytes + v.offsets[id], specials[i], strlen(specials[i]));
        v.offsets[id + 1] = v.offsets[id] + (uint32_t)strlen(specials[i]);
        v.kind[id] = TOKEN_SPECIAL;
    }
    return init_vocabulary(t, &v, v.offsets[v.vocab_size], err);
}

static inline int base64_value(char c) {
    const char *digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/",
               *found = c ? strchr(digits, c) : NULL;
    return found ? (int)(found - digits) : -1;
}

static inline size_t from_base64(const char *text, uint8_t *out) {
    uint32_t bits = 0;
    int n_bits = 0;
    size_t n = 0;
    for (int v; (v = base64_value(*text)) >= 0; text++) {
        bits = bits << 6 | (uint32_t)v;
        if ((n_bits += 6) >= 8) out[n++] = (uint8_t)(bits >> (n_bits -= 8));
    }
    return n;
}

// tokenizer.model's ranks, then the special tokens by HuggingFace's names.
static inline bool load_llama3(Tokenizer *t) {
    enum { RANKS = 128000, SPECIALS = 256 };
    size_t n_ranks, n_special;
    char *ranks = read_file(SHARED "tokenizer.model", &n_ranks),
         *special = read_file(SHARED "special_tokens.tsv", &n_special);
    bool ok = ranks && special;
    if (ok) {
        uint32_t *offsets = calloc(RANKS + SPECIALS + 1, sizeof *offsets);
        uint8_t *kind = calloc(RANKS + SPECIALS, 1), *bytes = malloc(n_ranks + n_special);
        int id = 0;
        char *at = ranks, *fields[3];
        for (char *line; id < RANKS && (line = next_line(&at)); id++)
            offsets[id + 1] = offsets[id] + (uint32_t)from_base64(line, bytes + offsets[id]);
        at = special;
        next_line(&at); // names of the columns
        for (char *line; id < RANKS + SPECIALS && (line = next_line(&at)) && split_fields(line, fields, 3) == 3; id++) {
            size_t n = strlen(fields[2]);
            memcpy(bytes + offsets[id], fields[2], n);
            offsets[id + 1] = offsets[id] + (uint32_t)n;
            kind[id] = TOKEN_SPECIAL;
        }
        Error err = {""};
        ok = tokenizer_init(t, id, offsets, kind, bytes, offsets[id], &err);
        if (!ok || id != RANKS + SPECIALS) test_fail("the LLaMA 3 vocabulary: %d tokens, %s", id, err.text);
        test_end("test_llama3_vocabulary_is_accepted");
    }
    free(ranks);
    free(special);
    return ok;
}

#endif
