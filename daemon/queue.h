/*
 * The engine thread's inbox: many threads put work in, one takes it out, in order.
 *
 * Thread: any for put; one for take.
 */
#ifndef TS_QUEUE_H
#define TS_QUEUE_H

#include <pthread.h>
#include <stdbool.h>

typedef struct ts_work {
    struct ts_work *next;
    void (*run)(struct ts_work *work, void *service); /* on the engine's thread */
} ts_work;

typedef struct ts_queue {
    pthread_mutex_t lock;
    pthread_cond_t filled;
    ts_work *head, **tail;
    bool closed, sleeping;
} ts_queue;

void ts_queue_init(ts_queue *queue);
void ts_queue_fini(ts_queue *queue);
void ts_queue_put(ts_queue *queue, ts_work *work);

/* All the work there is, linked in order; waits for some. NULL: closed and empty. */
ts_work *ts_queue_take(ts_queue *queue);
void ts_queue_close(ts_queue *queue);

/* After the taker has ended: frees work that came too late. Only for work that was malloc'ed. */
void ts_queue_drop(ts_queue *queue);

#endif
