// The GPU engines' memory: what they need, whether there is room for it, opening and closing. Engine cublas.
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "gemm.h"
#include "ops.h"
#include "packed_product.h"
#include "upload.h"
#include "widen.h"

enum { MAX_ROWS = 8192 }; // of one pass over the weights

// ---- memory ---------------------------------------------------------------------------------------------------------

struct Buffer {
    void **at;
    uint64_t bytes;
};

enum { N_BUFFERS = 32 };

static uint64_t table_bytes(const Model *m) {
    return (uint64_t)m->kv.n_slots * (uint64_t)kv_pages(m->kv.max_len) * sizeof(int);
}

// Every buffer but the weights, sized for the context; fills list and returns how many.
static int list_buffers(Model *m, CudaState *s, Buffer *list) {
    const Config *c = &m->config;
    uint64_t T = (uint64_t)m->max_rows, e = s->element;
    uint64_t kv = m->kv.bytes / 2;
    const Buffer all[] = {
        {&m->kv.k, kv},
        {&m->kv.v, kv},
        {(void **)&s->rope_freq, (uint64_t)c->head_dim / 2 * 4},
        {(void **)&s->x, T * (uint64_t)c->dim * 4},
        {&s->xb, T * (uint64_t)c->dim * e},
        {(void **)&s->qkv, T * (uint64_t)(c->q_dim + 2 * c->kv_dim) * 4},
        {s->type == DTYPE_F32 ? NULL : &s->qkv_in, T * (uint64_t)(c->q_dim + 2 * c->kv_dim) * e},
        {&s->att, T * (uint64_t)c->q_dim * e},
        {(void **)&s->gate_up, T * (uint64_t)(2 * c->hidden_dim > c->dim ? 2 * c->hidden_dim : c->dim) * 4},
        {&s->h, T * (uint64_t)c->hidden_dim * e},
        {(void **)&s->rope_table, T * (uint64_t)c->head_dim / 2 * 8},
        {(void **)&s->tokens, T * 4},
        {(void **)&s->pos, T * 4},
        {(void **)&s->row_slots, T * 4},
        {(void **)&s->logit_rows, MAX_STEP_ROWS * 4},
        {(void **)&s->logit_pos, MAX_STEP_ROWS * 4},
        {(void **)&s->logit_slots, MAX_STEP_ROWS * 4},
        {(void **)&s->logits, (uint64_t)s->max_logits * (uint64_t)c->vocab_size * 4},
        {(void **)&s->other_logits, (uint64_t)s->max_logits * (uint64_t)c->vocab_size * 4},
        {(void **)&s->argmax, MAX_STEP_ROWS * 4},
        {(void **)&s->sample.bins, (uint64_t)s->max_logits * sizeof *s->sample.bins},
        {(void **)&s->sample.jobs, (uint64_t)s->max_logits * sizeof *s->sample.jobs},
        {(void **)&s->step, sizeof *s->step},
        {(void **)&s->slots, MAX_SLOTS * 4},
        {(void **)&s->block_table, table_bytes(m)},
        {(void **)&s->step_table, table_bytes(m)},
        {s->widening.slab_bytes ? (void **)&s->widening.slabs : NULL, 2 * s->widening.slab_bytes},
        {&s->attention_workspace, s->attention_workspace_bytes},
        {&s->blas_workspace, BLAS_WORKSPACE_BYTES},
    };
    static_assert(sizeof all / sizeof *all <= N_BUFFERS, "room in the list");
    int n = 0;
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        if (all[i].at) list[n++] = all[i];
    return n;
}

static bool size_state(Model *m, CudaState *s, Error *err) {
    const Config *c = &m->config;
    uint64_t positions = (uint64_t)m->kv.n_slots * (uint64_t)m->kv.max_len;
    m->max_rows = positions < MAX_ROWS ? (int)positions : MAX_ROWS;
    s->max_logits = model_logit_rows(m);
    AttentionArgs a;
    memset(&a, 0, sizeof a);
    a.dtype = attention_dtype(s->type);
    a.n_seq = m->kv.n_slots;
    a.n_heads = c->n_heads;
    a.n_kv_heads = c->n_kv_heads;
    a.head_dim = c->head_dim;
    a.cache_max_len = m->kv.max_len;
    for (int n_new = 1; n_new <= (m->speculates ? MAX_CANDIDATES + 1 : 1); n_new++) {
        a.n_new = n_new;
        a.n_tokens = n_new > 1 ? model_step_rows(m) : 0;
        size_t bytes = attention_workspace_bytes(&a);
        if (bytes == SIZE_MAX) return fail(err, "%s", attention_error());
        if (bytes > s->attention_workspace_bytes) s->attention_workspace_bytes = bytes;
    }
    return true;
}

