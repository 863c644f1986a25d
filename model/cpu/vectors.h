// Vectors of eight floats (a GCC and Clang extension), and weights widened to them. For ops.c and attention.c,
// which are compiled once for each instruction set.
#ifndef VECTORS_H
#define VECTORS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "../model.h"

enum { LANES = 8 };

typedef float Float8 __attribute__((vector_size(32)));
typedef int32_t Int8 __attribute__((vector_size(32)));
typedef uint32_t UInt8 __attribute__((vector_size(32)));
typedef uint64_t Word4 __attribute__((vector_size(32)));
typedef int16_t Pair8 __attribute__((vector_size(16)));
typedef uint16_t Half8 __attribute__((vector_size(16)));
typedef uint8_t Byte16 __attribute__((vector_size(16)));

#define INLINE static inline __attribute__((always_inline))

INLINE Float8 load8(const float *p) {
    Float8 v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE void store8(float *p, Float8 v) {
    memcpy(p, &v, sizeof v);
}

INLINE Float8 splat8(float x) {
    return (Float8){x, x, x, x, x, x, x, x};
}

INLINE Float8 select8(Int8 mask, Float8 yes, Float8 no) {
    return (Float8)(((Int8)yes & mask) | ((Int8)no & ~mask));
}

INLINE float sum8(Float8 v) { // a fixed tree
    return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

// f16 in the low half of each lane: put exponent and fraction in place and let a multiplication move the exponent's
// bias from 15 to 127; it normalises the subnormals too. Infinities and NaN get the exponent of ones back.
INLINE Float8 f16_to_float(UInt8 bits) {
    Float8 f = (Float8)((bits & 0x7FFF) << 13) * 0x1p112f;
    UInt8 special = (UInt8)((bits & 0x7C00) == 0x7C00) & 0x7F800000;
    return (Float8)((UInt8)f | special | (bits & 0x8000) << 16);
}

// e4m3 in the low byte of each lane, none of them NaN. Below 2^-6 the fraction is a whole number of 2^-9.
INLINE Float8 fp8_to_float(UInt8 bits) {
    Int8 magnitude = (Int8)(bits & 0x7F);
    Float8 normal = (Float8)((magnitude << 20) + (120 << 23));
    Float8 tiny = __builtin_convertvector(magnitude, Float8) * 0x1p-9f;
    return (Float8)((UInt8)select8(magnitude < 8, tiny, normal) | (bits & 0x80) << 24);
}

// Codes of quantised weights.
INLINE bool is_code(DType dtype) {
    return dtype > DTYPE_F32;
}

// Bytes before element i; of int4 an even one.
INLINE size_t bytes_before(DType dtype, size_t i) {
    return dtype == DTYPE_U8 ? i / 2 : is_code(dtype) ? i : dtype == DTYPE_F32 ? 4 * i : 2 * i;
}

// Sixteen codes from element i on, as numbers, the even and the odd elements: so a pair of bytes, or of nibbles, is
// taken apart.
INLINE void widen16_codes(const char *w, DType dtype, Float8 *first, Float8 *second) {
    if (dtype == DTYPE_U8) {
        Byte16 bytes = {0}, zero = {0};
        memcpy(&bytes, w, LANES);
        bytes = __builtin_shufflevector(bytes, zero, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
        Int8 pairs = __builtin_convertvector((Pair8)bytes, Int8);
        *first = __builtin_convertvector((pairs & 15) - 8, Float8);
        *second = __builtin_convertvector((pairs >> 4) - 8, Float8);
        return;
    }
    Pair8 words;
    memcpy(&words, w, sizeof words);
    Int8 pairs = __builtin_convertvector(words, Int8);
    if (dtype == DTYPE_I8) {
        *first = __builtin_convertvector(pairs << 24 >> 24, Float8);
        *second = __builtin_convertvector(pairs >> 8, Float8);
    } else {
        *first = fp8_to_float((UInt8)pairs & 0xFF);
        *second = fp8_to_float((UInt8)(pairs >> 8) & 0xFF);
    }
}

// Sixteen weights from element i on, widened; exact for every value. Two-byte weights come as the even and the odd
// elements: that is how a 32-bit lane holds a pair, and taking it apart costs a shift and a mask. So do codes, without
// their scale. F32 comes in order.
INLINE void widen16(const void *w, DType dtype, size_t i, Float8 *first, Float8 *second) {
    if (dtype == DTYPE_F32) {
        *first = load8((const float *)w + i);
        *second = load8((const float *)w + i + LANES);
        return;
    }
    if (is_code(dtype)) {
        widen16_codes((const char *)w + bytes_before(dtype, i), dtype, first, second);
        return;
    }
    UInt8 pairs;
    memcpy(&pairs, (const uint16_t *)w + i, sizeof pairs);
    if (dtype == DTYPE_BF16) {
        *first = (Float8)(pairs << 16);
        *second = (Float8)(pairs & 0xFFFF0000);
    } else {
        *first = f16_to_float(pairs & 0xFFFF);
        *second = f16_to_float(pairs >> 16);
    }
}

// Sixteen floats of x in the order in which widen16 gives the weights.
INLINE void load16(const float *x, DType dtype, Float8 *first, Float8 *second) {
    Float8 a = load8(x), b = load8(x + LANES);
    *first = dtype == DTYPE_F32 ? a : __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14);
    *second = dtype == DTYPE_F32 ? b : __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
}

INLINE float widen1(const void *w, DType dtype, size_t i) {
    if (dtype == DTYPE_F32) return ((const float *)w)[i];
    if (dtype == DTYPE_I8) return ((const int8_t *)w)[i];
    if (dtype == DTYPE_U8) return (float)((((const uint8_t *)w)[i / 2] >> i % 2 * 4 & 15) - 8);
    if (dtype == DTYPE_F8_E4M3) return fp8_to_float((UInt8){((const uint8_t *)w)[i]})[0];
    uint16_t padded[2 * LANES] = {((const uint16_t *)w)[i]};
    Float8 first, second;
    widen16(padded, dtype, 0, &first, &second);
    return first[0];
}

// What the codes of a row are multiplied by, from column `col` on.
INLINE float scale_at(const Matrix *w, int row, int col) {
    size_t groups = (size_t)((w->cols + w->group - 1) / w->group), i = (size_t)row * groups + (size_t)(col / w->group);
    if (w->scale_dtype == DTYPE_F32) return ((const float *)w->scale)[i];
    if (w->scale_dtype == DTYPE_F16) return widen1(w->scale, DTYPE_F16, i);
    uint32_t bits = (uint32_t)((const uint16_t *)w->scale)[i] << 16;
    float scale;
    memcpy(&scale, &bits, sizeof scale);
    return scale;
}

INLINE float weight_at(const Matrix *w, DType dtype, int row, int col) {
    float x = widen1(w->data, dtype, (size_t)row * (size_t)w->cols + (size_t)col);
    return is_code(dtype) ? x * scale_at(w, row, col) : x;
}

// The column, at most end, up to which those from `col` on share a scale; of numbers, which have none, end.
INLINE int scale_end(const Matrix *w, DType dtype, int col, int end) {
    if (!is_code(dtype)) return end;
    int next = col / w->group * w->group;
    return end - next < w->group ? end : next + w->group;
}

// statement with D for the dtype of a matrix, a constant: so no inner loop asks for it.
#define DTYPE_CASE(constant, D, statement) \
    case constant: { \
        const DType D = constant; \
        statement; \
        break; \
    }
#define WITH_DTYPE(dtype, D, statement) \
    switch (dtype) { \
        DTYPE_CASE(DTYPE_BF16, D, statement) \
        DTYPE_CASE(DTYPE_F16, D, statement) \
        DTYPE_CASE(DTYPE_F32, D, statement) \
        DTYPE_CASE(DTYPE_U8, D, statement) \
        DTYPE_CASE(DTYPE_I8, D, statement) \
        DTYPE_CASE(DTYPE_F8_E4M3, D, statement) \
    default: \
        break; /* others are not of matrices */ \
    }

// exp(x) to about 1 ulp; 0 below -87, infinite above 88.4. 2^n · e^r with r in ±ln2/2, a polynomial of degree 6
// (Cephes' expf).
INLINE Float8 exp8(Float8 x) {
    Float8 low = splat8(-87.0f), high = splat8(89.0f);
    Int8 zero = x < low;
    x = select8(x > high, high, select8(zero, low, x));
    Float8 magic = splat8(0x1.8p23f); // adding it rounds to a whole number
    Float8 n = (x * 1.44269504088896341f + magic) - magic;
    Float8 r = x - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    Float8 p = splat8(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    Int8 scale = (__builtin_convertvector(n, Int8) + 127) << 23;
    return (Float8)((Int8)(p * (Float8)scale) & ~zero);
}

// The nearest bf16, of equals the even one, in the low half of each lane.
INLINE UInt8 bf16_bits(Float8 x) {
    UInt8 bits = (UInt8)x, nan = (UInt8)(x != x);
    return (((bits + 0x7FFF + (bits >> 16 & 1)) & ~nan) | ((bits | 0x400000) & nan)) >> 16;
}

// The nearest f16, of equals the even one, in the low half of each lane; infinite from 65520 on. Below 2^-14 an
// addition rounds to a whole number of 2^-24.
INLINE UInt8 f16_bits(Float8 x) {
    UInt8 sign = (UInt8)x & 0x80000000, magnitude = (UInt8)x ^ sign;
    UInt8 normal = (magnitude + 0xFFF + (magnitude >> 13 & 1) - (112u << 23)) >> 13;
    UInt8 tiny = (UInt8)((Float8)magnitude + 0.5f) - 0x3F000000;
    UInt8 is_tiny = (UInt8)(magnitude < 0x38800000), is_large = (UInt8)(magnitude >= 0x477FF000),
          is_nan = (UInt8)(magnitude > 0x7F800000);
    UInt8 bits = (tiny & is_tiny) | (normal & ~is_tiny & ~is_large) | (is_large & 0x7C00) | (is_nan & 0x200);
    return bits | sign >> 16;
}

// Eight floats rounded to dtype, BF16 or F16, and the same as floats.
INLINE UInt8 narrow8(Float8 x, DType dtype) {
    return dtype == DTYPE_F16 ? f16_bits(x) : bf16_bits(x);
}

INLINE Float8 round8(Float8 x, DType dtype) {
    UInt8 bits = narrow8(x, dtype);
    return dtype == DTYPE_F16 ? f16_to_float(bits) : (Float8)(bits << 16);
}

#endif
