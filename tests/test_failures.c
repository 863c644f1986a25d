// Every allocation, read, write and start of a thread that a run makes goes wrong once (tests/inject.c): the run ends
// with a message and status 1, or it gives what it gives otherwise. Never a crash, a hang,
// or a success with output missing.
#include "model_writer.h"

static char library[600], count_path[300];

typedef struct {
    const char *name;
    const char *args[16]; // @NAME: a file of the test's
    const char *input;
} Scenario;

static const Scenario scenarios[] = {
    {"generate", {"@script.bin", "-p", "abc", "-n", "12"}, ""},
    {"prompt_file", {"@script.bin", "-f", "@prompt", "-n", "5", "--stop", "xyz", "--verbose"}, ""},
    {"json",
     {"@script.bin", "-p", "-", "-n", "9", "--json", "--logprobs", "3", "--temp", "0.8", "--top-k", "9"},
     "abc"},
    {"scoring", {"@script.bin", "-p", "abcdef", "-n", "2", "--json", "--logprobs", "2", "--echo"}, ""},
    {"batch", {"@script.bin", "--prompts", "@prompts", "-b", "2", "-n", "6"}, ""},
    {"evictions",
     {"@script.bin", "--prompts", "@many", "-b", "3", "-n", "70", "--ignore-eos", "--kv-memory", "4096"},
     ""}, // four pages
    {"lookup", {"@script.bin", "-p", "abcabcabcabc", "-n", "40", "--ignore-eos", "--lookup"}, ""},
    {"draft", {"@chat.bin", "-p", "abcabcabcabc", "-n", "9", "--draft", "@chat.bin"}, ""},
    {"chat", {"@chat.bin", "--chat", "-n", "6", "--verbose"}, "Hi\nmore\n/clear\nHi\n"},
    {"tokenize", {"@script.bin", "--tokenize", "-f", "@prompt"}, ""},
    {"detokenize", {"@script.bin", "--detokenize", "--json", "-p", "104 105"}, ""},
    {"perplexity", {"@script.bin", "--perplexity", "@prompt"}, ""},
    {"compare", {"@script.bin", "--compare", "@dump"}, ""},
    {"quantize", {"@wide.bin", "--quantize", "int4", "-o", "@out.bin", "--json"}, ""},
    {"calibrate", {"@wide.bin", "--quantize", "int8", "-o", "@out.bin", "--calibrate", "@prompt", "--json"}, ""},
    {"help", {"--help"}, ""},
};
enum { N_SCENARIOS = sizeof scenarios / sizeof *scenarios };

static Run run_scenario(const Scenario *s, const char *kind, long k) {
    static char paths[16][300];
    const char *args[17] = {NULL};
    char inject[64];
    for (int i = 0; s->args[i]; i++) {
        args[i] = s->args[i];
        if (args[i][0] != '@') continue;
        snprintf(paths[i], sizeof paths[i], "%s/%s", test_dir, s->args[i] + 1);
        args[i] = paths[i];
    }
    snprintf(inject, sizeof inject, "%s:%ld", kind, k);
    setenv("INJECT", inject, 1);
    setenv("INJECT_COUNT", count_path, 1);
    injected_library = library;
    Io io = {.input = s->input, .n_input = strlen(s->input)};
    Run r = run_args(&io, args);
    injected_library = NULL;
    return r;
}

// Times are none of the output: cuts them out.
static void cut_times(Run *r) {
    static const char *const marks[] = {"\"timings\"", ", stride ", "\"seconds\""};
    for (size_t i = 0; i < sizeof marks / sizeof *marks; i++)
        for (char *at = r->out; (at = strstr(at, marks[i]));) {
            char *end = at + strcspn(at, "\n");
            r->n_out -= (size_t)(end - at);
            memmove(at, end, strlen(end) + 1);
        }
}

