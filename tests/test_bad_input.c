// Bad input, one case a test: broken model files, files of other kinds, wrong flags, broken dumps, output that fails.
// Each gives its exit status, nothing on standard output and one line on standard error that says what was expected and
// found.
#include "model_writer.h"

enum { FAILED = 1, USAGE = 2 };

typedef struct {
    const char *name, *fragment; // of the message
    const char *a, *b;           // what the edit takes
    void (*draft)(Draft *d, const char *a, const char *b);
    void (*file)(File *f, const char *a, const char *b);
} Case;

// The good model as the tests begin with it: one layer, llama3 scaling, separate head.
static Draft good_draft(void) {
    Draft d;
    draft_tiny(&d, tiny_shape, 42);
    return d;
}

// ---- edits of a draft -----------------------------------------------------------------------------------------------

static void set_two(Draft *d, const char *first, const char *second) { // "key=value" each
    const char *both[] = {first, second};
    for (int i = 0; i < 2; i++) {
        char key[40];
        const char *equals = strchr(both[i], '=');
        snprintf(key, sizeof key, "%.*s", (int)(equals - both[i]), both[i]);
        draft_meta(d, key, equals + 1);
    }
}

static void linear_without_factor(Draft *d, const char *a, const char *b) {
    (void)a, (void)b;
    set_two(d, "format=llama-model/2", "rope_type=linear");
    draft_meta(d, "rope_factor", NULL);
}

// In a file of llama-model/2, a text of so many bytes.
static void long_text(Draft *d, const char *key, const char *bytes) {
    size_t n = strtoull(bytes, NULL, 10);
    char *text = must(malloc(n + 1));
    memset(text, 'x', n);
    text[n] = 0;
    draft_meta(d, key, text);
    draft_meta(d, "format", "llama-model/2");
    free(text);
}

static void drop_tensor(Draft *d, const char *name, const char *unused) {
    (void)unused;
    draft_remove(d, name);
}

static void add_tensor(Draft *d, const char *name, const char *before) {
    int at = (int)(draft_part(d, before) - d->parts);
    draft_insert(d, at, name, "F32", 1, 16, 0, NULL);
}

static void add_layer_tensor(Draft *d, const char *name, const char *before) {
    int at = (int)(draft_part(d, before) - d->parts);
    draft_insert(d, at, name, "F32", 2, 16, 16, NULL);
}

// Another shape of the same size, written "rows,cols" or "rows".
static void reshape(Draft *d, const char *name, const char *shape) {
    Part *p = draft_part(d, name);
    p->n_dims = 0;
    for (char *end; *shape; shape = *end ? end + 1 : end) p->shape[p->n_dims++] = strtoull(shape, &end, 10);
}

static void set_dtype(Draft *d, const char *name, const char *dtype) {
    Part *p = draft_part(d, name), old = *p;
    int at = (int)(p - d->parts);
    draft_remove(d, name);
    draft_insert(d, at, name, dtype, old.n_dims, old.shape[0], old.shape[1], NULL);
}

// All matrices, with data of that dtype.
static void set_dtypes(Draft *d, const char *dtype, const char *unused) {
    (void)unused;
    for (int i = 0; i < d->n_parts; i++)
        if (d->parts[i].n_dims == 2) {
            char name[64];
            snprintf(name, sizeof name, "%s", d->parts[i].name);
            set_dtype(d, name, dtype);
        }
}

static void rename_dtype(Draft *d, const char *name, const char *dtype) {
    snprintf(draft_part(d, name)->dtype, sizeof d->parts[0].dtype, "%s", dtype);
}

static void rename_tensor(Draft *d, const char *from, const char *to) {
    snprintf(draft_part(d, from)->name, sizeof d->parts[0].name, "%s", to);
}

static void move_before(Draft *d, const char *name, const char *before) {
    Part moved = *draft_part(d, name), *from = draft_part(d, name);
    memmove(from, from + 1, (size_t)(d->parts + --d->n_parts - from) * sizeof *from);
    Part *to = draft_part(d, before);
    memmove(to + 1, to, (size_t)(d->parts + d->n_parts++ - to) * sizeof *to);
    *to = moved;
}

// The offsets in the header, moved by so many bytes: "16" both, or "0,16".
static void skew(Draft *d, const char *name, const char *bytes) {
    Part *p = draft_part(d, name);
    const char *comma = strchr(bytes, ',');
    p->skew[0] = strtoll(bytes, NULL, 10);
    p->skew[1] = comma ? strtoll(comma + 1, NULL, 10) : p->skew[0];
}

// From that tensor on everything is 16 bytes further: a hole before it, with data in it.
static void make_hole(Draft *d, const char *name, const char *unused) {
    (void)unused;
    int at = (int)(draft_part(d, name) - d->parts);
    for (int i = at; i < d->n_parts; i++) d->parts[i].skew[0] = d->parts[i].skew[1] = 16;
    Part *last = &d->parts[d->n_parts - 1];
    uint8_t *more = must(calloc(last->n + 16, 1)); // the data's end moves with them
    memcpy(more, last->data, last->n);
    free(last->data);
    last->data = more;
    last->n += 16;
    last->skew[1] = 0;
}

static void set_float(Draft *d, const char *name, const char *value) {
    Part *p = draft_part(d, name);
    float x = strtof(value, NULL);
    memcpy(p->data + p->n / 2 / 4 * 4, &x, sizeof x);
}

// The element of "tensor" at "index=value".
static void set_element(Draft *d, const char *name, const char *element) {
    Part *p = draft_part(d, name);
    char *end;
    unsigned long i = strtoul(element, &end, 10);
    if (*end != '=') broken_test("set_element", name);
    if (strcmp(p->dtype, "F32") == 0) {
        float x = strtof(end + 1, NULL);
        memcpy(p->data + 4 * i, &x, 4);
    } else if (strcmp(p->dtype, "U8") == 0) {
        p->data[i] = (uint8_t)strtoul(end + 1, NULL, 10);
    } else {
        uint32_t x = (uint32_t)strtoll(end + 1, NULL, 10);
        memcpy(p->data + 4 * i, &x, 4);
    }
}

// Takes the last so many elements away from a one-dimensional tensor.
static void shorten(Draft *d, const char *name, const char *elements) {
    Part *p = draft_part(d, name);
    uint64_t width = p->n / p->shape[0];
    p->shape[0] -= strtoull(elements, NULL, 10);
    p->n = p->shape[0] * width;
}

static void no_tensors(Draft *d, const char *a, const char *b) {
    (void)a, (void)b;
    while (d->n_parts) draft_remove(d, d->parts[0].name);
}

// ---- edits of a file ------------------------------------------------------------------------------------------------

// All matrices of the layers in that type, then one change: VERB TENSOR [VALUE].
static void quantised(Draft *d, const char *type, const char *change) {
    static const char *const names[] = {"wq", "wk", "wv", "wo", "w1", "w2", "w3"};
    char verb[16] = "", name[64] = "", value[32] = "", full[64];
    sscanf(change, "%15s %63s %31s", verb, name, value);
    for (int i = 0; i < (int)(sizeof names / sizeof *names) && strcmp(type, "none") != 0; i++) {
        snprintf(full, sizeof full, "layers.0.%s", names[i]);
        draft_quantise(d, full, type, "BF16");
    }
    if (strcmp(verb, "meta") == 0) draft_meta(d, name, *value ? value : NULL);
    if (strcmp(verb, "drop") == 0) draft_remove(d, name);
    if (strcmp(verb, "reshape") == 0) reshape(d, name, value);
    if (strcmp(verb, "shorten") == 0) shorten(d, name, value);
    if (strcmp(verb, "rename") == 0) rename_dtype(d, name, value);
    if (strcmp(verb, "dtype") == 0) set_dtype(d, name, value);
    if (strcmp(verb, "add") == 0) add_tensor(d, name, "norm");
    if (strcmp(verb, "quantise") == 0) draft_quantise(d, name, value, "BF16");
    if (strcmp(verb, "scales") == 0) draft_quantise(d, name, type, value);
    if (strcmp(verb, "element") == 0) { // the second: a scale of BF16, or a code
        Part *p = draft_part(d, name);
        uint16_t bits = (uint16_t)strtol(value, NULL, 16);
        if (strcmp(p->dtype, "BF16") == 0)
            memcpy(p->data + 2, &bits, sizeof bits);
        else
            p->data[1] = (uint8_t)bits;
    }
}

// hidden_dim 17: w2 of int4 would have rows of eight bytes and a half.
static void odd_int4(Draft *d, const char *a, const char *b) {
    (void)a, (void)b;
    Shape s = tiny_shape;
    s.hidden_dim = 17;
    draft_free(d);
    draft_tiny(d, s, 1);
    draft_quantise(d, "layers.0.w2", "U8:32", "BF16");
}

// 259 rows of eight bytes, and scales after them.
static void unaligned_scale(Draft *d, const char *a, const char *b) {
    (void)a, (void)b;
    draft_quantise(d, "output", "U8:32", "BF16");
}

static void set_header(File *f, const char *header, const char *unused) {
    (void)unused;
    file_set_header(f, header, strlen(header), 4096);
}

static void align_64(File *f, const char *a, const char *b) {
    (void)a, (void)b;
    size_t n = file_header_length(f);
    char *header = must(strndup((char *)f->bytes + 8, n));
    n = (size_t)(strrchr(header, '}') + 1 - header);
    file_set_header(f, header, n, 64);
    if ((8 + file_header_length(f)) % 4096 == 0) broken_test("still aligned", "align_64");
    free(header);
}

static void set_length(File *f, const char *length, const char *unused) {
    (void)unused;
    uint64_t n = strtoull(length, NULL, 10);
    for (int i = 0; i < 8; i++) f->bytes[i] = (uint8_t)(n >> 8 * i);
}

static void set_length_to_file(File *f, const char *a, const char *b) {
    (void)a, (void)b;
    for (int i = 0; i < 8; i++) f->bytes[i] = (uint8_t)((uint64_t)f->n >> 8 * i);
}

static void append(File *f, const char *bytes, const char *unused) {
    (void)unused;
    f->bytes = must(realloc(f->bytes, f->n + strlen(bytes)));
    memcpy(f->bytes + f->n, bytes, strlen(bytes));
    f->n += strlen(bytes);
}

static void nul_in_header(File *f, const char *wanted, const char *unused) {
    (void)unused;
    char *at = (char *)find_bytes((char *)f->bytes + 8, file_header_length(f), wanted);
    *at = 0;
}

static void deep_header(File *f, const char *a, const char *b) {
    (void)a, (void)b;
    enum { DEEP = 1000000 };
    char *header = must(malloc(DEEP));
    memset(header, '[', DEEP);
    memcpy(header, "{\"a\":", 5);
    file_set_header(f, header, DEEP, 4096);
    free(header);
}

static void deep_objects(File *f, const char *a, const char *b) {
    (void)a, (void)b;
    enum { DEEP = 100000 };
    char *header = must(malloc(5 * DEEP + 1));
    for (int i = 0; i < DEEP; i++) memcpy(header + 5 * i, "{\"a\":", 5);
    file_set_header(f, header, 5 * DEEP, 4096);
    free(header);
}

// ---- the table of files ---------------------------------------------------------------------------------------------

// clang-format off
#define META(test, key, value, message) {.name = test, .draft = draft_meta, .a = key, .b = value, .fragment = message}
#define SET_TWO(test, first, second, message) {.name = test, .draft = set_two, .a = first, .b = second, .fragment = message}
#define META2(test, entry, message) SET_TWO(test, "format=llama-model/2", entry, message)
#define NO_META(key) {.name = "no_" key, .draft = draft_meta, .a = key, .b = NULL, .fragment = "metadata has no " key}
#define QUANTISED(test, type, change, message) {.name = test, .draft = quantised, .a = type, .b = change, .fragment = message}
#define NO_TENSOR(tensor) {.name = "no_tensor_" tensor, .draft = drop_tensor, .a = tensor, .fragment = "no tensor " tensor}
#define RESHAPE(tensor, shape, message) \
    {.name = "wrong_shape_" tensor, .draft = reshape, .a = tensor, .b = shape, .fragment = "tensor " tensor ": " message}
