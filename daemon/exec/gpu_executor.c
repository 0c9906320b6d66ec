#define _GNU_SOURCE
#include "gpu_executor.h"

#include "clock.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <time.h>

#define WAITING_MOST (TS_GPU_LAUNCHES * 3 / 4)     /* launches that wait for workers */
#define WAITING_EACH 8u                            /* ... for the same one */
#define WAITING_SESSIONS (TS_GPU_STREAM_SLOTS / 2) /* ... whom they wait for: each has a slot */
#define HEALTH_MS 1000                             /* the device is looked at so often */
#define POLL_MS 1                                  /* while jobs wait here for their workers */
#define CROWD_SESSIONS 3u                          /* that have runs here: so many are a crowd, */
#define CROWD_JOINS 250u /* ... for so many join_us after such a run came */
#define JOIN_LAUNCHES 2u /* a ready run waits while these are under way */
#define SPIN_NS 20000u   /* words are looked at without a pause so long, */
#define NAP_NS 20000     /* ... and then so often */

/* Whom a launch of one job waits for: its worker, and the session's run before it. */
typedef enum wait_for { FOR_NOBODY, FOR_WORKER, FOR_BOTH } wait_for;

/* A launch under way: the jobs that it serves. */
typedef struct in_flight {
    struct in_flight *prev, *next;
    ts_gpu_executor *executor;
    ts_job *jobs;           /* NULL: they have been told */
    ts_signals_page *waits; /* for this session's worker; NULL: for nobody, or not any more */
} in_flight;

struct ts_gpu_executor {
    ts_gpu *gpu;
    uint32_t submit_ms;
    uint64_t join_ns;
    void (*failed)(const char *why);
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t event;
    ts_job *head, **tail; /* under the lock: what was submitted */
    in_flight *launched;  /* under the lock */
    uint32_t waiting;     /* under the lock: launches that wait for workers */
    uint32_t sessions;    /* under the lock: sessions of those */
    bool completed, stop; /* under the lock */
    bool lost;            /* under the lock: the device failed */
    char why[TS_GPU_WHY_BYTES + 128];
    ts_job *held, **held_end; /* the thread's own: jobs that can't be launched yet */
    ts_gpu_run *parts;        /* the thread's own: of a launch */
    ts_gpu_signal *signals;   /* the thread's own: two for each part */
    size_t capacity;
    uint64_t health_ms;            /* the thread's own: when it looks at the device next */
    uint64_t late_ms;              /* the thread's own: when it looked for late workers last */
    uint32_t active;               /* under the lock: sessions that have runs here */
    atomic_uint_fast64_t crowd_ns; /* until then there is a crowd */
    uint64_t ready_ns;             /* the thread's own: since when a run of a crowd's is ready */
    struct {
        const uint32_t *word;
        uint32_t number;
    } joined[JOIN_LAUNCHES];       /* the thread's own: what tells that a crowd's launch is over */
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
    return job->signals == NULL || (reached(&job->signals->host->submitted, job->run_number) &&
                                    reached(job->signals->done, job->run_number - 1));
}

static bool alike(const ts_job *a, const ts_job *b)
{
    return b->num_copies == 0 && a->base == b->base && a->heads == b->heads &&
           a->io_dtype == b->io_dtype && a->kernel == b->kernel &&
           ts_attention_same_variant(&a->variant, &b->variant);
}

/* A job of the session's comes, or is over. */
static void count_job(ts_gpu_executor *x, ts_signals_page *page, bool comes)
{
    if (page == NULL)
        return;
    pthread_mutex_lock(&x->lock);
    if (comes)
        x->active += page->jobs++ == 0;
    else
        x->active -= --page->jobs == 0;
    const bool crowd = comes && x->active >= CROWD_SESSIONS && x->join_ns > 0;
    pthread_mutex_unlock(&x->lock);
    if (crowd)
        atomic_store_explicit(&x->crowd_ns, ts_now_ns() + CROWD_JOINS * x->join_ns,
                              memory_order_relaxed);
}

