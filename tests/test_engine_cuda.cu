// Engine cublas from the inside: memory over many steps, prompts in parts, a broken weight, logits against engine cpu.
extern "C" {
#include "../model/bench.h"
#include "../model/generate.h"
}
#include <cuda_runtime.h>
#include <math.h>

#include "check.h"

static const char *skip_reason;

static bool start(Model *m, const char *engine, Precision precision, int slots, int max_len) {
    Error err = {""};
    if (model_open(m, "model/stories.bin", false, &err) && model_start(m, engine, precision, slots, max_len, &err))
        return true;
    test_fail("%s", err.text);
    return false;
}

static void random_tokens(int *tokens, int n, const Model *m) {
    for (int i = 0; i < n; i++) tokens[i] = (int)(((unsigned)i * 2654435761u >> 7) % (unsigned)m->config.vocab_size);
}

// What a step, or the replay of its graph, allocated and kept would be missing afterwards.
static void test_cublas_1000_steps_leave_memory_unchanged(void) {
    Model m;
    Error err = {""};
    size_t before = 0, after = 0, total;
    int slot[3] = {2, 0, 1}, rows[4] = {0, 1, 2, 3}, tokens[3] = {300, 400, 500};
    if (start(&m, "cublas", PRECISION_BF16, 3, 1100)) {
        Batch b = {3, 3, 3, tokens, slot, rows, rows};
        for (int i = 0; i < 1020; i++) {
            if (i == 20) cudaMemGetInfo(&before, &total); // by then every graph is there
            if (!m.engine->decode(&m, &b, &err)) test_fail("step %d: %s", i, err.text);
        }
        cudaMemGetInfo(&after, &total);
        CHECK(m.kv.len[0] == 1020 && m.kv.len[1] == 1020 && m.kv.len[2] == 1020);
        if (before != after) test_fail("%zu bytes free before, %zu after", before, after);
    }
    model_close(&m);
    test_end("test_cublas_1000_steps_leave_memory_unchanged");
}

// The largest |Δlogit| between engine cublas in float32 and engine cpu after a prompt of n tokens in pieces of `step`.
static double delta_from_cpu(int n, int step, double *largest) {
    Model gpu, cpu;
    Error err = {""};
    double delta = 0;
    int *tokens = (int *)malloc((size_t)n * sizeof *tokens);
    *largest = 0;
    if (start(&gpu, "cublas", PRECISION_F32, 2, n) && start(&cpu, "cpu", PRECISION_F32, 1, n)) {
        random_tokens(tokens, n, &gpu);
        CHECK(model_prefill(&cpu, 0, tokens, n, 1, &err));
        for (int at = 0; at < n; at += step)
            if (!model_prefill(&gpu, 1, tokens + at, n - at < step ? n - at : step, 1, &err)) test_fail("%s", err.text);
        CHECK(gpu.engine->read_logits(&gpu, &err));
        for (int i = 0; !err.text[0] && i < gpu.config.vocab_size; i++) {
            double d = fabs((double)gpu.logits[i] - (double)cpu.logits[i]), size = fabs((double)cpu.logits[i]);
            if (!(d <= delta)) delta = d;
            if (size > *largest) *largest = size;
        }
    }
    model_close(&gpu);
    model_close(&cpu);
    free(tokens);
    return delta;
}

// Eight layers of float32 sums of up to 640 terms, in two orders: a few hundred roundings of 6e-8 of the largest logit.
static void test_cublas_logits_equal_the_cpus(void) {
    const int sizes[][2] = {{1, 1}, {2, 2}, {63, 63}, {65, 65}, {300, 7}, {1500, 1500}, {1500, 700}};
    double worst = 0;
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        double largest, delta = delta_from_cpu(sizes[i][0], sizes[i][1], &largest), bound = 300 * 6e-8 * largest;
        if (!(delta <= bound))
            test_fail("%d tokens in pieces of %d: |Δlogit| %.3g, bound %.3g", sizes[i][0], sizes[i][1], delta, bound);
        if (delta / bound > worst) worst = delta / bound;
    }
    test_end("test_cublas_logits_equal_the_cpus");
    printf("   largest error: %.3f of its bound\n", worst);
}

// A decode step after a prompt gives what the same tokens give as one prompt.
static void test_cublas_decode_continues_prefill(void) {
    Model m;
    Error err = {""};
    int tokens[40];
    float *whole = NULL;
    if (start(&m, "cublas", PRECISION_F32, 2, 64)) {
        random_tokens(tokens, 40, &m);
        size_t bytes = (size_t)m.config.vocab_size * sizeof(float);
        whole = (float *)malloc(bytes);
        CHECK(model_prefill(&m, 0, tokens, 40, 1, &err) && m.engine->read_logits(&m, &err));
        memcpy(whole, m.logits, bytes);
        CHECK(model_prefill(&m, 1, tokens, 30, 1, &err));
        for (int i = 30; i < 40; i++) CHECK(model_decode(&m, 1, tokens[i], &err));
        CHECK(m.engine->read_logits(&m, &err));
        double delta = 0, largest = 0;
        for (int i = 0; i < m.config.vocab_size; i++) {
            delta = fmax(delta, fabs((double)m.logits[i] - (double)whole[i]));
            largest = fmax(largest, fabs((double)whole[i]));
        }
        CHECK(delta <= 300 * 6e-8 * largest);
        CHECK(m.choice[0] == argmax(whole, m.config.vocab_size));
    }
    free(whole);
    model_close(&m);
    test_end("test_cublas_decode_continues_prefill");
}

