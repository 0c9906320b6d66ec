/* Slabs' memory on a fake GPU: made by a thread while the engine goes on, ahead where sessions have
 * slabs of their own, and by the engine's owner where it must be. */
#define _GNU_SOURCE
#include "gpu_service_util.h"
#include "store_util.h"

#include "slab_supply.h"

enum { SLAB_BLOCKS = 4, SLABS = 24, BLOCK_TOKENS = 4 };

/* ---- a provider whose renewals can be held up, and fail ---- */

static ts_memory_ops ops;
static const ts_memory_ops *below;
static sem_t go_on;
static atomic_bool held, failing;
static atomic_uint renewals, drops;

static ts_status renew(ts_memory *m, uint32_t slab, char *text, size_t text_bytes)
{
    atomic_fetch_add(&renewals, 1);
    while (atomic_load(&held) && sem_wait(&go_on) != 0)
        ;
    if (!atomic_load(&failing))
        return below->renew(m, slab, text, text_bytes);
    snprintf(text, text_bytes, "there is no memory");
    return TS_ENOMEM;
}

static ts_status drop_slab(ts_memory *m, uint32_t slab, char *text, size_t text_bytes)
{
    atomic_fetch_add(&drops, 1);
    return below->drop(m, slab, text, text_bytes);
}

static void let_go(void)
{
    atomic_store(&held, false);
    sem_post(&go_on);
}

/* A service whose pool has 24 slabs of 4 blocks of 4 tokens. */
static void start(pthread_t *engine)
{
    alarm(120);
    pipe_used = 1;
    sem_init(&go_on, 0, 0);
    atomic_store(&held, false);
    atomic_store(&failing, false);
    atomic_store(&renewals, 0);
    atomic_store(&drops, 0);
    service_start_with(fake_gpu_new(), engine, SLAB_BLOCKS * SLABS, SLAB_BLOCKS);
    below = service.exec.memory[0]->ops;
    ops = *below;
    ops.renew = renew;
    ops.drop = drop_slab;
    service.exec.memory[0]->ops = &ops;
}

static void stop(pthread_t engine)
{
    let_go();
    service_stop(engine);
    alarm(0);
}

/* What the engine's owner sees. */
typedef struct look {
    ts_work work;
    ts_pool_tenant tenant;
    uint32_t granted;
    char why[200];
} look;

static void run_look(ts_work *work, void *owner)
{
    look *l = (look *)work;
    ts_pool_books *books = &service.exec.engine->pools[0].books;
    uint32_t expected[SLAB_BLOCKS * SLABS];
    (void)owner;
    l->tenant = books->tenants[0];
    l->granted = books->ungranted;
    for (uint32_t i = 0; i < books->max_blocks; i++)
        expected[i] = ts_pool_refs(books, i);
    (void)ts_pool_check(books, expected, l->why, sizeof l->why);
}

static look see(void)
{
    look l = {.work.run = run_look};
    ts_queue_put(&service.exec.queue, &l.work);
    ts_queue_flush(&service.exec.queue);
    assert_string_equal(l.why, "");
    return l;
}

/* Waits until at least `granted` slabs are granted. */
static look await_granted(uint32_t granted)
{
    look l = see();
    while (l.granted < granted) {
        sched_yield();
        l = see();
    }
    return l;
}

typedef struct begin {
    test_request t;
    Tspb__Request message;
    Tspb__StepBegin body;
    uint64_t seq;
    uint32_t tokens;
} begin;

/* Sends a begin of a step of `tokens` tokens in a new sequence, by the worker's connection. */
static void send_begin(begin *b, const worker *w, uint32_t tokens)
{
    pipe_used = w->pipe;
    create_seqs(&b->seq, 1);
    b->tokens = tokens;
    b->body = (Tspb__StepBegin)TSPB__STEP_BEGIN__INIT;
    b->message = (Tspb__Request)TSPB__REQUEST__INIT;
    b->message.body_case = TSPB__REQUEST__BODY_STEP_BEGIN;
    b->message.step_begin = &b->body;
    b->body.seqs = &b->seq;
    b->body.new_tokens = &b->tokens;
    b->body.n_seqs = b->body.n_new_tokens = 1;
    b->body.heads = 1;
    submit(&b->t, &b->message);
}

/* It was answered without waiting for anything. */
static void was_answered(begin *b)
{
    ts_queue_flush(&service.exec.queue);
    assert_true(is_answered(&b->t));
}

