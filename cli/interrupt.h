// SIGINT and SIGTERM: the first ends the work at hand in good order, a second one ends the program at once.
#ifndef INTERRUPT_H
#define INTERRUPT_H

#include <signal.h>

#include "../tokenizer/error.h"

extern volatile sig_atomic_t interrupted; // the signal; 0: none came

// From here on signals are noticed: a read of a terminal or a pipe that waits ends with EINTR.
void interrupt_begin(void);
// A terminal that goes away interrupts, too: for a run that has a file to remove. Not where nohup has it ignored.
void interrupt_catch_hangup(void);
// For chat: from here on signals are noticed as often as they come, SIGHUP and SIGQUIT too: whoever reads a terminal
// puts it back first. interrupt_pipe can be read once one has come, whichever thread it came to. False: there is
// no pipe, or a signal has come already.
bool interrupt_begin_chat(Error *err);
extern int interrupt_pipe;
// Ctrl-Z while a terminal is not as the shell wants it: SIGTSTP is noticed, too (interrupt_stop_wanted,
// interrupt_pipe), and whoever has put the terminal back stops the program, until it is continued.
void interrupt_catch_stop(bool caught);
void interrupt_stop(void);
extern volatile sig_atomic_t interrupt_stop_wanted;
// Goes on after a SIGINT. The others stay: they end the program.
void interrupt_forget(void);
// From here on nothing is read, and a signal must not cut a write short.
void interrupt_spare_writes(void);

#endif
