// --compare holds where it should and fails where it must. First on a model with a known script, then, with the story
// model and its dump from HuggingFace, the mutations that a comparison worth the name has to notice.
//     test_compare [MODEL DUMP]
//     test_compare --script    the model with a known script alone: what valgrind has time for
#include "model_writer.h"

#define STORIES_MODEL "model/stories.bin"
#define STORIES_DUMP "tests/vectors/stories-dump.safetensors"
// Of scripts/gen_vectors.py: linear RoPE, and three dtypes.
#define DTYPES_MODEL "tests/vectors/own-dtypes.bin"
#define DTYPES_DUMP "tests/vectors/own-dtypes.safetensors"

static char model_file[300], dump_file[300];

static Run compare(const Draft *model, const Draft *dump) {
    draft_write(model, model_file);
    draft_write(dump, dump_file);
    return run_program(NULL, model_file, "--compare", dump_file, "--precision", "f32", "--quiet", NULL);
}

// The number behind "largest |Δlogit|", and the one over the top of every step.
static void largest_deltas(const Run *r, double *full, double *top) {
    const char *at = strstr(r->out, "largest |Δlogit| ");
    const char *over = at ? strstr(at, "rows, ") : NULL;
    *full = at ? strtod(at + strlen("largest |Δlogit| "), NULL) : NAN;
    *top = over ? strtod(over + 6, NULL) : NAN;
}

static void check_holds(const Run *r, double tolerance) {
    double full, top;
    if (!check_status(r, 0)) return;
    largest_deltas(r, &full, &top);
    if (!(full < tolerance && top < tolerance))
        test_fail("largest |Δlogit| %g and %g, expected under %g", full, top, tolerance);
    if (!strstr(r->out, "the comparison holds\n"))
        test_fail("it does not say that it holds: %s", shown(r->out, r->n_out));
    if (r->n_err) test_fail("on standard error: %s", shown(r->err, r->n_err));
}

static void check_does_not_hold(const Run *r) {
    check_failure(r, 1, "the comparison does not hold", r->out);
    if (!strstr(r->out, "THE COMPARISON DOES NOT HOLD\n"))
        test_fail("the report does not say so: %s", shown(r->out, r->n_out));
}

static void expect_holds(const char *name, const Draft *model, const Draft *dump, double tolerance) {
    if (!test_wanted(name)) return;
    Run r = compare(model, dump);
    check_holds(&r, tolerance);
    test_end(name);
    run_free(&r);
}

// fragment: of the report; NULL: any.
static void expect_fails(const char *name, const Draft *model, const Draft *dump, const char *fragment) {
    if (!test_wanted(name)) return;
    Run r = compare(model, dump);
    check_does_not_hold(&r);
    if (fragment && !strstr(r.out, fragment)) test_fail("the report lacks \"%s\": %s", fragment, shown(r.out, r.n_out));
    test_end(name);
    run_free(&r);
}

// ---- a model with a script ------------------------------------------------------------------------------------------

// Makes step s of the dump prefer another token, by that margin.
static void set_step(Draft *dump, int step, int id, float margin) {
    int32_t *tokens = (int32_t *)draft_part(dump, "tokens.0")->data,
            *top_ids = (int32_t *)draft_part(dump, "top_ids.0")->data;
    float *top = (float *)draft_part(dump, "top_logits.0")->data;
    int32_t old = top_ids[step * 5];
    tokens[step] = id;
    top_ids[step * 5 + 1] = old;
    top_ids[step * 5] = id;
    top[step * 5 + 1] = top[step * 5];
    top[step * 5] += margin;
}

// A second token with the output row of the first and a higher id: an exact tie, which goes to the lower id.
static void make_tie(Script *s, int id, int twin) {
    memcpy(s->output + twin * SCRIPT_DIM, s->output + id * SCRIPT_DIM, SCRIPT_DIM * sizeof *s->output);
    memcpy(s->embeddings + twin * SCRIPT_DIM, s->embeddings + id * SCRIPT_DIM, SCRIPT_DIM * sizeof *s->embeddings);
}

