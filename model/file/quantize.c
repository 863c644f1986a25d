#define _GNU_SOURCE // sync_file_range
#include "quantize.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include "../../tokenizer/bytes.h"
#include "../threads.h"

enum {
    DATA_ALIGNMENT = 4096,
    WEIGHT_ALIGNMENT = 16,
    PART_WEIGHTS = 1 << 16,  // of a matrix, that a thread reads, quantises and writes: they stay in its core's cache
    BLOCK_WEIGHTS = 1 << 23, // between two looks at the progress
    READ_AHEAD = 2,          // blocks that the disk is asked for
    COPY_BYTES = 1 << 25
};

// A tensor of the file that is written.
typedef struct {
    char name[72];
    const char *dtype;
    int n_dims;
    uint64_t shape[4], bytes;
    const Tensor *source;   // in the file that is read; NULL: the scales of the matrix before it
    bool quantised;         // from source; else it is copied
    const Matrix *computed; // the matrix that it is in the model's products
    QuantType type;
} Planned;

typedef struct {
    Model *model;
    const QuantizeOptions *options;
    QuantizeSummary *summary;
    Planned *tensors; // [n], room for most
    int n, most, group;
    bool untied;          // the output gets a matrix of its own
    uint64_t bytes, done; // of the tensors; read so far, of the model's
    uint64_t header_bytes;
    char *path, *part; // to be written, and under which name at first
    int fd;
    uint64_t at;            // where the next tensor begins in it
    double squares, errors; // of all matrices: sums of squared weights, and of squared errors
} Job;

// ---- the plan -------------------------------------------------------------------------------------------------------

static void plan(Job *j, Planned p) {
    j->tensors[j->n++] = p;
    j->bytes += p.bytes;
}

static void plan_copy(Job *j, const Tensor *t) {
    Planned p = {.dtype = dtype_names[t->dtype], .n_dims = t->n_dims, .bytes = t->end - t->begin, .source = t};
    snprintf(p.name, sizeof p.name, "%s", t->name);
    memcpy(p.shape, t->shape, sizeof p.shape);
    plan(j, p);
}

static bool plan_matrix(Job *j, const char *name, const Tensor *source, const Matrix *m, const Matrix *computed,
                        QuantType type, Error *err) {
    const char *path = j->model->file.path;
    uint64_t rows = (uint64_t)m->rows, groups = (uint64_t)quant_groups(type.group, m->cols);
    bool int4 = type.dtype == DTYPE_U8;
    DType scale = quant_scale_dtype(type);
    if (int4 && m->cols % 2)
        return fail(err, "%s: tensor %s: %d columns, int4 needs an even number", path, name, m->cols);
    Planned codes = {.dtype = dtype_names[type.dtype],
                     .n_dims = 2,
                     .shape = {rows, (uint64_t)m->cols / (int4 ? 2 : 1)},
                     .bytes = rows * (uint64_t)m->cols / (int4 ? 2 : 1),
                     .source = source,
                     .quantised = true,
                     .computed = computed,
                     .type = type};
    Planned scales = {.dtype = dtype_names[scale],
                      .n_dims = type.group ? 2 : 1,
                      .shape = {rows, groups},
                      .bytes = rows * groups * (uint64_t)dtype_bytes[scale]};
    snprintf(codes.name, sizeof codes.name, "%s", name);
    snprintf(scales.name, sizeof scales.name, "%s.scale", name);
    plan(j, codes);
    if (j->bytes % WEIGHT_ALIGNMENT)
        return fail(err, "%s: tensor %s: %d rows of %d columns, their codes take no multiple of %d bytes", path, name,
                    m->rows, m->cols, WEIGHT_ALIGNMENT);
    plan(j, scales);
    return j->bytes % WEIGHT_ALIGNMENT == 0 || strcmp(name, "output") == 0 || // which is the last weight
           fail(err, "%s: tensor %s: %d rows, their scales take no multiple of %d bytes", path, name, m->rows,
                WEIGHT_ALIGNMENT);
}

// WeightVisitor
static bool plan_weight(void *context, const Weight *w, Error *err) {
    Job *j = context;
    const Weights *weights = &j->model->weights;
    const Tensor *t = safetensors_find(&j->model->file, w->name);
    bool output = w->matrix == &weights->output;
    if (!w->matrix || w->matrix == &weights->tok_embeddings || (output && !j->options->quantises_output)) {
        plan_copy(j, t);
        return true;
    }
    return plan_matrix(j, w->name, t, w->matrix, w->matrix, output ? j->options->output : j->options->layers, err);
}

