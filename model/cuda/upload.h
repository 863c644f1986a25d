// Weights on their way to the device: from a file, by many threads through pinned memory, or made there from a seed.
#ifndef UPLOAD_H
#define UPLOAD_H

#include "state.h"

// Where every tensor goes.
struct Plan {
    Model *model;
    CudaState *state;
    struct Placement *tensors; // [n]
    size_t n;
    uint64_t bytes; // on the device
    SyntheticCursor synthetic;
};

// Decides the dtype of every matrix on the device, and how many bytes all of it takes. plan_free after it in any case.
bool plan_weights(Plan *plan, Model *model, CudaState *state, Error *err);
void plan_free(Plan *plan);
// Gives every tensor its address in state->weights.
bool place_tensors(Plan *plan, Error *err);
// Fills them. meanwhile: what one thread does first, while others already copy (a synthetic model: afterwards).
bool upload_weights(const Plan *plan, bool (*meanwhile)(Model *model, Error *err), Error *err);

#endif
