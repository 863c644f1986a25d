#include "checkpoint.h"

#include <errno.h>
#include <inttypes.h>
#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../quant.h"

#define DATA_ALIGNMENT 4096
#define WEIGHT_ALIGNMENT 16
#define MAX_TEXT (1 << 16) // bytes of chat_system, and of chat_date

// ---- metadata -------------------------------------------------------------------------------------------------------

static const char *meta(Model *m, const char *key, Error *err) {
    const char *value = safetensors_meta(&m->file, key);
    if (!value) fail(err, "%s: metadata has no %s", m->file.path, key);
    return value;
}

// Refuses what came with llama-model/2 in a file that says it is older: then one of the two is a mistake.
static bool check_format(const Model *m, int format, const char *what, Error *err) {
    return format >= 2 || fail(err, "%s: %s in a llama-model/1 file, expected llama-model/2", m->file.path, what);
}

// One whole decimal number at *text; moves past it.
static bool parse_int(const char **text, int *value) {
    if (**text < '0' || **text > '9') return false;
    char *end;
    errno = 0;
    long v = strtol(*text, &end, 10);
    if (errno || v > INT_MAX) return false;
    *text = end;
    *value = (int)v;
    return true;
}

static bool meta_int(Model *m, const char *key, int least, int most, int *value, Error *err) {
    const char *text = meta(m, key, err);
    if (!text) return false;
    const char *at = text;
    if (!parse_int(&at, value) || *at || *value < least || *value > most)
        return fail(err, "%s: %s is \"%s\", expected a whole number from %d to %d", m->file.path, key, text, least,
                    most);
    return true;
}

static bool meta_float(Model *m, const char *key, bool zero_allowed, float *value, Error *err) {
    const char *text = meta(m, key, err);
    if (!text) return false;
    char *end;
    double v = strtod(text, &end);
    *value = (float)v;
    bool number = (*text == '.' || (*text >= '0' && *text <= '9')) && *end == 0 && isfinite(*value);
    if (!number || (*value <= 0 && !(zero_allowed && v == 0)))
        return fail(err, "%s: %s is \"%s\", expected a %s number", m->file.path, key, text,
                    zero_allowed ? "non-negative" : "positive");
    return true;
}

// The index of the value in a NULL-terminated list of words.
static bool meta_word(Model *m, const char *key, const char *const *words, int *index, Error *err) {
    const char *text = meta(m, key, err);
    if (!text) return false;
    char expected[128] = "";
    for (*index = 0; words[*index]; (*index)++) {
        if (strcmp(text, words[*index]) == 0) return true;
        snprintf(expected + strlen(expected), sizeof expected - strlen(expected), "%s%s", *index ? ", " : "",
                 words[*index]);
    }
    return fail(err, "%s: %s is \"%s\", expected one of: %s", m->file.path, key, text, expected);
}

// An id, or nothing: -1.
static bool meta_id(Model *m, const char *key, int *id, Error *err) {
    const char *text = meta(m, key, err);
    *id = -1;
    return text && (!*text || meta_int(m, key, 0, m->config.vocab_size - 1, id, err));
}

// A text of the chat template; NULL if there is none.
static bool optional_text(Model *m, int format, const char *key, const char **text, Error *err) {
    *text = safetensors_meta(&m->file, key);
    if (!*text) return true;
    size_t n = strlen(*text);
    return check_format(m, format, key, err) &&
           (n <= MAX_TEXT || fail(err, "%s: %s has %zu bytes, expected at most %d", m->file.path, key, n, MAX_TEXT));
}

// chat_format and its parameters.
static bool read_chat_config(Model *m, int format, Error *err) {
    Config *c = &m->config;
    int chat_format;
    if (!meta_word(m, "chat_format", chat_format_names, &chat_format, err)) return false;
    c->chat_format = (ChatFormat)chat_format;
    char what[64];
    snprintf(what, sizeof what, "chat_format \"%s\"", chat_format_names[chat_format]);
    if (c->chat_format > CHAT_LLAMA3_1 && !check_format(m, format, what, err)) return false;
    c->chat_checked = safetensors_meta(&m->file, "converter") != NULL;
    if (!optional_text(m, format, "chat_system", &c->chat_system, err) ||
        !optional_text(m, format, "chat_date", &c->chat_date, err))
        return false;
    c->chat_bos_id = c->bos_id;
    return !safetensors_meta(&m->file, "chat_bos_id") ||
           (check_format(m, format, "chat_bos_id", err) && meta_id(m, "chat_bos_id", &c->chat_bos_id, err));
}

