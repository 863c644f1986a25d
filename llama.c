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
#include <time.h>
#include <unistd.h>

#include "model/bench.h"
#include "model/compare.h"
#include "model/model.h"
#include "model/sampler.h"
#include "tokenizer/utf8.h"

#define VERSION "0.1"

enum { EXIT_OK = 0, EXIT_FAILED = 1, EXIT_USAGE = 2, EXIT_INTERRUPTED = 130 };
enum { MAX_STOPS = 16, MAX_LOGPROBS = 64, DEFAULT_CONTEXT = 4096 };

static volatile sig_atomic_t interrupted;

static void on_interrupt(int signal_number) {
    (void)signal_number;
    interrupted = 1;
}

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

// ---- flags ----------------------------------------------------------------------------------------------------------

typedef struct {
    const char *model, *prompt, *prompt_file, *stops[MAX_STOPS], *perplexity, *compare, *synthetic, *engine, *precision;
    int n_stops, n, context, logprobs;
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
    {"-c", "N", "context: tokens of prompt and answer (the model's, at most 4096 or what -n needs)", FLAG_INT, FIELD(context), 1, INT_MAX},
    {"-s", "SEED", "seed of the sampling (0)", FLAG_SEED, FIELD(seed), 0, 0},
    {"--temp", "T", "temperature; 0 takes the most likely token (0)", FLAG_FLOAT, FIELD(sampler.temperature), 0, 1e6},
    {"--top-k", "K", "sample among the K most likely; 0: all (0)", FLAG_INT, FIELD(sampler.top_k), 0, INT_MAX},
    {"--top-p", "P", "sample among the fewest that reach probability P (1)", FLAG_FLOAT, FIELD(sampler.top_p), 0, 1},
    {"--min-p", "P", "drop what is less than P times as likely as the most likely (0)", FLAG_FLOAT, FIELD(sampler.min_p), 0, 1},
    {"--stop", "STR", "end before this text; may be given several times", FLAG_TEXTS, FIELD(stops), 0, 0},
    {"--ignore-eos", NULL, "go on past the end-of-text token", FLAG_SWITCH, FIELD(ignore_eos), 0, 0},
    {"--special", NULL, "special tokens written in the prompt count as such, and are printed", FLAG_SWITCH, FIELD(special), 0, 0},
    {"--ids", NULL, "the prompt is a list of token ids; no BOS is added", FLAG_SWITCH, FIELD(ids), 0, 0},
    {"--echo", NULL, "print the prompt before the answer", FLAG_SWITCH, FIELD(echo), 0, 0},
    {"--json", NULL, "print one JSON object: ids, text, finish_reason, timings", FLAG_SWITCH, FIELD(json), 0, 0},
    {"--logprobs", "K", "with --json: log-probabilities of each token and of the K most likely", FLAG_INT, FIELD(logprobs), 1, MAX_LOGPROBS},
    {"--tokenize", NULL, "print the ids of the prompt, and no BOS; with --hex, of one hex text per line", FLAG_SWITCH, FIELD(tokenize), 0, 0},
    {"--detokenize", NULL, "print the bytes of the ids in the prompt; with --hex, in hex, line by line", FLAG_SWITCH, FIELD(detokenize), 0, 0},
    {"--hex", NULL, "text is hexadecimal, in --tokenize and --detokenize", FLAG_SWITCH, FIELD(hex), 0, 0},
    {"--perplexity", "FILE", "how well the model predicts a text", FLAG_TEXT, FIELD(perplexity), 0, 0},
    {"--compare", "DUMP", "compare with HuggingFace's tokens (scripts/dump_hf.py)", FLAG_TEXT, FIELD(compare), 0, 0},
    {"--bench", NULL, "measure this machine and this model", FLAG_SWITCH, FIELD(bench), 0, 0},
    {"--synthetic", "SHAPE", "weights from a seed: llama-3.2-1b, llama-3.2-3b, llama-3.1-8b, llama-3.1-70b", FLAG_TEXT, FIELD(synthetic), 0, 0},
    {"--engine", "NAME", "what computes (the fastest here)", FLAG_TEXT, FIELD(engine), 0, 0},
    {"--precision", "P", "bf16 or f32: inputs of products and the cache (bf16; engine cpu is always f32)", FLAG_TEXT, FIELD(precision), 0, 0},
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
        snprintf(left, sizeof left, "%s%s%s", flags[i].name, flags[i].value ? " " : "", flags[i].value ? flags[i].value : "");
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
            return fail(err, "%s %s: expected a whole number from %.0f to %.0f", flag->name, text, flag->least, flag->most);
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
    int modes = o->tokenize + o->detokenize + !!o->perplexity + !!o->compare + o->bench;
    bool prompt = o->prompt || o->prompt_file, reads_prompt = modes == 0 || o->tokenize || o->detokenize;
    if (!o->model && !o->synthetic) return fail(err, "no model; usage: llama MODEL.bin -p TEXT (--help lists the flags)");
    if (o->model && o->synthetic) return fail(err, "--synthetic %s and the model %s: expected one of them", o->synthetic, o->model);
    if (modes > 1) return fail(err, "--tokenize, --detokenize, --perplexity, --compare and --bench: expected one of them");
    if (o->synthetic && !o->bench) return fail(err, "--synthetic goes with --bench: such a model has no vocabulary");
    if (o->prompt && o->prompt_file) return fail(err, "-p and -f: expected one of them");
    if (reads_prompt && !prompt) return fail(err, "no prompt: -p TEXT or -f FILE");
    if (!reads_prompt && prompt) return fail(err, "a prompt, which --perplexity, --compare and --bench do not take");
    if (o->logprobs && !o->json) return fail(err, "--logprobs goes with --json");
    if (o->hex && !o->tokenize && !o->detokenize) return fail(err, "--hex goes with --tokenize or --detokenize");
    if (o->precision && strcmp(o->precision, "bf16") != 0 && strcmp(o->precision, "f32") != 0)
        return fail(err, "--precision %s: expected bf16 or f32", o->precision);
    if (o->engine && !model_has_engine(o->engine))
        return fail(err, "--engine %s: this build has: %s", o->engine, model_engines());
    return true;
}

