// Engine cublas: the steps of forward_cpu.c on the GPU, one call or one small kernel each. Matrix products and RoPE are
// cuBLAS, attention is attention.cu. What differs from the CPU is where things are:
// - The rows of wq and wk are interleaved as they are uploaded, first half with second half, so that RoPE's pairs are
//   adjacent, as complex numbers are. No dot product of q and k changes.
// - Q and K come out as [head][row][head_dim], so that one cublasCdgmm rotates all of them: a diagonal of the phases of
//   all rows, times a matrix with a column for each head.
// Residual stream, norms and sums are float32; `type` is what enters a product and what the cache holds (DESIGN: bf16,
// f16, or float32 with --precision f32).
#include <cublasLt.h>
#include <inttypes.h>
#include <omp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "forward_cuda.h"

enum {
    MAX_ROWS = 8192,        // of one pass over the weights
    LONG_PROMPT = 4097,     // rows: see matmul_long
    UPLOAD_BYTES = 4 << 20, // of one staging buffer
    UPLOAD_THREADS = 16,
    WORKSPACE_BYTES = 64 << 20 // cuBLAS's own, fixed so that its choices are, and graphs can hold it
};

// ---- kernels --------------------------------------------------------------------------------------------------------

// Computes: x = the embedding of each token, widened.   Reads: table [vocab][dim] T, tokens [rows].   Writes: x
// [rows][dim]. Grid × block: rows × 256; a block owns a row.   Preconditions: 0 <= tokens < vocab (the tokenizer's
// promise).
template <typename T> __global__ void embed_kernel(float *x, const T *table, const int *tokens, int dim) {
    const T *from = table + (size_t)tokens[blockIdx.x] * dim;
    for (int i = threadIdx.x; i < dim; i += blockDim.x) x[(size_t)blockIdx.x * dim + i] = to_float(from[i]);
}

// Blocks may take the rows written last first: part of what a product has written is still in L2.
__device__ static unsigned newest_first() {
    return gridDim.x - 1 - blockIdx.x;
}

// Computes: y = x / sqrt(mean(x²) + eps) * weight (Zhang & Sennrich 2019), rounded to T.   Reads: x [rows][dim],
// weight [dim].   Writes: y [rows][dim].   Grid × block: rows × 512; a block owns a row.   Preconditions: dim % 4 = 0
// (usable_cuda).
template <typename T> __global__ void rmsnorm_kernel(T *y, const float *x, const float *weight, float eps, int dim) {
    constexpr int HELD = 4; // of a thread's float4s in registers: up to a dim of 8192 x is read once
    const int n = dim / 4, first = threadIdx.x;
    float4 v[HELD], w[HELD];
    for (int j = 0; j < HELD; j++)
        if (first + j * 512 < n) w[j] = ((const float4 *)weight)[first + j * 512];
    wait_for_previous_kernel();
    size_t row = newest_first();
    const float4 *from = (const float4 *)(x + row * dim);
    float squares = 0;
    auto add = [&](float4 v) { squares += (v.x * v.x + v.y * v.y) + (v.z * v.z + v.w * v.w); };
    for (int j = 0; j < HELD; j++)
        if (first + j * 512 < n) add(v[j] = from[first + j * 512]);
    for (int i = first + HELD * 512; i < n; i += 512) add(from[i]);
    float scale = 1.0f / sqrtf(block_sum(squares) / (float)dim + eps);
    auto store = [&](int i, float4 v, float4 w) {
        store4(y + row * dim + 4 * i,
               make_float4(w.x * (v.x * scale), w.y * (v.y * scale), w.z * (v.z * scale), w.w * (v.w * scale)));
    };
    for (int j = 0; j < HELD; j++)
        if (first + j * 512 < n) store(first + j * 512, v[j], w[j]);
    for (int i = first + HELD * 512; i < n; i += 512) store(i, from[i], ((const float4 *)weight)[i]);
}

// Computes: cosine and sine of the float32 angle pos × freq.   Reads: pos [rows], freq [half].   Writes: phases
// [rows][half]. Grid × block: rows × 128; a block owns a row.   Preconditions: none.
__global__ void phases_kernel(float2 *phases, const int *pos, const float *freq, int half) {
    for (int i = threadIdx.x; i < half; i += blockDim.x)
        phases[(size_t)blockIdx.x * half + i] = phase_of(pos[blockIdx.x], freq[i]);
}

// Computes: y = x rounded to T.   Reads: x [n].   Writes: y [n].
// Grid × block: enough × 256; a thread owns four elements.   Preconditions: n % 4 = 0.
template <typename T> __global__ void round_kernel(T *y, const float *x, size_t n) {
    wait_for_previous_kernel();
    let_next_kernel_start(); // attention, in a step
    size_t i = 4 * ((size_t)newest_first() * blockDim.x + threadIdx.x);
    if (i < n) store4(y + i, *(const float4 *)(x + i));
}

// Computes: a prompt's keys and values rounded to T, in their places in the cache.   Reads: x
// [2][n_kv_heads][T][head_dim]: keys, values; pos and slots [T].   Writes: k, v
// [slot][n_kv_heads][max_len][head_dim].   Grid × block: T × 256; a block owns a row.   Preconditions: head_dim % 4 =
// 0, pos < max_len.
template <typename T>
__global__ void cache_kernel(T *k, T *v, const float *x, const int *pos, const int *slots, int n_kv_heads, int max_len,
                             int head_dim) {
    wait_for_previous_kernel();
    int row = newest_first(), quads = head_dim / 4;
    size_t at = (size_t)slots[row] * n_kv_heads * max_len + pos[row];
    for (int i = threadIdx.x; i < 2 * n_kv_heads * quads; i += blockDim.x) {
        int head = i / quads, dim = 4 * (i % quads), kv_head = head < n_kv_heads ? head : head - n_kv_heads;
        store4((head < n_kv_heads ? k : v) + (at + (size_t)kv_head * max_len) * head_dim + dim,
               *(const float4 *)(x + ((size_t)head * gridDim.x + row) * head_dim + dim));
    }
}

// Computes: y = x in float32.   Reads: x [n].   Writes: y [n].
// Grid × block: enough × 256; a thread owns four elements.   Preconditions: n % 4 = 0.
template <typename T> __global__ void widen_kernel(float *y, const T *x, size_t n) {
    size_t i = 4 * ((size_t)blockIdx.x * blockDim.x + threadIdx.x);
    if (i < n) *(float4 *)(y + i) = make_float4(to_float(x[i]), to_float(x[i + 1]), to_float(x[i + 2]), to_float(x[i + 3]));
}

__device__ static float silu(float x) {
    return x / (1.0f + expf(-x));
}

// Computes: h = gate / (1 + exp(-gate)) * up (Shazeer 2020), rounded to T.   Reads: gate, up [n].   Writes: h [n].
// Grid × block: enough × 256; a thread owns four elements.   Preconditions: n % 4 = 0.
template <typename T> __global__ void swiglu_kernel(T *h, const float *gate, const float *up, size_t n) {
    wait_for_previous_kernel();
    size_t i = 4 * ((size_t)newest_first() * blockDim.x + threadIdx.x);
    if (i >= n) return;
    float4 g = *(const float4 *)(gate + i), u = *(const float4 *)(up + i);
    store4(h + i, make_float4(silu(g.x) * u.x, silu(g.y) * u.y, silu(g.z) * u.z, silu(g.w) * u.w));
}

// Computes: some rows of x and, in its own order, of what is known about each.   Reads: x [*][n] in 16 bytes each, pos
// and slots [*], rows [grid].   Writes: y [grid][n], row_pos and row_slots [grid].   Grid × block: rows × 256; a block
// owns a row.   Preconditions: none.
__global__ void gather_kernel(uint4 *y, const uint4 *x, int n, int *row_pos, const int *pos, int *row_slots,
                              const int *slots, const int *rows) {
    size_t to = blockIdx.x, from = rows[blockIdx.x];
    for (int i = threadIdx.x; i < n; i += blockDim.x) y[to * n + i] = x[from * n + i];
    if (threadIdx.x > 0) return;
    row_pos[to] = pos[from];
    row_slots[to] = slots[from];
}