// vocab_size, the ids that begin and end a text, and the chat format: all that a vocabulary needs.
static bool read_vocab_config(Model *m, int format, Error *err) {
    Config *c = &m->config;
    if (!meta_int(m, "vocab_size", 1, 1 << 24, &c->vocab_size, err)) return false;
    if (!meta_id(m, "bos_id", &c->bos_id, err)) return false;

    const char *text = meta(m, "eos_ids", err), *at = text;
    while (text && *at) {
        int id;
        if (c->n_eos == MAX_EOS || !parse_int(&at, &id) || id >= c->vocab_size || (*at && (*at != ',' || !at[1])))
            return fail(err, "%s: eos_ids is \"%s\", expected at most %d ids below %d, with commas between",
                        m->file.path, text, MAX_EOS, c->vocab_size);
        c->eos_ids[c->n_eos++] = id;
        if (*at) at++;
    }
    return text && read_chat_config(m, format, err);
}

static bool read_rope_config(Model *m, int format, Error *err) {
    Config *c = &m->config;
    static const char *const types[] = {"default", "llama3", "linear", NULL};
    int type;
    if (!meta_float(m, "rope_theta", false, &c->rope_theta, err) || !meta_word(m, "rope_type", types, &type, err))
        return false;
    c->rope_type = (RopeType)type;
    if (c->rope_type == ROPE_LINEAR && !check_format(m, format, "rope_type \"linear\"", err)) return false;
    if (c->rope_type != ROPE_DEFAULT && !meta_float(m, "rope_factor", false, &c->rope_factor, err)) return false;
    if (c->rope_type != ROPE_LLAMA3) return true;
    if (!meta_float(m, "rope_low_freq_factor", false, &c->rope_low_freq_factor, err) ||
        !meta_float(m, "rope_high_freq_factor", false, &c->rope_high_freq_factor, err) ||
        !meta_float(m, "rope_original_max_seq_len", false, &c->rope_original_max_seq_len, err))
        return false;
    return c->rope_high_freq_factor > c->rope_low_freq_factor ||
           fail(err, "%s: rope_high_freq_factor %g is not above rope_low_freq_factor %g", m->file.path,
                (double)c->rope_high_freq_factor, (double)c->rope_low_freq_factor);
}

static bool read_shape_config(Model *m, int format, Error *err) {
    Config *c = &m->config;
    const struct {
        const char *key;
        int *value;
    } sizes[] = {{"dim", &c->dim},         {"hidden_dim", &c->hidden_dim}, {"n_layers", &c->n_layers},
                 {"n_heads", &c->n_heads}, {"n_kv_heads", &c->n_kv_heads}, {"head_dim", &c->head_dim}};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        if (!meta_int(m, sizes[i].key, 1, 1 << 20, sizes[i].value, err)) return false;
    if (!meta_int(m, "max_seq_len", 1, 1 << 30, &c->max_seq_len, err)) return false;
    if (c->n_heads % c->n_kv_heads != 0)
        return fail(err, "%s: n_heads %d is not a multiple of n_kv_heads %d", m->file.path, c->n_heads, c->n_kv_heads);
    if (c->head_dim % 2 != 0 || c->head_dim > MAX_HEAD_DIM)
        return fail(err, "%s: head_dim is %d, expected an even number up to %d", m->file.path, c->head_dim,
                    MAX_HEAD_DIM);
    if ((int64_t)c->n_heads * c->head_dim > 1 << 24)
        return fail(err, "%s: n_heads %d × head_dim %d is more than %d", m->file.path, c->n_heads, c->head_dim,
                    1 << 24);
    config_derive(c);

    static const char *const booleans[] = {"false", "true", NULL};
    int tied;
    if (!meta_float(m, "norm_eps", true, &c->norm_eps, err) || !read_rope_config(m, format, err) ||
        !meta_word(m, "tie_embeddings", booleans, &tied, err))
        return false;
    c->tie_embeddings = tied;
    return true;
}

