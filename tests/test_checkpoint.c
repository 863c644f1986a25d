// What a model.bin says: files of the first release as before, and what came with llama-model/2.
#include "../model/file/checkpoint.h"

#include "model_writer.h"

#define FIRST_MODEL "tests/vectors/first-release.bin" // scripts/gen_vectors.py
#define FIRST_DUMP "tests/vectors/first-release.safetensors"
#define LENGTH(array) ((int)(sizeof(array) / sizeof *(array)))

static bool open_model(Model *m, const char *path, bool vocab_only) {
    Error err = {""};
    bool ok = checkpoint_open(m, path, vocab_only, &err);
    if (!ok) test_fail("%s", err.text);
    return ok;
}

static bool open_draft(Model *m, const Draft *d, bool vocab_only) {
    draft_write(d, temporary("case.bin"));
    return open_model(m, temporary("case.bin"), vocab_only);
}

// ---- the first release ----------------------------------------------------------------------------------------------

static void test_first_release(void) {
    Model m;
    if (open_model(&m, FIRST_MODEL, false)) {
        const Config *c = &m.config;
        CHECK(c->chat_format == CHAT_LLAMA3_1 && !c->chat_checked && !c->chat_system && !c->chat_date);
        CHECK(c->bos_id == 256 && c->chat_bos_id == 256 && c->n_eos == 3 && c->eos_ids[2] == 265);
        CHECK(c->rope_type == ROPE_LLAMA3 && c->rope_factor == 8 && c->max_seq_len == 256 && c->vocab_size == 267);
        CHECK(m.weights.dtype == DTYPE_BF16 && m.weights.embeddings_dtype == DTYPE_BF16 &&
              m.weights.output_dtype == DTYPE_BF16);
        CHECK(m.tokenizer.passes[0].n_added == 0 && !m.tokenizer.passes[1].tree && m.tokenizer.n_special == 11);
        model_close(&m);
    }
    test_end("test_file_of_the_first_release_is_read");
    Run r = run_program(NULL, FIRST_MODEL, "--compare", FIRST_DUMP, "--precision", "f32", "--quiet", NULL);
    check_status(&r, 0);
    if (!strstr(r.out, "the comparison holds\n")) test_fail("%s", shown(r.out, r.n_out));
    test_end("test_file_of_the_first_release_computes_as_transformers");
    run_free(&r);
}

// ---- llama-model/2 --------------------------------------------------------------------------------------------------

static void test_chat_keys(void) {
    for (int vocab_only = 0; vocab_only < 2; vocab_only++) {
        Draft d;
        Model m;
        draft_tiny(&d, tiny_shape, 1);
        if (vocab_only) draft_vocab_only(&d);
        draft_meta(&d, "format", "llama-model/2");
        draft_meta(&d, "converter", "2");
        draft_meta(&d, "chat_format", "deepseek");
        draft_meta(&d, "chat_system", "Be\\nkind, \\u00e9\\\"");
        draft_meta(&d, "chat_date", "today");
        draft_meta(&d, "chat_bos_id", "257");
        if (open_draft(&m, &d, vocab_only)) {
            const Config *c = &m.config;
            CHECK(c->chat_format == CHAT_DEEPSEEK && c->chat_checked && c->bos_id == 256 && c->chat_bos_id == 257);
            CHECK(c->chat_system && strcmp(c->chat_system, "Be\nkind, \xC3\xA9\"") == 0);
            CHECK(c->chat_date && strcmp(c->chat_date, "today") == 0);
            model_close(&m);
        }
        draft_meta(&d, "chat_bos_id", "");
        draft_meta(&d, "chat_system", "");
        draft_meta(&d, "chat_format", "chatml");
        if (open_draft(&m, &d, vocab_only)) {
            CHECK(m.config.chat_bos_id == -1 && m.config.bos_id == 256 && m.config.chat_format == CHAT_CHATML);
            CHECK(m.config.chat_system && !*m.config.chat_system);
            model_close(&m);
        }
        draft_free(&d);
        test_end(vocab_only ? "test_chat_keys_of_a_vocabulary" : "test_chat_keys");
    }
}

