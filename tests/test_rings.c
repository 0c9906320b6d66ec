/* Rings in shared memory, against a real daemon: what a client writes there harms nobody else. */
#define _GNU_SOURCE
#include "ring_util.h"

#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>

static void a_begin_that_is_too_large_for_a_ring_goes_as_a_message(void **state)
{
    (void)state;
    enum { COUNT = TS_RING_BATCH + 1 };
    static ts_seq seqs[COUNT];
    static uint32_t one[COUNT];
    daemon_process d;
    daemon_start(&d, "tiny:layers=1,kv_heads=1,head_dim=32,dtype=fp32,block_tokens=1,blocks=8192");
    ts_client *c = connect_by(&d, TS_TRANSPORT_RING, 0, 0);
    ts_pool *p = open_pool(c, "tiny", 0);
    ts_step *s;
    OK(ts_seq_create(p, COUNT, seqs));
    for (uint32_t i = 0; i < COUNT; i++)
        one[i] = 1;
    OK(ts_step_begin(p, seqs, one, COUNT, NULL, &s));
    for (size_t i = 0; i < (size_t)COUNT * 32; i++) {
        ((float *)ts_step_q(s))[i] = ((float *)ts_step_k(s))[i] = 0;
        ((float *)ts_step_v(s))[i] = (float)(i % 1000);
    }
    OK(ts_step_run(s, 0)); /* by ring, of a step that a message began */
    for (size_t i = 0; i < (size_t)COUNT * 32; i++)
        assert_true(((const float *)ts_step_out(s))[i] == (float)(i % 1000));
    one[COUNT - 1] = 0;
    OK(ts_step_commit(s, one)); /* by message: a ring has no room for COUNT counts */
    assert_int_equal(used_blocks(c), COUNT - 1);
    ts_pool_close(p);
    ts_disconnect(c);
    daemon_stop(&d);
}

/* What a ring refuses, with the sentence. */
static void refuse(ts_client *c, const ts_ring_entry *entry, ts_status status, const char *sentence)
{
    ts_ring_entry copy = *entry;
    ts_ring_completion done;
    assert_int_equal(ts_ring_call(c, &copy, &done), status);
    if (strstr(ts_error(c), sentence) == NULL)
        fail_msg("'%s' isn't in '%s'", sentence, ts_error(c));
}

