// The GPU engines' memory: what they need, whether there is room for it, opening and closing. Engine cublas.
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "gemm.h"
#include "ops.h"
#include "packed_product.h"
#include "prompt_product.h"
#include "upload.h"
#include "widen.h"

extern "C" {
#include "../parallel/processes.h"
}

enum {
    MAX_ROWS = 8192, // of one pass over the weights
    // Where memory is short:
    LEAST_ROWS = MAX_STEP_ROWS + MAX_SLOTS, // a step of all slots, and as many rows of prompts
    LEAST_SLAB = 32 << 20                   // bytes of a slab of widened rows
};

// ---- memory ---------------------------------------------------------------------------------------------------------

struct Buffer {
    void **at;
    uint64_t bytes;
};

enum { N_BUFFERS = 36, BUFFER_ALIGNMENT = 256 };

// Of a rank's cache: bytes of K, or of V, and of a page of both.
static uint64_t own_cache_bytes(const Model *m) {
    return m->kv.bytes / 2 / (uint64_t)m->config.n_kv_heads * (uint64_t)own_kv_heads(m);
}
static uint64_t own_page_bytes(const Model *m, const CudaState *s) {
    return cache_page_bytes(&m->config, s->element) / (uint64_t)m->config.n_kv_heads * (uint64_t)own_kv_heads(m);
}

static uint64_t table_bytes(const Model *m) {
    return (uint64_t)m->kv.n_slots * (uint64_t)kv_pages(m->kv.max_len) * sizeof(int);
}

// Buffers of attention, which nobody reads once the feed-forward part has begun.
enum { N_ATTENTION = 3 };
static void list_attention(const Model *m, CudaState *s, Buffer *list) {
    const uint64_t T = (uint64_t)m->max_rows, e = s->element, head_dim = (uint64_t)m->config.head_dim;
    const uint64_t q = (uint64_t)own_heads(m) * head_dim, qkv = q + 2 * (uint64_t)own_kv_heads(m) * head_dim;
    list[0] = {(void **)&s->qkv, T * qkv * 4};
    list[1] = {&s->qkv_in, s->type == DTYPE_F32 ? 0 : T * qkv * e}; // of F32 it is qkv
    list[2] = {&s->att, T * q * e};
}

static uint64_t gate_up_bytes(const Model *m) {
    const uint64_t hidden = (uint64_t)m->shard.hidden.n, dim = (uint64_t)m->config.dim;
    return (uint64_t)m->max_rows * (2 * hidden > dim ? 2 * hidden : dim) * 4;
}

// Those that are at the end of gate_up, which nobody reads before the feed-forward part but its first [T][dim]
// (a product that is added, and rows with logits): offsets [N_ATTENTION] in bytes. False: they are buffers of their
// own, since they do not fit, or since other GPUs may read them a little longer.
static bool attention_in_gate_up(const Model *m, CudaState *s, uint64_t *offsets) {
    const uint64_t first = (uint64_t)m->max_rows * (uint64_t)m->config.dim * 4;
    uint64_t at = gate_up_bytes(m) / BUFFER_ALIGNMENT * BUFFER_ALIGNMENT;
    Buffer list[N_ATTENTION];
    list_attention(m, s, list);
    for (int i = 0; i < N_ATTENTION; i++) {
        const uint64_t bytes = (list[i].bytes + BUFFER_ALIGNMENT - 1) / BUFFER_ALIGNMENT * BUFFER_ALIGNMENT;
        if (m->shard.count > 1 || at < first + bytes) return false;
        offsets[i] = at -= bytes;
    }
    return true;
}

