#include "step_avx512.h"

#include <immintrin.h>
#include <string.h>

#include "../threads.h"

enum {
    LANES = 16,
    CHUNK = 32,     // columns whose codes are widened together: any group has a whole number of chunks, but its last
    W_ROWS = 32,    // rows of W that a thread takes at a time ...
    X_ROWS = 8,     // ... by so many rows of x ...
    COLUMNS = 4096, // ... this many columns of them
    AHEAD = 4,      // rows of W that are fetched before they are multiplied: 1.4 times as fast
    PART = 1 << 16, // multiply-adds that are worth a thread ...
    ALONE = 1 << 18 // ... and those that one does sooner than it wakes the others
};

#define WITH_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#define INLINE static inline __attribute__((always_inline)) WITH_AVX512

typedef struct {
    __m512 first, second;
} Pair;

bool step_avx512_supported(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

// ---- codes ----------------------------------------------------------------------------------------------------------

INLINE int chunk_bytes(DType dtype) {
    return dtype == DTYPE_U8 ? CHUNK / 2 : CHUNK;
}

// The codes of a chunk as numbers, exact: of int4 the even and the odd columns, else the first and the second half. Those of FP8
// are 2^-8 times what they stand for: as float16, which has three bits of exponent more, they are their own bits.
INLINE Pair widen_chunk(const char *codes, DType dtype) {
    if (dtype == DTYPE_U8) {
        const __m512 values = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
        __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)codes));
        return (Pair){_mm512_permutexvar_ps(bytes, values), // takes the low four bits
                      _mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), values)};
    }
    if (dtype == DTYPE_I8)
        return (Pair){_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)codes))),
                      _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(codes + LANES))))};
    __m512i halves = _mm512_slli_epi16(_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)codes)), 7);
    halves = _mm512_and_si512(halves, _mm512_set1_epi16((short)0xBF80));
    return (Pair){_mm512_cvtph_ps(_mm512_castsi512_si256(halves)),
                  _mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1))};
}

// n columns of x in the order of widen_chunk, zeros up to a whole chunk.
INLINE void arrange_columns(float *out, const float *x, int n, DType dtype) {
    for (int i = 0; i < n; i += CHUNK, out += CHUNK) {
        float padded[CHUNK] = {0};
        int now = n - i < CHUNK ? n - i : CHUNK;
        memcpy(padded, x + i, (size_t)now * sizeof *x);
        __m512 a = _mm512_loadu_ps(padded), b = _mm512_loadu_ps(padded + LANES), first = a, second = b;
        if (dtype == DTYPE_U8) {
            const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
            first = _mm512_permutex2var_ps(a, even, b);
            second = _mm512_permutex2var_ps(a, _mm512_or_si512(even, _mm512_set1_epi32(1)), b);
        }
        _mm512_storeu_ps(out, first);
        _mm512_storeu_ps(out + LANES, second);
    }
}

// n <= LANES scales from number i on, zeros after them.
INLINE __m512 widen_scales(const Matrix *w, size_t i, int n) {
    const __mmask16 mask = (__mmask16)((1u << n) - 1);
    if (w->scale_dtype == DTYPE_F32) return _mm512_maskz_loadu_ps(mask, (const float *)w->scale + i);
    __m256i halves = _mm256_maskz_loadu_epi16(mask, (const uint16_t *)w->scale + i);
    if (w->scale_dtype == DTYPE_F16) return _mm512_cvtph_ps(halves);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

// ---- products -------------------------------------------------------------------------------------------------------

// What a thread works on: a block of rows of W by rows of x.
typedef struct {
    const Matrix *w;
    int first, rows, T;       // rows of W, rows of x
    float x[X_ROWS][COLUMNS]; // columns in the order of widen_chunk
    __m512 sums[W_ROWS][X_ROWS];
    float scales[4][COLUMNS / CHUNK]; // of each chunk of up to four rows of W
} Block;

// Scales of n chunks from column `col` on, which begins a group, for R rows from `row` of the block on.
INLINE void load_scales(Block *b, int row, int col, int n, int R) {
    const Matrix *w = b->w;
    int per_group = w->group / CHUNK, shift = per_group == 4 ? 2 : per_group - 1,
        groups = (w->cols + w->group - 1) / w->group;
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i group_of_lane = _mm512_srlv_epi32(lanes, _mm512_set1_epi32(shift));
    for (int r = 0; r < R; r++)
        for (int c = 0; c < n; c += LANES) {
            int first = (col / CHUNK + c) >> shift, left = groups - first, most = LANES >> shift;
            size_t at = (size_t)(b->first + row + r) * (size_t)groups + (size_t)first;
            __m512 scales = widen_scales(w, at, left < most ? left : most);
            _mm512_storeu_ps(&b->scales[r][c], _mm512_permutexvar_ps(group_of_lane, scales));
        }
}

// Rows row to row+R of the block by rows t to t+C of x, over n columns from `col` on. A scale for each row waits until the end.
INLINE void multiply(Block *b, int row, int t, int col, int n, DType dtype, bool grouped, int R, int C) {
    const Matrix *w = b->w;
    size_t stride = (size_t)w->cols / (dtype == DTYPE_U8 ? 2 : 1);
    const char *codes =
        (const char *)w->data + (size_t)(b->first + row) * stride + (size_t)col / (dtype == DTYPE_U8 ? 2 : 1);
    __m512 sum[4][4];
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) sum[r][c] = b->sums[row + r][t + c];
    for (int i = 0; i < n; i += CHUNK) {
        char tail[4][CHUNK];
        for (int r = 0; r < R; r++) {
            const char *at = codes + (size_t)r * stride + (size_t)(i / CHUNK * chunk_bytes(dtype));
            if (n - i < CHUNK) { // x is 0 beyond
                memset(tail[r], 0, CHUNK);
                memcpy(tail[r], at, (size_t)(dtype == DTYPE_U8 ? (n - i) / 2 : n - i));
                at = tail[r];
            } else if (t == 0) {
                _mm_prefetch(at + AHEAD * stride, _MM_HINT_T0);
            }
            Pair p = widen_chunk(at, dtype);
            for (int c = 0; c < C; c++) {
                __m512 x1 = _mm512_loadu_ps(&b->x[t + c][i]), x2 = _mm512_loadu_ps(&b->x[t + c][i + LANES]);
                if (grouped) {
                    __m512 both = _mm512_fmadd_ps(p.second, x2, _mm512_mul_ps(p.first, x1));
                    sum[r][c] = _mm512_fmadd_ps(both, _mm512_set1_ps(b->scales[r][i / CHUNK]), sum[r][c]);
                } else {
                    sum[r][c] = _mm512_fmadd_ps(p.second, x2, _mm512_fmadd_ps(p.first, x1, sum[r][c]));
                }
            }
        }
    }
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) b->sums[row + r][t + c] = sum[r][c];
}

