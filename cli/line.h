// Lines that a user types, or that a pipe gives. On a terminal a library edits them (line_readline.c) or, where the
// build found none, line_plain.c (by way of line_none.c): the Makefile picks one.
#ifndef LINE_H
#define LINE_H

#include "../model/generate/generate.h"

typedef enum { LINE_READ, LINE_END, LINE_INTERRUPTED, LINE_FAILED } LineResult;

// One line without its newline, any bytes, with a NUL after it; a text that is pasted into a terminal is one line, with
// newlines in it. prompt: shown on a terminal. A signal ends it at once, whenever it comes, with LINE_INTERRUPTED.
LineResult line_read(const char *prompt, Bytes *line, Error *err);

// Waits for standard input, letting signals through meanwhile. 1: there is a byte, 0: the end, -1: a signal
// (interrupted or interrupt_stop_wanted) or, with err, a failure.
int line_byte(char *byte, Error *err);

// Makes characters UTF-8 where the environment names no locale, C's, or one that is not installed, for an editor to
// know where they end and how wide they are. False: this system has no such locale.
bool line_locale(void);

// ---- editors --------------------------------------------------------------------------------------------------------

// The library that edits lines on a terminal, human-readable; NULL: none.
extern const char *const line_editor;
LineResult line_edit(const char *prompt, Bytes *line, Error *err);
// The one that needs no library. The prompt and what is typed are shown on the terminal, wherever standard error goes.
LineResult line_plain(const char *prompt, Bytes *line, Error *err);

#endif