#define HEADER(test, text, message) {.name = "header_" test, .file = set_header, .a = text, .fragment = message}
#define REPLACE(test, from, to, message) {.name = test, .file = file_replace, .a = from, .b = to, .fragment = message}
#define NORM(tensor, what, found) \
    {.name = what "_in_" tensor, .draft = set_float, .a = tensor, .b = what, .fragment = "tensor " tensor ": element 8 is " found ", expected a finite"}
#define NAN_WEIGHT(tensor) \
    {.name = "nan_in_" tensor, .draft = set_float, .a = tensor, .b = "nan", .fragment = "position 3: logit "}
#define ELEMENT(test, tensor, element, message) \
    {.name = test, .draft = set_element, .a = tensor, .b = element, .fragment = message}

#define CONVERT "scripts/convert.py"
#define SIZES "expected a whole number from 1 to 1048576"
#define VOCAB "expected a whole number from 1 to 16777216"

static const Case cases[] = {
    // the header's length
    {.name = "header_length_past_the_file", .file = set_length_to_file, .fragment = "but the file ends after"},
    {.name = "header_length_100_MB_and_1", .file = set_length, .a = "100000001", .fragment = "header of 100000001 bytes, at most 100000000"},
    {.name = "header_length_100_MB", .file = set_length, .a = "100000000", .fragment = "header of 100000000 bytes, but the file ends after"},
    {.name = "header_length_2_63", .file = set_length, .a = "9223372036854775808", .fragment = "header of 9223372036854775808 bytes, at most"},
    {.name = "header_length_2_64_less_1", .file = set_length, .a = "18446744073709551615", .fragment = "header of 18446744073709551615 bytes, at most"},
    {.name = "header_length_0", .file = set_length, .a = "0", .fragment = "bad JSON at byte 0"},
    {.name = "header_length_short", .file = set_length, .a = "100", .fragment = "bad JSON"},
    // the header's JSON
    HEADER("blank", "", "bad JSON"),
    HEADER("garbage", "hello world", "bad JSON at byte 0: expected '{'"),
    HEADER("array", "[]", "expected '{'"),
    HEADER("null", "null", "expected '{'"),
    HEADER("string", "\"llama-model/1\"", "expected '{'"),
    HEADER("open", "{", "expected a string"),
    HEADER("empty_object", "{}", "end at byte 0 of the data, the file at"),
    HEADER("no_colon", "{\"a\" 1}", "expected ':'"),
    HEADER("number_for_a_tensor", "{\"a\": 1}", "expected '{'"),
    HEADER("trailing_comma", "{\"__metadata__\": {},}", "expected a string"),
    HEADER("two_objects", "{} {}", "expected the end"),
    HEADER("metadata_array", "{\"__metadata__\": []}", "expected '{'"),
    HEADER("metadata_number", "{\"__metadata__\": {\"dim\": 16}}", "expected a string"),
    HEADER("metadata_null", "{\"__metadata__\": null}", "expected '{'"),
    HEADER("single_quotes", "{'a': {}}", "expected a string"),
    HEADER("open_string", "{\"abc", "expected the end of the string"),
    HEADER("bad_escape", "{\"a\\x\": {}}", "expected an escape"),
    HEADER("bad_hex_escape", "{\"a\\u12g4\": {}}", "expected four hex digits"),
    HEADER("lone_surrogate", "{\"\\ud800\": {}}", "expected a low surrogate"),
    HEADER("low_surrogate", "{\"\\udc00\": {}}", "lone surrogates"),
    HEADER("escaped_nul", "{\"a\\u0000b\": {}}", "NUL"),
    HEADER("newline_in_a_string", "{\"a\nb\": {}}", "no control character"),
    HEADER("invalid_utf8", "{\"a\xFF\": {}}", "expected UTF-8"),
    HEADER("overlong_utf8", "{\"a\xC0\xAF\": {}}", "expected UTF-8"),
    HEADER("surrogate_utf8", "{\"a\xED\xA0\x80\": {}}", "expected UTF-8"),
    HEADER("cut_utf8", "{\"a\xE2\x82\": {}}", "expected UTF-8"),
    {.name = "header_nul", .file = nul_in_header, .a = "dim", .fragment = "no control character"},
    {.name = "header_nul_after", .file = nul_in_header, .a = "  ", .fragment = "expected the end"},
    {.name = "header_deep_array", .file = deep_header, .fragment = "bad JSON at byte 5: expected '{'"},
    {.name = "header_deep_objects", .file = deep_objects, .fragment = "unknown key a"},
    REPLACE("metadata_twice", "\"tok_embeddings\"", "\"__metadata__\":{},\"tok_embeddings\"", "duplicate key __metadata__"),
    REPLACE("metadata_key_twice", "\"dim\":\"16\"", "\"dim\":\"16\",\"dim\":\"16\"", "duplicate metadata key dim"),
    REPLACE("metadata_key_twice_escaped", "\"dim\":\"16\"", "\"dim\":\"16\",\"d\\u0069m\":\"16\"", "duplicate metadata key dim"),
    REPLACE("tensor_key_twice", "\"dtype\":\"F32\"", "\"dtype\":\"F32\",\"dtype\":\"F32\"", "duplicate key dtype"),
    REPLACE("tensor_shape_twice", "\"shape\":[259,16]", "\"shape\":[259,16],\"shape\":[259,16]", "duplicate key shape"),
    REPLACE("tensor_unknown_key", "\"dtype\":\"F32\"", "\"type\":\"F32\"", "unknown key type"),
    REPLACE("tensor_without_dtype", "\"dtype\":\"F32\",", "", "tensor tok_embeddings: no dtype"),
    REPLACE("tensor_without_shape", "\"shape\":[259,16],", "", "tensor tok_embeddings: no shape"),
    REPLACE("tensor_without_offsets", ",\"data_offsets\":[0,16576]", "", "tensor tok_embeddings: no data_offsets"),
    REPLACE("tensor_empty", "{\"dtype\":\"F32\",\"shape\":[259,16],\"data_offsets\":[0,16576]}", "{}", "expected a string"),
    REPLACE("tensor_one_offset", "[0,16576]", "[0]", "expected ','"),
    REPLACE("tensor_three_offsets", "[0,16576]", "[0,16576,16576]", "expected ']'"),
    REPLACE("tensor_dtype_number", "\"dtype\":\"F32\"", "\"dtype\":32", "expected a string"),
    REPLACE("tensor_dtype_unknown", "\"dtype\":\"F32\"", "\"dtype\":\"F64\"", "dtype F64, expected BF16, F16, F32, I32, U32, U8, I8 or F8_E4M3"),
    REPLACE("tensor_dtype_lower_case", "\"dtype\":\"F32\"", "\"dtype\":\"f32\"", "dtype f32, expected"),
    REPLACE("offset_negative", "[0,16576]", "[-1,16576]", "expected a whole number"),
    REPLACE("offset_float", "[0,16576]", "[0,16576.0]", "expected a whole number"),
    REPLACE("offset_exponent", "[0,16576]", "[0,1e4]", "expected a whole number"),
    REPLACE("offset_leading_zero", "[0,16576]", "[00,16576]", "expected a whole number"),
    REPLACE("offset_text", "[0,16576]", "[\"0\",16576]", "expected a whole number"),
    REPLACE("offset_2_64", "[0,16576]", "[0,18446744073709551616]", "a number below 2^64"),
    REPLACE("offset_past_the_end", "[0,16576]", "[0,18446744073709551615]", "bytes 0 to 18446744073709551615, the data has"),
    REPLACE("offset_end_before_begin", "[0,16576]", "[16576,0]", "bytes 16576 to 0"),
    // shapes and lengths
    REPLACE("shape_negative", "[259,16]", "[-259,16]", "expected a whole number"),
    REPLACE("shape_float", "[259,16]", "[259.0,16]", "expected a whole number"),
    REPLACE("shape_too_large", "[259,16]", "[260,16]", "tok_embeddings: its shape needs 16640 bytes, it has 16576"),
    REPLACE("shape_too_small", "[259,16]", "[259,15]", "tok_embeddings: its shape needs 15540 bytes, it has 16576"),
    REPLACE("shape_zero", "[259,16]", "[0,16]", "its shape needs 0 bytes, it has 16576"),
    REPLACE("shape_empty", "[259,16]", "[]", "its shape needs 4 bytes, it has 16576"),
    REPLACE("shape_five_dimensions", "[259,16]", "[259,16,1,1,1]", "more than 4 dimensions"),
    REPLACE("shape_wraps_to_0", "[259,16]", "[4294967296,4294967296]", "its shape needs more than 2^64 bytes"),
    REPLACE("shape_wraps_by_dtype", "[259,16]", "[4611686018427387904]", "its shape needs more than 2^64 bytes"),
    REPLACE("shape_wraps_to_the_right_length", "[259,16]", "[4611686018427387904,1,4,4144]", "its shape needs more than 2^64 bytes"),
    REPLACE("shape_wraps_in_four", "[259,16]", "[65536,65536,65536,65536]", "its shape needs more than 2^64 bytes"),
    REPLACE("shape_2_64", "[259,16]", "[18446744073709551616]", "a number below 2^64"),
    {.name = "length_of_another_dtype", .draft = rename_dtype, .a = "layers.0.wk", .b = "BF16", .fragment = "tensor layers.0.wk: its shape needs 256 bytes, it has 512"},
    // the layout
    {.name = "overlap", .draft = skew, .a = "layers.0.wv", .b = "-16", .fragment = "tensor layers.0.wv begins at byte"},
    {.name = "overlap_is_named", .draft = skew, .a = "layers.0.wv", .b = "-16", .fragment = "(an overlap)"},
    {.name = "overlap_of_all", .draft = skew, .a = "layers.0.wv", .b = "-512", .fragment = "(an overlap)"},
    {.name = "moved_up", .draft = skew, .a = "layers.0.wv", .b = "16", .fragment = "tensor layers.0.wv begins at byte"},
    {.name = "hole", .draft = make_hole, .a = "layers.0.w1", .fragment = "(a hole)"},
    {.name = "hole_at_0", .draft = make_hole, .a = "tok_embeddings", .fragment = "tensor tok_embeddings begins at byte 16 of the data, expected 0 (a hole)"},
    {.name = "tensor_twice", .draft = add_tensor, .a = "layers.0.ffn_norm", .b = "output", .fragment = "duplicate tensor layers.0.ffn_norm"},
    {.name = "tokenizer_tensor_twice", .draft = add_tensor, .a = "tokenizer.kind", .b = "output", .fragment = "duplicate tensor tokenizer.kind"},
    {.name = "misaligned_weight", .draft = move_before, .a = "tokenizer.kind", .b = "tok_embeddings", .fragment = "tensor tok_embeddings begins at byte 259 of the data, expected a multiple of 16"},
    {.name = "data_not_on_4096", .file = align_64, .fragment = "expected a multiple of 4096"},
    {.name = "trailing_byte", .file = append, .a = "x", .fragment = "the tensors end at byte"},
    {.name = "trailing_newline", .file = append, .a = "\n", .fragment = "the tensors end at byte"},
    {.name = "no_tensors", .draft = no_tensors, .fragment = "n_layers is 1, the file has 0 tensors in all"},
    // each kind of tensor: another shape, absent, of another type
    RESHAPE("tok_embeddings", "16,259", "shape [16, 259], expected [259, 16]"),
    RESHAPE("layers.0.attention_norm", "8,2", "shape [8, 2], expected [16]"),
    RESHAPE("layers.0.wq", "8,32", "shape [8, 32], expected [16, 16]"),
    RESHAPE("layers.0.wk", "16,8", "shape [16, 8], expected [8, 16]"),
    RESHAPE("layers.0.wv", "128", "shape [128], expected [8, 16]"),
    RESHAPE("layers.0.wo", "16,4,4", "shape [16, 4, 4], expected [16, 16]"),
    RESHAPE("layers.0.ffn_norm", "1,16", "shape [1, 16], expected [16]"),
    RESHAPE("layers.0.w1", "16,24", "shape [16, 24], expected [24, 16]"),
    RESHAPE("layers.0.w2", "24,16", "shape [24, 16], expected [16, 24]"),
    RESHAPE("layers.0.w3", "384,1", "shape [384, 1], expected [24, 16]"),
    RESHAPE("norm", "16,1", "shape [16, 1], expected [16]"),
    RESHAPE("output", "16,259", "shape [16, 259], expected [259, 16]"),
    RESHAPE("tokenizer.offsets", "130,2", "shape [130, 2], expected [260]"),
    RESHAPE("tokenizer.kind", "1,259", "shape [1, 259], expected [259]"),
    RESHAPE("tokenizer.bytes", "1,298", "expected one dimension"),
    NO_TENSOR("tok_embeddings"),
    NO_TENSOR("layers.0.attention_norm"),
    NO_TENSOR("layers.0.wq"),
    NO_TENSOR("layers.0.wk"),
    NO_TENSOR("layers.0.wv"),
    NO_TENSOR("layers.0.wo"),
    NO_TENSOR("layers.0.ffn_norm"),
    NO_TENSOR("layers.0.w1"),
    NO_TENSOR("layers.0.w2"),
    NO_TENSOR("layers.0.w3"),
    NO_TENSOR("norm"),
    NO_TENSOR("output"),
    NO_TENSOR("tokenizer.offsets"),
    NO_TENSOR("tokenizer.kind"),
    NO_TENSOR("tokenizer.bytes"),
    {.name = "tensor_of_another_name", .draft = rename_tensor, .a = "layers.0.w1", .b = "layers.0.gate", .fragment = "no tensor layers.0.w1"},
    {.name = "surplus_bias", .draft = add_tensor, .a = "layers.0.bq", .b = "norm", .fragment = "tensor layers.0.bq is none of this model's"},
    {.name = "surplus_layer", .draft = add_layer_tensor, .a = "layers.1.wq", .b = "norm", .fragment = "tensor layers.1.wq is none of this model's"},
    {.name = "surplus_empty_name", .draft = add_tensor, .a = "", .b = "norm", .fragment = "is none of this model's"},
    {.name = "surplus_tokenizer_tensor", .draft = add_tensor, .a = "tokenizer.scores", .b = "norm", .fragment = "tokenizer.scores"},
    {.name = "surplus_output", .draft = draft_meta, .a = "tie_embeddings", .b = "true", .fragment = "tensor output is none of this model's"},
    {.name = "layers_fewer_than_said", .draft = draft_meta, .a = "n_layers", .b = "2", .fragment = "no tensor layers.1.attention_norm"},
    {.name = "layers_very_many", .draft = draft_meta, .a = "n_layers", .b = "1048576", .fragment = "n_layers is 1048576, the file has 15 tensors in all"},
    {.name = "mixed_dtypes", .draft = set_dtype, .a = "layers.0.w2", .b = "BF16", .fragment = "tensor layers.0.w2: dtype BF16, expected F32"},
    {.name = "mixed_dtypes_output", .draft = set_dtype, .a = "output", .b = "F16", .fragment = "tensor output: dtype F16 beside layers of F32 in a llama-model/1 file, expected llama-model/2"},
    {.name = "mixed_dtypes_embeddings", .draft = set_dtype, .a = "tok_embeddings", .b = "BF16", .fragment = "tensor tok_embeddings: dtype BF16 beside layers of F32 in a llama-model/1 file, expected llama-model/2"},
    {.name = "embeddings_U32", .draft = rename_dtype, .a = "tok_embeddings", .b = "U32", .fragment = "tensor tok_embeddings: dtype U32, expected BF16, F16 or F32"},
    {.name = "weights_I32", .draft = set_dtypes, .a = "I32", .fragment = "weights of dtype I32, expected BF16, F16 or F32"},
    {.name = "weights_U8", .draft = set_dtypes, .a = "U8", .fragment = "a quantised matrix in a llama-model/1 file, expected llama-model/2"},
    {.name = "weights_U32", .draft = rename_dtype, .a = "layers.0.wq", .b = "U32", .fragment = "weights of dtype U32, expected BF16, F16 or F32"},
    QUANTISED("quantised_format_1", "I8", "meta format llama-model/1", "a quantised matrix in a llama-model/1 file, expected llama-model/2"),
    QUANTISED("quantised_group_in_format_1", "none", "meta group 32", "group in a llama-model/1 file, expected llama-model/2"),
    QUANTISED("quantised_no_scale", "I8", "drop layers.0.wo.scale", "no tensor layers.0.wo.scale"),
    QUANTISED("quantised_no_scale_of_int4", "U8:32", "drop layers.0.w1.scale", "no tensor layers.0.w1.scale"),
    QUANTISED("quantised_scale_alone", "none", "add layers.0.wo.scale", "tensor layers.0.wo.scale is none of this model's"),
    QUANTISED("quantised_scale_of_a_norm", "I8", "add norm.scale", "tensor norm.scale is none of this model's"),
    QUANTISED("quantised_scale_nan", "I8", "element layers.0.w2.scale 7FC0", "tensor layers.0.w2.scale: element 1 is nan, expected a finite number"),
    QUANTISED("quantised_scale_inf", "U8:32", "element layers.0.wk.scale 7F80", "tensor layers.0.wk.scale: element 1 is inf, expected a finite number"),
    QUANTISED("quantised_scale_minus_inf", "F8_E4M3", "element layers.0.w3.scale FF80", "tensor layers.0.w3.scale: element 1 is -inf, expected a finite number"),
    QUANTISED("quantised_scale_shape", "I8", "shorten layers.0.wk.scale 4", "tensor layers.0.wk.scale: shape [4], expected [8]"),
    QUANTISED("quantised_scale_of_a_tensor", "F8_E4M3", "shorten layers.0.wq.scale 15", "tensor layers.0.wq.scale: shape [1], expected [16]"),
    QUANTISED("quantised_scale_groups", "U8:32", "reshape layers.0.wq.scale 8,2", "tensor layers.0.wq.scale: shape [8, 2], expected [16, 1]"),
    QUANTISED("quantised_scale_dims", "U8:32", "reshape layers.0.wq.scale 16,1,1", "tensor layers.0.wq.scale: shape [16, 1, 1], expected [16, 1]"),
    QUANTISED("quantised_scale_I32", "I8", "dtype layers.0.wo.scale I32", "tensor layers.0.wo.scale: dtype I32, expected BF16, F16 or F32"),
    QUANTISED("quantised_scale_U8", "I8", "dtype layers.0.wo.scale U8", "tensor layers.0.wo.scale: dtype U8, expected BF16, F16 or F32"),
    QUANTISED("quantised_no_group", "I8:32", "meta group", "tensor layers.0.wq.scale: a scale for each group of columns, but the metadata has no group"),
    QUANTISED("quantised_group_16", "I8:32", "meta group 16", "group is \"16\", expected 32, 64 or 128"),
    QUANTISED("quantised_group_256", "I8:32", "meta group 256", "group is \"256\", expected 32, 64 or 128"),
    QUANTISED("quantised_group_word", "I8:32", "meta group row", "group is \"row\", expected a whole number"),
    QUANTISED("quantised_fp8_groups", "F8_E4M3:32", "", "tensor layers.0.wq.scale: shape [16, 1], expected [16]"),
    QUANTISED("quantised_fp8_nan", "F8_E4M3", "element layers.0.wo 7F", "tensor layers.0.wo: the code of row 0, column 1 is NaN"),
    QUANTISED("quantised_fp8_minus_nan", "F8_E4M3", "element layers.0.w2 FF", "tensor layers.0.w2: the code of row 0, column 1 is NaN"),
    QUANTISED("quantised_int4_unpacked", "U8:32", "dtype layers.0.wo F32", "tensor layers.0.wo: shape [16, 8], expected [16, 16]"),
    QUANTISED("quantised_int4_as_int8", "U8:32", "rename layers.0.wo I8", "tensor layers.0.wo: shape [16, 8], expected [16, 16]"),
    QUANTISED("quantised_int8_as_int4", "I8", "rename layers.0.wo U8", "tensor layers.0.wo: shape [16, 16], expected [16, 8]"),
    QUANTISED("quantised_unknown_type", "F8_E4M3", "rename layers.0.wo F8_E5M2", "tensor layers.0.wo: dtype F8_E5M2, expected BF16, F16, F32, I32, U32, U8, I8 or F8_E4M3"),
    QUANTISED("quantised_I32", "I8", "dtype layers.0.wo I32", "tensor layers.0.wo: dtype I32, expected BF16, F16 or F32"),
    QUANTISED("quantised_one_of_qkv", "none", "quantise layers.0.wk I8", "wq, wk and wv of layer 0 are of F32 (scales none) and int8 (scales BF16), expected all alike"),
    QUANTISED("quantised_qkv_mixed", "I8:32", "quantise layers.0.wv U8:32", "wq, wk and wv of layer 0 are of int8:32 (scales BF16) and int4:32 (scales BF16), expected all alike"),
    QUANTISED("quantised_qkv_scales_mixed", "I8", "scales layers.0.wv F16", "wq, wk and wv of layer 0 are of int8 (scales BF16) and int8 (scales F16), expected all alike"),
    QUANTISED("quantised_gate_and_up_mixed", "I8", "quantise layers.0.w3 F8_E4M3", "w1 and w3 of layer 0 are of int8 (scales BF16) and fp8 (scales BF16), expected all alike"),
    QUANTISED("quantised_embeddings", "I8", "quantise tok_embeddings I8", "tensor tok_embeddings: dtype I8, expected BF16, F16 or F32"),
    QUANTISED("quantised_norm", "I8", "dtype norm I8", "tensor norm: dtype I8, expected F32"),
    {.name = "quantised_odd_columns", .draft = odd_int4, .fragment = "tensor layers.0.w2: int4 of 17 columns, expected an even number"},
    {.name = "quantised_unaligned_scale", .draft = unaligned_scale, .fragment = "tensor output.scale begins at byte 26520 of the data, expected a multiple of 16"},
    {.name = "norm_BF16", .draft = set_dtype, .a = "norm", .b = "BF16", .fragment = "tensor norm: dtype BF16, expected F32"},
    {.name = "attention_norm_F16", .draft = set_dtype, .a = "layers.0.attention_norm", .b = "F16", .fragment = "tensor layers.0.attention_norm: dtype F16, expected F32"},
    {.name = "ffn_norm_I32", .draft = rename_dtype, .a = "layers.0.ffn_norm", .b = "I32", .fragment = "tensor layers.0.ffn_norm: dtype I32, expected F32"},
    {.name = "tokenizer_offsets_I32", .draft = rename_dtype, .a = "tokenizer.offsets", .b = "I32", .fragment = "tensor tokenizer.offsets: dtype I32, expected U32"},
    {.name = "tokenizer_kind_F32", .draft = set_dtype, .a = "tokenizer.kind", .b = "F32", .fragment = "tensor tokenizer.kind: dtype F32, expected U8"},
    {.name = "tokenizer_bytes_U32", .draft = set_dtype, .a = "tokenizer.bytes", .b = "U32", .fragment = "tensor tokenizer.bytes: dtype U32, expected U8"},
    // the metadata
    NO_META("dim"),
    NO_META("hidden_dim"),
    NO_META("n_layers"),
    NO_META("n_heads"),
    NO_META("n_kv_heads"),
    NO_META("head_dim"),
    NO_META("vocab_size"),
    NO_META("max_seq_len"),
    NO_META("norm_eps"),
    NO_META("rope_theta"),
    NO_META("rope_type"),
    NO_META("rope_factor"),
    NO_META("rope_low_freq_factor"),
    NO_META("rope_high_freq_factor"),
    NO_META("rope_original_max_seq_len"),
    NO_META("tie_embeddings"),
    NO_META("bos_id"),
    NO_META("eos_ids"),
    NO_META("chat_format"),
    META("no_format", "format", NULL, CONVERT),
    META("format_of_others", "format", "pt", CONVERT),
    META("format_3", "format", "llama-model/3", "newer than this program: its format is llama-model/3, this program reads up to llama-model/2"),
    META("format_11", "format", "llama-model/11", "newer than this program: its format is llama-model/11, this program"),
    META("format_0", "format", "llama-model/0", "format is \"llama-model/0\", expected \"llama-model/1\" or \"llama-model/2\""),
    META("format_01", "format", "llama-model/01", "format is \"llama-model/01\", expected"),
    META("format_1_5", "format", "llama-model/1.5", "format is \"llama-model/1.5\", expected"),
    META("format_negative", "format", "llama-model/-2", "format is \"llama-model/-2\", expected"),
    META("format_without_version", "format", "llama-model/", "format is \"llama-model/\", expected \"llama-model/1\""),
    // what came with llama-model/2, in an older file
    SET_TWO("linear_in_1", "rope_type=linear", "rope_factor=2", "rope_type \"linear\" in a llama-model/1 file, expected llama-model/2"),
    META("chatml_in_1", "chat_format", "chatml", "chat_format \"chatml\" in a llama-model/1 file, expected llama-model/2"),
    META("deepseek_in_1", "chat_format", "deepseek", "chat_format \"deepseek\" in a llama-model/1 file"),
    META("chat_system_in_1", "chat_system", "Be kind.", "chat_system in a llama-model/1 file"),
    META("chat_date_in_1", "chat_date", "today", "chat_date in a llama-model/1 file"),
    META("chat_bos_id_in_1", "chat_bos_id", "", "chat_bos_id in a llama-model/1 file"),
    META("normalized_ids_in_1", "normalized_ids", "258", "normalized_ids in a llama-model/1 file"),
    ELEMENT("added_token_in_1", "tokenizer.kind", "258=3", "a token of kind 3 in a llama-model/1 file, expected llama-model/2"),
    // and bad values of it
    META2("rope_factor_0_linear", "rope_factor=0", "rope_factor is \"0\", expected a positive"),
    {.name = "no_rope_factor_linear", .draft = linear_without_factor, .fragment = "metadata has no rope_factor"},
    META2("chat_bos_id_out_of_range", "chat_bos_id=259", "chat_bos_id is \"259\", expected a whole number from 0 to 258"),
    META2("chat_bos_id_text", "chat_bos_id=none", "chat_bos_id is \"none\", expected a whole number from 0 to 258"),
    {.name = "chat_system_too_long", .draft = long_text, .a = "chat_system", .b = "65537", .fragment = "chat_system has 65537 bytes, expected at most 65536"},
    {.name = "chat_date_too_long", .draft = long_text, .a = "chat_date", .b = "65537", .fragment = "chat_date has 65537 bytes, expected at most 65536"},
    META2("normalized_ids_empty", "normalized_ids=", "normalized_ids at byte 0 of 0: expected ids with commas between"),
    META2("normalized_ids_text", "normalized_ids=all", "normalized_ids at byte 0 of 3"),
    META2("normalized_ids_trailing_comma", "normalized_ids=257,", "normalized_ids at byte 4 of 4"),
    META2("normalized_ids_two_commas", "normalized_ids=257,,258", "normalized_ids at byte 4 of 8"),
    META2("normalized_ids_space", "normalized_ids=257, 258", "normalized_ids at byte 4 of 8"),
    META2("normalized_ids_overflow", "normalized_ids=4294967553", "normalized_ids at byte 0 of 10"),
    META2("normalized_ids_out_of_range", "normalized_ids=259", "normalized_ids: tokenizer: token 259 is in the second pass, expected a special or added token"),
    META2("normalized_ids_of_a_byte", "normalized_ids=65,257", "normalized_ids: tokenizer: token 65 is in the second pass, expected"),
    META2("normalized_ids_twice", "normalized_ids=257,257", "normalized_ids: tokenizer: token 257 after token 257 in the second pass, expected ascending ids"),
    META2("normalized_ids_descending", "normalized_ids=258,257", "token 257 after token 258 in the second pass, expected ascending ids"),
    META("vocab_size_0", "vocab_size", "0", "vocab_size is \"0\", " VOCAB),
    META("vocab_size_huge", "vocab_size", "16777217", "vocab_size is \"16777217\", " VOCAB),
    META("vocab_size_2_32", "vocab_size", "4294967555", VOCAB), // 259 in 32 bits
    META("vocab_size_2_64", "vocab_size", "18446744073709551875", VOCAB),
    META("vocab_size_negative", "vocab_size", "-259", VOCAB),
    META("vocab_size_text", "vocab_size", "many", "vocab_size is \"many\", " VOCAB),
    META("vocab_size_empty", "vocab_size", "", VOCAB),
    META("vocab_size_float", "vocab_size", "259.0", VOCAB),
    META("vocab_size_exponent", "vocab_size", "3e2", VOCAB),
    META("vocab_size_hex", "vocab_size", "0x103", VOCAB),
    META("vocab_size_space", "vocab_size", " 259", VOCAB),
    META("vocab_size_space_behind", "vocab_size", "259 ", VOCAB),
    META("vocab_size_plus", "vocab_size", "+259", VOCAB),
    META("vocab_size_newline", "vocab_size", "259\\n", VOCAB),
    META("vocab_size_less_than_the_tensors", "vocab_size", "258", "tensor tok_embeddings: shape [259, 16], expected [258, 16]"),
    META("vocab_size_more_than_the_tensors", "vocab_size", "260", "tensor tok_embeddings: shape [259, 16], expected [260, 16]"),
    META("dim_0", "dim", "0", "dim is \"0\", " SIZES),
    META("dim_negative", "dim", "-16", SIZES),
    META("dim_huge", "dim", "1048577", SIZES),
    META("dim_largest", "dim", "1048576", "shape [259, 16], expected [259, 1048576]"),
    META("dim_float", "dim", "16.5", SIZES),
    META("hidden_dim_0", "hidden_dim", "0", "hidden_dim is \"0\", " SIZES),
    META("hidden_dim_other", "hidden_dim", "32", "tensor layers.0.w1: shape [24, 16], expected [32, 16]"),
    META("n_layers_negative", "n_layers", "-1", "n_layers is \"-1\", " SIZES),
    META("n_layers_00", "n_layers", "00", "n_layers is \"00\", " SIZES),
    META("n_layers_huge", "n_layers", "99999999999999999999", SIZES),
    META("n_layers_0_with_weights", "n_layers", "0", "n_layers 0"),
    META("n_heads_0", "n_heads", "0", "n_heads is \"0\", " SIZES),
    META("n_heads_not_divisible", "n_heads", "3", "n_heads 3 is not a multiple of n_kv_heads 2"),
    META("n_heads_fewer_than_kv", "n_heads", "1", "n_heads 1 is not a multiple of n_kv_heads 2"),
    META("n_heads_huge", "n_heads", "1048576", "expected [4194304, 16]"),
    META("n_heads_negative", "n_heads", "-4", SIZES),
    META("n_kv_heads_0", "n_kv_heads", "0", "n_kv_heads is \"0\", " SIZES),
    META("n_kv_heads_negative", "n_kv_heads", "-2", SIZES),
    META("n_kv_heads_other", "n_kv_heads", "4", "tensor layers.0.wk: shape [8, 16], expected [16, 16]"),
    META("head_dim_0", "head_dim", "0", "head_dim is \"0\", " SIZES),
    META("head_dim_odd", "head_dim", "5", "head_dim is 5, expected an even number up to 256"),
    META("head_dim_too_big", "head_dim", "258", "head_dim is 258, expected an even number up to 256"),
    META("head_dim_other", "head_dim", "8", "tensor layers.0.wq: shape [16, 16], expected [32, 16]"),
    META("max_seq_len_0", "max_seq_len", "0", "max_seq_len is \"0\", expected a whole number from 1 to 1073741824"),
    META("max_seq_len_negative", "max_seq_len", "-128", "max_seq_len is \"-128\", expected"),
    META("max_seq_len_2_31", "max_seq_len", "2147483648", "max_seq_len is \"2147483648\", expected"),
    {.name = "heads_times_head_dim_huge", .draft = set_two, .a = "n_heads=1048576", .b = "head_dim=256", .fragment = "n_heads 1048576 × head_dim 256 is more than 16777216"},
    META("norm_eps_nan", "norm_eps", "nan", "norm_eps is \"nan\", expected a non-negative number"),
    META("norm_eps_inf", "norm_eps", "inf", "norm_eps is \"inf\", expected"),
    META("norm_eps_negative", "norm_eps", "-1e-5", "norm_eps is \"-1e-5\", expected"),
    META("norm_eps_text", "norm_eps", "small", "norm_eps is \"small\", expected"),
    META("norm_eps_empty", "norm_eps", "", "norm_eps is \"\", expected"),
    META("norm_eps_overflow", "norm_eps", "1e60", "norm_eps is \"1e60\", expected"),
    META("norm_eps_text_behind", "norm_eps", "1e-5f", "norm_eps is \"1e-5f\", expected"),
    META("rope_theta_0", "rope_theta", "0", "rope_theta is \"0\", expected a positive number"),
    META("rope_theta_negative", "rope_theta", "-10000", "rope_theta is \"-10000\", expected a positive"),
    META("rope_theta_nan", "rope_theta", "NaN", "rope_theta is \"NaN\", expected a positive"),
    META("rope_theta_inf", "rope_theta", "Infinity", "rope_theta is \"Infinity\", expected a positive"),
    META("rope_theta_overflow", "rope_theta", "1e39", "rope_theta is \"1e39\", expected a positive"),
    META("rope_theta_underflow", "rope_theta", "1e-60", "rope_theta is \"1e-60\", expected a positive"),
    META("rope_theta_comma", "rope_theta", "500000,0", "rope_theta is \"500000,0\", expected a positive"),
    META("rope_type_unknown", "rope_type", "yarn", "rope_type is \"yarn\", expected one of: default, llama3, linear"),
    META("rope_type_empty", "rope_type", "", "rope_type is \"\", expected one of"),
    META("rope_type_upper_case", "rope_type", "LLAMA3", "rope_type is \"LLAMA3\", expected one of"),
    META("rope_factor_0", "rope_factor", "0", "rope_factor is \"0\", expected a positive"),
    META("rope_factor_negative", "rope_factor", "-8", "rope_factor is \"-8\", expected a positive"),
    META("rope_low_freq_factor_nan", "rope_low_freq_factor", "nan", "rope_low_freq_factor is \"nan\", expected a positive"),
    META("rope_high_freq_factor_text", "rope_high_freq_factor", "four", "rope_high_freq_factor is \"four\", expected a positive"),
    META("rope_high_equals_low", "rope_high_freq_factor", "1.0", "rope_high_freq_factor 1 is not above rope_low_freq_factor 1"),
    META("rope_high_below_low", "rope_high_freq_factor", "0.5", "rope_high_freq_factor 0.5 is not above rope_low_freq_factor 1"),
    META("rope_original_max_seq_len_0", "rope_original_max_seq_len", "0", "rope_original_max_seq_len is \"0\", expected a positive"),
    META("bos_id_out_of_range", "bos_id", "259", "bos_id is \"259\", expected a whole number from 0 to 258"),
    META("bos_id_negative", "bos_id", "-1", "bos_id is \"-1\", expected a whole number from 0 to 258"),
    META("bos_id_text", "bos_id", "none", "bos_id is \"none\", expected"),
    META("eos_ids_out_of_range", "eos_ids", "257,259", "eos_ids is \"257,259\", expected at most 16 ids below 259"),
    META("eos_ids_trailing_comma", "eos_ids", "257,", "eos_ids is \"257,\", expected"),
    META("eos_ids_leading_comma", "eos_ids", ",257", "eos_ids is \",257\", expected"),
    META("eos_ids_two_commas", "eos_ids", "256,,257", "expected at most 16 ids"),
    META("eos_ids_space", "eos_ids", "256 257", "expected at most 16 ids"),
    META("eos_ids_list", "eos_ids", "[257]", "expected at most 16 ids"),
    META("eos_ids_text", "eos_ids", "end", "expected at most 16 ids"),
    META("eos_ids_negative", "eos_ids", "-1", "expected at most 16 ids"),
    META("eos_ids_17", "eos_ids", "1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17", "expected at most 16 ids"),
    META("eos_ids_overflow", "eos_ids", "18446744073709551873", "expected at most 16 ids"),
    META("chat_format_unknown", "chat_format", "mistral", "chat_format is \"mistral\", expected one of: none, llama3, llama3.1, chatml, deepseek"),
    META("tie_embeddings_python", "tie_embeddings", "True", "tie_embeddings is \"True\", expected one of: false, true"),
    META("tie_embeddings_1", "tie_embeddings", "1", "tie_embeddings is \"1\", expected one of"),
    META("tie_embeddings_empty", "tie_embeddings", "", "tie_embeddings is \"\", expected one of"),
    // numbers that are none
    NORM("layers.0.attention_norm", "nan", "nan"),
    NORM("layers.0.ffn_norm", "nan", "nan"),
    NORM("norm", "nan", "nan"),
    NORM("layers.0.attention_norm", "inf", "inf"),
    NORM("layers.0.ffn_norm", "inf", "inf"),
    NORM("norm", "-inf", "-inf"),
    NAN_WEIGHT("output"),
    NAN_WEIGHT("layers.0.wq"),
    NAN_WEIGHT("layers.0.wk"),
    NAN_WEIGHT("layers.0.wv"),
    NAN_WEIGHT("layers.0.wo"),
    NAN_WEIGHT("layers.0.w1"),
    NAN_WEIGHT("layers.0.w2"),
    NAN_WEIGHT("layers.0.w3"),
    ELEMENT("nan_in_tok_embeddings", "tok_embeddings", "1569=nan", "position 3: logit 0 is "), // of 'b', the last of the prompt
    ELEMENT("inf_in_tok_embeddings", "tok_embeddings", "1569=inf", "position 3: logit "),
    ELEMENT("inf_in_output", "output", "1600=inf", "position 3: logit 100 is "),
    ELEMENT("inf_in_wv", "layers.0.wv", "5=-inf", "position 3: logit "),
    // the tokenizer's tables
    ELEMENT("offsets_begin_with_1", "tokenizer.offsets", "0=1", "tokenizer.offsets begins with 1, expected 0"),
    ELEMENT("offsets_end_early", "tokenizer.offsets", "259=295", "tokenizer.offsets ends with 295, tokenizer.bytes has"),
    ELEMENT("offsets_end_late", "tokenizer.offsets", "259=4294967295", "tokenizer.offsets ends with 4294967295, tokenizer.bytes has"),
    ELEMENT("offsets_decrease", "tokenizer.offsets", "100=90", "token 99 runs from 99 to 90 of"),
    ELEMENT("offsets_past_the_end", "tokenizer.offsets", "100=4294967295", "token 99 runs from 99 to 4294967295 of"),
    ELEMENT("offsets_past_the_end_by_1", "tokenizer.offsets", "258=299", "token 257 runs from 273 to 299 of 298 bytes"),
    ELEMENT("token_empty", "tokenizer.offsets", "66=65", "token 65 is empty"),
    ELEMENT("token_without_a_byte", "tokenizer.bytes", "65=66", "tokens 65 and 66 have the same bytes"),
    ELEMENT("kind_unknown", "tokenizer.kind", "7=4", "tokenizer.kind of token 7 is 4, expected 0 to 3"),
    ELEMENT("kind_255", "tokenizer.kind", "258=255", "tokenizer.kind of token 258 is 255, expected 0 to 3"),
    ELEMENT("mergeable_after_special", "tokenizer.kind", "258=0", ""),
    ELEMENT("mergeable_after_unused", "tokenizer.kind", "100=2", "mergeable token 101 after one that is not"),
    ELEMENT("single_byte_missing", "tokenizer.kind", "255=1", "no token for the single byte 0xFF"),
    {.name = "tokenizer_kind_shorter", .draft = shorten, .a = "tokenizer.kind", .b = "1", .fragment = "tensor tokenizer.kind: shape [258], expected [259]"},
    {.name = "tokenizer_offsets_shorter", .draft = shorten, .a = "tokenizer.offsets", .b = "1", .fragment = "tensor tokenizer.offsets: shape [259], expected [260]"},
    {.name = "tokenizer_bytes_shorter", .draft = shorten, .a = "tokenizer.bytes", .b = "1", .fragment = "tokenizer.offsets ends with"},
    {.name = "tokenizer_bytes_empty", .draft = shorten, .a = "tokenizer.bytes", .b = "298", .fragment = "tokenizer.offsets ends with"},
    {.name = "tokenizer_not_last", .draft = move_before, .a = "tokenizer.offsets", .b = "output", .fragment = "as the last three tensors"},
    {.name = "tokenizer_in_another_order", .draft = move_before, .a = "tokenizer.bytes", .b = "tokenizer.kind", .fragment = "as the last three tensors"},
};
// clang-format on
enum { N_CASES = sizeof cases / sizeof *cases };

