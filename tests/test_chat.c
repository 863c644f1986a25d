// The chat templates against ids that HuggingFace's give, against the template as a text with its special tokens
// parsed, and with special tokens written inside messages.
#include "../tokenizer/chat.h"

#include <time.h>

#include "../model/file/json.h"
#include "../tokenizer/encode.h"
#include "../tokenizer/utf8.h"
#include "vocabulary.h"

typedef struct {
    const char *role, *text; // a first message of the system is the system message
} Message;

static const uint8_t *bytes_of(const char *text) {
    return (const uint8_t *)text;
}

// A conversation as llama.c would build it: all of it, then the header of an answer.
static TokenList chat_ids(const Chat *c, const Message *messages, int n, const char *date) {
    TokenList ids = {0};
    Error err = {""};
    const char *system = n > 0 && strcmp(messages[0].role, "system") == 0 ? messages[0].text : NULL;
    bool ok = chat_begin(c, bytes_of(system), system ? strlen(system) : 0, date, &ids, &err);
    for (int i = system ? 1 : 0; ok && i < n; i++)
        ok = chat_message(c, messages[i].role, bytes_of(messages[i].text), strlen(messages[i].text), &ids, &err);
    if (!ok || !chat_reply_header(c, &ids, &err)) test_fail("%s", err.text);
    return ids;
}

static void check_ids(const char *what, const TokenList *got, const TokenList *want) {
    size_t i = 0;
    while (i < got->n && i < want->n && got->ids[i] == want->ids[i]) i++;
    if (!same_ids(got, want))
        test_fail("%s: %zu ids, expected %zu; id %zu is the first that differs", what, got->n, want->n, i);
}

// ---- a small vocabulary ---------------------------------------------------------------------------------------------

static void test_chat_frame_id_by_id(const Tokenizer *t) {
    Error err = {""};
    Chat c;
    if (!chat_init(&c, t, CHAT_LLAMA3, BOS, &err)) test_fail("%s", err.text);
    Message messages[] = {{"system", " ab\n"}, {"user", "\xE3\x80\x80x "}};
    TokenList got = chat_ids(&c, messages, 2, CHAT_DATE);
    int ids[] = {BOS, START, 's',  'y', 's', 't',   'e', 'm', END, '\n', '\n', 256, EOT, START, 'u', 's', 'e',  'r',
                 END, '\n',  '\n', 'x', EOT, START, 'a', 's', 's', 'i',  's',  't', 'a', 'n',   't', END, '\n', '\n'};
    check_ids("llama3", &got, &(TokenList){ids, LENGTH(ids), 0});
    tokens_free(&got);

    if (!chat_init(&c, t, CHAT_LLAMA3, -1, &err)) test_fail("%s", err.text);
    got = chat_ids(&c, messages, 2, CHAT_DATE);
    check_ids("without a BOS", &got, &(TokenList){ids + 1, LENGTH(ids) - 1, 0});
    tokens_free(&got);
    test_end("test_chat_frame_id_by_id");
}

static void test_chat_system_message(const Tokenizer *t) {
    Error err = {""};
    Chat c;
    TokenList ids = {0};
    CHECK(chat_init(&c, t, CHAT_LLAMA3, BOS, &err) && chat_begin(&c, NULL, 0, CHAT_DATE, &ids, &err));
    CHECK(ids.n == 1 && ids.ids[0] == BOS); // none given, none written
    ids.n = 0;
    CHECK(chat_begin(&c, bytes_of(" "), 1, CHAT_DATE, &ids, &err));
    CHECK(ids.n == 12 && ids.ids[11] == EOT); // an empty one is one
    ids.n = 0;
    CHECK(chat_init(&c, t, CHAT_LLAMA3_1, BOS, &err) && chat_begin(&c, NULL, 0, "1 Jan", &ids, &err));
    static const char block[] = "\n\nCutting Knowledge Date: December 2023\nToday Date: 1 Jan\n\n";
    CHECK(ids.n == 9 + sizeof block - 1 + 1 && ids.ids[ids.n - 1] == EOT); // LLaMA 3.1 writes the dates all the same
    for (size_t i = 9; i + 1 < ids.n; i++) CHECK(ids.ids[i] == block[i - 9]);
    tokens_free(&ids);
    test_end("test_chat_system_message");
}

