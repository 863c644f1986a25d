// Products of steps with AVX-512: of one row or a few, for which W is read once, at the speed of memory. For files of
// functions with the attribute WITH_STEP, which say before they include this how vectors of sixteen words of W and of x
// are made and multiplied (D: the dtype of W, a constant):
//   COLUMNS_OF_WORD             columns that a word of x has: 1, a float, or 2, a pair of bf16
//   arrange_line(out, x, D)     the columns of a line, as words in the order of WIDEN
//   StepLine, LOAD_LINE(at, D)  a line of W, ...
//   WIDEN(line, j, D)           ... and vector j of it, exact
//   MULTIPLY(w, x)              the products of two vectors, as floats, summed over each word, ...
//   MULTIPLY_ADD(sum, w, x)     ... and added to such sums
//   CODE_UNIT(D)                what a row's sum is multiplied by, so that it is of what the codes stand for
//   WITH_STEP_TYPE(w, CALL)     WITH_TYPE of the types that are multiplied so
#include "../threads.h"
#include "products_avx512.h"
#include "widen_avx512.h"

#define STEP_INLINE static inline __attribute__((always_inline)) WITH_STEP

enum {
    X_TILE = 4,       // rows of x that a line of W is multiplied by at a time
    X_ROWS = 8,       // rows of x that are multiplied together ...
    X_NEAR = 1 << 14, // ... so many numbers of them: 64 KB, of pairs 32
    W_ROWS = 32,      // rows of W that a thread takes at a time
    AHEAD = 12288,    // bytes of W, at least, that are fetched before they are multiplied, and to the L2 cache: int8
                      // was 1.7 times as fast so as with fetches to L1, int4 1.2 times as with 4096
    PART = 1 << 16,   // multiply-adds that are worth a thread ...
    ALONE = 1 << 18   // ... and those that one does sooner than it wakes the others
};

// ---- x --------------------------------------------------------------------------------------------------------------

STEP_INLINE int words_of_line(DType dtype) { // of x
    return columns_of_line(dtype) / COLUMNS_OF_WORD;
}

STEP_INLINE size_t words_of_row(int cols, DType dtype) { // with zeros up to a whole line
    return (size_t)((cols + columns_of_line(dtype) - 1) / columns_of_line(dtype)) * (size_t)words_of_line(dtype);
}

// T rows of n columns to out: of X_TILE rows, or those left, line by line [lines][rows][words_of_line], which then have
// one address and constants beside it.
STEP_INLINE void arrange(uint32_t *out, const float *x, int T, int n, DType dtype) {
    const int unit = columns_of_line(dtype);
    for (int first = 0; first < T; first += X_TILE)
        for (int i = 0; i < n; i += unit)
            for (int t = first; t < T && t < first + X_TILE; t++, out += words_of_line(dtype)) {
                const float *from = x + (size_t)t * (size_t)n + i;
                float padded[MAX_UNIT] = {0};
                if (n - i < unit) from = memcpy(padded, from, (size_t)(n - i) * sizeof *x);
                arrange_line(out, from, dtype);
            }
}

// ---- products -------------------------------------------------------------------------------------------------------

typedef struct {
    float *y;
    const uint32_t *x; // arranged
    const Matrix *w;
    int T;
    int ahead; // rows of W that are fetched before they are multiplied, a multiple of 4
} Product;

// What a thread works on: rows of W from `first` on, by all rows of x, X_NEAR numbers of them at a time.
typedef struct {
    const Product *p;
    int first, rows;
    int shift;             // of a column, to its group ...
    __m512i group_of_lane; // ... beyond that of the line's first
    __m512i spread;        // the bytes of the scale of each lane's group, if there are four in BF16
    __m512 sums[W_ROWS][X_ROWS];
    float scales[4][X_NEAR / 32 + LANES];
} Block;

// Whether scales are used from where they are: they are read four at a time, so that as many must follow.
STEP_INLINE bool scales_at_hand(const Block *b, int row, int R) {
    const Matrix *w = b->p->w;
    int64_t groups = (w->cols + w->group - 1) >> b->shift;
    return w->scale_dtype == DTYPE_BF16 && (w->rows - (b->first + row + R)) * groups >= 4;
}

