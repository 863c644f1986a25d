// The sampler: its random numbers, what each filter keeps, and how often each id comes.
#include "../model/generate/sampler.h"

#include <math.h>

#include "../model/generate/sampler_weights.h"
#include "../model/logits.h"
#include "check.h"

#define LENGTH(array) ((int)(sizeof(array) / sizeof *(array)))

// ---- what the tests share -------------------------------------------------------------------------------------------

static uint64_t data_state = 1; // of the test data: another generator than the one under test

static double data_uniform(void) {
    data_state = data_state * 6364136223846793005u + 1442695040888963407u;
    return (double)(data_state >> 11) * 0x1p-53;
}

static void random_logits(float *logits, int n, float range) {
    for (int i = 0; i < n; i++) logits[i] = (float)(2 * data_uniform() - 1) * range;
}

static Sampler sampler_of(SamplerConfig config, int n, uint64_t seed, uint64_t stream) {
    Sampler s;
    Error err = {""};
    if (!sampler_init(&s, config, n, seed, stream, &err)) test_fail("%s", err.text);
    return s;
}

// ---- random numbers
// ---------------------------------------------------------------------------------------------------

// The first outputs of SplitMix64 as published: seed 1234567 on rosettacode.org (Pseudo-random numbers/Splitmix64), and
// seed 0 in the tests of several libraries; checked against Vigna's splitmix64.c, written anew in Python.
static void test_random_uniform_is_splitmix64(void) {
    static const uint64_t from_1234567[] = {6457827717110365317u, 3203168211198807973u, 9817491932198370423u,
                                            4593380528125082431u, 16408922859458223821u};
    static const uint64_t from_0[] = {0xE220A8397B1DCDAFu, 0x6E789E6AA1B965F4u, 0x06C45D188009454Fu};
    uint64_t state = 1234567;
    for (int i = 0; i < LENGTH(from_1234567); i++)
        CHECK(random_uniform(&state) == (double)(from_1234567[i] >> 11) / 0x1p53);
    state = 0;
    for (int i = 0; i < LENGTH(from_0); i++) CHECK(random_uniform(&state) == (double)(from_0[i] >> 11) / 0x1p53);
    test_end("test_random_uniform_is_splitmix64");
}

static void test_random_uniform_stays_below_one(void) {
    uint64_t state = 5;
    double sum = 0, squares = 0;
    enum { N = 1000000 };
    for (int i = 0; i < N; i++) {
        double u = random_uniform(&state);
        CHECK(u >= 0 && u < 1);
        sum += u;
        squares += u * u;
    }
    // The mean of N has a standard deviation of 1/√(12 N), that of squares √(4/45/N): five of them.
    CHECK(fabs(sum / N - 0.5) < 5 / sqrt(12.0 * N));
    CHECK(fabs(squares / N - 1 / 3.0) < 5 * sqrt(4 / 45.0 / N));
    test_end("test_random_uniform_stays_below_one");
}

static void test_same_seed_same_sequence(void) {
    enum { N = 50, DRAWS = 200 };
    float logits[N];
    random_logits(logits, N, 1);
    SamplerConfig config = {.temperature = 1, .top_p = 1};
    Sampler a = sampler_of(config, N, 42, 3), b = sampler_of(config, N, 42, 3);
    for (int i = 0; i < DRAWS; i++) CHECK(sampler_next(&a, logits) == sampler_next(&b, logits));
    sampler_free(&a);
    sampler_free(&b);
    test_end("test_same_seed_same_sequence");
}

// Of 200 draws among 50 likely ids, two unrelated sequences share about 4; sharing 30 is what chance never does.
static void test_seeds_and_streams_differ(void) {
    enum { N = 50, DRAWS = 200, RUNS = 12 };
    float logits[N] = {0};
    int draws[RUNS][DRAWS];
    for (int r = 0; r < RUNS; r++) { // four seeds next to each other, three streams of each
        Sampler s = sampler_of((SamplerConfig){.temperature = 1, .top_p = 1}, N, 7 + (uint64_t)r / 3, (uint64_t)r % 3);
        for (int i = 0; i < DRAWS; i++) draws[r][i] = sampler_next(&s, logits);
        sampler_free(&s);
    }
    for (int a = 0; a < RUNS; a++)
        for (int b = 0; b < RUNS; b++)
            for (int shift = 0; shift <= 3; shift++) { // nor may one be the other a few draws later
                int same = 0;
                for (int i = 0; i + shift < DRAWS; i++) same += draws[a][i + shift] == draws[b][i];
                if (a != b && same >= 30)
                    test_fail("seed and stream %d and %d share %d of %d draws", a, b, same, DRAWS - shift);
            }
    test_end("test_seeds_and_streams_differ");
}

