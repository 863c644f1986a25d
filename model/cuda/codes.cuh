// How the codes of quantised weights (packed.h) are widened in registers to bf16, exactly, two neighbouring columns at a
// time, the lower one in the lower half. LOADS: of 16 bytes, for what a lane has of a row's chunk; `widen` gives, of its 8
// columns of 32, columns 0 and 1, 2 and 3, 4 and 5, 6 and 7. RUN_WORDS: of 8 neighbouring columns; `pair` gives columns 2t
// and 2t + 1 of them, from their word RUN_WORDS * t / 4.
#pragma once

#include "numbers.cuh"

// (x & mask) | bits, in one instruction.
template <uint32_t MASK, uint32_t BITS> __device__ __forceinline__ uint32_t and_or(uint32_t x) {
    uint32_t y;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(y) : "r"(x), "n"(MASK), "n"(BITS));
    return y;
}
__device__ __forceinline__ uint32_t subtract2(uint32_t a, uint32_t b) {
    __nv_bfloat162 x = __hsub2(*(__nv_bfloat162 *)&a, *(__nv_bfloat162 *)&b);
    return *(uint32_t *)&x;
}
// Each rounded once, to nearest.
__device__ __forceinline__ uint32_t multiply2(uint32_t a, uint32_t b) {
    __nv_bfloat162 x = __hmul2(*(__nv_bfloat162 *)&a, *(__nv_bfloat162 *)&b);
    return *(uint32_t *)&x;
}

struct CodesFp8 {
    static constexpr int BITS = 8, LOADS = 2, RUN_WORDS = 2;
    // Exponent and mantissa of e4m3 in bf16's places (packed_fp8): the value, subnormal or not, times 2^-120.
    static __device__ __forceinline__ uint32_t times_2_120(uint32_t v) {
        return multiply2(v, 0x7b807b80u);
    }
    static __device__ __forceinline__ uint32_t first(uint32_t codes) {
        return times_2_120(codes & 0x87f087f0u);
    }
    static __device__ __forceinline__ uint32_t second(uint32_t codes) {
        return times_2_120((codes << 4 & 0x80f080f0u) | (codes >> 4 & 0x07000700u));
    }
    static __device__ __forceinline__ void widen(const uint32_t (&codes)[8], int j, uint32_t (&w)[4]) {
        uint32_t a = codes[2 * j], b = codes[2 * j + 1];
        w[0] = first(a), w[1] = second(a), w[2] = first(b), w[3] = second(b);
    }
    // Without a branch: first where t is even, second where it is odd.
    static __device__ __forceinline__ uint32_t pair(uint32_t codes, int t) {
        const uint32_t shift = t % 2 * 4, left = t % 2 ? 0x80f080f0u : 0x87f087f0u, right = t % 2 ? 0x07000700u : 0;
        return times_2_120((codes << shift & left) | (codes >> shift & right));
    }
};

struct CodesInt8 {
    static constexpr int BITS = 8, LOADS = 2, RUN_WORDS = 2;
    // 128 + the lower seven bits, less 128, or 256 for a negative one: both are bf16 numbers with seven bits of mantissa.
    static __device__ __forceinline__ uint32_t widen2(uint32_t low) {
        return subtract2(and_or<0x007f007fu, 0x43004300u>(low), and_or<0x00800080u, 0x43004300u>(low));
    }
    static __device__ __forceinline__ void widen(const uint32_t (&codes)[8], int j, uint32_t (&w)[4]) {
        uint32_t a = codes[2 * j], b = codes[2 * j + 1];
        w[0] = widen2(a), w[1] = widen2(a >> 8), w[2] = widen2(b), w[3] = widen2(b >> 8);
    }
    static __device__ __forceinline__ uint32_t pair(uint32_t codes, int t) {
        return widen2(codes >> t % 2 * 8);
    }
};

struct CodesInt4 {
    static constexpr int BITS = 4, LOADS = 1, RUN_WORDS = 1;
    // 128 + the code, less 136.
    static __device__ __forceinline__ uint32_t widen2(uint32_t low) {
        return subtract2(and_or<0x000f000fu, 0x43004300u>(low), 0x43084308u);
    }
    static __device__ __forceinline__ void widen(const uint32_t (&codes)[4], int j, uint32_t (&w)[4]) {
        uint32_t a = codes[j];
        w[0] = widen2(a), w[1] = widen2(a >> 4), w[2] = widen2(a >> 8), w[3] = widen2(a >> 12);
    }
    static __device__ __forceinline__ uint32_t pair(uint32_t codes, int t) {
        return widen2(codes >> 4 * t);
    }
};
