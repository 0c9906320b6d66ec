#define _GNU_SOURCE
#include "fd_server.h"

#include "clock.h"
#include "fd_export.h"
#include "log.h"
#include "passed_fds.h"
#include "tinyserve_version.h"
#include "unconst.h"
#include "unix_listen.h"

#include <errno.h>
#include <linux/sockios.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <unistd.h>

#define TICK_MS 1000
#define EPOLL_BATCH 64
#define CLOSED_BATCH 4096 /* all that there is to see, as a rule */
#define UNREAD_MOST 2u

/* A connection of a client. */
typedef struct arrival {
    struct arrival *next;
    int fd;
    ts_guest guest;
    uint64_t deadline_ms; /* to ask for something of a session's by; 0: it has */
    uint32_t unread;      /* requests in a row that came while an answer lay unread */
} arrival;

struct ts_fd_server {
    ts_service *service;
    pthread_t thread;
    char path[128];
    uint32_t idle_ms;
    int listener, stop, epoll;
    bool paused; /* accepting, until the next tick: there was no descriptor */
    ts_crowd crowd;
    arrival *arrivals;
    sem_t answered;
    ts_hurry hurry; /* the thread's, where the kernel doesn't refuse descriptors; else all 0 */
    bool refuses;   /* descriptors that peers pass */
};

/* ---- answers ---- */

/* A request on its way through the engine, while this thread waits. */
typedef struct pending_ask {
    ts_handle_ask ask; /* first: the service hands it back */
    sem_t *answered;
} pending_ask;

static void answered(ts_handle_ask *ask)
{
    sem_post(((pending_ask *)ask)->answered);
}

