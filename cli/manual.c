// Writes what make install puts beside the program, from the table of flags: without an argument the manual page, in
// roff; with bash, zsh or fish a completion script for that shell. A program of its own, so that llama needs no flag
// for it.
#include <string.h>

#include "flags.h"
#include "version.h"

typedef struct {
    const char *name, *text;
} Entry;

// A character of a text, and what stands for it.
typedef struct {
    char from;
    const char *to;
} Escape;

static void print_escaped(const char *text, size_t n, const Escape *escapes, int n_escapes) {
    for (size_t i = 0; i < n; i++) {
        const char *to = NULL;
        for (int e = 0; e < n_escapes; e++)
            if (escapes[e].from == text[i]) to = escapes[e].to;
        if (to)
            fputs(to, stdout);
        else
            putchar(text[i]);
    }
}

#define PRINT_ESCAPED(text, n, escapes) print_escaped(text, n, escapes, sizeof(escapes) / sizeof *(escapes))

// Whether its value is the name of a file.
static bool takes_file(const Flag *flag) {
    return flag->value && (strcmp(flag->value, "FILE") == 0 || strcmp(flag->value, "DUMP") == 0);
}

// ---- the manual page ------------------------------------------------------------------------------------------------

// A hyphen is a minus and quotes are those of a shell: what is copied from the page works.
static void print_roff(const char *text, size_t n) {
    static const Escape roff[] = {{'-', "\\-"},   {'\\', "\\e"},  {'\'', "\\(aq"}, {'"', "\\(dq"},
                                  {'`', "\\(ga"}, {'^', "\\(ha"}, {'~', "\\(ti"}};
    PRINT_ESCAPED(text, n, roff);
}

static void print_bold(const char *text) {
    fputs("\\fB", stdout);
    print_roff(text, strlen(text));
    fputs("\\fR", stdout);
}

// Text in lines of the page's source, none of which begins with a dot: that would be a request.
static void print_text(const char *text) {
    enum { WIDTH = 72 };
    for (size_t at = 0; *text;) {
        size_t word = strcspn(text, " ");
        if (at) putchar(at + word > WIDTH ? '\n' : ' ');
        at = at + word > WIDTH ? word : at + word + 1;
        if (*text == '.') fputs("\\&", stdout);
        print_roff(text, word);
        text += word + (text[word] == ' ');
    }
    putchar('\n');
}

static void print_entries(const Entry *entries, int n) {
    for (int i = 0; i < n; i++) {
        puts(".TP");
        print_bold(entries[i].name);
        putchar('\n');
        print_text(entries[i].text);
    }
}

static void print_paragraphs(const char *const *paragraphs, int n) {
    for (int i = 0; i < n; i++) {
        if (i) puts(".PP");
        print_text(paragraphs[i]);
    }
}

#define PRINT_ENTRIES(entries) print_entries(entries, sizeof(entries) / sizeof *(entries))
#define PRINT_PARAGRAPHS(paragraphs) print_paragraphs(paragraphs, sizeof(paragraphs) / sizeof *(paragraphs))

static void print_options(void) {
    static const char *const rules[] = {
        "A flag of two dashes takes its value in the next argument or after an equals sign, as in --temp=0.7; -- "
        "ends the flags, and what follows is the model. Of a flag that is given twice the last value counts, and a "
        "note says so; another note names each flag that changes nothing in the run at hand. Defaults are in "
        "parentheses.",
    };
    char runs[160];
    puts(".SH OPTIONS");
    PRINT_PARAGRAPHS(rules);
    for (int i = 0; i < n_flags; i++) {
        const Flag *flag = &flags[i];
        if (i == 0 || flag->section != flags[i - 1].section) printf(".SS %s\n", flag_sections[flag->section]);
        puts(".TP");
        print_bold(flag->name);
        if (flag->alias) {
            fputs(", ", stdout);
            print_bold(flag->alias);
        }
        if (flag->value) printf(" \\fI%s\\fR", flag->value);
        putchar('\n');
        print_text(flag->help);
        snprintf(runs, sizeof runs, "Goes with ");
        size_t n = strlen(runs);
        const char *names = flags_run_names(flag->counts, runs + n, sizeof runs - n);
        bool names_itself = flag->name[1] == '-' && strstr(names, flag->name);
        if (flag->counts == RUNS_ALL || names_itself) continue;
        puts(".br");
        print_text(runs);
    }
}

