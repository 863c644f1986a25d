#include "gemm.h"

#include <limits.h>
#include <stdint.h>

#include "ops.h"
#include "packed_product.h"
#include "prompt_product.h"
#include "widen.h"

enum { LONG_PROMPT = 4097 }; // rows: see lt_choose

static cudaDataType_t cuda_type(DType dtype) {
    return dtype == DTYPE_F32       ? CUDA_R_32F
           : dtype == DTYPE_F16     ? CUDA_R_16F
           : dtype == DTYPE_F8_E4M3 ? CUDA_R_8F_E4M3
                                    : CUDA_R_16BF;
}

Matrix matrix_rows(const Matrix *w, int first, int n) {
    Matrix rows = *w;
    rows.data = (const char *)w->data + (uint64_t)first * device_row_bytes(w);
    if (w->scale) rows.scale = (const float *)w->scale + first;
    rows.rows = n;
    return rows;
}

// The same as a matrix of its own.
static Matrix head_of(const Matrix *w, int rows) {
    Matrix head = matrix_rows(w, 0, rows);
    head.all_rows = rows;
    return head;
}

// Several matrices of one shape and of s->type, equally far apart in memory, whose products have one input.
struct MatrixSeries {
    Matrix first;
    long long stride; // elements from one to the next
    int count;
};

