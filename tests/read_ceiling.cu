// read_ceiling.cu: how fast this GPU reads device memory when it does nothing else. Prints GB/s, and on which path.
// Every SM streams its share of 8 GB through a ring in shared memory (bulk copies; 16-byte loads before Hopper).
#include <algorithm>
#include <stdio.h>
#include <stdint.h>
#include <stdlib.h>
#include <vector>
#include <cuda_runtime.h>

#define CUDA(call)                                                                                                            \
    do {                                                                                                                      \
        cudaError_t e = (call);                                                                                               \
        if (e != cudaSuccess) { fprintf(stderr, "%s:%d %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(e)); exit(1); } \
    } while (0)

constexpr int CHUNK = 32768, STAGES = 6;

// Computes: nothing; reads n_chunks chunks of 32 KB. Grid: one block of 32 threads per SM; block b takes chunks b, b + grid, ..
__global__ void read_kernel(const char *data, long long n_chunks, unsigned *sink) {
#if __CUDA_ARCH__ >= 900
    extern __shared__ __align__(128) char ring[];
    __shared__ uint64_t full[STAGES];
    if (threadIdx.x) return;
    uint32_t base = (uint32_t)__cvta_generic_to_shared(ring), barrier = (uint32_t)__cvta_generic_to_shared(full);
    for (int i = 0; i < STAGES; i++) asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier + 8 * i) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    auto load = [&](long long chunk, int s) {
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier + 8 * s), "r"(CHUNK) : "memory");
        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                     ::"r"(base + s * CHUNK), "l"(data + chunk * CHUNK), "r"(CHUNK), "r"(barrier + 8 * s) : "memory");
    };
    long long next = blockIdx.x;
    for (int s = 0; s < STAGES && next < n_chunks; s++, next += gridDim.x) load(next, s);
    int i = 0;
    for (long long chunk = blockIdx.x; chunk < n_chunks; chunk += gridDim.x, i++) {
        int s = i % STAGES, parity = i / STAGES & 1;
        asm volatile("{\n.reg .pred d;\nw: mbarrier.try_wait.parity.shared::cta.b64 d, [%0], %1;\n@!d bra w;\n}" ::"r"(barrier + 8 * s), "r"(parity) : "memory");
        if (next < n_chunks) { load(next, s); next += gridDim.x; }
    }
#else
    unsigned sum = 0;
    for (long long i = (blockIdx.x * (long long)blockDim.x + threadIdx.x) * 16; i < n_chunks * CHUNK; i += (long long)gridDim.x * blockDim.x * 16) {
        uint4 x = *(const uint4 *)(data + i);
        sum += x.x ^ x.y ^ x.z ^ x.w;
    }
    if (sum == 12345) *sink = sum;
#endif
}

int main(void) {
    long long bytes = 8ll << 30, n_chunks = bytes / CHUNK;
    char *data;
    int sms, major, id;
    CUDA(cudaGetDevice(&id));
    CUDA(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, id));
    CUDA(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, id));
    CUDA(cudaMalloc(&data, bytes));
    CUDA(cudaMemset(data, 1, bytes));
    cudaFuncAttributes f;
    CUDA(cudaFuncGetAttributes(&f, read_kernel));
    bool bulk = major >= 9 && f.ptxVersion >= 90;
    if (bulk) CUDA(cudaFuncSetAttribute(read_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, CHUNK * STAGES));
    cudaEvent_t begin, end;
    CUDA(cudaEventCreate(&begin));
    CUDA(cudaEventCreate(&end));
    std::vector<float> times;
    for (int i = 0; i < 13; i++) {
        CUDA(cudaEventRecord(begin));
        if (bulk) read_kernel<<<sms, 32, CHUNK * STAGES>>>(data, n_chunks, (unsigned *)data);
        else read_kernel<<<sms * 8, 256>>>(data, n_chunks, (unsigned *)data);
        CUDA(cudaGetLastError());
        CUDA(cudaEventRecord(end));
        CUDA(cudaEventSynchronize(end));
        float ms;
        CUDA(cudaEventElapsedTime(&ms, begin, end));
        if (i > 2) times.push_back(ms);
    }
    std::sort(times.begin(), times.end());
    printf("%.0f GB/s (%s)\n", bytes / times[times.size() / 2] / 1e6, bulk ? "bulk copies, 32 KB x 6 per SM" : "16-byte loads");
    return 0;
}
