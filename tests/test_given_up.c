/*
 * What a worker has given up, since it was answered too late or not at all, is undone when it comes
 * back after the daemon's death; and the two sockets of a daemon may end one long after the other.
 */
#define _GNU_SOURCE
#include "restart_steps.h"

#include "clock.h"

#include <pthread.h>

#define PARTED_MS 300      /* between the ends of a daemon's sockets */
#define PATIENCE_MS 60000u /* of calls that are to come to something */
#define UNANSWERED_MS 100u /* of a call that the daemon never answers */
#define NO_DAEMON_MS                                                                               \
    1000u /* of a call whose daemon dies, for which no other comes in that time                    \
           */

/* Calls one more of the client's functions, which has so little time; its status. */
#define WITHIN(ms, client, call)                                                                   \
    ({                                                                                             \
        (client)->timeout_ms = (ms);                                                               \
        const ts_status within = (call);                                                           \
        (client)->timeout_ms = PATIENCE_MS;                                                        \
        within;                                                                                    \
    })

/* A begin is carried out, its answer doesn't come in time, and the daemon dies: the step, which
 * nobody knows of, is aborted when the client comes back; also if there is no daemon in the time of
 * the next call, and a later one reaches it. */
static void a_step_whose_begin_was_given_up_is_aborted(void **state)
{
    (void)state;
    for (int turn = 0; turn < 3; turn++) {
        const bool late = turn >= 2;
        daemon_process d;
        ts_seq seq;
        ts_step *step;
        setenv("TS_TEST_STOP", "answering:4", 1); /* of session, pool, sequence, step */
        start(&d, POOL, NULL);
        unsetenv("TS_TEST_STOP");
        ts_client *c = connect_by(&d, (ts_transport)(TS_TRANSPORT_RING + turn % 2));
        ts_pool *p = open_pool(c, "p", 0);
        DO(ts_seq_create(p, 1, &seq));
        assert_int_equal(WITHIN(UNANSWERED_MS, c, begin_step(p, seq, 3, &step)), TS_ETIMEOUT);
        const pid_t daemon = await_stopped(&d);
        if (late)
            assert_int_equal(kill(d.pid, SIGSTOP), 0); /* it starts no other */
        assert_int_equal(kill(daemon, SIGKILL), 0);
        if (late) {
            assert_int_equal(WITHIN(NO_DAEMON_MS, c, ts_seq_free(p, &seq, 1)), TS_ECONN);
            assert_int_equal(kill(d.pid, SIGCONT), 0);
        }
        DO(ts_seq_free(p, &seq, 1)); /* it is in no step */
        assert_int_equal(ts_client_restarts(c), 1);
        assert_int_equal(ts_client_transport(c), TS_TRANSPORT_RING + turn % 2);
        finish(&d, c, p);
    }
}

/* Frees the sequence, however long the next daemon takes to come. */
static void free_after(ts_client *c, ts_pool *p, ts_seq seq)
{
    ts_status status;
    do
        status = ts_seq_free(p, &seq, 1);
    while (status == TS_ECONN && strstr(ts_error(c), "the session is over") == NULL);
    DO(status);
}

/* The daemon takes another exchange, and its answer doesn't come in time: what the next step puts
 * into its own is what the daemon reads. */
static void an_exchange_whose_offer_was_given_up_is_made_anew(void **state)
{
    (void)state;
    daemon_process d;
    ts_seq seqs[2];
    ts_step *step;
    setenv("TS_TEST_STOP", "applying/4:2", 1); /* the second TS_OP_EXCHANGE_OPEN */
    start(&d, POOL, NULL);
    unsetenv("TS_TEST_STOP");
    ts_client *c = connect_by(&d, TS_TRANSPORT_RING);
    ts_pool *p = open_pool(c, "p", 0);
    DO(ts_seq_create(p, 2, seqs));
    step_of_k(c, p, seqs[0], 5, 7);
    assert_int_equal(WITHIN(UNANSWERED_MS, c, begin_step(p, seqs[0], 4000, &step)), TS_ETIMEOUT);
    assert_int_equal(kill(await_stopped(&d), SIGCONT), 0);
    step_of_k(c, p, seqs[1], 5, 9);
    assert_true(k_of(c, p, seqs[0], 0) == 7);
    assert_true(k_of(c, p, seqs[1], 0) == 9);
    finish(&d, c, p);
}