// ---- input ----------------------------------------------------------------------------------------------------------

typedef struct {
    char *data;
    size_t n, capacity;
} Bytes;

static bool bytes_append(Bytes *b, const void *data, size_t n, Error *err) {
    if (n > b->capacity - b->n) {
        size_t capacity = 2 * b->capacity + n + 256;
        char *more = realloc(b->data, capacity);
        if (!more) return fail(err, "out of memory: %zu bytes of text", capacity);
        b->data = more;
        b->capacity = capacity;
    }
    if (n) memcpy(b->data + b->n, data, n);
    b->n += n;
    return true;
}

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
            return fail(err, "id \"%.*s\" at byte %zu: expected whole numbers below %d", shown, text + start, start, vocab_size);
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

// Writes bytes as the inside of a JSON string. What is not UTF-8 becomes U+FFFD, one for each maximal part of a character.
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

// The answer's text on its way out: bytes wait in `held` while they may be part of a character or of a stop text.
typedef struct {
    const Options *options;
    Bytes held, text; // text: with --json, all that was let through
    bool stopped;     // a stop text was found
} Answer;

static bool answer_emit(Answer *a, const char *data, size_t n, Error *err) {
    if (a->options->json) return bytes_append(&a->text, data, n, err);
    fwrite(data, 1, n, stdout);
    return n == 0 || flush_output(err);
}

// How many bytes at the end of the held text begin the stop text.
static size_t stop_overlap(const Bytes *held, const char *stop) {
    size_t length = strlen(stop), most = held->n < length - 1 ? held->n : length - 1;
    for (size_t n = most; n > 0; n--)
        if (memcmp(held->data + held->n - n, stop, n) == 0) return n;
    return 0;
}

