// Line editing and history by GNU readline or libedit, through what both of them have.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include READLINE_HEADER
#include HISTORY_HEADER

#include "line.h"

const char *const line_editor = LINE_EDITOR;

static Error *failure; // of the line at hand
static bool ended_early, at_end;

// A signal ends the line as a newline would: so the library puts the terminal back.
static int next_byte(FILE *in) {
    (void)in;
    char byte;
    int found = ended_early ? -1 : line_byte(&byte, failure);
    at_end = found == 0;
    ended_early = found < 0;
    return found > 0 ? (unsigned char)byte : found == 0 ? EOF : '\n';
}

LineResult line_edit(const char *prompt, Bytes *line, Error *err) {
    failure = err;
    ended_early = at_end = false;
    rl_outstream = stderr; // standard output is the answers'
    rl_catch_signals = 0;  // they are line_byte's
    rl_getc_function = next_byte;
    char *text = readline(prompt);
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
