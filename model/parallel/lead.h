// One model in several processes (processes.h): rank 0 leads, the others follow. Rank 0 reads, schedules, samples and
// prints as if it were alone; its engine is one that sends what it is asked for to the others before it computes its
// own part, and each of these asks its own engine for the same. So all ranks enqueue the same launches, capture the
// same graphs and decide alike whether a step runs ahead, and nothing but the engine's gathers (comm.h)
// ties them together.
//
//   rank 0's engine    what the others get                               what they do
//   open               precision, sizes, engine; then all agree          model_start
//   forward            the batch; of its slots the length and what       engine->forward
//                      changed in the table; whether tokens were drawn
//   copy_pages         pages, and a name for the host memory of each     engine->copy_pages, with memory of their own
//   close              nothing                                           model_stop
//   lead_end           the exit status                                   follow returns it
//
// read_logits and sample need no other rank: every rank has all logits. Who fails in the middle of forward or
// copy_pages ends all processes, since the others wait for its gathers.
#ifndef LEAD_H
#define LEAD_H

#include "../model.h"

// On rank 0, for a model with by_processes: what stands for its engine.
// (It may be asked for that of one model at a time.)
const Engine *lead_engine(const Engine *engine);
// Collective: whether all ranks run the same program and have opened the same model: of a file the size, the header and
// samples of the data. m NULL: this one could not, err says why.
bool lead_agree(Model *m, const char *program, Error *err);
// On the other ranks, after that: does what rank 0 says, until its end, whose exit status it returns. started: after
// each start that succeeded everywhere. A signal (m->interrupted) is rank 0's to answer; if it does not, this ends all.
int follow(Model *m, bool (*started)(Model *m, void *context, Error *err), void *context);
// On rank 0, at its end, if the others follow: their exit status.
void lead_end(int status);

#endif
