#define _GNU_SOURCE
#include "handles.h"

#include "log.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <semaphore.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#define CONNECTIONS_MAX 8192u
#define FIXED 2u /* the listener and the stop event come first */

struct ts_handles {
    ts_service *service;
    ts_transport *transport;
    pthread_t thread;
    int stop; /* eventfd */
    struct pollfd *fds;
    uint32_t *uids; /* of the peers, beside fds */
    uint32_t count;
    sem_t answered;
};

/* A request on its way through the engine, while this one waits. */
typedef struct pending_ask {
    ts_handle_ask ask; /* first: the service hands it back */
    sem_t *answered;
} pending_ask;

static void answered(ts_handle_ask *ask)
{
    sem_post(((pending_ask *)ask)->answered);
}

static void send_reply(int to, const ts_handle_ask *ask)
{
    struct iovec data = {.iov_base = (void *)&ask->reply, .iov_len = sizeof ask->reply};
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
    /* A peer that doesn't read is not waited for: it loses its answer. */
    (void)sendmsg(to, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
}

static void drop(ts_handles *h, uint32_t i)
{
    close(h->fds[i].fd);
    h->count--;
    h->fds[i] = h->fds[h->count];
    h->uids[i] = h->uids[h->count];
}

/* Answers what came in on connection i; false: it is over. */
static bool serve(ts_handles *h, uint32_t i)
{
    pending_ask pending = {.ask = {.uid = h->uids[i], .done = answered, .fd = -1},
                           .answered = &h->answered};
    ts_handle_ask *ask = &pending.ask;
    ssize_t got = recv(h->fds[i].fd, &ask->request, sizeof ask->request, MSG_DONTWAIT | MSG_TRUNC);
    if (got < 0)
        return errno == EAGAIN || errno == EINTR;
    if (got != (ssize_t)sizeof ask->request)
        return false;
    if (ask->request.magic == TS_HANDLE_MAGIC && ask->request.kind == TS_HANDLE_NUDGE) {
        ask->reply =
            (ts_handle_reply){.magic = TS_HANDLE_MAGIC, .bytes = ts_transport_revive(h->transport)};
        send_reply(h->fds[i].fd, ask);
        return true;
    }
    ask->work.run = ts_service_handle;
    ts_queue_put(&h->service->queue, &ask->work);
    while (sem_wait(&h->answered) != 0)
        ;
    send_reply(h->fds[i].fd, ask);
    if (ask->fd >= 0)
        close(ask->fd);
    return true;
}

static void accept_one(ts_handles *h)
{
    int fd = accept4(h->fds[0].fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (fd < 0)
        return;
    struct ucred peer;
    socklen_t size = sizeof peer;
    if (h->count == CONNECTIONS_MAX || getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &size) != 0) {
        ts_log(TS_LOG_WARNING, "a handle connection was turned away: %u are open, the limit is %u",
               h->count - FIXED, CONNECTIONS_MAX - FIXED);
        close(fd);
        return;
    }
    h->fds[h->count] = (struct pollfd){.fd = fd, .events = POLLIN};
    h->uids[h->count] = peer.uid;
    h->count++;
}

static void *handles_main(void *arg)
{
    ts_handles *h = arg;
    for (;;) {
        if (poll(h->fds, h->count, -1) < 0)
            continue;
        if (h->fds[1].revents != 0)
            return NULL;
        for (uint32_t i = h->count; i-- > FIXED;) /* downwards: drop moves the last one here */
            if (h->fds[i].revents != 0 &&
                ((h->fds[i].revents & (POLLERR | POLLNVAL)) || !serve(h, i)))
                drop(h, i);
        if (h->fds[0].revents != 0)
            accept_one(h);
    }
}

static int listen_at(const char *path, uint32_t mode)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof address.sun_path) {
        errno = ENAMETOOLONG;
        return -1;
    }
    strcpy(address.sun_path, path);
    int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return -1;
    if (bind(fd, (struct sockaddr *)&address, sizeof address) != 0 || chmod(path, mode) != 0 ||
        listen(fd, 1024) != 0) {
        int saved = errno;
        close(fd);
        errno = saved;
        return -1;
    }
    return fd;
}

ts_status ts_handles_start(ts_service *service, ts_transport *transport, uint32_t mode,
                           ts_handles **out, char *why, size_t why_bytes)
{
    ts_handles *h = calloc(1, sizeof *h);
    *out = NULL;
    if (h != NULL) {
        h->fds = calloc(CONNECTIONS_MAX, sizeof *h->fds);
        h->uids = calloc(CONNECTIONS_MAX, sizeof *h->uids);
    }
    if (h == NULL || h->fds == NULL || h->uids == NULL) {
        snprintf(why, why_bytes, "no memory for the handle socket");
        goto fail;
    }
    h->service = service;
    h->transport = transport;
    h->count = FIXED;
    h->fds[0] = (struct pollfd){.fd = listen_at(service->handle_path, mode), .events = POLLIN};
    h->stop = eventfd(0, EFD_CLOEXEC);
    h->fds[1] = (struct pollfd){.fd = h->stop, .events = POLLIN};
    if (h->fds[0].fd < 0 || h->stop < 0) {
        snprintf(why, why_bytes, "listening at %s failed: %s", service->handle_path,
                 strerror(errno));
        goto fail;
    }
    sem_init(&h->answered, 0, 0);
    if (pthread_create(&h->thread, NULL, handles_main, h) != 0) {
        snprintf(why, why_bytes, "no thread for the handle socket");
        goto fail;
    }
    *out = h;
    return TS_OK;
fail:
    if (h != NULL) {
        free(h->fds);
        free(h->uids);
    }
    free(h);
    return TS_ECONN;
}

void ts_handles_stop(ts_handles *h)
{
    if (h == NULL)
        return;
    uint64_t one = 1;
    if (write(h->stop, &one, sizeof one) != (ssize_t)sizeof one)
        ts_log(TS_LOG_ERROR, "the handle thread can't be told to stop: %s", strerror(errno));
    pthread_join(h->thread, NULL);
    while (h->count > FIXED)
        drop(h, h->count - 1);
    close(h->fds[0].fd);
    close(h->stop);
    (void)unlink(h->service->handle_path);
    sem_destroy(&h->answered);
    free(h->fds);
    free(h->uids);
    free(h);
}
