#include "prompts.h"

#include <inttypes.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>

#include "../model/file/json.h"
#include "input.h"
#include "nearest.h"
#include "output.h"

// ---- keys -----------------------------------------------------------------------------------------------------------

typedef enum { KEY_TEXT, KEY_IDS, KEY_MESSAGES, KEY_STOP, KEY_SEED } Key;

// What is read of a line. flag: what the key's value is one of, with the same range.
static const struct {
    const char *name, *flag;
} keys[] = {{"text", NULL},
            {"ids", NULL},
            {"messages", NULL},
            {"stop", "--stop"},
            {"seed", "-s"},
            {"n", "-n"},
            {"temp", "--temp"},
            {"top_k", "--top-k"},
            {"top_p", "--top-p"},
            {"min_p", "--min-p"},
            {"logprobs", "--logprobs"},
            {"repetition_penalty", "--repetition-penalty"}};
enum { N_KEYS = sizeof keys / sizeof *keys };

// What an answer has of its own: a line's key of this name could not come back.
static const char *const answer_names[] = {"index", "prompt_ids",  "finish_reason",   "timings",     "error",
                                           "line",  "token_texts", "prompt_logprobs", "speculation", NULL};

// What other programs call ours.
static const struct {
    const char *name, *ours;
} other_names[] = {{"temperature", "temp"},  {"max_tokens", "n"},          {"max_new_tokens", "n"},
                   {"n_predict", "n"},       {"prompt", "text"},           {"input_ids", "ids"},
                   {"stop_strings", "stop"}, {"top_logprobs", "logprobs"}, {"repeat_penalty", "repetition_penalty"}};

enum { MAX_OTHER_KEYS = 256, MAX_NOTES = 32, MAX_NUMBER = 64 };

typedef struct {
    char *at, *end; // at NULL: it is not there
} Value;

typedef struct {
    const Options *options;
    const Model *model;
    Prompts *prompts;
    bool has_messages; // some line has
    int n_notes;
    const char *noted[MAX_NOTES]; // the names of other keys that have had their note

    // of the line at hand:
    Json json;
    Error problem; // the first, once the line is known to be JSON
    Value values[N_KEYS];
    int n_others;
    const char *others[MAX_OTHER_KEYS]; // names of the keys that come back
} PromptReader;

static int find_key(const char *name) {
    for (int k = 0; k < N_KEYS; k++)
        if (strcmp(name, keys[k].name) == 0) return k;
    return -1;
}

// The key of ours that this may be meant for; NULL: none.
static const char *nearest_key(const char *name) {
    const char *nearest = NULL;
    size_t n = strlen(name);
    int least = name_tolerance(n) + 1;
    for (int i = 0, n_others = sizeof other_names / sizeof *other_names; i < N_KEYS + n_others; i++) {
        const char *known = i < N_KEYS ? keys[i].name : other_names[i - N_KEYS].name;
        int distance = name_distance(name, n, known);
        if (distance >= least) continue;
        least = distance;
        nearest = i < N_KEYS ? known : other_names[i - N_KEYS].ours;
    }
    return nearest;
}

// Says once for each name that a key is none of ours.
static void note_other_key(PromptReader *r, int line, const char *name) {
    if (r->options->quiet || r->n_notes == MAX_NOTES) return;
    for (int i = 0; i < r->n_notes; i++)
        if (strcmp(r->noted[i], name) == 0) return;
    r->noted[r->n_notes++] = name;
    const char *near = nearest_key(name);
    Error note = {""}; // one printable line, whatever the name is
    fail(&note, "%s:%d: unknown key \"%.40s\", which comes back with the answer%s%s%s%s",
         input_name(r->options->prompts), line, name, near ? "; the nearest known one is \"" : "", near ? near : "",
         near ? "\"" : "", r->n_notes == MAX_NOTES ? "; of further ones there is no note" : "");
    print_message("%s", note.text);
}

static bool has_other_key(const PromptReader *r, const char *name) {
    for (int i = 0; i < r->n_others; i++)
        if (strcmp(r->others[i], name) == 0) return true;
    return false;
}

