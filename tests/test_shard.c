// How a model is cut for several GPUs, without any: every row of every matrix has one owner, what cannot be cut is
// refused, and a model that is computed by 1, 2, 4 and 8 shards, each with its own rows, heads and cache, and gathers
// between them, gives the bits of engine cpu. (test_shards_cuda.cu has the same on GPUs.)
#include <math.h>

#include "../model/cpu/state.h"
#include "../model/file/checkpoint.h"
#include "../model/parallel/shard.h"
#include "../model/quant.h"
#include "../model/synthetic.h"
#include "check.h"

// ---- tables ---------------------------------------------------------------------------------------------------------

enum { MOST_TENSORS = 1024 };

typedef struct {
    const Config *config;
    int count, n;
    Rows dim[MAX_SHARDS], hidden[MAX_SHARDS]; // of wo; of w1
} Tables;

static bool same_rows(Rows a, Rows b) {
    return a.first == b.first && a.n == b.n;
}

// WeightVisitor: the shards' rows are all rows, once and in order, at multiples of the unit or of a head; those of wo
// and w2, and of w1 and w3, are the same.
static bool check_tensor(void *context, const Weight *w, Error *err) {
    Tables *t = context;
    const Config *c = t->config;
    const char *name = strrchr(w->name, '.') ? strrchr(w->name, '.') + 1 : w->name;
    bool whole = !w->matrix || strcmp(name, "tok_embeddings") == 0;
    int at = 0, rows = w->matrix ? w->matrix->rows : 1, most = 0;
    (void)err;
    for (int r = 0; r < t->count; r++) {
        Shard s = shard_of(c, r, t->count);
        Rows own = shard_rows(&s, c, w);
        if (whole && !same_rows(own, (Rows){0, rows})) test_fail("%s: %d rows, expected all", w->name, own.n);
        if (whole) continue;
        bool heads = strcmp(name, "wq") == 0 || strcmp(name, "wk") == 0 || strcmp(name, "wv") == 0;
        int unit = heads ? c->head_dim : SHARD_UNIT;
        if (own.first != at || own.first % unit || own.n <= 0)
            test_fail("%s, rank %d of %d: rows from %d, %d of them, expected from %d", w->name, r, t->count, own.first,
                      own.n, at);
        at = own.first + own.n;
        if (at % unit && r + 1 < t->count) test_fail("%s, rank %d: %d rows", w->name, r, own.n);
        if (own.n > most) most = own.n;
        if (own.n <= most - 2 * SHARD_UNIT && !heads)
            test_fail("%s, rank %d: %d rows, another has %d", w->name, r, own.n, most);
        if (strcmp(name, "wo") == 0) t->dim[r] = own;
        if (strcmp(name, "w1") == 0) t->hidden[r] = own;
        if (strcmp(name, "w2") == 0 && !same_rows(own, t->dim[r])) test_fail("w2 is cut in another way than wo");
        if (strcmp(name, "w3") == 0 && !same_rows(own, t->hidden[r])) test_fail("w3 is cut in another way than w1");
        if (strcmp(name, "wq") == 0 &&
            (own.first != s.kv_heads.first * c->group * c->head_dim || own.n != s.kv_heads.n * c->group * c->head_dim))
            test_fail("wq: heads that are not those of the K/V heads");
    }
    if (!whole && at != rows) test_fail("%s: %d rows of %d have an owner", w->name, at, rows);
    t->n++;
    return true;
}

static void test_every_row_has_one_owner(void) {
    static const char *const shapes[] = {"llama-3.2-1b", "llama-3.2-3b", "llama-3.1-8b", "llama-3.1-70b"};
    static const int odd[][3] = {{1032, 1416, 1001}, {128, 129, 128}, {136, 2047, 8191}}; // dim, hidden_dim, vocabulary
    for (int i = 0; i < 7; i++)
        for (int count = 1; count <= 8; count *= 2) {
            Model m;
            Error err = {""};
            CHECK(synthetic_open(&m, shapes[i < 4 ? i : 0], 1, &err));
            if (i >= 4)
                m.config.dim = odd[i - 4][0], m.config.hidden_dim = odd[i - 4][1], m.config.vocab_size = odd[i - 4][2];
            m.config.tie_embeddings = false;
            Tables t = {.config = &m.config, .count = count};
            if (!shard_check(&m.config, "--gpus", count, &err)) test_fail("%s", err.text);
            CHECK(weights_visit(&m, check_tensor, &t, &err) && t.n == 3 + 9 * m.config.n_layers);
            model_close(&m);
        }
    test_end("every_row_has_one_owner");
}