static bool plan_all(Job *j, Error *err) {
    static const char *const tokenizer[] = {"tokenizer.offsets", "tokenizer.kind", "tokenizer.bytes"};
    Model *m = j->model;
    j->most = 2 * (int)m->file.n_tensors + 2;
    j->tensors = calloc((size_t)j->most, sizeof *j->tensors);
    if (!j->tensors) return fail(err, "out of memory: %d tensors", j->most);
    if (!weights_visit(m, plan_weight, j, err)) return false;
    if (j->untied && !plan_matrix(j, "output", safetensors_find(&m->file, "tok_embeddings"), &m->weights.tok_embeddings,
                                  &m->weights.output, j->options->output, err))
        return false;
    for (int i = 0; i < 3; i++) plan_copy(j, safetensors_find(&m->file, tokenizer[i]));
    return true;
}

// ---- the header -----------------------------------------------------------------------------------------------------

// The header as it grows. Once there was no memory nothing is added, and err says so.
typedef struct {
    Bytes text;
    Error *err;
} Header;

static void put(Header *h, const char *text) {
    if (!h->err->text[0]) bytes_append(&h->text, text, strlen(text), h->err);
}

static void put_number(Header *h, uint64_t number) {
    char text[24];
    snprintf(text, sizeof text, "%" PRIu64, number);
    put(h, text);
}

static void put_string(Header *h, const char *text) {
    put(h, "\"");
    for (; *text; text++) {
        char c[8] = {*text};
        if (*text == '"' || *text == '\\')
            snprintf(c, sizeof c, "\\%c", *text);
        else if ((unsigned char)*text < 0x20)
            snprintf(c, sizeof c, "\\u%04x", (unsigned)*text);
        put(h, c);
    }
    put(h, "\"");
}

static void put_entry(Header *h, const char *key, const char *value) {
    put_string(h, key);
    put(h, ":");
    put_string(h, value);
}

static void put_metadata(Header *h, const Job *j) {
    const SafeTensors *file = &j->model->file;
    char group[16];
    put(h, "{\"__metadata__\":{");
    put_entry(h, "format", "llama-model/2");
    for (size_t i = 0; i < file->n_meta; i++) {
        const char *key = file->meta[i].key, *value = file->meta[i].value;
        if (strcmp(key, "format") == 0 || strcmp(key, "group") == 0) continue;
        put(h, ",");
        put_entry(h, key, strcmp(key, "tie_embeddings") == 0 && j->untied ? "false" : value);
    }
    snprintf(group, sizeof group, "%d", j->group);
    if (j->group) put(h, ",");
    if (j->group) put_entry(h, "group", group);
    put(h, "}");
}

// The length and the header, padded so that data begins on a page.
static bool make_header(const Job *j, Bytes *text, Error *err) {
    Header h = {.err = err};
    uint64_t at = 0;
    put(&h, "length: "); // eight bytes, to be replaced
    put_metadata(&h, j);
    for (int i = 0; i < j->n; at += j->tensors[i++].bytes) {
        const Planned *p = &j->tensors[i];
        put(&h, ",");
        put_string(&h, p->name);
        put(&h, ":{\"dtype\":");
        put_string(&h, p->dtype);
        put(&h, ",\"shape\":[");
        for (int d = 0; d < p->n_dims; d++) {
            if (d) put(&h, ",");
            put_number(&h, p->shape[d]);
        }
        put(&h, "],\"data_offsets\":[");
        put_number(&h, at);
        put(&h, ",");
        put_number(&h, at + p->bytes);
        put(&h, "]}");
    }
    put(&h, "}");
    while (h.text.n % DATA_ALIGNMENT && !err->text[0]) put(&h, " ");
    *text = h.text;
    if (err->text[0] || !h.text.data) return false;
    for (size_t i = 0; i < 8; i++) text->data[i] = (char)((text->n - 8) >> 8 * i);
    return true;
}

// ---- the file -------------------------------------------------------------------------------------------------------