// Whether a key, which is none of ours, may come back.
static bool check_other_key(PromptReader *r, const char *name) {
    for (int i = 0; answer_names[i]; i++)
        if (strcmp(name, answer_names[i]) == 0)
            return fail(&r->problem, "the key \"%s\" is one of the answers' own", name);
    if (has_other_key(r, name)) return fail(&r->problem, "a second key \"%.40s\"", name);
    if (r->n_others == MAX_OTHER_KEYS) return fail(&r->problem, "more than %d keys", MAX_OTHER_KEYS);
    r->others[r->n_others++] = name;
    return true;
}

// One key and where its value is. One that is none of ours is kept as it is written, before its name is decoded in
// place.
static bool read_key(PromptReader *r, PromptLine *line) {
    Json *j = &r->json;
    char *name, *written, *value;
    size_t length, n_written, n_value, before = line->other.n;
    if (!json_next(j, '"')) return json_string(j, &name, &length); // which says what is expected
    j->at--;
    bool ok = json_raw(j, &written, &n_written) && bytes_append(&line->other, ", ", 2, j->err) &&
              bytes_append(&line->other, written, n_written, j->err) && bytes_append(&line->other, ": ", 2, j->err);
    j->at = written;
    ok = ok && json_string(j, &name, &length) && json_expect(j, ':') && json_raw(j, &value, &n_value);
    int key = ok ? find_key(name) : -1;
    if (ok && key < 0 && check_other_key(r, name)) {
        note_other_key(r, line->number, name);
        return bytes_append(&line->other, value, n_value, j->err);
    }
    line->other.n = before;
    if (key >= 0 && r->values[key].at)
        fail(&r->problem, "a second key \"%s\"", name);
    else if (key >= 0)
        r->values[key] = (Value){value, value + n_value};
    return ok;
}

// All keys of a line, or as many as could be read.
static bool read_keys(PromptReader *r, PromptLine *line) {
    Json *j = &r->json;
    if (!json_expect(j, '{')) return false;
    if (json_next(j, '}')) return json_end(j);
    do {
        if (!read_key(r, line)) return false;
    } while (json_next(j, ','));
    return json_expect(j, '}') && json_end(j);
}

// ---- values ---------------------------------------------------------------------------------------------------------

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
            fail(j->err, "message %d: %s key \"%.40s\", expected \"role\" and \"content\"", number,
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
    fail(j->err, "message %d has no \"%s\"", number, *role ? "content" : "role");
    return false;
}

// Adds a message to a conversation: the first begins it.
static bool add_message(PromptReader *r, int number, const char *role, const Bytes *content, TokenList *ids) {
    Error *err = r->json.err;
    const Options *o = r->options;
    const uint8_t *text = (const uint8_t *)content->data;
    bool system = strcmp(role, "system") == 0, user = strcmp(role, "user") == 0;
    hint_special(o, &r->model->tokenizer, content, true);
    if (!user && strcmp(role, "assistant") != 0 && !(system && number == 1))
        return fail(err, "message %d: role \"%.40s\", expected %s", number, role,
                    number == 1 ? "system, user or assistant" : "user or assistant (system comes first)");
    if (system) return chat_begin(&r->prompts->chat, text, content->n, NULL, ids, err);
    if (number == 1 && !chat_begin(&r->prompts->chat, (const uint8_t *)o->system, o->system ? strlen(o->system) : 0,
                                   o->date, ids, err))
        return false;
    return chat_message(&r->prompts->chat, role, text, content->n, ids, err);
}

// The list of messages, and the header of the answer.
static bool parse_messages(PromptReader *r, TokenList *ids) {
    Json *j = &r->json;
    r->has_messages = true;
    if (!r->prompts->chat.tokenizer) {
        Chat chat;
        Error why = {""};
        if (!open_chat(r->options, r->model, &chat, &why)) return fail(j->err, "messages: %s", why.text);
        r->prompts->chat = chat;
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
            char what[64];
            snprintf(what, sizeof what, "the conversation up to message %d,", number);
            n_bytes += content.n;
            if (!check_prompt_bytes(r->options, r->model, n_bytes, what, j->err) ||
                !add_message(r, number, role, &content, ids))
                return false;
        } while (json_next(j, ','));
        if (!json_expect(j, ']')) return false;
    }
    if (strcmp(role, "user") != 0)
        return fail(j->err, "%s, expected the user's at the end",
                    number ? "the last message is not the user's" : "no messages");
    return chat_reply_header(&r->prompts->chat, ids, j->err);
}

