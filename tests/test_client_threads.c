/* Threads that share a client: one is inside a call, and the others are refused. */
#define _GNU_SOURCE
#include "execution_util.h"

#include <pthread.h>

/* A thread that is inside a call for as long as the daemon is stopped. */
typedef struct caller {
    pthread_t thread;
    ts_pool *pool;
    ts_seq seq;
    ts_status status;
} caller;

static void *call(void *arg)
{
    caller *a = arg;
    uint32_t length;
    a->status = ts_seq_lengths(a->pool, &a->seq, 1, &length);
    return NULL;
}

static void caller_start(caller *a, const daemon_process *d, ts_pool *pool, ts_seq seq)
{
    *a = (caller){.pool = pool, .seq = seq};
    daemon_pause(d);
    assert_int_equal(pthread_create(&a->thread, NULL, call, a), 0);
    while (!atomic_load(&pool->client->in_call))
        ;
}

static void caller_end(caller *a, const daemon_process *d)
{
    daemon_resume(d);
    pthread_join(a->thread, NULL);
    assert_int_equal(a->status, TS_OK);
}

static void a_second_thread_is_refused_by_every_call(void **state)
{
    (void)state;
    daemon_process d;
    caller first;
    daemon_start(&d, POOL);
    ts_client *c = connect_to(&d);
    ts_pool *p = open_pool(c, "tiny", 0), *q;
    ts_seq seq, more[2];
    ts_step *step, *other;
    ts_frame *frame;
    ts_kv kv;
    uint32_t n = 1;
    uint64_t slots[1] = {0};
    void *base;
    int ordinal;
    OK(ts_seq_create(p, 1, &seq));
    OK(ts_step_begin(p, &seq, &n, 1, NULL, &step));
    assert_int_equal(ts_seq_free(p, &seq, 1), TS_EBUSY); /* by the daemon's word */
    assert_null(strstr(ts_error(c), "thread"));
    caller_start(&first, &d, p, seq);
#define REFUSED(call)                                                                              \
    assert_int_equal((call), TS_EBUSY);                                                            \
    assert_non_null(strstr(ts_error(c), "is used by one thread at a time"))
    REFUSED(ts_pool_open(c, "tiny", 0, &q));
    assert_null(q);
    REFUSED(ts_pool_cuda_device(p, &ordinal));
    REFUSED(ts_pool_map(p, slots, 1, 0, &base));
    REFUSED(ts_exchange_device(p, 4096));
    REFUSED(ts_exchange_register(p, slots, 4096));
    REFUSED(ts_seq_create(p, 1, more));
    REFUSED(ts_seq_fork(p, seq, 2, more));
    REFUSED(ts_seq_fork_at(p, seq, 0, 2, more));
    REFUSED(ts_seq_truncate(p, &seq, &n, 1));
    REFUSED(ts_seq_free(p, &seq, 1));
    REFUSED(ts_seq_keep(p, seq, "name"));
    REFUSED(ts_seq_attach(p, "name", more, NULL));
    REFUSED(ts_seq_lengths(p, &seq, 1, &n));
    REFUSED(ts_seq_slots(p, seq, 0, 0, 1, slots));
    REFUSED(ts_slot_kv(p, 0, 0, &kv));
    REFUSED(ts_seq_append(p, &seq, &n, 1, slots));
    REFUSED(ts_step_begin(p, &seq, &n, 1, NULL, &other));
    assert_null(other);
    REFUSED(ts_step_run(step, 0));
    REFUSED(
        ts_step_run_with(step, 0, &(ts_run_options){.size = sizeof(ts_run_options), .window = 1}));
    REFUSED(ts_step_commit(step, NULL));
    REFUSED(
        ts_frame_new(p, &(ts_frame_options){.size = sizeof(ts_frame_options), .seqs = 1}, &frame));
    assert_null(frame);
    caller_end(&first, &d);
    OK(ts_step_abort(step));
    OK(ts_seq_free(p, &seq, 1));
    assert_int_equal(ts_seq_free(p, &seq, 1), TS_ENOENT); /* the client's own sentence again */
    assert_null(strstr(ts_error(c), "thread"));
    ts_pool_close(p);
    ts_disconnect(c);
    daemon_stop(&d);
}

static void *end(void *pool)
{
    ts_client *c = ((ts_pool *)pool)->client;
    ts_pool_close(pool);
    ts_disconnect(c);
    return NULL;
}

static void a_client_is_not_freed_under_a_thread_that_is_inside(void **state)
{
    (void)state;
    daemon_process d;
    caller first;
    pthread_t last;
    daemon_start(&d, POOL);
    ts_client *c = connect_to(&d);
    ts_pool *p = open_pool(c, "tiny", 0);
    ts_seq seq;
    OK(ts_seq_create(p, 1, &seq));
    caller_start(&first, &d, p, seq);
    assert_int_equal(pthread_create(&last, NULL, end, p), 0);
    caller_end(&first, &d);
    pthread_join(last, NULL);
    daemon_stop(&d);
}

