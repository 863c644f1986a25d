// The threads that share the CPU's work. The first work that is worth sharing starts them; between works they spin for
// a moment and then sleep, and they end with the program.
#ifndef THREADS_H
#define THREADS_H

#include <stdint.h>

#include "thread_count.h"

// From the next work on n threads compute, the caller's included, 1 to MAX_THREADS; 0: default_threads(). Not to be
// called while they do.
void threads_set(int n);
// How many there are: what was set, or default_threads().
int threads_count(void);

// Calls body(context, begin, end) for parts of [0, n) of `grain` indices (the last has fewer), in any order, by several
// threads, and returns when all are done. What body does for an index must not depend on the part it is in, nor on what
// another part has done; then the result does not depend on the number of threads. One thread does all of it, as one
// part, where n is at most grain, and where other work is being shared already, by a caller of this one or beside it.
// Threads that cannot be started are done without.
typedef void ParallelBody(void *context, int64_t begin, int64_t end);
void parallel_for(int64_t n, int64_t grain, ParallelBody *body, void *context);

// Calls body(context, i) for i = 0 .. n-1 at the same time, for work that waits for devices more than it computes: 0 by
// the caller, each other by a thread of its own, and returns when all are done. n: at most MAX_RUN. Where a thread
// cannot be started, its i and those after it are left out: only what all of them take from one list is certain to be
// done.
enum { MAX_RUN = 64 };
void threads_run(int n, void (*body)(void *context, int i), void *context);

#endif
