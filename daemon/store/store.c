#define _GNU_SOURCE
#include "store.h"

#include "clock.h"
#include "log.h"
#include "store_link.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

/* One of the descriptors that the daemon was started with. */
static void add_passed(void *arg, const char *name, int fd)
{
    ts_store *s = arg;
    if (!ts_store_name_ok(name)) {
        ts_store_listener *grown = reallocarray(s->listeners, s->num_listeners + 1, sizeof *grown);
        char *copy = strdup(name);
        if (grown != NULL)
            s->listeners = grown;
        if (grown == NULL || copy == NULL) {
            ts_log(TS_LOG_ERROR, "no memory for the passed socket %s", name);
            free(copy);
            close(fd);
            return;
        }
        grown[s->num_listeners++] = (ts_store_listener){.name = copy, .fd = fd};
        s->names_bytes += strlen(name) + 1;
        return;
    }
    ts_store_item *i =
        ts_store_find(&s->held, name) == NULL ? ts_store_item_new(s, TS_ITEM_PUT, name, fd) : NULL;
    if (i == NULL) {
        ts_log(TS_LOG_ERROR,
               "the stored descriptor %s is there twice, or there is no memory: one "
               "is left out",
               name);
        close(fd);
        return;
    }
    i->untaken = true;
    ts_store_count(s, name, 1);
    TAILQ_INSERT_TAIL(&s->held, i, next);
}

ts_store *ts_store_open(void)
{
    ts_store *s = calloc(1, sizeof *s);
    if (s == NULL)
        return NULL;
    pthread_mutex_init(&s->lock, NULL);
    TAILQ_INIT(&s->pending);
    TAILQ_INIT(&s->held);
    s->socket = s->death = -1;
    s->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    ts_store_passed(add_passed, s);
    ts_store_find_holder(s);
    (void)unsetenv(TS_ENV_FDSTORE);
    (void)unsetenv(TS_ENV_FDSTORE_OF_UNIT);
    (void)unsetenv(TS_ENV_SUPERVISOR);
    if (s->wake >= 0 && (s->holds || s->supervised))
        s->runs = pthread_create(&s->thread, NULL, ts_store_run, s) == 0;
    if (s->wake < 0 || s->runs != (s->holds || s->supervised)) {
        ts_store_close(s);
        return NULL;
    }
    return s;
}

static void free_list(struct ts_store_items *list)
{
    ts_store_item *i;
    while ((i = TAILQ_FIRST(list)) != NULL) {
        TAILQ_REMOVE(list, i, next);
        ts_store_item_free(i);
    }
}

void ts_store_close(ts_store *s)
{
    if (s == NULL)
        return;
    if (s->runs) {
        pthread_mutex_lock(&s->lock);
        s->ends = true;
        ts_store_wake(s);
        pthread_mutex_unlock(&s->lock);
        pthread_join(s->thread, NULL);
    }
    ts_store_lose(s);
    free_list(&s->pending);
    for (uint32_t i = 0; i < s->num_listeners; i++) {
        if (s->listeners[i].fd >= 0)
            close(s->listeners[i].fd);
        free(s->listeners[i].name);
    }
    free(s->listeners);
    if (s->wake >= 0)
        close(s->wake);
    pthread_mutex_destroy(&s->lock);
    free(s);
}

bool ts_store_holds(ts_store *s)
{
    if (s == NULL)
        return false;
    pthread_mutex_lock(&s->lock);
    const bool holds = s->holds;
    pthread_mutex_unlock(&s->lock);
    return holds;
}

bool ts_store_lags(const ts_store *s)
{
    return s != NULL && atomic_load(&s->lags);
}

bool ts_store_supervised(const ts_store *s)
{
    return s != NULL && s->supervised;
}

uint32_t ts_store_fds_max(ts_store *s)
{
    if (s == NULL)
        return 0;
    pthread_mutex_lock(&s->lock);
    const uint32_t most = s->holds ? s->fds_max : 0;
    pthread_mutex_unlock(&s->lock);
    return most;
}

uint32_t ts_store_fds(ts_store *s)
{
    if (s == NULL)
        return 0;
    pthread_mutex_lock(&s->lock);
    const uint32_t fds = s->fds;
    pthread_mutex_unlock(&s->lock);
    return fds;
}

static ts_store_item *find_any(ts_store *s, const char *name)
{
    ts_store_item *i = ts_store_find(&s->held, name);
    return i != NULL ? i : ts_store_find(&s->pending, name);
}

