#include "output.h"

#include <errno.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "../tokenizer/utf8.h"

bool flush_output(Error *err) {
    if (fflush(stdout) == 0 && !ferror(stdout)) return true;
    return fail(err, "standard output: %s", strerror(errno));
}

void write_json_text(FILE *out, const char *data, size_t n) {
    const uint8_t *s = (const uint8_t *)data;
    for (size_t i = 0; i < n;) {
        uint32_t cp;
        int length = utf8_decode(s + i, n - i, &cp);
        if (length == 0) {
            fputs("\xEF\xBF\xBD", out);
            i += utf8_invalid_part(s + i, n - i);
            continue;
        }
        if (cp == '"' || cp == '\\')
            fprintf(out, "\\%c", (char)cp);
        else if (cp == '\n')
            fputs("\\n", out);
        else if (utf8_is_control(cp))
            fprintf(out, "\\u%04x", cp);
        else
            fwrite(s + i, 1, (size_t)length, out);
        i += (size_t)length;
    }
}

void begin_message(void) {
    clear_progress();
    text_break_line();
}

// The whole line at once: of several processes that write to one file or pipe, lines stay whole.
void print_message(const char *format, ...) {
    static const char before[] = "llama: ";
    const size_t first = sizeof before - 1;
    char room[1024], *line = room;
    va_list args, again;
    va_start(args, format);
    va_copy(again, args);
    size_t end = first + (size_t)vsnprintf(room + first, sizeof room - first - 1, format, args);
    if (end + 2 > sizeof room && (line = malloc(end + 2))) vsnprintf(line + first, end - first + 1, format, again);
    if (!line) line = room, end = sizeof room - 2;
    va_end(again);
    va_end(args);
    memcpy(line, before, first);
    line[end] = '\n';
    begin_message();
    text_write_whole(stderr, line, end + 1);
    if (line != room) free(line);
}

static void write_json_ids(FILE *out, const char *key, const int *ids, size_t n) {
    fprintf(out, "\"%s\": [", key);
    for (size_t i = 0; i < n; i++) fprintf(out, "%s%d", i ? ", " : "", ids[i]);
    fputs("], ", out);
}

// Each token's own text, special or not.
static void write_json_token_texts(const Model *m, const TokenList *ids) {
    printf("\"token_texts\": [");
    for (size_t i = 0, n; i < ids->n; i++) {
        const uint8_t *bytes = tokenizer_bytes(&m->tokenizer, ids->ids[i], &n);
        printf("%s\"", i ? ", " : "");
        write_json_text(stdout, (const char *)bytes, n);
        putchar('"');
    }
    printf("], ");
}

static void write_json_logprob(const Logprobs *l, size_t i, int k, int id) {
    const float *values = l->values + i * (size_t)(1 + k);
    const int *top = l->top_ids + i * (size_t)k;
    printf("{\"id\": %d, \"logprob\": %.6f, \"top\": [", id, (double)values[0]);
    for (int j = 0; j < k; j++)
        printf("%s{\"id\": %d, \"logprob\": %.6f}", j ? ", " : "", top[j], (double)values[1 + j]);
    printf("]}");
}

// Of the answer's tokens, and of the prompt's where they are kept: null for its first, and for those that an interrupt
// has left out.
static void write_json_logprobs(const Sequence *seq) {
    int k = seq->config.logprobs;
    if (k) printf("\"logprobs\": [");
    for (size_t i = 0; k && i < seq->ids.n; i++) {
        if (i) printf(", ");
        write_json_logprob(&seq->logprobs, i, k, seq->ids.ids[i]);
    }
    if (k) printf("], ");
    if (!seq->config.prompt_logprobs) return;
    printf("\"prompt_logprobs\": [");
    for (size_t i = 0; i < seq->prompt.n; i++) {
        if (i) printf(", ");
        if (i > 0 && i <= (size_t)seq->n_scored)
            write_json_logprob(&seq->prompt_logprobs, i - 1, k, seq->prompt.ids[i]);
        else
            printf("null");
    }
    printf("], ");
}

static double tokens_per_step(const SpeculationCounts *c) {
    return c->steps ? (double)c->tokens / (double)c->steps : 0;
}

static void write_json_speculation(const Sequence *seq) {
    const SpeculationCounts *c = &seq->counts;
    if (seq->config.speculation)
        printf("\"speculation\": {\"candidates\": %" PRId64 ", \"accepted\": %" PRId64 ", \"steps\": %" PRId64
               ", \"tokens_per_step\": %.3f}, ",
               c->candidates, c->accepted, c->steps, tokens_per_step(c));
}

// Seconds for each token after the first; 0 if there is none.
static double seconds_per_token(const Sequence *seq) {
    return seq->ids.n > 1 ? (seq->last - seq->first) / (double)(seq->ids.n - 1) : 0;
}

