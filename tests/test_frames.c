/* Frames without kernels: what each of their steps may have of its own. Daemon and library have a
 * GPU of the tests' own each (fake_gpu.c, fake_libcuda.c, fake_local_gpu.c). */
#define _GNU_SOURCE
#include "gpu_restart_util.h"

extern unsigned char *fake_plan_base; /* fake_local_gpu.c */

#define BLOCK 16u
#define CALL_MS 300u /* of a call; tests wait longer for room */

typedef struct worker {
    daemon_process daemon;
    ts_client *client;
    ts_pool *pool;
    ts_seq seqs[2]; /* the second one has all of the pool that the first has not */
} worker;

static void commit_of(const worker *w, ts_seq seq, uint32_t tokens)
{
    ts_client *c = w->client;
    ts_step *step;
    const ts_step_options options = {.size = sizeof options, .no_run = true};
    DO(ts_step_begin(w->pool, &seq, &tokens, 1, &options, &step));
    DO(ts_step_commit(step, NULL));
}

static void worker_open(worker *w)
{
    start(&w->daemon, POOL, NULL);
    const ts_options options = {.size = sizeof options,
                                .url = w->daemon.url,
                                .wait_ms = 60000,
                                .timeout_ms = CALL_MS,
                                .transport = TS_TRANSPORT_RING};
    assert_int_equal(ts_connect(&options, &w->client), TS_OK);
    ts_client *c = w->client;
    DO(ts_pool_open(c, "p", TS_POOL_WRITABLE, &w->pool));
    DO(ts_exchange_device(w->pool, 1u << 20));
    DO(ts_seq_create(w->pool, 2, w->seqs));
    commit_of(w, w->seqs[0], BLOCK);
    commit_of(w, w->seqs[1], (ts_pool_blocks(w->pool) - 1) * BLOCK);
}

static void worker_close(worker *w)
{
    ts_pool_close(w->pool);
    ts_disconnect(w->client);
    stop(&w->daemon, false);
}

static ts_frame *frame_of(const worker *w, const ts_step_options *step)
{
    ts_client *c = w->client;
    ts_frame *frame;
    const ts_frame_options options = {.size = sizeof options, .seqs = 1, .step = step};
    DO(ts_frame_new(w->pool, &options, &frame));
    return frame;
}

/* Without it, each graph would copy by threads what the copy engine could bring. */
static void a_frame_that_is_made_before_all_else_knows_the_pools_addresses(void **state)
{
    (void)state;
    worker w;
    ts_kv kv;
    worker_open(&w);
    ts_client *c = w.client;
    ts_frame *frame = frame_of(&w, NULL);
    DO(ts_slot_kv(w.pool, 0, 0, &kv));
    assert_ptr_equal(fake_plan_base, kv.k);
    ts_frame_free(frame);
    worker_close(&w);
}

/* Its own wait, or the frame's. */
static void a_step_waits_for_room_beside_the_calls_own_time(void **state)
{
    (void)state;
    const ts_step_options waits = {.size = sizeof waits, .wait_ms = 3 * CALL_MS};
    worker w;
    worker_open(&w);
    ts_client *c = w.client;
    for (int own = 0; own < 2; own++) {
        ts_frame *frame = frame_of(&w, own ? NULL : &waits);
        ts_step *step;
        const ts_status status = ts_frame_begin(frame, w.seqs, 1, own ? &waits : NULL, &step);
        if (status != TS_ENOSPC)
            fail_msg("%s: %s", ts_status_name(status), ts_error(c));
        DO(ts_seq_truncate(w.pool, &w.seqs[1], &(uint32_t){BLOCK}, 1));
        DO(ts_frame_begin(frame, w.seqs, 1, NULL, &step));
        DO(ts_step_abort(step));
        commit_of(&w, w.seqs[1], (ts_pool_blocks(w.pool) - 2) * BLOCK);
        ts_frame_free(frame);
    }
    worker_close(&w);
}

