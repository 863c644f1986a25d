// Weights on their way to the device: from a file, by many threads through pinned memory, or made there from a seed.
#ifndef UPLOAD_H
#define UPLOAD_H

#include "state.h"

// Where every tensor of a rank goes.
struct Plan {
    Model *model, *first; // first: rank 0's
    CudaState *state;
    struct Placement *tensors; // [n]
    size_t n;
    uint64_t bytes; // on the device
    SyntheticCursor synthetic;
};

// Decides which rows of every matrix the model's shard has, their dtype on the device, and how many bytes all of it
// takes. plan_free after it in any case.
bool plan_weights(Plan *plan, Model *model, CudaState *state, Error *err);
void plan_free(Plan *plan);
// Gives every tensor its address in state->weights.
bool place_tensors(Plan *plan, Error *err);
// Fills them, of all ranks: plans [count]. What several have is read once. meanwhile(rank 0's model): what one thread
// does first, while others already copy (a synthetic model: afterwards).
bool upload_weights(const Plan *plans, int count, bool (*meanwhile)(Model *model, Error *err), Error *err);

#endif