static void run_case(const Case *c) {
    if (!test_wanted(c->name)) return;
    Draft d = good_draft();
    if (c->draft) c->draft(&d, c->a, c->b);
    File f = draft_file(&d);
    if (c->file) c->file(&f, c->a, c->b);
    const char *path = temporary("case.bin");
    write_file(path, f.bytes, f.n);
    Run r = run_program(NULL, path, "-p", "b b", "-n", "1", NULL); // BOS and three bytes: the last is position 3
    check_failure(&r, FAILED, c->fragment, NULL);
    if (r.status == FAILED && !strstr(c->fragment, "position") && !strstr(r.err, path))
        test_fail("the message \"%s\" does not name the file", shown(r.err, r.n_err));
    test_end(c->name);
    run_free(&r);
    file_free(&f);
    draft_free(&d);
}

// The unmodified model works: in each dtype, tied or not. Then the table proves something.
static void test_good_models(void) {
    static const char *const dtypes[] = {"F32", "BF16", "F16"};
    for (int i = 0; i < 3; i++)
        for (int tied = 0; tied < 2; tied++) {
            Shape s = tiny_shape;
            s.dtype = dtypes[i];
            s.tied = tied;
            Draft d;
            draft_tiny(&d, s, 42);
            draft_write(&d, temporary("good.bin"));
            Run r = run_program(NULL, temporary("good.bin"), "-p", "b b", "-n", "1", "--quiet", NULL);
            check_status(&r, 0);
            if (r.n_err) test_fail("--quiet, but on standard error: %s", shown(r.err, r.n_err));
            char name[64];
            snprintf(name, sizeof name, "good_model_%s%s", dtypes[i], tied ? "_tied" : "");
            test_end(name);
            run_free(&r);
            draft_free(&d);
        }
}

