// The search for scales, and codes. All of it works on a group times a power of two, so that its largest magnitude is
// in [0.5, 1) and no square overflows or is lost. Sums have a fixed order, with vectors of any size, and no product is
// fused with a sum: the result is the same on every machine.
#include <math.h>
#include <string.h>

#include "avx2.h"
#include "quant.h"
#include "quant_scan.h"

enum { BLOCK = 128, MANY = 1024, REFINEMENTS = 3 };

typedef float Float4 __attribute__((vector_size(16)));
typedef double Double4 __attribute__((vector_size(32)));
typedef int32_t Int8 __attribute__((vector_size(32)));
typedef int32_t Int4 __attribute__((vector_size(16)));
typedef uint16_t Pair8 __attribute__((vector_size(16)));
typedef int64_t Long4 __attribute__((vector_size(32)));
typedef uint8_t Byte32 __attribute__((vector_size(32)));
typedef uint8_t Byte4 __attribute__((vector_size(4)));

static inline uint32_t float_to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float bits_to_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

// ---- codes ----------------------------------------------------------------------------------------------------------

// *v where the mask is not set, else the other.
INLINE void choose(Float8 *v, const Int8 *mask, const Float8 *other) {
    *v = (Float8)(((Int8)*v & ~*mask) | ((Int8)*other & *mask));
}

INLINE void replace(Float8 *v, const Int8 *mask, float number) {
    Float8 other = (Float8){0} + number;
    choose(v, mask, &other);
}

INLINE void at_least(Int8 *v, int32_t least) {
    for (int i = 0; i < LANES; i++) (*v)[i] = (*v)[i] > least ? (*v)[i] : least;
}

INLINE void widen(Double4 *low, Double4 *high, const Float8 *v) {
    float numbers[LANES];
    memcpy(numbers, v, sizeof numbers);
    for (int i = 0; i < 4; i++) (*low)[i] = (double)numbers[i];
    for (int i = 0; i < 4; i++) (*high)[i] = (double)numbers[i + 4];
}

// Bits of 1.5 × 2^14, and those that 1.5 × 2^20 has more than 1.
enum { BITS_1_8P14 = 0x46C00000, POWER_TIMES_1_8P20 = 0x49C00000 - 0x3F800000 };

// Eight numbers become the codes nearest to them, as numbers; of two the even one. Adding and taking away 1.5 × 2^23
// leaves whole numbers, and a power of two more that many bits of fraction. Of e4m3 they are three,
// below 2^-6 multiples of 2^-9.
INLINE void nearest_codes(Float8 *v, DType dtype, bool clipped) {
    const float low = dtype == DTYPE_F8_E4M3 ? -448.0f : dtype == DTYPE_I8 ? -127.0f : -8.0f;
    const float high = dtype == DTYPE_U8 ? 7.0f : -low;
    if (clipped) {
        Int8 below = *v < low;
        replace(v, &below, low);
        Int8 above = *v > high;
        replace(v, &above, high);
    }
    Float8 magic = (Float8){0} + 0x1.8p23f;
    if (dtype == DTYPE_F8_E4M3) {
        Int8 bits = ((Int8)*v & 0x7F800000) + POWER_TIMES_1_8P20; // the power of two times 1.5 × 2^20
        at_least(&bits, BITS_1_8P14);
        magic = (Float8)bits;
    }
    *v = (*v + magic) - magic;
}

typedef struct {
    float error, product, square; // sums of e², e·q and q², with e = x - scale · q
} Fit;

// The halves of eight numbers added.
INLINE Float4 add_halves(const Float8 *v) {
    return __builtin_shufflevector(*v, *v, 0, 1, 2, 3) + __builtin_shufflevector(*v, *v, 4, 5, 6, 7);
}

// The sums of three times eight lanes.
INLINE Fit sum_lanes(const Float8 *error, const Float8 *product, const Float8 *square) {
    Float4 e = add_halves(error), p = add_halves(product), s = add_halves(square);
    Float4 both = __builtin_shufflevector(e, p, 0, 1, 4, 5) + __builtin_shufflevector(e, p, 2, 3, 6, 7);
    s += __builtin_shufflevector(s, s, 2, 3, 0, 1);
    Float4 all = __builtin_shufflevector(both, s, 0, 2, 4, 4) + __builtin_shufflevector(both, s, 1, 3, 5, 5);
    return (Fit){all[0], all[1], all[2]};
}

