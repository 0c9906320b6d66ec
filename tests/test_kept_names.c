/* Names of kept sequences: two tenants' names don't meet, removing one loses no other, and they
 * have an order. */
#include "test_util.h"

#include "kept_names.h"
#include "name_order.h"

#include <stdbool.h>
#include <stdio.h>

#define MANY 3000u

static void a_name_is_its_tenants(void **state)
{
    (void)state;
    ts_names names = {0};
    const char *kept, *others;
    char mine[] = "prompt";
    assert_int_equal(ts_names_find(&names, 1, mine), UINT32_MAX);
    assert_int_equal(ts_names_add(&names, 1, mine, 10, &kept), TS_OK);
    assert_int_equal(ts_names_add(&names, 2, mine, 20, &others), TS_OK);
    mine[0] = 'P'; /* the table has a copy */
    assert_string_equal(kept, "prompt");
    assert_int_equal(ts_names_find(&names, 1, "prompt"), 10);
    assert_int_equal(ts_names_find(&names, 2, "prompt"), 20);
    assert_int_equal(ts_names_find(&names, 3, "prompt"), UINT32_MAX);
    assert_int_equal(ts_names_find(&names, 1, "Prompt"), UINT32_MAX);
    ts_names_set(&names, 1, "prompt", 11);
    assert_int_equal(ts_names_find(&names, 1, "prompt"), 11);
    assert_int_equal(ts_names_find(&names, 2, "prompt"), 20);
    ts_names_remove(&names, 1, "prompt");
    assert_int_equal(ts_names_find(&names, 1, "prompt"), UINT32_MAX);
    assert_int_equal(ts_names_find(&names, 2, "prompt"), 20);
    assert_int_equal(names.count, 1);
    ts_names_fini(&names);
}

/* Entries lie behind each other where their hashes meet: what follows a removed one is found. */
static void names_that_are_left_are_found_whatever_is_removed(void **state)
{
    (void)state;
    ts_names names = {0};
    rng r = {5};
    bool there[MANY] = {false};
    char name[16];
    uint32_t live = 0;
    for (uint32_t turn = 0; turn < 40000; turn++) {
        const uint32_t i = rng_below(&r, MANY);
        const char *kept;
        snprintf(name, sizeof name, "%u", i);
        if (there[i])
            ts_names_remove(&names, i % 3, name);
        else
            assert_int_equal(ts_names_add(&names, i % 3, name, i, &kept), TS_OK);
        there[i] = !there[i];
        live = there[i] ? live + 1 : live - 1;
        assert_int_equal(names.count, live);
        if (turn % 1000 == 0)
            for (uint32_t j = 0; j < MANY; j++) {
                snprintf(name, sizeof name, "%u", j);
                assert_int_equal(ts_names_find(&names, j % 3, name), there[j] ? j : UINT32_MAX);
            }
    }
    ts_names_fini(&names);
}

/* The order against a sorted array: what is after each name, there or not. */
static void names_are_in_order_whatever_is_added_and_removed(void **state)
{
    (void)state;
    enum { NAMES = 200 };
    ts_name_order order = {.seed = 3};
    rng r = {6};
    bool there[2][NAMES] = {{false}};
    char names[NAMES][8];
    for (uint32_t i = 0; i < NAMES; i++)
        snprintf(names[i], sizeof names[i], "%03u", i);
    for (uint32_t turn = 0; turn < 20000; turn++) {
        const uint32_t tenant = rng_below(&r, 2), i = rng_below(&r, NAMES);
        if (there[tenant][i])
            ts_name_order_remove(&order, tenant, names[i]);
        else
            assert_true(ts_name_order_add(&order, tenant, names[i]));
        there[tenant][i] = !there[tenant][i];
        const bool past = turn % 2;
        uint32_t at = rng_below(&r, NAMES), next = past ? at + 1 : at;
        while (next < NAMES && !there[tenant][next])
            next++;
        const ts_name_node *node = ts_name_order_from(&order, tenant, names[at], past);
        if (next == NAMES) {
            assert_null(node);
            continue;
        }
        assert_string_equal(node->name, names[next]);
        for (next++; next < NAMES && !there[tenant][next];)
            next++;
        node = ts_name_order_next(node);
        if (next == NAMES)
            assert_null(node);
        else
            assert_string_equal(node->name, names[next]);
    }
    ts_name_order_fini(&order);
}

/* The heights are spread as they should be: few nodes are looked at. */
static void a_name_among_many_is_found_in_few_steps(void **state)
{
    (void)state;
    enum { NAMES = 4096 };
    static char names[NAMES][8];
    ts_name_order order = {.seed = 9};
    uint32_t count[TS_NAME_HEIGHT_MAX + 1] = {0};
    for (uint32_t i = 0; i < NAMES; i++) {
        snprintf(names[i], sizeof names[i], "%u", i);
        assert_true(ts_name_order_add(&order, 0, names[i]));
    }
    for (const ts_name_node *n = order.first[0]; n != NULL; n = n->next[0])
        count[n->height]++;
    assert_in_range(count[1], NAMES * 70 / 100, NAMES * 80 / 100);
    assert_in_range(count[2], NAMES * 15 / 100, NAMES * 22 / 100);
    assert_in_range(count[3], NAMES * 3 / 100, NAMES * 7 / 100);
    ts_name_order_fini(&order);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_name_is_its_tenants),
        cmocka_unit_test(names_that_are_left_are_found_whatever_is_removed),
        cmocka_unit_test(names_are_in_order_whatever_is_added_and_removed),
        cmocka_unit_test(a_name_among_many_is_found_in_few_steps),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
