#define _GNU_SOURCE
#include "host_executor.h"

#include "clock.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>

#define TURN_NS 2000000ull    /* that a long job has while others wait */
#define COPY_BYTES (4u << 20) /* that are copied between two looks at who waits */
#define STAMPS 4096u          /* of tenants and of sessions; some may share one */

/* One of the jobs that a launch joins. */
typedef struct joined_job {
    ts_job *job; /* NULL: it was told */
    double work;
    uint32_t number; /* in order of arrival */
    uint32_t left;   /* sequences that aren't done, as far as is known */
} joined_job;

struct ts_host_executor {
    ts_attention *attention;
    double long_work; /* multiplications beyond which an attend is long */
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t filled;
    ts_job *head, **tail;    /* under the lock, in order of arrival */
    bool stop;               /* under the lock */
    pthread_mutex_t running; /* held by the thread that uses what follows, and the attention */
    /* of a launch that joins jobs */
    ts_attention_seq *seqs;
    uint32_t *job_of; /* of each sequence: an index into `joined` */
    size_t seqs_capacity;
    joined_job *joined;
    size_t joined_capacity;
    uint64_t turn;                                        /* counts */
    uint64_t tenant_turns[STAMPS], session_turns[STAMPS]; /* the last one of each */
    /* of the long job that is being done; atomic: kernels' threads look */
    atomic_uint session;
    atomic_bool others; /* of other sessions wait */
    atomic_uint_fast64_t turn_ends_ns;
    atomic_uint_fast64_t runs, launches, pauses;
};

static bool alike(const ts_job *a, const ts_job *b)
{
    return b->num_copies == 0 && a->base == b->base && a->heads == b->heads &&
           a->io_dtype == b->io_dtype && ts_attention_same_variant(&a->variant, &b->variant);
}

static ts_attention_call call_of(const ts_job *job)
{
    return (ts_attention_call){
        .geometry = job->geometry,
        .base = job->base,
        .heads = job->heads,
        .io_dtype = job->io_dtype,
        .variant = job->variant,
        .seqs = job->seqs,
        .num_seqs = job->num_seqs,
    };
}

double ts_job_work(const ts_job *job)
{
    ts_attention_call call = call_of(job);
    return ts_attention_work(&call);
}

static bool is_dropped(const ts_job *job)
{
    return __atomic_load_n(&job->dropped, __ATOMIC_RELAXED);
}

static void tell(ts_job *job, ts_status status)
{
    job->status = status;
    if (status != TS_OK)
        snprintf(job->why, sizeof job->why, "%s",
                 status != TS_ECONN ? "no scratch memory for attention"
                 : is_dropped(job)  ? "the run was dropped: its step is aborted, or its worker gone"
                                    : "the daemon is stopping");
    job->done(job);
}

static void tell_run(ts_job *job, ts_status status)
{
    tell(job, status == TS_OK && is_dropped(job) ? TS_ECONN : status);
}

/* A sequence of a launch is done: so may its job be, which later ones are not to hold up. */
static void note_seq_done(void *arg, uint32_t seq)
{
    ts_host_executor *x = arg;
    joined_job *j = &x->joined[x->job_of[seq]];
    if (--j->left > 0)
        return;
    ts_job *job = j->job;
    j->job = NULL;
    tell_run(job, TS_OK);
}

static bool reserve_joined(ts_host_executor *x, size_t jobs, size_t seqs)
{
    if (seqs > x->seqs_capacity) {
        free(x->seqs);
        free(x->job_of);
        x->seqs = malloc(seqs * sizeof *x->seqs);
        x->job_of = malloc(seqs * sizeof *x->job_of);
        x->seqs_capacity = x->seqs == NULL || x->job_of == NULL ? 0 : seqs;
    }
    if (jobs > x->joined_capacity) {
        free(x->joined);
        x->joined = malloc(jobs * sizeof *x->joined);
        x->joined_capacity = x->joined == NULL ? 0 : jobs;
    }
    return seqs <= x->seqs_capacity && jobs <= x->joined_capacity;
}

