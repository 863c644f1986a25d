// Quantised weights against plain loops in float64: every code's value, decoding to the bit, and scales against all
// that could have been chosen.
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "../model/quant.h"
#include "../model/quant_scan.h"
#include "check.h"

enum { MAX_COLS = 4096 + 8 };

static uint64_t state = 1;

static double uniform(void) { // in [0, 1)
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (double)(state >> 11) * 0x1p-53;
}

static double normal(void) {
    double sum = 0;
    for (int i = 0; i < 12; i++) sum += uniform();
    return sum - 6;
}

static const QuantType types[] = {{DTYPE_F8_E4M3, 0}, {DTYPE_I8, 0},  {DTYPE_I8, 32}, {DTYPE_I8, 64}, {DTYPE_I8, 128},
                                  {DTYPE_U8, 0},      {DTYPE_U8, 32}, {DTYPE_U8, 64}, {DTYPE_U8, 128}};
enum { N_TYPES = sizeof types / sizeof *types };

// By the format's definition: 1 sign, 4 bits of exponent with bias 7, 3 of fraction; no infinities, NaN is all ones.
static double fp8_by_definition(int code) {
    int exponent = code >> 3 & 15, fraction = code & 7;
    double v = (code & 127) == 127 ? NAN
               : exponent          ? (1 + fraction / 8.0) * pow(2, exponent - 7)
                                   : fraction / 8.0 * pow(2, -6);
    return code & 128 ? -v : v;
}

static double code_by_definition(const uint8_t *codes, DType dtype, int i) {
    if (dtype == DTYPE_F8_E4M3) return fp8_by_definition(codes[i]);
    if (dtype == DTYPE_I8) return codes[i] < 128 ? codes[i] : codes[i] - 256;
    return (i % 2 ? codes[i / 2] / 16 : codes[i / 2] % 16) - 8;
}

static double number_by_definition(const void *numbers, DType dtype, size_t i) {
    if (dtype == DTYPE_F32) return (double)((const float *)numbers)[i];
    int bits = dtype == DTYPE_F16 ? 10 : 7, h = ((const uint16_t *)numbers)[i];
    int bias = dtype == DTYPE_F16 ? 15 : 127, exponent = (h & 0x7FFF) >> bits, fraction = h & ((1 << bits) - 1);
    double v = exponent ? ldexp((1 << bits) + fraction, exponent - bias - bits) : ldexp(fraction, 1 - bias - bits);
    return h & 0x8000 ? -v : v;
}

static void test_fp8_all_codes(void) {
    // torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float(): a few of them, and its largest
    static const struct {
        int code;
        double value;
    } golden[] = {{0x01, 0.001953125}, {0x07, 0.013671875}, {0x08, 0.015625}, {0x38, 1},
                  {0x3F, 1.875},       {0x7E, 448},         {0xFE, -448}};
    for (size_t i = 0; i < sizeof golden / sizeof *golden; i++)
        CHECK((double)quant_fp8_value((uint8_t)golden[i].code) == golden[i].value);
    for (int code = 0; code < 256; code++) {
        double want = fp8_by_definition(code), found = (double)quant_fp8_value((uint8_t)code);
        CHECK(isnan(want) ? isnan(found) : want == found && !signbit(want) == !signbit(found));
    }
    CHECK(isnan(quant_fp8_value(0x7F)) && isnan(quant_fp8_value(0xFF)));
    test_end("test_fp8_all_codes");
}

