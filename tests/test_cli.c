// What works on the command line: every flag's promise, seen from outside. The script model's text is known beforehand.
#include <sys/socket.h>

#include "model_writer.h"

static Script script;
static char script_path[300], tiny_path[300], vocab_path[300], prompt_path[300];

// The text of the script after `from`: n tokens, specials unprinted.
static size_t script_text(int from, int n, char *text) {
    size_t length = 0;
    for (int t = from; n > 0; n--) {
        t = script.next[t];
        if (t < BYTES) text[length++] = (char)t;
    }
    text[length] = 0;
    return length;
}

// ---- JSON -----------------------------------------------------------------------------------------------------------

static bool json_value(const char **at, int depth);

static bool json_space(const char **at) {
    while (**at == ' ' || **at == '\n' || **at == '\r' || **at == '\t') ++*at;
    return true;
}

static size_t utf8_length(const unsigned char *s) { // of a valid character other than a control; 0: it is not
    if (s[0] >= 0x20 && s[0] < 0x80) return 1;
    size_t n = s[0] >= 0xC2 && s[0] < 0xE0 ? 2 : s[0] >= 0xE0 && s[0] < 0xF0 ? 3 : s[0] >= 0xF0 && s[0] < 0xF5 ? 4 : 0;
    for (size_t i = 1; i < n; i++)
        if ((s[i] & 0xC0) != 0x80) return 0;
    if (n == 3 && ((s[0] == 0xE0 && s[1] < 0xA0) || (s[0] == 0xED && s[1] > 0x9F))) return 0;
    if (n == 4 && ((s[0] == 0xF0 && s[1] < 0x90) || (s[0] == 0xF4 && s[1] > 0x8F))) return 0;
    return n;
}

static bool json_text(const char **at) {
    if (*(*at)++ != '"') return false;
    while (**at != '"') {
        if (**at == '\\') {
            ++*at;
            if (**at == 'u') {
                for (int i = 1; i <= 4; i++)
                    if (!strchr("0123456789abcdefABCDEF", (*at)[i]) || !(*at)[i]) return false;
                *at += 5;
            } else {
                if (!**at || !strchr("\"\\/bfnrt", **at)) return false;
                ++*at;
            }
            continue;
        }
        size_t n = utf8_length((const unsigned char *)*at);
        if (n == 0) return false;
        *at += n;
    }
    ++*at;
    return true;
}

static bool json_number(const char **at) {
    const char *s = *at;
    if (*s == '-') s++;
    if (*s < '0' || *s > '9' || (s[0] == '0' && s[1] >= '0' && s[1] <= '9')) return false;
    while (*s >= '0' && *s <= '9') s++;
    if (*s == '.') {
        if (s[1] < '0' || s[1] > '9') return false;
        while (*++s >= '0' && *s <= '9') {
        }
    }
    if (*s == 'e' || *s == 'E') {
        s += s[1] == '-' || s[1] == '+' ? 2 : 1;
        if (*s < '0' || *s > '9') return false;
        while (*s >= '0' && *s <= '9') s++;
    }
    *at = s;
    return true;
}

static bool json_list(const char **at, char open, char close, int depth) {
    ++*at;
    json_space(at);
    if (**at == close) return ++*at;
    do {
        json_space(at);
        if (open == '{' && (!json_text(at) || !json_space(at) || *(*at)++ != ':')) return false;
        if (!json_value(at, depth + 1)) return false;
        json_space(at);
    } while (*(*at)++ == ',');
    return (*at)[-1] == close;
}

static bool json_value(const char **at, int depth) {
    json_space(at);
    if (depth > 16) return false;
    if (**at == '{') return json_list(at, '{', '}', depth);
    if (**at == '[') return json_list(at, '[', ']', depth);
    if (**at == '"') return json_text(at);
    static const char *const words[] = {"true", "false", "null"};
    for (int i = 0; i < 3; i++)
        if (strncmp(*at, words[i], strlen(words[i])) == 0) {
            *at += strlen(words[i]);
            return true;
        }
    return json_number(at);
}

// One object, on one line, and nothing else.
static bool json_valid(const Run *r) {
    const char *at = r->out;
    return *at == '{' && json_value(&at, 0) && at[0] == '\n' && at[1] == 0 && at + 1 == r->out + r->n_out;
}

// Where the value of a key of the outermost object begins, or NULL.
static const char *json_find(const char *json, const char *key) {
    const char *at = json + 1;
    for (;;) {
        json_space(&at);
        const char *name = at;
        if (*at != '"' || !json_text(&at)) return NULL;
        bool same = strlen(key) == (size_t)(at - name) - 2 && strncmp(name + 1, key, strlen(key)) == 0;
        json_space(&at);
        if (*at++ != ':') return NULL;
        json_space(&at);
        if (same) return at;
        if (!json_value(&at, 1)) return NULL;
        json_space(&at);
        if (*at++ != ',') return NULL;
    }
}

// A list of whole numbers; returns how many, -1 if it is none.
static int json_ids(const char *json, const char *key, int *ids, int most) {
    const char *at = json_find(json, key);
    int n = 0;
    if (!at || *at != '[') return -1;
    for (at++; *at != ']' && n < most; at += *at == ',') {
        char *end;
        ids[n++] = (int)strtol(at, &end, 10);
        if (end == at) return -1;
        at = end;
    }
    return *at == ']' ? n : -1;
}

// The value is exactly this JSON.
static void check_json(const Run *r, const char *key, const char *value) {
    const char *found = json_find(r->out, key);
    if (!found)
        test_fail("no key %s in %s", key, shown(r->out, r->n_out));
    else if (strncmp(found, value, strlen(value)) != 0 || !strchr(",}", found[strlen(value)]))
        test_fail("%s is %s, expected %s", key, shown(found, strlen(found)), value);
}

static void check_quiet(const Run *r) {
    if (r->n_err) test_fail("with --quiet on standard error: %s", shown(r->err, r->n_err));
}

// ---- short forms ----------------------------------------------------------------------------------------------------

// Runs, expects that output, and ends the test.
static void expect(const char *name, const Io *io, const char *out, size_t n, const char *const *args) {
    if (!test_wanted(name)) return;
    Run r = run_args(io, args);
    check_output(&r, out, n);
    check_quiet(&r);
    test_end(name);
    run_free(&r);
}

#define ARGS(...) ((const char *const[]){__VA_ARGS__, "--quiet", NULL})
#define EXPECT(name, out, ...) expect(name, NULL, out, sizeof(out) - 1, ARGS(__VA_ARGS__))
#define EXPECT_INPUT(name, in, out, ...) \
    expect(name, &(Io){.input = in, .n_input = sizeof(in) - 1}, out, sizeof(out) - 1, ARGS(__VA_ARGS__))

// ---- version and help -----------------------------------------------------------------------------------------------

