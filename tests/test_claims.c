/* Who waits for what others compute, and when each goes on: as the engine decides it. */
#include "waiting_worker.h"

static void one_prompt_of_many_workers_is_computed_once(void **state)
{
    (void)state;
    enum { WORKERS = 64 };
    uint32_t ids[PROMPT];
    worker w[WORKERS];
    fill_ids(ids, PROMPT, 100);
    for (int chunked = 0; chunked < 2; chunked++) {
        ts_engine *e = engine_new(4096, 64, BLOCK, TS_CLIENT_WRITE_ALL);
        for (int i = 0; i < WORKERS; i++)
            w[i] = worker_new(e, 1, ids, PROMPT);
        /* All ask before anybody has begun. */
        assert_int_equal(ask(&w[0], true, false), TS_OK);
        assert_int_equal(w[0].has, 0);
        for (int i = 1; i < WORKERS; i++)
            assert_int_equal(ask(&w[i], true, false), TS_WAITS);
        while (w[0].has < PROMPT)
            compute(&w[0], chunked ? 24 < PROMPT - w[0].has ? 24 : PROMPT - w[0].has : PROMPT);
        assert_int_equal(go_on(e, w, WORKERS), WORKERS - 1);
        for (int i = 1; i < WORKERS; i++) {
            assert_int_equal(w[i].has, PROMPT - 1);
            assert_int_equal(w[i].computed, 0);
        }
        assert_int_equal(w[0].computed, PROMPT);
        assert_int_equal(e->claims.live, 0);
        ts_engine_free(e);
    }
}

static void the_first_that_waits_goes_on_where_one_that_ends_left_off(void **state)
{
    (void)state;
    enum { WORKERS = 8 };
    uint32_t ids[PROMPT];
    worker w[WORKERS];
    fill_ids(ids, PROMPT, 7);
    for (int how = 0; how < 4; how++) {
        ts_engine *e = engine_new(4096, 64, BLOCK, TS_CLIENT_WRITE_ALL);
        for (int i = 0; i < WORKERS; i++) {
            w[i] = worker_new(e, 1, ids, PROMPT);
            assert_int_equal(ask(&w[i], true, false), i == 0 ? TS_OK : TS_WAITS);
        }
        compute(&w[0], 30);
        assert_true(ts_engine_woken(e) == 0);
        ts_answer answer;
        if (how == 0) { /* it dies in the middle of a step, */
            open_step(&w[0], 20);
            die(&w[0]);
        } else if (how == 1) { /* ... frees its sequence, */
            assert_int_equal(free_seq(e, w[0].session, w[0].seq), TS_OK);
        } else if (how == 2) { /* ... gets other tokens than it said, */
            static const uint32_t other[PROMPT];
            w[0].ids = other;
            compute(&w[0], 4);
        } else { /* ... or does nothing for a while */
            for (uint64_t now = 1000; now <= 1000 + TS_CLAIM_IDLE_MS; now += TS_CLAIM_IDLE_MS / 2) {
                assert_true(ts_engine_woken(e) == 0);
                apply(e, (ts_command){.op = TS_OP_SWEEP, .now_ms = now}, &answer);
            }
        }
        assert_true(ts_engine_woken(e) == w[1].session);
        assert_int_equal(go_on(e, w, WORKERS), 1);
        /* A part of a block is found when the block is whole. */
        assert_int_equal(w[1].has, how == 2 ? 30 : 30 / BLOCK * BLOCK);
        for (int i = 2; i < WORKERS; i++)
            assert_int_equal(e->sessions[(uint32_t)w[i].session].wait.kind, TS_WAIT_CLAIM);
        compute(&w[1], PROMPT - w[1].has);
        assert_int_equal(go_on(e, w, WORKERS), WORKERS - 2);
        for (int i = 2; i < WORKERS; i++)
            assert_int_equal(w[i].has, PROMPT - 1);
        ts_engine_free(e);
    }
}

