#include "flags.h"

#include <errno.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>

#include "../model/model.h"
#include "../model/parallel/shard.h"
#include "../model/quant.h"
#include "../model/synthetic.h"
#include "../model/thread_count.h"
#include "nearest.h"
#include "version.h"

#define FIELD(f) offsetof(Options, f)

// The runs that have a prompt, -p or -f; --special counts in all that encode text.
enum {
    RUNS_PROMPT = RUN_GENERATE | RUN_MESSAGE | RUN_TOKENIZE | RUN_TOKENIZE_CHAT | RUN_DETOKENIZE,
    RUNS_SPECIAL = RUN_GENERATE | RUN_PROMPTS | RUN_TOKENIZE | RUN_TOKENIZE_PROMPTS | RUN_PERPLEXITY,
    RUNS_DRAW = RUNS_ANSWER | RUN_BENCH, // tokens
    RUNS_MESSAGES = RUN_MESSAGE | RUN_CHAT | RUN_TOKENIZE_CHAT | RUN_PROMPTS | RUN_TOKENIZE_PROMPTS,
    RUNS_CHAT = RUN_MESSAGE | RUN_CHAT | RUN_TOKENIZE_CHAT,
    RUNS_JSON = RUN_GENERATE | RUN_MESSAGE | RUNS_TOKENIZE | RUN_DETOKENIZE | RUN_PERPLEXITY | RUN_BENCH | RUN_QUANTIZE,
    RUNS_VERBOSE = (RUNS_COMPUTE & ~RUN_BENCH) | RUN_TOKENIZE_CHAT, // there of a message's final newline
};

