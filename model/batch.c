#include "batch.h"

void batch_part(const Batch *b, int first, int n_rows, BatchPart *p) {
    int end = first + n_rows;
    for (int i = 0; i < b->n_decode; i++)
        if (b->start[i] > first && b->start[i] < end && b->start[i + 1] > end) end = b->start[i];
    p->batch = (Batch){.n_rows = end - first,
                       .ends = b->ends,
                       .tokens = b->tokens + first,
                       .slot = p->slot,
                       .start = p->start,
                       .logit_rows = p->logit_rows};
    p->start[0] = 0;
    for (int i = 0; i < b->n_seq; i++) {
        int from = b->start[i] > first ? b->start[i] : first, to = b->start[i + 1] < end ? b->start[i + 1] : end;
        if (from >= to) continue;
        p->slot[p->batch.n_seq++] = b->slot[i];
        if (i < b->n_decode) p->batch.n_decode++;
        p->start[p->batch.n_seq] = to - first;
    }
    p->first_logit = 0;
    while (p->first_logit < b->n_logits && b->logit_rows[p->first_logit] < first) p->first_logit++;
    for (int i = p->first_logit; i < b->n_logits && b->logit_rows[i] < end; i++)
        p->logit_rows[p->batch.n_logits++] = b->logit_rows[i] - first;
}
