/* How launches' ends are seen by words (kernels/gpu/launch_ends.c), on a device of the test's own.
 */
#include "test_util.h"

#include "device.h"

#include <semaphore.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define LAUNCHES 3u

/* A launch of a test's, and what was told of it. */
typedef struct ended {
    sem_t done;
    ts_status status;
    char why[64];
    atomic_bool is_free; /* it was given back */
} ended;

static ts_gpu *gpu;
static ended all[LAUNCHES];
static struct stream {
    atomic_int answer;
} streams[LAUNCHES];
static bool pins;
static ts_status signals; /* what comes of a launch's signals */

/* ---- the device ---- */

void ts_gpu_begin_thread(ts_gpu *g)
{
    (void)g;
}

ts_status ts_gpu_enter(ts_gpu *g, char *why, size_t why_bytes)
{
    (void)g;
    (void)why;
    (void)why_bytes;
    return TS_OK;
}

ts_status ts_gpu_pin(ts_gpu *g, void *host, size_t bytes, void **device, char *why,
                     size_t why_bytes)
{
    (void)g;
    (void)bytes;
    *device = host;
    snprintf(why, why_bytes, "%s", pins ? "" : "nothing is pinned");
    return pins ? TS_OK : TS_ENOMEM;
}

void ts_gpu_unpin_unmap(ts_gpu *g, void *host, size_t bytes)
{
    (void)g;
    munmap(host, bytes);
}

void ts_gpu_launch_give_back(ts_gpu_launch *l)
{
    atomic_store(&all[l - gpu->launches].is_free, true);
}

ts_status ts_gpu_launch_signal(ts_gpu_launch *l, const ts_gpu_signal *words, uint32_t count)
{
    (void)words;
    assert_int_equal(count, 0);
    if (signals == TS_OK)
        l->end_value++;
    return signals;
}

cudaError_t cudaStreamQuery(cudaStream_t stream)
{
    return (cudaError_t)atomic_load(&((struct stream *)stream)->answer);
}

const char *cudaGetErrorName(cudaError_t error)
{
    return error == cudaSuccess ? "cudaSuccess" : "cudaErrorOfTheTest";
}

/* ---- the tests ---- */

static void note(void *arg, ts_status status, const char *why)
{
    ended *e = arg;
    assert_true(atomic_load(&e->is_free)); /* before: whoever hears of it may take one */
    e->status = status;
    snprintf(e->why, sizeof e->why, "%s", why);
    sem_post(&e->done);
}

static int set_up(void **state)
{
    char why[TS_GPU_WHY_BYTES];
    (void)state;
    gpu = calloc(1, sizeof *gpu);
    assert_non_null(gpu);
    pthread_mutex_init(&gpu->lock, NULL);
    pins = true;
    signals = TS_OK;
    assert_int_equal(ts_gpu_launch_ends_init(gpu, why, sizeof why), TS_OK);
    for (uint32_t i = 0; i < LAUNCHES; i++) {
        ts_gpu_launch *l = &gpu->launches[i];
        l->gpu = gpu;
        l->stream = (cudaStream_t)&streams[i];
        l->end_value = 7; /* as after seven signals */
        l->tells_end = true;
        atomic_store(&streams[i].answer, cudaErrorNotReady);
        memset(&all[i], 0, sizeof all[i]);
        sem_init(&all[i].done, 0, 0);
    }
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    ts_gpu_launch_ends_fini(gpu);
    pthread_mutex_destroy(&gpu->lock);
    free(gpu);
    return 0;
}

static void finish(uint32_t i)
{
    assert_int_equal(ts_gpu_launch_finish(&gpu->launches[i], note, &all[i]), TS_OK);
}

/* As the device does behind the launch's signals. */
static void write_word(uint32_t i, uint32_t value)
{
    __atomic_store_n(gpu->launches[i].end_there, value, __ATOMIC_RELEASE);
}

static void await(uint32_t i, ts_status status, const char *why)
{
    while (sem_wait(&all[i].done) != 0)
        ;
    assert_int_equal(all[i].status, status);
    assert_string_equal(all[i].why, why);
}

static bool is_told(uint32_t i)
{
    int count;
    sem_getvalue(&all[i].done, &count);
    return count > 0 || atomic_load(&all[i].is_free);
}

static void each_launch_ends_with_its_word(void **state)
{
    (void)state;
    static const uint32_t order[LAUNCHES] = {2, 0, 1};
    for (uint32_t round = 0; round < 100; round++) {
        for (uint32_t i = 0; i < LAUNCHES; i++) {
            gpu->launches[i].end_value++;
            finish(i);
        }
        for (uint32_t n = 0; n < LAUNCHES; n++) {
            for (uint32_t later = n; later < LAUNCHES; later++)
                assert_false(is_told(order[later]));
            write_word(order[n], gpu->launches[order[n]].end_value - 1); /* the one before */
            write_word(order[n], gpu->launches[order[n]].end_value);
            await(order[n], TS_OK, "cudaSuccess");
        }
        for (uint32_t i = 0; i < LAUNCHES; i++)
            atomic_store(&all[i].is_free, false);
    }
}

/* What was queued last may have no signals. */
static void a_launch_that_tells_no_end_is_made_to(void **state)
{
    (void)state;
    gpu->launches[0].tells_end = false;
    write_word(0, 7);
    finish(0);
    finish(1);
    write_word(1, 7);
    await(1, TS_OK, "cudaSuccess");
    assert_false(is_told(0));
    write_word(0, 8);
    await(0, TS_OK, "cudaSuccess");
}

