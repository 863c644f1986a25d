// What a platform can do at most (its roofline), and how it is measured: what a benchmark sets its figures beside.
#ifndef PEAK_H
#define PEAK_H

#include "../model.h"

typedef struct {
    double median, least, most;
    int n; // samples
} Statistic;

// Sorts the samples [n], n > 0.
Statistic statistic_of(double *samples, int n);

// The roofline, and what it was measured with.
typedef struct {
    char name[128], software[128], read_how[96], product_how[96], product_bf16_how[96];
    uint64_t memory_bytes;  // of the platform
    Statistic read;         // bytes per second, when nothing but reading is done
    Statistic product;      // floating-point operations per second of a large matrix product, or of its inner loop
    Statistic product_bf16; // the same where bf16 has a peak of its own on this platform; n is 0: it has not
    int gpus;               // that compute: each reads and multiplies as fast as that
    Statistic link;         // bytes per second from the memory of one to that of another; n is 0: not measured
} Roofline;

// Where an engine computes.
typedef struct {
    bool (*measure)(Roofline *roofline, int gpus, Error *err);
    // Random numbers into the whole cache, as long conversations would have left it. The lengths are the caller's.
    bool (*fill_cache)(Model *model, Error *err);
    // What is worth measuring here, each list ascending and ended by a 0: tokens of a prompt, tokens in the cache
    // before a step, sequences of a step.
    int prompts[8], contexts[8], batches[12];
} Platform;

// The platform of an engine of this build.
const Platform *platform_of(const Engine *engine);

// How fast a GPU reads `bytes` of its memory, when it does nothing else; how: which way was taken.
bool read_ceiling_cuda(uint64_t bytes, Statistic *rate, char *how, size_t how_size, Error *err);

#endif
