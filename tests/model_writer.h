// Writes small model.bin files and dumps, good ones and broken ones, and takes existing ones apart. Independent of the
// program's own reader on purpose.
#ifndef MODEL_WRITER_H
#define MODEL_WRITER_H

#include <math.h>

#include "program.h"

enum { BYTES = 256, TINY_VOCAB = 259, BOS = 256, EOS = 257, EOT = 258, MAX_PARTS = 96, MAX_META = 40 };

typedef struct {
    char name[64];
    char dtype[12];
    int n_dims;
    uint64_t shape[4];
    uint8_t *data;
    uint64_t n;      // bytes of data
    int64_t skew[2]; // added to the offsets that the header gives
} Part;

typedef struct {
    char key[40];
    char *value; // as JSON has it between the quotes
} Entry;

// A safetensors file in pieces: edit them, then write it.
typedef struct {
    Entry meta[MAX_META];
    Part parts[MAX_PARTS]; // in file order
    int n_meta, n_parts;
} Draft;

// A file as bytes.
typedef struct {
    uint8_t *bytes;
    size_t n;
} File;

__attribute__((unused)) static void *must(void *p) {
    if (!p) die("out of memory");
    return p;
}

__attribute__((noreturn, unused)) static void broken_test(const char *what, const char *which) {
    printf("FAIL %s: %s: the test itself is broken\n", which, what);
    exit(1);
}

// ---- parts ----------------------------------------------------------------------------------------------------------

// Sets metadata, or removes it with value NULL.
__attribute__((unused)) static void draft_meta(Draft *d, const char *key, const char *value) {
    int i = 0;
    while (i < d->n_meta && strcmp(d->meta[i].key, key) != 0) i++;
    if (i < d->n_meta) free(d->meta[i].value);
    if (!value) {
        if (i == d->n_meta) broken_test("no such metadata", key);
        memmove(d->meta + i, d->meta + i + 1, (size_t)(--d->n_meta - i) * sizeof *d->meta);
        return;
    }
    if (i == MAX_META) broken_test("too much metadata", key);
    if (i == d->n_meta) snprintf(d->meta[d->n_meta++].key, sizeof d->meta[0].key, "%s", key);
    d->meta[i].value = must(strdup(value));
}

__attribute__((unused)) static const char *draft_find_meta(const Draft *d, const char *key) {
    for (int i = 0; i < d->n_meta; i++)
        if (strcmp(d->meta[i].key, key) == 0) return d->meta[i].value;
    return NULL;
}

__attribute__((unused)) static int draft_meta_int(const Draft *d, const char *key) {
    const char *value = draft_find_meta(d, key);
    if (!value) broken_test("no such metadata", key);
    return atoi(value);
}

__attribute__((unused)) static Part *draft_find(Draft *d, const char *name) {
    for (int i = 0; i < d->n_parts; i++)
        if (strcmp(d->parts[i].name, name) == 0) return &d->parts[i];
    return NULL;
}

__attribute__((unused)) static Part *draft_part(Draft *d, const char *name) {
    Part *p = draft_find(d, name);
    if (!p) broken_test("no such tensor", name);
    return p;
}

// Inserts a tensor before position at, takes data (malloc'd; NULL: zeros).
__attribute__((unused)) static Part *draft_insert(Draft *d, int at, const char *name, const char *dtype, int n_dims,
                                                  uint64_t rows, uint64_t cols, void *data) {
    if (d->n_parts == MAX_PARTS) broken_test("too many tensors", name);
    memmove(d->parts + at + 1, d->parts + at, (size_t)(d->n_parts++ - at) * sizeof *d->parts);
    Part *p = &d->parts[at];
    *p = (Part){.n_dims = n_dims, .shape = {rows, cols}, .data = data};
    snprintf(p->name, sizeof p->name, "%s", name);
    snprintf(p->dtype, sizeof p->dtype, "%s", dtype);
    int width = strcmp(dtype, "U8") == 0 || strcmp(dtype, "I8") == 0      ? 1
                : strcmp(dtype, "BF16") == 0 || strcmp(dtype, "F16") == 0 ? 2
                                                                          : 4;
    p->n = rows * (n_dims > 1 ? cols : 1) * (uint64_t)width;
    if (!data) p->data = must(calloc(p->n + 1, 1));
    return p;
}