static void end_begin(begin *b, ts_status expected)
{
    assert_int_equal(answer(&b->t)->status, expected);
    drop(&b->t);
}

static void the_engine_goes_on_while_a_slab_is_made(void **state)
{
    (void)state;
    pthread_t engine;
    worker w;
    begin b;
    uint64_t seq;
    start(&engine);
    worker_open(&w);
    atomic_store(&held, true);
    send_begin(&b, &w, 1);
    while (atomic_load(&renewals) == 0)
        sched_yield();
    create_seqs(&seq, 1); /* is answered */
    assert_int_equal(see().granted, 0);
    assert_false(is_answered(&b.t));
    let_go();
    end_begin(&b, TS_OK);
    assert_true(see().granted >= 1);
    worker_die(&w);
    stop(engine);
}

/* 24 slabs: 3 ahead at most, and no more than sessions have slabs of their own. */
static void slabs_are_made_ahead_and_the_next_begins_wait_for_none(void **state)
{
    (void)state;
    pthread_t engine;
    worker w[2];
    begin b[4];
    start(&engine);
    worker_open(&w[0]);
    send_begin(&b[0], &w[0], 1);
    end_begin(&b[0], TS_OK);
    look l = await_granted(2);
    assert_int_equal(l.tenant.homes, 1);
    assert_int_equal(l.tenant.nobodys, 1);
    same_user = true;
    connection_open(2, 0);
    pipe_used = 2;
    worker_open(&w[1]);
    send_begin(&b[1], &w[1], 1);
    was_answered(&b[1]); /* the slab was there */
    end_begin(&b[1], TS_OK);
    l = await_granted(4);
    assert_int_equal(l.tenant.homes, 2);
    assert_int_equal(l.tenant.nobodys, 2);
    atomic_store(&held, true);
    send_begin(&b[2], &w[0],
               BLOCK_TOKENS * SLAB_BLOCKS); /* of its own slab and one that was made ahead */
    send_begin(&b[3], &w[1], BLOCK_TOKENS * SLAB_BLOCKS);
    was_answered(&b[2]);
    was_answered(&b[3]);
    end_begin(&b[2], TS_OK);
    end_begin(&b[3], TS_OK);
    l = see();
    assert_int_equal(l.granted, 4);
    assert_int_equal(l.tenant.nobodys, 0);
    let_go();
    await_granted(6);
    assert_int_equal(atomic_load(&renewals), 6);
    worker_die(&w[0]);
    worker_die(&w[1]);
    stop(engine);
}

/* A begin of many slabs gets them one after the other. */
static void a_begin_gets_as_many_slabs_as_it_needs(void **state)
{
    (void)state;
    pthread_t engine;
    worker w;
    begin b;
    start(&engine);
    worker_open(&w);
    send_begin(&b, &w, BLOCK_TOKENS * SLAB_BLOCKS * 10);
    end_begin(&b, TS_OK);
    look l = await_granted(11);
    assert_int_equal(l.tenant.used, SLAB_BLOCKS * 10);
    worker_die(&w);
    stop(engine);
}

static void memory_that_cannot_be_had_refuses_the_begin_and_is_tried_again(void **state)
{
    (void)state;
    pthread_t engine;
    worker w;
    begin b;
    start(&engine);
    worker_open(&w);
    atomic_store(&failing, true);
    send_begin(&b, &w, 1);
    Tspb__Reply *reply = answer(&b.t);
    assert_int_equal(reply->status, TS_ENOMEM);
    assert_string_equal(reply->message, "pool 'p': there is no memory");
    drop(&b.t);
    assert_int_equal(atomic_load(&renewals), 2); /* the thread's, and the owner's */
    send_begin(&b, &w, 1);
    was_answered(&b); /* by the owner alone */
    end_begin(&b, TS_ENOMEM);
    assert_int_equal(atomic_load(&renewals), 3);
    atomic_store(&failing, false);
    send_begin(&b, &w, 1);
    end_begin(&b, TS_OK);
    (void)await_granted(2); /* and one ahead, by the thread */
    worker_die(&w);
    stop(engine);
}

/* On the engine's owner: makes the pool smaller, and then as large as it was. */
typedef struct resize {
    ts_work work;
    uint32_t blocks;
    ts_status status;
} resize;

static void run_resize(ts_work *work, void *owner)
{
    resize *r = (resize *)work;
    ts_answer answer = {0};
    (void)owner;
    r->status = ts_pool_memory_resize(&service.exec, 0, r->blocks, NULL, &answer);
}

