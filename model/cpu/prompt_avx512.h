// Products of prompts with AVX-512, in either precision: W and x are brought into an order that the multiplying
// instruction takes as it is, and one shape of tiles multiplies them. What is multiplied are words of 32 bits: a
// float32, or a pair of bf16, the lower column in the low half.
#ifndef PROMPT_AVX512_H
#define PROMPT_AVX512_H

#include <stdbool.h>
#include <stdint.h>

#include "../model.h"

enum {
    PANEL_ROWS = 32,   // rows of W that are multiplied together, two vectors ...
    PANEL_WORDS = 640, // ... by so many words of them, at most: a panel, 80 KB
    STRIP_ROWS = 32    // packed x has zeros up to a multiple of so many rows
};

// What a multiplying function works on: n words of `rows` rows of W by C rows of x.
typedef struct {
    const uint32_t *panel; // [n][PANEL_ROWS], and zeros up to a multiple of 16 words
    const uint32_t *x;     // [C, and more up to a multiple of STRIP_ROWS][x_stride], and zeros as in the panel
    float *y;              // [C][y_stride]: the sums go there, or are added to what is there
    size_t x_stride, y_stride;
    int n, rows, C;
    bool add;
} Strip;

typedef struct {
    void (*multiply)(const Strip *strip);
    int strip;  // rows of x that it takes at a time, at most STRIP_ROWS
    bool pairs; // words are pairs of bf16, and x holds numbers that are bf16 already
    bool round; // a weight whose scale is of a group of columns is rounded to bf16. (With pairs that is so anyway.)
} Multiplier;

// y[T][rows] = x[T][cols] · wᵀ. Each sum has one fixed order: a row's bits depend on neither T nor the threads. With
// pairs the scale of a whole row multiplies its sum, otherwise the weights; W is not F16.
void prompt_product(float *y, const float *x, const Matrix *w, int T, const Multiplier *m);

#endif
