// What a user sees: JSON and statistics.
#ifndef OUTPUT_H
#define OUTPUT_H

#include "../model/file/quantize.h"
#include "../model/generate/generate.h"
#include "flags.h"
#include "prompts.h"
#include "terminal_text.h"

// Flushes standard output: a full disk or a closed pipe is a failure, not a shorter answer.
bool flush_output(Error *err);
// Bytes as the inside of a JSON string. What is not UTF-8 becomes U+FFFD, one for each maximal part of a character.
void write_json_text(FILE *out, const char *data, size_t n);

// A line on standard error, `llama: ` before it and a newline after. It begins on a line of its own, and a terminal
// gets no control characters of the texts in it.
void print_message(const char *format, ...) __attribute__((format(printf, 1, 2)));
// Before a line that is printed piece by piece.
void begin_message(void);

// The end of a line of JSON: keys that come back with it (NULL: none), of which strings escape control characters.
void end_json_object(const Bytes *other);
// A finished sequence as one line of JSON. other: keys that come back with it; NULL: none. ready: seconds from the
// program's start to the model's.
bool print_sequence(Sequence *seq, const Model *m, const Bytes *other, double ready, Error *err);
// In its place what is wrong with a line of --prompts. index: among the lines, from 0.
bool print_line_error(int index, const PromptLine *line, Error *err);
// What --quantize has written: a line on standard error and, with --json, an object with each matrix's error.
void print_quantised(const QuantizeSummary *summary, const Model *m, const Options *o, double seconds);
// On standard error, for --verbose: what was loaded, and where it runs.
void print_model(const Model *m, const Options *o);
// The same, where candidates come from, and at the end how many were right.
void print_speculation(const Speculation *s);
void print_speculation_counts(const Speculation *s, const SpeculationCounts *counts);
// On standard error: how long it took.
void print_statistics(const Model *m, const Options *o, const Sequence *seq, double ready);
// On standard error, for --verbose: how many tokens of the prompts were computed for others, and how often sequences
// left the cache for lack of pages.
void print_sharing(const Sequence *seqs, int n);
// The flag that sets kv_longest: --kv-memory where its pages are fewer than the context has.
const char *context_flag(const KVCache *kv);
// On standard error, where an answer ended before its end id: at -n, or in a full context, after which `hint` comes;
// NULL: the flag that sets it.
void print_length_note(const Options *o, const Sequence *seq, const KVCache *kv, const char *hint);
// On standard error, where nobody has compared the chat format with the checkpoint's template.
void print_chat_note(const Model *m);
// The end of such a line: what computed.
void print_engine(const Model *m, const Options *o);
// Whether standard error may have colour: a terminal, and NO_COLOR (https://no-color.org) is not set.
bool use_colour(void);
// Model.progress on a terminal: one line with a bar, the rate and the time left, gone when it is done.
void show_progress(const char *what, uint64_t done, uint64_t total);
// The same line for the answers to n prompts, which began at `begin` on the clock. The time left is that of answers of
// the largest length.
void show_answers(const Sequence *seqs, int n, double begin);
// Takes that line away where its work ended early.
void clear_progress(void);

#endif
