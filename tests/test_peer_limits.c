/* How many connections each user may have. */
#include "test_util.h"

#include "peer_limits.h"

static char why[200];

static bool enter(ts_crowd *c, uint32_t uid, bool is_operator)
{
    return ts_crowd_enter(c, &(ts_guest){.uid = uid, .is_operator = is_operator}, why, sizeof why);
}

static void a_user_leaves_some_to_others_and_to_operators(void **state)
{
    (void)state;
    ts_crowd c = {.max = 40, .tenant_max = 1024};
    for (uint32_t i = 0; i < 30; i++)
        assert_true(enter(&c, 1, false));
    assert_false(enter(&c, 1, false));
    assert_string_equal(why, "uid 1 has 30 connections; the limit is 30 (three quarters of what "
                             "the daemon's descriptors allow)");
    for (uint32_t i = 0; i < 2; i++)
        assert_true(enter(&c, 2, false));
    assert_false(enter(&c, 2, false));
    assert_string_equal(why, "the daemon has 32 connections; the last 8 are for operators");
    for (uint32_t i = 0; i < TS_OPERATOR_CONNECTIONS; i++)
        assert_true(enter(&c, 0, true));
    assert_false(enter(&c, 0, true));
    assert_string_equal(why, "the daemon has 40 connections, the most it may have");
    for (uint32_t i = 0; i < 30; i++)
        ts_crowd_leave(&c, &(ts_guest){.uid = 1});
    assert_true(enter(&c, 2, false));
    assert_int_equal(c.count, 11);
    ts_crowd_fini(&c);
}

static void a_smaller_limit_is_the_configurations(void **state)
{
    (void)state;
    ts_crowd c = {.max = 40, .tenant_max = 2};
    assert_true(enter(&c, 1, false));
    assert_true(enter(&c, 1, false));
    assert_false(enter(&c, 1, false));
    assert_string_equal(why, "uid 1 has 2 connections; the limit is 2 (tenant_connections)");
    for (uint32_t i = 0; i < 10; i++)
        assert_true(enter(&c, 0, true));
    ts_crowd_fini(&c);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_user_leaves_some_to_others_and_to_operators),
        cmocka_unit_test(a_smaller_limit_is_the_configurations),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
