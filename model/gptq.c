#include "gptq.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "avx2.h"
#include "threads.h"

enum {
    TILE = 64,   // rows and columns of H that a thread computes at a time
    DEPTH = 256, // rows of x, or columns that are rounded, between two looks at the sums
    BLOCK = 128, // columns that are factored, or rounded, together: a multiple of every group
    SUMS = 4,    // rows of a tile that are in registers: SUMS × 2 × LANES sums
    R = GPTQ_ROWS
};

typedef float AnyFloat8 __attribute__((vector_size(32), aligned(4), may_alias)); // in memory, wherever that begins

// ---- products -------------------------------------------------------------------------------------------------------

// c [rows][columns] += aᵀ b for a [n][rows] and b [n][columns], each with rows of its own width in memory. rows: a
// multiple of SUMS; columns: of 2 × LANES.
INLINE void multiply_add(float *c, size_t c_width, const float *a, size_t a_width, const float *b, size_t b_width,
                         int rows, int columns, int n) {
    for (int i = 0; i < rows; i += SUMS)
        for (int j = 0; j < columns; j += 2 * LANES) {
            Float8 low[SUMS], high[SUMS];
            for (int k = 0; k < SUMS; k++) {
                const AnyFloat8 *from = (const AnyFloat8 *)(c + (size_t)(i + k) * c_width + j);
                low[k] = from[0], high[k] = from[1];
            }
            for (int t = 0; t < n; t++) {
                const AnyFloat8 *by = (const AnyFloat8 *)(b + (size_t)t * b_width + j);
                const float *factors = a + (size_t)t * a_width + i;
                for (int k = 0; k < SUMS; k++) {
                    low[k] += factors[k] * by[0];
                    high[k] += factors[k] * by[1];
                }
            }
            for (int k = 0; k < SUMS; k++) {
                AnyFloat8 *to = (AnyFloat8 *)(c + (size_t)(i + k) * c_width + j);
                to[0] = low[k], to[1] = high[k];
            }
        }
}

static WITH_AVX2 void multiply_add_avx2(float *c, size_t c_width, const float *a, size_t a_width, const float *b,
                                        size_t b_width, int rows, int columns, int n) {
    multiply_add(c, c_width, a, a_width, b, b_width, rows, columns, n);
}

static void product(float *c, size_t c_width, const float *a, size_t a_width, const float *b, size_t b_width, int rows,
                    int columns, int n) {
    if (HAS_AVX2)
        multiply_add_avx2(c, c_width, a, a_width, b, b_width, rows, columns, n);
    else
        multiply_add(c, c_width, a, a_width, b, b_width, rows, columns, n);
}

// Columns [first, first + TILE) of n rows of x, side by side, times a factor; zeros beyond the last.
static void pack(float *to, const float *x, size_t width, int cols, int first, int n, float factor) {
    int have = cols - first < TILE ? cols - first : TILE;
    for (int t = 0; t < n; t++, to += TILE, x += width) {
        for (int i = 0; i < have; i++) to[i] = factor * x[first + i];
        for (int i = have; i < TILE; i++) to[i] = 0;
    }
}

// h += factor · xᵀx, in tiles.
typedef struct {
    float *h; // [*][h_width], of which [cols][cols]
    size_t h_width;
    const float *x; // [n][x_width], of which cols
    size_t x_width;
    int cols, n, tiles;
    float factor;
} Gram;

