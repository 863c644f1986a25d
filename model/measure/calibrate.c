#include "calibrate.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { PADDING = 8 };

static struct ImportanceOf *find(const Importance *all, const Matrix *matrix) {
    for (int i = 0; i < all->n; i++)
        if (all->of[i].matrix == matrix) return &all->of[i];
    return NULL;
}

// Model.watch_inputs
static void add_squares(void *context, const Matrix *matrix, const float *x, int n) {
    struct ImportanceOf *to = find(context, matrix);
    for (int r = 0; to && r < n; r++, to->n++)
        for (int i = 0; i < matrix->cols; i++, x++) to->sums[i] += (double)*x * (double)*x;
}

// WeightVisitor
static bool add_matrix(void *context, const Weight *w, Error *err) {
    Importance *all = context;
    if (!w->matrix || !strcmp(w->name, "tok_embeddings")) return true; // a table, not a factor
    struct ImportanceOf *of = &all->of[all->n++];
    *of = (struct ImportanceOf){.matrix = w->matrix,
                                .columns = calloc((size_t)w->matrix->cols + PADDING, sizeof(float)),
                                .sums = calloc((size_t)w->matrix->cols, sizeof(double))};
    return (of->columns && of->sums) || fail(err, "out of memory: the activations of %s", w->name);
}

static bool run_windows(Model *m, const TokenList *ids, Error *err) {
    void (*progress)(const char *, uint64_t, uint64_t) = m->progress;
    m->progress = NULL; // of the whole text, rather than of its windows
    bool ok = true;
    for (size_t at = 0, n; ok && at < ids->n; at += n) {
        n = ids->n - at < (size_t)m->kv.max_len ? ids->n - at : (size_t)m->kv.max_len;
        int rows = (int)n < model_logit_rows(m) ? (int)n : model_logit_rows(m);
        kv_reset(&m->kv, 0);
        ok = model_prefill(m, 0, ids->ids + at, (int)n, rows, err);
        if (ok && progress) progress("calibrating", at + n, ids->n);
    }
    m->progress = progress;
    return ok;
}

static void divide(struct ImportanceOf *of) {
    double all = 0;
    for (int i = 0; i < of->matrix->cols; i++) all += of->sums[i];
    for (int i = 0; all > 0 && i < of->matrix->cols; i++)
        of->columns[i] = (float)(of->sums[i] / all * of->matrix->cols);
    free(of->sums);
    of->sums = NULL;
}

bool calibrate(Model *m, const TokenList *ids, Importance *all, Error *err) {
    const int most = 7 * m->config.n_layers + 1;
    *all = (Importance){.of = calloc((size_t)most, sizeof *all->of)};
    if (!all->of) return fail(err, "out of memory: the activations of %d matrices", most);
    const Weight tied = {.name = "output", .matrix = &m->weights.output};
    if (!weights_visit(m, add_matrix, all, err) || (m->config.tie_embeddings && !add_matrix(all, &tied, err)))
        return false;
    m->watch_inputs = add_squares;
    m->watch_context = all;
    bool ok = run_windows(m, ids, err);
    m->watch_inputs = NULL;
    for (int i = 0; ok && i < all->n; i++) {
        double sum = 0;
        for (int c = 0; c < all->of[i].matrix->cols; c++) sum += all->of[i].sums[c];
        ok = isfinite(sum) || fail(err, "calibration: the activations are not finite");
        if (ok) divide(&all->of[i]);
    }
    return ok;
}

const float *importance_of(const Importance *all, const Matrix *matrix) {
    const struct ImportanceOf *of = all ? find(all, matrix) : NULL;
    return of && of->n ? of->columns : NULL;
}

void importance_free(Importance *all) {
    for (int i = 0; i < all->n; i++) {
        free(all->of[i].columns);
        free(all->of[i].sums);
    }
    free(all->of);
    *all = (Importance){.n = 0};
}
