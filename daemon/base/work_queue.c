#include "work_queue.h"

#include "clock.h"
#include "timed_wait.h"

#include <semaphore.h>
#include <stdlib.h>
#include <time.h>

/* So that a thread of the transport comes back to it soon, whatever the others send. */
#define RUN_MOST 32

void ts_queue_init(ts_queue *q)
{
    pthread_mutex_init(&q->lock, NULL);
    ts_timed_wait_init(&q->filled);
    q->head = NULL;
    q->tail = &q->head;
    q->closed = q->sleeping = q->owned = q->taken = q->has_alarm = false;
    q->alarm_ms = 0;
}

void ts_queue_fini(ts_queue *q)
{
    pthread_cond_destroy(&q->filled);
    pthread_mutex_destroy(&q->lock);
}

static void append(ts_queue *q, ts_work *work)
{
    work->next = NULL;
    *q->tail = work;
    q->tail = &work->next;
}

/* Unlocks; wakes the engine's thread if there is work that nobody runs. */
static void leave(ts_queue *q)
{
    bool wake = q->sleeping && !q->owned && (q->head != NULL || q->closed);
    if (wake)
        q->sleeping = false;
    pthread_mutex_unlock(&q->lock);
    if (wake)
        pthread_cond_signal(&q->filled);
}

void ts_queue_put(ts_queue *q, ts_work *work)
{
    pthread_mutex_lock(&q->lock);
    append(q, work);
    leave(q);
}

/* Runs the work if the engine is idle, and what came in meanwhile: `most` pieces in all. */
static void run_some(ts_queue *q, ts_work *work, void *service, int most)
{
    pthread_mutex_lock(&q->lock);
    append(q, work);
    if (!q->owned && !q->closed && q->head == work) {
        q->owned = true;
        for (int i = 0; i < most && q->head != NULL; i++) {
            work = q->head;
            q->head = work->next;
            if (q->head == NULL)
                q->tail = &q->head;
            q->has_alarm = q->has_alarm && work != q->alarm;
            pthread_mutex_unlock(&q->lock);
            work->run(work, service);
            pthread_mutex_lock(&q->lock);
        }
        q->owned = false;
    }
    leave(q);
}

void ts_queue_run(ts_queue *q, ts_work *work, void *service)
{
    run_some(q, work, service, RUN_MOST);
}

void ts_queue_run_alone(ts_queue *q, ts_work *work, void *service)
{
    run_some(q, work, service, 1);
}

void ts_queue_set_alarm(ts_queue *q, ts_work *work, uint64_t at_ms)
{
    pthread_mutex_lock(&q->lock);
    bool sooner = at_ms != 0 && (q->alarm_ms == 0 || at_ms < q->alarm_ms);
    q->alarm = work;
    q->alarm_ms = at_ms;
    bool wake = sooner && q->sleeping; /* to sleep again, less long */
    pthread_mutex_unlock(&q->lock);
    if (wake)
        pthread_cond_signal(&q->filled);
}

/* Puts the alarm in if it is time; else waits until then, or for work. */
static void await(ts_queue *q)
{
    const uint64_t ms = q->alarm_ms;
    if (ms != 0 && ts_now_ms() >= ms) {
        q->alarm_ms = 0;
        if (!q->has_alarm)
            append(q, q->alarm);
        q->has_alarm = true;
        return;
    }
    q->sleeping = true;
    if (ms == 0)
        pthread_cond_wait(&q->filled, &q->lock);
    else
        (void)ts_timed_wait(&q->filled, &q->lock, ms);
}

ts_work *ts_queue_take(ts_queue *q)
{
    pthread_mutex_lock(&q->lock);
    if (q->taken) /* at first another thread may own it */
        q->owned = q->taken = false;
    while (q->owned || (q->head == NULL && !q->closed))
        await(q);
    q->sleeping = false;
    ts_work *all = q->head;
    q->owned = q->taken = all != NULL;
    q->head = NULL;
    q->tail = &q->head;
    q->has_alarm = false;
    pthread_mutex_unlock(&q->lock);
    return all;
}

typedef struct flush {
    ts_work work;
    sem_t done;
} flush;

static void run_flush(ts_work *work, void *service)
{
    (void)service;
    sem_post(&((flush *)work)->done);
}

void ts_queue_flush(ts_queue *q)
{
    flush f = {.work.run = run_flush};
    sem_init(&f.done, 0, 0);
    ts_queue_put(q, &f.work);
    while (sem_wait(&f.done) != 0)
        ;
    sem_destroy(&f.done);
}

void ts_queue_close(ts_queue *q)
{
    pthread_mutex_lock(&q->lock);
    q->closed = true;
    leave(q);
}

void ts_queue_drop(ts_queue *q)
{
    for (ts_work *work = q->head, *next; work != NULL; work = next) {
        next = work->next;
        free(work);
    }
    q->head = NULL;
    q->tail = &q->head;
}
