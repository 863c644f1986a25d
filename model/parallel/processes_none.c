// A build without MPI or NCCL: a process is alone.
#include <stdlib.h>
#include <time.h>

#include "processes.h"

Processes processes = {0, 1, 0, 1};
const char *const processes_library = "no MPI";

bool processes_begin(void (*say)(const char *format, ...), Error *err) {
    (void)say;
    const int count = launcher_count();
    if (count == 1) return true;
    processes.rank = launcher_rank();
    // (The launcher ends all when one ends: rank 0 has a moment to say why.)
    if (processes.rank > 0) nanosleep(&(struct timespec){1, 0}, NULL);
    return fail(err, "started as %d processes, but this build has no MPI: see README.md, Several GPUs", count);
}

void processes_end(void) {
}

bool processes_agree(Error *err) {
    return !err->text[0];
}

bool processes_agree_so_far(Error *err) {
    return !err->text[0];
}

void processes_broadcast(void *data, size_t bytes) {
    (void)data, (void)bytes;
}

void processes_gather(const void *own, void *all, size_t bytes) {
    (void)own, (void)all, (void)bytes;
}

void processes_send(const void *data, size_t bytes) {
    (void)data, (void)bytes;
}

bool processes_receive(void *data, size_t bytes, const volatile sig_atomic_t *stop) {
    (void)data, (void)bytes, (void)stop;
    return false;
}

void processes_abort(const Error *err, int status) { // (nobody leads or follows)
    (void)err;
    exit(status);
}
