// --quantize: what it writes, read back by the tests' own reader and decoded by the types' definition; the same file
// for any number of threads; what it refuses, and that it leaves nothing behind then.
#include <errno.h>
#include <signal.h>
#include <sys/file.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include "model_writer.h"

enum { DIM = 64, HIDDEN = 176 }; // 176 columns have a short last group of each size

static char model_path[300], out_path[300], part_path[310];

static const char *const layer_matrices[] = {"wq", "wk", "wv", "wo", "w1", "w2", "w3"};

// A model of two layers.
static void write_source(const char *dtype, bool tied) {
    Shape s = {DIM, HIDDEN, 2, 4, 2, 16, 128, dtype, tied, true};
    Draft d;
    draft_tiny(&d, s, 1);
    draft_meta(&d, "source", "tab\\t, \\\"quote\\\", \\\\ and \\u00e9");
    draft_write(&d, model_path);
    draft_free(&d);
}

static bool exists(const char *path) {
    return access(path, F_OK) == 0;
}

// ---- what is written ------------------------------------------------------------------------------------------------

static double number(const Part *p, size_t i) {
    uint16_t h;
    float f;
    if (strcmp(p->dtype, "F32") == 0) {
        memcpy(&f, p->data + 4 * i, sizeof f);
        return (double)f;
    }
    memcpy(&h, p->data + 2 * i, sizeof h);
    int bits = strcmp(p->dtype, "F16") == 0 ? 10 : 7, bias = bits == 10 ? 15 : 127;
    int exponent = (h & 0x7FFF) >> bits, fraction = h & ((1 << bits) - 1);
    double v = exponent ? ldexp((1 << bits) + fraction, exponent - bias - bits) : ldexp(fraction, 1 - bias - bits);
    return h & 0x8000 ? -v : v;
}

static double code_value(const Part *p, size_t row, size_t col) {
    int byte = p->data[strcmp(p->dtype, "U8") == 0 ? row * p->shape[1] + col / 2 : row * p->shape[1] + col];
    if (strcmp(p->dtype, "U8") == 0) return (col % 2 ? byte >> 4 : byte & 15) - 8;
    if (strcmp(p->dtype, "I8") == 0) return byte < 128 ? byte : byte - 256;
    int exponent = byte >> 3 & 15, fraction = byte & 7;
    if ((byte & 127) == 127) return NAN;
    double v = exponent ? ldexp(8 + fraction, exponent - 10) : ldexp(fraction, -9);
    return byte & 128 ? -v : v;
}

typedef struct {
    const char *type;                 // of --quantize
    const char *output;               // of --output-weights; NULL: not given
    const char *dtype, *output_dtype; // of codes; output NULL: kept
    int group;                        // of the layers, and of the output where output_grouped; 0: of rows
    bool output_grouped;
    double most; // relative error of a matrix
} Case;

static const Case cases[] = {
    {"fp8", NULL, "F8_E4M3", "F8_E4M3", 0, false, 0.035}, {"int8", NULL, "I8", "I8", 0, false, 0.007},
    {"int8:32", NULL, "I8", "I8", 32, true, 0.006},       {"int8:64", "keep", "I8", NULL, 64, false, 0.006},
    {"int8:128", "int4", "I8", "U8", 128, true, 0.09},    {"int4", NULL, "U8", "I8", 32, false, 0.09},
    {"int4:32", "int4:32", "U8", "U8", 32, true, 0.09},   {"int4:64", "fp8", "U8", "F8_E4M3", 64, false, 0.1},
    {"int4:128", "int8:128", "U8", "I8", 128, true, 0.11}};

static double json_error(const Run *r, const char *name) {
    char key[80];
    snprintf(key, sizeof key, "{\"name\": \"%s\", ", name);
    const char *at = strstr(r->out, key);
    at = at ? strstr(at, "\"error\": ") : NULL;
    return at ? atof(at + 9) : -1;
}

