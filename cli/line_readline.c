// Line editing and history by GNU readline or libedit, through what both of them have.
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include READLINE_HEADER
#include HISTORY_HEADER

#include "interrupt.h"
#include "line.h"

const char *const line_editor = LINE_EDITOR;

static Error *failure; // of the line at hand
static bool ended_early;
enum { CTRL_D = 4 };

// Ctrl-Z: the shell gets the terminal as it was, and the line is shown again when the program goes on.
static void stop(void) {
    rl_deprep_terminal();
    interrupt_stop();
    rl_prep_terminal(1);
    rl_forced_update_display();
}

// A signal ends the line as a newline would: so the library puts the terminal back. Inside a paste, say, a newline does
// not end it: then the end of input does.
static int next_byte(FILE *in) {
    (void)in;
    if (ended_early) return EOF;
    char byte;
    int found = line_byte(&byte, failure);
    while (found < 0 && interrupt_stop_wanted && !interrupted && !failure->text[0]) {
        stop();
        found = line_byte(&byte, failure);
    }
    ended_early = found < 0;
    if (found > 0 && byte == 0) return CTRL_D; // typed during the answer, before the terminal was the library's
    return found > 0 ? (unsigned char)byte : found == 0 ? EOF : '\n';
}

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
    line_locale();
    rl_initialize();
    for (size_t i = 0; i < sizeof settings / sizeof *settings; i++) {
        char line[40]; // which the library may cut up
        snprintf(line, sizeof line, "%s", settings[i]);
        rl_parse_and_bind(line);
    }
}

LineResult line_edit(const char *prompt, Bytes *line, Error *err) {
    failure = err;
    ended_early = false;
    rl_outstream = stderr; // standard output is the answers'
    rl_catch_signals = 0;  // they are line_byte's
    rl_getc_function = next_byte;
    rl_attempted_completion_function = complete_nothing;
    set_up();
    rl_bind_key('\t', rl_insert);
    interrupt_catch_stop(true);
    char *text = readline(prompt);
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
