#define _GNU_SOURCE
#include "gpu_executor_internal.h"

#include "clock.h"
#include "thread_first.h"
#include "timed_wait.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <time.h>

#define HEALTH_MS 1000     /* between looks at the device */
#define POLL_MS 1          /* while jobs wait here for their workers */
#define SPIN_NS 20000u     /* for which words are looked at without a pause */
#define NAP_NS 20000       /* the pause between looks after that */
#define LATELY_NS 5000000u /* after a launch: words that no launch waits for are looked at */

/* ---- a crowd ----
 *
 * Where many sessions have runs here, a launch for each would cost more than its attention. Then
 * the thread watches their words, and runs that are ready together become one launch. While
 * JOIN_LAUNCHES are under way a ready run waits a little for others, so the GPU always has
 * something to do, and the more runs there are the more go into one launch. While none is ready the
 * thread has time: it launches runs ahead of their workers, a few of each, whose words the GPU
 * waits for. */

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
        if (x->joined[i].word == NULL || ts_gpu_reached(x->joined[i].word, x->joined[i].number))
            return false;
    return true;
}

/* What tells that a launch of these jobs is over: its last job is when the launch is. */
static ts_gpu_joined end_of(const ts_job *jobs)
{
    jobs = ts_gpu_last_job(jobs);
    return jobs->signals == NULL ? (ts_gpu_joined){0}
                                 : (ts_gpu_joined){jobs->signals->done, jobs->run_number};
}

/* A launch of a crowd's has begun. */
static void note_joined(ts_gpu_executor *x, ts_gpu_joined end)
{
    uint32_t place = 0;
    for (uint32_t i = 0; i < JOIN_LAUNCHES; i++)
        if (x->joined[i].word == NULL || ts_gpu_reached(x->joined[i].word, x->joined[i].number))
            place = i;
    if (end.word != NULL)
        x->joined[place] = end;
    x->ready_ns = 0;
}

/* Watches until a held run can be launched, something comes, or for a millisecond. Not at all: one
 * may be launched ahead. */
static void watch(ts_gpu_executor *x)
{
    const uint64_t begin_ns = ts_now_ns();
    for (uint64_t now_ns = begin_ns; now_ns - begin_ns < POLL_MS * 1000000u; now_ns = ts_now_ns()) {
        bool ready = false;
        if (__atomic_load_n(&x->head, __ATOMIC_RELAXED) != NULL)
            return;
        for (const ts_held_queue *q = x->held.first; q != NULL && !ready; q = q->next)
            ready = ts_gpu_is_ready(q->first);
        if (ready && x->ready_ns == 0)
            x->ready_ns = now_ns;
        if (ready ? !collects(x, now_ns) : x->ahead)
            return;
        if (ready || now_ns - begin_ns < SPIN_NS)
            ts_pause();
        else
            nanosleep(&(struct timespec){.tv_nsec = NAP_NS}, NULL);
    }
}

/* Launches the job, which was taken, with those like it if it is ready. False: there was no launch
 * to be had, or it failed before its turn, and it is held again. */
static bool launch(ts_gpu_executor *x, ts_job *job, bool ready, bool crowd)
{
    ts_gpu_tried tried = ts_gpu_prepare_job(x, job);
    if (tried == TRIED_PLANNED) {
        const bool joins = ready && job->num_copies == 0;
        if (joins)
            ts_gpu_join_jobs(x, job);
        const ts_gpu_joined end = end_of(job);
        tried = ts_gpu_launch_jobs(x, job, ready ? FOR_NOBODY : FOR_BOTH);
        if (tried == TRIED_GONE && crowd && joins)
            note_joined(x, end);
    }
    if (tried == TRIED_GONE) {
        x->gone_ns = ts_now_ns();
        return true;
    }
    x->full = x->full || tried == TRIED_FULL;
    ts_held_put_back(&x->held, job);
    return false;
}

/* Whether the session's first job has to wait here yet. */
static bool must_wait(ts_gpu_executor *x, const ts_job *job, bool ready, bool crowd, bool collect)
{
    if (ready)
        return collect && job->num_copies == 0;
    if (!crowd && job->status == TS_OK && ts_gpu_may_wait_for(x, job, false))
        return false;
    x->unseen = x->unseen || !ts_gpu_is_waited_for(x, job);
    return true;
}

