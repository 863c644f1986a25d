// What every test program shares: named tests, one line each, and a closing count. The environment's ONLY is a part of
// the names of those to report; a test that takes long asks test_wanted before it begins.
#ifndef CHECK_H
#define CHECK_H

#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int tests_passed, tests_failed, tests_skipped;
static char test_failure[1024]; // why the test at hand has failed; empty: it has not

// Notes a failure of the test at hand; the first is the one that is printed.
__attribute__((format(printf, 1, 2), unused)) static void test_fail(const char *format, ...) {
    if (test_failure[0]) return;
    va_list args;
    va_start(args, format);
    vsnprintf(test_failure, sizeof test_failure, format, args);
    va_end(args);
}

// Whether the test of that name is to be run: ONLY is not set, or is part of the name.
__attribute__((unused)) static bool test_wanted(const char *name) {
    const char *only = getenv("ONLY");
    return !only || strstr(name, only);
}

#define CHECK(condition) \
    do { \
        if (!(condition)) test_fail("%s:%d: %s", __FILE__, __LINE__, #condition); \
    } while (0)

// Ends the test at hand: `ok NAME` or `FAIL NAME: why`; nothing if it was not wanted.
__attribute__((unused)) static void test_end(const char *name) {
    if (!test_wanted(name)) {
        test_failure[0] = 0;
        return;
    }
    if (test_failure[0]) {
        printf("FAIL %s: %s\n", name, test_failure);
        tests_failed++;
    } else {
        printf("ok %s\n", name);
        tests_passed++;
    }
    test_failure[0] = 0;
    fflush(stdout);
}

// Says that a test cannot run here, and why.
__attribute__((unused)) static void test_skip(const char *name, const char *why) {
    printf("SKIP %s: %s\n", name, why);
    tests_skipped++;
}

// The program's last line and its exit status.
__attribute__((unused)) static int tests_summary(void) {
    printf("%d passed, %d failed, %d skipped\n", tests_passed, tests_failed, tests_skipped);
    return tests_failed > 0;
}

#endif
