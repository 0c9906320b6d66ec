#define _GNU_SOURCE
#include "client.h"

#include "version.h"

#include <errno.h>
#include <nng/protocol/reqrep0/req.h>
#include <nng/supplemental/util/platform.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define TIMEOUT_DEFAULT_MS 30000u
#define REPLY_BYTES_MAX (64u << 20) /* an answer never needs more */
#define POLL_MS 20                  /* between attempts to reach a daemon that is awaited */
#define SPIN_DEFAULT_US 50u
#define GREETING_MS 500u /* a daemon that hasn't answered by then may need a nudge */

/*
 * The process that uses NNG: NNG ends a process that uses it after a fork from one that did, so
 * this must be known before NNG is asked. 0: none yet. Inherited by fork, which is the point.
 */
static _Atomic pid_t nng_user;

ts_status ts_fail(ts_client *c, ts_status status, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    vsnprintf(c->error, sizeof c->error, format, args);
    va_end(args);
    return status;
}

const char *ts_error(const ts_client *c)
{
    return c == NULL ? "out of memory" : c->error;
}

ts_transport ts_client_transport(const ts_client *c)
{
    return c->rings != NULL && !c->rings_lost ? TS_TRANSPORT_RING : TS_TRANSPORT_MESSAGES;
}

ts_exec ts_client_exec(const ts_client *c)
{
    return c->last_exec;
}

uint64_t ts_session_id(const ts_client *c)
{
    return c->session;
}

const char *ts_daemon_version(const ts_client *c)
{
    return c->version;
}

/* ---- calls ---- */

ts_status ts_gone(ts_client *c)
{
    atomic_store(&c->broken, true);
    return ts_fail(c, TS_ECONN, "the connection to %s ended: the session is over", c->url);
}

static void pipe_removed(nng_pipe pipe, nng_pipe_ev event, void *arg)
{
    (void)pipe;
    (void)event;
    ts_client *c = arg;
    atomic_store(&c->broken, true);
    ts_signals_let_go(c); /* a stream that waits for the daemon */
    ts_rings_wake(c);
    nng_aio_abort(c->aio, NNG_ECONNRESET); /* whoever waits for an answer */
}

/* Sends the packed request and waits for one reply message. */
static ts_status exchange_messages(ts_client *c, const Tspb__Request *request, nng_msg **reply)
{
    nng_msg *message;
    size_t bytes = tspb__request__get_packed_size(request);
    if (nng_msg_alloc(&message, bytes) != 0)
        return ts_fail(c, TS_ENOMEM, "no memory for a request of %zu bytes", bytes);
    tspb__request__pack(request, nng_msg_body(message));
    nng_aio_set_timeout(c->aio, (nng_duration)c->timeout_ms);
    nng_aio_set_msg(c->aio, message);
    nng_send_aio(c->socket, c->aio);
    if (atomic_load(&c->broken)) /* it may have ended before there was anything to abort */
        nng_aio_abort(c->aio, NNG_ECONNRESET);
    nng_aio_wait(c->aio);
    int error = nng_aio_result(c->aio);
    if (error != 0)
        nng_msg_free(nng_aio_get_msg(c->aio));
    if (error == 0) {
        nng_recv_aio(c->socket, c->aio);
        if (atomic_load(&c->broken))
            nng_aio_abort(c->aio, NNG_ECONNRESET);
        nng_aio_wait(c->aio);
        error = nng_aio_result(c->aio);
    }
    if (error == 0) {
        *reply = nng_aio_get_msg(c->aio);
        return TS_OK;
    }
    if (atomic_load(&c->broken))
        return ts_gone(c);
    if (error == NNG_ETIMEDOUT)
        return ts_fail(c, TS_ETIMEOUT, "no answer from %s within %u ms", c->url, c->timeout_ms);
    return ts_fail(c, TS_ECONN, "%s: %s", c->url, nng_strerror(error));
}