static void print_examples(void) {
    static const Entry examples[] = {
        {"llama model.bin -p \"The capital of France is\" -n 20",
         "Continue a text, greedily: the same answer every time."},
        {"llama model.bin -f story.txt -n -1 --temp 0.7 --top-p 0.9 -s 1",
         "Sample, until the model ends its text or the context is full."},
        {"llama model.bin --chat", "Hold a conversation with an Instruct model."},
        {"llama model.bin --chat -p \"Why is the sky blue?\"", "Answer one message and end."},
        {"llama model.bin -p \"Once\" --json --logprobs 5 > answer.json",
         "Token ids, text, log-probabilities and timings as JSON."},
        {"llama model.bin --prompts prompts.jsonl -b 16 > answers.jsonl",
         "Many prompts, 16 at a time, a JSON line out for each line in."},
        {"llama model.bin --tokenize -p \"Hello\"", "Token ids of a text; --detokenize gives the text of ids."},
        {"llama model.bin --perplexity text.txt", "How well the model predicts a text."},
        {"llama --synthetic llama-3.1-8b --bench", "Measure this machine; no weights are needed."},
        {"llama --synthetic llama-3.1-70b --weights int4 --bench", "The same of a model with quantised weights."},
    };
    puts(".SH EXAMPLES");
    for (size_t i = 0; i < sizeof examples / sizeof *examples; i++) {
        if (i) puts(".PP");
        print_text(examples[i].text);
        puts(".PP\n.RS\n.nf");
        print_bold(examples[i].name);
        puts("\n.fi\n.RE");
    }
}

static void print_chat(void) {
    static const char *const paragraphs[] = {
        "--chat puts each message into the checkpoint's own chat template, with its system message and date, which "
        "--system and --date replace. Keys and values of the conversation stay in the cache, so a turn computes its "
        "own tokens only. Special tokens that are typed into a message stay ordinary characters.",
        "With -p or -f one message is answered, and the program ends; with --tokenize the ids of that conversation "
        "are printed instead. Through a pipe every line that is not blank, /clear or /help is a message.",
        "When the context is full the answer ends and a line says so; a message that does not fit is refused. No "
        "turn is ever dropped. On a terminal a line that is exactly one of these is a command:",
    };
    static const Entry commands[] = {
        {"/clear", "begins a new conversation"},
        {"/regen", "gives another answer to the last message (at a temperature above 0)"},
        {"/help", "prints the commands, and how much of the context is used"},
        {"/quit, /exit, Ctrl-D", "end"},
        {"\"\"\"", "before and after a message of several lines"},
        {"Ctrl-C", "stops the answer, or drops the line, and keeps the conversation"},
    };
    puts(".SH CHAT");
    PRINT_PARAGRAPHS(paragraphs);
    PRINT_ENTRIES(commands);
}

static void print_json(void) {
    static const char *const output[] = {
        "--json prints one object on one line, and --prompts one for each line of its file, in the file's order. "
        "Text is UTF-8: a byte that belongs to no character is U+FFFD. The fields, in this order:",
    };
    static const Entry fields[] = {
        {"index", "number of the prompt in the input, from 0"},
        {"prompt_ids", "list of the prompt's token ids, BOS included"},
        {"ids", "list of the answer's token ids, with the id that ended it"},
        {"text", "the answer; with --echo the prompt before it"},
        {"finish_reason", "stop (an end-of-text token, or the end of a turn), length (-n, or the context is full), "
                          "stop_string (--stop) or interrupted (Ctrl-C)"},
        {"token_texts",
         "list of the texts of ids, special tokens by name; U+FFFD for the bytes of a part of a character"},
        {"logprobs",
         "with --logprobs K, for each token of ids an object: id, logprob (the natural logarithm of its "
         "probability, before repetition penalty, temperature and filters) and top, the K most likely tokens as "
         "objects of id and logprob"},
        {"prompt_logprobs",
         "with --echo and --logprobs, for each token of prompt_ids such an object; null for the first one"},
        {"speculation",
         "with --lookup or --draft: candidates (tokens that were guessed and verified), accepted (those of them that "
         "were right), steps, and tokens_per_step"},
        {"timings",
         "an object of milliseconds: ready_ms (from the program's start to the model in memory), first_token_ms "
         "(from the prompt's start to the first token), decode_ms (from the first to the last token), ms_per_token, "
         "and p50_ms and p95_ms of the time between tokens; and of counts: shared_tokens (of the prompt, computed for "
         "another of --prompts) and evictions (how often it left the K/V cache, and came back, for lack of memory)"},
    };
    static const char *const input[] = {
        "A line of --prompts is an object. It has one of text, ids and messages; the other keys of these come "
        "before the flags of the same names.",
    };
    static const Entry keys[] = {
        {"text", "the prompt; one BOS is put before it"},
        {"ids", "list of token ids, taken as they are"},
        {"messages", "list of objects of role (system, first; user; assistant) and content, the last one the user's: a "
                     "conversation to answer, in the chat template"},
        {"n, temp, top_k, top_p, min_p, repetition_penalty, logprobs", "as the flags, of the same ranges"},
        {"stop", "a text or a list of texts, in place of all of --stop"},
        {"seed", "as -s of a prompt alone: the line then does not depend on the others"},
    };
    static const char *const others[] = {
        "Keys of other names come back after the fields of the answer, as they were written but for control "
        "characters, which are escaped, and a note says so once for each; the names of the answer's own fields are "
        "refused. A line that cannot be answered is answered in its place by index, line (its number in the file), "
        "error and its other keys. The other lines are answered, and the exit status is 1; standard error has the "
        "first ten errors and their number. If no line is right, no model is loaded.",
        "--tokenize --json prints {\"ids\": [...]}, --detokenize --json {\"text\": \"...\"}, and --bench --json one "
        "object of all that was measured. --perplexity --json prints perplexity, standard_error, nll (nats for each "
        "token), tokens, tokens_in_all, bytes, bits_per_byte, windows, context, stride, finish_reason (end, or "
        "interrupted) and timings (scoring_ms, tokens_per_second).",
    };
    puts(".SH JSON");
    PRINT_PARAGRAPHS(output);
    PRINT_ENTRIES(fields);
    puts(".PP");
    PRINT_PARAGRAPHS(input);
    PRINT_ENTRIES(keys);
    puts(".PP");
    PRINT_PARAGRAPHS(others);
}

