// The tokenizer against golden ids, against a naive BPE written here, and rule by rule. What needs LLaMA 3's vocabulary
// is skipped where ../shared/tokenizer is not there.
#include "../model/file/checkpoint.h"
#include "../model/file/json.h"
#include "../tokenizer/bpe.h"
#include "../tokenizer/encode.h"
#include "../tokenizer/split.h"
#include "../tokenizer/tokenizer.h"

#include "../model/model.h"
#include "../tokenizer/unicode_tables.h"
#include "../tokenizer/utf8.h"
#include "vocabulary.h"

// ---- UTF-8 ----------------------------------------------------------------------------------------------------------

// The Unicode standard's table 3-7: how many bytes of s[0..n) begin a well-formed character, and how many it needs.
// *need is 0 if the first byte can begin none.
static size_t well_formed_prefix(const uint8_t *s, size_t n, size_t *need) {
    uint8_t b = s[0], low = 0x80, high = 0xBF;
    *need = b < 0x80 ? 1 : b >= 0xC2 && b <= 0xDF ? 2 : b >= 0xE0 && b <= 0xEF ? 3 : b >= 0xF0 && b <= 0xF4 ? 4 : 0;
    if (*need == 0) return 0;
    if (b == 0xE0) low = 0xA0;
    if (b == 0xED) high = 0x9F;
    if (b == 0xF0) low = 0x90;
    if (b == 0xF4) high = 0x8F;
    size_t have = 1;
    for (; have < *need && have < n; have++, low = 0x80, high = 0xBF)
        if (s[have] < low || s[have] > high) break;
    return have;
}

static void test_utf8_round_trips_every_code_point(void) {
    for (uint32_t cp = 0; cp < 0x110000; cp++) {
        if (cp >= 0xD800 && cp <= 0xDFFF) continue;
        uint8_t s[4] = {0};
        uint32_t back = ~cp;
        int length = utf8_encode(cp, s);
        size_t need;
        CHECK(length == (cp < 0x80 ? 1 : cp < 0x800 ? 2 : cp < 0x10000 ? 3 : 4));
        CHECK(well_formed_prefix(s, (size_t)length, &need) == (size_t)length && need == (size_t)length);
        CHECK(utf8_decode(s, (size_t)length, &back) == length && back == cp);
        for (int n = 1; n < length; n++) CHECK(utf8_decode(s, (size_t)n, &back) == 0);
    }
    uint8_t s[4];
    CHECK(utf8_encode(0x20AC, s) == 3 && memcmp(s, "\xE2\x82\xAC", 3) == 0);
    CHECK(utf8_encode(0x10FFFF, s) == 4 && memcmp(s, "\xF4\x8F\xBF\xBF", 4) == 0);
    test_end("test_utf8_round_trips_every_code_point");
}

// Every string of two and three bytes, and of four with the last one of each sort.
static void test_utf8_decodes_only_what_is_well_formed(void) {
    static const uint8_t last[] = {0x00, 0x7F, 0x80, 0xBF, 0xC0, 0xFF};
    uint32_t cp;
    size_t need;
    for (uint32_t first = 0; first < 256; first++)
        for (uint32_t rest = 0; rest < 65536; rest++) {
            uint8_t s[4] = {(uint8_t)first, (uint8_t)(rest >> 8), (uint8_t)rest, 0};
            int n_last = first >= 0xF0 ? LENGTH(last) : 1;
            for (int l = 0; l < n_last; l++) {
                s[3] = last[l];
                size_t have = well_formed_prefix(s, 4, &need);
                int want = need && have >= need ? (int)need : 0;
                if (utf8_decode(s, 4, &cp) != want) test_fail("%02X %02X %02X %02X", s[0], s[1], s[2], s[3]);
            }
            if (first < 0x80) break; // a character by itself, whatever follows
        }
    test_end("test_utf8_decodes_only_what_is_well_formed");
}

// A tail is held back if, and only if, more bytes could make it a character.
static void test_utf8_incomplete_tail_is_what_can_be_completed(void) {
    for (size_t n = 1; n <= 4; n++)
        for (uint32_t bits = 0; bits < (n == 4 ? 300000 : 1u << 8 * n); bits++) {
            uint32_t value = n == 4 ? random_below(1 << 16) << 16 | random_below(1 << 16) | 0x00808080u : bits;
            uint8_t s[4];
            for (size_t i = 0; i < n; i++) s[i] = (uint8_t)(value >> 8 * (n - 1 - i));
            if (n == 3 && s[0] < 0x7F) { // as the shorter ones
                bits |= 0xFFFF;
                continue;
            }
            size_t want = 0, need;
            for (size_t back = 1; back <= 3 && back <= n; back++)
                if (well_formed_prefix(s + n - back, back, &need) == back && need > back) want = back;
            size_t got = utf8_incomplete_tail(s, n);
            if (got != want) test_fail("%zu bytes %0*X: %zu, expected %zu", n, (int)(2 * n), value, got, want);
        }
    CHECK(utf8_incomplete_tail((const uint8_t *)"", 0) == 0);
    test_end("test_utf8_incomplete_tail_is_what_can_be_completed");
}

// What the streaming decoder relies on: cut anywhere, the parts that are let through are whole characters.
static void test_utf8_tail_holds_every_split_character(void) {
    static const char text[] = "a\xC3\xA9\xE2\x82\xAC\xF0\x9F\x98\x80z\xED\x9F\xBF\xEE\x80\x80\xF4\x8F\xBF\xBF";
    size_t n = sizeof text - 1, whole[32], wholes = 0;
    uint32_t cp;
    for (size_t at = 0; at <= n; at += at < n ? (size_t)utf8_decode((const uint8_t *)text + at, n - at, &cp) : 1)
        whole[wholes++] = at;
    for (size_t cut = 0; cut <= n; cut++) {
        size_t shown = cut - utf8_incomplete_tail((const uint8_t *)text, cut), before = 0;
        for (size_t i = 0; i < wholes; i++)
            if (whole[i] <= cut) before = whole[i];
        if (shown != before) test_fail("cut at %zu: %zu bytes shown, expected %zu", cut, shown, before);
    }
    CHECK(wholes > 8);
    test_end("test_utf8_tail_holds_every_split_character");
}

// ---- Unicode classes ------------------------------------------------------------------------------------------------

