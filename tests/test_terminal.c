// --chat in a pseudo-terminal, as a person at a keyboard sees it, in several locales; and the status line.
#include "terminal.h"

#include "conversation.h"

// ---- in a terminal --------------------------------------------------------------------------------------------------

#define START_CHAT(out, ...) terminal_start(out, (const char *const[]){chat_path, "--chat", __VA_ARGS__, NULL})

static off_t file_size(const char *path) {
    struct stat info;
    return stat(path, &info) == 0 ? info.st_size : 0;
}

// Until the program has written more to the file than n bytes.
static void wait_for_growth(Terminal *t, const char *path, off_t n) {
    while (file_size(path) <= n && terminal_read(t)) {
    }
}

// Ends a test in a terminal, of a locale.
static const char *locale_name;
static void end_here(const char *name) {
    char full[120];
    snprintf(full, sizeof full, "%s (%s)", name, locale_name);
    test_end(full);
}

// What a conversation in a terminal is expected to write to its standard output.
typedef struct {
    Ids ids;
    char text[1 << 14];
    size_t n;
} Expected;

static Expected expect_nothing(void) {
    Expected x = {.n = 0};
    begin_ids(&x.ids, "26 Jul 2024", "");
    return x;
}

// An answer of 5 tokens to this message.
static void expect_answer(Expected *x, const char *message) {
    add_message(&x->ids, "user", message);
    add_message(&x->ids, "assistant", NULL);
    x->n += ask(&x->ids, "5", x->text + x->n);
}

// Types a message and waits for the prompt after its answer.
static void type_message(Terminal *t, Expected *x, const char *typed, const char *message) {
    terminal_type(t, typed);
    terminal_expect(t, " new");
    terminal_expect(t, "> ");
    expect_answer(x, message);
}

static void end_conversation(Terminal *t, const Expected *x, const char *out) {
    terminal_type(t, "\004");
    terminal_end(t, 0);
    size_t n;
    char *answers = read_whole(out, &n);
    if (n != x->n || memcmp(answers, x->text, n) != 0)
        test_fail("standard output has %s, expected %s", shown(answers, n), shown(x->text, x->n));
    free(answers);
}

static bool edited; // by a library

static void test_terminal_answers(const char *out) {
    Terminal t = START_CHAT(out, "-n", "20", "--verbose");
    terminal_expect(&t, "> ");
    CHECK(strstr(t.shown, "\033[1;32m") != NULL);
    terminal_type(&t, "Hi\r");
    terminal_expect(&t, "turn 1: 0 tokens from the cache");
    terminal_expect(&t, " tokens/s)");
    terminal_expect(&t, "> ");
    terminal_type(&t, "/help\r");
    terminal_expect(&t, "Ctrl-D  ends");
    terminal_expect(&t, "are edited by ");
    terminal_expect(&t, "> ");
    edited = strstr(t.shown, "edited by the terminal alone") == NULL;
    terminal_type(&t, "\004");
    terminal_end(&t, 0);
    Ids ids;
    char text[4096];
    begin_ids(&ids, "26 Jul 2024", "");
    add_message(&ids, "user", "Hi");
    add_message(&ids, "assistant", NULL);
    size_t length = ask(&ids, "20", text), n;
    char *answers = read_whole(out, &n);
    if (n != length || memcmp(answers, text, n) != 0) test_fail("standard output has %s", shown(answers, n));
    end_here("terminal_answer_and_end");
    free(answers);

    setenv("NO_COLOR", "1", 1);
    t = START_CHAT(NULL, "-n", "5");
    terminal_expect(&t, "> ");
    CHECK(strstr(t.shown, "\033[1;32m") == NULL);
    terminal_type(&t, "\004");
    terminal_end(&t, 0);
    end_here("terminal_no_color");

    // A message without room does not end a conversation at a terminal.
    t = START_CHAT(NULL, "-n", "200", "-c", "160");
    terminal_expect(&t, "> ");
    terminal_type(&t, "a message that is far too long for what the context has room for, by some words and more\r");
    terminal_expect(&t, "the message was not sent");
    terminal_expect(&t, "> ");
    terminal_type(&t, "Hi\r");
    terminal_expect(&t, "has room for ");
    terminal_expect(&t, "> ");
    terminal_type(&t, "\004");
    terminal_end(&t, 0);
    end_here("terminal_message_without_room");
}