// What is unusual and allowed.
static void test_good_oddities(void) {
    static const Case odd[] = {
        META("good_no_bos", "bos_id", "", NULL),
        META("good_no_eos", "eos_ids", "", NULL),
        META("good_eos_ids_16", "eos_ids", "1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16", NULL),
        META("good_no_source", "source", NULL, NULL),
        META("good_converter_in_1", "converter", "2", NULL),
        META("good_format_2_without_anything_new", "format", "llama-model/2", NULL),
        META2("good_chat_bos_id_of_none", "chat_bos_id=", NULL),
        META2("good_chat_date", "chat_date=01 Feb 2025", NULL),
        META2("good_normalized_ids", "normalized_ids=256,258", NULL),
        META2("good_chatml", "chat_format=chatml", NULL),
        {.name = "good_chat_system_of_64_KiB", .draft = long_text, .a = "chat_system", .b = "65536"},
        META("good_norm_eps_0", "norm_eps", "0", NULL),
        META("good_rope_default_with_factors", "rope_type", "default", NULL),
        META("good_escaped_source", "source", "\\u00e9\\ud83d\\ude00\\n\\\"", NULL),
        ELEMENT("good_unused_token", "tokenizer.kind", "258=2", NULL),
        REPLACE("good_spaces_in_the_header", "\"dtype\":\"F32\",\"shape\":[259,16]",
                " \"shape\" : [ 259 , 16 ] ,\t\"dtype\"\r\n:\"F32\"", NULL),
    };
    for (size_t i = 0; i < sizeof odd / sizeof *odd; i++) {
        Draft d = good_draft();
        if (odd[i].draft) odd[i].draft(&d, odd[i].a, odd[i].b);
        File f = draft_file(&d);
        if (odd[i].file) odd[i].file(&f, odd[i].a, odd[i].b);
        write_file(temporary("good.bin"), f.bytes, f.n);
        Run r = run_program(NULL, temporary("good.bin"), "-p", "b b", "-n", "1", "--quiet", NULL);
        check_status(&r, 0);
        test_end(odd[i].name);
        run_free(&r);
        file_free(&f);
        draft_free(&d);
    }
}

