/*
 * A worker that orders its runs on a stream goes on over its daemon's death, or its device's: the
 * next daemon does what was under way again. The daemon is ended at places of kill_points.c, and
 * every bit must be what it is without.
 */
#define _GNU_SOURCE
#include "gpu_restart_util.h"

static uint64_t workload(ts_client *c, exchange_kind kind, uint32_t *restarts)
{
    rng r = {42};
    digest d = {1469598103934665603u};
    ts_seq seqs[2], fork;
    uint32_t lengths[3];
    ts_pool *p = open_pool(c, "p", 0);
    open_exchange(c, p, kind);
    DO(ts_seq_create(p, 2, seqs));
    stream_step(c, p, seqs, (uint32_t[]){40, 7}, 2, &r, &d);
    DO(ts_seq_fork(p, seqs[0], 1, &fork));
    stream_step(c, p, (ts_seq[]){fork, seqs[1]}, (uint32_t[]){1, 2}, 2, &r, &d);
    stream_step(c, p, (ts_seq[]){seqs[0], fork}, (uint32_t[]){9, 1}, 2, &r, &d);
    DO(ts_seq_lengths(p, (ts_seq[]){seqs[0], seqs[1], fork}, 3, lengths));
    mix(&d, lengths, sizeof lengths);
    check_daemon(c);
    *restarts = ts_client_restarts(c);
    ts_pool_close(p);
    return d.value;
}

static uint64_t run_workload(ts_client *c, int exchange, uint32_t *restarts)
{
    return workload(c, (exchange_kind)exchange, restarts);
}

static uint32_t kills_at(ts_transport transport, exchange_kind kind, const char *place,
                         uint32_t from)
{
    const killed_workload w = {
        .pool = POOL, .transport = transport, .exchange = (int)kind, .work = run_workload};
    return kill_everywhere(&w, place, from);
}

static void killed_between_an_application_and_its_publication(void **state)
{
    (void)state;
    assert_true(kills_at(TS_TRANSPORT_RING, OF_DAEMON, "applied", 4) > 20 / STRIDE);
}

static void killed_after_a_publication(void **state)
{
    (void)state;
    assert_true(kills_at(TS_TRANSPORT_RING, OF_WORKER, "published", 4) > 20 / STRIDE);
}

/* The second word of each is the daemon's own. */
static void killed_between_the_two_words_of_a_run(void **state)
{
    (void)state;
    assert_true(kills_at(TS_TRANSPORT_RING, OF_DAEMON, "signalled", 1) > 15 / STRIDE);
}

static void killed_when_a_run_is_handed_on(void **state)
{
    (void)state;
    assert_true(kills_at(TS_TRANSPORT_RING, IN_HOST, "running", 1) > 8 / STRIDE);
}

static void killed_when_a_descriptor_is_stored(void **state)
{
    (void)state;
    assert_true(kills_at(TS_TRANSPORT_RING, OF_DAEMON, "stored", 1) > 2 / STRIDE);
}

static void killed_around_an_answer(void **state)
{
    (void)state;
    assert_true(kills_at(TS_TRANSPORT_RING, OF_DAEMON, "answered", 2) > 15 / STRIDE);
    assert_true(kills_at(TS_TRANSPORT_MESSAGES, OF_DAEMON, "answering", 2) > 15 / STRIDE);
}

/* ---- a device that is lost ---- */

/* A step whose worker waits for each layer. */
static void awaited_step(ts_client *c, ts_pool *p, const ts_seq *seqs, const uint32_t *new_tokens,
                         uint32_t count, rng *random, digest *d)
{
    layer_task task = {.random = random, .digest = d};
    for (uint32_t i = 0; i < count; i++)
        task.tokens += new_tokens[i];
    task.step = begin(c, p, seqs, new_tokens, count);
    for (uint32_t layer = 0; layer < LAYERS; layer++) {
        fill_inputs(&task);
        DO(ts_step_run(task.step, layer));
        read_output(&task);
    }
    DO(ts_step_commit(task.step, NULL));
}

static uint64_t awaited_workload(ts_client *c, uint32_t *restarts)
{
    rng r = {43};
    digest d = {1469598103934665603u};
    ts_seq seq, fork;
    ts_pool *p = open_pool(c, "p", 0);
    DO(ts_seq_create(p, 1, &seq));
    awaited_step(c, p, &seq, (uint32_t[]){40}, 1, &r, &d);
    DO(ts_seq_fork(p, seq, 1, &fork));
    awaited_step(c, p, (ts_seq[]){fork, seq}, (uint32_t[]){1, 2}, 2, &r, &d); /* copies a tail */
    check_daemon(c);
    *restarts = ts_client_restarts(c);
    ts_pool_close(p);
    return d.value;
}

/* Under CUDA's multi-process service any client's fault takes the daemon's device: nobody is told.
 */
static void what_a_lost_device_left_undone_is_the_next_daemons(void **state)
{
    (void)state;
    for (int on_stream = 0; on_stream < 2; on_stream++) {
        uint64_t expected = 0;
        uint32_t restarts = 1, losses = 0;
        for (uint32_t at = 0; restarts > 0; at++) {
            daemon_process d;
            char text[24];
            snprintf(text, sizeof text, "launch:%u", at);
            if (at > 0)
                setenv("TS_TEST_GPU_BREAKS", text, 1);
            start(&d, POOL, NULL);
            unsetenv("TS_TEST_GPU_BREAKS");
            ts_client *c = connect_by(&d, (ts_transport)(TS_TRANSPORT_RING + at % 2));
            const uint64_t found =
                on_stream ? workload(c, OF_DAEMON, &restarts) : awaited_workload(c, &restarts);
            if (at == 0)
                expected = found;
            assert_int_equal(found, expected);
            losses += restarts;
            restarts = at == 0 ? 1 : restarts;
            ts_disconnect(c);
            stop(&d, false);
        }
        assert_true(losses > (on_stream ? 8 : 5));
    }
}