/* A call by ring is waited for as long as a message is sent again. */
static void retries_are_those_of_any_call(void **state)
{
    (void)state;
    daemon_process d;
    ts_seq seq;
    start(&d, POOL, NULL);
    ts_client *c = connect_by(&d, TS_TRANSPORT_RING);
    ts_pool *p = open_pool(c, "p", 0);
    DO(ts_seq_create(p, 1, &seq));
    const pid_t daemon = stop_serving(&d);
    c->retries = 3;
    const uint64_t began_ms = ts_now_ms();
    assert_int_equal(WITHIN(UNANSWERED_MS, c, ts_seq_truncate(p, &seq, &(uint32_t){0}, 1)),
                     TS_ETIMEOUT);
    assert_true(ts_now_ms() - began_ms >= 4ull * UNANSWERED_MS);
    assert_non_null(strstr(ts_error(c), "within 400 ms"));
    c->retries = 0;
    assert_int_equal(kill(daemon, SIGCONT), 0);
    finish(&d, c, p);
}

/* A message has no answer in time: what is asked next goes as a message, too, behind it, until one
 * is answered. */
static void what_follows_a_late_message_is_none_by_ring(void **state)
{
    (void)state;
    daemon_process d;
    ts_seq seq;
    uint32_t length;
    start(&d, POOL, NULL);
    ts_client *c = connect_by(&d, TS_TRANSPORT_RING);
    ts_pool *p = open_pool(c, "p", 0);
    DO(ts_seq_create(p, 1, &seq));
    step_of_k(c, p, seq, 5, 7);
    const uint32_t submitted = c->ring_submitted;
    const pid_t daemon = stop_serving(&d);
    assert_int_equal(WITHIN(UNANSWERED_MS, c, ts_seq_append(p, &seq, &(uint32_t){4}, 1, NULL)),
                     TS_ETIMEOUT);
    assert_int_equal(WITHIN(UNANSWERED_MS, c, ts_seq_truncate(p, &seq, &(uint32_t){3}, 1)),
                     TS_ETIMEOUT);
    assert_int_equal(c->ring_submitted, submitted);
    assert_int_equal(kill(daemon, SIGCONT), 0);
    DO(ts_seq_lengths(p, &seq, 1, &length));
    assert_int_equal(length, 3);
    DO(ts_seq_truncate(p, &seq, &(uint32_t){2}, 1));
    assert_true(c->ring_submitted > submitted);
    finish(&d, c, p);
}

enum { BY_CREATE, BY_FORK, BY_MATCH, BY_SELECT, BY_TICKET, WAYS_TO_MAKE };
typedef struct ticket {
    uint8_t bytes[TS_TICKET_BYTES];
} ticket;

/* Which answer is that of what makes sequences: behind session, pool, parent, and the ticket and
 * another parent. */
static const char *making(int how)
{
    return how == BY_TICKET ? "answering:6" : "answering:4";
}

/* A ticket takes the parent with it, so there is another. */
static void get_ready(ts_client *c, ts_pool *p, int how, ts_seq *parent, ticket *t)
{
    if (how != BY_TICKET)
        return;
    DO(ts_seq_ticket(p, *parent, 0, t->bytes));
    DO(ts_seq_create(p, 1, parent));
}

/* What makes sequences, and isn't answered in time. */
static ts_status make_in_vain(ts_pool *p, int how, ts_seq parent, const ticket *t)
{
    const ts_seq_options space = {.size = sizeof(ts_seq_options), .space = "m", .space_bytes = 1};
    ts_seq made[2];
    uint32_t matched;
    if (how == BY_CREATE)
        return ts_seq_create(p, 2, made);
    if (how == BY_FORK)
        return ts_seq_fork(p, parent, 2, made);
    if (how == BY_SELECT)
        return ts_seq_select(p, &parent, 1, (uint32_t[]){0, 0}, 2, made);
    if (how == BY_TICKET)
        return ts_seq_redeem(p, t->bytes, made, NULL);
    return ts_seq_match(p, (uint32_t[]){1, 2, 3}, &(uint32_t){3}, 1, &space, made, &matched);
}

/* The same of sequences, which nobody knows of: they are freed when the client comes back. */
static void sequences_whose_making_was_given_up_are_freed(void **state)
{
    (void)state;
    for (int turn = 0; turn < 2 * WAYS_TO_MAKE; turn++) {
        daemon_process d;
        ts_seq parent;
        ticket t;
        setenv("TS_TEST_STOP", making(turn / 2), 1);
        start(&d, POOL, NULL);
        unsetenv("TS_TEST_STOP");
        ts_client *c = connect_by(&d, (ts_transport)(TS_TRANSPORT_RING + turn % 2));
        ts_pool *p = open_pool(c, "p", 0);
        DO(ts_seq_create(p, 1, &parent));
        get_ready(c, p, turn / 2, &parent, &t);
        assert_int_equal(WITHIN(UNANSWERED_MS, c, make_in_vain(p, turn / 2, parent, &t)),
                         TS_ETIMEOUT);
        assert_int_equal(kill(await_stopped(&d), SIGKILL), 0);
        free_after(c, p, parent);
        assert_int_equal(ts_client_restarts(c), 1);
        assert_int_equal(sequences(c), 0);
        finish(&d, c, p);
    }
}

