// Engine cpu: its memory, and its weights from a file or from a seed. What it computes is forward.c.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "../file/checkpoint.h"
#include "../threads.h"
#include "state.h"

enum {
    MAX_TOKENS = 512,   // the weights are read once for so many tokens of a prompt
    MAKE_PART = 1 << 18 // numbers, words of codes or scales of a synthetic matrix that a thread makes at a time
};

static bool read_logits_cpu(Model *m, Error *err) { // they are there already
    (void)m, (void)err;
    return true;
}

typedef struct {
    const Model *model;
    const SampleRow *rows;
    int *ids;
} Draws;

static void draw_rows(void *context, int64_t begin, int64_t end) {
    Draws *d = context;
    int vocab = d->model->config.vocab_size;
    for (int64_t i = begin; i < end; i++) {
        const SampleRow *row = &d->rows[i];
        d->ids[i] = sample_token(row->config, d->model->logits + (size_t)row->row * (size_t)vocab, vocab, row->u);
    }
}

static bool sample_cpu(Model *m, const SampleRow *rows, int n, int *ids, Error *err) {
    (void)err;
    parallel_for(n, 1, draw_rows, &(Draws){m, rows, ids});
    return true;
}

// Memory for weights, keys and values: on large pages, for a token walks through all of it.
static void *allocate_large(uint64_t bytes) {
    enum { HUGE_PAGE = 2 << 20 };
    void *p;
    if (bytes < HUGE_PAGE) return malloc(bytes ? bytes : 1);
    if (posix_memalign(&p, HUGE_PAGE, bytes) != 0) return NULL;
    madvise(p, bytes, MADV_HUGEPAGE); // a hint: without it everything works, a little slower
    return p;
}

// WeightVisitors for a synthetic model: the first measures, the second makes the tensors.
typedef struct {
    const Model *model;
    CpuState *state;
    SyntheticCursor cursor;
    uint64_t at; // bytes in memory before the tensor
} Synthesis;

// Moves past a tensor; its place in memory, which begins at y->at, is as large as that in the file that it is like.
static SyntheticTensor next_tensor(Synthesis *y, const Weight *w, bool *in_memory) {
    uint64_t before = y->cursor.at;
    SyntheticTensor t = synthetic_next(&y->cursor, w);
    *in_memory = !(w->matrix == &y->model->weights.tok_embeddings && y->state->row);
    if (*in_memory) y->at += y->cursor.at - before;
    return t;
}

static bool measure_synthetic(void *context, const Weight *w, Error *err) {
    (void)err;
    bool in_memory;
    next_tensor(context, w, &in_memory);
    return true;
}

static uint16_t synthetic_number(int64_t i, const SyntheticTensor *t) { // BF16
    return (uint16_t)(synthetic_bits((uint64_t)i, t->salt, t->range) >> 16);
}

// Where a synthetic matrix's numbers, words of codes or scales go.
typedef struct {
    void *data;
    SyntheticTensor tensor;
} Made;

static void make_numbers(void *made, int64_t begin, int64_t end) {
    Made m = *(const Made *)made;
    uint16_t *data = m.data;
    for (int64_t i = begin; i < end; i++) data[i] = synthetic_number(i, &m.tensor);
}

static void make_codes(void *made, int64_t begin, int64_t end) {
    Made m = *(const Made *)made;
    uint32_t *data = m.data;
    for (int64_t i = begin; i < end; i++) data[i] = synthetic_codes((uint64_t)i, &m.tensor);
}

static void make_scales(void *made, int64_t begin, int64_t end) {
    Made m = *(const Made *)made;
    for (int64_t i = begin; i < end; i++) {
        uint32_t bits = synthetic_scale_bits((uint64_t)i, &m.tensor);
        if (m.tensor.scale_dtype == DTYPE_BF16)
            ((uint16_t *)m.data)[i] = (uint16_t)(bits >> 16);
        else
            ((uint32_t *)m.data)[i] = bits;
    }
}

static void make_matrix(char *data, SyntheticTensor t, Matrix *m) {
    int64_t n = (int64_t)m->rows * m->cols;
    m->data = data;
    if (matrix_is_quantised(m)) {
        char *scales = data + (t.scale_at - t.at);
        m->scale = scales;
        parallel_for(n / (m->dtype == DTYPE_U8 ? 8 : 4), MAKE_PART, make_codes, &(Made){data, t});
        parallel_for((int64_t)m->rows * quant_groups(m->group, m->cols), MAKE_PART, make_scales, &(Made){scales, t});
    } else {
        m->dtype = DTYPE_BF16;
        parallel_for(n, MAKE_PART, make_numbers, &(Made){data, t});
    }
}

