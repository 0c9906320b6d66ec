/* Figures of pools: a large one is walked bit by bit, once for all who ask meanwhile. */
#include "test_util.h"

#include "log.h"
#include "pool_stats_cache.h"
#include "request.h"

#include <stdio.h>

enum { BLOCKS = 1 << 20 };

static ts_service service;

static void service_new(uint32_t blocks)
{
    ts_pool_config config = {
        .name = "test",
        .geometry = {.layers = 1, .kv_heads = 1, .head_dim = 32, .block_tokens = 4},
        .num_blocks = blocks,
        .slab_blocks = 1024,
        .sequences_max = 1u << 20,
        .sequence_tokens_max = 1u << 20,
        .tenant_blocks_max = UINT64_MAX,
    };
    ts_engine_limits limits;
    ts_engine_default_limits(&limits);
    service = (ts_service){0};
    assert_true(ts_service_init(&service, &limits));
    ts_answer added;
    ts_engine_apply(service.exec.engine,
                    &(ts_command){.op = TS_OP_POOL_ADD, .pool_add.config = &config}, &added);
    assert_int_equal(added.status, TS_OK);
}

static void service_free(void)
{
    ts_service_fini(&service);
    ts_queue_fini(&service.exec.queue);
}

/* Runs what is in the queue, one thing; false: nothing is. */
static bool run_one(void)
{
    if (service.exec.queue.head == NULL)
        return false;
    for (ts_work *work = ts_queue_take(&service.exec.queue), *next; work != NULL; work = next) {
        next = work->next;
        work->run(work, &service);
    }
    return true;
}

typedef struct caller {
    ts_pool_stats_waiter waiter;
    uint32_t told;
    const ts_pool_stats *stats;
} caller;

static void on_ready(ts_pool_stats_waiter *waiter, void *owner)
{
    caller *a = (caller *)waiter;
    a->told++;
    assert_int_equal(
        ts_pool_stats_cache_get(((ts_service *)owner)->pool_stats, 0, waiter, &a->stats),
        TS_OK); /* what all have waited for */
}

static void a_small_pool_is_walked_at_once(void **state)
{
    (void)state;
    service_new(1024);
    caller a = {.waiter.ready = on_ready};
    for (uint64_t i = 1; i <= 3; i++) { /* each time anew: nothing is out of date */
        assert_int_equal(ts_pool_stats_cache_get(service.pool_stats, 0, &a.waiter, &a.stats),
                         TS_OK);
        assert_int_equal(a.stats->free_runs[10], 1);
        assert_int_equal(ts_pool_stats_cache_bits(service.pool_stats), i);
    }
    assert_int_equal(a.told, 0);
    service_free();
}

static void all_who_ask_for_a_large_pool_share_a_walk_of_small_bits(void **state)
{
    (void)state;
    service_new(BLOCKS);
    static caller callers[100];
    const uint64_t bits = BLOCKS / TS_POOL_STATS_BIT;
    for (int i = 0; i < 50; i++) {
        callers[i] = (caller){.waiter.ready = on_ready};
        assert_int_equal(
            ts_pool_stats_cache_get(service.pool_stats, 0, &callers[i].waiter, &callers[i].stats),
            TS_EBUSY);
    }
    assert_int_equal(ts_pool_stats_cache_bits(service.pool_stats),
                     0); /* none of it in the callers' own turn */
    for (uint64_t i = 1; i <= bits / 2; i++) {
        assert_true(run_one());
        assert_int_equal(ts_pool_stats_cache_bits(service.pool_stats), i); /* one a turn */
    }
    for (int i = 50; i < 100; i++) { /* it is under way */
        callers[i] = (caller){.waiter.ready = on_ready};
        assert_int_equal(
            ts_pool_stats_cache_get(service.pool_stats, 0, &callers[i].waiter, &callers[i].stats),
            TS_EBUSY);
    }
    while (run_one())
        ;
    assert_in_range(ts_pool_stats_cache_bits(service.pool_stats), bits, bits + 1);
    for (int i = 0; i < 100; i++) {
        assert_int_equal(callers[i].told, 1);
        assert_non_null(callers[i].stats);
        assert_int_equal(callers[i].stats->free_runs[20], 1);
    }
    service_free();
}

static void a_pool_that_ends_during_its_walk_ends_it(void **state)
{
    (void)state;
    service_new(BLOCKS);
    ts_answer answer;
    ts_pool_stats *walk = ts_pool_stats_new(service.exec.engine, 0);
    assert_false(ts_pool_stats_go_on(walk, service.exec.engine, 10));
    ts_engine_apply(service.exec.engine, &(ts_command){.op = TS_OP_POOL_REMOVE}, &answer);
    assert_int_equal(answer.status, TS_OK);
    assert_true(ts_pool_stats_go_on(walk, service.exec.engine, 10));
    ts_pool_stats_free(walk);
    service_free();
}

int main(void)
{
    ts_log_init(TS_LOG_ERROR);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_small_pool_is_walked_at_once),
        cmocka_unit_test(all_who_ask_for_a_large_pool_share_a_walk_of_small_bits),
        cmocka_unit_test(a_pool_that_ends_during_its_walk_ends_it),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