// Compares what is needed with what is free before anything is allocated, and sizes the cache. Without kv_memory it has
// pages for all that the slots may hold or, where that does not fit beside the rest, those that leave SPARE, and at
// least one sequence's.
static bool size_cache(Model *m, const CudaState *s, uint64_t weights, const Buffer *list, int n, Error *err) {
    const uint64_t RESERVE = 256 << 20, SPARE = 1000000000; // RESERVE: the upload's staging, kernels' own needs
    size_t free_bytes, total;
    CUDA_TRY(cudaMemGetInfo(&free_bytes, &total));
    uint64_t buffers = 0, page = cache_page_bytes(&m->config, s->element);
    for (int i = 0; i < n; i++) buffers += list[i].bytes;
    uint64_t needed = weights + buffers + RESERVE, room = needed < free_bytes ? (free_bytes - needed) / page : 0;
    uint64_t one = (uint64_t)kv_pages(m->kv.max_len), all = (uint64_t)m->kv.n_slots * one;
    bool whole = m->kv_memory == KV_MEMORY_ALL, asked = m->kv_memory && !whole;
    uint64_t least = whole ? all : asked ? m->kv_memory / page : one;
    if (least > all) least = all;
    double gb_weights = (double)weights * 1e-9, gb_buffers = (double)(buffers + RESERVE) * 1e-9,
           gb_free = (double)free_bytes * 1e-9;
    if (room == 0)
        return fail(err, "GPU memory: %.2f GB of weights and %.2f GB of buffers, %.2f GB are free of %.2f", gb_weights,
                    gb_buffers, gb_free, (double)total * 1e-9);
    if (least > room && asked)
        return fail(err,
                    "--kv-memory %" PRIu64
                    ": %.2f GB of weights, %.2f GB of buffers, %.2f GB are free; at most %" PRIu64 " would fit",
                    m->kv_memory, gb_weights, gb_buffers, gb_free, room * page);
    if (least > room)
        return fail(err,
                    "GPU memory: %.2f GB of weights, %.2f GB of cache and %.2f GB of buffers, %.2f GB are free; a "
                    "context of %" PRIu64 " would fit (-c)",
                    gb_weights, (double)(least * page) * 1e-9, gb_buffers, gb_free, room / (least / one) * KV_PAGE);
    uint64_t spare = (SPARE - RESERVE) / page + 1, pages = all;
    if (all > room) pages = room > one + spare ? room - spare : one;
    return model_size_cache(m, s->element, (int64_t)pages, err);
}

// ---- the engine -----------------------------------------------------------------------------------------------------

bool usable_cuda(const Model *m, Error *err) {
    int n = 0, driver = 0, device = 0;
    cudaError_t status = cudaGetDeviceCount(&n);
    if (status == cudaErrorInsufficientDriver) {
        if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0)
            return fail(err, "no NVIDIA driver is installed");
        return fail(err, "the GPU's driver supports CUDA %d.%d, this program needs %d.%d", driver / 1000,
                    driver % 1000 / 10, CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10);
    }
    if (status != cudaSuccess || n == 0)
        return fail(err, "no GPU (%s)", status != cudaSuccess ? cudaGetErrorString(status) : "none is visible");
    cudaFuncAttributes attributes;
    cudaDeviceProp properties;
    CUDA_TRY(cudaGetDevice(&device));
    CUDA_TRY(cudaGetDeviceProperties(&properties, device));
    if (kernel_attributes(&attributes) != cudaSuccess) {
        cudaGetLastError();
        return fail(err, "%s has compute capability %d.%d, for which this program was not built", properties.name,
                    properties.major, properties.minor);
    }
    int d = m->config.head_dim;
    if (m->config.dim % 8 || m->config.hidden_dim % 8)
        return fail(err, "dim %d and hidden_dim %d, the GPU engines need multiples of 8", m->config.dim,
                    m->config.hidden_dim);
    return d == 64 || d == 96 || d == 128 || fail(err, "head_dim is %d, the GPU's attention has 64, 96 and 128", d);
}

