// llama: loads a model.bin and continues a prompt. Flags and main; generate, tokenize, perplexity, compare, bench.
#include <errno.h>
#include <inttypes.h>
#include <limits.h>
#include <math.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "model/bench.h"
#include "model/compare.h"
#include "model/generate.h"
#include "model/json.h"
#include "model/model.h"
#include "tokenizer/utf8.h"

#define VERSION "0.1"

enum { EXIT_OK = 0, EXIT_FAILED = 1, EXIT_USAGE = 2, EXIT_INTERRUPTED = 130 };
enum { MAX_STOPS = 16, MAX_LOGPROBS = 64, DEFAULT_CONTEXT = 4096, DEFAULT_BATCH = 8 };

static volatile sig_atomic_t interrupted;

static void on_interrupt(int signal_number) {
    (void)signal_number;
    interrupted = 1;
}

// ---- flags ----------------------------------------------------------------------------------------------------------

typedef struct {
    const char *model, *prompt, *prompt_file, *stops[MAX_STOPS], *prompts, *perplexity, *compare, *synthetic, *engine,
        *precision;
    int n_stops, n, context, batch, logprobs;
    uint64_t seed;
    SamplerConfig sampler;
    bool ids, tokenize, detokenize, hex, special, ignore_eos, echo, json, bench, verbose, quiet, version, help;
} Options;

typedef enum { FLAG_SWITCH, FLAG_TEXT, FLAG_TEXTS, FLAG_INT, FLAG_SEED, FLAG_FLOAT } FlagType;

typedef struct {
    const char *name, *value, *help;
    FlagType type;
    size_t offset;      // of the field in Options
    double least, most; // of a number
} Flag;

#define FIELD(f) offsetof(Options, f)

static const Flag flags[] = {
    {"-p", "TEXT", "the prompt; - reads standard input", FLAG_TEXT, FIELD(prompt), 0, 0},
    {"-f", "FILE", "the prompt from a file; - reads standard input", FLAG_TEXT, FIELD(prompt_file), 0, 0},
    {"-n", "N", "new tokens at most (256)", FLAG_INT, FIELD(n), 1, INT_MAX},
    {"-c", "N", "context: tokens of prompt and answer (the model's, at most 4096 or what -n needs)", FLAG_INT,
     FIELD(context), 1, INT_MAX},
    {"-s", "SEED", "seed of the sampling (0)", FLAG_SEED, FIELD(seed), 0, 0},
    {"--temp", "T", "temperature; 0 takes the most likely token (0)", FLAG_FLOAT, FIELD(sampler.temperature), 0, 1e6},
    {"--top-k", "K", "sample among the K most likely; 0: all (0)", FLAG_INT, FIELD(sampler.top_k), 0, INT_MAX},
    {"--top-p", "P", "sample among the fewest that reach probability P (1)", FLAG_FLOAT, FIELD(sampler.top_p), 0, 1},
    {"--min-p", "P", "drop what is less than P times as likely as the most likely (0)", FLAG_FLOAT,
     FIELD(sampler.min_p), 0, 1},
    {"--stop", "STR", "end before this text; may be given several times", FLAG_TEXTS, FIELD(stops), 0, 0},
    {"--ignore-eos", NULL, "go on past the end-of-text token", FLAG_SWITCH, FIELD(ignore_eos), 0, 0},
    {"--special", NULL, "special tokens written in the prompt count as such, and are printed", FLAG_SWITCH,
     FIELD(special), 0, 0},
    {"--ids", NULL, "the prompt is a list of token ids; no BOS is added", FLAG_SWITCH, FIELD(ids), 0, 0},
    {"--echo", NULL, "print the prompt before the answer", FLAG_SWITCH, FIELD(echo), 0, 0},
    {"--json", NULL, "print one JSON object: ids, text, finish_reason, timings (--tokenize: ids; --detokenize: text)",
     FLAG_SWITCH, FIELD(json), 0, 0},
    {"--logprobs", "K", "with --json: log-probabilities of each token and of the K most likely", FLAG_INT,
     FIELD(logprobs), 1, MAX_LOGPROBS},
    {"--tokenize", NULL, "print the ids of the prompt, and no BOS; with --hex, of one hex text per line", FLAG_SWITCH,
     FIELD(tokenize), 0, 0},
    {"--detokenize", NULL, "print the bytes of the ids in the prompt; with --hex, in hex, line by line", FLAG_SWITCH,
     FIELD(detokenize), 0, 0},
    {"--hex", NULL, "text is hexadecimal, in --tokenize and --detokenize", FLAG_SWITCH, FIELD(hex), 0, 0},
    {"--prompts", "FILE", "many prompts, a JSON object with text or ids on each line; answers as JSON lines", FLAG_TEXT,
     FIELD(prompts), 0, 0},
    {"-b", "N", "with --prompts: so many at a time (8); with --bench: at most so many", FLAG_INT, FIELD(batch), 1,
     MAX_SLOTS},
    {"--perplexity", "FILE", "how well the model predicts a text", FLAG_TEXT, FIELD(perplexity), 0, 0},
    {"--compare", "DUMP", "compare with HuggingFace's tokens (scripts/dump_hf.py)", FLAG_TEXT, FIELD(compare), 0, 0},
    {"--bench", NULL, "measure this machine, and this model on it; -c and -b: no context and no batch beyond",
     FLAG_SWITCH, FIELD(bench), 0, 0},
    {"--synthetic", "SHAPE", "weights from a seed: llama-3.2-1b, llama-3.2-3b, llama-3.1-8b, llama-3.1-70b", FLAG_TEXT,
     FIELD(synthetic), 0, 0},
    {"--engine", "NAME", "what computes (the fastest here)", FLAG_TEXT, FIELD(engine), 0, 0},
    {"--precision", "P", "bf16 or f32: inputs of products and the cache (bf16; engine cpu is always f32)", FLAG_TEXT,
     FIELD(precision), 0, 0},
    {"--verbose", NULL, "say what was loaded and where it runs", FLAG_SWITCH, FIELD(verbose), 0, 0},
    {"--quiet", NULL, "no statistics", FLAG_SWITCH, FIELD(quiet), 0, 0},
    {"--version", NULL, "print the version", FLAG_SWITCH, FIELD(version), 0, 0},
    {"--help", NULL, "print this", FLAG_SWITCH, FIELD(help), 0, 0},
};
enum { N_FLAGS = sizeof flags / sizeof *flags };

