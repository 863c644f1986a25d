#include "compare.h"

#include <inttypes.h>
#include <limits.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "../../tokenizer/encode.h"
#include "../file/json.h"
#include "../generate/sampler.h"
#include "../logits.h"

// ---- the dump -------------------------------------------------------------------------------------------------------

// Finds NAME.i, checks dtype and dimensions (rows or cols UINT64_MAX: any), at most so many that DUMP_TOP a row can be
// counted, and reads it.
static void *read_tensor(Dump *d, const char *name, int i, DType dtype, int n_dims, uint64_t rows, uint64_t cols,
                         int *found_rows, Error *err) {
    char full[64];
    snprintf(full, sizeof full, "%s.%d", name, i);
    const Tensor *t = safetensors_find(&d->file, full);
    if (!t) return fail(err, "%s: no tensor %s", d->file.path, full), NULL;
    if (t->dtype != dtype || t->n_dims != n_dims || (n_dims == 2 && t->shape[1] != cols) ||
        t->shape[0] > INT_MAX / DUMP_TOP || (rows != UINT64_MAX && t->shape[0] != rows))
        return fail(err,
                    "%s: tensor %s: %s with %d dimensions, [%" PRIu64 ", %" PRIu64 "], expected %s [%" PRId64
                    ", %" PRIu64 "]",
                    d->file.path, full, dtype_names[t->dtype], t->n_dims, t->shape[0], t->shape[1], dtype_names[dtype],
                    (int64_t)rows, cols),
               NULL;
    *found_rows = (int)t->shape[0];
    void *data = malloc(t->end - t->begin + 1);
    if (!data) return fail(err, "out of memory: %" PRIu64 " bytes of %s", t->end - t->begin, full), NULL;
    if (safetensors_read(&d->file, data, t->begin, t->end - t->begin, err)) return data;
    free(data);
    return NULL;
}

static bool check_ids(const Dump *d, const char *name, int i, const int32_t *ids, int n, Error *err) {
    for (int j = 0; j < n; j++)
        if (ids[j] < 0 || ids[j] >= d->vocab_size)
            return fail(err, "%s: %s.%d: id %d, expected below the model's vocabulary of %d", d->file.path, name, i,
                        ids[j], d->vocab_size);
    return true;
}

static bool check_finite(const Dump *d, const char *name, int i, const float *x, size_t n, Error *err) {
    for (size_t j = 0; j < n; j++)
        if (!isfinite(x[j])) return fail(err, "%s: %s.%d has a number that is not finite", d->file.path, name, i);
    return true;
}

// margin() relies on it: an order the other way round would pass as a near tie.
static bool check_descending(const Dump *d, int i, const float *top, int n, Error *err) {
    for (int j = 0; j < n * DUMP_TOP; j++)
        if (j % DUMP_TOP && top[j] > top[j - 1])
            return fail(err, "%s: top_logits.%d, step %d: %g after %g, expected the largest first", d->file.path, i,
                        j / DUMP_TOP, (double)top[j], (double)top[j - 1]);
    return true;
}

static bool read_prompt(Dump *d, int i, Error *err) {
    DumpPrompt *p = &d->prompts[i];
    int n;
    return (p->prompt_ids = read_tensor(d, "prompt_ids", i, DTYPE_I32, 1, UINT64_MAX, 0, &p->n_prompt, err)) &&
           (p->tokens = read_tensor(d, "tokens", i, DTYPE_I32, 1, UINT64_MAX, 0, &p->n_tokens, err)) &&
           (p->top_ids = read_tensor(d, "top_ids", i, DTYPE_I32, 2, (uint64_t)p->n_tokens, DUMP_TOP, &n, err)) &&
           (p->top_logits = read_tensor(d, "top_logits", i, DTYPE_F32, 2, (uint64_t)p->n_tokens, DUMP_TOP, &n, err)) &&
           (p->logits =
                read_tensor(d, "logits", i, DTYPE_F32, 2, UINT64_MAX, (uint64_t)d->vocab_size, &p->n_rows, err)) &&
           ((p->n_prompt > 0 && p->n_tokens > 0 && p->n_rows <= p->n_tokens) ||
            fail(err, "%s: prompt %d: %d ids, %d tokens, %d rows of logits", d->file.path, i, p->n_prompt, p->n_tokens,
                 p->n_rows)) &&
           check_ids(d, "prompt_ids", i, p->prompt_ids, p->n_prompt, err) &&
           check_ids(d, "tokens", i, p->tokens, p->n_tokens, err) &&
           check_ids(d, "top_ids", i, p->top_ids, p->n_tokens * DUMP_TOP, err) &&
           check_finite(d, "top_logits", i, p->top_logits, (size_t)p->n_tokens * DUMP_TOP, err) &&
           check_descending(d, i, p->top_logits, p->n_tokens, err) &&
           check_finite(d, "logits", i, p->logits, (size_t)p->n_rows * (size_t)d->vocab_size, err);
}