// clang-format off
const Flag flags[] = {
    {SECTION_PROMPT, "-m", "--model", "FILE", "the model.bin, where it is not the argument without a flag",
     FLAG_TEXT, FIELD(model), 0, 0, RUNS_ALL, 0, NEEDS_NOTHING},
    {SECTION_PROMPT, "-p", "--prompt", "TEXT", "the prompt; - reads standard input",
     FLAG_TEXT, FIELD(prompt), 0, 0, RUNS_PROMPT, 0, NEEDS_NOTHING},
    {SECTION_PROMPT, "-f", "--file", "FILE", "the prompt from a file, without its final newline; - reads standard input",
     FLAG_TEXT, FIELD(prompt_file), 0, 0, RUNS_PROMPT, 0, NEEDS_NOTHING},
    {SECTION_PROMPT, "--ids", NULL, NULL, "the prompt, or the file of --perplexity, is a list of token ids, 1 2 3 or [1, 2, 3]; no BOS is added",
     FLAG_SWITCH, FIELD(ids), 0, 0, RUN_GENERATE | RUN_PERPLEXITY, 0, NEEDS_NOTHING},
    {SECTION_PROMPT, "--special", NULL, NULL, "special tokens written in the prompt count as such, and are printed",
     FLAG_SWITCH, FIELD(special), 0, 0, RUNS_SPECIAL, 0, NEEDS_NOTHING},

    {SECTION_ANSWER, "-n", "--n-predict", "N",
     "new tokens at most (256; --chat: what the context has room for); -1: until the end or the context is full; 0: none",
     FLAG_INT, FIELD(n), -1, INT_MAX, RUNS_ANSWER, 0, NEEDS_NOTHING},
    {SECTION_ANSWER, "-c", "--ctx-size", "N",
     "context: tokens of prompt and answer (the model's, at most 4096 or what -n needs)",
     FLAG_INT, FIELD(context), 1, INT_MAX, RUNS_COMPUTE, 0, NEEDS_NOTHING},
    {SECTION_ANSWER, "--stop", NULL, "STR",
     "end before this text, or at the special token of this text; may be given several times",
     FLAG_TEXTS, FIELD(stops), 0, 0, RUNS_ANSWER, ~RUNS_ANSWER, NEEDS_NEW},
    {SECTION_ANSWER, "--ignore-eos", NULL, NULL, "go on past the end-of-text token",
     FLAG_SWITCH, FIELD(ignore_eos), 0, 0, RUNS_ANSWER, ~RUNS_ANSWER, NEEDS_NEW},
    {SECTION_ANSWER, "--echo", NULL, NULL, "print the prompt before the answer",
     FLAG_SWITCH, FIELD(echo), 0, 0, RUN_GENERATE, ~RUN_GENERATE, NEEDS_NOTHING},
    {SECTION_ANSWER, "--json", NULL, NULL,
     "print one JSON object: ids, text, finish_reason, timings (also of the other modes but --compare)",
     FLAG_SWITCH, FIELD(json), 0, 0, RUNS_JSON, 0, NEEDS_NOTHING},
    {SECTION_ANSWER, "--logprobs", NULL, "K", "with --json: log-probabilities of each token and of the K most likely; with --echo of the prompt's, too",
     FLAG_INT, FIELD(logprobs), 1, MAX_LOGPROBS, RUNS_ANSWER & ~RUN_CHAT, ~RUNS_ANSWER, NEEDS_NOTHING},

    {SECTION_SAMPLING, "--temp", "--temperature", "T", "temperature; 0 takes the most likely token (0); with --bench: of its steps",
     FLAG_FLOAT, FIELD(sampler.temperature), 0, 1e6, RUNS_DRAW, ~RUNS_DRAW, NEEDS_NEW},
    {SECTION_SAMPLING, "--top-k", NULL, "K", "sample among the K most likely; 0: all (0)",
     FLAG_INT, FIELD(sampler.top_k), 0, INT_MAX, RUNS_DRAW, 0, NEEDS_SAMPLING},
    {SECTION_SAMPLING, "--top-p", NULL, "P", "sample among the fewest that reach probability P (1)",
     FLAG_FLOAT, FIELD(sampler.top_p), 0, 1, RUNS_DRAW, 0, NEEDS_SAMPLING},
    {SECTION_SAMPLING, "--min-p", NULL, "P", "drop what is less than P times as likely as the most likely (0)",
     FLAG_FLOAT, FIELD(sampler.min_p), 0, 1, RUNS_DRAW, 0, NEEDS_SAMPLING},
    {SECTION_SAMPLING, "--repetition-penalty", "--repeat-penalty", "R",
     "divide a positive logit of a token that prompt or answer has by R, multiply a negative one; 1: off (1)",
     FLAG_FLOAT, FIELD(sampler.repetition_penalty), 1e-6, 1e6, RUNS_ANSWER, ~RUNS_ANSWER, NEEDS_NEW},
    {SECTION_SAMPLING, "-s", "--seed", "SEED", "seed of the sampling, and of --synthetic (0)",
     FLAG_SEED, FIELD(seed), 0, 0, RUNS_ANSWER, 0, NEEDS_SAMPLING},

    {SECTION_CHAT, "--chat", NULL, NULL,
     "a conversation with an Instruct model, a message a line (/help); with -p or -f one message",
     FLAG_SWITCH, FIELD(chat), 0, 0, RUNS_CHAT, 0, NEEDS_NOTHING},
    {SECTION_CHAT, "--system", NULL, "TEXT", "with --chat, and with messages of --prompts: the system message (the template's)",
     FLAG_TEXT, FIELD(system), 0, 0, RUNS_MESSAGES, ~RUNS_MESSAGES, NEEDS_NOTHING},
    {SECTION_CHAT, "--date", NULL, "TEXT",
     "the date in LLaMA 3.1's template; today: the day it is (the template's, 26 Jul 2024)",
     FLAG_TEXT, FIELD(date), 0, 0, RUNS_MESSAGES, ~RUNS_MESSAGES, NEEDS_NOTHING},

    {SECTION_MANY, "--prompts", NULL, "FILE",
     "many prompts, a JSON object with text, ids or messages on each line; answers as JSON lines",
     FLAG_TEXT, FIELD(prompts), 0, 0, RUN_PROMPTS | RUN_TOKENIZE_PROMPTS, 0, NEEDS_NOTHING},
    {SECTION_MANY, "-b", NULL, "N", "with --prompts: so many at a time, up to 256 (8); with --bench: at most so many",
     FLAG_INT, FIELD(batch), 1, MAX_SLOTS, RUN_PROMPTS | RUN_BENCH,
     ~(RUN_PROMPTS | RUN_TOKENIZE_PROMPTS | RUN_BENCH), NEEDS_NOTHING},

    {SECTION_TEXT, "--tokenize", NULL, NULL,
     "print ids, and no BOS: of the prompt, of --chat's conversation, of lines of --prompts or --hex",
     FLAG_SWITCH, FIELD(tokenize), 0, 0, RUNS_TOKENIZE, 0, NEEDS_NOTHING},
    {SECTION_TEXT, "--detokenize", NULL, NULL, "print the bytes of the ids in the prompt; with --hex, in hex, line by line",
     FLAG_SWITCH, FIELD(detokenize), 0, 0, RUN_DETOKENIZE, 0, NEEDS_NOTHING},
    {SECTION_TEXT, "--hex", NULL, NULL, "text is hexadecimal, in --tokenize and --detokenize",
     FLAG_SWITCH, FIELD(hex), 0, 0, RUN_TOKENIZE | RUN_TOKENIZE_CHAT | RUN_DETOKENIZE, 0, NEEDS_NOTHING},

    {SECTION_MEASURE, "--perplexity", NULL, "FILE", "how well the model predicts a text",
     FLAG_TEXT, FIELD(perplexity), 0, 0, RUN_PERPLEXITY, 0, NEEDS_NOTHING},
    {SECTION_MEASURE, "--stride", NULL, "N", "with --perplexity: tokens from a window to the next (half the context -c)",
     FLAG_INT, FIELD(stride), 1, INT_MAX, RUN_PERPLEXITY, ~RUN_PERPLEXITY, NEEDS_NOTHING},
    {SECTION_MEASURE, "--perplexity-windows", NULL, "KIND",
     "sliding, by --stride; half: the second half of each full window, as llama-perplexity (sliding)",
     FLAG_TEXT, FIELD(windows), 0, 0, RUN_PERPLEXITY, ~RUN_PERPLEXITY, NEEDS_NOTHING},
    {SECTION_MEASURE, "--compare", NULL, "DUMP", "compare with HuggingFace's tokens (scripts/dump_hf.py)",
     FLAG_TEXT, FIELD(compare), 0, 0, RUN_COMPARE, 0, NEEDS_NOTHING},
    {SECTION_MEASURE, "--bench", NULL, NULL,
     "measure this machine, and this model on it; -c and -b: no context and no batch beyond",
     FLAG_SWITCH, FIELD(bench), 0, 0, RUN_BENCH, 0, NEEDS_NOTHING},

    {SECTION_WEIGHTS, "--quantize", NULL, "TYPE",
     "write the model with smaller weights to -o: fp8, int8, int4, or int8 or int4 in groups of columns (:32, :64, :128)",
     FLAG_TEXT, FIELD(quantize), 0, 0, RUN_QUANTIZE, 0, NEEDS_NOTHING},
    {SECTION_WEIGHTS, "--calibrate", NULL, "FILE",
     "with --quantize: round for the numbers that a text multiplies weights by (GPTQ; engine cpu runs it, which takes long)",
     FLAG_TEXT, FIELD(calibrate), 0, 0, RUN_QUANTIZE, ~RUN_QUANTIZE, NEEDS_NOTHING},
    {SECTION_WEIGHTS, "-o", NULL, "FILE", "with --quantize: the file to write",
     FLAG_TEXT, FIELD(output), 0, 0, RUN_QUANTIZE, ~RUN_QUANTIZE, NEEDS_NOTHING},
    {SECTION_WEIGHTS, "--output-weights", NULL, "TYPE",
     "with --quantize or --synthetic: of the output matrix; keep: as it is (int8 with int4, else the others')",
     FLAG_TEXT, FIELD(output_weights), 0, 0, RUNS_COMPUTE | RUN_QUANTIZE, 0, NEEDS_NOTHING},
    {SECTION_WEIGHTS, "--weights", NULL, "TYPE",
     "with --synthetic: of its weights, bf16 or a type of --quantize (bf16)",
     FLAG_TEXT, FIELD(weights), 0, 0, RUNS_COMPUTE, 0, NEEDS_NOTHING},

    {SECTION_MACHINE, "--engine", NULL, "NAME", "what computes (the fastest here)",
     FLAG_TEXT, FIELD(engine), 0, 0, RUNS_COMPUTE, 0, NEEDS_NOTHING},
    {SECTION_MACHINE, "--precision", NULL, "P",
     "bf16 or f32: inputs of products and the cache (bf16; on engine cpu f32); fp8: as bf16, but prompts of FP8 weights on "
     "Hopper by FP8 products",
     FLAG_TEXT, FIELD(precision), 0, 0, RUNS_COMPUTE, 0, NEEDS_NOTHING},
    {SECTION_MACHINE, "-t", "--threads", "N",
     "threads of engine cpu (what OMP_NUM_THREADS says, or the CPUs that this process may use)",
     FLAG_INT, FIELD(threads), 1, MAX_THREADS, RUNS_COMPUTE | RUN_QUANTIZE, 0, NEEDS_NOTHING},
    {SECTION_MACHINE, "--gpus", NULL, "N", "GPUs of this machine that share the model, each with a part of every matrix: the same output (1)",
     FLAG_INT, FIELD(gpus), 1, MAX_SHARDS, RUNS_COMPUTE, 0, NEEDS_NOTHING},
    {SECTION_MACHINE, "--lookup", NULL, NULL,
     "guess tokens from what followed the same text before, and verify several at once: the same output, sooner",
     FLAG_SWITCH, FIELD(lookup), 0, 0, RUNS_ANSWER, ~RUNS_ANSWER, NEEDS_NEW},
    {SECTION_MACHINE, "--draft", NULL, "FILE", "the same with guesses of a smaller model.bin of the same vocabulary",
     FLAG_TEXT, FIELD(draft), 0, 0, RUNS_ANSWER, ~RUNS_ANSWER, NEEDS_NEW},
    {SECTION_MACHINE, "--kv-memory", NULL, "BYTES",
     "for keys and values of all sequences together, also as 500M or 8G (what they can use; on a GPU, of what is free, all but 1 GB)",
     FLAG_BYTES, FIELD(kv_memory), 0, 0, RUNS_COMPUTE & ~RUN_BENCH, ~(RUNS_COMPUTE & ~RUN_BENCH), NEEDS_NOTHING},
    {SECTION_MACHINE, "--synthetic", NULL, "SHAPE",
     "in place of a model weights from a seed: llama-3.2-1b, llama-3.2-3b, llama-3.1-8b, llama-3.1-70b, smollm2-135m",
     FLAG_TEXT, FIELD(synthetic), 0, 0, RUNS_ALL, 0, NEEDS_NOTHING},

    {SECTION_ABOUT, "--verbose", NULL, NULL, "say what was loaded and where it runs",
     FLAG_SWITCH, FIELD(verbose), 0, 0, RUNS_VERBOSE, 0, NEEDS_NOTHING},
    {SECTION_ABOUT, "--quiet", NULL, NULL, "no statistics, no notes",
     FLAG_SWITCH, FIELD(quiet), 0, 0, RUNS_ALL, 0, NEEDS_NOTHING},
    {SECTION_ABOUT, "--version", NULL, NULL, "print the version",
     FLAG_SWITCH, FIELD(version), 0, 0, RUNS_ALL, 0, NEEDS_NOTHING},
    {SECTION_ABOUT, "-h", "--help", NULL, "print this",
     FLAG_SWITCH, FIELD(help), 0, 0, RUNS_ALL, 0, NEEDS_NOTHING},
};
// clang-format on