__attribute__((unused)) static Part *draft_append(Draft *d, const char *name, const char *dtype, int n_dims,
                                                  uint64_t rows, uint64_t cols, void *data) {
    return draft_insert(d, d->n_parts, name, dtype, n_dims, rows, cols, data);
}

__attribute__((unused)) static void draft_remove(Draft *d, const char *name) {
    Part *p = draft_part(d, name);
    free(p->data);
    memmove(p, p + 1, (size_t)(d->parts + --d->n_parts - p) * sizeof *p);
}

__attribute__((unused)) static void draft_free(Draft *d) {
    for (int i = 0; i < d->n_meta; i++) free(d->meta[i].value);
    for (int i = 0; i < d->n_parts; i++) free(d->parts[i].data);
    *d = (Draft){.n_meta = 0};
}

// ---- files ----------------------------------------------------------------------------------------------------------

// A file of that header, padded with spaces to where data begins at a multiple of align.
__attribute__((unused)) static File file_make(const char *header, size_t n_header, size_t align, const void *data,
                                              size_t n_data) {
    size_t start = (8 + n_header + align - 1) / align * align;
    File f = {must(malloc(start + n_data + 1)), start + n_data};
    for (int i = 0; i < 8; i++) f.bytes[i] = (uint8_t)((uint64_t)(start - 8) >> 8 * i);
    memset(f.bytes + 8, ' ', start - 8);
    if (n_header) memcpy(f.bytes + 8, header, n_header);
    if (n_data) memcpy(f.bytes + start, data, n_data);
    return f;
}

__attribute__((unused)) static size_t file_header_length(const File *f) {
    uint64_t n = 0;
    for (int i = 7; i >= 0; i--) n = n << 8 | f->bytes[i];
    return (size_t)n;
}

__attribute__((unused)) static File draft_file(const Draft *d) {
    char *header = NULL;
    size_t n_header, n_data = 0;
    for (int i = 0; i < d->n_parts; i++) n_data += d->parts[i].n;
    uint8_t *data = must(malloc(n_data + 1));
    FILE *out = must(open_memstream(&header, &n_header));
    fprintf(out, "{\"__metadata__\":{");
    for (int i = 0; i < d->n_meta; i++) fprintf(out, "%s\"%s\":\"%s\"", i ? "," : "", d->meta[i].key, d->meta[i].value);
    fprintf(out, "}");
    uint64_t at = 0;
    for (int i = 0; i < d->n_parts; i++) {
        const Part *p = &d->parts[i];
        fprintf(out, ",\"%s\":{\"dtype\":\"%s\",\"shape\":[", p->name, p->dtype);
        for (int k = 0; k < p->n_dims; k++) fprintf(out, "%s%llu", k ? "," : "", (unsigned long long)p->shape[k]);
        fprintf(out, "],\"data_offsets\":[%llu,%llu]}", (unsigned long long)(at + (uint64_t)p->skew[0]),
                (unsigned long long)(at + p->n + (uint64_t)p->skew[1]));
        if (p->n) memcpy(data + at, p->data, p->n);
        at += p->n;
    }
    fprintf(out, "}");
    fclose(out);
    File f = file_make(header, n_header, 4096, data, n_data);
    free(header);
    free(data);
    return f;
}

__attribute__((unused)) static void file_free(File *f) {
    free(f->bytes);
    *f = (File){NULL, 0};
}

__attribute__((unused)) static void draft_write(const Draft *d, const char *path) {
    File f = draft_file(d);
    write_file(path, f.bytes, f.n);
    file_free(&f);
}

// Another header text over the same data.
__attribute__((unused)) static void file_set_header(File *f, const char *header, size_t n, size_t align) {
    size_t start = 8 + file_header_length(f);
    File other = file_make(header, n, align, f->bytes + start, f->n - start);
    free(f->bytes);
    *f = other;
}

__attribute__((unused)) static const char *find_bytes(const char *text, size_t n, const char *wanted) {
    size_t length = strlen(wanted);
    for (size_t i = 0; i + length <= n; i++)
        if (memcmp(text + i, wanted, length) == 0) return text + i;
    return NULL;
}