// One matrix of the new file against the one that it was made from.
static void check_quantised(const Case *c, const Run *r, Draft *from, Draft *to, const char *source, const char *name,
                            const char *dtype, int group) {
    char scale_name[80];
    snprintf(scale_name, sizeof scale_name, "%s.scale", name);
    const Part *x = draft_part(from, source), *codes = draft_find(to, name), *scales = draft_find(to, scale_name);
    if (!codes || !scales) {
        test_fail("%s: no %s", c->type, codes ? scale_name : name);
        return;
    }
    size_t rows = x->shape[0], cols = x->shape[1], width = group ? (size_t)group : cols,
           groups = (cols + width - 1) / width;
    if (strcmp(codes->dtype, dtype) != 0 || codes->n_dims != 2 || codes->shape[0] != rows ||
        codes->shape[1] != (strcmp(dtype, "U8") == 0 ? cols / 2 : cols))
        test_fail("%s: %s is %s [%d][%d]", c->type, name, codes->dtype, (int)codes->shape[0], (int)codes->shape[1]);
    if (strcmp(scales->dtype, group ? "BF16" : "F32") != 0 || scales->n_dims != (group ? 2 : 1) ||
        scales->shape[0] != rows || (group && scales->shape[1] != groups))
        test_fail("%s: %s is %s of %d dimensions", c->type, scale_name, scales->dtype, scales->n_dims);
    if (test_failure[0]) return;
    double errors = 0, squares = 0;
    for (size_t i = 0; i < rows * cols; i++) {
        double scale = number(scales, i / cols * groups + i % cols / width);
        double e = number(x, i) - (double)(float)(code_value(codes, i / cols, i % cols) * scale);
        errors += e * e;
        squares += number(x, i) * number(x, i);
    }
    double error = sqrt(errors / squares), reported = json_error(r, name);
    if (!(error < c->most)) test_fail("%s: error %g of %s, expected below %g", c->type, error, name, c->most);
    if (fabs(reported - error) > 1e-5 * error)
        test_fail("%s: error %g of %s, reported %g", c->type, error, name, reported);
}

static void check_copied(Draft *from, Draft *to, const char *name) {
    const Part *a = draft_part(from, name), *b = draft_find(to, name);
    if (!b || strcmp(a->dtype, b->dtype) != 0 || a->n != b->n || memcmp(a->data, b->data, a->n) != 0)
        test_fail("%s is not what it was", name);
}

static void check_file(const Case *c, const Run *r, bool tied) {
    static const char *const copied[] = {
        "tok_embeddings",    "norm",           "layers.0.attention_norm", "layers.1.ffn_norm",
        "tokenizer.offsets", "tokenizer.kind", "tokenizer.bytes"};
    Draft from, to;
    char name[64];
    draft_read(&from, model_path);
    draft_read(&to, out_path);
    for (size_t i = 0; i < sizeof copied / sizeof *copied; i++) check_copied(&from, &to, copied[i]);
    for (int layer = 0; layer < 2; layer++)
        for (size_t i = 0; i < sizeof layer_matrices / sizeof *layer_matrices; i++) {
            snprintf(name, sizeof name, "layers.%d.%s", layer, layer_matrices[i]);
            check_quantised(c, r, &from, &to, name, name, c->dtype, c->group);
        }
    if (c->output_dtype)
        check_quantised(c, r, &from, &to, tied ? "tok_embeddings" : "output", "output", c->output_dtype,
                        c->output_grouped ? c->group : 0);
    else if (!tied)
        check_copied(&from, &to, "output");
    if (to.n_parts != from.n_parts + 14 + (!c->output_dtype ? 0 : tied ? 2 : 1))
        test_fail("%s: %d tensors", c->type, to.n_parts);
    for (int i = 0; i < from.n_meta; i++) {
        const char *key = from.meta[i].key, *value = draft_find_meta(&to, key), *want = from.meta[i].value;
        if (strcmp(key, "format") == 0) want = "llama-model/2";
        if (strcmp(key, "tie_embeddings") == 0) want = tied && !c->output_dtype ? "true" : "false";
        if (strcmp(key, "source") == 0) want = "tab\\u0009, \\\"quote\\\", \\\\ and \xC3\xA9";
        if (!value || strcmp(value, want) != 0)
            test_fail("%s: %s is %s, expected %s", c->type, key, value ? value : "missing", want);
    }
    char group[16];
    snprintf(group, sizeof group, "%d", c->group);
    const char *found = draft_find_meta(&to, "group");
    CHECK(c->group ? found && strcmp(found, group) == 0 : !found);
    draft_free(&from);
    draft_free(&to);
}

