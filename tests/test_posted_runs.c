/*
 * Runs that are posted (proto/signals.h): those of a step after the first of their kind, whose
 * worker goes on before the daemon has taken them.
 */
#define _GNU_SOURCE
#include "stream_worker.h"

#include <poll.h>
#include <sys/wait.h>

/* The run that was posted last can't be done, as the daemon that takes it finds. */
static void spoil_posted(const ts_client *c)
{
    const uint64_t beyond = UINT64_MAX / 64 * 64;
    c->rings->submitted[(c->ring_submitted - 1) % TS_RING_ENTRIES].run.q = beyond;
    c->signals->posted.run.q = beyond;
}

/* The daemon stands still, and is killed before it has taken the worker's second run. The next one
 * finds it, and the worker only waits for its stream. */
static void the_next_daemon_does_what_no_daemon_has_taken(void **state)
{
    (void)state;
    uint64_t found[2] = {0};
    for (int kills = 0; kills < 2; kills++) {
        daemon_process d;
        worker w;
        start(&d, POOL, NULL);
        ts_client *c = connect_by(&d, TS_TRANSPORT_RING);
        worker_open(&w, c);
        worker_begin(&w, 20);
        DO(run_layer(&w, 0));
        const pid_t daemon = stop_daemon(&d);
        DO(run_layer(&w, 1));
        assert_int_equal(kill(daemon, kills > 0 ? SIGKILL : SIGCONT), 0);
        fake_stream_await();
        assert_int_equal(ts_client_restarts(c), 0); /* it has called nothing since */
        DO(run_layer(&w, 2));
        assert_int_equal(ts_client_restarts(c), kills);
        fake_stream_await();
        DO(ts_step_commit(w.task.step, NULL));
        found[kills] = w.digest.value;
        check_daemon(c);
        worker_close(&w);
        stop(&d, false);
    }
    assert_int_equal(found[0], found[1]);
}

/* By the daemon that took it, or by the next one, or with one more after that: the stream goes on
 * behind the runs before it, the step has failed, and the session's next step is as ever. */
static void a_posted_run_that_is_refused_holds_up_no_stream(void **state)
{
    (void)state;
    for (int kills = 0; kills < 3; kills++) {
        daemon_process d;
        worker w;
        start(&d, POOL, NULL);
        ts_client *c = connect_by(&d, TS_TRANSPORT_RING);
        worker_open(&w, c);
        worker_begin(&w, 20);
        stop_stream();
        while (sem_wait(&reached) != 0)
            ;
        DO(run_layer(&w, 0));
        const pid_t daemon = stop_daemon(&d);
        DO(run_layer(&w, 1));
        spoil_posted(c);
        assert_int_equal(kill(daemon, kills > 0 ? SIGKILL : SIGCONT), 0);
        if (kills == 0) {
            assert_int_equal(run_layer(&w, 2), TS_EINVAL);
            assert_non_null(strstr(ts_error(c), "q takes 5120 bytes at offset 184467440737095515"));
        }
        DO(run_layer(&w, 2)); /* it is told once */
        if (kills > 1)
            assert_int_equal(kill(daemon_of(&d), SIGKILL), 0);
        sem_post(&may_go);
        fake_stream_await();
        assert_int_equal(ts_step_commit(w.task.step, NULL), TS_EINVAL);
        assert_non_null(strstr(ts_error(c), "the run of layer 1 of step"));
        assert_int_equal(ts_client_restarts(c), kills);
        DO(ts_step_abort(w.task.step));
        stream_step(c, w.pool, &w.seq, (uint32_t[]){16}, 1, &w.random, &w.digest);
        check_daemon(c);
        worker_close(&w);
        stop(&d, false);
    }
}

/* A worker that posts what is refused and never submits it: the daemon holds 16 such runs of it,
 * and takes more as they are late. */