static void a_ring_refuses_what_a_message_would(void **state)
{
    (void)state;
    daemon_process d;
    daemon_start(&d, POOL ",device=host");
    ts_client *c = connect_by(&d, TS_TRANSPORT_RING, 0, 0), *other = connect_by(&d, 0, 0, 0);
    ts_pool *p = open_pool(c, "tiny", 0), *theirs = open_pool(other, "tiny", 0);
    ts_seq seq, foreign;
    ts_step *s, *t;
    OK(ts_seq_create(p, 1, &seq));
    OK(ts_seq_create(theirs, 1, &foreign));
    OK(ts_step_begin(theirs, &foreign, &(uint32_t){1}, 1, NULL, &t));
    OK(ts_step_begin(p, &seq, &(uint32_t){2}, 1,
                     &(ts_step_options){.size = sizeof(ts_step_options), .heads = HEADS}, &s));
    uint64_t id = c->rings->completed[(c->ring_seen - 1) % TS_RING_ENTRIES].step;
    uint64_t their_id = other->rings->completed[(other->ring_seen - 1) % TS_RING_ENTRIES].step;
    const ts_ring_entry run = {
        .op = TS_RING_RUN, .step = id, .run = {.k = 2048, .v = 4096, .out = 6144}};
    ts_ring_entry e = run;
    e.run.layer = 2;
    refuse(c, &e, TS_EINVAL, "layer 2; the pool has 2");
    e = run;
    e.step = their_id;
    refuse(c, &e, TS_ENOENT, "no open step");
    e = run;
    e.step = id + (1ull << 32);
    refuse(c, &e, TS_ENOENT, "no open step");
    e = run;
    e.run.q = 63;
    refuse(c, &e, TS_EINVAL, "q takes 2048 bytes at offset 63");
    e = run;
    e.run.out = UINT64_MAX - 63;
    refuse(c, &e, TS_EINVAL, "out takes 2048 bytes at offset 18446744073709551552");
    e = run;
    e.run.flags = TS_RUN_LSE;
    e.run.lse = 1ull << 40;
    refuse(c, &e, TS_EINVAL, "lse takes");
    e = run;
    e.run.flags = TS_RUN_ON_STREAM;
    refuse(c, &e, TS_EINVAL, "host memory");
    e = run;
    e.run.scale = -1;
    refuse(c, &e, TS_EINVAL, "a scale of -1");
    e = run;
    e.op = 77;
    refuse(c, &e, TS_EPROTO, "operation 77");
    e = (ts_ring_entry){.op = TS_RING_COMMIT, .step = id, .commit = {.count = TS_RING_BATCH + 1}};
    refuse(c, &e, TS_EINVAL, "4097 accepted counts");
    c->rings->batch_words[0] = 3;
    e.commit.count = 1;
    refuse(c, &e, TS_EINVAL, "3 tokens accepted of the 2");
    e.commit.count = 0;
    e.step = their_id;
    refuse(c, &e, TS_ENOENT, "no open step");
    e.op = TS_RING_ABORT;
    refuse(c, &e, TS_ENOENT, "no open step");
    e = (ts_ring_entry){.op = TS_RING_BEGIN, .begin = {.count = TS_RING_BATCH + 1, .heads = 4}};
    refuse(c, &e, TS_EINVAL, "4097 sequences");
    e.begin.count = 1;
    c->rings->batch_words[0] = UINT32_MAX;
    refuse(c, &e, TS_EINVAL, "touches up to");
    c->rings->batch_words[0] = 1;
    c->rings->batch_seqs[0] = 12345;
    refuse(c, &e, TS_ENOENT, "no sequence 3039");
    c->rings->batch_seqs[0] = seq;
    refuse(c, &e, TS_EBUSY, "open step");
    e.begin.pool = 1;
    refuse(c, &e, TS_ENOENT, "has not opened");
    e.begin.pool = 0;
    memset(e.begin.kernel, 'x', sizeof e.begin.kernel); /* not even an end */
    refuse(c, &e, TS_EINVAL, "no kernel 'xxxxxxxxxxxxxxxxxxxx'");
    assert_int_equal(used_blocks(c), 2);
    OK(ts_step_abort(s));
    OK(ts_step_abort(t));
    check_daemon(c);
    ts_pool_close(p);
    ts_disconnect(c);
    ts_pool_close(theirs);
    ts_disconnect(other);
    daemon_stop(&d);
}

static void a_client_that_takes_no_answers_is_not_heard_until_it_does(void **state)
{
    (void)state;
    daemon_process d;
    daemon_start(&d, POOL);
    ts_client *c = with_rings(&d), *other = with_rings(&d);
    ts_rings_memory *m = c->rings;
    for (uint32_t i = 0; i < TS_RING_ENTRIES; i++)
        submit(c, &(ts_ring_entry){.op = TS_RING_ABORT, .tag = 100 + i, .step = 7});
    await(&m->completions.tail, TS_RING_ENTRIES);
    submit(c, &(ts_ring_entry){.op = TS_RING_ABORT, .tag = 999, .step = 7});
    for (uint32_t i = 0; i < 100; i++) /* meanwhile the daemon goes round and round */
        refuse(other, &(ts_ring_entry){.op = TS_RING_ABORT, .step = 7}, TS_ENOENT, "no open step");
    assert_int_equal(m->completions.tail, TS_RING_ENTRIES);
    assert_int_equal(m->submissions.head, TS_RING_ENTRIES);
    for (uint32_t i = 0; i < TS_RING_ENTRIES; i++) {
        assert_int_equal(m->completed[i].tag, 100 + i);
        assert_int_equal(m->completed[i].status, TS_ENOENT);
    }
    __atomic_store_n(&m->completions.head, 1, __ATOMIC_SEQ_CST);
    assert_int_equal(write(c->doorbell, &(uint64_t){1}, 8), 8);
    await(&m->completions.tail, TS_RING_ENTRIES + 1);
    assert_int_equal(m->completed[0].tag, 999);
    ts_disconnect(c);
    ts_disconnect(other);
    daemon_stop(&d);
}

