#include "stored_memory.h"

#include "log.h"
#include "test_point.h"

#include <stdio.h>
#include <unistd.h>

#define NAME_BYTES 33
#define BARRIER_MS 1000u
#define LAGGING_MS 10u

static const char *slab_name(char *name, const ts_stored_slab *s)
{
    snprintf(name, NAME_BYTES, "p%x.%x.%x", s->pool, s->slab, s->generation);
    return name;
}

static const char *exchange_name(char *name, uint64_t session, uint32_t number)
{
    snprintf(name, NAME_BYTES, "x%llx.%x", (unsigned long long)session, number);
    return name;
}

static const char *signals_name(char *name, uint64_t session)
{
    snprintf(name, NAME_BYTES, "s%llx", (unsigned long long)session);
    return name;
}

static const char *sums_name(char *name, uint32_t pool)
{
    snprintf(name, NAME_BYTES, "c%x", pool);
    return name;
}

/* Stores it, and waits until the holder has it: what a client is told of must be there after a
 * death at any instruction. A holder that doesn't answer in time, or has died, is the log's; the
 * engine's owner, who may be the caller, waits for it once, and briefly from then on. */
static ts_status put(ts_store *store, const char *name, int fd, char *why, size_t why_bytes)
{
    const uint32_t ms = ts_store_lags(store) ? LAGGING_MS : BARRIER_MS;
    ts_status status = ts_store_put(store, name, fd, why, why_bytes);
    if (status == TS_OK && !ts_store_barrier(store, ms) && ts_store_holds(store))
        ts_log(TS_LOG_WARNING, "whoever holds the memory has not taken '%s' within %u ms", name,
               ms);
    ts_point("stored", 0);
    return status;
}

ts_status ts_stored_slab_put(ts_store *store, const ts_stored_slab *s, char *why, size_t why_bytes)
{
    char name[NAME_BYTES];
    int fd;
    if (!s->memory->outlives || s->memory->ops->adopt == NULL)
        return TS_OK;
    ts_status status = ts_memory_export(s->memory, s->slab, true, &fd, why, why_bytes);
    if (status != TS_OK)
        return status;
    status = put(store, slab_name(name, s), fd, why, why_bytes);
    close(fd);
    return status;
}

void ts_stored_slab_forget(ts_store *store, const ts_stored_slab *s)
{
    char name[NAME_BYTES];
    if (s->memory->outlives && s->generation != 0)
        (void)ts_store_remove(store, slab_name(name, s));
}

ts_status ts_stored_slab_take(ts_store *store, const ts_stored_slab *s, char *why, size_t why_bytes)
{
    char name[NAME_BYTES];
    const int fd = ts_store_take(store, slab_name(name, s));
    if (fd >= 0)
        return ts_memory_adopt(s->memory, s->slab, fd, why, why_bytes);
    snprintf(why, why_bytes, "its memory isn't in the store");
    return TS_ENOENT;
}

ts_status ts_stored_exchange_put(ts_store *store, uint64_t session, uint32_t number, int fd,
                                 char *why, size_t why_bytes)
{
    char name[NAME_BYTES];
    return put(store, exchange_name(name, session, number), fd, why, why_bytes);
}

void ts_stored_exchange_forget(ts_store *store, uint64_t session, uint32_t number)
{
    char name[NAME_BYTES];
    if (store != NULL)
        (void)ts_store_remove(store, exchange_name(name, session, number));
}

int ts_stored_exchange_take(ts_store *store, uint64_t session, uint32_t number)
{
    char name[NAME_BYTES];
    return ts_store_take(store, exchange_name(name, session, number));
}

ts_status ts_stored_signals_put(ts_store *store, uint64_t session, int fd, char *why,
                                size_t why_bytes)
{
    char name[NAME_BYTES];
    return put(store, signals_name(name, session), fd, why, why_bytes);
}

void ts_stored_signals_forget(ts_store *store, uint64_t session)
{
    char name[NAME_BYTES];
    if (store != NULL)
        (void)ts_store_remove(store, signals_name(name, session));
}

int ts_stored_signals_take(ts_store *store, uint64_t session)
{
    char name[NAME_BYTES];
    return ts_store_take(store, signals_name(name, session));
}

ts_status ts_stored_sums_put(ts_store *store, uint32_t pool, int fd, char *why, size_t why_bytes)
{
    char name[NAME_BYTES];
    return put(store, sums_name(name, pool), fd, why, why_bytes);
}

void ts_stored_sums_forget(ts_store *store, uint32_t pool)
{
    char name[NAME_BYTES];
    (void)ts_store_remove(store, sums_name(name, pool));
}

int ts_stored_sums_take(ts_store *store, uint32_t pool)
{
    char name[NAME_BYTES];
    return ts_store_take(store, sums_name(name, pool));
}