// A NaN in a matrix reaches the logits, and the choice says so; engine and caller stay in order.
static void test_cublas_nan_weight_is_noticed(void) {
    Model m;
    Error err = {""};
    int token = 300;
    unsigned short nan = 0x7FC0;
    if (start(&m, "cublas", PRECISION_BF16, 1, 8)) {
        CHECK(model_prefill(&m, 0, &token, 1, 1, &err) && m.choice[0] >= 0);
        cudaMemcpy((void *)m.weights.layers[3].w2, &nan, sizeof nan, cudaMemcpyHostToDevice);
        CHECK(model_decode(&m, 0, token, &err) && m.choice[0] == -1);
    }
    model_close(&m);
    test_end("test_cublas_nan_weight_is_noticed");
}

// Every position of the benchmark's cache is a random number in ±1, in the cache's own dtype.
static void test_cublas_cache_is_filled_for_the_benchmark(void) {
    const Precision precisions[] = {PRECISION_BF16, PRECISION_F32};
    for (int p = 0; p < 2; p++) {
        Model m;
        Error err = {""};
        if (start(&m, "cublas", precisions[p], 3, 100)) {
            size_t element = p ? 4 : 2, n = m.kv.bytes / 2 / element;
            uint8_t *host = (uint8_t *)malloc(m.kv.bytes / 2);
            void *caches[] = {m.kv.k, m.kv.v};
            for (int i = 0; i < 2; i++) {
                double sum = 0, squares = 0;
                cudaMemset(caches[i], 0xFF, m.kv.bytes / 2); // NaN
                CHECK(m.engine->machine->fill_cache(&m, &err));
                cudaMemcpy(host, caches[i], m.kv.bytes / 2, cudaMemcpyDeviceToHost);
                for (size_t j = 0; j < n; j++) {
                    uint32_t bits = 0;
                    float x;
                    memcpy((char *)&bits + 4 - element, host + j * element, element);
                    memcpy(&x, &bits, sizeof x);
                    if (!(fabsf(x) <= 1)) test_fail("element %zu is %f", j, (double)x);
                    sum += x;
                    squares += (double)x * x;
                }
                double error = 6 / sqrt((double)n); // six standard deviations of the mean, and more
                CHECK(fabs(sum / (double)n) < error && fabs(squares / (double)n - 1 / 3.0) < error);
            }
            free(host);
        }
        model_close(&m);
    }
    test_end("test_cublas_cache_is_filled_for_the_benchmark");
}

// Stopped and started with caches of other sizes, one of them refused: the same token each time, and no memory lost.
static void test_cublas_starts_again_with_another_cache(void) {
    Model m;
    Error err = {""};
    int token = 300, choice = -1;
    size_t before = 0, after = 0, total;
    if (start(&m, "cublas", PRECISION_BF16, 1, 100)) {
        for (int i = 0; i < 6; i++) {
            Error refused = {""};
            model_stop(&m);
            if (i == 1) cudaMemGetInfo(&before, &total);
            CHECK(!model_start(&m, NULL, PRECISION_BF16, MAX_SLOTS, 1 << 22, &refused));
            CHECK(strstr(refused.text, "are free"));
            model_stop(&m);
            if (!model_start(&m, NULL, PRECISION_BF16, 1 + i, 100 + 100 * i, &err)) test_fail("%s", err.text);
            if (!model_prefill(&m, 0, &token, 1, 1, &err)) test_fail("%s", err.text);
            if (i == 0) choice = m.choice[0];
            CHECK(m.choice[0] >= 0 && m.choice[0] == choice);
        }
        model_stop(&m);
        cudaMemGetInfo(&after, &total);
        if (before != after) test_fail("%zu bytes free before, %zu after", before, after);
    }
    model_close(&m);
    test_end("test_cublas_starts_again_with_another_cache");
}

int main(void) {
    void (*tests[])(void) = {
        test_cublas_1000_steps_leave_memory_unchanged, test_cublas_logits_equal_the_cpus,
        test_cublas_decode_continues_prefill,          test_cublas_nan_weight_is_noticed,
        test_cublas_cache_is_filled_for_the_benchmark, test_cublas_starts_again_with_another_cache};
    const char *names[] = {
        "test_cublas_1000_steps_leave_memory_unchanged", "test_cublas_logits_equal_the_cpus",
        "test_cublas_decode_continues_prefill",          "test_cublas_nan_weight_is_noticed",
        "test_cublas_cache_is_filled_for_the_benchmark", "test_cublas_starts_again_with_another_cache"};
    int n = 0;
    cudaError_t status = cudaGetDeviceCount(&n);
    if (status != cudaSuccess || n == 0) skip_reason = "no GPU";
    for (size_t i = 0; i < sizeof tests / sizeof *tests; i++)
        if (skip_reason)
            test_skip(names[i], skip_reason);
        else
            tests[i]();
    return tests_summary();
}