static int by_work(const void *x, const void *y)
{
    const joined_job *a = x, *b = y;
    if (a->work != b->work)
        return a->work < b->work ? -1 : 1;
    return a->number < b->number ? -1 : 1;
}

/* The call that has all of them, which are `count` jobs (more than one): the shortest come first,
 * and so are told first. False: no memory. */
static bool join(ts_host_executor *x, ts_job *jobs, uint32_t count, ts_attention_call *call)
{
    size_t seqs = 0, at = 0;
    for (const ts_job *job = jobs; job != NULL; job = job->next)
        seqs += job->num_seqs;
    if (!reserve_joined(x, count, seqs))
        return false;
    joined_job *j = x->joined;
    for (ts_job *job = jobs; job != NULL; job = job->next, j++)
        *j = (joined_job){.job = job,
                          .work = ts_job_work(job),
                          .number = (uint32_t)(j - x->joined),
                          .left = job->num_seqs};
    qsort(x->joined, count, sizeof *x->joined, by_work);
    for (uint32_t n = 0; n < count; n++) {
        const ts_job *job = x->joined[n].job;
        memcpy(x->seqs + at, job->seqs, job->num_seqs * sizeof *x->seqs);
        for (uint32_t i = 0; i < job->num_seqs; i++)
            x->job_of[at++] = n;
    }
    call->seqs = x->seqs;
    call->num_seqs = (uint32_t)seqs;
    call->seq_done = note_seq_done;
    call->seq_done_arg = x;
    return true;
}

/* Before it begins: who is told of a run finds it counted. */
static void count_launch(ts_host_executor *x, uint32_t runs)
{
    atomic_fetch_add_explicit(&x->runs, runs, memory_order_relaxed);
    atomic_fetch_add_explicit(&x->launches, 1, memory_order_relaxed);
}

/* Runs jobs that are alike (linked by `next`) as one call, and tells them. */
static void launch(ts_host_executor *x, ts_job *like)
{
    ts_attention_call call = call_of(like);
    uint32_t count = 0;
    for (const ts_job *job = like; job != NULL; job = job->next)
        count++;
    if (count > 1 && join(x, like, count, &call)) {
        count_launch(x, count);
        ts_status status = ts_attention_run(x->attention, &call);
        for (uint32_t i = 0; i < count; i++)
            if (x->joined[i].job != NULL)
                tell_run(x->joined[i].job, status);
        return;
    }
    for (ts_job *job = like, *next; job != NULL; job = next) { /* or there is no memory to join */
        next = job->next;
        call = call_of(job);
        count_launch(x, 1);
        tell_run(job, ts_attention_run(x->attention, &call));
    }
}

bool ts_host_executor_try_run(ts_host_executor *x, ts_job *jobs)
{
    if (pthread_mutex_trylock(&x->running) != 0)
        return false;
    while (jobs != NULL) {
        ts_job *like = jobs, **like_tail = &like->next, *rest = NULL, **rest_tail = &rest;
        for (ts_job *job = like->next, *next; job != NULL; job = next) {
            next = job->next;
            ts_job ***tail = alike(like, job) ? &like_tail : &rest_tail;
            **tail = job;
            *tail = &job->next;
        }
        *like_tail = *rest_tail = NULL;
        launch(x, like);
        jobs = rest;
    }
    pthread_mutex_unlock(&x->running);
    return true;
}

/* ---- long jobs ---- */

/* Whether the long job that is being done makes way. Kernels' threads ask. */
static bool makes_way(void *arg)
{
    ts_host_executor *x = arg;
    return atomic_load_explicit(&x->others, memory_order_relaxed) &&
           ts_now_ns() >= atomic_load_explicit(&x->turn_ends_ns, memory_order_relaxed);
}

