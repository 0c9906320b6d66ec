/*
 * What the daemon does around a GPU, on a fake one: joining jobs, keeping the order of ordered
 * runs, holding up nobody for a worker that does not submit, and what happens when the device is
 * lost.
 */
#include "test_util.h"

#include "devices.h"
#include "fake_gpu.h"
#include "gpu_batch.h"
#include "log.h"
#include "service.h"

#include <semaphore.h>
#include <sys/mman.h>
#include <unistd.h>

#define OK(call) assert_int_equal((call), TS_OK)
#define DIM 32u

#define SESSIONS 20u /* more than are waited for at once */

static char why[256];
static const ts_geometry geometry = {
    .layers = 1, .kv_heads = 1, .head_dim = DIM, .block_tokens = 4, .dtype = TS_DTYPE_FP32};

/* A job of one sequence of one token, whose output must be its v. */
typedef struct test_job {
    ts_job job; /* first */
    ts_attention_seq seq;
    uint32_t table[1];
    ts_gpu_plan *plan;
    float q[DIM], k[DIM], v[DIM], out[DIM];
    sem_t done;
} test_job;

#define BLOCKS 512u /* more than there are jobs at once: each has its own */

static unsigned char cache[BLOCKS * 4 * DIM * 4 * 2];
static uint32_t next_block;

static void on_done(ts_job *job)
{
    sem_post(&((test_job *)job)->done);
}

static void job_init(test_job *t, ts_signals_page *signals, uint32_t order)
{
    memset(t, 0, sizeof *t);
    sem_init(&t->done, 0, 0);
    t->table[0] = next_block++ % BLOCKS;
    for (uint32_t i = 0; i < DIM; i++)
        t->v[i] = (float)(t->table[0] + i);
    t->seq = (ts_attention_seq){.blocks = t->table,
                                .kv_tokens = 1,
                                .q_tokens = 1,
                                .q = t->q,
                                .k = t->k,
                                .v = t->v,
                                .out = t->out};
    t->job = (ts_job){.geometry = geometry,
                      .base = cache,
                      .seqs = &t->seq,
                      .num_seqs = 1,
                      .heads = 1,
                      .plan = &t->plan,
                      .io_dtype = TS_DTYPE_FP32,
                      .variant.scale = 1,
                      .signals = signals,
                      .order = order,
                      .done = on_done};
}

static void await_job(test_job *t)
{
    while (sem_wait(&t->done) != 0)
        ;
    ts_gpu_plan_free(t->plan);
    t->plan = NULL;
}

static void await_good(test_job *t)
{
    await_job(t);
    assert_int_equal(t->job.status, TS_OK);
    assert_memory_equal(t->out, t->v, sizeof t->out);
}

static bool is_done(test_job *t)
{
    int value;
    sem_getvalue(&t->done, &value);
    return value > 0;
}

static uint32_t failures;
static char failure[256];

static void on_failure(const char *sentence)
{
    failures++;
    snprintf(failure, sizeof failure, "%s", sentence);
}

typedef struct rig {
    ts_gpu *gpu;
    ts_gpu_batch *batch;
    ts_signals_page *pages[SESSIONS];
} rig;

static void rig_new(rig *r, uint32_t submit_ms)
{
    memset(r, 0, sizeof *r);
    failures = 0;
    alarm(120);
    r->gpu = fake_gpu_new();
    OK(ts_gpu_batch_new(r->gpu, SESSIONS, submit_ms, on_failure, &r->batch, why, sizeof why));
    for (uint32_t i = 0; i < SESSIONS; i++) {
        uint32_t *done, *there;
        OK(ts_signals_new(&r->pages[i], why, sizeof why));
        ts_gpu_batch_word(r->batch, i, &done, &there);
        OK(ts_signals_reach(r->pages[i], r->gpu, done, there, why, sizeof why));
    }
}

