// The flags' forms: aliases, values after an equals sign, the end of flags, and notes about what changes nothing. What
// each flag does is in test_cli.c, what is refused in test_bad_input.c.
#include "model_writer.h"

static Script script;
static char script_path[300], vocab_path[300], chat_path[300], text_path[300], prompts_path[300], dump_path[300],
    out_path[300];

// Runs, expects that text, and nothing about flags on standard error.
static void expect_text(const char *name, const char *out, const char *const *args) {
    Run r = run_args(NULL, args);
    check_output(&r, out, strlen(out));
    if (r.n_err) test_fail("on standard error: %s", shown(r.err, r.n_err));
    test_end(name);
    run_free(&r);
}

#define TEXT(name, out, ...) expect_text(name, out, (const char *const[]){__VA_ARGS__, "--quiet", NULL})
// Where another argument could not come last.
#define LAST(name, out, ...) expect_text(name, out, (const char *const[]){"--quiet", __VA_ARGS__, NULL})

// ---- forms ----------------------------------------------------------------------------------------------------------

static void test_aliases(void) {
    TEXT("alias_m", "bcd", "-m", script_path, "-p", "a", "-n", "3");
    TEXT("alias_model", "bcd", "--model", script_path, "-p", "a", "-n", "3");
    TEXT("alias_prompt", "bcd", script_path, "--prompt", "a", "-n", "3");
    TEXT("alias_file", "pqr", script_path, "--file", text_path, "-n", "3");
    TEXT("alias_n_predict", "bcd", script_path, "-p", "a", "--n-predict", "3");
    TEXT("alias_ctx_size", "d", script_path, "-p", "abc", "--ctx-size", "5");
    Run r = run_program(NULL, "-h", NULL), whole = run_program(NULL, "--help", NULL);
    check_output(&r, whole.out, whole.n_out);
    test_end("alias_h");
    run_free(&r);
    run_free(&whole);
    Run runs[2];
    for (int alias = 0; alias < 2; alias++)
        runs[alias] = run_program(NULL, script_path, "-p", "a", "-n", "30", "--ignore-eos", "--quiet",
                                  alias ? "--temperature" : "--temp", "9", alias ? "--seed" : "-s", "5", NULL);
    check_status(&runs[0], 0);
    CHECK(runs[0].n_out > 20);
    check_output(&runs[1], runs[0].out, runs[0].n_out);
    test_end("alias_temperature_and_seed");
    run_free(&runs[0]);
    run_free(&runs[1]);
}

static void test_forms(void) {
    char after_dash[4] = {(char)script.next['-']};
    for (int i = 1; i < 3; i++) after_dash[i] = (char)script.next[(int)after_dash[i - 1]];
    TEXT("equals_number", "bcd", script_path, "-p", "a", "--n-predict=3");
    TEXT("equals_text", "bcd", script_path, "--prompt=a", "-n", "3");
    TEXT("equals_text_with_equals", ">?@", script_path, "--prompt==", "-n", "3");
    TEXT("equals_text_with_a_dash", "bc", script_path, "--prompt=-a", "-n", "2");
    TEXT("equals_empty", "abc", script_path, "--prompt=", "-n", "3");
    char model[320];
    snprintf(model, sizeof model, "--model=%s", script_path);
    TEXT("equals_model", "bcd", model, "-p", "a", "-n", "3");
    TEXT("equals_stop_twice", "bc", script_path, "-p", "a", "--stop=xyz", "--stop=de");
    LAST("dashes_before_the_model", "bcd", "-p", "a", "-n", "3", "--", script_path);
    LAST("dashes_after_the_model", "bcd", script_path, "-p", "a", "-n", "3", "--");
    TEXT("dashes_as_a_value", after_dash, script_path, "-p", "--", "-n", "3");

    // A model whose name looks like a flag, in the folder where the program runs.
    char model_link[320], *program = realpath(program_path(), NULL), *before = getcwd(NULL, 0), *setting = NULL;
    snprintf(model_link, sizeof model_link, "%s/-n", test_dir);
    if (!program || !before || symlink(script_path, model_link) != 0 || chdir(test_dir) != 0) die(model_link);
    setting = getenv("LLAMA") ? must(strdup(getenv("LLAMA"))) : NULL;
    setenv("LLAMA", program, 1);
    LAST("dashes_before_a_model_named_like_a_flag", "bcd", "-p", "a", "-n", "3", "--", "-n");
    if (setting)
        setenv("LLAMA", setting, 1);
    else
        unsetenv("LLAMA");
    if (chdir(before) != 0) die(before);
    free(program), free(before), free(setting);
}