static void add_tiles(void *gram, int64_t begin, int64_t end) {
    const Gram *g = gram;
    float a[DEPTH * TILE], b[DEPTH * TILE], sums[TILE * TILE];
    for (int64_t at = begin; at < end; at++) {
        const int i = (int)(at / g->tiles) * TILE, j = (int)(at % g->tiles) * TILE;
        if (j < i) continue; // of the lower triangle
        const int rows = g->cols - i < TILE ? g->cols - i : TILE, columns = g->cols - j < TILE ? g->cols - j : TILE;
        memset(sums, 0, sizeof sums);
        for (int t = 0; t < g->n; t += DEPTH) {
            const int n = g->n - t < DEPTH ? g->n - t : DEPTH;
            pack(a, g->x + (size_t)t * g->x_width, g->x_width, g->cols, i, n, g->factor);
            pack(b, g->x + (size_t)t * g->x_width, g->x_width, g->cols, j, n, 1);
            product(sums, TILE, a, TILE, b, TILE, TILE, TILE, n);
        }
        for (int r = 0; r < rows; r++) {
            float *to = g->h + (size_t)(i + r) * g->h_width + j;
            for (int c = 0; c < columns; c++) to[c] += sums[r * TILE + c];
        }
    }
}

static void gram_run(Gram g) {
    g.tiles = (g.cols + TILE - 1) / TILE;
    parallel_for((int64_t)g.tiles * g.tiles, 1, add_tiles, &g);
}

void gram_add(float *h, int cols, const float *x, int n) {
    gram_run((Gram){h, (size_t)cols, x, (size_t)cols, cols, n, 0, 1});
}

// ---- H = R Rᵀ, with R upper triangular ------------------------------------------------------------------------------

typedef struct {
    float *h; // [cols][cols]
    size_t cols;
    int begin, n;         // the block of columns at hand
    float *panel;         // [n][begin]: the block's columns of R above it, transposed
    const float *inverse; // [n]: 1 / R_jj
} Panel;

// R within a block, in place. In exact arithmetic no pivot is less than the damping.
static void factor_block(float *h, size_t cols, int begin, int n, float damping, float *inverse) {
    for (int j = n - 1; j >= 0; j--) {
        float *column = h + (size_t)begin * cols + begin + j; // of it row i is at i · cols
        const float *row = h + (size_t)(begin + j) * cols + begin;
        float pivot = row[j];
        for (int k = j + 1; k < n; k++) pivot -= row[k] * row[k];
        pivot = sqrtf(pivot > damping / 2 ? pivot : damping / 2);
        inverse[j] = 1 / pivot;
        for (int i = 0; i < j; i++) {
            const float *above = h + (size_t)(begin + i) * cols + begin;
            float sum = above[j];
            for (int k = j + 1; k < n; k++) sum -= above[k] * row[k];
            column[(size_t)i * cols] = sum / pivot;
        }
        column[(size_t)j * cols] = pivot;
    }
}

// The block's columns of R in rows above it.
static void solve_rows(void *panel, int64_t begin, int64_t end) {
    const Panel *p = panel;
    for (int64_t i = begin; i < end; i++) {
        float *row = p->h + (size_t)i * p->cols + p->begin;
        for (int j = p->n - 1; j >= 0; j--) {
            const float *of = p->h + (size_t)(p->begin + j) * p->cols + p->begin;
            float sum = row[j];
            for (int k = j + 1; k < p->n; k++) sum -= row[k] * of[k];
            row[j] = sum * p->inverse[j];
        }
        for (int j = 0; j < p->n; j++) p->panel[(size_t)j * (size_t)p->begin + (size_t)i] = row[j];
    }
}

typedef struct {
    float *r; // [cols][cols]
    size_t cols;
    const float *diagonal; // [cols], its own
} Division;

// R becomes U above the diagonal.
static void divide_rows(void *division, int64_t begin, int64_t end) {
    const Division *d = division;
    for (size_t i = (size_t)begin; i < (size_t)end; i++)
        for (size_t j = i + 1; j < d->cols; j++) d->r[i * d->cols + j] /= d->diagonal[j];
}

