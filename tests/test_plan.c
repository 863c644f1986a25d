// Tuning rules of the GPU kernels: plain functions of shapes and sizes, so none of this needs a GPU.
#include "../model/attention/decode_plan.h"
#include "../model/attention/prefill_plan.h"
#include "../model/cuda/fused_plan.h"
#include "../model/cuda/packed.h"
#include "../model/cuda/prompt_plan.h"
#include "../model/quant.h"
#include "check.h"
#include <limits.h>
#include <math.h>

// Dynamic shared memory that a block of the fused engine may have on Hopper: 227 KB less its own variables.
enum { HOPPER_SHARED = 232448 - FUSED_STATIC_BYTES };

// ---- engine fused ---------------------------------------------------------------------------------------------------

typedef struct Known {
    const char *name;
    FusedShape shape;
    int slice, tile_rows, split_down, partial_floats, ring_offset, stage_bytes, n_stages, in_flight, ahead, shared,
        max_rows;
} Known;

// What the rules gave when their speeds were measured.
static void test_fused_plan_of_known_shapes(void) {
    static const Known known[] = {
        {"LLaMA 3.2 1B",
         {2048, 2048, 8192, 64, 1, 1, HOPPER_SHARED, 0},
         2048,
         8,
         0,
         256,
         21760,
         32768,
         6,
         2,
         1,
         218368,
         8},
        {"LLaMA 3.2 3B",
         {3072, 3072, 8192, 128, 1, 1, HOPPER_SHARED, 0},
         3072,
         4,
         0,
         96,
         18944,
         24576,
         8,
         3,
         2,
         215552,
         8},
        {"LLaMA 3.1 8B",
         {4096, 4096, 14336, 128, 1, 1, HOPPER_SHARED, 0},
         4096,
         4,
         0,
         128,
         31744,
         32768,
         6,
         2,
         1,
         228352,
         8},
        {"LLaMA 3.1 8B, 8 tokens",
         {4096, 4096, 14336, 128, 8, 1, HOPPER_SHARED, 0},
         4096,
         4,
         1,
         256,
         77824,
         32768,
         4,
         2,
         1,
         208896,
         8},
        {"LLaMA 3.1 8B, f32",
         {4096, 4096, 14336, 128, 1, 3, HOPPER_SHARED, 0},
         4096,
         4,
         0,
         384,
         93184,
         32768,
         4,
         2,
         1,
         224256,
         2},
        {"LLaMA 3.1 70B",
         {8192, 8192, 28672, 128, 1, 1, HOPPER_SHARED, 0},
         4096,
         4,
         0,
         224,
         61952,
         32768,
         5,
         2,
         1,
         225792,
         8},
        {"LLaMA 3.1 70B, 4 tokens",
         {8192, 8192, 28672, 128, 4, 1, HOPPER_SHARED, 0},
         4096,
         4,
         1,
         128,
         71680,
         32768,
         4,
         2,
         1,
         202752,
         8},
        {"stories", {64, 64, 176, 64, 1, 1, HOPPER_SHARED, 0}, 512, 8, 0, 64, 2688, 8192, 12, 8, 4, 100992, 8},
    };
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        const Known *k = &known[i];
        FusedPlan p;
        memset(&p, 0, sizeof p);
        if (!fused_plan(&k->shape, &p)) test_fail("%s does not fit", k->name);
        if (p.slice != k->slice || p.tile_rows != k->tile_rows || p.split_down != k->split_down ||
            p.partial_floats != k->partial_floats)
            test_fail("%s: slice %d, tile %d, split %d, %d partial sums", k->name, p.slice, p.tile_rows, p.split_down,
                      p.partial_floats);
        if (p.ring_offset != k->ring_offset || p.stage_bytes != k->stage_bytes || p.n_stages != k->n_stages ||
            p.shared_bytes != (size_t)k->shared)
            test_fail("%s: a ring of %d x %d bytes from %d, %zu in all", k->name, p.n_stages, p.stage_bytes,
                      p.ring_offset, p.shared_bytes);
        if (p.stages_in_flight != k->in_flight || p.stages_ahead != k->ahead)
            test_fail("%s: %d stages in flight, %d ahead", k->name, p.stages_in_flight, p.stages_ahead);
        if (fused_max_rows(k->shape) != k->max_rows)
            test_fail("%s: %d tokens in a pass", k->name, fused_max_rows(k->shape));
    }
    test_end("test_fused_plan_of_known_shapes");
}