static Run quantize(const Case *c, const char *threads) {
    const char *args[12] = {model_path, "--quantize", c->type, "-o", out_path, "--json", "--quiet", "-t", threads};
    if (c->output) args[9] = "--output-weights", args[10] = c->output;
    return run_args(NULL, args);
}

static void test_types(void) {
    static const char *const dtypes[] = {"F32", "BF16", "F16"};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const Case *c = &cases[i];
        for (int tied = 0; tied < 2; tied++) {
            write_source(dtypes[(i + (size_t)tied) % 3], tied);
            Run r = quantize(c, "2");
            if (check_status(&r, 0)) check_file(c, &r, tied);
            if (r.n_err) test_fail("on standard error: %s", r.err);
            CHECK(!exists(part_path));
            run_free(&r);
            Run answer = run_program(NULL, out_path, "-p", "It computes", "-n", "5", "--ignore-eos", "--engine", "cpu",
                                     "--quiet", NULL);
            check_status(&answer, 0);
            run_free(&answer);
        }
        char name[80];
        snprintf(name, sizeof name, "test_type_%s%s%s", c->type, c->output ? "_output_" : "",
                 c->output ? c->output : "");
        test_end(name);
    }
}

// F32 is not rounded to 16 bits on the way.
static void test_float32_is_quantised_as_it_is(void) {
    Draft d;
    write_source("F32", false);
    draft_read(&d, model_path);
    float *x = (float *)draft_part(&d, "layers.0.wq")->data; // row 0: codes of int8 times a scale that BF16 has not
    for (int i = 0; i < DIM; i++) x[i] = (float)(i == 0 ? 127 : i - 30) * 0.001234567f;
    draft_write(&d, model_path);
    draft_free(&d);
    Run r = quantize(&cases[1], "1");
    check_status(&r, 0);
    draft_read(&d, out_path);
    const Part *codes = draft_part(&d, "layers.0.wq"), *scales = draft_part(&d, "layers.0.wq.scale");
    CHECK(fabs(number(scales, 0) / 0.001234567 - 1) < 1e-6);
    for (int i = 0; i < DIM; i++) CHECK(code_value(codes, 0, (size_t)i) == (i == 0 ? 127 : i - 30));
    draft_free(&d);
    run_free(&r);
    test_end("test_float32_is_quantised_as_it_is");
}

static void test_threads_change_no_byte(void) {
    write_source("BF16", true);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i += 3) {
        size_t n[3];
        char *bytes[3];
        static const char *const threads[] = {"1", "2", "7"};
        for (int t = 0; t < 3; t++) {
            Run r = quantize(&cases[i], threads[t]);
            check_status(&r, 0);
            run_free(&r);
            bytes[t] = read_whole(out_path, &n[t]);
        }
        for (int t = 1; t < 3; t++) CHECK(n[t] == n[0] && memcmp(bytes[t], bytes[0], n[0]) == 0);
        for (int t = 0; t < 3; t++) free(bytes[t]);
    }
    test_end("test_threads_change_no_byte");
}