static void test_chat_trims_white_space_of_every_kind(const Tokenizer *t) {
    Error err = {""};
    Chat c;
    CHECK(chat_init(&c, t, CHAT_LLAMA3, BOS, &err));
    TokenList plain = {0}, got = {0};
    CHECK(chat_message(&c, "user", bytes_of("x y"), 3, &plain, &err));
    for (uint32_t cp = 0; cp < 0x110000; cp++) {
        if (cp >= 0xD800 && cp <= 0xDFFF) continue;
        // Python 3's str.strip, by its documentation: category Zs, or bidirectional class WS, B or S.
        bool space = (cp >= 0x09 && cp <= 0x0D) || (cp >= 0x1C && cp <= 0x20) || cp == 0x85 || cp == 0xA0 ||
                     cp == 0x1680 || (cp >= 0x2000 && cp <= 0x200A) || cp == 0x2028 || cp == 0x2029 || cp == 0x202F ||
                     cp == 0x205F || cp == 0x3000;
        uint8_t text[16];
        size_t n = (size_t)utf8_encode(cp, text);
        memcpy(text + n, "x y", 3);
        memcpy(text + n + 3, text, n);
        got.n = 0;
        CHECK(chat_message(&c, "user", text, 2 * n + 3, &got, &err));
        if (same_ids(&got, &plain) != space) test_fail("U+%04X is %strimmed", cp, space ? "not " : "");
    }
    static const char *const bad[] = {"\x80", "\xA0", "\xC2", "\xE3\x80", "\x80\x80\x80\x80\x80", "\xFF"};
    for (int i = 0; i < LENGTH(bad); i++) { // part of a character is no white space
        got.n = 0;
        size_t n = strlen(bad[i]);
        CHECK(chat_message(&c, "user", bytes_of(bad[i]), n, &got, &err) && got.n == plain.n - 3 + n);
    }
    got.n = 0;
    CHECK(chat_message(&c, "user", bytes_of(" \n\t "), 4, &got, &err) && got.n == plain.n - 3);
    tokens_free(&plain);
    tokens_free(&got);
    test_end("test_chat_trims_white_space_of_every_kind");
}

static void test_chat_refusals(const Tokenizer *t) {
    Error err = {""};
    Chat c;
    CHECK(!chat_init(&c, t, CHAT_NONE, BOS, &err) && strstr(err.text, "no chat format"));
    Vocabulary v = small_vocabulary();
    Tokenizer bare;
    err = (Error){""};
    CHECK(init_vocabulary(&bare, &v, v.offsets[v.vocab_size], &err));
    CHECK(!chat_init(&c, &bare, CHAT_LLAMA3, -1, &err) && strstr(err.text, "no special token <|start_header_id|>"));
    tokenizer_free(&bare);
    test_end("test_chat_refusals");
}

// ---- any vocabulary -------------------------------------------------------------------------------------------------

// Every special token's text inside every kind of message gives no id but the frame's own, and the text comes back.
static void test_chat_special_text_stays_text(const Tokenizer *t, int bos, const char *name) {
    static const char *const roles[] = {"system", "user", "assistant"};
    static const ChatFormat formats[] = {CHAT_LLAMA3, CHAT_LLAMA3_1};
    int tried = 0;
    for (int f = 0; f < LENGTH(formats); f++) {
        Chat c;
        Error err = {""};
        if (!chat_init(&c, t, formats[f], bos, &err)) test_fail("%s", err.text);
        Message harmless[] = {{"system", "x"}, {"user", "x"}, {"assistant", "x"}};
        TokenList plain = chat_ids(&c, harmless, LENGTH(harmless), CHAT_DATE);
        for (int s = 0; s < t->n_special; s++)
            for (int r = 0; r < LENGTH(roles); r++, tried++) {
                size_t n;
                const uint8_t *token = tokenizer_bytes(t, t->special[s].id, &n);
                char text[512];
                snprintf(text, sizeof text, "%.*s a%.*s%.*s", (int)n, token, (int)n, token, (int)n, token);
                Message messages[] = {{"system", "x"}, {"user", "x"}, {"assistant", "x"}};
                messages[r].text = text;
                TokenList got = chat_ids(&c, messages, LENGTH(messages), CHAT_DATE), body = {0};
                TokenList frame[2] = {{0}, {0}}; // the special tokens alone, of this and of the harmless conversation
                int eots = 0;
                for (size_t i = 0; i < got.n; i++) {
                    if (t->kind[got.ids[i]] == TOKEN_SPECIAL) tokens_append(&frame[0], got.ids[i], &err);
                    if (eots == r && t->kind[got.ids[i]] != TOKEN_SPECIAL) tokens_append(&body, got.ids[i], &err);
                    eots += got.ids[i] == c.end;
                }
                for (size_t i = 0; i < plain.n; i++)
                    if (t->kind[plain.ids[i]] == TOKEN_SPECIAL) tokens_append(&frame[1], plain.ids[i], &err);
                check_ids(text, &frame[0], &frame[1]);
                char want[1024]; // the message's bytes, without its special tokens
                snprintf(want, sizeof want, "%s\n\n%s%s", roles[r],
                         r == 0 && formats[f] == CHAT_LLAMA3_1
                             ? "Cutting Knowledge Date: December 2023\nToday Date: " CHAT_DATE "\n\n"
                             : "",
                         text);
                if (!decodes_to(t, &body, bytes_of(want), strlen(want))) test_fail("%s in %s is lost", text, roles[r]);
                tokens_free(&got);
                tokens_free(&body);
                tokens_free(&frame[0]);
                tokens_free(&frame[1]);
            }
        tokens_free(&plain);
    }
    CHECK(tried >= 5 * 3 * 2);
    test_end(name);
}

