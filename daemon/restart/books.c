#define _GNU_SOURCE
#include "books.h"

#include "clock.h"
#include "file_pages.h"
#include "invariants.h"
#include "log.h"
#include "replica.h"
#include "snapshot.h"
#include "test_point.h"
#include "timed_wait.h"
#include "tinyserve_version.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

#define JOURNAL_BYTES ((uint64_t)64 << 20)
#define ENTRIES_LEAST 4096u
#define ENTRY_NS 2000u    /* to apply one again, as a guess before it was measured */
#define ATTEMPTS_MAX 3u   /* to take over the same books */
#define CRASHES_MAX 3u    /* in the same operation that no session asked for, */
#define CRASHES_MS 60000u /* ... each of them so soon after the one before */

static const char *const journal_name = "journal";
static const char *const area_names[TS_AREAS] = {"books.a", "books.b"};

struct ts_books {
    ts_keeper keeper;
    ts_journal journal;
    int areas[TS_AREAS];
    uint32_t entries_wanted; /* 0: by what they and a snapshot take */
    ts_answers answers;      /* of before the restart; the engine's owner's */
    uint64_t entries;        /* put since the last time that the follower was woken */
    uint64_t entries_most;   /* ... before it is woken again; atomic */
    atomic_uint_fast64_t waits;
    atomic_uint_fast64_t retry_ms; /* there was no memory for a snapshot; until then none is tried.
                                    * By the engine's clock; 0: the last one was written */
    atomic_bool behind;            /* books.h; the owner's to change */
    pthread_t thread;
    bool thread_runs;
    pthread_mutex_t writing; /* held by who writes a snapshot */
    pthread_mutex_t lock;
    pthread_cond_t wake, made; /* the follower; who waits for a snapshot */
    bool due, ends;            /* under the lock, as what follows */
    bool anew;                 /* ... the follower begins from the last snapshot */
    atomic_bool broken;        /* it came to something else: the owner writes one itself */
    uint32_t snapshots;
    uint64_t snapshot_bytes;
    double snapshot_seconds;
};

/* ---- snapshots ---- */

static double now_s(void)
{
    return (double)ts_now_ns() * 1e-9;
}

/* Maps `bytes` of an area's file, which it makes as large. NULL: there is no memory. */
static unsigned char *map_area(int fd, uint64_t bytes)
{
    struct stat about;
    if (ts_point_fails("snapshot") || fstat(fd, &about) != 0 ||
        ((uint64_t)about.st_size < bytes && ftruncate(fd, (off_t)bytes) != 0) ||
        ts_file_take_pages(fd, bytes) != 0)
        return NULL;
    void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (at == MAP_FAILED)
        return NULL;
    (void)madvise(at, bytes, MADV_DONTDUMP);
    return at;
}

/* Writes the state as the last snapshot, as of `position`; `writing` is held. False: there is no
 * memory. */
static bool write_next(ts_books *b, const ts_engine *engine, const ts_answers *answers,
                       uint64_t position)
{
    const ts_journal_snapshot *last = ts_journal_last(&b->journal);
    ts_journal_snapshot next = {.position = position, .area = last == NULL ? 0 : 1 - last->area};
    ts_record_writer w = {0};
    if (!ts_snapshot_write(engine, answers, &w))
        return false;
    unsigned char *at = map_area(b->areas[next.area], w.bytes);
    if (at == NULL)
        return false;
    next.bytes = w.bytes;
    w = (ts_record_writer){.at = at};
    const bool written = ts_snapshot_write(engine, answers, &w);
    next.checksum = XXH3_64bits(at, next.bytes);
    munmap(at, next.bytes);
    if (!written)
        return false;
    pthread_mutex_lock(&b->lock);
    ts_journal_snapshot_made(&b->journal, &next);
    b->snapshots++;
    b->snapshot_bytes = next.bytes;
    atomic_store(&b->retry_ms, 0);
    pthread_cond_broadcast(&b->made);
    pthread_mutex_unlock(&b->lock);
    return true;
}

/* The same; what the follower has is of no use once the owner has written one itself. */
static bool write_snapshot(ts_books *b, const ts_engine *engine, const ts_answers *answers,
                           uint64_t position, bool by_owner)
{
    pthread_mutex_lock(&b->writing);
    pthread_mutex_lock(&b->lock);
    b->anew = b->anew || by_owner;
    const bool use = by_owner || !b->anew;
    pthread_mutex_unlock(&b->lock);
    const bool written = !use || write_next(b, engine, answers, position);
    pthread_mutex_unlock(&b->writing);
    return written;
}

