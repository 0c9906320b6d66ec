/* A pool's books alone: whose blocks are whose, what is counted, when a slab changes hands. */
#include "test_util.h"

#include "block_pool.h"

static ts_pool_books books;

/* 10 blocks in slabs of 4, 4 and 2; two tenants. */
static int pool_new(void **state)
{
    (void)state;
    assert_int_equal(ts_pool_init(&books, 10, 10, 4), TS_OK);
    assert_int_equal(ts_pool_add_tenant(&books, 1), TS_OK);
    return 0;
}

static int pool_end(void **state)
{
    (void)state;
    ts_pool_fini(&books);
    return 0;
}

static void grant_next(uint32_t tenant)
{
    assert_int_equal(ts_pool_grant(&books, ts_pool_next_slab(&books, tenant), tenant), TS_OK);
}

static void a_tenant_gets_blocks_of_its_own_slabs_alone(void **state)
{
    (void)state;
    assert_int_equal(ts_pool_grantable(&books, 0), 10);
    assert_int_equal(ts_pool_available(&books, 0), 10);
    grant_next(0);
    grant_next(1);
    assert_int_equal(books.tenants[0].free, 4);
    for (uint32_t i = 0; i < 4; i++) {
        assert_int_equal(ts_pool_take(&books, 0, 0) / 4, 0);
        assert_int_equal(ts_pool_take(&books, 1, 0) / 4, 1);
    }
    assert_int_equal(books.tenants[0].free, 0);
    assert_int_equal(books.tenants[0].used, 4);
    assert_int_equal(ts_pool_available(&books, 0), 2); /* the slab that nobody has */
    assert_int_equal(ts_pool_grantable(&books, 0), 2);
}

static void a_block_is_free_when_its_last_reference_goes(void **state)
{
    (void)state;
    grant_next(0);
    const uint32_t block = ts_pool_take(&books, 0, 0);
    assert_int_equal(ts_pool_refs(&books, block), 1);
    ts_pool_ref(&books, block);
    assert_int_equal(ts_pool_refs(&books, block), 2);
    assert_int_equal(books.shared, 1);
    ts_pool_unref(&books, block);
    assert_int_equal(books.shared, 0);
    assert_int_equal(books.used, 1);
    assert_int_equal(ts_pool_first_used(&books, 0), block);
    ts_pool_unref(&books, block);
    assert_int_equal(ts_pool_refs(&books, block), 0);
    assert_int_equal(books.used, 0);
    assert_int_equal(ts_pool_first_used(&books, 0), UINT32_MAX);
    assert_int_equal(ts_pool_take(&books, 0, 0), block); /* the one that was freed last */
}

static void an_empty_slab_goes_to_another_tenant_with_a_new_generation(void **state)
{
    (void)state;
    char why[128];
    uint32_t expected[10] = {0};
    for (uint32_t i = 0; i < 3; i++)
        grant_next(0);
    const uint32_t block = ts_pool_take(&books, 0, 0), slab = block / 4;
    const uint32_t before = books.slabs[slab].generation;
    assert_int_equal(ts_pool_available(&books, 1), slab == 2 ? 8 : 6); /* not the slab in use */
    ts_pool_unref(&books, block);
    assert_int_equal(ts_pool_available(&books, 1), 10);
    while (books.slabs[slab].tenant != 1)
        grant_next(1);
    assert_int_equal(books.slabs[slab].generation, before + 1);
    assert_int_equal(ts_pool_check(&books, expected, why, sizeof why), TS_OK);
}

static void a_block_is_pinned_once_however_many_pin_it(void **state)
{
    (void)state;
    grant_next(0);
    const uint32_t block = ts_pool_take(&books, 0, 0);
    ts_pool_pin(&books, 0, block);
    ts_pool_pin(&books, 0, block);
    assert_int_equal(books.tenants[0].pinned, 1);
    ts_pool_unpin(&books, 0, block);
    assert_int_equal(books.tenants[0].pinned, 1);
    ts_pool_unpin(&books, 0, block);
    assert_int_equal(books.tenants[0].pinned, 0);
}

static void the_check_finds_a_reference_that_nobody_has(void **state)
{
    (void)state;
    char why[128];
    uint32_t expected[10] = {0};
    grant_next(0);
    const uint32_t block = ts_pool_take(&books, 0, 0);
    expected[block] = 1;
    assert_int_equal(ts_pool_check(&books, expected, why, sizeof why), TS_OK);
    expected[block] = 2;
    assert_int_equal(ts_pool_check(&books, expected, why, sizeof why), TS_EINTERNAL);
    assert_true(why[0] != '\0');
}