static void rig_free(rig *r)
{
    ts_gpu_batch_free(r->batch);
    for (uint32_t i = 0; i < SESSIONS; i++)
        ts_signals_release(r->pages[i]);
    fake_gpu_free(r->gpu);
    alarm(0);
}

static void submitted(ts_signals_page *page, uint32_t order)
{
    __atomic_store_n(&page->host->submitted, order, __ATOMIC_RELEASE);
}

static void jobs_that_are_ready_together_and_alike_become_one_launch(void **state)
{
    (void)state;
    rig r;
    rig_new(&r, 3600000);
    test_job jobs[6];
    for (int i = 0; i < 6; i++)
        job_init(&jobs[i], NULL, 0);
    jobs[4].job.kernel = TS_KERNEL_V2; /* unlike the others */
    fake_gpu_shut_gate(r.gpu);
    ts_gpu_batch_submit(r.batch, &jobs[0].job);
    fake_gpu_await_at_gate(r.gpu); /* the batch's thread stands there while the others come */
    for (int i = 1; i < 6; i++)
        ts_gpu_batch_submit(r.batch, &jobs[i].job);
    fake_gpu_open_gate(r.gpu);
    for (int i = 0; i < 6; i++)
        await_good(&jobs[i]);
    assert_int_equal(fake_gpu_read(r.gpu).launches, 3); /* 1, then 4 together, and the unlike one */
    uint64_t runs, launches;
    ts_gpu_batch_counts(r.batch, &runs, &launches);
    assert_int_equal(runs, 6);
    assert_int_equal(launches, 3);
    assert_int_equal(fake_gpu_read(r.gpu).kernel, TS_KERNEL_V2);
    rig_free(&r);
}

static void an_ordered_run_starts_when_it_is_submitted_and_says_when_it_is_done(void **state)
{
    (void)state;
    rig r;
    rig_new(&r, 3600000);
    test_job first, second, other;
    ts_signals_page *page = r.pages[3];
    job_init(&first, page, 1);
    job_init(&second, page, 2);
    job_init(&other, NULL, 0);
    ts_gpu_batch_submit(r.batch, &first.job);
    ts_gpu_batch_submit(r.batch, &second.job);
    fake_gpu_await_waiting(r.gpu, 2);
    ts_gpu_batch_submit(r.batch, &other.job);
    await_good(&other); /* held up by nobody */
    assert_false(is_done(&first) || is_done(&second));
    assert_int_equal(page->host->completed, 0);
    submitted(page, 1);
    await_good(&first);
    assert_int_equal(__atomic_load_n(&page->host->completed, __ATOMIC_ACQUIRE), 1);
    assert_false(is_done(&second));
    submitted(page, 2);
    await_good(&second);
    assert_int_equal(__atomic_load_n(&page->host->completed, __ATOMIC_ACQUIRE), 2);
    rig_free(&r);
}

/* The second run's inputs are there first: it waits for the first run all the same. */
static void runs_of_one_session_complete_in_order(void **state)
{
    (void)state;
    rig r;
    rig_new(&r, 3600000);
    test_job first, second;
    ts_signals_page *page = r.pages[0];
    submitted(page, 2);
    job_init(&first, page, 1);
    job_init(&second, page, 2);
    ts_gpu_batch_submit(r.batch, &second.job);
    fake_gpu_await_waiting(r.gpu, 1);
    page->host->completed = 77; /* what the worker writes there is nothing to the daemon */
    assert_false(is_done(&second));
    ts_gpu_batch_submit(r.batch, &first.job);
    await_good(&first);
    await_good(&second);
    assert_int_equal(page->host->completed, 2);
    rig_free(&r);
}