// 8B on two and on eight GPUs, as anyone would cut it.
static void test_even_parts(void) {
    Model m;
    Error err = {""};
    CHECK(synthetic_open(&m, "llama-3.1-8b", 1, &err));
    Shard s = shard_of(&m.config, 1, 2), last = shard_of(&m.config, 7, 8);
    CHECK(s.rank == 1 && s.count == 2);
    CHECK(same_rows(s.kv_heads, (Rows){4, 4}) && same_rows(s.dim, (Rows){2048, 2048}));
    CHECK(same_rows(s.hidden, (Rows){7168, 7168}) && same_rows(s.vocab, (Rows){64128, 64128}));
    CHECK(same_rows(last.kv_heads, (Rows){7, 1}) && same_rows(last.dim, (Rows){3584, 512}));
    CHECK(same_rows(last.hidden, (Rows){12544, 1792}) && same_rows(last.vocab, (Rows){112224, 16032}));
    model_close(&m);
    test_end("even_parts");
}

// ---- refusals -------------------------------------------------------------------------------------------------------

static void check_refused(Config c, int count, const char *expected) {
    Error err = {""};
    if (shard_check(&c, "--gpus", count, &err)) test_fail("%d shards: not refused", count);
    if (!strstr(err.text, expected)) test_fail("%s, expected %s", err.text, expected);
}

static void test_refusals_name_what_would_do(void) {
    Model m;
    Error err = {""};
    CHECK(synthetic_open(&m, "llama-3.1-8b", 1, &err));
    Config c = m.config;
    check_refused(c, 3, "--gpus 3: the model has 8 K/V heads, which so many do not divide; expected 1, 2, 4 or 8");
    check_refused(c, 16, "--gpus 16: the model has 8 K/V heads, which so many do not divide; expected 1, 2, 4 or 8");
    c.n_kv_heads = 2;
    check_refused(c, 4, "--gpus 4: the model has 2 K/V heads, which so many do not divide; expected 1 or 2");
    c.n_kv_heads = 1;
    check_refused(c, 2, "K/V heads, which so many do not divide; expected 1");
    c.n_kv_heads = 8;
    c.dim = 64;
    check_refused(
        c, 8,
        "--gpus 8: each takes at least 16 rows of dim 64, hidden_dim 14336 and vocab_size 128256; expected 1, "
        "2 or 4");
    m.gpus = 3; // before any engine is looked at
    CHECK(!model_choose(&m, NULL, PRECISION_BF16, &err) && strstr(err.text, "--gpus 3: the model has 8 K/V heads"));
    model_close(&m);
    test_end("refusals_name_what_would_do");
}

static void test_engine_cpu_has_no_gpus(void) {
    Model m;
    Error err = {""};
    CHECK(synthetic_open(&m, "llama-3.2-1b", 1, &err));
    m.gpus = 2;
    CHECK(!model_choose(&m, "cpu", PRECISION_F32, &err));
    if (strcmp(err.text, "--engine cpu: engine cpu computes on no GPU, expected --gpus 1") != 0)
        test_fail("%s", err.text);
    m.gpus = 1;
    CHECK(model_choose(&m, "cpu", PRECISION_F32, &err));
    model_close(&m);
    test_end("engine_cpu_has_no_gpus");
}

// ---- a model by shards ----------------------------------------------------------------------------------------------

enum { PROMPT = 70, STEPS = 5, LENGTH = PROMPT + STEPS, PAGES = (LENGTH + KV_PAGE - 1) / KV_PAGE };

// What a shard has of its own: rows of activations, T of them, and the cache of its heads.
typedef struct {
    Shard shard;
    float *q, *k, *v, *att, *x, *gate, *up, *logits; // [T][its heads or rows]
    float *k_cache, *v_cache;                        // [layer][page][its K/V heads][KV_PAGE][head_dim]
} Part;

// What all have, after it was gathered: [T][the whole row].
typedef struct {
    float *x, *xb, *att, *h, *logits;
} Whole;

static float *floats(size_t n) {
    float *p = malloc(n * sizeof *p);
    if (!p) exit(1);
    for (size_t i = 0; i < n; i++) p[i] = NAN; // what nobody writes is noticed
    return p;
}