static void resize_to(uint32_t blocks)
{
    resize r = {.work.run = run_resize, .blocks = blocks};
    ts_queue_put(&service.exec.queue, &r.work);
    ts_queue_flush(&service.exec.queue);
    assert_int_equal(r.status, TS_OK);
}

static void a_slab_under_way_is_waited_for_when_the_pool_becomes_smaller(void **state)
{
    (void)state;
    pthread_t engine;
    worker w;
    begin b;
    start(&engine);
    worker_open(&w);
    send_begin(&b, &w, 1);
    end_begin(&b, TS_OK);
    (void)await_granted(2);
    atomic_store(&held, true);
    send_begin(&b, &w,
               BLOCK_TOKENS * SLAB_BLOCKS); /* takes the one that was ahead: another is ordered */
    end_begin(&b, TS_OK);
    while (atomic_load(&renewals) < 3)
        sched_yield();
    resize r = {.work.run = run_resize, .blocks = SLAB_BLOCKS * 2};
    ts_queue_put(&service.exec.queue, &r.work);
    sched_yield();
    let_go();
    ts_queue_flush(&service.exec.queue);
    assert_int_equal(r.status, TS_OK);
    assert_int_equal(see().granted, 2);
    assert_int_equal(atomic_load(&drops), SLABS - 2); /* the third, too: it was granted first */
    resize_to(SLAB_BLOCKS * SLABS);
    assert_int_equal(see().granted, 2);
    send_begin(&b, &w, BLOCK_TOKENS * SLAB_BLOCKS);
    end_begin(&b, TS_OK);
    (void)await_granted(4);
    worker_die(&w);
    stop(engine);
}

/* ---- what the store doesn't take ---- */

static atomic_bool keeps; /* a slab has no descriptor to be had: it can't be stored */

static ts_status export_slab(ts_memory *m, uint32_t slab, bool writable, int *fd, char *text,
                             size_t text_bytes)
{
    if (!atomic_load(&keeps))
        return below->export_fd(m, slab, writable, fd, text, text_bytes);
    snprintf(text, text_bytes, "there is no descriptor");
    return TS_ENOMEM;
}

/* The same service, of `slabs` slabs that are stored with a holder of `fds` descriptors. */
static void start_stored(pthread_t *engine, keeping_holder *k, uint32_t slabs, const char *fds)
{
    keeping_holder_make(k, fds);
    pipe_used = 1;
    same_user = false;
    sem_init(&go_on, 0, 0);
    atomic_store(&held, false);
    atomic_store(&failing, false);
    atomic_store(&keeps, false);
    atomic_store(&drops, 0);
    service_start_with(fake_gpu_new(), engine, SLAB_BLOCKS * slabs, SLAB_BLOCKS);
    ts_memory *memory = service.exec.memory[0];
    below = memory->ops;
    ops = *below;
    ops.renew = renew;
    ops.drop = drop_slab;
    ops.export_fd = export_slab;
    memory->ops = &ops;
    memory->outlives = true;
    service.exec.store = ts_store_open();
    assert_non_null(service.exec.store);
}

static void stop_stored(pthread_t engine, keeping_holder *k)
{
    ts_store *store = service.exec.store;
    stop(engine);
    ts_store_close(store);
    keeping_holder_end(k);
}

/* The file of the slab's memory, when the holder has all that it was sent. */
static ino_t slab_file(uint32_t slab)
{
    struct stat about;
    int fd;
    char text[64];
    assert_true(ts_store_barrier(service.exec.store, 60000));
    OK(below->export_fd(service.exec.memory[0], slab, true, &fd, text, sizeof text));
    assert_int_equal(fstat(fd, &about), 0);
    close(fd);
    return about.st_ino;
}

static uint32_t generation_of(uint32_t slab)
{
    (void)see();
    return service.exec.engine->pools[0].books.slabs[slab].generation;
}

/* A worker has had both slabs, and has ended; another user's comes. */
static void use_both_and_leave(worker *next)
{
    worker w;
    begin b;
    worker_open(&w);
    send_begin(&b, &w, BLOCK_TOKENS * SLAB_BLOCKS * 2);
    end_begin(&b, TS_OK);
    assert_int_equal(see().granted, 2);
    worker_die(&w);
    connection_open(2, OTHER_UID);
    pipe_used = 2;
    worker_open(next);
}