// The frame written out as a text and parsed as HuggingFace parses it, against the frame made of ids; and a turn at a
// time against all at once.
static void test_chat_equals_the_rendered_text(const Tokenizer *t, int bos, const char *name) {
    static const Message messages[] = {{"system", "Answer in one line."},
                                       {"user", "What's 12345 + 1?\nShow it."},
                                       {"assistant", "12346."},
                                       {"user", "e\u0301\u4E16 \U0001F600"},
                                       {"assistant", ""},
                                       {"system", "A later one."},
                                       {"user", "don't  stop"}};
    static const char *const dates[] = {CHAT_DATE, "1 January 2027"};
    for (int f = 0; f < 2; f++)
        for (int first = 0; first < 2; first++) // with the system message and without
            for (int d = 0; d < LENGTH(dates); d++) {
                Chat c;
                Error err = {""};
                if (!chat_init(&c, t, f ? CHAT_LLAMA3_1 : CHAT_LLAMA3, bos, &err)) test_fail("%s", err.text);
                char text[2048] = "<|begin_of_text|>";
                TokenList turns = {0};
                chat_begin(&c, first ? NULL : bytes_of(messages[0].text), first ? 0 : strlen(messages[0].text),
                           dates[d], &turns, &err);
                for (int i = 0; i < LENGTH(messages); i++) {
                    bool system = i == 0 && f == 1;
                    if (i < first && !system) continue;
                    char dated[128] = "";
                    if (system)
                        snprintf(dated, sizeof dated, "Cutting Knowledge Date: December 2023\nToday Date: %s\n\n",
                                 dates[d]);
                    size_t n = strlen(text);
                    snprintf(text + n, sizeof text - n, "<|start_header_id|>%s<|end_header_id|>\n\n%s%s<|eot_id|>",
                             messages[i].role, dated, i < first ? "" : messages[i].text);
                    if (i == 0) continue;
                    if (strcmp(messages[i].role, "assistant") == 0) { // as a model would answer
                        TokenList reply = encode(t, bytes_of(messages[i].text), strlen(messages[i].text), false);
                        chat_reply_header(&c, &turns, &err);
                        for (size_t k = 0; k < reply.n; k++) tokens_append(&turns, reply.ids[k], &err);
                        tokens_append(&turns, c.end, &err);
                        tokens_free(&reply);
                    } else
                        chat_message(&c, messages[i].role, bytes_of(messages[i].text), strlen(messages[i].text), &turns,
                                     &err);
                }
                strcat(text, "<|start_header_id|>assistant<|end_header_id|>\n\n");
                chat_reply_header(&c, &turns, &err);
                TokenList got = chat_ids(&c, messages + first, LENGTH(messages) - first, dates[d]),
                          want = encode(t, bytes_of(text), strlen(text), true);
                check_ids(text, &got, &want);
                check_ids("turn by turn", &turns, &want);
                tokens_free(&got);
                tokens_free(&want);
                tokens_free(&turns);
            }
    test_end(name);
}

