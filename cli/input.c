#include "input.h"

#include <errno.h>
#include <string.h>

#include "../tokenizer/encode.h"
#include "interrupt.h"
#include "output.h"

GenerateConfig generate_config(const Options *o, const Chat *chat) {
    return (GenerateConfig){.n = o->n,
                            .logprobs = o->logprobs,
                            .prompt_logprobs = o->logprobs && o->echo,
                            .n_stops = o->n_stops,
                            .stops = o->stops,
                            .ignore_eos = o->ignore_eos,
                            .n_turn_ends = chat ? chat->n_ends : 0,
                            .turn_ends = chat ? chat->ends : NULL,
                            .special = o->special,
                            .seed = o->seed,
                            .sampler = o->sampler};
}

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

const char *input_name(const char *path) {
    return strcmp(path, "-") == 0 ? "standard input" : path;
}

bool read_file(Bytes *b, const char *path, Error *err) {
    if (strcmp(path, "-") == 0) return read_stream(b, stdin, input_name(path), err);
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

static void drop_final_newline(const Options *o, const char *path, Bytes *b) {
    size_t n = b->n;
    if (n && b->data[n - 1] == '\n') n--;
    if (n < b->n && n && b->data[n - 1] == '\r') n--;
    if (n < b->n && o->verbose) print_message("%s: its final newline is not part of the prompt", input_name(path));
    b->n = n;
}

bool read_prompt(const Options *o, Bytes *b, Error *err) {
    const char *path = o->prompt_file ? o->prompt_file : strcmp(o->prompt, "-") == 0 ? "-" : NULL;
    bool exact = o->ids || o->detokenize || (o->tokenize && !o->chat);
    if (!path) return bytes_append(b, o->prompt, strlen(o->prompt), err);
    if (!read_file(b, path, err)) return false;
    if (!exact) drop_final_newline(o, path, b);
    return true;
}

// Where a list's first id or separator begins and where its last one ends: without the brackets around it, if it has
// both.
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
    hint_special(o, &m->tokenizer, text, false);
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

bool check_prompt(const Options *o, const Sequence *seq, int context, bool is_ids, Error *err) {
    size_t n = seq->prompt.n;
    if (n == 0)
        return fail(err, "the prompt is empty, and %s",
                    is_ids ? "ids get no BOS" : "this model has no BOS token to begin with");
    bool more = seq->config.n > 0;
    return n + more <= (size_t)context || fail(err, "the prompt has %zu tokens, the context holds %d%s%s", n, context,
                                               more ? " and needs room for one more" : "", o->context ? " (-c)" : "");
}

bool check_pages(const Model *m, const Sequence *seq, Error *err) {
    const KVCache *kv = &m->kv;
    int n = (int)seq->prompt.n, room = kv->max_len - n, more = seq->config.n < NO_LIMIT ? seq->config.n : 1;
    if (more > room) more = room;
    return n + more <= kv_longest(kv) ||
           fail(err,
                "a prompt of %d tokens and %d new ones take %d pages of %d positions, the K/V cache has %d; try a "
                "larger --kv-memory",
                n, more, kv_pages(n + more), KV_PAGE, kv->n_pages);
}

void hint_special(const Options *o, const Tokenizer *t, const Bytes *text, bool message) {
    static bool given;
    if (given || o->quiet || (o->special && !message)) return; // a message's are characters with --special, too
    int id = tokenizer_find_special(t, (const uint8_t *)text->data, text->n);
    if (id < 0) return;
    given = true;
    size_t n;
    const uint8_t *name = tokenizer_bytes(t, id, &n);
    Error hint = {""}; // one printable line, whatever the name is
    fail(&hint, "%.*s in the %s is ordinary characters; %s", (int)(n < 100 ? n : 100), (const char *)name,
         message ? "message" : "prompt",
         message ? "special tokens in a conversation are the template's" : "with --special it is the special token");
    print_message("%s", hint.text);
}

// ---- chat -----------------------------------------------------------------------------------------------------------

bool open_chat(const Options *o, const Model *m, Chat *chat, Error *err) {
    const Config *c = &m->config;
    Bytes system = {.data = (char *)o->system, .n = o->system ? strlen(o->system) : 0};
    if (!chat_init(chat, &m->tokenizer, c->chat_format, c->chat_bos_id, err)) return false;
    if (system.n) hint_special(o, &m->tokenizer, &system, true);
    chat->system = c->chat_system;
    chat->date = c->chat_date;
    return !o->date || c->chat_format == CHAT_LLAMA3_1 ||
           fail(err, "--date: this model's chat format is %s, expected llama3.1: no other one has a date",
                chat_format_names[c->chat_format]);
}

bool encode_message(const Options *o, const Chat *chat, const Bytes *text, TokenList *ids, Error *err) {
    const uint8_t *system = (const uint8_t *)o->system;
    hint_special(o, chat->tokenizer, text, true);
    return chat_begin(chat, system, system ? strlen(o->system) : 0, o->date, ids, err) &&
           chat_message(chat, "user", (const uint8_t *)text->data, text->n, ids, err) &&
           chat_reply_header(chat, ids, err);
}
