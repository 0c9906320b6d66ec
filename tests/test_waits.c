/* Who waits for room, and when each gets it: as the engine decides it. */
#include "waiting_worker.h"

/* A begin of n tokens for the worker's sequence. */
static ts_status take(worker *w, uint32_t n, bool wait, bool again, uint64_t now_ms)
{
    ts_answer answer;
    ts_command c = {
        .op = TS_OP_STEP_BEGIN,
        .session = w->session,
        .now_ms = now_ms,
        .again = again,
        .step_begin = {.seqs = &w->seq, .new_tokens = &n, .count = 1, .heads = 1, .wait = wait}};
    if (apply(w->e, c, &answer) == TS_OK) {
        assert_int_equal(
            step_end(w->e, w->session, TS_OP_STEP_COMMIT, answer.begun.step->id, NULL, 0), TS_OK);
        w->has += n;
    }
    check_engine(w->e);
    return answer.status;
}

static worker holder_new(ts_engine *e, uint32_t uid, uint32_t blocks)
{
    worker w = worker_new(e, uid, NULL, 0);
    w.seq = seq_new(e, w.session);
    if (blocks > 0)
        assert_int_equal(take(&w, blocks * BLOCK, false, false, 0), TS_OK);
    return w;
}

static void give(worker *w, uint32_t blocks)
{
    ts_answer answer;
    w->has -= blocks * BLOCK;
    apply(w->e,
          (ts_command){.op = TS_OP_SEQ_TRUNCATE,
                       .session = w->session,
                       .seq_batch = {.seqs = &w->seq, .lengths = &w->has, .count = 1}},
          &answer);
    assert_int_equal(answer.status, TS_OK);
    check_engine(w->e);
}

static void room_is_given_in_order_and_the_large_are_not_overtaken(void **state)
{
    (void)state;
    ts_engine *e = engine_new(32, 8, BLOCK, TS_CLIENT_WRITE_ALL);
    worker all = holder_new(e, 1, 30), large = holder_new(e, 1, 0), small = holder_new(e, 1, 0),
           one = holder_new(e, 1, 0);
    assert_int_equal(take(&large, 16 * BLOCK, true, false, 1000), TS_WAITS);
    assert_int_equal(take(&small, 2 * BLOCK, true, false, 1000),
                     TS_WAITS); /* there would be room */
    assert_int_equal(take(&one, 2 * BLOCK, false, false, 1000), TS_ENOSPC);
    assert_int_equal(take(&one, BLOCK, false, false, 1100), TS_OK); /* small, and soon */
    give(&one, 1);
    assert_int_equal(take(&one, BLOCK, false, false, 1101), TS_ENOSPC);
    give(&all, 13);
    assert_true(ts_engine_woken(e) == 0);
    give(&all, 1);
    assert_true(ts_engine_woken(e) == large.session);
    assert_int_equal(take(&one, BLOCK, false, false, 1200), TS_ENOSPC); /* it is spoken for */
    assert_int_equal(take(&large, 16 * BLOCK, true, true, 1200), TS_OK);
    assert_true(ts_engine_woken(e) == 0); /* nothing is left for the next */
    give(&all, 2);
    assert_true(ts_engine_woken(e) == small.session);
    assert_int_equal(take(&small, 2 * BLOCK, true, true, 1200), TS_OK);
    assert_int_equal(e->waiting_for_room, 0);
    ts_engine_free(e);
}

static void who_goes_or_gives_up_leaves_its_place(void **state)
{
    (void)state;
    for (int how = 0; how < 3; how++) {
        ts_engine *e = engine_new(32, 8, BLOCK, TS_CLIENT_WRITE_ALL);
        ts_answer answer;
        worker all = holder_new(e, 1, 30), large = holder_new(e, 1, 0), small = holder_new(e, 1, 0);
        assert_int_equal(take(&large, 16 * BLOCK, true, false, 0), TS_WAITS);
        assert_int_equal(take(&small, 2 * BLOCK, true, false, 0), TS_WAITS);
        if (how == 0)
            die(&large);
        else if (how == 1)
            apply(e, (ts_command){.op = TS_OP_WAIT_END, .session = large.session}, &answer);
        else
            assert_int_equal(take(&large, 16 * BLOCK, false, true, 0), TS_ENOSPC);
        assert_true(ts_engine_woken(e) == small.session);
        assert_int_equal(take(&small, 2 * BLOCK, true, true, 0), TS_OK);
        (void)all;
        ts_engine_free(e);
    }
}

