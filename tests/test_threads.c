// The threads that share the CPU's work: every index once, whoever takes it; how many there are;
// and what they leave alone.
#define _GNU_SOURCE // sched_setaffinity
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "../model/threads.h"
#include "check.h"

#define LENGTH(array) ((int)(sizeof(array) / sizeof *(array)))

enum { MOST = 100003 };

static const int counts[] = {1, 2, 3, 4, 7, 16};

// ---- parallel_for ---------------------------------------------------------------------------------------------------

typedef struct {
    int64_t n, grain;
    atomic_int times[MOST]; // that each index was done
    atomic_int wrong;       // parts that begin or end elsewhere
    atomic_int inside, most_inside;
} Work;

static void count_part(void *context, int64_t begin, int64_t end) {
    Work *w = context;
    int inside = ++w->inside, most = w->most_inside;
    while (inside > most && !atomic_compare_exchange_weak(&w->most_inside, &most, inside)) continue;
    bool whole = begin == 0 && end == w->n;
    if (!whole && (begin % w->grain || (end != w->n && end - begin != w->grain))) w->wrong++;
    for (int64_t i = begin; i < end; i++) w->times[i]++;
    w->inside--;
}

static Work work;

static void check_work(int threads) {
    for (int64_t i = 0; i < work.n; i++)
        if (work.times[i] != 1) {
            test_fail("%d threads, %d by %d: index %d was done %d times", threads, (int)work.n, (int)work.grain, (int)i,
                      work.times[i]);
            return;
        }
    CHECK(work.wrong == 0 && work.inside == 0 && work.most_inside <= threads);
}

static void run_work(int64_t n, int64_t grain) {
    memset(&work, 0, sizeof work);
    work.n = n;
    work.grain = grain;
    parallel_for(n, grain, count_part, &work);
}

static void test_threads_do_every_index_once(void) {
    static const int sizes[] = {0, 1, 2, 3, 100, 4099, MOST}, grains[] = {1, 2, 64, 1000};
    for (int t = LENGTH(counts) - 1; t >= 0; t--) // the most first: fewer than were started compute afterwards
        for (int s = 0; s < LENGTH(sizes); s++)
            for (int g = 0; g < LENGTH(grains); g++) {
                threads_set(counts[t]);
                CHECK(threads_count() == counts[t]);
                run_work(sizes[s], grains[g]);
                check_work(counts[t]);
            }
    test_end("test_threads_do_every_index_once");
}

static void test_threads_do_many_works_in_a_row(void) {
    threads_set(3);
    for (int i = 0; i < 20000 && !test_failure[0]; i++) {
        run_work(i % 37, 1 + i % 3);
        check_work(3);
        if (i % 5000 == 0) usleep(5000); // long enough for all to sleep
    }
    test_end("test_threads_do_many_works_in_a_row");
}

static void inner_part(void *sum, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) *(atomic_int *)sum += (int)i;
}

static void outer_part(void *sum, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) parallel_for(10, 1, inner_part, sum);
}

static void test_threads_share_within_a_part(void) {
    atomic_int sum = 0;
    threads_set(4);
    parallel_for(100, 1, outer_part, &sum);
    CHECK(sum == 100 * 45);
    test_end("test_threads_share_within_a_part");
}

static void *share_often(void *sum) {
    for (int i = 0; i < 1000; i++) parallel_for(10, 1, inner_part, sum);
    return NULL;
}

static void test_threads_serve_two_callers(void) {
    atomic_int sum = 0;
    pthread_t other;
    threads_set(2);
    if (pthread_create(&other, NULL, share_often, &sum) != 0) {
        test_skip("test_threads_serve_two_callers", "no thread can be started");
        return;
    }
    share_often(&sum);
    pthread_join(other, NULL);
    CHECK(sum == 2 * 1000 * 45);
    test_end("test_threads_serve_two_callers");
}

typedef struct {
    pthread_t caller;
    atomic_int others;  // parts that another thread did ...
    atomic_int signals; // ... and of those, in which a signal was not blocked
} Others;

static void note_thread(void *context, int64_t begin, int64_t end) {
    Others *o = context;
    (void)begin, (void)end;
    usleep(100);
    if (pthread_equal(pthread_self(), o->caller)) return;
    sigset_t blocked;
    pthread_sigmask(SIG_SETMASK, NULL, &blocked);
    static const int numbers[] = {SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGTSTP, SIGWINCH};
    for (int i = 0; i < LENGTH(numbers); i++) o->signals += !sigismember(&blocked, numbers[i]);
    o->others++;
}

