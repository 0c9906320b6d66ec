#define _GNU_SOURCE
#include "slab_returns.h"

#include "error.h"
#include "fd_client.h"
#include "revocations.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <unistd.h>

struct ts_slab_returns {
    ts_client *client;
    ts_give_back *give_back;
    ts_revocations *page;
    int bell, stop; /* eventfds */
    bool runs;      /* the thread */
    pthread_t thread;
    pthread_mutex_t lock;
};

/* Unmaps what the entry names, wherever the client has the pool open. */
static void deal_with(ts_slab_returns *r, const ts_revocation *what)
{
    pthread_mutex_lock(&r->lock);
    for (ts_pool *p = r->client->pools; p != NULL; p = p->next)
        if (p->index == what->pool && what->slab < p->num_slabs)
            r->give_back(p, what->slab, what->generation);
    pthread_mutex_unlock(&r->lock);
}

static void *returns_main(void *arg)
{
    ts_slab_returns *r = arg;
    struct pollfd wait[] = {{.fd = r->stop, .events = POLLIN}, {.fd = r->bell, .events = POLLIN}};
    uint32_t returned = r->page->returned;
    prctl(PR_SET_NAME, "ts-returns");
    for (;;) {
        uint64_t rung;
        if (poll(wait, 2, -1) < 0 && errno != EINTR)
            return NULL;
        if (wait[0].revents != 0)
            return NULL;
        if (read(r->bell, &rung, sizeof rung) < 0 && errno != EAGAIN && errno != EINTR)
            return NULL;
        while (returned != __atomic_load_n(&r->page->posted, __ATOMIC_ACQUIRE)) {
            const ts_revocation what = r->page->entries[returned % TS_REVOCATIONS];
            deal_with(r, &what);
            __atomic_store_n(&r->page->returned, ++returned, __ATOMIC_RELEASE);
        }
    }
}

/* Signals are for the program's own threads. */
static ts_status start_thread(ts_slab_returns *r)
{
    sigset_t all, before;
    r->stop = eventfd(0, EFD_CLOEXEC);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = r->stop < 0 ? ENOMEM : pthread_create(&r->thread, NULL, returns_main, r);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    r->runs = error == 0;
    return error == 0 ? TS_OK
                      : ts_fail(r->client, TS_ENOMEM,
                                "starting the thread that returns GPU memory: %s", strerror(error));
}

static void stop_thread(ts_slab_returns *r)
{
    ssize_t written = r->runs ? write(r->stop, &(uint64_t){1}, sizeof(uint64_t)) : 0;
    (void)written; /* an eventfd takes it */
    if (r->runs)
        pthread_join(r->thread, NULL);
    r->runs = false;
    if (r->stop >= 0)
        close(r->stop);
    r->stop = -1;
}

static void close_page(ts_slab_returns *r)
{
    if (r->page != MAP_FAILED)
        munmap(r->page, TS_REVOCATIONS_BYTES);
    if (r->bell >= 0)
        close(r->bell);
    r->page = MAP_FAILED;
    r->bell = -1;
}

/* Maps the page that the daemon writes into. */
static ts_status open_page(ts_slab_returns *r)
{
    ts_client *c = r->client;
    ts_handle_reply reply;
    int page;
    ts_status status = ts_handle_get(c, TS_HANDLE_REVOCATIONS, 0, 0, true, &reply, &page);
    if (status != TS_OK)
        return status;
    r->page = mmap(NULL, TS_REVOCATIONS_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, page, 0);
    const int error = errno;
    close(page);
    if (r->page == MAP_FAILED)
        return ts_fail(c, TS_ENOMEM, "mapping a page of revocations: %s", strerror(error));
    return ts_handle_get(c, TS_HANDLE_REVOCATION_BELL, 0, 0, true, &reply, &r->bell);
}

static void returns_free(ts_slab_returns *r)
{
    stop_thread(r);
    close_page(r);
    pthread_mutex_destroy(&r->lock);
    free(r);
}

/* The daemon is told that the slab is mapped; if it has become others', it is given back. */
static ts_status tell_mapped(ts_slab_returns *r, ts_pool *p, uint32_t slab)
{
    const uint32_t has = __atomic_load_n(&p->mapped[slab], __ATOMIC_ACQUIRE);
    ts_handle_reply reply;
    int fd;
    if (has == 0)
        return TS_OK;
    ts_status status =
        ts_handle_get(r->client, TS_HANDLE_SLAB, p->index, slab, p->written[slab], &reply, &fd);
    if (status == TS_OK)
        close(fd);
    else if (status != TS_EPERM)
        return status;
    if (status == TS_EPERM || reply.generation != has)
        r->give_back(p, slab, has);
    return TS_OK;
}

ts_status ts_slab_returns_reopen(ts_client *c)
{
    ts_slab_returns *r = c->returns;
    if (r == NULL)
        return TS_OK;
    stop_thread(r);
    close_page(r);
    ts_status status = open_page(r);
    for (ts_pool *p = c->pools; p != NULL && status == TS_OK; p = p->next)
        for (uint32_t i = 0; p->on_gpu && i < p->num_slabs && status == TS_OK; i++)
            status = tell_mapped(r, p, i);
    return status == TS_OK ? start_thread(r) : status;
}

ts_status ts_slab_returns_start(ts_client *c, ts_give_back *give_back)
{
    if (c->returns != NULL)
        return TS_OK;
    ts_slab_returns *r = malloc(sizeof *r);
    if (r == NULL)
        return ts_fail(c, TS_ENOMEM, "no memory for the return of GPU memory");
    *r = (ts_slab_returns){
        .client = c, .give_back = give_back, .page = MAP_FAILED, .bell = -1, .stop = -1};
    pthread_mutex_init(&r->lock, NULL);
    const uint64_t until_ms = ts_call_end_ms(c);
    ts_status status;
    do {
        close_page(r); /* the last daemon's */
        status = open_page(r);
    } while (ts_goes_on(c, status, until_ms));
    if (status == TS_OK)
        status = start_thread(r);
    if (status == TS_OK)
        c->returns = r;
    else
        returns_free(r);
    return status;
}

/* A forked child has no such thread, and a lock that may be held for ever. */
static bool has_thread(const ts_client *c)
{
    return c->returns != NULL && c->pid == getpid();
}

void ts_slab_returns_stop(ts_client *c)
{
    ts_slab_returns *r = c->returns;
    if (r == NULL)
        return;
    if (!has_thread(c)) {
        c->returns = NULL;
        return;
    }
    c->returns = NULL;
    returns_free(r);
}

void ts_slab_returns_lock(ts_client *c)
{
    if (has_thread(c))
        pthread_mutex_lock(&c->returns->lock);
}

void ts_slab_returns_unlock(ts_client *c)
{
    if (has_thread(c))
        pthread_mutex_unlock(&c->returns->lock);
}