ts_status ts_call(ts_client *c, Tspb__Request *request, Tspb__Reply **reply)
{
    *reply = NULL;
    if (c->pid != getpid())
        return ts_fail(c, TS_ECONN, "the session belongs to process %d: connect after fork()",
                       (int)c->pid);
    if (atomic_load(&c->broken) || !c->open)
        return ts_gone(c);
    request->request_id = c->next_id++;
    ts_status status = TS_ETIMEOUT;
    nng_msg *message = NULL;
    for (uint32_t i = 0; status == TS_ETIMEOUT && i <= c->retries; i++)
        status = exchange_messages(c, request, &message);
    if (status != TS_OK)
        return status;
    Tspb__Reply *r = tspb__reply__unpack(NULL, nng_msg_len(message), nng_msg_body(message));
    nng_msg_free(message);
    if (r == NULL || (r->request_id != request->request_id && r->status == TS_OK)) {
        if (r != NULL)
            tspb__reply__free_unpacked(r, NULL);
        return ts_fail(c, TS_EPROTO, "the daemon's answer to request %llu can't be understood",
                       (unsigned long long)request->request_id);
    }
    if (r->status != TS_OK) {
        status = ts_fail(c, (ts_status)r->status, "%s", r->message);
        tspb__reply__free_unpacked(r, NULL);
        return status;
    }
    *reply = r;
    return TS_OK;
}

ts_status ts_call_plain(ts_client *c, Tspb__Request *request)
{
    Tspb__Reply *reply;
    ts_status status = ts_call(c, request, &reply);
    if (status == TS_OK)
        tspb__reply__free_unpacked(reply, NULL);
    return status;
}

/* ---- connecting ---- */

static int dial(ts_client *c)
{
    nng_dialer dialer;
    int error = nng_dialer_create(&dialer, c->socket, c->url);
    if (error != 0)
        return error;
    /* A session lives and dies with its connection: none is made again behind our back. */
    nng_dialer_set_ms(dialer, NNG_OPT_RECONNMINT, 3600 * 1000);
    nng_dialer_set_ms(dialer, NNG_OPT_RECONNMAXT, 3600 * 1000);
    error = nng_dialer_start(dialer, 0);
    if (error != 0)
        nng_dialer_close(dialer);
    return error;
}

static ts_status reach(ts_client *c, uint32_t wait_ms)
{
    nng_time until = nng_clock() + wait_ms;
    int error = dial(c);
    while ((error == NNG_ECONNREFUSED || error == NNG_ENOENT) && nng_clock() < until) {
        nng_msleep(POLL_MS);
        error = dial(c);
    }
    if (error == 0)
        return TS_OK;
    if (error == NNG_EPERM)
        return ts_fail(c, TS_EPERM,
                       "may not connect to %s: is uid %u in the daemon's group (tinyserve)?",
                       c->url, (unsigned)getuid());
    if (error == NNG_ECONNREFUSED || error == NNG_ENOENT)
        return ts_fail(c, TS_ECONN,
                       "cannot reach %s: is tinyserved running? (systemctl status tinyserved)",
                       c->url);
    return ts_fail(c, TS_ECONN, "cannot reach %s: %s", c->url, nng_strerror(error));
}

static ts_status open_session(ts_client *c, const char *program)
{
    Tspb__SessionOpen open = TSPB__SESSION_OPEN__INIT;
    Tspb__Request request = TSPB__REQUEST__INIT;
    Tspb__Reply *reply;
    open.protocol = TS_PROTOCOL;
    open.program = (char *)program;
    open.version = (char *)TS_VERSION;
    request.body_case = TSPB__REQUEST__BODY_SESSION_OPEN;
    request.session_open = &open;
    ts_status status = ts_call(c, &request, &reply);
    if (status == TS_EPROTO) { /* the daemon has told its version, unless it is too old for that */
        char why[sizeof c->error];
        memcpy(why, c->error, sizeof why);
        return ts_fail(c, status, "libtinyserve " TS_VERSION ": %s", why);
    }
    if (status != TS_OK)
        return status;
    const Tspb__SessionOpened *o = reply->session_opened;
    if (reply->body_case != TSPB__REPLY__BODY_SESSION_OPENED || o->token.len != sizeof c->token ||
        strlen(o->handle_socket) >= sizeof c->handle_path) {
        status = ts_fail(c, TS_EPROTO, "the daemon at %s opened no session", c->url);
    } else {
        c->session = o->session;
        memcpy(c->token, o->token.data, sizeof c->token);
        snprintf(c->handle_path, sizeof c->handle_path, "%s", o->handle_socket);
        snprintf(c->version, sizeof c->version, "%s", o->version);
        c->exchange_bytes_max = o->exchange_bytes_max;
    }
    tspb__reply__free_unpacked(reply, NULL);
    return status;
}

