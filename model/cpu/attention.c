// Attention on the CPU, of prompts and of steps: scores of a tile of positions, an online softmax over the tiles, and
// values weighted by it. Compiled once for each instruction set, as ops.c is.
#include <math.h>
#include <string.h>

#include "../threads.h"
#include "ops.h"
#include "ops_shared.h"
#include "vectors.h"

enum {
    OUTER_ROWS = 6,               // rows whose sums stay in registers
    Q_ROWS = 60,                  // (token, head) rows of one task
    Q_STRIDE = MAX_HEAD_DIM + 16, // of their queries, so that rows do not want the same places of the L1 cache
    KV_TILE = KV_PAGE             // positions per step of the online softmax
};

// out[R][.] += a[R][n] · b[n][.] for C vectors of columns: rows of out are out_row apart, of a a_row, of b b_row. R and
// C are constants after inlining.
INLINE void outer_tile(float *out, int out_row, const float *a, int a_row, const float *b, int b_row, int n, int R,
                       int C) {
    Float8 sum[OUTER_ROWS][2];
#pragma GCC unroll 6
    for (int i = 0; i < R; i++)
        for (int c = 0; c < C; c++) sum[i][c] = load8(out + i * out_row + c * LANES);
    for (int l = 0; l < n; l++, a++, b += b_row) {
        Float8 column[2];
        for (int c = 0; c < C; c++) column[c] = load8(b + c * LANES);
#pragma GCC unroll 6
        for (int i = 0; i < R; i++) {
            Float8 factor = splat8(a[i * a_row]);
            for (int c = 0; c < C; c++) sum[i][c] += factor * column[c];
        }
    }
#pragma GCC unroll 6
    for (int i = 0; i < R; i++)
        for (int c = 0; c < C; c++) store8(out + i * out_row + c * LANES, sum[i][c]);
}

// The same for R rows and all `columns`.
INLINE void outer_rows(float *out, int out_row, const float *a, int a_row, const float *b, int b_row, int n,
                       int columns, int R) {
    int c = 0;
    for (; c + 2 * LANES <= columns; c += 2 * LANES) outer_tile(out + c, out_row, a, a_row, b + c, b_row, n, R, 2);
    for (; c + LANES <= columns; c += LANES) outer_tile(out + c, out_row, a, a_row, b + c, b_row, n, R, 1);
    for (int r = 0; r < R && c < columns; r++) // columns left over
        for (int l = 0; l < n; l++)
            for (int i = c; i < columns; i++) out[r * out_row + i] += a[r * a_row + l] * b[l * b_row + i];
}

// OUTER_ROWS rows. (Not inlined: their sums would not stay in registers, of which they take nearly all.)
__attribute__((noinline)) static void outer_most(float *out, int out_row, const float *a, int a_row, const float *b,
                                                 int b_row, int n, int columns) {
    outer_rows(out, out_row, a, a_row, b, b_row, n, columns, OUTER_ROWS);
}

// The same for any number of rows. A row's sums have one order, whatever rows are beside it.
static void outer_product(float *out, int out_row, const float *a, int a_row, const float *b, int b_row, int n,
                          int columns, int rows) {
    int i = 0;
    for (; i + OUTER_ROWS <= rows; i += OUTER_ROWS)
        outer_most(out + i * out_row, out_row, a + i * a_row, a_row, b, b_row, n, columns);
    for (; i + 4 <= rows; i += 4) outer_rows(out + i * out_row, out_row, a + i * a_row, a_row, b, b_row, n, columns, 4);
    for (; i < rows; i++) outer_rows(out + i * out_row, out_row, a + i * a_row, a_row, b, b_row, n, columns, 1);
}

// out[rows][n] += p[rows][KV_TILE] · v[n], of v as many positions as the row attends to, visible[rows], ascending: what
// comes after it is not multiplied by zero but left alone, for it may be infinite. Rows that are multiplied together
// are so for the positions that all of them attend to, and then each by itself for its others.
static void accumulate(float *out, const float *p, const float *v, int rows, const int *visible, int n) {
    for (int i = 0; i < rows; i += OUTER_ROWS) {
        const int together = rows - i < OUTER_ROWS ? rows - i : OUTER_ROWS, common = visible[i];
        outer_product(out + i * n, n, p + i * KV_TILE, KV_TILE, v, n, common, n, together);
        for (int r = i; r < i + together; r++)
            if (visible[r] > common)
                outer_product(out + r * n, n, p + r * KV_TILE + common, KV_TILE, v + common * n, n, visible[r] - common,
                              n, 1);
    }
}