static bool make_synthetic(void *context, const Weight *w, Error *err) {
    Synthesis *y = context;
    char *data = y->state->weights + y->at;
    bool in_memory;
    SyntheticTensor t = next_tensor(y, w, &in_memory);
    if (model_interrupted(y->model)) return fail_interrupted(err);
    if (!w->matrix) {
        float *norm = (float *)data;
        for (int i = 0; i < w->n; i++) norm[i] = 1.0f;
        *w->norm = norm;
    } else if (in_memory) {
        make_matrix(data, t, w->matrix);
    } else {
        w->matrix->data = NULL;
        y->state->synthetic = t;
    }
    return true;
}

// The embedding table: where it stays. A tied model's is the output matrix too.
static bool place_table(Model *m, CpuState *s, Error *err) {
    const Matrix *table = &m->weights.tok_embeddings;
    if (m->config.tie_embeddings) return true;
    if (!model_is_synthetic(m)) s->table = safetensors_find(&m->file, "tok_embeddings");
    s->row = malloc(matrix_row_bytes(table));
    return s->row || fail(err, "out of memory: a row of the embeddings");
}

const void *embedding_row(const Model *m, int token, Error *err) {
    const CpuState *s = m->state;
    const Matrix *table = &m->weights.tok_embeddings;
    const uint64_t bytes = matrix_row_bytes(table), at = (uint64_t)token * bytes;
    if (table->data) return (const char *)table->data + at;
    if (s->table) {
        bool ok = safetensors_read(&m->file, s->row, s->table->begin + at, bytes, err) &&
                  safetensors_unchanged(&m->file, err);
        return ok ? s->row : NULL;
    }
    const int64_t first = (int64_t)token * table->cols;
    for (int i = 0; i < table->cols; i++) ((uint16_t *)s->row)[i] = synthetic_number(first + i, &s->synthetic);
    return s->row;
}

static bool load_weights(Model *m, CpuState *s, Error *err) {
    Synthesis y = {.model = m, .state = s, .cursor = {.seed = m->seed}};
    if (!place_table(m, s, err)) return false;
    if (model_is_synthetic(m)) {
        if (!weights_visit(m, measure_synthetic, &y, err)) return false;
        m->weights.bytes = y.at;
    } else if (s->table) { // of what checkpoint_open has counted
        s->left_bytes = s->table->end - s->table->begin;
        m->weights.bytes -= s->left_bytes;
    }
    s->weights = allocate_large(m->weights.bytes);
    if (!s->weights)
        return fail(err, "out of memory: %.2f GB of weights, this machine has %.2f GB in all",
                    (double)m->weights.bytes * 1e-9,
                    (double)sysconf(_SC_PHYS_PAGES) * (double)sysconf(_SC_PAGESIZE) * 1e-9);
    if (!model_is_synthetic(m)) return checkpoint_load(m, s->weights, s->table, err);
    y.at = y.cursor.at = 0;
    return weights_visit(m, make_synthetic, &y, err);
}

// A WeightVisitor: F32 matrices become BF16, where they are; what that leaves of their memory goes back. (Of a table
// that stays in the file embed rounds the rows.)
static bool round_matrix(void *context, const Weight *w, Error *err) {
    Model *m = context;
    CpuState *s = m->state;
    if (model_interrupted(m)) return fail_interrupted(err);
    if (!w->matrix || !w->matrix->data || w->matrix->dtype != DTYPE_F32) return true;
    int64_t n = (int64_t)w->matrix->rows * w->matrix->cols;
    char *data = s->weights + ((const char *)w->matrix->data - s->weights);
    s->ops->narrow(data, (const float *)w->matrix->data, DTYPE_BF16, n);
    w->matrix->dtype = DTYPE_BF16;
    m->weights.bytes -= 2 * (uint64_t)n;
    const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), end = (uintptr_t)(data + 4 * n) / page * page,
                    from = ((uintptr_t)(data + 2 * n) + page - 1) / page * page;
    if (from < end) madvise(data + (from - (uintptr_t)data), end - from, MADV_DONTNEED);
    return true;
}