static void test_threads_take_part_and_no_signals(void) {
    Others o = {.caller = pthread_self()};
    threads_set(2);
    while (!o.others) parallel_for(20, 1, note_thread, &o); // one that never takes part ends by SIGALRM
    CHECK(o.signals == 0);
    sigset_t blocked;
    pthread_sigmask(SIG_SETMASK, NULL, &blocked);
    CHECK(!sigismember(&blocked, SIGINT)); // the caller's are as they were
    test_end("test_threads_take_part_and_no_signals");
}

static void test_threads_are_not_missed_after_fork(void) {
    threads_set(3);
    run_work(100, 1);
    fflush(NULL);
    pid_t child = fork();
    if (child == 0) {
        alarm(60);
        run_work(1000, 1);
        for (int i = 0; i < 1000; i++)
            if (work.times[i] != 1) _exit(1);
        _exit(0);
    }
    int status = -1;
    CHECK(child > 0 && waitpid(child, &status, 0) == child && status == 0);
    test_end("test_threads_are_not_missed_after_fork");
}

// ---- threads_run ----------------------------------------------------------------------------------------------------

static atomic_int arrived, seen;

static void meet(void *n, int i) { // returns when all have come
    seen |= 1 << i;
    arrived++;
    while (arrived < *(const int *)n) usleep(100);
}

static void test_threads_run_at_the_same_time(void) {
    static const int numbers[] = {1, 2, 16};
    threads_set(1); // it does not count
    for (int i = 0; i < LENGTH(numbers); i++) {
        arrived = seen = 0;
        threads_run(numbers[i], meet, (void *)&numbers[i]);
        CHECK(arrived == numbers[i] && seen == (1 << numbers[i]) - 1);
    }
    test_end("test_threads_run_at_the_same_time");
}

// ---- how many -------------------------------------------------------------------------------------------------------

static void test_threads_are_counted_by_the_rule(void) {
    static const struct {
        int asked;
        const char *omp;
        int cpus, quota, count;
    } rules[] = {
        {0, NULL, 8, 0, 8},  {0, NULL, 8, 3, 3},   {0, NULL, 2, 3, 2},         {0, NULL, 4000, 0, MAX_THREADS},
        {0, "5", 2, 1, 5},   {0, "5,2", 2, 1, 5},  {0, " 7 , 1", 2, 1, 7},     {0, "1024", 2, 0, 1024},
        {3, "5", 2, 1, 3},   {3, NULL, 2, 1, 3},   {9, "x", 2, 1, 9},          {0, "", 4, 0, 4},
        {0, "0", 4, 0, 4},   {0, "-1", 4, 0, 4},   {0, "x", 4, 2, 2},          {0, "3x", 4, 0, 4},
        {0, ",3", 4, 0, 4},  {0, "1025", 4, 0, 4}, {0, "4294967297", 4, 3, 3}, {0, "99999999999999999999", 4, 0, 4},
        {0, "2.5", 4, 0, 4}, {0, "2 3", 4, 0, 4},
    };
    for (int i = 0; i < LENGTH(rules); i++) {
        int n = thread_count(rules[i].asked, rules[i].omp, rules[i].cpus, rules[i].quota);
        if (n != rules[i].count)
            test_fail("asked %d, OMP_NUM_THREADS %s, %d CPUs, quota %d: %d threads, expected %d", rules[i].asked,
                      rules[i].omp ? rules[i].omp : "not set", rules[i].cpus, rules[i].quota, n, rules[i].count);
    }
    test_end("test_threads_are_counted_by_the_rule");
}

static int default_with(const char *wanted) {
    if (wanted)
        setenv("OMP_NUM_THREADS", wanted, 1);
    else
        unsetenv("OMP_NUM_THREADS");
    return default_threads();
}

static void test_threads_by_default(void) {
    cpu_set_t before, one;
    CHECK(sched_getaffinity(0, sizeof before, &before) == 0);
    int cpus = default_with(NULL), quota = cgroup_cpus("/proc/self/cgroup", "/sys/fs/cgroup");
    CHECK(cpus == (quota && quota < CPU_COUNT(&before) ? quota : CPU_COUNT(&before)));
    CHECK(default_with("1") == 1 && default_with("3") == 3 && default_with("x") == cpus && available_cpus() == cpus);
    CPU_ZERO(&one);
    for (int i = 0; i < CPU_SETSIZE && CPU_COUNT(&one) == 0; i++)
        if (CPU_ISSET(i, &before)) CPU_SET(i, &one);
    CHECK(sched_setaffinity(0, sizeof one, &one) == 0);
    CHECK(default_with(NULL) == 1 && default_with("2") == 2 && available_cpus() == 1);
    threads_set(0);
    CHECK(threads_count() == 2);
    unsetenv("OMP_NUM_THREADS");
    threads_set(0);
    CHECK(threads_count() == 1);
    threads_set(6);
    CHECK(threads_count() == 6);
    sched_setaffinity(0, sizeof before, &before);
    test_end("test_threads_by_default");
}