static void what_can_never_be_had_is_not_waited_for(void **state)
{
    (void)state;
    ts_engine *e = engine_new(32, 8, BLOCK, TS_CLIENT_WRITE_ALL);
    worker w = holder_new(e, 1, 0);
    assert_int_equal(take(&w, 33 * BLOCK, true, false, 0), TS_ENOSPC);
    e->pools[0].config.tenant_blocks_max = 8;
    assert_int_equal(take(&w, 9 * BLOCK, true, false, 0), TS_EQUOTA);
    ts_engine_free(e);
}

static void who_waits_for_its_own_limit_is_in_nobodys_way(void **state)
{
    (void)state;
    ts_engine *e = engine_new(32, 4, BLOCK, TS_CLIENT_WRITE_ALL);
    worker a = holder_new(e, 1, 10), b = holder_new(e, 1, 0), other = holder_new(e, 2, 0);
    e->pools[0].config.tenant_blocks_max = 12;
    assert_int_equal(take(&b, 3 * BLOCK, true, false, 0), TS_WAITS);
    assert_int_equal(take(&other, 12 * BLOCK, false, false, 1000), TS_OK);
    assert_true(ts_engine_woken(e) == 0);
    give(&a, 1);
    assert_true(ts_engine_woken(e) == b.session);
    assert_int_equal(take(&b, 3 * BLOCK, true, true, 1000), TS_OK);
    ts_engine_free(e);
}

static void tenants_wait_in_turn(void **state)
{
    (void)state;
    ts_engine *e = engine_new(16, 4, BLOCK, TS_CLIENT_WRITE_ALL);
    worker all = holder_new(e, 1, 16),
           w[3] = {holder_new(e, 2, 0), holder_new(e, 2, 0), holder_new(e, 3, 0)};
    for (int i = 0; i < 3; i++)
        assert_int_equal(take(&w[i], 4 * BLOCK, true, false, 0), TS_WAITS);
    static const int order[] = {0, 2, 1};
    for (int i = 0; i < 3; i++) {
        give(&all, 4);
        assert_true(ts_engine_woken(e) == w[order[i]].session);
        assert_int_equal(take(&w[order[i]], 4 * BLOCK, true, true, 0), TS_OK);
    }
    ts_engine_free(e);
}

static void who_waits_beyond_its_share_is_in_no_other_tenants_way(void **state)
{
    (void)state;
    ts_engine *e = engine_new(32, 8, BLOCK, TS_CLIENT_WRITE_ALL); /* shares of 8 */
    worker one = holder_new(e, 1, 1), greedy = holder_new(e, 2, 0), fair = holder_new(e, 3, 0),
           own = holder_new(e, 2, 0), last = holder_new(e, 4, 0);
    assert_int_equal(take(&greedy, 32 * BLOCK, true, false, 0), TS_WAITS);
    assert_int_equal(take(&fair, 8 * BLOCK, false, false, 1000), TS_OK);
    assert_int_equal(take(&fair, BLOCK, false, false, 1000), TS_ENOSPC); /* beyond its share, too */
    assert_int_equal(take(&own, BLOCK, false, false, 1000), TS_ENOSPC);
    worker rest = holder_new(e, 1, 0);
    assert_int_equal(take(&rest, 7 * BLOCK, false, false, 1000), TS_OK);
    assert_int_equal(take(&last, 8 * BLOCK, false, false, 1000), TS_OK);
    give(&last, 8);
    give(&fair, 8);
    give(&rest, 7);
    give(&one, 1);
    assert_true(ts_engine_woken(e) == greedy.session);
    assert_int_equal(take(&greedy, 32 * BLOCK, true, true, 1000), TS_OK);
    assert_int_equal(take(&last, 8 * BLOCK, true, false, 1000), TS_WAITS);
    give(&greedy, 8);
    assert_int_equal(take(&last, 8 * BLOCK, true, true, 1000), TS_OK);
    /* Now it would be the turn of the second tenant, but it has more than its share. */
    assert_int_equal(take(&own, 4 * BLOCK, true, false, 1000), TS_WAITS);
    assert_int_equal(take(&fair, 8 * BLOCK, true, false, 1000), TS_WAITS);
    give(&greedy, 8);
    assert_true(ts_engine_woken(e) == fair.session);
    assert_int_equal(take(&fair, 8 * BLOCK, true, true, 1000), TS_OK);
    give(&greedy, 8);
    assert_true(ts_engine_woken(e) == own.session);
    ts_engine_free(e);
}

