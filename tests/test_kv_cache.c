// The cache's lengths and pages: what is appended, kept, given back, shared and refused.
#include "../model/kv_cache.h"
#include "check.h"

#define LENGTH(list) (int)(sizeof(list) / sizeof *(list))

static Error err;
static KVCache kv;

// How many slots have a page.
static int holders(int page) {
    int n = 0;
    for (int slot = 0; slot < kv.n_slots; slot++)
        for (int i = 0; i < kv.held[slot]; i++) n += kv_slot_pages(&kv, slot)[i] == page;
    return n;
}

// No slot has a page twice, lengths fit the pages, and as many pages are free as no slot has.
static void check_pages(void) {
    int none = 0;
    for (int page = 0; page < kv.n_pages; page++) none += holders(page) == 0;
    CHECK(none == kv_free_pages(&kv));
    for (int slot = 0; slot < kv.n_slots; slot++) {
        CHECK(kv_pages(kv.len[slot]) <= kv.held[slot] && kv.held[slot] <= kv.table_width);
        for (int i = 0; i < kv.held[slot]; i++) {
            CHECK(kv_slot_pages(&kv, slot)[i] >= 0 && kv_slot_pages(&kv, slot)[i] < kv.n_pages);
            for (int j = 0; j < i; j++) CHECK(kv_slot_pages(&kv, slot)[i] != kv_slot_pages(&kv, slot)[j]);
        }
    }
}

// n more positions, with pages for them.
static void fill(int slot, int n) {
    CHECK(kv_reserve(&kv, slot, kv.len[slot] + n));
    kv_append(&kv, slot, n);
    check_pages();
}

// Ids of a text: `beginning` tells texts apart from the first id on, `from` on they are the text's own.
static void make_ids(int *ids, int n, int beginning, int from, int own) {
    for (int i = 0; i < n; i++) ids[i] = i * 7 + (i < from ? beginning : own);
}

static void test_kv_lengths_follow_appends_and_truncations(void) {
    CHECK(kv_init(&kv, 3, 10, 0, &err) && kv.n_slots == 3 && kv.max_len == 10 && !kv.k && !kv.v);
    for (int i = 0; i < 3; i++) CHECK(kv.len[i] == 0 && kv_room(&kv, i) == 10);
    fill(1, 10);
    fill(2, 4);
    CHECK(kv.len[0] == 0 && kv.len[1] == 10 && kv_room(&kv, 1) == 0 && kv_room(&kv, 2) == 6);
    kv_truncate(&kv, 1, 7);
    kv_truncate(&kv, 2, 4);
    CHECK(kv.len[0] == 0 && kv.len[1] == 7 && kv.len[2] == 4);
    kv_reset(&kv, 1);
    CHECK(kv.len[0] == 0 && kv.len[1] == 0 && kv.len[2] == 4);
    kv_free(&kv);
    CHECK(!kv.len && kv.n_slots == 0);
    test_end("test_kv_lengths_follow_appends_and_truncations");
}

static void test_kv_batch_fills_its_own_slots(void) {
    int slot[3] = {2, 0, 3}, start[4] = {0, 5, 5, 9};
    Batch b = {.n_rows = 9, .n_seq = 3, .slot = slot, .start = start};
    CHECK(kv_init(&kv, 4, 8, 0, &err));
    CHECK(kv_reserve_batch(&kv, &b, &err));
    kv_append_batch(&kv, &b);
    CHECK(kv.len[0] == 0 && kv.len[1] == 0 && kv.len[2] == 5 && kv.len[3] == 4);
    CHECK(!kv_reserve_batch(&kv, &b, &err) && strstr(err.text, "5 more tokens") && strstr(err.text, "holds 8"));
    CHECK(kv.len[2] == 5 && kv.len[3] == 4); // a refusal changes nothing
    kv_reset(&kv, 2);
    err.text[0] = 0;
    CHECK(kv_reserve_batch(&kv, &b, &err)); // exactly full: 4 of 4 after 4
    kv_append_batch(&kv, &b);
    CHECK(kv.len[2] == 5 && kv.len[3] == 8 && kv_room(&kv, 3) == 0);
    kv_free(&kv);
    test_end("test_kv_batch_fills_its_own_slots");
}

