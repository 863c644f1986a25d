// Chooses the next token from logits: the most likely one, or a random one among the likely. One stream per sequence.
#ifndef SAMPLER_H
#define SAMPLER_H

#include <stddef.h>
#include <stdint.h>

#include "../../tokenizer/error.h"

typedef struct {
    float repetition_penalty; // of the logits of ids that the sequence has, before all else; 0 or 1: none
    float temperature;        // 0: greedy, and nothing below matters
    int top_k;                // keep the k most likely, and what is as likely as the k-th; 0: all
    float top_p;              // keep the fewest whose probabilities reach p; 1: all
    float min_p;              // keep those at least p times as likely as the most likely; 0: all
} SamplerConfig;

typedef struct {
    SamplerConfig config;
    uint64_t state;   // of the random stream
    float *penalised; // [vocab_size] logits after the repetition penalty; NULL: there is none
    bool *seen;       // [vocab_size] whether the sequence has the id; NULL with penalised
    int vocab_size;
} Sampler;

// stream: the number of the sequence, so that many from one seed are independent.
bool sampler_init(Sampler *s, SamplerConfig config, int vocab_size, uint64_t seed, uint64_t stream, Error *err);
void sampler_free(Sampler *s);

// Whether the next token is another than the argmax of the logits.
bool sampler_reads_logits(const SamplerConfig *config);
// Whether it is sample_token's choice: it has a temperature, and no repetition penalty.
bool sampler_draws(const SamplerConfig *config);
// These ids [n] are part of the sequence: of its prompt, or generated.
void sampler_see(Sampler *s, const int *ids, size_t n);

// The next token from logits [vocab_size], which must be finite and are left as they are. As HuggingFace: repetition
// penalty (a positive logit is divided by it, a negative one multiplied), temperature, then top-k, top-p and min-p,
// each on the probabilities that the one before left, renormalised. The arithmetic is that of sampler_weights.h.
int sampler_next(Sampler *s, const float *logits);

// The same for logits [n] as they are (no penalty), a temperature over 0 and a random number u in [0, 1). The result is
// the same to the bit on every machine, and on GPUs (Engine.sample).
int sample_token(const SamplerConfig *config, const float *logits, int n, double u);

// A row of logits to draw a token from, by Engine.sample.
typedef struct {
    int row;                     // of the last batch's rows with logits
    const SamplerConfig *config; // its temperature is over 0, and it has no repetition penalty
    double u;                    // the sequence's random number, from random_uniform
} SampleRow;

// A uniform number in [0, 1): SplitMix64 (Steele, Lea & Flood 2014), the same on every machine.
double random_uniform(uint64_t *state);

#endif