/* Goes on with an attend. False: it made way. */
static bool attend_on(ts_host_executor *x, ts_job *job, ts_status *status)
{
    ts_attention_call call = call_of(job);
    bool done = true;
    if (job->task == NULL) {
        atomic_fetch_add_explicit(&x->launches, 1, memory_order_relaxed);
        job->task = ts_attention_task_new(x->attention, &call);
    }
    *status = job->task == NULL ? TS_ENOMEM : ts_attention_task_run(job->task, makes_way, x, &done);
    if (*status == TS_OK && is_dropped(job))
        *status = TS_ECONN;
    if (*status == TS_OK && !done)
        return false;
    ts_attention_task_free(job->task);
    job->task = NULL;
    atomic_fetch_add_explicit(&x->runs, 1, memory_order_relaxed);
    return true;
}

/* Goes on with copies. Each is needed before its step's first run, which comes later. */
static bool copy_on(ts_host_executor *x, ts_job *job, ts_status *status)
{
    size_t bytes = ts_geometry_block_bytes(&job->geometry);
    uint32_t most = bytes >= COPY_BYTES ? 1 : (uint32_t)(COPY_BYTES / bytes);
    while (job->copied < job->num_copies && !is_dropped(job)) {
        uint32_t left = job->num_copies - job->copied, count = left < most ? left : most;
        ts_attention_copy_blocks(x->attention, job->base, bytes, job->copies + job->copied, count);
        job->copied += count;
        if (job->copied < job->num_copies && makes_way(x))
            return false;
    }
    *status = is_dropped(job) ? TS_ECONN : TS_OK;
    return true;
}

/* ---- turns ---- */

/* Takes the job at *at out of those that wait. */
static ts_job *take(ts_host_executor *x, ts_job **at)
{
    ts_job *job = *at;
    /* NOLINTNEXTLINE(clang-analyzer-core.NullDereference): a job is at *at */
    *at = job->next;
    if (job->next == NULL)
        x->tail = at;
    job->next = NULL;
    return job;
}

/* Whether it is a's turn before b's, which came earlier. */
static bool comes_before(const ts_host_executor *x, const ts_job *a, const ts_job *b)
{
    uint64_t a_tenant = x->tenant_turns[a->tenant % STAMPS];
    uint64_t b_tenant = x->tenant_turns[b->tenant % STAMPS];
    if (a_tenant != b_tenant)
        return a_tenant < b_tenant;
    return x->session_turns[a->session % STAMPS] < x->session_turns[b->session % STAMPS];
}

/* The place of the job whose turn it is; one that was dropped comes first. */
static ts_job **next_at(ts_host_executor *x)
{
    ts_job **best = &x->head;
    for (ts_job **at = &x->head; *at != NULL; at = &(*at)->next) {
        if (is_dropped(*at))
            return at;
        if (comes_before(x, *at, *best))
            best = at;
    }
    return best;
}

/* Takes those that wait and can be done in one call with `first`, as far as that isn't long. */
static void take_alike(ts_host_executor *x, ts_job *first)
{
    ts_job **like_tail = &first->next;
    double work = ts_job_work(first);
    for (ts_job **at = &x->head; *at != NULL;) {
        double more = alike(first, *at) ? ts_job_work(*at) : x->long_work;
        if (work + more > x->long_work || (*at)->task != NULL) {
            at = &(*at)->next;
            continue;
        }
        ts_job *job = take(x, at);
        work += more;
        *like_tail = job;
        like_tail = &job->next;
        x->tenant_turns[job->tenant % STAMPS] = x->turn;
        x->session_turns[job->session % STAMPS] = x->turn;
    }
}

static bool others_wait(const ts_host_executor *x, uint32_t session)
{
    const ts_job *job = x->head;
    while (job != NULL && job->session == session)
        job = job->next;
    return job != NULL;
}

