// Runs the program under test ($LLAMA, or ./llama) as a user would and keeps what came out. For the end-to-end tests.
#ifndef PROGRAM_H
#define PROGRAM_H

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "check.h"

// A sanitizer that finds something ends the program with a status that is none of its own.
enum { SANITIZER_STATUS = 99, MAX_ARGS = 48, MAX_SECONDS = 180 };
#define SANITIZER_OPTIONS "exitcode=99:detect_leaks=1:abort_on_error=0:allocator_may_return_null=1"
#if defined(__SANITIZE_ADDRESS__)
enum { SANITIZED = 1 };
#else
enum { SANITIZED = 0 };
#endif

typedef enum { STDOUT_KEPT, STDOUT_FULL, STDOUT_NO_READER, STDOUT_CLOSED } StdoutKind;

typedef struct {
    const char *input; // standard input; NULL: empty
    size_t n_input;
    bool input_closed; // there is no standard input
    StdoutKind out;
    size_t memory; // a limit on the address space; 0: none
} Io;

typedef struct {
    int status;      // the exit status, or minus the signal
    char *out, *err; // with a NUL behind
    size_t n_out, n_err;
} Run;

static const char *injected_library; // to be loaded before the program; NULL: none
static char test_dir[256];           // for temporary files; removed at exit

__attribute__((unused)) static const char *program_path(void) {
    const char *path = getenv("LLAMA");
    return path && *path ? path : "./llama";
}

static void remove_dir(void) {
    char command[320];
    snprintf(command, sizeof command, "rm -rf '%s'", test_dir);
    if (test_dir[0] && system(command) != 0) fprintf(stderr, "%s is left behind\n", test_dir);
}

static void die(const char *what) {
    printf("FAIL %s: %s\n", what, strerror(errno));
    exit(1);
}

// The path of a temporary file of that name; four are valid at a time.
__attribute__((unused)) static const char *temporary(const char *name) {
    static char paths[4][384];
    static int next;
    char *path = paths[next++ % 4];
    snprintf(path, sizeof *paths, "%s/%s", test_dir, name);
    return path;
}

// To be called first. One thread: the models of these tests are too small to share, and the machine may be busy.
__attribute__((unused)) static void program_setup(void) {
    const char *base = getenv("TMPDIR");
    snprintf(test_dir, sizeof test_dir, "%s/llama-test-XXXXXX", base && *base && strlen(base) < 200 ? base : "/tmp");
    if (!mkdtemp(test_dir)) die("a temporary directory");
    atexit(remove_dir);
    signal(SIGPIPE, SIG_IGN);
    setenv("ASAN_OPTIONS", SANITIZER_OPTIONS, 1);
    setenv("UBSAN_OPTIONS", SANITIZER_OPTIONS, 1);
    setenv("OMP_NUM_THREADS", "1", 1);
    setenv("LC_ALL", "C", 1);
    if (access(program_path(), X_OK) != 0) die(program_path());
}

__attribute__((unused)) static void write_file(const char *path, const void *data, size_t n) {
    FILE *out = fopen(path, "wb");
    if (!out || (n && fwrite(data, 1, n, out) != n) || fclose(out) != 0) die(path);
}

__attribute__((unused)) static char *read_whole(const char *path, size_t *n) {
    FILE *in = fopen(path, "rb");
    if (!in) die(path);
    fseek(in, 0, SEEK_END);
    *n = (size_t)ftell(in);
    rewind(in);
    char *data = malloc(*n + 1);
    if (!data || fread(data, 1, *n, in) != *n) die(path);
    data[*n] = 0;
    fclose(in);
    return data;
}

__attribute__((unused)) static void run_free(Run *r) {
    free(r->out);
    free(r->err);
    *r = (Run){0};
}

// In the child: the program takes its place. SIGALRM ends one that hangs.
static void exec_program(const char *const *args) {
    const char *argv[MAX_ARGS + 2] = {program_path()};
    int n = 1;
    for (; args[n - 1] && n <= MAX_ARGS; n++) argv[n] = args[n - 1];
    argv[n] = NULL;
    struct rlimit no_core = {0, 0};
    setrlimit(RLIMIT_CORE, &no_core);
    signal(SIGPIPE, SIG_DFL);
    alarm(MAX_SECONDS);
    if (injected_library) setenv("LD_PRELOAD", injected_library, 1);
    execv(program_path(), (char *const *)argv);
    _exit(127);
}

static void redirect(int fd, const char *path, int flags) {
    int from = open(path, flags, 0600);
    if (from < 0 || dup2(from, fd) < 0) _exit(126);
    close(from);
}

