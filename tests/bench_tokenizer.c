// What scripts/bench_tokenizer.py times: loads MODEL's vocabulary, encodes FILE as ordinary text several times in one
// thread, and prints the figures on standard error and the ids, four bytes each, on standard output.
#include "../model/file/checkpoint.h"
#include "../model/generate/generate.h"
#include "../tokenizer/encode.h"
#include "vocabulary.h"

enum { REPEATS = 3 };

static int in_order(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

// Of this process's memory so far (getrusage would count what it was forked from).
static double peak_mib(void) {
    FILE *f = fopen("/proc/self/status", "r");
    char line[256];
    double kib = 0;
    while (f && fgets(line, sizeof line, f)) sscanf(line, "VmHWM: %lf", &kib);
    if (f) fclose(f);
    return kib / 1024;
}

int main(int argc, char **argv) {
    if (argc != 3) {
        fprintf(stderr, "usage: bench_tokenizer MODEL.bin FILE > IDS\n");
        return 2;
    }
    Error err = {""};
    Model m;
    double start = clock_seconds(), seconds[REPEATS];
    if (!checkpoint_open(&m, argv[1], true, &err)) {
        fprintf(stderr, "bench_tokenizer: %s\n", err.text);
        return 1;
    }
    double ready = clock_seconds() - start;
    double peak = peak_mib(); // so far the process holds little else than the vocabulary

    size_t n;
    char *text = read_file(argv[2], &n);
    TokenList ids = {0};
    for (int i = 0; text && i < REPEATS; i++) {
        ids.n = 0;
        start = clock_seconds();
        if (!tokenizer_encode(&m.tokenizer, (const uint8_t *)text, n, false, &ids, &err)) break;
        seconds[i] = clock_seconds() - start;
    }
    if (!text || err.text[0]) {
        fprintf(stderr, "bench_tokenizer: %s: %s\n", argv[2], text ? err.text : "cannot be read");
        return 1;
    }
    qsort(seconds, REPEATS, sizeof *seconds, in_order);
    fprintf(stderr, "seconds %.6f ready_ms %.1f peak_mib %.1f\n", seconds[REPEATS / 2], ready * 1e3, peak);
    fwrite(ids.ids, sizeof *ids.ids, ids.n, stdout);
    tokens_free(&ids);
    free(text);
    model_close(&m);
    return fflush(stdout) != 0;
}
