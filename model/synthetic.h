// Models of known shapes whose weights are made from a seed: for benchmarks and tests of real sizes without real
// weights. One definition for the CPU and for CUDA, so that a seed means the same model in every engine.
#ifndef SYNTHETIC_H
#define SYNTHETIC_H

#include "quant.h"

#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__
#else
#define HOST_DEVICE
#endif

// A model of a known shape (llama-3.2-1b, llama-3.2-3b, llama-3.1-8b, llama-3.1-70b) whose weights the engine makes.
// Its vocabulary is the 256 bytes; all other ids are unused.
bool synthetic_open(Model *model, const char *shape, uint64_t seed, Error *err);
// Gives weights of other types to a model that synthetic_open has made: to the matrices of the layers, and to the
// output matrix, which a tied model then has beside its embeddings. Of dtype DTYPE_BF16: as they are.
bool synthetic_set_types(Model *model, QuantType layers, QuantType output, Error *err);
// Whether there is such a shape; a list of them, for messages.
bool model_has_shape(const char *name);
const char *model_shapes(void);

// The way through the tensors of a synthetic model, in file order.
typedef struct {
    uint64_t seed;
    uint64_t at; // bytes before the tensor: BF16, or codes and then scales, or a norm's F32; each starts on 64 bytes
} SyntheticCursor;

// What the tensor at the cursor is made from; moves the cursor past it.
typedef struct {
    uint64_t at;
    uint32_t salt;
    float range; // of a matrix, uniform in ±range/2: a standard deviation of 1.7/√cols, so that attention has something
                 // to distinguish; of a norm 0: it is all ones
    // Of a quantised matrix:
    uint64_t scale_at;
    DType dtype, scale_dtype;
    float scale; // the mean magnitude of the scales, which gives its weights that standard deviation
} SyntheticTensor;
SyntheticTensor synthetic_next(SyntheticCursor *cursor, const Weight *weight);

// lowbias32, a mix of 32 bits (Wellons 2018), of a counter.
static inline HOST_DEVICE uint32_t synthetic_mix(uint32_t i) {
    uint32_t h = i * 0x9E3779B1u;
    h = (h ^ h >> 16) * 0x21F0AAADu;
    return (h ^ h >> 15) * 0xD35A2D97u;
}

// Element i of a matrix, row-major, exact in bf16: its float32 bits, whose lower half is zero. It depends on the seed,
// the tensor's place and i alone.
static inline HOST_DEVICE uint32_t synthetic_bits(uint64_t i, uint32_t salt, float range) {
    union {
        float value;
        uint32_t bits;
    } x;
    x.value = ((float)(synthetic_mix((uint32_t)i + salt) >> 8) * 0x1p-24f - 0.5f) * range;
    return x.bits & 0xFFFF0000u;
}

// Word i of a quantised matrix's codes, row-major: four of 8 bits or eight of int4, the first lowest. All codes are as
// frequent, but those that are never written: int8's -128 is 0, fp8's NaN the largest number beside it.
static inline HOST_DEVICE uint32_t synthetic_codes(uint64_t i, const SyntheticTensor *t) {
    uint32_t h = synthetic_mix((uint32_t)i + t->salt), codes = h ^ h >> 16;
    for (int bit = 0; t->dtype != DTYPE_U8 && bit < 32; bit += 8) {
        uint32_t code = codes >> bit & 0xFF;
        if (t->dtype == DTYPE_I8 && code == 0x80) codes ^= 0x80u << bit;
        if (t->dtype == DTYPE_F8_E4M3 && (code & 0x7F) == 0x7F) codes ^= 1u << bit;
    }
    return codes;
}

// Scale i of a quantised matrix, row-major, exact in its dtype: its float32 bits. Its magnitude is 3/4 to 5/4 of the
// mean; as many are negative as positive, so that int4's codes, whose mean is -1/2, give weights of mean 0.
static inline HOST_DEVICE uint32_t synthetic_scale_bits(uint64_t i, const SyntheticTensor *t) {
    union {
        float value;
        uint32_t bits;
    } x;
    uint32_t h = synthetic_mix((uint32_t)i + ~t->salt);
    x.value = (0.75f + (float)(h << 1 >> 8) * 0x1p-25f) * t->scale;
    return (t->scale_dtype == DTYPE_BF16 ? x.bits & 0xFFFF0000u : x.bits) ^ (h & 0x80000000u);
}

#endif
