// Several processes, started by mpirun: that what follows rank 0 computes what rank 0 computes, though it is told of
// batches and pages alone; that what is not the same everywhere is refused, once; and that all end when one does.
// Engine cpu stands for a GPU's: each rank computes the whole model with it.
// MPIRUN: the launcher beside the mpicc of this build.
//
// Without an argument the program is the test; mpirun starts it with the name of a part.
#include <time.h>

#include "../cli/interrupt.h"
#include "../cli/output.h"
#include "../model/file/checkpoint.h"
#include "../model/generate/generate.h"
#include "../model/parallel/lead.h"
#include "../model/parallel/processes.h"
#include "../model/parallel/shard.h"
#include "../model/threads.h"
#include "program.h"

enum { EXIT_DONE = 0, EXIT_FAILED = 1, EXIT_USAGE = 2, EXIT_INTERRUPTED = 130 };

// ---- what mpirun starts ---------------------------------------------------------------------------------------------

extern const Engine engine_cpu;

// What an engine was asked for and what it computed, in one number.
static struct {
    uint64_t hash;
    int batches, copies, drawn, starts;
    bool drew;
    int fails_at; // the batch that fails, counted from 1; 0: none
    bool fails_to_start;
} record;

static void record_bytes(const void *data, size_t n) {
    for (size_t i = 0; i < n; i++) record.hash = (record.hash ^ ((const uint8_t *)data)[i]) * 0x100000001b3;
}

static bool open_recorded(Model *m, Error *err) {
    record.starts++;
    if (record.fails_to_start) return fail(err, "there is no room");
    return engine_cpu.open(m, err);
}

static bool forward_recorded(Model *m, const Batch *b, int first_logit, Error *err) {
    if (++record.batches == record.fails_at) return fail(err, "it broke");
    m->interrupted = NULL; // (engine cpu stops in the middle of a batch, which GPUs do not)
    bool ok = engine_cpu.forward(m, b, first_logit, err);
    m->interrupted = &interrupted;
    if (!ok) return false;
    const int numbers[] = {b->n_rows, b->n_seq, b->n_logits, b->n_decode, b->ends, first_logit, record.drew};
    const size_t row = (size_t)m->config.vocab_size;
    record_bytes(numbers, sizeof numbers);
    record_bytes(m->argmax, (size_t)(first_logit + b->n_logits) * sizeof *m->argmax);
    record_bytes(m->logits + (size_t)first_logit * row, (size_t)b->n_logits * row * sizeof *m->logits);
    for (int i = 0; i < b->n_seq; i++) {
        record_bytes(&m->kv.len[b->slot[i]], sizeof(int));
        record_bytes(kv_slot_pages(&m->kv, b->slot[i]), (size_t)m->kv.held[b->slot[i]] * sizeof(int));
    }
    record.drawn += record.drew;
    record.drew = false;
    return true;
}

static bool sample_recorded(Model *m, const SampleRow *rows, int n, int *ids, Error *err) {
    record.drew = true;
    return engine_cpu.sample(m, rows, n, ids, err);
}

static bool copy_recorded(Model *m, const int *pages, int n, void *const *host, bool to_host, Error *err) {
    record.copies++;
    record_bytes(pages, (size_t)n * sizeof *pages);
    return engine_cpu.copy_pages(m, pages, n, host, to_host, err);
}

static bool keep(void *context, Sequence *seq, Error *err) {
    (void)context, (void)seq, (void)err;
    return true;
}

// Sequences of several lengths that begin alike, in few pages: they share, leave and come back, and some are drawn.
static bool run_sequences(Model *m, Error *err) {
    enum { N = 9 };
    Sequence seqs[N] = {{.index = 0}};
    bool ok = true;
    for (int i = 0; i < N; i++) {
        seqs[i].index = i;
        seqs[i].config = (GenerateConfig){.n = 40 + 13 * i, .ignore_eos = true, .seed = 5, .stream = (uint64_t)i};
        seqs[i].config.sampler = (SamplerConfig){.temperature = i % 3 ? 0 : 0.8f, .top_p = 1, .repetition_penalty = 1};
        for (int t = 0; ok && t < 80 + 7 * i; t++)
            ok = tokens_append(&seqs[i].prompt, t < 70 ? 300 + t % 50 : 300 + (t * 7 + i * 11) % 500, err);
    }
    GenerateSink sink = {.finished = keep};
    ok = ok && generate(m, seqs, N, &sink, err);
    for (int i = 0; i < N; i++) sequence_free(&seqs[i]);
    return ok;
}

