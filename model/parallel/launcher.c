// What MPI's launchers tell a process by its environment, before any library is asked: Open MPI's own variables, those
// of the older protocol PMI, and PMIx's, which does not say how many there are.
#include <stdlib.h>

#include "processes.h"

// Where it is no number of processes, it is not said.
static int number_in(const char *name, int otherwise) {
    const char *text = getenv(name);
    char *end = NULL;
    long n = text && *text ? strtol(text, &end, 10) : -1;
    return end && !*end && n >= 0 && n <= 1 << 20 ? (int)n : otherwise;
}

int launcher_rank(void) {
    return number_in("OMPI_COMM_WORLD_RANK", number_in("PMI_RANK", number_in("PMIX_RANK", 0)));
}

int launcher_count(void) {
    int count = number_in("OMPI_COMM_WORLD_SIZE", number_in("PMI_SIZE", 0));
    if (count < 1 && getenv("PMIX_RANK")) count = number_in("SLURM_STEP_NUM_TASKS", 2); // MPI will say
    return count > 1 ? count : 1;
}
