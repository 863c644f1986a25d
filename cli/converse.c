#include "converse.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "input.h"
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
    Speculation *speculation; // NULL: none
    bool terminal;            // a person types, rather than a pipe
    TokenList ids;            // of the whole conversation
    TokenList cached;         // of these as many as kv.len are in the cache
    size_t asked;             // ids up to the last question, before the header of its answer; 0: nothing has been asked
    int turn;
} Conversation;

static bool begin(Conversation *c, Error *err) {
    const char *system = c->options->system;
    c->ids.n = c->cached.n = c->asked = 0;
    kv_reset(&c->model->kv, 0);
    return chat_begin(c->chat, (const uint8_t *)system, system ? strlen(system) : 0, c->options->date, &c->ids, err);
}

// One answer on its way out.
typedef struct {
    int context, limit; // tokens of the conversation and of the answer, at most
    bool room_reported; // how much room there is
} Answer;

static void report_room(Answer *a, int room) {
    a->room_reported = true;
    print_message("the context of %d tokens has room for %d more; /clear begins anew", a->context, room);
}

static bool print_text(void *context, Sequence *seq, const char *data, size_t n, Error *err) {
    Answer *a = context;
    text_write(data, n);
    if (!flush_output(err)) return false;
    int room = a->context - (int)(seq->prompt.n + seq->ids.n), left = a->limit - (int)seq->ids.n;
    if (!a->room_reported && room > 0 && room <= LAST_ROOM && room < left) report_room(a, room);
    return true;
}

static bool print_newline(void *context, Sequence *seq, Error *err) {
    (void)context, (void)seq;
    text_end();
    text_end_line();
    return flush_output(err);
}

// Says what the context has room for where that may be less than the answer takes: before it, and not after.
static void announce_room(const Conversation *c, Answer *a) {
    int context = kv_longest(&c->model->kv), room = context - (int)c->ids.n, limit = c->options->n;
    *a = (Answer){.context = context, .limit = limit};
    if (room < limit && (room < LOW_ROOM || limit < NO_LIMIT)) report_room(a, room);
}

// Positions of the cache that are right for the conversation as it is: all but its last token, at most.
static int count_cached(const Conversation *c) {
    size_t n = 0, most = (size_t)c->model->kv.len[0];
    while (n < most && n + 1 < c->ids.n && c->cached.ids[n] == c->ids.ids[n]) n++;
    return (int)n;
}

static bool append_ids(TokenList *to, const TokenList *from, Error *err) {
    if (!tokens_reserve(to, from->n, err)) return false;
    if (from->n) memcpy(to->ids + to->n, from->ids, from->n * sizeof *from->ids);
    to->n += from->n;
    return true;
}

static void report_turn(const Conversation *c, const Sequence *seq) {
    double seconds = seq->last - seq->first;
    begin_message();
    fprintf(stderr, "llama: turn %d: %d tokens from the cache, %zu prefilled, %zu new", c->turn, seq->n_cached,
            seq->prompt.n - (size_t)seq->n_cached, seq->ids.n);
    if (seq->ids.n > 1 && seconds > 0) fprintf(stderr, " (%.1f tokens/s)", (double)(seq->ids.n - 1) / seconds);
    fprintf(stderr, "; context %zu of %d\n", c->ids.n, kv_longest(&c->model->kv));
}

// Whether the answer's last id ended it: an end id, or the token that --stop names.
static bool ended_by_token(const Conversation *c, const Sequence *seq) {
    if (!seq->finish_reason || !seq->ids.n) return false;
    return strcmp(seq->finish_reason, "stop") == 0 ||
           (strcmp(seq->finish_reason, "stop_string") == 0 &&
            c->model->tokenizer.kind[seq->ids.ids[seq->ids.n - 1]] == TOKEN_SPECIAL);
}

