// What a user gives: prompts as text or as ids, and messages. (Many prompts in a file: prompts.h.)
#ifndef INPUT_H
#define INPUT_H

#include "../model/generate/generate.h"
#include "../tokenizer/chat.h"
#include "flags.h"

// How an answer is generated, as the flags say. chat: the template, of an answer in a conversation; NULL: it is in
// none.
GenerateConfig generate_config(const Options *o, const Chat *chat);
// What messages call a file: - is standard input.
const char *input_name(const char *path);
// A whole file; - is standard input.
bool read_file(Bytes *b, const char *path, Error *err);
// What -p or -f says. Of a file or standard input that is continued or chatted with, the line end of the last line, \n
// or \r\n, is not part of the prompt; --verbose reports it.
bool read_prompt(const Options *o, Bytes *b, Error *err);
// Ids separated by white space or commas, in brackets or without: 1 2 3, or [1, 2, 3].
bool parse_ids(const char *text, size_t n, int vocab_size, TokenList *ids, Error *err);
// The ids of the prompt. Text gets one BOS, unless its special tokens begin with one, or with --tokenize.
bool encode_prompt(const Options *o, const Model *m, const Bytes *text, TokenList *ids, Error *err);
// Refuses a text that no context of this model could hold, however it splits, before minutes are spent on splitting it.
// what: its name in the message. With --tokenize any length is right.
bool check_prompt_bytes(const Options *o, const Model *m, size_t n, const char *what, Error *err);
// Refuses a prompt that the context, of so many tokens, has no room for, and an empty one. is_ids: it was given as ids.
bool check_prompt(const Options *o, const Sequence *seq, int context, bool is_ids, Error *err);
// Refuses one that the cache of a started model would never have pages for, with the new tokens that it may get; of an
// answer without a limit with one of them.
bool check_pages(const Model *m, const Sequence *seq, Error *err);
// Where a text has that of a special token in it: says once in a run, on standard error, that these are ordinary
// characters. Not with --quiet. message: it is one of a conversation, where special tokens are the template's; any
// other text has its own with --special.
void hint_special(const Options *o, const Tokenizer *t, const Bytes *text, bool message);
// The chat template of the model's file. Refuses a model without one, and a --date that it has no place for.
bool open_chat(const Options *o, const Model *m, Chat *chat, Error *err);
// The ids of a conversation that a message of the user begins, --system and --date before it, up to the answer.
bool encode_message(const Options *o, const Chat *chat, const Bytes *text, TokenList *ids, Error *err);

#endif
