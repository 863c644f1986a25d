// --chat: a conversation in the terminal, or line by line through a pipe.
#ifndef CONVERSE_H
#define CONVERSE_H

#include "../model/generate/generate.h"
#include "../tokenizer/chat.h"
#include "flags.h"

// Runs until the end of input. The model has a cache of one slot; what it holds of the conversation is kept from turn
// to turn. chat: the template. speculation: for its answers; NULL: none.
bool converse(const Options *o, Model *m, const Chat *chat, Speculation *speculation, Error *err);

#endif