// Of every shape that fits: nothing overlaps, everything is aligned, and the protocol's bounds hold.
static void test_fused_plan_keeps_its_bounds(void) {
    int fit = 0, split = 0;
    for (int dim = 8; dim <= FUSED_MAX_DIM; dim += dim < 1024 ? 24 : 712)
        for (int hidden = 8; hidden <= 40000; hidden = hidden * 7 / 4 / 8 * 8 + 8)
            for (int terms = 1; terms <= 3; terms += 2)
                for (int rows = 1; rows <= MAX_ACT_ROWS / terms; rows++) {
                    FusedShape s = {dim, dim, hidden, 64 + 32 * (dim % 3), rows, terms, HOPPER_SHARED, 0};
                    FusedPlan p;
                    if (!fused_plan(&s, &p)) {
                        CHECK(fused_max_rows(s) < rows);
                        continue;
                    }
                    fit++;
                    split += p.split_down;
                    CHECK(fused_max_rows(s) >= rows);
                    CHECK(p.shared_bytes <= s.shared_bytes &&
                          p.shared_bytes == (size_t)(p.ring_offset + p.n_stages * p.stage_bytes));
                    int down = p.split_down ? fused_min(hidden, p.slice) : hidden, longest = fused_max(dim, down);
                    CHECK((size_t)p.partials_offset >= (size_t)longest * 2 * rows * terms);
                    CHECK(p.rope_offset >= p.partials_offset + PARTIAL_BUFFERS * p.partial_floats * 4);
                    CHECK(p.residuals_offset >= p.rope_offset + rows * s.head_dim * 4);
                    CHECK(p.ring_offset >= p.residuals_offset + RESIDUAL_BUFFERS * rows * p.tile_rows * 4);
                    CHECK(p.partials_offset % 128 == 0 && p.rope_offset % 8 == 0 && p.residuals_offset % 16 == 0 &&
                          p.ring_offset % 128 == 0);
                    CHECK(p.stage_bytes == p.tile_rows * p.slice * 2 &&
                          p.stage_bytes <= MMA_WEIGHT_ROWS * MAX_SLICE * 2);
                    CHECK(p.n_stages >= (p.split_down ? MIN_STAGES_SPLIT_K : MIN_STAGES) && p.n_stages <= MAX_STAGES);
                    CHECK(p.stages_in_flight >= 1 && p.stages_in_flight <= p.n_stages);
                    CHECK(p.stages_ahead >= 1 && p.stages_ahead <= p.stages_in_flight);
                    CHECK((p.stages_in_flight - 1) * p.stage_bytes < MAX_BYTES_IN_FLIGHT);
                    CHECK(RESIDUAL_BUFFERS > p.n_stages + PARTIAL_BUFFERS);
                    // A lane of the epilogue warp has a token and a row; down's sums have room, slice by slice.
                    CHECK(rows * MMA_WEIGHT_ROWS <= 32);
                    int sums = p.split_down ? 1 : fused_n_slices(hidden, p.slice);
                    CHECK(p.partial_floats == sums * CONSUMER_WARPS * rows * terms * p.tile_rows);
                    if (p.split_down) CHECK(3 + fused_n_slices(hidden, p.slice) <= MAX_PRODUCTS);
                }
    CHECK(fit > 1000 && split > 100);
    test_end("test_fused_plan_keeps_its_bounds");
}

// The same where weights are quantised: codes of 4 or 8 bits, scales of 2 or 4 bytes for groups of 32 columns, or none.
static void test_fused_plan_of_quantised_weights(void) {
    int fit = 0, split = 0;
    for (int dim = 16; dim <= FUSED_MAX_DIM; dim += dim < 1024 ? 48 : 720)
        for (int hidden = 8; hidden <= 28672; hidden = hidden * 7 / 4 / 8 * 8 + 8)
            for (int bits = 4; bits <= 16; bits *= 2)
                for (int scale_bytes = 0; scale_bytes <= (bits < 16 ? 4 : 0); scale_bytes += 2) {
                    Packing w = packing_of(bits, scale_bytes ? 32 : 0, scale_bytes, hidden);
                    int slice = packed_slice(bits), blocks = slice / PACK_COLUMNS,
                        pitch = packed_pitch(bits < 16 ? blocks * w.block_bytes : 2 * slice), tile = 16;
                    CHECK(slice % PACK_COLUMNS == 0 && PACKED_PART % slice == 0 && pitch % 128 == 64);
                    CHECK(pitch >= slice * bits / 8 && slice * bits / 8 * tile == PACKED_STAGE);
                    for (int rows = 1; rows <= MAX_ACT_ROWS; rows++) {
                        FusedShape s = {dim, dim, hidden, 64, rows, 1, HOPPER_SHARED, pitch};
                        FusedPlan p;
                        if (!fused_plan(&s, &p)) {
                            CHECK(fused_max_rows(s) < rows);
                            continue;
                        }
                        fit++;
                        split += p.split_down;
                        CHECK(p.tile_rows == tile && p.slice == PACKED_PART); // a row's order of sums
                        int down = p.split_down ? fused_min(hidden, PACKED_PART) : hidden;
                        CHECK(p.partials_offset >= fused_max(dim, down) * 2 * rows && p.partials_offset % 128 == 0);
                        CHECK(packed_act_pitch(dim) % 16 == 0 && packed_act_pitch(dim) >= 2 * dim);
                        CHECK(p.stage_bytes == tile * pitch && p.stage_bytes % 128 == 0);
                        CHECK(p.scales_offset >= p.residuals_offset + RESIDUAL_BUFFERS * rows * tile * 4 &&
                              p.scales_offset % 16 == 0);
                        CHECK(p.code_sums_offset >= p.scales_offset + RESIDUAL_BUFFERS * tile * 4 &&
                              p.code_sums_offset % 16 == 0);
                        CHECK(p.ring_offset >= p.code_sums_offset + 4 * code_sums_floats(fused_max(dim, down), rows));
                        CHECK(p.ring_offset % 128 == 0);
                        CHECK(p.shared_bytes == (size_t)(p.ring_offset + p.n_stages * p.stage_bytes) &&
                              p.shared_bytes <= s.shared_bytes);
                        CHECK(p.stages_in_flight >= 1 && p.stages_in_flight <= p.n_stages);
                        int sums = p.split_down ? 1 : fused_n_slices(hidden, PACKED_PART);
                        CHECK(p.partial_floats == sums * CONSUMER_WARPS * rows * tile);
                        if (p.split_down) CHECK(3 + fused_n_slices(hidden, PACKED_PART) <= MAX_PRODUCTS);
                    }
                }
    CHECK(fit > 1000 && split > 100);
    test_end("test_fused_plan_of_quantised_weights");
}