// The rows of a matrix in host memory that a shard has.
static Matrix cut(const Matrix *w, Rows rows) {
    Matrix part = *w;
    part.data = (const char *)w->data + (uint64_t)rows.first * matrix_row_bytes(w);
    if (matrix_is_quantised(w))
        part.scale = (const char *)w->scale +
                     (size_t)rows.first * (size_t)quant_groups(w->group, w->cols) * (size_t)dtype_bytes[w->scale_dtype];
    part.rows = rows.n;
    return part;
}

// y[T][the shard's rows] = x[T][cols] · wᵀ.
static void product(const Ops *ops, const Part *p, const Config *c, float *y, const float *x, Matrix *w,
                    const char *name, int T, bool decode) {
    Matrix part = cut(w, shard_rows(&p->shard, c, &(Weight){.name = name, .matrix = w}));
    (decode ? ops->matmul_step : ops->matmul)(y, x, &part, T);
}

// A shard's columns of every row, to where all have them.
static void gather(float *whole, int row, const float *part, Rows columns, int T) {
    for (int t = 0; t < T; t++)
        memcpy(whole + (size_t)t * (size_t)row + columns.first, part + (size_t)t * (size_t)columns.n,
               (size_t)columns.n * sizeof *part);
}

static void add(float *x, const float *y, size_t n) {
    for (size_t i = 0; i < n; i++) x[i] += y[i];
}

static void append(const Config *c, float *cache, const float *rows, int heads, int pos, int T) {
    size_t head_dim = (size_t)c->head_dim;
    for (int t = 0; t < T; t++)
        for (int h = 0; h < heads; h++)
            memcpy(cache +
                       ((size_t)((pos + t) / KV_PAGE * heads + h) * KV_PAGE + (size_t)((pos + t) % KV_PAGE)) * head_dim,
                   rows + (size_t)(t * heads + h) * head_dim, head_dim * sizeof *rows);
}

// Queries, keys and values of a shard's heads, and their attention.
static void attend(const Ops *ops, Model *m, const Part *p, const Whole *all, LayerWeights *l, int layer, int pos,
                   int T, const float *cosines, const float *sines, bool decode) {
    static const int pages[PAGES] = {0, 1};
    const Config *c = &m->config;
    int kv = p->shard.kv_heads.n, heads = kv * c->group;
    size_t page = kv_page_elements(kv, c->head_dim), at = (size_t)layer * PAGES * page;
    product(ops, p, c, p->q, all->xb, &l->wq, "wq", T, decode);
    product(ops, p, c, p->k, all->xb, &l->wk, "wk", T, decode);
    product(ops, p, c, p->v, all->xb, &l->wv, "wv", T, decode);
    ops->rope(p->q, cosines, sines, T, heads, c->head_dim);
    ops->rope(p->k, cosines, sines, T, kv, c->head_dim);
    append(c, p->k_cache + at, p->k, kv, pos, T);
    append(c, p->v_cache + at, p->v, kv, pos, T);
    (decode ? ops->attention_step : ops->attention)(p->att, p->q, p->k_cache + at, p->v_cache + at, DTYPE_F32, pages,
                                                    page, T, pos, heads, kv, c->head_dim);
}