static void test_unicode_classes(void) {
    const char *name = "test_unicode_class_of_every_code_point";
    size_t n;
    char *text = read_file(SHARED "unicode16_classes.tsv", &n);
    if (!text) {
        test_skip(name, "no " SHARED "unicode16_classes.tsv");
        return;
    }
    uint8_t *want = calloc(0x110000, 1);
    char *at = text;
    int ranges = 0;
    for (char *line; (line = next_line(&at));) {
        unsigned first, last;
        char class;
        if (line[0] == '#' || sscanf(line, "%x %x %c", &first, &last, &class) != 3) continue;
        for (unsigned cp = first; cp <= last && cp < 0x110000; cp++)
            want[cp] = class == 'L' ? CLASS_LETTER : class == 'N' ? CLASS_NUMBER : CLASS_SPACE;
        ranges++;
    }
    CHECK(ranges > 800);
    for (uint32_t cp = 0; cp < 0x110000; cp++)
        if (unicode_class(cp) != want[cp]) test_fail("U+%04X is %d, expected %d", cp, unicode_class(cp), want[cp]);
    CHECK(unicode_class(0x110000) == CLASS_OTHER && unicode_class(UINT32_MAX) == CLASS_OTHER);
    free(text);
    free(want);
    test_end(name);
}

// ---- the split pattern, which needs no vocabulary
// ---------------------------------------------------------------------

// One text a row, given as its pieces.
typedef const char *Row[12];

static void check_split(const char *name, const Row *rows, int n_rows) {
    for (int r = 0; r < n_rows; r++) {
        char text[256] = "";
        for (int p = 0; rows[r][p]; p++) strcat(text, rows[r][p]);
        size_t n = strlen(text);
        uint8_t *exact = malloc(n), *at = exact;
        memcpy(exact, text, n);
        for (int p = 0; rows[r][p]; p++) {
            size_t length = split_next(at, n), want = strlen(rows[r][p]);
            if (length != want) {
                test_fail("row %d, \"%s\": piece %d is \"%.*s\", expected \"%s\"", r, text, p, (int)length,
                          (const char *)at, rows[r][p]);
                break;
            }
            at += length;
            n -= length;
        }
        free(exact);
    }
    test_end(name);
}

#define SPLIT(name, ...) \
    do { \
        static const Row rows[] = {__VA_ARGS__}; \
        check_split(name, rows, LENGTH(rows)); \
    } while (0)

static void test_split_rules(void) {
    SPLIT("test_split_contractions_in_any_case", {"I", "'m", " sure", " you", "'ll", " say", " they", "'ve", " won"},
          {"she", "'d", " he", "'s", " we", "'re"}, {"don", "'t"}, {"DON", "'T", " WE", "'RE"}, {"x", "'lL", "y"},
          {"x", "'Ve"}, {"'t", "is"}, {"'s", "x"}, {"'m", "x"}, {"'d", "x"}, {"'re", "x"}, {"'ve", "x"}, {"'ll", "x"},
          {"'S", "x"}, {"'T", "X"}, {"'M", "x"}, {"'D", "x"}, {"'Re", "x"}, {"'vE", "x"}, {"'LL", "X"}, {"'s", "'s"},
          {"'ran"}, {"'l"}, {"'v"}, {"'r"}, {"''", "s"}, {"'"}, {"'", "1"}, {"'", " ", " s"}, {"x", "'\n", "s"}, {"’s"},
          {"'ét"}, {" '", "s"}, {"!'", "s"});
    SPLIT("test_split_long_s_is_a_contraction", {"'\u017F", "ektedir"}, {"x", "'\u017F"}, {"\u017Fx"}, {"'\u017Ea"},
          {"'\u1E9B"});
    SPLIT("test_split_digits_in_threes", {"1"}, {"12"}, {"123"}, {"123", "4"}, {"123", "456", "7"}, {"x", "1", "y"},
          {" ", "12"}, {"3", ".", "14"}, {"1", ",", "000"}, {"$", "5"}, {"١٢٣", "٤"}, {"½²Ⅷ", "5"}, {"12³", "4", "x"});
    SPLIT("test_split_space_joins_the_word_after_it", {"a", " b"}, {" a"}, {"a", " ", " b"}, {"a", "  ", " b"},
          {"a", "\tb"}, {"a", "\t", "\tb"}, {"a", "\t\t", " x"}, {"a", " ", "\tb"});
    SPLIT("test_split_newlines", {"a", "\n", "b"}, {"a", " \n", "b"}, {"a", "\n", " b"}, {"a", "\r\n\r\n", "b"},
          {"a", " \n  \n", " ", " b"}, {"a", "\n", " "}, {"a", " \t\n"}, {"\n\n\n"}, {"\r", "x"}, {" \n", "!"},
          {"\n", "1"}, {"\n", " ", " ", "1"}, {"a", "\n\u3000\r", "\u3000", "\u3000b"});
    SPLIT("test_split_trailing_spaces_are_one_piece", {"a", "   "}, {" "}, {"     "}, {"a", " \t\u2003"}, {"!", " "},
          {"1", "  "}, {"a", "\x0B\x0C"});
    SPLIT("test_split_spaces_before_what_is_no_word", {"  ", " ", "1"}, {" ", "1"}, {" ", " !"}, {" ", "\t", "!"},
          {"\t", "!"}, {"\t\t", "\t", "1"}, {"\t", "\t", "("});
    SPLIT("test_split_punctuation_runs_with_newlines", {"hi", "!!!\n\n", "you"}, {"a", " ...\r\n", " b"}, {"!\n", " !"},
          {"!\r\n\n\r", "x"}, {"(foo", ")"}, {"[[", "foo", "]]"}, {" (", "a"}, {" (", "1", ")"}, {"#!", "x"},
          {"a", ".b"}, {"a", "..", "b"}, {"\n", "!"}, {"a", ",", " b"}, {"x", " =", " y", ";\n", "}"},
          {"!", " \n", "x"}, {"!", "\t\n"});
    SPLIT("test_split_white_space_of_many_bytes", {"a", "\u00A0b"}, {"a", "\u3000", "\u3000b"}, {"\u00A0", "!"},
          {"\xC2\x85", "\xC2\x85", "!"}, {"a", "\u2028b"}, {"a", "\u2029"}, {" ", "\u2009b"}, {"\u00A0", " b"},
          {"\u1680\u202F", "\u205F", "1"});
    SPLIT("test_split_what_only_looks_like_space_is_other", {"x", "\u200By"}, {"\uFEFFx"}, {"\u180E", " "},
          {"\x1C\x1D\x1E\x1F"}, {"a", "\x1F", "1"}, {" \u200B", " x"});
    SPLIT("test_split_cjk", {"你好", "\uFF0C世界"}, {"日本語"}, {"ab日"}, {"\uFF0C\u3002", "世"}, {"世", "\u3002"},
          {"世", "2", "月"}, {"한", " 국"});
    SPLIT("test_split_emoji", {"hi", " 👍\U0001F3FD👍"}, {"👍a"}, {"👍👍", "a"}, {"1", "\uFE0F\u20E3"}, {"👨\u200D👩"},
          {"😀\n", "x"});
    SPLIT("test_split_combining_marks_are_other", {"e", "\u0301a"}, {"e", "\u0301\u0301", "a"}, {"e", "\u0301"},
          {"e", "\u0301", " a"}, {"e", "\u0301", "1"}, {"\u0939", "\u093F\u0928", "\u094D\u0926", "\u0940"},
          {" \u0301", "a"});
}

