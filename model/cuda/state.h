// What the GPU engines share: the state on the device, and what engine fused takes from engine cublas. Who calls whom:
// engine.cu (memory) > step.cu (graphs, run-ahead) > forward.cu (the paper) > gemm.cu, ops.cu (launches).
//
// Several GPUs (--gpus): the caller's Model is that of rank 0; each other rank has a Model and a CudaState of its own
// in CudaState.peers, with the rows of its Shard in its weights and the keys and values of its heads in its cache.
// Lengths, pages and host memory are rank 0's. One thread enqueues for all ranks, part by part (for_shards), and what a
// part needs of the others is gathered in between (gather, parallel/comm.h).
// On one GPU there is one rank and no gather.
//
// Several processes (parallel/processes.h): each has one of the ranks, its caller's Model, and CudaState.peers is
// empty. "All ranks" below are those of this process, and the first of them is the one that has what is said of rank 0.
#ifndef CUDA_STATE_H
#define CUDA_STATE_H

extern "C" {
#include "../attention/attention.h"
#include "../measure/bench.h"
#include "../model.h"
#include "../parallel/shard.h"
#include "../synthetic.h"
#include "../threads.h"
}
#include "../parallel/comm.h"
#include "check.h"
#include "packed.h"
#include "prompt_plan.h"
#include "ptx.cuh"
#include "sample.h"
#include <cublasLt.h>

// What a step reads from the host, copied at once. Sequences have a row each,
// or several of them have more (candidates).
struct StepInput {
    int tokens[MAX_STEP_ROWS], lens[MAX_STEP_ROWS]; // of each row: its token, and the positions before it
    int slots[MAX_SLOTS];                           // of each sequence
    // With several rows of a sequence, of all slots' number of sequences, those after the last without rows:
    int start[MAX_SLOTS + 1]; // the first row of each
    int seq_lens[MAX_SLOTS];  // positions before its first row
};

// The step after the last one, for the tokens that the last one predicted: it is enqueued before they are printed, so
// that the GPU never waits for the CPU. A caller who decodes something else has lost nothing but the GPU's time.
struct RunAhead {
    bool running;
    bool sampled; // the last batch's tokens were drawn, not its argmax: no step runs ahead of the next one
    int n, lens[MAX_SLOTS], slots[MAX_SLOTS]; // of the step that runs; or, if none does, that would come next
    int pages[MAX_SLOTS];                     // that the step that runs writes to
};

// An entry of the block table, and the page that is there from now on.
struct TableChange {
    int at, page;
};

struct FusedState;
struct WideState;

// cuBLASLt's kernels for the products that came up last, by their shape (gemm.cu).
enum { GEMM_PLANS = 256 };
struct LtKernel;
struct LtAlignment {
    unsigned in, out; // bytes, of addresses and rows
};
struct GemmPlan {
    int rows, cols, count;  // of the weights; matrices of that shape
    int T;                  // rows of the input that it was chosen for; 0: nothing is here
    int pitch;              // elements from one row of the output to the next
    LtAlignment alignment;  // that the kernel may count on
    const LtKernel *kernel; // of the table; NULL: cuBLAS's choice for T rows
    bool found;
    cublasLtMatmulAlgo_t algo;
};
struct GemmPlans {
    GemmPlan plans[GEMM_PLANS];
    unsigned next; // the one to replace, modulo their number
};

// Slabs of matrices that are widened for products (widen.h).
struct Widening {
    char *slabs;        // [2] of slab_bytes
    size_t slab_bytes;  // 0: no matrix has to be widened
    size_t least_bytes; // that a slab may have: of SLAB_ROWS rows
    cudaStream_t stream;
    cudaEvent_t widened[2], used[2];
    int turn; // the slab that comes next
};

