// Products of many rows and 16-bit weights: how they are cut into tiles, as functions of the shape and the GPU alone.
// No GPU is needed to call them; tests/test_plan.c does. What the words mean: prompt_product.h.
#ifndef PROMPT_PLAN_H
#define PROMPT_PLAN_H

#include "rule.h"

enum {
    PROMPT_TOKENS = 128, // of a tile
    PROMPT_CLUSTER = 2,  // blocks
};

// Rows of weights that a tile may have: number i of the choices, most first; 0: there are no more.
RULE int prompt_tile_choice(int i) {
    const int choices[] = {256, 192, 128};
    return i < (int)(sizeof choices / sizeof *choices) ? choices[i] : 0;
}

// What a product costs in tiles of n rows of weights: the tiles that a cluster takes one after another, a tile costing
// as much as its rows and 16 more.
RULE long long prompt_tile_cost(int T, int rows, int n, int clusters) {
    const long long pair = PROMPT_CLUSTER * PROMPT_TOKENS,
                    tiles = (T + pair - 1) / pair * (((long long)rows + n - 1) / n);
    return (tiles + clusters - 1) / clusters * (n + 16);
}

// Rows of weights of a tile: with which the GPU's clusters are done first.
RULE int prompt_tile_rows(int T, int rows, int clusters) {
    int best = prompt_tile_choice(0);
    for (int i = 1; prompt_tile_choice(i) > 0; i++)
        if (prompt_tile_cost(T, rows, prompt_tile_choice(i), clusters) < prompt_tile_cost(T, rows, best, clusters))
            best = prompt_tile_choice(i);
    return best;
}

#endif
