// What a benchmark found, as a table or as one JSON object.
#ifndef BENCH_REPORT_H
#define BENCH_REPORT_H

#include "bench.h"

enum { BENCH_FIRST_PROMPT = 12, BENCH_FRESH = 5, BENCH_MAX_LISTED = 8, BENCH_MAX_LOADS = 2 * BENCH_MAX_LISTED };

// One line of the result: a prompt, or a step of some sequences.
typedef struct {
    int length, batch; // tokens of the prompt, or in the cache before the step; sequences
    Statistic seconds; // n 0: it was not run
    double work;       // operations of a prompt; bytes that a step reads
    Error why;         // it was not run
} BenchRow;

typedef struct {
    Roofline roofline;
    BenchRow first;                                 // a prompt of BENCH_FIRST_PROMPT tokens
    double first_seconds;                           // of the first such prompt, before any warm-up
    BenchRow fresh[BENCH_FRESH], warm[BENCH_FRESH]; // the first prompt of a process; the same when all is warm
    int n_fresh;
    BenchRow prompts[BENCH_MAX_LISTED], steps[BENCH_MAX_LISTED * BENCH_MAX_LISTED];
    int n_prompts, n_steps, n_loads;
    double loads[BENCH_MAX_LOADS]; // seconds; the first may have come from the disk
} BenchResult;

void bench_report_json(const Model *model, const BenchOptions *options, const BenchResult *result, FILE *out);
void bench_report_table(const Model *model, const BenchOptions *options, const BenchResult *result, FILE *out);

#endif