static bool answer_add(Answer *a, const uint8_t *bytes, size_t n, Error *err) {
    if (!bytes_append(&a->held, bytes, n, err)) return false;
    size_t end = a->held.n; // of what may go
    for (int i = 0; i < a->options->n_stops; i++) {
        const char *stop = a->options->stops[i];
        size_t length = strlen(stop);
        for (size_t at = 0; at + length <= a->held.n && at < end; at++)
            if (memcmp(a->held.data + at, stop, length) == 0) {
                a->stopped = true;
                end = at;
            }
    }
    if (a->stopped) {
        a->held.n = end;
    } else {
        size_t wait = a->held.n ? utf8_incomplete_tail((uint8_t *)a->held.data, a->held.n) : 0;
        for (int i = 0; i < a->options->n_stops; i++) {
            size_t overlap = stop_overlap(&a->held, a->options->stops[i]);
            wait = overlap > wait ? overlap : wait;
        }
        end = a->held.n - wait;
    }
    if (!answer_emit(a, a->held.data, end, err)) return false;
    a->held.n -= end;
    if (a->held.n) memmove(a->held.data, a->held.data + end, a->held.n);
    return true;
}

// Nothing more comes: what was held goes out as it is.
static bool answer_end(Answer *a, Error *err) {
    size_t n = a->held.n;
    a->held.n = 0;
    return answer_emit(a, a->held.data, n, err);
}

// ---- generate -------------------------------------------------------------------------------------------------------

typedef struct {
    TokenList prompt, ids;
    const char *finish_reason;
    double ready, prefill, decode; // seconds: the program's start to the model's, the prompt, the tokens after the first
    double first;                  // from the start of the prompt to the first token's text
    float *logprobs;               // [ids.n][1 + K]: of the token, then of the K most likely
    int *top_ids;                  // [ids.n][K]
} Run;

static bool is_eos(const Config *c, int id) {
    for (int i = 0; i < c->n_eos; i++)
        if (c->eos_ids[i] == id) return true;
    return false;
}

static bool record_logprobs(const Options *o, const Model *m, Run *run, int step, int id) {
    int k = o->logprobs, vocab = m->config.vocab_size;
    float *row = run->logprobs + (size_t)step * (size_t)(1 + k);
    int *top = run->top_ids + (size_t)step * (size_t)k;
    double z = log_sum_exp(m->logits, vocab);
    row[0] = (float)((double)m->logits[id] - z);
    top_ids(m->logits, vocab, k < vocab ? k : vocab, top);
    for (int i = 0; i < k && i < vocab; i++) row[1 + i] = (float)((double)m->logits[top[i]] - z);
    return true;
}

// Text of a token as it is printed: end ids never, other special tokens with --special only.
static const uint8_t *printed_bytes(const Options *o, const Model *m, int id, size_t *n) {
    const uint8_t *bytes = tokenizer_bytes(&m->tokenizer, id, n);
    if (m->tokenizer.kind[id] == TOKEN_SPECIAL && !o->special) *n = 0;
    return bytes;
}