// What transformers' apply_chat_template gives with LLaMA 3's and 3.1's templates.
static void test_chat_ids_of_the_templates(const Tokenizer *t) {
    static const Message messages[] = {
        {"system", " You are terse. \n"}, {"user", "\u3000 Hi!\t"}, {"assistant", "\nHello."}, {"user", "2+2?\x1C"}};
    static const struct {
        ChatFormat format;
        int first, n; // of the messages
        const char *ids;
    } rows[] = {
        {CHAT_LLAMA3, 0, 4,
         "128000 128006 9125 128007 271 2675 527 51637 13 128009 128006 882 128007 271 13347 0 128009 128006 78191 "
         "128007 "
         "271 9906 13 128009 128006 882 128007 271 17 10 17 30 128009 128006 78191 128007 271"},
        {CHAT_LLAMA3, 1, 1, "128000 128006 882 128007 271 13347 0 128009 128006 78191 128007 271"},
        {CHAT_LLAMA3_1, 0, 4,
         "128000 128006 9125 128007 271 38766 1303 33025 2696 25 6790 220 2366 18 198 15724 2696 25 220 1627 10263 220 "
         "2366 19 271 2675 527 51637 13 128009 128006 882 128007 271 13347 0 128009 128006 78191 128007 271 9906 13 "
         "128009 "
         "128006 882 128007 271 17 10 17 30 128009 128006 78191 128007 271"},
        {CHAT_LLAMA3_1, 1, 1,
         "128000 128006 9125 128007 271 38766 1303 33025 2696 25 6790 220 2366 18 198 15724 2696 25 220 1627 10263 220 "
         "2366 19 271 128009 128006 882 128007 271 13347 0 128009 128006 78191 128007 271"}};
    for (int i = 0; i < LENGTH(rows); i++) {
        Chat c;
        Error err = {""};
        if (!chat_init(&c, t, rows[i].format, 128000, &err)) test_fail("%s", err.text);
        TokenList got = chat_ids(&c, messages + rows[i].first, rows[i].n, CHAT_DATE), want = parse_ids(rows[i].ids);
        check_ids(rows[i].ids, &got, &want);
        tokens_free(&got);
        tokens_free(&want);
    }
    test_end("test_chat_ids_of_the_templates");
}

// ---- what transformers writes, on a vocabulary of bytes -------------------------------------------------------------

enum { MOST_TOKENS = 400, MOST_MESSAGES = 16 };

// tests/vectors/chat.tsv: its tokens after the 256 bytes.
typedef struct {
    char *file, *rest; // rest: its lines of conversations
    Tokenizer tokenizer;
} Goldens;

static void open_goldens(Goldens *g) {
    size_t size;
    uint32_t *offsets = calloc(MOST_TOKENS + 1, sizeof *offsets);
    uint8_t *kind = calloc(MOST_TOKENS, 1), *bytes = malloc(1 << 14);
    int n = 0;
    for (; n < 256; n++) {
        bytes[n] = (uint8_t)n;
        offsets[n + 1] = (uint32_t)n + 1;
    }
    Error err = {""};
    g->file = g->rest = read_file("tests/vectors/chat.tsv", &size);
    if (!g->file) test_fail("no tests/vectors/chat.tsv");
    while (g->file && (g->rest[0] == '#' || strncmp(g->rest, "token\t", 6) == 0)) {
        char *fields[4], *line = next_line(&g->rest), *text;
        if (line[0] == '#' || split_fields(line, fields, 4) != 4 || atoi(fields[1]) != n) continue;
        size_t length;
        Json j = {fields[3], fields[3], fields[3] + strlen(fields[3]), &err, "a token"};
        if (!json_string(&j, &text, &length)) break;
        memcpy(bytes + offsets[n], text, length);
        kind[n] = (uint8_t)atoi(fields[2]);
        offsets[n + 1] = offsets[n] + (uint32_t)length;
        n++;
    }
    if (err.text[0] || !tokenizer_init(&g->tokenizer, n, offsets, kind, bytes, offsets[n], &err))
        test_fail("%s", err.text);
}

// {"KEY": "VALUE", ...}; the number of pairs.
static int parse_pairs(Json *j, char *(*pairs)[2], int most) {
    int n = 0;
    size_t length;
    if (!json_expect(j, '{') || json_next(j, '}')) return 0;
    do
        if (n == most || !json_string(j, &pairs[n][0], &length) || !json_expect(j, ':') ||
            !json_string(j, &pairs[n][1], &length))
            return -1;
    while (n++, json_next(j, ','));
    return json_expect(j, '}') ? n : -1;
}

