// llama: loads a model.bin and continues a prompt. main and what it can do: generate, chat, tokenize, perplexity,
// compare, bench, quantize.
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "cli/converse.h"
#include "cli/flags.h"
#include "cli/fresh_prompt.h"
#include "cli/input.h"
#include "cli/interrupt.h"
#include "cli/output.h"
#include "cli/prompts.h"
#include "cli/version.h"
#include "model/file/checkpoint.h"
#include "model/file/quantize.h"
#include "model/generate/generate.h"
#include "model/measure/bench.h"
#include "model/measure/compare.h"
#include "model/measure/perplexity.h"
#include "model/model.h"
#include "model/parallel/lead.h"
#include "model/parallel/processes.h"
#include "model/synthetic.h"
#include "model/threads.h"
#include "tokenizer/encode.h"

enum { EXIT_OK = 0, EXIT_FAILED = 1, EXIT_USAGE = 2, EXIT_INTERRUPTED = 130 };
// Tokens that a context has room for in an answer without a limit, and in one to a message, at least.
enum { ROOM_WITHOUT_LIMIT = 1024 };
// Lines of --prompts whose errors are on standard error, too.
enum { MAX_REPORTED = 10 };

// ---- starting -------------------------------------------------------------------------------------------------------

// The context for a run that needs so many tokens in all: -c, or the smaller of the model's and max(4096, wanted).
static int context_for(const Options *o, const Model *m, int64_t wanted) {
    if (o->context) return o->context;
    int64_t length = wanted > DEFAULT_CONTEXT ? wanted : DEFAULT_CONTEXT;
    return length < m->config.max_seq_len ? (int)length : m->config.max_seq_len;
}

// New tokens that a context is made for, of an answer of n at most: where that is no limit a few.
static int new_tokens(int n) {
    return n < NO_LIMIT ? n : ROOM_WITHOUT_LIMIT;
}

static Precision precision_of(const Options *o) {
    int precision = PRECISION_BF16;
    if (!o->precision) return PRECISION_DEFAULT;
    while (strcmp(o->precision, precision_names[precision]) != 0) precision++; // flags_check knows it
    return (Precision)precision;
}

// Says what changes nothing on the engine that runs.
static void print_engine_notes(const Options *o, const Model *m) {
    const char *engine = m->engine->name, *omp = getenv("OMP_NUM_THREADS");
    bool threads = strcmp(engine, "cpu") == 0; // where their number counts
    if (o->quiet) return;
    if (o->threads && !threads) print_message("-t changes nothing on engine %s", engine);
    if (threads && !o->threads && omp && *omp && !omp_threads(omp))
        print_message("OMP_NUM_THREADS=%s is ignored, expected a whole number from 1 to %d; %d threads compute", omp,
                      MAX_THREADS, threads_count());
}

// Where --lookup or --draft asks for candidates: before the model is started. The draft's memory comes first.
static bool start_speculation(const Options *o, Model *m, Speculation *s, int slots, int context, Error *err) {
    if (!o->lookup && !o->draft) return true;
    if (!model_choose(m, o->engine, precision_of(o), err) ||
        !speculation_prepare(m, m->sequences ? m->sequences : slots, err))
        return false;
    return o->draft ? draft_open(s, m, o->draft, slots, context, err) : lookup_open(s, m, slots, err);
}

// s: of runs that answer; NULL: of others.
static bool start_model(const Options *o, Model *m, Speculation *s, int slots, int context, Error *err) {
    if (context > m->config.max_seq_len)
        return fail(err, "a context of %d tokens, the model's maximum is %d", context, m->config.max_seq_len);
    if (isatty(STDERR_FILENO) && !o->quiet) m->progress = show_progress;
    m->interrupted = &interrupted;
    m->verbose = o->verbose;
    m->kv_memory = o->kv_memory;
    if (s && !start_speculation(o, m, s, slots, context, err)) return false;
    if (!model_start(m, o->engine, precision_of(o), slots, context, err)) return false;
    print_engine_notes(o, m);
    if (o->verbose) print_model(m, o);
    if (o->verbose && s && s->model) print_speculation(s);
    return true;
}

