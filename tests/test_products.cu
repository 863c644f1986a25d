// Matrix products of the GPU's engines: a row has the same bits in any number of rows, whether codes are widened in
// memory or on their way into the product, and is the sum of its products to what float32 sums may be off. Weights are
// numbers of 16 bits, or codes with scales. The kernels of many rows, which do what follows a product as well, give
// what cuBLAS and the kernels after it give.
#include <math.h>
#include <string.h>

#include <functional>
#include <set>
#include <vector>

#include "../model/cuda/fused_rows.h"
#include "../model/cuda/gemm.h"
#include "../model/cuda/ops.h"
#include "../model/cuda/packed_product.h"
#include "../model/cuda/prompt_product.h"
#include "../model/cuda/widen.h"
extern "C" {
#include "../model/quant.h"
}
#include "check.h"

static const char *skip_reason;

#define CHECK_CUDA(call) \
    do { \
        cudaError_t status_ = (call); \
        if (status_ != cudaSuccess) test_fail("%s: %s", #call, cudaGetErrorString(status_)); \
    } while (0)

static unsigned hash(unsigned x) {
    x = (x ^ x >> 16) * 0x7feb352du;
    x = (x ^ x >> 15) * 0x846ca68bu;
    return x ^ x >> 16;
}
static float number(unsigned i, unsigned seed) { // a multiple of 1/64 in [-1, 1): exact in both 16-bit types
    return (float)(int)(hash(i + seed * 0x9e3779b9u) % 128) / 64 - 1;
}
// The same of eight exponents, in (-1, 1): sums have to be rounded, and so depend on their order, while multiples of
// 1/64 add up exactly in any.
static float uneven_number(unsigned i, unsigned seed) {
    const unsigned h = hash(i + seed * 0x9e3779b9u);
    const float size = ldexpf((float)(128 + h % 128), -8 - (int)(h / 128 % 8));
    return h & 1024 ? -size : size;
}
static uint16_t in_16_bits(float x, DType type) {
    if (type == DTYPE_BF16) {
        uint32_t bits;
        memcpy(&bits, &x, 4);
        return (uint16_t)(bits >> 16);
    }
    __half h = __float2half_rn(x);
    uint16_t bits;
    memcpy(&bits, &h, 2);
    return bits;
}

// ---- weights --------------------------------------------------------------------------------------------------------

// What weights are: numbers of 16 bits, or codes.
struct Kind {
    const char *name;
    DType type, dtype; // of the inputs; of the weights
    int group;         // a Matrix.group
    DType scale_dtype; // a Matrix.scale_dtype, where there are scales
    float (*numbers)(unsigned i, unsigned seed) = number;
};

enum { MOST = 700 }; // rows of the input

struct Case {
    int rows, cols, count; // of the weights; matrices: one; two, gate and up; or more, heads
};

static unsigned code(const Kind &kind, unsigned i) {
    unsigned h = hash(i);
    if (kind.dtype == DTYPE_U8) return h % 16;
    if (kind.dtype == DTYPE_I8) return (h % 255 - 127) & 0xff;
    return h % 128 == 127 ? h % 256 - 1 : h % 256; // not NaN
}
static float scale(unsigned i) { // exact in bf16
    unsigned h = hash(i ^ 0x5ca1e0u);
    return (float)(1 + h % 128) * (h & 128 ? -0x1p-7f : 0x1p-7f);
}
static float group_scale(const Kind &kind, unsigned i) {
    return kind.scale_dtype == DTYPE_BF16 ? scale(i) : scale(i) / 3;
}
static float in_bf16(float x) { // nearest, of two the even one
    uint32_t bits;
    memcpy(&bits, &x, 4);
    bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u;
    memcpy(&x, &bits, 4);
    return x;
}

// What enters the product for a weight: of a matrix with a scale for each row the code.
static float factor(const Kind &kind, const Case &c, int row, int col) {
    unsigned i = (unsigned)((size_t)row * c.cols + col), groups = (unsigned)quant_groups(kind.group, c.cols);
    if (kind.group == 0) return kind.numbers(i, 1);
    unsigned bits = code(kind, i);
    float value = kind.dtype == DTYPE_U8   ? (float)bits - 8
                  : kind.dtype == DTYPE_I8 ? (float)(int8_t)bits
                                           : quant_fp8_value((uint8_t)bits);
    return kind.group == WHOLE_ROW ? value
                                   : in_bf16(value * group_scale(kind, (unsigned)row * groups + col / kind.group));
}

// Rows as they are on the device, from the first matrix's first on.
static std::vector<char> rows_on_device(const Kind &kind, const Case &c, const Matrix *m, size_t rows) {
    const size_t row_bytes = device_row_bytes(m);
    std::vector<char> all(rows * row_bytes, 0);
    if (kind.group == 0) {
        uint16_t *numbers = (uint16_t *)all.data();
        for (size_t i = 0; i < rows * c.cols; i++) numbers[i] = in_16_bits(kind.numbers((unsigned)i, 1), kind.dtype);
        return all;
    }
    const Packing packing = matrix_packing(m);
    const unsigned groups = (unsigned)quant_groups(kind.group, c.cols);
    for (size_t r = 0; r < rows; r++)
        for (int col = 0; col < packing.blocks * PACK_COLUMNS; col++) {
            char *row = &all[r * row_bytes];
            unsigned bits = col < c.cols ? code(kind, (unsigned)(r * c.cols + col)) : kind.dtype == DTYPE_U8 ? 8 : 0;
            int place = packed_place(packing.bits, col % PACK_COLUMNS);
            char *at = row + col / PACK_COLUMNS * packing.block_bytes + place * packing.bits / 8;
            *at = (char)(packing.bits == 8 ? bits : (unsigned)*at | bits << place % 2 * 4);
            if (kind.dtype == DTYPE_F8_E4M3 && place % 2 == 1) { // after the one before it: columns 0, 2, 1, 3
                unsigned both = packed_fp8((uint8_t)at[-1], (uint8_t)at[0]);
                at[-1] = (char)both, at[0] = (char)(both >> 8);
            }
            if (packing.group == 0 || col % packing.group != 0 || col >= c.cols) continue;
            const float of_group = group_scale(kind, (unsigned)r * groups + col / packing.group);
            const uint16_t stored = in_16_bits(of_group, DTYPE_BF16);
            if (packing.scale_bytes == 2)
                memcpy(row + packed_scale(&packing, col), &stored, sizeof stored);
            else
                memcpy(row + packed_scale(&packing, col), &of_group, sizeof of_group);
        }
    return all;
}

// ---- products -------------------------------------------------------------------------------------------------------

// The matrices of a case that has two.
static LayerWeights gate_and_up(const Case &c, const Matrix *first) {
    LayerWeights layer = {};
    layer.w1 = *first;
    layer.w3 = matrix_rows(first, c.rows, c.rows);
    return layer;
}

static bool multiply(CudaState *s, const Case &c, const Matrix *first, float *out, int T, Error *err) {
    if (!widen_begin(s, err)) return false;
    if (c.count == 1) return matmul(s, out, first, s->xb, T, 1, err);
    if (c.count == 2) {
        const LayerWeights layer = gate_and_up(c, first);
        return matmul_gate_up(s, &layer, T, err);
    }
    Config config = {};
    config.dim = c.cols;
    config.head_dim = c.rows;
    return matmul_heads(s, &config, out, first, T, c.count, err);
}

static bool is_hopper(void) {
    int major = 0;
    CHECK_CUDA(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0));
    return major == 9;
}