/* The first waits for the run before it and for its worker; the others are queued behind it. */
static void runs_that_are_queued_ahead_follow_each_other(void **state)
{
    (void)state;
    rig r;
    rig_new(&r, 3600000);
    test_job jobs[4];
    ts_signals_page *page = r.pages[0];
    for (uint32_t i = 0; i < 4; i++) {
        job_init(&jobs[i], page, i + 1);
        ts_gpu_batch_submit(r.batch, &jobs[i].job);
        fake_gpu_await_waiting(r.gpu, i + 1);
    }
    assert_int_equal(fake_gpu_read(r.gpu).words, 5);
    submitted(page, 4); /* all at once, as only a worker that is wrong does */
    for (uint32_t i = 0; i < 4; i++)
        await_good(&jobs[i]);
    assert_int_equal(page->host->completed, 4);
    assert_int_equal(*page->done, 4);
    rig_free(&r);
}

static void workers_that_do_not_submit_take_only_their_share(void **state)
{
    (void)state;
    rig r;
    rig_new(&r, 3600000);
    static test_job jobs[SESSIONS][9];
    test_job other;
    const uint32_t most = TS_GPU_LAUNCHES * 3 / 4;
    for (uint32_t s = 0; s < SESSIONS; s++)
        for (uint32_t i = 0; i < 9; i++) {
            job_init(&jobs[s][i], r.pages[s], i + 1);
            ts_gpu_batch_submit(r.batch, &jobs[s][i].job);
            if (s == 0 && i == 8) /* 8 of a session wait on the device, the 9th waits here */
                fake_gpu_await_waiting(r.gpu, 8);
        }
    fake_gpu_await_waiting(r.gpu, most);
    job_init(&other, NULL, 0);
    ts_gpu_batch_submit(r.batch, &other.job);
    await_good(&other);
    for (uint32_t s = 0; s < SESSIONS; s++)
        submitted(r.pages[s], 9);
    for (uint32_t s = 0; s < SESSIONS; s++)
        for (uint32_t i = 0; i < 9; i++)
            await_good(&jobs[s][i]);
    assert_int_equal(fake_gpu_read(r.gpu).most_waiting, most);
    rig_free(&r);
}

/* Each has a lane: half of them stay free for those that can go at once. */
static void not_all_workers_are_waited_for_on_the_device(void **state)
{
    (void)state;
    rig r;
    rig_new(&r, 3600000);
    test_job jobs[SESSIONS], other;
    for (uint32_t s = 0; s < SESSIONS; s++) {
        job_init(&jobs[s], r.pages[s], 1);
        ts_gpu_batch_submit(r.batch, &jobs[s].job);
    }
    fake_gpu_await_waiting(r.gpu, TS_GPU_LANES / 2);
    job_init(&other, NULL, 0);
    ts_gpu_batch_submit(r.batch, &other.job);
    await_good(&other);
    submitted(r.pages[SESSIONS - 1], 1); /* ready: it needs no lane to wait in */
    await_good(&jobs[SESSIONS - 1]);
    for (uint32_t s = 0; s < SESSIONS - 1; s++)
        submitted(r.pages[s], 1);
    for (uint32_t s = 0; s < SESSIONS - 1; s++)
        await_good(&jobs[s]);
    assert_int_equal(fake_gpu_read(r.gpu).most_waiting, TS_GPU_LANES / 2);
    rig_free(&r);
}

static void a_run_that_is_submitted_too_late_fails_alone(void **state)
{
    (void)state;
    rig r;
    rig_new(&r, 50);
    test_job late, next;
    ts_signals_page *page = r.pages[1];
    job_init(&late, page, 1);
    ts_gpu_batch_submit(r.batch, &late.job);
    await_job(&late);
    assert_int_equal(late.job.status, TS_ETIMEOUT);
    assert_string_equal(late.job.why, "the worker did not submit run 1 in time");
    assert_int_equal(page->host->completed, 1); /* nor does the worker's stream wait on */
    submitted(page, 2);
    job_init(&next, page, 2);
    ts_gpu_batch_submit(r.batch, &next.job);
    await_good(&next);
    rig_free(&r);
}