// What the GPU engines keep. T: rows of one call, at most Model.max_rows. `type`: what enters a product. "Own": of this
// rank's shard; on one GPU that is all.
struct CudaState {
    int device;
    Comm *comm;   // of all ranks; NULL: there is one
    Model *peers; // [local_ranks - 1], rank 0's: the other ranks
    cublasHandle_t blas;
    GemmPlans gemm_plans;
    cudaStream_t stream;
    DType type;     // what enters a product, and what the cache holds
    size_t element; // bytes of it
    bool pdl;       // kernels may be launched with programmatic dependent launch
    // Weights.
    char *weights;
    bool keeps_16_bits; // with --precision f32, of matrices that the file has in 16 bits
    bool one_order;     // products of 16-bit numbers add up in one order, whatever the number of rows (gemm.cu)
    Widening widening;  // of matrices whose dtype is not type
    int packed_rows;    // products of quantised weights and up to so many rows are packed_product.h's
    // Products of many rows, with what follows them: prompt_product.h.
    int prompt_least[PROMPT_KINDS];
    int prompt_clusters; // that the GPU has room for at once; 0: it has no such kernels
    bool fp8;            // --precision fp8: inputs of a prompt's products, but the output matrix's, are codes
    cublasLtMatmulAlgo_t fp8_kernel, fp8_kernel_16; // of all of them; of those whose result is bf16 (gemm.cu)
    // Activations, on the device.
    float *x;       // [T][own dim]: the residual stream
    void *xb;       // type [T][dim]: normalised
    float *qkv;     // [own heads + 2 × own K/V heads][T][head_dim]: queries, keys, values. On one GPU qkv, qkv_in and
                    // att may be a part of gate_up, where nobody reads that before the feed-forward part
    void *qkv_in;   // type, the same: rotated and rounded, as they enter attention; of a prompt queries only
    void *att;      // type [T][own heads × head_dim]
    float *gate_up; // [2][T][own hidden_dim], of FP8 products in bf16; and at least [T][dim]
    void *h;        // type [T][own hidden_dim]
    uint8_t *codes; // e4m3 [T][columns]: the input of an FP8 product, at most as many columns as a matrix has
    float *code_scales; // [T]: what the codes of each row are multiplied by
    float *x_all;       // [T][dim], gathered; on one GPU x
    void *att_all;      // type [T][q_dim], gathered; on one GPU att
    void *h_all;        // type [T][hidden_dim], gathered; on one GPU h
    float *own_logits;  // [max_logits][own vocab_size], before they are gathered; several GPUs only
    float *rope_freq;   // [head_dim/2]
    float2 *rope_table; // [T][head_dim/2]: cosine and sine
    int *tokens, *pos;  // [T]
    int *row_slots;     // [T], of a prompt
    int *logit_rows;    // [MAX_STEP_ROWS], and what pos and row_slots say of them:
    int *logit_pos, *logit_slots;
    int *slots;       // [MAX_SLOTS]: the row of the block table that each sequence has
    int *block_table; // [n_slots][table_width]: kv.table, as far as slots were computed with
    int *step_table;  // [n_slots][table_width]: of a step's sequences; attention finds a page by one look-up less
    StepInput *step;  // of the step at hand, then of the next one
    // Results, double-buffered: while a step runs ahead, the last step's stay in the other buffer.
    int max_logits, n_logits;             // rows that there is room for; of the last batch
    float *logits, *other_logits;         // [max_logits][vocab_size]
    int *argmax;                          // [MAX_STEP_ROWS]
    int *argmax_host, *other_argmax_host; // pinned [MAX_STEP_ROWS]: the same, written by the GPU
    int buffer;                           // which of the two is in use
    cudaEvent_t argmax_ready;             // after the last batch's
    cudaStream_t side;                    // brings the other buffer's logits to the host
    SampleBuffers sample;                 // [max_logits]
    // Host memory that the device reads, pinned.
    StepInput *step_host;
    int *pos_host;              // [2][T]: pos, row_slots
    TableChange *table_changes; // [n_slots][table_width]: those on their way to block_table
    // Workspaces.
    void *attention_workspace, *blas_workspace;
    size_t attention_workspace_bytes;
    // Steps: step.cu.
    RunAhead next_step;
    // By whether a sequence has several rows: a step of so many rows into each buffer. Rank 0's has all GPUs' kernels,
    // unless ranks are apart.
    cudaGraphExec_t graphs[2][2][MAX_STEP_ROWS + 1];
    bool ran[2][MAX_STEP_ROWS + 1]; // once without a graph, so that cuBLAS has loaded what it needs
    // Enqueues a step of n rows from `step` to logits, argmax and argmax_host; several: of a sequence. If not, `step`
    // is the next step's then.
    bool (*enqueue_step)(Model *m, int n, bool several, Error *err);
    // Of several GPUs: whether such a step is enqueued for each by itself, without an order between their streams: its
    // kernels wait for the others' (fused_exchange.cuh). NULL: never.
    bool (*ranks_are_apart)(const Model *m, int n);
    bool last_step_apart;
    // --verbose: what has been logged; whether what is computed is for nobody.
    bool logged_prefill, logged_decode, warming_up;
    bool (*prepare)(Model *m, Error *err); // open_cuda's
    struct FusedState *fused;              // engine fused's own
    struct WideState *wide;                // its steps of many rows (wide.h); NULL: they are engine cublas's
};