// Whatever the text, the pieces follow one another to its end.
static void test_split_covers_any_text(void) {
    static const uint32_t some[] = {' ',    ' ',   '\n',   '\r',    '\t',   '\'', 's',   'l',     'E',
                                    'x',    '1',   '9',    '!',     '(',    0xE9, 0x17F, 0xA0,    0x3000,
                                    0x2028, 0x301, 0x4E16, 0x1F44D, 0x200D, 0,    0x661, 0x10FFFF};
    for (int round = 0; round < 20000; round++) {
        uint8_t text[160];
        size_t n = 0, at = 0;
        for (uint32_t left = 1 + random_below(40); left > 0; left--)
            n += (size_t)utf8_encode(some[random_below(LENGTH(some))], text + n);
        while (at < n) {
            size_t length = split_next(text + at, n - at);
            bool boundary = length > 0 && length <= n - at && (at + length == n || (text[at + length] & 0xC0) != 0x80);
            if (!boundary) {
                test_fail("round %d: a piece of %zu bytes at %zu of %zu", round, length, at, n);
                break;
            }
            at += length;
        }
    }
    test_end("test_split_covers_any_text");
}

// ---- refusals -------------------------------------------------------------------------------------------------------

static void check_refused(const char *name, const Vocabulary *v, uint32_t n_bytes, const char *message) {
    Tokenizer t;
    Error err = {""};
    if (init_vocabulary(&t, v, n_bytes, &err)) {
        test_fail("accepted, expected: %s", message);
        tokenizer_free(&t);
    } else {
        if (!strstr(err.text, message)) test_fail("\"%s\", expected: %s", err.text, message);
        CHECK(!t.offsets && !t.kind && !t.bytes && !t.slots && !t.pair_ids && !t.spans && !t.special &&
              !t.passes[0].tree && !t.passes[1].tree);
    }
    test_end(name);
}

static void test_vocabulary_refusals(void) {
    Vocabulary v = small_vocabulary();
    Tokenizer t;
    Error err = {""};
    if (init_vocabulary(&t, &v, 263, &err)) {
        CHECK(tokenizer_find(&t, (const uint8_t *)"ab", 2) == 256 &&
              tokenizer_find(&t, (const uint8_t *)"ba", 2) == -1);
        CHECK(tokenizer_find(&t, (const uint8_t *)"<end>", 5) == -1); // special: not for text
        CHECK(tokenizer_special(&t, "<end>") == 257 && tokenizer_special(&t, "<en") == -1 &&
              tokenizer_special(&t, "") == -1);
        tokenizer_free(&t);
    } else
        test_fail("%s", err.text);
    test_end("test_vocabulary_with_special_and_unused_ids_is_accepted");

    v.offsets[0] = 1;
    check_refused("test_vocabulary_offsets_that_begin_late_are_refused", &v, 263,
                  "tokenizer.offsets begins with 1, expected 0");
    v = small_vocabulary();
    check_refused("test_vocabulary_offsets_that_end_early_are_refused", &v, 264,
                  "tokenizer.offsets ends with 263, tokenizer.bytes has 264 bytes");
    v.offsets[259] = 264;
    check_refused("test_vocabulary_offsets_that_end_late_are_refused", &v, 263,
                  "tokenizer.offsets ends with 264, tokenizer.bytes has 263 bytes");
    v = small_vocabulary();
    v.offsets[100] = 102;
    check_refused("test_vocabulary_offsets_that_step_back_are_refused", &v, 263,
                  "token 100 runs from 102 to 101 of 263 bytes");
    v = small_vocabulary();
    v.offsets[100] = 4000000000u;
    check_refused("test_vocabulary_offsets_beyond_the_bytes_are_refused", &v, 263,
                  "token 99 runs from 99 to 4000000000 of 263");
    v = small_vocabulary();
    v.offsets[8] = 7;
    check_refused("test_vocabulary_empty_token_is_refused", &v, 263, "token 7 is empty");
    v = small_vocabulary();
    v.kind[258] = TOKEN_SPECIAL;
    check_refused("test_vocabulary_empty_special_token_is_refused", &v, 263, "token 258 is empty");
    v = small_vocabulary();
    v.bytes[200] = 3;
    check_refused("test_vocabulary_duplicate_token_is_refused", &v, 263, "tokens 3 and 200 have the same bytes");
    v = small_vocabulary();
    v.kind[256] = TOKEN_SPECIAL, v.kind[255] = TOKEN_SPECIAL;
    check_refused("test_vocabulary_without_a_single_byte_is_refused", &v, 263, "no token for the single byte 0xFF");
    v = small_vocabulary();
    v.kind[9] = 4;
    check_refused("test_vocabulary_unknown_kind_is_refused", &v, 263,
                  "tokenizer.kind of token 9 is 4, expected 0 to 3");
    v = small_vocabulary();
    v.kind[255] = TOKEN_SPECIAL;
    check_refused("test_vocabulary_mergeable_after_special_is_refused", &v, 263,
                  "mergeable token 256 after one that is not");
    v = small_vocabulary();
    v.kind[255] = TOKEN_UNUSED;
    check_refused("test_vocabulary_mergeable_after_unused_is_refused", &v, 263,
                  "mergeable token 256 after one that is not");
    v = (Vocabulary){.vocab_size = 0};
    check_refused("test_vocabulary_of_nothing_is_refused", &v, 0, "no token for the single byte 0x00");
}

// ---- with a vocabulary ----------------------------------------------------------------------------------------------

