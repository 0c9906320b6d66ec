/*
 * What a GPU's executor does, on a fake one, where several sessions have runs: when it joins them
 * and when it queues them ahead, who gets launches that are few, and what becomes of a run that
 * can't be launched.
 */
#include "gpu_executor_util.h"

#include "clock.h"

static void few_workers_are_queued_ahead(void **state)
{
    (void)state;
    enum { FEW = 5, RUNS = 3 };
    rig r;
    rig_new_joining(&r, 3600000, 4000000);
    test_job jobs[FEW][RUNS];
    for (uint32_t n = 0; n < RUNS; n++)
        for (uint32_t i = 0; i < FEW; i++) {
            job_init(&jobs[i][n], r.pages[i], n + 1);
            ts_gpu_executor_submit(r.executor, &jobs[i][n].job);
        }
    fake_gpu_await_waiting(r.gpu, FEW * RUNS);
    for (uint32_t i = 0; i < FEW; i++) {
        submitted(r.pages[i], RUNS);
        for (uint32_t n = 0; n < RUNS; n++)
            await_good(&jobs[i][n]);
    }
    assert_int_equal(fake_gpu_read(r.gpu).company, 1);
    rig_free(&r);
}

/* Of a crowd as many sessions have launches that wait as may, two each, and the others none. */
static void of_a_crowd_few_launches_wait_for_workers(void **state)
{
    (void)state;
    enum { RUNS = 8, WAITING = TS_GPU_STREAM_SLOTS / 2 };
    static test_job jobs[SESSIONS][RUNS];
    rig r;
    rig_new_joining(&r, 3600000, 4000000); /* a crowd stays one for long */
    for (uint32_t n = 1; n <= RUNS; n++)
        for (uint32_t i = 0; i < SESSIONS; i++) {
            job_init(&jobs[i][n - 1], r.pages[i], n);
            ts_gpu_executor_submit(r.executor, &jobs[i][n - 1].job);
        }
    fake_gpu_await_waiting(r.gpu, 2 * WAITING);
    uint32_t sessions = 0;
    for (uint32_t i = 0; i < SESSIONS; i++) {
        assert_true(r.pages[i]->waiting == 0 || r.pages[i]->waiting == 2);
        sessions += r.pages[i]->waiting > 0;
    }
    assert_int_equal(sessions, WAITING);
    for (uint32_t n = 1; n <= RUNS; n++) { /* in an order of their own */
        for (uint32_t i = 0; i < SESSIONS; i++)
            submitted(r.pages[i * 7 % SESSIONS], n);
        for (uint32_t i = 0; i < SESSIONS; i++)
            await_good(&jobs[i][n - 1]);
    }
    assert_int_equal(fake_gpu_read(r.gpu).most_waiting, 2 * WAITING);
    uint64_t runs, launches;
    ts_gpu_executor_counts(r.executor, &runs, &launches);
    assert_int_equal(runs, SESSIONS * RUNS);
    rig_free(&r);
}

/* Takes `count` of the device's launches, which nobody else gets until they are given back. */
static void take_launches(rig *r, ts_gpu_launch **taken, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++)
        assert_non_null(taken[i] = ts_gpu_launch_take(r->gpu, NULL));
}

static void give_launches_back(ts_gpu_launch **taken, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++)
        OK(ts_gpu_launch_finish(taken[i], NULL, NULL));
}

