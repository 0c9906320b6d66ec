/* The service around a GPU, on a fake one: what waits for runs, what isn't freed, and what a lost
 * device refuses. */
#include "gpu_service_util.h"

#include "invariants.h"

static void a_commit_waits_for_runs_on_streams_and_a_dead_worker_is_let_go(void **state)
{
    (void)state;
    pthread_t engine;
    test_request t, commit_request, abort_request, more[5];
    worker w;
    uint64_t seqs[2];
    standstill_after(120);
    ts_gpu *gpu = fake_gpu_new();
    service_start(gpu, &engine);
    worker_open(&w);
    open_exchange(4096, TS_OK, NULL);
    create_seqs(seqs, 2);
    uint32_t new_tokens[2] = {1, 0}; /* the second sequence is empty, and has no table */
    REQUEST(begin, StepBegin, STEP_BEGIN, TSPB__STEP_BEGIN__INIT);
    begin_body.seqs = seqs;
    begin_body.new_tokens = new_tokens;
    begin_body.n_seqs = begin_body.n_new_tokens = 2;
    begin_body.heads = 1;
    begin_body.kernel = (char *)"v3";
    begin.step_begin = &begin_body;
    uint64_t step = call(&t, &begin, TS_OK)->step_begun->step;
    drop(&t);

    REQUEST(run, StepRun, STEP_RUN, TSPB__STEP_RUN__INIT);
    run_body.step = step;
    run_body.k = 1024;
    run_body.v = 2048;
    run_body.out = 3072;
    run_body.on_stream = true;
    run_body.number = 2;
    run.step_run = &run_body;
    Tspb__Reply *reply = call(&t, &run, TS_EINVAL);
    assert_string_equal(reply->message, "run number 2; the session's next is 1");
    drop(&t);
    run_body.number = 1;
    call(&t, &run, TS_OK); /* answered, though nothing was submitted */
    drop(&t);
    fake_gpu_await_waiting(gpu, 1);
    assert_int_equal(fake_gpu_read(gpu).kernel, TS_KERNEL_V3);
    REQUEST(commit, StepCommit, STEP_COMMIT, TSPB__STEP_COMMIT__INIT);
    commit_body.step = step;
    commit.step_commit = &commit_body;
    submit(&commit_request, &commit);
    REQUEST(abort, StepAbort, STEP_ABORT, TSPB__STEP_ABORT__INIT);
    abort_body.step = step;
    abort.step_abort = &abort_body;
    submit(&abort_request, &abort); /* waits as well, and comes second */
    REQUEST(lengths, SeqLengths, SEQ_LENGTHS, TSPB__SEQ_LENGTHS__INIT);
    lengths_body.seqs = seqs;
    lengths_body.n_seqs = 1;
    lengths.seq_lengths = &lengths_body;
    reply = call(&t, &lengths, TS_OK); /* the service goes on, and nobody sees the token */
    assert_int_equal(reply->lengths->lengths[0], 0);
    drop(&t);
    assert_false(is_answered(&commit_request));
    __atomic_store_n(&w.signals->submitted, 1, __ATOMIC_RELEASE);
    assert_int_equal(answer(&commit_request)->status, TS_OK);
    assert_int_equal(answer(&abort_request)->status, TS_ENOENT);
    drop(&abort_request);
    assert_int_equal(__atomic_load_n(&w.signals->completed, __ATOMIC_ACQUIRE), 1);
    drop(&commit_request);
    assert_int_equal(call(&t, &lengths, TS_OK)->lengths->lengths[0], 1);
    drop(&t);

    /* 4 runs of a step may be under way; the 5th is not refused but waits. Then the worker dies. */
    run_body.step = call(&t, &begin, TS_OK)->step_begun->step;
    drop(&t);
    for (uint32_t i = 0; i < 5; i++) {
        run_body.number = 2 + i;
        submit(&more[i], &run);
        if (i < 4)
            assert_int_equal(answer(&more[i])->status, TS_OK);
    }
    fake_gpu_await_waiting(gpu, 4);
    assert_int_equal(fake_gpu_read(gpu).plans, 2);    /* one for each step, not for each run, */
    assert_int_equal(fake_gpu_read(gpu).renewals, 1); /* and the second from the first */
    assert_false(is_answered(&more[4]));
    worker_die(&w);
    fake_gpu_await_waiting(gpu, 0);
    service_stop(engine);
    for (uint32_t i = 0; i < 5; i++)
        drop(&more[i]);
    alarm(0);
}

/* What the engine's owner sees. */
typedef struct look {
    ts_work work;
    uint32_t used; /* blocks */
    bool quarantines;
} look;