const int n_flags = sizeof flags / sizeof *flags;
_Static_assert(sizeof flags / sizeof *flags <= MAX_FLAGS, "Options.given has a place for each");

const char *const flag_sections[N_SECTIONS] = {
    [SECTION_PROMPT] = "Model and prompt", [SECTION_ANSWER] = "Answer",
    [SECTION_SAMPLING] = "Sampling",       [SECTION_CHAT] = "Conversations",
    [SECTION_MANY] = "Many prompts",       [SECTION_TEXT] = "Text and ids",
    [SECTION_MEASURE] = "Measurements",    [SECTION_WEIGHTS] = "Quantised weights",
    [SECTION_MACHINE] = "Computation",     [SECTION_ABOUT] = "Messages",
};

const char *flag_choices(const Flag *flag) {
    return flag->offset == FIELD(engine)           ? model_engines()
           : flag->offset == FIELD(precision)      ? "bf16, f32, fp8"
           : flag->offset == FIELD(synthetic)      ? model_shapes()
           : flag->offset == FIELD(windows)        ? "sliding, half"
           : flag->offset == FIELD(quantize)       ? quant_types
           : flag->offset == FIELD(output_weights) ? quant_output_types
           : flag->offset == FIELD(weights)        ? quant_synthetic_types
                                                   : NULL;
}

