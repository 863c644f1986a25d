// --chat from outside, through a pipe and with one message. The model is random in LLaMA 3.1's template and others'.
#define _GNU_SOURCE
#include "program.h"

#include "conversation.h"

static char stories_path[300], llama3_path[300], old_path[300], vocab_path[300], chatml_vocab_path[300], eot_path[300],
    chatml_path[300], deepseek_path[300];

static const char *path_of(char *path, const char *name) {
    snprintf(path, 300, "%s/%s", test_dir, name);
    return path;
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

// Turns with candidates are those without: the cache has what the next turn expects.
static void test_speculation(void) {
    static const char *const ways[][2] = {{"--lookup", NULL}, {"--draft", chat_path}};
    const char *input = "Hi\nHi again, hi again, hi again\nHi again, hi again, hi\n/clear\nHi again, hi again\n";
    Io io = {.input = input, .n_input = strlen(input)};
    for (int sampled = 0; sampled < 2; sampled++) {
        const char *temperature = sampled ? "0.7" : "0";
        Run plain = run_program(&io, chat_path, "--chat", "-n", "60", "--temp", temperature, "--quiet", NULL);
        check_status(&plain, 0);
        for (int i = 0; i < 2; i++) {
            Run r = run_program(&io, chat_path, "--chat", "-n", "60", "--temp", temperature, "--quiet", ways[i][0],
                                ways[i][1], NULL);
            check_output(&r, plain.out, plain.n_out);
            run_free(&r);
        }
        run_free(&plain);
    }
    test_end("turns_with_speculation");
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
    // What all pages of the cache hold, three here, is as good as a context.
    static const char *const contexts[2][3] = {{"-c", "200", "200"}, {"--kv-memory", "98304", "192"}};
    const char *told, *full, *refused;
    input = "Hi\nagain\n";
    io = (Io){.input = input, .n_input = strlen(input)};
    for (int i = 0; i < 2; i++) {
        r = run_program(&io, chat_path, "--chat", "--ignore-eos", contexts[i][0], contexts[i][1], NULL);
        check_status(&r, 1);
        told = strstr(r.err, " tokens has room for ");
        full = strstr(r.err, " tokens is full: the answer ends here");
        refused = strstr(r.err, " and needs room for an answer; the message was not sent");
        if (!told || !full || !refused || !(told < full && full < refused))
            test_fail("standard error has %s", shown(r.err, r.n_err));
        else
            CHECK(memcmp(told - 3, contexts[i][2], 3) == 0 && memcmp(full - 3, contexts[i][2], 3) == 0 &&
                  memcmp(refused - 3, contexts[i][2], 3) == 0);
        CHECK(strstr(r.err, i ? ", --kv-memory sets the context)" : ", -c sets the context)") != NULL);
        test_end(i ? "memory_is_told_before_it_ends" : "context_is_told_before_it_ends");
        run_free(&r);
    }

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
    check_failure(&r, 2, "--system goes with --chat or --prompts", NULL);
    test_end("system_without_chat");
    run_free(&r);
    r = run_program(NULL, llama3_path, "--chat", "--date", "1 January 2030", NULL);
    check_failure(&r, 1, "--date: this model's chat format is llama3, expected llama3.1", NULL);
    test_end("date_without_a_place_for_it");
    run_free(&r);
}

// ---- one message ----------------------------------------------------------------------------------------------------

// The list of that key in a line of JSON, as text: "1, 2, 3".
static char *json_ids(const char *line, const char *key) {
    char quoted[40];
    snprintf(quoted, sizeof quoted, "\"%s\": [", key);
    const char *found = line ? strstr(line, quoted) : NULL;
    if (!found) return must(strdup(""));
    found += strlen(quoted);
    return must(strndup(found, strcspn(found, "]")));
}

static void check_ids(const char *found, const Ids *want, const char *separator) {
    char *list = must(malloc((size_t)want->n * 8 + 1)), *at = list;
    *at = 0;
    for (int i = 0; i < want->n; i++) at += sprintf(at, "%s%d", i ? separator : "", want->ids[i]);
    if (strcmp(found, list) != 0)
        test_fail("ids %s, expected %s", shown(found, strlen(found)), shown(list, strlen(list)));
    free(list);
}

static int last_id(const char *ids) {
    const char *comma = strrchr(ids, ',');
    return atoi(comma ? comma + 1 : ids);
}

static int count_ids(const char *ids) {
    int n = *ids != 0;
    for (; *ids; ids++) n += *ids == ',';
    return n;
}

static void test_one_message(void) {
    char text[4096];
    Ids ids;
    begin_ids(&ids, "1 May 2031", "Be kind.");
    add_message(&ids, "user", "Hi");
    add_message(&ids, "assistant", NULL);
    Ids prompt = ids;
    size_t n = ask(&ids, "20", text);
    Run r = run_program(NULL, chat_path, "--chat", "-p", " Hi\n", "-n", "20", "--system", "Be kind.", "--date",
                        "1 May 2031", "--quiet", NULL);
    check_output(&r, text, n);
    CHECK(r.n_err == 0);
    test_end("one_message");
    run_free(&r);

    // A file's lines are one message, of which neither is a command.
    static const char lines[] = "Translate:\r\n/clear\n\"\"\"\nline two\n";
    begin_ids(&prompt, "26 Jul 2024", "");
    add_message(&prompt, "user", "Translate:\r\n/clear\n\"\"\"\nline two");
    add_message(&prompt, "assistant", NULL);
    Io io = {.input = lines, .n_input = sizeof lines - 1};
    r = run_program(&io, chat_path, "--chat", "-f", "-", "-n", "4", "--json", "--quiet", NULL);
    check_status(&r, 0);
    char *found = json_ids(r.out, "prompt_ids");
    check_ids(found, &prompt, ", ");
    CHECK(strstr(r.out, "\"finish_reason\": \"length\"") != NULL);
    test_end("one_message_of_several_lines");
    free(found);
    run_free(&r);

    // What it costs is said, and where the answer was cut.
    r = run_program(NULL, chat_path, "--chat", "-p", "Hi", "-n", "7", "--ignore-eos", NULL);
    check_status(&r, 0);
    CHECK(strstr(r.err, "llama: the answer ends after 7 tokens (-n)\n") && strstr(r.err, "; 7 new tokens"));
    test_end("one_message_cut_at_n");
    run_free(&r);
    r = run_program(NULL, chat_path, "--chat", "-p", "Hi", "-c", "120", "--ignore-eos", NULL);
    check_status(&r, 0);
    CHECK(strstr(r.err, "llama: the context of 120 tokens is full: the answer ends here; -c sets it\n") != NULL);
    test_end("one_message_cut_at_c");
    run_free(&r);
    r = run_program(NULL, chat_path, "--chat", "-p", "Hi", "-c", "300", "--kv-memory", "98304", "--ignore-eos", NULL);
    check_status(&r, 0);
    CHECK(strstr(r.err, "llama: the context of 192 tokens is full: the answer ends here; --kv-memory sets it\n") !=
          NULL);
    test_end("one_message_cut_at_kv_memory");
    run_free(&r);
    // Room for the answer, beyond the usual context: 4096 - 100 < the prompt < 4096.
    char *message = must(malloc(4001));
    memset(message, 'x', 4000);
    message[4000] = 0;
    r = run_program(NULL, chat_path, "--chat", "-p", message, "--ignore-eos", "--json", "--quiet", NULL);
    check_status(&r, 0);
    found = json_ids(r.out, "ids");
    if (count_ids(found) != 1024) test_fail("%d new tokens, expected 1024", count_ids(found));
    test_end("one_message_has_room_for_its_answer");
    free(found);
    free(message);
    run_free(&r);

    static const struct {
        const char *name, *flag, *value, *fragment;
    } refusals[] = {{"one_message_with_special", "--special", NULL, "do not go with --chat"},
                    {"one_message_with_echo", "--echo", NULL, "do not go with --chat"},
                    {"one_message_with_ids", "--ids", NULL, "--ids goes with a prompt"},
                    {"one_message_twice", "-f", "x", "-p and -f: expected one of them"},
                    {"one_message_with_detokenize", "--detokenize", NULL, "expected one of them"}};
    for (size_t i = 0; i < sizeof refusals / sizeof *refusals; i++) {
        r = run_program(NULL, chat_path, "--chat", "-p", "x", refusals[i].flag, refusals[i].value, NULL);
        check_failure(&r, 2, refusals[i].fragment, NULL);
        test_end(refusals[i].name);
        run_free(&r);
    }
}

static void test_tokenize(void) {
    Ids ids;
    begin_ids(&ids, "2 May 2031", "Be kind.");
    add_message(&ids, "user", "<|eot_id|> Hi");
    add_message(&ids, "assistant", NULL);
    char want[8192], *at = want;
    for (int i = 0; i < ids.n; i++) at += sprintf(at, "%s%d", i ? " " : "", ids.ids[i]);
    strcpy(at, "\n");
    static const char *const models[] = {chat_path, vocab_path};
    for (int i = 0; i < 2; i++) {
        Run r = run_program(NULL, models[i], "--chat", "--tokenize", "-p", "<|eot_id|> Hi", "--system", "Be kind.",
                            "--date", "2 May 2031", NULL);
        check_output(&r, want, strlen(want));
        test_end(i ? "tokenize_a_conversation_with_a_vocabulary" : "tokenize_a_conversation");
        run_free(&r);
    }
    // ChatML keeps white space, but the end of a file's last line is none of the message's.
    static const struct {
        const char *name, *flag, *input, *message;
    } rows[] = {{"tokenize_chatml", "-p", " a\n", " a\n"},
                {"tokenize_chatml_file", "-f", " a\n\n", " a\n"},
                {"tokenize_chatml_file_of_windows", "-f", " a\r\n", " a"},
                {"tokenize_chatml_standard_input", "-p", "b", "b"},
                {"tokenize_chatml_nothing", "-p", "", ""}};
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        bool piped = rows[i].flag[1] == 'f' || i == 3;
        Io io = {.input = piped ? rows[i].input : "", .n_input = piped ? strlen(rows[i].input) : 0};
        Run r = run_program(&io, chatml_vocab_path, "--chat", "--tokenize", rows[i].flag, piped ? "-" : rows[i].input,
                            "--json", NULL);
        check_status(&r, 0);
        ids = (Ids){{BOS}, 1};
        add_chatml(&ids, "user", rows[i].message);
        add_chatml(&ids, "assistant", NULL);
        char *found = json_ids(r.out, "ids");
        check_ids(found, &ids, ", ");
        test_end(rows[i].name);
        free(found);
        run_free(&r);
    }
}

