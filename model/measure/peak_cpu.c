// The CPU's roofline: its memory, its multiply-adds, and a cache filled with random numbers.
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "../cpu/state.h"
#include "../generate/generate.h"
#include "../generate/sampler.h"
#include "../threads.h"
#include "peak.h"

enum { ROUNDS = 5, HUGE_PAGE = 2 << 20 };

typedef double MultiplyAdd(int64_t rounds, float *sink);

typedef struct {
    MultiplyAdd *multiply_add;
    int64_t rounds;
    atomic_llong operations; // done by all
} Rate;

static void multiply_add_part(void *rate, int64_t begin, int64_t end) {
    Rate *r = rate;
    for (int64_t i = begin; i < end; i++) {
        float sink = 0.001f;
        r->operations += (int64_t)r->multiply_add(r->rounds, &sink);
        if (sink == 12345.0f) r->operations++; // the result is used, so the work is done
    }
}

// Operations a second of all threads.
static double multiply_add_rate(MultiplyAdd *multiply_add, int64_t rounds) {
    Rate r = {.multiply_add = multiply_add, .rounds = rounds};
    double start = clock_seconds();
    parallel_for(threads_count(), 1, multiply_add_part, &r);
    return (double)r.operations / (clock_seconds() - start);
}

static void processor_name(char *name, size_t size) {
    char line[256];
    FILE *in = fopen("/proc/cpuinfo", "r");
    snprintf(name, size, "a processor");
    while (in && fgets(line, sizeof line, in)) {
        char *colon = strncmp(line, "model name", 10) == 0 ? strchr(line, ':') : NULL;
        if (!colon) continue;
        snprintf(name, size, "%.*s", (int)strcspn(colon + 2, "\n"), colon + 2);
        break;
    }
    if (in) fclose(in);
}

static bool measure_cpu(Roofline *r, int gpus, Error *err) {
    r->gpus = gpus;                           // the processor, as one
    const uint64_t bytes = (uint64_t)1 << 30; // past any cache
    const Ops *ops = ops_select();
    double reads[ROUNDS], rates[ROUNDS], bf16_rates[ROUNDS];
    void *data;
    if (posix_memalign(&data, HUGE_PAGE, bytes) != 0) return fail(err, "out of memory: a buffer of 1 GiB to read");
    madvise(data, bytes, MADV_HUGEPAGE); // as weights are: a hint
    memset(data, 1, bytes);
    multiply_add_rate(ops->multiply_add, 1 << 22); // warm-up: threads, clocks
    for (int i = 0; i < ROUNDS; i++) {
        double start = clock_seconds();
        ops->read_all(data, (int64_t)bytes);
        reads[i] = (double)bytes / (clock_seconds() - start);
        rates[i] = multiply_add_rate(ops->multiply_add, 1 << 24);
        if (ops->multiply_add_bf16) bf16_rates[i] = multiply_add_rate(ops->multiply_add_bf16, 1 << 24);
    }
    free(data);
    r->read = statistic_of(reads, ROUNDS);
    r->product = statistic_of(rates, ROUNDS);
    if (ops->multiply_add_bf16) r->product_bf16 = statistic_of(bf16_rates, ROUNDS);
    r->memory_bytes = (uint64_t)sysconf(_SC_PHYS_PAGES) * (uint64_t)sysconf(_SC_PAGESIZE);
    processor_name(r->name, sizeof r->name);
    snprintf(r->software, sizeof r->software, "%s, %d threads", ops->name, threads_count());
    snprintf(r->read_how, sizeof r->read_how, "all threads reading 1 GiB");
    snprintf(r->product_how, sizeof r->product_how, "float32 multiply-adds in registers");
    snprintf(r->product_bf16_how, sizeof r->product_bf16_how, "multiply-adds of pairs of bf16 in registers");
    return true;
}

static bool fill_cache_cpu(Model *m, Error *err) {
    (void)err;
    char *caches[] = {m->kv.k, m->kv.v};
    const DType dtype = ((const CpuState *)m->state)->cache;
    const size_t element = (size_t)dtype_bytes[dtype], n = m->kv.bytes / 2 / element;
    const Ops *ops = ops_select();
    uint64_t random = 1;
    for (int c = 0; c < 2; c++)
        for (size_t i = 0; i < n; i++) {
            float number = (float)(2 * random_uniform(&random) - 1);
            if (dtype == DTYPE_F32)
                memcpy(caches[c] + i * element, &number, element);
            else
                ops->narrow(caches[c] + i * element, &number, dtype, 1);
        }
    return true;
}

const Platform platform_cpu = {measure_cpu, fill_cache_cpu, {128, 512}, {128, 2048}, {1, 4, 8}};
