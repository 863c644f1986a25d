// Messages to ids, as HuggingFace's chat templates write for LLaMA 3 and for models tuned from it.
#ifndef CHAT_H
#define CHAT_H

#include "tokenizer.h"

typedef enum { CHAT_NONE, CHAT_LLAMA3, CHAT_LLAMA3_1, CHAT_CHATML, CHAT_DEEPSEEK } ChatFormat;
extern const char *const chat_format_names[]; // by format, as chat_format in a model.bin; NULL at the end

// The day that the template of LLaMA 3.1 says it is, unless another is given: a run stays reproducible.
#define CHAT_DATE "26 Jul 2024"
// In place of a date: the day on which a conversation begins, local time, as "%d %b %Y" in English.
#define CHAT_TODAY "today"

enum { CHAT_MAX_TOKENS = 5, CHAT_MAX_ENDS = 2 };

typedef struct {
    const Tokenizer *tokenizer;
    ChatFormat format;
    int bos;            // what comes first; -1: nothing
    const char *system; // the template's own system message, where a conversation has none; NULL: none
    const char *date;   // for LLaMA 3.1, or CHAT_TODAY; NULL: CHAT_DATE
    // The special tokens of the template, which may be added ones that are not special:
    int start, end_header;           // of a message (LLaMA 3's header, ChatML), and of LLaMA 3's header
    int user, assistant, think;      // deepseek's; think -1: it is no token, but text
    int end;                         // what a message ends with
    int ends[CHAT_MAX_ENDS], n_ends; // tokens that end an answer: end, and <|eom_id|> in LLaMA 3's
    int own[CHAT_MAX_TOKENS], n_own; // all that the template writes: characters wherever they are in a message
} Chat;

// Looks the template's tokens up. No system message of its own and no date: those are the caller's to set. Refuses
// CHAT_NONE, and a vocabulary that lacks one of the tokens.
bool chat_init(Chat *c, const Tokenizer *t, ChatFormat format, int bos_id, Error *err);

// All of these append to out. A conversation is chat_begin, once; then for each turn chat_message with the user's text,
// chat_reply_header, the ids that the model answers with, and chat_end_reply. Each turn adds its own ids and, but for
// deepseek's last answer, changes none before them.

// BOS and the system message, n bytes; NULL: the template's own, if it has one. LLaMA 3.1 writes its block with the
// date even where there is none. date: in place of the template's; NULL: that one. Only LLaMA 3.1 uses it.
bool chat_begin(const Chat *c, const uint8_t *system, size_t n, const char *date, TokenList *out, Error *err);

// One message, any bytes: LLaMA 3 without the white space around it, deepseek's assistant without its thoughts. Special
// tokens, and those that the template writes, are ordinary characters in it.
bool chat_message(const Chat *c, const char *role, const uint8_t *text, size_t n, TokenList *out, Error *err);

// The header that an answer of the model follows.
bool chat_reply_header(const Chat *c, TokenList *out, Error *err);

// What the model answered made a part of the conversation: the header of the answer is at ids[header], the answer's own
// ids are from ids[answer] on. An end id that ended it gives way to the template's own end, which else is added;
// deepseek's is written anew, without its thoughts. ended: whether its last id is such an end.
bool chat_end_reply(const Chat *c, size_t header, size_t answer, bool ended, TokenList *ids, Error *err);

#endif
