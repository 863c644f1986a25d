#include "converse.h"

#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "interrupt.h"
#include "line.h"
#include "output.h"

// Tokens that the context has room for: fewer are reported before an answer that has no smaller limit (-n), and in the
// middle of one that has come so far.
enum { LOW_ROOM = 256, LAST_ROOM = 64 };

typedef struct {
    const Options *options;
    Model *model;
    const Chat *chat;
    bool terminal; // a person types, rather than a pipe
    TokenList ids; // of the whole conversation; the cache holds those before kv.len
    int turn;
} Conversation;

static bool begin(Conversation *c, Error *err) {
    const char *system = c->options->system;
    c->ids.n = 0;
    kv_reset(&c->model->kv, 0);
    return chat_begin(c->chat, (const uint8_t *)system, system ? strlen(system) : 0,
                      c->options->date ? c->options->date : CHAT_DATE, &c->ids, err);
}

// One answer on its way out.
typedef struct {
    int context, limit; // tokens of the conversation and of the answer, at most
    bool room_reported; // how much room there is
} Answer;

static void report_room(Answer *a, int room, bool inside) {
    a->room_reported = true;
    fprintf(stderr, "%sllama: the context of %d tokens has room for %d more; /clear begins anew\n",
            inside && isatty(STDOUT_FILENO) && isatty(STDERR_FILENO) ? "\n" : "", a->context, room);
}

static bool print_text(void *context, Sequence *seq, const char *data, size_t n, Error *err) {
    Answer *a = context;
    fwrite(data, 1, n, stdout);
    if (!flush_output(err)) return false;
    int room = a->context - (int)(seq->prompt.n + seq->ids.n), left = a->limit - (int)seq->ids.n;
    if (!a->room_reported && room > 0 && room <= LAST_ROOM && room < left) report_room(a, room, true);
    return true;
}

static bool print_newline(void *context, Sequence *seq, Error *err) {
    (void)context, (void)seq;
    putchar('\n');
    return flush_output(err);
}

// Says what the context has room for where that may be less than the answer takes: before it, and not after.
static void announce_room(const Conversation *c, Answer *a) {
    int room = c->model->kv.max_len - (int)c->ids.n, limit = c->options->n;
    *a = (Answer){.context = c->model->kv.max_len, .limit = limit};
    if (room < limit && (room < LOW_ROOM || limit < INT_MAX)) report_room(a, room, false);
}

// The answer to what ids ends with, after them.
static bool answer(Conversation *c, Error *err) {
    const Options *o = c->options;
    GenerateConfig config = {.n = o->n,
                             .n_stops = o->n_stops,
                             .stops = o->stops,
                             .ignore_eos = o->ignore_eos,
                             .seed = o->seed,
                             .sampler = o->sampler};
    Answer out;
    GenerateSink sink = {.text = print_text, .finished = print_newline, .context = &out};
    Sequence seq = {.index = c->turn++, .n_cached = c->model->kv.len[0]};
    bool ok = true;
    for (size_t i = 0; ok && i < c->ids.n; i++) ok = tokens_append(&seq.prompt, c->ids.ids[i], err);
    announce_room(c, &out);
    ok = ok && generate(c->model, &config, &seq, 1, &sink, err);
    for (size_t i = 0; ok && i < seq.ids.n; i++) ok = tokens_append(&c->ids, seq.ids.ids[i], err);
    bool closed = seq.ids.n && seq.ids.ids[seq.ids.n - 1] == c->chat->eot;
    if (ok && !closed) ok = tokens_append(&c->ids, c->chat->eot, err);
    if (ok && seq.finish_reason && strcmp(seq.finish_reason, "length") == 0) {
        bool full = (int)seq.ids.n < o->n;
        fprintf(stderr,
                full ? "llama: the context of %d tokens is full: the answer ends here; /clear begins anew\n"
                     : "llama: the answer ends after %d tokens (-n)\n",
                full ? c->model->kv.max_len : o->n);
    }
    if (ok && o->verbose)
        fprintf(stderr, "llama: turn %d: %d tokens from the cache, %zu prefilled, %zu new; context %zu of %d\n",
                c->turn, seq.n_cached, seq.prompt.n - (size_t)seq.n_cached, seq.ids.n, c->ids.n, c->model->kv.max_len);
    sequence_free(&seq);
    return ok;
}