static void test_kv_counts_of_pages(void) {
    static const int lengths[][2] = {{0, 0}, {1, 1}, {63, 1}, {64, 1}, {65, 2}, {128, 2}, {129, 3}, {131072, 2048}};
    for (int i = 0; i < LENGTH(lengths); i++) CHECK(kv_pages(lengths[i][0]) == lengths[i][1]);
    CHECK(kv_page_elements(8, 128) == 65536);
    CHECK(kv_init(&kv, 3, 200, 0, &err) && kv.n_pages == 12 && kv.table_width == 4 && kv_free_pages(&kv) == 12);
    kv_free(&kv);
    CHECK(kv_init(&kv, 3, 200, 100, &err) && kv.n_pages == 12); // no more than can be used
    kv_free(&kv);
    CHECK(kv_init(&kv, 3, 200, 5, &err) && kv.n_pages == 5 && kv.table_width == 4);
    fill(0, 64);
    CHECK(kv.held[0] == 1 && kv_free_pages(&kv) == 4);
    fill(0, 1);
    CHECK(kv.held[0] == 2 && kv_free_pages(&kv) == 3);
    fill(0, 63);
    CHECK(kv.held[0] == 2 && kv_free_pages(&kv) == 3);
    kv_truncate(&kv, 0, 65);
    CHECK(kv.held[0] == 2);
    kv_truncate(&kv, 0, 64);
    CHECK(kv.held[0] == 1 && kv_free_pages(&kv) == 4);
    kv_reset(&kv, 0);
    CHECK(kv.held[0] == 0 && kv_free_pages(&kv) == 5);
    kv_free(&kv);
    err.text[0] = 0;
    CHECK(!kv_init(&kv, MAX_SLOTS, INT32_MAX, 0, &err) && strstr(err.text, "-c"));
    err.text[0] = 0;
    kv_free(&kv);
    test_end("test_kv_counts_of_pages");
}

static void test_kv_reserve_is_all_or_nothing(void) {
    int first;
    CHECK(kv_init(&kv, 3, 320, 6, &err));
    fill(0, 100);
    CHECK(kv_reserve(&kv, 1, 256) && kv.held[1] == 4 && kv.len[1] == 0 && kv_free_pages(&kv) == 0);
    CHECK(kv_reserve(&kv, 1, 100) && kv.held[1] == 4); // enough: nothing to do, and nothing is taken away
    CHECK(kv_take_changes(&kv, 2, &first) == 0);
    CHECK(!kv_reserve(&kv, 2, 1) && kv.held[2] == 0 && kv_take_changes(&kv, 2, &first) == 0);
    CHECK(!kv_reserve(&kv, 0, 129) && kv.held[0] == 2 && kv_reserve(&kv, 0, 128));
    kv_truncate(&kv, 1, 0); // what was reserved and not used goes back, too
    CHECK(kv.held[1] == 0 && kv_free_pages(&kv) == 4);
    CHECK(!kv_reserve(&kv, 2, 257) && kv_free_pages(&kv) == 4 && kv_reserve(&kv, 2, 256));
    check_pages();
    kv_free(&kv);
    test_end("test_kv_reserve_is_all_or_nothing");
}