// What the products of a shape and kind are computed with: inputs, matrices and their scales on the device.
struct Setup {
    CudaState *s;
    Matrix matrix;             // the first
    std::vector<float> scales; // of rows
    std::vector<float> start;  // what products are added to
    void *w_device, *scales_device;
    float *out_device, *scratch; // of as many as start has
};

enum { DIFFERENT = 251 }; // rows of weights that are not repeated, where others are

// different: so many rows of weights, which are repeated from there on (0: all). most: rows of the input.
static Setup setup_open(const Case &c, const Kind &kind, int different, int most = MOST) {
    static cublasHandle_t blas;
    CudaState *s = (CudaState *)calloc(1, sizeof *s);
    Error err = {""};
    Setup all = {};
    Matrix &matrix = all.matrix;
    matrix.dtype = kind.dtype;
    matrix.group = kind.group;
    matrix.scale_dtype = kind.scale_dtype;
    matrix.rows = matrix.all_rows = c.rows;
    matrix.cols = c.cols;
    const size_t n_in = (size_t)most * c.cols, n_out = (size_t)most * c.rows * c.count;
    const size_t rows = (size_t)c.rows * c.count, row_bytes = device_row_bytes(&matrix);
    const size_t made = different == 0 || rows < (size_t)different ? rows : (size_t)different;
    std::vector<char> weights = rows_on_device(kind, c, &matrix, made);
    std::vector<uint16_t> in(n_in);
    all.s = s;
    all.start.resize(n_out);
    all.scales.resize((size_t)c.rows * c.count);
    for (size_t i = 0; i < n_in; i++) in[i] = in_16_bits(kind.numbers((unsigned)i, 2), kind.type);
    for (size_t i = 0; i < n_out; i++) all.start[i] = number((unsigned)i, 3) / 3;
    for (size_t i = 0; i < all.scales.size(); i++) all.scales[i] = scale((unsigned)i) / 3;
    CHECK_CUDA(cudaStreamCreate(&s->stream));
    CHECK_CUDA(cudaMalloc(&s->blas_workspace, BLAS_WORKSPACE_BYTES));
    CHECK_CUDA(cudaMalloc(&all.w_device, rows * row_bytes));
    CHECK_CUDA(cudaMalloc(&all.scales_device, all.scales.size() * 4));
    CHECK_CUDA(cudaMalloc(&s->xb, n_in * 2));
    CHECK_CUDA(cudaMalloc((void **)&all.out_device, n_out * 4));
    CHECK_CUDA(cudaMalloc((void **)&all.scratch, n_out * 4));
    if (!blas && cublasCreate(&blas) != CUBLAS_STATUS_SUCCESS) test_fail("no cuBLAS");
    s->blas = blas;
    cublasSetStream(s->blas, s->stream);
    CHECK_CUDA(cudaMemcpy(all.w_device, weights.data(), weights.size(), cudaMemcpyHostToDevice));
    for (size_t have = made; have < rows; have *= 2) // a multiple of made: the pattern goes on
        CHECK_CUDA(cudaMemcpy((char *)all.w_device + have * row_bytes, all.w_device,
                              (rows - have < have ? rows - have : have) * row_bytes, cudaMemcpyDeviceToDevice));
    CHECK_CUDA(cudaMemcpy(all.scales_device, all.scales.data(), all.scales.size() * 4, cudaMemcpyHostToDevice));
    CHECK_CUDA(cudaMemcpy(s->xb, in.data(), n_in * 2, cudaMemcpyHostToDevice));
    s->type = kind.type;
    s->element = 2;
    s->pdl = s->one_order = true;
    s->gate_up = c.count == 2 ? all.out_device : all.scratch;
    if (kind.group != 0) {
        // several slabs, as short as they come; of weights that are repeated as large as in the program
        widen_size(&s->widening, different == 0 ? 1 : (uint64_t)c.rows * c.cols, c.cols, s->element);
        CHECK_CUDA(cudaMalloc((void **)&s->widening.slabs, 2 * s->widening.slab_bytes));
        if (!packed_open(s, &err)) test_fail("%s", err.text);
    }
    if (!widen_open(s, &err)) test_fail("%s", err.text);
    matrix.data = all.w_device;
    matrix.scale = kind.group == WHOLE_ROW ? all.scales_device : NULL;
    return all;
}

static void setup_close(Setup *all) {
    CudaState *s = all->s;
    widen_close(s);
    cudaFree(all->w_device);
    cudaFree(all->scales_device);
    cudaFree(s->xb);
    cudaFree(all->out_device);
    cudaFree(all->scratch);
    cudaFree(s->widening.slabs);
    cudaFree(s->blas_workspace);
    cudaStreamDestroy(s->stream);
    free(s);
}

