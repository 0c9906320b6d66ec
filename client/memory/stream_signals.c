#include "stream_signals.h"

#include "error.h"
#include "fd_client.h"
#include "gpu_context.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

/* Looks whether a daemon is at the runs that streams wait for. */
struct ts_signals_watch {
    ts_client *client;
    nng_aio *aio;       /* sleeps, and looks then */
    atomic_bool looks;  /* it does one of the two */
    uint32_t completed; /* as they were when it looked last */
    uint32_t daemons;
};

/* Whether there is no progress since the last look, though a stream may wait. */
static bool is_abandoned(ts_signals_watch *w)
{
    const ts_signals *page = w->client->signals;
    const uint32_t completed = __atomic_load_n(&page->completed, __ATOMIC_ACQUIRE);
    const uint32_t daemons = __atomic_load_n(&page->daemons, __ATOMIC_ACQUIRE);
    const bool waits = (int32_t)(completed - atomic_load(&w->client->runs_on_stream)) < 0;
    const bool stands = completed == w->completed && daemons == w->daemons;
    w->completed = completed;
    w->daemons = daemons;
    return waits && stands;
}

/* On a thread of NNG's. */
static void look(void *arg)
{
    ts_signals_watch *w = arg;
    ts_client *c = w->client;
    const bool stopped = nng_aio_result(w->aio) != 0;
    if (!stopped && atomic_load(&c->broken) && is_abandoned(w)) {
        atomic_store(&c->abandoned, true);
        ts_signals_release_waiters(c);
    } else if (!stopped && atomic_load(&c->broken)) {
        return nng_sleep_aio(ts_int_ms(c->timeout_ms), w->aio);
    }
    atomic_store(&w->looks, false);
    if (!stopped && atomic_load(&c->broken))
        ts_signals_daemon_gone(c); /* it has broken again just now, or one more run waits */
}

void ts_signals_daemon_gone(ts_client *c)
{
    ts_signals_watch *w = __atomic_load_n(&c->signals_watch, __ATOMIC_SEQ_CST);
    if (w == NULL || c->reconnect == NULL || !c->outlives || atomic_load(&c->abandoned))
        return ts_signals_release_waiters(c);
    if (atomic_exchange(&w->looks, true))
        return;
    (void)is_abandoned(w); /* from now on */
    nng_sleep_aio(ts_int_ms(c->timeout_ms), w->aio);
}

static ts_status watch_new(ts_client *c)
{
    ts_signals_watch *w = calloc(1, sizeof *w);
    if (w == NULL || nng_aio_alloc(&w->aio, look, w) != 0) {
        free(w);
        return ts_fail(c, TS_ENOMEM, "no memory for a watch over a page of signals");
    }
    w->client = c;
    __atomic_store_n(&c->signals_watch, w, __ATOMIC_SEQ_CST);
    return TS_OK;
}

static void watch_free(ts_client *c)
{
    ts_signals_watch *w = c->signals_watch;
    if (w == NULL)
        return;
    nng_aio_stop(w->aio);
    nng_aio_free(w->aio);
    c->signals_watch = NULL;
    free(w);
}

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
    status = watch_new(c);
    if (status != TS_OK)
        ts_signals_close(c);
    return status;
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
    if (c->pid != getpid()) { /* the words are the parent's, and its stream waits for them */
        c->signals = NULL;
        return;
    }
    watch_free(c);
    ts_signals_release_waiters(c); /* unpinning waits for the device */
    ts_cuda_unpin(c->cuda, c->signals);
    munmap(c->signals, TS_SIGNALS_BYTES);
    c->signals = NULL;
}
