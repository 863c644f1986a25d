#include "kv_cache.h"

#include <assert.h>
#include <inttypes.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>

// What a published page holds: these ids, after those of the page whose serial is `parent`. A serial is given once, so
// that equal parents mean equal ids all the way to the first position, also where the parent's page has long been
// another's.
typedef struct {
    uint64_t serial, parent; // parent 0: the sequence begins here
    unsigned bucket;
    int next; // page in the same bucket; -1: none
    int ids[KV_PAGE];
} Published;

typedef struct {
    int refs;             // slots that have it
    int older, newer;     // in the list of kept pages, -1: none; of a free page `older` is the next free one
    Published *published; // NULL: nobody can share it
} Page;

struct KVPages {
    Page *page;           // [n_pages]
    int untouched;        // from this page on none was ever given
    int free;             // the first of those given back; -1: none
    int oldest, newest;   // of the pages kept for sharing, which no slot has; -1: none
    int n_free;           // untouched, given back and kept
    uint64_t last_serial; // that was given
    unsigned n_buckets;   // a power of two
    int *buckets;         // [n_buckets]: the first page of each, -1: none
    struct {
        int from, to;
    } *changed; // [n_slots]: entries of the table
};

// What kv_cache.h has as const, to be written.
static int *writable(const int *numbers) {
    return (int *)numbers;
}

bool kv_init(KVCache *kv, int n_slots, int max_len, int64_t n_pages, Error *err) {
    int width = kv_pages(max_len);
    int64_t most = (int64_t)n_slots * width;
    if (n_pages == 0 || n_pages > most) n_pages = most;
    if (most > INT_MAX)
        return fail(err, "%d contexts of %d positions: more pages than %d; try a smaller -c", n_slots, max_len,
                    INT_MAX);
    struct KVPages *p = calloc(1, sizeof *p);
    *kv = (KVCache){.n_slots = n_slots,
                    .max_len = max_len,
                    .n_pages = (int)n_pages,
                    .table_width = width,
                    .len = calloc((size_t)n_slots, sizeof *kv->len),
                    .held = calloc((size_t)n_slots, sizeof *kv->held),
                    .table = calloc((size_t)most, sizeof *kv->table),
                    .pages = p};
    if (p) {
        p->n_buckets = 1;
        while (p->n_buckets < 1u << 16 && p->n_buckets < (unsigned)n_pages) p->n_buckets *= 2;
        p->page = calloc((size_t)n_pages, sizeof *p->page);
        p->buckets = malloc(p->n_buckets * sizeof *p->buckets);
        p->changed = calloc((size_t)n_slots, sizeof *p->changed);
        p->free = p->oldest = p->newest = -1;
        p->n_free = (int)n_pages;
        for (unsigned i = 0; p->buckets && i < p->n_buckets; i++) p->buckets[i] = -1;
    }
    return (p && p->page && p->buckets && p->changed && kv->len && kv->held && kv->table) ||
           fail(err, "out of memory: lengths and pages of %d slots", n_slots);
}

void kv_free(KVCache *kv) {
    struct KVPages *p = kv->pages;
    if (p) {
        for (int i = 0; p->page && i < p->untouched; i++) free(p->page[i].published);
        free(p->page);
        free(p->buckets);
        free(p->changed);
        free(p);
    }
    free(writable(kv->len));
    free(writable(kv->held));
    free(writable(kv->table));
    *kv = (KVCache){0};
}

// ---- published pages ------------------------------------------------------------------------------------------------

static unsigned bucket_of(const struct KVPages *p, uint64_t parent, const int *ids) {
    uint64_t h = parent * 0x9E3779B97F4A7C15u;
    for (int i = 0; i < KV_PAGE; i++) h = (h ^ (uint64_t)(uint32_t)ids[i]) * 0x9E3779B97F4A7C15u, h ^= h >> 29;
    return (unsigned)(h >> 32) & (p->n_buckets - 1);
}

