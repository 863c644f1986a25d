// Text to token ids.
#ifndef ENCODE_H
#define ENCODE_H

#include "tokenizer.h"

// Appends the ids of text[0..n), any bytes. special: the texts of special tokens become their ids, as HuggingFace does;
// otherwise they are ordinary characters. Adds no BOS. Where text is not UTF-8, follows tiktoken's rule for bytes.
bool tokenizer_encode(const Tokenizer *t, const uint8_t *text, size_t n, bool special, TokenList *out, Error *err);

#endif
