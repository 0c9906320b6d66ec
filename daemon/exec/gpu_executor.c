#define _GNU_SOURCE
#include "gpu_executor.h"

#include "clock.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#define WAITING_MOST (TS_GPU_LAUNCHES * 3 / 4) /* launches that wait for workers */
#define WAITING_EACH 8u                        /* ... for the same one */
#define WAITING_SESSIONS (TS_GPU_LANES / 2)    /* ... whom they wait for: each has a lane */
#define HEALTH_MS 1000                         /* the device is looked at so often */
#define POLL_MS 1                              /* while jobs wait here for their workers */

/* Whom a launch of one job waits for: its worker, and the session's run before it. */
typedef enum wait_for { FOR_NOBODY, FOR_WORKER, FOR_BOTH } wait_for;

/* A launch under way: the jobs that it serves. */
typedef struct flight {
    struct flight *prev, *next;
    ts_gpu_batch *batch;
    ts_job *jobs;           /* NULL: they have been told */
    ts_signals_page *waits; /* for this session's worker; NULL: for nobody, or not any more */
} flight;

struct ts_gpu_batch {
    ts_gpu *gpu;
    uint32_t submit_ms;
    void (*failed)(const char *why);
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t event;
    ts_job *head, **tail; /* under the lock: what was submitted */
    flight *flights;      /* under the lock */
    uint32_t waiting;     /* under the lock: flights that wait for workers */
    uint32_t sessions;    /* under the lock: sessions of those */
    bool landed, stop;    /* under the lock */
    bool lost;            /* under the lock: the device failed */
    char why[TS_GPU_WHY_BYTES + 128];
    ts_job *held, **held_end; /* the thread's own: jobs that can't be launched yet */
    ts_gpu_run *parts;        /* the thread's own: of a launch */
    ts_gpu_signal *signals;   /* the thread's own: two for each part */
    size_t capacity;
    uint64_t health_ms;            /* the thread's own: when it looks at the device next */
    uint32_t *words, *words_there; /* completed runs of each session */
    size_t words_bytes;
    atomic_uint_fast64_t runs, launches;
};

static bool reached(const uint32_t *word, uint32_t value)
{
    return (int32_t)(__atomic_load_n(word, __ATOMIC_ACQUIRE) - value) >= 0;
}

/* Nothing on the GPU need be waited for. */
static bool is_ready(const ts_job *job)
{
    return job->signals == NULL || (reached(&job->signals->host->submitted, job->order) &&
                                    reached(job->signals->done, job->order - 1));
}

static bool alike(const ts_job *a, const ts_job *b)
{
    return b->num_copies == 0 && a->base == b->base && a->heads == b->heads &&
           a->io_dtype == b->io_dtype && a->kernel == b->kernel &&
           ts_attention_same_variant(&a->variant, &b->variant);
}

static void tell(ts_job *jobs, ts_status status, const char *why)
{
    for (ts_job *job = jobs, *next; job != NULL; job = next) {
        next = job->next;
        job->status = status;
        if (status == TS_OK && job->late) {
            job->status = TS_ETIMEOUT;
            snprintf(job->why, sizeof job->why, "the worker did not submit run %u in time",
                     job->order);
        } else if (status != TS_OK) {
            snprintf(job->why, sizeof job->why, "%s", why);
            if (job->signals != NULL) { /* nobody else will say that it is over */
                __atomic_store_n(&job->signals->host->completed, job->order, __ATOMIC_RELEASE);
                __atomic_store_n(job->signals->done, job->order, __ATOMIC_RELEASE);
            }
        }
        job->done(job);
    }
}

/* ---- flights ---- */

static void unlink_flight(ts_gpu_batch *b, flight *f)
{
    if (f->prev != NULL)
        f->prev->next = f->next;
    else
        b->flights = f->next;
    if (f->next != NULL)
        f->next->prev = f->prev;
}

/* The flight waits for a worker, or doesn't any more. Under the lock. */
static void count_waiting(ts_gpu_batch *b, ts_signals_page *page, bool begins)
{
    uint32_t before = page->waiting;
    page->waiting += begins ? 1u : -1u;
    b->waiting += begins ? 1u : -1u;
    if (before == 0)
        b->sessions++;
    else if (page->waiting == 0)
        b->sessions--;
}