// Two starts of other sizes.
static bool lead_run(Model *m, Error *err) {
    for (int i = 0; i < 2; i++) {
        m->kv_memory = i ? 0 : 8 * (64 * 8192);
        if (!model_start(m, NULL, PRECISION_F32, 6 - i, 512, err) || !run_sequences(m, err)) return false;
        model_stop(m);
    }
    return true;
}

// Steps without an end, for signals and failures.
static bool lead_forever(Model *m, Error *err) {
    int token = 300;
    if (!model_start(m, NULL, PRECISION_F32, 1, 512, err) || !model_prefill(m, 0, &token, 1, 1, err)) return false;
    fprintf(stderr, "pid of rank 0: %d\n", (int)getpid());
    for (;;) {
        if (m->kv.len[0] > 400) kv_reset(&m->kv, 0);
        if (!model_decode(m, 0, 300, err)) return false;
    }
}

static bool is_part(const char *name, const char *part) {
    return strcmp(name, part) == 0;
}

// As llama.c has it.
static int run_part(const char *name, const char *path) {
    Model m;
    Error err = {""};
    int status = EXIT_DONE;
    bool leads, opened = false;
    Engine recorded = engine_cpu;
    recorded.open = open_recorded;
    recorded.forward = forward_recorded;
    recorded.sample = sample_recorded;
    recorded.copy_pages = copy_recorded;
    interrupt_begin();
    threads_set(1);
    if (!processes_begin(print_message, &err)) return EXIT_FAILED;
    leads = processes.rank == 0;
    if (is_part(name, "follower_fails") && !leads) record.fails_at = 30;
    if (is_part(name, "leader_fails") && leads) record.fails_at = 30;
    record.fails_to_start = is_part(name, "no_room") && !leads;
    bool other = !leads && (is_part(name, "other_file") || is_part(name, "no_file"));
    opened = checkpoint_open(&m, other ? path : "model/stories.bin", false, &err);
    bool same = lead_agree(opened ? &m : NULL,
                           !leads && is_part(name, "other_program") ? "llama 0.1" : "llama 0.2 (commit 1)", &err);
    if (same) {
        m.engine = &recorded;
        m.gpus = processes.count;
        m.by_processes = true;
        m.interrupted = &interrupted;
        if (!leads) {
            fprintf(stderr, "pid of rank %d: %d\n", processes.rank, (int)getpid());
            status = follow(&m, NULL, NULL);
        } else if (!(is_part(name, "run") || is_part(name, "no_room") ? lead_run : lead_forever)(&m, &err))
            status = EXIT_FAILED;
    } else
        status = EXIT_FAILED;
    if (opened) model_close(&m);
    if (leads && err.text[0] && !is_interrupt(&err)) print_message("%s", err.text);
    if (leads && is_interrupt(&err)) status = EXIT_INTERRUPTED;
    lead_end(status);
    uint64_t all[MAX_SHARDS] = {0};
    if (is_part(name, "run")) {
        processes_gather(&record.hash, all, sizeof *all);
        for (int r = 0; leads && r < processes.count; r++)
            if (all[r] != all[0]) printf("rank %d computed something else\n", r);
        if (leads)
            printf("%s%s%s%s\n", record.batches > 300 ? "batches, " : "", record.copies > 4 ? "copies, " : "",
                   record.drawn > 100 ? "draws, " : "", record.starts == 2 ? "starts" : "");
    }
    if (leads) printf("status %d\n", status);
    fflush(stdout);
    processes_end();
    return status;
}

// ---- the test -------------------------------------------------------------------------------------------------------

#ifndef MPIRUN
#define MPIRUN "mpirun"
#endif

static const char *self;

// mpirun at work, what it prints goes to files.
typedef struct {
    pid_t pid;
    char out[300], err[300];
} Job;

static Job start_job(const char *ranks, const char *program, const char *const *args) {
    const char *argv[MAX_ARGS] = {MPIRUN, "-n", ranks, "--oversubscribe", "--allow-run-as-root", program};
    Job job;
    for (int i = 0; i == 0 || args[i - 1]; i++) argv[6 + i] = args[i];
    snprintf(job.out, sizeof job.out, "%s/job.out", test_dir);
    snprintf(job.err, sizeof job.err, "%s/job.err", test_dir);
    write_file(job.out, NULL, 0);
    write_file(job.err, NULL, 0);
    fflush(NULL);
    job.pid = fork();
    if (job.pid < 0) die("fork");
    if (job.pid == 0) {
        redirect(0, "/dev/null", O_RDONLY);
        redirect(1, job.out, O_WRONLY | O_TRUNC);
        redirect(2, job.err, O_WRONLY | O_TRUNC);
        setenv("ASAN_OPTIONS", SANITIZER_OPTIONS ":detect_leaks=0", 1); // MPI's own
        alarm(MAX_SECONDS);
        execvp(argv[0], (char *const *)argv);
        _exit(127);
    }
    return job;
}