static void print_help(void) {
    printf("llama %s: continues a prompt with a LLaMA 3 model.\n\nusage: llama MODEL.bin -p TEXT [flags]\n\n", VERSION);
    for (int i = 0; i < N_FLAGS; i++) {
        char left[64];
        snprintf(left, sizeof left, "%s%s%s", flags[i].name, flags[i].value ? " " : "",
                 flags[i].value ? flags[i].value : "");
        printf("  %-18s %s\n", left, flags[i].help);
    }
    printf("\nMODEL.bin comes from scripts/convert.py. Engines in this build: %s.\n", model_engines());
}

// Stores a flag's value, given as text.
static bool set_flag(Options *o, const Flag *flag, const char *text, Error *err) {
    void *field = (char *)o + flag->offset;
    char *end;
    errno = 0;
    switch (flag->type) {
    case FLAG_SWITCH:
        *(bool *)field = true;
        return true;
    case FLAG_TEXT:
        *(const char **)field = text;
        return true;
    case FLAG_TEXTS:
        if (!*text) return fail(err, "%s: expected a text that is not empty", flag->name);
        if (o->n_stops == MAX_STOPS) return fail(err, "%s: more than %d of them", flag->name, MAX_STOPS);
        ((const char **)field)[o->n_stops++] = text;
        return true;
    case FLAG_INT: {
        long v = strtol(text, &end, 10);
        if (errno || end == text || *end || (double)v < flag->least || (double)v > flag->most)
            return fail(err, "%s %s: expected a whole number from %.0f to %.0f", flag->name, text, flag->least,
                        flag->most);
        *(int *)field = (int)v;
        return true;
    }
    case FLAG_SEED: {
        unsigned long long v = strtoull(text, &end, 10);
        if (errno || end == text || *end || strchr(text, '-'))
            return fail(err, "%s %s: expected a whole number from 0 to 2^64-1", flag->name, text);
        *(uint64_t *)field = v;
        return true;
    }
    case FLAG_FLOAT: {
        double v = strtod(text, &end);
        if (end == text || *end || !(v >= flag->least && v <= flag->most))
            return fail(err, "%s %s: expected a number from %g to %g", flag->name, text, flag->least, flag->most);
        *(float *)field = (float)v;
        return true;
    }
    }
    return false;
}

static bool parse_flags(Options *o, int argc, char **argv, Error *err) {
    for (int i = 1; i < argc; i++) {
        const Flag *flag = NULL;
        for (int f = 0; f < N_FLAGS; f++)
            if (strcmp(argv[i], flags[f].name) == 0) flag = &flags[f];
        if (flag && flag->value && i + 1 == argc) return fail(err, "%s needs a value: %s", flag->name, flag->value);
        if (flag) {
            if (!set_flag(o, flag, flag->value ? argv[++i] : NULL, err)) return false;
        } else if (argv[i][0] == '-') {
            return fail(err, "unknown flag %s; --help lists them", argv[i]);
        } else if (o->model) {
            return fail(err, "two models: %s and %s; a prompt goes behind -p", o->model, argv[i]);
        } else {
            o->model = argv[i];
        }
    }
    return true;
}

