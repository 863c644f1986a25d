#include "sampler.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "../logits.h"

static uint64_t splitmix64(uint64_t *state) {
    uint64_t z = *state += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
}

double random_uniform(uint64_t *state) {
    return (double)(splitmix64(state) >> 11) * 0x1p-53;
}

static bool has_penalty(const SamplerConfig *config) {
    return config->repetition_penalty != 0 && config->repetition_penalty != 1;
}

bool sampler_reads_logits(const SamplerConfig *config) {
    return config->temperature > 0 || has_penalty(config);
}

bool sampler_init(Sampler *s, SamplerConfig config, int vocab_size, uint64_t seed, uint64_t stream, Error *err) {
    *s = (Sampler){.config = config, .vocab_size = vocab_size, .state = seed};
    s->state = splitmix64(&s->state) ^ stream * 0xD1342543DE82EF95u; // neighbouring seeds and streams far apart
    s->candidates = malloc((size_t)vocab_size * sizeof *s->candidates);
    bool ok = s->candidates != NULL;
    if (ok && has_penalty(&config)) {
        s->penalised = malloc((size_t)vocab_size * sizeof *s->penalised);
        s->seen = calloc((size_t)vocab_size, sizeof *s->seen);
        ok = s->penalised && s->seen;
    }
    return ok || fail(err, "out of memory: %d candidates", vocab_size);
}

void sampler_free(Sampler *s) {
    free(s->candidates);
    free(s->penalised);
    free(s->seen);
    *s = (Sampler){.candidates = NULL};
}

void sampler_see(Sampler *s, const int *ids, size_t n) {
    for (size_t i = 0; s->seen && i < n; i++) s->seen[ids[i]] = true;
}

// Keskar et al. 2019: an id that the sequence has is less likely again, however often it came.
static const float *penalise(Sampler *s, const float *logits) {
    float penalty = s->config.repetition_penalty;
    for (int i = 0; i < s->vocab_size; i++) {
        float x = logits[i];
        s->penalised[i] = !s->seen[i] ? x : x < 0 ? x * penalty : x / penalty;
    }
    return s->penalised;
}

static int more_likely_first(const void *a, const void *b) {
    const Candidate *x = a, *y = b;
    if (x->logit != y->logit) return x->logit < y->logit ? 1 : -1;
    return (x->id > y->id) - (x->id < y->id);
}

// Brings the k most likely of n candidates to the front, in any order: quickselect (Hoare 1961).
static void select_most_likely(Candidate *c, int n, int k) {
    for (int low = 0, high = n - 1; low < high;) {
        Candidate pivot = c[low + (high - low) / 2];
        int i = low, j = high;
        while (i <= j) {
            while (more_likely_first(&c[i], &pivot) < 0) i++;
            while (more_likely_first(&pivot, &c[j]) < 0) j--;
            if (i > j) break;
            Candidate swap = c[i];
            c[i++] = c[j];
            c[j--] = swap;
        }
        if (k - 1 <= j)
            high = j;
        else if (k - 1 >= i)
            low = i;
        else
            return;
    }
}

// Of a candidate, ascending as its logit descends. Zeros of both signs are equal.
static uint32_t sort_key(const Candidate *c) {
    float logit = c->logit + 0.0f;
    uint32_t bits;
    memcpy(&bits, &logit, sizeof bits);
    return bits >> 31 ? bits : ~bits & 0x7FFFFFFF;
}

// Sorts candidates by 8 bits of their keys, from bit `shift` on, in place (McIlroy, Bostic & McIlroy 1993: American
// flag sort).
static void sort_by_digit(Candidate *c, int n, int shift) {
    enum { DIGITS = 256 };
    int end[DIGITS] = {0}, next[DIGITS];
    for (int i = 0; i < n; i++) end[sort_key(&c[i]) >> shift & (DIGITS - 1)]++;
    for (int d = 0, at = 0; d < DIGITS; d++) {
        next[d] = at;
        end[d] = at += end[d];
    }
    for (int d = 0; d < DIGITS; d++)
        while (next[d] < end[d]) { // whoever is in another digit's place goes there, until one comes that belongs here
            Candidate moved = c[next[d]];
            for (uint32_t to; (to = sort_key(&moved) >> shift & (DIGITS - 1)) != (uint32_t)d;) {
                Candidate found = c[next[to]];
                c[next[to]++] = moved;
                moved = found;
            }
            c[next[d]++] = moved;
        }
}

