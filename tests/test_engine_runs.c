/* The engine's runs: what is refused of them, and the order of those on a stream. */
#include "engine_util.h"

#include <math.h>

static void a_run_outside_the_exchange_is_refused(void **state)
{
    (void)state;
    ts_engine *e = engine_new(16, 16, 4, TS_CLIENT_WRITE_NONE);
    uint64_t s = session_new(e, 1000), seq = seq_new(e, s);
    ts_answer answer;
    uint32_t n = 2;
    assert_int_equal(begin(e, s, &seq, &n, 1, false, &answer), TS_OK);
    uint64_t step = answer.begun.step->id;
    ts_command run = {.op = TS_OP_STEP_RUN, .session = s, .step_run = {.step = step}};
    assert_int_equal(apply(e, run, &answer), TS_EINVAL); /* no exchange yet */
    ts_command open = {.op = TS_OP_EXCHANGE_OPEN, .session = s};
    static const uint64_t bad[] = {0, 100, UINT64_MAX, ((uint64_t)1 << 30) + 4096};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        open.exchange_open.bytes = bad[i];
        assert_int_equal(apply(e, open, &answer), TS_EINVAL);
    }
    open.exchange_open.bytes = 4096;
    assert_int_equal(apply(e, open, &answer), TS_OK);
    const uint64_t bytes = 2 * 32 * 4; /* tokens * head_dim * fp32, of each of q, k, v and out */
    const uint64_t offsets[] = {4096 - bytes + 64, 4096, UINT64_MAX, UINT64_MAX - 63, 8, 1};
    for (size_t i = 0; i < sizeof offsets / sizeof *offsets; i++)
        for (int which = 0; which < 4; which++) {
            run.step_run.run.q = which == 0 ? offsets[i] : 0;
            run.step_run.run.k = which == 1 ? offsets[i] : 0;
            run.step_run.run.v = which == 2 ? offsets[i] : 0;
            run.step_run.run.out = which == 3 ? offsets[i] : 0;
            assert_int_equal(apply(e, run, &answer), TS_EINVAL);
        }
    run.step_run.run.q = run.step_run.run.k = run.step_run.run.v = run.step_run.run.out = 0;
    static const float bad_floats[] = {-1.0f, NAN, INFINITY};
    for (size_t i = 0; i < 3; i++) {
#define NUMBER(type, name, place, most, what)                                                      \
    if (_Generic((type)0, float : true, default : false)) {                                        \
        run.step_run.run = (ts_layer_run){0};                                                      \
        memcpy(&run.step_run.run.name, &bad_floats[i], sizeof *bad_floats);                        \
        assert_int_equal(apply(e, run, &answer), TS_EINVAL);                                       \
        assert_non_null(strstr(answer.message, "a " what " of "));                                 \
        assert_non_null(strstr(answer.message, "; it must be finite and not negative"));           \
    }
        TS_RUN_NUMBERS(NUMBER)
#undef NUMBER
    }
    const uint32_t head_dim = e->pools[0].config.geometry.head_dim;
    for (uint32_t i = 0; i < 2; i++) {
        run.step_run.run =
            (ts_layer_run){.rope_theta = 10000, .rope_dims = i == 0 ? 3 : head_dim + 2};
        assert_int_equal(apply(e, run, &answer), TS_EINVAL);
        assert_non_null(strstr(answer.message, "it must be even and at most head_dim"));
    }
    /* [2 tokens][1 head] of fp32 */
    run.step_run.run = (ts_layer_run){.flags = TS_RUN_LSE, .lse = 4096};
    assert_int_equal(apply(e, run, &answer), TS_EINVAL);
    assert_string_equal(answer.message,
                        "lse takes 8 bytes at offset 4096; the exchange has 4096, and "
                        "offsets must be multiples of 64");
    run.step_run.run = (ts_layer_run){.flags = TS_RUN_SINKS, .sinks = 4094};
    assert_int_equal(apply(e, run, &answer), TS_EINVAL);
    run.step_run.run = (ts_layer_run){.flags = TS_RUN_ALIBI, .alibi = UINT64_MAX - 63};
    assert_int_equal(apply(e, run, &answer), TS_EINVAL);
    run.step_run.run = (ts_layer_run){.q = 4096 - bytes, .out = bytes};
    assert_int_equal(apply(e, run, &answer), TS_OK);
    for (int i = 1; i < 4; i++)
        assert_int_equal(apply(e, run, &answer), TS_OK);
    assert_int_equal(apply(e, run, &answer), TS_EBUSY); /* four are in flight */
    ts_engine_free(e);
}