static void a_step_that_only_pauses_keeps_its_claim(void **state)
{
    (void)state;
    uint32_t ids[PROMPT];
    ts_answer answer;
    ts_engine *e = engine_new(256, 64, BLOCK, TS_CLIENT_WRITE_ALL);
    fill_ids(ids, PROMPT, 0);
    worker w[2] = {worker_new(e, 1, ids, PROMPT), worker_new(e, 1, ids, PROMPT)};
    assert_int_equal(ask(&w[0], true, false), TS_OK);
    assert_int_equal(ask(&w[1], true, false), TS_WAITS);
    apply(e, (ts_command){.op = TS_OP_SWEEP, .now_ms = 1}, &answer);
    open_step(&w[0], 8); /* an open step may take as long as it takes */
    for (uint64_t now = 600; now < 10000; now += 600)
        apply(e, (ts_command){.op = TS_OP_SWEEP, .now_ms = now}, &answer);
    commit(&w[0], 8);
    apply(e, (ts_command){.op = TS_OP_SWEEP, .now_ms = 10001}, &answer);
    assert_true(ts_engine_woken(e) == 0);
    apply(e, (ts_command){.op = TS_OP_SWEEP, .now_ms = 11001}, &answer);
    assert_int_equal(go_on(e, w, 2), 1);
    assert_int_equal(w[1].has, 8);
    ts_engine_free(e);
}

static void a_match_waits_for_the_open_step_of_one_that_did_not_ask(void **state)
{
    (void)state;
    uint32_t ids[PROMPT];
    ts_engine *e = engine_new(256, 64, BLOCK, TS_CLIENT_WRITE_ALL);
    fill_ids(ids, PROMPT, 0);
    worker w[3] = {worker_new(e, 1, ids, PROMPT), worker_new(e, 1, ids, 40),
                   worker_new(e, 2, ids, PROMPT)};
    assert_int_equal(ask(&w[0], false, false), TS_OK);
    open_step(&w[0], PROMPT);
    assert_int_equal(ask(&w[2], true, false), TS_OK); /* another user's work is nobody else's */
    assert_int_equal(w[2].has, 0);
    assert_int_equal(ask(&w[1], true, false), TS_WAITS);
    for (int end = 0; end < 2; end++) {
        if (end == 0) /* without the step's tokens it is the one to compute them */
            assert_int_equal(step_end(e, w[0].session, TS_OP_STEP_ABORT, w[0].step, NULL, 0),
                             TS_OK);
        else
            commit(&w[0], PROMPT);
        assert_int_equal(go_on(e, w, 3), 1);
        assert_int_equal(w[1].has, end == 0 ? 0 : 39);
        if (end == 0) {
            assert_int_equal(free_seq(e, w[1].session, w[1].seq), TS_OK);
            open_step(&w[0], PROMPT);
            assert_int_equal(ask(&w[1], true, false), TS_WAITS);
        }
    }
    ts_engine_free(e);
}

static void a_prompt_waits_for_what_it_shares_and_not_for_the_rest(void **state)
{
    (void)state;
    uint32_t ids[PROMPT], other[PROMPT];
    ts_engine *e = engine_new(256, 64, BLOCK, TS_CLIENT_WRITE_ALL);
    fill_ids(ids, PROMPT, 0);
    fill_ids(other, PROMPT, 0);
    other[21] = 999; /* in the sixth block */
    worker w[2] = {worker_new(e, 1, ids, PROMPT), worker_new(e, 1, other, PROMPT)};
    assert_int_equal(ask(&w[0], true, false), TS_OK);
    assert_int_equal(ask(&w[1], true, false), TS_WAITS);
    compute(&w[0], 20);
    assert_true(ts_engine_woken(e) == 0); /* one token more is shared: its block's first */
    compute(&w[0], 4);
    assert_int_equal(go_on(e, w, 2), 1);
    assert_int_equal(w[1].has, 21);
    assert_int_equal(e->claims.live, 2); /* each of its own rest */
    ts_engine_free(e);
}

/* A prompt that ends with a block: that is found, but for its last token, however many others
 * follow the same beginning; and it is waited for. */