/* Sessions' runs that are ready and others that aren't, and what is no session's, alike or not. */
static void find_no_launch(uint32_t join_us)
{
    enum { RUNS = 3, OTHERS = 6 };
    static test_job jobs[SESSIONS][RUNS], others[OTHERS];
    rig r;
    ts_gpu_launch *taken[TS_GPU_LAUNCHES];
    rig_new_joining(&r, 3600000, join_us);
    take_launches(&r, taken, TS_GPU_LAUNCHES);
    for (uint32_t n = 0; n < RUNS; n++)
        for (uint32_t i = 0; i < SESSIONS; i++) {
            job_init(&jobs[i][n], r.pages[i], n + 1);
            jobs[i][n].job.kernel = i % 3 == 0 ? TS_KERNEL_V2 : TS_KERNEL_AUTO;
            if (i % 2 == 0)
                submitted(r.pages[i], n + 1);
            ts_gpu_executor_submit(r.executor, &jobs[i][n].job);
        }
    for (uint32_t i = 0; i < OTHERS; i++) {
        job_init(&others[i], NULL, 0);
        others[i].job.kernel = i % 2 == 0 ? TS_KERNEL_V2 : TS_KERNEL_AUTO;
        ts_gpu_executor_submit(r.executor, &others[i].job);
    }
    fake_gpu_await_refused(r.gpu, fake_gpu_read(r.gpu).refused + 3 * SESSIONS);
    uint64_t runs, launches;
    ts_gpu_executor_counts(r.executor, &runs, &launches);
    assert_int_equal(runs, 0);
    give_launches_back(taken, TS_GPU_LAUNCHES);
    for (uint32_t i = 0; i < SESSIONS; i++)
        submitted(r.pages[i], RUNS);
    for (uint32_t i = 0; i < OTHERS; i++)
        await_good(&others[i]);
    for (uint32_t i = 0; i < SESSIONS; i++) {
        for (uint32_t n = 0; n < RUNS; n++)
            await_good(&jobs[i][n]);
        assert_int_equal(r.pages[i]->host->completed, RUNS);
    }
    ts_gpu_executor_counts(r.executor, &runs, &launches);
    assert_int_equal(runs, SESSIONS * RUNS + OTHERS);
    rig_free(&r);
}

static void what_finds_no_launch_is_held_and_goes_when_there_is_one(void **state)
{
    (void)state;
    find_no_launch(0);
    find_no_launch(20);
    find_no_launch(4000000); /* a crowd to the end */
}

/* Who has much to do has no more of them than others. */
static void sessions_take_turns_at_the_launches_that_there_are(void **state)
{
    (void)state;
    enum { FREE = 5, RUNS = 6 };
    static test_job jobs[2][RUNS];
    rig r;
    ts_gpu_launch *taken[TS_GPU_LAUNCHES];
    rig_new(&r, 3600000);
    take_launches(&r, taken, TS_GPU_LAUNCHES - FREE);
    fake_gpu_shut_gate(r.gpu);
    for (uint32_t i = 0; i < 2; i++)
        for (uint32_t n = 0; n < RUNS; n++) {
            job_init(&jobs[i][n], r.pages[i], n + 1);
            ts_gpu_executor_submit(r.executor, &jobs[i][n].job);
            if (i == 0 && n == 0)
                fake_gpu_await_at_gate(r.gpu); /* the rest comes while the thread stands there */
        }
    fake_gpu_open_gate(r.gpu);
    fake_gpu_await_waiting(r.gpu, FREE);
    assert_int_equal(r.pages[0]->waiting, 3); /* the first, and then by turns */
    assert_int_equal(r.pages[1]->waiting, 2);
    give_launches_back(taken, TS_GPU_LAUNCHES - FREE);
    for (uint32_t i = 0; i < 2; i++) {
        submitted(r.pages[i], RUNS);
        for (uint32_t n = 0; n < RUNS; n++)
            await_good(&jobs[i][n]);
    }
    rig_free(&r);
}

/* It looks again each millisecond, when something comes, or when a launch ends. */
static void where_there_is_no_launch_a_crowd_does_not_keep_the_thread_busy(void **state)
{
    (void)state;
    enum { CROWD = 6, REFUSALS = 100 };
    rig r;
    test_job jobs[CROWD];
    ts_gpu_launch *taken[TS_GPU_LAUNCHES];
    rig_new_joining(&r, 3600000, 20); /* a crowd for 5 ms */
    take_launches(&r, taken, TS_GPU_LAUNCHES);
    const uint64_t before_ms = ts_now_ms();
    for (uint32_t i = 0; i < CROWD; i++) {
        job_init(&jobs[i], r.pages[i], 1);
        jobs[i].job.kernel = i == 0 ? TS_KERNEL_V2 : TS_KERNEL_AUTO;
        submitted(r.pages[i], 1);
        ts_gpu_executor_submit(r.executor, &jobs[i].job);
    }
    fake_gpu_await_refused(r.gpu, REFUSALS);
    const uint64_t rounds = ts_now_ms() - before_ms + 2 + CROWD;
    assert_true(fake_gpu_read(r.gpu).refused <= rounds * CROWD);
    give_launches_back(taken, TS_GPU_LAUNCHES);
    for (uint32_t i = 0; i < CROWD; i++)
        await_good(&jobs[i]);
    rig_free(&r);
}

