// No line editing but the terminal's own.
#include "line.h"

const char *const line_editor = NULL;

LineResult line_edit(const char *prompt, Bytes *line, Error *err) {
    (void)prompt, (void)line, (void)err;
    return LINE_END;
}