/* They would be those of whichever step has none of its own. */
static void token_ids_are_a_steps_own(void **state)
{
    (void)state;
    uint32_t ids[BLOCK + 1], count = BLOCK + 1, found;
    for (uint32_t i = 0; i <= BLOCK; i++)
        ids[i] = i;
    const ts_step_options names = {.size = sizeof names, .tokens = ids};
    ts_frame_options options = {
        .size = sizeof options, .seqs = 1, .new_tokens = BLOCK, .step = &names};
    worker w;
    worker_open(&w);
    ts_client *c = w.client;
    ts_frame *frame;
    ts_step *step;
    ts_seq seqs[2];
    DO(ts_seq_truncate(w.pool, &w.seqs[1], &(uint32_t){BLOCK}, 1));
    DO(ts_seq_create(w.pool, 1, seqs));
    assert_int_equal(ts_frame_new(w.pool, &options, &frame), TS_EINVAL);
    assert_non_null(strstr(ts_error(c), "each step has its own"));
    options.step = NULL;
    DO(ts_frame_new(w.pool, &options, &frame));
    for (int known = 0; known < 2; known++) {
        DO(ts_frame_begin(frame, seqs, 1, known ? &names : NULL, &step));
        DO(ts_step_commit(step, NULL));
        DO(ts_seq_match(w.pool, ids, &count, 1, NULL, &seqs[1], &found));
        assert_int_equal(found, known ? BLOCK : 0);
        DO(ts_seq_truncate(w.pool, seqs, &(uint32_t){0}, 1));
    }
    ts_frame_free(frame);
    worker_close(&w);
}

static void what_graphs_were_captured_with_is_not_a_steps_own(void **state)
{
    (void)state;
    const struct {
        ts_step_options own;
        const char *sentence; /* NULL: it is the frame's */
    } steps[] = {
        {{.heads = HEADS, .scale = 0.5f}, NULL},
        {{.heads = 1}, "a step of 1 query heads; its frame has 2"},
        {{.io_dtype = TS_DTYPE_BF16}, "io_dtype bf16; beside a pool of fp32 it must be fp32"},
        {{.io_dtype = (ts_dtype)9}, "io_dtype 9; beside a pool of fp32 it must be fp32"},
        {{.scale = 0.25f}, "a step with a scale of 0.25; its frame's is 0.5"},
        {{.no_run = true}, "a step of a frame that has no layer run"},
        {{.kernel = "v3"}, "a step with kernel 'v3'; its frame's is the pool's"},
    };
    const ts_step_options all = {.size = sizeof all, .heads = HEADS, .scale = 0.5f};
    worker w;
    worker_open(&w);
    ts_client *c = w.client;
    DO(ts_seq_truncate(w.pool, &w.seqs[1], &(uint32_t){BLOCK}, 1));
    ts_frame *frame = frame_of(&w, &all);
    for (size_t i = 0; i < sizeof steps / sizeof *steps; i++) {
        ts_step_options own = steps[i].own;
        ts_step *step;
        own.size = sizeof own;
        ts_status status = ts_frame_begin(frame, w.seqs, 1, &own, &step);
        assert_int_equal(status, steps[i].sentence == NULL ? TS_OK : TS_EINVAL);
        if (steps[i].sentence != NULL)
            assert_string_equal(ts_error(c), steps[i].sentence);
        else
            DO(ts_step_abort(step));
    }
    ts_frame_free(frame);
    worker_close(&w);
}

int main(void)
{
    setenv("TS_TEST_FAKE_GPU", "1", 1);
    ignore_threads_left();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_frame_that_is_made_before_all_else_knows_the_pools_addresses),
        cmocka_unit_test(a_step_waits_for_room_beside_the_calls_own_time),
        cmocka_unit_test(token_ids_are_a_steps_own),
        cmocka_unit_test(what_graphs_were_captured_with_is_not_a_steps_own),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