static void counts_that_cannot_be_end_the_rings_and_not_the_session(void **state)
{
    (void)state;
    daemon_process d;
    daemon_start(&d, POOL);
    for (int which = 0; which < 2; which++) {
        ts_client *c = with_rings(&d), *other = with_rings(&d);
        ts_pool *p = open_pool(c, "tiny", 0);
        ts_seq seq;
        if (which == 0)
            c->rings->submissions.tail = TS_RING_ENTRIES + 1;
        else
            c->rings->completions.head = 5;
        c->ring_submitted = c->rings->submissions.tail;
        submit(c, &(ts_ring_entry){.op = TS_RING_ABORT, .step = 7});
        for (uint32_t i = 0; i < 100; i++)
            refuse(other, &(ts_ring_entry){.op = TS_RING_ABORT, .step = 7}, TS_ENOENT, "no open");
        assert_int_equal(c->rings->completions.tail, 0);
        assert_int_equal(ts_seq_attach(p, "none", &seq, NULL), TS_ENOENT); /* a message */
        check_daemon(c);
        ts_pool_close(p);
        ts_disconnect(c);
        ts_disconnect(other);
    }
    daemon_stop(&d);
}

/* The doorbell's flags and count are the client's to change: the daemon must wait for neither. It
 * never reads it, so what is written here is there to be read. */
static void a_doorbell_that_is_jammed_holds_up_nobody_else(void **state)
{
    (void)state;
    daemon_process d;
    daemon_start(&d, POOL);
    for (int full = 0; full < 2; full++) {
        ts_client *c = with_rings(&d), *other = with_rings(&d);
        uint64_t count = 1;
        int flags = fcntl(c->doorbell, F_GETFL);
        assert_int_equal(fcntl(c->doorbell, F_SETFL, flags & ~O_NONBLOCK), 0);
        for (int i = 0; i < 20000; i++) {
            assert_int_equal(write(c->doorbell, &count, 8), 8);
            assert_int_equal(read(c->doorbell, &count, 8), 8);
            assert_int_equal(count, 1);
        }
        count = UINT64_MAX - 1;
        if (full)
            assert_int_equal(write(c->doorbell, &count, 8), 8);
        __atomic_store_n(&c->rings->submissions.tail, 1000, __ATOMIC_SEQ_CST);
        refuse(other, &(ts_ring_entry){.op = TS_RING_ABORT, .step = 7}, TS_ENOENT, "no open step");
        check_daemon(c);
        ts_disconnect(c); /* the daemon gives the ring up */
        check_daemon(other);
        refuse(other, &(ts_ring_entry){.op = TS_RING_ABORT, .step = 7}, TS_ENOENT, "no open step");
        ts_disconnect(other);
    }
    daemon_stop(&d);
}

static void rings_grow_for_a_larger_pool_while_a_step_is_open(void **state)
{
    (void)state;
    daemon_process d;
    daemon_start_with(&d, POOL_TINY ",blocks=16",
                      (const char *const[]){"--pool",
                                            "large:layers=6,kv_heads=2,head_dim=64,dtype=fp32"
                                            ",blocks=20000,device=host",
                                            NULL});
    ts_client *c;
    OK(ts_connect(
        &(ts_options){.size = sizeof(ts_options), .url = d.url, .exchange_bytes = 1 << 20}, &c));
    ts_pool *tiny = open_pool(c, "tiny", 0), *large;
    uint32_t one = 1;
    ts_seq seq, other;
    ts_step *first, *second;
    OK(ts_seq_create(tiny, 1, &seq));
    OK(ts_step_begin(tiny, &seq, &one, 1, NULL, &first));
    assert_int_equal(c->ring_blocks, 4 * TS_RING_BATCH);
    large = open_pool(c, "large", 0);
    OK(ts_seq_create(large, 1, &other));
    OK(ts_step_begin(large, &other, &one, 1, NULL, &second));
    assert_int_equal(c->ring_blocks, 16 * 20000);
    for (uint32_t layer = 0; layer < 6; layer++) {
        OK(ts_step_run(second, layer));
        OK(ts_step_run(first, layer));
    }
    OK(ts_step_commit(first, NULL));
    OK(ts_step_commit(second, NULL));
    assert_int_equal(ts_client_transport(c), TS_TRANSPORT_RING);
    check_daemon(c);
    ts_pool_close(tiny);
    ts_pool_close(large);
    ts_disconnect(c);
    daemon_stop(&d);
}

