#define _GNU_SOURCE
#include "fuzz_service.h"

#include "exchange_open.h"
#include "invariants.h"
#include "request.h"

#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

ts_service fuzz_service;
static uint32_t last_pipe;
static uint64_t last_request;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t told = PTHREAD_COND_INITIALIZER;

/* ---- what runs as the engine's owner, and waiting for it ---- */

/* The engine's owner of the moment may be another thread. */
static void tell(bool *done)
{
    pthread_mutex_lock(&lock);
    *done = true;
    pthread_cond_signal(&told);
    pthread_mutex_unlock(&lock);
}

static void wait_for(const bool *done)
{
    pthread_mutex_lock(&lock);
    while (!*done)
        pthread_cond_wait(&told, &lock);
    pthread_mutex_unlock(&lock);
}

typedef struct owner_call {
    ts_work work;
    void (*run)(void *arg);
    void *arg;
    bool done;
} owner_call;

static void run_call(ts_work *work, void *service)
{
    owner_call *call = (owner_call *)work;
    (void)service;
    call->run(call->arg);
    tell(&call->done);
}

void fuzz_as_owner(void (*run)(void *arg), void *arg)
{
    owner_call call = {.work.run = run_call, .run = run, .arg = arg};
    ts_queue_run(&fuzz_service.exec.queue, &call.work, &fuzz_service);
    wait_for(&call.done);
}

typedef struct condition {
    bool (*holds)(void *arg);
    void *arg;
    bool held;
} condition;

static void look(void *arg)
{
    condition *c = arg;
    c->held = c->holds(c->arg);
}

void fuzz_await(bool (*holds)(void *arg), void *arg)
{
    condition c = {.holds = holds, .arg = arg};
    for (;;) {
        fuzz_as_owner(look, &c);
        if (c.held)
            return;
        sched_yield();
    }
}

/* ---- requests ---- */

typedef struct fuzz_request {
    ts_request request; /* first */
    bool sent;
    Tspb__Reply *reply;
} fuzz_request;

static void on_send(ts_request *request, const void *reply, size_t bytes)
{
    fuzz_request *f = (fuzz_request *)request;
    if (f->sent)
        abort(); /* exactly once */
    if (bytes > 0) {
        f->reply = tspb__reply__unpack(NULL, bytes, reply);
        if (f->reply == NULL)
            abort();
    }
    tell(&f->sent);
}

Tspb__Reply *fuzz_call(uint32_t pipe, Tspb__Request *message)
{
    fuzz_request f = {.request = {.work = {.run = ts_service_request},
                                  .pipe = pipe,
                                  .message = message,
                                  .send = on_send}};
    ts_queue_run(&fuzz_service.exec.queue, &f.request.work, &fuzz_service);
    wait_for(&f.sent);
    return f.reply;
}

/* None that an input would choose. */
static uint64_t own_request_id(void)
{
    return UINT64_MAX / 2 + ++last_request;
}

/* A request that each service must answer with TS_OK. */
static Tspb__Reply *call_ok(uint32_t pipe, Tspb__Request *message)
{
    message->request_id = own_request_id();
    Tspb__Reply *reply = fuzz_call(pipe, message);
    if (reply == NULL || reply->status != TS_OK) {
        fprintf(stderr, "%s\n", reply == NULL ? "no answer" : reply->message);
        abort();
    }
    return reply;
}

static void pipe_event(void (*run)(ts_work *, void *), uint32_t pipe, uint32_t uid)
{
    ts_pipe_event *event = calloc(1, sizeof *event);
    if (event == NULL)
        abort();
    event->pipe = pipe;
    event->uid = uid;
    event->work.run = run;
    ts_queue_run(&fuzz_service.exec.queue, &event->work, &fuzz_service);
}

uint32_t fuzz_connect(uint32_t uid, bool writable)
{
    uint32_t pipe = ++last_pipe;
    Tspb__SessionOpen open = TSPB__SESSION_OPEN__INIT;
    Tspb__PoolOpen pool = TSPB__POOL_OPEN__INIT;
    Tspb__Request r = TSPB__REQUEST__INIT;
    pipe_event(ts_service_pipe_added, pipe, uid);
    open.protocol = TS_PROTOCOL;
    r.body_case = TSPB__REQUEST__BODY_SESSION_OPEN;
    r.session_open = &open;
    tspb__reply__free_unpacked(call_ok(pipe, &r), NULL);
    pool.name = (char *)"fuzz";
    pool.writable = writable;
    r.body_case = TSPB__REQUEST__BODY_POOL_OPEN;
    r.pool_open = &pool;
    tspb__reply__free_unpacked(call_ok(pipe, &r), NULL);
    return pipe;
}

void fuzz_disconnect(uint32_t pipe)
{
    pipe_event(ts_service_pipe_removed, pipe, 0);
}

