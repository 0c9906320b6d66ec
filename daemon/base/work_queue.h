/*
 * The engine's inbox, and who owns the engine: at any moment at most one thread runs work, in the
 * order in which it was put in. That is the engine's thread, unless a thread that brings work finds
 * the engine idle: it then runs its work itself, which saves two changes of threads (they cost as
 * much as a whole message). Ownership passes under the queue's lock, so what one owner wrote the
 * next one sees.
 *
 * Thread: any for put and run; one for take.
 */
#ifndef TS_WORK_QUEUE_H
#define TS_WORK_QUEUE_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

typedef struct ts_work {
    struct ts_work *next;
    void (*run)(struct ts_work *work, void *service); /* by the engine's owner of the moment */
} ts_work;

typedef struct ts_queue {
    pthread_mutex_t lock;
    pthread_cond_t filled;
    ts_work *head, **tail;
    bool closed, sleeping;
    bool owned; /* some thread runs work, */
    bool taken; /* ... which is the taker */
    ts_work *alarm;
    uint64_t alarm_ms; /* when it is put in; 0: never */
    bool has_alarm;    /* it is in the queue */
} ts_queue;

void ts_queue_init(ts_queue *queue);
void ts_queue_fini(ts_queue *queue);

/* Leaves the work to others: for threads that must not wait for it. */
void ts_queue_put(ts_queue *queue, ts_work *work);

/* Runs the work here and now if the engine is idle, and up to 32 pieces that came in meanwhile;
 * else as put. */
void ts_queue_run(ts_queue *queue, ts_work *work, void *service);

/* The same without what came in meanwhile: for a thread for which others wait. */
void ts_queue_run_alone(ts_queue *queue, ts_work *work, void *service);

/* The taker puts the work in at that time of CLOCK_MONOTONIC, or a little later; 0 takes the alarm
 * back. A queue has one such work. It is never in the queue twice: if it is there at that time, it
 * sets the alarm again when it runs. */
void ts_queue_set_alarm(ts_queue *queue, ts_work *work, uint64_t at_ms);

/*
 * All the work there is, linked in order; waits for some. The caller owns the engine until it asks
 * again. NULL: closed and empty.
 */
ts_work *ts_queue_take(ts_queue *queue);
void ts_queue_close(ts_queue *queue);

/* Waits until all that was put in before has run. There must be a taker. */
void ts_queue_flush(ts_queue *queue);

/* After the taker has ended: frees work that came too late. Only for work that was malloc'ed. */
void ts_queue_drop(ts_queue *queue);

#endif