static void slabs_are_granted_in_order_and_none_that_is_in_use(void **state)
{
    (void)state;
    assert_int_equal(ts_pool_grant(&books, 1, 0), TS_EINVAL); /* 0 comes first */
    assert_int_equal(ts_pool_grant(&books, 3, 0), TS_ENOENT);
    assert_int_equal(ts_pool_grant(&books, 0, 2), TS_ENOENT);
    grant_next(0);
    ts_pool_take(&books, 0, 0);
    assert_int_equal(ts_pool_grant(&books, 0, 1), TS_EBUSY);
    grant_next(0);
    assert_int_equal(ts_pool_grantable(&books, 0), 2); /* an empty slab is its tenant's already */
    assert_int_equal(ts_pool_grantable(&books, 1), 6);
}

static void a_smaller_pool_has_given_up_its_last_slabs(void **state)
{
    (void)state;
    grant_next(0);
    ts_pool_take(&books, 0, 0);
    grant_next(0);
    grant_next(0);
    assert_int_equal(books.tenants[0].free, 9);
    ts_pool_resize(&books, 4);
    assert_int_equal(books.num_slabs, 1);
    assert_int_equal(books.tenants[0].slabs, 1);
    assert_int_equal(books.tenants[0].free, 3);
    assert_int_equal(ts_pool_next_slab(&books, 0), TS_NONE);
    const uint32_t generation = books.slabs[2].generation;
    ts_pool_resize(&books, 10);
    assert_int_equal(ts_pool_next_slab(&books, 0), 1);
    grant_next(1);
    grant_next(1);
    assert_int_equal(books.slabs[2].generation, generation + 1);
}

/* ---- cached blocks ---- */

/* The same, with an index of blocks of 4 tokens, and a namespace of tenant 0. */
static uint32_t space;

static int pool_of_cached_new(void **state)
{
    pool_new(state);
    assert_int_equal(ts_pool_use_index(&books, 4, 1), TS_OK);
    return ts_index_use_space(books.index, 0, "m", 1, &space);
}

/* A block that a sequence has and the index knows, behind `parent` or as the first. */
static uint32_t take_indexed(uint32_t parent, uint32_t id)
{
    const uint32_t block = ts_pool_take(&books, 0, 0);
    const uint32_t ids[4] = {id, id, id, id};
    memcpy(ts_index_ids(books.index, block), ids, sizeof ids);
    assert_true(ts_index_add(
        books.index, parent == TS_NONE ? ts_index_root(space) : ts_index_block(parent), block));
    return block;
}

static void a_block_of_the_index_is_cached_until_room_is_needed(void **state)
{
    (void)state;
    uint32_t budget = 10;
    grant_next(0);
    const uint32_t block = take_indexed(TS_NONE, 1);
    ts_pool_unref(&books, block);
    assert_true(ts_pool_is_cached(&books, block));
    assert_int_equal(ts_pool_refs(&books, block), 0);
    assert_int_equal(books.cached, 1);
    assert_int_equal(books.tenants[0].cached, 1);
    assert_int_equal(books.idle_blocks, 4); /* the slab has cached blocks alone */
    assert_int_equal(ts_pool_available(&books, 0), 10);
    ts_pool_ref(&books, block); /* found again */
    assert_int_equal(books.cached, 0);
    assert_int_equal(books.idle_blocks, 0);
    assert_int_equal(ts_pool_refs(&books, block), 1);
    ts_pool_unref(&books, block);
    ts_pool_evict(&books, 0, 5, TS_EVICT_ROOM, &budget);
    assert_int_equal(budget, 9);
    assert_false(ts_pool_is_cached(&books, block));
    assert_int_equal(books.cached, 0);
    assert_int_equal(books.idle_blocks, 0);
    assert_int_equal(books.tenants[0].idle_blocks, 0);
    assert_int_equal(books.evicted[TS_EVICT_ROOM], 1);
    assert_int_equal(books.tenants[0].free, 4);
}