// Combinations that make no sense are refused rather than ignored.
static bool check_flags(const Options *o, Error *err) {
    int modes = o->tokenize + o->detokenize + !!o->prompts + !!o->perplexity + !!o->compare + o->bench;
    bool prompt = o->prompt || o->prompt_file, reads_prompt = modes == 0 || o->tokenize || o->detokenize;
    if (!o->model && !o->synthetic)
        return fail(err, "no model; usage: llama MODEL.bin -p TEXT (--help lists the flags)");
    if (o->model && o->synthetic)
        return fail(err, "--synthetic %s and the model %s: expected one of them", o->synthetic, o->model);
    if (modes > 1)
        return fail(err,
                    "--tokenize, --detokenize, --prompts, --perplexity, --compare and --bench: expected one of them");
    if (o->prompt && o->prompt_file) return fail(err, "-p and -f: expected one of them");
    if (reads_prompt && !prompt) return fail(err, "no prompt: -p TEXT or -f FILE");
    if (!reads_prompt && prompt)
        return fail(err, "a prompt, which --prompts, --perplexity, --compare and --bench do not take");
    bool generates = modes == 0 || o->prompts;
    if (o->ids && (o->tokenize || o->prompts || o->perplexity || o->compare || o->bench))
        return fail(err, "--ids goes with a prompt to continue; --prompts says it on each line");
    if (!generates && (o->logprobs || o->echo || o->n_stops || o->ignore_eos || o->sampler.temperature > 0))
        return fail(err, "--logprobs, --echo, --stop, --ignore-eos and --temp go with generating text");
    if (o->logprobs && !o->json && !o->prompts) return fail(err, "--logprobs goes with --json or --prompts");
    if (o->batch && !o->prompts && !o->bench) return fail(err, "-b goes with --prompts or --bench");
    if (o->echo && o->prompts) return fail(err, "--echo: the JSON lines of --prompts have the prompt's ids");
    if (o->json && (o->perplexity || o->compare))
        return fail(err, "--json: --perplexity and --compare print text only");
    if (o->hex && o->json && o->detokenize)
        return fail(err, "--hex and --json: expected one of them with --detokenize");
    if (o->hex && !o->tokenize && !o->detokenize) return fail(err, "--hex goes with --tokenize or --detokenize");
    if (o->precision && strcmp(o->precision, "bf16") != 0 && strcmp(o->precision, "f32") != 0)
        return fail(err, "--precision %s: expected bf16 or f32", o->precision);
    if (o->engine && !model_has_engine(o->engine))
        return fail(err, "--engine %s: this build has: %s", o->engine, model_engines());
    return true;
}

// ---- input ----------------------------------------------------------------------------------------------------------

static bool read_stream(Bytes *b, FILE *in, const char *name, Error *err) {
    char block[65536];
    size_t n;
    while ((n = fread(block, 1, sizeof block, in)) > 0)
        if (!bytes_append(b, block, n, err)) return false;
    return !ferror(in) || fail(err, "%s: %s", name, strerror(errno));
}

static bool read_file(Bytes *b, const char *path, Error *err) {
    if (strcmp(path, "-") == 0) return read_stream(b, stdin, "standard input", err);
    FILE *in = fopen(path, "rb");
    if (!in) return fail(err, "%s: %s", path, strerror(errno));
    bool ok = read_stream(b, in, path, err);
    fclose(in);
    return ok;
}

static bool read_prompt(const Options *o, Bytes *b, Error *err) {
    if (o->prompt_file) return read_file(b, o->prompt_file, err);
    if (strcmp(o->prompt, "-") == 0) return read_stream(b, stdin, "standard input", err);
    return bytes_append(b, o->prompt, strlen(o->prompt), err);
}

// Ids separated by white space or commas.
static bool parse_ids(const char *text, size_t n, int vocab_size, TokenList *ids, Error *err) {
    const char *separators = " \t\r\n,";
    for (size_t i = 0; i < n;) {
        if (text[i] && strchr(separators, text[i])) {
            i++;
            continue;
        }
        int64_t id = 0;
        size_t start = i;
        for (; i < n && text[i] >= '0' && text[i] <= '9'; i++) id = id < vocab_size ? id * 10 + (text[i] - '0') : id;
        bool ended = i == n || (text[i] && strchr(separators, text[i]));
        if (i == start || !ended || id >= vocab_size) {
            int shown = n - start < 24 ? (int)(n - start) : 24;
            return fail(err, "id \"%.*s\" at byte %zu: expected whole numbers below %d", shown, text + start, start,
                        vocab_size);
        }
        if (!tokens_append(ids, (int)id, err)) return false;
    }
    return true;
}

// The ids of the prompt. Text gets one BOS, unless its special tokens begin with one.
static bool encode_prompt(const Options *o, const Model *m, const Bytes *text, TokenList *ids, Error *err) {
    if (o->ids) return parse_ids(text->data, text->n, m->config.vocab_size, ids, err);
    int bos = m->config.bos_id;
    TokenList encoded = {0};
    bool ok = tokenizer_encode(&m->tokenizer, (const uint8_t *)text->data, text->n, o->special, &encoded, err);
    if (ok && bos >= 0 && !(encoded.n && encoded.ids[0] == bos)) ok = tokens_append(ids, bos, err);
    for (size_t i = 0; ok && i < encoded.n; i++) ok = tokens_append(ids, encoded.ids[i], err);
    tokens_free(&encoded);
    return ok;
}

// ---- output ---------------------------------------------------------------------------------------------------------

// Flushes standard output: a full disk or a closed pipe is a failure, not a shorter answer.
static bool flush_output(Error *err) {
    if (fflush(stdout) == 0 && !ferror(stdout)) return true;
    return fail(err, "standard output: %s", strerror(errno));
}