/* Opens the socket and dials; the first answer comes later. */
static ts_status dial_up(ts_client *c, uint32_t wait_ms)
{
    int error = nng_req0_open(&c->socket);
    if (error == 0 && (error = nng_aio_alloc(&c->aio, NULL, NULL)) != 0)
        nng_close(c->socket);
    if (error != 0)
        return ts_fail(c, TS_ENOMEM, "no socket: %s", nng_strerror(error));
    c->open = true;
    atomic_store(&c->broken, false);
    nng_socket_set_ms(c->socket, NNG_OPT_REQ_RESENDTIME, -1);
    nng_socket_set_size(c->socket, NNG_OPT_RECVMAXSZ, REPLY_BYTES_MAX);
    nng_pipe_notify(c->socket, NNG_PIPE_EV_REM_POST, pipe_removed, c);
    return reach(c, wait_ms);
}

static void hang_up(ts_client *c)
{
    if (!c->open)
        return;
    nng_close(c->socket);
    nng_aio_free(c->aio);
    c->open = false;
}

static ts_status handle_call(ts_client *c, const ts_handle_request *request, ts_handle_reply *reply,
                             int *fd);

/*
 * Opens the session. If no answer comes for a while, the daemon is asked to see whether its NNG
 * listener is alive; if it had to make a new one, this connection is made anew.
 */
static ts_status greet(ts_client *c, const char *program)
{
    uint32_t timeout_ms = c->timeout_ms, retries = c->retries;
    if (timeout_ms > 2 * GREETING_MS) {
        c->timeout_ms = GREETING_MS;
        c->retries = 0;
        ts_status status = open_session(c, program);
        c->timeout_ms = timeout_ms;
        c->retries = retries;
        if (status != TS_ETIMEOUT)
            return status;
        ts_handle_request nudge = {
            .magic = TS_HANDLE_MAGIC, .protocol = TS_PROTOCOL, .kind = TS_HANDLE_NUDGE};
        ts_handle_reply reply;
        int fd;
        snprintf(c->handle_path, sizeof c->handle_path, "%s.handles", c->url + strlen("ipc://"));
        if (handle_call(c, &nudge, &reply, &fd) == TS_OK && reply.bytes == 1) {
            hang_up(c);
            status = dial_up(c, 0);
            if (status != TS_OK)
                return status;
        }
        c->next_id = 1; /* the same request: a daemon that was only slow applies it once */
    }
    return open_session(c, program);
}

ts_status ts_connect(const ts_options *options, ts_client **out)
{
    static const ts_options defaults;
    const ts_options *o = options != NULL ? options : &defaults;
    ts_client *c = calloc(1, sizeof *c);
    *out = c;
    if (c == NULL)
        return TS_ENOMEM;
    c->handle_fd = -1;
    c->next_id = 1;
    c->pid = getpid();
    c->timeout_ms = o->timeout_ms != 0 ? o->timeout_ms : TIMEOUT_DEFAULT_MS;
    c->retries = o->retries;
    c->transport = o->transport;
    c->exec = o->exec;
    c->threads = o->threads;
    c->spin_us = o->spin_us != 0 ? o->spin_us : SPIN_DEFAULT_US;
    const char *url = o->url != NULL ? o->url : getenv("TINYSERVE_URL");
    if (url == NULL || url[0] == '\0')
        url = TS_URL_DEFAULT;
    if (strlen(url) + 7 > sizeof c->url)
        return ts_fail(c, TS_EINVAL, "an address of %zu bytes; the limit is %zu", strlen(url),
                       sizeof c->url - 7);
    snprintf(c->url, sizeof c->url, "%s%s", url[0] == '/' ? "ipc://" : "", url);

    pid_t user = 0;
    if (!atomic_compare_exchange_strong(&nng_user, &user, c->pid) && user != c->pid)
        return ts_fail(c, TS_EPERM,
                       "process %d was forked from %d after that had connected: connect in the "
                       "child alone, or exec",
                       (int)c->pid, (int)user);
    ts_status status = dial_up(c, o->wait_ms);
    if (status == TS_OK)
        status = greet(c, o->program != NULL ? o->program : program_invocation_short_name);
    if (status == TS_OK && o->exchange_bytes > 0)
        status = ts_exchange_host(c, o->exchange_bytes);
    return status;
}