// Where the candidates end whose keys are candidate `at`'s but for the last `bits` bits.
static int group_end(const Candidate *c, int n, int at, int bits) {
    uint64_t key = (uint64_t)sort_key(&c[at]) >> bits;
    while (at < n && (uint64_t)sort_key(&c[at]) >> bits == key) at++;
    return at;
}

// Sorts candidates, most likely first, the lowest id of equals: a radix sort of their keys from the highest digit on,
// as long as many have the same digits, then by insertion. A choice among 128,000 that are about equally likely takes a
// third of the time that it takes with qsort.
static void sort_most_likely(Candidate *c, int n) {
    enum { FEW = 24 };
    for (int bits = 32; bits > 0; bits -= 8)
        for (int at = 0, end; at < n; at = end) {
            end = group_end(c, n, at, bits);
            if (end - at > FEW) sort_by_digit(c + at, end - at, bits - 8);
        }
    for (int at = 0, end; at < n; at = end) { // equal logits: by their ids
        end = group_end(c, n, at, 0);
        if (end - at > FEW) qsort(c + at, (size_t)(end - at), sizeof *c, more_likely_first);
    }
    for (int i = 1; i < n; i++) {
        Candidate moved = c[i];
        int to = i;
        for (; to > 0 && more_likely_first(&moved, &c[to - 1]) < 0; to--) c[to] = c[to - 1];
        c[to] = moved;
    }
}

// Brings the k most likely of n candidates to the front, and all that are as likely as the k-th, as HuggingFace keeps
// them. Returns how many.
static int keep_most_likely(Candidate *c, int n, int k) {
    select_most_likely(c, n, k);
    float least = c[0].logit;
    for (int i = 1; i < k; i++) least = c[i].logit < least ? c[i].logit : least;
    for (int i = k; i < n; i++)
        if (c[i].logit == least) {
            Candidate swap = c[k];
            c[k++] = c[i];
            c[i] = swap;
        }
    return k;
}

// p of candidates [0, n), which sum to one.
static void renormalise(Candidate *c, int n, float temperature) {
    float max = c[0].logit;
    double sum = 0; // in float64: a long tail of small numbers has its weight
    for (int i = 1; i < n; i++) max = c[i].logit > max ? c[i].logit : max;
    for (int i = 0; i < n; i++) sum += (double)(c[i].p = expf((c[i].logit - max) / temperature));
    for (int i = 0; i < n; i++) c[i].p = (float)((double)c[i].p / sum);
}

// How many of the sorted candidates make up a probability of at least top_p.
static int nucleus(const Candidate *c, int n, float top_p) {
    double sum = 0;
    for (int i = 0; i < n; i++)
        if ((sum += (double)c[i].p) >= (double)top_p) return i + 1;
    return n;
}

int sampler_next(Sampler *s, const float *logits) {
    const SamplerConfig *config = &s->config;
    if (s->penalised) logits = penalise(s, logits);
    if (config->temperature == 0) return argmax(logits, s->vocab_size);
    Candidate *c = s->candidates;
    int n = s->vocab_size;
    for (int i = 0; i < n; i++) c[i] = (Candidate){logits[i], 0, i};
    bool cut_k = config->top_k > 0 && config->top_k < n, cut_p = config->top_p < 1;
    if (cut_p && !cut_k) {
        // Sorting the whole vocabulary would take longer than a layer. What is less likely than (1-p)/n cannot be in
        // the nucleus: all of those together have less than 1-p (llama2.c's observation).
        renormalise(c, n, config->temperature);
        float floor = (1 - config->top_p) / (float)n;
        int kept = 0;
        for (int i = 0; i < n; i++)
            if (c[i].p >= floor) c[kept++] = c[i];
        sort_most_likely(c, kept);
        n = nucleus(c, kept, config->top_p); // of probabilities among all n
    } else if (cut_k) {
        n = keep_most_likely(c, n, config->top_k);
        sort_most_likely(c, n);
        renormalise(c, n, config->temperature);
        if (cut_p) n = nucleus(c, n, config->top_p);
    }
    renormalise(c, n, config->temperature);
    if (config->min_p > 0) {
        float max = 0;
        int kept = 0;
        for (int i = 0; i < n; i++) max = c[i].p > max ? c[i].p : max;
        for (int i = 0; i < n; i++)
            if (c[i].p >= config->min_p * max) c[kept++] = c[i];
        n = kept;
        renormalise(c, n, config->temperature);
    }
    double u = random_uniform(&s->state), sum = 0;
    for (int i = 0; i < n; i++)
        if (u < (sum += (double)c[i].p)) return c[i].id;
    return c[n - 1].id; // rounding left the sum under u
}