// A batch gets all its pages or none; of the positions after rows that are decoded as many as there are pages for.
static void test_kv_reserve_of_batches(void) {
    int slot[3] = {0, 1, 2}, prompts[4] = {0, 65, 130, 195}, rows[4] = {0, 1, 2, 3};
    Batch three = {.n_rows = 195, .n_seq = 3, .slot = slot, .start = prompts}, two = three;
    two.n_rows = 130, two.n_seq = 2;
    err.text[0] = 0;
    CHECK(kv_init(&kv, 3, 1000, 5, &err));
    CHECK(!kv_reserve_batch(&kv, &three, &err) && strstr(err.text, "6 more needed") && strstr(err.text, "5 of 5"));
    CHECK(strstr(err.text, "--kv-memory") && kv_free_pages(&kv) == 5);
    for (int i = 0; i < 3; i++) CHECK(kv.held[i] == 0);
    err.text[0] = 0;
    CHECK(kv_reserve_batch(&kv, &two, &err) && kv_free_pages(&kv) == 1);
    kv_append_batch(&kv, &two);
    CHECK(kv_reserve(&kv, 0, 127) && kv_reserve(&kv, 1, 127));
    kv_append(&kv, 0, 62);
    kv_append(&kv, 1, 62);
    Batch step = {.n_rows = 2, .n_seq = 2, .n_decode = 2, .slot = slot, .start = rows};
    CHECK(kv.len[0] == 127 && kv_reserve_batch(&kv, &step, &err)); // position 127 has a page, 128 gets the last one
    CHECK(kv.held[0] == 3 && kv.held[1] == 2 && kv_free_pages(&kv) == 0);
    kv_append_batch(&kv, &step);
    CHECK(!kv_reserve_batch(&kv, &step, &err) && strstr(err.text, "1 more needed") && kv.held[1] == 2);
    kv_reset(&kv, 0);
    CHECK(kv_reserve_batch(&kv, &step, &err) && kv.held[0] == 1 && kv.held[1] == 3);
    check_pages();
    kv_free(&kv);
    CHECK(kv_init(&kv, 1, 64, 0, &err)); // the last position has none after it
    fill(0, 63);
    step.n_rows = step.n_seq = step.n_decode = 1;
    CHECK(kv_reserve_batch(&kv, &step, &err) && kv.held[0] == 1);
    kv_free(&kv);
    test_end("test_kv_reserve_of_batches");
}

// Another cache that is told of a slot what changed in it has its length, its pages, and the same changes to give.
static void test_kv_follow(void) {
    static const struct {
        int slot, keep, more; // positions that stay, and come
    } moves[] = {{0, 0, 300}, {1, 0, 64}, {0, 256, 1}, {1, 64, 1}, {2, 0, 1}, {0, 0, 640}, {2, 0, 130}, {1, 65, 0}};
    KVCache other;
    CHECK(kv_init(&kv, 3, 640, 20, &err) && kv_init(&other, 3, 640, 20, &err));
    for (size_t i = 0; i < sizeof moves / sizeof *moves; i++) {
        int slot = moves[i].slot, first, at;
        kv_truncate(&kv, slot, moves[i].keep);
        fill(slot, moves[i].more);
        if (i % 3 == 1) continue; // it is told later
        int n = kv_changes(&kv, slot, &first);
        CHECK(n == kv_changes(&kv, slot, &at) && at == first);
        kv_follow(&other, slot, kv.len[slot], kv.held[slot], first, n, kv_slot_pages(&kv, slot) + first);
        CHECK(other.len[slot] == kv.len[slot] && other.held[slot] == kv.held[slot]);
        CHECK(memcmp(kv_slot_pages(&other, slot), kv_slot_pages(&kv, slot), (size_t)kv.held[slot] * sizeof *kv.table) ==
              0);
        CHECK(kv_take_changes(&other, slot, &at) == n && (n == 0 || at == first));
        CHECK(kv_take_changes(&kv, slot, &first) == n);
    }
    kv_free(&other);
    kv_free(&kv);
    test_end("test_kv_follow");
}

// Pages that were given back go to others, the slots' tables say which, and the changes are told once.
static void test_kv_pages_are_used_again(void) {
    int first;
    CHECK(kv_init(&kv, 2, 640, 10, &err));
    fill(0, 300);
    CHECK(kv_take_changes(&kv, 0, &first) == 5 && first == 0 && kv_take_changes(&kv, 0, &first) == 0);
    int old = kv_slot_pages(&kv, 0)[4];
    kv_truncate(&kv, 0, 256);
    fill(1, 64);
    CHECK(kv_slot_pages(&kv, 1)[0] == old); // rather than memory that was never touched
    fill(0, 64);
    CHECK(kv_take_changes(&kv, 0, &first) == 1 && first == 4 && kv_slot_pages(&kv, 0)[4] != old);
    CHECK(kv_take_changes(&kv, 1, &first) == 1 && first == 0);
    fill(0, 64);
    fill(0, 64);
    CHECK(kv_take_changes(&kv, 0, &first) == 2 && first == 5);
    kv_reset(&kv, 0);
    CHECK(kv_free_pages(&kv) == 9 && kv_take_changes(&kv, 0, &first) == 0);
    fill(1, 576);
    CHECK(kv_free_pages(&kv) == 0 && !kv_reserve(&kv, 0, 1));
    check_pages();
    kv_free(&kv);
    test_end("test_kv_pages_are_used_again");
}