// Every buffer of a rank but the weights, sized for the context; fills list and returns how many.
static int list_buffers(Model *m, CudaState *s, Buffer *list) {
    const Config *c = &m->config;
    const bool several = m->shard.count > 1, first = local_rank(m) == 0;
    const uint64_t T = (uint64_t)m->max_rows, e = s->element, L = (uint64_t)s->max_logits;
    const uint64_t own_dim = (uint64_t)m->shard.dim.n, own_hidden = (uint64_t)m->shard.hidden.n;
    const Buffer all[] = {
        {&m->kv.k, own_cache_bytes(m)},
        {&m->kv.v, own_cache_bytes(m)},
        {(void **)&s->rope_freq, (uint64_t)c->head_dim / 2 * 4},
        {(void **)&s->x, T * own_dim * 4},
        {&s->xb, T * (uint64_t)c->dim * e},
        {(void **)&s->gate_up, gate_up_bytes(m)},
        {&s->h, T * own_hidden * e},
        {s->fp8 ? (void **)&s->codes : NULL, T * (uint64_t)most_columns(c)},
        {s->fp8 ? (void **)&s->code_scales : NULL, T * 4},
        {several ? (void **)&s->x_all : NULL, T * (uint64_t)c->dim * 4},
        {several ? &s->att_all : NULL, T * (uint64_t)c->q_dim * e},
        {several ? &s->h_all : NULL, T * (uint64_t)c->hidden_dim * e},
        {several ? (void **)&s->own_logits : NULL, L * (uint64_t)m->shard.vocab.n * 4},
        {(void **)&s->rope_table, T * (uint64_t)c->head_dim / 2 * 8},
        {(void **)&s->tokens, T * 4},
        {(void **)&s->pos, T * 4},
        {(void **)&s->row_slots, T * 4},
        {(void **)&s->logit_rows, MAX_STEP_ROWS * 4},
        {(void **)&s->logit_pos, MAX_STEP_ROWS * 4},
        {(void **)&s->logit_slots, MAX_STEP_ROWS * 4},
        {(void **)&s->logits, L * (uint64_t)c->vocab_size * 4},
        {(void **)&s->other_logits, L * (uint64_t)c->vocab_size * 4},
        {(void **)&s->argmax, MAX_STEP_ROWS * 4},
        {first ? (void **)&s->sample.bins : NULL, L * sizeof *s->sample.bins},
        {first ? (void **)&s->sample.jobs : NULL, L * sizeof *s->sample.jobs},
        {(void **)&s->step, sizeof *s->step},
        {(void **)&s->slots, MAX_SLOTS * 4},
        {(void **)&s->block_table, table_bytes(m)},
        {(void **)&s->step_table, table_bytes(m)},
        {s->widening.slab_bytes ? (void **)&s->widening.slabs : NULL, 2 * s->widening.slab_bytes},
        {&s->attention_workspace, s->attention_workspace_bytes},
        {&s->blas_workspace, BLAS_WORKSPACE_BYTES},
    };
    static_assert(sizeof all / sizeof *all + N_ATTENTION <= N_BUFFERS, "room in the list");
    int n = 0;
    uint64_t offsets[N_ATTENTION];
    Buffer attention[N_ATTENTION];
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        if (all[i].at) list[n++] = all[i];
    list_attention(m, s, attention);
    for (int i = 0; i < N_ATTENTION && !attention_in_gate_up(m, s, offsets); i++)
        if (attention[i].bytes) list[n++] = attention[i];
    return n;
}

static uint64_t buffer_bytes(Model *m, CudaState *s) {
    Buffer list[N_BUFFERS];
    uint64_t bytes = 0;
    for (int n = list_buffers(m, s, list), i = 0; i < n; i++) bytes += list[i].bytes;
    return bytes;
}

static bool size_state(Model *m, CudaState *s, Error *err) {
    const Config *c = &m->config;
    uint64_t positions = (uint64_t)m->kv.n_slots * (uint64_t)m->kv.max_len;
    m->max_rows = positions < MAX_ROWS ? (int)positions : MAX_ROWS;
    s->max_logits = model_logit_rows(m);
    AttentionArgs a;
    memset(&a, 0, sizeof a);
    a.dtype = attention_dtype(s->type);
    a.n_seq = m->kv.n_slots;
    a.n_heads = own_heads(m);
    a.n_kv_heads = own_kv_heads(m);
    a.head_dim = c->head_dim;
    a.cache_max_len = m->kv.max_len;
    for (int n_new = 1; n_new <= (m->speculates ? MAX_CANDIDATES + 1 : 1); n_new++) {
        a.n_new = n_new;
        a.n_tokens = n_new > 1 ? model_step_rows(m) : 0;
        size_t bytes = attention_workspace_bytes(&a);
        if (bytes == SIZE_MAX) return fail(err, "%s", attention_error());
        if (bytes > s->attention_workspace_bytes) s->attention_workspace_bytes = bytes;
    }
    return true;
}

// Bytes that a GPU has to hold, and has.
struct GpuNeeds {
    uint64_t weights, buffers, page; // page: of the cache, of both K and V
    uint64_t free, total;
};
static const uint64_t RESERVE = 256 << 20;      // the upload's staging, kernels' own needs; in GpuNeeds.buffers
static const uint64_t NCCL_RESERVE = 512 << 20; // the same of NCCL, by several processes

static uint64_t pages_that_fit(const GpuNeeds *g) {
    uint64_t needed = g->weights + g->buffers;
    return needed < g->free ? (g->free - needed) / g->page : 0;
}