static void refused_runs_are_bounded(void **state)
{
    (void)state;
    enum { MOST = 16, POSTED = 20 };
    daemon_process d;
    worker w;
    start_with(&d, POOL, NULL, "submit_seconds=1");
    ts_client *c = connect_by(&d, TS_TRANSPORT_RING);
    worker_open(&w, c);
    worker_begin(&w, 20);
    DO(run_layer(&w, 0));
    fake_stream_await();
    ts_rings_memory *m = c->rings;
    for (uint32_t i = 0; i < POSTED; i++)
        m->submitted[c->ring_submitted++ % TS_RING_ENTRIES] =
            (ts_ring_entry){.op = TS_RING_RUN,
                            .step = 1, /* which there isn't */
                            .run = {.flags = TS_RUN_ON_STREAM | TS_RUN_POSTED, .number = 2 + i}};
    __atomic_store_n(&m->submissions.tail, c->ring_submitted, __ATOMIC_SEQ_CST);
    assert_int_equal(write(c->doorbell, &(uint64_t){1}, 8), 8);
    while (__atomic_load_n(&m->completions.tail, __ATOMIC_ACQUIRE) - c->ring_seen <= MOST)
        sched_yield();
    assert_true(__atomic_load_n(&c->signals->completed, __ATOMIC_ACQUIRE) >= 2);
    while (__atomic_load_n(&m->completions.tail, __ATOMIC_ACQUIRE) - c->ring_seen < POSTED)
        sched_yield();
    c->ring_seen += POSTED;
    __atomic_store_n(&m->completions.head, c->ring_seen, __ATOMIC_RELEASE);
    atomic_store(&c->runs_on_stream, 1 + POSTED);
    DO(ts_step_abort(w.task.step));
    stream_step(c, w.pool, &w.seq, (uint32_t[]){16}, 1, &w.random, &w.digest);
    check_daemon(c);
    worker_close(&w);
    stop(&d, false);
}

/* Nothing is lost, and calls are tried again, when the daemon stands still for longer than they
 * take. */
static void a_posted_run_may_be_answered_late(void **state)
{
    (void)state;
    daemon_process d;
    worker w;
    start(&d, POOL, NULL);
    ts_client *c = connect_by(&d, TS_TRANSPORT_RING);
    worker_open(&w, c);
    worker_begin(&w, 20);
    DO(run_layer(&w, 0));
    const pid_t daemon = stop_daemon(&d);
    c->timeout_ms = 200;
    DO(run_layer(&w, 1));
    assert_int_equal(run_layer(&w, 2), TS_ETIMEOUT);
    assert_non_null(strstr(ts_error(c), "to run 2 within 200 ms"));
    assert_int_equal(ts_step_commit(w.task.step, NULL), TS_ETIMEOUT);
    assert_int_equal(kill(daemon, SIGCONT), 0);
    c->timeout_ms = 60000;
    DO(run_layer(&w, 2));
    fake_stream_await();
    DO(ts_step_commit(w.task.step, NULL));
    check_daemon(c);
    worker_close(&w);
    stop(&d, false);
}

/* As many runs are under way as a step may have, and one more is posted, when the daemon dies. The
 * worker comes back by a call that has nothing to do with it, and then waits for its stream. */
static void a_run_that_no_daemon_could_take_is_done(void **state)
{
    (void)state;
    daemon_process d;
    worker w;
    uint32_t length;
    start(&d, POOL, NULL);
    ts_client *c = connect_by(&d, TS_TRANSPORT_RING);
    worker_open(&w, c);
    worker_begin(&w, 20);
    stop_stream();
    while (sem_wait(&reached) != 0)
        ;
    for (uint32_t i = 0; i < 5; i++) /* of which 4 may be under way */
        DO(run_layer(&w, i % LAYERS));
    assert_int_equal(kill(daemon_of(&d), SIGKILL), 0);
    DO(ts_seq_lengths(w.pool, &w.seq, 1, &length));
    assert_int_equal(ts_client_restarts(c), 1);
    sem_post(&may_go);
    fake_stream_await();
    DO(ts_step_commit(w.task.step, NULL));
    check_daemon(c);
    worker_close(&w);
    stop(&d, false);
}

/* The next daemon gives the worker no rings: its runs go by message, whether one was posted or is
 * about to be. */
