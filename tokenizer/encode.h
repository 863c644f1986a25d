// Text to token ids.
#ifndef ENCODE_H
#define ENCODE_H

#include "tokenizer.h"

// Which tokens' texts become their ids. Added ones always do, as in HuggingFace tokenizers.
typedef struct {
    // Special ones, too; otherwise they are ordinary characters (encode_special_tokens, split_special_tokens).
    bool special;
    // [n_never] ids, in any order, of special and added tokens that are ordinary characters all the same: those that a
    // chat template writes, within a message.
    const int *never;
    int n_never;
} AddedTokens;

// Appends the ids of text[0..n), any bytes. Tokens of the first pass are looked for in all of the text, those of the
// second in what the first leaves. A pass takes the leftmost text of a token, of those that begin there the longest,
// and goes on after it. A token that is to stay characters takes its place all the same: no other one of its pass is
// found in it. Adds no BOS. Where text is not UTF-8, follows tiktoken's rule for bytes.
bool tokenizer_encode_added(const Tokenizer *t, const uint8_t *text, size_t n, AddedTokens which, TokenList *out,
                            Error *err);

// The same with {.special = special}.
bool tokenizer_encode(const Tokenizer *t, const uint8_t *text, size_t n, bool special, TokenList *out, Error *err);

// The first special token whose text is in text[0..n); -1: there is none.
int tokenizer_find_special(const Tokenizer *t, const uint8_t *text, size_t n);

#endif
