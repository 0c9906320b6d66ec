#define _GNU_SOURCE
#include "thread_trial.h"

#include "clock.h"

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

/* NNG 1.5 asks for the processors likewise. */
#define FIXED_THREADS 7u /* one polls, one reaps, one has the time, four resolve names */
#define TASK_THREADS_MAX 16u
#define MEMORY_BYTES ((size_t)2 << 20) /* beside the stacks: NNG's own, many times over */
#define GONE_MS 100u

typedef struct trial_thread {
    pthread_t thread;
    pid_t tid;
    pthread_mutex_t *all_there;
} trial_thread;

uint32_t ts_nng_threads(void)
{
    const long processors = sysconf(_SC_NPROCESSORS_ONLN);
    const uint32_t n = processors > 0 ? (uint32_t)processors : 1;
    const uint32_t tasks = n < TASK_THREADS_MAX / 2 ? 2 * n : TASK_THREADS_MAX;
    return FIXED_THREADS + tasks + n; /* one for the time-outs of each processor */
}

static void *trial_main(void *arg)
{
    trial_thread *t = arg;
    t->tid = (pid_t)syscall(SYS_gettid);
    pthread_mutex_lock(t->all_there);
    pthread_mutex_unlock(t->all_there);
    return NULL;
}

/* The kernel lets a joiner go on before it counts the thread no more. */
static void await_gone(const trial_thread *threads, uint32_t count)
{
    const uint64_t until_ms = ts_now_ms() + GONE_MS; /* a new thread may have an old one's number */
    for (uint32_t i = 0; i < count; i++)
        while (syscall(SYS_tgkill, getpid(), threads[i].tid, 0) == 0 && ts_now_ms() < until_ms)
            (void)sched_yield();
}

int ts_threads_try(uint32_t count, uint32_t *started)
{
    pthread_mutex_t all_there = PTHREAD_MUTEX_INITIALIZER;
    trial_thread *threads = calloc(count, sizeof *threads);
    void *memory = malloc(MEMORY_BYTES);
    int error = threads == NULL || memory == NULL ? ENOMEM : 0;
    uint32_t n = 0;
    pthread_mutex_lock(&all_there);
    while (error == 0 && n < count) {
        threads[n].all_there = &all_there;
        error = pthread_create(&threads[n].thread, NULL, trial_main, &threads[n]);
        n += error == 0;
    }
    pthread_mutex_unlock(&all_there);
    for (uint32_t i = 0; i < n; i++)
        pthread_join(threads[i].thread, NULL);
    await_gone(threads, n);
    free(memory);
    free(threads);
    *started = n;
    return error;
}
