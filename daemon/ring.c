#define _GNU_SOURCE
#include "ring.h"

#include "codec.h"
#include "jobs.h"
#include "log.h"

#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define ROUND 8u        /* entries that a ring gives in one turn */
#define HERE_WORK (1e8) /* multiplications up to which a call is made on the rings' thread */
#define EVENTS 64       /* of one epoll_wait */
#define MASK (TS_RING_ENTRIES - 1)

struct ts_rings {
    ts_service *service;
    uint64_t spin_ns;
    pthread_t thread;
    int epoll, wake;
    ts_ring *all; /* the engine's owner's */
    uint32_t num_blocked;
    atomic_bool ended; /* no thread any more; set under the lock */
    uint64_t *seqs;    /* copies of what a begin or a commit brings; the engine's owner's */
    uint32_t *words;   /* ... */
    uint32_t *tables;  /* what a begin is answered; the same owner's */
    pthread_mutex_t lock;
    ts_job *jobs, **jobs_tail; /* under the lock */
    atomic_bool stop, sleeps;
    ts_ring **active; /* rings that are polled; the thread's own */
    uint32_t num_active, active_capacity;
};

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void pause_briefly(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void ring_bell(int fd)
{
    uint64_t one = 1;
    while (write(fd, &one, sizeof one) < 0 && errno == EINTR)
        ;
}

/* ---- a ring's life ---- */

static void free_ring(ts_ring *r)
{
    r->rings->num_blocked -= atomic_load(&r->blocked);
    *r->at = r->next;
    if (r->next != NULL)
        r->next->at = r->at;
    munmap(r->shared, sizeof *r->shared);
    close(r->fd);
    close(r->doorbell);
    free(r);
}

static void free_if_unused(ts_ring *r)
{
    if (r->users == 0 && (!r->polled || r->rings->ended))
        free_ring(r);
}

/* The `bye` of a ring. */
static void let_go(ts_work *work, void *service)
{
    (void)service;
    ts_ring *r = (ts_ring *)((char *)work - offsetof(ts_ring, bye));
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

/* The thread sees it and lets the ring go. */
static void close_ring(ts_ring *r)
{
    atomic_store(&r->closed, true);
    ring_bell(r->doorbell);
}

void ts_ring_close(ts_ring *r)
{
    if (r == NULL)
        return;
    close_ring(r);
    ts_ring_release(r);
}

static void take(ts_work *work, void *service);

ts_status ts_ring_new(ts_rings *rings, uint32_t pipe, ts_ring **out, char *why, size_t why_bytes)
{
    ts_ring *r = calloc(1, sizeof *r);
    void *shared;
    ts_status status = TS_ENOMEM;
    *out = NULL;
    if (r == NULL)
        snprintf(why, why_bytes, "no memory for a ring");
    else
        status = ts_memory_shared_new("tinyserve-rings", sizeof *r->shared, &r->fd, &shared, why,
                                      why_bytes);
    if (status != TS_OK) {
        free(r);
        return status;
    }
    r->shared = shared;
    r->shared->magic = TS_RING_MAGIC;
    r->shared->version = TS_RING_VERSION;
    if (rings->service->attention != NULL)
        r->shared->isa = (uint32_t)ts_attention_isa(rings->service->attention);
    r->shared->submissions.sleeps = 1;
    r->work.run = take;
    r->bye.run = let_go;
    r->rings = rings;
    r->pipe = pipe;
    r->users = 1;
    r->asleep = true;
    r->doorbell = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = r};
    if (r->doorbell < 0 || epoll_ctl(rings->epoll, EPOLL_CTL_ADD, r->doorbell, &event) != 0) {
        snprintf(why, why_bytes, "no doorbell for a ring: %s", strerror(errno));
        if (r->doorbell >= 0)
            close(r->doorbell);
        munmap(r->shared, sizeof *r->shared);
        close(r->fd);
        free(r);
        return TS_ENOMEM;
    }
    r->polled = true;
    r->next = rings->all;
    r->at = &rings->all;
    if (r->next != NULL)
        r->next->at = &r->next;
    rings->all = r;
    *out = r;
    return TS_OK;
}

/* ---- taking and completing ---- */

static void complete(ts_ring *r, const ts_ring_completion *c)
{
    r->shared->completed[r->posted & MASK] = *c;
    r->posted++;
    __atomic_store_n(&r->shared->completions.tail, r->posted, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&r->shared->completions.sleeps, __ATOMIC_SEQ_CST) != 0)
        syscall(SYS_futex, &r->shared->completions.tail, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}

void ts_ring_complete(ts_ring *r, uint32_t tag, ts_status status, const char *message)
{
    ts_ring_completion c = {.tag = tag};
    if (r->begun.step != 0 && r->begun.tag == tag && status == TS_OK)
        c = r->begun;
    r->begun.step = 0;
    c.status = (uint32_t)status;
    if (status != TS_OK)
        snprintf(c.message, sizeof c.message, "%s", message);
    complete(r, &c);
}

/* What the client has written that can't be ends its rings; its session goes on with messages. */
static void refuse_ring(ts_ring *r, const char *what, uint32_t value)
{
    ts_log(TS_LOG_WARNING, "the rings of connection %u are closed: %s is %u", r->pipe, what, value);
    close_ring(r);
}

/* Copies the arrays of a begin or a commit, so that they stay as they are checked. */
static void copy_batch(ts_ring *r, uint32_t count, bool seqs)
{
    if (seqs)
        memcpy(r->rings->seqs, r->shared->batch_seqs, count * sizeof *r->rings->seqs);
    memcpy(r->rings->words, r->shared->batch_words, count * sizeof *r->rings->words);
}

static bool decode_begin(ts_ring *r, ts_connection *c, const ts_ring_entry *entry,
                         ts_command *command, ts_answer *a)
{
    const ts_service *s = r->rings->service;
    const ts_session *session = ts_engine_session(s->engine, c->session);
    char kernel[sizeof entry->begin.kernel + 1] = "";
    uint64_t blocks = 0;
    uint32_t count = entry->begin.count, pool = entry->begin.pool;
    command->op = TS_OP_STEP_BEGIN;
    command->pool = pool;
    memcpy(kernel, entry->begin.kernel, sizeof entry->begin.kernel);
    if (!ts_decode_kernel(kernel, &command->step_begin.kernel, a))
        return false;
    if (count > TS_RING_BATCH) {
        ts_refuse(a, TS_EINVAL, "a begin of %u sequences on a ring; it takes %u", count,
                  TS_RING_BATCH);
        return false;
    }
    if (pool < s->engine->num_pools && s->engine->pools[pool].books.num_slabs > TS_RING_SLABS) {
        ts_refuse(a, TS_EINVAL, "a begin on a ring in a pool of %u slabs; it can tell of %u",
                  s->engine->pools[pool].books.num_slabs, TS_RING_SLABS);
        return false;
    }
    if (session == NULL || pool >= s->engine->num_pools || !(session->opened_pools >> pool & 1))
        return true; /* the engine refuses it */
    copy_batch(r, count, true);
    for (uint32_t i = 0; i < count; i++)
        blocks +=
            ts_ring_blocks(r->rings->words[i], s->engine->pools[pool].config.geometry.block_tokens);
    if (blocks > TS_RING_BLOCKS) {
        ts_refuse(a, TS_EINVAL, "a begin that touches up to %llu blocks on a ring; it takes %u",
                  (unsigned long long)blocks, TS_RING_BLOCKS);
        return false;
    }
    command->step_begin.seqs = r->rings->seqs;
    command->step_begin.new_tokens = r->rings->words;
    command->step_begin.count = count;
    command->step_begin.heads = entry->begin.heads;
    command->step_begin.io_dtype = entry->begin.io_dtype;
    command->step_begin.scale = entry->begin.scale;
    return true;
}

static void decode_run(const ts_ring_entry *entry, ts_command *command)
{
    uint32_t flags = entry->run.flags;
    command->op = TS_OP_STEP_RUN;
    command->step_run.step = entry->step;
    command->step_run.layer = entry->run.layer;
    command->step_run.q = entry->run.q;
    command->step_run.k = entry->run.k;
    command->step_run.v = entry->run.v;
    command->step_run.out = entry->run.out;
    command->step_run.sinks = entry->run.sinks;
    command->step_run.alibi = entry->run.alibi;
    command->step_run.lse = entry->run.lse;
    command->step_run.has_sinks = flags & TS_RING_SINKS;
    command->step_run.has_alibi = flags & TS_RING_ALIBI;
    command->step_run.has_lse = flags & TS_RING_LSE;
    command->step_run.variant = (ts_attention_variant){
        .scale = entry->run.scale,
        .soft_cap = entry->run.soft_cap,
        .window = entry->run.window,
        .rope = {entry->run.rope_theta, entry->run.rope_dims, flags & TS_RING_INTERLEAVED}};
    command->step_run.ordered = flags & TS_RING_ORDERED;
    command->step_run.order = entry->run.order;
}

static bool decode(ts_ring *r, ts_connection *c, const ts_ring_entry *entry, ts_command *command,
                   ts_answer *a)
{
    *command = (ts_command){.session = c->session};
    switch (entry->op) {
    case TS_RING_BEGIN:
        return decode_begin(r, c, entry, command, a);
    case TS_RING_RUN:
        decode_run(entry, command);
        return true;
    case TS_RING_COMMIT:
        command->op = TS_OP_STEP_COMMIT;
        command->step_end.step = entry->step;
        if (entry->commit.count > TS_RING_BATCH) {
            ts_refuse(a, TS_EINVAL, "%u accepted counts on a ring; it takes %u",
                      entry->commit.count, TS_RING_BATCH);
            return false;
        }
        copy_batch(r, entry->commit.count, false);
        command->step_end.accepted = entry->commit.count > 0 ? r->rings->words : NULL;
        command->step_end.count = entry->commit.count;
        return true;
    case TS_RING_ABORT:
        command->op = TS_OP_STEP_ABORT;
        command->step_end.step = entry->step;
        return true;
    default:
        ts_refuse(a, TS_EPROTO, "a ring has no operation %u", entry->op);
        return false;
    }
}

/* Copies the step's whole block tables to rings->tables and their lengths to rings->words. Returns
 * the blocks; if they are too many, not all of them were copied. */
static uint64_t copy_tables(ts_rings *rings, const ts_step *step, uint32_t block_tokens)
{
    uint64_t all = 0;
    for (uint32_t i = 0; i < step->num_seqs; i++) {
        const ts_step_seq *part = &step->seqs[i];
        uint32_t n = ts_blocks_for((uint64_t)part->start + part->new_tokens, block_tokens);
        if (all + n <= TS_RING_BLOCKS)
            memcpy(rings->tables + all, part->table, n * sizeof *rings->tables);
        rings->words[i] = n;
        all += n;
    }
    return all;
}

/* Lays out what a begin has to tell. False, and the answer refuses: it can't. */
static bool tell_begun(ts_ring *r, const ts_ring_entry *entry, ts_answer *a,
                       ts_ring_completion *done)
{
    ts_service *s = r->rings->service;
    const ts_step *step = a->begun.step;
    const uint32_t *blocks = a->begun.blocks, *counts = a->begun.counts;
    uint64_t num_blocks = a->begun.num_blocks;
    Tspb__Slab **slabs;
    size_t num_slabs;
    if (entry->begin.flags & TS_RING_TABLES) {
        num_blocks =
            copy_tables(r->rings, step, s->engine->pools[step->pool].config.geometry.block_tokens);
        blocks = r->rings->tables;
        counts = r->rings->words;
    }
    if (num_blocks > TS_RING_BLOCKS) {
        ts_refuse(a, TS_EINVAL, "block tables of %llu entries; a ring can tell of %u",
                  (unsigned long long)num_blocks, TS_RING_BLOCKS);
        return false;
    }
    if (!ts_service_list_slabs(s, step->pool, blocks, num_blocks, &slabs, &num_slabs)) {
        ts_refuse(a, TS_ENOMEM, "no memory for the answer");
        return false;
    }
    memcpy(r->shared->begun_starts, a->begun.starts, a->begun.num_seqs * sizeof(uint32_t));
    memcpy(r->shared->begun_counts, counts, a->begun.num_seqs * sizeof(uint32_t));
    memcpy(r->shared->begun_blocks, blocks, num_blocks * sizeof(uint32_t));
    for (size_t i = 0; i < num_slabs; i++)
        r->shared->begun_slabs[i] = (ts_ring_slab){slabs[i]->slab, slabs[i]->generation};
    done->step = step->id;
    done->num_blocks = (uint32_t)num_blocks;
    done->num_slabs = (uint32_t)num_slabs;
    return true;
}

/* Does what one entry asks for. False: it must wait. */
static bool execute(ts_ring *r, ts_connection *c, const ts_ring_entry *entry)
{
    ts_service *s = r->rings->service;
    ts_answer a = {0};
    ts_command command;
    ts_asker asker = {.tag = entry->tag};
    ts_ring_completion done = {.tag = entry->tag};
    if (decode(r, c, entry, &command, &a)) {
        if (ts_service_must_wait(s, &command))
            return false;
        if (entry->op != TS_RING_RUN || ts_jobs_check_run(s, c, &command, &a))
            ts_service_apply(s, &command, &a);
    }
    bool ok = true, waits = false;
    uint64_t step = 0;
    if (entry->op == TS_RING_RUN && a.status == TS_OK) {
        step = a.step->id;
        waits = !command.step_run.ordered;
        ok = ts_jobs_run(s, c, asker, &command, a.step);
    } else if (entry->op == TS_RING_BEGIN && a.status == TS_OK) {
        step = a.begun.step->id;
        waits = a.begun.num_copies > 0;
        ok = tell_begun(r, entry, &a, &done);
        if (ok && waits) {
            r->begun = done;
            ok = ts_jobs_copy(s, c, asker, &a, NULL);
        }
    }
    if (!ok) {
        ts_jobs_undo(s, &command, step);
        if (a.status == TS_OK)
            ts_refuse(&a, TS_ENOMEM, "no memory for the answer");
        done = (ts_ring_completion){.tag = entry->tag};
        waits = false;
    }
    c->requests++;
    s->requests++;
    s->refused += a.status != TS_OK;
    if (waits)
        return true;
    done.status = (uint32_t)a.status;
    memcpy(done.message, a.message, sizeof done.message);
    complete(r, &done);
    return true;
}

/* Takes up to ROUND entries, a run being the last of them. */
static void take(ts_work *work, void *service)
{
    ts_ring *r = (ts_ring *)((char *)work - offsetof(ts_ring, work));
    ts_connection *c = ts_service_connection(service, r->pipe);
    atomic_store(&r->queued, false);
    if (c == NULL || atomic_load(&r->closed) || atomic_load(&r->blocked))
        return;
    ts_rings_memory *m = r->shared;
    for (uint32_t i = 0; i < ROUND; i++) {
        uint32_t taken = atomic_load(&r->taken);
        uint32_t tail = __atomic_load_n(&m->submissions.tail, __ATOMIC_ACQUIRE);
        uint32_t head = __atomic_load_n(&m->completions.head, __ATOMIC_ACQUIRE);
        if (tail - taken > TS_RING_ENTRIES)
            return refuse_ring(r, "what is submitted and not taken", tail - taken);
        if (taken - head > TS_RING_ENTRIES)
            return refuse_ring(r, "what is taken and not seen completed", taken - head);
        if (tail == taken || taken - head == TS_RING_ENTRIES)
            return;
        ts_ring_entry entry;
        memcpy(&entry, &m->submitted[taken & MASK], sizeof entry);
        __asm__ volatile("" ::: "memory"); /* checks below look at the copy */
        if (!execute(r, c, &entry)) {
            atomic_store(&r->blocked, true);
            r->rings->num_blocked++;
            return;
        }
        atomic_store(&r->taken, taken + 1);
        __atomic_store_n(&m->submissions.head, taken + 1, __ATOMIC_RELEASE);
        if (entry.op == TS_RING_RUN)
            return;
    }
}

void ts_rings_resume(ts_rings *rings)
{
    if (rings == NULL)
        return;
    for (ts_ring *r = rings->num_blocked > 0 ? rings->all : NULL; r != NULL; r = r->next)
        if (atomic_load(&r->blocked)) {
            atomic_store(&r->blocked, false);
            rings->num_blocked--;
            ring_bell(r->doorbell);
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
    }
    pthread_mutex_unlock(&rings->lock);
    if (!here)
        ts_batch_submit(rings->service->batch, job);
    else if (atomic_load(&rings->sleeps))
        ring_bell(rings->wake);
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
    uint64_t rung;
    while (read(r->doorbell, &rung, sizeof rung) < 0 && errno == EINTR)
        ;
    r->used_ns = now;
    if (!r->asleep)
        return;
    if (rings->num_active == rings->active_capacity) {
        uint32_t capacity = rings->active_capacity * 2 + 16;
        ts_ring **grown = realloc(rings->active, capacity * sizeof *grown);
        if (grown == NULL)
            return ring_bell(r->doorbell); /* tried again at once */
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
        ts_queue_run(&rings->service->queue, &r->bye, rings->service);
        return false;
    }
    if (has_entries(r)) {
        r->used_ns = now;
        if (!atomic_exchange(&r->queued, true))
            ts_queue_run(&rings->service->queue, &r->work, rings->service);
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
        for (uint32_t i = 0; i < job->num_seqs; i++)
            work += (double)job->seqs[i].q_tokens * job->seqs[i].kv_tokens * job->heads *
                    job->geometry.head_dim * 2;
    return work;
}

static ts_job *take_jobs(ts_rings *rings)
{
    pthread_mutex_lock(&rings->lock);
    ts_job *jobs = rings->jobs;
    rings->jobs = NULL;
    rings->jobs_tail = &rings->jobs;
    pthread_mutex_unlock(&rings->lock);
    return jobs;
}

static void hand_on(ts_rings *rings, ts_job *jobs)
{
    for (ts_job *job = jobs, *next; job != NULL; job = next) {
        next = job->next;
        ts_batch_submit(rings->service->batch, job);
    }
}

/* Runs, or hands on, the attends that have come together. */
static void run_jobs(ts_rings *rings)
{
    ts_job *jobs = take_jobs(rings);
    if (jobs == NULL)
        return;
    if (work_of(jobs) > HERE_WORK || !ts_batch_try_run(rings->service->batch, jobs))
        hand_on(rings, jobs);
}

static void await_doorbells(ts_rings *rings, bool sleep)
{
    struct epoll_event events[EVENTS];
    int n = epoll_wait(rings->epoll, events, EVENTS, sleep ? -1 : 0);
    uint64_t now = now_ns(), rung;
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
    ts_rings *rings = arg;
    for (uint32_t turn = 0; !atomic_load(&rings->stop); turn++) {
        uint64_t now = now_ns();
        uint32_t kept = 0;
        for (uint32_t i = 0; i < rings->num_active; i++)
            if (poll_ring(rings, rings->active[i], now))
                rings->active[kept++] = rings->active[i];
        rings->num_active = kept;
        run_jobs(rings);
        if (kept > 0) {
            if (turn % 64 == 0) /* those that sleep want to be seen too */
                await_doorbells(rings, false);
            pause_briefly();
            continue;
        }
        atomic_store(&rings->sleeps, true);
        pthread_mutex_lock(&rings->lock);
        bool idle = rings->jobs == NULL && !atomic_load(&rings->stop);
        pthread_mutex_unlock(&rings->lock);
        if (idle)
            await_doorbells(rings, true);
        atomic_store(&rings->sleeps, false);
    }
    return NULL;
}

ts_rings *ts_rings_new(ts_service *service, uint32_t spin_us)
{
    ts_rings *rings = calloc(1, sizeof *rings);
    if (rings == NULL)
        return NULL;
    rings->service = service;
    rings->spin_ns = spin_us * 1000ull;
    rings->jobs_tail = &rings->jobs;
    pthread_mutex_init(&rings->lock, NULL);
    rings->seqs = malloc(TS_RING_BATCH * sizeof *rings->seqs);
    rings->words = malloc(TS_RING_BATCH * sizeof *rings->words);
    rings->tables = malloc(TS_RING_BLOCKS * sizeof *rings->tables);
    rings->epoll = epoll_create1(EPOLL_CLOEXEC);
    rings->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    rings->ended = true;
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = NULL};
    if (rings->seqs == NULL || rings->words == NULL || rings->tables == NULL || rings->epoll < 0 ||
        rings->wake < 0 || epoll_ctl(rings->epoll, EPOLL_CTL_ADD, rings->wake, &event) != 0 ||
        pthread_create(&rings->thread, NULL, rings_main, rings) != 0) {
        ts_rings_free(rings);
        return NULL;
    }
    rings->ended = false;
    return rings;
}

void ts_rings_stop(ts_rings *rings)
{
    if (rings == NULL)
        return;
    atomic_store(&rings->stop, true);
    ring_bell(rings->wake);
    pthread_join(rings->thread, NULL);
    pthread_mutex_lock(&rings->lock);
    atomic_store(&rings->ended, true); /* what is submitted from now on goes to the batch */
    pthread_mutex_unlock(&rings->lock);
    hand_on(rings, take_jobs(rings));
}

void ts_rings_free(ts_rings *rings)
{
    if (rings == NULL)
        return;
    while (rings->all != NULL)
        free_ring(rings->all);
    if (rings->epoll >= 0)
        close(rings->epoll);
    if (rings->wake >= 0)
        close(rings->wake);
    pthread_mutex_destroy(&rings->lock);
    free(rings->active);
    free(rings->seqs);
    free(rings->words);
    free(rings->tables);
    free(rings);
}
