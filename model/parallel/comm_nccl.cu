// A GPU in each of several processes: NCCL moves what they gather.
#include "comm.h"

#include <nccl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

extern "C" {
#include "processes.h"
}
#include "../cuda/check.h"

// Of the parts of all ranks on their way, in rows that are cut where these would not fit.
enum { STAGING_BYTES = 64 << 20 };
// Blocks of each other rank that are mapped here, at most: 4.
enum { MAX_MAPPED = 4 * MAX_SHARDS };

struct NcclComm : Comm {
    int device;
    cudaStream_t stream;
    ncclComm_t nccl;
    char *staging;            // [count][rows][the largest part's bytes]
    void *mapped[MAX_MAPPED]; // blocks of other ranks
    int n_mapped;
};

#define NCCL_TRY(call) \
    do { \
        ncclResult_t result_ = (call); \
        if (result_ != ncclSuccess) \
            return fail(err, "%s:%d: %s: %s", __FILE__, __LINE__, #call, ncclGetErrorString(result_)); \
    } while (0)

// ---- a gather -------------------------------------------------------------------------------------------------------

// Parts of rows, each rank's after the other's, to whole rows.
struct Unpack {
    const char *from; // [count][pitch]
    char *to;         // [rows][row_bytes]
    size_t row_bytes, pitch;
    unsigned at[MAX_SHARDS], bytes[MAX_SHARDS]; // of a row of each part
    int rows;
};

// Computes: nothing; copies the parts of all ranks to where they belong in whole rows.
// Reads:    from: of each rank [rows][bytes], in words of V.
// Writes:   to [rows][row_bytes].
// Grid:     any × count blocks of 256, strided; a thread owns a word of rank blockIdx.y at a time.
// Requires: addresses, pitch, row_bytes and of each part at and bytes multiples of V's size.
template <typename V> __global__ void unpack_kernel(const __grid_constant__ Unpack u) {
    const int rank = blockIdx.y;
    const unsigned in_row = u.bytes[rank] / sizeof(V), words = in_row * u.rows;
    const V *from = (const V *)(u.from + rank * u.pitch);
    char *to = u.to + u.at[rank];
    for (unsigned i = blockIdx.x * blockDim.x + threadIdx.x; i < words; i += gridDim.x * blockDim.x)
        *(V *)(to + i / in_row * u.row_bytes + i % in_row * sizeof(V)) = from[i];
}

template <typename V> static void unpack(const Unpack &u, cudaStream_t stream) {
    constexpr unsigned THREADS = 256, MOST_BLOCKS = 128;
    const unsigned words = u.bytes[0] / sizeof(V) * u.rows, blocks = (words + THREADS - 1) / THREADS;
    unpack_kernel<V><<<dim3(blocks < MOST_BLOCKS ? blocks : MOST_BLOCKS, processes.count), THREADS, 0, stream>>>(u);
}

// Whether parts are of one size, each after the one before it: of one row they are the whole as they come.
static bool are_alike(const CommPart *parts) {
    bool ok = true;
    for (int r = 0; ok && r < processes.count; r++)
        ok = parts[r].bytes == parts[0].bytes && parts[r].at == (size_t)r * parts[0].bytes;
    return ok;
}

// The first part is the largest (shard.h). Where one is smaller all are sent from the staging, with something after
// them that nobody reads.
static bool gather_rows(NcclComm *c, const CommPart *parts, int rows, size_t row_bytes, Error *err) {
    const CommPart *own = &parts[processes.rank];
    const bool alike = are_alike(parts);
    const size_t largest = (size_t)rows * parts[0].bytes, pitch = alike ? largest : (largest + 15) / 16 * 16;
    char *mine = c->staging + processes.rank * pitch;
    const void *sent = alike ? own->own : mine;
    Unpack u = {c->staging, (char *)own->all, row_bytes, pitch, {}, {}, rows};
    size_t aligned = (size_t)own->all | row_bytes | pitch;
    for (int r = 0; r < processes.count; r++) {
        u.at[r] = (unsigned)parts[r].at;
        u.bytes[r] = (unsigned)parts[r].bytes;
        aligned |= parts[r].at | parts[r].bytes;
    }
    if (!alike)
        CUDA_TRY(cudaMemcpyAsync(mine, own->own, (size_t)rows * own->bytes, cudaMemcpyDeviceToDevice, c->stream));
    NCCL_TRY(ncclAllGather(sent, c->staging, pitch, ncclInt8, c->nccl, c->stream));
    if (aligned % 16)
        unpack<uint>(u, c->stream);
    else
        unpack<uint4>(u, c->stream);
    CUDA_TRY(cudaGetLastError());
    return true;
}

static bool gather_nccl(Comm *comm, const CommPart *parts, int rows, size_t row_bytes, Error *err) {
    NcclComm *c = (NcclComm *)comm;
    const CommPart *own = &parts[processes.rank];
    if (rows == 1 && are_alike(parts)) {
        NCCL_TRY(ncclAllGather(own->own, own->all, own->bytes, ncclInt8, c->nccl, c->stream));
        return true;
    }
    const int most = (int)((STAGING_BYTES / processes.count - 16) / parts[0].bytes);
    for (int first = 0; first < rows; first += most) {
        CommPart some[MAX_SHARDS];
        memcpy(some, parts, (size_t)processes.count * sizeof *parts);
        CommPart *mine = &some[processes.rank];
        mine->own = (const char *)own->own + (size_t)first * own->bytes;
        mine->all = (char *)own->all + (size_t)first * row_bytes;
        if (!gather_rows(c, some, rows - first < most ? rows - first : most, row_bytes, err)) return false;
    }
    return true;
}

// ---- waiting --------------------------------------------------------------------------------------------------------

static bool nothing_to_order(Comm *, Error *) {
    return true;
}

// (Of a process that has ended NCCL may say nothing: its launcher ends this one then.)
static bool wait_nccl(Comm *comm, cudaEvent_t event, Error *err) {
    NcclComm *c = (NcclComm *)comm;
    const struct timespec pause = {0, 20000};
    for (unsigned turn = 0;; turn++) {
        cudaError_t status = cudaEventQuery(event);
        if (status == cudaSuccess) return true;
        if (status != cudaErrorNotReady) return fail_on_gpu(c->device, status, err);
        ncclResult_t result = ncclSuccess;
        if (turn % 256 == 255) ncclCommGetAsyncError(c->nccl, &result);
        if (result != ncclSuccess && result != ncclInProgress)
            return fail(err, "NCCL: %s (%.300s)", ncclGetErrorString(result), ncclGetLastError(c->nccl));
        if (turn > 1000000) nanosleep(&pause, NULL); // a long prompt
    }
}

// ---- opening --------------------------------------------------------------------------------------------------------

// What the ranks have to have in common, and what not.
struct Gpu {
    char name[sizeof(cudaDeviceProp::name)];
    cudaUUID_t uuid;
};

static bool check_gpus(int device, Error *err) {
    Gpu own, all[MAX_SHARDS];
    cudaDeviceProp properties;
    memset(&own, 0, sizeof own);
    cudaError_t status = cudaGetDeviceProperties(&properties, device);
    if (status != cudaSuccess) fail(err, "GPU %d: %s", device, cudaGetErrorString(status));
    if (!processes_agree_so_far(err)) return false;
    memcpy(own.name, properties.name, sizeof own.name);
    own.uuid = properties.uuid;
    processes_gather(&own, all, sizeof own);
    for (int r = 0; r < processes.count; r++) {
        if (strcmp(all[0].name, all[r].name) != 0)
            return fail(err, "rank %d has an %.100s, rank 0 an %.100s, expected GPUs that are alike", r, all[r].name,
                        all[0].name);
        for (int q = 0; q < r; q++)
            if (memcmp(&all[q].uuid, &all[r].uuid, sizeof own.uuid) == 0)
                return fail(err, "ranks %d and %d have the same GPU, expected one for each", q, r);
    }
    return true;
}

extern const CommWay nccl_way;

static bool open_nccl(NcclComm *c, Error *err) {
    ncclUniqueId id;
    memset(&id, 0, sizeof id);
    if (processes.rank == 0) NCCL_TRY(ncclGetUniqueId(&id));
    processes_broadcast(&id, sizeof id);
    NCCL_TRY(ncclCommInitRank(&c->nccl, processes.count, id, processes.rank));
    CUDA_TRY(cudaMalloc((void **)&c->staging, STAGING_BYTES));
    return true;
}

bool comm_open_processes(Comm **comm, int device, cudaStream_t stream, Error *err) {
    NcclComm *c = (NcclComm *)calloc(1, sizeof *c);
    *comm = c;
    if (!c)
        fail(err, "out of memory: what %d GPUs exchange", processes.count);
    else
        c->way = &nccl_way;
    if (!check_gpus(device, err)) return false;
    c->device = device;
    c->stream = stream;
    if (!open_nccl(c, err)) processes_abort(err, 1);
    return true;
}

// (What is mapped is unmapped everywhere before anybody frees it.)
static void close_nccl(Comm *comm) {
    NcclComm *c = (NcclComm *)comm;
    Error none = {""};
    for (int i = 0; i < c->n_mapped; i++) cudaIpcCloseMemHandle(c->mapped[i]);
    if (c->n_mapped) processes_agree(&none);
    if (c->nccl) ncclCommDestroy(c->nccl);
    cudaFree(c->staging);
    free(c);
}

// ---- the others' memory ---------------------------------------------------------------------------------------------

static bool reaches_nccl(const Comm *) {
    return processes.local_count == processes.count;
}

static bool map_blocks(NcclComm *c, void *own, void **all, Error *err) {
    cudaIpcMemHandle_t handle, handles[MAX_SHARDS];
    memset(&handle, 0, sizeof handle);
    CUDA_TRY(cudaSetDevice(c->device));
    CUDA_TRY(cudaIpcGetMemHandle(&handle, own));
    processes_gather(&handle, handles, sizeof handle);
    for (int r = 0; r < processes.count; r++) {
        if (r != processes.rank) {
            if (c->n_mapped == MAX_MAPPED) return fail(err, "more than %d blocks of other GPUs", MAX_MAPPED);
            CUDA_TRY(cudaIpcOpenMemHandle(&all[r], handles[r], cudaIpcMemLazyEnablePeerAccess));
            c->mapped[c->n_mapped++] = all[r];
        } else
            all[r] = own;
    }
    return true;
}

static bool reach_nccl(Comm *comm, void *const *own, void **all, Error *err) {
    if (!map_blocks((NcclComm *)comm, own[0], all, err)) processes_abort(err, 1);
    return true;
}

const CommWay nccl_way = {gather_nccl,  nothing_to_order, nothing_to_order, wait_nccl,
                          reaches_nccl, reach_nccl,       close_nccl};