// What each GPU needs and has, other processes' too; fills needs, and returns how many there are (0: an error).
static int list_needs(Model *m, const Plan *plans, GpuNeeds *needs, Error *err) {
    const int n = m->one_gpu ? 1 : m->shard.count;
    memset(needs, 0, (size_t)n * sizeof *needs);
    bool ok = for_shards(m, err, [&](Model *m, CudaState *s) {
        GpuNeeds *g = &needs[m->one_gpu ? 0 : m->shard.rank];
        size_t free_bytes, total;
        CUDA_TRY(cudaMemGetInfo(&free_bytes, &total));
        g->free = m->gpu_memory && m->gpu_memory < free_bytes ? m->gpu_memory : free_bytes;
        g->total = total;
        if (g->buffers == 0) g->buffers = RESERVE + (m->by_processes ? NCCL_RESERVE : 0);
        g->weights += plans[local_rank(m)].bytes;
        g->buffers += buffer_bytes(m, s);
        g->page += own_page_bytes(m, s);
        return true;
    });
    if (m->by_processes && (ok = processes_agree_so_far(err))) {
        const GpuNeeds own = needs[m->shard.rank];
        processes_gather(&own, needs, sizeof own);
    }
    return ok ? n : 0;
}

// The fewest GPUs with as much memory free as that one, more than there are now, on which the model would fit with so
// many pages. 0: none.
static int gpus_that_fit(const Model *m, const CudaState *s, uint64_t free_bytes, uint64_t pages) {
    const size_t layers = (size_t)m->config.n_layers * sizeof *m->weights.layers;
    Model part = *m;
    Error err = {""};
    int fit = 0;
    if (!(part.weights.layers = (LayerWeights *)malloc(layers))) return 0;
    for (int n = m->shard.count + 1; !fit && n <= MAX_SHARDS; n++) {
        CudaState state = *s;
        Plan plan;
        if (!shard_check(&m->config, "--gpus", n, &err)) continue;
        memcpy(part.weights.layers, m->weights.layers, layers);
        part.shard = shard_of(&m->config, 0, n); // no other has more
        if (plan_weights(&plan, &part, &state, &err)) {
            GpuNeeds needs = {plan.bytes, buffer_bytes(&part, &state) + RESERVE, own_page_bytes(&part, s), free_bytes,
                              0};
            if (pages_that_fit(&needs) >= pages) fit = n;
        }
        plan_free(&plan);
    }
    free(part.weights.layers);
    return fit;
}

// Compares what is needed with what is free before anything is allocated, and sizes the cache: by the GPU that has room
// for the fewest pages. Without kv_memory it has pages for all that the slots may hold or, where that does not fit
// beside the rest, those that leave SPARE, and at least one sequence's. Before it gives up, prompts come in smaller
// parts: much of the buffers is of so many rows. Then matrices are widened in smaller slabs.
static bool size_cache(Model *m, const Plan *plans, Error *err) {
    const uint64_t SPARE = 1000000000;
    const CudaState *s = (const CudaState *)m->state;
    const uint64_t page = cache_page_bytes(&m->config, s->element), one = (uint64_t)kv_pages(m->kv.max_len),
                   all = (uint64_t)m->kv.n_slots * one;
    bool whole = m->kv_memory == KV_MEMORY_ALL, asked = m->kv_memory && !whole;
    uint64_t least = whole ? all : asked ? m->kv_memory / page : one;
    if (least > all) least = all;
    GpuNeeds needs[MAX_SHARDS];
    int n, tightest;
    for (;;) {
        if ((n = list_needs(m, plans, needs, err)) == 0) return false;
        tightest = 0;
        for (int i = 1; i < n; i++)
            if (pages_that_fit(&needs[i]) < pages_that_fit(&needs[tightest])) tightest = i;
        if (pages_that_fit(&needs[tightest]) >= least) break;
        if (m->max_rows > LEAST_ROWS) {
            const int rows = m->max_rows / 2 > LEAST_ROWS ? m->max_rows / 2 : LEAST_ROWS;
            if (!for_shards(m, err, [&](Model *own, CudaState *) { return own->max_rows = rows, true; })) return false;
            continue;
        }
        const size_t slab = s->widening.slab_bytes / 2;
        if (slab < LEAST_SLAB || slab < s->widening.least_bytes) break;
        if (!for_shards(m, err, [&](Model *, CudaState *s) { return s->widening.slab_bytes = slab, true; }))
            return false;
    }
    const GpuNeeds *g = &needs[tightest];
    const uint64_t room = pages_that_fit(g);
    double gb_weights = (double)g->weights * 1e-9, gb_buffers = (double)g->buffers * 1e-9,
           gb_free = (double)g->free * 1e-9;
    char where[32] = "GPU memory", more[48] = "";
    if (n > 1) snprintf(where, sizeof where, "memory of %s %d", m->by_processes ? "rank" : "GPU", tightest);
    if (least > room && !asked) {
        int gpus = gpus_that_fit(m, s, g->free, room == 0 ? 1 : least);
        if (gpus)
            snprintf(more, sizeof more, "; on %d GPUs it would fit (%s %d)", gpus,
                     m->by_processes ? "mpirun -n" : "--gpus", gpus);
    }
    if (room == 0)
        return fail(err, "%s: %.2f GB of weights and %.2f GB of buffers, %.2f GB are free of %.2f%s", where, gb_weights,
                    gb_buffers, gb_free, (double)g->total * 1e-9, more);
    if (least > room && asked)
        return fail(err,
                    "--kv-memory %" PRIu64
                    ": %.2f GB of weights, %.2f GB of buffers, %.2f GB are free; at most %" PRIu64 " would fit",
                    m->kv_memory, gb_weights, gb_buffers, gb_free, room * page);
    if (least > room)
        return fail(err,
                    "%s: %.2f GB of weights, %.2f GB of cache and %.2f GB of buffers, %.2f GB are free; a context of "
                    "%" PRIu64 " would fit (-c)%s",
                    where, gb_weights, (double)(least * g->page) * 1e-9, gb_buffers, gb_free,
                    room / (least / one) * KV_PAGE, more);
    uint64_t spare = (SPARE - RESERVE) / g->page + 1, pages = all;
    if (all > room) pages = room > one + spare ? room - spare : one;
    return model_size_cache(m, s->element, (int64_t)pages, err);
}

