// Fuzz target: what a user gives as a prompt. The input's first byte says how to read the rest: a prompts file ('p'),
// one for a model with a chat format ('3' llama3, '1' llama3.1, 'c' chatml, 'd' deepseek), a chat message ('m'), ids
// ('i') or text (any other).
#include "fuzz.h"

#include "../cli/input.h"
#include "../cli/prompts.h"
#include "../model/file/json.h"
#include "../tokenizer/encode.h"

// The 256 bytes, and the tokens of all templates.
static const struct {
    const char *text;
    TokenKind kind;
} tokens[] = {{"<|begin_of_text|>", TOKEN_SPECIAL},
              {"<|end_of_text|>", TOKEN_SPECIAL},
              {"<|start_header_id|>", TOKEN_SPECIAL},
              {"<|end_header_id|>", TOKEN_SPECIAL},
              {"<|eot_id|>", TOKEN_SPECIAL},
              {"<|im_start|>", TOKEN_SPECIAL},
              {"<|im_end|>", TOKEN_ADDED},
              {"<\uFF5CUser\uFF5C>", TOKEN_ADDED},
              {"<\uFF5CAssistant\uFF5C>", TOKEN_ADDED},
              {"<\uFF5Cend\u2581of\u2581sentence\uFF5C>", TOKEN_SPECIAL},
              {"<think>", TOKEN_ADDED},
              {"</think>", TOKEN_ADDED}};
enum { N_TOKENS = sizeof tokens / sizeof *tokens, VOCAB = 256 + N_TOKENS };

static Model model;

int LLVMFuzzerInitialize(int *argc, char ***argv) {
    (void)argc, (void)argv;
    uint32_t *offsets = malloc((VOCAB + 1) * sizeof *offsets), at = 0;
    uint8_t *kind = malloc(VOCAB), *bytes = malloc(4096);
    Error err = {""};
    MUST(offsets && kind && bytes);
    for (int id = 0; id < VOCAB; id++) {
        offsets[id] = at;
        kind[id] = (uint8_t)(id < 256 ? TOKEN_MERGEABLE : tokens[id - 256].kind);
        if (id < 256) bytes[at++] = (uint8_t)id;
        for (const char *c = id < 256 ? "" : tokens[id - 256].text; *c; c++) bytes[at++] = (uint8_t)*c;
    }
    offsets[VOCAB] = at;
    model.config = (Config){.vocab_size = VOCAB, .bos_id = 256, .max_seq_len = 1000};
    MUST(tokenizer_init(&model.tokenizer, VOCAB, offsets, kind, bytes, at, &err));
    return 0;
}

// The model's chat format, which the first byte says, with a system message of its own for some.
static void set_chat_format(uint8_t first, size_t n) {
    Config *c = &model.config;
    c->chat_format = first == '3'   ? CHAT_LLAMA3
                     : first == '1' ? CHAT_LLAMA3_1
                     : first == 'c' ? CHAT_CHATML
                     : first == 'd' ? CHAT_DEEPSEEK
                     : first == 'm' ? (ChatFormat)(1 + n % 4)
                                    : CHAT_NONE;
    c->chat_bos_id = n % 3 ? 256 : -1;
    c->chat_system = n % 2 ? "Own <|eot_id|><|im_end|> text." : NULL;
    c->chat_date = n % 5 ? NULL : "1 May 2031";
}

static void must_be_ids(const TokenList *ids) {
    for (size_t i = 0; i < ids->n; i++) MUST(ids->ids[i] >= 0 && ids->ids[i] < VOCAB);
}

