// How the codes of quantised weights (packed.h) are widened in registers to bf16, exactly, two neighbouring columns at
// a time, the lower one in the lower half. For packed_product_kernel.cuh alone.
//
//   RUN_WORDS   words of 8 neighbouring columns, a run
//   quad        of 4 neighbouring columns, columns 0 and 1, 2 and 3: they are in the word RUN_WORDS * t / 4 of their
//               run, shifted by quad_shift(t), if t is odd for columns 4 to 7 of the run; times 1 / QUAD_FACTOR
//   pair        of a run, columns 2t and 2t + 1, from the word RUN_WORDS * t / 4
//
// A byte u in the lower half of a bf16 is u × 2^-133: as a subnormal number, or with its highest bit as the exponent of
// the smallest normal one, without a gap between them. One fma makes of it (u - offset) / 64, which is exact: 2^127 is
// the largest power of two that it can be multiplied by. (So is what comes of it, times a scale,
// of weights of 2^-120 and more.)
#pragma once

#include "numbers.cuh"
#include "ptx.cuh"

__device__ __forceinline__ uint32_t subtract2(uint32_t a, uint32_t b) {
    __nv_bfloat162 x = __hsub2(*(__nv_bfloat162 *)&a, *(__nv_bfloat162 *)&b);
    return *(uint32_t *)&x;
}
// Each rounded once, to nearest.
__device__ __forceinline__ uint32_t multiply2(uint32_t a, uint32_t b) {
    __nv_bfloat162 x = __hmul2(*(__nv_bfloat162 *)&a, *(__nv_bfloat162 *)&b);
    return *(uint32_t *)&x;
}
__device__ __forceinline__ uint32_t multiply_add2(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t x;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(x) : "r"(a), "r"(b), "r"(c));
    return x;
}

struct CodesFp8 {
    static constexpr int BITS = 8, RUN_WORDS = 2, QUAD_FACTOR = 1;
    // Exponent and mantissa of e4m3 in bf16's places (packed_fp8): the value, subnormal or not, times 2^-120.
    static __device__ __forceinline__ uint32_t times_2_120(uint32_t v) {
        return multiply2(v, 0x7b807b80u);
    }
    static __device__ __forceinline__ int quad_shift(int) {
        return 0;
    }
    static __device__ __forceinline__ void quad(uint32_t codes, uint32_t &low, uint32_t &high) {
        low = times_2_120(codes & 0x87f087f0u);
        high = times_2_120((codes << 4 & 0x80f080f0u) | (codes >> 4 & 0x07000700u));
    }
    // Without a branch: the lower two of four columns where t is even, the upper ones where it is odd.
    static __device__ __forceinline__ uint32_t pair(uint32_t codes, int t) {
        const uint32_t shift = t % 2 * 4, left = t % 2 ? 0x80f080f0u : 0x87f087f0u, right = t % 2 ? 0x07000700u : 0;
        return times_2_120((codes << shift & left) | (codes >> shift & right));
    }
};

struct CodesInt8 {
    static constexpr int BITS = 8, RUN_WORDS = 2, QUAD_FACTOR = 64;
    static __device__ __forceinline__ int quad_shift(int) {
        return 0;
    }
    // 128 + the code, times 2^-6, less 2.
    static __device__ __forceinline__ uint32_t widen2(uint32_t low) {
        return multiply_add2(and_xor<0x00ff00ffu, 0x00800080u>(low), 0x7f007f00u, 0xc000c000u);
    }
    static __device__ __forceinline__ void quad(uint32_t codes, uint32_t &low, uint32_t &high) {
        low = widen2(codes), high = widen2(codes >> 8);
    }
    // 128 + the lower seven bits, less 128, or 256 for a negative one: both are bf16 numbers with seven bits of
    // mantissa.
    static __device__ __forceinline__ uint32_t pair(uint32_t codes, int t) {
        const uint32_t low = codes >> t % 2 * 8;
        return subtract2(and_or<0x007f007fu, 0x43004300u>(low), and_or<0x00800080u, 0x43004300u>(low));
    }
};

struct CodesInt4 {
    static constexpr int BITS = 4, RUN_WORDS = 1, QUAD_FACTOR = 64;
    static __device__ __forceinline__ int quad_shift(int t) {
        return t % 2 * 8;
    }
    // The code and 8, or 16 times as much, times 2^-6, less 8 × 2^-6.
    static __device__ __forceinline__ void quad(uint32_t codes, uint32_t &low, uint32_t &high) {
        low = multiply_add2(codes & 0x000f000fu, 0x7f007f00u, 0xbe00be00u);
        high = multiply_add2(codes & 0x00f000f0u, 0x7d007d00u, 0xbe00be00u);
    }
    // 128 + the code, less 136.
    static __device__ __forceinline__ uint32_t pair(uint32_t codes, int t) {
        return subtract2(and_or<0x000f000fu, 0x43004300u>(codes >> 4 * t), 0x43084308u);
    }
};
