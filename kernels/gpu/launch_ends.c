/* How a launch's end is seen: by a word that it writes last, and one thread that looks at the words
 * of all. An event for each would cost an interrupt and the waking of two threads. */
#include "clock.h"
#include "device.h"
#include "thread_first.h"
#include "timed_wait.h"

#include <stdio.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <time.h>

#define NAP_NS UINT64_C(20000)       /* between looks at the words, at least */
#define NAP_MOST_NS UINT64_C(100000) /* ... and at most: an eighth of the time without an end */
#define DOZE_NS UINT64_C(20000000)   /* without an end, after which looks are DOZE_MS apart */
#define DOZE_MS 1
#define QUERY_NS UINT64_C(10000000) /* without an end, after which streams are asked */
#define WORD_BYTES 64u              /* a cache line for each launch's */
#define ALL_BYTES 4096u
_Static_assert(ALL_BYTES / WORD_BYTES >= TS_GPU_LAUNCHES, "a page has the words");

static bool is_reached(const ts_gpu_launch *l)
{
    return __atomic_load_n(l->end_word, __ATOMIC_ACQUIRE) == l->end_value;
}

/* What is to be told of a launch that has ended. */
typedef struct ended_launch {
    void (*done)(void *arg, ts_status status, const char *why); /* NULL: nobody is told */
    void *arg;
    cudaError_t error;
} ended_launch;

/* Gives back those that have ended, into `ended`; how many. asks: also those whose streams have an
 * error. Under the device's lock. */
static uint32_t take_ended(ts_gpu *gpu, bool asks, ended_launch ended[TS_GPU_LAUNCHES])
{
    uint32_t count = 0;
    ts_gpu_launch **at = &gpu->ends.first;
    while (*at != NULL) {
        ts_gpu_launch *l = *at;
        const cudaError_t error = is_reached(l) ? cudaSuccess
                                  : asks        ? cudaStreamQuery(l->stream)
                                                : cudaErrorNotReady;
        if (error == cudaErrorNotReady) {
            at = &l->next_end;
            continue;
        }
        *at = l->next_end;
        ended[count++] = (ended_launch){l->done, l->arg, error};
        ts_gpu_launch_give_back(l);
    }
    gpu->ends.last = at;
    return count;
}

uint32_t ts_gpu_launches_over(const ts_gpu *gpu)
{
    uint32_t over = 0;
    for (const ts_gpu_launch *l = gpu->ends.first; l != NULL; l = l->next_end)
        over += l->waits && is_reached(l);
    return over;
}

/* Pauses between two looks, when none has ended for so long. False: one was finished since the list
 * ended at `last`. */
static bool pause_for(ts_gpu *gpu, uint64_t without_ns, ts_gpu_launch **last)
{
    ts_gpu_launch_ends *ends = &gpu->ends;
    if (without_ns < DOZE_NS) {
        uint64_t ns = without_ns / 8;
        ns = ns < NAP_NS ? NAP_NS : ns > NAP_MOST_NS ? NAP_MOST_NS : ns;
        nanosleep(&(struct timespec){.tv_nsec = (long)ns}, NULL);
        return true;
    }
    pthread_mutex_lock(&gpu->lock);
    ends->dozes = true;
    if (ends->last == last)
        (void)ts_timed_wait(&ends->event, &gpu->lock, ts_now_ms() + DOZE_MS);
    ends->dozes = false;
    const bool alone = ends->last == last;
    pthread_mutex_unlock(&gpu->lock);
    return alone;
}

