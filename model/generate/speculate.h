// Speculation: a sequence's next tokens are guessed, and the guesses, its candidates, are computed as further rows of
// the step that computes its last token. A row's token is chosen as it would be alone; a candidate that is the token
// chosen from the row before it is accepted, so that the step gives more than one token, and the first that is not ends
// the step. What is generated does not depend on the candidates: they only say how many tokens a step gives.
// (Leviathan, Kalman & Matias 2023; here with the tokens of the sequence's own random stream rather than with others of
// the same distribution.)
#ifndef SPECULATE_H
#define SPECULATE_H

#include <stdbool.h>
#include <stddef.h>

#include "../../tokenizer/error.h"
#include "../model.h"

enum { CANDIDATE_KINDS = 4 };
// Sequences at a time that a step has rows for.
enum { MAX_SPECULATING = MAX_STEP_ROWS / (MAX_CANDIDATES + 1) };

// One sequence's candidates, and what they continue.
typedef struct {
    int slot;
    const int *prompt, *ids; // [n_prompt], [n_ids]: the text is the prompt, then the ids; n_ids is 1 at least
    size_t n_prompt, n_ids;
    int most; // candidates at most
    int n, candidates[MAX_CANDIDATES];
    int kind;     // of the proposer's kinds of candidates, which differ in how many are right
    int accepted; // of n, after the step
} Proposal;

static inline size_t proposal_length(const Proposal *p) {
    return p->n_prompt + p->n_ids;
}
static inline int proposal_token(const Proposal *p, size_t i) {
    return i < p->n_prompt ? p->prompt[i] : p->ids[i - p->n_prompt];
}

// Where candidates come from.
typedef struct {
    const char *name;
    double prior[CANDIDATE_KINDS]; // how many of a kind are right, before any has been verified
    // Of one more candidate for all sequences, in steps of the model of one row. NULL: nothing that counts, and how
    // many are verified is decided when they are known.
    double (*cost)(void *context);
    // Another text begins in that slot. NULL: nothing is kept.
    void (*begin)(void *context, int slot);
    // Sets n <= most, candidates and kind of n proposals, each in another slot.
    bool (*propose)(void *context, Proposal *proposals, int n, Error *err);
    void (*close)(void *context); // NULL: there is nothing to free
    void *context;
} Proposer;

// How many of one sequence's candidates of each kind were right: sums over about the last 16, older ones count less.
typedef struct {
    double tried[CANDIDATE_KINDS], right[CANDIDATE_KINDS];
} Acceptance;

// Of one run, for all its sequences.
typedef struct {
    Proposer proposer;
    const Model *model; // that verifies
    const Model *draft; // that guesses; NULL: none does
    bool always;        // as many candidates as there are, whatever is known of them: for tests and measurements
    double balance;     // steps that may be lost: see speculate.c
} Speculation;

// Of one sequence.
typedef struct {
    int64_t steps, tokens;        // steps that it was decoded in, tokens that they gave
    int64_t candidates, accepted; // verified in these, and those of them that were right
} SpeculationCounts;

static inline void speculation_count(SpeculationCounts *sum, const SpeculationCounts *more) {
    sum->steps += more->steps;
    sum->tokens += more->tokens;
    sum->candidates += more->candidates;
    sum->accepted += more->accepted;
}

// Starts with nothing known. model: that verifies.
void speculation_init(Speculation *s, const Model *model, const Proposer *proposer);
// Refuses an engine whose rows have other bits beside other rows, before the model is started. With so many slots its
// steps may have more rows from then on: model->step_rows.
bool speculation_prepare(Model *model, int n_slots, Error *err);
// Another text begins in a slot.
static inline void speculation_begin(Speculation *s, int slot) {
    if (s->proposer.begin) s->proposer.begin(s->proposer.context, slot);
}
// What a step of so many rows costs on this engine, in steps of one row.
double speculation_step_cost(const Model *model, int n_rows);
// Sets n, candidates and kind of proposals [n_proposals], whose other fields are set, for a step that decodes n_rows
// rows without them and max_rows at most. acceptance [n_proposals]: of each one's sequence.
bool speculation_propose(Speculation *s, Proposal *proposals, Acceptance *const *acceptance, int n_proposals,
                         int n_rows, int max_rows, Error *err);
// After that step: learns from the candidates that were accepted.
void speculation_learn(Speculation *s, const Proposal *proposals, Acceptance *const *acceptance, int n_proposals,
                       int n_rows);
void speculation_close(Speculation *s);

// Candidates are what followed the same last tokens before, in prompt or answer: lookup.c.
bool lookup_open(Speculation *s, const Model *model, int n_slots, Error *err);
// They are what another model, of the same vocabulary, finds most likely: draft.c. The model that verifies is not
// started yet, but its engine is chosen; the draft gets a cache of as many slots and of at most max_len positions.
bool draft_open(Speculation *s, const Model *model, const char *path, int n_slots, int max_len, Error *err);

#endif
