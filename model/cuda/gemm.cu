#include "gemm.h"

#include <cublasLt.h>
#include <stdint.h>

#include "ops.h"

enum { LONG_PROMPT = 4097 }; // rows: see matmul_long

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

// A matrix as it enters a product: as it is, or its float32 copy in s->wide, `at` elements after its start. NULL: failed.
static const void *operand(CudaState *s, const Matrix *w, size_t at, Error *err) {
    size_t n = (size_t)w->rows * (size_t)w->cols;
    float *to = s->wide + at;
    if (w->dtype == s->type) return w->data;
    if (at + n > s->wide_elements) {
        fail(err, "%zu elements to widen, room for %zu", at + n, s->wide_elements);
        return NULL;
    }
    return widen(s, to, w->data, w->dtype, n, err) ? to : NULL;
}

// cuBLAS counts columns first: the same memory is outᵀ = w · inᵀ there. A matrix that has to be widened comes in slabs of
// its rows.
bool matmul(CudaState *s, void *out, const Matrix *w, const void *in, int T, float beta, Error *err) {
    const float one = 1;
    int n = w->rows, k = w->cols, slab = n;
    if (w->dtype != s->type && s->wide_elements / (size_t)k < (size_t)n) slab = (int)(s->wide_elements / (size_t)k);
    for (int first = 0; first < n; first += slab) {
        Matrix rows = matrix_rows(w, first, n - first < slab ? n - first : slab);
        const void *part = operand(s, &rows, 0, err);
        if (!part) return false;
        CUBLAS_TRY(cublasGemmEx(s->blas, CUBLAS_OP_T, CUBLAS_OP_N, rows.rows, T, k, &one, part, cuda_type(s->type), k,
                                in, cuda_type(s->type), k, &beta, (float *)out + first, CUDA_R_32F, n,
                                CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
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
            if (!operand(s, &each, (size_t)i * n * k, err)) return false;
        }
        first = s->wide;
        stride = (long long)n * k;
    }
    CUBLAS_TRY(cublasGemmStridedBatchedEx(s->blas, CUBLAS_OP_T, CUBLAS_OP_N, n, T, k, &one, first, cuda_type(s->type),
                                          k, stride, in, cuda_type(s->type), k, 0, &zero, out, CUDA_R_32F, n,
                                          (long long)T * n, w->count, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
    return true;
}

// matmul_series for so many rows that the GPU's power is the limit, and what costs least of it is fastest: in tiles of
// 168 × 128, if cuBLAS offers them. (H200, gate and up of 8B, 8192 rows, call after call: 2.6 % less time than in
// its own choice of 320 × 128.)
static bool matmul_long(CudaState *s, float *out, const MatrixSeries *w, const void *in, int T, Error *err) {
    uintptr_t addresses =
        (uintptr_t)w->first.data | (uintptr_t)(w->stride * (long long)s->element) | (uintptr_t)in | (uintptr_t)out;
    if (s->type == DTYPE_F32 || w->first.dtype != s->type || addresses % 256) // what cuBLAS offers counts on 256
        return matmul_series(s, out, w, in, T, err);
    const int n = w->first.rows, k = w->first.cols, count = w->count;
    const float one = 1, zero = 0;
    const cublasOperation_t transposed = CUBLAS_OP_T;
    const size_t workspace = BLAS_WORKSPACE_BYTES;
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
        cublasLtMatmulAlgoConfigGetAttribute(&offers[i].algo, CUBLASLT_ALGO_CONFIG_TILE_ID, &tile, sizeof tile,
                                             &written);
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

// One call has a product for every head. Of one row, all heads are one product with the same result in the same place.
bool matmul_heads(CudaState *s, const Config *c, float *out, const Matrix *first, int T, int n_heads, Error *err) {
    Matrix all = matrix_rows(first, 0, n_heads * c->head_dim);
    if (T == 1) return matmul(s, out, &all, s->xb, 1, 0, err);
    MatrixSeries heads = {matrix_rows(first, 0, c->head_dim), (long long)c->head_dim * c->dim, n_heads};
    return matmul_series(s, out, &heads, s->xb, T, err);
}

bool matmul_gate_up(CudaState *s, const LayerWeights *l, int T, Error *err) {
    long long bytes = (const char *)l->w3.data - (const char *)l->w1.data;
    MatrixSeries both = {l->w1, bytes / dtype_bytes[l->w1.dtype], 2};
    return (T < LONG_PROMPT ? matmul_series : matmul_long)(s, s->gate_up, &both, s->xb, T, err);
}

bool rope(CudaState *s, float *x, int T, int n_heads, int head_dim, Error *err) {
    int pairs = T * head_dim / 2; // of one head: a column
    cuComplex *c = (cuComplex *)x;
    CUBLAS_TRY(cublasCdgmm(s->blas, CUBLAS_SIDE_LEFT, pairs, n_heads, c, pairs, (const cuComplex *)s->rope_table, 1, c,
                           pairs));
    return true;
}
