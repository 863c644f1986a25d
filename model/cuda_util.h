// What every .cu file of the engines shares: checked calls, conversions, reductions over a block.
#ifndef CUDA_UTIL_H
#define CUDA_UTIL_H

#include <cublas_v2.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// In a function that returns bool and has an Error *err: a failing call ends it with file, line and expression.
#define CUDA_TRY(call) \
    do { \
        cudaError_t status_ = (call); \
        if (status_ != cudaSuccess) \
            return fail(err, "%s:%d: %s: %s", __FILE__, __LINE__, #call, cudaGetErrorString(status_)); \
    } while (0)

#define CUBLAS_TRY(call) \
    do { \
        cublasStatus_t status_ = (call); \
        if (status_ != CUBLAS_STATUS_SUCCESS) \
            return fail(err, "%s:%d: %s: %s", __FILE__, __LINE__, #call, cublasGetStatusString(status_)); \
    } while (0)

__device__ inline float to_float(float x) {
    return x;
}
__device__ inline float to_float(__half x) {
    return __half2float(x);
}
__device__ inline float to_float(__nv_bfloat16 x) {
    return __bfloat162float(x);
}

template <typename T> __device__ inline T from_float(float x);
template <> __device__ inline float from_float<float>(float x) {
    return x;
}
template <> __device__ inline __half from_float<__half>(float x) {
    return __float2half_rn(x);
}
template <> __device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
    return __float2bfloat16_rn(x);
}

// Four elements at once, rounded; p aligned to their size.
__device__ inline void store4(float *p, float4 v) {
    *(float4 *)p = v;
}
template <typename T> __device__ inline void store4(T *p, float4 v) {
    union {
        T each[4];
        uint2 all;
    } packed = {{from_float<T>(v.x), from_float<T>(v.y), from_float<T>(v.z), from_float<T>(v.w)}};
    *(uint2 *)p = packed.all;
}

// Programmatic dependent launch (Hopper and later): a kernel that launch_kernel starts early begins while the one in front
// of it ends, and calls wait_for_previous_kernel before it reads what others wrote, or writes. let_next_kernel_start:
// the one behind may do likewise from here on.
__device__ inline void wait_for_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ inline void let_next_kernel_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
template <typename... P, typename... A>
inline cudaError_t launch_kernel(void (*kernel)(P...), unsigned blocks, unsigned threads, size_t shared, bool early,
                                 cudaStream_t stream, A... args) {
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = early ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, args...);
}

// The sum over a block of whole warps, in a fixed order, for every thread.
__device__ inline float block_sum(float x) {
    __shared__ float parts[33];
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, step);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
    __syncthreads();
    if (threadIdx.x == 0) {
        float sum = 0;
        for (unsigned i = 0; i < blockDim.x / 32; i++) sum += parts[i];
        parts[32] = sum;
    }
    __syncthreads();
    return parts[32];
}

#endif