static void a_batch_that_ends_lets_go_whoever_waits(void **state)
{
    (void)state;
    rig r;
    rig_new(&r, 3600000);
    test_job jobs[10];
    ts_signals_page *page = r.pages[0];
    for (uint32_t i = 0; i < 10; i++) { /* on the device and here */
        job_init(&jobs[i], page, i + 1);
        __atomic_store_n(&page->ordered, i + 1, __ATOMIC_RELEASE);
        ts_gpu_batch_submit(r.batch, &jobs[i].job);
    }
    fake_gpu_await_waiting(r.gpu, 8);
    rig_free(&r);
    for (uint32_t i = 0; i < 10; i++) {
        assert_true(is_done(&jobs[i]));
        await_job(&jobs[i]);
    }
}

static void a_lost_device_fails_every_job_and_is_told_once(void **state)
{
    (void)state;
    rig r;
    rig_new(&r, 3600000);
    test_job good, waiting, bad, late;
    job_init(&good, NULL, 0);
    ts_gpu_batch_submit(r.batch, &good.job);
    await_good(&good);
    job_init(&waiting, r.pages[2], 1);
    ts_gpu_batch_submit(r.batch, &waiting.job);
    fake_gpu_await_waiting(r.gpu, 1);
    fake_gpu_break(r.gpu);
    job_init(&bad, NULL, 0);
    ts_gpu_batch_submit(r.batch, &bad.job);
    await_job(&bad);
    assert_int_equal(bad.job.status, TS_EDEVICE);
    assert_string_equal(bad.job.why, "cuda:0 (a fake) failed: cudaErrorFake");
    job_init(&late, r.pages[4], 1); /* fails at once, submitted or not */
    ts_gpu_batch_submit(r.batch, &late.job);
    await_job(&late);
    assert_int_equal(late.job.status, TS_EDEVICE);
    assert_int_equal(r.pages[4]->host->completed, 1);
    submitted(r.pages[2], 1);
    await_job(&waiting);
    assert_int_equal(waiting.job.status, TS_EDEVICE);
    rig_free(&r);
    assert_int_equal(failures, 1);
    assert_string_equal(failure, "cuda:0 (a fake) failed: cudaErrorFake");
}

/* ---- the service around it ---- */

typedef struct test_request {
    ts_request request; /* first */
    Tspb__Reply *reply;
    sem_t answered;
} test_request;

static void on_send(ts_request *request, const void *bytes, size_t size)
{
    test_request *t = (test_request *)request;
    t->reply = tspb__reply__unpack(NULL, size, bytes);
    sem_post(&t->answered);
}

static ts_service service;
static uint64_t next_id;

static void send(test_request *t, Tspb__Request *message)
{
    memset(t, 0, sizeof *t);
    sem_init(&t->answered, 0, 0);
    message->request_id = ++next_id;
    t->request = (ts_request){
        .work = {.run = ts_service_request}, .pipe = 1, .message = message, .send = on_send};
    ts_queue_run(&service.queue, &t->request.work, &service);
}

static Tspb__Reply *answer(test_request *t)
{
    while (sem_wait(&t->answered) != 0)
        ;
    assert_non_null(t->reply);
    return t->reply;
}

static bool is_answered(test_request *t)
{
    int value;
    sem_getvalue(&t->answered, &value);
    return value > 0;
}

/* Sends, waits, and expects the status; the body stays with *t until drop. */
static Tspb__Reply *call(test_request *t, Tspb__Request *message, ts_status expected)
{
    send(t, message);
    Tspb__Reply *reply = answer(t);
    if (reply->status != (uint32_t)expected)
        fail_msg("%s: %s", ts_status_name((ts_status)reply->status), reply->message);
    return reply;
}

static void drop(test_request *t)
{
    tspb__reply__free_unpacked(t->reply, NULL);
    sem_destroy(&t->answered);
}

