// Decode attention: sizes and tuning rules, as functions of the shape and the GPU alone. No GPU is needed to call them;
// tests/test_plan.c does. What the words mean: decode_schedule.cuh.
#ifndef DECODE_PLAN_H
#define DECODE_PLAN_H

#include <stdbool.h>
#include <stddef.h>

#include "../cuda/rule.h"

enum {
    MAX_NEW_TOKENS = 8,   // of a sequence, in one call
    KV_SPLIT_UNIT = 128,  // positions: the shortest KV split, and the unit of work
    KV_GROUP = 8,         // KV splits that are combined first
    DECODE_THREADS = 128, // of a block of the 16-bit kernel
    // One block on an SM cannot keep up. Were there room for a third, blocks of the next call would wait in it, then
    // three of them be on one SM and one on another: batch 64 at context length 2048 took a third longer. Nor did room
    // for a whole second call help: blocks of half the step need more time for their steps than they save at the ends.
    DECODE_BLOCKS_PER_SM = 2,
    DECODE_MAX_BLOCKS = 1024, // counters in the workspace: of one size for all shapes, as they must stay zero
    // Groups of 8 KV splits of a sequence whose query tiles clusters may share, at most: shared memory has room for the
    // half that the second block sends.
    CLUSTER_MAX_GROUPS = 4,
    CLUSTER_SENT_GROUPS = CLUSTER_MAX_GROUPS / 2,
};

// ---- KV splits ------------------------------------------------------------------------------------------------------

// The length of a sequence's KV splits depends on its own length alone, so that its sums have one order in any batch:
// 128 up to 4096 positions, twice that for each doubling up to 4096 from 65,537 on. So at most 32 have to be combined
// up to 131,072 positions. (A sum of comparisons: no branch.)
RULE int kv_split_log2(int total) {
    return 7 + (total > 4096) + (total > 8192) + (total > 16384) + (total > 32768) + (total > 65536);
}
RULE int kv_split(int total) {
    return 1 << kv_split_log2(total);
}
RULE int kv_splits(int total) {
    return (total + kv_split(total) - 1) >> kv_split_log2(total);
}

// Of n new tokens after `before` positions, each of which attends to one more than the one before: how many, from the
// first on, have KV splits of the first one's length? n is at most MAX_NEW_TOKENS.
RULE int rows_of_equal_splits(int before, int n) {
    int log2 = kv_split_log2(before + 1);
    if (kv_split_log2(before + n) == log2) return n;
    return (4096 << (log2 - 7)) - before;
}

// Work of a KV split, in units of 128 positions; the last one counts as a whole one.
RULE int kv_split_work(int total) {
    return kv_split(total) >> 7;
}

// KV splits of a sequence of up to so many positions, at most: not of the longest alone, as the number falls where
// splits get longer.
RULE int max_kv_splits(int cache_max_len) {
    int most = kv_splits(cache_max_len);
    for (int length = 4096; length < cache_max_len && length <= 65536; length *= 2)
        if (most < kv_splits(length)) most = kv_splits(length);
    return most;
}

// ---- work partition -------------------------------------------------------------------------------------------------

// May each block have a part of one query tile, or whole query tiles, the largest of `largest` units? If that takes 1/8
// longer at most than an even partition of the work, where blocks have ends of two query tiles, which others have the
// rest of.
RULE bool partition_is_even(unsigned largest, unsigned blocks, unsigned work) {
    return largest * blocks <= work + work / 8;
}

// Of n splits the first n / 2 are one block's, the others another's. Does neither have a part of a group that the other
// has too? And how many groups has the second?
RULE bool halves_are_groups(unsigned n_splits) {
    return n_splits / 2 % KV_GROUP == 0;
}
RULE int groups_of_second_half(int n_splits) {
    return (n_splits + KV_GROUP - 1) / KV_GROUP - n_splits / 2 / KV_GROUP;
}

typedef struct DecodePlan {
    int blocks;
    int cluster;         // blocks in a cluster: 2, or 1
    int blocks_per_tile; // where all sequences are equally long; 0: there are more query tiles than blocks
    bool tiles_fill_gpu; // is most of the GPU busy with one block for each query tile?
} DecodePlan;

