// What one call of an engine computes: tokens of one or several sequences, one sequence's after another's.
#ifndef BATCH_H
#define BATCH_H

#include <stdbool.h>

enum { MAX_SLOTS = 64, LOGIT_ROWS = 64 };

typedef struct {
    int n_rows, n_seq, n_logits;
    bool decode;           // a step: one row for each sequence, its logits wanted; else rows of prompts
    const int *tokens;     // [n_rows]
    const int *slot;       // [n_seq]: where each sequence is in the cache; its tokens come after what is there
    const int *start;      // [n_seq+1]: the first row of each
    const int *logit_rows; // [n_logits], ascending, at most LOGIT_ROWS: the rows whose logits are wanted
} Batch;

// Rows [first, first + n_rows) of a batch, so that a long prompt needs bounded memory.
typedef struct {
    Batch batch;
    int first_logit; // of the whole batch's, the first of this part
    int slot[MAX_SLOTS], start[MAX_SLOTS + 1], logit_rows[LOGIT_ROWS];
} BatchPart;

void batch_part(const Batch *batch, int first, int n_rows, BatchPart *part);

#endif
