#include "stored_memory.h"

#include "log.h"

#include <stdio.h>
#include <unistd.h>

#define NAME_BYTES 33

static const char *slab_name(char *name, uint32_t pool, uint32_t slab, uint32_t generation)
{
    snprintf(name, NAME_BYTES, "p%x.%x.%x", pool, slab, generation);
    return name;
}

static const char *exchange_name(char *name, uint64_t session, uint32_t number)
{
    snprintf(name, NAME_BYTES, "x%llx.%x", (unsigned long long)session, number);
    return name;
}

bool ts_stored_outlives(const ts_exec *x)
{
    return x->books != NULL;
}

ts_status ts_stored_slab_put(ts_exec *x, uint32_t pool, uint32_t slab, uint32_t generation,
                             char *why, size_t why_bytes)
{
    char name[NAME_BYTES];
    int fd;
    if (!ts_stored_outlives(x) || x->memory[pool]->ops->adopt == NULL)
        return TS_OK;
    ts_status status = ts_memory_export(x->memory[pool], slab, true, &fd, why, why_bytes);
    if (status != TS_OK)
        return status;
    status = ts_store_put(x->store, slab_name(name, pool, slab, generation), fd, why, why_bytes);
    close(fd);
    return status;
}

void ts_stored_slab_forget(ts_exec *x, uint32_t pool, uint32_t slab, uint32_t generation)
{
    char name[NAME_BYTES];
    if (ts_stored_outlives(x) && generation != 0)
        (void)ts_store_remove(x->store, slab_name(name, pool, slab, generation));
}

bool ts_stored_slab_take(ts_exec *x, uint32_t pool, uint32_t slab)
{
    const uint32_t generation = x->engine->pools[pool].books.slabs[slab].generation;
    char name[NAME_BYTES], why[TS_MESSAGE_BYTES] = "its memory isn't in the store";
    const int fd = ts_store_take(x->store, slab_name(name, pool, slab, generation));
    if (fd >= 0 && ts_memory_adopt(x->memory[pool], slab, fd, why, sizeof why) == TS_OK)
        return true;
    ts_log_on(TS_LOG_WARNING, &(ts_log_about){.pool = x->engine->pools[pool].config.name},
              "pool '%s', slab %u: %s", x->engine->pools[pool].config.name, slab, why);
    return false;
}

ts_status ts_stored_exchange_put(ts_exec *x, uint64_t session, uint32_t number, int fd, char *why,
                                 size_t why_bytes)
{
    char name[NAME_BYTES];
    return ts_store_put(x->store, exchange_name(name, session, number), fd, why, why_bytes);
}

void ts_stored_exchange_forget(ts_exec *x, uint64_t session, uint32_t number)
{
    char name[NAME_BYTES];
    if (ts_stored_outlives(x))
        (void)ts_store_remove(x->store, exchange_name(name, session, number));
}

int ts_stored_exchange_take(ts_exec *x, uint64_t session, uint32_t number)
{
    char name[NAME_BYTES];
    return ts_store_take(x->store, exchange_name(name, session, number));
}
