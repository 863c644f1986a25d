// --prompts: many prompts in a file, a JSON object on each line.
#ifndef PROMPTS_H
#define PROMPTS_H

#include "../model/generate/generate.h"
#include "../tokenizer/chat.h"
#include "flags.h"

// A prompts file: on every line that is not empty {"text": "..."}, {"ids": [1, 2]} or {"messages": [{"role": "user",
// "content": "..."}]}, of which --system and --date begin those that have no system message. Decoded in place; a NUL
// follows the file's bytes. chat: opened at the first line with messages, and left alone where there is none. *seqs [n]
// is the caller's to free, also after a failure.
bool parse_prompts(const Options *o, const Model *m, Bytes *file, Chat *chat, Sequence **seqs, int *n, Error *err);

#endif