/* Steps of one session may go either way. */
static void a_client_knows_how_its_last_step_went(void **state)
{
    (void)state;
    enum { MANY = TS_RING_BATCH + 1 };
    static ts_seq seqs[MANY];
    static uint32_t ones[MANY];
    daemon_process d;
    ts_step *step;
    daemon_start(&d, "p:layers=1,kv_heads=1,head_dim=32,block_tokens=1,blocks=8192");
    ts_client *c = connect_to(&d);
    assert_int_equal(ts_client_transport(c), TS_TRANSPORT_MESSAGES);
    ts_pool *p = open_pool(c, "p", 0);
    OK(ts_seq_create(p, MANY, seqs));
    for (uint32_t i = 0; i < MANY; i++)
        ones[i] = 1;
    for (uint32_t i = 0; i < 3; i++) {
        const bool all = i == 1;
        OK(ts_step_begin(p, seqs, ones, all ? MANY : MANY - 1, NULL, &step));
        assert_int_equal(ts_client_transport(c), all ? TS_TRANSPORT_MESSAGES : TS_TRANSPORT_RING);
        OK(ts_step_abort(step)); /* by a ring */
        assert_int_equal(ts_client_transport(c), all ? TS_TRANSPORT_MESSAGES : TS_TRANSPORT_RING);
    }
    ts_pool_close(p);
    ts_disconnect(c);
    daemon_stop(&d);
}

/* Worker: it can't receive the larger rings' memory, so it goes on with those that it has. */
static void cannot_grow(const char *url, const char *argument)
{
    (void)argument;
    struct rlimit before, none;
    ts_client *c;
    OK(ts_connect(&(ts_options){.size = sizeof(ts_options), .url = url, .exchange_bytes = 1 << 20},
                  &c));
    ts_pool *tiny = open_pool(c, "tiny", 0);
    uint32_t one = 1;
    ts_seq seq;
    ts_step *step;
    OK(ts_seq_create(tiny, 1, &seq));
    OK(ts_step_begin(tiny, &seq, &one, 1, NULL, &step));
    ts_pool *large = open_pool(c, "large", 0);
    assert_int_equal(getrlimit(RLIMIT_NOFILE, &before), 0);
    none = before;
    none.rlim_cur = 1; /* poll() takes one descriptor still */
    assert_int_equal(setrlimit(RLIMIT_NOFILE, &none), 0);
    OK(ts_step_abort(step));
    OK(ts_step_begin(tiny, &seq, &one, 1, NULL, &step)); /* the abort was told to the daemon */
    for (uint32_t layer = 0; layer < 6; layer++)
        OK(ts_step_run(step, layer));
    OK(ts_step_commit(step, NULL));
    assert_int_equal(setrlimit(RLIMIT_NOFILE, &before), 0);
    assert_int_equal(ts_client_transport(c), TS_TRANSPORT_RING);
    assert_int_equal(c->ring_blocks, 4 * TS_RING_BATCH);
    ts_pool_close(large);
    ts_pool_close(tiny);
    ts_disconnect(c);
}

static void rings_that_cannot_grow_stay(void **state)
{
    (void)state;
    daemon_process d;
    daemon_start_with(&d, POOL_TINY ",blocks=16",
                      (const char *const[]){"--pool",
                                            "large:layers=6,kv_heads=2,head_dim=64,dtype=fp32"
                                            ",blocks=20000,device=host",
                                            NULL});
    join_child(spawn("cannot_grow", d.url, ""));
    daemon_stop(&d);
}

/* ---- a doorbell that doesn't come ---- */

static ts_client *grower; /* whose rings' memory is being filled, and whose doorbell won't come */
static enum no_doorbell { TOO_LATE, NO_DESCRIPTOR } why_none;
static bool asks; /* for the doorbell */
static struct rlimit files;

