// The tensors of a model: how large they are, and the one list of them.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "quant.h"

uint64_t matrix_row_bytes(const Matrix *m) {
    return (uint64_t)m->cols * (uint64_t)dtype_bytes[m->dtype] / (m->dtype == DTYPE_U8 ? 2 : 1);
}

uint64_t matrix_bytes(const Matrix *m) {
    uint64_t groups = matrix_is_quantised(m) ? (uint64_t)quant_groups(m->group, m->cols) : 0;
    return (uint64_t)m->rows * (matrix_row_bytes(m) + groups * (uint64_t)dtype_bytes[m->scale_dtype]);
}

uint64_t weight_bytes(const Weight *w) {
    return w->matrix ? matrix_bytes(w->matrix) : (uint64_t)w->n * sizeof **w->norm;
}

// The matrices of a layer.
enum { LAYER_MATRICES = 7 };
static const Matrix *layer_matrix(const LayerWeights *l, int i) {
    const Matrix *const matrices[LAYER_MATRICES] = {&l->wq, &l->wk, &l->wv, &l->wo, &l->w1, &l->w2, &l->w3};
    return matrices[i];
}

static const char *const layer_matrix_names[LAYER_MATRICES] = {"wq", "wk", "wv", "wo", "w1", "w2", "w3"};

// Bytes of a matrix with so many rows, of which an engine may hold a part.
static uint64_t bytes_of_rows(const Matrix *m, int rows) {
    Matrix whole = *m;
    whole.rows = rows;
    return matrix_bytes(&whole);
}

uint64_t weights_read(const Model *m, int batch) {
    const Config *c = &m->config;
    const Weights *w = &m->weights;
    const int rows[LAYER_MATRICES] = {c->q_dim,      c->kv_dim, c->kv_dim,    c->dim,
                                      c->hidden_dim, c->dim,    c->hidden_dim}; // as layer_matrix has them
    uint64_t bytes = bytes_of_rows(&w->output, c->vocab_size);
    if (!c->tie_embeddings) bytes += (uint64_t)batch * matrix_row_bytes(&w->tok_embeddings);
    for (int i = 0; i < c->n_layers; i++) {
        for (int k = 0; k < LAYER_MATRICES; k++) bytes += bytes_of_rows(layer_matrix(&w->layers[i], k), rows[k]);
    }
    return bytes;
}

bool weights_are_quantised(const Model *m) {
    bool found = matrix_is_quantised(&m->weights.output);
    for (int i = 0; i < m->config.n_layers && !found; i++)
        for (int k = 0; k < LAYER_MATRICES; k++)
            found = found || matrix_is_quantised(layer_matrix(&m->weights.layers[i], k));
    return found;
}

const Matrix *weights_numbers(const Model *m) {
    for (int i = 0; i < m->config.n_layers; i++)
        for (int k = 0; k < LAYER_MATRICES; k++)
            if (!matrix_is_quantised(layer_matrix(&m->weights.layers[i], k)))
                return layer_matrix(&m->weights.layers[i], k);
    return NULL;
}

const Matrix *weights_not_fp8(const Model *m, char name[MATRIX_NAME]) {
    for (int i = 0; i < m->config.n_layers; i++)
        for (int k = 0; k < LAYER_MATRICES; k++) {
            const Matrix *matrix = layer_matrix(&m->weights.layers[i], k);
            if (matrix->dtype == DTYPE_F8_E4M3) continue;
            snprintf(name, MATRIX_NAME, "layers.%d.%s", i, layer_matrix_names[k]);
            return matrix;
        }
    return NULL;
}

// Of the layers' matrices, as the file has them.
static int layers_dtypes(const Model *m, char text[WEIGHTS_DTYPES]) {
    const Weights *w = &m->weights;
    char first[QUANT_NAME], name[QUANT_NAME];
    bool alike = true;
    if (!weights_are_quantised(m)) return snprintf(text, WEIGHTS_DTYPES, "%s", dtype_names[w->dtype]);
    quant_name(&w->layers[0].wq, first);
    for (int i = 0; i < m->config.n_layers; i++)
        for (int k = 0; k < LAYER_MATRICES; k++)
            alike = alike && strcmp(quant_name(layer_matrix(&w->layers[i], k), name), first) == 0;
    return snprintf(text, WEIGHTS_DTYPES, "%s%s", first, alike ? "" : " and others");
}

