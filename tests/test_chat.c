// The chat frames against ids that HuggingFace's templates give, against the frame as a text with its special tokens
// parsed, and with special tokens written inside messages.
#include "../tokenizer/chat.h"

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
                    eots += got.ids[i] == c.eot;
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
                        tokens_append(&turns, c.eot, &err);
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
    if (load_llama3(&t)) {
        test_chat_ids_of_the_templates(&t);
        test_chat_special_text_stays_text(&t, 128000, "test_chat_special_text_stays_text_with_llama3");
        test_chat_equals_the_rendered_text(&t, 128000, "test_chat_equals_the_rendered_text_with_llama3");
        tokenizer_free(&t);
    } else
        test_skip("chat frames with LLaMA 3's vocabulary", "no " SHARED "tokenizer.model");
    return tests_summary();
}