// Computes: the largest logit's id, the lowest of equals; -1 if one is not finite.   Reads: logits [rows][vocab].
// Writes: choice [rows].   Grid × block: rows × 1024; a block owns a row.   Preconditions: none.
__global__ void choose_kernel(int *choice, const float *logits, int vocab) {
    constexpr int AHEAD = 16;
    __shared__ float best_of[1024];
    __shared__ int id_of[1024];
    const float *row = logits + (size_t)blockIdx.x * vocab;
    float best = -INFINITY;
    int id = vocab, bad = 0;
    for (int at = threadIdx.x; at < vocab; at += AHEAD * blockDim.x) {
        float logit[AHEAD]; // many loads in flight: one block has to read it all
        for (int j = 0; j < AHEAD; j++) logit[j] = at + j * blockDim.x < vocab ? row[at + j * blockDim.x] : -INFINITY;
        for (int j = 0; j < AHEAD; j++) {
            bad |= at + j * blockDim.x < vocab && !isfinite(logit[j]);
            if (logit[j] > best) best = logit[j], id = at + j * blockDim.x;
        }
    }
    best_of[threadIdx.x] = best;
    id_of[threadIdx.x] = id;
    bad = __syncthreads_or(bad);
    for (int step = 512; step > 0; step /= 2) {
        if (threadIdx.x < step) {
            float other = best_of[threadIdx.x + step];
            int other_id = id_of[threadIdx.x + step];
            if (other > best_of[threadIdx.x] || (other == best_of[threadIdx.x] && other_id < id_of[threadIdx.x])) {
                best_of[threadIdx.x] = other;
                id_of[threadIdx.x] = other_id;
            }
        }
        __syncthreads();
    }
    if (threadIdx.x == 0) choice[blockIdx.x] = bad ? -1 : id_of[0];
}

// Computes: nothing; tells the host the choice, and makes it the next step's input.   Reads: choice [n].   Writes:
// choice_host [n], pinned; of step (NULL: none) tokens and lens.   Grid × block: 1 × MAX_SLOTS.   Preconditions: n <=
// MAX_SLOTS if there is a step.
__global__ void publish_kernel(int *choice_host, const int *choice, StepInput *step, int n) {
    for (int i = threadIdx.x; i < n; i += blockDim.x) choice_host[i] = choice[i];
    if (!step || threadIdx.x >= n) return;
    step->tokens[threadIdx.x] = max(choice[threadIdx.x], 0); // -1: the caller stops here
    step->lens[threadIdx.x]++;
}

// Computes: rows of a matrix in their new dtype and order.   Reads: src S [rows][cols], rows first .. of the matrix.
// Writes: dst D, the whole matrix. head_dim > 0: row i of a head's first half becomes its row 2i, of its second half
// 2i+1. Grid × block: rows × 256; a block owns a row.   Preconditions: first + rows within the matrix.
template <typename D, typename S>
__global__ void place_rows_kernel(D *dst, const S *src, uint64_t first, uint64_t cols, int head_dim) {
    uint64_t row = first + blockIdx.x, to = row;
    if (head_dim > 0) {
        int i = (int)(row % head_dim), half = head_dim / 2;
        to = row - i + (i < half ? 2 * i : 2 * (i - half) + 1);
    }
    for (uint64_t c = threadIdx.x; c < cols; c += blockDim.x)
        dst[to * cols + c] = from_float<D>(to_float(src[(uint64_t)blockIdx.x * cols + c]));
}