// Those of n columns from `col` on of rows `row` to row + R of the block.
STEP_INLINE void load_block_scales(Block *b, int row, int col, int n, int R) {
    const Matrix *w = b->p->w;
    int groups = (w->cols + w->group - 1) >> b->shift, count = (n + w->group - 1) >> b->shift;
    for (int r = 0; r < R; r++) {
        size_t i = (size_t)(b->first + row + r) * (size_t)groups + (size_t)(col >> b->shift);
        if (w->scale_dtype == DTYPE_BF16)
            widen_scales(b->scales[r], w->scale, DTYPE_BF16, i, count);
        else
            widen_scales(b->scales[r], w->scale, w->scale_dtype, i, count);
    }
}

// Vector j of R lines of W by C rows of x: sum += their products, or = where it is the first.
STEP_INLINE void multiply_vector(__m512 sum[4][X_TILE], const StepLine line[4], const uint32_t *x, int j, bool first,
                                 DType dtype, int R, int C) {
    __m512i w[4];
    for (int r = 0; r < R; r++) w[r] = WIDEN(line[r], j, dtype);
    for (int c = 0; c < C; c++) {
        __m512i xc = _mm512_load_si512(x + c * words_of_line(dtype) + j * LANES);
        for (int r = 0; r < R; r++) sum[r][c] = first ? MULTIPLY(w[r], xc) : MULTIPLY_ADD(sum[r][c], w[r], xc);
    }
}

// Lines of R rows of W by C rows of x, added to sum; where scales are of groups of columns the line has a sum of its
// own, which is multiplied by scale[r]: of each lane. at: the first row's line, `stride` bytes before the next.
STEP_INLINE void multiply_line(__m512 sum[4][X_TILE], const char *at, size_t stride, const uint32_t *x,
                               const __m512 *scale, DType dtype, bool grouped, int R, int C) {
    const int n = weights_of_lane(dtype) / COLUMNS_OF_WORD;
    StepLine line[4];
    __m512 own[4][X_TILE], (*to)[X_TILE] = grouped ? own : sum;
    for (int r = 0; r < R; r++) line[r] = LOAD_LINE(at + (size_t)r * stride, dtype);
    multiply_vector(to, line, x, 0, grouped, dtype, R, C);
    if (n > 1) multiply_vector(to, line, x, 1, false, dtype, R, C);
    if (n > 2) multiply_vector(to, line, x, 2, false, dtype, R, C);
    if (n > 2) multiply_vector(to, line, x, 3, false, dtype, R, C);
    if (n > 4) multiply_vector(to, line, x, 4, false, dtype, R, C);
    if (n > 4) multiply_vector(to, line, x, 5, false, dtype, R, C);
    if (n > 4) multiply_vector(to, line, x, 6, false, dtype, R, C);
    if (n > 4) multiply_vector(to, line, x, 7, false, dtype, R, C);
    for (int r = 0; r < R && grouped; r++)
        for (int c = 0; c < C; c++) sum[r][c] = _mm512_fmadd_ps(own[r][c], scale[r], sum[r][c]);
}

// Where the scales of a line's groups come from: nowhere, b->scales, or W.
typedef enum { NONE, LOADED, AT_HAND } Scales;

// The scale of each lane of a line of row r of those whose scales were loaded; group: the first of the line's.
STEP_INLINE __m512 loaded_scale(const Block *b, int r, size_t group) {
    return _mm512_permutexvar_ps(b->group_of_lane, _mm512_loadu_ps(&b->scales[r][group]));
}

// The same from where the scales are.
STEP_INLINE __m512 scale_at_hand(__m512i spread, const uint16_t *first) {
    long long four;
    memcpy(&four, first, sizeof four);
    return _mm512_castsi512_ps(_mm512_shuffle_epi8(_mm512_set1_epi64(four), spread));
}

// Rows of W, from a line on, by rows of x.
typedef struct {
    const char *at; // the first row's line ...
    size_t stride;  // ... so many bytes before the next row's
    size_t ahead;   // bytes to the line that is fetched meanwhile
    const uint32_t *x;
    const uint16_t *scales; // of the first row ...
    size_t groups;          // ... so many before the next row's
} Lines;

