#include "encode.h"

#include "bpe.h"
#include "utf8.h"

static bool only_space(const Tokenizer *t, int id) {
    size_t n;
    const uint8_t *s = tokenizer_bytes(t, id, &n);
    for (size_t i = 0; i < n; i++)
        if (s[i] != ' ' && s[i] != '\n' && s[i] != '\t') return false;
    return true;
}

// Text without special and added tokens. Bytes that are not UTF-8 as tiktoken's _encode_bytes treats them: the last
// pre-token of the valid prefix, and tokens of white space before it, may have belonged to what follows; they and the
// rest are one pre-token.
static bool encode_ordinary(PreTokenCache *c, const AddedTokens *which, const uint8_t *text, size_t n, TokenList *out,
                            Error *err) {
    (void)which;
    const Tokenizer *t = c->tokenizer;
    size_t valid = utf8_valid_prefix(text, n), first = out->n, last_pre_token;
    if (!bpe_encode_text(c, text, valid, out, &last_pre_token, err)) return false;
    if (valid == n) return true;
    size_t keep = last_pre_token;
    if (keep < out->n && only_space(t, out->ids[keep]))
        while (keep > first && only_space(t, out->ids[keep - 1])) keep--;
    size_t bad_start = valid, length;
    for (size_t i = keep; i < out->n; i++) {
        tokenizer_bytes(t, out->ids[i], &length);
        bad_start -= length;
    }
    out->n = keep;
    return bpe_encode(t, text + bad_start, n - bad_start, out, err);
}

static bool counts(const Tokenizer *t, const AddedTokens *which, int id) {
    if (t->kind[id] == TOKEN_SPECIAL && !which->special) return false;
    for (int i = 0; i < which->n_never; i++)
        if (which->never[i] == id) return false;
    return true;
}

// What is to be done with the text around the tokens that a pass finds.
typedef bool EncodeRest(PreTokenCache *c, const AddedTokens *which, const uint8_t *text, size_t n, TokenList *out,
                        Error *err);

static bool encode_pass(PreTokenCache *c, const AddedPass *pass, EncodeRest *rest, const AddedTokens *which,
                        const uint8_t *text, size_t n, TokenList *out, Error *err) {
    const Tokenizer *t = c->tokenizer;
    size_t start = 0, length; // start: of the text that is not yet encoded
    bool may_find = pass->tree && (which->special || pass->n_added);
    for (size_t at = 0; at < n && may_find;) {
        int id = pass->begins[text[at]] ? tokenizer_match(pass, text + at, n - at) : -1;
        if (id < 0) {
            at++;
            continue;
        }
        tokenizer_bytes(t, id, &length);
        if (counts(t, which, id)) {
            if (!rest(c, which, text + start, at - start, out, err) || !tokens_append(out, id, err)) return false;
            start = at + length;
        }
        at += length;
    }
    return rest(c, which, text + start, n - start, out, err);
}

static bool second_pass(PreTokenCache *c, const AddedTokens *which, const uint8_t *text, size_t n, TokenList *out,
                        Error *err) {
    return encode_pass(c, &c->tokenizer->passes[1], encode_ordinary, which, text, n, out, err);
}

bool tokenizer_encode_added(const Tokenizer *t, const uint8_t *text, size_t n, AddedTokens which, TokenList *out,
                            Error *err) {
    PreTokenCache cache;
    bool ok = pre_token_cache_init(&cache, t, n, err) &&
              encode_pass(&cache, &t->passes[0], second_pass, &which, text, n, out, err);
    pre_token_cache_free(&cache);
    return ok;
}

bool tokenizer_encode(const Tokenizer *t, const uint8_t *text, size_t n, bool special, TokenList *out, Error *err) {
    return tokenizer_encode_added(t, text, n, (AddedTokens){.special = special}, out, err);
}

int tokenizer_find_special(const Tokenizer *t, const uint8_t *text, size_t n) {
    for (size_t at = 0; at < n && t->n_special; at++)
        for (int p = 0; p < ADDED_PASSES; p++) {
            const AddedPass *pass = &t->passes[p];
            int id = pass->tree && pass->begins[text[at]] ? tokenizer_match(pass, text + at, n - at) : -1;
            if (id >= 0 && t->kind[id] == TOKEN_SPECIAL) return id;
        }
    return -1;
}
