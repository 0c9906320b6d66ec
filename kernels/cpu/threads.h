/*
 * A team of threads that is kept between calls. ts_threads_run hands out items 0..n-1 one after
 * another to whoever is free (the caller works too) and returns when all are done.
 *
 * Thread: one caller at a time. Items must be independent: nothing says which thread runs which.
 */
#ifndef TS_THREADS_H
#define TS_THREADS_H

#include <stdbool.h>
#include <stdint.h>

typedef struct ts_threads ts_threads;

/* thread: 0..count-1, for scratch memory that is each thread's own. */
typedef void (*ts_threads_fn)(void *arg, uint32_t item, uint32_t thread);

/* How many processors this process may use; at least 1. */
uint32_t ts_processors(void);

/* count threads, the caller among them; 0: one for each processor this process may use. NULL if out
 * of memory or threads. */
ts_threads *ts_threads_new(uint32_t count);
void ts_threads_free(ts_threads *threads);
uint32_t ts_threads_count(const ts_threads *threads);
void ts_threads_run(ts_threads *threads, uint32_t items, ts_threads_fn fn, void *arg);

/* Asked before each item, by whichever thread is about to take it: whether to stop there. */
typedef bool (*ts_threads_pause_fn)(void *arg);

typedef struct ts_threads_work {
    ts_threads_fn fn;
    void *arg;
    uint32_t items;
    uint32_t at_most;          /* threads that take part, the caller among them; 0: all */
    ts_threads_pause_fn pause; /* NULL: never */
    void *pause_arg;
} ts_threads_work;

/* The same for items first..items-1, until `pause` says so. Returns the item to go on with later;
 * `items` when all are done. */
uint32_t ts_threads_run_from(ts_threads *threads, const ts_threads_work *work, uint32_t first);

#endif
