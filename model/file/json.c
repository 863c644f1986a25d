#include "json.h"

#include <string.h>

#include "../../tokenizer/utf8.h"

static bool json_fail(Json *j, const char *expected) {
    return fail(j->err, "%s%sbad JSON at byte %zu: expected %s", j->what ? j->what : "", j->what ? ": " : "",
                (size_t)(j->at - j->start), expected);
}

static void skip_space(Json *j) {
    while (j->at < j->end && (*j->at == ' ' || *j->at == '\n' || *j->at == '\t' || *j->at == '\r')) j->at++;
}

bool json_next(Json *j, char c) {
    if (j->err->text[0]) return false;
    skip_space(j);
    if (j->at == j->end || *j->at != c) return false;
    j->at++;
    return true;
}

bool json_expect(Json *j, char c) {
    char expected[4] = {'\'', c, '\'', 0};
    return json_next(j, c) || json_fail(j, expected);
}

static bool hex4(Json *j, uint32_t *value) {
    *value = 0;
    if (j->end - j->at < 4) return json_fail(j, "four hex digits");
    for (int i = 0; i < 4; i++) {
        char c = *j->at;
        uint32_t digit;
        if (c >= '0' && c <= '9')
            digit = (uint32_t)(c - '0');
        else if ((c | 0x20) >= 'a' && (c | 0x20) <= 'f')
            digit = (uint32_t)((c | 0x20) - 'a' + 10);
        else
            return json_fail(j, "four hex digits");
        *value = *value << 4 | digit;
        j->at++;
    }
    return true;
}

// The part of an escape after the backslash.
static bool escape(Json *j, char **out) {
    if (j->at == j->end) return json_fail(j, "an escape");
    char c = *j->at++;
    const char *from = "\"\\/bfnrt", *to = "\"\\/\b\f\n\r\t";
    const char *found = c ? strchr(from, c) : NULL;
    if (found) {
        *(*out)++ = to[found - from];
        return true;
    }
    if (c != 'u') return json_fail(j, "an escape");
    uint32_t cp, low;
    if (!hex4(j, &cp)) return false;
    if (cp >= 0xD800 && cp <= 0xDBFF) {
        if (j->end - j->at < 2 || j->at[0] != '\\' || j->at[1] != 'u') return json_fail(j, "a low surrogate");
        j->at += 2;
        if (!hex4(j, &low)) return false;
        if (low < 0xDC00 || low > 0xDFFF) return json_fail(j, "a low surrogate");
        cp = 0x10000 + ((cp - 0xD800) << 10) + (low - 0xDC00);
    } else if ((cp >= 0xDC00 && cp <= 0xDFFF) || cp == 0) {
        return json_fail(j, "a character other than NUL and lone surrogates");
    }
    *out += utf8_encode(cp, (uint8_t *)*out);
    return true;
}

bool json_string(Json *j, char **text, size_t *length) {
    if (!json_next(j, '"')) return json_fail(j, "a string");
    char *out = j->at;
    *text = out;
    for (;;) {
        if (j->at == j->end) return json_fail(j, "the end of the string");
        uint8_t c = (uint8_t)*j->at;
        if (c == '"') break;
        if (c < 0x20) return json_fail(j, "no control character in a string");
        if (c == '\\') {
            j->at++;
            if (!escape(j, &out)) return false;
            continue;
        }
        uint32_t cp;
        int n = utf8_decode((uint8_t *)j->at, (size_t)(j->end - j->at), &cp);
        if (n == 0) return json_fail(j, "UTF-8");
        memmove(out, j->at, (size_t)n);
        out += n;
        j->at += n;
    }
    j->at++;  // the closing quote, whose place
    *out = 0; // the terminator takes if nothing was shortened
    *length = (size_t)(out - *text);
    return true;
}

bool json_uint(Json *j, uint64_t *value) {
    if (j->err->text[0]) return false;
    skip_space(j);
    char *first = j->at;
    uint64_t v = 0;
    for (; j->at < j->end && *j->at >= '0' && *j->at <= '9'; j->at++) {
        uint64_t digit = (uint64_t)(*j->at - '0');
        if (v > (UINT64_MAX - digit) / 10) return json_fail(j, "a number below 2^64");
        v = v * 10 + digit;
    }
    if (j->at == first || (*first == '0' && j->at - first > 1)) return json_fail(j, "a whole number");
    if (j->at < j->end && (*j->at == '.' || *j->at == 'e' || *j->at == 'E')) return json_fail(j, "a whole number");
    *value = v;
    return true;
}