static void print_manual(void) {
    static const char *const description[] = {
        "llama loads MODEL.bin (weights, configuration and tokenizer in one file, made by convert.py from a "
        "HuggingFace checkpoint of the LLaMA 3 architecture) and continues a prompt, or holds a conversation.",
        "The answer goes to standard output, everything else to standard error. On a terminal control characters of "
        "an answer, a text or a name but newline and tab, and bytes that are no UTF-8, appear as U+FFFD; files and "
        "pipes get the bytes. Special tokens that are written in a prompt are ordinary characters without "
        "--special, and a line says so.",
    };
    static const Entry statuses[] = {
        {"0", "done"},
        {"1", "it failed, or a comparison did not hold; one line on standard error says why"},
        {"2", "bad usage"},
        {"130", "interrupted, with what was generated until then printed"},
    };
    static const Entry variables[] = {
        {"OMP_NUM_THREADS",
         "threads of engine cpu, where -t does not say: a number, or a list of which the first counts. "
         "Without either: the CPUs that the process may run on, at most as many as the quota of its "
         "control group. The text does not depend on their number"},
        {"NO_COLOR", "set to anything: no colour"},
        {"OMPI_COMM_WORLD_SIZE, PMI_SIZE, PMIX_RANK and what belongs to them",
         "set by MPI's launchers: whether this is one of several processes that compute one model together"},
    };
    printf(".TH LLAMA 1 \"\" \"llama %s\" \"User Commands\"\n.nh\n.ad l\n.SH NAME\nllama \\- continues a prompt with a "
           "LLaMA 3 "
           "model\n.SH SYNOPSIS\n",
           version_number);
    puts(".B llama\n.I MODEL.bin\n\\fB\\-p\\fR \\fITEXT\\fR [flags]\n.br\n.B llama\n.I MODEL.bin\n\\fB\\-\\-chat\\fR "
         "[flags]\n.SH DESCRIPTION");
    PRINT_PARAGRAPHS(description);
    print_options();
    print_examples();
    print_chat();
    print_json();
    puts(".SH EXIT STATUS");
    PRINT_ENTRIES(statuses);
    puts(".SH ENVIRONMENT");
    PRINT_ENTRIES(variables);
}

// ---- completions ----------------------------------------------------------------------------------------------------

// The words of a list that is separated by ", ".
static void print_words(const char *list) {
    static const Escape words[] = {{',', ""}};
    PRINT_ESCAPED(list, strlen(list), words);
}

typedef bool FlagKind(const Flag *flag);

static bool any_flag(const Flag *flag) {
    return flag != NULL;
}
static bool other_value(const Flag *flag) {
    return flag->value && !takes_file(flag) && !flag_choices(flag);
}

// The names and aliases of all flags of a kind.
static void print_names(FlagKind *kind, const char *between) {
    const char *before = "";
    for (int i = 0; i < n_flags; i++) {
        if (!kind(&flags[i])) continue;
        printf("%s%s", before, flags[i].name);
        before = between;
        if (flags[i].alias) printf("%s%s", between, flags[i].alias);
    }
}