// ---- greedy and the helpers
// ---------------------------------------------------------------------------------------------

static void test_greedy_takes_the_lowest_of_equals(void) {
    float logits[] = {-3, 2, 7, 7, -1, 7, 7};
    CHECK(argmax(logits, 7) == 2);
    CHECK(argmax(logits, 2) == 1 && argmax(logits, 1) == 0);
    float equal[100] = {0}, negative[] = {-5, -4, -4.5f}, zeros[] = {-0.0f, 0.0f};
    CHECK(argmax(equal, 100) == 0 && argmax(negative, 3) == 1 && argmax(zeros, 2) == 0);
    // At temperature 0 nothing else matters, and no random number is used up.
    Sampler s = sampler_of((SamplerConfig){.temperature = 0, .top_k = 3, .top_p = 0.1f, .min_p = 0.5f}, 7, 1, 0);
    uint64_t state = s.state;
    for (int i = 0; i < 20; i++) CHECK(sampler_next(&s, logits) == 2);
    CHECK(s.state == state);
    sampler_free(&s);
    test_end("test_greedy_takes_the_lowest_of_equals");
}

static void test_find_not_finite(void) {
    float logits[65];
    random_logits(logits, 65, 1e30f);
    CHECK(find_not_finite(logits, 65) == -1);
    logits[64] = NAN;
    CHECK(find_not_finite(logits, 65) == 64 && find_not_finite(logits, 64) == -1);
    logits[10] = -INFINITY;
    CHECK(find_not_finite(logits, 65) == 10);
    logits[0] = INFINITY;
    CHECK(find_not_finite(logits, 65) == 0);
    test_end("test_find_not_finite");
}

static void test_log_sum_exp(void) {
    double worst = 0;
    for (int round = 0; round < 200; round++) {
        float logits[1000];
        int n = 1 + (int)(data_uniform() * 1000);
        random_logits(logits, n, round % 2 ? 20 : 1e4f);
        long double max = logits[argmax(logits, n)], sum = 0;
        for (int i = 0; i < n; i++) sum += expl((long double)logits[i] - max);
        double want = (double)(max + logl(sum)), got = log_sum_exp(logits, n);
        // n float64 roundings of a sum of one sign, under a logarithm; exp, log and the last sum.
        double bound = (n + 4) * 0x1p-53 * (1 + fabs(want)), error = fabs(got - want);
        if (!(error <= bound)) test_fail("n %d: %.17g, expected %.17g", n, got, want);
        if (error / bound > worst) worst = error / bound;
    }
    float one = -1234.5f, large[] = {3e38f, 3e38f};
    CHECK(log_sum_exp(&one, 1) == -1234.5);
    CHECK(log_sum_exp(large, 2) == (double)3e38f); // + log 2, which vanishes
    test_end("test_log_sum_exp");
    printf("   largest error: %.3f of its bound\n", worst);
}

static const float *sort_logits;

static int by_logit_then_id(const void *a, const void *b) {
    int x = *(const int *)a, y = *(const int *)b;
    if (sort_logits[x] != sort_logits[y]) return sort_logits[x] < sort_logits[y] ? 1 : -1;
    return x - y;
}

static void sort_ids(const float *logits, int n, int *ids) {
    for (int i = 0; i < n; i++) ids[i] = i;
    sort_logits = logits;
    qsort(ids, (size_t)n, sizeof *ids, by_logit_then_id);
}

static void test_top_ids_are_in_order(void) {
    for (int round = 0; round < 500; round++) {
        float logits[100];
        int n = 1 + (int)(data_uniform() * 100), k = 1 + (int)(data_uniform() * n), ids[100], want[100];
        random_logits(logits, n, 5);
        if (round % 2) // many equal ones
            for (int i = 0; i < n; i++) logits[i] = roundf(logits[i]);
        sort_ids(logits, n, want);
        top_ids(logits, n, k, ids);
        if (memcmp(ids, want, (size_t)k * sizeof *ids) != 0) test_fail("round %d: the %d largest of %d", round, k, n);
    }
    test_end("test_top_ids_are_in_order");
}

// ---- what is kept
// -----------------------------------------------------------------------------------------------------

