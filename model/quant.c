#include "quant.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "threads.h"

enum { LANES = 8, CHECK_PART = 1 << 16 };

#define INLINE static inline __attribute__((always_inline))
#ifdef __x86_64__
#define WITH_AVX2 __attribute__((target("avx2")))
#define HAS_AVX2 __builtin_cpu_supports("avx2")
#else
#define WITH_AVX2
#define HAS_AVX2 false
#endif

// ---- names ----------------------------------------------------------------------------------------------------------

#define TYPES "fp8, int8, int8:32, int8:64, int8:128, int4, int4:32, int4:64, int4:128"
const char quant_types[] = TYPES, quant_output_types[] = TYPES ", keep", quant_synthetic_types[] = "bf16, " TYPES;

bool quant_parse(const char *text, QuantType *type) {
    static const struct {
        const char *name;
        QuantType type;
    } types[] = {{"fp8", {DTYPE_F8_E4M3, 0}}, {"int8", {DTYPE_I8, 0}},       {"int8:32", {DTYPE_I8, 32}},
                 {"int8:64", {DTYPE_I8, 64}}, {"int8:128", {DTYPE_I8, 128}}, {"int4", {DTYPE_U8, QUANT_GROUP_FITS}},
                 {"int4:32", {DTYPE_U8, 32}}, {"int4:64", {DTYPE_U8, 64}},   {"int4:128", {DTYPE_U8, 128}}};
    for (size_t i = 0; i < sizeof types / sizeof *types; i++)
        if (strcmp(text, types[i].name) == 0) {
            *type = types[i].type;
            return true;
        }
    return false;
}

const char *quant_name(const Matrix *m, char name[QUANT_NAME]) {
    const char *codes = m->dtype == DTYPE_F8_E4M3 ? "fp8" : m->dtype == DTYPE_I8 ? "int8" : "int4";
    if (!matrix_is_quantised(m))
        snprintf(name, QUANT_NAME, "%s", dtype_names[m->dtype]);
    else if (m->group != WHOLE_ROW)
        snprintf(name, QUANT_NAME, "%s:%d", codes, m->group);
    else
        snprintf(name, QUANT_NAME, "%s%s", codes, m->dtype == DTYPE_U8 ? ":row" : "");
    return name;
}

int quant_fit(const int *cols, int n) {
    for (int group = 128; group > 32; group /= 2) {
        bool divides = true;
        for (int i = 0; i < n; i++) divides = divides && cols[i] % group == 0;
        if (divides) return group;
    }
    return 32;
}

// ---- decoding -------------------------------------------------------------------------------------------------------

float quant_fp8_value(uint8_t code) {
    int exponent = code >> 3 & 15, fraction = code & 7;
    if (exponent == 15 && fraction == 7) return NAN;
    float value = exponent ? ldexpf((float)(8 + fraction), exponent - 10) : ldexpf((float)fraction, -9);
    return code & 0x80 ? -value : value;
}

static float bits_to_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static uint32_t float_to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

// Exponent and fraction in place, and a product that moves the exponent's bias from 15 to 127.
static float f16_value(uint16_t half) {
    float value = bits_to_float((uint32_t)(half & 0x7FFF) << 13) * 0x1p112f;
    if ((half & 0x7C00) == 0x7C00) value = half & 0x3FF ? NAN : INFINITY;
    return half & 0x8000 ? -value : value;
}

float quant_number(const void *numbers, DType dtype, size_t i) {
    return dtype == DTYPE_F32    ? ((const float *)numbers)[i]
           : dtype == DTYPE_BF16 ? bits_to_float((uint32_t)((const uint16_t *)numbers)[i] << 16)
                                 : f16_value(((const uint16_t *)numbers)[i]);
}

float quant_scale(const Matrix *m, int row, int group) {
    size_t groups = (size_t)quant_groups(m->group, m->cols);
    return quant_number(m->scale, m->scale_dtype, (size_t)row * groups + (size_t)group);
}

// The value of the code of column i, in a row of codes.
static float code_value(const uint8_t *codes, DType dtype, int i) {
    return dtype == DTYPE_F8_E4M3 ? quant_fp8_value(codes[i])
           : dtype == DTYPE_I8    ? (float)(int8_t)codes[i]
                                  : (float)((codes[i / 2] >> i % 2 * 4 & 15) - 8);
}