/* The device is lost. Any thread. */
static void lose(ts_gpu_batch *b, const char *why)
{
    pthread_mutex_lock(&b->lock);
    bool first = !b->lost;
    if (first)
        snprintf(b->why, sizeof b->why, "cuda:%u (%s) failed: %s", ts_gpu_get_info(b->gpu)->ordinal,
                 ts_gpu_get_info(b->gpu)->name, why);
    b->lost = true;
    pthread_mutex_unlock(&b->lock);
    if (first)
        b->failed(b->why); /* which stays as it is */
}

/* The device has done it, or has failed. On the launch's thread. */
static void land(void *arg, ts_status status, const char *why)
{
    flight *f = arg;
    ts_gpu_batch *b = f->batch;
    if (status != TS_OK)
        lose(b, why);
    pthread_mutex_lock(&b->lock);
    ts_job *jobs = f->jobs;
    f->jobs = NULL;
    if (f->waits != NULL) /* while the page is there */
        count_waiting(b, f->waits, false);
    pthread_mutex_unlock(&b->lock);
    tell(jobs, status, b->why);
    pthread_mutex_lock(&b->lock); /* until here the batch waits for this flight */
    unlink_flight(b, f);
    free(f);
    b->landed = true;
    pthread_cond_signal(&b->event);
    pthread_mutex_unlock(&b->lock);
}

/* ---- launching ---- */

/* Room for what a launch of all these jobs needs. */
static bool reserve_parts(ts_gpu_batch *b, const ts_job *jobs)
{
    size_t count = 0;
    for (; jobs != NULL; jobs = jobs->next)
        count++;
    if (count <= b->capacity)
        return true;
    free(b->parts);
    free(b->signals);
    b->parts = malloc(2 * count * sizeof *b->parts);
    b->signals = malloc(4 * count * sizeof *b->signals);
    b->capacity = b->parts == NULL || b->signals == NULL ? 0 : 2 * count;
    return b->capacity > 0;
}

/* Queues what tells that the jobs are over: the workers, who wait for it, first. */
static ts_status queue_signals(ts_gpu_batch *b, ts_gpu_launch *l, const ts_job *jobs)
{
    uint32_t count = 0;
    for (const ts_job *job = jobs; job != NULL; job = job->next)
        if (job->signals != NULL)
            b->signals[count++] = (ts_gpu_signal){&job->signals->there->completed, job->order};
    for (const ts_job *job = jobs; job != NULL; job = job->next)
        if (job->signals != NULL)
            b->signals[count++] = (ts_gpu_signal){job->signals->done_there, job->order};
    return ts_gpu_launch_signal(l, b->signals, count);
}

/* Why it fails is in `why`. */
static ts_status queue_attend(ts_gpu_batch *b, ts_gpu_launch *l, ts_job *jobs, wait_for wait,
                              char *why, size_t why_bytes)
{
    ts_status status = reserve_parts(b, jobs) ? TS_OK : TS_ENOMEM;
    if (status != TS_OK) {
        snprintf(why, why_bytes, "no memory for a launch");
        return status;
    }
    uint32_t count = 0;
    for (const ts_job *job = jobs; job != NULL && status == TS_OK; job = job->next) {
        if (!job->plan->made) {
            status =
                ts_gpu_plan_renew(b->gpu, &job->geometry, job->heads, job->io_dtype, job->kernel,
                                  job->seqs, job->num_seqs, &job->plan->plan, why, why_bytes);
            job->plan->made = status == TS_OK;
        }
        const ts_attention_seq *s = job->seqs; /* the others' rows follow the first's */
        b->parts[count++] = (ts_gpu_run){.plan = job->plan->plan,
                                         .layer = s->layer,
                                         .q = s->q,
                                         .k = s->k,
                                         .v = s->v,
                                         .out = s->out,
                                         .sinks = s->sinks,
                                         .scales = s->scales,
                                         .alibi = s->alibi,
                                         .lse = s->lse};
    }
    if (status != TS_OK)
        return status;
    if (wait == FOR_BOTH)
        status = ts_gpu_launch_wait(l, jobs->signals->done_there, jobs->order - 1);
    if (wait != FOR_NOBODY && status == TS_OK)
        status = ts_gpu_launch_wait(l, &jobs->signals->there->submitted, jobs->order);
    if (status == TS_OK)
        status = ts_gpu_launch_attend(l, jobs->base, &jobs->variant, b->parts, count);
    if (status == TS_OK)
        status = queue_signals(b, l, jobs);
    if (status != TS_OK)
        snprintf(why, why_bytes, "%s", ts_gpu_launch_why(l));
    return status;
}

