// What the tests of the GPU's engines share: models by name, how they are started, and running each test with both
// engines.
#ifndef ENGINE_CHECK_CUH
#define ENGINE_CHECK_CUH

extern "C" {
#include "../model/file/checkpoint.h"
#include "../model/file/quantize.h"
#include "../model/logits.h"
#include "../model/synthetic.h"
}
#include <cuda_runtime.h>
#include <math.h>
#include <unistd.h>

#include "check.h"

inline const char *engine; // under test
inline int n_gpus;         // of this machine
inline bool has_fp8;       // it has FP8 products, which are Hopper's

inline void end(const char *what) {
    char name[128];
    snprintf(name, sizeof name, "test_%s_%s", engine, what);
    test_end(name);
}

// ---- models ---------------------------------------------------------------------------------------------------------
// They are named in one text:
//   NULL                        stories.bin
//   "stories TYPE/OUTPUT"       the same quantised: the layers, and the output matrix
//   "SHAPE"                     a synthetic model of two layers, in BF16
//   "SHAPE TYPE+TYPE/OUTPUT"    with weights of these types, which the matrices of the layers have in turn
//   "small ..."                 the same of rows of 448, 512 and 688 columns, which end within a group of 128
//   "odd ..."                   the same of 8 K/V heads, with a dim, a hidden_dim and a vocabulary that 8 GPUs do not
//                               divide, nor their units of rows
// Types are what --quantize takes, or bf16; without /OUTPUT the output matrix stays as it is.

inline QuantType type_of(const char *name) {
    QuantType type = {DTYPE_BF16, 0};
    if (strcmp(name, "bf16") != 0 && !quant_parse(name, &type)) test_fail("%s is no type", name);
    return type;
}

inline char folder[64]; // for the quantised stories.bin, each written once

inline const char *quantised_stories(const char *types, const char *output, Error *err) {
    enum { MOST = 32 };
    static char paths[MOST][128];
    char path[128];
    int i = 0;
    snprintf(path, sizeof path, "%s/stories-%s-%s.bin", folder, types, output);
    while (i < MOST - 1 && paths[i][0] && strcmp(paths[i], path) != 0) i++;
    if (strcmp(paths[i], path) == 0) return paths[i];
    Model m;
    QuantizeOptions options = {type_of(types), type_of(output), strcmp(output, "bf16") != 0, NULL};
    QuantizeSummary summary;
    bool ok = checkpoint_open(&m, "model/stories.bin", false, err) && quantize_model(&m, path, &options, &summary, err);
    if (ok) quantize_free(&summary);
    model_close(&m);
    return ok ? strcpy(paths[i], path) : NULL;
}

inline void remove_stories(void) {
    char command[96];
    snprintf(command, sizeof command, "rm -rf %s", folder);
    if (folder[0] && system(command) != 0) printf("%s is left\n", folder);
}

// The matrices of the layers take turns: queries, keys and values one, then out, gate and up, down.
inline bool mix_types(Model *m, char *types, const char *output, Error *err) {
    enum { MOST = 4 };
    Matrix kinds[MOST];
    int n = 0, turn = 0;
    for (char *rest, *type = strtok_r(types, "+", &rest); type && n < MOST; type = strtok_r(NULL, "+", &rest)) {
        if (!synthetic_set_types(m, type_of(type), type_of(output), err)) return false;
        kinds[n++] = m->weights.layers[0].wq;
    }
    for (int i = 0; i < m->config.n_layers; i++) {
        LayerWeights *l = &m->weights.layers[i];
        Matrix *const matrices[] = {&l->wq, &l->wk, &l->wv, &l->wo, &l->w1, &l->w3, &l->w2};
        static const bool next[] = {false, false, true, true, false, true, true};
        for (int k = 0; k < 7; k++) {
            const Matrix *kind = &kinds[turn % n];
            matrices[k]->dtype = kind->dtype;
            matrices[k]->scale_dtype = kind->scale_dtype;
            matrices[k]->group = kind->group;
            turn += next[k];
        }
    }
    return true;
}