/* The store is full of them: the memory of a slab that changes hands takes the old one's place. */
static void a_slab_changes_hands_in_a_full_store(void **state)
{
    (void)state;
    pthread_t engine;
    keeping_holder k;
    worker w;
    begin b;
    start_stored(&engine, &k, 2, "2");
    use_both_and_leave(&w);
    const ino_t first = slab_file(0), second = slab_file(1);
    assert_int_equal(kept_file(&k, "p0.0.1"), first);
    assert_int_equal(kept_file(&k, "p0.1.1"), second);
    send_begin(&b, &w, BLOCK_TOKENS * SLAB_BLOCKS * 2);
    end_begin(&b, TS_OK);
    for (uint32_t slab = 0; slab < 2; slab++) {
        char was[16], is[16];
        snprintf(was, sizeof was, "p0.%u.1", slab);
        snprintf(is, sizeof is, "p0.%u.2", slab);
        assert_int_equal(generation_of(slab), 2);
        assert_int_equal(kept_file(&k, is), slab_file(slab));
        assert_int_equal(kept_file(&k, was), 0);
    }
    assert_int_not_equal(slab_file(0), first);
    worker_die(&w);
    stop_stored(engine, &k);
}

/* Nothing can be stored: the begin is refused, and the store has no other memory under the name
 * that the slab has now. */
static void a_slab_that_cannot_be_stored_changes_no_hands(void **state)
{
    (void)state;
    pthread_t engine;
    keeping_holder k;
    worker w;
    begin b;
    start_stored(&engine, &k, 2, "8");
    use_both_and_leave(&w);
    const ino_t first = slab_file(0), second = slab_file(1);
    const uint32_t one = see().tenant.slabs;
    assert_int_equal(one, 2);
    atomic_store(&keeps, true);
    send_begin(&b, &w, 1);
    const Tspb__Reply *reply = answer(&b.t);
    assert_int_equal(reply->status, TS_ENOMEM);
    assert_string_equal(reply->message, "pool 'p': there is no descriptor");
    drop(&b.t);
    assert_int_equal(see().tenant.slabs, 2); /* whose they were */
    uint32_t changed = slab_file(0) == first ? 1 : 0;
    char was[16], is[16];
    snprintf(was, sizeof was, "p0.%u.1", changed);
    snprintf(is, sizeof is, "p0.%u.2", changed);
    assert_int_equal(generation_of(changed), 2); /* whoever maps it maps it anew */
    assert_int_equal(generation_of(1 - changed), 1);
    assert_int_equal(kept_file(&k, was), 0);
    assert_int_equal(kept_file(&k, is), 0);
    assert_int_equal(slab_file(1 - changed), changed == 0 ? second : first);
    atomic_store(&keeps, false);
    send_begin(&b, &w, 1);
    end_begin(&b, TS_OK); /* it is tried again, and is stored */
    assert_int_equal(generation_of(changed) + generation_of(1 - changed), 4);
    worker_die(&w);
    stop_stored(engine, &k);
}

/* One that nobody has had keeps no memory. */
static void a_new_slab_that_cannot_be_stored_has_no_memory(void **state)
{
    (void)state;
    pthread_t engine;
    keeping_holder k;
    worker w;
    begin b;
    start_stored(&engine, &k, 2, "8");
    worker_open(&w);
    atomic_store(&keeps, true);
    send_begin(&b, &w, 1);
    end_begin(&b, TS_ENOMEM);
    assert_int_equal(atomic_load(&drops), 2); /* the thread's, and the owner's */
    assert_int_equal(see().granted, 0);
    atomic_store(&keeps, false);
    send_begin(&b, &w, 1);
    end_begin(&b, TS_OK);
    assert_int_equal(generation_of(0), 1);
    assert_int_equal(kept_file(&k, "p0.0.1"), slab_file(0));
    worker_die(&w);
    stop_stored(engine, &k);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_engine_goes_on_while_a_slab_is_made),
        cmocka_unit_test(slabs_are_made_ahead_and_the_next_begins_wait_for_none),
        cmocka_unit_test(a_begin_gets_as_many_slabs_as_it_needs),
        cmocka_unit_test(memory_that_cannot_be_had_refuses_the_begin_and_is_tried_again),
        cmocka_unit_test(a_slab_under_way_is_waited_for_when_the_pool_becomes_smaller),
        cmocka_unit_test(a_slab_changes_hands_in_a_full_store),
        cmocka_unit_test(a_slab_that_cannot_be_stored_changes_no_hands),
        cmocka_unit_test(a_new_slab_that_cannot_be_stored_has_no_memory),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