// ---- templates ------------------------------------------------------------------------------------------------------

// The end of a turn, where the file's end ids leave it out.
static void test_end_of_a_turn(void) {
    static const char *const base[] = {"--temp", "1", "-s", "2", "--json", "--quiet"};
    Run r =
        run_program(NULL, eot_path, "--chat", "-p", "Hi", base[0], base[1], base[2], base[3], base[4], base[5], NULL);
    check_status(&r, 0);
    char *ids = json_ids(r.out, "ids"), *prompt = json_ids(r.out, "prompt_ids"), n[16];
    int count = count_ids(ids);
    CHECK(strstr(r.out, "\"finish_reason\": \"stop\"") && last_id(ids) == EOT && count > 1);
    test_end("turn_ends_at_its_own_end");
    run_free(&r);

    snprintf(n, sizeof n, "%d", count + 5);
    r = run_program(NULL, eot_path, "--chat", "-p", "Hi", "-n", n, "--ignore-eos", base[0], base[1], base[2], base[3],
                    base[4], base[5], NULL);
    check_status(&r, 0);
    char *more = json_ids(r.out, "ids");
    CHECK(strncmp(more, ids, strlen(ids)) == 0 && count_ids(more) == count + 5);
    test_end("turn_goes_on_with_ignore_eos");
    free(more);
    run_free(&r);

    // Of prompts those with messages end there, others do not.
    char *lines = must(malloc(strlen(prompt) + 400));
    int length =
        sprintf(lines, "{\"messages\": [{\"content\": \"Hi\", \"role\": \"user\"}]}\n{\"ids\": [%s]}\n", prompt);
    const char *path = temporary("prompts");
    write_file(path, lines, (size_t)length);
    r = run_program(NULL, eot_path, "--prompts", path, "-b", "1", "-n", n, base[0], base[1], base[2], base[3], base[5],
                    NULL);
    check_status(&r, 0);
    more = json_ids(r.out, "ids");
    CHECK(strcmp(more, ids) == 0 && strstr(r.out, "\"finish_reason\": \"stop\"") != NULL);
    free(more);
    more = json_ids(r.out, "prompt_ids");
    CHECK(strcmp(more, prompt) == 0);
    free(more);
    free(lines);
    run_free(&r);
    // the same ids as the first of a file, so with its random stream
    lines = must(malloc(strlen(prompt) + 40));
    length = sprintf(lines, "{\"ids\": [%s]}\n", prompt);
    write_file(path, lines, (size_t)length);
    r = run_program(NULL, eot_path, "--prompts", path, "-n", n, base[0], base[1], base[2], base[3], base[5], NULL);
    check_status(&r, 0);
    more = json_ids(r.out, "ids");
    CHECK(strncmp(more, ids, strlen(ids)) == 0 && count_ids(more) == count + 5);
    test_end("turns_of_prompts");
    free(more);
    free(ids);
    free(prompt);
    free(lines);
    run_free(&r);
}