bool feedback_init(Feedback *f, float *h, int cols, const volatile sig_atomic_t *interrupted, Error *err) {
    const size_t n = (size_t)cols;
    double mean = 0;
    for (size_t i = 0; i < n; i++) mean += (double)h[i * n + i] / cols;
    *f = (Feedback){.cols = cols, .u = h, .importance = calloc(n + LANES, sizeof *f->importance)};
    float *panel = malloc((size_t)BLOCK * n * sizeof *panel), inverse[BLOCK];
    if (!f->importance || !panel) {
        free(panel);
        return fail(err, "out of memory: factors of %d columns", cols);
    }
    bool ok = isfinite(mean) || fail(err, "calibration: the activations are not finite");
    const float damping = mean > 0 ? (float)(0.01 * mean) : 1;
    for (size_t i = 0; ok && i < n; i++) {
        h[i * n + i] += damping;
        f->importance[i] = mean > 0 ? (float)((double)h[i * n + i] / mean) : 1;
    }
    for (int begin = (cols - 1) / BLOCK * BLOCK; ok && begin >= 0; begin -= BLOCK) {
        Panel p = {h, n, begin, cols - begin < BLOCK ? cols - begin : BLOCK, panel, inverse};
        if (interrupted && *interrupted) ok = fail_interrupted(err);
        factor_block(h, n, begin, p.n, damping, inverse);
        parallel_for(begin, 16, solve_rows, &p);
        gram_run((Gram){h, n, panel, (size_t)begin, begin, p.n, 0, -1});
    }
    for (size_t i = 0; ok && i < n; i++) panel[i] = h[i * n + i];
    if (ok) parallel_for(cols, 16, divide_rows, &(Division){h, n, panel});
    free(panel);
    return ok;
}

// ---- rounding -------------------------------------------------------------------------------------------------------

// Memory for R rows, column by column; rows that are not there are zeros.
typedef struct {
    float *w;     // [cols][R]: the weights; of columns that are rounded their errors, w - ŵ
    float *v;     // [BLOCK][R]: a block's weights with the errors of columns before them made up for
    float *ahead; // [BLOCK][R]: those of a group with errors that are still to come made up for as well
    float *u;     // [DEPTH][BLOCK]: a part of U
    float *x;     // [cols + LANES]: a row, or the part of it that shares a scale
    float *other; // [cols + LANES]: what the search of a scale needs
    void *codes;  // [cols + LANES]: which nobody needs
    float scale[R];
} Rounding;

size_t feedback_scratch(int cols) {
    return (size_t)cols * R + 2 * BLOCK * R + DEPTH * BLOCK + 3 * ((size_t)cols + LANES);
}

static void rounding_init(Rounding *m, float *scratch, int cols) {
    const size_t row = (size_t)cols + LANES;
    m->w = scratch;
    m->v = m->w + (size_t)cols * R;
    m->ahead = m->v + BLOCK * R;
    m->u = m->ahead + BLOCK * R;
    m->x = m->u + DEPTH * BLOCK;
    m->other = m->x + row;
    m->codes = m->other + row;
    memset(m->scale, 0, sizeof m->scale);
}

// The scales of n columns from `first` on, which are v [n][R], of so many rows.
static void find_scales(Rounding *m, const Feedback *f, QuantType type, const float *v, int first, int n, int rows,
                        char *scales, size_t scale_bytes) {
    for (int r = 0; r < rows; r++, scales += scale_bytes) {
        for (int i = 0; i < n; i++) m->x[i] = v[(size_t)i * R + (size_t)r];
        quant_encode_row(type, m->x, n, f->importance + first, m->codes, scales, m->other);
        m->scale[r] = quant_number(scales, quant_scale_dtype(type), 0);
    }
}

// v [n][R] of columns from `first` on: the weights, and what makes up for the errors of all columns before `first`.
static void begin_block(Rounding *m, const Feedback *f, int first, int n) {
    const size_t cols = (size_t)f->cols;
    const int width = (n + SUMS - 1) / SUMS * SUMS;
    memcpy(m->v, m->w + (size_t)first * R, (size_t)n * R * sizeof *m->v);
    for (int i = 0; i < first; i += DEPTH) {
        const int depth = first - i < DEPTH ? first - i : DEPTH;
        for (int t = 0; t < depth; t++) {
            memcpy(m->u + t * BLOCK, f->u + (size_t)(i + t) * cols + first, (size_t)n * sizeof *m->u);
            for (int k = n; k < width; k++) m->u[t * BLOCK + k] = 0;
        }
        product(m->v, R, m->u, BLOCK, m->w + (size_t)i * R, R, width, R, depth);
    }
}

