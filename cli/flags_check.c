// What flags go together: combinations that are refused, and notes about flags that change nothing.
#include <string.h>

#include "../model/generate/speculate.h"
#include "../model/model.h"
#include "../model/quant.h"
#include "../model/synthetic.h"
#include "flags.h"
#include "output.h"

unsigned flags_run(const Options *o) {
    bool prompt = o->prompt || o->prompt_file;
    return o->tokenize     ? (o->chat      ? RUN_TOKENIZE_CHAT
                              : o->prompts ? RUN_TOKENIZE_PROMPTS
                                           : RUN_TOKENIZE)
           : o->detokenize ? RUN_DETOKENIZE
           : o->chat       ? (prompt ? RUN_MESSAGE : RUN_CHAT)
           : o->prompts    ? RUN_PROMPTS
           : o->perplexity ? RUN_PERPLEXITY
           : o->compare    ? RUN_COMPARE
           : o->bench      ? RUN_BENCH
           : o->quantize   ? RUN_QUANTIZE
                           : RUN_GENERATE;
}

const char *flags_run_names(unsigned runs, char *text, size_t size) {
    static const struct {
        unsigned runs;
        const char *name;
    } names[] = {{RUN_GENERATE, "a prompt to continue"},
                 {RUN_MESSAGE | RUN_CHAT, "--chat"},
                 {RUN_PROMPTS, "--prompts"},
                 {RUN_TOKENIZE, "--tokenize"},
                 {RUN_DETOKENIZE, "--detokenize"},
                 {RUN_PERPLEXITY, "--perplexity"},
                 {RUN_COMPARE, "--compare"},
                 {RUN_BENCH, "--bench"},
                 {RUN_QUANTIZE, "--quantize"}};
    enum { N = sizeof names / sizeof *names };
    const char *chosen[N + 1];
    int n = 0;
    size_t at = 0;
    if ((runs & RUNS_ANSWER) == RUNS_ANSWER) {
        chosen[n++] = "generating text";
        runs &= ~(unsigned)RUNS_ANSWER;
    }
    for (int i = 0; i < N; i++)
        if (runs & names[i].runs) chosen[n++] = names[i].name;
    text[0] = 0;
    for (int i = 0; i < n && at < size; i++) {
        const char *between = i == 0 ? "" : i + 1 == n ? " or " : ", ";
        at += (size_t)snprintf(text + at, size - at, "%s%s", between, chosen[i]);
    }
    return text;
}

// Whether a flag was given and says something else than what holds without it.
static bool says_more(const Options *o, const Flag *flag) {
    static const size_t sizes[] = {
        [FLAG_SWITCH] = sizeof(bool), [FLAG_TEXT] = sizeof(char *),   [FLAG_TEXTS] = sizeof(char *),
        [FLAG_INT] = sizeof(int),     [FLAG_SEED] = sizeof(uint64_t), [FLAG_BYTES] = sizeof(uint64_t),
        [FLAG_FLOAT] = sizeof(float)};
    Options usual = flags_default();
    return o->given[flag - flags].count &&
           memcmp((const char *)o + flag->offset, (const char *)&usual + flag->offset, sizes[flag->type]) != 0;
}

// ---- what is refused ------------------------------------------------------------------------------------------------

// What is done: at most one thing, and its prompt. --tokenize also goes with --chat and --prompts.
static bool check_mode(const Options *o, Error *err) {
    int modes = o->chat + o->tokenize + o->detokenize + !!o->prompts + !!o->perplexity + !!o->compare + o->bench +
                !!o->quantize;
    bool prompt = o->prompt || o->prompt_file;
    if (modes > 1 + (o->tokenize && (o->chat || o->prompts)))
        return fail(err,
                    "--chat, --tokenize, --detokenize, --prompts, --perplexity, --compare, --bench and --quantize: "
                    "expected one of them");
    if (o->prompt && o->prompt_file) return fail(err, "-p and -f: expected one of them");
    bool needs = modes == 0 || o->detokenize || (o->tokenize && !o->prompts);
    if (needs && !prompt) return fail(err, "no prompt: -p TEXT or -f FILE");
    if (prompt && !needs && !o->chat)
        return fail(err, "a prompt, which --prompts, --perplexity, --compare, --bench and --quantize do not take");
    return true;
}

