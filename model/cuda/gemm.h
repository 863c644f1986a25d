// Matrix products and RoPE by cuBLAS. Sums in float32; in float32 the default math mode never takes TF32.
#ifndef CUDA_GEMM_H
#define CUDA_GEMM_H

#include "state.h"

enum { BLAS_WORKSPACE_BYTES = 64 << 20 }; // cuBLAS's own, fixed so that its choices are, and graphs can hold it

// Rows first .. first + n of a matrix.
Matrix matrix_rows(const Matrix *w, int first, int n);
// Whether a product of T rows takes quantised weights as they are (packed_product.h), not widened.
bool stays_packed(const CudaState *s, const Matrix *w, int T);
// out[T][rows] (+)= in[T][cols] · wᵀ, in of s->type, out float32. beta: 1 adds to out (s->gate_up may be overwritten
// then), 0 does not read it.
bool matmul(CudaState *s, float *out, const Matrix *w, const void *in, int T, float beta, Error *err);
// out[n_heads][T][head_dim] = s->xb[T][dim] · wᵀ for heads of wq, wk and wv, from the first of `first` on: the upload
// has placed the three one after another (place_tensors).
bool matmul_heads(CudaState *s, const Config *c, float *out, const Matrix *first, int T, int n_heads, Error *err);
// The same as out[T][n_heads][head_dim], one product; of codes: an FP8 product of s->codes in place of s->xb.
bool matmul_heads_by_row(CudaState *s, const Config *c, float *out, const Matrix *first, int T, int n_heads, bool codes,
                         Error *err);
// s->gate_up[2][T][hidden_dim] = s->xb[T][dim] · w1ᵀ and · w3ᵀ, two matrices of one dtype. Where they have scales
// (scales_after_product), swiglu is to multiply by them.
bool matmul_gate_up(CudaState *s, const LayerWeights *l, int T, Error *err);
// FP8 products: out[T][rows] (+)= in[T][cols] · wᵀ of an FP8 matrix, in being s->codes × s->code_scales, w
// codes × scales. beta as above.
bool matmul_codes(CudaState *s, float *out, const Matrix *w, int T, float beta, Error *err);
// The same into s->gate_up, as matmul_gate_up, but rounded to bf16, and no scales are left to multiply by.
bool matmul_gate_up_codes(CudaState *s, const LayerWeights *l, int T, Error *err);
// s->fp8_kernel and s->fp8_kernel_16, of a model whose largest matrix has that shape. False: cuBLAS has none.
bool choose_fp8_kernels(CudaState *s, int rows, int cols, Error *err);
// Loads the kernels that 16-bit products of one order of sums take, whatever the number of rows: enqueues a small
// product by each, which overwrites s->gate_up.
bool load_product_kernels(CudaState *s, Error *err);
// Rotates x[n_heads][T][head_dim] in place: every pair, as a complex number, times its entry of s->rope_table.
bool rope(CudaState *s, float *x, int T, int n_heads, int head_dim, Error *err);

#endif
