// LLaMA 3's split pattern as a scanner, one rule for each alternative of
//   (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+
// A character is a letter, a number, white space or none of these (other): unicode_tables.h.
#include "split.h"

#include <stdbool.h>
#include <string.h>

#include "unicode_tables.h"

// ---- characters and runs of them ------------------------------------------------------------------------------------

typedef struct {
    CharClass cls;
    uint32_t length;
} Char;

// The character at s, of text known to be valid.
static inline Char char_at(const uint8_t *s) {
    uint32_t b = s[0], cp = b;
    if (b < 0x80) return (Char){first_byte_class[b], 1};
    uint32_t length = 2u + (b >= 0xE0) + (b >= 0xF0);
    if (first_byte_class[b] != CLASS_MIXED) return (Char){first_byte_class[b], length};
    if (length == 2) cp = (b & 0x1F) << 6 | (s[1] & 0x3F);
    if (length == 3) cp = (b & 0x0F) << 12 | (uint32_t)(s[1] & 0x3F) << 6 | (s[2] & 0x3F);
    if (length == 4)
        cp = (b & 0x07) << 18 | (uint32_t)(s[1] & 0x3F) << 12 | (uint32_t)(s[2] & 0x3F) << 6 | (s[3] & 0x3F);
    return (Char){unicode_class(cp), length};
}

static inline bool is_newline(uint8_t byte) {
    return byte == '\r' || byte == '\n';
}

// The end of the run of characters of one class that begins at at.
static inline size_t run_end(const uint8_t *text, size_t at, size_t n, CharClass cls) {
    for (Char c; at < n && (c = char_at(text + at)).cls == cls;) at += c.length;
    return at;
}

// Eight bytes at once, the first in the low bits (x86, ARM): the high bit of each that is no ASCII letter.
static inline uint64_t no_letters(uint64_t bytes) {
    const uint64_t ones = 0x0101010101010101u, high = 0x80 * ones;
    uint64_t lower = (bytes | 0x20 * ones) & ~high; // seven bits each, so that no sum carries over
    uint64_t from_a = lower + (0x80 - 'a') * ones, past_z = lower + (0x80 - 'z' - 1) * ones;
    return (~from_a | past_z | bytes) & high;
}

// As run_end for letters: a word of ASCII takes one or two steps, with nothing to guess at each letter.
static inline size_t letters_end(const uint8_t *text, size_t at, size_t n) {
    while (n - at >= 8) {
        uint64_t bytes;
        memcpy(&bytes, text + at, sizeof bytes);
        uint64_t others = no_letters(bytes);
        if (others) {
            at += (size_t)__builtin_ctzll(others) / 8;
            if (text[at] < 0x80) return at;
            break;
        }
        at += 8;
    }
    return run_end(text, at, n, CLASS_LETTER);
}

// ---- the rules ------------------------------------------------------------------------------------------------------

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

// \p{N}{1,3}
static size_t numbers(const uint8_t *text, size_t n) {
    size_t at = 0;
    for (int i = 0; i < 3 && at < n; i++) {
        Char c = char_at(text + at);
        if (c.cls != CLASS_NUMBER) break;
        at += c.length;
    }
    return at;
}

// White space, up to its end. \s*[\r\n]+ takes it to its last newline; \s+(?!\S) leaves its last character to what
// follows; \s+ is a single one.
static size_t white_space(const uint8_t *text, size_t n) {
    size_t at = 0, last = 0, after_newline = 0;
    for (Char c; at < n && (c = char_at(text + at)).cls == CLASS_SPACE;) {
        last = at;
        at += c.length;
        if (is_newline(text[last])) after_newline = at;
    }
    if (after_newline) return after_newline;
    return at == n || last == 0 ? at : last;
}

size_t split_next(const uint8_t *text, size_t n) {
    if (text[0] == ' ' && n > 1 && first_byte_class[text[1]] == CLASS_LETTER) // most pieces are a word of ASCII
        return letters_end(text, 1, n);
    Char c = char_at(text);
    if (c.cls == CLASS_LETTER) // [^\r\n\p{L}\p{N}]?\p{L}+, without the first character
        return letters_end(text, c.length, n);
    if (c.cls == CLASS_NUMBER) return numbers(text, n);
    if (text[0] == '\'') {
        size_t length = contraction(text + 1, n - 1);
        if (length) return length;
    }
    CharClass next = c.length < n ? char_at(text + c.length).cls : CLASS_SPACE;
    if (next == CLASS_LETTER && !is_newline(text[0])) // [^\r\n\p{L}\p{N}]?\p{L}+, with it
        return letters_end(text, c.length, n);
    bool space_first = text[0] == ' ' && next == CLASS_OTHER;
    if (c.cls == CLASS_OTHER || space_first) { //  ?[^\s\p{L}\p{N}]+[\r\n]*
        size_t at = run_end(text, space_first ? 1 : 0, n, CLASS_OTHER);
        while (at < n && is_newline(text[at])) at++;
        return at;
    }
    return white_space(text, n);
}
