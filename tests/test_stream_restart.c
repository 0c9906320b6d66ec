/*
 * The daemon dies while runs of one worker are on its stream, which the test holds and lets go: the
 * next daemon does what nobody asks it for, and no stream is kept waiting for what can't be done.
 */
#define _GNU_SOURCE
#include "stream_worker.h"

#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/syscall.h>

extern atomic_bool fake_is_lost; /* fake_libcuda.c */

/* TS_EBUSY as long as the sequence is in a step. */
static ts_status begin_another(const worker *w, ts_step **step)
{
    const ts_step_options options = {.size = sizeof(ts_step_options), .heads = HEADS};
    return ts_step_begin(w->pool, &w->seq, &(uint32_t){3}, 1, &options, step);
}

/* ---- a worker that calls nothing ---- */

/* The daemon is killed before the worker's stream has submitted anything of what is queued, and the
 * worker waits for its stream and for nothing else. */
static void the_next_daemon_does_what_nobody_asks_it_for(void **state)
{
    (void)state;
    uint64_t found[2] = {0};
    for (int kills = 0; kills < 2; kills++) {
        daemon_process d;
        worker w;
        start(&d, POOL, NULL);
        ts_client *c = connect_by(&d, TS_TRANSPORT_RING);
        c->timeout_ms = 1u << 31; /* for so long it waits for the next one: NNG's time is an int */
        worker_open(&w, c);
        worker_begin(&w, 20);
        stop_stream();
        while (sem_wait(&reached) != 0)
            ;
        queue_layers(c, &w.task);
        if (kills > 0)
            assert_int_equal(kill(daemon_of(&d), SIGKILL), 0);
        sem_post(&may_go);
        fake_stream_await();
        assert_int_equal(ts_client_restarts(c), 0); /* it has called nothing since */
        DO(ts_step_commit(w.task.step, NULL));
        assert_int_equal(ts_client_restarts(c), kills);
        found[kills] = w.digest.value;
        worker_close(&w);
        stop(&d, false);
    }
    assert_int_equal(found[0], found[1]);
}

/* Daemon and supervisor are gone: the stream goes on when the client's time is over, and nothing of
 * the session is kept. */
static void a_stream_goes_on_when_no_daemon_comes(void **state)
{
    (void)state;
    daemon_process d;
    worker w;
    start(&d, POOL, NULL);
    ts_client *c = connect_for(&d, 200);
    worker_open(&w, c);
    worker_begin(&w, 20);
    stop_stream();
    queue_layers(c, &w.task);
    const pid_t daemon = daemon_of(&d);
    struct pollfd gone = {.fd = (int)syscall(SYS_pidfd_open, daemon, 0u), .events = POLLIN};
    int status;
    kill(d.pid, SIGKILL);
    assert_int_equal(waitpid(d.pid, &status, 0), d.pid);
    kill(daemon, SIGKILL);
    assert_int_equal(poll(&gone, 1, -1), 1);
    close(gone.fd);
    sem_post(&may_go);
    fake_stream_await();
    assert_int_equal(ts_step_commit(w.task.step, NULL), TS_ECONN);
    assert_non_null(strstr(ts_error(c), "the stream went on without them"));
    assert_int_equal(ts_step_abort(w.task.step), TS_ECONN);
    worker_close(&w);
    static const char *const left[] = {".notify", ".store", ".store.lock"}; /* the supervisor's */
    for (uint32_t i = 0; i < sizeof left / sizeof *left; i++) {
        char path[112];
        snprintf(path, sizeof path, "%s%s", d.url, left[i]);
        unlink(path);
    }
    daemon_clean(&d);
    alarm(0);
}

/* A fault has taken the worker's context: it doesn't wait for the daemon, which may be waiting for
 * it to end. */
static void a_worker_without_a_context_waits_for_nobody(void **state)
{
    (void)state;
    daemon_process d;
    worker w;
    start(&d, POOL, NULL);
    ts_client *c = connect_by(&d, TS_TRANSPORT_RING); /* its calls may take a minute */
    worker_open(&w, c);
    const pid_t daemon = daemon_of(&d);
    assert_int_equal(kill(d.pid, SIGSTOP), 0); /* no daemon comes */
    assert_int_equal(kill(daemon, SIGKILL), 0);
    atomic_store(&fake_is_lost, true);
    assert_int_equal(ts_seq_free(w.pool, &w.seq, 1), TS_ECONN);
    assert_non_null(strstr(ts_error(c), "a fault has taken this process's CUDA context"));
    worker_close(&w);
    atomic_store(&fake_is_lost, false);
    assert_int_equal(kill(d.pid, SIGCONT), 0);
    ts_client *next = connect_by(&d, TS_TRANSPORT_RING);
    check_daemon(next);
    ts_disconnect(next);
    stop(&d, false);
}

