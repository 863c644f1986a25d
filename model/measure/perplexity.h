// How well a model predicts a text.
#ifndef PERPLEXITY_H
#define PERPLEXITY_H

#include <stdio.h>

#include "../model.h"

enum { PERPLEXITY_WINDOW = 2048 };

// Which tokens are scored, each predicted from those before it in its window. A window is as long as the cache.
//   SLIDING  all but the text's first, once: each window is `stride` after the one before it and scores what that one
//            did not, from at least window - stride tokens (https://huggingface.co/docs/transformers/perplexity)
//   HALF     windows follow each other, without what is left of the text after the last full one. Of each the tokens
//            from window/2 + 1 on are scored, from 0; where the text begins with BOS, so does each window, in place of
//            its first token. As llama.cpp's llama-perplexity.
typedef enum { WINDOWS_SLIDING, WINDOWS_HALF } PerplexityWindows;

typedef struct {
    PerplexityWindows windows;
    int window, stride;  // tokens; HALF: stride is window
    double sum, squares; // of the negative log-likelihoods, in nats, and of their squares
    size_t n, n_all;     // tokens scored, and to be scored: fewer where the run was interrupted
    size_t n_bytes;      // of the tokens scored
    double seconds;
} Perplexity;

// Scores a text of at least two tokens, for HALF one full window of at least three. HALF writes BOS into ids. After an
// interrupt, which is a failure here, *p has what was scored until then.
bool perplexity_run(Model *model, TokenList *ids, PerplexityWindows windows, int stride, Perplexity *p, Error *err);
// One line: the perplexity with its standard error, bits per byte, and how it was measured; or a JSON object.
void perplexity_print(const Perplexity *p, bool json, FILE *out);

#endif
