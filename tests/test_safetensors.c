// The JSON parser and the reader of safetensors files: what is right is read, everything else is refused with its
// message.
#include "../model/file/safetensors.h"

#include <sys/stat.h>
#include <unistd.h>

#include "../model/file/json.h"
#include "check.h"

#define CURE "what to do about it"

#define LENGTH(array) ((int)(sizeof(array) / sizeof *(array)))
#define TEXT(literal) literal, sizeof(literal) - 1 // with any NUL inside

// ---- JSON -----------------------------------------------------------------------------------------------------------

typedef struct {
    Json json;
    Error err;
} Parse;

// Over a copy of just that size: the sanitizers see a byte read too many.
static void parse_begin(Parse *p, const char *text, size_t n) {
    p->err.text[0] = 0;
    char *copy = malloc(n ? n : 1);
    memcpy(copy, text, n);
    p->json = (Json){copy, copy, copy + n, &p->err, "text"};
}

static void parse_end(Parse *p) {
    free(p->json.start);
}

static void test_json_strings(void) {
    static const struct {
        const char *json;
        size_t n_json;
        const char *text;
    } rows[] = {
        {TEXT("\"\""), ""},
        {TEXT("\"plain\""), "plain"},
        {TEXT(" \t\r\n\"after space\""), "after space"},
        {TEXT("\"\\\"\\\\\\/\\b\\f\\n\\r\\t\""), "\"\\/\b\f\n\r\t"},
        {TEXT("\"\\u0041\\u00e9\\u20AC\\uFFFF\\u0001\""), "A\xC3\xA9\xE2\x82\xAC\xEF\xBF\xBF\x01"},
        {TEXT("\"\\uD83D\\uDE00\""), "\xF0\x9F\x98\x80"},
        {TEXT("\"\\ud800\\udc00\\udbff\\udfff\""), "\xF0\x90\x80\x80\xF4\x8F\xBF\xBF"},
        {TEXT("\"a\\u0062c\\nd\""), "abc\nd"},
        {TEXT("\"\xC3\xA9\xE4\xB8\x96\xF0\x9F\x98\x80\x7F\""), "\xC3\xA9\xE4\xB8\x96\xF0\x9F\x98\x80\x7F"},
        {TEXT("\"\\\\u0041\""), "\\u0041"},
        {TEXT("\"{}[]:,\""), "{}[]:,"},
    };
    for (int i = 0; i < LENGTH(rows); i++) {
        Parse p;
        parse_begin(&p, rows[i].json, rows[i].n_json);
        char *text = NULL;
        size_t n = 0;
        if (!json_string(&p.json, &text, &n) || !json_end(&p.json))
            test_fail("%s: %s", rows[i].json, p.err.text);
        else if (n != strlen(rows[i].text) || memcmp(text, rows[i].text, n + 1) != 0)
            test_fail("%s is \"%s\"", rows[i].json, text);
        parse_end(&p);
    }
    test_end("test_json_strings_with_every_escape");
}

