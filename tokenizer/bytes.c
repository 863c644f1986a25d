#include "bytes.h"

#include <stdlib.h>
#include <string.h>

bool bytes_append(Bytes *b, const void *data, size_t n, Error *err) {
    if (n > b->capacity - b->n) {
        size_t capacity = 2 * b->capacity + n + 256;
        char *more = realloc(b->data, capacity);
        if (!more) return fail(err, "out of memory: %zu bytes of text", capacity);
        b->data = more;
        b->capacity = capacity;
    }
    if (n) memcpy(b->data + b->n, data, n);
    b->n += n;
    return true;
}

bool tokens_grow(TokenList *list, size_t n, Error *err) {
    size_t capacity = 2 * list->capacity + n + 256;
    int *ids = realloc(list->ids, capacity * sizeof *ids);
    if (!ids) return fail(err, "out of memory: %zu token ids", capacity);
    list->ids = ids;
    list->capacity = capacity;
    return true;
}

void tokens_free(TokenList *list) {
    free(list->ids);
    *list = (TokenList){0};
}