static void check_golden(const Tokenizer *t, int line, const uint8_t *text, size_t n, bool special, const char *ids) {
    TokenList got = encode(t, text, n, special), want = parse_ids(ids);
    if (!same_ids(&got, &want)) {
        size_t i = 0;
        while (i < got.n && i < want.n && got.ids[i] == want.ids[i]) i++;
        test_fail("line %d: %zu ids, expected %zu; id %zu is the first that differs", line, got.n, want.n, i);
    }
    if (!decodes_to(t, &got, text, n)) test_fail("line %d: the ids do not decode to the text", line);
    tokens_free(&got);
    tokens_free(&want);
}

// The text with each maximal part of a character that was cut short, and each byte that begins none, as U+FFFD.
static uint8_t *replace_bad(const uint8_t *text, size_t n, size_t *n_out) {
    uint8_t *out = malloc(3 * n + 1);
    size_t o = 0, need;
    for (size_t at = 0, have; at < n; at += have ? have : 1) {
        have = well_formed_prefix(text + at, n - at, &need);
        bool good = have > 0 && have == need;
        memcpy(out + o, good ? text + at : (const uint8_t *)"\xEF\xBF\xBD", good ? have : 3);
        o += good ? have : 3;
    }
    *n_out = o;
    return out;
}

static void test_golden(const Tokenizer *t) {
    static const struct {
        const char *mode, *name;
        int least; // so many rows at least
    } modes[] = {{"text", "test_golden_texts", 1900},
                 {"bytes", "test_golden_bytes_that_are_not_utf8", 300},
                 {"bytes_replace", "test_golden_bytes_replaced_by_fffd", 300}};
    for (int m = 0; m < LENGTH(modes); m++) {
        size_t size;
        char *file = read_file(SHARED "golden.tsv", &size), *at = file, *fields[4];
        int rows = 0, line_number = 0;
        for (char *line; file && (line = next_line(&at));) {
            line_number++;
            if (line[0] == '#' || split_fields(line, fields, 4) != 4 || strcmp(fields[0], modes[m].mode) != 0) continue;
            size_t n;
            uint8_t *text = from_hex(fields[1], &n);
            if (m == 2) {
                uint8_t *replaced = replace_bad(text, n, &n);
                free(text);
                text = replaced;
            }
            check_golden(t, line_number, text, n, false, fields[2]);
            free(text);
            rows++;
        }
        free(file);
        if (rows < modes[m].least) test_fail("%d rows, expected %d or more", rows, modes[m].least);
        test_end(modes[m].name);
    }
}

// The same rules with a vocabulary that is here wherever the program is.
static void test_stories_vectors(const Tokenizer *t) {
    static const struct {
        const char *kind, *name;
        int least;
    } kinds[] = {{"text", "test_stories_vectors_of_texts", 300},
                 {"bytes", "test_stories_vectors_of_bytes_that_are_not_utf8", 90},
                 {"special", "test_stories_vectors_of_special_tokens", 11}};
    for (int k = 0; k < LENGTH(kinds); k++) {
        size_t size;
        char *file = read_file("tests/vectors/stories-tokenizer.tsv", &size), *at = file, *fields[3];
        int rows = 0, line_number = 0;
        for (char *line; file && (line = next_line(&at));) {
            line_number++;
            if (split_fields(line, fields, 3) != 3 || strcmp(fields[0], kinds[k].kind) != 0) continue;
            size_t n;
            uint8_t *text = from_hex(fields[1], &n);
            check_golden(t, line_number, text, n, k == 2, fields[2]);
            free(text);
            rows++;
        }
        free(file);
        if (rows < kinds[k].least) test_fail("%d rows, expected %d or more", rows, kinds[k].least);
        test_end(kinds[k].name);
    }
}

static void test_golden_special(const Tokenizer *t) {
    for (int column = 1; column <= 2; column++) {
        size_t size;
        char *file = read_file(SHARED "golden_special.tsv", &size), *at = file, *fields[3];
        int rows = 0, line_number = 0;
        for (char *line; file && (line = next_line(&at));) {
            line_number++;
            if (line[0] == '#' || split_fields(line, fields, 3) != 3) continue;
            size_t n;
            uint8_t *text = from_hex(fields[0], &n);
            check_golden(t, line_number, text, n, column == 1, fields[column]);
            free(text);
            rows++;
        }
        free(file);
        CHECK(rows > 40);
        test_end(column == 1 ? "test_golden_special_tokens_parsed" : "test_golden_special_tokens_as_text");
    }
    CHECK(tokenizer_special(t, "<|begin_of_text|>") == 128000 && tokenizer_special(t, "<|eot_id|>") == 128009);
    CHECK(tokenizer_special(t, "<|eot_id|> ") == -1 && tokenizer_special(t, "the") == -1);
    test_end("test_special_tokens_by_name");
}

static void test_every_token_is_found(const Tokenizer *t, const char *name) {
    int found = 0;
    for (int id = 0; id < t->vocab_size; id++) {
        size_t n;
        const uint8_t *bytes = tokenizer_bytes(t, id, &n);
        if (t->kind[id] != TOKEN_MERGEABLE) continue;
        if (tokenizer_find(t, bytes, n) != id) test_fail("token %d is not found by its bytes", id);
        TokenList list = {0};
        Error err = {""};
        bpe_encode(t, bytes, n, &list,
                   &err); // as a piece of its own it is that token, whether merges lead there or not
        if (list.n != 1 || list.ids[0] != id) test_fail("token %d as a piece is %zu tokens", id, list.n);
        tokens_free(&list);
        found++;
    }
    CHECK(found >= 256);
    test_end(name);
}

static void test_random_bytes_round_trip(const Tokenizer *t, const char *name) {
    static const char *const some[] = {"the",          " ",
                                       "\n",           "\t",
                                       "  ",           "<|eot_id|>",
                                       "<|",           "\xC3\xA9",
                                       "\xE4\xB8\x96", "\xF0\x9F\x98\x80",
                                       "1234",         "'s",
                                       "!!",           "\xFF",
                                       "\xE4\xB8",     "\xC0\x80",
                                       "\xED\xA0\x80", "\xF0\x9F"};
    for (int round = 0; round < 6000; round++) {
        uint8_t text[1024];
        size_t n = 0;
        for (uint32_t left = random_below(60); left > 0; left--)
            if (round % 3 == 0)
                text[n++] = (uint8_t)random_below(256);
            else if (round % 3 == 1 && random_below(4))
                text[n++] = (uint8_t)(' ' + random_below(95));
            else
                for (const char *s = some[random_below(LENGTH(some))]; *s; s++) text[n++] = (uint8_t)*s;
        for (int special = 0; special <= 1; special++) {
            TokenList list = encode(t, text, n, special);
            if (!decodes_to(t, &list, text, n)) test_fail("round %d: the ids do not decode to the %zu bytes", round, n);
            for (size_t i = 0; i < list.n && !special; i++) CHECK(t->kind[list.ids[i]] == TOKEN_MERGEABLE);
            tokens_free(&list);
        }
    }
    test_end(name);
}