static void run_look(ts_work *work, void *owner)
{
    look *l = (look *)work;
    (void)owner;
    l->used = service.exec.engine->pools[0].books.used;
    l->quarantines = service.quarantines != NULL;
}

static look see(void)
{
    look l = {.work.run = run_look};
    ts_queue_put(&service.exec.queue, &l.work);
    ts_queue_flush(&service.exec.queue);
    return l;
}

static void what_a_dead_worker_may_still_write_is_nobody_elses(void **state)
{
    (void)state;
    pthread_t engine;
    test_request t;
    worker w;
    uint64_t seqs[1];
    standstill_after(120);
    const pid_t process = fork(); /* whose kernels write */
    if (process == 0) {
        pause();
        _exit(0);
    }
    worker_pid = (uint32_t)process;
    ts_gpu *gpu = fake_gpu_new();
    service_start(gpu, &engine);
    service.quarantine_ms = 1;
    worker_open(&w);
    create_seqs(seqs, 1);
    uint32_t new_tokens = 9;
    REQUEST(begin, StepBegin, STEP_BEGIN, TSPB__STEP_BEGIN__INIT);
    begin_body.seqs = seqs;
    begin_body.new_tokens = &new_tokens;
    begin_body.n_seqs = begin_body.n_new_tokens = 1; /* no query heads: it writes K and V itself */
    begin.step_begin = &begin_body;
    call(&t, &begin, TS_OK);
    drop(&t);
    worker_die(&w);
    look l = see(); /* the connection is gone, the process isn't */
    assert_true(l.used == 3 && l.quarantines);
    kill(process, SIGKILL);
    while (l.used > 0) {
        sched_yield();
        l = see();
    }
    assert_false(l.quarantines);
    assert_int_equal(waitpid(process, NULL, 0), process);
    worker_pid = 0;
    service_stop(engine);
    alarm(0);
}

/* What a GPU's memory counts for the one tenant. */
static uint64_t in_exchanges(void)
{
    return __atomic_load_n(&service.exec.gpus[0].exchange_bytes[0], __ATOMIC_ACQUIRE);
}

static void a_session_has_two_exchanges_at_most_and_a_tenant_its_share_of_a_gpu(void **state)
{
    (void)state;
    pthread_t engine;
    test_request t;
    worker w;
    uint64_t seq;
    const uint32_t new_tokens = 1;
    const uint64_t promised = 16 * ts_geometry_block_bytes(&geometry); /* to the pool, unused yet */
    standstill_after(120);
    ts_gpu *gpu = fake_gpu_new();
    service_start(gpu, &engine);
    worker_open(&w);
    open_exchange(FAKE_GPU_BYTES / 4 + 4096, TS_EQUOTA,
                  "0 bytes of cuda:0 in exchanges and would get 268439552 more; the limit is "
                  "268435456 (tenant_exchange)");
    service.exec.tenant_exchange_bytes = UINT64_MAX; /* nothing else is under way */
    open_exchange(FAKE_GPU_BYTES - promised + 4096, TS_ENOMEM, "other pools take");
    open_exchange(8192, TS_OK, NULL);
    assert_int_equal(in_exchanges(), 8192);
    open_exchange(10000, TS_EINVAL, "an exchange of 10000 bytes; it must be a multiple of 4096");
    assert_int_equal(in_exchanges(), 8192); /* what was refused is given back */
    create_seqs(&seq, 1);
    REQUEST(begin, StepBegin, STEP_BEGIN, TSPB__STEP_BEGIN__INIT);
    begin_body.seqs = &seq;
    begin_body.new_tokens = ts_unconst(&new_tokens);
    begin_body.n_seqs = begin_body.n_new_tokens = 1;
    begin_body.heads = 1;
    begin.step_begin = &begin_body;
    REQUEST(run, StepRun, STEP_RUN, TSPB__STEP_RUN__INIT);
    run_body.step = call(&t, &begin, TS_OK)->step_begun->step;
    run_body.k = 1024;
    run_body.v = 2048;
    run_body.out = 3072;
    run_body.on_stream = true;
    run_body.number = 1;
    run.step_run = &run_body;
    drop(&t);
    call(&t, &run, TS_OK); /* it isn't submitted, and keeps its exchange */
    drop(&t);
    open_exchange(12288, TS_OK, NULL);
    assert_int_equal(in_exchanges(), 8192 + 12288);
    open_exchange(16384, TS_EBUSY, "runs still use the exchange that was replaced last");
    ask_for(&w, TS_HANDLE_NEW_EXCHANGE, 16384);
    assert_int_equal(ask.reply.status, TS_OK);
    close(ask.fd);
    ask_for(&w, TS_HANDLE_TAKE_EXCHANGE, 0); /* of host memory neither */
    assert_int_equal(ask.reply.status, TS_EBUSY);
    assert_non_null(strstr(ask.reply.message, "runs still use"));
    assert_int_equal(in_exchanges(), 8192 + 12288);
    __atomic_store_n(&w.signals->submitted, 1, __ATOMIC_RELEASE);
    REQUEST(commit, StepCommit, STEP_COMMIT, TSPB__STEP_COMMIT__INIT);
    commit_body.step = run_body.step;
    commit.step_commit = &commit_body;
    call(&t, &commit, TS_OK); /* when the run is done */
    drop(&t);
    assert_int_equal(in_exchanges(), 12288);
    service.exec.tenant_exchange_bytes = 12288 + 16384 - 4096;
    open_exchange(16384, TS_EQUOTA, "12288 bytes of cuda:0 in exchanges");
    service.exec.tenant_exchange_bytes = 12288 + 16384; /* both live while one replaces the other */
    open_exchange(16384, TS_OK, NULL);
    assert_int_equal(in_exchanges(), 16384);
    worker_die(&w);
    service_stop(engine);
    alarm(0);
}

