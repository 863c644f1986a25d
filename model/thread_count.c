#define _GNU_SOURCE // sched_getaffinity
#include "thread_count.h"

#include <errno.h>
#include <limits.h>
#include <sched.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// The numbers at the beginning of a file; 0 for what is not there or none ("max").
static void read_numbers(const char *path, double *first, double *second) {
    char text[64] = "", *end;
    FILE *in = fopen(path, "r");
    if (in && !fgets(text, sizeof text, in)) text[0] = 0;
    if (in) fclose(in);
    *first = strtod(text, &end);
    *second = strtod(end, NULL);
}

// The quota of one group, both times in microseconds. folder: of the group.
static int group_cpus(const char *folder, bool unified) {
    char path[2 * PATH_MAX + 32];
    double quota, period, none;
    snprintf(path, sizeof path, "%s/%s", folder, unified ? "cpu.max" : "cpu.cfs_quota_us");
    read_numbers(path, &quota, &period);
    if (!unified) {
        snprintf(path, sizeof path, "%s/cpu.cfs_period_us", folder);
        read_numbers(path, &period, &none);
    }
    if (!(quota > 0 && period > 0) || quota / period > MAX_THREADS) return 0;
    int whole = (int)(quota / period);
    return whole < quota / period ? whole + 1 : whole;
}

static int least_limit(int a, int b) { // 0: none
    return a && (!b || a < b) ? a : b;
}

int cgroup_cpus(const char *cgroup, const char *root) {
    char line[PATH_MAX], folder[2 * PATH_MAX];
    int least = 0;
    FILE *in = fopen(cgroup, "r");
    while (in && fgets(line, sizeof line, in)) { // number:controllers:path; version 2 has no controllers
        char *controllers = strchr(line, ':'), *path = controllers ? strchr(controllers + 1, ':') : NULL;
        if (!path) continue;
        *path++ = 0;
        path[strcspn(path, "\n")] = 0;
        bool unified = !*++controllers, cpu = unified;
        for (char *name; (name = strsep(&controllers, ",")) != NULL;) cpu = cpu || strcmp(name, "cpu") == 0;
        for (bool more = cpu; more;) { // the group, and those around it
            snprintf(folder, sizeof folder, "%s%s%s", root, unified ? "" : "/cpu", path);
            least = least_limit(group_cpus(folder, unified), least);
            char *slash = strrchr(path, '/');
            more = slash != NULL;
            if (more) *slash = 0;
        }
    }
    if (in) fclose(in);
    return least;
}

int affinity_cpus(void) {
    int n = 0;
    for (size_t most = 1024; most <= 1 << 20; most *= 2) { // until the set has room for all of the machine's
        cpu_set_t *set = CPU_ALLOC(most);
        if (!set) break;
        bool ok = sched_getaffinity(0, CPU_ALLOC_SIZE(most), set) == 0;
        if (ok) n = CPU_COUNT_S(CPU_ALLOC_SIZE(most), set);
        CPU_FREE(set);
        if (ok || errno != EINVAL) break;
    }
    return n > 0 ? n : 1;
}

int omp_threads(const char *omp) {
    char *end;
    errno = 0;
    long n = strtol(omp, &end, 10);
    while (*end == ' ' || *end == '\t') end++;
    return errno || (*end && *end != ',') || n < 1 || n > MAX_THREADS ? 0 : (int)n;
}

int thread_count(int asked, const char *omp, int cpus, int quota) {
    int n = asked ? asked : omp ? omp_threads(omp) : 0;
    if (!n) n = least_limit(quota, cpus);
    return n < MAX_THREADS ? n : MAX_THREADS;
}

static int own_quota(void) {
    return cgroup_cpus("/proc/self/cgroup", "/sys/fs/cgroup");
}

int default_threads(void) {
    return thread_count(0, getenv("OMP_NUM_THREADS"), affinity_cpus(), own_quota());
}

int available_cpus(void) {
    return thread_count(0, NULL, affinity_cpus(), own_quota());
}