static void test_report(void) {
    write_source("BF16", false);
    Run r = run_program(NULL, model_path, "--quantize", "int4:64", "-o", out_path, NULL);
    check_output(&r, "", 0);
    if (strncmp(r.err, "llama: wrote ", 13) != 0 || !strstr(r.err, "15 matrices, error ") || !strstr(r.err, " GB/s\n"))
        test_fail("%s", r.err);
    run_free(&r);
    r = run_program(NULL, model_path, "--quantize", "int4:64", "-o", out_path, "--quiet", NULL);
    check_output(&r, "", 0);
    CHECK(r.n_err == 0);
    run_free(&r);
    r = run_program(NULL, model_path, "--quantize", "int4:64", "-o", out_path, "--json", NULL);
    check_status(&r, 0);
    struct stat read, made;
    char sizes[80];
    CHECK(stat(model_path, &read) == 0 && stat(out_path, &made) == 0);
    snprintf(sizes, sizeof sizes, "\"bytes_read\": %lld, \"bytes_written\": %lld, ", (long long)read.st_size,
             (long long)made.st_size);
    if (!strstr(r.out, sizes)) test_fail("%s, expected %s", r.out, sizes);
    CHECK(strstr(r.out, "\"group\": 64, ") &&
          strstr(r.out, "{\"name\": \"layers.1.w3\", \"type\": \"int4:64\", \"bytes\": 5984, "));
    CHECK(strstr(r.out,
                 "{\"name\": \"output\", \"type\": \"int8\", \"bytes\": 17612, ")); // 259 rows of 64 codes and a scale
    run_free(&r);
    test_end("test_report");
}

// Rounding for a text: another file, the same for any number of threads, which is read and computed with. The output of
// a tied model is calibrated, too.
static void test_calibrate(void) {
    static const char *const threads[] = {"1", "3", NULL};
    char *bytes[3];
    size_t n[3];
    static char text[300];
    snprintf(text, sizeof text, "%s/text", test_dir);
    write_file(text, "Columns that are used most", 26);
    for (int tied = 0; tied < 2; tied++) {
        write_source("BF16", tied);
        for (int i = 0; i < 3; i++) {
            const char *args[12] = {model_path, "--quantize", "int4:64", "-o",
                                    out_path,   "--quiet",    "-t",      threads[i] ? threads[i] : "1"};
            if (threads[i]) args[8] = "--calibrate", args[9] = text;
            Run r = run_args(NULL, args);
            check_output(&r, "", 0);
            CHECK(r.n_err == 0);
            run_free(&r);
            bytes[i] = read_whole(out_path, &n[i]);
        }
        CHECK(n[0] == n[1] && n[0] == n[2] && memcmp(bytes[0], bytes[1], n[0]) == 0);
        CHECK(memcmp(bytes[0], bytes[2], n[0]) != 0);
        for (int i = 0; i < 3; i++) free(bytes[i]);
        Run r = run_program(NULL, model_path, "--quantize", "int4:64", "-o", out_path, "--calibrate", text, "--json",
                            "--quiet", NULL);
        Case c = {"int4:64", NULL, "U8", "I8", 64, false, 0.2};
        if (check_status(&r, 0)) check_file(&c, &r, tied);
        run_free(&r);
        unlink(out_path);
    }
    Run gpus = run_program(NULL, model_path, "--quantize", "int4:64", "-o", out_path, "--calibrate", text, "--gpus",
                           "2", NULL);
    check_status(&gpus, 0); // which changes nothing, a note says
    run_free(&gpus);
    unlink(out_path);
    write_file(text, "", 0);
    Run r = run_program(NULL, model_path, "--quantize", "int4:64", "-o", out_path, "--calibrate", text, NULL);
    check_status(&r, 1);
    if (!strstr(r.err, "/text: 1 tokens, expected at least 2\n") || exists(out_path) || exists(part_path))
        test_fail("of an empty text: %s", r.err);
    run_free(&r);
    test_end("test_calibrate");
}

// ---- what is refused ------------------------------------------------------------------------------------------------

// Fails with that message, and leaves neither PATH.part nor a changed file.
static void expect_failure(const char *name, const char *model, const char *type, const char *output_type,
                           const char *out, int status, const char *fragment) {
    char part[320];
    size_t n = 0, now;
    snprintf(part, sizeof part, "%s.part", out);
    bool had_part = exists(part);
    char *before = exists(model) ? read_whole(model, &n) : NULL;
    const char *args[9] = {model, "--quantize", type, "-o", out};
    if (output_type) args[5] = "--output-weights", args[6] = output_type;
    Run r = run_args(NULL, args);
    check_status(&r, status);
    if (!strstr(r.err, fragment)) test_fail("\"%s\", expected \"%s\"", r.err, fragment);
    if (r.n_out) test_fail("on standard output: %s", r.out);
    if (exists(part) != had_part) test_fail("%s is %s", part, had_part ? "gone" : "left");
    if (before) {
        char *after = read_whole(model, &now);
        CHECK(now == n && memcmp(before, after, n) == 0);
        free(after);
    }
    free(before);
    run_free(&r);
    test_end(name);
}

