// --chat, from outside: through a pipe and in a pseudo-terminal. The model is random in LLaMA 3.1's frame; what it
// answers is asked of it a second time, with the whole conversation as one prompt of ids.
#include "terminal.h"

#include "model_writer.h"

enum { MOST_IDS = 4096 };

static char chat_path[300], stories_path[300], llama3_path[300];

// ---- what a conversation is -----------------------------------------------------------------------------------------

typedef struct {
    int ids[MOST_IDS], n;
} Ids;

static void add_text(Ids *ids, const char *text) {
    for (; *text; text++) ids->ids[ids->n++] = (uint8_t)*text;
}

static void add_message(Ids *ids, const char *role, const char *text) {
    ids->ids[ids->n++] = START;
    add_text(ids, role);
    ids->ids[ids->n++] = END;
    add_text(ids, "\n\n");
    if (!text) return;
    add_text(ids, text);
    ids->ids[ids->n++] = EOT;
}

static void begin_ids(Ids *ids, const char *date, const char *system) {
    char text[512];
    snprintf(text, sizeof text, "Cutting Knowledge Date: December 2023\nToday Date: %s\n\n%s", date, system);
    *ids = (Ids){{BOS}, 1};
    add_message(ids, "system", text);
}

// What the model answers to these ids, as text with a newline, as --chat prints it; the ids go behind, with <|eot_id|>.
static size_t ask(Ids *ids, const char *n, char *text) {
    char *list = must(malloc((size_t)ids->n * 8 + 1)), *at = list;
    for (int i = 0; i < ids->n; i++) at += sprintf(at, "%d ", ids->ids[i]);
    Io io = {.input = list, .n_input = (size_t)(at - list)};
    Run r = run_program(&io, chat_path, "--ids", "-f", "-", "-n", n, "--json", "--quiet", NULL);
    check_status(&r, 0);
    const char *found = strstr(r.out, "\"ids\": [");
    size_t length = 0;
    int last = -1;
    for (char *id = (char *)(found ? found + 8 : "]"), *end; *id != ']'; id = end + strspn(end, ", ")) {
        ids->ids[ids->n++] = last = (int)strtol(id, &end, 10);
        if (end == id) break;
        if (last < BYTES) text[length++] = (char)last;
    }
    if (last != EOT) ids->ids[ids->n++] = EOT;
    text[length++] = '\n';
    free(list);
    run_free(&r);
    return length;
}

// ---- through a pipe -------------------------------------------------------------------------------------------------

// Three turns: the same answers as the whole conversation as one prompt gives, and only what is new is prefilled.
static void test_turns(const char *name, const char *n, const char *system, const char *date) {
    static const char *const messages[] = {"Hi", "What is \xC3\xA9?", "<|eot_id|> is no token here"};
    char text[4096], turns[1024] = "", *input = "Hi\n\n  What is \xC3\xA9?\r\n<|eot_id|> is no token here";
    size_t length = 0;
    Ids ids;
    begin_ids(&ids, date ? date : "26 Jul 2024", system ? system : "");
    for (int t = 0, cached = 0; t < 3; t++) {
        add_message(&ids, "user", messages[t]);
        add_message(&ids, "assistant", NULL);
        int prompt = ids.n, kept = cached;
        length += ask(&ids, n, text + length);
        bool closed = ids.ids[ids.n - 1] == EOT && ids.n - prompt <= atoi(n);
        int generated = ids.n - prompt - !closed;
        cached = prompt + generated - 1; // the last token's keys and values are computed with the next turn
        snprintf(turns + strlen(turns), sizeof turns - strlen(turns),
                 "turn %d: %d tokens from the cache, %d prefilled, %d new", t + 1, kept, prompt - kept, generated);
        strcat(turns, t < 2 ? "|" : "");
    }
    Io io = {.input = input, .n_input = strlen(input)};
    const char *args[16] = {chat_path, "--chat", "-n", n, "--verbose"};
    int k = 5;
    if (system) args[k++] = "--system", args[k++] = system;
    if (date) args[k++] = "--date", args[k++] = date;
    Run r = run_args(&io, args);
    check_output(&r, text, length);
    for (char *turn = strtok(turns, "|"); turn; turn = strtok(NULL, "|"))
        if (!strstr(r.err, turn)) test_fail("\"%s\" is not in: %s", turn, shown(r.err, r.n_err));
    if (strchr(r.err, '\033')) test_fail("an escape sequence, and no terminal: %s", shown(r.err, r.n_err));
    test_end(name);
    run_free(&r);
}