/* ---- a step that was aborted while its runs wait for the stream ---- */

/* Its abort isn't heard of, and the next call is carried out, but not answered, by a daemon that
 * dies. The next one does that call once, and ends the step when its runs are over; if it dies
 * before, the one after it does. */
static void an_abort_that_waits_for_the_stream_goes_on(void **state)
{
    (void)state;
    for (int more = 0; more < 2; more++) {
        daemon_process d;
        worker w;
        ts_seq other;
        ts_step *next;
        start(&d, POOL, "answering:7"); /* of session, pool, exchange, sequence, step, run */
        ts_client *c = connect_for(&d, 2000);
        worker_open(&w, c);
        worker_begin(&w, 20);
        stop_stream();
        DO(ts_step_run_with(w.task.step, 0,
                            &(ts_run_options){.size = sizeof(ts_run_options), .on_stream = true}));
        assert_int_equal(ts_step_abort(w.task.step), TS_ETIMEOUT);
        assert_int_equal(ts_client_restarts(c), 0);
        DO(ts_seq_create(w.pool, 1, &other));
        assert_int_equal(ts_client_restarts(c), 1);
        if (more)
            assert_int_equal(kill(daemon_of(&d), SIGKILL), 0);
        assert_int_equal(sequences(c), 2);
        assert_int_equal(begin_another(&w, &next), TS_EBUSY);
        sem_post(&may_go);
        fake_stream_await();
        while (begin_another(&w, &next) == TS_EBUSY)
            ; /* its runs are over, which the engine is about to hear */
        DO(ts_step_abort(next));
        DO(ts_seq_free(w.pool, &w.seq, 1));
        assert_int_equal(ts_client_restarts(c), 1 + more);
        assert_int_equal(sequences(c), 1);
        check_daemon(c);
        worker_close(&w);
        stop(&d, false);
    }
}

/* However many there are. */
static void all_aborts_that_wait_for_the_stream_go_on(void **state)
{
    (void)state;
    enum { STEPS = 70 };
    daemon_process d;
    ts_seq seqs[STEPS];
    ts_step *steps[STEPS];
    start(&d, POOL, NULL);
    ts_client *c = connect_for(&d, 2000);
    ts_pool *p = open_pool(c, "p", 0);
    open_exchange(c, p, OF_DAEMON);
    DO(ts_seq_create(p, STEPS, seqs));
    for (uint32_t i = 0; i < STEPS; i++)
        steps[i] = begin(c, p, &seqs[i], &(uint32_t){3}, 1);
    stop_stream();
    for (uint32_t i = 0; i < STEPS; i++)
        DO(ts_step_run_with(steps[i], 0,
                            &(ts_run_options){.size = sizeof(ts_run_options), .on_stream = true}));
    c->timeout_ms = 20; /* the aborts alone are given up */
    for (uint32_t i = 0; i < STEPS; i++)
        assert_int_equal(ts_step_abort(steps[i]), TS_ETIMEOUT);
    c->timeout_ms = 60000;
    assert_int_equal(kill(daemon_of(&d), SIGKILL), 0);
    assert_int_equal(sequences(c), STEPS);
    assert_int_equal(ts_client_restarts(c), 1);
    sem_post(&may_go);
    fake_stream_await();
    while (ts_seq_free(p, seqs, STEPS) == TS_EBUSY)
        ; /* their runs are over, which the engine is about to hear */
    assert_int_equal(sequences(c), 0);
    check_daemon(c);
    ts_pool_close(p);
    ts_disconnect(c);
    stop(&d, false);
}

/* ---- what can't be done again ---- */

/* A run that its worker didn't submit in time isn't taken for done by the next daemon, though its
 * word says that it was submitted. */
static void a_late_run_stays_late(void **state)
{
    (void)state;
    daemon_process d;
    worker w;
    start_with(&d, POOL, "signalled:1", "submit_seconds=1");
    ts_client *c = connect_by(&d, TS_TRANSPORT_RING);
    worker_open(&w, c);
    worker_begin(&w, 20);
    stop_stream();
    DO(ts_step_run_with(w.task.step, 0,
                        &(ts_run_options){.size = sizeof(ts_run_options), .on_stream = true}));
    /* The commit waits for the run: for the daemon to be tired of it, to die, and to come back. */
    assert_int_equal(ts_step_commit(w.task.step, NULL), TS_ETIMEOUT);
    assert_int_equal(ts_client_restarts(c), 1);
    sem_post(&may_go);
    fake_stream_await();
    DO(ts_step_abort(w.task.step));
    check_daemon(c);
    worker_close(&w);
    stop(&d, false);
}

