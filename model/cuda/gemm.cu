#include "gemm.h"

#include <stdint.h>

#include "ops.h"
#include "packed_product.h"
#include "widen.h"

enum { LONG_PROMPT = 4097 }; // rows: see lt_choose

static cudaDataType_t cuda_type(DType dtype) {
    return dtype == DTYPE_F32 ? CUDA_R_32F : dtype == DTYPE_F16 ? CUDA_R_16F : CUDA_R_16BF;
}

// Rows first .. first + n of a matrix.
static Matrix matrix_rows(const Matrix *w, int first, int n) {
    Matrix rows = *w;
    rows.data = (const char *)w->data + (uint64_t)first * device_row_bytes(w);
    if (w->scale) rows.scale = (const float *)w->scale + first;
    rows.rows = n;
    return rows;
}

// Several matrices of one shape and of s->type, equally far apart in memory, whose products have one input.
struct MatrixSeries {
    Matrix first;
    long long stride; // elements from one to the next
    int count;
};

// ---- products of 16-bit numbers: one order of sums -------------------------------------------------------------------
//
// cuBLAS counts columns first: the same memory is outᵀ = w · inᵀ there. For few rows it would often cut K and add the
// partial sums (split-K), into another number of parts for another number of rows. Without that every kernel that it
// offers adds steps of 16 columns in the order of K, and so gives a row the same bits however many rows there are
// (tests/test_products.cu). Up to 64 rows that costs nothing: tiles of 64 rows of weights and no cut are as fast or
// faster; from there to 256 rows only down is slower. (H200, out and down of 8B in bf16, weights past L2, us, cuBLAS's
// own choice / this: 32 rows 14.7, 34.5 / 13.2, 32.4; 64 rows 13.5, 38.1 / 13.5, 33.6; 128 rows 15.7, 39.2 / 15.5,
// 40.5; 192 rows 18.7, 47.5 / 18.6, 56.1; 256 rows 20.2, 50.1 / 20.3, 52.5.)

// A product as cuBLASLt sees it, or several of equal shape: w `stride` elements apart, one input, one output after
// another, whose rows are `pitch` elements apart.
struct LtProduct {
    cublasLtMatmulDescOpaque_t product;
    cublasLtMatrixLayoutOpaque_t w, in, out;
};

static bool lt_layout(cublasLtMatrixLayoutOpaque_t *l, cudaDataType_t type, int rows, int cols, int pitch, int count,
                      long long stride, Error *err) {
    CUBLAS_TRY(cublasLtMatrixLayoutInit(l, type, rows, cols, pitch));
    CUBLAS_TRY(cublasLtMatrixLayoutSetAttribute(l, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &count, sizeof count));
    CUBLAS_TRY(
        cublasLtMatrixLayoutSetAttribute(l, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &stride, sizeof stride));
    return true;
}

