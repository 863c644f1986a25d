#define _GNU_SOURCE // sched_getaffinity, RUSAGE_THREAD
#include "threads.h"

#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdalign.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

// Tells the core that this thread only waits.
#if defined(__x86_64__)
#define PAUSE() __builtin_ia32_pause()
#elif defined(__aarch64__)
#define PAUSE() __asm__ volatile("yield")
#else
#define PAUSE() atomic_signal_fence(memory_order_seq_cst)
#endif

enum {
    STACK_BYTES = 1 << 20,
    MAX_RUN = 64,
    // How long a thread that waits keeps its core before it sleeps, in nanoseconds. To be woken takes 50 µs and more.
    SPIN_CALM = 2000000, // longer than what one thread does alone between two products, or two tokens of a small model
    SPIN_BUSY = 20000,   // where other threads wait for the cores
    SPIN_LAST = 50000,   // until the workers have done their last parts: longer parts are worth sleeping for
    // The machine counts as busy for BUSY_FOR after a thread has waited for its core for longer than LOST_CORE. Then workers
    // that sleep are woken only for work that one thread has not done in WORTH_WAKING.
    LOST_CORE = 100000,
    BUSY_FOR = 200000000,
    WORTH_WAKING = 500000
};

// ---- how many -------------------------------------------------------------------------------------------------------

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

// CPUs that this process may run on.
static int usable_cpus(void) {
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

int threads_default(void) {
    const char *wanted = getenv("OMP_NUM_THREADS");
    char *end = NULL;
    long n = wanted ? strtol(wanted, &end, 10) : 0;
    if (n >= 1 && n <= MAX_THREADS && (!*end || *end == ',')) return (int)n; // of a list the first is meant
    int cpus = least_limit(cgroup_cpus("/proc/self/cgroup", "/sys/fs/cgroup"), usable_cpus());
    if (cpus > MAX_THREADS) cpus = MAX_THREADS;
    if (wanted && *wanted)
        fprintf(stderr, "llama: OMP_NUM_THREADS=%s: expected a whole number from 1 to %d; %d threads compute\n", wanted,
                MAX_THREADS, cpus);
    return cpus;
}

static atomic_int n_threads; // 0: not decided yet

void threads_set(int n) {
    n_threads = n;
}

int threads_count(void) {
    int n = n_threads;
    if (n == 0) n_threads = n = threads_default();
    return n;
}

// ---- work that is shared --------------------------------------------------------------------------------------------
// One work at a time. Its caller opens it, takes parts as the workers do, closes it when none is left and waits for the
// workers that are still inside. A worker that wakes up late, or waits for its core, holds up nobody unless it has taken
// a part: it enters nothing that is closed.

enum { OPEN = 1 << 30, CALLER_SLEEPS = 1 << 29, INSIDE = CALLER_SLEEPS - 1 }; // of `state`

static struct {
    alignas(64) atomic_int opened; // counts the works; workers wait for it to change
    atomic_int sleeping;           // workers that have to be woken
    atomic_int most;               // workers that may be inside
    atomic_bool crowded;           // more threads than CPUs: none spins
    atomic_flag taken;             // by a caller: the next three are its own
    bool no_more;                  // a worker could not be started
    int n_workers;                 // started
    int n_cpus;                    // to run on
    atomic_llong busy_until;       // time in nanoseconds, as now_ns gives it
    alignas(64) atomic_int state;  // OPEN, CALLER_SLEEPS, and the number of workers inside
    int64_t n, grain;              // the work, which those read who are inside
    ParallelBody *body;
    void *context;
    alignas(64) atomic_llong next; // the first index that nobody has taken
} pool = {.taken = ATOMIC_FLAG_INIT};

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

// Sleeps until it is woken, if *word has that value; may return without a cause.
static void futex_wait(atomic_int *word, int value) {
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0);
}

static void futex_wake(atomic_int *word, int n) {
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, n, NULL, NULL, 0);
}

// One wait.
typedef struct {
    int n;               // pauses
    int64_t start, last; // when the clock was read first and last; 0: not yet
} Spin;

// Pauses once; false when the wait has taken `most` nanoseconds and it is time to sleep.
static bool spin(Spin *s, int64_t most) {
    if (pool.crowded) return false;
    PAUSE();
    if (++s->n % 16) return true;
    int64_t now = now_ns();
    if (!s->start) s->start = s->last = now;
    if (now - s->last > LOST_CORE) pool.busy_until = now + BUSY_FOR;
    s->last = now;
    return now - s->start < (now < pool.busy_until ? SPIN_BUSY : most);
}