static bool parse_id_list(PromptReader *r, TokenList *ids) {
    Json *j = &r->json;
    if (!json_expect(j, '[')) return false;
    if (json_next(j, ']')) return true;
    do {
        uint64_t id;
        if (!json_uint(j, &id)) return false;
        if (id >= (uint64_t)r->model->config.vocab_size)
            return fail(j->err, "id %" PRIu64 ", expected below %d", id, r->model->config.vocab_size);
        if (!tokens_append(ids, (int)id, j->err)) return false;
    } while (json_next(j, ','));
    return json_expect(j, ']');
}

static bool parse_text(PromptReader *r, TokenList *ids) {
    Bytes text = {0};
    return json_string(&r->json, &text.data, &text.n) &&
           check_prompt_bytes(r->options, r->model, text.n, "the prompt", r->json.err) &&
           encode_prompt(r->options, r->model, &text, ids, r->json.err);
}

// Takes up the JSON at a key's value. False: the line has no such key.
static bool begin_value(PromptReader *r, int key) {
    r->json.at = r->values[key].at;
    r->json.end = r->values[key].end;
    return r->values[key].at != NULL;
}

// Of the three keys that a prompt may have the one there is.
static bool parse_prompt(PromptReader *r, TokenList *ids) {
    static bool (*const parse[])(PromptReader *, TokenList *) = {parse_text, parse_id_list, parse_messages};
    int key = -1;
    for (int k = KEY_TEXT; k <= KEY_MESSAGES; k++) {
        if (!r->values[k].at) continue;
        if (key >= 0) return fail(&r->problem, "\"%s\" and \"%s\": expected one of them", keys[key].name, keys[k].name);
        key = k;
    }
    if (key < 0) return fail(&r->problem, "no \"text\", \"ids\" or \"messages\"");
    begin_value(r, key);
    return parse[key](r, ids);
}

// Sets what a key's flag sets, under the key's name.
static bool set_by_key(PromptReader *r, Options *own, int key, const char *text) {
    char name[40];
    const char *table_name;
    snprintf(name, sizeof name, "\"%s\"", keys[key].name);
    Flag flag = *flags_find(keys[key].flag, strlen(keys[key].flag), &table_name);
    flag.name = name;
    return flag_set(own, &flag, text, &r->problem);
}

// A text or a list of texts, in place of the command line's.
static bool parse_stops(PromptReader *r, PromptLine *line, Options *own) {
    Json *j = &r->json;
    char *text;
    size_t n;
    own->n_stops = 0;
    bool list = json_next(j, '['), empty = list && json_next(j, ']');
    for (bool more = !empty; more; more = list && json_next(j, ','))
        if (!json_string(j, &text, &n) || !set_by_key(r, own, KEY_STOP, text)) return false;
    if (list && !empty && !json_expect(j, ']')) return false;
    line->stops = malloc((size_t)(own->n_stops + 1) * sizeof *line->stops);
    if (!line->stops) return fail(j->err, "out of memory: stop texts");
    memcpy(line->stops, own->stops, (size_t)own->n_stops * sizeof *line->stops);
    return true;
}

// The command line's settings, and the line's own in their place.
static bool parse_settings(PromptReader *r, PromptLine *line, Options *own) {
    *own = *r->options;
    if (begin_value(r, KEY_STOP) && !parse_stops(r, line, own)) return false;
    for (int key = KEY_SEED; key < N_KEYS; key++) {
        if (!begin_value(r, key)) continue;
        size_t n = (size_t)(r->json.end - r->json.at);
        if (n > MAX_NUMBER) return fail(&r->problem, "\"%s\" has %zu bytes, expected a number", keys[key].name, n);
        *r->json.end = 0; // the line has been read: what comes after a value is of no use any more
        if (!set_by_key(r, own, key, r->json.at)) return false;
    }
    return true;
}

