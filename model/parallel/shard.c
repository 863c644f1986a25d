#include "shard.h"

#include <stdio.h>
#include <string.h>

static int units(int rows) {
    return (rows + SHARD_UNIT - 1) / SHARD_UNIT;
}

// Whether every shard has heads and rows. (Parts are of a unit more or less: none is empty if there are as many units.)
static bool can_cut(const Config *c, int count) {
    return count >= 1 && count <= MAX_SHARDS && c->n_kv_heads % count == 0 && units(c->dim) >= count &&
           units(c->hidden_dim) >= count && units(c->vocab_size) >= count;
}

bool shard_check(const Config *c, const char *flag, int count, Error *err) {
    char counts[64] = "";
    int n = 0, last = 0;
    if (can_cut(c, count)) return true;
    for (int i = 1; i <= MAX_SHARDS; i++)
        if (can_cut(c, i)) last = i;
    for (int i = 1; i <= last && n < (int)sizeof counts; i++)
        if (can_cut(c, i))
            n += snprintf(counts + n, sizeof counts - (size_t)n, "%s%d", i == 1 ? "" : i < last ? ", " : " or ", i);
    if (c->n_kv_heads % count)
        return fail(err, "%s %d: the model has %d K/V heads, which so many do not divide; expected %s", flag, count,
                    c->n_kv_heads, counts);
    return fail(err, "%s %d: each takes at least %d rows of dim %d, hidden_dim %d and vocab_size %d; expected %s", flag,
                count, SHARD_UNIT, c->dim, c->hidden_dim, c->vocab_size, counts);
}

// Of n units rank's first one; of rank `count` the end.
static int first_unit(int n, int rank, int count) {
    return (int)(((int64_t)n * rank + count - 1) / count);
}

static Rows part_of(int rows, int unit, int rank, int count) {
    int n = (rows + unit - 1) / unit, first = first_unit(n, rank, count) * unit,
        end = first_unit(n, rank + 1, count) * unit;
    return (Rows){first, (end < rows ? end : rows) - first};
}

Shard shard_of(const Config *c, int rank, int count) {
    return (Shard){.rank = rank,
                   .count = count,
                   .kv_heads = part_of(c->n_kv_heads, 1, rank, count),
                   .dim = part_of(c->dim, SHARD_UNIT, rank, count),
                   .hidden = part_of(c->hidden_dim, SHARD_UNIT, rank, count),
                   .vocab = part_of(c->vocab_size, SHARD_UNIT, rank, count)};
}

static Rows rows_of_heads(Rows heads, int rows) {
    return (Rows){heads.first * rows, heads.n * rows};
}

Rows shard_rows(const Shard *s, const Config *c, const Weight *w) {
    const char *dot = strrchr(w->name, '.'), *name = dot ? dot + 1 : w->name;
    if (!w->matrix) return (Rows){0, 1};
    if (strcmp(name, "wq") == 0) return rows_of_heads(s->kv_heads, c->group * c->head_dim);
    if (strcmp(name, "wk") == 0 || strcmp(name, "wv") == 0) return rows_of_heads(s->kv_heads, c->head_dim);
    if (strcmp(name, "wo") == 0 || strcmp(name, "w2") == 0) return s->dim;
    if (strcmp(name, "w1") == 0 || strcmp(name, "w3") == 0) return s->hidden;
    if (strcmp(name, "output") == 0) return s->vocab;
    return (Rows){0, w->matrix->rows}; // the embeddings
}
