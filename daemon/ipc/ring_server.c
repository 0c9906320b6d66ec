#define _GNU_SOURCE
#include "ring_server.h"

#include "clock.h"
#include "thread_first.h"
#include "tinyserve_version.h"

#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#define RINGS_MAX 3u /* of a connection: replaced ones live until their runs are done */
/* Multiplications up to which calls are made on the rings' thread. */
#define INLINE_WORK ((double)TS_ITEM_WORK)
#define EPOLL_BATCH 64 /* of one epoll_wait */
/* For so long the engine's owner may have a ring's entries to take before the thread gives way. */
#define OWNER_NS 50000u

/* Wakes the thread by its own eventfd. */
static void wake(ts_rings *rings)
{
    uint64_t one = 1;
    while (write(rings->wake, &one, sizeof one) < 0 && errno == EINTR)
        ;
}

/*
 * The doorbell itself is neither written nor read here: a client can make that wait for ever, since
 * it can fill or empty it, and make it block. Modifying the interest in it reports it anew, for it
 * can always be read or written.
 */
void ts_ring_look(ts_ring *r)
{
    struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | EPOLLET, .data.ptr = r};
    (void)epoll_ctl(r->rings->epoll, EPOLL_CTL_MOD, r->doorbell, &event); /* ENOENT: let go */
}

/* ---- a ring's life ---- */

static void free_ring(ts_ring *r)
{
    r->rings->num_blocked -= atomic_load(&r->blocked);
    *r->at = r->next;
    if (r->next != NULL)
        r->next->at = r->at;
    munmap(r->shared, r->bytes);
    close(r->doorbell);
    free(r);
}

/* One that the thread knew when it ended stays until all are freed: it may be detached already.
 */
static void free_if_unused(ts_ring *r)
{
    if (r->users == 0 && !r->polled)
        free_ring(r);
}

/* The `detached` of a ring. */
static void detach(ts_work *work, void *service)
{
    (void)service;
    ts_ring *r = (ts_ring *)((char *)work - offsetof(ts_ring, detached));
    r->polled = false;
    free_if_unused(r);
}

ts_ring *ts_ring_use(ts_ring *r)
{
    if (r != NULL)
        r->users++;
    return r;
}

void ts_ring_release(ts_ring *r)
{
    if (r == NULL)
        return;
    r->users--;
    free_if_unused(r);
}