/* What there is of a session and of the pool. */
typedef struct books {
    uint32_t used, granted; /* blocks, slabs */
    uint32_t steps, tokens; /* open ones; of the session's first sequence */
    uint64_t exchanges;     /* that the session has had */
    uint64_t exchange_bytes;
    const void *exchange;
} books;

typedef struct books_work {
    ts_work work;
    uint64_t session, seq;
    books *books;
} books_work;

static void on_problem(void *arg, const char *sentence)
{
    (void)arg;
    fail_msg("%s", sentence);
}

static void run_read_books(ts_work *work, void *owner)
{
    const books_work *w = (const books_work *)work;
    (void)owner;
    (void)ts_slab_supply_finish(&service.exec); /* none is under way */
    const ts_engine *e = service.exec.engine;
    const ts_session *session = ts_engine_session(e, w->session);
    const ts_connection *c = ts_service_connection_of(&service, w->session);
    *w->books = (books){.used = e->pools[0].books.used,
                        .granted = e->pools[0].books.ungranted,
                        .steps = e->live_steps,
                        .tokens = ts_sequence_find(&e->pools[0].seqs, w->seq)->length,
                        .exchanges = session->exchanges,
                        .exchange_bytes = session->exchange_bytes,
                        .exchange = c->memory.exchange};
    assert_true(ts_invariants_check(e, on_problem, NULL) > 0);
}

static books read_books(const worker *w, uint64_t seq)
{
    books b;
    books_work work = {.work.run = run_read_books, .session = w->session, .seq = seq, .books = &b};
    ts_queue_put(&service.exec.queue, &work.work);
    ts_queue_flush(&service.exec.queue);
    return b;
}

/* Begins a step of `tokens` tokens, which the worker writes itself; the step, or 0 if refused. */
static uint64_t begin_tokens(uint64_t seq, uint32_t tokens, uint32_t wait_ms, ts_status expected,
                             const char *sentence)
{
    test_request t;
    REQUEST(begin, StepBegin, STEP_BEGIN, TSPB__STEP_BEGIN__INIT);
    begin_body.seqs = &seq;
    begin_body.new_tokens = &tokens;
    begin_body.n_seqs = begin_body.n_new_tokens = 1;
    begin_body.wait_ms = wait_ms;
    begin.step_begin = &begin_body;
    const Tspb__Reply *reply = call(&t, &begin, expected);
    if (expected != TS_OK)
        assert_string_equal(reply->message, sentence);
    const uint64_t step = expected == TS_OK ? reply->step_begun->step : 0;
    drop(&t);
    return step;
}

static void commit_step(uint64_t step)
{
    test_request t;
    REQUEST(commit, StepCommit, STEP_COMMIT, TSPB__STEP_COMMIT__INIT);
    commit_body.step = step;
    commit.step_commit = &commit_body;
    call(&t, &commit, TS_OK);
    drop(&t);
}

