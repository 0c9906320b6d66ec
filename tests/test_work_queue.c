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

static void a_taker_that_sleeps_for_an_alarm_is_woken_for_a_sooner_one(void **state)
{
    (void)state;
    pthread_t taker;
    alarm(60);
    alarm_work.run = run_last;
    ts_queue_init(&queue);
    ts_queue_set_alarm(&queue, &alarm_work, UINT64_MAX / 2);
    assert_int_equal(pthread_create(&taker, NULL, take_all, NULL), 0);
    while (!sleeps())
        ;
    ts_queue_set_alarm(&queue, &alarm_work, 1);
    assert_int_equal(pthread_join(taker, NULL), 0);
    ts_queue_fini(&queue);
    alarm(0);
}

/* ---- by one thread ---- */

enum { MANY = 40 };

static ts_work many[MANY];
static uint32_t order[2 * MANY], num_run;

static void note(ts_work *work, void *service)
{
    (void)service;
    order[num_run++] = (uint32_t)(work - many);
}

static int queue_new(void **state)
{
    (void)state;
    num_run = 0;
    for (uint32_t i = 0; i < MANY; i++)
        many[i] = (ts_work){.run = note};
    ts_queue_init(&queue);
    return 0;
}

static int queue_end(void **state)
{
    (void)state;
    ts_queue_fini(&queue);
    return 0;
}

/* Runs what the taker is given. */
static uint32_t take_and_run(void)
{
    uint32_t count = 0;
    for (ts_work *work = ts_queue_take(&queue), *next; work != NULL; work = next, count++) {
        next = work->next;
        work->run(work, NULL);
    }
    return count;
}

static void work_is_run_in_the_order_in_which_it_came(void **state)
{
    (void)state;
    for (uint32_t i = 0; i < 3; i++)
        ts_queue_put(&queue, &many[i]);
    ts_queue_run(&queue, &many[3], NULL); /* behind others: it is left to the taker */
    assert_int_equal(num_run, 0);
    assert_int_equal(take_and_run(), 4);
    for (uint32_t i = 0; i < 4; i++)
        assert_int_equal(order[i], i);
    ts_queue_run(&queue, &many[4], NULL); /* the taker owns the engine until it asks again */
    assert_int_equal(num_run, 4);
    assert_int_equal(take_and_run(), 1);
}

/* What it puts in itself is run behind it, as if others had put it in. */
static void put_the_others(ts_work *work, void *service)
{
    note(work, service);
    for (uint32_t i = 1; i < MANY; i++)
        ts_queue_put(&queue, &many[i]);
}

static void whoever_runs_its_work_runs_32_pieces_at_most(void **state)
{
    (void)state;
    many[0].run = put_the_others;
    ts_queue_run(&queue, &many[0], NULL);
    assert_int_equal(num_run, 32);
    assert_int_equal(take_and_run(), MANY - 32);
    for (uint32_t i = 0; i < MANY; i++)
        assert_int_equal(order[i], i);
}

static void a_closed_queue_gives_what_it_has_and_then_nothing(void **state)
{
    (void)state;
    ts_queue_put(&queue, &many[0]);
    ts_queue_close(&queue);
    assert_int_equal(take_and_run(), 1);
    assert_int_equal(take_and_run(), 0);
    ts_queue_run(&queue, &many[1], NULL); /* too late: nobody runs it */
    assert_int_equal(num_run, 1);
}

static void what_comes_too_late_is_freed(void **state)
{
    (void)state;
    ts_queue_close(&queue);
    for (uint32_t i = 0; i < 3; i++)
        ts_queue_put(&queue, calloc(1, sizeof(ts_work)));
    ts_queue_drop(&queue); /* AddressSanitizer sees what is left */
    assert_null(queue.head);
    assert_ptr_equal(queue.tail, &queue.head);
}

static void an_alarm_comes_when_it_is_time_and_is_taken_back_with_0(void **state)
{
    (void)state;
    ts_queue_set_alarm(&queue, &many[7], UINT64_MAX / 2);
    ts_queue_put(&queue, &many[0]);
    assert_int_equal(take_and_run(), 1); /* it isn't time */
    ts_queue_set_alarm(&queue, &many[7], 1);
    assert_int_equal(take_and_run(), 1);
    assert_int_equal(order[1], 7);
    ts_queue_set_alarm(&queue, &many[7], 1);
    ts_queue_set_alarm(&queue, &many[7], 0);
    ts_queue_put(&queue, &many[1]);
    assert_int_equal(take_and_run(), 1);
    assert_int_equal(order[2], 1);
}

static void what_came_meanwhile_is_left_by_who_runs_its_own_alone(void **state)
{
    (void)state;
    many[0].run = put_the_others;
    ts_queue_run_alone(&queue, &many[0], NULL);
    assert_int_equal(num_run, 1);
    ts_queue_run_alone(&queue, &many[0], NULL); /* behind others */
    assert_int_equal(num_run, 1);
    many[0].run = note;
    assert_int_equal(take_and_run(), MANY);
    assert_int_equal(order[MANY], 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(an_alarm_that_is_in_the_queue_is_not_put_in_again),
        cmocka_unit_test(a_taker_that_comes_while_another_runs_work_takes_none),
        cmocka_unit_test(a_taker_that_sleeps_for_an_alarm_is_woken_for_a_sooner_one),
        cmocka_unit_test_setup_teardown(work_is_run_in_the_order_in_which_it_came, queue_new,
                                        queue_end),
        cmocka_unit_test_setup_teardown(what_came_meanwhile_is_left_by_who_runs_its_own_alone,
                                        queue_new, queue_end),
        cmocka_unit_test_setup_teardown(whoever_runs_its_work_runs_32_pieces_at_most, queue_new,
                                        queue_end),
        cmocka_unit_test_setup_teardown(a_closed_queue_gives_what_it_has_and_then_nothing,
                                        queue_new, queue_end),
        cmocka_unit_test_setup_teardown(what_comes_too_late_is_freed, queue_new, queue_end),
        cmocka_unit_test_setup_teardown(an_alarm_comes_when_it_is_time_and_is_taken_back_with_0,
                                        queue_new, queue_end),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
