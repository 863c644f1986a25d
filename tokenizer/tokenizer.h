// Byte-level BPE with LLaMA 3's split pattern (tiktoken's algorithm): bytes to token ids and back.
#ifndef TOKENIZER_H
#define TOKENIZER_H

#include <stddef.h>
#include <stdint.h>

#include "../model/error.h"

typedef enum { TOKEN_MERGEABLE, TOKEN_SPECIAL, TOKEN_UNUSED } TokenKind;

typedef struct {
    int id;
    uint32_t length; // of its text
} SpecialToken;

typedef struct {
    int vocab_size;
    uint32_t *offsets; // [vocab_size+1]: token i is bytes[offsets[i] .. offsets[i+1])
    uint8_t *kind;     // [vocab_size], TokenKind; a mergeable token's id is its rank
    uint8_t *bytes;
    uint32_t max_token_bytes; // of the mergeable tokens
    int byte_ids[256];        // the token of each single byte
    int32_t *slots;           // [n_slots]: hash of a mergeable token's bytes to its id, -1: empty
    uint32_t n_slots;         // a power of two
    SpecialToken *special;    // [n_special], longest text first
    int n_special;
} Tokenizer;

// Ids that grow as they are appended to.
typedef struct {
    int *ids;
    size_t n, capacity;
} TokenList;

bool tokens_append(TokenList *list, int id, Error *err);
void tokens_free(TokenList *list);

// Takes ownership of the three arrays (malloc'd), checks them and builds the index. n_bytes: length of bytes.
bool tokenizer_init(Tokenizer *t, int vocab_size, uint32_t *offsets, uint8_t *kind, uint8_t *bytes, uint32_t n_bytes,
                    Error *err);
void tokenizer_free(Tokenizer *t);

// Appends the ids of text[0..n), any bytes. special: the texts of special tokens become their ids, as HuggingFace does;
// otherwise they are ordinary characters. Adds no BOS. Where text is not UTF-8, follows tiktoken's rule for bytes.
bool tokenizer_encode(const Tokenizer *t, const uint8_t *text, size_t n, bool special, TokenList *out, Error *err);

// The bytes of one token; *n may be 0 (an unused id).
static inline const uint8_t *tokenizer_bytes(const Tokenizer *t, int id, size_t *n) {
    *n = t->offsets[id + 1] - t->offsets[id];
    return t->bytes + t->offsets[id];
}

// The id of a special token by its text, or -1.
int tokenizer_special(const Tokenizer *t, const char *text);

// The id of a mergeable token by its bytes, or -1.
int tokenizer_find(const Tokenizer *t, const uint8_t *bytes, size_t n);

// Length of the first piece of text[0..n), n > 0 and text valid UTF-8: split.c.
size_t split_next(const uint8_t *text, size_t n);

// Appends the ids of one piece, any bytes, n > 0: bpe.c.
bool bpe_encode(const Tokenizer *t, const uint8_t *piece, size_t n, TokenList *out, Error *err);

#endif