// Says what will not be as asked.
static void print_notes(const Options *o, const Sequence *seqs, int n, int context) {
    int cut = 0, room = 0;
    bool greedy = true;
    for (int i = 0; i < n; i++) {
        int left = context - (int)seqs[i].prompt.n;
        if (left < seqs[i].config.n && seqs[i].config.n < NO_LIMIT) cut++, room = left;
        greedy = greedy && seqs[i].config.sampler.temperature == 0;
    }
    if (cut && o->prompts)
        print_message("the context of %d leaves room for fewer new tokens than asked for after %d of %d prompts",
                      context, cut, n);
    else if (cut)
        print_message("the context of %d leaves room for %d of %d new tokens", context, room, o->n);
    if (o->prompts && greedy) flags_print_greedy_notes(o);
}

// ---- generate -------------------------------------------------------------------------------------------------------

// A run of sequences, and what it has printed so far.
typedef struct {
    const Options *options;
    const Model *model;
    const Chat *chat;         // the template, where answers are in conversations; NULL: none is
    const Prompts *prompts;   // NULL: one prompt
    double start, ready;      // of the program, on the clock; seconds from then to the model's
    double begin;             // of the answers, on the clock
    Speculation speculation;  // where it is asked for
    SpeculationCounts counts; // of the finished sequences
    const Sequence *seqs;
    int n_seqs;
    size_t n_finished, n_tokens;
    int next_line; // of the prompts' lines, to be printed
} Run;

static bool print_text(void *context, Sequence *seq, const char *data, size_t n, Error *err) {
    (void)context, (void)seq;
    text_write(data, n);
    return flush_output(err);
}

// The lines of --prompts that have no answer, from the next to be printed up to this one.
static bool print_errors(Run *run, int end, Error *err) {
    for (; run->next_line < end; run->next_line++)
        if (!print_line_error(run->next_line, &run->prompts->lines[run->next_line], err)) return false;
    return true;
}

static bool print_end(void *context, Sequence *seq, Error *err) {
    Run *run = context;
    run->n_finished++;
    run->n_tokens += seq->ids.n;
    speculation_count(&run->counts, &seq->counts);
    if (run->prompts) {
        if (isatty(STDOUT_FILENO)) clear_progress();
        bool ok = print_errors(run, seq->index, err) &&
                  print_sequence(seq, run->model, &run->prompts->lines[seq->index].other, run->ready, err);
        run->next_line = seq->index + 1;
        sequence_free_results(seq); // one of many: only what is counted stays
        return ok;
    }
    if (run->options->json) return print_sequence(seq, run->model, NULL, run->ready, err);
    text_end();
    if (run->options->chat || (isatty(STDOUT_FILENO) && text_line_open())) text_end_line();
    return flush_output(err);
}

static void show_run(void *context) {
    const Run *run = context;
    show_answers(run->seqs, run->n_seqs, run->begin);
}

// On a model that has been started.
static bool run_sequences(Run *run, Model *m, Sequence *seqs, int n, Error *err) {
    const Options *o = run->options;
    GenerateSink sink = {.text = o->json || o->prompts ? NULL : print_text, .finished = print_end, .context = run};
    for (int i = 0; i < n; i++) seqs[i].config.speculation = run->speculation.model ? &run->speculation : NULL;
    if (!o->quiet) print_notes(o, seqs, n, m->kv.max_len);
    if (!o->quiet && run->chat) print_chat_note(m);
    run->begin = clock_seconds();
    run->ready = run->begin - run->start;
    run->seqs = seqs;
    run->n_seqs = n;
    if (o->prompts && m->progress) { // of all prompts rather than of those that begin
        sink.stepped = show_run;
        m->progress = NULL;
    }
    interrupt_spare_writes();
    for (size_t i = 0, length; o->echo && i < seqs[0].prompt.n; i++) {
        const uint8_t *bytes = printed_bytes(m, o->special, seqs[0].prompt.ids[i], &length);
        if (o->json ? !bytes_append(&seqs[0].text, bytes, length, err)
                    : !print_text(run, seqs, (const char *)bytes, length, err))
            return false;
    }
    bool ok = generate(m, seqs, n, &sink, err);
    if (ok && o->verbose && run->speculation.model) print_speculation_counts(&run->speculation, &run->counts);
    return ok;
}

