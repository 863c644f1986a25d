// A build without NCCL or MPI: processes_begin has refused to be one of several.
#include "comm.h"

bool comm_open_processes(Comm **comm, int device, cudaStream_t stream, Error *err) {
    (void)device, (void)stream;
    *comm = NULL;
    return fail(err, "this build has no NCCL");
}
