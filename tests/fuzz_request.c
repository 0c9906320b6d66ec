/*
 * Fuzz target: requests into the service and its engine, as the transport hands them over: through
 * the queue, run here where the engine is idle and by its own thread where it isn't. An input is a
 * list of requests: bytes to be unpacked as they are, or fields to build a request of, which may
 * name ids that earlier answers gave. After each input the engine's books must agree.
 */
#define _GNU_SOURCE
#include "exchange_open.h"
#include "invariants.h"
#include "log.h"
#include "pool_stats_cache.h"
#include "request.h"

#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static ts_service service;
static uint32_t next_pipe;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t told = PTHREAD_COND_INITIALIZER;

typedef struct input {
    const uint8_t *at, *end;
} input;

static uint32_t take(input *in, unsigned bytes)
{
    uint32_t x = 0;
    for (; bytes > 0 && in->at < in->end; bytes--)
        x = x << 8 | *in->at++;
    return x;
}

/* Small numbers mostly, sometimes any. */
static uint32_t number(input *in)
{
    uint32_t x = take(in, 1);
    return x < 224 ? x % 32 : take(in, 4);
}

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

typedef struct fuzz_request {
    ts_request request;
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

static void pipe_event(void (*run)(ts_work *, void *), uint32_t pipe, uint32_t uid)
{
    ts_pipe_event *event = calloc(1, sizeof *event);
    event->pipe = pipe;
    event->uid = uid;
    event->work.run = run;
    ts_queue_run(&service.exec.queue, &event->work, &service);
}

/* Hands the request over and waits for its answer. */
static Tspb__Reply *call(uint32_t pipe, Tspb__Request *message)
{
    fuzz_request f = {.request = {.work = {.run = ts_service_request},
                                  .pipe = pipe,
                                  .message = message,
                                  .send = on_send}};
    ts_queue_run(&service.exec.queue, &f.request.work, &service);
    wait_for(&f.sent);
    return f.reply;
}

typedef struct known {
    uint64_t seqs[8], steps[4];
} known;

typedef struct gift {
    ts_work work;
    uint32_t pipe;
    uint64_t bytes;
    bool done;
} gift;

/* Gives the connection's session an exchange, as the handle socket does. */
static void run_gift(ts_work *work, void *arg)
{
    gift *g = (gift *)work;
    char why[256];
    uint64_t bytes;
    ts_connection *c = ts_service_connection(arg, g->pipe);
    if (g->bytes > 0 &&
        (ts_filling_new(&c->memory.new_exchange, g->bytes, why, sizeof why) != TS_OK ||
         fallocate(c->memory.new_exchange.fd, 0, 0, (off_t)g->bytes) != 0))
        abort();
    (void)ts_exchange_taken(arg, c, &bytes, why, sizeof why);
    tell(&g->done);
}

static void give_exchange(uint32_t pipe, uint64_t bytes)
{
    gift g = {.work.run = run_gift, .pipe = pipe, .bytes = bytes};
    ts_queue_run(&service.exec.queue, &g.work, &service);
    wait_for(&g.done);
}

static uint64_t some_id(input *in, const uint64_t *ids, uint32_t count)
{
    uint32_t i = take(in, 1);
    return i < 240 ? ids[i % count] : number(in);
}

static void learn(known *k, const Tspb__Reply *r, uint32_t at)
{
    if (r == NULL)
        return;
    if (r->body_case == TSPB__REPLY__BODY_SEQS)
        for (size_t i = 0; i < r->seqs->n_seqs && i < 3; i++)
            k->seqs[(at + i) % 8] = r->seqs->seqs[i];
    if (r->body_case == TSPB__REPLY__BODY_STEP_BEGUN && r->step_begun->step != 0)
        k->steps[at % 4] = r->step_begun->step;
}

static void one_built(input *in, uint32_t pipe, known *k, uint64_t id)
{
    static const char *const names[] = {"", "a", "b", "fuzz", "nope"};
    Tspb__Request r = TSPB__REQUEST__INIT;
    Tspb__SeqCreate create = TSPB__SEQ_CREATE__INIT;
    Tspb__SeqFork fork = TSPB__SEQ_FORK__INIT;
    Tspb__SeqFree release = TSPB__SEQ_FREE__INIT;
    Tspb__SeqTruncate truncate = TSPB__SEQ_TRUNCATE__INIT;
    Tspb__SeqKeep keep = TSPB__SEQ_KEEP__INIT;
    Tspb__SeqAttach attach = TSPB__SEQ_ATTACH__INIT;
    Tspb__SeqBlocks blocks = TSPB__SEQ_BLOCKS__INIT;
    Tspb__StepBegin begin = TSPB__STEP_BEGIN__INIT;
    Tspb__StepRun run = TSPB__STEP_RUN__INIT;
    Tspb__StepCommit commit = TSPB__STEP_COMMIT__INIT;
    Tspb__StepAbort drop = TSPB__STEP_ABORT__INIT;
    Tspb__ExchangeOpen exchange = TSPB__EXCHANGE_OPEN__INIT;
    Tspb__PoolMap map = TSPB__POOL_MAP__INIT;
    Tspb__PoolOpen open = TSPB__POOL_OPEN__INIT;
    Tspb__PoolClose close = TSPB__POOL_CLOSE__INIT;
    uint64_t ids[4];
    uint32_t numbers[4], count = take(in, 1) % 5;
    uint32_t kind = take(in, 1) % 14;
    for (uint32_t i = 0; i < 4; i++) {
        ids[i] = some_id(in, k->seqs, 8);
        numbers[i] = number(in);
    }
    r.request_id = id;
    switch (kind) {
    case 0:
        create.count = count;
        r.body_case = TSPB__REQUEST__BODY_SEQ_CREATE;
        r.seq_create = &create;
        break;
    case 1:
        fork.parent = ids[0];
        fork.count = count;
        fork.length = numbers[0];
        fork.has_length = numbers[1] & 1;
        r.body_case = TSPB__REQUEST__BODY_SEQ_FORK;
        r.seq_fork = &fork;
        break;
    case 2:
        release.seqs = ids;
        release.n_seqs = count > 4 ? 4 : count;
        r.body_case = TSPB__REQUEST__BODY_SEQ_FREE;
        r.seq_free = &release;
        break;
    case 3:
        truncate.seqs = ids;
        truncate.lengths = numbers;
        truncate.n_seqs = count > 4 ? 4 : count;
        truncate.n_lengths = numbers[3] == 1 ? 1 : truncate.n_seqs;
        r.body_case = TSPB__REQUEST__BODY_SEQ_TRUNCATE;
        r.seq_truncate = &truncate;
        break;
    case 4:
        keep.seq = ids[0];
        keep.name = (char *)names[numbers[0] % 5];
        r.body_case = TSPB__REQUEST__BODY_SEQ_KEEP;
        r.seq_keep = &keep;
        break;
    case 5:
        attach.name = (char *)names[numbers[0] % 5];
        r.body_case = TSPB__REQUEST__BODY_SEQ_ATTACH;
        r.seq_attach = &attach;
        break;
    case 6:
        blocks.seq = ids[0];
        blocks.first = numbers[0];
        blocks.count = numbers[1];
        r.body_case = TSPB__REQUEST__BODY_SEQ_BLOCKS;
        r.seq_blocks = &blocks;
        break;
    case 7:
    case 8:
        begin.seqs = ids;
        begin.new_tokens = numbers;
        begin.n_seqs = begin.n_new_tokens = count > 4 ? 4 : count;
        begin.heads = number(in);
        begin.io_dtype = take(in, 1) % 5;
        begin.append = take(in, 1) & 1;
        r.body_case = TSPB__REQUEST__BODY_STEP_BEGIN;
        r.step_begin = &begin;
        break;
    case 9:
        run.step = some_id(in, k->steps, 4);
        run.layer = number(in) % 4;
        run.q = number(in) * 64ull;
        run.k = number(in) * 64ull;
        run.v = number(in) * 64ull;
        run.out = number(in) * 64ull;
        run.has_sinks = run.has_alibi = run.has_lse = take(in, 1) & 1;
        run.sinks = run.alibi = run.lse = run.scales = number(in) * 64ull;
        run.has_scales = take(in, 1) & 1;
        run.window = number(in);
        run.soft_cap = (float)number(in);
        run.rope_theta = (float)number(in);
        run.rope_dims = number(in);
        run.on_stream = numbers[0] == 1;
        run.number = numbers[1];
        r.body_case = TSPB__REQUEST__BODY_STEP_RUN;
        r.step_run = &run;
        break;
    case 10:
        commit.step = some_id(in, k->steps, 4);
        commit.accepted = numbers;
        commit.n_accepted = count > 4 ? 4 : count;
        r.body_case = TSPB__REQUEST__BODY_STEP_COMMIT;
        r.step_commit = &commit;
        break;
    case 11:
        drop.step = some_id(in, k->steps, 4);
        r.body_case = TSPB__REQUEST__BODY_STEP_ABORT;
        r.step_abort = &drop;
        break;
    case 12:
        if (numbers[0] & 1) {
            close.pool = numbers[1];
            r.body_case = TSPB__REQUEST__BODY_POOL_CLOSE;
            r.pool_close = &close;
        } else {
            open.name = (char *)names[3];
            open.writable = numbers[1] & 1;
            r.body_case = TSPB__REQUEST__BODY_POOL_OPEN;
            r.pool_open = &open;
        }
        break;
    default:
        if (numbers[0] & 1) {
            exchange.bytes = number(in) * 4096ull;
            give_exchange(pipe, exchange.bytes % (2 << 20));
            r.body_case = TSPB__REQUEST__BODY_EXCHANGE_OPEN;
            r.exchange_open = &exchange;
        } else {
            map.pool = (char *)names[3];
            map.cells = numbers[1];
            r.body_case = TSPB__REQUEST__BODY_POOL_MAP;
            r.pool_map = &map;
        }
    }
    Tspb__Reply *reply = call(pipe, &r);
    learn(k, reply, (uint32_t)id);
    if (reply != NULL)
        tspb__reply__free_unpacked(reply, NULL);
}

static void on_problem(void *arg, const char *sentence)
{
    (void)arg;
    fprintf(stderr, "%s\n", sentence);
    abort();
}

typedef struct check {
    ts_work work;
    bool done;
} check;

static void run_check(ts_work *work, void *arg)
{
    (void)arg;
    if (ts_invariants_check(service.exec.engine, on_problem, NULL) == 0)
        abort();
    tell(&((check *)work)->done);
}

static void *engine_main(void *arg)
{
    ts_service_run(arg);
    return NULL;
}

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    (void)argc;
    (void)argv;
    char why[256];
    ts_engine_limits limits;
    ts_log_init(TS_LOG_ERROR);
    ts_engine_default_limits(&limits);
    limits.exchange_bytes = 1 << 20;
    if (!ts_service_init(&service, &limits))
        return 1;
    service.exec.attention = ts_attention_new(1, TS_ISA_AUTO);
    service.exec.host = ts_host_executor_new(service.exec.attention);
    ts_pool_config config = {
        .name = "fuzz",
        .geometry = {.layers = 2, .kv_heads = 2, .head_dim = 32, .block_tokens = 4},
        .num_blocks = 48,
        .sequences_max = 256,
        .sequence_tokens_max = 64,
        .tenant_blocks_max = 40,
        .client_write = TS_CLIENT_WRITE_ALL,
    };
    config.slab_blocks = ts_geometry_slab_blocks(&config.geometry, 8192, 4096);
    if (ts_engine_add_pool(service.exec.engine, &config, NULL, why, sizeof why) != TS_OK ||
        ts_memory_host_new(service.exec.engine->pools[0].books.num_slabs,
                           ts_geometry_block_bytes(&config.geometry) * config.slab_blocks,
                           &service.exec.memory[0], why, sizeof why) != TS_OK)
        abort();
    pthread_t engine;
    if (pthread_create(&engine, NULL, engine_main, &service) != 0)
        abort();
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    input in = {.at = data, .end = data + size};
    known k = {{0}, {0}};
    uint32_t pipe = ++next_pipe;
    Tspb__SessionOpen open = TSPB__SESSION_OPEN__INIT;
    Tspb__PoolOpen pool = TSPB__POOL_OPEN__INIT;
    Tspb__Request r = TSPB__REQUEST__INIT;
    pipe_event(ts_service_pipe_added, pipe, 1000 + take(&in, 1) % 3);
    open.protocol = TS_PROTOCOL;
    r.request_id = 1;
    r.body_case = TSPB__REQUEST__BODY_SESSION_OPEN;
    r.session_open = &open;
    tspb__reply__free_unpacked(call(pipe, &r), NULL);
    pool.name = (char *)"fuzz";
    pool.writable = take(&in, 1) & 1;
    r.request_id = 2;
    r.body_case = TSPB__REQUEST__BODY_POOL_OPEN;
    r.pool_open = &pool;
    tspb__reply__free_unpacked(call(pipe, &r), NULL);
    for (uint64_t id = 3; in.at < in.end && id < 200; id++) {
        uint32_t kind = take(&in, 1);
        if (kind < 200) {
            one_built(&in, pipe, &k, kind < 8 ? id - 1 : id);
            continue;
        }
        size_t bytes = take(&in, 1);
        if (bytes > (size_t)(in.end - in.at))
            bytes = (size_t)(in.end - in.at);
        Tspb__Request *message = tspb__request__unpack(NULL, bytes, in.at);
        in.at += bytes;
        Tspb__Reply *reply = call(pipe, message);
        if (reply != NULL)
            tspb__reply__free_unpacked(reply, NULL);
        if (message != NULL)
            tspb__request__free_unpacked(message, NULL);
    }
    pipe_event(ts_service_pipe_removed, pipe, 0);
    check last = {.work = {.run = run_check}};
    ts_queue_run(&service.exec.queue, &last.work, &service);
    wait_for(&last.done);
    return 0;
}
