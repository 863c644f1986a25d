// The GPU's roofline: how fast it reads and multiplies at most, and a cache filled with random numbers.
#include <stdio.h>

extern "C" {
#include "peak.h"
}
#include "../cuda/numbers.cuh"
#include "../cuda/state.h"

constexpr int CHUNK = 32768, STAGES = 6;
// Before reading counts, a tenth of a second or more: a driver may still be wiping memory that another program gave
// back.
enum { READ_WARM_UPS = 100, PRODUCT_WARM_UPS = 3, SAMPLES = 20, PRODUCT = 8192 };

// Computes: nothing; reads n_chunks chunks of 32 KB, on Hopper and later by bulk copies through a ring in shared
//           memory, which nothing else comes near, elsewhere by 16-byte loads.
// Reads:    data [n_chunks][CHUNK].
// Writes:   sink, if the data happens to sum to a certain number, so that no load can be left out.
// Grid:     one block of 32 threads per SM, block b owns chunks b, b + grid, ..; by loads any × 256.
// Requires: data 16-byte aligned.
__global__ void read_kernel(const char *data, long long n_chunks, unsigned *sink) {
#if __CUDA_ARCH__ >= 900
    (void)sink;
    extern __shared__ __align__(128) char ring[];
    __shared__ uint64_t full[STAGES];
    if (threadIdx.x) return;
    uint32_t base = shared_address(ring), barrier = shared_address(full);
    for (int i = 0; i < STAGES; i++) mbarrier_init(barrier + 8 * i, 1);
    fence_mbarrier_init();
    auto load = [&](long long chunk, int s) {
        mbarrier_arrive_expect_tx(barrier + 8 * s, CHUNK);
        copy_bulk(base + s * CHUNK, data + chunk * CHUNK, CHUNK, barrier + 8 * s);
    };
    long long next = blockIdx.x;
    for (int s = 0; s < STAGES && next < n_chunks; s++, next += gridDim.x) load(next, s);
    int i = 0;
    for (long long chunk = blockIdx.x; chunk < n_chunks; chunk += gridDim.x, i++) {
        int s = i % STAGES;
        mbarrier_wait(barrier + 8 * s, i / STAGES & 1);
        if (next < n_chunks) {
            load(next, s);
            next += gridDim.x;
        }
    }
#else
    unsigned sum = 0;
    for (long long i = (blockIdx.x * (long long)blockDim.x + threadIdx.x) * 16; i < n_chunks * CHUNK;
         i += (long long)gridDim.x * blockDim.x * 16) {
        uint4 x = *(const uint4 *)(data + i);
        sum += x.x ^ x.y ^ x.z ^ x.w;
    }
    if (sum == 12345) *sink = sum;
#endif
}

