#define _GNU_SOURCE
#include "store_wire.h"

#include "clock.h"
#include "unconst.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define NAME_LETTERS "abcdefghijklmnopqrstuvwxyz0123456789."
#define LISTENERS_SUFFIX ".socket"
#define NOTIFY_MS 5000
#define FDS_SEEN 4u /* of a message; it may bring one */
#define FIRST_PASSED_FD 3

bool ts_store_name_ok(const char *name)
{
    const size_t bytes = strnlen(name, TS_STORE_NAME_BYTES + 1), end = strlen(LISTENERS_SUFFIX);
    return bytes > 0 && bytes <= TS_STORE_NAME_BYTES && strspn(name, NAME_LETTERS) == bytes &&
           (bytes < end || strcmp(name + bytes - end, LISTENERS_SUFFIX) != 0);
}

int64_t ts_store_number(const char *text, int64_t most)
{
    int64_t value = 0;
    if (*text == '\0')
        return -1;
    for (; *text != '\0'; text++) {
        if (*text < '0' || *text > '9')
            return -1;
        value = value * 10 + (*text - '0');
        if (value > most)
            return -1;
    }
    return value;
}

int ts_store_connect(const char *path, int type)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    const size_t bytes = strlen(path);
    if ((*path != '/' && *path != '@') || bytes >= sizeof address.sun_path) {
        errno = *path == '/' || *path == '@' ? ENAMETOOLONG : EINVAL;
        return -1;
    }
    memcpy(address.sun_path, path, bytes);
    if (*path == '@')
        address.sun_path[0] = '\0';
    int fd = socket(AF_UNIX, type | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return -1;
    const socklen_t length = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + bytes);
    if (connect(fd, (struct sockaddr *)&address, length) != 0) {
        int saved = errno;
        close(fd);
        errno = saved;
        return -1;
    }
    return fd;
}