// ---- cut off --------------------------------------------------------------------------------------------------------

static void test_cut(const char *name, const File *f, size_t n, const char *fragment) {
    char full[96];
    const char *path = temporary("cut.bin");
    snprintf(full, sizeof full, "truncated_in_%s", name);
    write_file(path, f->bytes, n);
    Run r = run_program(NULL, path, "-p", "b b", "-n", "1", NULL);
    check_failure(&r, FAILED, fragment, NULL);
    test_end(full);
    run_free(&r);
}

static void test_truncated(void) {
    Draft d = good_draft();
    File f = draft_file(&d);
    size_t start = 8 + file_header_length(&f), at = start;
    test_cut("nothing", &f, 0, "0 bytes long, expected");
    test_cut("length_field", &f, 4, "4 bytes long, expected");
    test_cut("length_field_by_1", &f, 7, "7 bytes long, expected");
    test_cut("header_at_0", &f, 8, "bytes, but the file ends after 0");
    test_cut("header", &f, start / 2, "bytes, but the file ends after");
    test_cut("header_by_1", &f, start - 1, "bytes, but the file ends after");
    test_cut("data_at_0", &f, start, "bytes 0 to 16576, the data has 0");
    for (int i = 0; i < d.n_parts; i++) {
        const Part *p = &d.parts[i];
        char fragment[128];
        snprintf(fragment, sizeof fragment, "tensor %s: bytes %zu to %zu, the data has %zu", p->name, at - start,
                 at - start + (size_t)p->n, at - start + (size_t)p->n / 2);
        test_cut(p->name, &f, at + p->n / 2, fragment);
        at += p->n;
    }
    test_cut("the_last_byte", &f, f.n - 1, "tensor tokenizer.bytes: bytes");
    file_free(&f);
    draft_free(&d);
}

// ---- other kinds of files -------------------------------------------------------------------------------------------

static void test_foreign(const char *name, const void *bytes, size_t n, const char *fragment, bool convert) {
    uint8_t *padded = must(calloc(4096, 1));
    memcpy(padded, bytes, n);
    write_file(temporary("foreign"), padded, 4096);
    free(padded);
    Run r = run_program(NULL, temporary("foreign"), "-p", "x", NULL);
    check_failure(&r, FAILED, fragment, NULL);
    if (convert && !strstr(r.err, CONVERT))
        test_fail("the message \"%s\" does not name " CONVERT, shown(r.err, r.n_err));
    test_end(name);
    run_free(&r);
}