static void test_help(void) {
    Run r = run_program(NULL, "--version", NULL);
    if (check_status(&r, 0) &&
        (strncmp(r.out, "llama ", 6) != 0 || !strstr(r.out, "cpu") || !strstr(r.out, "(commit ") ||
         !strstr(r.out, "CUDA") || strchr(r.out, '\n') != r.out + r.n_out - 1))
        test_fail("printed %s", shown(r.out, r.n_out));
    CHECK(r.n_err == 0);
    test_end("version");
    run_free(&r);

    static const char *const promised[] = {"-m, --model FILE",
                                           "-p, --prompt TEXT",
                                           "-f, --file FILE",
                                           "-n, --n-predict N",
                                           "-c, --ctx-size N",
                                           "-s, --seed SEED",
                                           "--top-k K",
                                           "--temp, --temperature T",
                                           "--top-p P",
                                           "--min-p P",
                                           "--stop STR",
                                           "--ignore-eos",
                                           "--ids",
                                           "--tokenize",
                                           "--detokenize",
                                           "--hex",
                                           "--special",
                                           "--echo",
                                           "--json",
                                           "--logprobs K",
                                           "--perplexity FILE",
                                           "--compare DUMP",
                                           "--bench",
                                           "--synthetic SHAPE",
                                           "--weights TYPE",
                                           "--engine NAME",
                                           "--precision P",
                                           "-t, --threads N",
                                           "--verbose",
                                           "--quiet",
                                           "--version",
                                           "-h, --help",
                                           "--chat",
                                           "--system TEXT",
                                           "--date TEXT",
                                           "--stride N",
                                           "--perplexity-windows KIND",
                                           "--prompts FILE",
                                           "-b N"};
    r = run_program(NULL, "--help", NULL);
    check_status(&r, 0);
    for (size_t i = 0; i < sizeof promised / sizeof *promised; i++) {
        char line[32];
        snprintf(line, sizeof line, "\n  %s", promised[i]);
        if (!strstr(r.out, line)) test_fail("--help does not list %s", promised[i]);
    }
    CHECK(r.n_err == 0);
    for (const char *line = r.out, *end; (end = strchr(line, '\n')); line = end + 1)
        if (end - line > 110) test_fail("a line of %d characters", (int)(end - line));
    test_end("help_lists_every_flag");

    // And each name that it lists is one of a flag: alone it lacks a value or a model, and is not unknown.
    for (const char *line = r.out; (line = strstr(line, "\n  -")); line += 3)
        for (const char *name = line + 3; *name == '-'; name += strspn(name, ", ")) {
            char flag[32];
            size_t n = strcspn(name, ", \n");
            snprintf(flag, sizeof flag, "%.*s", (int)n, name);
            name += n;
            if (strcmp(flag, "--help") == 0 || strcmp(flag, "-h") == 0 || strcmp(flag, "--version") == 0) continue;
            Run of_flag = run_program(NULL, flag, NULL);
            if (check_status(&of_flag, 2) && strstr(of_flag.err, "unknown flag"))
                test_fail("--help lists %s: unknown", flag);
            run_free(&of_flag);
        }
    test_end("help_lists_flags_that_exist");
    run_free(&r);
    r = run_program(NULL, "--help", script_path, "-p", "a", NULL);
    check_status(&r, 0);
    CHECK(strstr(r.out, "usage: ") != NULL);
    test_end("help_beside_other_flags");
    run_free(&r);
}

// ---- the prompt -----------------------------------------------------------------------------------------------------

static void test_prompts(void) {
    EXPECT("prompt_p", "bcdef", script_path, "-p", "a", "-n", "5");
    EXPECT("prompt_flags_before_the_model", "bcdef", "-n", "5", "-p", "a", script_path);
    EXPECT("prompt_f", "pqrst", script_path, "-f", prompt_path, "-n", "5");
    EXPECT_INPUT("prompt_f_standard_input", "klm", "nop", script_path, "-f", "-", "-n", "3");
    EXPECT_INPUT("prompt_p_standard_input", "klm", "nop", script_path, "-p", "-", "-n", "3");
    EXPECT("prompt_empty_has_bos", "abc", script_path, "-p", "", "-n", "3");
    EXPECT_INPUT("prompt_empty_file", "", "abc", script_path, "-f", "-", "-n", "3");
    EXPECT("prompt_begins_with_dash", "bc", script_path, "-p", "-a", "-n", "2");
    EXPECT("prompt_is_a_flag", "fgh", script_path, "-p", "--tree", "-n", "3");
    EXPECT("prompt_is_a_flag_of_ours", "q", script_path, "-p", "-p", "-n", "1");
    EXPECT("prompt_n_1", "b", script_path, "-p", "a", "-n", "1");
    EXPECT("prompt_fills_all_but_one", "d", script_path, "-p", "abc", "-c", "5");

    Run r =
        run_program(&(Io){.input = "a\0b", .n_input = 3}, script_path, "-f", "-", "-n", "1", "--json", "--quiet", NULL);
    check_status(&r, 0);
    check_json(&r, "prompt_ids", "[256, 97, 0, 98]");
    test_end("prompt_nul_byte");
    run_free(&r);
    r = run_program(NULL, script_path, "-p", "a\xFF\xC3(\xE2\x82", "-n", "1", "--json", "--quiet", NULL);
    check_status(&r, 0);
    check_json(&r, "prompt_ids", "[256, 97, 255, 195, 40, 226, 130]");
    test_end("prompt_not_utf8");
    run_free(&r);

    // 10 MB: refused by its bytes, whatever its tokens would be.
    size_t ten = 10 << 20;
    char *longer = must(malloc(ten));
    for (size_t i = 0; i < ten; i++) longer[i] = (char)('a' + i % 26);
    r = run_program(&(Io){.input = longer, .n_input = ten}, script_path, "-f", "-", NULL);
    check_failure(&r, 1, "the prompt of 10485760 bytes has at least ", NULL);
    CHECK(strstr(r.err, " tokens, the model's maximum is 1000") != NULL);
    test_end("prompt_of_10_MB");
    run_free(&r);
    free(longer);

    // ids
    static const char *const lists[] = {"107,108,109",    "107 108 109",     " 107,\t108\n109 ", "107, 108,, 109,",
                                        "0107 00108 109", "[107, 108, 109]", " [107 108,109]\n"};
    for (size_t i = 0; i < sizeof lists / sizeof *lists; i++) {
        char name[32];
        r = run_program(NULL, script_path, "--ids", "-p", lists[i], "-n", "2", "--json", "--quiet", NULL);
        check_status(&r, 0);
        check_json(&r, "prompt_ids", "[107, 108, 109]"); // and no BOS
        check_json(&r, "ids", "[110, 111]");
        snprintf(name, sizeof name, "ids_list_%zu", i + 1);
        test_end(name);
        run_free(&r);
    }
    EXPECT_INPUT("ids_from_a_file", "256\n107\r\n", "lm", script_path, "--ids", "-f", "-", "-n", "2");
    EXPECT("ids_of_a_special_token", "ABC", script_path, "--ids", "-p", "257", "-n", "3");
}

// The line end of a file's last line is not part of a prompt that is continued: one, and of no other text.
static void test_final_newline(void) {
    static const struct {
        const char *name, *input, *ids;
    } inputs[] = {{"final_newline", "a\r\nb\n", "[256, 97, 13, 10, 98]"},
                  {"final_newline_crlf", "a\r\n", "[256, 97]"},
                  {"final_newline_one_of_two", "a\n\n", "[256, 97, 10]"},
                  {"final_newline_one_of_two_crlf", "a\r\n\r\n", "[256, 97, 13, 10]"},
                  {"final_newline_none", "a", "[256, 97]"},
                  {"final_newline_not_of_a_return", "a\r", "[256, 97, 13]"},
                  {"final_newline_not_of_two_returns", "a\r\r\n", "[256, 97, 13]"},
                  {"final_newline_alone", "\n", "[256]"}};
    for (size_t i = 0; i < sizeof inputs / sizeof *inputs; i++) {
        const char *path = temporary("input");
        write_file(path, inputs[i].input, strlen(inputs[i].input));
        Io io = {.input = inputs[i].input, .n_input = strlen(inputs[i].input)};
        const char *const ways[][2] = {{"-f", path}, {"-f", "-"}, {"-p", "-"}};
        for (int w = 0; w < 3; w++) {
            Run r = run_program(&io, script_path, ways[w][0], ways[w][1], "-n", "1", "--json", "--quiet", NULL);
            check_status(&r, 0);
            check_json(&r, "prompt_ids", inputs[i].ids);
            run_free(&r);
        }
        test_end(inputs[i].name);
    }
    Run r = run_program(NULL, script_path, "-p", "a\n", "-n", "1", "--json", "--quiet", NULL);
    check_status(&r, 0);
    check_json(&r, "prompt_ids", "[256, 97, 10]");
    test_end("final_newline_of_an_argument_stays");
    run_free(&r);
    EXPECT_INPUT("final_newline_echo", "klm\n", "klmno", script_path, "-f", "-", "-n", "2", "--echo");
    EXPECT_INPUT("final_newline_of_ids", "107 108\n", "mn", script_path, "--ids", "-f", "-", "-n", "2");
    EXPECT_INPUT("final_newline_tokenized", "a\r\n", "97 13 10\n", vocab_path, "--tokenize", "-f", "-");
    EXPECT_INPUT("final_newline_tokenized_p", "a\n", "97 10\n", vocab_path, "--tokenize", "-p", "-");
    EXPECT_INPUT("final_newline_hex", "610a\n", "97 10\n", vocab_path, "--tokenize", "--hex", "-f", "-");
    // --verbose reports it, and where there is none does not.
    static const char *const texts[] = {"a\n", "a"};
    for (int i = 0; i < 2; i++) {
        Io io = {.input = texts[i], .n_input = strlen(texts[i])};
        r = run_program(&io, script_path, "-f", "-", "-n", "1", "--verbose", NULL);
        check_output(&r, "b", 1);
        if (!!strstr(r.err, "llama: standard input: its final newline is not part of the prompt\n") != !i)
            test_fail("standard error has %s", shown(r.err, r.n_err));
        run_free(&r);
    }
    test_end("final_newline_reported");
}

