/* Host memory that is mapped into this process: what it fills for the daemon, and who holds what.
 */
#define _GNU_SOURCE
#include "host_memory.h"

#include "error.h"
#include "fd_client.h"
#include "file_pages.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

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

ts_status ts_memory_fill(ts_client *c, enum ts_handle_kind kind, const char *what, size_t bytes,
                         void **base)
{
    int fd, error;
    ts_status status = ts_handle_new(c, kind, bytes, &fd);
    if (status != TS_OK)
        return status;
    error = ts_file_take_pages(fd, bytes);
    if (error == 0) {
        *base = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        error = *base == MAP_FAILED ? errno : 0;
    }
    close(fd);
    if (error != 0)
        return ts_fail(c, TS_ENOMEM, "%s of %zu bytes: %s", what, bytes, strerror(error));
    return TS_OK;
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