static worker in_pool(worker w, const char *pool)
{
    ts_answer answer;
    assert_int_equal(
        apply(
            w.e,
            (ts_command){.op = TS_OP_POOL_OPEN, .session = w.session, .pool_open = {.name = pool}},
            &answer),
        TS_OK);
    return w;
}

static void a_pool_that_was_removed_is_in_nobodys_way(void **state)
{
    (void)state;
    uint32_t other;
    ts_answer answer;
    ts_engine *e = engine_new(16, 4, BLOCK, TS_CLIENT_WRITE_ALL);
    ts_pool_config config = e->pools[0].config;
    strcpy(config.name, "other");
    other = pool_add(e, &config);
    assert_int_equal(apply(e, (ts_command){.op = TS_OP_POOL_REMOVE, .pool = other}, &answer),
                     TS_OK);
    worker all = holder_new(e, 1, 16), w = holder_new(e, 1, 0);
    assert_int_equal(take(&w, BLOCK, true, false, 0), TS_WAITS);
    give(&all, 1);
    assert_true(ts_engine_woken(e) == w.session);
    assert_int_equal(take(&w, BLOCK, true, true, 0), TS_OK);
    ts_engine_free(e);
}

static void a_pool_in_which_a_session_waits_stays_open_in_it(void **state)
{
    (void)state;
    uint32_t ids[PROMPT];
    ts_answer answer;
    ts_engine *e = engine_new(64, 8, BLOCK, TS_CLIENT_WRITE_ALL);
    fill_ids(ids, PROMPT, 5);
    worker first = worker_new(e, 1, ids, PROMPT), second = worker_new(e, 1, ids, PROMPT);
    assert_int_equal(ask(&first, true, false), TS_OK);
    assert_int_equal(ask(&second, true, false), TS_WAITS);
    const ts_command close = {.op = TS_OP_POOL_CLOSE, .session = second.session};
    assert_int_equal(apply(e, close, &answer), TS_EBUSY);
    assert_string_equal(answer.message,
                        "the session has a call that waits in pool 'test', which stays "
                        "open in it");
    apply(e, (ts_command){.op = TS_OP_WAIT_END, .session = second.session}, &answer);
    assert_int_equal(apply(e, close, &answer), TS_OK);
    check_engine(e);
    ts_engine_free(e);
}