static void test_json_bad_strings(void) {
    static const struct {
        const char *json;
        size_t n_json;
        const char *message;
    } rows[] = {
        {TEXT(""), "byte 0: expected a string"},
        {TEXT("  x"), "byte 2: expected a string"},
        {TEXT("'a'"), "expected a string"},
        {TEXT("\""), "byte 1: expected the end of the string"},
        {TEXT("\"abc"), "byte 4: expected the end of the string"},
        {TEXT("\"abc\\\""), "expected the end of the string"},
        {TEXT("\"a\nb\""), "byte 2: expected no control character"},
        {TEXT("\"\x1F\""), "expected no control character"},
        {TEXT("\"a\0b\""), "byte 2: expected no control character"},
        {TEXT("\"\\u0000\""), "expected a character other than NUL and lone surrogates"},
        {TEXT("\"\\uDE00\""), "expected a character other than NUL and lone surrogates"},
        {TEXT("\"\\uDC00\\uD800\""), "expected a character other than NUL and lone surrogates"},
        {TEXT("\"\\uD83D\""), "expected a low surrogate"},
        {TEXT("\"\\uD83D\\n\""), "expected a low surrogate"},
        {TEXT("\"\\uD83Dx\\uDE00\""), "expected a low surrogate"},
        {TEXT("\"\\uD83D\\u0041\""), "expected a low surrogate"},
        {TEXT("\"\\uD83D\\uD83D\""), "expected a low surrogate"},
        {TEXT("\"\\uD83D\\"), "expected a low surrogate"},
        {TEXT("\"\\uD83D\\uDE"), "expected four hex digits"},
        {TEXT("\"\\u12"), "expected four hex digits"},
        {TEXT("\"\\u12\""), "expected four hex digits"},
        {TEXT("\"\\u12G4\""), "expected four hex digits"},
        {TEXT("\"\\u+123\""), "expected four hex digits"},
        {TEXT("\"\\u 123\""), "expected four hex digits"},
        {TEXT("\"\\x41\""), "expected an escape"},
        {TEXT("\"\\'\""), "expected an escape"},
        {TEXT("\"\\U0041\""), "expected an escape"},
        {TEXT("\"\\\0\""), "expected an escape"},
        {TEXT("\"\\"), "expected an escape"},
        {TEXT("\"\xFF\""), "byte 1: expected UTF-8"},
        {TEXT("\"\x80\""), "expected UTF-8"},
        {TEXT("\"\xC0\x80\""), "expected UTF-8"},
        {TEXT("\"\xE0\x80\x80\""), "expected UTF-8"},
        {TEXT("\"\xED\xA0\x80\""), "expected UTF-8"},
        {TEXT("\"\xF4\x90\x80\x80\""), "expected UTF-8"},
        {TEXT("\"\xE2\x82\""), "expected UTF-8"},
        {TEXT("\"\xE2\x82"), "expected UTF-8"},
    };
    for (int i = 0; i < LENGTH(rows); i++) {
        Parse p;
        parse_begin(&p, rows[i].json, rows[i].n_json);
        char *text;
        size_t n;
        if (json_string(&p.json, &text, &n))
            test_fail("row %d, %s, is \"%s\"", i, rows[i].json, text);
        else if (!strstr(p.err.text, "text: bad JSON at byte ") || !strstr(p.err.text, rows[i].message))
            test_fail("row %d, %s: \"%s\", expected: %s", i, rows[i].json, p.err.text, rows[i].message);
        parse_end(&p);
    }
    test_end("test_json_bad_strings_are_refused");
}

static void test_json_numbers(void) {
    static const struct {
        const char *json;
        uint64_t value;
        const char *message; // NULL: it is right
    } rows[] = {
        {"0", 0, NULL},
        {"7", 7, NULL},
        {" \n42 ", 42, NULL},
        {"4294967296", 4294967296u, NULL},
        {"18446744073709551615", UINT64_MAX, NULL},
        {"18446744073709551616", 0, "expected a number below 2^64"},
        {"18446744073709551620", 0, "expected a number below 2^64"},
        {"99999999999999999999999", 0, "expected a number below 2^64"},
        {"00", 0, "expected a whole number"},
        {"007", 0, "expected a whole number"},
        {"-1", 0, "expected a whole number"},
        {"-0", 0, "expected a whole number"},
        {"+1", 0, "expected a whole number"},
        {"1.0", 0, "expected a whole number"},
        {"1.", 0, "expected a whole number"},
        {".5", 0, "expected a whole number"},
        {"1e3", 0, "expected a whole number"},
        {"1E3", 0, "expected a whole number"},
        {"", 0, "byte 0: expected a whole number"},
        {"  ", 0, "byte 2: expected a whole number"},
        {"x", 0, "expected a whole number"},
        {"\"1\"", 0, "expected a whole number"},
        {"0x10", 0, "byte 1: expected the end"},
        {"1 2", 0, "byte 2: expected the end"},
        {"1,", 0, "expected the end"},
    };
    for (int i = 0; i < LENGTH(rows); i++) {
        Parse p;
        parse_begin(&p, rows[i].json, strlen(rows[i].json));
        uint64_t value = 12345;
        bool ok = json_uint(&p.json, &value) && json_end(&p.json);
        if (ok != !rows[i].message || (ok && value != rows[i].value))
            test_fail("%s: %s, %llu", rows[i].json, ok ? "accepted" : p.err.text, (unsigned long long)value);
        if (!ok && rows[i].message && !strstr(p.err.text, rows[i].message))
            test_fail("%s: \"%s\", expected: %s", rows[i].json, p.err.text, rows[i].message);
        parse_end(&p);
    }
    test_end("test_json_numbers_are_whole_and_below_2_to_the_64");
}