// Where special tokens begin alike, the longest is taken.
static void test_longest_special_token_is_parsed(void) {
    Vocabulary v = small_vocabulary();
    static const char *const specials[] = {"<", "<a>", "<a><b>", "a"};
    for (int i = 0; i < LENGTH(specials); i++) {
        int id = v.vocab_size++;
        memcpy(v.bytes + v.offsets[id], specials[i], strlen(specials[i]));
        v.offsets[id + 1] = v.offsets[id] + (uint32_t)strlen(specials[i]);
        v.kind[id] = TOKEN_SPECIAL;
    }
    Tokenizer t;
    Error err = {""};
    if (!init_vocabulary(&t, &v, v.offsets[v.vocab_size], &err)) test_fail("%s", err.text);
    static const struct {
        const char *text;
        int n, ids[8];
    } rows[] = {{"<a><b>", 1, {261}},        {"<a><b", 3, {260, 259, 'b'}},      {"<a<end>", 3, {259, 262, 257}},
                {"bab", 3, {'b', 262, 'b'}}, {"<a><a><b>!", 3, {260, 261, '!'}}, {"", 0, {0}}};
    for (int i = 0; i < LENGTH(rows) && !err.text[0]; i++) {
        TokenList list = encode(&t, (const uint8_t *)rows[i].text, strlen(rows[i].text), true);
        if (list.n != (size_t)rows[i].n || (list.n && memcmp(list.ids, rows[i].ids, list.n * sizeof *list.ids) != 0))
            test_fail("row %d, %s: %zu ids", i, rows[i].text, list.n);
        tokens_free(&list);
    }
    if (!err.text[0]) {
        TokenList list = encode(&t, (const uint8_t *)"ab<a>", 5, false);
        CHECK(list.n == 4 && list.ids[0] == 256 && list.ids[1] == '<' && list.ids[2] == 'a');
        tokens_free(&list);
        tokenizer_free(&t);
    }
    test_end("test_longest_special_token_is_parsed");
}

enum { ADDED_ORDINARY = 264, MAX_ADDED = 16 };

// A set of tests/vectors/added-tokens.tsv: the ordinary tokens, then [id, text, kind, pass] each, as JSON. as_special:
// all are special.
static void init_added_set(Tokenizer *t, const Vocabulary *ordinary, char *json, size_t n, bool as_special) {
    Vocabulary v = *ordinary;
    Error err = {""};
    Json j = {json, json, json + n, &err, "added-tokens.tsv"};
    int second[MAX_ADDED], n_second = 0;
    bool ok = json_expect(&j, '[');
    do {
        char *text;
        size_t length;
        uint64_t id, kind, pass;
        ok = ok && json_expect(&j, '[') && json_uint(&j, &id) && json_expect(&j, ',') &&
             json_string(&j, &text, &length) && json_expect(&j, ',') && json_uint(&j, &kind) && json_expect(&j, ',') &&
             json_uint(&j, &pass) && json_expect(&j, ']') && id == (uint64_t)v.vocab_size;
        if (!ok) break;
        uint32_t at = v.offsets[v.vocab_size];
        memcpy(v.bytes + at, text, length);
        v.kind[v.vocab_size] = as_special ? TOKEN_SPECIAL : (uint8_t)kind;
        v.offsets[++v.vocab_size] = at + (uint32_t)length;
        if (pass == 2) second[n_second++] = (int)id;
    } while (json_next(&j, ','));
    ok = ok && json_expect(&j, ']') && json_end(&j) && init_vocabulary(t, &v, v.offsets[v.vocab_size], &err) &&
         tokenizer_second_pass(t, second, n_second, &err);
    if (!ok) test_fail("a set of added tokens: %s", err.text);
}

static void check_added(const Tokenizer *t, int line, const char *text, size_t n, AddedTokens which, const char *ids) {
    TokenList got = {0}, want = parse_ids(ids);
    Error err = {""};
    if (!tokenizer_encode_added(t, (const uint8_t *)text, n, which, &got, &err) || !same_ids(&got, &want))
        test_fail("line %d: %zu ids, expected %zu %s", line, got.n, want.n, err.text);
    tokens_free(&got);
    tokens_free(&want);
}

// HuggingFace tokenizers' ids, where added tokens of all kinds overlap. As ordinary characters special tokens are as if
// the caller had named each; and so are added ones that it names, as if they were special.
static void test_added_tokens_are_found_as_tokenizers_does(void) {
    size_t size;
    char *file = read_file("tests/vectors/added-tokens.tsv", &size), *at = file, *fields[3];
    Vocabulary ordinary = small_vocabulary();
    ordinary.vocab_size = 256;
    Tokenizer t = {0}, specials = {0};
    int rows = 0, line_number = 0, added[MAX_ADDED], every[MAX_ADDED];
    for (char *line; file && (line = next_line(&at));) {
        line_number++;
        int n = split_fields(line, fields, 3);
        if (strcmp(fields[0], "ordinary") == 0 && n == 3) {
            uint32_t begin = ordinary.offsets[ordinary.vocab_size];
            size_t length;
            uint8_t *bytes = from_hex(fields[2], &length);
            CHECK(strtol(fields[1], NULL, 10) == ordinary.vocab_size && length < 8);
            memcpy(ordinary.bytes + begin, bytes, length);
            ordinary.kind[ordinary.vocab_size] = TOKEN_MERGEABLE;
            ordinary.offsets[++ordinary.vocab_size] = begin + (uint32_t)length;
            free(bytes);
        } else if (strcmp(fields[0], "set") == 0 && n == 2) {
            char *copy = strdup(fields[1]);
            size_t length = strlen(copy);
            tokenizer_free(&t);
            tokenizer_free(&specials);
            init_added_set(&t, &ordinary, fields[1], length, false);
            init_added_set(&specials, &ordinary, copy, length, true);
            free(copy);
        } else if (n == 3 && t.vocab_size) {
            Error err = {""};
            Json j = {fields[1], fields[1], fields[1] + strlen(fields[1]), &err, "added-tokens.tsv"};
            char *text;
            size_t length;
            if (!json_string(&j, &text, &length)) test_fail("line %d: %s", line_number, err.text);
            bool special = strcmp(fields[0], "special") == 0;
            int n_added = 0, n_every = 0;
            for (int id = ordinary.vocab_size; id < t.vocab_size; id++) {
                if (t.kind[id] == TOKEN_SPECIAL) every[n_every++] = id;
                if (t.kind[id] == TOKEN_ADDED) added[n_added++] = id;
            }
            check_added(&t, line_number, text, length, (AddedTokens){.special = special}, fields[2]);
            if (!special) {
                check_added(&t, line_number, text, length, (AddedTokens){true, every, n_every}, fields[2]);
                check_added(&specials, line_number, text, length, (AddedTokens){true, every, n_every}, fields[2]);
            }
            TokenList none = encode(&specials, (const uint8_t *)text, length, false), named = {0};
            bool ok = tokenizer_encode_added(&t, (const uint8_t *)text, length, (AddedTokens){false, added, n_added},
                                             &named, &err);
            if (!ok || !same_ids(&none, &named))
                test_fail("line %d: tokens that are never to be found are", line_number);
            tokens_free(&none);
            tokens_free(&named);
            rows++;
        }
    }
    tokenizer_free(&t);
    tokenizer_free(&specials);
    free(file);
    CHECK(ordinary.vocab_size == ADDED_ORDINARY && rows >= 288);
    test_end("test_added_tokens_are_found_as_tokenizers_does");
}