// ---- tensors --------------------------------------------------------------------------------------------------------

typedef struct {
    Model *model;
    int format;
    bool *used;         // [n_tensors], by position in the file
    int group;          // columns that share a scale, where scales are of groups; 0: the metadata have none
    bool numbers;       // a matrix of the layers that is not quantised was found: weights.dtype is its dtype
    char *base;         // where the weights are, when they are
    const Tensor *left; // one that is not: it stays in the file. NULL: all are
    float *norms;       // [dim], to look at one
} Binding;

static const Tensor *find_tensor(Model *m, const char *name, Error *err) {
    const Tensor *t = safetensors_find(&m->file, name);
    if (!t) fail(err, "%s: no tensor %s", m->file.path, name);
    return t;
}

static bool check_shape(Model *m, const Tensor *t, int n_dims, uint64_t rows, uint64_t cols, Error *err) {
    if (t->n_dims == n_dims && t->shape[0] == rows && (n_dims == 1 || t->shape[1] == cols)) return true;
    char found[96] = "[";
    for (int i = 0; i < t->n_dims; i++)
        snprintf(found + strlen(found), sizeof found - strlen(found), "%s%" PRIu64, i ? ", " : "", t->shape[i]);
    return n_dims == 1
               ? fail(err, "%s: tensor %s: shape %s], expected [%" PRIu64 "]", m->file.path, t->name, found, rows)
               : fail(err, "%s: tensor %s: shape %s], expected [%" PRIu64 ", %" PRIu64 "]", m->file.path, t->name,
                      found, rows, cols);
}

static bool check_dtype(Model *m, const Tensor *t, DType expected, Error *err) {
    return t->dtype == expected || fail(err, "%s: tensor %s: dtype %s, expected %s", m->file.path, t->name,
                                        dtype_names[t->dtype], dtype_names[expected]);
}

// A NaN weight shows in the logits of the first token; one in a norm is cheap to find before that, and can be named.
static bool check_norm(Binding *b, const Tensor *t, Error *err) {
    Model *m = b->model;
    if (!safetensors_read(&m->file, b->norms, t->begin, t->end - t->begin, err)) return false;
    for (int i = 0; i < m->config.dim; i++)
        if (!isfinite(b->norms[i]))
            return fail(err, "%s: tensor %s: element %d is %f, expected a finite number", m->file.path, t->name, i,
                        (double)b->norms[i]);
    return true;
}

// Codes of weights rather than numbers.
static bool is_code(DType dtype) {
    return dtype == DTYPE_F8_E4M3 || dtype == DTYPE_I8 || dtype == DTYPE_U8;
}

static const Tensor *find_scale(Model *m, const char *matrix, Error *err) {
    char name[80];
    snprintf(name, sizeof name, "%s.scale", matrix);
    return find_tensor(m, name, err);
}

static bool check_alignment(Binding *b, const Tensor *t, Error *err) {
    Model *m = b->model;
    if (t->begin % WEIGHT_ALIGNMENT != 0)
        return fail(err, "%s: tensor %s begins at byte %" PRIu64 " of the data, expected a multiple of %d",
                    m->file.path, t->name, t->begin, WEIGHT_ALIGNMENT);
    b->used[t - m->file.tensors] = true;
    if (t->end > m->weights.bytes) m->weights.bytes = t->end;
    return true;
}

// The scales of a quantised matrix: [rows], or [rows][groups] with `group` in the metadata.
static bool check_scale(Binding *b, Matrix *x, const char *name, Error *err) {
    Model *m = b->model;
    const Tensor *t = find_scale(m, name, err);
    if (!t) return false;
    if (t->dtype > DTYPE_F32)
        return fail(err, "%s: tensor %s: dtype %s, expected BF16, F16 or F32", m->file.path, t->name,
                    dtype_names[t->dtype]);
    bool by_row = t->n_dims == 1 || x->dtype == DTYPE_F8_E4M3;
    if (!by_row && !b->group)
        return fail(err, "%s: tensor %s: a scale for each group of columns, but the metadata has no group",
                    m->file.path, t->name);
    x->group = by_row ? WHOLE_ROW : b->group;
    x->scale_dtype = t->dtype;
    return check_shape(m, t, by_row ? 1 : 2, (uint64_t)x->rows, (uint64_t)quant_groups(x->group, x->cols), err) &&
           check_alignment(b, t, err);
}

