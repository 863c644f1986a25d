// x86-64: AVX-512 with VNNI or AVX2, where the processor has it. A vector is eight or sixteen scales by two weights: a
// scale's two 16-bit numbers are neighbours, which vpmaddwd multiplies and adds (vpdpwssd to a sum, too), so that no
// sum crosses lanes. With AVX2 two such vectors share a load.
#include <immintrin.h>
#include <string.h>

#include "quant_scan.h"

#define WITH_AVX2 __attribute__((target("avx2")))
#define INLINE static inline __attribute__((always_inline)) WITH_AVX2

typedef struct {
    __m256i error, product, square;
} Sums;

// Each of eight 16-bit numbers twice.
INLINE __m256i twice(const void *m) {
    __m128i all = _mm_loadu_si128(m);
    return _mm256_set_m128i(_mm_unpackhi_epi16(all, all), _mm_unpacklo_epi16(all, all));
}

INLINE __m256i two_weights(const void *x) {
    int32_t pair;
    memcpy(&pair, x, sizeof pair);
    return _mm256_set1_epi32(pair);
}

INLINE void add(Sums *sums, __m256i y, __m256i r) {
    __m256i e = _mm256_sub_epi16(y, _mm256_slli_epi16(r, 8));
    sums->error = _mm256_add_epi32(sums->error, _mm256_madd_epi16(e, e));
    sums->product = _mm256_add_epi32(sums->product, _mm256_madd_epi16(e, r));
    sums->square = _mm256_add_epi32(sums->square, _mm256_madd_epi16(r, r));
}

INLINE void store(Scan *out, const Sums *first, const Sums *second) {
    memcpy(out->error, &first->error, sizeof first->error);
    memcpy(out->product, &first->product, sizeof first->product);
    memcpy(out->square, &first->square, sizeof first->square);
    memcpy(out->error + 8, &second->error, sizeof second->error);
    memcpy(out->product + 8, &second->product, sizeof second->product);
    memcpy(out->square + 8, &second->square, sizeof second->square);
}

// The codes nearest to y, of int4.
INLINE __m256i code_int4(__m256i y) {
    __m256i r = _mm256_mulhrs_epi16(y, _mm256_set1_epi16(1 << 7)); // (a · b + 2^14) >> 15
    return _mm256_max_epi16(_mm256_min_epi16(r, _mm256_set1_epi16(7)), _mm256_set1_epi16(-8));
}

INLINE __m256i code_int8(__m256i y) {
    __m256i r = _mm256_srli_epi16(_mm256_add_epi16(y, _mm256_set1_epi16(SCAN_ONE / 2)), 8);
    return _mm256_min_epi16(r, _mm256_set1_epi16(127));
}

static WITH_AVX2 void scan_int4(Scan *out, const uint16_t *x, int n, const uint16_t m[SCAN_SCALES]) {
    const __m256i m1 = twice(m), m2 = twice(m + 8);
    Sums first = {_mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256()}, second = first;
    for (int i = 0; i < n; i += 2) {
        __m256i weights = two_weights(x + i), y1 = _mm256_mulhrs_epi16(weights, m1),
                y2 = _mm256_mulhrs_epi16(weights, m2);
        add(&first, y1, code_int4(y1));
        add(&second, y2, code_int4(y2));
    }
    store(out, &first, &second);
}

static WITH_AVX2 void scan_int8(Scan *out, const uint16_t *x, int n, const uint16_t m[SCAN_SCALES]) {
    const __m256i m1 = twice(m), m2 = twice(m + 8);
    Sums first = {_mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256()}, second = first;
    for (int i = 0; i < n; i += 2) {
        __m256i weights = two_weights(x + i), y1 = _mm256_mulhi_epu16(weights, m1),
                y2 = _mm256_mulhi_epu16(weights, m2);
        add(&first, y1, code_int8(y1));
        add(&second, y2, code_int8(y2));
    }
    store(out, &first, &second);
}

static const QuantScan scan_avx2 = {scan_int4, scan_int8};

// ---- AVX-512 with VNNI ----------------------------------------------------------------------------------------------

#define WITH_VNNI __attribute__((target("avx512f,avx512bw,avx512vnni")))
#define INLINE_VNNI static inline __attribute__((always_inline)) WITH_VNNI

// Each of sixteen 16-bit numbers twice.
INLINE_VNNI __m512i twice_vnni(const uint16_t *m) {
    __m512i all = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)m));
    return _mm512_or_si512(all, _mm512_slli_epi32(all, 16));
}

INLINE_VNNI __m512i two_weights_vnni(const void *x) {
    int32_t pair;
    memcpy(&pair, x, sizeof pair);
    return _mm512_set1_epi32(pair);
}

// sums: of error, product and square.
INLINE_VNNI void add_vnni(__m512i sums[3], __m512i y, __m512i r) {
    __m512i e = _mm512_sub_epi16(y, _mm512_slli_epi16(r, 8));
    sums[0] = _mm512_dpwssd_epi32(sums[0], e, e);
    sums[1] = _mm512_dpwssd_epi32(sums[1], e, r);
    sums[2] = _mm512_dpwssd_epi32(sums[2], r, r);
}

INLINE_VNNI void store_vnni(Scan *out, const __m512i sums[3]) {
    _mm512_storeu_si512(out->error, sums[0]);
    _mm512_storeu_si512(out->product, sums[1]);
    _mm512_storeu_si512(out->square, sums[2]);
}

static WITH_VNNI void scan_int4_vnni(Scan *out, const uint16_t *x, int n, const uint16_t m[SCAN_SCALES]) {
    const __m512i multipliers = twice_vnni(m), low = _mm512_set1_epi16(-8), high = _mm512_set1_epi16(7);
    __m512i sums[3] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()};
    for (int i = 0; i < n; i += 2) {
        __m512i y = _mm512_mulhrs_epi16(two_weights_vnni(x + i), multipliers);
        __m512i r = _mm512_mulhrs_epi16(y, _mm512_set1_epi16(1 << 7));
        add_vnni(sums, y, _mm512_max_epi16(_mm512_min_epi16(r, high), low));
    }
    store_vnni(out, sums);
}

static WITH_VNNI void scan_int8_vnni(Scan *out, const uint16_t *x, int n, const uint16_t m[SCAN_SCALES]) {
    const __m512i multipliers = twice_vnni(m), half = _mm512_set1_epi16(SCAN_ONE / 2), high = _mm512_set1_epi16(127);
    __m512i sums[3] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()};
    for (int i = 0; i < n; i += 2) {
        __m512i y = _mm512_mulhi_epu16(two_weights_vnni(x + i), multipliers);
        __m512i r = _mm512_srli_epi16(_mm512_add_epi16(y, half), 8);
        add_vnni(sums, y, _mm512_min_epi16(r, high));
    }
    store_vnni(out, sums);
}

static const QuantScan scan_vnni = {scan_int4_vnni, scan_int8_vnni};

const QuantScan *quant_scan_select(void) {
    return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") ? &scan_vnni
           : __builtin_cpu_supports("avx2")                                           ? &scan_avx2
                                                                                      : &quant_scan_portable;
}