// Calls body with a value of the type that a dtype of 16 or 32 bits has in kernels, and returns what it returns.
template <class Body> auto with_type(DType dtype, Body body) {
    return dtype == DTYPE_F32 ? body(float()) : dtype == DTYPE_F16 ? body(__half()) : body(__nv_bfloat16());
}

// A matrix on the device: as the file has it, in another dtype, or packed. Packed, of what Matrix has: data are rows as
// packed.h has them; dtype, group and scale_dtype are the file's; scale is float32 [rows],
// or NULL where groups have scales.

// How a quantised matrix is packed: scales are bf16 where the file has those of groups in BF16, else float32.
inline Packing matrix_packing(const Matrix *m) {
    return packing_of(m->dtype == DTYPE_U8 ? 4 : 8, m->group == WHOLE_ROW ? 0 : m->group,
                      m->scale_dtype == DTYPE_BF16 ? 2 : 4, m->cols);
}
// What a 16-bit product's results are multiplied by, as the codes alone are in it: [rows], or NULL: nothing. (Before a
// float32 product codes are multiplied.)
inline const float *scales_after_product(const CudaState *s, const Matrix *m) {
    return s->type == DTYPE_F32 ? NULL : (const float *)m->scale;
}
// The most columns that a matrix has.
inline int most_columns(const Config *c) {
    const int most = c->dim > c->q_dim ? c->dim : c->q_dim;
    return c->hidden_dim > most ? c->hidden_dim : most;
}
// Bytes of a matrix's row.
inline uint64_t device_row_bytes(const Matrix *m) {
    return matrix_is_quantised(m) ? (uint64_t)matrix_packing(m).row_bytes : matrix_row_bytes(m);
}

// ---- shards.cu: the ranks of a model --------------------------------------------------------------------------------

// Ranks in this process, and the number of one among them.
inline int local_ranks(const Model *m) {
    return m->by_processes ? 1 : m->shard.count;
}
inline int local_rank(const Model *m) {
    return m->by_processes ? 0 : m->shard.rank;
}
// rank: a local one.
inline Model *model_of_rank(Model *m, int rank) {
    return rank == 0 ? m : ((CudaState *)m->state)->peers + rank - 1;
}
// Query heads, K/V heads that are this rank's.
inline int own_heads(const Model *m) {
    return m->shard.kv_heads.n * m->config.group;
}
inline int own_kv_heads(const Model *m) {
    return m->shard.kv_heads.n;
}
// Elements of K, or of V, of a layer of this rank's cache.
inline size_t own_layer_elements(const Model *m) {
    return (size_t)m->kv.n_pages * kv_page_elements(own_kv_heads(m), m->config.head_dim);
}

// Puts the rank's GPU in front of a failure, whose cause may be there; not of one that is nobody's.
void name_gpu(const CudaState *s, Error *err);
// Calls body(the rank's Model, its CudaState) for all ranks in turn, each with its GPU as the current one; rank 0's is
// that afterwards. Ends at the first that returns false, and returns that; of several the message names the GPU.
template <class Body> bool for_shards(Model *m, Error *err, Body body) {
    const CudaState *first = (const CudaState *)m->state;
    if (local_ranks(m) == 1) return body(m, (CudaState *)m->state);
    bool ok = true;
    for (int r = 0; ok && r < local_ranks(m); r++) {
        Model *own = model_of_rank(m, r);
        CudaState *s = (CudaState *)own->state;
        CUDA_TRY(cudaSetDevice(s->device));
        ok = body(own, s);
        if (!ok) name_gpu(s, err);
    }
    CUDA_TRY(cudaSetDevice(first->device));
    return ok;
}

