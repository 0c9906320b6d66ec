/*
 * Steps of a worker that orders its runs on a stream. Daemon and library have a GPU of the tests'
 * own each (fake_gpu.c, fake_libcuda.c).
 */
#ifndef TS_GPU_RESTART_UTIL_H
#define TS_GPU_RESTART_UTIL_H

#include "restart_util.h"

#define LAYERS 3u
#define DIM 32u
#define HEADS 2u
#define POOL                                                                                       \
    "p:layers=3,kv_heads=1,head_dim=32,dtype=fp32,block_tokens=16,blocks=1024,slab=2M,"            \
    "device=cuda:0,provider=cuda-vmm,model=m,client_write=all"

/* fake_libcuda.c */
void fake_stream_call(void (*call)(void *arg), void *arg);
void fake_stream_await(void);
void *fake_device_new(size_t bytes);

/* What the stream does for a layer, before and after its run. */
typedef struct layer_task {
    ts_step *step;
    uint32_t tokens;
    rng *random;
    digest *digest;
} layer_task;

static inline void fill_inputs(void *arg)
{
    const layer_task *t = arg;
    fill(t->random, ts_step_q(t->step), (size_t)t->tokens * HEADS * DIM);
    fill(t->random, ts_step_k(t->step), (size_t)t->tokens * DIM);
    fill(t->random, ts_step_v(t->step), (size_t)t->tokens * DIM);
    /* Whoever reads it before it is written is found out. */
    memset(ts_unconst(ts_step_out(t->step)), 0xff, (size_t)t->tokens * HEADS * DIM * sizeof(float));
}

static inline void read_output(void *arg)
{
    const layer_task *t = arg;
    mix(t->digest, ts_step_out(t->step), (size_t)t->tokens * HEADS * DIM * sizeof(float));
}

/* Queues all layers of a step; the memory of *task is the stream's until it is done. */
static inline void queue_layers(ts_client *c, layer_task *task)
{
    const ts_run_options options = {.size = sizeof(ts_run_options), .on_stream = true};
    for (uint32_t layer = 0; layer < LAYERS; layer++) {
        fake_stream_call(fill_inputs, task);
        DO(ts_step_run_with(task->step, layer, &options));
        fake_stream_call(read_output, task);
    }
}

static inline ts_step *begin(ts_client *c, ts_pool *p, const ts_seq *seqs,
                             const uint32_t *new_tokens, uint32_t count)
{
    ts_step *step;
    const ts_step_options options = {.size = sizeof(ts_step_options), .heads = HEADS};
    DO(ts_step_begin(p, seqs, new_tokens, count, &options, &step));
    return step;
}

/* A step whose layers are queued ahead, and are awaited by the commit alone. */
static inline void stream_step(ts_client *c, ts_pool *p, const ts_seq *seqs,
                               const uint32_t *new_tokens, uint32_t count, rng *random, digest *d)
{
    layer_task task = {.random = random, .digest = d};
    for (uint32_t i = 0; i < count; i++)
        task.tokens += new_tokens[i];
    task.step = begin(c, p, seqs, new_tokens, count);
    queue_layers(c, &task);
    fake_stream_await();
    DO(ts_step_commit(task.step, NULL));
}

/* Where q, k, v and out lie. */
typedef enum exchange_kind { OF_DAEMON, OF_WORKER, IN_HOST } exchange_kind;

static inline void open_exchange(ts_client *c, ts_pool *p, exchange_kind kind)
{
    const size_t bytes = 4u << 20;
    if (kind == OF_DAEMON)
        DO(ts_exchange_device(p, bytes));
    else if (kind == OF_WORKER)
        DO(ts_exchange_register(p, fake_device_new(bytes), bytes));
}

#endif
