#include "slab_supply.h"

#include "block_sums.h"
#include "cgroup.h"
#include "log.h"

#include <stdlib.h>
#include <sys/prctl.h>

typedef enum supply_state { IDLE, ORDERED, MADE } supply_state;

typedef struct ts_slab_supply {
    ts_work work; /* first: grants what was made */
    ts_exec *exec;
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    supply_state state; /* under the lock, with the next two */
    bool queued;        /* the work is in the queue */
    bool stop;
    /* The slab, which is the thread's while it is ordered, and whom it is for. */
    ts_stored_slab slab;
    uint32_t tenant;
    ts_status status;
    char why[TS_MESSAGE_BYTES];
    uint64_t failed; /* bit i: pool i's memory couldn't be had */
} ts_slab_supply;

void ts_slab_drop(const ts_stored_slab *s)
{
    char why[TS_MESSAGE_BYTES];
    if (ts_memory_drop(s->memory, s->slab, why, sizeof why) != TS_OK)
        ts_log(TS_LOG_ERROR, "the memory of pool %u's slab %u stays: %s", s->pool, s->slab, why);
}

/* ---- the thread ---- */

static void make_ordered(ts_slab_supply *s)
{
    ts_memory *memory = s->slab.memory;
    s->status = ts_memory_renew(memory, s->slab.slab, s->why, sizeof s->why);
    if (s->status != TS_OK)
        return;
    s->status = ts_stored_slab_put(s->exec->store, &s->slab, s->why, sizeof s->why);
    if (s->status != TS_OK)
        ts_slab_drop(&s->slab);
}

static void *supply_main(void *arg)
{
    ts_slab_supply *s = arg;
    prctl(PR_SET_NAME, "slabs");
    pthread_mutex_lock(&s->lock);
    for (;;) {
        while (s->state != ORDERED && !s->stop)
            pthread_cond_wait(&s->changed, &s->lock);
        if (s->state != ORDERED)
            break;
        pthread_mutex_unlock(&s->lock);
        make_ordered(s);
        pthread_mutex_lock(&s->lock);
        const bool queue = !s->stop;
        s->state = MADE;
        s->queued = queue;
        pthread_cond_broadcast(&s->changed);
        pthread_mutex_unlock(&s->lock);
        if (queue)
            ts_queue_put(&s->exec->queue,
                         &s->work); /* the owner may come to wait for this thread */
        pthread_mutex_lock(&s->lock);
    }
    pthread_mutex_unlock(&s->lock);
    return NULL;
}

/* ---- the engine's owner ---- */

/* Grants what was made, unless the pool has become another, or smaller. */
static void take_in(ts_slab_supply *s)
{
    ts_exec *x = s->exec;
    const uint32_t pool = s->slab.pool, slab = s->slab.slab;
    const ts_pool_books *books = &x->engine->pools[pool].books;
    if (s->status != TS_OK) {
        s->failed |= (uint64_t)1 << pool;
        return;
    }
    ts_answer granted = {.status = TS_EBUSY};
    if (books->ungranted == slab && slab < books->num_slabs &&
        books->slabs[slab].generation + 1 == s->slab.generation)
        ts_exec_apply(x,
                      &(ts_command){.op = TS_OP_SLAB_GRANT,
                                    .pool = pool,
                                    .slab_grant = {.slab = slab, .tenant = s->tenant}},
                      &granted);
    if (granted.status == TS_OK)
        return;
    ts_stored_slab_forget(x->store, &s->slab);
    ts_slab_drop(&s->slab);
}

/* Waits until nothing is under way, and takes in what was. False: nothing was. */
static bool settle(ts_slab_supply *s)
{
    pthread_mutex_lock(&s->lock);
    while (s->state == ORDERED)
        pthread_cond_wait(&s->changed, &s->lock);
    const bool made = s->state == MADE;
    s->state = IDLE;
    pthread_mutex_unlock(&s->lock);
    if (made)
        take_in(s);
    return made;
}

bool ts_slab_supply_finish(ts_exec *x)
{
    return x->slabs != NULL && settle(x->slabs);
}

static void on_made(ts_work *work, void *owner);

