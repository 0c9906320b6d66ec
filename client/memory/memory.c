/* Host memory that is mapped into this process, and who holds it. */
#include "client.h"

#include <stdlib.h>
#include <sys/mman.h>

struct ts_memory {
    atomic_uint holders;
    void *base;
    size_t bytes;
};

ts_memory *ts_memory_new(void *base, size_t bytes)
{
    ts_memory *m = malloc(sizeof *m);
    if (m == NULL)
        return NULL;
    atomic_init(&m->holders, 1);
    m->base = base;
    m->bytes = bytes;
    return m;
}

static ts_memory *hold(ts_memory *m)
{
    if (m != NULL)
        atomic_fetch_add_explicit(&m->holders, 1, memory_order_relaxed);
    return m;
}

void ts_memory_release(ts_memory *m)
{
    if (m == NULL || atomic_fetch_sub_explicit(&m->holders, 1, memory_order_acq_rel) > 1)
        return;
    munmap(m->base, m->bytes);
    free(m);
}

ts_memory *ts_exchange_hold(ts_client *c)
{
    return hold(c->exchange_memory);
}

ts_memory *ts_pool_hold(ts_pool *p)
{
    return hold(p->reserved);
}