// ---- products of 16-bit numbers: one order of sums ------------------------------------------------------------------
//
// cuBLAS counts columns first: the same memory is outᵀ = w · inᵀ there. For few rows it would often cut K and add the
// partial sums (split-K), into another number of parts for another number of rows. Without that every kernel that it
// offers adds steps of 16 columns in the order of K, and so gives a row the same bits however many rows there are
// (tests/test_products.cu). Up to 64 rows that costs nothing: tiles of 64 rows of weights and no cut are as fast or
// faster; from there to 256 rows only down is slower. (H200, out and down of 8B in bf16, weights past L2, us, cuBLAS's
// own choice / this: 32 rows 14.7, 34.5 / 13.2, 32.4; 64 rows 13.5, 38.1 / 13.5, 33.6; 128 rows 15.7, 39.2 / 15.5,
// 40.5; 192 rows 18.7, 47.5 / 18.6, 56.1; 256 rows 20.2, 50.1 / 20.3, 52.5.)
//
// Families of kernels differ in their sums, and what cuBLAS offers depends on the rows of weights and on the alignment
// of the output's rows. A GPU that has some of a matrix's rows, and a slab of them, take what is chosen for the whole
// matrix (Matrix.all_rows): a vocabulary of odd length has kernels of one family where it is whole, and others where
// its first half is a multiple of 16.

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
static int lt_offers(cublasLtHandle_t lt, LtProduct *p, bool no_split, LtAlignment alignment, int most,
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
        !limit(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &alignment.in, sizeof alignment.in) ||
        !limit(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &alignment.in, sizeof alignment.in) ||
        !limit(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &alignment.out, sizeof alignment.out) ||
        !limit(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &alignment.out, sizeof alignment.out) ||
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

static bool lt_checked(cublasLtHandle_t lt, LtProduct *p, const cublasLtMatmulAlgo_t *algo) {
    cublasLtMatmulHeuristicResult_t checked;
    return cublasLtMatmulAlgoCheck(lt, &p->product, &p->w, &p->in, &p->out, &p->out, algo, &checked) ==
               CUBLAS_STATUS_SUCCESS &&
           checked.workspaceSize <= BLAS_WORKSPACE_BYTES;
}

template <class T>
static bool lt_configure(cublasLtMatmulAlgo_t *algo, cublasLtMatmulAlgoConfigAttributes_t which, T value) {
    return cublasLtMatmulAlgoConfigSetAttribute(algo, which, &value, sizeof value) == CUBLAS_STATUS_SUCCESS;
}

// Tile and cluster of a kernel that does not cut K.
static bool lt_set_tile(cublasLtMatmulAlgo_t *algo, int tile, int cluster) {
    return lt_configure(algo, CUBLASLT_ALGO_CONFIG_SPLITK_NUM, (int32_t)1) &&
           lt_configure(algo, CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME, (uint32_t)CUBLASLT_REDUCTION_SCHEME_NONE) &&
           lt_configure(algo, CUBLASLT_ALGO_CONFIG_TILE_ID, (int32_t)tile) &&
           lt_configure(algo, CUBLASLT_ALGO_CONFIG_CLUSTER_SHAPE_ID, (uint16_t)cluster);
}

// The kernel in place of one that cuts K: its family, in tiles of 64 rows of weights and all rows of the input, or half
// of them, which two neighbours in a cluster take. False: cuBLAS has none.
static bool lt_uncut(cublasLtHandle_t lt, LtProduct *p, int T, cublasLtMatmulAlgo_t *algo) {
    const int tile = T <= 8     ? CUBLASLT_MATMUL_TILE_64x8
                     : T <= 32  ? CUBLASLT_MATMUL_TILE_64x32
                     : T <= 128 ? CUBLASLT_MATMUL_TILE_64x64
                                : CUBLASLT_MATMUL_TILE_64x128;
    return lt_set_tile(algo, tile, T <= 64 ? CUBLASLT_CLUSTER_SHAPE_1x1x1 : CUBLASLT_CLUSTER_SHAPE_1x2x1) &&
           lt_checked(lt, p, algo);
}

// Chooses the kernel for a product of T rows: cuBLAS's choice, if it cuts nothing. Where it would have cut K, its best
// kernel that does not is often one of another family and ten times slower; so up to 64 rows, or in that case,
// lt_uncut. For gate and up of so many rows that the GPU's power is the limit, what costs least of it is fastest: tiles
// of 168 × 128, if cuBLAS offers them. (H200, 8B, 8192 rows, call after call: 2.6 % less time than in its own choice of
// 320 × 128.)
static bool lt_choose(cublasLtHandle_t lt, LtProduct *p, const MatrixSeries *w, int T, LtAlignment alignment,
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

// ---- the table of kernels -------------------------------------------------------------------------------------------
//
// To ask cuBLAS takes 0.3 ms for each shape and number of rows, and 2 ms more where the kernel that it names was not
// loaded yet: several such waits are more than a short prompt takes. So engine fused names the kernels itself, by
// tables of 26 in all (of 33 for quantised weights). They are loaded while the weights are on their way
// (load_product_kernels), and no prompt or step waits for another. They are of one family and add up in the order of K,
// as those do that cuBLAS names.
//
// The tables are for the shapes of 8B and an H200, by the time of every kernel that cuBLAS has for them (bf16, weights
// past L2). A layer's four products in us, cuBLAS's own choice / the table's: 1 row 117.6 / 117.2; 33 rows
// 135.8 / 124.0; 65 rows 175.0 / 142.1; 128 rows 144.3 / 140.2; 129 rows 204.9 / 159.0; 200 rows 214.3 / 187.1; 256
// rows 195.3 / 186.8; 400 rows 442.4 / 306.1; 512 rows 332.7 / 333.5; 768 rows 536.5 / 482.6; 1000 rows 672.8 / 638.6;
// 1500 rows 953.0 / 933.0. From 2049 rows on they name what cuBLAS names.

// A kernel of cuBLASLt's family 66 on Hopper, which multiplies tiles by wgmma and copies them by TMA.
struct LtKernel {
    int tile, cluster;
    uint32_t custom; // bits: 1 the tile's layout, 2 tiles in the order of the input's rows, 4 two warpgroups a tile
};
enum { LT_FAMILY = 66, LT_VERSION = 13 }; // cuBLASLt's major version, whose numbers these are

// The kernel for up to so many rows.
struct LtRange {
    int last;
    LtKernel kernel;
};
// Those of one kind of product, by the rows of a product of `reference` rows of weights.
struct LtTable {
    int reference;
    LtRange ranges[16];
};

#define TILE(shape) CUBLASLT_MATMUL_TILE_##shape
#define CLUSTER(shape) CUBLASLT_CLUSTER_SHAPE_##shape##x1
// Out and down.
static const LtTable OUT_TABLE = {4096,
                                  {{32, {TILE(64x16), CLUSTER(1x1), 1}},
                                   {64, {TILE(64x64), CLUSTER(4x1), 1}},
                                   {128, {TILE(96x64), CLUSTER(4x2), 2}},
                                   {216, {TILE(128x72), CLUSTER(4x1), 1}},
                                   {256, {TILE(128x64), CLUSTER(2x1), 1}},
                                   {320, {TILE(128x80), CLUSTER(2x1), 1}},
                                   {384, {TILE(128x96), CLUSTER(1x1), 1}},
                                   {512, {TILE(128x128), CLUSTER(2x1), 1}},
                                   {640, {TILE(128x160), CLUSTER(2x1), 1}},
                                   {768, {TILE(128x96), CLUSTER(1x1), 1}},
                                   {1024, {TILE(128x128), CLUSTER(2x1), 1}},
                                   {1536, {TILE(192x128), CLUSTER(2x1), 5}},
                                   {INT_MAX, {TILE(256x128), CLUSTER(1x2), 7}}}};
// Queries, keys and values.
static const LtTable QKV_TABLE = {6144,
                                  {{32, {TILE(128x16), CLUSTER(1x1), 1}},
                                   {64, {TILE(96x64), CLUSTER(4x1), 0}},
                                   {128, {TILE(80x128), CLUSTER(4x1), 0}},
                                   {256, {TILE(192x64), CLUSTER(1x1), 1}},
                                   {320, {TILE(128x160), CLUSTER(4x1), 1}},
                                   {384, {TILE(80x128), CLUSTER(4x1), 0}},
                                   {512, {TILE(192x128), CLUSTER(2x1), 5}},
                                   {640, {TILE(128x128), CLUSTER(2x1), 1}},
                                   {768, {TILE(96x128), CLUSTER(2x1), 0}},
                                   {2048, {TILE(128x128), CLUSTER(2x1), 1}},
                                   {INT_MAX, {TILE(256x128), CLUSTER(1x2), 7}}}};
// Gate and up.
static const LtTable GATE_UP_TABLE = {28672,
                                      {{16, {TILE(128x16), CLUSTER(1x1), 1}},
                                       {32, {TILE(128x32), CLUSTER(1x1), 1}},
                                       {64, {TILE(144x64), CLUSTER(4x1), 0}},
                                       {128, {TILE(80x128), CLUSTER(4x1), 0}},
                                       {192, {TILE(128x192), CLUSTER(4x1), 4}},
                                       {256, {TILE(80x128), CLUSTER(4x1), 0}},
                                       {320, {TILE(128x160), CLUSTER(4x1), 1}},
                                       {384, {TILE(96x128), CLUSTER(2x1), 0}},
                                       {480, {TILE(128x160), CLUSTER(4x1), 1}},
                                       {512, {TILE(96x128), CLUSTER(2x1), 0}},
                                       {640, {TILE(128x160), CLUSTER(2x1), 1}},
                                       {1024, {TILE(96x128), CLUSTER(2x1), 0}},
                                       {2048, {TILE(128x160), CLUSTER(2x1), 1}},
                                       {4096, {TILE(320x128), CLUSTER(1x2), 7}},
                                       {INT_MAX, {TILE(168x128), CLUSTER(1x2), 2}}}};
// Logits, by kernels that gate and up have, too. (H200, us, gate and up's table / this one: 65 rows 378 / 281; 128 rows
// 296 / 278; 192 rows 600 / 409; 256 rows 517 / 419.)
static const LtTable LOGITS_TABLE = {128256,
                                     {{16, {TILE(128x16), CLUSTER(1x1), 1}},
                                      {32, {TILE(128x32), CLUSTER(1x1), 1}},
                                      {64, {TILE(144x64), CLUSTER(4x1), 0}},
                                      {128, {TILE(80x128), CLUSTER(4x1), 0}},
                                      {160, {TILE(128x160), CLUSTER(2x1), 1}},
                                      {192, {TILE(144x64), CLUSTER(4x1), 0}},
                                      {INT_MAX, {TILE(168x128), CLUSTER(1x2), 2}}}};
#undef TILE
#undef CLUSTER

// The table of a product of `count` matrices with so many rows in all. Out and down add to the stream, those of
// quantised weights are scaled first. (Adding or not, a kernel is loaded twice. Keys and values of the last layer alone
// have few rows, too, but for one product in a prompt QKV's kernels will do.)
static const LtTable *lt_table(const CudaState *s, int rows, int count, bool adds) {
    const bool quantised = s->widening.slab_bytes > 0;
    return adds || (quantised && rows <= OUT_TABLE.reference) ? &OUT_TABLE
           : rows <= 2 * QKV_TABLE.reference                  ? &QKV_TABLE
           : count > 1 || rows <= 2 * GATE_UP_TABLE.reference ? &GATE_UP_TABLE
                                                              : &LOGITS_TABLE;
}

// The table's kernel for a product. What counts is how many tiles there are for the SMs: half the rows of weights are
// as half the rows of the input. (But up to 64 rows the tile should not be higher than the input.)
static const LtKernel *lt_kernel(const CudaState *s, const MatrixSeries *w, int T, bool adds) {
    const int outputs = w->first.rows * w->count;
    const LtTable *table = lt_table(s, outputs, w->count, adds);
    const long long scaled = ((long long)T * outputs + table->reference - 1) / table->reference;
    const long long rows = T > 64 || scaled < T ? scaled : T;
    const LtRange *range = table->ranges;
    while (rows > range->last) range++;
    return &range->kernel;
}

// Whether the numbers in the table are this GPU's and this library's.
static bool lt_table_holds(void) {
    static const bool holds = [] {
        int device = 0, major = 0;
        return cudaGetDevice(&device) == cudaSuccess &&
               cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major == 9 &&
               cublasLtGetVersion() / 10000 == LT_VERSION;
    }();
    return holds;
}

// False: cuBLAS does not take the kernel for that product.
static bool lt_take(cublasLtHandle_t lt, LtProduct *p, DType dtype, const LtKernel *kernel,
                    cublasLtMatmulAlgo_t *algo) {
    const cudaDataType_t type = cuda_type(dtype);
    return cublasLtMatmulAlgoInit(lt, CUBLAS_COMPUTE_32F, CUDA_R_32F, type, type, CUDA_R_32F, CUDA_R_32F, LT_FAMILY,
                                  algo) == CUBLAS_STATUS_SUCCESS &&
           lt_set_tile(algo, kernel->tile, kernel->cluster) &&
           lt_configure(algo, CUBLASLT_ALGO_CONFIG_STAGES_ID, (uint32_t)CUBLASLT_MATMUL_STAGES_64xAUTO) &&
           lt_configure(algo, CUBLASLT_ALGO_CONFIG_CTA_SWIZZLING, (uint32_t)0) &&
           lt_configure(algo, CUBLASLT_ALGO_CONFIG_CUSTOM_OPTION, kernel->custom) &&
           lt_configure(algo, CUBLASLT_ALGO_CONFIG_INNER_SHAPE_ID, (uint16_t)CUBLASLT_MATMUL_INNER_SHAPE_UNDEFINED) &&
           lt_checked(lt, p, algo);
}

// The plan for a product by a kernel of the table, or (NULL) by cuBLAS's choice, as long as GEMM_PLANS last. NULL: an
// error.
static const GemmPlan *lt_plan(CudaState *s, const MatrixSeries *w, const LtKernel *kernel, int T, int pitch,
                               LtAlignment alignment, Error *err) {
    const cublasLtHandle_t lt = (cublasLtHandle_t)s->blas; // as cuBLAS's manual allows
    GemmPlans *all = &s->gemm_plans;
    const GemmPlan key = {w->first.rows, w->first.cols, w->count, kernel ? 1 : plan_rows(T), pitch, alignment,
                          kernel,        false,         {}};
    LtProduct p;
    for (const GemmPlan &plan : all->plans)
        if (plan.T == key.T && plan.rows == key.rows && plan.cols == key.cols && plan.count == key.count &&
            plan.pitch == pitch && plan.alignment.in == alignment.in && plan.alignment.out == alignment.out &&
            plan.kernel == kernel)
            return &plan;
    if (!lt_product(&p, s->type, w, kernel ? T : key.T, pitch, err)) return NULL;
    GemmPlan *plan = &all->plans[all->next++ % GEMM_PLANS];
    *plan = key;
    plan->found =
        kernel ? lt_take(lt, &p, s->type, kernel, &plan->algo) : lt_choose(lt, &p, w, key.T, alignment, &plan->algo);
    return plan;
}

enum { ALIGNMENT = 16 }; // bytes: the most that kernels count on

// The matrices of which w are some rows.
static MatrixSeries whole_series(const MatrixSeries *w) {
    MatrixSeries whole = *w;
    whole.first.rows = w->first.all_rows;
    if (w->count > 1) whole.stride = (long long)w->first.all_rows * w->first.cols;
    return whole;
}

// The kernel for a product: the table's, where that holds and what it counts on is aligned, else cuBLAS's choice for
// the whole matrix. NULL: cuBLAS has none.
static const cublasLtMatmulAlgo_t *lt_algorithm(CudaState *s, const MatrixSeries *w, int T, int pitch,
                                                LtAlignment alignment, float beta, Error *err) {
    if (alignment.in >= ALIGNMENT && alignment.out >= ALIGNMENT && lt_table_holds()) {
        const GemmPlan *plan = lt_plan(s, w, lt_kernel(s, w, T, beta != 0), T, pitch, alignment, err);
        if (!plan) return NULL;
        if (plan->found) return &plan->algo;
    }
    const MatrixSeries whole = whole_series(w);
    const GemmPlan *plan = lt_plan(s, &whole, NULL, T, whole.first.rows, alignment, err);
    return plan && plan->found ? &plan->algo : NULL;
}

// The largest power of two up to ALIGNMENT that divides all addresses and sizes.
static unsigned alignment_of(uintptr_t addresses) {
    unsigned alignment = ALIGNMENT;
    while (addresses % alignment) alignment /= 2;
    return alignment;
}

// `product` for a type of 16 bits. (All parts of a matrix are aligned alike: they begin at a multiple of 16 rows, and
// before their ends, which are multiples of 16 or the whole's, so do the rows of their outputs.)
static bool product_16bit(CudaState *s, float *out, int pitch, const MatrixSeries *w, const void *in, int T, float beta,
                          Error *err) {
    const float one = 1;
    LtProduct p;
    if (!lt_product(&p, s->type, w, T, pitch, err)) return false;
    const uintptr_t stride = (uintptr_t)w->stride * s->element, in_row = (uintptr_t)w->first.cols * s->element,
                    out_row = (uintptr_t)w->first.all_rows * sizeof *out;
    const LtAlignment alignment = {alignment_of((uintptr_t)w->first.data | stride | (uintptr_t)in | in_row),
                                   alignment_of((uintptr_t)out | out_row)};
    const cublasLtMatmulAlgo_t *algo = lt_algorithm(s, w, T, pitch, alignment, beta, err);
    if (!algo) return fail(err, "cuBLAS has no product of %d x %d and %d rows", w->first.rows, w->first.cols, T);
    CUBLAS_TRY(cublasLtMatmul((cublasLtHandle_t)s->blas, &p.product, &one, w->first.data, &p.w, in, &p.in, &beta, out,
                              &p.out, out, &p.out, algo, s->blas_workspace, BLAS_WORKSPACE_BYTES, s->stream));
    return true;
}

// A small product by a kernel of the table, which loads it: the kernel is the same for all shapes,
// another where it adds.
static bool load_kernel(CudaState *s, const LtKernel *kernel, float beta, Error *err) {
    const float one = 1;
    MatrixSeries w = {{}, 0, 1};
    w.first.rows = w.first.cols = 64;
    LtProduct p;
    cublasLtMatmulAlgo_t algo;
    if (!lt_product(&p, s->type, &w, 1, w.first.rows, err)) return false;
    if (!lt_take((cublasLtHandle_t)s->blas, &p, s->type, kernel, &algo)) return true;
    CUBLAS_TRY(cublasLtMatmul((cublasLtHandle_t)s->blas, &p.product, &one, s->weights, &p.w, s->xb, &p.in, &beta,
                              s->gate_up, &p.out, s->gate_up, &p.out, &algo, s->blas_workspace, BLAS_WORKSPACE_BYTES,
                              s->stream));
    return true;
}

static bool load_table(CudaState *s, const LtTable *table, float beta, Error *err) {
    for (const LtRange *range = table->ranges;; range++) {
        if (!load_kernel(s, &range->kernel, beta, err)) return false;
        if (range->last == INT_MAX) return true;
    }
}

bool load_product_kernels(CudaState *s, Error *err) {
    if (!s->one_order || !lt_table_holds()) return true;
    return load_table(s, &OUT_TABLE, 1, err) &&
           (lt_table(s, 1, 1, false) != &OUT_TABLE || load_table(s, &OUT_TABLE, 0, err)) &&
           load_table(s, &QKV_TABLE, 0, err) && load_table(s, &GATE_UP_TABLE, 0, err) &&
           load_table(s, &LOGITS_TABLE, 0, err);
}

// ---- FP8 products ---------------------------------------------------------------------------------------------------
//
// Hopper's FP8 tensor cores keep about 14 bits of a sum. Unless cuBLAS is asked for fast sums, it adds what they have
// of every 128 columns to a float32 sum: of 256 and 4095 times 1/64 it makes 318, fast 256 (319.98). The sum is
// multiplied by the scale of the weights' row and by that of the input's, and added to what is there, in float32. Gate
// and up are then rounded to bf16, as they are half of the bytes between products, and enter another one in e4m3.
//
// One order of sums: one kernel that does not cut K, for all matrices of a model, all numbers of rows and all shards,
// and another one for gate and up. They are cuBLAS's choice for the largest matrix and as many rows as a prompt has in
// one pass. (Nothing says that another kernel adds up after as many columns.)

enum { FP8_REFERENCE_ROWS = 8192 };

static bool fp8_product(const CudaState *s, LtProduct *p, const MatrixSeries *w, const float *scales, int T, int pitch,
                        cudaDataType_t out, Error *err) {
    const cublasLtMatmulMatrixScale_t mode = CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F; // one for each row
    const int8_t fast = 0;
    const float *in_scales = s->code_scales;
    if (!lt_product(p, DTYPE_F8_E4M3, w, T, pitch, err) ||
        !lt_layout(&p->out, out, w->first.rows, T, pitch, w->count, (long long)T * pitch, err))
        return false;
    auto set = [&](cublasLtMatmulDescAttributes_t which, const void *value, size_t bytes) {
        CUBLAS_TRY(cublasLtMatmulDescSetAttribute(&p->product, which, value, bytes));
        return true;
    };
    return set(CUBLASLT_MATMUL_DESC_FAST_ACCUM, &fast, sizeof fast) &&
           set(CUBLASLT_MATMUL_DESC_A_SCALE_MODE, &mode, sizeof mode) &&
           set(CUBLASLT_MATMUL_DESC_B_SCALE_MODE, &mode, sizeof mode) &&
           set(CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, &scales, sizeof scales) &&
           set(CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, &in_scales, sizeof in_scales);
}

bool choose_fp8_kernels(CudaState *s, int rows, int cols, Error *err) {
    MatrixSeries w = {{}, 0, 1};
    w.first.rows = rows;
    w.first.cols = cols;
    auto choose = [&](cudaDataType_t out, cublasLtMatmulAlgo_t *kernel) {
        LtProduct p;
        cublasLtMatmulHeuristicResult_t offer;
        if (!fp8_product(s, &p, &w, s->code_scales, FP8_REFERENCE_ROWS, rows, out, err)) return false;
        if (lt_offers((cublasLtHandle_t)s->blas, &p, true, {ALIGNMENT, ALIGNMENT}, 1, &offer) == 0)
            return fail(err, "--precision fp8: cuBLAS has no FP8 product of %d x %d with scales of rows", rows, cols);
        *kernel = offer.algo;
        return true;
    };
    return choose(CUDA_R_32F, &s->fp8_kernel) && choose(CUDA_R_16BF, &s->fp8_kernel_16);
}

// out: of type `type`, float32 or bf16.
static bool matmul_codes_to(CudaState *s, void *out, cudaDataType_t type, const Matrix *w, int T, float beta,
                            Error *err) {
    const float one = 1;
    const int slab = widen_rows(s, w, SLAB_ROWS, sizeof *s->codes);
    const cublasLtMatmulAlgo_t *kernel = type == CUDA_R_32F ? &s->fp8_kernel : &s->fp8_kernel_16;
    for (int first = 0; first < w->rows; first += slab) {
        const Matrix rows = matrix_rows(w, first, w->rows - first < slab ? w->rows - first : slab);
        void *to = (char *)out + (size_t)first * (type == CUDA_R_32F ? 4 : 2);
        MatrixSeries codes = {{}, 0, 1};
        LtProduct p;
        if (!unpack_codes(s, &codes.first, &rows, err) ||
            !fp8_product(s, &p, &codes, (const float *)rows.scale, T, w->rows, type, err))
            return false;
        CUBLAS_TRY(cublasLtMatmul((cublasLtHandle_t)s->blas, &p.product, &one, codes.first.data, &p.w, s->codes, &p.in,
                                  &beta, to, &p.out, to, &p.out, kernel, s->blas_workspace, BLAS_WORKSPACE_BYTES,
                                  s->stream));
        if (!widen_end(s, err)) return false;
    }
    return true;
}

bool matmul_codes(CudaState *s, float *out, const Matrix *w, int T, float beta, Error *err) {
    return matmul_codes_to(s, out, CUDA_R_32F, w, T, beta, err);
}

bool matmul_gate_up_codes(CudaState *s, const LayerWeights *l, int T, Error *err) {
    bf16 *gate = (bf16 *)s->gate_up;
    return matmul_codes_to(s, gate, CUDA_R_16BF, &l->w1, T, 0, err) &&
           matmul_codes_to(s, gate + (size_t)T * l->w1.rows, CUDA_R_16BF, &l->w3, T, 0, err);
}

// ---- products -------------------------------------------------------------------------------------------------------

// out[count][T][rows] (+)= in[T][cols] · wᵀ of each, all of s->type. Rows of out are `pitch` elements apart. beta: 1
// adds to out.
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
    const int slab = widen_rows(s, w, SLAB_ROWS, s->element);
    for (int first = 0; first < w->rows; first += slab) {
        Matrix rows = matrix_rows(w, first, w->rows - first < slab ? w->rows - first : slab);
        MatrixSeries wide = {{}, 0, 1};
        if (!widen(s, &wide.first, &rows, err) || !product(s, out + first, w->rows, &wide, in, T, beta, err) ||
            !widen_end(s, err))
            return false;
    }
    return true;
}

// out[T][rows] += in[T][cols] · wᵀ × scales, w widened.
static bool add_by_prompt(CudaState *s, float *out, const Matrix *w, const float *scales, const void *in, int T,
                          Error *err) {
    const int slab = widen_rows(s, w, SLAB_ROWS, s->element);
    for (int first = 0; first < w->rows; first += slab) {
        const Matrix rows = matrix_rows(w, first, min(slab, w->rows - first));
        Matrix wide;
        if (!widen(s, &wide, &rows, err) || !prompt_add(s, out + first, w->rows, &wide, scales + first, in, T, err) ||
            !widen_end(s, err))
            return false;
    }
    return true;
}

bool stays_packed(const CudaState *s, const Matrix *w, int T) {
    return T <= (w->rows <= PACKED_FEW_ROWS ? min(s->packed_rows, PACKED_ROWS_OF_FEW) : s->packed_rows) &&
           packed_takes(w);
}

bool matmul(CudaState *s, float *out, const Matrix *w, const void *in, int T, float beta, Error *err) {
    const MatrixSeries only = {*w, 0, 1};
    if (w->dtype == s->type) {
        const bool own = beta == 1 && prompt_takes(s, PROMPT_ADD, w, T);
        return own ? prompt_add(s, out, w->rows, w, NULL, in, T, err)
                   : product(s, out, w->rows, &only, in, T, beta, err);
    }
    const float *scales = scales_after_product(s, w);
    if (stays_packed(s, w, T)) return packed_product(s, out, w->rows, w, NULL, scales, in, T, beta, err);
    if (!scales) return product_widened(s, out, w, in, T, beta, err);
    if (beta == 0) return product_widened(s, out, w, in, T, 0, err) && scale_rows(s, out, scales, 1, T, w->rows, err);
    if (prompt_takes(s, PROMPT_ADD, w, T)) return add_by_prompt(s, out, w, scales, in, T, err);
    return product_widened(s, s->gate_up, w, in, T, 0, err) && add_scaled(s, out, s->gate_up, scales, T, w->rows, err);
}

bool matmul_heads_by_row(CudaState *s, const Config *c, float *out, const Matrix *first, int T, int n_heads, bool codes,
                         Error *err) {
    Matrix all = matrix_rows(first, 0, n_heads * c->head_dim);
    all.all_rows = all.rows * (first->all_rows / first->rows); // GPUs have equally many heads
    return codes ? matmul_codes(s, out, &all, T, 0, err) : matmul(s, out, &all, s->xb, T, 0, err);
}

// One call has a product for every head. Of one row, all heads are one product with the same result in the same place.
bool matmul_heads(CudaState *s, const Config *c, float *out, const Matrix *first, int T, int n_heads, Error *err) {
    const int rows = c->head_dim;
    const long long stride = (long long)rows * c->dim;
    Matrix all = matrix_rows(first, 0, n_heads * rows);
    MatrixSeries heads = {head_of(first, rows), stride, n_heads};
    if (T == 1) return matmul_heads_by_row(s, c, out, first, 1, n_heads, false, err);
    if (first->dtype == s->type) return product(s, out, rows, &heads, s->xb, T, 0, err);
    const int slab = widen_rows(s, &all, rows, s->element) / rows;
    for (int head = 0; head < n_heads; head += slab) {
        int n = n_heads - head < slab ? n_heads - head : slab;
        Matrix part = matrix_rows(&all, head * rows, n * rows), wide;
        if (!widen(s, &wide, &part, err)) return false;
        heads = {head_of(&wide, rows), stride, n};
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
