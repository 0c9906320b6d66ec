/*
 * The daemon dies while runs of one worker are on its stream, which the test holds and lets go: the
 * next daemon does what nobody asks it for, and no stream is kept waiting for what can't be done.
 */
#define _GNU_SOURCE
#include "gpu_restart_util.h"

#include <poll.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdatomic.h>
#include <sys/syscall.h>

extern atomic_bool fake_is_lost; /* fake_libcuda.c */

/* A worker with one sequence, and the step that it has begun. */
typedef struct worker {
    ts_client *client;
    ts_pool *pool;
    ts_seq seq;
    rng random;
    digest digest;
    layer_task task;
} worker;

static ts_client *connect_as(const daemon_process *d, uint32_t timeout_ms, ts_transport transport)
{
    ts_client *c;
    OK(ts_connect(&(ts_options){.size = sizeof(ts_options),
                                .url = d->url,
                                .wait_ms = 60000,
                                .timeout_ms = timeout_ms,
                                .transport = transport},
                  &c));
    return c;
}

/* A client by messages; timeout_ms: of each of its calls. */
static ts_client *connect_for(const daemon_process *d, uint32_t timeout_ms)
{
    return connect_as(d, timeout_ms, TS_TRANSPORT_MESSAGES);
}

/* Makes the client a worker whose exchange is the daemon's. */
static void worker_open(worker *w, ts_client *c)
{
    *w = (worker){.client = c, .pool = open_pool(c, "p", 0), .random = {7}, .digest = {1}};
    open_exchange(c, w->pool, OF_DAEMON);
    DO(ts_seq_create(w->pool, 1, &w->seq));
}

static void worker_begin(worker *w, uint32_t tokens)
{
    w->task = (layer_task){.step = begin(w->client, w->pool, &w->seq, &tokens, 1),
                           .tokens = tokens,
                           .random = &w->random,
                           .digest = &w->digest};
}

/* TS_EBUSY as long as the sequence is in a step. */
static ts_status begin_another(const worker *w, ts_step **step)
{
    const ts_step_options options = {.size = sizeof(ts_step_options), .heads = HEADS};
    return ts_step_begin(w->pool, &w->seq, &(uint32_t){3}, 1, &options, step);
}

static void worker_close(worker *w)
{
    ts_pool_close(w->pool);
    ts_disconnect(w->client);
}

/* ---- a worker that calls nothing ---- */

static sem_t reached, may_go;

static void hold_stream(void *arg)
{
    (void)arg;
    sem_post(&reached);
    while (sem_wait(&may_go) != 0)
        ;
}

/* What is queued from now on waits for `may_go`. */
static void stop_stream(void)
{
    sem_init(&reached, 0, 0);
    sem_init(&may_go, 0, 0);
    fake_stream_call(hold_stream, NULL);
}

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

/* ---- runs that are posted: those after the first of their kind in a step ---- */

static ts_status run_layer(worker *w, uint32_t layer)
{
    const ts_run_options options = {.size = sizeof(ts_run_options), .on_stream = true};
    fake_stream_call(fill_inputs, &w->task);
    const ts_status status = ts_step_run_with(w->task.step, layer, &options);
    if (status == TS_OK)
        fake_stream_call(read_output, &w->task);
    return status;
}

/* The run that was posted last can't be done, as the daemon that takes it finds. */
static void spoil_posted(const ts_client *c)
{
    const uint64_t beyond = UINT64_MAX / 64 * 64;
    c->rings->submitted[(c->ring_submitted - 1) % TS_RING_ENTRIES].run.q = beyond;
    c->signals->posted.run.q = beyond;
}

static pid_t stop_daemon(const daemon_process *d)
{
    assert_int_equal(kill(daemon_of(d), SIGSTOP), 0);
    return await_stopped(d);
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
    ts_client *c = connect_as(&d, 200, TS_TRANSPORT_RING);
    worker_open(&w, c);
    worker_begin(&w, 20);
    DO(run_layer(&w, 0));
    const pid_t daemon = stop_daemon(&d);
    DO(run_layer(&w, 1));
    assert_int_equal(run_layer(&w, 2), TS_ETIMEOUT);
    assert_non_null(strstr(ts_error(c), "run 2 has no answer from"));
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
        cmocka_unit_test(the_next_daemon_does_what_no_daemon_has_taken),
        cmocka_unit_test(a_posted_run_that_is_refused_holds_up_no_stream),
        cmocka_unit_test(refused_runs_are_bounded),
        cmocka_unit_test(a_posted_run_may_be_answered_late),
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