/* Launches what can be: of each session in turn, until each has to wait. Where there is no launch
 * for one of a crowd, nobody else of it is tried. */
static void launch_all(ts_gpu_executor *x)
{
    const uint64_t now_ns = ts_now_ns(), round = ++x->round;
    const bool crowd = is_crowd(x, now_ns), collect = crowd && collects(x, now_ns);
    x->full = x->unseen = false;
    ts_gpu_expect_company(x->gpu, crowd ? CROWD_SESSIONS : 1);
    while (x->held.first != NULL && x->held.first->tried != round && !(crowd && x->full)) {
        ts_held_queue *q = x->held.first;
        ts_job *job = q->first;
        const bool lost = ts_gpu_device_is_lost(x), ready = ts_gpu_is_ready(job);
        if (!lost && must_wait(x, job, ready, crowd, collect)) {
            q->tried = round;
            ts_held_turn(&x->held);
            continue;
        }
        if (q->first->next != NULL)
            ts_held_turn(&x->held);
        ts_held_take(&x->held, NULL, job);
        if (lost)
            ts_gpu_complete_jobs(x, job, TS_EDEVICE, x->why);
        else if (!launch(x, job, ready, crowd))
            q->tried = round; /* it holds the job again */
    }
}

/* Launches one of a crowd's runs ahead of its worker, unless one is ready. */
static void launch_ahead(ts_gpu_executor *x)
{
    x->ahead = false;
    if (x->full || !is_crowd(x, ts_now_ns()))
        return;
    ts_job *found = NULL;
    for (const ts_held_queue *q = x->held.first; q != NULL; q = q->next) {
        if (ts_gpu_is_ready(q->first))
            return;
        if (found == NULL && q->first->status == TS_OK && ts_gpu_may_wait_for(x, q->first, true))
            found = q->first;
    }
    if (found == NULL)
        return;
    ts_held_take(&x->held, NULL, found);
    x->ahead = launch(x, found, false, true);
}

/* True: it is that late. Under the lock. */
static bool wait_until(ts_gpu_executor *x, uint64_t ms)
{
    return ts_timed_wait(&x->event, &x->lock, ms);
}

static void release_waiters(const ts_job *jobs)
{
    for (const ts_job *job = jobs; job != NULL; job = job->next)
        ts_signals_release_waiters(job->signals);
}

/* Lets go those that have waited too long; when the next one will have (UINT64_MAX: none). */
static uint64_t release_late(ts_job *jobs, uint64_t now, uint64_t next)
{
    for (ts_job *job = jobs; job != NULL; job = job->next) {
        if (job->signals == NULL || ts_gpu_reached(&job->signals->host->submitted, job->run_number))
            continue;
        if (job->deadline_ms > now) {
            next = job->deadline_ms < next ? job->deadline_ms : next;
            continue;
        }
        /* It alone: later runs have their own time. The next daemon is to know, too. */
        job->late = true;
        ts_gpu_note_late(job);
        __atomic_store_n(&job->signals->host->submitted, job->run_number, __ATOMIC_RELEASE);
    }
    return next;
}

/* Lets go whoever has waited too long, or everybody when the executor ends; when to look again at
 * the latest (UINT64_MAX: when something happens). Under the lock. */
static uint64_t look_for_late(ts_gpu_executor *x)
{
    uint64_t now = ts_now_ms(), until = UINT64_MAX;
    x->late_ms = now;
    for (ts_held_queue *q = x->held.first; q != NULL; q = q->next)
        until = release_late(q->first, now, until);
    for (const in_flight *f = x->launched; f != NULL; f = f->next) {
        if (x->stop)
            release_waiters(f->jobs);
        until = release_late(f->jobs, now, until);
    }
    if (x->stop)
        for (const ts_held_queue *q = x->held.first; q != NULL; q = q->next)
            release_waiters(q->first);
    return x->held.first != NULL ? now + POLL_MS : until;
}

/* Another process's fault may have taken the device while nothing runs here. Under CUDA's
 * multi-process service nobody is served then before this process has ended. */
static void check_health(ts_gpu_executor *x)
{
    x->health_ms = ts_now_ms() + HEALTH_MS;
    (void)ts_gpu_executor_is_lost(x);
}

/* Whether words of held runs are to be looked at all the time: of a crowd's, and of those whose
 * session has no launch under way whose end would tell, while others have. */
