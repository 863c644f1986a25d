// Writes the manual page; make install runs it. A program of its own, so that llama needs no flag for it.
#include "flags.h"

int main(void) {
    flags_print_manual(stdout);
    return fflush(stdout) != 0;
}
