// Prompts in, tokens and text out: several sequences at a time, each with its own place in the cache and random stream.
#ifndef GENERATE_H
#define GENERATE_H

#include "../model.h"
#include "sampler.h"

// How a sequence is generated: each has its own.
typedef struct {
    int n;                // new tokens at most; 0: the prompt is computed, and nothing comes after it
    int logprobs;         // K: keep log-probabilities of each token and of the K most likely, or of all; 0: none
    bool prompt_logprobs; // with logprobs: of the prompt's tokens, too
    int n_stops;
    const char *const *stops; // [n_stops] texts that end an answer, not empty; also the special tokens of these texts
    bool ignore_eos;          // go on past an end id
    int n_turn_ends;
    const int *turn_ends;  // [n_turn_ends] ids that end an answer, beside the model's end ids: those of a conversation
    bool special;          // special tokens are part of the text
    uint64_t seed, stream; // of the random numbers: sequences of one seed and different streams are independent
    SamplerConfig sampler;
} GenerateConfig;

// Log-probabilities at n positions.
typedef struct {
    float *values; // [n][1 + K]: of the token, then of the K most likely
    int *top_ids;  // [n][K]
} Logprobs;

typedef struct {
    GenerateConfig config;
    int n_cached;              // tokens of the prompt that slot 0 of the cache has already; with one slot only
    int index;                 // in the input
    TokenList prompt, ids;     // ids: what was generated, with the end id or stop token if one ended it
    const char *finish_reason; // stop, length, stop_string, interrupted; NULL: it runs, or never began
    Bytes text;                // what was generated, unless it is passed on as it comes
    Logprobs logprobs;         // of ids
    Logprobs prompt_logprobs;  // of the prompt's tokens from the second on, n_scored of them
    int n_scored;
    float *latencies;             // [ids.n - 1]: seconds between a token and the next
    double admitted, first, last; // seconds on the clock: its prompt's start, its first and its last token
    // while it runs:
    int n_max;     // new tokens that the context leaves room for
    Bytes pending; // bytes that may be part of a character or of a stop text
    Sampler sampler;
} Sequence;

void sequence_free(Sequence *seq);
// Frees a finished sequence's text and log-probabilities, once they have been printed.
void sequence_free_results(Sequence *seq);
// This quantile (0.5: the median) of the inter-token latencies of a finished sequence, in seconds.
double sequence_latency(Sequence *seq, double quantile);

// Where a sequence's text and its end go. text NULL: kept in seq->text. Both may fail, which ends the run.
typedef struct {
    bool (*text)(void *context, Sequence *seq, const char *data, size_t n, Error *err);
    bool (*finished)(void *context, Sequence *seq, Error *err); // in input order
    void (*stepped)(void *context); // each time that sequences have new tokens; NULL: nobody watches
    void *context;
} GenerateSink;

// Runs the sequences [n], as many at a time as the cache has slots, admitting the next as one finishes. Every prompt
// has a token and leaves room for one more, unless none is to come. When the model is interrupted, those that run
// finish as interrupted and no others begin.
bool generate(Model *model, Sequence *seqs, int n, const GenerateSink *sink, Error *err);

// The clock of Sequence's times.
double clock_seconds(void);
// The text of a token as it is printed: special tokens if `special` says so, added ones that are not special always.
const uint8_t *printed_bytes(const Model *model, bool special, int id, size_t *n);

#endif