static void test_pipe(void) {
    test_turns("three_turns", "30", NULL, NULL);
    test_turns("three_turns_of_one_token", "1", NULL, NULL);
    test_turns("system_and_date", "12", "You are terse.", "1 January 2030");

    // /clear: the same again, from nothing.
    const char *input = "Hi\n/clear \nHi\n/help\n";
    Io io = {.input = input, .n_input = strlen(input)};
    Run r = run_program(&io, chat_path, "--chat", "-n", "20", "--verbose", NULL);
    check_status(&r, 0);
    if (r.n_out % 2 || memcmp(r.out, r.out + r.n_out / 2, r.n_out / 2) != 0)
        test_fail("not twice the same: %s", shown(r.out, r.n_out));
    CHECK(strstr(r.err, "turn 2: 0 tokens from the cache") != NULL);
    CHECK(strstr(r.err, "Ctrl-D  ends") != NULL && strstr(r.err, "turn 3") == NULL);
    test_end("clear_and_help");
    run_free(&r);

    // Every line of a pipe is a message, whatever it begins with; a blank one is none.
    input = " \t\n/etc/passwd is a file\n   \n";
    io = (Io){.input = input, .n_input = strlen(input)};
    r = run_program(&io, chat_path, "--chat", "-n", "20", "--quiet", NULL);
    char text[4096];
    Ids ids;
    begin_ids(&ids, "26 Jul 2024", "");
    add_message(&ids, "user", "/etc/passwd is a file");
    add_message(&ids, "assistant", NULL);
    check_output(&r, text, ask(&ids, "20", text));
    test_end("message_that_begins_with_a_slash");
    run_free(&r);

    // The context: told before it runs out, told when it is full, and a message without room is refused.
    input = "Hi\nagain\n";
    io = (Io){.input = input, .n_input = strlen(input)};
    r = run_program(&io, chat_path, "--chat", "--ignore-eos", "-c", "200", NULL);
    check_status(&r, 1);
    const char *told = strstr(r.err, "the context of 200 tokens has room for ");
    const char *full = strstr(r.err, "the context of 200 tokens is full: the answer ends here");
    const char *refused =
        strstr(r.err, "tokens, the context holds 200 and needs room for an answer; the message was not sent");
    if (!told || !full || !refused || !(told < full && full < refused))
        test_fail("standard error has %s", shown(r.err, r.n_err));
    test_end("context_is_told_before_it_ends");
    run_free(&r);

    // Much room is told when it becomes little; an answer of a given length that does not fit, at once.
    static const char *const limits[] = {NULL, "1000"};
    for (int i = 0; i < 2; i++) {
        input = "Hi\n";
        io = (Io){.input = input, .n_input = strlen(input)};
        r = run_program(&io, chat_path, "--chat", "--ignore-eos", "-c", "600", "--temp", "1", "--quiet",
                        limits[i] ? "-n" : NULL, limits[i], NULL);
        check_status(&r, 0);
        told = strstr(r.err, "has room for ");
        if (i == 0) CHECK(told && atoi(told + 13) <= 64 && atoi(told + 13) > 0);
        if (i == 1) CHECK(told && atoi(told + 13) > 256);
        CHECK(told && !strstr(told + 1, "has room for ") && strstr(told, "is full: the answer ends here"));
        test_end(i == 0 ? "context_is_told_when_little_is_left" : "context_is_told_to_be_less_than_n");
        run_free(&r);
    }

    // A long message is refused by its length, not after it was split.
    size_t n = 3 << 20;
    char *longer = must(malloc(n));
    memset(longer, 'a', n);
    io = (Io){.input = longer, .n_input = n};
    r = run_program(&io, chat_path, "--chat", "-c", "300", NULL);
    check_failure(&r, 1, "at least ", NULL);
    test_end("message_of_3_MB");
    free(longer);
    run_free(&r);

    r = run_program(NULL, chat_path, "--chat", "--system", "a system message that is longer than the context", "-c",
                    "40", NULL);
    check_failure(&r, 1, "the system message has ", NULL);
    test_end("system_longer_than_the_context");
    run_free(&r);
    r = run_program(NULL, "model/stories.bin", "--chat", NULL);
    check_failure(&r, 1, "chat", NULL);
    test_end("model_without_a_chat_format");
    run_free(&r);

    // What writes nothing: no input at all.
    r = run_program(NULL, chat_path, "--chat", "--quiet", NULL);
    check_output(&r, "", 0);
    CHECK(r.n_err == 0);
    test_end("no_input");
    run_free(&r);

    // The story model in the frame: what it says is not the point, that it says something is.
    input = "Tell me a story.\nAnd then?\n";
    io = (Io){.input = input, .n_input = strlen(input)};
    r = run_program(&io, stories_path, "--chat", "-n", "20", "--stop", "\n", "--verbose", NULL);
    check_status(&r, 0);
    CHECK(r.n_out > 20 && strstr(r.err, "turn 2: ") != NULL);
    test_end("story_model");
    run_free(&r);

    static const struct {
        const char *name, *flag, *value, *fragment;
    } refusals[] = {{"chat_with_p", "-p", "x", "a prompt, which --chat"},
                    {"chat_with_json", "--json", NULL, "do not go with --chat"},
                    {"chat_with_special", "--special", NULL, "do not go with --chat"},
                    {"chat_with_echo", "--echo", NULL, "do not go with --chat"},
                    {"chat_with_prompts", "--prompts", "x", "expected one of them"},
                    {"chat_with_ids", "--ids", NULL, "--ids goes with a prompt"},
                    {"chat_with_b", "-b", "2", "-b goes with --prompts"}};
    for (size_t i = 0; i < sizeof refusals / sizeof *refusals; i++) {
        r = run_program(NULL, chat_path, "--chat", refusals[i].flag, refusals[i].value, NULL);
        check_failure(&r, 2, refusals[i].fragment, NULL);
        test_end(refusals[i].name);
        run_free(&r);
    }
    r = run_program(NULL, chat_path, "-p", "x", "--system", "y", NULL);
    check_failure(&r, 2, "--system and --date go with --chat", NULL);
    test_end("system_without_chat");
    run_free(&r);
    r = run_program(NULL, llama3_path, "--chat", "--date", "1 January 2030", NULL);
    check_failure(&r, 1, "--date: this model's chat format is llama3, expected llama3.1", NULL);
    test_end("date_without_a_place_for_it");
    run_free(&r);
}

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

