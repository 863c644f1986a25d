// The GPU's engines from the inside: memory over many steps, prompts in parts, a broken weight, logits against engine
// cpu; of weights in 16 bits and of quantised ones.
extern "C" {
#include "../model/file/checkpoint.h"
#include "../model/file/quantize.h"
#include "../model/generate/generate.h"
#include "../model/logits.h"
#include "../model/measure/bench.h"
#include "../model/synthetic.h"
}
#include <cuda_runtime.h>
#include <math.h>
#include <unistd.h>

#include <vector>

#include "check.h"

static const char *skip_reason, *engine; // engine: under test
static int n_gpus;                       // of this machine
static bool has_fp8;                     // it has FP8 products, which are Hopper's

static void end(const char *what) {
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

static QuantType type_of(const char *name) {
    QuantType type = {DTYPE_BF16, 0};
    if (strcmp(name, "bf16") != 0 && !quant_parse(name, &type)) test_fail("%s is no type", name);
    return type;
}

static char folder[64]; // for the quantised stories.bin, each written once

static const char *quantised_stories(const char *types, const char *output, Error *err) {
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

static void remove_stories(void) {
    char command[96];
    snprintf(command, sizeof command, "rm -rf %s", folder);
    if (folder[0] && system(command) != 0) printf("%s is left\n", folder);
}

// The matrices of the layers take turns: queries, keys and values one, then out, gate and up, down.
static bool mix_types(Model *m, char *types, const char *output, Error *err) {
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

static bool open_model(Model *m, const char *text, Error *err) {
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

static const char *called(const char *text) {
    return text ? text : "stories";
}

// kv_memory: bytes; 0: as much as the slots can use. gpus: parts of the model, all on one GPU if the machine has fewer.
static bool start_shape(Model *m, const char *shape, const char *name, Precision precision, int slots, int max_len,
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

static bool start(Model *m, const char *name, Precision precision, int slots, int max_len) {
    return start_shape(m, NULL, name, precision, slots, max_len);
}

static void random_tokens(int *tokens, int n, const Model *m) {
    for (int i = 0; i < n; i++) tokens[i] = (int)(((unsigned)i * 2654435761u >> 7) % (unsigned)m->config.vocab_size);
}

// What a step, or the replay of its graph, allocated and kept would be missing afterwards.
static void test_1000_steps_leave_memory_unchanged(void) {
    Model m;
    Error err = {""};
    size_t before = 0, after = 0, total;
    int slot[3] = {2, 0, 1}, rows[4] = {0, 1, 2, 3}, tokens[3] = {300, 400, 500};
    if (start(&m, engine, PRECISION_BF16, 3, 1100)) {
        Batch b = {3, 3, 3, 3, tokens, slot, rows, rows, false};
        for (int i = 0; i < 1020; i++) {
            if (i == 20) cudaMemGetInfo(&before, &total); // by then every graph is there
            if (!model_forward(&m, &b, &err)) test_fail("step %d: %s", i, err.text);
            if (i % 100)
                memcpy(tokens, m.argmax, sizeof tokens); // what follows is under way already; then something else
            else
                tokens[0] = 300;
        }
        cudaMemGetInfo(&after, &total);
        CHECK(m.kv.len[0] == 1020 && m.kv.len[1] == 1020 && m.kv.len[2] == 1020);
        if (before != after) test_fail("%zu bytes free before, %zu after", before, after);
    }
    model_close(&m);
    end("1000_steps_leave_memory_unchanged");
}

// The largest |Δlogit| between the engine in float32 and engine cpu after a prompt of n tokens in pieces of `step`.
static double delta_from_cpu(const char *shape, int n, int step, double *largest) {
    Model gpu, cpu;
    Error err = {""};
    double delta = 0;
    int *tokens = (int *)malloc((size_t)n * sizeof *tokens);
    *largest = 0;
    if (start_shape(&gpu, shape, engine, PRECISION_F32, 2, n) && start_shape(&cpu, shape, "cpu", PRECISION_F32, 1, n)) {
        random_tokens(tokens, n, &gpu);
        CHECK(model_prefill(&cpu, 0, tokens, n, 1, &err));
        for (int at = 0; at < n; at += step) { // of pieces that others follow, every second has no logits
            int rows = n - at < step ? n - at : step, logits = at + step < n ? at / step % 2 : 1;
            if (!model_prefill(&gpu, 1, tokens + at, rows, logits, &err)) test_fail("%s", err.text);
        }
        CHECK(gpu.engine->read_logits(&gpu, &err));
        for (int i = 0; !err.text[0] && i < gpu.config.vocab_size; i++) {
            double d = fabs((double)gpu.logits[i] - (double)cpu.logits[i]), size = fabs((double)cpu.logits[i]);
            if (!(d <= delta)) delta = d;
            if (size > *largest) *largest = size;
        }
    }
    model_close(&gpu);
    model_close(&cpu);
    free(tokens);
    return delta;
}

// Eight layers of float32 sums of up to 640 terms, or two of up to 14,336, in two orders: a few hundred roundings of
// 6e-8 of the largest logit.
static void check_delta_from_cpu(const char *shape, int n, int step, double *worst) {
    double largest, delta = delta_from_cpu(shape, n, step, &largest), bound = 300 * 6e-8 * largest;
    if (!(delta <= bound))
        test_fail("%s, %d tokens in pieces of %d: |Δlogit| %.3g, bound %.3g", called(shape), n, step, delta, bound);
    if (delta / bound > *worst) *worst = delta / bound;
}

static void test_logits_equal_the_cpus(void) {
    const int sizes[][2] = {{1, 1}, {2, 2}, {63, 63}, {65, 65}, {300, 7}, {1500, 1500}, {1500, 700}};
    double worst = 0;
    for (const auto &size : sizes) check_delta_from_cpu(NULL, size[0], size[1], &worst);
    end("logits_equal_the_cpus");
    printf("   largest error: %.3f of its bound\n", worst);
}

// Of files, and of weights that each engine makes for itself.
static void test_logits_of_quantised_weights_equal_the_cpus(void) {
    static const char *const stories[] = {"stories fp8/fp8",      "stories int8/int8",    "stories int8:32",
                                          "stories int8:128/fp8", "stories int4:32/int8", "stories int4:64",
                                          "stories int4:128",     "stories int4:128/int4"};
    static const char *const synthetic[] = {"small int8:128+int4:64+int4/int4:32", "llama-3.2-1b fp8+int4:64+bf16/int8",
                                            "llama-3.2-3b int8:64+int4:32/bf16", "llama-3.1-8b int4+int8/int8"};
    double worst = 0;
    for (const char *shape : stories)
        for (int n : {1, 65, 300}) check_delta_from_cpu(shape, n, n == 300 ? 7 : n, &worst);
    for (const char *shape : synthetic)
        for (int n : {1, 20}) check_delta_from_cpu(shape, n, 9, &worst);
    end("logits_of_quantised_weights_equal_the_cpus");
    printf("   largest error: %.3f of its bound\n", worst);
}

// Prompts of three sequences in one batch, two of which go on, with logits of a few rows and of all: engine cpu's.
static void test_some_rows_have_logits(void) {
    const int few[] = {3, 19, 20, 40, 53}, start_at[] = {0, 20, 21, 54}, slot[] = {2, 0, 1};
    int tokens[2 * 54], all[54];
    for (int i = 0; i < 54; i++) all[i] = i;
    Model gpu, cpu;
    Error err = {""};
    if (start(&gpu, engine, PRECISION_F32, 3, 128) && start(&cpu, "cpu", PRECISION_F32, 3, 128)) {
        random_tokens(tokens, 2 * 54, &gpu);
        for (int call = 0; call < 2; call++) {
            Batch b = {54, 3, call ? 54 : 5, 0, tokens + 54 * call, slot, start_at, call ? all : few, false};
            double delta = 0, largest = 0;
            if (!model_forward(&cpu, &b, &err) || !model_forward(&gpu, &b, &err) ||
                !gpu.engine->read_logits(&gpu, &err))
                test_fail("%s", err.text);
            for (size_t i = 0; !err.text[0] && i < (size_t)b.n_logits * (size_t)gpu.config.vocab_size; i++) {
                double d = fabs((double)gpu.logits[i] - (double)cpu.logits[i]);
                if (!(d <= delta)) delta = d;
                largest = fmax(largest, fabs((double)cpu.logits[i]));
            }
            if (!(delta <= 300 * 6e-8 * largest)) test_fail("call %d: |Δlogit| %.3g of %.3g", call, delta, largest);
        }
    }
    model_close(&gpu);
    model_close(&cpu);
    end("some_rows_have_logits");
}

// A prompt long enough for other matrix products gives what its parts give, to what rounding in bf16 may change; in
// engine fused the same bits.
static void long_prompt_equals_its_parts(const char *shape, Precision precision) {
    enum { LENGTH = 4200 };
    Model m;
    Error err = {""};
    static int tokens[LENGTH];
    if (start_shape(&m, shape, engine, precision, 2, LENGTH)) {
        size_t bytes = (size_t)m.config.vocab_size * sizeof(float);
        float *whole = (float *)malloc(bytes);
        double delta = 0, squares = 0;
        random_tokens(tokens, LENGTH, &m);
        CHECK(model_prefill(&m, 0, tokens, LENGTH, 1, &err) && m.engine->read_logits(&m, &err));
        memcpy(whole, m.logits, bytes);
        CHECK(model_prefill(&m, 1, tokens, LENGTH / 2, 0, &err));
        CHECK(model_prefill(&m, 1, tokens + LENGTH / 2, LENGTH / 2, 1, &err) && m.engine->read_logits(&m, &err));
        for (int i = 0; i < m.config.vocab_size; i++) {
            delta += pow((double)m.logits[i] - (double)whole[i], 2);
            squares += pow((double)whole[i], 2);
        }
        if (strcmp(engine, "fused") == 0 && memcmp(whole, m.logits, bytes) != 0)
            test_fail("%s: other bits", called(shape));
        if (!(delta <= 4e-4 * squares)) // 2 %, five times what one rounding may change
            test_fail("%s: root mean square of Δlogit is %.3g of the logits'", called(shape), sqrt(delta / squares));
        free(whole);
    }
    model_close(&m);
}

static void test_long_prompt_equals_its_parts(void) {
    static const char *const shapes[] = {NULL, "stories fp8/fp8", "stories int4:32/int8"};
    for (const char *shape : shapes) long_prompt_equals_its_parts(shape, PRECISION_BF16);
    if (has_fp8) long_prompt_equals_its_parts("stories fp8/fp8", PRECISION_FP8);
    end("long_prompt_equals_its_parts");
}

// The root mean square of what logits are off, over that of what they should be.
static double error_of_logits(const float *logits, const float *right, int n) {
    double error = 0, all = 0;
    for (int i = 0; i < n; i++) {
        error += pow((double)logits[i] - (double)right[i], 2);
        all += pow((double)right[i], 2);
    }
    return sqrt(error / all);
}

// --precision fp8: a prompt's logits are engine cpu's to what 4 bits of activations let one expect, and not those of
// bf16; the steps after it, and the choice, are as in bf16: on the keys and values of a bf16 run they have its bits.
static void test_fp8_products_of_prompts_alone(void) {
    enum { LENGTH = 300, STEPS = 3 };
    static const char *const shapes[] = {"stories fp8/fp8", "llama-3.2-1b fp8"};
    for (const char *shape : shapes) {
        Model models[3]; // engine cpu, bf16, FP8
        const Precision precisions[] = {PRECISION_F32, PRECISION_BF16, PRECISION_FP8};
        SavedPages saved[3] = {};
        Error err = {""};
        int tokens[LENGTH + STEPS];
        std::vector<float> logits[3];
        bool ok = true;
        for (int i = 0; i < 3; i++)
            ok = start_shape(&models[i], shape, i ? engine : "cpu", precisions[i], 2, LENGTH + STEPS) && ok;
        if (ok) random_tokens(tokens, LENGTH + STEPS, &models[0]);
        for (int i = 0; i < 3 && ok; i++) {
            Model *m = &models[i];
            CHECK(m->precision == precisions[i]);
            ok = model_prefill(m, 1, tokens, LENGTH, 1, &err) && m->engine->read_logits(m, &err);
            if (ok) logits[i].assign(m->logits, m->logits + m->config.vocab_size);
            ok = ok && (i == 0 || model_save_pages(m, 1, &saved[i], &err));
        }
        if (ok) {
            const int vocab = models[0].config.vocab_size;
            const double of_bf16 = error_of_logits(logits[1].data(), logits[0].data(), vocab),
                         of_fp8 = error_of_logits(logits[2].data(), logits[0].data(), vocab);
            cudaDeviceSynchronize(); // the pages are on their way
            for (int i = 0; i < saved[1].n; i++)
                memcpy(saved[2].pages[i], saved[1].pages[i], (size_t)model_page_bytes(&models[1]));
            // A code has 4 significant bits where bf16 has 8, of the same activations: what comes of their rounding is
            // 16 times as much. All else is in bf16 both times.
            const double bound = 16 * of_bf16;
            if (!(of_fp8 <= bound) || !(of_fp8 > 2 * of_bf16))
                test_fail("%s: logits are off by %.3g of their size, bound %.3g; bf16's by %.3g", shape, of_fp8, bound,
                          of_bf16);
            printf("   %s: logits after a prompt are off by %.4f of their size, in bf16 by %.4f\n", shape, of_fp8,
                   of_bf16);
            for (int i = 1; i < 3 && ok; i++) ok = model_restore_pages(&models[i], 0, &saved[i], &err);
            for (int k = 0; k < STEPS && ok; k++) {
                for (int i = 1; i < 3 && ok; i++)
                    ok = model_decode(&models[i], 0, tokens[LENGTH + k], &err) &&
                         models[i].engine->read_logits(&models[i], &err);
                if (ok && memcmp(models[1].logits, models[2].logits, (size_t)vocab * sizeof(float)) != 0)
                    test_fail("%s: step %d has other bits than in bf16", shape, k);
            }
        }
        if (!ok) test_fail("%s: %s", shape, err.text);
        for (int i = 0; i < 3; i++) {
            model_free_pages(&models[i], &saved[i]);
            model_close(&models[i]);
        }
    }
    Model m; // hidden_dim 1416 is no multiple of 16
    Error err = {""};
    CHECK(open_model(&m, "odd fp8", &err) && !model_start(&m, engine, PRECISION_FP8, 1, 64, &err));
    CHECK(strstr(err.text, "FP8 products need multiples of 16"));
    model_close(&m);
    end("fp8_products_of_prompts_alone");
}

// A decode step after a prompt gives what the same tokens give as one prompt.
static void decode_continues_prefill(const char *shape) {
    Model m;
    Error err = {""};
    int tokens[40];
    float *whole = NULL;
    if (start_shape(&m, shape, engine, PRECISION_F32, 2, 64)) {
        random_tokens(tokens, 40, &m);
        size_t bytes = (size_t)m.config.vocab_size * sizeof(float);
        whole = (float *)malloc(bytes);
        CHECK(model_prefill(&m, 0, tokens, 40, 1, &err) && m.engine->read_logits(&m, &err));
        memcpy(whole, m.logits, bytes);
        CHECK(model_prefill(&m, 1, tokens, 30, 1, &err));
        for (int i = 30; i < 40; i++) CHECK(model_decode(&m, 1, tokens[i], &err));
        CHECK(m.engine->read_logits(&m, &err));
        double delta = 0, largest = 0;
        for (int i = 0; i < m.config.vocab_size; i++) {
            delta = fmax(delta, fabs((double)m.logits[i] - (double)whole[i]));
            largest = fmax(largest, fabs((double)whole[i]));
        }
        if (!(delta <= 300 * 6e-8 * largest)) test_fail("%s: |Δlogit| %.3g of %.3g", called(shape), delta, largest);
        CHECK(m.argmax[0] == argmax(whole, m.config.vocab_size));
    }
    free(whole);
    model_close(&m);
}

static void test_decode_continues_prefill(void) {
    static const char *const shapes[] = {NULL, "stories fp8/fp8", "stories int4:32/int8",
                                         "llama-3.1-8b int8:64+int4+fp8/int4:32"};
    for (const char *shape : shapes) decode_continues_prefill(shape);
    end("decode_continues_prefill");
}

// A NaN in a matrix reaches the logits, and the choice says so; engine and caller stay in order.
static void test_nan_weight_is_noticed(void) {
    Model m;
    Error err = {""};
    int token = 300;
    unsigned short nan = 0x7FC0;
    if (start(&m, engine, PRECISION_BF16, 1, 8)) {
        CHECK(model_prefill(&m, 0, &token, 1, 1, &err) && m.argmax[0] >= 0);
        cudaMemcpy((void *)m.weights.layers[3].w2.data, &nan, sizeof nan, cudaMemcpyHostToDevice);
        CHECK(model_decode(&m, 0, token, &err) && m.argmax[0] == -1);
    }
    model_close(&m);
    end("nan_weight_is_noticed");
}

// A code or a scale of a file that is no finite number is refused as the weights are uploaded, with its place; the
// first of several. Nothing is left behind, and the file as it was loads.
static void test_bad_codes_and_scales_are_named(void) {
    static const struct {
        const char *shape, *tensor;
        int row, column; // of the code, or of the scale
        bool scale;
        unsigned char bytes[2]; // the last of the scale, or the code
        int n_bytes;
        const char *expected;
    } cases[] = {
        {"stories fp8/fp8",
         "layers.3.w2",
         5,
         17,
         false,
         {0x7F},
         1,
         ": tensor layers.3.w2: the code of row 5, column 17 is NaN"},
        {"stories fp8/fp8", // the second of two GPUs has it
         "layers.3.w2",
         250,
         600,
         false,
         {0x7F},
         1,
         ": tensor layers.3.w2: the code of row 250, column 600 is NaN"},
        {"stories fp8/fp8",
         "output",
         511,
         0,
         false,
         {0xFF},
         1,
         ": tensor output: the code of row 511, column 0 is NaN"},
        {"stories fp8/fp8", "layers.0.wk", 9, 0, true, {0x80, 0x7F}, 2, ": tensor layers.0.wk.scale: element 9 is "},
        {"stories int4:32/int8", "layers.7.wo", 2, 3, true, {0xC0, 0x7F}, 2, ": tensor layers.7.wo.scale: element "},
    };
    for (const auto &c : cases) {
        Model m;
        Error err = {""};
        bool ok = open_model(&m, c.shape, &err);
        char name[80];
        snprintf(name, sizeof name, "%s%s", c.tensor, c.scale ? ".scale" : "");
        const Tensor *t = ok ? safetensors_find(&m.file, name) : NULL;
        if (!t) {
            test_fail("%s: no tensor %s", err.text, name);
            model_close(&m);
            continue;
        }
        uint64_t cols = t->n_dims > 1 ? t->shape[1] : 1, element = (uint64_t)dtype_bytes[t->dtype],
                 at = ((uint64_t)c.row * cols + (uint64_t)c.column + 1) * element - (uint64_t)c.n_bytes;
        FILE *file = fopen(m.file.path, "r+b");
        unsigned char before[2];
        long place = (long)(m.file.data_start + t->begin + at);
        auto write_bytes = [&](const unsigned char *bytes) {
            if (!file || fseek(file, place, SEEK_SET) != 0 || fwrite(bytes, 1, (size_t)c.n_bytes, file) == 0 ||
                fflush(file) != 0)
                test_fail("%s cannot be changed", m.file.path);
        };
        if (!file || fseek(file, place, SEEK_SET) != 0 || fread(before, 1, (size_t)c.n_bytes, file) == 0)
            test_fail("%s cannot be read", m.file.path);
        write_bytes(c.bytes);
        for (int gpus = 1; gpus <= 2; gpus++) {
            err = {""};
            m.gpus = gpus;
            m.one_gpu = true;
            if (model_start(&m, engine, PRECISION_BF16, 1, 16, &err)) test_fail("%s: it started", c.expected);
            if (!strstr(err.text, c.expected)) test_fail("%s, expected %s", err.text, c.expected);
            model_stop(&m);
        }
        write_bytes(before);
        if (file) fclose(file);
        model_close(&m);
        if (start_shape(&m, c.shape, engine, PRECISION_BF16, 1, 16)) {
            int token = 300;
            err = {""};
            CHECK(model_prefill(&m, 0, &token, 1, 1, &err) && m.argmax[0] >= 0);
        }
        model_close(&m);
    }
    end("bad_codes_and_scales_are_named");
}

// Every position of the benchmark's cache is a random number in ±1, in the cache's own dtype.
static void test_cache_is_filled_for_the_benchmark(void) {
    const Precision precisions[] = {PRECISION_BF16, PRECISION_F32};
    for (int p = 0; p < 2; p++) {
        Model m;
        Error err = {""};
        if (start(&m, engine, precisions[p], 3, 100)) {
            size_t element = p ? 4 : 2, n = m.kv.bytes / 2 / element;
            uint8_t *host = (uint8_t *)malloc(m.kv.bytes / 2);
            void *caches[] = {m.kv.k, m.kv.v};
            for (int i = 0; i < 2; i++) {
                double sum = 0, squares = 0;
                cudaMemset(caches[i], 0xFF, m.kv.bytes / 2); // NaN
                CHECK(platform_of(m.engine)->fill_cache(&m, &err));
                cudaMemcpy(host, caches[i], m.kv.bytes / 2, cudaMemcpyDeviceToHost);
                for (size_t j = 0; j < n; j++) {
                    uint32_t bits = 0;
                    float x;
                    memcpy((char *)&bits + 4 - element, host + j * element, element);
                    memcpy(&x, &bits, sizeof x);
                    if (!(fabsf(x) <= 1)) test_fail("element %zu is %f", j, (double)x);
                    sum += x;
                    squares += (double)x * x;
                }
                double error = 6 / sqrt((double)n); // six standard deviations of the mean, and more
                CHECK(fabs(sum / (double)n) < error && fabs(squares / (double)n - 1 / 3.0) < error);
            }
            free(host);
        }
        model_close(&m);
    }
    end("cache_is_filled_for_the_benchmark");
}

// Stopped and started with caches of other sizes, one of them refused: the same token each time, and no memory lost.
static void starts_again_with_another_cache(const char *shape, int gpus) {
    Model m;
    Error err = {""};
    int token = 300, choice = -1;
    size_t before = 0, after = 0, total;
    if (start_shape(&m, shape, engine, PRECISION_BF16, 1, 100, 0, gpus)) {
        for (int i = 0; i < 6; i++) {
            Error refused = {""};
            model_stop(&m);
            if (i == 1) cudaMemGetInfo(&before, &total);
            m.kv_memory = i % 2 ? (uint64_t)1 << 50 : 0; // asked for, or what one context takes
            CHECK(!model_start(&m, engine, PRECISION_BF16, i % 2 ? MAX_SLOTS : 1, i % 2 ? 1 << 22 : 1 << 29, &refused));
            CHECK(strstr(refused.text, i % 2 ? "are free; at most " : "are free; a context of "));
            model_stop(&m);
            m.kv_memory = 0;
            if (!model_start(&m, engine, PRECISION_BF16, 1 + i, 100 + 100 * i, &err)) test_fail("%s", err.text);
            if (!model_prefill(&m, 0, &token, 1, 1, &err)) test_fail("%s", err.text);
            if (i == 0) choice = m.argmax[0];
            CHECK(m.argmax[0] >= 0 && m.argmax[0] == choice);
        }
        model_stop(&m);
        cudaMemGetInfo(&after, &total);
        if (before != after) test_fail("%s: %zu bytes free before, %zu after", called(shape), before, after);
    }
    model_close(&m);
}

static void test_starts_again_with_another_cache(void) {
    static const char *const shapes[] = {NULL, "stories int8/int8", "llama-3.2-1b int4:64+bf16/int8"};
    for (const char *shape : shapes) starts_again_with_another_cache(shape, 1);
    starts_again_with_another_cache(NULL, 2);
    starts_again_with_another_cache("llama-3.2-1b int4:64+bf16/int8", 4);
    end("starts_again_with_another_cache");
}

// Logits of one step, of the slots [n] that decode tokens; fails the test if the engine does.
static void step(Model *m, int n, const int *slots, const int *tokens, float *logits) {
    Error err = {""};
    int rows[MAX_SLOTS + 1];
    for (int i = 0; i <= n; i++) rows[i] = i;
    Batch b = {n, n, n, n, tokens, slots, rows, rows, false};
    if (!model_forward(m, &b, &err) || !m->engine->read_logits(m, &err)) test_fail("%s", err.text);
    memcpy(logits, m->logits, (size_t)n * (size_t)m->config.vocab_size * sizeof(float));
}

// A sequence gets the same bits alone and among others of other lengths, in a run of few sequences and in one of many,
// whose steps have another order of sums. (Engine fused promises this.)
// LLaMA's shapes: weights in tiles of several sizes.
static void same_bits_among(int slots, const char *shape, Precision precision) {
    enum { LONGEST = 150, STEPS = 6, MOST = 40 };
    static const int counts[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 17, 40};
    Model m;
    Error err = {""};
    if (start_shape(&m, shape, engine, precision, slots, LONGEST + STEPS)) {
        size_t vocab = (size_t)m.config.vocab_size, bytes = vocab * sizeof(float);
        float *alone = (float *)malloc((size_t)slots * STEPS * bytes), *among = (float *)malloc((size_t)slots * bytes);
        int tokens[LONGEST + STEPS], all[MOST], lens[MOST], next[MOST];
        random_tokens(tokens, LONGEST + STEPS, &m);
        for (int i = 0; i < slots; i++) lens[i] = 1 + i * (LONGEST - 2) / (slots - 1), all[i] = i;
        for (int n : counts) {
            if (n > slots || (slots > 8 && n > 1 && n < 8)) continue;
            for (int i = 0; i < slots; i++) {
                kv_reset(&m.kv, i);
                if (!model_prefill(&m, i, tokens, lens[i], 1, &err)) test_fail("%s", err.text);
            }
            for (int k = 0; k < STEPS; k++)
                for (int first = 0; first < slots; first += n) {
                    int count = slots - first < n ? slots - first : n;
                    for (int i = 0; i < count; i++) next[i] = tokens[lens[first + i] + k];
                    step(&m, count, all + first, next, among);
                    for (int i = 0; i < count; i++) {
                        float *reference = alone + ((size_t)k * (size_t)slots + (size_t)(first + i)) * vocab;
                        if (n == 1)
                            memcpy(reference, among + (size_t)i * vocab, bytes);
                        else if (memcmp(reference, among + (size_t)i * vocab, bytes) != 0)
                            test_fail("%s, %s, %d slots: sequence %d, step %d: other bits among %d", called(shape),
                                      precision_names[precision], slots, first + i, k, count);
                    }
                }
        }
        free(alone);
        free(among);
    }
    model_close(&m);
}

static void test_same_bits_alone_and_among_others(void) {
    const char *const shapes[] = {NULL,
                                  "llama-3.2-1b",
                                  "llama-3.1-8b",
                                  "stories fp8/fp8",
                                  "stories int4:32/int8",
                                  "small int4:128/int8:64",
                                  "llama-3.2-1b int8:32+bf16+int4:128/int8",
                                  "llama-3.1-8b fp8/fp8",
                                  "llama-3.1-8b int4/int8"};
    for (const char *shape : shapes) {
        same_bits_among(8, shape, PRECISION_BF16);
        same_bits_among(8, shape, PRECISION_F32);
        same_bits_among(16, shape, PRECISION_BF16);
        same_bits_among(32, shape, PRECISION_BF16);
        same_bits_among(40, shape, PRECISION_BF16);
    }
    for (int slots : {8, 16, 40})
        if (has_fp8) same_bits_among(slots, "stories fp8/fp8", PRECISION_FP8);
    if (has_fp8) same_bits_among(8, "llama-3.1-8b fp8", PRECISION_FP8);
    end("same_bits_alone_and_among_others");
}

// ---- pages ----------------------------------------------------------------------------------------------------------

enum { PAGED = 5, PAGED_STEPS = 45, PAGED_LONGEST = 700 };

// Sequences that go on with the most likely token, so that steps run ahead. The first 300 ids of all prompts are alike.
struct Paged {
    Model m;
    size_t vocab;
    int lens[PAGED], tokens[PAGED][PAGED_LONGEST + 1]; // of the prompts; then what each takes alone
    float *alone;                                      // [PAGED][PAGED_STEPS][vocab]: logits of each alone

    float *logits_of(int sequence, int k) {
        return alone + ((size_t)sequence * PAGED_STEPS + (size_t)k) * vocab;
    }
    // Rows [from, end) of a prompt; the token after it.
    int prefill(int slot, int sequence, int from) {
        Error err = {""};
        if (!model_prefill(&m, slot, tokens[sequence] + from, lens[sequence] - from, 1, &err))
            test_fail("%s", err.text);
        return m.argmax[0];
    }
    // Starts with that memory, and has each sequence's logits from a run of its own in a cache of pages in order.
    bool begin(const char *shape) {
        static const int lengths[PAGED] = {300, 333, 384, 511, 640};
        alone = NULL;
        if (!start_shape(&m, shape, engine, PRECISION_BF16, 1, PAGED_LONGEST)) return false;
        vocab = (size_t)m.config.vocab_size;
        alone = (float *)malloc(PAGED * PAGED_STEPS * vocab * sizeof(float));
        int ids[PAGED_LONGEST], slot = 0;
        random_tokens(ids, PAGED_LONGEST, &m);
        for (int i = 0; i < PAGED; i++) {
            lens[i] = lengths[i];
            memcpy(tokens[i], ids, sizeof ids);
            for (int j = 300; j < lens[i]; j++) tokens[i][j] = (ids[j] + i) % m.config.vocab_size;
            kv_reset(&m.kv, 0);
            tokens[i][lens[i]] = prefill(0, i, 0);
            for (int k = 0; k < PAGED_STEPS; k++) {
                step(&m, 1, &slot, &tokens[i][lens[i] + k], logits_of(i, k));
                tokens[i][lens[i] + k + 1] = m.argmax[0];
            }
        }
        return true;
    }
    // The next steps of n sequences in these slots, which have had so many; as one batch or one by one.
    void check_steps(const char *what, int n, const int *slots, const int *sequences, int *next, bool together) {
        float *got = (float *)malloc((size_t)n * vocab * sizeof(float));
        int input[PAGED];
        for (int i = 0; i < n; i++) input[i] = tokens[sequences[i]][lens[sequences[i]] + next[sequences[i]]];
        for (int first = 0; first < n; first += together ? n : 1) {
            int count = together ? n : 1;
            step(&m, count, slots + first, input + first, got);
            for (int i = first; i < first + count; i++) {
                int sequence = sequences[i], k = next[sequence]++;
                if (memcmp(got + (size_t)(i - first) * vocab, logits_of(sequence, k), vocab * sizeof(float)) != 0)
                    test_fail("%s: sequence %d, step %d: other bits than alone", what, sequence, k);
            }
        }
        free(got);
    }
    void end() {
        free(alone);
        model_close(&m);
    }
};

// The pages of the slots lie between each other's, from the last to the first.
static void scatter(Model *m, int n, int len) {
    for (int i = n - 1; i >= 0; i--) kv_reset(&m->kv, i);
    for (int at = 1; at <= len; at += KV_PAGE)
        for (int i = n - 1; i >= 0; i--)
            if (!kv_reserve(&m->kv, i, at)) test_fail("no page for position %d of slot %d", at, i);
}

static void pages_scattered(const char *shape) {
    Paged p;
    if (p.begin(shape)) {
        Error err = {""};
        int slots[PAGED], all[PAGED], next[PAGED] = {0};
        model_stop(&p.m);
        if (!model_start(&p.m, engine, PRECISION_BF16, PAGED, PAGED_LONGEST, &err)) test_fail("%s", err.text);
        scatter(&p.m, PAGED, PAGED_LONGEST);
        for (int i = 0; i < PAGED; i++) {
            slots[i] = (i * 3 + 1) % PAGED;
            all[i] = i;
            if (p.prefill(slots[i], i, 0) != p.tokens[i][p.lens[i]]) test_fail("sequence %d: another token", i);
        }
        for (int k = 0; k < PAGED_STEPS; k++)
            p.check_steps("scattered", PAGED, slots, all, next, strcmp(engine, "fused") == 0);
    }
    p.end();
}

// Two slots, and pages for two sequences, for five: every few steps one leaves or two change slots, mostly while a step
// runs ahead of them. (Engine cublas decodes one by one: its bits depend on the number of rows.)
static void pages_saved_and_restored(const char *shape) {
    Paged p;
    if (p.begin(shape)) {
        Error err = {""};
        SavedPages saved[PAGED] = {};
        bool begun[PAGED] = {};
        int slots[2] = {1, 0}, here[2] = {-1, -1}, next[PAGED] = {0}, done = 0;
        model_stop(&p.m);
        p.m.kv_memory = 2 * (uint64_t)kv_pages(PAGED_LONGEST) * cache_page_bytes(&p.m.config, 2);
        if (!model_start(&p.m, engine, PRECISION_BF16, 2, PAGED_LONGEST, &err)) test_fail("%s", err.text);
        CHECK(p.m.kv.n_pages == 2 * kv_pages(PAGED_LONGEST));
        auto leave = [&](int at) {
            if (here[at] >= 0 && !model_save_pages(&p.m, slots[at], &saved[here[at]], &err)) test_fail("%s", err.text);
            CHECK(p.m.kv.held[slots[at]] == 0);
        };
        auto enter = [&](int at, int sequence) {
            if (!begun[sequence])
                p.prefill(slots[at], sequence, 0);
            else if (!model_restore_pages(&p.m, slots[at], &saved[sequence], &err))
                test_fail("%s", err.text);
            begun[sequence] = true;
            here[at] = sequence;
        };
        for (int turn = 0; done < PAGED - 1 && turn < 500; turn++) {
            int at = turn % 2, sequence = turn % PAGED;
            if (turn % 7 == 3 && here[0] >= 0 && here[1] >= 0) { // the two change slots, with no step between
                int first = here[0], second = here[1];
                leave(0);
                leave(1);
                enter(0, second);
                enter(1, first);
            } else if (next[sequence] < PAGED_STEPS && here[1 - at] != sequence && here[at] != sequence) {
                leave(at);
                enter(at, sequence);
            }
            if (here[0] < 0 || here[1] < 0) continue;
            for (int k = 0; k < 1 + turn % 6; k++)
                if (next[here[0]] < PAGED_STEPS && next[here[1]] < PAGED_STEPS)
                    p.check_steps("saved and restored", 2, slots, here, next, strcmp(engine, "fused") == 0);
            done = 0;
            for (int i = 0; i < PAGED; i++) done += next[i] == PAGED_STEPS;
        }
        CHECK(done >= PAGED - 1);
        for (int i = 0; i < PAGED; i++) model_free_pages(&p.m, &saved[i]);
    }
    p.end();
}

// The first 256 ids are computed once. Sequences that share their pages have the bits of a run alone, also after the
// one that computed them has gone.
static void pages_shared(const char *shape) {
    Paged p;
    if (p.begin(shape)) {
        Error err = {""};
        int all[PAGED] = {0, 1, 2, 3, 4}, next[PAGED] = {0};
        model_stop(&p.m);
        if (!model_start(&p.m, engine, PRECISION_BF16, PAGED, PAGED_LONGEST, &err)) test_fail("%s", err.text);
        for (int round = 0; round < 2; round++) { // then from pages that no slot has
            memset(next, 0, sizeof next);
            for (int i = 0; i < PAGED; i++) {
                int shared = kv_share(&p.m.kv, i, p.tokens[i], p.lens[i]);
                int own = round ? (p.lens[i] - 1) / KV_PAGE * KV_PAGE : i == 0 ? 0 : 256;
                if (shared != own) test_fail("sequence %d takes %d positions, expected %d", i, shared, own);
                if (p.prefill(i, i, shared) != p.tokens[i][p.lens[i]]) test_fail("sequence %d: another token", i);
                kv_publish(&p.m.kv, i, p.tokens[i], p.lens[i]);
            }
            for (int k = 0; k < PAGED_STEPS; k++) p.check_steps("shared", PAGED, all, all, next, true);
            for (int i = 0; i < PAGED; i++) kv_reset(&p.m.kv, i);
        }
    }
    p.end();
}

static const char *const paged_shapes[] = {NULL, "llama-3.2-1b"};

static void test_pages_scattered_have_the_same_bits(void) {
    for (const char *shape : paged_shapes) pages_scattered(shape);
    end("pages_scattered_have_the_same_bits");
}

static void test_pages_saved_and_restored_have_the_same_bits(void) {
    for (const char *shape : paged_shapes) pages_saved_and_restored(shape);
    end("pages_saved_and_restored_have_the_same_bits");
}

static void test_pages_shared_have_the_same_bits(void) {
    for (const char *shape : paged_shapes) pages_shared(shape);
    end("pages_shared_have_the_same_bits");
}

// Where memory does not hold all contexts whole there are fewer pages, and a sequence still has a whole one.
static void test_memory_for_pages(void) {
    Model m;
    Error err = {""};
    uint64_t page = 0;
    if (start(&m, engine, PRECISION_BF16, 4, 1000)) {
        page = model_page_bytes(&m);
        CHECK(m.kv.n_pages == 4 * 16 && m.kv.bytes == 64 * page && page == cache_page_bytes(&m.config, 2));
    }
    model_close(&m);
    if (start_shape(&m, NULL, engine, PRECISION_BF16, 4, 1000, 20 * page + page / 2)) {
        int token = 300;
        CHECK(m.kv.n_pages == 20 && m.kv.max_len == 1000 && model_prefill(&m, 3, &token, 1, 1, &err));
        CHECK(kv_free_pages(&m.kv) == 19);
    }
    model_close(&m);
    CHECK(checkpoint_open(&m, "model/stories.bin", false, &err));
    m.kv_memory = page - 1;
    CHECK(!model_start(&m, engine, PRECISION_BF16, 4, 1000, &err) && strstr(err.text, "expected at least"));
    model_close(&m);
    if (start(&m, engine, PRECISION_BF16, MAX_SLOTS, 1 << 22)) {
        size_t free_bytes = 0, total = 0;
        cudaMemGetInfo(&free_bytes, &total);
        CHECK(m.kv.n_pages >= m.kv.table_width && m.kv.n_pages < MAX_SLOTS * m.kv.table_width);
        CHECK(free_bytes > (size_t)500 << 20 && free_bytes < (size_t)1100 << 20); // about 1 GB is left
    }
    model_close(&m);
    end("memory_for_pages");
}

// A prompt gets the same bits alone, cut in two, and in one batch with others, which is itself computed in parts: the
// logits of its last token and, for what it left in the cache, of a step after it.
static void test_prompts_have_the_same_bits_in_any_batch(void) {
    static const struct {
        const char *shape;
        Precision precision;
    } models[] = {{NULL, PRECISION_BF16},
                  {"llama-3.2-1b", PRECISION_BF16},
                  {"llama-3.1-8b", PRECISION_BF16},
                  {"stories int4:128/int8", PRECISION_BF16},
                  {"llama-3.2-1b int8+int4+fp8/int8:64", PRECISION_BF16},
                  {"stories fp8/fp8", PRECISION_FP8},
                  {"llama-3.1-8b fp8", PRECISION_FP8}};
    enum { SEQUENCES = 20, LONGEST = 900 };
    static const int more[] = {300, 257, 256, 255, 2, 640};
    for (const auto &model : models) {
        const char *shape = model.shape;
        Model m;
        Error err = {""};
        if (model.precision == PRECISION_FP8 && !has_fp8) continue;
        if (start_shape(&m, shape, engine, model.precision, SEQUENCES, LONGEST + 1)) {
            size_t vocab = (size_t)m.config.vocab_size, bytes = vocab * sizeof(float);
            float *alone = (float *)malloc(2 * SEQUENCES * bytes), *one = (float *)malloc(SEQUENCES * bytes);
            int tokens[LONGEST + 1], slots[SEQUENCES], lens[SEQUENCES], last[SEQUENCES], start_at[SEQUENCES + 1] = {0};
            int *batch = (int *)malloc(SEQUENCES * LONGEST * sizeof(int)), n_rows = 0;
            random_tokens(tokens, LONGEST + 1, &m);
            for (int i = 0; i < SEQUENCES; i++) {
                lens[i] = i < 6 ? more[i] : 1 + i * (LONGEST - 1) / (SEQUENCES - 1);
                slots[i] = (i * 7 + 3) % SEQUENCES;
                memcpy(batch + n_rows, tokens, (size_t)lens[i] * sizeof(int));
                start_at[i + 1] = n_rows += lens[i];
                last[i] = n_rows - 1;
            }
            for (int how = 0; how < 3; how++) { // alone, cut, together
                for (int i = 0; i < SEQUENCES; i++) kv_reset(&m.kv, i);
                Batch together = {n_rows, SEQUENCES, SEQUENCES, 0, batch, slots, start_at, last, false};
                if (how == 2 && (!model_forward(&m, &together, &err) || !m.engine->read_logits(&m, &err)))
                    test_fail("%s", err.text);
                for (int i = 0; i < SEQUENCES; i++) {
                    const float *row = how == 2 ? m.logits + (size_t)i * vocab : m.logits;
                    int cut = how == 1 ? lens[i] / 3 : 0;
                    if (how < 2 && ((cut && !model_prefill(&m, slots[i], tokens, cut, 0, &err)) ||
                                    !model_prefill(&m, slots[i], tokens + cut, lens[i] - cut, 1, &err) ||
                                    !m.engine->read_logits(&m, &err)))
                        test_fail("%s", err.text);
                    if (how == 0)
                        memcpy(alone + (size_t)i * vocab, row, bytes);
                    else if (memcmp(alone + (size_t)i * vocab, row, bytes) != 0)
                        test_fail("%s: prompt of %d tokens: other bits %s", called(shape), lens[i],
                                  how == 1 ? "cut in two" : "among others");
                }
                for (int i = 0; i < SEQUENCES; i++) {
                    step(&m, 1, slots + i, tokens + lens[i], one);
                    if (how == 0)
                        memcpy(alone + (size_t)(SEQUENCES + i) * vocab, one, bytes);
                    else if (memcmp(alone + (size_t)(SEQUENCES + i) * vocab, one, bytes) != 0)
                        test_fail("%s: step after %d tokens: other bits %s", called(shape), lens[i],
                                  how == 1 ? "cut in two" : "among others");
                }
            }
            free(alone);
            free(one);
            free(batch);
        }
        model_close(&m);
    }
    end("prompts_have_the_same_bits_in_any_batch");
}

// What a step of many rows computes is, but for rounding, what the prompt with these tokens at its end does: in bf16,
// of sequences of other lengths, for steps of every order of sums.
static void test_steps_of_many_rows_continue_prompts(void) {
    enum { MOST = 80, LONGEST = 200 };
    static const int counts[] = {2, 3, 8, 9, 16, 31, 64, 80};
    const char *const shapes[] = {NULL,
                                  "llama-3.2-1b",
                                  "llama-3.1-8b",
                                  "stories fp8/fp8",
                                  "stories int4:32/int8",
                                  "llama-3.2-1b int4/int8",
                                  "llama-3.1-8b fp8+int4:64+int8+bf16/int8"};
    for (const char *shape : shapes)
        for (int n : counts) {
            // A prompt's weights with a scale for each group are rounded to bf16,
            // each by 0.16 % in the root mean square.
            const double bound = shape && strstr(shape, "int4") ? 0.04 : 0.02;
            Model m;
            Error err = {""};
            if (start_shape(&m, shape, engine, PRECISION_BF16, n, LONGEST + 1)) {
                size_t vocab = (size_t)m.config.vocab_size;
                float *whole = (float *)malloc((size_t)n * vocab * sizeof(float)),
                      *rows = (float *)malloc((size_t)n * vocab * sizeof(float));
                int tokens[LONGEST + 1], slots[MOST], next[MOST];
                double error = 0, all = 0;
                random_tokens(tokens, LONGEST + 1, &m);
                for (int i = 0; i < n; i++) {
                    int len = 1 + i * 37 % LONGEST;
                    slots[i] = n - 1 - i;
                    next[i] = tokens[len];
                    if (!model_prefill(&m, slots[i], tokens, len + 1, 1, &err) || !m.engine->read_logits(&m, &err))
                        test_fail("%s", err.text);
                    memcpy(whole + (size_t)i * vocab, m.logits, vocab * sizeof(float));
                    kv_truncate(&m.kv, slots[i], len);
                }
                step(&m, n, slots, next, rows);
                for (size_t i = 0; i < (size_t)n * vocab; i++) {
                    double d = (double)rows[i] - (double)whole[i];
                    error += d * d;
                    all += (double)whole[i] * (double)whole[i];
                }
                if (!(sqrt(error) <= bound * sqrt(all)))
                    test_fail("%s, %d rows: %.4f of the logits' size off", called(shape), n, sqrt(error / all));
                free(whole);
                free(rows);
            }
            model_close(&m);
        }
    end("steps_of_many_rows_continue_prompts");
}

// The engine begins the next step before it is asked for. Logits of steps that go on with the chosen token, of one that
// does not, and of one that follows an interruption by another sequence, are those of an engine that was never ahead.
static void steps_begun_ahead_change_nothing(const char *shape) {
    enum { STEPS = 24 };
    Model m;
    Error err = {""};
    int slots[2] = {0, 1}, first = 300, token = first, given[STEPS];
    if (start_shape(&m, shape, engine, PRECISION_BF16, 2, STEPS + 2)) {
        size_t vocab = (size_t)m.config.vocab_size, bytes = vocab * sizeof(float);
        float *ahead = (float *)malloc(STEPS * bytes), *never = (float *)malloc(bytes), *other = (float *)malloc(bytes);
        for (int k = 0; k < STEPS; k++) {
            if (k == 15 && !model_prefill(&m, 1, &first, 1, 1, &err)) test_fail("%s", err.text);
            given[k] = token;
            step(&m, 1, slots, &token, ahead + (size_t)k * vocab);
            token = k % 8 == 6 ? (m.argmax[0] + 1) % m.config.vocab_size : m.argmax[0];
        }
        kv_reset(&m.kv, 0);
        kv_reset(&m.kv, 1);
        for (int k = 0; k < STEPS; k++) { // by turns with another sequence, no step follows the one before
            step(&m, 1, slots, &given[k], never);
            if (memcmp(never, ahead + (size_t)k * vocab, bytes) != 0)
                test_fail("%s, step %d: other logits", called(shape), k);
            step(&m, 1, slots + 1, &given[k], other);
            if (memcmp(never, other, bytes) != 0)
                test_fail("%s, step %d: other logits in another slot", called(shape), k);
        }
        free(ahead);
        free(never);
        free(other);
    }
    model_close(&m);
}

static void test_steps_begun_ahead_change_nothing(void) {
    static const char *const shapes[] = {NULL, "stories int4:64/int8"};
    for (const char *shape : shapes) steps_begun_ahead_change_nothing(shape);
    end("steps_begun_ahead_change_nothing");
}

// Decode rows beside parts of prompts, in one batch: the logits of all rows that have some, in the batch's order, are
// those of each sequence in batches of its own, also where the next step has begun before the prompt came. Sequences in
// `decoding` slots decode; that in the last slot is a prompt in parts, with logits at the end of the last one. ends:
// the step before the first part says that a sequence ends, so that no step has begun.
static void decode_rows_beside_prompts(const char *shape, int slots, int decoding, bool ends) {
    enum { STEPS = 12, PART = 40, FIRST_PART = 4, PARTS = 3, MOST = 36 };
    const bool same_bits = strcmp(engine, "fused") == 0; // of cublas: but for rounding
    Model m;
    Error err = {""};
    if (start_shape(&m, shape, engine, PRECISION_BF16, slots, PART * PARTS + STEPS)) {
        if (slots == 3 || slots == 40) CHECK(m.two_passes == (same_bits && slots == 3)); // (12: if wide.h takes them)
        size_t vocab = (size_t)m.config.vocab_size, bytes = vocab * sizeof(float);
        size_t all_bytes = (size_t)decoding * bytes;
        float *apart = (float *)malloc(STEPS * all_bytes), *last = (float *)malloc(bytes);
        int tokens[PART * PARTS], slot[MOST + 1], next[STEPS + 1][MOST], rows[MOST + 1], start_at[MOST + 2];
        random_tokens(tokens, PART * PARTS, &m);
        for (int i = 0; i < decoding; i++) slot[i] = i + 1 < decoding ? i : slots - 2;
        slot[decoding] = slots - 1;
        for (int i = 0; i <= decoding; i++) rows[i] = start_at[i] = i;
        auto check = [&](const char *what, int step, const float *expected, const float *logits, size_t n) {
            double error = 0, all = 0;
            for (size_t i = 0; i < n; i++) {
                error += ((double)logits[i] - (double)expected[i]) * ((double)logits[i] - (double)expected[i]);
                all += (double)expected[i] * (double)expected[i];
            }
            if (same_bits ? memcmp(expected, logits, n * sizeof(float)) != 0 : !(sqrt(error) <= 0.02 * sqrt(all)))
                test_fail("%s, %d of %d slots, step %d: %s: other logits, %.4f of their size off", called(shape),
                          decoding, slots, step, what, sqrt(error / all));
        };
        for (int how = 0; how < 2; how++) { // apart, together
            for (int i = 0; i < slots; i++) kv_reset(&m.kv, i);
            for (int i = 0; i < decoding; i++) {
                if (!model_prefill(&m, slot[i], tokens + i, 5 + 7 * i % 71, 1, &err)) test_fail("%s", err.text);
                if (how == 0) next[0][i] = m.argmax[0];
            }
            if (how == 0 &&
                (!model_prefill(&m, slot[decoding], tokens, PART * PARTS, 1, &err) || !m.engine->read_logits(&m, &err)))
                test_fail("%s", err.text);
            if (how == 0) memcpy(last, m.logits, bytes);
            for (int k = 0; k < STEPS; k++) {
                int part = how == 0 ? -1 : k - FIRST_PART;
                bool mixed = part >= 0 && part < PARTS, whole = part + 1 == PARTS;
                int n = mixed ? decoding + PART : decoding, batch[MOST + PART];
                memcpy(batch, next[k], (size_t)decoding * sizeof(int));
                if (mixed) memcpy(batch + decoding, tokens + part * PART, PART * sizeof(int));
                rows[decoding] = n - 1;
                start_at[decoding + 1] = n;
                Batch b = {.n_rows = n,
                           .n_seq = mixed ? decoding + 1 : decoding,
                           .n_logits = whole ? decoding + 1 : decoding,
                           .n_decode = decoding,
                           .tokens = batch,
                           .slot = slot,
                           .start = start_at,
                           .logit_rows = rows,
                           .ends = ends && k + 1 == FIRST_PART};
                if (!model_forward(&m, &b, &err)) test_fail("step %d: %s", k, err.text);
                if (how == 0) memcpy(next[k + 1], m.argmax, (size_t)decoding * sizeof(int));
                if (!m.engine->read_logits(&m, &err)) test_fail("step %d: %s", k, err.text);
                float *kept = apart + (size_t)k * (size_t)decoding * vocab;
                if (how == 0) memcpy(kept, m.logits, all_bytes);
                check("a step beside a prompt", k, kept, m.logits, (size_t)decoding * vocab);
                const float *of_prompt = m.logits + (size_t)decoding * vocab;
                if (whole) CHECK(m.argmax[decoding] == argmax(of_prompt, (int)vocab));
                if (whole) check("a prompt beside steps", k, last, of_prompt, vocab);
            }
        }
        free(apart);
        free(last);
    }
    model_close(&m);
}

static void test_decode_rows_beside_prompts(void) {
    const char *const shapes[] = {NULL, "llama-3.2-1b", "stories int8:32/int8", "llama-3.2-1b int4:32+bf16+fp8/int8"};
    for (const char *shape : shapes) {
        for (int slots : {3, 12, 40}) decode_rows_beside_prompts(shape, slots, 2, slots == 12);
        for (bool ends : {false, true}) decode_rows_beside_prompts(shape, 40, 36, ends);
    }
    end("decode_rows_beside_prompts");
}

// Candidates: a step of several rows of each sequence, some of which are then rejected, gives every row the bits that
// one step after another gives.
static bool start_speculating(Model *m, const char *shape, int slots, int max_len, int gpus) {
    Error err = {""};
    bool ok = open_model(m, shape, &err);
    m->gpus = gpus;
    m->one_gpu = gpus > n_gpus;
    if (ok && model_choose(m, engine, PRECISION_BF16, &err) && speculation_prepare(m, slots, &err) &&
        model_start(m, engine, PRECISION_BF16, slots, max_len, &err))
        return true;
    test_fail("%s", err.text);
    return false;
}

enum { CANDIDATE_SEQS = 3, CANDIDATE_PROMPT = 70, CANDIDATE_TOKENS = 24 };

// tokens [CANDIDATE_SEQS][CANDIDATE_PROMPT + CANDIDATE_TOKENS]; logits [CANDIDATE_SEQS][CANDIDATE_TOKENS][vocab]: after
// each token, by one step after another.
static void step_by_step(int slots, const char *shape, const int *slot, int n_seq, const int *tokens, float *logits) {
    Model m;
    Error err = {""};
    int length = CANDIDATE_PROMPT + CANDIDATE_TOKENS, rows[] = {0, 1, 2, 3}, next[CANDIDATE_SEQS];
    if (start_shape(&m, shape, engine, PRECISION_BF16, slots, length + 8)) {
        size_t vocab = (size_t)m.config.vocab_size;
        for (int i = 0; i < n_seq; i++)
            CHECK(model_prefill(&m, slot[i], tokens + i * length, CANDIDATE_PROMPT, 0, &err));
        for (int t = 0; t < CANDIDATE_TOKENS; t++) {
            Batch b = {n_seq, n_seq, n_seq, n_seq, next, slot, rows, rows, false};
            for (int i = 0; i < n_seq; i++) next[i] = tokens[i * length + CANDIDATE_PROMPT + t];
            if (!model_forward(&m, &b, &err) || !m.engine->read_logits(&m, &err)) test_fail("%s", err.text);
            for (int i = 0; i < n_seq; i++)
                memcpy(logits + ((size_t)i * CANDIDATE_TOKENS + t) * vocab, m.logits + i * vocab,
                       vocab * sizeof(float));
        }
    }
    model_close(&m);
}

// beside_prompt: with a prompt in another slot, so of more than CANDIDATE_SEQS. gpus: of the run with candidates; the
// other has one.
static void check_candidates(int slots, const char *shape, bool beside_prompt, int gpus = 1) {
    Model m;
    Error err = {""};
    int slot[CANDIDATE_SEQS + 1] = {slots - 1, 0, slots / 2, 1},
                              n_seq = slots < CANDIDATE_SEQS ? slots : CANDIDATE_SEQS;
    int length = CANDIDATE_PROMPT + CANDIDATE_TOKENS, tokens[CANDIDATE_SEQS * (CANDIDATE_PROMPT + CANDIDATE_TOKENS)];
    int batch[MAX_STEP_ROWS], start[CANDIDATE_SEQS + 2] = {0}, rows[MAX_STEP_ROWS], done[CANDIDATE_SEQS] = {0},
                                                     turn = 0;
    if (!start_speculating(&m, shape, slots, length + 8, gpus)) return;
    size_t vocab = (size_t)m.config.vocab_size;
    float *expected = (float *)malloc((size_t)CANDIDATE_SEQS * CANDIDATE_TOKENS * vocab * sizeof *expected);
    random_tokens(tokens, CANDIDATE_SEQS * length, &m);
    step_by_step(slots, shape, slot, n_seq, tokens, expected);
    for (int i = 0; i < n_seq; i++) CHECK(model_prefill(&m, slot[i], tokens + i * length, CANDIDATE_PROMPT, 0, &err));
    for (; done[0] < CANDIDATE_TOKENS && !test_failure[0]; turn++) {
        int n = 0, most = m.step_rows / n_seq;
        for (int i = 0; i < n_seq; i++) { // as many rows as fit, of those after the first some wrong tokens
            int left = CANDIDATE_TOKENS - done[i], want = 1 + (turn * 3 + i * 5) % 8;
            if (want > left) want = left;
            if (want > most) want = most;
            for (int r = 0; r < want; r++) batch[n++] = tokens[i * length + CANDIDATE_PROMPT + done[i] + r];
            if (want > 2 && turn % 2) batch[n - 1] = 5; // the last candidate is another
            start[i + 1] = n;
        }
        for (int r = 0; r < n + 1; r++) rows[r] = r;
        int n_logits = n, n_rows = n, n_batch = n_seq;
        if (beside_prompt && turn % 2) { // of a sequence that goes away again
            for (int t = 0; t < 9; t++) batch[n_rows++] = 300 + t;
            rows[n_logits++] = n_rows - 1;
            start[++n_batch] = n_rows;
        }
        Batch b = {n_rows, n_batch, n_logits, n_seq, batch, slot, start, rows, false};
        if (!model_forward(&m, &b, &err) || !m.engine->read_logits(&m, &err)) {
            test_fail("%d slots: %s", slots, err.text);
            break;
        }
        if (n_batch > n_seq) kv_reset(&m.kv, slot[n_seq]);
        for (int i = 0; i < n_seq; i++) {
            int right = start[i + 1] - start[i] - (start[i + 1] - start[i] > 2 && turn % 2);
            for (int r = 0; r < right; r++) {
                const float *got = m.logits + (start[i] + r) * vocab;
                int at = done[i] + r;
                if (memcmp(got, expected + ((size_t)i * CANDIDATE_TOKENS + at) * vocab, vocab * sizeof *got) != 0)
                    test_fail("%d slots, sequence %d, token %d, row %d of %d: other bits than in a step of its own",
                              slots, i, at, r, start[i + 1] - start[i]);
                CHECK(m.argmax[start[i] + r] == argmax(got, m.config.vocab_size));
            }
            done[i] += right;
            kv_truncate(&m.kv, slot[i], CANDIDATE_PROMPT + done[i]);
        }
    }
    free(expected);
    model_close(&m);
}

static void test_candidates_have_the_bits_of_one_step_after_another(void) {
    check_candidates(1, NULL, false);
    check_candidates(3, NULL, false);
    check_candidates(20, NULL, false);
    check_candidates(20, NULL, true);
    check_candidates(1, "llama-3.2-1b", false);
    check_candidates(20, "llama-3.2-1b", false);
    check_candidates(1, "llama-3.1-8b int4/int8", false);
    check_candidates(3, "stories int8:32/int8", false);
    check_candidates(20, "llama-3.2-1b fp8+int4:64/fp8", true);
    end("candidates_have_the_bits_of_one_step_after_another");
}

// What is drawn is what sample_token chooses from the same logits: beside a step that runs ahead, and where every
// step's tokens are drawn.
static void test_draws_equal_sample_token(void) {
    enum { STEPS = 24, SLOTS = 3 };
    Model m;
    Error err = {""};
    SamplerConfig configs[SLOTS] = {};
    for (int i = 0; i < SLOTS; i++) {
        configs[i].temperature = 0.8f + (float)i;
        configs[i].top_p = i == 0 ? 1 : 0.9f;
        configs[i].top_k = i == 2 ? 40 : 0;
    }
    int slots[SLOTS] = {0, 1, 2}, tokens[SLOTS] = {300, 301, 302}, ids[SLOTS];
    uint64_t random = 1;
    if (start(&m, engine, PRECISION_BF16, SLOTS, STEPS + 1)) {
        int vocab = m.config.vocab_size;
        float *logits = (float *)malloc(SLOTS * (size_t)vocab * sizeof(float));
        for (int k = 0; k < STEPS; k++) {
            step(&m, SLOTS, slots, tokens, logits);
            for (int i = 0; i < SLOTS; i++) tokens[i] = m.argmax[i];
            if (k < STEPS / 2 && k % 4 != 3) continue; // the step after the next one runs ahead
            SampleRow rows[SLOTS];
            for (int i = 0; i < SLOTS; i++) rows[i] = {SLOTS - 1 - i, &configs[i], random_uniform(&random)};
            if (!m.engine->sample(&m, rows, SLOTS, ids, &err)) test_fail("%s", err.text);
            for (int i = 0; i < SLOTS; i++) {
                int want = sample_token(&configs[i], logits + (size_t)rows[i].row * vocab, vocab, rows[i].u);
                if (ids[i] != want) test_fail("step %d: row %d draws %d, expected %d", k, rows[i].row, ids[i], want);
            }
            for (int i = 0; k >= STEPS / 2 && i < SLOTS; i++) tokens[rows[i].row] = ids[i];
        }
        free(logits);
    }
    model_close(&m);
    end("draws_equal_sample_token");
}

// ---- several GPUs ---------------------------------------------------------------------------------------------------
// The parts of a model that N GPUs have; all on one, if the machine has fewer: what each computes, what they gather and
// in which order is the same. tests/test_shard.c has the cuts.

enum { TRACE_STEPS = 14, TRACE_SEQUENCES = 40 };

// The logits of a run, in the order in which they come, and keys and values: compared with those of another, or kept;
// and its tokens, which the others take.
struct Trace {
    float *logits;
    char *pages; // as SavedPages has them, one after another
    int tokens[TRACE_STEPS][TRACE_SEQUENCES];
    size_t n, at;
    bool compares;
    double error, size; // sums of squares, of differences and of what was expected
    bool same;
    char logits_differ[128], pages_differ[128]; // where first: of a product before the last, both do

    void begin(bool compare) {
        compares = compare;
        at = 0;
        error = size = 0;
        same = true;
        logits_differ[0] = pages_differ[0] = 0;
    }
    // what, number: what was computed.
    void add(const Model *m, int rows, const char *what, int number) {
        size_t count = (size_t)rows * (size_t)m->config.vocab_size;
        if (!compares) {
            logits = (float *)realloc(logits, (at + count) * sizeof *logits);
            n = at + count;
            memcpy(logits + at, m->logits, count * sizeof *logits);
        } else if (at + count > n) {
            same = false;
        } else {
            for (size_t i = 0; i < count; i++) {
                if (memcmp(logits + at + i, m->logits + i, sizeof *logits) != 0 && same) {
                    const int vocab = m->config.vocab_size;
                    snprintf(logits_differ, sizeof logits_differ, "; %s %d, row %d of %d, from logit %d on", what,
                             number, (int)i / vocab, rows, (int)i % vocab);
                    same = false;
                }
                double d = (double)m->logits[i] - (double)logits[at + i];
                error += d * d;
                size += (double)logits[at + i] * (double)logits[at + i];
            }
        }
        at += count;
    }
    // Keys and values in bf16, of a sequence that has left. (A layer's depend on all products of the layers before.)
    void add_pages(const Model *m, const SavedPages *saved) {
        const Config *c = &m->config;
        const size_t row = (size_t)c->head_dim * 2, layer = kv_page_elements(c->n_kv_heads, c->head_dim) * 2,
                     page = 2 * (size_t)c->n_layers * layer;
        if (!compares) pages = (char *)calloc((size_t)saved->n, page);
        for (int i = 0; i < saved->n && !compares; i++) memcpy(pages + (size_t)i * page, saved->pages[i], page);
        for (int l = 0; l < c->n_layers; l++)
            for (int pos = 0; pos < saved->len; pos++)
                for (int k = 0; k < 2 * c->n_kv_heads; k++) {
                    const bool value = k >= c->n_kv_heads;
                    const size_t at = (size_t)(value * c->n_layers + l) * layer +
                                      (size_t)(k % c->n_kv_heads * KV_PAGE + pos % KV_PAGE) * row;
                    if (memcmp(pages + (size_t)(pos / KV_PAGE) * page + at, (char *)saved->pages[pos / KV_PAGE] + at,
                               row) == 0 ||
                        pages_differ[0])
                        continue;
                    snprintf(pages_differ, sizeof pages_differ, "; %s of layer %d, head %d, position %d of %d",
                             value ? "values" : "keys", l, k % c->n_kv_heads, pos, saved->len);
                }
    }
};

// `slots` sequences with prompts of other lengths, in parts; steps that go on with what the model takes, so that graphs
// replay and steps run ahead; in the middle a sequence that leaves for host memory and comes back and, but with 8
// sequences, which have no slot beside them, a step beside a prompt. All logits go to the trace.
static void run_of_shards(const char *shape, Precision precision, int slots, int gpus, bool gathers_only,
                          Trace *trace) {
    enum { STEPS = TRACE_STEPS, LONGEST = 700, MOST = TRACE_SEQUENCES };
    const bool beside = slots != 8; // a ninth would give the run another order of sums
    static const int lengths[] = {1, 65, 3, 300, 17, LONGEST, 2, 128};
    Model m;
    Error err = {""};
    SavedPages saved = {};
    int tokens[LONGEST], batch[MOST + 50], slot[MOST + 1], rows[MOST + 2], start_at[MOST + 2];
    if (start_shape(&m, shape, engine, precision, slots + beside, LONGEST + STEPS + 8, 0, gpus, gathers_only)) {
        auto compute = [&](const Batch &b, const char *what, int number) {
            if (!model_forward(&m, &b, &err) || !m.engine->read_logits(&m, &err)) {
                test_fail("%s: %s %d: %s", called(shape), what, number, err.text);
                return;
            }
            trace->add(&m, b.n_logits, what, number);
            for (int i = 0; i < b.n_logits; i++)
                CHECK(m.argmax[i] == argmax(m.logits + (size_t)i * m.config.vocab_size, m.config.vocab_size));
        };
        random_tokens(tokens, LONGEST, &m);
        for (int i = 0; i <= slots; i++) slot[i] = i, rows[i] = start_at[i] = i;
        for (int i = 0; i < slots && !err.text[0]; i++) {
            int n = lengths[(i + 5) % 8], cut = n / 3, last = n - cut - 1, start[2] = {0, n - cut}, at = slot[i];
            if (cut && !model_prefill(&m, at, tokens, cut, i % 2, &err)) test_fail("%s", err.text);
            compute({n - cut, 1, 1, 0, tokens + cut, &at, start, &last, false}, "prompt", i);
            if (!trace->compares) trace->tokens[0][i] = m.argmax[0];
        }
        for (int k = 0; k < STEPS && !err.text[0]; k++) {
            memcpy(batch, trace->tokens[k], (size_t)slots * sizeof(int));
            if (k == 8) { // sequence 0 leaves, and comes back
                CHECK(model_save_pages(&m, 0, &saved, &err) && m.kv.held[0] == 0);
                cudaDeviceSynchronize(); // the pages are on their way
                if (precision != PRECISION_F32) trace->add_pages(&m, &saved);
                CHECK(model_restore_pages(&m, 0, &saved, &err));
            }
            if (k == 10 && beside) { // a prompt, whose last two rows have logits
                for (int i = 0; i < 50; i++) batch[slots + i] = tokens[i];
                rows[slots] = slots + 48, rows[slots + 1] = slots + 49;
                start_at[slots + 1] = slots + 50;
                compute({slots + 50, slots + 1, slots + 2, slots, batch, slot, start_at, rows, false},
                        "a prompt beside step", k);
                kv_reset(&m.kv, slots);
            } else
                compute({slots, slots, slots, slots, batch, slot, start_at, rows, false}, "step", k);
            if (!trace->compares && k + 1 < STEPS) memcpy(trace->tokens[k + 1], m.argmax, (size_t)slots * sizeof(int));
        }
        model_free_pages(&m, &saved);
    }
    model_close(&m);
}

static void check_shards(const char *shape, Precision precision, int slots, int most) {
    Trace trace = {};
    const bool fused = strcmp(engine, "fused") == 0, exact = fused && precision != PRECISION_F32;
    const double bound = precision == PRECISION_F32 ? 1e-4 : 0.03; // of other orders of sums
    for (int gpus = 1; gpus <= most && !test_failure[0]; gpus *= 2)
        for (bool gathers_only : {false, true}) {
            if (gathers_only && (!fused || gpus != 2)) continue;
            trace.begin(gpus > 1);
            run_of_shards(shape, precision, slots, gpus, gathers_only, &trace);
            if (test_failure[0]) break;
            if (trace.at != trace.n)
                test_fail("%s, %d GPUs: %zu logits, expected %zu", called(shape), gpus, trace.at, trace.n);
            else if (exact ? !trace.same : !(trace.error <= bound * bound * trace.size) && gpus > 1)
                test_fail("%s, %s, %d sequences, %d GPUs%s: other logits than one GPU's, %.2g of their size off%s%s",
                          called(shape), precision_names[precision], slots, gpus, gathers_only ? ", which gather" : "",
                          sqrt(trace.error / trace.size), trace.logits_differ, trace.pages_differ);
        }
    free(trace.logits);
    free(trace.pages);
}

static void test_shards_have_the_bits_of_one_gpu(void) {
    static const struct {
        const char *shape;
        int most;
        bool large; // fewer runs, of the sizes that have kernels of their own: wide.h takes 16-bit weights of them
    } shapes[] = {{NULL, 2, false},
                  {"odd", 8, false},
                  {"stories fp8/fp8", 2, false},
                  {"odd int8+fp8+bf16/int8", 8, false},
                  {"odd int4:32+int8:64/int4:128", 8, false},
                  {"llama-3.2-1b", 4, true},
                  {"llama-3.1-8b", 2, true},
                  {"llama-3.1-8b int4/int8", 2, true}};
    for (const auto &shape : shapes) {
        for (int slots : {1, 8, 12, 20, 40})
            if (!shape.large || (slots != 8 && slots != 40))
                check_shards(shape.shape, PRECISION_BF16, slots, shape.most);
        check_shards(shape.shape, PRECISION_F32, 1, shape.most);
        if (!shape.large) check_shards(shape.shape, PRECISION_F32, 8, shape.most);
    }
    for (int slots : {1, 12, 40})
        if (has_fp8) check_shards("stories fp8/fp8", PRECISION_FP8, slots, 2);
    if (has_fp8) check_shards("llama-3.2-1b fp8", PRECISION_FP8, 12, 4);
    end("shards_have_the_bits_of_one_gpu");
}

// Several rows of a sequence in a step.
static void test_candidates_by_shards(void) {
    static const char *const shapes[] = {"odd", "stories int8:32/int8"};
    for (const char *shape : shapes) {
        check_candidates(1, shape, false, 2);
        check_candidates(4, shape, true, 2);
    }
    check_candidates(3, "odd", false, 8);
    end("candidates_by_shards");
}

// Bytes that this process has read of files; 0: the system does not say.
static unsigned long long bytes_read(void) {
    unsigned long long bytes = 0;
    FILE *f = fopen("/proc/self/io", "r");
    if (f && fscanf(f, "rchar: %llu", &bytes) != 1) bytes = 0;
    if (f) fclose(f);
    return bytes;
}

// However many GPUs there are, also of what all of them have (embeddings, norms).
static void test_shards_read_every_byte_once(void) {
    unsigned long long once = 0, slack = 256 << 10; // the driver reads, too
    if (bytes_read() == 0) test_fail("/proc/self/io does not say what was read");
    for (int gpus : {1, 1, 2}) { // the first start loads libraries
        Model m;
        unsigned long long before = bytes_read();
        if (start_shape(&m, NULL, engine, PRECISION_BF16, 1, 64, 0, gpus)) {
            unsigned long long bytes = bytes_read() - before;
            if (gpus == 2 && (bytes > once + slack || bytes + slack < once))
                test_fail("%llu bytes on 2 GPUs, %llu on one", bytes, once);
            once = bytes;
        }
        model_close(&m);
    }
    end("shards_read_every_byte_once");
}

// Where memory is short a prompt comes in smaller parts, and has the same bits in engine fused.
static void test_prompts_in_smaller_parts_where_memory_is_short(void) {
    enum { CONTEXT = 4096, LENGTH = 3000, RESERVE = 256 << 20, LESS = 100 << 20 };
    const char *shape = "llama-3.1-8b int4/int8";
    Model m;
    Error err = {""};
    int tokens[LENGTH], rows = 0;
    std::vector<float> whole;
    uint64_t bytes = 0;
    if (start_shape(&m, shape, engine, PRECISION_BF16, 1, CONTEXT)) {
        random_tokens(tokens, LENGTH, &m);
        CHECK(model_prefill(&m, 0, tokens, LENGTH, 1, &err) && m.engine->read_logits(&m, &err));
        whole.assign(m.logits, m.logits + m.config.vocab_size);
        rows = m.max_rows;
        bytes = m.weights.bytes + m.buffer_bytes + m.kv.bytes + RESERVE - LESS;
    }
    model_close(&m);
    if (whole.empty()) return end("prompts_in_smaller_parts_where_memory_is_short");
    CHECK(open_model(&m, shape, &err));
    m.gpu_memory = bytes;
    if (model_start(&m, engine, PRECISION_BF16, 1, CONTEXT, &err)) {
        CHECK(rows == CONTEXT && m.max_rows < LENGTH && m.max_rows >= 512);
        CHECK(model_prefill(&m, 0, tokens, LENGTH, 1, &err) && m.engine->read_logits(&m, &err));
        if (strcmp(engine, "fused") == 0 && memcmp(whole.data(), m.logits, whole.size() * sizeof whole[0]) != 0)
            test_fail("parts of %d and of %d rows have other logits", rows, m.max_rows);
    } else
        test_fail("%s", err.text);
    model_close(&m);
    end("prompts_in_smaller_parts_where_memory_is_short");
}

// 8B as int4 with 4096 positions: all that it takes of a GPU, CUDA's own included.
static void test_8b_int4_takes_7_gb(void) {
    const uint64_t LIMIT = 7000000000;
    enum { CONTEXT = 4096, LENGTH = 4000, STEPS = 20 };
    QuantType layers, output;
    Model m;
    Error err = {""};
    int tokens[LENGTH];
    size_t free_bytes, total;
    cudaMemGetInfo(&free_bytes, &total);
    const uint64_t own = total - free_bytes;
    if (own > 1500000000) {
        char name[64];
        snprintf(name, sizeof name, "test_%s_8b_int4_takes_7_gb", engine);
        return test_skip(name, "other programs use this GPU");
    }
    CHECK(quant_parse("int4", &layers) && quant_parse("int8", &output));
    CHECK(synthetic_open(&m, "llama-3.1-8b", 1, &err) && synthetic_set_types(&m, layers, output, &err));
    m.gpu_memory = LIMIT - own;
    if (model_start(&m, engine, PRECISION_BF16, 1, CONTEXT, &err)) {
        random_tokens(tokens, LENGTH, &m);
        CHECK(model_prefill(&m, 0, tokens, LENGTH, 1, &err));
        for (int i = 0; i < STEPS; i++) CHECK(model_decode(&m, 0, m.argmax[0], &err));
        cudaMemGetInfo(&free_bytes, &total);
        const uint64_t used = total - free_bytes;
        printf("# %.3f GB of GPU memory, CUDA's own %.3f, weights %.3f, cache %.3f, buffers %.3f; parts of %d rows\n",
               (double)used * 1e-9, (double)own * 1e-9, (double)m.weights.bytes * 1e-9, (double)m.kv.bytes * 1e-9,
               (double)m.buffer_bytes * 1e-9, m.max_rows);
        if (used > LIMIT)
            test_fail("%llu bytes, expected at most %llu", (unsigned long long)used, (unsigned long long)LIMIT);
    } else
        test_fail("%s", err.text);
    model_close(&m);
    end("8b_int4_takes_7_gb");
}

// A model that does not fit: the message says on how many GPUs it would; on more, with what there is, it starts.
static void test_message_says_how_many_gpus_would_do(void) {
    const uint64_t limit = 3100000000;
    Model m;
    for (int gpus : {1, 2}) {
        Error err = {""};
        CHECK(open_model(&m, "llama-3.1-8b", &err)); // 2.97 GB of weights, 2.01 GB each on two
        m.gpus = gpus;
        m.one_gpu = true;
        m.gpu_memory = limit * (uint64_t)gpus; // of one that has the parts of two
        bool ok = model_start(&m, engine, PRECISION_BF16, 1, 64, &err);
        if (gpus == 1 && (ok || !strstr(err.text, "; on 2 GPUs it would fit (--gpus 2)"))) test_fail("%s", err.text);
        if (gpus == 2 && !ok) test_fail("%s", err.text);
        model_close(&m);
    }
    Error err = {""};
    CHECK(open_model(&m, "llama-3.2-1b", &err));
    m.gpus = 8;
    if (n_gpus < 8 &&
        (model_start(&m, engine, PRECISION_BF16, 1, 64, &err) || !strstr(err.text, "--gpus 8: this machine has ")))
        test_fail("%s", err.text);
    model_close(&m);
    end("message_says_how_many_gpus_would_do");
}

int main(void) {
    static const struct {
        const char *name;
        void (*run)(void);
    } tests[] = {
        {"1000_steps_leave_memory_unchanged", test_1000_steps_leave_memory_unchanged},
        {"logits_equal_the_cpus", test_logits_equal_the_cpus},
        {"logits_of_quantised_weights_equal_the_cpus", test_logits_of_quantised_weights_equal_the_cpus},
        {"some_rows_have_logits", test_some_rows_have_logits},
        {"fp8_products_of_prompts_alone", test_fp8_products_of_prompts_alone},
        {"decode_continues_prefill", test_decode_continues_prefill},
        {"long_prompt_equals_its_parts", test_long_prompt_equals_its_parts},
        {"nan_weight_is_noticed", test_nan_weight_is_noticed},
        {"bad_codes_and_scales_are_named", test_bad_codes_and_scales_are_named},
        {"cache_is_filled_for_the_benchmark", test_cache_is_filled_for_the_benchmark},
        {"starts_again_with_another_cache", test_starts_again_with_another_cache},
        {"memory_for_pages", test_memory_for_pages},
        {"pages_scattered_have_the_same_bits", test_pages_scattered_have_the_same_bits},
        {"pages_saved_and_restored_have_the_same_bits", test_pages_saved_and_restored_have_the_same_bits},
        {"pages_shared_have_the_same_bits", test_pages_shared_have_the_same_bits},
        {"steps_of_many_rows_continue_prompts", test_steps_of_many_rows_continue_prompts},
        {"steps_begun_ahead_change_nothing", test_steps_begun_ahead_change_nothing},
        {"decode_rows_beside_prompts", test_decode_rows_beside_prompts},
        {"draws_equal_sample_token", test_draws_equal_sample_token},
        {"same_bits_alone_and_among_others", test_same_bits_alone_and_among_others},
        {"candidates_have_the_bits_of_one_step_after_another", test_candidates_have_the_bits_of_one_step_after_another},
        {"prompts_have_the_same_bits_in_any_batch", test_prompts_have_the_same_bits_in_any_batch},
        {"shards_have_the_bits_of_one_gpu", test_shards_have_the_bits_of_one_gpu},
        {"candidates_by_shards", test_candidates_by_shards},
        {"shards_read_every_byte_once", test_shards_read_every_byte_once},
        {"prompts_in_smaller_parts_where_memory_is_short", test_prompts_in_smaller_parts_where_memory_is_short},
        {"8b_int4_takes_7_gb", test_8b_int4_takes_7_gb},
        {"message_says_how_many_gpus_would_do", test_message_says_how_many_gpus_would_do}};
    const char *engines[] = {"cublas", "fused"};
    cudaError_t status = cudaGetDeviceCount(&n_gpus);
    if (status != cudaSuccess || n_gpus == 0) skip_reason = "no GPU";
    int major = 0;
    has_fp8 = !skip_reason && cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0) == cudaSuccess &&
              major == 9;
    snprintf(folder, sizeof folder, "/tmp/test_engine_cuda.XXXXXX");
    if (!skip_reason && !mkdtemp(folder)) folder[0] = 0;
    for (int e = 0; e < 2; e++) {
        Model m;
        Error err = {""}, closed = {""};
        engine = engines[e];
        if (!skip_reason && e == 1 &&
            checkpoint_open(&m, "model/stories.bin", false, &closed)) { // an older GPU has only cublas
            if (!model_start(&m, engine, PRECISION_BF16, 1, 8, &err)) skip_reason = err.text;
            model_close(&m);
        }
        for (size_t i = 0; i < sizeof tests / sizeof *tests; i++) {
            char name[128];
            if (e == 0 &&
                (tests[i].run == test_same_bits_alone_and_among_others || tests[i].run == test_candidates_by_shards ||
                 tests[i].run == test_candidates_have_the_bits_of_one_step_after_another ||
                 tests[i].run == test_pages_shared_have_the_same_bits ||
                 tests[i].run == test_prompts_have_the_same_bits_in_any_batch))
                continue;
            snprintf(name, sizeof name, "test_%s_%s", engine, tests[i].name);
            if (!test_wanted(name)) continue;
            if (skip_reason)
                test_skip(name, skip_reason);
            else if (tests[i].run == test_fp8_products_of_prompts_alone && !has_fp8)
                test_skip(name, "needs a Hopper GPU");
            else
                tests[i].run();
        }
    }
    if (!skip_reason) remove_stories();
    return tests_summary();
}
