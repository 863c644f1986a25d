#include "peak.h"

#include <stdlib.h>
#include <string.h>

extern const Platform platform_cpu;
#ifdef LLAMA_CUDA
extern const Platform platform_cuda;
#endif

static const struct {
    const char *engine;
    const Platform *platform;
} platforms[] = {
#ifdef LLAMA_CUDA
    {"fused", &platform_cuda},
    {"cublas", &platform_cuda},
#endif
    {"cpu", &platform_cpu},
};

const Platform *platform_of(const Engine *engine) {
    for (size_t i = 0; i < sizeof platforms / sizeof *platforms; i++)
        if (strcmp(engine->name, platforms[i].engine) == 0) return platforms[i].platform;
    return NULL;
}

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

Statistic statistic_of(double *samples, int n) {
    qsort(samples, (size_t)n, sizeof *samples, ascending);
    double median = n % 2 ? samples[n / 2] : (samples[n / 2 - 1] + samples[n / 2]) / 2;
    return (Statistic){.median = median, .least = samples[0], .most = samples[n - 1], .n = n};
}