static bool check_quantised(Binding *b, const Weight *w, const Tensor *t, Error *err) {
    Model *m = b->model;
    Matrix *x = w->matrix;
    if (!check_format(m, b->format, "a quantised matrix", err)) return false;
    if (t->dtype == DTYPE_U8 && x->cols % 2)
        return fail(err, "%s: tensor %s: int4 of %d columns, expected an even number", m->file.path, t->name, x->cols);
    x->dtype = t->dtype;
    return check_shape(m, t, 2, (uint64_t)x->rows, matrix_row_bytes(x), err) && check_scale(b, x, w->name, err);
}

// The matrices of the layers that are not quantised are of one dtype. Embeddings and output may each have another,
// which llama-model/1 had not.
static bool check_weight_dtype(Binding *b, const Weight *w, const Tensor *t, Error *err) {
    Model *m = b->model;
    const DType layers = m->weights.dtype;
    bool embeddings = w->matrix == &m->weights.tok_embeddings, output = w->matrix == &m->weights.output;
    if (embeddings)
        m->weights.embeddings_dtype = t->dtype;
    else if (output)
        m->weights.output_dtype = t->dtype;
    else if (b->numbers)
        return check_dtype(m, t, layers, err);
    if (t->dtype > DTYPE_F32)
        return fail(err, "%s: tensor %s: dtype %s, expected BF16, F16 or F32", m->file.path, t->name,
                    dtype_names[t->dtype]);
    if (!embeddings && !output) {
        b->numbers = true;
        m->weights.dtype = t->dtype;
        return true;
    }
    char what[96];
    snprintf(what, sizeof what, "tensor %s: dtype %s beside layers of %s", w->name, dtype_names[t->dtype],
             dtype_names[layers]);
    return t->dtype == layers || check_format(m, b->format, what, err);
}

// WeightVisitor: one norm or matrix against the header.
static bool check_tensor(void *context, const Weight *w, Error *err) {
    Binding *b = context;
    Model *m = b->model;
    const Tensor *t = find_tensor(m, w->name, err);
    if (!t) return false;
    if (w->matrix && is_code(t->dtype) && w->matrix != &m->weights.tok_embeddings) {
        if (!check_quantised(b, w, t, err)) return false;
        if (w->matrix == &m->weights.output) m->weights.output_dtype = t->dtype;
    } else if (w->matrix) {
        if (!check_shape(m, t, 2, (uint64_t)w->matrix->rows, (uint64_t)w->matrix->cols, err) ||
            !check_weight_dtype(b, w, t, err))
            return false;
        w->matrix->dtype = t->dtype;
    } else if (!check_shape(m, t, 1, (uint64_t)w->n, 0, err) || !check_dtype(m, t, DTYPE_F32, err)) {
        return false;
    }
    return check_alignment(b, t, err) && (w->matrix || check_norm(b, t, err));
}

// Matrices that an engine multiplies by together.
static bool check_alike(const Model *m, int layer, const char *names, const Matrix *const *matrices, int n,
                        Error *err) {
    for (int i = 1; i < n; i++) {
        const Matrix *a = matrices[0], *b = matrices[i];
        char first[QUANT_NAME], other[QUANT_NAME];
        if (a->dtype == b->dtype && a->group == b->group && a->scale_dtype == b->scale_dtype) continue;
        return fail(err, "%s: %s of layer %d are of %s (scales %s) and %s (scales %s), expected all alike",
                    m->file.path, names, layer, quant_name(a, first),
                    matrix_is_quantised(a) ? dtype_names[a->scale_dtype] : "none", quant_name(b, other),
                    matrix_is_quantised(b) ? dtype_names[b->scale_dtype] : "none");
    }
    return true;
}