// BOS is there once; a special token is one only where --special says so.
static void test_special(void) {
    static const struct {
        const char *name, *prompt, *ids;
        bool special;
    } cases[] = {
        {"bos_before_text", "a", "[256, 97]", false},
        {"bos_before_text_special", "a", "[256, 97]", true},
        {"bos_not_doubled", "<|begin_of_text|>a", "[256, 97]", true},
        {"bos_written_twice_stays_twice", "<|begin_of_text|><|begin_of_text|>a", "[256, 256, 97]", true},
        {"bos_in_the_middle", "a<|begin_of_text|>", "[256, 97, 256]", true},
        {"bos_alone", "<|begin_of_text|>", "[256]", true},
        {"special_at_the_end", "ab<|eot_id|>", "[256, 97, 98, 258]", true},
        {"special_twice", "<|eot_id|><|end_of_text|>", "[256, 258, 257]", true},
        {"special_cut_off", "<|eot_id|", "[256, 60, 124, 101, 111, 116, 95, 105, 100, 124]", true},
        {"special_after_its_beginning", "<|<|eot_id|>", "[256, 60, 124, 258]", true},
        {"special_typed_by_a_user", "<|eot_id|>", "[256, 60, 124, 101, 111, 116, 95, 105, 100, 124, 62]", false},
        {"bos_typed_by_a_user", "<|begin_of_text|>",
         "[256, 60, 124, 98, 101, 103, 105, 110, 95, 111, 102, 95, 116, 101, 120, 116, 124, 62]", false},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        Run r = run_program(NULL, script_path, "-p", cases[i].prompt, "-n", "1", "--json", "--quiet",
                            cases[i].special ? "--special" : NULL, NULL);
        check_status(&r, 0);
        check_json(&r, "prompt_ids", cases[i].ids);
        test_end(cases[i].name);
        run_free(&r);
    }
    EXPECT("special_is_not_printed", "YZ01", script_path, "-p", "X", "-n", "5");
    EXPECT("special_is_printed_with_special", "YZ<|eot_id|>01", script_path, "-p", "X", "-n", "5", "--special");
    EXPECT("special_tokenize", "258 97\n", vocab_path, "--tokenize", "--special", "-p", "<|eot_id|>a");
    EXPECT("special_tokenize_typed", "60 124 101 111 116 95 105 100 124 62 97\n", vocab_path, "--tokenize", "-p",
           "<|eot_id|>a");
}

// ---- tokenize, detokenize -------------------------------------------------------------------------------------------

static void test_tokenizer_modes(void) {
    EXPECT("tokenize", "104 105 33\n", vocab_path, "--tokenize", "-p", "hi!");
    EXPECT("tokenize_with_weights", "104 105 33\n", script_path, "--tokenize", "-p", "hi!");
    EXPECT("tokenize_json", "{\"ids\": [104, 105, 33]}\n", vocab_path, "--tokenize", "--json", "-p", "hi!");
    EXPECT("tokenize_json_empty", "{\"ids\": []}\n", vocab_path, "--tokenize", "--json", "-p", "");
    EXPECT("detokenize_json", "{\"text\": \"h\\\"\xEF\xBF\xBD\"}\n", vocab_path, "--detokenize", "--json", "-p",
           "104 34 255");
    EXPECT("tokenize_empty", "\n", vocab_path, "--tokenize", "-p", "");
    EXPECT("detokenize", "hi!", vocab_path, "--detokenize", "-p", "104 105,33");
    EXPECT("detokenize_special", "a<|eot_id|>", vocab_path, "--detokenize", "-p", "97 258");
    EXPECT("detokenize_bytes", "\xFF\xC3", vocab_path, "--detokenize", "-p", "255 195");
    EXPECT("detokenize_nul", "a\0b", vocab_path, "--detokenize", "-p", "97 0 98");
    EXPECT("detokenize_hex", "6100ff\n", vocab_path, "--detokenize", "--hex", "-p", "97 0 255");
    EXPECT("tokenize_hex", "97 0 255\n", vocab_path, "--tokenize", "--hex", "-p", "6100fF");
    EXPECT_INPUT("tokenize_hex_lines", "6162\n\n00\r\nE282AC", "97 98\n\n0\n226 130 172\n", vocab_path, "--tokenize",
                 "--hex", "-f", "-");
    EXPECT_INPUT("tokenize_hex_last_newline", "61\n62\n", "97\n98\n", vocab_path, "--tokenize", "--hex", "-f", "-");
    EXPECT_INPUT("detokenize_hex_lines", "97 98\n\n0\n226,130,172\n", "6162\n\n00\ne282ac\n", vocab_path,
                 "--detokenize", "--hex", "-f", "-");
    EXPECT_INPUT("tokenize_text_is_one_text", "a\nb\n", "97 10 98 10\n", vocab_path, "--tokenize", "-f", "-");

    // There and back, line by line, for lines of all lengths and bytes.
    enum { LINES = 60 };
    char *hex = must(malloc(LINES * 2 * LINES + 1));
    size_t n = 0;
    writer_state = 7;
    for (int line = 0; line < LINES; line++) {
        for (int i = 0; i < line * 3 / 2 % LINES; i++)
            n += (size_t)sprintf(hex + n, "%02x", (unsigned)(writer_random() * 128 + 128) & 255);
        hex[n++] = '\n';
    }
    Run ids =
        run_program(&(Io){.input = hex, .n_input = n}, vocab_path, "--tokenize", "--hex", "-f", "-", "--quiet", NULL);
    check_status(&ids, 0);
    Run back = run_program(&(Io){.input = ids.out, .n_input = ids.n_out}, vocab_path, "--detokenize", "--hex", "-f",
                           "-", "--quiet", NULL);
    check_output(&back, hex, n);
    test_end("hex_round_trip");
    run_free(&ids);
    run_free(&back);
    free(hex);

    // The whole file, raw.
    char bytes[1000];
    for (size_t i = 0; i < sizeof bytes; i++) bytes[i] = (char)(i * i / 7 + i);
    ids = run_program(&(Io){.input = bytes, .n_input = sizeof bytes}, vocab_path, "--tokenize", "-f", "-", NULL);
    check_status(&ids, 0);
    back = run_program(&(Io){.input = ids.out, .n_input = ids.n_out}, vocab_path, "--detokenize", "-f", "-", NULL);
    check_output(&back, bytes, sizeof bytes);
    test_end("raw_round_trip");
    run_free(&ids);
    run_free(&back);
}

// ---- where an answer ends -------------------------------------------------------------------------------------------

