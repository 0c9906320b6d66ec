#define _GNU_SOURCE
#include "gpu_executor_internal.h"

#include "clock.h"

#include <stdio.h>
#include <stdlib.h>

#define WAITING_MOST (TS_GPU_LAUNCHES * 3 / 4)     /* launches that wait for workers */
#define WAITING_EACH 8u                            /* ... for the same one */
#define WAITING_EACH_CROWD 2u                      /* ... of a crowd (gpu_executor.c) */
#define WAITING_SESSIONS (TS_GPU_STREAM_SLOTS / 2) /* ... whom they wait for: each has a slot */

/* A run that comes to a crowd makes it one (gpu_executor.c) for CROWD_JOINS times join_us. */
#define CROWD_JOINS 250u

static bool alike(const ts_job *a, const ts_job *b)
{
    return b->num_copies == 0 && a->base == b->base && a->heads == b->heads &&
           a->io_dtype == b->io_dtype && a->kernel == b->kernel &&
           ts_attention_same_variant(&a->variant, &b->variant);
}

/* A job of the session's comes, or is over. */
void ts_gpu_count_job(ts_gpu_executor *x, ts_signals_page *page, bool comes)
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

void ts_gpu_note_late(const ts_job *job)
{
    uint32_t *word = &job->signals->host->late;
    const uint32_t late = __atomic_load_n(word, __ATOMIC_RELAXED);
    if (!ts_job_is_refused(job) && (late == 0 || (int32_t)(job->run_number - late) > 0))
        __atomic_store_n(word, job->run_number, __ATOMIC_RELEASE);
}

/* Nobody else will say that it is over. What a lost device left undone the next daemon does; of
 * anything else it is to know that it failed. */
static void tell_failed(const ts_job *job, ts_status status)
{
    const ts_signals_page *page = job->signals;
    const uint32_t number = job->run_number;
    if (page->outlives && status == TS_EDEVICE)
        return;
    ts_gpu_note_late(job);
    __atomic_store_n(&page->host->completed, number, __ATOMIC_RELEASE);
    __atomic_store_n(page->done, number, __ATOMIC_RELEASE);
}

