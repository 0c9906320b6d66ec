/* The connection to the handle socket (proto/handle_wire.h), made when it is first needed. */
#define _GNU_SOURCE
#include "fd_client.h"

#include "clock.h"
#include "error.h"
#include "tinyserve_version.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

/* Waits until the socket has what is asked for. False: not before the deadline. */
static bool await(int fd, short what, uint64_t deadline_ms)
{
    for (;;) {
        uint64_t now = ts_now_ms();
        struct pollfd p = {.fd = fd, .events = what};
        int n = poll(&p, 1, now < deadline_ms ? ts_int_ms(deadline_ms - now) : 0);
        if (n > 0)
            return true;
        if (now >= deadline_ms)
            return false;
        /* Interrupted by a signal, or out of kernel memory for a moment: look again. */
    }
}

void ts_handles_close(ts_client *c)
{
    if (c->handle_fd >= 0)
        close(c->handle_fd);
    c->handle_fd = -1;
}

static ts_status connect_handles(ts_client *c)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    const uint64_t patience_ms = c->timeout_ms * (1ull + c->retries);
    const uint64_t deadline_ms = ts_now_ms() + patience_ms;
    snprintf(address.sun_path, sizeof address.sun_path, "%s" TS_HANDLE_SUFFIX, c->path);
    int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return ts_fail(c, TS_ENOMEM, "no descriptor for a connection to %s: %s", address.sun_path,
                       strerror(errno));
    int error;
    do { /* EAGAIN: as many as may wait for the daemon's thread are waiting */
        error = connect(fd, (struct sockaddr *)&address, sizeof address) == 0 ? 0 : errno;
        if (error == EAGAIN)
            (void)poll(NULL, 0, 1);
    } while (error == EINTR || (error == EAGAIN && ts_now_ms() < deadline_ms));
    if (error == 0) {
        c->handle_fd = fd;
        c->handle_late = false;
        return TS_OK;
    }
    close(fd);
    if (error == EAGAIN)
        return ts_fail(c, TS_ETIMEOUT, "%s takes no connection within %llu ms", address.sun_path,
                       (unsigned long long)patience_ms);
    return ts_fail(c, TS_ECONN, "cannot reach %s: %s", address.sun_path, strerror(error));
}

/* Receives one reply, whichever it is; *fd is -1 if no descriptor came with it. False: the
 * connection has ended. */