static void test_json_steps(void) {
    Parse p;
    parse_begin(&p, TEXT(" { \"a\" : [1 ,\t2], \"b\":null } \n"));
    char *text;
    size_t n;
    uint64_t v;
    CHECK(!json_next(&p.json, '[') && json_next(&p.json, '{') && json_string(&p.json, &text, &n) &&
          strcmp(text, "a") == 0);
    CHECK(json_expect(&p.json, ':') && json_expect(&p.json, '[') && json_uint(&p.json, &v) && v == 1);
    CHECK(json_next(&p.json, ',') && json_uint(&p.json, &v) && v == 2 && !json_next(&p.json, ',') &&
          json_next(&p.json, ']'));
    CHECK(!json_null(&p.json) && json_next(&p.json, ',') && json_string(&p.json, &text, &n) &&
          json_expect(&p.json, ':'));
    CHECK(json_null(&p.json) && json_expect(&p.json, '}') && json_end(&p.json) && p.err.text[0] == 0);
    parse_end(&p);

    parse_begin(&p, TEXT("nul"));
    CHECK(!json_null(&p.json) && !p.err.text[0]); // only a question
    parse_end(&p);
    test_end("test_json_steps_over_white_space");

    parse_begin(&p, TEXT("[1]"));
    CHECK(!json_expect(&p.json, '{'));
    CHECK(strcmp(p.err.text, "text: bad JSON at byte 0: expected '{'") == 0);
    char first[512];
    strcpy(first, p.err.text);
    CHECK(!json_next(&p.json, '[') && !json_expect(&p.json, '[') && !json_uint(&p.json, &v) && !json_null(&p.json));
    CHECK(!json_string(&p.json, &text, &n) && !json_end(&p.json) && strcmp(p.err.text, first) == 0);
    parse_end(&p);
    test_end("test_json_first_failure_stays");
}

// ---- files ----------------------------------------------------------------------------------------------------------

static char directory[256], path[300];

static void write_bytes(const void *data, size_t n) {
    unlink(
        path); // a new file each time: some file systems put one that was emptied and written again on the disk at once
    FILE *f = fopen(path, "wb");
    if (!f || fwrite(data, 1, n, f) != n) test_fail("cannot write %s", path);
    if (f) fclose(f);
}

// Length, header, then so many bytes of data: 0, 1, 2, …
static void write_file(const char *header, size_t n_header, size_t n_data) {
    uint8_t *file = malloc(8 + n_header + n_data);
    for (int i = 0; i < 8; i++) file[i] = (uint8_t)((uint64_t)n_header >> 8 * i);
    memcpy(file + 8, header, n_header);
    for (size_t i = 0; i < n_data; i++) file[8 + n_header + i] = (uint8_t)i;
    write_bytes(file, 8 + n_header + n_data);
    free(file);
}

static void check_refused(const char *what, const char *message) {
    SafeTensors st;
    Error err = {""};
    if (safetensors_open(&st, path, CURE, &err)) {
        test_fail("%s: accepted, expected: %s", what, message);
        safetensors_close(&st);
    } else {
        if (strncmp(err.text, path, strlen(path)) != 0 || !strstr(err.text, message))
            test_fail("%s: \"%s\", expected: %s", what, err.text, message);
        CHECK(st.fd == -1 && !st.header && !st.tensors && !st.by_name && !st.meta);
    }
}