/* The workload with an exchange of this kind, on a device that is lost when it is asked for memory
 * the `at`th time; 0: never. */
static uint64_t lose_memory(exchange_kind kind, ts_transport transport, uint32_t at,
                            uint32_t *restarts)
{
    daemon_process d;
    char text[24];
    snprintf(text, sizeof text, "memory:%u", at);
    if (at > 0)
        setenv("TS_TEST_GPU_BREAKS", text, 1);
    start(&d, POOL, NULL);
    unsetenv("TS_TEST_GPU_BREAKS");
    ts_client *c = connect_by(&d, transport);
    const uint64_t found = workload(c, kind, restarts);
    ts_disconnect(c);
    stop(&d, at > 0 && *restarts == 0);
    return found;
}

/* A slab and an exchange, the daemon's or the worker's: the call waits for the next daemon. */
static void what_a_lost_device_cannot_give_is_the_next_daemons(void **state)
{
    (void)state;
    for (exchange_kind kind = OF_DAEMON; kind <= OF_WORKER; kind++) {
        uint32_t restarts, at = 0;
        const uint64_t expected = lose_memory(kind, TS_TRANSPORT_RING, at, &restarts);
        do {
            at++;
            const ts_transport transport = (ts_transport)(TS_TRANSPORT_RING + at % 2);
            assert_int_equal(lose_memory(kind, transport, at, &restarts), expected);
        } while (restarts > 0);
        assert_int_equal(at, 3); /* the exchange was the first, and a slab */
    }
}

/* The daemon after a kill loses its device when it maps the slab that is stored: the one after that
 * maps it, and nothing in it is lost. */
static void a_device_that_is_lost_while_slabs_are_taken_over_loses_nothing(void **state)
{
    (void)state;
    uint32_t restarts;
    const killed_workload w = {
        .pool = POOL, .transport = TS_TRANSPORT_RING, .exchange = IN_HOST, .work = run_workload};
    const uint64_t expected = run_killed(&w, NULL, &restarts);
    setenv("TS_TEST_GPU_BREAKS", "adopt:1:1", 1);
    const uint64_t found = run_killed(&w, "answering:9", &restarts);
    unsetenv("TS_TEST_GPU_BREAKS");
    assert_int_equal(found, expected);
    assert_int_equal(restarts, 1);
}

/* ---- a worker that writes K and V itself ---- */

/* What it maps stays where it is, and what it wrote is read by the next daemon's attention. */
static uint64_t write_and_attend(ts_client *c, int exchange, uint32_t *restarts)
{
    ts_seq seq, fork;
    rng r = {9};
    digest sum = {1};
    ts_pool *p = open_pool(c, "p", TS_POOL_WRITABLE);
    open_exchange(c, p, (exchange_kind)exchange);
    DO(ts_seq_create(p, 1, &seq));
    for (uint32_t round = 0; round < 3; round++) {
        ts_step *step;
        uint64_t slots[10];
        DO(ts_step_begin(p, &seq, (uint32_t[]){10}, 1,
                         &(ts_step_options){.size = sizeof(ts_step_options)}, &step));
        ts_step_slots(step, 0, slots);
        for (uint32_t i = 0; i < 10 * LAYERS; i++) {
            ts_kv kv;
            DO(ts_slot_kv(p, slots[i / LAYERS], i % LAYERS, &kv));
            fill(&r, kv.k, DIM);
            fill(&r, kv.v, DIM);
        }
        DO(ts_step_commit(step, NULL));
    }
    DO(ts_seq_fork(p, seq, 1, &fork));
    stream_step(c, p, (ts_seq[]){seq, fork}, (uint32_t[]){1, 1}, 2, &r, &sum);
    *restarts = ts_client_restarts(c);
    check_daemon(c);
    ts_pool_close(p);
    return sum.value;
}

static void what_a_worker_wrote_is_there(void **state)
{
    (void)state;
    const killed_workload w = {.pool = POOL,
                               .transport = TS_TRANSPORT_RING,
                               .exchange = OF_DAEMON,
                               .work = write_and_attend};
    assert_true(kill_everywhere(&w, "published", 5) > 4 / STRIDE);
}

int main(void)
{
    ignore_threads_left();
    setenv("TS_TEST_FAKE_GPU", "1", 1);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(what_a_lost_device_cannot_give_is_the_next_daemons),
        cmocka_unit_test(what_a_lost_device_left_undone_is_the_next_daemons),
        cmocka_unit_test(a_device_that_is_lost_while_slabs_are_taken_over_loses_nothing),
        cmocka_unit_test(killed_between_an_application_and_its_publication),
        cmocka_unit_test(killed_after_a_publication),
        cmocka_unit_test(killed_between_the_two_words_of_a_run),
        cmocka_unit_test(killed_when_a_run_is_handed_on),
        cmocka_unit_test(killed_when_a_descriptor_is_stored),
        cmocka_unit_test(killed_around_an_answer),
        cmocka_unit_test(what_a_worker_wrote_is_there),
    };
    return cmocka_run_group_tests_name("gpu_restart", tests, NULL, NULL);
}
