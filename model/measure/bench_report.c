#include "bench_report.h"

// What prompts of this precision can reach at most, and what it was measured with.
static const Statistic *product_peak(const Model *m, const Roofline *r, const char **how) {
    const bool bf16 = m->precision != PRECISION_F32 && r->product_bf16.n;
    if (how) *how = bf16 ? r->product_bf16_how : r->product_how;
    return bf16 ? &r->product_bf16 : &r->product;
}

static double share(const BenchRow *row, const Statistic *peak, const Roofline *r) {
    return row->work / row->seconds.median / (peak->median * r->gpus);
}

// The loads that count: all but the first, which may have come from the disk, if there are others.
static Statistic later_loads(const BenchResult *b) {
    double loads[BENCH_MAX_LOADS];
    int later = b->n_loads > 1;
    if (b->n_loads == 0) return (Statistic){0};
    for (int i = later; i < b->n_loads; i++) loads[i - later] = b->loads[i];
    return statistic_of(loads, b->n_loads - later);
}

// ---- JSON -----------------------------------------------------------------------------------------------------------

static void json_text(FILE *out, const char *key, const char *text) {
    fprintf(out, "\"%s\": \"", key);
    for (; *text; text++) fprintf(out, *text == '"' || *text == '\\' ? "\\%c" : "%c", *text);
    fprintf(out, "\"");
}

static void json_statistic(FILE *out, const char *key, Statistic s, double unit) {
    fprintf(out, "\"%s\": {\"median\": %.6g, \"min\": %.6g, \"max\": %.6g, \"samples\": %d}", key, s.median / unit,
            s.least / unit, s.most / unit, s.n);
}

static void json_shape(const Model *m, const BenchOptions *o, FILE *out) {
    const Config *c = &m->config;
    char dtypes[WEIGHTS_DTYPES];
    fprintf(out, "\"model\": {");
    if (o->synthetic)
        json_text(out, "synthetic", o->synthetic);
    else
        fprintf(out, "\"synthetic\": null");
    fprintf(out,
            ", \"dim\": %d, \"hidden_dim\": %d, \"n_layers\": %d, \"n_heads\": %d, \"n_kv_heads\": %d, \"head_dim\": "
            "%d, \"vocab_size\": %d, \"dtype\": \"%s\", \"weights_bytes\": %llu, \"step_bytes\": %llu},\n",
            c->dim, c->hidden_dim, c->n_layers, c->n_heads, c->n_kv_heads, c->head_dim, c->vocab_size,
            weights_dtypes(m, dtypes), (unsigned long long)m->weights.bytes, (unsigned long long)weights_read(m, 1));
}

static void json_prompt(const Model *m, const BenchResult *b, FILE *out, const BenchRow *row) {
    fprintf(out, "  {\"tokens\": %d, ", row->length);
    if (row->seconds.n == 0) {
        json_text(out, "not_run", row->why.text);
    } else {
        json_statistic(out, "ms", row->seconds, 1e-3);
        fprintf(out, ", \"tokens_s\": %.6g, \"tflop_s\": %.6g, \"share\": %.4f", row->length / row->seconds.median,
                row->work / row->seconds.median * 1e-12, share(row, product_peak(m, &b->roofline, NULL), &b->roofline));
    }
    fprintf(out, "}");
}

static void json_fresh(FILE *out, const BenchRow *fresh, const BenchRow *warm) {
    fprintf(out, "  {\"tokens\": %d, ", fresh->length);
    if (fresh->seconds.n == 0) {
        json_text(out, "not_run", fresh->why.text);
    } else {
        json_statistic(out, "ms", fresh->seconds, 1e-3);
        fprintf(out, ", ");
        json_statistic(out, "warm_ms", warm->seconds, 1e-3);
    }
    fprintf(out, "}");
}

static void json_step(const BenchResult *b, FILE *out, const BenchRow *row) {
    fprintf(out, "  {\"context\": %d, \"batch\": %d, ", row->length, row->batch);
    if (row->seconds.n == 0) {
        json_text(out, "not_run", row->why.text);
    } else {
        json_statistic(out, "ms", row->seconds, 1e-3);
        fprintf(out, ", \"ms_token\": %.6g, \"tokens_s\": %.6g, \"bytes\": %.0f, \"gb_s\": %.6g, \"share\": %.4f",
                row->seconds.median / row->batch * 1e3, row->batch / row->seconds.median, row->work,
                row->work / row->seconds.median * 1e-9, share(row, &b->roofline.read, &b->roofline));
    }
    fprintf(out, "}");
}