/* The daemon dies before it has answered, and there is no other in the call's time. */
static void what_was_done_before_there_was_no_daemon_is_undone(void **state)
{
    (void)state;
    for (int turn = 0; turn < 2 * (WAYS_TO_MAKE + 1); turn++) {
        daemon_process d;
        ts_seq seq;
        ts_step *step;
        ticket t;
        start(&d, POOL, making(turn / 2));
        ts_client *c = connect_by(&d, (ts_transport)(TS_TRANSPORT_RING + turn % 2));
        ts_pool *p = open_pool(c, "p", 0);
        DO(ts_seq_create(p, 1, &seq));
        get_ready(c, p, turn / 2, &seq, &t);
        assert_int_equal(kill(d.pid, SIGSTOP), 0); /* it starts no other */
        if (turn / 2 < WAYS_TO_MAKE)
            assert_int_equal(WITHIN(NO_DAEMON_MS, c, make_in_vain(p, turn / 2, seq, &t)), TS_ECONN);
        else /* whose slab the holder, which stands still, should have first */
            assert_int_equal(WITHIN(4 * NO_DAEMON_MS, c, begin_step(p, seq, 3, &step)), TS_ECONN);
        assert_int_equal(kill(d.pid, SIGCONT), 0);
        free_after(c, p, seq); /* it is in no step */
        assert_int_equal(ts_client_restarts(c), 1);
        assert_int_equal(sequences(c), 0);
        finish(&d, c, p);
    }
}

/* The same of an abort that isn't carried out: the daemon stands still, and dies. */
static void an_abort_that_was_given_up_is_carried_out(void **state)
{
    (void)state;
    for (int t = TS_TRANSPORT_RING; t <= TS_TRANSPORT_MESSAGES; t++) {
        daemon_process d;
        ts_seq seq;
        ts_step *step;
        start(&d, POOL, NULL);
        ts_client *c = connect_by(&d, (ts_transport)t);
        ts_pool *p = open_pool(c, "p", 0);
        DO(ts_seq_create(p, 1, &seq));
        DO(begin_step(p, seq, 3, &step));
        assert_int_equal(kill(daemon_of(&d), SIGSTOP), 0);
        const pid_t daemon = await_stopped(&d);
        assert_int_equal(WITHIN(UNANSWERED_MS, c, ts_step_abort(step)), TS_ETIMEOUT);
        assert_int_equal(kill(daemon, SIGKILL), 0);
        DO(ts_seq_free(p, &seq, 1)); /* it is in no step */
        assert_int_equal(ts_client_restarts(c), 1);
        finish(&d, c, p);
    }
}

/* Who waits for a late answer, to attend itself, sees that the daemon has gone, and finds the next.
 */
static void local_execution_finds_the_next_daemon_while_an_answer_is_late(void **state)
{
    (void)state;
    daemon_process d;
    ts_seq seq, fork;
    ts_step *step;
    start(&d, POOL, NULL);
    ts_client *c = connect_with(&d, TS_TRANSPORT_AUTO, TS_EXEC_LOCAL);
    ts_pool *p = open_pool(c, "p", TS_POOL_WRITABLE);
    DO(ts_seq_create(p, 1, &seq));
    assert_int_equal(kill(daemon_of(&d), SIGSTOP), 0);
    const pid_t daemon = await_stopped(&d);
    assert_int_equal(WITHIN(UNANSWERED_MS, c, ts_seq_fork(p, seq, 1, &fork)), TS_ETIMEOUT);
    assert_int_equal(begin_step(p, seq, 3, &step), TS_EBUSY);
    assert_int_equal(kill(daemon, SIGKILL), 0);
    ts_status status = TS_EBUSY;
    for (int i = 0; i < 1000 && (status == TS_EBUSY || status == TS_ECONN); i++) {
        (void)poll(NULL, 0, 10);
        status = begin_step(p, seq, 3, &step);
    }
    DO(status);
    assert_int_equal(ts_client_restarts(c), 1);
    DO(ts_step_abort(step));
    DO(ts_seq_free(p, &seq, 1));
    assert_int_equal(sequences(c), 0);
    finish(&d, c, p);
}

/* A client whose calls don't end by their time. */
static ts_client *connect_for_weeks(const daemon_process *d)
{
    ts_client *c;
    OK(ts_connect(
        &(ts_options){
            .size = sizeof(ts_options), .url = d->url, .wait_ms = 60000, .timeout_ms = INT32_MAX},
        &c));
    return c;
}