// One shape and kind; every number of rows against the first rows of MOST.
static void check_case(const Case &c, const Kind &kind) {
    Error err = {""};
    Setup all = setup_open(c, kind, 0);
    CudaState *s = all.s;
    const Matrix &matrix = all.matrix;
    const std::vector<float> &start = all.start, &scales = all.scales;
    float *out_device = all.out_device;
    std::vector<float> whole(start.size()), some(start.size());
    static const int sizes[] = {MOST, 1,   2,   7,   8,   9,   15,  16,  17,  31,  32,  33,
                                63,   64,  65,  100, 127, 128, 129, 171, 192, 193, 216, 217,
                                256,  257, 300, 320, 321, 384, 385, 480, 481, 511, 512, 641};
    for (int T : sizes) {
        size_t bytes = (size_t)T * c.rows * c.count * 4;
        std::vector<float> &to = T == MOST ? whole : some;
        // what the product is added to, where it is; else numbers that must not be read
        if (c.count == 1)
            CHECK_CUDA(cudaMemcpy(out_device, start.data(), bytes, cudaMemcpyHostToDevice));
        else
            CHECK_CUDA(cudaMemset(out_device, 0xff, bytes));
        if (!multiply(s, c, &matrix, out_device, T, &err)) test_fail("%s", err.text);
        CHECK_CUDA(cudaStreamSynchronize(s->stream));
        CHECK_CUDA(cudaMemcpy(to.data(), out_device, bytes, cudaMemcpyDeviceToHost));
        size_t differ = 0;
        for (int m = 0; m < c.count; m++)
            for (int t = 0; t < T; t++)
                differ += memcmp(&to[((size_t)m * T + t) * c.rows], &whole[((size_t)m * MOST + t) * c.rows],
                                 (size_t)c.rows * 4) != 0;
        if (differ) test_fail("%d x %d, %d rows: %zu rows have other bits", c.rows, c.cols, T, differ);
    }
    // products of large matrices take the kernels that are loaded beforehand, and do not ask cuBLAS
    if (kind.group == 0 && c.rows >= 2048 && is_hopper() && cublasLtGetVersion() / 10000 == 13)
        for (const GemmPlan &plan : s->gemm_plans.plans)
            if (plan.T && !(plan.kernel && plan.found))
                test_fail("%d x %d, %d rows: not a kernel of the table", c.rows, c.cols, plan.T);
    double worst = 0;
    bool scaled = matrix.scale && c.count != 2; // of gate and up swiglu applies the scales
    for (int r = 0; r < c.rows * c.count; r += 17)
        for (int t = 0; t < MOST; t += 61) {
            size_t at = ((size_t)(r / c.rows) * MOST + t) * c.rows + r % c.rows;
            double row_scale = scaled ? (double)scales[(size_t)r] : 1, sum = 0, size = 0;
            for (int k = 0; k < c.cols; k++) {
                double x = (double)factor(kind, c, r, k) * (double)kind.numbers((unsigned)((size_t)t * c.cols + k), 2);
                sum += x * row_scale;
                size += fabs(x * row_scale);
            }
            if (c.count == 1) sum += (double)start[at];
            double off = fabs((double)whole[at] - sum) / size;
            if (!(off <= worst)) worst = off;
        }
    // tensor cores truncate as they add steps of 16: each at most 2^-22 of the sum of sizes
    double bound = (c.cols / 16 + 2) * 0x1p-22;
    if (!(worst <= bound))
        test_fail("%d x %d: off by %.3g of the sum of sizes, bound %.3g", c.rows, c.cols, worst, bound);
    setup_close(&all);
}

// ---- codes that are widened on their way into the product -----------------------------------------------------------

// Differences of a shape's results: how many, among how many, and the first.
struct Differences {
    size_t n, of;
    char first[256];
};

// Rows of `got`, `pitch` apart, against those of `right`, without a gap.
static void compare_bits(Differences *all, const char *what, const Case &c, int T, const float *got, int pitch,
                         const float *right) {
    for (int t = 0; t < T; t++) {
        all->of += (size_t)c.rows;
        if (memcmp(&got[(size_t)t * pitch], &right[(size_t)t * c.rows], (size_t)c.rows * 4) == 0) continue;
        for (int r = 0; r < c.rows; r++) {
            uint32_t bits[2];
            memcpy(&bits[0], &got[(size_t)t * pitch + r], 4);
            memcpy(&bits[1], &right[(size_t)t * c.rows + r], 4);
            if (bits[0] == bits[1]) continue;
            if (all->n++ == 0)
                snprintf(all->first, sizeof all->first,
                         "%s, %d rows: row %d, column %d is %.9g (%08x), not %.9g (%08x)", what, T, t, r,
                         (double)got[(size_t)t * pitch + r], bits[0], (double)right[(size_t)t * c.rows + r], bits[1]);
        }
    }
}

// A product, or the pair of gate and up, against what comes of matrices that are widened in memory. False: this GPU has
// no other way.
static bool check_packed(const Case &c, const Kind &kind, const std::vector<int> &sizes, int *n_differ) {
    enum { GAP = 12 }; // elements between two rows of a padded output
    Setup all = setup_open(c, kind, DIFFERENT);
    CudaState *s = all.s;
    Error err = {""};
    Differences differences = {};
    const bool taken = packed_takes(&all.matrix);
    const int pitch = c.rows + GAP, packed_rows = s->packed_rows, most = sizes.back();
    const float *row_scales = (const float *)all.matrix.scale;
    const size_t n_most = (size_t)most * c.rows * c.count;
    std::vector<float> right(n_most), got(n_most), padded((size_t)most * pitch), before((size_t)most * pitch);
    float *padded_device;
    CHECK_CUDA(cudaMalloc((void **)&padded_device, padded.size() * 4));
    for (size_t i = 0; i < before.size(); i++)
        before[i] = (int)(i % pitch) < c.rows ? all.start[i / pitch * c.rows + i % pitch] : -1;
    for (int T : sizes) {
        const size_t n = (size_t)T * c.rows * c.count;
        if (packed_rows == 0) break;
        for (float beta : {0.0f, 1.0f}) {
            auto compute = [&](int rows) {
                s->packed_rows = rows;
                if (beta == 1)
                    CHECK_CUDA(cudaMemcpy(all.out_device, all.start.data(), n * 4, cudaMemcpyHostToDevice));
                else
                    CHECK_CUDA(cudaMemset(all.out_device, 0xff, n * 4));
                if (!widen_begin(s, &err) ||
                    !(c.count == 2 ? multiply(s, c, &all.matrix, all.out_device, T, &err)
                                   : matmul(s, all.out_device, &all.matrix, s->xb, T, beta, &err)))
                    test_fail("%s", err.text);
                CHECK_CUDA(cudaStreamSynchronize(s->stream));
            };
            if (c.count == 2 && beta == 1) continue;
            compute(0);
            CHECK_CUDA(cudaMemcpy(right.data(), all.out_device, n * 4, cudaMemcpyDeviceToHost));
            compute(MOST);
            CHECK_CUDA(cudaMemcpy(got.data(), all.out_device, n * 4, cudaMemcpyDeviceToHost));
            for (int m = 0; m < c.count; m++)
                compare_bits(&differences,
                             beta == 1      ? "added"
                             : c.count == 2 ? "gate and up"
                                            : "product",
                             c, T, &got[(size_t)m * T * c.rows], c.rows, &right[(size_t)m * T * c.rows]);
            if (c.count == 2 || !taken) continue;
            // Rows with gaps, from a graph.
            const size_t n_padded = (size_t)T * pitch, n_after = (size_t)(most - T < 2 ? most - T : 2) * pitch;
            cudaGraph_t graph;
            cudaGraphExec_t exec;
            CHECK_CUDA(cudaMemcpy(padded_device, before.data(), (n_padded + n_after) * 4, cudaMemcpyHostToDevice));
            CHECK_CUDA(cudaStreamBeginCapture(s->stream, cudaStreamCaptureModeThreadLocal));
            if (!packed_product(s, padded_device, pitch, &all.matrix, NULL, row_scales, s->xb, T, beta, &err))
                test_fail("%s", err.text);
            CHECK_CUDA(cudaStreamEndCapture(s->stream, &graph));
            CHECK_CUDA(cudaGraphInstantiate(&exec, graph, 0));
            CHECK_CUDA(cudaGraphLaunch(exec, s->stream));
            CHECK_CUDA(cudaStreamSynchronize(s->stream));
            CHECK_CUDA(cudaMemcpy(padded.data(), padded_device, (n_padded + n_after) * 4, cudaMemcpyDeviceToHost));
            cudaGraphExecDestroy(exec);
            cudaGraphDestroy(graph);
            compare_bits(&differences, "rows with gaps", c, T, padded.data(), pitch, right.data());
            for (size_t i = 0; i < n_padded + n_after; i++)
                if ((i >= n_padded || (int)(i % pitch) >= c.rows) && padded[i] != before[i])
                    test_fail("%d x %d, %d rows: wrote row %zu, column %zu", c.rows, c.cols, T, i / pitch, i % pitch);
        }
    }
    if (differences.n > 0) {
        const int slab = widen_rows(s, &all.matrix, SLAB_ROWS, s->element);
        printf("  %s, %d x %d%s, widened %s (%d rows): %zu of %zu differ; %s\n", kind.name, c.rows, c.cols,
               taken ? "" : " (not taken)", slab < c.rows ? "in slabs" : "at once", slab < c.rows ? slab : c.rows,
               differences.n, differences.of, differences.first);
        ++*n_differ;
    }
    cudaFree(padded_device);
    setup_close(&all);
    return packed_rows > 0;
}