// Random codes and scales of each dtype, subnormal ones among them: the float32 nearest to code × scale.
static void test_decode_is_the_nearest_float(void) {
    static const int widths[] = {2, 30, 32, 34, 64, 100, 128, 192, 448, 688};
    static uint8_t codes[2 * 688];
    static float out[688];
    for (int t = 0; t < N_TYPES; t++)
        for (int s = DTYPE_BF16; s <= DTYPE_F32; s++)
            for (size_t c = 0; c < sizeof widths / sizeof *widths; c++) {
                int cols = widths[c], groups = quant_groups(types[t].group, cols);
                uint16_t halves[64];
                float floats[64];
                Matrix m = {.data = codes,
                            .dtype = types[t].dtype,
                            .scale_dtype = (DType)s,
                            .rows = 2,
                            .cols = cols,
                            .group = types[t].group ? types[t].group : WHOLE_ROW};
                m.scale = s == DTYPE_F32 ? (void *)floats : halves;
                for (int i = 0; i < 2 * groups; i++) {
                    halves[i] = (uint16_t)(uniform() * 65536);
                    if (s == DTYPE_F16 ? (halves[i] & 0x7C00) == 0x7C00 : (halves[i] & 0x7F80) >= 0x7B80)
                        halves[i] &= 0x83FF;
                    floats[i] = (float)(normal() * pow(2, uniform() * 200 - 160));
                }
                for (int i = 0; i < 2 * cols; i++) {
                    codes[i] = (uint8_t)(uniform() * 256);
                    if (m.dtype == DTYPE_F8_E4M3 && (codes[i] & 127) == 127) codes[i]--;
                }
                CHECK(matrix_bytes(&m) == 2 * ((uint64_t)cols / (m.dtype == DTYPE_U8 ? 2 : 1) +
                                               (uint64_t)groups * (s == DTYPE_F32 ? 4 : 2)));
                for (int row = 0; row < 2; row++) {
                    quant_decode_row(out, &m, row);
                    for (int i = 0; i < cols; i++) {
                        int g = types[t].group ? i / types[t].group : 0;
                        double scale = number_by_definition(m.scale, (DType)s, (size_t)(row * groups + g));
                        double code = code_by_definition(codes + (uint64_t)row * matrix_row_bytes(&m), m.dtype, i);
                        if (out[i] != (float)(code * scale)) // the product is exact in float64
                            test_fail("%s of %d columns, scales %s: row %d, column %d is %a, expected %a",
                                      dtype_names[m.dtype], cols, dtype_names[s], row, i, (double)out[i], code * scale);
                    }
                }
            }
    test_end("test_decode_is_the_nearest_float");
}

static void test_decode_numbers(void) {
    static const uint16_t bf16[] = {0x3F80, 0xC040, 0x0001, 0x8000}, f16[] = {0x3C00, 0xC200, 0x0001, 0x8000};
    static const float f32[] = {1, -3, 0x1p-149f, 0};
    float out[4];
    quant_decode_row(out, &(Matrix){.data = bf16, .dtype = DTYPE_BF16, .rows = 1, .cols = 4}, 0);
    CHECK(out[0] == 1 && out[1] == -3 && out[2] == 0x1p-133f && out[3] == 0 && signbit(out[3]));
    quant_decode_row(out, &(Matrix){.data = f16, .dtype = DTYPE_F16, .rows = 1, .cols = 4}, 0);
    CHECK(out[0] == 1 && out[1] == -3 && out[2] == 0x1p-24f && out[3] == 0 && signbit(out[3]));
    quant_decode_row(out, &(Matrix){.data = f32, .dtype = DTYPE_F32, .rows = 2, .cols = 2}, 1);
    CHECK(out[0] == 0x1p-149f && out[1] == 0);
    test_end("test_decode_numbers");
}

// ---- encoding -------------------------------------------------------------------------------------------------------

typedef struct {
    uint8_t codes[MAX_COLS];
    float scales[MAX_COLS / 32 + 1]; // F32, or BF16 in the same memory
    double error;
    Matrix matrix;
} Row;

static Row *encode_with(QuantType type, const float *x, const float *importance, int cols) {
    static Row r;
    static float scratch[MAX_COLS];
    memset(&r, 0xA5, sizeof r);
    r.error = quant_encode_row(type, x, cols, importance, r.codes, r.scales, scratch);
    r.matrix = (Matrix){.data = r.codes,
                        .scale = r.scales,
                        .dtype = type.dtype,
                        .scale_dtype = quant_scale_dtype(type),
                        .rows = 1,
                        .cols = cols,
                        .group = type.group ? type.group : WHOLE_ROW};
    return &r;
}

static Row *encode(QuantType type, const float *x, int cols) {
    return encode_with(type, x, NULL, cols);
}