static void test_empty_values(void) {
    static const struct {
        const char *name, *message, *args[5];
    } empty[] = {
        {"empty_model", "-m \"\": expected the name of a file", {"-m", "", "-p", "a"}},
        {"empty_file", "--file \"\": expected the name of a file", {script_path, "--file="}},
        {"empty_prompts", "--prompts \"\": expected the name of a file", {script_path, "--prompts="}},
        {"empty_choice", "--precision \"\": expected one of: bf16, f32, fp8", {script_path, "-p", "a", "--precision="}},
        {"empty_number", "--n-predict \"\": expected a whole number", {script_path, "-p", "a", "--n-predict="}},
    };
    for (size_t i = 0; i < sizeof empty / sizeof *empty; i++) {
        Run r = run_args(NULL, empty[i].args);
        check_failure(&r, 2, empty[i].message, NULL);
        test_end(empty[i].name);
        run_free(&r);
    }
}

// ---- given twice ----------------------------------------------------------------------------------------------------

// Runs, expects that text, and those lines on standard error before any others.
static void expect_notes(const char *name, const char *out, const char *notes, const char *const *args) {
    Run r = run_args(NULL, args);
    check_output(&r, out, strlen(out));
    if (strncmp(r.err, notes, strlen(notes)) != 0 || strstr(r.err + strlen(notes), "llama: -") ||
        strstr(r.err + strlen(notes), "changes nothing"))
        test_fail("on standard error: %s, expected %s", shown(r.err, r.n_err), shown(notes, strlen(notes)));
    test_end(name);
    run_free(&r);
}

#define NOTES(name, out, notes, ...) expect_notes(name, out, notes, (const char *const[]){__VA_ARGS__, NULL})

static void test_twice(void) {
    NOTES("twice", "bcd", "llama: -n 5, then -n 3: the last counts\n", script_path, "-p", "a", "-n", "5", "-n", "3");
    NOTES("twice_by_two_names", "bcd", "llama: --n-predict 5, then -n 3: the last counts\n", script_path, "-p", "a",
          "--n-predict=5", "-n", "3");
    NOTES("twice_the_same", "bcd", "llama: -n 3, then -n 3: the last counts\n", script_path, "-p", "a", "-n", "3", "-n",
          "3");
    NOTES("three_times", "b", "llama: -n 2, then -n 1: the last counts\n", script_path, "-p", "a", "-n", "3", "-n", "2",
          "-n", "1");
    NOTES("twice_a_text_of_two_lines", "fgh", "llama: -p a\uFFFDb, then -p --tree: the last counts\n", script_path,
          "-p", "a\nb", "-p", "--tree", "-n", "3");
    NOTES("twice_a_switch", "bc", "llama: --ignore-eos was given twice\n", script_path, "-p", "a", "-n", "2",
          "--ignore-eos", "--ignore-eos");
    NOTES("twice_a_stop", "bc", "llama: ready", script_path, "-p", "a", "--stop", "d", "--stop", "z");
    NOTES("once", "bc", "llama: ready", script_path, "-p", "a", "-n", "2");
    Run r = run_program(NULL, "-m", vocab_path, "-m", script_path, "-p", "a", "-n", "2", NULL);
    check_output(&r, "bc", 2);
    CHECK(strstr(r.err, "script.bin: the last counts\n") != NULL);
    test_end("twice_a_model");
    run_free(&r);
    TEXT("twice_quietly", "bcd", script_path, "-p", "a", "-n", "5", "-n", "3");
}