static bool parse_golden(char *line, const Tokenizer *t, Chat *c, Message *messages, int *n, TokenList *want) {
    Error err = {""};
    char *fields[3], *pairs[8][2];
    if (split_fields(line, fields, 3) != 3) return false;
    Json j = {fields[0], fields[0], fields[0] + strlen(fields[0]), &err, "keys"};
    int n_keys = parse_pairs(&j, pairs, 8), bos = -1;
    const char *system = NULL, *date = NULL, *first = NULL, *format = "";
    for (int i = 0; i < n_keys; i++) {
        const char *key = pairs[i][0], *value = pairs[i][1];
        if (strcmp(key, "chat_format") == 0) format = value;
        if (strcmp(key, "chat_system") == 0) system = value;
        if (strcmp(key, "chat_date") == 0) date = value;
        if (strcmp(key, "chat_bos_id") == 0 || (strcmp(key, "bos_id") == 0 && !first)) first = value;
    }
    if (first && *first) bos = atoi(first);
    int which = 0;
    while (chat_format_names[which] && strcmp(chat_format_names[which], format) != 0) which++;
    if (!chat_format_names[which] || !chat_init(c, t, (ChatFormat)which, bos, &err)) return false;
    c->system = system;
    c->date = date;
    j = (Json){fields[1], fields[1], fields[1] + strlen(fields[1]), &err, "messages"};
    if (!json_expect(&j, '[')) return false;
    *n = 0;
    do {
        if (*n == MOST_MESSAGES || parse_pairs(&j, pairs, 8) != 2) return false;
        bool role = strcmp(pairs[0][0], "role") == 0;
        messages[(*n)++] = (Message){pairs[!role][1], pairs[role][1]};
    } while (json_next(&j, ','));
    *want = parse_ids(fields[2]);
    return json_expect(&j, ']') && want->n > 0;
}

static void test_chat_conversations_as_transformers_writes_them(Goldens *g) {
    int n_conversations = 0, formats[5] = {0};
    for (char *line; (line = next_line(&g->rest)) && *line; n_conversations++) {
        Message messages[MOST_MESSAGES];
        Chat c;
        int n;
        TokenList want = {0};
        if (!parse_golden(line, &g->tokenizer, &c, messages, &n, &want)) {
            test_fail("conversation %d cannot be read", n_conversations);
            break;
        }
        TokenList got = chat_ids(&c, messages, n, NULL);
        char what[40];
        snprintf(what, sizeof what, "conversation %d", n_conversations);
        check_ids(what, &got, &want);
        formats[c.format]++;
        tokens_free(&got);
        tokens_free(&want);
    }
    printf("# %d conversations: %d llama3, %d llama3.1, %d chatml, %d deepseek\n", n_conversations,
           formats[CHAT_LLAMA3], formats[CHAT_LLAMA3_1], formats[CHAT_CHATML], formats[CHAT_DEEPSEEK]);
    CHECK(n_conversations >= 60);
    for (int f = CHAT_LLAMA3; f <= CHAT_DEEPSEEK; f++) CHECK(formats[f] >= 5);
    test_end("test_chat_conversations_as_transformers_writes_them");
}

// Ids that the template writes, in their order.
static TokenList own_ids(const Chat *c, const TokenList *ids) {
    TokenList own = {0};
    Error err = {""};
    for (size_t i = 0; i < ids->n; i++)
        for (int k = 0; k < c->n_own; k++)
            if (ids->ids[i] == c->own[k]) tokens_append(&own, ids->ids[i], &err);
    return own;
}

