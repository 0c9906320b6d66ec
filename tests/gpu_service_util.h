/* The service around a fake GPU, without a transport: its requests are put into the queue. */
#ifndef TS_TEST_GPU_SERVICE_UTIL_H
#define TS_TEST_GPU_SERVICE_UTIL_H

#include "standstill.h"
#include "test_util.h"

#include "fake_gpu.h"
#include "fd_export.h"
#include "gpu_executor.h"
#include "log.h"
#include "pool_memory.h"
#include "request.h"
#include "slab_supply.h"
#include "unconst.h"

#include <sched.h>
#include <semaphore.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#define OK(call) assert_int_equal((call), TS_OK)

static char why[256];
static const ts_geometry geometry = {
    .layers = 1, .kv_heads = 1, .head_dim = 32, .block_tokens = 4, .dtype = TS_DTYPE_FP32};

static atomic_uint failures; /* of the device: none */

static inline void on_failure(const char *sentence)
{
    (void)sentence;
    atomic_fetch_add(&failures, 1);
}

typedef struct test_request {
    ts_request request; /* first */
    Tspb__Reply *reply;
    sem_t answered;
} test_request;

static inline void on_send(ts_request *request, const void *bytes, size_t size)
{
    test_request *t = (test_request *)request;
    t->reply = tspb__reply__unpack(NULL, size, bytes);
    sem_post(&t->answered);
}

static ts_service service;
static uint64_t next_id;
static uint32_t pipe_used = 1; /* the connection that requests come by */

static inline void submit(test_request *t, Tspb__Request *message)
{
    memset(t, 0, sizeof *t);
    sem_init(&t->answered, 0, 0);
    message->request_id = ++next_id;
    t->request = (ts_request){.work = {.run = ts_service_request},
                              .pipe = pipe_used,
                              .message = message,
                              .send = on_send};
    ts_queue_run(&service.exec.queue, &t->request.work, &service);
}

static inline Tspb__Reply *answer(test_request *t)
{
    while (sem_wait(&t->answered) != 0)
        ;
    assert_non_null(t->reply);
    return t->reply;
}

static inline bool is_answered(test_request *t)
{
    int value;
    sem_getvalue(&t->answered, &value);
    return value > 0;
}

/* Sends, waits, and expects the status; the body stays with *t until drop. */
static inline Tspb__Reply *call(test_request *t, Tspb__Request *message, ts_status expected)
{
    submit(t, message);
    Tspb__Reply *reply = answer(t);
    if (reply->status != (uint32_t)expected)
        fail_msg("%s: %s", ts_status_name((ts_status)reply->status), reply->message);
    return reply;
}

static inline void drop(test_request *t)
{
    tspb__reply__free_unpacked(t->reply, NULL);
    sem_destroy(&t->answered);
}

static inline void *engine_main(void *arg)
{
    ts_service_run(arg);
    return NULL;
}

static sem_t handled;

static inline void on_handle(ts_handle_ask *ask)
{
    (void)ask;
    sem_post(&handled);
}

#define REQUEST(name, kind, CASE, init)                                                            \
    Tspb__##kind name##_body = init;                                                               \
    Tspb__Request name = TSPB__REQUEST__INIT;                                                      \
    name.body_case = TSPB__REQUEST__BODY_##CASE

enum { OTHER_UID = 7 }; /* of all connections but the first, */
static bool same_user;  /* ... unless they are one user's */

static uint32_t worker_pid; /* of the connections */

static inline void connection_open(uint32_t pipe, uint32_t uid)
{
    ts_pipe_event *event = calloc(1, sizeof *event);
    *event = (ts_pipe_event){
        .work = {.run = ts_service_pipe_added}, .pipe = pipe, .uid = uid, .pid = worker_pid};
    ts_queue_run(&service.exec.queue, &event->work, &service);
}

static inline void service_start_with(ts_gpu *gpu, pthread_t *engine, uint32_t blocks,
                                      uint32_t slab_blocks)
{
    ts_engine_limits limits;
    memset(&service, 0, sizeof service);
    next_id = 0;
    ts_log_init(TS_LOG_ERROR);
    ts_engine_default_limits(&limits);
    limits.sessions = 8;
    assert_true(ts_service_init(&service, &limits));
    service.exec.attention = ts_attention_new(1, TS_ISA_AUTO);
    service.exec.host = ts_host_executor_new(service.exec.attention);
    service.exec.gpus[0].gpu = gpu;
    service.exec.gpus[0].exchange_bytes = calloc(TS_TENANTS_MAX, sizeof(uint64_t));
    OK(ts_done_words_new(gpu, limits.sessions, &service.exec.gpus[0].words, why, sizeof why));
    OK(ts_gpu_executor_new(gpu, 3600000, 20, on_failure, &service.exec.gpus[0].executor, why,
                           sizeof why));
    service.exec.num_gpus = 1;
    ts_pool_config config = {.name = "p",
                             .geometry = geometry,
                             .num_blocks = blocks,
                             .slab_blocks = slab_blocks,
                             .sequences_max = 16,
                             .sequence_tokens_max = 256,
                             .tenant_blocks_max = UINT64_MAX,
                             .client_write = TS_CLIENT_WRITE_ALL,
                             .on_gpu = true,
                             .device = "cuda:0"};
    ts_answer added;
    ts_engine_apply(service.exec.engine,
                    &(ts_command){.op = TS_OP_POOL_ADD, .pool_add.config = &config}, &added);
    OK(added.status);
    OK(ts_memory_cuda_vmm_new(gpu, blocks / slab_blocks,
                              slab_blocks * ts_geometry_block_bytes(&geometry),
                              &service.exec.memory[0], why, sizeof why));
    service.exec.gpu_of[0] = &service.exec.gpus[0];
    assert_int_equal(pthread_create(engine, NULL, engine_main, &service), 0);
    connection_open(1, 0);
}