void bench_report_json(const Model *m, const BenchOptions *o, const BenchResult *b, FILE *out) {
    const Roofline *r = &b->roofline;
    Statistic loads = later_loads(b);
    fprintf(out, "{\"program\": \"llama %s\", \"engine\": \"%s\", \"precision\": \"%s\",\n", o->version,
            m->engine->name, precision_names[m->precision]);
    const SamplerConfig *s = &o->sampler;
    if (s->temperature > 0)
        fprintf(out, " \"sampling\": {\"temperature\": %g, \"top_k\": %d, \"top_p\": %g, \"min_p\": %g},\n",
                (double)s->temperature, s->top_k, (double)s->top_p, (double)s->min_p);
    fprintf(out, " \"machine\": {");
    json_text(out, "name", r->name);
    fprintf(out, ", ");
    json_text(out, "software", r->software);
    fprintf(out, ", \"memory_bytes\": %llu, \"gpus\": %d},\n ", (unsigned long long)r->memory_bytes, r->gpus);
    json_shape(m, o, out);
    fprintf(out, " \"read\": {");
    json_statistic(out, "gb_s", r->read, 1e9);
    fprintf(out, ", ");
    json_text(out, "how", r->read_how);
    fprintf(out, "},\n \"product\": {");
    const char *how;
    json_statistic(out, "tflop_s", *product_peak(m, r, &how), 1e12);
    fprintf(out, ", ");
    json_text(out, "how", how);
    if (r->link.n) {
        fprintf(out, "},\n \"link\": {");
        json_statistic(out, "gb_s", r->link, 1e9);
    }
    fprintf(out, "},\n \"load\": ");
    if (b->n_loads) {
        fprintf(out, "{\"first_ms\": %.6g, ", b->loads[0] * 1e3);
        json_statistic(out, "ms", loads, 1e-3);
        fprintf(out, ", \"gb_s\": %.6g},\n", (double)m->weights.bytes / loads.median * 1e-9);
    } else {
        fprintf(out, "null,\n");
    }
    fprintf(out, " \"first_token\": {\"tokens\": %d, \"first_ms\": %.6g, ", BENCH_FIRST_PROMPT, b->first_seconds * 1e3);
    json_statistic(out, "ms", b->first.seconds, 1e-3);
    fprintf(out, "},\n");
    if (b->n_fresh) fprintf(out, " \"first_prompt_of_a_process\": [\n");
    for (int i = 0; i < b->n_fresh; i++, fprintf(out, i < b->n_fresh ? ",\n" : "],\n"))
        json_fresh(out, &b->fresh[i], &b->warm[i]);
    fprintf(out, " \"prefill\": [\n");
    for (int i = 0; i < b->n_prompts; i++, fprintf(out, i < b->n_prompts ? ",\n" : ""))
        json_prompt(m, b, out, &b->prompts[i]);
    fprintf(out, "],\n \"decode\": [\n");
    for (int i = 0; i < b->n_steps; i++, fprintf(out, i < b->n_steps ? ",\n" : "")) json_step(b, out, &b->steps[i]);
    fprintf(out, "]}\n");
}

// ---- table ----------------------------------------------------------------------------------------------------------

static void table_product(const Statistic *product, const char *how, FILE *out) {
    double unit = product->median < 1e12 ? 1e9 : 1e12;
    fprintf(out, "products, at most     %10.1f %s [%.1f, %.1f]  %s\n", product->median / unit,
            unit > 1e9 ? "TFLOP/s" : "GFLOP/s", product->least / unit, product->most / unit, how);
}

static void table_head(const Model *m, const BenchOptions *o, const BenchResult *b, FILE *out) {
    const Roofline *r = &b->roofline;
    char dtypes[WEIGHTS_DTYPES];
    Statistic loads = later_loads(b);
    fprintf(out, "llama %s, engine %s, %s%s%s%s; %s, %s\n", o->version, m->engine->name, precision_names[m->precision],
            m->not_used.text[0] ? " (" : "", m->not_used.text, m->not_used.text[0] ? ")" : "", r->name, r->software);
    fprintf(out, "%s%s%.3f GB of weights (%s), %.3f GB of them read by one step; medians [smallest, largest]\n\n",
            o->synthetic ? o->synthetic : "", o->synthetic ? ": " : "", (double)m->weights.bytes * 1e-9,
            weights_dtypes(m, dtypes), (double)weights_read(m, 1) * 1e-9);
    const SamplerConfig *s = &o->sampler;
    if (s->temperature > 0)
        fprintf(out, "tokens are drawn at temperature %g, top-k %d, top-p %g, min-p %g\n\n", (double)s->temperature,
                s->top_k, (double)s->top_p, (double)s->min_p);
    fprintf(out, "reading, at most      %10.1f GB/s [%.1f, %.1f]  %s\n", r->read.median * 1e-9, r->read.least * 1e-9,
            r->read.most * 1e-9, r->read_how);
    table_product(&r->product, r->product_how, out);
    if (r->product_bf16.n) table_product(&r->product_bf16, r->product_bf16_how, out);
    if (r->gpus > 1) fprintf(out, "each of %d GPUs; shares are of what they reach together\n", r->gpus);
    if (r->link.n)
        fprintf(out, "from GPU to GPU       %10.1f GB/s [%.1f, %.1f]  copies, one way\n", r->link.median * 1e-9,
                r->link.least * 1e-9, r->link.most * 1e-9);
    if (b->n_loads)
        fprintf(out, "load                  %10.1f ms [%.1f, %.1f], %.1f GB/s; the first time %.1f ms\n",
                loads.median * 1e3, loads.least * 1e3, loads.most * 1e3, (double)m->weights.bytes / loads.median * 1e-9,
                b->loads[0] * 1e3);
    fprintf(out, "first token, of %2d    %10.2f ms [%.2f, %.2f]; the first time %.1f ms\n", BENCH_FIRST_PROMPT,
            b->first.seconds.median * 1e3, b->first.seconds.least * 1e3, b->first.seconds.most * 1e3,
            b->first_seconds * 1e3);
}

