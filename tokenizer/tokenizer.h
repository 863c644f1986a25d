// Byte-level BPE with LLaMA 3's split pattern (tiktoken's algorithm): bytes to token ids and back.
#ifndef TOKENIZER_H
#define TOKENIZER_H

#include "bytes.h"

// As tokenizer.kind has them. Special and added tokens are matched in text before it is split (encode.h); an added
// token is not special: it counts wherever text is encoded, and prints as text.
typedef enum { TOKEN_MERGEABLE, TOKEN_SPECIAL, TOKEN_UNUSED, TOKEN_ADDED } TokenKind;

typedef struct {
    int id;
    uint32_t length; // of its text
} SpecialToken;

// A byte of the texts of added tokens, after those on the way to it. 0: there is no such node.
typedef struct {
    uint32_t child, sibling;
    int id; // of the token that ends here; -1: none
    uint8_t byte;
} AddedNode;

// Special and added tokens that are looked for together.
typedef struct {
    AddedNode *tree;  // their texts byte by byte, from the root, [0]; NULL: there are none
    bool begins[256]; // whether a text begins with this byte
    int n_added;      // how many are not special
} AddedPass;

// Text is searched once for each, the second time what the first leaves.
enum { ADDED_PASSES = 2 };

// A mergeable token in the hash table: its bytes themselves up to eight of them, else a hash that the bytes then
// confirm.
typedef struct {
    uint64_t key;
    uint32_t length; // 0: an empty slot
    int id;
} TokenSlot;

typedef struct {
    int vocab_size;
    uint32_t *offsets; // [vocab_size+1]: token i is bytes[offsets[i] .. offsets[i+1])
    uint8_t *kind;     // [vocab_size], TokenKind; a mergeable token's id is its rank
    uint8_t *bytes;
    uint32_t max_token_bytes; // of the mergeable and the added tokens
    int byte_ids[256];        // the token of each single byte
    int (*pair_ids)[256];     // [256]: the token of each two bytes, -1: none
    TokenSlot *slots;         // [n_slots]
    uint32_t n_slots;         // a power of two
    uint64_t *spans;          // bits at the hashes of what is around a boundary inside a token: tokenizer_spans
    SpecialToken *special;    // [n_special], longest text first
    int n_special;
    AddedPass passes[ADDED_PASSES];
} Tokenizer;

// Takes ownership of the three arrays (malloc'd), checks them and builds the index. n_bytes: length of bytes. All
// special and added tokens are in the first pass.
bool tokenizer_init(Tokenizer *t, int vocab_size, uint32_t *offsets, uint8_t *kind, uint8_t *bytes, uint32_t n_bytes,
                    Error *err);
void tokenizer_free(Tokenizer *t);

// Moves these special and added tokens to the second pass, and all others to the first. ids [n], ascending; refuses ids
// of other tokens (t is then to be freed).
bool tokenizer_second_pass(Tokenizer *t, const int *ids, int n, Error *err);

// The bytes of one token; *n may be 0 (an unused id).
static inline const uint8_t *tokenizer_bytes(const Tokenizer *t, int id, size_t *n) {
    *n = t->offsets[id + 1] - t->offsets[id];
    return t->bytes + t->offsets[id];
}

// The id of a special token by its text, or -1.
int tokenizer_special(const Tokenizer *t, const char *text);

// The id of a special or an added token by its text, or -1.
int tokenizer_added(const Tokenizer *t, const char *text);

// The token of this pass, special or added, whose text begins text[0..n), the longest if several do; -1 if none.
int tokenizer_match(const AddedPass *pass, const uint8_t *text, size_t n);

// The id of a mergeable token by its bytes, or -1.
int tokenizer_find(const Tokenizer *t, const uint8_t *bytes, size_t n);

// The same, faster, where eight bytes or more can be read at bytes whatever n is. n > 0.
int tokenizer_find_padded(const Tokenizer *t, const uint8_t *bytes, size_t n);

// Whether some mergeable token may lie across the boundary from text[at-1] to text[at], 0 < at < n. If not, no merge
// ever joins the two sides.
bool tokenizer_spans(const Tokenizer *t, const uint8_t *text, size_t at, size_t n);

#endif