static bool next_word(Json *j, const char *word) {
    size_t n = strlen(word);
    if ((size_t)(j->end - j->at) < n || memcmp(j->at, word, n) != 0) return false;
    j->at += n;
    return true;
}

bool json_null(Json *j) {
    if (j->err->text[0]) return false;
    skip_space(j);
    return next_word(j, "null");
}

// ---- values that are not decoded ------------------------------------------------------------------------------------

// After the opening quote. Any escape is right, NUL and lone surrogates too: nobody here reads the text.
static bool raw_string(Json *j) {
    while (j->at < j->end && *j->at != '"') {
        uint8_t c = (uint8_t)*j->at;
        uint32_t cp;
        int n = 1;
        if (c < 0x20) return json_fail(j, "no control character in a string");
        if (c == '\\') {
            j->at++;
            char kind = '\0';
            if (j->at < j->end) kind = *j->at;
            if (!kind || !strchr("\"\\/bfnrtu", kind)) return json_fail(j, "an escape");
            j->at++;
            n = 0;
            if (kind == 'u' && !hex4(j, &cp)) return false;
        } else if (c >= 0x80 && (n = utf8_decode((uint8_t *)j->at, (size_t)(j->end - j->at), &cp)) == 0) {
            return json_fail(j, "UTF-8");
        }
        j->at += n;
    }
    if (j->at == j->end) return json_fail(j, "the end of the string");
    j->at++;
    return true;
}

static bool digits(Json *j) {
    char *first = j->at;
    while (j->at < j->end && *j->at >= '0' && *j->at <= '9') j->at++;
    return j->at > first || json_fail(j, "a digit");
}

static bool raw_number(Json *j) {
    if (*j->at == '-') j->at++;
    char *first = j->at;
    if (!digits(j)) return false;
    if (*first == '0' && j->at - first > 1) return json_fail(j, "a number without leading zeros");
    if (j->at < j->end && *j->at == '.') {
        j->at++;
        if (!digits(j)) return false;
    }
    if (j->at < j->end && (*j->at == 'e' || *j->at == 'E')) {
        j->at++;
        if (j->at < j->end && (*j->at == '+' || *j->at == '-')) j->at++;
        return digits(j);
    }
    return true;
}

static bool raw_key(Json *j) {
    return json_expect(j, '"') && raw_string(j) && json_expect(j, ':');
}

// A value that is no list and no object.
static bool raw_scalar(Json *j) {
    if (j->err->text[0]) return false;
    if (json_next(j, '"')) return raw_string(j);
    if (next_word(j, "null") || next_word(j, "true") || next_word(j, "false")) return true;
    bool number = j->at < j->end && (*j->at == '-' || (*j->at >= '0' && *j->at <= '9'));
    return number ? raw_number(j) : json_fail(j, "a value");
}

static bool raw_value(Json *j) {
    char close[JSON_MAX_DEPTH] = ""; // [depth] brackets that what the value is in ends with
    int depth = 0;
    do {
        bool object = json_next(j, '{');
        if (object || json_next(j, '[')) {
            if (depth == JSON_MAX_DEPTH) return json_fail(j, "fewer lists and objects in one another");
            close[depth++] = object ? '}' : ']';
            if (!json_next(j, close[depth - 1])) {
                if (object && !raw_key(j)) return false;
                continue; // with its first value
            }
            depth--;
        } else if (!raw_scalar(j)) {
            return false;
        }
        for (; depth && !json_next(j, ','); depth--)
            if (!json_expect(j, close[depth - 1])) return false;
        if (depth && close[depth - 1] == '}' && !raw_key(j)) return false;
    } while (depth);
    return true;
}

bool json_raw(Json *j, char **text, size_t *n) {
    skip_space(j);
    *text = j->at;
    if (!raw_value(j)) return false;
    *n = (size_t)(j->at - *text);
    return true;
}

bool json_end(Json *j) {
    if (j->err->text[0]) return false;
    skip_space(j);
    return j->at == j->end || json_fail(j, "the end");
}