// What the keys of a line say.
static bool parse_values(PromptReader *r, PromptLine *line, Sequence *seq) {
    const Options *o = r->options;
    const Config *c = &r->model->config;
    Options own;
    if (!parse_settings(r, line, &own) || !parse_prompt(r, &seq->prompt)) return false;
    seq->config = generate_config(&own, r->values[KEY_MESSAGES].at ? &r->prompts->chat : NULL);
    seq->config.stops = line->stops ? line->stops : o->stops;
    seq->config.stream = r->values[KEY_SEED].at ? 0 : (uint64_t)seq->index;
    return o->tokenize ||
           check_prompt(o, seq, o->context ? o->context : c->max_seq_len, r->values[KEY_IDS].at != NULL, &r->problem);
}

// ---- lines ----------------------------------------------------------------------------------------------------------

// Room for one line more.
static bool grow(Prompts *p, Error *err) {
    if (p->n < p->capacity) return true;
    if (p->capacity > INT_MAX / 4) return fail(err, "more than %d prompts", p->capacity);
    int capacity = 2 * p->capacity + 16;
    PromptLine *lines = realloc(p->lines, (size_t)capacity * sizeof *lines);
    if (lines) p->lines = lines;
    Sequence *seqs = realloc(p->seqs, (size_t)capacity * sizeof *seqs);
    if (seqs) p->seqs = seqs;
    if (!lines || !seqs) return fail(err, "out of memory: %d prompts", capacity);
    p->capacity = capacity;
    return true;
}

// One line: a sequence, or an error. False: there is no memory for either.
static bool read_line(PromptReader *r, char *text, size_t n, int number, Error *err) {
    Prompts *p = r->prompts;
    if (!grow(p, err)) return false;
    PromptLine *line = &p->lines[p->n];
    Sequence *seq = &p->seqs[p->n_seqs];
    Error syntax = {""};
    *line = (PromptLine){.number = number};
    *seq = (Sequence){.index = p->n++};
    r->json = (Json){.start = text, .at = text, .end = text + n, .err = &syntax};
    r->problem = (Error){""};
    r->n_others = 0;
    memset(r->values, 0, sizeof r->values);
    bool ok = read_keys(r, line);
    r->json.err = &r->problem;
    if (ok && !r->problem.text[0] && parse_values(r, line, seq)) {
        p->n_seqs++;
        return true;
    }
    sequence_free(seq);
    const char *error = ok ? r->problem.text : syntax.text;
    if (is_out_of_memory(ok ? &r->problem : &syntax)) return fail(err, "%s", error);
    return (line->error = strdup(error)) || fail(err, "out of memory: what is wrong with line %d", number);
}

bool prompts_parse(const Options *o, const Model *m, Prompts *p, Error *err) {
    PromptReader reader = {.options = o, .model = m, .prompts = p};
    const Bytes *file = &p->file;
    int number = 1;
    bool bom = file->n >= 3 && memcmp(file->data, "\xEF\xBB\xBF", 3) == 0; // as some editors begin a file
    for (size_t at = bom ? 3 : 0; at < file->n; number++) {
        char *line = file->data + at, *end = memchr(line, '\n', file->n - at);
        size_t length = end ? (size_t)(end - line) : file->n - at;
        at += length + 1;
        if (strspn(line, " \t\r") >= length) continue;
        if (!read_line(&reader, line, length, number, err)) return false;
    }
    if (p->n == 0) return fail(err, "%s: no prompts", input_name(o->prompts));
    return reader.has_messages || !(o->system || o->date) ||
           fail(err, "%s: --system and --date go with messages, and no line has any", input_name(o->prompts));
}

bool prompts_read(const Options *o, const Model *m, Prompts *p, Error *err) {
    if (!read_file(&p->file, o->prompts, err) || !bytes_append(&p->file, "", 1, err)) return false;
    p->file.n--; // the terminator is there for strspn
    return prompts_parse(o, m, p, err);
}

void prompts_free(Prompts *p) {
    for (int i = 0; i < p->n; i++) {
        free(p->lines[i].error);
        free(p->lines[i].other.data);
        free(p->lines[i].stops);
    }
    for (int i = 0; i < p->n_seqs; i++) sequence_free(&p->seqs[i]);
    free(p->lines);
    free(p->seqs);
    free(p->file.data);
    *p = (Prompts){.n = 0};
}