static bool run_generate(const Options *o, Model *m, const Bytes *text, double start, Error *err) {
    Run run = {.options = o, .model = m, .start = start};
    Sequence seq = {.config = generate_config(o, NULL)};
    bool ok =
        (o->ids || check_prompt_bytes(o, m, text->n, "the prompt", err)) && encode_prompt(o, m, text, &seq.prompt, err);
    int context = context_for(o, m, (int64_t)seq.prompt.n + new_tokens(o->n));
    ok = ok && check_prompt(o, &seq, context, o->ids, err) && start_model(o, m, &run.speculation, 1, context, err) &&
         check_pages(m, &seq, err) && run_sequences(&run, m, &seq, 1, err);
    if (ok && !o->quiet && !o->json && o->n == NO_LIMIT) print_length_note(o, &seq, &m->kv, NULL);
    if (ok && !o->quiet) print_statistics(m, o, &seq, run.ready);
    sequence_free(&seq);
    speculation_close(&run.speculation);
    return ok;
}

// ---- chat -----------------------------------------------------------------------------------------------------------

static bool run_chat(const Options *o, Model *m, Error *err) {
    Chat chat;
    Speculation speculation = {.model = NULL};
    bool ok = open_chat(o, m, &chat, err) && start_model(o, m, &speculation, 1, context_for(o, m, 0), err) &&
              interrupt_begin_chat(err) && converse(o, m, &chat, speculation.model ? &speculation : NULL, err);
    speculation_close(&speculation);
    return ok;
}

// One message, and its answer.
static bool run_message(const Options *o, Model *m, const Bytes *text, double start, Error *err) {
    Chat chat;
    Run run = {.options = o, .model = m, .chat = &chat, .start = start};
    Sequence seq = {.index = 0};
    int64_t room = new_tokens(o->n) > ROOM_WITHOUT_LIMIT ? new_tokens(o->n) : ROOM_WITHOUT_LIMIT;
    bool ok = open_chat(o, m, &chat, err) && check_prompt_bytes(o, m, text->n, "the message", err);
    if (ok) seq.config = generate_config(o, &chat);
    ok = ok && encode_message(o, &chat, text, &seq.prompt, err);
    int context = context_for(o, m, (int64_t)seq.prompt.n + room);
    ok = ok && check_prompt(o, &seq, context, false, err) && start_model(o, m, &run.speculation, 1, context, err) &&
         check_pages(m, &seq, err) && run_sequences(&run, m, &seq, 1, err);
    if (ok && !o->quiet && !o->json) print_length_note(o, &seq, &m->kv, NULL);
    if (ok && !o->quiet) print_statistics(m, o, &seq, run.ready);
    sequence_free(&seq);
    speculation_close(&run.speculation);
    return ok;
}

// ---- many prompts ---------------------------------------------------------------------------------------------------

// Says that a line has no answer, the n-th of such, if it is one of the first few.
static void report_line(const Options *o, const PromptLine *line, int n) {
    if (n > MAX_REPORTED) return;
    Error message = {""};
    fail(&message, "%s:%d: %s", input_name(o->prompts), line->number, line->error);
    print_message("%s", message.text);
}

