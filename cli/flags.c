#include "flags.h"

#include <errno.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>

#include "../model/model.h"
#include "../model/synthetic.h"
#include "../model/threads.h"
#include "version.h"

#define FIELD(f) offsetof(Options, f)

const Flag flags[] = {
    {"-p", "TEXT", "the prompt; - reads standard input", FLAG_TEXT, FIELD(prompt), 0, 0},
    {"-f", "FILE", "the prompt from a file; - reads standard input", FLAG_TEXT, FIELD(prompt_file), 0, 0},
    {"-n", "N", "new tokens at most (256; --chat: what the context has room for)", FLAG_INT, FIELD(n), 1, INT_MAX},
    {"-c", "N", "context: tokens of prompt and answer (the model's, at most 4096 or what -n needs)", FLAG_INT,
     FIELD(context), 1, INT_MAX},
    {"-s", "SEED", "seed of the sampling (0)", FLAG_SEED, FIELD(seed), 0, 0},
    {"--temp", "T", "temperature; 0 takes the most likely token (0)", FLAG_FLOAT, FIELD(sampler.temperature), 0, 1e6},
    {"--top-k", "K", "sample among the K most likely; 0: all (0)", FLAG_INT, FIELD(sampler.top_k), 0, INT_MAX},
    {"--top-p", "P", "sample among the fewest that reach probability P (1)", FLAG_FLOAT, FIELD(sampler.top_p), 0, 1},
    {"--min-p", "P", "drop what is less than P times as likely as the most likely (0)", FLAG_FLOAT,
     FIELD(sampler.min_p), 0, 1},
    {"--stop", "STR", "end before this text, or at the special token of this text; may be given several times",
     FLAG_TEXTS, FIELD(stops), 0, 0},
    {"--ignore-eos", NULL, "go on past the end-of-text token", FLAG_SWITCH, FIELD(ignore_eos), 0, 0},
    {"--special", NULL, "special tokens written in the prompt count as such, and are printed", FLAG_SWITCH,
     FIELD(special), 0, 0},
    {"--chat", NULL, "a conversation with an Instruct model, a message a line (/help); with -p or -f one message",
     FLAG_SWITCH, FIELD(chat), 0, 0},
    {"--system", "TEXT", "with --chat, and with messages of --prompts: the system message (the template's)", FLAG_TEXT,
     FIELD(system), 0, 0},
    {"--date", "TEXT", "the date in LLaMA 3.1's template; today: the day it is (the template's, 26 Jul 2024)",
     FLAG_TEXT, FIELD(date), 0, 0},
    {"--ids", NULL, "the prompt is a list of token ids; no BOS is added", FLAG_SWITCH, FIELD(ids), 0, 0},
    {"--echo", NULL, "print the prompt before the answer", FLAG_SWITCH, FIELD(echo), 0, 0},
    {"--json", NULL, "print one JSON object: ids, text, finish_reason, timings (--tokenize: ids; --detokenize: text)",
     FLAG_SWITCH, FIELD(json), 0, 0},
    {"--logprobs", "K", "with --json: log-probabilities of each token and of the K most likely", FLAG_INT,
     FIELD(logprobs), 1, MAX_LOGPROBS},
    {"--tokenize", NULL,
     "print ids, and no BOS: of the prompt, of --chat's conversation, of lines of --prompts or --hex", FLAG_SWITCH,
     FIELD(tokenize), 0, 0},
    {"--detokenize", NULL, "print the bytes of the ids in the prompt; with --hex, in hex, line by line", FLAG_SWITCH,
     FIELD(detokenize), 0, 0},
    {"--hex", NULL, "text is hexadecimal, in --tokenize and --detokenize", FLAG_SWITCH, FIELD(hex), 0, 0},
    {"--prompts", "FILE", "many prompts, a JSON object with text, ids or messages on each line; answers as JSON lines",
     FLAG_TEXT, FIELD(prompts), 0, 0},
    {"-b", "N", "with --prompts: so many at a time (8); with --bench: at most so many", FLAG_INT, FIELD(batch), 1,
     MAX_SLOTS},
    {"--perplexity", "FILE", "how well the model predicts a text", FLAG_TEXT, FIELD(perplexity), 0, 0},
    {"--stride", "N", "with --perplexity: tokens from a window to the next (half the context -c)", FLAG_INT,
     FIELD(stride), 1, INT_MAX},
    {"--compare", "DUMP", "compare with HuggingFace's tokens (scripts/dump_hf.py)", FLAG_TEXT, FIELD(compare), 0, 0},
    {"--bench", NULL, "measure this machine, and this model on it; -c and -b: no context and no batch beyond",
     FLAG_SWITCH, FIELD(bench), 0, 0},
    {"--synthetic", "SHAPE", "weights from a seed: llama-3.2-1b, llama-3.2-3b, llama-3.1-8b, llama-3.1-70b", FLAG_TEXT,
     FIELD(synthetic), 0, 0},
    {"--engine", "NAME", "what computes (the fastest here)", FLAG_TEXT, FIELD(engine), 0, 0},
    {"--precision", "P", "bf16 or f32: inputs of products and the cache (bf16; engine cpu is always f32)", FLAG_TEXT,
     FIELD(precision), 0, 0},
    {"-t", "N", "threads of engine cpu (OMP_NUM_THREADS, or the CPUs that this process may use)", FLAG_INT,
     FIELD(threads), 1, MAX_THREADS},
    {"--threads", "N", "the same", FLAG_INT, FIELD(threads), 1, MAX_THREADS},
    {"--verbose", NULL, "say what was loaded and where it runs", FLAG_SWITCH, FIELD(verbose), 0, 0},
    {"--quiet", NULL, "no statistics", FLAG_SWITCH, FIELD(quiet), 0, 0},
    {"--version", NULL, "print the version", FLAG_SWITCH, FIELD(version), 0, 0},
    {"--help", NULL, "print this", FLAG_SWITCH, FIELD(help), 0, 0},
};
const int n_flags = sizeof flags / sizeof *flags;