// Where PATH leads, and PATH.part beside it. Neither may be the file that is read.
static bool name_files(Job *j, const char *path, Error *err) {
    struct stat input, info;
    j->path = realpath(path, NULL);
    const int why = j->path ? 0 : errno;
    const bool dangling = why == ENOENT && lstat(path, &info) == 0;
    if (!j->path) j->path = strdup(path);
    size_t n = j->path ? strlen(j->path) + sizeof ".part" : 0;
    if (n) j->part = malloc(n);
    if (!j->part) {
        fail(err, "out of memory: the name of %s", path);
        return false;
    }
    if (why && why != ENOENT) return fail(err, "%s: %s", path, strerror(why));
    if (dangling)
        return fail(err, "%s: a symbolic link to a file that is not there, expected one that is, or no link", path);
    snprintf(j->part, n, "%s.part", j->path);
    const char *const names[] = {j->path, j->part};
    if (fstat(j->model->file.fd, &input) != 0) return fail(err, "%s: %s", j->model->file.path, strerror(errno));
    for (int i = 0; i < 2; i++) {
        if (stat(names[i], &info) != 0) continue;
        if (info.st_dev == input.st_dev && info.st_ino == input.st_ino)
            return fail(err, "%s: the model itself, expected another file to write%s", names[i],
                        i ? " (it is written under this name first)" : "");
        if (!S_ISREG(info.st_mode)) return fail(err, "%s: not a regular file", names[i]);
    }
    return true;
}

static bool check_space(const Job *j, uint64_t bytes, Error *err) {
    struct statvfs disk;
    if (fstatvfs(j->fd, &disk) != 0) return true; // it will be seen
    uint64_t available = (uint64_t)disk.f_bavail * disk.f_frsize;
    return available >= bytes || fail(err, "%s: needs %.3f GB, %.3f GB are free on that disk", j->path,
                                      (double)bytes * 1e-9, (double)available * 1e-9);
}

// Whether PATH.part is still the file that was opened: whoever had its lock may have renamed or removed it.
static bool part_is_there(const Job *j) {
    struct stat opened, named;
    return fstat(j->fd, &opened) == 0 && lstat(j->part, &named) == 0 && opened.st_dev == named.st_dev &&
           opened.st_ino == named.st_ino;
}

static bool fail_part(Job *j, const char *why, Error *err) {
    if (j->fd >= 0) close(j->fd);
    j->fd = -1;
    return fail(err, "%s: %s", j->part, why);
}