// Says which lines have no answer, and how many there are.
static int report_errors(const Options *o, const Prompts *p) {
    int n = 0;
    for (int i = 0; i < p->n; i++)
        if (p->lines[i].error) report_line(o, &p->lines[i], ++n);
    return n;
}

// Lines that there are never pages enough for have an error and no sequence. n_errors: of the lines so far.
static bool refuse_lines(const Options *o, const Model *m, Prompts *p, int *n_errors, Error *err) {
    int n = p->n_seqs;
    p->n_seqs = 0;
    for (int i = 0; i < n; i++) {
        Sequence *seq = &p->seqs[i];
        PromptLine *line = &p->lines[seq->index];
        Error why = {""};
        if (check_pages(m, seq, &why)) {
            p->seqs[p->n_seqs++] = *seq;
            continue;
        }
        sequence_free(seq);
        if (!(line->error = strdup(why.text))) fail(err, "out of memory: what is wrong with line %d", line->number);
        if (line->error) report_line(o, line, ++*n_errors);
    }
    return !err->text[0];
}

// What the longest prompt and answer need, up to what the model has; for answers without a limit as much as one alone
// has.
static int context_of_prompts(const Options *o, const Model *m, const Prompts *p) {
    int64_t longest = 1;
    bool limited = true;
    for (int i = 0; i < p->n_seqs; i++) {
        const Sequence *seq = &p->seqs[i];
        int64_t length = (int64_t)seq->prompt.n + new_tokens(seq->config.n);
        longest = length > longest ? length : longest;
        limited = limited && seq->config.n < NO_LIMIT;
    }
    if (o->context || !limited) return context_for(o, m, longest);
    return longest < m->config.max_seq_len ? (int)longest : m->config.max_seq_len;
}

static bool run_prompts(const Options *o, Model *m, double start, Error *err) {
    Prompts p = {.n = 0};
    bool ok = prompts_read(o, m, &p, err);
    int n_errors = ok ? report_errors(o, &p) : 0, slots = o->batch ? o->batch : DEFAULT_BATCH;
    Run run = {.options = o, .model = m, .chat = p.chat.tokenizer ? &p.chat : NULL, .prompts = &p, .start = start};
    double begin = clock_seconds();
    m->sequences = slots; // whatever the number of prompts: theirs do not depend on it
    if (ok && p.n_seqs)
        ok = start_model(o, m, &run.speculation, slots < p.n_seqs ? slots : p.n_seqs, context_of_prompts(o, m, &p),
                         err) &&
             refuse_lines(o, m, &p, &n_errors, err) && (p.n_seqs == 0 || run_sequences(&run, m, p.seqs, p.n_seqs, err));
    if (ok && !interrupted) ok = print_errors(&run, p.n, err);
    if (ok && p.n_seqs && !o->quiet) {
        double elapsed = clock_seconds() - begin;
        begin_message();
        fprintf(stderr, "llama: %zu of %d prompts, %d at a time; %zu new tokens in %.2f s (%.0f tokens/s)",
                run.n_finished, p.n, m->kv.n_slots, run.n_tokens, elapsed, (double)run.n_tokens / elapsed);
        print_engine(m, o);
        if (o->verbose) print_sharing(p.seqs, p.n_seqs);
    }
    if (ok && n_errors && !interrupted)
        ok = fail(err, "%s: %d of %d lines have an error and no answer", input_name(o->prompts), n_errors, p.n);
    prompts_free(&p);
    speculation_close(&run.speculation);
    return ok;
}

// ---- tokenize, detokenize -------------------------------------------------------------------------------------------

