// model/cpu/matmul_amx.c where there is no AMX: its tile instructions are these functions, written from the operation
// sections of Intel's manual (LDTILECFG, TILELOADD, TDPBF16PS, ...). What it finds is wrong addresses, strides, orders
// and edges; the processor's own rounding it cannot know. test_ops_bf16.c runs the real ones where there are some.
#ifdef __x86_64__
#include <immintrin.h>
#endif

#include "ops_check.h"

#ifdef __x86_64__

enum { TILES = 8, TILE_ROWS = 16, TILE_BYTES = 64 };

static struct {
    bool configured;
    int rows[TILES], bytes[TILES];
    float data[TILES][TILE_ROWS][TILE_BYTES / 4];
} amx;

static void model_loadconfig(const void *memory) {
    const uint8_t *config = memory;
    memset(&amx, 0, sizeof amx);
    amx.configured = config[0] == 1 && config[1] == 0;
    for (int i = 2; i < 16; i++) amx.configured = amx.configured && config[i] == 0; // else it faults
    for (int i = 0; i < TILES; i++) {
        amx.bytes[i] = config[16 + 2 * i] | config[17 + 2 * i] << 8;
        amx.rows[i] = config[48 + i];
        if (amx.bytes[i] > TILE_BYTES || amx.rows[i] > TILE_ROWS) test_fail("tile %d is too large", i);
    }
    for (int i = TILES; i < 16; i++)
        if (config[16 + 2 * i] || config[17 + 2 * i] || config[48 + i]) test_fail("there is no tile %d", i);
    if (!amx.configured) test_fail("a configuration that faults");
}

static void model_release(void) {
    amx.configured = false;
}

static void model_zero(int tile) {
    memset(amx.data[tile], 0, sizeof amx.data[tile]);
}

static void model_load(int tile, const void *base, size_t stride) {
    if (!amx.configured) test_fail("a load before the configuration");
    model_zero(tile);
    for (int r = 0; r < amx.rows[tile]; r++)
        memcpy(amx.data[tile][r], (const char *)base + (size_t)r * stride, (size_t)amx.bytes[tile]);
}

static void model_store(int tile, void *base, size_t stride) {
    for (int r = 0; r < amx.rows[tile]; r++)
        memcpy((char *)base + (size_t)r * stride, amx.data[tile][r], (size_t)amx.bytes[tile]);
}

static float bf16_of_word(float word, int high) {
    uint32_t bits;
    memcpy(&bits, &word, sizeof bits);
    bits = high ? bits & 0xFFFF0000 : bits << 16;
    memcpy(&word, &bits, sizeof bits);
    return word;
}

// Of each word the high and the low half have sums of their own, as in the manual's newest edition.
static void model_dpbf16ps(int c, int a, int b) {
    for (int m = 0; m < amx.rows[c]; m++)
        for (int n = 0; n < amx.bytes[c] / 4; n++) {
            float low = 0, high = 0;
            for (int k = 0; k < amx.bytes[a] / 4; k++) {
                low = fmaf(bf16_of_word(amx.data[a][m][k], 0), bf16_of_word(amx.data[b][k][n], 0), low);
                high = fmaf(bf16_of_word(amx.data[a][m][k], 1), bf16_of_word(amx.data[b][k][n], 1), high);
            }
            amx.data[c][m][n] += low + high;
        }
}

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig model_loadconfig
#define _tile_release model_release
#define _tile_zero model_zero
#define _tile_loadd model_load
#define _tile_stored model_store
#define _tile_dpbf16ps model_dpbf16ps
#define matmul_amx matmul_modelled
#define amx_supported amx_supported_here
#include "../model/cpu/matmul_amx.c"

static void check_modelled(const Ops *ops, int T, int n, int k) {
    float *x = random_floats((size_t)(T * k), 1);
    void *w = random_weights(DTYPE_BF16, (size_t)(n * k));
    Matrix m = {.data = w, .dtype = DTYPE_BF16, .rows = n, .cols = k};
    ops->round(x, DTYPE_BF16, (int64_t)T * k);
    check_matrix(matmul_modelled, T, x, &m);
    if (T <= 33) {
        float *together = poisoned((size_t)(T * n)), *alone = poisoned((size_t)(T * n));
        matmul_modelled(together, x, &m, T);
        for (int t = 0; t < T; t++) matmul_modelled(alone + t * n, x + t * k, &m, 1);
        if (memcmp(together, alone, (size_t)(T * n) * sizeof *alone) != 0)
            test_fail("T %d n %d k %d: other bits than row by row", T, n, k);
        free(together);
        free(alone);
    }
    free(x);
    free(w);
}

static void test_amx_at_awkward_sizes(const Ops *ops) {
    static const int tokens[] = {1, 15, 16, 17, 31, 32, 33, 64, 70}, rows[] = {1, 16, 17, 32, 33, 130},
                     columns[] = {1, 2, 31, 32, 33, 511, 512, 513, 1055};
    for (int a = 0; a < LENGTH(tokens); a++)
        for (int b = 0; b < LENGTH(rows); b++)
            for (int c = 0; c < LENGTH(columns); c++)
                if (tokens[a] * rows[b] * columns[c] < 300000 || (a + b + c) % 4 == 0)
                    check_modelled(ops, tokens[a], rows[b], columns[c]);
    end("test_amx_at_awkward_sizes", &(Ops){.name = "a model of its instructions"});
}

int main(void) {
    threads_set(1); // the model has one thread's tiles
    if (ops_path(2))
        test_amx_at_awkward_sizes(ops_path(2));
    else
        test_skip("test_amx_at_awkward_sizes", "this processor has no AVX-512, which it takes beside AMX");
    return tests_summary();
}

#else

int main(void) {
    test_skip("test_amx_at_awkward_sizes", "not an x86-64 processor");
    return tests_summary();
}

#endif