// Prompt in, tokens out, until something ends it.
static bool generate(const Options *o, Model *m, Sampler *sampler, int n_max, Run *run, Answer *answer, Error *err) {
    double start = seconds();
    if (!m->engine->prefill(m, run->prompt.ids, (int)run->prompt.n, 1, err)) return false;
    double after_prompt = seconds();
    run->prefill = after_prompt - start;
    run->finish_reason = "length";
    for (int step = 0; step < n_max; step++) {
        if (step > 0 && !m->engine->decode(m, run->ids.ids[step - 1], err)) return false;
        if (interrupted) {
            run->finish_reason = "interrupted";
            break;
        }
        int bad = find_not_finite(m->logits, m->config.vocab_size);
        if (bad >= 0)
            return fail(err, "position %d: logit %d is %f; the weights or the arithmetic are broken", m->kv.len - 1, bad,
                        (double)m->logits[bad]);
        int id = sampler_next(sampler, m->logits);
        if (o->logprobs) record_logprobs(o, m, run, step, id);
        if (!tokens_append(&run->ids, id, err)) return false;
        if (is_eos(&m->config, id) && !o->ignore_eos) {
            run->finish_reason = "stop";
            break;
        }
        size_t n;
        const uint8_t *bytes = printed_bytes(o, m, id, &n);
        if (!answer_add(answer, bytes, n, err)) return false;
        if (step == 0) run->first = seconds() - start;
        if (answer->stopped) {
            run->finish_reason = "stop_string";
            break;
        }
    }
    run->decode = seconds() - after_prompt;
    return answer_end(answer, err);
}

static void print_json(const Options *o, const Run *run, const Answer *answer) {
    printf("{\"index\": 0, ");
    write_json_ids(stdout, "prompt_ids", run->prompt.ids, run->prompt.n);
    write_json_ids(stdout, "ids", run->ids.ids, run->ids.n);
    printf("\"text\": \"");
    write_json_text(stdout, answer->text.data, answer->text.n);
    printf("\", \"finish_reason\": \"%s\", ", run->finish_reason);
    if (o->logprobs) {
        printf("\"logprobs\": [");
        for (size_t i = 0; i < run->ids.n; i++) {
            const float *row = run->logprobs + i * (size_t)(1 + o->logprobs);
            printf("%s{\"id\": %d, \"logprob\": %.6f, \"top\": [", i ? ", " : "", run->ids.ids[i], (double)row[0]);
            for (int k = 0; k < o->logprobs; k++)
                printf("%s{\"id\": %d, \"logprob\": %.6f}", k ? ", " : "", run->top_ids[i * (size_t)o->logprobs + (size_t)k],
                       (double)row[1 + k]);
            printf("]}");
        }
        printf("], ");
    }
    printf("\"timings\": {\"ready_ms\": %.3f, \"prefill_ms\": %.3f, \"first_token_ms\": %.3f, \"decode_ms\": %.3f, "
           "\"ms_per_token\": %.4f}}\n",
           run->ready * 1e3, run->prefill * 1e3, run->first * 1e3, run->decode * 1e3,
           run->ids.n > 1 ? run->decode * 1e3 / (double)(run->ids.n - 1) : 0.0);
}

static void print_statistics(const Options *o, const Model *m, const Run *run) {
    double per_token = run->ids.n > 1 ? run->decode / (double)(run->ids.n - 1) : 0;
    fprintf(stderr, "llama: ready in %.1f ms; prompt of %zu tokens in %.1f ms (%.0f tokens/s); %zu new tokens", run->ready * 1e3,
            run->prompt.n, run->prefill * 1e3, (double)run->prompt.n / run->prefill, run->ids.n);
    if (per_token > 0)
        fprintf(stderr, ", %.3f ms each (%.0f tokens/s, %.1f GB/s of weights)", per_token * 1e3, 1 / per_token,
                (double)weights_read_per_token(m) / per_token * 1e-9);
    fprintf(stderr, "; engine %s, %s", m->engine->name, m->precision == PRECISION_F32 ? "f32" : "bf16");
    if (o->sampler.temperature > 0) fprintf(stderr, ", seed %" PRIu64, o->seed);
    fprintf(stderr, "\n");
}