static void set_weight(const char *name, int i, float value) {
    Draft d;
    write_source("F32", false);
    draft_read(&d, model_path);
    memcpy(draft_part(&d, name)->data + 4 * i, &value, sizeof value);
    draft_write(&d, model_path);
    draft_free(&d);
}

static void test_refusals(void) {
    static char path[300], missing[320];
    unlink(out_path);
    write_source("BF16", false);
    Run r = run_program(NULL, model_path, "--quantize", "int4:64", "-o", out_path, "--quiet", NULL);
    check_status(&r, 0);
    run_free(&r);
    snprintf(path, sizeof path, "%s/other.bin", test_dir);
    expect_failure("quantised_already", out_path, "int8", NULL, path, 1,
                   "quantised already (int4:64, embeddings BF16, output int8), expected BF16, F16 or F32");
    CHECK(!exists(path));
    unlink(out_path);

    expect_failure("output_is_input", model_path, "int8", NULL, model_path, 1,
                   "the model itself, expected another file to write");
    CHECK(symlink(model_path, path) == 0);
    expect_failure("output_leads_to_input", model_path, "int8", NULL, path, 1,
                   "the model itself, expected another file to write");
    unlink(path);
    CHECK(link(model_path, path) == 0);
    expect_failure("output_is_another_name_of_input", model_path, "int8", NULL, path, 1,
                   "the model itself, expected another file to write");
    unlink(path);
    CHECK(rename(model_path, part_path) == 0);
    expect_failure("part_is_input", part_path, "int8", NULL, out_path, 1,
                   "the model itself, expected another file to write (it is written under this name first)");
    CHECK(rename(part_path, model_path) == 0 && !exists(out_path));

    snprintf(missing, sizeof missing, "%s/none/out.bin", test_dir);
    expect_failure("output_in_no_directory", model_path, "int8", NULL, missing, 1,
                   "/none/out.bin.part: No such file or directory");
    expect_failure("output_is_a_directory", model_path, "int8", NULL, test_dir, 1, "not a regular file");
    CHECK(mkfifo(path, 0600) == 0);
    expect_failure("output_is_a_pipe", model_path, "int8", NULL, path, 1, "other.bin: not a regular file");
    unlink(path);

    write_file(part_path, "x", 1); // another program's
    int fd = open(part_path, O_RDWR);
    CHECK(flock(fd, LOCK_EX) == 0);
    expect_failure("part_is_being_written", model_path, "int8", NULL, out_path, 1,
                   "out.bin.part: another program is writing it");
    close(fd);
    unlink(part_path);

    CHECK(symlink(missing, part_path) == 0);
    expect_failure("part_is_a_link", model_path, "int8", NULL, out_path, 1, "out.bin.part: not a regular file");
    unlink(part_path);
    CHECK(symlink(missing, path) == 0);
    expect_failure("output_is_a_link_to_nothing", model_path, "int8", NULL, path, 1,
                   "other.bin: a symbolic link to a file that is not there, expected one that is, or no link");
    unlink(path);

    set_weight("layers.1.w2", HIDDEN + 3, NAN);
    expect_failure("weight_is_nan", model_path, "int8", NULL, out_path, 1,
                   "tensor layers.1.w2: row 1, column 3 is nan, expected a finite number");
    set_weight("output", 258 * DIM, -INFINITY);
    expect_failure("weight_is_infinite", model_path, "int8", NULL, out_path, 1,
                   "tensor output: row 258, column 0 is -inf, expected a finite number");
    expect_failure("weight_that_is_kept_is_infinite", model_path, "int8", "keep", out_path, 1,
                   "tensor output: row 258, column 0 is -inf, expected a finite number");
    set_weight("tok_embeddings", 5, INFINITY);
    expect_failure("embedding_is_infinite", model_path, "int8", NULL, out_path, 1,
                   "tensor tok_embeddings: row 0, column 5 is inf, expected a finite number");
    CHECK(!exists(out_path));

    Draft d;
    Shape s = {16, 17, 1, 4, 2, 4, 128, "F32", false, true};
    draft_tiny(&d, s, 1);
    draft_write(&d, model_path);
    expect_failure("scales_unaligned", model_path, "int8", NULL, out_path, 1,
                   "tensor layers.0.w1: 17 rows, their scales take no multiple of 16 bytes");
    draft_vocab_only(&d);
    draft_write(&d, model_path);
    draft_free(&d);
    expect_failure("vocabulary_only", model_path, "int8", NULL, out_path, 1, "a vocabulary without weights");
    draft_tiny(&d, tiny_shape, 1);
    draft_write(&d, model_path);
    draft_free(&d);
    expect_failure("codes_unaligned", model_path, "int4:32", "int4:32", out_path, 1,
                   "tensor output: 259 rows of 16 columns, their codes take no multiple of 16 bytes");
}

