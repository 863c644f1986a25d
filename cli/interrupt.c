#define _GNU_SOURCE // pipe2
#include "interrupt.h"

#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <string.h>
#include <unistd.h>

volatile sig_atomic_t interrupted;
int interrupt_pipe = -1;
static volatile sig_atomic_t ending; // one that is not forgotten
static int wake = -1;                // its other end
volatile sig_atomic_t interrupt_stop_wanted;

static void on_interrupt(int signal_number) {
    int before = errno;
    if (signal_number != SIGINT) ending = signal_number;
    interrupted = signal_number;
    if (wake >= 0 && write(wake, "", 1) < 0) interrupted = signal_number; // a full pipe can be read, too
    errno = before;
}

static void install(int signal_number, int flags) {
    struct sigaction action = {.sa_handler = on_interrupt, .sa_flags = flags};
    sigaction(signal_number, &action, NULL);
}

static void on_stop(int signal_number) {
    int before = errno;
    interrupt_stop_wanted = signal_number;
    if (wake >= 0 && write(wake, "", 1) < 0) interrupt_stop_wanted = signal_number; // as above
    errno = before;
}

void interrupt_catch_stop(bool caught) {
    struct sigaction action = {.sa_handler = on_stop, .sa_flags = SA_RESTART}, now;
    sigaction(SIGTSTP, NULL, &now);
    if (now.sa_handler == SIG_IGN) return; // a shell without jobs: nobody could let it go on
    if (!caught) action.sa_handler = SIG_DFL;
    sigaction(SIGTSTP, &action, NULL);
}

void interrupt_stop(void) {
    interrupt_stop_wanted = 0;
    raise(SIGSTOP);
}

void interrupt_begin(void) {
    install(SIGINT, (int)SA_RESETHAND);
    install(SIGTERM, (int)SA_RESETHAND);
    signal(SIGPIPE, SIG_IGN); // a closed pipe is then an error of write, with a message and a status
    signal(SIGXFSZ, SIG_IGN); // so is a file that reaches the limit of its size
}

void interrupt_catch_hangup(void) {
    struct sigaction now;
    sigaction(SIGHUP, NULL, &now);
    if (now.sa_handler != SIG_IGN) install(SIGHUP, (int)SA_RESETHAND); // ignored: nohup asks for that
}

bool interrupt_begin_chat(Error *err) {
    int ends[2];
    if (pipe2(ends, O_CLOEXEC | O_NONBLOCK) != 0) return fail(err, "a pipe: %s", strerror(errno));
    interrupt_pipe = ends[0];
    wake = ends[1];
    static const int signals[] = {SIGINT, SIGTERM, SIGHUP, SIGQUIT};
    for (int i = 0; i < 4; i++) install(signals[i], SA_RESTART);
    return !interrupted || fail_interrupted(err); // one that came before the pipe would be missed
}

void interrupt_forget(void) {
    interrupted = 0; // in this order: one that comes in between is not lost
    if (ending) interrupted = ending;
}

void interrupt_spare_writes(void) {
    static const int signals[] = {SIGINT, SIGTERM};
    for (int i = 0; i < 2; i++) {
        struct sigaction action;
        sigaction(signals[i], NULL, &action);
        action.sa_flags |= (int)SA_RESTART;
        sigaction(signals[i], &action, NULL);
    }
}