static void test_terminal_signals(const char *out) {
    // Ctrl-C: the answer, which would not end, ends; the conversation goes on with its cache.
    write_file(out, "", 0);
    Terminal t = START_CHAT(out, "--ignore-eos", "-c", "1000000", "--temp", "1", "--verbose"); // text comes without end
    terminal_expect(&t, "> ");
    terminal_type(&t, "Hi\r");
    terminal_expect(&t, "Hi\r\n");
    wait_for_growth(&t, out, 0); // the answer has begun
    terminal_type(&t, "\003");
    terminal_expect(&t, "turn 1: 0 tokens from the cache");
    terminal_expect(&t, "> ");
    terminal_type(&t, "once more\r");
    wait_for_growth(&t, out, file_size(out));
    terminal_type(&t, "\003");
    terminal_expect(&t, "turn 2: ");
    CHECK(atoi(t.shown + t.seen) > 0);
    terminal_expect(&t, "> ");
    terminal_type(&t, "\004");
    terminal_end(&t, 0);
    end_here("terminal_ctrl_c_keeps_the_conversation");

    // Ctrl-C at the prompt: the line is gone, the conversation stays. In a paste and in a block, too, and when the
    // terminal drops what the program was about to read.
    static const char *const typed[] = {"not meant", "\033[200~not\rmeant", "\"\"\"\rnot\rmeant", "not meant"};
    for (int i = 0; i < 4; i++) {
        Expected x = expect_nothing();
        t = START_CHAT(out, "-n", "5", "--verbose");
        terminal_expect(&t, "> ");
        terminal_type(&t, typed[i]);
        if (i == 1)
            terminal_wait_taken(&t);
        else if (i != 3)
            terminal_expect(&t, "meant");
        terminal_type(&t, "\003");
        terminal_expect(&t, "> ");
        type_message(&t, &x, "Hi\r", "Hi");
        end_conversation(&t, &x, out);
        static const char *const names[] = {"terminal_ctrl_c_at_the_prompt", "terminal_ctrl_c_in_a_paste",
                                            "terminal_ctrl_c_in_a_block", "terminal_ctrl_c_before_it_is_read"};
        end_here(names[i]);
    }

    static const struct {
        const char *name;
        int number;
    } signals[] = {{"terminal_sigterm_at_the_prompt", SIGTERM},
                   {"terminal_sighup_at_the_prompt", SIGHUP},
                   {"terminal_sigquit_at_the_prompt", SIGQUIT}};
    for (int i = 0; i < 3; i++) {
        t = START_CHAT(NULL, "-n", "5");
        terminal_expect(&t, "> ");
        terminal_type(&t, "half a li");
        terminal_expect(&t, "half a li");
        kill(t.child, signals[i].number);
        terminal_end(&t, 130);
        end_here(signals[i].name);
    }

    // Ctrl-Z: the shell finds its terminal; when the program goes on the line is there again.
    t = START_CHAT(NULL, "-n", "5", "--verbose");
    terminal_expect(&t, "> ");
    terminal_type(&t, "/hel");
    terminal_expect(&t, "/hel");
    terminal_type(&t, "\032");
    siginfo_t stopped = {.si_pid = 0};
    if (waitid(P_PID, (id_t)t.child, &stopped, WSTOPPED | WEXITED) != 0 || stopped.si_code != CLD_STOPPED)
        test_fail("not stopped");
    struct termios now;
    if (tcgetattr(t.screen, &now) != 0 || now.c_lflag != t.before.c_lflag || now.c_iflag != t.before.c_iflag)
        test_fail("the terminal is not as it was");
    kill(t.child, SIGCONT);
    terminal_expect(&t, "/hel");
    terminal_type(&t, "p\r");
    terminal_expect(&t, "Ctrl-D  ends");
    terminal_expect(&t, "> ");
    terminal_type(&t, "\004");
    terminal_end(&t, 0);
    end_here("terminal_ctrl_z");

    // Ctrl-D during an answer ends the conversation after it.
    write_file(out, "", 0);
    t = START_CHAT(out, "--ignore-eos", "-n", "2000", "--temp", "1");
    terminal_expect(&t, "> ");
    terminal_type(&t, "Hi\r");
    wait_for_growth(&t, out, 0);
    terminal_type(&t, "\004");
    terminal_end(&t, 0);
    end_here("terminal_ctrl_d_during_an_answer");
}

