#include "lead.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "processes.h"
#include "shard.h"

enum { EXIT_FAILED = 1, EXIT_INTERRUPTED = 130 };

// ---- messages -------------------------------------------------------------------------------------------------------

typedef enum { MESSAGE_START, MESSAGE_FORWARD, MESSAGE_COPY, MESSAGE_STOP, MESSAGE_END } MessageKind;

// Is sent first; n words follow it.
typedef struct {
    int kind, n;
} Header;

// What a start needs to know beside the model.
typedef struct {
    char engine[16];
    uint64_t kv_memory, gpu_memory;
    int precision, n_slots, max_len, sequences, step_rows, speculates, gathers_only;
} Start;

// A message's words, as they are sent, or as they are read one after another.
typedef struct {
    int *words;
    size_t n, capacity, at;
} Message;

static void make_room(Message *m, size_t n) {
    if (m->words && m->capacity - m->n >= n) return;
    m->capacity = 2 * (m->n + n);
    m->words = realloc(m->words, m->capacity * sizeof *m->words);
    if (!m->words) processes_abort(&(Error){"out of memory: a message between the processes"}, EXIT_FAILED);
}

static void put(Message *m, const void *data, size_t bytes) {
    const size_t n = (bytes + sizeof(int) - 1) / sizeof(int);
    make_room(m, n);
    if (bytes) memcpy(m->words + m->n, data, bytes);
    m->n += n;
}

static void put_int(Message *m, int value) {
    put(m, &value, sizeof value);
}

static const int *take(Message *m, size_t n) {
    const int *words = m->words + m->at;
    m->at += n;
    return words;
}

static int take_int(Message *m) {
    return *take(m, 1);
}

static void send(MessageKind kind, Message *m) {
    Header header = {kind, (int)m->n};
    processes_send(&header, sizeof header);
    if (m->n) processes_broadcast(m->words, m->n * sizeof *m->words);
    m->n = 0;
}

// ---- the same program and model -------------------------------------------------------------------------------------

typedef struct {
    char program[96];
    uint64_t bytes, hash; // of the model file
} Identity;

enum { SAMPLES = 64, SAMPLE_BYTES = 4096 };

// FNV-1a.
static void hash_bytes(uint64_t *hash, const void *data, size_t n) {
    for (size_t i = 0; i < n; i++) *hash = (*hash ^ ((const uint8_t *)data)[i]) * 0x100000001b3;
}

// WeightVisitor.
static bool hash_weight(void *context, const Weight *w, Error *err) {
    (void)err;
    const Matrix *m = w->matrix;
    int numbers[] = {w->n, 0, 0, 0, 0, 0};
    if (m) numbers[1] = m->rows, numbers[2] = m->cols, numbers[3] = m->dtype, numbers[4] = m->group;
    if (m) numbers[5] = m->scale_dtype;
    hash_bytes(context, w->name, strlen(w->name));
    hash_bytes(context, numbers, sizeof numbers);
    return true;
}

static bool hash_samples(const SafeTensors *file, uint64_t *hash, Error *err) {
    char data[SAMPLE_BYTES];
    for (uint64_t i = 0; i < SAMPLES; i++) {
        uint64_t begin = file->data_bytes / SAMPLES * i, n = file->data_bytes - begin;
        if (n > sizeof data) n = sizeof data;
        if (!safetensors_read(file, data, begin, n, err)) return false;
        hash_bytes(hash, data, n);
    }
    return true;
}

static bool identify(Model *m, Identity *id, Error *err) {
    const Config *c = &m->config;
    const float numbers[] = {c->norm_eps, c->rope_theta, c->rope_factor, c->rope_low_freq_factor};
    id->hash = 0xcbf29ce484222325;
    id->bytes = m->file.file_bytes;
    hash_bytes(&id->hash, &m->seed, sizeof m->seed);
    hash_bytes(&id->hash, numbers, sizeof numbers);
    if (!weights_visit(m, hash_weight, &id->hash, err)) return false;
    for (size_t i = 0; i < m->file.n_meta; i++) {
        hash_bytes(&id->hash, m->file.meta[i].key, strlen(m->file.meta[i].key));
        hash_bytes(&id->hash, m->file.meta[i].value, strlen(m->file.meta[i].value));
    }
    return model_is_synthetic(m) || hash_samples(&m->file, &id->hash, err);
}

// Of a rank whose program or model is not rank 0's.
static bool fail_other(int rank, const Identity *first, const Identity *other, Error *err) {
    if (strcmp(first->program, other->program) != 0)
        return fail(err, "rank %d is %s, expected %s as rank 0", rank, other->program, first->program);
    if (first->bytes != other->bytes)
        return fail(err, "rank %d has a model file of %llu bytes, expected rank 0's, of %llu", rank,
                    (unsigned long long)other->bytes, (unsigned long long)first->bytes);
    return fail(err, "rank %d has another model than rank 0, expected the same file", rank);
}

