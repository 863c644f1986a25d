// Products of many rows and 16-bit weights: how they are cut into tiles, as functions of the shape and the GPU alone.
// No GPU is needed to call them; tests/test_plan.c does. What the words mean: prompt_product.h.
#ifndef PROMPT_PLAN_H
#define PROMPT_PLAN_H

#include "rule.h"

enum {
    PROMPT_TOKENS = 128, // of a tile
    PROMPT_CLUSTER = 2,  // blocks
};

// A block's tile: rows of weights, and what the two blocks of a cluster have in common: the tokens, with neighbouring
// rows of weights; else the weights, with neighbouring tokens.
typedef struct PromptTile {
    int rows, shares_tokens;
} PromptTile;

// Number i of the tiles that there are; 0 rows: there are no more.
RULE PromptTile prompt_tile_choice(int i) {
    const int widths[] = {256, 224, 192, 96}, n = (int)(sizeof widths / sizeof *widths);
    const PromptTile tile = {i < 2 * n ? widths[i % n] : 0, i >= n};
    return tile;
}

// Tiles of a cluster: of the tokens and of the rows of weights.
RULE long long prompt_token_tiles(int T, PromptTile tile) {
    const long long tokens = tile.shares_tokens ? PROMPT_TOKENS : PROMPT_CLUSTER * PROMPT_TOKENS;
    return (T + tokens - 1) / tokens;
}
RULE long long prompt_row_tiles(int rows, PromptTile tile) {
    const long long n = tile.shares_tokens ? PROMPT_CLUSTER * (long long)tile.rows : tile.rows;
    return (rows + n - 1) / n;
}

// What a product costs: the tiles that a cluster takes one after another, a tile costing as much as its rows and 16
// more, and 128 at least, which its copies take.
RULE long long prompt_tile_cost(int T, int rows, PromptTile tile, int clusters) {
    const long long tiles = prompt_token_tiles(T, tile) * prompt_row_tiles(rows, tile);
    return (tiles + clusters - 1) / clusters * (tile.rows + 16 > 128 ? tile.rows + 16 : 128);
}

// The tile with which the GPU's clusters are done first.
RULE PromptTile prompt_tile(int T, int rows, int clusters) {
    PromptTile best = prompt_tile_choice(0);
    for (int i = 1; prompt_tile_choice(i).rows > 0; i++)
        if (prompt_tile_cost(T, rows, prompt_tile_choice(i), clusters) < prompt_tile_cost(T, rows, best, clusters))
            best = prompt_tile_choice(i);
    return best;
}

// How busy a product keeps the tensor cores: what it would cost if tiles were as small as one likes, in percent of what
// it costs. 65 to 127 tokens count as 128 (PROMPT_TOKENS): the weights are read once whatever their number. (With
// fewer, half of the boxes of tokens are beyond them, and a tile takes no less.)
RULE int prompt_utilisation(int T, int rows, int clusters) {
    const int tokens = T > PROMPT_TOKENS / 2 && T < PROMPT_TOKENS ? PROMPT_TOKENS : T;
    const double least = (double)tokens * rows / (PROMPT_CLUSTER * PROMPT_TOKENS) / clusters;
    return (int)(100 * least / (double)prompt_tile_cost(T, rows, prompt_tile(T, rows, clusters), clusters));
}

#endif