/* ---- the follower ---- */

/* Until it is wanted; false: it ends. */
static bool await_wish(ts_books *b, ts_replica *r)
{
    pthread_mutex_lock(&b->lock);
    while (!b->ends && (!b->due || b->broken))
        pthread_cond_wait(&b->wake, &b->lock);
    b->due = false;
    const bool goes_on = !b->ends, anew = b->anew;
    b->anew = false;
    pthread_mutex_unlock(&b->lock);
    if (anew)
        ts_replica_free(r);
    return goes_on;
}

/* What the follower can't do the owner does, at its next command. What is tried again is told once.
 */
static void give_up(ts_books *b, ts_status status, const char *why)
{
    if (status != TS_ENOMEM || atomic_load(&b->retry_ms) == 0)
        ts_log(TS_LOG_ERROR, "the books: %s; a snapshot of the state itself takes their place",
               why);
    pthread_mutex_lock(&b->lock);
    b->broken = true;
    pthread_cond_broadcast(&b->made);
    pthread_mutex_unlock(&b->lock);
}

/* The state has been read: from now on it grows bit by bit. */
static void use_small_pages(ts_engine *e)
{
    for (uint32_t i = 0; i < e->num_pools; i++)
        ts_pool_use_large_pages(&e->pools[i].books, false);
}

static void *follower_main(void *arg)
{
    prctl(PR_SET_NAME, "books");
    ts_books *b = arg;
    ts_replica r = {0};
    char why[256];
    while (await_wish(b, &r)) {
        ts_point("follows", 0);
        const double start = now_s();
        uint64_t entries = 0;
        ts_status status = TS_OK;
        if (r.engine == NULL) {
            status = ts_replica_read(&r, &b->journal, b->areas, why, sizeof why);
            if (status == TS_OK)
                use_small_pages(r.engine);
        }
        const double begun = now_s();
        if (status == TS_OK)
            status = ts_replica_follow(&r, &b->journal, &entries, why, sizeof why);
        const double followed = now_s();
        if (status == TS_OK && !write_snapshot(b, r.engine, &r.answers, r.position, false)) {
            snprintf(why, sizeof why, "no memory for a snapshot");
            status = TS_ENOMEM;
        }
        if (status != TS_OK) {
            ts_replica_free(&r);
            give_up(b, status, why);
            continue;
        }
        const double end = now_s();
        const double each = entries > 0 ? (followed - begun) / (double)entries : ENTRY_NS * 1e-9;
        double most = each > 0 ? 2 * (end - followed) / each : ENTRIES_LEAST;
        if (b->entries_wanted != 0)
            most = b->entries_wanted;
        else if (most < ENTRIES_LEAST)
            most = ENTRIES_LEAST;
        __atomic_store_n(&b->entries_most, (uint64_t)most, __ATOMIC_RELAXED);
        pthread_mutex_lock(&b->lock);
        b->snapshot_seconds = end - start;
        pthread_mutex_unlock(&b->lock);
    }
    ts_replica_free(&r);
    return NULL;
}

/* ---- the owner ---- */

/* The follower came to something else, or has no memory: what the state is counts. The answers
 * before are gone, so that a call that is repeated over a restart now is applied again. False:
 * there is no memory for the owner, either. */
static bool mend(ts_books *b, const ts_engine *engine)
{
    ts_answers none = {0};
    const bool written = write_snapshot(b, engine, &none, b->journal.head->head, true);
    if (!written && atomic_exchange(&b->retry_ms, engine->now_ms + TS_BOOKS_RETRY_MS) == 0)
        ts_log(TS_LOG_ERROR,
               "the books: no memory for a snapshot: it is tried again every %u s, and %llu of the "
               "journal's %llu bytes are in use",
               TS_BOOKS_RETRY_MS / 1000, (unsigned long long)ts_journal_used(&b->journal),
               (unsigned long long)b->journal.capacity);
    pthread_mutex_lock(&b->lock);
    b->broken = false;
    pthread_mutex_unlock(&b->lock);
    return written;
}

/* Whether a snapshot may be tried. */
static bool is_due(const ts_books *b, const ts_engine *engine)
{
    const uint64_t retry_ms = atomic_load(&b->retry_ms);
    return retry_ms == 0 || engine->now_ms >= retry_ms;
}