// HuggingFace's warpers in float64, in its order: temperature, top-k, top-p, min-p, each on what the one before left,
// renormalised. p[id] becomes the probability, 0 where dropped. False if float32 could decide some id the other way.
static bool warp(const float *logits, int n, const SamplerConfig *config, double *p) {
    enum { MAX = 8192 };
    static int ids[MAX];
    static double weight[MAX];
    const double margin = 2e-5; // of a cumulative sum of up to MAX float32 probabilities, and then some
    sort_ids(logits, n, ids);
    int kept = config->top_k > 0 && config->top_k < n ? config->top_k : n;
    while (kept < n && logits[ids[kept]] == logits[ids[kept - 1]]) kept++; // all that are as likely as the k-th
    bool clear = true;
    double max = (double)logits[ids[0]], sum = 0;
    for (int i = 0; i < kept; i++) sum += weight[i] = exp(((double)logits[ids[i]] - max) / (double)config->temperature);

    if (config->top_p < 1) { // drop what lies beyond the first p; one always stays
        double before = 0;
        int i = 0;
        for (; i < kept && (i == 0 || before / sum < (double)config->top_p); i++) {
            if (i && fabs(before / sum - (double)config->top_p) < margin) clear = false;
            before += weight[i];
        }
        if (i < kept && fabs(before / sum - (double)config->top_p) < margin) clear = false;
        kept = i;
    }
    int all = kept;
    if (config->min_p > 0)
        for (kept = 0; kept < all && weight[kept] >= (double)config->min_p * weight[0]; kept++)
            if (fabs(weight[kept] - (double)config->min_p) < margin) clear = false;
    if (kept < all && fabs(weight[kept] - (double)config->min_p) < margin) clear = false;
    sum = 0;
    for (int i = 0; i < kept; i++) sum += weight[i];
    for (int i = 0; i < n; i++) p[i] = 0;
    for (int i = 0; i < kept; i++) p[ids[i]] = weight[i] / sum;
    return clear;
}

// Draws until every id of the wanted set must have come, and compares what came.
static void check_support(const char *name, bool k, bool p, bool m) {
    enum { N = 24, CASES = 40 };
    int tried = 0, cut = 0;
    for (int round = 0; tried < CASES && round < 100 * CASES; round++) {
        float logits[N];
        double want[N], least = 1;
        random_logits(logits, N, 1.5f);
        SamplerConfig config = {.temperature = 0.5f + (float)data_uniform(), .top_p = 1};
        if (k) config.top_k = 1 + (int)(data_uniform() * (N + 3)); // now and then more than there are
        if (p) config.top_p = (float)data_uniform();
        if (m) config.min_p = (float)data_uniform();
        if (!warp(logits, N, &config, want)) continue;
        int kept = 0;
        for (int i = 0; i < N; i++)
            if (want[i] > 0) {
                kept++;
                least = fmin(least, want[i]);
            }
        int draws = (int)(30 / least); // each of the set stays away with a probability of e^-30
        if (draws > 30000) continue;
        tried++;
        cut += kept < N;
        bool came[N] = {false};
        Sampler s = sampler_of(config, N, (uint64_t)round, 0);
        for (int i = 0; i < draws; i++) came[sampler_next(&s, logits)] = true;
        sampler_free(&s);
        for (int i = 0; i < N; i++)
            if (came[i] != (want[i] > 0))
                test_fail("temperature %g top_k %d top_p %g min_p %g: id %d of p %g %s", (double)config.temperature,
                          config.top_k, (double)config.top_p, (double)config.min_p, i, want[i],
                          came[i] ? "came" : "never came");
    }
    CHECK(tried == CASES && (cut > CASES / 2 || !(k || p || m)));
    test_end(name);
}

// An id that the random number just below one chooses: the last of what is kept.
static uint64_t state_of_nearly_one(void) {
    static uint64_t state;
    for (;; state++) {
        uint64_t after = state;
        if (random_uniform(&after) > 1 - 1e-6) return state;
    }
}

// Large vocabularies, where the sampler does not sort what cannot be in the nucleus: the least likely id that it can
// choose is the last of the nucleus that a full sort in float64 finds. (It draws by inversion, most likely first.)
static void test_top_p_shortcut_keeps_the_nucleus(void) {
    static const float top_ps[] = {0, 0.1f, 0.5f, 0.9f, 0.95f, 0.99f, 0.999f};
    enum { MAX = 8000 };
    static float logits[MAX];
    static double want[MAX];
    uint64_t state = state_of_nearly_one();
    int tried = 0;
    for (int round = 0; round < 400; round++) {
        int n = round % 4 == 0 ? 2 + round / 4 : 100 + (int)(data_uniform() * (MAX - 100));
        static const float ranges[] = {0.01f, 1, 3, 8};
        random_logits(logits, n, ranges[round / 4 % LENGTH(ranges)]);
        if (round % 5 == 4)
            for (int i = 0; i < n; i++) logits[i] = roundf(logits[i] * 4) / 4; // ties: the lower ids are kept
        SamplerConfig config = {.temperature = 0.3f + (float)data_uniform(), .top_p = top_ps[round % LENGTH(top_ps)]};
        if (!warp(logits, n, &config, want)) continue;
        int last = -1;
        for (int i = 0; i < n; i++)
            if (want[i] > 0 && (last < 0 || logits[i] < logits[last] || (logits[i] == logits[last]))) last = i;
        if (want[last] < 5e-6) continue; // less than what the random number leaves
        tried++;
        Sampler s = sampler_of(config, n, 1, 0);
        s.state = state;
        int got = sampler_next(&s, logits);
        if (got != last)
            test_fail("n %d temperature %g top_p %g: the last is id %d of p %g, expected %d of %g", n,
                      (double)config.temperature, (double)config.top_p, got, want[got], last, want[last]);
        sampler_free(&s);
    }
    CHECK(tried > 200);
    test_end("test_top_p_shortcut_keeps_the_nucleus");
}

