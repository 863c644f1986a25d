#include "bench.h"

#include <stdlib.h>
#include <string.h>

#include "generate.h"
#include "ops_cpu.h"

typedef struct {
    double samples[BENCH_ROUNDS];
    double least, median, most;
} Figure;

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void summarise(Figure *f) {
    qsort(f->samples, BENCH_ROUNDS, sizeof *f->samples, ascending);
    f->least = f->samples[0];
    f->median = f->samples[BENCH_ROUNDS / 2];
    f->most = f->samples[BENCH_ROUNDS - 1];
}

uint64_t weights_read_per_token(const Model *m) {
    const Config *c = &m->config;
    uint64_t row = (uint64_t)c->dim * (uint64_t)dtype_bytes[m->weights.dtype];
    return c->tie_embeddings ? m->weights.bytes : m->weights.bytes - row * (uint64_t)(c->vocab_size - 1);
}

// Bytes of keys and values that one token reads after `len` others, in engine cpu's float32.
static uint64_t kv_read(const Config *c, int len) {
    return (uint64_t)c->n_layers * 2 * (uint64_t)c->kv_dim * (uint64_t)len * sizeof(float);
}

// Floating-point operations of a prompt of T tokens: two for each weight of the layers and token, the head once, and
// scores and sums of attention over the causal half.
static double prefill_operations(const Config *c, double T) {
    double layer = (double)c->dim * ((double)c->q_dim * 2 + (double)c->kv_dim * 2 + (double)c->hidden_dim * 3);
    return c->n_layers * (2 * layer * T + 2 * T * (T + 1) * c->q_dim) + 2.0 * c->dim * c->vocab_size;
}

static double multiply_add_rate(const Ops *ops, int64_t rounds, int *threads) {
    double operations = 0, start = clock_seconds();
    int n = 0;
#pragma omp parallel reduction(+ : operations, n)
    {
        n++;
        float sink = 0.001f;
        operations += ops->multiply_add(rounds, &sink);
        if (sink == 12345.0f) operations += 1; // the result is used, so the work is done
    }
    *threads = n;
    return operations / (clock_seconds() - start);
}

static double read_rate(const Ops *ops, const void *data, uint64_t bytes) {
    double start = clock_seconds();
    ops->read_all(data, (int64_t)bytes);
    return (double)bytes / (clock_seconds() - start);
}

bool bench_run(Model *m, bool json, FILE *out, const volatile sig_atomic_t *interrupted, Error *err) {
    const Config *c = &m->config;
    if (strcmp(m->engine->name, "cpu") != 0)
        return fail(err, "--bench measures engine cpu, this is %s", m->engine->name);
    if (m->kv.max_len < BENCH_CONTEXT)
        return fail(err, "--bench needs a context of %d, this one is %d", BENCH_CONTEXT, m->kv.max_len);
    const Ops *ops = ops_select();
    const uint64_t enough = (uint64_t)1 << 30; // past any cache
    uint64_t bytes = m->weights.bytes >> 20 << 20;
    const void *data = m->weights.tok_embeddings; // the first tensor
    void *buffer = NULL;
    if (bytes < enough) { // they would fit a cache: read a buffer that does not
        if (!(buffer = malloc(enough))) return fail(err, "out of memory: a buffer of 1 GiB to read");
        memset(buffer, 1, enough);
        data = buffer;
        bytes = enough;
    }

    Figure bandwidth, rate, prefill, decode;
    int tokens[BENCH_PROMPT];
    for (int i = 0; i < BENCH_PROMPT; i++) tokens[i] = (int)((uint32_t)i * 2654435761u % (uint32_t)c->vocab_size);
    int threads;
    multiply_add_rate(ops, 1 << 22, &threads); // warm-up: threads, clocks
    bool ok = true;
    for (int round = -1; ok && round < BENCH_ROUNDS; round++) { // round -1 is warm-up
        int at = round < 0 ? 0 : round;
        rate.samples[at] = multiply_add_rate(ops, 1 << 24, &threads);
        double start = clock_seconds();
        m->kv.len[0] = 0;
        ok = model_prefill(m, 0, tokens, BENCH_PROMPT, 1, err);
        prefill.samples[at] = clock_seconds() - start;
        bandwidth.samples[at] = read_rate(ops, data, bytes);
        start = clock_seconds();
        for (int i = 0; ok && i < BENCH_DECODE; i++) {
            ok = model_decode(m, 0, tokens[i], err);
            if (*interrupted) ok = fail_interrupted(err);
        }
        decode.samples[at] = (clock_seconds() - start) / BENCH_DECODE;
        double again = read_rate(ops, data, bytes);
        if (again > bandwidth.samples[at])
            bandwidth.samples[at] = again; // the machine's better figure is the yardstick
    }
    free(buffer);
    if (!ok) return false;
    Figure *figures[] = {&bandwidth, &rate, &prefill, &decode};
    for (size_t i = 0; i < sizeof figures / sizeof *figures; i++) summarise(figures[i]);

    double operations = prefill_operations(c, BENCH_PROMPT), prefill_rate = operations / prefill.median;
    double read = (double)(weights_read_per_token(m) + kv_read(c, BENCH_CONTEXT)), decode_rate = read / decode.median;
    if (json) {
        fprintf(out,
                "{\"engine\": \"%s\", \"instructions\": \"%s\", \"threads\": %d, \"weights_bytes\": %llu, "
                "\"read_gb_s\": %.2f, \"fma_gflop_s\": %.1f, \"prefill_tokens\": %d, \"prefill_ms\": %.2f, "
                "\"prefill_gflop_s\": %.1f, \"prefill_share\": %.4f, \"decode_ms\": %.3f, \"decode_gb_s\": %.2f, "
                "\"decode_share\": %.4f}\n",
                m->engine->name, ops->name, threads, (unsigned long long)m->weights.bytes, bandwidth.median * 1e-9,
                rate.median * 1e-9, BENCH_PROMPT, prefill.median * 1e3, prefill_rate * 1e-9, prefill_rate / rate.median,
                decode.median * 1e3, decode_rate * 1e-9, decode_rate / bandwidth.median);
        return true;
    }
    fprintf(out, "engine %s (%s), %d threads; %.3f GB of weights (%s); medians of %d rounds [smallest, largest]\n",
            m->engine->name, ops->name, threads, (double)m->weights.bytes * 1e-9, dtype_names[m->weights.dtype],
            BENCH_ROUNDS);
    fprintf(out, "read bandwidth        %8.2f GB/s [%.2f, %.2f]\n", bandwidth.median * 1e-9, bandwidth.least * 1e-9,
            bandwidth.most * 1e-9);
    fprintf(out, "float32 multiply-add  %8.1f GFLOP/s [%.1f, %.1f]\n", rate.median * 1e-9, rate.least * 1e-9,
            rate.most * 1e-9);
    fprintf(
        out,
        "prefill, %d tokens   %8.1f ms [%.1f, %.1f]  %.1f tokens/s  %.1f GFLOP/s  %.1f %% of the multiply-add rate\n",
        BENCH_PROMPT, prefill.median * 1e3, prefill.least * 1e3, prefill.most * 1e3, BENCH_PROMPT / prefill.median,
        prefill_rate * 1e-9, 100 * prefill_rate / rate.median);
    fprintf(
        out,
        "decode                %8.2f ms/token [%.2f, %.2f]  %.2f tokens/s  %.2f GB/s  %.1f %% of the read bandwidth\n",
        decode.median * 1e3, decode.least * 1e3, decode.most * 1e3, 1 / decode.median, decode_rate * 1e-9,
        100 * decode_rate / bandwidth.median);
    return true;
}