// to [n][R] += by [R] · u [n]
static void add_products(float *to, const float *by, const float *u, int n) {
    for (int k = 0; k < n; k++, to += R)
        for (int r = 0; r < R; r++) to[r] += by[r] * u[k];
}

// What the n columns of a group would be if none of them were rounded: ahead [n][R]. `first` is the first one's place
// in the matrix, `at` in its block. Each column that makes up for errors has one itself, for which the next make up.
static void look_ahead(Rounding *m, const Feedback *f, int first, int at, int n) {
    memcpy(m->ahead, m->v + (size_t)at * R, (size_t)n * R * sizeof *m->ahead);
    for (int i = 0; i < n; i++) {
        const float *w = m->w + (size_t)(first + i) * R, *v = m->ahead + (size_t)i * R;
        float error[R];
        for (int r = 0; r < R; r++) error[r] = w[r] - v[r];
        add_products(m->ahead + (size_t)(i + 1) * R, error, f->u + (size_t)(first + i) * ((size_t)f->cols + 1) + 1,
                     n - i - 1);
    }
}

// Rounds one column, and lets the others of its block, up to column `end` of the block, make up for its errors.
static void round_column(Rounding *m, const Feedback *f, DType dtype, int column, int at, int end) {
    float *v = m->v + (size_t)at * R, *w = m->w + (size_t)column * R;
    quant_round(dtype, v, m->scale, R);
    for (int r = 0; r < R; r++) w[r] -= v[r] * m->scale[r];
    add_products(v + R, w, f->u + (size_t)column * ((size_t)f->cols + 1) + 1, end - at - 1);
}

void feedback_round(const Feedback *f, QuantType type, const float *x, int n, void *codes, void *scales, double *errors,
                    float *scratch) {
    const int cols = f->cols, width = type.group ? type.group : cols, groups = quant_groups(type.group, cols);
    const size_t scale_bytes = (size_t)dtype_bytes[quant_scale_dtype(type)];
    const size_t code_bytes = (size_t)cols / (type.dtype == DTYPE_U8 ? 2 : 1);
    Rounding m;
    rounding_init(&m, scratch, cols);
    for (int i = 0; i < cols; i++)
        for (int r = 0; r < R; r++)
            m.w[(size_t)i * R + (size_t)r] = r < n ? x[(size_t)r * (size_t)cols + (size_t)i] : 0;
    if (!type.group) find_scales(&m, f, type, m.w, 0, cols, n, scales, scale_bytes);
    for (int first = 0; first < cols; first += BLOCK) {
        const int end = cols - first < BLOCK ? cols - first : BLOCK;
        begin_block(&m, f, first, end);
        for (int at = 0; at < end; at++) {
            if (type.group && at % width == 0) {
                const int group = end - at < width ? end - at : width;
                look_ahead(&m, f, first + at, at, group);
                find_scales(&m, f, type, m.ahead, first + at, group, n,
                            (char *)scales + (size_t)((first + at) / width) * scale_bytes,
                            (size_t)groups * scale_bytes);
            }
            round_column(&m, f, type.dtype, first + at, at, end);
        }
        for (int r = 0; r < n; r++) {
            for (int at = 0; at < end; at++) m.x[at] = m.v[(size_t)at * R + (size_t)r];
            quant_pack(type.dtype, m.x, end,
                       (char *)codes + (size_t)r * code_bytes + (size_t)(type.dtype == DTYPE_U8 ? first / 2 : first));
        }
    }
    for (int r = 0; r < n; r++) {
        errors[r] = 0;
        for (int i = 0; i < cols; i++) {
            const double e = (double)m.w[(size_t)i * R + (size_t)r];
            errors[r] += e * e;
        }
    }
}
