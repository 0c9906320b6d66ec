/*
 * A client by hand, as far as a test wants to go: it connects, greets as NNG does, sends and
 * receives messages, or breaks off.
 */
#ifndef TS_RAW_CLIENT_H
#define TS_RAW_CLIENT_H

#include "daemon_util.h"
#include "unconst.h"

#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>

static inline int unix_connect(const char *path, int type)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, type | SOCK_CLOEXEC, 0);
    assert_true(fd >= 0);
    assert_true(strlen(path) < sizeof address.sun_path);
    strcpy(address.sun_path, path);
    assert_int_equal(connect(fd, (struct sockaddr *)&address, sizeof address), 0);
    return fd;
}

/* Connects to the handle socket. */
static inline int raw_handles(const daemon_process *d)
{
    return unix_connect(d->handles, SOCK_SEQPACKET);
}

static inline ts_handle_request raw_request(uint32_t kind, uint32_t tag)
{
    return (ts_handle_request){
        .magic = TS_HANDLE_MAGIC, .protocol = TS_PROTOCOL, .kind = kind, .tag = tag};
}

/* Sends the bytes with 1 or 2 descriptors. False: they are refused, or the connection has ended. */
static inline bool raw_pass(int to, const void *bytes, size_t n, const int *fds, size_t num_fds)
{
    struct iovec data = {.iov_base = ts_unconst(bytes), .iov_len = n};
    union {
        struct cmsghdr header;
        char bytes[CMSG_SPACE(2 * sizeof(int))];
    } control = {0};
    struct msghdr message = {.msg_iov = &data,
                             .msg_iovlen = 1,
                             .msg_control = control.bytes,
                             .msg_controllen = CMSG_SPACE(num_fds * sizeof(int))};
    control.header = (struct cmsghdr){.cmsg_len = CMSG_LEN(num_fds * sizeof(int)),
                                      .cmsg_level = SOL_SOCKET,
                                      .cmsg_type = SCM_RIGHTS};
    memcpy(CMSG_DATA(&control.header), fds, num_fds * sizeof(int));
    ssize_t sent = sendmsg(to, &message, MSG_NOSIGNAL);
    assert_true(sent == (ssize_t)n ||
                (sent < 0 && (errno == EPERM || errno == EPIPE || errno == ECONNRESET)));
    return sent > 0;
}

/* Receives a reply; false: the daemon has ended the connection. */
static inline bool raw_reply(int fd, ts_handle_reply *reply)
{
    ssize_t n = recv(fd, reply, sizeof *reply, 0);
    assert_true(n == 0 || n == (ssize_t)sizeof *reply || (n < 0 && errno == ECONNRESET));
    return n > 0;
}

/* Connects to NNG's socket. */
static inline int raw_connect(const daemon_process *d)
{
    return unix_connect(d->url, SOCK_STREAM);
}

/* Greets as NNG's REQ does: SP, version 0, protocol 0x30. */
static inline void raw_greet(int fd)
{
    static const unsigned char hello[8] = {0, 'S', 'P', 0, 0, 0x30, 0, 0};
    unsigned char theirs[8];
    assert_int_equal(write(fd, hello, 8), 8);
    assert_int_equal(recv(fd, theirs, 8, MSG_WAITALL), 8);
    assert_memory_equal(theirs, "\0SP\0\0\x31\0\0", 8);
}

/* Sends the request as NNG frames it. False: the daemon takes no more, for now or for good. */
static inline bool raw_submit(int fd, const Tspb__Request *request, uint32_t id)
{
    unsigned char frame[4096];
    uint64_t bytes = 4 + tspb__request__get_packed_size(request);
    assert_true(13 + bytes <= sizeof frame);
    frame[0] = 1; /* a message; then its length, and REQ's own id, both big-endian */
    for (int i = 0; i < 8; i++)
        frame[1 + i] = (unsigned char)(bytes >> (56 - 8 * i));
    for (int i = 0; i < 4; i++)
        frame[9 + i] = (unsigned char)((id | 1u << 31) >> (24 - 8 * i));
    tspb__request__pack(request, frame + 13);
    ssize_t n = send(fd, frame, 9 + bytes, MSG_DONTWAIT | MSG_NOSIGNAL);
    assert_true(n < 0 || n == (ssize_t)(9 + bytes));
    return n > 0;
}

/* Receives one answer. NULL: the connection has ended. */
static inline Tspb__Reply *raw_answer(int fd)
{
    unsigned char head[9];
    if (recv(fd, head, sizeof head, MSG_WAITALL) != (ssize_t)sizeof head)
        return NULL;
    size_t bytes = 0;
    for (int i = 1; i < 9; i++)
        bytes = bytes << 8 | head[i];
    unsigned char *body = malloc(bytes);
    assert_true(bytes >= 4);
    assert_int_equal(recv(fd, body, bytes, MSG_WAITALL), bytes);
    Tspb__Reply *reply = tspb__reply__unpack(NULL, bytes - 4, body + 4);
    assert_non_null(reply);
    free(body);
    return reply;
}

#endif
