/*
 * What the daemon does around a GPU, on a fake one: joining jobs, keeping the order of runs
 * on streams, holding up nobody for a worker that does not submit, and a device that is lost.
 */
#include "gpu_executor_util.h"

#include "thread_first.h"

#include <dirent.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/syscall.h>

static void jobs_that_are_ready_together_and_alike_become_one_launch(void **state)
{
    (void)state;
    rig r;
    rig_new(&r, 3600000);
    test_job jobs[6];
    for (int i = 0; i < 6; i++)
        job_init(&jobs[i], NULL, 0);
    jobs[4].job.kernel = TS_KERNEL_V2; /* unlike the others */
    fake_gpu_shut_gate(r.gpu);
    ts_gpu_executor_submit(r.executor, &jobs[0].job);
    fake_gpu_await_at_gate(r.gpu); /* the executor's thread stands there while the others come */
    for (int i = 1; i < 6; i++)
        ts_gpu_executor_submit(r.executor, &jobs[i].job);
    fake_gpu_open_gate(r.gpu);
    for (int i = 0; i < 6; i++)
        await_good(&jobs[i]);
    assert_int_equal(fake_gpu_read(r.gpu).launches, 3); /* 1, then 4 together, and the unlike one */
    uint64_t runs, launches;
    ts_gpu_executor_counts(r.executor, &runs, &launches);
    assert_int_equal(runs, 6);
    assert_int_equal(launches, 3);
    assert_int_equal(fake_gpu_read(r.gpu).kernel, TS_KERNEL_V2);
    rig_free(&r);
}

static void a_run_on_a_stream_starts_when_it_is_submitted_and_says_when_it_is_done(void **state)
{
    (void)state;
    rig r;
    rig_new(&r, 3600000);
    test_job first, second, other;
    ts_signals_page *page = r.pages[3];
    job_init(&first, page, 1);
    job_init(&second, page, 2);
    job_init(&other, NULL, 0);
    ts_gpu_executor_submit(r.executor, &first.job);
    ts_gpu_executor_submit(r.executor, &second.job);
    fake_gpu_await_waiting(r.gpu, 2);
    ts_gpu_executor_submit(r.executor, &other.job);
    await_good(&other); /* held up by nobody */
    assert_false(is_done(&first) || is_done(&second));
    assert_int_equal(page->host->completed, 0);
    submitted(page, 1);
    await_good(&first);
    assert_int_equal(__atomic_load_n(&page->host->completed, __ATOMIC_ACQUIRE), 1);
    assert_false(is_done(&second));
    submitted(page, 2);
    await_good(&second);
    assert_int_equal(__atomic_load_n(&page->host->completed, __ATOMIC_ACQUIRE), 2);
    rig_free(&r);
}

/* The second run's inputs are there first: it waits for the first run all the same. */
static void runs_of_one_session_complete_in_order(void **state)
{
    (void)state;
    rig r;
    rig_new(&r, 3600000);
    test_job first, second;
    ts_signals_page *page = r.pages[0];
    submitted(page, 2);
    job_init(&first, page, 1);
    job_init(&second, page, 2);
    ts_gpu_executor_submit(r.executor, &second.job);
    fake_gpu_await_waiting(r.gpu, 1);
    page->host->completed = 77; /* what the worker writes there is nothing to the daemon */
    assert_false(is_done(&second));
    ts_gpu_executor_submit(r.executor, &first.job);
    await_good(&first);
    await_good(&second);
    assert_int_equal(page->host->completed, 2);
    rig_free(&r);
}

/* The first waits for the run before it and for its worker; the others are queued behind it. */
static void runs_that_are_queued_ahead_follow_each_other(void **state)
{
    (void)state;
    rig r;
    rig_new(&r, 3600000);
    test_job jobs[4];
    ts_signals_page *page = r.pages[0];
    for (uint32_t i = 0; i < 4; i++) {
        job_init(&jobs[i], page, i + 1);
        ts_gpu_executor_submit(r.executor, &jobs[i].job);
        fake_gpu_await_waiting(r.gpu, i + 1);
    }
    assert_int_equal(fake_gpu_read(r.gpu).words, 5);
    submitted(page, 4); /* all at once, as only a worker that is wrong does */
    for (uint32_t i = 0; i < 4; i++)
        await_good(&jobs[i]);
    assert_int_equal(page->host->completed, 4);
    assert_int_equal(*page->done, 4);
    rig_free(&r);
}

