#include "upload.h"

#include <atomic>
#include <mutex>
#include <stdlib.h>
#include <string.h>

enum {
    UPLOAD_BYTES = 4 << 20, // of one staging buffer
    UPLOAD_THREADS = 16
};

// ---- kernels --------------------------------------------------------------------------------------------------------

// Where row `row` of a matrix goes. head_dim > 0: row i of a head's first half becomes its row 2i, of its second half
// 2i + 1.
__device__ static uint64_t placed_row(uint64_t row, int head_dim) {
    if (head_dim == 0) return row;
    int i = (int)(row % head_dim), half = head_dim / 2;
    return row - i + (i < half ? 2 * i : 2 * (i - half) + 1);
}

// Computes: rows of a matrix in their new dtype and order (placed_row).
// Reads:    src S [rows][cols], rows first .. of the matrix.
// Writes:   dst D, the whole matrix.
// Grid:     rows × 256; a block owns a row.
// Requires: first + rows within the matrix.
template <typename D, typename S>
__global__ void place_rows_kernel(D *dst, const S *src, uint64_t first, uint64_t cols, int head_dim) {
    uint64_t to = placed_row(first + blockIdx.x, head_dim);
    for (uint64_t c = threadIdx.x; c < cols; c += blockDim.x)
        dst[to * cols + c] = from_float<D>(to_float(src[(uint64_t)blockIdx.x * cols + c]));
}

