// What a terminal gets of texts, where lines on standard error begin, and the status line of long work.
#include "terminal.h"

#include "conversation.h"

static Script script;
static char script_path[300];

// The text after 'a': an escape sequence, a return, a tab, DEL, U+009B (another escape sequence), a stray byte, €, a
// byte of no UTF-8, a newline, EOS.
#define CHAIN "\033[m\r\t\177\xC2\x9B\x9D\xE2\x82\xAC\xFFz\n!"
#define SHOWN "\uFFFD[m\uFFFD\t\uFFFD\uFFFD\uFFFD\u20AC\uFFFDz"
enum { TO_Z = sizeof CHAIN - 3 }; // tokens up to the z

static void write_script_model(void) {
    static const char chain[] = "a" CHAIN;
    int ids[TINY_VOCAB], n = 0;
    bool used[TINY_VOCAB] = {false};
    for (const char *c = chain; *c; c++) ids[n++] = (uint8_t)*c;
    ids[n++] = EOS;
    for (int i = 0; i < n; i++) used[ids[i]] = true;
    for (int t = 0; t < TINY_VOCAB; t++)
        if (!used[t]) ids[n++] = t;
    for (int i = 0; i < n; i++) script.next[ids[i]] = ids[(i + 1) % n];
    Draft d;
    draft_script(&d, &script, 16, 1000);
    snprintf(script_path, sizeof script_path, "%s/script.bin", test_dir);
    draft_write(&d, script_path);
    draft_free(&d);
}

// ---- control characters ---------------------------------------------------------------------------------------------

static size_t append(char *out, size_t n, const char *text, size_t length) {
    memcpy(out + n, text, length);
    return n + length;
}

// What a terminal shows of the bytes, written down a second time: newlines become CR LF, which is the terminal's doing.
static size_t as_shown(const char *text, size_t n, char *out) {
    const uint8_t *s = (const uint8_t *)text;
    size_t length = 0;
    for (size_t i = 0; i < n;) {
        int need = s[i] < 0x80 ? 1 : s[i] >= 0xC2 && s[i] <= 0xDF ? 2 : s[i] >= 0xE0 && s[i] <= 0xEF ? 3 : 4, have = 1;
        bool lead = s[i] < 0x80 || (s[i] >= 0xC2 && s[i] <= 0xF4);
        for (; lead && have < need && i + (size_t)have < n; have++) {
            uint8_t c = s[i + (size_t)have], low = 0x80, high = 0xBF;
            if (have == 1 && s[i] == 0xE0) low = 0xA0;
            if (have == 1 && s[i] == 0xED) high = 0x9F;
            if (have == 1 && s[i] == 0xF0) low = 0x90;
            if (have == 1 && s[i] == 0xF4) high = 0x8F;
            if (c < low || c > high) break;
        }
        bool control =
            have == 1 ? (s[i] < 0x20 && s[i] != '\n' && s[i] != '\t') || s[i] == 0x7F : s[i] == 0xC2 && s[i + 1] < 0xA0;
        if (!lead || have < need || control)
            length = append(out, length, "\uFFFD", 3);
        else if (s[i] == '\n')
            length = append(out, length, "\r\n", 2);
        else
            length = append(out, length, (const char *)s + i, (size_t)have);
        i += (size_t)have;
    }
    return length;
}

// Runs with these streams on a terminal, which then shows exactly this.
static void expect_shown_with(const char *name, const char *in, const char *out, int status, const char *expected,
                              size_t n, const char *const *args) {
    if (!test_wanted(name)) return;
    Terminal t = terminal_start_with(in, out, NULL, args);
    terminal_wait(&t, NULL);
    if (t.n != n || memcmp(t.shown, expected, n) != 0)
        test_fail("shown: \"%s\" (%zu bytes), expected \"%s\" (%zu)", shown(t.shown, t.n), t.n, shown(expected, n), n);
    terminal_end(&t, status);
    test_end(name);
}

#define ARGS(...) ((const char *const[]){__VA_ARGS__, NULL})
#define EXPECT_SHOWN(name, text, ...) \
    expect_shown_with(name, NULL, NULL, 0, text, sizeof(text) - 1, ARGS(__VA_ARGS__, "--quiet"))

