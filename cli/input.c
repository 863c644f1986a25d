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

bool parse_ids(const char *text, size_t n, int vocab_size, TokenList *ids, Error *err) {
    const char *separators = " \t\r\n,";
    for (size_t i = 0; i < n;) {
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
    int bos = m->config.bos_id;
    TokenList encoded = {0};
    bool ok = tokenizer_encode(&m->tokenizer, (const uint8_t *)text->data, text->n, o->special, &encoded, err);
    if (ok && bos >= 0 && !(encoded.n && encoded.ids[0] == bos)) ok = tokens_append(ids, bos, err);
    for (size_t i = 0; ok && i < encoded.n; i++) ok = tokens_append(ids, encoded.ids[i], err);
    tokens_free(&encoded);
    return ok;
}

bool check_prompt_bytes(const Model *m, size_t n, const char *what, Error *err) {
    const Tokenizer *t = &m->tokenizer;
    size_t longest = t->max_token_bytes, max_len = (size_t)m->config.max_seq_len;
    if (t->n_special && t->special[0].length > longest) longest = t->special[0].length;
    return n / longest < max_len || fail(err, "%s of %zu bytes has at least %zu tokens, the model's maximum is %zu",
                                         what, n, n / longest, max_len);
}

// One line of a prompts file: {"text": "..."} or {"ids": [1, 2]}.
static bool parse_prompt_line(const Options *o, const Model *m, char *line, size_t n, const char *what, TokenList *ids,
                              Error *err) {
    Json j = {line, line, line + n, err, what};
    char *key, *text;
    size_t length;
    if (!json_expect(&j, '{') || !json_string(&j, &key, &length) || !json_expect(&j, ':')) return false;
    if (strcmp(key, "text") == 0) {
        if (!json_string(&j, &text, &length) || !json_expect(&j, '}') || !json_end(&j)) return false;
        Bytes bytes = {.data = text, .n = length};
        char named[300];
        snprintf(named, sizeof named, "%s: the prompt", what);
        return check_prompt_bytes(m, length, named, err) && encode_prompt(o, m, &bytes, ids, err);
    }
    if (strcmp(key, "ids") != 0) return fail(err, "%s: key \"%s\", expected \"text\" or \"ids\"", what, key);
    if (!json_expect(&j, '[')) return false;
    if (json_next(&j, ']')) return json_expect(&j, '}') && json_end(&j);
    do {
        uint64_t id;
        if (!json_uint(&j, &id)) return false;
        if (id >= (uint64_t)m->config.vocab_size)
            return fail(err, "%s: id %" PRIu64 ", expected below %d", what, id, m->config.vocab_size);
        if (!tokens_append(ids, (int)id, err)) return false;
    } while (json_next(&j, ','));
    return json_expect(&j, ']') && json_expect(&j, '}') && json_end(&j);
}

bool parse_prompts(const Options *o, const Model *m, Bytes *file, Sequence **seqs, int *n, Error *err) {
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
        if (!parse_prompt_line(o, m, line, length, what, &more[(*n)++].prompt, err)) return false;
    }
    return *n > 0 || fail(err, "%s: no prompts", o->prompts);
}