static bool check_layers_alike(const Model *m, Error *err) {
    for (int i = 0; i < m->config.n_layers; i++) {
        const LayerWeights *l = &m->weights.layers[i];
        if (!check_alike(m, i, "wq, wk and wv", (const Matrix *const[]){&l->wq, &l->wk, &l->wv}, 3, err) ||
            !check_alike(m, i, "w1 and w3", (const Matrix *const[]){&l->w1, &l->w3}, 2, err))
            return false;
    }
    return true;
}

// `group`, where the file has it.
static bool read_group(Binding *b, Error *err) {
    Model *m = b->model;
    if (!safetensors_meta(&m->file, "group")) return true;
    if (!check_format(m, b->format, "group", err) || !meta_int(m, "group", 1, 1 << 20, &b->group, err)) return false;
    return quant_is_group(b->group) || fail(err, "%s: group is \"%d\", expected 32, 64 or 128", m->file.path, b->group);
}

static bool is_tokenizer_tensor(const char *name) {
    return strcmp(name, "tokenizer.offsets") == 0 || strcmp(name, "tokenizer.kind") == 0 ||
           strcmp(name, "tokenizer.bytes") == 0;
}

static bool check_weights(Model *m, int format, Error *err) {
    const Tensor *first = find_tensor(m, "layers.0.wq", err);
    if (!first) return false;
    m->weights.dtype = first->dtype;
    if (first->dtype > DTYPE_F32 && !is_code(first->dtype))
        return fail(err, "%s: weights of dtype %s, expected BF16, F16 or F32, or F8_E4M3, I8 or U8 with scales",
                    m->file.path, dtype_names[first->dtype]);
    if (is_code(first->dtype) && !check_format(m, format, "a quantised matrix", err)) return false;
    Binding b = {.model = m,
                 .format = format,
                 .numbers = !is_code(first->dtype),
                 .used = calloc(m->file.n_tensors, 1),
                 .norms = malloc((size_t)m->config.dim * sizeof(float))};
    bool ok = b.used && b.norms;
    if (!ok) fail(err, "out of memory: checking %s", m->file.path);
    ok = ok && read_group(&b, err) && weights_visit(m, check_tensor, &b, err) && check_layers_alike(m, err);
    for (size_t i = 0; ok && i < m->file.n_tensors; i++) {
        const char *name = m->file.tensors[i].name;
        if (!b.used[i] && !is_tokenizer_tensor(name))
            ok = fail(err, "%s: tensor %s is none of this model's", m->file.path, name);
    }
    if (m->config.tie_embeddings) m->weights.output_dtype = m->weights.embeddings_dtype;
    free(b.used);
    free(b.norms);
    return ok;
}

// ---- tokenizer ------------------------------------------------------------------------------------------------------

// normalized_ids: the tokens of the second pass.
static bool read_second_pass(Model *m, int format, Error *err) {
    const char *text = safetensors_meta(&m->file, "normalized_ids");
    if (!text) return true;
    if (!check_format(m, format, "normalized_ids", err)) return false;
    int *ids = malloc((strlen(text) / 2 + 1) * sizeof *ids), n = 0;
    if (!ids) return fail(err, "out of memory: normalized_ids");
    const char *at = text;
    bool ok = parse_int(&at, &ids[n++]);
    while (ok && *at) ok = *at++ == ',' && parse_int(&at, &ids[n++]);
    if (!ok)
        fail(err, "%s: normalized_ids at byte %zu of %zu: expected ids with commas between", m->file.path,
             (size_t)(at - text), strlen(text));
    Error own = {""};
    if (ok && !tokenizer_second_pass(&m->tokenizer, ids, n, &own))
        ok = fail(err, "%s: normalized_ids: %s", m->file.path, own.text);
    free(ids);
    return ok;
}

