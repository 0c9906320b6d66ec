/* What test_store has: a test that is itself the holder of what the store sends. */
#ifndef TS_STORE_UTIL_H
#define TS_STORE_UTIL_H

#include "test_util.h"

#include "store.h"
#include "store_wire.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#define WATCHDOG_SECONDS 120

/* The holder: a notify socket, and one where a daemon comes whose supervisor died. */
typedef struct holder {
    char folder[64], notify[80], adopt[80];
    int socket, listener;
    char why[256];
} holder;

static inline int listen_in(const char *path, int type)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    snprintf(address.sun_path, sizeof address.sun_path, "%s", path);
    int fd = socket(AF_UNIX, type | SOCK_CLOEXEC, 0);
    assert_true(fd >= 0);
    assert_int_equal(bind(fd, (struct sockaddr *)&address, sizeof address), 0);
    if (type != SOCK_DGRAM)
        assert_int_equal(listen(fd, 8), 0);
    return fd;
}

static inline void holder_make(holder *h, const char *variable, const char *fds)
{
    *h = (holder){.listener = -1};
    strcpy(h->folder, "/tmp/tinyserve-store.XXXXXX");
    assert_non_null(mkdtemp(h->folder));
    snprintf(h->notify, sizeof h->notify, "%s/notify", h->folder);
    snprintf(h->adopt, sizeof h->adopt, "%s/store", h->folder);
    h->socket = listen_in(h->notify, SOCK_DGRAM);
    setenv("NOTIFY_SOCKET", h->notify, 1);
    setenv(variable, fds, 1);
    alarm(WATCHDOG_SECONDS);
}

/* One that may be followed by another. */
static inline void holder_make_supervisor(holder *h, const char *fds)
{
    holder_make(h, TS_ENV_FDSTORE, fds);
    h->listener = listen_in(h->adopt, SOCK_SEQPACKET);
    setenv(TS_ENV_SUPERVISOR, h->adopt, 1);
}

static inline void holder_end(holder *h)
{
    if (h->socket >= 0)
        close(h->socket);
    if (h->listener >= 0)
        close(h->listener);
    (void)unlink(h->notify);
    (void)unlink(h->adopt);
    assert_int_equal(rmdir(h->folder), 0);
    unsetenv("NOTIFY_SOCKET");
    alarm(0);
}

/* The next message that comes to this socket. */
static inline void next(int socket, ts_store_datagram *d)
{
    struct pollfd p = {.fd = socket, .events = POLLIN};
    assert_int_equal(poll(&p, 1, -1), 1);
    assert_int_equal(ts_store_receive(socket, d), 1);
    assert_null(d->fault);
}

static inline void expect(int socket, const char *text)
{
    ts_store_datagram d;
    next(socket, &d);
    assert_string_equal(d.text, text);
    assert_int_equal(d.fd, -1);
}

/* The message, with a duplicate of this descriptor. */
static inline void expect_fd(int socket, const char *text, int fd)
{
    ts_store_datagram d;
    struct stat got, put;
    next(socket, &d);
    assert_string_equal(d.text, text);
    assert_int_equal(fstat(d.fd, &got), 0);
    assert_int_equal(fstat(fd, &put), 0);
    assert_true(got.st_dev == put.st_dev && got.st_ino == put.st_ino);
    close(d.fd);
}

static inline int make_fd(const char *text)
{
    int fd = memfd_create("stored", MFD_CLOEXEC);
    assert_true(fd >= 0);
    assert_int_equal(write(fd, text, strlen(text)), (ssize_t)strlen(text));
    return fd;
}

#endif
