// The command line: one table of flags, for parsing, checks, notes, --help, the manual page and shell completions.
#ifndef FLAGS_H
#define FLAGS_H

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include "../model/generate/sampler.h"
#include "../tokenizer/error.h"

enum { MAX_STOPS = 16, MAX_LOGPROBS = 64, DEFAULT_CONTEXT = 4096, DEFAULT_BATCH = 8, DEFAULT_NEW = 256 };
enum { MAX_FLAGS = 64, NO_LIMIT = INT32_MAX };

// How often a flag was given, by which names, and with which values: the last, which counts, and the one before it.
typedef struct {
    int count;
    const char *name, *value, *name_before, *value_before;
} Given;

typedef struct {
    const char *model, *prompt, *prompt_file, *stops[MAX_STOPS], *prompts, *perplexity, *compare, *synthetic, *engine,
        *precision, *system, *date, *windows, *draft, *quantize, *calibrate, *output, *output_weights, *weights;
    int n_stops, n; // n: new tokens at most; NO_LIMIT: what the context has room for
    int context, batch, logprobs, stride;
    int threads; // of engine cpu; 0: as many as without -t
    int gpus;
    uint64_t seed, kv_memory; // kv_memory: bytes; 0: the engine's default
    SamplerConfig sampler;
    bool chat, ids, tokenize, detokenize, hex, special, ignore_eos, echo, json, bench, lookup, verbose, quiet, version,
        help;
    Given given[MAX_FLAGS]; // by index in flags
} Options;

// What the program does in one run; bits, so that a flag can say in which runs it counts.
enum {
    RUN_GENERATE = 1 << 0, // a prompt is continued
    RUN_MESSAGE = 1 << 1,  // --chat with one message
    RUN_CHAT = 1 << 2,     // --chat, a conversation
    RUN_PROMPTS = 1 << 3,
    RUN_TOKENIZE = 1 << 4,         // of a prompt
    RUN_TOKENIZE_CHAT = 1 << 5,    // of a conversation that a message begins
    RUN_TOKENIZE_PROMPTS = 1 << 6, // of the lines of --prompts
    RUN_DETOKENIZE = 1 << 7,
    RUN_PERPLEXITY = 1 << 8,
    RUN_COMPARE = 1 << 9,
    RUN_BENCH = 1 << 10,
    RUN_QUANTIZE = 1 << 11,

    RUNS_ANSWER = RUN_GENERATE | RUN_MESSAGE | RUN_CHAT | RUN_PROMPTS,
    RUNS_COMPUTE = RUNS_ANSWER | RUN_PERPLEXITY | RUN_COMPARE | RUN_BENCH,
    RUNS_TOKENIZE = RUN_TOKENIZE | RUN_TOKENIZE_CHAT | RUN_TOKENIZE_PROMPTS,
    RUNS_ALL = RUNS_COMPUTE | RUNS_TOKENIZE | RUN_DETOKENIZE | RUN_QUANTIZE
};

// What a flag needs to change anything, in a run in which it counts.
enum { NEEDS_NOTHING, NEEDS_NEW, NEEDS_SAMPLING }; // new tokens (not -n 0); a temperature above 0

typedef enum { FLAG_SWITCH, FLAG_TEXT, FLAG_TEXTS, FLAG_INT, FLAG_SEED, FLAG_BYTES, FLAG_FLOAT } FlagType;

typedef enum {
    SECTION_PROMPT,
    SECTION_ANSWER,
    SECTION_SAMPLING,
    SECTION_CHAT,
    SECTION_MANY,
    SECTION_TEXT,
    SECTION_MEASURE,
    SECTION_WEIGHTS,
    SECTION_MACHINE,
    SECTION_ABOUT,
    N_SECTIONS
} FlagSection;

typedef struct {
    FlagSection section;
    const char *name, *alias; // alias NULL: none
    const char *value, *help; // value: its name in the help; NULL: a switch
    FlagType type;
    size_t offset;      // of the field in Options
    double least, most; // of a number
    unsigned counts;    // the runs in which it changes something
    unsigned refused;   // the runs that do not take it; in all others a note says that it changes nothing
    int needs;
} Flag;

extern const Flag flags[]; // those of a section one after the other
extern const int n_flags;
extern const char *const flag_sections[N_SECTIONS]; // their titles

// The values that a flag takes, separated by ", "; NULL: any.
const char *flag_choices(const Flag *flag);

// The flag of that name or alias [n], and the name as the table has it; NULL: there is none.
const Flag *flags_find(const char *text, size_t n, const char **name);
// What holds where no flag says otherwise.
Options flags_default(void);
// Stores a flag's value, given as text (of a switch any). flag->name is what messages call it.
bool flag_set(Options *o, const Flag *flag, const char *text, Error *err);
bool flags_parse(Options *o, int argc, char **argv, Error *err);
// Refuses combinations that make no sense, rather than ignoring one of them.
bool flags_check(const Options *o, Error *err);
// The kind of run that checked options ask for: one of RUN_*.
unsigned flags_run(const Options *o);
// The names of these runs, as in "goes with ...", in text [size], which is returned.
const char *flags_run_names(unsigned runs, char *text, size_t size);
// A line on standard error for each flag that was given twice, and for each that changes nothing in this run. With
// --prompts those of sampling are left to flags_print_greedy_notes.
void flags_print_notes(const Options *o);
// The notes of flags that need a temperature above 0, where no sequence has one.
void flags_print_greedy_notes(const Options *o);
void flags_print_help(FILE *out);

#endif