static void the_last_block_of_a_prompt_is_found_and_waited_for(void **state)
{
    (void)state;
    enum { LONG = 3 * BLOCK, OTHERS = 20 };
    uint32_t ids[LONG], other[LONG];
    ts_engine *e = engine_new(256, 64, BLOCK, TS_CLIENT_WRITE_ALL);
    fill_ids(ids, LONG, 0);
    worker w[2] = {worker_new(e, 1, ids, LONG), worker_new(e, 1, ids, LONG)};
    assert_int_equal(ask(&w[0], true, false), TS_OK);
    compute(&w[0], LONG - BLOCK);
    open_step(&w[0], BLOCK);
    assert_int_equal(ask(&w[1], true, false), TS_WAITS);
    commit(&w[0], BLOCK);
    assert_int_equal(go_on(e, w, 2), 1);
    assert_int_equal(w[1].has, LONG - 1);
    fill_ids(other, LONG, 0);
    for (uint32_t i = 0; i < OTHERS; i++) {
        other[LONG - BLOCK] = 1000 + i;
        worker o = worker_new(e, 1, other, LONG);
        assert_int_equal(ask(&o, false, false), TS_OK);
        assert_int_equal(o.has, LONG - BLOCK);
        compute(&o, BLOCK);
    }
    worker again = worker_new(e, 1, ids, LONG);
    assert_int_equal(ask(&again, true, false), TS_OK);
    assert_int_equal(again.has, LONG - 1);
    ts_engine_free(e);
}

static void equal_prompts_of_one_match_are_told_of_each_other(void **state)
{
    (void)state;
    enum { LONG = 16, COUNT = 4 };
    uint32_t ids[COUNT * LONG];
    const uint32_t counts[COUNT] = {LONG, LONG, LONG, LONG};
    for (uint32_t i = 0; i < COUNT; i++)
        fill_ids(ids + i * LONG, LONG, i == 1 ? 500 : 0);
    ids[3 * LONG + 14] = 77; /* in its last block alone */
    ts_answer answer;
    ts_engine *e = engine_new(256, 64, BLOCK, TS_CLIENT_WRITE_ALL);
    uint64_t s = session_new(e, 1);
    ts_command c = {.op = TS_OP_SEQ_MATCH,
                    .session = s,
                    .seq_match = {.tokens = ids, .counts = counts, .count = COUNT, .space = model}};
    assert_int_equal(apply(e, c, &answer), TS_OK);
    static const uint32_t own[] = {0, 1, 2, 3, 4, 5, 6, 7};
    assert_memory_equal(answer.matched.twins, own, answer.matched.count * sizeof *own);
    c.seq_match.wait = true;
    assert_int_equal(apply(e, c, &answer), TS_OK);
    static const uint32_t expected[COUNT] = {0, 1, 0, 0};
    assert_memory_equal(answer.matched.twins, expected, sizeof expected);
    check_engine(e);
    ts_engine_free(e);
}

static void a_session_that_waits_loses_what_it_only_said_it_would_compute(void **state)
{
    (void)state;
    uint32_t ids[2][PROMPT];
    ts_engine *e = engine_new(256, 64, BLOCK, TS_CLIENT_WRITE_ALL);
    fill_ids(ids[0], PROMPT, 0);
    fill_ids(ids[1], PROMPT, 1000);
    worker w[2] = {worker_new(e, 1, ids[0], PROMPT), worker_new(e, 1, ids[1], PROMPT)};
    assert_int_equal(ask(&w[0], true, false), TS_OK);
    assert_int_equal(ask(&w[1], true, false), TS_OK);
    w[0].ids = ids[1];
    assert_int_equal(ask(&w[0], true, false), TS_WAITS); /* each for the other would be for ever */
    w[1].ids = ids[0];
    assert_int_equal(ask(&w[1], true, false), TS_OK);
    assert_int_equal(ask(&w[0], true, false), TS_EBUSY); /* one thing at a time */
    assert_int_equal(ask(&w[0], false, true), TS_OK);    /* its time is over */
    assert_int_equal(w[0].has, 0);
    ts_engine_free(e);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(one_prompt_of_many_workers_is_computed_once),
        cmocka_unit_test(the_first_that_waits_goes_on_where_one_that_ends_left_off),
        cmocka_unit_test(a_step_that_only_pauses_keeps_its_claim),
        cmocka_unit_test(a_match_waits_for_the_open_step_of_one_that_did_not_ask),
        cmocka_unit_test(a_prompt_waits_for_what_it_shares_and_not_for_the_rest),
        cmocka_unit_test(the_last_block_of_a_prompt_is_found_and_waited_for),
        cmocka_unit_test(equal_prompts_of_one_match_are_told_of_each_other),
        cmocka_unit_test(a_session_that_waits_loses_what_it_only_said_it_would_compute),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