static void test_control_characters(void) {
    char n[16], expected[4096];
    snprintf(n, sizeof n, "%d", TO_Z);
    EXPECT_SHOWN("shown_answer", SHOWN "\r\n", script_path, "-p", "a", "-n", n);
    Run r = run_program(NULL, script_path, "-p", "a", "-n", n, "--quiet", NULL);
    check_output(&r, CHAIN, TO_Z);
    test_end("piped_answer_has_its_bytes");
    run_free(&r);
    EXPECT_SHOWN("shown_echo", "a\uFFFD\u20AC\r\n", script_path, "--ids", "-p", "97 27 226 130 172", "--echo", "-n",
                 "1", "--stop", "\xFF");
    EXPECT_SHOWN("shown_character_of_echo_and_answer", "a\u20AC\r\n", script_path, "--ids", "-p", "97 226 130",
                 "--echo", "-n", "1");
    EXPECT_SHOWN("shown_echo_of_cut_characters", "\u20ACa\uFFFD\u20ACb\uFFFD\uFFFD\uFFFD\r\n", script_path, "--ids",
                 "-p", "226 130 172 97 226 130 226 130 172 98 226 130 27 155", "--echo", "-n", "1", "--stop", "\x9D");
    EXPECT_SHOWN("shown_cut_character", "\uFFFD\r\n", script_path, "--ids", "-p", "157", "-n", "2");
    EXPECT_SHOWN("shown_stop_inside_a_character", "\uFFFD\r\n", script_path, "--ids", "-p", "157", "-n", "9", "--stop",
                 "\x82\xAC");
    EXPECT_SHOWN("shown_stop_that_almost_comes", "\u20AC\uFFFDz\r\n", script_path, "--ids", "-p", "157", "-n", "5",
                 "--stop", "\x82\xACx");
    EXPECT_SHOWN("shown_detokenize", "a\uFFFD[\u00E9\uFFFD\uFFFD\uFFFD\tz\r\nq", script_path, "--detokenize", "-p",
                 "97 27 91 195 169 194 155 155 13 9 122 10 113");
    EXPECT_SHOWN("shown_detokenize_cut", "a\uFFFD", script_path, "--detokenize", "-p", "97 240 159 152");
    EXPECT_SHOWN("shown_json", "{\"text\": \"\\u001b[m\\u000d\\u0009\\u007f\\u009b\uFFFD\u20AC\uFFFDz\\n\"}\r\n",
                 script_path, "--detokenize", "--json", "-p", "27 91 109 13 9 127 194 155 157 226 130 172 255 122 10");
    r = run_program(NULL, script_path, "--detokenize", "--json", "-p", "194 128 194 159 194 160 127", "--quiet", NULL);
    check_output(&r, "{\"text\": \"\\u0080\\u009f\u00A0\\u007f\"}\n", 33);
    test_end("piped_json_escapes_c1");
    run_free(&r);

    // Answers of random bytes, by one message and in a conversation: a terminal shows what as_shown makes of a pipe's.
    char in[300], errors[300];
    snprintf(in, sizeof in, "%s", temporary("messages"));
    snprintf(errors, sizeof errors, "%s", temporary("stderr"));
    write_file(in, "Hi\nand\n", 7);
    for (int seed = 1; seed <= 4; seed++) {
        char name[64], number[16];
        snprintf(number, sizeof number, "%d", seed);
        for (int way = 0; way < 2; way++) {
            const char *const args[] = {
                chat_path, "--chat",          "-n", "120", "--temp", "2", "--ignore-eos", "--quiet", "-s",
                number,    way ? NULL : "-p", "Hi", NULL};
            Io io = {.input = "Hi\nand\n", .n_input = 7};
            r = run_args(&io, args);
            check_status(&r, 0);
            CHECK(r.n_out > 100 && r.n_out < 1000);
            snprintf(name, sizeof name, "shown_%s_%d", way ? "conversation" : "message", seed);
            Terminal t = terminal_start_with(in, NULL, errors, args);
            terminal_wait(&t, NULL);
            size_t n_expected = as_shown(r.out, r.n_out, expected);
            if (t.n != n_expected || memcmp(t.shown, expected, t.n) != 0)
                test_fail("shown: \"%s\" (%zu bytes), expected \"%s\" (%zu)", shown(t.shown, t.n), t.n,
                          shown(expected, n_expected), n_expected);
            for (size_t i = 0; i < t.n; i++)
                if ((uint8_t)t.shown[i] < 0x20 && !strchr("\r\n\t", t.shown[i])) test_fail("byte %02X", t.shown[i]);
            terminal_end(&t, 0);
            test_end(name);
            run_free(&r);
        }
    }
}