// A file from before the template was compared: as ever, with a note, once.
static void test_old_file(void) {
    static const char note[] = "chat format llama3.1 was not compared with the checkpoint's chat template";
    static const struct {
        const char *name, *flags[3];
        bool noted;
    } rows[] = {{"template_not_checked", {NULL}, true},
                {"template_not_checked_quiet", {"--quiet"}, false},
                {"template_not_checked_one_message", {"-p", "Hi"}, true},
                {"template_not_checked_tokenize", {"--tokenize", "-p", "Hi"}, true}};
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        Io io = {.input = "Hi\nHi\n", .n_input = 6};
        Run r[2];
        for (int old = 0; old < 2; old++) {
            const char *const args[] = {old ? old_path : chat_path,
                                        "--chat",
                                        "-n",
                                        "20",
                                        rows[i].flags[0] ? rows[i].flags[0] : "--verbose",
                                        rows[i].flags[1] ? rows[i].flags[1] : "--verbose",
                                        rows[i].flags[2] ? rows[i].flags[2] : "--verbose",
                                        NULL};
            r[old] = run_args(&io, args);
            check_status(&r[old], 0);
        }
        check_output(&r[1], r[0].out, r[0].n_out);
        const char *found = strstr(r[1].err, note);
        CHECK(!strstr(r[0].err, "was not compared"));
        CHECK(rows[i].noted ? found && !strstr(found + 1, note) : !found);
        test_end(rows[i].name);
        run_free(&r[0]);
        run_free(&r[1]);
    }
}