// Whole pages of the same beginning only, and never all of a prompt.
static void test_kv_sharing_of_whole_pages(void) {
    int ids[300], other[300];
    make_ids(ids, 300, 1, 300, 0);
    CHECK(kv_init(&kv, 4, 400, 20, &err));
    CHECK(kv_share(&kv, 0, ids, 300) == 0); // nothing is there
    fill(0, 300);
    kv_publish(&kv, 0, ids, 200); // three whole pages, though four are filled
    static const int shared[][2] = {{300, 192}, {193, 192}, {192, 128}, {129, 128},
                                    {128, 64},  {65, 64},   {64, 0},    {1, 0}};
    for (int i = 0; i < LENGTH(shared); i++) {
        CHECK(kv_share(&kv, 1, ids, shared[i][0]) == shared[i][1] && kv.len[1] == shared[i][1]);
        CHECK(kv.held[1] == shared[i][1] / KV_PAGE);
        for (int p = 0; p < kv.held[1]; p++) CHECK(kv_slot_pages(&kv, 1)[p] == kv_slot_pages(&kv, 0)[p]);
        check_pages();
    }
    make_ids(other, 300, 1, 127, 1000); // differs within the second page
    CHECK(kv_share(&kv, 2, other, 300) == 64);
    make_ids(other, 300, 1, 128, 1000);
    CHECK(kv_share(&kv, 2, other, 300) == 128);
    memcpy(other, ids + 64, 200 * sizeof *ids); // the second page's ids, but at the beginning
    CHECK(kv_share(&kv, 2, other, 200) == 0);
    memcpy(other, ids, 64 * sizeof *ids); // the third page's after the first's
    memcpy(other + 64, ids + 128, 64 * sizeof *ids);
    CHECK(kv_share(&kv, 2, other, 200) == 64);
    kv_free(&kv);
    test_end("test_kv_sharing_of_whole_pages");
}

// What a slot appends after shared pages goes to pages of its own; what it drops and writes again does, too.
static void test_kv_shared_pages_are_never_written(void) {
    int ids[400];
    make_ids(ids, 400, 1, 400, 0);
    CHECK(kv_init(&kv, 3, 400, 0, &err));
    fill(0, 200);
    kv_publish(&kv, 0, ids, 200);
    CHECK(kv_share(&kv, 1, ids, 200) == 192 && kv_share(&kv, 2, ids, 150) == 128);
    fill(1, 100);
    fill(2, 100);
    fill(0, 100);
    for (int a = 0; a < 3; a++)
        for (int i = kv_pages(a == 2 ? 128 : 192); i < kv.held[a]; i++) CHECK(holders(kv_slot_pages(&kv, a)[i]) == 1);
    CHECK(holders(kv_slot_pages(&kv, 0)[0]) == 3 && holders(kv_slot_pages(&kv, 0)[2]) == 2);
    kv_truncate(&kv, 1, 128); // at a page's end: the shared one before it stays shared
    fill(1, 10);
    CHECK(kv_slot_pages(&kv, 1)[2] != kv_slot_pages(&kv, 0)[2] && holders(kv_slot_pages(&kv, 0)[2]) == 1);
    // The only slot that has a published page writes into it again: nobody gets it after that.
    kv_reset(&kv, 1);
    kv_truncate(&kv, 0, 150);
    CHECK(kv_share(&kv, 1, ids, 200) == 128);
    fill(0, 50);
    CHECK(kv_share(&kv, 1, ids, 200) == 128);
    kv_publish(&kv, 0, ids, 200);
    CHECK(kv_share(&kv, 1, ids, 200) == 192);
    check_pages();
    kv_free(&kv);
    test_end("test_kv_shared_pages_are_never_written");
}

