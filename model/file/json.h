// A strict pull parser for the JSON that this program reads: safetensors headers and lists of prompts.
// Works in the caller's own buffer: strings are decoded in place (never longer than they were written).
#ifndef JSON_H
#define JSON_H

#include <stddef.h>
#include <stdint.h>

#include "../../tokenizer/error.h"

enum { JSON_MAX_DEPTH = 64 };

typedef struct {
    char *start, *at, *end;
    Error *err;       // the first failure; every call after it returns false
    const char *what; // names the text in messages; NULL: they do not name it
} Json;

// True, and steps over c, if c is the next character after white space.
bool json_next(Json *j, char c);
// The same, but anything else is a failure.
bool json_expect(Json *j, char c);
// A string: *text is NUL-terminated UTF-8 of *length bytes. A NUL character inside is refused.
bool json_string(Json *j, char **text, size_t *length);
// A whole number without sign, fraction or exponent, below 2^64.
bool json_uint(Json *j, uint64_t *value);
// Any value, checked and left as it is written: its n bytes at *text. Lists and objects are nested JSON_MAX_DEPTH deep
// at most.
bool json_raw(Json *j, char **text, size_t *n);
// The word null.
bool json_null(Json *j);
// Nothing but white space may follow.
bool json_end(Json *j);

#endif
