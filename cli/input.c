#include "input.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "../model/file/json.h"
#include "../tokenizer/encode.h"
#include "interrupt.h"

static bool read_stream(Bytes *b, FILE *in, const char *name, Error *err) {
    char block[65536];
    for (;;) {
        errno = 0;
        size_t n = fread(block, 1, sizeof block, in);
        if (!bytes_append(b, block, n, err)) return false;
        if (n == sizeof block) continue;
        if (!ferror(in)) return true;
        if (interrupted) return fail_interrupted(err);
        if (errno != EINTR) return fail(err, "%s: %s", name, strerror(errno));
        clearerr(in);
    }
}

bool read_file(Bytes *b, const char *path, Error *err) {
    if (strcmp(path, "-") == 0) return read_stream(b, stdin, "standard input", err);
    FILE *in;
    do {
        in = fopen(path, "rb"); // of a named pipe it waits for a writer
    } while (!in && errno == EINTR && !interrupted);
    if (!in && interrupted) return fail_interrupted(err);
    if (!in) return fail(err, "%s: %s", path, strerror(errno));
    bool ok = read_stream(b, in, path, err);
    fclose(in);
    return ok;
}

bool read_prompt(const Options *o, Bytes *b, Error *err) {
    if (o->prompt_file) return read_file(b, o->prompt_file, err);
    if (strcmp(o->prompt, "-") == 0) return read_stream(b, stdin, "standard input", err);
    return bytes_append(b, o->prompt, strlen(o->prompt), err);
}

// Where a list's first id or separator begins and where its last one ends: without the brackets around it, if it has both.
static void skip_brackets(const char *text, size_t *begin, size_t *end) {
    size_t first = *begin, last = *end;
    while (first < last && text[first] && strchr(" \t\r\n", text[first])) first++;
    while (last > first && text[last - 1] && strchr(" \t\r\n", text[last - 1])) last--;
    if (last - first < 2 || text[first] != '[' || text[last - 1] != ']') return;
    *begin = first + 1;
    *end = last - 1;
}

bool parse_ids(const char *text, size_t n, int vocab_size, TokenList *ids, Error *err) {
    const char *separators = " \t\r\n,";
    size_t i = 0;
    skip_brackets(text, &i, &n);
    while (i < n) {
        if (text[i] && strchr(separators, text[i])) {
            i++;
            continue;
        }
        int64_t id = 0;
        size_t start = i;
        for (; i < n && text[i] >= '0' && text[i] <= '9'; i++) id = id < vocab_size ? id * 10 + (text[i] - '0') : id;
        bool ended = i == n || (text[i] && strchr(separators, text[i]));
        if (i == start || !ended || id >= vocab_size) {
            int shown = n - start < 24 ? (int)(n - start) : 24;
            return fail(err, "id \"%.*s\" at byte %zu: expected whole numbers below %d", shown, text + start, start,
                        vocab_size);
        }
        if (!tokens_append(ids, (int)id, err)) return false;
    }
    return true;
}

bool encode_prompt(const Options *o, const Model *m, const Bytes *text, TokenList *ids, Error *err) {
    if (o->ids) return parse_ids(text->data, text->n, m->config.vocab_size, ids, err);
    int bos = o->tokenize ? -1 : m->config.bos_id;
    TokenList encoded = {0};
    bool ok = tokenizer_encode(&m->tokenizer, (const uint8_t *)text->data, text->n, o->special, &encoded, err);
    if (ok && bos >= 0 && !(encoded.n && encoded.ids[0] == bos)) ok = tokens_append(ids, bos, err);
    for (size_t i = 0; ok && i < encoded.n; i++) ok = tokens_append(ids, encoded.ids[i], err);
    tokens_free(&encoded);
    return ok;
}

bool check_prompt_bytes(const Options *o, const Model *m, size_t n, const char *what, Error *err) {
    if (o->tokenize) return true;
    const Tokenizer *t = &m->tokenizer;
    size_t longest = t->max_token_bytes, max_len = (size_t)m->config.max_seq_len;
    if (t->n_special && t->special[0].length > longest) longest = t->special[0].length;
    return n / longest < max_len || fail(err, "%s of %zu bytes has at least %zu tokens, the model's maximum is %zu",
                                         what, n, n / longest, max_len);
}