// Each type of codes, with scales of each dtype, of rows and of groups, some layers' matrices as they were: the program
// computes what it computes with the float32 weights that codes and scales stand for.
static void test_quantised_matrices(void) {
    static const struct {
        const char *type, *scales, *output, *text;
    } cases[] = {{"F8_E4M3", "F32", NULL, "fp8, embeddings F32, output F32"},
                 {"F8_E4M3", "BF16", "I8", "fp8, embeddings F32, output int8"},
                 {"I8", "F16", NULL, "int8, embeddings F32, output F32"},
                 {"I8:32", "BF16", "I8:32", "int8:32, embeddings F32, output int8:32"},
                 {"I8:64", "F32", "F8_E4M3", "int8:64, embeddings F32, output fp8"},
                 {"U8", "F32", "I8", "int4:row, embeddings F32, output int8"},
                 {"U8:32", "BF16", "I8", "int4:32, embeddings F32, output int8"},
                 {"U8:128", "F16", "U8:128", "int4:128, embeddings F32, output int4:128"},
                 {"mixed", "BF16", "I8", "int8 and others, output int8"}};
    static const char *const names[] = {"wq", "wk", "wv", "wo", "w1", "w2", "w3"};
    enum { N = LENGTH(names) };
    for (int i = 0; i < LENGTH(cases); i++) {
        Shape shape = {64, 176, 1, 4, 2, 16, 128, "F32", false, true}; // 176: a short last group of each size
        bool mixed = strcmp(cases[i].type, "mixed") == 0;
        Draft d, plain;
        Model m;
        char full[32], text[WEIGHTS_DTYPES];
        draft_tiny(&d, shape, 1);
        draft_tiny(&plain, shape, 1);
        for (int k = 0; k <= N; k++) {
            const char *type = k == N  ? cases[i].output
                               : mixed ? (k < 3    ? "I8"
                                          : k == 3 ? NULL
                                                   : "U8:64")
                                       : cases[i].type;
            float *decoded;
            if (!type) continue;
            snprintf(full, sizeof full, "%s%s", k == N ? "" : "layers.0.", k == N ? "output" : names[k]);
            draft_quantise_to(&d, full, type, cases[i].scales, &decoded);
            free(draft_part(&plain, full)->data);
            draft_part(&plain, full)->data = (uint8_t *)decoded;
        }
        if (open_draft(&m, &d, false)) {
            CHECK(weights_are_quantised(&m));
            if (strcmp(weights_dtypes(&m, text), cases[i].text) != 0)
                test_fail("\"%s\", expected \"%s\"", text, cases[i].text);
            model_close(&m);
        }
        draft_write(&plain, temporary("plain.bin"));
        const char *const files[] = {temporary("case.bin"), temporary("plain.bin")};
        Run runs[2];
        for (int k = 0; k < 2; k++) {
            runs[k] = run_program(NULL, files[k], "-p", "The same text, from both", "-n", "40", "--ignore-eos",
                                  "--engine", "cpu", "--quiet", NULL);
            check_status(&runs[k], 0);
        }
        if (strcmp(runs[0].out, runs[1].out) != 0)
            test_fail("%s: \"%s\", with the decoded weights \"%s\"", cases[i].type, runs[0].out, runs[1].out);
        for (int k = 0; k < 2; k++) run_free(&runs[k]);
        draft_free(&d);
        draft_free(&plain);
    }
    test_end("test_quantised_matrices");
}

static void test_dtypes_are_named(void) {
    static const struct {
        const char *embeddings, *output; // beside layers of F32; NULL: tied
        const char *text;
    } cases[] = {{"F32", "F32", "F32"},
                 {"F16", "F32", "F32, embeddings F16"},
                 {"F32", "BF16", "F32, output BF16"},
                 {"BF16", "F16", "F32, embeddings BF16, output F16"},
                 {"BF16", NULL, "F32, embeddings BF16, output BF16"}};
    for (int i = 0; i < LENGTH(cases); i++) {
        Draft d;
        Model m;
        Shape s = tiny_shape;
        s.tied = !cases[i].output;
        draft_tiny(&d, s, 1);
        draft_meta(&d, "format", "llama-model/2");
        static const char *const names[] = {"tok_embeddings", "output"};
        for (int k = 0; k < (s.tied ? 1 : 2); k++) {
            Part *p = draft_part(&d, names[k]);
            snprintf(p->dtype, sizeof p->dtype, "%s", k ? cases[i].output : cases[i].embeddings);
            size_t n = (size_t)(p->shape[0] * p->shape[1]);
            p->data = as_dtype((float *)p->data, n, p->dtype);
            p->n = n * (strcmp(p->dtype, "F32") == 0 ? 4 : 2);
        }
        if (open_draft(&m, &d, false)) {
            char text[WEIGHTS_DTYPES];
            if (strcmp(weights_dtypes(&m, text), cases[i].text) != 0)
                test_fail("\"%s\", expected \"%s\"", text, cases[i].text);
            model_close(&m);
        }
        Run r = run_program(NULL, temporary("case.bin"), "-p", "b", "-n", "1", "--verbose", NULL);
        check_status(&r, 0);
        char fragment[80];
        snprintf(fragment, sizeof fragment, "GB of weights (%s in the file)", cases[i].text);
        if (!strstr(r.err, fragment)) test_fail("--verbose lacks \"%s\": %s", fragment, r.err);
        if (strstr(r.err, "rounded")) test_fail("the CPU rounds nothing: %s", r.err);
        run_free(&r);
        draft_free(&d);
    }
    test_end("test_dtypes_are_named");
}