static void *engine_main(void *arg)
{
    ts_service_run(arg);
    return NULL;
}

static sem_t handled;

static void on_handle(ts_handle_ask *ask)
{
    (void)ask;
    sem_post(&handled);
}

#define REQUEST(name, kind, CASE, init)                                                            \
    Tspb__##kind name##_body = init;                                                               \
    Tspb__Request name = TSPB__REQUEST__INIT;                                                      \
    name.body_case = TSPB__REQUEST__BODY_##CASE

static void service_start(ts_gpu *gpu, pthread_t *engine)
{
    ts_engine_limits limits;
    memset(&service, 0, sizeof service);
    next_id = 0;
    ts_log_init(TS_LOG_ERROR);
    ts_engine_default_limits(&limits);
    limits.sessions = 8;
    ts_queue_init(&service.queue);
    service.engine = ts_engine_new(&limits);
    service.by_session = calloc(limits.sessions, sizeof(ts_connection *));
    service.attention = ts_attention_new(1, TS_ISA_AUTO);
    service.batch = ts_batch_new(service.attention);
    service.gpus[0].gpu = gpu;
    OK(ts_gpu_batch_new(gpu, limits.sessions, 3600000, on_failure, &service.gpus[0].batch, why,
                        sizeof why));
    service.num_gpus = 1;
    ts_pool_config config = {.name = "p",
                             .geometry = geometry,
                             .num_blocks = 16,
                             .slab_blocks = 16,
                             .sequences_max = 16,
                             .sequence_tokens_max = 64,
                             .tenant_blocks_max = UINT64_MAX,
                             .on_gpu = true};
    OK(ts_engine_add_pool(service.engine, &config, NULL, why, sizeof why));
    OK(ts_memory_cuda_vmm_new(gpu, 1, 16 * ts_geometry_block_bytes(&geometry), &service.memory[0],
                              why, sizeof why));
    service.gpu_of[0] = &service.gpus[0];
    assert_int_equal(pthread_create(engine, NULL, engine_main, &service), 0);
    ts_pipe_event *event = calloc(1, sizeof *event);
    *event = (ts_pipe_event){.work = {.run = ts_service_pipe_added}, .pipe = 1};
    ts_queue_run(&service.queue, &event->work, &service);
}

static void service_stop(pthread_t engine)
{
    ts_batch_free(service.batch);
    ts_gpu_batch_free(service.gpus[0].batch);
    ts_queue_close(&service.queue);
    pthread_join(engine, NULL);
    assert_int_equal(service.engine->live_sessions, 0);
    assert_int_equal(service.engine->pools[0].books.used, 0);
    assert_null(service.waiting);
    ts_service_fini(&service);
    ts_queue_fini(&service.queue);
}

/* Asks for the page of signals as the handle socket does, on the engine's owner. */
static ts_signals *ask_for_signals(uint64_t session, const uint8_t *token)
{
    static ts_handle_ask ask;
    ask = (ts_handle_ask){.work = {.run = ts_service_handle},
                          .request = {.magic = TS_HANDLE_MAGIC,
                                      .protocol = TS_PROTOCOL,
                                      .session = session,
                                      .kind = TS_HANDLE_SIGNALS},
                          .done = on_handle};
    memcpy(ask.request.token, token, TS_TOKEN_BYTES);
    sem_init(&handled, 0, 0);
    ts_queue_run(&service.queue, &ask.work, &service);
    while (sem_wait(&handled) != 0)
        ;
    assert_int_equal(ask.reply.status, TS_OK);
    assert_true(ask.fd >= 0);
    assert_int_equal(ask.reply.bytes, TS_SIGNALS_BYTES);
    void *page = mmap(NULL, TS_SIGNALS_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, ask.fd, 0);
    assert_ptr_not_equal(page, MAP_FAILED);
    close(ask.fd);
    return page;
}