static bool others_follow;

bool lead_agree(Model *m, const char *program, Error *err) {
    Identity own, all[MAX_SHARDS];
    memset(&own, 0, sizeof own);
    snprintf(own.program, sizeof own.program, "%s", program);
    bool ok = m && identify(m, &own, err);
    ok = processes_agree(err) && ok;
    if (ok) processes_gather(&own, all, sizeof own);
    for (int r = 1; ok && r < processes.count; r++)
        if (memcmp(&all[0], &all[r], sizeof own) != 0) ok = fail_other(r, &all[0], &all[r], err);
    others_follow = ok && processes.rank == 0;
    return ok;
}

// ---- rank 0 ---------------------------------------------------------------------------------------------------------

static Engine leading;       // what the caller has
static const Engine *engine; // what computes
static bool drew_tokens;     // since the last batch
static Message outgoing;

static bool open_leading(Model *m, Error *err) {
    Start start = {.kv_memory = m->kv_memory,
                   .gpu_memory = m->gpu_memory,
                   .precision = m->precision,
                   .n_slots = m->kv.n_slots,
                   .max_len = m->kv.max_len,
                   .sequences = m->sequences,
                   .step_rows = m->step_rows,
                   .speculates = m->speculates,
                   .gathers_only = m->gathers_only};
    snprintf(start.engine, sizeof start.engine, "%s", engine->name);
    put(&outgoing, &start, sizeof start);
    send(MESSAGE_START, &outgoing);
    drew_tokens = false;
    bool ok = engine->open(m, err);
    return processes_agree(err) && ok;
}

static void close_leading(Model *m) {
    if (others_follow) send(MESSAGE_STOP, &outgoing);
    engine->close(m);
}

static void put_slot(Message *to, const KVCache *kv, int slot) {
    int first, n = kv_changes(kv, slot, &first);
    put_int(to, kv->len[slot]);
    put_int(to, kv->held[slot]);
    put_int(to, first);
    put_int(to, n);
    put(to, kv_slot_pages(kv, slot) + first, (size_t)n * sizeof(int));
}

static bool forward_leading(Model *m, const Batch *b, int first_logit, Error *err) {
    const int numbers[] = {b->n_rows, b->n_seq, b->n_logits, b->n_decode, b->ends, first_logit, m->sequences};
    put(&outgoing, numbers, sizeof numbers);
    put_int(&outgoing, drew_tokens);
    put(&outgoing, b->tokens, (size_t)b->n_rows * sizeof *b->tokens);
    put(&outgoing, b->slot, (size_t)b->n_seq * sizeof *b->slot);
    put(&outgoing, b->start, (size_t)(b->n_seq + 1) * sizeof *b->start);
    put(&outgoing, b->logit_rows, (size_t)b->n_logits * sizeof *b->logit_rows);
    for (int i = 0; i < b->n_seq; i++) put_slot(&outgoing, &m->kv, b->slot[i]);
    send(MESSAGE_FORWARD, &outgoing);
    drew_tokens = false;
    if (!engine->forward(m, b, first_logit, err)) processes_abort(err, EXIT_FAILED);
    return true;
}

static bool sample_leading(Model *m, const SampleRow *rows, int n, int *ids, Error *err) {
    drew_tokens = true;
    return engine->sample(m, rows, n, ids, err);
}

// (The address of the host's memory here is its name there.)
static bool copy_leading(Model *m, const int *pages, int n, void *const *host, bool to_host, Error *err) {
    put_int(&outgoing, to_host);
    put_int(&outgoing, n);
    put(&outgoing, pages, (size_t)n * sizeof *pages);
    for (int i = 0; i < n; i++) {
        uint64_t name = (uintptr_t)host[i];
        put(&outgoing, &name, sizeof name);
    }
    send(MESSAGE_COPY, &outgoing);
    if (!engine->copy_pages(m, pages, n, host, to_host, err)) processes_abort(err, EXIT_FAILED);
    return true;
}

const Engine *lead_engine(const Engine *of) {
    if (of == &leading) return of;
    engine = of;
    leading = *of;
    leading.open = open_leading;
    leading.close = close_leading;
    leading.forward = forward_leading;
    leading.sample = sample_leading;
    leading.copy_pages = copy_leading;
    return &leading;
}

void lead_end(int status) {
    if (!others_follow) return;
    put_int(&outgoing, status);
    send(MESSAGE_END, &outgoing);
    free(outgoing.words);
    outgoing = (Message){0};
    others_follow = false;
}

// ---- the others -----------------------------------------------------------------------------------------------------

// Host memory for a page that has left, by the name that rank 0 has for its own.
typedef struct {
    uint64_t name;
    void *memory;
} HostPage;

typedef struct {
    Model *model;
    Message incoming;
    HostPage *host_pages; // [n_host_pages]
    size_t n_host_pages, max_host_pages;
} Follower;

