#include "queue.h"

#include <stdlib.h>

void ts_queue_init(ts_queue *q)
{
    pthread_mutex_init(&q->lock, NULL);
    pthread_cond_init(&q->filled, NULL);
    q->head = NULL;
    q->tail = &q->head;
    q->closed = q->sleeping = false;
}

void ts_queue_fini(ts_queue *q)
{
    pthread_cond_destroy(&q->filled);
    pthread_mutex_destroy(&q->lock);
}

void ts_queue_put(ts_queue *q, ts_work *work)
{
    work->next = NULL;
    pthread_mutex_lock(&q->lock);
    *q->tail = work;
    q->tail = &work->next;
    bool wake = q->sleeping;
    q->sleeping = false;
    pthread_mutex_unlock(&q->lock);
    if (wake)
        pthread_cond_signal(&q->filled);
}

ts_work *ts_queue_take(ts_queue *q)
{
    pthread_mutex_lock(&q->lock);
    while (q->head == NULL && !q->closed) {
        q->sleeping = true;
        pthread_cond_wait(&q->filled, &q->lock);
    }
    ts_work *all = q->head;
    q->head = NULL;
    q->tail = &q->head;
    pthread_mutex_unlock(&q->lock);
    return all;
}

void ts_queue_close(ts_queue *q)
{
    pthread_mutex_lock(&q->lock);
    q->closed = true;
    pthread_cond_broadcast(&q->filled);
    pthread_mutex_unlock(&q->lock);
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
