// Strict UTF-8: overlong forms, surrogates and values past U+10FFFF are invalid.
#ifndef UTF8_H
#define UTF8_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

// Decodes the character at s (n > 0 bytes there) into *cp and returns its length, 1 to 4; 0 if it is not valid.
static inline int utf8_decode(const uint8_t *s, size_t n, uint32_t *cp) {
    uint32_t b = s[0];
    if (b < 0x80) {
        *cp = b;
        return 1;
    }
    int len = b >= 0xF0 ? 4 : b >= 0xE0 ? 3 : 2;
    if (b < 0xC2 || b > 0xF4 || n < (size_t)len) return 0;
    uint32_t c = b & (0x7Fu >> len);
    for (int i = 1; i < len; i++) {
        if ((s[i] & 0xC0) != 0x80) return 0;
        c = c << 6 | (s[i] & 0x3F);
    }
    static const uint32_t smallest[5] = {0, 0, 0x80, 0x800, 0x10000};
    if (c < smallest[len] || c > 0x10FFFF || (c >= 0xD800 && c <= 0xDFFF)) return 0;
    *cp = c;
    return len;
}

// How many bytes of s[0..n), from its beginning on, are valid UTF-8.
static inline size_t utf8_valid_prefix(const uint8_t *s, size_t n) {
    size_t at = 0;
    while (at < n) {
        uint64_t eight;
        uint32_t cp;
        uint8_t a = s[at];
        if (n - at >= sizeof eight) { // ASCII eight at a time; two and three bytes without their value
            memcpy(&eight, s + at, sizeof eight);
            if (!(eight & 0x8080808080808080u)) {
                at += sizeof eight;
                continue;
            }
            if (a >= 0xC2 && a <= 0xDF && (s[at + 1] & 0xC0) == 0x80) {
                at += 2;
                continue;
            }
            if (a >= 0xE1 && a <= 0xEC && (s[at + 1] & 0xC0) == 0x80 && (s[at + 2] & 0xC0) == 0x80) {
                at += 3;
                continue;
            }
        }
        int length = utf8_decode(s + at, n - at, &cp);
        if (length == 0) break;
        at += (size_t)length;
    }
    return at;
}

// Encodes cp into s (room for 4) and returns the length.
static inline int utf8_encode(uint32_t cp, uint8_t *s) {
    if (cp < 0x80) {
        s[0] = (uint8_t)cp;
        return 1;
    }
    int len = cp < 0x800 ? 2 : cp < 0x10000 ? 3 : 4;
    for (int i = len - 1; i > 0; i--, cp >>= 6) s[i] = (uint8_t)(0x80 | (cp & 0x3F));
    s[0] = (uint8_t)((0xF00u >> len) | cp); // 110…, 1110…, 11110…: the low byte of 0xF00 >> len
    return len;
}

// How many bytes at the end of s[0..n) begin a character that more bytes could complete: 0 to 3.
static inline size_t utf8_incomplete_tail(const uint8_t *s, size_t n) {
    for (size_t back = 1; back <= 3 && back <= n; back++) {
        uint8_t b = s[n - back];
        if ((b & 0xC0) == 0x80) continue; // a continuation byte: the lead is further left
        size_t need = b >= 0xF0 ? 4 : b >= 0xE0 ? 3 : b >= 0xC2 ? 2 : 1;
        if (b > 0xF4 || need <= back) return 0;
        // Fill the missing bytes with the smallest and the largest continuation: if neither is valid, none is.
        uint8_t low[4], high[4];
        for (size_t i = 0; i < need; i++) {
            low[i] = i < back ? s[n - back + i] : 0x80;
            high[i] = i < back ? s[n - back + i] : 0xBF;
        }
        uint32_t cp;
        return utf8_decode(low, need, &cp) || utf8_decode(high, need, &cp) ? back : 0;
    }
    return 0;
}

// The length of what is no character at s[0..n), where utf8_decode finds none: the longest part of one (Unicode's
// maximal subpart), or a byte that can be in none. One U+FFFD stands for it.
static inline size_t utf8_invalid_part(const uint8_t *s, size_t n) {
    size_t part = 1;
    for (size_t k = 2; k <= 3 && k <= n; k++)
        if (utf8_incomplete_tail(s, k) == k) part = k;
    return part;
}

// C0, DEL and C1.
static inline bool utf8_is_control(uint32_t cp) {
    return cp < 0x20 || (cp >= 0x7F && cp <= 0x9F);
}

#endif