// Which matrices the kernels take: whole units of rows and columns alone.
static void test_packed_takes_whole_units(void) {
    static const struct {
        int rows, cols;
        bool taken;
    } cases[] = {{64, 64, true},    {4096, 14336, true}, {128256, 4096, true}, {132, 448, false},  {60, 1024, false},
                 {72, 1024, false}, {4, 4096, false},    {256, 1000, false},   {256, 1032, false}, {320, 288, false}};
    for (DType dtype : {DTYPE_F8_E4M3, DTYPE_I8, DTYPE_U8, DTYPE_BF16})
        for (const auto &c : cases) {
            Matrix w = {};
            w.dtype = dtype;
            w.group = dtype == DTYPE_BF16 ? 0 : WHOLE_ROW;
            w.rows = c.rows;
            w.cols = c.cols;
            if (packed_takes(&w) != (c.taken && dtype != DTYPE_BF16))
                test_fail("%d x %d: %s", c.rows, c.cols, c.taken ? "not taken" : "taken");
        }
    test_end("test_packed_takes_whole_units");
}

// ---- products of many rows, and what follows them -------------------------------------------------------------------

// Such a product, by its own kernel or by cuBLAS and the kernels after it.
struct PromptTest {
    PromptKind kind;
    CudaState *s;
    int rows, cols; // of the weights in one product, all or a slab's: gate and up together
    int slabs;      // that the weights are widened in; 0: they are not
    int clusters;   // of this GPU
    // The results:
    uint16_t *device; // [n]
    size_t n;         // elements that they may be in, all of them
    int pitch;        // elements of a row
    int written;      // elements for each row of the input
    // Computes them for the first T rows of s->xb.
    std::function<bool(bool own, int T, Error *err)> product;
};

// All elements, of which those that nobody has written are 0xffff, which no result is.
static std::vector<uint16_t> prompt_results(const PromptTest &test, bool own, int T) {
    Error err = {""};
    std::vector<uint16_t> results(test.n);
    CHECK_CUDA(cudaMemset(test.device, 0xff, test.n * 2));
    if (!widen_begin(test.s, &err) || !test.product(own, T, &err)) test_fail("%s", err.text);
    CHECK_CUDA(cudaStreamSynchronize(test.s->stream));
    CHECK_CUDA(cudaMemcpy(results.data(), test.device, test.n * 2, cudaMemcpyDeviceToHost));
    return results;
}

// A number for each kind of tile.
static int tile_number(PromptTile tile) {
    return 1024 * tile.tokens + 2 * tile.rows + tile.shares_tokens;
}

// Numbers of clusters, up to `all`: of each kind of tiles that a product takes with some of them the fewest and the
// most.
static std::vector<int> cluster_counts(PromptKind kind, int T, int rows, int all) {
    std::vector<int> counts;
    for (int i = 0; prompt_tile_choice(kind, i).rows > 0; i++) {
        int fewest = 0, most = 0;
        for (int clusters = 1; clusters <= all; clusters++) {
            if (tile_number(prompt_tile(kind, T, rows, clusters)) != tile_number(prompt_tile_choice(kind, i))) continue;
            if (fewest == 0) fewest = clusters;
            most = clusters;
        }
        if (fewest > 0) counts.push_back(fewest);
        if (most > fewest) counts.push_back(most);
    }
    return counts;
}

// Every element by both ways, in tiles of every kind that there is for a shape. Returns whether all are the same.
// tiles: gets the numbers of those that were used.
static bool check_prompt(const PromptTest &test, const char *name, const std::vector<int> &sizes,
                         std::set<int> *tiles) {
    size_t differ = 0, of = 0;
    char first[256] = "";
    for (int T : sizes) {
        const std::vector<uint16_t> right = prompt_results(test, false, T);
        size_t written = 0;
        for (uint16_t x : right) written += x != 0xffff;
        if (written != (size_t)T * test.written) test_fail("%s, %d rows: cuBLAS wrote %zu elements", name, T, written);
        for (int clusters : cluster_counts(test.kind, T, test.rows, test.clusters)) {
            const PromptTile tile = prompt_tile(test.kind, T, test.rows, clusters);
            tiles->insert(tile_number(tile));
            test.s->prompt_clusters = clusters;
            const std::vector<uint16_t> got = prompt_results(test, true, T);
            of += test.n;
            if (memcmp(got.data(), right.data(), test.n * 2) == 0) continue;
            for (size_t i = 0; i < test.n; i++)
                if (got[i] != right[i] && differ++ == 0)
                    snprintf(first, sizeof first,
                             "%d rows, tiles of %d x %d%s, %d clusters: row %zu, column %zu is %04x, not %04x", T,
                             tile.tokens, tile.rows, tile.shares_tokens ? " sharing tokens" : "", clusters,
                             i / test.pitch, i % test.pitch, got[i], right[i]);
        }
    }
    if (differ > 0) printf("  %s: %zu of %zu differ; %s\n", name, differ, of, first);
    return differ == 0;
}

