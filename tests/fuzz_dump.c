// Fuzz target: the reader of reference dumps.
#include "fuzz.h"

#include "../model/measure/compare.h"

int LLVMFuzzerTestOneInput(const uint8_t *input, size_t n) {
    if (n > 1 << 15) return 0;
    Dump d;
    Error err = {""};
    bool ok = dump_open(&d, fuzz_file(input, n), 7, &err);
    must_explain(ok, &err);
    if (!ok) return 0;
    int longest = 0;
    for (int i = 0; i < d.n_prompts; i++) {
        const DumpPrompt *p = &d.prompts[i];
        MUST(p->n_prompt > 0 && p->n_tokens > 0 && p->n_rows <= p->n_tokens);
        for (int t = 0; t < p->n_tokens; t++) MUST(p->tokens[t] >= 0 && p->tokens[t] < 7);
        if (p->n_prompt + p->n_tokens > longest) longest = p->n_prompt + p->n_tokens;
        MUST(!p->text || strlen(p->text) == p->text_length);
    }
    MUST(dump_context(&d) == longest);
    dump_close(&d);
    return 0;
}