// Computes: a synthetic tensor, as forward_cpu.c's synthesize: uniform in ±range/2, or ones for a norm.
// Reads: nothing.   Writes: dst [n].   Grid × block: any × 256, strided.   Preconditions: none.
template <typename D> __global__ void synthesize_kernel(D *dst, uint64_t n, float range, uint32_t salt) {
    for (uint64_t i = (uint64_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (uint64_t)gridDim.x * blockDim.x) {
        uint32_t h = ((uint32_t)i + salt) * 0x9E3779B1u;
        h = (h ^ h >> 16) * 0x21F0AAADu;
        h = (h ^ h >> 15) * 0xD35A2D97u;
        float value = range == 0 ? 1.0f : ((float)(h >> 8) * 0x1p-24f - 0.5f) * range;
        dst[i] = from_float<D>(__uint_as_float(__float_as_uint(value) & (range == 0 ? 0xFFFFFFFFu : 0xFFFF0000u)));
    }
}

static unsigned blocks_for(size_t n) { // of 256 threads with four elements each
    return (unsigned)((n + 1023) / 1024);
}

static bool embed(CudaState *s, const Model *m, const int *tokens, int T, Error *err) {
    int dim = m->config.dim;
    const void *table = m->weights.tok_embeddings;
    if (s->weight_type == CUDA_R_16BF) embed_kernel<<<T, 256, 0, s->stream>>>(s->x, (const __nv_bfloat16 *)table, tokens, dim);
    if (s->weight_type == CUDA_R_16F) embed_kernel<<<T, 256, 0, s->stream>>>(s->x, (const __half *)table, tokens, dim);
    if (s->weight_type == CUDA_R_32F) embed_kernel<<<T, 256, 0, s->stream>>>(s->x, (const float *)table, tokens, dim);
    CUDA_TRY(cudaGetLastError());
    return true;
}

template <typename T> static cudaError_t rmsnorm_as(CudaState *s, const float *weight, float eps, int n, int dim) {
    return launch_kernel(rmsnorm_kernel<T>, n, 512, 0, s->early, s->stream, (T *)s->xb, (const float *)s->x, weight,
                         eps, dim);
}

static bool rmsnorm(CudaState *s, const float *weight, float eps, int T, int dim, Error *err) {
    if (s->type == CUDA_R_16BF) CUDA_TRY(rmsnorm_as<__nv_bfloat16>(s, weight, eps, T, dim));
    if (s->type == CUDA_R_16F) CUDA_TRY(rmsnorm_as<__half>(s, weight, eps, T, dim));
    if (s->type == CUDA_R_32F) CUDA_TRY(rmsnorm_as<float>(s, weight, eps, T, dim));
    return true;
}

template <typename T> static cudaError_t round_as(CudaState *s, void *out, const float *in, size_t n) {
    return launch_kernel(round_kernel<T>, blocks_for(n), 256, 0, s->early, s->stream, (T *)out, in, n);
}

// To the dtype of products; nothing to do in float32, where out is in.
static bool round_to_type(CudaState *s, void *out, const float *in, size_t n, Error *err) {
    if (s->type == CUDA_R_16BF) CUDA_TRY(round_as<__nv_bfloat16>(s, out, in, n));
    if (s->type == CUDA_R_16F) CUDA_TRY(round_as<__half>(s, out, in, n));
    return true;
}

template <typename T> static cudaError_t cache_as(const Model *m, CudaState *s, const float *in, int n, int layer) {
    const Config *c = &m->config;
    size_t at = kv_elements(layer, m->kv.n_slots, c->n_kv_heads, m->kv.max_len, c->head_dim);
    return launch_kernel(cache_kernel<T>, n, 256, 0, s->early, s->stream, (T *)m->kv.k + at, (T *)m->kv.v + at, in,
                         (const int *)s->pos, (const int *)s->row_slots, c->n_kv_heads, m->kv.max_len, c->head_dim);
}

// A prompt's keys and values, of T rows, into the cache.
static bool cache_prompt(const Model *m, CudaState *s, const float *in, int T, int layer, Error *err) {
    if (s->type == CUDA_R_16BF) CUDA_TRY(cache_as<__nv_bfloat16>(m, s, in, T, layer));
    if (s->type == CUDA_R_16F) CUDA_TRY(cache_as<__half>(m, s, in, T, layer));
    if (s->type == CUDA_R_32F) CUDA_TRY(cache_as<float>(m, s, in, T, layer));
    return true;
}

template <typename T> static cudaError_t swiglu_as(CudaState *s, size_t n) {
    return launch_kernel(swiglu_kernel<T>, blocks_for(n), 256, 0, s->early, s->stream, (T *)s->h,
                         (const float *)s->gate_up, (const float *)s->gate_up + n, n);
}

static bool swiglu(CudaState *s, size_t n, Error *err) {
    if (s->type == CUDA_R_16BF) CUDA_TRY(swiglu_as<__nv_bfloat16>(s, n));
    if (s->type == CUDA_R_16F) CUDA_TRY(swiglu_as<__half>(s, n));
    if (s->type == CUDA_R_32F) CUDA_TRY(swiglu_as<float>(s, n));
    return true;
}

// ---- cuBLAS ---------------------------------------------------------------------------------------------------------

// A matrix [n][k] as it enters a product: as it is, or widened into s->wide, `at` elements behind its start.
static bool enter(CudaState *s, const void **w, size_t n, size_t k, size_t at, Error *err) {
    if (s->weight_type == s->type) return true;
    if (at + n * k > s->wide_elements)
        return fail(err, "%zu elements to widen, room for %zu", at + n * k, s->wide_elements);
    float *to = s->wide + at;
    if (s->weight_type == CUDA_R_16BF)
        widen_kernel<<<blocks_for(n * k), 256, 0, s->stream>>>(to, (const __nv_bfloat16 *)*w, n * k);
    else widen_kernel<<<blocks_for(n * k), 256, 0, s->stream>>>(to, (const __half *)*w, n * k);
    CUDA_TRY(cudaGetLastError());
    *w = to;
    return true;
}

// out[T][n] (+)= in[T][k] · w[n][k]ᵀ, in and w of s->type, sums in float32. cuBLAS counts columns first: the same
// memory is outᵀ = w · inᵀ there. Float32 stays float32: the default math mode never takes TF32. A matrix that has to
// be widened comes in slabs of its rows.
static bool matmul(CudaState *s, void *out, const void *w, const void *in, int T, int n, int k, float beta,
                   Error *err) {
    const float one = 1;
    int slab = s->weight_type == s->type || s->wide_elements / k > (size_t)n ? n : (int)(s->wide_elements / k);
    for (int first = 0; first < n; first += slab) {
        int rows = n - first < slab ? n - first : slab;
        const void *part = (const char *)w + (size_t)first * k * s->weight_element;
        if (!enter(s, &part, rows, k, 0, err)) return false;
        CUBLAS_TRY(cublasGemmEx(s->blas, CUBLAS_OP_T, CUBLAS_OP_N, rows, T, k, &one, part, s->type, k, in, s->type, k,
                                &beta, (float *)out + first, CUDA_R_32F, n, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
    }
    return true;
}

// Several products of one input, in one call: out[count][T][n] = in[T][k] · w[i][n][k]ᵀ, the matrices w[i] `stride`
// elements apart.
static bool matmul_many(CudaState *s, float *out, const void *w, long long stride, const void *in, int T, int count,
                        int n, int k, Error *err) {
    const float one = 1, zero = 0;
    const void *first = w;
    if (s->weight_type != s->type) {
        for (int i = 0; i < count; i++) {
            const void *each = (const char *)w + i * stride * (long long)s->weight_element;
            if (!enter(s, &each, n, k, (size_t)i * n * k, err)) return false;
        }
        first = s->wide;
        stride = (long long)n * k;
    }
    CUBLAS_TRY(cublasGemmStridedBatchedEx(s->blas, CUBLAS_OP_T, CUBLAS_OP_N, n, T, k, &one, first, s->type, k, stride,
                                          in, s->type, k, 0, &zero, out, CUDA_R_32F, n, (long long)T * n, count,
                                          CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
    return true;
}

// matmul_many for so many rows that the GPU's power is the limit, and what costs least of it is fastest: in tiles of
// 168 × 128, if cuBLAS offers them. (H200, gate and up of 8B, 8192 rows, call after call: 2.6 % less time than in
// its own choice of 320 × 128.)
static bool matmul_long(CudaState *s, float *out, const void *w, long long stride, const void *in, int T, int count,
                        int n, int k, Error *err) {
    uintptr_t addresses = (uintptr_t)w | (uintptr_t)(stride * (long long)s->element) | (uintptr_t)in | (uintptr_t)out;
    if (s->type == CUDA_R_32F || addresses % 256) // what cuBLAS offers counts on 256
        return matmul_many(s, out, w, stride, in, T, count, n, k, err);
    const float one = 1, zero = 0;
    const cublasOperation_t transposed = CUBLAS_OP_T;
    const size_t workspace = WORKSPACE_BYTES;
    const long long in_stride = 0, out_stride = (long long)T * n;
    cublasLtHandle_t lt = (cublasLtHandle_t)s->blas; // as cuBLAS's manual allows
    cublasLtMatmulDesc_t product = NULL;
    cublasLtMatrixLayout_t of_w = NULL, of_in = NULL, of_out = NULL;
    cublasLtMatmulPreference_t limits = NULL;
    cublasLtMatmulHeuristicResult_t offers[16];
    int n_offers = 0, chosen = -1;
    cublasStatus_t status = CUBLAS_STATUS_SUCCESS;
    auto then = [&](auto call) {
        if (status == CUBLAS_STATUS_SUCCESS) status = call();
    };
    auto layout = [&](cublasLtMatrixLayout_t *l, cudaDataType_t type, int rows, int cols, long long batch_stride) {
        then([&] { return cublasLtMatrixLayoutCreate(l, type, rows, cols, rows); });
        then([&] {
            return cublasLtMatrixLayoutSetAttribute(*l, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &count, sizeof count);
        });
        then([&] {
            return cublasLtMatrixLayoutSetAttribute(*l, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &batch_stride,
                                                    sizeof batch_stride);
        });
    };
    then([&] { return cublasLtMatmulDescCreate(&product, CUBLAS_COMPUTE_32F, CUDA_R_32F); });
    then([&] {
        return cublasLtMatmulDescSetAttribute(product, CUBLASLT_MATMUL_DESC_TRANSA, &transposed, sizeof transposed);
    });
    layout(&of_w, s->type, k, n, stride);
    layout(&of_in, s->type, k, T, in_stride);
    layout(&of_out, CUDA_R_32F, n, T, out_stride);
    then([&] { return cublasLtMatmulPreferenceCreate(&limits); });
    then([&] {
        return cublasLtMatmulPreferenceSetAttribute(limits, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace,
                                                    sizeof workspace);
    });
    then([&] {
        return cublasLtMatmulAlgoGetHeuristic(lt, product, of_w, of_in, of_out, of_out, limits, 16, offers, &n_offers);
    });
    for (int i = 0; status == CUBLAS_STATUS_SUCCESS && i < n_offers; i++) {
        int tile = CUBLASLT_MATMUL_TILE_UNDEFINED;
        size_t written;
        cublasLtMatmulAlgoConfigGetAttribute(&offers[i].algo, CUBLASLT_ALGO_CONFIG_TILE_ID, &tile, sizeof tile, &written);
        if (chosen < 0 && offers[i].state == CUBLAS_STATUS_SUCCESS && tile == CUBLASLT_MATMUL_TILE_168x128) chosen = i;
    }
    if (chosen >= 0)
        status = cublasLtMatmul(lt, product, &one, w, of_w, in, of_in, &zero, out, of_out, out, of_out,
                                &offers[chosen].algo, s->blas_workspace, workspace, s->stream);
    if (limits) cublasLtMatmulPreferenceDestroy(limits);
    if (of_out) cublasLtMatrixLayoutDestroy(of_out);
    if (of_in) cublasLtMatrixLayoutDestroy(of_in);
    if (of_w) cublasLtMatrixLayoutDestroy(of_w);
    if (product) cublasLtMatmulDescDestroy(product);
    bool done = chosen >= 0 && status == CUBLAS_STATUS_SUCCESS;
    return done || matmul_many(s, out, w, stride, in, T, count, n, k, err);
}

// Heads [n_heads][T][head_dim] of the matrices from w on: wq, wk and wv follow each other in memory, so that one call
// has a product for every head. Of one row, all heads are one product with the same result in the same place.
static bool matmul_heads(CudaState *s, const Config *c, float *out, const void *w, int T, int n_heads, Error *err) {
    if (T == 1) return matmul(s, out, w, s->xb, 1, n_heads * c->head_dim, c->dim, 0, err);
    return matmul_many(s, out, w, (long long)c->head_dim * c->dim, s->xb, T, n_heads, c->head_dim, c->dim, err);
}

// Rotates x[n_heads][T][head_dim] in place: every pair, as a complex number, times its phase. Queries and keys at once.
static bool rope(CudaState *s, float *x, int T, int n_heads, int head_dim, Error *err) {
    int pairs = T * head_dim / 2; // of one head: a column
    cuComplex *c = (cuComplex *)x;
    CUBLAS_TRY(
        cublasCdgmm(s->blas, CUBLAS_SIDE_LEFT, pairs, n_heads, c, pairs, (const cuComplex *)s->phases, 1, c, pairs));
    return true;
}

// ---- one part of a batch --------------------------------------------------------------------------------------------

AttentionArgs attention_args(const Model *m, const CudaState *s, int n_seq, int T, int layer) {
    const Config *c = &m->config;
    size_t at = kv_elements(layer, m->kv.n_slots, c->n_kv_heads, m->kv.max_len, c->head_dim) * s->element;
    AttentionArgs a;
    memset(&a, 0, sizeof a);
    a.dtype = s->attention_dtype;
    a.n_seq = n_seq;
    a.n_heads = c->n_heads;
    a.n_kv_heads = c->n_kv_heads;
    a.head_dim = c->head_dim;
    a.causal = 1;
    a.append = 1;
    size_t head = (size_t)T * (size_t)c->head_dim * s->element;
    a.q = s->qkv_in;
    a.k_new = (char *)s->qkv_in + (size_t)c->n_heads * head;
    a.v_new = (char *)s->qkv_in + (size_t)(c->n_heads + c->n_kv_heads) * head;
    a.q_token_stride = a.k_token_stride = a.v_token_stride = c->head_dim;
    a.q_head_stride = a.k_head_stride = a.v_head_stride = (int64_t)T * c->head_dim;
    a.out = s->att;
    a.out_token_stride = c->q_dim;
    a.out_head_stride = c->head_dim;
    a.k_cache = (char *)m->kv.k + at;
    a.v_cache = (char *)m->kv.v + at;
    a.cache_max_len = a.block_size = m->kv.max_len;
    a.block_table = s->slots;
    a.kv_stable = 1; // of a step: what runs before it writes neither cache nor lengths
    a.workspace = s->attention_workspace;
    a.workspace_bytes = s->attention_workspace_bytes;
    return a;
}

bool first_time(const Model *m, bool *said) {
    bool first = m->verbose && !*said && !((CudaState *)m->state)->warming;
    *said = *said || first;
    return first;
}

// The phases of T positions, by which rope() rotates queries and keys from here on.
static bool phases(CudaState *s, const Config *c, const int *pos, int T, Error *err) {
    phases_kernel<<<T, 128, 0, s->stream>>>(s->phases, pos, s->rope_freq, c->head_dim / 2);
    CUDA_TRY(cudaGetLastError());
    return true;
}

// Attention of T rows' queries, one row for each of T sequences whose lengths are on the device: s->att.
static bool attend_step(Model *m, const int *lens, int T, int layer, bool verbose, Error *err) {
    const Config *c = &m->config;
    CudaState *s = (CudaState *)m->state;
    if (!matmul_heads(s, c, s->qkv, m->weights.layers[layer].wq, T, c->n_heads + 2 * c->n_kv_heads, err)) return false;
    if (!rope(s, s->qkv, T, c->n_heads + c->n_kv_heads, c->head_dim, err)) return false;
    if (!round_to_type(s, s->qkv_in, s->qkv, (size_t)T * (c->q_dim + 2 * c->kv_dim), err)) return false;
    AttentionArgs a = attention_args(m, s, T, T, layer);
    a.verbose = verbose;
    a.seq_lens_device = lens;
    return attention_decode(&a, s->stream) == 0 || fail(err, "%s", attention_error());
}

// The same for a prompt's rows, which are known on the host, and shape the launches.
static bool attend_prompt(Model *m, const Batch *b, const int *lens, int layer, bool verbose, Error *err) {
    const Config *c = &m->config;
    CudaState *s = (CudaState *)m->state;
    int T = b->n_rows;
    if (!matmul_heads(s, c, s->qkv, m->weights.layers[layer].wq, T, c->n_heads + 2 * c->n_kv_heads, err)) return false;
    if (!rope(s, s->qkv, T, c->n_heads + c->n_kv_heads, c->head_dim, err)) return false;
    if (!round_to_type(s, s->qkv_in, s->qkv, (size_t)T * c->q_dim, err)) return false;
    if (!cache_prompt(m, s, s->qkv + (size_t)T * c->q_dim, T, layer, err)) return false;
    AttentionArgs a = attention_args(m, s, b->n_seq, T, layer);
    a.verbose = verbose;
    a.append = 0;
    a.q_start = b->start;
    a.seq_lens = lens;
    return attention_prefill(&a, s->stream) == 0 || fail(err, "%s", attention_error());
}

// The same in the last layer, where some rows have no logits: their keys and values are all that is still needed of
// them. From here on only rows with logits are in x, by way of gate_up; for attention each is a sequence with one new
// token.
static bool attend_logits(Model *m, const Batch *b, const int *lens, int layer, bool verbose, Error *err) {
    const Config *c = &m->config;
    const LayerWeights *l = &m->weights.layers[layer];
    CudaState *s = (CudaState *)m->state;
    int T = b->n_rows, n = b->n_logits, start[LOGIT_ROWS + 1], pos[LOGIT_ROWS];
    if (!matmul_heads(s, c, s->qkv, l->wk, T, 2 * c->n_kv_heads, err)) return false;
    if (!rope(s, s->qkv, T, c->n_kv_heads, c->head_dim, err)) return false;
    if (!cache_prompt(m, s, s->qkv, T, layer, err)) return false;
    if (n == 0) return true;
    size_t row = (size_t)c->dim * sizeof(float);
    gather_kernel<<<n, 256, 0, s->stream>>>((uint4 *)s->gate_up, (const uint4 *)s->x, (int)(row / 16), s->logit_pos,
                                            s->pos, s->logit_slots, s->row_slots, s->logit_rows);
    CUDA_TRY(cudaGetLastError());
    CUDA_TRY(cudaMemcpyAsync(s->x, s->gate_up, n * row, cudaMemcpyDeviceToDevice, s->stream));
    if (!rmsnorm(s, l->attention_norm, c->norm_eps, n, c->dim, err)) return false;
    if (!matmul_heads(s, c, s->qkv, l->wq, n, c->n_heads, err)) return false;
    if (!phases(s, c, s->logit_pos, n, err)) return false;
    if (!rope(s, s->qkv, n, c->n_heads, c->head_dim, err)) return false;
    if (!round_to_type(s, s->qkv_in, s->qkv, (size_t)n * c->q_dim, err)) return false;
    for (int i = 0, seq = 0; i < n; i++) {
        while (b->logit_rows[i] >= b->start[seq + 1]) seq++;
        start[i] = i;
        pos[i] = lens[seq] + b->logit_rows[i] - b->start[seq];
    }
    start[n] = n;
    AttentionArgs a = attention_args(m, s, n, n, layer);
    a.verbose = verbose;
    a.append = 0;
    a.block_table = s->logit_slots;
    a.q_start = start;
    a.seq_lens = pos;
    return attention_prefill(&a, s->stream) == 0 || fail(err, "%s", attention_error());
}

// The steps of forward_cpu.c over T rows whose tokens and positions are on the device. host: the batch, for prefill;
// NULL: decode, one row for each of T sequences. Behind the last attention of a prompt only rows that have logits are
// in x.
static bool forward(Model *m, const Batch *host, const int *host_lens, const int *tokens, const int *pos, int T,
                    Error *err) {
    const Config *c = &m->config;
    const Weights *w = &m->weights;
    CudaState *s = (CudaState *)m->state;
    bool verbose = first_time(m, host ? &s->said_prefill : &s->said_decode);

    if (!embed(s, m, tokens, T, err)) return false;
    if (!phases(s, c, pos, T, err)) return false;

    for (int i = 0; i < c->n_layers; i++) {
        const LayerWeights *l = &w->layers[i];
        bool say = verbose && i == 0; // every layer is launched alike, but a prompt's last

        // attention: every token, of the normalised stream, to itself and to all before it
        if (!rmsnorm(s, l->attention_norm, c->norm_eps, T, c->dim, err)) return false;
        if (host && i + 1 == c->n_layers && host->n_logits < T) {
            if (!attend_logits(m, host, host_lens, i, say, err)) return false;
            T = host->n_logits;
            if (T == 0) return true;
        } else if (!(host ? attend_prompt(m, host, host_lens, i, say, err) : attend_step(m, pos, T, i, say, err)))
            return false;
        // back to the stream
        if (!matmul(s, s->x, l->wo, s->att, T, c->dim, c->q_dim, 1, err)) return false;

        // feed-forward: down(silu(gate) * up)
        if (!rmsnorm(s, l->ffn_norm, c->norm_eps, T, c->dim, err)) return false;
        long long from_w1_to_w3 = ((const char *)l->w3 - (const char *)l->w1) / (long long)s->weight_element;
        if (!(T < LONG_PROMPT ? matmul_many : matmul_long)(s, s->gate_up, l->w1, from_w1_to_w3, s->xb, T, 2,
                                                           c->hidden_dim, c->dim, err))
            return false;
        if (!swiglu(s, (size_t)T * c->hidden_dim, err)) return false;
        if (!matmul(s, s->x, l->w2, s->h, T, c->dim, c->hidden_dim, 1, err)) return false;
    }
    return true;
}

// The most likely token of n rows of logits, from row `first` on.
static bool choose(CudaState *s, int first, int n, int vocab, Error *err) {
    choose_kernel<<<n, 1024, 0, s->stream>>>(s->choice + first, s->logits + (size_t)first * vocab, vocab);
    CUDA_TRY(cudaGetLastError());
    return true;
}

// Logits, and the choice, of the n rows in x, from row `first` of the logits on.
static bool head(Model *m, int first, int n, Error *err) {
    const Config *c = &m->config;
    CudaState *s = (CudaState *)m->state;
    float *logits = s->logits + (size_t)first * c->vocab_size;
    if (!rmsnorm(s, m->weights.norm, c->norm_eps, n, c->dim, err)) return false;
    if (!matmul(s, logits, m->weights.output, s->xb, n, c->vocab_size, c->dim, 0, err)) return false;
    return choose(s, first, n, c->vocab_size, err);
}

// Sends the choice to the host. step: it is the next step's input, too.
static bool publish(CudaState *s, int n, StepInput *step, Error *err) {
    publish_kernel<<<1, MAX_SLOTS, 0, s->stream>>>(s->choice_host, s->choice, step, n);
    CUDA_TRY(cudaGetLastError());
    return true;
}

// Waits for the choice, at the event `chosen`, and counts the batch's positions.
static bool finish(Model *m, const Batch *b, Error *err) {
    CudaState *s = (CudaState *)m->state;
    s->n_logits = b->n_logits;
    CUDA_TRY(cudaEventSynchronize(s->chosen));
    memcpy(m->choice, s->ahead.running ? s->kept_choice : s->choice_host, (size_t)b->n_logits * sizeof(int));
    for (int i = 0; i < b->n_seq; i++) m->kv.len[b->slot[i]] += b->start[i + 1] - b->start[i];
    return true;
}

// ---- prefill and decode ---------------------------------------------------------------------------------------------

static bool prefill_part(Model *m, const Batch *b, int first_logit, Error *err) {
    CudaState *s = (CudaState *)m->state;
    int lens[MAX_SLOTS], *pos = s->pos_host, *slots = s->pos_host + s->max_rows;
    for (int i = 0; i < b->n_seq; i++) {
        lens[i] = m->kv.len[b->slot[i]];
        for (int r = b->start[i]; r < b->start[i + 1]; r++) {
            pos[r] = lens[i] + r - b->start[i];
            slots[r] = b->slot[i];
        }
    }
    CUDA_TRY(cudaMemcpyAsync(s->tokens, b->tokens, (size_t)b->n_rows * sizeof(int), cudaMemcpyHostToDevice, s->stream));
    CUDA_TRY(cudaMemcpyAsync(s->pos, pos, (size_t)b->n_rows * sizeof(int), cudaMemcpyHostToDevice, s->stream));
    CUDA_TRY(cudaMemcpyAsync(s->row_slots, slots, (size_t)b->n_rows * sizeof(int), cudaMemcpyHostToDevice, s->stream));
    CUDA_TRY(cudaMemcpyAsync(s->slots, b->slot, (size_t)b->n_seq * sizeof(int), cudaMemcpyHostToDevice, s->stream));
    CUDA_TRY(cudaMemcpyAsync(s->logit_rows, b->logit_rows, (size_t)b->n_logits * sizeof(int), cudaMemcpyHostToDevice,
                             s->stream));
    if (!forward(m, b, lens, s->tokens, s->pos, b->n_rows, err)) return false;
    return b->n_logits == 0 || head(m, first_logit, b->n_logits, err);
}

bool prefill_cuda(Model *m, const Batch *b, Error *err) {
    CudaState *s = (CudaState *)m->state;
    if (!model_has_room(m, b, err)) return false;
    s->ahead.running = false;
    s->ahead.n = 0;
    for (int first = 0; first < b->n_rows; first += s->max_rows) {
        BatchPart part;
        batch_part(b, first, b->n_rows - first < s->max_rows ? b->n_rows - first : s->max_rows, &part);
        if (model_interrupted(m)) return fail_interrupted(err);
        if (!prefill_part(m, &part.batch, part.first_logit, err)) return false;
        Batch counted = part.batch; // its positions are taken now; its logits are the whole batch's
        counted.n_logits = 0;
        CUDA_TRY(cudaEventRecord(s->chosen, s->stream));
        if (!finish(m, &counted, err)) return false;
        if (m->progress && b->n_rows > s->max_rows)
            m->progress("prefilling", (uint64_t)(first + part.batch.n_rows), (uint64_t)b->n_rows);
    }
    Batch logits = *b; // the positions are counted; what is left are the logits
    logits.n_seq = 0;
    if (!publish(s, b->n_logits, NULL, err)) return false;
    CUDA_TRY(cudaEventRecord(s->chosen, s->stream));
    return finish(m, &logits, err);
}

bool decode_step_cublas(Model *m, int n, Error *err) {
    CudaState *s = (CudaState *)m->state;
    CUDA_TRY(cudaMemcpyAsync(s->slots, s->step->slots, (size_t)n * sizeof(int), cudaMemcpyDeviceToDevice, s->stream));
    return forward(m, NULL, NULL, s->step->tokens, s->step->lens, n, err) && head(m, 0, n, err) &&
           publish(s, n, s->step, err);
}

// The last call's logits and choice stay as they are; what comes next writes the others.
static void keep_results(CudaState *s) {
    float *logits = s->logits;
    int *choice = s->choice_host;
    s->logits = s->kept_logits;
    s->choice_host = s->kept_choice;
    s->kept_logits = logits;
    s->kept_choice = choice;
    s->swapped = !s->swapped;
}

// The second step of so many rows is captured into a graph, and replayed from then on: launching 500 kernels one by one
// would take longer than running them.
static bool capture_step(Model *m, int n, Error *err) {
    CudaState *s = (CudaState *)m->state;
    cudaGraph_t graph = NULL;
    CUDA_TRY(cudaStreamBeginCapture(s->stream, cudaStreamCaptureModeThreadLocal));
    bool ok = s->decode_step(m, n, err);
    cudaError_t ended = cudaStreamEndCapture(s->stream, &graph);
    if (!ok) return false;
    CUDA_TRY(ended);
    ended = cudaGraphInstantiate(&s->graphs[s->swapped][n], graph, 0);
    cudaGraphDestroy(graph);
    CUDA_TRY(ended);
    return true;
}

// Whether a batch is the step after the last one, for the tokens that one chose.
static bool goes_on(const Model *m, const CudaState *s, const Batch *b) {
    if (s->ahead.n != b->n_seq) return false;
    for (int i = 0; i < b->n_seq; i++)
        if (b->slot[i] != s->ahead.slots[i] || m->kv.len[b->slot[i]] != s->ahead.lens[i] ||
            b->tokens[i] != m->choice[i])
            return false;
    return true;
}

static bool launch_step(Model *m, int n, Error *err) {
    CudaState *s = (CudaState *)m->state;
    if (!s->ran[n]) {
        s->ran[n] = true;
        return s->decode_step(m, n, err);
    }
    if (!s->graphs[s->swapped][n] && !capture_step(m, n, err)) return false;
    CUDA_TRY(cudaGraphLaunch(s->graphs[s->swapped][n], s->stream));
    return true;
}

bool decode_cuda(Model *m, const Batch *b, Error *err) {
    CudaState *s = (CudaState *)m->state;
    int n = b->n_seq;
    if (!model_has_room(m, b, err)) return false;
    bool follows = goes_on(m, s, b), room = true;
    if (!(follows && s->ahead.running)) {
        for (int i = 0; i < n; i++) {
            s->step_host->tokens[i] = b->tokens[i];
            s->step_host->lens[i] = m->kv.len[b->slot[i]];
            s->step_host->slots[i] = b->slot[i];
        }
        CUDA_TRY(cudaMemcpyAsync(s->step, s->step_host, sizeof *s->step, cudaMemcpyHostToDevice, s->stream));
        if (!launch_step(m, n, err)) return false;
    }
    s->ahead.n = n;
    for (int i = 0; i < n; i++) {
        s->ahead.slots[i] = b->slot[i];
        s->ahead.lens[i] = m->kv.len[b->slot[i]] + 1;
        room = room && s->ahead.lens[i] < m->kv.max_len;
    }
    // One that follows is followed: who samples, or changes the batch, never has a step run in vain twice.
    s->ahead.running = follows && room && s->graphs[s->swapped][n];
    CUDA_TRY(cudaEventRecord(s->chosen, s->stream));
    if (s->ahead.running) {
        keep_results(s);
        if (!launch_step(m, n, err)) return false;
    }
    return finish(m, b, err);
}

bool read_logits_cuda(Model *m, Error *err) {
    CudaState *s = (CudaState *)m->state;
    size_t bytes = (size_t)s->n_logits * (size_t)m->config.vocab_size * sizeof(float);
    bool kept = s->ahead.running; // the next step is already at work in the stream
    cudaStream_t stream = kept ? s->side : s->stream;
    CUDA_TRY(cudaMemcpyAsync(m->logits, kept ? s->kept_logits : s->logits, bytes, cudaMemcpyDeviceToHost, stream));
    CUDA_TRY(cudaStreamSynchronize(stream));
    return true;
}

// ---- weights --------------------------------------------------------------------------------------------------------

// One tensor on its way to the device.
struct Placement {
    const void **slot;
    uint64_t rows, cols; // a norm: one row, always float32
    uint64_t file_begin; // in the file's data; a synthetic model has none
    char *to;
    int head_dim; // of wq and wk, whose rows are interleaved; else 0
    bool norm;
};

struct Plan {
    Model *model;
    CudaState *state;
    Placement *tensors;
    size_t n;
    uint64_t bytes; // on the device
};

// WeightVisitor: where every tensor goes, 128-byte aligned, which leaves no gap between wq, wk and wv.
static bool plan_tensor(void *context, const char *name, const void **slot, uint64_t rows, uint64_t cols, Error *err) {
    Plan *p = (Plan *)context;
    Placement *more = (Placement *)realloc(p->tensors, (p->n + 1) * sizeof *more);
    if (!more) return fail(err, "out of memory: %zu tensors", p->n + 1);
    p->tensors = more;
    const char *last = strrchr(name, '.');
    bool rotated = last && (strcmp(last, ".wq") == 0 || strcmp(last, ".wk") == 0);
    const Tensor *in_file = p->model->file.n_tensors ? safetensors_find(&p->model->file, name) : NULL;
    Placement t = {slot,
                   cols ? rows : 1,
                   cols ? cols : rows,
                   in_file ? in_file->begin : 0,
                   (char *)p->bytes,
                   rotated ? p->model->config.head_dim : 0,
                   cols == 0};
    uint64_t bytes = t.rows * t.cols * (t.norm ? sizeof(float) : p->state->weight_element);
    p->bytes += (bytes + 127) / 128 * 128;
    p->tensors[p->n++] = t;
    return true;
}

template <typename D>
static void place_as(const Placement *t, const void *staged, DType from, uint64_t first, unsigned rows,
                     cudaStream_t stream) {
    if (from == DTYPE_BF16)
        place_rows_kernel<<<rows, 256, 0, stream>>>((D *)t->to, (const __nv_bfloat16 *)staged, first, t->cols,
                                                    t->head_dim);
    if (from == DTYPE_F16)
        place_rows_kernel<<<rows, 256, 0, stream>>>((D *)t->to, (const __half *)staged, first, t->cols, t->head_dim);
    if (from == DTYPE_F32)
        place_rows_kernel<<<rows, 256, 0, stream>>>((D *)t->to, (const float *)staged, first, t->cols, t->head_dim);
}

static bool place(CudaState *s, const Placement *t, const void *staged, DType from, uint64_t first, unsigned rows,
                  cudaStream_t stream, Error *err) {
    cudaDataType_t type = t->norm ? CUDA_R_32F : s->weight_type;
    if (type == CUDA_R_16BF) place_as<__nv_bfloat16>(t, staged, from, first, rows, stream);
    if (type == CUDA_R_16F) place_as<__half>(t, staged, from, first, rows, stream);
    if (type == CUDA_R_32F) place_as<float>(t, staged, from, first, rows, stream);
    CUDA_TRY(cudaGetLastError());
    return true;
}

// One thread's way from the file to the device: it reads into one pinned buffer while the other is being copied.
struct Stager {
    cudaStream_t stream;
    char *host[2], *device[2]; // of the upload's two blocks
    cudaEvent_t copied[2];
    int turn;
};

static bool stager_open(Stager *g, char *host, char *device, uint64_t bytes, Error *err) {
    CUDA_TRY(cudaStreamCreateWithFlags(&g->stream, cudaStreamNonBlocking));
    for (int i = 0; i < 2; i++) {
        g->host[i] = host + (uint64_t)i * bytes;
        g->device[i] = device + (uint64_t)i * bytes;
        CUDA_TRY(cudaEventCreateWithFlags(&g->copied[i], cudaEventDisableTiming));
    }
    return true;
}

static void stager_close(Stager *g) {
    for (int i = 0; i < 2; i++)
        if (g->copied[i]) cudaEventDestroy(g->copied[i]);
    if (g->stream) cudaStreamDestroy(g->stream);
}

// Rows first .. first+rows of a tensor.
static bool stager_send(Stager *g, const Model *m, CudaState *s, const Placement *t, uint64_t first, uint64_t rows,
                        Error *err) {
    DType from = t->norm ? DTYPE_F32 : m->weights.dtype;
    uint64_t row_bytes = t->cols * (uint64_t)dtype_bytes[from];
    int i = g->turn;
    g->turn ^= 1;
    CUDA_TRY(cudaEventSynchronize(g->copied[i])); // an event not yet recorded counts as done
    if (!safetensors_read(&m->file, g->host[i], t->file_begin + first * row_bytes, rows * row_bytes, err)) return false;
    CUDA_TRY(cudaMemcpyAsync(g->device[i], g->host[i], rows * row_bytes, cudaMemcpyHostToDevice, g->stream));
    if (!place(s, t, g->device[i], from, first, (unsigned)rows, g->stream, err)) return false;
    CUDA_TRY(cudaEventRecord(g->copied[i], g->stream));
    return true;
}

// A piece of work for one thread: whole rows, at most a buffer's worth.
struct Piece {
    const Placement *tensor;
    uint64_t first, rows;
};

// Computes two short prompts on whatever is in memory, so that the first real one does not wait for cuBLAS's kernels to
// be loaded, which takes longer than to run them. Nothing of it stays: no position is counted.
static bool warm_up(Model *m, Error *err) {
    CudaState *s = (CudaState *)m->state;
    static const int lengths[] = {12, 512};
    s->warming = true;
    int slot = 0, zeros[512] = {0};
    for (int i = 0; i < 2 && lengths[i] <= s->max_rows && lengths[i] <= m->kv.max_len; i++) {
        int start[2] = {0, lengths[i]}, last = lengths[i] - 1;
        Batch b = {lengths[i], 1, 1, zeros, &slot, start, &last};
        if (!prefill_part(m, &b, 0, err)) return false;
        CUDA_TRY(cudaStreamSynchronize(s->stream));
    }
    s->warming = false;
    return true;
}

static bool upload(Model *m, CudaState *s, const Plan *p, Error *err) {
    uint64_t largest_row = UPLOAD_BYTES;
    size_t n_pieces = 0;
    for (size_t i = 0; i < p->n; i++) {
        uint64_t row = p->tensors[i].cols * (p->tensors[i].norm ? 4 : (uint64_t)dtype_bytes[m->weights.dtype]);
        if (row > largest_row) largest_row = row;
    }
    Piece *pieces = NULL;
    for (int pass = 0; pass < 2; pass++) { // count, then fill
        if (pass == 1 && !(pieces = (Piece *)malloc((n_pieces + 1) * sizeof *pieces)))
            return fail(err, "out of memory: %zu pieces of the weights", n_pieces);
        n_pieces = 0;
        for (size_t i = 0; i < p->n; i++) {
            const Placement *t = &p->tensors[i];
            uint64_t row = t->cols * (t->norm ? 4 : (uint64_t)dtype_bytes[m->weights.dtype]), step = largest_row / row;
            for (uint64_t first = 0; first < t->rows; first += step) {
                if (pass == 1) pieces[n_pieces] = (Piece){t, first, t->rows - first < step ? t->rows - first : step};
                n_pieces++;
            }
        }
    }
    char *host = NULL, *device = NULL; // two buffers for each thread
    uint64_t staging = 2 * UPLOAD_THREADS * largest_row, sent = 0;
    cudaError_t status = cudaMallocHost((void **)&host, staging);
    if (status == cudaSuccess) status = cudaMalloc((void **)&device, staging);
    if (status != cudaSuccess)
        fail(err, "%.2f GB to stage the weights: %s", (double)staging * 1e-9, cudaGetErrorString(status));
#pragma omp parallel num_threads(UPLOAD_THREADS) if (!err->text[0])
    {
        Error own = {""};
        Stager g;
        memset(&g, 0, sizeof g);
        uint64_t mine = 2 * largest_row * (uint64_t)omp_get_thread_num();
        bool ok = !err->text[0] && stager_open(&g, host + mine, device + mine, largest_row, &own);
#pragma omp barrier // before a failure of another thread shows in err
        if (ok && omp_get_thread_num() == 0) ok = warm_up(m, &own);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < (int64_t)n_pieces; i++) {
            const Piece *piece = &pieces[i];
            if (ok && model_interrupted(m)) ok = fail_interrupted(&own);
            ok = ok && stager_send(&g, m, s, piece->tensor, piece->first, piece->rows, &own);
            if (!m->progress) continue;
#pragma omp critical
            {
                sent += piece->rows * piece->tensor->cols * s->weight_element;
                m->progress("loading", sent, p->bytes);
            }
        }
        cudaError_t last = g.stream ? cudaStreamSynchronize(g.stream) : cudaSuccess;
        if (ok && last != cudaSuccess) fail(&own, "uploading the weights: %s", cudaGetErrorString(last));
        stager_close(&g);
        if (own.text[0])
#pragma omp critical
            fail(err, "%s", own.text);
    }
    free(pieces);
    cudaFreeHost(host);
    cudaFree(device);
    return !err->text[0];
}

static bool synthesize(const Model *m, CudaState *s, const Plan *p, Error *err) {
    for (size_t i = 0; i < p->n; i++) {
        const Placement *t = &p->tensors[i];
        uint64_t n = t->rows * t->cols;
        float range = t->norm ? 0 : 2 * 1.7f * 1.7320508f / sqrtf((float)t->cols);
        uint32_t salt = (uint32_t)((m->seed + i) * 0x9E3779B97F4A7C15u >> 32);
        unsigned blocks = n / 256 < 8192 ? (unsigned)(n / 256 + 1) : 8192;
        cudaDataType_t type = t->norm ? CUDA_R_32F : s->weight_type;
        if (type == CUDA_R_16BF)
            synthesize_kernel<<<blocks, 256, 0, s->stream>>>((__nv_bfloat16 *)t->to, n, range, salt);
        if (type == CUDA_R_16F) synthesize_kernel<<<blocks, 256, 0, s->stream>>>((__half *)t->to, n, range, salt);
        if (type == CUDA_R_32F) synthesize_kernel<<<blocks, 256, 0, s->stream>>>((float *)t->to, n, range, salt);
        CUDA_TRY(cudaGetLastError());
    }
    CUDA_TRY(cudaStreamSynchronize(s->stream));
    return true;
}

// ---- memory ---------------------------------------------------------------------------------------------------------

struct Buffer {
    void **at;
    uint64_t bytes;
};

enum { N_BUFFERS = 28 };

// Every buffer but the weights, sized for the context; fills list and returns how many.
static int list_buffers(Model *m, CudaState *s, Buffer *list) {
    const Config *c = &m->config;
    uint64_t T = (uint64_t)s->max_rows, e = s->element;
    uint64_t kv = m->kv.bytes / 2;
    const Buffer all[] = {
        {&m->kv.k, kv},
        {&m->kv.v, kv},
        {(void **)&s->rope_freq, (uint64_t)c->head_dim / 2 * 4},
        {(void **)&s->x, T * (uint64_t)c->dim * 4},
        {&s->xb, T * (uint64_t)c->dim * e},
        {(void **)&s->qkv, T * (uint64_t)(c->q_dim + 2 * c->kv_dim) * 4},
        {s->type == CUDA_R_32F ? NULL : &s->qkv_in, T * (uint64_t)(c->q_dim + 2 * c->kv_dim) * e},
        {&s->att, T * (uint64_t)c->q_dim * e},
        {(void **)&s->gate_up, T * (uint64_t)(2 * c->hidden_dim > c->dim ? 2 * c->hidden_dim : c->dim) * 4},
        {&s->h, T * (uint64_t)c->hidden_dim * e},
        {(void **)&s->phases, T * (uint64_t)c->head_dim / 2 * 8},
        {(void **)&s->tokens, T * 4},
        {(void **)&s->pos, T * 4},
        {(void **)&s->row_slots, T * 4},
        {(void **)&s->logit_rows, LOGIT_ROWS * 4},
        {(void **)&s->logit_pos, LOGIT_ROWS * 4},
        {(void **)&s->logit_slots, LOGIT_ROWS * 4},
        {(void **)&s->logits, (uint64_t)s->max_logits * (uint64_t)c->vocab_size * 4},
        {(void **)&s->kept_logits, (uint64_t)s->max_logits * (uint64_t)c->vocab_size * 4},
        {(void **)&s->choice, LOGIT_ROWS * 4},
        {(void **)&s->step, sizeof *s->step},
        {(void **)&s->slots, MAX_SLOTS * 4},
        {s->wide_elements ? (void **)&s->wide : NULL, s->wide_elements * sizeof(float)},
        {&s->attention_workspace, s->attention_workspace_bytes},
        {&s->blas_workspace, WORKSPACE_BYTES},
    };
    int n = 0;
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        if (all[i].at) list[n++] = all[i];
    return n;
}

static bool size_state(Model *m, CudaState *s, Error *err) {
    const Config *c = &m->config;
    uint64_t positions = (uint64_t)m->kv.n_slots * (uint64_t)m->kv.max_len;
    s->max_rows = positions < MAX_ROWS ? (int)positions : MAX_ROWS;
    s->max_logits = positions < LOGIT_ROWS ? (int)positions : LOGIT_ROWS;
    AttentionArgs a;
    memset(&a, 0, sizeof a);
    a.dtype = s->attention_dtype;
    a.n_seq = m->kv.n_slots;
    a.n_heads = c->n_heads;
    a.n_kv_heads = c->n_kv_heads;
    a.head_dim = c->head_dim;
    a.cache_max_len = m->kv.max_len;
    s->attention_workspace_bytes = attention_workspace_bytes(&a);
    m->kv.bytes = 2 * s->element * kv_elements(c->n_layers, m->kv.n_slots, c->n_kv_heads, m->kv.max_len, c->head_dim);
    return s->attention_workspace_bytes != SIZE_MAX || fail(err, "%s", attention_error());
}

// Compares what is needed with what is free before anything is allocated, and says which context would fit.
static bool check_memory(const Model *m, const CudaState *s, uint64_t weights, const Buffer *list, int n, Error *err) {
    const Config *c = &m->config;
    size_t free_bytes, total;
    CUDA_TRY(cudaMemGetInfo(&free_bytes, &total));
    const uint64_t reserve = 256 << 20; // the upload's staging, kernels' own needs
    uint64_t buffers = 0, cache = m->kv.bytes;
    for (int i = 0; i < n; i++) buffers += list[i].bytes;
    uint64_t needed = weights + buffers + reserve;
    if (needed <= free_bytes) return true;
    uint64_t per_token = kv_elements(c->n_layers, m->kv.n_slots, c->n_kv_heads, 1, c->head_dim) * s->element * 2;
    uint64_t without_cache = needed - cache;
    if (without_cache >= free_bytes)
        return fail(err, "GPU memory: %.2f GB of weights and %.2f GB of buffers, %.2f GB are free of %.2f",
                    (double)weights * 1e-9, (double)(without_cache - weights) * 1e-9, (double)free_bytes * 1e-9,
                    (double)total * 1e-9);
    return fail(
        err,
        "GPU memory: %.2f GB of weights, %.2f GB of cache and %.2f GB of buffers, %.2f GB are free; a context of "
        "%" PRIu64 " would fit (-c)",
        (double)weights * 1e-9, (double)cache * 1e-9, (double)(without_cache - weights) * 1e-9,
        (double)free_bytes * 1e-9, (free_bytes - without_cache) / per_token);
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
    if (cudaFuncGetAttributes(&attributes, phases_kernel) != cudaSuccess) {
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

static void choose_types(const Model *m, CudaState *s, bool narrow) {
    const Config *c = &m->config;
    bool f32 = m->precision == PRECISION_F32, f16 = m->weights.dtype == DTYPE_F16;
    cudaDataType_t half = f16 ? CUDA_R_16F : CUDA_R_16BF;
    s->type = f32 ? CUDA_R_32F : half;
    s->attention_dtype = f32 ? ATTENTION_F32 : f16 ? ATTENTION_F16 : ATTENTION_BF16;
    s->element = f32 ? 4 : 2;
    narrow = narrow && f32 && m->weights.dtype != DTYPE_F32;
    s->weight_type = narrow ? half : s->type;
    s->weight_element = narrow ? 2 : s->element;
    uint64_t qkv = (uint64_t)(c->q_dim + 2 * c->kv_dim) * c->dim, gate_up = 2 * (uint64_t)c->hidden_dim * c->dim;
    s->wide_elements = !narrow ? 0 : qkv > gate_up ? qkv : gate_up;
}

// Stream, cuBLAS handle, pinned memory, RoPE's frequencies.
static bool connect(Model *m, CudaState *s, Error *err) {
    cudaFuncAttributes attributes;
    CUDA_TRY(cudaFuncGetAttributes(&attributes, phases_kernel));
    s->early = attributes.ptxVersion >= 90; // not code for older GPUs that the driver compiled for this one
    CUDA_TRY(cudaStreamCreateWithFlags(&s->stream, cudaStreamNonBlocking));
    CUBLAS_TRY(cublasCreate(&s->blas));
    CUBLAS_TRY(cublasSetStream(s->blas, s->stream));
    CUBLAS_TRY(cublasSetWorkspace(s->blas, s->blas_workspace, WORKSPACE_BYTES));
    CUBLAS_TRY(cublasSetMathMode(s->blas, CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION)); // every sum in float32
    CUDA_TRY(cudaMallocHost((void **)&s->step_host, sizeof *s->step_host));
    CUDA_TRY(cudaStreamCreateWithFlags(&s->side, cudaStreamNonBlocking));
    CUDA_TRY(cudaEventCreateWithFlags(&s->chosen, cudaEventDisableTiming));
    CUDA_TRY(cudaMallocHost((void **)&s->choice_host, LOGIT_ROWS * sizeof(int)));
    CUDA_TRY(cudaMallocHost((void **)&s->kept_choice, LOGIT_ROWS * sizeof(int)));
    CUDA_TRY(cudaMallocHost((void **)&s->pos_host, 2 * (size_t)s->max_rows * sizeof(int)));
    CUDA_TRY(cudaMallocHost((void **)&m->logits, (size_t)s->max_logits * (size_t)m->config.vocab_size * sizeof(float)));
    CUDA_TRY(cudaMemset(s->attention_workspace, 0, s->attention_workspace_bytes)); // once; every call leaves it ready
    CUDA_TRY(
        cudaMemcpy(s->rope_freq, m->rope_freq, (size_t)m->config.head_dim / 2 * sizeof(float), cudaMemcpyHostToDevice));
    return true;
}

bool open_cuda(Model *m, bool narrow, Error *err) {
    CudaState *s = (CudaState *)calloc(1, sizeof *s);
    m->state = s;
    if (!s) return fail(err, "out of memory: the engine's state");
    choose_types(m, s, narrow);
    s->decode_step = decode_step_cublas;
    Plan plan = {m, s, NULL, 0, 0};
    Buffer buffers[N_BUFFERS];
    int n_buffers = 0;
    bool ok = size_state(m, s, err) && weights_visit(m, plan_tensor, &plan, err);
    if (ok) n_buffers = list_buffers(m, s, buffers);
    ok = ok && check_memory(m, s, plan.bytes, buffers, n_buffers, err);
    for (int i = 0; ok && i < n_buffers; i++) {
        cudaError_t status = cudaMalloc(buffers[i].at, buffers[i].bytes ? buffers[i].bytes : 16);
        if (status != cudaSuccess)
            ok = fail(err, "GPU memory: %.2f GB: %s", (double)buffers[i].bytes * 1e-9, cudaGetErrorString(status));
    }
    if (ok && cudaMalloc((void **)&s->weights, plan.bytes) != cudaSuccess)
        ok = fail(err, "GPU memory: %.2f GB of weights", (double)plan.bytes * 1e-9);
    for (size_t i = 0; ok && i < plan.n; i++) {
        plan.tensors[i].to = s->weights + (uint64_t)(uintptr_t)plan.tensors[i].to; // from an offset to an address
        *plan.tensors[i].slot = plan.tensors[i].to;
    }
    if (ok && m->config.tie_embeddings) m->weights.output = m->weights.tok_embeddings;
    if (ok && s->type == CUDA_R_32F) s->qkv_in = s->qkv;
    ok = ok && connect(m, s, err) && (m->file.n_tensors ? upload(m, s, &plan, err) : synthesize(m, s, &plan, err) && warm_up(m, err));
    m->weights.bytes = plan.bytes;
    m->buffer_bytes = 0;
    for (int i = 0; i < n_buffers; i++) m->buffer_bytes += buffers[i].bytes;
    m->buffer_bytes -= n_buffers ? m->kv.bytes : 0;
    cudaDeviceProp properties;
    if (ok && cudaGetDeviceProperties(&properties, 0) == cudaSuccess)
        snprintf(m->note, sizeof m->note, "%.60s", properties.name);
    free(plan.tensors);
    return ok;
}

void close_cuda(Model *m) {
    CudaState *s = (CudaState *)m->state;
    if (!s) return;
    if (s->stream) cudaStreamSynchronize(s->stream);
    for (auto &graphs : s->graphs)
        for (cudaGraphExec_t graph : graphs)
            if (graph) cudaGraphExecDestroy(graph);
    if (s->chosen) cudaEventDestroy(s->chosen);
    if (s->side) cudaStreamDestroy(s->side);
    if (s->blas) cublasDestroy(s->blas);
    Buffer buffers[N_BUFFERS];
    int n = list_buffers(m, s, buffers);
    for (int i = 0; i < n; i++) cudaFree(*buffers[i].at);
    cudaFree(s->weights);
    cudaFreeHost(s->step_host);
    cudaFreeHost(s->choice_host);
    cudaFreeHost(s->kept_choice);
    cudaFreeHost(s->pos_host);
    cudaFreeHost(m->logits);
    if (s->stream) cudaStreamDestroy(s->stream);
    cudaGetLastError(); // an allocation that was refused is no error of what comes next
    free(s);
    m->state = NULL;
}

static bool open_cublas(Model *m, Error *err) {
    return open_cuda(m, false, err);
}

extern "C" const Engine engine_cublas = {"cublas",     usable_cuda, open_cublas,     close_cuda,
                                         prefill_cuda, decode_cuda, read_logits_cuda, &machine_cuda};