static void print_model(const Model *m) {
    const Config *c = &m->config;
    fprintf(stderr,
            "llama: dim %d, %d layers, %d heads of %d over %d K/V heads, hidden %d, vocabulary %d, at most %d tokens\n"
            "llama: %.3f GB of weights (%s), %.3f MB of K/V cache for a context of %d; engine %s, computing in %s\n",
            c->dim, c->n_layers, c->n_heads, c->head_dim, c->n_kv_heads, c->hidden_dim, c->vocab_size, c->max_seq_len,
            (double)m->weights.bytes * 1e-9, dtype_names[m->weights.dtype],
            (double)kv_index(c->n_layers, 0, c->n_kv_heads, m->kv.max_len, c->head_dim) * 8e-6, m->kv.max_len,
            m->engine->name, m->precision == PRECISION_F32 ? "float32" : "bf16");
}

// The context for a run that wants so many tokens in all: -c, or the smaller of the model's and max(4096, wanted).
static int context_for(const Options *o, const Model *m, int64_t wanted) {
    if (o->context) return o->context;
    int64_t length = wanted > DEFAULT_CONTEXT ? wanted : DEFAULT_CONTEXT;
    return length < m->config.max_seq_len ? (int)length : m->config.max_seq_len;
}

static bool start_model(const Options *o, Model *m, int context, Error *err) {
    if (context > m->config.max_seq_len)
        return fail(err, "a context of %d tokens, the model's maximum is %d", context, m->config.max_seq_len);
    Precision precision = o->precision && strcmp(o->precision, "f32") == 0 ? PRECISION_F32 : PRECISION_BF16;
    if (!model_start(m, o->engine, precision, context, err)) return false;
    if (o->verbose) print_model(m);
    return true;
}

static bool run_generate(const Options *o, Model *m, const Bytes *text, double start, Error *err) {
    Run run = {.finish_reason = "length"};
    Answer answer = {.options = o};
    Sampler sampler = {.candidates = NULL};
    bool ok = encode_prompt(o, m, text, &run.prompt, err);
    int context = ok ? context_for(o, m, (int64_t)run.prompt.n + o->n) : 0;
    if (ok && run.prompt.n == 0)
        ok = fail(err, "the prompt is empty, and %s", o->ids ? "--ids adds no BOS" : "this model has no BOS token to begin with");
    if (ok && run.prompt.n >= (size_t)context)
        ok = fail(err, "the prompt has %zu tokens, the context holds %d and needs room for one more%s", run.prompt.n, context,
                  o->context ? " (-c)" : "");
    int n_max = ok && o->n > context - (int)run.prompt.n ? context - (int)run.prompt.n : o->n;
    ok = ok && start_model(o, m, context, err) &&
         sampler_init(&sampler, o->sampler, m->config.vocab_size, o->seed, 0, err);
    if (ok && o->logprobs) {
        run.logprobs = calloc((size_t)n_max * (size_t)(1 + o->logprobs), sizeof *run.logprobs);
        run.top_ids = calloc((size_t)n_max * (size_t)o->logprobs, sizeof *run.top_ids);
        if (!run.logprobs || !run.top_ids) ok = fail(err, "out of memory: log-probabilities of %d tokens", n_max);
    }
    if (ok && n_max < o->n && !o->quiet)
        fprintf(stderr, "llama: the context of %d leaves room for %d of %d new tokens\n", context, n_max, o->n);
    const SamplerConfig *cut = &o->sampler;
    if (ok && cut->temperature == 0 && (cut->top_k || cut->top_p < 1 || cut->min_p > 0) && !o->quiet)
        fprintf(stderr, "llama: at --temp 0 the most likely token is taken; --top-k, --top-p and --min-p change nothing\n");
    run.ready = seconds() - start;
    for (size_t i = 0, n; ok && o->echo && i < run.prompt.n; i++) {
        const uint8_t *bytes = printed_bytes(o, m, run.prompt.ids[i], &n);
        ok = answer_emit(&answer, (const char *)bytes, n, err);
    }
    ok = ok && generate(o, m, &sampler, n_max, &run, &answer, err);
    if (ok && o->json) print_json(o, &run, &answer);
    if (ok && !o->json && isatty(STDOUT_FILENO)) putchar('\n');
    ok = ok && flush_output(err);
    if (ok && !o->quiet) print_statistics(o, m, &run);
    tokens_free(&run.prompt);
    tokens_free(&run.ids);
    free(run.logprobs);
    free(run.top_ids);
    free(answer.held.data);
    free(answer.text.data);
    sampler_free(&sampler);
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
    for (size_t i = 0; ok && i < ids.n; i++) printf("%s%d", i ? " " : "", ids.ids[i]);
    if (ok) putchar('\n');
    tokens_free(&ids);
    return ok;
}