void quant_decode_row(float *out, const Matrix *m, int row) {
    const char *data = (const char *)m->data + (uint64_t)row * matrix_row_bytes(m);
    if (!matrix_is_quantised(m)) {
        for (int i = 0; i < m->cols; i++) out[i] = quant_number(data, m->dtype, (size_t)i);
        return;
    }
    for (int g = 0, i = 0; i < m->cols; g++) {
        float scale = quant_scale(m, row, g);
        for (int end = m->cols - i < m->group ? m->cols : i + m->group; i < end; i++)
            out[i] = code_value((const uint8_t *)data, m->dtype, i) * scale; // rounded once, to the nearest
    }
}

// ---- encoding -------------------------------------------------------------------------------------------------------
// All of it works on a group times a power of two, so that its largest magnitude is in [0.5, 1) and no square overflows
// or is lost. Sums are eight, each of every eighth column, and added in a fixed order at the end, with vectors of any
// size: the result is the same on every machine.

typedef float Float8 __attribute__((vector_size(32)));
typedef int32_t Int8 __attribute__((vector_size(32)));

// *v where the mask is not set, else that number.
INLINE void replace(Float8 *v, const Int8 *mask, float number) {
    Float8 other = (Float8){0} + number;
    *v = (Float8)(((Int8)*v & ~*mask) | ((Int8)other & *mask));
}

// Eight numbers become the codes nearest to them, as numbers; of two the even one.
INLINE void nearest_codes(Float8 *v, DType dtype) {
    const float low = dtype == DTYPE_F8_E4M3 ? -448.0f : dtype == DTYPE_I8 ? -127.0f : -8.0f;
    const float high = dtype == DTYPE_U8 ? 7.0f : -low;
    const Float8 x = *v;
    Int8 below = x < low;
    Int8 above = x > high;
    replace(v, &below, low);
    replace(v, &above, high);
    if (dtype != DTYPE_F8_E4M3) {
        *v = (*v + 0x1.8p23f) - 0x1.8p23f;
        return;
    }
    Int8 bits = (Int8)*v;
    Int8 rounded = (bits + 0x7FFFF + (bits >> 20 & 1)) & ~0xFFFFF; // three bits of fraction
    Int8 is_tiny = (bits & 0x7FFFFFFF) < 0x3C800000;               // below 2^-6: multiples of 2^-9
    Float8 tiny = (*v + 0x1.8p14f) - 0x1.8p14f;
    *v = (Float8)((rounded & ~is_tiny) | ((Int8)tiny & is_tiny));
}

typedef struct {
    float error, product, square; // sums of e², e·q and q², with e = x - scale · q
} Fit;

INLINE float sum_lanes(const Float8 *sum) {
    const Float8 s = *sum;
    return ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
}

// How codes fit x [n, a multiple of LANES] at that scale.
INLINE Fit fit_codes(const float *x, int n, float scale, DType dtype) {
    Float8 error = {0}, product = {0}, square = {0};
    float inverse = 1 / scale;
    for (int i = 0; i < n; i += LANES) {
        Float8 e, q;
        memcpy(&e, x + i, sizeof e);
        q = e * inverse;
        nearest_codes(&q, dtype);
        e -= q * scale;
        error += e * e;
        product += e * q;
        square += q * q;
    }
    return (Fit){sum_lanes(&error), sum_lanes(&product), sum_lanes(&square)};
}