// Computes: a synthetic tensor (synthetic.h), its rows in their order on the device; ones where range is 0.
// Reads:    nothing.
// Writes:   dst [n/cols][cols].
// Grid:     any × 256, strided.
// Requires: none.
template <typename D>
__global__ void synthesize_kernel(D *dst, uint64_t n, uint64_t cols, float range, uint32_t salt, int head_dim) {
    for (uint64_t i = (uint64_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (uint64_t)gridDim.x * blockDim.x) {
        uint64_t row = i / cols;
        dst[placed_row(row, head_dim) * cols + i % cols] =
            from_float<D>(range == 0 ? 1.0f : __uint_as_float(synthetic_bits(i, salt, range)));
    }
}

// ---- where tensors go -----------------------------------------------------------------------------------------------

// One tensor on its way to the device.
struct Placement {
    Weight weight;       // its matrix or norm gets the address; the name is not kept
    uint64_t rows, cols; // a norm: one row
    DType from, to;      // in the file, and on the device: a norm is float32 in both
    uint64_t file_begin; // in the file's data; a synthetic model has none
    SyntheticTensor synthetic;
    char *at;     // on the device
    int head_dim; // of wq and wk, whose rows are interleaved; else 0
};

// The dtype on the device of a matrix that the file has as `from`: that of products, unless the engine widens by
// itself. Embeddings that are not the output matrix, too, enter no product: beside 16-bit products they stay in their
// 16 bits.
static DType device_dtype(const Plan *p, const Weight *w, DType from) {
    const CudaState *s = p->state;
    bool looked_up = w->matrix == &p->model->weights.tok_embeddings && !p->model->config.tie_embeddings;
    bool keeps = s->keeps_16_bits || (looked_up && s->type != DTYPE_F32);
    return keeps && from != DTYPE_F32 ? from : s->type;
}

// WeightVisitor: where every tensor goes, 128-byte aligned, which leaves no gap between wq, wk and wv.
static bool plan_tensor(void *context, const Weight *w, Error *err) {
    Plan *p = (Plan *)context;
    Placement *more = (Placement *)realloc(p->tensors, (p->n + 1) * sizeof *more);
    if (!more) return fail(err, "out of memory: %zu tensors", p->n + 1);
    p->tensors = more;
    const char *last = strrchr(w->name, '.');
    bool rotated = last && (strcmp(last, ".wq") == 0 || strcmp(last, ".wk") == 0);
    const Tensor *in_file = model_is_synthetic(p->model) ? NULL : safetensors_find(&p->model->file, w->name);
    Placement t;
    memset(&t, 0, sizeof t);
    t.weight = *w;
    t.rows = w->matrix ? (uint64_t)w->matrix->rows : 1;
    t.cols = w->matrix ? (uint64_t)w->matrix->cols : (uint64_t)w->n;
    t.from = t.to = DTYPE_F32;
    if (w->matrix) {
        t.from = in_file ? in_file->dtype : DTYPE_BF16;
        t.to = w->matrix->dtype = device_dtype(p, w, t.from);
    }
    t.file_begin = in_file ? in_file->begin : 0;
    t.synthetic = synthetic_next(&p->synthetic, w);
    t.at = (char *)p->bytes; // an offset, until there is memory
    t.head_dim = rotated ? p->model->config.head_dim : 0;
    p->bytes += (weight_bytes(w) + 127) / 128 * 128;
    p->tensors[p->n++] = t;
    return true;
}

bool plan_weights(Plan *p, Model *m, CudaState *s, Error *err) {
    memset(p, 0, sizeof *p);
    p->model = m;
    p->state = s;
    p->synthetic.seed = m->seed;
    return weights_visit(m, plan_tensor, p, err);
}

void plan_free(Plan *p) {
    free(p->tensors);
}

// matmul_heads relies on wq, wk and wv without a gap, and on one dtype for them; matmul_gate_up on one for gate and up.
bool place_tensors(Plan *p, Error *err) {
    Model *m = p->model;
    for (size_t i = 0; i < p->n; i++) {
        Placement *t = &p->tensors[i];
        t->at = p->state->weights + (uint64_t)(uintptr_t)t->at;
        if (t->weight.matrix)
            t->weight.matrix->data = t->at;
        else
            *t->weight.norm = (const float *)t->at;
    }
    if (m->config.tie_embeddings) m->weights.output = m->weights.tok_embeddings;
    for (int i = 0; i < m->config.n_layers; i++) {
        const LayerWeights *l = &m->weights.layers[i];
        const char *q = (const char *)l->wq.data, *k = (const char *)l->wk.data, *v = (const char *)l->wv.data;
        if (k != q + matrix_bytes(&l->wq) || v != k + matrix_bytes(&l->wk) || l->wk.dtype != l->wq.dtype ||
            l->wv.dtype != l->wq.dtype || l->w3.dtype != l->w1.dtype)
            return fail(err, "layer %d: wq, wk and wv do not follow each other on the device, or their dtypes differ",
                        i);
    }
    return true;
}

static bool place(const Placement *t, const void *staged, uint64_t first, unsigned rows, cudaStream_t stream,
                  Error *err) {
    with_type(t->to, [&](auto to) {
        with_type(t->from, [&](auto from) {
            place_rows_kernel<<<rows, 256, 0, stream>>>((decltype(to) *)t->at, (const decltype(from) *)staged, first,
                                                        t->cols, t->head_dim);
        });
    });
    CUDA_TRY(cudaGetLastError());
    return true;
}

// ---- from the file --------------------------------------------------------------------------------------------------

// One thread's way from the file to the device: it reads into one pinned buffer while the other is being copied.
struct Stager {
    cudaStream_t stream;
    char *host[2], *device[2]; // of the upload's two blocks
    cudaEvent_t copied[2];
    int turn;
};

static bool stager_open(Stager *g, char *host, char *device, uint64_t bytes, Error *err) {
    CUDA_TRY(cudaStreamCreateWithFlags(&g->stream, cudaStreamNonBlocking));
    for (int i = 0; i < 2; i++) {
        g->host[i] = host + (uint64_t)i * bytes;
        g->device[i] = device + (uint64_t)i * bytes;
        CUDA_TRY(cudaEventCreateWithFlags(&g->copied[i], cudaEventDisableTiming));
    }
    return true;
}

static void stager_close(Stager *g) {
    for (int i = 0; i < 2; i++)
        if (g->copied[i]) cudaEventDestroy(g->copied[i]);
    if (g->stream) cudaStreamDestroy(g->stream);
}

// Bytes of a tensor's row in the file.
static uint64_t file_row_bytes(const Placement *t) {
    return t->cols * (uint64_t)dtype_bytes[t->from];
}

// Rows first .. first+rows of a tensor.
static bool stager_send(Stager *g, const Model *m, const Placement *t, uint64_t first, uint64_t rows, Error *err) {
    uint64_t row_bytes = file_row_bytes(t);
    int i = g->turn;
    g->turn ^= 1;
    CUDA_TRY(cudaEventSynchronize(g->copied[i])); // an event not yet recorded counts as done
    if (!safetensors_read(&m->file, g->host[i], t->file_begin + first * row_bytes, rows * row_bytes, err)) return false;
    CUDA_TRY(cudaMemcpyAsync(g->device[i], g->host[i], rows * row_bytes, cudaMemcpyHostToDevice, g->stream));
    if (!place(t, g->device[i], first, (unsigned)rows, g->stream, err)) return false;
    CUDA_TRY(cudaEventRecord(g->copied[i], g->stream));
    return true;
}

// The unit of work for one thread: whole rows, at most a buffer's worth.
struct UploadUnit {
    const Placement *tensor;
    uint64_t first, rows;
};

// What the reading threads share.
struct Upload {
    const Plan *plan;
    bool (*meanwhile)(Model *model, Error *err); // the first thread's
    const UploadUnit *units;
    size_t n_units;
    char *host, *device; // two buffers for each thread
    uint64_t buffer_bytes;
    std::atomic<size_t> next; // unit
    std::mutex lock;          // of the following
    uint64_t sent;            // bytes
    Error *err;
};

static void upload_thread(void *upload, int thread) {
    Upload *u = (Upload *)upload;
    Model *m = u->plan->model;
    Error own = {""};
    Stager g;
    memset(&g, 0, sizeof g);
    uint64_t mine = 2 * u->buffer_bytes * (uint64_t)thread;
    bool ok = stager_open(&g, u->host + mine, u->device + mine, u->buffer_bytes, &own);
    if (ok && thread == 0) ok = u->meanwhile(m, &own);
    for (size_t i; ok && (i = u->next++) < u->n_units;) {
        const UploadUnit *unit = &u->units[i];
        if (model_interrupted(m)) ok = fail_interrupted(&own);
        ok = ok && stager_send(&g, m, unit->tensor, unit->first, unit->rows, &own);
        if (!ok || !m->progress) continue;
        std::lock_guard<std::mutex> locked(u->lock);
        u->sent += unit->rows * unit->tensor->cols * (uint64_t)dtype_bytes[unit->tensor->to];
        m->progress("loading", u->sent, u->plan->bytes);
    }
    cudaError_t last = g.stream ? cudaStreamSynchronize(g.stream) : cudaSuccess;
    if (ok && last != cudaSuccess) ok = fail(&own, "uploading the weights: %s", cudaGetErrorString(last));
    stager_close(&g);
    if (ok) return;
    u->next = u->n_units; // the others need not go on
    std::lock_guard<std::mutex> locked(u->lock);
    fail(u->err, "%s", own.text);
}

// Cuts the tensors into units of at most buffer_bytes, or one row. NULL: no memory.
static UploadUnit *cut_units(const Plan *p, uint64_t buffer_bytes, size_t *n_units) {
    UploadUnit *units = NULL;
    for (int pass = 0; pass < 2; pass++) { // count, then fill
        if (pass == 1 && !(units = (UploadUnit *)malloc((*n_units + 1) * sizeof *units))) return NULL;
        *n_units = 0;
        for (size_t i = 0; i < p->n; i++) {
            const Placement *t = &p->tensors[i];
            uint64_t step = buffer_bytes / file_row_bytes(t);
            for (uint64_t first = 0; first < t->rows; first += step, ++*n_units)
                if (pass == 1) units[*n_units] = UploadUnit{t, first, t->rows - first < step ? t->rows - first : step};
        }
    }
    return units;
}

static bool upload(const Plan *p, bool (*meanwhile)(Model *model, Error *err), Error *err) {
    Upload u = {};
    u.plan = p;
    u.meanwhile = meanwhile;
    u.err = err;
    u.buffer_bytes = UPLOAD_BYTES;
    for (size_t i = 0; i < p->n; i++)
        if (file_row_bytes(&p->tensors[i]) > u.buffer_bytes) u.buffer_bytes = file_row_bytes(&p->tensors[i]);
    UploadUnit *units = cut_units(p, u.buffer_bytes, &u.n_units);
    if (!units) return fail(err, "out of memory: %zu units of the weights", u.n_units);
    u.units = units;
    uint64_t staging = 2 * UPLOAD_THREADS * u.buffer_bytes;
    cudaError_t status = cudaMallocHost((void **)&u.host, staging);
    if (status == cudaSuccess) status = cudaMalloc((void **)&u.device, staging);
    if (status == cudaSuccess)
        threads_run(UPLOAD_THREADS, upload_thread, &u);
    else
        fail(err, "%.2f GB to stage the weights: %s", (double)staging * 1e-9, cudaGetErrorString(status));
    free(units);
    cudaFreeHost(u.host);
    cudaFree(u.device);
    return !err->text[0];
}

static bool synthesize(const Plan *p, Error *err) {
    CudaState *s = p->state;
    for (size_t i = 0; i < p->n; i++) {
        const Placement *t = &p->tensors[i];
        uint64_t n = t->rows * t->cols;
        unsigned blocks = n / 256 < 8192 ? (unsigned)(n / 256 + 1) : 8192;
        with_type(t->to, [&](auto type) {
            synthesize_kernel<<<blocks, 256, 0, s->stream>>>((decltype(type) *)t->at, n, t->cols, t->synthetic.range,
                                                             t->synthetic.salt, t->head_dim);
        });
        CUDA_TRY(cudaGetLastError());
    }
    CUDA_TRY(cudaStreamSynchronize(s->stream));
    return true;
}

bool upload_weights(const Plan *p, bool (*meanwhile)(Model *model, Error *err), Error *err) {
    if (model_is_synthetic(p->model)) return synthesize(p, err) && meanwhile(p->model, err);
    return upload(p, meanwhile, err);
}