static void test_usage(void) {
    write_source("BF16", false);
    expect_failure(
        "type_unknown", model_path, "int5", NULL, out_path, 2,
        "--quantize int5: expected one of: fp8, int8, int8:32, int8:64, int8:128, int4, int4:32, int4:64, int4:128");
    expect_failure("output_type_unknown", model_path, "int8", "bf16", out_path, 2,
                   "--output-weights bf16: expected one of: fp8, ");
    expect_failure("groups_of_two_sizes", model_path, "int4:64", "int8:32", out_path, 2,
                   "--quantize int4:64 and --output-weights int8:32: groups of two sizes, expected one size in a file");
    static const struct {
        const char *name, *fragment, *args[8];
    } usage[] = {
        {"no_output", "--quantize int8 needs -o FILE, to write to", {model_path, "--quantize", "int8"}},
        {"output_alone", "-o goes with --quantize", {model_path, "-p", "a", "-o", out_path}},
        {"calibrate_alone", "--calibrate goes with --quantize", {model_path, "-p", "a", "--calibrate", out_path}},
        {"output_weights_alone",
         "--output-weights goes with --quantize",
         {model_path, "-p", "a", "--output-weights", "int8"}},
        {"with_bench",
         "--bench and --quantize: expected one of them",
         {model_path, "--bench", "--quantize", "int8", "-o", out_path}},
        {"with_a_prompt", "a prompt, which ", {model_path, "-p", "a", "--quantize", "int8", "-o", out_path}},
        {"with_synthetic",
         "--quantize and --synthetic: expected a model file",
         {"--synthetic", "llama-3.2-1b", "--quantize", "int8", "-o", out_path}},
        {"no_type", "--quantize \"\": expected one of: fp8", {model_path, "--quantize", "", "-o", out_path}}};
    for (size_t i = 0; i < sizeof usage / sizeof *usage; i++) {
        Run r = run_args(NULL, usage[i].args);
        check_status(&r, 2);
        if (!strstr(r.err, usage[i].fragment)) test_fail("\"%s\", expected \"%s\"", r.err, usage[i].fragment);
        CHECK(!exists(out_path));
        run_free(&r);
        test_end(usage[i].name);
    }
}

// A model of megabytes.
static void write_large_source(void) {
    Draft d;
    Shape s = {256, 704, 4, 4, 2, 64, 128, "BF16", false, true};
    draft_tiny(&d, s, 1);
    draft_write(&d, model_path);
    draft_free(&d);
}