// ---- what changes nothing -------------------------------------------------------------------------------------------

enum { N_RUNS = 12 };

// The kinds of run, with arguments that go with any flag. What comes after the notes may fail.
static const struct {
    const char *name, *args[7];
} runs[N_RUNS] = {
    {"a prompt", {chat_path, "-p", "97", "-n", "2"}},
    {"a message", {chat_path, "--chat", "-p", "97", "-n", "2"}},
    {"a conversation", {chat_path, "--chat", "-n", "2"}},
    {"--prompts", {chat_path, "--prompts", prompts_path, "-n", "2"}},
    {"--tokenize", {vocab_path, "--tokenize", "-p", "6162"}},
    {"--tokenize --chat", {chat_path, "--tokenize", "--chat", "-p", "6162"}},
    {"--tokenize --prompts", {chat_path, "--tokenize", "--prompts", prompts_path}},
    {"--detokenize", {vocab_path, "--detokenize", "-p", "97 98"}},
    {"--perplexity", {chat_path, "--perplexity", text_path}},
    {"--compare", {chat_path, "--compare", dump_path}},
    {"--bench", {chat_path, "--bench", "-c", "64"}},
    {"--quantize", {chat_path, "--quantize", "int8", "-o", out_path}},
};

// What each run does with a flag: '.' it counts, 'n' a note says that it changes nothing, 'r' it is refused.
static const struct {
    const char *flag, *value, *expected;
} counts[] = {
    {"-n", "4", "....nnnnnnnn"},
    {"-c", "500", "....nnnn...n"},
    {"--stop", "x", "....rrrrrrrr"},
    {"--ignore-eos", NULL, "....rrrrrrrr"},
    {"--temp", "1", "....rrrrrr.r"},
    {"--temp", "0", "....nnnnnn.n"},
    {"--top-k", "3", "nnnnnnnnnnnn"}, // at --temp 0
    {"--top-p", "0.5", "nnnnnnnnnnnn"},
    {"--min-p", "0.5", "nnnnnnnnnnnn"},
    {"-s", "3", "nnnnnnnnnnnn"},
    {"--top-k", "0", "....nnnnnn.n"}, // as without it: nobody is misled at --temp 0
    {"--special", NULL, ".rr..r.n.nnn"},
    {"--ids", NULL, ".rrrrrrn.rrr"},
    {"--echo", NULL, ".rrrrrrrrrrr"},
    {"--json", NULL, "..rn.....r.."},
    {"--logprobs", "2", "rrr.rrrrrrrr"}, // without --json
    {"--system", "x", "r...r..rrrrr"},
    {"--date", "x", "r...r..rrrrr"},
    {"-b", "2", "rrr.rrnrrr.r"},
    {"--hex", NULL, "rrrr..r.rrrr"},
    {"--stride", "2", "rrrrrrrr.rrr"},
    {"--perplexity-windows", "sliding", "rrrrrrrr.rrr"},
    {"--engine", "cpu", "....nnnn...n"},
    {"--precision", "f32", "....nnnn...n"},
    {"-t", "2", "....nnnn...."},
    {"--gpus", "1", "....nnnn...n"}, // no more than without it
    {"--verbose", NULL, "....n.nn..nn"},
    {"--kv-memory", "9M", "....rrrr..rr"}, // of what memory there is, --bench takes what it needs
    {"--lookup", NULL, "....rrrrrrrr"},
    {"--draft", chat_path, "....rrrrrrrr"},
    {"-o", out_path, "rrrrrrrrrrr."},
    {"--output-weights", "int8", "rrrrrrrrrrr."},
    {"--weights", "int8", "rrrrrrrrrrrr"}, // of --synthetic
};