/* A stored one: where another supervisor may want it, the store keeps a duplicate. */
static int take_item(const ts_store *s, ts_store_item *i)
{
    const int fd = i->fd;
    i->untaken = false;
    i->fd = s->supervised ? fcntl(fd, F_DUPFD_CLOEXEC, 0) : -1;
    if (s->supervised && i->fd < 0) /* then both have the one that there is */
        ts_log(TS_LOG_ERROR, "%s can't be kept for another supervisor: %s", i->name,
               strerror(errno));
    return fd;
}

int ts_store_take(ts_store *s, const char *name)
{
    int fd = -1;
    if (s == NULL)
        return -1;
    pthread_mutex_lock(&s->lock);
    ts_store_item *i = find_any(s, name);
    if (i != NULL && i->untaken)
        fd = take_item(s, i);
    for (uint32_t n = 0; n < s->num_listeners && fd < 0; n++)
        if (strcmp(s->listeners[n].name, name) == 0) {
            fd = s->listeners[n].fd;
            s->listeners[n].fd = -1;
        }
    pthread_mutex_unlock(&s->lock);
    return fd;
}

void ts_store_each(ts_store *s, void (*each)(void *arg, const char *name), void *arg)
{
    char(*names)[TS_STORE_NAME_BYTES + 1];
    uint32_t n = 0;
    if (s == NULL)
        return;
    pthread_mutex_lock(&s->lock);
    names = calloc(s->fds + 1, sizeof *names);
    struct ts_store_items *lists[] = {&s->held, &s->pending};
    for (uint32_t l = 0; names != NULL && l < 2; l++) {
        ts_store_item *i;
        TAILQ_FOREACH(i, lists[l], next)
        {
            if (i->kind == TS_ITEM_PUT && i->untaken)
                memcpy(names[n++], i->name, sizeof *names);
        }
    }
    pthread_mutex_unlock(&s->lock);
    if (names == NULL)
        ts_log(TS_LOG_ERROR, "no memory for the names of stored descriptors");
    for (uint32_t k = 0; k < n; k++)
        each(arg, names[k]);
    free(names);
}

void ts_store_reserve(ts_store *s, uint32_t fds)
{
    if (s == NULL)
        return;
    pthread_mutex_lock(&s->lock);
    s->reserved = fds;
    pthread_mutex_unlock(&s->lock);
}

/* Whether a descriptor of this name may be stored while room for `reserved` others is kept free. */
static ts_status check_put(ts_store *s, const char *name, uint32_t reserved, char *why,
                           size_t bytes)
{
    const size_t others = reserved * (TS_STORE_NAME_BYTES + 1u);
    char kept[48] = "";
    if (reserved > 0)
        snprintf(kept, sizeof kept, ", %u of them for the daemon's books", reserved);
    if (find_any(s, name) != NULL) {
        snprintf(why, bytes, "a descriptor is stored under '%s' already", name);
        return TS_EEXIST;
    }
    if ((uint64_t)s->fds + reserved >= s->fds_max) {
        snprintf(why, bytes,
                 "'%s' can't be stored: the holder takes %u descriptors%s, and has %u "
                 "(FileDescriptorStoreMax= of the unit)",
                 name, s->fds_max, kept, s->fds);
        return TS_ENOSPC;
    }
    if (s->names_bytes + strlen(name) + 1 + others > TS_STORE_NAMES_BYTES) {
        snprintf(why, bytes,
                 "'%s' can't be stored: the names of %u descriptors have %zu bytes, and %d are "
                 "the most",
                 name, s->fds, s->names_bytes, TS_STORE_NAMES_BYTES);
        return TS_ENOSPC;
    }
    return TS_OK;
}

static ts_status put(ts_store *s, const char *name, int fd, bool first, char *why, size_t bytes)
{
    if (!ts_store_name_ok(name)) {
        snprintf(why, bytes,
                 "'%.64s' is no name of a stored descriptor: 1 to %d of a-z, 0-9 and '.', without "
                 "'.socket' at the end",
                 name, TS_STORE_NAME_BYTES);
        return TS_EINVAL;
    }
    if (s == NULL || !s->runs) {
        snprintf(why, bytes, "'%s' isn't stored: there is no store", name);
        return TS_ECONN;
    }
    pthread_mutex_lock(&s->lock);
    ts_status status = check_put(s, name, first ? 0 : s->reserved, why, bytes);
    if (status == TS_OK && !s->holds && !s->supervised) {
        snprintf(why, bytes, "'%s' isn't stored: the store was lost", name);
        status = TS_ECONN;
    }
    if (status == TS_OK) {
        const int copy = fcntl(fd, F_DUPFD_CLOEXEC, 0);
        const int error = errno;
        ts_store_item *i = copy >= 0 ? ts_store_item_new(s, TS_ITEM_PUT, name, copy) : NULL;
        if (i != NULL) {
            ts_store_count(s, name, 1);
            TAILQ_INSERT_TAIL(&s->pending, i, next);
            ts_store_wake(s);
        } else {
            status = copy >= 0 || error != EBADF ? TS_ENOMEM : TS_EINVAL;
            snprintf(why, bytes, "descriptor %d can't be stored as '%s': %s", fd, name,
                     copy >= 0 ? "out of memory" : strerror(error));
            if (copy >= 0)
                close(copy);
        }
    }
    pthread_mutex_unlock(&s->lock);
    return status;
}

