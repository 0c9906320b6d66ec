/* The prefix index alone: children by their tokens, parts of blocks, namespaces, full chains. */
#include "test_util.h"

#include "prefix_index.h"

enum { BLOCKS = 64, TOKENS = 4 };

static ts_prefix_index x;
static uint32_t space;

static int index_new(void **state)
{
    (void)state;
    assert_true(ts_index_init(&x, BLOCKS, TOKENS, 7));
    assert_int_equal(ts_index_use_space(&x, 0, "m", 1, &space), TS_OK);
    return 0;
}

static int index_end(void **state)
{
    char why[200];
    (void)state;
    assert_int_equal(ts_index_check(&x, why, sizeof why), TS_OK);
    ts_index_fini(&x);
    return 0;
}

static bool add(ts_index_parent parent, uint32_t block, uint32_t a, uint32_t b, uint32_t c,
                uint32_t d)
{
    memcpy(ts_index_ids(&x, block), (const uint32_t[]){a, b, c, d}, TOKENS * sizeof(uint32_t));
    return ts_index_add(&x, parent, block);
}

static void a_child_is_found_by_its_parent_and_all_its_tokens(void **state)
{
    (void)state;
    assert_true(add(ts_index_root(space), 5, 1, 2, 3, 4));
    assert_true(add(ts_index_block(5), 9, 1, 2, 3, 4));
    const uint32_t same[] = {1, 2, 3, 4}, other[] = {1, 2, 3, 5};
    assert_int_equal(ts_index_find(&x, ts_index_root(space), same), 5);
    assert_int_equal(ts_index_find(&x, ts_index_block(5), same), 9);
    assert_int_equal(ts_index_find(&x, ts_index_block(9), same), TS_NO_BLOCK);
    assert_int_equal(ts_index_find(&x, ts_index_root(space), other), TS_NO_BLOCK);
    assert_false(ts_index_is_leaf(&x, 5));
    assert_int_equal(ts_index_leaf_below(&x, 5), 9);
    ts_index_remove(&x, 9);
    assert_int_equal(ts_index_find(&x, ts_index_block(5), same), TS_NO_BLOCK);
    assert_true(ts_index_is_leaf(&x, 5));
}

/* A hash that is the same never finds a block whose tokens are others. */
static void tokens_are_compared_whatever_their_hash(void **state)
{
    (void)state;
    assert_true(add(ts_index_root(space), 1, 1, 2, 3, 4));
    ts_index_ids(&x, 1)[3] = 99; /* as if others had this hash */
    assert_int_equal(ts_index_find(&x, ts_index_root(space), (const uint32_t[]){1, 2, 3, 4}),
                     TS_NO_BLOCK);
    ts_index_ids(&x, 1)[3] = 4;
}

static void the_longest_common_part_of_the_newest_children_is_found(void **state)
{
    (void)state;
    uint32_t agree;
    assert_true(add(ts_index_root(space), 1, 1, 2, 3, 4));
    assert_true(add(ts_index_root(space), 2, 1, 2, 9, 9));
    const uint32_t ids[] = {1, 2, 3, 8};
    assert_int_equal(ts_index_find_part(&x, ts_index_root(space), ids, 4, &agree), 1);
    assert_int_equal(agree, 3);
    assert_int_equal(ts_index_find_part(&x, ts_index_root(space), ids, 2, &agree), 2);
    assert_int_equal(agree, 2); /* both agree: the newer */
    assert_int_equal(ts_index_find_part(&x, ts_index_root(space), ids + 2, 2, &agree), TS_NO_BLOCK);
    for (uint32_t i = 0; i < TS_INDEX_PARTIAL_MAX - 1; i++)
        assert_true(add(ts_index_root(space), 10 + i, 50 + i, 0, 0, 0));
    assert_int_equal(ts_index_find_part(&x, ts_index_root(space), ids, 4, &agree), 2);
    assert_int_equal(agree, 2); /* the older one isn't looked at any more */
}

static void namespaces_are_tenants_own_and_go_with_their_last_user(void **state)
{
    (void)state;
    uint32_t again, other, theirs;
    assert_int_equal(ts_index_use_space(&x, 0, "m", 1, &again), TS_OK);
    assert_int_equal(again, space);
    assert_int_equal(ts_index_use_space(&x, 0, "m\0x", 3, &other), TS_OK);
    assert_int_equal(ts_index_use_space(&x, 1, "m", 1, &theirs), TS_OK);
    assert_true(other != space && theirs != space && theirs != other);
    assert_int_equal(ts_index_find_space(&x, 1, "m", 1), theirs);
    assert_true(add(ts_index_root(theirs), 3, 1, 1, 1, 1));
    ts_index_leave_space(&x, theirs);
    assert_int_equal(ts_index_find_space(&x, 1, "m", 1), theirs); /* it has a block */
    ts_index_remove(&x, 3);
    assert_int_equal(ts_index_find_space(&x, 1, "m", 1), TS_NO_BLOCK);
    ts_index_leave_space(&x, other);
    assert_int_equal(ts_index_find_space(&x, 0, "m\0x", 3), TS_NO_BLOCK);
    ts_index_leave_space(&x, again);
    assert_int_equal(ts_index_find_space(&x, 0, "m", 1), space);
}

static void a_tenant_has_1024_namespaces(void **state)
{
    (void)state;
    uint32_t made;
    for (uint32_t i = 1; i < TS_NAMESPACES_MAX; i++)
        assert_int_equal(ts_index_use_space(&x, 0, &i, sizeof i, &made), TS_OK);
    assert_int_equal(ts_index_use_space(&x, 0, "more", 4, &made), TS_EQUOTA);
    assert_int_equal(ts_index_use_space(&x, 1, "more", 4, &made), TS_OK);
}

/* Whoever floods a bucket keeps blocks of its own from being indexed, and nobody waits longer. */
static void a_full_chain_takes_no_more(void **state)
{
    (void)state;
    uint32_t block = 0, chain = 0;
    for (uint32_t i = 0; chain < TS_INDEX_CHAIN_MAX; i++) {
        assert_true(add(ts_index_root(space), block, i, i, i, i));
        if ((x.nodes[block].hash & x.bucket_mask) != 0) {
            ts_index_remove(&x, block);
            continue;
        }
        chain++;
        block++;
    }
    for (uint32_t i = 1u << 31;; i++) {
        if (!add(ts_index_root(space), block, i, i, i, i))
            break;
        assert_int_not_equal(x.nodes[block].hash & x.bucket_mask, 0);
        ts_index_remove(&x, block);
    }
    assert_false(ts_index_has(&x, block));
    assert_int_equal(x.count, TS_INDEX_CHAIN_MAX);
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, index_new, index_end)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(a_child_is_found_by_its_parent_and_all_its_tokens),
        TEST(tokens_are_compared_whatever_their_hash),
        TEST(the_longest_common_part_of_the_newest_children_is_found),
        TEST(namespaces_are_tenants_own_and_go_with_their_last_user),
        TEST(a_tenant_has_1024_namespaces),
        TEST(a_full_chain_takes_no_more),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