void ts_gpu_complete_jobs(ts_gpu_executor *x, ts_job *jobs, ts_status status, const char *why)
{
    for (ts_job *job = jobs, *next; job != NULL; job = next) {
        next = job->next;
        ts_gpu_count_job(x, job->signals, false);
        job->status = status;
        if (status == TS_OK && job->late) {
            job->status = TS_ETIMEOUT;
            snprintf(job->why, sizeof job->why, "the worker did not submit run %u in time",
                     job->run_number);
        } else if (status != TS_OK) {
            snprintf(job->why, sizeof job->why, "%s", why);
            if (job->signals != NULL)
                tell_failed(job, status);
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
void ts_gpu_device_lost(ts_gpu_executor *x, const char *why)
{
    pthread_mutex_lock(&x->lock);
    bool first = !atomic_load(&x->lost);
    if (first)
        snprintf(x->why, sizeof x->why, "cuda:%u (%s) failed: %s", ts_gpu_get_info(x->gpu)->ordinal,
                 ts_gpu_get_info(x->gpu)->name, why);
    atomic_store(&x->lost, true);
    pthread_mutex_unlock(&x->lock);
    if (first)
        x->failed(x->why); /* which stays as it is */
}

/* The device has done it, or has failed. On the thread that sees launches' ends. */
static void on_complete(void *arg, ts_status status, const char *why)
{
    in_flight *f = arg;
    ts_gpu_executor *x = f->executor;
    if (status != TS_OK)
        ts_gpu_device_lost(x, why);
    pthread_mutex_lock(&x->lock);
    ts_job *jobs = f->jobs;
    f->jobs = NULL;
    if (f->waits != NULL) /* while the page is there */
        count_waiting(x, f->waits, false);
    pthread_mutex_unlock(&x->lock);
    ts_gpu_complete_jobs(x, jobs, status, x->why);
    pthread_mutex_lock(&x->lock); /* until here the executor waits for this launch */
    unlink_launched(x, f);
    free(f);
    if (x->holds || x->stop) {
        x->completed = true;
        pthread_cond_signal(&x->event);
    }
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
    x->parts = malloc(2 * count * sizeof *x->parts);
    x->capacity = x->parts == NULL ? 0 : 2 * count;
    return x->capacity > 0;
}

/* The jobs fail before they are launched. A run that is early, as others of its session are under
 * way, does so when its turn comes: told now, it would let go who waits for those, and they would
 * take the words back again. */
static ts_gpu_tried fail_jobs(ts_gpu_executor *x, ts_job *jobs, bool early, ts_status status,
                              const char *why)
{
    if (early && status != TS_EDEVICE) {
        jobs->status = status;
        return TRIED_EARLY;
    }
    ts_gpu_complete_jobs(x, jobs, status, why);
    if (status == TS_EDEVICE)
        ts_gpu_device_lost(x, why);
    return TRIED_GONE;
}

/* Makes the job's plan, unless it is there. TRIED_PLANNED, TRIED_GONE (the job is over, and no
 * other), TRIED_EARLY (never of one that is ready). */
ts_gpu_tried ts_gpu_prepare_job(ts_gpu_executor *x, ts_job *job)
{
    char why[TS_GPU_WHY_BYTES];
    if (ts_job_is_refused(job))
        return fail_jobs(x, job, false, job->status, "the run was refused");
    if (job->num_copies > 0 || job->plan->made)
        return TRIED_PLANNED;
    ts_status status =
        ts_gpu_plan_renew(x->gpu, &job->geometry, job->heads, job->io_dtype, job->kernel, job->seqs,
                          job->num_seqs, &job->plan->plan, why, sizeof why);
    job->plan->made = status == TS_OK;
    if (status == TS_OK)
        return TRIED_PLANNED;
    const ts_signals_page *page = job->signals;
    const bool early = page != NULL && !ts_gpu_reached(page->done, job->run_number - 1);
    return fail_jobs(x, job, early, status, why);
}

/* Why it fails is in `why`. */
static ts_status queue_attend(ts_gpu_executor *x, ts_gpu_launch *l, ts_job *jobs,
                              ts_gpu_wait_for wait, char *why, size_t why_bytes)
{
    ts_status status = reserve_parts(x, jobs) ? TS_OK : TS_ENOMEM;
    if (status != TS_OK) {
        snprintf(why, why_bytes, "no memory for a launch");
        return status;
    }
    uint32_t count = 0;
    for (const ts_job *job = jobs; job != NULL; job = job->next) {
        const ts_signals_page *page = job->signals;
        ts_gpu_run *run = &x->parts[count++];
        *run = ts_gpu_run_over(job->plan->plan, job->seqs);
        run->words[0] = page == NULL ? NULL : &page->there->completed;
        run->words[1] = page == NULL ? NULL : page->done_there;
        run->number = job->run_number;
    }
    if (wait != FOR_NOBODY) {
        /* NOLINTNEXTLINE(clang-analyzer-core.NullDereference): who is waited for has a page */
        const ts_signals *there = jobs->signals->there;
        if (wait == FOR_BOTH)
            status = ts_gpu_launch_wait(l, jobs->signals->done_there, jobs->run_number - 1);
        if (status == TS_OK)
            status = ts_gpu_launch_wait(l, &there->submitted, jobs->run_number);
    }
    if (status == TS_OK)
        status = ts_gpu_launch_attend(l, jobs->base, &jobs->variant, x->parts, count);
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

static void count_runs(ts_gpu_executor *x, const ts_job *jobs)
{
    uint64_t count = 0;
    for (const ts_job *job = jobs; job != NULL; job = job->next)
        count++;
    atomic_fetch_add_explicit(&x->runs, count, memory_order_relaxed);
    atomic_fetch_add_explicit(&x->launches, 1, memory_order_relaxed);
}

/* Launches the jobs as one. TRIED_GONE, TRIED_FULL, TRIED_EARLY. */
ts_gpu_tried ts_gpu_launch_jobs(ts_gpu_executor *x, ts_job *jobs, ts_gpu_wait_for wait)
{
    if (wait == FOR_BOTH && follows(jobs))
        wait = FOR_WORKER;
    in_flight *f = malloc(sizeof *f);
    ts_gpu_launch *l = f == NULL ? NULL : take(x, jobs);
    if (l == NULL) {
        free(f);
        return TRIED_FULL;
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
    if (status != TS_OK) {
        (void)ts_gpu_launch_finish(l, NULL, NULL);
        free(f);
        return fail_jobs(x, jobs, wait != FOR_NOBODY, status, why);
    }
    if (jobs->num_copies == 0)
        count_runs(x, jobs);
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
    return TRIED_GONE;
}

bool ts_gpu_may_wait_for(ts_gpu_executor *x, const ts_job *job, bool crowd)
{
    if (!ts_gpu_may_wait(x->gpu))
        return false;
    const ts_signals_page *page = job->signals;
    pthread_mutex_lock(&x->lock);
    const uint32_t each = crowd ? WAITING_EACH_CROWD : WAITING_EACH;
    bool may = x->waiting < WAITING_MOST && page->waiting < each &&
               (page->waiting > 0 || x->sessions < WAITING_SESSIONS);
    pthread_mutex_unlock(&x->lock);
    return may;
}

bool ts_gpu_is_waited_for(ts_gpu_executor *x, const ts_job *job)
{
    pthread_mutex_lock(&x->lock);
    const bool is = job->signals != NULL && job->signals->waiting > 0;
    pthread_mutex_unlock(&x->lock);
    return is;
}

/* Appends to `first`, a list of one, the held jobs like it that are ready. */
void ts_gpu_join_jobs(ts_gpu_executor *x, ts_job *first)
{
    ts_job **end = &first->next;
    for (ts_held_queue *q = x->held.first, *next_queue; q != NULL; q = next_queue) {
        next_queue = q->next; /* the job's session may end, but no other's */
        ts_job *before = NULL;
        for (ts_job *job = q->first, *next; job != NULL && ts_gpu_is_ready(job); job = next) {
            next = job->next;
            if (!alike(first, job)) {
                before = job;
                continue;
            }
            ts_held_take(&x->held, before, job);
            if (ts_gpu_prepare_job(x, job) != TRIED_PLANNED)
                continue;
            *end = job;
            end = &job->next;
        }
    }
}

bool ts_gpu_device_is_lost(const ts_gpu_executor *x)
{
    return atomic_load(&x->lost);
}
