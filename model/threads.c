#define _GNU_SOURCE // syscall
#include "threads.h"

#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <stdalign.h>
#include <stdatomic.h>
#include <stdbool.h>
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

// For how long a thread that waits keeps its core before it sleeps, in nanoseconds: longer than one thread computes
// alone between two products, or two tokens of a small model (to be woken takes 50 µs and more), and short beside the
// milliseconds for which another process keeps a core that one of the threads waits for.
enum { SPIN = 100000 };

// ---- how many -------------------------------------------------------------------------------------------------------

static atomic_int n_threads; // 0: not decided yet

void threads_set(int n) {
    n_threads = n;
}

int threads_count(void) {
    int n = n_threads;
    if (n == 0) n_threads = n = default_threads();
    return n;
}

// ---- work that is shared --------------------------------------------------------------------------------------------
// One work at a time. Its caller opens it, takes parts as the workers do, closes it when none is left and waits for the
// workers that are still inside. A thread takes the parts of its own range, one after the other, so that it reads
// memory in order (weights 1.1 to 1.4 times as fast as parts in turn), and then what is left of the others' ranges. A
// worker that wakes up late, or waits for its core, holds up nobody unless it has taken a part: it enters nothing that
// is closed.

// A range of parts.
enum { MAX_RANGES = 8 }; // more threads share them: whoever has nothing left to do looks at all of them
typedef struct {
    alignas(64) atomic_llong next; // the first part that nobody has taken
    int64_t end;
} Range;

enum { OPEN = 1 << 30, CALLER_SLEEPS = 1 << 29, INSIDE = CALLER_SLEEPS - 1 }; // of `state`

static struct {
    // What threads that wait look at.
    alignas(64) atomic_int opened; // counts the works; workers wait for it to change
    atomic_int sleeping;           // workers that have to be woken
    atomic_bool crowded;           // more threads than CPUs: none spins
    atomic_int n_numbered;         // workers that have a number, from 1 on
    // The caller's own, of whom there is one.
    atomic_flag taken;
    bool no_more;  // a worker could not be started
    int n_workers; // started
    int n_cpus;    // to run on
    // The work. What is not atomic is for those who are inside.
    alignas(64) atomic_int state; // OPEN, CALLER_SLEEPS, and the number of workers inside
    atomic_int most;              // workers that may be inside
    ParallelBody *body;
    void *context;
    int64_t n, grain;
    int n_ranges;
    Range ranges[MAX_RANGES];
} pool = {.taken = ATOMIC_FLAG_INIT};

// Sleeps until it is woken, if *word has that value; may return without a cause.
static void futex_wait(atomic_int *word, int value) {
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0);
}

static void futex_wake(atomic_int *word, int n) {
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, n, NULL, NULL, 0);
}

// One wait.
typedef struct {
    int n;         // pauses
    int64_t start; // when the clock was first read, in nanoseconds; 0: not yet
} Spin;

// Pauses once; false when the wait has taken SPIN and it is time to sleep.
static bool spin(Spin *s) {
    if (pool.crowded) return false;
    PAUSE();
    if (++s->n % 16) return true;
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    int64_t now = (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
    if (!s->start) s->start = now;
    return now - s->start < SPIN;
}

static void take_range(Range *r) {
    int64_t part;
    while (atomic_load_explicit(&r->next, memory_order_relaxed) < r->end &&
           (part = atomic_fetch_add_explicit(&r->next, 1, memory_order_relaxed)) < r->end) {
        int64_t begin = part * pool.grain;
        pool.body(pool.context, begin, pool.n - begin < pool.grain ? pool.n : begin + pool.grain);
    }
}

// Takes parts until none is left. thread: 0 is the caller, the others are workers.
static void take_parts(int thread) {
    for (int i = 0; i < pool.n_ranges; i++) take_range(&pool.ranges[(thread + i) % pool.n_ranges]);
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

static void *worker(void *unused) {
    const int number = ++pool.n_numbered;
    (void)unused;
    for (;;) {
        int opened = pool.opened;
        if (enter()) {
            take_parts(number);
            leave();
        }
        for (Spin s = {0}; pool.opened == opened && spin(&s);) continue;
        if (pool.opened != opened) continue;
        // Counted before the last look at `opened`, and the caller counts after it has changed that: one of the two
        // sees the other.
        pool.sleeping++;
        while (pool.opened == opened) futex_wait(&pool.opened, opened);
        pool.sleeping--;
    }
    return NULL;
}

// A thread that leaves all signals to the one that starts it.
static bool start(pthread_t *thread, void *(*body)(void *), void *argument) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    bool ok = pthread_create(thread, NULL, body, argument) == 0;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return ok;
}

static void start_workers(int n) {
    if (!pool.n_cpus) pool.n_cpus = available_cpus();
    pthread_t id;
    while (pool.n_workers < n && !pool.no_more) {
        pool.no_more = !start(&id, worker, NULL);
        if (pool.no_more) break;
        pthread_detach(id);
        pool.n_workers++;
    }
    pool.crowded = pool.n_workers >= pool.n_cpus;
}

void parallel_for(int64_t n, int64_t grain, ParallelBody *body, void *context) {
    int64_t parts = (n + grain - 1) / grain;
    int threads = parts > 1 ? threads_count() : 1;
    if (threads > parts) threads = (int)parts;
    if (threads == 1 || atomic_flag_test_and_set(&pool.taken)) {
        if (n > 0) body(context, 0, n);
        return;
    }
    start_workers(threads - 1);
    pool.n = n;
    pool.grain = grain;
    pool.body = body;
    pool.context = context;
    pool.n_ranges = threads < MAX_RANGES ? threads : MAX_RANGES;
    for (int i = 0; i < pool.n_ranges; i++) {
        pool.ranges[i].next = parts * i / pool.n_ranges;
        pool.ranges[i].end = parts * (i + 1) / pool.n_ranges;
    }
    pool.most = threads - 1;
    pool.state = OPEN;
    pool.opened++;
    int missing = threads - 1 - (pool.n_workers - pool.sleeping);
    if (missing > 0) futex_wake(&pool.opened, missing);
    take_parts(0);
    int state = atomic_fetch_and(&pool.state, ~OPEN) & ~OPEN;
    for (Spin s = {0}; state && spin(&s);) state = pool.state;
    if (state) state = atomic_fetch_or(&pool.state, CALLER_SLEEPS) | CALLER_SLEEPS;
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
        if (!start(&runs[started].id, run, &runs[started])) break;
    }
    body(context, 0);
    for (int i = 1; i < started; i++) pthread_join(runs[i].id, NULL);
}
