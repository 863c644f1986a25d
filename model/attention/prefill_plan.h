// Prefill attention: tile sizes, and which tile is whose, as functions that need no GPU. tests/test_plan.c calls them.
#ifndef PREFILL_PLAN_H
#define PREFILL_PLAN_H

#include <stdbool.h>

#include "../cuda/rule.h"

enum {
    PREFILL_MAX_BATCH = 256, // sequences of one launch: their lengths are parameters of the kernel, up to 4 KB

    // Query rows and keys of a tile. With head_dim 128 sm_80's take 80 KB of shared memory and float32's 75 KB, which a
    // block may have on every GPU since sm_80 (99 KB on sm_86).
    SM80_ROWS = 64,
    SM80_KEYS = 64,
    F32_ROWS = 64,
    F32_KEYS = 32,
    // Hopper: two warpgroups of 64 rows, the softmax of one beside the products of the other; K and V tiles in two
    // stages.
    SM90_ROWS = 128,
    SM90_KEYS = 128,
    SM90_STAGES = 2,
    SM90_WARPGROUPS = 2,
    SM90_THREADS = (1 + SM90_WARPGROUPS) * 128, // of a block: those that compute, and one warpgroup that loads

    // In bf16, a weight that enters the second product rounded is 2^-9 off, and where a row attends to few keys nothing
    // averages that out: measured on normal inputs, up to 1.8 x the bound of tests/test_attention.cu at 2 to 4 keys,
    // 1.0 at 32, 0.73 at 64 and 0.56 at 128. So query tiles whose first row attends to fewer keys than this use P = hi
    // + lo, as decode always does.
    PREFILL_EXACT_BELOW = 256,
};

typedef struct PrefillBatch {
    int n_seq, first_seq;               // sequences in this launch; the number of the first in the call
    int q_start[PREFILL_MAX_BATCH + 1]; // first token of each
    int seq_len[PREFILL_MAX_BATCH];     // positions in the cache before the new tokens
    int order[PREFILL_MAX_BATCH];       // sequences by number of query tiles, most first
} PrefillBatch;

// row0: first of its rows among the sequence's n_rows new tokens; seq_len: positions before these.
typedef struct PrefillTile {
    int seq, head, row0, n_rows, seq_len;
} PrefillTile;

RULE int prefill_tiles(const PrefillBatch *b, int seq, int tile_rows) {
    return (b->q_start[seq + 1] - b->q_start[seq] + tile_rows - 1) / tile_rows;
}

// Fills in b->order; returns the number of query tiles of one head.
static inline long long prefill_order(PrefillBatch *b, int tile_rows) {
    long long n_tiles = 0;
    for (int i = 0; i < b->n_seq; i++) { // insertion sort, most tiles first
        int j = i, tiles = prefill_tiles(b, i, tile_rows);
        for (; j > 0 && prefill_tiles(b, b->order[j - 1], tile_rows) < tiles; j--) b->order[j] = b->order[j - 1];
        b->order[j] = i;
        n_tiles += tiles;
    }
    return n_tiles;
}

// Work item -> query tile. Heads are innermost, so that the heads of a KV head share K and V in L2. Tiles come last
// first: those attend to most keys, and the short ones fill the gaps at the end.
RULE PrefillTile prefill_tile(const PrefillBatch *b, int n_heads, int tile_rows, int index) {
    int t = index / n_heads, level = 0, active = b->n_seq, seq = 0, tiles = 0;
    for (;;) { // `active` sequences have more than `level` tiles
        seq = b->order[active - 1];
        tiles = prefill_tiles(b, seq, tile_rows);
        if (t < (tiles - level) * active) break;
        t -= (tiles - level) * active;
        level = tiles;
        active--;
    }
    seq = b->order[t % active];
    int n_new = b->q_start[seq + 1] - b->q_start[seq];
    tiles = (n_new + tile_rows - 1) / tile_rows;
    PrefillTile tile = {seq, index % n_heads, (tiles - 1 - level - t / active) * tile_rows, n_new, b->seq_len[seq]};
    return tile;
}

// Hopper, a block on every SM: the work item that it takes in a round. Items come longest first; every other round runs
// backwards, so that whoever took the longest of one takes the shortest of the next, and the blocks' sums come out
// even.
RULE int sm90_item(int round, int block, int n_blocks) {
    return round * n_blocks + (round & 1 ? n_blocks - 1 - block : block);
}

// Rows of K or V that one TMA copy takes: as many as divide a block of the cache and the tile, so that it stays within
// one.
RULE int sm90_box_rows(int block_size, bool paged) {
    int rows = SM90_KEYS;
    while (paged && block_size % rows) rows /= 2;
    return rows;
}

#endif
