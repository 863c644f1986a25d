// LLaMA 3's split pattern as a scanner, one rule for each alternative of
//   (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+
// A character is a letter, a number, white space or none of these (other): unicode_tables.h.
#include "tokenizer.h"
#include "unicode_tables.h"
#include "utf8.h"

typedef struct {
    uint32_t cp;
    int length; // 0: the text has ended
    CharClass cls;
} Char;

static Char char_at(const uint8_t *text, size_t at, size_t n) {
    Char c = {0, 0, CLASS_OTHER};
    if (at >= n) return c;
    c.length = utf8_decode(text + at, n - at, &c.cp);
    c.cls = unicode_class(c.cp);
    return c;
}

static bool is_newline(Char c) {
    return c.cp == '\r' || c.cp == '\n';
}

static uint8_t lower(uint8_t c) {
    return c >= 'A' && c <= 'Z' ? c | 0x20 : c;
}

// (?i:'s|'t|'re|'ve|'m|'ll|'d), after the apostrophe. U+017F, the long s, folds to s.
static size_t contraction(const uint8_t *s, size_t n) {
    if (n >= 2 && s[0] == 0xC5 && s[1] == 0xBF) return 1 + 2;
    uint8_t a = n >= 1 ? lower(s[0]) : 0, b = n >= 2 ? lower(s[1]) : 0;
    if (a == 's' || a == 't' || a == 'm' || a == 'd') return 1 + 1;
    if ((a == 'r' && b == 'e') || (a == 'v' && b == 'e') || (a == 'l' && b == 'l')) return 1 + 2;
    return 0;
}

// The end of a run of characters of one class that begins at at; at most limit of them.
static size_t run_end(const uint8_t *text, size_t at, size_t n, CharClass cls, int limit) {
    for (Char c; limit-- > 0 && (c = char_at(text, at, n)).length && c.cls == cls;) at += (size_t)c.length;
    return at;
}

size_t split_next(const uint8_t *text, size_t n) {
    enum { NO_LIMIT = 0x7FFFFFFF };
    Char c = char_at(text, 0, n);
    Char next = char_at(text, (size_t)c.length, n);

    if (c.cp == '\'') { // (?i:'s|'t|'re|'ve|'m|'ll|'d)
        size_t length = contraction(text + 1, n - 1);
        if (length) return length;
    }
    if (c.cls == CLASS_LETTER) // [^\r\n\p{L}\p{N}]?\p{L}+, without the first character
        return run_end(text, 0, n, CLASS_LETTER, NO_LIMIT);
    if (c.cls != CLASS_NUMBER && !is_newline(c) && next.length && next.cls == CLASS_LETTER) // and with it
        return run_end(text, (size_t)c.length, n, CLASS_LETTER, NO_LIMIT);
    if (c.cls == CLASS_NUMBER) // \p{N}{1,3}
        return run_end(text, 0, n, CLASS_NUMBER, 3);
    bool space_first = c.cp == ' ' && next.length && next.cls == CLASS_OTHER;
    if (c.cls == CLASS_OTHER || space_first) { //  ?[^\s\p{L}\p{N}]+[\r\n]*
        size_t at = run_end(text, space_first ? 1 : 0, n, CLASS_OTHER, NO_LIMIT);
        while (at < n && (text[at] == '\r' || text[at] == '\n')) at++;
        return at;
    }

    // White space, up to its end. \s*[\r\n]+ takes it to its last newline; \s+(?!\S) leaves its last character to what
    // follows; \s+ is a single one.
    size_t at = 0, last = 0, after_newline = 0;
    for (Char w; (w = char_at(text, at, n)).length && w.cls == CLASS_SPACE;) {
        last = at;
        at += (size_t)w.length;
        if (is_newline(w)) after_newline = at;
    }
    if (after_newline) return after_newline;
    return at == n || last == 0 ? at : last;
}