const char *weights_dtypes(const Model *m, char text[WEIGHTS_DTYPES]) {
    const Weights *w = &m->weights;
    int n = layers_dtypes(m, text);
    char output[QUANT_NAME];
    if (w->embeddings_dtype != w->dtype || !weights_numbers(m)) // no matrix of the layers says it
        n += snprintf(text + n, (size_t)(WEIGHTS_DTYPES - n), ", embeddings %s", dtype_names[w->embeddings_dtype]);
    if (matrix_is_quantised(&w->output))
        snprintf(text + n, (size_t)(WEIGHTS_DTYPES - n), ", output %s", quant_name(&w->output, output));
    else if (w->output_dtype != w->dtype)
        snprintf(text + n, (size_t)(WEIGHTS_DTYPES - n), ", output %s", dtype_names[w->output_dtype]);
    return text;
}

typedef struct {
    WeightVisitor *visit;
    void *context;
} Visit;

static bool visit_matrix(const Visit *v, const char *name, Matrix *matrix, int rows, int cols, Error *err) {
    matrix->rows = rows;
    matrix->cols = cols;
    return v->visit(v->context, &(Weight){.name = name, .matrix = matrix}, err);
}

static bool visit_norm(const Visit *v, const char *name, const float **norm, int n, Error *err) {
    return v->visit(v->context, &(Weight){.name = name, .norm = norm, .n = n}, err);
}

static bool visit_layer(const Visit *v, const Config *c, int i, LayerWeights *l, Error *err) {
    const struct {
        const char *name;
        const float **norm;
        Matrix *matrix;
        int rows, cols;
    } tensors[] = {
        {"attention_norm", &l->attention_norm, NULL, 0, c->dim},
        {"wq", NULL, &l->wq, c->q_dim, c->dim},
        {"wk", NULL, &l->wk, c->kv_dim, c->dim},
        {"wv", NULL, &l->wv, c->kv_dim, c->dim},
        {"wo", NULL, &l->wo, c->dim, c->q_dim},
        {"ffn_norm", &l->ffn_norm, NULL, 0, c->dim},
        {"w1", NULL, &l->w1, c->hidden_dim, c->dim},
        {"w2", NULL, &l->w2, c->dim, c->hidden_dim},
        {"w3", NULL, &l->w3, c->hidden_dim, c->dim},
    };
    for (size_t t = 0; t < sizeof tensors / sizeof *tensors; t++) {
        char name[64];
        snprintf(name, sizeof name, "layers.%d.%s", i, tensors[t].name);
        if (!(tensors[t].matrix ? visit_matrix(v, name, tensors[t].matrix, tensors[t].rows, tensors[t].cols, err)
                                : visit_norm(v, name, tensors[t].norm, tensors[t].cols, err)))
            return false;
    }
    return true;
}

bool weights_visit(Model *m, WeightVisitor *visit, void *context, Error *err) {
    const Config *c = &m->config;
    Weights *w = &m->weights;
    const Visit v = {visit, context};
    if (!w->layers) w->layers = calloc((size_t)c->n_layers, sizeof *w->layers);
    if (!w->layers) return fail(err, "out of memory: %d layers", c->n_layers);

    if (!visit_matrix(&v, "tok_embeddings", &w->tok_embeddings, c->vocab_size, c->dim, err)) return false;
    for (int i = 0; i < c->n_layers; i++)
        if (!visit_layer(&v, c, i, &w->layers[i], err)) return false;
    if (!visit_norm(&v, "norm", &w->norm, c->dim, err)) return false;
    if (!c->tie_embeddings) return visit_matrix(&v, "output", &w->output, c->vocab_size, c->dim, err);
    w->output = w->tok_embeddings;
    return true;
}
