/* When attends that come by ring wait for others, to be one launch with them. */
#define _GNU_SOURCE
#include "test_util.h"

#include "log.h"
#include "request.h"
#include "ring_joins.h"
#include "ring_server.h"

#include <sched.h>
#include <semaphore.h>
#include <string.h>

static void as_many_as_came_together_last_are_waited_for_but_not_for_long(void **state)
{
    (void)state;
    ts_ring_joins j = {.join_ns = 100};
    assert_false(ts_ring_joins_wait(&j, 1, 1000)); /* nobody is expected */
    ts_ring_joins_taken(&j, 1);
    assert_false(ts_ring_joins_wait(&j, 1, 2000)); /* nor beside a worker that is alone */
    ts_ring_joins_taken(&j, 3);
    assert_true(ts_ring_joins_wait(&j, 1, 3000));
    assert_true(ts_ring_joins_wait(&j, 2, 3099));
    assert_false(ts_ring_joins_wait(&j, 3, 3099)); /* all are there */
    ts_ring_joins_taken(&j, 3);
    assert_true(ts_ring_joins_wait(&j, 1, 4000)); /* the time is counted anew, */
    assert_true(ts_ring_joins_wait(&j, 2, 4099)); /* ... and from the first one */
    assert_false(ts_ring_joins_wait(&j, 2, 4100));
    ts_ring_joins_taken(&j, 2);
    assert_false(ts_ring_joins_wait(&j, 2, 5000)); /* one that left was waited for once */
    ts_ring_joins never = {.expected = 3};
    assert_false(ts_ring_joins_wait(&never, 1, 1000));
}

/* ---- by the rings' thread ---- */

enum { DIM = 32, WORKERS = 3, ROUNDS = 200 };

typedef struct attend {
    ts_job job;
    ts_attention_seq seq;
    float q[DIM], out[DIM];
    sem_t told;
} attend;

static ts_service service;
static const uint32_t block = 0;
static float cache[2 * 4 * DIM];

static void on_done(ts_job *job)
{
    attend *a = (attend *)job;
    assert_int_equal(job->status, TS_OK);
    sem_post(&a->told);
}

static void submit(attend *a)
{
    a->seq = (ts_attention_seq){
        .blocks = &block, .kv_tokens = 4, .q_tokens = 1, .q = a->q, .out = a->out};
    a->job = (ts_job){.geometry = {.layers = 1, .kv_heads = 1, .head_dim = DIM, .block_tokens = 4},
                      .base = (unsigned char *)cache,
                      .seqs = &a->seq,
                      .num_seqs = 1,
                      .heads = 1,
                      .variant.scale = 1.0f,
                      .done = on_done};
    ts_rings_submit(service.rings, &a->job);
}

static void await_told(attend *a)
{
    while (sem_wait(&a->told) != 0)
        ;
}

static bool was_told(attend *a)
{
    int told;
    sem_getvalue(&a->told, &told);
    return told > 0;
}

/* They would wait for 4000 s. */
static void workers_that_came_together_are_one_launch_again(void **state)
{
    (void)state;
    static attend attends[WORKERS];
    uint64_t runs, launches;
    for (uint32_t i = 0; i < WORKERS; i++)
        sem_init(&attends[i].told, 0, 0);
    ts_rings *rings = service.rings;
    rings->joins.expected = WORKERS; /* the thread sleeps */
    for (uint32_t round = 0; round < ROUNDS; round++) {
        for (uint32_t i = 0; i < WORKERS; i++) {
            for (uint32_t turn = 0; turn < 20 && i > 0; turn++) {
                assert_false(was_told(&attends[0])); /* not before the last has come */
                sched_yield();
            }
            submit(&attends[i]);
        }
        for (uint32_t i = 0; i < WORKERS; i++)
            await_told(&attends[i]);
        ts_host_executor_counts(service.exec.host, &runs, &launches);
        assert_int_equal(runs, (uint64_t)WORKERS * (round + 1));
        assert_int_equal(launches, round + 1);
    }
    submit(&attends[0]); /* what waits when the thread ends is done all the same */
    ts_rings_stop(rings);
    await_told(&attends[0]);
    submit(&attends[1]); /* ... and what comes later */
    await_told(&attends[1]);
    for (uint32_t i = 0; i < WORKERS; i++)
        sem_destroy(&attends[i].told);
}

int main(void)
{
    ts_engine_limits limits;
    ts_log_init(TS_LOG_ERROR);
    ts_engine_default_limits(&limits);
    if (!ts_service_init(&service, &limits))
        return 1;
    service.exec.attention = ts_attention_new(1, TS_ISA_AUTO);
    service.exec.host = ts_host_executor_new(service.exec.attention);
    if (service.exec.host == NULL || ts_rings_new(&service, 0, 4000000000u) == NULL)
        return 1;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(as_many_as_came_together_last_are_waited_for_but_not_for_long),
        cmocka_unit_test(workers_that_came_together_are_one_launch_again),
    };
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    ts_rings_free(service.rings);
    ts_host_executor_free(service.exec.host);
    ts_service_close_connections(&service);
    ts_service_fini(&service);
    ts_queue_fini(&service.exec.queue);
    return failed;
}