/* The library's: memory that the rings lie in is taken. */
int fallocate(int fd, int mode, off_t at, off_t bytes)
{
    if (grower != NULL && !asks) {
        asks = true;
        if (why_none == TOO_LATE)
            grower->timeout_ms = 20;
        else
            assert_int_equal(setrlimit(RLIMIT_NOFILE, &(struct rlimit){1, files.rlim_max}), 0);
    }
    return (int)syscall(SYS_fallocate, fd, mode, at, bytes);
}

/* The library's: the doorbell's answer is there, and isn't seen before the call's time is over. */
int poll(struct pollfd *fds, nfds_t n, int timeout)
{
    const struct timespec time = {timeout / 1000, timeout % 1000 * 1000000};
    struct pollfd *volatile asked = fds; /* which the compiler takes for an answer alone */
    const bool hides = asks && why_none == TOO_LATE && asked->fd == grower->handle_fd;
    const int ready = ppoll(fds, n, timeout < 0 || hides ? NULL : &time, NULL);
    if (!hides)
        return ready;
    grower->timeout_ms = 120000; /* of what comes next */
    return 0;
}

/* The daemon has the larger rings, and the client doesn't get their doorbell. */
static void rings_without_a_doorbell_are_not_waited_for(void **state)
{
    (void)state;
    static const ts_transport ways[] = {TS_TRANSPORT_AUTO, TS_TRANSPORT_RING};
    daemon_process d;
    daemon_start_with(&d, POOL_TINY ",blocks=16",
                      (const char *const[]){"--pool",
                                            "large:layers=6,kv_heads=2,head_dim=64,dtype=fp32"
                                            ",blocks=20000,device=host",
                                            NULL});
    assert_int_equal(getrlimit(RLIMIT_NOFILE, &files), 0);
    for (int i = 0; i < 4; i++) {
        const bool by_ring = i % 2 == 1;
        ts_client *c = connect_by(&d, ways[i % 2], 0, 0);
        ts_pool *tiny = open_pool(c, "tiny", 0);
        ts_seq seq, other;
        why_none = i < 2 ? TOO_LATE : NO_DESCRIPTOR;
        OK(ts_seq_create(tiny, 1, &seq));
        assert_non_null(c->rings);
        ts_pool *large = open_pool(c, "large", 0);
        grower = c;
        const ts_status status = ts_seq_create(large, 1, &other); /* or by message */
        const ts_status expected = why_none == TOO_LATE ? TS_ETIMEOUT : TS_ENOMEM;
        grower = NULL;
        asks = false;
        assert_int_equal(setrlimit(RLIMIT_NOFILE, &files), 0);
        assert_int_equal(status, by_ring ? expected : TS_OK);
        assert_null(c->rings); /* the daemon doesn't hear the old ones any more */
        if (!by_ring)
            OK(ts_seq_free(large, &other, 1));
        OK(ts_seq_create(large, 1, &other));
        assert_int_equal(c->rings != NULL, by_ring || why_none == TOO_LATE);
        OK(ts_seq_free(large, &other, 1));
        OK(ts_seq_free(tiny, &seq, 1));
        ts_pool_close(large);
        ts_pool_close(tiny);
        ts_disconnect(c);
    }
    daemon_stop(&d);
}