ts_status ts_store_put(ts_store *s, const char *name, int fd, char *why, size_t bytes)
{
    return put(s, name, fd, false, why, bytes);
}

ts_status ts_store_put_reserved(ts_store *s, const char *name, int fd, char *why, size_t bytes)
{
    return put(s, name, fd, true, why, bytes);
}

ts_status ts_store_remove(ts_store *s, const char *name)
{
    ts_status status = TS_ENOENT;
    if (s == NULL || !s->runs)
        return TS_ECONN;
    pthread_mutex_lock(&s->lock);
    ts_store_item *i = ts_store_find(&s->held, name);
    if (i != NULL) {
        TAILQ_REMOVE(&s->held, i, next);
        ts_store_count(s, name, -1);
        if (i->fd >= 0)
            close(i->fd);
        i->fd = -1;
        i->kind = TS_ITEM_REMOVE;
        i->id = ++s->ids;
        TAILQ_INSERT_TAIL(&s->pending, i, next);
        ts_store_wake(s);
        status = TS_OK;
    } else if ((i = ts_store_find(&s->pending, name)) != NULL) { /* no holder has been told of it */
        TAILQ_REMOVE(&s->pending, i, next);
        ts_store_count(s, name, -1);
        ts_store_item_free(i);
        status = TS_OK;
    }
    pthread_mutex_unlock(&s->lock);
    return status;
}

/* A barrier that nobody waits for any more needn't be sent. */
static void forget_barrier(ts_store *s, uint64_t id)
{
    ts_store_item *i;
    pthread_mutex_lock(&s->lock);
    TAILQ_FOREACH(i, &s->pending, next)
    {
        if (i->id == id) {
            TAILQ_REMOVE(&s->pending, i, next);
            ts_store_item_free(i);
            break;
        }
    }
    pthread_mutex_unlock(&s->lock);
}

/* Whether the pipe's other end is written or closed within the time. */
static bool await_pipe(int fd, uint32_t timeout_ms)
{
    const uint64_t until = ts_now_ms() + timeout_ms;
    for (;;) {
        const uint64_t now = ts_now_ms();
        const uint64_t left = now < until ? until - now : 0;
        struct pollfd p = {.fd = fd, .events = POLLIN};
        const int n = poll(&p, 1, left < INT32_MAX ? (int)left : INT32_MAX);
        if (n > 0)
            return true;
        if ((n < 0 && errno != EINTR) || left == 0)
            return false;
    }
}

bool ts_store_barrier(ts_store *s, uint32_t timeout_ms)
{
    int ends[2];
    uint64_t id = 0;
    char byte;
    if (s == NULL || !s->runs || pipe2(ends, O_CLOEXEC | O_NONBLOCK) != 0)
        return false;
    pthread_mutex_lock(&s->lock);
    ts_store_item *i = s->holds ? ts_store_item_new(s, TS_ITEM_BARRIER, "", ends[1]) : NULL;
    if (i != NULL) {
        id = i->id;
        TAILQ_INSERT_TAIL(&s->pending, i, next);
        ts_store_wake(s);
    } else {
        close(ends[1]);
    }
    pthread_mutex_unlock(&s->lock);
    bool done = i != NULL && await_pipe(ends[0], timeout_ms);
    if (i != NULL && !done)
        forget_barrier(s, id);
    if (i != NULL)
        atomic_store(&s->lags, !done);
    if (done) {
        /* A dying supervisor closes the pipe, too: only its byte is an answer. systemd has none. */
        const ssize_t n = read(ends[0], &byte, 1);
        done = n == 1 || (n == 0 && !s->supervised && ts_store_holds(s));
    }
    close(ends[0]);
    return done;
}

void ts_store_on_change(ts_store *s, void (*changed)(void *arg, bool holds), void *arg)
{
    if (s == NULL)
        return;
    pthread_mutex_lock(&s->lock);
    s->changed = changed;
    s->changed_arg = arg;
    pthread_mutex_unlock(&s->lock);
}