static void test_ends(void) {
    char text[400], name[64], count[16];
    static const int counts[] = {1, 2, 7, 36};
    for (int i = 0; i < 4; i++) {
        size_t n = script_text('a', counts[i], text);
        snprintf(count, sizeof count, "%d", counts[i]);
        snprintf(name, sizeof name, "n_%d_exactly", counts[i]);
        expect(name, NULL, text, n, ARGS(script_path, "-p", "a", "-n", count));
    }
    EXPECT("eos_ends", "\n\xE2\x82\xAC.", script_path, "-p", "\\", "-n", "50");
    EXPECT("ignore_eos_goes_on", "\n\xE2\x82\xAC.AB", script_path, "-p", "\\", "-n", "8", "--ignore-eos");
    EXPECT("ignore_eos_and_special", ".<|end_of_text|>A", script_path, "--ids", "-p", "172", "-n", "3", "--ignore-eos",
           "--special");

    EXPECT("echo", "abcdef", script_path, "-p", "abc", "-n", "3", "--echo");
    EXPECT("echo_prompt_of_other_bytes", "\xFF\xFF\"\\", script_path, "-p", "\xFF\xFF", "-n", "2", "--echo");
    EXPECT("echo_typed_special", "<|eot_id|>ab", script_path, "-p", "<|eot_id|>a", "-n", "1", "--echo");
    EXPECT("echo_special", "<|begin_of_text|><|eot_id|>ab", script_path, "-p", "<|eot_id|>a", "-n", "1", "--echo",
           "--special");
    EXPECT("echo_special_id_is_not_printed", "ab", script_path, "--ids", "-p", "258 97", "-n", "1", "--echo");

    EXPECT("stop_one", "bcd", script_path, "-p", "a", "--stop", "e");
    EXPECT("stop_across_tokens", "bcd", script_path, "-p", "a", "--stop", "efgh");
    EXPECT("stop_at_once", "", script_path, "-p", "a", "--stop", "b");
    EXPECT("stop_first_of_several", "bcd", script_path, "-p", "a", "--stop", "xyz", "--stop", "efg", "--stop", "hi");
    EXPECT("stop_shorter_of_two", "bcd", script_path, "-p", "a", "--stop", "efghij", "--stop", "ef");
    EXPECT("stop_inside_another", "bcdefg", script_path, "-p", "a", "--stop", "efx", "--stop", "hi");
    EXPECT("stop_that_almost_comes", "bcdefghij", script_path, "-p", "a", "-n", "9", "--stop", "efgX");
    EXPECT("stop_held_at_the_end", "bcdef", script_path, "-p", "a", "-n", "5", "--stop", "defghij");
    EXPECT("stop_is_not_sought_in_the_prompt", "efg", script_path, "-p", "abcd", "-n", "3", "--stop", "bc");
    EXPECT("stop_not_across_the_prompt", "efg", script_path, "-p", "abcd", "-n", "3", "--stop", "de");
    EXPECT("stop_echo", "abcd", script_path, "-p", "abc", "-n", "9", "--stop", "e", "--echo");
    EXPECT("stop_of_16", "bcdefghi", script_path, "-p", "a", "--stop", "1", "--stop", "2", "--stop", "3", "--stop", "4",
           "--stop", "5", "--stop", "6", "--stop", "7", "--stop", "8", "--stop", "9", "--stop", "10", "--stop", "11",
           "--stop", "12", "--stop", "13", "--stop", "14", "--stop", "15", "--stop", "j");
    EXPECT("stop_utf8", "\n", script_path, "-p", "\\", "--stop", "\xE2\x82\xAC");
    EXPECT("stop_newline", "\"\\", script_path, "-p", "\xFF", "--stop", "\n");
    EXPECT("stop_at_eos_comes_later", "\n\xE2\x82\xAC.", script_path, "-p", "\\", "--stop", ".A");
    // A special token by its text, printed or not; what begins like it is text.
    EXPECT("stop_special_token", "", script_path, "-p", "9", "-n", "5", "--stop", "<|begin_of_text|>");
    EXPECT("stop_special_token_printed", "", script_path, "-p", "9", "-n", "5", "--stop", "<|begin_of_text|>",
           "--special");
    EXPECT("stop_another_special_token", "abc", script_path, "-p", "9", "-n", "4", "--stop", "<|eot_id|>");
    EXPECT("stop_end_token", "\n\xE2\x82\xAC.", script_path, "-p", "\\", "-n", "50", "--stop", "<|end_of_text|>");
    EXPECT("stop_part_of_a_special_token", "abc", script_path, "-p", "9", "-n", "4", "--stop", "<|begin");
    EXPECT("stop_part_of_a_printed_special_token", "", script_path, "-p", "9", "-n", "4", "--stop", "<|begin",
           "--special");
    EXPECT("cut_character_at_the_end", "\xE2\x82", script_path, "-p", "\n", "-n", "2");

    static const struct {
        const char *name, *prompt, *n, *flag, *value, *ids, *text, *reason;
    } reasons[] = {
        {"json_length", "a", "3", NULL, NULL, "[98, 99, 100]", "\"bcd\"", "\"length\""},
        {"json_stop", "\\", "50", NULL, NULL, "[10, 226, 130, 172, 46, 257]", "\"\\n\xE2\x82\xAC.\"", "\"stop\""},
        {"json_stop_string", "a", "50", "--stop", "de", "[98, 99, 100, 101]", "\"bc\"", "\"stop_string\""},
        {"json_stop_special_token", "7", "5", "--stop", "<|begin_of_text|>", "[56, 57, 256]", "\"89\"",
         "\"stop_string\""},
        {"json_stop_end_token", "\\", "50", "--stop", "<|end_of_text|>", "[10, 226, 130, 172, 46, 257]",
         "\"\\n\xE2\x82\xAC.\"", "\"stop\""},
        {"json_stop_on_the_last_token", "a", "3", "--stop", "d", "[98, 99, 100]", "\"bc\"", "\"stop_string\""},
        {"json_ignore_eos", "\\", "7", "--ignore-eos", NULL, "[10, 226, 130, 172, 46, 257, 65]",
         "\"\\n\xE2\x82\xAC.A\"", "\"length\""},
        {"json_cut_character", "\n", "2", NULL, NULL, "[226, 130]", "\"\xEF\xBF\xBD\"", "\"length\""},
        {"json_bytes_and_escapes", " ", "6", NULL, NULL, "[195, 169, 255, 34, 92, 10]",
         "\"\xC3\xA9\xEF\xBF\xBD\\\"\\\\\\n\"", "\"length\""},
        {"json_bos_in_the_answer", "9", "2", NULL, NULL, "[256, 97]", "\"a\"", "\"length\""},
    };
    for (size_t i = 0; i < sizeof reasons / sizeof *reasons; i++) {
        Run r = run_program(NULL, script_path, "-p", reasons[i].prompt, "-n", reasons[i].n, "--json", "--quiet",
                            reasons[i].flag, reasons[i].value, NULL);
        check_status(&r, 0);
        check_quiet(&r);
        if (!json_valid(&r)) test_fail("not one line of JSON: %s", shown(r.out, r.n_out));
        check_json(&r, "index", "0");
        check_json(&r, "ids", reasons[i].ids);
        check_json(&r, "text", reasons[i].text);
        check_json(&r, "finish_reason", reasons[i].reason);
        const char *timings = json_find(r.out, "timings");
        CHECK(timings && *timings == '{');
        double first = -1, decode = -1, each = -1, p50 = -1, p95 = -1;
        int length = 0;
        const char *at = timings ? strstr(timings, "\"first_token_ms\"") : NULL;
        if (!at ||
            sscanf(at,
                   "\"first_token_ms\": %lf, \"decode_ms\": %lf, \"ms_per_token\": %lf, \"p50_ms\": %lf, "
                   "\"p95_ms\": %lf, \"shared_tokens\": 0, \"evictions\": 0%n",
                   &first, &decode, &each, &p50, &p95, &length) != 5 ||
            strcmp(at + length, "}}\n") != 0)
            test_fail("timings are %s", timings ? shown(timings, strlen(timings)) : "missing");
        // Half of the gaps are p50 or more, so their sum is at least half their number times p50.
        if (!(first > 0 && decode > 0 && each > 0 && p50 > 0 && p95 >= p50 && decode + 0.002 >= p95))
            test_fail("timings: first %g, decode %g, each %g, p50 %g, p95 %g", first, decode, each, p50, p95);
        test_end(reasons[i].name);
        run_free(&r);
    }

    // Each token's own text: of a part of a character or a stray byte U+FFFD, of a special token its name.
    static const struct {
        const char *name, *prompt, *n, *texts;
    } texts[] = {
        {"json_token_texts_of_bytes", " ", "6",
         "[\"\xEF\xBF\xBD\", \"\xEF\xBF\xBD\", \"\xEF\xBF\xBD\", \"\\\"\", \"\\\\\", \"\\n\"]"},
        {"json_token_texts_of_special_tokens", "9", "2", "[\"<|begin_of_text|>\", \"a\"]"},
    };
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
        Run r = run_program(NULL, script_path, "-p", texts[i].prompt, "-n", texts[i].n, "--json", "--quiet", NULL);
        check_status(&r, 0);
        check_json(&r, "token_texts", texts[i].texts);
        test_end(texts[i].name);
        run_free(&r);
    }

    // A stop token that is an end id, where end ids do not count.
    Run ignored = run_program(NULL, script_path, "-p", "\\", "-n", "50", "--json", "--quiet", "--ignore-eos", "--stop",
                              "<|end_of_text|>", NULL);
    check_status(&ignored, 0);
    check_json(&ignored, "ids", "[10, 226, 130, 172, 46, 257]");
    check_json(&ignored, "finish_reason", "\"stop\"");
    test_end("json_stop_end_token_with_ignore_eos");
    run_free(&ignored);

    // Every byte at the end of an answer, and pairs that are no characters: the JSON stays UTF-8.
    char *lines = must(malloc(256 * 32));
    size_t n_lines = 0;
    for (int b = 0; b < 256; b++) n_lines += (size_t)sprintf(lines + n_lines, "{\"ids\": [%d]}\n", b);
    write_file(temporary("bytes"), lines, n_lines);
    free(lines);
    Run all =
        run_program(NULL, script_path, "--prompts", temporary("bytes"), "-n", "10", "--ignore-eos", "--quiet", NULL);
    check_status(&all, 0);
    int n_answers = 0;
    for (char *line = all.out, *end; (end = strchr(line, '\n')); line = end + 1, n_answers++) {
        char *one = must(strndup(line, (size_t)(end + 1 - line)));
        if (!json_valid(&(Run){.out = one, .n_out = strlen(one)}))
            test_fail("after byte %d: not JSON: %s", n_answers, shown(one, strlen(one)));
        free(one);
    }
    CHECK(n_answers == 256);
    run_free(&all);
    static const char *const first[] = {"0",   "34",  "127", "128",
                                        "195", "226", "240", "255"}; // with the prompt before it
    for (size_t i = 0; i < sizeof first / sizeof *first; i++) {
        Run r = run_program(NULL, script_path, "--ids", "-p", first[i], "-n", "9", "--ignore-eos", "--json", "--echo",
                            "--quiet", NULL);
        if (!check_status(&r, 0) || !json_valid(&r))
            test_fail("byte %s: not JSON: %s", first[i], shown(r.out, r.n_out));
        run_free(&r);
    }
    test_end("json_of_every_byte");
}