static void who_waits_and_then_asks_for_something_else_has_left_its_place(void **state)
{
    (void)state;
    uint32_t ids[PROMPT];
    ts_answer answer;
    ts_engine *e = engine_new(32, 8, BLOCK, TS_CLIENT_WRITE_ALL);
    ts_pool_config config = e->pools[0].config;
    strcpy(config.name, "other");
    pool_add(e, &config);
    fill_ids(ids, PROMPT, 5);
    worker first = worker_new(e, 1, ids, PROMPT), all = holder_new(e, 1, 32),
           w = in_pool(holder_new(e, 1, 0), "other");
    assert_int_equal(ask(&first, true, false), TS_OK);
    /* What a ring's client writes over the entry that waits. */
    assert_int_equal(take(&w, 4 * BLOCK, true, false, 0), TS_WAITS);
    w.ids = ids;
    w.count = PROMPT;
    assert_int_equal(ask(&w, true, true), TS_WAITS);
    assert_int_equal(e->waiting_for_room, 0);
    const uint32_t n = 33 * BLOCK;
    uint64_t seqs[2];
    apply(e,
          (ts_command){
              .op = TS_OP_SEQ_CREATE, .session = w.session, .pool = 1, .seq_create = {.count = 2}},
          &answer);
    memcpy(seqs, answer.seqs.seqs, sizeof seqs);
    e->pools[1].config.tenant_blocks_max = 40;
    ts_command begin = {
        .op = TS_OP_STEP_BEGIN,
        .session = w.session,
        .pool = 1,
        .again = true,
        .step_begin = {.seqs = seqs, .new_tokens = &n, .count = 1, .heads = 1, .wait = true}};
    assert_int_equal(apply(e, begin, &answer), TS_ENOSPC);
    check_engine(e);
    assert_int_equal(take(&w, 4 * BLOCK, true, false, 0), TS_WAITS);
    /* The other pool has no room for it either. */
    const uint32_t most = 32 * BLOCK, one = BLOCK;
    begin.again = begin.step_begin.wait = false;
    begin.step_begin.new_tokens = &most;
    assert_int_equal(apply(e, begin, &answer), TS_OK);
    begin.again = begin.step_begin.wait = true;
    begin.step_begin.seqs = seqs + 1;
    begin.step_begin.new_tokens = &one;
    assert_int_equal(apply(e, begin, &answer), TS_WAITS);
    check_engine(e);
    give(&all, 4);
    assert_true(ts_engine_woken(e) == 0); /* it waits for the other pool now */
    ts_engine_free(e);
}

static void who_can_never_have_it_any_more_is_told(void **state)
{
    (void)state;
    ts_answer answer;
    ts_engine *e = engine_new(32, 4, BLOCK, TS_CLIENT_WRITE_ALL);
    worker all = holder_new(e, 1, 6), large = holder_new(e, 1, 0), small = holder_new(e, 1, 0);
    assert_int_equal(take(&large, 28 * BLOCK, true, false, 0), TS_WAITS);
    assert_int_equal(take(&small, 4 * BLOCK, true, false, 0), TS_WAITS);
    assert_int_equal(
        apply(e, (ts_command){.op = TS_OP_POOL_RESIZE, .pool_resize.num_blocks = 16}, &answer),
        TS_OK);
    assert_true(ts_engine_woken(e) == large.session);
    assert_int_equal(take(&large, 28 * BLOCK, true, true, 0), TS_ENOSPC);
    assert_true(ts_engine_woken(e) == small.session);
    assert_int_equal(take(&small, 4 * BLOCK, true, true, 0), TS_OK);
    (void)all;
    ts_engine_free(e);
}

static void a_limit_that_is_lowered_is_told_to_those_that_wait(void **state)
{
    (void)state;
    ts_engine *e = engine_new(32, 4, BLOCK, TS_CLIENT_WRITE_ALL);
    worker all = holder_new(e, 1, 30), large = holder_new(e, 1, 0);
    assert_int_equal(take(&large, 16 * BLOCK, true, false, 0), TS_WAITS);
    e->pools[0].config.tenant_blocks_max = 8;
    ts_waits_look_again(e, 0);
    assert_true(ts_engine_woken(e) == large.session);
    assert_int_equal(take(&large, 16 * BLOCK, true, true, 0), TS_EQUOTA);
    assert_true(ts_engine_woken(e) == 0);
    (void)all;
    ts_engine_free(e);
}