static void complete_jobs(ts_gpu_executor *x, ts_job *jobs, ts_status status, const char *why)
{
    for (ts_job *job = jobs, *next; job != NULL; job = next) {
        next = job->next;
        count_job(x, job->signals, false);
        job->status = status;
        if (status == TS_OK && job->late) {
            job->status = TS_ETIMEOUT;
            snprintf(job->why, sizeof job->why, "the worker did not submit run %u in time",
                     job->run_number);
        } else if (status != TS_OK) {
            snprintf(job->why, sizeof job->why, "%s", why);
            if (job->signals != NULL) { /* nobody else will say that it is over */
                __atomic_store_n(&job->signals->host->completed, job->run_number, __ATOMIC_RELEASE);
                __atomic_store_n(job->signals->done, job->run_number, __ATOMIC_RELEASE);
            }
        }
        job->done(job);
    }
}

/* ---- launches under way ---- */

static void unlink_launched(ts_gpu_executor *x, in_flight *f)
{
    if (f->prev != NULL)
        f->prev->next = f->next;
    else
        x->launched = f->next;
    if (f->next != NULL)
        f->next->prev = f->prev;
}

/* The launch waits for a worker, or doesn't any more. Under the lock. */
static void count_waiting(ts_gpu_executor *x, ts_signals_page *page, bool begins)
{
    uint32_t before = page->waiting;
    page->waiting += begins ? 1u : -1u;
    x->waiting += begins ? 1u : -1u;
    if (before == 0)
        x->sessions++;
    else if (page->waiting == 0)
        x->sessions--;
}

/* The device is lost. Any thread. */
static void device_lost(ts_gpu_executor *x, const char *why)
{
    pthread_mutex_lock(&x->lock);
    bool first = !x->lost;
    if (first)
        snprintf(x->why, sizeof x->why, "cuda:%u (%s) failed: %s", ts_gpu_get_info(x->gpu)->ordinal,
                 ts_gpu_get_info(x->gpu)->name, why);
    x->lost = true;
    pthread_mutex_unlock(&x->lock);
    if (first)
        x->failed(x->why); /* which stays as it is */
}

/* The device has done it, or has failed. On the launch's thread. */
static void on_complete(void *arg, ts_status status, const char *why)
{
    in_flight *f = arg;
    ts_gpu_executor *x = f->executor;
    if (status != TS_OK)
        device_lost(x, why);
    pthread_mutex_lock(&x->lock);
    ts_job *jobs = f->jobs;
    f->jobs = NULL;
    if (f->waits != NULL) /* while the page is there */
        count_waiting(x, f->waits, false);
    pthread_mutex_unlock(&x->lock);
    complete_jobs(x, jobs, status, x->why);
    pthread_mutex_lock(&x->lock); /* until here the executor waits for this launch */
    unlink_launched(x, f);
    free(f);
    x->completed = true;
    pthread_cond_signal(&x->event);
    pthread_mutex_unlock(&x->lock);
}

/* ---- launching ---- */

/* Room for what a launch of all these jobs needs. */
static bool reserve_parts(ts_gpu_executor *x, const ts_job *jobs)
{
    size_t count = 0;
    for (; jobs != NULL; jobs = jobs->next)
        count++;
    if (count <= x->capacity)
        return true;
    free(x->parts);
    free(x->signals);
    x->parts = malloc(2 * count * sizeof *x->parts);
    x->signals = malloc(4 * count * sizeof *x->signals);
    x->capacity = x->parts == NULL || x->signals == NULL ? 0 : 2 * count;
    return x->capacity > 0;
}

/* Queues what tells that the jobs are over: the workers, who wait for it, first. */
static ts_status queue_signals(ts_gpu_executor *x, ts_gpu_launch *l, const ts_job *jobs)
{
    uint32_t count = 0;
    for (const ts_job *job = jobs; job != NULL; job = job->next)
        if (job->signals != NULL)
            x->signals[count++] = (ts_gpu_signal){&job->signals->there->completed, job->run_number};
    for (const ts_job *job = jobs; job != NULL; job = job->next)
        if (job->signals != NULL)
            x->signals[count++] = (ts_gpu_signal){job->signals->done_there, job->run_number};
    return ts_gpu_launch_signal(l, x->signals, count);
}