// The answer to what ids ends with, after them. ids ends with its header, which is after the question.
static bool answer(Conversation *c, Error *err) {
    const Options *o = c->options;
    Answer out;
    GenerateSink sink = {.text = print_text, .finished = print_newline, .context = &out};
    if (c->turn == 0 && !o->quiet) print_chat_note(c->model);
    Sequence seq = {.config = generate_config(o, c->chat), .n_cached = count_cached(c)};
    seq.config.stream = (uint64_t)c->turn++;
    seq.config.speculation = c->speculation;
    size_t start = c->ids.n;
    kv_truncate(&c->model->kv, 0, seq.n_cached);
    announce_room(c, &out);
    bool ok = append_ids(&seq.prompt, &c->ids, err) && generate(c->model, &seq, 1, &sink, err);
    c->cached.n = 0;
    ok = ok && append_ids(&c->ids, &seq.ids, err) && append_ids(&c->cached, &c->ids, err) &&
         chat_end_reply(c->chat, c->asked, start, ended_by_token(c, &seq), &c->ids, err);
    if (ok) print_length_note(o, &seq, &c->model->kv, "/clear begins anew");
    if (ok && o->verbose) report_turn(c, &seq);
    if (ok && o->verbose && c->speculation) print_speculation_counts(c->speculation, &seq.counts);
    sequence_free(&seq);
    return ok;
}

// One message of the user, unless the context has no room for it and an answer.
static bool turn(Conversation *c, const Bytes *message, Error *err) {
    size_t before = c->ids.n, question = before, context = (size_t)kv_longest(&c->model->kv);
    // A token is a byte at least: a text far too long is refused by its length.
    size_t longest = c->model->tokenizer.max_token_bytes, least = message->n / longest;
    hint_special(c->options, c->chat->tokenizer, message, true);
    if (least < context) {
        if (!chat_message(c->chat, "user", (const uint8_t *)message->data, message->n, &c->ids, err)) return false;
        question = c->ids.n;
        if (!chat_reply_header(c->chat, &c->ids, err)) return false;
    }
    if (least < context && c->ids.n < context) {
        c->asked = question;
        return answer(c, err);
    }
    size_t needed = least < context ? c->ids.n : before + least;
    c->ids.n = before;
    const char *format =
        "the conversation would have %s%zu tokens, the context holds %zu and needs room for an answer; "
        "the message was not sent (/clear begins anew, %s sets the context)";
    const char *at_least = least < context ? "" : "at least ";
    Error why = {""};
    fail(&why, format, at_least, needed, context, context_flag(&c->model->kv));
    if (!c->terminal) return fail(err, "%s", why.text);
    print_message("%s", why.text);
    return true;
}

// ---- commands -------------------------------------------------------------------------------------------------------

typedef enum { COMMAND_NONE, COMMAND_CLEAR, COMMAND_HELP, COMMAND_REGEN, COMMAND_QUIT } Command;

// Whether the line is this text and nothing else but blanks after it.
static bool is_alone(const Bytes *line, const char *text) {
    size_t n = line->n;
    while (n && strchr(" \t\r", line->data[n - 1])) n--;
    return n == strlen(text) && memcmp(line->data, text, n) == 0;
}

// What a line asks for. Through a pipe two commands count: all other lines are messages.
static Command command_of(const Conversation *c, const Bytes *line) {
    static const struct {
        const char *text;
        Command command;
        bool pipe;
    } commands[] = {{"/clear", COMMAND_CLEAR, true},
                    {"/help", COMMAND_HELP, true},
                    {"/regen", COMMAND_REGEN, false},
                    {"/quit", COMMAND_QUIT, false},
                    {"/exit", COMMAND_QUIT, false}};
    for (size_t i = 0; i < sizeof commands / sizeof *commands; i++)
        if ((c->terminal || commands[i].pipe) && is_alone(line, commands[i].text)) return commands[i].command;
    return COMMAND_NONE;
}

// The last answer once more, from the next random stream.
static bool regenerate(Conversation *c, Error *err) {
    if (!c->asked || c->options->sampler.temperature == 0) {
        print_message("%s", c->asked ? "at --temp 0 the answer would be the same" : "there is no answer yet");
        return true;
    }
    c->ids.n = c->asked;
    return chat_reply_header(c->chat, &c->ids, err) && answer(c, err);
}

