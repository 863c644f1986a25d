#include "error.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

// Names out of a bad file may hold anything: of a control character U+FFFD stays.
static void keep_one_line(Error *err) {
    static const char replacement[] = "\xEF\xBF\xBD";
    enum { LENGTH = sizeof replacement - 1 };
    size_t n = strlen(err->text);
    for (size_t i = 0; i < n; i++) {
        if ((unsigned char)err->text[i] >= 0x20 && err->text[i] != 0x7F) continue;
        size_t rest = n - i - 1, room = sizeof err->text - 1 - i;
        if (room < LENGTH) { // at the very end
            err->text[i] = 0;
            return;
        }
        if (rest > room - LENGTH) rest = room - LENGTH;
        memmove(err->text + i + LENGTH, err->text + i + 1, rest);
        memcpy(err->text + i, replacement, LENGTH);
        n = i + LENGTH + rest;
        err->text[n] = 0;
        i += LENGTH - 1;
    }
}

bool fail(Error *err, const char *format, ...) {
    if (err->text[0]) return false;
    va_list args;
    va_start(args, format);
    vsnprintf(err->text, sizeof err->text, format, args);
    va_end(args);
    keep_one_line(err);
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