static void a_commit_waits_for_ordered_runs_and_a_dead_worker_is_let_go(void **state)
{
    (void)state;
    pthread_t engine;
    test_request t, commit_request, abort_request, more[5];
    alarm(120);
    ts_gpu *gpu = fake_gpu_new();
    service_start(gpu, &engine);
    REQUEST(open, SessionOpen, SESSION_OPEN, TSPB__SESSION_OPEN__INIT);
    open_body.protocol = TS_PROTOCOL;
    open.session_open = &open_body;
    Tspb__Reply *reply = call(&t, &open, TS_OK);
    ts_signals *signals =
        ask_for_signals(reply->session_opened->session, reply->session_opened->token.data);
    drop(&t);
    REQUEST(pool, PoolOpen, POOL_OPEN, TSPB__POOL_OPEN__INIT);
    pool_body.name = (char *)"p";
    pool.pool_open = &pool_body;
    call(&t, &pool, TS_OK);
    drop(&t);
    REQUEST(exchange, ExchangeOpen, EXCHANGE_OPEN, TSPB__EXCHANGE_OPEN__INIT);
    exchange_body.bytes = 4096;
    exchange_body.on_device = true;
    exchange.exchange_open = &exchange_body;
    reply = call(&t, &exchange, TS_OK);
    assert_true(reply->exchange_opened->has_descriptor);
    drop(&t);
    REQUEST(create, SeqCreate, SEQ_CREATE, TSPB__SEQ_CREATE__INIT);
    create_body.count = 1;
    create.seq_create = &create_body;
    uint64_t seq = call(&t, &create, TS_OK)->seqs->seqs[0];
    drop(&t);
    uint32_t one = 1;
    REQUEST(begin, StepBegin, STEP_BEGIN, TSPB__STEP_BEGIN__INIT);
    begin_body.seqs = &seq;
    begin_body.new_tokens = &one;
    begin_body.n_seqs = begin_body.n_new_tokens = 1;
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
    run_body.ordered = true;
    run_body.order = 2;
    run.step_run = &run_body;
    reply = call(&t, &run, TS_EINVAL);
    assert_string_equal(reply->message, "run number 2; the session's next is 1");
    drop(&t);
    run_body.order = 1;
    call(&t, &run, TS_OK); /* answered, though nothing was submitted */
    drop(&t);
    fake_gpu_await_waiting(gpu, 1);
    assert_int_equal(fake_gpu_read(gpu).kernel, TS_KERNEL_V3);
    REQUEST(commit, StepCommit, STEP_COMMIT, TSPB__STEP_COMMIT__INIT);
    commit_body.step = step;
    commit.step_commit = &commit_body;
    send(&commit_request, &commit);
    REQUEST(abort, StepAbort, STEP_ABORT, TSPB__STEP_ABORT__INIT);
    abort_body.step = step;
    abort.step_abort = &abort_body;
    send(&abort_request, &abort); /* waits as well, and comes second */
    REQUEST(lengths, SeqLengths, SEQ_LENGTHS, TSPB__SEQ_LENGTHS__INIT);
    lengths_body.seqs = &seq;
    lengths_body.n_seqs = 1;
    lengths.seq_lengths = &lengths_body;
    reply = call(&t, &lengths, TS_OK); /* the service goes on, and nobody sees the token */
    assert_int_equal(reply->lengths->lengths[0], 0);
    drop(&t);
    assert_false(is_answered(&commit_request));
    __atomic_store_n(&signals->submitted, 1, __ATOMIC_RELEASE);
    assert_int_equal(answer(&commit_request)->status, TS_OK);
    assert_int_equal(answer(&abort_request)->status, TS_ENOENT);
    drop(&abort_request);
    assert_int_equal(__atomic_load_n(&signals->completed, __ATOMIC_ACQUIRE), 1);
    drop(&commit_request);
    assert_int_equal(call(&t, &lengths, TS_OK)->lengths->lengths[0], 1);
    drop(&t);

    /* 4 runs of a step may be under way; the 5th is not refused but waits. Then the worker dies. */
    run_body.step = call(&t, &begin, TS_OK)->step_begun->step;
    drop(&t);
    for (uint32_t i = 0; i < 5; i++) {
        run_body.order = 2 + i;
        send(&more[i], &run);
        if (i < 4)
            assert_int_equal(answer(&more[i])->status, TS_OK);
    }
    fake_gpu_await_waiting(gpu, 4);
    assert_int_equal(fake_gpu_read(gpu).plans, 2); /* one for each step, not for each run */
    assert_false(is_answered(&more[4]));
    ts_pipe_event *event = calloc(1, sizeof *event);
    *event = (ts_pipe_event){.work = {.run = ts_service_pipe_removed}, .pipe = 1};
    ts_queue_run(&service.queue, &event->work, &service);
    fake_gpu_await_waiting(gpu, 0);
    service_stop(engine);
    for (uint32_t i = 0; i < 5; i++)
        drop(&more[i]);
    munmap(signals, TS_SIGNALS_BYTES);
    alarm(0);
}