// How codes fit x [n, a multiple of LANES] at that scale; importance: of each column, where `weighted`.
INLINE Fit fit_codes(const float *x, const float *importance, int n, float scale, DType dtype, bool clipped,
                     bool weighted) {
    Float8 error = {0}, product = {0}, square = {0};
    float inverse = 1 / scale;
    for (int i = 0; i < n; i += LANES) {
        Float8 e, q, counts;
        memcpy(&e, x + i, sizeof e);
        q = e * inverse;
        nearest_codes(&q, dtype, clipped);
        e -= q * scale;
        if (weighted) {
            memcpy(&counts, importance + i, sizeof counts);
            error += counts * e * e;
            product += counts * e * q;
            square += counts * q * q;
        } else {
            error += e * e;
            product += e * q;
            square += q * q;
        }
    }
    return sum_lanes(&error, &product, &square);
}

// ---- the scale ------------------------------------------------------------------------------------------------------

// A group, times 2^-exponent.
typedef struct {
    const float *x;          // [n]
    const float *importance; // [n] of each column; NULL: 1
    int n;                   // columns, and zeros up to a multiple of LANES
    float largest;           // the number of the largest magnitude
    double up, down;         // 2^exponent and 2^-exponent
    const QuantScan *scan;
} Group;

// A scale of the group as it is stored: F32 or BF16.
static inline float stored_scale(double scale, const Group *g, DType dtype) {
    float value = (float)(scale * g->up);
    uint32_t bits = float_to_bits(value);
    return dtype == DTYPE_F32 ? value : bits_to_float((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000);
}

typedef struct {
    double error;
    float stored; // the scale, as it is stored
    DType dtype;  // of the scale
} Search;

// Tries the codes that are nearest at that scale: with them the best scale is another, and what counts is the error at
// that one, rounded. True if it is less than any before.
INLINE bool try_scale(Search *s, const Group *g, float scale, DType dtype, bool clipped, bool weighted) {
    Fit fit = fit_codes(g->x, g->importance, g->n, scale, dtype, clipped, weighted);
    if (fit.square == 0) return false;
    float stored = stored_scale((double)scale + (double)fit.product / (double)fit.square, g, s->dtype);
    double step = (double)stored * g->down - (double)scale;
    double error = (double)fit.error - 2 * step * (double)fit.product + step * step * (double)fit.square;
    if (stored == 0 || !isfinite(stored) || error >= s->error) return false;
    s->error = error;
    s->stored = stored;
    return true;
}

// Tries that scale, then the better one that it gives, and so on while that helps.
INLINE void refine(Search *s, const Group *g, float scale, DType dtype, bool weighted) {
    for (int i = 0; i < REFINEMENTS && try_scale(s, g, scale, dtype, true, weighted); i++) {
        float better = (float)((double)s->stored * g->down);
        if (better == scale) return;
        scale = better;
    }
}

// The quotients of the largest magnitude and the scale that are tried first. Beyond the largest code that one is cut
// off, which pays where it is alone. Of fp8 they are one octave, since every other gives the same codes times two, but
// for the smallest, and none is cut off.
static const float fp8_quotients[] = {448, 463, 411, 377, 345, 317, 290, 266, 244};
enum { INT8_SETS = 2 };
static const float int8_quotients[INT8_SETS][SCAN_SCALES] = {
    {117, 119, 121, 122, 123, 123.5f, 124, 124.5f, 125, 125.5f, 126, 126.25f, 126.625f, 127, 127.375f, 128},
    {128.5f, 129, 129.5f, 130, 130.5f, 131, 131.5f, 132, 133, 134, 135, 136, 137.5f, 139, 141, 142.5f}};
static const float int4_quotients[SCAN_SCALES] = {6.5f,   7,       7.375f, 7.75f,   8,       8.375f,   8.75f,   9.25f,
                                                  9.875f, 10.625f, 11.5f,  12.625f, -6.625f, -7.0625f, -7.375f, -8.25f};

// Columns of a group as the 16-bit numbers of a Scan, rounded to the nearest: in units of the largest magnitude over
// 32767, negated, for int4, whose codes reach to -8 on one side and to 7 on the other: the largest is on the longer one
// with the quotients above 0. Magnitudes over 65535 for int8.
INLINE void to_scan(uint16_t *out, const float *x, int n, float largest, DType dtype) {
    float unit = (dtype == DTYPE_U8 ? 32767.0f : 65535.0f) / largest;
    for (int i = 0; i < n; i += LANES) {
        Float8 v;
        memcpy(&v, x + i, sizeof v);
        if (dtype != DTYPE_U8) v = (Float8)((Int8)v & 0x7FFFFFFF);
        Pair8 numbers = __builtin_convertvector((Int8)(v * unit + 0x1.8p23f), Pair8);
        memcpy(out + i, &numbers, sizeof numbers);
    }
}

// The best of the scales so far, eight side by side: its error, and the scale as it would be stored with the exponent
// of the group.
typedef struct {
    Float8 error, stored;
    DType dtype; // of the scale
} Best;

// Eight more, by their sums: with its codes the best scale is another, rounded, and what counts is the error at that
// one. largest: negated for int4; inverse: 1 / largest.
INLINE void compare_scales(Best *best, const Float8 *sum, const float *quotients, float largest, float inverse) {
    const Float8 error = sum[0], product = sum[1], square = sum[2];
    Float8 quotient;
    memcpy(&quotient, quotients, sizeof quotient);
    Float8 scale = largest / quotient;
    Float8 stored = scale + scale * (product / (square * SCAN_ONE));
    if (best->dtype == DTYPE_BF16) {
        Int8 bits = (Int8)stored;
        stored = (Float8)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16);
    }
    Float8 step = (stored - scale) * (quotient * inverse);
    Float8 e = error * (1.0f / (SCAN_ONE * SCAN_ONE)) - step * (2.0f / SCAN_ONE) * product + step * step * square;
    e *= scale * scale;
    Int8 better = e < best->error; // not where no code but 0 is used, which gives NaN
    choose(&best->error, &better, &e);
    choose(&best->stored, &better, &stored);
}

