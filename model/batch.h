// What one call of an engine computes: tokens of one or several sequences, one sequence's after another's.
#ifndef BATCH_H
#define BATCH_H

#include <stdbool.h>

// Sequences at most; rows with logits that every run has room for (one whose steps may have more: as many as these);
// rows that are decoded in one step, at most.
enum { MAX_SLOTS = 256, LOGIT_ROWS = 64, MAX_STEP_ROWS = 256 };
// Rows that a sequence may have in a step after that of its last token.
enum { MAX_CANDIDATES = 7 };

typedef struct {
    int n_rows, n_seq, n_logits;
    int n_decode;          // the first n_decode sequences are decoded: 1 to 8 rows each, the logits of all wanted. The
                           // others' rows are parts of prompts
    const int *tokens;     // [n_rows]
    const int *slot;       // [n_seq]: where each sequence is in the cache; its tokens come after what is there
    const int *start;      // [n_seq+1]: the first row of each
    const int *logit_rows; // [n_logits], ascending: the rows whose logits are wanted. n_logits: see model_logit_rows
    bool ends;             // a decoded sequence takes its last token from this batch, so that the next has other rows
} Batch;

// Rows [first, first + n_rows) of a batch, so that a long prompt needs bounded memory. A decoded sequence's rows stay
// together: where the last one would be cut, the part ends before it. (n_rows is at least what one of them has.)
typedef struct {
    Batch batch;
    int first_logit; // of the whole batch's, the first of this part
    int slot[MAX_SLOTS], start[MAX_SLOTS + 1], logit_rows[MAX_STEP_ROWS];
} BatchPart;

void batch_part(const Batch *batch, int first, int n_rows, BatchPart *part);

#endif