int ts_store_send(int socket, const char *text, int fd)
{
    union {
        struct cmsghdr align;
        char bytes[CMSG_SPACE(sizeof(int))];
    } control = {.bytes = {0}};
    struct iovec part = {.iov_base = ts_unconst(text), .iov_len = strlen(text)};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
    if (fd >= 0) {
        message.msg_control = control.bytes;
        message.msg_controllen = sizeof control.bytes;
        struct cmsghdr *c = CMSG_FIRSTHDR(&message);
        c->cmsg_level = SOL_SOCKET;
        c->cmsg_type = SCM_RIGHTS;
        c->cmsg_len = CMSG_LEN(sizeof fd);
        memcpy(CMSG_DATA(c), &fd, sizeof fd);
    }
    ssize_t sent;
    do
        sent = sendmsg(socket, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
    while (sent < 0 && errno == EINTR);
    return sent < 0 ? errno : 0;
}

/* Takes the first descriptor and closes the others; returns how many there were. */
static uint32_t take_fds(const struct cmsghdr *c, int *first)
{
    const uint32_t count = (uint32_t)((c->cmsg_len - CMSG_LEN(0)) / sizeof(int));
    for (uint32_t i = 0; i < count; i++) {
        int fd;
        memcpy(&fd, CMSG_DATA(c) + i * sizeof fd, sizeof fd);
        if (*first < 0)
            *first = fd;
        else
            close(fd);
    }
    return count;
}

int ts_store_receive(int socket, ts_store_datagram *d)
{
    union {
        struct cmsghdr align;
        char bytes[CMSG_SPACE(FDS_SEEN * sizeof(int)) + CMSG_SPACE(sizeof(struct ucred))];
    } control;
    struct iovec part = {.iov_base = d->text, .iov_len = TS_STORE_MESSAGE_BYTES};
    struct msghdr message = {.msg_iov = &part,
                             .msg_iovlen = 1,
                             .msg_control = control.bytes,
                             .msg_controllen = sizeof control.bytes};
    uint32_t fds = 0;
    ssize_t bytes;
    *d = (ts_store_datagram){.fd = -1};
    do
        bytes = recvmsg(socket, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    while (bytes < 0 && errno == EINTR);
    if (bytes < 0)
        return -1;
    for (struct cmsghdr *c = CMSG_FIRSTHDR(&message); c != NULL; c = CMSG_NXTHDR(&message, c)) {
        struct ucred from;
        if (c->cmsg_level != SOL_SOCKET)
            continue;
        if (c->cmsg_type == SCM_RIGHTS)
            fds += take_fds(c, &d->fd);
        if (c->cmsg_type == SCM_CREDENTIALS && c->cmsg_len >= CMSG_LEN(sizeof from)) {
            memcpy(&from, CMSG_DATA(c), sizeof from);
            d->pid = from.pid;
        }
    }
    d->bytes = (size_t)bytes;
    d->fault = (message.msg_flags & MSG_TRUNC) != 0               ? "it is longer than 4096 bytes"
               : (message.msg_flags & MSG_CTRUNC) != 0 || fds > 1 ? "it brings too many descriptors"
                                                                  : NULL;
    /* An empty datagram isn't the end of a connection where there is none. */
    int type = 0;
    socklen_t length = sizeof type;
    if (bytes == 0 && fds == 0 && getsockopt(socket, SOL_SOCKET, SO_TYPE, &type, &length) == 0 &&
        type == SOCK_SEQPACKET)
        return 0;
    return 1;
}

/* What a line's value means; false: it can't have that value. */
typedef bool read_value(ts_store_message *m, const char *value);

static bool read_store(ts_store_message *m, const char *value)
{
    return m->store = strcmp(value, "1") == 0;
}

static bool read_remove(ts_store_message *m, const char *value)
{
    return m->remove = strcmp(value, "1") == 0;
}

static bool read_barrier(ts_store_message *m, const char *value)
{
    return m->barrier = strcmp(value, "1") == 0;
}

static bool read_name(ts_store_message *m, const char *value)
{
    if (!ts_store_name_ok(value) || m->name[0] != '\0')
        return false;
    memcpy(m->name, value, strlen(value) + 1);
    return true;
}

/* The holder never looks whether a descriptor hangs up. */
static bool read_poll(ts_store_message *m, const char *value)
{
    (void)m;
    return strcmp(value, "0") == 0;
}

static bool read_ready(ts_store_message *m, const char *value)
{
    return m->ready = strcmp(value, "1") == 0;
}

static bool read_stopping(ts_store_message *m, const char *value)
{
    return m->stopping = strcmp(value, "1") == 0;
}

static bool read_exit_status(ts_store_message *m, const char *value)
{
    const int64_t status = ts_store_number(value, 255);
    m->exit_status = (int)status;
    return status >= 0;
}

static const struct {
    const char *key;
    read_value *read; /* NULL: the holder itself doesn't care */
    bool forward;     /* for the holder's own */
} keys[] = {
    {"FDSTORE", read_store, false},
    {"FDSTOREREMOVE", read_remove, false},
    {"BARRIER", read_barrier, false},
    {"FDNAME", read_name, false},
    {"FDPOLL", read_poll, false},
    {"READY", read_ready, true},
    {"RELOADING", NULL, true},
    {"MONOTONIC_USEC", NULL, true},
    {"STATUS", NULL, true},
    {"WATCHDOG", NULL, true},
    {"STOPPING", read_stopping, false},
    {"EXIT_STATUS", read_exit_status, false},
};

/* One line without its end; false: it is a fault. */
static bool parse_line(ts_store_message *m, const char *line)
{
    const char *equals = strchr(line, '=');
    if (equals == NULL || equals == line)
        return false;
    const size_t bytes = (size_t)(equals - line);
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++) {
        if (strlen(keys[i].key) != bytes || strncmp(keys[i].key, line, bytes) != 0)
            continue;
        if (keys[i].forward) { /* never longer than the datagram */
            const size_t used = strlen(m->forward);
            snprintf(m->forward + used, sizeof m->forward - used, "%s%s", used > 0 ? "\n" : "",
                     line);
        }
        return keys[i].read == NULL || keys[i].read(m, equals + 1);
    }
    return true;
}

const char *ts_store_parse(const ts_store_datagram *d, ts_store_message *m)
{
    char text[TS_STORE_MESSAGE_BYTES + 1], *rest = text, *line;
    memset(m, 0, sizeof *m);
    if (d->fault != NULL)
        return d->fault;
    if (strlen(d->text) != d->bytes)
        return "it has a zero byte";
    memcpy(text, d->text, d->bytes + 1);
    while ((line = strsep(&rest, "\n")) != NULL)
        if ((*line != '\0' || rest != NULL || line == text) && !parse_line(m, line))
            return "a line isn't a KEY=VALUE, or the value can't be one of its key";
    if (m->store + m->remove + m->barrier > 1)
        return "it is more than one order";
    if ((m->store || m->remove) != (m->name[0] != '\0'))
        return "an FDNAME= goes with FDSTORE=1 or FDSTOREREMOVE=1, and either with it";
    if ((m->store || m->barrier) != (d->fd >= 0))
        return "a descriptor goes with FDSTORE=1 or BARRIER=1, and either with one";
    return NULL;
}

void ts_store_passed(void (*each)(void *arg, const char *name, int fd), void *arg)
{
    const char *pid = getenv("LISTEN_PID"), *count = getenv("LISTEN_FDS"),
               *all = getenv("LISTEN_FDNAMES");
    const int64_t fds = count != NULL ? ts_store_number(count, INT32_MAX / 2) : 0;
    if (pid != NULL && ts_store_number(pid, INT32_MAX) == getpid() && fds > 0) {
        char *names = strdup(all != NULL ? all : ""), *rest = names;
        for (int fd = FIRST_PASSED_FD; fd < FIRST_PASSED_FD + fds; fd++) {
            const char *name = rest != NULL ? strsep(&rest, ":") : "unknown";
            if (fcntl(fd, F_SETFD, FD_CLOEXEC) == 0)
                each(arg, *name != '\0' ? name : "unknown", fd);
        }
        free(names);
    }
    (void)unsetenv("LISTEN_PID");
    (void)unsetenv("LISTEN_FDS");
    (void)unsetenv("LISTEN_FDNAMES");
}

void ts_store_notify(const char *state)
{
    const char *path = getenv("NOTIFY_SOCKET");
    if (path != NULL)
        ts_store_notify_at(path, state);
}

void ts_store_notify_at(const char *path, const char *state)
{
    int fd = ts_store_connect(path, SOCK_DGRAM);
    if (fd < 0)
        return;
    const uint64_t until = ts_now_ms() + NOTIFY_MS;
    while (ts_store_send(fd, state, -1) == EAGAIN && ts_now_ms() < until) {
        struct pollfd p = {.fd = fd, .events = POLLOUT};
        (void)poll(&p, 1, (int)(until - ts_now_ms()));
    }
    close(fd);
}