static ts_slab_supply *supply_new(ts_exec *x)
{
    ts_slab_supply *s = calloc(1, sizeof *s);
    if (s == NULL)
        return NULL;
    s->work.run = on_made;
    s->exec = x;
    pthread_mutex_init(&s->lock, NULL);
    pthread_cond_init(&s->changed, NULL);
    if (pthread_create(&s->thread, NULL, supply_main, s) == 0)
        return s;
    pthread_cond_destroy(&s->changed);
    pthread_mutex_destroy(&s->lock);
    free(s);
    return NULL;
}

/* Whether the pool's next slab is one that the thread makes: a GPU's, which nobody had, and which
 * could be had so far. */
static bool is_threads(const ts_exec *x, uint32_t pool)
{
    const ts_pool_books *books = &x->engine->pools[pool].books;
    const bool failed = x->slabs != NULL && (x->slabs->failed >> pool & 1);
    return x->gpu_of[pool] != NULL && x->memory[pool]->ipc_handle == NULL &&
           books->ungranted < books->num_slabs && !failed;
}

/* Has the pool's next slab made for the tenant, unless one is under way. False: there is no thread.
 */
static bool order(ts_exec *x, uint32_t pool, uint32_t tenant)
{
    if (x->slabs == NULL)
        x->slabs = supply_new(x);
    ts_slab_supply *s = x->slabs;
    if (s == NULL)
        return false;
    const ts_engine_pool *p = &x->engine->pools[pool];
    const uint32_t slab = p->books.ungranted;
    pthread_mutex_lock(&s->lock);
    const bool stop = s->stop;
    if (s->state == IDLE && !s->queued && !stop) {
        s->slab =
            (ts_stored_slab){x->memory[pool], pool, slab, p->books.slabs[slab].generation + 1};
        s->tenant = tenant;
        s->state = ORDERED;
        pthread_cond_broadcast(&s->changed);
    }
    pthread_mutex_unlock(&s->lock);
    return !stop;
}

static void order_ahead(ts_exec *x, uint32_t pool, uint32_t tenant)
{
    if (ts_engine_wants_spare(x->engine, pool, tenant) && is_threads(x, pool))
        (void)order(x, pool, tenant);
}

static void on_made(ts_work *work, void *owner)
{
    ts_slab_supply *s = (ts_slab_supply *)work;
    const uint32_t pool = s->slab.pool, tenant = s->tenant;
    pthread_mutex_lock(&s->lock);
    s->queued = false;
    pthread_mutex_unlock(&s->lock);
    (void)settle(s); /* unless somebody who waited has */
    order_ahead(s->exec, pool, tenant);
    s->exec->resumed(owner);
}

/* Stores the memory that the slab got, under its next generation. Where that can't be, the store
 * mustn't have other memory under the slab's name, nor clients map other memory: the next daemon
 * would serve what was there before, and a client would write where nobody reads. */
static ts_status store_slab(ts_exec *x, uint32_t pool, uint32_t slab, char *why, size_t why_bytes)
{
    ts_memory *memory = x->memory[pool];
    const ts_engine_pool *p = &x->engine->pools[pool];
    const ts_stored_slab now = {memory, pool, slab, p->books.slabs[slab].generation};
    const ts_stored_slab next = {memory, pool, slab, now.generation + 1};
    char again[TS_MESSAGE_BYTES];
    ts_answer answer;
    ts_status status = ts_stored_slab_put(x->store, &next, why, why_bytes);
    if (status == TS_OK)
        return TS_OK;
    if (slab == p->books.ungranted) { /* nobody's */
        ts_slab_drop(&next);
        return status;
    }
    ts_stored_slab_forget(x->store, &now); /* it is empty, and has made room */
    if (ts_stored_slab_put(x->store, &next, again, sizeof again) == TS_OK)
        return TS_OK;
    ts_exec_apply(x, &(ts_command){.op = TS_OP_SLAB_LOST, .pool = pool, .slab_grant.slab = slab},
                  &answer);
    ts_log_on(TS_LOG_ERROR, &(ts_log_about){.pool = p->config.name},
              "pool '%s', slab %u isn't stored: what will lie there is lost at the next restart",
              p->config.name, slab);
    return status;
}