// n lines, of which the first has column `col` of those whose scales were loaded, or are at hand.
STEP_INLINE void multiply_lines(__m512 sum[4][X_TILE], const Block *b, Lines l, int col, int n, DType dtype,
                                Scales from, int R, int C) {
    const int unit = columns_of_line(dtype), shift = b->shift;
    const __m512i spread = b->spread;
    __m512 scale[4];
    for (const int end = col + n * unit; col < end; col += unit) {
        size_t group = (size_t)(col >> shift);
        for (int r = 0; r < R; r++) {
            _mm_prefetch(l.at + l.ahead + (size_t)r * l.stride, _MM_HINT_T1);
            if (from == LOADED) scale[r] = loaded_scale(b, r, group);
            if (from == AT_HAND) scale[r] = scale_at_hand(spread, l.scales + group + (size_t)r * l.groups);
        }
        multiply_line(sum, l.at, l.stride, l.x, scale, dtype, from != NONE, R, C);
        l.at += LINE;
        l.x += C * words_of_line(dtype);
    }
}

// Rows `row` to row + R of the block by rows t to t + C of x, over n columns from `col` on.
STEP_INLINE void multiply(Block *b, int row, int t, int col, int n, DType dtype, Scales from, int R, int C) {
    const Matrix *w = b->p->w;
    const int unit = columns_of_line(dtype), whole = n / unit, left = n % unit;
    const size_t first = (size_t)(b->first + row), stride = row_bytes(w, dtype), line = (size_t)(col / unit),
                 x_line = (size_t)(C * words_of_line(dtype)),
                 groups = from == AT_HAND ? (size_t)(w->cols + w->group - 1) >> b->shift : 0;
    Lines l = {.at = (const char *)w->data + first * stride + line * LINE,
               .stride = stride,
               .ahead = t == 0 ? (size_t)b->p->ahead * stride : 0,
               .x = b->p->x + (size_t)t * words_of_row(w->cols, dtype) + line * x_line,
               .scales = from == AT_HAND ? (const uint16_t *)w->scale + first * groups + (col >> b->shift) : NULL,
               .groups = groups};
    __m512 sum[4][X_TILE];
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) sum[r][c] = col == 0 ? _mm512_setzero_ps() : b->sums[row + r][t + c];
    if (from == AT_HAND && t == 0 && col == 0)
        for (const char *p = (const char *)l.scales, *end = p + 2 * R * groups; p < end; p += LINE)
            _mm_prefetch(p + 2 * (size_t)b->p->ahead * groups, _MM_HINT_T1);
    multiply_lines(sum, b, l, 0, whole, dtype, from, R, C);
    if (left) { // x is 0 beyond
        char tail[4 * LINE] = {0};
        for (int r = 0; r < R; r++)
            memcpy(tail + r * LINE, l.at + (size_t)whole * LINE + (size_t)r * stride,
                   (size_t)left * LINE / (size_t)unit);
        l.at = tail;
        l.stride = LINE;
        l.ahead = 0;
        l.x += (size_t)whole * x_line;
        multiply_lines(sum, b, l, whole * unit, 1, dtype, from, R, C);
    }
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) b->sums[row + r][t + c] = sum[r][c];
}

STEP_INLINE void multiply_x(Block *b, int row, int col, int n, DType dtype, Scales from, int R) {
    int t = 0, T = b->p->T;
    _Static_assert(X_TILE == 4, "of fewer rows there are these");
    for (; t + X_TILE <= T; t += X_TILE) multiply(b, row, t, col, n, dtype, from, R, X_TILE);
    if (T - t == 3) multiply(b, row, t, col, n, dtype, from, R, 3);
    if (T - t == 2) multiply(b, row, t, col, n, dtype, from, R, 2);
    if (T - t == 1) multiply(b, row, t, col, n, dtype, from, R, 1);
}

