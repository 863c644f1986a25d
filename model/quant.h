// Quantised weights: a matrix is codes and scales, and the weight that both stand for is the float32 nearest to code ×
// scale. Three types of codes:
//   fp8   F8_E4M3, finite ones; a scale for each row
//   int8  I8, -127 to 127 (-128 is read, never written); a scale for each row, or for each group of 32,
//         64 or 128 columns
//   int4  U8, two to a byte, the lower column in the low nibble; value code - 8; scales as int8's
#ifndef QUANT_H
#define QUANT_H

#include "model.h"

typedef struct {
    DType dtype; // of the codes
    int group;   // columns that share a scale; 0: all of a row; QUANT_GROUP_FITS: what divides, see quant_fit
} QuantType;

enum { QUANT_GROUP_FITS = -1, QUANT_NAME = 16 };

static inline bool quant_is_group(int group) {
    return group == 32 || group == 64 || group == 128;
}

// fp8, int8, int8:32, int8:64, int8:128, int4 (QUANT_GROUP_FITS), int4:32, int4:64, int4:128.
// False: it is none of them.
bool quant_parse(const char *text, QuantType *type);
// A list of them, for messages; the same and "keep"; the same and "bf16".
extern const char quant_types[], quant_output_types[], quant_synthetic_types[];
// What a matrix holds, human-readable: "BF16", "fp8", "int8", "int4:128"; of int4 with a scale for each row "int4:row".
const char *quant_name(const Matrix *m, char name[QUANT_NAME]);

// Scales of a row with these columns in groups; 1 where it has one.
static inline int quant_groups(int group, int cols) {
    return group ? (cols + group - 1) / group : 1;
}
// How scales are stored: F32 for each row, BF16 for each group.
static inline DType quant_scale_dtype(QuantType type) {
    return type.group ? DTYPE_BF16 : DTYPE_F32;
}
// The largest of 128, 64 and 32 that divides all these columns, or 32.
int quant_fit(const int *cols, int n);

// The value of an e4m3 code; NaN for 0x7F and 0xFF.
float quant_fp8_value(uint8_t code);
// Number i of n stored as BF16, F16 or F32.
float quant_number(const void *numbers, DType dtype, size_t i);
// What a row's codes in that group are multiplied by.
float quant_scale(const Matrix *m, int row, int group);
// out [cols]: the weights of a row, of a matrix that may be quantised or not.
void quant_decode_row(float *out, const Matrix *m, int row);

// Quantises x [cols], all finite: codes (fp8, int8: [cols]; int4: [cols/2], cols even) and scales [quant_groups] of
// quant_scale_dtype. The scale is searched for that gives the least sum of squared errors after it is rounded to its
// dtype, and each code is the nearest. importance [cols + 8]: what the square of a column's error counts in that, not
// negative and finite; NULL: 1. The sum of squared errors, as they are, is returned. scratch: [cols + 8] floats. The
// result depends on type and x alone.
double quant_encode_row(QuantType type, const float *x, int cols, const float *importance, void *codes, void *scales,
                        float *scratch);

// Each of v [n], n a multiple of 8, becomes the value of the code that is nearest to v / scale, 0 where scale [n] is 0;
// and the codes of such values: n bytes, of DTYPE_U8 n / 2, n even.
void quant_round(DType codes, float *v, const float *scale, int n);
void quant_pack(DType dtype, const float *values, int n, void *codes);

// The first scale of a matrix that is not finite, as row × groups + group, or -1; the first code that is NaN, as an
// index in [rows][cols], or -1.
int64_t quant_find_bad_scale(const Matrix *m);
int64_t quant_find_nan(const Matrix *m);

#endif
