/* What a session holds of GPU pools, and is to give back. */
#include "test_util.h"

#include "slab_holder.h"

#include <sys/mman.h>
#include <unistd.h>

#define OK(call) assert_int_equal((call), TS_OK)

enum { BYTES = 1000, MOST_MS = 5000 };

static char why[256];

/* A session, with its own mapping of the page as a client has it. */
typedef struct holder {
    ts_slab_holder *slabs;
    ts_revocations *page;
    uint64_t held;
} holder;

static void holder_open(holder *h)
{
    h->held = 0;
    OK(ts_slab_holder_new(&h->slabs, why, sizeof why));
    h->page = mmap(NULL, TS_REVOCATIONS_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED,
                   ts_slab_holder_page(h->slabs), 0);
    assert_true(h->page != MAP_FAILED);
}

static void holder_close(holder *h)
{
    ts_slab_holder_free(h->slabs);
    munmap(h->page, TS_REVOCATIONS_BYTES);
    assert_int_equal(h->held, 0);
}

static void note(holder *h, uint32_t pool, uint32_t slab, uint32_t generation)
{
    OK(ts_slab_holder_note(h->slabs, pool, slab, generation, BYTES, &h->held, why, sizeof why));
}

static uint64_t rung(const holder *h)
{
    uint64_t count = 0;
    return read(ts_slab_holder_bell(h->slabs), &count, sizeof count) < 0 ? 0 : count;
}

static void whoever_has_a_slab_that_goes_is_told_and_charged_until_it_is_returned(void **state)
{
    (void)state;
    holder h;
    holder_open(&h);
    note(&h, 1, 7, 3);
    ts_slab_holder_revoke(h.slabs, 1, 6, 0);
    ts_slab_holder_revoke(h.slabs, 0, 7, 0);
    ts_slab_holder_revoke(h.slabs, 1, 8, 0);
    assert_int_equal(ts_slab_holder_owes(h.slabs), 0); /* it has none of these */
    assert_int_equal(rung(&h), 0);
    ts_slab_holder_revoke(h.slabs, 1, 7, 100);
    ts_slab_holder_revoke(h.slabs, 1, 7, 200); /* once is enough */
    assert_int_equal(rung(&h), 1);
    assert_int_equal(h.page->posted, 1);
    assert_int_equal(h.page->entries[0].pool, 1);
    assert_int_equal(h.page->entries[0].slab, 7);
    assert_int_equal(h.page->entries[0].generation, 3);
    assert_int_equal(ts_slab_holder_owes(h.slabs), 1);
    assert_int_equal(h.held, BYTES);
    assert_false(ts_slab_holder_look(h.slabs, 100 + MOST_MS - 1, MOST_MS));
    assert_true(ts_slab_holder_look(h.slabs, 100 + MOST_MS, MOST_MS));
    h.page->returned = 1;
    assert_false(ts_slab_holder_look(h.slabs, 100 + MOST_MS, MOST_MS));
    assert_int_equal(ts_slab_holder_owes(h.slabs), 0);
    assert_int_equal(h.held, 0);
    note(&h, 1, 7, 5); /* it may have it again */
    ts_slab_holder_revoke(h.slabs, 1, 7, 300);
    assert_int_equal(h.page->entries[1].generation, 5);
    holder_close(&h);
}

static void more_than_the_page_has_room_for_is_told_later(void **state)
{
    (void)state;
    enum { ALL = 2 * TS_REVOCATIONS + 10 };
    holder h;
    bool seen[ALL] = {false};
    holder_open(&h);
    for (uint32_t i = 0; i < ALL; i++)
        note(&h, 0, i, 1);
    for (uint32_t i = 0; i < ALL; i++)
        ts_slab_holder_revoke(h.slabs, 0, i, 0);
    assert_int_equal(h.page->posted, TS_REVOCATIONS);
    assert_int_equal(ts_slab_holder_owes(h.slabs), ALL);
    assert_int_equal(h.held, ALL * BYTES);
    for (uint32_t done = 0; done < ALL;) {
        while (h.page->returned != h.page->posted) {
            seen[h.page->entries[h.page->returned++ % TS_REVOCATIONS].slab] = true;
            done++;
        }
        assert_false(ts_slab_holder_look(h.slabs, 1, MOST_MS));
        assert_int_equal(ts_slab_holder_owes(h.slabs), ALL - done);
        assert_int_equal(h.held, (uint64_t)(ALL - done) * BYTES);
    }
    for (uint32_t i = 0; i < ALL; i++)
        assert_true(seen[i]);
    holder_close(&h);
}

static void who_says_what_cannot_be_has_returned_nothing(void **state)
{
    (void)state;
    holder h;
    holder_open(&h);
    for (uint32_t i = 0; i < 3; i++)
        note(&h, 2, i, 1);
    for (uint32_t i = 0; i < 2; i++)
        ts_slab_holder_revoke(h.slabs, 2, i, 50);
    static const uint32_t lies[] = {3, UINT32_MAX, 1000};
    for (size_t i = 0; i < sizeof lies / sizeof *lies; i++) {
        h.page->returned = lies[i];
        h.page->posted = 77;
        assert_false(ts_slab_holder_look(h.slabs, 60, MOST_MS));
        assert_int_equal(ts_slab_holder_owes(h.slabs), 2);
    }
    assert_true(ts_slab_holder_look(h.slabs, 50 + MOST_MS, MOST_MS));
    h.page->returned = 2;
    assert_false(ts_slab_holder_look(h.slabs, 50 + MOST_MS, MOST_MS));
    ts_slab_holder_revoke(h.slabs, 2, 2, 60);
    assert_int_equal(h.page->posted, 3); /* its own count */
    holder_close(&h);                    /* owing one */
}

static void a_pool_that_takes_anothers_place_owes_its_own(void **state)
{
    (void)state;
    holder h;
    holder_open(&h);
    for (uint32_t i = 0; i <= TS_REVOCATIONS; i++)
        note(&h, 0, i, 1);
    for (uint32_t i = 0; i <= TS_REVOCATIONS; i++)
        ts_slab_holder_revoke(h.slabs, 0, i, 0);
    note(&h, 0, TS_REVOCATIONS, 2); /* the one that there was no room to tell of */
    assert_int_equal(ts_slab_holder_owes(h.slabs), TS_REVOCATIONS);
    assert_int_equal(h.held, TS_REVOCATIONS * BYTES);
    h.page->returned = TS_REVOCATIONS;
    assert_false(ts_slab_holder_look(h.slabs, 1, MOST_MS));
    assert_int_equal(h.page->posted, TS_REVOCATIONS);
    holder_close(&h);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(whoever_has_a_slab_that_goes_is_told_and_charged_until_it_is_returned),
        cmocka_unit_test(more_than_the_page_has_room_for_is_told_later),
        cmocka_unit_test(who_says_what_cannot_be_has_returned_nothing),
        cmocka_unit_test(a_pool_that_takes_anothers_place_owes_its_own),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
