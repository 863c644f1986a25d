// What a user gives: prompts as text, as ids or many in a file.
#ifndef INPUT_H
#define INPUT_H

#include "../model/generate/generate.h"
#include "../tokenizer/chat.h"
#include "flags.h"

// A whole file; - is standard input.
bool read_file(Bytes *b, const char *path, Error *err);
// What -p or -f says.
bool read_prompt(const Options *o, Bytes *b, Error *err);
// Ids separated by white space or commas, in brackets or without: 1 2 3, or [1, 2, 3].
bool parse_ids(const char *text, size_t n, int vocab_size, TokenList *ids, Error *err);
// The ids of the prompt. Text gets one BOS, unless its special tokens begin with one, or with --tokenize.
bool encode_prompt(const Options *o, const Model *m, const Bytes *text, TokenList *ids, Error *err);
// Refuses a text that no context of this model could hold, however it splits, before minutes are spent on splitting it.
// what: its name in the message. With --tokenize any length is right.
bool check_prompt_bytes(const Options *o, const Model *m, size_t n, const char *what, Error *err);
// The chat template of the model's file. Refuses a model without one, and a --date that it has no place for.
bool open_chat(const Options *o, const Model *m, Chat *chat, Error *err);
// The ids of a conversation that a message of the user begins, --system and --date before it, up to the answer.
bool encode_message(const Options *o, const Chat *chat, const Bytes *text, TokenList *ids, Error *err);
// A prompts file: on every line that is not empty {"text": "..."}, {"ids": [1, 2]} or {"messages": [{"role": "user",
// "content": "..."}]}, of which --system and --date begin those that have no system message. Decoded in place; a NUL
// follows the file's bytes. chat: opened at the first line with messages, and left alone where there is none. *seqs [n]
// is the caller's to free, also after a failure.
bool parse_prompts(const Options *o, const Model *m, Bytes *file, Chat *chat, Sequence **seqs, int *n, Error *err);

#endif