// Writes bytes as the inside of a JSON string. What is not UTF-8 becomes U+FFFD, one for each maximal part of a
// character.
static void write_json_text(FILE *out, const char *data, size_t n) {
    const uint8_t *s = (const uint8_t *)data;
    for (size_t i = 0; i < n;) {
        uint32_t cp;
        int length = utf8_decode(s + i, n - i, &cp);
        if (length == 0) {
            fputs("\xEF\xBF\xBD", out);
            size_t part = 1;
            for (size_t k = 2; k <= 3 && k <= n - i; k++)
                if (utf8_incomplete_tail(s + i, k) == k) part = k;
            i += part;
            continue;
        }
        if (cp == '"' || cp == '\\')
            fprintf(out, "\\%c", (char)cp);
        else if (cp == '\n')
            fputs("\\n", out);
        else if (cp < 0x20 || cp == 0x7F)
            fprintf(out, "\\u%04x", cp);
        else
            fwrite(s + i, 1, (size_t)length, out);
        i += (size_t)length;
    }
}

static void write_json_ids(FILE *out, const char *key, const int *ids, size_t n) {
    fprintf(out, "\"%s\": [", key);
    for (size_t i = 0; i < n; i++) fprintf(out, "%s%d", i ? ", " : "", ids[i]);
    fputs("], ", out);
}

// ---- generate -------------------------------------------------------------------------------------------------------

static void write_json_logprobs(const Sequence *seq, int k) {
    printf("\"logprobs\": [");
    for (size_t i = 0; i < seq->ids.n; i++) {
        const float *row = seq->logprobs + i * (size_t)(1 + k);
        const int *top = seq->top_ids + i * (size_t)k;
        printf("%s{\"id\": %d, \"logprob\": %.6f, \"top\": [", i ? ", " : "", seq->ids.ids[i], (double)row[0]);
        for (int j = 0; j < k; j++)
            printf("%s{\"id\": %d, \"logprob\": %.6f}", j ? ", " : "", top[j], (double)row[1 + j]);
        printf("]}");
    }
    printf("], ");
}

// Seconds for each token after the first; 0 if there is none.
static double seconds_per_token(const Sequence *seq) {
    return seq->ids.n > 1 ? (seq->last - seq->first) / (double)(seq->ids.n - 1) : 0;
}

// What a sequence's text and end need to know; one run at a time.
static struct {
    const Options *options;
    double ready; // seconds from the program's start to the model's
    size_t n_finished, n_tokens;
} output;

static bool print_text(Sequence *seq, const char *data, size_t n, Error *err) {
    (void)seq;
    fwrite(data, 1, n, stdout);
    return flush_output(err);
}

static bool print_json(Sequence *seq, Error *err) {
    printf("{\"index\": %d, ", seq->index);
    write_json_ids(stdout, "prompt_ids", seq->prompt.ids, seq->prompt.n);
    write_json_ids(stdout, "ids", seq->ids.ids, seq->ids.n);
    printf("\"text\": \"");
    write_json_text(stdout, seq->text.data, seq->text.n);
    printf("\", \"finish_reason\": \"%s\", ", seq->finish_reason);
    if (output.options->logprobs) write_json_logprobs(seq, output.options->logprobs);
    printf(
        "\"timings\": {\"ready_ms\": %.3f, \"first_token_ms\": %.3f, \"decode_ms\": %.3f, \"ms_per_token\": %.4f}}\n",
        output.ready * 1e3, seq->ids.n ? (seq->first - seq->admitted) * 1e3 : 0.0,
        seq->ids.n ? (seq->last - seq->first) * 1e3 : 0.0, seconds_per_token(seq) * 1e3);
    return flush_output(err);
}

static bool print_end(Sequence *seq, Error *err) {
    output.n_finished++;
    output.n_tokens += seq->ids.n;
    if (output.options->json || output.options->prompts) {
        bool ok = print_json(seq, err);
        if (output.options->prompts) sequence_let_go(seq); // one of many: only what is counted stays
        return ok;
    }
    if (isatty(STDOUT_FILENO)) putchar('\n');
    return flush_output(err);
}

static void print_engine(const Model *m) {
    fprintf(stderr, "; engine %s, %s", m->engine->name, m->precision == PRECISION_F32 ? "f32" : "bf16");
    if (m->not_used.text[0]) fprintf(stderr, " (%s)", m->not_used.text);
    if (output.options->sampler.temperature > 0) fprintf(stderr, ", seed %" PRIu64, output.options->seed);
    fprintf(stderr, "\n");
}

static void print_statistics(const Model *m, const Sequence *seq) {
    double prefill = seq->first - seq->admitted, per_token = seconds_per_token(seq);
    fprintf(stderr, "llama: ready in %.1f ms; prompt of %zu tokens", output.ready * 1e3, seq->prompt.n);
    if (seq->ids.n) fprintf(stderr, " in %.1f ms (%.0f tokens/s)", prefill * 1e3, (double)seq->prompt.n / prefill);
    fprintf(stderr, "; %zu new tokens", seq->ids.n);
    if (per_token > 0)
        fprintf(stderr, ", %.3f ms each (%.0f tokens/s, %.1f GB/s of weights)", per_token * 1e3, 1 / per_token,
                (double)weights_read(m, 1) / per_token * 1e-9);
    print_engine(m);
}