static void test_counts(void) {
    for (size_t f = 0; f < sizeof counts / sizeof *counts; f++) {
        for (int i = 0; i < N_RUNS; i++) {
            const char *args[10];
            int n = 0;
            for (; runs[i].args[n]; n++) args[n] = runs[i].args[n];
            args[n++] = counts[f].flag;
            if (counts[f].value) args[n++] = counts[f].value;
            args[n] = NULL;
            Run r = run_args(NULL, args);
            char note[64];
            snprintf(note, sizeof note, "llama: %s changes nothing ", counts[f].flag);
            char found = r.status == 2 ? 'r' : strstr(r.err, note) ? 'n' : '.';
            if (r.status < 0 || r.status > 2 || found != counts[f].expected[i])
                test_fail("%s: '%c', expected '%c': status %d, %s", runs[i].name, found, counts[f].expected[i],
                          r.status, shown(r.err, r.n_err));
            run_free(&r);
        }
        char name[64];
        snprintf(name, sizeof name, "runs_of%s%s%s", counts[f].flag, counts[f].value ? "_" : "",
                 counts[f].value ? counts[f].value : "");
        test_end(name);
    }
}

static void test_notes(void) {
    static const char *const sampling[][2] = {{"--top-k", "3"}, {"--top-p", "0.5"}, {"--min-p", "0.5"}, {"-s", "3"}};
    for (size_t i = 0; i < sizeof sampling / sizeof *sampling; i++)
        for (int run = 0; run < 4; run++) {
            const char *args[12];
            int n = 0;
            for (; runs[run].args[n]; n++) args[n] = runs[run].args[n];
            args[n++] = "--temp", args[n++] = "1", args[n++] = sampling[i][0], args[n++] = sampling[i][1],
            args[n] = NULL;
            Run r = run_args(NULL, args);
            check_status(&r, 0);
            if (strstr(r.err, "changes nothing")) test_fail("%s: %s", runs[run].name, shown(r.err, r.n_err));
            run_free(&r);
        }
    test_end("sampling_flags_count_while_sampling");
    NOTES("note_at_temp_0", "bc", "llama: --top-k changes nothing at --temp 0, which takes the most likely token\n",
          script_path, "-p", "a", "-n", "2", "--top-k", "7");
    NOTES("notes_by_the_name_given", "bc",
          "llama: --seed changes nothing at --temp 0, which takes the most likely token\n", script_path, "-p", "a",
          "-n", "2", "--seed=7");
    NOTES("notes_of_n_0", "", "llama: --stop changes nothing with -n 0\nllama: --temp changes nothing with -n 0\n",
          script_path, "-p", "a", "-n", "0", "--stop", "x", "--temp", "1");
    NOTES("note_of_tokenize", "97\n", "llama: -n changes nothing with --tokenize\n", vocab_path, "--tokenize", "-p",
          "a", "-n", "2");
    NOTES("note_of_detokenize", "a", "llama: --ids changes nothing with --detokenize\n", vocab_path, "--detokenize",
          "--ids", "-p", "97");
    Run r = run_program(NULL, script_path, "-p", "a", "-n", "2", "--engine", "cpu", "--precision", "bf16", NULL);
    check_output(&r, "bc", 2);
    CHECK(strstr(r.err, "engine cpu, bf16") != NULL && !strstr(r.err, "changes nothing"));
    test_end("precision_bf16_on_engine_cpu");
    run_free(&r);
    r = run_program(NULL, script_path, "-p", "a", "-n", "2", "--engine", "cpu", NULL);
    check_output(&r, "bc", 2);
    CHECK(strstr(r.err, "engine cpu, f32") != NULL);
    test_end("precision_f32_is_the_default_of_engine_cpu");
    run_free(&r);
    NOTES("note_of_fp8_products_of_a_tokenizer", "97\n",
          "llama: --engine changes nothing with --tokenize\nllama: --precision changes nothing with --tokenize\n",
          vocab_path, "--tokenize", "-p", "a", "--engine", "cpu", "--precision", "fp8");
    // A line of --prompts may have new tokens although -n is 0.
    r = run_program(NULL, chat_path, "--prompts", prompts_path, "-n", "0", "--stop", "x", "--temp", "1", NULL);
    check_status(&r, 0);
    if (strstr(r.err, "changes nothing")) test_fail("on standard error: %s", shown(r.err, r.n_err));
    test_end("no_notes_of_n_0_with_prompts");
    run_free(&r);
    // The seed of synthetic weights counts where there are any: not in a tokenizer.
    r = run_program(NULL, "--synthetic", "llama-3.2-1b", "--compare", dump_path, "-s", "3", NULL);
    check_failure(&r, 1, "no-dump: No such file or directory", NULL); // that line alone
    test_end("seed_of_synthetic_weights");
    run_free(&r);
    NOTES("seed_of_a_synthetic_tokenizer", "97\n", "llama: -s changes nothing with --tokenize\n", "--synthetic",
          "llama-3.2-1b", "--tokenize", "-p", "a", "-s", "3");
    r = run_program(NULL, "--synthetic", "llama-3.2-1b", "--compare", dump_path, "--weights", "int4",
                    "--output-weights", "keep", NULL);
    check_failure(&r, 1, "no-dump: No such file or directory", NULL);
    test_end("types_of_synthetic_weights");
    run_free(&r);
    NOTES("types_of_a_synthetic_tokenizer", "97\n",
          "llama: --output-weights changes nothing with --tokenize\nllama: --weights changes nothing with --tokenize\n",
          "--synthetic", "llama-3.2-1b", "--tokenize", "-p", "a", "--weights", "int8", "--output-weights", "fp8");
    TEXT("notes_quietly", "97\n", vocab_path, "--tokenize", "-p", "a", "-n", "2");
}