// The page that holds these ids after those of the page with serial `parent`; -1: none.
static int find_published(const struct KVPages *p, uint64_t parent, const int *ids) {
    int page = p->buckets[bucket_of(p, parent, ids)];
    for (; page >= 0; page = p->page[page].published->next) {
        const Published *at = p->page[page].published;
        if (at->parent == parent && memcmp(at->ids, ids, sizeof at->ids) == 0) break;
    }
    return page;
}

static void unpublish(struct KVPages *p, int page) {
    Published *gone = p->page[page].published;
    if (!gone) return;
    int *at = &p->buckets[gone->bucket];
    while (*at != page) at = &p->page[*at].published->next;
    *at = gone->next;
    free(gone);
    p->page[page].published = NULL;
}

// Returns its serial; 0: there is no memory to remember it.
static uint64_t publish(struct KVPages *p, int page, uint64_t parent, const int *ids) {
    unpublish(p, page);
    Published *new = malloc(sizeof *new);
    if (!new) return 0;
    unsigned bucket = bucket_of(p, parent, ids);
    *new = (Published){.serial = ++p->last_serial, .parent = parent, .bucket = bucket, .next = p->buckets[bucket]};
    memcpy(new->ids, ids, sizeof new->ids);
    p->buckets[bucket] = page;
    p->page[page].published = new;
    return new->serial;
}

// ---- pages ----------------------------------------------------------------------------------------------------------

// Out of the list of those kept for sharing.
static void unlink_kept(struct KVPages *p, int page) {
    const Page *gone = &p->page[page];
    *(gone->older < 0 ? &p->oldest : &p->page[gone->older].newer) = gone->newer;
    *(gone->newer < 0 ? &p->newest : &p->page[gone->newer].older) = gone->older;
}

// A page that nobody has, for one slot: of those that are kept for sharing only when there is no other.
static int take_page(struct KVPages *p, int n_pages) {
    int page = p->free;
    if (page >= 0) {
        p->free = p->page[page].older;
    } else if (p->untouched < n_pages) {
        page = p->untouched++;
    } else {
        page = p->oldest;
        unlink_kept(p, page);
        unpublish(p, page);
    }
    p->page[page].refs = 1;
    p->n_free--;
    return page;
}

// One slot less has a page.
static void release_page(struct KVPages *p, int number) {
    Page *page = &p->page[number];
    if (--page->refs > 0) return;
    p->n_free++;
    if (!page->published) {
        page->older = p->free;
        p->free = number;
        return;
    }
    page->older = p->newest;
    page->newer = -1;
    *(p->newest < 0 ? &p->oldest : &p->page[p->newest].newer) = number;
    p->newest = number;
}

// Number i of a slot's pages is that one.
static void set_page(KVCache *kv, int slot, int i, int page) {
    struct KVPages *p = kv->pages;
    writable(kv->table)[(size_t)slot * (size_t)kv->table_width + (size_t)i] = page;
    bool none = p->changed[slot].from == p->changed[slot].to;
    if (none || i < p->changed[slot].from) p->changed[slot].from = i;
    if (none || i >= p->changed[slot].to) p->changed[slot].to = i + 1;
}

// Page `page` becomes the next one of a slot.
static void add_page(KVCache *kv, int slot, int page) {
    set_page(kv, slot, writable(kv->held)[slot]++, page);
}

void kv_follow(KVCache *kv, int slot, int len, int held, int first, int n, const int *pages) {
    assert(len >= 0 && len <= kv->max_len && held <= kv->table_width && first >= 0 && first + n <= kv->table_width);
    for (int i = 0; i < n; i++) set_page(kv, slot, first + i, pages[i]);
    writable(kv->held)[slot] = held;
    writable(kv->len)[slot] = len;
}

int kv_changes(const KVCache *kv, int slot, int *first) {
    *first = kv->pages->changed[slot].from;
    return kv->pages->changed[slot].to - *first;
}

int kv_take_changes(KVCache *kv, int slot, int *first) {
    int n = kv_changes(kv, slot, first);
    kv->pages->changed[slot].to = *first;
    return n;
}

int kv_free_pages(const KVCache *kv) {
    return kv->pages->n_free;
}