void ts_ring_end(ts_ring *r)
{
    atomic_store(&r->closed, true);
    uint32_t none = TS_RINGS_GO_ON; /* a reason that was given already stays */
    __atomic_compare_exchange_n(&r->shared->ended, &none, TS_RINGS_ENDED, false, __ATOMIC_RELEASE,
                                __ATOMIC_RELAXED);
    syscall(SYS_futex, &r->shared->completions.tail, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
    ts_ring_look(r);
}

static void close_ring(ts_close_hook *hook)
{
    ts_ring *r = (ts_ring *)((char *)hook - offsetof(ts_ring, hook));
    ts_ring_end(r);
    ts_ring_release(r);
}

/* The ring takes the place of the connection's, if there is one. */
static void replace_ring(ts_connection *c, ts_ring *r)
{
    if (c->ring != NULL) {
        ts_service *s = r->rings->service;
        if (c->parked == &c->ring->wait)
            (void)ts_service_go_on(s, c, true);
        atomic_store(&c->ring->closed, true);
        if (c->parked == &c->ring->wait) /* what followed waits too: it isn't taken any more */
            (void)ts_service_go_on(s, c, true);
        ts_close_hook **at = &c->on_end;
        while (*at != &c->ring->hook)
            at = &(*at)->next;
        *at = c->ring->hook.next;
        close_ring(&c->ring->hook);
    }
    r->hook = (ts_close_hook){.next = c->on_end, .close = close_ring};
    c->on_end = &r->hook;
    c->ring = r;
}

/* Checks what the client has written, and fills in what the daemon has to say. */
static ts_status adopt(ts_ring *r, char *why, size_t why_bytes)
{
    ts_rings_memory *m = r->shared;
    uint32_t magic = m->magic, version = m->version;
    r->max_blocks = __atomic_load_n(&m->max_blocks, __ATOMIC_RELAXED);
    r->max_slabs = __atomic_load_n(&m->max_slabs, __ATOMIC_RELAXED);
    r->max_ids = __atomic_load_n(&m->max_ids, __ATOMIC_RELAXED);
    if (magic != TS_RING_MAGIC || version != TS_PROTOCOL) {
        snprintf(why, why_bytes,
                 "rings of version %u, and magic %x; those of tinyserved " TS_VERSION
                 " are of version %u, and magic %x",
                 version, magic, TS_PROTOCOL, TS_RING_MAGIC);
        return TS_EPROTO;
    }
    if (r->max_blocks > TS_RING_BLOCKS || r->max_slabs > TS_RING_SLABS ||
        r->max_ids > TS_RING_IDS ||
        r->bytes != ts_rings_bytes(r->max_blocks, r->max_slabs, r->max_ids)) {
        snprintf(
            why, why_bytes,
            "rings with room for %u blocks, %u slabs and %u token ids in %zu bytes; the limits "
            "are %u, %u and %u, and there must be room for them",
            r->max_blocks, r->max_slabs, r->max_ids, r->bytes, TS_RING_BLOCKS, TS_RING_SLABS,
            TS_RING_IDS);
        return TS_EINVAL;
    }
    r->slabs = ts_rings_slabs(m);
    r->blocks = ts_rings_blocks(m, r->max_slabs);
    if (r->rings->service->exec.attention != NULL)
        m->isa = (uint32_t)ts_attention_isa(r->rings->service->exec.attention);
    m->posts = 1;
    m->submissions.sleeps = 1;
    return TS_OK;
}

/* Maps the memory. */
static ts_status map(ts_ring *r, ts_filling *filling, char *why, size_t why_bytes)
{
    void *base;
    uint64_t bytes;
    ts_status status =
        ts_filling_take(filling, "the rings' memory", &base, &bytes, NULL, why, why_bytes);
    if (status == TS_OK) {
        r->shared = base;
        r->bytes = bytes;
    }
    return status;
}

static ts_status open_doorbell(ts_ring *r, char *why, size_t why_bytes)
{
    struct epoll_event event = {.events = EPOLLIN | EPOLLET, .data.ptr = r};
    r->doorbell = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (r->doorbell >= 0 && epoll_ctl(r->rings->epoll, EPOLL_CTL_ADD, r->doorbell, &event) == 0)
        return TS_OK;
    snprintf(why, why_bytes, "no doorbell for a ring: %s", strerror(errno));
    return TS_ENOMEM;
}

/* The connection's rings, those that were replaced and whose jobs aren't done among them. */
static uint32_t count_rings(const ts_rings *rings, uint32_t pipe)
{
    uint32_t count = 0;
    for (const ts_ring *r = rings->all; r != NULL; r = r->next)
        count += r->pipe == pipe;
    return count;
}

ts_status ts_ring_new(ts_rings *rings, ts_connection *c, char *why, size_t why_bytes)
{
    if (count_rings(rings, c->pipe) >= RINGS_MAX) {
        snprintf(why, why_bytes,
                 "this connection has %u rings, as many as it may have: those that were replaced "
                 "end when their runs do",
                 RINGS_MAX);
        return TS_EBUSY;
    }
    ts_ring *r = calloc(1, sizeof *r);
    if (r == NULL) {
        snprintf(why, why_bytes, "no memory for a ring");
        return TS_ENOMEM;
    }
    r->work.run = ts_ring_take;
    r->detached.run = detach;
    r->rings = rings;
    r->pipe = c->pipe;
    r->users = 1;
    r->asleep = true;
    r->doorbell = -1;
    ts_status status = map(r, &c->memory.new_rings, why, why_bytes);
    if (status == TS_OK)
        status = adopt(r, why, why_bytes);
    if (status == TS_OK)
        status = open_doorbell(r, why, why_bytes);
    if (status != TS_OK) {
        if (r->doorbell >= 0)
            close(r->doorbell);
        if (r->shared != NULL)
            munmap(r->shared, r->bytes);
        free(r);
        return status;
    }
    r->polled = true;
    r->next = rings->all;
    r->at = &rings->all;
    if (r->next != NULL)
        r->next->at = &r->next;
    rings->all = r;
    replace_ring(c, r);
    return TS_OK;
}

/* Takes again from the rings whose next entry waited for runs. */
static void resume(void *arg)
{
    ts_rings *rings = arg;
    for (ts_ring *r = rings->num_blocked > 0 ? rings->all : NULL; r != NULL; r = r->next)
        if (atomic_load(&r->blocked) && !r->parked) {
            atomic_store(&r->blocked, false);
            rings->num_blocked--;
            ts_ring_look(r);
        }
}

void ts_rings_submit(ts_rings *rings, ts_job *job)
{
    job->next = NULL;
    pthread_mutex_lock(&rings->lock);
    bool here = job->num_copies == 0 && !atomic_load(&rings->ended);
    if (here) {
        *rings->jobs_tail = job;
        rings->jobs_tail = &job->next;
        atomic_fetch_add(&rings->num_jobs, 1);
    }
    pthread_mutex_unlock(&rings->lock);
    if (!here)
        ts_host_executor_submit(rings->service->exec.host, job);
    else if (atomic_load(&rings->sleeps))
        wake(rings);
}

/* ---- the thread ---- */

/* Whether there is something to take that can be taken. */
static bool has_entries(const ts_ring *r)
{
    uint32_t taken = atomic_load(&r->taken);
    if (atomic_load(&r->blocked) ||
        __atomic_load_n(&r->shared->submissions.tail, __ATOMIC_SEQ_CST) == taken)
        return false;
    return taken - __atomic_load_n(&r->shared->completions.head, __ATOMIC_SEQ_CST) !=
           TS_RING_ENTRIES;
}

static void activate(ts_rings *rings, ts_ring *r, uint64_t now)
{
    r->used_ns = now;
    if (!r->asleep)
        return;
    if (rings->num_active == rings->active_capacity) {
        uint32_t capacity = rings->active_capacity * 2 + 16;
        ts_ring **grown = realloc(rings->active, capacity * sizeof *grown);
        if (grown == NULL)
            return ts_ring_look(r); /* tried again at once */
        rings->active = grown;
        rings->active_capacity = capacity;
    }
    r->asleep = false;
    __atomic_store_n(&r->shared->submissions.sleeps, 0, __ATOMIC_SEQ_CST);
    rings->active[rings->num_active++] = r;
}

/* Looks at one ring that is polled. False: it is polled no more. */
static bool poll_ring(ts_rings *rings, ts_ring *r, uint64_t now)
{
    if (atomic_load(&r->closed)) {
        (void)epoll_ctl(rings->epoll, EPOLL_CTL_DEL, r->doorbell, NULL);
        ts_queue_run(&rings->service->exec.queue, &r->detached, rings->service);
        return false;
    }
    if (has_entries(r)) {
        r->used_ns = now;
        if (!atomic_exchange(&r->queued, true))
            ts_queue_run(&rings->service->exec.queue, &r->work, rings->service);
        else
            rings->waits_for_owner = true;
        return true;
    }
    if (now - r->used_ns < rings->spin_ns)
        return true;
    r->asleep = true;
    __atomic_store_n(&r->shared->submissions.sleeps, 1, __ATOMIC_SEQ_CST);
    if (!has_entries(r))
        return false;
    __atomic_store_n(&r->shared->submissions.sleeps, 0, __ATOMIC_SEQ_CST);
    r->asleep = false;
    return true;
}

static double work_of(const ts_job *jobs)
{
    double work = 0;
    for (const ts_job *job = jobs; job != NULL; job = job->next)
        work += ts_job_work(job);
    return work;
}

static ts_job *take_jobs(ts_rings *rings)
{
    pthread_mutex_lock(&rings->lock);
    ts_job *jobs = rings->jobs;
    rings->jobs = NULL;
    rings->jobs_tail = &rings->jobs;
    ts_ring_joins_taken(&rings->joins, atomic_exchange(&rings->num_jobs, 0));
    pthread_mutex_unlock(&rings->lock);
    return jobs;
}

static void hand_on(ts_rings *rings, ts_job *jobs)
{
    for (ts_job *job = jobs, *next; job != NULL; job = next) {
        next = job->next;
        ts_host_executor_submit(rings->service->exec.host, job);
    }
}

/* Runs, or hands on, the attends that have come together, unless they wait for more. */
static void run_jobs(ts_rings *rings, uint64_t now)
{
    const uint32_t count = atomic_load(&rings->num_jobs);
    if (count == 0 || ts_ring_joins_wait(&rings->joins, count, now))
        return;
    ts_job *jobs = take_jobs(rings);
    if (work_of(jobs) > INLINE_WORK || !ts_host_executor_try_run(rings->service->exec.host, jobs))
        hand_on(rings, jobs);
}

static void await_doorbells(ts_rings *rings, bool sleep)
{
    struct epoll_event events[EPOLL_BATCH];
    int n = epoll_wait(rings->epoll, events, EPOLL_BATCH, sleep ? -1 : 0);
    uint64_t now = ts_now_ns(), rung;
    for (int i = 0; i < n; i++) {
        if (events[i].data.ptr != NULL)
            activate(rings, events[i].data.ptr, now);
        else
            while (read(rings->wake, &rung, sizeof rung) < 0 && errno == EINTR)
                ;
    }
}

static void *rings_main(void *arg)
{
    prctl(PR_SET_NAME, "rings");
    ts_rings *rings = arg;
    uint64_t waits_since = 0; /* for the owner: when it didn't last */
    for (uint32_t turn = 0; !atomic_load(&rings->stop); turn++) {
        if (atomic_load_explicit(&rings->goes_first, memory_order_relaxed) &&
            atomic_exchange(&rings->goes_first, false))
            ts_thread_first();
        uint64_t now = ts_now_ns();
        uint32_t kept = 0;
        rings->waits_for_owner = false;
        for (uint32_t i = 0; i < rings->num_active; i++)
            if (poll_ring(rings, rings->active[i], now))
                rings->active[kept++] = rings->active[i];
        rings->num_active = kept;
        run_jobs(rings, now);
        if (kept > 0 || atomic_load(&rings->num_jobs) > 0) {
            if (turn % 64 == 0) /* those that sleep want to be seen too */
                await_doorbells(rings, false);
            if (!rings->waits_for_owner)
                waits_since = now;
            if (now - waits_since > OWNER_NS)
                (void)sched_yield(); /* it may be this processor that the owner wants */
            else
                ts_pause();
            continue;
        }
        atomic_store(&rings->sleeps, true);
        pthread_mutex_lock(&rings->lock);
        bool idle = atomic_load(&rings->num_jobs) == 0 && !atomic_load(&rings->stop);
        pthread_mutex_unlock(&rings->lock);
        if (idle)
            await_doorbells(rings, true);
        atomic_store(&rings->sleeps, false);
    }
    return NULL;
}

ts_rings *ts_rings_new(ts_service *service, uint32_t spin_us, uint32_t join_us)
{
    ts_rings *rings = calloc(1, sizeof *rings);
    if (rings == NULL)
        return NULL;
    rings->service = service;
    rings->spin_ns = spin_us * 1000ull;
    rings->joins.join_ns = join_us * 1000ull;
    rings->jobs_tail = &rings->jobs;
    pthread_mutex_init(&rings->lock, NULL);
    rings->seqs = malloc(TS_RING_BATCH * sizeof *rings->seqs);
    rings->words = malloc(TS_RING_BATCH * sizeof *rings->words);
    rings->firsts = malloc(TS_RING_BATCH * sizeof *rings->firsts);
    rings->tables = malloc(TS_RING_BLOCKS * sizeof *rings->tables);
    rings->ids = malloc(TS_RING_IDS * sizeof *rings->ids);
    rings->epoll = epoll_create1(EPOLL_CLOEXEC);
    rings->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    rings->ended = true;
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = NULL};
    if (rings->seqs == NULL || rings->words == NULL || rings->firsts == NULL ||
        rings->tables == NULL || rings->ids == NULL || rings->epoll < 0 || rings->wake < 0 ||
        epoll_ctl(rings->epoll, EPOLL_CTL_ADD, rings->wake, &event) != 0 ||
        pthread_create(&rings->thread, NULL, rings_main, rings) != 0) {
        ts_rings_free(rings);
        return NULL;
    }
    rings->ended = false;
    service->rings = rings;
    service->resume_rings = resume;
    service->take_ring = ts_ring_take_all;
    return rings;
}