static void test_other_kinds(void) {
    static const int32_t llama2c[7] = {288, 768, 6, 6, 6, 32000, 256}, untied[7] = {64, 172, 5, 8, 4, -512, 512};
    test_foreign("gguf", "GGUF\3\0\0\0\x23\1\0\0\0\0\0\0", 16, "a GGUF file", true);
    test_foreign("llama2c_bin", llama2c, sizeof llama2c, "llama2.c", true);
    test_foreign("llama2c_bin_untied", untied, sizeof untied, "llama2.c", true);
    test_foreign("llama2c_bin_with_magic", "24ka\2\0\0\0\0\1\0\0", 12, "llama2.c", true);
    test_foreign("pickle_2", "\x80\2}q\0(X\x0c\0\0\0layers.0", 19, "pickle", true);
    test_foreign("pickle_4", "\x80\4\x95\x1a\0\0\0\0\0\0\0}\x94", 13, "pickle", true);
    test_foreign("pickle_5", "\x80\5\x95\xff\1\2\0\0\0\0\0}\x94", 13, "pickle", true);
    test_foreign("zip", "PK\3\4\0\0\x08\x08\0\0\0\0", 12, "pickle", true);
    test_foreign("png", "\x89PNG\r\n\x1a\n\0\0\0\rIHDR", 16, "not a safetensors file", false);
    test_foreign("text", "Once upon a time, there was a file.", 35, "not a safetensors file", false);
    test_foreign("zeros", "", 0, "bad JSON at byte 0", false);

    static const struct {
        const char *name, *header;
    } huggingface[] = {
        {"huggingface_file", "{\"__metadata__\":{\"format\":\"pt\"},\"model.embed_tokens.weight\":{\"dtype\":\"U8\","
                             "\"shape\":[4],\"data_offsets\":[0,4]}}"},
        {"huggingface_file_without_metadata",
         "{\"lm_head.weight\":{\"dtype\":\"BF16\",\"shape\":[1,2],\"data_offsets\":[0,4]}}"},
    };
    for (int i = 0; i < 2; i++) {
        File f = file_make(huggingface[i].header, strlen(huggingface[i].header), 8, "1234", 4);
        write_file(temporary("foreign"), f.bytes, f.n);
        Run r = run_program(NULL, temporary("foreign"), "-p", "x", NULL);
        check_failure(&r, FAILED, CONVERT, NULL);
        test_end(huggingface[i].name);
        run_free(&r);
        file_free(&f);
    }
    File empty = file_make("{}", 2, 8, NULL, 0);
    write_file(temporary("foreign"), empty.bytes, empty.n);
    Run r = run_program(NULL, temporary("foreign"), "-p", "x", NULL);
    check_failure(&r, FAILED, CONVERT, NULL);
    test_end("empty_safetensors_file");
    run_free(&r);
    file_free(&empty);

    r = run_program(NULL, temporary("nowhere.bin"), "-p", "x", NULL);
    check_failure(&r, FAILED, "nowhere.bin: No such file or directory", NULL);
    test_end("missing_file");
    run_free(&r);
    r = run_program(NULL, test_dir, "-p", "x", NULL);
    check_failure(&r, FAILED, CONVERT, NULL);
    test_end("directory");
    run_free(&r);
    r = run_program(NULL, "/dev/null", "-p", "x", NULL);
    check_failure(&r, FAILED, "/dev/null: not a regular file", NULL);
    test_end("device");
    run_free(&r);
    r = run_program(NULL, "", "-p", "x", NULL);
    check_failure(&r, FAILED, "No such file or directory", NULL);
    test_end("empty_path");
    run_free(&r);
    if (geteuid() != 0) {
        write_file(temporary("secret.bin"), "x", 1);
        chmod(temporary("secret.bin"), 0);
        r = run_program(NULL, temporary("secret.bin"), "-p", "x", NULL);
        check_failure(&r, FAILED, "Permission denied", NULL);
        test_end("unreadable_file");
        run_free(&r);
    } else {
        test_skip("unreadable_file", "root may read every file");
    }
    // A newline in a name must not make two lines of the message.
    r = run_program(NULL, "no\nsuch\nfile", "-p", "x", NULL);
    check_failure(&r, FAILED, "No such file or directory", NULL);
    test_end("newline_in_the_path");
    run_free(&r);
    char longest[3000];
    memset(longest, 'x', sizeof longest - 1);
    longest[sizeof longest - 1] = 0;
    r = run_program(NULL, longest, "-p", "x", NULL);
    check_failure(&r, FAILED, "xxxxxxxx", NULL);
    test_end("long_path");
    run_free(&r);
}

// ---- the command line -----------------------------------------------------------------------------------------------

typedef struct {
    const char *name;
    const char *args; // separated by spaces; @model, @vocab, @dir, @prompt (five letters), @none (no such file), @empty
    int status;
    const char *fragment;
} FlagCase;