// As many blocks as the GPU holds at once, but no more than there are KV splits: the launch does not depend on the
// lengths, so that a CUDA graph can replay it. A cluster of two where two blocks share a query tile and each has groups
// of its own: the second sends its groups' results to the first one's shared memory, in place of a way through the
// workspace. (Clusters of four find room too late. Up to 8 splits there is one group.) One block for each query tile is
// enough from 3/8 of the GPU's blocks on, if there are two splits.
RULE DecodePlan decode_plan(long long query_tiles, int max_splits, int n_sms, int blocks_per_sm, bool can_cluster) {
    long long blocks = (long long)n_sms * blocks_per_sm, splits = query_tiles * max_splits;
    if (blocks > splits) blocks = splits;
    if (blocks > DECODE_MAX_BLOCKS) blocks = DECODE_MAX_BLOCKS;
    bool pairs = can_cluster && blocks / query_tiles == 2 && max_splits > KV_GROUP &&
                 max_splits <= KV_GROUP * CLUSTER_MAX_GROUPS;
    int cluster = pairs ? 2 : 1;
    blocks -= blocks % cluster;
    DecodePlan plan = {(int)blocks, cluster, (int)(blocks / query_tiles), 8 * query_tiles >= 3 * blocks};
    return plan;
}

// Units of work of a call, at most, which must stay below 2^31: each sequence has a partial unit in each of 32 splits.
RULE long long decode_max_work(long long query_tiles, int cache_max_len) {
    return query_tiles * (cache_max_len / KV_SPLIT_UNIT + 32);
}

// ---- the kernel for 16-bit types, for head_dim D and NT column blocks of 8 query heads ------------------------------

// Positions of a step: 16 KB of keys for D = 64 and 128, 12 KB for 96.
RULE int decode_step(int D) {
    return D == 64 ? 128 : 64;
}
RULE int decode_stage_bytes(int D) {
    return 2 * decode_step(D) * D * 2;
} // K and V
RULE int decode_q_pitch(int D) {
    return D * 2 + 16;
} // free of bank conflicts
// 16 dims of the output each, of one of four warps.
RULE int decode_out_tiles(int D) {
    return (D / 16 + 3) / 4;
}

// Steps in the ring: two, one of them in use. With head_dim 64 and up to 8 query heads three, if two such blocks fit on
// an SM: the more of a call is under way before its queries may be read, the sooner memory is busy. That is worth 2 %
// there (batch 16, 8:8 heads, 2048 positions: 16.9 to 16.6 us on an H200); with head_dim 128 short contexts gain from
// it and long ones lose, as the blocks' parts of the memory's speed grow unequal.
RULE int decode_max_stages(int D, int NT) {
    return D == 64 && NT == 1 ? 3 : 2;
}

// Shared memory: the ring, P [hi, lo][column block][position][8 heads], the warps' largest scores [warp][head], and
// queries [head][pitch].
RULE int decode_smem_bytes(int D, int NT, int stages) {
    return stages * decode_stage_bytes(D) + 2 * NT * decode_step(D) * 16 + 4 * 8 * NT * (int)sizeof(float) +
           8 * NT * decode_q_pitch(D);
}
// After it, in a cluster's first block: an mbarrier, and what the second sends, [group][16 bytes][thread].
RULE int decode_cluster_bytes(int D, int NT) {
    return 16 + CLUSTER_SENT_GROUPS * DECODE_THREADS * NT * (decode_out_tiles(D) + 1) * 16;
}

// Has an SM room for two blocks with so much shared memory each? The system takes a kilobyte of each, and the variables
// of the kernel another one, as the rest is aligned to that.
RULE bool two_blocks_fit(size_t smem, size_t sm_smem) {
    return 2 * (smem + 2048) <= sm_smem;
}

// Stages, for an SM with so much shared memory.
RULE int decode_stages(int D, int NT, size_t sm_smem) {
    int most = decode_max_stages(D, NT);
    return two_blocks_fit((size_t)(decode_smem_bytes(D, NT, most) + decode_cluster_bytes(D, NT)), sm_smem) ? most : 2;
}

// Warps of the float32 kernel: eight where their rings fit, else four. A matter of the GPU alone, as it shapes the
// sums.
RULE int decode_f32_warps(size_t smem_of_eight, size_t block_smem) {
    return smem_of_eight <= block_smem ? 8 : 4;
}

#endif
