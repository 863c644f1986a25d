// What the GPU engines share: the state on the device, and the parts of engine cublas that engine fused builds on.
#ifndef FORWARD_CUDA_H
#define FORWARD_CUDA_H

extern "C" {
#include "../attention/attention.h"
#include "../measure/bench.h"
#include "../model.h"
#include "../synthetic.h"
}
#include "check.h"
#include "ptx.cuh"

// What decode reads from the host for each step, copied in one piece.
struct StepInput {
    int tokens[MAX_SLOTS], lens[MAX_SLOTS], slots[MAX_SLOTS];
};

// The step after the last one, for the tokens that the last one chose: it is enqueued before they are printed, so that
// the GPU never waits for the CPU. A caller who decodes something else has lost nothing but the GPU's time.
struct Ahead {
    bool running;
    int n, lens[MAX_SLOTS], slots[MAX_SLOTS]; // of the step that runs; or, if none does, that would come next
};

struct FusedState;

struct CudaState {
    cublasHandle_t blas;
    cudaStream_t stream;
    DType type;     // what enters a product, and what the cache holds
    size_t element; // bytes of it
    bool early;     // kernels may start before the one in front is done
    bool keeps_16_bits; // with --precision f32, of matrices that the file has in 16 bits
    float *wide;        // [wide_elements]: a matrix on its way into a float32 product, if its dtype is not type
    size_t wide_elements;
    int max_logits;
    char *weights;
    float *rope_freq;     // [head_dim/2]
    float *x;             // [T][dim]: the residual stream
    void *xb;             // type [T][dim]: normalised
    float *qkv;           // [n_heads + 2 × n_kv_heads][T][head_dim]: queries, keys, values
    void *qkv_in;         // type, the same: rotated and rounded, as they enter attention; of a prompt queries only
    void *att;            // type [T][q_dim]
    float *gate_up;       // [2][T][hidden_dim], and at least [T][dim]
    void *h;              // type [T][hidden_dim]
    float2 *phases;       // [T][head_dim/2]: cosine and sine
    int *tokens, *pos;    // [T]
    int *row_slots;       // [T], of a prompt
    int *logit_rows;      // [LOGIT_ROWS], and what pos and row_slots say of them:
    int *logit_pos, *logit_slots;
    float *logits;        // [max_logits][vocab_size]
    int *choice;          // [LOGIT_ROWS]: the most likely token of each row of logits
    StepInput *step;      // device
    StepInput *step_host; // pinned
    int *choice_host;     // pinned [LOGIT_ROWS]: the same, written by the GPU
    int *pos_host;        // pinned [2][max_rows]: pos, row_slots
    int *slots;           // [MAX_SLOTS]: attention's block table, one block a sequence
    void *attention_workspace, *blas_workspace;
    size_t attention_workspace_bytes;
    int n_logits;                          // of the last call
    Ahead ahead;
    float *kept_logits;                    // the last step's logits and choice, while the next one runs: it writes the
    int *kept_choice;                      // others, and then they change places
    bool swapped;                          // have they, from where they were?
    cudaGraphExec_t graphs[2][MAX_SLOTS + 1]; // decode of so many rows, swapped or not
    cudaStream_t side;                     // brings kept logits to the host
    cudaEvent_t chosen;                    // after the last call's choice
    bool ran[MAX_SLOTS + 1];               // once without a graph, so that cuBLAS has loaded what it needs
    bool said_prefill, said_decode, warming; // --verbose: what was told; computing for nobody
    // Enqueues a step of n rows from `step` to logits, choice and choice_host. `step` is the next step's then.
    bool (*decode_step)(Model *m, int n, Error *err);
    struct FusedState *fused; // engine fused's own
};

// Calls body with a value of the type that a dtype of 16 or 32 bits has in kernels, and returns what it returns.
template <class Body> auto with_type(DType dtype, Body body) {
    return dtype == DTYPE_F32 ? body(float()) : dtype == DTYPE_F16 ? body(__half()) : body(__nv_bfloat16());
}

// Cosine and sine of the float32 angle pos × freq. In float64: an angle may be 100,000 radians.
__device__ inline float2 phase_of(int pos, float freq) {
    double s, c;
    sincos((double)__fmul_rn((float)pos, freq), &s, &c);
    return make_float2((float)c, (float)s);
}

// keeps_16_bits: matrices stay in 16 bits on the device where the file has them so, whatever the precision.
bool open_cuda(Model *m, bool keeps_16_bits, Error *err);
void close_cuda(Model *m);
bool usable_cuda(const Model *m, Error *err);
bool forward_cuda(Model *m, const Batch *b, int first_logit, Error *err);
bool read_logits_cuda(Model *m, Error *err);
// Engine cublas's step.
bool decode_step_cublas(Model *m, int n, Error *err);
// With --verbose, whether this is the first prompt or step, whose launches are told.
bool first_time(const Model *m, bool *said);
// The attention of one layer for T rows of n_seq sequences, on the state's buffers.
AttentionArgs attention_args(const Model *m, const CudaState *s, int n_seq, int T, int layer);

#endif