/* Its session's run before it is under way then: who waits for that isn't let go. */
static void a_run_that_can_not_be_launched_fails_in_its_turn(void **state)
{
    (void)state;
    static const fake_gpu_lack lacks[] = {FAKE_LACKS_PLANS, FAKE_LACKS_SCRATCH};
    for (uint32_t n = 0; n < sizeof lacks / sizeof *lacks; n++) {
        rig r;
        rig_new(&r, 3600000);
        test_job first, second, third, other;
        ts_signals_page *page = r.pages[5];
        job_init(&first, page, 1);
        ts_gpu_executor_submit(r.executor, &first.job);
        fake_gpu_await_waiting(r.gpu, 1);
        fake_gpu_let_lack(r.gpu, lacks[n]);
        job_init(&second, page, 2);
        ts_gpu_executor_submit(r.executor, &second.job);
        for (uint32_t i = 0; i < 2; i++) {
            job_init(&other, NULL, 0);
            ts_gpu_executor_submit(r.executor, &other.job);
            await_job(&other); /* the second was tried before it */
            assert_int_equal(other.job.status, TS_ENOMEM);
        }
        assert_false(is_done(&second));
        assert_int_equal(page->host->completed, 0);
        assert_int_equal(*page->done, 0);
        submitted(page, 1);
        await_good(&first);
        assert_int_equal(fake_gpu_read(r.gpu).lacked, 3); /* nor is it tried again before */
        submitted(page, 2);
        await_job(&second);
        assert_int_equal(second.job.status, TS_ENOMEM);
        assert_int_equal(page->host->completed, 2);
        assert_int_equal(*page->done, 2);
        fake_gpu_let_lack(r.gpu, FAKE_LACKS_NOTHING);
        submitted(page, 3);
        job_init(&third, page, 3);
        ts_gpu_executor_submit(r.executor, &third.job);
        await_good(&third);
        assert_int_equal(page->host->completed, 3);
        assert_int_equal(*page->done, 3);
        fake_gpu_await_idle(r.gpu); /* what was queued of the second waits for its words, too */
        rig_free(&r);
    }
}

/* The executor looks at words of runs that are over, also when their sessions are gone. */
static void sessions_of_a_crowd_end(void **state)
{
    (void)state;
    static test_job jobs[SESSIONS][2];
    rig r;
    rig_new_joining(&r, 3600000, 4000000);
    for (uint32_t number = 1; number <= 2; number++) {
        const uint32_t first = number == 1 ? 0 : SESSIONS / 2;
        for (uint32_t i = first; i < SESSIONS; i++) {
            job_init(&jobs[i][number - 1], r.pages[i], number);
            ts_gpu_executor_submit(r.executor, &jobs[i][number - 1].job);
        }
        for (uint32_t i = SESSIONS; i-- > first;) {
            submitted(r.pages[i], number);
            await_good(&jobs[i][number - 1]);
        }
        for (uint32_t i = 0; number == 1 && i < SESSIONS / 2; i++) {
            ts_signals_release(r.pages[i]);
            r.pages[i] = NULL;
        }
    }
    assert_true(fake_gpu_read(r.gpu).company > 1);
    rig_free(&r);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(sessions_of_a_crowd_end),
        cmocka_unit_test(of_a_crowd_few_launches_wait_for_workers),
        cmocka_unit_test(what_finds_no_launch_is_held_and_goes_when_there_is_one),
        cmocka_unit_test(sessions_take_turns_at_the_launches_that_there_are),
        cmocka_unit_test(where_there_is_no_launch_a_crowd_does_not_keep_the_thread_busy),
        cmocka_unit_test(a_run_that_can_not_be_launched_fails_in_its_turn),
        cmocka_unit_test(few_workers_are_queued_ahead),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