/* Else it couldn't be done again after the daemon's death. */
static void a_run_that_writes_where_it_reads_is_refused(void **state)
{
    (void)state;
    ts_engine *e = engine_new(16, 16, 4, TS_CLIENT_WRITE_NONE);
    uint64_t s = session_new(e, 1000), seq = seq_new(e, s);
    ts_answer answer;
    uint32_t n = 2;
    assert_int_equal(begin(e, s, &seq, &n, 1, false, &answer), TS_OK);
    ts_command run = {
        .op = TS_OP_STEP_RUN, .session = s, .step_run = {.step = answer.begun.step->id}};
    apply(e,
          (ts_command){.op = TS_OP_EXCHANGE_OPEN, .session = s, .exchange_open = {.bytes = 4096}},
          &answer);
    const uint64_t bytes = 2 * 32 * 4; /* tokens * head_dim * fp32, of each of q, k, v and out */
    ts_layer_run *at = &run.step_run.run;
    const ts_layer_run apart = {.k = bytes, .v = 2 * bytes, .out = 3 * bytes, .lse = 4 * bytes};
    const uint64_t by[] = {0, bytes - 64, 2 * bytes - 64, 3 * bytes - 64};
    static const char *const what[] = {"q", "q", "k", "v"};
    char overlaps[32];
    for (int i = 0; i < 4; i++) {
        *at = apart;
        at->out = by[i];
        assert_int_equal(apply(e, run, &answer), TS_EINVAL);
        snprintf(overlaps, sizeof overlaps, "overlaps %s,", what[i]);
        assert_non_null(strstr(answer.message, overlaps));
        at->out = 1024;
        at->flags = TS_RUN_LSE;
        at->lse = by[i];
        assert_int_equal(apply(e, run, &answer), TS_EINVAL);
        assert_non_null(strstr(answer.message, overlaps));
    }
    *at = apart;
    at->flags = TS_RUN_LSE;
    at->lse = at->out + bytes - 64;
    assert_int_equal(apply(e, run, &answer), TS_EINVAL);
    assert_string_equal(answer.message,
                        "out takes 256 bytes at offset 768 and overlaps lse, 8 bytes at "
                        "960: what a run writes must lie apart");
    at->flags = TS_RUN_SINKS | TS_RUN_ALIBI;
    at->sinks = 3 * bytes;
    at->alibi = 1024;
    assert_int_equal(apply(e, run, &answer), TS_EINVAL);
    assert_non_null(strstr(answer.message, "overlaps sinks,"));
    at->alibi = 3 * bytes;
    at->sinks = 1024;
    assert_int_equal(apply(e, run, &answer), TS_EINVAL);
    assert_non_null(strstr(answer.message, "overlaps alibi,"));
    *at = apart; /* what is read may be one and the same */
    at->q = at->k = at->v = 0;
    assert_int_equal(apply(e, run, &answer), TS_OK);
    ts_engine_free(e);
}

/* Number 0: on no stream. */
static ts_status run_on_stream(ts_engine *e, uint64_t s, uint64_t step, uint32_t number,
                               uint64_t call)
{
    ts_answer answer;
    return apply(e,
                 (ts_command){.op = TS_OP_STEP_RUN,
                              .session = s,
                              .call = call,
                              .step_run = {.step = step,
                                           .run = {.k = 4096,
                                                   .v = 8192,
                                                   .out = 12288,
                                                   .flags = number > 0 ? TS_RUN_ON_STREAM : 0,
                                                   .number = number}}},
                 &answer);
}

static void stream_run_done(ts_engine *e, uint64_t step, uint32_t number, bool undone)
{
    ts_answer answer;
    assert_int_equal(
        apply(
            e,
            (ts_command){
                .op = TS_OP_STEP_DONE,
                .step_done = {.step = step, .on_stream = true, .undone = undone, .number = number}},
            &answer),
        TS_OK);
}

