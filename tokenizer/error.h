// One line that says what went wrong: functions that can fail return false (or NULL) and leave it here.
#ifndef ERROR_H
#define ERROR_H

#include <stdbool.h>

typedef struct {
    char text[512];
} Error;

// Writes the message, unless one is there already (the first cause is the one worth reading), and returns false.
bool fail(Error *err, const char *format, ...) __attribute__((format(printf, 2, 3)));

// The one failure that is nobody's fault: the user had enough. It says so and is not printed.
bool fail_interrupted(Error *err);
bool is_interrupt(const Error *err);
// Whether there was no memory: such a message begins with "out of memory".
bool is_out_of_memory(const Error *err);

#endif