static void test_script(void) {
    Script s;
    Draft model, dump;
    script_alphabet(&s);
    draft_script(&model, &s, 16, 4096);
    draft_dump(&dump, &s, 40);
    expect_holds("script_holds", &model, &dump, 1e-4);

    Run r = run_program(NULL, model_file, "--compare", dump_file, "--quiet", NULL);
    check_holds(&r, 1e-4); // engine cpu computes in float32 whatever is asked
    test_end("script_holds_in_the_default_precision");
    run_free(&r);

    set_step(&dump, 20, 'Q', 1e-3f);
    expect_fails("one_token_changed", &model, &dump, "prompt 0, step 20: teacher-forced ");
    draft_free(&dump);

    draft_dump(&dump, &s, 40);
    ((int32_t *)draft_part(&dump, "tokens.0")->data)[39] = 'Q';
    expect_fails("last_token_changed", &model, &dump, "step 39");
    draft_free(&dump);

    draft_dump(&dump, &s, 40);
    draft_meta(&dump, "prompts", "[\\\"aB\\\"]");
    expect_fails("prompt_text_changed", &model, &dump, "prompt 0: encodes to 3 ids, the dump has 3; they part at 2");
    draft_meta(&dump, "prompts", "[\\\"abc\\\"]");
    expect_fails("prompt_text_longer", &model, &dump, "prompt 0: encodes to 4 ids, the dump has 3");
    draft_meta(&dump, "prompts", "[\\\"a\\\"]");
    expect_fails("prompt_text_shorter", &model, &dump, "prompt 0: encodes to 2 ids, the dump has 3");
    draft_meta(&dump, "prompts", "[null]");
    expect_holds("prompt_of_ids_alone", &model, &dump, 1e-4);
    draft_meta(&dump, "prompts", "[\\\"\\u0061b\\\"]");
    expect_holds("prompt_with_an_escape", &model, &dump, 1e-4);
    draft_meta(&dump, "dtype", "torch.float32");
    expect_holds("dtype_as_torch_writes_it", &model, &dump, 1e-4);

    // Other kinds of dumps are compared without a verdict.
    set_step(&dump, 5, 'Q', 1e-3f);
    draft_meta(&dump, "dtype", "bfloat16");
    r = compare(&model, &dump);
    if (check_status(&r, 0) && !strstr(r.out, "no verdict"))
        test_fail("the report lacks \"no verdict\": %s", shown(r.out, r.n_out));
    CHECK(strstr(r.out, "KL divergence") != NULL);
    test_end("bf16_dump_has_no_verdict");
    run_free(&r);
    draft_free(&dump);
    draft_free(&model);
}