static void test_fused_slices_cover_every_column_once(void) {
    for (int dim = 8; dim <= FUSED_MAX_DIM; dim += 56)
        for (int cols = 8; cols <= 40000; cols += 1048) {
            int slice = fused_slice(dim), n = fused_n_slices(cols, slice), length = fused_slice_of(cols, slice);
            CHECK(slice % SLICE_UNIT == 0 && slice <= MAX_SLICE && (slice >= dim || slice == MAX_SLICE));
            CHECK(length % SLICE_UNIT == 0 && length <= slice);
            CHECK(n >= 1 && (long long)n * length >= cols && (n - 1) * length < cols);
        }
    test_end("test_fused_slices_cover_every_column_once");
}

static void test_permuted_index_exchanges_words_1_and_2(void) {
    for (int i = 0; i < 64; i++) {
        int word = i / 2 % 4, other = word == 1 ? 2 : word == 2 ? 1 : word;
        CHECK(permuted_index(i) == i / 8 * 8 + other * 2 + i % 2);
        CHECK(permuted_index(permuted_index(i)) == i);
    }
    test_end("test_permuted_index_exchanges_words_1_and_2");
}

// m16n8k16 as the PTX manual defines its fragments, for lane 4g + t: a[0] and a[1] are rows g and g + 8, columns 2t and
// 2t + 1 of the left operand, a[2] and a[3] the same 8 columns on; b[0] and b[1] rows 2t and 2t + 1, and 8 on, of
// column g of the right one; c[0], c[1] columns 2t and 2t + 1 of row g, c[2] and c[3] of row g + 8.
static void mma_m16n8k16(int c[32][4], int a[32][4][2], int b[32][2][2]) {
    int left[16][16], right[16][8];
    for (int lane = 0; lane < 32; lane++)
        for (int i = 0; i < 2; i++) {
            int g = lane / 4, t = lane % 4;
            for (int r = 0; r < 4; r++) left[g + r % 2 * 8][2 * t + i + r / 2 * 8] = a[lane][r][i];
            for (int r = 0; r < 2; r++) right[2 * t + i + 8 * r][g] = b[lane][r][i];
        }
    for (int lane = 0; lane < 32; lane++)
        for (int i = 0; i < 4; i++) {
            int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
            for (int k = 0; k < 16; k++) c[lane][i] += left[row][k] * right[k][column];
        }
}

// A group of weight rows times two activation rows, by the table in fused.h: every lane brings 16 consecutive bytes of
// weights and 8 of permuted activations, and half of a dot product is c[0] + c[3] of one lane,
// half that of its neighbour 5.
static void test_fused_mma_mapping_computes_dot_products(void) {
    int weights[MMA_WEIGHT_ROWS][MMA_COLUMNS], acts[MMA_ACT_ROWS][MMA_COLUMNS], stored[MMA_ACT_ROWS][MMA_COLUMNS];
    unsigned random = 1;
    for (int row = 0; row < MMA_WEIGHT_ROWS; row++)
        for (int i = 0; i < MMA_COLUMNS; i++)
            weights[row][i] = (int)((random = random * 1664525 + 1013904223) >> 20) - 2048;
    for (int row = 0; row < MMA_ACT_ROWS; row++)
        for (int i = 0; i < MMA_COLUMNS; i++) {
            acts[row][i] = (int)((random = random * 1664525 + 1013904223) >> 20) - 2048;
            stored[row][permuted_index(i)] = acts[row][i];
        }
    int a[32][4][2], b[32][2][2], c[32][4] = {{0}};
    for (int lane = 0; lane < 32; lane++) {
        for (int i = 0; i < 8; i++) a[lane][i / 2][i % 2] = weights[mma_weight_row(lane)][mma_weight_column(lane) + i];
        for (int i = 0; i < 4; i++)
            b[lane][i / 2][i % 2] = stored[mma_act_row(lane)][mma_act_column(lane) + mma_act_pair(lane) * 4 + i];
    }
    mma_m16n8k16(c, a, b);
    for (int row = 0; row < MMA_WEIGHT_ROWS; row++)
        for (int act = 0; act < MMA_ACT_ROWS; act++) {
            int expected = 0, lane = 8 * row + 2 * act,
                found = c[lane][0] + c[lane][3] + c[lane ^ 5][0] + c[lane ^ 5][3];
            for (int i = 0; i < MMA_COLUMNS; i++) expected += weights[row][i] * acts[act][i];
            if (found != expected) test_fail("row %d, activation row %d: %d, expected %d", row, act, found, expected);
        }
    test_end("test_fused_mma_mapping_computes_dot_products");
}

// The value of a bf16 times 2^120, which is what fused_packed.cuh makes of a code's bits.
static float times_2_120(unsigned bf16_bits) {
    union {
        unsigned bits;
        float value;
    } x = {bf16_bits << 16};
    return ldexpf(x.value, 120);
}

static void test_packed_fp8_codes_are_braided(void) {
    for (unsigned a = 0; a < 256; a++)
        for (unsigned b = 0; b < 256; b++) {
            unsigned both = packed_fp8(a, b);
            CHECK(both < 65536 && packed_fp8_first(both) == a && packed_fp8_second(both) == b);
            float first = times_2_120(both & 0x87f0), second = times_2_120((both << 4 & 0x80f0) | (both >> 4 & 0x0700));
            if ((a & 0x7f) != 0x7f) CHECK(first == quant_fp8_value((uint8_t)a));
            if ((b & 0x7f) != 0x7f) CHECK(second == quant_fp8_value((uint8_t)b));
        }
    test_end("test_packed_fp8_codes_are_braided");
}

