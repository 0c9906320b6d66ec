/* Names of kept sequences: two tenants' names don't meet, and removing one loses no other. */
#include "test_util.h"

#include "kept_names.h"

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

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_name_is_its_tenants),
        cmocka_unit_test(names_that_are_left_are_found_whatever_is_removed),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
