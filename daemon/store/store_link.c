#define _GNU_SOURCE
#include "store_link.h"

#include "clock.h"
#include "log.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#define RETRY_MS 10       /* the kernel is short of something */
#define RECONNECT_MS 1000 /* a supervisor is looked for */

void ts_store_item_free(ts_store_item *i)
{
    if (i->fd >= 0)
        close(i->fd);
    free(i);
}

ts_store_item *ts_store_item_new(ts_store *s, ts_store_item_kind kind, const char *name, int fd)
{
    ts_store_item *i = calloc(1, sizeof *i);
    if (i == NULL)
        return NULL;
    i->kind = kind;
    i->id = ++s->ids;
    i->fd = fd;
    snprintf(i->name, sizeof i->name, "%s", name);
    return i;
}

ts_store_item *ts_store_find(struct ts_store_items *list, const char *name)
{
    ts_store_item *i;
    TAILQ_FOREACH(i, list, next)
    {
        if (i->kind == TS_ITEM_PUT && strcmp(i->name, name) == 0)
            return i;
    }
    return NULL;
}

void ts_store_count(ts_store *s, const char *name, int by)
{
    s->fds += (uint32_t)by;
    s->names_bytes += (size_t)((ssize_t)(strlen(name) + 1) * by);
}

void ts_store_wake(ts_store *s)
{
    const uint64_t one = 1;
    if (write(s->wake, &one, sizeof one) < 0) {
        /* it is full: the thread has not looked yet */
    }
}

void ts_store_lose(ts_store *s)
{
    ts_store_item *i, *after;
    if (s->socket >= 0)
        close(s->socket);
    if (s->death >= 0)
        close(s->death);
    s->socket = s->death = -1;
    s->holds = false;
    s->look_ms = ts_now_ms();
    TAILQ_CONCAT(&s->held, &s->pending, next);
    TAILQ_CONCAT(&s->pending, &s->held, next);
    for (i = TAILQ_FIRST(&s->pending); i != NULL; i = after) {
        after = TAILQ_NEXT(i, next);
        if (i->kind == TS_ITEM_PUT && i->fd >= 0)
            continue;
        if (i->kind == TS_ITEM_PUT)
            ts_store_count(s, i->name, -1);
        TAILQ_REMOVE(&s->pending, i, next);
        ts_store_item_free(i);
    }
}

/* What was sent is the holder's. */
static void sent(ts_store *s, ts_store_item *i)
{
    TAILQ_REMOVE(&s->pending, i, next);
    if (i->kind != TS_ITEM_PUT) {
        ts_store_item_free(i);
        return;
    }
    if (!s->supervised && !i->untaken) { /* a service manager isn't followed by another */
        close(i->fd);
        i->fd = -1;
    }
    TAILQ_INSERT_TAIL(&s->held, i, next);
}

static int send_item(const ts_store *s, const ts_store_item *i)
{
    char text[96];
    if (i->kind == TS_ITEM_BARRIER)
        return ts_store_send(s->socket, "BARRIER=1", i->fd);
    if (i->kind == TS_ITEM_REMOVE)
        snprintf(text, sizeof text, "FDSTOREREMOVE=1\nFDNAME=%s", i->name);
    else
        snprintf(text, sizeof text, "FDSTORE=1\nFDNAME=%s\nFDPOLL=0", i->name);
    return ts_store_send(s->socket, text, i->kind == TS_ITEM_PUT ? i->fd : -1);
}

/* Sends what can be sent. Returns for how many ms to wait before the next try (-1: until something
 * happens) and whether that is the socket's having room. */
static int flush(ts_store *s, bool *room)
{
    ts_store_item *i, *after;
    *room = false;
    for (i = TAILQ_FIRST(&s->pending); s->holds && i != NULL; i = after) {
        after = TAILQ_NEXT(i, next);
        const int error = send_item(s, i);
        switch (error) {
        case 0:
            sent(s, i);
            break;
        case EAGAIN:
            *room = true;
            return -1;
        case ENOBUFS:
        case ENOMEM:
        case ETOOMANYREFS: /* too many descriptors of this user are on their way */
            return RETRY_MS;
        default:
            ts_log(TS_LOG_ERROR, "the holder of the daemon's descriptors can't be told: %s",
                   strerror(error));
            ts_store_lose(s);
        }
    }
    return -1;
}

/* Whether the other end of this connection is a process of the same user. */
static bool is_ours(int socket)
{
    struct ucred peer;
    socklen_t length = sizeof peer;
    return getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &peer, &length) == 0 &&
           peer.uid == geteuid();
}

/* Looks for a supervisor; it greets when it takes us. Returns ms until the next try. */
static int look(ts_store *s)
{
    const uint64_t now = ts_now_ms();
    if (!s->supervised || s->socket >= 0)
        return -1;
    if (now < s->look_ms)
        return (int)(s->look_ms - now);
    s->look_ms = now + RECONNECT_MS;
    s->socket = ts_store_connect(s->supervisor, SOCK_SEQPACKET);
    if (s->socket >= 0 && !is_ours(s->socket)) {
        ts_log(TS_LOG_WARNING, "%s is another user's: it isn't told anything", s->supervisor);
        close(s->socket);
        s->socket = -1;
    }
    return s->socket >= 0 ? -1 : RECONNECT_MS;
}