/* The books lack what was applied, or have all again. What they have wouldn't fit the pools' memory
 * then, of which blocks are others' by now. */
static void set_behind(ts_books *b, bool behind)
{
    uint32_t *discard = &b->journal.head->discard;
    if (*discard != TS_DISCARD_ORDERED)
        __atomic_store_n(discard, behind ? TS_DISCARD_BEHIND : TS_DISCARD_NOT, __ATOMIC_RELEASE);
    atomic_store(&b->behind, behind);
    if (behind)
        ts_log(TS_LOG_ERROR, "the books: the journal is full, and there is no memory for a "
                             "snapshot: until there is, a restart begins with nothing");
    else
        ts_log(TS_LOG_WARNING, "the books: there was memory for a snapshot: a restart loses "
                               "nothing from now on");
}

static void wake_follower(ts_books *b)
{
    b->entries = 0;
    pthread_mutex_lock(&b->lock);
    b->due = true;
    pthread_cond_signal(&b->wake);
    pthread_mutex_unlock(&b->lock);
}

/* Waits for room in the journal, of which `used` bytes were in use before something had no room. A
 * snapshot may have made room since: then none to come need change anything, and there is nothing
 * to wait for. False: the follower makes none. */
static bool await_room(ts_books *b, uint64_t used)
{
    atomic_fetch_add(&b->waits, 1);
    ts_point("no room", 0);
    wake_follower(b);
    pthread_mutex_lock(&b->lock);
    while (!b->broken && ts_journal_used(&b->journal) == used)
        pthread_cond_wait(&b->made, &b->lock);
    const bool broken = b->broken;
    pthread_mutex_unlock(&b->lock);
    return !broken;
}

/* Puts the command, which was applied, into the journal; a snapshot in its place has what it did.
 * False: neither can be. */
static bool put(ts_books *b, const ts_engine *engine, const ts_command *c, const ts_answer *answer)
{
    const uint32_t digest = ts_command_digest(c, answer);
    for (;;) {
        const uint64_t used = ts_journal_used(&b->journal);
        if (ts_journal_put(&b->journal, c, engine->now_ms, answer->status, digest))
            return true;
        if (!is_due(b, engine))
            return false;
        /* What is larger than the journal never has room. */
        if (!ts_journal_fits(&b->journal, c) || !await_room(b, used))
            return mend(b, engine);
    }
}

/* Books that are behind catch up, if it is time and there is memory. */
static bool catch_up(ts_books *b, const ts_engine *engine)
{
    return is_due(b, engine) && mend(b, engine);
}

void ts_books_begin(ts_books *b, const ts_command *c)
{
    if (b == NULL)
        return;
    ts_journal_head *h = b->journal.head;
    h->session = c->session;
    h->call = c->call;
    __atomic_store_n(&h->op, (uint32_t)c->op, __ATOMIC_RELEASE);
}

void ts_books_note(ts_books *b, const ts_engine *engine, const ts_command *c,
                   const ts_answer *answer)
{
    if (b == NULL)
        return;
    ts_journal_head *h = b->journal.head;
    if (!ts_command_only_looks(c) || c->again || engine->waiting_for_room > 0) {
        const bool was_behind = b->behind;
        const bool has = was_behind ? catch_up(b, engine) : put(b, engine, c, answer);
        if (has == was_behind)
            set_behind(b, !has);
        if (has && atomic_load_explicit(&b->broken, memory_order_relaxed) && is_due(b, engine))
            (void)mend(b, engine); /* the journal has it meanwhile */
        if ((++b->entries >= __atomic_load_n(&b->entries_most, __ATOMIC_RELAXED) ||
             ts_journal_used(&b->journal) > h->capacity / 4) &&
            has && is_due(b, engine))
            wake_follower(b);
    }
    __atomic_store_n(&h->op, 0, __ATOMIC_RELEASE);
}

void ts_books_settle(ts_books *b, const ts_engine *engine, uint32_t ms)
{
    if (b == NULL)
        return;
    const uint64_t until_ms = ts_now_ms() + ms;
    if (b->behind) { /* no follower knows what the journal lacks */
        if (mend(b, engine))
            set_behind(b, false);
        return;
    }
    wake_follower(b);
    pthread_mutex_lock(&b->lock);
    while (!b->broken && ts_journal_used(&b->journal) > 0 &&
           !ts_timed_wait(&b->made, &b->lock, until_ms))
        ;
    const bool broken = b->broken;
    pthread_mutex_unlock(&b->lock);
    if (broken)
        (void)mend(b, engine); /* else the next daemon has the journal to apply */
}