// JSON of a file as it is written there, but for control characters, which strings escape.
static void write_json_raw(const Bytes *json) {
    const uint8_t *s = (const uint8_t *)json->data;
    for (size_t i = 0; i < json->n; i++)
        if (s[i] == 0x7F)
            fputs("\\u007f", stdout);
        else if (s[i] == 0xC2 && i + 1 < json->n && s[i + 1] < 0xA0)
            printf("\\u%04x", s[++i]);
        else
            putchar(s[i] == '\r' ? ' ' : s[i]); // between values
}

void end_json_object(const Bytes *other) {
    if (other) write_json_raw(other);
    puts("}");
}

bool print_sequence(Sequence *seq, const Model *m, const Bytes *other, double ready, Error *err) {
    printf("{\"index\": %d, ", seq->index);
    write_json_ids(stdout, "prompt_ids", seq->prompt.ids, seq->prompt.n);
    write_json_ids(stdout, "ids", seq->ids.ids, seq->ids.n);
    printf("\"text\": \"");
    write_json_text(stdout, seq->text.data, seq->text.n);
    printf("\", \"finish_reason\": \"%s\", ", seq->finish_reason);
    write_json_token_texts(m, &seq->ids);
    write_json_logprobs(seq);
    write_json_speculation(seq);
    printf("\"timings\": {\"ready_ms\": %.3f, \"first_token_ms\": %.3f, \"decode_ms\": %.3f, \"ms_per_token\": %.4f, "
           "\"p50_ms\": %.4f, \"p95_ms\": %.4f, \"shared_tokens\": %d, \"evictions\": %d}",
           ready * 1e3, seq->ids.n ? (seq->first - seq->admitted) * 1e3 : 0.0,
           seq->ids.n ? (seq->last - seq->first) * 1e3 : 0.0, seconds_per_token(seq) * 1e3,
           sequence_latency(seq, 0.5) * 1e3, sequence_latency(seq, 0.95) * 1e3, seq->n_shared, seq->n_left);
    end_json_object(other);
    return flush_output(err);
}

bool print_line_error(int index, const PromptLine *line, Error *err) {
    printf("{\"index\": %d, \"line\": %d, \"error\": \"", index, line->number);
    write_json_text(stdout, line->error, strlen(line->error));
    putchar('"');
    end_json_object(&line->other);
    return flush_output(err);
}

void print_engine(const Model *m, const Options *o) {
    fprintf(stderr, "; engine %s, %s", m->engine->name, precision_names[m->precision]);
    if (m->not_used.text[0]) fprintf(stderr, " (%s)", m->not_used.text);
    if (o->sampler.temperature > 0) fprintf(stderr, ", seed %" PRIu64, o->seed);
    fprintf(stderr, "\n");
}

void print_statistics(const Model *m, const Options *o, const Sequence *seq, double ready) {
    double prefill = seq->first - seq->admitted, per_token = seconds_per_token(seq);
    begin_message();
    fprintf(stderr, "llama: ready in %.1f ms; prompt of %zu tokens", ready * 1e3, seq->prompt.n);
    if (seq->ids.n) fprintf(stderr, " in %.1f ms (%.0f tokens/s)", prefill * 1e3, (double)seq->prompt.n / prefill);
    fprintf(stderr, "; %zu new tokens", seq->ids.n);
    if (per_token > 0)
        fprintf(stderr, ", %.3f ms each (%.0f tokens/s, %.1f GB/s of weights)", per_token * 1e3, 1 / per_token,
                (double)weights_read(m, 1) / (per_token * tokens_per_step(&seq->counts)) * 1e-9);
    print_engine(m, o);
}

void print_speculation(const Speculation *s) {
    print_message("--%s: up to %d candidates for the next tokens of a sequence are verified in a step",
                  s->proposer.name, MAX_CANDIDATES);
    if (s->draft)
        print_message("draft: %.3f GB of weights, %d layers, K/V cache %.3f MB", (double)s->draft->weights.bytes * 1e-9,
                      s->draft->config.n_layers, (double)s->draft->kv.bytes * 1e-6);
}

void print_speculation_counts(const Speculation *s, const SpeculationCounts *c) {
    print_message("--%s: %" PRId64 " of %" PRId64 " candidates were right (%.0f %%); %.2f tokens a step of a sequence",
                  s->proposer.name, c->accepted, c->candidates,
                  c->candidates ? 100.0 * (double)c->accepted / (double)c->candidates : 0.0, tokens_per_step(c));
}

