// A thread takes a few panels of W and goes through their columns block by block: it packs the panels' words of a
// block, which then serve all rows of x. x is packed once, for all threads.
#include "prompt_avx512.h"

#include <pthread.h>

#include "../threads.h"
#include "widen_avx512.h"

enum {
    TOGETHER = 2,      // panels that a thread packs before it multiplies: they stay in the L2 cache ...
    MANY = 16,         // ... where there are so many for each thread: with fewer one would wait long for another
    X_WORDS = 1 << 22, // of packed x: 16 MB; more rows of x come in parts
    BLOCK_UNIT = 128,  // words of a block are a multiple of that: whole lines of W, and whole groups of its columns
    BLOCK_GROUPS = (2 * PANEL_WORDS / 32 + 15) / 16 * 16, // groups of columns in a block, at most, in whole vectors
    ALONE = 1 << 18, // multiply-adds that one thread does sooner than it wakes the others
    X_PART = 8       // rows of x that a thread packs at a time
};

_Static_assert(PANEL_WORDS % BLOCK_UNIT == 0, "a block fits into a panel");

typedef struct {
    const Multiplier *m;
    const Matrix *w;
    const float *x;
    float *y;
    uint32_t *packed; // [T, and zeros up to a multiple of STRIP_ROWS][stride]
    size_t stride;
    int T, words; // words of a row
    int block;    // of them that are multiplied together
    int together; // panels that a thread takes
} Prompt;

// ---- x --------------------------------------------------------------------------------------------------------------

// n numbers, each a bf16, as pairs; zeros in the place of those up to 32 that are missing.
INLINE __m512i load_pairs(const float *x, int n) {
    const __mmask16 low = n >= LANES ? 0xFFFF : (__mmask16)((1u << n) - 1),
                    high = n >= 2 * LANES ? 0xFFFF
                           : n <= LANES   ? 0
                                          : (__mmask16)((1u << (n - LANES)) - 1);
    return pack_pairs(_mm512_maskz_loadu_ps(low, x), _mm512_maskz_loadu_ps(high, x + LANES));
}

static WITH_AVX512 void pack_x(void *prompt, int64_t begin, int64_t end) {
    const Prompt *p = prompt;
    const int cols = p->w->cols;
    for (int64_t t = begin; t < end; t++) {
        uint32_t *to = p->packed + (size_t)t * p->stride;
        const float *x = p->x + (size_t)t * (size_t)cols;
        for (int i = 0; i < (int)p->stride; i += LANES) {
            int col = p->m->pairs ? 2 * i : i, n = t < p->T && col < cols ? cols - col : 0;
            __mmask16 mask = n >= LANES ? 0xFFFF : (__mmask16)((1u << n) - 1);
            _mm512_storeu_si512(to + i, p->m->pairs ? load_pairs(x + (n ? col : 0), n)
                                                    : _mm512_maskz_loadu_epi32(mask, x + (n ? col : 0)));
        }
    }
}

// ---- W --------------------------------------------------------------------------------------------------------------

// out[i] has element i of each of the sixteen.
INLINE void transpose(__m512i *v) {
    __m512i a[LANES];
    for (int i = 0; i < LANES; i += 2) {
        a[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
    for (int i = 0; i < LANES; i += 4)
        for (int j = 0; j < 2; j++) {
            v[i + 2 * j] = _mm512_unpacklo_epi64(a[i + j], a[i + 2 + j]);
            v[i + 2 * j + 1] = _mm512_unpackhi_epi64(a[i + j], a[i + 2 + j]);
        }
    // v[i + k]: of rows i .. i+3, elements k, 4 + k, 8 + k and 12 + k
    for (int k = 0; k < 4; k++) {
        a[k] = _mm512_shuffle_i32x4(v[k], v[4 + k], 0x88);
        a[4 + k] = _mm512_shuffle_i32x4(v[k], v[4 + k], 0xDD);
        a[8 + k] = _mm512_shuffle_i32x4(v[8 + k], v[12 + k], 0x88);
        a[12 + k] = _mm512_shuffle_i32x4(v[8 + k], v[12 + k], 0xDD);
    }
    for (int k = 0; k < 4; k++) {
        v[k] = _mm512_shuffle_i32x4(a[k], a[8 + k], 0x88);
        v[8 + k] = _mm512_shuffle_i32x4(a[k], a[8 + k], 0xDD);
        v[4 + k] = _mm512_shuffle_i32x4(a[4 + k], a[12 + k], 0x88);
        v[12 + k] = _mm512_shuffle_i32x4(a[4 + k], a[12 + k], 0xDD);
    }
}

// Weight j of each lane as a float: unlike with widen, a lane is a row.
INLINE __m512 widen_lane(__m512i lane, int j, DType dtype) {
    if (dtype == DTYPE_F16) return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(lane, 16 * (unsigned)j)));
    if (dtype == DTYPE_F8_E4M3) {
        __m256i codes = _mm256_slli_epi16(_mm512_cvtepi32_epi16(_mm512_srli_epi32(lane, 8 * (unsigned)j)), 8);
        codes = _mm256_and_si256(_mm256_srai_epi16(codes, 1), _mm256_set1_epi16((short)0xBF80));
        return _mm512_mul_ps(_mm512_cvtph_ps(codes), _mm512_set1_ps(256));
    }
    return widen((Line){lane, _mm512_srli_epi32(lane, 16)}, j, dtype);
}