// T tokens after pos of one sequence, as model/cpu/forward.c computes them; logits of the last into all->logits.
static void forward(Model *m, const Ops *ops, Part *parts, const Whole *all, const int *tokens, int pos, int T,
                    bool decode) {
    const Config *c = &m->config;
    int count = parts[0].shard.count, half = c->head_dim / 2, dim = c->dim;
    float *cosines = floats((size_t)(T * half)), *sines = floats((size_t)(T * half));
    for (int i = 0; i < T * half; i++) {
        int position = pos + i / half;
        float angle = (float)position * m->rope_freq[i % half];
        cosines[i] = (float)cos((double)angle), sines[i] = (float)sin((double)angle);
    }
    Error err = {""};
    for (int t = 0; t < T; t++)
        ops->widen(all->x + (size_t)t * (size_t)dim, embedding_row(m, tokens[t], &err), m->weights.tok_embeddings.dtype,
                   dim);
    for (Part *p = parts; p < parts + count; p++) // each keeps its own columns of the residual stream
        for (int t = 0; t < T; t++)
            memcpy(p->x + t * p->shard.dim.n, all->x + t * dim + p->shard.dim.first,
                   (size_t)p->shard.dim.n * sizeof(float));
    for (int i = 0; i < c->n_layers; i++) {
        LayerWeights *l = &m->weights.layers[i];
        ops->rmsnorm(all->xb, all->x, l->attention_norm, c->norm_eps, T, dim);
        for (Part *p = parts; p < parts + count; p++) attend(ops, m, p, all, l, i, pos, T, cosines, sines, decode);
        for (Part *p = parts; p < parts + count; p++)
            gather(all->att, c->q_dim, p->att, shard_rows(&p->shard, c, &(Weight){.name = "wq", .matrix = &l->wq}), T);
        for (Part *p = parts; p < parts + count; p++) {
            float *sum = floats((size_t)(T * p->shard.dim.n));
            product(ops, p, c, sum, all->att, &l->wo, "wo", T, decode);
            add(p->x, sum, (size_t)(T * p->shard.dim.n));
            free(sum);
        }
        for (Part *p = parts; p < parts + count; p++) gather(all->x, dim, p->x, p->shard.dim, T);
        ops->rmsnorm(all->xb, all->x, l->ffn_norm, c->norm_eps, T, dim);
        for (Part *p = parts; p < parts + count; p++) {
            product(ops, p, c, p->gate, all->xb, &l->w1, "w1", T, decode);
            product(ops, p, c, p->up, all->xb, &l->w3, "w3", T, decode);
            ops->swiglu(p->gate, p->up, (int64_t)T * p->shard.hidden.n);
        }
        for (Part *p = parts; p < parts + count; p++) gather(all->h, c->hidden_dim, p->gate, p->shard.hidden, T);
        for (Part *p = parts; p < parts + count; p++) {
            float *sum = floats((size_t)(T * p->shard.dim.n));
            product(ops, p, c, sum, all->h, &l->w2, "w2", T, decode);
            add(p->x, sum, (size_t)(T * p->shard.dim.n));
            free(sum);
        }
        for (Part *p = parts; p < parts + count; p++) gather(all->x, dim, p->x, p->shard.dim, T);
    }
    ops->rmsnorm(all->xb, all->x + (size_t)(T - 1) * (size_t)dim, m->weights.norm, c->norm_eps, 1, dim);
    for (Part *p = parts; p < parts + count; p++) {
        product(ops, p, c, p->logits, all->xb, &m->weights.output, "output", 1, true);
        gather(all->logits, c->vocab_size, p->logits, p->shard.vocab, 1);
    }
    free(cosines);
    free(sines);
}

static void part_open(Part *p, const Config *c, int rank, int count) {
    Shard s = shard_of(c, rank, count);
    size_t kv = (size_t)(s.kv_heads.n * c->head_dim), q = kv * (size_t)c->group,
           cache = (size_t)c->n_layers * PAGES * kv_page_elements(s.kv_heads.n, c->head_dim);
    *p = (Part){.shard = s,
                .q = floats(PROMPT * q),
                .k = floats(PROMPT * kv),
                .v = floats(PROMPT * kv),
                .att = floats(PROMPT * q),
                .x = floats(PROMPT * (size_t)s.dim.n),
                .gate = floats(PROMPT * (size_t)s.hidden.n),
                .up = floats(PROMPT * (size_t)s.hidden.n),
                .logits = floats((size_t)s.vocab.n),
                .k_cache = floats(cache),
                .v_cache = floats(cache)};
}

static void part_close(Part *p) {
    float *all[] = {p->q, p->k, p->v, p->att, p->x, p->gate, p->up, p->logits, p->k_cache, p->v_cache};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
}

static int token_at(const Model *m, int position) {
    return (int)(((unsigned)position * 2654435761u >> 7) % (unsigned)m->config.vocab_size);
}