// ---- -n -1 and -n 0 -------------------------------------------------------------------------------------------------

static void check_fragment(const Run *r, const char *fragment) {
    if (!strstr(r->out, fragment)) test_fail("no %s in %s", fragment, shown(r->out, r->n_out));
}

static void test_numbers(void) {
    TEXT("n_without_limit_to_the_end", "\n\xE2\x82\xAC.", script_path, "-p", "\\", "-n", "-1");
    NOTES("n_without_limit_to_the_context", "bcdefghi",
          "llama: the context of 10 tokens is full: the answer ends here; ", script_path, "-p", "a", "-n", "-1", "-c",
          "10");
    Run without = run_program(NULL, chat_path, "--chat", "-p", "x", "--quiet", NULL);
    Run r = run_program(NULL, chat_path, "--chat", "-p", "x", "-n", "-1", "--quiet", NULL);
    check_status(&without, 0);
    check_output(&r, without.out, without.n_out);
    test_end("n_without_limit_of_a_message");
    run_free(&without);
    run_free(&r);
    r = run_program(NULL, script_path, "-p", "a", "-n", "-1", "--ignore-eos", "--json", "--quiet", NULL);
    check_status(&r, 0);
    check_fragment(&r, "\"finish_reason\": \"length\"");
    test_end("n_without_limit_to_the_model's_maximum");
    run_free(&r);
    static const char two[] = "{\"text\": \"\\\\\"}\n{\"text\": \"abc\"}\n";
    write_file(temporary("two"), two, sizeof two - 1);
    r = run_program(NULL, script_path, "--prompts", temporary("two"), "-n", "-1", "-c", "12", "--quiet", NULL);
    check_status(&r, 0);
    check_fragment(&r, "\"ids\": [10, 226, 130, 172, 46, 257], ");
    check_fragment(&r, "\"ids\": [100, 101, 102, 103, 104, 105, 106, 107], ");
    test_end("n_without_limit_of_prompts");
    run_free(&r);

    TEXT("n_0", "", script_path, "-p", "a", "-n", "0");
    TEXT("n_0_echo", "abc", script_path, "-p", "abc", "-n", "0", "--echo");
    TEXT("n_0_prompt_fills_the_context", "abc", script_path, "-p", "abc", "-n", "0", "-c", "4", "--echo");
    r = run_program(NULL, script_path, "-p", "a", "-n", "0", "--json", "--logprobs", "2", "--quiet", NULL);
    check_status(&r, 0);
    check_fragment(&r, "{\"index\": 0, \"prompt_ids\": [256, 97], ");
    check_fragment(&r, "\"ids\": [], \"text\": \"\", \"finish_reason\": \"length\", ");
    check_fragment(&r, "\"logprobs\": []");
    test_end("n_0_json");
    run_free(&r);
    r = run_program(NULL, script_path, "--prompts", temporary("two"), "-n", "0", "-b", "1", "--quiet", NULL);
    check_status(&r, 0);
    check_fragment(&r, "\"prompt_ids\": [256, 92], \"ids\": [], \"text\": \"\", \"finish_reason\": \"length\"");
    check_fragment(&r, "\"prompt_ids\": [256, 97, 98, 99], \"ids\": [], \"text\": \"\", \"finish_reason\": \"length\"");
    test_end("n_0_prompts");
    run_free(&r);
    r = run_program(NULL, chat_path, "--chat", "-p", "x", "-n", "0", "--json", "--quiet", NULL);
    check_status(&r, 0);
    check_fragment(&r, "\"ids\": [], \"text\": \"\", \"finish_reason\": \"length\"");
    test_end("n_0_message");
    run_free(&r);

    // The list of one run's JSON is the next one's prompt.
    r = run_program(NULL, script_path, "-p", "abc", "-n", "3", "--json", "--quiet", NULL);
    const char *list = strstr(r.out, "\"ids\": [");
    check_status(&r, 0);
    if (list) {
        char ids[64];
        snprintf(ids, sizeof ids, "%.*s", (int)strcspn(list + 7, "]") + 1, list + 7);
        Run again = run_program(NULL, script_path, "--ids", "-p", ids, "-n", "3", "--quiet", NULL);
        check_output(&again, "ghi", 3);
        run_free(&again);
    }
    CHECK(list != NULL);
    test_end("ids_as_json_prints_them");
    run_free(&r);
}