// ---- what goes where ------------------------------------------------------------------------------------------------

static void test_streams(void) {
    Run r = run_program(NULL, script_path, "-p", "a", "-n", "5", NULL);
    check_output(&r, "bcdef", 5);
    if (!strstr(r.err, "5 new tokens") || !strstr(r.err, "engine cpu"))
        test_fail("the statistics are: %s", shown(r.err, r.n_err));
    test_end("statistics_on_standard_error");
    run_free(&r);
    r = run_program(NULL, script_path, "-p", "a", "-n", "5", "--verbose", NULL);
    check_output(&r, "bcdef", 5);
    CHECK(strstr(r.err, "vocabulary 259") != NULL);
    CHECK(strstr(r.err, "llama: memory: ") != NULL && strstr(r.err, " K/V cache ") != NULL);
    CHECK(strstr(r.err, ", buffers ") != NULL && strstr(r.err, "computing in float32") != NULL);
    test_end("verbose_on_standard_error");
    run_free(&r);
    r = run_program(NULL, script_path, "-p", "abc", "-n", "100", "-c", "10", NULL);
    check_output(&r, "defghi", 6);
    CHECK(strstr(r.err, "the context of 10 leaves room for 6 of 100 new tokens") != NULL);
    test_end("context_smaller_than_n_is_told");
    run_free(&r);
    r = run_program(NULL, script_path, "-p", "abc", "-n", "6", "-c", "10", NULL);
    check_output(&r, "defghi", 6);
    CHECK(!strstr(r.err, "leaves room"));
    test_end("context_that_fits_is_not_mentioned");
    run_free(&r);
    int ids[600]; // without -c: up to the model's maximum
    r = run_program(NULL, tiny_path, "-p", "abc", "-n", "600", "--json", "--ignore-eos", NULL);
    if (check_status(&r, 0) && json_ids(r.out, "ids", ids, 600) != 512 - 4)
        test_fail("%d ids", json_ids(r.out, "ids", ids, 600));
    CHECK(strstr(r.err, "leaves room for 508 of 600 new tokens") != NULL);
    test_end("context_of_the_model_is_told");
    run_free(&r);
}

// ---- chance ---------------------------------------------------------------------------------------------------------

static Run sample(const char *seed, const char *flag, const char *value) {
    return run_program(NULL, tiny_path, "-p", "Once", "-n", "60", "--ignore-eos", "--json", "--quiet", "-s", seed, flag,
                       value, NULL);
}

static bool same_ids(const Run *a, const Run *b) {
    const char *x = json_find(a->out, "ids"), *y = json_find(b->out, "ids");
    return x && y && strncmp(x, y, (size_t)(strchr(x, ']') - x) + 1) == 0;
}

static void test_sampling(void) {
    Run greedy = sample("1", NULL, NULL), other_seed = sample("2", NULL, NULL);
    CHECK(check_status(&greedy, 0) && check_status(&other_seed, 0) && same_ids(&greedy, &other_seed));
    test_end("greedy_has_no_seed");
    Run first = sample("1", "--temp", "1"), again = sample("1", "--temp", "1"), other = sample("2", "--temp", "1");
    CHECK(check_status(&first, 0) && same_ids(&first, &again));
    test_end("same_seed_same_text");
    CHECK(check_status(&other, 0) && !same_ids(&first, &other));
    CHECK(!same_ids(&first, &greedy));
    test_end("other_seed_other_text");
    static const struct {
        const char *name, *flag, *value;
    } narrow[] = {{"top_k_1_is_greedy", "--top-k", "1"},
                  {"top_p_0_is_greedy", "--top-p", "0"},
                  {"min_p_1_is_greedy", "--min-p", "1"}};
    for (int i = 0; i < 3; i++) {
        Run r = run_program(NULL, tiny_path, "-p", "Once", "-n", "60", "--ignore-eos", "--json", "--quiet", "--temp",
                            "1", narrow[i].flag, narrow[i].value, NULL);
        CHECK(check_status(&r, 0) && same_ids(&r, &greedy));
        test_end(narrow[i].name);
        run_free(&r);
    }
    setenv("OMP_NUM_THREADS", "2", 1);
    Run threads = sample("1", "--temp", "1");
    setenv("OMP_NUM_THREADS", "1", 1);
    CHECK(check_status(&threads, 0) && same_ids(&first, &threads));
    test_end("same_text_for_any_number_of_threads");
    Run *all[] = {&greedy, &other_seed, &first, &again, &other, &threads};
    for (int i = 0; i < 6; i++) run_free(all[i]);
}

// ---- launchers ------------------------------------------------------------------------------------------------------

// In a build without MPI each process of a launcher is alone, and the first says so; what is no number is not there.
static void test_launchers(void) {
    static const struct {
        const char *name, *size, *rank;
        bool note;
    } cases[] = {{"launcher_rank_0", "3", "0", true},
                 {"launcher_rank_2", "3", "2", false},
                 {"launcher_of_one", "1", "0", false},
                 {"launcher_without_a_number", "3x", "0", false},
                 {"launcher_of_a_billion", "99999999999", "0", false}};
    Run version = run_program(NULL, "--version", NULL);
    const bool alone = strstr(version.out, "no MPI") != NULL;
    run_free(&version);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        if (!alone) {
            test_skip(cases[i].name, "this build has MPI");
            continue;
        }
        setenv("PMI_SIZE", cases[i].size, 1);
        setenv("PMI_RANK", cases[i].rank, 1);
        Run r = run_program(NULL, tiny_path, "-p", "Once", "-n", "2", "--engine", "cpu", NULL);
        CHECK(check_status(&r, 0) && r.n_out > 1);
        if (!strstr(r.err, "llama: one of several processes, each of which computes by itself") == cases[i].note)
            test_fail("said %s", shown(r.err, r.n_err));
        test_end(cases[i].name);
        run_free(&r);
    }
    unsetenv("PMI_SIZE");
    unsetenv("PMI_RANK");
}

// ---- threads --------------------------------------------------------------------------------------------------------