static bool is_finite(uint16_t x, DType type) {
    const int exponent = type == DTYPE_F16 ? 0x7c00 : 0x7f80;
    return (x & exponent) != exponent;
}
static bool is_nan(uint16_t x, DType type) {
    return !is_finite(x, type) && (x & (type == DTYPE_F16 ? 0x03ff : 0x007f));
}

// Rows of the input with NaN and infinities have results that are not finite, those that cuBLAS and the kernels after
// it give; all other rows have the bits that they have without them.
static void check_not_finite(const PromptTest &test, const char *name, int T) {
    const DType type = test.s->type;
    const int middle = (T > PROMPT_TOKENS ? PROMPT_TOKENS : T / 2) - 1; // and the next row: often of two tiles
    const struct {
        int row, col;
        float x;
    } bad[] = {
        {0, test.cols - 1, INFINITY}, {5, 7, NAN}, {middle, 0, NAN}, {middle + 1, 64, -INFINITY}, {T - 1, 1, NAN}};
    const std::vector<uint16_t> before = prompt_results(test, true, T);
    for (const auto &b : bad) {
        const uint16_t x = in_16_bits(b.x, type);
        CHECK_CUDA(cudaMemcpy((uint16_t *)test.s->xb + (size_t)b.row * test.cols + b.col, &x, sizeof x,
                              cudaMemcpyHostToDevice));
    }
    const std::vector<uint16_t> right = prompt_results(test, false, T), got = prompt_results(test, true, T);
    size_t changed = 0, finite = 0, differ = 0;
    for (size_t i = 0; i < test.n; i++) {
        differ += got[i] != right[i] && !(is_nan(got[i], type) && is_nan(right[i], type));
        if (got[i] == before[i]) continue;
        changed++;
        finite += is_finite(got[i], type);
    }
    const size_t expected = sizeof bad / sizeof *bad * (size_t)test.written;
    if (changed != expected || finite > 0 || differ > 0)
        test_fail("%s: %zu results changed, not %zu; %zu of them are finite; %zu are not cuBLAS's", name, changed,
                  expected, finite, differ);
}

// Of every kind of tile of up to so many tokens one has been used; and where weights are widened, both slabs, and one of
// them again.
static void check_used(PromptKind product, const Kind &kind, const std::set<int> &tiles, int most_slabs,
                       int most_tokens = PROMPT_TOKENS) {
    if (kind.group != 0 && most_slabs < 3) test_fail("no weights were widened in more than %d slabs", most_slabs);
    for (int i = 0; prompt_tile_choice(product, i).rows > 0; i++) {
        const PromptTile tile = prompt_tile_choice(product, i);
        if (tile.tokens <= most_tokens && !tiles.count(tile_number(tile)))
            test_fail("no product had tiles of %d x %d, shared tokens %d", tile.tokens, tile.rows, tile.shares_tokens);
    }
}

// Codes are widened in memory from here on.
static int open_prompt(CudaState *s) {
    Error err = {""};
    s->packed_rows = 0;
    if (!prompt_open(s, &err)) test_fail("%s", err.text);
    return s->prompt_clusters;
}

// Whether the next products are this kernel's own. False: it does not take them.
enum { PROMPT_NEVER = 200 }; // percent: more than any product has, with its allowance
static bool switch_prompt(CudaState *s, PromptKind kind, bool own, const Matrix *w, int T, Error *err) {
    s->prompt_least[kind] = own ? 0 : PROMPT_NEVER;
    return !own || prompt_takes(s, kind, w, T) || fail(err, "not taken");
}

// How many rows of a matrix are in one product, where `matrices` alike are widened into one slab.
static int rows_at_once(const CudaState *s, const Matrix *w, int matrices) {
    if (s->widening.slab_bytes == 0) return w->rows;
    const int slab = widen_rows(s, w, SLAB_ROWS / matrices, matrices * s->element);
    return slab < w->rows ? slab : w->rows;
}
static int slabs_of(const CudaState *s, const Matrix *w, int at_once) {
    return s->widening.slab_bytes == 0 ? 0 : (w->rows + at_once - 1) / at_once;
}

// Calls body(test) with gate and up of `rows` rows each and SwiGLU, for inputs of up to `most` rows. different: as
// setup_open has it, here and below.
template <class Body>
static void with_prompt_swiglu(int rows, int cols, const Kind &kind, int different, int most, Body body) {
    const Case c = {rows, cols, 2};
    Setup all = setup_open(c, kind, different, most);
    CudaState *s = all.s;
    const LayerWeights layer = gate_and_up(c, &all.matrix);
    PromptTest test = {};
    const int at_once = rows_at_once(s, &layer.w1, 2);
    test.kind = PROMPT_SWIGLU;
    test.s = s;
    test.rows = 2 * at_once;
    test.cols = cols;
    test.slabs = slabs_of(s, &layer.w1, at_once);
    test.clusters = open_prompt(s);
    test.pitch = test.written = rows;
    test.n = (size_t)(most + PROMPT_CLUSTER * PROMPT_TOKENS) * rows; // and what a last tile could write too far
    CHECK_CUDA(cudaMalloc((void **)&test.device, test.n * 2));
    s->h = test.device;
    test.product = [&](bool own, int T, Error *err) {
        return switch_prompt(s, PROMPT_SWIGLU, own, &layer.w1, T, err) && feed_forward_fused(s, &layer, T, err);
    };
    body(test);
    cudaFree(test.device);
    setup_close(&all);
}

// Where the rows of a prompt's sequences are in the cache: the rows of all of them mixed, sequences that start at the
// borders of pages and beside them, pages in no order.
struct CachePlaces {
    int n_pages, table_width;
    std::vector<int> pos, slots, table;
};
static CachePlaces cache_places(int T) {
    static const int before[] = {63, 0, 64, 128, 1, 127, 190}; // positions before each sequence's first row
    enum { SLOTS = sizeof before / sizeof *before, SPARE = 3 };
    CachePlaces places = {};
    std::vector<int> len(before, before + SLOTS), pages;
    int longest = 0;
    for (int t = 0; t < T; t++) {
        const int slot = (int)(hash((unsigned)t + 77) % SLOTS);
        places.slots.push_back(slot);
        places.pos.push_back(len[slot]++);
    }
    for (int slot = 0; slot < SLOTS; slot++) longest = len[slot] > longest ? len[slot] : longest;
    places.table_width = kv_pages(longest);
    places.n_pages = SLOTS * places.table_width + SPARE;
    for (int i = 0; i < places.n_pages; i++) {
        const int other = (int)(hash((unsigned)i + 99) % (unsigned)(i + 1));
        pages.push_back(i);
        std::swap(pages[i], pages[other]);
    }
    places.table.assign(pages.begin(), pages.end() - SPARE);
    return places;
}