// clang-format off
static const FlagCase flag_cases[] = {
    {"no_arguments", "", USAGE, "no model"},
    {"no_model", "-p hello", USAGE, "no model"},
    {"two_models", "@model @model -p x", USAGE, "two models"},
    {"prompt_without_its_flag", "@model hello", USAGE, "two models"},
    {"unknown_flag", "@model -p x --frobnicate", USAGE, "unknown flag --frobnicate"},
    {"unknown_short_flag", "@model -p x -z", USAGE, "unknown flag -z"},
    {"a_single_dash", "@model -p x -", USAGE, "unknown flag -"},
    {"equals_after_a_short_flag", "@model -p x -n=1", USAGE, "-n=1: -n takes its value in the next argument: -n 1"},
    {"equals_after_a_switch", "@model -p x --json=yes", USAGE, "--json=yes: --json takes no value"},
    {"equals_after_a_switch_and_nothing", "@model -p x --json=", USAGE, "--json=: --json takes no value"},
    {"equals_and_a_bad_value", "@model -p x --temp=hot", USAGE, "--temp hot: expected a number"},
    {"equals_and_no_value", "@model -p x --temp=", USAGE, "--temp \"\": expected a number"},
    {"equals_after_an_unknown_flag", "@model -p x --frobnicate=1", USAGE, "unknown flag --frobnicate=1; --help lists them"},
    {"unknown_flag_near_one", "@model -p x --tmep 1", USAGE, "unknown flag --tmep; did you mean --temp?"},
    {"unknown_flag_near_an_alias", "@model -p x --n_predict=1", USAGE, "unknown flag --n_predict=1; did you mean --n-predict?"},
    {"unknown_flag_of_one_dash", "@model -p x -temp 1", USAGE, "unknown flag -temp; did you mean --temp?"},
    {"unknown_flag_of_capitals", "@model -p x --JSON", USAGE, "unknown flag --JSON; did you mean --json?"},
    {"unknown_short_flag_in_capitals", "@model -p x -N 1", USAGE, "unknown flag -N; did you mean -n?"},
    {"unknown_flag_that_begins_one", "@model -p x --detok", USAGE, "unknown flag --detok; did you mean --detokenize?"},
    {"unknown_flag_near_none", "@model -p x --frobnicate", USAGE, "unknown flag --frobnicate; --help lists them"},
    {"unknown_short_flag_near_none", "@model -p x -z", USAGE, "unknown flag -z; --help lists them"},
    {"unknown_flag_of_a_hundred_letters", "@model -p x --aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
     USAGE, "; --help lists them"},
    {"alias_without_value", "@model -p x --seed", USAGE, "--seed needs a value: SEED"},
    {"alias_with_a_bad_value", "@model -p x --temperature -1", USAGE, "--temperature -1: expected a number from 0"},
    {"two_models_one_with_a_flag", "@model -m @model -p x", USAGE, "two models"},
    {"two_models_after_dashes", "-p x -- @model @model", USAGE, "two models"},
    {"two_models_around_dashes", "@model -p x -- @model", USAGE, "two models"},
    {"no_model_after_dashes", "-p x --", USAGE, "no model"},
    {"a_flag_after_dashes", "-p x -- --verbose", FAILED, "--verbose: No such file"},
    {"m_without_value", "-p x -m", USAGE, "-m needs a value: FILE"},
    {"p_without_value", "@model -p", USAGE, "-p needs a value"},
    {"n_without_value", "@model -p x -n", USAGE, "-n needs a value"},
    {"compare_without_value", "@model --compare", USAGE, "--compare needs a value"},
    {"stop_without_value", "@model -p x --stop", USAGE, "--stop needs a value"},
    {"n_negative", "@model -p x -n -2", USAGE, "-n -2: expected a whole number from -1 to"},
    {"n_0_chat", "@model --chat -n 0", USAGE, "-n 0 with --chat: a conversation has answers"},
    {"n_0_prompt_longer_than_c", "@model -p abcdefgh -c 8 -n 0", FAILED, "the prompt has 9 tokens, the context holds 8 (-c)"},
    {"n_text", "@model -p x -n abc", USAGE, "-n abc: expected a whole number"},
    {"n_huge", "@model -p x -n 99999999999", USAGE, "-n 99999999999: expected a whole number from -1 to 2147483647"},
    {"n_2_64", "@model -p x -n 18446744073709551617", USAGE, "expected a whole number"},
    {"n_float", "@model -p x -n 1.5", USAGE, "-n 1.5: expected a whole number"},
    {"n_empty", "@model -p x -n @empty", USAGE, "expected a whole number"},
    {"n_unit", "@model -p x -n 10k", USAGE, "-n 10k: expected a whole number"},
    {"c_0", "@model -p x -c 0", USAGE, "-c 0: expected a whole number from 1 to"},
    {"c_negative", "@model -p x -c -128", USAGE, "-c -128: expected"},
    {"c_text", "@model -p x -c full", USAGE, "-c full: expected"},
    {"kv_memory_zero", "@model -p x --kv-memory 0", USAGE, "--kv-memory 0: expected a whole number of bytes from 1 on"},
    {"kv_memory_negative", "@model -p x --kv-memory -1", USAGE, "--kv-memory -1: expected a whole number of bytes"},
    {"kv_memory_suffix", "@model -p x --kv-memory 8T", USAGE, "--kv-memory 8T: expected a whole number of bytes"},
    {"kv_memory_after_suffix", "@model -p x --kv-memory 8GB", USAGE, "--kv-memory 8GB: expected a whole number"},
    {"kv_memory_huge", "@model -p x --kv-memory 18446744074G", USAGE, "expected a whole number of bytes"},
    {"kv_memory_of_no_number", "@model -p x --kv-memory G", USAGE, "--kv-memory G: expected a whole number"},
    {"gpus_zero", "@model -p x --gpus 0", USAGE, "--gpus 0: expected a whole number from 1 to 16"},
    {"gpus_too_many", "@model -p x --gpus 17", USAGE, "--gpus 17: expected a whole number from 1 to 16"},
    {"gpus_text", "@model -p x --gpus all", USAGE, "--gpus all: expected a whole number from 1 to 16"},
    {"gpus_on_engine_cpu", "@model -p x --gpus 2 --engine cpu", USAGE, "--gpus 2"},
    {"seed_negative", "@model -p x -s -1", USAGE, "-s -1: expected a whole number from 0 to 2^64-1"},
    {"seed_huge", "@model -p x -s 18446744073709551616", USAGE, "expected a whole number from 0 to 2^64-1"},
    {"seed_text", "@model -p x -s lucky", USAGE, "-s lucky: expected"},
    {"temp_negative", "@model -p x --temp -0.5", USAGE, "--temp -0.5: expected a number from 0"},
    {"temp_nan", "@model -p x --temp nan", USAGE, "--temp nan: expected a number"},
    {"temp_inf", "@model -p x --temp inf", USAGE, "--temp inf: expected a number"},
    {"temp_text", "@model -p x --temp hot", USAGE, "--temp hot: expected a number"},
    {"temp_empty", "@model -p x --temp @empty", USAGE, "expected a number"},
    {"top_k_negative", "@model -p x --top-k -1", USAGE, "--top-k -1: expected a whole number from 0"},
    {"top_p_above_1", "@model -p x --top-p 1.1", USAGE, "--top-p 1.1: expected a number from 0 to 1"},
    {"top_p_negative", "@model -p x --top-p -0.1", USAGE, "--top-p -0.1: expected a number from 0 to 1"},
    {"top_p_percent", "@model -p x --top-p 90%", USAGE, "--top-p 90%: expected a number from 0 to 1"},
    {"top_p_nan", "@model -p x --top-p nan", USAGE, "--top-p nan: expected a number from 0 to 1"},
    {"min_p_above_1", "@model -p x --min-p 2", USAGE, "--min-p 2: expected a number from 0 to 1"},
    {"stop_empty", "@model -p x --stop @empty", USAGE, "--stop: expected a text"},
    {"stop_17_times", "@model -p x --stop a --stop a --stop a --stop a --stop a --stop a --stop a --stop a --stop a --stop a --stop a --stop a --stop a --stop a --stop a --stop a --stop a",
     USAGE, "--stop: more than 16"},
    {"p_and_f", "@model -p x -f @prompt", USAGE, "-p and -f: expected one of them"},
    {"no_prompt", "@model", USAGE, "no prompt"},
    {"no_prompt_to_tokenize", "@model --tokenize", USAGE, "no prompt"},
    {"logprobs_without_json", "@model -p x --logprobs 5", USAGE, "--logprobs goes with --json"},
    {"logprobs_0", "@model -p x --json --logprobs 0", USAGE, "--logprobs 0: expected a whole number from 1"},
    {"logprobs_65", "@model -p x --json --logprobs 65", USAGE, "--logprobs 65: expected a whole number from 1 to 64"},
    {"engine_unknown", "@model -p x --engine nonsense", USAGE, "--engine nonsense"},
    {"precision_unknown", "@model -p x --precision f16", USAGE, "--precision f16: expected bf16, f32 or fp8"},
    {"fp8_products_of_engine_cpu", "@model -p x --precision fp8 --engine cpu", USAGE,
     "--precision fp8 goes with engines for GPUs, not with --engine cpu, which computes in float32 or bf16"},
    {"json_and_compare", "@model --compare @none --json", USAGE, "--json: --compare prints text only"},
    {"hex_and_json", "@model --detokenize -p 1 --hex --json", USAGE, "--hex and --json: expected one of them"},
    {"ids_and_tokenize", "@model --tokenize --ids -p 1", USAGE, "--ids goes with a prompt"},
    {"ids_and_prompts", "@model --prompts @none --ids", USAGE, "--ids goes with a prompt"},
    {"logprobs_and_tokenize", "@model --tokenize --json --logprobs 3 -p a", USAGE, "--logprobs goes with a prompt to continue, --chat or --prompts"},
    {"temperature_and_perplexity", "@model --perplexity @none --temperature 1", USAGE, "--temperature goes with generating text or --bench"},
    {"repetition_penalty_and_bench", "@model --bench --repetition-penalty 2", USAGE, "--repetition-penalty goes with generating text"},
    {"ignore_eos_and_perplexity", "@model --perplexity @none --ignore-eos", USAGE, "--ignore-eos goes with generating text"},
    {"echo_and_compare", "@model --compare @none --echo", USAGE, "--echo goes with a prompt to continue"},
    {"system_without_chat", "@model -p x --system y", USAGE, "--system goes with --chat or --prompts"},
    {"stop_and_compare", "@model --compare @none --stop a", USAGE, "--stop goes with generating text"},
    {"b_alone", "@model -p a -b 2", USAGE, "-b goes with --prompts or --bench"},
    {"b_zero", "@model --prompts @none -b 0", USAGE, "expected a whole number from 1 to 256"},
    {"echo_and_prompts", "@model --prompts @none --echo", USAGE, "--echo"},
    {"prompts_missing", "@model --prompts @none", FAILED, "No such file"},
    {"hex_alone", "@model -p 78 --hex", USAGE, "--hex goes with"},
    {"tokenize_and_detokenize", "@model -p x --tokenize --detokenize", USAGE, "expected one of them"},
    {"compare_and_perplexity", "@model --compare @prompt --perplexity @prompt", USAGE, "expected one of them"},
    {"compare_and_a_prompt", "@model -p x --compare @prompt", USAGE, "a prompt, which"},
    {"perplexity_and_a_prompt", "@model -p x --perplexity @prompt", USAGE, "a prompt, which"},
    {"synthetic_and_a_model", "@model --synthetic llama-3.2-1b --bench", USAGE, "expected one of them"},
    {"synthetic_unknown", "--synthetic llama-9 --bench", USAGE, "--synthetic llama-9: unknown shape, expected one of: llama-3.2-1b"},
    {"weights_unknown", "--synthetic llama-3.2-1b --bench --weights int5", USAGE, "--weights int5: expected one of: bf16, fp8, int8, "},
    {"weights_empty", "--synthetic llama-3.2-1b --bench --weights=", USAGE, "--weights \"\": expected one of: bf16, fp8, "},
    {"weights_of_a_file", "@model --bench --weights bf16", USAGE, "--weights goes with --synthetic"},
    {"output_weights_unknown", "--synthetic llama-3.2-1b --bench --output-weights bf16", USAGE, "--output-weights bf16: expected one of: fp8, "},
    {"output_weights_of_a_file", "@model --bench --output-weights int8", USAGE, "--output-weights goes with --quantize or --synthetic"},
    {"bench_and_a_prompt", "@model --bench -p x", USAGE, "a prompt, which"},
    {"bench_context_too_short", "@model --bench -c 64 --engine cpu", FAILED, "-c 64: --bench measures contexts from 128 on"},
    {"bench_context_above_the_model", "@model --bench -c 129", FAILED, "a context of 129 tokens, the model's maximum is 128"},
    {"prompt_file_missing", "@model -f @none", FAILED, "none: No such file or directory"},
    {"prompt_file_directory", "@model -f @dir", FAILED, "Is a directory"},
    {"perplexity_file_missing", "@model --perplexity @none", FAILED, "none: No such file or directory"},
    {"perplexity_file_directory", "@model --perplexity @dir", FAILED, "Is a directory"},
    {"perplexity_file_empty", "@model --perplexity /dev/null", FAILED, "1 tokens, expected at least 2"},
    {"perplexity_context_of_1", "@model --perplexity @prompt -c 1", FAILED, "-c 1: --perplexity needs a context of at least 2"},
    {"perplexity_context_too_large", "@model --perplexity @prompt -c 129", FAILED, "a context of 129 tokens, the model's maximum is 128"},
    {"ids_garbage", "@model --ids -p 1,2,three", FAILED, "id \"three\" at byte 4: expected whole numbers below 259"},
    {"ids_at_vocabulary", "@model --ids -p 258,259", FAILED, "id \"259\" at byte 4: expected whole numbers below 259"},
    {"ids_huge", "@model --ids -p 18446744073709551617", FAILED, "expected whole numbers below 259"},
    {"ids_negative", "@model --ids -p -1", FAILED, "id \"-1\" at byte 0: expected whole numbers below 259"},
    {"ids_float", "@model --ids -p 1.5", FAILED, "id \"1.5\" at byte 0: expected"},
    {"ids_hex", "@model --ids -p 0x10", FAILED, "expected whole numbers below 259"},
    {"ids_bracket_open", "@model --ids -p [1,2", FAILED, "id \"[1,2\" at byte 0: expected"},
    {"ids_bracket_closed", "@model --ids -p 1,2]", FAILED, "id \"2]\" at byte 2: expected"},
    {"ids_brackets_twice", "@model --ids -p [[1,2]]", FAILED, "id \"[1,2]\" at byte 1: expected"},
    {"ids_brackets_empty", "@model --ids -p []", FAILED, "the prompt is empty"},
    {"ids_empty", "@model --ids -p @empty", FAILED, "the prompt is empty"},
    {"ids_only_separators", "@model --ids -p ,,,", FAILED, "the prompt is empty"},
    {"detokenize_at_vocabulary", "@model --detokenize -p 259", FAILED, "expected whole numbers below 259"},
    {"detokenize_garbage", "@model --detokenize -p abc", FAILED, "id \"abc\" at byte 0: expected whole numbers below 259"},
    {"hex_odd_digits", "@model --tokenize --hex -p 616", FAILED, "--hex: line 1: 3 digits, expected an even number"},
    {"hex_no_digit", "@model --tokenize --hex -p 61zz", FAILED, "--hex: line 1: \"zz\" is no byte"},
    {"hex_half_a_digit", "@model --tokenize --hex -p 6g", FAILED, "--hex: line 1: \"6g\" is no byte"},
    {"prompt_longer_than_c", "@model -p abcdefgh -c 4", FAILED, "the prompt has 9 tokens, the context holds 4"},
    {"prompt_fills_c", "@model -p abc -c 4", FAILED, "the prompt has 4 tokens, the context holds 4"},
    {"prompt_of_1_in_1", "@model -p @empty -c 1", FAILED, "the prompt has 1 tokens, the context holds 1"},
    {"prompt_longer_than_the_model", "@model -f @long", FAILED, "the prompt has 201 tokens, the context holds 128"},
    {"c_above_the_model", "@model -p x -c 129", FAILED, "a context of 129 tokens, the model's maximum is 128"},
    {"stride_without_perplexity", "@model -p x --stride 5", USAGE, "--stride goes with --perplexity"},
    {"windows_without_perplexity", "@model -p x --perplexity-windows half", USAGE, "--perplexity-windows goes with --perplexity"},
    {"windows_of_no_kind", "@model --perplexity @prompt --perplexity-windows all", USAGE, "--perplexity-windows all: expected sliding or half"},
    {"windows_with_a_stride", "@model --perplexity @prompt --perplexity-windows half --stride 4", USAGE, "--stride goes with sliding windows"},
    {"windows_of_two", "@model --perplexity @prompt --perplexity-windows half -c 2", FAILED, "-c 2: --perplexity needs a context of at least 3"},
    {"windows_longer_than_the_text", "@model --perplexity @prompt --perplexity-windows half -c 64", FAILED, " tokens, expected at least 64: one full window"},
    {"perplexity_of_no_ids", "@model --perplexity @prompt --ids", FAILED, "expected whole numbers below"},
    {"stride_0", "@model --perplexity @prompt --stride 0", USAGE, "--stride 0: expected a whole number from 1"},
    {"stride_of_the_context", "@model --perplexity @prompt --stride 64 -c 64", FAILED, "--stride 64: expected below the context of 64"},
    {"date_without_chat", "@model -p x --date today", USAGE, "--date goes with --chat or --prompts"},
    {"chat_and_prompts_tokenized", "@model --chat --tokenize --prompts @prompt", USAGE, "expected one of them"},
    {"prompts_tokenized_and_a_prompt", "@model --tokenize --prompts @prompt -p x", USAGE, "a prompt, which"},
    {"prompts_in_hex", "@model --tokenize --hex --prompts @prompt", USAGE, "--hex goes with"},
    {"chat_and_json_without_a_message", "@model --chat --json", USAGE, "--json with --chat: expected one message"},
    {"chat_tokenized_without_a_message", "@model --chat --tokenize", USAGE, "no prompt"},
    {"c_far_above_the_model", "@model -p x -c 2147483647", FAILED, "a context of 2147483647 tokens, the model's maximum is 128"},
    {"vocabulary_asked_to_generate", "@vocab -p x", FAILED, "a vocabulary without weights"},
    {"vocabulary_asked_for_perplexity", "@vocab --perplexity @prompt", FAILED, "a vocabulary without weights"},
    {"vocabulary_asked_to_compare", "@vocab --compare @prompt", FAILED, "a vocabulary without weights"},
    {"vocabulary_asked_to_bench", "@vocab --bench", FAILED, "a vocabulary without weights"},
    {"dump_missing", "@model --compare @none", FAILED, "none: No such file or directory"},
    {"dump_directory", "@model --compare @dir", FAILED, "a directory, expected a file; dumps come from: python3 scripts/dump_hf.py"},
    {"dump_text", "@model --compare @prompt", FAILED, "5 bytes long, expected"},
    {"dump_is_a_model", "@model --compare @model", FAILED, "format is \"llama-model/1\", expected \"hf-greedy-dump/1\""},
};
// clang-format on

// Splits args at spaces and puts paths in; owns nothing but static memory.
static const char *const *expand(const char *args) {
    static char text[1024];
    static const char *list[MAX_ARGS + 1];
    static const char *const names[] = {"@model", "@vocab", "@prompt", "@none", "@long", "@dump"};
    static char paths[6][300];
    int n = 0;
    snprintf(text, sizeof text, "%s", args);
    for (char *word = strtok(text, " "); word && n < MAX_ARGS; word = strtok(NULL, " ")) {
        list[n] = strcmp(word, "@dir") == 0 ? test_dir : strcmp(word, "@empty") == 0 ? "" : word;
        for (int i = 0; i < 6; i++)
            if (strcmp(word, names[i]) == 0) {
                snprintf(paths[i], sizeof paths[i], "%s/%s", test_dir, names[i] + 1);
                list[n] = paths[i];
            }
        n++;
    }
    list[n] = NULL;
    return list;
}

static void test_flags(void) {
    for (size_t i = 0; i < sizeof flag_cases / sizeof *flag_cases; i++) {
        Run r = run_args(NULL, expand(flag_cases[i].args));
        check_failure(&r, flag_cases[i].status, flag_cases[i].fragment, NULL);
        test_end(flag_cases[i].name);
        run_free(&r);
    }
    // What no command line can hold: NUL bytes, by a file.
    static const struct {
        const char *name, *args, *fragment;
        const char *input;
        size_t n;
    } inputs[] = {
        {"ids_with_nul", "@model --ids -f -", "id \"", "1\0002", 3},
        {"hex_with_nul", "@model --tokenize --hex -f -", "is no byte", "61\0\000", 4},
        {"hex_second_line_odd", "@vocab --tokenize --hex -f -", "--hex: line 2: 1 digits, expected an even number",
         "\n6", 2},
    };
    for (size_t i = 0; i < sizeof inputs / sizeof *inputs; i++) {
        Io io = {.input = inputs[i].input, .n_input = inputs[i].n};
        Run r = run_args(&io, expand(inputs[i].args));
        const char *printed = r.n_out ? r.out : NULL; // the lines before the bad one may have been printed
        check_failure(&r, FAILED, inputs[i].fragment, printed);
        test_end(inputs[i].name);
        run_free(&r);
    }
}

// ---- dumps ----------------------------------------------------------------------------------------------------------

// clang-format off
#define DUMP(test, edit, first, second, message) {.name = "dump_" test, .draft = edit, .a = first, .b = second, .fragment = message}