// ---- the engine -----------------------------------------------------------------------------------------------------

// Whether the first `gpus` of n GPUs can compute a model together: they are alike, so that all have the same kernels,
// and each reaches the others' memory.
static bool can_share(int gpus, int n, Error *err) {
    cudaDeviceProp first, other;
    if (gpus > n) return fail(err, "--gpus %d: this machine has %d", gpus, n);
    CUDA_TRY(cudaGetDeviceProperties(&first, 0));
    for (int i = 1; i < gpus; i++) {
        CUDA_TRY(cudaGetDeviceProperties(&other, i));
        if (strcmp(first.name, other.name) != 0)
            return fail(err, "--gpus %d: GPU %d is an %.100s, GPU 0 an %.100s, expected GPUs that are alike", gpus, i,
                        other.name, first.name);
    }
    for (int i = 0; i < gpus; i++)
        for (int j = 0; j < gpus; j++) {
            int reaches = 1;
            if (i != j) CUDA_TRY(cudaDeviceCanAccessPeer(&reaches, i, j));
            if (!reaches)
                return fail(err, "--gpus %d: GPU %d cannot reach the memory of GPU %d (peer access)", gpus, i, j);
        }
    return true;
}

// Of several processes on a host each takes the GPU of its number, or the only one that its launcher lets it see.
static bool enter_own_gpu(int n, Error *err) {
    if (n > 1 && n < processes.local_count)
        return fail(err, "%d processes on a host with %d GPUs, expected a GPU for each", processes.local_count, n);
    CUDA_TRY(cudaSetDevice(n == 1 ? 0 : processes.local_rank));
    return true;
}

// Whether --precision fp8 has products of the model's shape: of rows in units of 16 bytes, their scales multiplied by
// cuBLAS, which does so on Hopper alone.
static bool have_fp8_products(const Model *m, const cudaDeviceProp *gpu, Error *err) {
    enum { UNIT = 16, LT_OUTER_SCALES = 120900 };
    const Config *c = &m->config;
    const size_t lt = cublasLtGetVersion();
    if (gpu->major != 9)
        return fail(err, "FP8 products need compute capability 9.0, %s has %d.%d", gpu->name, gpu->major, gpu->minor);
    if (lt < LT_OUTER_SCALES)
        return fail(err, "FP8 products with scales of rows need cuBLASLt 12.9, here is %zu.%zu", lt / 10000,
                    lt / 100 % 100);
    return (c->dim % UNIT == 0 && c->q_dim % UNIT == 0 && c->kv_dim % UNIT == 0 && c->hidden_dim % UNIT == 0) ||
           fail(err, "dim %d, hidden_dim %d, queries of %d and keys of %d columns, FP8 products need multiples of %d",
                c->dim, c->hidden_dim, c->q_dim, c->kv_dim, UNIT);
}