static void test_kind(const Scenario *s, const char *kind) {
    char name[96];
    snprintf(name, sizeof name, "%s_%s", s->name, kind);
    if (!test_wanted(name)) return;
    Run good = run_scenario(s, kind, 0);
    check_status(&good, 0);
    cut_times(&good);
    size_t n;
    char *text = read_whole(count_path, &n);
    long calls = atol(text);
    free(text);
    int failures = 0;
    CHECK(calls > 0);
    for (long k = 1; k <= calls && !test_failure[0]; k++) {
        Run r = run_scenario(s, kind, k);
        cut_times(&r);
        bool same = r.n_out == good.n_out && memcmp(r.out, good.out, r.n_out) == 0;
        bool told = r.status == 1 && strstr(r.err, "llama: ");
        if (r.status == 0 && !same)
            test_fail("%s of %ld, %ld: status 0, and printed \"%s\" for \"%s\"", kind, calls, k, shown(r.out, r.n_out),
                      shown(good.out, good.n_out));
        if (r.status != 0 && !told)
            test_fail("%s of %ld, %ld: status %d, and said \"%s\"", kind, calls, k, r.status, shown(r.err, r.n_err));
        if (access(temporary("out.bin.part"), F_OK) == 0)
            test_fail("%s of %ld, %ld: out.bin.part is left", kind, calls, k);
        failures += r.status != 0;
        run_free(&r);
    }
    // What one may not get over, and what one has to.
    if ((strcmp(kind, "short") == 0 || strcmp(kind, "eintr") == 0 || strncmp(kind, "thread", 6) == 0) && failures)
        test_fail("%d of %ld of kind %s ended the run", failures, calls, kind);
    if ((strcmp(kind, "enospc") == 0 || strcmp(kind, "epipe") == 0) && failures < calls)
        test_fail("%ld of %ld %s writes went unnoticed", calls - failures, calls, kind);
    printf("# %s: %ld calls, %d runs failed as they should\n", name, calls, failures);
    test_end(name);
    run_free(&good);
}

// Where nothing is computed no thread is started.
static void test_starts_no_thread(const Scenario *s) {
    Run r = run_scenario(s, "thread", 0);
    check_status(&r, 0);
    size_t n;
    char *calls = read_whole(count_path, &n);
    if (strcmp(calls, "0") != 0) test_fail("%s threads were started", calls);
    free(calls);
    run_free(&r);
    test_end("tokenize_starts_no_thread");
}

// --help reads nothing; a prompt's file that ends is no failure: it is a shorter prompt.
static bool happens(const char *scenario, const char *kind) {
    bool reads = strcmp(kind, "short") == 0 || strcmp(kind, "eintr") == 0 || strcmp(kind, "eio") == 0;
    return strcmp(kind, "end") == 0 ? strcmp(scenario, "generate") == 0 : !reads || strcmp(scenario, "help") != 0;
}

// The file is cut, or written to, between two reads of it: an error that names it, whichever read comes next. (Rows of
// the embedding table are read as tokens need them: what was generated before is printed, and it is right.)
static void test_changes(const char *kind) {
    char name[64];
    snprintf(name, sizeof name, "model_%s_while_it_is_read", kind);
    if (!test_wanted(name)) return;
    size_t n;
    char path[300];
    snprintf(path, sizeof path, "%s/script.bin", test_dir);
    char *model = read_whole(path, &n);
    Run good = run_scenario(&scenarios[0], kind, 0);
    check_status(&good, 0);
    size_t length;
    char *text = read_whole(count_path, &length);
    long reads = atol(text);
    CHECK(reads > 3);
    struct timespec tick = {0, 30000000}; // of the file system's clock: it must see that the file changes
    for (long k = 1; k <= reads; k++) {
        nanosleep(&tick, NULL);
        Run r = run_scenario(&scenarios[0], kind, k);
        check_status(&r, 1);
        if (strncmp(r.err, "llama: ", 7) != 0 || !strstr(r.err, "script.bin: "))
            test_fail("the message is \"%s\", expected script.bin in it", shown(r.err, r.n_err));
        if (r.n_out >= good.n_out || memcmp(r.out, good.out, r.n_out) != 0)
            test_fail("read %ld: printed \"%s\", expected what \"%s\" begins with", k, shown(r.out, r.n_out),
                      shown(good.out, good.n_out));
        run_free(&r);
        write_file(path, model, n);
    }
    printf("# %s: %ld reads\n", name, reads);
    test_end(name);
    free(text);
    free(model);
    run_free(&good);
}

