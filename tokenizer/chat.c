// The template, with T the trimmed text and [...] the special tokens, which come from here and never from a text:
//   [begin_of_text]                                            BOS
//   [start_header_id]ROLE[end_header_id]\n\nT[eot_id]          each message
//   [start_header_id]assistant[end_header_id]\n\n              before an answer
// LLaMA 3.1 always begins with a system message, whose T follows two lines of dates and an empty one.
#include "chat.h"

#include <stdlib.h>
#include <string.h>

#include "encode.h"
#include "unicode_tables.h"
#include "utf8.h"

bool chat_init(Chat *c, const Tokenizer *t, ChatFormat format, int bos_id, Error *err) {
    *c = (Chat){.tokenizer = t, .format = format, .bos = bos_id};
    if (format == CHAT_NONE) return fail(err, "this model has no chat format (its template was none of LLaMA 3's)");
    const struct {
        const char *text;
        int *id;
    } tokens[] = {
        {"<|start_header_id|>", &c->start_header}, {"<|end_header_id|>", &c->end_header}, {"<|eot_id|>", &c->eot}};
    for (size_t i = 0; i < sizeof tokens / sizeof *tokens; i++) {
        *tokens[i].id = tokenizer_special(t, tokens[i].text);
        if (*tokens[i].id < 0) return fail(err, "chat: the vocabulary has no special token %s", tokens[i].text);
    }
    return true;
}

// ---- what a template trims ------------------------------------------------------------------------------------------

// The white space of Python's str.strip, which templates trim with: Unicode's, and four separators of ASCII.
static bool is_trimmed(uint32_t cp) {
    return unicode_class(cp) == CLASS_SPACE || (cp >= 0x1C && cp <= 0x1F);
}

static void trim(const uint8_t **text, size_t *n) {
    uint32_t cp;
    for (int length; *n > 0 && (length = utf8_decode(*text, *n, &cp)) > 0 && is_trimmed(cp);) {
        *text += length;
        *n -= (size_t)length;
    }
    while (*n > 0) {
        size_t length = 1; // of the last character, from its first byte on
        while (length < *n && length < 4 && ((*text)[*n - length] & 0xC0) == 0x80) length++;
        if (utf8_decode(*text + *n - length, length, &cp) != (int)length || !is_trimmed(cp)) return;
        *n -= length;
    }
}

// ---- the template ---------------------------------------------------------------------------------------------------

static bool add_header(const Chat *c, const char *role, TokenList *out, Error *err) {
    return tokens_append(out, c->start_header, err) &&
           tokenizer_encode(c->tokenizer, (const uint8_t *)role, strlen(role), false, out, err) &&
           tokens_append(out, c->end_header, err);
}

// What is between two special tokens is one text to the tokenizer: "\n\n", the lines if there are any, the message.
static bool add_message(const Chat *c, const char *role, const char *lines, const uint8_t *text, size_t n,
                        TokenList *out, Error *err) {
    trim(&text, &n);
    size_t n_lines = strlen(lines);
    uint8_t *body = malloc(n_lines + n + 2);
    if (!body) return fail(err, "out of memory: a message of %zu bytes", n);
    memcpy(body, "\n\n", 2);
    memcpy(body + 2, lines, n_lines);
    if (n) memcpy(body + 2 + n_lines, text, n);
    bool ok = add_header(c, role, out, err) && tokenizer_encode(c->tokenizer, body, n_lines + n + 2, false, out, err) &&
              tokens_append(out, c->eot, err);
    free(body);
    return ok;
}

bool chat_begin(const Chat *c, const uint8_t *system, size_t n, const char *date, TokenList *out, Error *err) {
    if (c->bos >= 0 && !tokens_append(out, c->bos, err)) return false;
    if (c->format == CHAT_LLAMA3) return !system || chat_message(c, "system", system, n, out, err);
    static const char before[] = "Cutting Knowledge Date: December 2023\nToday Date: ", after[] = "\n\n";
    size_t n_date = strlen(date);
    char *lines = malloc(sizeof before + n_date + sizeof after);
    if (!lines) return fail(err, "out of memory: a date of %zu bytes", n_date);
    memcpy(lines, before, sizeof before - 1);
    memcpy(lines + sizeof before - 1, date, n_date);
    memcpy(lines + sizeof before - 1 + n_date, after, sizeof after);
    bool ok = add_message(c, "system", lines, system, system ? n : 0, out, err);
    free(lines);
    return ok;
}

bool chat_message(const Chat *c, const char *role, const uint8_t *text, size_t n, TokenList *out, Error *err) {
    return add_message(c, role, "", text, n, out, err);
}

bool chat_reply_header(const Chat *c, TokenList *out, Error *err) {
    return add_header(c, "assistant", out, err) &&
           tokenizer_encode(c->tokenizer, (const uint8_t *)"\n\n", 2, false, out, err);
}