// The ids in any order at first, equal ones among them: which k are selected, and where each then lies in the draw by
// inversion, most likely first.
static void test_top_k_of_many_keeps_the_right_set(void) {
    enum { MAX = 8000, STATES = 8 };
    static float logits[MAX];
    static int ids[MAX];
    int tried = 0;
    for (int round = 0; round < 300; round++) {
        int n = round % 3 == 0 ? 2 + round / 3 : 100 + (int)(data_uniform() * (MAX - 100));
        int k = 1 + (int)(data_uniform() * (n - 1)), shape = round / 3 % 6;
        random_logits(logits, n, 2);
        for (int i = 0; i < n; i++) {
            float slope = (float)i / (float)n;
            if (shape == 1) logits[i] = slope;
            if (shape == 2) logits[i] = -slope;
            if (shape == 3) logits[i] = 0;
            if (shape == 4) logits[i] = roundf(logits[i]);   // few values, many of each
            if (shape == 5) logits[i] = fabsf(slope - 0.5f); // down and up
        }
        sort_ids(logits, n, ids);
        Sampler s = sampler_of((SamplerConfig){.temperature = 1, .top_k = k, .top_p = 1}, n, 1, 0);
        while (k < n && logits[ids[k]] == logits[ids[k - 1]]) k++; // all that are as likely as the k-th
        double sum = 0, max = (double)logits[ids[0]];
        for (int i = 0; i < k; i++) sum += exp((double)logits[ids[i]] - max);
        for (int draw = 0; draw <= STATES; draw++) {
            uint64_t state = draw == STATES ? state_of_nearly_one() : (uint64_t)(round * STATES + draw), after = state;
            double u = random_uniform(&after), below = 0;
            int want = 0;
            for (; want < k - 1 && (below += exp((double)logits[ids[want]] - max) / sum) <= u; want++) {
            }
            double width = exp((double)logits[ids[want]] - max) / sum, start = below > u ? below - width : below;
            const double margin = 1e-6; // what float32 probabilities can move an edge by
            if (u - start < margin || (want < k - 1 && start + width - u < margin) || width < 2 * margin) continue;
            s.state = state;
            int got = sampler_next(&s, logits);
            if (got != ids[want])
                test_fail("round %d: %d of %d, u %.7f gives id %d, expected %d", round, k, n, u, got, ids[want]);
            tried++;
        }
        sampler_free(&s);
    }
    CHECK(tried > 1000);
    test_end("test_top_k_of_many_keeps_the_right_set");
}

// ---- how often
// --------------------------------------------------------------------------------------------------------

// Pearson's statistic of n kept ids has n-1 degrees of freedom, so mean n-1 and variance 2(n-1): five standard
// deviations and a little for its skew. The seed is fixed; a wrong distribution is far outside.
static void check_frequencies(const char *name, SamplerConfig config) {
    enum { N = 20, DRAWS = 200000 };
    float logits[N];
    double want[N], statistic = 0;
    int count[N] = {0}, kept = 0;
    data_state = 77;
    do random_logits(logits, N, 2);
    while (!warp(logits, N, &config, want));
    Sampler s = sampler_of(config, N, 2024, 0);
    for (int i = 0; i < DRAWS; i++) count[sampler_next(&s, logits)]++;
    sampler_free(&s);
    for (int i = 0; i < N; i++) {
        double expected = want[i] * DRAWS;
        if (expected > 0) {
            statistic += (count[i] - expected) * (count[i] - expected) / expected;
            kept++;
        } else
            CHECK(count[i] == 0);
    }
    double freedom = kept - 1, bound = freedom + 5 * sqrt(2 * freedom) + 10;
    if (kept < 2 || !(statistic <= bound))
        test_fail("chi-square %.1f of %d ids, expected at most %.1f", statistic, kept, bound);
    test_end(name);
    printf("   chi-square: %.3f of its bound\n", statistic / bound);
}