// A message adds the template's own tokens, as many as an empty one, and none of its text.
static void check_message(const Bytes *text) {
    Options o = flags_default();
    o.quiet = true;
    Error err = {""};
    Chat chat;
    TokenList ids[2] = {{0}, {0}};
    const Bytes empty = {0};
    size_t own[2] = {0, 0};
    MUST(open_chat(&o, &model, &chat, &err));
    for (int i = 0; i < 2; i++) {
        MUST(encode_message(&o, &chat, i ? text : &empty, &ids[i], &err));
        must_be_ids(&ids[i]);
        for (size_t k = 0; k < ids[i].n; k++) {
            bool is_own = model.tokenizer.kind[ids[i].ids[k]] == TOKEN_SPECIAL;
            for (int t = 0; t < chat.n_own; t++) is_own = is_own || chat.own[t] == ids[i].ids[k];
            own[i] += is_own;
        }
    }
    MUST(own[0] == own[1] && ids[1].n <= ids[0].n + text->n);
    // As an answer, it becomes what the template writes for one.
    size_t header = ids[0].n, answer;
    MUST(chat_reply_header(&chat, &ids[0], &err));
    answer = ids[0].n;
    MUST(tokenizer_encode(&model.tokenizer, (const uint8_t *)text->data, text->n, true, &ids[0], &err));
    MUST(chat_end_reply(&chat, header, answer, false, &ids[0], &err));
    MUST(ids[0].n > header && (ids[0].ids[ids[0].n - 1] == chat.end || chat.format == CHAT_CHATML));
    for (int i = 0; i < 2; i++) tokens_free(&ids[i]);
}

// Every line is a sequence or an error. What is printed of it is JSON again: an object with the keys that come back.
static void check_lines(const Prompts *p) {
    int n_seqs = 0;
    for (int i = 0; i < p->n; i++) {
        const PromptLine *line = &p->lines[i];
        MUST(line->number > i && (i == 0 || line->number > p->lines[i - 1].number));
        for (const char *c = line->error ? line->error : ""; *c; c++) MUST((unsigned char)*c >= 0x20 && *c != 0x7F);
        if (!line->error) {
            const Sequence *seq = &p->seqs[n_seqs++];
            MUST(seq->index == i && seq->prompt.n > 0 && seq->config.n >= 0);
            MUST(seq->config.n_stops == 0 || seq->config.stops);
            for (int k = 0; k < seq->config.n_stops; k++) MUST(*seq->config.stops[k]);
            must_be_ids(&seq->prompt);
        }
        if (line->other.n == 0) continue;
        Error err = {""};
        char *text, *object = malloc(line->other.n + 2);
        size_t n;
        MUST(object);
        memcpy(object, line->other.data, line->other.n);
        object[0] = '{'; // in place of the comma
        object[line->other.n] = '}';
        object[line->other.n + 1] = 0;
        Json json = {object, object, object + line->other.n + 1, &err, NULL};
        MUST(json_raw(&json, &text, &n) && json_end(&json));
        free(object);
    }
    MUST(n_seqs == p->n_seqs);
}

int LLVMFuzzerTestOneInput(const uint8_t *input, size_t n) {
    if (n == 0) return 0;
    Options o = flags_default();
    o.quiet = true;
    o.n = n % 13 ? 16 : 0;
    Error err = {""};
    char *copy = malloc(n); // the input without its first byte, and a NUL
    MUST(copy);
    memcpy(copy, input + 1, n - 1);
    copy[n - 1] = 0;
    Bytes text = {.data = copy, .n = n - 1};
    set_chat_format(input[0], n);
    if (strchr("p31cd", input[0]) && input[0]) {
        Prompts prompts = {.file = text};
        o.prompts = "prompts";
        if (n % 7 == 0) o.system = "A user's <|eot_id|>.";
        if (n % 11 == 0 && input[0] == '1') o.date = "<|eot_id|>";
        must_explain(prompts_parse(&o, &model, &prompts, &err), &err);
        check_lines(&prompts);
        copy = NULL; // the prompts'
        prompts_free(&prompts);
    } else if (input[0] == 'm') {
        check_message(&text);
    } else {
        TokenList ids = {0};
        o.ids = input[0] == 'i';
        o.special = input[0] == 's';
        must_explain(encode_prompt(&o, &model, &text, &ids, &err), &err);
        must_be_ids(&ids);
        tokens_free(&ids);
    }
    free(copy);
    return 0;
}