void ts_books_taken_over(ts_books *b, ts_takeover_end end)
{
    if (b == NULL)
        return;
    ts_journal_head *h = b->journal.head;
    h->attempts = end == TS_TAKEOVER_SERVES ? 0 : h->attempts + (end == TS_TAKEOVER_FAILED);
    h->taking_over = 0;
}

volatile uint32_t *ts_books_crash_word(ts_books *b)
{
    return b == NULL ? NULL : &b->journal.head->crash;
}

void ts_books_discard(ts_books *b)
{
    if (b != NULL)
        b->journal.head->discard = TS_DISCARD_ORDERED;
}

bool ts_books_answered(const ts_books *b, const ts_engine *engine, ts_command *c, ts_answer *answer)
{
    return b != NULL && ts_answers_find(&b->answers, engine, c, answer);
}

const uint64_t *ts_books_made(const ts_books *b, uint64_t session, uint64_t call, uint32_t *pool,
                              uint32_t *count)
{
    return b == NULL ? NULL : ts_answers_find_made(&b->answers, session, call, pool, count);
}

bool ts_books_ordered(const ts_books *b, const ts_caller *by, ts_op op, ts_answer *answer)
{
    return b != NULL && ts_answers_find_order(&b->answers, by, op, answer);
}

void ts_books_get_figures(const ts_books *books, ts_books_figures *f)
{
    ts_books *b = (ts_books *)(uintptr_t)books; /* for its lock */
    *f = (ts_books_figures){0};
    if (b == NULL)
        return;
    pthread_mutex_lock(&b->lock);
    f->journal_bytes = b->journal.head->capacity;
    f->journal_used = ts_journal_used(&b->journal);
    f->snapshot_bytes = b->snapshot_bytes;
    f->snapshots = b->snapshots;
    f->snapshot_seconds = b->snapshot_seconds;
    pthread_mutex_unlock(&b->lock);
    f->waits = atomic_load(&b->waits);
    f->behind = atomic_load(&b->behind);
    memcpy(f->epoch, b->journal.head->epoch, sizeof f->epoch);
}

/* ---- opening ---- */

static void note_problem(void *arg, const char *sentence)
{
    char *why = arg;
    if (why[0] == '\0')
        snprintf(why, 200, "%s", sentence);
}

/* Which command was under way at the death, and at how many in a row. A session's are told by their
 * numbers; of others, which come often, crashes of the same kind count, soon after one another. */
static void look_at_death(ts_journal_head *h, ts_books_start *start)
{
    const bool counts = h->op != 0 && (h->session != 0 || h->crash != 0);
    const uint64_t now_ms = ts_now_ms();
    const bool same = h->op != 0 && h->op == h->suspect_op && h->session == h->suspect_session &&
                      h->call == h->suspect_call &&
                      (h->session != 0 || now_ms - h->died_ms < CRASHES_MS);
    h->died_ms = now_ms;
    h->deaths = !counts ? 0 : same ? h->deaths + 1 : 1;
    h->suspect_op = h->op;
    h->suspect_session = h->session;
    h->suspect_call = h->call;
    h->op = 0;
    start->crash = (int)h->crash;
    h->attempts += h->taking_over != 0 && h->crash != 0;
    h->crash = 0;
    start->last_op = h->suspect_op;
    start->last_session = h->suspect_session;
    start->deaths = h->deaths;
}

/* The state as the last daemon left it. */
static ts_status restore(ts_books *b, ts_replica *r, ts_books_start *start)
{
    ts_journal_head *h = b->journal.head;
    char problem[200] = "";
    start->failed = h->attempts;
    if (h->attempts >= ATTEMPTS_MAX) {
        snprintf(start->why, sizeof start->why, "%u attempts to take them over failed",
                 h->attempts);
        return TS_EPROTO;
    }
    if (h->suspect_session == 0 && h->deaths >= CRASHES_MAX) { /* nobody's session can be ended */
        snprintf(start->why, sizeof start->why,
                 "the daemon crashed %u times while it carried out operation %u, for no session",
                 h->deaths, h->suspect_op);
        return TS_EPROTO;
    }
    h->taking_over = 1;
    ts_status status = ts_replica_read(r, &b->journal, b->areas, start->why, sizeof start->why);
    if (status == TS_OK)
        status = ts_replica_follow(r, &b->journal, &start->entries, start->why, sizeof start->why);
    if (status == TS_OK)
        (void)ts_invariants_check(r->engine, note_problem, problem);
    if (status == TS_OK)
        use_small_pages(r->engine);
    if (status == TS_OK && problem[0] != '\0') {
        snprintf(start->why, sizeof start->why, "the books contradict themselves: %s", problem);
        status = TS_EPROTO;
    }
    return status;
}

