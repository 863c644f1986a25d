// SIGINT, SIGTERM and SIGPIPE at random moments of loading, prefill, decode, batches and chat: whatever the moment, the
// status is right, what is printed is whole, and a terminal is left as it was. And the same bytes for any number of
// threads.
#include "terminal.h"

#include "model_writer.h"

static char chat_path[300], prompts_path[300], prompt_path[300], text_path[300];

static uint64_t random_state = 7;

static double random_share(void) { // in [0, 1)
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return (double)(random_state >> 40) * 0x1p-24;
}

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static void wait_seconds(double s) {
    struct timespec t = {(time_t)s, (long)((s - (double)(time_t)s) * 1e9)};
    nanosleep(&t, NULL);
}

// ---- without a terminal ---------------------------------------------------------------------------------------------

typedef struct {
    const char *name;
    const char *args[16];
    const char *input;
    bool lines; // it prints JSON lines: whole ones
} Scenario;

// Runs it, and after a while sends a signal (0: none).
static Run run_signalled(const Scenario *s, int signal_number, double after) {
    char in[300], out[300], err[300];
    snprintf(in, sizeof in, "%s/signal.in", test_dir);
    snprintf(out, sizeof out, "%s/signal.out", test_dir);
    snprintf(err, sizeof err, "%s/signal.err", test_dir);
    write_file(in, s->input, strlen(s->input));
    write_file(out, NULL, 0);
    write_file(err, NULL, 0);
    fflush(NULL);
    pid_t child = fork();
    if (child < 0) die("fork");
    if (child == 0) {
        redirect(0, in, O_RDONLY);
        redirect(1, out, O_WRONLY | O_TRUNC);
        redirect(2, err, O_WRONLY | O_TRUNC);
        exec_program(s->args);
    }
    wait_seconds(after);
    if (signal_number) kill(child, signal_number);
    int status;
    while (waitpid(child, &status, 0) < 0)
        if (errno != EINTR) die("waitpid");
    Run r = {.status = WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status)};
    r.out = read_whole(out, &r.n_out);
    r.err = read_whole(err, &r.n_err);
    return r;
}

// How many bytes at the beginning of their output are the same.
static size_t same_bytes(const Run *a, const Run *b) {
    size_t n = 0;
    while (n < a->n_out && n < b->n_out && a->out[n] == b->out[n]) n++;
    return n;
}

static void check_lines(const Run *r) {
    for (const char *line = r->out; *line;) {
        const char *end = strchr(line, '\n');
        if (!end || *line != '{' || end[-1] != '}' || !strstr(line, "\"finish_reason\": ")) {
            test_fail("a line that is not whole: %s", shown(line, strlen(line)));
            return;
        }
        line = end + 1;
    }
}

static int interrupted_in_all; // when a signal comes is left to chance: of all scenarios, some are