template <class X> static X *on_device(const std::vector<X> &values) {
    X *device;
    CHECK_CUDA(cudaMalloc((void **)&device, values.size() * sizeof(X)));
    CHECK_CUDA(cudaMemcpy(device, values.data(), values.size() * sizeof(X), cudaMemcpyHostToDevice));
    return device;
}

struct Heads {
    int n_q, n_kv, head_dim, cols;
};

// Calls body(test) with queries, keys and values and RoPE, for inputs of up to `most` rows: rows that attention reads,
// or (cached) keys and values in the second layer of a cache of two.
template <class Body>
static void with_prompt_qkv(const Heads &heads, bool cached, const Kind &kind, int different, int most, Body body) {
    enum { LAYERS = 2 };
    const int n_heads = heads.n_q + 2 * heads.n_kv;
    const Case c = {n_heads * heads.head_dim, heads.cols, 1};
    const CachePlaces places = cache_places(most);
    Setup all = setup_open(c, kind, different, most);
    CudaState *s = all.s;
    Model m = {};
    m.state = s;
    m.config.dim = heads.cols;
    m.config.head_dim = heads.head_dim;
    m.shard.kv_heads.n = heads.n_kv;
    m.kv.n_pages = places.n_pages;
    m.kv.table_width = places.table_width;
    std::vector<float2> turns((size_t)most * heads.head_dim / 2);
    for (size_t i = 0; i < turns.size(); i++) {
        const float angle = 4 * uneven_number((unsigned)i, 4);
        turns[i] = make_float2(cosf(angle), sinf(angle));
    }
    const size_t n_out = (size_t)(most + PROMPT_CLUSTER * PROMPT_TOKENS) * c.rows,
                 n_cache = LAYERS * own_layer_elements(&m);
    PromptTest test = {};
    test.kind = PROMPT_QKV;
    test.s = s;
    test.rows = rows_at_once(s, &all.matrix, 1);
    test.cols = c.cols;
    test.slabs = slabs_of(s, &all.matrix, test.rows);
    test.clusters = open_prompt(s);
    test.pitch = heads.head_dim;
    test.written = c.rows;
    test.n = n_out + 2 * n_cache;
    CHECK_CUDA(cudaMalloc((void **)&test.device, test.n * 2));
    s->qkv = all.out_device;
    s->qkv_in = test.device;
    m.kv.k = test.device + n_out;
    m.kv.v = test.device + n_out + n_cache;
    s->rope_table = on_device(turns);
    s->pos = on_device(places.pos);
    s->row_slots = on_device(places.slots);
    s->block_table = on_device(places.table);
    test.product = [&](bool own, int T, Error *err) {
        return switch_prompt(s, PROMPT_QKV, own, &all.matrix, T, err) &&
               project_qkv_fused(&m, &all.matrix, T, heads.n_q, heads.n_kv, cached ? LAYERS - 1 : -1, err);
    };
    body(test);
    for (void *memory :
         {(void *)test.device, (void *)s->rope_table, (void *)s->pos, (void *)s->row_slots, (void *)s->block_table})
        cudaFree(memory);
    setup_close(&all);
}

// Parts of a tile, of a panel of tokens and of a pair of tiles, in 1, 2 and more pairs.
static const std::vector<int> prompt_sizes = {1, 17, 64, 65, 127, 128, 129, 257, 300, 513},
                              few_sizes = {1, 17, 63, 64, 65, 127, 128}, // that tiles for few tokens take
    code_sizes = {1, 64, 65, 127, 129, 300, 513};                        // where weights are codes

static void test_prompt_swiglu(const char *test_name, const Kind &kind) {
    struct SwigluCase {
        int rows, cols, different;
        std::vector<int> sizes;
    };
    // The last one: more pairs of tiles of tokens than go through the weights together.
    static const std::vector<SwigluCase> of_numbers = {{8, 64, 0, prompt_sizes},      {8, 4096, 0, prompt_sizes},
                                                       {96, 192, 0, prompt_sizes},    {176, 64, 0, prompt_sizes},
                                                       {176, 448, 0, prompt_sizes},   {688, 192, 0, prompt_sizes},
                                                       {688, 4096, 0, prompt_sizes},  {1024, 448, 0, prompt_sizes},
                                                       {1024, 4096, 0, prompt_sizes}, {176, 192, 0, {2049, 4200}}};
    // In slabs of 64 rows each of gate and up, of which the last ones have fewer; in two slabs.
    static const std::vector<SwigluCase> of_codes = {{176, 448, 0, code_sizes},
                                                     {688, 192, 0, code_sizes},
                                                     {896, 192, DIFFERENT, code_sizes},
                                                     {1024, 64, DIFFERENT, code_sizes}};
    std::set<int> tiles;
    int differ = 0, n = 0, most_slabs = 0;
    for (const SwigluCase &c : kind.group == 0 ? of_numbers : of_codes)
        with_prompt_swiglu(c.rows, c.cols, kind, c.different, c.sizes.back(), [&](const PromptTest &test) {
            char name[80];
            snprintf(name, sizeof name, "%s, gate and up of %d x %d", kind.name, c.rows, c.cols);
            n++;
            most_slabs = test.slabs > most_slabs ? test.slabs : most_slabs;
            differ += !check_prompt(test, name, c.sizes, &tiles);
        });
    if (differ > 0) test_fail("%d of %d shapes have other bits", differ, n);
    check_used(PROMPT_SWIGLU, kind, tiles, most_slabs);
    test_end(test_name);
}

static void test_prompt_qkv(const char *test_name, const Kind &kind) {
    struct QkvCase {
        Heads heads;
        int different;
    };
    // Heads of each size, that end in a tile and across two; queries alone, and keys and values alone.
    static const std::vector<QkvCase> of_numbers = {{{4, 2, 64, 192}, 0},  {{3, 1, 96, 448}, 0}, {{8, 2, 128, 64}, 0},
                                                    {{16, 4, 96, 64}, 0},  {{5, 0, 96, 192}, 0}, {{7, 0, 64, 64}, 0},
                                                    {{0, 3, 64, 192}, 0},  {{0, 2, 96, 64}, 0},  {{0, 2, 128, 448}, 0},
                                                    {{8, 2, 128, 4096}, 0}};
    // In slabs of 128 rows: heads that end in a slab and across two, the last one with fewer rows. Then in one slab.
    static const std::vector<QkvCase> of_codes = {{{3, 1, 96, 448}, 0},
                                                  {{8, 2, 128, 64}, 0},
                                                  {{0, 3, 64, 192}, 0},
                                                  {{5, 1, 128, 192}, DIFFERENT},
                                                  {{8, 4, 64, 64}, DIFFERENT}};
    const std::vector<int> &sizes = kind.group == 0 ? prompt_sizes : code_sizes;
    std::set<int> tiles;
    int differ = 0, n = 0, most_slabs = 0;
    for (const QkvCase &c : kind.group == 0 ? of_numbers : of_codes)
        for (bool cached : {false, true})
            with_prompt_qkv(c.heads, cached, kind, c.different, sizes.back(), [&](const PromptTest &test) {
                const Heads &heads = c.heads;
                char name[120];
                snprintf(name, sizeof name, "%s, %d heads and %d of keys and values, of %d, %d columns, %s", kind.name,
                         heads.n_q, heads.n_kv, heads.head_dim, heads.cols,
                         cached ? "to the cache" : "not to the cache");
                n++;
                most_slabs = test.slabs > most_slabs ? test.slabs : most_slabs;
                differ += !check_prompt(test, name, sizes, &tiles);
            });
    if (differ > 0) test_fail("%d of %d shapes have other bits", differ, n);
    check_used(PROMPT_QKV, kind, tiles, most_slabs);
    test_end(test_name);
}