// One likely id, and a long tail whose every id is lost when it is added to a float32 near one, but which as a whole
// has 0.3 %: where the random number falls is where the id lies, whatever the rounding. (The sampler draws by
// inversion, by id.)
static void test_long_tail_keeps_its_weight(void) {
    enum { N = 128256, LIKELY = 1000 };
    float *logits = malloc(N * sizeof *logits), gap = 17.6f;
    for (int i = 0; i < N; i++) logits[i] = i == LIKELY ? gap : 0;
    double tail = exp(-(double)gap), sum = 1 + (N - 1) * tail;
    Sampler s = sampler_of((SamplerConfig){.temperature = 1, .top_p = 1}, N, 1, 0);
    int tried = 0;
    for (uint64_t state = 0; tried < 40; state++) {
        uint64_t after = state;
        double u = random_uniform(&after);
        double want = (u * sum - 1) / tail; // of the ids beyond the likely one, as a real number
        if (want < LIKELY + 1) continue;
        tried++;
        s.state = state;
        int got = sampler_next(&s, logits);
        // Each p is a float32 of a relative error of at most 4 × 2^-24 (quotient and exp), a random number of 24 bits
        // or more is wrong by 2^-24: together 5 × 2^-24 of all, in ids of the tail.
        double bound = 5 * 0x1p-24 * sum / tail + 1;
        if (fabs(got - want) > bound) test_fail("u %.9f gives id %d, expected %.0f ± %.0f", u, got, want, bound);
    }
    sampler_free(&s);
    free(logits);
    test_end("test_long_tail_keeps_its_weight");
}

static void test_extreme_logits_and_temperatures(void) {
    float logits[] = {-3e38f, 3e38f, 0, 2.9e38f}, ordinary[] = {1, 3, 2, 2.999f};
    static const float temperatures[] = {1e-38f, 1e-6f, 1e-4f};
    for (int i = 0; i < LENGTH(temperatures); i++)
        for (int k = 0; k < 2; k++) {
            SamplerConfig config = {.temperature = temperatures[i], .top_k = 3 * k, .top_p = 0.9f, .min_p = 0.1f};
            Sampler s = sampler_of(config, 4, 9, 0);
            for (int draw = 0; draw < 50; draw++)
                CHECK(sampler_next(&s, logits) == 1 && sampler_next(&s, ordinary) == 1);
            sampler_free(&s);
        }
    // All alike where the temperature is beyond every difference.
    Sampler s = sampler_of((SamplerConfig){.temperature = 3e38f, .top_p = 1, .min_p = 1}, 4, 9, 0);
    bool came[4] = {false};
    for (int draw = 0; draw < 200; draw++) came[sampler_next(&s, ordinary)] = true;
    CHECK(came[0] && came[1] && came[2] && came[3]);
    sampler_free(&s);
    test_end("test_extreme_logits_and_temperatures");
}

// min_p 1 keeps the most likely alone, top_k 1 and top_p 0 too, and a vocabulary of one leaves no choice.
static void test_smallest_sets(void) {
    float logits[] = {0.5f, 1.5f, 1.25f, -2};
    static const SamplerConfig configs[] = {{.temperature = 1, .top_p = 1, .min_p = 1},
                                            {.temperature = 1, .top_k = 1, .top_p = 1},
                                            {.temperature = 2, .top_p = 0},
                                            {.temperature = 2, .top_k = 3, .top_p = 0}};
    for (int i = 0; i < LENGTH(configs); i++) {
        Sampler s = sampler_of(configs[i], 4, 3, 0), one = sampler_of(configs[i], 1, 3, 0);
        for (int draw = 0; draw < 100; draw++) CHECK(sampler_next(&s, logits) == 1 && sampler_next(&one, logits) == 0);
        sampler_free(&s);
        sampler_free(&one);
    }
    test_end("test_smallest_sets");
}

