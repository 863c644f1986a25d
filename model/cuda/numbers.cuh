// Number types of the kernels: conversions, and sums over a warp and a block.
#pragma once

#include <stdint.h>
#include <type_traits>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

typedef __nv_bfloat16 bf16;
typedef __half f16;

__device__ __forceinline__ float to_float(float x) {
    return x;
}
__device__ __forceinline__ float to_float(f16 x) {
    return __half2float(x);
}
__device__ __forceinline__ float to_float(bf16 x) {
    return __bfloat162float(x);
}

// Rounded to nearest, ties to even.
template <typename T> __device__ __forceinline__ T from_float(float x) {
    if constexpr (std::is_same<T, float>::value)
        return x;
    else if constexpr (std::is_same<T, bf16>::value)
        return __float2bfloat16_rn(x);
    else
        return __float2half_rn(x);
}

// Four elements at once, rounded; p aligned to their size.
__device__ __forceinline__ void store4(float *p, float4 v) {
    *(float4 *)p = v;
}
template <typename T> __device__ __forceinline__ void store4(T *p, float4 v) {
    union {
        T each[4];
        uint2 all;
    } packed = {{from_float<T>(v.x), from_float<T>(v.y), from_float<T>(v.z), from_float<T>(v.w)}};
    *(uint2 *)p = packed.all;
}

// Two float32 in one word of two 16-bit numbers, the first in the lower half, and back.
template <typename T> __device__ __forceinline__ uint32_t pack2(float lo, float hi) {
    uint32_t r;
    if constexpr (std::is_same<T, bf16>::value)
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
    else
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
    return r;
}
template <typename T> __device__ __forceinline__ float2 unpack2(uint32_t r) {
    if constexpr (std::is_same<T, bf16>::value)
        return make_float2(__uint_as_float(r << 16), __uint_as_float(r & 0xffff0000u));
    else
        return __half22float2(*(const __half2 *)&r);
}
// What rounding x, y to T lost, itself rounded to T: x ~ hi + lo to 16 bits (bf16) or 22 (f16).
template <typename T> __device__ __forceinline__ uint32_t pack2_rest(float x, float y, uint32_t hi) {
    float2 h = unpack2<T>(hi);
    return pack2<T>(x - h.x, y - h.y);
}

// Eight elements at once, rounded; p aligned to their size.
__device__ __forceinline__ void store8(float *p, float4 lo, float4 hi) {
    *(float4 *)p = lo;
    *(float4 *)(p + 4) = hi;
}
template <typename T> __device__ __forceinline__ void store8(T *p, float4 lo, float4 hi) {
    *(uint4 *)p = make_uint4(pack2<T>(lo.x, lo.y), pack2<T>(lo.z, lo.w), pack2<T>(hi.x, hi.y), pack2<T>(hi.z, hi.w));
}

// 2^x; 2^-inf = 0. Results below 2^-126 are flushed to zero, which no softmax weight can notice.
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// The sum over a warp, in a fixed order, for every lane.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
    return x;
}

// The largest over a block of whole warps, for every thread; NaN counts as less than any number.
__device__ inline float block_max(float x) {
    __shared__ float parts[32];
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
    __syncthreads();
    x = parts[0];
    for (unsigned i = 1; i < blockDim.x / 32; i++) x = fmaxf(x, parts[i]);
    return x;
}

// The sum over a block of whole warps, in a fixed order, for every thread.
__device__ inline float block_sum(float x) {
    __shared__ float parts[33];
    x = warp_sum(x);
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