/* Whether the session's run before this one was launched by itself: queued behind that, this one
 * needs no word to wait for. */
static bool follows(const ts_job *job)
{
    return job->signals->last.turn != 0 && job->signals->last_order == job->order - 1;
}

/* A launch for the jobs; NULL: there is none to be had now. */
static ts_gpu_launch *take(ts_gpu_batch *b, ts_job *jobs)
{
    bool alone = jobs->signals != NULL && jobs->next == NULL;
    ts_gpu_place place = {0};
    if (alone && follows(jobs))
        place = jobs->signals->last;
    ts_gpu_launch *l = ts_gpu_launch_take(b->gpu, &place);
    for (ts_job *job = jobs; job != NULL && l != NULL; job = job->next)
        if (job->signals != NULL) { /* behind a launch of several, one would wait for another */
            job->signals->last = alone ? place : (ts_gpu_place){0};
            job->signals->last_order = job->order;
        }
    return l;
}

/* Launches the jobs as one; false: there is no launch to be had now. */
static bool launch(ts_gpu_batch *b, ts_job *jobs, wait_for wait)
{
    if (wait == FOR_BOTH && follows(jobs))
        wait = FOR_WORKER;
    flight *f = malloc(sizeof *f);
    ts_gpu_launch *l = f == NULL ? NULL : take(b, jobs);
    if (l == NULL) {
        free(f);
        return false;
    }
    char why[TS_GPU_WHY_BYTES];
    ts_status status;
    if (jobs->num_copies > 0) {
        status = ts_gpu_launch_copies(l, jobs->base, ts_geometry_block_bytes(&jobs->geometry),
                                      jobs->copies, jobs->num_copies);
        snprintf(why, sizeof why, "%s", ts_gpu_launch_why(l));
    } else {
        status = queue_attend(b, l, jobs, wait, why, sizeof why);
    }
    if (jobs->num_copies == 0) {
        uint64_t count = 0;
        for (const ts_job *job = jobs; job != NULL; job = job->next)
            count++;
        atomic_fetch_add_explicit(&b->runs, count, memory_order_relaxed);
        atomic_fetch_add_explicit(&b->launches, 1, memory_order_relaxed);
    }
    if (status != TS_OK) {
        (void)ts_gpu_launch_finish(l, NULL, NULL);
        free(f);
        tell(jobs, status, why);
        if (status == TS_EDEVICE)
            lose(b, why);
        return true;
    }
    *f = (flight){.batch = b, .jobs = jobs, .waits = wait != FOR_NOBODY ? jobs->signals : NULL};
    pthread_mutex_lock(&b->lock);
    f->next = b->flights;
    if (f->next != NULL)
        f->next->prev = f;
    b->flights = f;
    if (f->waits != NULL)
        count_waiting(b, f->waits, true);
    pthread_mutex_unlock(&b->lock);
    if (ts_gpu_launch_finish(l, land, f) != TS_OK)
        land(f, TS_EDEVICE, ts_gpu_launch_why(l));
    return true;
}

/* Whether one more launch may wait for this job's worker. */
static bool may_wait(ts_gpu_batch *b, const ts_job *job)
{
    if (!ts_gpu_may_wait(b->gpu))
        return false;
    const ts_signals_page *page = job->signals;
    pthread_mutex_lock(&b->lock);
    bool may = b->waiting < WAITING_MOST && page->waiting < WAITING_EACH &&
               (page->waiting > 0 || b->sessions < WAITING_SESSIONS);
    pthread_mutex_unlock(&b->lock);
    return may;
}