// The stored scale of least error; 0 where there is none.
INLINE float best_scale(const Best *best) {
    Float8 error = best->error, stored = best->stored;
#define COMPARE(...) \
    { \
        Float8 e = __builtin_shufflevector(error, error, __VA_ARGS__), \
               s = __builtin_shufflevector(stored, stored, __VA_ARGS__); \
        Int8 better = e < error; \
        choose(&error, &better, &e); \
        choose(&stored, &better, &s); \
    }
    COMPARE(4, 5, 6, 7, 0, 1, 2, 3)
    COMPARE(2, 3, 0, 1, 6, 7, 4, 5)
    COMPARE(1, 0, 3, 2, 5, 4, 7, 6)
#undef COMPARE
    return stored[0];
}

// Multipliers of a Scan.
INLINE void to_multipliers(uint16_t m[SCAN_SCALES], const float *quotients) {
    for (int i = 0; i < SCAN_SCALES; i++) m[i] = (uint16_t)(int)(quotients[i] * SCAN_ONE);
}

INLINE void scan(Scan *out, const QuantScan *by, const uint16_t *x, int n, const uint16_t m[SCAN_SCALES], DType dtype) {
    if (dtype == DTYPE_U8)
        by->int4(out, x, n, m);
    else
        by->int8(out, x, n, m);
}

// A group of one block.
INLINE void scan_small(Best *best, const Group *g, const float *quotients, float largest, DType dtype) {
    uint16_t x[BLOCK], m[SCAN_SCALES];
    Scan found;
    to_scan(x, g->x, g->n, largest, dtype);
    to_multipliers(m, quotients);
    scan(&found, g->scan, x, g->n, m, dtype);
    for (int s = 0; s < SCAN_SCALES; s += LANES) {
        Int8 sums[3];
        memcpy(&sums[0], found.error + s, sizeof sums[0]);
        memcpy(&sums[1], found.product + s, sizeof sums[1]);
        memcpy(&sums[2], found.square + s, sizeof sums[2]);
        Float8 sum[3] = {__builtin_convertvector(sums[0], Float8), __builtin_convertvector(sums[1], Float8),
                         __builtin_convertvector(sums[2], Float8)};
        compare_scales(best, sum, quotients + s, largest, 1 / largest);
    }
}

