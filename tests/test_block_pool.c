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
        assert_int_equal(ts_pool_take(&books, 0) / 4, 0);
        assert_int_equal(ts_pool_take(&books, 1) / 4, 1);
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
    const uint32_t block = ts_pool_take(&books, 0);
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
    assert_int_equal(ts_pool_take(&books, 0), block); /* the one that was freed last */
}

static void an_empty_slab_goes_to_another_tenant_with_a_new_generation(void **state)
{
    (void)state;
    char why[128];
    uint32_t expected[10] = {0};
    for (uint32_t i = 0; i < 3; i++)
        grant_next(0);
    const uint32_t block = ts_pool_take(&books, 0), slab = block / 4;
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
    const uint32_t block = ts_pool_take(&books, 0);
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
    const uint32_t block = ts_pool_take(&books, 0);
    expected[block] = 1;
    assert_int_equal(ts_pool_check(&books, expected, why, sizeof why), TS_OK);
    expected[block] = 2;
    assert_int_equal(ts_pool_check(&books, expected, why, sizeof why), TS_EINTERNAL);
    assert_true(why[0] != '\0');
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
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