// Bytes, "ab", a special token, an unused id, then added tokens from 259 on.
static Vocabulary added_vocabulary(const char *const *texts, int n) {
    Vocabulary v = small_vocabulary();
    for (int i = 0; i < n; i++) {
        int id = v.vocab_size++;
        memcpy(v.bytes + v.offsets[id], texts[i], strlen(texts[i]));
        v.offsets[id + 1] = v.offsets[id] + (uint32_t)strlen(texts[i]);
        v.kind[id] = TOKEN_ADDED;
    }
    return v;
}

static void test_added_tokens_by_name_and_pass(void) {
    static const char *const texts[] = {"<think>", "<t", "a longer text than any other", "<end>"};
    Vocabulary v = added_vocabulary(texts, LENGTH(texts));
    Tokenizer t;
    Error err = {""};
    if (!init_vocabulary(&t, &v, v.offsets[v.vocab_size], &err)) test_fail("%s", err.text);
    CHECK(tokenizer_added(&t, "<think>") == 259 && tokenizer_added(&t, "<t") == 260 &&
          tokenizer_added(&t, "<end>") == 257 && tokenizer_added(&t, "<thin") == -1 && tokenizer_added(&t, "") == -1 &&
          tokenizer_added(&t, "<think>>") == -1 && tokenizer_added(&t, "ab") == -1);
    CHECK(tokenizer_special(&t, "<think>") == -1 && tokenizer_special(&t, "<end>") == 257);
    CHECK(t.max_token_bytes == strlen(texts[2]));
    CHECK(tokenizer_second_pass(&t, (const int[]){259}, 1, &err));
    CHECK(tokenizer_added(&t, "<think>") == 259 && tokenizer_added(&t, "<t") == 260);
    check_added(&t, 0, "ab<think><end>", 14, (AddedTokens){.special = true}, "256 260 104 105 110 107 62 257");
    check_added(&t, 0, "<think>", 7, (AddedTokens){.special = true, .never = (const int[]){260}, .n_never = 1}, "259");
    CHECK(tokenizer_second_pass(&t, NULL, 0, &err));
    check_added(&t, 0, "ab<think><end>", 14, (AddedTokens){.special = false}, "256 259 60 101 110 100 62");
    check_added(&t, 0, "<think>", 7, (AddedTokens){.never = (const int[]){259}, .n_never = 1},
                "60 116 104 105 110 107 62");
    check_added(&t, 0, "\xFF<think>\xFF", 9, (AddedTokens){.special = false}, "255 259 255");
    CHECK(err.text[0] == 0);
    tokenizer_free(&t);
    test_end("test_added_tokens_by_name_and_pass");

    static const struct {
        int n, ids[3];
        const char *message;
    } refused[] = {{1, {65}, "token 65 is in the second pass, expected a special or added token"},
                   {1, {258}, "token 258 is in the second pass"},
                   {1, {263}, "token 263 is in the second pass"},
                   {1, {-1}, "token -1 is in the second pass"},
                   {2, {259, 257}, "token 257 after token 259 in the second pass, expected ascending ids"},
                   {2, {257, 257}, "token 257 after token 257 in the second pass"}};
    for (int i = 0; i < LENGTH(refused); i++) {
        err.text[0] = 0;
        if (!init_vocabulary(&t, &v, v.offsets[v.vocab_size], &err)) test_fail("%s", err.text);
        CHECK(!tokenizer_second_pass(&t, refused[i].ids, refused[i].n, &err) && strstr(err.text, refused[i].message));
        tokenizer_free(&t);
    }
    test_end("test_second_pass_of_other_tokens_is_refused");
    v.offsets[260] = v.offsets[259];
    check_refused("test_vocabulary_empty_added_token_is_refused", &v, v.offsets[v.vocab_size], "token 259 is empty");
}

// With a vocabulary where it shows: white-space tokens before the last piece go with it, as far as they are of space,
// LF and tab alone.
static void test_bad_byte_takes_all_space_tokens_before_it(void) {
    Vocabulary v = {.vocab_size = 260};
    for (uint32_t b = 0; b < 256; b++) v.bytes[v.offsets[b] = b] = (uint8_t)b;
    memcpy(v.bytes + 256, "\n \t\n\r\nab", 8);
    for (uint32_t id = 256; id <= 260; id++) v.offsets[id] = 256 + 2 * (id - 256);
    Tokenizer t;
    Error err = {""};
    if (init_vocabulary(&t, &v, 264, &err)) {
        static const struct {
            const char *text;
            int n, ids[8];
        } rows[] = {{"a\n \xFF", 3, {'a', 256, 0xFF}},   // pieces a, LF, space: LF and the space are merged after all
                    {"a\n x", 4, {'a', '\n', ' ', 'x'}}, // as they are not in good text
                    {"a\t\n \xFF", 4, {'a', '\t', 256, 0xFF}},  // tab-LF was a token, and is cut open
                    {"a\r\n \xFF", 4, {'a', 258, ' ', 0xFF}},   // CR-LF stays
                    {"ab\n\n \xFF", 4, {259, '\n', 256, 0xFF}}, // a token that is not of space stops it
                    {"\n\n \xFF", 3, {'\n', 256, 0xFF}},        // and the beginning of the text
                    {"\nb\xFF", 3, {'\n', 'b', 0xFF}}};
        for (int i = 0; i < LENGTH(rows); i++) {
            TokenList list = encode(&t, (const uint8_t *)rows[i].text, strlen(rows[i].text), false);
            if (list.n != (size_t)rows[i].n || memcmp(list.ids, rows[i].ids, list.n * sizeof *list.ids) != 0)
                test_fail("row %d: %zu ids, id 1 is %d", i, list.n, list.n > 1 ? list.ids[1] : -1);
            tokens_free(&list);
        }
        tokenizer_free(&t);
    } else
        test_fail("%s", err.text);
    test_end("test_bad_byte_takes_all_space_tokens_before_it");
}

