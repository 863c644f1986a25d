// Measures a model on this machine, beside what the machine itself gives in the same minutes. bench.c has what is
// common to all engines and measures through the Engine interface alone; a Machine is what differs.
#ifndef BENCH_H
#define BENCH_H

#include <signal.h>
#include <stdio.h>

#include "model.h"

typedef struct {
    double median, least, most;
    int n; // samples
} Figure;

// Sorts the samples [n], n > 0.
Figure figure_of(double *samples, int n);

// The yardsticks, and what they were taken with.
typedef struct {
    char name[128], software[128], read_how[96], product_how[96];
    uint64_t memory_bytes; // of the machine
    Figure read;           // bytes per second, when nothing but reading is done
    Figure product;        // floating-point operations per second of a large matrix product, or of its inner loop
} Yardstick;

struct Machine {
    bool (*measure)(Yardstick *y, Error *err);
    // Random numbers into the whole cache, as long conversations would have left it. The lengths are the caller's.
    bool (*fill_cache)(const Model *model, Error *err);
    // What is worth measuring here, each list ascending and ended by a 0: tokens of a prompt, tokens in the cache
    // before a step, sequences of a step.
    int prompts[8], contexts[8], batches[8];
};

extern const Machine machine_cpu, machine_cuda;

// How fast a GPU reads `bytes` of its memory, when it does nothing else; how: which way was taken.
bool read_ceiling_cuda(uint64_t bytes, Figure *rate, char *how, size_t how_size, Error *err);

typedef struct {
    const char *version, *engine, *synthetic; // engine NULL: the fastest; synthetic NULL: the weights are a file's
    Precision precision;
    int context, batch; // nothing beyond these; 0: all
    bool json, progress;
} BenchOptions;

// Bytes of the matrices that one step of so many sequences reads at least: all weights once, but of the embedding table
// one row for each sequence, unless it is the head too. (Norms, 0.01 % of a model, are not counted.)
uint64_t weights_read(const Model *model, int batch);

// Prefill, decode, load and time to the first token of an open model, which is started here with several caches. A
// table, or one JSON object.
bool bench_run(Model *model, const BenchOptions *options, FILE *out, const volatile sig_atomic_t *interrupted,
               Error *err);

#endif
