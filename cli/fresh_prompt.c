#define _GNU_SOURCE // pipe2
#include "fresh_prompt.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "interrupt.h"

extern char **environ;

enum { MAX_ARGUMENTS = 32, FIRST_BYTES = 1 << 16 };
static const char PROGRAM[] = "/proc/self/exe";

// The other process, and what it writes to standard output and standard error: as much as fits.
typedef struct {
    pid_t pid;
    int output; // the end of the pipe that is read
    char text[FIRST_BYTES + 1];
} Fresh;

typedef struct {
    const char *list[MAX_ARGUMENTS + 1]; // ended by NULL
    int n;
} Arguments;

static void add(Arguments *a, const char *flag, const char *value) {
    if (!value) return;
    if (flag) a->list[a->n++] = flag;
    a->list[a->n++] = value;
}

// prompt: ids as text. numbers: room for two.
static Arguments arguments_of(const Options *o, const char *engine, const char *prompt, char (*numbers)[16]) {
    Arguments a = {.n = 0};
    add(&a, NULL, "llama");
    add(&a, "-m", o->model);
    add(&a, "--synthetic", o->synthetic);
    add(&a, "--weights", o->weights);
    add(&a, "--output-weights", o->output_weights);
    add(&a, "--engine", engine);
    add(&a, "--precision", o->precision);
    if (o->threads) {
        snprintf(numbers[0], sizeof numbers[0], "%d", o->threads);
        add(&a, "-t", numbers[0]);
    }
    if (o->gpus > 1) {
        snprintf(numbers[1], sizeof numbers[1], "%d", o->gpus);
        add(&a, "--gpus", numbers[1]);
    }
    add(&a, "-p", prompt);
    add(&a, "-n", "1");
    add(&a, NULL, "--ids");
    add(&a, NULL, "--ignore-eos");
    add(&a, NULL, "--quiet");
    add(&a, NULL, "--json");
    return a;
}

// Different tokens that every vocabulary has.
static char *prompt_of(int tokens) {
    char *text = malloc((size_t)tokens * 4 + 1);
    size_t n = 0;
    for (int i = 0; text && i < tokens; i++) n += (size_t)snprintf(text + n, 5, "%d ", 1 + i * 31 % 199);
    return text;
}

static bool start(Fresh *f, const Arguments *a, Error *err) {
    int pipe_ends[2];
    posix_spawn_file_actions_t actions;
    if (pipe2(pipe_ends, O_CLOEXEC) != 0) return fail(err, "a pipe to another process: %s", strerror(errno));
    int status = posix_spawn_file_actions_init(&actions);
    if (status == 0) {
        status = posix_spawn_file_actions_addopen(&actions, STDIN_FILENO, "/dev/null", O_RDONLY, 0);
        if (status == 0) status = posix_spawn_file_actions_adddup2(&actions, pipe_ends[1], STDOUT_FILENO);
        if (status == 0) status = posix_spawn_file_actions_adddup2(&actions, pipe_ends[1], STDERR_FILENO);
        if (status == 0) status = posix_spawn(&f->pid, PROGRAM, &actions, NULL, (char *const *)a->list, environ);
        posix_spawn_file_actions_destroy(&actions);
    }
    close(pipe_ends[1]);
    f->output = pipe_ends[0];
    if (status == 0) return true;
    close(f->output);
    return fail(err, "%s: %s", PROGRAM, strerror(status));
}

// Reads all that the other process writes, and waits for its end: its status. A signal to this one goes on to it.
static int finish(Fresh *f) {
    char rest[4096];
    size_t n = 0;
    int status = 0;
    for (bool told = false;;) {
        if (interrupted && !told) kill(f->pid, SIGTERM), told = true;
        ssize_t got =
            n < FIRST_BYTES ? read(f->output, f->text + n, FIRST_BYTES - n) : read(f->output, rest, sizeof rest);
        if (got > 0 && n < FIRST_BYTES) n += (size_t)got;
        if (got == 0 || (got < 0 && errno != EINTR)) break;
    }
    f->text[n] = '\0';
    close(f->output);
    while (waitpid(f->pid, &status, 0) < 0 && errno == EINTR) continue;
    return status;
}

// The message of a program that failed: its first line, without its name.
static bool fail_as_it_did(Fresh *f, int status, Error *err) {
    static const char name[] = "llama: ";
    char *line = f->text + (strncmp(f->text, name, sizeof name - 1) == 0 ? sizeof name - 1 : 0);
    line[strcspn(line, "\n")] = '\0';
    if (*line) return fail(err, "%s", line);
    if (WIFSIGNALED(status)) return fail(err, "a process of its own ended by signal %d", WTERMSIG(status));
    return fail(err, "a process of its own ended with status %d and no message", WEXITSTATUS(status));
}

bool fresh_prompt(const Options *o, const char *engine, int tokens, double *seconds, Error *err) {
    static const char key[] = "\"first_token_ms\": ";
    char numbers[2][16], *prompt = prompt_of(tokens);
    if (!prompt) return fail(err, "out of memory: %d tokens", tokens);
    Arguments a = arguments_of(o, engine, prompt, numbers);
    Fresh f = {.pid = 0};
    bool ok = start(&f, &a, err);
    free(prompt);
    if (!ok) return false;
    int status = finish(&f);
    if (interrupted) return fail_interrupted(err);
    if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) return fail_as_it_did(&f, status, err);
    const char *at = strstr(f.text, key);
    if (!at) return fail(err, "a process of its own wrote no %.*s", (int)sizeof key - 3, key);
    *seconds = strtod(at + sizeof key - 1, NULL) * 1e-3;
    return true;
}