// A group, times 2^-exponent.
typedef struct {
    const float *x;  // [n]
    int n;           // columns, and zeros up to a multiple of LANES
    float largest;   // the number of the largest magnitude
    double up, down; // 2^exponent and 2^-exponent
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
INLINE bool try_scale(Search *s, const Group *g, float scale, DType dtype) {
    Fit fit = fit_codes(g->x, g->n, scale, dtype);
    if (fit.square == 0) return false;
    float stored = stored_scale((double)scale + (double)fit.product / (double)fit.square, g, s->dtype);
    double step = (double)stored * g->down - (double)scale;
    double error = (double)fit.error - 2 * step * (double)fit.product + step * step * (double)fit.square;
    if (stored == 0 || !isfinite(stored) || error >= s->error) return false;
    s->error = error;
    s->stored = stored;
    return true;
}

// The quotients of the largest magnitude and the scale that are tried first. Beyond the largest code that one is cut
// off, which pays where it is alone. Of fp8 they are one octave: every other gives the same codes times two, but for
// the smallest.
static const float fp8_quotients[] = {448, 464, 411, 377, 345, 317, 290, 266, 244};
static const float int8_quotients[] = {117,    119,    121, 122,    123, 123.5f, 124, 124.5f, 125, 125.5f, 126,
                                       126.3f, 126.6f, 127, 127.4f, 128, 130,    133, 138,    144, 152,    162};
static const float int4_quotients[] = {6.5f, 7,     7.4f,  7.7f,  8,     8.4f,   8.8f,  9.3f,
                                       9.9f, 10.6f, 11.5f, 12.6f, -6.6f, -7.05f, -7.4f, -8.2f};

// The best scale for a group, as it is stored.
INLINE float search_scale(const Group *g, DType dtype, DType scale_dtype) {
    enum { REFINEMENTS = 3 };
    const float *quotients = dtype == DTYPE_F8_E4M3 ? fp8_quotients
                             : dtype == DTYPE_I8    ? int8_quotients
                                                    : int4_quotients;
    int tries = (int)(dtype == DTYPE_F8_E4M3 ? sizeof fp8_quotients
                      : dtype == DTYPE_I8    ? sizeof int8_quotients
                                             : sizeof int4_quotients) /
                (int)sizeof *quotients;
    Search s = {.error = INFINITY, .dtype = scale_dtype};
    for (int i = 0; i < tries; i++)
        // int4 reaches to -8 on one side and to 7 on the other: the largest is on the longer one first
        try_scale(&s, g, dtype == DTYPE_U8 ? -g->largest / quotients[i] : fabsf(g->largest) / quotients[i], dtype);
    bool better = s.stored != 0;
    for (int i = 0; i < REFINEMENTS && better; i++)
        better = try_scale(&s, g, (float)((double)s.stored * g->down), dtype);
    return s.stored;
}

typedef uint8_t Byte8 __attribute__((vector_size(8)));

// The bytes of eight codes, given as numbers; of int4 the first four bytes.
INLINE void pack_codes(uint8_t bytes[8], const Float8 *q, DType dtype) {
    Int8 codes = __builtin_convertvector(*q, Int8), bits = (Int8)*q, magnitude = bits & 0x7FFFFFFF;
    if (dtype == DTYPE_U8) codes += 8;
    if (dtype == DTYPE_F8_E4M3) {
        Int8 is_tiny = magnitude < 0x3C800000, tiny = __builtin_convertvector((Float8)magnitude * 512, Int8);
        codes = ((tiny & is_tiny) | (((magnitude >> 20) - (120 << 3)) & ~is_tiny)) | (bits >> 24 & 0x80);
    }
    Byte8 packed = __builtin_convertvector(codes, Byte8);
    memcpy(bytes, &packed, sizeof packed);
    for (int i = 0; i < 4 && dtype == DTYPE_U8; i++) bytes[i] = (uint8_t)(bytes[2 * i] | bytes[2 * i + 1] << 4);
}

// The codes of a group of so many columns, nearest to that scale of its; its squared error, times down².
INLINE double write_codes(const Group *g, float scale, int columns, uint8_t *codes, DType dtype) {
    double sum[LANES] = {0};
    for (int i = 0; i < g->n; i += LANES) {
        uint8_t bytes[LANES];
        Float8 x, q = {0};
        memcpy(&x, g->x + i, sizeof x);
        if (scale != 0) q = x / scale;
        nearest_codes(&q, dtype);
        pack_codes(bytes, &q, dtype);
        x -= q * scale;
        for (int l = 0; l < LANES; l++) sum[l] += (double)x[l] * (double)x[l];
        int now = columns - i < LANES ? columns - i : LANES;
        memcpy(codes + (dtype == DTYPE_U8 ? i / 2 : i), bytes, (size_t)(dtype == DTYPE_U8 ? now / 2 : now));
    }
    return ((sum[0] + sum[4]) + (sum[2] + sum[6])) + ((sum[1] + sum[5]) + (sum[3] + sum[7]));
}

INLINE double encode_codes(const Group *g, int columns, uint8_t *codes, float *scale, DType dtype, DType scale_dtype) {
    *scale = g->largest != 0 ? search_scale(g, dtype, scale_dtype) : 0;
    return write_codes(g, (float)((double)*scale * g->down), columns, codes, dtype) * g->up * g->up;
}

INLINE double encode_any(const Group *g, int columns, uint8_t *codes, float *scale, QuantType type) {
    DType stored = quant_scale_dtype(type);
    if (type.dtype == DTYPE_F8_E4M3) return encode_codes(g, columns, codes, scale, DTYPE_F8_E4M3, stored);
    if (type.dtype == DTYPE_I8) return encode_codes(g, columns, codes, scale, DTYPE_I8, stored);
    return encode_codes(g, columns, codes, scale, DTYPE_U8, stored);
}

// The same twice: without a fused multiply-add both give the same bits.
static WITH_AVX2 double encode_avx2(const Group *g, int columns, uint8_t *codes, float *scale, QuantType type) {
    return encode_any(g, columns, codes, scale, type);
}

// One group: its codes and its squared error.
static double encode_group(QuantType type, const float *x, int n, uint8_t *codes, float *scale, float *scratch) {
    Group g = {.x = scratch, .n = (n + LANES - 1) / LANES * LANES};
    int exponent = 0;
    for (int i = 0; i < n; i++)
        if (fabsf(x[i]) > fabsf(g.largest)) g.largest = x[i];
    g.largest = (float)frexp((double)g.largest, &exponent);
    g.up = ldexp(1, exponent);
    g.down = ldexp(1, -exponent);
    for (int i = 0; i < n; i++) scratch[i] = (float)((double)x[i] * g.down);
    for (int i = n; i < g.n; i++) scratch[i] = 0;
    return HAS_AVX2 ? encode_avx2(&g, n, codes, scale, type) : encode_any(&g, n, codes, scale, type);
}

double quant_encode_row(QuantType type, const float *x, int cols, void *codes, void *scales, float *scratch) {
    int width = type.group ? type.group : cols;
    double sum = 0;
    for (int g = 0, first = 0; first < cols; g++, first += width) {
        float scale;
        int n = cols - first < width ? cols - first : width;
        sum += encode_group(type, x + first, n, (uint8_t *)codes + (type.dtype == DTYPE_U8 ? first / 2 : first), &scale,
                            scratch);
        if (quant_scale_dtype(type) == DTYPE_F32)
            ((float *)scales)[g] = scale;
        else
            ((uint16_t *)scales)[g] = (uint16_t)(float_to_bits(scale) >> 16);
    }
    return sum;
}

// ---- checks ---------------------------------------------------------------------------------------------------------

int64_t quant_find_bad_scale(const Matrix *m) {
    int64_t n = (int64_t)m->rows * quant_groups(m->group, m->cols);
    for (int64_t i = 0; i < n; i++)
        if (!isfinite(quant_number(m->scale, m->scale_dtype, (size_t)i))) return i;
    return -1;
}

typedef struct {
    const uint8_t *codes;
    int64_t n;
    int64_t *first; // of each part, or -1
} NanSearch;

static void find_nan_part(void *search, int64_t begin, int64_t end) {
    NanSearch *s = search;
    for (int64_t part = begin; part < end; part++) {
        int64_t i = part * CHECK_PART, stop = s->n - i < CHECK_PART ? s->n : i + CHECK_PART;
        uint8_t found = 0;
        for (int64_t k = i; k < stop; k++) found |= (s->codes[k] & 0x7F) == 0x7F;
        while (found && (s->codes[i] & 0x7F) != 0x7F) i++;
        s->first[part] = found ? i : -1;
    }
}

int64_t quant_find_nan(const Matrix *m) {
    int64_t n = (int64_t)m->rows * m->cols, parts = (n + CHECK_PART - 1) / CHECK_PART, found = -1;
    if (m->dtype != DTYPE_F8_E4M3) return -1;
    enum { AT_ONCE = 4096 };
    int64_t first[AT_ONCE] = {0};
    for (int64_t done = 0; done < parts && found < 0; done += AT_ONCE) {
        int64_t now = parts - done < AT_ONCE ? parts - done : AT_ONCE, at = done * CHECK_PART;
        NanSearch s = {(const uint8_t *)m->data + at, n - at, first};
        parallel_for(now, 1, find_nan_part, &s);
        for (int64_t i = 0; i < now && found < 0; i++)
            if (first[i] >= 0) found = at + first[i];
    }
    return found;
}
