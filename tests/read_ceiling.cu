// read_ceiling: how fast this GPU reads device memory when it does nothing else. Prints GB/s, and on which path.
#include <stdio.h>

extern "C" {
#include "../model/measure/peak.h"
}

int main(void) {
    Error err = {""};
    Statistic rate;
    char how[96];
    if (!read_ceiling_cuda((uint64_t)8 << 30, &rate, how, sizeof how, &err)) {
        fprintf(stderr, "read_ceiling: %s\n", err.text);
        return 1;
    }
    printf("%.0f GB/s (%s)\n", rate.median * 1e-9, how);
    return 0;
}