static void runs_go_on_without_rings(void **state)
{
    (void)state;
    for (int posted = 0; posted < 2; posted++) {
        daemon_process d;
        worker w;
        start(&d, POOL, NULL);
        ts_client *c = connect_by(&d, TS_TRANSPORT_AUTO);
        worker_open(&w, c);
        worker_begin(&w, 20);
        DO(run_layer(&w, 0));
        const pid_t daemon = stop_daemon(&d);
        if (posted)
            DO(run_layer(&w, 1));
        c->ring_ids = UINT32_MAX / 2; /* more than there can be */
        assert_int_equal(kill(daemon, SIGKILL), 0);
        if (!posted)
            DO(run_layer(&w, 1));
        DO(run_layer(&w, 2));
        assert_true(c->rings_lost);
        c->ring_ids = 0; /* as they are unmapped */
        fake_stream_await();
        DO(ts_step_commit(w.task.step, NULL));
        assert_int_equal(ts_client_restarts(c), 1);
        stream_step(c, w.pool, &w.seq, (uint32_t[]){16}, 1, &w.random, &w.digest);
        check_daemon(c);
        worker_close(&w);
        stop(&d, false);
    }
}

/* The same where as many runs are under way as may be: the one that comes by message waits for the
 * one that was posted, and both for room. */
static void a_run_by_message_waits_for_a_posted_one(void **state)
{
    (void)state;
    daemon_process d;
    worker w;
    start(&d, POOL, NULL);
    ts_client *c = connect_by(&d, TS_TRANSPORT_AUTO);
    worker_open(&w, c);
    worker_begin(&w, 20);
    stop_stream();
    while (sem_wait(&reached) != 0)
        ;
    for (uint32_t i = 0; i < 5; i++) /* of which 4 may be under way */
        DO(run_layer(&w, i % LAYERS));
    c->ring_ids = UINT32_MAX / 2;
    assert_int_equal(kill(daemon_of(&d), SIGKILL), 0);
    sem_post(&may_go);
    DO(run_layer(&w, 0));
    assert_true(c->rings_lost);
    c->ring_ids = 0;
    fake_stream_await();
    DO(ts_step_commit(w.task.step, NULL));
    check_daemon(c);
    worker_close(&w);
    stop(&d, false);
}

/* A child that inherits a posted run has nothing to do with its parent's rings. */
static void a_forked_child_waits_for_no_posted_run(void **state)
{
    (void)state;
    daemon_process d;
    worker w;
    int status;
    start(&d, POOL, NULL);
    ts_client *c = connect_by(&d, TS_TRANSPORT_RING);
    worker_open(&w, c);
    worker_begin(&w, 20);
    DO(run_layer(&w, 0));
    DO(run_layer(&w, 1));
    const pid_t child = fork();
    if (child == 0)
        _exit(ts_step_commit(w.task.step, NULL) == TS_ECONN ? 0 : 1);
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_int_equal(status, 0);
    DO(run_layer(&w, 2));
    fake_stream_await();
    DO(ts_step_commit(w.task.step, NULL));
    assert_int_equal(ts_client_transport(c), TS_TRANSPORT_RING);
    check_daemon(c);
    worker_close(&w);
    stop(&d, false);
}

int main(void)
{
    ignore_threads_left();
    setenv("TS_TEST_FAKE_GPU", "1", 1);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_next_daemon_does_what_no_daemon_has_taken),
        cmocka_unit_test(a_posted_run_that_is_refused_holds_up_no_stream),
        cmocka_unit_test(refused_runs_are_bounded),
        cmocka_unit_test(a_posted_run_may_be_answered_late),
        cmocka_unit_test(a_run_that_no_daemon_could_take_is_done),
        cmocka_unit_test(runs_go_on_without_rings),
        cmocka_unit_test(a_run_by_message_waits_for_a_posted_one),
        cmocka_unit_test(a_forked_child_waits_for_no_posted_run),
    };
    return cmocka_run_group_tests_name("posted_runs", tests, NULL, NULL);
}