/* The stream isn't kept waiting for a run that isn't done a third time. */
static void a_run_on_a_stream_that_crashes_the_daemon_twice_fails(void **state)
{
    (void)state;
    daemon_process d;
    worker w;
    setenv("TS_TEST_CRASH", "running", 1);
    start(&d, POOL, NULL);
    unsetenv("TS_TEST_CRASH");
    ts_client *c = connect_by(&d, TS_TRANSPORT_RING);
    worker_open(&w, c);
    worker_begin(&w, 1);
    fake_stream_call(fill_inputs, &w.task);
    DO(ts_step_run_with(w.task.step, 0,
                        &(ts_run_options){.size = sizeof(ts_run_options), .on_stream = true}));
    fake_stream_await();
    assert_int_equal(ts_step_commit(w.task.step, NULL), TS_EINTERNAL);
    DO(ts_step_abort(w.task.step)); /* the session goes on */
    DO(ts_seq_free(w.pool, &w.seq, 1));
    check_daemon(c);
    worker_close(&w);
    stop(&d, false);
}

static void *kill_stopped(void *arg)
{
    assert_int_equal(kill(await_stopped(arg), SIGKILL), 0);
    return NULL;
}

/* The next daemon finds that a block of the step's sequence isn't what was stored. The step is lost
 * with it, its runs aren't done, and the stream isn't kept waiting for them; those of another step,
 * which come behind them, are done. */
static void runs_of_a_step_that_is_lost_are_not_waited_for(void **state)
{
    (void)state;
    daemon_process d;
    worker w;
    pthread_t thread;
    uint64_t slots[16];
    uint32_t length;
    ts_kv kv;
    ts_seq good;
    setenv("TS_TEST_STOP", "summed:1", 1);
    start_with(&d, POOL, NULL, "verify=restart");
    unsetenv("TS_TEST_STOP");
    ts_client *c = connect_by(&d, TS_TRANSPORT_RING);
    ts_pool *p = open_pool(c, "p", TS_POOL_WRITABLE);
    worker_open(&w, c);
    assert_int_equal(pthread_create(&thread, NULL, kill_stopped, &d), 0);
    worker_begin(&w, 16);
    ts_step_slots(w.task.step, 0, slots);
    DO(ts_slot_kv(p, slots[0], 0, &kv));
    queue_layers(c, &w.task);
    fake_stream_await();
    DO(ts_step_commit(w.task.step, NULL));
    assert_int_equal(pthread_join(thread, NULL), 0);
    DO(ts_seq_create(w.pool, 1, &good));
    worker_begin(&w, 1);
    layer_task other = w.task;
    other.step = begin(c, w.pool, &good, &other.tokens, 1);
    stop_stream();
    while (sem_wait(&reached) != 0)
        ;
    queue_layers(c, &w.task);
    queue_layers(c, &other);
    ((float *)kv.k)[0] += 1;
    assert_int_equal(kill(daemon_of(&d), SIGKILL), 0);
    sem_post(&may_go);
    fake_stream_await();
    assert_int_equal(ts_step_commit(w.task.step, NULL), TS_ENOENT);
    assert_int_equal(ts_step_abort(w.task.step), TS_ENOENT); /* nothing is left of it here */
    assert_int_equal(ts_client_restarts(c), 2);
    assert_int_equal(ts_seq_lengths(w.pool, &w.seq, 1, &length), TS_ENOENT);
    DO(ts_step_commit(other.step, NULL));
    DO(ts_seq_lengths(w.pool, &good, 1, &length));
    assert_int_equal(length, 1);
    stream_step(c, w.pool, &good, (uint32_t[]){16}, 1, &w.random, &w.digest);
    check_daemon(c);
    ts_pool_close(p);
    worker_close(&w);
    stop(&d, false);
}

int main(void)
{
    ignore_threads_left();
    setenv("TS_TEST_FAKE_GPU", "1", 1);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_next_daemon_does_what_nobody_asks_it_for),
        cmocka_unit_test(a_stream_goes_on_when_no_daemon_comes),
        cmocka_unit_test(a_worker_without_a_context_waits_for_nobody),
        cmocka_unit_test(an_abort_that_waits_for_the_stream_goes_on),
        cmocka_unit_test(all_aborts_that_wait_for_the_stream_go_on),
        cmocka_unit_test(a_late_run_stays_late),
        cmocka_unit_test(a_run_on_a_stream_that_crashes_the_daemon_twice_fails),
        cmocka_unit_test(runs_of_a_step_that_is_lost_are_not_waited_for),
    };
    return cmocka_run_group_tests_name("stream_restart", tests, NULL, NULL);
}