// A chunk of 16 packed rows times 8 activation rows, as fused_packed.cuh computes it: a lane's 16 bytes of a row as
// they are packed, pairs of codes as they are widened, and mmas whose operands and results are all used.
static void test_packed_mma_mapping_computes_dot_products(void) {
    enum { ROWS = 16, TOKENS = 8 };
    static int codes[ROWS][PACK_CHUNK], packed[ROWS][PACK_CHUNK], acts[TOKENS][PACK_CHUNK], stored[TOKENS][PACK_CHUNK];
    unsigned random = 1;
    for (int bits = 4; bits <= 8; bits += 4) {
        for (int column = 0; column < PACK_CHUNK; column++) {
            for (int row = 0; row < ROWS; row++) {
                codes[row][column] = (int)((random = random * 1664525 + 1013904223) >> 24) - 128;
                packed[row][packed_place(bits, column)] = codes[row][column];
            }
            for (int token = 0; token < TOKENS; token++) {
                acts[token][column] = (int)((random = random * 1664525 + 1013904223) >> 20) - 2048;
                stored[token][permuted_index(column)] = acts[token][column];
            }
        }
        int c[32][4] = {{0}};
        for (int j = 0; j < 4; j++)
            for (int step = 0; step < 2; step++) {
                int a[32][4][2], b[32][2][2];
                for (int lane = 0; lane < 32; lane++) {
                    int g = lane / 4, t = lane % 4, at = bits == 8 ? j / 2 * 64 + t * 16 + j % 2 * 8 : t * 32 + j * 8;
                    for (int half = 0; half < 2; half++)
                        for (int pair = 0; pair < 4; pair++)
                            for (int i = 0; i < 2 && pair % 2 == step; i++) {
                                int within = bits == 8 ? pair / 2 * 4 + pair % 2 + 2 * i : pair + 4 * i;
                                a[lane][half + pair / 2 * 2][i] = packed[g + 8 * half][at + within];
                            }
                    for (int word = 0; word < 2; word++)
                        for (int i = 0; i < 2; i++)
                            b[lane][word][i] = stored[g][32 * j + 8 * t + 4 * step + 2 * word + i];
                }
                mma_m16n8k16(c, a, b);
            }
        for (int row = 0; row < ROWS; row++)
            for (int token = 0; token < TOKENS; token++) {
                int expected = 0, found = c[row % 8 * 4 + token / 2][row / 8 * 2 + token % 2];
                for (int i = 0; i < PACK_CHUNK; i++) expected += codes[row][i] * acts[token][i];
                if (found != expected)
                    test_fail("%d bits, row %d, token %d: %d, expected %d", bits, row, token, found, expected);
            }
    }
    test_end("test_packed_mma_mapping_computes_dot_products");
}

// ---- decode attention -----------------------------------------------------------------------------------------------

enum {
    HOPPER_SM = 233472,
    HOPPER_BLOCK = 232448,
    AMPERE_SM = 167936
}; // shared memory of an SM and of a block: H200, A100

static void test_kv_splits_cover_every_position_once(void) {
    for (int total = 1; total <= 140000; total += total < 70000 ? 1 : 37) {
        int length = kv_split(total), n = kv_splits(total);
        CHECK(length == 1 << kv_split_log2(total) && length % KV_SPLIT_UNIT == 0);
        CHECK((n - 1) * length < total && n * length >= total);
        CHECK(total > 131072 || n <= 32);
        CHECK(kv_split_work(total) * KV_SPLIT_UNIT == length);
        CHECK(total == 1 || kv_split(total) >= kv_split(total - 1));
    }
    test_end("test_kv_splits_cover_every_position_once");
}

static void test_kv_splits_of_known_lengths(void) {
    static const int known[][3] = {{1, 128, 1},        {128, 128, 1},     {129, 128, 2},     {2048, 128, 16},
                                   {4096, 128, 32},    {4097, 256, 17},   {8192, 256, 32},   {8193, 512, 17},
                                   {16384, 512, 32},   {32768, 1024, 32}, {65536, 2048, 32}, {65537, 4096, 17},
                                   {131072, 4096, 32}, {131080, 4096, 33}};
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (kv_split(known[i][0]) != known[i][1] || kv_splits(known[i][0]) != known[i][2])
            test_fail("%d positions: %d splits of %d", known[i][0], kv_splits(known[i][0]), kv_split(known[i][0]));
    test_end("test_kv_splits_of_known_lengths");
}

// The workspace has a place for every split of every length up to the cache's.
static void test_max_kv_splits_is_the_most_of_any_length(void) {
    int most = 0;
    for (int total = 1; total <= 140000; total++) {
        if (kv_splits(total) > most) most = kv_splits(total);
        if (max_kv_splits(total) != most)
            test_fail("up to %d positions: %d splits, expected %d", total, max_kv_splits(total), most);
    }
    test_end("test_max_kv_splits_is_the_most_of_any_length");
}

static void test_new_tokens_with_equal_splits(void) {
    for (int before = 0; before <= 140000; before++)
        for (int n = 1; n <= MAX_NEW_TOKENS; n++) {
            int same = 0; // counted one by one; those after them must be equal too, for two groups to be enough
            while (same < n && kv_split(before + 1 + same) == kv_split(before + 1)) same++;
            if (rows_of_equal_splits(before, n) != same)
                test_fail("%d new tokens after %d positions: %d with equal splits, expected %d", n, before,
                          rows_of_equal_splits(before, n), same);
            if (same < n) CHECK(kv_split(before + n) == kv_split(before + 1 + same));
        }
    test_end("test_new_tokens_with_equal_splits");
}