// `prompts`: a JSON list with a text or null for each prompt.
static bool read_texts(Dump *d, const char *list, Error *err) {
    size_t length;
    d->texts = malloc(strlen(list) + 1);
    if (!d->texts) return fail(err, "out of memory: the prompts of %s", d->file.path);
    memcpy(d->texts, list, strlen(list) + 1);
    Json j = {d->texts, d->texts, d->texts + strlen(list), err, d->file.path};
    int n = 0;
    if (!json_expect(&j, '[')) return false;
    do {
        char *text = NULL;
        if (!json_null(&j) && !json_string(&j, &text, &length)) return false;
        if (n < d->n_prompts && text) d->prompts[n].text = text, d->prompts[n].text_length = length;
        n++;
    } while (json_next(&j, ','));
    if (!json_expect(&j, ']') || !json_end(&j)) return false;
    return n == d->n_prompts ||
           fail(err, "%s: %d prompts in the metadata, %d in the tensors", d->file.path, n, d->n_prompts);
}

static bool open_checked(Dump *d, Error *err) {
    const char *path = d->file.path;
    const char *format = safetensors_meta(&d->file, "format"), *dtype = safetensors_meta(&d->file, "dtype");
    const char *prompts = safetensors_meta(&d->file, "prompts"), *noise = safetensors_meta(&d->file, "noise");
    if (!format || strcmp(format, "hf-greedy-dump/1") != 0)
        return fail(err, "%s: format is \"%s\", expected \"hf-greedy-dump/1\"; scripts/dump_hf.py makes one", path,
                    format ? format : "");
    if (!dtype || !prompts) return fail(err, "%s: metadata has no %s", path, dtype ? "prompts" : "dtype");
    d->float32 = strcmp(dtype, "float32") == 0 || strcmp(dtype, "torch.float32") == 0;
    char *end;
    d->noise = noise ? strtod(noise, &end) : 0;
    if (noise && (end == noise || *end || !(d->noise >= 0) || isinf(d->noise)))
        return fail(err, "%s: noise is \"%s\", expected a number", path, noise);
    d->n_prompts = (int)(d->file.n_tensors / 5);
    if (d->file.n_tensors == 0 || d->file.n_tensors % 5 != 0)
        return fail(err, "%s: %zu tensors, expected five for each prompt", path, d->file.n_tensors);
    d->prompts = calloc((size_t)d->n_prompts, sizeof *d->prompts);
    if (!d->prompts) return fail(err, "out of memory: %d prompts", d->n_prompts);
    for (int i = 0; i < d->n_prompts; i++)
        if (!read_prompt(d, i, err)) return false;
    return read_texts(d, prompts, err);
}

bool dump_open(Dump *d, const char *path, int vocab_size, Error *err) {
    *d = (Dump){.vocab_size = vocab_size, .file.fd = -1};
    const char *hint = "dumps come from: python3 scripts/dump_hf.py";
    if (!safetensors_open(&d->file, path, hint, err)) return false;
    if (open_checked(d, err)) return true;
    dump_close(d);
    return false;
}

void dump_close(Dump *d) {
    for (int i = 0; d->prompts && i < d->n_prompts; i++) {
        free(d->prompts[i].prompt_ids);
        free(d->prompts[i].tokens);
        free(d->prompts[i].top_ids);
        free(d->prompts[i].top_logits);
        free(d->prompts[i].logits);
    }
    free(d->prompts);
    free(d->texts);
    safetensors_close(&d->file);
    *d = (Dump){.file.fd = -1};
}

int dump_context(const Dump *d) {
    int longest = 0;
    for (int i = 0; i < d->n_prompts; i++) {
        int64_t n = (int64_t)d->prompts[i].n_prompt + d->prompts[i].n_tokens;
        if (n > longest) longest = n > INT_MAX ? INT_MAX : (int)n;
    }
    return longest;
}

// ---- the comparison -------------------------------------------------------------------------------------------------