static void test_terminal(void) {
    setenv("TERM", "xterm", 1);
    unsetenv("NO_COLOR");
    char out[300];
    snprintf(out, sizeof out, "%s", temporary("answers"));
    Terminal t = START_CHAT(out, "-n", "20", "--verbose");
    terminal_expect(&t, "> ");
    CHECK(strstr(t.shown, "\033[1;32m") != NULL);
    terminal_type(&t, "Hi\r");
    terminal_expect(&t, "turn 1: 0 tokens from the cache");
    terminal_expect(&t, "> ");
    terminal_type(&t, "/help\r");
    terminal_expect(&t, "Ctrl-D  ends");
    terminal_expect(&t, "Lines are edited by ");
    terminal_expect(&t, "> ");
    bool edited = strstr(t.shown, "edited by the terminal alone") == NULL;
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
    test_end("terminal_answer_and_end");
    free(answers);

    setenv("NO_COLOR", "1", 1);
    t = START_CHAT(NULL, "-n", "5");
    terminal_expect(&t, "> ");
    CHECK(strstr(t.shown, "\033[1;32m") == NULL);
    terminal_type(&t, "\004");
    terminal_end(&t, 0);
    test_end("terminal_no_color");

    // Ctrl-C: the answer, which would not end, ends; the conversation goes on with its cache.
    write_file(out, "", 0);
    t = START_CHAT(out, "--ignore-eos", "-c", "1000000", "--temp", "1", "--verbose"); // text comes without end
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
    test_end("terminal_ctrl_c_keeps_the_conversation");

    // Ctrl-C at the prompt: the line is gone, the conversation stays.
    t = START_CHAT(NULL, "-n", "5", "--verbose");
    terminal_expect(&t, "> ");
    terminal_type(&t, "not meant");
    terminal_expect(&t, "not meant");
    terminal_type(&t, "\003");
    terminal_expect(&t, "> ");
    terminal_type(&t, "Hi\r");
    terminal_expect(&t, "turn 1: 0 tokens from the cache, ");
    begin_ids(&ids, "26 Jul 2024", "");
    add_message(&ids, "user", "Hi");
    add_message(&ids, "assistant", NULL);
    if (atoi(t.shown + t.seen) != ids.n) test_fail("%d prefilled, expected %d", atoi(t.shown + t.seen), ids.n);
    terminal_expect(&t, "> ");
    terminal_type(&t, "\004");
    terminal_end(&t, 0);
    test_end("terminal_ctrl_c_at_the_prompt");

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
        test_end(signals[i].name);
    }

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
    test_end("terminal_message_without_room");

    if (!edited) {
        test_skip("terminal_line_editing", "built without readline and libedit");
        return;
    }
    t = START_CHAT(NULL, "-n", "5");
    terminal_expect(&t, "> ");
    terminal_type(&t, "/wrnog\033[D\033[D\033[D\177\033[Cr\033[C\r"); // wrnog: back three, n away, forward, r
    terminal_expect(&t, ": no such command");
    terminal_expect(&t, "> ");
    terminal_type(&t, "\033[A\r"); // the last line again
    terminal_expect(&t, ": no such command");
    terminal_expect(&t, "> ");
    terminal_type(&t, "\004");
    CHECK(strstr(t.shown, "llama: /wrnog") == NULL);
    terminal_end(&t, 0);
    test_end("terminal_line_editing");

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
    test_end("terminal_ctrl_z");

    // A tab is a tab, not the name of a file.
    t = START_CHAT(NULL, "-n", "5");
    terminal_expect(&t, "> ");
    terminal_type(&t, "/ch\tx\r");
    terminal_expect(&t, "x: no such command");
    CHECK(strstr(t.shown, "/ch\tx: no such command") != NULL);
    terminal_expect(&t, "> ");
    terminal_type(&t, "\004");
    terminal_end(&t, 0);
    test_end("terminal_tab");

    // Ctrl-D during an answer ends the conversation after it.
    write_file(out, "", 0);
    t = START_CHAT(out, "--ignore-eos", "-n", "2000", "--temp", "1");
    terminal_expect(&t, "> ");
    terminal_type(&t, "Hi\r");
    wait_for_growth(&t, out, 0);
    terminal_type(&t, "\004");
    terminal_end(&t, 0);
    test_end("terminal_ctrl_d_during_an_answer");
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
    snprintf(chat_path, sizeof chat_path, "%s/chat.bin", test_dir);
    snprintf(llama3_path, sizeof llama3_path, "%s/llama3.bin", test_dir);
    snprintf(stories_path, sizeof stories_path, "%s/stories.bin", test_dir);
    draft_chat(&d, 1 << 20);
    draft_write(&d, chat_path);
    draft_free(&d);
    draft_read(&d, "model/stories.bin");
    draft_meta(&d, "chat_format", "llama3.1");
    draft_write(&d, stories_path);
    draft_meta(&d, "chat_format", "llama3");
    draft_write(&d, llama3_path);
    draft_free(&d);
    test_pipe();
    test_terminal();
    test_status_line();
    return tests_summary();
}