// A longer one, in blocks. An error is up to 15.5 codes, so that the squares of a block fit.
INLINE void scan_row(Best *best, const Group *g, const float *quotients, float largest, DType dtype) {
    double error[SCAN_SCALES] = {0}, product[SCAN_SCALES] = {0}, square[SCAN_SCALES] = {0};
    uint16_t m[SCAN_SCALES];
    to_multipliers(m, quotients);
    for (int first = 0; first < g->n; first += BLOCK) {
        uint16_t x[BLOCK];
        Scan found;
        int n = g->n - first < BLOCK ? g->n - first : BLOCK;
        to_scan(x, g->x + first, n, largest, dtype);
        scan(&found, g->scan, x, n, m, dtype);
        for (int s = 0; s < SCAN_SCALES; s++) {
            error[s] += found.error[s];
            product[s] += found.product[s];
            square[s] += found.square[s];
        }
    }
    for (int s = 0; s < SCAN_SCALES; s += LANES) {
        Float8 sum[3];
        for (int i = 0; i < LANES; i++) {
            sum[0][i] = (float)error[s + i];
            sum[1][i] = (float)product[s + i];
            sum[2][i] = (float)square[s + i];
        }
        compare_scales(best, sum, quotients + s, largest, 1 / largest);
    }
}

// The best scale for a group, as it is stored.
INLINE float search_scale(const Group *g, DType dtype, DType scale_dtype) {
    Search s = {.error = INFINITY, .dtype = scale_dtype};
    float scale;
    if (dtype == DTYPE_F8_E4M3) {
        for (size_t i = 0; i < sizeof fp8_quotients / sizeof *fp8_quotients; i++)
            try_scale(&s, g, fabsf(g->largest) / fp8_quotients[i], dtype, false, false);
        scale = (float)((double)s.stored * g->down);
    } else {
        const float *quotients = dtype == DTYPE_U8 ? int4_quotients : int8_quotients[0];
        float largest = dtype == DTYPE_U8 ? -g->largest : fabsf(g->largest);
        Best best = {.error = (Float8){0} + INFINITY, .stored = {0}, .dtype = scale_dtype};
        if (g->n <= BLOCK)
            scan_small(&best, g, quotients, largest, dtype);
        else
            scan_row(&best, g, quotients, largest, dtype);
        // The largest alone has an error of (quotient - 127)², in units of the scale, which a finer scale takes from
        // the rounding of n columns, n / 12 in all, only where they are many.
        if (g->n >= MANY && dtype == DTYPE_I8) scan_row(&best, g, int8_quotients[1], largest, dtype);
        scale = best_scale(&best);
    }
    if (scale != 0) refine(&s, g, scale, dtype, false);
    return s.stored;
}

// The same where columns count more or less than others. A large weight in a column that counts little may be cut off,
// so that more quotients are tried.
static const float cut_off_quotients[] = {14, 16, 18.5f, 21.5f, 25, 30, -9.25f, -11};

INLINE void try_quotients(Search *s, const Group *g, const float *quotients, int n, float by, DType dtype) {
    float largest = (dtype == DTYPE_U8 ? -g->largest : fabsf(g->largest)) / by;
    for (int i = 0; i < n; i++) try_scale(s, g, largest / quotients[i], dtype, true, true);
}

INLINE float search_weighted(const Group *g, DType dtype, DType scale_dtype) {
    Search s = {.error = INFINITY, .stored = 0, .dtype = scale_dtype};
    const int n_fp8 = (int)(sizeof fp8_quotients / sizeof *fp8_quotients);
    const int n_cut_off = (int)(sizeof cut_off_quotients / sizeof *cut_off_quotients);
    if (dtype == DTYPE_F8_E4M3) try_quotients(&s, g, fp8_quotients, n_fp8, 1, dtype);
    if (dtype == DTYPE_I8) {
        try_quotients(&s, g, int8_quotients[0], SCAN_SCALES, 1, dtype);
        try_quotients(&s, g, int8_quotients[1], SCAN_SCALES, 1, dtype);
        try_quotients(&s, g, cut_off_quotients, n_cut_off - 2, 150 / 14.0f, dtype);
    }
    if (dtype == DTYPE_U8) {
        try_quotients(&s, g, int4_quotients, SCAN_SCALES, 1, dtype);
        try_quotients(&s, g, cut_off_quotients, n_cut_off, 1, dtype);
    }
    float scale = (float)((double)s.stored * g->down);
    if (scale != 0) refine(&s, g, scale, dtype, true);
    return s.stored;
}

// ---- encoding -------------------------------------------------------------------------------------------------------

