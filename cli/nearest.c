#include "nearest.h"

#include <string.h>

enum { MOST_BYTES = 40 };

int name_distance(const char *a, const char *b) {
    int n_a = (int)strnlen(a, MOST_BYTES), n_b = (int)strnlen(b, MOST_BYTES);
    int row[MOST_BYTES + 1]; // distances from the first i bytes of a to the first k of b, by k
    for (int k = 0; k <= n_b; k++) row[k] = k;
    for (int i = 1; i <= n_a; i++) {
        int before = row[0]; // of i - 1 and k - 1
        row[0] = i;
        for (int k = 1; k <= n_b; k++) {
            int least = before + (a[i - 1] != b[k - 1]);
            if (row[k] + 1 < least) least = row[k] + 1;
            if (row[k - 1] + 1 < least) least = row[k - 1] + 1;
            before = row[k];
            row[k] = least;
        }
    }
    return row[n_b];
}

bool name_is_near(const char *name, const char *known) {
    return 3 * name_distance(name, known) <= (int)strlen(name);
}
