/*
 * What the daemon does around a GPU, on a fake one: joining jobs, keeping the order of runs
 * on streams, holding up nobody for a worker that does not submit, and a device that is lost.
 */
#include "test_util.h"

#include "clock.h"
#include "fake_gpu.h"
#include "gpu_executor.h"
#include "thread_first.h"

#include <dirent.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
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

static void on_done(ts_job *job)
{
    sem_post(&((test_job *)job)->done);
}

static void job_init(test_job *t, ts_signals_page *signals, uint32_t number)
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

static void await_job(test_job *t)
{
    while (sem_wait(&t->done) != 0)
        ;
    ts_gpu_plan_free(t->plan.plan);
    t->plan = (ts_job_plan){0};
}

static void await_good(test_job *t)
{
    await_job(t);
    assert_int_equal(t->job.status, TS_OK);
    assert_memory_equal(t->out, t->v, sizeof t->out);
}

static bool is_done(test_job *t)
{
    int value;
    sem_getvalue(&t->done, &value);
    return value > 0;
}

static uint32_t failures;
static char failure[256];
static sem_t failed;

static void on_failure(const char *sentence)
{
    failures++;
    snprintf(failure, sizeof failure, "%s", sentence);
    sem_post(&failed);
}

typedef struct rig {
    ts_gpu *gpu;
    ts_gpu_executor *executor;
    ts_signals_page *pages[SESSIONS];
} rig;

static void rig_new_joining(rig *r, uint32_t submit_ms, uint32_t join_us)
{
    memset(r, 0, sizeof *r);
    failures = 0;
    sem_init(&failed, 0, 0);
    alarm(120);
    r->gpu = fake_gpu_new();
    OK(ts_gpu_executor_new(r->gpu, SESSIONS, submit_ms, join_us, on_failure, &r->executor, why,
                           sizeof why));
    for (uint32_t i = 0; i < SESSIONS; i++) {
        uint32_t *done, *there;
        OK(ts_signals_new(&r->pages[i], why, sizeof why));
        ts_gpu_executor_word(r->executor, i, &done, &there);
        OK(ts_signals_reach(r->pages[i], r->gpu, done, there, why, sizeof why));
    }
}

/* Where each run is launched by itself. */
static void rig_new(rig *r, uint32_t submit_ms)
{
    rig_new_joining(r, submit_ms, 0);
}

static void rig_free(rig *r)
{
    ts_gpu_executor_free(r->executor);
    for (uint32_t i = 0; i < SESSIONS; i++)
        ts_signals_release(r->pages[i]);
    fake_gpu_free(r->gpu);
    alarm(0);
}

static void submitted(ts_signals_page *page, uint32_t number)
{
    __atomic_store_n(&page->host->submitted, number, __ATOMIC_RELEASE);
}

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

static void in_a_crowd_no_launch_waits_for_a_worker(void **state)
{
    (void)state;
    enum { RUNS = 8 };
    static test_job jobs[SESSIONS][RUNS];
    rig r;
    rig_new_joining(&r, 3600000, 4000000); /* a crowd stays one for long */
    for (uint32_t n = 1; n <= RUNS; n++)
        for (uint32_t i = 0; i < SESSIONS; i++) {
            job_init(&jobs[i][n - 1], r.pages[i], n);
            ts_gpu_executor_submit(r.executor, &jobs[i][n - 1].job);
        }
    for (uint32_t n = 1; n <= RUNS; n++) { /* in an order of their own */
        for (uint32_t i = 0; i < SESSIONS; i++)
            submitted(r.pages[i * 7 % SESSIONS], n);
        for (uint32_t i = 0; i < SESSIONS; i++)
            await_good(&jobs[i][n - 1]);
    }
    assert_true(fake_gpu_read(r.gpu).most_waiting <= 2); /* the first that came weren't a crowd */
    assert_true(fake_gpu_read(r.gpu).signalled >= RUNS - 1);
    uint64_t runs, launches;
    ts_gpu_executor_counts(r.executor, &runs, &launches);
    assert_int_equal(runs, SESSIONS * RUNS);
    rig_free(&r);
}

/* So many of the device's launches are somebody's until they are given back. */
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
    enum { CROWD = 4, REFUSALS = 100 };
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

static void one_or_two_workers_are_queued_ahead_as_ever(void **state)
{
    (void)state;
    rig r;
    rig_new_joining(&r, 3600000, 4000000);
    test_job jobs[2];
    for (uint32_t i = 0; i < 2; i++) {
        job_init(&jobs[i], r.pages[i], 1);
        ts_gpu_executor_submit(r.executor, &jobs[i].job);
    }
    fake_gpu_await_waiting(r.gpu, 2);
    for (uint32_t i = 0; i < 2; i++) {
        submitted(r.pages[i], 1);
        await_good(&jobs[i]);
    }
    assert_int_equal(fake_gpu_read(r.gpu).signalled, 0); /* who waits for long has an event */
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
        cmocka_unit_test(in_a_crowd_no_launch_waits_for_a_worker),
        cmocka_unit_test(what_finds_no_launch_is_held_and_goes_when_there_is_one),
        cmocka_unit_test(sessions_take_turns_at_the_launches_that_there_are),
        cmocka_unit_test(where_there_is_no_launch_a_crowd_does_not_keep_the_thread_busy),
        cmocka_unit_test(a_run_that_can_not_be_launched_fails_in_its_turn),
        cmocka_unit_test(the_thread_goes_first_where_it_may),
        cmocka_unit_test(one_or_two_workers_are_queued_ahead_as_ever),
        cmocka_unit_test(a_lost_device_fails_every_job_and_is_told_once),
        cmocka_unit_test(a_device_that_is_lost_while_nothing_runs_is_told_too),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