// Near ties: where HuggingFace's own back ends differ by more than a quarter of the margin.
static void test_near_ties(void) {
    enum { N = 1200 };
    Script s;
    Draft model, dump;
    script_alphabet(&s);
    draft_script(&model, &s, 16, 4096);
    make_tie(&s, 'm', 0xF0);
    draft_dump(&dump, &s, N);
    expect_holds("tie_goes_to_the_lower_id", &model, &dump, 1e-4);

    set_step(&dump, 10, 0xF0, 1e-5f); // step 10 after "ab" is m
    expect_fails("without_noise_no_tie", &model, &dump, "step 10: teacher-forced 109, the dump has 240; its margin is");
    draft_meta(&dump, "noise", "2e-6");
    expect_fails("noise_too_small_for_a_tie", &model, &dump,
                 "step 10: free-running 109, the dump has 240; its margin is");
    draft_meta(&dump, "noise", "1e-5");
    Run r = compare(&model, &dump);
    check_holds(&r, 1e-4);
    const char *listed[] = {"step 10: teacher-forced 109, the dump has 240; its margin is",
                            "step 10: free-running 109, the dump has 240", ", a near tie\n", "free-running 1199 equal"};
    for (int i = 0; i < 4; i++)
        if (!strstr(r.out, listed[i])) test_fail("the report lacks \"%s\": %s", listed[i], shown(r.out, r.n_out));
    test_end("near_tie_is_listed_and_accepted");
    run_free(&r);

    int again = 10 + 1;
    const int32_t *tokens = (const int32_t *)draft_part(&dump, "tokens.0")->data;
    while (again < N && tokens[again] != 'm') again++;
    set_step(&dump, again, 0xF0, 1e-5f);
    expect_fails("two_near_ties_in_1200_are_too_many", &model, &dump, "a near tie\n");
    draft_free(&dump);

    // A top written the wrong way round has a margin below zero, which is no near tie.
    draft_dump(&dump, &s, N);
    set_step(&dump, 10, 0xF0, -1e-3f);
    r = compare(&model, &dump);
    check_failure(&r, 1, "", r.out);
    test_end("ascending_top_is_no_near_tie");
    run_free(&r);
    draft_free(&dump);

    // One beside a true difference does not excuse it.
    draft_dump(&dump, &s, N);
    draft_meta(&dump, "noise", "1e-5");
    set_step(&dump, 10, 0xF0, 1e-5f);
    set_step(&dump, 600, 'Q', 1e-3f);
    expect_fails("a_near_tie_excuses_nothing_else", &model, &dump, "step 600");
    draft_free(&dump);

    // One in fewer than 1000 is more than one in 1000.
    draft_dump(&dump, &s, 999);
    draft_meta(&dump, "noise", "1e-5");
    set_step(&dump, 10, 0xF0, 1e-5f);
    expect_fails("one_near_tie_in_999_is_too_many", &model, &dump, "a near tie\n");
    draft_free(&dump);
    draft_free(&model);
}

// ---- mutations ------------------------------------------------------------------------------------------------------

static void set_ones(Part *norm) {
    for (uint64_t i = 0; i < norm->n / sizeof(float); i++) ((float *)norm->data)[i] = 1;
}

static int width_of(const Part *p) {
    return strcmp(p->dtype, "F32") == 0 ? 4 : 2;
}

// Query head h goes where K/V head h % n_kv_heads serves it: block p of the new order is block order[p] of the old.
static void swap_head_map(Draft *m) {
    int n_heads = draft_meta_int(m, "n_heads"), n_kv = draft_meta_int(m, "n_kv_heads"),
        head_dim = draft_meta_int(m, "head_dim");
    int n_layers = draft_meta_int(m, "n_layers"), dim = draft_meta_int(m, "dim"), group = n_heads / n_kv;
    for (int layer = 0; layer < n_layers; layer++) {
        char name[64];
        snprintf(name, sizeof name, "layers.%d.wq", layer);
        Part *wq = draft_part(m, name);
        snprintf(name, sizeof name, "layers.%d.wo", layer);
        Part *wo = draft_part(m, name);
        size_t width = (size_t)width_of(wq), rows = (size_t)(head_dim * dim) * width; // bytes of one head in wq
        size_t columns = (size_t)head_dim * width,
               row = (size_t)n_heads * columns; // of one head in a row of wo, of the row
        uint8_t *q = must(malloc(wq->n)), *o = must(malloc(wo->n));
        for (int h = 0; h < n_heads; h++) {
            size_t to = (size_t)(h % n_kv * group + h / n_kv), from = (size_t)h;
            memcpy(q + to * rows, wq->data + from * rows, rows);
            for (size_t i = 0; i < (size_t)dim; i++)
                memcpy(o + i * row + to * columns, wo->data + i * row + from * columns, columns);
        }
        free(wq->data);
        free(wo->data);
        wq->data = q;
        wo->data = o;
    }
}