static void the_lowest_class_goes_first_and_in_it_the_oldest(void **state)
{
    (void)state;
    uint32_t blocks[4], budget = 10;
    grant_next(0);
    for (uint32_t i = 0; i < 4; i++)
        blocks[i] = take_indexed(TS_NONE, i);
    assert_true(ts_pool_raise_class(&books, blocks[0], 2));
    assert_false(ts_pool_raise_class(&books, blocks[0], 2)); /* it was */
    assert_false(ts_pool_raise_class(&books, blocks[0], 1));
    for (uint32_t i = 0; i < 4; i++)
        ts_pool_unref(&books, blocks[i]);
    static const uint32_t order[4] = {1, 2, 3, 0};
    for (uint32_t i = 0; i < 4; i++) {
        ts_pool_evict(&books, 0, 1, TS_EVICT_LIMIT, &budget);
        for (uint32_t j = 0; j <= i; j++)
            assert_false(ts_pool_is_cached(&books, blocks[order[j]]));
        assert_int_equal(books.cached, 3 - i);
    }
    assert_int_equal(ts_pool_evicted(&books), 4);
}

static void ages_of_what_is_evicted_are_counted_up_to_their_bounds(void **state)
{
    (void)state;
    static const uint32_t ages[] = {0, 1, 2, 10, 60, 600, 3600, 3601};
    static const uint32_t bins[TS_AGE_BINS] = {2, 2, 1, 1, 1, 1};
    grant_next(0);
    uint64_t sum = 0;
    for (size_t i = 0; i < sizeof ages / sizeof *ages; i++) {
        uint32_t budget = 1;
        ts_pool_unref(&books, take_indexed(TS_NONE, 1));
        books.now_s += ages[i];
        sum += ages[i];
        ts_pool_evict(&books, 0, 1, TS_EVICT_ROOM, &budget);
    }
    for (uint32_t i = 0; i < TS_AGE_BINS; i++)
        assert_int_equal(books.ages[i], bins[i]);
    assert_int_equal(books.age_sum, sum);
}

static void a_slab_of_cached_blocks_goes_to_another_tenant_with_what_hangs_from_them(void **state)
{
    (void)state;
    uint32_t budget = 10, chain[6];
    grant_next(0);
    grant_next(0);
    for (uint32_t i = 0; i < 6; i++)
        chain[i] = take_indexed(i == 0 ? TS_NONE : chain[i - 1], i);
    for (uint32_t i = 6; i-- > 0;)
        ts_pool_unref(&books, chain[i]);
    assert_false(ts_pool_empty_other(&books, 0, 0, false, &budget)); /* its own aren't another's */
    assert_false(ts_pool_empty_other(&books, 1, 2, true, &budget));  /* it has no more than 2 */
    assert_int_equal(books.cached, 6);
    assert_true(ts_pool_empty_other(&books, 1, 1, true, &budget));
    /* The slab that became idle first is that of the chain's end. */
    assert_int_equal(books.cached, 4);
    assert_int_equal(budget, 8);
    assert_int_equal(books.evicted[TS_EVICT_OTHERS], 2);
    assert_true(ts_pool_is_cached(&books, chain[3]));
    ts_pool_drop_block(&books, chain[1]); /* and what hangs from it */
    assert_int_equal(books.cached, 1);
    assert_true(ts_pool_is_cached(&books, chain[0]));
    assert_int_equal(books.evicted[TS_EVICT_DROP], 3);
}

/* ---- slabs that are sessions' own ---- */

/* 40 blocks in slabs of 4, for 3 sessions of tenant 0. */
static int pool_of_homes_new(void **state)
{
    (void)state;
    assert_int_equal(ts_pool_init(&books, 40, 40, 4), TS_OK);
    assert_int_equal(ts_pool_use_homes(&books, 3), TS_OK);
    assert_int_equal(ts_pool_add_tenant(&books, 1), TS_OK);
    return 0;
}

/* The books agree; each block that `taken` has is used once. */
static void check(const uint32_t *taken, uint32_t count)
{
    uint32_t expected[40] = {0};
    char why[160] = "";
    for (uint32_t i = 0; i < count; i++)
        expected[taken[i]]++;
    if (ts_pool_check(&books, expected, why, sizeof why) != TS_OK)
        fail_msg("%s", why);
}