// ---- chat -----------------------------------------------------------------------------------------------------------

bool open_chat(const Options *o, const Model *m, Chat *chat, Error *err) {
    const Config *c = &m->config;
    if (!chat_init(chat, &m->tokenizer, c->chat_format, c->chat_bos_id, err)) return false;
    chat->system = c->chat_system;
    chat->date = c->chat_date;
    return !o->date || c->chat_format == CHAT_LLAMA3_1 ||
           fail(err, "--date: this model's chat format is %s, expected llama3.1: no other one has a date",
                chat_format_names[c->chat_format]);
}

bool encode_message(const Options *o, const Chat *chat, const Bytes *text, TokenList *ids, Error *err) {
    const uint8_t *system = (const uint8_t *)o->system;
    return chat_begin(chat, system, system ? strlen(o->system) : 0, o->date, ids, err) &&
           chat_message(chat, "user", (const uint8_t *)text->data, text->n, ids, err) &&
           chat_reply_header(chat, ids, err);
}

// ---- many prompts ---------------------------------------------------------------------------------------------------

typedef struct {
    const Options *options;
    const Model *model;
    Chat *chat; // tokenizer NULL: not opened yet
    Json json;  // of the line at hand
} PromptReader;

// {"role": "...", "content": "..."}, in any order.
static bool parse_message(PromptReader *r, int number, char **role, Bytes *content) {
    Json *j = &r->json;
    *role = content->data = NULL;
    if (!json_expect(j, '{')) return false;
    do {
        char *key, *value;
        size_t length;
        if (!json_string(j, &key, &length)) return false;
        bool is_role = strcmp(key, "role") == 0;
        bool is_content = strcmp(key, "content") == 0,
             again = is_role ? *role != NULL : is_content && content->data != NULL;
        if ((!is_role && !is_content) || again) {
            fail(j->err, "%s: message %d: %s key \"%.40s\", expected \"role\" and \"content\"", j->what, number,
                 again ? "a second" : "unknown", key);
            return false;
        }
        if (!json_expect(j, ':') || !json_string(j, &value, &length)) return false;
        if (is_role)
            *role = value;
        else
            *content = (Bytes){.data = value, .n = length};
    } while (json_next(j, ','));
    if (!json_expect(j, '}')) return false;
    if (*role && content->data) return true;
    fail(j->err, "%s: message %d has no \"%s\"", j->what, number, *role ? "content" : "role");
    return false;
}

// Adds a message to a conversation: the first begins it.
static bool add_message(PromptReader *r, int number, const char *role, const Bytes *content, TokenList *ids) {
    Error *err = r->json.err;
    const Options *o = r->options;
    const uint8_t *text = (const uint8_t *)content->data;
    bool system = strcmp(role, "system") == 0, user = strcmp(role, "user") == 0;
    if (!user && strcmp(role, "assistant") != 0 && !(system && number == 1))
        return fail(err, "%s: message %d: role \"%.40s\", expected %s", r->json.what, number, role,
                    number == 1 ? "system, user or assistant" : "user or assistant (system comes first)");
    if (system) return chat_begin(r->chat, text, content->n, NULL, ids, err);
    if (number == 1 &&
        !chat_begin(r->chat, (const uint8_t *)o->system, o->system ? strlen(o->system) : 0, o->date, ids, err))
        return false;
    return chat_message(r->chat, role, text, content->n, ids, err);
}

