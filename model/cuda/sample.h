// Draws tokens where the logits are: for Engine.sample of both GPU engines.
#ifndef CUDA_SAMPLE_H
#define CUDA_SAMPLE_H

extern "C" {
#include "../generate/sampler.h"
}
#include "check.h"

// One row to draw from.
struct SampleJob {
    double scale, u; // scale: of weights (sampler_weights.h)
    float bin_scale, top_p, min_p;
    int row, argmax, top_k, bits; // argmax: the row's; top_k 0: all; bits: of the largest weight
};

// Sums over one row's tokens.
enum { SAMPLE_BINS = 2048 };
struct SampleBins {
    unsigned long long weight[SAMPLE_BINS]; // of each bin's tokens
    unsigned count[SAMPLE_BINS];            // of each bin's tokens, for top-k
    unsigned long long likely;              // the weight of tokens that min-p keeps
    unsigned done;                          // blocks that have added theirs
};

// Each for as many rows as are drawn from at once.
struct SampleBuffers {
    SampleBins *bins;     // zero before the first call; every call that succeeds leaves them so
    SampleJob *jobs;      // on the device
    SampleJob *jobs_host; // pinned
    int *ids_host;        // pinned
};

// Draws ids [n], as sample_token does, from rows of logits [*][vocab] on the device, which must be finite, by one
// kernel on the stream, and waits for it. argmax: of each row of logits, on the host.
bool sample_rows(const SampleBuffers *buffers, const float *logits, int vocab, const int *argmax, const SampleRow *rows,
                 int n, int *ids, cudaStream_t stream, Error *err);
// Loads that kernel.
bool load_sample_kernel(Error *err);

#endif