/* Worker: writes random words all over its rings and its exchange while the daemon reads them. */
static void scribbler(const char *url, const char *argument)
{
    const uint32_t seed = (uint32_t)atoi(argument);
    enum { WRITES = 2000000 };
    ts_client *c = connect_url(url);
    ts_pool *p = open_pool(c, "tiny", 0);
    rng r = {seed};
    ts_seq seqs[8], unused;
    ts_step *s;
    uint32_t found;
    const ts_seq_options space = {.size = sizeof(ts_seq_options), .space = "m", .space_bytes = 1};
    OK(ts_seq_match(p, &(uint32_t){7}, &(uint32_t){1}, 1, &space, &unused,
                    &found)); /* room for ids */
    OK(ts_seq_create(p, 8, seqs));
    OK(ts_step_begin(p, seqs, &(uint32_t){1}, 1,
                     &(ts_step_options){.size = sizeof(ts_step_options), .heads = HEADS}, &s));
    ts_rings_memory *m = c->rings;
    uint64_t step = m->completed[(c->ring_seen - 1) % TS_RING_ENTRIES].step;
    uint32_t *words = (uint32_t *)m, *exchange = (uint32_t *)(void *)c->exchange;
    size_t first = offsetof(ts_rings_memory, submitted) / 4;
    size_t all = ts_rings_bytes(c->ring_blocks, c->ring_slabs, c->ring_ids) / 4;
    for (uint32_t i = 0; i < WRITES; i++) {
        words[first + rng_next(&r) % (i % 2 == 0 ? 64u * 32 : all - first)] =
            (uint32_t)rng_next(&r);
        exchange[rng_next(&r) % (c->exchange_bytes / 4)] = (uint32_t)rng_next(&r);
        if (i % 64 != 0)
            continue;
        ts_ring_entry e = {.op = 1 + (uint32_t)rng_next(&r) % TS_RING_OPS, .step = step};
        if (e.op == TS_RING_BEGIN) {
            e.begin.count = (uint32_t)rng_next(&r) % 9;
            e.begin.heads = HEADS;
            e.begin.flags = (uint32_t)rng_next(&r) % 4;
            for (uint32_t n = 0; n < e.begin.count; n++) {
                m->batch_seqs[n] = seqs[rng_next(&r) % 8];
                m->batch_known_step[n] = rng_next(&r) % 2 * step;
                m->batch_words[n] = (uint32_t)rng_next(&r) % 4;
            }
        } else if (e.op >= TS_RING_SEQ_CREATE) {
            e.seqs.pool = rng_next(&r) % 16 == 0;
            e.seqs.count = (uint32_t)rng_next(&r) % 5;
            e.seqs.parent = seqs[rng_next(&r) % 8];
            e.seqs.length = (uint32_t)rng_next(&r) % 4;
            e.seqs.flags = (uint32_t)rng_next(&r) % 4;
            e.seqs.space_bytes = (uint32_t)rng_next(&r) % 66;
            for (uint32_t n = 0; n < e.seqs.count; n++) {
                m->batch_seqs[n] = rng_next(&r); /* the eight go on */
                m->batch_words[n] = (uint32_t)rng_next(&r) % 9;
            }
        } else if (e.op == TS_RING_RUN) {
            e.run.layer = (uint32_t)rng_next(&r) % 3;
            e.run.k = rng_next(&r) % 64 * 64;
            e.run.flags = (uint32_t)rng_next(&r) % 16;
        }
        submit(c, &e);
        __atomic_store_n(&m->completions.head,
                         __atomic_load_n(&m->completions.tail, __ATOMIC_SEQ_CST), __ATOMIC_SEQ_CST);
        while (c->ring_submitted - __atomic_load_n(&m->completions.tail, __ATOMIC_SEQ_CST) >
               TS_RING_ENTRIES / 2)
            __atomic_store_n(&m->completions.head,
                             __atomic_load_n(&m->completions.tail, __ATOMIC_SEQ_CST),
                             __ATOMIC_SEQ_CST);
        uint64_t begun = m->completed[rng_next(&r) % TS_RING_ENTRIES].step;
        if (begun != 0)
            step = begun;
    }
    for (uint32_t i = 0; i < WRITES / 10; i++) { /* the counts too */
        words[rng_next(&r) % 112] = (uint32_t)rng_next(&r);
        if (i % 64 == 0)
            (void)!write(c->doorbell, &(uint64_t){1}, 8);
    }
    _exit(0);
}

