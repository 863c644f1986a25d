// Lines that a user types, or that a pipe gives. line_readline.c or line_plain.c edits them: the Makefile picks one.
#ifndef LINE_H
#define LINE_H

#include "../model/generate/generate.h"

typedef enum { LINE_READ, LINE_END, LINE_INTERRUPTED, LINE_FAILED } LineResult;

// One line without its newline, any bytes, with a NUL after it. prompt: shown on a terminal, on standard error. A signal
// ends it at once, whenever it comes, with LINE_INTERRUPTED.
LineResult line_read(const char *prompt, Bytes *line, Error *err);

// Waits for standard input, letting signals through meanwhile. 1: there is a byte, 0: the end, -1: a signal
// (interrupted or interrupt_stop_wanted) or, with err, a failure.
int line_byte(char *byte, Error *err);

// ---- what line_readline.c and line_plain.c have ---------------------------------------------------------------------

// The library that edits lines on a terminal, human-readable; NULL: none, and line_edit is not called.
extern const char *const line_editor;
LineResult line_edit(const char *prompt, Bytes *line, Error *err);

#endif