static void print_model(const Model *m) {
    const Config *c = &m->config;
    double kv = (double)m->kv.bytes, positions = (double)m->kv.n_slots * m->kv.max_len;
    fprintf(stderr,
            "llama: dim %d, %d layers, %d heads of %d over %d K/V heads, hidden %d, vocabulary %d, at most %d tokens\n"
            "llama: %.3f GB of weights (%s in the file), K/V cache %.3f MB: %d x %d positions of %.0f bytes (with a "
            "K/V head for "
            "every head %.0f)\nllama: engine %s%s%s%s, computing in %s\n",
            c->dim, c->n_layers, c->n_heads, c->head_dim, c->n_kv_heads, c->hidden_dim, c->vocab_size, c->max_seq_len,
            (double)m->weights.bytes * 1e-9, dtype_names[m->weights.dtype], kv * 1e-6, m->kv.n_slots, m->kv.max_len,
            kv / positions, kv / positions * c->group, m->engine->name, m->not_used.text[0] ? " (" : "",
            m->not_used.text, m->not_used.text[0] ? ")" : "",
            m->precision == PRECISION_F32 ? "float32" : "bf16 products and cache, float32 sums");
    if (m->precision != PRECISION_F32 && m->weights.dtype == DTYPE_F32)
        fprintf(stderr, "llama: weights rounded to bf16\n");
}

// The context for a run that wants so many tokens in all: -c, or the smaller of the model's and max(4096, wanted).
static int context_for(const Options *o, const Model *m, int64_t wanted) {
    if (o->context) return o->context;
    int64_t length = wanted > DEFAULT_CONTEXT ? wanted : DEFAULT_CONTEXT;
    return length < m->config.max_seq_len ? (int)length : m->config.max_seq_len;
}

// A line on the terminal while the weights come: share, rate and time left.
static void show_progress(const char *what, uint64_t done, uint64_t total) {
    static double start, shown;
    double now = clock_seconds();
    if (start == 0) start = now;
    if (now - shown < 0.1 && done < total) return;
    shown = now;
    double rate = now > start ? (double)done / (now - start) : 0;
    fprintf(stderr, "\rllama: %s %3.0f %% of %.2f GB", what, 100.0 * (double)done / (double)total,
            (double)total * 1e-9);
    if (rate > 0) fprintf(stderr, ", %.1f GB/s, %.1f s left", rate * 1e-9, (double)(total - done) / rate);
    fputs(done < total ? "   " : "\r\033[K", stderr); // gone when it is done
}

static Precision precision_of(const Options *o) {
    return o->precision && strcmp(o->precision, "f32") == 0 ? PRECISION_F32 : PRECISION_BF16;
}

static bool start_model(const Options *o, Model *m, int slots, int context, Error *err) {
    if (context > m->config.max_seq_len)
        return fail(err, "a context of %d tokens, the model's maximum is %d", context, m->config.max_seq_len);
    if (isatty(STDERR_FILENO) && !o->quiet) m->progress = show_progress;
    if (!model_start(m, o->engine, precision_of(o), slots, context, err)) return false;
    if (o->verbose) print_model(m);
    return true;
}

// Refuses prompts that the context has no room for, before anything is loaded for them.
static bool check_prompts(const Options *o, const Sequence *seqs, int n, int context, Error *err) {
    for (int i = 0; i < n; i++) {
        size_t length = seqs[i].prompt.n;
        char which[32] = "the prompt";
        if (o->prompts) snprintf(which, sizeof which, "prompt %d", i);
        if (length == 0)
            return fail(err, "%s is empty, and %s", which,
                        o->ids || o->prompts ? "ids get no BOS" : "this model has no BOS token to begin with");
        if (length >= (size_t)context)
            return fail(err, "%s has %zu tokens, the context holds %d and needs room for one more%s", which, length,
                        context, o->context ? " (-c)" : "");
    }
    return true;
}

// Says what will not be as asked.
static void print_notes(const Options *o, const Sequence *seqs, int n, int context) {
    int cut = 0, least = o->n;
    for (int i = 0; i < n; i++) {
        int room = context - (int)seqs[i].prompt.n;
        cut += room < o->n;
        least = room < least ? room : least;
    }
    if (cut && o->prompts)
        fprintf(stderr, "llama: the context of %d leaves room for fewer than %d new tokens after %d of %d prompts\n",
                context, o->n, cut, n);
    else if (cut)
        fprintf(stderr, "llama: the context of %d leaves room for %d of %d new tokens\n", context, least, o->n);
    const SamplerConfig *s = &o->sampler;
    if (s->temperature == 0 && (s->top_k || s->top_p < 1 || s->min_p > 0))
        fprintf(stderr,
                "llama: at --temp 0 the most likely token is taken; --top-k, --top-p and --min-p change nothing\n");
}

// From here on nothing is read from a terminal, and an interrupt must not cut a write short.
static void restart_writes(void) {
    static const int signals[] = {SIGINT, SIGTERM};
    for (int i = 0; i < 2; i++) {
        struct sigaction action;
        sigaction(signals[i], NULL, &action);
        action.sa_flags |= (int)SA_RESTART;
        sigaction(signals[i], &action, NULL);
    }
}