// Each id that the sequence has once, whatever the sign; the caller's logits stay,
// and of equals the lowest id is taken.
static void test_repetition_penalty(void) {
    const float logits[6] = {3, -1, 2.5f, 2, -2, 2};
    const int prompt[4] = {0, 0, 4, 0}, second = 2;
    float before[6];
    memcpy(before, logits, sizeof logits);
    const SamplerConfig config = {.repetition_penalty = 1.25f}, off = {.repetition_penalty = 1}, none = {.top_p = 1};
    CHECK(sampler_reads_logits(&config) && !sampler_reads_logits(&off) && !sampler_reads_logits(&none));
    Sampler s = sampler_of(config, 6, 1, 0);
    CHECK(sampler_next(&s, logits) == 0); // nothing has been seen
    sampler_see(&s, prompt, 4);
    CHECK(sampler_next(&s, logits) == 2); // 3 / 1.25 = 2.4
    sampler_see(&s, &second, 1);
    CHECK(sampler_next(&s, logits) == 0); // 2.5 / 1.25 = 2, once more than 2.4 before
    const float equal[6] = {2.5f, -1, 2.5f, 2, -2, 2};
    CHECK(sampler_next(&s, equal) == 0); // 2, as of 2, 3 and 5
    CHECK(memcmp(before, logits, sizeof logits) == 0);
    sampler_free(&s);
    // A penalty under 1 does the contrary, and a negative logit goes the other way.
    s = sampler_of((SamplerConfig){.repetition_penalty = 0.5f}, 6, 1, 0);
    const float negative[6] = {-3, -2, -2.5f, -4, -5, -6};
    sampler_see(&s, prompt, 1);
    CHECK(sampler_next(&s, negative) == 0); // -1.5
    sampler_free(&s);
    // Before the temperature and all filters: of two equals the one that came has e^(-1) of the other's weight.
    s = sampler_of((SamplerConfig){.temperature = 2, .top_p = 1, .repetition_penalty = 2}, 2, 1, 0);
    const float two[2] = {4, 4};
    const int first = 0;
    enum { N = 100000 };
    int n = 0;
    sampler_see(&s, &first, 1);
    for (int i = 0; i < N; i++) n += sampler_next(&s, two) == 0;
    double p = exp(-1) / (1 + exp(-1));
    CHECK(fabs((double)n / N - p) < 5 * sqrt(p * (1 - p) / N));
    sampler_free(&s);
    test_end("test_repetition_penalty");
}

// ---- weights --------------------------------------------------------------------------------------------------------

// Within half a unit, and what the exponent (rounded to 2^-45, and by two operations) and the polynomial may be off.
static void test_weights_are_exponentials(void) {
    const double relative = 3e-14;
    double worst = 0;
    for (int round = 0; round < 300000; round++) {
        float max = (float)(data_uniform() - 0.5) * 60, temperature = expf((float)(data_uniform() - 0.5) * 8);
        float logit = max - (float)data_uniform() * 33 * temperature;
        WeightRule rule = {LOG2_E / (double)temperature, max, WEIGHT_BITS};
        long double want = ldexpl(expl(((long double)logit - max) / temperature), WEIGHT_BITS);
        double error = ((double)fabsl((long double)token_weight(logit, rule) - want) - 0.5) / (double)want / relative;
        if (!(error <= 1)) test_fail("%g below, temperature %g", (double)(max - logit), (double)temperature);
        if (error > worst) worst = error;
    }
    test_end("test_weights_are_exponentials");
    printf("   largest error beyond half a unit: %.3f of its bound\n", worst);
}

static void test_weights_at_the_ends(void) {
    static const float logits[] = {0, -30.6f, -44.3f, -44.4f, -745, -1e4f, -3e38f};
    WeightRule rule = {LOG2_E, 0, WEIGHT_BITS};
    CHECK(token_weight(0, rule) == (uint64_t)1 << WEIGHT_BITS && token_weight(-0.0f, rule) == token_weight(0, rule));
    CHECK(token_weight(-30.5f, rule) == 1); // 0.999 of one
    for (int i = 1; i < LENGTH(logits); i++) CHECK(token_weight(logits[i], rule) == (i == 1 ? 1 : 0));
    static const double scales[] = {1e-38, 1e45}; // temperatures of no use, and all that float32 can be apart
    for (int i = 0; i < 2; i++) {
        rule = (WeightRule){scales[i], 3.4e38f, WEIGHT_BITS};
        CHECK(token_weight(3.4e38f, rule) == (uint64_t)1 << WEIGHT_BITS);
    }
    CHECK(token_weight(-3.4e38f, rule) == 0);
    static const int sizes[] = {1, 300, 128256, 1 << 19, (1 << 19) + 1, 1 << 24};
    for (int i = 0; i < LENGTH(sizes); i++) {
        int bits = weight_bits(sizes[i]);
        CHECK((uint64_t)sizes[i] <= UINT64_MAX >> bits && (i < 4 ? bits == WEIGHT_BITS : bits > 38));
    }
    test_end("test_weights_at_the_ends");
}