/* Leaves in the list behind `first` the jobs like it that are ready; returns the others. */
static ts_job *join(ts_job *first)
{
    ts_job **joined_end = &first->next, *rest = NULL, **rest_end = &rest;
    for (ts_job *job = first->next, *next; job != NULL; job = next) {
        next = job->next;
        job->next = NULL;
        if (alike(first, job) && is_ready(job)) {
            *joined_end = job;
            joined_end = &job->next;
        } else {
            *rest_end = job;
            rest_end = &job->next;
        }
    }
    *joined_end = NULL;
    return rest;
}

static void hold(ts_gpu_batch *b, ts_job *job)
{
    job->next = NULL;
    *b->held_end = job;
    b->held_end = &job->next;
}

static bool is_lost(ts_gpu_batch *b)
{
    pthread_mutex_lock(&b->lock);
    bool lost = b->lost;
    pthread_mutex_unlock(&b->lock);
    return lost;
}

/* Launches what can be; the rest is held, in order. */
static void launch_all(ts_gpu_batch *b)
{
    ts_job *jobs = b->held;
    b->held = NULL;
    b->held_end = &b->held;
    while (jobs != NULL) {
        ts_job *job = jobs;
        jobs = job->next;
        if (is_lost(b)) {
            job->next = NULL;
            tell(job, TS_EDEVICE, b->why);
            continue;
        }
        bool ready = is_ready(job);
        if (!ready && !may_wait(b, job)) {
            hold(b, job);
            continue;
        }
        if (ready && job->num_copies == 0)
            jobs = join(job);
        else
            job->next = NULL;
        if (launch(b, job, ready ? FOR_NOBODY : FOR_BOTH))
            continue;
        for (ts_job *next; job != NULL; job = next) {
            next = job->next;
            hold(b, job);
        }
    }
}

/* True: it is that late. Under the lock. */
static bool wait_until(ts_gpu_batch *b, uint64_t ms)
{
    struct timespec until = {.tv_sec = (time_t)(ms / 1000), .tv_nsec = (long)(ms % 1000) * 1000000};
    return pthread_cond_timedwait(&b->event, &b->lock, &until) != 0;
}

static void release_waiters(const ts_job *jobs)
{
    for (const ts_job *job = jobs; job != NULL; job = job->next)
        ts_signals_release_waiters(job->signals);
}

/* Lets go those that have waited too long; when the next one will have (UINT64_MAX: none). */
static uint64_t let_go_late(ts_job *jobs, uint64_t now, uint64_t next)
{
    for (ts_job *job = jobs; job != NULL; job = job->next) {
        if (job->signals == NULL || reached(&job->signals->host->submitted, job->order))
            continue;
        if (job->deadline_ms > now) {
            next = job->deadline_ms < next ? job->deadline_ms : next;
            continue;
        }
        /* It alone: later runs have their own time. */
        job->late = true;
        __atomic_store_n(&job->signals->host->submitted, job->order, __ATOMIC_RELEASE);
    }
    return next;
}

/* Lets go whoever has waited too long, or everybody when the batch ends; when to look again at the
 * latest (UINT64_MAX: when something happens). Under the lock. */
static uint64_t look_for_late(ts_gpu_batch *b)
{
    uint64_t now = ts_now_ms(), until = let_go_late(b->held, now, UINT64_MAX);
    for (const flight *f = b->flights; f != NULL; f = f->next) {
        if (b->stop)
            release_waiters(f->jobs);
        until = let_go_late(f->jobs, now, until);
    }
    if (b->stop)
        release_waiters(b->held);
    return b->held != NULL ? now + POLL_MS : until;
}

/* Another process's fault may have taken the device while nothing runs here. Under CUDA's
 * multi-process service nobody is served then before this process has ended. */
static void check_health(ts_gpu_batch *b)
{
    char why[TS_GPU_WHY_BYTES];
    b->health_ms = ts_now_ms() + HEALTH_MS;
    if (ts_gpu_health(b->gpu, why, sizeof why) != TS_OK)
        lose(b, why);
}

