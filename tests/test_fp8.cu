// FP8 products (--precision fp8): codes of activations are those that the definition gives, to the bit; a product is
// that of the codes to what 14 bits of a sum may be off, promoted to float32 all along; a row has the same bits in any
// number of rows, and in any part of a matrix.
#include <float.h>
#include <math.h>
#include <string.h>

#include <algorithm>
#include <vector>

#include "../model/cuda/gemm.h"
#include "../model/cuda/ops.h"
#include "../model/cuda/widen.h"
extern "C" {
#include "../model/quant.h"
}
#include "check.h"

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
static float of_bf16(uint16_t bits) {
    const uint32_t word = (uint32_t)bits << 16;
    float x;
    memcpy(&x, &word, sizeof x);
    return x;
}
static uint16_t to_bf16(float x) { // cut off
    uint32_t word;
    memcpy(&word, &x, sizeof word);
    return (uint16_t)(word >> 16);
}
static float uniform(unsigned i) { // in [-1, 1)
    return (float)(int)(hash(i) >> 8) * 0x1p-23f - 1;
}

// ---- the engine's state, as far as products need it -----------------------------------------------------------------

enum { MOST = 512, MOST_COLS = 20480 }; // rows and columns of activations, at most

static CudaState *open_state(void) {
    CudaState *s = (CudaState *)calloc(1, sizeof *s);
    Error err = {""};
    CHECK_CUDA(cudaStreamCreate(&s->stream));
    CHECK_CUDA(cudaMalloc(&s->blas_workspace, BLAS_WORKSPACE_BYTES));
    CHECK_CUDA(cudaMalloc((void **)&s->codes, (size_t)MOST * MOST_COLS));
    CHECK_CUDA(cudaMalloc((void **)&s->code_scales, MOST * sizeof(float)));
    s->type = DTYPE_BF16;
    s->element = 2;
    s->pdl = s->fp8 = true;
    if (cublasCreate(&s->blas) != CUBLAS_STATUS_SUCCESS) test_fail("no cuBLAS");
    cublasSetStream(s->blas, s->stream);
    if (!choose_fp8_kernels(s, 14336, 4096, &err)) test_fail("%s", err.text);
    return s;
}

static void close_state(CudaState *s) {
    cublasDestroy(s->blas);
    cudaFree(s->blas_workspace);
    cudaFree(s->codes);
    cudaFree(s->code_scales);
    cudaStreamDestroy(s->stream);
    free(s);
}

