/* How many lines of a kind the log takes. */
#include "test_util.h"

#include "log.h"
#include "log_limit.h"

#include <stdlib.h>
#include <unistd.h>

static void a_kind_has_fifty_lines_in_ten_seconds_and_then_says_what_was_left_out(void **state)
{
    (void)state;
    static ts_log_limit limit;
    static const char a[] = "a", b[] = "b";
    uint32_t left_out;
    for (uint32_t i = 1; i <= 60; i++) {
        ts_log_verdict expected = i < 50    ? TS_LOG_WRITE
                                  : i == 50 ? TS_LOG_WRITE_LAST
                                            : TS_LOG_LEAVE_OUT;
        assert_int_equal(ts_log_limit_ask(&limit, a, 1000 + i, &left_out), expected);
        assert_int_equal(left_out, 0);
    }
    assert_int_equal(ts_log_limit_ask(&limit, b, 1061, &left_out), TS_LOG_WRITE);
    assert_int_equal(ts_log_limit_ask(&limit, a, 11000, &left_out), TS_LOG_LEAVE_OUT);
    assert_int_equal(ts_log_limit_ask(&limit, a, 11001, &left_out), TS_LOG_WRITE);
    assert_int_equal(left_out, 11);
    assert_int_equal(ts_log_limit_ask(&limit, a, 11002, &left_out), TS_LOG_WRITE);
    assert_int_equal(left_out, 0);
}

static void kinds_beyond_the_table_are_not_limited(void **state)
{
    (void)state;
    static ts_log_limit limit;
    static const char kinds[TS_LOG_KINDS + 1];
    uint32_t left_out;
    for (uint32_t i = 0; i <= TS_LOG_KINDS; i++)
        for (uint32_t n = 0; n < 60; n++)
            assert_int_equal(ts_log_limit_ask(&limit, &kinds[i], 5, &left_out) == TS_LOG_LEAVE_OUT,
                             i < TS_LOG_KINDS && n >= TS_LOG_BURST);
}

static void a_line_stays_one_line_whatever_it_tells_of(void **state)
{
    (void)state;
    char path[] = "/tmp/tinyserve-log.XXXXXX", text[256];
    int file = mkstemp(path), before = dup(STDERR_FILENO);
    assert_true(file >= 0 && before >= 0);
    assert_int_equal(unlink(path), 0);
    dup2(file, STDERR_FILENO);
    ts_log(TS_LOG_ERROR, "opened: %s", "x\ntinyserved: error: pool lost\x1b[31m\xff");
    dup2(before, STDERR_FILENO);
    ssize_t n = pread(file, text, sizeof text - 1, 0);
    assert_true(n > 0);
    text[n] = '\0';
    assert_string_equal(text, "tinyserved: error: opened: x\\x0atinyserved: error: pool "
                              "lost\\x1b[31m\\xff\n");
    close(before);
    close(file);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_kind_has_fifty_lines_in_ten_seconds_and_then_says_what_was_left_out),
        cmocka_unit_test(kinds_beyond_the_table_are_not_limited),
        cmocka_unit_test(a_line_stays_one_line_whatever_it_tells_of),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