// Quantised matrices are computed with as BF16 ones are.
static void choose_types(const Model *m, CudaState *s, bool for_fused) {
    const Config *c = &m->config;
    bool f32 = m->precision == PRECISION_F32, quantised = weights_are_quantised(m);
    s->type = f32 ? DTYPE_F32 : m->weights.dtype == DTYPE_F16 && !quantised ? DTYPE_F16 : DTYPE_BF16;
    s->element = (size_t)dtype_bytes[s->type];
    s->keeps_16_bits = for_fused && f32;
    s->one_order = for_fused && !f32;
    int most_cols = c->dim > c->q_dim ? c->dim : c->q_dim;
    if (c->hidden_dim > most_cols) most_cols = c->hidden_dim;
    bool widens = quantised || (s->keeps_16_bits && m->weights.dtype != DTYPE_F32);
    s->widening.slab_bytes = widens ? widen_slab_bytes((uint64_t)c->hidden_dim * c->dim, most_cols, s->element) : 0;
}

// Stream, cuBLAS handle, pinned memory, RoPE's frequencies.
static bool connect(Model *m, CudaState *s, Error *err) {
    cudaFuncAttributes attributes;
    CUDA_TRY(kernel_attributes(&attributes));
    s->pdl = attributes.ptxVersion >= 90; // not code for older GPUs that the driver compiled for this one
    CUDA_TRY(cudaStreamCreateWithFlags(&s->stream, cudaStreamNonBlocking));
    CUBLAS_TRY(cublasCreate(&s->blas));
    CUBLAS_TRY(cublasSetStream(s->blas, s->stream));
    CUBLAS_TRY(cublasSetWorkspace(s->blas, s->blas_workspace, BLAS_WORKSPACE_BYTES));
    if (!widen_open(s, err) || (s->one_order && weights_are_quantised(m) && !packed_open(s, err))) return false;
    CUBLAS_TRY(cublasSetMathMode(s->blas, CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION)); // every sum in float32
    CUDA_TRY(cudaMallocHost((void **)&s->step_host, sizeof *s->step_host));
    CUDA_TRY(cudaStreamCreateWithFlags(&s->side, cudaStreamNonBlocking));
    CUDA_TRY(cudaEventCreateWithFlags(&s->argmax_ready, cudaEventDisableTiming));
    CUDA_TRY(cudaMallocHost((void **)&s->argmax_host, MAX_STEP_ROWS * sizeof(int)));
    CUDA_TRY(cudaMallocHost((void **)&s->other_argmax_host, MAX_STEP_ROWS * sizeof(int)));
    CUDA_TRY(cudaMallocHost((void **)&s->table_changes, table_bytes(m) / sizeof(int) * sizeof *s->table_changes));
    CUDA_TRY(cudaMemset(s->block_table, 0, table_bytes(m))); // the warm-up's sequence has all its positions on page 0
    CUDA_TRY(cudaMallocHost((void **)&s->sample.jobs_host, (size_t)s->max_logits * sizeof *s->sample.jobs_host));
    CUDA_TRY(cudaMallocHost((void **)&s->sample.ids_host, (size_t)s->max_logits * sizeof *s->sample.ids_host));
    CUDA_TRY(cudaMallocHost((void **)&s->pos_host, 2 * (size_t)m->max_rows * sizeof(int)));
    CUDA_TRY(cudaMallocHost((void **)&m->logits, (size_t)s->max_logits * (size_t)m->config.vocab_size * sizeof(float)));
    // Once; every call leaves them ready.
    CUDA_TRY(cudaMemset(s->attention_workspace, 0, s->attention_workspace_bytes));
    CUDA_TRY(cudaMemset(s->sample.bins, 0, (size_t)s->max_logits * sizeof *s->sample.bins));
    CUDA_TRY(
        cudaMemcpy(s->rope_freq, m->rope_freq, (size_t)m->config.head_dim / 2 * sizeof(float), cudaMemcpyHostToDevice));
    return true;
}