static int hex_digit(char c) {
    if (c >= '0' && c <= '9') return c - '0';
    c |= 0x20;
    return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

// Bytes of one line of hex, into the line's own memory. number: the line's, from 1.
static bool parse_hex(char *line, size_t n, int number, size_t *n_bytes, Error *err) {
    if (n % 2) return fail(err, "--hex: line %d: %zu digits, expected an even number", number, n);
    for (size_t i = 0; i < n; i += 2) {
        int high = hex_digit(line[i]), low = hex_digit(line[i + 1]);
        if (high < 0 || low < 0) return fail(err, "--hex: line %d: \"%.2s\" is no byte", number, line + i);
        line[i / 2] = (char)(high << 4 | low);
    }
    *n_bytes = n / 2;
    return true;
}

// other: keys to come back with them, in JSON; NULL: none.
static void print_ids(const Options *o, const TokenList *ids, const Bytes *other) {
    if (o->json) printf("{\"ids\": [");
    for (size_t i = 0; i < ids->n; i++) printf("%s%d", !i ? "" : o->json ? ", " : " ", ids->ids[i]);
    if (o->json) {
        putchar(']');
        end_json_object(other);
    } else
        putchar('\n');
}

// With --chat a conversation that the text begins.
static bool tokenize(const Options *o, const Model *m, char *text, size_t n, Error *err) {
    TokenList ids = {0};
    Chat chat;
    Bytes message = {.data = text, .n = n};
    if (!o->chat) hint_special(o, &m->tokenizer, &message, false);
    bool ok = o->chat ? open_chat(o, m, &chat, err) && encode_message(o, &chat, &message, &ids, err)
                      : tokenizer_encode(&m->tokenizer, (const uint8_t *)text, n, o->special, &ids, err);
    if (ok) print_ids(o, &ids, NULL);
    tokens_free(&ids);
    return ok;
}

static bool detokenize(const Options *o, const Model *m, char *text, size_t n, Error *err) {
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
    if (ok && !o->hex && !o->json) {
        text_write(bytes.data, bytes.n);
        text_end();
    }
    free(bytes.data);
    if (ok && o->hex) putchar('\n');
    tokens_free(&ids);
    return ok;
}

// A line of ids for each line of a prompts file; an empty one, or with --json its error, where there are none.
static bool tokenize_prompts(const Options *o, const Model *m, Error *err) {
    Prompts p = {.n = 0};
    bool ok = prompts_read(o, m, &p, err);
    int n_errors = ok ? report_errors(o, &p) : 0;
    if (ok && !o->quiet && p.chat.tokenizer) print_chat_note(m);
    for (int i = 0, s = 0; ok && i < p.n; i++) {
        if (!p.lines[i].error)
            print_ids(o, &p.seqs[s++].prompt, &p.lines[i].other);
        else if (o->json)
            ok = print_line_error(i, &p.lines[i], err);
        else
            putchar('\n');
    }
    ok = ok && flush_output(err);
    if (ok && n_errors)
        ok = fail(err, "%s: %d of %d lines have an error and no ids", input_name(o->prompts), n_errors, p.n);
    prompts_free(&p);
    return ok;
}

// Text as a whole, or with --hex line by line: a line in, a line out.
static bool run_tokenizer(const Options *o, const Model *m, Bytes *text, Error *err) {
    if (o->prompts) return tokenize_prompts(o, m, err);
    if (!o->hex) {
        if (!(o->tokenize ? tokenize : detokenize)(o, m, text->data, text->n, err)) return false;
        return flush_output(err);
    }
    int number = 1;
    for (size_t at = 0; at == 0 || at < text->n; number++) {
        char *line = text->data + at, *end = text->n > at ? memchr(line, '\n', text->n - at) : NULL;
        size_t n = end ? (size_t)(end - line) : text->n - at, length = n;
        at += n + 1;
        if (n && line[n - 1] == '\r') length = n = n - 1;
        if (o->tokenize && !parse_hex(line, n, number, &length, err)) return false;
        if (!(o->tokenize ? tokenize : detokenize)(o, m, line, length, err)) return false;
    }
    return flush_output(err);
}

// ---- perplexity -----------------------------------------------------------------------------------------------------

static bool run_perplexity(const Options *o, Model *m, Error *err) {
    bool half = o->windows && strcmp(o->windows, "half") == 0;
    int most = m->config.max_seq_len, window = o->context                 ? o->context
                                               : most < PERPLEXITY_WINDOW ? most
                                                                          : PERPLEXITY_WINDOW;
    int stride = half ? window : o->stride ? o->stride : window / 2, least = half ? 3 : 2;
    if (window < least) return fail(err, "-c %d: --perplexity needs a context of at least %d", window, least);
    if (stride >= window && !half)
        return fail(err, "--stride %d: expected below the context of %d (-c)", stride, window);
    Bytes text = {0};
    TokenList ids = {0};
    Perplexity p = {.n = 0};
    bool ok = read_file(&text, o->perplexity, err) && encode_prompt(o, m, &text, &ids, err);
    if (ok && half && ids.n < (size_t)window)
        ok = fail(err, "%s: %zu tokens, expected at least %d: one full window (-c)", input_name(o->perplexity), ids.n,
                  window);
    if (ok && ids.n < 2) ok = fail(err, "%s: %zu tokens, expected at least 2", input_name(o->perplexity), ids.n);
    ok = ok && start_model(o, m, NULL, 1, window, err);
    if (ok) {
        interrupt_spare_writes();
        ok = perplexity_run(m, &ids, half ? WINDOWS_HALF : WINDOWS_SLIDING, stride, &p, err);
        clear_progress();
    }
    if (p.n && (ok || is_interrupt(err))) { // the value so far
        Error written = {""};
        perplexity_print(&p, o->json, stdout);
        if (!flush_output(&written)) *err = written, ok = false;
    }
    tokens_free(&ids);
    free(text.data);
    return ok;
}

// ---- compare, bench -------------------------------------------------------------------------------------------------

static bool run_compare(const Options *o, Model *m, Error *err) {
    Dump dump;
    if (!dump_open(&dump, o->compare, m->config.vocab_size, err)) return false;
    bool passed = false;
    int context = o->context ? o->context : dump_context(&dump);
    bool ok =
        dump_context(&dump) <= context || fail(err, "-c %d: %s needs %d", context, o->compare, dump_context(&dump));
    ok = ok && start_model(o, m, NULL, 1, context, err) && compare_run(m, &dump, stdout, &passed, err) &&
         flush_output(err);
    if (ok && !passed) ok = fail(err, "%s: the comparison does not hold", o->compare);
    dump_close(&dump);
    return ok;
}

typedef struct {
    const Options *options;
    const char *engine;
} Fresh;

static bool measure_fresh_prompt(void *context, int tokens, double *seconds, Error *err) {
    const Fresh *f = context;
    if (processes.count > 1) return fail(err, "not measured: that takes processes of one GPU each");
    return fresh_prompt(f->options, f->engine, tokens, seconds, err);
}

static bool run_bench(const Options *o, Model *m, Error *err) {
    Fresh fresh = {.options = o};
    BenchOptions options = {.version = version_number,
                            .engine = o->engine,
                            .synthetic = o->synthetic,
                            .precision = precision_of(o),
                            .context = o->context,
                            .batch = o->batch,
                            .sampler = o->sampler,
                            .json = o->json,
                            .progress = isatty(STDERR_FILENO) && !o->quiet,
                            .fresh_prompt = measure_fresh_prompt,
                            .fresh_context = &fresh};
    m->interrupted = &interrupted;
    if (!model_choose(m, o->engine, options.precision, err)) return false;
    fresh.engine = m->engine->name;
    print_engine_notes(o, m);
    return bench_run(m, platform_of(m->engine), &options, stdout, err) && flush_output(err);
}

// ---- quantize -------------------------------------------------------------------------------------------------------

static bool keeps_output(const Options *o) {
    return o->output_weights && strcmp(o->output_weights, "keep") == 0;
}

// Of the output matrix, if it is not kept.
static QuantType output_type(const Options *o, QuantType layers) {
    QuantType output = layers;
    if (layers.dtype == DTYPE_U8) output = (QuantType){.dtype = DTYPE_I8};
    if (o->output_weights) quant_parse(o->output_weights, &output);
    return output;
}

// The text of --calibrate, and engine cpu, which runs it as matrices are rounded.
static bool start_calibration(const Options *o, Model *m, TokenList *ids, Calibration *calibration, Error *err) {
    Options run = *o;
    Bytes text = {0};
    int most = m->config.max_seq_len, window = most < CALIBRATE_WINDOW ? most : CALIBRATE_WINDOW;
    run.engine = "cpu";
    run.precision = NULL; // that engine's own
    m->gpus = 1;
    bool ok = read_file(&text, o->calibrate, err) && encode_prompt(o, m, &text, ids, err);
    free(text.data);
    if (ok && ids->n < 2) // BOS alone is no text
        ok = fail(err, "%s: %zu tokens, expected at least 2", input_name(o->calibrate), ids->n);
    return ok && start_model(&run, m, NULL, 1, window, err) && calibration_init(calibration, m, ids, err);
}

static bool run_quantize(const Options *o, Model *m, Error *err) {
    QuantizeOptions options = {.quantises_output = !keeps_output(o)};
    QuantizeSummary summary;
    Calibration calibration = {.model = m};
    TokenList ids = {0};
    double begin = clock_seconds();
    quant_parse(o->quantize, &options.layers);
    options.output = output_type(o, options.layers);
    if (isatty(STDERR_FILENO) && !o->quiet) m->progress = show_progress;
    m->interrupted = &interrupted;
    interrupt_catch_hangup();
    const bool calibrated = o->calibrate && !weights_are_quantised(m); // which is refused
    if (calibrated) options.calibration = &calibration;
    bool ok = (!calibrated || start_calibration(o, m, &ids, &calibration, err)) &&
              quantize_model(m, o->output, &options, &summary, err);
    calibration_free(&calibration);
    tokens_free(&ids);
    model_stop(m);
    if (!ok) return false;
    clear_progress();
    print_quantised(&summary, m, o, clock_seconds() - begin);
    quantize_free(&summary);
    return flush_output(err);
}

// ---- main -----------------------------------------------------------------------------------------------------------

static bool open_synthetic(const Options *o, Model *m, Error *err) {
    QuantType numbers = {.dtype = DTYPE_BF16}, layers = numbers;
    if (o->weights) quant_parse(o->weights, &layers);
    return synthetic_open(m, o->synthetic, o->seed, err) &&
           synthetic_set_types(m, layers, keeps_output(o) ? numbers : output_type(o, layers), err);
}

// Whether several processes compute this run together; others are rank 0's alone.
static bool by_processes(const Options *o) {
    return processes.count > 1 && (flags_run(o) & RUNS_COMPUTE);
}

// Collective, by several processes: all have the same model.
static bool open_model(const Options *o, Model *m, Error *err) {
    char program[96];
    bool ok = !err->text[0] && (o->synthetic ? open_synthetic(o, m, err)
                                             : checkpoint_open(m, o->model, o->tokenize || o->detokenize, err));
    if (ok) m->gpus = o->gpus;
    if (!by_processes(o)) return ok;
    snprintf(program, sizeof program, "llama %s (commit %s)", version_number, version_commit);
    bool same = lead_agree(ok ? m : NULL, program, err) && ok;
    if (ok && !same) model_close(m);
    if (!same) return false;
    m->gpus = processes.count;
    m->by_processes = true;
    return true;
}

static bool run(const Options *o, double start, Error *err) {
    Model model;
    Bytes text = {0};
    bool tokenizer_only = o->tokenize || o->detokenize, prompt = o->prompt || o->prompt_file;
    // The prompt first: an unreadable one should not wait for gigabytes of weights.
    if (prompt) read_prompt(o, &text, err);
    bool ok = open_model(o, &model, err);
    if (ok) {
        if (!o->quiet) flags_print_notes(o);
        ok = tokenizer_only  ? run_tokenizer(o, &model, &text, err)
             : o->chat       ? prompt ? run_message(o, &model, &text, start, err) : run_chat(o, &model, err)
                   : o->prompts ? run_prompts(o, &model, start, err)
             : o->perplexity ? run_perplexity(o, &model, err)
             : o->compare    ? run_compare(o, &model, err)
             : o->bench      ? run_bench(o, &model, err)
             : o->quantize   ? run_quantize(o, &model, err)
                             : run_generate(o, &model, &text, start, err);
        if (ok && o->tokenize && o->chat && !o->quiet) print_chat_note(&model);
        model_close(&model);
    }
    free(text.data);
    return ok;
}

static bool fill_cache(Model *m, void *context, Error *err) {
    (void)context;
    return platform_of(m->engine)->fill_cache(m, err);
}

// On the other ranks: what rank 0 says, up to its exit status.
static int run_following(const Options *o, Error *err) {
    Model model;
    if (!by_processes(o)) return EXIT_OK;
    if (!open_model(o, &model, err)) return EXIT_FAILED;
    model.interrupted = &interrupted;
    model.verbose = o->verbose;
    int status = follow(&model, o->bench ? fill_cache : NULL, NULL);
    model_close(&model);
    return status;
}

static bool check_processes(const Options *o, Error *err) {
    if (!by_processes(o)) return true;
    if (o->gpus > 1)
        return fail(err, "--gpus %d in each of %d processes: expected one process, or one GPU in each", o->gpus,
                    processes.count);
    if (o->engine && strcmp(o->engine, "cpu") == 0)
        return fail(err, "--engine cpu computes in one process, %d were started", processes.count);
    return model_has_engine("cublas") ||
           fail(err, "%d processes were started, but this build has no engine for GPUs, only: %s", processes.count,
                model_engines());
}

static bool read_flags(Options *o, int argc, char **argv, Error *err) {
    return flags_parse(o, argc, argv, err) &&
           (o->help || o->version || (flags_check(o, err) && check_processes(o, err)));
}

static bool print_about(const Options *o, Error *err) {
    if (o->help)
        flags_print_help(stdout);
    else
        printf("llama %s (commit %s; engines: %s; %s; %s)\n", version_number, version_commit, model_engines(),
               version_cuda, processes_library);
    return flush_output(err);
}

// A stream that is closed stays of no use: its number must not go to the next file that is opened, the model say.
static void hold_closed_streams(void) {
    for (int fd = STDIN_FILENO; fd <= STDERR_FILENO; fd++)
        if (fcntl(fd, F_GETFD) < 0) (void)!open("/dev/null", fd == STDIN_FILENO ? O_WRONLY : O_RDONLY);
}

int main(int argc, char **argv) {
    double start = clock_seconds();
    Options o = flags_default();
    Error err = {""};
    int status = EXIT_OK;
    hold_closed_streams();
    interrupt_begin();
    if (!processes_begin(print_message, &err))
        status = EXIT_FAILED;
    else if (!read_flags(&o, argc, argv, &err))
        status = EXIT_USAGE;
    threads_set(o.threads);
    if (!processes_agree(&err))
        status = status ? status : EXIT_USAGE; // another process has other flags
    else if (o.help || o.version)
        status = processes.rank > 0 || print_about(&o, &err) ? EXIT_OK : EXIT_FAILED;
    else if (processes.rank > 0)
        status = run_following(&o, &err);
    else if (!run(&o, start, &err))
        status = EXIT_FAILED;
    clear_progress();
    bool failed = err.text[0] && !is_interrupt(&err);
    if (processes.rank == 0) { // what all failed of is said once
        if (failed) print_message("%s", err.text);
        if (!failed && (interrupted || is_interrupt(&err))) status = EXIT_INTERRUPTED;
    }
    lead_end(status);
    processes_end();
    return status;
}