void print_sharing(const Sequence *seqs, int n) {
    size_t tokens = 0, shared = 0;
    int left = 0, times = 0;
    for (int i = 0; i < n; i++) {
        if (!seqs[i].finish_reason) continue;
        tokens += seqs[i].prompt.n;
        shared += (size_t)seqs[i].n_shared;
        left += seqs[i].n_left > 0;
        times += seqs[i].n_left;
    }
    print_message("%zu of %zu prompt tokens shared; %d sequences left the cache for lack of pages, %d times in all",
                  shared, tokens, left, times);
}

void print_quantised(const QuantizeSummary *s, const Model *m, const Options *o, double seconds) {
    const QuantizedMatrix *worst = s->matrices;
    for (int i = 1; i < s->n; i++)
        if (s->matrices[i].error > worst->error) worst = &s->matrices[i];
    if (!o->quiet)
        print_message("wrote %s: %.3f GB, where %s has %.3f; %d matrices, error %.3g %% of their size, most in %s with "
                      "%.3g %%; %.1f s, %.2f GB/s",
                      o->output, (double)s->bytes_made * 1e-9, o->model, (double)s->bytes_read * 1e-9, s->n,
                      s->error * 100, worst->name, worst->error * 100, seconds,
                      (double)m->file.data_bytes * 1e-9 / (seconds > 0 ? seconds : 1));
    if (!o->json) return;
    printf("{\"model\": \"");
    write_json_text(stdout, o->model, strlen(o->model));
    printf("\", \"file\": \"");
    write_json_text(stdout, o->output, strlen(o->output));
    printf("\", \"group\": %d, \"bytes_read\": %" PRIu64 ", \"bytes_written\": %" PRIu64
           ", \"seconds\": %.3f, \"error\": %.6g, \"matrices\": [",
           s->group, s->bytes_read, s->bytes_made, seconds, s->error);
    for (int i = 0; i < s->n; i++)
        printf("%s{\"name\": \"%s\", \"type\": \"%s\", \"bytes\": %" PRIu64 ", \"error\": %.6g}", i ? ", " : "",
               s->matrices[i].name, s->matrices[i].type, s->matrices[i].bytes, s->matrices[i].error);
    puts("]}");
}

const char *context_flag(const KVCache *kv) {
    return kv_longest(kv) < kv->max_len ? "--kv-memory" : "-c";
}

void print_length_note(const Options *o, const Sequence *seq, const KVCache *kv, const char *hint) {
    if (!seq->finish_reason || strcmp(seq->finish_reason, "length") != 0) return;
    if ((int)seq->ids.n < o->n)
        print_message("the context of %d tokens is full: the answer ends here; %s%s", kv_longest(kv),
                      hint ? hint : context_flag(kv), hint ? "" : " sets it");
    else
        print_message("the answer ends after %d tokens (-n)", o->n);
}

void print_chat_note(const Model *m) {
    if (m->config.chat_checked) return;
    print_message("chat format %s was not compared with the checkpoint's chat template; to be sure, convert the "
                  "checkpoint again",
                  chat_format_names[m->config.chat_format]);
}

// What the engine holds in fewer bits than the file. (Quantised matrices are held as they are.)
static void print_rounding(const Model *m) {
    const Weights *w = &m->weights;
    const Matrix *numbers = weights_numbers(m);
    const struct {
        const char *name;
        DType file, held;
    } parts[] = {{"weights", w->dtype, numbers ? numbers->dtype : w->dtype},
                 {"embeddings", w->embeddings_dtype, w->tok_embeddings.dtype},
                 {"output", w->output_dtype, w->output.dtype}};
    bool all = numbers && parts[0].held != parts[0].file && parts[0].held != DTYPE_F32;
    for (int i = 0; i < (all ? 1 : m->config.tie_embeddings ? 2 : 3); i++)
        if (parts[i].held != parts[i].file && parts[i].held != DTYPE_F32)
            print_message("%s rounded to %s", parts[i].name, parts[i].held == DTYPE_F16 ? "f16" : "bf16");
}

void print_model(const Model *m, const Options *o) {
    const Config *c = &m->config;
    char dtypes[WEIGHTS_DTYPES];
    double kv = (double)m->kv.bytes, position = (double)model_page_bytes(m) / KV_PAGE;
    print_message("dim %d, %d layers, %d heads of %d over %d K/V heads, hidden %d, vocabulary %d, at most %d tokens",
                  c->dim, c->n_layers, c->n_heads, c->head_dim, c->n_kv_heads, c->hidden_dim, c->vocab_size,
                  c->max_seq_len);
    fprintf(stderr, "llama: engine %s%s%s%s", m->engine->name, m->note[0] ? " (" : "", m->note, m->note[0] ? ")" : "");
    fprintf(stderr, ", %s%s, computing in %s\n",
            o->engine             ? "as asked"
            : m->not_used.text[0] ? "for "
                                  : "the fastest in this build",
            m->not_used.text,
            m->precision == PRECISION_F32   ? "float32"
            : m->precision == PRECISION_FP8 ? "FP8 products of prompts, else bf16 products and cache, float32 sums"
                                            : "bf16 products and cache, float32 sums");
    fprintf(stderr,
            "llama: memory: %.3f GB of weights (%s in the file), K/V cache %.3f MB: %d pages of %d positions of %.0f "
            "bytes (with a K/V head for every head %.0f), for %d x %d positions at most",
            (double)m->weights.bytes * 1e-9, weights_dtypes(m, dtypes), kv * 1e-6, m->kv.n_pages, KV_PAGE, position,
            position * c->group, m->kv.n_slots, m->kv.max_len);
    if (m->buffer_bytes) fprintf(stderr, ", buffers %.3f MB", (double)m->buffer_bytes * 1e-6);
    fputc('\n', stderr);
    print_rounding(m);
}

