// Messages to ids, as HuggingFace's chat templates write for LLaMA 3 and 3.1.
#ifndef CHAT_H
#define CHAT_H

#include "tokenizer.h"

typedef enum { CHAT_NONE, CHAT_LLAMA3, CHAT_LLAMA3_1, CHAT_CHATML, CHAT_DEEPSEEK } ChatFormat;

// The day that the template of LLaMA 3.1 says it is, unless another is given: a run stays reproducible.
#define CHAT_DATE "26 Jul 2024"

typedef struct {
    const Tokenizer *tokenizer;
    ChatFormat format;
    int bos;                           // -1: none
    int start_header, end_header, eot; // the special tokens of the template
} Chat;

// Looks the template's special tokens up. Refuses CHAT_NONE, and a vocabulary that lacks one of them.
bool chat_init(Chat *c, const Tokenizer *t, ChatFormat format, int bos_id, Error *err);

// All of these append to out. A conversation is chat_begin, once; then for each turn chat_message with the user's text,
// chat_reply_header, the ids that the model answers with, and chat.eot if its answer did not end with it: each turn
// adds its own ids and changes none before them.

// BOS and the system message, n bytes without the white space around them. system NULL: none, for which LLaMA 3 writes
// nothing and LLaMA 3.1 still its block with the date. date: CHAT_DATE, or what to put in its place; only LLaMA 3.1
// uses it.
bool chat_begin(const Chat *c, const uint8_t *system, size_t n, const char *date, TokenList *out, Error *err);

// One message, any bytes, without the white space around it. Special tokens written in it are ordinary characters.
bool chat_message(const Chat *c, const char *role, const uint8_t *text, size_t n, TokenList *out, Error *err);

// The header that an answer of the model follows.
bool chat_reply_header(const Chat *c, TokenList *out, Error *err);

#endif