static void runs_on_a_stream_are_numbered_and_outlive_the_daemon(void **state)
{
    (void)state;
    ts_engine *e = engine_new(16, 16, 4, TS_CLIENT_WRITE_ALL);
    const uint64_t s = session_new(e, 1000), seq = seq_new(e, s);
    ts_answer answer;
    uint32_t n = 3;
    assert_int_equal(begin(e, s, &seq, &n, 1, false, &answer), TS_OK);
    const uint64_t step = answer.begun.step->id;
    const ts_step *is = answer.begun.step;
    ts_command open = {
        .op = TS_OP_EXCHANGE_OPEN, .session = s, .exchange_open = {.bytes = 1 << 16}};
    assert_int_equal(apply(e, open, &answer), TS_OK);
    assert_int_equal(run_on_stream(e, s, step, 2, 1), TS_EINVAL); /* it isn't the next */
    for (uint32_t number = 1; number <= 4; number++)
        assert_int_equal(run_on_stream(e, s, step, number, number), TS_OK);
    check_engine(e);
    const ts_command last = {.op = TS_OP_STEP_RUN,
                             .session = s,
                             .call = 4,
                             .step_run.run = {.flags = TS_RUN_ON_STREAM, .number = 4}};
    ts_command other = last;
    assert_true(ts_engine_run_is_known(e, &last));
    other.call = 5; /* the same number, by another call */
    assert_false(ts_engine_run_is_known(e, &other));
    other = last;
    other.step_run.run.number = 3;
    assert_false(ts_engine_run_is_known(e, &other));
    stream_run_done(e, step, 1, false);
    stream_run_done(e, step, 4, true); /* no kernel got it */
    assert_int_equal(is->in_flight, 2);
    assert_int_equal(is->num_stream_runs, 2);
    assert_int_equal(is->stream_runs[0].number, 2);
    assert_int_equal(is->stream_runs[1].number, 3);
    apply(e, (ts_command){.op = TS_OP_RESTARTED}, &answer);
    assert_int_equal(is->in_flight, 2); /* the next daemon does them again */
    assert_false(is->stream_runs[0].flags & TS_RUN_REPLACED);
    assert_int_equal(apply(e, open, &answer), TS_OK); /* but not on another exchange */
    assert_true(is->stream_runs[0].flags & is->stream_runs[1].flags & TS_RUN_REPLACED);
    check_engine(e);
    assert_int_equal(run_on_stream(e, s, step, 4, 6), TS_OK);
    close_session(e, s);
    apply(e, (ts_command){.op = TS_OP_RESTARTED}, &answer); /* of those nobody waits for any */
    assert_int_equal(e->live_sessions, 0);
    check_engine(e);
    ts_engine_free(e);
}

static ts_status refuse_posted(ts_engine *e, uint64_t session, uint64_t step, uint32_t layer,
                               uint32_t number)
{
    ts_answer answer;
    return apply(e,
                 (ts_command){.op = TS_OP_STEP_DONE,
                              .session = session,
                              .step_done = {.step = step,
                                            .layer = layer,
                                            .status = TS_EINVAL,
                                            .on_stream = true,
                                            .number = number,
                                            .refused = true}},
                 &answer);
}

/* ... and fails the step of its session, if that has it. */
static void a_posted_run_that_is_refused_keeps_its_number(void **state)
{
    (void)state;
    ts_engine *e = engine_new(16, 16, 4, TS_CLIENT_WRITE_ALL);
    const uint64_t s = session_new(e, 1000), other = session_new(e, 1000), seq = seq_new(e, s);
    ts_answer answer;
    assert_int_equal(apply(e,
                           (ts_command){.op = TS_OP_EXCHANGE_OPEN,
                                        .session = s,
                                        .exchange_open = {.bytes = 1 << 16}},
                           &answer),
                     TS_OK);
    const uint64_t step = step_of_ids(e, s, seq, NULL, 3);
    const ts_step *is = ts_engine_find_step(e, step);
    assert_int_equal(run_on_stream(e, s, step, 1, 1), TS_OK);
    assert_int_equal(refuse_posted(e, s, step, 0, 3), TS_ENOENT); /* it isn't the next */
    assert_int_equal(refuse_posted(e, s + 7, step, 0, 1), TS_ENOENT);
    assert_int_equal(refuse_posted(e, other, step, 0, 1), TS_OK); /* but of another's step */
    assert_int_equal(refuse_posted(e, s, step + 7, 0, 2), TS_OK); /* of none */
    assert_int_equal(is->failed, TS_OK);
    assert_int_equal(refuse_posted(e, s, step, UINT32_MAX, 3), TS_OK);
    assert_int_equal(is->failed, TS_EINVAL);
    assert_int_equal(is->in_flight, 1);
    check_engine(e);
    ts_command again = {
        .op = TS_OP_STEP_RUN,
        .session = s,
        .call = 9,
        .step_run.run = {.flags = TS_RUN_ON_STREAM | TS_RUN_POSTED, .number = 3},
    };
    assert_true(ts_engine_run_is_known(e, &again)); /* whichever call was the last */
    again.step_run.run.number = 4;
    assert_false(ts_engine_run_is_known(e, &again));
    assert_int_equal(run_on_stream(e, s, step, 4, 4), TS_OK);
    stream_run_done(e, step, 1, false);
    stream_run_done(e, step, 4, false);
    assert_int_equal(step_end(e, s, TS_OP_STEP_COMMIT, step, NULL, 0), TS_EINVAL);
    assert_int_equal(step_end(e, s, TS_OP_STEP_ABORT, step, NULL, 0), TS_OK);

    const uint64_t next = step_of_ids(e, s, seq, NULL, 3);
    is = ts_engine_find_step(e, next);
    assert_int_equal(run_on_stream(e, s, next, 5, 5), TS_OK);
    assert_int_equal(refuse_posted(e, s, next, 0, 6), TS_OK); /* of the same layer */
    stream_run_done(e, next, 5, false);
    assert_int_equal(is->failed, TS_EINVAL); /* which the run before doesn't mend */
    assert_int_equal(run_on_stream(e, s, next, 7, 7), TS_OK);
    assert_int_equal(refuse_posted(e, s, next, 0, 8), TS_OK);
    stream_run_done(e, next, 7, false);
    assert_int_equal(is->failed, TS_EINVAL);
    assert_int_equal(run_on_stream(e, s, next, 9, 9), TS_OK);
    stream_run_done(e, next, 9, false);
    assert_int_equal(is->failed, TS_OK);
    assert_int_equal(is->layers.count, 1);
    check_engine(e);
    ts_engine_free(e);
}