// ---- byte pair encoding
// -----------------------------------------------------------------------------------------------

// The rule as it is stated: join the adjacent pair of the lowest rank, the leftmost among equals, until there is none.
static TokenList naive_bpe(const Tokenizer *t, const uint8_t *piece, size_t n) {
    TokenList parts = {0};
    Error err = {""};
    int whole = tokenizer_find(t, piece, n);
    if (whole >= 0) {
        tokens_append(&parts, whole, &err);
        return parts;
    }
    for (size_t i = 0; i < n; i++) tokens_append(&parts, tokenizer_find(t, piece + i, 1), &err);
    for (;;) {
        int best = -1;
        size_t best_at = 0, begin = 0;
        for (size_t i = 0; i + 1 < parts.n; i++) {
            size_t a, b;
            tokenizer_bytes(t, parts.ids[i], &a);
            tokenizer_bytes(t, parts.ids[i + 1], &b);
            int rank = tokenizer_find(t, piece + begin, a + b);
            if (rank >= 0 && (best < 0 || rank < best)) best = rank, best_at = i;
            begin += a;
        }
        if (best < 0) return parts;
        parts.ids[best_at] = best;
        memmove(parts.ids + best_at + 1, parts.ids + best_at + 2, (parts.n - best_at - 2) * sizeof *parts.ids);
        parts.n--;
    }
}

// A text before a bad byte, cut where tiktoken's rule cuts: what comes before is encoded as ever, the rest is one
// piece.
static void test_bad_byte_takes_the_piece_and_spaces_before_it(const Tokenizer *t) {
    static const char *const rows[][2] = {{"", "\xFF"},           {"", "a\xFF"},
                                          {"a", " b\xFF"},        {"a", " \xFF"},
                                          {"a", "\n  \xFF"},      {"", "\n  \xFFx y"},
                                          {"a", "\n\t \n  \xFF"}, {"a\r\n", "  \xFF"},
                                          {"12", "\n  \xFF 12"},  {"a.\n\n", "    \xFF"},
                                          {"123", "4\xFF"},       {"don", "'t\xFF"},
                                          {"a\n\n", " b\xFF"},    {"a\xC2\xA0\n", " \xFF"},
                                          {"a", " \xE4\xB8"},     {"a\xE4\xB8\x96", "!\xE4\xB8\xFF\xE4\xB8\x96 a b"}};
    for (int i = 0; i < LENGTH(rows); i++) {
        char text[64];
        Error err = {""};
        size_t n_before = strlen(rows[i][0]), n_tail = strlen(rows[i][1]);
        snprintf(text, sizeof text, "%s%s", rows[i][0], rows[i][1]);
        TokenList got = encode(t, (uint8_t *)text, n_before + n_tail, false),
                  want = encode(t, (uint8_t *)text, n_before, false);
        TokenList tail = naive_bpe(t, (uint8_t *)text + n_before, n_tail);
        for (size_t j = 0; j < tail.n; j++) tokens_append(&want, tail.ids[j], &err);
        if (!same_ids(&got, &want)) test_fail("row %d: %zu ids, expected %zu", i, got.n, want.n);
        tokens_free(&got);
        tokens_free(&want);
        tokens_free(&tail);
    }
    test_end("test_bad_byte_takes_the_piece_and_spaces_before_it");
}

// Lengths on both sides of every switch between methods, over alphabets that merge a little, a lot, and in long ties.
static void test_bpe_equals_the_naive_rule(const Tokenizer *t, const char *name) {
    static const char *const alphabets[] = {
        "a", "ab", " ", " \n", "etaoinshr", "0123456789", "<>=!-", "aeiou\xC3\xA9\xE4\xB8\x96", NULL};
    int pieces = 0;
    for (size_t n = 1; n <= 300; n += n < 140 ? 1 : 37)
        for (int a = 0; a < LENGTH(alphabets); a++)
            for (int repeat = 0; repeat < (n >= 60 && n <= 70 ? 6 : 2); repeat++, pieces++) {
                uint8_t *piece = malloc(n);
                for (size_t i = 0; i < n; i++)
                    piece[i] = alphabets[a] ? (uint8_t)alphabets[a][random_below((uint32_t)strlen(alphabets[a]))]
                                            : (uint8_t)random_below(256);
                if (a == 4 && repeat == 1) // words that repeat
                    for (size_t i = 7; i < n; i++) piece[i] = piece[i - 7];
                TokenList got = {0}, want = naive_bpe(t, piece, n);
                Error err = {""};
                if (!bpe_encode(t, piece, n, &got, &err)) test_fail("%s", err.text);
                if (!same_ids(&got, &want))
                    test_fail("a piece of %zu bytes, alphabet %d: %zu ids, expected %zu", n, a, got.n, want.n);
                tokens_free(&got);
                tokens_free(&want);
                free(piece);
            }
    CHECK(pieces > 2000);
    test_end(name);
}