template <class T> static T *on_device(const std::vector<T> &host) {
    T *device = NULL;
    CHECK_CUDA(cudaMalloc((void **)&device, host.size() * sizeof(T)));
    CHECK_CUDA(cudaMemcpy(device, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
    return device;
}
template <class T> static std::vector<T> to_host(const T *device, size_t n) {
    std::vector<T> host(n);
    CHECK_CUDA(cudaDeviceSynchronize());
    CHECK_CUDA(cudaMemcpy(host.data(), device, n * sizeof(T), cudaMemcpyDeviceToHost));
    return host;
}

// ---- codes ----------------------------------------------------------------------------------------------------------

// The nearest of all codes, of two the even one.
static uint8_t nearest_code(float x) {
    const double size = fabs((double)x);
    const uint8_t sign = signbit(x) ? 0x80 : 0;
    if (isnan(x)) return 0x7f;
    if (size >= 448) return sign | 0x7e;
    uint8_t below = 0x7d;
    while ((double)quant_fp8_value(below) > size) below--;
    const double from_below = size - (double)quant_fp8_value(below),
                 to_above = (double)quant_fp8_value(below + 1) - size;
    const bool up = from_below > to_above || (from_below == to_above && below % 2);
    return sign | (uint8_t)(below + up);
}

// A row as the definition has it: largest magnitude / 448, or 1; the code nearest to the quotient in float32.
static float encode_on_host(const uint16_t *row, int cols, uint8_t *codes) {
    float most = 0;
    for (int i = 0; i < cols; i++) most = fmaxf(most, fabsf(of_bf16(row[i]))); // NaN is none
    float scale = fminf(most, FLT_MAX) / 448;
    if (!(scale > 0)) scale = 1;
    for (int i = 0; i < cols; i++) codes[i] = nearest_code(of_bf16(row[i]) / scale);
    return scale;
}

static bool same_code(uint8_t a, uint8_t b) {
    return a == b || ((a & 0x7f) == 0x7f && (b & 0x7f) == 0x7f); // NaN has no sign here
}

enum { KINDS_OF_ROWS = 12 };
static uint16_t number_of_kind(int kind, int cols, int i) {
    const unsigned h = hash((unsigned)(kind * 65536 + i));
    switch (kind) {
    case 0:
        return h % 2 ? 0x8000 : 0; // zeros of both signs
    case 1:
        return to_bf16(uniform(h)); // uniform
    case 2:
        return to_bf16(uniform(h) * ldexpf(1, (int)(h % 40) - 20)); // of many sizes
    case 3:
        return (uint16_t)(h % 3 + (h & 0x8000)); // the smallest that there are
    case 4:
        return (uint16_t)(h % 0x80 + (h & 0x8000)); // subnormal
    case 5:
        return (h & 0x7f80) == 0x7f80 ? 0x7f7f : (uint16_t)h; // any finite number
    case 6:
        return i == cols / 3 ? 0x7f80 : to_bf16(uniform(h)); // an infinity
    case 7:
        return i == cols - 1 ? 0xff80 : (h & 0x7f80) == 0x7f80 ? 0 : (uint16_t)h; // the other, beside huge numbers
    case 8:
        return i == 5 ? 0x7fc0 : to_bf16(uniform(h)); // NaN
    case 9:
        return 0x7fc0; // nothing else
    case 10:
        return to_bf16(i == 0 ? -448.0f : (float)(int)(h % 897) - 448.0f); // scale 1, ties among them
    default:
        return i == cols - 2 ? to_bf16(-1e-30f) : 0; // one number
    }
}

static void test_codes_of_activations(void) {
    CudaState *s = open_state();
    Error err = {""};
    for (int cols : {16, 288, 4096, 14336, 16400, (int)MOST_COLS}) { // the last two do not fit in registers
        std::vector<uint16_t> x((size_t)KINDS_OF_ROWS * cols);
        std::vector<uint8_t> right(x.size());
        for (int r = 0; r < KINDS_OF_ROWS; r++)
            for (int i = 0; i < cols; i++) x[(size_t)r * cols + i] = number_of_kind(r, cols, i);
        uint16_t *device = on_device(x);
        if (!encode_rows(s, device, KINDS_OF_ROWS, cols, &err)) test_fail("%s", err.text);
        std::vector<uint8_t> codes = to_host(s->codes, x.size());
        std::vector<float> scales = to_host(s->code_scales, KINDS_OF_ROWS);
        for (int r = 0; r < KINDS_OF_ROWS; r++) {
            const float scale = encode_on_host(&x[(size_t)r * cols], cols, &right[(size_t)r * cols]);
            if (memcmp(&scale, &scales[r], sizeof scale) != 0)
                test_fail("%d columns, kind %d: scale %.9g, expected %.9g", cols, r, (double)scales[r], (double)scale);
            for (int i = 0; i < cols; i++) {
                const size_t at = (size_t)r * cols + i;
                if (!same_code(codes[at], right[at]))
                    test_fail("%d columns, kind %d, column %d: %.9g has code %02x, expected %02x", cols, r, i,
                              (double)of_bf16(x[at]), codes[at], right[at]);
            }
        }
        cudaFree(device);
    }
    close_state(s);
    test_end("test_codes_of_activations");
}

// What norms and SwiGLU write as codes is what they write in bf16, as codes.
static void test_codes_of_norms_and_swiglu(void) {
    CudaState *s = open_state();
    Error err = {""};
    for (int cols : {16, 288, 4096, 14336, (int)MOST_COLS}) {
        enum { ROWS = 37 };
        std::vector<float> both((size_t)2 * ROWS * cols), weight(cols);
        for (size_t i = 0; i < both.size(); i++)
            both[i] = uniform((unsigned)i) * ldexpf(1, (int)(hash((unsigned)i) % 9));
        for (int i = 0; i < cols; i++) weight[i] = uniform((unsigned)i + 77);
        for (int i = 0; i < cols; i++) both[i] = both[(size_t)ROWS * cols + i] = 0; // a row of zeros
        const size_t n = (size_t)ROWS * cols;
        std::vector<uint16_t> gate_up(both.size());
        for (size_t i = 0; i < both.size(); i++) gate_up[i] = to_bf16(both[i]);
        float *device = on_device(both), *weight_device = on_device(weight);
        uint16_t *gate_up_device = on_device(gate_up);
        void *bf16_rows;
        CHECK_CUDA(cudaMalloc(&bf16_rows, n * 2));
        s->x_all = device;
        s->gate_up = (float *)gate_up_device;
        s->xb = s->h = bf16_rows;
        LayerWeights layer = {};
        layer.w1.rows = layer.w3.rows = cols;
        for (bool norm : {true, false}) {
            if (!(norm ? rmsnorm_codes(s, weight_device, 1e-5f, ROWS, cols, &err)
                       : swiglu_codes(s, &layer, ROWS, &err)))
                test_fail("%s", err.text);
            std::vector<uint8_t> codes = to_host(s->codes, n);
            std::vector<float> scales = to_host(s->code_scales, ROWS);
            CHECK_CUDA(cudaMemset(s->codes, 0xff, n));
            if (!(norm ? rmsnorm(s, weight_device, 1e-5f, ROWS, cols, &err) : swiglu_16(s, &layer, ROWS, &err)) ||
                !encode_rows(s, bf16_rows, ROWS, cols, &err))
                test_fail("%s", err.text);
            std::vector<uint8_t> right = to_host(s->codes, n);
            std::vector<float> right_scales = to_host(s->code_scales, ROWS);
            CHECK(scales[0] == 1 && codes[0] % 0x80 == 0 && scales[1] > 0 && scales[1] != 1);
            if (scales != right_scales || codes != right)
                test_fail("%d columns, %s: other codes than of the same in bf16", cols, norm ? "norm" : "swiglu");
        }
        cudaFree(device);
        cudaFree(gate_up_device);
        cudaFree(weight_device);
        cudaFree(bf16_rows);
    }
    close_state(s);
    test_end("test_codes_of_norms_and_swiglu");
}

// ---- products -------------------------------------------------------------------------------------------------------

static uint8_t weight_code(unsigned i) {
    const unsigned h = hash(i ^ 0xc0de5u);
    return (uint8_t)(h % 128 == 127 ? h % 256 - 1 : h % 256); // not NaN
}
static float weight_scale(unsigned row) {
    return uniform(row + 4711) / 448;
}

// A packed FP8 matrix on the device, and slabs of so many bytes that it is unpacked into. code(i): of element i.
struct Weights8 {
    Matrix m;
    uint16_t *rows;
    float *scales;
};
template <class Code> static Weights8 open_weights(CudaState *s, int rows, int cols, size_t slab, Code code) {
    Weights8 w = {};
    Error err = {""};
    w.m.dtype = DTYPE_F8_E4M3;
    w.m.group = WHOLE_ROW;
    w.m.scale_dtype = DTYPE_F32;
    w.m.rows = w.m.all_rows = rows;
    w.m.cols = cols;
    const Packing p = matrix_packing(&w.m);
    std::vector<uint16_t> packed((size_t)rows * p.row_bytes / 2);
    std::vector<float> scales(rows);
    for (int r = 0; r < rows; r++) {
        for (int c = 0; c < p.blocks * PACK_COLUMNS; c += PACK_COLUMNS)
            for (int place = 0; place < PACK_COLUMNS; place += 2) { // two places, braided
                unsigned both[2];
                for (int k = 0; k < 2; k++) {
                    const int col = c + packed_column(8, place + k);
                    both[k] = col < cols ? code((unsigned)((size_t)r * cols + col)) : 0;
                }
                packed[((size_t)r * p.row_bytes + c / PACK_COLUMNS * p.block_bytes + place) / 2] =
                    (uint16_t)packed_fp8(both[0], both[1]);
            }
        scales[r] = weight_scale((unsigned)r);
    }
    w.m.data = w.rows = on_device(packed);
    w.m.scale = w.scales = on_device(scales);
    s->widening = {};
    s->widening.slab_bytes = slab;
    CHECK_CUDA(cudaMalloc((void **)&s->widening.slabs, 2 * slab));
    if (!widen_open(s, &err)) test_fail("%s", err.text);
    return w;
}
static void close_weights(CudaState *s, Weights8 *w) {
    widen_close(s);
    cudaFree(s->widening.slabs);
    cudaFree(w->rows);
    cudaFree(w->scales);
}

static double value_of(uint8_t code) {
    static double values[256];
    for (int i = 0; values[0xff] == 0 && i < 256; i++)
        values[i] = (double)quant_fp8_value((uint8_t)i); // the last is NaN
    return values[code];
}

struct Shape {
    int rows, cols;
};

// One shape: what products of MOST rows are off, and that those of fewer rows have the same bits, added to what is
// there or not, in one slab or many.
static void check_product(const Shape &c, bool every_size, double *worst, double *rms) {
    CudaState *s = open_state();
    Error err = {""};
    const size_t n_in = (size_t)MOST * c.cols, n_out = (size_t)MOST * c.rows;
    std::vector<uint16_t> in(n_in);
    for (size_t i = 0; i < n_in; i++)
        in[i] = i / c.cols == 3 ? 0 : to_bf16(uniform((unsigned)i + 99) * (float)(1 + i / c.cols % 7));
    std::vector<float> start(n_out);
    for (size_t i = 0; i < n_out; i++) start[i] = uniform((unsigned)i + 5) * 100;
    uint16_t *in_device = on_device(in);
    float *start_device = on_device(start), *out = on_device(start);
    const size_t whole_slab = ((size_t)c.rows + SLAB_ROWS) * c.cols, least_slab = (size_t)SLAB_ROWS * c.cols;
    std::vector<float> whole[2], some; // by what is in front: nothing, start
    std::vector<uint8_t> codes;
    std::vector<float> scales;
    for (size_t slab : {whole_slab, least_slab}) {
        Weights8 w = open_weights(s, c.rows, c.cols, slab, weight_code);
        for (int T = MOST; T > 0; T = T > 300 ? 300 : every_size || T <= 4 ? T - 1 : T - T / 4) {
            if (!encode_rows(s, in_device, T, c.cols, &err)) test_fail("%s", err.text);
            if (T == MOST) codes = to_host(s->codes, n_in), scales = to_host(s->code_scales, MOST);
            const size_t n = (size_t)T * c.rows;
            for (int adds = 0; adds < 2; adds++) {
                if (adds)
                    CHECK_CUDA(cudaMemcpy(out, start_device, n * 4, cudaMemcpyDeviceToDevice));
                else
                    CHECK_CUDA(cudaMemset(out, 0xff, n * 4)); // NaN, which must not be read
                CHECK_CUDA(cudaDeviceSynchronize());
                if (!widen_begin(s, &err) || !matmul_codes(s, out, &w.m, T, (float)adds, &err)) {
                    test_fail("%d x %d, %d rows: %s", c.rows, c.cols, T, err.text);
                    return;
                }
                some = to_host(out, n);
                if (T == MOST && slab == whole_slab)
                    whole[adds] = some;
                else if (memcmp(some.data(), whole[adds].data(), n * 4) != 0)
                    test_fail("%d x %d, %d rows, slabs of %zu bytes%s: other bits than among %d rows", c.rows, c.cols,
                              T, slab, adds ? ", added" : "", MOST);
            }
        }
        close_weights(s, &w);
    }
    // Tensor cores cut what they add, and the sum so far, after 14 bits of the largest of them: 32 products at a time.
    // So in each 128 columns no more than 132 numbers by 2^-13 of that. Then float32: a sum of blocks, two scales,
    // one addition.
    double errors = 0, sizes = 0;
    for (int r = 0; r < c.rows; r += c.rows / 64 + 1)
        for (int t = 3; t < MOST; t += 7) {
            const size_t at = (size_t)t * c.rows + r;
            double sum = 0, size = 0, bound = 0;
            for (int k = 0; k < c.cols; k += 128) {
                double block = 0, most = 0;
                for (int i = k; i < c.cols && i < k + 128; i++) {
                    const double x = value_of(weight_code((unsigned)((size_t)r * c.cols + i))) *
                                     value_of(codes[(size_t)t * c.cols + i]);
                    block += x;
                    size += fabs(x);
                    most = fmax(most, fmax(fabs(x), fabs(block)));
                }
                sum += block;
                bound += 132 * 0x1p-13 * most;
            }
            const double by = (double)weight_scale((unsigned)r) * (double)scales[t];
            bound = (bound + size * (c.cols / 128 + 4) * 0x1p-24) * fabs(by);
            const double off = (double)whole[0][at] - sum * by,
                         off_added = (double)whole[1][at] - (sum * by + (double)start[at]);
            const double bound_added = bound + fabs(sum * by + (double)start[at]) * 0x1p-24;
            errors += off * off;
            sizes += sum * by * sum * by;
            if (t == 3 ? whole[0][at] != 0 || whole[1][at] != start[at]
                       : !(fabs(off) <= bound) || !(fabs(off_added) <= bound_added))
                test_fail("%d x %d: row %d, column %d is %.9g, and %.9g added: off by %.3g and %.3g, bound %.3g",
                          c.rows, c.cols, t, r, (double)whole[0][at], (double)whole[1][at], off, off_added, bound);
            if (bound > 0) *worst = fmax(*worst, fabs(off) / bound);
        }
    *rms = fmax(*rms, sqrt(errors / sizes));
    cudaFree(in_device);
    cudaFree(start_device);
    cudaFree(out);
    close_state(s);
}

static void test_products_of_codes(void) {
    double worst = 0, rms = 0;
    for (const Shape &c : {Shape{288, 768}, Shape{768, 288}, Shape{1040, 1424}, Shape{64, 64}})
        check_product(c, true, &worst, &rms);
    for (const Shape &c : {Shape{6144, 4096}, Shape{2048, 4096}, Shape{4096, 14336}})
        check_product(c, false, &worst, &rms);
    // By 14 bits the root mean square is near 2^-12 of the results'; sums that are not promoted have 2^-9.6 (K 4096).
    if (!(rms <= 0x1p-10)) test_fail("root mean square of the errors: %.3g of the results', bound %.3g", rms, 0x1p-10);
    test_end("test_products_of_codes");
    printf("   largest error: %.3f of its bound; root mean square: %.2e of the results'\n", worst, rms);
}

// Gate and up: what matmul_codes gives but for one rounding to bf16 (and for the order in which another kernel adds), in
// any number of rows the same bits.
static void check_gate_up(int rows, int cols) {
    CudaState *s = open_state();
    Error err = {""};
    const size_t slab = (size_t)SLAB_ROWS * cols, n = (size_t)MOST * rows;
    Weights8 gate = open_weights(s, rows, cols, slab, weight_code);
    std::vector<uint16_t> in((size_t)MOST * cols);
    for (size_t i = 0; i < in.size(); i++) in[i] = to_bf16(uniform((unsigned)i));
    uint16_t *in_device = on_device(in);
    float *whole_device = on_device(std::vector<float>(n));
    LayerWeights layer = {};
    layer.w1 = layer.w3 = gate.m;
    s->gate_up = on_device(std::vector<float>(n)); // two times n numbers of 16 bits
    if (!encode_rows(s, in_device, MOST, cols, &err) || !widen_begin(s, &err) ||
        !matmul_codes(s, whole_device, &gate.m, MOST, 0, &err) || !matmul_gate_up_codes(s, &layer, MOST, &err))
        test_fail("%s", err.text);
    const std::vector<float> whole = to_host(whole_device, n);
    const std::vector<uint16_t> both = to_host((uint16_t *)s->gate_up, 2 * n);
    if (memcmp(both.data(), both.data() + n, n * 2) != 0) test_fail("%d x %d: gate and up differ", rows, cols);
    double sum = 0, other = 0;
    for (size_t i = 0; i < n; i++) {
        const double off = (double)of_bf16(both[i]) - (double)whole[i];
        sum += off * off;
        other += (double)whole[i] * (double)whole[i];
    }
    // Rounding alone: 2^-7 / sqrt(12) of a number's power of two in the root mean square, of evenly spread numbers
    // between it and its double 2^-9.4.
    if (!(sqrt(sum / other) <= 0x1p-9))
        test_fail("%d x %d: off by %.3g of the results'", rows, cols, sqrt(sum / other));
    for (int T : {1, 2, 17, 64, 200, 511}) {
        if (!widen_begin(s, &err) || !matmul_gate_up_codes(s, &layer, T, &err)) test_fail("%s", err.text);
        const std::vector<uint16_t> some = to_host((uint16_t *)s->gate_up, (size_t)T * rows);
        if (memcmp(some.data(), both.data(), some.size() * 2) != 0)
            test_fail("%d x %d: other bits in %d rows than in %d", rows, cols, T, (int)MOST);
    }
    cudaFree(in_device);
    cudaFree(whole_device);
    cudaFree(s->gate_up);
    close_weights(s, &gate);
    close_state(s);
}
static void test_gate_and_up_in_bf16(void) {
    check_gate_up(768, 288);
    check_gate_up(1424, 1040);
    check_gate_up(14336, 4096);
    test_end("test_gate_and_up_in_bf16");
}

// 256 and 4095 times 1/64: what is promoted after 128 columns has lost 127/64 at most, what is not has lost all.
static void test_sums_are_promoted(void) {
    enum { COLS = 4096, ROWS = 64, IN_ROWS = 32 };
    CudaState *s = open_state();
    Error err = {""};
    Weights8 w = open_weights(s, ROWS, COLS, (size_t)SLAB_ROWS * COLS, [](unsigned) { return 0x38; }); // 1
    std::vector<uint8_t> codes((size_t)IN_ROWS * COLS, 0x08);                                          // 1/64
    std::vector<float> ones(ROWS, 1);
    for (int t = 0; t < IN_ROWS; t++) codes[(size_t)t * COLS + (size_t)t * (COLS - 1) / (IN_ROWS - 1)] = 0x78; // 256
    CHECK_CUDA(cudaMemcpy(s->codes, codes.data(), codes.size(), cudaMemcpyHostToDevice));
    CHECK_CUDA(cudaMemcpy(s->code_scales, ones.data(), IN_ROWS * 4, cudaMemcpyHostToDevice));
    CHECK_CUDA(cudaMemcpy(w.scales, ones.data(), ROWS * 4, cudaMemcpyHostToDevice));
    float *out = on_device(std::vector<float>((size_t)IN_ROWS * ROWS));
    if (!widen_begin(s, &err) || !matmul_codes(s, out, &w.m, IN_ROWS, 0, &err)) test_fail("%s", err.text);
    const std::vector<float> sums = to_host(out, (size_t)IN_ROWS * ROWS);
    for (size_t i = 0; i < sums.size(); i++)
        if (!(sums[i] >= 318 && sums[i] <= 320)) test_fail("row %zu: %.9g", i / ROWS, (double)sums[i]);
    LayerWeights layer = {};
    layer.w1 = layer.w3 = w.m;
    s->gate_up = out; // as many numbers, twice, of 16 bits
    if (!widen_begin(s, &err) || !matmul_gate_up_codes(s, &layer, IN_ROWS, &err)) test_fail("%s", err.text);
    for (uint16_t bits : to_host((uint16_t *)out, 2 * sums.size()))
        if (!(of_bf16(bits) >= 318 && of_bf16(bits) <= 320)) test_fail("gate and up: %.9g", (double)of_bf16(bits));
    cudaFree(out);
    close_weights(s, &w);
    close_state(s);
    test_end("test_sums_are_promoted");
    printf("   from %.6f to %.6f, of 319.984375\n", (double)*std::min_element(sums.begin(), sums.end()),
           (double)*std::max_element(sums.begin(), sums.end()));
}

int main(void) {
    static const struct {
        const char *name;
        void (*run)(void);
    } tests[] = {{"test_codes_of_activations", test_codes_of_activations},
                 {"test_codes_of_norms_and_swiglu", test_codes_of_norms_and_swiglu},
                 {"test_gate_and_up_in_bf16", test_gate_and_up_in_bf16},
                 {"test_products_of_codes", test_products_of_codes},
                 {"test_sums_are_promoted", test_sums_are_promoted}};
    const char *skip_reason = NULL;
    int n = 0, major = 0;
    if (cudaGetDeviceCount(&n) != cudaSuccess || n == 0)
        skip_reason = "no GPU";
    else if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0) != cudaSuccess || major != 9 ||
             cublasLtGetVersion() < 120900)
        skip_reason = "needs a Hopper GPU and cuBLASLt 12.9";
    for (const auto &test : tests) {
        if (!test_wanted(test.name)) continue;
        if (skip_reason)
            test_skip(test.name, skip_reason);
        else
            test.run();
    }
    return tests_summary();
}