/* Takes what the keeper has. TS_ENOENT: there is nothing, or it can't be used; then start->why says
 * why. TS_ENOMEM: it may be read later. */
static ts_status take_over(ts_books *b, ts_replica *r, ts_books_start *start)
{
    const int fd = b->keeper.take(b->keeper.arg, journal_name);
    for (uint32_t i = 0; i < TS_AREAS; i++)
        b->areas[i] = b->keeper.take(b->keeper.arg, area_names[i]);
    if (fd < 0 && (b->areas[0] >= 0 || b->areas[1] >= 0))
        snprintf(start->why, sizeof start->why, "the journal isn't in the store");
    if (fd < 0)
        return TS_ENOENT;
    ts_status status = ts_journal_open(&b->journal, fd, start->why, sizeof start->why);
    if (status != TS_OK)
        return status == TS_ENOMEM ? TS_ENOMEM : TS_ENOENT;
    const uint32_t discard = b->journal.head->discard;
    start->discarded = discard == TS_DISCARD_ORDERED;
    if (discard == TS_DISCARD_BEHIND)
        snprintf(start->why, sizeof start->why,
                 "its journal was full, and it had no memory for a snapshot");
    if (discard != TS_DISCARD_NOT)
        return TS_ENOENT;
    look_at_death(b->journal.head, start);
    status = restore(b, r, start);
    if (status == TS_OK) {
        start->journal_bytes = ts_journal_used(&b->journal);
        start->snapshot_bytes = ts_journal_last(&b->journal)->bytes;
        start->restored = true;
        return TS_OK;
    }
    ts_replica_free(r);
    if (status == TS_ENOMEM)
        ts_books_taken_over(b, TS_TAKEOVER_WAITS);
    return status == TS_ENOMEM ? TS_ENOMEM : TS_ENOENT;
}

/* What couldn't be taken over is left for the operator, under another name; what isn't wanted
 * goes. */
static void set_aside(ts_books *b, bool keep)
{
    char name[40], why[160];
    const char *names[1 + TS_AREAS] = {journal_name, area_names[0], area_names[1]};
    int fds[1 + TS_AREAS] = {b->journal.fd, b->areas[0], b->areas[1]};
    for (uint32_t i = 0; i < 1 + TS_AREAS; i++) {
        if (fds[i] < 0)
            continue;
        snprintf(name, sizeof name, "failed.%s", names[i]);
        b->keeper.forget(b->keeper.arg, names[i]); /* first: nobody keeps a file twice */
        b->keeper.forget(b->keeper.arg, name);
        if (keep)
            (void)b->keeper.keep(b->keeper.arg, name, fds[i], why, sizeof why);
        if (i > 0)
            close(fds[i]);
    }
    ts_journal_close(&b->journal);
}

static int new_area(char *why, size_t why_bytes)
{
    const int fd = memfd_create("tinyserve-books", MFD_CLOEXEC);
    if (fd >= 0 && fchmod(fd, 0400) == 0)
        return fd;
    snprintf(why, why_bytes, "memory for the books: %s", strerror(errno));
    if (fd >= 0)
        close(fd);
    return -1;
}

/* The place of the next snapshot may be gone: without it the journal could only grow. */
static ts_status make_lost_areas(ts_books *b, char *why, size_t why_bytes)
{
    ts_status status = TS_OK;
    for (uint32_t i = 0; i < TS_AREAS && status == TS_OK; i++) {
        if (b->areas[i] >= 0)
            continue;
        ts_log(TS_LOG_WARNING, "'%s' isn't in the store, and is made anew", area_names[i]);
        b->areas[i] = new_area(why, why_bytes);
        status = b->areas[i] < 0
                     ? TS_ENOMEM
                     : b->keeper.keep(b->keeper.arg, area_names[i], b->areas[i], why, why_bytes);
    }
    return status;
}

/* Nothing of them may be found by the next daemon. */
static void forget_all(const ts_books *b)
{
    b->keeper.forget(b->keeper.arg, journal_name);
    for (uint32_t i = 0; i < TS_AREAS; i++)
        b->keeper.forget(b->keeper.arg, area_names[i]);
}