// What a rank has of the columns of some rows, and where it has all of them: [rows][own], [rows][columns].
struct OwnColumns {
    const void *own;
    void *all;
    Rows columns;   // in elements
    size_t element; // bytes
};
// Enqueues for all ranks: every rank has all columns of `rows` rows, of `columns` each. Nothing on one GPU. of(model)
// says what a rank has.
bool gather(Model *m, int rows, int columns, OwnColumns (*of)(const Model *m), Error *err);
// The engine's buffers x, att and h, of T rows; logits from row `first` on, from own_logits.
bool gather_x(Model *m, int T, Error *err);
bool gather_att(Model *m, int T, Error *err);
bool gather_h(Model *m, int T, Error *err);
bool gather_logits(Model *m, int first, int n, Error *err);
// Where the output matrix's product goes, of rows from `first` on.
inline float *own_logits(const Model *m, const CudaState *s, int first) {
    return s->comm ? s->own_logits : s->logits + (size_t)first * m->config.vocab_size;
}
// x = this rank's columns of x_all [T][dim]: what the residual stream begins with.
bool take_own_x(const Model *m, CudaState *s, int T, Error *err);
// Rank 0's stream goes on after all others' so far; theirs after rank 0's. Nothing on one GPU.
bool join_shards(Model *m, Error *err);
bool fork_shards(Model *m, Error *err);
// Waits on the host until all that was enqueued has been computed.
bool wait_for_shards(Model *m, Error *err);

// ---- engine.cu ------------------------------------------------------------------------------------------------------

bool usable_cuda(const Model *m, Error *err);
// prepare: what engine fused adds beside the upload, NULL for engine cublas. With it matrices stay in 16 bits on the
// device where the file has them so, whatever the precision, and 16-bit products have one order of sums.
bool open_cuda(Model *m, bool (*prepare)(Model *m, Error *err), Error *err);
void close_cuda(Model *m);

// ---- forward.cu -----------------------------------------------------------------------------------------------------

// Logits and argmax of rows of prompts, from row first_logit of the logits on; also of a step's rows before them, one
// of each sequence (b->n_decode): that step is on the device.
bool forward_prompt(Model *m, const Batch *b, int first_logit, Error *err);
// Engine cublas's step.
bool enqueue_step_cublas(Model *m, int n, bool several, Error *err);
// What a step's attention has beside that: n rows from row `first` on, one of each sequence, or `several`.
void attention_step(AttentionArgs *a, const Model *m, const CudaState *s, int first, int n, bool several);
// The attention of one layer for T rows of n_seq sequences, on the state's buffers.
AttentionArgs attention_args(const Model *m, const CudaState *s, int n_seq, int T, int layer);
// The attention of a layer for a step's n rows from row `first` on, whose queries, keys and values are in s->qkv_in.
bool attend_step_rows(const Model *m, CudaState *s, int layer, int first, int n, bool several, bool verbose,
                      Error *err);
// attention.h's number for a dtype.
int attention_dtype(DType dtype);
// With --verbose, whether this is the first prompt or step, whose launches are logged.
bool first_launch(const Model *m, bool *logged);

// ---- step.cu --------------------------------------------------------------------------------------------------------

// What a step ends with: the argmax of its n rows to the host and, unless they are several of a sequence, as the next
// step's input.
bool publish_step(Model *m, int n, bool several, Error *err);
// Makes the graphs of a step of one row, before any step is asked for, after one that computes for nobody.
bool prepare_steps(Model *m, Error *err);
// Engine.forward, Engine.read_logits and Engine.sample of both GPU engines.
bool forward_cuda(Model *m, const Batch *b, int first_logit, Error *err);
bool read_logits_cuda(Model *m, Error *err);
bool sample_cuda(Model *m, const SampleRow *rows, int n, int *ids, Error *err);
// Engine's allocate_host, free_host and copy_pages, by pinned memory.
void *allocate_pinned(size_t bytes);
void free_pinned(void *memory);
bool copy_pages_cuda(Model *m, const int *pages, int n, void *const *host, bool to_host, Error *err);

#endif