static void workers_that_do_not_submit_take_only_their_share(void **state)
{
    (void)state;
    rig r;
    rig_new(&r, 3600000);
    static test_job jobs[SESSIONS][9];
    test_job other;
    const uint32_t most = TS_GPU_LAUNCHES * 3 / 4;
    for (uint32_t s = 0; s < SESSIONS; s++)
        for (uint32_t i = 0; i < 9; i++) {
            job_init(&jobs[s][i], r.pages[s], i + 1);
            ts_gpu_executor_submit(r.executor, &jobs[s][i].job);
            if (s == 0 && i == 8) /* 8 of a session wait on the device, the 9th waits here */
                fake_gpu_await_waiting(r.gpu, 8);
        }
    fake_gpu_await_waiting(r.gpu, most);
    job_init(&other, NULL, 0);
    ts_gpu_executor_submit(r.executor, &other.job);
    await_good(&other);
    for (uint32_t s = 0; s < SESSIONS; s++)
        submitted(r.pages[s], 9);
    for (uint32_t s = 0; s < SESSIONS; s++)
        for (uint32_t i = 0; i < 9; i++)
            await_good(&jobs[s][i]);
    assert_int_equal(fake_gpu_read(r.gpu).most_waiting, most);
    rig_free(&r);
}

/* Each has a slot: half of them stay free for those that can go at once. */
static void not_all_workers_are_waited_for_on_the_device(void **state)
{
    (void)state;
    rig r;
    rig_new(&r, 3600000);
    test_job jobs[SESSIONS], other;
    for (uint32_t s = 0; s < SESSIONS; s++) {
        job_init(&jobs[s], r.pages[s], 1);
        ts_gpu_executor_submit(r.executor, &jobs[s].job);
    }
    fake_gpu_await_waiting(r.gpu, TS_GPU_STREAM_SLOTS / 2);
    job_init(&other, NULL, 0);
    ts_gpu_executor_submit(r.executor, &other.job);
    await_good(&other);
    submitted(r.pages[SESSIONS - 1], 1); /* ready: it needs no slot to wait in */
    await_good(&jobs[SESSIONS - 1]);
    for (uint32_t s = 0; s < SESSIONS - 1; s++)
        submitted(r.pages[s], 1);
    for (uint32_t s = 0; s < SESSIONS - 1; s++)
        await_good(&jobs[s]);
    assert_int_equal(fake_gpu_read(r.gpu).most_waiting, TS_GPU_STREAM_SLOTS / 2);
    rig_free(&r);
}

static void a_run_that_is_submitted_too_late_fails_alone(void **state)
{
    (void)state;
    rig r;
    rig_new(&r, 50);
    test_job late, next;
    ts_signals_page *page = r.pages[1];
    job_init(&late, page, 1);
    ts_gpu_executor_submit(r.executor, &late.job);
    await_job(&late);
    assert_int_equal(late.job.status, TS_ETIMEOUT);
    assert_string_equal(late.job.why, "the worker did not submit run 1 in time");
    assert_int_equal(page->host->completed, 1); /* nor does the worker's stream wait on */
    submitted(page, 2);
    job_init(&next, page, 2);
    ts_gpu_executor_submit(r.executor, &next.job);
    await_good(&next);
    rig_free(&r);
}

static void a_batch_that_ends_lets_go_whoever_waits(void **state)
{
    (void)state;
    rig r;
    rig_new(&r, 3600000);
    test_job jobs[10];
    ts_signals_page *page = r.pages[0];
    for (uint32_t i = 0; i < 10; i++) { /* on the device and here */
        job_init(&jobs[i], page, i + 1);
        __atomic_store_n(&page->last_number, i + 1, __ATOMIC_RELEASE);
        ts_gpu_executor_submit(r.executor, &jobs[i].job);
    }
    fake_gpu_await_waiting(r.gpu, 8);
    rig_free(&r);
    for (uint32_t i = 0; i < 10; i++) {
        assert_true(is_done(&jobs[i]));
        await_job(&jobs[i]);
    }
}

/* The nice value of the process's thread of this name. */
static int nice_of(const char *wanted)
{
    char path[300], name[32];
    int nice = 99;
    DIR *tasks = opendir("/proc/self/task");
    assert_non_null(tasks);
    for (struct dirent *task; (task = readdir(tasks)) != NULL;) {
        snprintf(path, sizeof path, "/proc/self/task/%s/comm", task->d_name);
        FILE *comm = task->d_name[0] == '.' ? NULL : fopen(path, "r");
        if (comm != NULL && fgets(name, sizeof name, comm) != NULL &&
            strncmp(name, wanted, strlen(wanted)) == 0 && name[strlen(wanted)] == '\n')
            nice = getpriority(PRIO_PROCESS, (id_t)atoi(task->d_name));
        if (comm != NULL)
            (void)fclose(comm);
    }
    (void)closedir(tasks);
    return nice;
}

