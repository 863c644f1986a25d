// Measures a model beside what the platform itself gives in the same minutes. bench.c is common to all engines and
// measures through model_forward alone; a Platform (peak.h) is what differs.
#ifndef BENCH_H
#define BENCH_H

#include <stdio.h>

#include "../generate/sampler.h"
#include "peak.h"

typedef struct {
    const char *version, *engine, *synthetic; // engine NULL: the fastest; synthetic NULL: the weights are a file's
    Precision precision;
    int context, batch;    // nothing beyond these; 0: all
    SamplerConfig sampler; // of a step's tokens, without a repetition penalty
    bool json, progress;
    // The first prompt of a process, of so many tokens: starts another process with this model and engine, which
    // computes nothing else: seconds to the first token. NULL: that is not measured.
    bool (*fresh_prompt)(void *context, int tokens, double *seconds, Error *err);
    void *fresh_context;
} BenchOptions;

// Prefill, decode, load and time to the first token of an open model whose engine is chosen; it is started here with
// several caches. A table, or one JSON object. Stops when the model is interrupted.
bool bench_run(Model *model, const Platform *platform, const BenchOptions *options, FILE *out, Error *err);

#endif