static bool check_chat(const Options *o, Error *err) {
    if (o->chat && (o->echo || o->special))
        return fail(err, "--echo and --special do not go with --chat: special tokens are the template's");
    if (o->chat && o->json && !o->prompt && !o->prompt_file)
        return fail(err, "--json with --chat: expected one message, -p TEXT or -f FILE");
    if (flags_run(o) == RUN_CHAT && o->n == 0)
        return fail(err, "-n 0 with --chat: a conversation has answers, expected -1 or from 1 on");
    return true;
}

// Flags that this kind of run does not take.
static bool check_run(const Options *o, Error *err) {
    char names[160];
    for (int i = 0; i < n_flags; i++)
        if ((flags[i].refused & flags_run(o)) && says_more(o, &flags[i]))
            return fail(err, "%s goes with %s", o->given[i].name,
                        flags_run_names(flags[i].counts, names, sizeof names));
    return true;
}

static bool check_weights(const Options *o, Error *err) {
    QuantType type, output;
    if (o->quantize && !quant_parse(o->quantize, &type))
        return fail(err, "--quantize %s: expected one of: %s", o->quantize, quant_types);
    if (o->weights && !o->synthetic) return fail(err, "--weights goes with --synthetic");
    if (o->weights && strcmp(o->weights, "bf16") != 0 && !quant_parse(o->weights, &type))
        return fail(err, "--weights %s: expected one of: %s", o->weights, quant_synthetic_types);
    if (o->output_weights && !o->quantize && !o->synthetic)
        return fail(err, "--output-weights goes with --quantize or --synthetic");
    if (o->output_weights && strcmp(o->output_weights, "keep") != 0 && !quant_parse(o->output_weights, &type))
        return fail(err, "--output-weights %s: expected one of: %s", o->output_weights, quant_output_types);
    if (!o->quantize) return true;
    if (o->synthetic) return fail(err, "--quantize and --synthetic: expected a model file");
    if (quant_parse(o->quantize, &type) && o->output_weights && quant_parse(o->output_weights, &output) &&
        type.group > 0 && output.group > 0 && type.group != output.group)
        return fail(err, "--quantize %s and --output-weights %s: groups of two sizes, expected one size in a file",
                    o->quantize, o->output_weights);
    return o->output || fail(err, "--quantize %s needs -o FILE, to write to", o->quantize);
}

static bool check_precision(const Options *o, Error *err) {
    bool known = !o->precision, fp8 = o->precision && strcmp(o->precision, precision_names[PRECISION_FP8]) == 0;
    for (int i = 0; i < N_PRECISIONS && !known; i++) known = strcmp(o->precision, precision_names[i]) == 0;
    if (!known) return fail(err, "--precision %s: expected bf16, f32 or fp8", o->precision);
    if (!fp8 || !(flags_run(o) & RUNS_COMPUTE)) return true;
    if (o->engine && strcmp(o->engine, "cpu") == 0)
        return fail(
            err,
            "--precision fp8 goes with engines for GPUs, not with --engine cpu, which computes in float32 or bf16");
    return model_has_engine("cublas") ||
           fail(err, "--precision fp8: this build has no engine for GPUs, only: %s", model_engines());
}