// Computes two short prompts on whatever is in memory, so that the first real one does not wait for cuBLAS's kernels to
// be loaded, which takes longer than to run them. Nothing of it stays: no position is counted.
static bool warm_up(Model *m, Error *err) {
    CudaState *s = (CudaState *)m->state;
    static const int lengths[] = {12, 512};
    s->warming_up = true;
    int slot = 0, zeros[512] = {0};
    for (int i = 0; i < 2 && lengths[i] <= m->max_rows && lengths[i] <= m->kv.max_len; i++) {
        int start[2] = {0, lengths[i]}, last = lengths[i] - 1;
        Batch b = {lengths[i], 1, 1, 0, zeros, &slot, start, &last, false};
        if (!forward_prompt(m, &b, 0, err)) return false;
        CUDA_TRY(cudaStreamSynchronize(s->stream));
    }
    s->warming_up = false;
    return true;
}

bool open_cuda(Model *m, bool for_fused, Error *err) {
    CudaState *s = (CudaState *)calloc(1, sizeof *s);
    m->state = s;
    if (!s) return fail(err, "out of memory: the engine's state");
    choose_types(m, s, for_fused);
    s->enqueue_step = enqueue_step_cublas;
    Plan plan;
    Buffer buffers[N_BUFFERS];
    int n_buffers = 0;
    bool ok = plan_weights(&plan, m, s, err) && size_state(m, s, err);
    if (ok) n_buffers = list_buffers(m, s, buffers);
    ok = ok && size_cache(m, s, plan.bytes, buffers, n_buffers, err);
    if (ok) n_buffers = list_buffers(m, s, buffers); // now with the cache
    for (int i = 0; ok && i < n_buffers; i++) {
        cudaError_t status = cudaMalloc(buffers[i].at, buffers[i].bytes ? buffers[i].bytes : 16);
        if (status != cudaSuccess)
            ok = fail(err, "GPU memory: %.2f GB: %s", (double)buffers[i].bytes * 1e-9, cudaGetErrorString(status));
    }
    if (ok && cudaMalloc((void **)&s->weights, plan.bytes) != cudaSuccess)
        ok = fail(err, "GPU memory: %.2f GB of weights", (double)plan.bytes * 1e-9);
    ok = ok && place_tensors(&plan, err);
    if (ok && s->type == DTYPE_F32) s->qkv_in = s->qkv;
    ok = ok && connect(m, s, err) && upload_weights(&plan, warm_up, err);
    m->weights.bytes = plan.bytes;
    m->buffer_bytes = 0;
    for (int i = 0; i < n_buffers; i++) m->buffer_bytes += buffers[i].bytes;
    m->buffer_bytes -= n_buffers ? m->kv.bytes : 0;
    cudaDeviceProp properties;
    if (ok && cudaGetDeviceProperties(&properties, 0) == cudaSuccess)
        snprintf(m->note, sizeof m->note, "%.60s", properties.name);
    plan_free(&plan);
    return ok;
}

void close_cuda(Model *m) {
    CudaState *s = (CudaState *)m->state;
    if (!s) return;
    if (s->stream) cudaStreamSynchronize(s->stream);
    for (auto &buffers : s->graphs)
        for (auto &graphs : buffers)
            for (cudaGraphExec_t graph : graphs)
                if (graph) cudaGraphExecDestroy(graph);
    if (s->argmax_ready) cudaEventDestroy(s->argmax_ready);
    if (s->side) cudaStreamDestroy(s->side);
    widen_close(s);
    if (s->blas) cublasDestroy(s->blas);
    Buffer buffers[N_BUFFERS];
    int n = list_buffers(m, s, buffers);
    for (int i = 0; i < n; i++) cudaFree(*buffers[i].at);
    cudaFree(s->weights);
    cudaFreeHost(s->step_host);
    cudaFreeHost(s->argmax_host);
    cudaFreeHost(s->other_argmax_host);
    cudaFreeHost(s->pos_host);
    cudaFreeHost(s->table_changes);
    cudaFreeHost(s->sample.jobs_host);
    cudaFreeHost(s->sample.ids_host);
    cudaFreeHost(m->logits);
    if (s->stream) cudaStreamDestroy(s->stream);
    cudaGetLastError(); // an allocation that was refused is no error of what comes next
    free(s);
    m->state = NULL;
}

static bool open_cublas(Model *m, Error *err) {
    return open_cuda(m, false, err);
}

extern "C" const Engine engine_cublas = {"cublas",     usable_cuda,      open_cublas, close_cuda,
                                         forward_cuda, read_logits_cuda, sample_cuda, allocate_pinned,
                                         free_pinned,  copy_pages_cuda,  NULL};
