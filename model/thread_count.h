// How many threads compute: what the user asked for, or what the machine and its limits let this process have.
#ifndef THREAD_COUNT_H
#define THREAD_COUNT_H

enum { MAX_THREADS = 1024 };

// The rule, from 1 to MAX_THREADS: `asked` (0: nobody asked); else the number in `omp`, what OMP_NUM_THREADS is (NULL:
// not set), if it is one; else `cpus`, those that the process may run on, or `quota` where that is less (0: no limit).
int thread_count(int asked, const char *omp, int cpus, int quota);

// The number in OMP_NUM_THREADS, of a list the first, as OpenMP reads it; 0: it is none from 1 to MAX_THREADS.
int omp_threads(const char *omp);

// CPUs that this process may run on (its affinity), at least 1.
int affinity_cpus(void);

// CPUs that its control groups give a process, rounded up; 0: no limit. cgroup: the list of its groups, as in
// /proc/self/cgroup; root: where they are mounted, as /sys/fs/cgroup. Of a group and all around it the least counts:
// cpu.max (version 2) and cpu.cfs_quota_us (version 1).
int cgroup_cpus(const char *cgroup, const char *root);

// The rule with this process's own numbers, where nobody asked; and without OMP_NUM_THREADS: the CPUs that it has.
int default_threads(void);
int available_cpus(void);

#endif