// Of all codes the least squared error at a scale, of the float32 weights that they stand for.
static double error_at(const float *x, int n, double scale, DType dtype) {
    double sum = 0;
    for (int i = 0; i < n; i++) {
        double best = INFINITY, q = (double)x[i] / scale;
        if (dtype == DTYPE_F8_E4M3) {
            for (int code = 0; code < 256; code++) {
                double e = (double)x[i] - (double)(float)(fp8_by_definition(code) * scale);
                if (e * e < best) best = e * e;
            }
        } else {
            double low = dtype == DTYPE_I8 ? -127 : -8, high = dtype == DTYPE_I8 ? 127 : 7;
            q = fmin(fmax(scale != 0 ? nearbyint(q) : 0, low), high);
            double e = (double)x[i] - (double)(float)(q * scale);
            best = e * e;
        }
        sum += best;
    }
    return sum;
}

// A scale as it is stored: F32, or BF16, to which ties go to even.
static double stored(double scale, QuantType type) {
    if (!type.group) return (double)(float)scale;
    int exponent;
    double fraction = frexp(scale, &exponent);
    return ldexp(nearbyint(fraction * 256), exponent - 8);
}

static void fill(float *x, int n, int kind) {
    for (int i = 0; i < n; i++) {
        x[i] = (float)(normal() * 0.02);
        if (kind == 1 && i % 37 == 0) x[i] *= 20; // outlier columns
        if (kind == 2) x[i] = (float)(uniform() - 0.5);
        if (kind == 3) x[i] = (float)(pow(normal(), 3) * 0.01); // long tails
        if (kind == 4 && i % 2) x[i] = 0;
    }
}
enum { KINDS = 5 };

// The error that is returned is the decoded row's, codes are the nearest to their scale, and what is not a code's value
// never comes.
static void test_encode_takes_nearest_codes(void) {
    static float x[MAX_COLS], out[MAX_COLS];
    static const int widths[] = {2, 30, 32, 34, 64, 100, 192, 448, 688};
    for (int t = 0; t < N_TYPES; t++)
        for (size_t c = 0; c < sizeof widths / sizeof *widths; c++)
            for (int kind = 0; kind < KINDS; kind++) {
                int cols = widths[c], width = types[t].group ? types[t].group : cols;
                fill(x, cols, kind);
                Row *r = encode(types[t], x, cols);
                quant_decode_row(out, &r->matrix, 0);
                double sum = 0, least = 0;
                for (int i = 0; i < cols; i++) sum += pow((double)x[i] - (double)out[i], 2);
                for (int g = 0, i = 0; i < cols; g++, i += width)
                    least += error_at(x + i, cols - i < width ? cols - i : width, (double)quant_scale(&r->matrix, 0, g),
                                      types[t].dtype);
                if (fabs(sum - r->error) > 1e-9 * sum || sum > least * (1 + 1e-5))
                    test_fail("%s, %d columns in groups of %d: error %g, returned %g, of the nearest codes %g",
                              dtype_names[types[t].dtype], cols, types[t].group, sum, r->error, least);
                for (int i = 0; i < cols; i++)
                    CHECK(types[t].dtype == DTYPE_F8_E4M3 ? (r->codes[i] & 127) != 127
                          : types[t].dtype == DTYPE_I8    ? r->codes[i] != 128
                                                          : true);
                size_t end = (size_t)cols / (types[t].dtype == DTYPE_U8 ? 2 : 1);
                CHECK(r->codes[end] == 0xA5); // nothing beyond
            }
    test_end("test_encode_takes_nearest_codes");
}

