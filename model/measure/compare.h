// Reads an hf-greedy-dump/1 (scripts/dump_hf.py writes it) and compares a model's greedy decoding with it, token by
// token.
#ifndef COMPARE_H
#define COMPARE_H

#include <stdio.h>

#include "../model.h"

enum { DUMP_TOP = 5 };

typedef struct {
    const char *text; // NULL: the prompt exists only as ids
    size_t text_length;
    int n_prompt, n_tokens, n_rows; // P, N, k
    int32_t *prompt_ids;            // [P]
    int32_t *tokens;                // [N]: the greedy continuation
    int32_t *top_ids;               // [N][DUMP_TOP]
    float *top_logits;              // [N][DUMP_TOP], descending
    float *logits;                  // [k][vocab_size]: the first k steps in full
} DumpPrompt;

typedef struct {
    SafeTensors file;
    char *texts; // owns the prompts' texts
    bool float32;
    double noise; // the largest |Δlogit| between HuggingFace's own back ends; 0: not measured
    int n_prompts, vocab_size;
    DumpPrompt *prompts;
} Dump;

// Opens and checks a dump for a vocabulary of that size. On failure nothing is left open.
bool dump_open(Dump *dump, const char *path, int vocab_size, Error *err);
void dump_close(Dump *dump);
// The context that the longest of its runs needs.
int dump_context(const Dump *dump);

// Compares, and prints the report to out. *passed: false if a float32 comparison did not hold. Stops early, as a
// failure, when the model is interrupted.
bool compare_run(Model *model, const Dump *dump, FILE *out, bool *passed, Error *err);

#endif
