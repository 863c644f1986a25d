// Products of many rows and 16-bit weights: how they are cut into tiles, as functions of the shape and the GPU alone.
// No GPU is needed to call them; tests/test_plan.c does. What the words mean: prompt_product.h.
#ifndef PROMPT_PLAN_H
#define PROMPT_PLAN_H

#include "rule.h"

enum {
    PROMPT_TOKENS = 128, // of a tile; of one for few tokens half as many
    PROMPT_FEW_TOKENS = 64,
    PROMPT_CLUSTER = 2, // blocks
};

// What follows a product.
enum PromptKind { PROMPT_SWIGLU, PROMPT_QKV, PROMPT_ADD, PROMPT_KINDS };

// A block's tile: tokens, rows of weights, and what the two blocks of a cluster have in common: the tokens, with
// neighbouring rows of weights; else the weights, with neighbouring tokens.
typedef struct PromptTile {
    int tokens, rows, shares_tokens;
} PromptTile;

// Number i of the tiles that there are for a kind of product; 0 rows: there are no more. Those for few tokens are one
// SM's share of the weights of usual models.
RULE PromptTile prompt_tile_choice(enum PromptKind kind, int i) {
    const int many[] = {256, 224, 192, 96}, few[PROMPT_KINDS][3] = {{224, 128, 64}, {96, 48, 32}, {64, 32, 0}};
    const int n = (int)(sizeof many / sizeof *many), n_few = kind == PROMPT_ADD ? 2 : 3, j = i - 2 * n;
    const PromptTile of_many = {PROMPT_TOKENS, many[i % n], i >= n},
                     of_few = {PROMPT_FEW_TOKENS, j >= 0 && j < 2 * n_few ? few[kind][j % n_few] : 0, j >= n_few};
    return j < 0 ? of_many : of_few;
}

// Tiles of a cluster: of the tokens and of the rows of weights.
RULE long long prompt_token_tiles(int T, PromptTile tile) {
    const long long tokens = tile.shares_tokens ? tile.tokens : PROMPT_CLUSTER * (long long)tile.tokens;
    return (T + tokens - 1) / tokens;
}
RULE long long prompt_row_tiles(int rows, PromptTile tile) {
    const long long n = tile.shares_tokens ? PROMPT_CLUSTER * (long long)tile.rows : tile.rows;
    return (rows + n - 1) / n;
}

// The tiles that a cluster takes one after another, at most.
RULE long long prompt_rounds(int T, int rows, PromptTile tile, int clusters) {
    return (prompt_token_tiles(T, tile) * prompt_row_tiles(rows, tile) + clusters - 1) / clusters;
}

// What a product costs: the rounds, a tile costing what the tensor cores take for 128 tokens of as many rows and 16
// more, or what its copies take, if that is more. (Measured: of 128 tokens no tile takes less than one of 112 rows.)
RULE long long prompt_tile_cost(int T, int rows, PromptTile tile, int clusters) {
    const int products = tile.rows * tile.tokens / PROMPT_TOKENS + 16,
              copies = tile.tokens == PROMPT_TOKENS ? 128 : (tile.tokens + tile.rows) / 2;
    return prompt_rounds(T, rows, tile, clusters) * (products > copies ? products : copies);
}

// The tile with which the GPU's clusters are done first. Tiles for few tokens are for one or two of them.
RULE PromptTile prompt_tile(enum PromptKind kind, int T, int rows, int clusters) {
    PromptTile best = prompt_tile_choice(kind, 0);
    for (int i = 1; prompt_tile_choice(kind, i).rows > 0; i++) {
        const PromptTile tile = prompt_tile_choice(kind, i);
        if (T > PROMPT_CLUSTER * tile.tokens && tile.tokens < PROMPT_TOKENS) break;
        if (prompt_tile_cost(T, rows, tile, clusters) < prompt_tile_cost(T, rows, best, clusters)) best = tile;
    }
    return best;
}

// How well a product uses the GPU, in percent. Of many tokens, how busy it keeps the tensor cores: what it would cost
// if tiles were as small as one likes, of what it costs; 65 to 127 tokens count as 128, as the weights are read once
// whatever their number. Of few, for which memory is the limit, how much of the rounds there is work for.
RULE int prompt_utilisation(enum PromptKind kind, int T, int rows, int clusters) {
    const PromptTile tile = prompt_tile(kind, T, rows, clusters);
    if (tile.tokens < PROMPT_TOKENS)
        return (int)(100 * prompt_token_tiles(T, tile) * prompt_row_tiles(rows, tile) /
                     (prompt_rounds(T, rows, tile, clusters) * clusters));
    const int tokens = T > PROMPT_TOKENS / 2 && T < PROMPT_TOKENS ? PROMPT_TOKENS : T;
    const double least = (double)tokens * rows / (PROMPT_CLUSTER * PROMPT_TOKENS) / clusters;
    return (int)(100 * least / (double)prompt_tile_cost(T, rows, tile, clusters));
}

// How much less of it is enough, in percent, for numbers of tokens at which cuBLAS's tiles leave much unused
// themselves. (H200, the first prompt of a process, 8B, ms, with cuBLAS's gate and up, queries, keys and values / with
// these: 193 tokens 7.28 / 6.66; 225 7.24 / 6.41; 321 11.03 / 9.01; 433 11.08 / 10.43; 513 14.60 / 13.24; 600 13.43 /
// 13.36. Not so 145 6.82 / 7.34; 257 8.26 / 9.62; 320 8.65 / 9.02.)
RULE int prompt_allowance(enum PromptKind kind, int T) {
    return kind != PROMPT_ADD && ((T > 160 && T <= 256) || (T > 320 && T <= 640)) ? 30 : 0;
}

#endif