// Published pages stay after a reset, and go when they are needed: the ones not asked for the longest first, of a
// sequence the last ones.
static void test_kv_kept_pages_go_least_recently_used_first(void) {
    int a[200], b[200], c[200];
    make_ids(a, 200, 1, 200, 0);
    make_ids(b, 200, 2, 200, 0);
    make_ids(c, 200, 3, 200, 0);
    CHECK(kv_init(&kv, 3, 640, 9, &err));
    fill(0, 192);
    kv_publish(&kv, 0, a, 192);
    fill(1, 192);
    kv_publish(&kv, 1, b, 192);
    kv_reset(&kv, 0);
    kv_reset(&kv, 1);
    CHECK(kv_free_pages(&kv) == 9);                                    // all, though six of them are kept
    CHECK(kv_share(&kv, 0, a, 193) == 192 && kv_free_pages(&kv) == 6); // a is the more recently used now
    kv_reset(&kv, 0);
    fill(2, 192); // three that nobody keeps
    CHECK(kv_share(&kv, 0, b, 193) == 192 && kv_share(&kv, 1, a, 193) == 192 && kv_free_pages(&kv) == 0);
    kv_reset(&kv, 0);
    kv_reset(&kv, 1);
    fill(2, 64); // the last page of b
    CHECK(kv_share(&kv, 0, b, 193) == 128 && kv_share(&kv, 1, a, 193) == 192);
    CHECK(kv_free_pages(&kv) == 0 && !kv_reserve(&kv, 2, 320));
    kv_reset(&kv, 1);
    kv_reset(&kv, 0);
    fill(2, 256); // all of a, and one of b
    CHECK(kv.held[2] == 8 && kv_share(&kv, 1, a, 193) == 0 && kv_share(&kv, 0, b, 193) == 64);
    kv_reset(&kv, 2);
    CHECK(kv_share(&kv, 1, c, 193) == 0);
    check_pages();
    kv_free(&kv);
    test_end("test_kv_kept_pages_go_least_recently_used_first");
}

// A page's successor is not found by what was on that page earlier, nor by another text that is there now.
static void test_kv_reclaimed_page_leaves_no_trace(void) {
    int a[200], b[200];
    make_ids(a, 200, 1, 200, 0);
    make_ids(b, 200, 2, 64, 0); // another first page, then the same as a from there on
    for (int i = 64; i < 200; i++) b[i] = a[i];
    CHECK(kv_init(&kv, 2, 320, 5, &err));
    fill(0, 192);
    kv_publish(&kv, 0, a, 192);
    CHECK(kv_share(&kv, 1, b, 200) == 0);
    fill(1, 64);
    kv_publish(&kv, 1, b, 64);
    kv_reset(&kv, 1);
    CHECK(kv_share(&kv, 1, b, 200) == 64); // not a's second page, whose ids are the same
    kv_reset(&kv, 1);
    kv_reset(&kv, 0);
    fill(0, 320); // everything is someone else's now
    kv_reset(&kv, 0);
    CHECK(kv_share(&kv, 0, a, 200) == 0 && kv_share(&kv, 1, b, 200) == 0);
    // a's first page is published again, and would be the predecessor of its old second page.
    fill(0, 128);
    kv_publish(&kv, 0, a, 64);
    CHECK(kv_share(&kv, 1, a, 200) == 64);
    check_pages();
    kv_free(&kv);
    test_end("test_kv_reclaimed_page_leaves_no_trace");
}

// Two slots compute the same prompt: one copy is published, and what follows it is found through that.
static void test_kv_same_prompt_published_twice(void) {
    int ids[300];
    make_ids(ids, 300, 1, 300, 0);
    CHECK(kv_init(&kv, 3, 320, 0, &err));
    fill(0, 128);
    fill(1, 256);
    kv_publish(&kv, 0, ids, 128);
    kv_publish(&kv, 1, ids, 256);
    kv_publish(&kv, 1, ids, 256); // once more changes nothing
    CHECK(kv_share(&kv, 2, ids, 300) == 256);
    CHECK(kv_slot_pages(&kv, 2)[0] == kv_slot_pages(&kv, 0)[0] && kv_slot_pages(&kv, 2)[1] == kv_slot_pages(&kv, 0)[1]);
    CHECK(kv_slot_pages(&kv, 2)[2] == kv_slot_pages(&kv, 1)[2] && kv_slot_pages(&kv, 2)[3] == kv_slot_pages(&kv, 1)[3]);
    check_pages();
    kv_free(&kv);
    test_end("test_kv_same_prompt_published_twice");
}