/* Makes the slab's memory here and now. A sentence in `why` if that can't be: the slab stays whose
 * it is. */
static ts_status make_slab(ts_exec *x, uint32_t pool, uint32_t slab, char *why, size_t why_bytes)
{
    ts_memory *memory = x->memory[pool];
    if (x->gpu_of[pool] == NULL && !ts_cgroup_allows(memory->export_bytes, why, why_bytes))
        return TS_ENOMEM;
    ts_block_sums_leave_slab(x->sums, pool, slab);
    ts_status status = ts_memory_renew(memory, slab, why, why_bytes);
    if (status != TS_OK)
        return status;
    if (x->slabs != NULL) /* it can be had again */
        x->slabs->failed &= ~((uint64_t)1 << pool);
    ts_exec_slab_goes(x, pool, slab);
    return store_slab(x, pool, slab, why, why_bytes);
}

/* What the begun step's tenant should have ahead. */
static void look_ahead(ts_exec *x, const ts_command *command)
{
    const ts_session *session = ts_engine_session(x->engine, command->session);
    if (session != NULL)
        order_ahead(x, command->pool, session->tenant);
}

void ts_exec_supply(ts_exec *x, ts_command *command, ts_answer *answer)
{
    if (ts_books_answered(x->books, x->engine, command, answer))
        return;
    for (;;) {
        ts_exec_apply(x, command, answer);
        if (answer->status == TS_OK && command->op == TS_OP_STEP_BEGIN)
            look_ahead(x, command);
        if (answer->status != TS_NEED_SLABS)
            return;
        const uint32_t pool = answer->need.pool, tenant = answer->need.tenant;
        /* One that may wait for room has its turn now, which it would lose. */
        if (!command->step_begin.wait && is_threads(x, pool) && order(x, pool, tenant)) {
            answer->status = TS_NEED_SWEEP;
            return;
        }
        if (ts_slab_supply_finish(x))
            continue;
        const uint32_t slab = ts_engine_next_slab(x->engine, pool, tenant);
        const char *name = x->engine->pools[pool].config.name;
        char why[TS_MESSAGE_BYTES];
        ts_status status = make_slab(x, pool, slab, why, sizeof why);
        if (status != TS_OK && ts_exec_leaves_to_next(x, pool)) {
            answer->status = TS_NEED_SWEEP;
            return;
        }
        if (status != TS_OK) {
            ts_command within = *command;
            within.step_begin.no_new_slabs = true; /* no other command needs slabs */
            ts_exec_apply(x, &within, answer);
            if (answer->status != TS_NEED_SLABS)
                return;
            ts_log_on(TS_LOG_ERROR, &(ts_log_about){.pool = name}, "pool '%s', slab %u: %s", name,
                      slab, why);
            return ts_refuse(answer, status, "pool '%s': %s", name, why);
        }
        ts_answer granted;
        ts_exec_apply(x,
                      &(ts_command){.op = TS_OP_SLAB_GRANT,
                                    .pool = pool,
                                    .slab_grant = {.slab = slab, .tenant = tenant}},
                      &granted);
        if (granted.status != TS_OK)
            return ts_refuse(answer, TS_EINTERNAL, "%s", granted.message);
        const uint32_t last = x->engine->pools[pool].books.slabs[slab].generation - 1;
        ts_stored_slab_forget(x->store, &(ts_stored_slab){x->memory[pool], pool, slab, last});
    }
}

void ts_slab_supply_stop(ts_exec *x)
{
    ts_slab_supply *s = x->slabs;
    if (s == NULL)
        return;
    pthread_mutex_lock(&s->lock);
    const bool stopped = s->stop;
    s->stop = true;
    pthread_cond_broadcast(&s->changed);
    pthread_mutex_unlock(&s->lock);
    if (!stopped)
        pthread_join(s->thread, NULL);
}

void ts_slab_supply_free(ts_exec *x)
{
    ts_slab_supply *s = x->slabs;
    if (s == NULL)
        return;
    ts_slab_supply_stop(x);
    pthread_cond_destroy(&s->changed);
    pthread_mutex_destroy(&s->lock);
    free(s);
    x->slabs = NULL;
}