static void a_child_forked_under_a_call_is_told_whose_the_session_is(void **state)
{
    (void)state;
    daemon_process d;
    caller first;
    daemon_start(&d, POOL);
    ts_client *c = connect_to(&d);
    ts_pool *p = open_pool(c, "tiny", 0);
    ts_seq seq;
    OK(ts_seq_create(p, 1, &seq));
    caller_start(&first, &d, p, seq);
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        uint32_t length;
        standstill_after(WATCHDOG_SECONDS);
        bool told = ts_seq_lengths(p, &seq, 1, &length) == TS_ECONN &&
                    strstr(ts_error(c), "connect after fork()") != NULL;
        ts_pool_close(p);
        ts_disconnect(c);
        _exit(told ? 0 : 1);
    }
    join_child(child);
    caller_end(&first, &d);
    ts_pool_close(p);
    ts_disconnect(c);
    daemon_stop(&d);
}

enum { ROUNDS = 300 };

/* Calls until the call isn't refused. */
#define UNTIL_LET_IN(status, call)                                                                 \
    while (((status) = (call)) == TS_EBUSY)                                                        \
    continue

/* Takes many steps; what it is refused, it tries again. */
static void *step_on(void *arg)
{
    caller *a = arg;
    uint32_t length;
    for (int i = 0; i < ROUNDS && a->status == TS_OK; i++) {
        ts_step *step;
        UNTIL_LET_IN(a->status, ts_step_begin(a->pool, &a->seq, &(uint32_t){1}, 1, NULL, &step));
        if (a->status != TS_OK)
            break;
        UNTIL_LET_IN(a->status, ts_step_run(step, 0));
        if (a->status == TS_OK)
            a->status = ts_step_abort(step);
        if (a->status == TS_OK)
            UNTIL_LET_IN(a->status, ts_seq_lengths(a->pool, &a->seq, 1, &length));
    }
    return NULL;
}

static void threads_that_try_again_get_through(void **state)
{
    (void)state;
    daemon_process d;
    daemon_start(&d, POOL);
    for (int transport = TS_TRANSPORT_RING; transport <= TS_TRANSPORT_MESSAGES; transport++) {
        const ts_options options = {.size = sizeof(ts_options),
                                    .url = d.url,
                                    .exchange_bytes = 1 << 20, /* for two steps at once */
                                    .transport = (ts_transport)transport};
        ts_client *c;
        OK(ts_connect(&options, &c));
        ts_pool *p = open_pool(c, "tiny", 0);
        ts_seq seqs[2];
        caller callers[2];
        OK(ts_seq_create(p, 2, seqs));
        for (int i = 0; i < 2; i++) {
            callers[i] = (caller){.pool = p, .seq = seqs[i]};
            assert_int_equal(pthread_create(&callers[i].thread, NULL, step_on, &callers[i]), 0);
        }
        for (int i = 0; i < 2; i++) {
            pthread_join(callers[i].thread, NULL);
            assert_int_equal(callers[i].status, TS_OK);
        }
        check_daemon(c);
        ts_pool_close(p);
        ts_disconnect(c);
    }
    daemon_stop(&d);
}

static void *end_wait(void *client)
{
    static ts_status status;
    status = ts_wait_end(client);
    return &status;
}

/* NNG's time for an answer is an int, and a negative one is over at once. */
static void the_end_of_a_wait_has_the_client_s_time_however_long_that_is(void **state)
{
    (void)state;
    static const uint32_t times_ms[] = {1u << 31, UINT32_MAX - 2, INT32_MAX};
    daemon_process d;
    uint32_t length;
    daemon_start(&d, POOL);
    ts_client *brief;
    OK(ts_connect(&(ts_options){.size = sizeof(ts_options), .url = d.url, .timeout_ms = 200},
                  &brief));
    ts_pool *p = open_pool(brief, "tiny", 0);
    ts_seq seq;
    OK(ts_seq_create(p, 1, &seq));
    for (size_t i = 0; i < sizeof times_ms / sizeof *times_ms; i++) {
        const ts_options o = {.size = sizeof(ts_options), .url = d.url, .timeout_ms = times_ms[i]};
        pthread_t thread;
        void *status;
        ts_client *c;
        OK(ts_connect(&o, &c));
        daemon_pause(&d);
        assert_int_equal(pthread_create(&thread, NULL, end_wait, c), 0);
        assert_int_equal(ts_seq_lengths(p, &seq, 1, &length), TS_ETIMEOUT); /* 200 ms later */
        daemon_resume(&d);
        pthread_join(thread, &status);
        assert_int_equal(*(ts_status *)status, TS_OK);
        ts_disconnect(c);
    }
    ts_pool_close(p);
    ts_disconnect(brief);
    daemon_stop(&d);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_second_thread_is_refused_by_every_call),
        cmocka_unit_test(a_client_is_not_freed_under_a_thread_that_is_inside),
        cmocka_unit_test(a_child_forked_under_a_call_is_told_whose_the_session_is),
        cmocka_unit_test(threads_that_try_again_get_through),
        cmocka_unit_test(the_end_of_a_wait_has_the_client_s_time_however_long_that_is),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
