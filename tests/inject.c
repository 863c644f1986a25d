// Loaded before the C library (LD_PRELOAD): makes one call of a run go wrong. INJECT=KIND:K says which, and
// INJECT_COUNT names a file that tells, at the end, how many calls of that kind the run made. Calls are counted from
// main on.
//   alloc        allocation K fails            allocs       and all that follow
//   short        read K gives one byte         eintr        read K is interrupted
//   eio          read K fails                  end          read K is at the end of the file
//   truncate     before read K of a file at an offset the file is cut in half
//   rewrite      before read K of a file at an offset the file's last byte is written anew
//   enospc       write K to standard output finds the disk full, and so do all that follow
//   epipe        write K to standard output finds nobody reading
//   thread       thread K cannot be started    threads      nor can any that follows
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

extern void *__libc_malloc(size_t n);
extern void *__libc_calloc(size_t n, size_t size);
extern void *__libc_realloc(void *p, size_t n);
extern void *__libc_memalign(size_t alignment, size_t n);

static const char *kind = "";
static long wanted;
static atomic_long calls;
static atomic_bool armed;

static bool is(const char *name) {
    return strcmp(kind, name) == 0;
}

// Counts a call; true for the one that is to go wrong. after: and for all that follow.
static bool now(bool after) {
    if (!armed) return false;
    long call = ++calls;
    return wanted > 0 && (call == wanted || (after && call > wanted));
}

// ---- memory ---------------------------------------------------------------------------------------------------------

static bool no_memory(void) {
    if (!((is("alloc") || is("allocs")) && now(is("allocs")))) return false;
    errno = ENOMEM;
    return true;
}

void *malloc(size_t n) {
    return no_memory() ? NULL : __libc_malloc(n);
}

void *calloc(size_t n, size_t size) {
    return no_memory() ? NULL : __libc_calloc(n, size);
}

void *realloc(void *p, size_t n) {
    return no_memory() ? NULL : __libc_realloc(p, n);
}

int posix_memalign(void **p, size_t alignment, size_t n) {
    *p = no_memory() ? NULL : __libc_memalign(alignment, n);
    return *p ? 0 : ENOMEM;
}

// ---- reading --------------------------------------------------------------------------------------------------------

// What a read gives in place of what it asked for: -2: nothing of ours, -1: errno is set, 0 the end. May shorten n.
static int instead_of_read(size_t *n) {
    if (is("short") && now(false)) *n = *n ? 1 : 0;
    if (is("end") && now(false)) return 0;
    if (is("eintr") && now(false)) return errno = EINTR, -1;
    if (is("eio") && now(false)) return errno = EIO, -1;
    return -2;
}

ssize_t read(int fd, void *to, size_t n) {
    static ssize_t (*next)(int, void *, size_t);
    if (!next) next = (ssize_t(*)(int, void *, size_t))dlsym(RTLD_NEXT, "read");
    int instead = instead_of_read(&n);
    return instead > -2 ? instead : next(fd, to, n);
}

// Changes the file behind the program's back.
static void change_file(int fd) {
    char path[32];
    struct stat info;
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    if (fstat(fd, &info) != 0) abort();
    if (is("truncate") && now(false) && truncate(path, info.st_size / 2) != 0) abort();
    if (is("rewrite") && now(false)) {
        int out = open(path, O_WRONLY);
        if (out < 0 || pwrite(out, "x", 1, info.st_size - 1) != 1 || close(out) != 0) abort();
    }
}

ssize_t pread(int fd, void *to, size_t n, off_t at) {
    static ssize_t (*next)(int, void *, size_t, off_t);
    if (!next) next = (ssize_t(*)(int, void *, size_t, off_t))dlsym(RTLD_NEXT, "pread");
    change_file(fd);
    int instead = instead_of_read(&n);
    return instead > -2 ? instead : next(fd, to, n, at);
}

// stdio reads and writes without these names: its streams become ones that do.
static ssize_t stream_read(void *fd, char *to, size_t n) {
    return read((int)(long)fd, to, n);
}

static ssize_t stream_write(void *fd, const char *from, size_t n) {
    if (is("enospc") && now(true)) return errno = ENOSPC, 0;
    if (is("epipe") && now(true)) return errno = EPIPE, 0;
    return write((int)(long)fd, from, n);
}

static int stream_close(void *fd) {
    return close((int)(long)fd);
}

FILE *fopen(const char *path, const char *mode) {
    if (mode[0] != 'r') return errno = EINVAL, NULL; // the program writes no files
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return NULL;
    return fopencookie((void *)(long)fd, "r", (cookie_io_functions_t){.read = stream_read, .close = stream_close});
}

// ---- threads --------------------------------------------------------------------------------------------------------

int pthread_create(pthread_t *id, const pthread_attr_t *attributes, void *(*body)(void *), void *argument) {
    static int (*next)(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);
    if (!next) *(void **)&next = dlsym(RTLD_NEXT, "pthread_create");
    bool fails = (is("thread") || is("threads")) && now(is("threads"));
    return fails ? EAGAIN : next(id, attributes, body, argument);
}

// ---- the beginning and the end --------------------------------------------------------------------------------------

static int (*program_main)(int, char **, char **);

// What comes behind the program is not its own: gcov's memory, say. (Standard output's last flush is.)
static void after_program(void) {
    if (is("alloc") || is("allocs")) armed = false;
}

static int counted_main(int argc, char **argv, char **env) {
    const char *inject = getenv("INJECT"), *colon = inject ? strchr(inject, ':') : NULL;
    if (!colon) return 125;
    kind = strndup(inject, (size_t)(colon - inject));
    wanted = atol(colon + 1);
    stdin = fopencookie((void *)0, "r", (cookie_io_functions_t){.read = stream_read});
    stdout = fopencookie((void *)1, "w", (cookie_io_functions_t){.write = stream_write});
    if (atexit(after_program) != 0) return 125;
    armed = true;
    return program_main(argc, argv, env);
}

int __libc_start_main(int (*main)(int, char **, char **), int argc, char **argv, void (*init)(void), void (*fini)(void),
                      void (*rtld_fini)(void), void *stack_end) {
    int (*next)(int (*)(int, char **, char **), int, char **, void (*)(void), void (*)(void), void (*)(void), void *);
    *(void **)&next = dlsym(RTLD_NEXT, "__libc_start_main");
    program_main = main;
    return next(counted_main, argc, argv, init, fini, rtld_fini, stack_end);
}

__attribute__((destructor)) static void tell(void) {
    armed = false;
    const char *path = getenv("INJECT_COUNT");
    int out = path ? open(path, O_WRONLY | O_CREAT | O_TRUNC, 0600) : -1;
    if (out >= 0 && dprintf(out, "%ld", (long)calls) < 0) abort();
}
