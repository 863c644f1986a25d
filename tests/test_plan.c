// Tuning rules of the GPU kernels: plain functions of shapes and sizes, so none of this needs a GPU.
#include "../model/cuda/fused_plan.h"
#include "check.h"

// Dynamic shared memory that a block of the fused engine may have on Hopper: 227 KB less its own variables.
enum { HOPPER_SHARED = 232448 - FUSED_STATIC_BYTES };

// ---- engine fused ---------------------------------------------------------------------------------------------------

typedef struct Known {
    const char *name;
    FusedShape shape;
    int slice, tile_rows, split_down, partial_floats, ring_offset, stage_bytes, n_stages, in_flight, ahead, shared, max_rows;
} Known;

// What the rules gave when their speeds were measured.
static void test_fused_plan_of_known_shapes(void) {
    static const Known known[] = {
        {"LLaMA 3.2 1B", {2048, 2048, 8192, 64, 1, 1, HOPPER_SHARED}, 2048, 8, 0, 256, 21760, 32768, 6, 2, 1, 218368, 8},
        {"LLaMA 3.2 3B", {3072, 3072, 8192, 128, 1, 1, HOPPER_SHARED}, 3072, 4, 0, 96, 18944, 24576, 8, 3, 2, 215552, 8},
        {"LLaMA 3.1 8B", {4096, 4096, 14336, 128, 1, 1, HOPPER_SHARED}, 4096, 4, 0, 128, 31744, 32768, 6, 2, 1, 228352, 8},
        {"LLaMA 3.1 8B, 8 tokens", {4096, 4096, 14336, 128, 8, 1, HOPPER_SHARED}, 4096, 4, 1, 256, 77824, 32768, 4, 2, 1, 208896, 8},
        {"LLaMA 3.1 8B, f32", {4096, 4096, 14336, 128, 1, 3, HOPPER_SHARED}, 4096, 4, 0, 384, 93184, 32768, 4, 2, 1, 224256, 2},
        {"LLaMA 3.1 70B", {8192, 8192, 28672, 128, 1, 1, HOPPER_SHARED}, 4096, 4, 0, 224, 61952, 32768, 5, 2, 1, 225792, 8},
        {"LLaMA 3.1 70B, 4 tokens", {8192, 8192, 28672, 128, 4, 1, HOPPER_SHARED}, 4096, 4, 1, 128, 71680, 32768, 4, 2, 1, 202752, 8},
        {"stories", {64, 64, 176, 64, 1, 1, HOPPER_SHARED}, 512, 8, 0, 64, 2688, 8192, 12, 8, 4, 100992, 8},
    };
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        const Known *k = &known[i];
        FusedPlan p;
        memset(&p, 0, sizeof p);
        if (!fused_plan(&k->shape, &p)) test_fail("%s does not fit", k->name);
        if (p.slice != k->slice || p.tile_rows != k->tile_rows || p.split_down != k->split_down || p.partial_floats != k->partial_floats)
            test_fail("%s: slice %d, tile %d, split %d, %d partial sums", k->name, p.slice, p.tile_rows, p.split_down, p.partial_floats);
        if (p.ring_offset != k->ring_offset || p.stage_bytes != k->stage_bytes || p.n_stages != k->n_stages || p.shared_bytes != (size_t)k->shared)
            test_fail("%s: a ring of %d x %d bytes from %d, %zu in all", k->name, p.n_stages, p.stage_bytes, p.ring_offset, p.shared_bytes);
        if (p.stages_in_flight != k->in_flight || p.stages_ahead != k->ahead)
            test_fail("%s: %d stages in flight, %d ahead", k->name, p.stages_in_flight, p.stages_ahead);
        if (fused_max_rows(k->shape) != k->max_rows) test_fail("%s: %d tokens in a pass", k->name, fused_max_rows(k->shape));
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
                    FusedShape s = {dim, dim, hidden, 64 + 32 * (dim % 3), rows, terms, HOPPER_SHARED};
                    FusedPlan p;
                    if (!fused_plan(&s, &p)) {
                        CHECK(fused_max_rows(s) < rows);
                        continue;
                    }
                    fit++;
                    split += p.split_down;
                    CHECK(fused_max_rows(s) >= rows);
                    CHECK(p.shared_bytes <= s.shared_bytes && p.shared_bytes == (size_t)(p.ring_offset + p.n_stages * p.stage_bytes));
                    int down = p.split_down ? fused_min(hidden, p.slice) : hidden, longest = fused_max(dim, down);
                    CHECK((size_t)p.partials_offset >= (size_t)longest * 2 * rows * terms);
                    CHECK(p.rope_offset >= p.partials_offset + PARTIAL_BUFFERS * p.partial_floats * 4);
                    CHECK(p.residuals_offset >= p.rope_offset + rows * s.head_dim * 4);
                    CHECK(p.ring_offset >= p.residuals_offset + RESIDUAL_BUFFERS * rows * p.tile_rows * 4);
                    CHECK(p.partials_offset % 128 == 0 && p.rope_offset % 8 == 0 && p.residuals_offset % 16 == 0 && p.ring_offset % 128 == 0);
                    CHECK(p.stage_bytes == p.tile_rows * p.slice * 2 && p.stage_bytes <= MMA_WEIGHT_ROWS * MAX_SLICE * 2);
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
// 2t + 1 of the left operand, a[2] and a[3] the same 8 columns on; b[0] and b[1] rows 2t and 2t + 1, and 8 on, of column g
// of the right one; c[0], c[1] columns 2t and 2t + 1 of row g, c[2] and c[3] of row g + 8.
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
// weights and 8 of permuted activations, and half of a dot product is c[0] + c[3] of one lane, half that of its neighbour 5.
static void test_fused_mma_mapping_computes_dot_products(void) {
    int weights[MMA_WEIGHT_ROWS][MMA_COLUMNS], acts[MMA_ACT_ROWS][MMA_COLUMNS], stored[MMA_ACT_ROWS][MMA_COLUMNS];
    unsigned random = 1;
    for (int row = 0; row < MMA_WEIGHT_ROWS; row++)
        for (int i = 0; i < MMA_COLUMNS; i++) weights[row][i] = (int)((random = random * 1664525 + 1013904223) >> 20) - 2048;
    for (int row = 0; row < MMA_ACT_ROWS; row++)
        for (int i = 0; i < MMA_COLUMNS; i++) {
            acts[row][i] = (int)((random = random * 1664525 + 1013904223) >> 20) - 2048;
            stored[row][permuted_index(i)] = acts[row][i];
        }
    int a[32][4][2], b[32][2][2], c[32][4] = {{0}};
    for (int lane = 0; lane < 32; lane++) {
        for (int i = 0; i < 8; i++) a[lane][i / 2][i % 2] = weights[mma_weight_row(lane)][mma_weight_column(lane) + i];
        for (int i = 0; i < 4; i++) b[lane][i / 2][i % 2] = stored[mma_act_row(lane)][mma_act_column(lane) + mma_act_pair(lane) * 4 + i];
    }
    mma_m16n8k16(c, a, b);
    for (int row = 0; row < MMA_WEIGHT_ROWS; row++)
        for (int act = 0; act < MMA_ACT_ROWS; act++) {
            int expected = 0, lane = 8 * row + 2 * act, found = c[lane][0] + c[lane][3] + c[lane ^ 5][0] + c[lane ^ 5][3];
            for (int i = 0; i < MMA_COLUMNS; i++) expected += weights[row][i] * acts[act][i];
            if (found != expected) test_fail("row %d, activation row %d: %d, expected %d", row, act, found, expected);
        }
    test_end("test_fused_mma_mapping_computes_dot_products");
}

int main(void) {
    test_fused_plan_of_known_shapes();
    test_fused_plan_keeps_its_bounds();
    test_fused_slices_cover_every_column_once();
    test_permuted_index_exchanges_words_1_and_2();
    test_fused_mma_mapping_computes_dot_products();
    return tests_summary();
}