/* Has one turn: the next job, or those alike. With both locks, which it gives back in between. */
static void have_turn(ts_host_executor *x)
{
    ts_job *job = take(x, next_at(x));
    bool dropped = is_dropped(job);
    bool is_long =
        !dropped && (job->num_copies > 0 || job->task != NULL || ts_job_work(job) > x->long_work);
    x->turn++;
    x->tenant_turns[job->tenant % STAMPS] = x->turn;
    x->session_turns[job->session % STAMPS] = x->turn;
    if (!dropped && !is_long)
        take_alike(x, job);
    atomic_store(&x->session, job->session);
    atomic_store(&x->others, others_wait(x, job->session));
    atomic_store(&x->turn_ends_ns, ts_now_ns() + TURN_NS);
    pthread_mutex_unlock(&x->lock);
    ts_status status = TS_ECONN;
    if (!dropped && !is_long) {
        launch(x, job);
    } else if (!dropped && !(job->num_copies > 0 ? copy_on : attend_on)(x, job, &status)) {
        atomic_fetch_add_explicit(&x->pauses, 1, memory_order_relaxed);
        pthread_mutex_lock(&x->lock); /* it goes on when it has its turn again */
        job->next = x->head;
        if (x->head == NULL)
            x->tail = &job->next;
        x->head = job;
        return;
    } else {
        ts_attention_task_free(job->task);
        job->task = NULL;
        tell(job, status);
    }
    pthread_mutex_lock(&x->lock);
}

static void *executor_main(void *arg)
{
    prctl(PR_SET_NAME, "kernels");
    ts_host_executor *x = arg;
    pthread_mutex_lock(&x->lock);
    for (;;) {
        while (x->head == NULL && !x->stop)
            pthread_cond_wait(&x->filled, &x->lock);
        if (x->head == NULL)
            break;
        /* In this order: whoever holds `running` may call `done`, and that may submit. */
        pthread_mutex_unlock(&x->lock);
        pthread_mutex_lock(&x->running);
        pthread_mutex_lock(&x->lock);
        have_turn(x);
        pthread_mutex_unlock(&x->running);
    }
    pthread_mutex_unlock(&x->lock);
    return NULL;
}

ts_host_executor *ts_host_executor_new(ts_attention *attention)
{
    ts_host_executor *x = calloc(1, sizeof *x);
    if (x == NULL)
        return NULL;
    x->attention = attention;
    x->long_work = (double)TS_ITEM_WORK * ts_attention_threads(attention);
    x->tail = &x->head;
    pthread_mutex_init(&x->lock, NULL);
    pthread_mutex_init(&x->running, NULL);
    pthread_cond_init(&x->filled, NULL);
    if (pthread_create(&x->thread, NULL, executor_main, x) != 0) {
        free(x);
        return NULL;
    }
    return x;
}

void ts_host_executor_free(ts_host_executor *x)
{
    if (x == NULL)
        return;
    pthread_mutex_lock(&x->lock);
    x->stop = true;
    pthread_cond_signal(&x->filled);
    pthread_mutex_unlock(&x->lock);
    pthread_join(x->thread, NULL);
    pthread_cond_destroy(&x->filled);
    pthread_mutex_destroy(&x->lock);
    pthread_mutex_destroy(&x->running);
    free(x->seqs);
    free(x->job_of);
    free(x->joined);
    free(x);
}

void ts_host_executor_submit(ts_host_executor *x, ts_job *job)
{
    job->next = NULL;
    pthread_mutex_lock(&x->lock);
    *x->tail = job;
    x->tail = &job->next;
    if (job->session != atomic_load_explicit(&x->session, memory_order_relaxed))
        atomic_store_explicit(&x->others, true, memory_order_relaxed);
    pthread_cond_signal(&x->filled);
    pthread_mutex_unlock(&x->lock);
}

void ts_host_executor_counts(const ts_host_executor *x, uint64_t *runs, uint64_t *launches)
{
    *runs = atomic_load_explicit(&x->runs, memory_order_relaxed);
    *launches = atomic_load_explicit(&x->launches, memory_order_relaxed);
}

uint64_t ts_host_executor_pauses(const ts_host_executor *x)
{
    return atomic_load_explicit(&x->pauses, memory_order_relaxed);
}
