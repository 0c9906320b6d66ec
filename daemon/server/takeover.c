#include "takeover.h"

#include "clock.h"
#include "plain_text.h"
#include "pool_memory.h"
#include "request.h"
#include "resume.h"
#include "store_wire.h"
#include "stream_runs.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define BARRIER_MS 1000u
#define POISON_DEATHS 2u
#define BOOKS_FDS 6u /* the journal and two areas, and those of books that failed */

/* ---- the store as the books' keeper ---- */

static int take(void *store, const char *name)
{
    return ts_store_take(store, name);
}

static void forget(void *store, const char *name)
{
    (void)ts_store_remove(store, name);
}

/* What is worth least among what is stored and nobody has taken. */
typedef struct least {
    size_t rank;
    char name[TS_STORE_NAME_BYTES + 1];
} least;

static void look_for_least(void *arg, const char *name)
{
    /* stored_memory.c has the names. */
    static const char *const kinds[] = {"failed.", "c", "x", "s", "p"};
    least *l = arg;
    size_t rank = 0;
    while (rank < sizeof kinds / sizeof *kinds &&
           strncmp(name, kinds[rank], strlen(kinds[rank])) != 0)
        rank++;
    if (l->name[0] != '\0' && rank >= l->rank)
        return;
    l->rank = rank;
    snprintf(l->name, sizeof l->name, "%s", name);
}

/* Whether it is of books that could not be read, which are set aside for the operator. */
static bool is_evidence(const char *name)
{
    return strncmp(name, "failed.", 7) == 0;
}

/* The books come before all else. False: nothing makes room for them. */
static bool make_room(ts_store *store, const char *for_name)
{
    static const char *const evidence[] = {"failed.journal", "failed.books.a", "failed.books.b"};
    least l = {0};
    bool made = false;
    ts_store_each(store, look_for_least, &l);
    if (l.name[0] != '\0') {
        ts_log(TS_LOG_WARNING, "'%s' in the store makes room for '%s'", l.name, for_name);
        return ts_store_remove(store, l.name) == TS_OK;
    }
    for (size_t i = 0; i < 3 && !is_evidence(for_name); i++)
        made = ts_store_remove(store, evidence[i]) == TS_OK || made;
    return made;
}

static ts_status keep(void *store, const char *name, int fd, char *why, size_t why_bytes)
{
    ts_status status;
    while ((status = ts_store_put_reserved(store, name, fd, why, why_bytes)) == TS_ENOSPC &&
           make_room(store, name))
        ;
    if (status == TS_OK && !ts_store_barrier(store, BARRIER_MS))
        ts_log(TS_LOG_WARNING, "whoever holds the memory has not taken '%s' within %u ms", name,
               BARRIER_MS);
    return status;
}

/* As the holder has it in the environment; systemd says nothing. */
static void read_cause(char *cause, size_t bytes)
{
    const char *told = getenv(TS_ENV_LAST_DEATH);
    snprintf(cause, bytes, "%s", told == NULL ? "" : told);
}

static void log_start(const ts_books_start *start)
{
    char snapshot[32], journal[32];
    if (start->last_op != 0)
        ts_log(TS_LOG_WARNING,
               "the last daemon died while it carried out operation %u of session %llx%s",
               start->last_op, (unsigned long long)start->last_session,
               start->deaths > 1 ? ", as the one before did" : "");
    if (start->crash == SIGUSR1)
        ts_log(TS_LOG_ERROR, "a GPU of the last daemon failed");
    else if (start->crash != 0)
        ts_log(TS_LOG_ERROR, "the last daemon crashed: %s", strsignal(start->crash));
    if (start->restored)
        ts_log(TS_LOG_INFO,
               "took over from the last daemon in %.3f s: a snapshot of %s and %llu commands since "
               "(%s), restart %u",
               start->seconds, ts_text_bytes(start->snapshot_bytes, snapshot, sizeof snapshot),
               (unsigned long long)start->entries,
               ts_text_bytes(start->journal_bytes, journal, sizeof journal), start->restarts);
    else if (start->why[0] != '\0')
        ts_log(TS_LOG_ERROR,
               "what the last daemon left can't be taken over: %s; what there is of its journal "
               "and snapshots is kept as failed.journal, failed.books.a and failed.books.b, and "
               "this daemon begins with nothing",
               start->why);
}

/* Counts what the books know of. */
static void count_known(void *count, const char *name)
{
    *(uint32_t *)count += !is_evidence(name);
}

/* Where memory is stored and no books are, the holder has closed these: that is no first start. */
static void look_for_lost_books(ts_books_start *start, uint32_t known, uint32_t most)
{
    if (known > 0 && !start->restored && !start->discarded && start->why[0] == '\0')
        snprintf(start->why, sizeof start->why,
                 "the journal isn't in the store, and %u other descriptors are: the holder takes "
                 "%u (FileDescriptorStoreMax= of the unit), and has closed what was beyond it",
                 known, most);
}

/* A limit that was lowered, or is too low, is told before anything is refused. */
static void warn_of_room(ts_store *store)
{
    const uint32_t fds = ts_store_fds(store), most = ts_store_fds_max(store);
    if (most > 0 && fds + BOOKS_FDS >= most)
        ts_log(TS_LOG_WARNING,
               "the holder has %u descriptors and takes %u, %u of them for the daemon's books "
               "(FileDescriptorStoreMax= of the unit): new slabs and sessions' buffers are refused",
               fds, most, BOOKS_FDS);
}

/* Whether there is a service; else the log says why. */
static bool made(bool is_there, const ts_config *c)
{
    if (!is_there)
        ts_log(TS_LOG_ERROR, "no memory for %u sessions", c->limits.sessions);
    return is_there;
}