/* Who leaves waits neither for the daemon's answer nor for the next daemon. */
static void leaving_waits_for_no_daemon(void **state)
{
    (void)state;
    for (int dead = 0; dead < 2; dead++) {
        daemon_process d;
        start(&d, POOL, NULL);
        ts_client *c = connect_for_weeks(&d);
        ts_pool *p = open_pool(c, "p", 0);
        const pid_t daemon = daemon_of(&d);
        assert_int_equal(kill(d.pid, SIGSTOP), 0); /* it starts no other */
        assert_int_equal(kill(daemon, dead ? SIGKILL : SIGSTOP), 0);
        ts_pool_close(p);
        ts_disconnect(c);
        if (!dead)
            assert_int_equal(kill(daemon, SIGKILL), 0);
        assert_int_equal(kill(d.pid, SIGCONT), 0);
        c = connect_by(&d, TS_TRANSPORT_RING); /* to the next */
        check_daemon(c);
        ts_disconnect(c);
        stop(&d, false);
    }
}

/* Closing a pool doesn't wait for another daemon, and that one is told. */
static void the_next_daemon_hears_which_pools_were_closed(void **state)
{
    (void)state;
    for (int dead = 0; dead < 2; dead++) {
        daemon_process d;
        ts_seq seq;
        start(&d, POOL, NULL);
        ts_client *c = connect_for_weeks(&d);
        ts_pool *p = open_pool(c, "p", 0);
        DO(ts_pool_create(c, "q:layers=1,kv_heads=1,head_dim=32,dtype=fp32,blocks=4"));
        ts_pool *q = open_pool(c, "q", 0), *again = open_pool(c, "p", 0);
        assert_int_equal(delete_pool(c, "q"), TS_EBUSY);
        const pid_t daemon = daemon_of(&d);
        assert_int_equal(kill(d.pid, SIGSTOP), 0); /* it starts no other */
        assert_int_equal(kill(daemon, dead ? SIGKILL : SIGSTOP), 0);
        ts_pool_close(q);
        ts_pool_close(again); /* "p" stays open */
        if (!dead)
            assert_int_equal(kill(daemon, SIGKILL), 0);
        assert_int_equal(kill(d.pid, SIGCONT), 0);
        DO(ts_seq_create(p, 1, &seq));
        assert_int_equal(ts_client_restarts(c), 1);
        DO(delete_pool(c, "q"));
        finish(&d, c, p);
    }
}

/* Kills the daemon some time after it has stopped. */
static void *kill_stopped(void *arg)
{
    const pid_t pid = await_stopped(arg);
    (void)poll(NULL, 0, PARTED_MS);
    assert_int_equal(kill(pid, SIGKILL), 0);
    return NULL;
}

/* A daemon's sockets may end far apart. */
static void a_handle_connection_may_end_long_before_the_other(void **state)
{
    (void)state;
    daemon_process d;
    pthread_t killer;
    setenv("TS_TEST_STOP", "stored:1", 1); /* of the exchange, which the client waits for there */
    setenv("TS_TEST_PART", "1", 1);
    start(&d, POOL, NULL);
    unsetenv("TS_TEST_STOP");
    unsetenv("TS_TEST_PART");
    assert_int_equal(pthread_create(&killer, NULL, kill_stopped, &d), 0);
    ts_client *c = connect_by(&d, TS_TRANSPORT_RING);
    assert_int_equal(pthread_join(killer, NULL), 0);
    assert_int_equal(ts_client_restarts(c), 1);
    check_daemon(c);
    ts_disconnect(c);
    stop(&d, false);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_step_whose_begin_was_given_up_is_aborted),
        cmocka_unit_test(retries_are_those_of_any_call),
        cmocka_unit_test(what_follows_a_late_message_is_none_by_ring),
        cmocka_unit_test(an_exchange_whose_offer_was_given_up_is_made_anew),
        cmocka_unit_test(sequences_whose_making_was_given_up_are_freed),
        cmocka_unit_test(what_was_done_before_there_was_no_daemon_is_undone),
        cmocka_unit_test(an_abort_that_was_given_up_is_carried_out),
        cmocka_unit_test(local_execution_finds_the_next_daemon_while_an_answer_is_late),
        cmocka_unit_test(leaving_waits_for_no_daemon),
        cmocka_unit_test(the_next_daemon_hears_which_pools_were_closed),
        cmocka_unit_test(a_handle_connection_may_end_long_before_the_other),
    };
    cmocka_set_test_filter(getenv("TS_TEST_FILTER"));
    return cmocka_run_group_tests(tests, NULL, NULL);
}
