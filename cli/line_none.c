// No library that edits lines.
#include "line.h"

const char *const line_editor = NULL;

LineResult line_edit(const char *prompt, Bytes *line, Error *err) {
    return line_plain(prompt, line, err);
}