void ts_rings_go_first(ts_rings *rings)
{
    atomic_store(&rings->goes_first, true);
}

void ts_rings_stop(ts_rings *rings)
{
    if (rings == NULL)
        return;
    atomic_store(&rings->stop, true);
    wake(rings);
    pthread_join(rings->thread, NULL);
    pthread_mutex_lock(&rings->lock);
    atomic_store(&rings->ended, true); /* what is submitted from now on goes to the executor */
    pthread_mutex_unlock(&rings->lock);
    hand_on(rings, take_jobs(rings));
}

void ts_rings_device_failed(ts_rings *rings)
{
    for (ts_ring *r = rings == NULL ? NULL : rings->all; r != NULL; r = r->next)
        __atomic_store_n(&r->shared->ended, TS_RINGS_DEVICE_FAILED, __ATOMIC_RELEASE);
}

void ts_rings_free(ts_rings *rings)
{
    if (rings == NULL)
        return;
    while (rings->all != NULL)
        /* NOLINTNEXTLINE(clang-analyzer-unix.Malloc): free_ring takes it off the list */
        free_ring(rings->all);
    if (rings->epoll >= 0)
        close(rings->epoll);
    if (rings->wake >= 0)
        close(rings->wake);
    pthread_mutex_destroy(&rings->lock);
    free(rings->active);
    free(rings->seqs);
    free(rings->words);
    free(rings->firsts);
    free(rings->tables);
    free(rings->ids);
    free(rings);
}
