// model.bin (llama-model/1 and /2): a safetensors file with configuration, weights and tokenizer. README.md has the
// format.
#ifndef CHECKPOINT_H
#define CHECKPOINT_H

#include "../model.h"

// Opens a model.bin: model->file, model->config, model->tokenizer, and the shape and dtype of every weight, after every
// tensor's name, shape, dtype, alignment and order have been checked. vocab_only: a file without weights (n_layers = 0)
// is accepted. False: nothing is left open.
bool checkpoint_open(Model *model, const char *path, bool vocab_only, Error *err);

// Reads norms and weights into one block at base and points model->weights into it. left: a matrix that stays in the
// file, whose data is NULL then; NULL: none does. The block is model->weights.bytes long, which do not count that.
bool checkpoint_load(Model *model, char *base, const Tensor *left, Error *err);

// The messages for what checkpoint_load refuses of a quantised matrix, for who reads weights by itself: a scale that is
// not finite, number `at` of [rows][groups]; a code that is NaN, number `at` of [rows][cols]. False.
bool fail_scale_not_finite(const Model *model, const char *matrix, int64_t at, float scale, Error *err);
bool fail_code_is_nan(const Model *model, const char *matrix, int cols, int64_t at, Error *err);

#endif