// A prompt and steps after it: the logits of each by `count` shards, and those of engine cpu.
static void compare_with_engine(const char *what, Model *m, const float *expected, int count) {
    const Config *c = &m->config;
    const Ops *ops = ops_select();
    size_t dim = PROMPT * (size_t)c->dim, vocab = (size_t)c->vocab_size;
    Whole all = {floats(dim), floats(dim), floats(PROMPT * (size_t)c->q_dim), floats(PROMPT * (size_t)c->hidden_dim),
                 floats(vocab)};
    Part parts[MAX_SHARDS];
    int tokens[LENGTH];
    for (int i = 0; i < LENGTH; i++) tokens[i] = token_at(m, i);
    for (int r = 0; r < count; r++) part_open(&parts[r], c, r, count);
    for (int k = 0; k <= STEPS; k++, expected += vocab) {
        if (k == 0)
            forward(m, ops, parts, &all, tokens, 0, PROMPT, false);
        else
            forward(m, ops, parts, &all, tokens + PROMPT + k - 1, PROMPT + k - 1, 1, true);
        if (memcmp(all.logits, expected, vocab * sizeof *expected) != 0)
            test_fail("%s, %d shards: %s: other bits than engine cpu's", what, count, k ? "a step" : "the prompt");
    }
    for (int r = 0; r < count; r++) part_close(&parts[r]);
    free(all.x), free(all.xb), free(all.att), free(all.h), free(all.logits);
}

// most: shards, at most.
static void check_shards(const char *what, Model *m, int most) {
    Error err = {""};
    int tokens[LENGTH];
    float *expected = NULL, *at = NULL;
    if (!model_start(m, "cpu", PRECISION_F32, 1, LENGTH, &err)) {
        test_fail("%s: %s", what, err.text);
        return;
    }
    size_t vocab = (size_t)m->config.vocab_size;
    for (int i = 0; i < LENGTH; i++) tokens[i] = token_at(m, i);
    at = expected = floats((STEPS + 1) * vocab);
    for (int k = 0; k <= STEPS; k++, at += vocab) {
        if (k == 0 ? !model_prefill(m, 0, tokens, PROMPT, 1, &err) : !model_decode(m, 0, tokens[PROMPT + k - 1], &err))
            test_fail("%s: %s", what, err.text);
        memcpy(at, m->logits, vocab * sizeof *at);
    }
    CHECK(isfinite(expected[0]) && memcmp(expected, expected + vocab, vocab * sizeof *at) != 0);
    for (int count = 1; count <= most; count *= 2) compare_with_engine(what, m, expected, count);
    free(expected);
}

// Eight K/V heads, three queries for each; dim, hidden_dim and vocabulary that eight do not divide, nor their units.
static void check_types(const char *layers, const char *output) {
    Model m;
    Error err = {""};
    QuantType numbers = {.dtype = DTYPE_BF16}, type = numbers, output_type = numbers;
    CHECK(synthetic_open(&m, "llama-3.2-1b", 7, &err));
    if (strcmp(layers, "bf16") != 0) CHECK(quant_parse(layers, &type));
    if (strcmp(output, "bf16") != 0) CHECK(quant_parse(output, &output_type));
    Config *c = &m.config;
    c->dim = 200, c->hidden_dim = 330, c->n_layers = 2, c->n_heads = 24, c->n_kv_heads = 8, c->head_dim = 32;
    c->vocab_size = 1001;
    c->tie_embeddings = strcmp(layers, "bf16") == 0 && strcmp(output, "bf16") == 0;
    config_derive(c);
    CHECK(synthetic_set_types(&m, type, output_type, &err));
    check_shards(layers, &m, 8);
    model_close(&m);
}

static void test_shards_have_the_bits_of_one(void) {
    check_types("bf16", "bf16");
    check_types("bf16", "int8");
    test_end("shards_have_the_bits_of_one");
}

static void test_shards_of_quantised_weights_have_the_bits_of_one(void) {
    check_types("fp8", "fp8");
    check_types("int8", "bf16");
    check_types("int8:64", "int8:32");
    check_types("int4:128", "int8");
    check_types("int4:32", "int4:32");
    test_end("shards_of_quantised_weights_have_the_bits_of_one");
}

static void test_shards_of_a_file_have_the_bits_of_one(void) {
    Model m;
    Error err = {""};
    if (!checkpoint_open(&m, "model/stories.bin", false, &err))
        test_fail("%s", err.text);
    else
        check_shards("stories.bin", &m, 2);
    model_close(&m);
    test_end("shards_of_a_file_have_the_bits_of_one");
}

int main(void) {
    test_every_row_has_one_owner();
    test_even_parts();
    test_refusals_name_what_would_do();
    test_engine_cpu_has_no_gpus();
    test_shards_have_the_bits_of_one();
    test_shards_of_quantised_weights_have_the_bits_of_one();
    test_shards_of_a_file_have_the_bits_of_one();
    return tests_summary();
}
