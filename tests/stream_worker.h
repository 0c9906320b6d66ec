/*
 * A worker whose runs are on a stream that the test holds and lets go (fake_libcuda.c).
 */
#ifndef TS_STREAM_WORKER_H
#define TS_STREAM_WORKER_H

#include "gpu_restart_util.h"

#include <semaphore.h>

/* A worker with one sequence, and the step that it has begun. */
typedef struct worker {
    ts_client *client;
    ts_pool *pool;
    ts_seq seq;
    rng random;
    digest digest;
    layer_task task;
} worker;

/* A client by messages; timeout_ms: of each of its calls. */
static inline ts_client *connect_for(const daemon_process *d, uint32_t timeout_ms)
{
    ts_client *c;
    OK(ts_connect(&(ts_options){.size = sizeof(ts_options),
                                .url = d->url,
                                .wait_ms = 60000,
                                .timeout_ms = timeout_ms,
                                .transport = TS_TRANSPORT_MESSAGES},
                  &c));
    return c;
}

/* Makes the client a worker whose exchange is the daemon's. */
static inline void worker_open(worker *w, ts_client *c)
{
    *w = (worker){.client = c, .pool = open_pool(c, "p", 0), .random = {7}, .digest = {1}};
    open_exchange(c, w->pool, OF_DAEMON);
    DO(ts_seq_create(w->pool, 1, &w->seq));
}

static inline void worker_begin(worker *w, uint32_t tokens)
{
    w->task = (layer_task){.step = begin(w->client, w->pool, &w->seq, &tokens, 1),
                           .tokens = tokens,
                           .random = &w->random,
                           .digest = &w->digest};
}

static inline void worker_close(worker *w)
{
    ts_pool_close(w->pool);
    ts_disconnect(w->client);
}

static sem_t reached, may_go;

static inline void hold_stream(void *arg)
{
    (void)arg;
    sem_post(&reached);
    while (sem_wait(&may_go) != 0)
        ;
}

/* What is queued from now on waits for `may_go`. */
static inline void stop_stream(void)
{
    sem_init(&reached, 0, 0);
    sem_init(&may_go, 0, 0);
    fake_stream_call(hold_stream, NULL);
}

static inline ts_status run_layer(worker *w, uint32_t layer)
{
    const ts_run_options options = {.size = sizeof(ts_run_options), .on_stream = true};
    fake_stream_call(fill_inputs, &w->task);
    const ts_status status = ts_step_run_with(w->task.step, layer, &options);
    if (status == TS_OK)
        fake_stream_call(read_output, &w->task);
    return status;
}

static inline pid_t stop_daemon(const daemon_process *d)
{
    assert_int_equal(kill(daemon_of(d), SIGSTOP), 0);
    return await_stopped(d);
}

#endif
