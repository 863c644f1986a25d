// Byte strings and lists of token ids that grow as they are appended to.
#ifndef BYTES_H
#define BYTES_H

#include <stddef.h>
#include <stdint.h>

#include "error.h"

typedef struct {
    char *data;
    size_t n, capacity;
} Bytes;

bool bytes_append(Bytes *b, const void *data, size_t n, Error *err);

typedef struct {
    int *ids;
    size_t n, capacity;
} TokenList;

// Makes room for n more.
bool tokens_grow(TokenList *list, size_t n, Error *err);
static inline bool tokens_reserve(TokenList *list, size_t n, Error *err) {
    return list->capacity - list->n >= n || tokens_grow(list, n, err);
}
static inline bool tokens_append(TokenList *list, int id, Error *err) {
    if (!tokens_reserve(list, 1, err)) return false;
    list->ids[list->n++] = id;
    return true;
}
void tokens_free(TokenList *list);

#endif