static void test_scenario(const Scenario *s, int rounds) {
    static const int signals[] = {SIGINT, SIGTERM, SIGPIPE};
    if (!test_wanted(s->name) && !test_wanted("signals_reach_what_runs")) return;
    int interrupted = 0, done = 0, early = 0;
    // Signals come within the shortest of a few runs: on a busy machine one may take many times as long.
    Run good = {0};
    double length = INFINITY;
    for (int i = 0; i < 4; i++) {
        run_free(&good);
        double start = seconds();
        good = run_signalled(s, 0, 0);
        length = fmin(length, seconds() - start);
        check_status(&good, 0);
    }
    for (int i = 0; i < rounds && !test_failure[0]; i++) {
        int number = signals[i % 3];
        Run r = run_signalled(s, number, random_share() * length);
        size_t same = same_bytes(&r, &good);
        if (strstr(r.err, "Sanitizer")) test_fail("%s", shown(r.err, r.n_err));
        if (r.status == 0) {
            done++;
            if (!s->lines && (same != r.n_out || r.n_out != good.n_out))
                test_fail("status 0, and printed %zu bytes of %zu", r.n_out, good.n_out);
        } else if (r.status == 130 && number != SIGPIPE) {
            interrupted++;
            bool ended_line = same + 1 == r.n_out && r.out[same] == '\n'; // after an answer that was stopped
            if (!s->lines && same != r.n_out && !ended_line)
                test_fail("interrupted, and printed %s", shown(r.out + same, r.n_out - same));
            if (strstr(r.err, "interrupted") || strstr(r.err, "Interrupted"))
                test_fail("it said %s", shown(r.err, r.n_err));
        } else if (r.status == -number && r.n_out == 0 && r.n_err == 0) {
            early++; // the program had not begun: the signal found no handler
        } else {
            test_fail("signal %d: status %d, printed %zu bytes, said %s", number, r.status, r.n_out,
                      shown(r.err, r.n_err));
        }
        if (s->lines) check_lines(&r);
        run_free(&r);
    }
    printf("# %s: %d signals in %.3f s each: %d interrupted, %d done before, %d before it began\n", s->name, rounds,
           length, interrupted, done, early);
    interrupted_in_all += interrupted;
    test_end(s->name);
    run_free(&good);
}

// ---- in a terminal --------------------------------------------------------------------------------------------------

// A signal while chat answers, or loads, or waits: SIGTERM ends it, SIGINT goes on until Ctrl-D.
static void test_chat(int rounds) {
    if (!test_wanted("chat_in_a_terminal")) return;
    int goes_on = 0, ends = 0;
    setenv("TERM", "xterm", 1);
    for (int i = 0; i < rounds && !test_failure[0]; i++) {
        Terminal t = terminal_start(
            NULL, (const char *const[]){chat_path, "--chat", "--ignore-eos", "-n", "300", "--temp", "1", NULL});
        if (i % 4 < 3) terminal_wait(&t, "> ");
        if (i % 4 < 2) terminal_type(&t, "Hi\r");
        wait_seconds(random_share() * (i % 4 < 2 ? 0.06 : 0.01));
        bool interrupt = i % 2 == 0;
        kill(t.child, interrupt ? SIGINT : SIGTERM);
        bool asked = interrupt && i % 4 < 3; // it is in the conversation: Ctrl-C ends no more than a line or an answer
        if (asked) {
            kill(t.child, SIGPIPE);
            terminal_wait(&t, "> ");
            terminal_type(&t, "\004");
            for (int more = 0; !terminal_ended(&t) && terminal_read(&t); more++)
                if (more % 5 == 4) terminal_type(&t, "\004"); // the one before may have met an answer
        }
        siginfo_t info = {.si_pid = 0};
        if (waitid(P_PID, (id_t)t.child, &info, WEXITED | WNOWAIT) != 0) die("waitid");
        bool before = info.si_code != CLD_EXITED && (info.si_status == SIGINT || info.si_status == SIGTERM) && t.n == 0;
        terminal_end(&t, before ? -info.si_status : asked ? 0 : 130);
        goes_on += asked;
        ends += !asked;
    }
    printf("# chat: %d conversations went on after SIGINT, %d ended\n", goes_on, ends);
    test_end("chat_in_a_terminal");
}

// ---- any number of threads ------------------------------------------------------------------------------------------

static void cut_times(Run *r) {
    static const char *const marks[] = {"\"timings\"", ", stride "};
    for (size_t i = 0; i < sizeof marks / sizeof *marks; i++)
        for (char *at = r->out; (at = strstr(at, marks[i]));) {
            char *end = at + strcspn(at, "\n");
            r->n_out -= (size_t)(end - at);
            memmove(at, end, strlen(end) + 1);
        }
}

