/* How much a session's ring may give in one turn: what bounds a session's wait for the others. */
#define _GNU_SOURCE
#include "test_util.h"

#include "log.h"
#include "request.h"
#include "ring_server.h"

#include <fcntl.h>
#include <stdio.h>
#include <unistd.h>

static ts_service service;

/* Rings of memory that a client has filled. */
static ts_status new_ring(ts_connection *c, char *why, size_t why_bytes)
{
    ts_filling *f = &c->memory.new_rings;
    const uint32_t head[] = {TS_RING_MAGIC, TS_PROTOCOL, 16, 1};
    ts_filling_end(f);
    assert_int_equal(ts_filling_new(f, ts_rings_bytes(16, 1, 0), why, why_bytes), TS_OK);
    assert_int_equal(fallocate(f->fd, 0, 0, (off_t)f->bytes), 0);
    assert_int_equal(pwrite(f->fd, head, sizeof head, 0), sizeof head);
    return ts_ring_new(service.rings, c, why, why_bytes);
}

/* The rings' thread hears of these rings' ends alone: turns are made by hand. */
static ts_connection *connection(uint32_t pipe)
{
    ts_pipe_event *event = calloc(1, sizeof *event);
    char why[256];
    ts_answer answer;
    event->pipe = pipe;
    event->uid = 1000;
    event->work.run = ts_service_pipe_added;
    ts_service_pipe_added(&event->work, &service);
    ts_connection *c = ts_service_connection(&service, pipe);
    ts_engine_apply(
        service.exec.engine,
        &(ts_command){.op = TS_OP_SESSION_OPEN, .session_open = {.uid = 1000, .program = "test"}},
        &answer);
    assert_int_equal(answer.status, TS_OK);
    c->session = answer.session;
    service.by_session[(uint32_t)answer.session] = c;
    assert_int_equal(new_ring(c, why, sizeof why), TS_OK);
    return c;
}

static void submit(ts_connection *c, uint32_t op, uint32_t count)
{
    ts_rings_memory *m = c->ring->shared;
    for (uint32_t i = 0; i < count; i++)
        m->submitted[m->submissions.tail++ % TS_RING_ENTRIES] =
            (ts_ring_entry){.op = op, .tag = m->submissions.tail, .step = 7};
}

static uint32_t turn(ts_connection *c)
{
    uint32_t before = c->ring->shared->submissions.head;
    c->ring->work.run(&c->ring->work, &service);
    return c->ring->shared->submissions.head - before;
}

static void a_turn_takes_eight_entries_or_up_to_a_run(void **state)
{
    (void)state;
    ts_connection *c = connection(1);
    submit(c, TS_RING_ABORT, 20);
    assert_int_equal(turn(c), 8);
    assert_int_equal(turn(c), 8);
    submit(c, TS_RING_RUN, 2);
    submit(c, TS_RING_ABORT, 3);
    assert_int_equal(turn(c), 5); /* the run is the last of them */
    assert_int_equal(turn(c), 1);
    assert_int_equal(turn(c), 3);
    assert_int_equal(turn(c), 0);
    assert_int_equal(c->ring->shared->completions.tail, 25);
}

static void a_turn_stops_where_answers_would_not_fit(void **state)
{
    (void)state;
    ts_connection *c = connection(2);
    submit(c, TS_RING_ABORT, TS_RING_ENTRIES);
    for (uint32_t i = 0; i < TS_RING_ENTRIES / 8; i++)
        assert_int_equal(turn(c), 8);
    submit(c, TS_RING_ABORT, 5);
    assert_int_equal(turn(c), 0);
    c->ring->shared->completions.head = 3;
    assert_int_equal(turn(c), 3);
    assert_int_equal(c->ring->shared->completed[2].tag, TS_RING_ENTRIES + 3);
}

static uint32_t carried_out; /* entries of the ring, when the message was answered */

static void note_answer(ts_request *request, const void *bytes, size_t size)
{
    (void)bytes;
    assert_true(size > 0);
    carried_out = ts_service_connection(&service, request->pipe)->ring->shared->completions.tail;
}

/* A worker that was answered too late by ring goes on by message, behind what it has submitted. */
static void a_message_comes_behind_what_was_submitted_before(void **state)
{
    (void)state;
    ts_connection *c = connection(5);
    Tspb__SeqLengths lengths = TSPB__SEQ_LENGTHS__INIT;
    Tspb__Request message = TSPB__REQUEST__INIT;
    message.request_id = 1;
    message.body_case = TSPB__REQUEST__BODY_SEQ_LENGTHS;
    message.seq_lengths = &lengths;
    ts_request request = {.work = {.run = ts_service_request},
                          .pipe = c->pipe,
                          .message = &message,
                          .send = note_answer};
    submit(c, TS_RING_ABORT, 20);
    request.work.run(&request.work, &service);
    assert_int_equal(carried_out, 20);
}

static ts_ring *replaced[2];

static void rings_that_were_replaced_in_the_middle_of_a_run_are_few(void **state)
{
    (void)state;
    char why[256];
    ts_connection *c = connection(3), *other = connection(4);
    for (uint32_t i = 0; i < 2; i++) {
        replaced[i] = ts_ring_use(c->ring); /* as a run does */
        assert_int_equal(new_ring(c, why, sizeof why), TS_OK);
    }
    ts_ring *last = c->ring;
    assert_int_equal(new_ring(c, why, sizeof why), TS_EBUSY);
    assert_string_equal(why, "this connection has 3 rings, as many as it may have: those that were "
                             "replaced end when their runs do");
    assert_ptr_equal(c->ring, last);
    assert_false(atomic_load(&last->closed));
    assert_int_equal(new_ring(other, why, sizeof why), TS_OK);
}

static void nothing(ts_work *work, void *owner)
{
    (void)work;
    (void)owner;
}

/* From here on this thread owns the engine: what the rings' thread brings waits. */
static void own_engine(void)
{
    static ts_work work = {.run = nothing};
    ts_queue_put(&service.exec.queue, &work);
    if (ts_queue_take(&service.exec.queue) != &work)
        abort();
}

/* Does what was brought meanwhile. */
static void give_engine_back(void)
{
    ts_queue_close(&service.exec.queue);
    for (ts_work *work; (work = ts_queue_take(&service.exec.queue)) != NULL;)
        for (ts_work *next; work != NULL; work = next) {
            next = work->next;
            work->run(work, &service);
        }
}

int main(void)
{
    ts_engine_limits limits;
    ts_log_init(TS_LOG_ERROR);
    ts_engine_default_limits(&limits);
    if (!ts_service_init(&service, &limits) || ts_rings_new(&service, 0, 0) == NULL)
        return 1;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_turn_takes_eight_entries_or_up_to_a_run),
        cmocka_unit_test(a_turn_stops_where_answers_would_not_fit),
        cmocka_unit_test(a_message_comes_behind_what_was_submitted_before),
        cmocka_unit_test(rings_that_were_replaced_in_the_middle_of_a_run_are_few),
    };
    own_engine();
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    ts_rings_stop(service.rings);
    give_engine_back();
    for (uint32_t i = 0; i < 2; i++)
        ts_ring_release(replaced[i]);
    ts_service_close_connections(&service);
    ts_rings_free(service.rings);
    ts_service_fini(&service);
    ts_queue_fini(&service.exec.queue);
    return failed;
}
