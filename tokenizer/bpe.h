// Byte-pair encoding of pre-tokens of text, and of a text pre-token by pre-token.
#ifndef BPE_H
#define BPE_H

#include "tokenizer.h"

// Appends the ids of one pre-token, any bytes, n > 0.
bool bpe_encode(const Tokenizer *t, const uint8_t *pre_token, size_t n, TokenList *out, Error *err);

// The pre-tokens that a text had so far, and their ids.
typedef struct {
    const Tokenizer *tokenizer;
    struct CachedPreToken *entries; // [1 << (64 - shift)]
    int shift;
} PreTokenCache;

bool pre_token_cache_init(PreTokenCache *c, const Tokenizer *t, size_t text_bytes, Error *err);
void pre_token_cache_free(PreTokenCache *c);

// Appends the ids of text[0..n), valid UTF-8 without special tokens, pre-token by pre-token. *last_pre_token: how many
// ids there were before the last pre-token.
bool bpe_encode_text(PreTokenCache *c, const uint8_t *text, size_t n, TokenList *out, size_t *last_pre_token,
                     Error *err);

#endif