// The list of messages, and the header of the answer.
static bool parse_messages(PromptReader *r, TokenList *ids) {
    Json *j = &r->json;
    if (!r->chat->tokenizer) {
        Error why = {""};
        if (!open_chat(r->options, r->model, r->chat, &why)) return fail(j->err, "%s: messages: %s", j->what, why.text);
    }
    if (!json_expect(j, '[')) return false;
    char *role = "";
    int number = 0;
    size_t n_bytes = 0;
    if (!json_next(j, ']')) {
        do {
            Bytes content = {0};
            number++;
            if (!parse_message(r, number, &role, &content)) return false;
            char what[300];
            snprintf(what, sizeof what, "%s: the conversation up to message %d,", j->what, number);
            n_bytes += content.n;
            if (!check_prompt_bytes(r->options, r->model, n_bytes, what, j->err) ||
                !add_message(r, number, role, &content, ids))
                return false;
        } while (json_next(j, ','));
        if (!json_expect(j, ']')) return false;
    }
    if (strcmp(role, "user") != 0)
        return fail(j->err, "%s: %s, expected the user's at the end", j->what,
                    number ? "the last message is not the user's" : "no messages");
    return chat_reply_header(r->chat, ids, j->err);
}

static bool parse_id_list(PromptReader *r, TokenList *ids) {
    Json *j = &r->json;
    if (!json_expect(j, '[')) return false;
    if (json_next(j, ']')) return true;
    do {
        uint64_t id;
        if (!json_uint(j, &id)) return false;
        if (id >= (uint64_t)r->model->config.vocab_size)
            return fail(j->err, "%s: id %" PRIu64 ", expected below %d", j->what, id, r->model->config.vocab_size);
        if (!tokens_append(ids, (int)id, j->err)) return false;
    } while (json_next(j, ','));
    return json_expect(j, ']');
}

// One line of a prompts file.
static bool parse_prompt_line(PromptReader *r, Sequence *seq) {
    Json *j = &r->json;
    char *key, *text;
    size_t length;
    bool ok;
    if (!json_expect(j, '{') || !json_string(j, &key, &length) || !json_expect(j, ':')) return false;
    if (strcmp(key, "text") == 0) {
        if (!json_string(j, &text, &length)) return false;
        Bytes bytes = {.data = text, .n = length};
        char named[300];
        snprintf(named, sizeof named, "%s: the prompt", j->what);
        ok = check_prompt_bytes(r->options, r->model, length, named, j->err) &&
             encode_prompt(r->options, r->model, &bytes, &seq->prompt, j->err);
    } else if (strcmp(key, "ids") == 0) {
        ok = parse_id_list(r, &seq->prompt);
    } else if (strcmp(key, "messages") == 0) {
        ok = parse_messages(r, &seq->prompt);
        seq->turn = true;
    } else {
        return fail(j->err, "%s: key \"%.40s\", expected \"text\", \"ids\" or \"messages\"", j->what, key);
    }
    return ok && json_expect(j, '}') && json_end(j);
}

bool parse_prompts(const Options *o, const Model *m, Bytes *file, Chat *chat, Sequence **seqs, int *n, Error *err) {
    PromptReader reader = {.options = o, .model = m, .chat = chat};
    int line_number = 1;
    bool bom = file->n >= 3 && memcmp(file->data, "\xEF\xBB\xBF", 3) == 0; // as some editors begin a file
    for (size_t at = bom ? 3 : 0; at < file->n; line_number++) {
        char *line = file->data + at, *end = memchr(line, '\n', file->n - at);
        size_t length = end ? (size_t)(end - line) : file->n - at;
        at += length + 1;
        if (strspn(line, " \t\r") >= length) continue;
        Sequence *more = realloc(*seqs, (size_t)(*n + 1) * sizeof *more);
        if (!more) return fail(err, "out of memory: %d prompts", *n + 1);
        *seqs = more;
        more[*n] = (Sequence){.index = *n};
        char what[256];
        snprintf(what, sizeof what, "%s:%d", o->prompts, line_number);
        reader.json = (Json){line, line, line + length, err, what};
        if (!parse_prompt_line(&reader, &more[(*n)++])) return false;
    }
    if (*n == 0) return fail(err, "%s: no prompts", o->prompts);
    return chat->tokenizer || !(o->system || o->date) ||
           fail(err, "%s: --system and --date go with messages, and no line has any", o->prompts);
}
