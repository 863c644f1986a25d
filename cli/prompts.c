#include "prompts.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "../model/file/json.h"
#include "input.h"

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
    } else {
        return fail(j->err, "%s: key \"%.40s\", expected \"text\", \"ids\" or \"messages\"", j->what, key);
    }
    seq->config = generate_config(r->options, strcmp(key, "messages") == 0 ? r->chat : NULL);
    seq->config.stream = (uint64_t)seq->index;
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
