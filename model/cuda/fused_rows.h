// Engine fused, prompts and steps of more rows than wide.h's: products are cuBLASLt's (gemm.cu) or, where there are
// many rows, prompt_product.h's with what follows them; what is between products takes fewer kernels than engine cublas
// has. A row's bits do not depend on the other rows, nor on which product it is.
#ifndef FUSED_ROWS_H
#define FUSED_ROWS_H

#include "state.h"

// Queries of n_q heads and keys and values of n_kv, of T rows of the normalised stream s->xb, by the rows of weights
// from `first` on: rotated by s->rope_table and rounded, in s->qkv_in [n_q + 2 n_kv][T][head_dim]; of a prompt keys and
// values in the cache of `layer` instead, by s->pos and s->row_slots, and with --precision fp8 s->codes in place of
// s->xb. layer -1: a step.
bool project_qkv_fused(Model *m, const Matrix *first, int T, int n_q, int n_kv, int layer, Error *err);
// s->h[T][own hidden_dim] = silu(gate) × up of s->xb [T][dim], rounded to s->type.
bool feed_forward_fused(CudaState *s, const LayerWeights *l, int T, Error *err);

#endif
