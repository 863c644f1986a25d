// Text of a model, a prompt or a file on its way to a user. Files and pipes get its bytes. On a terminal control
// characters other than newline and tab (C0, DEL and C1) and bytes that are no UTF-8 appear as U+FFFD: what a model
// answers, or a file is called, must not move the cursor, set a title or answer in a user's place.
#ifndef TERMINAL_TEXT_H
#define TERMINAL_TEXT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>

// The next n bytes of a text on standard output. A character whose bytes come in several calls stays whole.
void text_write(const char *data, size_t n);
// The text on standard output is at its end, also where that is inside a character.
void text_end(void);
// Whether that text, up to here, ends inside a line; and whether a line on standard error would go on in that line,
// because both streams are the same file.
bool text_line_open(void);
bool text_line_shared(void);
// Ends the line.
void text_end_line(void);
// Before a line on standard error: ends a line that is shared, by a newline on standard error. Standard output, which
// the caller has flushed, keeps exactly its text.
void text_break_line(void);

// A whole text, of a message say, to any stream.
void text_write_whole(FILE *out, const char *data, size_t n);

#endif
