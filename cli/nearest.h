// What somebody may have meant by a name that does not exist.
#ifndef NEAREST_H
#define NEAREST_H

#include <stdbool.h>

// Bytes to insert, delete or replace to make one name of the other (Levenshtein 1966); both are cut to 40 bytes.
int name_distance(const char *a, const char *b);
// Whether so few bytes differ that one may be meant by the other: at most a third of its own.
bool name_is_near(const char *name, const char *known);

#endif
