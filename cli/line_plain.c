// A line editor without a library: what is typed goes to the end, and is taken away from there. The terminal's own
// lines would end at 4095 bytes and say nothing, so it gives bytes as they come.
#define _GNU_SOURCE // wcwidth
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <termios.h>
#include <unistd.h>
#include <wchar.h>

#include "../tokenizer/utf8.h"
#include "interrupt.h"
#include "line.h"

#define PASTE_ON "\033[?2004h"
#define PASTE_OFF "\033[?2004l"
#define PASTE_END "\033[201~"
enum { ESCAPE = 0x1B, DELETE = 0x7F };

typedef struct {
    const char *prompt;
    Bytes *line;
    int screen; // where it is shown; -1: nowhere
    struct termios before;
    bool marks_pastes;                    // the terminal is asked to
    bool pasting;                         // what comes is a paste, to its end
    size_t paste;                         // where in the line it begins
    enum { NO_KEY, KEY, KEY_NUMBER } key; // inside the bytes of a key such as an arrow
    char number[8];                       // its parameters
    size_t n_number;
} Editor;

// ---- the screen -----------------------------------------------------------------------------------------------------

static void show(const Editor *e, const char *text, size_t n) {
    while (n > 0 && e->screen >= 0) {
        ssize_t written = write(e->screen, text, n);
        if (written < 0 && errno != EINTR) return;
        if (written > 0) text += written, n -= (size_t)written;
    }
}

static bool is_control(char byte) {
    return (unsigned char)byte < ' ' || byte == DELETE;
}

// Text of the line: control characters as ^X, but for the ends of lines and tabs.
static void show_text(const Editor *e, const char *text, size_t n) {
    size_t start = 0;
    for (size_t i = 0; i < n; i++) {
        if (!is_control(text[i]) || text[i] == '\n' || text[i] == '\t') continue;
        char caret[2] = {'^', (char)(text[i] ^ 0x40)};
        show(e, text + start, i - start);
        show(e, caret, 2);
        start = i + 1;
    }
    show(e, text + start, n - start);
}

// The prompt and the line anew, on a line of their own.
static void show_again(const Editor *e, const char *before) {
    show(e, before, strlen(before));
    show(e, e->prompt, strlen(e->prompt));
    show_text(e, e->line->data, e->line->n);
}

// ---- the terminal ---------------------------------------------------------------------------------------------------

static bool take_terminal(Editor *e, Error *err) {
    if (tcgetattr(STDIN_FILENO, &e->before) != 0) return fail(err, "the terminal: %s", strerror(errno));
    struct termios bytes = e->before; // signals stay the terminal's
    bytes.c_lflag &= ~(tcflag_t)(ICANON | ECHO | IEXTEN);
    bytes.c_iflag |= ICRNL;
    bytes.c_cc[VMIN] = 1;
    bytes.c_cc[VTIME] = 0;
    while (tcsetattr(STDIN_FILENO, TCSADRAIN, &bytes) != 0)
        if (errno != EINTR) return fail(err, "the terminal: %s", strerror(errno));
    if (e->marks_pastes) show(e, PASTE_ON, strlen(PASTE_ON));
    return true;
}

static void give_terminal_back(const Editor *e) {
    if (e->marks_pastes) show(e, PASTE_OFF, strlen(PASTE_OFF));
    while (tcsetattr(STDIN_FILENO, TCSADRAIN, &e->before) != 0 && errno == EINTR) {
    }
}

// Ctrl-Z: the shell gets the terminal as it was, and the line is shown again when the program goes on.
static bool stop(Editor *e, Error *err) {
    give_terminal_back(e);
    interrupt_stop();
    if (!take_terminal(e, err)) return false;
    show_again(e, "");
    return true;
}

// ---- keys -----------------------------------------------------------------------------------------------------------

static bool add(Editor *e, char byte, Error *err) {
    show_text(e, &byte, 1);
    return bytes_append(e->line, &byte, 1, err);
}

// Takes the last character away.
static void erase(Editor *e) {
    Bytes *line = e->line;
    if (line->n == 0) return;
    size_t n = 1;
    while (n < 4 && n < line->n && ((uint8_t)line->data[line->n - n] & 0xC0) == 0x80) n++;
    uint32_t cp;
    if (utf8_decode((uint8_t *)line->data + line->n - n, n, &cp) != (int)n) n = 1, cp = '?';
    line->n -= n;
    if (cp == '\n' || cp == '\t') {
        show_again(e, "\n");
        return;
    }
    int width = cp < ' ' || cp == DELETE ? 2 : wcwidth((wchar_t)cp);
    for (int i = 0; i < (width < 0 ? 1 : width); i++) show(e, "\b \b", 3);
}

