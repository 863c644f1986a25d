// Runs the program in a pseudo-terminal, as a person at a keyboard would see it.
#ifndef TERMINAL_H
#define TERMINAL_H

#define _GNU_SOURCE // posix_openpt: to be included first

#include <poll.h>
#include <sys/ioctl.h>
#include <termios.h>

#include "program.h"

typedef struct {
    int keyboard; // the terminal's other end: what is typed, what is shown
    int screen;   // the terminal itself, to look at its settings
    pid_t child;
    char *shown; // all that came so far, with a NUL behind
    size_t n, capacity;
    size_t seen; // up to where terminal_expect has found what it waited for
    struct termios before;
} Terminal;

static unsigned short terminal_columns = 160; // of those that are started from here on

// Starts the program with all its streams on a terminal; out: a file for standard output instead, or NULL.
__attribute__((unused)) static Terminal terminal_start(const char *out, const char *const *args) {
    Terminal t = {.keyboard = posix_openpt(O_RDWR | O_NOCTTY)};
    if (t.keyboard < 0 || grantpt(t.keyboard) != 0 || unlockpt(t.keyboard) != 0) die("a pseudo-terminal");
    const char *name = ptsname(t.keyboard);
    struct winsize size = {.ws_row = 24, .ws_col = terminal_columns};
    t.screen = open(name, O_RDWR | O_NOCTTY);
    if (t.screen < 0 || tcgetattr(t.screen, &t.before) != 0 || ioctl(t.screen, TIOCSWINSZ, &size) != 0) die(name);
    fflush(NULL);
    t.child = fork();
    if (t.child < 0) die("fork");
    if (t.child == 0) {
        setsid();
        int terminal = open(name, O_RDWR);
        if (terminal < 0 || ioctl(terminal, TIOCSCTTY, 0) != 0) _exit(126);
        for (int fd = 0; fd < 3; fd++) dup2(terminal, fd);
        if (out) redirect(1, out, O_WRONLY | O_CREAT | O_TRUNC);
        exec_program(args);
    }
    return t;
}

static bool terminal_ended(const Terminal *t) {
    siginfo_t info = {.si_pid = 0};
    return waitid(P_PID, (id_t)t->child, &info, WEXITED | WNOHANG | WNOWAIT) == 0 && info.si_pid != 0;
}

// Reads more of what is shown, waiting a moment for it. False: the program has ended, and nothing is left.
static bool terminal_read(Terminal *t) {
    if (t->capacity - t->n < 4096) {
        t->capacity = 2 * t->capacity + 8192;
        t->shown = realloc(t->shown, t->capacity);
        if (!t->shown) die("out of memory");
    }
    // The terminal is open here, too, so its end does not tell that the program has ended.
    bool ended = terminal_ended(t);
    struct pollfd in = {.fd = t->keyboard, .events = POLLIN};
    bool more = poll(&in, 1, ended ? 0 : 100) > 0;
    ssize_t got = more ? read(t->keyboard, t->shown + t->n, t->capacity - t->n - 1) : 0;
    for (ssize_t i = 0; i < got; i++, t->n++) // a NUL would end the search
        if (!t->shown[t->n]) t->shown[t->n] = '?';
    t->shown[t->n] = 0;
    return more || !ended;
}

// Reads what is shown until `text` is, behind all that was expected before (NULL: to the program's end). False: the
// program ended without it.
static bool terminal_wait(Terminal *t, const char *text) {
    for (bool more = true; more;) {
        const char *found = text && t->shown ? strstr(t->shown + t->seen, text) : NULL;
        if (!found) more = terminal_read(t);
        if (!found) continue;
        t->seen = (size_t)(found - t->shown) + strlen(text);
        return true;
    }
    return false;
}

__attribute__((unused)) static void terminal_expect(Terminal *t, const char *text) {
    if (!terminal_wait(t, text))
        test_fail("\"%s\" was not shown; the end of what was: \"%s\"", shown(text, strlen(text)),
                  shown(t->shown + (t->n > 200 ? t->n - 200 : 0), t->n > 200 ? 200 : t->n));
}

__attribute__((unused)) static void terminal_type(Terminal *t, const char *text) {
    size_t n = strlen(text);
    if (write(t->keyboard, text, n) != (ssize_t)n) die("typing");
}

// Waits until the program has read all that was typed: for what is not shown, as in a paste. What a signal's key finds
// unread the terminal drops.
__attribute__((unused)) static void terminal_wait_taken(Terminal *t) {
    int waiting = 1;
    while (ioctl(t->screen, FIONREAD, &waiting) == 0 && waiting && terminal_read(t)) {
    }
    if (waiting) test_fail("%d bytes of what was typed are unread", waiting);
}

// Waits for the end: this status, and the terminal as it was.
__attribute__((unused)) static void terminal_end(Terminal *t, int status) {
    terminal_wait(t, NULL);
    int how;
    while (waitpid(t->child, &how, 0) < 0)
        if (errno != EINTR) die("waitpid");
    int ended = WIFEXITED(how) ? WEXITSTATUS(how) : -WTERMSIG(how);
    if (ended != status) test_fail("status %d, expected %d; shown: %s", ended, status, shown(t->shown, t->n));
    struct termios after;
    if (tcgetattr(t->screen, &after) != 0) die("tcgetattr");
    if (after.c_lflag != t->before.c_lflag || after.c_iflag != t->before.c_iflag || after.c_oflag != t->before.c_oflag)
        test_fail("the terminal is left changed: local %x, it was %x", after.c_lflag, t->before.c_lflag);
    if (strstr(t->shown, "Sanitizer") || strstr(t->shown, "runtime error:"))
        test_fail("a sanitizer: %s", shown(t->shown, t->n));
    close(t->keyboard);
    close(t->screen);
    free(t->shown);
}

#endif