// -t wins over OMP_NUM_THREADS, of which the first number counts; one that is none is ignored, and a line says so.
static void test_threads(void) {
    static const struct {
        const char *name, *omp, *flag, *value, *said;
        bool note;
    } cases[] = {
        {"threads_of_environment", "3", NULL, NULL, ", 3 threads)", false},
        {"threads_first_of_list", "2,1", NULL, NULL, ", 2 threads)", false},
        {"threads_of_t", "3", "-t", "5", ", 5 threads)", false},
        {"threads_of_threads", "3", "--threads", "4", ", 4 threads)", false},
        {"threads_of_t_past_bad_environment", "many", "-t", "2", ", 2 threads)", false},
        {"threads_bad_environment", "3x", NULL, NULL,
         "llama: OMP_NUM_THREADS=3x is ignored, expected a whole number from 1 to 1024; ", true},
        {"threads_environment_of_none", "0", NULL, NULL, "llama: OMP_NUM_THREADS=0 is ignored, ", true},
        {"threads_environment_empty", "", NULL, NULL, " threads)", false},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        setenv("OMP_NUM_THREADS", cases[i].omp, 1);
        Run r = run_program(NULL, tiny_path, "-p", "Once", "-n", "2", "--engine", "cpu", "--verbose", cases[i].flag,
                            cases[i].value, NULL);
        check_status(&r, 0);
        if (!strstr(r.err, cases[i].said) || !strstr(r.err, "OMP_NUM_THREADS") == cases[i].note)
            test_fail("reported %s", shown(r.err, r.n_err));
        test_end(cases[i].name);
        run_free(&r);
    }
    static const char *const refused[] = {"0", "-1", "1025", "two", "2.5", ""};
    setenv("OMP_NUM_THREADS", "1", 1);
    for (size_t i = 0; i < sizeof refused / sizeof *refused; i++) {
        Run r = run_program(NULL, tiny_path, "-p", "Once", "-t", refused[i], NULL);
        check_status(&r, 2);
        if (!strstr(r.err, "expected a whole number from 1 to 1024")) test_fail("said %s", shown(r.err, r.n_err));
        run_free(&r);
    }
    test_end("threads_bad_numbers");
}

// ---- probabilities --------------------------------------------------------------------------------------------------

// Reads {"id": 1, "logprob": -0.5 at *at and moves past it.
static bool take_logprob(const char **at, int *id, double *logprob) {
    int n = 0;
    if (sscanf(*at, "{\"id\": %d, \"logprob\": %lf%n", id, logprob, &n) != 2 || n == 0) return false;
    *at += n;
    return true;
}

// Checks a run with --logprobs k against what the script says (tokens from `from` on), or only against itself (NULL).
static void check_logprobs(const Run *r, int k, bool greedy, const Script *s, int from) {
    if (!check_status(r, 0)) return;
    if (!json_valid(r)) test_fail("not one line of JSON");
    int ids[128], n = json_ids(r->out, "ids", ids, 128), before = from;
    const char *at = json_find(r->out, "logprobs");
    if (n <= 0 || !at || *at++ != '[') {
        test_fail("no ids, or no logprobs");
        return;
    }
    for (int i = 0; i < n; i++) {
        int id, top_id, seen[64];
        double logprob, top, last = 0, sum = 0;
        if (!take_logprob(&at, &id, &logprob) || strncmp(at, ", \"top\": [", 10) != 0) {
            test_fail("token %d: %s", i, shown(at, strlen(at)));
            return;
        }
        at += 10;
        if (id != ids[i]) test_fail("token %d: id %d, ids has %d", i, id, ids[i]);
        if (!(logprob <= 0)) test_fail("token %d: logprob %g", i, logprob);
        if (s && fabs(logprob - script_logprob(s, before, id)) > 2e-4)
            test_fail("token %d: logprob %g, expected %g", i, logprob, script_logprob(s, before, id));
        for (int t = 0; t < k; t++) {
            if (!take_logprob(&at, &top_id, &top) || *at++ != '}') {
                test_fail("token %d, top %d: %s", i, t, shown(at, strlen(at)));
                return;
            }
            at += t + 1 < k ? 2 : 0;
            for (int u = 0; u < t; u++)
                if (seen[u] == top_id) test_fail("token %d: id %d twice", i, top_id);
            seen[t] = top_id;
            if (!(top <= 0) || (t > 0 && top > last)) test_fail("token %d: top %d has %g after %g", i, t, top, last);
            if (t == 0 && greedy && (top_id != id || top != logprob))
                test_fail("token %d: greedy, but top is %d", i, top_id);
            if (top_id == id && top != logprob) test_fail("token %d: logprob %g and %g", i, logprob, top);
            if (s && fabs(top - script_logprob(s, before, top_id)) > 2e-4)
                test_fail("token %d: top %d: logprob %g", i, t, top);
            last = top;
            sum += exp(top);
        }
        if (!(sum <= 1.0001)) test_fail("token %d: the top %d have a probability of %g", i, k, sum);
        if (strncmp(at, "]}", 2) != 0) test_fail("token %d: more than %d in top", i, k);
        at += 2;
        if (strncmp(at, ", ", 2) == 0) at += 2;
        before = id;
    }
    if (*at != ']') test_fail("more logprobs than tokens");
}

static void test_probabilities(void) {
    Run r = run_program(NULL, script_path, "-p", "a", "-n", "30", "--json", "--logprobs", "5", "--quiet", NULL);
    check_logprobs(&r, 5, true, &script, 'a');
    test_end("logprobs_of_the_script");
    run_free(&r);
    r = run_program(NULL, tiny_path, "-p", "Once", "-n", "30", "--ignore-eos", "--json", "--logprobs", "64", "--quiet",
                    NULL);
    check_logprobs(&r, 64, true, NULL, 0);
    test_end("logprobs_of_64");
    run_free(&r);
    r = run_program(NULL, tiny_path, "-p", "Once", "-n", "60", "--ignore-eos", "--json", "--logprobs", "3", "--temp",
                    "1", "-s", "5", "--quiet", NULL);
    check_logprobs(&r, 3, false, NULL, 0);
    test_end("logprobs_while_sampling");
    run_free(&r);
    r = run_program(NULL, script_path, "-p", "\\", "-n", "30", "--json", "--logprobs", "1", "--quiet", NULL);
    check_logprobs(&r, 1, true, &script, '\\'); // with the end id
    test_end("logprobs_of_the_end_id");
    run_free(&r);
}

// The number that --perplexity printed; tokens: how many it says it scored.
static double perplexity(const Run *r, int *tokens) {
    double value = NAN;
    const char *over = strstr(r->out, " over ");
    if (sscanf(r->out, "perplexity %lf", &value) != 1 || !over) test_fail("printed %s", shown(r->out, r->n_out));
    *tokens = over ? atoi(over + 6) : 0;
    return value;
}

