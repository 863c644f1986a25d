#include "calibrate.h"

#include <stdlib.h>
#include <string.h>

enum { LAYER_INPUTS = 4, FEW_BYTES = 1 << 30 }; // of the matrices of a layer; XᵀX that is little

static int inputs_count(const Model *m) {
    return LAYER_INPUTS * m->config.n_layers + 1;
}

bool calibration_init(Calibration *c, Model *m, const TokenList *ids, Error *err) {
    *c = (Calibration){m, ids, calloc((size_t)inputs_count(m), sizeof *c->inputs)};
    if (!c->inputs) return fail(err, "out of memory: the inputs of %d layers", m->config.n_layers);
    CalibrationInput *to = c->inputs;
    for (int i = 0; i < m->config.n_layers; i++) {
        const LayerWeights *l = &m->weights.layers[i];
        const Matrix *const first[LAYER_INPUTS] = {&l->wq, &l->wo, &l->w1, &l->w2};
        for (int k = 0; k < LAYER_INPUTS; k++, to++)
            *to = (CalibrationInput){.first = first[k], .cols = first[k]->cols};
    }
    *to = (CalibrationInput){.first = &m->weights.output, .cols = m->weights.output.cols};
    return true;
}

static void drop(CalibrationInput *input) {
    free(input->h);
    free(input->feedback.importance);
    input->h = NULL;
    input->feedback = (Feedback){0};
}

void calibration_free(Calibration *c) {
    for (int i = 0; c->inputs && i < inputs_count(c->model); i++) drop(&c->inputs[i]);
    free(c->inputs);
    c->inputs = NULL;
}

// Model.watch_inputs
static void add_rows(void *context, const Matrix *matrix, const float *x, int n) {
    Calibration *c = context;
    for (int i = 0; i < inputs_count(c->model); i++)
        if (c->inputs[i].first == matrix && c->inputs[i].h) gram_add(c->inputs[i].h, c->inputs[i].cols, x, n);
}

static bool run_windows(Calibration *c, Error *err) {
    Model *m = c->model;
    const TokenList *ids = c->ids;
    void (*progress)(const char *, uint64_t, uint64_t) = m->progress;
    m->progress = NULL; // of the whole text, rather than of its windows
    m->watch_inputs = add_rows;
    m->watch_context = c;
    bool ok = true;
    for (size_t at = 0, n; ok && at < ids->n; at += n) {
        n = ids->n - at < (size_t)m->kv.max_len ? ids->n - at : (size_t)m->kv.max_len;
        int rows = (int)n < model_logit_rows(m) ? (int)n : model_logit_rows(m);
        kv_reset(&m->kv, 0);
        ok = model_prefill(m, 0, ids->ids + at, (int)n, rows, err);
        if (ok && progress) progress("calibrating", at + n, ids->n);
    }
    m->watch_inputs = NULL;
    m->progress = progress;
    return ok;
}

static uint64_t gram_bytes(const CalibrationInput *input) {
    return (uint64_t)input->cols * (uint64_t)input->cols * sizeof(float);
}

// XᵀX of the layer that has this input, or of the output matrix, and of what comes after, where there is room.
static bool collect(Calibration *c, int input, Error *err) {
    const int n = inputs_count(c->model);
    const uint64_t half = c->model->weights.bytes / 2, most = half > FEW_BYTES ? half : FEW_BYTES;
    uint64_t bytes = 0;
    for (int i = 0; i < n; i++) drop(&c->inputs[i]);
    for (int i = input / LAYER_INPUTS * LAYER_INPUTS, end; i < n; i = end) {
        end = i + LAYER_INPUTS < n ? i + LAYER_INPUTS : n;
        uint64_t more = 0;
        for (int k = i; k < end; k++) more += gram_bytes(&c->inputs[k]);
        if (bytes > 0 && bytes + more > most) break;
        bytes += more;
        for (int k = i; k < end; k++)
            if (!(c->inputs[k].h = calloc(gram_bytes(&c->inputs[k]), 1)))
                return fail(err, "out of memory: %.3f GB for the inputs of a layer's matrices", (double)more * 1e-9);
    }
    return run_windows(c, err);
}

// Which input is that matrix's.
static int find_input(const Calibration *c, const Matrix *matrix) {
    const Model *m = c->model;
    for (int i = 0; i < m->config.n_layers; i++) {
        const LayerWeights *l = &m->weights.layers[i];
        if (matrix == &l->wq || matrix == &l->wk || matrix == &l->wv) return LAYER_INPUTS * i;
        if (matrix == &l->wo) return LAYER_INPUTS * i + 1;
        if (matrix == &l->w1 || matrix == &l->w3) return LAYER_INPUTS * i + 2;
        if (matrix == &l->w2) return LAYER_INPUTS * i + 3;
    }
    return inputs_count(m) - 1;
}

const Feedback *calibration_of(Calibration *c, const Matrix *matrix, Error *err) {
    const int i = find_input(c, matrix);
    CalibrationInput *input = &c->inputs[i];
    if (!input->h && !collect(c, i, err)) return NULL;
    if (!input->feedback.importance &&
        !feedback_init(&input->feedback, input->h, input->cols, c->model->interrupted, err))
        return NULL;
    return &input->feedback;
}
