// --chat from outside, through a pipe and with one message. The model is random in LLaMA 3.1's template and others'.
#define _GNU_SOURCE
#include "program.h"

#include "conversation.h"

static char stories_path[300], llama3_path[300];

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
        int generated = ids.n - prompt - (ids.n - prompt > atoi(n)); // the last one of less than -n is an end id
        cached = prompt + generated - 1; // the last token's keys and values are computed with the next turn
        snprintf(turns + strlen(turns), sizeof turns - strlen(turns),
                 "turn %d: %d tokens from the cache, %d prefilled, %d new%s", t + 1, kept, prompt - kept, generated,
                 generated > 1 ? " (" : ";"); // tokens per second
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

    // Only two commands count in a pipe.
    input = "/quit\n/exit\n/regen\n\"\"\"\n";
    io = (Io){.input = input, .n_input = strlen(input)};
    r = run_program(&io, chat_path, "--chat", "-n", "4", "--verbose", NULL);
    check_status(&r, 0);
    CHECK(strstr(r.err, "turn 4: ") != NULL && strstr(r.err, "turn 5: ") == NULL);
    test_end("commands_of_a_terminal_are_messages_of_a_pipe");
    run_free(&r);
}

static void test_room(void) {
    const char *input;
    Io io;
    Run r;

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
}

static void test_refusals(void) {
    const char *input;
    Io io;
    Run r;
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
    } refusals[] = {{"chat_with_json", "--json", NULL, "--json with --chat: expected one message"},
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
    check_failure(&r, 2, "--system and --date go with --chat or --prompts", NULL);
    test_end("system_without_chat");
    run_free(&r);
    r = run_program(NULL, llama3_path, "--chat", "--date", "1 January 2030", NULL);
    check_failure(&r, 1, "--date: this model's chat format is llama3, expected llama3.1", NULL);
    test_end("date_without_a_place_for_it");
    run_free(&r);
}

int main(void) {
    program_setup();
    Draft d;
    snprintf(llama3_path, sizeof llama3_path, "%s/llama3.bin", test_dir);
    snprintf(stories_path, sizeof stories_path, "%s/stories.bin", test_dir);
    write_chat_model(&d);
    draft_free(&d);
    draft_read(&d, "model/stories.bin");
    draft_meta(&d, "chat_format", "llama3.1");
    draft_write(&d, stories_path);
    draft_meta(&d, "chat_format", "llama3");
    draft_write(&d, llama3_path);
    draft_free(&d);
    test_pipe();
    test_room();
    test_refusals();
    return tests_summary();
}
