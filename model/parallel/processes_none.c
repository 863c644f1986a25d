// A build without MPI or NCCL: a process is alone. One of several tasks of a cluster's job may well want to be.
#include <stdlib.h>

#include "processes.h"

Processes processes = {0, 1, 0, 1};
const char *const processes_library = "no MPI";

bool processes_begin(void (*say)(const char *format, ...), Error *err) {
    (void)err;
    if (launcher_count() > 1 && launcher_rank() == 0)
        say("one of several processes, each of which computes by itself: this build has no MPI");
    return true;
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