bool flags_check(const Options *o, Error *err) {
    if (!o->model && !o->synthetic)
        return fail(err, "no model; usage: llama MODEL.bin -p TEXT (--help lists the flags)");
    if (o->model && o->synthetic)
        return fail(err, "--synthetic %s and the model %s: expected one of them", o->synthetic, o->model);
    if (!check_mode(o, err)) return false;
    unsigned run = flags_run(o);
    if (o->ids && !(run & (RUN_GENERATE | RUN_DETOKENIZE | RUN_PERPLEXITY)))
        return fail(err, "--ids goes with a prompt to continue and --perplexity; --prompts says it on each line");
    if (o->logprobs && (run & RUNS_ANSWER) && !o->json && !o->prompts)
        return fail(err, "--logprobs goes with --json or --prompts");
    if (!check_chat(o, err)) return false;
    if (o->echo && run == RUN_PROMPTS) return fail(err, "--echo: the JSON lines of --prompts have the prompt's ids");
    if (!check_run(o, err) || !check_weights(o, err)) return false;
    if (o->lookup && o->draft) return fail(err, "--lookup and --draft: expected one of them");
    if ((o->lookup || o->draft) && o->batch > MAX_SPECULATING)
        return fail(err, "-b %d with %s: expected at most %d: a step has %d rows for each sequence, and at most %d",
                    o->batch, o->lookup ? "--lookup" : "--draft", MAX_SPECULATING, MAX_CANDIDATES + 1, MAX_STEP_ROWS);
    if (o->windows && strcmp(o->windows, "sliding") != 0 && strcmp(o->windows, "half") != 0)
        return fail(err, "--perplexity-windows %s: expected sliding or half", o->windows);
    if (o->windows && o->stride && strcmp(o->windows, "half") == 0)
        return fail(err, "--stride goes with sliding windows; half windows do not overlap");
    if (o->json && o->compare) return fail(err, "--json: --compare prints text only");
    if (o->hex && o->json && o->detokenize)
        return fail(err, "--hex and --json: expected one of them with --detokenize");
    if (o->hex && !(run & (RUN_TOKENIZE | RUN_TOKENIZE_CHAT | RUN_DETOKENIZE)))
        return fail(err, "--hex goes with --tokenize or --detokenize of a prompt");
    if (!check_precision(o, err)) return false;
    if (o->engine && !model_has_engine(o->engine))
        return fail(err, "--engine %s: this build has: %s", o->engine, model_engines());
    if (o->gpus > 1 && (run & RUNS_COMPUTE) && !model_has_engine("cublas"))
        return fail(err, "--gpus %d: this build has no engine for GPUs, only: %s", o->gpus, model_engines());
    if (o->gpus > 1 && o->engine && strcmp(o->engine, "cpu") == 0)
        return fail(err, "--gpus %d goes with engines for GPUs, not with --engine cpu", o->gpus);
    if (o->synthetic && !model_has_shape(o->synthetic))
        return fail(err, "--synthetic %s: unknown shape, expected one of: %s", o->synthetic, model_shapes());
    return true;
}

// ---- notes ----------------------------------------------------------------------------------------------------------

// A flag that was given twice. A value may be long, and is a user's: the line stays one printable line.
static void print_repeated(const Given *g) {
    Error note = {""};
    if (g->value)
        fail(&note, "%s %.60s, then %s %.60s: the last counts", g->name_before, g->value_before, g->name, g->value);
    else
        fail(&note, "%s was given twice", g->name);
    print_message("%s", note.text);
}

// Whether a flag is the seed of the weights that this run computes with.
static bool seeds_weights(const Options *o, const Flag *flag) {
    return flag->type == FLAG_SEED && o->synthetic && (flags_run(o) & RUNS_COMPUTE);
}

// Whether a flag needs a temperature above 0, and nothing else.
static bool waits_for_sampling(const Options *o, const Flag *flag) {
    return flag->needs == NEEDS_SAMPLING && says_more(o, flag) && !seeds_weights(o, flag);
}

void flags_print_greedy_notes(const Options *o) {
    for (int i = 0; i < n_flags; i++)
        if (waits_for_sampling(o, &flags[i]))
            print_message("%s changes nothing at --temp 0, which takes the most likely token", o->given[i].name);
}

void flags_print_notes(const Options *o) {
    unsigned run = flags_run(o);
    char names[160];
    for (int i = 0; i < n_flags; i++)
        if (o->given[i].count > 1 && flags[i].type != FLAG_TEXTS) print_repeated(&o->given[i]);
    for (int i = 0; i < n_flags; i++) {
        const Flag *flag = &flags[i];
        if (!o->given[i].count) continue;
        if (!(flag->counts & run) && !seeds_weights(o, flag))
            print_message("%s changes nothing with %s", o->given[i].name,
                          run & RUNS_TOKENIZE ? "--tokenize" : flags_run_names(run, names, sizeof names));
        else if ((flag->counts & run & RUNS_ANSWER & ~RUN_PROMPTS) && o->n == 0 &&
                 (flag->needs == NEEDS_NEW || waits_for_sampling(o, flag)))
            print_message("%s changes nothing with -n 0", o->given[i].name);
    }
    bool draws = (run & RUNS_ANSWER & ~RUN_PROMPTS && o->n != 0) || run == RUN_BENCH;
    if (draws && o->sampler.temperature == 0) flags_print_greedy_notes(o);
}
