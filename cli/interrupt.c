#include "interrupt.h"

#include <stddef.h>

volatile sig_atomic_t interrupted;

static void on_interrupt(int signal_number) {
    (void)signal_number;
    interrupted = 1;
}

static void install(int flags) {
    struct sigaction action = {.sa_handler = on_interrupt, .sa_flags = flags};
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
}

void interrupt_begin(void) {
    install((int)SA_RESETHAND);
    signal(SIGPIPE, SIG_IGN); // a closed pipe is then an error of write, with a message and a status
}

void interrupt_begin_again(void) {
    install(0);
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