// The bytes of eight codes, given as numbers, the first in the lowest; of int4 the lower four bytes.
INLINE uint64_t pack_codes(const Float8 *q, DType dtype) {
    Int8 codes = __builtin_convertvector(*q, Int8), bits = (Int8)*q, magnitude = bits & 0x7FFFFFFF;
    if (dtype == DTYPE_U8) codes += 8;
    if (dtype == DTYPE_F8_E4M3) {
        Int8 is_tiny = magnitude < 0x3C800000, tiny = __builtin_convertvector((Float8)magnitude * 512, Int8);
        codes = ((tiny & is_tiny) | (((magnitude >> 20) - (120 << 3)) & ~is_tiny)) | (bits >> 24 & 0x80);
    }
    if (dtype == DTYPE_U8) { // the second of two is 32 bits above the first, and goes to 4
        Long4 pairs = (Long4)codes | (Long4)codes >> 28;
        Byte4 bytes = __builtin_shufflevector((Byte32)pairs, (Byte32)pairs, 0, 8, 16, 24);
        return (uint32_t)bytes;
    }
    return (uint64_t)__builtin_shufflevector((Byte32)codes, (Byte32)codes, 0, 4, 8, 12, 16, 20, 24, 28);
}

// The codes of a group of so many columns, nearest to that scale of its; its squared error, times down².
INLINE double write_codes(const Group *g, float scale, int columns, uint8_t *codes, DType dtype) {
    Double4 sum = {0}, other = {0};
    size_t bytes = dtype == DTYPE_U8 ? LANES / 2 : LANES;
    for (int i = 0; i < g->n; i += LANES, codes += bytes) {
        Float8 x, q = {0};
        memcpy(&x, g->x + i, sizeof x);
        if (scale != 0) q = x / scale;
        nearest_codes(&q, dtype, true);
        uint64_t packed = pack_codes(&q, dtype);
        x -= q * scale;
        Double4 low = {0}, high = {0};
        widen(&low, &high, &x);
        sum += low * low;
        other += high * high;
        if (columns - i >= LANES)
            memcpy(codes, &packed, bytes);
        else
            memcpy(codes, &packed, (size_t)(dtype == DTYPE_U8 ? (columns - i) / 2 : columns - i));
    }
    sum += other;
    return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

INLINE double encode_codes(const Group *g, int columns, uint8_t *codes, float *scale, DType dtype, DType scale_dtype) {
    *scale = g->importance && g->largest != 0 ? search_weighted(g, dtype, scale_dtype) : 0;
    if (*scale == 0 && g->largest != 0) *scale = search_scale(g, dtype, scale_dtype);
    return write_codes(g, (float)((double)*scale * g->down), columns, codes, dtype) * g->up * g->up;
}

INLINE double encode_any(const Group *g, int columns, uint8_t *codes, float *scale, QuantType type) {
    DType stored = quant_scale_dtype(type);
    if (type.dtype == DTYPE_F8_E4M3) return encode_codes(g, columns, codes, scale, DTYPE_F8_E4M3, stored);
    if (type.dtype == DTYPE_I8) return encode_codes(g, columns, codes, scale, DTYPE_I8, stored);
    return encode_codes(g, columns, codes, scale, DTYPE_U8, stored);
}

// Eight columns of n, zeros beyond.
INLINE void load(Float8 *v, const float *x, int n) {
    *v = (Float8){0};
    if (n >= LANES)
        memcpy(v, x, sizeof *v);
    else
        memcpy(v, x, (size_t)n * sizeof *x);
}

INLINE void keep_larger(Int8 *most, const Int8 *other) {
    Int8 larger = *other > *most;
    *most = (*most & ~larger) | (*other & larger);
}

INLINE int32_t largest_of(const Int8 *v) {
    int32_t most = (*v)[0];
    for (int i = 1; i < LANES; i++) most = (*v)[i] > most ? (*v)[i] : most;
    return most;
}

// The number of the largest magnitude, of two opposite ones the positive. Bits of floats that are not negative are in
// their order, as whole numbers.
INLINE float find_largest(const float *x, int n) {
    Int8 most = {0}, positive = {0};
    for (int i = 0; i < n; i += LANES) {
        Float8 v;
        load(&v, x + i, n - i);
        Int8 bits = (Int8)v, magnitude = bits & 0x7FFFFFFF;
        keep_larger(&most, &magnitude);
        keep_larger(&positive, &bits);
    }
    int32_t bits = largest_of(&most);
    float largest = bits_to_float((uint32_t)bits);
    return bits == largest_of(&positive) ? largest : -largest;
}

INLINE double power_of_two(int exponent) {
    uint64_t bits = (uint64_t)(1023 + exponent) << 52;
    double value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

// x is that power of two times a number in [0.5, 1), or 0.
INLINE int exponent_of(float x) {
    double value = (double)x; // normal, whatever x is
    uint64_t bits;
    memcpy(&bits, &value, sizeof bits);
    return value != 0 ? (int)(bits >> 52 & 0x7FF) - 1022 : 0;
}

// One group: its codes and its squared error.
INLINE double encode_group(QuantType type, const float *x, const float *importance, int n, uint8_t *codes, float *scale,
                           float *scratch, const QuantScan *scan) {
    Group g = {.x = scratch, .importance = importance, .n = (n + LANES - 1) / LANES * LANES, .scan = scan};
    float largest = find_largest(x, n);
    int exponent = exponent_of(largest);
    g.up = power_of_two(exponent);
    g.down = power_of_two(-exponent);
    // 2^-exponent may be no float, but both factors are
    g.largest = (float)((double)largest * g.down);
    float first = (float)power_of_two(-exponent / 2), second = (float)power_of_two(-exponent + exponent / 2);
    for (int i = 0; i < n; i += LANES) {
        Float8 v;
        load(&v, x + i, n - i);
        v = v * first * second;
        memcpy(scratch + i, &v, sizeof v);
    }
    return encode_any(&g, n, codes, scale, type);
}

INLINE double encode_row(QuantType type, const float *x, int cols, const float *importance, void *codes, void *scales,
                         float *scratch) {
    const QuantScan *scan = quant_scan_select();
    int width = type.group ? type.group : cols;
    double sum = 0;
    for (int g = 0, first = 0; first < cols; g++, first += width) {
        float scale;
        int n = cols - first < width ? cols - first : width;
        sum += encode_group(type, x + first, importance ? importance + first : NULL, n,
                            (uint8_t *)codes + (type.dtype == DTYPE_U8 ? first / 2 : first), &scale, scratch, scan);
        if (quant_scale_dtype(type) == DTYPE_F32)
            ((float *)scales)[g] = scale;
        else
            ((uint16_t *)scales)[g] = (uint16_t)(float_to_bits(scale) >> 16);
    }
    return sum;
}

// The same twice: without a fused multiply-add both give the same bits.
static WITH_AVX2 double encode_row_avx2(QuantType type, const float *x, int cols, const float *importance, void *codes,
                                        void *scales, float *scratch) {
    return encode_row(type, x, cols, importance, codes, scales, scratch);
}

double quant_encode_row(QuantType type, const float *x, int cols, const float *importance, void *codes, void *scales,
                        float *scratch) {
    return HAS_AVX2 ? encode_row_avx2(type, x, cols, importance, codes, scales, scratch)
                    : encode_row(type, x, cols, importance, codes, scales, scratch);
}

// ---- codes at scales that are given ---------------------------------------------------------------------------------

INLINE void round_all(float *v, const float *scale, int n, DType dtype) {
    for (int i = 0; i < n; i += LANES) {
        Float8 q, by;
        memcpy(&q, v + i, sizeof q);
        memcpy(&by, scale + i, sizeof by);
        Int8 none = by == 0;
        q /= by;
        replace(&q, &none, 0);
        nearest_codes(&q, dtype, true);
        memcpy(v + i, &q, sizeof q);
    }
}

INLINE void round_any(DType dtype, float *v, const float *scale, int n) {
    if (dtype == DTYPE_F8_E4M3)
        round_all(v, scale, n, DTYPE_F8_E4M3);
    else if (dtype == DTYPE_I8)
        round_all(v, scale, n, DTYPE_I8);
    else
        round_all(v, scale, n, DTYPE_U8);
}

static WITH_AVX2 void round_any_avx2(DType dtype, float *v, const float *scale, int n) {
    round_any(dtype, v, scale, n);
}

void quant_round(DType dtype, float *v, const float *scale, int n) {
    if (HAS_AVX2)
        round_any_avx2(dtype, v, scale, n);
    else
        round_any(dtype, v, scale, n);
}

void quant_pack(DType dtype, const float *values, int n, void *codes) {
    for (int i = 0; i < n; i += LANES) {
        Float8 q;
        load(&q, values + i, n - i);
        const uint64_t packed = pack_codes(&q, dtype);
        const int have = n - i < LANES ? n - i : LANES;
        if (dtype == DTYPE_U8)
            memcpy((char *)codes + i / 2, &packed, (size_t)have / 2);
        else
            memcpy((char *)codes + i, &packed, (size_t)have);
    }
}
