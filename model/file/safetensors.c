#include "safetensors.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "../threads.h"
#include "json.h"

#define HEADER_MAX 100000000 // the format's own limit
#define READ_CHUNK ((uint64_t)8 << 20)

const char *const dtype_names[DTYPE_COUNT] = {"BF16", "F16", "F32", "I32", "U32", "U8", "I8", "F8_E4M3"};
const int dtype_bytes[DTYPE_COUNT] = {2, 2, 4, 4, 4, 1, 1, 1};

// Reads exactly n bytes at offset.
static bool pread_all(int fd, const char *path, void *dst, uint64_t n, uint64_t offset, Error *err) {
    char *out = dst;
    while (n > 0) {
        ssize_t got = pread(fd, out, n < READ_CHUNK ? n : READ_CHUNK, (off_t)offset);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) return fail(err, "%s: reading at byte %" PRIu64 ": %s", path, offset, strerror(errno));
        if (got == 0) return fail(err, "%s: ended at byte %" PRIu64 ", expected %" PRIu64 " more", path, offset, n);
        out += got;
        offset += (uint64_t)got;
        n -= (uint64_t)got;
    }
    return true;
}

// Files of other kinds that are often given by mistake, recognised by their first bytes.
static bool refuse_other_formats(const char *path, const char *hint, const uint8_t *first, size_t n, Error *err) {
    if (n >= 4 && memcmp(first, "GGUF", 4) == 0) return fail(err, "%s: a GGUF file (llama.cpp); %s", path, hint);
    if (n >= 4 && memcmp(first, "24ka", 4) == 0) return fail(err, "%s: a llama2.c .bin file; %s", path, hint);
    if (n >= 4 && memcmp(first, "PK\3\4", 4) == 0)
        return fail(err, "%s: a PyTorch pickle (zip); save it as safetensors, then %s", path, hint);
    // Protocol 4 on: a frame (0x95), whose length hides in the zeros of a header's. No model.bin has such a header
    // length.
    bool framed = n >= 3 && first[1] >= 4 && first[2] == 0x95;
    if (n >= 2 && first[0] == 0x80 && first[1] >= 2 && first[1] <= 5 && (framed || n < 8 || first[7] != 0))
        return fail(err, "%s: a Python pickle; save it as safetensors, then %s", path, hint);
    // llama2.c's first version has no magic: seven int32 (dim, hidden_dim, layers, heads, kv heads, vocabulary,
    // length).
    if (n >= 28) {
        int32_t v[7];
        memcpy(v, first, sizeof v);
        bool small = true;
        for (int i = 0; i < 7; i++) small = small && (i == 5 || v[i] > 0) && v[i] < 1 << 20 && v[i] > -(1 << 20);
        if (small && v[0] % v[3] == 0 && v[3] % v[4] == 0) return fail(err, "%s: a llama2.c .bin file; %s", path, hint);
    }
    return true;
}

static bool parse_dtype(SafeTensors *st, const char *tensor, const char *text, DType *dtype, Error *err) {
    for (int d = 0; d < DTYPE_COUNT; d++)
        if (strcmp(text, dtype_names[d]) == 0) {
            *dtype = (DType)d;
            return true;
        }
    return fail(err, "%s: tensor %s: dtype %s, expected BF16, F16, F32, I32, U32, U8, I8 or F8_E4M3", st->path, tensor,
                text);
}

// shape × dtype must be the length, with no product that wraps.
static bool check_length(SafeTensors *st, const Tensor *t, Error *err) {
    uint64_t bytes = (uint64_t)dtype_bytes[t->dtype];
    for (int i = 0; i < t->n_dims; i++)
        if (__builtin_mul_overflow(bytes, t->shape[i], &bytes))
            return fail(err, "%s: tensor %s: its shape needs more than 2^64 bytes", st->path, t->name);
    if (t->begin > t->end || t->end > st->data_bytes)
        return fail(err, "%s: tensor %s: bytes %" PRIu64 " to %" PRIu64 ", the data has %" PRIu64, st->path, t->name,
                    t->begin, t->end, st->data_bytes);
    if (t->end - t->begin != bytes)
        return fail(err, "%s: tensor %s: its shape needs %" PRIu64 " bytes, it has %" PRIu64, st->path, t->name, bytes,
                    t->end - t->begin);
    return true;
}