/* Waits for something to do; returns false when all is done and the batch is to end. */
static bool await(ts_gpu_batch *b)
{
    bool ends, slow = false;
    pthread_mutex_lock(&b->lock);
    uint64_t until = look_for_late(b); /* also where there is always something else to do */
    while (b->head == NULL && !b->landed && !slow &&
           !(b->stop && b->flights == NULL && b->held == NULL)) {
        const bool late = wait_until(b, until < b->health_ms ? until : b->health_ms);
        slow = late && (b->held != NULL || ts_now_ms() >= b->health_ms);
        until = look_for_late(b);
    }
    *b->held_end = b->head;
    if (b->head != NULL)
        b->held_end = b->tail;
    b->head = NULL;
    b->tail = &b->head;
    b->landed = false;
    ends = b->stop && b->flights == NULL && b->held == NULL;
    pthread_mutex_unlock(&b->lock);
    return !ends;
}

static void *batch_main(void *arg)
{
    ts_gpu_batch *b = arg;
    check_health(b); /* makes the device this thread's */
    while (await(b)) {
        launch_all(b);
        if (ts_now_ms() >= b->health_ms)
            check_health(b);
    }
    return NULL;
}

/* ---- public ---- */

ts_status ts_gpu_batch_new(ts_gpu *gpu, uint32_t sessions, uint32_t submit_ms,
                           void (*failed)(const char *why), ts_gpu_batch **out, char *why,
                           size_t why_bytes)
{
    *out = NULL;
    ts_gpu_batch *b = calloc(1, sizeof *b);
    size_t bytes = (sessions * sizeof(uint32_t) + 4095) / 4096 * 4096;
    void *words = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (b == NULL || words == MAP_FAILED) {
        snprintf(why, why_bytes, "no memory for the words of %u sessions", sessions);
        goto fail;
    }
    void *there;
    if (ts_gpu_pin(gpu, words, bytes, &there, why, why_bytes) != TS_OK)
        goto fail;
    b->gpu = gpu;
    b->submit_ms = submit_ms;
    b->failed = failed;
    b->tail = &b->head;
    b->held_end = &b->held;
    b->words = words;
    b->words_there = there;
    b->words_bytes = bytes;
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_mutex_init(&b->lock, NULL);
    pthread_cond_init(&b->event, &attributes);
    pthread_condattr_destroy(&attributes);
    if (pthread_create(&b->thread, NULL, batch_main, b) != 0) {
        snprintf(why, why_bytes, "no thread for a GPU");
        ts_gpu_unpin_unmap(gpu, words, bytes);
        free(b);
        return TS_ENOMEM;
    }
    *out = b;
    return TS_OK;
fail:
    if (words != MAP_FAILED)
        munmap(words, bytes);
    free(b);
    return TS_ENOMEM;
}

void ts_gpu_batch_free(ts_gpu_batch *b)
{
    if (b == NULL)
        return;
    pthread_mutex_lock(&b->lock);
    b->stop = true;
    pthread_cond_signal(&b->event);
    pthread_mutex_unlock(&b->lock);
    pthread_join(b->thread, NULL);
    ts_gpu_unpin_unmap(b->gpu, b->words, b->words_bytes);
    pthread_cond_destroy(&b->event);
    pthread_mutex_destroy(&b->lock);
    free(b->parts);
    free(b->signals);
    free(b);
}

void ts_gpu_batch_submit(ts_gpu_batch *b, ts_job *job)
{
    job->next = NULL;
    job->deadline_ms = ts_now_ms() + b->submit_ms;
    pthread_mutex_lock(&b->lock);
    *b->tail = job;
    b->tail = &job->next;
    pthread_cond_signal(&b->event);
    pthread_mutex_unlock(&b->lock);
}

void ts_gpu_batch_word(ts_gpu_batch *b, uint32_t session, uint32_t **word, uint32_t **word_there)
{
    *word = b->words + session;
    *word_there = b->words_there + session;
}

void ts_gpu_batch_counts(const ts_gpu_batch *b, uint64_t *runs, uint64_t *launches)
{
    *runs = atomic_load_explicit(&b->runs, memory_order_relaxed);
    *launches = atomic_load_explicit(&b->launches, memory_order_relaxed);
}