static void nobody_is_told_of_a_launch_that_cant_be_finished(void **state)
{
    (void)state;
    gpu->launches[0].tells_end = false;
    signals = TS_EDEVICE;
    assert_int_equal(ts_gpu_launch_finish(&gpu->launches[0], note, &all[0]), TS_EDEVICE);
    write_word(0, 7);
    finish(1);
    write_word(1, 7);
    await(1, TS_OK, "cudaSuccess");
    assert_false(is_told(0));
}

/* Waits until the test lets it go on. */
static void stay(void *arg, ts_status status, const char *why)
{
    (void)status;
    (void)why;
    sem_t *both = arg;
    sem_post(&both[0]);
    while (sem_wait(&both[1]) != 0)
        ;
}

static uint32_t count_over(void)
{
    pthread_mutex_lock(&gpu->lock);
    const uint32_t over = ts_gpu_launches_over(gpu);
    pthread_mutex_unlock(&gpu->lock);
    return over;
}

/* Who is told of an end may do other work meanwhile, which isn't to wait for what is over. */
static void a_launch_is_over_before_it_is_told(void **state)
{
    (void)state;
    sem_t both[2];
    for (uint32_t i = 0; i < 2; i++)
        sem_init(&both[i], 0, 0);
    gpu->launches[0].waits = gpu->launches[1].waits = gpu->launches[2].waits = true;
    assert_int_equal(ts_gpu_launch_finish(&gpu->launches[0], stay, both), TS_OK);
    finish(1);
    finish(2);
    write_word(0, 7);
    while (sem_wait(&both[0]) != 0)
        ;
    assert_int_equal(count_over(), 0);
    write_word(1, 7);
    assert_int_equal(count_over(), 1);
    assert_false(is_told(1));
    sem_post(&both[1]);
    await(1, TS_OK, "cudaSuccess");
    assert_int_equal(count_over(), 0);
    write_word(2, 7);
    await(2, TS_OK, "cudaSuccess");
}

static void a_word_that_wraps_round_is_seen(void **state)
{
    (void)state;
    write_word(0, UINT32_MAX);
    gpu->launches[0].end_value = 0;
    finish(0);
    assert_false(is_told(0));
    write_word(0, 0);
    await(0, TS_OK, "cudaSuccess");
}

/* A device that is lost writes no words. */
static void an_error_ends_the_launches_of_its_stream(void **state)
{
    (void)state;
    for (uint32_t i = 0; i < LAUNCHES; i++)
        finish(i);
    atomic_store(&streams[1].answer, cudaErrorIllegalAddress);
    await(1, TS_EDEVICE, "cudaErrorOfTheTest");
    assert_false(is_told(0));
    assert_false(is_told(2));
    write_word(2, 7);
    await(2, TS_OK, "cudaSuccess");
    atomic_store(&streams[0].answer, cudaErrorIllegalAddress);
    await(0, TS_EDEVICE, "cudaErrorOfTheTest");
}

static void a_stream_that_is_done_ends_its_launches(void **state)
{
    (void)state;
    finish(0);
    atomic_store(&streams[0].answer, cudaSuccess);
    await(0, TS_OK, "cudaSuccess");
}

/* NULL: the launch was over then. */
static void *end_it(void *arg)
{
    ts_gpu_launch_ends_fini(gpu);
    return atomic_load(&all[0].is_free) ? NULL : arg;
}

static void the_end_waits_for_the_last_launch(void **state)
{
    char why[TS_GPU_WHY_BYTES];
    pthread_t thread;
    void *early;
    (void)state;
    finish(0);
    assert_int_equal(pthread_create(&thread, NULL, end_it, gpu), 0);
    write_word(0, 7);
    await(0, TS_OK, "cudaSuccess");
    pthread_join(thread, &early);
    assert_null(early);
    memset(&gpu->ends, 0, sizeof gpu->ends);
    assert_int_equal(ts_gpu_launch_ends_init(gpu, why, sizeof why), TS_OK); /* for tear_down */
}

static void memory_that_cant_be_pinned_is_told(void **state)
{
    char why[TS_GPU_WHY_BYTES];
    (void)state;
    ts_gpu_launch_ends_fini(gpu);
    memset(&gpu->ends, 0, sizeof gpu->ends);
    pins = false;
    assert_int_equal(ts_gpu_launch_ends_init(gpu, why, sizeof why), TS_ENOMEM);
    assert_string_equal(why, "nothing is pinned");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(each_launch_ends_with_its_word, set_up, tear_down),
        cmocka_unit_test_setup_teardown(a_launch_that_tells_no_end_is_made_to, set_up, tear_down),
        cmocka_unit_test_setup_teardown(nobody_is_told_of_a_launch_that_cant_be_finished, set_up,
                                        tear_down),
        cmocka_unit_test_setup_teardown(a_launch_is_over_before_it_is_told, set_up, tear_down),
        cmocka_unit_test_setup_teardown(a_word_that_wraps_round_is_seen, set_up, tear_down),
        cmocka_unit_test_setup_teardown(an_error_ends_the_launches_of_its_stream, set_up,
                                        tear_down),
        cmocka_unit_test_setup_teardown(a_stream_that_is_done_ends_its_launches, set_up, tear_down),
        cmocka_unit_test_setup_teardown(the_end_waits_for_the_last_launch, set_up, tear_down),
        cmocka_unit_test_setup_teardown(memory_that_cant_be_pinned_is_told, set_up, tear_down),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