// Whether this thread, since it was last asked, has waited for a core that was taken from it.
static bool has_lost_core(int64_t now) {
    static _Thread_local int64_t before, ran_before; // times
    static _Thread_local long switches;
    struct rusage use;
    if (getrusage(RUSAGE_THREAD, &use) != 0) return false;
    int64_t ran = ((int64_t)use.ru_utime.tv_sec + use.ru_stime.tv_sec) * 1000000000 +
                  ((int64_t)use.ru_utime.tv_usec + use.ru_stime.tv_usec) * 1000;
    bool lost = before && use.ru_nivcsw != switches && now - before - (ran - ran_before) > LOST_CORE;
    before = now;
    ran_before = ran;
    switches = use.ru_nivcsw;
    return lost;
}

// Takes parts until none is left. wake_at: when workers that sleep are to be woken; 0: never.
static void take_parts(int64_t wake_at) {
    for (;;) {
        int64_t begin = atomic_fetch_add_explicit(&pool.next, pool.grain, memory_order_relaxed);
        if (begin >= pool.n) return;
        if (wake_at && now_ns() >= wake_at) {
            futex_wake(&pool.opened, pool.most);
            wake_at = 0;
        }
        pool.body(pool.context, begin, pool.n - begin < pool.grain ? pool.n : begin + pool.grain);
    }
}

static bool enter(void) {
    int state = pool.state;
    while (state & OPEN && (state & INSIDE) < pool.most)
        if (atomic_compare_exchange_weak(&pool.state, &state, state + 1)) return true;
    return false;
}

static void leave(void) {
    if (atomic_fetch_sub(&pool.state, 1) == (CALLER_SLEEPS | 1)) futex_wake(&pool.state, 1);
}

static void *worker(void *none) {
    for (;;) {
        int opened = pool.opened;
        if (enter()) {
            take_parts(0);
            leave();
        }
        for (Spin s = {0}; pool.opened == opened && spin(&s, SPIN_CALM);) continue;
        if (pool.opened != opened) continue;
        pool.sleeping++;
        while (pool.opened == opened) futex_wait(&pool.opened, opened);
        pool.sleeping--;
    }
    return none;
}

// A thread that leaves all signals to the one that starts it.
static bool start(pthread_t *thread, bool detached, void *(*body)(void *), void *argument) {
    pthread_attr_t attributes;
    sigset_t all, before;
    if (pthread_attr_init(&attributes) != 0) return false;
    pthread_attr_setstacksize(&attributes, STACK_BYTES);
    if (detached) pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    bool ok = pthread_create(thread, &attributes, body, argument) == 0;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    return ok;
}

static void start_workers(int n) {
    if (!pool.n_cpus) pool.n_cpus = usable_cpus();
    pthread_t id;
    while (pool.n_workers < n && !pool.no_more) {
        pool.no_more = !start(&id, true, worker, NULL);
        pool.n_workers += !pool.no_more;
    }
}

void parallel_for(int64_t n, int64_t grain, ParallelBody *body, void *context) {
    int threads = n > grain ? threads_count() : 1;
    if (threads == 1 || atomic_flag_test_and_set(&pool.taken)) {
        if (n > 0) body(context, 0, n);
        return;
    }
    start_workers(threads - 1);
    int64_t now = now_ns();
    if (has_lost_core(now)) pool.busy_until = now + BUSY_FOR;
    pool.n = n;
    pool.grain = grain;
    pool.body = body;
    pool.context = context;
    pool.next = 0;
    pool.most = threads - 1;
    pool.crowded = threads > pool.n_cpus;
    pool.state = OPEN;
    pool.opened++;
    take_parts(pool.sleeping == 0 ? 0 : now < pool.busy_until ? now + WORTH_WAKING : now);
    int state = atomic_fetch_and(&pool.state, ~OPEN) & ~OPEN;
    for (Spin s = {0}; state & INSIDE && spin(&s, SPIN_LAST);) state = pool.state;
    if (state & INSIDE) state = atomic_fetch_or(&pool.state, CALLER_SLEEPS) | CALLER_SLEEPS;
    while (state & INSIDE) {
        futex_wait(&pool.state, state);
        state = pool.state;
    }
    atomic_flag_clear(&pool.taken);
}

// ---- threads that wait for devices ----------------------------------------------------------------------------------

typedef struct {
    pthread_t id;
    void (*body)(void *context, int i);
    void *context;
    int i;
} Run;

static void *run(void *argument) {
    const Run *r = argument;
    r->body(r->context, r->i);
    return NULL;
}

void threads_run(int n, void (*body)(void *context, int i), void *context) {
    Run runs[MAX_RUN];
    int started = 1;
    for (; started < n && started < MAX_RUN; started++) {
        runs[started] = (Run){.body = body, .context = context, .i = started};
        if (!start(&runs[started].id, false, run, &runs[started])) break;
    }
    body(context, 0);
    for (int i = 1; i < started; i++) pthread_join(runs[i].id, NULL);
}