/* Sends a request that is answered with sequences. */
static void call_for_sequences(uint32_t pipe, Tspb__Request *r, uint64_t *seqs)
{
    r->request_id = own_request_id();
    Tspb__Reply *reply = fuzz_call(pipe, r);
    if (reply != NULL && reply->body_case == TSPB__REPLY__BODY_SEQS)
        memcpy(seqs, reply->seqs->seqs, reply->seqs->n_seqs * sizeof *seqs);
    tspb__reply__free_unpacked(reply, NULL);
}

void fuzz_create(uint32_t pipe, uint32_t count, uint64_t *seqs)
{
    Tspb__SeqCreate create = TSPB__SEQ_CREATE__INIT;
    Tspb__Request r = TSPB__REQUEST__INIT;
    create.count = count;
    r.body_case = TSPB__REQUEST__BODY_SEQ_CREATE;
    r.seq_create = &create;
    call_for_sequences(pipe, &r, seqs);
}

void fuzz_fork(uint32_t pipe, uint64_t parent, uint32_t count, uint64_t *seqs)
{
    Tspb__SeqFork fork = TSPB__SEQ_FORK__INIT;
    Tspb__Request r = TSPB__REQUEST__INIT;
    fork.parent = parent;
    fork.count = count;
    r.body_case = TSPB__REQUEST__BODY_SEQ_FORK;
    r.seq_fork = &fork;
    call_for_sequences(pipe, &r, seqs);
}

/* ---- exchanges, books ---- */

typedef struct gift {
    uint32_t pipe;
    uint64_t bytes;
} gift;

static void take_gift(void *arg)
{
    const gift *g = arg;
    char why[256];
    uint64_t bytes;
    ts_connection *c = ts_service_connection(&fuzz_service, g->pipe);
    if (c->session == 0) /* the handle socket finds connections by their sessions */
        return;
    if (g->bytes > 0 &&
        (ts_filling_new(&c->memory.new_exchange, g->bytes, why, sizeof why) != TS_OK ||
         fallocate(c->memory.new_exchange.fd, 0, 0, (off_t)g->bytes) != 0))
        abort();
    (void)ts_exchange_taken(&fuzz_service, c, &bytes, why, sizeof why);
}

void fuzz_give_exchange(uint32_t pipe, uint64_t bytes)
{
    fuzz_as_owner(take_gift, &(gift){pipe, bytes});
}

static void on_problem(void *arg, const char *sentence)
{
    (void)arg;
    fprintf(stderr, "%s\n", sentence);
    abort();
}

static void check_books(void *arg)
{
    (void)arg;
    if (ts_invariants_check(fuzz_service.exec.engine, on_problem, NULL) == 0)
        abort();
}

void fuzz_check_books(void)
{
    fuzz_as_owner(check_books, NULL);
}

/* ---- time ---- */

static void wait_ms(void *arg)
{
    ts_engine *e = fuzz_service.exec.engine;
    ts_answer answer;
    ts_engine_apply(
        e, &(ts_command){.op = TS_OP_SWEEP, .now_ms = e->now_ms + *(const uint64_t *)arg}, &answer);
}

void fuzz_wait(uint64_t ms)
{
    fuzz_as_owner(wait_ms, &ms);
}

/* ---- life ---- */

static void *engine_main(void *arg)
{
    ts_service_run(arg);
    return NULL;
}

void fuzz_service_start(void)
{
    ts_service *s = &fuzz_service;
    char why[256];
    ts_engine_limits limits;
    ts_log_init(TS_LOG_ERROR);
    ts_engine_default_limits(&limits);
    limits.exchange_bytes = 1 << 20;
    if (!ts_service_init(s, &limits))
        abort();
    s->exec.attention = ts_attention_new(1, TS_ISA_AUTO);
    s->exec.host = ts_host_executor_new(s->exec.attention);
    ts_pool_config config = {
        .name = "fuzz",
        .geometry = {.layers = 2, .kv_heads = 2, .head_dim = 32, .block_tokens = 4},
        .num_blocks = 48,
        .sequences_max = 256,
        .sequence_tokens_max = 64,
        .tenant_blocks_max = 40,
        .client_write = TS_CLIENT_WRITE_ALL,
        .model = "fuzz",
    };
    config.slab_blocks = ts_geometry_slab_blocks(&config.geometry, 8192, 4096);
    ts_answer added;
    ts_engine_apply(s->exec.engine, &(ts_command){.op = TS_OP_POOL_ADD, .pool_add.config = &config},
                    &added);
    if (s->exec.attention == NULL || s->exec.host == NULL || added.status != TS_OK ||
        ts_memory_host_new(s->exec.engine->pools[0].books.num_slabs,
                           ts_geometry_block_bytes(&config.geometry) * config.slab_blocks,
                           &s->exec.memory[0], why, sizeof why) != TS_OK)
        abort();
    pthread_t engine;
    if (pthread_create(&engine, NULL, engine_main, s) != 0)
        abort();
}
