#include "nearest.h"

#include <ctype.h>
#include <limits.h>
#include <stdbool.h>
#include <string.h>

int name_distance(const char *a, size_t n, const char *b) {
    enum { LONGEST = 64 };
    int row[LONGEST + 1]; // of the first i letters of a and the first j of b
    size_t length = strlen(b);
    if (n > LONGEST || length > LONGEST) return INT_MAX;
    for (size_t j = 0; j <= length; j++) row[j] = (int)j;
    for (size_t i = 1; i <= n; i++) {
        int diagonal = row[0];
        row[0] = (int)i;
        for (size_t j = 1; j <= length; j++) {
            bool same = tolower((unsigned char)a[i - 1]) == tolower((unsigned char)b[j - 1]);
            int best = diagonal + !same;
            if (row[j] + 1 < best) best = row[j] + 1;
            if (row[j - 1] + 1 < best) best = row[j - 1] + 1;
            diagonal = row[j];
            row[j] = best;
        }
    }
    return row[length];
}

int name_tolerance(size_t n) {
    return n / 3 < 3 ? (int)(n / 3) : 3;
}
