/* The engine's inbox: who runs what is put in, and when. */
#include "test_util.h"

#include "work_queue.h"

#include <sched.h>
#include <stdatomic.h>
#include <unistd.h>

static ts_queue queue;
static ts_work alarm_work, last_work;
static uint32_t alarms;

static uint64_t alarm_at(void)
{
    pthread_mutex_lock(&queue.lock);
    const uint64_t at = queue.alarm_ms;
    pthread_mutex_unlock(&queue.lock);
    return at;
}

static void run_alarm(ts_work *work, void *service)
{
    (void)work;
    (void)service;
    assert_true(++alarms == 1);
}

static bool sleeps(void)
{
    pthread_mutex_lock(&queue.lock);
    const bool sleeps = queue.sleeping;
    pthread_mutex_unlock(&queue.lock);
    return sleeps;
}

/* While it runs the taker puts the alarm in, and is to put it in once more. */
static void set_alarm_twice(ts_work *work, void *service)
{
    (void)work;
    (void)service;
    for (int i = 0; i < 2; i++) {
        ts_queue_set_alarm(&queue, &alarm_work, 1);
        while (alarm_at() != 0)
            ;
    }
}

static void run_last(ts_work *work, void *service)
{
    (void)work;
    (void)service;
    ts_queue_close(&queue);
}

static void *take_all(void *arg)
{
    ts_work *work;
    while ((work = ts_queue_take(&queue)) != NULL)
        for (ts_work *next; work != NULL; work = next) {
            next = work->next;
            work->run(work, arg);
        }
    return NULL;
}

static void an_alarm_that_is_in_the_queue_is_not_put_in_again(void **state)
{
    (void)state;
    pthread_t taker;
    ts_work work = {.run = set_alarm_twice};
    alarm_work.run = run_alarm;
    last_work.run = run_last;
    ts_queue_init(&queue);
    assert_int_equal(pthread_create(&taker, NULL, take_all, NULL), 0);
    while (!sleeps())
        ;
    ts_queue_run(&queue, &work, NULL); /* here, and then the alarm */
    ts_queue_put(&queue, &last_work);
    assert_int_equal(pthread_join(taker, NULL), 0);
    assert_int_equal(alarms, 1);
    ts_queue_fini(&queue);
}

static atomic_uint stage;

/* Runs until the taker, which comes meanwhile, sleeps. */
static void run_until_the_taker_sleeps(ts_work *work, void *service)
{
    pthread_t *taker = service;
    (void)work;
    assert_int_equal(pthread_create(taker, NULL, take_all, NULL), 0);
    while (!sleeps())
        ;
    ts_queue_put(&queue, &last_work);
    sched_yield();
    assert_true(queue.owned && queue.head == &last_work); /* it isn't the taker's */
    atomic_store(&stage, 1);
}

static void run_second(ts_work *work, void *service)
{
    assert_int_equal(atomic_load(&stage), 1);
    run_last(work, service);
}

static void a_taker_that_comes_while_another_runs_work_takes_none(void **state)
{
    (void)state;
    pthread_t taker;
    ts_work work = {.run = run_until_the_taker_sleeps};
    alarm(60);
    last_work.run = run_second;
    ts_queue_init(&queue);
    ts_queue_run(&queue, &work, &taker);
    assert_int_equal(pthread_join(taker, NULL), 0);
    ts_queue_fini(&queue);
    alarm(0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(an_alarm_that_is_in_the_queue_is_not_put_in_again),
        cmocka_unit_test(a_taker_that_comes_while_another_runs_work_takes_none),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
