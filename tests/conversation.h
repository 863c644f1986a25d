// Conversations as the program would hold them, in ids, with models of random weights for chat. What a model answers is
// asked of it a second time, with the whole conversation as one prompt of ids.
#ifndef CONVERSATION_H
#define CONVERSATION_H

#include "model_writer.h"

enum { MOST_IDS = 1 << 14 };

static char chat_path[300]; // a model in LLaMA 3.1's format

// The tokens of ChatML's and deepseek's models, after draft_chat's.
enum { IM_START = CHAT_VOCAB, IM_END, USER, ASSISTANT, SENTENCE_END, THINK };

typedef struct {
    int ids[MOST_IDS], n;
} Ids;

static void add_text(Ids *ids, const char *text) {
    for (; *text; text++) ids->ids[ids->n++] = (uint8_t)*text;
}

static void add_message(Ids *ids, const char *role, const char *text) {
    ids->ids[ids->n++] = START;
    add_text(ids, role);
    ids->ids[ids->n++] = END;
    add_text(ids, "\n\n");
    if (!text) return;
    add_text(ids, text);
    ids->ids[ids->n++] = EOT;
}

__attribute__((unused)) static void add_chatml(Ids *ids, const char *role, const char *text) {
    ids->ids[ids->n++] = IM_START;
    add_text(ids, role);
    add_text(ids, "\n");
    if (!text) return;
    add_text(ids, text);
    ids->ids[ids->n++] = IM_END;
    add_text(ids, "\n");
}

__attribute__((unused)) static void begin_ids(Ids *ids, const char *date, const char *system) {
    char text[512];
    snprintf(text, sizeof text, "Cutting Knowledge Date: December 2023\nToday Date: %s\n\n%s", date, system);
    *ids = (Ids){{BOS}, 1};
    add_message(ids, "system", text);
}

// What the model answers to these ids, as text with a newline, as --chat prints it; the ids go behind, without the end
// id if one ended it.
static size_t ask_model(const char *model, Ids *ids, const char *n, char *text) {
    char *list = must(malloc((size_t)ids->n * 8 + 1)), *at = list;
    for (int i = 0; i < ids->n; i++) at += sprintf(at, "%d ", ids->ids[i]);
    Io io = {.input = list, .n_input = (size_t)(at - list)};
    Run r = run_program(&io, model, "--ids", "-f", "-", "-n", n, "-c", "16384", "--json", "--quiet", NULL);
    check_status(&r, 0);
    const char *found = strstr(r.out, "\"ids\": [");
    size_t length = 0;
    for (char *id = (char *)(found ? found + 8 : "]"), *end; *id != ']'; id = end + strspn(end, ", ")) {
        int last = (int)strtol(id, &end, 10);
        if (end == id) break;
        ids->ids[ids->n++] = last;
        if (last < BYTES) text[length++] = (char)last;
        if (last == THINK) length += (size_t)sprintf(text + length, "<think>"); // added, not special
        if (last == USER) length += (size_t)sprintf(text + length, "<\uFF5CUser\uFF5C>");
    }
    if (strstr(r.out, "\"finish_reason\": \"stop\"")) ids->n--;
    text[length++] = '\n';
    free(list);
    run_free(&r);
    return length;
}

__attribute__((unused)) static size_t ask(Ids *ids, const char *n, char *text) {
    size_t length = ask_model(chat_path, ids, n, text);
    ids->ids[ids->n++] = EOT;
    return length;
}

__attribute__((unused)) static void write_chat_model(Draft *d) {
    snprintf(chat_path, sizeof chat_path, "%s/chat.bin", test_dir);
    draft_chat(d, 1 << 20);
    draft_write(d, chat_path);
}

#endif
