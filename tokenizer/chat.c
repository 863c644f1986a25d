// The templates, with T a message's text, S the system message and [...] tokens, which come from here and never from a
// message. LLaMA 3 and 3.1, which trim T and S:
//   [bos]
//   [start_header_id]system[end_header_id]\n\nS[eot_id]        3.1: always, S after two lines of dates and an empty one
//   [start_header_id]ROLE[end_header_id]\n\nT[eot_id]          each message
//   [start_header_id]assistant[end_header_id]\n\n              before an answer
// ChatML:
//   [bos] [im_start]system\nS[im_end]\n [im_start]ROLE\nT[im_end]\n ... [im_start]assistant\n
// deepseek, R1's distillations (T of an answer is what comes after its last </think>):
//   [bos] S [User]T [Assistant]T[end of sentence] ... [Assistant][<think>]\n
// What is between two tokens is one text to the tokenizer, wherever its parts come from.
#include "chat.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "encode.h"
#include "unicode_tables.h"
#include "utf8.h"

#define THOUGHTS_END "</think>"

const char *const chat_format_names[] = {"none", "llama3", "llama3.1", "chatml", "deepseek", NULL};

bool chat_init(Chat *c, const Tokenizer *t, ChatFormat format, int bos_id, Error *err) {
    *c = (Chat){.tokenizer = t, .format = format, .bos = bos_id};
    const struct {
        ChatFormat format;
        const char *text;
        int *id;
    } tokens[] = {{CHAT_LLAMA3, "<|start_header_id|>", &c->start},
                  {CHAT_LLAMA3, "<|end_header_id|>", &c->end_header},
                  {CHAT_LLAMA3, "<|eot_id|>", &c->end},
                  {CHAT_CHATML, "<|im_start|>", &c->start},
                  {CHAT_CHATML, "<|im_end|>", &c->end},
                  {CHAT_DEEPSEEK, "<\uFF5CUser\uFF5C>", &c->user},
                  {CHAT_DEEPSEEK, "<\uFF5CAssistant\uFF5C>", &c->assistant},
                  {CHAT_DEEPSEEK, "<\uFF5Cend\u2581of\u2581sentence\uFF5C>", &c->end}};
    if (format == CHAT_NONE)
        return fail(err,
                    "this model has no chat format (its template is none of llama3, llama3.1, chatml and deepseek)");
    for (size_t i = 0; i < sizeof tokens / sizeof *tokens; i++) {
        if (tokens[i].format != (format == CHAT_LLAMA3_1 ? CHAT_LLAMA3 : format)) continue;
        *tokens[i].id = c->own[c->n_own++] = tokenizer_added(t, tokens[i].text);
        if (*tokens[i].id < 0) return fail(err, "chat: the vocabulary has no special token %s", tokens[i].text);
    }
    c->ends[c->n_ends++] = c->end;
    int eom = tokenizer_added(t, "<|eom_id|>");
    if (eom >= 0 && (format == CHAT_LLAMA3 || format == CHAT_LLAMA3_1)) c->ends[c->n_ends++] = eom;
    c->think = format == CHAT_DEEPSEEK ? tokenizer_added(t, "<think>") : -1;
    if (c->think >= 0) c->own[c->n_own++] = c->think;
    if (bos_id >= 0) c->own[c->n_own++] = bos_id;
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

// Leaves what comes after the last </think>.
static void drop_thoughts(const uint8_t **text, size_t *n) {
    const size_t length = sizeof THOUGHTS_END - 1;
    for (size_t at = *n; at >= length; at--) {
        if (memcmp(*text + at - length, THOUGHTS_END, length) != 0) continue;
        *text += at;
        *n -= at;
        return;
    }
}

// ---- texts between two tokens ---------------------------------------------------------------------------------------

// Whether a token begins here that counts in the template's text, but not in a message.
static bool begins_token(const Chat *c, const uint8_t *text, size_t n) {
    const Tokenizer *t = c->tokenizer;
    for (int p = 0; p < ADDED_PASSES; p++) {
        int id = tokenizer_match(&t->passes[p], text, n);
        if (id < 0) continue;
        if (t->kind[id] == TOKEN_SPECIAL) return true;
        for (int i = 0; i < c->n_own; i++)
            if (c->own[i] == id) return true;
    }
    return false;
}

// One text: a user's up to text[own], the template's from there on, in which every token counts.
static bool add_text(const Chat *c, const uint8_t *text, size_t own, size_t n, TokenList *out, Error *err) {
    while (own > 0 && own < n && !begins_token(c, text + own, n - own)) own++;
    AddedTokens message = {.never = c->own, .n_never = c->n_own}, all = {.special = true};
    return (own == 0 || tokenizer_encode_added(c->tokenizer, text, own, message, out, err)) &&
           (own == n || tokenizer_encode_added(c->tokenizer, text + own, n - own, all, out, err));
}

static bool add_own(const Chat *c, const char *text, TokenList *out, Error *err) {
    return add_text(c, (const uint8_t *)text, 0, strlen(text), out, err);
}

// A text after the template's lines. own: it is the template's as well; foreign_lines: something in the lines is not.
static bool add_after(const Chat *c, const char *lines, bool foreign_lines, const uint8_t *text, size_t n, bool own,
                      TokenList *out, Error *err) {
    size_t n_lines = strlen(lines);
    uint8_t *body = malloc(n_lines + n + 1);
    if (!body) return fail(err, "out of memory: a message of %zu bytes", n);
    memcpy(body, lines, n_lines);
    if (n) memcpy(body + n_lines, text, n);
    bool ok = add_text(c, body, !own ? n_lines + n : foreign_lines ? n_lines : 0, n_lines + n, out, err);
    free(body);
    return ok;
}

// ---- the templates --------------------------------------------------------------------------------------------------

static bool is_llama3(const Chat *c) {
    return c->format == CHAT_LLAMA3 || c->format == CHAT_LLAMA3_1;
}

static bool add_header(const Chat *c, const char *role, TokenList *out, Error *err) {
    return tokens_append(out, c->start, err) && add_own(c, role, out, err) && tokens_append(out, c->end_header, err);
}

// Day, month and year, of the local time.
static void write_today(char *text, size_t size) {
    static const char months[12][4] = {"Jan", "Feb", "Mar", "Apr", "May", "Jun",
                                       "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"};
    time_t now = time(NULL);
    struct tm day;
    localtime_r(&now, &day);
    snprintf(text, size, "%02d %s %d", day.tm_mday, months[day.tm_mon], day.tm_year + 1900);
}

// The block of the system in LLaMA 3 and 3.1; n bytes of text, the template's own if `own`. date: the user's, or NULL.
static bool add_system(const Chat *c, const uint8_t *text, size_t n, bool own, const char *date, TokenList *out,
                       Error *err) {
    static const char before[] = "\n\nCutting Knowledge Date: December 2023\nToday Date: ", after[] = "\n\n";
    if (c->format == CHAT_LLAMA3)
        return add_header(c, "system", out, err) && add_after(c, "\n\n", false, text, n, own, out, err) &&
               tokens_append(out, c->end, err);
    char today[32];
    const char *day = date ? date : c->date ? c->date : CHAT_DATE;
    if (strcmp(day, CHAT_TODAY) == 0) write_today(today, sizeof today), day = today;
    size_t n_day = strlen(day);
    char *lines = malloc(sizeof before + n_day + sizeof after);
    if (!lines) return fail(err, "out of memory: a date of %zu bytes", n_day);
    memcpy(lines, before, sizeof before - 1);
    memcpy(lines + sizeof before - 1, day, n_day);
    memcpy(lines + sizeof before - 1 + n_day, after, sizeof after);
    bool ok = add_header(c, "system", out, err) && add_after(c, lines, date, text, n, own, out, err) &&
              tokens_append(out, c->end, err);
    free(lines);
    return ok;
}

bool chat_begin(const Chat *c, const uint8_t *system, size_t n, const char *date, TokenList *out, Error *err) {
    if (c->bos >= 0 && !tokens_append(out, c->bos, err)) return false;
    bool own = !system;
    if (own) system = (const uint8_t *)c->system, n = c->system ? strlen(c->system) : 0;
    if (is_llama3(c)) {
        if (!own) trim(&system, &n);
        return (!system && c->format == CHAT_LLAMA3) || add_system(c, system, n, own, date, out, err);
    }
    if (!system) return true;
    if (c->format == CHAT_DEEPSEEK) return add_after(c, "", false, system, n, own, out, err);
    return tokens_append(out, c->start, err) && add_after(c, "system\n", false, system, n, own, out, err) &&
           tokens_append(out, c->end, err) && add_own(c, "\n", out, err);
}

static bool is_assistant(const char *role) {
    return strcmp(role, "assistant") == 0;
}

bool chat_message(const Chat *c, const char *role, const uint8_t *text, size_t n, TokenList *out, Error *err) {
    if (is_llama3(c)) {
        trim(&text, &n);
        return add_header(c, role, out, err) && add_after(c, "\n\n", false, text, n, false, out, err) &&
               tokens_append(out, c->end, err);
    }
    if (c->format == CHAT_DEEPSEEK) {
        bool answer = is_assistant(role);
        if (answer) drop_thoughts(&text, &n);
        return tokens_append(out, answer ? c->assistant : c->user, err) &&
               add_after(c, "", false, text, n, false, out, err) && (!answer || tokens_append(out, c->end, err));
    }
    char line[32];
    snprintf(line, sizeof line, "%s\n", role);
    return tokens_append(out, c->start, err) && add_after(c, line, false, text, n, false, out, err) &&
           tokens_append(out, c->end, err) && add_own(c, "\n", out, err);
}

bool chat_reply_header(const Chat *c, TokenList *out, Error *err) {
    if (is_llama3(c)) return add_header(c, "assistant", out, err) && add_own(c, "\n\n", out, err);
    if (c->format == CHAT_CHATML) return tokens_append(out, c->start, err) && add_own(c, "assistant\n", out, err);
    if (!tokens_append(out, c->assistant, err)) return false;
    return c->think >= 0 ? tokens_append(out, c->think, err) && add_own(c, "\n", out, err)
                         : add_own(c, "<think>\n", out, err);
}

bool chat_end_reply(const Chat *c, size_t header, size_t answer, bool ended, TokenList *ids, Error *err) {
    if (ended) ids->n--;
    if (c->format != CHAT_DEEPSEEK)
        return tokens_append(ids, c->end, err) && (is_llama3(c) || add_own(c, "\n", ids, err));
    // Its text, in which special tokens are none but the end of the thoughts.
    Bytes text = {0};
    bool ok = true;
    for (size_t i = answer, n; ok && i < ids->n; i++) {
        const uint8_t *bytes = tokenizer_bytes(c->tokenizer, ids->ids[i], &n);
        bool kept = c->tokenizer->kind[ids->ids[i]] != TOKEN_SPECIAL ||
                    (n == sizeof THOUGHTS_END - 1 && memcmp(bytes, THOUGHTS_END, n) == 0);
        ok = !kept || bytes_append(&text, bytes, n, err);
    }
    ids->n = header;
    ok = ok && chat_message(c, "assistant", (const uint8_t *)text.data, text.n, ids, err);
    free(text.data);
    return ok;
}
