// What the AVX-512 products share: how weights and scales become floats, and x comes into another order. For files of
// functions with the attribute WITH_AVX512.
#ifndef WIDEN_AVX512_H
#define WIDEN_AVX512_H

#include <immintrin.h>
#include <string.h>

#include "../model.h"

enum {
    LANES = 16,
    LINE = 64,     // bytes of W that are widened together: a cache line, LANES of four bytes
    MAX_UNIT = 128 // columns of a line, at most
};

// (tune: loads that two instructions use are kept in registers, which without it are made twice)
#define WITH_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,tune=icelake-server")))
#define INLINE static inline __attribute__((always_inline)) WITH_AVX512

// ---- weights --------------------------------------------------------------------------------------------------------
// A line of W is a vector whose lanes of 32 bits hold 1, 2, 4 or 8 weights each. They are widened to as many vectors of
// floats: vector j has weight j of each lane, so that no weight crosses a lane. x is put in the same order.

INLINE int weights_of_lane(DType dtype) {
    return dtype == DTYPE_F32 ? 1 : dtype == DTYPE_BF16 || dtype == DTYPE_F16 ? 2 : dtype == DTYPE_U8 ? 8 : 4;
}

INLINE int columns_of_line(DType dtype) {
    return LANES * weights_of_lane(dtype);
}

// A line of W, of int4 in a register: a compiler would rather make a load part of each of the instructions that use it.
INLINE __m512i load_bytes(const void *at, DType dtype) {
    __m512i v = _mm512_loadu_si512(at);
    if (dtype == DTYPE_U8) __asm__("" : "+v"(v));
    return v;
}

// A line and, of int8, the same 16 bits to the right.
typedef struct {
    __m512i low, high;
} Line;

INLINE Line load_line(const char *at, DType dtype) {
    __m512i line = load_bytes(at, dtype);
    return (Line){line, dtype == DTYPE_I8 ? _mm512_srli_epi32(line, 16) : line};
}

// The values of int4's codes as bf16, twice: a look-up takes the low five bits of a word, of which the fifth is the next
// code's.
INLINE __m512i int4_values(void) {
    return _mm512_broadcast_i64x4(_mm256_setr_epi16((short)0xC100, (short)0xC0E0, (short)0xC0C0, (short)0xC0A0,
                                                    (short)0xC080, (short)0xC040, (short)0xC000, (short)0xBF80, 0,
                                                    0x3F80, 0x4000, 0x4040, 0x4080, 0x40A0, 0x40C0, 0x40E0));
}

// Vector j of a line, exact. Codes of FP8 are 2^-8 times what they stand for: as float16, which has one bit of exponent
// more, they are their own bits.
INLINE __m512 widen(Line line, int j, DType dtype) {
    if (dtype == DTYPE_U8) {
        // One shift for two codes: a look-up of floats takes the low four bits of each lane, one of bf16 those of its
        // upper half.
        const __m512 values = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
        __m512i codes = _mm512_srli_epi32(line.low, j % 4 * 4);
        return j < 4 ? _mm512_permutexvar_ps(codes, values)
                     : _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xAAAAAAAA, codes, int4_values()));
    }
    if (dtype == DTYPE_I8) {
        // Code + 128 becomes the fraction of a float whose exponent makes the lowest of its bits one: 2^23 is too much
        // (2^15 of a byte 8 bits higher), and 128.
        const int low = j % 2 * 8;
        const __m512i mask = _mm512_set1_epi32(255 << low), with = _mm512_set1_epi32((150 - low) << 23 | 128 << low);
        __m512i bits = _mm512_ternarylogic_epi32(j < 2 ? line.low : line.high, mask, with, 0x6A); // code & mask ^ with
        return _mm512_sub_ps(_mm512_castsi512_ps(bits), _mm512_set1_ps((float)((1 << (23 - low)) + 128)));
    }
    if (dtype == DTYPE_F8_E4M3) {
        // halves of the line: j 0 and 1 are the even and the odd bytes of its first 32, j 2 and 3 of the others
        __m256i bytes = j < 2 ? _mm512_castsi512_si256(line.low) : _mm512_extracti64x4_epi64(line.low, 1);
        if (j % 2 == 0) bytes = _mm256_slli_epi16(bytes, 8);
        return _mm512_cvtph_ps(_mm256_and_si256(_mm256_srai_epi16(bytes, 1), _mm256_set1_epi16((short)0xBF80)));
    }
    if (dtype == DTYPE_F16)
        return _mm512_cvtph_ps(j == 0 ? _mm512_castsi512_si256(line.low) : _mm512_extracti64x4_epi64(line.low, 1));
    if (dtype == DTYPE_BF16)
        return _mm512_castsi512_ps(j == 0 ? _mm512_slli_epi32(line.low, 16)
                                          : _mm512_and_si512(line.low, _mm512_set1_epi32((int)0xFFFF0000)));
    return _mm512_castsi512_ps(line.low);
}