/* The worker's own memory as its exchange. */
static void register_exchange(ts_status expected, const char *sentence)
{
    test_request t;
    uint8_t handle[TS_IPC_HANDLE_BYTES] = "/dev/zero";
    REQUEST(exchange, ExchangeOpen, EXCHANGE_OPEN, TSPB__EXCHANGE_OPEN__INIT);
    exchange_body.bytes = 4096;
    exchange_body.ipc_handle = (ProtobufCBinaryData){sizeof handle, handle};
    exchange.exchange_open = &exchange_body;
    assert_string_equal(call(&t, &exchange, expected)->message, sentence);
    drop(&t);
}

/* Nobody holds the daemon's memory, so that no other daemon could do it. */
static void a_lost_device_gives_no_slab_and_no_exchange_and_the_books_stay(void **state)
{
    (void)state;
    pthread_t engine;
    worker w;
    uint64_t seq;
    standstill_after(120);
    ts_gpu *gpu = fake_gpu_new();
    service_start_with(gpu, &engine, 64, 4);
    worker_open(&w);
    open_exchange(8192, TS_OK, NULL);
    create_seqs(&seq, 1);
    commit_step(begin_tokens(seq, 3, 0, TS_OK, NULL));
    const books before = read_books(&w, seq);
    assert_true(before.granted < 16 && before.tokens == 3 && before.exchange_bytes == 8192);
    fake_gpu_break(gpu);
    for (uint32_t wait_ms = 0; wait_ms <= 100000; wait_ms += 100000) {
        begin_tokens(seq, 200, wait_ms, TS_EDEVICE, "pool 'p': cudaErrorFake");
        open_exchange(12288, TS_EDEVICE, "an exchange: cudaErrorFake");
        register_exchange(TS_EDEVICE, "an exchange: cudaErrorFake");
        const books after = read_books(&w, seq);
        assert_memory_equal(&after, &before, sizeof before);
        assert_int_equal(in_exchanges(), 8192);
    }
    commit_step(begin_tokens(seq, 1, 0, TS_OK, NULL)); /* of what there is */
    assert_int_equal(read_books(&w, seq).tokens, 4);
    assert_true(ts_gpu_executor_is_lost(service.exec.gpus[0].executor));
    assert_int_equal(atomic_exchange(&failures, 0), 1); /* it is told once */
    worker_die(&w);
    service_stop(engine);
    alarm(0);
}

/* On the engine's owner: what an operator may not do to cuda-ipc memory. */
static void keep_ipc_memory(ts_work *work, void *unused)
{
    (void)work;
    (void)unused;
    static const uint8_t handle[TS_IPC_HANDLE_BYTES];
    ts_pool_books *books = &service.exec.engine->pools[0].books;
    ts_answer answer = {0};
    service.exec.memory[0]->ipc_handle = handle;
    OK(ts_pool_add_tenant(books, 0));
    OK(ts_pool_grant(books, 0, 0));
    assert_int_equal(ts_pool_memory_remove(&service.exec, 0, NULL, &answer), TS_EPERM);
    assert_string_equal(answer.message,
                        "pool 'p' is cuda-ipc memory that its tenant may still map: it "
                        "stays until the daemon is restarted");
    assert_int_equal(ts_pool_memory_resize(&service.exec, 0, 8, NULL, &answer), TS_EINVAL);
    assert_string_equal(answer.message,
                        "pool 'p' is cuda-ipc memory: one piece, which keeps its size");
    service.exec.memory[0]->ipc_handle = NULL; /* as it was: of VMM, it goes */
    assert_int_equal(ts_pool_memory_resize(&service.exec, 0, 17, NULL, &answer), TS_EINVAL);
    assert_string_equal(answer.message,
                        "17 blocks for pool 'p'; the limits are 1..16, its memory_max");
    OK(ts_pool_memory_remove(&service.exec, 0, NULL, &answer));
    assert_false(ts_engine_has_pool(service.exec.engine, 0));
    assert_null(service.exec.memory[0]);
}

static void memory_that_a_tenant_may_still_map_is_not_freed(void **state)
{
    (void)state;
    pthread_t engine;
    standstill_after(120);
    service_start(fake_gpu_new(), &engine);
    ts_work work = {.run = keep_ipc_memory};
    ts_queue_run(&service.exec.queue, &work, &service);
    service_stop(engine);
    alarm(0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_commit_waits_for_runs_on_streams_and_a_dead_worker_is_let_go),
        cmocka_unit_test(what_a_dead_worker_may_still_write_is_nobody_elses),
        cmocka_unit_test(a_session_has_two_exchanges_at_most_and_a_tenant_its_share_of_a_gpu),
        cmocka_unit_test(a_lost_device_gives_no_slab_and_no_exchange_and_the_books_stay),
        cmocka_unit_test(memory_that_a_tenant_may_still_map_is_not_freed),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