// From one exponent to the next that is told apart, where the polynomial's range begins anew among others; and for
// neighbouring logits.
static void test_weights_descend(void) {
    static const double starts[] = {0, 0.25, 0.5, 1, 1.5, 7.5, 20.5, 43.5};
    for (int i = 0; i < LENGTH(starts); i++) {
        uint64_t last = UINT64_MAX;
        for (int k = 0; k < 4000; k++) {
            double exponent = starts[i] + (k - (starts[i] > 0 ? 2000 : 0)) * 0x1p-45;
            uint64_t weight = token_weight(-1, (WeightRule){exponent, 0, WEIGHT_BITS});
            CHECK(weight <= last);
            last = weight;
        }
    }
    for (int round = 0; round < 1000; round++) {
        WeightRule rule = {LOG2_E / (0.1 + data_uniform()), 0, WEIGHT_BITS};
        float logit = -(float)pow(2, 30 * (data_uniform() - 0.9));
        uint64_t last = token_weight(logit, rule);
        for (int k = 0; k < 100; k++) {
            logit = nextafterf(logit, -INFINITY);
            uint64_t weight = token_weight(logit, rule);
            CHECK(weight <= last);
            last = weight;
        }
    }
    test_end("test_weights_descend");
}

static void test_order_keys_ascend_as_logits_descend(void) {
    static const float logits[] = {3e38f, 7, 1, 1e-38f, 1e-45f, 0, -1e-45f, -1e-38f, -1, -7, -3e38f};
    for (int i = 0; i < LENGTH(logits) - 1; i++) CHECK(order_key(logits[i]) < order_key(logits[i + 1]));
    CHECK(order_key(-0.0f) == order_key(0.0f));
    test_end("test_order_keys_ascend_as_logits_descend");
}

// The choice by sorting and adding up in long double. -1: a sum so near an edge that rounding decides.
static int choice(const SamplerConfig *config, const float *logits, int n, double u) {
    enum { MAX = 4000 };
    static int ids[MAX];
    static long double weight[MAX];
    const long double margin = 1e-12L;
    sort_ids(logits, n, ids);
    int kept = config->top_k > 0 && config->top_k < n ? config->top_k : n;
    bool cut = kept < n || config->top_p < 1;
    while (kept < n && logits[ids[kept]] == logits[ids[kept - 1]]) kept++;
    long double max = (long double)logits[ids[0]], sum = 0;
    for (int i = 0; i < kept; i++) sum += weight[i] = expl(((long double)logits[ids[i]] - max) / config->temperature);
    if (config->top_p < 1) {
        long double least = config->top_p * sum, reached = 0;
        for (int i = 0; i < kept; i++) {
            reached += weight[i];
            if (fabsl(reached - least) < margin * sum) return -1;
            if (reached >= least) kept = i + 1;
        }
    }
    int likely = 0;
    for (; likely < kept && weight[likely] >= (long double)config->min_p; likely++) {
    }
    for (int i = 0; config->min_p > 0 && i < kept; i++)
        if (weight[i] != 1 && fabsl(weight[i] - (long double)config->min_p) < margin) return -1;
    kept = likely;
    sum = 0;
    for (int i = 0; i < kept; i++) sum += weight[i];
    if (!cut) { // in the order of ids
        static long double of_id[MAX];
        for (int i = 0; i < n; i++) of_id[ids[i]] = i < kept ? weight[i] : 0;
        for (int i = 0; i < n; i++) ids[i] = i;
        memcpy(weight, of_id, (size_t)n * sizeof *weight);
        kept = n;
    }
    long double drawn = u * sum, reached = 0;
    for (int i = 0; i < kept; i++) {
        reached += weight[i];
        if (fabsl(reached - drawn) < margin * sum) return -1;
        if (reached > drawn) return ids[i];
    }
    return -1;
}

static void test_choices_equal_those_by_sorting(void) {
    enum { MAX = 4000, ROUNDS = 1500 };
    static float logits[MAX];
    static const float temperatures[] = {0.01f, 0.8f, 1, 3}, top_ps[] = {1, 1e-6f, 0.3f, 0.9f, 0.999f},
                       min_ps[] = {0, 0, 0.02f, 0.5f};
    int compared = 0;
    for (int round = 0; round < ROUNDS; round++) {
        int n = round % 3 ? 1 + (int)(data_uniform() * 400) : 1 + (int)(data_uniform() * MAX), kind = round / 3 % 5;
        random_logits(logits, n, kind == 0 ? 0.1f : kind == 1 ? 3 : 12);
        for (int i = 0; i < n; i++) {
            if (kind == 3) logits[i] = roundf(logits[i]);  // many of each
            if (kind == 4 && i % 17) logits[i] = 12.5f;    // nearly all
            if (kind == 2 && i % 50 == 0) logits[i] += 20; // a few large ones
        }
        int k = (int)(data_uniform() * n) + 1;
        SamplerConfig config = {.temperature = temperatures[(int)(data_uniform() * 4)],
                                .top_k = round % 2 ? 0 : k,
                                .top_p = top_ps[(int)(data_uniform() * 5)],
                                .min_p = min_ps[(int)(data_uniform() * 4)]};
        double u = data_uniform();
        int want = choice(&config, logits, n, u), got = sample_token(&config, logits, n, u);
        CHECK(got >= 0 && got < n);
        if (want < 0) continue;
        compared++;
        if (got != want)
            test_fail("round %d: %d logits, temperature %g top_k %d top_p %g min_p %g u %.17g: id %d, expected %d",
                      round, n, (double)config.temperature, config.top_k, (double)config.top_p, (double)config.min_p, u,
                      got, want);
    }
    CHECK(compared > ROUNDS * 9 / 10);
    test_end("test_choices_equal_those_by_sorting");
}