// tokenizer.offsets, .kind and .bytes, the last three tensors.
static bool read_tokenizer(Model *m, int format, Error *err) {
    uint64_t vocab = (uint64_t)m->config.vocab_size;
    const Tensor *offsets = find_tensor(m, "tokenizer.offsets", err);
    const Tensor *kind = offsets ? find_tensor(m, "tokenizer.kind", err) : NULL;
    const Tensor *bytes = kind ? find_tensor(m, "tokenizer.bytes", err) : NULL;
    if (!bytes) return false;
    if (!check_dtype(m, offsets, DTYPE_U32, err) || !check_shape(m, offsets, 1, vocab + 1, 0, err) ||
        !check_dtype(m, kind, DTYPE_U8, err) || !check_shape(m, kind, 1, vocab, 0, err) ||
        !check_dtype(m, bytes, DTYPE_U8, err))
        return false;
    if (bytes->n_dims != 1 || bytes->shape[0] >= UINT32_MAX)
        return fail(err, "%s: tensor tokenizer.bytes: expected one dimension below 2^32", m->file.path);
    size_t n = m->file.n_tensors;
    if (offsets != &m->file.tensors[n - 3] || kind != &m->file.tensors[n - 2] || bytes != &m->file.tensors[n - 1])
        return fail(err, "%s: expected tokenizer.offsets, tokenizer.kind and tokenizer.bytes as the last three tensors",
                    m->file.path);
    uint32_t *offsets_data = malloc(offsets->end - offsets->begin);
    uint8_t *kind_data = malloc(vocab), *bytes_data = malloc(bytes->end - bytes->begin + 1);
    bool ok = offsets_data && kind_data && bytes_data;
    if (!ok) fail(err, "out of memory: %" PRIu64 " bytes for the tokenizer", bytes->end - offsets->begin);
    ok = ok && safetensors_read(&m->file, offsets_data, offsets->begin, offsets->end - offsets->begin, err) &&
         safetensors_read(&m->file, kind_data, kind->begin, kind->end - kind->begin, err) &&
         safetensors_read(&m->file, bytes_data, bytes->begin, bytes->end - bytes->begin, err);
    if (!ok) {
        free(offsets_data);
        free(kind_data);
        free(bytes_data);
        return false;
    }
    Error own = {""};
    if (!tokenizer_init(&m->tokenizer, (int)vocab, offsets_data, kind_data, bytes_data, (uint32_t)bytes->shape[0],
                        &own))
        return fail(err, "%s: %s", m->file.path, own.text);
    const uint8_t *added = memchr(m->tokenizer.kind, TOKEN_ADDED, vocab);
    return (!added || check_format(m, format, "a token of kind 3", err)) && read_second_pass(m, format, err);
}

// ---- the file -------------------------------------------------------------------------------------------------------

// The number after "llama-model/".
static bool read_format(Model *m, int *format, Error *err) {
    enum { NEWEST = 2 };
    const char *path = m->file.path, *text = safetensors_meta(&m->file, "format");
    if (!text || strncmp(text, "llama-model/", 12) != 0)
        return fail(err,
                    "%s: a safetensors file, but not a model.bin; convert the HuggingFace directory with: "
                    "python3 scripts/convert.py DIR model.bin",
                    path);
    const char *at = text + 12;
    if (*at == '0' || !parse_int(&at, format) || *at)
        return fail(err, "%s: format is \"%s\", expected \"llama-model/1\" or \"llama-model/2\"", path, text);
    return *format <= NEWEST ||
           fail(err,
                "%s: the file is newer than this program: its format is %s, this program reads up to llama-model/%d",
                path, text, NEWEST);
}

static bool open_file(Model *m, const char *path, bool vocab_only, Error *err) {
    const char *hint = "convert the HuggingFace directory with: python3 scripts/convert.py DIR model.bin";
    if (!safetensors_open(&m->file, path, hint, err)) return false;
    int format = 0;
    if (!read_format(m, &format, err)) return false;
    if (m->file.data_start % DATA_ALIGNMENT != 0)
        return fail(err, "%s: tensor data starts at byte %" PRIu64 ", expected a multiple of %d", path,
                    m->file.data_start, DATA_ALIGNMENT);
    const char *n_layers = meta(m, "n_layers", err);
    if (!n_layers || !read_vocab_config(m, format, err)) return false;
    bool has_weights = strcmp(n_layers, "0") != 0;
    if (!has_weights && !vocab_only)
        return fail(err, "%s: a vocabulary without weights (n_layers 0); it serves --tokenize and --detokenize", path);
    if (!has_weights && m->file.n_tensors != 3)
        return fail(err, "%s: %zu tensors in a vocabulary without weights, expected 3", path, m->file.n_tensors);
    if (has_weights && !read_shape_config(m, format, err)) return false;
    if (has_weights && (size_t)m->config.n_layers > m->file.n_tensors) // before memory is asked for them
        return fail(err, "%s: n_layers is %d, the file has %zu tensors in all", path, m->config.n_layers,
                    m->file.n_tensors);
    if (has_weights && !check_weights(m, format, err)) return false;
    return read_tokenizer(m, format, err);
}