static void *ends_main(void *arg)
{
    ts_gpu *gpu = arg;
    ts_gpu_launch_ends *ends = &gpu->ends;
    char why[TS_GPU_WHY_BYTES];
    uint64_t ended_ns = 0; /* when one did last, or one began to be watched after a pause */
    uint64_t asked_ns = 0; /* the same, or when streams were asked last */
    ts_gpu_begin_thread(gpu);
    prctl(PR_SET_TIMERSLACK, 1000ul); /* for naps */
    prctl(PR_SET_NAME, "ends");
    ts_thread_first();
    pthread_mutex_lock(&gpu->lock);
    for (;;) {
        if (ends->first == NULL && ends->stop)
            break;
        if (ends->first == NULL) {
            pthread_cond_wait(&ends->event, &gpu->lock);
            ended_ns = asked_ns = ts_now_ns();
            continue;
        }
        const uint64_t now_ns = ts_now_ns();
        const bool asks = now_ns - asked_ns >= QUERY_NS;
        if (asks) /* who was told of an end may have made another device this thread's */
            (void)ts_gpu_enter(gpu, why, sizeof why);
        ended_launch ended[TS_GPU_LAUNCHES];
        const uint32_t count = take_ended(gpu, asks, ended);
        ts_gpu_launch **const last = ends->last;
        pthread_mutex_unlock(&gpu->lock);
        if (count > 0)
            ended_ns = now_ns;
        if (count > 0 || asks)
            asked_ns = now_ns;
        for (const ended_launch *e = ended; e < ended + count; e++)
            if (e->done != NULL)
                e->done(e->arg, e->error == cudaSuccess ? TS_OK : TS_EDEVICE,
                        cudaGetErrorName(e->error));
        if (count == 0 && !pause_for(gpu, now_ns - ended_ns, last))
            ended_ns = ts_now_ns();
        pthread_mutex_lock(&gpu->lock);
    }
    pthread_mutex_unlock(&gpu->lock);
    return NULL;
}

ts_status ts_gpu_launch_finish(ts_gpu_launch *l,
                               void (*done)(void *arg, ts_status status, const char *why),
                               void *arg)
{
    ts_gpu_launch_ends *ends = &l->gpu->ends;
    const ts_status status = l->tells_end ? TS_OK : ts_gpu_launch_signal(l, NULL, 0);
    if (status != TS_OK)
        return status;
    l->done = done;
    l->arg = arg;
    l->next_end = NULL;
    pthread_mutex_lock(&l->gpu->lock);
    const bool sleeps = ends->first == NULL || ends->dozes;
    *ends->last = l;
    ends->last = &l->next_end;
    if (sleeps)
        pthread_cond_signal(&ends->event);
    pthread_mutex_unlock(&l->gpu->lock);
    return TS_OK;
}

ts_status ts_gpu_launch_ends_init(ts_gpu *gpu, char *why, size_t why_bytes)
{
    ts_gpu_launch_ends *ends = &gpu->ends;
    void *words = mmap(NULL, ALL_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    void *there;
    if (words == MAP_FAILED) {
        snprintf(why, why_bytes, "no memory for launches' ends");
        return TS_ENOMEM;
    }
    ts_status status = ts_gpu_pin(gpu, words, ALL_BYTES, &there, why, why_bytes);
    if (status != TS_OK) {
        munmap(words, ALL_BYTES);
        return status;
    }
    ends->words = words;
    for (uint32_t i = 0; i < TS_GPU_LAUNCHES; i++) {
        gpu->launches[i].end_word = (uint32_t *)((char *)words + i * WORD_BYTES);
        gpu->launches[i].end_there = (uint32_t *)((char *)there + i * WORD_BYTES);
    }
    ends->last = &ends->first;
    ts_timed_wait_init(&ends->event);
    ends->runs = pthread_create(&ends->thread, NULL, ends_main, gpu) == 0;
    if (ends->runs)
        return TS_OK;
    pthread_cond_destroy(&ends->event);
    snprintf(why, why_bytes, "no thread for launches' ends");
    return TS_ENOMEM;
}

void ts_gpu_launch_ends_fini(ts_gpu *gpu)
{
    ts_gpu_launch_ends *ends = &gpu->ends;
    if (ends->runs) {
        pthread_mutex_lock(&gpu->lock);
        ends->stop = true;
        pthread_cond_signal(&ends->event);
        pthread_mutex_unlock(&gpu->lock);
        pthread_join(ends->thread, NULL);
        pthread_cond_destroy(&ends->event);
    }
    if (ends->words != NULL)
        ts_gpu_unpin_unmap(gpu, ends->words, ALL_BYTES);
}