// Replaces the first `from` in the header.
__attribute__((unused)) static void file_replace(File *f, const char *from, const char *to) {
    size_t n = file_header_length(f), n_from = strlen(from), n_to = strlen(to);
    const char *old = (char *)f->bytes + 8, *found = find_bytes(old, n, from);
    if (!found) broken_test("not in the header", from);
    while (n > 0 && old[n - 1] == ' ') n--;
    char *header = must(malloc(n + n_to));
    size_t before = (size_t)(found - old);
    memcpy(header, old, before);
    memcpy(header + before, to, n_to);
    memcpy(header + before + n_to, found + n_from, n - before - n_from);
    file_set_header(f, header, n - n_from + n_to, 4096);
    free(header);
}

// ---- taking a file apart --------------------------------------------------------------------------------------------

static void skip_to(const char **at, char c, const char *path) {
    while (**at == ' ' || **at == '\n') ++*at;
    if (**at != c) broken_test("not the JSON that was expected", path);
    ++*at;
}

static bool skip_if(const char **at, char c) {
    while (**at == ' ' || **at == '\n') ++*at;
    return **at == c && ++*at;
}

static char *take_string(const char **at, const char *path) {
    skip_to(at, '"', path);
    const char *first = *at;
    for (; **at != '"'; ++*at) {
        if (**at == '\\') ++*at;
        if (!**at) broken_test("a string without end", path);
    }
    return must(strndup(first, (size_t)((*at)++ - first)));
}

static int take_numbers(const char **at, uint64_t *numbers, const char *path) {
    int n = 0;
    skip_to(at, '[', path);
    if (skip_if(at, ']')) return 0;
    do {
        char *end;
        if (n == 4) broken_test("too many numbers", path);
        numbers[n++] = strtoull(*at, &end, 10);
        *at = end;
    } while (skip_if(at, ','));
    skip_to(at, ']', path);
    return n;
}

static int by_offset(const void *a, const void *b) {
    const Part *x = a, *y = b;
    return (x->skew[0] > y->skew[0]) - (x->skew[0] < y->skew[0]);
}

// Reads a good safetensors file into its pieces.
__attribute__((unused)) static void draft_read(Draft *d, const char *path) {
    *d = (Draft){.n_meta = 0};
    File f;
    f.bytes = (uint8_t *)read_whole(path, &f.n);
    size_t n = file_header_length(&f);
    char *header = must(strndup((char *)f.bytes + 8, n));
    const uint8_t *data = f.bytes + 8 + n;
    const char *at = header;
    skip_to(&at, '{', path);
    do {
        char *name = take_string(&at, path);
        skip_to(&at, ':', path);
        skip_to(&at, '{', path);
        if (strcmp(name, "__metadata__") == 0) {
            do {
                char *key = take_string(&at, path);
                skip_to(&at, ':', path);
                char *value = take_string(&at, path);
                draft_meta(d, key, value);
                free(key);
                free(value);
            } while (skip_if(&at, ','));
        } else {
            if (d->n_parts == MAX_PARTS) broken_test("too many tensors", path);
            Part *p = &d->parts[d->n_parts++];
            uint64_t offsets[4] = {0};
            *p = (Part){.n_dims = 0};
            snprintf(p->name, sizeof p->name, "%s", name);
            do {
                char *key = take_string(&at, path);
                skip_to(&at, ':', path);
                if (strcmp(key, "dtype") == 0) {
                    char *dtype = take_string(&at, path);
                    snprintf(p->dtype, sizeof p->dtype, "%s", dtype);
                    free(dtype);
                } else if (strcmp(key, "shape") == 0) {
                    p->n_dims = take_numbers(&at, p->shape, path);
                } else {
                    take_numbers(&at, offsets, path);
                }
                free(key);
            } while (skip_if(&at, ','));
            p->n = offsets[1] - offsets[0];
            p->skew[0] = (int64_t)offsets[0]; // until they are sorted
            p->data = must(malloc(p->n + 1));
            memcpy(p->data, data + offsets[0], p->n);
        }
        skip_to(&at, '}', path);
        free(name);
    } while (skip_if(&at, ','));
    qsort(d->parts, (size_t)d->n_parts, sizeof *d->parts, by_offset);
    for (int i = 0; i < d->n_parts; i++) d->parts[i].skew[0] = 0;
    free(header);
    file_free(&f);
}

// ---- a small model --------------------------------------------------------------------------------------------------

static uint64_t writer_state;