// {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}, each key once, in any order.
static bool parse_tensor(SafeTensors *st, Json *j, Tensor *t, Error *err) {
    bool has_dtype = false, has_shape = false, has_offsets = false;
    if (!json_expect(j, '{')) return false;
    do {
        char *key, *text;
        size_t n;
        if (!json_string(j, &key, &n) || !json_expect(j, ':')) return false;
        bool *seen = strcmp(key, "dtype") == 0          ? &has_dtype
                     : strcmp(key, "shape") == 0        ? &has_shape
                     : strcmp(key, "data_offsets") == 0 ? &has_offsets
                                                        : NULL;
        if (!seen) return fail(err, "%s: tensor %s: unknown key %s", st->path, t->name, key);
        if (*seen) return fail(err, "%s: tensor %s: duplicate key %s", st->path, t->name, key);
        *seen = true;
        if (seen == &has_dtype) {
            if (!json_string(j, &text, &n) || !parse_dtype(st, t->name, text, &t->dtype, err)) return false;
        } else if (seen == &has_offsets) {
            if (!json_expect(j, '[') || !json_uint(j, &t->begin) || !json_expect(j, ',') || !json_uint(j, &t->end) ||
                !json_expect(j, ']'))
                return false;
        } else {
            if (!json_expect(j, '[')) return false;
            if (json_next(j, ']')) continue;
            do {
                if (t->n_dims == 4) return fail(err, "%s: tensor %s: more than 4 dimensions", st->path, t->name);
                if (!json_uint(j, &t->shape[t->n_dims++])) return false;
            } while (json_next(j, ','));
            if (!json_expect(j, ']')) return false;
        }
    } while (json_next(j, ','));
    if (!json_expect(j, '}')) return false;
    if (!has_dtype || !has_shape || !has_offsets)
        return fail(err, "%s: tensor %s: no %s", st->path, t->name,
                    !has_dtype   ? "dtype"
                    : !has_shape ? "shape"
                                 : "data_offsets");
    return check_length(st, t, err);
}

// Makes room for one more element at the end of an array that grows by doubling.
static void *grow(void *array, size_t count, size_t size, Error *err) {
    if (count & (count - 1)) return array; // room is left up to the next power of two
    void *more = realloc(array, (count ? 2 * count : 1) * size);
    if (!more) fail(err, "out of memory: %zu entries of a file's header", count);
    return more;
}

static bool parse_metadata(SafeTensors *st, Json *j, Error *err) {
    if (!json_expect(j, '{')) return false;
    if (json_next(j, '}')) return true;
    do {
        MetaEntry *more = grow(st->meta, st->n_meta, sizeof *more, err);
        if (!more) return false;
        st->meta = more;
        char *key, *value;
        size_t n;
        if (!json_string(j, &key, &n) || !json_expect(j, ':') || !json_string(j, &value, &n)) return false;
        st->meta[st->n_meta++] = (MetaEntry){key, value};
    } while (json_next(j, ','));
    return json_expect(j, '}');
}

static int compare_offset(const void *a, const void *b) {
    const Tensor *x = a, *y = b;
    if (x->begin != y->begin) return x->begin < y->begin ? -1 : 1;
    return (x->end > y->end) - (x->end < y->end);
}

static int compare_name(const void *a, const void *b) {
    return strcmp((*(Tensor *const *)a)->name, (*(Tensor *const *)b)->name);
}

static int compare_key(const void *a, const void *b) {
    return strcmp(((const MetaEntry *)a)->key, ((const MetaEntry *)b)->key);
}

