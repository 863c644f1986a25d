// Matrices that are held in another dtype than enters products: quantised ones, packed (packed.h), and 16-bit ones
// beside float32 products. (Codes for FP8 products are no wider in a slab, but in the order of columns.) They are
// widened slab by slab, a slab being all or some of their rows; and while one slab is in a product, the next is widened
// into the other, in a stream of its own. (Slabs of 12 MB, which stay in L2, cost more: 8B as int4 on an H200, prompts
// of 512 and 2048 tokens 35 and 64 ms, with whole matrices 20 and 57; bf16 has 14 and 52.)
//
//   widening's stream    waits for used[i]; widens a slab into slabs[i]; records widened[i]
//   the engine's stream  waits for widened[i]; the product; records used[i]
//
// widen_begin records both `used` in the engine's stream, so that a pass can be captured into a graph: its waits are
// for records of the same pass, and every slab that is widened is waited for.
#ifndef CUDA_WIDEN_H
#define CUDA_WIDEN_H

#include "state.h"

enum {
    SLAB_BYTES = 128 << 20, // of one of the two, at most, or what SLAB_ROWS rows take
    SLAB_ROWS = 128
};

// Before open: the size of slabs, of matrices of so many elements and rows of so many columns, at most.
void widen_size(Widening *widening, uint64_t most_elements, int most_cols, size_t element);
// s->widening: its stream and events, where there are slabs.
bool widen_open(CudaState *s, Error *err);
void widen_close(CudaState *s);
// Comes before the first product of a pass.
bool widen_begin(CudaState *s, Error *err);
// How many rows of w to widen at once to numbers or codes of so many bytes: a multiple of unit, at most SLAB_ROWS; all
// slabs of w but the last have so many.
int widen_rows(const CudaState *s, const Matrix *w, int unit, size_t element);
// *wide: these rows of a matrix in s->type, for what s->stream is given until widen_end. A quantised weight is code ×
// scale, rounded to float32 and to s->type; where scales_after_product has scales, the code.
bool widen(CudaState *s, Matrix *wide, const Matrix *rows, Error *err);
// The same of as many rows of two matrices that are alike, in one slab: for products that take both.
bool widen_both(CudaState *s, Matrix wide[2], const Matrix rows[2], Error *err);
// *codes: the same of an FP8 matrix as codes, e4m3 [rows][cols]. cols % 16 = 0.
bool unpack_codes(CudaState *s, Matrix *codes, const Matrix *rows, Error *err);
bool widen_end(CudaState *s, Error *err);

#endif