INLINE size_t row_bytes(const Matrix *w, DType dtype) {
    return (size_t)w->cols * LINE / (size_t)columns_of_line(dtype);
}

// The exponent of 2 of a group of columns that share a scale.
INLINE int group_shift(const Matrix *w) {
    return w->group == 32 ? 5 : w->group == 64 ? 6 : 7;
}

// Scales from number i on, those that the mask names, as floats; 0 in the places of the others.
INLINE __m512 load_scales(const void *scales, DType dtype, size_t i, __mmask16 mask) {
    if (dtype == DTYPE_F32) return _mm512_maskz_loadu_ps(mask, (const float *)scales + i);
    __m256i halves = _mm256_maskz_loadu_epi16(mask, (const uint16_t *)scales + i);
    if (dtype == DTYPE_F16) return _mm512_cvtph_ps(halves);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

// n of them, zeros after them.
INLINE void widen_scales(float *out, const void *scales, DType dtype, size_t i, int n) {
    for (; n >= LANES; n -= LANES, i += LANES, out += LANES)
        _mm512_storeu_ps(out, load_scales(scales, dtype, i, 0xFFFF));
    _mm512_storeu_ps(out, load_scales(scales, dtype, i, (__mmask16)((1u << n) - 1)));
}

// n vectors, a power of two, to n vectors of which number j has elements j, n + j, 2 n + j, ...
INLINE void take_apart(__m512 *v, int n) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30),
                  odd = _mm512_or_si512(even, _mm512_set1_epi32(1));
    for (int stride = 1; stride < n; stride *= 2) {
        __m512 from[8];
        for (int i = 0; i < n; i++) from[i] = v[i];
        for (int i = 0; i < n / 2; i++) {
            v[i] = _mm512_permutex2var_ps(from[2 * i], even, from[2 * i + 1]);
            v[n / 2 + i] = _mm512_permutex2var_ps(from[2 * i], odd, from[2 * i + 1]);
        }
    }
}

// The 32 numbers of two vectors, each a bf16, as pairs.
INLINE __m512i pack_pairs(__m512 a, __m512 b) {
    __m512i low = _mm512_srli_epi32(_mm512_castps_si512(a), 16), high = _mm512_srli_epi32(_mm512_castps_si512(b), 16);
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(low)), _mm512_cvtepi32_epi16(high), 1);
}

// CALL(D, G) with D and G for the dtype of a matrix and whether groups of columns have scales, constants.
#define WITH_TYPE(w, CALL) \
    switch ((w)->dtype) { \
    case DTYPE_F16: \
        CALL(DTYPE_F16, false); \
        break; \
    case DTYPE_F32: \
        CALL(DTYPE_F32, false); \
        break; \
    default: \
        WITH_TYPE_OF_PAIRS(w, CALL) \
    }

// The same for those that can be multiplied as pairs of bf16.
#define WITH_TYPE_OF_PAIRS(w, CALL) \
    switch ((w)->dtype) { \
    case DTYPE_BF16: \
        CALL(DTYPE_BF16, false); \
        break; \
    case DTYPE_F8_E4M3: \
        CALL(DTYPE_F8_E4M3, false); \
        break; \
    case DTYPE_I8: \
        if ((w)->group == WHOLE_ROW) \
            CALL(DTYPE_I8, false); \
        else \
            CALL(DTYPE_I8, true); \
        break; \
    case DTYPE_U8: \
        if ((w)->group == WHOLE_ROW) \
            CALL(DTYPE_U8, false); \
        else \
            CALL(DTYPE_U8, true); \
        break; \
    default: \
        break; /* others are not of matrices */ \
    }

#endif