// What is typed arrives as it is: each in a conversation of its own.
static void test_terminal_typing(const char *out) {
    static const struct {
        const char *name, *typed, *message;
        bool library; // it is keys of one
    } rows[] = {
        {"terminal_utf8", "translate \u65E5\u672C\u8A9E please\r", "translate \u65E5\u672C\u8A9E please", false},
        {"terminal_utf8_of_all_lengths", "\u00E9\u00AA\u0410\u3042\U0001F600\r", "\u00E9\u00AA\u0410\u3042\U0001F600",
         false},
        {"terminal_backspace", "a \u65E5\u672C\177x\177y\r", "a \u65E5y", false},
        {"terminal_kill_line", "not this\025this\r", "this", false},
        {"terminal_kill_word", "a word  \027b\r", "a b", false},
        {"terminal_line_editing", "/wrnog\033[D\033[D\033[D\177\033[Cr\033[C\r", "/wrong", true},
        {"terminal_arrows_are_no_text", "x\033[A\033[By\033OAz\r", "xyz", false},
        {"terminal_tab", "/ch\tx\r", "/ch\tx", false},
        {"terminal_no_completion", "/et\033?\033*\033=x\r", "/etx", true},
        {"terminal_slash_is_no_command", "/etc/passwd is a file\r", "/etc/passwd is a file", false},
        {"terminal_command_and_more", "/clear me\r", "/clear me", false},
        {"terminal_unknown_command", "/wrong\r", "/wrong", false},
        {"terminal_paste", "\033[200~one\r  two\r\r/clear\033[201~\r", "one\n  two\n\n/clear", false},
        {"terminal_paste_between", "a \033[200~\u65E5\rb\tc\033[201~ d\r", "a \u65E5\nb\tc d", false},
        {"terminal_two_pastes", "\033[200~a\r\033[201~\033[200~b\033[201~\r", "a\nb", false},
        {"terminal_block", "\"\"\"\rone\r\r  /clear\rtwo\r\"\"\" \r", "one\n\n  /clear\ntwo", false},
        {"terminal_quotes_and_more", "\"\"\"a\r", "\"\"\"a", false},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        if (rows[i].library && !edited) continue;
        Expected x = expect_nothing();
        Terminal t = START_CHAT(out, "-n", "5", "--verbose");
        terminal_expect(&t, "> ");
        type_message(&t, &x, rows[i].typed, rows[i].message);
        type_message(&t, &x, "again\r", "again");
        end_conversation(&t, &x, out);
        end_here(rows[i].name);
    }

    if (!edited) return;
    Expected x = expect_nothing();
    Terminal t = START_CHAT(out, "-n", "5", "--verbose");
    terminal_expect(&t, "> ");
    type_message(&t, &x, "Hi\r", "Hi");
    type_message(&t, &x, "\033[A\r", "Hi"); // the last line again
    end_conversation(&t, &x, out);
    end_here("terminal_history");
}

// More than the 4095 bytes that a terminal's own lines take.
static void test_terminal_long_line(const char *out) {
    enum { LONG = 3 * 4096 };
    char *line = must(malloc(LONG + 2));
    memset(line, 'x', LONG);
    memcpy(line + LONG, "\r", 2);
    Terminal t = START_CHAT(out, "-n", "5", "--verbose", "-c", "300");
    terminal_expect(&t, "> ");
    for (size_t i = 0; i < LONG; i += 1024) { // what is shown is read meanwhile
        if (write(t.keyboard, line + i, 1024) != 1024) die("typing");
        terminal_read(&t);
    }
    terminal_type(&t, "\r");
    char refused[64];
    snprintf(refused, sizeof refused, "at least %d tokens", 98 - 3 + LONG);
    terminal_expect(&t, "the conversation would have at least ");
    int least = atoi(t.shown + t.seen);
    if (least < LONG / 17) test_fail("%d tokens at least, of %d bytes", least, LONG);
    terminal_expect(&t, "> ");
    terminal_type(&t, "\004");
    terminal_end(&t, 0);
    end_here("terminal_long_line");
    free(line);
}

