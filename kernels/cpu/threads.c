#define _GNU_SOURCE
#include "threads.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <sys/prctl.h>

/* What the team works on. */
typedef struct run {
    ts_threads_fn fn;
    void *arg;
    uint32_t items;
    ts_threads_pause_fn pause;
    void *pause_arg;
} run;

struct ts_threads {
    uint32_t count;
    pthread_t *others; /* count - 1 */
    pthread_mutex_t lock;
    pthread_cond_t work, idle;
    /* under the lock */
    uint64_t round;
    uint32_t busy; /* others that have not finished this round */
    bool stop;
    run what;
    uint32_t started; /* gives each thread its number */
    /* not under the lock */
    atomic_uint next;
};

static void work_on(ts_threads *t, const run *r, uint32_t thread)
{
    while (r->pause == NULL || !r->pause(r->pause_arg)) {
        uint32_t item = atomic_fetch_add_explicit(&t->next, 1, memory_order_relaxed);
        if (item >= r->items)
            return;
        r->fn(r->arg, item, thread);
    }
}

static void *thread_main(void *arg)
{
    prctl(PR_SET_NAME, "attention");
    ts_threads *t = arg;
    pthread_mutex_lock(&t->lock);
    uint32_t self = ++t->started;
    uint64_t seen = 0;
    for (;;) {
        while (t->round == seen && !t->stop)
            pthread_cond_wait(&t->work, &t->lock);
        if (t->stop)
            break;
        seen = t->round;
        run what = t->what;
        pthread_mutex_unlock(&t->lock);
        work_on(t, &what, self);
        pthread_mutex_lock(&t->lock);
        if (--t->busy == 0)
            pthread_cond_signal(&t->idle);
    }
    pthread_mutex_unlock(&t->lock);
    return NULL;
}

uint32_t ts_processors(void)
{
    cpu_set_t set;
    return sched_getaffinity(0, sizeof set, &set) == 0 ? (uint32_t)CPU_COUNT(&set) : 1;
}

ts_threads *ts_threads_new(uint32_t count)
{
    if (count == 0)
        count = ts_processors();
    ts_threads *t = calloc(1, sizeof *t);
    if (t == NULL)
        return NULL;
    t->others = calloc(count, sizeof *t->others);
    if (t->others == NULL) {
        free(t);
        return NULL;
    }
    pthread_mutex_init(&t->lock, NULL);
    pthread_cond_init(&t->work, NULL);
    pthread_cond_init(&t->idle, NULL);
    t->count = 1;
    /* Signals are for the program's own threads. */
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (t->count < count && pthread_create(&t->others[t->count - 1], NULL, thread_main, t) == 0)
        t->count++;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (t->count < count) {
        ts_threads_free(t);
        return NULL;
    }
    return t;
}

void ts_threads_free(ts_threads *t)
{
    if (t == NULL)
        return;
    pthread_mutex_lock(&t->lock);
    t->stop = true;
    pthread_cond_broadcast(&t->work);
    pthread_mutex_unlock(&t->lock);
    for (uint32_t i = 0; i + 1 < t->count; i++)
        pthread_join(t->others[i], NULL);
    pthread_cond_destroy(&t->idle);
    pthread_cond_destroy(&t->work);
    pthread_mutex_destroy(&t->lock);
    free(t->others);
    free(t);
}

uint32_t ts_threads_count(const ts_threads *t)
{
    return t->count;
}

uint32_t ts_threads_run_from(ts_threads *t, uint32_t first, uint32_t items, ts_threads_fn fn,
                             void *arg, ts_threads_pause_fn pause, void *pause_arg)
{
    run what = {fn, arg, items, pause, pause_arg};
    if (first >= items)
        return items;
    atomic_store_explicit(&t->next, first, memory_order_relaxed);
    if (items - first == 1 || t->count == 1) {
        work_on(t, &what, 0);
    } else {
        pthread_mutex_lock(&t->lock);
        t->what = what;
        t->busy = t->count - 1;
        t->round++;
        pthread_cond_broadcast(&t->work);
        pthread_mutex_unlock(&t->lock);
        work_on(t, &what, 0);
        pthread_mutex_lock(&t->lock);
        while (t->busy != 0)
            pthread_cond_wait(&t->idle, &t->lock);
        pthread_mutex_unlock(&t->lock);
    }
    uint32_t next = atomic_load_explicit(&t->next, memory_order_relaxed);
    return next < items ? next : items;
}

void ts_threads_run(ts_threads *t, uint32_t items, ts_threads_fn fn, void *arg)
{
    (void)ts_threads_run_from(t, 0, items, fn, arg, NULL, NULL);
}