static float writer_random(void) { // in [-1, 1)
    writer_state = writer_state * 6364136223846793005u + 1442695040888963407u;
    return (float)((double)(writer_state >> 40) * 0x1p-23 - 1.0);
}

static uint16_t half_from_float(float x) { // normal numbers and zero, cut off
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    int exponent = (int)(bits >> 23 & 0xFF) - 127 + 15;
    uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
    return exponent <= 0 ? sign : (uint16_t)(sign | exponent << 10 | (bits >> 13 & 0x3FF));
}

// Takes floats [n] and returns them as dtype.
static void *as_dtype(float *values, size_t n, const char *dtype) {
    if (strcmp(dtype, "F32") == 0) return values;
    uint16_t *out = must(malloc(n * sizeof *out + 1));
    for (size_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, &values[i], sizeof bits);
        out[i] = strcmp(dtype, "F16") == 0 ? half_from_float(values[i]) : (uint16_t)(bits >> 16);
    }
    free(values);
    return out;
}

typedef struct {
    int dim, hidden_dim, n_layers, n_heads, n_kv_heads, head_dim, max_seq_len;
    const char *dtype;
    bool tied, llama3;
} Shape;

static const Shape tiny_shape = {16, 24, 1, 4, 2, 4, 128, "F32", false, true};

static void add_matrix(Draft *d, const char *name, const char *dtype, int rows, int cols, float range) {
    size_t n = (size_t)rows * (size_t)cols;
    float *values = must(malloc(n * sizeof *values + 1));
    for (size_t i = 0; i < n; i++) values[i] = writer_random() * range;
    draft_append(d, name, dtype, 2, (uint64_t)rows, (uint64_t)cols, as_dtype(values, n, dtype));
}

static void add_norm(Draft *d, const char *name, int dim) {
    float *values = must(malloc((size_t)dim * sizeof *values));
    for (int i = 0; i < dim; i++) values[i] = 1 + writer_random() / 4;
    draft_append(d, name, "F32", 1, (uint64_t)dim, 0, values);
}

// A vocabulary of the 256 bytes, id = byte, and three special tokens.
__attribute__((unused)) static void add_tokenizer(Draft *d) {
    static const char *const special[] = {"<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"};
    uint32_t *offsets = must(malloc((TINY_VOCAB + 1) * sizeof *offsets)), at = 0;
    uint8_t *kind = must(calloc(TINY_VOCAB, 1)), *bytes = must(malloc(512));
    for (int id = 0; id < TINY_VOCAB; id++) {
        offsets[id] = at;
        if (id < BYTES) {
            bytes[at++] = (uint8_t)id;
        } else {
            kind[id] = 1;
            memcpy(bytes + at, special[id - BYTES], strlen(special[id - BYTES]));
            at += (uint32_t)strlen(special[id - BYTES]);
        }
    }
    offsets[TINY_VOCAB] = at;
    draft_append(d, "tokenizer.offsets", "U32", 1, TINY_VOCAB + 1, 0, offsets);
    draft_append(d, "tokenizer.kind", "U8", 1, TINY_VOCAB, 0, kind);
    draft_append(d, "tokenizer.bytes", "U8", 1, at, 0, bytes);
}

static void meta_number(Draft *d, const char *key, int value) {
    char text[16];
    snprintf(text, sizeof text, "%d", value);
    draft_meta(d, key, text);
}