/* On the engine's owner: what an operator may not do to cuda-ipc memory. */
static void keep_ipc_memory(ts_work *work, void *unused)
{
    (void)work;
    (void)unused;
    static const uint8_t handle[TS_IPC_HANDLE_BYTES];
    ts_pool_books *books = &service.engine->pools[0].books;
    ts_answer a = {0};
    service.memory[0]->ipc_handle = handle;
    OK(ts_pool_add_tenant(books, 0));
    OK(ts_pool_grant(books, 0, 0));
    assert_int_equal(ts_devices_remove(&service, 0, &a), TS_EPERM);
    assert_string_equal(a.message, "pool 'p' is cuda-ipc memory that its tenant may still map: it "
                                   "stays until the daemon is restarted");
    assert_int_equal(ts_devices_resize(&service, 0, 8, &a), TS_EINVAL);
    assert_string_equal(a.message, "pool 'p' is cuda-ipc memory: one piece, which keeps its size");
    service.memory[0]->ipc_handle = NULL; /* as it was: of VMM, it goes */
    assert_int_equal(ts_devices_resize(&service, 0, 17, &a), TS_EINVAL);
    assert_string_equal(a.message, "17 blocks for pool 'p'; the limits are 1..16, its memory_max");
    OK(ts_devices_remove(&service, 0, &a));
    assert_false(ts_engine_has_pool(service.engine, 0));
    assert_null(service.memory[0]);
}

static void memory_that_a_tenant_may_still_map_is_not_freed(void **state)
{
    (void)state;
    pthread_t engine;
    alarm(120);
    service_start(fake_gpu_new(), &engine);
    ts_work work = {.run = keep_ipc_memory};
    ts_queue_run(&service.queue, &work, &service);
    service_stop(engine);
    alarm(0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(jobs_that_are_ready_together_and_alike_become_one_launch),
        cmocka_unit_test(an_ordered_run_starts_when_it_is_submitted_and_says_when_it_is_done),
        cmocka_unit_test(runs_of_one_session_complete_in_order),
        cmocka_unit_test(runs_that_are_queued_ahead_follow_each_other),
        cmocka_unit_test(workers_that_do_not_submit_take_only_their_share),
        cmocka_unit_test(not_all_workers_are_waited_for_on_the_device),
        cmocka_unit_test(a_run_that_is_submitted_too_late_fails_alone),
        cmocka_unit_test(a_batch_that_ends_lets_go_whoever_waits),
        cmocka_unit_test(a_lost_device_fails_every_job_and_is_told_once),
        cmocka_unit_test(a_commit_waits_for_ordered_runs_and_a_dead_worker_is_let_go),
        cmocka_unit_test(memory_that_a_tenant_may_still_map_is_not_freed),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
