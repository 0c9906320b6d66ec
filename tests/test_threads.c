/* What is shared between threads: the kernels' team of threads, and the batch that joins jobs. */
#include "test_util.h"

#include "batch.h"
#include "queue.h"

#include <math.h>
#include <semaphore.h>

#define ITEMS 37u

typedef struct counts {
    uint32_t items[ITEMS];
    uint32_t threads[8][64]; /* a cache line each: scratch that only its thread touches */
} counts;

static void count_item(void *arg, uint32_t item, uint32_t thread)
{
    counts *c = arg;
    c->items[item]++;
    c->threads[thread][0]++;
}

static void every_item_runs_once_in_every_round(void **state)
{
    (void)state;
    for (uint32_t n = 1; n <= 5; n += 2) {
        ts_threads *t = ts_threads_new(n);
        assert_non_null(t);
        assert_int_equal(ts_threads_count(t), n);
        counts c = {0};
        for (int round = 0; round < 2000; round++)
            ts_threads_run(t, round % 3 == 0 ? 1 : ITEMS, count_item, &c);
        uint32_t total = 0;
        for (uint32_t i = 0; i < ITEMS; i++)
            assert_int_equal(c.items[i], i == 0 ? 2000 : 1333);
        for (uint32_t i = 0; i < 8; i++)
            total += c.threads[i][0];
        assert_int_equal(total, 2000 + 36 * 1333);
        ts_threads_run(t, 0, count_item, &c);
        ts_threads_free(t);
    }
}

/* ---- the batch ---- */

enum { JOBS = 400, PRODUCERS = 2 };

typedef struct counted_job {
    ts_job job;
    uint32_t done;
    sem_t *all;
    float q[2 * 32], out[2 * 32];
    ts_attention_seq seq;
} counted_job;

static void on_done(ts_job *job)
{
    counted_job *j = (counted_job *)job;
    j->done++;
    sem_post(j->all);
}

typedef struct producer {
    ts_batch *batch;
    counted_job *jobs;
} producer;

static void *produce(void *arg)
{
    producer *p = arg;
    for (int i = 0; i < JOBS; i++)
        ts_batch_submit(p->batch, &p->jobs[i].job);
    return NULL;
}

static void jobs_of_many_are_joined_and_each_is_done_once_with_its_own_result(void **state)
{
    (void)state;
    static const uint32_t block = 0;
    ts_geometry g = {.layers = 1, .kv_heads = 1, .head_dim = 32, .block_tokens = 4};
    static float cache[2 * 4 * 32];
    for (int i = 0; i < 4 * 32; i++)
        cache[4 * 32 + i] = (float)(i / 32); /* V of token t is t everywhere; K is 0 */
    ts_attention *a = ts_attention_new(2, TS_ISA_AUTO);
    ts_batch *batch = ts_batch_new(a);
    assert_non_null(batch);
    sem_t all;
    sem_init(&all, 0, 0);
    counted_job *jobs = calloc(JOBS * PRODUCERS, sizeof *jobs);
    for (int i = 0; i < JOBS * PRODUCERS; i++) {
        counted_job *j = &jobs[i];
        j->all = &all;
        j->seq = (ts_attention_seq){.blocks = &block,
                                    .kv_tokens = 1 + (uint32_t)i % 4,
                                    .q_tokens = 1,
                                    .q = j->q,
                                    .out = j->out};
        j->job = (ts_job){.geometry = g,
                          .base = (unsigned char *)cache,
                          .seqs = &j->seq,
                          .num_seqs = 1,
                          .heads = 1 + (uint32_t)i % 2, /* two kinds that can't be joined */
                          .scale = 1.0f,
                          .done = on_done};
    }
    pthread_t threads[PRODUCERS];
    producer producers[PRODUCERS];
    for (int i = 0; i < PRODUCERS; i++) {
        producers[i] = (producer){.batch = batch, .jobs = jobs + i * JOBS};
        assert_int_equal(pthread_create(&threads[i], NULL, produce, &producers[i]), 0);
    }
    for (int i = 0; i < JOBS * PRODUCERS; i++)
        while (sem_wait(&all) != 0)
            ;
    for (int i = 0; i < PRODUCERS; i++)
        pthread_join(threads[i], NULL);
    uint64_t runs, launches;
    ts_batch_counts(batch, &runs, &launches);
    assert_int_equal(runs, JOBS * PRODUCERS);
    assert_true(launches <= runs);
    ts_batch_free(batch);
    for (int i = 0; i < JOBS * PRODUCERS; i++) {
        assert_int_equal(jobs[i].done, 1);
        assert_int_equal(jobs[i].job.status, TS_OK);
        for (int d = 0; d < 32 * (1 + i % 2); d++) /* the mean of tokens 0..i % 4 */
            assert_true(fabsf(jobs[i].out[d] - 0.5f * (float)(i % 4)) < 1e-6f);
    }
    free(jobs);
    sem_destroy(&all);
    ts_attention_free(a);
}

static void what_is_cancelled_says_so(void **state)
{
    (void)state;
    static const uint32_t block = 0;
    static float cache[2 * 4 * 32], q[32], out[32];
    ts_attention *a = ts_attention_new(1, TS_ISA_AUTO);
    ts_attention_seq seq = {.blocks = &block, .kv_tokens = 1, .q_tokens = 1, .q = q, .out = out};
    ts_attention_call call = {
        .geometry = {.layers = 1, .kv_heads = 1, .head_dim = 32, .block_tokens = 4},
        .base = (unsigned char *)cache,
        .heads = 1,
        .scale = 1.0f,
        .seqs = &seq,
        .num_seqs = 1};
    assert_int_equal(ts_attention_run(a, &call), TS_OK);
    ts_attention_cancel(a);
    assert_int_equal(ts_attention_run(a, &call), TS_ECONN);
    ts_attention_free(a);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_item_runs_once_in_every_round),
        cmocka_unit_test(jobs_of_many_are_joined_and_each_is_done_once_with_its_own_result),
        cmocka_unit_test(what_is_cancelled_says_so),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
