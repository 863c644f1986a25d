#include "line.h"

#include <errno.h>
#include <fcntl.h>
#include <locale.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "interrupt.h"

// Standard input, for reads that do not wait: a terminal drops what is typed when a signal's key is, and so after poll
// there may be nothing to read. Opened anew, since the flag of the other would be the shell's as well.
static int open_input(void) {
    int terminal = isatty(STDIN_FILENO) ? open("/dev/stdin", O_RDONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC) : -1;
    return terminal >= 0 ? terminal : STDIN_FILENO;
}

int line_byte(char *byte, Error *err) {
    static char block[4096];
    static size_t at, n;
    static int input = -1;
    if (input < 0) input = open_input();
    while (at == n) {
        struct pollfd in[] = {{.fd = input, .events = POLLIN}, {.fd = interrupt_pipe, .events = POLLIN}};
        int ready = poll(in, 2, -1);
        char drained[16];
        while (in[1].revents & POLLIN && read(interrupt_pipe, drained, sizeof drained) > 0) {
        }
        if (interrupted || interrupt_stop_wanted) return -1;
        if (ready < 0 && errno == EINTR) continue; // a window's new size, say
        if (ready < 0) return fail(err, "standard input: %s", strerror(errno)), -1;
        if (!in[0].revents) continue;
        ssize_t got = read(input, block, sizeof block);
        if (got < 0 && (errno == EINTR || errno == EAGAIN)) continue;
        if (got < 0) return fail(err, "standard input: %s", strerror(errno)), -1;
        if (got == 0) return 0;
        at = 0;
        n = (size_t)got;
    }
    *byte = block[at++];
    return 1;
}

bool line_locale(void) {
    static const char *const utf8[] = {"C.UTF-8", "C.utf8", "en_US.UTF-8", "en_US.utf8"};
    const char *name = setlocale(LC_CTYPE, "");
    if (name && strcmp(name, "C") != 0 && strcmp(name, "POSIX") != 0) return true;
    for (size_t i = 0; i < sizeof utf8 / sizeof *utf8; i++)
        if (setlocale(LC_CTYPE, utf8[i])) // a library asks the environment itself
            return setenv("LC_ALL", utf8[i], 1) == 0;
    return false;
}

LineResult line_read(const char *prompt, Bytes *line, Error *err) {
    line->n = 0;
    if (isatty(STDIN_FILENO)) return (isatty(STDERR_FILENO) ? line_edit : line_plain)(prompt, line, err);
    char byte = 0;
    int found;
    while ((found = line_byte(&byte, err)) > 0 && byte != '\n')
        if (!bytes_append(line, &byte, 1, err)) return LINE_FAILED;
    if (found < 0) return err->text[0] ? LINE_FAILED : LINE_INTERRUPTED;
    if (found == 0 && line->n == 0) return LINE_END;
    if (line->n && line->data[line->n - 1] == '\r') line->n--;
    if (!bytes_append(line, "", 1, err)) return LINE_FAILED;
    line->n--;
    return LINE_READ;
}
