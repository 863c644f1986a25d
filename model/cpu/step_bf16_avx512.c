// Steps in bf16 with AVX512-BF16: a word is a pair of bf16, whose products an instruction adds to a float32. Codes are
// exact in bf16. (The instruction takes a subnormal number for zero, and makes a zero of a subnormal sum.)
#include <pthread.h>

#include "../quant.h"
#include "products_avx512.h"
#include "widen_avx512.h"

#define WITH_STEP \
    __attribute__(( \
        target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512bf16,avx2,fma,f16c,tune=icelake-server")))
#define WITH_STEP_TYPE WITH_TYPE_OF_PAIRS
#define COLUMNS_OF_WORD 2
#define StepLine PairLine
#define LOAD_LINE load_pair_line
#define WIDEN widen_pairs
#define MULTIPLY(w, x) MULTIPLY_ADD(_mm512_setzero_ps(), w, x)
#define MULTIPLY_ADD(sum, w, x) _mm512_dpbf16_ps(sum, (__m512bh)(w), (__m512bh)(x))
#define CODE_UNIT(dtype) 1.0f
#define PAIR_INLINE static inline __attribute__((always_inline)) WITH_STEP

// ---- codes ----------------------------------------------------------------------------------------------------------

// Of codes of a byte, by their lower seven bits: the low and the high byte of a magnitude.
enum { MAGNITUDES = 128 };
typedef struct {
    uint8_t low[MAGNITUDES], high[MAGNITUDES];
} Magnitudes;
static Magnitudes int8_magnitude __attribute__((aligned(64))), fp8_magnitude __attribute__((aligned(64)));

static uint16_t bf16_of(float value) { // one that is exact
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (uint16_t)(bits >> 16);
}

static void add_magnitude(Magnitudes *m, int code, float value) {
    m->low[code] = (uint8_t)bf16_of(value);
    m->high[code] = (uint8_t)(bf16_of(value) >> 8);
}

static void make_tables(void) {
    for (int i = 0; i < MAGNITUDES; i++) {
        add_magnitude(&int8_magnitude, i, i ? (float)i : 128); // 0 has another way
        add_magnitude(&fp8_magnitude, i, i < MAGNITUDES - 1 ? quant_fp8_value((uint8_t)i) : 0);
    }
}

// A line of bytes as the low and the high bytes of their values; of others as it is, in `low`.
typedef struct {
    __m512i low, high;
} PairLine;

PAIR_INLINE PairLine load_pair_line(const char *at, DType dtype) {
    const __m512i line = load_bytes(at, dtype), signs = _mm512_set1_epi8((char)0x80);
    if (dtype != DTYPE_I8 && dtype != DTYPE_F8_E4M3) return (PairLine){line, line};
    const Magnitudes *m = dtype == DTYPE_I8 ? &int8_magnitude : &fp8_magnitude;
    const __m512i low0 = _mm512_load_si512(m->low), low1 = _mm512_load_si512(m->low + LINE),
                  high0 = _mm512_load_si512(m->high), high1 = _mm512_load_si512(m->high + LINE);
    // The lower seven bits choose: of int8 0 is -128 or 0, which is masked.
    const __m512i magnitude = dtype == DTYPE_I8 ? _mm512_abs_epi8(line) : line;
    const __mmask64 some = dtype == DTYPE_I8 ? _mm512_test_epi8_mask(line, line) : ~(__mmask64)0;
    __m512i low = _mm512_permutex2var_epi8(low0, magnitude, low1),
            high = dtype == DTYPE_I8 ? _mm512_maskz_permutex2var_epi8(some, high0, magnitude, high1)
                                     : _mm512_permutex2var_epi8(high0, magnitude, high1);
    return (PairLine){low, _mm512_ternarylogic_epi32(line, signs, high, 0xEA)}; // line & signs | high
}

// Vector j of a line. Words are columns in this order: BF16, as they are; bytes, 8 of each 16; int4, one of each 4.
PAIR_INLINE __m512i widen_pairs(PairLine line, int j, DType dtype) {
    if (dtype == DTYPE_U8) return _mm512_permutexvar_epi16(_mm512_srli_epi16(line.low, 4 * (unsigned)j), int4_values());
    if (dtype == DTYPE_BF16) return line.low;
    return j == 0 ? _mm512_unpacklo_epi8(line.low, line.high) : _mm512_unpackhi_epi8(line.low, line.high);
}

PAIR_INLINE void arrange_line(uint32_t *out, const float *x, DType dtype) {
    const int n = weights_of_lane(dtype) / 2;
    __m512 v[8];
    __m512i pairs[4];
    for (int j = 0; j < 2 * n; j++) v[j] = _mm512_loadu_ps(x + j * LANES);
    if (dtype == DTYPE_BF16) {
        pairs[0] = pack_pairs(v[0], v[1]);
    } else if (dtype == DTYPE_U8) {
        take_apart(v, 4);
        take_apart(v + 4, 4);
        for (int j = 0; j < 4; j++) pairs[j] = pack_pairs(v[j], v[4 + j]);
    } else {
        pairs[0] = pack_pairs(_mm512_shuffle_f32x4(v[0], v[1], 0x44), _mm512_shuffle_f32x4(v[2], v[3], 0x44));
        pairs[1] = pack_pairs(_mm512_shuffle_f32x4(v[0], v[1], 0xEE), _mm512_shuffle_f32x4(v[2], v[3], 0xEE));
    }
    for (int j = 0; j < n; j++) _mm512_store_si512(out + j * LANES, pairs[j]);
}

#include "step_avx512.h"

bool step_bf16_supported(void) {
    return avx512_bf16_supported() && __builtin_cpu_supports("avx512vbmi");
}

void step_bf16_avx512(float *y, const float *x, const Matrix *w, int T) {
    static pthread_once_t made = PTHREAD_ONCE_INIT;
    pthread_once(&made, make_tables);
    multiply_step(y, x, w, T);
}