// Three turns of other templates, as the whole conversation as one prompt gives them.
static void test_other_templates(void) {
    static const char *const messages[] = {"Hi", " a <|im_end|> b", "<think>"};
    for (int deepseek = 0; deepseek < 2; deepseek++) {
        const char *model = deepseek ? deepseek_path : chatml_path, *input = "Hi\n a <|im_end|> b\n<think>\n";
        Ids ids = {{BOS}, 1};
        char text[4096], turns[3][80];
        size_t n = 0;
        if (deepseek)
            add_text(&ids, "Own system.");
        else
            add_chatml(&ids, "system", "Own system.");
        for (int t = 0, cached = 0; t < 3; t++) {
            if (deepseek) {
                ids.ids[ids.n++] = USER;
                for (const char *c = messages[t]; *c; c++)
                    if (strncmp(c, "<|im_end|>", 10) == 0) // an added token, and none of this template's
                        ids.ids[ids.n++] = IM_END, c += 9;
                    else
                        ids.ids[ids.n++] = (uint8_t)*c;
                ids.ids[ids.n++] = ASSISTANT;
                ids.ids[ids.n++] = THINK;
                add_text(&ids, "\n");
            } else {
                add_chatml(&ids, "user", NULL);
                for (const char *c = messages[t]; *c; c++)
                    if (strcmp(c, "<think>") == 0)
                        ids.ids[ids.n++] = THINK, c += 6;
                    else
                        ids.ids[ids.n++] = (uint8_t)*c;
                ids.ids[ids.n++] = IM_END;
                add_text(&ids, "\n");
                add_chatml(&ids, "assistant", NULL);
            }
            int prompt = ids.n;
            snprintf(turns[t], sizeof turns[t], "turn %d: %d tokens from the cache, %d prefilled", t + 1, cached,
                     prompt - cached);
            n += ask_model(model, &ids, "12", text + n);
            for (int i = prompt; i < ids.n; i++) CHECK(ids.ids[i] < BYTES); // no thoughts end, no token in the text
            cached = deepseek ? prompt - 2 : prompt + 11;
            if (deepseek) { // without the opening of the thoughts
                memmove(ids.ids + prompt - 2, ids.ids + prompt, (size_t)(ids.n - prompt) * sizeof *ids.ids);
                ids.n -= 2;
            }
            ids.ids[ids.n++] = deepseek ? SENTENCE_END : IM_END;
            if (!deepseek) add_text(&ids, "\n");
        }
        Io io = {.input = input, .n_input = strlen(input)};
        Run r = run_program(&io, model, "--chat", "-n", "12", "--verbose", NULL);
        check_output(&r, text, n);
        for (int t = 0; t < 3; t++)
            if (!strstr(r.err, turns[t])) test_fail("\"%s\" is not in: %s", turns[t], shown(r.err, r.n_err));
        test_end(deepseek ? "deepseek_turns" : "chatml_turns");
        run_free(&r);
    }
    Run r = run_program(NULL, chatml_path, "--chat", "--date", "today", NULL);
    check_failure(&r, 1, "--date: this model's chat format is chatml, expected llama3.1", NULL);
    test_end("date_in_chatml");
    run_free(&r);
    char id[16];
    snprintf(id, sizeof id, "97 %d %d %d", THINK, IM_START, IM_END);
    r = run_program(NULL, chatml_path, "--ids", "-p", id, "--echo", "-n", "1", "--quiet", NULL);
    check_status(&r, 0);
    CHECK(r.n_out >= 18 && memcmp(r.out, "a<think><|im_end|>", 18) == 0);
    test_end("added_tokens_print_as_text");
    run_free(&r);
}

