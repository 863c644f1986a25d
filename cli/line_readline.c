// Line editing and history by GNU readline or libedit (LINE_WIDE), through what both of them have.
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include READLINE_HEADER
#include HISTORY_HEADER

#include "../tokenizer/utf8.h"
#include "interrupt.h"
#include "line.h"

const char *const line_editor = LINE_EDITOR;

#define PASTE_BEGIN "\033[200~"
#define PASTE_END "\033[201~"

static Error *failure;         // of the line at hand
static bool ended;             // there is no more input
static bool ended_early;       // because of a signal or a failure
static const char *last_bytes; // what the library is to read before the end
enum { CTRL_D = 4, CTRL_V = 22, ESCAPE = 27, DELETE = 127 };

// Ctrl-Z: the shell gets the terminal as it was, and the line is shown again when the program goes on.
static void stop(void) {
    rl_deprep_terminal();
    interrupt_stop();
    rl_prep_terminal(1);
    rl_forced_update_display();
}

// A signal ends the line as a newline would: so the library puts the terminal back. Inside a paste a newline is text:
// the paste's end and another newline follow. Of a paste in which the input ends, readline 8.2 takes more than was
// stored: so the end of input comes after a paste's end, too, which is nothing outside of one.
static int next_byte(FILE *in) {
    (void)in;
    if (*last_bytes) return *last_bytes++;
    if (ended) return EOF;
    char byte;
    int found = line_byte(&byte, failure);
    while (found < 0 && interrupt_stop_wanted && !interrupted && !failure->text[0]) {
        stop();
        found = line_byte(&byte, failure);
    }
    if (found > 0 && byte == 0) return CTRL_D; // typed during the answer, before the terminal was the library's
    if (found > 0) return (unsigned char)byte;
    ended = true;
    ended_early = found < 0;
    last_bytes = ended_early ? "\n" PASTE_END "\n" : LINE_WIDE ? "" : PASTE_END;
    return *last_bytes ? *last_bytes++ : EOF;
}

// ---- libedit: it takes whole characters, and knows no pastes --------------------------------------------------------

static int ahead[16], n_ahead; // bytes that were read too early, the next one at the end
static bool pasting, quoted;   // quoted: what comes is no command

static int take(void) {
    return n_ahead ? ahead[--n_ahead] : next_byte(NULL);
}

// Reads on as long as it is the mark, of which the first byte has come. False: what was read comes again.
static bool take_mark(const char *mark) {
    int read[8], n = 0;
    for (const char *want = mark + 1; *want; want++)
        if ((read[n++] = take()) != *want) {
            while (n) ahead[n_ahead++] = read[--n];
            return false;
        }
    return true;
}

// The character that this byte begins; the byte itself where none does.
static int take_character(int first) {
    uint8_t bytes[4] = {(uint8_t)first};
    int n = 1;
    uint32_t cp;
    while (n < 4 && !utf8_decode(bytes, (size_t)n, &cp)) {
        int next = take();
        if (next < 0x80 || next > 0xBF) {
            ahead[n_ahead++] = next;
            break;
        }
        bytes[n++] = (uint8_t)next;
    }
    if (utf8_decode(bytes, (size_t)n, &cp) == n) return (int)cp;
    while (n > 1) ahead[n_ahead++] = bytes[--n];
    return first;
}

// A newline in a paste, as any control character there, is quoted: libedit then takes it for text.
static int next_character(FILE *in) {
    (void)in;
    int c = take();
    while (c == ESCAPE && !quoted && take_mark(pasting ? PASTE_END : PASTE_BEGIN)) {
        pasting = !pasting;
        c = take();
    }
    if (ended_early) pasting = quoted = false;
    if (pasting && !quoted && c >= 0 && (c < ' ' || c == DELETE)) {
        quoted = true;
        ahead[n_ahead++] = c == '\r' ? '\n' : c;
        return CTRL_V;
    }
    quoted = false;
    return c >= 0x80 && c <= 0xFF && MB_CUR_MAX > 1 ? take_character(c) : c;
}

// ---- both -----------------------------------------------------------------------------------------------------------

// Names of files are nothing to complete a message with.
static char **complete_nothing(const char *text, int start, int end) {
    (void)text, (void)start, (void)end;
    rl_attempted_completion_over = 1;
    return NULL;
}

// Once, after the user's own settings: bytes of characters are no commands, and a paste is one text.
static void set_up(void) {
    static const char *const settings[] = {"set input-meta on", "set output-meta on", "set convert-meta off",
                                           "set enable-bracketed-paste on"};
    static bool done;
    if (done) return;
    done = true;
    rl_initialize();
    if (LINE_WIDE) return;
    for (size_t i = 0; i < sizeof settings / sizeof *settings; i++) {
        char line[40]; // which the library may cut up
        snprintf(line, sizeof line, "%s", settings[i]);
        rl_parse_and_bind(line);
    }
}

LineResult line_edit(const char *prompt, Bytes *line, Error *err) {
    static bool has_locale, asked;
    if (!asked) has_locale = line_locale();
    asked = true;
    if (LINE_WIDE && !has_locale) return line_plain(prompt, line, err); // there are no wide characters
    failure = err;
    ended = ended_early = false;
    last_bytes = "";
    rl_outstream = stderr; // standard output is the answers'
    rl_catch_signals = 0;  // they are line_byte's
    rl_getc_function = LINE_WIDE ? next_character : next_byte;
    rl_attempted_completion_function = complete_nothing;
    set_up();
    rl_bind_key('\t', rl_insert);
    interrupt_catch_stop(true);
    if (LINE_WIDE) fputs("\033[?2004h", stderr);
    char *text = readline(prompt);
    if (LINE_WIDE) fputs("\033[?2004l", stderr);
    interrupt_catch_stop(false);
    if (ended_early) {
        free(text);
        return err->text[0] ? LINE_FAILED : LINE_INTERRUPTED;
    }
    if (!text) return LINE_END;
    size_t n = strlen(text);
    if (n) add_history(text);
    bool ok = bytes_append(line, text, n + 1, err);
    line->n = n;
    free(text);
    return ok ? LINE_READ : LINE_FAILED;
}