Options flags_default(void) {
    return (Options){.sampler = {.top_p = 1, .repetition_penalty = 1}, .n = DEFAULT_NEW, .gpus = 1};
}

// ---- help -----------------------------------------------------------------------------------------------------------

// Text from a column on, broken at spaces where a line would be longer than the width.
static void print_wrapped(FILE *out, const char *text, int column, int width) {
    int at = column;
    while (*text) {
        int word = (int)strcspn(text, " ");
        if (at > column && at + 1 + word > width) {
            fprintf(out, "\n%*s", column, "");
            at = column;
        }
        at += fprintf(out, "%s%.*s", at > column ? " " : "", word, text);
        text += word + (text[word] == ' ');
    }
    fputc('\n', out);
}

void flags_print_help(FILE *out) {
    enum { COLUMN = 27, WIDTH = 100 };
    fprintf(out,
            "llama %s: continues a prompt with a LLaMA 3 model.\n\nusage: llama MODEL.bin -p TEXT [flags]\n"
            "       llama MODEL.bin --chat [flags]\n",
            version_number);
    for (int i = 0; i < n_flags; i++) {
        const Flag *flag = &flags[i];
        if (i == 0 || flag->section != flags[i - 1].section) fprintf(out, "\n%s\n", flag_sections[flag->section]);
        char left[64];
        int n = snprintf(left, sizeof left, "%s%s%s%s%s", flag->name, flag->alias ? ", " : "",
                         flag->alias ? flag->alias : "", flag->value ? " " : "", flag->value ? flag->value : "");
        if (n > COLUMN - 4)
            fprintf(out, "  %s\n%*s", left, COLUMN, "");
        else
            fprintf(out, "  %-*s", COLUMN - 2, left);
        print_wrapped(out, flag->help, COLUMN, WIDTH);
    }
    fprintf(out,
            "\nA flag of two dashes takes its value as --flag VALUE or --flag=VALUE; -- ends the flags. MODEL.bin "
            "comes from\n"
            "scripts/convert.py. Engines in this build: %s.\n",
            model_engines());
}

