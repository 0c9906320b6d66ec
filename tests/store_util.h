/* What test_store has: a test that is itself the holder of what the store sends. */
#ifndef TS_STORE_UTIL_H
#define TS_STORE_UTIL_H

#include "standstill.h"
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
    standstill_after(WATCHDOG_SECONDS);
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

/* ---- a holder that keeps what it is sent ---- */

#define KEPT_BY_HOLDER 64

typedef struct keeping_holder {
    holder h;
    pthread_t thread;
    int end; /* tells the thread to end */
    pthread_mutex_t lock;
    ts_store_message kept[KEPT_BY_HOLDER]; /* under the lock, as its descriptors; those with a name
                                            * are there */
    int fds[KEPT_BY_HOLDER];
} keeping_holder;

/* Where this name is; "": the first free place. Under the lock. */
static inline int kept_place(const keeping_holder *k, const char *name)
{
    int i = 0;
    while (i < KEPT_BY_HOLDER && strcmp(k->kept[i].name, name) != 0)
        i++;
    assert_true(i < KEPT_BY_HOLDER || name[0] != '\0');
    return i;
}

static inline void keep_message(keeping_holder *k, const ts_store_datagram *d)
{
    ts_store_message m;
    assert_null(ts_store_parse(d, &m));
    pthread_mutex_lock(&k->lock);
    const int i = kept_place(k, m.remove ? m.name : "");
    if (m.store) {
        k->kept[i] = m;
        k->fds[i] = d->fd;
    } else if (m.remove && i < KEPT_BY_HOLDER) {
        close(k->fds[i]);
        k->kept[i].name[0] = '\0';
    }
    pthread_mutex_unlock(&k->lock);
    if (m.barrier)
        close(d->fd); /* systemd's answer */
}

static inline void *keep_messages(void *arg)
{
    keeping_holder *k = arg;
    for (;;) {
        struct pollfd p[2] = {{.fd = k->h.socket, .events = POLLIN},
                              {.fd = k->end, .events = POLLIN}};
        ts_store_datagram d;
        if (poll(p, 2, -1) > 0 && p[0].revents != 0 && ts_store_receive(k->h.socket, &d) == 1)
            keep_message(k, &d);
        else if (p[1].revents != 0)
            return NULL;
    }
}

/* Makes a holder that takes `fds` descriptors. Before ts_store_open. */
static inline void keeping_holder_make(keeping_holder *k, const char *fds)
{
    memset(k, 0, sizeof *k);
    holder_make(&k->h, TS_ENV_FDSTORE, fds);
    k->end = eventfd(0, EFD_CLOEXEC);
    pthread_mutex_init(&k->lock, NULL);
    assert_int_equal(pthread_create(&k->thread, NULL, keep_messages, k), 0);
}

static inline void keeping_holder_end(keeping_holder *k)
{
    assert_int_equal(write(k->end, &(uint64_t){1}, sizeof(uint64_t)), sizeof(uint64_t));
    assert_int_equal(pthread_join(k->thread, NULL), 0);
    close(k->end);
    for (int i = 0; i < KEPT_BY_HOLDER; i++)
        if (k->kept[i].name[0] != '\0')
            close(k->fds[i]);
    holder_end(&k->h);
}

/* Closes what is kept under the name, as systemd does with what is beyond its limit. */
static inline void kept_drop(keeping_holder *k, const char *name)
{
    pthread_mutex_lock(&k->lock);
    const int i = kept_place(k, name);
    assert_true(i < KEPT_BY_HOLDER);
    close(k->fds[i]);
    k->kept[i].name[0] = '\0';
    pthread_mutex_unlock(&k->lock);
}

/* What is kept under the name has another from now on, as where it was put in its place. */
static inline void kept_rename(keeping_holder *k, const char *name, const char *next)
{
    pthread_mutex_lock(&k->lock);
    const int i = kept_place(k, name);
    assert_true(i < KEPT_BY_HOLDER);
    snprintf(k->kept[i].name, sizeof k->kept[i].name, "%s", next);
    pthread_mutex_unlock(&k->lock);
}

/* Until all is done that was sent before, by a daemon that has ended too. */
static inline void kept_settle(keeping_holder *k)
{
    int ends[2];
    const int to = ts_store_connect(k->h.notify, SOCK_DGRAM);
    assert_true(to >= 0);
    assert_int_equal(pipe(ends), 0);
    while (ts_store_send(to, "BARRIER=1", ends[1]) == EAGAIN)
        (void)poll(&(struct pollfd){.fd = to, .events = POLLOUT}, 1, -1);
    close(ends[1]);
    assert_int_equal(poll(&(struct pollfd){.fd = ends[0], .events = POLLIN}, 1, -1), 1);
    close(ends[0]);
    close(to);
}

/* A duplicate of what is kept under the name, which the caller closes. */
static inline int kept_open(keeping_holder *k, const char *name)
{
    pthread_mutex_lock(&k->lock);
    const int i = kept_place(k, name);
    assert_true(i < KEPT_BY_HOLDER);
    const int fd = fcntl(k->fds[i], F_DUPFD_CLOEXEC, 0);
    pthread_mutex_unlock(&k->lock);
    assert_true(fd >= 0);
    return fd;
}

/* How many are kept whose names begin so. */
static inline uint32_t kept_count(keeping_holder *k, const char *beginning)
{
    uint32_t count = 0;
    pthread_mutex_lock(&k->lock);
    for (int i = 0; i < KEPT_BY_HOLDER; i++)
        count += k->kept[i].name[0] != '\0' &&
                 strncmp(k->kept[i].name, beginning, strlen(beginning)) == 0;
    pthread_mutex_unlock(&k->lock);
    return count;
}

/* Waits until `count` such are kept: a daemon that lives may be about to have some closed. */
static inline void await_kept(keeping_holder *k, const char *beginning, uint32_t count)
{
    while (kept_count(k, beginning) != count)
        (void)poll(NULL, 0, 1);
}

/* Gives this process, which becomes a daemon, the descriptors and what systemd says of them. */
static inline void kept_pass(const keeping_holder *k, const char *limit)
{
    enum { ABOVE = 200 };
    char names[KEPT_BY_HOLDER * (TS_STORE_NAME_BYTES + 1)] = "", text[16];
    int count = 0;
    for (int i = 0; i < KEPT_BY_HOLDER; i++)
        if (k->kept[i].name[0] != '\0' && dup2(k->fds[i], ABOVE + count) >= 0) {
            snprintf(names + strlen(names), sizeof names - strlen(names), "%s%s",
                     count == 0 ? "" : ":", k->kept[i].name);
            count++;
        }
    for (int i = 0; i < count; i++)
        (void)dup2(ABOVE + i, 3 + i);
    for (int i = 3 + count; i < ABOVE + count; i++)
        close(i);
    snprintf(text, sizeof text, "%d", (int)getpid());
    setenv("LISTEN_PID", text, 1);
    snprintf(text, sizeof text, "%d", count);
    setenv("LISTEN_FDS", text, 1);
    setenv("LISTEN_FDNAMES", names, 1);
    setenv(TS_ENV_FDSTORE, limit, 1);
}

/* The file that is kept under the name; 0: none is. */
static inline ino_t kept_file(keeping_holder *k, const char *name)
{
    struct stat about = {.st_ino = 0};
    pthread_mutex_lock(&k->lock);
    const int i = kept_place(k, name);
    if (i < KEPT_BY_HOLDER)
        assert_int_equal(fstat(k->fds[i], &about), 0);
    pthread_mutex_unlock(&k->lock);
    return about.st_ino;
}

#endif