static const Case dump_cases[] = {
    DUMP("without_format", draft_meta, "format", NULL, "expected \"hf-greedy-dump/1\""),
    DUMP("of_version_2", draft_meta, "format", "hf-greedy-dump/2", "format is \"hf-greedy-dump/2\", expected \"hf-greedy-dump/1\""),
    DUMP("without_dtype", draft_meta, "dtype", NULL, "metadata has no dtype"),
    DUMP("without_prompts", draft_meta, "prompts", NULL, "metadata has no prompts"),
    DUMP("prompts_no_json", draft_meta, "prompts", "hello", "bad JSON"),
    DUMP("prompts_no_list", draft_meta, "prompts", "\\\"ab\\\"", "expected '['"),
    DUMP("prompts_numbers", draft_meta, "prompts", "[1]", "expected a string"),
    DUMP("prompts_open", draft_meta, "prompts", "[\\\"ab\\\"", "expected ']'"),
    DUMP("prompts_two", draft_meta, "prompts", "[\\\"ab\\\", null]", "2 prompts in the metadata, 1 in the tensors"),
    DUMP("prompts_none", draft_meta, "prompts", "[]", "expected a string"),
    DUMP("noise_text", draft_meta, "noise", "loud", "noise is \"loud\", expected a number"),
    DUMP("noise_negative", draft_meta, "noise", "-1e-5", "noise is \"-1e-5\", expected"),
    DUMP("noise_nan", draft_meta, "noise", "nan", "noise is \"nan\", expected"),
    DUMP("noise_inf", draft_meta, "noise", "inf", "noise is \"inf\", expected"),
    DUMP("noise_empty", draft_meta, "noise", "", "noise is \"\", expected"),
    DUMP("without_tokens", drop_tensor, "tokens.0", NULL, "4 tensors, expected five for each prompt"),
    DUMP("surplus_tensor", add_tensor, "hidden.0", "tokens.0", "6 tensors, expected five for each prompt"),
    DUMP("empty", no_tensors, NULL, NULL, "0 tensors, expected five for each prompt"),
    DUMP("another_name", rename_tensor, "top_ids.0", "ids.0", "no tensor top_ids.0"),
    DUMP("prompts_from_1", rename_tensor, "tokens.0", "tokens.1", "no tensor tokens.0"),
    DUMP("tokens_fewer", shorten, "tokens.0", "1", "tensor top_ids.0"),
    DUMP("no_tokens", shorten, "tokens.0", "8", "tensor top_ids.0"),
    DUMP("tokens_2d", reshape, "tokens.0", "4,2", "tensor tokens.0: I32 with 2 dimensions, [4, 2], expected I32 [-1"),
    DUMP("tokens_F32", rename_dtype, "tokens.0", "F32", "tensor tokens.0: F32"),
    DUMP("tokens_U32", rename_dtype, "tokens.0", "U32", "tensor tokens.0: U32"),
    DUMP("no_prompt_ids", shorten, "prompt_ids.0", "3", "prompt 0: 0 ids, 8 tokens, 2 rows"),
    DUMP("top_ids_shape", reshape, "top_ids.0", "5,8", "tensor top_ids.0: I32 with 2 dimensions, [5, 8], expected I32 [8, 5]"),
    DUMP("top_logits_flat", reshape, "top_logits.0", "40", "tensor top_logits.0: F32 with 1 dimensions"),
    DUMP("logits_of_another_vocabulary", reshape, "logits.0", "1,518", "tensor logits.0: F32 with 2 dimensions, [1, 518], expected"),
    DUMP("logits_transposed", reshape, "logits.0", "259,2", "tensor logits.0: F32 with 2 dimensions, [259, 2], expected"),
    DUMP("prompt_id_at_vocabulary", set_element, "prompt_ids.0", "1=259", "prompt_ids.0: id 259, expected below the model's vocabulary of 259"),
    DUMP("prompt_id_negative", set_element, "prompt_ids.0", "1=-1", "prompt_ids.0: id -1, expected"),
    DUMP("token_at_vocabulary", set_element, "tokens.0", "7=259", "tokens.0: id 259, expected"),
    DUMP("token_lowest", set_element, "tokens.0", "7=-2147483648", "tokens.0: id -2147483648, expected"),
    DUMP("top_id_at_vocabulary", set_element, "top_ids.0", "39=1000000", "top_ids.0: id 1000000, expected"),
    DUMP("top_logits_ascending", set_element, "top_logits.0", "35=-100", "top_logits.0"),
    DUMP("nan_in_logits", set_element, "logits.0", "300=nan", "logits.0 has a number that is not finite"),
    DUMP("inf_in_logits", set_element, "logits.0", "517=inf", "logits.0 has a number that is not finite"),
    DUMP("nan_in_top_logits", set_element, "top_logits.0", "39=nan", "top_logits.0 has a number that is not finite"),
};
// clang-format on

static void test_dumps(void) {
    Script script;
    Draft model, dump;
    script_alphabet(&script);
    draft_script(&model, &script, 16, 128);
    draft_write(&model, temporary("script.bin"));
    for (size_t i = 0; i < sizeof dump_cases / sizeof *dump_cases; i++) {
        const Case *c = &dump_cases[i];
        draft_dump(&dump, &script, 8);
        c->draft(&dump, c->a, c->b);
        draft_write(&dump, temporary("dump"));
        Run r = run_program(NULL, temporary("script.bin"), "--compare", temporary("dump"), "--precision", "f32", NULL);
        check_failure(&r, FAILED, c->fragment, NULL);
        test_end(c->name);
        run_free(&r);
        draft_free(&dump);
    }
    // A whole dump works, one cut off does not.
    draft_dump(&dump, &script, 8);
    File f = draft_file(&dump);
    write_file(temporary("dump"), f.bytes, f.n);
    Run r = run_program(NULL, temporary("script.bin"), "--compare", temporary("dump"), "--precision", "f32", "--quiet",
                        NULL);
    check_status(&r, 0);
    test_end("good_dump");
    run_free(&r);
    r = run_program(NULL, temporary("script.bin"), "--compare", temporary("dump"), "-c", "10", NULL);
    check_failure(&r, FAILED, "-c 10: ", NULL);
    test_end("dump_longer_than_c");
    run_free(&r);
    for (int i = 1; i < 5; i++) {
        write_file(temporary("dump"), f.bytes, f.n * (size_t)i / 5);
        r = run_program(NULL, temporary("script.bin"), "--compare", temporary("dump"), NULL);
        check_failure(&r, FAILED, "dump: ", NULL);
        char name[64];
        snprintf(name, sizeof name, "dump_truncated_at_%d_percent", 20 * i);
        test_end(name);
        run_free(&r);
    }
    draft_free(&dump);
    // Too long for the model, of another model.
    draft_dump(&dump, &script, 126);
    draft_write(&dump, temporary("dump"));
    r = run_program(NULL, temporary("script.bin"), "--compare", temporary("dump"), NULL);
    check_failure(&r, FAILED, "a context of 129 tokens, the model's maximum is 128", NULL);
    test_end("dump_longer_than_the_model");
    run_free(&r);
    draft_free(&dump);
    file_free(&f);
    draft_free(&model);
}

// A weight that is no number shows where the text reaches it: what came before is printed.
static void test_nan_in_mid_text(void) {
    Script script;
    Draft model;
    script_alphabet(&script);
    draft_script(&model, &script, 16, 128);
    script.embeddings['f' * SCRIPT_DIM + 5] = NAN;
    draft_write(&model, temporary("script.bin"));
    Run r = run_program(NULL, temporary("script.bin"), "-p", "ab", "-n", "20", NULL);
    check_failure(&r, FAILED, "position 6: logit 0 is ", "cdef");
    test_end("nan_in_mid_text");
    run_free(&r);
    r = run_program(NULL, temporary("script.bin"), "-p", "ab", "-n", "20", "--json", NULL);
    check_failure(&r, FAILED, "position 6: logit 0 is ", NULL);
    test_end("nan_in_mid_text_json");
    run_free(&r);
    Draft dump;
    script.embeddings['f' * SCRIPT_DIM + 5] = 1;
    draft_dump(&dump, &script, 8);
    draft_write(&dump, temporary("dump"));
    r = run_program(NULL, temporary("script.bin"), "--compare", temporary("dump"), NULL);
    check_failure(&r, FAILED, "prompt 0, position ", NULL);
    test_end("nan_in_a_comparison");
    run_free(&r);
    write_file(temporary("text"), "abcdefgh", 8);
    r = run_program(NULL, temporary("script.bin"), "--perplexity", temporary("text"), NULL);
    check_failure(&r, FAILED, ": the logits are not finite", NULL);
    test_end("nan_in_perplexity");
    run_free(&r);
    draft_free(&dump);
    draft_free(&model);
}

// ---- output ---------------------------------------------------------------------------------------------------------

static void test_output_failures(void) {
    static const struct {
        const char *name, *args;
    } outputs[] = {
        {"text", "@model -p b -n 5 --ignore-eos"},
        {"echo", "@model -p b -n 1 --echo"},
        {"json", "@model -p b -n 5 --json"},
        {"tokenize", "@model -p hello --tokenize"},
        {"detokenize", "@model -p 65,66 --detokenize"},
        {"detokenize_hex", "@vocab -p 65,66 --detokenize --hex"},
        {"perplexity", "@model --perplexity @prompt"},
        {"compare", "@model --compare @dump"},
        {"help", "--help"},
        {"version", "--version"},
    };
    static const struct {
        const char *name, *fragment;
        StdoutKind kind;
    } kinds[] = {{"full_disk", "standard output: No space left on device", STDOUT_FULL},
                 {"closed_pipe", "standard output: Broken pipe", STDOUT_NO_READER},
                 {"closed_stdout", "standard output: Bad file descriptor", STDOUT_CLOSED}};
    for (size_t k = 0; k < sizeof kinds / sizeof *kinds; k++)
        for (size_t i = 0; i < sizeof outputs / sizeof *outputs; i++) {
            char name[64];
            snprintf(name, sizeof name, "%s_%s", kinds[k].name, outputs[i].name);
            if (kinds[k].kind == STDOUT_FULL && access("/dev/full", W_OK) != 0) {
                test_skip(name, "no /dev/full");
                continue;
            }
            Io io = {.out = kinds[k].kind};
            Run r = run_args(&io, expand(outputs[i].args));
            check_failure(&r, FAILED, kinds[k].fragment, NULL);
            test_end(name);
            run_free(&r);
        }

    // No standard input: what is opened after that must not be taken for it.
    static const char *const inputs[] = {"@model -p -", "@model --perplexity -", "@model --prompts -"};
    for (size_t i = 0; i < sizeof inputs / sizeof *inputs; i++) {
        Run r = run_args(&(Io){.input_closed = true}, expand(inputs[i]));
        check_failure(&r, FAILED, "standard input: Bad file descriptor", NULL);
        char name[64];
        snprintf(name, sizeof name, "closed_stdin%s", strchr(inputs[i], ' '));
        test_end(name);
        run_free(&r);
    }
}

static void test_out_of_memory(void) {
    if (SANITIZED) {
        test_skip("out_of_memory", "a sanitizer needs the address space");
        return;
    }
    Shape s = tiny_shape;
    s.max_seq_len = 1 << 30;
    Draft d;
    draft_tiny(&d, s, 1);
    draft_write(&d, temporary("long.bin"));
    Io io = {.memory = (size_t)2 << 30};
    Run r = run_program(&io, temporary("long.bin"), "-p", "b", "-n", "1", "-c", "1073741824", NULL);
    check_failure(&r, FAILED, "out of memory: ", NULL);
    test_end("out_of_memory");
    run_free(&r);
    draft_free(&d);
}

int main(void) {
    program_setup();
    Draft d = good_draft();
    draft_write(&d, temporary("model"));
    draft_vocab_only(&d);
    draft_write(&d, temporary("vocab"));
    draft_free(&d);
    char text[201];
    memset(text, 'b', sizeof text);
    write_file(temporary("prompt"), "hello", 5);
    write_file(temporary("long"), text, 200);

    test_good_models();
    test_good_oddities();
    for (int i = 0; i < N_CASES; i++) run_case(&cases[i]);
    test_truncated();
    test_other_kinds();
    test_flags();
    test_dumps();
    test_nan_in_mid_text();
    test_output_failures();
    test_out_of_memory();
    return tests_summary();
}
