/*
 * Attention problems (attention_util.h) that lie on a GPU, and how they are run there. One GPU for
 * a program.
 */
#ifndef TS_DEVICE_PROBLEM_H
#define TS_DEVICE_PROBLEM_H

#include "attention_util.h"

#include "device.h"

#include <cuda_runtime_api.h>
#include <semaphore.h>

#define CUDA_OK(call) assert_int_equal((call), cudaSuccess)

static ts_gpu *gpu;
static char why[256];

static inline bool warp_groups(void)
{
    return ts_gpu_get_info(gpu)->warp_groups;
}

/* Done when it returns, also for streams that don't wait for the default one: of memory that isn't
 * pinned, cudaMemcpy may leave the last part under way. */
static inline void to_device(void *to, const void *from, size_t bytes)
{
    assert_int_equal(cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice), cudaSuccess);
    assert_int_equal(cudaDeviceSynchronize(), cudaSuccess);
}

#define OK(call)                                                                                   \
    do {                                                                                           \
        if ((call) != TS_OK)                                                                       \
            fail_msg("%s: %s", #call, why);                                                        \
    } while (0)

/* A problem whose cache, q, k, v and out are on the device as well. */
typedef struct device_problem {
    problem p;
    ts_memory *memory;
    unsigned char *q, *k, *v, *out;
    float *heads, *scales, *lse; /* heads: sinks, then slopes; lse: log-sum-exps */
    ts_attention_seq *seqs;
    ts_attention_call call;
    size_t q_bytes, kv_bytes;
} device_problem;

/* Copies the problem d->p, which is s and v, to the device. */
static inline void device_problem_upload(device_problem *d, shape s, variety v)
{
    const uint32_t num_seqs = d->p.num_seqs;
    CUDA_OK(cudaMalloc((void **)&d->lse, d->p.lse_elements * sizeof(float)));
    CUDA_OK(cudaMalloc((void **)&d->heads, 2 * s.heads * sizeof(float)));
    if (v.sinks)
        to_device(d->heads, d->p.sinks, s.heads * sizeof(float));
    if (v.alibi)
        to_device(d->heads + s.heads, d->p.alibi, s.heads * sizeof(float));
    CUDA_OK(cudaMalloc((void **)&d->scales, 2 * s.kv_heads * sizeof(float)));
    if (d->p.scales != NULL)
        to_device(d->scales, d->p.scales, 2 * s.kv_heads * sizeof(float));
    size_t e = ts_dtype_bytes(s.io);
    d->q_bytes = d->p.q_elements * e;
    d->kv_bytes = d->p.kv_elements * e;
    OK(ts_memory_cuda_vmm_new(gpu, 1, d->p.cache_bytes, &d->memory, why, sizeof why));
    OK(ts_memory_renew(d->memory, 0, why, sizeof why));
    to_device(d->memory->base, d->p.cache, d->p.cache_bytes);
    unsigned char **to[] = {&d->q, &d->k, &d->v, &d->out};
    unsigned char *from[] = {d->p.q, d->p.k, d->p.v, NULL};
    for (int i = 0; i < 4; i++) {
        size_t bytes = i == 0 || i == 3 ? d->q_bytes : d->kv_bytes;
        CUDA_OK(cudaMalloc((void **)to[i], bytes));
        if (from[i] != NULL)
            to_device(*to[i], from[i], bytes);
    }
    d->seqs = malloc(num_seqs * sizeof *d->seqs);
    for (uint32_t i = 0; i < num_seqs; i++) {
        d->seqs[i] = d->p.seqs[i];
        d->seqs[i].q = d->q + ((const unsigned char *)d->p.seqs[i].q - d->p.q);
        d->seqs[i].k = d->k + ((const unsigned char *)d->p.seqs[i].k - d->p.k);
        d->seqs[i].v = d->v + ((const unsigned char *)d->p.seqs[i].v - d->p.v);
        d->seqs[i].out = d->out + ((unsigned char *)d->p.seqs[i].out - d->p.out);
        d->seqs[i].sinks = v.sinks ? d->heads : NULL;
        d->seqs[i].scales = d->p.scales != NULL ? d->scales : NULL;
        d->seqs[i].alibi = v.alibi ? d->heads + s.heads : NULL;
        d->seqs[i].lse = d->lse + (d->p.seqs[i].lse - d->p.lse);
    }
    d->call = d->p.call;
    d->call.base = d->memory->base;
    d->call.seqs = d->seqs;
}

static inline void device_problem_vary(device_problem *d, shape s, variety v,
                                       const uint32_t (*lengths)[2], uint32_t num_seqs, rng *r)
{
    problem_new(&d->p, s, lengths, num_seqs, r);
    problem_vary(&d->p, v, r);
    device_problem_upload(d, s, v);
}

static inline void device_problem_new(device_problem *d, shape s, const uint32_t (*lengths)[2],
                                      uint32_t num_seqs, rng *r)
{
    device_problem_vary(d, s, (variety){0}, lengths, num_seqs, r);
}

static inline void device_problem_free(device_problem *d)
{
    CUDA_OK(cudaFree(d->heads));
    CUDA_OK(cudaFree(d->scales));
    CUDA_OK(cudaFree(d->lse));
    CUDA_OK(cudaFree(d->q));
    CUDA_OK(cudaFree(d->k));
    CUDA_OK(cudaFree(d->v));
    CUDA_OK(cudaFree(d->out));
    ts_memory_free(d->memory);
    free(d->seqs);
    problem_free(&d->p);
}

static inline void post(void *arg, ts_status status, const char *why_not)
{
    if (status != TS_OK)
        fail_msg("%s", why_not);
    sem_post(arg);
}

/* Runs the call and waits for it. */
static inline void attend(const ts_attention_call *call, ts_kernel kernel)
{
    sem_t done;
    sem_init(&done, 0, 0);
    ts_gpu_launch *l = ts_gpu_launch_take(gpu, NULL);
    assert_non_null(l);
    /* A run has one layer: sequences of different ones are runs of their own. */
    bool together = true;
    for (uint32_t i = 1; i < call->num_seqs; i++)
        together = together && call->seqs[i].layer == call->seqs[0].layer;
    uint32_t num_runs = together ? 1 : call->num_seqs;
    ts_gpu_run *runs = calloc(num_runs, sizeof *runs);
    ts_gpu_plan **plans = calloc(num_runs, sizeof *plans);
    for (uint32_t i = 0; i < num_runs; i++) {
        const ts_attention_seq *s = &call->seqs[i];
        OK(ts_gpu_plan_new(gpu, &call->geometry, call->heads, call->io_dtype, kernel, s,
                           together ? call->num_seqs : 1, &plans[i], why, sizeof why));
        runs[i] = ts_gpu_run_over(plans[i], s);
    }
    if (ts_gpu_launch_attend(l, call->base, &call->variant, runs, num_runs) != TS_OK)
        fail_msg("%s", ts_gpu_launch_why(l));
    assert_int_equal(ts_gpu_launch_finish(l, post, &done), TS_OK);
    while (sem_wait(&done) != 0)
        ;
    for (uint32_t i = 0; i < num_runs; i++)
        ts_gpu_plan_free(plans[i]);
    free(plans);
    free(runs);
}

/* ... and the outputs come back into the host problem's. */
static inline void run(device_problem *d, const ts_attention_call *call, ts_kernel kernel)
{
    attend(call, kernel);
    CUDA_OK(cudaDeviceSynchronize());
    CUDA_OK(cudaMemcpy(d->p.out, d->out, d->q_bytes, cudaMemcpyDeviceToHost));
    CUDA_OK(
        cudaMemcpy(d->p.lse, d->lse, d->p.lse_elements * sizeof(float), cudaMemcpyDeviceToHost));
}

static inline void poison_device(device_problem *d)
{
    CUDA_OK(cudaMemset(d->out, 0xff, d->q_bytes));
    CUDA_OK(cudaMemset(d->lse, 0xff, d->p.lse_elements * sizeof(float)));
    CUDA_OK(cudaDeviceSynchronize()); /* cudaMemset only queues */
}

/* Runs of the problem in one launch, into a poisoned output; likewise. */
static inline void launch_runs(device_problem *d, const ts_gpu_run *runs, uint32_t num_runs)
{
    sem_t done;
    sem_init(&done, 0, 0);
    ts_gpu_launch *l = ts_gpu_launch_take(gpu, NULL);
    poison_device(d);
    if (ts_gpu_launch_attend(l, d->call.base, &d->call.variant, runs, num_runs) != TS_OK)
        fail_msg("%s", ts_gpu_launch_why(l));
    assert_int_equal(ts_gpu_launch_finish(l, post, &done), TS_OK);
    while (sem_wait(&done) != 0)
        ;
    CUDA_OK(cudaDeviceSynchronize());
    CUDA_OK(cudaMemcpy(d->p.out, d->out, d->q_bytes, cudaMemcpyDeviceToHost));
    CUDA_OK(
        cudaMemcpy(d->p.lse, d->lse, d->p.lse_elements * sizeof(float), cudaMemcpyDeviceToHost));
}

/* What the sequence's rows came to: its output, and behind it its log-sum-exps. */
static inline size_t result_of(const device_problem *d, uint32_t i, unsigned char *to)
{
    const ts_attention_seq *s = &d->p.seqs[i];
    const size_t rows = (size_t)s->q_tokens * d->p.call.heads;
    const size_t bytes = rows * d->p.call.geometry.head_dim * ts_dtype_bytes(d->p.call.io_dtype);
    memcpy(to, s->out, bytes);
    memcpy(to + bytes, s->lse, rows * sizeof *s->lse);
    return bytes + rows * sizeof *s->lse;
}

/* Opens the first GPU; 77: there is none, which says why. */
static inline int run_gpu_tests(const struct CMUnitTest *tests, size_t count)
{
    if (ts_gpu_count(why, sizeof why) == 0) {
        printf("skipped: %s\n", why);
        return 77;
    }
    if (ts_gpu_open(0, &gpu, why, sizeof why) != TS_OK) {
        fprintf(stderr, "%s\n", why);
        return 1;
    }
    if (getenv("TS_TEST_FILTER") != NULL) /* for tools that make everything slow */
        cmocka_set_test_filter(getenv("TS_TEST_FILTER"));
    int failed = _cmocka_run_group_tests(__FILE__, tests, count, NULL, NULL);
    ts_gpu_close(gpu);
    return failed;
}

#endif