/* The connection to a supervisor is readable: its greeting, or its end. */
static void hear(ts_store *s)
{
    static const char greeting[] = TS_ENV_FDSTORE "=";
    ts_store_datagram d;
    const int came = ts_store_receive(s->socket, &d);
    if (came < 0 && errno == EAGAIN)
        return;
    const int64_t most =
        came > 0 && d.fault == NULL && strncmp(d.text, greeting, sizeof greeting - 1) == 0
            ? ts_store_number(d.text + sizeof greeting - 1, UINT32_MAX)
            : -1;
    if (d.fd >= 0)
        close(d.fd);
    if (s->holds || most <= 0) {
        const bool was = s->holds;
        ts_store_lose(s);
        if (!was) /* nobody who knows us: not again at once */
            s->look_ms += RECONNECT_MS;
        return;
    }
    s->fds_max = (uint32_t)most;
    s->holds = true;
}

static void say_change(const ts_store *s)
{
    if (s->holds)
        ts_log(TS_LOG_INFO, "a new supervisor takes over %u descriptors", s->fds);
    else if (s->supervised)
        ts_log(TS_LOG_ERROR,
               "no store: the supervisor is dead. The daemon goes on, but its own death would lose "
               "everything until `tinyserved --supervise` is started again");
    else
        ts_log(TS_LOG_ERROR, "no store: the daemon's death would lose everything");
}

/* Waits for something to do. */
static void await(ts_store *s, bool room, int timeout)
{
    enum { WAKE, SOCKET, DEATH };
    struct pollfd p[] = {
        [WAKE] = {.fd = s->wake, .events = POLLIN},
        /* A supervisor's connection ends; a datagram socket is never told. */
        [SOCKET] = {.fd = room || s->death < 0 ? s->socket : -1,
                    .events = (short)((room ? POLLOUT : 0) |
                                      (s->supervised && s->death < 0 ? POLLIN : 0))},
        [DEATH] = {.fd = s->death, .events = POLLIN},
    };
    uint64_t times;
    pthread_mutex_unlock(&s->lock);
    (void)poll(p, sizeof p / sizeof *p, timeout);
    if (p[WAKE].revents != 0 && read(s->wake, &times, sizeof times) < 0) {
        /* another time */
    }
    pthread_mutex_lock(&s->lock);
    if (p[DEATH].revents != 0)
        ts_store_lose(s);
    else if (s->supervised && s->death < 0 && (p[SOCKET].revents & ~POLLOUT) != 0)
        hear(s);
}

void *ts_store_run(void *arg)
{
    ts_store *s = arg;
    prctl(PR_SET_NAME, "store");
    pthread_mutex_lock(&s->lock);
    bool held = true; /* what was told last */
    while (!s->ends) {
        bool room;
        int timeout = flush(s, &room);
        if (s->holds != held) {
            held = s->holds;
            void (*changed)(void *, bool) = s->changed;
            void *changed_arg = s->changed_arg;
            say_change(s);
            pthread_mutex_unlock(&s->lock);
            if (changed != NULL)
                changed(changed_arg, held);
            pthread_mutex_lock(&s->lock);
            continue;
        }
        const int again = look(s);
        if (timeout < 0)
            timeout = again;
        await(s, room, timeout);
    }
    pthread_mutex_unlock(&s->lock);
    return NULL;
}

void ts_store_find_holder(ts_store *s)
{
    const char *socket = getenv("NOTIFY_SOCKET"), *most = getenv(TS_ENV_FDSTORE),
               *supervisor = getenv(TS_ENV_SUPERVISOR);
    if (most == NULL)
        most = getenv(TS_ENV_FDSTORE_OF_UNIT);
    const int64_t fds = most != NULL ? ts_store_number(most, UINT32_MAX) : 0;
    if (socket == NULL || fds <= 0)
        return;
    s->supervised = supervisor != NULL && strlen(supervisor) < sizeof s->supervisor;
    if (s->supervised) {
        const pid_t parent = getppid();
        strcpy(s->supervisor, supervisor);
        s->death = (int)syscall(SYS_pidfd_open, parent, 0);
        /* It may have died meanwhile: then the next one is found as if we had seen that. */
        if (s->death >= 0 && getppid() != parent) {
            close(s->death);
            s->death = -1;
        }
    }
    s->fds_max = (uint32_t)fds;
    s->socket = s->supervised && s->death < 0 ? -1 : ts_store_connect(socket, SOCK_DGRAM);
    s->holds = s->socket >= 0;
    if (!s->holds && !s->supervised)
        ts_log(TS_LOG_ERROR, "the holder of the daemon's descriptors can't be reached at %s: %s",
               socket, strerror(errno));
    if (!s->holds)
        ts_store_lose(s);
}