static void print_bash(void) {
    printf("# Completion of llama %s for bash.\n", version_number);
    puts("_llama() {\n"
         "    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD - 1]} model= word\n"
         "    # bash splits --flag=value into three words\n"
         "    if [[ $cur == = ]]; then cur=; elif [[ $prev == = ]]; then prev=${COMP_WORDS[COMP_CWORD - 2]}; fi\n"
         "    for word in \"${COMP_WORDS[@]:1:COMP_CWORD - 1}\"; do [[ $word == -- ]] && model=1; done\n"
         "    COMPREPLY=()\n"
         "    [[ $model ]] && prev=\n"
         "    case $prev in");
    fputs("    ", stdout);
    print_names(takes_file, " | ");
    puts(")\n        compopt -o filenames 2> /dev/null\n        mapfile -t COMPREPLY < <(compgen -f -- \"$cur\")\n"
         "        return\n        ;;");
    for (int i = 0; i < n_flags; i++) {
        const char *choices = flag_choices(&flags[i]);
        if (!choices) continue;
        printf("    %s)\n        mapfile -t COMPREPLY < <(compgen -W \"", flags[i].name);
        print_words(choices);
        puts("\" -- \"$cur\")\n        return\n        ;;");
    }
    fputs("    ", stdout);
    print_names(other_value, " | ");
    puts(") return ;;\n    esac\n    if [[ $cur == -* && ! $model ]]; then");
    fputs("        mapfile -t COMPREPLY < <(compgen -W \"", stdout);
    print_names(any_flag, " ");
    puts("\" -- \"$cur\")\n    else\n        compopt -o filenames 2> /dev/null\n"
         "        mapfile -t COMPREPLY < <(compgen -f -X '!*.bin' -- \"$cur\"; compgen -d -- \"$cur\")\n    fi\n}\n"
         "complete -F _llama llama");
}

static void print_zsh(void) {
    static const Escape quoted[] = {{'\'', "'\\''"}, {'[', "\\["}, {']', "\\]"}, {':', "\\:"}, {'\\', "\\\\"}};
    printf("#compdef llama\n# Completion of llama %s for zsh.\n_arguments \\\n", version_number);
    for (int i = 0; i < n_flags; i++)
        for (int alias = 0; alias < 2; alias++) {
            const Flag *flag = &flags[i];
            const char *name = alias ? flag->alias : flag->name, *choices = flag_choices(flag);
            if (!name) continue;
            fputs("    ", stdout);
            if (flag->type == FLAG_TEXTS)
                fputs("'*'", stdout);
            else if (flag->alias)
                printf("'(%s %s)'", flag->name, flag->alias);
            printf("'%s%s[", name, flag->value && name[1] == '-' ? "=" : "");
            PRINT_ESCAPED(flag->help, strlen(flag->help), quoted);
            putchar(']');
            if (flag->value) printf(":%s:", flag->value);
            if (takes_file(flag)) fputs("_files", stdout);
            if (choices) {
                putchar('(');
                print_words(choices);
                putchar(')');
            }
            puts("' \\");
        }
    puts("    '1:model:_files -g \"*.bin\"'");
}

static void print_fish(void) {
    static const Escape quoted[] = {{'\'', "\\'"}, {'\\', "\\\\"}};
    printf("# Completion of llama %s for fish.\ncomplete -c llama -f -a '(__fish_complete_suffix .bin)'\n",
           version_number);
    for (int i = 0; i < n_flags; i++) {
        const Flag *flag = &flags[i];
        const char *choices = flag_choices(flag);
        fputs("complete -c llama", stdout);
        for (int alias = 0; alias < 2; alias++) {
            const char *name = alias ? flag->alias : flag->name;
            if (name) printf(name[1] == '-' ? " -l %s" : " -s %s", name + 1 + (name[1] == '-'));
        }
        if (flag->value) fputs(takes_file(flag) ? " -r -F" : " -x", stdout);
        if (choices) {
            fputs(" -a '", stdout);
            print_words(choices);
            putchar('\'');
        }
        fputs(" -d '", stdout);
        PRINT_ESCAPED(flag->help, strlen(flag->help), quoted);
        puts("'");
    }
}

int main(int argc, char **argv) {
    static const struct {
        const char *name;
        void (*print)(void);
    } kinds[] = {{"man", print_manual}, {"bash", print_bash}, {"zsh", print_zsh}, {"fish", print_fish}};
    const char *name = argc > 1 ? argv[1] : "man";
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++)
        if (strcmp(name, kinds[i].name) == 0) {
            kinds[i].print();
            return fflush(stdout) != 0;
        }
    fprintf(stderr, "manual %s: expected man, bash, zsh or fish\n", name);
    return 2;
}