// The dump's prompt with its first id twice; the text says so too where both is set.
static void double_bos(Draft *dump, int prompt) {
    Part *p = draft_part(dump, dump_tensor_name("prompt_ids", prompt));
    p->data = must(realloc(p->data, p->n + 4));
    memmove(p->data + 4, p->data, p->n);
    p->n += 4;
    p->shape[0]++;
}

// All texts to null: prompts that exist only as ids.
static void forget_texts(Draft *dump, int n_prompts) {
    char list[512] = "[null";
    for (int i = 1; i < n_prompts && i < 64; i++) strcat(list, ",null");
    draft_meta(dump, "prompts", strcat(list, "]"));
}

static void test_mutations(const char *model_path, const char *dump_path) {
    static const char *const names[] = {"stories_hold",
                                        "no_rope_scaling",
                                        "dropped_norms",
                                        "dropped_final_norm",
                                        "dropped_one_attention_norm",
                                        "head_map_modulo",
                                        "doubled_bos",
                                        "doubled_bos_in_the_ids_alone",
                                        "stories_one_token_changed",
                                        "stories_nan_in_the_dump",
                                        "stories_other_theta"};
    const char *missing = access(model_path, R_OK) != 0 ? model_path : access(dump_path, R_OK) != 0 ? dump_path : NULL;
    if (missing) {
        char why[400];
        snprintf(why, sizeof why, "no %s", missing);
        for (size_t i = 0; i < sizeof names / sizeof *names; i++) test_skip(names[i], why);
        return;
    }
    Draft model, dump, changed;
    draft_read(&model, model_path);
    draft_read(&dump, dump_path);
    int n_prompts = dump.n_parts / 5;
    expect_holds("stories_hold", &model, &dump, 1e-4);

    const char *scaled = draft_find_meta(&model, "rope_type");
    if (strcmp(scaled, "llama3") == 0) {
        draft_meta(&model, "rope_type", "default");
        expect_fails("no_rope_scaling", &model, &dump, NULL);
        draft_meta(&model, "rope_type", "llama3");
    } else {
        test_skip("no_rope_scaling", "this model has none");
    }
    char *theta = must(strdup(draft_find_meta(&model, "rope_theta")));
    draft_meta(&model, "rope_theta", "10000000");
    expect_fails("stories_other_theta", &model, &dump, NULL);
    draft_meta(&model, "rope_theta", theta);
    free(theta);

    draft_read(&changed, model_path);
    set_ones(draft_part(&changed, "norm"));
    expect_fails("dropped_final_norm", &changed, &dump, NULL);
    for (int i = 0; i < changed.n_parts; i++)
        if (changed.parts[i].n_dims == 1 && strncmp(changed.parts[i].name, "tokenizer.", 10) != 0)
            set_ones(&changed.parts[i]);
    expect_fails("dropped_norms", &changed, &dump, NULL);
    draft_free(&changed);
    draft_read(&changed, model_path);
    set_ones(draft_part(&changed, "layers.1.attention_norm"));
    expect_fails("dropped_one_attention_norm", &changed, &dump, NULL);
    draft_free(&changed);

    draft_read(&changed, model_path);
    swap_head_map(&changed);
    if (draft_meta_int(&model, "n_kv_heads") > 1 &&
        draft_meta_int(&model, "n_heads") > draft_meta_int(&model, "n_kv_heads"))
        expect_fails("head_map_modulo", &changed, &dump, NULL);
    else
        test_skip("head_map_modulo", "one K/V head, or no groups");
    draft_free(&changed);

    Draft other;
    draft_read(&other, dump_path);
    for (int i = 0; i < n_prompts; i++) double_bos(&other, i);
    expect_fails("doubled_bos_in_the_ids_alone", &model, &other, "they part at 1");
    forget_texts(&other, n_prompts); // now the ids are what was asked for, and only the tokens tell
    expect_fails("doubled_bos", &model, &other, "teacher-forced");
    draft_free(&other);

    draft_read(&other, dump_path);
    Part *tokens = draft_part(&other, "tokens.0");
    int32_t *last = (int32_t *)tokens->data + tokens->shape[0] - 1;
    *last = *last == 1 ? 2 : 1;
    expect_fails("stories_one_token_changed", &model, &other, "prompt 0, step");
    *last = ((int32_t *)draft_part(&dump, "tokens.0")->data)[tokens->shape[0] - 1];
    Part *logits = draft_part(&other, "logits.0");
    ((float *)logits->data)[7] = NAN;
    Run r = compare(&model, &other);
    check_failure(&r, 1, "logits.0 has a number that is not finite", NULL);
    test_end("stories_nan_in_the_dump");
    run_free(&r);
    draft_free(&other);
    draft_free(&model);
    draft_free(&dump);
}