static bool allocate_state(Model *m, CpuState *s, Error *err) {
    const Config *c = &m->config;
    int widest = c->dim > c->q_dim ? c->dim : c->q_dim;
    size_t positions = (size_t)m->kv.n_slots * (size_t)m->kv.max_len;
    m->max_rows = positions < MAX_TOKENS ? (int)positions : MAX_TOKENS;
    if (!model_size_cache(m, (size_t)dtype_bytes[s->cache], 0, err)) return false;
    size_t kv = (m->kv.bytes / 2 + sizeof(float) - 1) / sizeof(float);
    const struct {
        float **buffer;
        size_t rows, columns;
    } buffers[] = {{&s->x, (size_t)m->max_rows, (size_t)c->dim},
                   {&s->xb, (size_t)m->max_rows, (size_t)widest},
                   {&s->q, (size_t)m->max_rows, (size_t)c->q_dim},
                   {&s->k, (size_t)m->max_rows, (size_t)c->kv_dim},
                   {&s->v, (size_t)m->max_rows, (size_t)c->kv_dim},
                   {&s->att, (size_t)m->max_rows, (size_t)c->q_dim},
                   {&s->hb, (size_t)m->max_rows, (size_t)c->hidden_dim},
                   {&s->hb2, (size_t)m->max_rows, (size_t)c->hidden_dim},
                   {&s->cos, (size_t)m->max_rows, (size_t)c->head_dim / 2},
                   {&s->sin, (size_t)m->max_rows, (size_t)c->head_dim / 2},
                   {(float **)&s->pos, (size_t)m->max_rows, sizeof *s->pos / sizeof(float)},
                   {&m->logits, (size_t)model_logit_rows(m), (size_t)c->vocab_size},
                   {(float **)&m->kv.k, 1, kv},
                   {(float **)&m->kv.v, 1, kv}};
    for (size_t i = 0; i < sizeof buffers / sizeof *buffers; i++) {
        size_t bytes;
        bool cache = buffers[i].buffer == (float **)&m->kv.k || buffers[i].buffer == (float **)&m->kv.v;
        if (!__builtin_mul_overflow(buffers[i].rows * sizeof(float), buffers[i].columns, &bytes))
            *buffers[i].buffer = cache ? allocate_large(bytes) : malloc(bytes);
        if (!*buffers[i].buffer)
            return fail(
                err,
                "out of memory: %.3f GB for %d contexts of %d (their cache takes %.3f GB in all); try a smaller -c "
                "or --kv-memory",
                (double)buffers[i].rows * (double)buffers[i].columns * 4e-9, m->kv.n_slots, m->kv.max_len,
                (double)m->kv.bytes * 1e-9);
        m->buffer_bytes += bytes;
    }
    m->buffer_bytes -= m->kv.bytes;
    return true;
}

static bool usable_cpu(const Model *m, Error *err) {
    if (m->precision == PRECISION_FP8)
        return fail(err, "engine cpu has no FP8 products, it computes in float32 or bf16");
    return m->gpus <= 1 || fail(err, "engine cpu computes on no GPU, expected --gpus 1");
}

static bool open_cpu(Model *m, Error *err) {
    CpuState *s = m->state = calloc(1, sizeof *s);
    if (!s) return fail(err, "out of memory: the engine's state");
    s->ops = ops_select();
    const bool bf16 = m->precision == PRECISION_BF16;
    snprintf(m->note, sizeof m->note, "%s, %d threads", bf16 ? s->ops->name_bf16 : s->ops->name, threads_count());
    s->cache = !bf16 ? DTYPE_F32 : m->weights.dtype == DTYPE_F16 && !weights_are_quantised(m) ? DTYPE_F16 : DTYPE_BF16;
    return allocate_state(m, s, err) && load_weights(m, s, err) && (!bf16 || weights_visit(m, round_matrix, m, err));
}

static void close_cpu(Model *m) {
    CpuState *s = m->state;
    if (!s) return;
    float *buffers[] = {s->x,   s->xb,           s->q,      s->k,    s->v,   s->att, s->hb, s->hb2, s->cos,
                        s->sin, (float *)s->pos, m->logits, m->kv.k, m->kv.v};
    for (size_t i = 0; i < sizeof buffers / sizeof *buffers; i++) free(buffers[i]);
    free(s->weights);
    free(s->row);
    m->weights.bytes += s->left_bytes;
    free(s);
    m->state = NULL;
}

// A page is one piece of K and one of V, for the layers are within it: so the memory that is touched is that of the
// positions that are filled.
static bool copy_pages_cpu(Model *m, const int *pages, int n, void *const *host, bool to_host, Error *err) {
    (void)err;
    const size_t size = (size_t)(model_page_bytes(m) / 2);
    char *caches[] = {m->kv.k, m->kv.v};
    for (int i = 0; i < n; i++)
        for (int c = 0; c < 2; c++) {
            char *saved = (char *)host[i] + (size_t)c * size, *page = caches[c] + (size_t)pages[i] * size;
            memcpy(to_host ? saved : page, to_host ? page : saved, size);
        }
    return true;
}

static int step_rows_cpu(const Model *m, int n_slots, Error *err) { // in any number of them a row's bits are its own
    (void)m, (void)err;
    return n_slots * (MAX_CANDIDATES + 1);
}

const Engine engine_cpu = {.name = "cpu",
                           .precision = PRECISION_F32,
                           .usable = usable_cpu,
                           .open = open_cpu,
                           .close = close_cpu,
                           .forward = forward_cpu,
                           .read_logits = read_logits_cpu,
                           .sample = sample_cpu,
                           .allocate_host = malloc,
                           .free_host = free,
                           .copy_pages = copy_pages_cpu,
                           .step_rows = step_rows_cpu};