static void test_open_reads_a_header(void) {
    // In no order, padded, with white space, keys in any order, an empty tensor, a scalar and an escaped name.
    static const char header[] = "{ \"b\" : {\"data_offsets\":[4, 16],\"shape\":[2,3],\"dtype\":\"BF16\"},\n"
                                 " \"__metadata__\":{\"z\":\"last\",\"format\":\"x\\u0031\",\"empty\":\"\"},"
                                 "\"none\":{\"dtype\":\"U8\",\"shape\":[0,5],\"data_offsets\":[16,16]},"
                                 "\"d\\u00e9\":{\"dtype\":\"F16\",\"shape\":[1,1,2,1],\"data_offsets\":[17,21]},"
                                 "\"a\":{\"dtype\":\"F32\",\"shape\":[],\"data_offsets\":[0,4]},"
                                 "\"c\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[16,17]},"
                                 "\"i\":{\"dtype\":\"I32\",\"shape\":[1],\"data_offsets\":[21,25]},"
                                 "\"u\":{\"dtype\":\"U32\",\"shape\":[1],\"data_offsets\":[25,29]}}     ";
    static const char *const in_order[] = {"a", "b", "none", "c", "d\xC3\xA9", "i", "u"};
    write_file(TEXT(header), 29);
    SafeTensors st;
    Error err = {""};
    if (safetensors_open(&st, path, CURE, &err)) {
        CHECK(st.n_tensors == 7 && st.n_meta == 3 && st.data_bytes == 29 && st.data_start == 8 + sizeof header - 1);
        for (int i = 0; i < LENGTH(in_order); i++) {
            const Tensor *t = safetensors_find(&st, in_order[i]);
            CHECK(t == &st.tensors[i] && strcmp(t->name, in_order[i]) == 0);
        }
        const Tensor *b = safetensors_find(&st, "b");
        CHECK(b && b->dtype == DTYPE_BF16 && b->n_dims == 2 && b->shape[0] == 2 && b->shape[1] == 3 && b->begin == 4 &&
              b->end == 16);
        CHECK(st.tensors[0].n_dims == 0 && st.tensors[4].n_dims == 4 && st.tensors[4].dtype == DTYPE_F16);
        CHECK(!safetensors_find(&st, "e") && !safetensors_find(&st, "") && !safetensors_find(&st, "__metadata__"));
        CHECK(strcmp(safetensors_meta(&st, "format"), "x1") == 0 && strcmp(safetensors_meta(&st, "z"), "last") == 0);
        CHECK(strcmp(safetensors_meta(&st, "empty"), "") == 0 && !safetensors_meta(&st, "y"));
        uint8_t bytes[12];
        CHECK(safetensors_read(&st, bytes, b->begin, 12, &err) && bytes[0] == 4 && bytes[11] == 15);
        CHECK(safetensors_read(&st, bytes, 29, 0, &err) && bytes[0] == 4);
        safetensors_close(&st);
        CHECK(st.fd == -1 && !st.header);
    } else
        test_fail("%s", err.text);
    write_file(TEXT("{}"), 0);
    if (safetensors_open(&st, path, CURE, &err)) {
        CHECK(st.n_tensors == 0 && !safetensors_find(&st, "a") && !safetensors_meta(&st, "a"));
        safetensors_close(&st);
    } else
        test_fail("%s", err.text);
    test_end("test_open_reads_a_header");
}

#define A(dtype, shape, offsets) "\"a\":{\"dtype\":\"" dtype "\",\"shape\":" shape ",\"data_offsets\":" offsets "}"
#define B(dtype, shape, offsets) "\"b\":{\"dtype\":\"" dtype "\",\"shape\":" shape ",\"data_offsets\":" offsets "}"