// To the nearest bf16, of equals the even one, in the high half of each lane.
INLINE __m512i round_bf16(__m512 v) {
    __m512i bits = _mm512_castps_si512(v), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7FFF));
}

// Sixteen rows of W from `first` on, of which `rows` are there: their scales of n columns from `col` on, scale[g][row].
INLINE void block_scales(__m512 scale[BLOCK_GROUPS], const Matrix *w, int first, int rows, int col, int n) {
    const int shift = group_shift(w), count = (n + w->group - 1) >> shift;
    const size_t groups = (size_t)(w->cols + w->group - 1) >> shift;
    for (int g = 0; g < count; g += LANES) {
        const __mmask16 mask = count - g >= LANES ? 0xFFFF : (__mmask16)((1u << (count - g)) - 1);
        __m512i v[LANES];
        for (int r = 0; r < LANES; r++) {
            size_t at = (size_t)(first + r) * groups + (size_t)((col >> shift) + g);
            v[r] = r < rows ? _mm512_castps_si512(load_scales(w->scale, w->scale_dtype, at, mask))
                            : _mm512_setzero_si512();
        }
        transpose(v);
        for (int i = 0; i < LANES; i++) scale[g + i] = _mm512_castsi512_ps(v[i]);
    }
}

// The words of a lane of a line: sixteen rows by 1, 2, 4 or 8 columns, to[.][PANEL_ROWS].
INLINE void pack_lane(uint32_t *to, __m512i lane, __m512 scale, DType dtype, bool scaled, bool pairs, bool round) {
    if (pairs && dtype == DTYPE_BF16) {
        _mm512_storeu_si512(to, lane);
        return;
    }
    for (int j = 0; j < weights_of_lane(dtype); j++) {
        __m512 v = widen_lane(lane, j, dtype);
        if (scaled) v = _mm512_mul_ps(v, scale);
        __m512i bits = _mm512_castps_si512(v);
        if (round) bits = round_bf16(v);
        if (pairs && j % 2 == 0) {
            _mm512_storeu_si512(to, _mm512_srli_epi32(bits, 16));
            continue;
        }
        if (pairs)
            bits = _mm512_or_si512(_mm512_and_si512(bits, _mm512_set1_epi32((int)0xFFFF0000)), _mm512_loadu_si512(to));
        else if (round)
            bits = _mm512_and_si512(bits, _mm512_set1_epi32((int)0xFFFF0000));
        _mm512_storeu_si512(to, bits);
        to += PANEL_ROWS;
    }
}

// n columns from `col` on of sixteen rows of W, of which `rows` are there.
INLINE void pack_half(uint32_t *panel, const Matrix *w, int first, int rows, int col, int n, bool pairs, bool round,
                      DType dtype, bool grouped) {
    const int unit = columns_of_line(dtype), of_lane = weights_of_lane(dtype), shift = group_shift(w);
    const size_t stride = row_bytes(w, dtype);
    const bool scaled = grouped || (matrix_is_quantised(w) && !pairs), rounded = grouped && (pairs || round);
    const char *at = (const char *)w->data + (size_t)first * stride + (size_t)col / (size_t)unit * LINE;
    __m512 scale[BLOCK_GROUPS];
    if (grouped)
        block_scales(scale, w, first, rows, col, n);
    else
        scale[0] = scaled ? load_scales(w->scale, w->scale_dtype, (size_t)first, (__mmask16)((1u << rows) - 1))
                          : _mm512_setzero_ps(); // not used
    for (int i = 0; i < n; i += unit, at += LINE) {
        const int bytes = n - i < unit ? ((n - i) * LINE + unit - 1) / unit : LINE;
        const __mmask64 mask = bytes == LINE ? ~(__mmask64)0 : ((__mmask64)1 << bytes) - 1;
        __m512i v[LANES];
        for (int r = 0; r < LANES; r++)
            v[r] = r < rows ? _mm512_maskz_loadu_epi8(mask, at + (size_t)r * stride) : _mm512_setzero_si512();
        transpose(v);
        for (int lane = 0; lane < LANES; lane++) {
            int column = lane * of_lane;
            uint32_t *to = panel + (size_t)((i + column) >> pairs) * PANEL_ROWS;
            pack_lane(to, v[lane], scale[grouped ? (i + column) >> shift : 0], dtype, scaled, pairs, rounded);
        }
    }
}

static WITH_AVX512 void pack_panel(uint32_t *panel, const Prompt *p, int first, int rows, int col, int n) {
    const Matrix *w = p->w;
    const bool pairs = p->m->pairs, round = p->m->round;
    for (int half = 0; half < PANEL_ROWS; half += LANES) {
        int there = rows - half < 0 ? 0 : rows - half > LANES ? LANES : rows - half;
#define PACK(D, G) \
    if (pairs) \
        pack_half(panel + half, w, first + half, there, col, n, true, true, D, G); \
    else \
        pack_half(panel + half, w, first + half, there, col, n, false, round, D, G)
        WITH_TYPE(w, PACK)
    }
}