static void erase_word(Editor *e) {
    const Bytes *line = e->line;
    while (line->n && strchr(" \t\n", line->data[line->n - 1])) erase(e);
    while (line->n && !strchr(" \t\n", line->data[line->n - 1])) erase(e);
}

// A byte of a paste: shown as a whole, when its end has come.
static bool paste(Editor *e, char byte, Error *err) {
    const size_t n = strlen(PASTE_END);
    Bytes *line = e->line;
    if (!bytes_append(line, &byte, 1, err)) return false;
    if (line->n - e->paste < n || memcmp(line->data + line->n - n, PASTE_END, n) != 0) return true;
    line->n -= n;
    e->pasting = false;
    show_text(e, line->data + e->paste, line->n - e->paste);
    return true;
}

// A byte of a key that sends several: of those only the beginning of a paste means something.
static void key_byte(Editor *e, char byte) {
    if (e->key == KEY && (byte == '[' || byte == 'O')) {
        e->key = KEY_NUMBER;
        e->n_number = 0;
        return;
    }
    bool last = byte >= 0x40 || is_control(byte) || e->key == KEY;
    if (!last && e->n_number < sizeof e->number) e->number[e->n_number++] = byte;
    if (!last) return;
    e->key = NO_KEY;
    e->pasting = byte == '~' && e->n_number == 3 && memcmp(e->number, "200", 3) == 0;
    e->paste = e->line->n;
}

// One byte. LINE_INTERRUPTED: the line goes on.
static LineResult take(Editor *e, char byte, Error *err) {
    const cc_t *keys = e->before.c_cc;
    cc_t key = (cc_t)byte;
    if (e->pasting) return paste(e, byte, err) ? LINE_INTERRUPTED : LINE_FAILED;
    if (e->key != NO_KEY)
        key_byte(e, byte);
    else if (byte == ESCAPE)
        e->key = KEY;
    else if (byte == '\n')
        return LINE_READ;
    else if ((!key || key == keys[VEOF]) && e->line->n == 0) // a 0: Ctrl-D during the answer
        return LINE_END;
    else if (byte == '\b' || byte == DELETE || (key && key == keys[VERASE]))
        erase(e);
    else if (key && key == keys[VWERASE])
        erase_word(e);
    else if (key && key == keys[VKILL]) {
        e->line->n = 0;
        show_again(e, "\n");
    } else if ((!is_control(byte) || byte == '\t') && !add(e, byte, err))
        return LINE_FAILED;
    return LINE_INTERRUPTED;
}

static LineResult take_all(Editor *e, Error *err) {
    for (;;) {
        char byte;
        int found = line_byte(&byte, err);
        if (found < 0 && interrupt_stop_wanted && !interrupted && !err->text[0]) {
            if (!stop(e, err)) return LINE_FAILED;
            continue;
        }
        if (found < 0) return err->text[0] ? LINE_FAILED : LINE_INTERRUPTED;
        if (found == 0) return e->line->n ? LINE_READ : LINE_END;
        LineResult result = take(e, byte, err);
        if (result != LINE_INTERRUPTED) return result;
    }
}

LineResult line_plain(const char *prompt, Bytes *line, Error *err) {
    static int terminal = -1; // the screen, where standard error is a file
    bool shown = isatty(STDERR_FILENO);
    if (!shown && terminal < 0) terminal = open("/dev/tty", O_WRONLY | O_CLOEXEC);
    const char *term = getenv("TERM");
    line_locale();
    Editor e = {.prompt = prompt,
                .line = line,
                .screen = shown ? STDERR_FILENO : terminal,
                .marks_pastes = term && *term && strcmp(term, "dumb") != 0};
    show(&e, prompt, strlen(prompt));
    if (!take_terminal(&e, err)) return LINE_FAILED;
    interrupt_catch_stop(true);
    LineResult result = take_all(&e, err);
    interrupt_catch_stop(false);
    if (result == LINE_READ) show(&e, "\n", 1);
    give_terminal_back(&e);
    if (result != LINE_READ) return result;
    if (!bytes_append(line, "", 1, err)) return LINE_FAILED;
    line->n--;
    return LINE_READ;
}