static void test_decode_plan_of_known_shapes(void) {
    static const struct {
        const char *name;
        int query_tiles, cache_max_len, n_sms, blocks_per_sm, can_cluster;
        DecodePlan plan;
    } known[] = {
        {"8B, 1 sequence, 2048, H200", 8, 2048, 132, 2, 1, {128, 1, 16, false}},
        {"8B, 1 sequence, 131072, H200", 8, 131072, 132, 2, 1, {256, 1, 32, false}},
        {"8B, 8 sequences, 2048, H200", 64, 2048, 132, 2, 1, {264, 1, 4, false}},
        {"8B, 16 sequences, 2048, H200", 128, 2048, 132, 2, 1, {264, 2, 2, true}},
        {"8B, 16 sequences, 2048, A100", 128, 2048, 108, 2, 0, {216, 1, 1, true}},
        {"8B, 64 sequences, 2048, H200", 512, 2048, 132, 2, 1, {264, 1, 0, true}},
        {"16 heads, 16 sequences, 1024, H200", 128, 1024, 132, 2, 1, {264, 1, 2, true}},
        {"16 heads, 16 sequences, 131080, H200", 128, 131080, 132, 2, 1, {264, 1, 2, true}},
        {"1 head, 100 positions, H200", 1, 100, 132, 2, 1, {1, 1, 1, true}},
    };
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        DecodePlan p = decode_plan(known[i].query_tiles, max_kv_splits(known[i].cache_max_len), known[i].n_sms,
                                   known[i].blocks_per_sm, known[i].can_cluster);
        const DecodePlan *e = &known[i].plan;
        if (p.blocks != e->blocks || p.cluster != e->cluster || p.blocks_per_tile != e->blocks_per_tile ||
            p.tiles_fill_gpu != e->tiles_fill_gpu)
            test_fail("%s: %d blocks, clusters of %d, %d for a query tile, tiles fill the GPU: %d", known[i].name,
                      p.blocks, p.cluster, p.blocks_per_tile, p.tiles_fill_gpu);
    }
    test_end("test_decode_plan_of_known_shapes");
}

static void test_decode_plan_keeps_its_bounds(void) {
    for (int tiles = 1; tiles <= 2000; tiles += tiles < 300 ? 1 : 97)
        for (int length = 100; length <= 200000; length = length * 3 / 2)
            for (int per_sm = 1; per_sm <= DECODE_BLOCKS_PER_SM; per_sm++)
                for (int cluster = 0; cluster < 2; cluster++) {
                    int splits = max_kv_splits(length);
                    DecodePlan p =
                        decode_plan(tiles, splits, 131, per_sm, cluster); // odd, so that pairs leave one over
                    CHECK(p.blocks >= 1 && p.blocks <= 131 * per_sm && p.blocks <= DECODE_MAX_BLOCKS &&
                          p.blocks <= (long long)tiles * splits);
                    CHECK(p.blocks % p.cluster == 0 && (p.cluster == 1 || cluster));
                    CHECK(p.blocks_per_tile * tiles <= p.blocks && (p.blocks_per_tile + 1) * tiles > p.blocks);
                    if (p.cluster == 2) CHECK(p.blocks_per_tile == 2 && splits > KV_GROUP);
                    // The second block's groups fit where the first one receives them,
                    // for every length of these caches.
                    for (int n = 2; p.cluster == 2 && n <= splits; n++)
                        if (halves_are_groups((unsigned)n)) CHECK(groups_of_second_half(n) <= CLUSTER_SENT_GROUPS);
                    CHECK(decode_max_work(tiles, length) >=
                          (long long)tiles * kv_splits(length) * kv_split_work(length));
                }
    test_end("test_decode_plan_keeps_its_bounds");
}

// Where two blocks share a query tile, group by group, each group is one block's.
static void test_halves_of_splits_are_whole_groups(void) {
    for (int n = 2; n <= 64; n++) {
        int groups = (n + KV_GROUP - 1) / KV_GROUP, first = n / 2, split_group = 0;
        for (int g = 0; g < groups; g++) split_group |= g * KV_GROUP < first && first < (g + 1) * KV_GROUP && first < n;
        CHECK(halves_are_groups((unsigned)n) == !split_group);
        if (!split_group) CHECK(groups_of_second_half(n) == groups - first / KV_GROUP);
    }
    test_end("test_halves_of_splits_are_whole_groups");
}

static void test_partition_is_even_within_an_eighth(void) {
    CHECK(partition_is_even(8, 10, 80) && partition_is_even(9, 8, 64) && !partition_is_even(10, 8, 64));
    CHECK(partition_is_even(1, 132, 128) && !partition_is_even(2, 132, 140));
    test_end("test_partition_is_even_within_an_eighth");
}

static void test_decode_shared_memory(void) {
    CHECK(decode_smem_bytes(128, 1, 2) == 69888 && decode_cluster_bytes(128, 1) == 12304);
    CHECK(decode_smem_bytes(64, 1, 3) == 103680 && decode_cluster_bytes(64, 1) == 8208);
    CHECK(decode_stages(64, 1, HOPPER_SM) == 3 && decode_stages(64, 1, AMPERE_SM) == 2);
    static const int dims[] = {64, 96, 128};
    for (int i = 0; i < 3; i++)
        for (int NT = 1; NT <= 2; NT++) {
            int D = dims[i], stages = decode_stages(D, NT, HOPPER_SM), bytes = decode_smem_bytes(D, NT, stages);
            CHECK(two_blocks_fit((size_t)(bytes + decode_cluster_bytes(D, NT)),
                                 HOPPER_SM)); // on Hopper clusters always fit
            CHECK(decode_stage_bytes(D) % 1024 == 0 && bytes % 16 == 0 && decode_q_pitch(D) % 16 == 0);
            CHECK(decode_out_tiles(D) * 4 * 16 >= D);
        }
    CHECK(decode_f32_warps(HOPPER_BLOCK, HOPPER_BLOCK) == 8 && decode_f32_warps(HOPPER_BLOCK + 1, HOPPER_BLOCK) == 4);
    test_end("test_decode_shared_memory");
}