static bool receive(ts_client *c, ts_handle_reply *reply, int *fd, bool *cut)
{
    struct iovec data = {.iov_base = reply, .iov_len = sizeof *reply};
    union {
        struct cmsghdr header;
        char bytes[CMSG_SPACE(sizeof(int))];
    } control;
    struct msghdr message = {.msg_iov = &data,
                             .msg_iovlen = 1,
                             .msg_control = control.bytes,
                             .msg_controllen = sizeof control.bytes};
    ssize_t got;
    *fd = -1;
    do
        got = recvmsg(c->handle_fd, &message, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
    while (got < 0 && errno == EINTR);
    struct cmsghdr *header = got >= 0 ? CMSG_FIRSTHDR(&message) : NULL;
    if (header != NULL && header->cmsg_type == SCM_RIGHTS)
        memcpy(fd, CMSG_DATA(header), sizeof *fd);
    *cut = got >= 0 && (message.msg_flags & MSG_CTRUNC) != 0;
    if (got == (ssize_t)sizeof *reply && reply->magic == TS_HANDLE_MAGIC) {
        reply->message[sizeof reply->message - 1] = '\0';
        return true;
    }
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
    return false;
}

/* The daemon ends a connection whose answers nobody reads. That isn't the session's end: the next
 * call makes another. */
static ts_status ended(ts_client *c)
{
    const bool late = c->handle_late && !atomic_load(&c->broken);
    ts_handles_close(c);
    if (late)
        return ts_fail(
            c, TS_ETIMEOUT,
            "the daemon at %s has ended the handle connection, by which answers had come "
            "too late",
            c->path);
    return ts_fail(c, TS_ECONN, "the daemon at %s has ended the handle connection", c->path);
}

/* One request and its reply. The reply's status is the caller's to look at. After an error the
 * reply is all 0, unless this request has one. */
static ts_status call(ts_client *c, ts_handle_request *request, ts_handle_reply *reply, int *fd)
{
    const uint64_t patience_ms = c->timeout_ms * (1ull + c->retries);
    const uint64_t deadline_ms = ts_now_ms() + patience_ms;
    ssize_t sent;
    bool cut;
    *fd = -1;
    *reply = (ts_handle_reply){0};
    if (c->pid != getpid())
        return ts_not_ours(c);
    if (c->handle_fd < 0) {
        ts_status status = connect_handles(c);
        if (status != TS_OK)
            return status;
    }
    request->magic = TS_HANDLE_MAGIC;
    request->protocol = TS_PROTOCOL;
    request->tag = ++c->handle_tag != 0 ? c->handle_tag : ++c->handle_tag;
    snprintf(request->version, sizeof request->version, "%s", TS_VERSION);
    do
        sent = send(c->handle_fd, request, sizeof *request, MSG_NOSIGNAL | MSG_DONTWAIT);
    while (sent < 0 && (errno == EINTR || ((errno == EAGAIN || errno == EWOULDBLOCK) &&
                                           await(c->handle_fd, POLLOUT, deadline_ms))));
    if (sent < 0 && (errno == EAGAIN || errno == EWOULDBLOCK))
        return ts_fail(c, TS_ETIMEOUT, "%s takes no request within %llu ms", c->path,
                       (unsigned long long)patience_ms);
    /* A connection that was ended may have said why. */
    for (;;) {
        if (!await(c->handle_fd, POLLIN, deadline_ms)) {
            c->unheard = c->handle_late = true;
            return ts_fail(c, TS_ETIMEOUT, "no answer from %s within %llu ms", c->path,
                           (unsigned long long)patience_ms);
        }
        if (!receive(c, reply, fd, &cut))
            return ended(c);
        if (reply->tag == 0) { /* it may not stay */
            ts_handles_close(c);
            return ts_fail(c, (ts_status)reply->status, "%s", reply->message);
        }
        ts_note_heard(c);
        if (reply->tag == request->tag) {
            c->handle_late = false;
            break;
        }
        *reply = (ts_handle_reply){0}; /* of a call that had run out of time */
        if (*fd >= 0)
            close(*fd);
    }
    if (cut)
        return ts_fail(c, TS_ENOMEM,
                       "a descriptor of the daemon's could not be received: this process has as "
                       "many as it may have (RLIMIT_NOFILE)");
    return TS_OK;
}

/* One about the session. */
static ts_status ask(ts_client *c, ts_handle_request *request, ts_handle_reply *reply, int *fd)
{
    request->session = c->session;
    memcpy(request->token, c->token, sizeof request->token);
    ts_status status = call(c, request, reply, fd);
    /* NOLINTNEXTLINE(clang-analyzer-core.UndefinedBinaryOperatorResult): recvmsg wrote it */
    if (status != TS_OK || reply->status == TS_OK)
        return status;
    if (*fd >= 0)
        close(*fd);
    return ts_fail(c, (ts_status)reply->status, "%s", reply->message);
}

/* The same, whose reply brings a descriptor. */
static ts_status get(ts_client *c, ts_handle_request *request, ts_handle_reply *reply, int *fd)
{
    ts_status status = ask(c, request, reply, fd);
    if (status != TS_OK || *fd >= 0)
        return status;
    return ts_fail(c, TS_EPROTO, "the daemon at %s has sent no descriptor", c->path);
}

/* Whether the next daemon can be asked for it as the last one was; the others are steps of
 * something larger, which is begun again. */
static bool is_whole(enum ts_handle_kind kind)
{
    return kind == TS_HANDLE_SLAB || kind == TS_HANDLE_EXCHANGE || kind == TS_HANDLE_SIGNALS;
}

ts_status ts_handle_get(ts_client *c, enum ts_handle_kind kind, uint32_t pool, uint32_t slab,
                        bool writable, ts_handle_reply *reply, int *fd)
{
    ts_handle_request request = {.kind = kind, .pool = pool, .slab = slab, .writable = writable};
    const uint64_t until_ms = ts_call_end_ms(c);
    ts_status status;
    do
        status = get(c, &request, reply, fd);
    while (is_whole(kind) && ts_goes_on(c, status, until_ms));
    return status;
}

ts_status ts_handle_new(ts_client *c, enum ts_handle_kind kind, uint64_t bytes, int *fd)
{
    ts_handle_request request = {.kind = kind, .bytes = bytes};
    ts_handle_reply reply;
    return get(c, &request, &reply, fd);
}

ts_status ts_handle_tell(ts_client *c, enum ts_handle_kind kind)
{
    ts_handle_request request = {.kind = kind};
    ts_handle_reply reply;
    int fd;
    ts_status status = ask(c, &request, &reply, &fd);
    if (status == TS_OK && fd >= 0)
        close(fd);
    return status;
}