void ts_disconnect(ts_client *c)
{
    if (c == NULL)
        return;
    bool ours = c->pid == getpid(); /* a forked child must not touch its parent's */
    if (ours) {
        hang_up(c);
        (void)ts_local_gpu_await(c); /* they write into the exchange */
    }
    ts_exchange_close(c);
    ts_signals_close(c);
    ts_rings_close(c);
    ts_local_close(c);
    if (ours) { /* their threads are not in the child */
        ts_attention_free(c->attention);
        ts_local_gpu_close(c);
    }
    ts_cuda_close(c->cuda);
    if (c->handle_fd >= 0)
        close(c->handle_fd);
    free(c);
}

/* ---- handles ---- */

static ts_status handle_connect(ts_client *c)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (strlen(c->handle_path) >= sizeof address.sun_path)
        return ts_fail(c, TS_EPROTO, "the handle socket's path has %zu bytes; the limit is %zu",
                       strlen(c->handle_path), sizeof address.sun_path - 1);
    strcpy(address.sun_path, c->handle_path);
    int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return ts_fail(c, TS_ENOMEM, "no socket: %s", strerror(errno));
    struct timeval timeout = {.tv_sec = c->timeout_ms / 1000,
                              .tv_usec = (suseconds_t)(c->timeout_ms % 1000) * 1000};
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof timeout);
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &timeout, sizeof timeout);
    if (connect(fd, (struct sockaddr *)&address, sizeof address) != 0) {
        int saved = errno;
        close(fd);
        return ts_fail(c, TS_ECONN, "cannot reach %s: %s", c->handle_path, strerror(saved));
    }
    c->handle_fd = fd;
    return TS_OK;
}

/* Receives a reply; *fd is -1 if no descriptor came with it. */
static ts_status handle_receive(ts_client *c, ts_handle_reply *reply, int *fd)
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
    *fd = -1;
    ssize_t got = recvmsg(c->handle_fd, &message, MSG_CMSG_CLOEXEC);
    struct cmsghdr *header = got >= 0 ? CMSG_FIRSTHDR(&message) : NULL;
    if (header != NULL && header->cmsg_type == SCM_RIGHTS)
        memcpy(fd, CMSG_DATA(header), sizeof *fd);
    if (got == (ssize_t)sizeof *reply && reply->magic == TS_HANDLE_MAGIC)
        return TS_OK;
    bool late = got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK);
    close(c->handle_fd);
    c->handle_fd = -1;
    if (*fd >= 0)
        close(*fd);
    return late ? ts_fail(c, TS_ETIMEOUT, "no handle from %s within %u ms", c->handle_path,
                          c->timeout_ms)
                : ts_fail(c, TS_ECONN, "%s ended the connection", c->handle_path);
}

/* One request and its reply, over a connection that is made when it is first needed. */
static ts_status handle_call(ts_client *c, const ts_handle_request *request, ts_handle_reply *reply,
                             int *fd)
{
    ts_status status = c->handle_fd < 0 ? handle_connect(c) : TS_OK;
    if (status != TS_OK)
        return status;
    if (send(c->handle_fd, request, sizeof *request, MSG_NOSIGNAL) != (ssize_t)sizeof *request) {
        int saved = errno;
        close(c->handle_fd);
        c->handle_fd = -1;
        return ts_fail(c, TS_ECONN, "%s: %s", c->handle_path, strerror(saved));
    }
    return handle_receive(c, reply, fd);
}

ts_status ts_handle_get(ts_client *c, enum ts_handle_kind kind, uint32_t pool, uint32_t slab,
                        bool writable, ts_handle_reply *reply, int *fd)
{
    ts_handle_request request = {.magic = TS_HANDLE_MAGIC,
                                 .protocol = TS_PROTOCOL,
                                 .session = c->session,
                                 .kind = kind,
                                 .pool = pool,
                                 .slab = slab,
                                 .writable = writable};
    memcpy(request.token, c->token, sizeof request.token);
    ts_status status = handle_call(c, &request, reply, fd);
    if (status != TS_OK)
        return status;
    if (reply->status == TS_OK && *fd >= 0)
        return TS_OK;
    if (*fd >= 0)
        close(*fd);
    reply->message[sizeof reply->message - 1] = '\0';
    if (reply->status == TS_OK)
        return ts_fail(c, TS_EPROTO, "%s sent no descriptor", c->handle_path);
    return ts_fail(c, (ts_status)reply->status, "%s", reply->message);
}
