// x86-64: AVX2 where the processor has it. A vector is eight scales by two weights: a scale's two 16-bit numbers are
// neighbours, which vpmaddwd multiplies and adds, so that no sum crosses lanes.
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

INLINE void store(Scan *out, const Sums *sums) {
    memcpy(out->error, &sums->error, sizeof out->error);
    memcpy(out->product, &sums->product, sizeof out->product);
    memcpy(out->square, &sums->square, sizeof out->square);
}

static WITH_AVX2 void scan_int4(Scan *out, const int16_t *x, int n, const int16_t m[SCAN_SCALES]) {
    const __m256i scales = twice(m), to_code = _mm256_set1_epi16(1 << 7), low = _mm256_set1_epi16(-8), high = _mm256_set1_epi16(7);
    Sums sums = {_mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256()};
    for (int i = 0; i < n; i += 2) {
        __m256i y = _mm256_mulhrs_epi16(two_weights(x + i), scales); // (a · b + 2^14) >> 15
        __m256i r = _mm256_mulhrs_epi16(y, to_code);
        add(&sums, y, _mm256_max_epi16(_mm256_min_epi16(r, high), low));
    }
    store(out, &sums);
}

static WITH_AVX2 void scan_int8(Scan *out, const uint16_t *x, int n, const uint16_t m[SCAN_SCALES]) {
    const __m256i scales = twice(m), half = _mm256_set1_epi16(SCAN_ONE / 2), high = _mm256_set1_epi16(127);
    Sums sums = {_mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256()};
    for (int i = 0; i < n; i += 2) {
        __m256i y = _mm256_mulhi_epu16(two_weights(x + i), scales);
        __m256i r = _mm256_srli_epi16(_mm256_add_epi16(y, half), 8);
        add(&sums, y, _mm256_min_epi16(r, high));
    }
    store(out, &sums);
}

static const QuantScan scan_avx2 = {scan_int4, scan_int8};

const QuantScan *quant_scan_select(void) {
    return __builtin_cpu_supports("avx2") ? &scan_avx2 : &quant_scan_portable;
}