static bool detokenize(const Options *o, const Model *m, const char *text, size_t n, Error *err) {
    TokenList ids = {0};
    bool ok = parse_ids(text, n, m->config.vocab_size, &ids, err);
    for (size_t i = 0, length; ok && i < ids.n; i++) {
        const uint8_t *bytes = tokenizer_bytes(&m->tokenizer, ids.ids[i], &length);
        if (!o->hex) fwrite(bytes, 1, length, stdout);
        for (size_t b = 0; o->hex && b < length; b++) printf("%02x", bytes[b]);
    }
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
    int window = o->context ? o->context : m->config.max_seq_len < DEFAULT_WINDOW ? m->config.max_seq_len : DEFAULT_WINDOW;
    int stride = window / 2;
    if (window < 2) return fail(err, "-c %d: --perplexity needs a context of at least 2", window);
    Bytes text = {0};
    TokenList ids = {0};
    bool ok = read_file(&text, o->perplexity, err) && encode_prompt(o, m, &text, &ids, err);
    if (ok && ids.n < 2) ok = fail(err, "%s: %zu tokens, expected at least 2", o->perplexity, ids.n);
    ok = ok && start_model(o, m, window, err);
    double sum = 0, squares = 0, start = seconds();
    size_t scored = 0;
    for (size_t begin = 0, done = 1; ok && done < ids.n; begin += (size_t)stride) {
        size_t end = begin + (size_t)window < ids.n ? begin + (size_t)window : ids.n;
        m->kv.len = 0;
        ok = done - 1 == begin || m->engine->prefill(m, ids.ids + begin, (int)(done - 1 - begin), 0, err);
        while (ok && done < end) { // the logits of token done-1 predict token done
            int rows = end - done < LOGIT_ROWS ? (int)(end - done) : LOGIT_ROWS;
            ok = m->engine->prefill(m, ids.ids + done - 1, rows, rows, err);
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
        double error = exp(mean) * sqrt((variance > 0 ? variance : 0) / (double)scored), elapsed = seconds() - start;
        printf("perplexity %.4f ± %.4f over %zu tokens, %.4f bits per byte; window %d, stride %d, %.0f tokens/s\n", exp(mean),
               error, scored, sum / log(2) / (double)text.n, window, stride, (double)scored / elapsed);
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
    bool ok = dump_context(&dump) <= context || fail(err, "-c %d: %s needs %d", context, o->compare, dump_context(&dump));
    ok = ok && start_model(o, m, context, err) && compare_run(m, &dump, stdout, &interrupted, &held, err) && flush_output(err);
    if (ok && !held) ok = fail(err, "%s: the comparison does not hold", o->compare);
    dump_close(&dump);
    return ok;
}

static bool run_bench(const Options *o, Model *m, Error *err) {
    return start_model(o, m, context_for(o, m, BENCH_CONTEXT), err) && bench_run(m, o->json, stdout, &interrupted, err) &&
           flush_output(err);
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
    if (ok) {
        ok = tokenizer_only    ? run_tokenizer(o, &model, &text, err)
             : o->perplexity   ? run_perplexity(o, &model, err)
             : o->compare      ? run_compare(o, &model, err)
             : o->bench        ? run_bench(o, &model, err)
                               : run_generate(o, &model, &text, start, err);
        model_close(&model);
    }
    free(text.data);
    return ok;
}

int main(int argc, char **argv) {
    double start = seconds();
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