// The tokens of a template, special or not, count nowhere in a message; other added tokens do.
static void test_chat_own_tokens_in_messages(const Tokenizer *t) {
    int bos = tokenizer_special(t, "<|begin_of_text|>"), call = tokenizer_added(t, "<tool_call>");
    for (ChatFormat f = CHAT_LLAMA3; f <= CHAT_DEEPSEEK; f++) {
        Chat c;
        Error err = {""};
        if (!chat_init(&c, t, f, bos, &err)) test_fail("%s", err.text);
        Message harmless[] = {{"system", "x"}, {"user", "x"}, {"assistant", "x"}, {"user", "x"}};
        TokenList plain = chat_ids(&c, harmless, LENGTH(harmless), NULL), frame = own_ids(&c, &plain);
        CHECK(frame.n > 4);
        for (int k = 0; k < c.n_own; k++)
            for (int m = 0; m < LENGTH(harmless); m++) {
                size_t n;
                const uint8_t *token = tokenizer_bytes(t, c.own[k], &n);
                char text[128];
                snprintf(text, sizeof text, "%.*s%.*s a<tool_call>", (int)n, token, (int)n, token);
                Message messages[LENGTH(harmless)];
                memcpy(messages, harmless, sizeof messages);
                messages[m].text = text;
                TokenList got = chat_ids(&c, messages, LENGTH(messages), NULL), own = own_ids(&c, &got);
                check_ids(text, &own, &frame);
                if (got.n != plain.n + 2 * n + 2)
                    test_fail("%s: %zu ids", text, got.n - plain.n); // " a" and the call for x
                int calls = 0;
                for (size_t i = 0; i < got.n; i++) calls += got.ids[i] == call;
                CHECK(calls == 1);
                tokens_free(&got);
                tokens_free(&own);
            }
        tokens_free(&plain);
        tokens_free(&frame);
    }
    test_end("test_chat_own_tokens_in_messages");
}

// The template's own system message is the template's text: special tokens in it count.
// A user's date beside it does not.
static void test_chat_own_system_message(const Tokenizer *t) {
    int bos = tokenizer_special(t, "<|begin_of_text|>"), eom = tokenizer_special(t, "<|eom_id|>"),
        end = tokenizer_added(t, "<|im_end|>");
    for (ChatFormat f = CHAT_LLAMA3; f <= CHAT_DEEPSEEK; f++)
        for (int dated = 0; dated < 2; dated++) {
            Chat c;
            Error err = {""};
            TokenList ids = {0};
            CHECK(chat_init(&c, t, f, bos, &err));
            c.system = " Say <|eom_id|>, <|im_end|>. ";
            CHECK(chat_begin(&c, NULL, 0, dated ? "1 <|eom_id|>" : NULL, &ids, &err));
            int eoms = 0, ends = 0;
            for (size_t i = 0; i < ids.n; i++) eoms += ids.ids[i] == eom, ends += ids.ids[i] == end;
            CHECK(eoms == 1 && ends == (f == CHAT_CHATML ? 2 : 1));
            // the blank before the end is there, too
            size_t last = f == CHAT_DEEPSEEK ? ids.n - 1 : f == CHAT_CHATML ? ids.n - 3 : ids.n - 2;
            CHECK(ids.ids[last] == ' ' && ids.ids[last - 1] == '.');
            ids.n = 0;
            CHECK(chat_begin(&c, bytes_of("<|eom_id|>"), 10, NULL, &ids, &err)); // a user's instead
            for (size_t i = 0; i < ids.n; i++) CHECK(ids.ids[i] != eom);
            tokens_free(&ids);
        }
    test_end("test_chat_own_system_message");
}

// What a model answered becomes what the template writes for an earlier answer.
static void test_chat_end_of_a_reply(const Tokenizer *t) {
    static const struct {
        ChatFormat format;
        const char *answer, *end, *same_as; // end: the id that ended it, NULL: none did
    } rows[] = {{CHAT_LLAMA3, "Hello", "<|eot_id|>", "Hello"},
                {CHAT_LLAMA3, "Hello", "<|eom_id|>", "Hello"},
                {CHAT_LLAMA3_1, "Hello", "<|end_of_text|>", "Hello"},
                {CHAT_LLAMA3_1, "Hel", NULL, "Hel"},
                {CHAT_LLAMA3, "", NULL, ""},
                {CHAT_CHATML, "Hello", "<|im_end|>", "Hello"},
                {CHAT_CHATML, "Hello", "<|end_of_text|>", "Hello"},
                {CHAT_CHATML, "Hel", NULL, "Hel"},
                {CHAT_DEEPSEEK, "Hm.\n</think>\n\nHi", "<\uFF5Cend\u2581of\u2581sentence\uFF5C>", "\n\nHi"},
                {CHAT_DEEPSEEK, "a</think>b</think>c<tool_call>", "<|end_of_text|>", "c<tool_call>"},
                {CHAT_DEEPSEEK, "a</think>", NULL, ""},
                {CHAT_DEEPSEEK, "No end of thoughts", NULL, "No end of thoughts"}};
    for (int i = 0; i < LENGTH(rows); i++) {
        Chat c;
        Error err = {""};
        CHECK(chat_init(&c, t, rows[i].format, 256, &err));
        TokenList got = {0}, want = {0}, text = encode(t, bytes_of(rows[i].answer), strlen(rows[i].answer), false);
        CHECK(chat_begin(&c, NULL, 0, NULL, &want, &err) && chat_message(&c, "user", bytes_of("Hi"), 2, &want, &err));
        for (size_t k = 0; k < want.n; k++) tokens_append(&got, want.ids[k], &err);
        size_t header = got.n;
        CHECK(chat_message(&c, "assistant", bytes_of(rows[i].same_as), strlen(rows[i].same_as), &want, &err));
        CHECK(chat_reply_header(&c, &got, &err));
        size_t answer = got.n;
        for (size_t k = 0; k < text.n; k++) tokens_append(&got, text.ids[k], &err);
        if (rows[i].end) tokens_append(&got, tokenizer_added(t, rows[i].end), &err);
        CHECK(chat_end_reply(&c, header, answer, rows[i].end != NULL, &got, &err));
        check_ids(rows[i].answer, &got, &want);
        tokens_free(&got);
        tokens_free(&want);
        tokens_free(&text);
    }
    test_end("test_chat_end_of_a_reply");
}

