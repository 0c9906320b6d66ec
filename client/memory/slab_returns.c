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
static int start_thread(ts_slab_returns *r)
{
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = pthread_create(&r->thread, NULL, returns_main, r);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return error;
}

static void returns_free(ts_slab_returns *r)
{
    if (r->page != MAP_FAILED)
        munmap(r->page, TS_REVOCATIONS_BYTES);
    if (r->bell >= 0)
        close(r->bell);
    if (r->stop >= 0)
        close(r->stop);
    pthread_mutex_destroy(&r->lock);
    free(r);
}

ts_status ts_slab_returns_start(ts_client *c, ts_give_back *give_back)
{
    if (c->returns != NULL)
        return TS_OK;
    ts_slab_returns *r = malloc(sizeof *r);
    if (r == NULL)
        return ts_fail(c, TS_ENOMEM, "no memory for the return of GPU memory");
    *r = (ts_slab_returns){.client = c, .give_back = give_back, .page = MAP_FAILED, .bell = -1};
    pthread_mutex_init(&r->lock, NULL);
    r->stop = eventfd(0, EFD_CLOEXEC);
    ts_handle_reply reply;
    int page;
    ts_status status = ts_handle_get(c, TS_HANDLE_REVOCATIONS, 0, 0, true, &reply, &page);
    if (status == TS_OK) {
        r->page = mmap(NULL, TS_REVOCATIONS_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, page, 0);
        close(page);
        status = ts_handle_get(c, TS_HANDLE_REVOCATION_BELL, 0, 0, true, &reply, &r->bell);
    }
    int error = r->page == MAP_FAILED || r->stop < 0 ? ENOMEM : 0;
    if (status == TS_OK && error == 0)
        error = start_thread(r);
    if (status == TS_OK && error != 0)
        status = ts_fail(c, TS_ENOMEM, "starting the thread that returns GPU memory: %s",
                         strerror(error));
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
    ssize_t written = write(r->stop, &(uint64_t){1}, sizeof(uint64_t));
    (void)written; /* an eventfd takes it */
    pthread_join(r->thread, NULL);
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