// Beside an exhaustive search over 3000 scales of both signs: on average hardly worse, and far better than the largest
// magnitude divided by the largest code.
static void test_encode_finds_the_best_scale(void) {
    static float x[MAX_COLS];
    static const double within[] = {[DTYPE_F8_E4M3] = 1.01, [DTYPE_I8] = 1.04, [DTYPE_U8] = 1.01};
    for (int t = 0; t < N_TYPES; t++) {
        int n = types[t].group ? types[t].group : 256, trials = types[t].dtype == DTYPE_F8_E4M3 ? 3 : 20;
        double found = 0, best_of_all = 0, simple = 0;
        for (int trial = 0; trial < trials; trial++)
            for (int kind = 0; kind < 3; kind++) {
                fill(x, n, kind);
                double norm = 0, largest = 0, best = INFINITY;
                for (int i = 0; i < n; i++) norm += pow((double)x[i], 2), largest = fmax(largest, fabs((double)x[i]));
                double most = types[t].dtype == DTYPE_F8_E4M3 ? 448 : types[t].dtype == DTYPE_I8 ? 127 : 7;
                int steps = types[t].dtype == DTYPE_F8_E4M3 ? 200 : 1500;
                for (int sign = types[t].dtype == DTYPE_U8 ? -1 : 1; sign <= 1; sign += 2)
                    for (int k = 0; k < steps; k++)
                        best =
                            fmin(best, error_at(x, n, stored(sign * largest / most * (0.5 + 0.8 * k / steps), types[t]),
                                                types[t].dtype));
                found += encode(types[t], x, n)->error / norm;
                best_of_all += best / norm;
                simple += error_at(x, n, largest / most, types[t].dtype) / norm;
            }
        if (found > best_of_all * within[types[t].dtype])
            test_fail("%s in groups of %d: %g, the best scales give %g", dtype_names[types[t].dtype], types[t].group,
                      found, best_of_all);
        if (types[t].dtype == DTYPE_U8 && found > simple * 0.9)
            test_fail("int4 in groups of %d: %g, the largest over 7 gives %g", types[t].group, found, simple);
        if (test_wanted("test_encode_finds_the_best_scale"))
            printf("   %s in groups of %d: %.4f of the error of the best scale, %.3f of that of largest / %g\n",
                   dtype_names[types[t].dtype], types[t].group, found / best_of_all, found / simple,
                   types[t].dtype == DTYPE_F8_E4M3 ? 448.0
                   : types[t].dtype == DTYPE_I8    ? 127.0
                                                   : 7.0);
    }
    test_end("test_encode_finds_the_best_scale");
}

// From the smallest subnormal to nearly the largest float: the relative error is the same wherever scales are normal.
static void test_encode_any_magnitude(void) {
    static float x[256], y[256];
    fill(x, 256, 0);
    for (int t = 0; t < N_TYPES; t++) {
        const double at_one = encode(types[t], x, 256)->error;
        for (int e = -110; e <= 126; e += 4) {
            for (int i = 0; i < 256; i++) y[i] = ldexpf(x[i], e);
            double error = ldexp(encode(types[t], y, 256)->error, -2 * e);
            if (fabs(error - at_one) > 1e-6 * at_one)
                test_fail("%s in groups of %d, times 2^%d: %g, expected %g", dtype_names[types[t].dtype],
                          types[t].group, e, error, at_one);
        }
        for (int e = -149; e < -110; e++) { // subnormal scales: finite, and no worse than zero
            for (int i = 0; i < 256; i++) y[i] = ldexpf(x[i], e);
            double sum = 0;
            for (int i = 0; i < 256; i++) sum += pow((double)y[i], 2);
            Row *r = encode(types[t], y, 256);
            CHECK(quant_find_bad_scale(&r->matrix) < 0 && r->error <= sum);
        }
        memset(y, 0, sizeof y);
        Row *r = encode(types[t], y, 256);
        CHECK(r->error == 0 && quant_scale(&r->matrix, 0, 0) == 0);
        quant_decode_row(y, &r->matrix, 0);
        for (int i = 0; i < 256; i++) CHECK(y[i] == 0);
    }
    test_end("test_encode_any_magnitude");
}

// A row that was decoded is encoded as it was.
static void test_encode_of_codes_is_exact(void) {
    static float x[256];
    for (int t = 0; t < N_TYPES; t++)
        for (int trial = 0; trial < 20; trial++) {
            int n = types[t].group ? types[t].group : 256;
            double scale = trial % 2 && types[t].dtype == DTYPE_U8 ? -0.0078125 : 0.0078125;
            for (int i = 0; i < n; i++) {
                uint8_t code = (uint8_t)(uniform() * 256);
                if (types[t].dtype == DTYPE_I8 && code == 128) code = 0;
                if (types[t].dtype == DTYPE_F8_E4M3 && (code & 127) == 127) code = 0;
                x[i] = (float)(code_by_definition(&code, types[t].dtype, 0) * scale);
            }
            x[0] = (float)(scale * (types[t].dtype == DTYPE_U8 ? -8 : types[t].dtype == DTYPE_I8 ? -127 : -448));
            if (encode(types[t], x, n)->error != 0)
                test_fail("%s in groups of %d: error %g", dtype_names[types[t].dtype], types[t].group,
                          encode(types[t], x, n)->error);
        }
    test_end("test_encode_of_codes_is_exact");
}