// A limit of the size of files (ulimit -f) is an error of write: what was there stays.
static void test_file_size_limit(void) {
    struct rlimit before, limit;
    size_t n;
    write_large_source();
    write_file(out_path, "old", 3);
    CHECK(getrlimit(RLIMIT_FSIZE, &before) == 0);
    // (Counters of lines, which a build for coverage writes before it starts the program, are shorter.)
    limit = (struct rlimit){.rlim_cur = 1 << 16, .rlim_max = before.rlim_max};
    CHECK(setrlimit(RLIMIT_FSIZE, &limit) == 0);
    Run r = run_program(NULL, model_path, "--quantize", "int8", "-o", out_path, NULL);
    CHECK(setrlimit(RLIMIT_FSIZE, &before) == 0);
    check_status(&r, 1);
    if (!strstr(r.err, "out.bin.part: File too large\n")) test_fail("%s", r.err);
    run_free(&r);
    char *after = read_whole(out_path, &n);
    CHECK(n == 3 && memcmp(after, "old", 3) == 0 && !exists(part_path));
    free(after);
    unlink(out_path);
    test_end("test_file_size_limit");
}

// Whenever Ctrl-C, a request to end or a lost terminal comes: no PATH.part, and PATH is the old file or the new one.
static void test_interrupted(void) {
    static const int signals[] = {SIGINT, SIGTERM, SIGHUP};
    write_large_source();
    const char *args[] = {model_path, "--quantize", "int4", "-o", out_path, "-t", "1", "--quiet", NULL};
    Run r = run_args(NULL, args);
    check_status(&r, 0);
    run_free(&r);
    size_t n, whole;
    free(read_whole(out_path, &whole));
    for (int i = 0; i < 60; i++) {
        int signal_number = signals[i % 3], status;
        write_file(out_path, "old", 3);
        fflush(NULL);
        pid_t child = fork();
        if (child < 0) die("fork");
        if (child == 0) {
            signal(signal_number, SIG_DFL);
            exec_program(args);
        }
        usleep(1000 * (unsigned)i / 2);
        kill(child, signal_number);
        while (waitpid(child, &status, 0) < 0)
            if (errno != EINTR) die("waitpid");
        bool done = WIFEXITED(status) && WEXITSTATUS(status) == 0; // before the signal
        bool stopped = WIFSIGNALED(status) ? WTERMSIG(status) == signal_number : WEXITSTATUS(status) == 130;
        if (!done && !stopped) test_fail("signal %d: status %d", signal_number, status);
        char *after = read_whole(out_path, &n);
        if (exists(part_path) || !(n == whole || (n == 3 && !done)))
            test_fail("signal %d: out.bin has %zu bytes", signal_number, n);
        free(after);
        unlink(part_path);
    }
    unlink(out_path);
    test_end("test_interrupted");
}

// What a stopped run left is taken over; a symbolic link is followed; a file that is there is replaced.
static void test_places(void) {
    char link_path[300];
    write_source("BF16", false);
    write_file(part_path, "left by a run that was stopped", 30);
    Run r = quantize(&cases[1], "1");
    if (check_status(&r, 0)) check_file(&cases[1], &r, false);
    CHECK(!exists(part_path));
    run_free(&r);
    snprintf(link_path, sizeof link_path, "%s/link.bin", test_dir);
    CHECK(symlink(out_path, link_path) == 0);
    write_file(out_path, "old", 3);
    r = run_program(NULL, model_path, "--quantize", "int8", "-o", link_path, "--json", "--quiet", NULL);
    if (check_status(&r, 0)) check_file(&cases[1], &r, false);
    struct stat info;
    CHECK(lstat(link_path, &info) == 0 && S_ISLNK(info.st_mode));
    run_free(&r);
    test_end("test_places");
}

int main(void) {
    program_setup();
    snprintf(model_path, sizeof model_path, "%s/model.bin", test_dir);
    snprintf(out_path, sizeof out_path, "%s/out.bin", test_dir);
    snprintf(part_path, sizeof part_path, "%s.part", out_path);
    test_types();
    test_float32_is_quantised_as_it_is();
    test_threads_change_no_byte();
    test_report();
    test_calibrate();
    test_refusals();
    test_usage();
    test_file_size_limit();
    test_interrupted();
    test_places();
    return tests_summary();
}