/* Makes the job's plan, unless it is there. False: the job is over, and no other. */
static bool prepare(ts_gpu_executor *x, ts_job *job)
{
    char why[TS_GPU_WHY_BYTES];
    if (job->num_copies > 0 || job->plan->made)
        return true;
    ts_status status =
        ts_gpu_plan_renew(x->gpu, &job->geometry, job->heads, job->io_dtype, job->kernel, job->seqs,
                          job->num_seqs, &job->plan->plan, why, sizeof why);
    job->plan->made = status == TS_OK;
    if (status == TS_OK)
        return true;
    job->next = NULL;
    complete_jobs(x, job, status, why);
    if (status == TS_EDEVICE)
        device_lost(x, why);
    return false;
}

/* Why it fails is in `why`. */
static ts_status queue_attend(ts_gpu_executor *x, ts_gpu_launch *l, ts_job *jobs, wait_for wait,
                              char *why, size_t why_bytes)
{
    ts_status status = reserve_parts(x, jobs) ? TS_OK : TS_ENOMEM;
    if (status != TS_OK) {
        snprintf(why, why_bytes, "no memory for a launch");
        return status;
    }
    uint32_t count = 0;
    for (const ts_job *job = jobs; job != NULL; job = job->next) {
        const ts_attention_seq *s = job->seqs; /* the others' rows follow the first's */
        x->parts[count++] = (ts_gpu_run){.plan = job->plan->plan,
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
    if (wait == FOR_BOTH)
        status = ts_gpu_launch_wait(l, jobs->signals->done_there, jobs->run_number - 1);
    if (wait != FOR_NOBODY && status == TS_OK)
        status = ts_gpu_launch_wait(l, &jobs->signals->there->submitted, jobs->run_number);
    if (status == TS_OK)
        status = ts_gpu_launch_attend(l, jobs->base, &jobs->variant, x->parts, count);
    if (status == TS_OK)
        status = queue_signals(x, l, jobs);
    if (status != TS_OK)
        snprintf(why, why_bytes, "%s", ts_gpu_launch_why(l));
    return status;
}

/* Whether the session's run before this one was launched by itself: queued behind that, this one
 * needs no word to wait for. */
static bool follows(const ts_job *job)
{
    return job->signals->alone_at.epoch != 0 && job->signals->alone_number == job->run_number - 1;
}

/* A launch for the jobs; NULL: there is none to be had now. */
static ts_gpu_launch *take(ts_gpu_executor *x, ts_job *jobs)
{
    bool alone = jobs->signals != NULL && jobs->next == NULL;
    ts_gpu_position position = {0};
    if (alone && follows(jobs))
        position = jobs->signals->alone_at;
    ts_gpu_launch *l = ts_gpu_launch_take(x->gpu, &position);
    for (ts_job *job = jobs; job != NULL && l != NULL; job = job->next)
        if (job->signals != NULL) { /* behind a launch of several, one would wait for another */
            job->signals->alone_at = alone ? position : (ts_gpu_position){0};
            job->signals->alone_number = job->run_number;
        }
    return l;
}

/* Launches the jobs as one; false: there is no launch to be had now. */
static bool launch(ts_gpu_executor *x, ts_job *jobs, wait_for wait)
{
    if (wait == FOR_BOTH && follows(jobs))
        wait = FOR_WORKER;
    in_flight *f = malloc(sizeof *f);
    ts_gpu_launch *l = f == NULL ? NULL : take(x, jobs);
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
        status = queue_attend(x, l, jobs, wait, why, sizeof why);
    }
    if (jobs->num_copies == 0) {
        uint64_t count = 0;
        for (const ts_job *job = jobs; job != NULL; job = job->next)
            count++;
        atomic_fetch_add_explicit(&x->runs, count, memory_order_relaxed);
        atomic_fetch_add_explicit(&x->launches, 1, memory_order_relaxed);
    }
    if (status != TS_OK) {
        (void)ts_gpu_launch_finish(l, NULL, NULL);
        free(f);
        complete_jobs(x, jobs, status, why);
        if (status == TS_EDEVICE)
            device_lost(x, why);
        return true;
    }
    *f = (in_flight){
        .executor = x, .jobs = jobs, .waits = wait != FOR_NOBODY ? jobs->signals : NULL};
    pthread_mutex_lock(&x->lock);
    f->next = x->launched;
    if (f->next != NULL)
        f->next->prev = f;
    x->launched = f;
    if (f->waits != NULL)
        count_waiting(x, f->waits, true);
    pthread_mutex_unlock(&x->lock);
    if (ts_gpu_launch_finish(l, on_complete, f) != TS_OK)
        on_complete(f, TS_EDEVICE, ts_gpu_launch_why(l));
    return true;
}

/* Whether one more launch may wait for this job's worker. */
static bool may_wait(ts_gpu_executor *x, const ts_job *job)
{
    if (!ts_gpu_may_wait(x->gpu))
        return false;
    const ts_signals_page *page = job->signals;
    pthread_mutex_lock(&x->lock);
    bool may = x->waiting < WAITING_MOST && page->waiting < WAITING_EACH &&
               (page->waiting > 0 || x->sessions < WAITING_SESSIONS);
    pthread_mutex_unlock(&x->lock);
    return may;
}

/* Leaves in the list behind `first` the jobs like it that are ready; returns the others. */
static ts_job *join(ts_gpu_executor *x, ts_job *first)
{
    ts_job **joined_end = &first->next, *rest = NULL, **rest_end = &rest;
    for (ts_job *job = first->next, *next; job != NULL; job = next) {
        next = job->next;
        job->next = NULL;
        if (alike(first, job) && is_ready(job)) {
            if (!prepare(x, job))
                continue;
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

static void hold(ts_gpu_executor *x, ts_job *job)
{
    job->next = NULL;
    *x->held_end = job;
    x->held_end = &job->next;
}

static bool is_lost(ts_gpu_executor *x)
{
    pthread_mutex_lock(&x->lock);
    bool lost = x->lost;
    pthread_mutex_unlock(&x->lock);
    return lost;
}

/* ---- a crowd ----
 *
 * Where several sessions have runs here, a launch for each would cost more than its attention. Then
 * no launch waits on the GPU for a worker: the thread watches their words, and runs that are ready
 * together become one launch. While JOIN_LAUNCHES are under way a ready run waits a little for
 * others, so the GPU always has something to do, and the more runs there are the more go into one
 * launch. */

static bool is_crowd(ts_gpu_executor *x, uint64_t now_ns)
{
    return now_ns < atomic_load_explicit(&x->crowd_ns, memory_order_relaxed);
}

/* Whether ready runs wait for others yet. */
static bool collects(ts_gpu_executor *x, uint64_t now_ns)
{
    if (x->ready_ns == 0 || now_ns - x->ready_ns >= x->join_ns)
        return false;
    for (uint32_t i = 0; i < JOIN_LAUNCHES; i++)
        if (x->joined[i].word == NULL || reached(x->joined[i].word, x->joined[i].number))
            return false;
    return true;
}

/* A launch of a crowd's begins; its last job is over when the launch is. */
static void note_joined(ts_gpu_executor *x, const ts_job *jobs)
{
    uint32_t place = 0;
    while (jobs->next != NULL)
        jobs = jobs->next;
    for (uint32_t i = 0; i < JOIN_LAUNCHES; i++)
        if (x->joined[i].word == NULL || reached(x->joined[i].word, x->joined[i].number))
            place = i;
    if (jobs->signals != NULL) {
        x->joined[place].word = jobs->signals->done;
        x->joined[place].number = jobs->run_number;
    }
}

/* Watches until a held run can be launched, something comes, or for a millisecond. */
static void watch(ts_gpu_executor *x)
{
    const uint64_t begin_ns = ts_now_ns();
    for (uint64_t now_ns = begin_ns; now_ns - begin_ns < POLL_MS * 1000000u; now_ns = ts_now_ns()) {
        bool ready = false;
        if (__atomic_load_n(&x->head, __ATOMIC_RELAXED) != NULL)
            return;
        for (const ts_job *job = x->held; job != NULL && !ready; job = job->next)
            ready = is_ready(job);
        if (ready && x->ready_ns == 0)
            x->ready_ns = now_ns;
        if (ready && !collects(x, now_ns))
            return;
        if (ready || now_ns - begin_ns < SPIN_NS)
            ts_pause();
        else
            nanosleep(&(struct timespec){.tv_nsec = NAP_NS}, NULL);
    }
}

/* Launches what can be; the rest is held, in order. */
static void launch_all(ts_gpu_executor *x)
{
    const uint64_t now_ns = ts_now_ns();
    const bool crowd = is_crowd(x, now_ns), collect = crowd && collects(x, now_ns);
    ts_job *jobs = x->held;
    x->held = NULL;
    x->held_end = &x->held;
    while (jobs != NULL) {
        ts_job *job = jobs;
        jobs = job->next;
        if (is_lost(x)) {
            job->next = NULL;
            complete_jobs(x, job, TS_EDEVICE, x->why);
            continue;
        }
        const bool ready = is_ready(job);
        if (ready ? collect && job->num_copies == 0 : crowd || !may_wait(x, job)) {
            hold(x, job);
            continue;
        }
        if (!prepare(x, job))
            continue;
        if (ready && job->num_copies == 0)
            jobs = join(x, job);
        else
            job->next = NULL;
        if (crowd && ready && job->num_copies == 0) {
            note_joined(x, job);
            x->ready_ns = 0;
        }
        if (launch(x, job, ready ? FOR_NOBODY : FOR_BOTH))
            continue;
        for (ts_job *next; job != NULL; job = next) {
            next = job->next;
            hold(x, job);
        }
    }
}

/* True: it is that late. Under the lock. */
static bool wait_until(ts_gpu_executor *x, uint64_t ms)
{
    struct timespec until = {.tv_sec = (time_t)(ms / 1000), .tv_nsec = (long)(ms % 1000) * 1000000};
    return pthread_cond_timedwait(&x->event, &x->lock, &until) != 0;
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
        if (job->signals == NULL || reached(&job->signals->host->submitted, job->run_number))
            continue;
        if (job->deadline_ms > now) {
            next = job->deadline_ms < next ? job->deadline_ms : next;
            continue;
        }
        /* It alone: later runs have their own time. */
        job->late = true;
        __atomic_store_n(&job->signals->host->submitted, job->run_number, __ATOMIC_RELEASE);
    }
    return next;
}

/* Lets go whoever has waited too long, or everybody when the executor ends; when to look again at
 * the latest (UINT64_MAX: when something happens). Under the lock. */
static uint64_t look_for_late(ts_gpu_executor *x)
{
    uint64_t now = ts_now_ms(), until = let_go_late(x->held, now, UINT64_MAX);
    x->late_ms = now;
    for (const in_flight *f = x->launched; f != NULL; f = f->next) {
        if (x->stop)
            release_waiters(f->jobs);
        until = let_go_late(f->jobs, now, until);
    }
    if (x->stop)
        release_waiters(x->held);
    return x->held != NULL ? now + POLL_MS : until;
}

/* Another process's fault may have taken the device while nothing runs here. Under CUDA's
 * multi-process service nobody is served then before this process has ended. */
static void check_health(ts_gpu_executor *x)
{
    char why[TS_GPU_WHY_BYTES];
    x->health_ms = ts_now_ms() + HEALTH_MS;
    if (ts_gpu_health(x->gpu, why, sizeof why) != TS_OK)
        device_lost(x, why);
}

/* Waits for something to do; returns false when all is done and the executor is to end. */
static bool await(ts_gpu_executor *x)
{
    bool ends, slow = false;
    const bool watches = x->held != NULL && is_crowd(x, ts_now_ns());
    if (watches)
        watch(x);
    pthread_mutex_lock(&x->lock);
    uint64_t until = UINT64_MAX; /* also where there is always something else to do */
    if (!watches || ts_now_ms() - x->late_ms >= POLL_MS)
        until = look_for_late(x);
    while (!watches && x->head == NULL && !x->completed && !slow &&
           !(x->stop && x->launched == NULL && x->held == NULL)) {
        const bool late = wait_until(x, until < x->health_ms ? until : x->health_ms);
        slow = late && (x->held != NULL || ts_now_ms() >= x->health_ms);
        until = look_for_late(x);
    }
    *x->held_end = x->head;
    if (x->head != NULL)
        x->held_end = x->tail;
    x->head = NULL;
    x->tail = &x->head;
    x->completed = false;
    ends = x->stop && x->launched == NULL && x->held == NULL;
    pthread_mutex_unlock(&x->lock);
    return !ends;
}

static void *batch_main(void *arg)
{
    ts_gpu_executor *x = arg;
    check_health(x);                  /* makes the device this thread's */
    prctl(PR_SET_TIMERSLACK, 1000ul); /* for naps */
    prctl(PR_SET_NAME, "gpu");
    while (await(x)) {
        launch_all(x);
        if (ts_now_ms() >= x->health_ms)
            check_health(x);
    }
    return NULL;
}

/* ---- public ---- */

ts_status ts_gpu_executor_new(ts_gpu *gpu, uint32_t sessions, uint32_t submit_ms, uint32_t join_us,
                              void (*failed)(const char *why), ts_gpu_executor **out, char *why,
                              size_t why_bytes)
{
    *out = NULL;
    ts_gpu_executor *x = calloc(1, sizeof *x);
    size_t bytes = (sessions * sizeof(uint32_t) + 4095) / 4096 * 4096;
    void *words = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (x == NULL || words == MAP_FAILED) {
        snprintf(why, why_bytes, "no memory for the words of %u sessions", sessions);
        goto fail;
    }
    void *there;
    if (ts_gpu_pin(gpu, words, bytes, &there, why, why_bytes) != TS_OK)
        goto fail;
    x->gpu = gpu;
    x->submit_ms = submit_ms;
    x->join_ns = join_us * 1000ull;
    x->failed = failed;
    x->tail = &x->head;
    x->held_end = &x->held;
    x->words = words;
    x->words_there = there;
    x->words_bytes = bytes;
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_mutex_init(&x->lock, NULL);
    pthread_cond_init(&x->event, &attributes);
    pthread_condattr_destroy(&attributes);
    if (pthread_create(&x->thread, NULL, batch_main, x) != 0) {
        snprintf(why, why_bytes, "no thread for a GPU");
        ts_gpu_unpin_unmap(gpu, words, bytes);
        free(x);
        return TS_ENOMEM;
    }
    *out = x;
    return TS_OK;
fail:
    if (words != MAP_FAILED)
        munmap(words, bytes);
    free(x);
    return TS_ENOMEM;
}

void ts_gpu_executor_free(ts_gpu_executor *x)
{
    if (x == NULL)
        return;
    pthread_mutex_lock(&x->lock);
    x->stop = true;
    pthread_cond_signal(&x->event);
    pthread_mutex_unlock(&x->lock);
    pthread_join(x->thread, NULL);
    ts_gpu_unpin_unmap(x->gpu, x->words, x->words_bytes);
    pthread_cond_destroy(&x->event);
    pthread_mutex_destroy(&x->lock);
    free(x->parts);
    free(x->signals);
    free(x);
}

void ts_gpu_executor_submit(ts_gpu_executor *x, ts_job *job)
{
    job->next = NULL;
    job->deadline_ms = ts_now_ms() + x->submit_ms;
    count_job(x, job->signals, true);
    pthread_mutex_lock(&x->lock);
    *x->tail = job;
    x->tail = &job->next;
    pthread_cond_signal(&x->event);
    pthread_mutex_unlock(&x->lock);
}

void ts_gpu_executor_word(ts_gpu_executor *x, uint32_t session, uint32_t **word,
                          uint32_t **word_there)
{
    *word = x->words + session;
    *word_there = x->words_there + session;
}

void ts_gpu_executor_counts(const ts_gpu_executor *x, uint64_t *runs, uint64_t *launches)
{
    *runs = atomic_load_explicit(&x->runs, memory_order_relaxed);
    *launches = atomic_load_explicit(&x->launches, memory_order_relaxed);
}