static bool run_sequences(const Options *o, Model *m, Sequence *seqs, int n, int slots, int context, double start,
                          Error *err) {
    GenerateConfig config = {.n = o->n,
                             .logprobs = o->logprobs,
                             .n_stops = o->n_stops,
                             .stops = o->stops,
                             .ignore_eos = o->ignore_eos,
                             .special = o->special,
                             .seed = o->seed,
                             .sampler = o->sampler};
    GenerateSink sink = {.text = o->json || o->prompts ? NULL : print_text, .finished = print_end};
    if (!check_prompts(o, seqs, n, context, err) || !start_model(o, m, slots, context, err)) return false;
    if (!o->quiet) print_notes(o, seqs, n, context);
    output.ready = clock_seconds() - start;
    restart_writes();
    for (size_t i = 0, length; o->echo && i < seqs[0].prompt.n; i++) {
        const uint8_t *bytes = printed_bytes(m, o->special, seqs[0].prompt.ids[i], &length);
        if (o->json ? !bytes_append(&seqs[0].text, bytes, length, err)
                    : !print_text(seqs, (const char *)bytes, length, err))
            return false;
    }
    return generate(m, &config, seqs, n, &sink, &interrupted, err);
}

static bool run_generate(const Options *o, Model *m, const Bytes *text, double start, Error *err) {
    Sequence seq = {.index = 0};
    bool ok = encode_prompt(o, m, text, &seq.prompt, err) &&
              run_sequences(o, m, &seq, 1, 1, context_for(o, m, (int64_t)seq.prompt.n + o->n), start, err);
    if (ok && !o->quiet) print_statistics(m, &seq);
    sequence_free(&seq);
    return ok;
}

// ---- many prompts ---------------------------------------------------------------------------------------------------

// One line of a prompts file: {"text": "..."} or {"ids": [1, 2]}.
static bool parse_prompt_line(const Options *o, const Model *m, char *line, size_t n, const char *what, TokenList *ids,
                              Error *err) {
    Json j = {line, line, line + n, err, what};
    char *key, *text;
    size_t length;
    if (!json_expect(&j, '{') || !json_string(&j, &key, &length) || !json_expect(&j, ':')) return false;
    if (strcmp(key, "text") == 0) {
        if (!json_string(&j, &text, &length) || !json_expect(&j, '}') || !json_end(&j)) return false;
        Bytes bytes = {.data = text, .n = length};
        return encode_prompt(o, m, &bytes, ids, err);
    }
    if (strcmp(key, "ids") != 0) return fail(err, "%s: key \"%s\", expected \"text\" or \"ids\"", what, key);
    if (!json_expect(&j, '[')) return false;
    if (json_next(&j, ']')) return json_expect(&j, '}') && json_end(&j);
    do {
        uint64_t id;
        if (!json_uint(&j, &id)) return false;
        if (id >= (uint64_t)m->config.vocab_size)
            return fail(err, "%s: id %" PRIu64 ", expected below %d", what, id, m->config.vocab_size);
        if (!tokens_append(ids, (int)id, err)) return false;
    } while (json_next(&j, ','));
    return json_expect(&j, ']') && json_expect(&j, '}') && json_end(&j);
}

// Every line that is not empty is a prompt.
static bool read_prompts(const Options *o, const Model *m, Bytes *file, Sequence **seqs, int *n, Error *err) {
    int line_number = 1;
    bool bom = file->n >= 3 && memcmp(file->data, "\xEF\xBB\xBF", 3) == 0; // as some editors begin a file
    for (size_t at = bom ? 3 : 0; at < file->n; line_number++) {
        char *line = file->data + at, *end = memchr(line, '\n', file->n - at);
        size_t length = end ? (size_t)(end - line) : file->n - at;
        at += length + 1;
        if (strspn(line, " \t\r") >= length) continue;
        Sequence *more = realloc(*seqs, (size_t)(*n + 1) * sizeof *more);
        if (!more) return fail(err, "out of memory: %d prompts", *n + 1);
        *seqs = more;
        more[*n] = (Sequence){.index = *n};
        char what[256];
        snprintf(what, sizeof what, "%s:%d", o->prompts, line_number);
        if (!parse_prompt_line(o, m, line, length, what, &more[(*n)++].prompt, err)) return false;
    }
    return *n > 0 || fail(err, "%s: no prompts", o->prompts);
}

static bool run_prompts(const Options *o, Model *m, double start, Error *err) {
    Bytes file = {0};
    Sequence *seqs = NULL;
    int n = 0;
    bool ok = read_file(&file, o->prompts, err) && bytes_append(&file, "", 1, err);
    file.n -= ok; // the terminator is there for strspn
    ok = ok && read_prompts(o, m, &file, &seqs, &n, err);
    int64_t longest = 0;
    for (int i = 0; ok && i < n; i++)
        longest = (int64_t)seqs[i].prompt.n > longest ? (int64_t)seqs[i].prompt.n : longest;
    int context = o->context                               ? o->context
                  : longest + o->n < m->config.max_seq_len ? (int)(longest + o->n)
                                                           : m->config.max_seq_len;
    int slots = o->batch ? o->batch : DEFAULT_BATCH;
    double begin = clock_seconds();
    ok = ok && run_sequences(o, m, seqs, n, slots < n ? slots : n, context, start, err);
    if (ok && !o->quiet) {
        double elapsed = clock_seconds() - begin;
        fprintf(stderr, "llama: %zu of %d prompts, %d at a time; %zu new tokens in %.2f s (%.0f tokens/s)",
                output.n_finished, n, m->kv.n_slots, output.n_tokens, elapsed, (double)output.n_tokens / elapsed);
        print_engine(m);
    }
    for (int i = 0; i < n; i++) sequence_free(&seqs[i]);
    free(seqs);
    free(file.data);
    return ok;
}