static Run end_job(const Job *job) {
    int status;
    while (waitpid(job->pid, &status, 0) < 0)
        if (errno != EINTR) die("waitpid");
    Run r = {.status = WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status)};
    r.out = read_whole(job->out, &r.n_out);
    r.err = read_whole(job->err, &r.n_err);
    return r;
}

static Run run_job(const char *ranks, const char *program, const char *const *args) {
    Job job = start_job(ranks, program, args);
    return end_job(&job);
}

static int lines_with(const char *text, const char *fragment) {
    int n = 0;
    for (const char *at = text; (at = strstr(at, fragment)); at++) n++;
    return n;
}

// The exit status, and a message that is there once.
static void check_job(Run *r, int status, const char *message) {
    if (r->status != status)
        test_fail("status %d, expected %d; stderr: %s", r->status, status, shown(r->err, r->n_err));
    else if (message && lines_with(r->err, message) != 1)
        test_fail("\"%s\" is %d times in \"%s\"", message, lines_with(r->err, message), shown(r->err, r->n_err));
    run_free(r);
}

static void check_part(const char *name, const char *path, int status, const char *message) {
    if (!test_wanted(name)) return;
    Run r = run_job("2", self, (const char *[]){name, path, NULL});
    check_job(&r, status, message);
    test_end(name);
}

static void test_followers_compute_what_rank_0_computes(void) {
    if (!test_wanted("followers_compute_what_rank_0_computes")) return;
    Run r = run_job("2", self, (const char *[]){"run", "", NULL});
    if (strcmp(r.out, "batches, copies, draws, starts\nstatus 0\n") != 0)
        test_fail("printed \"%s\"; stderr: %s", shown(r.out, r.n_out), shown(r.err, r.n_err));
    check_job(&r, EXIT_DONE, NULL);
    test_end("followers_compute_what_rank_0_computes");
}

// The pid that a rank has printed, once it has.
static pid_t pid_of(const Job *job, int rank) {
    char key[32];
    snprintf(key, sizeof key, "pid of rank %d: ", rank);
    for (int i = 0; i < 100 * MAX_SECONDS; i++) {
        size_t n;
        char *text = read_whole(job->err, &n), *at = strstr(text, key);
        pid_t pid = at && strchr(at, '\n') ? (pid_t)atoi(at + strlen(key)) : 0;
        free(text);
        if (pid) return pid;
        nanosleep(&(struct timespec){0, 10000000}, NULL);
    }
    test_fail("%s never came", key);
    return 0;
}

// (Who has ended, and is nobody's child any more, may be waiting for its last reader.)
static bool still_runs(pid_t pid) {
    char path[64], state = 0;
    snprintf(path, sizeof path, "/proc/%d/stat", (int)pid);
    FILE *f = fopen(path, "r");
    if (!f) return false;
    bool known = fscanf(f, "%*d (%*[^)]) %c", &state) == 1;
    fclose(f);
    return known && state != 'Z' && state != 'X';
}

static bool ends(pid_t pid) {
    for (int i = 0; i < 1000 && still_runs(pid); i++) nanosleep(&(struct timespec){0, 10000000}, NULL);
    return !still_runs(pid);
}

// A signal to a rank (-1: to mpirun, as Ctrl-C) while all compute: then all end, and are gone. status: mpirun's; -1:
// its own affair, rank 0 has ended as one that is interrupted.
static void check_signal(const char *name, int rank, int number, int status, const char *message) {
    if (!test_wanted(name)) return;
    Job job = start_job("2", self, (const char *[]){"forever", "", NULL});
    pid_t pids[2] = {pid_of(&job, 0), pid_of(&job, 1)};
    if (pids[0] && pids[1]) {
        kill(rank < 0 ? job.pid : pids[rank], number);
        Run r = end_job(&job);
        if (status < 0 && (r.status == 0 || strcmp(r.out, "status 130\n") != 0))
            test_fail("status %d, printed \"%s\"", r.status, shown(r.out, r.n_out));
        check_job(&r, status < 0 ? r.status : status, message);
        for (int i = 0; i < 2; i++)
            if (!ends(pids[i])) test_fail("rank %d still runs", i);
    } else {
        kill(job.pid, SIGKILL);
        Run r = end_job(&job);
        run_free(&r);
    }
    test_end(name);
}