bool checkpoint_open(Model *m, const char *path, bool vocab_only, Error *err) {
    *m = (Model){.file.fd = -1};
    if (open_file(m, path, vocab_only, err)) return true;
    model_close(m);
    return false;
}

// Where the data's byte `at` is, of a tensor that is in memory.
static char *place(const Binding *b, uint64_t at) {
    return b->base + at - (b->left && at >= b->left->end ? b->left->end - b->left->begin : 0);
}

// WeightVisitor
static bool bind_tensor(void *context, const Weight *w, Error *err) {
    Binding *b = context;
    const Tensor *t = find_tensor(b->model, w->name, err);
    if (!t) return false;
    if (!w->matrix) {
        *w->norm = (const float *)place(b, t->begin);
        return true;
    }
    w->matrix->data = t == b->left ? NULL : place(b, t->begin);
    w->matrix->dtype = t->dtype;
    if (!matrix_is_quantised(w->matrix)) return true;
    const Tensor *scale = find_scale(b->model, w->name, err);
    if (scale) w->matrix->scale = place(b, scale->begin);
    return scale != NULL;
}

bool fail_scale_not_finite(const Model *m, const char *matrix, int64_t at, float scale, Error *err) {
    return fail(err, "%s: tensor %s.scale: element %" PRId64 " is %f, expected a finite number", m->file.path, matrix,
                at, (double)scale);
}

bool fail_code_is_nan(const Model *m, const char *matrix, int cols, int64_t at, Error *err) {
    return fail(err, "%s: tensor %s: the code of row %" PRId64 ", column %" PRId64 " is NaN", m->file.path, matrix,
                at / cols, at % cols);
}

// WeightVisitor: what is refused of a quantised matrix that has been read.
static bool check_codes(void *context, const Weight *w, Error *err) {
    const Model *m = context;
    const Matrix *x = w->matrix;
    if (!x || !matrix_is_quantised(x)) return true;
    int64_t at = quant_find_bad_scale(x);
    if (at >= 0) return fail_scale_not_finite(m, w->name, at, quant_number(x->scale, x->scale_dtype, (size_t)at), err);
    at = quant_find_nan(x);
    return at < 0 || fail_code_is_nan(m, w->name, x->cols, at, err);
}

// Reads bytes [at, end) of the data to their place; done of total are read before.
static bool read_range(const Binding *b, uint64_t at, uint64_t end, uint64_t done, uint64_t total, Error *err) {
    enum { READ_BYTES = 1 << 26 }; // bytes between two reports of progress
    const Model *m = b->model;
    for (uint64_t n; at < end; at += n) {
        if (model_interrupted(m)) return fail_interrupted(err);
        n = end - at < READ_BYTES ? end - at : READ_BYTES;
        if (!safetensors_read(&m->file, place(b, at), at, n, err)) return false;
        done += n;
        if (m->progress) m->progress("loading", done, total);
    }
    return true;
}

bool checkpoint_load(Model *m, char *base, const Tensor *left, Error *err) {
    Binding b = {.model = m, .base = base, .left = left};
    const uint64_t total = m->weights.bytes, begin = left ? left->begin : total, end = left ? left->end : total;
    return weights_visit(m, bind_tensor, &b, err) && read_range(&b, 0, begin, 0, total, err) &&
           read_range(&b, end, total + (end - begin), begin, total, err) && weights_visit(m, check_codes, m, err);
}