static void *try_it(void *arg)
{
    ts_thread_first();
    *(int *)arg = getpriority(PRIO_PROCESS, (id_t)syscall(SYS_gettid));
    return NULL;
}

static void the_thread_goes_first_where_it_may(void **state)
{
    (void)state;
    rig r;
    pthread_t thread;
    test_job job;
    const int usual = getpriority(PRIO_PROCESS, 0);
    int can;
    assert_int_equal(pthread_create(&thread, NULL, try_it, &can), 0);
    assert_int_equal(pthread_join(thread, NULL), 0);
    assert_true(can == usual || can == TS_NICE_FIRST);
    rig_new(&r, 3600000);
    job_init(&job, NULL, 0);
    ts_gpu_executor_submit(r.executor, &job.job);
    await_good(&job); /* it has begun */
    assert_int_equal(nice_of("gpu"), can);
    assert_int_equal(getpriority(PRIO_PROCESS, 0), usual); /* and no other */
    rig_free(&r);
}

static void a_lost_device_fails_every_job_and_is_told_once(void **state)
{
    (void)state;
    rig r;
    rig_new(&r, 3600000);
    test_job good, waiting, bad, late;
    job_init(&good, NULL, 0);
    ts_gpu_executor_submit(r.executor, &good.job);
    await_good(&good);
    job_init(&waiting, r.pages[2], 1);
    ts_gpu_executor_submit(r.executor, &waiting.job);
    fake_gpu_await_waiting(r.gpu, 1);
    fake_gpu_break(r.gpu);
    job_init(&bad, NULL, 0);
    ts_gpu_executor_submit(r.executor, &bad.job);
    await_job(&bad);
    assert_int_equal(bad.job.status, TS_EDEVICE);
    assert_string_equal(bad.job.why, "cuda:0 (a fake) failed: cudaErrorFake");
    job_init(&late, r.pages[4], 1); /* fails at once, submitted or not */
    ts_gpu_executor_submit(r.executor, &late.job);
    await_job(&late);
    assert_int_equal(late.job.status, TS_EDEVICE);
    assert_int_equal(r.pages[4]->host->completed, 1);
    submitted(r.pages[2], 1);
    await_job(&waiting);
    assert_int_equal(waiting.job.status, TS_EDEVICE);
    rig_free(&r);
    assert_int_equal(failures, 1);
    assert_string_equal(failure, "cuda:0 (a fake) failed: cudaErrorFake");
}

/* As when another client of CUDA's multi-process service faults. */
static void a_device_that_is_lost_while_nothing_runs_is_told_too(void **state)
{
    (void)state;
    rig r;
    rig_new(&r, 3600000);
    fake_gpu_break(r.gpu);
    while (sem_wait(&failed) != 0)
        ;
    test_job late;
    job_init(&late, NULL, 0);
    ts_gpu_executor_submit(r.executor, &late.job);
    await_job(&late);
    assert_int_equal(late.job.status, TS_EDEVICE);
    rig_free(&r);
    assert_int_equal(failures, 1);
    assert_string_equal(failure, "cuda:0 (a fake) failed: cudaErrorFake");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(jobs_that_are_ready_together_and_alike_become_one_launch),
        cmocka_unit_test(a_run_on_a_stream_starts_when_it_is_submitted_and_says_when_it_is_done),
        cmocka_unit_test(runs_of_one_session_complete_in_order),
        cmocka_unit_test(runs_that_are_queued_ahead_follow_each_other),
        cmocka_unit_test(workers_that_do_not_submit_take_only_their_share),
        cmocka_unit_test(not_all_workers_are_waited_for_on_the_device),
        cmocka_unit_test(a_run_that_is_submitted_too_late_fails_alone),
        cmocka_unit_test(a_batch_that_ends_lets_go_whoever_waits),
        cmocka_unit_test(the_thread_goes_first_where_it_may),
        cmocka_unit_test(a_lost_device_fails_every_job_and_is_told_once),
        cmocka_unit_test(a_device_that_is_lost_while_nothing_runs_is_told_too),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
