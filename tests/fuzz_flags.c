// Fuzz target: the command line, an argument a line.
#include "fuzz.h"

#include "../cli/flags.h"

int LLVMFuzzerTestOneInput(const uint8_t *input, size_t n) {
    enum { MOST = 64 };
    char *text = malloc(n + 1), *argv[MOST + 1] = {"llama"};
    int argc = 1;
    MUST(text);
    memcpy(text, input, n);
    text[n] = 0;
    for (char *at = text; *at && argc < MOST;) {
        argv[argc++] = at;
        at += strcspn(at, "\n");
        if (*at) *at++ = 0;
    }
    Options o = flags_default();
    Error err = {""};
    bool ok = flags_parse(&o, argc, argv, &err);
    must_explain(ok, &err);
    if (ok && flags_check(&o, &err)) {
        MUST(o.n >= 0 && o.context >= 0 && o.batch >= 0 && o.logprobs >= 0 && o.logprobs <= MAX_LOGPROBS);
        MUST(o.n_stops >= 0 && o.n_stops <= MAX_STOPS);
        for (int i = 0; i < o.n_stops; i++) MUST(o.stops[i][0]);
        MUST(o.sampler.temperature >= 0 && o.sampler.top_p >= 0 && o.sampler.top_p <= 1 && o.sampler.top_k >= 0);
        MUST(!o.model != !o.synthetic);
        FILE *shown = stderr; // the notes, of thousands of inputs, are nobody's
        MUST((stderr = fopen("/dev/null", "w")));
        flags_print_notes(&o);
        flags_print_greedy_notes(&o);
        fclose(stderr);
        stderr = shown;
    } else {
        must_explain(false, &err);
    }
    free(text);
    return 0;
}