bool usable_cuda(const Model *m, Error *err) {
    int n = 0, driver = 0, device = 0;
    cudaError_t status = cudaGetDeviceCount(&n);
    if (status == cudaErrorInsufficientDriver) {
        if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0)
            return fail(err, "no NVIDIA driver is installed");
        return fail(err, "the GPU's driver supports CUDA %d.%d, this program needs %d.%d", driver / 1000,
                    driver % 1000 / 10, CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10);
    }
    if (status != cudaSuccess || n == 0)
        return fail(err, "no GPU (%s)", status != cudaSuccess ? cudaGetErrorString(status) : "none is visible");
    if (m->by_processes && !enter_own_gpu(n, err)) return false;
    if (m->gpus > 1 && !m->one_gpu && !m->by_processes && !can_share(m->gpus, n, err)) return false;
    cudaFuncAttributes attributes;
    cudaDeviceProp properties;
    CUDA_TRY(cudaGetDevice(&device));
    CUDA_TRY(cudaGetDeviceProperties(&properties, device));
    if (kernel_attributes(&attributes) != cudaSuccess) {
        cudaGetLastError();
        return fail(err, "%s has compute capability %d.%d, for which this program was not built", properties.name,
                    properties.major, properties.minor);
    }
    if (m->precision == PRECISION_FP8 && !have_fp8_products(m, &properties, err)) return false;
    int d = m->config.head_dim;
    if (m->config.dim % 8 || m->config.hidden_dim % 8)
        return fail(err, "dim %d and hidden_dim %d, the GPU engines need multiples of 8", m->config.dim,
                    m->config.hidden_dim);
    return d == 64 || d == 96 || d == 128 || fail(err, "head_dim is %d, the GPU's attention has 64, 96 and 128", d);
}

// Quantised matrices are computed with as BF16 ones are.
static void choose_types(const Model *m, CudaState *s, bool for_fused) {
    const Config *c = &m->config;
    bool f32 = m->precision == PRECISION_F32, quantised = weights_are_quantised(m);
    s->type = f32 ? DTYPE_F32 : m->weights.dtype == DTYPE_F16 && !quantised ? DTYPE_F16 : DTYPE_BF16;
    s->element = (size_t)dtype_bytes[s->type];
    s->keeps_16_bits = for_fused && f32;
    s->one_order = for_fused && !f32;
    s->fp8 = m->precision == PRECISION_FP8;
    bool widens = quantised || (s->keeps_16_bits && m->weights.dtype != DTYPE_F32);
    if (widens) widen_size(&s->widening, (uint64_t)c->hidden_dim * c->dim, most_columns(c), s->element);
}

// A rank's stream, cuBLAS handle, tables, RoPE's frequencies.
static bool connect(Model *m, CudaState *s, Error *err) {
    cudaFuncAttributes attributes;
    CUDA_TRY(kernel_attributes(&attributes));
    // Not code for older GPUs that the driver compiled for this one. (Of several GPUs a kernel may follow a gather.)
    s->pdl = attributes.ptxVersion >= 90 && m->shard.count == 1;
    CUDA_TRY(cudaStreamCreateWithFlags(&s->stream, cudaStreamNonBlocking));
    CUBLAS_TRY(cublasCreate(&s->blas));
    CUBLAS_TRY(cublasSetStream(s->blas, s->stream));
    CUBLAS_TRY(cublasSetWorkspace(s->blas, s->blas_workspace, BLAS_WORKSPACE_BYTES));
    if (!widen_open(s, err) || (s->one_order && weights_are_quantised(m) && !packed_open(s, err)) ||
        (s->one_order && !prompt_open(s, err)))
        return false;
    if (s->fp8 && !choose_fp8_kernels(s, m->config.hidden_dim, m->config.dim, err)) return false;
    CUBLAS_TRY(cublasSetMathMode(s->blas, CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION)); // every sum in float32
    CUDA_TRY(cudaMallocHost((void **)&s->argmax_host, MAX_STEP_ROWS * sizeof(int)));
    CUDA_TRY(cudaMallocHost((void **)&s->other_argmax_host, MAX_STEP_ROWS * sizeof(int)));
    CUDA_TRY(cudaMemset(s->block_table, 0, table_bytes(m))); // the warm-up's sequence has all its positions on page 0
    // Once; every call leaves it ready.
    CUDA_TRY(cudaMemset(s->attention_workspace, 0, s->attention_workspace_bytes));
    CUDA_TRY(
        cudaMemcpy(s->rope_freq, m->rope_freq, (size_t)m->config.head_dim / 2 * sizeof(float), cudaMemcpyHostToDevice));
    return true;
}