// The day as strftime has it in C's locale, before the template is written or after.
static void test_chat_date_of_today(const Tokenizer *t) {
    static const char *const zones[] = {"UTC", "Pacific/Kiritimati", "Etc/GMT+12"};
    for (int z = 0; z < LENGTH(zones); z++) {
        setenv("TZ", zones[z], 1);
        tzset();
        Chat c;
        Error err = {""};
        TokenList got = {0}, want[2] = {{0}, {0}};
        CHECK(chat_init(&c, t, CHAT_LLAMA3_1, 256, &err));
        for (int after = 0; after < 2; after++) {
            time_t now = time(NULL);
            char day[32];
            strftime(day, sizeof day, "%d %b %Y", localtime(&now));
            CHECK(chat_begin(&c, NULL, 0, day, &want[after], &err));
            c.date = CHAT_TODAY;
            if (!after) CHECK(chat_begin(&c, NULL, 0, NULL, &got, &err));
        }
        CHECK(same_ids(&got, &want[0]) || same_ids(&got, &want[1]));
        got.n = 0;
        c.date = "1 May 2031"; // a user's date in place of it
        CHECK(chat_begin(&c, NULL, 0, CHAT_TODAY, &got, &err));
        CHECK(same_ids(&got, &want[0]) || same_ids(&got, &want[1]));
        tokens_free(&got);
        tokens_free(&want[0]);
        tokens_free(&want[1]);
    }
    unsetenv("TZ");
    tzset();
    test_end("test_chat_date_of_today");
}

int main(void) {
    Tokenizer t;
    Error err = {""};
    if (!init_chat_vocabulary(&t, &err)) test_fail("%s", err.text);
    test_chat_frame_id_by_id(&t);
    test_chat_system_message(&t);
    test_chat_trims_white_space_of_every_kind(&t);
    test_chat_refusals(&t);
    test_chat_special_text_stays_text(&t, BOS, "test_chat_special_text_stays_text");
    test_chat_equals_the_rendered_text(&t, BOS, "test_chat_equals_the_rendered_text");
    tokenizer_free(&t);
    Goldens goldens = {.file = NULL};
    open_goldens(&goldens);
    test_chat_conversations_as_transformers_writes_them(&goldens);
    test_chat_own_tokens_in_messages(&goldens.tokenizer);
    test_chat_own_system_message(&goldens.tokenizer);
    test_chat_end_of_a_reply(&goldens.tokenizer);
    test_chat_date_of_today(&goldens.tokenizer);
    tokenizer_free(&goldens.tokenizer);
    free(goldens.file);
    if (load_llama3(&t)) {
        test_chat_ids_of_the_templates(&t);
        test_chat_special_text_stays_text(&t, 128000, "test_chat_special_text_stays_text_with_llama3");
        test_chat_equals_the_rendered_text(&t, 128000, "test_chat_equals_the_rendered_text_with_llama3");
        tokenizer_free(&t);
    } else
        test_skip("chat templates with LLaMA 3's vocabulary", "no " SHARED "tokenizer.model");
    return tests_summary();
}