static void a_session_gets_blocks_of_a_slab_of_its_own(void **state)
{
    (void)state;
    uint32_t taken[12];
    grant_next(0);
    grant_next(0);
    grant_next(0);
    for (uint32_t i = 0; i < 12; i++) { /* each in turn, as workers that decode do */
        taken[i] = ts_pool_take(&books, 0, i % 3);
        check(taken, i + 1);
    }
    for (uint32_t i = 0; i < 12; i++)
        assert_int_equal(taken[i] / 4, taken[i % 3] / 4);
    assert_true(taken[0] / 4 != taken[1] / 4 && taken[1] / 4 != taken[2] / 4 &&
                taken[2] / 4 != taken[0] / 4);
    assert_int_equal(books.tenants[0].homes, 3);
    grant_next(0); /* the next one that comes to need a slab gets this one */
    assert_int_equal(ts_pool_take(&books, 0, 1) / 4, 3);
    ts_pool_unref(&books, taken[3]);
    assert_int_equal(ts_pool_take(&books, 0, 0), taken[3]); /* of its own, not of a new one */
    assert_int_equal(ts_pool_take(&books, 0, 1) / 4, 3);
}

static void blocks_of_other_sessions_slabs_come_last(void **state)
{
    (void)state;
    uint32_t taken[8];
    grant_next(0);
    taken[0] = ts_pool_take(&books, 0, 0);
    taken[1] = ts_pool_take(&books, 0, 1); /* there is nothing else: no slab is granted for it */
    assert_int_equal(taken[1] / 4, taken[0] / 4);
    assert_int_equal(books.tenants[0].homes, 1); /* the slab stays the first one's */
    grant_next(0);
    taken[2] = ts_pool_take(&books, 0, 1);
    taken[3] = ts_pool_take(&books, 0, 0);
    taken[4] = ts_pool_take(&books, 0, 1);
    assert_int_equal(taken[2] / 4, 1);
    assert_int_equal(taken[3] / 4, 0);
    assert_int_equal(taken[4] / 4, 1);
    check(taken, 5);
}

static void a_slab_is_nobodys_when_it_is_empty_or_its_session_has_ended(void **state)
{
    (void)state;
    uint32_t taken[8];
    for (uint32_t i = 0; i < 3; i++)
        grant_next(0);
    for (uint32_t i = 0; i < 5; i++)
        taken[i] = ts_pool_take(&books, 0, 0); /* a full one and one of which 3 are free */
    taken[5] = ts_pool_take(&books, 0, 1);
    check(taken, 6);
    assert_int_equal(books.tenants[0].nobodys, 0);
    ts_pool_unref(&books, taken[5]); /* empty */
    assert_int_equal(books.tenants[0].nobodys, 1);
    assert_int_equal(books.tenants[0].homes, 1);
    check(taken, 5);
    ts_pool_leave_home(&books, 0);
    assert_int_equal(books.tenants[0].nobodys, 2);
    assert_int_equal(books.tenants[0].homes, 0);
    check(taken, 5);
    ts_pool_unref(&books, taken[0]); /* of the full one */
    assert_int_equal(books.tenants[0].nobodys, 3);
    check(taken + 1, 4);
    const uint32_t block = ts_pool_take(&books, 0, 2);
    assert_int_equal(block, taken[0]); /* the slab that was used last */
    assert_int_equal(books.slabs[block / 4].home, 3);
}

static void an_empty_slab_goes_to_another_tenant_and_is_no_sessions(void **state)
{
    (void)state;
    grant_next(0);
    const uint32_t block = ts_pool_take(&books, 0, 0);
    ts_pool_unref(&books, block);
    assert_int_equal(ts_pool_grant(&books, 0, 1), TS_OK);
    check(NULL, 0);
    const uint32_t taken[2] = {ts_pool_take(&books, 1, 0), ts_pool_take(&books, 1, 1)};
    assert_int_equal(taken[0] / 4, 0);
    assert_int_equal(books.tenants[0].homes, 0);
    check(taken, 2);
}

