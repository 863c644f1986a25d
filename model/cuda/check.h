// Checked CUDA calls, and launches that may overlap the kernel before them.
#ifndef CHECK_CUDA_H
#define CHECK_CUDA_H

#include <cublas_v2.h>
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

// Launches a kernel on a grid and blocks of one dimension. pdl: with programmatic dependent launch, so that it may
// start while the kernel before it in the stream still runs; such a kernel calls wait_for_previous_kernel (ptx.cuh)
// before it reads what others write, and before it writes.
template <typename... P, typename... A>
inline cudaError_t launch_kernel(void (*kernel)(P...), unsigned blocks, unsigned threads, size_t shared, bool pdl,
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
    config.numAttrs = pdl ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, args...);
}

#endif
