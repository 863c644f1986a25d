// How one model is cut for several GPUs. Rows are what is split,
// of every matrix of the layers and of the output matrix:
//
//   wq, wk, wv    by K/V head: whole heads, with the queries that share them, so that attention needs nobody else
//   wo, w2        at the same rows, those of the residual stream that a shard has
//   w1, w3        at the same rows, so that SwiGLU needs nobody else; what comes out are columns of w2's input
//   output        rows of the vocabulary
//
// Norms and the embedding table are whole everywhere: a look-up reads a row, and rows that lie elsewhere would be one
// exchange more in every step. Every dot product is computed whole, by one shard, in the order in which one GPU alone
// computes it; what shards exchange is gathered, never summed (comm.h).
// So the bits do not depend on how many there are.
//
// Who owns what: Config stays that of the whole model; a Shard says which part of it a GPU holds; Matrix.rows is what
// an engine holds of a matrix. Nothing here knows of devices: tests/test_shard.c computes a model by shards without
// any.
#ifndef SHARD_H
#define SHARD_H

#include "../model.h"

// Rows are cut at multiples of this, K/V heads at any, so that the tiles of every kernel are whole but the last
// shard's; shards, at most.
enum { SHARD_UNIT = 16, MAX_SHARDS = 16 };

// Whether the model can be cut into so many shards: they divide its K/V heads, and each has rows of every matrix. The
// message says how many would do. flag: what asks for so many.
bool shard_check(const Config *c, const char *flag, int count, Error *err);
// The part of rank `rank`, 0 <= rank < count, of a model that shard_check takes. Parts differ by a unit at most, and
// the last one has what is left of the last unit: the first are the largest.
Shard shard_of(const Config *c, int rank, int count);
// Rows of the tensor with that name in the file (weights_visit's) that a shard holds; of a norm its only one.
Rows shard_rows(const Shard *s, const Config *c, const Weight *w);

#endif