// ---- parsing --------------------------------------------------------------------------------------------------------

bool flag_set(Options *o, const Flag *flag, const char *text, Error *err) {
    void *field = (char *)o + flag->offset;
    const char *name = flag->name;
    const char *shown = *text ? text : "\"\"";
    char *end;
    errno = 0;
    switch (flag->type) {
    case FLAG_SWITCH:
        *(bool *)field = true;
        return true;
    case FLAG_TEXT:
        if (!*text && flag->value && strcmp(flag->value, "TEXT") != 0) {
            const char *choices = flag_choices(flag);
            return fail(err, "%s \"\": expected %s%s", name, choices ? "one of: " : "the name of a file",
                        choices ? choices : "");
        }
        *(const char **)field = text;
        return true;
    case FLAG_TEXTS:
        if (!*text) return fail(err, "%s: expected a text that is not empty", name);
        if (o->n_stops == MAX_STOPS) return fail(err, "%s: more than %d of them", name, MAX_STOPS);
        ((const char **)field)[o->n_stops++] = text;
        return true;
    case FLAG_INT: {
        long v = strtol(text, &end, 10);
        if (errno || end == text || *end || (double)v < flag->least || (double)v > flag->most)
            return fail(err, "%s %s: expected a whole number from %.0f to %.0f", name, shown, flag->least, flag->most);
        *(int *)field = v < 0 ? NO_LIMIT : (int)v;
        return true;
    }
    case FLAG_SEED: {
        unsigned long long v = strtoull(text, &end, 10);
        if (errno || end == text || *end || strchr(text, '-'))
            return fail(err, "%s %s: expected a whole number from 0 to 2^64-1", name, shown);
        *(uint64_t *)field = v;
        return true;
    }
    case FLAG_BYTES: {
        static const char suffixes[] = "KMG";
        unsigned long long v = strtoull(text, &end, 10), unit = 1;
        const char *suffix = *end ? strchr(suffixes, *end) : NULL;
        for (; suffix && suffix >= suffixes; suffix--) unit *= 1000;
        if (errno || end == text || end[suffix != NULL] || strchr(text, '-') || v == 0 ||
            __builtin_mul_overflow(v, unit, &v))
            return fail(err, "%s %s: expected a whole number of bytes from 1 on, or one with K, M or G", name, shown);
        *(uint64_t *)field = v;
        return true;
    }
    case FLAG_FLOAT: {
        double v = strtod(text, &end);
        if (end == text || *end || !(v >= flag->least && v <= flag->most))
            return fail(err, "%s %s: expected a number from %g to %g", name, shown, flag->least, flag->most);
        *(float *)field = (float)v;
        return true;
    }
    }
    return false;
}