static void test_terminal_commands(const char *out) {
    static const char *const quits[] = {"/quit\r", "/exit\r", "/quit \t\r"};
    for (int i = 0; i < 3; i++) {
        Terminal t = START_CHAT(NULL, "-n", "5");
        terminal_expect(&t, "> ");
        terminal_type(&t, quits[i]);
        terminal_end(&t, 0);
    }
    end_here("terminal_quit");

    Expected x = expect_nothing();
    Terminal t = START_CHAT(out, "-n", "5", "--verbose");
    terminal_expect(&t, "> ");
    terminal_type(&t, "/regen\r");
    terminal_expect(&t, "there is no answer yet");
    terminal_expect(&t, "> ");
    type_message(&t, &x, "Hi\r", "Hi");
    terminal_type(&t, "/regen\r");
    terminal_expect(&t, "at --temp 0 the answer would be the same");
    terminal_expect(&t, "> ");
    type_message(&t, &x, "and\r", "and");
    terminal_type(&t, "/clear\r");
    terminal_expect(&t, "a new conversation");
    terminal_expect(&t, "> ");
    terminal_type(&t, "/regen\r");
    terminal_expect(&t, "there is no answer yet");
    terminal_expect(&t, "> ");
    end_conversation(&t, &x, out);
    end_here("terminal_regen_at_temperature_0");

    // The next random stream, after the same ids: that of the second of two prompts.
    Ids ids;
    begin_ids(&ids, "26 Jul 2024", "");
    add_message(&ids, "user", "Hi");
    add_message(&ids, "assistant", NULL);
    char *lines = must(malloc((size_t)ids.n * 16 + 64)), *at = lines;
    for (int i = 0; i < 2; i++) {
        at += sprintf(at, "{\"ids\": [");
        for (int k = 0; k < ids.n; k++) at += sprintf(at, "%s%d", k ? "," : "", ids.ids[k]);
        at += sprintf(at, "]}\n");
    }
    const char *prompts = temporary("prompts");
    write_file(prompts, lines, (size_t)(at - lines));
    Run r = run_program(NULL, chat_path, "--prompts", prompts, "-b", "1", "-n", "12", "--temp", "1", "--quiet", NULL);
    check_status(&r, 0);
    t = START_CHAT(out, "-n", "12", "--temp", "1", "--verbose");
    terminal_expect(&t, "> ");
    terminal_type(&t, "Hi\r");
    terminal_expect(&t, " new");
    terminal_expect(&t, "> ");
    terminal_type(&t, "/regen\r");
    terminal_expect(&t, "turn 2: ");
    if (atoi(t.shown + t.seen) != ids.n - 1)
        test_fail("%d from the cache, expected %d", atoi(t.shown + t.seen), ids.n - 1);
    terminal_expect(&t, "> ");
    terminal_type(&t, "\004");
    terminal_end(&t, 0);
    size_t n;
    char *answers = read_whole(out, &n), want[1024];
    size_t length = 0;
    for (char *line = r.out; line && *line; line = strchr(line, '\n') + 1) {
        char *id = strstr(strstr(line, "]"), "\"ids\": [") + 8;
        for (char *end; *id != ']'; id = end + strspn(end, ", ")) {
            int one = (int)strtol(id, &end, 10);
            if (one < BYTES) want[length++] = (char)one;
        }
        want[length++] = '\n';
    }
    if (n != length || memcmp(answers, want, n) != 0)
        test_fail("standard output has %s, expected %s", shown(answers, n), shown(want, length));
    end_here("terminal_regen");
    free(answers);
    free(lines);
    run_free(&r);
}