// to[8][KV_TILE] = the transpose of from[8][from_row].
INLINE void transpose8(float *to, const float *from, int from_row) {
    Float8 a[8], b[8];
    for (int i = 0; i < 8; i++) a[i] = load8(from + i * from_row);
    for (int i = 0; i < 4; i++) { // pairs of rows i and i+4, then of these, then of those: all elements are in place
        b[2 * i] = __builtin_shufflevector(a[i], a[i + 4], 0, 8, 1, 9, 2, 10, 3, 11);
        b[2 * i + 1] = __builtin_shufflevector(a[i], a[i + 4], 4, 12, 5, 13, 6, 14, 7, 15);
    }
    for (int i = 0; i < 4; i++) {
        a[2 * i] = __builtin_shufflevector(b[i], b[i + 4], 0, 8, 1, 9, 2, 10, 3, 11);
        a[2 * i + 1] = __builtin_shufflevector(b[i], b[i + 4], 4, 12, 5, 13, 6, 14, 7, 15);
    }
    for (int i = 0; i < 4; i++) {
        b[2 * i] = __builtin_shufflevector(a[i], a[i + 4], 0, 8, 1, 9, 2, 10, 3, 11);
        b[2 * i + 1] = __builtin_shufflevector(a[i], a[i + 4], 4, 12, 5, 13, 6, 14, 7, 15);
    }
    for (int i = 0; i < 8; i++) store8(to + i * KV_TILE, b[i]);
}

// to[n][KV_TILE] from k[count][n]; zeros in the place of positions that are not there.
static void transpose_tile(float *to, const float *k, int count, int n) {
    int whole = n / LANES * LANES, j = 0;
    if (count < KV_TILE) memset(to, 0, (size_t)(n * KV_TILE) * sizeof *to);
    for (; j + LANES <= count; j += LANES) {
        for (int i = 0; i < whole; i += LANES) transpose8(to + i * KV_TILE + j, k + j * n + i, n);
        for (int i = whole; i < n; i++)
            for (int l = 0; l < LANES; l++) to[i * KV_TILE + j + l] = k[(j + l) * n + i];
    }
    for (; j < count; j++)
        for (int i = 0; i < n; i++) to[i * KV_TILE + j] = k[j * n + i];
}

// score[rows][KV_TILE] = queries[rows][Q_STRIDE] · k[count][n]. Rows of prompts are many: keys are transposed for them,
// so that no sum is spread over a vector.
static void prompt_scores(float *score, const float *queries, const float *k, int rows, int count, int n) {
    float keys[MAX_HEAD_DIM * KV_TILE];
    transpose_tile(keys, k, count, n);
    memset(score, 0, (size_t)(rows * KV_TILE) * sizeof *score);
    outer_product(score, KV_TILE, queries, Q_STRIDE, keys, KV_TILE, n, KV_TILE, rows);
}

// The same for rows of steps.
static void step_scores(float *score, const float *queries, const float *k, int rows, int count, int n) {
    int whole = n / LANES * LANES;
    memset(score, 0, (size_t)(rows * KV_TILE) * sizeof *score);
    dot_block(score, KV_TILE, 1, queries, Q_STRIDE, rows, k, (size_t)n, count, whole);
    for (int r = 0; r < rows; r++)
        for (int i = whole; i < n; i++)
            for (int c = 0; c < count; c++) score[r * KV_TILE + c] += queries[r * Q_STRIDE + i] * k[c * n + i];
}

// One row of scores [KV_TILE], of which the first `visible` count: to exp(score - max), zero beyond; keeps the running
// maximum and sum, and rescales what was accumulated under an older maximum.
static void softmax_step(float *score, int visible, float *max, float *sum, float *out, int n) {
    for (int j = visible; j < KV_TILE; j++) score[j] = -INFINITY;
    Float8 most = splat8(*max);
    for (int j = 0; j < KV_TILE; j += LANES) {
        Float8 s = load8(score + j);
        most = select8(s > most, s, most);
    }
    float new_max = *max;
    for (int j = 0; j < LANES; j++) new_max = most[j] > new_max ? most[j] : new_max;
    if (new_max != *max) {
        float rescale = expf(*max - new_max); // 0 at first, when the maximum is -inf
        *sum *= rescale;
        for (int l = 0; l < n; l++) out[l] *= rescale;
        *max = new_max;
    }
    Float8 total = splat8(0);
    for (int j = 0; j < KV_TILE; j += LANES) {
        Float8 p = exp8(load8(score + j) - new_max);
        store8(score + j, p);
        total += p;
    }
    *sum += sum8(total);
}

// n numbers of the cache from number `at` on: where they are, or widened.
static const float *tile_of(float *widened, const void *cache, size_t at, DType dtype, int n) {
    if (dtype == DTYPE_F32) return (const float *)cache + at;
    FOR_ISA(widen)(widened, (const uint16_t *)cache + at, dtype, n);
    return widened;
}