static void test_open_refuses_bad_headers(void) {
    static const struct {
        const char *name, *header;
        size_t n_data;
        const char *message;
    } rows[] = {
        {"hole", "{" A("F32", "[1]", "[0,4]") "," B("F32", "[1]", "[8,12]") "}", 12,
         "tensor b begins at byte 8 of the data, expected 4 (a hole)"},
        {"hole_at_the_start", "{" A("F32", "[1]", "[4,8]") "}", 8,
         "tensor a begins at byte 4 of the data, expected 0 (a hole)"},
        {"overlap", "{" A("F32", "[2]", "[0,8]") "," B("F32", "[2]", "[4,12]") "}", 12,
         "tensor b begins at byte 4 of the data, expected 8 (an overlap)"},
        {"tensor_twice_in_place", "{" A("F32", "[1]", "[0,4]") "," B("F32", "[1]", "[0,4]") "}", 4,
         "begins at byte 0 of the data, expected 4 (an overlap)"},
        {"duplicate_tensor", "{" A("F32", "[1]", "[0,4]") "," A("F32", "[1]", "[4,8]") "}", 8, "duplicate tensor a"},
        {"duplicate_escaped_tensor",
         "{" A("F32", "[1]", "[0,4]") ",\"\\u0061\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[4,8]}}", 8,
         "duplicate tensor a"},
        {"duplicate_metadata_key", "{\"__metadata__\":{\"k\":\"1\",\"l\":\"2\",\"k\":\"1\"}}", 0,
         "duplicate metadata key k"},
        {"duplicate_metadata", "{\"__metadata__\":{},\"__metadata__\":{}}", 0, "duplicate key __metadata__"},
        {"metadata_number", "{\"__metadata__\":{\"k\":1}}", 0, "expected a string"},
        {"metadata_list", "{\"__metadata__\":[]}", 0, "expected '{'"},
        {"trailing_data", "{" A("F32", "[1]", "[0,4]") "}", 8, "the tensors end at byte 4 of the data, the file at 8"},
        {"data_without_tensors", "{}", 1, "the tensors end at byte 0 of the data, the file at 1"},
        {"truncated_data", "{" A("F32", "[2]", "[0,8]") "}", 7, "tensor a: bytes 0 to 8, the data has 7"},
        {"unknown_dtype", "{" A("F64", "[1]", "[0,8]") "}", 8, "tensor a: dtype F64, expected BF16, F16, F32"},
        {"dtype_in_lower_case", "{" A("f32", "[1]", "[0,4]") "}", 4, "dtype f32, expected"},
        {"shape_product_that_wraps", "{" A("F32", "[4294967296,4294967296]", "[0,0]") "}", 0,
         "tensor a: its shape needs more than 2^64 bytes"},
        {"shape_product_that_wraps_by_the_dtype", "{" A("F32", "[4611686018427387905]", "[0,4]") "}", 4,
         "tensor a: its shape needs more than 2^64 bytes"},
        {"shape_product_that_wraps_to_the_length", "{" A("U8", "[2,9223372036854775810]", "[0,4]") "}", 4,
         "tensor a: its shape needs more than 2^64 bytes"},
        {"shape_too_small", "{" A("F32", "[1]", "[0,8]") "}", 8, "tensor a: its shape needs 4 bytes, it has 8"},
        {"shape_too_large", "{" A("BF16", "[3,3]", "[0,16]") "}", 16, "tensor a: its shape needs 18 bytes, it has 16"},
        {"begin_after_end", "{" A("F32", "[1]", "[8,4]") "}", 8, "tensor a: bytes 8 to 4, the data has 8"},
        {"end_of_64_bits", "{" A("F32", "[1]", "[18446744073709551612,0]") "}", 4, "bytes 18446744073709551612 to 0"},
        {"end_beyond_64_bits", "{" A("F32", "[1]", "[0,18446744073709551620]") "}", 4, "a number below 2^64"},
        {"five_dimensions", "{" A("U8", "[1,1,1,1,1]", "[0,1]") "}", 1, "tensor a: more than 4 dimensions"},
        {"negative_dimension", "{" A("F32", "[-1]", "[0,4]") "}", 4, "expected a whole number"},
        {"fractional_dimension", "{" A("F32", "[1.0]", "[0,4]") "}", 4, "expected a whole number"},
        {"dimension_as_text", "{" A("F32", "[\"1\"]", "[0,4]") "}", 4, "expected a whole number"},
        {"trailing_comma_in_shape", "{" A("F32", "[1,]", "[0,4]") "}", 4, "expected a whole number"},
        {"three_offsets", "{" A("F32", "[1]", "[0,4,8]") "}", 8, "expected ']'"},
        {"one_offset", "{" A("F32", "[1]", "[0]") "}", 4, "expected ','"},
        {"no_dtype", "{\"a\":{\"shape\":[1],\"data_offsets\":[0,4]}}", 4, "tensor a: no dtype"},
        {"no_shape", "{\"a\":{\"dtype\":\"F32\",\"data_offsets\":[0,4]}}", 4, "tensor a: no shape"},
        {"no_offsets", "{\"a\":{\"dtype\":\"F32\",\"shape\":[1]}}", 4, "tensor a: no data_offsets"},
        {"empty_tensor_object", "{\"a\":{}}", 0, "expected a string"},
        {"unknown_tensor_key", "{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4],\"more\":\"1\"}}", 4,
         "tensor a: unknown key more"},
        {"duplicate_tensor_key", "{\"a\":{\"dtype\":\"F32\",\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}",
         4, "tensor a: duplicate key dtype"},
        {"duplicate_shape", "{\"a\":{\"dtype\":\"F32\",\"shape\":[],\"shape\":[1],\"data_offsets\":[0,4]}}", 4,
         "tensor a: duplicate key shape"},
        {"tensor_without_object", "{\"a\":1}", 0, "expected '{'"},
        {"list_at_the_top", "[]", 0, "bad JSON at byte 0: expected '{'"},
        {"empty_header", "", 0, "bad JSON at byte 0: expected '{'"},
        {"header_that_stops", "{" A("F32", "[1]", "[0,4]"), 4, "expected '}'"},
        {"trailing_comma", "{" A("F32", "[1]", "[0,4]") ",}", 4, "expected a string"},
        {"text_after_the_header", "{}x", 0, "bad JSON at byte 2: expected the end"},
        {"second_header", "{} {}", 0, "bad JSON at byte 3: expected the end"},
        {"name_that_is_not_utf8", "{\"\xFF\":{}}", 0, "expected UTF-8"},
        {"nul_in_a_name", "{\"a\\u0000\":{}}", 0, "other than NUL"},
    };
    for (int i = 0; i < LENGTH(rows); i++) {
        char name[128];
        write_file(rows[i].header, strlen(rows[i].header), rows[i].n_data);
        check_refused(rows[i].name, rows[i].message);
        snprintf(name, sizeof name, "test_open_refuses_%s", rows[i].name);
        test_end(name);
    }
}

