// One sequence: its settings, its tokens and text, its log-probabilities, and how it ends.
#ifndef SEQUENCE_H
#define SEQUENCE_H

#include "../model.h"
#include "sampler.h"
#include "speculate.h"

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
    Speculation *speculation; // where candidates for its next tokens come from, the same for all; NULL: there are none
} GenerateConfig;

// Log-probabilities at n positions.
typedef struct {
    float *values; // [n][1 + K]: of the token, then of the K most likely
    int *top_ids;  // [n][K]
} Logprobs;

typedef struct {
    GenerateConfig config;
    int n_cached;          // tokens of the prompt that slot 0 of the cache has already, of a sequence that runs alone
    int index;             // in the input
    TokenList prompt, ids; // ids: what was generated, with the end id or stop token if one ended it
    const char *finish_reason; // stop, length, stop_string, interrupted; NULL: it runs, or never began
    Bytes text;                // what was generated, unless it is passed on as it comes
    Logprobs logprobs;         // of ids
    Logprobs prompt_logprobs;  // of the prompt's tokens from the second on, n_scored of them
    int n_scored;
    int n_shared;                 // tokens of the prompt that were computed for another's
    int n_left;                   // times that it left, and came back, as there were no pages for it
    float *latencies;             // [ids.n - 1]: seconds between a token and the next
    double admitted, first, last; // seconds on the clock: its prompt's start, its first and its last token
    SpeculationCounts counts;
    // while it runs:
    int n_max;     // new tokens that the context, and the whole cache, leave room for
    Bytes pending; // bytes that may be part of a character or of a stop text
    Sampler sampler;
    Acceptance acceptance;
} Sequence;

// Where a sequence's text and its end go. text NULL: kept in seq->text. Both may fail, which ends the run.
typedef struct {
    bool (*text)(void *context, Sequence *seq, const char *data, size_t n, Error *err);
    bool (*finished)(void *context, Sequence *seq, Error *err); // in input order
    void (*stepped)(void *context); // each time that sequences have new tokens; NULL: nobody watches
    void *context;
} GenerateSink;

void sequence_free(Sequence *seq);
// Frees a finished sequence's text and log-probabilities, once they have been printed.
void sequence_free_results(Sequence *seq);
// This quantile (0.5: the median) of the inter-token latencies of a finished sequence, in seconds.
double sequence_latency(Sequence *seq, double quantile);

// ---- while it runs --------------------------------------------------------------------------------------------------

// Before its prompt is computed.
bool sequence_begin(Sequence *seq, const Model *model, Error *err);
// Computes a prompt but for its last token, so many rows at a time as there are logits for, and keeps the
// log-probability of each token after the first.
bool sequence_score_prompt(Sequence *seq, Model *model, int slot, Error *err);
// Whether its next token is drawn by the engine, from its random number; else sequence_choose chooses it.
bool sequence_is_drawn(const Sequence *seq);
// Whether sequence_choose takes the row's logits, and not their argmax alone.
bool sequence_reads_logits(const Sequence *seq);
// Stops the run where the logits of row `row` of the last batch are not finite. position: of the row's token.
bool sequence_check_finite(Model *model, int row, size_t position, Error *err);
// The sequence's next token, from a row of logits, which must be finite; keeps its log-probabilities. Writes what is
// the sequence's own alone: several threads do this for as many sequences.
int sequence_choose(Sequence *seq, const Model *model, int row);
// Takes a chosen token, passes its text on, and notices the end: seq->finish_reason.
bool sequence_take(Sequence *seq, const Model *model, const GenerateSink *sink, int id, Error *err);
// Frees what only a running sequence needs, after its last bytes.
bool sequence_end(Sequence *seq, const char *reason, const GenerateSink *sink, Error *err);

// The clock of Sequence's times.
double clock_seconds(void);
// The text of a token as it is printed: special tokens if `special` says so, added ones that are not special always.
const uint8_t *printed_bytes(const Model *model, bool special, int id, size_t *n);

#endif
