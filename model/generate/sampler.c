#include "sampler.h"

#include <stdlib.h>

#include "../logits.h"
#include "sampler_weights.h"

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

bool sampler_draws(const SamplerConfig *config) {
    return config->temperature > 0 && !has_penalty(config);
}

bool sampler_init(Sampler *s, SamplerConfig config, int vocab_size, uint64_t seed, uint64_t stream, Error *err) {
    *s = (Sampler){.config = config, .vocab_size = vocab_size, .state = seed};
    s->state = splitmix64(&s->state) ^ stream * 0xD1342543DE82EF95u; // neighbouring seeds and streams far apart
    if (!has_penalty(&config)) return true;
    s->penalised = malloc((size_t)vocab_size * sizeof *s->penalised);
    s->seen = calloc((size_t)vocab_size, sizeof *s->seen);
    return (s->penalised && s->seen) || fail(err, "out of memory: penalised logits of %d ids", vocab_size);
}

void sampler_free(Sampler *s) {
    free(s->penalised);
    free(s->seen);
    *s = (Sampler){.penalised = NULL};
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

// ---- a choice among weights (sampler_weights.h) ---------------------------------------------------------------------

// Values of a digit of a token's place in the order: 11 bits of its order_key, or which part of the row its id is in.
// Keys and weights are computed for BLOCK ids at once.
enum { DIGITS = 2048, BLOCK = 256 };

typedef struct {
    const float *logits; // [n]
    int n;
    WeightRule rule;
    uint64_t least;    // tokens of a smaller weight are cut off
    uint32_t last_key; // tokens of a larger key are cut off
} Row;

// A token, and the weight of all up to it in their order.
typedef struct {
    int id;
    uint64_t through;
} Place;

// As argmax() finds it; in eight rows of comparisons, since each waits for the one before it.
static float largest(const float *logits, int n) {
    float max[8];
    for (int j = 0; j < 8; j++) max[j] = logits[0];
    for (int i = 0; i + 8 <= n; i += 8)
        for (int j = 0; j < 8; j++) max[j] = logits[i + j] > max[j] ? logits[i + j] : max[j];
    for (int i = n & ~7; i < n; i++) max[0] = logits[i] > max[0] ? logits[i] : max[0];
    for (int j = 1; j < 8; j++) max[0] = max[j] > max[0] ? max[j] : max[0];
    return max[0];
}

static int block_size(const Row *row, int first) {
    return row->n - first < BLOCK ? row->n - first : BLOCK;
}

static void keys_of(const float *logits, int n, uint32_t *keys) {
    for (int i = 0; i < n; i++) keys[i] = order_key(logits[i]);
}

// Without a branch, as is token_weight: compilers make vectors of it.
static void weights_of(const float *logits, int n, WeightRule rule, uint64_t *weights) {
    for (int i = 0; i < n; i++) weights[i] = token_weight(logits[i], rule);
}

// The sum of the weights [n] that are not under `least`; the others become 0.
static uint64_t cut_off(uint64_t *weights, int n, uint64_t least) {
    uint64_t sum = 0;
    for (int i = 0; i < n; i++) sum += weights[i] &= ((weights[i] - least) >> 63) - 1;
    return sum;
}

// The digit that the cumulative weight exceeds target in; *below becomes that of the digits before it.
static uint32_t find_digit(const uint64_t *of_digit, uint64_t target, uint64_t *below) {
    uint32_t digit = 0;
    while (digit < DIGITS - 1 && *below + of_digit[digit] <= target) *below += of_digit[digit++];
    return digit;
}

// The token that u draws where they are in the order of their ids.
static int draw_by_id(const Row *row, double u) {
    uint64_t of_part[DIGITS] = {0}, weights[BLOCK], sum = 0, below = 0;
    int blocks = (row->n - 1) / BLOCK / DIGITS + 1; // of a part
    for (int first = 0; first < row->n; first += BLOCK) {
        int n = block_size(row, first);
        weights_of(row->logits + first, n, row->rule, weights);
        uint64_t added = cut_off(weights, n, row->least);
        of_part[first / BLOCK / blocks] += added;
        sum += added;
    }
    uint64_t target = drawn_weight(u, sum);
    for (int first = (int)find_digit(of_part, target, &below) * blocks * BLOCK; first < row->n; first += BLOCK) {
        int n = block_size(row, first);
        weights_of(row->logits + first, n, row->rule, weights);
        cut_off(weights, n, row->least);
        for (int i = 0; i < n; i++)
            if ((below += weights[i]) > target) return first + i;
    }
    return row->n - 1; // never: the target is less than the sum
}

// How many tokens there are of each first digit.
static void count_first_digits(const Row *row, uint64_t *of_digit) {
    memset(of_digit, 0, DIGITS * sizeof *of_digit);
    for (int i = 0; i < row->n; i++) of_digit[order_key(row->logits[i]) >> 21]++;
}

// The weight of the tokens of each first digit, up to last_key. Returns the sum, and that of those from `least` on.
static uint64_t weigh_first_digits(const Row *row, uint64_t *of_digit, uint64_t *likely) {
    uint64_t weights[BLOCK], sum = 0;
    memset(of_digit, 0, DIGITS * sizeof *of_digit);
    *likely = 0;
    for (int first = 0; first < row->n; first += BLOCK) {
        int n = block_size(row, first), kept = 0;
        uint32_t keys[BLOCK];
        keys_of(row->logits + first, n, keys);
        for (int i = 0; i < n; i++) kept += keys[i] <= row->last_key;
        if (kept == 0) continue;
        weights_of(row->logits + first, n, row->rule, weights);
        for (int i = 0; i < n; i++) {
            weights[i] &= 0 - (uint64_t)(keys[i] <= row->last_key);
            of_digit[keys[i] >> 21] += weights[i];
            sum += weights[i];
        }
        if (row->least) *likely += cut_off(weights, n, row->least);
    }
    return sum;
}

// The first token in the order up to which the weight, or with `count` the number of tokens, is more than target: digit
// by digit of the key, then by id. first_digits: as weighed or counted above.
static Place find_in_order(const Row *row, const uint64_t *first_digits, bool count, uint64_t target) {
    static const int shifts[] = {21, 10, 0};
    uint64_t of_digit[DIGITS], below = 0;
    uint32_t prefix = find_digit(first_digits, target, &below);
    for (int l = 0; l < 3; l++) {
        int shift = shifts[l], next = l < 2 ? shifts[l + 1] : 0;
        uint32_t digits = (1u << (shift - next)) - 1;
        memset(of_digit, 0, sizeof of_digit);
        for (int first = 0; first < row->n; first += BLOCK) {
            int n = block_size(row, first), found = 0;
            uint32_t keys[BLOCK];
            keys_of(row->logits + first, n, keys);
            for (int i = 0; i < n; i++) found += keys[i] >> shift == prefix;
            for (int i = 0; found && i < n; i++) {
                if (keys[i] >> shift != prefix) continue;
                uint64_t weight = count ? 1 : token_weight(row->logits[first + i], row->rule);
                of_digit[keys[i] >> next & digits] += weight;
                if (shift == 0 && below + of_digit[0] > target) return (Place){first + i, below + of_digit[0]};
            }
        }
        prefix = prefix << (shift - next) | find_digit(of_digit, target, &below);
    }
    return (Place){row->n - 1, below}; // never: the target is less than the sum
}

int sample_token(const SamplerConfig *config, const float *logits, int n, double u) {
    int bits = weight_bits(n);
    Row row = {.logits = logits,
               .n = n,
               .rule = {LOG2_E / (double)config->temperature, largest(logits, n), bits},
               .least = config->min_p > 0 ? least_weight(config->min_p, bits) : 0,
               .last_key = UINT32_MAX};
    bool cut_k = config->top_k > 0 && config->top_k < n, cut_p = config->top_p < 1;
    if (!cut_k && !cut_p) return draw_by_id(&row, u);
    uint64_t of_digit[DIGITS], likely;
    if (cut_k) {
        count_first_digits(&row, of_digit);
        row.last_key = order_key(logits[find_in_order(&row, of_digit, true, (uint64_t)config->top_k - 1).id]);
    }
    uint64_t sum = weigh_first_digits(&row, of_digit, &likely);
    if (cut_p) sum = find_in_order(&row, of_digit, false, nucleus_weight(config->top_p, sum) - 1).through;
    // Every cut keeps the beginning of the order: the shortest is what all of them keep.
    if (row.least && likely < sum) sum = likely;
    return find_in_order(&row, of_digit, false, drawn_weight(u, sum)).id;
}

int sampler_next(Sampler *s, const float *logits) {
    if (s->penalised) logits = penalise(s, logits);
    if (s->config.temperature == 0) return argmax(logits, s->vocab_size);
    return sample_token(&s->config, logits, s->vocab_size, random_uniform(&s->state));
}
