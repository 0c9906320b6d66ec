#include "stream_signals.h"

#include "error.h"
#include "fd_client.h"
#include "gpu_context.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

ts_status ts_signals_open(ts_client *c, const ts_pool *p)
{
    ts_cuda *cuda;
    ts_handle_reply reply;
    int fd;
    ts_status status = ts_client_cuda(c, p, &cuda);
    if (status != TS_OK || c->signals != NULL)
        return status;
    status = ts_handle_get(c, TS_HANDLE_SIGNALS, 0, 0, true, &reply, &fd);
    if (status != TS_OK)
        return status;
    void *page = mmap(NULL, TS_SIGNALS_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    int saved = errno;
    close(fd);
    if (page == MAP_FAILED)
        return ts_fail(c, TS_ENOMEM, "mapping a page of signals: %s", strerror(saved));
    status = ts_cuda_pin(c, cuda, page, TS_SIGNALS_BYTES, &c->signals_there);
    if (status != TS_OK) {
        munmap(page, TS_SIGNALS_BYTES);
        return status;
    }
    __atomic_store_n(&c->signals, page,
                     __ATOMIC_SEQ_CST); /* ts_signals_release_waiters may be looking */
    return TS_OK;
}

void ts_signals_release_waiters(ts_client *c)
{
    ts_signals *s = __atomic_load_n(&c->signals, __ATOMIC_SEQ_CST);
    if (s != NULL)
        __atomic_store_n(&s->completed, atomic_load(&c->runs_on_stream), __ATOMIC_SEQ_CST);
}

void ts_signals_close(ts_client *c)
{
    if (c->signals == NULL)
        return;
    ts_signals_release_waiters(c); /* unpinning waits for the device */
    ts_cuda_unpin(c->cuda, c->signals);
    munmap(c->signals, TS_SIGNALS_BYTES);
    c->signals = NULL;
}