Options flags_default(void) {
    return (Options){.sampler = {.top_p = 1}};
}

void flags_print_help(FILE *out) {
    fprintf(out, "llama %s: continues a prompt with a LLaMA 3 model.\n\nusage: llama MODEL.bin -p TEXT [flags]\n\n",
            version_number);
    for (int i = 0; i < n_flags; i++) {
        char left[64];
        snprintf(left, sizeof left, "%s%s%s", flags[i].name, flags[i].value ? " " : "",
                 flags[i].value ? flags[i].value : "");
        fprintf(out, "  %-18s %s\n", left, flags[i].help);
    }
    fprintf(out, "\nMODEL.bin comes from scripts/convert.py. Engines in this build: %s.\n", model_engines());
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

bool flags_parse(Options *o, int argc, char **argv, Error *err) {
    for (int i = 1; i < argc; i++) {
        const Flag *flag = NULL;
        for (int f = 0; f < n_flags; f++)
            if (strcmp(argv[i], flags[f].name) == 0) flag = &flags[f];
        if (flag && flag->value && i + 1 == argc) return fail(err, "%s needs a value: %s", flag->name, flag->value);
        if (flag) {
            if (!set_flag(o, flag, flag->value ? argv[++i] : NULL, err)) return false;
        } else if (argv[i][0] == '-') {
            return fail(err, "unknown flag %s; --help lists them", argv[i]);
        } else if (o->model) {
            return fail(err, "two models: %s and %s; a prompt goes after -p", o->model, argv[i]);
        } else {
            o->model = argv[i];
        }
    }
    if (o->n == 0) o->n = o->chat ? INT_MAX : DEFAULT_NEW;
    return true;
}

// What is done: at most one thing, and its prompt. --tokenize also goes with --chat and --prompts.
static bool check_mode(const Options *o, Error *err) {
    int modes = o->chat + o->tokenize + o->detokenize + !!o->prompts + !!o->perplexity + !!o->compare + o->bench;
    bool prompt = o->prompt || o->prompt_file;
    if (modes > 1 + (o->tokenize && (o->chat || o->prompts)))
        return fail(
            err,
            "--chat, --tokenize, --detokenize, --prompts, --perplexity, --compare and --bench: expected one of them");
    if (o->prompt && o->prompt_file) return fail(err, "-p and -f: expected one of them");
    bool needs = modes == 0 || o->detokenize || (o->tokenize && !o->prompts);
    if (needs && !prompt) return fail(err, "no prompt: -p TEXT or -f FILE");
    if (prompt && !needs && !o->chat)
        return fail(err, "a prompt, which --prompts, --perplexity, --compare and --bench do not take");
    return true;
}

static bool check_chat(const Options *o, Error *err) {
    if ((o->system || o->date) && !o->chat && !o->prompts)
        return fail(err, "--system and --date go with --chat or --prompts");
    if (o->chat && (o->echo || o->special))
        return fail(err, "--echo and --special do not go with --chat: special tokens are the template's");
    if (o->chat && o->json && !o->prompt && !o->prompt_file)
        return fail(err, "--json with --chat: expected one message, -p TEXT or -f FILE");
    return true;
}

bool flags_check(const Options *o, Error *err) {
    if (!o->model && !o->synthetic)
        return fail(err, "no model; usage: llama MODEL.bin -p TEXT (--help lists the flags)");
    if (o->model && o->synthetic)
        return fail(err, "--synthetic %s and the model %s: expected one of them", o->synthetic, o->model);
    if (!check_mode(o, err)) return false;
    bool generates = !(o->tokenize || o->detokenize || o->perplexity || o->compare || o->bench);
    if (o->ids && (o->chat || o->tokenize || o->prompts || o->perplexity || o->compare || o->bench))
        return fail(err, "--ids goes with a prompt to continue; --prompts says it on each line");
    if (!generates && (o->logprobs || o->echo || o->n_stops || o->ignore_eos || o->sampler.temperature > 0))
        return fail(err, "--logprobs, --echo, --stop, --ignore-eos and --temp go with generating text");
    if (o->logprobs && !o->json && !o->prompts) return fail(err, "--logprobs goes with --json or --prompts");
    if (!check_chat(o, err)) return false;
    if (o->stride && !o->perplexity) return fail(err, "--stride goes with --perplexity");
    if (o->batch && !o->prompts && !o->bench) return fail(err, "-b goes with --prompts or --bench");
    if (o->echo && o->prompts) return fail(err, "--echo: the JSON lines of --prompts have the prompt's ids");
    if (o->json && (o->perplexity || o->compare))
        return fail(err, "--json: --perplexity and --compare print text only");
    if (o->hex && o->json && o->detokenize)
        return fail(err, "--hex and --json: expected one of them with --detokenize");
    if (o->hex && ((!o->tokenize && !o->detokenize) || o->prompts))
        return fail(err, "--hex goes with --tokenize or --detokenize of a prompt");
    if (o->precision && strcmp(o->precision, "bf16") != 0 && strcmp(o->precision, "f32") != 0)
        return fail(err, "--precision %s: expected bf16 or f32", o->precision);
    if (o->engine && !model_has_engine(o->engine))
        return fail(err, "--engine %s: this build has: %s", o->engine, model_engines());
    if (o->synthetic && !model_has_shape(o->synthetic))
        return fail(err, "--synthetic %s: unknown shape, expected one of: %s", o->synthetic, model_shapes());
    return true;
}

// ---- the manual page ------------------------------------------------------------------------------------------------

// Text as roff prints it: a hyphen is a minus, a backslash itself, no line begins a request.
static void print_roff(FILE *out, const char *text) {
    for (; *text; text++)
        if (*text == '-')
            fputs("\\-", out);
        else if (*text == '\\')
            fputs("\\e", out);
        else
            fputc(*text, out);
}

void flags_print_manual(FILE *out) {
    fprintf(out,
            ".TH LLAMA 1 \"\" \"llama %s\" \"User Commands\"\n.SH NAME\nllama \\- continues a prompt with a LLaMA 3 "
            "model\n",
            version_number);
    fputs(".SH SYNOPSIS\n.B llama\n.I MODEL.bin\n.B \\-p\n.I TEXT\n[flags]\n", out);
    fputs(".SH DESCRIPTION\nLoads MODEL.bin (weights, configuration and tokenizer in one file, made by "
          "scripts/convert.py from a "
          "HuggingFace checkpoint) and continues a prompt. The answer goes to standard output, everything else to "
          "standard "
          "error.\n.SH OPTIONS\n",
          out);
    for (int i = 0; i < n_flags; i++) {
        fputs(".TP\n.B ", out);
        print_roff(out, flags[i].name);
        if (flags[i].value) fprintf(out, " \\fI%s\\fR", flags[i].value);
        fputc('\n', out);
        print_roff(out, flags[i].help);
        fputc('\n', out);
    }
    fputs(".SH EXIT STATUS\n0 done; 1 it failed, or a comparison did not hold; 2 bad usage; 130 interrupted, with what "
          "was generated "
          "printed.\n.SH ENVIRONMENT\n.TP\n.B OMP_NUM_THREADS\nthreads of engine cpu, where \\-t does not say: a "
          "number, or a list of which the first counts. Without either, as many as the CPUs that the process may run "
          "on, at most those that the quota of its control group gives it. The text does not depend on it.\n.TP\n.B "
          "NO_COLOR\nset to anything: no colour\n",
          out);
}