/* Begins with nothing. */
static ts_status begin(ts_books *b, const ts_books_options *o, ts_replica *r, char *why,
                       size_t why_bytes)
{
    const uint64_t bytes = o->journal_bytes != 0 ? o->journal_bytes : JOURNAL_BYTES;
    ts_status status = ts_journal_new(&b->journal, bytes, why, why_bytes);
    for (uint32_t i = 0; i < TS_AREAS && status == TS_OK; i++)
        status = (b->areas[i] = new_area(why, why_bytes)) >= 0 ? TS_OK : TS_ENOMEM;
    r->engine = ts_engine_new(o->limits);
    if (status == TS_OK &&
        (r->engine == NULL || !ts_answers_init(&r->answers, o->limits->sessions) ||
         !write_snapshot(b, r->engine, &r->answers, 0, true))) {
        snprintf(why, why_bytes, "no memory for an engine of %u sessions", o->limits->sessions);
        status = TS_ENOMEM;
    }
    if (status == TS_OK)
        status = b->keeper.keep(b->keeper.arg, journal_name, b->journal.fd, why, why_bytes);
    for (uint32_t i = 0; i < TS_AREAS && status == TS_OK; i++)
        status = b->keeper.keep(b->keeper.arg, area_names[i], b->areas[i], why, why_bytes);
    if (status != TS_OK)
        forget_all(b);
    return status;
}

ts_status ts_books_open(const ts_books_options *o, ts_books **out, ts_engine **engine,
                        ts_books_start *start, char *why, size_t why_bytes)
{
    const double began = now_s();
    ts_books *b = calloc(1, sizeof *b);
    ts_replica r = {0};
    *out = NULL;
    *engine = NULL;
    *start = (ts_books_start){0};
    if (b == NULL) {
        snprintf(why, why_bytes, "no memory for books");
        return TS_ENOMEM;
    }
    b->keeper = o->keeper;
    b->journal.fd = b->areas[0] = b->areas[1] = -1;
    b->entries_wanted = o->entries;
    b->entries_most = o->entries != 0 ? o->entries : ENTRIES_LEAST;
    pthread_mutex_init(&b->writing, NULL);
    pthread_mutex_init(&b->lock, NULL);
    pthread_cond_init(&b->wake, NULL);
    ts_timed_wait_init(&b->made);
    ts_status status = take_over(b, &r, start);
    if (status == TS_ENOMEM) {
        snprintf(why, why_bytes, "%s; what is stored stays, and it is tried again", start->why);
    } else if (status == TS_ENOENT) {
        set_aside(b, start->why[0] != '\0');
        b->areas[0] = b->areas[1] = -1;
        status = begin(b, o, &r, why, why_bytes);
    } else {
        status = make_lost_areas(b, why, why_bytes);
        if (status == TS_ENOSPC)
            forget_all(b);
        snprintf(b->journal.head->version, sizeof b->journal.head->version, "%s", TS_VERSION);
        b->journal.head->restarts++;
    }
    if (status == TS_OK && (errno = pthread_create(&b->thread, NULL, follower_main, b)) != 0) {
        snprintf(why, why_bytes, "no thread for the books: %s", strerror(errno));
        status = TS_ENOMEM;
    }
    if (status != TS_OK) {
        ts_replica_free(&r);
        ts_books_close(b);
        return status;
    }
    b->thread_runs = true;
    b->answers = r.answers;
    *engine = r.engine;
    *out = b;
    start->restarts = b->journal.head->restarts;
    start->seconds = now_s() - began;
    return TS_OK;
}

void ts_books_close(ts_books *b)
{
    if (b == NULL)
        return;
    if (b->thread_runs) {
        pthread_mutex_lock(&b->lock);
        b->ends = true;
        pthread_cond_signal(&b->wake);
        pthread_mutex_unlock(&b->lock);
        pthread_join(b->thread, NULL);
    }
    ts_answers_fini(&b->answers);
    ts_journal_close(&b->journal);
    for (uint32_t i = 0; i < TS_AREAS; i++)
        if (b->areas[i] >= 0)
            close(b->areas[i]);
    pthread_mutex_destroy(&b->writing);
    pthread_mutex_destroy(&b->lock);
    pthread_cond_destroy(&b->wake);
    pthread_cond_destroy(&b->made);
    free(b);
}
