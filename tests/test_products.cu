// Matrix products of the GPU's engines: a row has the same bits in any number of rows, and is the sum of its products to
// what float32 sums may be off.
#include <math.h>
#include <string.h>

#include <vector>

#include "../model/cuda/gemm.h"
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

enum { MOST = 700 }; // rows of the input

struct Case {
    int rows, cols, count; // of the weights; matrices
};

// One shape and type; every number of rows against the first rows of MOST.
static void check_case(const Case &c, DType type) {
    CudaState *s = (CudaState *)calloc(1, sizeof *s);
    Error err = {""};
    size_t n_weights = (size_t)c.rows * c.cols * c.count, n_in = (size_t)MOST * c.cols,
           n_out = (size_t)MOST * c.rows * c.count;
    std::vector<uint16_t> w(n_weights), in(n_in);
    std::vector<float> whole(n_out), some(n_out), start(n_out);
    for (size_t i = 0; i < n_weights; i++) w[i] = in_16_bits(number((unsigned)i, 1), type);
    for (size_t i = 0; i < n_in; i++) in[i] = in_16_bits(number((unsigned)i, 2), type);
    for (size_t i = 0; i < n_out; i++) start[i] = number((unsigned)i, 3) / 3;
    void *w_device, *in_device;
    float *out_device;
    CHECK_CUDA(cudaStreamCreate(&s->stream));
    CHECK_CUDA(cudaMalloc(&s->blas_workspace, BLAS_WORKSPACE_BYTES));
    CHECK_CUDA(cudaMalloc(&w_device, n_weights * 2));
    CHECK_CUDA(cudaMalloc(&in_device, n_in * 2));
    CHECK_CUDA(cudaMalloc((void **)&out_device, n_out * 4));
    if (cublasCreate(&s->blas) != CUBLAS_STATUS_SUCCESS) test_fail("no cuBLAS");
    cublasSetStream(s->blas, s->stream);
    CHECK_CUDA(cudaMemcpy(w_device, w.data(), n_weights * 2, cudaMemcpyHostToDevice));
    CHECK_CUDA(cudaMemcpy(in_device, in.data(), n_in * 2, cudaMemcpyHostToDevice));
    s->type = type;
    s->element = 2;
    s->pdl = s->one_order = true;
    s->xb = in_device;
    s->gate_up = out_device;
    Matrix matrix = {};
    matrix.data = w_device;
    matrix.dtype = type;
    matrix.rows = c.rows;
    matrix.cols = c.cols;
    LayerWeights layer = {};
    layer.w1 = layer.w3 = matrix;
    layer.w3.data = (char *)w_device + (size_t)c.rows * c.cols * 2;
    static const int sizes[] = {MOST, 1,  2,  7,   8,   9,   15,  16,  17,  31,  32, 33,
                                63,   64, 65, 100, 127, 128, 129, 256, 300, 511, 512};
    for (int T : sizes) {
        size_t bytes = (size_t)T * c.rows * c.count * 4;
        std::vector<float> &to = T == MOST ? whole : some;
        // what the product is added to, where it is; else numbers that must not be read
        if (c.count == 1)
            CHECK_CUDA(cudaMemcpy(out_device, start.data(), bytes, cudaMemcpyHostToDevice));
        else
            CHECK_CUDA(cudaMemset(out_device, 0xff, bytes));
        if (!(c.count == 1 ? matmul(s, out_device, &matrix, in_device, T, 1, &err)
                           : matmul_gate_up(s, &layer, T, &err)))
            test_fail("%s", err.text);
        CHECK_CUDA(cudaStreamSynchronize(s->stream));
        CHECK_CUDA(cudaMemcpy(to.data(), out_device, bytes, cudaMemcpyDeviceToHost));
        size_t differ = 0;
        for (int m = 0; m < c.count; m++)
            for (int t = 0; t < T; t++)
                differ += memcmp(&to[((size_t)m * T + t) * c.rows], &whole[((size_t)m * MOST + t) * c.rows],
                                 (size_t)c.rows * 4) != 0;
        if (differ) test_fail("%d x %d, %d rows: %zu rows have other bits", c.rows, c.cols, T, differ);
    }
    double worst = 0;
    for (int t = 0; t < MOST; t += 61)
        for (int r = 0; r < c.rows; r += 17) {
            double sum = c.count == 1 ? (double)start[(size_t)t * c.rows + r] : 0, size = 0;
            for (int k = 0; k < c.cols; k++) {
                double x = (double)number((unsigned)((size_t)r * c.cols + k), 1) *
                           (double)number((unsigned)((size_t)t * c.cols + k), 2);
                sum += x;
                size += fabs(x);
            }
            double off = fabs((double)whole[(size_t)t * c.rows + r] - sum) / size;
            if (!(off <= worst)) worst = off;
        }
    // tensor cores truncate as they add steps of 16: each at most 2^-22 of the sum of sizes
    double bound = (c.cols / 16 + 2) * 0x1p-22;
    if (!(worst <= bound))
        test_fail("%d x %d: off by %.3g of the sum of sizes, bound %.3g", c.rows, c.cols, worst, bound);
    cublasDestroy(s->blas);
    cudaFree(w_device);
    cudaFree(in_device);
    cudaFree(out_device);
    cudaFree(s->blas_workspace);
    cudaStreamDestroy(s->stream);
    free(s);
}

int main(void) {
    static const Case cases[] = {{4096, 4096, 1}, {4096, 14336, 1}, {2048, 8192, 1}, {1024, 512, 1},
                                 {6144, 4096, 1}, {288, 768, 1},    {200, 328, 1},   {64, 64, 1},
                                 {72, 1000, 1},   {14336, 4096, 2}, {768, 288, 2},   {8192, 2048, 2}};
    int n = 0;
    if (cudaGetDeviceCount(&n) != cudaSuccess || n == 0) skip_reason = "no GPU";
    for (DType type : {DTYPE_BF16, DTYPE_F16}) {
        char name[80];
        snprintf(name, sizeof name, "test_products_same_bits_in_any_number_of_rows_%s",
                 type == DTYPE_BF16 ? "bf16" : "f16");
        if (!test_wanted(name)) continue;
        if (skip_reason) {
            test_skip(name, skip_reason);
            continue;
        }
        for (const Case &c : cases) check_case(c, type);
        test_end(name);
    }
    return tests_summary();
}