// Random weights from a seed. BOS is 256, the only end id 257.
__attribute__((unused)) static void draft_tiny(Draft *d, Shape s, uint64_t seed) {
    *d = (Draft){.n_meta = 0};
    writer_state = seed;
    draft_meta(d, "format", "llama-model/1");
    meta_number(d, "dim", s.dim);
    meta_number(d, "hidden_dim", s.hidden_dim);
    meta_number(d, "n_layers", s.n_layers);
    meta_number(d, "n_heads", s.n_heads);
    meta_number(d, "n_kv_heads", s.n_kv_heads);
    meta_number(d, "head_dim", s.head_dim);
    meta_number(d, "vocab_size", TINY_VOCAB);
    meta_number(d, "max_seq_len", s.max_seq_len);
    draft_meta(d, "norm_eps", "1e-05");
    draft_meta(d, "rope_theta", "500000.0");
    draft_meta(d, "rope_type", s.llama3 ? "llama3" : "default");
    if (s.llama3) {
        draft_meta(d, "rope_factor", "8.0");
        draft_meta(d, "rope_low_freq_factor", "1.0");
        draft_meta(d, "rope_high_freq_factor", "4.0");
        draft_meta(d, "rope_original_max_seq_len", "64");
    }
    draft_meta(d, "tie_embeddings", s.tied ? "true" : "false");
    draft_meta(d, "bos_id", "256");
    draft_meta(d, "eos_ids", "257");
    draft_meta(d, "chat_format", "none");
    draft_meta(d, "source", "a test");
    float range = 1.7f / sqrtf((float)s.dim);
    add_matrix(d, "tok_embeddings", s.dtype, TINY_VOCAB, s.dim, 1);
    for (int i = 0; i < s.n_layers; i++) {
        const struct {
            const char *name;
            int rows, cols; // cols 0: a norm
        } parts[] = {{"attention_norm", s.dim, 0},
                     {"wq", s.n_heads * s.head_dim, s.dim},
                     {"wk", s.n_kv_heads * s.head_dim, s.dim},
                     {"wv", s.n_kv_heads * s.head_dim, s.dim},
                     {"wo", s.dim, s.n_heads * s.head_dim},
                     {"ffn_norm", s.dim, 0},
                     {"w1", s.hidden_dim, s.dim},
                     {"w2", s.dim, s.hidden_dim},
                     {"w3", s.hidden_dim, s.dim}};
        for (size_t p = 0; p < sizeof parts / sizeof *parts; p++) {
            char name[64];
            snprintf(name, sizeof name, "layers.%d.%s", i, parts[p].name);
            if (parts[p].cols)
                add_matrix(d, name, s.dtype, parts[p].rows, parts[p].cols, range);
            else
                add_norm(d, name, s.dim);
        }
    }
    add_norm(d, "norm", s.dim);
    if (!s.tied) add_matrix(d, "output", s.dtype, TINY_VOCAB, s.dim, range);
    add_tokenizer(d);
}

// Leaves the vocabulary: what convert.py --vocab-only writes.
__attribute__((unused)) static void draft_vocab_only(Draft *d) {
    static const char *const kept[] = {"format", "vocab_size", "bos_id", "eos_ids", "chat_format"};
    for (int i = d->n_meta; i-- > 0;) {
        bool keep = false;
        for (int k = 0; k < 5; k++) keep = keep || strcmp(d->meta[i].key, kept[k]) == 0;
        if (!keep) draft_meta(d, d->meta[i].key, NULL);
    }
    draft_meta(d, "n_layers", "0");
    while (d->n_parts > 3) draft_remove(d, d->parts[0].name);
}

// ---- a model for chat -----------------------------------------------------------------------------------------------

__attribute__((unused)) static void add_rows(Draft *d, const char *name, int rows) {
    Part *p = draft_part(d, name);
    uint64_t width = p->n / p->shape[0], n = (uint64_t)rows * width;
    p->data = must(realloc(p->data, n));
    for (uint64_t i = p->n; i < n; i += 4) {
        float x = writer_random();
        memcpy(p->data + i, &x, 4);
    }
    p->shape[0] = (uint64_t)rows;
    p->n = n;
}

enum { START = TINY_VOCAB, END, CHAT_VOCAB };

// The tiny model with the two tokens of a header, <|eot_id|> as its end.
__attribute__((unused)) static void draft_chat(Draft *d, int max_seq_len) {
    Shape s = tiny_shape;
    s.dim = 64, s.hidden_dim = 96, s.n_layers = 2, s.head_dim = 16, s.max_seq_len = max_seq_len;
    draft_tiny(d, s, 5);
    draft_meta(d, "chat_format", "llama3.1");
    draft_meta(d, "converter", "2");
    draft_meta(d, "eos_ids", "257,258");
    draft_meta(d, "vocab_size", "261");
    add_rows(d, "tok_embeddings", CHAT_VOCAB);
    add_rows(d, "output", CHAT_VOCAB);
    static const char *const more[] = {"<|start_header_id|>", "<|end_header_id|>"};
    Part *offsets = draft_part(d, "tokenizer.offsets"), *kind = draft_part(d, "tokenizer.kind"),
         *bytes = draft_part(d, "tokenizer.bytes");
    offsets->data = must(realloc(offsets->data, 4 * (CHAT_VOCAB + 1)));
    kind->data = must(realloc(kind->data, CHAT_VOCAB));
    bytes->data = must(realloc(bytes->data, bytes->n + 64));
    for (int i = 0; i < 2; i++) {
        memcpy(bytes->data + bytes->n, more[i], strlen(more[i]));
        bytes->n += strlen(more[i]);
        ((uint32_t *)offsets->data)[TINY_VOCAB + 1 + i] = (uint32_t)bytes->n;
        kind->data[TINY_VOCAB + i] = 1;
    }
    offsets->shape[0] = CHAT_VOCAB + 1, offsets->n = 4 * (CHAT_VOCAB + 1);
    kind->shape[0] = kind->n = CHAT_VOCAB;
    bytes->shape[0] = bytes->n;
}

