#include "perplexity.h"

#include <math.h>

#include "../generate/generate.h"
#include "../generate/sampler.h"
#include "../logits.h"

typedef struct {
    Model *model;
    const TokenList *ids;
    Perplexity *result;
    void (*progress)(const char *what, uint64_t done, uint64_t total); // as Model.progress
} Scoring;

// Scores tokens [first, end) of the text from those from `begin` on, so many rows at a time as there are logits for.
// The logits of a token predict the next one.
static bool score_window(Scoring *s, size_t begin, size_t first, size_t end, Error *err) {
    Model *m = s->model;
    Perplexity *p = s->result;
    const int *ids = s->ids->ids;
    kv_reset(&m->kv, 0);
    if (first - 1 > begin && !model_prefill(m, 0, ids + begin, (int)(first - 1 - begin), 0, err)) return false;
    for (size_t at = first; at < end;) {
        int rows = end - at < LOGIT_ROWS ? (int)(end - at) : LOGIT_ROWS;
        if (!model_prefill(m, 0, ids + at - 1, rows, rows, err) || !m->engine->read_logits(m, err)) return false;
        for (int r = 0; r < rows; r++, at++) {
            const float *logits = m->logits + (size_t)r * (size_t)m->config.vocab_size;
            double nll = log_sum_exp(logits, m->config.vocab_size) - (double)logits[ids[at]];
            if (!isfinite(nll)) return fail(err, "position %zu: the logits are not finite", at - 1);
            size_t n_bytes;
            tokenizer_bytes(&m->tokenizer, ids[at], &n_bytes);
            p->sum += nll;
            p->squares += nll * nll;
            p->n_bytes += n_bytes;
            p->n++;
        }
        if (s->progress) s->progress("scoring", p->n, p->n_all);
    }
    return true;
}

static bool score_sliding(Scoring *s, Error *err) {
    Perplexity *p = s->result;
    size_t n = s->ids->n, window = (size_t)p->window;
    p->n_all = n - 1;
    for (size_t begin = 0, done = 1; done < n; begin += (size_t)p->stride) {
        size_t end = begin + window < n ? begin + window : n;
        if (!score_window(s, begin, done, end, err)) return false;
        done = end;
    }
    return true;
}

static bool score_halves(Scoring *s, Error *err) {
    Perplexity *p = s->result;
    size_t window = (size_t)p->window, n_windows = s->ids->n / window;
    int *ids = s->ids->ids, bos = s->model->config.bos_id;
    p->n_all = n_windows * (window - window / 2 - 1);
    for (size_t begin = 0; begin < n_windows * window; begin += window) {
        if (ids[0] == bos) ids[begin] = bos; // not a token that is scored
        if (!score_window(s, begin, begin + window / 2 + 1, begin + window, err)) return false;
    }
    return true;
}

bool perplexity_run(Model *m, TokenList *ids, PerplexityWindows windows, int stride, Perplexity *p, Error *err) {
    *p = (Perplexity){.windows = windows, .window = m->kv.max_len, .stride = stride};
    Scoring s = {.model = m, .ids = ids, .result = p, .progress = m->progress};
    double start = clock_seconds();
    m->progress = NULL; // of the whole text, rather than of its windows
    bool ok = windows == WINDOWS_HALF ? score_halves(&s, err) : score_sliding(&s, err);
    m->progress = s.progress;
    p->seconds = clock_seconds() - start;
    return ok;
}

// A member of a JSON object; null where it is no number: too large, or of nothing.
static void print_figure(FILE *out, const char *key, double value) {
    if (isfinite(value))
        fprintf(out, "\"%s\": %.9g, ", key, value);
    else
        fprintf(out, "\"%s\": null, ", key);
}

static void print_json(const Perplexity *p, FILE *out, double mean, double error, double bits) {
    fputc('{', out);
    print_figure(out, "perplexity", exp(mean));
    print_figure(out, "standard_error", error);
    print_figure(out, "nll", mean);
    fprintf(out, "\"tokens\": %zu, \"tokens_in_all\": %zu, \"bytes\": %zu, ", p->n, p->n_all, p->n_bytes);
    print_figure(out, "bits_per_byte", bits);
    fprintf(out,
            "\"windows\": \"%s\", \"context\": %d, \"stride\": %d, \"finish_reason\": \"%s\", \"timings\": "
            "{\"scoring_ms\": %.3f, \"tokens_per_second\": %.1f}}\n",
            p->windows == WINDOWS_HALF ? "half" : "sliding", p->window, p->stride,
            p->n < p->n_all ? "interrupted" : "end", p->seconds * 1e3, (double)p->n / p->seconds);
}

void perplexity_print(const Perplexity *p, bool json, FILE *out) {
    double n = (double)p->n, mean = p->sum / n, variance = p->squares / n - mean * mean;
    double error = exp(mean) * sqrt((variance > 0 ? variance : 0) / n);
    double bits = p->n_bytes ? p->sum / log(2) / (double)p->n_bytes : NAN; // tokens without bytes come from --ids
    if (json) {
        print_json(p, out, mean, error, bits);
        return;
    }
    fprintf(out, "perplexity %.4f ± %.4f over %zu ", exp(mean), error, p->n);
    if (p->n < p->n_all) fprintf(out, "of %zu ", p->n_all);
    fprintf(out, "tokens");
    if (p->n_bytes) fprintf(out, ", %.4f bits per byte", bits);
    if (p->windows == WINDOWS_HALF)
        fprintf(out, "; second halves of windows of %d", p->window);
    else
        fprintf(out, "; window %d, stride %d", p->window, p->stride);
    fprintf(out, ", %.0f tokens/s\n", n / p->seconds);
}