// Of float32 tensors with values that every dtype has.
static void retype(Draft *d, const char *name, const char *dtype) {
    Part *p = draft_part(d, name);
    size_t n = (size_t)(p->shape[0] * p->shape[1]);
    p->data = as_dtype((float *)p->data, n, dtype);
    p->n = n * (strcmp(dtype, "F32") == 0 ? 4 : 2);
    snprintf(p->dtype, sizeof p->dtype, "%s", dtype);
}

// Embeddings, layers and output in every combination of dtypes: the known script, whatever they are.
static void test_dtypes(void) {
    static const char *const dtypes[] = {"BF16", "F16", "F32"};
    for (int c = 0; c < 27; c++) {
        const char *layers = dtypes[c % 3], *embeddings = dtypes[c / 3 % 3], *output = dtypes[c / 9];
        Draft model, dump;
        Script s;
        script_alphabet(&s);
        draft_script(&model, &s, 64, 64);
        draft_dump(&dump, &s, 40);
        for (int i = 0; i < model.n_parts; i++)
            if (model.parts[i].n_dims == 2 && strncmp(model.parts[i].name, "layers.", 7) == 0)
                retype(&model, model.parts[i].name, layers);
        retype(&model, "tok_embeddings", embeddings);
        retype(&model, "output", output);
        if (layers != embeddings || layers != output) draft_meta(&model, "format", "llama-model/2");
        char name[96];
        snprintf(name, sizeof name, "layers_%s_embeddings_%s_output_%s", layers, embeddings, output);
        expect_holds(name, &model, &dump, 1e-4);
        draft_free(&model);
        draft_free(&dump);
    }
}

// A tiny model as transformers computes it; and that another scaling would show.
static void test_own_dtypes_and_linear_rope(void) {
    Draft model, dump;
    draft_read(&model, DTYPES_MODEL);
    draft_read(&dump, DTYPES_DUMP);
    expect_holds("own_dtypes_and_linear_rope_as_transformers", &model, &dump, 1e-4);
    draft_meta(&model, "rope_factor", "2.0");
    expect_fails("another_linear_factor", &model, &dump, NULL);
    draft_meta(&model, "rope_type", "default");
    expect_fails("no_linear_scaling", &model, &dump, NULL);
    draft_free(&model);
    draft_free(&dump);
}

int main(int argc, char **argv) {
    program_setup();
    bool script_alone = argc == 2 && strcmp(argv[1], "--script") == 0;
    if (argc != 1 && argc != 3 && !script_alone) {
        fprintf(stderr, "usage: test_compare [MODEL DUMP | --script]\n");
        return 2;
    }
    snprintf(model_file, sizeof model_file, "%s/model.bin", test_dir);
    snprintf(dump_file, sizeof dump_file, "%s/dump.safetensors", test_dir);
    test_script();
    test_near_ties();
    test_dtypes();
    test_own_dtypes_and_linear_rope();
    if (!script_alone) test_mutations(argc == 3 ? argv[1] : STORIES_MODEL, argc == 3 ? argv[2] : STORIES_DUMP);
    return tests_summary();
}