// ---- tokenize, detokenize -------------------------------------------------------------------------------------------

static int hex_digit(char c) {
    if (c >= '0' && c <= '9') return c - '0';
    c |= 0x20;
    return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

// Bytes of one line of hex, into the line's own memory.
static bool parse_hex(char *line, size_t n, size_t *n_bytes, Error *err) {
    if (n % 2) return fail(err, "--hex: %zu digits, expected an even number", n);
    for (size_t i = 0; i < n; i += 2) {
        int high = hex_digit(line[i]), low = hex_digit(line[i + 1]);
        if (high < 0 || low < 0) return fail(err, "--hex: \"%.2s\" is no byte", line + i);
        line[i / 2] = (char)(high << 4 | low);
    }
    *n_bytes = n / 2;
    return true;
}

static bool tokenize(const Options *o, const Model *m, const char *text, size_t n, Error *err) {
    TokenList ids = {0};
    bool ok = tokenizer_encode(&m->tokenizer, (const uint8_t *)text, n, o->special, &ids, err);
    if (ok && o->json) printf("{\"ids\": [");
    for (size_t i = 0; ok && i < ids.n; i++) printf("%s%d", !i ? "" : o->json ? ", " : " ", ids.ids[i]);
    if (ok) puts(o->json ? "]}" : "");
    tokens_free(&ids);
    return ok;
}

static bool detokenize(const Options *o, const Model *m, const char *text, size_t n, Error *err) {
    TokenList ids = {0};
    bool ok = parse_ids(text, n, m->config.vocab_size, &ids, err);
    Bytes bytes = {0};
    for (size_t i = 0, length; ok && i < ids.n; i++) {
        const uint8_t *token = tokenizer_bytes(&m->tokenizer, ids.ids[i], &length);
        ok = bytes_append(&bytes, token, length, err);
    }
    if (ok && o->json) printf("{\"text\": \"");
    if (ok && o->json) write_json_text(stdout, bytes.data, bytes.n);
    if (ok && o->json) puts("\"}");
    for (size_t i = 0; ok && o->hex && i < bytes.n; i++) printf("%02x", (uint8_t)bytes.data[i]);
    if (ok && bytes.n && !o->hex && !o->json) fwrite(bytes.data, 1, bytes.n, stdout);
    free(bytes.data);
    if (ok && o->hex) putchar('\n');
    tokens_free(&ids);
    return ok;
}

// Text as a whole, or with --hex line by line: a line in, a line out.
static bool run_tokenizer(const Options *o, const Model *m, Bytes *text, Error *err) {
    if (!o->hex) {
        if (!(o->tokenize ? tokenize : detokenize)(o, m, text->data, text->n, err)) return false;
        return flush_output(err);
    }
    for (size_t at = 0; at == 0 || at < text->n;) {
        char *line = text->data + at, *end = text->n > at ? memchr(line, '\n', text->n - at) : NULL;
        size_t n = end ? (size_t)(end - line) : text->n - at, length = n;
        at += n + 1;
        if (n && line[n - 1] == '\r') length = n = n - 1;
        if (o->tokenize && !parse_hex(line, n, &length, err)) return false;
        if (!(o->tokenize ? tokenize : detokenize)(o, m, line, length, err)) return false;
    }
    return flush_output(err);
}

// ---- perplexity -----------------------------------------------------------------------------------------------------

// Strided: windows of the context's length, each moved by half of it, so that every token but the first window's is
// predicted from at least half a window (https://huggingface.co/docs/transformers/perplexity).
static bool run_perplexity(const Options *o, Model *m, Error *err) {
    enum { DEFAULT_WINDOW = 2048 };
    int window = o->context                               ? o->context
                 : m->config.max_seq_len < DEFAULT_WINDOW ? m->config.max_seq_len
                                                          : DEFAULT_WINDOW;
    int stride = window / 2;
    if (window < 2) return fail(err, "-c %d: --perplexity needs a context of at least 2", window);
    Bytes text = {0};
    TokenList ids = {0};
    bool ok = read_file(&text, o->perplexity, err) && encode_prompt(o, m, &text, &ids, err);
    if (ok && ids.n < 2) ok = fail(err, "%s: %zu tokens, expected at least 2", o->perplexity, ids.n);
    ok = ok && start_model(o, m, 1, window, err);
    double sum = 0, squares = 0, start = clock_seconds();
    size_t scored = 0;
    for (size_t begin = 0, done = 1; ok && done < ids.n; begin += (size_t)stride) {
        size_t end = begin + (size_t)window < ids.n ? begin + (size_t)window : ids.n;
        m->kv.len[0] = 0;
        ok = done - 1 == begin || model_prefill(m, 0, ids.ids + begin, (int)(done - 1 - begin), 0, err);
        while (ok && done < end) { // the logits of token done-1 predict token done
            int rows = end - done < LOGIT_ROWS ? (int)(end - done) : LOGIT_ROWS;
            ok = model_prefill(m, 0, ids.ids + done - 1, rows, rows, err) && m->engine->read_logits(m, err);
            for (int r = 0; ok && r < rows; r++, done++) {
                const float *logits = m->logits + (size_t)r * (size_t)m->config.vocab_size;
                double nll = log_sum_exp(logits, m->config.vocab_size) - (double)logits[ids.ids[done]];
                if (!isfinite(nll)) ok = fail(err, "position %zu: the logits are not finite", done - 1);
                sum += nll;
                squares += nll * nll;
                scored++;
            }
            if (interrupted) ok = fail(err, "interrupted");
        }
    }
    if (ok) {
        double mean = sum / (double)scored, variance = squares / (double)scored - mean * mean;
        double error = exp(mean) * sqrt((variance > 0 ? variance : 0) / (double)scored),
               elapsed = clock_seconds() - start;
        printf("perplexity %.4f ± %.4f over %zu tokens, %.4f bits per byte; window %d, stride %d, %.0f tokens/s\n",
               exp(mean), error, scored, sum / log(2) / (double)text.n, window, stride, (double)scored / elapsed);
        ok = flush_output(err);
    }
    tokens_free(&ids);
    free(text.data);
    return ok;
}

// ---- compare, bench -------------------------------------------------------------------------------------------------

static bool run_compare(const Options *o, Model *m, Error *err) {
    Dump dump;
    if (!dump_open(&dump, o->compare, m->config.vocab_size, err)) return false;
    bool held = false;
    int context = o->context ? o->context : dump_context(&dump);
    bool ok =
        dump_context(&dump) <= context || fail(err, "-c %d: %s needs %d", context, o->compare, dump_context(&dump));
    ok = ok && start_model(o, m, 1, context, err) && compare_run(m, &dump, stdout, &interrupted, &held, err) &&
         flush_output(err);
    if (ok && !held) ok = fail(err, "%s: the comparison does not hold", o->compare);
    dump_close(&dump);
    return ok;
}

static bool run_bench(const Options *o, Model *m, Error *err) {
    BenchOptions options = {.version = VERSION,
                            .engine = o->engine,
                            .synthetic = o->synthetic,
                            .precision = precision_of(o),
                            .context = o->context,
                            .batch = o->batch,
                            .json = o->json,
                            .progress = isatty(STDERR_FILENO) && !o->quiet};
    return bench_run(m, &options, stdout, &interrupted, err) && flush_output(err);
}

// ---- main -----------------------------------------------------------------------------------------------------------

static bool run(const Options *o, double start, Error *err) {
    Model model;
    Bytes text = {0};
    bool tokenizer_only = o->tokenize || o->detokenize;
    // The prompt first: an unreadable one should not wait for gigabytes of weights.
    if ((o->prompt || o->prompt_file) && !read_prompt(o, &text, err)) {
        free(text.data);
        return false;
    }
    bool ok = o->synthetic ? model_open_synthetic(&model, o->synthetic, o->seed, err)
                           : model_open(&model, o->model, tokenizer_only, err);
    output.options = o;
    if (ok) {
        ok = tokenizer_only  ? run_tokenizer(o, &model, &text, err)
             : o->prompts    ? run_prompts(o, &model, start, err)
             : o->perplexity ? run_perplexity(o, &model, err)
             : o->compare    ? run_compare(o, &model, err)
             : o->bench      ? run_bench(o, &model, err)
                             : run_generate(o, &model, &text, start, err);
        model_close(&model);
    }
    free(text.data);
    return ok;
}

int main(int argc, char **argv) {
    double start = clock_seconds();
    Options o = {.n = 256, .sampler = {.top_p = 1}};
    Error err = {""};
    int status = EXIT_OK;
    // The first interrupt ends the answer after the token at hand; a second one ends the program at once.
    struct sigaction interrupt = {.sa_handler = on_interrupt, .sa_flags = (int)SA_RESETHAND};
    sigaction(SIGINT, &interrupt, NULL);
    sigaction(SIGTERM, &interrupt, NULL);
    signal(SIGPIPE, SIG_IGN); // a closed pipe is then an error of write, with a message and a status

    if (!parse_flags(&o, argc, argv, &err)) {
        status = EXIT_USAGE;
    } else if (o.help || o.version) {
        if (o.help)
            print_help();
        else
            printf("llama %s (engines: %s)\n", VERSION, model_engines());
        if (!flush_output(&err)) status = EXIT_FAILED;
    } else if (!check_flags(&o, &err)) {
        status = EXIT_USAGE;
    } else if (!run(&o, start, &err)) {
        status = EXIT_FAILED;
    }
    if (err.text[0] && !interrupted) fprintf(stderr, "llama: %s\n", err.text);
    return interrupted ? EXIT_INTERRUPTED : status;
}