/* As many spare slabs as sessions have slabs of their own, but an eighth of the pool at most. */
static void slabs_are_wanted_ahead_for_sessions_that_have_their_own(void **state)
{
    (void)state;
    uint32_t taken[8];
    ts_pool_fini(&books);
    assert_int_equal(ts_pool_init(&books, 68, 68, 4), TS_OK); /* 17 slabs: 2 ahead at most */
    assert_int_equal(ts_pool_use_homes(&books, 3), TS_OK);
    assert_int_equal(ts_pool_add_tenant(&books, 1), TS_OK);
    assert_false(ts_pool_wants_spare(&books, 0));
    grant_next(0);
    assert_false(ts_pool_wants_spare(&books, 0)); /* no session has any */
    taken[0] = ts_pool_take(&books, 0, 0);
    assert_true(ts_pool_wants_spare(&books, 0));
    assert_false(ts_pool_wants_spare(&books, 1));
    grant_next(0);
    assert_false(ts_pool_wants_spare(&books, 0)); /* one session, one slab */
    taken[1] = ts_pool_take(&books, 0, 1);
    grant_next(0);
    assert_true(ts_pool_wants_spare(&books, 0)); /* two sessions */
    taken[2] = ts_pool_take(&books, 0, 2);
    grant_next(0);
    grant_next(0);
    assert_false(ts_pool_wants_spare(&books, 0)); /* three, but two are an eighth */
    while (books.ungranted < books.num_slabs)
        grant_next(1);
    ts_pool_take(&books, 1, 0);
    assert_false(ts_pool_wants_spare(&books, 0)); /* there is none that nobody had */
    (void)taken;
}

static void what_is_found_of_read_books_is_what_was_there(void **state)
{
    (void)state;
    for (uint32_t i = 0; i < 4; i++)
        grant_next(i == 3);
    for (uint32_t i = 0; i < 7; i++)
        ts_pool_take(&books, 0, i < 5 ? 0 : 1);
    ts_pool_take(&books, 1, 2);
    const ts_pool_tenant before[2] = {books.tenants[0], books.tenants[1]};
    const ts_slab_home homes[3] = {books.homes[0], books.homes[1], books.homes[2]};
    for (uint32_t i = 0; i < 3; i++)
        books.homes[i] = (ts_slab_home){TS_NONE, TS_NONE};
    for (uint32_t i = 0; i < 2; i++)
        books.tenants[i].avail_last = books.tenants[i].nobodys = books.tenants[i].homes = 99;
    ts_pool_find_homes(&books);
    assert_memory_equal(books.tenants, before, sizeof before);
    assert_memory_equal(books.homes, homes, sizeof homes);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(a_tenant_gets_blocks_of_its_own_slabs_alone, pool_new,
                                        pool_end),
        cmocka_unit_test_setup_teardown(a_block_is_free_when_its_last_reference_goes, pool_new,
                                        pool_end),
        cmocka_unit_test_setup_teardown(an_empty_slab_goes_to_another_tenant_with_a_new_generation,
                                        pool_new, pool_end),
        cmocka_unit_test_setup_teardown(a_block_is_pinned_once_however_many_pin_it, pool_new,
                                        pool_end),
        cmocka_unit_test_setup_teardown(the_check_finds_a_reference_that_nobody_has, pool_new,
                                        pool_end),
        cmocka_unit_test_setup_teardown(slabs_are_granted_in_order_and_none_that_is_in_use,
                                        pool_new, pool_end),
        cmocka_unit_test_setup_teardown(a_smaller_pool_has_given_up_its_last_slabs, pool_new,
                                        pool_end),
        cmocka_unit_test_setup_teardown(a_block_of_the_index_is_cached_until_room_is_needed,
                                        pool_of_cached_new, pool_end),
        cmocka_unit_test_setup_teardown(the_lowest_class_goes_first_and_in_it_the_oldest,
                                        pool_of_cached_new, pool_end),
        cmocka_unit_test_setup_teardown(ages_of_what_is_evicted_are_counted_up_to_their_bounds,
                                        pool_of_cached_new, pool_end),
        cmocka_unit_test_setup_teardown(
            a_slab_of_cached_blocks_goes_to_another_tenant_with_what_hangs_from_them,
            pool_of_cached_new, pool_end),
        cmocka_unit_test_setup_teardown(a_session_gets_blocks_of_a_slab_of_its_own,
                                        pool_of_homes_new, pool_end),
        cmocka_unit_test_setup_teardown(blocks_of_other_sessions_slabs_come_last, pool_of_homes_new,
                                        pool_end),
        cmocka_unit_test_setup_teardown(a_slab_is_nobodys_when_it_is_empty_or_its_session_has_ended,
                                        pool_of_homes_new, pool_end),
        cmocka_unit_test_setup_teardown(an_empty_slab_goes_to_another_tenant_and_is_no_sessions,
                                        pool_of_homes_new, pool_end),
        cmocka_unit_test_setup_teardown(slabs_are_wanted_ahead_for_sessions_that_have_their_own,
                                        pool_of_homes_new, pool_end),
        cmocka_unit_test_setup_teardown(what_is_found_of_read_books_is_what_was_there,
                                        pool_of_homes_new, pool_end),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
