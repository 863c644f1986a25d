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

// A signal ends the line as a newline would: so the library puts the terminal back.
static int next_byte(FILE *in) {
    (void)in;
    char byte;
    int found = ended_early ? -1 : line_byte(&byte, failure);
    while (found < 0 && interrupt_stop_wanted && !interrupted && !failure->text[0]) {
        stop();
        found = line_byte(&byte, failure);
    }
    ended_early = found < 0;
    if (found > 0 && byte == 0) return CTRL_D; // typed during the answer, before the terminal was the library's
    return found > 0 ? (unsigned char)byte : found == 0 ? EOF : '\n';
}

LineResult line_edit(const char *prompt, Bytes *line, Error *err) {
    failure = err;
    ended_early = false;
    rl_outstream = stderr; // standard output is the answers'
    rl_catch_signals = 0;  // they are line_byte's
    rl_getc_function = next_byte;
    rl_bind_key('\t', rl_insert); // names of files are nothing to complete a message with
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
