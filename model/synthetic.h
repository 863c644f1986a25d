// Models of known shapes whose weights are made from a seed: for benchmarks and tests of real sizes without real
// weights. One definition for the CPU and for CUDA, so that a seed means the same model in every engine.
#ifndef SYNTHETIC_H
#define SYNTHETIC_H

#include "model.h"

#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__
#else
#define HOST_DEVICE
#endif

// A model of a known shape (llama-3.2-1b, llama-3.2-3b, llama-3.1-8b, llama-3.1-70b) whose weights the engine makes.
// Its vocabulary is the 256 bytes; all other ids are unused.
bool synthetic_open(Model *model, const char *shape, uint64_t seed, Error *err);
// Whether there is such a shape; a list of them, for messages.
bool model_has_shape(const char *name);
const char *model_shapes(void);

// The way through the tensors of a synthetic model, in file order.
typedef struct {
    uint64_t seed;
    uint64_t at; // bytes before the tensor: each is BF16, a norm F32, and starts on 64 bytes
} SyntheticCursor;

// What the tensor at the cursor is made from; moves the cursor past it.
typedef struct {
    uint64_t at;
    uint32_t salt;
    float range; // of a matrix, uniform in ±range/2: a standard deviation of 1.7/√cols, so that attention has something
                 // to distinguish; of a norm 0: it is all ones
} SyntheticTensor;
SyntheticTensor synthetic_next(SyntheticCursor *cursor, const Weight *weight);

// Element i of a matrix, row-major, exact in bf16: its float32 bits, whose lower half is zero. It depends on the seed,
// the tensor's place and i alone. lowbias32, a mix of 32 bits (Wellons 2018).
static inline HOST_DEVICE uint32_t synthetic_bits(uint64_t i, uint32_t salt, float range) {
    union {
        float value;
        uint32_t bits;
    } x;
    uint32_t h = ((uint32_t)i + salt) * 0x9E3779B1u;
    h = (h ^ h >> 16) * 0x21F0AAADu;
    h = (h ^ h >> 15) * 0xD35A2D97u;
    x.value = ((float)(h >> 8) * 0x1p-24f - 0.5f) * range;
    return x.bits & 0xFFFF0000u;
}

#endif