static void test_version(void) {
    size_t n;
    char *number = read_whole("VERSION", &n), expected[64];
    number[strcspn(number, "\n")] = 0;
    snprintf(expected, sizeof expected, "llama %s (commit ", number);
    Run r = run_program(NULL, "--version", NULL);
    check_status(&r, 0);
    if (strncmp(r.out, expected, strlen(expected)) != 0) test_fail("%s, expected %s", shown(r.out, r.n_out), expected);
    test_end("version_is_that_of_the_file");
    run_free(&r);
    free(number);
}

int main(void) {
    program_setup();
    Draft d, chat;
    char *const paths[] = {script_path, vocab_path, chat_path, text_path, prompts_path, dump_path, out_path};
    static const char *const names[] = {"script.bin", "vocab.bin", "chat.bin", "text", "prompts", "no-dump", "out.bin"};
    for (int i = 0; i < 7; i++) snprintf(paths[i], sizeof script_path, "%s/%s", test_dir, names[i]);
    script_alphabet(&script);
    draft_script(&d, &script, 16, 1000);
    draft_write(&d, script_path);
    draft_chat(&chat, 1000);
    draft_write(&chat, chat_path);
    draft_vocab_only(&chat);
    draft_write(&chat, vocab_path);
    draft_free(&chat);
    write_file(text_path, "klmno", 5);
    static const char prompts[] = "{\"messages\": [{\"role\": \"user\", \"content\": \"x\"}]}\n";
    write_file(prompts_path, prompts, sizeof prompts - 1);

    test_version();
    test_aliases();
    test_forms();
    test_empty_values();
    test_twice();
    test_counts();
    test_notes();
    test_numbers();
    draft_free(&d);
    return tests_summary();
}