static void a_client_that_scribbles_over_its_rings_harms_itself_alone(void **state)
{
    (void)state;
    daemon_process d;
    daemon_start(&d, POOL);
    ts_client *c = connect_by(&d, TS_TRANSPORT_RING, 0, 0);
    ts_pool *p = open_pool(c, "tiny", 0);
    ts_seq seq;
    pid_t scribblers[2] = {spawn("scribbler", d.url, "1"), spawn("scribbler", d.url, "2")};
    OK(ts_seq_create(p, 1, &seq));
    uint32_t left = 2, steps = 0;
    while (left > 0) {
        ts_step *s;
        OK(ts_step_begin(p, &seq, &(uint32_t){1}, 1,
                         &(ts_step_options){.size = sizeof(ts_step_options), .heads = HEADS}, &s));
        for (uint32_t layer = 0; layer < 2; layer++) {
            for (uint32_t i = 0; i < HEADS * DIM; i++)
                ((float *)ts_step_q(s))[i] = (float)(i % 3);
            for (uint32_t i = 0; i < KV * DIM; i++) {
                ((float *)ts_step_k(s))[i] = (float)(i % 5);
                ((float *)ts_step_v(s))[i] = (float)layer + 1;
            }
            OK(ts_step_run(s, layer));
            for (uint32_t i = 0; i < HEADS * DIM; i++)
                assert_float_equal(((const float *)ts_step_out(s))[i], layer + 1, 1e-5);
        }
        OK(ts_step_commit(s, NULL));
        if (++steps % 200 == 0)
            OK(ts_seq_truncate(p, &seq, &(uint32_t){1}, 1));
        for (int i = 0; i < 2; i++) {
            int status;
            if (scribblers[i] > 0 && waitpid(scribblers[i], &status, WNOHANG) == scribblers[i]) {
                assert_true(WIFEXITED(status));
                assert_int_equal(WEXITSTATUS(status), 0);
                scribblers[i] = 0;
                left--;
            }
        }
    }
    OK(ts_seq_truncate(p, &seq, &(uint32_t){0}, 1));
    await_used_blocks(c, 0);
    check_daemon(c);
    ts_pool_close(p);
    ts_disconnect(c);
    daemon_stop(&d);
}

static void *run_one(void *arg)
{
    return (void *)(intptr_t)ts_step_run(arg, 0);
}

/* A call that polls, and one that sleeps, when the daemon is killed. */
static void a_daemon_that_dies_leaves_no_client_waiting(void **state)
{
    (void)state;
    for (int sleeps = 0; sleeps < 2; sleeps++) {
        daemon_process d;
        daemon_start(&d, POOL);
        ts_client *c = connect_by(&d, TS_TRANSPORT_RING, 0, sleeps ? TS_SPIN_NONE : 1000000);
        ts_pool *p = open_pool(c, "tiny", 0);
        ts_seq seq;
        ts_step *s;
        pthread_t thread;
        void *result;
        OK(ts_seq_create(p, 1, &seq));
        OK(ts_step_begin(p, &seq, &(uint32_t){1}, 1, NULL, &s));
        uint32_t tail = c->rings->submissions.tail;
        daemon_pause(&d);
        assert_int_equal(pthread_create(&thread, NULL, run_one, s), 0);
        await(&c->rings->submissions.tail, tail + 1);
        if (sleeps)
            await(&c->rings->completions.sleeps, 1);
        kill(d.pid, SIGKILL);
        assert_int_equal(waitpid(d.pid, NULL, 0), d.pid);
        assert_int_equal(pthread_join(thread, &result), 0);
        assert_int_equal((intptr_t)result, TS_ECONN);
        assert_non_null(strstr(ts_error(c), "the session is over"));
        assert_int_equal(ts_step_run(s, 0), TS_ECONN);
        (void)ts_step_abort(s);
        ts_pool_close(p);
        ts_disconnect(c);
        daemon_clean(&d);
    }
}

int main(int argc, char **argv)
{
    static const worker_role roles[] = {
        {"scribbler", scribbler},
        {"cannot_grow", cannot_grow},
    };
    if (argc == 4)
        return run_role(argv, roles, sizeof roles / sizeof *roles);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_client_knows_how_its_last_step_went),
        cmocka_unit_test(a_begin_that_is_too_large_for_a_ring_goes_as_a_message),
        cmocka_unit_test(a_ring_refuses_what_a_message_would),
        cmocka_unit_test(a_client_that_takes_no_answers_is_not_heard_until_it_does),
        cmocka_unit_test(rings_grow_for_a_larger_pool_while_a_step_is_open),
        cmocka_unit_test(rings_that_cannot_grow_stay),
        cmocka_unit_test(rings_without_a_doorbell_are_not_waited_for),
        cmocka_unit_test(counts_that_cannot_be_end_the_rings_and_not_the_session),
        cmocka_unit_test(a_doorbell_that_is_jammed_holds_up_nobody_else),
        cmocka_unit_test(a_client_that_scribbles_over_its_rings_harms_itself_alone),
        cmocka_unit_test(a_daemon_that_dies_leaves_no_client_waiting),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