static void table_fresh(const BenchResult *b, FILE *out) {
    char range[48];
    if (b->n_fresh)
        fprintf(out, "\nfirst prompt of a process\n%16s %12s %-20s %14s %10s\n", "prompt", "ms", "[smallest, largest]",
                "warm, ms", "ratio");
    for (int i = 0; i < b->n_fresh; i++) {
        const BenchRow *row = &b->fresh[i];
        if (row->seconds.n == 0) {
            fprintf(out, "%16d   not run: %s\n", row->length, row->why.text);
            continue;
        }
        double warm = b->warm[i].seconds.median;
        snprintf(range, sizeof range, "[%.2f, %.2f]", row->seconds.least * 1e3, row->seconds.most * 1e3);
        fprintf(out, "%16d %12.2f %-20s %14.2f %10.2f\n", row->length, row->seconds.median * 1e3, range, warm * 1e3,
                row->seconds.median / warm);
    }
}

static void table_prompts(const Model *m, const BenchResult *b, FILE *out) {
    const Statistic *peak = product_peak(m, &b->roofline, NULL);
    double unit = peak->median < 1e12 ? 1e9 : 1e12;
    char range[48];
    if (b->n_prompts)
        fprintf(out, "\n%16s %12s %-20s %14s %10s %8s\n", "prompt", "ms", "[smallest, largest]", "tokens/s",
                unit > 1e9 ? "TFLOP/s" : "GFLOP/s", "of peak");
    for (int i = 0; i < b->n_prompts; i++) {
        const BenchRow *row = &b->prompts[i];
        if (row->seconds.n == 0) {
            fprintf(out, "%16d   not run: %s\n", row->length, row->why.text);
            continue;
        }
        snprintf(range, sizeof range, "[%.2f, %.2f]", row->seconds.least * 1e3, row->seconds.most * 1e3);
        fprintf(out, "%16d %12.2f %-20s %14.1f %10.1f %6.1f %%\n", row->length, row->seconds.median * 1e3, range,
                row->length / row->seconds.median, row->work / row->seconds.median / unit,
                100 * share(row, peak, &b->roofline));
    }
}

static void table_steps(const BenchResult *b, FILE *out) {
    char range[48];
    fprintf(out, "\n%10s %5s %12s %-20s %10s %10s %10s %8s\n", "context", "batch", "ms/step", "[smallest, largest]",
            "ms/token", "tokens/s", "GB/s", "of peak");
    for (int i = 0; i < b->n_steps; i++) {
        const BenchRow *row = &b->steps[i];
        if (row->seconds.n == 0) {
            fprintf(out, "%10d %5d   not run: %s\n", row->length, row->batch, row->why.text);
            continue;
        }
        snprintf(range, sizeof range, "[%.3f, %.3f]", row->seconds.least * 1e3, row->seconds.most * 1e3);
        fprintf(out, "%10d %5d %12.3f %-20s %10.3f %10.1f %10.1f %6.1f %%\n", row->length, row->batch,
                row->seconds.median * 1e3, range, row->seconds.median / row->batch * 1e3,
                row->batch / row->seconds.median, row->work / row->seconds.median * 1e-9,
                100 * share(row, &b->roofline.read, &b->roofline));
    }
}

void bench_report_table(const Model *m, const BenchOptions *o, const BenchResult *b, FILE *out) {
    table_head(m, o, b, out);
    table_fresh(b, out);
    table_prompts(m, b, out);
    table_steps(b, out);
}