// ---- prefill attention ----------------------------------------------------------------------------------------------

// Work items are all (query tile, head), once each, and of tiles those first that attend to most of their sequence.
static void test_prefill_tiles_cover_every_row_once(void) {
    static const int lengths[][7] = {
        {1, 1, 1, 1, 1, 1, 1}, {128, 0, 300, 5, 0, 129, 64}, {1000, 2000, 3, 0, 0, 0, 0}, {64, 64, 65, 63, 640, 0, 1}};
    enum { HEADS = 3, LONGEST = 2000 };
    static unsigned char seen[7][HEADS][LONGEST];
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++)
        for (int rows = SM80_ROWS; rows <= SM90_ROWS; rows *= 2) {
            PrefillBatch b;
            memset(&b, 0, sizeof b);
            memset(seen, 0, sizeof seen);
            b.n_seq = 7;
            b.q_start[0] = 11;
            for (int s = 0; s < 7; s++) b.q_start[s + 1] = b.q_start[s] + lengths[i][s], b.seq_len[s] = 10 * s;
            long long n = prefill_order(&b, rows) * HEADS;
            int tiles_left = LONGEST / rows + 1;
            for (long long item = 0; item < n; item++) {
                PrefillTile t = prefill_tile(&b, HEADS, rows, (int)item);
                CHECK(t.row0 >= 0 && t.row0 % rows == 0 && t.row0 < t.n_rows && t.n_rows == lengths[i][t.seq] &&
                      t.seq_len == 10 * t.seq);
                for (int row = t.row0; row < t.row0 + rows && row < t.n_rows; row++) seen[t.seq][t.head][row]++;
                CHECK(t.row0 / rows + 1 <= tiles_left || t.seq != prefill_tile(&b, HEADS, rows, (int)item - 1).seq);
                tiles_left = t.row0 / rows + 1;
            }
            for (int s = 0; s < 7; s++)
                for (int h = 0; h < HEADS; h++)
                    for (int row = 0; row < LONGEST; row++) CHECK(seen[s][h][row] == (row < lengths[i][s]));
        }
    test_end("test_prefill_tiles_cover_every_row_once");
}

// Every item is one block's, and a block that has the first of one round has the last of the next.
static void test_sm90_items_are_taken_once(void) {
    enum { BLOCKS = 132, ROUNDS = 6 };
    static unsigned char seen[BLOCKS * ROUNDS];
    memset(seen, 0, sizeof seen);
    for (int round = 0; round < ROUNDS; round++)
        for (int block = 0; block < BLOCKS; block++) seen[sm90_item(round, block, BLOCKS)]++;
    for (int i = 0; i < BLOCKS * ROUNDS; i++) CHECK(seen[i] == 1);
    for (int block = 0; block < BLOCKS; block++)
        CHECK(sm90_item(0, block, BLOCKS) + sm90_item(1, block, BLOCKS) == 2 * BLOCKS - 1);
    test_end("test_sm90_items_are_taken_once");
}

static void test_sm90_boxes_stay_within_a_block_of_the_cache(void) {
    CHECK(sm90_box_rows(1000, false) == SM90_KEYS);
    for (int block = 16; block <= 4096; block += 16) {
        int rows = sm90_box_rows(block, true);
        CHECK(block % rows == 0 && SM90_KEYS % rows == 0 && rows >= 16);
        CHECK(rows == SM90_KEYS || block % (2 * rows) != 0);
    }
    test_end("test_sm90_boxes_stay_within_a_block_of_the_cache");
}

// ---- products of many rows ------------------------------------------------------------------------------------------

// Tiles that a cluster takes one after another, by counting them.
static long long rounds_of(int T, int rows, PromptTile tile, int clusters) {
    const int tokens = tile.shares_tokens ? tile.tokens : 2 * tile.tokens,
              n = tile.shares_tokens ? 2 * tile.rows : tile.rows;
    long long tiles = 0, rounds = 0;
    for (int token = 0; token < T; token += tokens)
        for (int row = 0; row < rows; row += n) tiles++;
    for (; tiles > 0; tiles -= clusters) rounds++;
    return rounds;
}
static bool same_tile(PromptTile a, PromptTile b) {
    return a.tokens == b.tokens && a.rows == b.rows && a.shares_tokens == b.shares_tokens;
}

// Tiles for few tokens are for one or two of them.
static bool may_be(PromptTile tile, int T) {
    return tile.tokens == PROMPT_TOKENS || T <= 2 * tile.tokens;
}