// Equal logits have equal weights, so that every sum is a count: edges are exact, and so is what is on them.
static void test_equal_logits_are_counted(void) {
    enum { MAX = 1100000 };
    static const int sizes[] = {1, 2, 255, 256, 257, 1000, 128256, MAX};
    static const double us[] = {0, 0.25, 0.5, 0.75, 0x1.fffffffffffffp-1};
    float *logits = malloc(MAX * sizeof *logits);
    for (int i = 0; i < MAX; i++) logits[i] = i % 2 ? 0.0f : -0.0f;
    for (int i = 0; i < LENGTH(sizes); i++)
        for (int j = 0; j < LENGTH(us); j++)
            for (int half = 0; half < 2; half++) {
                SamplerConfig config = {.temperature = 0.7f, .top_p = half ? 0.5f : 1};
                int kept = half ? (sizes[i] + 1) / 2 : sizes[i], want = (int)(us[j] * kept);
                int got = sample_token(&config, logits, sizes[i], us[j]);
                if (got != want) test_fail("%d of %d, u %.17g: id %d, expected %d", kept, sizes[i], us[j], got, want);
            }
    free(logits);
    test_end("test_equal_logits_are_counted");
}

// What has no weight is never drawn, wherever it is in the order of ids; a u of 0 draws the first that has some.
static void test_tokens_without_weight(void) {
    const float logits[] = {-100, 5, -90, 4, -1e30f};
    for (int cut = 0; cut < 2; cut++) {
        SamplerConfig config = {.temperature = 1, .top_p = cut ? 0.999f : 1};
        CHECK(sample_token(&config, logits, 5, 0) == 1 && sample_token(&config, logits, 5, 0x1.fffffffffffffp-1) == 3);
    }
    test_end("test_tokens_without_weight");
}

int main(void) {
    test_random_uniform_is_splitmix64();
    test_random_uniform_stays_below_one();
    test_same_seed_same_sequence();
    test_seeds_and_streams_differ();
    test_greedy_takes_the_lowest_of_equals();
    test_find_not_finite();
    test_log_sum_exp();
    test_top_ids_are_in_order();
    check_support("test_temperature_alone_keeps_all", false, false, false);
    check_support("test_top_k_keeps_the_right_set", true, false, false);
    check_support("test_top_p_keeps_the_right_set", false, true, false);
    check_support("test_min_p_keeps_the_right_set", false, false, true);
    check_support("test_top_k_and_top_p_keep_the_right_set", true, true, false);
    check_support("test_all_filters_together_keep_the_right_set", true, true, true);
    test_top_p_shortcut_keeps_the_nucleus();
    test_top_k_of_many_keeps_the_right_set();
    check_frequencies("test_frequencies_at_temperature_1", (SamplerConfig){.temperature = 1, .top_p = 1});
    check_frequencies("test_frequencies_at_temperature_half", (SamplerConfig){.temperature = 0.5f, .top_p = 1});
    check_frequencies("test_frequencies_at_temperature_2", (SamplerConfig){.temperature = 2, .top_p = 1});
    check_frequencies("test_frequencies_after_top_k", (SamplerConfig){.temperature = 1.5f, .top_k = 7, .top_p = 1});
    check_frequencies("test_frequencies_after_top_p", (SamplerConfig){.temperature = 0.7f, .top_p = 0.9f});
    check_frequencies("test_frequencies_after_all_filters",
                      (SamplerConfig){.temperature = 1.3f, .top_k = 12, .top_p = 0.8f, .min_p = 0.2f});
    test_repetition_penalty();
    test_long_tail_keeps_its_weight();
    test_extreme_logits_and_temperatures();
    test_smallest_sets();
    test_weights_are_exponentials();
    test_weights_at_the_ends();
    test_weights_descend();
    test_order_keys_ascend_as_logits_descend();
    test_choices_equal_those_by_sorting();
    test_equal_logits_are_counted();
    test_tokens_without_weight();
    return tests_summary();
}