static void test_open_refuses_other_files(void) {
    static const struct {
        const char *name, *bytes;
        size_t n;
        const char *message;
    } rows[] = {
        {"empty_file", TEXT(""), ": 0 bytes long, expected a model of at least 8"},
        {"7_bytes", TEXT("\2\0\0\0\0\0\0"), ": 7 bytes long, expected a model of at least 8"},
        {"header_longer_than_the_file", TEXT("\3\0\0\0\0\0\0\0{}"), ": header of 3 bytes, but the file ends after 2"},
        {"header_length_alone", TEXT("\2\0\0\0\0\0\0\0"), ": header of 2 bytes, but the file ends after 0"},
        {"header_over_100_mb", TEXT("\1\xE1\xF5\5\0\0\0\0{}"), "header of 100000001 bytes, at most 100000000"},
        {"header_length_of_64_bits", TEXT("\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF{}"),
         "header of 18446744073709551615 bytes, at most"},
        {"gguf", TEXT("GGUF\3\0\0\0\x23\1\0\0\0\0\0\0"), "a GGUF file (llama.cpp); " CURE},
        {"pytorch_zip", TEXT("PK\3\4\0\0\x08\x08\0\0\0\0\0\0archive/data.pkl"),
         "a PyTorch pickle (zip); save it as safetensors, then"},
        {"pytorch_pickle", TEXT("\x80\2\x8A\x0Al\xFC\x9C\x46\xF9 j\xA8P\x19.\x80\2M\xE9\3."),
         "a Python pickle; save it as safetensors, then"},
        {"pickle_of_protocol_4", TEXT("\x80\4\x95\x1A\0\0\0\0\0\0\0}\x94\x8C\1a\x94K\1s."),
         "a Python pickle; save it as safetensors, then"},
        {"pickle_of_protocol_5_with_a_large_frame", TEXT("\x80\5\x95\x1A\x2B\1\0\0\0\0\0}\x94\x8C\1a\x94K\1s."),
         "a Python pickle; save it as safetensors, then"},
        {"llama2c_ak42", TEXT("24ka\1\0\0\0\x20\1\0\0\0\3\0\0\6\0\0\0\6\0\0\0\6\0\0\0\0\x7D\0\0"),
         "a llama2.c .bin file; " CURE},
        // stories15M: dim 288, hidden 768, 6 layers, 6 heads, 6 K/V heads, 32000 tokens, 256 positions
        {"llama2c_version_0", TEXT("\x20\1\0\0\0\3\0\0\6\0\0\0\6\0\0\0\6\0\0\0\0\x7D\0\0\0\1\0\0\1\2\3\4"),
         "a llama2.c .bin file; " CURE},
        {"llama2c_version_0_untied", TEXT("\x20\1\0\0\0\3\0\0\6\0\0\0\6\0\0\0\6\0\0\0\0\x83\xFF\xFF\0\1\0\0\1\2\3\4"),
         "a llama2.c .bin file; " CURE},
        {"text", TEXT("Once upon a time there was a file of text.\n"), "not a safetensors file (header of "},
        {"zeros", TEXT("\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0"),
         "bad JSON at byte 0: expected '{'"},
    };
    for (int i = 0; i < LENGTH(rows); i++) {
        char name[128];
        write_bytes(rows[i].bytes, rows[i].n);
        check_refused(rows[i].name, rows[i].message);
        snprintf(name, sizeof name, "test_open_refuses_%s", rows[i].name);
        test_end(name);
    }
    unlink(path);
    check_refused("missing", ": No such file or directory");
    test_end("test_open_refuses_missing_file");

    if (mkdir(path, 0700) != 0) test_fail("mkdir %s", path);
    check_refused("directory", ": a directory, expected a file; " CURE);
    rmdir(path);
    test_end("test_open_refuses_directory");

    if (mkfifo(path, 0600) != 0) test_fail("mkfifo %s", path);
    FILE *both = fopen(path, "r+"); // so that no one waits for a writer
    check_refused("pipe", ": not a regular file");
    if (both) fclose(both);
    unlink(path);
    test_end("test_open_refuses_pipe");
}