// Computes: random numbers, uniform in ±1 (lowbias32, Wellons 2018).
// Reads:    nothing.
// Writes:   dst [n].
// Grid:     any × 256, strided.
// Requires: none.
template <typename T> __global__ void random_kernel(T *dst, uint64_t n) {
    for (uint64_t i = (uint64_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (uint64_t)gridDim.x * blockDim.x) {
        uint32_t h = (uint32_t)i * 0x9E3779B1u + (uint32_t)(i >> 32);
        h = (h ^ h >> 16) * 0x21F0AAADu;
        h = (h ^ h >> 15) * 0xD35A2D97u;
        dst[i] = from_float<T>((float)(h >> 8) * 0x1p-23f - 1);
    }
}

template <typename T> static bool fill_random(void *dst, uint64_t n, Error *err) {
    random_kernel<<<4096, 256>>>((T *)dst, n);
    CUDA_TRY(cudaGetLastError());
    CUDA_TRY(cudaDeviceSynchronize());
    return true;
}

// What `launch` does, `work` of it each time, per second, after so many warm-ups.
template <typename Launch> static bool rate_of(Statistic *rate, double work, int warm_ups, Launch launch, Error *err) {
    double samples[SAMPLES];
    cudaEvent_t begin, end;
    CUDA_TRY(cudaEventCreate(&begin));
    CUDA_TRY(cudaEventCreate(&end));
    for (int i = -warm_ups; i < SAMPLES; i++) {
        float ms;
        CUDA_TRY(cudaEventRecord(begin));
        if (!launch()) return false;
        CUDA_TRY(cudaEventRecord(end));
        CUDA_TRY(cudaEventSynchronize(end));
        CUDA_TRY(cudaEventElapsedTime(&ms, begin, end));
        if (i >= 0) samples[i] = work / ms * 1e3;
    }
    *rate = statistic_of(samples, SAMPLES);
    CUDA_TRY(cudaEventDestroy(begin));
    CUDA_TRY(cudaEventDestroy(end));
    return true;
}

static bool rate_of_reading(char *data, uint64_t bytes, Statistic *rate, char *how, size_t how_size, Error *err) {
    long long n_chunks = (long long)(bytes / CHUNK);
    cudaFuncAttributes f;
    int device, sms, major;
    CUDA_TRY(cudaGetDevice(&device));
    CUDA_TRY(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device));
    CUDA_TRY(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    CUDA_TRY(cudaFuncGetAttributes(&f, read_kernel));
    bool bulk = major >= 9 && f.ptxVersion >= 90; // code for an older GPU runs on a newer one, without them
    int blocks = bulk ? sms : 8 * sms, threads = bulk ? 32 : 256, shared = bulk ? CHUNK * STAGES : 0;
    if (bulk) CUDA_TRY(cudaFuncSetAttribute(read_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
    if (!fill_random<__nv_bfloat16>(data, bytes / sizeof(__nv_bfloat16), err)) return false;
    snprintf(how, how_size, bulk ? "bulk copies, %d KB x %d per SM" : "16-byte loads", CHUNK >> 10, STAGES);
    auto read = [&] {
        read_kernel<<<blocks, threads, shared>>>(data, n_chunks, (unsigned *)data);
        CUDA_TRY(cudaGetLastError());
        return true;
    };
    return rate_of(rate, (double)n_chunks * CHUNK, READ_WARM_UPS, read, err);
}

bool read_ceiling_cuda(uint64_t bytes, Statistic *rate, char *how, size_t how_size, Error *err) {
    char *data;
    CUDA_TRY(cudaMalloc(&data, bytes));
    bool ok = rate_of_reading(data, bytes, rate, how, how_size, err);
    cudaFree(data);
    return ok;
}

static bool rate_of_product(cublasHandle_t blas, __nv_bfloat16 *data, Statistic *rate, Error *err) {
    const size_t n = PRODUCT;
    const float one = 1, zero = 0;
    __nv_bfloat16 *a = data, *b = data + n * n, *c = data + 2 * n * n;
    if (!fill_random<__nv_bfloat16>(data, 2 * n * n, err)) return false; // zeros would be faster
    auto product = [&] {
        CUBLAS_TRY(cublasGemmEx(blas, CUBLAS_OP_T, CUBLAS_OP_N, n, n, n, &one, a, CUDA_R_16BF, n, b, CUDA_R_16BF, n,
                                &zero, c, CUDA_R_16BF, n, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
        return true;
    };
    return rate_of(rate, 2.0 * n * n * n, PRODUCT_WARM_UPS, product, err);
}

static bool measure_product(Roofline *r, int *version, Error *err) {
    cublasHandle_t blas;
    __nv_bfloat16 *data = NULL;
    CUBLAS_TRY(cublasCreate(&blas));
    cublasGetVersion(blas, version);
    cudaError_t status = cudaMalloc(&data, (size_t)3 * PRODUCT * PRODUCT * sizeof *data);
    bool ok = status == cudaSuccess || fail(err, "GPU memory for a matrix product: %s", cudaGetErrorString(status));
    ok = ok && rate_of_product(blas, data, &r->product, err);
    cudaFree(data);
    cublasDestroy(blas);
    snprintf(r->product_how, sizeof r->product_how, "cuBLAS, bf16, %d x %d x %d", PRODUCT, PRODUCT, PRODUCT);
    return ok;
}

// The driver's own version where the system says it; else the CUDA version that it supports.
static void driver_version(char *text, size_t size) {
    int driver = 0;
    FILE *in = fopen("/sys/module/nvidia/version", "r");
    bool found = in && fgets(text, (int)size, in);
    if (in) fclose(in);
    text[found ? strcspn(text, "\n") : 0] = 0;
    if (!found && cudaDriverGetVersion(&driver) == cudaSuccess)
        snprintf(text, size, "for CUDA %d.%d", driver / 1000, driver % 1000 / 10);
}

// Copies from the memory of the first GPU to that of the second; nothing where this process sees one alone.
static bool measure_link(Roofline *r, Error *err) {
    const size_t bytes = 256 << 20;
    void *from = NULL, *to = NULL;
    int device, n;
    CUDA_TRY(cudaGetDevice(&device));
    CUDA_TRY(cudaGetDeviceCount(&n));
    if (n < 2) return true;
    const int other = device == 0 ? 1 : 0;
    cudaDeviceEnablePeerAccess(other, 0); // else copies may go by way of the host
    cudaGetLastError();                   // it may be so already
    cudaError_t status = cudaMalloc(&from, bytes);
    if (status == cudaSuccess) status = cudaSetDevice(other);
    if (status == cudaSuccess) status = cudaMalloc(&to, bytes);
    bool ok = cudaSetDevice(device) == cudaSuccess && status == cudaSuccess;
    if (!ok) fail(err, "GPU memory for copies between GPUs: %s", cudaGetErrorString(status));
    ok = ok && rate_of(
                   &r->link, (double)bytes, PRODUCT_WARM_UPS,
                   [&] {
                       CUDA_TRY(cudaMemcpyPeerAsync(to, other, from, device, bytes, NULL));
                       return true;
                   },
                   err);
    cudaFree(from);
    cudaFree(to);
    return ok;
}

static bool measure_cuda(Roofline *r, int gpus, Error *err) {
    const uint64_t most = (uint64_t)8 << 30;
    size_t free_bytes, total;
    int device, runtime, blas = 0;
    char driver[48];
    cudaDeviceProp properties;
    CUDA_TRY(cudaGetDevice(&device));
    CUDA_TRY(cudaGetDeviceProperties(&properties, device));
    CUDA_TRY(cudaRuntimeGetVersion(&runtime));
    CUDA_TRY(cudaMemGetInfo(&free_bytes, &total));
    uint64_t bytes = free_bytes / 2 < most ? free_bytes / 2 / CHUNK * CHUNK : most;
    if (!read_ceiling_cuda(bytes, &r->read, r->read_how, sizeof r->read_how, err)) return false;
    if (!measure_product(r, &blas, err)) return false;
    r->gpus = gpus;
    if (gpus > 1 && !measure_link(r, err)) return false;
    driver_version(driver, sizeof driver);
    r->memory_bytes = total;
    snprintf(r->name, sizeof r->name, "%.100s", properties.name);
    snprintf(r->software, sizeof r->software, "driver %s, CUDA %d.%d, cuBLAS %d.%d.%d", driver, runtime / 1000,
             runtime % 1000 / 10, blas / 10000, blas / 100 % 100, blas % 100);
    return true;
}

static bool fill_cache_cuda(Model *m, Error *err) {
    return for_shards(m, err, [&](Model *m, CudaState *s) {
        uint64_t n = (uint64_t)m->config.n_layers * own_layer_elements(m); // of each
        for (void *cache : {m->kv.k, m->kv.v}) {
            bool ok = with_type(s->type, [&](auto type) { return fill_random<decltype(type)>(cache, n, err); });
            if (!ok) return false;
        }
        return true;
    });
}

extern "C" const Platform platform_cuda = {measure_cuda,
                                           fill_cache_cuda,
                                           {512, 2048, 8192, 32768},
                                           {128, 2048, 8192, 32768, 131072},
                                           {1, 2, 4, 8, 16, 32, 64, 128, 256}};