// What rank 0 has for all: pinned memory, which every GPU reads, and what is read back.
static bool connect_host(Model *m, CudaState *s, Error *err) {
    CUDA_TRY(cudaStreamCreateWithFlags(&s->side, cudaStreamNonBlocking));
    CUDA_TRY(cudaEventCreateWithFlags(&s->argmax_ready, cudaEventDisableTiming));
    CUDA_TRY(cudaMallocHost((void **)&s->step_host, sizeof *s->step_host));
    CUDA_TRY(cudaMallocHost((void **)&s->pos_host, 2 * (size_t)m->max_rows * sizeof(int)));
    CUDA_TRY(cudaMallocHost((void **)&s->table_changes, table_bytes(m) / sizeof(int) * sizeof *s->table_changes));
    CUDA_TRY(cudaMallocHost((void **)&s->sample.jobs_host, (size_t)s->max_logits * sizeof *s->sample.jobs_host));
    CUDA_TRY(cudaMallocHost((void **)&s->sample.ids_host, (size_t)s->max_logits * sizeof *s->sample.ids_host));
    CUDA_TRY(cudaMallocHost((void **)&m->logits, (size_t)s->max_logits * (size_t)m->config.vocab_size * sizeof(float)));
    CUDA_TRY(cudaMemset(s->sample.bins, 0, (size_t)s->max_logits * sizeof *s->sample.bins)); // as the workspace
    return true;
}

// Computes on whatever is in memory, so that the first real prompt does not wait until kernels are loaded, which takes
// longer than to run them. Where products have a table of kernels, they are loaded by it, and all others by a prompt of
// any length, without the products that have what follows them within (prompt_open has loaded those); else two lengths
// load some of cuBLAS's. Nothing of it stays: no position is counted.
static bool warm_up(Model *m, Error *err) {
    CudaState *s = (CudaState *)m->state;
    static const int lengths[] = {12, 512};
    const int n = s->one_order ? 1 : 2, prompt_clusters = s->prompt_clusters;
    auto set_clusters = [&](int clusters) {
        return for_shards(m, err, [&](Model *, CudaState *s) { return s->prompt_clusters = clusters, true; });
    };
    int slot = 0, zeros[512] = {0};
    s->warming_up = true;
    s->table_changes[0] = {0, 0}; // as connect has it
    if (!load_sample_kernel(err) ||
        !for_shards(m, err,
                    [&](Model *, CudaState *s) { return load_product_kernels(s, err) && change_table(s, 1, err); }) ||
        !set_clusters(0))
        return false;
    for (int i = 0; i < n && lengths[i] <= m->max_rows && lengths[i] <= m->kv.max_len; i++) {
        int start[2] = {0, lengths[i]}, last = lengths[i] - 1;
        Batch b = {lengths[i], 1, 1, 0, zeros, &slot, start, &last, false};
        if (!forward_prompt(m, &b, 0, err) || !publish_argmax(s, 1, NULL, err) || !wait_for_shards(m, err))
            return false;
    }
    s->warming_up = false;
    return set_clusters(prompt_clusters);
}

// A state for each rank and, beyond rank 0, a Model: a copy of the caller's with its own shard, weights and cache.
static bool open_ranks(Model *m, bool (*prepare)(Model *m, Error *err), Error *err) {
    const int count = local_ranks(m);
    CudaState *first = NULL;
    for (int r = 0; r < count; r++) {
        CudaState *s = (CudaState *)calloc(1, sizeof *s);
        Model *own = m;
        if (!s) return fail(err, "out of memory: the engine's state");
        if (r == 0) {
            m->state = first = s;
            CUDA_TRY(cudaGetDevice(&s->device));
            if (count > 1 && !(s->peers = (Model *)calloc((size_t)count - 1, sizeof *s->peers)))
                return fail(err, "out of memory: %d ranks", count);
        } else {
            const size_t layers = (size_t)m->config.n_layers * sizeof *m->weights.layers;
            own = &first->peers[r - 1];
            *own = *m;
            own->state = s;
            own->shard = shard_of(&m->config, r, m->shard.count);
            s->device = m->one_gpu ? first->device : r;
            if (!(own->weights.layers = (LayerWeights *)malloc(layers))) return fail(err, "out of memory: rank %d", r);
            memcpy(own->weights.layers, m->weights.layers, layers);
        }
        choose_types(m, s, prepare != NULL);
        s->prepare = prepare;
        s->enqueue_step = enqueue_step_cublas;
    }
    return true;
}