// Rows [first, first+rows) of one K/V head's queries, numbered token × group + head of the group. k and v: the head's
// first page, page_stride elements before the next.
static void attention_task(float *out, const float *q, const void *k, const void *v, DType dtype, const int *pages,
                           size_t page_stride, int first, int rows, int pos, int n_heads, int group, int head_dim,
                           bool prompt) {
    float queries[Q_ROWS * Q_STRIDE], result[Q_ROWS * MAX_HEAD_DIM], score[Q_ROWS * KV_TILE], max[Q_ROWS], sum[Q_ROWS],
        widened[KV_TILE * MAX_HEAD_DIM];
    int visible[Q_ROWS]; // positions of a tile that a row attends to
    float scale = 1.0f / sqrtf((float)head_dim);
    for (int r = 0; r < rows; r++) {
        int token = (first + r) / group, head = (first + r) % group;
        const float *from = q + ((size_t)token * (size_t)n_heads + (size_t)head) * (size_t)head_dim;
        for (int i = 0; i < head_dim; i++) queries[r * Q_STRIDE + i] = from[i] * scale;
        max[r] = -INFINITY;
        sum[r] = 0;
    }
    memset(result, 0, (size_t)(rows * head_dim) * sizeof *result);
    int end = pos + (first + rows - 1) / group + 1; // positions that the last row attends to
    for (int j = 0; j < end; j += KV_TILE) {
        int count = end - j < KV_TILE ? end - j : KV_TILE;
        size_t page = (size_t)pages[j / KV_TILE] * page_stride;
        const float *kj = tile_of(widened, k, page, dtype, count * head_dim);
        (prompt ? prompt_scores : step_scores)(score, queries, kj, rows, count, head_dim);
        for (int r = 0; r < rows; r++) {
            int sees = pos + (first + r) / group + 1 - j; // the causal mask
            visible[r] = sees < 0 ? 0 : sees > count ? count : sees;
            if (visible[r] > 0)
                softmax_step(score + r * KV_TILE, visible[r], max + r, sum + r, result + r * head_dim, head_dim);
        }
        const float *vj = tile_of(widened, v, page, dtype, count * head_dim);
        accumulate(result, score, vj, rows, visible, head_dim);
    }
    for (int r = 0; r < rows; r++) {
        int token = (first + r) / group, head = (first + r) % group;
        float *to = out + ((size_t)token * (size_t)n_heads + (size_t)head) * (size_t)head_dim;
        for (int i = 0; i < head_dim; i++) to[i] = result[r * head_dim + i] / sum[r];
    }
}

typedef struct {
    float *out;
    const float *q;
    const char *k, *v;
    DType dtype;
    const int *pages;
    size_t page_stride;
    int T, pos, n_heads, n_kv_heads, head_dim;
    bool prompt;
} Attention;

// Blocks of Q_ROWS rows of one K/V head, the longest first.
static void attention_part(void *whole, int64_t begin, int64_t end) {
    const Attention *a = whole;
    int group = a->n_heads / a->n_kv_heads, rows = a->T * group, blocks = (rows + Q_ROWS - 1) / Q_ROWS;
    for (int64_t i = begin; i < end; i++) {
        int task = blocks * a->n_kv_heads - 1 - (int)i, kv_head = task % a->n_kv_heads,
            first = task / a->n_kv_heads * Q_ROWS;
        size_t at = (size_t)kv_head * KV_PAGE * (size_t)a->head_dim, head = (size_t)(kv_head * group * a->head_dim);
        at *= (size_t)dtype_bytes[a->dtype];
        attention_task(a->out + head, a->q + head, a->k + at, a->v + at, a->dtype, a->pages, a->page_stride, first,
                       rows - first < Q_ROWS ? rows - first : Q_ROWS, a->pos, a->n_heads, group, a->head_dim,
                       a->prompt);
    }
}

static void attend(const Attention *a) {
    int64_t tasks = (int64_t)(a->T * (a->n_heads / a->n_kv_heads) + Q_ROWS - 1) / Q_ROWS * a->n_kv_heads;
    bool alone = (int64_t)a->T * (a->pos + a->T) * a->n_heads * a->head_dim <= ALONE;
    parallel_for(tasks, alone ? tasks : 1, attention_part, (void *)a);
}

void FOR_ISA(attention)(float *out, const float *q, const void *k, const void *v, DType dtype, const int *pages,
                        size_t page_stride, int T, int pos, int n_heads, int n_kv_heads, int head_dim) {
    attend(&(Attention){out, q, k, v, dtype, pages, page_stride, T, pos, n_heads, n_kv_heads, head_dim, true});
}

void FOR_ISA(attention_step)(float *out, const float *q, const void *k, const void *v, DType dtype, const int *pages,
                             size_t page_stride, int T, int pos, int n_heads, int n_kv_heads, int head_dim) {
    attend(&(Attention){out, q, k, v, dtype, pages, page_stride, T, pos, n_heads, n_kv_heads, head_dim, false});
}
