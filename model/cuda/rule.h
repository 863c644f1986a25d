// RULE: a function of plain numbers that C, C++ and kernels can call, so that a test can call it where there is no GPU.
#ifndef RULE_H
#define RULE_H

#ifdef __CUDACC__
#define RULE static __host__ __device__ __forceinline__ constexpr
#else
#define RULE static inline
#endif

#endif