// Names and texts in messages: one line everywhere, and on a terminal nothing that it would obey.
static void test_messages(void) {
    static const char missing[] = "/no\033[31m\xC2\x9B\x9B\u00E9\xFF.bin";
    static const char on_terminal[] = "llama: /no\uFFFD[31m\uFFFD\uFFFD\u00E9\uFFFD.bin: No such file or directory\r\n";
    static const char in_file[] = "llama: /no\uFFFD[31m\xC2\x9B\x9B\u00E9\xFF.bin: No such file or directory\n";
    expect_shown_with("shown_path", NULL, NULL, 1, on_terminal, sizeof on_terminal - 1, ARGS(missing, "-p", "a"));
    Run r = run_program(NULL, missing, "-p", "a", NULL);
    check_status(&r, 1);
    if (r.n_err != sizeof in_file - 1 || memcmp(r.err, in_file, r.n_err) != 0)
        test_fail("standard error has %s", shown(r.err, r.n_err));
    test_end("piped_path_on_one_line");
    run_free(&r);

    const char *prompts = temporary("prompts");
    static const char line[] = "{\"a\\u001b[m\\u009b\\nz\": \"b\"}\n";
    write_file(prompts, line, sizeof line - 1);
    Terminal t = terminal_start(temporary("out"), ARGS(script_path, "--prompts", prompts));
    terminal_expect(&t, "\"a\uFFFD[m\uFFFD\uFFFDz\"");
    CHECK(!strstr(t.shown, "\xC2\x9B") && !strchr(t.shown, '\033'));
    terminal_end(&t, 1);
    test_end("shown_key");

    // Of a line's own keys, which come back as they are, the strings escape what a terminal would obey.
    static const char own[] = "{\"text\": \"a\", \"k\": [\"\177\xC2\x9B\\u001b\u20AC\", {\"\xC2\x80\": 1}]}\n";
    write_file(prompts, own, sizeof own - 1);
    r = run_program(NULL, script_path, "--prompts", prompts, "-n", "1", "--quiet", NULL);
    check_status(&r, 0);
    CHECK(strstr(r.out, ", \"k\": [\"\\u007f\\u009b\\u001b\u20AC\", {\"\\u0080\": 1}]}\n") != NULL);
    run_free(&r);
    r = run_program(NULL, script_path, "--prompts", prompts, "--tokenize", "--json", "--quiet", NULL);
    check_status(&r, 0);
    CHECK(strstr(r.out, "], \"k\": [\"\\u007f\\u009b\\u001b\u20AC\", {\"\\u0080\": 1}]}\n") != NULL);
    test_end("piped_keys_escape_controls");
    run_free(&r);

    // A long one is cut at its end, not before.
    char name[800];
    memset(name, '\033', sizeof name - 1);
    name[0] = '/', name[sizeof name - 1] = 0;
    r = run_program(NULL, name, "-p", "a", NULL);
    check_failure(&r, 1, "/\uFFFD\uFFFD", NULL);
    CHECK(r.n_err > 400 && r.n_err < 520);
    test_end("piped_path_that_is_cut");
    run_free(&r);
}

// ---- a line of their own --------------------------------------------------------------------------------------------

// Standard output and error in one file.
static Run run_in_one_file(const char *const *args) {
    char path[300];
    snprintf(path, sizeof path, "%s/both", test_dir);
    fflush(NULL);
    pid_t child = fork();
    if (child < 0) die("fork");
    if (child == 0) {
        redirect(0, "/dev/null", O_RDONLY);
        redirect(1, path, O_WRONLY | O_CREAT | O_TRUNC);
        dup2(1, 2);
        exec_program(args);
    }
    int status;
    while (waitpid(child, &status, 0) < 0)
        if (errno != EINTR) die("waitpid");
    Run r = {.status = WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status), .err = must(strdup(""))};
    r.out = read_whole(path, &r.n_out);
    return r;
}