// Waits for the next message.
static MessageKind receive(Follower *f) {
    static const sig_atomic_t never;
    Message *m = &f->incoming;
    Header header;
    if (!processes_receive(&header, sizeof header, f->model->interrupted ? f->model->interrupted : &never))
        processes_abort(&(Error){"interrupted"}, EXIT_INTERRUPTED);
    m->n = m->at = 0;
    make_room(m, (size_t)header.n);
    m->n = (size_t)header.n;
    if (header.n) processes_broadcast(m->words, m->n * sizeof *m->words);
    return (MessageKind)header.kind;
}

static bool start_following(Follower *f, Error *err) {
    Model *m = f->model;
    Start start;
    memcpy(&start, f->incoming.words, sizeof start);
    m->kv_memory = start.kv_memory;
    m->gpu_memory = start.gpu_memory;
    m->sequences = start.sequences;
    m->step_rows = start.step_rows;
    m->speculates = start.speculates;
    m->gathers_only = start.gathers_only;
    bool ok = model_start(m, start.engine, (Precision)start.precision, start.n_slots, start.max_len, err);
    return processes_agree(err) && ok;
}

static bool forward_following(Follower *f, Error *err) {
    Model *m = f->model;
    Message *in = &f->incoming;
    Batch b = {.n_rows = take_int(in)};
    b.n_seq = take_int(in);
    b.n_logits = take_int(in);
    b.n_decode = take_int(in);
    b.ends = take_int(in);
    int first_logit = take_int(in);
    m->sequences = take_int(in);
    if (take_int(in)) m->engine->sample(m, NULL, 0, NULL, err); // of the last batch, where only rank 0 has the tokens
    b.tokens = take(in, (size_t)b.n_rows);
    b.slot = take(in, (size_t)b.n_seq);
    b.start = take(in, (size_t)b.n_seq + 1);
    b.logit_rows = take(in, (size_t)b.n_logits);
    for (int i = 0; i < b.n_seq; i++) {
        int len = take_int(in), held = take_int(in), first = take_int(in), n = take_int(in);
        kv_follow(&m->kv, b.slot[i], len, held, first, n, take(in, (size_t)n));
    }
    return m->engine->forward(m, &b, first_logit, err);
}

// The memory of that name, which is made when it is first asked for.
static void *host_page(Follower *f, uint64_t name, Error *err) {
    for (size_t i = 0; i < f->n_host_pages; i++)
        if (f->host_pages[i].name == name) return f->host_pages[i].memory;
    if (f->n_host_pages == f->max_host_pages) {
        size_t most = f->max_host_pages ? 2 * f->max_host_pages : 64;
        HostPage *more = realloc(f->host_pages, most * sizeof *more);
        if (!more) return fail(err, "out of memory: %zu pages of keys and values", most), NULL;
        f->host_pages = more;
        f->max_host_pages = most;
    }
    void *memory = f->model->engine->allocate_host((size_t)model_page_bytes(f->model));
    if (!memory) return fail(err, "out of memory: a page of keys and values, after %zu", f->n_host_pages), NULL;
    f->host_pages[f->n_host_pages++] = (HostPage){name, memory};
    return memory;
}

static bool copy_following(Follower *f, Error *err) {
    Message *in = &f->incoming;
    bool to_host = take_int(in);
    int n = take_int(in);
    const int *pages = take(in, (size_t)n);
    void **host = malloc((size_t)(n + 1) * sizeof *host);
    bool ok = host || fail(err, "out of memory: %d pages of keys and values", n);
    for (int i = 0; host && ok && i < n; i++) {
        uint64_t name;
        memcpy(&name, take(in, sizeof name / sizeof(int)), sizeof name);
        ok = (host[i] = host_page(f, name, err)) != NULL;
    }
    ok = ok && f->model->engine->copy_pages(f->model, pages, n, host, to_host, err);
    free(host);
    return ok;
}

static void stop_following(Follower *f) {
    while (f->n_host_pages) f->model->engine->free_host(f->host_pages[--f->n_host_pages].memory);
    model_stop(f->model);
}

int follow(Model *m, bool (*started)(Model *m, void *context, Error *err), void *context) {
    Follower f = {.model = m};
    for (;;) {
        Error err = {""};
        bool ok = true;
        switch (receive(&f)) {
        case MESSAGE_START: // (a start that failed anywhere is rank 0's to report)
            ok = !start_following(&f, &err) || !started || started(m, context, &err);
            break;
        case MESSAGE_FORWARD:
            ok = forward_following(&f, &err);
            break;
        case MESSAGE_COPY:
            ok = copy_following(&f, &err);
            break;
        case MESSAGE_STOP:
            stop_following(&f);
            break;
        case MESSAGE_END: {
            int status = take_int(&f.incoming);
            free(f.host_pages);
            free(f.incoming.words);
            return status;
        }
        }
        if (!ok) processes_abort(&err, EXIT_FAILED);
    }
}