// A good header with one byte changed, or cut short: accepted or refused with a message, and never a crash. (What is
// accepted then still covers the file: a changed name, say.)
static void test_open_survives_any_changed_byte(void) {
    static const char header[] = "{\"__metadata__\":{\"format\":\"x\",\"k\":\"v\"}," A("F32", "[2,1]", "[0,8]") "," B(
        "U8", "[3]", "[8,11]") "} ";
    static const uint8_t values[] = {0, ' ', '"', '\\', '0', '9', '[', '}', ',', 'u', 0x80, 0xFF};
    enum { N = 8 + sizeof header - 1 + 11 };
    int accepted = 0, refused = 0;
    for (int at = 0; at < N; at++)
        for (int i = 0; i <= LENGTH(values); i++) {
            uint8_t file[N] = {sizeof header - 1};
            memcpy(file + 8, header, sizeof header - 1);
            if (i < LENGTH(values)) file[at] = values[i];
            write_bytes(file, i < LENGTH(values) ? N : (size_t)at); // last: cut before this byte
            SafeTensors st;
            Error err = {""};
            if (safetensors_open(&st, path, CURE, &err)) {
                uint64_t total = 0;
                for (size_t t = 0; t < st.n_tensors; t++) total += st.tensors[t].end - st.tensors[t].begin;
                CHECK(!err.text[0] && total == st.data_bytes && st.data_start + total == N);
                accepted++;
                safetensors_close(&st);
            } else {
                CHECK(err.text[0]);
                refused++;
            }
        }
    CHECK(accepted > 0 && refused > accepted);
    test_end("test_open_survives_any_changed_byte");
}

