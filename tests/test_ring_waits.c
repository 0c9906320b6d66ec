/* Entries of a ring that wait for room, against a real daemon. */
#define _GNU_SOURCE
#include "ring_util.h"

#define SMALL_POOL "tiny:layers=1,kv_heads=1,head_dim=32,dtype=fp32,block_tokens=1,blocks=16"

/* A begin that waits for room; the sequences of an earlier one that waits may be others by then. */
static void submit_begin(ts_client *c, ts_seq seq, uint32_t tag)
{
    c->rings->batch_seqs[0] = seq;
    c->rings->batch_words[0] = 4;
    submit(c, &(ts_ring_entry){.op = TS_RING_BEGIN,
                               .tag = tag,
                               .begin = {.count = 1, .heads = 1, .wait_ms = 3600000}});
}

static uint64_t waiting(ts_pool *p)
{
    ts_pool_room room = TS_POOL_ROOM_INIT;
    OK(ts_pool_stats(p, &room));
    return room.waiting;
}

/* A client that takes all blocks, in an open step. */
static ts_client *hold_all(const daemon_process *d, ts_pool **p, ts_step **s)
{
    ts_client *c = connect_by(d, TS_TRANSPORT_RING, 0, 0);
    ts_seq seq;
    *p = open_pool(c, "tiny", 0);
    OK(ts_seq_create(*p, 1, &seq));
    OK(ts_step_begin(*p, &seq, &(uint32_t){16}, 1, NULL, s));
    return c;
}

static void what_follows_an_entry_that_waited_is_taken(void **state)
{
    (void)state;
    enum { FOLLOWING = 40 };
    daemon_process d;
    ts_pool *p, *theirs;
    ts_step *s;
    ts_seq seq;
    daemon_start(&d, SMALL_POOL);
    ts_client *holder = hold_all(&d, &theirs, &s), *c = with_rings(&d);
    p = open_pool(c, "tiny", 0);
    OK(ts_seq_create(p, 1, &seq));
    const uint32_t before = c->ring_seen;
    ts_rings_memory *m = c->rings;
    submit_begin(c, seq, 1000);
    for (uint32_t i = 0; i < FOLLOWING; i++)
        submit(c, &(ts_ring_entry){.op = TS_RING_ABORT, .tag = 1001 + i, .step = 7});
    while (waiting(theirs) == 0)
        ;
    await(&m->submissions.sleeps, 1); /* nobody looks at the ring any more */
    assert_int_equal(m->completions.tail, before);
    OK(ts_step_abort(s));
    await(&m->completions.tail, before + 1 + FOLLOWING);
    assert_int_equal(m->completed[before % TS_RING_ENTRIES].status, TS_OK);
    check_daemon(holder);
    ts_pool_close(p);
    ts_disconnect(c);
    ts_pool_close(theirs);
    ts_disconnect(holder);
    daemon_stop(&d);
}

static void rings_that_are_replaced_leave_nothing_that_waits(void **state)
{
    (void)state;
    daemon_process d;
    ts_pool *p, *theirs;
    ts_step *s;
    ts_seq seqs[2];
    bool use;
    daemon_start(&d, SMALL_POOL);
    ts_client *holder = hold_all(&d, &theirs, &s), *c = with_rings(&d);
    p = open_pool(c, "tiny", 0);
    OK(ts_seq_create(p, 2, seqs));
    for (uint32_t i = 0; i < 3; i++)
        submit_begin(c, seqs[0], 1000 + i);
    while (waiting(theirs) == 0)
        ;
    ts_rings_want_ids(c, 1 << 16);
    OK(ts_rings_use(c, &use));
    assert_true(use);
    assert_int_equal(waiting(theirs), 0);
    OK(ts_step_abort(s)); /* who waits would be woken */
    assert_int_equal(waiting(theirs), 0);
    OK(ts_seq_free(p, seqs, 2));
    check_daemon(holder);
    ts_pool_close(p);
    ts_disconnect(c);
    ts_pool_close(theirs);
    ts_disconnect(holder);
    daemon_stop(&d);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(what_follows_an_entry_that_waited_is_taken),
        cmocka_unit_test(rings_that_are_replaced_leave_nothing_that_waits),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
