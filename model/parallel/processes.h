// The processes that compute one model together, a GPU each, over hosts too: mpirun -n N ./llama. They are started by
// MPI's launcher, and the same program, flags and model file are everywhere. Rank 0 is the one that a user talks to;
// what the others do is in lead.h. MPI is behind this header alone: processes_mpi.c,
// or processes_none.c in builds without it.
//
// Started in any other way a process is alone: MPI is not touched, and all of this does nothing.
#ifndef PROCESSES_H
#define PROCESSES_H

#include <signal.h>
#include <stddef.h>

#include "../../tokenizer/error.h"

typedef struct {
    int rank, count;             // of all
    int local_rank, local_count; // of those on this host
} Processes;

extern Processes processes; // {0, 1, 0, 1}: this one alone

// What this build has for it, for --version: the versions of Open MPI and NCCL, or "no MPI".
extern const char *const processes_library;

// To be called first: joins the others. say prints a line on standard error, as the program's messages are.
// Collective, as are all of the following: every process makes the same calls in the same order.
bool processes_begin(void (*say)(const char *format, ...), Error *err);
// Waits for the others' ends.
void processes_end(void);

// Whether none has failed: where one has, err is the first one's, with its rank before it if it is not rank 0's.
bool processes_agree(Error *err);
// The same in the middle of something that ends with processes_agree. Who fails before it goes to the end at once, and
// so does who is told here that another has failed: the end does not ask again.
bool processes_agree_so_far(Error *err);
// data [bytes] of rank 0 to all.
void processes_broadcast(void *data, size_t bytes);
// own [bytes] of each rank to all: all [count][bytes].
void processes_gather(const void *own, void *all, size_t bytes);
// The same of a few bytes that may be long in coming: rank 0 sends, the others receive, and do not keep a core busy
// meanwhile. False: *stop became non-zero, and rank 0 has not come to its end in the 2 s after that.
void processes_send(const void *data, size_t bytes);
bool processes_receive(void *data, size_t bytes, const volatile sig_atomic_t *stop);

// Says what has failed, and ends all processes, wherever they are: the launcher's exit status is that.
__attribute__((noreturn)) void processes_abort(const Error *err, int status);

// launcher.c: how many processes the launcher has started, by its environment; 1: there is no launcher.
// This one's rank.
int launcher_count(void);
int launcher_rank(void);

#endif
