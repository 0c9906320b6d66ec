/*
 * Conditions that are waited for until a time of clock.h, which nobody can set.
 *
 * Thread: any.
 */
#ifndef TS_TIMED_WAIT_H
#define TS_TIMED_WAIT_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <time.h>

static inline void ts_timed_wait_init(pthread_cond_t *condition)
{
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(condition, &attributes);
    pthread_condattr_destroy(&attributes);
}

/* Waits under the lock until somebody signals, or until ts_now_ms() is `ms`: then true. */
static inline bool ts_timed_wait(pthread_cond_t *condition, pthread_mutex_t *lock, uint64_t ms)
{
    const struct timespec until = {.tv_sec = (time_t)(ms / 1000),
                                   .tv_nsec = (long)(ms % 1000) * 1000000};
    return pthread_cond_timedwait(condition, lock, &until) != 0;
}

#endif
