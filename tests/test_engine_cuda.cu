// The GPU's engines from the inside: memory over many steps, prompts in parts, broken weights, logits against engine cpu;
// of weights in 16 bits and of quantised ones.
#include "engine_check.cuh"
extern "C" {
#include "../model/measure/peak.h"
}

#include <vector>

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
// Twice over the same sizes: what the first time loads, code for so many rows, stays.
static void starts_again_with_another_cache(const char *shape, int gpus) {
    Model m;
    Error err = {""};
    int token = 300, choice = -1;
    size_t before = 0, after = 0, total;
    if (start_shape(&m, shape, engine, PRECISION_BF16, 1, 100, 0, gpus)) {
        for (int k = 0; k < 12; k++) {
            const int i = k % 6;
            Error refused = {""};
            model_stop(&m);
            if (k == 6) cudaMemGetInfo(&before, &total);
            m.kv_memory = i % 2 ? (uint64_t)1 << 50 : 0; // asked for, or what one context takes
            CHECK(!model_start(&m, engine, PRECISION_BF16, i % 2 ? MAX_SLOTS : 1, i % 2 ? 1 << 22 : 1 << 29, &refused));
            CHECK(strstr(refused.text, i % 2 ? "are free; at most " : "are free; a context of "));
            model_stop(&m);
            m.kv_memory = 0;
            if (!model_start(&m, engine, PRECISION_BF16, 1 + i, 100 + 100 * i, &err)) test_fail("%s", err.text);
            if (!model_prefill(&m, 0, &token, 1, 1, &err)) test_fail("%s", err.text);
            if (k == 0) choice = m.argmax[0];
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

int main(void) {
    static const EngineTest tests[] = {
        {"1000_steps_leave_memory_unchanged", test_1000_steps_leave_memory_unchanged},
        {"logits_equal_the_cpus", test_logits_equal_the_cpus},
        {"logits_of_quantised_weights_equal_the_cpus", test_logits_of_quantised_weights_equal_the_cpus},
        {"some_rows_have_logits", test_some_rows_have_logits},
        {"fp8_products_of_prompts_alone", test_fp8_products_of_prompts_alone, FP8_PRODUCTS},
        {"decode_continues_prefill", test_decode_continues_prefill},
        {"long_prompt_equals_its_parts", test_long_prompt_equals_its_parts},
        {"nan_weight_is_noticed", test_nan_weight_is_noticed},
        {"bad_codes_and_scales_are_named", test_bad_codes_and_scales_are_named},
        {"cache_is_filled_for_the_benchmark", test_cache_is_filled_for_the_benchmark},
        {"starts_again_with_another_cache", test_starts_again_with_another_cache},
        {"prompts_in_smaller_parts_where_memory_is_short", test_prompts_in_smaller_parts_where_memory_is_short},
        {"8b_int4_takes_7_gb", test_8b_int4_takes_7_gb}};
    return run_with_both_engines(tests);
}