// One more token of a chat model, of this kind; its id.
__attribute__((unused)) static int draft_token(Draft *d, const char *text, int kind_of_it) {
    Part *offsets = draft_part(d, "tokenizer.offsets"), *kind = draft_part(d, "tokenizer.kind"),
         *bytes = draft_part(d, "tokenizer.bytes");
    int id = (int)kind->n;
    add_rows(d, "tok_embeddings", id + 1);
    add_rows(d, "output", id + 1);
    Part *output = draft_part(d, "output");
    size_t row = output->n / output->shape[0];
    memset(output->data + output->n - row, 0, row); // never the most likely
    kind->data = must(realloc(kind->data, kind->n + 1));
    kind->data[kind->n++] = (uint8_t)kind_of_it;
    kind->shape[0] = kind->n;
    bytes->data = must(realloc(bytes->data, bytes->n + strlen(text)));
    memcpy(bytes->data + bytes->n, text, strlen(text));
    bytes->shape[0] = bytes->n += strlen(text);
    offsets->data = must(realloc(offsets->data, offsets->n + 4));
    ((uint32_t *)offsets->data)[offsets->n / 4] = (uint32_t)bytes->n;
    offsets->n += 4;
    offsets->shape[0]++;
    meta_number(d, "vocab_size", id + 1);
    return id;
}

// ---- a model with a script ------------------------------------------------------------------------------------------
// Its next token depends on the last one alone: the layer adds nothing, embeddings are random signs, and the output row
// of next[t] is the embedding of t. So a test knows the text and the logits without asking the program.

enum { SCRIPT_DIM = 128 };

typedef struct {
    int next[TINY_VOCAB];       // a permutation
    float *embeddings, *output; // [TINY_VOCAB][SCRIPT_DIM], the draft's
} Script;

// sharpness: about the logit of the next token; all the others are near 0.
__attribute__((unused)) static void draft_script(Draft *d, Script *s, float sharpness, int max_seq_len) {
    Shape shape = {SCRIPT_DIM, 2, 1, 1, 1, 2, max_seq_len, "F32", false, false};
    draft_tiny(d, shape, 1);
    static const char *const still[] = {"layers.0.wo", "layers.0.w2"};
    for (int i = 0; i < 2; i++) memset(draft_part(d, still[i])->data, 0, draft_part(d, still[i])->n);
    float *norm = (float *)draft_part(d, "norm")->data;
    for (int i = 0; i < SCRIPT_DIM; i++) norm[i] = 1;
    s->embeddings = (float *)draft_part(d, "tok_embeddings")->data;
    s->output = (float *)draft_part(d, "output")->data;
    for (int i = 0; i < TINY_VOCAB * SCRIPT_DIM; i++) s->embeddings[i] = s->embeddings[i] < 0 ? -1 : 1;
    for (int t = 0; t < TINY_VOCAB; t++)
        for (int i = 0; i < SCRIPT_DIM; i++)
            s->output[s->next[t] * SCRIPT_DIM + i] = s->embeddings[t * SCRIPT_DIM + i] * sharpness / SCRIPT_DIM;
}

