// model.bin (llama-model/1): a safetensors file with configuration, weights and tokenizer. README.md has the format.
#ifndef CHECKPOINT_H
#define CHECKPOINT_H

#include "model.h"

// Opens path into model->file, fills model->config and model->tokenizer, and checks every tensor's name, shape, dtype,
// alignment and order. vocab_only: a file with n_layers = 0 is accepted.
bool checkpoint_open(Model *model, const char *path, bool vocab_only, Error *err);

// Reads norms and weights into one block at base (model->weights.bytes long) and points model->weights into it.
bool checkpoint_load(Model *model, char *base, Error *err);

#endif