INLINE void multiply_rows(Block *b, int row, int col, int n, DType dtype, bool grouped, int R) {
    int t = 0;
    if (grouped) load_scales(b, row, col, (n + CHUNK - 1) / CHUNK, R);
    for (; t + 4 <= b->T; t += 4) multiply(b, row, t, col, n, dtype, grouped, R, 4);
    if (b->T - t == 3) multiply(b, row, t, col, n, dtype, grouped, R, 3);
    if (b->T - t == 2) multiply(b, row, t, col, n, dtype, grouped, R, 2);
    if (b->T - t == 1) multiply(b, row, t, col, n, dtype, grouped, R, 1);
}

INLINE float sum_lanes(__m512 v) { // a fixed tree
    __m256 a = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    b = _mm_add_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
}

INLINE void multiply_block(Block *b, float *y, const float *x, DType dtype, bool grouped) {
    const int cols = b->w->cols, wide = b->T == 1 ? 4 : 2; // rows of W at a time
    memset(b->sums, 0, sizeof b->sums);
    for (int col = 0; col < cols; col += COLUMNS) {
        int n = cols - col < COLUMNS ? cols - col : COLUMNS, row = 0;
        for (int t = 0; t < b->T; t++) arrange_columns(b->x[t], x + (size_t)t * (size_t)cols + (size_t)col, n, dtype);
        for (; wide == 4 && row + 4 <= b->rows; row += 4) {
            if (grouped) load_scales(b, row, col, (n + CHUNK - 1) / CHUNK, 4);
            multiply(b, row, 0, col, n, dtype, grouped, 4, 1);
        }
        for (; row + 2 <= b->rows; row += 2) multiply_rows(b, row, col, n, dtype, grouped, 2);
        if (row < b->rows) multiply_rows(b, row, col, n, dtype, grouped, 1);
    }
    for (int r = 0; r < b->rows; r++)
        for (int t = 0; t < b->T; t++) {
            float sum = sum_lanes(b->sums[r][t]) * (dtype == DTYPE_F8_E4M3 ? 256.0f : 1.0f);
            if (!grouped) sum *= _mm512_cvtss_f32(widen_scales(b->w, (size_t)(b->first + r), 1));
            y[(size_t)t * (size_t)b->w->rows + (size_t)(b->first + r)] = sum;
        }
}

typedef struct {
    float *y;
    const float *x;
    const Matrix *w;
    int T;
} Product;

static WITH_AVX512 void multiply_part(void *product, int64_t begin, int64_t end) {
    const Product *p = product;
    const Matrix *w = p->w;
    for (int64_t block = begin; block < end; block++)
        for (int t = 0; t < p->T; t += X_ROWS) {
            Block b;
            float *y = p->y + (size_t)t * (size_t)w->rows;
            const float *x = p->x + (size_t)t * (size_t)w->cols;
            b.w = w;
            b.first = (int)block * W_ROWS;
            b.rows = w->rows - b.first < W_ROWS ? w->rows - b.first : W_ROWS;
            b.T = p->T - t < X_ROWS ? p->T - t : X_ROWS;
            if (w->dtype == DTYPE_F8_E4M3)
                multiply_block(&b, y, x, DTYPE_F8_E4M3, false);
            else if (w->dtype == DTYPE_I8 && w->group == WHOLE_ROW)
                multiply_block(&b, y, x, DTYPE_I8, false);
            else if (w->dtype == DTYPE_I8)
                multiply_block(&b, y, x, DTYPE_I8, true);
            else if (w->group == WHOLE_ROW)
                multiply_block(&b, y, x, DTYPE_U8, false);
            else
                multiply_block(&b, y, x, DTYPE_U8, true);
        }
}

void step_avx512(float *y, const float *x, const Matrix *w, int T) {
    int64_t blocks = (w->rows + W_ROWS - 1) / W_ROWS, cost = (int64_t)T * W_ROWS * w->cols;
    int64_t part = blocks * cost <= ALONE ? blocks : (PART + cost - 1) / cost;
    parallel_for(blocks, part, multiply_part, &(Product){y, x, w, T});
}