// The chain that most tests follow: BOS abc…xyz, space, é, a byte that is no UTF-8, quote, backslash, newline, €,
// period, EOS, ABC…XYZ, EOT, 0…9 and again from BOS. All other tokens form a second cycle.
__attribute__((unused)) static void script_alphabet(Script *s) {
    static const char chain[] = "abcdefghijklmnopqrstuvwxyz \xC3\xA9\xFF\"\\\n\xE2\x82\xAC.";
    int ids[TINY_VOCAB], n = 0;
    bool used[TINY_VOCAB] = {false};
    for (const char *c = chain; *c; c++) ids[n++] = (uint8_t)*c;
    ids[n++] = EOS;
    for (int c = 'A'; c <= 'Z'; c++) ids[n++] = c;
    ids[n++] = EOT;
    for (int c = '0'; c <= '9'; c++) ids[n++] = c;
    for (int i = 0; i < n; i++) {
        used[ids[i]] = true;
        s->next[ids[i]] = ids[(i + 1) % n];
    }
    int first = -1, last = -1;
    for (int t = 0; t < TINY_VOCAB; t++) {
        if (used[t] || t == BOS) continue;
        if (last >= 0) s->next[last] = t;
        if (first < 0) first = t;
        last = t;
    }
    s->next[last] = first;
    s->next['9'] = BOS;
    s->next[BOS] = 'a';
}

// The logits after token t, as the model computes them.
__attribute__((unused)) static void script_logits(const Script *s, int t, float *logits) {
    const float *e = s->embeddings + t * SCRIPT_DIM;
    float scale = 1 / sqrtf(1 + 1e-5f); // the mean square of signs is 1
    for (int u = 0; u < TINY_VOCAB; u++) {
        double sum = 0;
        for (int i = 0; i < SCRIPT_DIM; i++) sum += (double)(e[i] * scale) * (double)s->output[u * SCRIPT_DIM + i];
        logits[u] = (float)sum;
    }
}

// The log-probability of token u after token t.
__attribute__((unused)) static double script_logprob(const Script *s, int t, int u) {
    float logits[TINY_VOCAB];
    double sum = 0;
    script_logits(s, t, logits);
    for (int i = 0; i < TINY_VOCAB; i++) sum += exp((double)logits[i]);
    return (double)logits[u] - log(sum);
}

// ---- quantised weights ----------------------------------------------------------------------------------------------

// The F32 matrix of that name, or one that is quantised already from its first weights on, in that type: F8_E4M3, I8 or
// U8 (int4), with ":32" behind it in groups. Codes come from the largest magnitude, scales of dtype BF16, F16 or F32
// are cut off. Its float32 values become what codes and scales stand for, in *decoded (malloc'd) where it is not NULL.
__attribute__((unused)) static void draft_quantise_to(Draft *d, const char *name, const char *type, const char *scales,
                                                      float **decoded) {
    int at = (int)(draft_part(d, name) - d->parts), group = 0;
    char codes_dtype[12] = "", scale_name[64];
    sscanf(type, "%11[^:]:%d", codes_dtype, &group);
    snprintf(scale_name, sizeof scale_name, "%s.scale", name);
    bool int4 = strcmp(codes_dtype, "U8") == 0, int8 = strcmp(codes_dtype, "I8") == 0;
    Part old = d->parts[at];
    bool again = draft_find(d, scale_name) != NULL; // of what it was only the shape is taken
    int rows = (int)old.shape[0], cols = (int)old.shape[1] * (again && strcmp(old.dtype, "U8") == 0 ? 2 : 1);
    int width = group ? group : cols, groups = (cols + width - 1) / width;
    float *values = must(malloc((size_t)rows * (size_t)cols * sizeof *values)),
          *scale = must(calloc((size_t)(rows * groups), sizeof *scale));
    for (int i = 0; i < rows * cols; i++) values[i] = again ? writer_random() : ((float *)old.data)[i];
    uint8_t *codes = must(calloc((size_t)rows, (size_t)cols));
    for (int r = 0; r < rows; r++)
        for (int g = 0; g < groups; g++) {
            float *x = values + r * cols + g * width, largest = 0;
            int n = cols - g * width < width ? cols - g * width : width;
            for (int i = 0; i < n; i++) largest = fmaxf(largest, fabsf(x[i]));
            float s = largest / (int4 ? 7 : int8 ? 127 : 448);
            uint32_t bits;
            memcpy(&bits, &s, sizeof bits);
            if (strcmp(scales, "F32") != 0) bits &= strcmp(scales, "F16") == 0 ? 0xFFFFE000 : 0xFFFF0000;
            memcpy(&s, &bits, sizeof s);
            scale[r * groups + g] = s;
            for (int i = 0; i < n; i++) {
                int column = g * width + i;
                float q = fminf(fmaxf(nearbyintf(x[i] / s), int4 ? -8 : -127), int4 ? 7 : 127);
                uint8_t code = (uint8_t)(int4 ? (int)q + 8 : (int)q);
                if (!int4 && !int8) { // cut off, to what the exponent leaves
                    int e;
                    float f = frexpf(fminf(fabsf(x[i] / s), 448), &e);
                    bool tiny = e < -5;
                    code = (uint8_t)(tiny ? (int)ldexpf(f, e + 9) : ((e + 6) << 3) + (int)(f * 16) - 8);
                    q = tiny ? ldexpf((float)code, -9) : ldexpf((float)(8 + (code & 7)), (code >> 3) - 10);
                    if (x[i] < 0) code |= 128, q = -q;
                }
                if (int4)
                    codes[(r * cols + column) / 2] |= (uint8_t)(code << column % 2 * 4);
                else
                    codes[r * cols + column] = code;
                x[i] = q * s;
            }
        }
    bool f32 = strcmp(scales, "F32") == 0;
    void *stored = as_dtype(scale, (size_t)(rows * groups), scales);
    free(old.data);
    memmove(d->parts + at, d->parts + at + 1, (size_t)(--d->n_parts - at) * sizeof *d->parts);
    if (again) draft_remove(d, scale_name);
    Part *p = draft_insert(d, at, name, "U8", 2, (uint64_t)rows, (uint64_t)(int4 ? cols / 2 : cols), codes);
    snprintf(p->dtype, sizeof p->dtype, "%s", codes_dtype);
    p = draft_insert(d, at + 1, scale_name, f32 ? "F32" : scales, group ? 2 : 1, (uint64_t)rows, (uint64_t)groups,
                     stored);
    draft_meta(d, "format", "llama-model/2");
    if (group) meta_number(d, "group", group);
    if (decoded)
        *decoded = values;
    else
        free(values);
}