STEP_INLINE void multiply_rows(Block *b, int row, int col, int n, DType dtype, bool grouped, int R) {
    if (!grouped) {
        multiply_x(b, row, col, n, dtype, NONE, R);
    } else if (scales_at_hand(b, row, R)) {
        multiply_x(b, row, col, n, dtype, AT_HAND, R);
    } else {
        load_block_scales(b, row, col, n, R);
        multiply_x(b, row, col, n, dtype, LOADED, R);
    }
}

STEP_INLINE float sum_lanes(__m512 v) { // a fixed tree
    __m256 a = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    b = _mm_add_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
}

STEP_INLINE void multiply_block(Block *b, DType dtype, bool grouped) {
    const Matrix *w = b->p->w;
    const int cols = w->cols, T = b->p->T, near = X_NEAR / T / MAX_UNIT * MAX_UNIT;
    for (int col = 0; col < cols; col += near) {
        int n = cols - col < near ? cols - col : near, row = 0;
        for (; (T == 1 || !grouped) && row + 4 <= b->rows; row += 4) multiply_rows(b, row, col, n, dtype, grouped, 4);
        for (; row + 2 <= b->rows; row += 2) multiply_rows(b, row, col, n, dtype, grouped, 2);
        if (row < b->rows) multiply_rows(b, row, col, n, dtype, grouped, 1);
    }
    for (int r = 0; r < b->rows; r++)
        for (int t = 0; t < T; t++) {
            float sum = sum_lanes(b->sums[r][t]) * CODE_UNIT(dtype);
            if (w->group == WHOLE_ROW)
                sum *= _mm512_cvtss_f32(load_scales(w->scale, w->scale_dtype, (size_t)(b->first + r), 1));
            b->p->y[(size_t)t * (size_t)w->rows + (size_t)(b->first + r)] = sum;
        }
}

static WITH_STEP void multiply_part(void *product, int64_t begin, int64_t end) {
    Block b;
    b.p = product;
    b.shift = group_shift(b.p->w);
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    b.group_of_lane = _mm512_srlv_epi32(_mm512_mullo_epi32(lanes, _mm512_set1_epi32(b.p->w->dtype == DTYPE_U8 ? 8 : 4)),
                                        _mm512_set1_epi32(b.shift));
    b.spread = _mm512_add_epi32(_mm512_mullo_epi32(b.group_of_lane, _mm512_set1_epi32(0x02020000)),
                                _mm512_set1_epi32(0x01008080));
    for (int64_t block = begin; block < end; block++) {
        b.first = (int)block * W_ROWS;
        b.rows = b.p->w->rows - b.first < W_ROWS ? b.p->w->rows - b.first : W_ROWS;
#define BLOCK(D, G) multiply_block(&b, D, G)
        WITH_STEP_TYPE(b.p->w, BLOCK)
    }
}

static WITH_STEP void arrange_rows(uint32_t *out, const float *x, const Matrix *w, int T) {
#define ARRANGE(D, G) arrange(out, x, T, w->cols, D)
    WITH_STEP_TYPE(w, ARRANGE)
}

// matmul_step, of matrices with at most STEP_COLUMNS columns.
static void multiply_step(float *y, const float *x, const Matrix *w, int T) {
    uint32_t arranged[(STEP_COLUMNS + MAX_UNIT) / COLUMNS_OF_WORD] __attribute__((aligned(64)));
    int most = STEP_COLUMNS / (w->cols + MAX_UNIT);
    most = most > X_ROWS ? X_ROWS : most < 1 ? 1 : most;
    int64_t blocks = (w->rows + W_ROWS - 1) / W_ROWS, row = (int64_t)matrix_row_bytes(w);
    int ahead = (int)((AHEAD + 4 * row - 1) / (4 * row)) * 4;
    for (int t = 0; t < T; t += most) {
        int n = T - t < most ? T - t : most;
        int64_t cost = (int64_t)n * W_ROWS * w->cols;
        arrange_rows(arranged, x + (size_t)t * (size_t)w->cols, w, n);
        Product p = {y + (size_t)t * (size_t)w->rows, arranged, w, n, ahead};
        parallel_for(blocks, blocks * cost <= ALONE ? blocks : (PART + cost - 1) / cost, multiply_part, &p);
    }
}
