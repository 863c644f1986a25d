// The arithmetic of a choice among tokens, for the CPU and for kernels: every machine gets the same bits, and sums come
// out the same in any order, since they are sums of whole numbers.
//
// A token's weight is exp((logit - max) / temperature) as a whole number, 2^bits for the largest logit. Tokens are in
// order, largest logit first, the lowest id first among equals, or by their ids where nothing is cut off. A cut is a
// cumulative weight in that order, and so is the random number: what is left of the order is the tokens up to a sum.
#ifndef SAMPLER_WEIGHTS_H
#define SAMPLER_WEIGHTS_H

#include <stdint.h>
#include <string.h>

// Sums and products of float64 that no compiler contracts: in kernels the instructions themselves, elsewhere by
// -ffp-contract=off.
#ifdef __CUDACC__
#define WEIGHTS static __device__ __forceinline__
WEIGHTS double weight_add(double a, double b) {
    return __dadd_rn(a, b);
}
WEIGHTS double weight_mul(double a, double b) {
    return __dmul_rn(a, b);
}
#else
#define WEIGHTS static inline
WEIGHTS double weight_add(double a, double b) {
    return a + b;
}
WEIGHTS double weight_mul(double a, double b) {
    return a * b;
}
#endif

// Bits of the largest weight at most: 2^-45 of the most likely is what a token needs to have a weight at all.
enum { WEIGHT_BITS = 44 };
static const double LOG2_E = 0x1.71547652b82fep+0;

// Of a row's weights. scale: LOG2_E / temperature; max: the largest logit.
typedef struct {
    double scale;
    float max;
    int bits;
} WeightRule;

// So many that a sum of n weights is less than 2^64.
static inline int weight_bits(int n) {
    int bits = WEIGHT_BITS;
    while (n > 1 << (63 - bits)) bits--;
    return bits;
}

WEIGHTS uint64_t weight_double_bits(double x) {
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}
WEIGHTS double weight_double_of(uint64_t bits) {
    double x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

// A logit's weight, 0 to 2^bits. Never smaller than that of a smaller logit: the exponent, of base 2, is rounded to
// multiples of 2^-45, and from one to the next the power grows by 2e-14 of itself, while it is computed to within 1e-15
// (the polynomial, of degree 10 and exact at 0, to 5.7e-16: Chebyshev's of (2^f - 1) / f on [-1/2, 1/2]).
WEIGHTS uint64_t token_weight(float logit, WeightRule rule) {
    const double to_2_45 = 0x1.8p7, to_whole = 0x1.8p52; // added and subtracted again, what is smaller is rounded off
    double t = weight_mul(weight_add((double)logit, -(double)rule.max), rule.scale);
    uint64_t above = ((weight_double_bits(t) >> 32) - 0xC0500000u) >> 63; // 1: t > -64; 0: a weight of 0 by far
    t = weight_add(weight_add(t, to_2_45), -to_2_45);
    double whole = weight_add(t, to_whole), f = weight_add(t, -weight_add(whole, -to_whole));
    double p = 0x1.e5e9f548e5725p-28;
    p = weight_add(weight_mul(p, f), 0x1.b6571de2f2351p-24);
    p = weight_add(weight_mul(p, f), 0x1.62bfe46117445p-20);
    p = weight_add(weight_mul(p, f), 0x1.ffcb76789860fp-17);
    p = weight_add(weight_mul(p, f), 0x1.4309130378460p-13);
    p = weight_add(weight_mul(p, f), 0x1.5d87fe908f88ap-10);
    p = weight_add(weight_mul(p, f), 0x1.3b2ab6fba385fp-7);
    p = weight_add(weight_mul(p, f), 0x1.c6b08d7044119p-5);
    p = weight_add(weight_mul(p, f), 0x1.ebfbdff82c590p-3);
    p = weight_add(weight_mul(p, f), 0x1.62e42fefa39f7p-1);
    p = weight_add(weight_mul(p, f), 1);
    // times 2^(whole + bits), by its exponent; then rounded to a whole number, which is in the last 52 bits
    uint64_t scaled = weight_double_bits(p) + ((weight_double_bits(whole) + (uint64_t)rule.bits) << 52);
    return (weight_double_bits(weight_add(weight_double_of(scaled), 0x1p52)) - 0x4330000000000000u) & (0 - above);
}

// Ascending as the logit descends. Zeros of both signs are equal.
WEIGHTS uint32_t order_key(float logit) {
    uint32_t bits;
    logit += 0.0f;
    memcpy(&bits, &logit, sizeof bits);
    return bits >> 31 ? bits : ~bits & 0x7FFFFFFF;
}

// The weight that the fewest tokens must have that reach a probability of top_p of `sum`: 1 to sum. The tokens up to
// the first whose cumulative weight is more than this less one are kept.
WEIGHTS uint64_t nucleus_weight(float top_p, uint64_t sum) {
    double least = weight_mul((double)top_p, (double)sum);
    uint64_t whole = (uint64_t)least;
    whole += (double)whole < least;
    return whole < 1 ? 1 : whole < sum ? whole : sum;
}

// The smallest weight at least min_p times the largest.
WEIGHTS uint64_t least_weight(float min_p, int bits) {
    double least = weight_mul((double)min_p, (double)((uint64_t)1 << bits));
    uint64_t whole = (uint64_t)least;
    return whole + ((double)whole < least);
}

// What a random number u in [0, 1) stands for: the first token whose cumulative weight is more than this is drawn.
WEIGHTS uint64_t drawn_weight(double u, uint64_t sum) {
    uint64_t whole = (uint64_t)weight_mul(u, (double)sum);
    return whole < sum ? whole : sum - 1; // u just below one may be rounded up
}

#endif
