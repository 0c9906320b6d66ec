#define _GNU_SOURCE
#include "threads.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <sys/prctl.h>

struct ts_threads {
    uint32_t count;
    pthread_t *others; /* count - 1 */
    pthread_mutex_t lock;
    pthread_cond_t work, idle;
    /* under the lock */
    uint32_t wanted; /* others that may still come to this round's work */
    uint32_t busy;   /* others that came and have not finished */
    bool stop;
    ts_threads_work what;
    uint32_t started; /* gives each thread its number */
    /* not under the lock */
    atomic_uint next;
};

static void work_on(ts_threads *t, const ts_threads_work *w, uint32_t thread)
{
    while (w->pause == NULL || !w->pause(w->pause_arg)) {
        uint32_t item = atomic_fetch_add_explicit(&t->next, 1, memory_order_relaxed);
        if (item >= w->items)
            return;
        w->fn(w->arg, item, thread);
    }
}

static void *thread_main(void *arg)
{
    prctl(PR_SET_NAME, "attention");
    ts_threads *t = arg;
    pthread_mutex_lock(&t->lock);
    uint32_t self = ++t->started;
    for (;;) {
        while (t->wanted == 0 && !t->stop)
            pthread_cond_wait(&t->work, &t->lock);
        if (t->stop)
            break;
        t->wanted--;
        t->busy++;
        ts_threads_work what = t->what;
        pthread_mutex_unlock(&t->lock);
        work_on(t, &what, self);
        pthread_mutex_lock(&t->lock);
        t->wanted = 0; /* no item is left, or all pause */
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

/* Wakes as many as the work wants, works, and waits for those who came: one that the system lets
 * run late, when no item is left, holds nobody up. */
static void work_together(ts_threads *t, const ts_threads_work *w, uint32_t others)
{
    pthread_mutex_lock(&t->lock);
    t->what = *w;
    t->wanted = others;
    if (others + 1 == t->count)
        pthread_cond_broadcast(&t->work);
    else
        for (uint32_t i = 0; i < others; i++)
            pthread_cond_signal(&t->work);
    pthread_mutex_unlock(&t->lock);
    work_on(t, w, 0);
    pthread_mutex_lock(&t->lock);
    t->wanted = 0;
    while (t->busy != 0)
        pthread_cond_wait(&t->idle, &t->lock);
    pthread_mutex_unlock(&t->lock);
}

uint32_t ts_threads_run_from(ts_threads *t, const ts_threads_work *w, uint32_t first)
{
    if (first >= w->items)
        return w->items;
    uint32_t team = w->at_most == 0 || w->at_most > t->count ? t->count : w->at_most;
    if (team > w->items - first)
        team = w->items - first;
    atomic_store_explicit(&t->next, first, memory_order_relaxed);
    if (team == 1)
        work_on(t, w, 0);
    else
        work_together(t, w, team - 1);
    uint32_t next = atomic_load_explicit(&t->next, memory_order_relaxed);
    return next < w->items ? next : w->items;
}

void ts_threads_run(ts_threads *t, uint32_t items, ts_threads_fn fn, void *arg)
{
    (void)ts_threads_run_from(t, &(ts_threads_work){.fn = fn, .arg = arg, .items = items}, 0);
}