/* False: the client can't have it. */
static bool send_reply(int to, const ts_handle_ask *ask)
{
    struct iovec data = {.iov_base = ts_unconst(&ask->reply), .iov_len = sizeof ask->reply};
    union {
        struct cmsghdr header;
        char bytes[CMSG_SPACE(sizeof(int))];
    } control = {0};
    struct msghdr message = {.msg_iov = &data, .msg_iovlen = 1};
    if (ask->fd >= 0) {
        message.msg_control = control.bytes;
        message.msg_controllen = sizeof control.bytes;
        control.header = (struct cmsghdr){
            .cmsg_len = CMSG_LEN(sizeof(int)), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS};
        memcpy(CMSG_DATA(&control.header), &ask->fd, sizeof ask->fd);
    }
    ssize_t sent;
    do
        sent = sendmsg(to, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
    while (sent < 0 && errno == EINTR);
    return sent >= 0;
}

static void __attribute__((format(printf, 3, 4)))
refuse(ts_handle_reply *reply, ts_status status, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    reply->status = (uint32_t)status;
    vsnprintf(reply->message, sizeof reply->message, format, args);
    va_end(args);
}

/* Tells the client why it may not stay. What it has sent is read: a socket that is closed with
 * something unread in it takes the answer back. */
static void send_off(int fd, ts_status status, const char *sentence)
{
    ts_handle_request unread;
    ts_handle_ask ask = {.fd = -1, .reply = {.magic = TS_HANDLE_MAGIC, .protocol = TS_PROTOCOL}};
    refuse(&ask.reply, status, "%s", sentence);
    (void)send_reply(fd, &ask);
    (void)shutdown(fd, SHUT_RD);
    while (recv(fd, &unread, sizeof unread, MSG_DONTWAIT) > 0)
        ;
}

/* ---- connections ---- */

static void drop(ts_fd_server *h, arrival **at)
{
    arrival *a = *at;
    /* NOLINTNEXTLINE(clang-analyzer-core.NullDereference): an arrival is at *at */
    *at = a->next;
    ts_crowd_leave(&h->crowd, &a->guest);
    ts_unwatch(h->epoll, a->fd);
    close(a->fd);
    free(a);
}

static arrival **find(ts_fd_server *h, const arrival *a)
{
    arrival **at = &h->arrivals;
    while (*at != NULL && *at != a)
        at = &(*at)->next;
    return at;
}

/* Answers a request of `got` bytes; false: the connection is over. */
static bool answer(ts_fd_server *h, arrival *a, ts_handle_ask *ask, size_t got)
{
    const ts_handle_request *r = &ask->request;
    ask->reply = (ts_handle_reply){.magic = TS_HANDLE_MAGIC, .protocol = TS_PROTOCOL};
    if (got < 8 || r->magic != TS_HANDLE_MAGIC)
        return false;
    if (got != sizeof *r || r->protocol != TS_PROTOCOL) {
        char sentence[TS_MESSAGE_BYTES];
        snprintf(sentence, sizeof sentence,
                 "protocol version %u; tinyserved " TS_VERSION
                 " speaks %u: the older of them must be upgraded, and then started again",
                 r->protocol, TS_PROTOCOL);
        send_off(a->fd, TS_EPROTO, sentence);
        ts_log(TS_LOG_WARNING, "a client of uid %u speaks protocol version %u; this daemon %u",
               a->guest.uid, r->protocol, TS_PROTOCOL);
        return false;
    }
    ask->work.run = ts_fd_export;
    ts_queue_put(&h->service->exec.queue, &ask->work);
    while (sem_wait(&h->answered) != 0)
        ;
    if (ask->reply.status == TS_OK)
        a->deadline_ms = 0;
    ask->reply.protocol = TS_PROTOCOL;
    ask->reply.tag = r->tag;
    return send_reply(a->fd, ask);
}

/*
 * Whether the client reads its answers; the one before may have come after it stopped waiting.
 * Descriptors that it hasn't received count against the daemon's limit of them all the same: the
 * kernel sends nobody any more when they are too many.
 */
static bool reads_answers(arrival *a)
{
    int bytes = 0;
    bool unread = ioctl(a->fd, SIOCOUTQ, &bytes) == 0 && bytes > 0;
    a->unread = unread ? a->unread + 1 : 0;
    return a->unread < UNREAD_MOST;
}

/* Answers what came in on the connection; false: it is over. */
static bool serve(ts_fd_server *h, arrival *a)
{
    pending_ask pending = {.ask = {.uid = a->guest.uid, .done = answered, .fd = -1},
                           .answered = &h->answered};
    ts_handle_ask *ask = &pending.ask;
    ssize_t got = recv(a->fd, &ask->request, sizeof ask->request, MSG_DONTWAIT | MSG_TRUNC);
    if (got < 0)
        return errno == EAGAIN || errno == EINTR;
    bool stays = reads_answers(a) && answer(h, a, ask, (size_t)got);
    if (ask->fd >= 0)
        close(ask->fd);
    return stays;
}

static void pause_accepting(ts_fd_server *h, bool pause)
{
    h->paused = pause;
    ts_accept_pause(h->epoll, h->listener, &h->listener, pause);
}

/* Ends what has closed by now, which epoll may yet have to tell. Between the events of one turn
 * and the next, since those may name what this frees. */
static void end_closed(ts_fd_server *h)
{
    struct epoll_event events[CLOSED_BATCH];
    int n = epoll_wait(h->epoll, events, CLOSED_BATCH, 0);
    for (int i = 0; i < n; i++) {
        arrival *a = events[i].data.ptr;
        if ((void *)a != &h->stop && (void *)a != &h->listener &&
            (events[i].events & (EPOLLHUP | EPOLLERR)) != 0)
            drop(h, find(h, a));
    }
}

/* A client may have closed one connection before it made this one: before this is turned away,
 * the daemon looks whether it has. */
static bool may_enter(ts_fd_server *h, const ts_guest *guest, char *why, size_t why_bytes)
{
    if (ts_crowd_enter(&h->crowd, guest, why, why_bytes))
        return true;
    end_closed(h);
    return ts_crowd_enter(&h->crowd, guest, why, why_bytes);
}

static void accept_one(ts_fd_server *h)
{
    char why[TS_MESSAGE_BYTES];
    int fd = accept4(h->listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (fd < 0) {
        if (ts_accept_must_pause(errno))
            pause_accepting(h, true);
        return;
    }
    arrival *a = calloc(1, sizeof *a);
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = a};
    if (a == NULL || !ts_guest_of(fd, &a->guest))
        goto refuse;
    a->guest.is_operator = ts_service_is_operator(h->service, a->guest.uid, a->guest.gid);
    if (!may_enter(h, &a->guest, why, sizeof why)) {
        ts_log(TS_LOG_WARNING, "a connection of uid %u was turned away: %s", a->guest.uid, why);
        send_off(fd, TS_EQUOTA, why);
        goto refuse;
    }
    a->fd = fd;
    a->deadline_ms = ts_now_ms() + h->idle_ms;
    a->next = h->arrivals;
    h->arrivals = a;
    if (epoll_ctl(h->epoll, EPOLL_CTL_ADD, fd, &event) != 0)
        drop(h, &h->arrivals);
    return;
refuse:
    free(a);
    close(fd);
}

/* Ends what has had its time. */
static void on_tick(ts_fd_server *h, uint64_t now_ms)
{
    for (arrival **at = &h->arrivals, *a; (a = *at) != NULL;)
        if (a->deadline_ms != 0 && now_ms >= a->deadline_ms)
            drop(h, at);
        else
            at = &a->next;
    if (h->paused)
        pause_accepting(h, false);
}

static void *server_main(void *arg)
{
    prctl(PR_SET_NAME, "handles");
    ts_fd_server *h = arg;
    struct epoll_event events[EPOLL_BATCH];
    uint64_t next_tick = ts_now_ms() + TICK_MS;
    if (!h->refuses && !ts_hurry_init(&h->hurry))
        ts_log(TS_LOG_ERROR, "no timer for the handle socket: %s", strerror(errno));
    for (;;) {
        uint64_t now = ts_now_ms();
        if (now >= next_tick) {
            on_tick(h, now);
            next_tick = now + TICK_MS;
        }
        ts_hurry_end(&h->hurry);
        int n = epoll_wait(h->epoll, events, EPOLL_BATCH, (int)(next_tick - now));
        ts_hurry_begin(&h->hurry);
        bool arrives = false;
        for (int i = 0; i < n; i++) {
            arrival *a = events[i].data.ptr;
            if ((void *)a == &h->stop) {
                ts_hurry_fini(&h->hurry);
                return NULL;
            }
            if ((void *)a == &h->listener)
                arrives = true;
            else if ((events[i].events & EPOLLERR) != 0 || !serve(h, a))
                drop(h, find(h, a));
        }
        if (arrives)
            accept_one(h);
    }
}

/* ---- life ---- */

static void server_free(ts_fd_server *h)
{
    if (!h->refuses)
        (void)ts_hurry_init(&h->hurry);
    ts_hurry_begin(&h->hurry);
    while (h->arrivals != NULL)
        drop(h, &h->arrivals);
    if (h->listener >= 0)
        close(h->listener);
    ts_hurry_fini(&h->hurry);
    if (h->stop >= 0)
        close(h->stop);
    if (h->epoll >= 0)
        close(h->epoll);
    ts_crowd_fini(&h->crowd);
    sem_destroy(&h->answered);
    free(h);
}

ts_status ts_fd_server_start(ts_service *service, const ts_fd_server_options *o, ts_fd_server **out,
                             char *why, size_t why_bytes)
{
    ts_fd_server *h = calloc(1, sizeof *h);
    *out = NULL;
    if (h == NULL) {
        snprintf(why, why_bytes, "no memory for the handle socket");
        return TS_ENOMEM;
    }
    h->service = service;
    h->idle_ms = o->idle_ms;
    h->crowd = (ts_crowd){.max = o->connections_max, .tenant_max = o->tenant_connections_max};
    snprintf(h->path, sizeof h->path, "%s", o->path);
    sem_init(&h->answered, 0, 0);
    h->stop = eventfd(0, EFD_CLOEXEC);
    h->epoll = epoll_create1(EPOLL_CLOEXEC);
    h->listener = ts_unix_listen(o->path, SOCK_SEQPACKET, o->mode);
    h->refuses = h->listener >= 0 && ts_passed_refuse(h->listener);
    struct epoll_event stop = {.events = EPOLLIN, .data.ptr = &h->stop};
    struct epoll_event arrives = {.events = EPOLLIN, .data.ptr = &h->listener};
    if (h->listener < 0 || h->stop < 0 || h->epoll < 0 ||
        epoll_ctl(h->epoll, EPOLL_CTL_ADD, h->stop, &stop) != 0 ||
        epoll_ctl(h->epoll, EPOLL_CTL_ADD, h->listener, &arrives) != 0 ||
        (errno = pthread_create(&h->thread, NULL, server_main, h)) != 0) {
        snprintf(why, why_bytes, "listening at %s failed: %s", o->path, strerror(errno));
        server_free(h);
        return TS_ECONN;
    }
    *out = h;
    return TS_OK;
}

void ts_fd_server_stop(ts_fd_server *h)
{
    if (h == NULL)
        return;
    uint64_t one = 1;
    if (write(h->stop, &one, sizeof one) != (ssize_t)sizeof one)
        ts_log(TS_LOG_ERROR, "the socket's thread can't be told to stop: %s", strerror(errno));
    pthread_join(h->thread, NULL);
    (void)unlink(h->path);
    server_free(h);
}