static void who_needs_more_than_one_bit_of_evicting_keeps_its_place(void **state)
{
    (void)state;
    enum { CACHED = TS_SWEEP_ENTRIES + 2048, HELD = 4096, ALL = CACHED + HELD };
    ts_engine *e = engine_new(ALL, 1024, BLOCK, TS_CLIENT_WRITE_ALL);
    e->limits.step_tokens = ALL * BLOCK;
    uint32_t *ids = malloc((size_t)CACHED * BLOCK * sizeof *ids);
    fill_ids(ids, CACHED * BLOCK, 1);
    worker gone = worker_new(e, 1, ids, CACHED * BLOCK);
    assert_int_equal(ask(&gone, false, false), TS_OK);
    compute(&gone, CACHED * BLOCK);
    worker all = holder_new(e, 1, HELD), large = holder_new(e, 1, 0), small = holder_new(e, 1, 0);
    die(&gone);
    sweep_all(e);
    assert_int_equal(e->pools[0].books.cached, CACHED);
    assert_int_equal(take(&large, (CACHED + 1024) * BLOCK, true, false, 0), TS_WAITS);
    give(&all, 1025);
    assert_true(ts_engine_woken(e) == large.session);
    assert_int_equal(take(&large, (CACHED + 1024) * BLOCK, true, true, 0), TS_WAITS);
    assert_true(ts_engine_woken(e) == large.session);
    assert_int_equal(take(&small, 2 * BLOCK, false, false, 0), TS_ENOSPC);
    sweep_all(e);
    assert_int_equal(take(&large, (CACHED + 1024) * BLOCK, true, true, 0), TS_OK);
    assert_true(ts_engine_woken(e) == 0);
    assert_int_equal(take(&small, BLOCK, false, false, 0), TS_OK);
    free(ids);
    ts_engine_free(e);
}

/* Sessions that come back to a restarted daemon have the places that they had, whoever of them
 * comes first, and until then are in nobody's way. */
static void a_restart_keeps_the_order(void **state)
{
    (void)state;
    ts_engine *e = engine_new(32, 8, BLOCK, TS_CLIENT_WRITE_ALL);
    ts_answer answer;
    worker all = holder_new(e, 1, 30), first = holder_new(e, 1, 0), second = holder_new(e, 1, 0),
           third = holder_new(e, 1, 0);
    assert_int_equal(take(&first, 16 * BLOCK, true, false, 0), TS_WAITS);
    assert_int_equal(take(&second, 8 * BLOCK, true, false, 0), TS_WAITS);
    apply(e, (ts_command){.op = TS_OP_RESTARTED}, &answer);
    check_engine(e);
    assert_int_equal(e->waiting_for_room, 2);
    apply(e, (ts_command){.op = TS_OP_SESSION_BACK, .session = third.session}, &answer);
    assert_int_equal(take(&third, 2 * BLOCK, false, false, 0), TS_OK);
    apply(e, (ts_command){.op = TS_OP_SESSION_BACK, .session = second.session}, &answer);
    assert_int_equal(take(&second, 8 * BLOCK, true, true, 0), TS_WAITS);
    apply(e, (ts_command){.op = TS_OP_SESSION_BACK, .session = first.session}, &answer);
    assert_int_equal(take(&first, 16 * BLOCK, true, true, 0), TS_WAITS);
    give(&all, 8); /* enough for the second */
    assert_true(ts_engine_woken(e) == 0);
    give(&all, 8);
    assert_true(ts_engine_woken(e) == first.session);
    assert_int_equal(take(&first, 16 * BLOCK, true, true, 0), TS_OK);
    give(&all, 8);
    assert_true(ts_engine_woken(e) == second.session);
    assert_int_equal(take(&second, 8 * BLOCK, true, true, 0), TS_OK);
    ts_engine_free(e);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(room_is_given_in_order_and_the_large_are_not_overtaken),
        cmocka_unit_test(who_goes_or_gives_up_leaves_its_place),
        cmocka_unit_test(what_can_never_be_had_is_not_waited_for),
        cmocka_unit_test(who_waits_for_its_own_limit_is_in_nobodys_way),
        cmocka_unit_test(tenants_wait_in_turn),
        cmocka_unit_test(who_waits_beyond_its_share_is_in_no_other_tenants_way),
        cmocka_unit_test(a_pool_that_was_removed_is_in_nobodys_way),
        cmocka_unit_test(a_pool_in_which_a_session_waits_stays_open_in_it),
        cmocka_unit_test(who_waits_and_then_asks_for_something_else_has_left_its_place),
        cmocka_unit_test(who_can_never_have_it_any_more_is_told),
        cmocka_unit_test(a_limit_that_is_lowered_is_told_to_those_that_wait),
        cmocka_unit_test(who_needs_more_than_one_bit_of_evicting_keeps_its_place),
        cmocka_unit_test(a_restart_keeps_the_order),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
