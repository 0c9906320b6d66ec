/*
 * What a GPU's executor does, on a fake one, whatever comes: few sessions and many, runs posted one
 * by one and a step's at once, workers that think for long, launches that are few, and times at
 * which no launch may wait for a worker. Every run ends, with the right result.
 */
#include "gpu_executor_util.h"

#include <pthread.h>
#include <stdatomic.h>
#include <time.h>

enum { MIXES = 12, RUNS = 24 };

/* A worker, and its runs. */
typedef struct worker {
    ts_signals_page *page;
    rng random;
    uint32_t most;   /* that it posts at once */
    uint32_t posted; /* so far */
    test_job jobs[RUNS];
    pthread_t thread;
} worker;

static rig r;
static worker workers[SESSIONS];
static pthread_mutex_t owner = PTHREAD_MUTEX_INITIALIZER; /* of the engine: it submits jobs */

static void think(uint32_t ns)
{
    nanosleep(&(struct timespec){.tv_nsec = ns}, NULL);
}

static void post(worker *w)
{
    pthread_mutex_lock(&owner);
    test_job *t = &w->jobs[w->posted++];
    job_init(t, w->page, w->posted);
    t->job.kernel = rng_below(&w->random, 3) == 0 ? TS_KERNEL_V2 : TS_KERNEL_AUTO;
    ts_gpu_executor_submit(r.executor, &t->job);
    pthread_mutex_unlock(&owner);
}

static void *work(void *arg)
{
    worker *w = arg;
    for (uint32_t n = 1; n <= RUNS; n++) {
        if (w->posted < n || rng_below(&w->random, 3) == 0)
            for (uint32_t i = rng_below(&w->random, w->most) + 1; i > 0 && w->posted < RUNS; i--)
                post(w);
        if (rng_below(&w->random, 10) == 0)
            think(rng_below(&w->random, 8000000));
        submitted(w->page, n);
        while (rng_below(&w->random, 4) > 0 &&
               (int32_t)(__atomic_load_n(&w->page->host->completed, __ATOMIC_ACQUIRE) - n) < 0)
            think(5000);
    }
    return NULL;
}

/* Frees and loads come and go, which no launch may wait beside. */
static void *refuse(void *over)
{
    rng random = {5};
    while (!atomic_load((atomic_bool *)over)) {
        fake_gpu_refuse_waits(r.gpu, rng_below(&random, 3) == 0);
        think(rng_below(&random, 6000000));
    }
    fake_gpu_refuse_waits(r.gpu, false);
    return NULL;
}

static void try_mix(uint32_t seed)
{
    static const uint32_t joins[] = {0, 20, 200, 4000000};
    rng random = {seed};
    pthread_t refusing;
    atomic_bool over = false;
    ts_gpu_launch *taken[TS_GPU_LAUNCHES];
    const uint32_t sessions = 1 + rng_below(&random, SESSIONS);
    const uint32_t few =
        rng_below(&random, 3) == 0 ? TS_GPU_LAUNCHES - 1 - rng_below(&random, 4) : 0;
    rig_new_joining(&r, 3600000, joins[rng_below(&random, 4)]);
    for (uint32_t i = 0; i < few; i++)
        assert_non_null(taken[i] = ts_gpu_launch_take(r.gpu, NULL));
    assert_int_equal(pthread_create(&refusing, NULL, refuse, &over), 0);
    for (uint32_t i = 0; i < sessions; i++) {
        worker *w = &workers[i];
        *w = (worker){
            .page = r.pages[i], .random = {seed * 1000 + i}, .most = 1 + rng_below(&random, RUNS)};
        assert_int_equal(pthread_create(&w->thread, NULL, work, w), 0);
    }
    for (uint32_t i = 0; i < sessions; i++) {
        pthread_join(workers[i].thread, NULL);
        for (uint32_t n = 0; n < RUNS; n++)
            await_good(&workers[i].jobs[n]);
        assert_int_equal(workers[i].page->host->completed, RUNS);
    }
    atomic_store(&over, true);
    pthread_join(refusing, NULL);
    for (uint32_t i = 0; i < few; i++)
        OK(ts_gpu_launch_finish(taken[i], NULL, NULL));
    rig_free(&r);
}

static void every_run_ends_with_its_result(void **state)
{
    (void)state;
    for (uint32_t seed = 1; seed <= MIXES; seed++)
        try_mix(seed);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(every_run_ends_with_its_result)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
