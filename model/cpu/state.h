// What engine cpu keeps: the buffers of one call, and its weights.
#ifndef CPU_STATE_H
#define CPU_STATE_H

#include "ops.h"

typedef struct {
    const Ops *ops;
    DType cache;      // of keys, values and queries: F32, or in --precision bf16 what products round to, BF16 or F16
    float *x;         // [T][dim]: the residual stream
    float *xb;        // [T][dim]: normalised, or what a block adds
    float *q;         // [T][q_dim]
    float *k, *v;     // [T][kv_dim]: the new tokens', before they go to the cache
    float *att;       // [T][q_dim]: what attention gives
    float *hb, *hb2;  // [T][hidden_dim]: gate and up
    float *cos, *sin; // [T][head_dim/2]: RoPE table of these positions
    int *pos;         // [T]
    char *weights;
} CpuState;

// The step of the engine: forward.c.
bool forward_cpu(Model *model, const Batch *batch, int first_logit, Error *err);

#endif