static ts_status abort_once_idle(ts_engine *e, uint64_t session, uint64_t step)
{
    ts_answer answer;
    return apply(e,
                 (ts_command){.op = TS_OP_STEP_ABORT,
                              .session = session,
                              .step_end = {.step = step, .once_idle = true}},
                 &answer);
}

/* It ends with its last run, or when a daemon takes over that isn't to do its runs. */
static void a_step_that_is_aborted_once_idle_ends_with_its_runs(void **state)
{
    (void)state;
    ts_engine *e = engine_new(16, 16, 4, TS_CLIENT_WRITE_ALL);
    const uint64_t s = session_new(e, 1000), other = session_new(e, 1000), seq = seq_new(e, s);
    ts_answer answer;
    const ts_command open = {
        .op = TS_OP_EXCHANGE_OPEN, .session = s, .exchange_open = {.bytes = 1 << 16}};
    assert_int_equal(apply(e, open, &answer), TS_OK);
    uint64_t step = step_of_ids(e, s, seq, NULL, 3);
    assert_int_equal(abort_once_idle(e, other, step), TS_ENOENT);
    assert_int_equal(abort_once_idle(e, s, step), TS_OK);
    assert_int_equal(e->live_steps, 0);

    step = step_of_ids(e, s, seq, NULL, 3);
    assert_int_equal(run_on_stream(e, s, step, 1, 1), TS_OK);
    assert_int_equal(run_on_stream(e, s, step, 2, 2), TS_OK);
    assert_int_equal(abort_once_idle(e, s, step), TS_OK);
    assert_int_equal(step_end(e, s, TS_OP_STEP_COMMIT, step, NULL, 0), TS_EBUSY);
    stream_run_done(e, step, 1, false);
    apply(e, (ts_command){.op = TS_OP_RESTARTED}, &answer); /* the next daemon does the other */
    check_engine(e);
    assert_int_equal(e->live_steps, 1);
    stream_run_done(e, step, 2, false);
    assert_int_equal(e->live_steps, 0);

    step = step_of_ids(e, s, seq, NULL, 3);
    assert_int_equal(run_on_stream(e, s, step, 0, 0), TS_OK);
    assert_int_equal(abort_once_idle(e, s, step), TS_OK);
    check_engine(e);
    assert_int_equal(e->live_steps, 1);
    apply(e, (ts_command){.op = TS_OP_RESTARTED}, &answer);
    assert_int_equal(e->live_steps, 0);

    assert_int_equal(length_of(e, s, seq), 0);
    assert_int_equal(e->pools[0].books.used, 0);
    check_engine(e);
    ts_engine_free(e);
}