static void expect_beginning(const char *name, const Run *r, const char *expected) {
    if (check_status(r, 0) && strncmp(r->out, expected, strlen(expected)) != 0)
        test_fail("printed \"%s\", expected \"%s\" first", shown(r->out, r->n_out), shown(expected, strlen(expected)));
    test_end(name);
}

static void test_own_line(void) {
    char to_newline[16];
    snprintf(to_newline, sizeof to_newline, "%d", TO_Z + 1);
    Run r = run_in_one_file(ARGS(script_path, "-p", "a", "-n", "3"));
    expect_beginning("statistics_after_an_open_line", &r, "\033[m\nllama: ready in ");
    run_free(&r);
    r = run_in_one_file(ARGS(script_path, "-p", "\xFF", "-n", "2")); // z and a newline
    expect_beginning("statistics_after_a_newline", &r, "z\nllama: ready in ");
    run_free(&r);
    r = run_in_one_file(ARGS(script_path, "-p", "!", "-n", "2")); // nothing but EOS
    expect_beginning("statistics_after_nothing", &r, "llama: ready in ");
    run_free(&r);
    r = run_in_one_file(ARGS(script_path, "-p", "a", "-n", "3", "--quiet"));
    check_output(&r, "\033[m", 3);
    test_end("no_newline_without_statistics");
    run_free(&r);
    r = run_in_one_file(ARGS(script_path, "-p", "a", "-n", "3", "--echo", "--stop", "m"));
    expect_beginning("statistics_after_an_echo", &r, "a\033[\nllama: ready in ");
    run_free(&r);
    r = run_in_one_file(ARGS(script_path, "-p", "a", "-n", "3", "--json"));
    const char *end = strstr(r.out, "}}\n");
    CHECK(end && strncmp(end, "}}\nllama: ready in ", 19) == 0);
    test_end("statistics_after_json");
    run_free(&r);
    r = run_program(NULL, script_path, "-p", "a", "-n", "3", NULL); // two files: each has its own
    check_output(&r, "\033[m", 3);
    CHECK(strncmp(r.err, "llama: ready in ", 16) == 0);
    test_end("no_newline_in_files_of_their_own");
    run_free(&r);

    static const struct {
        const char *name, *prompt, *n, *shown;
    } rows[] = {{"shown_statistics_after_an_open_line", "a", "3", "\uFFFD[m\r\nllama: ready in "},
                {"shown_statistics_after_a_newline", "\xFF", "2", "z\r\nllama: ready in "}};
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        Terminal t = terminal_start(NULL, ARGS(script_path, "-p", rows[i].prompt, "-n", rows[i].n));
        terminal_expect(&t, "llama: ready in ");
        size_t n = strlen(rows[i].shown); // the loading's line comes before
        if (t.seen < n || memcmp(t.shown + t.seen - n, rows[i].shown, n) != 0)
            test_fail("shown: %s", shown(t.shown, t.n));
        terminal_end(&t, 0);
        test_end(rows[i].name);
    }
}

// ---- the status line ------------------------------------------------------------------------------------------------