static inline void service_start(ts_gpu *gpu, pthread_t *engine)
{
    service_start_with(gpu, engine, 16, 16);
}

static inline void service_stop(pthread_t engine)
{
    ts_slab_supply_stop(&service.exec);
    ts_host_executor_free(service.exec.host);
    ts_gpu_executor_free(service.exec.gpus[0].executor);
    ts_queue_close(&service.exec.queue);
    pthread_join(engine, NULL);
    assert_int_equal(service.exec.engine->live_sessions, 0);
    assert_int_equal(service.exec.engine->pools[0].books.used, 0);
    assert_null(service.waiting);
    assert_int_equal(atomic_load(&failures), 0);
    ts_service_close_connections(&service);
    ts_service_fini(&service);
    ts_queue_fini(&service.exec.queue);
}

/* A session of a worker's, and its page of signals. */
typedef struct worker {
    uint32_t pipe, uid;
    uint64_t session;
    uint8_t token[TS_TOKEN_BYTES];
    ts_signals *signals;
} worker;

static ts_handle_ask ask;

/* Asks as the handle socket does, on the engine's owner. */
static inline void ask_for(const worker *w, uint32_t kind, uint64_t bytes)
{
    ask = (ts_handle_ask){.work = {.run = ts_fd_export},
                          .uid = w->uid,
                          .request = {.magic = TS_HANDLE_MAGIC,
                                      .protocol = TS_PROTOCOL,
                                      .session = w->session,
                                      .kind = kind,
                                      .bytes = bytes},
                          .done = on_handle};
    memcpy(ask.request.token, w->token, TS_TOKEN_BYTES);
    sem_init(&handled, 0, 0);
    ts_queue_run(&service.exec.queue, &ask.work, &service);
    while (sem_wait(&handled) != 0)
        ;
}

/* Opens a session and the pool, and maps its page of signals. */
static inline void worker_open(worker *w)
{
    test_request t;
    REQUEST(open, SessionOpen, SESSION_OPEN, TSPB__SESSION_OPEN__INIT);
    open_body.protocol = TS_PROTOCOL;
    open.session_open = &open_body;
    const Tspb__SessionOpened *opened = call(&t, &open, TS_OK)->session_opened;
    w->session = opened->session;
    memcpy(w->token, opened->token.data, TS_TOKEN_BYTES);
    w->pipe = pipe_used;
    w->uid = pipe_used == 1 || same_user ? 0 : OTHER_UID;
    drop(&t);
    ask_for(w, TS_HANDLE_SIGNALS, 0);
    assert_int_equal(ask.reply.status, TS_OK);
    assert_true(ask.fd >= 0);
    assert_int_equal(ask.reply.bytes, TS_SIGNALS_BYTES);
    w->signals = mmap(NULL, TS_SIGNALS_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, ask.fd, 0);
    assert_ptr_not_equal(w->signals, MAP_FAILED);
    close(ask.fd);
    REQUEST(pool, PoolOpen, POOL_OPEN, TSPB__POOL_OPEN__INIT);
    pool_body.name = (char *)"p";
    pool_body.writable = true;
    pool.pool_open = &pool_body;
    call(&t, &pool, TS_OK);
    drop(&t);
}

/* Its connection ends. */
static inline void worker_die(const worker *w)
{
    ts_pipe_event *event = calloc(1, sizeof *event);
    *event = (ts_pipe_event){.work = {.run = ts_service_pipe_removed}, .pipe = w->pipe};
    ts_queue_run(&service.exec.queue, &event->work, &service);
    munmap(w->signals, TS_SIGNALS_BYTES);
}

/* Asks for an exchange of the GPU's memory, and expects the status and what the sentence has. */
static inline void open_exchange(uint64_t bytes, ts_status expected, const char *sentence)
{
    test_request t;
    REQUEST(exchange, ExchangeOpen, EXCHANGE_OPEN, TSPB__EXCHANGE_OPEN__INIT);
    exchange_body.bytes = bytes;
    exchange_body.on_device = true;
    exchange.exchange_open = &exchange_body;
    const Tspb__Reply *reply = call(&t, &exchange, expected);
    if (expected == TS_OK)
        assert_true(reply->exchange_opened->has_descriptor);
    else
        assert_non_null(strstr(reply->message, sentence));
    drop(&t);
}

static inline void create_seqs(uint64_t *seqs, uint32_t count)
{
    test_request t;
    REQUEST(create, SeqCreate, SEQ_CREATE, TSPB__SEQ_CREATE__INIT);
    create_body.count = count;
    create.seq_create = &create_body;
    memcpy(seqs, call(&t, &create, TS_OK)->seqs->seqs, count * sizeof *seqs);
    drop(&t);
}

#endif