/* Its session ends bit by bit meanwhile: the books agree all the time. */
static void a_step_that_is_aborted_once_idle_goes_with_its_session(void **state)
{
    (void)state;
    for (int quarantine = 0; quarantine < 2; quarantine++) {
        ts_engine *e = engine_new(200000, 100, 4, TS_CLIENT_WRITE_ALL);
        const uint64_t s = session_new(e, 1000), seq = seq_new(e, s);
        ts_answer answer;
        e->pools[0].config.on_gpu = quarantine;
        const ts_command open = {
            .op = TS_OP_EXCHANGE_OPEN, .session = s, .exchange_open = {.bytes = 1 << 20}};
        assert_int_equal(apply(e, open, &answer), TS_OK);
        const ts_command own = {.op = TS_OP_STEP_BEGIN,
                                .session = s,
                                .step_begin = {.seqs = &seq,
                                               .new_tokens = &(uint32_t){3},
                                               .count = 1,
                                               .heads = 1,
                                               .by_worker = quarantine}};
        assert_int_equal(apply(e, own, &answer), TS_OK);
        const uint64_t step = answer.begun.step->id;
        assert_int_equal(run_on_stream(e, s, step, 0, 0), TS_OK);
        for (int i = 0; i < 6; i++) { /* of 20000 blocks each: more than one sweep frees */
            const uint64_t large = seq_new(e, s);
            assert_int_equal(begin(e, s, &large, &(uint32_t){80000}, 1, false, &answer), TS_OK);
        }
        assert_int_equal(abort_once_idle(e, s, step), TS_OK);
        apply(e,
              (ts_command){.op = TS_OP_SESSION_CLOSE,
                           .session = s,
                           .session_close = {.quarantine = quarantine}},
              &answer);
        check_engine(e);
        assert_int_equal(step_done(e, step, 0), TS_OK);
        check_engine(e);
        if (quarantine)
            apply(e, (ts_command){.op = TS_OP_SESSION_GONE, .session = s}, &answer);
        check_engine(e);
        (void)sweep_all(e);
        assert_int_equal(e->live_sessions, 0);
        assert_int_equal(e->pools[0].books.used, 0);
        check_engine(e);
        ts_engine_free(e);
    }
}

/* A restart finds a block wrong, of a kept sequence that a step copies the tail of, and of a fork
 * of it. Of a session that has ended the step stays until its copy is made, and nobody finds the
 * sequence, neither until then nor later. */
static void a_wrong_block_is_nobodys_whatever_its_step_waits_for(void **state)
{
    (void)state;
    for (int closes = 0; closes < 2; closes++) {
        ts_engine *e = engine_new(16, 16, 4, TS_CLIENT_WRITE_ALL);
        const uint64_t s = session_new(e, 1000), other = session_new(e, 1000), seq = seq_new(e, s);
        ts_answer answer;
        append(e, s, seq, 6);
        const uint64_t fork = fork_seq(e, s, seq);
        assert_int_equal(keep_seq(e, s, seq, "k"), TS_OK);
        assert_int_equal(begin(e, s, &seq, &(uint32_t){1}, 1, false, &answer), TS_OK);
        assert_int_equal(answer.begun.num_copies, 1);
        const uint64_t step = answer.begun.step->id;
        const uint32_t block = e->pools[0].seqs.all[(uint32_t)seq].blocks[0];
        if (closes)
            close_session(e, s);
        apply(e, (ts_command){.op = TS_OP_RESTARTED}, &answer);
        assert_int_equal(attach(e, other, "k"), seq);
        apply(e, (ts_command){.op = TS_OP_BLOCK_LOST, .block_lost.block = block}, &answer);
        assert_int_equal(answer.dropped, closes ? 1 : 2); /* the fork went with its session */
        assert_int_equal(attach(e, other, "k"), 0);
        check_engine(e);
        if (closes) {
            assert_non_null(ts_engine_find_step(e, step));
            assert_int_equal(step_done(e, step, TS_NONE), TS_OK);
            assert_int_equal(e->live_sessions, 1);
        } else {
            assert_int_equal(free_seq(e, s, fork), TS_ENOENT);
        }
        assert_null(ts_engine_find_step(e, step));
        assert_int_equal(attach(e, other, "k"), 0);
        assert_int_equal(e->pools[0].books.used, 0);
        check_engine(e);
        ts_engine_free(e);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_run_outside_the_exchange_is_refused),
        cmocka_unit_test(a_run_that_writes_where_it_reads_is_refused),
        cmocka_unit_test(runs_on_a_stream_are_numbered_and_outlive_the_daemon),
        cmocka_unit_test(a_posted_run_that_is_refused_keeps_its_number),
        cmocka_unit_test(a_step_that_is_aborted_once_idle_ends_with_its_runs),
        cmocka_unit_test(a_step_that_is_aborted_once_idle_goes_with_its_session),
        cmocka_unit_test(a_wrong_block_is_nobodys_whatever_its_step_waits_for),
    };
    return cmocka_run_group_tests_name("engine_runs", tests, NULL, NULL);
}