inline bool open_model(Model *m, const char *text, Error *err) {
    char name[32] = "stories", types[64] = "", output[16] = "bf16";
    if (text) sscanf(text, "%31s %63[^/]/%15s", name, types, output);
    if (strcmp(name, "stories") == 0) {
        const char *path = types[0] ? quantised_stories(types, output, err) : "model/stories.bin";
        *m = {};
        m->file.fd = -1;
        return path && checkpoint_open(m, path, false, err);
    }
    bool small = strcmp(name, "small") == 0, odd = strcmp(name, "odd") == 0;
    if (!synthetic_open(m, small || odd ? "llama-3.2-1b" : name, 1, err)) return false;
    Config *c = &m->config;
    c->n_layers = 2;
    if (small) c->dim = 448, c->n_heads = 8, c->n_kv_heads = 2, c->hidden_dim = 688, c->vocab_size = 1000;
    if (odd) c->dim = types[0] ? 1040 : 1032, c->n_heads = 24, c->hidden_dim = 1416, c->vocab_size = 2001;
    config_derive(c);
    return !types[0] || mix_types(m, types, output, err);
}

inline const char *called(const char *text) {
    return text ? text : "stories";
}

// kv_memory: bytes; 0: as much as the slots can use. gpus: parts of the model, all on one GPU if the machine has fewer.
inline bool start_shape(Model *m, const char *shape, const char *name, Precision precision, int slots, int max_len,
                        uint64_t kv_memory = 0, int gpus = 0, bool gathers_only = false) {
    Error err = {""};
    bool ok = open_model(m, shape, &err);
    m->kv_memory = kv_memory;
    m->gpus = gpus;
    m->gathers_only = gathers_only;
    m->one_gpu = gpus > n_gpus;
    if (ok && model_start(m, name, precision, slots, max_len, &err)) return true;
    test_fail("%s: %s", called(shape), err.text);
    return false;
}

inline bool start(Model *m, const char *name, Precision precision, int slots, int max_len) {
    return start_shape(m, NULL, name, precision, slots, max_len);
}

inline void random_tokens(int *tokens, int n, const Model *m) {
    for (int i = 0; i < n; i++) tokens[i] = (int)(((unsigned)i * 2654435761u >> 7) % (unsigned)m->config.vocab_size);
}

// Logits of one step, of the slots [n] that decode tokens; fails the test if the engine does.
inline void step(Model *m, int n, const int *slots, const int *tokens, float *logits) {
    Error err = {""};
    int rows[MAX_SLOTS + 1];
    for (int i = 0; i <= n; i++) rows[i] = i;
    Batch b = {n, n, n, n, tokens, slots, rows, rows, false};
    if (!model_forward(m, &b, &err) || !m->engine->read_logits(m, &err)) test_fail("%s", err.text);
    memcpy(logits, m->logits, (size_t)n * (size_t)m->config.vocab_size * sizeof(float));
}

// ---- the tests of a file --------------------------------------------------------------------------------------------

enum TestNeeds {
    ANY_ENGINE,
    FUSED,       // engine cublas does not promise it
    FP8_PRODUCTS // of the GPU
};

struct EngineTest {
    const char *name; // of the function, without test_; what is printed has the engine's in between
    void (*run)();
    TestNeeds needs = ANY_ENGINE;
};

// Runs each test with both engines, or says why not; main's exit status.
template <size_t N> int run_with_both_engines(const EngineTest (&tests)[N]) {
    const char *skip_reason = NULL;
    cudaError_t status = cudaGetDeviceCount(&n_gpus);
    if (status != cudaSuccess || n_gpus == 0) skip_reason = "no GPU";
    int major = 0;
    has_fp8 = !skip_reason && cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0) == cudaSuccess &&
              major == 9;
    snprintf(folder, sizeof folder, "/tmp/engine_check.XXXXXX");
    if (skip_reason || !mkdtemp(folder)) folder[0] = 0;
    Error err = {""};
    for (bool fused : {false, true}) {
        Model m;
        Error closed = {""};
        engine = fused ? "fused" : "cublas";
        if (!skip_reason && fused &&
            checkpoint_open(&m, "model/stories.bin", false, &closed)) { // an older GPU has only cublas
            if (!model_start(&m, engine, PRECISION_BF16, 1, 8, &err)) skip_reason = err.text;
            model_close(&m);
        }
        for (const EngineTest &test : tests) {
            char name[128];
            if (test.needs == FUSED && !fused) continue;
            snprintf(name, sizeof name, "test_%s_%s", engine, test.name);
            if (!test_wanted(name)) continue;
            if (skip_reason)
                test_skip(name, skip_reason);
            else if (test.needs == FP8_PRODUCTS && !has_fp8)
                test_skip(name, "needs a Hopper GPU");
            else
                test.run();
        }
    }
    remove_stories();
    return tests_summary();
}

#endif