// The sums of a scan, by their definition in float64; those of this processor's instruction set and the portable ones
// are the same, for any weights and scales.
static void test_scans_are_the_same_everywhere(void) {
    const QuantScan *const scans[] = {&quant_scan_portable, quant_scan_select()};
    for (int trial = 0; trial < 200; trial++) {
        uint16_t x[128], m[SCAN_SCALES];
        int n = 2 * (1 + (int)(uniform() * 64)), int4 = trial % 2;
        for (int i = 0; i < n; i++)
            x[i] = int4 ? (uint16_t)(int)((uniform() * 2 - 1) * 32767) : (uint16_t)(uniform() * 65535);
        for (int s = 0; s < SCAN_SCALES; s++) {
            double quotient = int4 ? (uniform() * 2 - 1) * 12 : 90 + uniform() * 52;
            m[s] = (uint16_t)(int)(quotient * SCAN_ONE);
        }
        if (trial < 2) x[0] = int4 ? 0x8001 : 0xFFFF; // the largest
        for (int which = 0; which < 2; which++) {
            Scan found;
            (int4 ? scans[which]->int4 : scans[which]->int8)(&found, x, n, m);
            for (int s = 0; s < SCAN_SCALES; s++) {
                double error = 0, product = 0, square = 0;
                for (int i = 0; i < n; i++) {
                    double y = int4 ? floor((int16_t)x[i] * (double)(int16_t)m[s] / 32768 + 0.5)
                                    : floor(x[i] * (double)m[s] / 65536);
                    double r = floor(y / SCAN_ONE + 0.5), e;
                    r = fmin(fmax(r, int4 ? -8 : 0), int4 ? 7 : 127);
                    e = y - SCAN_ONE * r;
                    error += e * e;
                    product += e * r;
                    square += r * r;
                }
                if (found.error[s] != error || found.product[s] != product || found.square[s] != square)
                    test_fail("%s, %s, scale %d: %d %d %d, expected %g %g %g", which ? "selected" : "portable",
                              int4 ? "int4" : "int8", s, found.error[s], found.product[s], found.square[s], error,
                              product, square);
            }
        }
    }
    test_end("test_scans_are_the_same_everywhere");
}

// ---- names and checks -----------------------------------------------------------------------------------------------

static void test_names(void) {
    static const struct {
        const char *text;
        QuantType type;
    } cases[] = {{"fp8", {DTYPE_F8_E4M3, 0}},
                 {"int8", {DTYPE_I8, 0}},
                 {"int8:32", {DTYPE_I8, 32}},
                 {"int4:128", {DTYPE_U8, 128}}};
    QuantType type;
    char name[QUANT_NAME];
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        CHECK(quant_parse(cases[i].text, &type) && type.dtype == cases[i].type.dtype &&
              type.group == cases[i].type.group);
        Matrix m = {.dtype = type.dtype, .rows = 1, .cols = 688, .group = type.group ? type.group : WHOLE_ROW};
        CHECK(strcmp(quant_name(&m, name), cases[i].text) == 0);
        CHECK(strstr(quant_types, cases[i].text));
    }
    CHECK(quant_parse("int4", &type) && type.group == QUANT_GROUP_FITS);
    CHECK(!quant_parse("", &type) && !quant_parse("int4:16", &type) && !quant_parse("fp8:32", &type) &&
          !quant_parse("INT8", &type));
    CHECK(strcmp(quant_name(&(Matrix){.dtype = DTYPE_F16, .cols = 4}, name), "F16") == 0);
    CHECK(strcmp(quant_name(&(Matrix){.dtype = DTYPE_U8, .cols = 688, .group = WHOLE_ROW}, name), "int4:row") == 0);
    CHECK(quant_fit((const int[]){4096, 14336}, 2) == 128 && quant_fit((const int[]){256, 448}, 2) == 64 &&
          quant_fit((const int[]){256, 688}, 2) == 32 && quant_fit((const int[]){96}, 1) == 32);
    test_end("test_names");
}