// Runs the program with a NULL-terminated list of arguments.
__attribute__((unused)) static Run run_args(const Io *io, const char *const *args) {
    char in[300], out[300], err[300];
    snprintf(in, sizeof in, "%s/stdin", test_dir);
    snprintf(out, sizeof out, "%s/stdout", test_dir);
    snprintf(err, sizeof err, "%s/stderr", test_dir);
    write_file(in, io ? io->input : NULL, io ? io->n_input : 0);
    write_file(out, NULL, 0);
    StdoutKind kind = io ? io->out : STDOUT_KEPT;
    fflush(NULL);
    pid_t child = fork();
    if (child < 0) die("fork");
    if (child == 0) {
        redirect(0, in, O_RDONLY);
        if (io && io->input_closed) close(0);
        redirect(2, err, O_WRONLY | O_CREAT | O_TRUNC);
        if (kind == STDOUT_KEPT) redirect(1, out, O_WRONLY | O_TRUNC);
        if (kind == STDOUT_FULL) redirect(1, "/dev/full", O_WRONLY);
        if (kind == STDOUT_CLOSED) close(1);
        if (kind == STDOUT_NO_READER) {
            int ends[2];
            if (pipe(ends) != 0 || dup2(ends[1], 1) < 0) _exit(126);
            close(ends[0]);
            close(ends[1]);
        }
        if (io && io->memory) {
            struct rlimit limit = {io->memory, io->memory};
            setrlimit(RLIMIT_AS, &limit);
        }
        exec_program(args);
    }
    int status;
    while (waitpid(child, &status, 0) < 0)
        if (errno != EINTR) die("waitpid");
    Run r = {.status = WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status)};
    r.out = read_whole(out, &r.n_out);
    r.err = read_whole(err, &r.n_err);
    return r;
}

__attribute__((unused, sentinel)) static Run run_program(const Io *io, ...) {
    const char *args[MAX_ARGS + 1];
    int n = 0;
    va_list list;
    va_start(list, io);
    while (n < MAX_ARGS && (args[n] = va_arg(list, const char *))) n++;
    args[n] = NULL;
    va_end(list);
    return run_args(io, args);
}

// Printable and short, for messages: what is not becomes '?'.
__attribute__((unused)) static const char *shown(const char *text, size_t n) {
    static char lines[4][240];
    static int next;
    char *line = lines[next++ % 4];
    size_t most = sizeof *lines - 1, kept = n < most ? n : most;
    for (size_t i = 0; i < kept; i++) line[i] = (unsigned char)text[i] < 0x20 || text[i] == 0x7F ? '?' : text[i];
    line[kept] = 0;
    return line;
}

// The program's exit status, and no sanitizer's report.
__attribute__((unused)) static bool check_status(const Run *r, int status) {
    if (r->status == status && !strstr(r->err, "Sanitizer") && !strstr(r->err, "runtime error:")) return true;
    if (r->status == -SIGALRM)
        test_fail("still running after %d s", MAX_SECONDS);
    else if (r->status < 0)
        test_fail("ended by signal %d, expected status %d", -r->status, status);
    else
        test_fail("status %d, expected %d; stderr: %s", r->status, status, shown(r->err, r->n_err));
    return false;
}

// It ended well: this on standard output, and with --quiet nothing on standard error.
__attribute__((unused)) static void check_output(const Run *r, const char *out, size_t n) {
    if (!check_status(r, 0)) return;
    if (r->n_out != n || memcmp(r->out, out, n) != 0)
        test_fail("printed \"%s\" (%zu bytes), expected \"%s\" (%zu)", shown(r->out, r->n_out), r->n_out, shown(out, n),
                  n);
}

// It failed: this status, nothing on standard output unless out says what, and one line on standard error with
// fragment.
__attribute__((unused)) static void check_failure(const Run *r, int status, const char *fragment, const char *out) {
    if (!check_status(r, status)) return;
    const char *newline = strchr(r->err, '\n');
    size_t n_out = out ? strlen(out) : 0;
    if (r->n_out != n_out || (n_out && memcmp(r->out, out, n_out) != 0))
        test_fail("standard output has \"%s\", expected \"%s\"", shown(r->out, r->n_out), out ? out : "");
    else if (!newline || newline != r->err + r->n_err - 1)
        test_fail("standard error has \"%s\", expected one line", shown(r->err, r->n_err));
    else if (strncmp(r->err, "llama: ", 7) != 0)
        test_fail("the message \"%s\" does not begin with \"llama: \"", shown(r->err, r->n_err));
    else if (!strstr(r->err, fragment))
        test_fail("the message is \"%s\", expected \"%s\" in it", shown(r->err, r->n_err - 1), fragment);
    for (size_t i = 0; i + 1 < r->n_err; i++)
        if ((unsigned char)r->err[i] < 0x20) test_fail("byte 0x%02X in the message", r->err[i]);
}

#endif