// What the program itself says: built with MPI and without an engine for GPUs it has flags,
// and nothing to compute with.
static void check_program(const char *name, const char *const *args, int status, const char *message) {
    if (!test_wanted(name)) return;
    char program[400];
    snprintf(program, sizeof program, "%.*s/llama-mpi", (int)(strrchr(self, '/') - self), self);
    Run r = run_job("2", program, args);
    if (status == EXIT_DONE) {
        if (lines_with(r.out, message) != 1)
            test_fail("printed \"%s\", expected one %s", shown(r.out, r.n_out), message);
        message = NULL;
    }
    check_job(&r, status, message);
    test_end(name);
}

// mpirun ends at once, and says so, where it cannot start anything.
static bool have_mpirun(void) {
    Run r = run_job("1", "true", (const char *[]){NULL});
    bool ok = r.status == 0;
    run_free(&r);
    return ok;
}

int main(int argc, char **argv) {
    self = argv[0];
    if (argc > 1) return run_part(argv[1], argv[2]);
    if (strcmp(processes_library, "no MPI") == 0) {
        test_skip("processes", "the build found no mpicc (libopenmpi-dev, or MPICC)");
        return tests_summary();
    }
    program_setup();
    if (!have_mpirun()) {
        test_skip("processes", "there is no " MPIRUN);
        return tests_summary();
    }
    size_t n;
    char *other = read_whole("model/stories.bin", &n);
    size_t data = 8 + (size_t)(uint8_t)other[0] + ((size_t)(uint8_t)other[1] << 8) + ((size_t)(uint8_t)other[2] << 16);
    other[data + 5] ^= 1; // of the first number
    write_file(temporary("other.bin"), other, n);
    free(other);

    test_followers_compute_what_rank_0_computes();
    check_part("other_file", temporary("other.bin"), EXIT_FAILED,
               "llama: rank 1 has another model than rank 0, expected the same file\n");
    check_part("no_file", "/no/such/file", EXIT_FAILED, "llama: rank 1: /no/such/file: No such file or directory\n");
    check_part("other_program", "", EXIT_FAILED,
               "llama: rank 1 is llama 0.1, expected llama 0.2 (commit 1) as rank 0\n");
    check_part("no_room", "", EXIT_FAILED, "llama: rank 1: there is no room\n");
    check_part("follower_fails", "", EXIT_FAILED, "llama: rank 1: it broke\n");
    check_part("leader_fails", "", EXIT_FAILED, "llama: rank 0: it broke\n");
    check_signal("follower_is_killed", 1, SIGKILL, 128 + SIGKILL, NULL);
    check_signal("leader_is_killed", 0, SIGKILL, 128 + SIGKILL, NULL);
    check_signal("follower_is_interrupted", 1, SIGINT, EXIT_INTERRUPTED, "llama: rank 1: interrupted\n");
    check_signal("leader_is_interrupted", 0, SIGINT, EXIT_INTERRUPTED, NULL);
    check_signal("all_are_interrupted", -1, SIGINT, -1, NULL);

    check_program("bad_usage_is_said_once", (const char *[]){"--nonsense", NULL}, EXIT_USAGE,
                  "llama: unknown flag --nonsense");
    check_program("version_is_said_once", (const char *[]){"--version", NULL}, EXIT_DONE, "Open MPI");
    check_program("tokenize_is_for_rank_0",
                  (const char *[]){"model/stories.bin", "--tokenize", "-p", "Once upon a time", NULL}, EXIT_DONE, "\n");
    check_program("engine_cpu_is_refused", (const char *[]){"model/stories.bin", "-p", "x", "--engine", "cpu", NULL},
                  EXIT_USAGE, "llama: --engine cpu computes in one process, 2 were started\n");
    if (!model_has_engine("cublas")) {
        check_program("no_engine_for_gpus", (const char *[]){"model/stories.bin", "-p", "x", NULL}, EXIT_USAGE,
                      "llama: 2 processes were started, but this build has no engine for GPUs, only: cpu\n");
    }
    return tests_summary();
}