// Thousands of texts over a few pages and a few buckets, many of which collide: what is shared has the ids asked for,
// as far as a record of every page's text says. Ids of -1, 0 and large numbers among them.
static void test_kv_random_use(void) {
    enum { SLOTS = 6, PAGES = 40, LONGEST = 640, ROUNDS = 20000 };
    static int text[SLOTS][LONGEST], on_page[PAGES][LONGEST], page_end[PAGES]; // page_end: positions up to its last
    uint64_t random = 12345;
    int shared = 0, refused = 0;
    CHECK(kv_init(&kv, SLOTS, LONGEST, PAGES, &err));
    for (int round = 0; round < ROUNDS; round++) {
        int slot = (int)((random = random * 6364136223846793005u + 1442695040888963407u) >> 33) % SLOTS;
        int what = (int)((random = random * 6364136223846793005u + 1442695040888963407u) >> 33) % 8;
        int n = 1 + (int)((random = random * 6364136223846793005u + 1442695040888963407u) >> 33) % (LONGEST - 1);
        if (what == 0) {
            kv_reset(&kv, slot);
        } else if (what == 1) {
            kv_truncate(&kv, slot, n / KV_PAGE * KV_PAGE < kv.len[slot] ? n / KV_PAGE * KV_PAGE : kv.len[slot]);
        } else { // a text of few variants a page, so that beginnings repeat
            for (int i = 0; i < LONGEST; i += KV_PAGE) {
                random = random * 6364136223846793005u + 1442695040888963407u;
                for (int j = 0; j < KV_PAGE; j++)
                    text[slot][i + j] = (int)(random >> 33) % 3 == 0 ? -1 : (int)(random >> 40) % 2 * INT32_MAX;
            }
            int len = kv_share(&kv, slot, text[slot], n);
            CHECK(len < n && len % KV_PAGE == 0);
            shared += len;
            for (int i = 0; i < len / KV_PAGE; i++) {
                int page = kv_slot_pages(&kv, slot)[i];
                CHECK(page_end[page] == (i + 1) * KV_PAGE);
                CHECK(memcmp(on_page[page], text[slot], (size_t)page_end[page] * sizeof(int)) == 0);
            }
            if (!kv_reserve(&kv, slot, n)) {
                refused++;
                kv_reset(&kv, slot);
            } else {
                kv_append(&kv, slot, n - len);
                for (int i = len / KV_PAGE; i < kv.held[slot]; i++) { // computed: written
                    int page = kv_slot_pages(&kv, slot)[i];
                    CHECK(holders(page) == 1);
                    page_end[page] = (i + 1) * KV_PAGE;
                    memcpy(on_page[page], text[slot], (size_t)page_end[page] * sizeof(int));
                }
                if (what > 3) kv_publish(&kv, slot, text[slot], n);
            }
        }
        if (round % 16 == 0) check_pages();
    }
    CHECK(shared > 100 * KV_PAGE && refused > 100);
    kv_free(&kv);
    test_end("test_kv_random_use");
}

int main(void) {
    test_kv_lengths_follow_appends_and_truncations();
    test_kv_batch_fills_its_own_slots();
    test_kv_counts_of_pages();
    test_kv_reserve_is_all_or_nothing();
    test_kv_reserve_of_batches();
    test_kv_follow();
    test_kv_pages_are_used_again();
    test_kv_sharing_of_whole_pages();
    test_kv_shared_pages_are_never_written();
    test_kv_kept_pages_go_least_recently_used_first();
    test_kv_reclaimed_page_leaves_no_trace();
    test_kv_same_prompt_published_twice();
    test_kv_random_use();
    return tests_summary();
}
