/* Slabs of a GPU's memory that go to another tenant, on a fake one: who is told, and what happens
 * to who doesn't give them back. */
#include "gpu_service_util.h"

#include "revocations.h"

#define SLAB_BYTES (16 * ts_geometry_block_bytes(&geometry))

static uint64_t held_by(uint32_t tenant)
{
    return __atomic_load_n(&service.exec.gpus[0].exchange_bytes[tenant], __ATOMIC_ACQUIRE);
}

static void tick_on_owner(ts_work *work, void *owner)
{
    (void)work;
    ts_service_tick(owner, 0);
    sem_post(&handled);
}

static void tick(void)
{
    ts_work work = {.run = tick_on_owner};
    sem_init(&handled, 0, 0);
    ts_queue_run(&service.exec.queue, &work, &service);
    while (sem_wait(&handled) != 0)
        ;
}

/* Tokens in a new sequence, and then none: the tenant has the slab, and uses none of it. */
static void use_and_free(const worker *w)
{
    test_request t;
    uint64_t seq;
    uint32_t n = 4;
    pipe_used = w->pipe;
    create_seqs(&seq, 1);
    REQUEST(begin, StepBegin, STEP_BEGIN, TSPB__STEP_BEGIN__INIT);
    begin_body.seqs = &seq;
    begin_body.new_tokens = &n;
    begin_body.n_seqs = begin_body.n_new_tokens = 1;
    begin_body.heads = 1;
    begin.step_begin = &begin_body;
    const uint64_t step = call(&t, &begin, TS_OK)->step_begun->step;
    drop(&t);
    REQUEST(abort, StepAbort, STEP_ABORT, TSPB__STEP_ABORT__INIT);
    abort_body.step = step;
    abort.step_abort = &abort_body;
    call(&t, &abort, TS_OK);
    drop(&t);
}

/* Two workers of different users; the first has had the only slab mapped. */
static ts_revocations *two_workers(worker *first, worker *second)
{
    pipe_used = 1;
    worker_open(first);
    connection_open(2, OTHER_UID);
    pipe_used = 2;
    worker_open(second);
    use_and_free(first);
    ask_for(first, TS_HANDLE_SLAB, 0);
    assert_int_equal(ask.reply.status, TS_EPROTO);
    assert_string_equal(ask.reply.message, "the session has not asked for its page of revocations");
    ask_for(first, TS_HANDLE_REVOCATIONS, 0);
    assert_int_equal(ask.reply.status, TS_OK);
    assert_int_equal(ask.reply.bytes, TS_REVOCATIONS_BYTES);
    ts_revocations *page =
        mmap(NULL, TS_REVOCATIONS_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, ask.fd, 0);
    assert_ptr_not_equal(page, MAP_FAILED);
    close(ask.fd);
    ask_for(first, TS_HANDLE_SLAB, 0);
    assert_int_equal(ask.reply.status, TS_OK);
    close(ask.fd);
    return page;
}

static void a_slab_that_goes_to_another_user_is_asked_back(void **state)
{
    (void)state;
    pthread_t engine;
    worker first, second;
    uint64_t rung;
    standstill_after(120);
    service_start(fake_gpu_new(), &engine);
    ts_revocations *page = two_workers(&first, &second);
    ask_for(&first, TS_HANDLE_REVOCATION_BELL, 0);
    const int bell = ask.fd;
    assert_int_equal(page->posted, 0);
    use_and_free(&second);
    assert_int_equal(page->posted, 1);
    assert_int_equal(page->entries[0].pool, 0);
    assert_int_equal(page->entries[0].slab, 0);
    assert_int_equal(page->entries[0].generation, 1);
    assert_int_equal(read(bell, &rung, sizeof rung), sizeof rung);
    assert_int_equal(held_by(0), SLAB_BYTES);
    tick(); /* it has its time */
    assert_int_equal(held_by(0), SLAB_BYTES);
    page->returned = 1;
    tick();
    assert_int_equal(held_by(0), 0);
    use_and_free(&first); /* and the session goes on */
    close(bell);
    munmap(page, TS_REVOCATIONS_BYTES);
    worker_die(&first);
    worker_die(&second);
    service_stop(engine);
}

static ts_status no_memory(ts_memory *m, uint32_t slab, char *text, size_t text_bytes)
{
    (void)m;
    (void)slab;
    snprintf(text, text_bytes, "there is no memory");
    return TS_ENOMEM;
}

static void a_slab_that_cannot_be_made_anew_stays_its_users(void **state)
{
    (void)state;
    pthread_t engine;
    worker first, second;
    test_request t;
    uint64_t seq;
    uint32_t n = 4;
    standstill_after(120);
    service_start(fake_gpu_new(), &engine);
    ts_revocations *page = two_workers(&first, &second);
    const ts_memory_ops *ops = service.exec.memory[0]->ops;
    ts_memory_ops failing = *ops;
    failing.renew = no_memory;
    service.exec.memory[0]->ops = &failing;
    pipe_used = 2;
    create_seqs(&seq, 1);
    REQUEST(begin, StepBegin, STEP_BEGIN, TSPB__STEP_BEGIN__INIT);
    begin_body.seqs = &seq;
    begin_body.new_tokens = &n;
    begin_body.n_seqs = begin_body.n_new_tokens = 1;
    begin_body.heads = 1;
    begin.step_begin = &begin_body;
    call(&t, &begin, TS_ENOMEM);
    drop(&t);
    assert_int_equal(page->posted, 0); /* a client maps no generation that was asked back */
    assert_int_equal(held_by(0), 0);
    service.exec.memory[0]->ops = ops;
    use_and_free(&first);
    munmap(page, TS_REVOCATIONS_BYTES);
    worker_die(&first);
    worker_die(&second);
    service_stop(engine);
}

static void who_does_not_give_back_what_is_anothers_is_ended(void **state)
{
    (void)state;
    pthread_t engine;
    worker first, second;
    test_request t;
    standstill_after(120);
    service_start(fake_gpu_new(), &engine);
    service.return_ms = 0;
    ts_revocations *page = two_workers(&first, &second);
    tick(); /* nothing is owed */
    use_and_free(&second);
    tick();
    pipe_used = 1;
    REQUEST(create, SeqCreate, SEQ_CREATE, TSPB__SEQ_CREATE__INIT);
    create_body.count = 1;
    create.seq_create = &create_body;
    const Tspb__Reply *reply = call(&t, &create, TS_ECONN);
    assert_non_null(
        strstr(reply->message, "was ended: it did not give back GPU memory that is others' now"));
    drop(&t);
    assert_int_equal(held_by(0), 0);
    use_and_free(&second);
    munmap(page, TS_REVOCATIONS_BYTES);
    worker_die(&first);
    worker_die(&second);
    service_stop(engine);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_slab_that_goes_to_another_user_is_asked_back),
        cmocka_unit_test(a_slab_that_cannot_be_made_anew_stays_its_users),
        cmocka_unit_test(who_does_not_give_back_what_is_anothers_is_ended),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
