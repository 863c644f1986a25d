// What the matrices of a model are multiplied by in a text, and how they are rounded for that (gptq.h).
#ifndef CALIBRATE_H
#define CALIBRATE_H

#include "../gptq.h"

enum { CALIBRATE_WINDOW = 512 };

// What some matrices have in common: wq, wk and wv of a layer; wo; w1 and w3; w2; the output matrix.
typedef struct {
    const Matrix *first; // the one that is watched
    int cols;
    float *h;          // [cols][cols]: XᵀX, or what feedback_init made of it; NULL: not at hand
    Feedback feedback; // importance is NULL: h is XᵀX
} CalibrationInput;

typedef struct {
    Model *model;
    const TokenList *ids;
    CalibrationInput *inputs; // [4 · n_layers + 1], as in the file
} Calibration;

// For a text of one token at least, and a model that has been started on engine cpu, and stays so. The caller frees it
// with calibration_free, also after a failure.
bool calibration_init(Calibration *c, Model *model, const TokenList *ids, Error *err);
// How that matrix of a layer, or the output matrix, is rounded; until the next call. Where its inputs are not at hand
// the text runs, in windows as long as the cache, and XᵀX is added up of that layer and of as many after it as take
// half the memory of the weights, or 1 GiB: matrices are best asked for in the order of the file. The output matrix is
// fed the last LOGIT_ROWS tokens of each window. NULL: it failed, or was interrupted.
// model->progress counts "calibrating" tokens.
const Feedback *calibration_of(Calibration *c, const Matrix *matrix, Error *err);
void calibration_free(Calibration *c);

#endif