bool ts_takeover_begin(ts_service *s, ts_store *store, const ts_config *c)
{
    char why[TS_MESSAGE_BYTES];
    s->taken_over.began_ns = ts_now_ns();
    read_cause(s->taken_over.cause, sizeof s->taken_over.cause);
    s->exec.store = store;
    if (!ts_store_holds(store)) {
        ts_log(TS_LOG_INFO,
               "nobody holds the memory when the daemon ends (systemd with "
               "FileDescriptorStoreMax=, or --supervise): what is stored ends with it");
        return made(ts_service_init(s, &c->limits), c);
    }
    ts_store_reserve(store, BOOKS_FDS);
    const ts_books_options options = {
        .keeper = {store, take, keep, forget},
        .limits = &c->limits,
        .journal_bytes =
            c->message_bytes * 4 > (64u << 20) ? (c->message_bytes * 4 + 4095) / 4096 * 4096 : 0};
    ts_engine *engine;
    uint32_t known = 0;
    ts_store_each(store, count_known, &known);
    const ts_status status =
        ts_books_open(&options, &s->exec.books, &engine, &s->started, why, sizeof why);
    if (status == TS_ENOSPC) {
        ts_log(TS_LOG_ERROR, "the books: %s: what is stored ends with the daemon", why);
        s->exec.store = NULL;
        s->started = (ts_books_start){0};
        return made(ts_service_init(s, &c->limits), c);
    }
    if (status != TS_OK) {
        ts_log(TS_LOG_ERROR, "the books: %s", why);
        return false;
    }
    ts_books_figures figures;
    ts_books_get_figures(s->exec.books, &figures);
    memcpy(s->epoch, figures.epoch, sizeof s->epoch);
    look_for_lost_books(&s->started, known, ts_store_fds_max(store));
    log_start(&s->started);
    warn_of_room(store);
    return made(ts_service_init_with(s, engine), c);
}

/* What nobody took belongs to nothing. */
static void drop_unknown(void *service, const char *name)
{
    ts_service *s = service;
    if (is_evidence(name))
        return;
    ts_log(TS_LOG_DEBUG, "'%s' in the store belongs to nothing: it is dropped", name);
    (void)ts_store_remove(s->exec.store, name);
}

/* A session whose command was being carried out at two deaths in a row isn't asked a third time. */
static void end_poison(ts_service *s)
{
    const ts_books_start *start = &s->started;
    const ts_session *about = ts_engine_session(s->exec.engine, start->last_session);
    if (start->deaths < POISON_DEATHS || about == NULL)
        return;
    ts_log_on(TS_LOG_ERROR, &(ts_log_about){.session = start->last_session, .pid = about->pid},
              "session %llx (pid %u) is ended: the daemon died %u times while it carried out its "
              "operation %u",
              (unsigned long long)start->last_session, about->pid, start->deaths, start->last_op);
    ts_stream_runs_give_up(&s->exec, start->last_session);
    ts_service_close_session(s, start->last_session, about->pid, NULL);
}

static bool has_pool(const ts_engine *e, const char *name)
{
    bool has = false;
    for (uint32_t i = 0; i < e->num_pools && !has; i++)
        has = strcmp(e->pools[i].config.name, name) == 0;
    return has;
}

static void note_taken_over(ts_service *s)
{
    ts_taken_over *t = &s->taken_over;
    const ts_engine *e = s->exec.engine;
    for (uint32_t i = 0; i < e->num_pools; i++)
        t->sequences += e->pools[i].seqs.live;
    t->seconds = (double)(ts_now_ns() - t->began_ns) * 1e-9;
    ts_log(TS_LOG_INFO,
           "%llu sequences in %u pools are as they were after %.3f s%s%s; %u sessions are to come "
           "back",
           (unsigned long long)t->sequences, e->live_pools, t->seconds,
           t->cause[0] != '\0' ? "; the last daemon ended by " : "", t->cause, ts_resume_absent(s));
}

ts_status ts_takeover_pools(ts_service *s, const ts_config *c)
{
    char why[TS_MESSAGE_BYTES];
    ts_status status = TS_OK;
    if (s->started.restored) {
        status = ts_pool_memory_restore(&s->exec, s->started.crash != 0, why, sizeof why);
        if (status != TS_OK) {
            const bool waits = status == TS_EDEVICE || status == TS_ENOMEM;
            ts_log(TS_LOG_ERROR, "the pools can't be taken over: %s%s%s", why,
                   waits ? "; what is stored stays, and it is tried again" : "",
                   status == TS_EDEVICE
                       ? " (under CUDA's multi-process service, after a fault, when every process "
                         "that had a context has ended)"
                       : "");
            ts_books_taken_over(s->exec.books, waits ? TS_TAKEOVER_WAITS : TS_TAKEOVER_FAILED);
            return status;
        }
        end_poison(s);
        ts_resume_start(s);
    }
    if (s->exec.books != NULL)
        ts_store_each(s->exec.store, drop_unknown, s);
    for (uint32_t i = 0; i < c->num_pools && status == TS_OK; i++) {
        const char *name = c->pools[i].pool.name;
        if (has_pool(s->exec.engine, name))
            continue;
        status = ts_pool_memory_add(&s->exec, &c->pools[i], NULL, why, sizeof why);
        if (status == TS_OK)
            continue;
        ts_log_on(TS_LOG_ERROR, &(ts_log_about){.pool = name}, "pool '%s': %s%s", name, why,
                  s->started.restored ? "; what was taken over is served without it" : "");
        if (s->started.restored) /* an operator may have deleted it to make room for others */
            status = TS_OK;
    }
    if (s->started.restored)
        note_taken_over(s);
    if (status == TS_OK && s->started.restored && !ts_resume_runs(s))
        status = TS_ENOMEM;
    return status;
}
