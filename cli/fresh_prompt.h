// The first prompt of a process: what somebody waits for who has just started the program.
#ifndef FRESH_PROMPT_H
#define FRESH_PROMPT_H

#include "flags.h"

// Starts this program anew, with the model of `options` and everything else that its speed depends on, on the named
// engine, and has it compute a prompt of so many tokens: seconds from the prompt's start to the first token. Fails with
// what the other process wrote, if that fails; an interrupt ends both.
bool fresh_prompt(const Options *options, const char *engine, int tokens, double *seconds, Error *err);

#endif