static char folder[] = "/tmp/llama-test-XXXXXX";

static void write_text(const char *name, const char *text) { // name: with the folders that it is in, which are made
    char path[300];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    for (char *slash = path + strlen(folder) + 1; (slash = strchr(slash, '/')); *slash++ = '/') {
        *slash = 0;
        mkdir(path, 0700);
    }
    FILE *out = fopen(path, "w");
    if (!out || fputs(text, out) < 0 || fclose(out) != 0) test_fail("%s cannot be written", path);
}

static int cpus_of(const char *groups) {
    char cgroup[300];
    write_text("cgroup", groups);
    snprintf(cgroup, sizeof cgroup, "%s/cgroup", folder);
    return cgroup_cpus(cgroup, folder);
}

static void test_threads_keep_to_the_control_group(void) {
    CHECK(mkdtemp(folder) != NULL);
    CHECK(cgroup_cpus("/nowhere/cgroup", folder) == 0);
    CHECK(cpus_of("") == 0 && cpus_of("no group\n0:\n:::\n") == 0 && cpus_of("0::/\n") == 0);
    // version 2
    write_text("plain/cpu.max", "max 100000\n");
    write_text("half/cpu.max", "50000 100000\n");
    write_text("two/cpu.max", "200000 100000\n");
    write_text("more/cpu.max", "250001 100000\n");
    write_text("more/inner/cpu.max", "max 100000\n");
    write_text("more/inner/four/cpu.max", "400000 100000\n");
    write_text("more/inner/one/cpu.max", "100000 100000\n");
    write_text("short/cpu.max", "700\n");
    write_text("text/cpu.max", "two 100000\n");
    write_text("zero/cpu.max", "100000 0\n");
    write_text("large/cpu.max", "999999999999 1000\n");
    static const struct {
        const char *group;
        int cpus;
    } groups[] = {{"plain", 0},  {"half", 1},           {"two", 2},
                  {"more", 3},   {"more/inner", 3},     {"more/inner/four", 3},
                  {"absent", 0}, {"more/inner/one", 1}, {"more/absent", 3},
                  {"short", 0},  {"text", 0},           {"zero", 0},
                  {"large", 0}};
    for (int i = 0; i < LENGTH(groups); i++) {
        char line[100];
        snprintf(line, sizeof line, "0::/%s\n", groups[i].group);
        int cpus = cpus_of(line);
        if (cpus != groups[i].cpus) test_fail("group %s: %d CPUs", groups[i].group, cpus);
    }
    // version 1; in a container its own group is mounted where the path of the host is not
    write_text("cpu/cpu.cfs_quota_us", "300000\n");
    write_text("cpu/cpu.cfs_period_us", "100000\n");
    write_text("cpu/free/cpu.cfs_quota_us", "-1\n");
    write_text("cpu/free/cpu.cfs_period_us", "100000\n");
    write_text("cpu/tight/cpu.cfs_quota_us", "60000\n");
    write_text("cpu/tight/cpu.cfs_period_us", "50000\n");
    CHECK(cpus_of("4:cpu,cpuacct:/free\n") == 3 && cpus_of("9:cpuacct,cpu:/tight\n") == 2);
    CHECK(cpus_of("4:cpu:/docker/0123\n") == 3);
    CHECK(cpus_of("4:cpuset:/tight\n3:memory:/tight\n") == 0);
    // both: the least
    CHECK(cpus_of("4:cpu:/tight\n0::/half\n") == 1 && cpus_of("4:cpu:/tight\n0::/more\n") == 2);
    char command[64];
    snprintf(command, sizeof command, "rm -rf %s", folder);
    CHECK(system(command) == 0);
    test_end("test_threads_keep_to_the_control_group");
}

int main(void) {
    alarm(300);
    test_threads_are_counted_by_the_rule();
    test_threads_by_default();
    test_threads_keep_to_the_control_group();
    test_threads_do_every_index_once();
    test_threads_do_many_works_in_a_row();
    test_threads_share_within_a_part();
    test_threads_serve_two_callers();
    test_threads_take_part_and_no_signals();
    test_threads_are_not_missed_after_fork();
    test_threads_run_at_the_same_time();
    return tests_summary();
}
