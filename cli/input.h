// What a user gives: prompts as text, as ids or many in a file.
#ifndef INPUT_H
#define INPUT_H

#include "../model/generate/generate.h"
#include "flags.h"

// A whole file; - is standard input.
bool read_file(Bytes *b, const char *path, Error *err);
// What -p or -f says.
bool read_prompt(const Options *o, Bytes *b, Error *err);
// Ids separated by white space or commas.
bool parse_ids(const char *text, size_t n, int vocab_size, TokenList *ids, Error *err);
// The ids of the prompt. Text gets one BOS, unless its special tokens begin with one.
bool encode_prompt(const Options *o, const Model *m, const Bytes *text, TokenList *ids, Error *err);
// Refuses a text that no context of this model could hold, however it splits, before minutes are spent on splitting it.
// what: its name in the message.
bool check_prompt_bytes(const Model *m, size_t n, const char *what, Error *err);
// A prompts file, {"text": "..."} or {"ids": [1, 2]} on every line that is not empty. Decoded in place; a NUL follows
// the file's bytes. *seqs [n] is the caller's to free, also after a failure.
bool parse_prompts(const Options *o, const Model *m, Bytes *file, Sequence **seqs, int *n, Error *err);

#endif