// A rank's memory, and what needs it.
static bool allocate_rank(Model *m, CudaState *s, Plan *plan, Error *err) {
    const CudaState *first = (const CudaState *)plan->first->state;
    Buffer buffers[N_BUFFERS];
    if (local_rank(m) > 0) {
        m->kv = plan->first->kv; // lengths and pages are those of rank 0
        m->kv.k = m->kv.v = NULL;
    }
    int n = list_buffers(m, s, buffers);
    for (int i = 0; i < n; i++) {
        cudaError_t status = cudaMalloc(buffers[i].at, buffers[i].bytes ? buffers[i].bytes : 16);
        if (status != cudaSuccess)
            return fail(err, "GPU memory: %.2f GB: %s", (double)buffers[i].bytes * 1e-9, cudaGetErrorString(status));
    }
    if (cudaMalloc((void **)&s->weights, plan->bytes) != cudaSuccess)
        return fail(err, "GPU memory: %.2f GB of weights", (double)plan->bytes * 1e-9);
    uint64_t offsets[N_ATTENTION];
    if (attention_in_gate_up(m, s, offsets)) {
        Buffer attention[N_ATTENTION];
        list_attention(m, s, attention);
        for (int i = 0; i < N_ATTENTION; i++) *attention[i].at = (char *)s->gate_up + offsets[i];
    }
    if (s->type == DTYPE_F32) s->qkv_in = s->qkv;
    if (m->shard.count == 1) s->x_all = s->x, s->att_all = s->att, s->h_all = s->h;
    if (!place_tensors(plan, err) || !connect(m, s, err)) return false;
    if (local_rank(m) == 0) return connect_host(m, s, err);
    s->step_host = first->step_host;
    s->pos_host = first->pos_host;
    s->table_changes = first->table_changes;
    return true;
}

static bool connect_ranks(Model *m, Error *err) {
    int devices[MAX_SHARDS];
    cudaStream_t streams[MAX_SHARDS];
    Comm *comm = NULL;
    if (m->shard.count == 1) return true;
    if (m->by_processes) {
        CudaState *s = (CudaState *)m->state;
        return comm_open_processes(&s->comm, s->device, s->stream, err);
    }
    for (int r = 0; r < m->shard.count; r++) {
        const CudaState *s = (const CudaState *)model_of_rank(m, r)->state;
        devices[r] = s->device;
        streams[r] = s->stream;
    }
    bool ok = comm_open(&comm, m->shard.count, devices, streams, err);
    for (int r = 0; r < m->shard.count; r++) ((CudaState *)model_of_rank(m, r)->state)->comm = comm;
    return ok;
}

// What is where: with --verbose, of several GPUs.
static bool log_rank(Model *m, CudaState *s, const Plan *plan, Error *err) {
    const Shard *shard = &m->shard;
    cudaDeviceProp properties;
    CUDA_TRY(cudaGetDeviceProperties(&properties, s->device));
    fprintf(
        stderr,
        "GPU %d (%s): rank %d of %d, K/V heads %d to %d, rows from %d of dim, %d of hidden_dim, %d of the vocabulary: "
        "%.3f GB of weights, %.3f GB of keys and values, %.3f GB of buffers; results to %s\n",
        s->device, properties.name, shard->rank, shard->count, shard->kv_heads.first,
        shard->kv_heads.first + shard->kv_heads.n - 1, shard->dim.first, shard->hidden.first, shard->vocab.first,
        (double)plan->bytes * 1e-9, (double)own_cache_bytes(m) * 2e-9,
        (double)(buffer_bytes(m, s) - 2 * own_cache_bytes(m)) * 1e-9,
        !m->by_processes        ? m->one_gpu ? "the others on the same GPU" : "the others' memory, directly"
        : comm_reaches(s->comm) ? "the other processes' memory, directly, and by NCCL"
                                : "the other processes, by NCCL");
    return true;
}

// What the first upload thread does. (Other processes wait for the gathers in it.)
static bool meanwhile(Model *m, Error *err) {
    const CudaState *s = (CudaState *)m->state;
    bool ok = warm_up(m, err) && (!s->prepare || s->prepare(m, err));
    if (!ok && m->by_processes) processes_abort(err, 1);
    return ok;
}

// The bytes that all ranks have of weights and of buffers.
static void add_up_bytes(Model *m, const Plan *plans, Error *err) {
    uint64_t own[2] = {0, 0}, all[MAX_SHARDS][2] = {};
    for_shards(m, err, [&](Model *m, CudaState *s) {
        own[0] += plans[local_rank(m)].bytes;
        own[1] += buffer_bytes(m, s) - 2 * own_cache_bytes(m);
        return true;
    });
    memcpy(all[0], own, sizeof own);
    if (m->by_processes) processes_gather(own, all, sizeof own);
    m->weights.bytes = m->buffer_bytes = 0;
    for (const auto &of_process : all) m->weights.bytes += of_process[0], m->buffer_bytes += of_process[1];
}

