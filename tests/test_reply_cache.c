/* Answers that are kept for repeated requests: which, how many, and how many bytes. */
#include "test_util.h"

#include "reply_cache.h"

#include <string.h>

static ts_reply_account *accounts;
static unsigned char bytes[TS_REPLY_BYTES_KEPT];

static void answer(ts_reply_cache *r, uint64_t id, size_t size)
{
    ts_kept_reply *kept = ts_reply_cache_start(r, id);
    assert_non_null(kept);
    memset(bytes, (int)id, size);
    ts_reply_cache_keep(r, kept, bytes, size);
}

static bool is_kept(ts_reply_cache *r, uint64_t id)
{
    const ts_kept_reply *kept = ts_reply_cache_at(r, id);
    return kept != NULL && kept->bytes != NULL && kept->bytes[0] == (unsigned char)id;
}

static void the_last_64_answers_are_kept(void **state)
{
    (void)state;
    static ts_reply_cache r;
    assert_true(ts_reply_cache_init(&r, &accounts, 1000));
    for (uint64_t id = 1; id <= 100; id++)
        answer(&r, id, 8);
    for (uint64_t id = 1; id <= 100; id++)
        assert_int_equal(is_kept(&r, id), id > 100 - TS_REPLIES_KEPT);
    assert_int_equal(r.forgotten, 100 - TS_REPLIES_KEPT);
    assert_null(ts_reply_cache_start(&r, 100 - TS_REPLIES_KEPT)); /* it was answered */
    assert_null(ts_reply_cache_start(&r, 20));
    assert_non_null(ts_reply_cache_start(&r, 101));
    ts_reply_cache_fini(&r, &accounts);
    assert_null(accounts);
}

/* An answer that had to go is still known to have been given. */
static void answers_of_a_connection_are_kept_up_to_their_bytes(void **state)
{
    (void)state;
    static ts_reply_cache r;
    assert_true(ts_reply_cache_init(&r, &accounts, 1000));
    for (uint64_t id = 1; id <= 5; id++)
        answer(&r, id, TS_REPLY_BYTES_KEPT / 4);
    assert_false(is_kept(&r, 1));
    assert_non_null(ts_reply_cache_at(&r, 1));
    for (uint64_t id = 2; id <= 5; id++)
        assert_true(is_kept(&r, id));
    assert_int_equal(r.bytes, TS_REPLY_BYTES_KEPT);
    ts_reply_cache_fini(&r, &accounts);
}

static void answers_of_a_user_are_kept_up_to_their_bytes(void **state)
{
    (void)state;
    enum { CONNECTIONS = TS_REPLY_BYTES_UID / TS_REPLY_BYTES_KEPT + 1 };
    static ts_reply_cache r[CONNECTIONS], other;
    assert_true(ts_reply_cache_init(&other, &accounts, 1001));
    answer(&other, 1, 8);
    for (uint32_t i = 0; i < CONNECTIONS; i++) {
        assert_true(ts_reply_cache_init(&r[i], &accounts, 1000));
        answer(&r[i], 1, TS_REPLY_BYTES_KEPT);
    }
    assert_false(is_kept(&r[0], 1)); /* the oldest of them */
    for (uint32_t i = 1; i < CONNECTIONS; i++)
        assert_true(is_kept(&r[i], 1));
    assert_true(is_kept(&other, 1));
    for (uint32_t i = 0; i < CONNECTIONS; i++)
        ts_reply_cache_fini(&r[i], &accounts);
    ts_reply_cache_fini(&other, &accounts);
    assert_null(accounts);
}

/* A request in progress keeps its place; answers make room for others. */
static void requests_in_progress_are_not_forgotten(void **state)
{
    (void)state;
    static ts_reply_cache r;
    assert_true(ts_reply_cache_init(&r, &accounts, 1000));
    ts_reply_cache_start(&r, 1)->pending = true;
    for (uint64_t id = 2; id <= 200; id++)
        answer(&r, id, 8);
    assert_non_null(ts_reply_cache_at(&r, 1));
    assert_true(ts_reply_cache_at(&r, 1)->pending);
    assert_false(is_kept(&r, 2));
    assert_true(is_kept(&r, 200));
    ts_reply_cache_fini(&r, &accounts);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_last_64_answers_are_kept),
        cmocka_unit_test(answers_of_a_connection_are_kept_up_to_their_bytes),
        cmocka_unit_test(answers_of_a_user_are_kept_up_to_their_bytes),
        cmocka_unit_test(requests_in_progress_are_not_forgotten),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
