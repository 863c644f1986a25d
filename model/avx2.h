// One source for two instruction sets: an INLINE function is written with vectors of eight floats (a GCC and Clang
// extension), and a function WITH_AVX2 that calls it is chosen where the processor HAS_AVX2. Neither fuses a product
// and a sum, so both give the same bits. (The operations of engine cpu, which may fuse them, have cpu/vectors.h.)
#ifndef AVX2_H
#define AVX2_H

#include <stdbool.h>

#define INLINE static inline __attribute__((always_inline))
#ifdef __x86_64__
#define WITH_AVX2 __attribute__((target("avx2")))
#define HAS_AVX2 __builtin_cpu_supports("avx2")
#else
#define WITH_AVX2
#define HAS_AVX2 false
#endif

enum { LANES = 8 };

typedef float Float8 __attribute__((vector_size(32)));

#endif