static void test_perplexity(void) {
    // All logits 0: every token has a probability of one in 259.
    Draft d;
    Script flat = script;
    draft_script(&d, &flat, 0, 128);
    draft_write(&d, temporary("flat.bin"));
    int tokens;
    Run r = run_program(NULL, temporary("flat.bin"), "--perplexity", prompt_path, "--quiet", NULL);
    if (check_status(&r, 0)) {
        double value = perplexity(&r, &tokens);
        if (fabs(value - 259) > 1e-3 || tokens != 5) test_fail("%g over %d tokens, expected 259 over 5", value, tokens);
        CHECK(strstr(r.out, " ± 0.0000 over ") != NULL && strstr(r.out, "; window 128, stride 64, ") != NULL);
        CHECK(strstr(r.out, "8.0168 bits per byte") != NULL); // log2(259), a byte a token
    }
    check_quiet(&r);
    test_end("perplexity_of_a_flat_model_is_its_vocabulary");
    run_free(&r);
    draft_free(&d);

    // A text of which the probability is known, in windows of every length: the script forgets all but the last token.
    char text[300];
    size_t n = 0;
    double nll = 0;
    writer_state = 3;
    for (int t = BOS; n < 290; n++) {
        int u = writer_random() < 0.3f ? script.next[t] : (int)((writer_random() + 1) * 40) + 33;
        if (u >= BYTES) u = 'Q';
        nll -= script_logprob(&script, t, u);
        text[n] = (char)u;
        t = u;
    }
    write_file(temporary("text"), text, n);
    static const char *const windows[] = {"2", "3", "16", "63", "64", "65", "129", "291", "300", "1000"};
    for (size_t i = 0; i < sizeof windows / sizeof *windows; i++) {
        char name[64];
        r = run_program(NULL, script_path, "--perplexity", temporary("text"), "-c", windows[i], "--quiet", NULL);
        if (check_status(&r, 0)) {
            double value = perplexity(&r, &tokens), expected = exp(nll / (double)n);
            if (fabs(value / expected - 1) > 1e-4 || tokens != (int)n)
                test_fail("%g over %d tokens, expected %g over %zu", value, tokens, expected, n);
        }
        snprintf(name, sizeof name, "perplexity_in_windows_of_%s", windows[i]);
        test_end(name);
        run_free(&r);
    }

    // Of any stride, too; and with its standard error, which the log-probabilities give as well.
    double squares = 0;
    for (size_t i = 0, t = BOS; i < n; t = (uint8_t)text[i++])
        squares += pow(script_logprob(&script, (int)t, (uint8_t)text[i]) + nll / (double)n, 2);
    double error = exp(nll / (double)n) * sqrt(squares / (double)n / (double)n);
    static const char *const strides[] = {"1", "2", "7", "15"};
    for (size_t i = 0; i < sizeof strides / sizeof *strides; i++) {
        char name[64], said[64];
        r = run_program(NULL, script_path, "--perplexity", temporary("text"), "-c", "16", "--stride", strides[i],
                        "--quiet", NULL);
        double found = NAN;
        const char *plus = strstr(r.out, "± ");
        if (check_status(&r, 0)) {
            double value = perplexity(&r, &tokens), expected = exp(nll / (double)n);
            if (plus) found = atof(plus + strlen("± "));
            snprintf(said, sizeof said, "; window 16, stride %s, ", strides[i]);
            if (fabs(value / expected - 1) > 1e-4 || tokens != (int)n || !(fabs(found / error - 1) < 1e-3) ||
                !strstr(r.out, said))
                test_fail("printed %s, expected %g ± %g over %zu", shown(r.out, r.n_out), expected, error, n);
        }
        snprintf(name, sizeof name, "perplexity_with_a_stride_of_%s", strides[i]);
        test_end(name);
        run_free(&r);
    }

    // The other way to the same number: the log-probabilities of an answer, then that answer as the text.
    r = run_program(NULL, tiny_path, "-p", "", "-n", "60", "--ignore-eos", "--json", "--logprobs", "1", "--temp", "1",
                    "--quiet", NULL);
    int ids[64], n_ids = json_ids(r.out, "ids", ids, 64);
    double sum = 0;
    const char *at = json_find(r.out, "logprobs");
    for (int i = 0; i < n_ids && (at = strstr(at, "{\"id\": ")); i++) {
        int id;
        double logprob;
        if (take_logprob(&at, &id, &logprob)) sum += logprob;
        at = strchr(at, ']'); // past top
    }
    char answer[2048];
    size_t length = 0;
    static const char *const special[] = {"<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"};
    for (int i = 0; i < n_ids; i++) {
        if (ids[i] < BYTES)
            answer[length++] = (char)ids[i];
        else
            length += (size_t)sprintf(answer + length, "%s", special[ids[i] - BYTES]);
    }
    write_file(temporary("text"), answer, length);
    Run score = run_program(NULL, tiny_path, "--perplexity", temporary("text"), "--special", "--quiet", NULL);
    if (check_status(&score, 0)) {
        double value = perplexity(&score, &tokens), expected = exp(-sum / n_ids);
        if (!(fabs(value / expected - 1) < 1e-4) || tokens != n_ids || n_ids != 60)
            test_fail("%g over %d tokens, by log-probabilities %g over %d", value, tokens, expected, n_ids);
    }
    test_end("perplexity_is_that_of_the_log_probabilities");
    run_free(&r);
    run_free(&score);
}

// The second half of each full window, in figures of the script; what is printed, as text and as JSON.
static void test_perplexity_halves(void) {
    enum { LENGTH = 290 };
    char text[LENGTH];
    int ids[LENGTH + 1] = {BOS};
    writer_state = 3;
    for (int i = 0; i < LENGTH; i++) {
        int u = writer_random() < 0.3f ? script.next[ids[i]] : (int)((writer_random() + 1) * 40) + 33;
        ids[i + 1] = u < BYTES ? u : 'Q';
        text[i] = (char)ids[i + 1];
    }
    write_file(temporary("text"), text, LENGTH);
    static const int windows[] = {3, 4, 16, 17, 64, 97, 290, 291};
    for (size_t i = 0; i < sizeof windows / sizeof *windows; i++) {
        char name[64], size[16];
        int window = windows[i], n = 0;
        double nll = 0, squares = 0;
        for (int begin = 0; begin + window <= LENGTH + 1; begin += window)
            for (int at = begin + window / 2 + 1; at < begin + window; at++, n++) {
                double one = -script_logprob(&script, ids[at - 1], ids[at]);
                nll += one;
                squares += one * one;
            }
        nll /= n;
        snprintf(name, sizeof name, "perplexity_half_windows_of_%d", window);
        snprintf(size, sizeof size, "%d", window);
        Run r = run_program(NULL, script_path, "--perplexity", temporary("text"), "-c", size, "--perplexity-windows",
                            "half", "--json", "--quiet", NULL);
        if (check_status(&r, 0) && !json_valid(&r)) test_fail("not one line of JSON: %s", shown(r.out, r.n_out));
        check_quiet(&r);
        char tokens[16];
        snprintf(tokens, sizeof tokens, "%d", n);
        check_json(&r, "tokens", tokens);
        check_json(&r, "tokens_in_all", tokens);
        check_json(&r, "bytes", tokens);
        check_json(&r, "windows", "\"half\"");
        check_json(&r, "context", size);
        check_json(&r, "stride", size);
        check_json(&r, "finish_reason", "\"end\"");
        struct {
            const char *key;
            double value;
        } figures[] = {{"perplexity", exp(nll)},
                       {"nll", nll},
                       {"bits_per_byte", nll / log(2)},
                       {"standard_error", exp(nll) * sqrt((squares / n - nll * nll) / n)}};
        for (int f = 0; f < 4; f++) {
            const char *found = json_find(r.out, figures[f].key);
            double value = found ? atof(found) : NAN, most = 1e-4 * figures[f].value;
            if (!(fabs(value - figures[f].value) <= most) && !(n == 1 && f == 3))
                test_fail("%s is %g, expected %g", figures[f].key, value, figures[f].value);
        }
        const char *timings = json_find(r.out, "timings");
        CHECK(timings && strstr(timings, "\"scoring_ms\": ") && strstr(timings, "\"tokens_per_second\": "));
        test_end(name);
        run_free(&r);
    }
    Run r = run_program(NULL, script_path, "--perplexity", temporary("text"), "-c", "64", "--perplexity-windows",
                        "half", "--quiet", NULL);
    int tokens;
    perplexity(&r, &tokens);
    CHECK(tokens == 4 * 31 && strstr(r.out, " bits per byte; second halves of windows of 64, "));
    test_end("perplexity_half_windows_as_text");
    run_free(&r);
    static const char *const kinds[] = {NULL, "sliding"};
    for (int i = 0; i < 2; i++) {
        r = run_program(NULL, script_path, "--perplexity", temporary("text"), "-c", "64", "--json", "--quiet",
                        kinds[i] ? "--perplexity-windows" : NULL, kinds[i], NULL);
        if (check_status(&r, 0) && !json_valid(&r)) test_fail("not one line of JSON: %s", shown(r.out, r.n_out));
        check_json(&r, "windows", "\"sliding\"");
        check_json(&r, "stride", "32");
        check_json(&r, "tokens", "290");
        run_free(&r);
    }
    test_end("perplexity_sliding_is_the_default");
}

// Ids as they are, and bytes only of tokens that are scored: without BOS not of the first. On a model of equal
// probabilities every byte has log2(259) bits.
static void test_perplexity_ids(void) {
    Draft d;
    Script flat = script;
    draft_script(&d, &flat, 0, 128);
    draft_write(&d, temporary("flat.bin"));
    static const struct {
        const char *name, *text, *flag, *tokens, *bytes;
    } rows[] = {{"perplexity_of_text", "klmno\n", NULL, "6", "6"},
                {"perplexity_of_ids", "107 108,109\n110 111\n", "--ids", "4", "4"},
                {"perplexity_of_ids_with_bos", "256 107 108 109 110 111", "--ids", "5", "5"}};
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        Io io = {.input = rows[i].text, .n_input = strlen(rows[i].text)};
        Run r = run_program(&io, temporary("flat.bin"), "--perplexity", "-", "--json", "--quiet", rows[i].flag, NULL);
        check_status(&r, 0);
        check_json(&r, "tokens", rows[i].tokens);
        check_json(&r, "bytes", rows[i].bytes);
        const char *bits = json_find(r.out, "bits_per_byte");
        if (!bits || fabs(atof(bits) - log2(259)) > 1e-4) test_fail("bits per byte: %s", bits ? bits : "none");
        test_end(rows[i].name);
        run_free(&r);
    }
    draft_meta(&d, "bos_id", "");
    draft_write(&d, temporary("flat.bin"));
    Io io = {.input = "klmno", .n_input = 5};
    Run r = run_program(&io, temporary("flat.bin"), "--perplexity", "-", "--quiet", NULL);
    int tokens;
    CHECK(fabs(perplexity(&r, &tokens) - 259) < 1e-3 && tokens == 4 && strstr(r.out, ", 8.0168 bits per byte; "));
    test_end("perplexity_without_bos");
    run_free(&r);
    draft_free(&d);
}