static void test_prompt_tiles_cost_least(void) {
    static const int clusters[] = {1, 2, 7, 16, 39, 57, 66, 72, 1000};
    static const int weights[] = {8, 64, 96, 128, 184, 192, 256, 264, 1376, 2048, 6144, 28672};
    for (int k = 0; k < PROMPT_KINDS; k++)
        for (size_t c = 0; c < sizeof clusters / sizeof *clusters; c++)
            for (size_t w = 0; w < sizeof weights / sizeof *weights; w++)
                for (int T = 1; T <= 9000; T += T < 300 ? 1 + T % 3 : T < 1030 ? 31 : 509) {
                    const enum PromptKind kind = (enum PromptKind)k;
                    const int rows = weights[w], n = clusters[c];
                    const PromptTile best = prompt_tile(kind, T, rows, n);
                    const long long least = prompt_tile_cost(T, rows, best, n);
                    bool is_choice = false;
                    CHECK(may_be(best, T) && prompt_rounds(T, rows, best, n) == rounds_of(T, rows, best, n));
                    for (int i = 0; prompt_tile_choice(kind, i).rows > 0; i++) {
                        const PromptTile choice = prompt_tile_choice(kind, i);
                        const long long cost = prompt_tile_cost(T, rows, choice, n);
                        is_choice |= same_tile(choice, best);
                        if (least > cost && may_be(choice, T))
                            test_fail("%d rows of %d, %d clusters: tiles of %d x %d, %d x %d cost less", T, rows, n,
                                      best.tokens, best.rows, choice.tokens, choice.rows);
                        // As many rounds and fewer rows cost less.
                        if (choice.tokens == best.tokens && choice.rows < best.rows)
                            CHECK(rounds_of(T, rows, choice, n) > rounds_of(T, rows, best, n));
                    }
                    CHECK(is_choice && least > 0);
                    const int utilisation = prompt_utilisation(kind, T, rows, n);
                    CHECK(utilisation >= 0 && utilisation <= 100);
                }
    test_end("test_prompt_tiles_cost_least");
}

static void test_prompt_tile_choices(void) {
    for (int k = 0; k < PROMPT_KINDS; k++) {
        const enum PromptKind kind = (enum PromptKind)k;
        int n = 0, n_few = 0;
        for (int i = 0; prompt_tile_choice(kind, i).rows > 0; i++, n++) {
            // wgmma takes 256 columns at most. What a box has of a tile's rows, half of them or all: whole groups of 8
            // rows, which the swizzle repeats after.
            const PromptTile tile = prompt_tile_choice(kind, i);
            const bool few = tile.tokens == PROMPT_FEW_TOKENS;
            CHECK(few || tile.tokens == PROMPT_TOKENS);
            CHECK(tile.rows <= 256 && tile.rows % 16 == 0);
            for (int j = 0; j < i; j++) CHECK(!same_tile(tile, prompt_tile_choice(kind, j)));
            CHECK(few || n_few == 0); // the last ones are those for few tokens
            n_few += few;
        }
        CHECK(n_few > 1 && n > n_few && prompt_tile_choice(kind, n + 1).rows == 0);
    }
    test_end("test_prompt_tile_choices");
}

// One row, and as many as an int can say.
static void test_prompt_tiles_of_extreme_shapes(void) {
    static const int extremes[] = {1, 8, INT_MAX / 2, INT_MAX - 255, INT_MAX};
    enum { N = sizeof extremes / sizeof *extremes };
    for (int k = 0; k < PROMPT_KINDS; k++)
        for (int c = 1; c <= 132; c += 131)
            for (int t = 0; t < N; t++)
                for (int r = 0; r < N; r++) {
                    const enum PromptKind kind = (enum PromptKind)k;
                    const PromptTile best = prompt_tile(kind, extremes[t], extremes[r], c);
                    bool is_choice = false;
                    for (int i = 0; prompt_tile_choice(kind, i).rows > 0; i++) {
                        const PromptTile choice = prompt_tile_choice(kind, i);
                        const long long cost = prompt_tile_cost(extremes[t], extremes[r], choice, c);
                        is_choice |= same_tile(choice, best);
                        CHECK(cost > 0);
                        CHECK(!may_be(choice, extremes[t]) ||
                              cost >= prompt_tile_cost(extremes[t], extremes[r], best, c));
                        if (t > 0) CHECK(cost >= prompt_tile_cost(extremes[t - 1], extremes[r], choice, c));
                        if (r > 0) CHECK(cost >= prompt_tile_cost(extremes[t], extremes[r - 1], choice, c));
                        if (c > 1) CHECK(cost <= prompt_tile_cost(extremes[t], extremes[r], choice, 1));
                    }
                    CHECK(is_choice);
                }
    test_end("test_prompt_tiles_of_extreme_shapes");
}

// Which products of 8B's are worth it on a GPU of 66 clusters.
static void test_prompt_utilisation(void) {
    enum { QKV = 6144, OUT = 4096, GATE_UP = 28672 };
    for (int T = 1; T <= PROMPT_FEW_TOKENS; T++) { // one tile for each SM, or nearly
        CHECK(prompt_utilisation(PROMPT_SWIGLU, T, GATE_UP, 66) >= 95);
        CHECK(prompt_utilisation(PROMPT_QKV, T, QKV, 66) >= 95 && prompt_utilisation(PROMPT_ADD, T, OUT, 66) >= 95);
    }
    for (int T = PROMPT_FEW_TOKENS + 1; T <= PROMPT_TOKENS; T++) {
        CHECK(prompt_utilisation(PROMPT_SWIGLU, T, GATE_UP, 66) >= 85);
        CHECK(prompt_utilisation(PROMPT_QKV, T, QKV, 66) >= 95 && prompt_utilisation(PROMPT_ADD, T, OUT, 66) >= 95);
        CHECK(prompt_tile(PROMPT_SWIGLU, T, GATE_UP, 66).tokens == PROMPT_TOKENS);
        CHECK(prompt_tile(PROMPT_ADD, T, OUT, 66).tokens == PROMPT_FEW_TOKENS);
    }
    CHECK(prompt_utilisation(PROMPT_QKV, 192, QKV, 66) < 70 && prompt_utilisation(PROMPT_QKV, 256, QKV, 66) >= 70);
    CHECK(prompt_utilisation(PROMPT_SWIGLU, 320, GATE_UP, 66) < 80 &&
          prompt_utilisation(PROMPT_SWIGLU, 512, GATE_UP, 66) >= 80);
    CHECK(prompt_utilisation(PROMPT_SWIGLU, 8192, GATE_UP, 66) >= 90 &&
          prompt_utilisation(PROMPT_QKV, 8192, QKV, 66) >= 85);
    for (int kind = PROMPT_SWIGLU; kind <= PROMPT_QKV; kind++) {
        const enum PromptKind k = (enum PromptKind)kind;
        CHECK(prompt_allowance(k, 160) == 0 && prompt_allowance(k, 193) > 0 && prompt_allowance(k, 257) == 0);
        CHECK(prompt_allowance(k, 320) == 0 && prompt_allowance(k, 321) > 0 && prompt_allowance(k, 641) == 0);
        CHECK(prompt_allowance(k, 193) <= 30 && prompt_allowance(PROMPT_ADD, 193) == 0);
    }
    test_end("test_prompt_utilisation");
}