__attribute__((unused)) static void draft_quantise(Draft *d, const char *name, const char *type, const char *scales) {
    draft_quantise_to(d, name, type, scales, NULL);
}

// ---- dumps ----------------------------------------------------------------------------------------------------------

__attribute__((unused)) static char *dump_tensor_name(const char *name, int prompt) {
    static char full[64];
    snprintf(full, sizeof full, "%s.%d", name, prompt);
    return full;
}

// A true hf-greedy-dump/1 of the script: one prompt "ab" with BOS, then N greedy tokens, two rows of logits in full.
__attribute__((unused)) static void draft_dump(Draft *d, const Script *s, int N) {
    *d = (Draft){.n_meta = 0};
    draft_meta(d, "format", "hf-greedy-dump/1");
    draft_meta(d, "dtype", "float32");
    draft_meta(d, "transformers", "none");
    draft_meta(d, "prompts", "[\\\"ab\\\"]");
    int32_t *prompt = must(malloc(3 * sizeof *prompt)), *tokens = must(malloc((size_t)N * sizeof *tokens));
    int32_t *top_ids = must(malloc((size_t)N * 5 * sizeof *top_ids));
    float *top = must(malloc((size_t)N * 5 * sizeof *top)), *full = must(malloc(2 * TINY_VOCAB * sizeof *full));
    prompt[0] = BOS, prompt[1] = 'a', prompt[2] = 'b';
    for (int step = 0, t = 'b'; step < N; step++) {
        float logits[TINY_VOCAB];
        script_logits(s, t, logits);
        if (step < 2) memcpy(full + step * TINY_VOCAB, logits, sizeof logits);
        for (int k = 0; k < 5; k++) {
            int best = 0;
            for (int u = 1; u < TINY_VOCAB; u++)
                if (logits[u] > logits[best]) best = u;
            top_ids[step * 5 + k] = best;
            top[step * 5 + k] = logits[best];
            logits[best] = -INFINITY;
        }
        tokens[step] = t = top_ids[step * 5];
    }
    draft_append(d, "logits.0", "F32", 2, 2, TINY_VOCAB, full);
    draft_append(d, "top_logits.0", "F32", 2, (uint64_t)N, 5, top);
    draft_append(d, "prompt_ids.0", "I32", 1, 3, 0, prompt);
    draft_append(d, "tokens.0", "I32", 1, (uint64_t)N, 0, tokens);
    draft_append(d, "top_ids.0", "I32", 2, (uint64_t)N, 5, top_ids);
}

#endif