// PATH.part, empty and locked: what a stopped run left is taken over, what another is writing is not.
static bool open_part(Job *j, Error *err) {
    bool there = false;
    for (int tries = 0; !there; tries++) {
        j->fd = open(j->part, O_RDWR | O_CREAT | O_NOFOLLOW | O_CLOEXEC, 0666);
        if (j->fd < 0) return fail_part(j, errno == ELOOP ? "not a regular file" : strerror(errno), err);
        if (flock(j->fd, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK)
            return fail_part(j, "another program is writing it", err);
        there = part_is_there(j);
        if (!there && tries == 9) return fail_part(j, "another program is writing it", err);
        if (!there) close(j->fd);
    }
    return ftruncate(j->fd, 0) == 0 || fail(err, "%s: %s", j->part, strerror(errno));
}

static bool write_at(const Job *j, const void *data, uint64_t n, uint64_t at, Error *err) {
    for (const char *from = data; n > 0;) {
        ssize_t wrote = pwrite(j->fd, from, n < COPY_BYTES ? n : COPY_BYTES, (off_t)at);
        if (wrote < 0 && errno == EINTR && !model_interrupted(j->model)) continue;
        if (wrote < 0 && errno == EINTR) return fail_interrupted(err);
        if (wrote < 0) return fail(err, "%s: %s", j->part, strerror(errno));
        from += wrote;
        at += (uint64_t)wrote;
        n -= (uint64_t)wrote;
    }
    return true;
}

static bool write_next(Job *j, const void *data, uint64_t n, Error *err) {
    uint64_t at = j->at;
    j->at += n;
    return write_at(j, data, n, at, err);
}

// Bytes of the input that are done with: progress, and whether to go on.
static bool advance(Job *j, uint64_t n, Error *err) {
    const Model *m = j->model;
    j->done += n;
    if (m->progress) m->progress("quantising", j->done, m->file.data_bytes);
    return !model_interrupted(m) || fail_interrupted(err);
}

// What the disk does while a block is quantised: it reads n bytes of data from `at` on, which come next, and writes
// what is written so far, so that the end waits for little. Both are advice.
static void start_disk(const Job *j, uint64_t at, uint64_t n) {
    const SafeTensors *file = &j->model->file;
    if (at < file->data_bytes) posix_fadvise(file->fd, (off_t)(file->data_start + at), (off_t)n, POSIX_FADV_WILLNEED);
    sync_file_range(j->fd, 0, 0, SYNC_FILE_RANGE_WRITE);
}

static bool copy_tensor(Job *j, const Tensor *t, Error *err) {
    uint64_t n = t->end - t->begin, block = n < COPY_BYTES ? n : COPY_BYTES;
    char *buffer = malloc(block + 1);
    bool ok = buffer || fail(err, "out of memory: a part of tensor %s", t->name);
    for (uint64_t at = 0; ok && at < n; at += block) {
        uint64_t now = n - at < block ? n - at : block;
        ok = safetensors_read(&j->model->file, buffer, t->begin + at, now, err) && write_next(j, buffer, now, err) &&
             advance(j, now, err);
    }
    free(buffer);
    return ok;
}

// ---- matrices -------------------------------------------------------------------------------------------------------

// A matrix, of which threads quantise rows.
typedef struct {
    const Job *job;
    const Planned *codes;
    const Feedback *feedback; // of errors; NULL: each weight is rounded by itself
    Matrix source;            // without data: a thread has what it reads in memory
    uint64_t read_at;         // where it begins in the data of the file that is read
    uint64_t write_at;        // and in the file that is written
    int first;                // row of the block that is shared
    int part_rows;            // that a thread has in memory
    size_t row_bytes;         // of the source
    size_t code_bytes;        // of a row of codes, or of what is copied
    size_t scale_bytes;       // of a row
    char *scales;             // of all rows; NULL: the matrix is copied
    double *squares;          // of each row, its sum
    double *errors;           // the same of the squared errors
    pthread_mutex_t lock;     // of what follows
    int64_t failed;           // the first row of the part that failed, of several the lowest; INT64_MAX: none has
    Error *err;               // why
} Task;

static double sum_squares(const float *x, int n) {
    double sum[4] = {0};
    int i = 0;
    for (; i + 4 <= n; i += 4)
        for (int l = 0; l < 4; l++) sum[l] += (double)x[i + l] * (double)x[i + l];
    for (; i < n; i++) sum[0] += (double)x[i] * (double)x[i];
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// Memory for some rows: what is read, codes, and numbers.
typedef struct {
    char *input, *codes;
    float *x;       // of one row; with feedback of all
    float *scratch; // of one row, or feedback_scratch
} RowMemory;

static bool rows_init(RowMemory *r, const Task *t, size_t n, Error *err) {
    size_t cols = (size_t)t->source.cols + 8;
    *r = (RowMemory){malloc(n * t->row_bytes), t->scales ? malloc(n * t->code_bytes) : NULL,
                     malloc((t->feedback ? n : 1) * cols * sizeof(float)),
                     malloc((t->feedback ? feedback_scratch(t->source.cols) : cols) * sizeof(float))};
    return (r->input && (r->codes || !t->scales) && r->x && r->scratch) ||
           fail(err, "out of memory: %zu rows of tensor %s", n, t->codes->name);
}

static void rows_free(RowMemory *r) {
    free(r->input);
    free(r->codes);
    free(r->x);
    free(r->scratch);
}

static bool fail_not_finite(const Task *t, const float *x, int row, Error *err) {
    int i = 0;
    while (i + 1 < t->source.cols && isfinite(x[i])) i++;
    return fail(err, "%s: tensor %s: row %d, column %d is %f, expected a finite number", t->job->model->file.path,
                t->codes->name, row, i, (double)x[i]);
}

// Reads n rows, quantises them and writes their codes. A sum of squares in float64 is finite where all numbers are.
static bool quantise_part(const Task *t, const RowMemory *r, int64_t begin, size_t n, Error *err) {
    Matrix m = t->source;
    m.data = r->input;
    if (!safetensors_read(&t->job->model->file, r->input, t->read_at + (uint64_t)begin * t->row_bytes, n * t->row_bytes,
                          err))
        return false;
    for (size_t i = 0; i < n; i++) {
        size_t row = (size_t)begin + i;
        float *x = r->x + (t->feedback ? i * (size_t)m.cols : 0);
        quant_decode_row(x, &m, (int)i);
        t->squares[row] = sum_squares(x, m.cols);
        if (!isfinite(t->squares[row])) return fail_not_finite(t, x, (int)row, err);
        if (t->scales && !t->feedback)
            t->errors[row] = quant_encode_row(t->codes->type, x, m.cols, NULL, r->codes + i * t->code_bytes,
                                              t->scales + row * t->scale_bytes, r->scratch);
    }
    if (t->feedback)
        feedback_round(t->feedback, t->codes->type, r->x, (int)n, r->codes, t->scales + (size_t)begin * t->scale_bytes,
                       t->errors + begin, r->scratch);
    return write_at(t->job, t->scales ? r->codes : r->input, n * t->code_bytes,
                    t->write_at + (uint64_t)begin * t->code_bytes, err);
}

static void add_to_summary(Job *j, const Planned *codes, const Planned *scales, const Task *t) {
    double squares = 0, errors = 0;
    for (int r = 0; r < t->source.rows; r++) {
        squares += t->squares[r];
        errors += t->errors[r];
    }
    QuantizedMatrix *q = &j->summary->matrices[j->summary->n++];
    *q = (QuantizedMatrix){.bytes = codes->bytes + scales->bytes, .error = squares > 0 ? sqrt(errors / squares) : 0};
    snprintf(q->name, sizeof q->name, "%.63s", codes->name);
    quant_name(&(Matrix){.dtype = codes->type.dtype, .group = codes->type.group ? codes->type.group : WHOLE_ROW},
               q->type);
    j->squares += squares;
    j->errors += errors;
}

// Parts are taken in their order, so that one before another that failed is done or being done: which error is reported
// does not depend on the threads.
static void quantise_rows(void *task, int64_t begin, int64_t end) {
    Task *t = task;
    RowMemory r;
    Error err = {""};
    begin += t->first;
    end += t->first;
    bool ok = rows_init(&r, t, (size_t)(end - begin < t->part_rows ? end - begin : t->part_rows), &err);
    for (int64_t n; ok && begin < end; begin += n) {
        n = end - begin < t->part_rows ? end - begin : t->part_rows;
        pthread_mutex_lock(&t->lock);
        bool goes_on = begin < t->failed;
        pthread_mutex_unlock(&t->lock);
        if (!goes_on) break;
        ok = quantise_part(t, &r, begin, (size_t)n, &err);
        if (!ok) break;
    }
    rows_free(&r);
    if (ok) return;
    pthread_mutex_lock(&t->lock);
    if (begin < t->failed) {
        t->failed = begin;
        *t->err = err;
    }
    pthread_mutex_unlock(&t->lock);
}

// One matrix in blocks of rows: its codes are written as they are made, its scales after them. One that is not
// quantised is written as it is.
static bool quantise_matrix(Job *j, const Planned *codes, const Planned *scales, Error *err) {
    const Tensor *source = codes->source;
    const int rows = (int)source->shape[0], cols = (int)source->shape[1];
    const bool copied = !codes->quantised;
    const Feedback *feedback = NULL;
    Error failure = {""};
    if (j->options->calibration && !copied &&
        !(feedback = calibration_of(j->options->calibration, codes->computed, err)))
        return false;
    Task t = {.job = j,
              .codes = codes,
              .feedback = feedback,
              .source = {.dtype = source->dtype, .rows = rows, .cols = cols},
              .read_at = source->begin,
              .write_at = j->at,
              .part_rows = feedback ? GPTQ_ROWS : PART_WEIGHTS / cols + 1,
              .row_bytes = (source->end - source->begin) / (uint64_t)rows,
              .code_bytes = codes->bytes / (uint64_t)rows,
              .scale_bytes = copied ? 0 : scales->bytes / (uint64_t)rows,
              .scales = copied ? NULL : malloc(scales->bytes),
              .squares = calloc(2 * (size_t)rows, sizeof(double)),
              .lock = PTHREAD_MUTEX_INITIALIZER,
              .failed = INT64_MAX,
              .err = &failure};
    t.errors = t.squares + rows;
    bool ok = ((t.scales || copied) && t.squares) || fail(err, "out of memory: scales of tensor %s", codes->name);
    const int least = feedback ? GPTQ_ROWS * threads_count() : 0; // a part for each thread
    const int block = BLOCK_WEIGHTS / cols + 1 > least ? BLOCK_WEIGHTS / cols + 1 : least;
    for (t.first = 0; ok && t.first < rows; t.first += block) {
        int n = rows - t.first < block ? rows - t.first : block;
        start_disk(j, t.read_at + (uint64_t)(t.first + n) * t.row_bytes, READ_AHEAD * (uint64_t)block * t.row_bytes);
        parallel_for(n, t.part_rows, quantise_rows, &t);
        ok = (!failure.text[0] || fail(err, "%s", failure.text)) && advance(j, (uint64_t)n * t.row_bytes, err);
    }
    j->at += codes->bytes;
    if (ok && !copied) {
        ok = write_next(j, t.scales, scales->bytes, err);
        add_to_summary(j, codes, scales, &t);
    }
    free(t.scales);
    free(t.squares);
    return ok;
}

// ---- all of it ------------------------------------------------------------------------------------------------------

static bool write_tensors(Job *j, Error *err) {
    for (int i = 0; i < j->n; i++) {
        const Planned *p = &j->tensors[i];
        if (!p->source) continue; // scales, which went with their codes
        bool matrix = p->quantised || (p->n_dims == 2 && p->source->dtype <= DTYPE_F32);
        if (!(matrix ? quantise_matrix(j, p, p + 1, err) : copy_tensor(j, p->source, err))) return false;
    }
    return true;
}

static bool write_file(Job *j, Error *err) {
    Bytes header = {0};
    bool ok = make_header(j, &header, err) && open_part(j, err);
    bool mine = ok;
    j->header_bytes = header.n;
    ok = ok && check_space(j, header.n + j->bytes, err) && write_next(j, header.data, header.n, err) &&
         write_tensors(j, err) && safetensors_unchanged(&j->model->file, err);
    if (ok && fsync(j->fd) != 0 && errno != EINVAL) ok = fail(err, "%s: %s", j->part, strerror(errno));
    if (ok && rename(j->part, j->path) != 0) ok = fail(err, "%s: %s", j->path, strerror(errno));
    if (!ok && mine) unlink(j->part);
    if (j->fd >= 0) close(j->fd);
    free(header.data);
    return ok;
}

// The groups of both types: one size for the file, for "int4" the one that divides all columns.
static bool choose_groups(Job *j, QuantizeOptions *o, Error *err) {
    const Config *c = &j->model->config;
    const int cols[] = {c->dim, c->q_dim, c->hidden_dim};
    QuantType *types[] = {&o->layers, &o->output};
    int n = o->quantises_output ? 2 : 1;
    for (int i = 0; i < n; i++) // the one that is named holds for the other, too
        if (types[i]->group == QUANT_GROUP_FITS)
            types[i]->group = n == 2 && types[1 - i]->group > 0 ? types[1 - i]->group : quant_fit(cols, 3);
    for (int i = 0; i < n; i++) {
        int group = types[i]->group;
        if (group && j->group && group != j->group)
            return fail(err, "groups of %d columns in the layers and of %d in the output matrix, expected one size",
                        j->group, group);
        if (group) j->group = group;
    }
    return true;
}

static bool quantize(Job *j, const char *path, QuantizeOptions *o, Error *err) {
    Model *m = j->model;
    char types[WEIGHTS_DTYPES];
    if (weights_are_quantised(m))
        return fail(err, "%s: quantised already (%s), expected BF16, F16 or F32", m->file.path,
                    weights_dtypes(m, types));
    j->untied = m->config.tie_embeddings && o->quantises_output;
    j->summary->matrices = calloc((size_t)m->config.n_layers * 7 + 1, sizeof *j->summary->matrices);
    if (!j->summary->matrices) return fail(err, "out of memory: a summary of %d layers", m->config.n_layers);
    return choose_groups(j, o, err) && name_files(j, path, err) && plan_all(j, err) && write_file(j, err);
}

bool quantize_model(Model *m, const char *path, const QuantizeOptions *options, QuantizeSummary *summary, Error *err) {
    QuantizeOptions o = *options;
    Job j = {.model = m, .options = &o, .summary = summary, .fd = -1};
    *summary = (QuantizeSummary){.n = 0};
    bool ok = quantize(&j, path, &o, err);
    summary->group = j.group;
    summary->bytes_read = m->file.file_bytes;
    summary->bytes_made = j.header_bytes + j.bytes;
    summary->error = j.squares > 0 ? sqrt(j.errors / j.squares) : 0;
    free(j.tensors);
    free(j.path);
    free(j.part);
    if (!ok) quantize_free(summary);
    return ok;
}

void quantize_free(QuantizeSummary *summary) {
    free(summary->matrices);
    *summary = (QuantizeSummary){.n = 0};
}