bool kv_reserve(KVCache *kv, int slot, int len) {
    assert(len >= 0 && len <= kv->max_len);
    int more = kv_pages(len) - kv->held[slot];
    if (more > kv->pages->n_free) return false;
    for (; more > 0; more--) add_page(kv, slot, take_page(kv->pages, kv->n_pages));
    return true;
}

bool kv_reserve_batch(KVCache *kv, const Batch *b, Error *err) {
    int64_t needed = 0;
    for (int i = 0; i < b->n_seq; i++) {
        int slot = b->slot[i], more = b->start[i + 1] - b->start[i];
        if (more > kv_room(kv, slot))
            return fail(err, "%d more tokens after %d, the context holds %d", more, kv->len[slot], kv->max_len);
        int pages = kv_pages(kv->len[slot] + more) - kv->held[slot];
        if (pages > 0) needed += pages;
    }
    if (needed > kv_free_pages(kv))
        return fail(err,
                    "K/V cache, in pages of %d positions: %" PRId64
                    " more needed, %d of %d are free; try a larger --kv-memory",
                    KV_PAGE, needed, kv_free_pages(kv), kv->n_pages);
    for (int i = 0; i < b->n_seq; i++) kv_reserve(kv, b->slot[i], kv->len[b->slot[i]] + b->start[i + 1] - b->start[i]);
    for (int i = 0; i < b->n_decode; i++) {
        int next = kv->len[b->slot[i]] + b->start[i + 1] - b->start[i] + 1;
        if (next <= kv->max_len) kv_reserve(kv, b->slot[i], next);
    }
    return true;
}

// ---- lengths --------------------------------------------------------------------------------------------------------

void kv_append(KVCache *kv, int slot, int n) {
    assert(n >= 0 && n <= kv_room(kv, slot) && kv_pages(kv->len[slot] + n) <= kv->held[slot]);
    writable(kv->len)[slot] += n;
}

void kv_append_batch(KVCache *kv, const Batch *b) {
    for (int i = 0; i < b->n_seq; i++) kv_append(kv, b->slot[i], b->start[i + 1] - b->start[i]);
}

void kv_truncate(KVCache *kv, int slot, int len) {
    assert(len >= 0 && len <= kv->len[slot]);
    struct KVPages *p = kv->pages;
    int keep = kv_pages(len);
    const int *pages = kv_slot_pages(kv, slot);
    while (kv->held[slot] > keep) release_page(p, pages[--writable(kv->held)[slot]]); // the last is forgotten first
    if (len % KV_PAGE) { // what is not kept of its last page will be written anew
        assert(p->page[pages[keep - 1]].refs == 1);
        if (len < kv->len[slot]) unpublish(p, pages[keep - 1]);
    }
    writable(kv->len)[slot] = len;
}

void kv_reset(KVCache *kv, int slot) {
    kv_truncate(kv, slot, 0);
}

// ---- sharing --------------------------------------------------------------------------------------------------------

int kv_share(KVCache *kv, int slot, const int *ids, int n) {
    struct KVPages *p = kv->pages;
    int most = n < kv->max_len ? n : kv->max_len; // the last of them is computed
    uint64_t parent = 0;
    kv_reset(kv, slot);
    for (int at = 0; at + KV_PAGE < most; at += KV_PAGE) {
        int page = find_published(p, parent, ids + at);
        if (page < 0) break;
        if (p->page[page].refs++ == 0) {
            unlink_kept(p, page);
            p->n_free--;
        }
        add_page(kv, slot, page);
        writable(kv->len)[slot] += KV_PAGE;
        parent = p->page[page].published->serial;
    }
    return kv->len[slot];
}

void kv_publish(KVCache *kv, int slot, const int *ids, int n) {
    assert(n >= 0 && n <= kv->len[slot]);
    struct KVPages *p = kv->pages;
    uint64_t parent = 0;
    for (int i = 0; i < n / KV_PAGE; i++, ids += KV_PAGE) {
        int page = find_published(p, parent, ids);
        parent = page >= 0 ? p->page[page].published->serial : publish(p, kv_slot_pages(kv, slot)[i], parent, ids);
        if (parent == 0) break;
    }
}