static void test_checks_find_what_is_refused(void) {
    enum { ROWS = 300, COLS = 700 };
    uint8_t *codes = calloc(ROWS, COLS);
    static float scales[ROWS];
    Matrix m = {.data = codes,
                .scale = scales,
                .dtype = DTYPE_F8_E4M3,
                .scale_dtype = DTYPE_F32,
                .rows = ROWS,
                .cols = COLS,
                .group = WHOLE_ROW};
    CHECK(quant_find_nan(&m) == -1 && quant_find_bad_scale(&m) == -1);
    static const int places[] = {ROWS * COLS - 1, 65536, 65535, 7, 0};
    for (size_t i = 0; i < sizeof places / sizeof *places; i++) { // the first of several
        codes[places[i]] = i % 2 ? 0x7F : 0xFF;
        CHECK(quant_find_nan(&m) == places[i]);
    }
    m.dtype = DTYPE_I8;
    CHECK(quant_find_nan(&m) == -1);
    scales[299] = INFINITY;
    CHECK(quant_find_bad_scale(&m) == 299);
    scales[3] = NAN;
    CHECK(quant_find_bad_scale(&m) == 3);
    free(codes);
    test_end("test_checks_find_what_is_refused");
}

static double weighted_error(const Row *r, const float *x, const float *importance, int cols) {
    static float out[MAX_COLS];
    double sum = 0;
    quant_decode_row(out, &r->matrix, 0);
    for (int i = 0; i < cols; i++)
        sum += (importance ? (double)importance[i] : 1) * ((double)x[i] - (double)out[i]) *
               ((double)x[i] - (double)out[i]);
    return sum;
}

// Columns that count more are the more exact; where all count alike, the error is that of a search without; where none
// does, the row is that one's.
static void test_importance(void) {
    static float x[MAX_COLS], skewed[MAX_COLS + 8], alike[MAX_COLS + 8], none[MAX_COLS + 8];
    enum { COLS = 448 };
    for (int i = 0; i < COLS; i++) {
        skewed[i] = i % 5 ? 0.05f : 4.8f;
        alike[i] = 1;
    }
    for (int t = 0; t < N_TYPES; t++) {
        double with = 0, without = 0, plain = 0, equal = 0;
        for (int row = 0; row < 40; row++) {
            fill(x, COLS, row % KINDS);
            const Row r = *encode(types[t], x, COLS);
            Row by_definition = r;
            by_definition.matrix.data = by_definition.codes;
            by_definition.matrix.scale = by_definition.scales;
            without += weighted_error(&by_definition, x, skewed, COLS);
            plain += r.error;
            const Row *w = encode_with(types[t], x, skewed, COLS);
            with += weighted_error(w, x, skewed, COLS);
            CHECK(fabs(w->error / weighted_error(w, x, NULL, COLS) - 1) < 1e-4); // what is returned counts all alike
            equal += encode_with(types[t], x, alike, COLS)->error;
            w = encode_with(types[t], x, none, COLS);
            CHECK(memcmp(w->codes, r.codes, sizeof r.codes) == 0 && memcmp(w->scales, r.scales, sizeof r.scales) == 0);
        }
        const double most = types[t].dtype == DTYPE_U8 ? 0.93 : 1;
        if (!(with < most * without))
            test_fail("%s in groups of %d: %g of the weighted error, expected below %g", dtype_names[types[t].dtype],
                      types[t].group, with / without, most);
        if (!(equal < 1.002 * plain))
            test_fail("%s in groups of %d: %g of the error where all count alike", dtype_names[types[t].dtype],
                      types[t].group, equal / plain);
    }
    test_end("test_importance");
}

int main(void) {
    test_fp8_all_codes();
    test_decode_is_the_nearest_float();
    test_decode_numbers();
    test_encode_takes_nearest_codes();
    test_encode_finds_the_best_scale();
    test_encode_any_magnitude();
    test_encode_of_codes_is_exact();
    test_importance();
    test_scans_are_the_same_everywhere();
    test_names();
    test_checks_find_what_is_refused();
    return tests_summary();
}