// ---- messages of --prompts ------------------------------------------------------------------------------------------

// A line of --prompts, the index-th, has an error in place of an answer, and the message says so. There are others.
static void check_line_error(const Run *r, int index, const char *fragment) {
    char answer[64];
    if (!check_status(r, 1)) return;
    snprintf(answer, sizeof answer, "{\"index\": %d, \"line\": %d, \"error\": \"", index, index + 1);
    if (!strstr(r->out, answer)) test_fail("printed \"%s\", expected %s in it", shown(r->out, r->n_out), answer);
    if (!strstr(r->out, "\"finish_reason\": ")) test_fail("no line has an answer");
    if (!strstr(r->err, fragment))
        test_fail("the message is \"%s\", expected \"%s\" in it", shown(r->err, r->n_err), fragment);
}

static void test_messages(void) {
    static const char lines[] = "{\"messages\": [{\"role\": \"system\", \"content\": \"Own.\"}, {\"role\": \"user\", "
                                "\"content\": \" Hi\\n\"}]}\n"
                                "{\"messages\": [{\"content\": \"Hi\", \"role\": \"user\"}, {\"role\": \"assistant\", "
                                "\"content\": \"\\u00e9 <|eot_id|>\"}, "
                                "{\"role\": \"user\", \"content\": \"\"}]}\n"
                                "{\"ids\": [1, 2]}\n";
    char path[300];
    path_of(path, "messages");
    write_file(path, lines, sizeof lines - 1);
    Ids want[3] = {{{0}, 0}, {{0}, 0}, {{1, 2}, 2}};
    begin_ids(&want[0], "26 Jul 2024", "Own.");
    add_message(&want[0], "user", "Hi");
    add_message(&want[0], "assistant", NULL);
    begin_ids(&want[1], "3 May 2031", "Be kind.");
    add_message(&want[1], "user", "Hi");
    add_message(&want[1], "assistant", "\u00E9 <|eot_id|>");
    add_message(&want[1], "user", "");
    add_message(&want[1], "assistant", NULL);
    static const char *const models[] = {chat_path, chat_path, vocab_path};
    for (int i = 0; i < 3; i++) {
        const char *const args[] = {models[i],      "--prompts", path,
                                    "--system",     "Be kind.",  "--date",
                                    "3 May 2031",   "--quiet",   i ? "--tokenize" : "-n",
                                    i ? NULL : "3", NULL};
        Run r = run_args(NULL, args);
        check_status(&r, 0);
        char *line = r.out;
        for (int k = 0; k < 3 && line; k++, line = line ? line + 1 : NULL) {
            char *end = strchr(line, '\n'),
                 *found = i ? must(strndup(line, strcspn(line, "\n"))) : json_ids(line, "prompt_ids");
            check_ids(found, &want[k], i ? " " : ", ");
            free(found);
            line = end;
        }
        static const char *const names[] = {"prompts_with_messages", "tokenize_prompts",
                                            "tokenize_prompts_with_a_vocabulary"};
        test_end(names[i]);
        run_free(&r);
    }

    static const struct {
        const char *name, *line, *fragment;
    } refusals[] = {
        {"messages_empty", "[]", "bad:2: no messages, expected the user's at the end"},
        {"messages_end_with_the_assistant",
         "[{\"role\": \"user\", \"content\": \"a\"}, {\"role\": \"assistant\", \"content\": \"b\"}]",
         "bad:2: the last message is not the user's, expected the user's at the end"},
        {"messages_of_the_system_alone", "[{\"role\": \"system\", \"content\": \"a\"}]",
         "bad:2: the last message is not the user's"},
        {"messages_unknown_role", "[{\"role\": \"tool\", \"content\": \"a\"}]",
         "bad:2: message 1: role \"tool\", expected system, user or assistant"},
        {"messages_late_system",
         "[{\"role\": \"user\", \"content\": \"a\"}, {\"role\": \"system\", \"content\": \"b\"}]",
         "bad:2: message 2: role \"system\", expected user or assistant (system comes first)"},
        {"messages_without_content", "[{\"role\": \"user\"}]", "bad:2: message 1 has no \"content\""},
        {"messages_without_role", "[{\"content\": \"user\"}]", "bad:2: message 1 has no \"role\""},
        {"messages_role_twice", "[{\"role\": \"user\", \"role\": \"user\", \"content\": \"a\"}]",
         "bad:2: message 1: a second key \"role\", expected \"role\" and \"content\""},
        {"messages_unknown_key", "[{\"role\": \"user\", \"name\": \"x\", \"content\": \"a\"}]",
         "bad:2: message 1: unknown key \"name\", expected \"role\" and \"content\""},
        {"messages_content_in_parts", "[{\"role\": \"user\", \"content\": [{\"type\": \"text\"}]}]", "bad:2: bad JSON"},
        {"messages_no_list", "{\"role\": \"user\", \"content\": \"a\"}", "bad:2: bad JSON"},
    };
    for (size_t i = 0; i < sizeof refusals / sizeof *refusals; i++) {
        char text[400];
        int n = snprintf(text, sizeof text, "{\"text\": \"a\"}\n{\"messages\": %s}\n", refusals[i].line);
        write_file(temporary("bad"), text, (size_t)n);
        Run r = run_program(NULL, chat_path, "--prompts", temporary("bad"), "-n", "2", "--quiet", NULL);
        check_line_error(&r, 1, refusals[i].fragment);
        test_end(refusals[i].name);
        run_free(&r);
    }
    static const char plain[] = "{\"text\": \"a\"}\n";
    write_file(temporary("plain"), plain, sizeof plain - 1);
    Run r = run_program(NULL, chat_path, "--prompts", temporary("plain"), "--system", "x", NULL);
    check_failure(&r, 1, "plain: --system and --date go with messages, and no line has any", NULL);
    test_end("system_of_prompts_without_messages");
    run_free(&r);
    r = run_program(NULL, "model/stories.bin", "--prompts", path, "-n", "2", "--quiet", NULL);
    check_line_error(&r, 0, "messages:1: messages: this model has no chat format");
    test_end("messages_without_a_chat_format");
    run_free(&r);
}