// Contiguous from 0 to the end of the file, and no name twice.
static bool check_layout(SafeTensors *st, Error *err) {
    if (st->n_meta) qsort(st->meta, st->n_meta, sizeof *st->meta, compare_key);
    for (size_t i = 1; i < st->n_meta; i++)
        if (strcmp(st->meta[i - 1].key, st->meta[i].key) == 0)
            return fail(err, "%s: duplicate metadata key %s", st->path, st->meta[i].key);

    if (st->n_tensors) qsort(st->tensors, st->n_tensors, sizeof *st->tensors, compare_offset);
    uint64_t at = 0;
    for (size_t i = 0; i < st->n_tensors; i++) {
        const Tensor *t = &st->tensors[i];
        if (t->begin != at)
            return fail(err, "%s: tensor %s begins at byte %" PRIu64 " of the data, expected %" PRIu64 " (%s)",
                        st->path, t->name, t->begin, at, t->begin < at ? "an overlap" : "a hole");
        at = t->end;
    }
    if (at != st->data_bytes)
        return fail(err, "%s: the tensors end at byte %" PRIu64 " of the data, the file at %" PRIu64, st->path, at,
                    st->data_bytes);

    st->by_name = malloc((st->n_tensors + 1) * sizeof *st->by_name);
    if (!st->by_name) return fail(err, "out of memory: %zu tensor names", st->n_tensors);
    for (size_t i = 0; i < st->n_tensors; i++) st->by_name[i] = &st->tensors[i];
    qsort(st->by_name, st->n_tensors, sizeof *st->by_name, compare_name);
    for (size_t i = 1; i < st->n_tensors; i++)
        if (compare_name(&st->by_name[i - 1], &st->by_name[i]) == 0)
            return fail(err, "%s: duplicate tensor %s", st->path, st->by_name[i]->name);
    return true;
}

static bool parse_header(SafeTensors *st, uint64_t n, Error *err) {
    Json j = {st->header, st->header, st->header + n, err, st->path};
    bool has_metadata = false;
    if (!json_expect(&j, '{')) return false;
    if (!json_next(&j, '}')) {
        do {
            char *name;
            size_t length;
            if (!json_string(&j, &name, &length) || !json_expect(&j, ':')) return false;
            if (strcmp(name, "__metadata__") == 0) {
                if (has_metadata) return fail(err, "%s: duplicate key __metadata__", st->path);
                has_metadata = true;
                if (!parse_metadata(st, &j, err)) return false;
                continue;
            }
            Tensor *more = grow(st->tensors, st->n_tensors, sizeof *more, err);
            if (!more) return false;
            st->tensors = more;
            Tensor t = {.name = name};
            if (!parse_tensor(st, &j, &t, err)) return false;
            st->tensors[st->n_tensors++] = t;
        } while (json_next(&j, ','));
        if (!json_expect(&j, '}')) return false;
    }
    return json_end(&j) && check_layout(st, err);
}

