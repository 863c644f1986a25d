// What matters in a model's matrices: how large the numbers are that each column is multiplied by in a text.
#ifndef CALIBRATE_H
#define CALIBRATE_H

#include "../model.h"

enum { CALIBRATE_WINDOW = 512 };

// For each matrix of the layers, and the output matrix, the importance of its columns for quant_encode_row.
typedef struct {
    struct ImportanceOf {
        const Matrix *matrix; // in model->weights
        float *columns;       // [cols + 8]
        double *sums;         // [cols], of squares, while they are added up
        int64_t n;            // rows that were
    } *of;                    // [n]
    int n;
} Importance;

// Runs a text of one token at least, in windows as long as the cache, on a model that has been started on engine cpu: a
// column's importance is the mean of the squares of what it is multiplied by, divided by the mean of all columns. The
// output matrix is fed the last LOGIT_ROWS tokens of each window. The matrices stay where they are when the model is
// stopped, so that it can be quantised then. The caller frees it with importance_free, also after a failure.
bool calibrate(Model *model, const TokenList *ids, Importance *importance, Error *err);
// Of that matrix; NULL where it was not seen, or importance is NULL.
const float *importance_of(const Importance *importance, const Matrix *matrix);
void importance_free(Importance *importance);

#endif
