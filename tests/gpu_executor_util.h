/* An executor over a fake GPU, sessions' pages of signals, and jobs whose results are known. */
#ifndef TS_GPU_EXECUTOR_UTIL_H
#define TS_GPU_EXECUTOR_UTIL_H

#include "standstill.h"
#include "test_util.h"

#include "fake_gpu.h"
#include "gpu_executor.h"

#include <semaphore.h>
#include <stdio.h>
#include <string.h>
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
    ts_job_plan plan;
    float q[DIM], k[DIM], v[DIM], out[DIM];
    sem_t done;
} test_job;

#define BLOCKS 512u /* more than there are jobs at once: each has its own */

static unsigned char cache[BLOCKS * 4 * DIM * 4 * 2];
static uint32_t next_block;

static inline void on_done(ts_job *job)
{
    sem_post(&((test_job *)job)->done);
}

static inline void job_init(test_job *t, ts_signals_page *signals, uint32_t number)
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
                      .run_number = number,
                      .done = on_done};
}

static inline void await_job(test_job *t)
{
    while (sem_wait(&t->done) != 0)
        ;
    ts_gpu_plan_free(t->plan.plan);
    t->plan = (ts_job_plan){0};
}

static inline void await_good(test_job *t)
{
    await_job(t);
    assert_int_equal(t->job.status, TS_OK);
    assert_memory_equal(t->out, t->v, sizeof t->out);
}

static inline bool is_done(test_job *t)
{
    int value;
    sem_getvalue(&t->done, &value);
    return value > 0;
}

static uint32_t failures;
static char failure[256];
static sem_t failed;

static inline void on_failure(const char *sentence)
{
    failures++;
    snprintf(failure, sizeof failure, "%s", sentence);
    sem_post(&failed);
}

typedef struct rig {
    ts_gpu *gpu;
    ts_gpu_executor *executor;
    ts_done_words *words;
    ts_signals_page *pages[SESSIONS];
} rig;

static inline void rig_new_joining(rig *r, uint32_t submit_ms, uint32_t join_us)
{
    memset(r, 0, sizeof *r);
    failures = 0;
    sem_init(&failed, 0, 0);
    standstill_after(120);
    r->gpu = fake_gpu_new();
    OK(ts_gpu_executor_new(r->gpu, submit_ms, join_us, on_failure, &r->executor, why, sizeof why));
    OK(ts_done_words_new(r->gpu, SESSIONS, &r->words, why, sizeof why));
    for (uint32_t i = 0; i < SESSIONS; i++) {
        OK(ts_signals_new(&r->pages[i], why, sizeof why));
        OK(ts_signals_reach(r->pages[i], r->gpu, r->words, why, sizeof why));
    }
}

/* Where each run is launched by itself. */
static inline void rig_new(rig *r, uint32_t submit_ms)
{
    rig_new_joining(r, submit_ms, 0);
}

static inline void rig_free(rig *r)
{
    ts_gpu_executor_free(r->executor);
    ts_done_words_release(r->words);
    for (uint32_t i = 0; i < SESSIONS; i++)
        ts_signals_release(r->pages[i]);
    fake_gpu_free(r->gpu);
    alarm(0);
}

static inline void submitted(ts_signals_page *page, uint32_t number)
{
    __atomic_store_n(&page->host->submitted, number, __ATOMIC_RELEASE);
}

#endif