bool open_cuda(Model *m, bool (*prepare)(Model *m, Error *err), Error *err) {
    const int count = m->shard.count;
    Plan plans[MAX_SHARDS];
    memset(plans, 0, sizeof plans);
    bool ok = open_ranks(m, prepare, err) && for_shards(m, err, [&](Model *own, CudaState *s) {
                  Plan *plan = &plans[local_rank(own)];
                  return plan_weights(plan, own, s, err) && (plan->first = m, size_state(own, s, err));
              });
    ok = ok && size_cache(m, plans, err) && for_shards(m, err, [&](Model *own, CudaState *s) {
             return allocate_rank(own, s, &plans[local_rank(own)], err);
         });
    m->two_passes = m->precision == PRECISION_FP8; // whose prompts and steps have products of their own
    ok = ok && connect_ranks(m, err) && upload_weights(plans, local_ranks(m), meanwhile, err);
    if (m->by_processes) ok = processes_agree_so_far(err) && ok;
    if (ok) add_up_bytes(m, plans, err);
    ok = ok && for_shards(m, err, [&](Model *own, CudaState *s) {
             return count == 1 || !m->verbose || log_rank(own, s, &plans[local_rank(own)], err);
         });
    cudaDeviceProp properties;
    if (ok && cudaGetDeviceProperties(&properties, ((CudaState *)m->state)->device) == cudaSuccess) {
        if (count == 1)
            snprintf(m->note, sizeof m->note, "%.60s", properties.name);
        else
            snprintf(m->note, sizeof m->note, "%d x %.56s", count, properties.name);
    }
    for (Plan &plan : plans) plan_free(&plan);
    return ok;
}

// (Before what they gather by is closed.)
static void destroy_graphs(CudaState *s) {
    for (auto &buffers : s->graphs)
        for (auto &graphs : buffers)
            for (cudaGraphExec_t graph : graphs)
                if (graph) cudaGraphExecDestroy(graph);
}

// (Pinned memory is rank 0's, but for the argmax.)
static void close_rank(Model *m, CudaState *s) {
    if (s->argmax_ready) cudaEventDestroy(s->argmax_ready);
    if (s->side) cudaStreamDestroy(s->side);
    widen_close(s);
    if (s->blas) cublasDestroy(s->blas);
    Buffer buffers[N_BUFFERS];
    int n = list_buffers(m, s, buffers);
    for (int i = 0; i < n; i++) cudaFree(*buffers[i].at);
    cudaFree(s->weights);
    cudaFreeHost(s->argmax_host);
    cudaFreeHost(s->other_argmax_host);
    if (s->stream) cudaStreamDestroy(s->stream);
    if (local_rank(m) == 0) {
        cudaFreeHost(s->step_host);
        cudaFreeHost(s->pos_host);
        cudaFreeHost(s->table_changes);
        cudaFreeHost(s->sample.jobs_host);
        cudaFreeHost(s->sample.ids_host);
        cudaFreeHost(m->logits);
    } else
        free(m->weights.layers);
    cudaGetLastError(); // an allocation that was refused is no error of what comes next
    free(s);
}

void close_cuda(Model *m) {
    CudaState *first = (CudaState *)m->state;
    if (!first) return;
    const int count = first->peers ? m->shard.count : 1;
    Model *peers = first->peers;
    for (int r = 0; r < count; r++) {
        const CudaState *s = (const CudaState *)model_of_rank(m, r)->state;
        if (s && s->stream) cudaStreamSynchronize(s->stream);
    }
    for (int r = 0; r < count; r++)
        if (model_of_rank(m, r)->state) destroy_graphs((CudaState *)model_of_rank(m, r)->state);
    comm_close(first->comm);
    for (int r = count - 1; r >= 0; r--) {
        Model *own = model_of_rank(m, r);
        CudaState *s = (CudaState *)own->state;
        if (!s) continue;
        if (count > 1) cudaSetDevice(s->device);
        close_rank(own, s);
    }
    free(peers);
    m->state = NULL;
}

static bool open_cublas(Model *m, Error *err) {
    return open_cuda(m, NULL, err);
}

extern "C" const Engine engine_cublas = {"cublas",        PRECISION_BF16, usable_cuda,      open_cublas,
                                         close_cuda,      forward_cuda,   read_logits_cuda, sample_cuda,
                                         allocate_pinned, free_pinned,    copy_pages_cuda,  NULL};
