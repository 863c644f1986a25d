// What the GPUs that share a model exchange. Two kinds of builds and starts ask for more than one way; an engine sees
// this header alone:
//
//   one GPU        no Comm at all (NULL): a shard's part is the whole, and nothing is enqueued.
//                  CudaState points x_all at x
//   comm_peer.cu   the GPUs of one process (--gpus): one thread enqueues for all of them, and kernels store into each
//                  other's memory
//   comm_nccl.cu   a GPU in each of several processes (processes.h), on one host or on several: NCCL's all-gathers.
//                  comm_none.cu stands for it in builds without NCCL or MPI
//
// Who owns what: a Comm has the ranks' devices, their streams (the engine's) and an event of each. Buffers are the
// engine's: a CommPart says where a rank's part is, and where the whole of it goes.
//
// ---- Order ----------------------------------------------------------------------------------------------------------
//
// A gather is, on the stream of each rank: a kernel that stores the rank's columns to all ranks; an event; waits for
// the events of all others. So what a rank enqueues afterwards finds every part, and by then it has finished whatever
// it had enqueued before. Why a part never overwrites what another rank still reads: a rank stores to a buffer for the
// second time only after it has waited for a gather between the two, of another buffer, whose event each rank records
// after it has read the first:
//
//   buffer     read by                         before that rank's part of    which its owner waits for before it writes
//   att_all    wo's product                    x (after attention)           att_all of the next layer
//   x_all      the norm before gate and up     h                             x (after feed-forward)
//   h_all      w2's product                    x (after feed-forward)        h of the next layer
//   x_all      the norm before QKV, lm_head    att_all of the next layer,    x of the next layer, or of the next batch
//                                              or the logits
//   logits     argmax; rank 0: the host        att_all of the next batch     the next batch's logits, at its end
//
// The embedding is no gather: each rank writes its own x_all, after waiting for the last gather that stored to it. A
// rank whose batch ends without logits has gathered nothing in its last layer, and reads nothing that others store to.
//
// By processes a gather is a collective on each rank's own stream: it ends when all parts are there, and it begins on a
// rank when that has finished what it had enqueued before. So the same order holds.
//
// In comm_peer.cu nothing polls: all waits are the stream's, so that several ranks can share one GPU (tests), and a
// CUDA graph captures a step of all ranks, with these edges in it.
#ifndef COMM_H
#define COMM_H

extern "C" {
#include "shard.h"
}
#include <cuda_runtime.h>

struct Comm;
struct CommPart;

// One of the ways: the functions below.
struct CommWay {
    bool (*gather)(Comm *comm, const CommPart *parts, int rows, size_t row_bytes, Error *err);
    bool (*fork)(Comm *comm, Error *err);
    bool (*join)(Comm *comm, Error *err);
    bool (*wait)(Comm *comm, cudaEvent_t event, Error *err);
    bool (*reaches)(const Comm *comm);
    bool (*reach)(Comm *comm, void *const *own, void **all, Error *err);
    void (*close)(Comm *comm);
};

struct Comm {
    const CommWay *way;
};

// What one rank gives to a gather, and where it wants the whole: all bytes are multiples of 4, addresses too.
struct CommPart {
    const void *own; // on its device [rows][bytes]
    size_t bytes;    // of a row
    size_t at;       // where they begin in a whole row
    void *all;       // on its device [rows][the whole row's bytes]
};

// Ranks 0 .. count - 1 with these devices and streams, the engine's. Ranks may share a device; of two that do not, each
// must reach the other's memory (usable_cuda asks).
bool comm_open(Comm **comm, int count, const int *devices, const cudaStream_t *streams, Error *err);
// Collective: this process's rank, with this device and stream. Refused, by all alike, where GPUs differ or one is two
// ranks'. Once it has succeeded, who fails has to end all processes (processes_abort): the others wait for its gathers.
bool comm_open_processes(Comm **comm, int device, cudaStream_t stream, Error *err);
// Not before graphs with its gathers are destroyed.
inline void comm_close(Comm *comm) {
    if (comm) comm->way->close(comm);
}

// Enqueues for all ranks that are here: every rank has all parts [count] of `rows` rows of row_bytes. Of a rank that is
// in another process a part has no addresses.
inline bool comm_gather(Comm *comm, const CommPart *parts, int rows, size_t row_bytes, Error *err) {
    return comm->way->gather(comm, parts, rows, row_bytes, err);
}
// What the others here are given from here on comes after what the first was given; and the other way around.
inline bool comm_fork(Comm *comm, Error *err) {
    return comm->way->fork(comm, err);
}
inline bool comm_join(Comm *comm, Error *err) {
    return comm->way->join(comm, err);
}
// What comm_wait fails with. A kernel that has waited for another GPU for too long has no error of its own.
inline bool fail_on_gpu(int device, cudaError_t status, Error *err) {
    return fail(err, "GPU %d: %s%s", device, cudaGetErrorString(status),
                status == cudaErrorLaunchFailure ? " (that is also what it says when another GPU did not answer)" : "");
}
// Waits on the host for an event of the first rank here that comes after a join; fails, and names the GPU, when one of
// them does.
inline bool comm_wait(Comm *comm, cudaEvent_t event, Error *err) {
    return comm->way->wait(comm, event, err);
}
// Whether kernels of one rank reach the memory of all others: of several processes those of one host do. Where they do,
// all [count] says where what each rank has at own is reached from here: the start of a block of cudaMalloc's; own: of
// each rank that is here. Collective. What is reached stays so until comm_close, and may be freed after that alone.
inline bool comm_reaches(const Comm *comm) {
    return comm->way->reaches(comm);
}
inline bool comm_reach(Comm *comm, void *const *own, void **all, Error *err) {
    return comm->way->reach(comm, own, all, err);
}

#endif
