// Continuous batching: which rows the next step has. Sequences wait in input order and are admitted to free slots;
// their prompts are computed in parts beside the others' steps; and they leave for a while when the cache has no page
// left.
//
//   waiting ── admitted: a slot, and pages for the prompt ──> prompt ── all computed ──> decoding ── ended ──> done
//                                                              │  ▲                        │  ▲
//                                                              ▼  │  pages to host memory  ▼  │
//                                                              left ───── and back ─────── left
#ifndef SCHEDULER_H
#define SCHEDULER_H

#include "sequence.h"

// Rows of prompts in a step beside decoded ones. The more, the longer everybody waits for a token; the fewer, the
// longer prompts take: up to some 128 rows a GPU waits for the weights, which every part reads again, from there on for
// products. On an H200, 8B in bf16:
//   in one pass        64 sequences take 5.4 ms; 63 and 256 rows 9.8, 1.8 times as long
//   in a pass of each  16 sequences take 4.4 ms; beside 128 rows 10.1, 2.3 times as long, beside 256 rows 14.0, 3.2
//                      times. (Another pass alone doubles the time: fewer rows would gain little for what they cost.)
enum { PROMPT_ROWS = 256, PROMPT_ROWS_APART = 128 };

// One whose keys and values are in host memory.
typedef struct {
    Sequence *seq;
    SavedPages saved;
} LeftSequence;

typedef struct {
    Model *model;
    Sequence *seqs; // [n], in input order
    int n, next;    // seqs[next] is the next to be admitted
    bool filling;   // prompts come first: scheduler_next
    int n_filled;   // sequences that began or came back since it did

    Sequence *live[MAX_SLOTS]; // by slot; NULL: free
    int by_age[MAX_SLOTS];     // [n_live]: the slots of those that run, the oldest sequence's first
    int n_live;
    // The newest leaves, the oldest comes back, and nobody is admitted before that: those that left, the newest first,
    // are all newer than those that run.
    LeftSequence left[MAX_SLOTS]; // [n_left]
    int n_left;

    // The batch, decoded sequences first, and the sequence of each row with logits.
    Batch batch;
    TokenList tokens;
    int slot[MAX_SLOTS], start[MAX_SLOTS + 1], logit_rows[MAX_STEP_ROWS];
    Sequence *of_logits[MAX_STEP_ROWS];
    Proposal proposals[MAX_SLOTS]; // [batch.n_decode]: the candidates of each decoded sequence, in its further rows
} Scheduler;

// For sequences [n] as generate() has them.
void scheduler_init(Scheduler *s, Model *model, Sequence *seqs, int n);
// Lets sequences leave, come back and begin, and makes the next batch of those that run: s->batch. Prompts whose
// log-probabilities are wanted are computed here, but for their last token.
bool scheduler_next(Scheduler *s, Error *err);
// s->batch has been computed: the pages of its prompts can be shared.
void scheduler_computed(Scheduler *s);
// Sequences have taken their tokens: the cache keeps what was accepted, and the run learns from it how many candidates
// are right.
void scheduler_took(Scheduler *s);
// Sequences that have ended give back their slots.
void scheduler_release(Scheduler *s);
void scheduler_free(Scheduler *s);

#endif