// The chat model with the tokens of ChatML and deepseek, some of them not special.
static void write_other_models(void) {
    static const struct {
        const char *text;
        int id, kind;
    } tokens[] = {{"<|im_start|>", IM_START, 1},
                  {"<|im_end|>", IM_END, 3},
                  {"<\uFF5CUser\uFF5C>", USER, 3},
                  {"<\uFF5CAssistant\uFF5C>", ASSISTANT, 3},
                  {"<\uFF5Cend\u2581of\u2581sentence\uFF5C>", SENTENCE_END, 1},
                  {"<think>", THINK, 3}};
    Draft d;
    draft_chat(&d, 1 << 16);
    Part *output = draft_part(&d, "output"); // without tokens of headers in the answers
    size_t row = output->n / output->shape[0];
    memset(output->data + START * row, 0, 2 * row);
    for (size_t i = 0; i < sizeof tokens / sizeof *tokens; i++)
        if (draft_token(&d, tokens[i].text, tokens[i].kind) != tokens[i].id)
            test_fail("another id for %s", tokens[i].text);
    draft_meta(&d, "format", "llama-model/2");
    draft_meta(&d, "chat_system", "Own system.");
    draft_meta(&d, "chat_format", "chatml");
    draft_write(&d, path_of(chatml_path, "chatml.bin"));
    draft_meta(&d, "chat_format", "deepseek");
    draft_write(&d, path_of(deepseek_path, "deepseek.bin"));
    draft_meta(&d, "chat_format", "chatml");
    draft_meta(&d, "chat_system", NULL);
    draft_vocab_only(&d);
    draft_write(&d, path_of(chatml_vocab_path, "chatml-vocabulary.bin"));
    draft_free(&d);
}

int main(void) {
    program_setup();
    Draft d;
    snprintf(llama3_path, sizeof llama3_path, "%s/llama3.bin", test_dir);
    snprintf(stories_path, sizeof stories_path, "%s/stories.bin", test_dir);
    write_chat_model(&d);
    draft_meta(&d, "converter", NULL);
    draft_write(&d, path_of(old_path, "old.bin"));
    draft_meta(&d, "eos_ids", "257");
    draft_write(&d, path_of(eot_path, "eot.bin"));
    draft_vocab_only(&d);
    draft_write(&d, path_of(vocab_path, "vocabulary.bin"));
    draft_free(&d);
    write_other_models();
    draft_read(&d, "model/stories.bin");
    draft_meta(&d, "chat_format", "llama3.1");
    draft_write(&d, stories_path);
    draft_meta(&d, "chat_format", "llama3");
    draft_write(&d, llama3_path);
    draft_free(&d);
    test_pipe();
    test_speculation();
    test_room();
    test_refusals();
    test_one_message();
    test_tokenize();
    test_end_of_a_turn();
    test_old_file();
    test_other_templates();
    test_messages();
    return tests_summary();
}
