// Rounding with error feedback: GPTQ (Frantar et al. 2022). What counts is not the error E [rows][cols] of a matrix but
// that of its products with the inputs X [n][cols] of a text, tr(E H Eᵀ) with H = XᵀX. Columns are rounded in order,
// and each makes up for the errors of those before it. With H = (I + U) D (I + U)ᵀ, U strictly upper triangular,
// that is
//
//   code of column j = the nearest to w_j + Σ_{i<j} (w_i - ŵ_i) U_ij         (Chee et al. 2023: the same as GPTQ's)
//
// where ŵ is what the code stands for; each column then adds d_j times the square of its own rounding error. Here no
// product is fused with a sum and every sum has one order: of the same X the result depends neither on the threads nor
// on the instruction set.
#ifndef GPTQ_H
#define GPTQ_H

#include <signal.h>

#include "quant.h"

enum { GPTQ_ROWS = 64 }; // of a matrix, at most, that are rounded at a time

// h [cols][cols] += xᵀx, of which the upper triangle; x [n][cols]. By several threads.
void gram_add(float *h, int cols, const float *x, int n);

typedef struct {
    int cols;
    float *u;          // [cols][cols]: U above the diagonal
    float *importance; // [cols + 8]: the diagonal of H, damped, divided by its mean before
} Feedback;

// From h, with a hundredth of its mean diagonal added to the diagonal (damping); the identity where h is 0. h becomes
// f->u. False: out of memory, h is not finite, or *interrupted. The caller frees h and f->importance.
bool feedback_init(Feedback *f, float *h, int cols, const volatile sig_atomic_t *interrupted, Error *err);

// Floats of scratch memory that feedback_round takes.
size_t feedback_scratch(int cols);
// Quantises n rows, at most GPTQ_ROWS, of x [n][cols], all finite, as quant_encode_row does each: codes [n] rows,
// scales [n] [quant_groups]. A group's scale is searched once all columns before it are rounded, and weighs its columns
// by their importance. errors [n]: each row's sum of squared errors, as they are.
void feedback_round(const Feedback *f, QuantType type, const float *x, int n, void *codes, void *scales, double *errors,
                    float *scratch);

#endif
