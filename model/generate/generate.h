// Prompts in, tokens and text out: several sequences at a time, each with its own place in the cache and random stream.
#ifndef GENERATE_H
#define GENERATE_H

#include "sequence.h"

// Runs the sequences [n], as many at a time as the cache has slots and pages, admitting the next as one finishes
// (scheduler.h). Every prompt has a token and leaves room for one more, unless none is to come, in the context and in
// the cache's pages. When the model is interrupted, those that run finish as interrupted and no others begin.
bool generate(Model *model, Sequence *seqs, int n, const GenerateSink *sink, Error *err);

#endif