static void test_progress_of_prompts(void) {
    char prompts[300], out[300];
    snprintf(prompts, sizeof prompts, "%s", temporary("prompts"));
    snprintf(out, sizeof out, "%s", temporary("answers"));
    static const char lines[] = "{\"text\": \"a\"}\n{\"text\": \"bc\"}\n{\"text\": \"d\"}\n";
    write_file(prompts, lines, sizeof lines - 1);
    const char *const args[] = {chat_path, "--prompts", prompts, "-n", "20", "--ignore-eos", "-b", "2", NULL};
    Terminal t = terminal_start(out, args);
    terminal_expect(&t, "llama: answering [");
    terminal_expect(&t, "] ");
    terminal_expect(&t, " of 3 prompts, ");
    terminal_expect(&t, " tokens/s, ");
    terminal_expect(&t, " s left");
    terminal_expect(&t, "\r\033[K");
    terminal_expect(&t, "llama: 3 of 3 prompts, 2 at a time; 60 new tokens");
    terminal_end(&t, 0);
    test_end("progress_of_prompts");

    // With the answers on the terminal as well: each is a line of its own, after the status line is gone.
    t = terminal_start(NULL, args);
    terminal_expect(&t, "llama: answering [");
    terminal_expect(&t, "llama: 3 of 3 prompts");
    int n = 0;
    for (char *at = t.shown, *found; (found = strstr(at, "{\"index\": ")); at = found + 1, n++)
        if (found < t.shown + 3 || (memcmp(found - 3, "\033[K", 3) != 0 && found[-1] != '\n'))
            test_fail("before an answer: %s", shown(found - 10, 20));
    CHECK(n == 3);
    terminal_end(&t, 0);
    test_end("progress_between_answers");

    const char *const quiet[] = {chat_path, "--prompts", prompts, "-n", "20", "--quiet", NULL};
    t = terminal_start(out, quiet);
    terminal_wait(&t, NULL);
    CHECK(t.n == 0);
    terminal_end(&t, 0);
    Run r = run_args(NULL, args);
    check_status(&r, 0);
    CHECK(strncmp(r.err, "llama: 3 of 3 prompts", 21) == 0 && !strchr(r.err, '\r'));
    test_end("progress_of_prompts_on_a_terminal_only");
    run_free(&r);

    // The line would be written over an echo that ends inside a line of the same terminal.
    char *text = must(malloc(1301));
    memset(text, 'a', 1300);
    text[1300] = 0;
    t = terminal_start(NULL, ARGS(chat_path, "-p", text, "-n", "2", "--echo"));
    terminal_expect(&t, "new tokens");
    CHECK(strstr(t.shown, text) && !strstr(t.shown, "prefilling"));
    terminal_end(&t, 0);
    test_end("progress_not_over_an_echo");
    free(text);
}

static void test_progress_of_perplexity(void) {
    enum { LENGTH = 60000 };
    char path[300], out[300];
    snprintf(path, sizeof path, "%s", temporary("text"));
    snprintf(out, sizeof out, "%s", temporary("perplexity"));
    char *text = must(malloc(LENGTH));
    for (int i = 0; i < LENGTH; i++) text[i] = (char)('a' + i % 26);
    write_file(path, text, 400);
    const char *const few[] = {script_path, "--perplexity", path, "-c", "64", NULL};
    Terminal t = terminal_start(out, few);
    terminal_expect(&t, "llama: scoring [");
    terminal_expect(&t, " of 400 tokens");
    terminal_expect(&t, "\r\033[K");
    terminal_end(&t, 0);
    size_t n;
    char *printed = read_whole(out, &n);
    CHECK(strncmp(printed, "perplexity ", 11) == 0 && strstr(printed, " over 400 tokens, "));
    free(printed);
    test_end("progress_of_perplexity");
    t = terminal_start(NULL, ARGS(script_path, "--perplexity", path, "-c", "64", "--quiet"));
    terminal_expect(&t, "perplexity ");
    CHECK(t.seen == 11); // nothing before
    terminal_end(&t, 0);
    test_end("progress_of_perplexity_not_with_quiet");

    // Ctrl-C: the value so far, and how much of the text it is of. The run would take minutes.
    write_file(path, text, LENGTH);
    t = terminal_start(NULL, ARGS(script_path, "--perplexity", path, "-c", "512", "--stride", "1"));
    terminal_expect(&t, "llama: scoring [");
    terminal_type(&t, "\003");
    terminal_expect(&t, "\r\033[Kperplexity ");
    terminal_expect(&t, " over ");
    int scored = atoi(t.shown + t.seen);
    terminal_expect(&t, " of 60000 tokens, ");
    if (scored < 1 || scored >= LENGTH) test_fail("%d tokens", scored);
    terminal_end(&t, 130);
    test_end("ctrl_c_in_perplexity");
    t = terminal_start(out, ARGS(script_path, "--perplexity", path, "-c", "512", "--stride", "1", "--json"));
    terminal_expect(&t, "llama: scoring [");
    terminal_type(&t, "\003");
    terminal_end(&t, 130);
    printed = read_whole(out, &n);
    CHECK(strstr(printed, "\"tokens_in_all\": 60000") && strstr(printed, "\"finish_reason\": \"interrupted\""));
    test_end("ctrl_c_in_perplexity_json");
    free(printed);
    free(text);
}

int main(void) {
    program_setup();
    Draft d;
    write_chat_model(&d);
    draft_free(&d);
    write_script_model();
    test_control_characters();
    test_messages();
    test_own_line();
    test_progress_of_prompts();
    test_progress_of_perplexity();
    return tests_summary();
}