// The product of a matrix, added to what is there: rows after the last keep their bits. Of many tokens only weights with
// a scale for each row are taken.
static void test_prompt_add(const char *test_name, const Kind &kind) {
    static const struct {
        Case c;
        int different;
    } cases[] = {{{176, 448, 1}, 0}, {{448, 192, 1}, 0}, {{896, 192, 1}, DIFFERENT}, {{1024, 64, 1}, DIFFERENT}};
    const bool scaled = kind.group != 0;
    const std::vector<int> &sizes = scaled ? code_sizes : few_sizes;
    // and the rows that a last tile could write too far
    const int most = sizes.back() + PROMPT_CLUSTER * PROMPT_TOKENS;
    std::set<int> tiles;
    int n_differ = 0, most_slabs = 0;
    for (const auto &of : cases) {
        const Case &c = of.c;
        Setup all = setup_open(c, kind, scaled ? of.different : 0, most);
        CudaState *s = all.s;
        Error err = {""};
        Differences differences = {};
        const int clusters_there = open_prompt(s), at_once = rows_at_once(s, &all.matrix, 1),
                  slabs = slabs_of(s, &all.matrix, at_once);
        const size_t n = all.start.size();
        std::vector<float> right(n), got(n);
        most_slabs = slabs > most_slabs ? slabs : most_slabs;
        auto compute = [&](std::vector<float> &to, bool own, int T) {
            CHECK_CUDA(cudaMemcpy(all.out_device, all.start.data(), n * 4, cudaMemcpyHostToDevice));
            if (!widen_begin(s, &err) || !switch_prompt(s, PROMPT_ADD, own, &all.matrix, T, &err) ||
                !matmul(s, all.out_device, &all.matrix, s->xb, T, 1, &err))
                test_fail("%s", err.text);
            CHECK_CUDA(cudaStreamSynchronize(s->stream));
            CHECK_CUDA(cudaMemcpy(to.data(), all.out_device, n * 4, cudaMemcpyDeviceToHost));
            const size_t end = (size_t)T * c.rows;
            if (memcmp(&to[end], &all.start[end], (n - end) * 4) != 0)
                test_fail("%s, %d x %d, %d rows: rows after them have other bits", kind.name, c.rows, c.cols, T);
        };
        for (int T : sizes) {
            compute(right, false, T);
            if (memcmp(right.data(), all.start.data(), (size_t)c.rows * 4) == 0) test_fail("cuBLAS added nothing");
            for (int clusters : cluster_counts(PROMPT_ADD, T, at_once, clusters_there)) {
                const PromptTile tile = prompt_tile(PROMPT_ADD, T, at_once, clusters);
                if (!scaled && tile.tokens == PROMPT_TOKENS) continue; // cuBLAS's
                char what[80];
                snprintf(what, sizeof what, "tiles of %d x %d%s, %d clusters", tile.tokens, tile.rows,
                         tile.shares_tokens ? " sharing tokens" : "", clusters);
                tiles.insert(tile_number(tile));
                s->prompt_clusters = clusters;
                compute(got, true, T);
                compare_bits(&differences, what, c, T, got.data(), c.rows, right.data());
            }
        }
        if (differences.n > 0) {
            printf("  %s, %d x %d, %d slabs: %zu of %zu differ; %s\n", kind.name, c.rows, c.cols, slabs, differences.n,
                   differences.of, differences.first);
            n_differ++;
        }
        setup_close(&all);
    }
    if (n_differ > 0) test_fail("%d of %zu shapes have other bits", n_differ, sizeof cases / sizeof *cases);
    check_used(PROMPT_ADD, kind, tiles, most_slabs, scaled ? PROMPT_TOKENS : PROMPT_FEW_TOKENS);
    test_end(test_name);
}

static void test_prompt_not_finite(const char *test_name, const Kind &kind) {
    enum { MOST = 300 };
    for (int T : {40, 80, (int)MOST}) { // one tile for few tokens, two, tiles of many
        with_prompt_swiglu(176, 192, kind, 0, MOST,
                           [&](const PromptTest &test) { check_not_finite(test, "SwiGLU", T); });
        for (bool cached : {false, true})
            with_prompt_qkv({4, 2, 64, 192}, cached, kind, 0, MOST, [&](const PromptTest &test) {
                check_not_finite(test, cached ? "RoPE and the cache" : "RoPE", T);
            });
    }
    test_end(test_name);
}

// Why none of that can be tested here; NULL: it can.
static const char *no_prompt_products(void) {
    if (skip_reason) return skip_reason;
    Setup all = setup_open({64, 64, 1}, {"bf16", DTYPE_BF16, DTYPE_BF16, 0, DTYPE_F32}, 0, 1);
    open_prompt(all.s);
    const bool there = all.s->prompt_clusters > 0;
    setup_close(&all);
    return there ? NULL : "needs a Hopper GPU";
}

