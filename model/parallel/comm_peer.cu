#include "comm.h"

#include <stdlib.h>
#include <time.h>

#include "../cuda/check.h"

struct PeerComm : Comm {
    int count;
    struct {
        int device;
        cudaStream_t stream; // the engine's
        cudaEvent_t event;   // recorded anew for each edge: a wait is for what was recorded before it
    } ranks[MAX_SHARDS];
};

// A rank's columns on their way to all ranks.
struct Push {
    const char *own;
    char *to[MAX_SHARDS]; // each at the rank's first column
    size_t row_bytes;     // of the whole
    unsigned bytes;       // of a row of own
    unsigned words;       // of all rows of own
    int count;
};

// Computes: nothing; copies a rank's columns to all ranks.
// Reads:    own [rows][bytes], in words of V.
// Writes:   to[r], rows row_bytes apart, of every rank.
// Grid:     any × 256, strided; a thread owns a word at a time.
// Requires: addresses, bytes and row_bytes multiples of V's size.
template <typename V> __global__ void push_kernel(const __grid_constant__ Push p) {
    const unsigned in_row = p.bytes / sizeof(V);
    for (unsigned i = blockIdx.x * blockDim.x + threadIdx.x; i < p.words; i += gridDim.x * blockDim.x) {
        const V word = ((const V *)p.own)[i];
        const size_t at = i / in_row * p.row_bytes + i % in_row * sizeof(V);
        for (int r = 0; r < p.count; r++) *(V *)(p.to[r] + at) = word;
    }
}

template <typename V> static cudaError_t push(Push p, int rows, cudaStream_t stream) {
    constexpr unsigned THREADS = 256, MOST_BLOCKS = 256;
    p.words = (unsigned)rows * (p.bytes / sizeof(V));
    unsigned blocks = (p.words + THREADS - 1) / THREADS;
    return launch_kernel(push_kernel<V>, blocks < MOST_BLOCKS ? blocks : MOST_BLOCKS, THREADS, 0, false, stream, p);
}

extern const CommWay peer_way;

bool comm_open(Comm **comm, int count, const int *devices, const cudaStream_t *streams, Error *err) {
    PeerComm *c = (PeerComm *)calloc(1, sizeof *c);
    *comm = c;
    if (!c) return fail(err, "out of memory: what %d GPUs exchange", count);
    c->way = &peer_way;
    c->count = count;
    for (int r = 0; r < count; r++) {
        c->ranks[r].device = devices[r];
        c->ranks[r].stream = streams[r];
        CUDA_TRY(cudaSetDevice(devices[r]));
        CUDA_TRY(cudaEventCreateWithFlags(&c->ranks[r].event, cudaEventDisableTiming));
        for (int q = 0; q < count; q++) {
            if (devices[q] == devices[r]) continue;
            cudaError_t status = cudaDeviceEnablePeerAccess(devices[q], 0);
            if (status == cudaErrorPeerAccessAlreadyEnabled)
                cudaGetLastError(); // an earlier start's
            else if (status != cudaSuccess)
                return fail(err, "GPU %d cannot reach the memory of GPU %d: %s", devices[r], devices[q],
                            cudaGetErrorString(status));
        }
    }
    CUDA_TRY(cudaSetDevice(devices[0]));
    return true;
}

static void close_peers(Comm *comm) {
    PeerComm *c = (PeerComm *)comm;
    for (int r = 0; r < c->count; r++)
        if (c->ranks[r].event) cudaEventDestroy(c->ranks[r].event);
    free(c);
}

static bool reaches_peers(const Comm *) {
    return true;
}

static bool reach_peers(Comm *comm, void *const *own, void **all, Error *) {
    for (int r = 0; r < ((PeerComm *)comm)->count; r++) all[r] = own[r];
    return true;
}

static bool record(PeerComm *c, int rank, Error *err) {
    CUDA_TRY(cudaSetDevice(c->ranks[rank].device));
    CUDA_TRY(cudaEventRecord(c->ranks[rank].event, c->ranks[rank].stream));
    return true;
}

static bool wait_for(PeerComm *c, int rank, int other, Error *err) {
    if (rank == other) return true;
    CUDA_TRY(cudaSetDevice(c->ranks[rank].device));
    CUDA_TRY(cudaStreamWaitEvent(c->ranks[rank].stream, c->ranks[other].event, 0));
    return true;
}

static bool gather_peers(Comm *comm, const CommPart *parts, int rows, size_t row_bytes, Error *err) {
    PeerComm *c = (PeerComm *)comm;
    for (int r = 0; r < c->count; r++) {
        const CommPart *part = &parts[r];
        Push p = {(const char *)part->own, {}, row_bytes, (unsigned)part->bytes, 0, c->count};
        size_t aligned = (size_t)part->own | part->bytes | part->at | row_bytes;
        for (int q = 0; q < c->count; q++) {
            p.to[q] = (char *)parts[q].all + part->at;
            aligned |= (size_t)parts[q].all;
        }
        CUDA_TRY(cudaSetDevice(c->ranks[r].device));
        CUDA_TRY(aligned % 16 ? push<uint>(p, rows, c->ranks[r].stream) : push<uint4>(p, rows, c->ranks[r].stream));
        if (!record(c, r, err)) return false;
    }
    for (int r = 0; r < c->count; r++)
        for (int q = 0; q < c->count; q++)
            if (!wait_for(c, r, q, err)) return false;
    CUDA_TRY(cudaSetDevice(c->ranks[0].device));
    return true;
}

static bool fork_peers(Comm *comm, Error *err) {
    PeerComm *c = (PeerComm *)comm;
    if (!record(c, 0, err)) return false;
    for (int r = 1; r < c->count; r++)
        if (!wait_for(c, r, 0, err)) return false;
    CUDA_TRY(cudaSetDevice(c->ranks[0].device));
    return true;
}

static bool join_peers(Comm *comm, Error *err) {
    PeerComm *c = (PeerComm *)comm;
    for (int r = 1; r < c->count; r++)
        if (!record(c, r, err) || !wait_for(c, 0, r, err)) return false;
    CUDA_TRY(cudaSetDevice(c->ranks[0].device));
    return true;
}

// (A GPU that has failed may never let the event come.)
static bool wait_for_peers(Comm *comm, cudaEvent_t event, Error *err) {
    PeerComm *c = (PeerComm *)comm;
    const struct timespec pause = {0, 20000};
    for (unsigned turn = 0;; turn++) {
        cudaError_t status = cudaEventQuery(event);
        if (status == cudaSuccess) return true;
        if (status != cudaErrorNotReady) return fail_on_gpu(c->ranks[0].device, status, err);
        for (int r = 1; r < c->count && turn % 256 == 255; r++) {
            status = cudaStreamQuery(c->ranks[r].stream);
            if (status != cudaSuccess && status != cudaErrorNotReady)
                return fail_on_gpu(c->ranks[r].device, status, err);
        }
        if (turn > 1000000) nanosleep(&pause, NULL); // a long prompt
    }
}

const CommWay peer_way = {gather_peers,  fork_peers,  join_peers, wait_for_peers,
                          reaches_peers, reach_peers, close_peers};
