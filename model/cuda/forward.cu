// Engine cublas: the steps of cpu/forward.c on the GPU, one call or one small kernel each. Matrix products and RoPE are
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

#include "state.h"

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

// Where row `row` of a matrix goes. head_dim > 0: row i of a head's first half becomes its row 2i, of its second half
// 2i + 1.
__device__ static uint64_t placed_row(uint64_t row, int head_dim) {
    if (head_dim == 0) return row;
    int i = (int)(row % head_dim), half = head_dim / 2;
    return row - i + (i < half ? 2 * i : 2 * (i - half) + 1);
}

// Computes: rows of a matrix in their new dtype and order (placed_row).   Reads: src S [rows][cols], rows first .. of the
// matrix.   Writes: dst D, the whole matrix.   Grid × block: rows × 256; a block owns a row.   Preconditions: first + rows
// within the matrix.
template <typename D, typename S>
__global__ void place_rows_kernel(D *dst, const S *src, uint64_t first, uint64_t cols, int head_dim) {
    uint64_t to = placed_row(first + blockIdx.x, head_dim);
    for (uint64_t c = threadIdx.x; c < cols; c += blockDim.x)
        dst[to * cols + c] = from_float<D>(to_float(src[(uint64_t)blockIdx.x * cols + c]));
}

