// The command line: one table of flags, for parsing, --help and the manual page.
#ifndef FLAGS_H
#define FLAGS_H

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include "../model/generate/sampler.h"
#include "../tokenizer/error.h"

enum { MAX_STOPS = 16, MAX_LOGPROBS = 64, DEFAULT_CONTEXT = 4096, DEFAULT_BATCH = 8, DEFAULT_NEW = 256 };

typedef struct {
    const char *model, *prompt, *prompt_file, *stops[MAX_STOPS], *prompts, *perplexity, *compare, *synthetic, *engine,
        *precision, *system, *date;
    int n_stops, n, context, batch, logprobs, stride, threads; // threads 0: not given
    uint64_t seed;
    SamplerConfig sampler;
    bool chat, ids, tokenize, detokenize, hex, special, ignore_eos, echo, json, bench, verbose, quiet, version, help;
} Options;

typedef enum { FLAG_SWITCH, FLAG_TEXT, FLAG_TEXTS, FLAG_INT, FLAG_SEED, FLAG_FLOAT } FlagType;

typedef struct {
    const char *name, *value, *help;
    FlagType type;
    size_t offset;      // of the field in Options
    double least, most; // of a number
} Flag;

extern const Flag flags[];
extern const int n_flags;

// What holds where no flag says otherwise.
Options flags_default(void);
bool flags_parse(Options *o, int argc, char **argv, Error *err);
// Refuses combinations that make no sense, rather than ignoring one of them.
bool flags_check(const Options *o, Error *err);
void flags_print_help(FILE *out);
// The manual page llama.1, in roff.
void flags_print_manual(FILE *out);

#endif