// What bpe_encode_text does with a cache and with cuts, done without: the pieces one by one, each by the rule.
static void test_encode_equals_its_pieces_one_by_one(const Tokenizer *t, const char *name) {
    static const uint32_t some[] = {' ',    ' ',    '\n',   'a',     'e',     't',    '1',     '!',    '\'',   's',
                                    0x301,  0x416,  0x43E,  0x440,   0x430,   0x4E00, 0x4E16,  0x754C, 0x4E2D, 0x56FD,
                                    0x3042, 0x3044, 0x306E, 0x30FC,  0xFF0C,  0x3002, 0xAC00,  0xD55C, 0x0E01, 0x0E32,
                                    0x0939, 0x093F, 0x628,  0x1F600, 0x1F44D, 0x200D, 0x1F3FD, 0xFE0F};
    for (int round = 0; round < 3000; round++) {
        uint8_t text[4 * 400];
        size_t n = 0;
        // few characters, so that pieces come again; or all, so that places are taken over
        uint32_t first = random_below(LENGTH(some)), kinds = round % 3 ? 1 + random_below(4) : LENGTH(some);
        for (uint32_t left = 1 + random_below(round % 16 ? 60 : 400); left > 0; left--)
            n += (size_t)utf8_encode(some[(first + random_below(kinds)) % LENGTH(some)], text + n);
        TokenList got = encode(t, text, n, false), want = {0};
        Error err = {""};
        for (size_t at = 0, length; at < n; at += length) {
            length = split_next(text + at, n - at);
            TokenList piece = naive_bpe(t, text + at, length);
            for (size_t i = 0; i < piece.n; i++) tokens_append(&want, piece.ids[i], &err);
            tokens_free(&piece);
        }
        if (!same_ids(&got, &want)) test_fail("round %d, %zu bytes: %zu ids, expected %zu", round, n, got.n, want.n);
        tokens_free(&got);
        tokens_free(&want);
    }
    test_end(name);
}

// The promise that cuts rest on: each step inside a token is known to be one, whatever lies around the token.
static void test_every_step_inside_a_token_is_spanned(const Tokenizer *t, const char *name) {
    for (int id = 0; id < t->vocab_size; id++) {
        size_t n;
        const uint8_t *bytes = tokenizer_bytes(t, id, &n);
        if (t->kind[id] != TOKEN_MERGEABLE || n > 200) continue;
        uint8_t text[208];
        for (int around = 0; around < 3; around++) {
            size_t before = (size_t)around;
            memset(text, 0xE4, sizeof text);
            memcpy(text + before, bytes, n);
            for (size_t at = 1; at < n; at++)
                if (!tokenizer_spans(t, text, before + at, before + n + (size_t)around))
                    test_fail("token %d: the step before byte %zu is taken for none", id, at);
        }
    }
    test_end(name);
}

// A megabyte that the pattern does not cut, or cuts into very many pieces.
static void test_megabyte(const Tokenizer *t, const char *name, const char *alphabet, bool valid) {
    enum { N = 1 << 20 };
    uint8_t *text = malloc(N);
    uint32_t letters = (uint32_t)strlen(alphabet);
    for (size_t i = 0; i < N; i++) text[i] = (uint8_t)alphabet[letters > 1 ? random_below(letters) : 0];
    if (!valid) text[0] = 0xFF;
    TokenList list = encode(t, text, N, false);
    CHECK(list.n > 0 && list.n <= N && decodes_to(t, &list, text, N));
    tokens_free(&list);
    free(text);
    test_end(name);
}

static void test_megabytes(const Tokenizer *t) {
    test_megabyte(t, "test_megabyte_of_one_letter_round_trips", "a", true);
    test_megabyte(t, "test_megabyte_of_spaces_round_trips", " ", true);
    test_megabyte(t, "test_megabyte_of_digits_round_trips", "0123456789", true);
    test_megabyte(t, "test_megabyte_of_newlines_round_trips", "\n", true);
    test_megabyte(t, "test_megabyte_without_a_space_round_trips", "abcdefghijklmnopqrstuvwxyz", true);
    test_megabyte(t, "test_megabyte_of_mixed_space_round_trips", " \t\r\n", true);
    test_megabyte(t, "test_megabyte_of_apostrophes_round_trips", "'", true);
    test_megabyte(t, "test_megabyte_after_a_bad_byte_round_trips", "etaoin shrdlu", false);
}

// ---- all of it ------------------------------------------------------------------------------------------------------

static void test_with_llama3(void) {
    Tokenizer t;
    if (!load_llama3(&t)) {
        test_skip("what needs LLaMA 3's vocabulary", "no " SHARED "tokenizer.model");
        return;
    }
    test_golden(&t);
    test_golden_special(&t);
    test_every_token_is_found(&t, "test_every_llama3_token_is_found");
    test_random_bytes_round_trip(&t, "test_random_bytes_round_trip_with_llama3");
    test_bpe_equals_the_naive_rule(&t, "test_bpe_equals_the_naive_rule_with_llama3");
    test_encode_equals_its_pieces_one_by_one(&t, "test_encode_equals_its_pieces_one_by_one_with_llama3");
    test_every_step_inside_a_token_is_spanned(&t, "test_every_step_inside_a_token_is_spanned_with_llama3");
    test_bad_byte_takes_the_piece_and_spaces_before_it(&t);
    test_megabytes(&t);
    tokenizer_free(&t);
}

static void test_with_stories(void) {
    const char *path = "model/stories.bin";
    FILE *f = fopen(path, "rb");
    if (!f) {
        test_skip("what needs the story model's vocabulary", "no model/stories.bin");
        return;
    }
    fclose(f);
    Model m;
    Error err = {""};
    if (!checkpoint_open(&m, path, true, &err)) test_fail("%s", err.text);
    test_end("test_stories_vocabulary_is_accepted");
    if (err.text[0]) return;
    test_stories_vectors(&m.tokenizer);
    test_every_token_is_found(&m.tokenizer, "test_every_stories_token_is_found");
    test_random_bytes_round_trip(&m.tokenizer, "test_random_bytes_round_trip_with_stories");
    test_bpe_equals_the_naive_rule(&m.tokenizer, "test_bpe_equals_the_naive_rule_with_stories");
    test_encode_equals_its_pieces_one_by_one(&m.tokenizer, "test_encode_equals_its_pieces_one_by_one_with_stories");
    test_every_step_inside_a_token_is_spanned(&m.tokenizer, "test_every_step_inside_a_token_is_spanned_with_stories");
    test_megabyte(&m.tokenizer, "test_megabyte_round_trips_with_stories", "etaoin shrdlu\n", true);
    model_close(&m);
}

int main(void) {
    test_utf8_round_trips_every_code_point();
    test_utf8_decodes_only_what_is_well_formed();
    test_utf8_incomplete_tail_is_what_can_be_completed();
    test_utf8_tail_holds_every_split_character();
    test_unicode_classes();
    test_split_rules();
    test_split_covers_any_text();
    test_vocabulary_refusals();
    test_longest_special_token_is_parsed();
    test_added_tokens_are_found_as_tokenizers_does();
    test_added_tokens_by_name_and_pass();
    test_bad_byte_takes_all_space_tokens_before_it();
    test_with_llama3();
    test_with_stories();
    return tests_summary();
}