bool use_colour(void) {
    const char *no = getenv("NO_COLOR"), *term = getenv("TERM");
    return isatty(STDERR_FILENO) && !(no && *no) && !(term && strcmp(term, "dumb") == 0);
}

// ---- the status line ------------------------------------------------------------------------------------------------

static bool status_line; // there is one on the terminal

// Of the terminal that standard error is; 80 if it does not say.
static int terminal_columns(void) {
    struct winsize size;
    return ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col ? size.ws_col : 80;
}

// Of work that is not done: whether it is too early to draw its line again.
static bool is_early(double now, double drawn) {
    return status_line && now - drawn < 0.1;
}

// Draws the line: what is done, a bar of so much of it (0 to 1), the figures.
static void draw_status(const char *what, double part, const char *figures) {
    enum { MOST = 24, LEAST = 4 }; // of the bar
    char bar[MOST + 4] = "", line[256];
    if (text_line_shared()) return; // it would be written over
    // A line that wraps could not be written over: the bar takes what the figures leave, and the last column is free.
    int columns = terminal_columns() - 1,
        width = columns - (int)(strlen("llama:  [] ") + strlen(what) + strlen(figures));
    if (width > MOST) width = MOST;
    for (int i = 0; width >= LEAST && i < width; i++) bar[1 + i] = i < part * width ? '#' : '.';
    if (width >= LEAST) bar[0] = '[', memcpy(bar + 1 + width, "] ", 2);
    snprintf(line, sizeof line, "llama: %s %s%s", what, bar, figures);
    fprintf(stderr, "\r%.*s\033[K", columns, line);
    status_line = true;
}

void show_progress(const char *what, uint64_t done, uint64_t total) {
    static const char *current = "";
    static double start, drawn;
    static uint64_t before;
    double now = clock_seconds();
    if (strcmp(what, current) != 0 || done < before) start = now, before = done; // a new work begins
    if (done < total && is_early(now, drawn)) return;
    current = what;
    drawn = now;
    bool bytes = strcmp(what, "loading") == 0 || strcmp(what, "quantising") == 0;
    double scale = bytes ? 1e-9 : 1, rate = now > start ? (double)(done - before) / (now - start) : 0;
    char figures[128];
    int n = snprintf(figures, sizeof figures, bytes ? "%.2f of %.2f GB" : "%.0f of %.0f tokens", (double)done * scale,
                     (double)total * scale);
    if (rate > 0)
        snprintf(figures + n, sizeof figures - (size_t)n,
                 bytes ? ", %.1f GB/s, %.1f s left" : ", %.0f tokens/s, %.1f s left", rate * scale,
                 (double)(total - done) / rate);
    draw_status(what, total ? (double)done / (double)total : 1, figures);
    if (done >= total) clear_progress();
}

void show_answers(const Sequence *seqs, int n, double begin) {
    static double drawn;
    double now = clock_seconds(), part = 0, elapsed = now - begin;
    size_t n_tokens = 0;
    int done = 0;
    if (is_early(now, drawn)) return;
    drawn = now;
    for (int i = 0; i < n; i++) {
        const Sequence *seq = &seqs[i];
        done += seq->finish_reason != NULL;
        n_tokens += seq->ids.n;
        part += seq->finish_reason ? 1 : seq->n_max ? (double)seq->ids.n / seq->n_max : 0;
    }
    part /= n;
    char figures[128];
    int length = snprintf(figures, sizeof figures, "%d of %d prompts, %.0f tokens/s", done, n,
                          elapsed > 0 ? (double)n_tokens / elapsed : 0);
    if (part > 0)
        snprintf(figures + length, sizeof figures - (size_t)length, ", %.1f s left", elapsed * (1 - part) / part);
    draw_status("answering", part, figures);
}

void clear_progress(void) {
    if (status_line) fputs("\r\033[K", stderr);
    status_line = false;
}