// ---- interrupts -----------------------------------------------------------------------------------------------------

// Starts a run that would take minutes, interrupts it so long after it has begun, and gives what came out. It has begun
// when it has printed more than so many bytes: to standard output, or with --json, which prints at the end, to standard
// error.
static Run interrupt(const char *const *args, bool json, off_t begun, long milliseconds) {
    char err_path[300], out_path[300];
    snprintf(err_path, sizeof err_path, "%s/interrupted.err", test_dir);
    snprintf(out_path, sizeof out_path, "%s/interrupted.out", test_dir);
    write_file(err_path, NULL, 0);
    write_file(out_path, NULL, 0);
    fflush(NULL);
    pid_t child = fork();
    if (child == 0) {
        redirect(0, "/dev/null", O_RDONLY);
        redirect(1, out_path, O_WRONLY | O_TRUNC);
        redirect(2, err_path, O_WRONLY | O_TRUNC);
        exec_program(args);
    }
    struct timespec pause = {0, 20000000};
    struct stat info;
    for (int i = 0; i < 500; i++) {
        nanosleep(&pause, NULL);
        if (stat(json ? err_path : out_path, &info) == 0 && info.st_size > begun) break;
    }
    pause = (struct timespec){milliseconds / 1000, milliseconds % 1000 * 1000000};
    nanosleep(&pause, NULL);
    kill(child, SIGINT);
    int status;
    waitpid(child, &status, 0);
    Run r = {.status = WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status)};
    r.out = read_whole(out_path, &r.n_out);
    r.err = read_whole(err_path, &r.n_err);
    return r;
}

static void test_interrupts(void) {
    Draft d;
    Script long_script = script;
    draft_script(&d, &long_script, 16, 1 << 20);
    char path[300];
    snprintf(path, sizeof path, "%s", temporary("endless.bin"));
    draft_write(&d, path);
    const char *const text_run[] = {path, "-p", "a", "-n", "900000", "-c", "1000000", "--ignore-eos", NULL};
    const char *const json_run[] = {path,      "-p",           "a",         "-n",     "900000", "-c",
                                    "1000000", "--ignore-eos", "--verbose", "--json", NULL};
    Run r = interrupt(text_run, false, 200, 20);
    check_status(&r, 130);
    size_t most = r.n_out + 64;
    char *text = must(malloc(most));
    size_t n = 0;
    for (int t = 'a'; n < r.n_out;) {
        t = script.next[t];
        if (t < BYTES) text[n++] = (char)t;
    }
    if (r.n_out < 200 || memcmp(text, r.out, n) != 0)
        test_fail("printed %zu bytes: %s", r.n_out, shown(r.out, r.n_out));
    if (!strstr(r.err, "new tokens")) test_fail("no statistics: %s", shown(r.err, r.n_err));
    test_end("interrupt_keeps_what_was_generated");
    free(text);
    run_free(&r);

    // Nothing tells when the answer has begun: where it has not, the next signal comes later.
    r = interrupt(json_run, true, 0, 20);
    for (long milliseconds = 80; r.status == 130 && r.n_out == 0 && milliseconds < 20000; milliseconds *= 4) {
        run_free(&r);
        r = interrupt(json_run, true, 0, milliseconds);
    }
    check_status(&r, 130);
    if (!json_valid(&r)) test_fail("not one line of JSON: %s", shown(r.out, r.n_out));
    check_json(&r, "finish_reason", "\"interrupted\"");
    test_end("interrupt_json");
    run_free(&r);

    // Lines with an error do not make a failure of an interrupt; what comes after the last answer is left out.
    static const char lines[] = "{\"text\": \"a\", \"n\": 1}\n{\"x\": 1}\n{\"text\": \"a\"}\n{\"x\": 2}\n";
    write_file(temporary("lines"), lines, sizeof lines - 1);
    const char *const lines_run[] = {path,     "--prompts", temporary("lines"), "-b",           "1", "-n",
                                     "900000", "-c",        "1000000",          "--ignore-eos", NULL};
    r = interrupt(lines_run, false, 0, 20);
    check_status(&r, 130);
    const char *second = strstr(r.out, "\n{\"index\": 1, \"line\": 2, \"error\": "),
               *third = strstr(r.out, "\n{\"index\": 2, "),
               *reason = strstr(r.out, "\"finish_reason\": \"interrupted\"");
    if (!second || !third || second > third || !reason || strstr(r.out, "\"index\": 3"))
        test_fail("printed %s", shown(r.out, r.n_out));
    if (strstr(r.err, "lines have an error")) test_fail("on standard error: %s", shown(r.err, r.n_err));
    test_end("interrupt_prompts_with_errors");
    run_free(&r);
    draft_free(&d);
}

// ---- messages -------------------------------------------------------------------------------------------------------

// A message is one write, so that those of several processes do not mix: to a socket that keeps writes apart, one of
// them.
static void test_messages_are_written_at_once(void) {
    const size_t lengths[] = {1, 100};
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
        char name[101], text[8192];
        int ends[2];
        memset(name, 'n', lengths[i]);
        name[lengths[i]] = '\0';
        if (socketpair(AF_UNIX, SOCK_SEQPACKET, 0, ends) != 0) die("socketpair");
        pid_t child = fork();
        if (child < 0) die("fork");
        if (child == 0) {
            dup2(ends[1], STDERR_FILENO);
            execl(program_path(), "llama", "--model", script_path, "--engine", name, "-p", "x", (char *)NULL);
            _exit(127);
        }
        close(ends[1]);
        ssize_t n;
        while ((n = recv(ends[0], text, sizeof text - 1, 0)) > 0) { // what is around the program may speak, too
            text[n] = '\0';
            if (strncmp(text, "llama:", 6) == 0) break;
        }
        if (n <= 0 || !strstr(text, name) || text[n - 1] != '\n' || strchr(text, '\n') != text + n - 1)
            test_fail("a name of %zu bytes: the first write is \"%s\"", lengths[i],
                      n > 0 ? shown(text, (size_t)n) : "");
        close(ends[0]);
        while (waitpid(child, NULL, 0) < 0 && errno == EINTR) {
        }
    }
    test_end("messages_are_written_at_once");
}

int main(void) {
    program_setup();
    Draft d;
    script_alphabet(&script);
    draft_script(&d, &script, 16, 1000); // script keeps pointing into d
    snprintf(script_path, sizeof script_path, "%s/script.bin", test_dir);
    snprintf(tiny_path, sizeof tiny_path, "%s/tiny.bin", test_dir);
    snprintf(vocab_path, sizeof vocab_path, "%s/vocab.bin", test_dir);
    snprintf(prompt_path, sizeof prompt_path, "%s/prompt.txt", test_dir);
    draft_write(&d, script_path);
    Draft tiny;
    Shape s = tiny_shape;
    s.dim = 64, s.hidden_dim = 96, s.n_layers = 2, s.head_dim = 16, s.max_seq_len = 512;
    draft_tiny(&tiny, s, 11);
    draft_write(&tiny, tiny_path);
    draft_vocab_only(&tiny);
    draft_write(&tiny, vocab_path);
    draft_free(&tiny);
    write_file(prompt_path, "klmno", 5);

    test_help();
    test_prompts();
    test_final_newline();
    test_special();
    test_tokenizer_modes();
    test_ends();
    test_streams();
    test_sampling();
    test_launchers();
    test_messages_are_written_at_once();
    test_threads();
    test_probabilities();
    test_perplexity();
    test_perplexity_halves();
    test_perplexity_ids();
    test_interrupts();
    draft_free(&d);
    return tests_summary();
}