static bool open_checked(SafeTensors *st, const char *hint, Error *err) {
    struct stat info;
    st->fd = open(st->path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); // no waiting for the writer of a named pipe
    if (st->fd < 0 || fstat(st->fd, &info) != 0) return fail(err, "%s: %s", st->path, strerror(errno));
    if (S_ISDIR(info.st_mode)) return fail(err, "%s: a directory, expected a file; %s", st->path, hint);
    if (!S_ISREG(info.st_mode)) return fail(err, "%s: not a regular file", st->path);
    st->file_bytes = (uint64_t)info.st_size;
    st->changed = info.st_mtim;

    uint8_t first[28];
    size_t have = st->file_bytes < sizeof first ? (size_t)st->file_bytes : sizeof first;
    if (!pread_all(st->fd, st->path, first, have, 0, err)) return false;
    if (!refuse_other_formats(st->path, hint, first, have, err)) return false;
    if (have < 8) return fail(err, "%s: %zu bytes long, expected a model of at least 8", st->path, have);
    uint64_t n = 0;
    for (int i = 7; i >= 0; i--) n = n << 8 | first[i];
    if (n > HEADER_MAX) // also what most files of another kind look like
        return fail(err, "%s: not a safetensors file (header of %" PRIu64 " bytes, at most %d)", st->path, n,
                    HEADER_MAX);
    if (n > st->file_bytes - 8)
        return fail(err, "%s: header of %" PRIu64 " bytes, but the file ends after %" PRIu64, st->path, n,
                    st->file_bytes - 8);
    st->data_start = 8 + n;
    st->data_bytes = st->file_bytes - st->data_start;
    st->header = malloc(n + 1);
    if (!st->header) return fail(err, "out of memory: %" PRIu64 " bytes for the header of %s", n, st->path);
    return pread_all(st->fd, st->path, st->header, n, 8, err) && parse_header(st, n, err);
}

bool safetensors_open(SafeTensors *st, const char *path, const char *hint, Error *err) {
    *st = (SafeTensors){.path = path, .fd = -1};
    if (open_checked(st, hint, err)) return true;
    safetensors_close(st);
    return false;
}

void safetensors_close(SafeTensors *st) {
    if (st->fd >= 0) close(st->fd);
    free(st->header);
    free(st->tensors);
    free(st->by_name);
    free(st->meta);
    *st = (SafeTensors){.fd = -1};
}

const Tensor *safetensors_find(const SafeTensors *st, const char *name) {
    Tensor key = {.name = name}, *key_at = &key;
    Tensor **found = bsearch(&key_at, st->by_name, st->n_tensors, sizeof *st->by_name, compare_name);
    return found ? *found : NULL;
}

const char *safetensors_meta(const SafeTensors *st, const char *key) {
    MetaEntry wanted = {key, NULL};
    MetaEntry *found = st->n_meta ? bsearch(&wanted, st->meta, st->n_meta, sizeof *st->meta, compare_key) : NULL;
    return found ? found->value : NULL;
}

typedef struct {
    const SafeTensors *st;
    char *dst;
    uint64_t begin, n;
    pthread_mutex_t lock; // of err
    Error *err;
} Reading;

static void read_part(void *reading, int64_t first, int64_t end) { // in chunks
    Reading *r = reading;
    for (int64_t i = first; i < end; i++) {
        uint64_t at = (uint64_t)i * READ_CHUNK, length = r->n - at < READ_CHUNK ? r->n - at : READ_CHUNK;
        Error own = {""};
        if (pread_all(r->st->fd, r->st->path, r->dst + at, length, r->st->data_start + r->begin + at, &own)) continue;
        pthread_mutex_lock(&r->lock);
        fail(r->err, "%s", own.text);
        pthread_mutex_unlock(&r->lock);
    }
}

bool safetensors_read(const SafeTensors *st, void *dst, uint64_t begin, uint64_t n, Error *err) {
    Reading r = {st, dst, begin, n, PTHREAD_MUTEX_INITIALIZER, err};
    parallel_for((int64_t)((n + READ_CHUNK - 1) / READ_CHUNK), 1, read_part, &r);
    return !err->text[0];
}

bool safetensors_unchanged(const SafeTensors *st, Error *err) {
    struct stat info;
    if (fstat(st->fd, &info) != 0) return fail(err, "%s: %s", st->path, strerror(errno));
    if ((uint64_t)info.st_size != st->file_bytes)
        return fail(err, "%s: changed while it was read: %" PRIu64 " bytes long at first, now %" PRIu64, st->path,
                    st->file_bytes, (uint64_t)info.st_size);
    return (info.st_mtim.tv_sec == st->changed.tv_sec && info.st_mtim.tv_nsec == st->changed.tv_nsec) ||
           fail(err, "%s: was written to while it was read", st->path);
}
