// The steps between matrix products on the GPU, one small kernel each. All on s->stream; T rows.
#ifndef CUDA_OPS_H
#define CUDA_OPS_H

#include "state.h"

// s->x_all[T][dim] = the embedding of each token, widened to float32.
bool embed(CudaState *s, const Model *m, const int *tokens, int T, Error *err);
// s->rope_table[T][head_dim/2]: cosine and sine for the positions pos [T], by which rope() rotates from here on.
bool rope_table(CudaState *s, const Config *c, const int *pos, int T, Error *err);
// s->xb[T][dim] = x / sqrt(mean(x²) + eps) * weight of x = s->x_all, rounded to s->type (Zhang & Sennrich 2019).
bool rmsnorm(CudaState *s, const float *weight, float eps, int T, int dim, Error *err);
// The same rounded to bf16, and then to e4m3: s->codes[T][dim] with s->code_scales[T] (--precision fp8).
bool rmsnorm_codes(CudaState *s, const float *weight, float eps, int T, int dim, Error *err);
// s->codes[T][cols] and s->code_scales[T] of in[T][cols] in bf16: the e4m3 code nearest to in / scale, the scale being
// the largest magnitude of the row / 448, or 1 for zeros. Infinities have the largest code, NaN stays NaN.
bool encode_rows(CudaState *s, const void *in, int T, int cols, Error *err);
// out[n] = in[n] rounded to s->type; nothing to do in float32, where out is in.
bool round_to_type(CudaState *s, void *out, const float *in, size_t n, Error *err);
// A prompt's keys and values in[2][n_kv_heads][T][head_dim], rounded to s->type, to their positions in the cache.
bool append_kv(const Model *m, CudaState *s, const float *in, int T, int layer, Error *err);
// The first n of the pinned s->table_changes are in s->block_table, for all that is launched after it.
bool change_table(CudaState *s, int n, Error *err);
// s->step_table: the rows of s->block_table that the step's n_seq sequences have, `width` entries each, in their order.
bool gather_table(CudaState *s, int n_seq, int width, bool several, Error *err);
// s->h[T][own hidden_dim] = gate / (1 + exp(-gate)) * up of s->gate_up[2][T][own hidden_dim], each times its matrix's
// scales if it has any (Matrix.scale), rounded to s->type (Shazeer 2020).
bool swiglu(CudaState *s, const LayerWeights *l, int T, Error *err);
// The same where s->gate_up is what matmul_gate_up_codes leaves, in bf16; s->h is bf16.
bool swiglu_16(CudaState *s, const LayerWeights *l, int T, Error *err);
// And then to s->codes[T][own hidden_dim] with s->code_scales[T]. On one GPU, which has all of a row.
bool swiglu_codes(CudaState *s, const LayerWeights *l, int T, Error *err);
// y[count][T][rows] *= scale[count][rows].
bool scale_rows(CudaState *s, float *y, const float *scale, int count, int T, int rows, Error *err);
// x[T][rows] += y[T][rows] * scale[rows].
bool add_scaled(CudaState *s, float *x, const float *y, const float *scale, int T, int rows, Error *err);
// Of x[T][dim] only the n rows with logits stay, with their positions and slots in s->logit_pos and s->logit_slots. By
// way of s->gate_up.
bool keep_logit_rows(CudaState *s, float *x, int n, int dim, Error *err);
// s->argmax[first .. first + n) of the logits' rows: the lowest id of equals; -1: not all are finite.
bool argmax_rows(CudaState *s, int first, int n, int vocab, Error *err);
// Sends argmax [n] to the host, s->argmax_host. step: it becomes the next step's input, too (NULL: no).
bool publish_argmax(CudaState *s, int n, StepInput *step, Error *err);
// Attributes of the code that this GPU was given: an error if there is none for it.
cudaError_t kernel_attributes(cudaFuncAttributes *attributes);

// x / (1 + exp(-x)): of a gate, to be multiplied by up (Shazeer 2020).
__device__ inline float silu(float x) {
    return x / (1.0f + expf(-x));
}
// The same to 2^-21, for what is rounded to 16 bits then.
__device__ inline float silu_fast(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(1.0f + exp2_fast(x * -1.4426950408889634f)));
    return x * y;
}
// A pair as a complex number, times cosine + i sine (Su et al. 2021); the same bits wherever it is called.
__device__ inline float2 rotated(float2 x, float2 by) {
    return make_float2(__fmaf_rn(-x.y, by.y, __fmul_rn(x.x, by.x)), __fmaf_rn(x.y, by.x, __fmul_rn(x.x, by.y)));
}
// Cosine and sine of the float32 angle pos × freq. In float64: an angle may be 100,000 radians.
__device__ inline float2 rope_angle(int pos, float freq) {
    double s, c;
    sincos((double)__fmul_rn((float)pos, freq), &s, &c);
    return make_float2((float)c, (float)s);
}

#endif