typedef struct {
    int64_t tokens;
    int64_t forced, forced_ties;  // teacher-forced: equal, and near ties that differ
    int64_t free, free_ties;      // free-running: the same
    int64_t rows;                 // compared in full
    int bad_ids;                  // prompts that encode to other ids
    double delta_full, delta_top; // the largest |Δlogit|
    double kl;                    // summed over the rows
} Totals;

typedef struct {
    Model *model;
    const Dump *dump;
    FILE *out;
    Totals sum;
} Comparison;

static double margin(const DumpPrompt *p, int step) {
    return (double)p->top_logits[step * DUMP_TOP] - (double)p->top_logits[step * DUMP_TOP + 1];
}

// Prints a step that differs with its margin; true if it is a near tie.
static bool report_difference(Comparison *c, int i, int step, const char *kind, int id) {
    const DumpPrompt *p = &c->dump->prompts[i];
    bool near_tie = margin(p, step) < 4 * c->dump->noise;
    fprintf(c->out, "  prompt %d, step %d: %s %d, the dump has %d; its margin is %.3g%s\n", i, step, kind, id,
            p->tokens[step], margin(p, step), near_tie ? ", a near tie" : "");
    return near_tie;
}

// KL(p‖q) of two rows of logits, in nats.
static double kl_divergence(const float *p, const float *q, int n) {
    double zp = log_sum_exp(p, n), zq = log_sum_exp(q, n), kl = 0;
    for (int i = 0; i < n; i++) {
        double log_p = (double)p[i] - zp, log_q = (double)q[i] - zq;
        kl += exp(log_p) * (log_p - log_q);
    }
    return kl;
}

static bool compare_ids(Comparison *c, int i, Error *err) {
    const DumpPrompt *p = &c->dump->prompts[i];
    Model *m = c->model;
    if (!p->text) return true;
    TokenList ids = {0};
    bool ok = m->config.bos_id < 0 || tokens_append(&ids, m->config.bos_id, err);
    ok = ok && tokenizer_encode(&m->tokenizer, (const uint8_t *)p->text, p->text_length, true, &ids, err);
    if (ok) {
        int n = 0;
        while (n < (int)ids.n && n < p->n_prompt && ids.ids[n] == p->prompt_ids[n]) n++;
        if (n < p->n_prompt || ids.n != (size_t)p->n_prompt) {
            c->sum.bad_ids++;
            fprintf(c->out, "  prompt %d: encodes to %zu ids, the dump has %d; they part at %d\n", i, ids.n,
                    p->n_prompt, n);
        }
    }
    tokens_free(&ids);
    return ok;
}

static bool not_finite(int i, int position, Error *err) {
    return fail(err, "prompt %d, position %d: a logit is not finite", i, position);
}

// The model's logits for one step against the dump's.
static bool compare_step(Comparison *c, int i, int step, const float *logits, Error *err) {
    const DumpPrompt *p = &c->dump->prompts[i];
    int vocab = c->dump->vocab_size;
    if (find_not_finite(logits, vocab) >= 0) return not_finite(i, p->n_prompt + step - 1, err);
    for (int t = 0; t < DUMP_TOP; t++) {
        double delta =
            fabs((double)logits[p->top_ids[step * DUMP_TOP + t]] - (double)p->top_logits[step * DUMP_TOP + t]);
        if (delta > c->sum.delta_top) c->sum.delta_top = delta;
    }
    if (step < p->n_rows) {
        const float *row = p->logits + (size_t)step * (size_t)vocab;
        for (int v = 0; v < vocab; v++) {
            double delta = fabs((double)logits[v] - (double)row[v]);
            if (delta > c->sum.delta_full) c->sum.delta_full = delta;
        }
        c->sum.kl += kl_divergence(row, logits, vocab);
        c->sum.rows++;
    }
    return true;
}

