// SIGINT and SIGTERM: the first ends the work at hand in good order, a second one ends the program at once.
#ifndef INTERRUPT_H
#define INTERRUPT_H

#include <signal.h>

extern volatile sig_atomic_t interrupted;

// From here on signals are noticed: a read of a terminal or a pipe that waits ends with EINTR.
void interrupt_begin(void);
// For chat: notices signals as often as they come.
void interrupt_begin_again(void);
// From here on nothing is read, and a signal must not cut a write short.
void interrupt_spare_writes(void);

#endif