int main(void) {
    program_setup();
    if (SANITIZED) {
        test_skip("failures", "a sanitizer has an allocator of its own");
        return tests_summary();
    }
    const char *name = getenv("INJECT_LIBRARY");
    if (!name || access(name, R_OK) != 0) {
        test_skip("failures", "no INJECT_LIBRARY: make CUDA=0 test has it");
        return tests_summary();
    }
    if (!realpath(name, library)) die(name);
    snprintf(count_path, sizeof count_path, "%s/count", test_dir);
    Script script;
    Draft d;
    script_alphabet(&script);
    draft_script(&d, &script, 16, 300);
    draft_write(&d, temporary("script.bin"));
    draft_free(&d);
    script_alphabet(&script);
    draft_script(&d, &script, 16, 300);
    Draft dump;
    draft_dump(&dump, &script, 8);
    draft_write(&dump, temporary("dump"));
    draft_free(&dump);
    draft_free(&d);
    draft_chat(&d, 512);
    draft_write(&d, temporary("chat.bin"));
    draft_free(&d);
    Shape wide = {64, 176, 1, 4, 2, 16, 128, "BF16", true, true};
    draft_tiny(&d, wide, 1);
    draft_write(&d, temporary("wide.bin"));
    draft_free(&d);
    write_file(temporary("prompt"), "a prompt in a file", 18);
    static const char lines[] =
        "{\"text\": \"ab\"}\n\n{\"ids\": [256, 97], \"id\": {\"a\": 1}, \"stop\": [\"x\", \"y\"]}\n"
        "{\"text\": \"xyz\", \"logprobs\": 2, \"repetition_penalty\": 1.5, \"n\": 3}\n";
    write_file(temporary("prompts"), lines, sizeof lines - 1);
    static const char many[] = "{\"text\": \"abcdefghijklmnopqrstuvwxyz abcdefghijklmnopqrstuvwxyz abcdefghijkl\"}\n"
                               "{\"text\": \"zyxwvutsrqponmlkjihgfedcba zyxwvutsrqponmlkjihgfedcba\"}\n"
                               "{\"text\": \"abcdefghijklmnopqrstuvwxyz abcdefghijklmnopqrstuvwxyz abcdefghijkm\"}\n";
    write_file(temporary("many"), many, sizeof many - 1);
    static const char *const kinds[] = {"alloc", "allocs", "short", "eintr", "eio", "end", "enospc", "epipe"};
    for (int s = 0; s < N_SCENARIOS; s++)
        for (size_t k = 0; k < sizeof kinds / sizeof *kinds; k++)
            if (happens(scenarios[s].name, kinds[k])) test_kind(&scenarios[s], kinds[k]);
    // A thread that cannot be started means that fewer compute. (The models above are too small to share.)
    static const Scenario shared = {"shared", {"model/stories.bin", "-p", "Once upon", "-n", "3"}, ""};
    static const Scenario alone = {"alone", {"model/stories.bin", "--tokenize", "-p", "Once upon"}, ""};
    setenv("OMP_NUM_THREADS", "4", 1);
    test_kind(&shared, "thread");
    test_kind(&shared, "threads");
    test_starts_no_thread(&alone);
    setenv("OMP_NUM_THREADS", "1", 1);
    test_changes("truncate");
    test_changes("rewrite");
    return tests_summary();
}