static void test_threads(void) {
    static const struct {
        const char *name;
        const char *args[16];
    } runs[] = {
        {"threads_greedy", {"model/stories.bin", "-f", "@text", "-n", "40", "--json", "--logprobs", "5"}},
        {"threads_sampled",
         {"model/stories.bin", "-p", "Once", "-n", "60", "--json", "--temp", "0.9", "--top-p", "0.9", "-s", "3"}},
        {"threads_batch", {"model/stories.bin", "--prompts", "@prompts", "-b", "3", "-n", "20", "--logprobs", "2"}},
        {"threads_perplexity", {"model/stories.bin", "--perplexity", "@text", "-c", "128"}},
    };
    static const char *const threads[] = {"1", "2", "3", "4", "7", "16"};
    for (size_t i = 0; i < sizeof runs / sizeof *runs; i++) {
        if (!test_wanted(runs[i].name)) continue;
        const char *args[17] = {NULL};
        for (int a = 0; runs[i].args[a]; a++)
            args[a] = strcmp(runs[i].args[a], "@text") == 0      ? text_path
                      : strcmp(runs[i].args[a], "@prompts") == 0 ? prompts_path
                                                                 : runs[i].args[a];
        Run first = {0};
        for (size_t t = 0; t < sizeof threads / sizeof *threads; t++) {
            setenv("OMP_NUM_THREADS", threads[t], 1);
            Run r = run_args(NULL, args);
            check_status(&r, 0);
            cut_times(&r);
            if (t == 0) {
                first = r;
                CHECK(r.n_out > 20);
                continue;
            }
            if (r.n_out != first.n_out || memcmp(r.out, first.out, r.n_out) != 0)
                test_fail("%s threads: %s, with one %s", threads[t], shown(r.out, r.n_out),
                          shown(first.out, first.n_out));
            run_free(&r);
        }
        test_end(runs[i].name);
        run_free(&first);
    }
    setenv("OMP_NUM_THREADS", "1", 1);
}

int main(void) {
    program_setup();
    Draft d;
    snprintf(chat_path, sizeof chat_path, "%s/chat.bin", test_dir);
    snprintf(prompts_path, sizeof prompts_path, "%s/prompts", test_dir);
    snprintf(prompt_path, sizeof prompt_path, "%s/prompt", test_dir);
    snprintf(text_path, sizeof text_path, "%s/text", test_dir);
    draft_chat(&d, 1 << 16);
    draft_write(&d, chat_path);
    draft_free(&d);
    char *text = must(malloc(8192)), *lines = must(malloc(8192));
    size_t n = 0, n_lines = 0;
    while (n < 1200) n += (size_t)sprintf(text + n, "Once upon a time there were %zu kings. ", n);
    write_file(prompt_path, text, n);
    write_file(text_path, text, n / 2);
    for (int i = 0; i < 12; i++)
        n_lines += (size_t)sprintf(lines + n_lines, "{\"text\": \"%.*s\"}\n", 20 * i % 110 + 1, text);
    write_file(prompts_path, lines, n_lines);
    const Scenario scenarios[] = {
        {"load_and_prefill", {"model/stories.bin", "-f", prompt_path, "-n", "1"}, "", false},
        {"decode", {"model/stories.bin", "-p", "Once upon", "-n", "40"}, "", false},
        {"json", {"model/stories.bin", "-f", "-", "-n", "120", "--ignore-eos", "--json"}, "Once upon a time", true},
        {"batch", {"model/stories.bin", "--prompts", prompts_path, "-b", "4", "-n", "6"}, "", true},
        {"chat_in_a_pipe", {chat_path, "--chat", "-n", "60", "--ignore-eos"}, "Hi\nand\nthen\n", false},
    };
    const char *fewer = getenv("SIGNALS"); // where every run is slow: under sanitizers, and counting lines
    int signals = fewer ? atoi(fewer) : 1000;
    for (int i = 0; i < 5; i++) test_scenario(&scenarios[i], signals * 17 / 100);
    CHECK(interrupted_in_all > 0);
    test_end("signals_reach_what_runs");
    test_chat(signals * 15 / 100);
    test_threads();
    free(text);
    free(lines);
    return tests_summary();
}
