// Draws on the GPU: the id is the one that sample_token chooses, for rows of many kinds, alone and many at once.
#include <math.h>
#include <string.h>

#include <vector>

#include "../model/cuda/sample.h"
extern "C" {
#include "../model/logits.h"
}
#include "check.h"

#define CHECK_CUDA(call) \
    do { \
        cudaError_t status_ = (call); \
        if (status_ != cudaSuccess) test_fail("%s: %s", #call, cudaGetErrorString(status_)); \
    } while (0)

enum { MOST = 256 }; // rows at once

static uint64_t state = 1;

static double uniform(void) {
    return random_uniform(&state);
}
static int below(int n) {
    return (int)(uniform() * n);
}
static double normal(void) {
    return sqrt(-2 * log(1 - uniform())) * cos(6.283185307179586 * uniform());
}

enum { FLAT, PEAKED, TIES, EQUAL, NEARLY_EQUAL, SHIFTED, TWO_HUGE, ZEROS, WIDE, N_KINDS };
static const char *const kinds[N_KINDS] = {"flat",    "peaked",   "ties",  "equal", "nearly equal",
                                           "shifted", "two huge", "zeros", "wide"};

static void fill_row(float *logits, int n, int kind) {
    for (int i = 0; i < n; i++) {
        float x = (float)normal();
        switch (kind) {
        case FLAT:
            logits[i] = 0.8f * x;
            break;
        case PEAKED:
            logits[i] = 3 * x + (below(n) < 8 ? 12 : 0);
            break;
        case TIES:
            logits[i] = roundf(4 * x) / 4;
            break;
        case EQUAL:
            logits[i] = 2.5f;
            break;
        case NEARLY_EQUAL:
            logits[i] = i % 2 ? 5 : 5 + 1e-6f * x;
            break;
        case SHIFTED:
            logits[i] = 20 + 0.01f * x;
            break;
        case TWO_HUGE:
            logits[i] = -1e30f;
            break;
        case ZEROS:
            logits[i] = below(3) == 0 ? 1 : below(2) ? 0.0f : -0.0f;
            break;
        case WIDE:
            logits[i] = 1e20f * x;
            break;
        }
    }
    if (kind == TWO_HUGE) logits[n / 3] = logits[n - 1] = 3e38f;
}

static SamplerConfig random_config(int vocab) {
    static const float temperatures[] = {0.8f, 0.8f, 1, 0.1f, 1e-6f, 2, 3e38f},
                       top_ps[] = {1, 0.9f, 0.9f, 0.5f, 1e-6f, 0, 0.9999f}, min_ps[] = {0, 0, 0.05f, 0.5f, 1};
    const int top_ks[] = {0, 0, 1, 40, 5000, vocab - 1, vocab};
    SamplerConfig config = {};
    config.temperature = temperatures[below(7)];
    config.top_p = top_ps[below(7)];
    config.min_p = min_ps[below(5)];
    config.top_k = top_ks[below(7)];
    return config;
}

static double random_u(void) {
    int kind = below(8);
    return kind == 0 ? 0 : kind == 1 ? 0x1.fffffffffffffp-1 : uniform();
}

// Rows of one vocabulary, on both sides, and where draws work.
struct Rows {
    int vocab, n;
    std::vector<float> host;
    std::vector<int> argmax, kind;
    float *device = NULL;
    SampleBuffers buffers = {};
    cudaStream_t stream = NULL;

    Rows(int vocab, int n) : vocab(vocab), n(n), host((size_t)n * vocab), argmax(n), kind(n) {
        for (int r = 0; r < n; r++) {
            fill_row(row(r), vocab, kind[r] = r % N_KINDS);
            argmax[r] = ::argmax(row(r), vocab);
        }
        CHECK_CUDA(cudaMalloc((void **)&device, host.size() * sizeof(float)));
        CHECK_CUDA(cudaMemcpy(device, host.data(), host.size() * sizeof(float), cudaMemcpyHostToDevice));
        CHECK_CUDA(cudaMalloc((void **)&buffers.bins, MOST * sizeof *buffers.bins));
        CHECK_CUDA(cudaMemset(buffers.bins, 0, MOST * sizeof *buffers.bins));
        CHECK_CUDA(cudaMalloc((void **)&buffers.jobs, MOST * sizeof *buffers.jobs));
        CHECK_CUDA(cudaMallocHost((void **)&buffers.jobs_host, MOST * sizeof *buffers.jobs_host));
        CHECK_CUDA(cudaMallocHost((void **)&buffers.ids_host, MOST * sizeof *buffers.ids_host));
        CHECK_CUDA(cudaStreamCreate(&stream));
        CHECK_CUDA(cudaDeviceSynchronize());
    }
    ~Rows() {
        cudaFree(device);
        cudaFree(buffers.bins);
        cudaFree(buffers.jobs);
        cudaFreeHost(buffers.jobs_host);
        cudaFreeHost(buffers.ids_host);
        cudaStreamDestroy(stream);
    }
    float *row(int r) {
        return host.data() + (size_t)r * vocab;
    }

    // Draws from `count` of the rows at once, each with settings of its own, and compares.
    void check(int count) {
        std::vector<SamplerConfig> configs(count);
        std::vector<SampleRow> rows(count);
        std::vector<int> ids(count, -1);
        Error err = {""};
        for (int i = 0; i < count; i++) {
            configs[i] = random_config(vocab);
            rows[i] = {below(n), &configs[i], random_u()};
        }
        if (!sample_rows(&buffers, device, vocab, argmax.data(), rows.data(), count, ids.data(), stream, &err))
            test_fail("%s", err.text);
        for (int i = 0; i < count; i++) {
            const SamplerConfig *c = &configs[i];
            int want = sample_token(c, row(rows[i].row), vocab, rows[i].u);
            if (ids[i] != want)
                test_fail("%d of %d, vocabulary %d, %s, temperature %g top_k %d top_p %g min_p %g u %.17g: id %d, "
                          "expected %d",
                          i, count, vocab, kinds[kind[rows[i].row]], (double)c->temperature, c->top_k, (double)c->top_p,
                          (double)c->min_p, rows[i].u, ids[i], want);
        }
    }
};

static void test_draws_equal_sample_token(void) {
    static const int vocabs[] = {1, 2, 300, 32000, 128256, 150001};
    static const int counts[] = {1, 2, 3, 8, 17, 64, 256};
    for (int vocab : vocabs) {
        Rows rows(vocab, vocab > 10000 ? 2 * N_KINDS : 64);
        for (int count : counts)
            for (int round = 0; round < (count == 1 ? 100 : 4); round++) rows.check(count);
    }
    test_end("test_draws_equal_sample_token");
}

// More ids than a block may add up in 32 bits, and than there are parts of 32 ids.
static void test_draws_of_a_large_vocabulary(void) {
    Rows rows(700000, N_KINDS);
    for (int round = 0; round < 10; round++) rows.check(16);
    test_end("test_draws_of_a_large_vocabulary");
}

// Between calls the sums are zero, whatever was drawn.
static void test_draws_leave_sums_at_zero(void) {
    Rows rows(32000, N_KINDS);
    std::vector<SampleBins> bins(MOST), zero(MOST);
    memset((void *)zero.data(), 0, MOST * sizeof(SampleBins));
    for (int round = 0; round < 20; round++) {
        rows.check(1 + below(MOST));
        CHECK_CUDA(cudaMemcpy(bins.data(), rows.buffers.bins, MOST * sizeof(SampleBins), cudaMemcpyDeviceToHost));
        CHECK(memcmp(bins.data(), zero.data(), MOST * sizeof(SampleBins)) == 0);
    }
    test_end("test_draws_leave_sums_at_zero");
}

// 128,256 ids at random, drawn in the shares of their probabilities: by 64 groups of ids, Pearson's statistic.
static void test_frequencies_of_draws(void) {
    enum { VOCAB = 128256, GROUPS = 64, ROUNDS = 400 };
    Rows rows(VOCAB, 1); // flat
    SamplerConfig config = {};
    config.temperature = 0.8f;
    config.top_p = 1;
    double want[GROUPS] = {0}, sum = 0, statistic = 0;
    int count[GROUPS] = {0}, ids[MOST];
    for (int i = 0; i < VOCAB; i++) {
        double p = exp((double)rows.host[i] / (double)config.temperature);
        want[i % GROUPS] += p;
        sum += p;
    }
    SampleRow draws[MOST];
    Error err = {""};
    for (int round = 0; round < ROUNDS; round++) {
        for (int i = 0; i < MOST; i++) draws[i] = {0, &config, uniform()};
        if (!sample_rows(&rows.buffers, rows.device, VOCAB, rows.argmax.data(), draws, MOST, ids, rows.stream, &err))
            test_fail("%s", err.text);
        for (int i = 0; i < MOST; i++) count[ids[i] % GROUPS]++;
    }
    for (int g = 0; g < GROUPS; g++) {
        double expected = want[g] / sum * ROUNDS * MOST;
        statistic += (count[g] - expected) * (count[g] - expected) / expected;
    }
    double freedom = GROUPS - 1, bound = freedom + 5 * sqrt(2 * freedom) + 10; // five standard deviations, and its skew
    if (!(statistic <= bound)) test_fail("chi-square %.1f, expected at most %.1f", statistic, bound);
    test_end("test_frequencies_of_draws");
}

int main(void) {
    static const struct {
        const char *name;
        void (*run)(void);
    } tests[] = {{"test_draws_equal_sample_token", test_draws_equal_sample_token},
                 {"test_draws_of_a_large_vocabulary", test_draws_of_a_large_vocabulary},
                 {"test_draws_leave_sums_at_zero", test_draws_leave_sums_at_zero},
                 {"test_frequencies_of_draws", test_frequencies_of_draws}};
    int n = 0;
    cudaError_t status = cudaGetDeviceCount(&n);
    const char *skip_reason = status != cudaSuccess || n == 0 ? "no GPU" : NULL;
    for (size_t i = 0; i < sizeof tests / sizeof *tests; i++) {
        if (!test_wanted(tests[i].name)) continue;
        if (skip_reason)
            test_skip(tests[i].name, skip_reason);
        else
            tests[i].run();
    }
    return tests_summary();
}
