// The cache's lengths: what is appended, kept and refused.
#include "../model/kv_cache.h"
#include "check.h"

static Error err;
static KVCache kv;

static void test_kv_lengths_follow_appends_and_truncations(void) {
    CHECK(kv_init(&kv, 3, 10, &err) && kv.n_slots == 3 && kv.max_len == 10 && !kv.k && !kv.v);
    for (int i = 0; i < 3; i++) CHECK(kv.len[i] == 0 && kv_room(&kv, i) == 10);
    kv_append(&kv, 1, 10);
    kv_append(&kv, 2, 4);
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
    CHECK(kv_init(&kv, 4, 8, &err));
    CHECK(kv_check_room(&kv, &b, &err));
    kv_append_batch(&kv, &b);
    CHECK(kv.len[0] == 0 && kv.len[1] == 0 && kv.len[2] == 5 && kv.len[3] == 4);
    CHECK(!kv_check_room(&kv, &b, &err) && strstr(err.text, "5 more tokens") && strstr(err.text, "holds 8"));
    CHECK(kv.len[2] == 5 && kv.len[3] == 4); // a refusal changes nothing
    kv_reset(&kv, 2);
    err.text[0] = 0;
    CHECK(kv_check_room(&kv, &b, &err)); // exactly full: 4 of 4 after 4
    kv_append_batch(&kv, &b);
    CHECK(kv.len[2] == 5 && kv.len[3] == 8 && kv_room(&kv, 3) == 0);
    kv_free(&kv);
    test_end("test_kv_batch_fills_its_own_slots");
}

int main(void) {
    test_kv_lengths_follow_appends_and_truncations();
    test_kv_batch_fills_its_own_slots();
    return tests_summary();
}
