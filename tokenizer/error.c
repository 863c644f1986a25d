#include "error.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

bool fail(Error *err, const char *format, ...) {
    if (err->text[0]) return false;
    va_list args;
    va_start(args, format);
    vsnprintf(err->text, sizeof err->text, format, args);
    va_end(args);
    // Names out of a bad file may hold anything: the message stays one printable line.
    for (char *c = err->text; *c; c++)
        if ((unsigned char)*c < 0x20 || *c == 0x7F) *c = '?';
    return false;
}

static const char interrupt[] = "interrupted";

bool fail_interrupted(Error *err) {
    return fail(err, interrupt);
}

bool is_interrupt(const Error *err) {
    return strcmp(err->text, interrupt) == 0;
}

bool is_out_of_memory(const Error *err) {
    return strncmp(err->text, "out of memory", strlen("out of memory")) == 0;
}
