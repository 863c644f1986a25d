#include "upload.h"

extern "C" {
#include "../file/checkpoint.h"
#include "../quant.h"
}

#include <atomic>
#include <mutex>
#include <stdio.h>
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

// Computes: a synthetic tensor (synthetic.h) from its element `first` on, its rows in their order on the device; ones
//           where range is 0.
// Reads:    nothing.
// Writes:   dst [n/cols][cols].
// Grid:     any × 256, strided.
// Requires: first a multiple of cols.
template <typename D>
__global__ void synthesize_kernel(D *dst, uint64_t n, uint64_t cols, uint64_t first, float range, uint32_t salt,
                                  int head_dim) {
    for (uint64_t i = (uint64_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (uint64_t)gridDim.x * blockDim.x) {
        uint64_t row = i / cols;
        dst[placed_row(row, head_dim) * cols + i % cols] =
            from_float<D>(range == 0 ? 1.0f : __uint_as_float(synthetic_bits(first + i, salt, range)));
    }
}

// The first thing that is wrong with the codes and scales of a file, as a number: of tensors the first, of that the
// scales before the codes, then the place in [rows][groups] or [rows][cols].
enum { BAD_TENSOR_SHIFT = 48, BAD_CODE_SHIFT = 47 };
static const unsigned long long NOTHING_BAD = ~0ull;

// Where a quantised matrix goes.
struct PackedRows {
    char *rows;    // [rows] as packed.h has them
    float *scales; // [rows], of a matrix with a scale for each row; else NULL
    Packing packing;
    bool fp8;
    uint64_t cols, first; // first: the row that comes first, of those that go there
    int head_dim;         // placed_row's
};

// Codes and scales of rows of a matrix as the file has them, and what was found wrong with them.
template <class S> struct FileCodes {
    const char *codes; // [rows][cols], two of int4 to a byte
    const S *scales;   // [rows][groups]
    unsigned long long *bad;
    uint64_t tensor;
    bool fp8;

    // Codes c .. c+7 of row `row`, the first lowest.
    __device__ uint64_t eight(const PackedRows &to, uint64_t row, uint64_t c) const {
        uint64_t at = row * to.cols + c, eight;
        if (to.packing.bits == 4) return *(const uint32_t *)(codes + at / 2);
        eight = *(const uint64_t *)(codes + at);
        for (int i = 0; fp8 && i < 8; i++)
            if ((eight >> 8 * i & 0x7F) == 0x7F) report(1ull << BAD_CODE_SHIFT | ((to.first + row) * to.cols + c + i));
        return eight;
    }
    // Scale number g of a row that has n.
    __device__ float scale(const PackedRows &to, uint64_t row, uint64_t g, uint64_t n) const {
        float scale = to_float(scales[row * n + g]);
        if (!isfinite(scale)) report((to.first + row) * n + g);
        return scale;
    }
    __device__ void report(unsigned long long what) const {
        atomicMin(bad, (unsigned long long)tensor << BAD_TENSOR_SHIFT | what);
    }
};

// The same of a synthetic matrix, of which row first_row is the first that goes there.
struct SyntheticCodes {
    SyntheticTensor tensor;
    uint64_t first_row;

    __device__ uint64_t eight(const PackedRows &to, uint64_t row, uint64_t c) const {
        uint64_t at = (first_row + to.first + row) * to.cols + c;
        if (to.packing.bits == 4) return synthetic_codes(at / 8, &tensor);
        return synthetic_codes(at / 4, &tensor) | (uint64_t)synthetic_codes(at / 4 + 1, &tensor) << 32;
    }
    __device__ float scale(const PackedRows &to, uint64_t row, uint64_t g, uint64_t n) const {
        return __uint_as_float(synthetic_scale_bits((first_row + to.first + row) * n + g, &tensor));
    }
};

// Computes: rows of a quantised matrix, packed; columns that the last block has too many are codes and scales of zero.
// Reads:    what Source says.
// Writes:   to.rows and to.scales: the rows from to.first on, in their order (placed_row).
// Grid:     rows × blocks of 1024 columns, 64 threads; a thread owns the 16 codes of a lane of a chunk.
// Requires: cols % 8 = 0; the file's rows aligned to 8 codes.
template <class Source> __global__ void pack_kernel(PackedRows to, Source from) {
    const Packing &p = to.packing;
    const uint64_t row = blockIdx.x / p.blocks, block = blockIdx.x % p.blocks;
    const int bits = p.bits;
    char *packed_row = to.rows + placed_row(to.first + row, to.head_dim) * p.row_bytes,
         *packed = packed_row + block * p.block_bytes;
    uint64_t packed_codes[2];
    for (int step = 0; step < 2; step++) {
        int place = threadIdx.x * 16 + step * 8;
        uint64_t c = block * PACK_COLUMNS + packed_column(bits, place), zeros = bits == 4 ? 0x88888888u : 0,
                 codes = c < to.cols ? from.eight(to, row, c) : zeros;
        packed_codes[step] = 0;
        for (int i = 0; i < 8; i++)
            packed_codes[step] |= (codes >> bits * packed_column(bits, i) & ((1u << bits) - 1)) << bits * i;
    }
    if (to.fp8)
        for (int i = 0; i < 2; i++) {
            uint64_t codes = packed_codes[i];
            packed_codes[i] = 0;
            for (int at = 0; at < 64; at += 16)
                packed_codes[i] |= (uint64_t)packed_fp8(codes >> at & 0xff, codes >> at >> 8 & 0xff) << at;
        }
    if (bits == 8)
        ((ulonglong2 *)packed)[threadIdx.x] = make_ulonglong2(packed_codes[0], packed_codes[1]);
    else
        ((uint64_t *)packed)[threadIdx.x] = packed_codes[0] | packed_codes[1] << 32;
    if (p.group == 0) {
        if (block > 0 || threadIdx.x > 0) return;
        float scale = from.scale(to, row, 0, 1);
        to.scales[placed_row(to.first + row, to.head_dim)] = scale;
    } else if (threadIdx.x < PACK_COLUMNS / p.group) {
        uint64_t c = block * PACK_COLUMNS + threadIdx.x * p.group;
        float scale = c < to.cols ? from.scale(to, row, c / p.group, (to.cols + p.group - 1) / p.group) : 0;
        char *at = packed_row + packed_scale(&p, (int)c);
        if (p.scale_bytes == 2)
            *(bf16 *)at = from_float<bf16>(scale);
        else
            *(float *)at = scale;
    }
}

// ---- where tensors go -----------------------------------------------------------------------------------------------

// One tensor on its way to the device: the rank's rows of it.
struct Placement {
    Weight weight;       // its matrix or norm gets the address; the name is not kept
    uint64_t rows, cols; // a norm: one row
    uint64_t first_row;  // of the tensor, the first of them
    bool whole;          // every rank has all rows
    DType from, to;      // in the file, and on the device: a norm is float32 in both, codes are what they are
    uint64_t file_begin; // of the first of the rows, in the file's data; a synthetic model has none
    uint64_t file_row_bytes, row_bytes;    // of a row there, without its scales, and on the device
    uint64_t scale_begin, scale_row_bytes; // of a quantised matrix, in the file's data: as file_begin
    SyntheticTensor synthetic;
    char *at, *scales; // on the device; scales: of a quantised matrix with one for each row, float32 [rows]
    int head_dim;      // of wq and wk, whose rows are interleaved; else 0
    char name[64];
};

static bool is_packed(const Placement *t) {
    return t->weight.matrix && matrix_is_quantised(t->weight.matrix);
}

// The dtype on the device of a matrix that the file has as `from`: that of products, unless the engine widens by
// itself. Embeddings that are not the output matrix, too, enter no product: beside 16-bit products they stay in their
// 16 bits.
static DType device_dtype(const Plan *p, const Weight *w, DType from) {
    const CudaState *s = p->state;
    bool looked_up = w->matrix == &p->model->weights.tok_embeddings && !p->model->config.tie_embeddings;
    bool keeps = s->keeps_16_bits || (looked_up && s->type != DTYPE_F32);
    return matrix_is_quantised(w->matrix) || (keeps && from != DTYPE_F32) ? from : s->type;
}

static const Tensor *find_in_file(const Plan *p, const char *name, const char *suffix) {
    char whole[80];
    snprintf(whole, sizeof whole, "%s%s", name, suffix);
    return model_is_synthetic(p->model) ? NULL : safetensors_find(&p->model->file, whole);
}

// WeightVisitor: where the rank's rows of every tensor go, 128-byte aligned, which leaves no gap between wq, wk and wv:
// they are heads of 64, 96 or 128 rows, of a multiple of 16 bytes each.
static bool plan_tensor(void *context, const Weight *w, Error *err) {
    Plan *p = (Plan *)context;
    Matrix *matrix = w->matrix;
    Placement *more = (Placement *)realloc(p->tensors, (p->n + 1) * sizeof *more);
    if (!more) return fail(err, "out of memory: %zu tensors", p->n + 1);
    p->tensors = more;
    const char *last = strrchr(w->name, '.');
    bool rotated = last && (strcmp(last, ".wq") == 0 || strcmp(last, ".wk") == 0);
    const Tensor *in_file = find_in_file(p, w->name, "");
    Placement t;
    memset(&t, 0, sizeof t);
    t.weight = *w;
    snprintf(t.name, sizeof t.name, "%s", w->name);
    t.synthetic = synthetic_next(&p->synthetic, w); // of all rows
    const Rows own = shard_rows(&p->model->shard, &p->model->config, w);
    t.whole = !matrix || own.n == matrix->rows;
    if (matrix) matrix->all_rows = matrix->rows, matrix->rows = own.n;
    t.rows = (uint64_t)own.n;
    t.first_row = (uint64_t)own.first;
    t.cols = matrix ? (uint64_t)matrix->cols : (uint64_t)w->n;
    t.from = t.to = DTYPE_F32;
    t.file_row_bytes = t.row_bytes = t.cols * sizeof(float);
    if (matrix) {
        t.from = in_file ? in_file->dtype : matrix_is_quantised(matrix) ? matrix->dtype : DTYPE_BF16;
        matrix->dtype = t.from;
        t.file_row_bytes = matrix_row_bytes(matrix);
        t.to = matrix->dtype = device_dtype(p, w, t.from);
        t.row_bytes = device_row_bytes(matrix);
    }
    if (is_packed(&t)) {
        const Tensor *scales = find_in_file(p, w->name, ".scale");
        t.scale_row_bytes =
            (uint64_t)quant_groups(matrix->group, matrix->cols) * (uint64_t)dtype_bytes[matrix->scale_dtype];
        t.scale_begin = scales ? scales->begin + t.first_row * t.scale_row_bytes : 0;
    }
    t.file_begin = in_file ? in_file->begin + t.first_row * t.file_row_bytes : 0;
    t.at = (char *)p->bytes; // an offset, until there is memory
    t.head_dim = rotated ? p->model->config.head_dim : 0;
    p->bytes += (t.rows * t.row_bytes + 127) / 128 * 128;
    p->tensors[p->n++] = t;
    return true;
}

// Scales of rows come after all tensors, those of wq, wk and wv without a gap; others at a multiple of a tile's.
bool plan_weights(Plan *p, Model *m, CudaState *s, Error *err) {
    memset(p, 0, sizeof *p);
    p->model = m;
    p->state = s;
    p->synthetic.seed = m->seed;
    if (!weights_visit(m, plan_tensor, p, err)) return false;
    for (size_t i = 0; i < p->n; i++) {
        Placement *t = &p->tensors[i];
        if (!is_packed(t) || t->weight.matrix->group != WHOLE_ROW) continue;
        t->scales = (char *)p->bytes;
        p->bytes += (t->rows + 15) / 16 * 16 * sizeof(float);
    }
    return true;
}

void plan_free(Plan *p) {
    free(p->tensors);
}

// Whether products can take both in one call.
static bool alike(const Matrix *a, const Matrix *b) {
    return a->dtype == b->dtype && a->group == b->group && a->scale_dtype == b->scale_dtype;
}
static bool follows(const Matrix *a, const Matrix *b) {
    return alike(a, b) && (const char *)b->data == (const char *)a->data + (uint64_t)a->rows * device_row_bytes(a) &&
           (!a->scale || (const float *)b->scale == (const float *)a->scale + a->rows);
}

// matmul_heads relies on wq, wk and wv without a gap, and on one kind of rows in them; matmul_gate_up on one in gate
// and up.
bool place_tensors(Plan *p, Error *err) {
    Model *m = p->model;
    char *base = p->state->weights;
    for (size_t i = 0; i < p->n; i++) {
        Placement *t = &p->tensors[i];
        t->at = base + (uintptr_t)t->at;
        if (t->scales) t->scales = base + (uintptr_t)t->scales;
        if (t->weight.matrix) {
            t->weight.matrix->data = t->at;
            t->weight.matrix->scale = t->scales;
        } else {
            *t->weight.norm = (const float *)t->at;
        }
    }
    if (m->config.tie_embeddings) {
        Matrix *output = &m->weights.output;
        *output = m->weights.tok_embeddings; // of which the shard multiplies its own rows
        output->data = (const char *)output->data + (uint64_t)m->shard.vocab.first * device_row_bytes(output);
        output->rows = m->shard.vocab.n;
    }
    for (int i = 0; i < m->config.n_layers; i++) {
        const LayerWeights *l = &m->weights.layers[i];
        if (!follows(&l->wq, &l->wk) || !follows(&l->wk, &l->wv) || !alike(&l->w1, &l->w3))
            return fail(err, "layer %d: wq, wk and wv do not follow each other on the device, or their dtypes differ",
                        i);
    }
    return true;
}

static PackedRows packed_rows(const Placement *t, uint64_t first) {
    const Matrix *m = t->weight.matrix;
    return PackedRows{t->at, (float *)t->scales, matrix_packing(m), m->dtype == DTYPE_F8_E4M3, t->cols,
                      first, t->head_dim};
}

// Packs rows whose codes and scales are in device memory.
static bool pack(const Plan *p, const Placement *t, const char *staged, uint64_t first, uint64_t rows,
                 unsigned long long *bad, cudaStream_t stream, Error *err) {
    const Matrix *m = t->weight.matrix;
    PackedRows to = packed_rows(t, first);
    with_type(m->scale_dtype, [&](auto type) {
        FileCodes<decltype(type)> from = {staged, (const decltype(type) *)(staged + rows * t->file_row_bytes), bad,
                                          (uint64_t)(t - p->tensors), m->dtype == DTYPE_F8_E4M3};
        pack_kernel<<<(unsigned)rows * to.packing.blocks, 64, 0, stream>>>(to, from);
    });
    CUDA_TRY(cudaGetLastError());
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

// One thread's way from the file to the devices: it reads into one pinned buffer while the other is being copied.
struct Stager {
    char *host[2]; // of the upload's blocks, as device
    struct {
        cudaStream_t stream;
        char *device[2];
        cudaEvent_t copied[2];
    } to[MAX_SHARDS]; // of each rank
    int turn;
};

// The unit of work for one thread: whole rows, at most a buffer's worth.
struct UploadUnit {
    size_t tensor;
    int rank; // that has the rows; -1: all have them
    uint64_t first, rows;
};

// What the reading threads share.
struct Upload {
    const Plan *plans; // [count], of the ranks
    int count;
    bool (*meanwhile)(Model *model, Error *err); // the first thread's
    const UploadUnit *units;
    size_t n_units;
    char *host;                          // two buffers for each thread
    char *device[MAX_SHARDS];            // the same
    unsigned long long *bad[MAX_SHARDS]; // on the devices: what FileCodes reports
    uint64_t buffer_bytes;
    std::atomic<size_t> next; // unit
    std::mutex lock;          // of the following
    uint64_t sent, total;     // bytes
    Error *err;
};

// A rank's GPU becomes this thread's current one.
static bool enter_rank(const Upload *u, int rank, Error *err) {
    CUDA_TRY(cudaSetDevice(u->plans[rank].state->device));
    return true;
}

static bool stager_open(Stager *g, const Upload *u, int thread, Error *err) {
    for (int r = 0; r < u->count; r++) {
        auto &to = g->to[r];
        if (!enter_rank(u, r, err)) return false;
        CUDA_TRY(cudaStreamCreateWithFlags(&to.stream, cudaStreamNonBlocking));
        for (int i = 0; i < 2; i++) {
            uint64_t at = (uint64_t)(2 * thread + i) * u->buffer_bytes;
            g->host[i] = u->host + at;
            to.device[i] = u->device[r] + at;
            CUDA_TRY(cudaEventCreateWithFlags(&to.copied[i], cudaEventDisableTiming));
        }
    }
    return true;
}

// Waits for what was sent. False: it failed.
static bool stager_close(Stager *g, const Upload *u, Error *err) {
    cudaError_t failed = cudaSuccess;
    for (int r = 0; r < u->count; r++) {
        auto &to = g->to[r];
        cudaError_t status = to.stream ? cudaStreamSynchronize(to.stream) : cudaSuccess;
        if (failed == cudaSuccess) failed = status;
        for (int i = 0; i < 2; i++)
            if (to.copied[i]) cudaEventDestroy(to.copied[i]);
        if (to.stream) cudaStreamDestroy(to.stream);
    }
    return failed == cudaSuccess || fail(err, "uploading the weights: %s", cudaGetErrorString(failed));
}

// Bytes that are read of the file for a tensor's row.
static uint64_t read_row_bytes(const Placement *t) {
    return t->file_row_bytes + t->scale_row_bytes;
}

// Rows of a tensor to the rank that has them, or to all; of a quantised matrix the codes, and after them the scales.
static bool stager_send(Stager *g, const Upload *u, const UploadUnit *unit, Error *err) {
    const int from = unit->rank < 0 ? 0 : unit->rank, end = unit->rank < 0 ? u->count : unit->rank + 1;
    const Placement *t = &u->plans[from].tensors[unit->tensor];
    const SafeTensors *file = &u->plans[from].model->file;
    uint64_t first = unit->first, rows = unit->rows, bytes = rows * t->file_row_bytes,
             scale_bytes = rows * t->scale_row_bytes;
    int i = g->turn;
    g->turn ^= 1;
    for (int r = 0; r < u->count; r++)
        CUDA_TRY(cudaEventSynchronize(g->to[r].copied[i])); // an event not yet recorded counts as done
    if (!safetensors_read(file, g->host[i], t->file_begin + first * t->file_row_bytes, bytes, err)) return false;
    if (scale_bytes &&
        !safetensors_read(file, g->host[i] + bytes, t->scale_begin + first * t->scale_row_bytes, scale_bytes, err))
        return false;
    for (int r = from; r < end; r++) {
        const Plan *p = &u->plans[r];
        auto &to = g->to[r];
        t = &p->tensors[unit->tensor];
        if (!enter_rank(u, r, err)) return false;
        CUDA_TRY(cudaMemcpyAsync(to.device[i], g->host[i], bytes + scale_bytes, cudaMemcpyHostToDevice, to.stream));
        if (!(is_packed(t) ? pack(p, t, to.device[i], first, rows, u->bad[r], to.stream, err)
                           : place(t, to.device[i], first, (unsigned)rows, to.stream, err)))
            return false;
        CUDA_TRY(cudaEventRecord(to.copied[i], to.stream));
    }
    return true;
}

static void upload_thread(void *upload, int thread) {
    Upload *u = (Upload *)upload;
    Model *m = u->plans[0].model;
    Error own = {""};
    Stager g;
    memset(&g, 0, sizeof g);
    bool ok = stager_open(&g, u, thread, &own);
    if (ok && thread == 0) ok = u->meanwhile(m, &own);
    for (size_t i; ok && (i = u->next++) < u->n_units;) {
        const UploadUnit *unit = &u->units[i];
        if (model_interrupted(m)) ok = fail_interrupted(&own);
        ok = ok && stager_send(&g, u, unit, &own);
        if (!ok || !m->progress) continue;
        std::lock_guard<std::mutex> locked(u->lock);
        u->sent += unit->rows * u->plans[0].tensors[unit->tensor].row_bytes;
        m->progress("loading", u->sent, u->total);
    }
    ok = stager_close(&g, u, &own) && ok;
    enter_rank(u, 0, &own); // one of the threads is the caller's
    if (ok) return;
    u->next = u->n_units; // the others need not go on
    std::lock_guard<std::mutex> locked(u->lock);
    fail(u->err, "%s", own.text);
}

// Cuts the tensors into units of at most buffer_bytes, or one row; sets n_units and total. NULL: no memory.
static UploadUnit *cut_units(Upload *u) {
    UploadUnit *units = NULL;
    for (int pass = 0; pass < 2; pass++) { // count, then fill
        if (pass == 1 && !(units = (UploadUnit *)malloc((u->n_units + 1) * sizeof *units))) return NULL;
        u->n_units = u->total = 0;
        for (size_t i = 0; i < u->plans[0].n; i++) {
            const bool whole = u->plans[0].tensors[i].whole;
            for (int r = 0; r < (whole ? 1 : u->count); r++) {
                const Placement *t = &u->plans[r].tensors[i];
                uint64_t step = u->buffer_bytes / read_row_bytes(t);
                u->total += t->rows * t->row_bytes;
                for (uint64_t first = 0; first < t->rows; first += step, ++u->n_units)
                    if (pass == 1)
                        units[u->n_units] =
                            UploadUnit{i, whole ? -1 : r, first, t->rows - first < step ? t->rows - first : step};
            }
        }
    }
    return units;
}

// The message for what FileCodes has reported.
static bool fail_bad(const Plan *p, unsigned long long bad, Error *err) {
    const Placement *t = &p->tensors[bad >> BAD_TENSOR_SHIFT];
    const Matrix *m = t->weight.matrix;
    int64_t at = (int64_t)(bad & ((1ull << BAD_CODE_SHIFT) - 1)), first = (int64_t)t->first_row;
    if (bad >> BAD_CODE_SHIFT & 1) return fail_code_is_nan(p->model, t->name, m->cols, first * m->cols + at, err);
    uint64_t bytes = (uint64_t)dtype_bytes[m->scale_dtype];
    uint32_t scale = 0;
    return safetensors_read(&p->model->file, (char *)&scale, t->scale_begin + (uint64_t)at * bytes, bytes, err) &&
           fail_scale_not_finite(p->model, t->name, first * quant_groups(m->group, m->cols) + at,
                                 quant_number(&scale, m->scale_dtype, 0), err);
}

// The first of what is wrong, on any rank: of a tensor's scales or codes a lower rank has the lower rows.
static bool find_bad(const Upload *u, Error *err) {
    unsigned long long first = NOTHING_BAD;
    int rank = 0;
    for (int r = 0; r < u->count; r++) {
        unsigned long long bad;
        CUDA_TRY(cudaMemcpy(&bad, u->bad[r], sizeof bad, cudaMemcpyDeviceToHost));
        if (bad >> BAD_CODE_SHIFT < first >> BAD_CODE_SHIFT) first = bad, rank = r;
    }
    return first == NOTHING_BAD || fail_bad(&u->plans[rank], first, err);
}

static bool allocate_staging(Upload *u, uint64_t staging, Error *err) {
    cudaError_t status = cudaMallocHost((void **)&u->host, staging);
    for (int r = 0; r < u->count && status == cudaSuccess; r++) {
        if (!enter_rank(u, r, err)) return false;
        status = cudaMalloc((void **)&u->device[r], staging);
        if (status == cudaSuccess) status = cudaMalloc((void **)&u->bad[r], sizeof **u->bad);
        if (status == cudaSuccess)
            status = cudaMemcpy(u->bad[r], &NOTHING_BAD, sizeof **u->bad, cudaMemcpyHostToDevice);
    }
    return status == cudaSuccess
               ? enter_rank(u, 0, err)
               : fail(err, "%.2f GB to stage the weights: %s", (double)staging * 1e-9, cudaGetErrorString(status));
}

static bool upload(const Plan *plans, int count, bool (*meanwhile)(Model *model, Error *err), Error *err) {
    Upload u = {};
    u.plans = plans;
    u.count = count;
    u.meanwhile = meanwhile;
    u.err = err;
    u.buffer_bytes = UPLOAD_BYTES;
    for (size_t i = 0; i < plans->n; i++)
        if (read_row_bytes(&plans->tensors[i]) > u.buffer_bytes) u.buffer_bytes = read_row_bytes(&plans->tensors[i]);
    UploadUnit *units = cut_units(&u);
    if (!units) return fail(err, "out of memory: %zu units of the weights", u.n_units);
    u.units = units;
    u.buffer_bytes = (u.buffer_bytes + 15) / 16 * 16;
    if (allocate_staging(&u, 2 * UPLOAD_THREADS * u.buffer_bytes, err)) {
        threads_run(UPLOAD_THREADS, upload_thread, &u);
        if (!err->text[0]) find_bad(&u, err);
    }
    free(units);
    cudaFreeHost(u.host);
    for (int r = 0; r < count; r++) {
        cudaFree(u.device[r]);
        cudaFree(u.bad[r]);
    }
    return !err->text[0];
}

static bool synthesize(const Plan *p, Error *err) {
    CudaState *s = p->state;
    for (size_t i = 0; i < p->n; i++) {
        const Placement *t = &p->tensors[i];
        uint64_t n = t->rows * t->cols;
        unsigned blocks = n / 256 < 8192 ? (unsigned)(n / 256 + 1) : 8192;
        if (is_packed(t)) {
            PackedRows to = packed_rows(t, 0);
            SyntheticCodes from = {t->synthetic, t->first_row};
            pack_kernel<<<(unsigned)t->rows * to.packing.blocks, 64, 0, s->stream>>>(to, from);
        } else {
            with_type(t->to, [&](auto type) {
                synthesize_kernel<<<blocks, 256, 0, s->stream>>>((decltype(type) *)t->at, n, t->cols,
                                                                 t->first_row * t->cols, t->synthetic.range,
                                                                 t->synthetic.salt, t->head_dim);
            });
        }
        CUDA_TRY(cudaGetLastError());
    }
    CUDA_TRY(cudaStreamSynchronize(s->stream));
    return true;
}

bool upload_weights(const Plan *plans, int count, bool (*meanwhile)(Model *model, Error *err), Error *err) {
    Model *m = plans->model;
    if (!model_is_synthetic(m)) return upload(plans, count, meanwhile, err);
    return for_shards(m, err, [&](Model *own, CudaState *) { return synthesize(&plans[local_rank(own)], err); }) &&
           meanwhile(m, err);
}