// One message of the user, unless the context has no room for it and an answer.
static bool turn(Conversation *c, const Bytes *line, Error *err) {
    size_t before = c->ids.n, context = (size_t)c->model->kv.max_len;
    // A token is a byte at least: a text far too long is refused by its length.
    size_t longest = c->model->tokenizer.max_token_bytes, least = line->n / longest;
    if (least < context && (!chat_message(c->chat, "user", (const uint8_t *)line->data, line->n, &c->ids, err) ||
                            !chat_reply_header(c->chat, &c->ids, err)))
        return false;
    if (least < context && c->ids.n < context) return answer(c, err);
    size_t needed = least < context ? c->ids.n : before + least;
    c->ids.n = before;
    const char *format =
        "the conversation would have %s%zu tokens, the context holds %zu and needs room for an answer; "
        "the message was not sent (/clear begins anew, -c sets the context)";
    const char *at_least = least < context ? "" : "at least ";
    Error why = {""};
    fail(&why, format, at_least, needed, context);
    if (!c->terminal) return fail(err, "%s", why.text);
    fprintf(stderr, "llama: %s\n", why.text);
    return true;
}

enum { COMMAND_NONE, COMMAND_CLEAR, COMMAND_HELP, COMMAND_UNKNOWN };

// What a line asks for. Through a pipe what only looks like a command is a message: nobody is there to mend it.
static int command_of(const Conversation *c, const char *line) {
    size_t n = strlen(line);
    while (n && strchr(" \t", line[n - 1])) n--;
    if (n == 6 && memcmp(line, "/clear", 6) == 0) return COMMAND_CLEAR;
    if (n == 5 && memcmp(line, "/help", 5) == 0) return COMMAND_HELP;
    return line[0] == '/' && c->terminal ? COMMAND_UNKNOWN : COMMAND_NONE;
}

static bool command(Conversation *c, int which, const char *line, Error *err) {
    if (which == COMMAND_CLEAR) {
        if (!c->options->quiet) fprintf(stderr, "llama: a new conversation\n");
        return begin(c, err);
    }
    if (which == COMMAND_HELP)
        fprintf(
            stderr,
            "/clear  begins a new conversation\n/help   prints this\nCtrl-C  stops the answer and keeps the "
            "conversation\nCtrl-D  ends\nThe conversation has %zu tokens, the context holds %d. Lines are edited by "
            "%s.\n",
            c->ids.n, c->model->kv.max_len, line_editor ? line_editor : "the terminal alone");
    else
        fprintf(stderr, "llama: %s: no such command; /help lists them\n", line);
    return true;
}

bool converse(const Options *o, Model *m, const Chat *chat, Error *err) {
    Conversation c = {.options = o, .model = m, .chat = chat, .terminal = isatty(STDIN_FILENO)};
    Bytes line = {0};
    // Around what takes no room on the screen \001 and \002, as readline wants it.
    bool colour = use_colour();
    const char *prompt = colour && line_editor ? "\001\033[1;32m\002> \001\033[0m\002"
                         : colour              ? "\033[1;32m> \033[0m"
                                               : "> ";
    bool ok = begin(&c, err);
    if (ok && (int)c.ids.n >= m->kv.max_len)
        ok = fail(err, "the system message has %zu tokens, the context holds %d", c.ids.n, m->kv.max_len);
    if (ok && c.terminal && !o->quiet) fprintf(stderr, "llama: /help for help, Ctrl-D ends\n");
    while (ok && (!interrupted || interrupted == SIGINT)) {
        LineResult result = line_read(prompt, &line, err);
        if (result == LINE_FAILED) ok = false;
        if (result == LINE_END) break;
        int which = result == LINE_READ ? command_of(&c, line.data) : COMMAND_NONE;
        if (which != COMMAND_NONE)
            ok = command(&c, which, line.data, err);
        else if (result == LINE_READ && strspn(line.data, " \t\r") < line.n)
            ok = turn(&c, &line, err);
        if (interrupted && (interrupted != SIGINT || !c.terminal)) break;
        if (result == LINE_INTERRUPTED) fputs("\n", stderr);
        interrupt_forget();
    }
    if (c.terminal) fputs("\n", stderr);
    free(line.data);
    tokens_free(&c.ids);
    return ok;
}