// Feeds the dump's own tokens, many at a time. *first: the choice after the prompt.
static bool teacher_forced(Comparison *c, int i, int *equal, int *near_ties, int *first, Error *err) {
    const DumpPrompt *p = &c->dump->prompts[i];
    Model *m = c->model;
    kv_reset(&m->kv, 0);
    if (!model_prefill(m, 0, p->prompt_ids, p->n_prompt, 1, err) || !m->engine->read_logits(m, err)) return false;
    for (int step = 0, rows = 1; step < p->n_tokens; step += rows) {
        if (step > 0) {
            rows = p->n_tokens - step < LOGIT_ROWS ? p->n_tokens - step : LOGIT_ROWS;
            if (!model_prefill(m, 0, p->tokens + step - 1, rows, rows, err) || !m->engine->read_logits(m, err))
                return false;
        }
        for (int r = 0; r < rows; r++) {
            if (!compare_step(c, i, step + r, m->logits + (size_t)r * (size_t)c->dump->vocab_size, err)) return false;
            int id = m->argmax[r];
            if (step + r == 0) *first = id;
            if (id == p->tokens[step + r])
                ++*equal;
            else
                *near_ties += report_difference(c, i, step + r, "teacher-forced", id);
        }
    }
    return true;
}

// Greedy from the prompt, whose keys and values are still in the cache. Up to the first token that differs: what
// follows another token is another text. A near tie is listed and the run goes on from the dump's token.
static bool free_running(Comparison *c, int i, int first, int *equal, int *near_ties, Error *err) {
    const DumpPrompt *p = &c->dump->prompts[i];
    Model *m = c->model;
    kv_truncate(&m->kv, 0, p->n_prompt);
    for (int step = 0, id = first; step < p->n_tokens; step++) {
        if (model_interrupted(m)) return fail_interrupted(err);
        if (step > 0) {
            if (!model_decode(m, 0, p->tokens[step - 1], err))
                return false; // equal to our own, or we would not be here
            if ((id = m->argmax[0]) < 0) return not_finite(i, p->n_prompt + step - 1, err);
        }
        if (id == p->tokens[step]) {
            ++*equal;
            continue;
        }
        if (!report_difference(c, i, step, "free-running", id)) break;
        ++*near_ties;
    }
    return true;
}

static bool compare_prompt(Comparison *c, int i, Error *err) {
    const DumpPrompt *p = &c->dump->prompts[i];
    int forced = 0, forced_ties = 0, first = 0, free = 0, free_ties = 0, bad_ids = c->sum.bad_ids;
    if (!compare_ids(c, i, err) || !teacher_forced(c, i, &forced, &forced_ties, &first, err) ||
        !free_running(c, i, first, &free, &free_ties, err))
        return false;
    fprintf(c->out, "prompt %d: %d ids %s; of %d tokens, teacher-forced %d equal, free-running %d equal\n", i,
            p->n_prompt,
            !p->text                   ? "given"
            : c->sum.bad_ids > bad_ids ? "DIFFER"
                                       : "equal",
            p->n_tokens, forced, free);
    fflush(c->out);
    c->sum.tokens += p->n_tokens;
    c->sum.forced += forced;
    c->sum.forced_ties += forced_ties;
    c->sum.free += free;
    c->sum.free_ties += free_ties;
    return true;
}

bool compare_run(Model *m, const Dump *d, FILE *out, bool *passed, Error *err) {
    Comparison c = {.model = m, .dump = d, .out = out};
    for (int i = 0; i < d->n_prompts; i++) {
        if (model_interrupted(m)) return fail_interrupted(err);
        if (!compare_prompt(&c, i, err)) return false;
    }
    const Totals *t = &c.sum;
    double percent = 100.0 / (double)t->tokens;
    fprintf(out,
            "of %" PRId64 " tokens: teacher-forced %" PRId64 " equal (%.2f %%), free-running %" PRId64
            " equal (%.2f %%)\n",
            t->tokens, t->forced, (double)t->forced * percent, t->free, (double)t->free * percent);
    fprintf(out,
            "largest |Δlogit| %.3g over %" PRId64
            " full rows, %.3g over the top %d of every step; mean KL divergence %.3g\n",
            t->delta_full, t->rows, t->delta_top, DUMP_TOP, t->rows ? t->kl / (double)t->rows : 0.0);
    // Only near ties may differ, and few: one in 1000.
    int64_t ties = t->forced_ties > t->free_ties ? t->forced_ties : t->free_ties;
    bool equal = t->bad_ids == 0 && t->forced + t->forced_ties == t->tokens && t->free + t->free_ties == t->tokens &&
                 ties * 1000 <= t->tokens;
    bool verdict = d->float32 && m->precision == PRECISION_F32;
    *passed = equal || !verdict;
    fprintf(out, "%s\n",
            !verdict ? "no verdict: it takes a float32 dump and --precision f32"
            : equal  ? "the comparison holds"
                     : "THE COMPARISON DOES NOT HOLD");
    return true;
}