// Expected: what tokenizers gives, as in tests/vectors/added-tokens.tsv.
static void test_added_tokens(void) {
    static const struct {
        const char *normalized, *text, *ids, *special_ids; // special_ids: with --special
    } cases[] = {
        {NULL, "a<|eot_id|>b", "97 258 98\n", "97 258 98\n"},
        {NULL, "<|end_of_text|><|eot_id|>", "60 124 101 110 100 95 111 102 95 116 101 120 116 124 62 258\n",
         "257 258\n"},
        {"258", "<<|eot_id|>>", "60 258 62\n", "60 258 62\n"},
        {"257,258", "<|end_of_text|><|eot_id|>", "60 124 101 110 100 95 111 102 95 116 101 120 116 124 62 258\n",
         "257 258\n"},
    };
    for (int i = 0; i < LENGTH(cases); i++) {
        Draft d;
        draft_tiny(&d, tiny_shape, 1);
        draft_part(&d, "tokenizer.kind")->data[EOT] = 3;
        draft_meta(&d, "format", "llama-model/2");
        if (cases[i].normalized) draft_meta(&d, "normalized_ids", cases[i].normalized);
        Model m;
        if (open_draft(&m, &d, false)) {
            int second = cases[i].normalized != NULL;
            CHECK(m.tokenizer.passes[second].n_added == 1 && m.tokenizer.passes[!second].n_added == 0);
            model_close(&m);
        }
        const char *path = temporary("case.bin");
        Run plain = run_program(NULL, path, "--tokenize", "-p", cases[i].text, NULL);
        check_output(&plain, cases[i].ids, strlen(cases[i].ids));
        Run special = run_program(NULL, path, "--tokenize", "--special", "-p", cases[i].text, NULL);
        check_output(&special, cases[i].special_ids, strlen(cases[i].special_ids));
        run_free(&plain);
        run_free(&special);
        draft_free(&d);
    }
    test_end("test_added_tokens_of_a_file");
}

// An added token is text where the model writes it; a special one is nothing.
static void test_added_tokens_are_printed(void) {
    for (int kind = 1; kind <= 3; kind += 2) {
        Draft d;
        Script s;
        script_alphabet(&s);
        draft_script(&d, &s, 64, 64);
        draft_part(&d, "tokenizer.kind")->data[EOT] = (uint8_t)kind;
        draft_meta(&d, "format", "llama-model/2");
        draft_write(&d, temporary("case.bin"));
        const char *text = kind == 3 ? "YZ<|eot_id|>0" : "YZ0";
        Run r = run_program(NULL, temporary("case.bin"), "-p", "X", "-n", "4", "--temp", "0", "--quiet", NULL);
        check_output(&r, text, strlen(text));
        run_free(&r);
        draft_free(&d);
    }
    test_end("test_added_tokens_are_printed");
}

// Of a model that is not tied engine cpu reads rows of the embedding table from the file, wherever it is in it: the
// same logits as with all of it in memory, and an error once the file has changed.
static void test_embeddings_stay_in_the_file(void) {
    static const char *const dtypes[] = {"F32", "BF16", "F16"};
    const int tokens[] = {97, 98, 256, 0, 258, 98};
    for (int i = 0; i < 6; i++) {
        Shape s = tiny_shape;
        Draft d;
        Model m;
        Error err = {""};
        s.dtype = dtypes[i % 3];
        s.tied = false;
        draft_tiny(&d, s, 1);
        Part table = d.parts[0];
        CHECK(strcmp(table.name, "tok_embeddings") == 0);
        for (int k = 0; i > 2 && k < 5; k++) d.parts[k] = d.parts[k + 1], d.parts[k + 1] = table;
        if (open_draft(&m, &d, false)) {
            uint64_t bytes = m.weights.bytes;
            float *expected = malloc((size_t)m.config.vocab_size * sizeof *expected);
            CHECK(expected && model_start(&m, "cpu", PRECISION_F32, 1, 16, &err));
            CHECK(!m.weights.tok_embeddings.data && m.weights.bytes == bytes - table.n);
            m.weights.tok_embeddings.data = table.data;
            CHECK(model_prefill(&m, 0, tokens, 6, 1, &err));
            memcpy(expected, m.logits, (size_t)m.config.vocab_size * sizeof *expected);
            m.weights.tok_embeddings.data = NULL;
            kv_reset(&m.kv, 0);
            CHECK(model_prefill(&m, 0, tokens, 6, 1, &err));
            CHECK(memcmp(expected, m.logits, (size_t)m.config.vocab_size * sizeof *expected) == 0);
            CHECK(truncate(m.file.path, (off_t)m.file.data_start) == 0);
            CHECK(!model_decode(&m, 0, 97, &err) && strstr(err.text, "case.bin: ended at byte"));
            model_stop(&m);
            CHECK(m.weights.bytes == bytes);
            model_close(&m);
            free(expected);
        }
        draft_free(&d);
    }
    test_end("test_embeddings_stay_in_the_file");
}

int main(void) {
    program_setup();
    test_first_release();
    test_chat_keys();
    test_quantised_matrices();
    test_dtypes_are_named();
    test_embeddings_stay_in_the_file();
    test_added_tokens();
    test_added_tokens_are_printed();
    return tests_summary();
}
