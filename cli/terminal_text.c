#include "terminal_text.h"

#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "../tokenizer/utf8.h"

static const char replacement[] = "\xEF\xBF\xBD"; // U+FFFD

static struct {
    uint8_t held[4]; // of a terminal's text: the beginning of a character
    size_t n_held;
    bool line_open;
} text; // on standard output

static bool is_shown(uint32_t cp) {
    return cp == '\n' || cp == '\t' || !utf8_is_control(cp);
}

// What a terminal gets of these bytes.
static void write_shown(FILE *out, const uint8_t *s, size_t n) {
    size_t from = 0; // of what is written as it is
    for (size_t at = 0; at < n;) {
        uint32_t cp;
        size_t length = (size_t)utf8_decode(s + at, n - at, &cp);
        if (length && is_shown(cp)) {
            at += length;
            continue;
        }
        if (at > from) fwrite(s + from, 1, at - from, out);
        fputs(replacement, out);
        from = at += length ? length : utf8_invalid_part(s + at, n - at);
    }
    if (n > from) fwrite(s + from, 1, n - from, out);
}

void text_write_whole(FILE *out, const char *data, size_t n) {
    if (isatty(fileno(out)))
        write_shown(out, (const uint8_t *)data, n);
    else if (n)
        fwrite(data, 1, n, out);
}

void text_write(const char *data, size_t n) {
    if (!n) return;
    text.line_open = data[n - 1] != '\n';
    if (!isatty(STDOUT_FILENO)) {
        fwrite(data, 1, n, stdout);
        return;
    }
    const uint8_t *s = (const uint8_t *)data;
    for (; text.n_held && n; s++, n--) { // a byte at a time, until the character is whole or cannot become so
        text.held[text.n_held++] = *s;
        size_t kept = utf8_incomplete_tail(text.held, text.n_held), out = text.n_held - kept;
        if (out) write_shown(stdout, text.held, out);
        memmove(text.held, text.held + out, kept);
        text.n_held = kept;
    }
    size_t kept = n ? utf8_incomplete_tail(s, n) : 0;
    if (n > kept) write_shown(stdout, s, n - kept);
    for (size_t i = n - kept; i < n; i++) text.held[text.n_held++] = s[i];
}

void text_end(void) {
    write_shown(stdout, text.held, text.n_held);
    text.n_held = 0;
}

bool text_line_open(void) {
    return text.line_open;
}

void text_end_line(void) {
    putchar('\n');
    text.line_open = false;
}

bool text_line_shared(void) {
    struct stat out, err;
    return text.line_open && fstat(STDOUT_FILENO, &out) == 0 && fstat(STDERR_FILENO, &err) == 0 &&
           out.st_dev == err.st_dev && out.st_ino == err.st_ino;
}

void text_break_line(void) {
    if (!text_line_shared()) return;
    fputc('\n', stderr);
    text.line_open = false;
}
