// The operations of a LLaMA layer on the CPU: in float32 the numerical reference of every other engine, and in bf16.
// ops.c and attention.c are compiled once for each instruction set; each gives one table. All matrices row-major,
// T tokens.
#ifndef OPS_H
#define OPS_H

#include <stdint.h>

#include "../model.h"

typedef struct {
    const char *name, *name_bf16; // the instruction set, and that of products in --precision bf16
    // y[T][rows] = x[T][cols] · wᵀ, w BF16, F16, F32 or quantised. Each sum in one fixed order, whatever the threads
    // and whatever T: a row has the bits that it has alone. Two orders: matmul is the faster for rows of prompts,
    // matmul_step for one row or a few, and for those whose logits are wanted.
    void (*matmul)(float *y, const float *x, const Matrix *w, int T);
    void (*matmul_step)(float *y, const float *x, const Matrix *w, int T);
    // matmul of --precision bf16: x is bf16 already, or f16 where w is (round); a weight whose scale is of a group of
    // columns is rounded to bf16, all others are exact, and sums are float32. These inputs are the same bits on every
    // instruction set; the order of a sum, and how often it is rounded, is each one's own, and so are its bits.
    void (*matmul_bf16)(float *y, const float *x, const Matrix *w, int T);
    // matmul_step of --precision bf16: x as for matmul_bf16, by exact weights, whose scales multiply sums in float32.
    // (Where pairs of bf16 are multiplied, numbers under 2^-126 are zeros, in x, W and sums.)
    void (*matmul_step_bf16)(float *y, const float *x, const Matrix *w, int T);
    // x[n], widened from n numbers of dtype: BF16, F16 or F32.
    void (*widen)(float *x, const void *from, DType dtype, int n);
    // to[n] of dtype, BF16 or F16, from x[n]: the nearest, of equals the even one; NaN stays NaN. And in place, as
    // floats (F32: x stays as it is).
    void (*narrow)(void *to, const float *x, DType dtype, int64_t n);
    void (*round)(float *x, DType dtype, int64_t n);
    // y[T][n] = x / sqrt(mean(x²) + eps) * weight[n]. Zhang & Sennrich 2019, in the order of HuggingFace's
    // LlamaRMSNorm.
    void (*rmsnorm)(float *y, const float *x, const float *weight, float eps, int T, int n);
    // Rotates x[T][n_heads][head_dim] in place: element i of the first half with element i of the second, by the angle
    // of cos/sin[T][head_dim/2]. Su et al. 2021, HuggingFace's half-split order.
    void (*rope)(float *x, const float *cos, const float *sin, int T, int n_heads, int head_dim);
    // out[T][n_heads][head_dim]: causal attention of the tokens at positions pos .. pos+T-1 over k and v
    // [page][n_kv_heads][KV_PAGE][head_dim] of dtype, F32, BF16 or F16, a page page_stride elements after the one
    // before, whose pages `pages` [kv_pages(pos+T)] are filled up to pos+T; n_heads/n_kv_heads query heads share each
    // K/V head (Ainslie et al. 2023). Online softmax over tiles of positions (Milakov & Gimelshein 2018). A token has
    // the bits that it has alone, whatever comes after it. Two orders of sums, as with products: for rows of prompts
    // and for those of steps.
    void (*attention)(float *out, const float *q, const void *k, const void *v, DType dtype, const int *pages,
                      size_t page_stride, int T, int pos, int n_heads, int n_kv_heads, int head_dim);
    void (*attention_step)(float *out, const float *q, const void *k, const void *v, DType dtype, const int *pages,
                           size_t page_stride, int T, int pos, int n_heads, int n_kv_heads, int head_dim);
    // gate[n] = gate / (1 + exp(-gate)) * up: SiLU, Shazeer 2020.
    void (*swiglu)(float *gate, const float *up, int64_t n);
    // x[n] += y[n]
    void (*add)(float *x, const float *y, int64_t n);
    // What the machine gives, for the benchmark: the sum of data as 8-byte words, by all threads; and the
    // floating-point operations of one thread's fused multiply-adds over `rounds` rounds; of pairs of bf16, where there
    // is an instruction for them (else NULL).
    uint64_t (*read_all)(const void *data, int64_t bytes);
    double (*multiply_add)(int64_t rounds, float *sink);
    double (*multiply_add_bf16)(int64_t rounds, float *sink);
} Ops;

// The best table for the processor that runs this; and all that it has, the best last: number i, or NULL.
const Ops *ops_select(void);
const Ops *ops_path(int i);

#endif