static bool lt_product(LtProduct *p, DType type, const MatrixSeries *w, int T, int pitch, Error *err) {
    const cublasOperation_t transposed = CUBLAS_OP_T;
    const int n = w->first.rows, k = w->first.cols;
    CUBLAS_TRY(cublasLtMatmulDescInit(&p->product, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    CUBLAS_TRY(
        cublasLtMatmulDescSetAttribute(&p->product, CUBLASLT_MATMUL_DESC_TRANSA, &transposed, sizeof transposed));
    return lt_layout(&p->w, cuda_type(type), k, n, k, w->count, w->stride, err) &&
           lt_layout(&p->in, cuda_type(type), k, T, k, w->count, 0, err) &&
           lt_layout(&p->out, CUDA_R_32F, n, T, pitch, w->count, (long long)T * pitch, err);
}

// What cuBLAS offers for a product, best first by its own estimate; no_split: nothing that cuts K. Returns how many.
static int lt_offers(cublasLtHandle_t lt, LtProduct *p, bool no_split, unsigned alignment, int most,
                     cublasLtMatmulHeuristicResult_t *offers) {
    const size_t workspace = BLAS_WORKSPACE_BYTES;
    const uint32_t schemes = CUBLASLT_REDUCTION_SCHEME_NONE;
    cublasLtMatmulPreferenceOpaque_t limits;
    int n = 0, good = 0;
    if (cublasLtMatmulPreferenceInit(&limits) != CUBLAS_STATUS_SUCCESS) return 0;
    auto limit = [&](cublasLtMatmulPreferenceAttributes_t which, const void *value, size_t bytes) {
        return cublasLtMatmulPreferenceSetAttribute(&limits, which, value, bytes) == CUBLAS_STATUS_SUCCESS;
    };
    if (!limit(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace, sizeof workspace) ||
        !limit(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &alignment, sizeof alignment) ||
        !limit(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &alignment, sizeof alignment) ||
        !limit(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &alignment, sizeof alignment) ||
        !limit(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &alignment, sizeof alignment) ||
        (no_split && !limit(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &schemes, sizeof schemes)) ||
        cublasLtMatmulAlgoGetHeuristic(lt, &p->product, &p->w, &p->in, &p->out, &p->out, &limits, most, offers, &n) !=
            CUBLAS_STATUS_SUCCESS)
        return 0;
    for (int i = 0; i < n; i++)
        if (offers[i].state == CUBLAS_STATUS_SUCCESS) offers[good++] = offers[i];
    return good;
}

template <class T> static T lt_config(const cublasLtMatmulAlgo_t *algo, cublasLtMatmulAlgoConfigAttributes_t which) {
    T value = 0;
    size_t written;
    cublasLtMatmulAlgoConfigGetAttribute(algo, which, &value, sizeof value, &written);
    return value;
}

// The kernel in place of one that cuts K: its family, in tiles of 64 rows of weights and all rows of the input, or half
// of them, which two neighbours in a cluster take. False: cuBLAS has none.
static bool lt_uncut(cublasLtHandle_t lt, LtProduct *p, int T, cublasLtMatmulAlgo_t *algo) {
    const int one = 1, tile = T <= 8     ? CUBLASLT_MATMUL_TILE_64x8
                              : T <= 32  ? CUBLASLT_MATMUL_TILE_64x32
                              : T <= 128 ? CUBLASLT_MATMUL_TILE_64x64
                                         : CUBLASLT_MATMUL_TILE_64x128;
    const uint32_t none = CUBLASLT_REDUCTION_SCHEME_NONE;
    const uint16_t cluster = T <= 64 ? CUBLASLT_CLUSTER_SHAPE_1x1x1 : CUBLASLT_CLUSTER_SHAPE_1x2x1;
    cublasLtMatmulHeuristicResult_t checked;
    auto set = [&](cublasLtMatmulAlgoConfigAttributes_t which, const void *value, size_t bytes) {
        return cublasLtMatmulAlgoConfigSetAttribute(algo, which, value, bytes) == CUBLAS_STATUS_SUCCESS;
    };
    return set(CUBLASLT_ALGO_CONFIG_SPLITK_NUM, &one, sizeof one) &&
           set(CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME, &none, sizeof none) &&
           set(CUBLASLT_ALGO_CONFIG_TILE_ID, &tile, sizeof tile) &&
           set(CUBLASLT_ALGO_CONFIG_CLUSTER_SHAPE_ID, &cluster, sizeof cluster) &&
           cublasLtMatmulAlgoCheck(lt, &p->product, &p->w, &p->in, &p->out, &p->out, algo, &checked) ==
               CUBLAS_STATUS_SUCCESS &&
           checked.workspaceSize <= BLAS_WORKSPACE_BYTES;
}

// Chooses the kernel for a product of T rows: cuBLAS's choice, if it cuts nothing. Where it would have cut K, its best
// kernel that does not is often one of another family and ten times slower; so up to 64 rows, or in that case,
// lt_uncut. For gate and up of so many rows that the GPU's power is the limit, what costs least of it is fastest: tiles
// of 168 × 128, if cuBLAS offers them. (H200, 8B, 8192 rows, call after call: 2.6 % less time than in its own choice of
// 320 × 128.)
static bool lt_choose(cublasLtHandle_t lt, LtProduct *p, const MatrixSeries *w, int T, unsigned alignment,
                      cublasLtMatmulAlgo_t *algo) {
    const bool hot = T >= LONG_PROMPT && w->count == 2;
    cublasLtMatmulHeuristicResult_t offers[16], cut;
    int n = lt_offers(lt, p, true, alignment, hot ? 16 : 1, offers);
    if (n > 0) *algo = offers[0].algo;
    for (int i = n - 1; hot && i >= 0; i--)
        if (lt_config<int>(&offers[i].algo, CUBLASLT_ALGO_CONFIG_TILE_ID) == CUBLASLT_MATMUL_TILE_168x128)
            *algo = offers[i].algo;
    if (hot || lt_offers(lt, p, false, alignment, 1, &cut) == 0 ||
        lt_config<int>(&cut.algo, CUBLASLT_ALGO_CONFIG_SPLITK_NUM) <= 1)
        return n > 0;
    bool same_family =
        n > 0 && lt_config<int>(algo, CUBLASLT_ALGO_CONFIG_ID) == lt_config<int>(&cut.algo, CUBLASLT_ALGO_CONFIG_ID);
    if ((T > 64 && same_family) || !lt_uncut(lt, p, T, &cut.algo)) return n > 0;
    *algo = cut.algo;
    return true;
}

// The number of rows for which the kernel for T is chosen. To choose takes longer than many a product, and parts of
// prompts beside steps have any number of rows: so from 64 on they share the choice of the next multiple of 64 or 256.
static int plan_rows(int T) {
    const int unit = T <= 64 ? 1 : T <= 1024 ? 64 : 256;
    return (T + unit - 1) / unit * unit;
}

// The kernel for a product, found once for each shape as long as GEMM_PLANS last. NULL: cuBLAS has none.
static const cublasLtMatmulAlgo_t *lt_plan(CudaState *s, const MatrixSeries *w, int T, int pitch, unsigned alignment,
                                           Error *err) {
    GemmPlans *all = &s->gemm_plans;
    const int rows = w->first.rows, cols = w->first.cols;
    LtProduct p;
    T = plan_rows(T);
    for (GemmPlan &plan : all->plans)
        if (plan.T == T && plan.rows == rows && plan.cols == cols && plan.count == w->count && plan.pitch == pitch &&
            plan.alignment == alignment)
            return plan.found ? &plan.algo : NULL;
    if (!lt_product(&p, s->type, w, T, pitch, err)) return NULL;
    GemmPlan *plan = &all->plans[all->next++ % GEMM_PLANS];
    *plan = {rows, cols, w->count, T, pitch, alignment, false, {}};
    plan->found = lt_choose((cublasLtHandle_t)s->blas, &p, w, T, alignment, &plan->algo); // as cuBLAS's manual allows
    return plan->found ? &plan->algo : NULL;
}

// The largest power of two up to 256 that divides all addresses: kernels differ in what they count on.
static unsigned alignment_of(uintptr_t addresses) {
    unsigned alignment = 256;
    while (addresses % alignment) alignment /= 2;
    return alignment;
}

// `product` for a type of 16 bits.
static bool product_16bit(CudaState *s, float *out, int pitch, const MatrixSeries *w, const void *in, int T, float beta,
                          Error *err) {
    const float one = 1;
    LtProduct p;
    if (!lt_product(&p, s->type, w, T, pitch, err)) return false;
    unsigned alignment = alignment_of((uintptr_t)w->first.data | (uintptr_t)(w->stride * (long long)s->element) |
                                      (uintptr_t)in | (uintptr_t)out);
    const cublasLtMatmulAlgo_t *algo = lt_plan(s, w, T, pitch, alignment, err);
    if (!algo) return fail(err, "cuBLAS has no product of %d x %d and %d rows", w->first.rows, w->first.cols, T);
    CUBLAS_TRY(cublasLtMatmul((cublasLtHandle_t)s->blas, &p.product, &one, w->first.data, &p.w, in, &p.in, &beta, out,
                              &p.out, out, &p.out, algo, s->blas_workspace, BLAS_WORKSPACE_BYTES, s->stream));
    return true;
}

// ---- products -------------------------------------------------------------------------------------------------------

// out[count][T][rows] (+)= in[T][cols] · wᵀ of each, all of s->type. Rows of out are `pitch` elements apart. beta: 1 adds
// to out.
static bool product(CudaState *s, float *out, int pitch, const MatrixSeries *w, const void *in, int T, float beta,
                    Error *err) {
    const float one = 1;
    const int n = w->first.rows, k = w->first.cols;
    const cudaDataType_t type = cuda_type(s->type);
    if (s->one_order) return product_16bit(s, out, pitch, w, in, T, beta, err);
    if (w->count == 1)
        CUBLAS_TRY(cublasGemmEx(s->blas, CUBLAS_OP_T, CUBLAS_OP_N, n, T, k, &one, w->first.data, type, k, in, type, k,
                                &beta, out, CUDA_R_32F, pitch, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
    else
        CUBLAS_TRY(cublasGemmStridedBatchedEx(s->blas, CUBLAS_OP_T, CUBLAS_OP_N, n, T, k, &one, w->first.data, type, k,
                                              w->stride, in, type, k, 0, &beta, out, CUDA_R_32F, pitch,
                                              (long long)T * pitch, w->count, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
    return true;
}

// The same for one matrix that is widened slab by slab; scales_after_product are left to the caller.
static bool product_widened(CudaState *s, float *out, const Matrix *w, const void *in, int T, float beta, Error *err) {
    const int slab = widen_rows(s, w, SLAB_ROWS);
    for (int first = 0; first < w->rows; first += slab) {
        Matrix rows = matrix_rows(w, first, w->rows - first < slab ? w->rows - first : slab);
        MatrixSeries wide = {{}, 0, 1};
        if (!widen(s, &wide.first, &rows, err) || !product(s, out + first, w->rows, &wide, in, T, beta, err) ||
            !widen_end(s, err))
            return false;
    }
    return true;
}

// Whether a product takes quantised weights as they are.
static bool stays_packed(const CudaState *s, const Matrix *w, int T) {
    return T <= s->packed_rows && packed_takes(w);
}

bool matmul(CudaState *s, float *out, const Matrix *w, const void *in, int T, float beta, Error *err) {
    const MatrixSeries only = {*w, 0, 1};
    if (w->dtype == s->type) return product(s, out, w->rows, &only, in, T, beta, err);
    const float *scales = scales_after_product(s, w);
    if (stays_packed(s, w, T)) return packed_product(s, out, w->rows, w, NULL, scales, in, T, beta, err);
    if (!scales) return product_widened(s, out, w, in, T, beta, err);
    if (beta == 0) return product_widened(s, out, w, in, T, 0, err) && scale_rows(s, out, scales, 1, T, w->rows, err);
    return product_widened(s, s->gate_up, w, in, T, 0, err) && add_scaled(s, out, s->gate_up, scales, T, w->rows, err);
}

bool matmul_heads_by_row(CudaState *s, const Config *c, float *out, const Matrix *first, int T, int n_heads,
                         Error *err) {
    Matrix all = matrix_rows(first, 0, n_heads * c->head_dim);
    return matmul(s, out, &all, s->xb, T, 0, err);
}

// One call has a product for every head. Of one row, all heads are one product with the same result in the same place.
bool matmul_heads(CudaState *s, const Config *c, float *out, const Matrix *first, int T, int n_heads, Error *err) {
    const int rows = c->head_dim;
    const long long stride = (long long)rows * c->dim;
    Matrix all = matrix_rows(first, 0, n_heads * rows);
    MatrixSeries heads = {matrix_rows(first, 0, rows), stride, n_heads};
    if (T == 1) return matmul_heads_by_row(s, c, out, first, 1, n_heads, err);
    if (first->dtype == s->type) return product(s, out, rows, &heads, s->xb, T, 0, err);
    const int slab = widen_rows(s, &all, rows) / rows;
    for (int head = 0; head < n_heads; head += slab) {
        int n = n_heads - head < slab ? n_heads - head : slab;
        Matrix part = matrix_rows(&all, head * rows, n * rows), wide;
        if (!widen(s, &wide, &part, err)) return false;
        heads = {matrix_rows(&wide, 0, rows), stride, n};
        if (!product(s, out + (size_t)head * T * rows, rows, &heads, s->xb, T, 0, err) || !widen_end(s, err))
            return false;
    }
    const float *scales = scales_after_product(s, &all);
    return !scales || scale_rows(s, out, scales, n_heads, T, rows, err);
}

bool matmul_gate_up(CudaState *s, const LayerWeights *l, int T, Error *err) {
    const Matrix *gate = &l->w1, *up = &l->w3;
    long long bytes = (const char *)up->data - (const char *)gate->data;
    MatrixSeries both = {*gate, bytes / (long long)s->element, 2};
    if (gate->dtype == s->type) return product(s, s->gate_up, gate->rows, &both, s->xb, T, 0, err);
    if (stays_packed(s, gate, T)) return packed_product(s, s->gate_up, gate->rows, gate, up, NULL, s->xb, T, 0, err);
    return product_widened(s, s->gate_up, gate, s->xb, T, 0, err) &&
           product_widened(s, s->gate_up + (size_t)T * gate->rows, up, s->xb, T, 0, err);
}

bool rope(CudaState *s, float *x, int T, int n_heads, int head_dim, Error *err) {
    int pairs = T * head_dim / 2; // of one head: a column
    cuComplex *c = (cuComplex *)x;
    CUBLAS_TRY(cublasCdgmm(s->blas, CUBLAS_SIDE_LEFT, pairs, n_heads, c, pairs, (const cuComplex *)s->rope_table, 1, c,
                           pairs));
    return true;
}
