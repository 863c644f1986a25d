// --prompts: many prompts in a file, a JSON object on each line, and how each of them is answered.
#ifndef PROMPTS_H
#define PROMPTS_H

#include "../model/generate/generate.h"
#include "../tokenizer/chat.h"
#include "flags.h"

// A line that is not empty.
typedef struct {
    int number;         // in the file, from 1
    char *error;        // why it has no answer; NULL: it has one
    Bytes other;        // keys that are none of ours: ", " and key and value as they were written, for each
    const char **stops; // its own stop texts, which are in Prompts.file; NULL: none of its own
} PromptLine;

typedef struct {
    Bytes file;        // strings are decoded in place
    PromptLine *lines; // [n]
    Sequence *seqs;    // [n_seqs]: of the lines without an error, in their order; index is the line's in lines
    int n, n_seqs, capacity;
    Chat chat; // the template; tokenizer NULL: no line has messages
} Prompts;

// Reads --prompts. Each line has {"text": "..."}, {"ids": [1, 2]} or {"messages": [{"role": "user", "content":
// "..."}]}, of which --system and --date begin those that have no system message. n, temp, top_k, top_p, min_p, seed,
// stop, repetition_penalty and logprobs come before the command line's flags of these names; other keys come back with
// the answer, and a note on standard error says so once for each (not with --quiet). A line that cannot be answered has
// its error and as many of its keys as could be read. False: not even that. p: to be freed after a failure, too, and
// not to be moved.
bool prompts_read(const Options *o, const Model *m, Prompts *p, Error *err);
// The same, of what p->file holds; a NUL follows its bytes.
bool prompts_parse(const Options *o, const Model *m, Prompts *p, Error *err);
void prompts_free(Prompts *p);

#endif
