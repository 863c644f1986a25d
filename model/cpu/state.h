// What engine cpu keeps: the buffers of one call, and its weights.
#ifndef CPU_STATE_H
#define CPU_STATE_H

#include "../synthetic.h"
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
    // The embedding table of a model that is not tied is not in memory, where a token's row is all that is read of it.
    const Tensor *table;       // it is in the file; NULL: it is not
    SyntheticTensor synthetic; // what it is made from, of a synthetic model
    char *row;                 // one row of it, as it is stored; NULL: the table is in memory
    uint64_t left_bytes;       // of the table in the file, by which the model's weights.bytes are less
} CpuState;

// The row of a token in the embedding table, as it is stored, until the next call: engine.c.
// NULL: it could not be read.
const void *embedding_row(const Model *model, int token, Error *err);

// The step of the engine: forward.c.
bool forward_cpu(Model *model, const Batch *batch, int first_logit, Error *err);

#endif
