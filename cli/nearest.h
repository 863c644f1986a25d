// What somebody may have meant by a name that does not exist.
#ifndef NEAREST_H
#define NEAREST_H

#include <stddef.h>

// Letters to insert, remove or replace to get from one name [n] to the other (Levenshtein 1966), capitals being as good
// as small letters; INT_MAX where one is longer than 64.
int name_distance(const char *a, size_t n, const char *b);
// The largest distance at which a name of n letters may be meant for another: a third of them, three at most.
int name_tolerance(size_t n);

#endif