static bool is_to_watch(ts_gpu_executor *x)
{
    const uint64_t now_ns = ts_now_ns();
    return x->held.first != NULL && !x->full &&
           (is_crowd(x, now_ns) || (x->unseen && now_ns - x->gone_ns < LATELY_NS));
}

/* Waits for something to do; returns false when all is done and the executor is to end. */
static bool await(ts_gpu_executor *x)
{
    bool ends, slow = false;
    const bool watches = is_to_watch(x);
    if (watches)
        watch(x);
    pthread_mutex_lock(&x->lock);
    uint64_t until = UINT64_MAX; /* also where there is always something else to do */
    if (!watches || ts_now_ms() - x->late_ms >= POLL_MS)
        until = look_for_late(x);
    x->holds = x->held.first != NULL;
    while (!watches && x->head == NULL && !x->completed && !slow &&
           !(x->stop && x->launched == NULL && x->held.first == NULL)) {
        const bool late = wait_until(x, until < x->health_ms ? until : x->health_ms);
        slow = late && (x->held.first != NULL || ts_now_ms() >= x->health_ms);
        until = look_for_late(x);
    }
    for (ts_job *job = x->head, *next; job != NULL; job = next) {
        next = job->next;
        ts_held_add(&x->held, job);
    }
    x->head = NULL;
    x->tail = &x->head;
    x->completed = false;
    x->holds = x->held.first != NULL;
    ends = x->stop && x->launched == NULL && x->held.first == NULL;
    pthread_mutex_unlock(&x->lock);
    return !ends;
}

static void *executor_main(void *arg)
{
    ts_gpu_executor *x = arg;
    check_health(x);                  /* makes the device this thread's */
    prctl(PR_SET_TIMERSLACK, 1000ul); /* for naps */
    prctl(PR_SET_NAME, "gpu");
    ts_thread_first();
    while (await(x)) {
        launch_all(x);
        launch_ahead(x);
        if (ts_now_ms() >= x->health_ms)
            check_health(x);
    }
    return NULL;
}

/* ---- public ---- */

ts_status ts_gpu_executor_new(ts_gpu *gpu, uint32_t submit_ms, uint32_t join_us,
                              void (*failed)(const char *why), ts_gpu_executor **out, char *why,
                              size_t why_bytes)
{
    ts_gpu_executor *x = *out = calloc(1, sizeof *x);
    if (x == NULL) {
        snprintf(why, why_bytes, "no memory for a GPU's executor");
        return TS_ENOMEM;
    }
    x->gpu = gpu;
    x->submit_ms = submit_ms;
    x->join_ns = join_us * 1000ull;
    x->failed = failed;
    x->tail = &x->head;
    pthread_mutex_init(&x->lock, NULL);
    ts_timed_wait_init(&x->event);
    if (pthread_create(&x->thread, NULL, executor_main, x) == 0)
        return TS_OK;
    snprintf(why, why_bytes, "no thread for a GPU");
    free(x);
    *out = NULL;
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
    pthread_cond_destroy(&x->event);
    pthread_mutex_destroy(&x->lock);
    free(x->parts);
    free(x);
}

bool ts_gpu_executor_is_lost(ts_gpu_executor *x)
{
    char why[TS_GPU_WHY_BYTES];
    if (ts_gpu_health(x->gpu, why, sizeof why) != TS_OK)
        ts_gpu_device_lost(x, why);
    return ts_gpu_device_is_lost(x);
}

void ts_gpu_executor_submit(ts_gpu_executor *x, ts_job *job)
{
    job->next = NULL;
    job->deadline_ms = ts_now_ms() + x->submit_ms;
    ts_gpu_count_job(x, job->signals, true);
    pthread_mutex_lock(&x->lock);
    __atomic_store_n(x->tail, job, __ATOMIC_RELAXED); /* which `watch` looks at */
    x->tail = &job->next;
    pthread_cond_signal(&x->event);
    pthread_mutex_unlock(&x->lock);
}

void ts_gpu_executor_counts(const ts_gpu_executor *x, uint64_t *runs, uint64_t *launches)
{
    *runs = atomic_load_explicit(&x->runs, memory_order_relaxed);
    *launches = atomic_load_explicit(&x->launches, memory_order_relaxed);
}
