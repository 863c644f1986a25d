// How well a model predicts a text.
#ifndef PERPLEXITY_H
#define PERPLEXITY_H

#include <stdio.h>

#include "../model.h"

enum { PERPLEXITY_WINDOW = 2048 };

// Strided: windows of the cache's length, each moved by `stride`, so that every token but the first window's is
// predicted from at least window - stride others (https://huggingface.co/docs/transformers/perplexity). Prints the
// value with its standard error. n_bytes: of the text, for bits per byte.
bool perplexity_run(Model *model, const TokenList *ids, size_t n_bytes, int stride, FILE *out, Error *err);

#endif