// ---- packed rows ----------------------------------------------------------------------------------------------------

static void test_packed_places_are_columns_exchanged_in_runs_of_8(void) {
    for (int bits = 4; bits <= 8; bits += 4)
        for (int c = 0; c < PACK_COLUMNS; c++) {
            int place = packed_place(bits, c);
            CHECK(packed_column(bits, place) == c);
            // lane t has columns 8t .. +7 of each 32, in pieces of 16 bytes, 64 bytes from the lanes' first ones
            int t = c % 32 / 8, j = c % PACK_CHUNK / 32, at = place % PACK_CHUNK * bits / 8;
            CHECK(place / PACK_CHUNK == c / PACK_CHUNK);
            CHECK(at % 64 / 16 == t && at / 64 == (bits == 8 ? j / 2 : 0));
            CHECK(at % 16 / bits == (bits == 8 ? j % 2 : j));
            // neighbours are 16 bits apart
            if (c % 2 == 0) CHECK((packed_place(bits, c + 1) - place) * bits == 16);
        }
    test_end("test_packed_places_are_columns_exchanged_in_runs_of_8");
}

static void test_packed_rows_of_known_shapes(void) {
    static const struct {
        int bits, group, scale_bytes, cols, blocks, block_bytes, row_bytes;
    } known[] = {{8, 0, 4, 4096, 4, 1024, 4096},    {8, 0, 4, 14336, 14, 1024, 14336}, {8, 128, 2, 4096, 4, 1040, 4160},
                 {8, 32, 4, 2048, 2, 1152, 2304},   {4, 128, 2, 4096, 4, 528, 2112},   {4, 64, 2, 8192, 8, 544, 4352},
                 {4, 32, 2, 14336, 14, 576, 8064},  {4, 32, 4, 64, 1, 640, 640},       {4, 0, 2, 448, 1, 512, 512},
                 {4, 128, 2, 28672, 28, 528, 14784}};
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        Packing p = packing_of(known[i].bits, known[i].group, known[i].scale_bytes, known[i].cols);
        CHECK(p.blocks == known[i].blocks && p.block_bytes == known[i].block_bytes &&
              p.row_bytes == known[i].row_bytes);
        CHECK(p.row_bytes % 16 == 0 && p.block_bytes % 16 == 0);
    }
    test_end("test_packed_rows_of_known_shapes");
}

static void test_packed_scales_come_after_the_codes(void) {
    static const int groups[] = {32, 64, 128};
    for (int bits = 4; bits <= 8; bits += 4)
        for (int g = 0; g < 3; g++)
            for (int bytes = 2; bytes <= 4; bytes += 2)
                for (int cols = 64; cols <= 3072; cols += 472) {
                    Packing p = packing_of(bits, groups[g], bytes, cols);
                    for (int c = 0, before = -1; c < p.blocks * PACK_COLUMNS; c++) {
                        int at = packed_scale(&p, c), block = c / PACK_COLUMNS;
                        CHECK(at >= block * p.block_bytes + PACK_COLUMNS * bits / 8 && at % bytes == 0);
                        CHECK(at + bytes <= (block + 1) * p.block_bytes);
                        CHECK((at == before) == (c % p.group != 0));
                        before = at;
                    }
                }
    test_end("test_packed_scales_come_after_the_codes");
}

int main(void) {
    test_kv_splits_cover_every_position_once();
    test_kv_splits_of_known_lengths();
    test_max_kv_splits_is_the_most_of_any_length();
    test_new_tokens_with_equal_splits();
    test_decode_plan_of_known_shapes();
    test_decode_plan_keeps_its_bounds();
    test_halves_of_splits_are_whole_groups();
    test_partition_is_even_within_an_eighth();
    test_decode_shared_memory();
    test_prefill_tiles_cover_every_row_once();
    test_sm90_items_are_taken_once();
    test_sm90_boxes_stay_within_a_block_of_the_cache();
    test_fused_plan_of_known_shapes();
    test_fused_plan_keeps_its_bounds();
    test_fused_plan_of_quantised_weights();
    test_fused_slices_cover_every_column_once();
    test_permuted_index_exchanges_words_1_and_2();
    test_fused_mma_mapping_computes_dot_products();
    test_packed_mma_mapping_computes_dot_products();
    test_packed_fp8_codes_are_braided();
    test_prompt_tiles_cost_least();
    test_prompt_tile_choices();
    test_prompt_tiles_of_extreme_shapes();
    test_prompt_utilisation();
    test_packed_places_are_columns_exchanged_in_runs_of_8();
    test_packed_rows_of_known_shapes();
    test_packed_scales_come_after_the_codes();
    return tests_summary();
}
