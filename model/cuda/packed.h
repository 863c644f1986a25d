// How a quantised matrix lies on the device: row after row, the codes and the scales of groups (quant.h) together, so
// that a row is one run of bytes and a part of it one copy. Where a row has one scale, Matrix.scale is those, float32
// [rows]. No GPU is needed to call what is here; tests/test_plan.c does.
//
//   row     blocks of 1024 columns
//   block   codes of its 1024 columns, 8 chunks of 128; then its groups' scales, in the order of columns: bf16, or
//           float32 where the file has them in another type
//   chunk   of lane t of 4, the codes of columns 8t .. +7 of each 32: 16 bytes of 4 bits a code; of 8 bits 16 bytes for
//           the first two 32 columns, and 64 bytes further on those of the other two. So a lane's 8 columns of a row
//           are what it has of two mmas of 16 columns (fused_packed.cuh)
//   codes   8 bits: of each 4 columns the bytes of columns 0, 2, 1, 3. 4 bits: of each 8 columns the nibbles of columns
//           0, 2, 4, 6, 1, 3, 5, 7, from the lowest on. So two columns that are neighbours are 16 bits apart, as the
//           two numbers of a bf16 pair. Of e4m3 the bits of every two bytes are braided (packed_fp8): the first code
//           has its bits where a bf16 has them, the second what is left
//
// Columns that a last block has too many are codes of zero with scales of zero.
#ifndef PACKED_H
#define PACKED_H

#include "rule.h"

enum {
    PACK_COLUMNS = 1024, // of a block
    PACK_CHUNK = 128,    // columns of a chunk
};

// How the rows of a matrix are packed.
typedef struct Packing {
    int bits;        // of a code: 8 or 4
    int blocks;      // of a row
    int group;       // columns that share a scale; 0: a row has one
    int scale_bytes; // of a group's scale: 2 or 4; 0: a row has one
    int block_bytes, row_bytes;
} Packing;

RULE Packing packing_of(int bits, int group, int scale_bytes, int cols) {
    Packing p = {bits, (cols + PACK_COLUMNS - 1) / PACK_COLUMNS, group, group ? scale_bytes : 0, 0, 0};
    p.block_bytes = PACK_COLUMNS * bits / 8 + (group ? PACK_COLUMNS / group * scale_bytes : 0);
    p.row_bytes = p.blocks * p.block_bytes;
    return p;
}

// Where the code of column c is, in units of a code from the start of its block.
RULE int packed_place(int bits, int c) {
    int t = c % 32 / 8, j = c % PACK_CHUNK / 32, i = c % 8;
    int within = bits == 8 ? i / 4 * 4 + i % 2 * 2 + i % 4 / 2 : i % 2 * 4 + i / 2;
    return c / PACK_CHUNK * PACK_CHUNK + (bits == 8 ? j / 2 * 64 + t * 16 + j % 2 * 8 : t * 32 + j * 8) + within;
}
// The column whose code is there: packed_place's inverse.
RULE int packed_column(int bits, int place) {
    int at = place % PACK_CHUNK, i = place % 8;
    int t = bits == 8 ? at % 64 / 16 : at / 32, j = bits == 8 ? at / 64 * 2 + at % 16 / 8 : at % 32 / 8;
    int within = bits == 8 ? i / 4 * 4 + i % 2 * 2 + i % 4 / 2 : i % 4 * 2 + i / 4;
    return place / PACK_CHUNK * PACK_CHUNK + j * 32 + t * 8 + within;
}
// Two e4m3 codes s eeee mmm, a and b, in 16 bits: those of a at 15 and 10 to 4, the sign, the low bit of
// the exponent and the mantissa of b at 11 and 3 to 0, which a shift by 4 to the left brings to 15 and 7 to 4, and the
// rest of its exponent at 14 to 12, which a shift to the right brings to 10 to 8.
RULE unsigned packed_fp8(unsigned a, unsigned b) {
    return (a & 0x80) << 8 | (a & 0x7f) << 4 | (b & 0x80) << 4 | (b & 0x70) << 8 | (b & 0x0f);
}
RULE unsigned packed_fp8_first(unsigned both) {
    return (both >> 8 & 0x80) | (both >> 4 & 0x7f);
}
RULE unsigned packed_fp8_second(unsigned both) {
    return (both >> 4 & 0x80) | (both >> 8 & 0x70) | (both & 0x0f);
}

// Where the scale of column c's group is, in bytes from the start of the row.
RULE int packed_scale(const Packing *p, int c) {
    return c / PACK_COLUMNS * p->block_bytes + PACK_COLUMNS * p->bits / 8 +
           c % PACK_COLUMNS / p->group * p->scale_bytes;
}

#endif