// Reads are split into chunks of 8 MiB, which threads take: every byte is where it belongs, and none beyond.
static void test_read(void) {
    const size_t chunk = 8 << 20, n = 2 * chunk + 12345;
    char header[200];
    snprintf(header, sizeof header, "{\"a\":{\"dtype\":\"U8\",\"shape\":[%zu],\"data_offsets\":[0,%zu]}}", n, n);
    write_file(header, strlen(header), 0);
    FILE *f = fopen(path, "ab");
    uint32_t *data = malloc(n + 4);
    for (size_t i = 0; i < n / 4 + 1; i++) data[i] = (uint32_t)i * 2654435761u;
    if (!f || fwrite(data, 1, n, f) != n) test_fail("cannot write %s", path);
    if (f) fclose(f);
    const struct {
        size_t begin, n;
    } reads[] = {{0, n},         {3, n - 3}, {0, chunk}, {0, chunk + 1}, {1, chunk - 1},    {chunk - 1, 2},
                 {7, 2 * chunk}, {n - 1, 1}, {n, 0},     {chunk, chunk}, {5, 2 * chunk + 1}};
    SafeTensors st;
    Error err = {""};
    if (!safetensors_open(&st, path, CURE, &err)) {
        test_fail("%s", err.text);
        test_end("test_read_across_chunks");
        free(data);
        return;
    }
    uint8_t *got = malloc(n + 1);
    for (int i = 0; i < LENGTH(reads); i++) {
        memset(got, 0xA5, n + 1);
        if (!safetensors_read(&st, got, reads[i].begin, reads[i].n, &err)) test_fail("%s", err.text);
        if (memcmp(got, (uint8_t *)data + reads[i].begin, reads[i].n) != 0 || got[reads[i].n] != 0xA5)
            test_fail("%zu bytes from %zu on", reads[i].n, reads[i].begin);
    }
    test_end("test_read_across_chunks");

    // The file shrinks while it is open.
    const size_t left = chunk + 100;
    if (truncate(path, (off_t)(st.data_start + left)) != 0) test_fail("truncate");
    Error none = {""}, one = {""}, many = {""};
    CHECK(safetensors_read(&st, got, 0, left, &none) && !none.text[0]);
    CHECK(!safetensors_read(&st, got, left - 10, 11, &one) && strstr(one.text, ": ended at byte ") &&
          strstr(one.text, "expected 1 more"));
    CHECK(!safetensors_read(&st, got, 0, n, &many) && strstr(many.text, ": ended at byte "));
    if (truncate(path, 0) != 0) test_fail("truncate");
    Error gone = {""};
    CHECK(!safetensors_read(&st, got, 0, n, &gone) && strstr(gone.text, ": ended at byte "));
    test_end("test_read_of_a_truncated_file_is_an_error");
    safetensors_close(&st);
    free(got);
    free(data);
}

int main(void) {
    test_json_strings();
    test_json_bad_strings();
    test_json_numbers();
    test_json_steps();

    const char *base = getenv("TMPDIR");
    snprintf(directory, sizeof directory, "%s/test_safetensors.XXXXXX", base && *base ? base : P_tmpdir);
    if (!mkdtemp(directory)) {
        test_fail("no directory for temporary files: %s", directory);
        test_end("test_safetensors");
        return tests_summary();
    }
    snprintf(path, sizeof path, "%s/file", directory);
    test_open_reads_a_header();
    test_open_refuses_bad_headers();
    test_open_refuses_other_files();
    test_open_survives_any_changed_byte();
    test_read();
    unlink(path);
    rmdir(directory);
    return tests_summary();
}