const Flag *flags_find(const char *text, size_t n, const char **name) {
    for (int f = 0; f < n_flags; f++)
        for (int alias = 0; alias < 2; alias++) {
            *name = alias ? flags[f].alias : flags[f].name;
            if (*name && strlen(*name) == n && memcmp(*name, text, n) == 0) return &flags[f];
        }
    return NULL;
}

// The name nearest to one that no flag has, or NULL where none is near. A name that it begins is near, too.
static const char *nearest_flag(const char *text, size_t n) {
    const char *nearest = NULL;
    int least = name_tolerance(n) + 1;
    for (int f = 0; f < n_flags; f++)
        for (int alias = 0; alias < 2; alias++) {
            const char *name = alias ? flags[f].alias : flags[f].name;
            int distance = name ? name_distance(text, n, name) : INT_MAX;
            if (distance < least) nearest = name, least = distance;
        }
    for (int f = 0; !nearest && f < n_flags; f++)
        for (int alias = 0; !nearest && alias < 2; alias++) {
            const char *name = alias ? flags[f].alias : flags[f].name;
            if (name && n >= 4 && strncmp(text, name, n) == 0) nearest = name;
        }
    return nearest;
}

static bool fail_unknown(const char *text, size_t n, Error *err) {
    const char *nearest = nearest_flag(text, n);
    if (nearest) return fail(err, "unknown flag %s; did you mean %s? --help lists the flags", text, nearest);
    return fail(err, "unknown flag %s; --help lists them", text);
}

// One flag at argv[*i], with its value after a = or in the next argument, to which *i moves.
static bool parse_flag(Options *o, int argc, char **argv, int *i, Error *err) {
    const char *text = argv[*i], *equals = strchr(text, '='), *name, *value = ""; // of a switch
    size_t n = equals ? (size_t)(equals - text) : strlen(text);
    const Flag *flag = flags_find(text, n, &name);
    if (!flag) return fail_unknown(text, n, err);
    bool is_long = name[1] == '-';
    if (equals && !flag->value) return fail(err, "%s: %s takes no value", text, name);
    if (equals && !is_long)
        return fail(err, "%s: %s takes its value in the next argument: %s %s", text, name, name, equals + 1);
    if (flag->value && !equals && *i + 1 == argc) return fail(err, "%s needs a value: %s", name, flag->value);
    if (flag->value) value = equals ? equals + 1 : argv[++*i];
    Flag named = *flag; // by the name that was typed, for messages
    named.name = name;
    if (!flag_set(o, &named, value, err)) return false;
    Given *given = &o->given[flag - flags];
    given->name_before = given->name;
    given->value_before = given->value;
    given->name = name;
    given->value = flag->value ? value : NULL;
    given->count++;
    return true;
}

static bool was_given(const Options *o, size_t offset) {
    for (int f = 0; f < n_flags; f++)
        if (flags[f].offset == offset) return o->given[f].count > 0;
    return false;
}

bool flags_parse(Options *o, int argc, char **argv, Error *err) {
    const char *model = NULL; // the argument without a flag
    bool ended = false;
    for (int i = 1; i < argc; i++) {
        if (!ended && strcmp(argv[i], "--") == 0) {
            ended = true;
        } else if (!ended && argv[i][0] == '-') {
            if (!parse_flag(o, argc, argv, &i, err)) return false;
        } else if (model) {
            return fail(err, "two models: %s and %s; a prompt goes after -p", model, argv[i]);
        } else {
            model = argv[i];
        }
    }
    if (model && o->model) return fail(err, "two models: %s (-m) and %s; a prompt goes after -p", o->model, model);
    if (model) o->model = model;
    if (o->chat && !was_given(o, FIELD(n))) o->n = NO_LIMIT;
    return true;
}
