// Byte-pair encoding of one piece, tiktoken's way: of all adjacent pairs whose joined bytes are a token, merge the one
// of lowest rank, leftmost first, until there is none.
#include <stdlib.h>
#include <string.h>

#include "tokenizer.h"

enum { SHORT_PIECE = 64 }; // up to here a linear search for the lowest rank beats a heap

// ---- short pieces: O(n²), all on the stack
// -----------------------------------------------------------------------------

static int pair_rank(const Tokenizer *t, const uint8_t *piece, size_t begin, size_t end) {
    int id = tokenizer_find(t, piece + begin, end - begin);
    return id < 0 ? t->vocab_size : id; // above every rank: no merge
}

static bool encode_short(const Tokenizer *t, const uint8_t *piece, size_t n, TokenList *out, Error *err) {
    size_t start[SHORT_PIECE + 1]; // part i is piece[start[i] .. start[i+1])
    int rank[SHORT_PIECE];         // of part i joined with part i+1
    size_t parts = n;
    for (size_t i = 0; i <= n; i++) start[i] = i;
    for (size_t i = 0; i + 1 < n; i++) rank[i] = pair_rank(t, piece, i, i + 2);
    while (parts > 1) {
        size_t best = 0;
        for (size_t i = 1; i + 1 < parts; i++)
            if (rank[i] < rank[best]) best = i;
        if (rank[best] == t->vocab_size) break;
        memmove(start + best + 1, start + best + 2, (parts - best - 1) * sizeof *start);
        memmove(rank + best, rank + best + 1, (parts - best - 2) * sizeof *rank);
        parts--;
        if (best + 1 < parts) rank[best] = pair_rank(t, piece, start[best], start[best + 2]);
        if (best > 0) rank[best - 1] = pair_rank(t, piece, start[best - 1], start[best + 1]);
    }
    for (size_t i = 0; i < parts; i++)
        if (!tokens_append(out, tokenizer_find(t, piece + start[i], start[i + 1] - start[i]), err)) return false;
    return true;
}

// ---- long pieces: O(n log n)
// ------------------------------------------------------------------------------------------

typedef struct {
    size_t end;        // the part that begins at this byte ends here; 0: no part begins here any more
    size_t prev, next; // where the neighbours begin; next of the last is n
} Part;

typedef struct {
    int rank;
    size_t begin, middle, end; // piece[begin..middle) and piece[middle..end): valid while these are still parts
} Merge;

typedef struct {
    Merge *merges; // a binary heap, the lowest rank, then the leftmost, first
    size_t n;
} Heap;

static bool merge_before(const Merge *a, const Merge *b) {
    return a->rank != b->rank ? a->rank < b->rank : a->begin < b->begin;
}

static void heap_push(Heap *heap, Merge merge) {
    size_t i = heap->n++;
    for (size_t parent; i > 0 && merge_before(&merge, &heap->merges[parent = (i - 1) / 2]); i = parent)
        heap->merges[i] = heap->merges[parent];
    heap->merges[i] = merge;
}

static Merge heap_pop(Heap *heap) {
    Merge top = heap->merges[0], last = heap->merges[--heap->n];
    size_t i = 0;
    for (size_t child; (child = 2 * i + 1) < heap->n; i = child) {
        if (child + 1 < heap->n && merge_before(&heap->merges[child + 1], &heap->merges[child])) child++;
        if (!merge_before(&heap->merges[child], &last)) break;
        heap->merges[i] = heap->merges[child];
    }
    heap->merges[i] = last;
    return top;
}

static void push_pair(const Tokenizer *t, const uint8_t *piece, const Part *parts, size_t begin, size_t n, Heap *heap) {
    size_t middle = parts[begin].next;
    if (middle == n) return;
    int id = tokenizer_find(t, piece + begin, parts[middle].end - begin);
    if (id >= 0) heap_push(heap, (Merge){id, begin, middle, parts[middle].end});
}

static bool encode_long(const Tokenizer *t, const uint8_t *piece, size_t n, TokenList *out, Error *err) {
    Part *parts = malloc(n * sizeof *parts);
    Heap heap = {malloc(3 * n * sizeof(Merge)), 0}; // n-1 pairs at first, and two more for each of at most n-1 merges
    bool ok = parts && heap.merges;
    if (!ok) fail(err, "out of memory: a piece of %zu bytes", n);
    for (size_t i = 0; ok && i < n; i++) parts[i] = (Part){i + 1, i - 1, i + 1};
    for (size_t i = 0; ok && i + 1 < n; i++) push_pair(t, piece, parts, i, n, &heap);
    while (ok && heap.n > 0) {
        Merge m = heap_pop(&heap);
        if (parts[m.begin].end != m.middle || parts[m.middle].end != m.end)
            continue; // one of them was merged meanwhile
        parts[m.begin].end = m.end;
        parts[m.begin].next = parts[m.middle].next;
        parts[m.middle].end = 0;
        if (parts[m.begin].next < n) parts[parts[m.begin].next].prev = m.begin;
        push_pair(t, piece, parts, m.begin, n, &heap);
        if (m.begin > 0) push_pair(t, piece, parts, parts[m.begin].prev, n, &heap);
    }
    for (size_t i = 0; ok && i < n; i = parts[i].next)
        ok = tokens_append(out, tokenizer_find(t, piece + i, parts[i].end - i), err);
    free(parts);
    free(heap.merges);
    return ok;
}

bool bpe_encode(const Tokenizer *t, const uint8_t *piece, size_t n, TokenList *out, Error *err) {
    int whole = tokenizer_find(t, piece, n); // before any merging: some tokens no merge would reach
    if (whole >= 0) return tokens_append(out, whole, err);
    return n <= SHORT_PIECE ? encode_short(t, piece, n, out, err) : encode_long(t, piece, n, out, err);
}
