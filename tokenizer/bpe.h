// Byte-pair encoding of pieces of text, and of a text piece by piece.
#ifndef BPE_H
#define BPE_H

#include "tokenizer.h"

// Appends the ids of one piece, any bytes, n > 0.
bool bpe_encode(const Tokenizer *t, const uint8_t *piece, size_t n, TokenList *out, Error *err);

// The pieces that a text had so far, and their ids.
typedef struct {
    const Tokenizer *tokenizer;
    struct CachedPiece *places; // [1 << (64 - shift)]
    int shift;
} PieceCache;

bool piece_cache_init(PieceCache *c, const Tokenizer *t, size_t text_bytes, Error *err);
void piece_cache_free(PieceCache *c);

// Appends the ids of text[0..n), valid UTF-8 without special tokens, piece by piece. *last_piece: how many ids
// there were before the last piece.
bool bpe_encode_text(PieceCache *c, const uint8_t *text, size_t n, TokenList *out, size_t *last_piece, Error *err);

#endif