// ---- products -------------------------------------------------------------------------------------------------------

// y[T][n] *= the scales of rows `first` on of W.
static WITH_AVX512 void scale_sums(const Prompt *p, int first, int n) {
    for (int r = 0; r < n; r += LANES) {
        __mmask16 mask = n - r >= LANES ? 0xFFFF : (__mmask16)((1u << (n - r)) - 1);
        __m512 scale = load_scales(p->w->scale, p->w->scale_dtype, (size_t)(first + r), mask);
        float *y = p->y + first + r;
        for (int t = 0; t < p->T; t++, y += p->w->rows)
            _mm512_mask_storeu_ps(y, mask, _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, y), scale));
    }
}

// Rows [first, first + n) of W.
static void multiply_panels(const Prompt *p, int first, int n) {
    uint32_t panels[TOGETHER][PANEL_ROWS * PANEL_WORDS] __attribute__((aligned(64)));
    const Matrix *w = p->w;
    const int columns_of_word = p->m->pairs ? 2 : 1;
    Strip s = {.x_stride = p->stride, .y_stride = (size_t)w->rows};
    for (int word = 0; word < p->words; word += p->block) {
        int col = word * columns_of_word, left = w->cols - col, most = p->block * columns_of_word;
        s.n = p->words - word < p->block ? p->words - word : p->block;
        s.add = word > 0;
        for (int r = 0; r < n; r += PANEL_ROWS) {
            uint32_t *panel = panels[r / PANEL_ROWS];
            pack_panel(panel, p, first + r, n - r < PANEL_ROWS ? n - r : PANEL_ROWS, col, left < most ? left : most);
            for (int k = s.n; k % LANES != 0; k++)
                memset(panel + (size_t)k * PANEL_ROWS, 0, PANEL_ROWS * sizeof *panel);
        }
        for (int t = 0; t < p->T; t += p->m->strip)
            for (int r = 0; r < n; r += PANEL_ROWS) {
                s.panel = panels[r / PANEL_ROWS];
                s.x = p->packed + (size_t)t * p->stride + word;
                s.y = p->y + (size_t)t * s.y_stride + first + r;
                s.rows = n - r < PANEL_ROWS ? n - r : PANEL_ROWS;
                s.C = p->T - t < p->m->strip ? p->T - t : p->m->strip;
                p->m->multiply(&s);
            }
    }
    if (p->m->pairs && w->group == WHOLE_ROW) scale_sums(p, first, n);
}

static void multiply_part(void *prompt, int64_t begin, int64_t end) {
    const Prompt *p = prompt;
    const int most = p->together * PANEL_ROWS;
    for (int64_t part = begin; part < end; part++) {
        int first = (int)part * most;
        multiply_panels(p, first, p->w->rows - first < most ? p->w->rows - first : most);
    }
}

// All rows of x, for which there is room.
static void multiply_prompt(Prompt *p) {
    const int panels = (p->w->rows + PANEL_ROWS - 1) / PANEL_ROWS,
              rows = (p->T + STRIP_ROWS - 1) / STRIP_ROWS * STRIP_ROWS;
    const bool alone = (int64_t)p->T * p->w->rows * p->w->cols <= ALONE;
    p->together = panels / threads_count() < MANY ? 1 : TOGETHER;
    const int parts = (panels + p->together - 1) / p->together;
    parallel_for(rows, alone ? rows : X_PART, pack_x, p);
    parallel_for(parts, alone ? parts : 1, multiply_part, p);
}

void prompt_product(float *y, const float *x, const Matrix *w, int T, const Multiplier *m) {
    static uint32_t packed[X_WORDS] __attribute__((aligned(64)));
    static pthread_mutex_t taken = PTHREAD_MUTEX_INITIALIZER;
    Prompt p = {.m = m, .w = w, .packed = packed, .words = m->pairs ? (w->cols + 1) / 2 : w->cols};
    // Blocks are of nearly the same length.
    const int blocks = (p.words + PANEL_WORDS - 1) / PANEL_WORDS;
    p.block = ((p.words + blocks - 1) / blocks + BLOCK_UNIT - 1) / BLOCK_UNIT * BLOCK_UNIT;
    // Rows of x are no multiple of 4 KB apart, or they would want the same places of the L1 cache.
    p.stride = (size_t)(p.words / LANES + 1) * LANES;
    if (p.stride % 1024 == 0) p.stride += LANES;
    int most = (int)(X_WORDS / p.stride) / STRIP_ROWS * STRIP_ROWS;
    pthread_mutex_lock(&taken);
    for (int t = 0; t < T; t += most) {
        p.T = T - t < most ? T - t : most;
        p.x = x + (size_t)t * (size_t)w->cols;
        p.y = y + (size_t)t * (size_t)w->rows;
        multiply_prompt(&p);
    }
    pthread_mutex_unlock(&taken);
}