// With every stream a terminal in a locale of UTF-8, in C's, in none and in one that is not installed.
static void test_terminal(void) {
    static const struct {
        const char *name, *lang, *all; // LANG and LC_ALL; NULL: not set
    } locales[] = {{"LANG unset", NULL, NULL},
                   {"C", "C", NULL},
                   {"C.UTF-8", "C.UTF-8", NULL},
                   {"LC_ALL=C", "C.UTF-8", "C"},
                   {"not installed", "xx_XX.UTF-8", NULL}};
    char out[300];
    snprintf(out, sizeof out, "%s", temporary("answers"));
    setenv("TERM", "xterm", 1);
    setenv("INPUTRC", "/dev/null", 1);
    for (size_t i = 0; i < sizeof locales / sizeof *locales; i++) {
        locale_name = locales[i].name;
        unsetenv("NO_COLOR");
        unsetenv("LC_CTYPE");
        if (locales[i].lang)
            setenv("LANG", locales[i].lang, 1);
        else
            unsetenv("LANG");
        if (locales[i].all)
            setenv("LC_ALL", locales[i].all, 1);
        else
            unsetenv("LC_ALL");
        test_terminal_answers(out);
        test_terminal_signals(out);
        test_terminal_typing(out);
        test_terminal_commands(out);
        if (i == 0) test_terminal_long_line(out);
    }
    if (!edited) test_skip("terminal_line_editing", "built without readline and libedit");
    setenv("LC_ALL", "C", 1);
}

// ---- the status line ------------------------------------------------------------------------------------------------

static void test_status_line(void) {
    char out[300];
    snprintf(out, sizeof out, "%s", temporary("answers"));
    char *text = must(malloc(1301));
    memset(text, 'a', 1300);
    text[1300] = 0;
    const char *const args[] = {chat_path, "-p", text, "-n", "2", NULL};
    Terminal t = terminal_start(out, args);
    terminal_expect(&t, "llama: loading [");
    terminal_expect(&t, "] ");
    terminal_expect(&t, " GB");
    terminal_expect(&t, "\r\033[K");
    terminal_expect(&t, "llama: prefilling [");
    terminal_expect(&t, " of 1301 tokens");
    terminal_expect(&t, "\r\033[K");
    terminal_expect(&t, "new tokens");
    terminal_end(&t, 0);
    test_end("status_line");
    // On a narrow terminal it is never wider than a line, without its bar if need be.
    static const unsigned short columns[] = {80, 50, 20};
    for (int i = 0; i < 3; i++) {
        terminal_columns = columns[i];
        t = terminal_start(out, args);
        terminal_expect(&t, "llama: prefilling ");
        terminal_wait(&t, "new tokens");
        int lines = 0;
        for (char *at = strstr(t.shown, "\rllama: prefilling"), *end; at; at = strstr(end, "\rllama: prefilling")) {
            end = strstr(at, "\033[K");
            if (!end) break;
            lines++;
            if (end - (at + 1) >= columns[i])
                test_fail("%td columns of %d: %s", end - (at + 1), columns[i], shown(at + 1, (size_t)(end - at - 1)));
        }
        CHECK(lines > 0);
        terminal_end(&t, 0);
        char name[40];
        snprintf(name, sizeof name, "status_line_in_%d_columns", columns[i]);
        test_end(name);
    }
    terminal_columns = 160;
    const char *const quiet[] = {chat_path, "-p", text, "-n", "2", "--quiet", NULL};
    t = terminal_start(out, quiet);
    terminal_wait(&t, NULL);
    CHECK(t.n == 0);
    terminal_end(&t, 0);
    test_end("status_line_not_with_quiet");
    Run r = run_program(NULL, chat_path, "-p", text, "-n", "2", NULL);
    check_status(&r, 0);
    CHECK(!strchr(r.err, '\r') && !strchr(r.err, '\033') && !strstr(r.err, "loading"));
    test_end("status_line_not_without_a_terminal");
    run_free(&r);
    free(text);
}

int main(void) {
    program_setup();
    Draft d;
    write_chat_model(&d);
    draft_free(&d);
    test_terminal();
    test_status_line();
    return tests_summary();
}