int main(void) {
    // The first are of numbers alone: an output matrix of an odd vocabulary; the next two have so many rows of weights
    // that few rows of the input take the kernels of long prompts; to prepare codes takes a CPU long.
    static const Case cases[] = {{2001, 1032, 1}, {24576, 512, 1}, {43008, 128, 2}, {4096, 14336, 1}, {14336, 4096, 2},
                                 {8192, 2048, 2}, {6144, 4096, 1}, {4096, 4096, 1}, {2048, 8192, 1},  {1024, 512, 1},
                                 {288, 768, 1},   {200, 328, 1},   {64, 64, 1},     {72, 1000, 1},    {768, 288, 2},
                                 {3584, 1024, 2}, {128, 4096, 48}, {64, 328, 7}};
    enum { N_CASES = sizeof cases / sizeof *cases, OF_NUMBERS = 7 };
    static const Kind kinds[] = {{"bf16", DTYPE_BF16, DTYPE_BF16, 0, DTYPE_F32},
                                 {"f16", DTYPE_F16, DTYPE_F16, 0, DTYPE_F32},
                                 {"fp8", DTYPE_BF16, DTYPE_F8_E4M3, WHOLE_ROW, DTYPE_F32},
                                 {"int8", DTYPE_BF16, DTYPE_I8, WHOLE_ROW, DTYPE_F32},
                                 {"int8_groups_of_32", DTYPE_BF16, DTYPE_I8, 32, DTYPE_BF16},
                                 {"int4", DTYPE_BF16, DTYPE_U8, WHOLE_ROW, DTYPE_F32},
                                 {"int4_groups_of_64", DTYPE_BF16, DTYPE_U8, 64, DTYPE_BF16},
                                 {"int4_groups_of_128", DTYPE_BF16, DTYPE_U8, 128, DTYPE_BF16}};
    // Parts of a tile, of a slice and of a block; more blocks than one; small and large tiles, of 256 rows of
    // activations, too; then what is not taken. Of 8B qkv, out, down, gate and up.
    static const Case packed_cases[] = {{64, 192, 1},    {128, 448, 1},  {192, 1088, 1}, {320, 4096, 1},
                                        {128, 14336, 1}, {448, 1024, 2}, {8256, 320, 1}, {16448, 192, 1},
                                        {132, 448, 1},   {200, 688, 1},  {72, 1000, 1},  {60, 1032, 2}},
                      real_cases[] = {{6144, 4096, 1}, {4096, 4096, 1}, {4096, 14336, 1}, {14336, 4096, 2}};
    static const std::vector<int> packed_sizes = {1,  7,   8,   9,   16,  17,  32,  33, 64,
                                                  65, 100, 128, 129, 200, 256, 257, 300},
                                  real_sizes = {1, 8, 16, 17, 32, 33, 64, 100, 128, 129, 256};
    static const Kind packed_kinds[] = {{"fp8", DTYPE_BF16, DTYPE_F8_E4M3, WHOLE_ROW, DTYPE_F32},
                                        {"int8", DTYPE_BF16, DTYPE_I8, WHOLE_ROW, DTYPE_F32},
                                        {"int8_groups_of_32", DTYPE_BF16, DTYPE_I8, 32, DTYPE_BF16},
                                        {"int8_groups_of_64", DTYPE_BF16, DTYPE_I8, 64, DTYPE_BF16},
                                        {"int8_groups_of_128", DTYPE_BF16, DTYPE_I8, 128, DTYPE_BF16},
                                        {"int8_groups_of_32_float32", DTYPE_BF16, DTYPE_I8, 32, DTYPE_F32},
                                        {"int4", DTYPE_BF16, DTYPE_U8, WHOLE_ROW, DTYPE_F32},
                                        {"int4_groups_of_32", DTYPE_BF16, DTYPE_U8, 32, DTYPE_BF16},
                                        {"int4_groups_of_64", DTYPE_BF16, DTYPE_U8, 64, DTYPE_BF16},
                                        {"int4_groups_of_128", DTYPE_BF16, DTYPE_U8, 128, DTYPE_BF16},
                                        {"int4_groups_of_32_float32", DTYPE_BF16, DTYPE_U8, 32, DTYPE_F32},
                                        {"int4_groups_of_128_float32", DTYPE_BF16, DTYPE_U8, 128, DTYPE_F32}};
    int n = 0;
    if (cudaGetDeviceCount(&n) != cudaSuccess || n == 0) skip_reason = "no GPU";
    for (const Kind &kind : kinds) {
        char name[80];
        snprintf(name, sizeof name, "test_products_same_bits_in_any_number_of_rows_%s", kind.name);
        if (!test_wanted(name)) continue;
        if (skip_reason) {
            test_skip(name, skip_reason);
            continue;
        }
        for (int i = kind.group == 0 ? 0 : OF_NUMBERS; i < N_CASES; i++) check_case(cases[i], kind);
        test_end(name);
    }
    test_packed_takes_whole_units();
    for (const Kind &kind : packed_kinds) {
        char name[80];
        snprintf(name, sizeof name, "test_packed_products_same_bits_as_widened_%s", kind.name);
        if (!test_wanted(name)) continue;
        bool checked = !skip_reason;
        int differ = 0, n_cases = 0;
        for (const Case &c : packed_cases) n_cases++, checked = checked && check_packed(c, kind, packed_sizes, &differ);
        for (const Case &c : real_cases) n_cases++, checked = checked && check_packed(c, kind, real_sizes, &differ);
        if (differ > 0) test_fail("%d of %d shapes have other bits", differ, n_cases);
        if (checked)
            test_end(name);
        else
            test_skip(name, skip_reason ? skip_reason : "needs a Hopper GPU");
    }
    static const Kind prompt_kinds[] = {{"bf16", DTYPE_BF16, DTYPE_BF16, 0, DTYPE_F32, uneven_number},
                                        {"f16", DTYPE_F16, DTYPE_F16, 0, DTYPE_F32, uneven_number},
                                        {"fp8", DTYPE_BF16, DTYPE_F8_E4M3, WHOLE_ROW, DTYPE_F32, uneven_number},
                                        {"int8", DTYPE_BF16, DTYPE_I8, WHOLE_ROW, DTYPE_F32, uneven_number},
                                        {"int8_groups_of_32", DTYPE_BF16, DTYPE_I8, 32, DTYPE_BF16, uneven_number},
                                        {"int4_groups_of_128", DTYPE_BF16, DTYPE_U8, 128, DTYPE_BF16, uneven_number}};
    static const struct {
        const char *name;
        void (*run)(const char *name, const Kind &kind);
    } prompt_tests[] = {{"test_prompt_swiglu_same_bits_as_cublas", test_prompt_swiglu},
                        {"test_prompt_qkv_same_bits_as_cublas", test_prompt_qkv},
                        {"test_prompt_add_same_bits_as_cublas", test_prompt_add},
                        {"test_prompt_rows_that_are_not_finite_change_no_others", test_prompt_not_finite}};
    for (const auto &test : prompt_tests)
        for (const Kind &kind : prompt_kinds) {
            char name[80];
            snprintf(name, sizeof name, "%s_%s", test.name, kind.name);
            // Codes with scales of groups are widened with them, and cuBLAS adds.
            if (test.run == test_prompt_add && kind.group != 0 && kind.group != WHOLE_ROW) continue;
            if (!test_wanted(name)) continue;
            const char *reason = no_prompt_products();
            if (reason)
                test_skip(name, reason);
            else
                test.run(name, kind);
        }
    return tests_summary();
}