// Computes: a synthetic tensor (synthetic.h), its rows in their order on the device; ones where range is 0.
// Reads: nothing.   Writes: dst [n/cols][cols].   Grid × block: any × 256, strided.   Preconditions: none.
template <typename D>
__global__ void synthesize_kernel(D *dst, uint64_t n, uint64_t cols, float range, uint32_t salt, int head_dim) {
    for (uint64_t i = (uint64_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (uint64_t)gridDim.x * blockDim.x) {
        uint64_t row = i / cols;
        dst[placed_row(row, head_dim) * cols + i % cols] =
            from_float<D>(range == 0 ? 1.0f : __uint_as_float(synthetic_bits(i, salt, range)));
    }
}

static unsigned blocks_for(size_t n) { // of 256 threads with four elements each
    return (unsigned)((n + 1023) / 1024);
}

static bool embed(CudaState *s, const Model *m, const int *tokens, int T, Error *err) {
    const Matrix *table = &m->weights.tok_embeddings;
    with_type(table->dtype, [&](auto type) {
        embed_kernel<<<T, 256, 0, s->stream>>>(s->x, (const decltype(type) *)table->data, tokens, table->cols);
    });
    CUDA_TRY(cudaGetLastError());
    return true;
}

static bool rmsnorm(CudaState *s, const float *weight, float eps, int T, int dim, Error *err) {
    CUDA_TRY(with_type(s->type, [&](auto type) {
        return launch_kernel(rmsnorm_kernel<decltype(type)>, T, 512, 0, s->early, s->stream, (decltype(type) *)s->xb,
                             (const float *)s->x, weight, eps, dim);
    }));
    return true;
}

// To the dtype of products; nothing to do in float32, where out is in.
static bool round_to_type(CudaState *s, void *out, const float *in, size_t n, Error *err) {
    if (s->type == DTYPE_F32) return true;
    CUDA_TRY(with_type(s->type, [&](auto type) {
        return launch_kernel(round_kernel<decltype(type)>, blocks_for(n), 256, 0, s->early, s->stream,
                             (decltype(type) *)out, in, n);
    }));
    return true;
}

// A prompt's keys and values, of T rows, into the cache.
static bool cache_prompt(const Model *m, CudaState *s, const float *in, int T, int layer, Error *err) {
    const Config *c = &m->config;
    size_t at = kv_elements(layer, m->kv.n_slots, c->n_kv_heads, m->kv.max_len, c->head_dim);
    CUDA_TRY(with_type(s->type, [&](auto type) {
        return launch_kernel(cache_kernel<decltype(type)>, T, 256, 0, s->early, s->stream,
                             (decltype(type) *)m->kv.k + at, (decltype(type) *)m->kv.v + at, in, (const int *)s->pos,
                             (const int *)s->row_slots, c->n_kv_heads, m->kv.max_len, c->head_dim);
    }));
    return true;
}

static bool swiglu(CudaState *s, size_t n, Error *err) {
    CUDA_TRY(with_type(s->type, [&](auto type) {
        return launch_kernel(swiglu_kernel<decltype(type)>, blocks_for(n), 256, 0, s->early, s->stream,
                             (decltype(type) *)s->h, (const float *)s->gate_up, (const float *)s->gate_up + n, n);
    }));
    return true;
}

// ---- cuBLAS ---------------------------------------------------------------------------------------------------------

static cudaDataType_t cuda_type(DType dtype) {
    return dtype == DTYPE_F32 ? CUDA_R_32F : dtype == DTYPE_F16 ? CUDA_R_16F : CUDA_R_16BF;
}

// Rows first .. first + n of a matrix.
static Matrix matrix_rows(const Matrix *w, int first, int n) {
    Matrix rows = *w;
    rows.data = (const char *)w->data + (uint64_t)first * matrix_row_bytes(w);
    rows.rows = n;
    return rows;
}

// A matrix as it enters a product: as it is, or widened into s->wide, `at` elements after its start. NULL: failed.
static const void *enter(CudaState *s, const Matrix *w, size_t at, Error *err) {
    if (w->dtype == s->type) return w->data;
    size_t n = (size_t)w->rows * (size_t)w->cols;
    float *to = s->wide + at;
    if (at + n > s->wide_elements) {
        fail(err, "%zu elements to widen, room for %zu", at + n, s->wide_elements);
        return NULL;
    }
    with_type(w->dtype, [&](auto type) {
        widen_kernel<<<blocks_for(n), 256, 0, s->stream>>>(to, (const decltype(type) *)w->data, n);
    });
    cudaError_t status = cudaGetLastError();
    if (status == cudaSuccess) return to;
    fail(err, "widening a matrix: %s", cudaGetErrorString(status));
    return NULL;
}

// out[T][rows] (+)= in[T][cols] · wᵀ, in of s->type, sums in float32. cuBLAS counts columns first: the same memory is
// outᵀ = w · inᵀ there. Float32 stays float32: the default math mode never takes TF32. A matrix that has to be widened
// comes in slabs of its rows.
static bool matmul(CudaState *s, void *out, const Matrix *w, const void *in, int T, float beta, Error *err) {
    const float one = 1;
    int n = w->rows, k = w->cols, slab = n;
    if (w->dtype != s->type && s->wide_elements / (size_t)k < (size_t)n) slab = (int)(s->wide_elements / (size_t)k);
    for (int first = 0; first < n; first += slab) {
        Matrix rows = matrix_rows(w, first, n - first < slab ? n - first : slab);
        const void *part = enter(s, &rows, 0, err);
        if (!part) return false;
        CUBLAS_TRY(cublasGemmEx(s->blas, CUBLAS_OP_T, CUBLAS_OP_N, rows.rows, T, k, &one, part, cuda_type(s->type), k, in,
                                cuda_type(s->type), k, &beta, (float *)out + first, CUDA_R_32F, n, CUBLAS_COMPUTE_32F,
                                CUBLAS_GEMM_DEFAULT));
    }
    return true;
}

// Several matrices of one shape, equally far apart in memory, whose products have one input.
struct MatrixSeries {
    Matrix first;
    long long stride; // elements from one to the next
    int count;
};

// All products of a series in one call: out[count][T][rows] = in[T][cols] · wᵀ of each.
static bool matmul_series(CudaState *s, float *out, const MatrixSeries *w, const void *in, int T, Error *err) {
    const float one = 1, zero = 0;
    int n = w->first.rows, k = w->first.cols;
    const void *first = w->first.data;
    long long stride = w->stride;
    if (w->first.dtype != s->type) {
        for (int i = 0; i < w->count; i++) {
            Matrix each = w->first;
            each.data = (const char *)each.data + i * stride * dtype_bytes[each.dtype];
            if (!enter(s, &each, (size_t)i * n * k, err)) return false;
        }
        first = s->wide;
        stride = (long long)n * k;
    }
    CUBLAS_TRY(cublasGemmStridedBatchedEx(s->blas, CUBLAS_OP_T, CUBLAS_OP_N, n, T, k, &one, first, cuda_type(s->type), k,
                                          stride, in, cuda_type(s->type), k, 0, &zero, out, CUDA_R_32F, n, (long long)T * n,
                                          w->count, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
    return true;
}

// matmul_series for so many rows that the GPU's power is the limit, and what costs least of it is fastest: in tiles of
// 168 × 128, if cuBLAS offers them. (H200, gate and up of 8B, 8192 rows, call after call: 2.6 % less time than in
// its own choice of 320 × 128.)
static bool matmul_long(CudaState *s, float *out, const MatrixSeries *w, const void *in, int T, Error *err) {
    uintptr_t addresses = (uintptr_t)w->first.data | (uintptr_t)(w->stride * (long long)s->element) | (uintptr_t)in | (uintptr_t)out;
    if (s->type == DTYPE_F32 || w->first.dtype != s->type || addresses % 256) // what cuBLAS offers counts on 256
        return matmul_series(s, out, w, in, T, err);
    const int n = w->first.rows, k = w->first.cols, count = w->count;
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
    layout(&of_w, cuda_type(s->type), k, n, w->stride);
    layout(&of_in, cuda_type(s->type), k, T, in_stride);
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
        status = cublasLtMatmul(lt, product, &one, w->first.data, of_w, in, of_in, &zero, out, of_out, out, of_out,
                                &offers[chosen].algo, s->blas_workspace, workspace, s->stream);
    if (limits) cublasLtMatmulPreferenceDestroy(limits);
    if (of_out) cublasLtMatrixLayoutDestroy(of_out);
    if (of_in) cublasLtMatrixLayoutDestroy(of_in);
    if (of_w) cublasLtMatrixLayoutDestroy(of_w);
    if (product) cublasLtMatmulDescDestroy(product);
    bool done = chosen >= 0 && status == CUBLAS_STATUS_SUCCESS;
    return done || matmul_series(s, out, w, in, T, err);
}

// Heads [n_heads][T][head_dim] of wq, wk and wv, from the first of `first` on: the upload has placed the three one after
// another (check_placement), so that one call has a product for every head. Of one row, all heads are one product with
// the same result in the same place.
static bool matmul_heads(CudaState *s, const Config *c, float *out, const Matrix *first, int T, int n_heads, Error *err) {
    Matrix all = matrix_rows(first, 0, n_heads * c->head_dim);
    if (T == 1) return matmul(s, out, &all, s->xb, 1, 0, err);
    MatrixSeries heads = {matrix_rows(first, 0, c->head_dim), (long long)c->head_dim * c->dim, n_heads};
    return matmul_series(s, out, &heads, s->xb, T, err);
}

// gate and up [2][T][hidden_dim]: two matrices of one dtype, in one call.
static bool matmul_gate_up(CudaState *s, const LayerWeights *l, int T, Error *err) {
    long long bytes = (const char *)l->w3.data - (const char *)l->w1.data;
    MatrixSeries both = {l->w1, bytes / dtype_bytes[l->w1.dtype], 2};
    return (T < LONG_PROMPT ? matmul_series : matmul_long)(s, s->gate_up, &both, s->xb, T, err);
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

static int attention_dtype(DType dtype) {
    return dtype == DTYPE_F32 ? ATTENTION_F32 : dtype == DTYPE_F16 ? ATTENTION_F16 : ATTENTION_BF16;
}

AttentionArgs attention_args(const Model *m, const CudaState *s, int n_seq, int T, int layer) {
    const Config *c = &m->config;
    size_t at = kv_elements(layer, m->kv.n_slots, c->n_kv_heads, m->kv.max_len, c->head_dim) * s->element;
    AttentionArgs a;
    memset(&a, 0, sizeof a);
    a.dtype = attention_dtype(s->type);
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
    a.settled = 1; // of a step: what runs before it writes neither cache nor lengths
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
    if (!matmul_heads(s, c, s->qkv, &m->weights.layers[layer].wq, T, c->n_heads + 2 * c->n_kv_heads, err)) return false;
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
    if (!matmul_heads(s, c, s->qkv, &m->weights.layers[layer].wq, T, c->n_heads + 2 * c->n_kv_heads, err)) return false;
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
    if (!matmul_heads(s, c, s->qkv, &l->wk, T, 2 * c->n_kv_heads, err)) return false;
    if (!rope(s, s->qkv, T, c->n_kv_heads, c->head_dim, err)) return false;
    if (!cache_prompt(m, s, s->qkv, T, layer, err)) return false;
    if (n == 0) return true;
    size_t row = (size_t)c->dim * sizeof(float);
    gather_kernel<<<n, 256, 0, s->stream>>>((uint4 *)s->gate_up, (const uint4 *)s->x, (int)(row / 16), s->logit_pos,
                                            s->pos, s->logit_slots, s->row_slots, s->logit_rows);
    CUDA_TRY(cudaGetLastError());
    CUDA_TRY(cudaMemcpyAsync(s->x, s->gate_up, n * row, cudaMemcpyDeviceToDevice, s->stream));
    if (!rmsnorm(s, l->attention_norm, c->norm_eps, n, c->dim, err)) return false;
    if (!matmul_heads(s, c, s->qkv, &l->wq, n, c->n_heads, err)) return false;
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

// The steps of cpu/forward.c over T rows whose tokens and positions are on the device. host: the batch, for prefill;
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
        if (!matmul(s, s->x, &l->wo, s->att, T, 1, err)) return false;

        // feed-forward: down(silu(gate) * up)
        if (!rmsnorm(s, l->ffn_norm, c->norm_eps, T, c->dim, err)) return false;
        if (!matmul_gate_up(s, l, T, err)) return false;
        if (!swiglu(s, (size_t)T * c->hidden_dim, err)) return false;
        if (!matmul(s, s->x, &l->w2, s->h, T, 1, err)) return false;
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
    if (!matmul(s, logits, &m->weights.output, s->xb, n, 0, err)) return false;
    return choose(s, first, n, c->vocab_size, err);
}

// Sends the choice to the host. step: it is the next step's input, too.
static bool publish(CudaState *s, int n, StepInput *step, Error *err) {
    publish_kernel<<<1, MAX_SLOTS, 0, s->stream>>>(s->choice_host, s->choice, step, n);
    CUDA_TRY(cudaGetLastError());
    return true;
}

// Waits for the next tokens of n_logits rows, at the event `chosen`.
static bool wait_for_argmax(Model *m, int n_logits, Error *err) {
    CudaState *s = (CudaState *)m->state;
    s->n_logits = n_logits;
    CUDA_TRY(cudaEventSynchronize(s->chosen));
    memcpy(m->argmax, s->ahead.running ? s->kept_choice : s->choice_host, (size_t)n_logits * sizeof(int));
    return true;
}

// ---- prefill and decode ---------------------------------------------------------------------------------------------

static bool prefill_part(Model *m, const Batch *b, int first_logit, Error *err) {
    CudaState *s = (CudaState *)m->state;
    int lens[MAX_SLOTS], *pos = s->pos_host, *slots = s->pos_host + m->max_rows;
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

static bool prompt_cuda(Model *m, const Batch *b, int first_logit, Error *err) {
    CudaState *s = (CudaState *)m->state;
    int n_logits = first_logit + b->n_logits; // of the whole batch, so far
    s->ahead.running = false;
    s->ahead.n = 0;
    if (!prefill_part(m, b, first_logit, err)) return false;
    if (n_logits > 0 && !publish(s, n_logits, NULL, err)) return false;
    CUDA_TRY(cudaEventRecord(s->chosen, s->stream));
    return wait_for_argmax(m, n_logits, err);
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
            b->tokens[i] != m->argmax[i])
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

static bool step_cuda(Model *m, const Batch *b, Error *err) {
    CudaState *s = (CudaState *)m->state;
    int n = b->n_seq;
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
    return wait_for_argmax(m, n, err);
}

bool forward_cuda(Model *m, const Batch *b, int first_logit, Error *err) {
    return b->decode ? step_cuda(m, b, err) : prompt_cuda(m, b, first_logit, err);
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
    Weight weight;       // its matrix or norm gets the address; the name is not kept
    uint64_t rows, cols; // a norm: one row
    DType from, to;      // in the file, and on the device: a norm is float32 in both
    uint64_t file_begin; // in the file's data; a synthetic model has none
    SyntheticTensor synthetic;
    char *at;     // on the device
    int head_dim; // of wq and wk, whose rows are interleaved; else 0
};

struct Plan {
    Model *model;
    CudaState *state;
    Placement *tensors;
    size_t n;
    uint64_t bytes; // on the device
    SyntheticCursor synthetic;
};

// The dtype on the device of a matrix that the file has as `from`: that of products, unless the engine widens by itself.
static DType device_dtype(const CudaState *s, DType from) {
    return s->keeps_16_bits && from != DTYPE_F32 ? from : s->type;
}

// WeightVisitor: where every tensor goes, 128-byte aligned, which leaves no gap between wq, wk and wv.
static bool plan_tensor(void *context, const Weight *w, Error *err) {
    Plan *p = (Plan *)context;
    Placement *more = (Placement *)realloc(p->tensors, (p->n + 1) * sizeof *more);
    if (!more) return fail(err, "out of memory: %zu tensors", p->n + 1);
    p->tensors = more;
    const char *last = strrchr(w->name, '.');
    bool rotated = last && (strcmp(last, ".wq") == 0 || strcmp(last, ".wk") == 0);
    const Tensor *in_file = model_is_synthetic(p->model) ? NULL : safetensors_find(&p->model->file, w->name);
    Placement t;
    memset(&t, 0, sizeof t);
    t.weight = *w;
    t.rows = w->matrix ? (uint64_t)w->matrix->rows : 1;
    t.cols = w->matrix ? (uint64_t)w->matrix->cols : (uint64_t)w->n;
    t.from = t.to = DTYPE_F32;
    if (w->matrix) {
        t.from = in_file ? in_file->dtype : DTYPE_BF16;
        t.to = w->matrix->dtype = device_dtype(p->state, t.from);
    }
    t.file_begin = in_file ? in_file->begin : 0;
    t.synthetic = synthetic_next(&p->synthetic, w);
    t.at = (char *)p->bytes; // an offset, until there is memory
    t.head_dim = rotated ? p->model->config.head_dim : 0;
    p->bytes += (weight_bytes(w) + 127) / 128 * 128;
    p->tensors[p->n++] = t;
    return true;
}

// Gives every tensor its address. matmul_heads relies on wq, wk and wv without a gap, and on one dtype for them and for
// gate and up.
static bool place_tensors(Model *m, Plan *p, Error *err) {
    for (size_t i = 0; i < p->n; i++) {
        Placement *t = &p->tensors[i];
        t->at = p->state->weights + (uint64_t)(uintptr_t)t->at;
        if (t->weight.matrix) t->weight.matrix->data = t->at;
        else *t->weight.norm = (const float *)t->at;
    }
    if (m->config.tie_embeddings) m->weights.output = m->weights.tok_embeddings;
    for (int i = 0; i < m->config.n_layers; i++) {
        const LayerWeights *l = &m->weights.layers[i];
        const char *q = (const char *)l->wq.data, *k = (const char *)l->wk.data, *v = (const char *)l->wv.data;
        if (k != q + matrix_bytes(&l->wq) || v != k + matrix_bytes(&l->wk) || l->wk.dtype != l->wq.dtype ||
            l->wv.dtype != l->wq.dtype || l->w3.dtype != l->w1.dtype)
            return fail(err, "layer %d: wq, wk and wv do not follow each other on the device, or their dtypes differ", i);
    }
    return true;
}

static bool place(const Placement *t, const void *staged, uint64_t first, unsigned rows, cudaStream_t stream, Error *err) {
    with_type(t->to, [&](auto to) {
        with_type(t->from, [&](auto from) {
            place_rows_kernel<<<rows, 256, 0, stream>>>((decltype(to) *)t->at, (const decltype(from) *)staged, first,
                                                        t->cols, t->head_dim);
        });
    });
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

// Bytes of a tensor's row in the file.
static uint64_t file_row_bytes(const Placement *t) {
    return t->cols * (uint64_t)dtype_bytes[t->from];
}

// Rows first .. first+rows of a tensor.
static bool stager_send(Stager *g, const Model *m, const Placement *t, uint64_t first, uint64_t rows, Error *err) {
    uint64_t row_bytes = file_row_bytes(t);
    int i = g->turn;
    g->turn ^= 1;
    CUDA_TRY(cudaEventSynchronize(g->copied[i])); // an event not yet recorded counts as done
    if (!safetensors_read(&m->file, g->host[i], t->file_begin + first * row_bytes, rows * row_bytes, err)) return false;
    CUDA_TRY(cudaMemcpyAsync(g->device[i], g->host[i], rows * row_bytes, cudaMemcpyHostToDevice, g->stream));
    if (!place(t, g->device[i], first, (unsigned)rows, g->stream, err)) return false;
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
    for (int i = 0; i < 2 && lengths[i] <= m->max_rows && lengths[i] <= m->kv.max_len; i++) {
        int start[2] = {0, lengths[i]}, last = lengths[i] - 1;
        Batch b = {lengths[i], 1, 1, false, zeros, &slot, start, &last};
        if (!prefill_part(m, &b, 0, err)) return false;
        CUDA_TRY(cudaStreamSynchronize(s->stream));
    }
    s->warming = false;
    return true;
}

static bool upload(Model *m, const Plan *p, Error *err) {
    uint64_t largest_row = UPLOAD_BYTES;
    size_t n_pieces = 0;
    for (size_t i = 0; i < p->n; i++)
        if (file_row_bytes(&p->tensors[i]) > largest_row) largest_row = file_row_bytes(&p->tensors[i]);
    Piece *pieces = NULL;
    for (int pass = 0; pass < 2; pass++) { // count, then fill
        if (pass == 1 && !(pieces = (Piece *)malloc((n_pieces + 1) * sizeof *pieces)))
            return fail(err, "out of memory: %zu pieces of the weights", n_pieces);
        n_pieces = 0;
        for (size_t i = 0; i < p->n; i++) {
            const Placement *t = &p->tensors[i];
            uint64_t step = largest_row / file_row_bytes(t);
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
            ok = ok && stager_send(&g, m, piece->tensor, piece->first, piece->rows, &own);
            if (!m->progress) continue;
#pragma omp critical
            {
                sent += piece->rows * piece->tensor->cols * (uint64_t)dtype_bytes[piece->tensor->to];
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

static bool synthesize(CudaState *s, const Plan *p, Error *err) {
    for (size_t i = 0; i < p->n; i++) {
        const Placement *t = &p->tensors[i];
        uint64_t n = t->rows * t->cols;
        unsigned blocks = n / 256 < 8192 ? (unsigned)(n / 256 + 1) : 8192;
        with_type(t->to, [&](auto type) {
            synthesize_kernel<<<blocks, 256, 0, s->stream>>>((decltype(type) *)t->at, n, t->cols, t->synthetic.range,
                                                             t->synthetic.salt, t->head_dim);
        });
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
    m->max_rows = positions < MAX_ROWS ? (int)positions : MAX_ROWS;
    s->max_logits = positions < LOGIT_ROWS ? (int)positions : LOGIT_ROWS;
    AttentionArgs a;
    memset(&a, 0, sizeof a);
    a.dtype = attention_dtype(s->type);
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

static void choose_types(const Model *m, CudaState *s, bool keeps_16_bits) {
    const Config *c = &m->config;
    bool f32 = m->precision == PRECISION_F32;
    s->type = f32 ? DTYPE_F32 : m->weights.dtype == DTYPE_F16 ? DTYPE_F16 : DTYPE_BF16;
    s->element = (size_t)dtype_bytes[s->type];
    s->keeps_16_bits = keeps_16_bits && f32;
    uint64_t qkv = (uint64_t)(c->q_dim + 2 * c->kv_dim) * c->dim, gate_up = 2 * (uint64_t)c->hidden_dim * c->dim;
    bool widens = s->keeps_16_bits && m->weights.dtype != DTYPE_F32;
    s->wide_elements = !widens ? 0 : qkv > gate_up ? qkv : gate_up;
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
    CUDA_TRY(cudaMallocHost((void **)&s->pos_host, 2 * (size_t)m->max_rows * sizeof(int)));
    CUDA_TRY(cudaMallocHost((void **)&m->logits, (size_t)s->max_logits * (size_t)m->config.vocab_size * sizeof(float)));
    CUDA_TRY(cudaMemset(s->attention_workspace, 0, s->attention_workspace_bytes)); // once; every call leaves it ready
    CUDA_TRY(
        cudaMemcpy(s->rope_freq, m->rope_freq, (size_t)m->config.head_dim / 2 * sizeof(float), cudaMemcpyHostToDevice));
    return true;
}

bool open_cuda(Model *m, bool keeps_16_bits, Error *err) {
    CudaState *s = (CudaState *)calloc(1, sizeof *s);
    m->state = s;
    if (!s) return fail(err, "out of memory: the engine's state");
    choose_types(m, s, keeps_16_bits);
    s->decode_step = decode_step_cublas;
    Plan plan;
    memset(&plan, 0, sizeof plan);
    plan.model = m;
    plan.state = s;
    plan.synthetic.seed = m->seed;
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
    ok = ok && place_tensors(m, &plan, err);
    if (ok && s->type == DTYPE_F32) s->qkv_in = s->qkv;
    ok = ok && connect(m, s, err) &&
         (model_is_synthetic(m) ? synthesize(s, &plan, err) && warm_up(m, err) : upload(m, &plan, err));
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

extern "C" const Engine engine_cublas = {"cublas",     usable_cuda, open_cublas, close_cuda, forward_cuda, read_logits_cuda};
