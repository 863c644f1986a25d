// Measures a model on this machine, beside what the machine itself gives in the same minutes.
#ifndef BENCH_H
#define BENCH_H

#include <signal.h>
#include <stdio.h>

#include "model.h"

enum { BENCH_PROMPT = 512, BENCH_DECODE = 16, BENCH_ROUNDS = 5, BENCH_CONTEXT = BENCH_PROMPT + BENCH_DECODE };

// Bytes of weights that one token reads: all of them, but of an embedding table that is not also the head one row.
uint64_t weights_read_per_token(const Model *model);

// Engine cpu: read bandwidth, float32 multiply-add rate, prefill of BENCH_PROMPT tokens, decode after it. Medians of
// BENCH_ROUNDS rounds with the smallest and the largest; a table, or one JSON object.
bool bench_run(Model *model, bool json, FILE *out, const volatile sig_atomic_t *interrupted, Error *err);

#endif
