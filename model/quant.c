#include "quant.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "threads.h"

enum { CHECK_PART = 1 << 16 };

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
