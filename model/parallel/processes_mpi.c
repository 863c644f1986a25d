// MPI. An error in one of its calls ends all processes: that is MPI's own way, with a message of its own.
#include "processes.h"

#include <mpi.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "shard.h"

#define TEXT_OF(x) #x
#define TEXT(x) TEXT_OF(x)
Processes processes = {0, 1, 0, 1};
const char *const processes_library =
    "Open MPI " TEXT(OMPI_MAJOR_VERSION) "." TEXT(OMPI_MINOR_VERSION) "." TEXT(OMPI_RELEASE_VERSION) ", " NCCL_IS;
static void (*say_line)(const char *format, ...);
static bool others_failed; // which an agreement in the middle has said

static double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

// (Serialised: a thread that uploads weights may be the one that ends all.)
bool processes_begin(void (*say)(const char *format, ...), Error *err) {
    int provided;
    MPI_Comm host;
    say_line = say;
    if (launcher_count() == 1) return true;
    MPI_Init_thread(NULL, NULL, MPI_THREAD_SERIALIZED, &provided);
    MPI_Comm_rank(MPI_COMM_WORLD, &processes.rank);
    MPI_Comm_size(MPI_COMM_WORLD, &processes.count);
    MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, processes.rank, MPI_INFO_NULL, &host);
    MPI_Comm_rank(host, &processes.local_rank);
    MPI_Comm_size(host, &processes.local_count);
    MPI_Comm_free(&host);
    return processes.count <= MAX_SHARDS ||
           fail(err, "started as %d processes, expected at most %d", processes.count, MAX_SHARDS);
}

void processes_end(void) {
    int initialized;
    MPI_Initialized(&initialized);
    if (initialized) MPI_Finalize();
}

bool processes_agree_so_far(Error *err) {
    const bool failed = err->text[0];
    if (processes.count == 1) return !failed;
    Error *all = malloc((size_t)processes.count * sizeof *all);
    if (!all) processes_abort(&(Error){"out of memory: what went wrong elsewhere"}, 1);
    processes_gather(err, all, sizeof *all);
    int r = 0;
    while (r < processes.count && !all[r].text[0]) r++;
    if (r < processes.count) {
        others_failed = !failed;
        *err = all[r];
        if (r > 0 && !is_interrupt(err)) snprintf(err->text, sizeof err->text, "rank %d: %.480s", r, all[r].text);
    }
    free(all);
    return !err->text[0];
}

bool processes_agree(Error *err) {
    const bool ok = !others_failed && processes_agree_so_far(err);
    others_failed = false;
    return ok;
}

void processes_broadcast(void *data, size_t bytes) {
    MPI_Bcast(data, (int)bytes, MPI_BYTE, 0, MPI_COMM_WORLD);
}

void processes_gather(const void *own, void *all, size_t bytes) {
    MPI_Allgather(own, (int)bytes, MPI_BYTE, all, (int)bytes, MPI_BYTE, MPI_COMM_WORLD);
}

void processes_send(const void *data, size_t bytes) {
    for (int r = 1; r < processes.count; r++) MPI_Send(data, (int)bytes, MPI_BYTE, r, 0, MPI_COMM_WORLD);
}

// Between two tokens it asks again and again; after that it sleeps.
bool processes_receive(void *data, size_t bytes, const volatile sig_atomic_t *stop) {
    const double busy = 0.02, patience = 2;
    const struct timespec pause = {0, 200000};
    static double stopped; // when *stop was seen first
    double begin = seconds();
    for (;;) {
        int sent;
        MPI_Iprobe(0, 0, MPI_COMM_WORLD, &sent, MPI_STATUS_IGNORE);
        double now = seconds();
        if (*stop && stopped == 0) stopped = now;
        if (*stop && now - stopped > patience) return false;
        if (sent) break;
        if (now - begin < busy)
            sched_yield();
        else
            nanosleep(&pause, NULL);
    }
    MPI_Recv(data, (int)bytes, MPI_BYTE, 0, 0, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
    return true;
}

void processes_abort(const Error *err, int status) {
    say_line("rank %d: %s", processes.rank, err->text);
    MPI_Abort(MPI_COMM_WORLD, status);
    exit(status); // where that returns
}