static bool run_command(Conversation *c, Command command, Error *err) {
    if (command == COMMAND_REGEN) return regenerate(c, err);
    if (command == COMMAND_CLEAR) {
        if (!c->options->quiet) print_message("a new conversation");
        return begin(c, err);
    }
    fprintf(stderr,
            "/clear  begins a new conversation\n"
            "/regen  gives another answer to the last message\n"
            "/help   prints this\n"
            "/quit   ends, as /exit and Ctrl-D do\n"
            "\"\"\"     on a line of its own: before and after a message of several lines\n"
            "Ctrl-C  stops the answer and keeps the conversation\n"
            "Ctrl-D  ends\n"
            "Any other line is a message. The conversation has %zu tokens, the context holds %d. Lines are edited by "
            "%s.\n",
            c->ids.n, kv_longest(&c->model->kv), line_editor ? line_editor : "the terminal alone");
    return true;
}

// ---- the conversation -----------------------------------------------------------------------------------------------

// A prompt for line_read. Around what takes no room on the screen \001 and \002, as readline requires.
static const char *prompt_text(const char *mark) {
    static char text[64];
    bool colour = use_colour();
    const char *format = colour && line_editor ? "\001\033[1;32m\002%s\001\033[0m\002"
                         : colour              ? "\033[1;32m%s\033[0m"
                                               : "%s";
    snprintf(text, sizeof text, format, mark);
    return text;
}

// The lines of a block, up to the one that ends it, into the message.
static LineResult read_block(Bytes *line, Bytes *message, Error *err) {
    for (int n = 0;; n++) {
        LineResult result = line_read(prompt_text("| "), line, err);
        if (result == LINE_END) fputs("\nllama: the block has no \"\"\" at its end and was not sent", stderr);
        if (result != LINE_READ || is_alone(line, "\"\"\"")) return result;
        if ((n && !bytes_append(message, "\n", 1, err)) || !bytes_append(message, line->data, line->n, err))
            return LINE_FAILED;
    }
}

// A message or a command. line: memory for lines.
static LineResult read_message(const Conversation *c, Bytes *line, Bytes *message, Command *command, Error *err) {
    message->n = 0;
    *command = COMMAND_NONE;
    LineResult result = line_read(prompt_text("> "), line, err);
    if (result != LINE_READ) return result;
    if (c->terminal && is_alone(line, "\"\"\"")) return read_block(line, message, err);
    *command = command_of(c, line);
    return bytes_append(message, line->data, line->n, err) ? LINE_READ : LINE_FAILED;
}

static bool is_blank(const Bytes *message) {
    for (size_t i = 0; i < message->n; i++)
        if (!message->data[i] || !strchr(" \t\r\n", message->data[i])) return false;
    return true;
}

bool converse(const Options *o, Model *m, const Chat *chat, Speculation *speculation, Error *err) {
    Conversation c = {
        .options = o, .model = m, .chat = chat, .speculation = speculation, .terminal = isatty(STDIN_FILENO)};
    Bytes line = {0}, message = {0};
    Command command = COMMAND_NONE;
    bool ok = begin(&c, err);
    if (ok && (int)c.ids.n >= kv_longest(&m->kv))
        ok = fail(err, "the system message has %zu tokens, the context holds %d", c.ids.n, kv_longest(&m->kv));
    if (ok && c.terminal && !o->quiet) print_message("/help for help, Ctrl-D ends");
    while (ok && (!interrupted || interrupted == SIGINT)) {
        LineResult result = read_message(&c, &line, &message, &command, err);
        if (result == LINE_FAILED) ok = false;
        if (result == LINE_END || command == COMMAND_QUIT) break;
        if (command != COMMAND_NONE)
            ok = run_command(&c, command, err);
        else if (result == LINE_READ && !is_blank(&message))
            ok = turn(&c, &message, err);
        if (interrupted && (interrupted != SIGINT || !c.terminal)) break;
        if (result == LINE_INTERRUPTED) fputs("\n", stderr);
        interrupt_forget();
    }
    if (c.terminal && command != COMMAND_QUIT) fputs("\n", stderr);
    free(line.data);
    free(message.data);
    tokens_free(&c.ids);
    tokens_free(&c.cached);
    return ok;
}
