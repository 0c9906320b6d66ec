/*
 * Where the kernel has accepted a connection that the daemon doesn't get to, NNG waits for its
 * first words, ten seconds and not the caller's time. Nor can it be stopped: a dialer or socket
 * that is closed as its connection comes may lose that, and then never ends (NNG 1.5). So the
 * daemon's words are first waited for on a plain connection, which can be given up at any time.
 * Only a daemon that stops just then has NNG's ten seconds.
 */
#define _GNU_SOURCE
#include "dial.h"

#include "clock.h"

#include <errno.h>
#include <limits.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define FULL_MS 5 /* between attempts, while as many wait for the daemon as may */

static int nng_error_of(int error)
{
    switch (error) {
    case EACCES:
    case EPERM:
        return NNG_EPERM;
    case EMFILE:
    case ENFILE:
        return NNG_ENOFILES;
    case ENOMEM:
    case ENOBUFS:
        return NNG_ENOMEM;
    case ENOENT:
    case ENOTDIR:
        return NNG_ENOENT;
    case EAGAIN:
        return NNG_EAGAIN;
    case ECONNRESET:
        return NNG_ECONNRESET;
    default:
        return NNG_ECONNREFUSED;
    }
}

/* A connection of our own to the path; the caller's. */
static int connect_to(const char *path, int *fd)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    snprintf(address.sun_path, sizeof address.sun_path, "%s", path);
    *fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (*fd >= 0 && connect(*fd, (struct sockaddr *)&address, sizeof address) == 0)
        return 0;
    const int error = errno;
    if (*fd >= 0)
        close(*fd);
    return nng_error_of(error);
}

/* Whoever listens has said something, has ended, or is silent until then. What was said is NNG's
 * to understand. */
static int await_words(int fd, uint64_t until_ms)
{
    for (;;) {
        const uint64_t now_ms = ts_now_ms();
        struct pollfd p = {.fd = fd, .events = POLLIN};
        const uint64_t left_ms = now_ms < until_ms ? until_ms - now_ms : 0;
        if (poll(&p, 1, left_ms < INT_MAX ? (int)left_ms : INT_MAX) > 0)
            return 0;
        if (now_ms >= until_ms)
            return NNG_ETIMEDOUT;
    }
}

static int await_daemon(const char *path, uint64_t until_ms)
{
    for (;;) {
        int fd, error = connect_to(path, &fd);
        if (error == 0) {
            error = await_words(fd, until_ms);
            close(fd);
        }
        if (error != NNG_EAGAIN)
            return error;
        if (ts_now_ms() >= until_ms)
            return NNG_ETIMEDOUT;
        (void)poll(NULL, 0, FULL_MS);
    }
}

int ts_dial(ts_client *c, uint64_t until_ms)
{
    nng_dialer dialer;
    char url[sizeof c->path + 8];
    int error = await_daemon(c->path, until_ms);
    if (error != 0)
        return error;
    snprintf(url, sizeof url, "ipc://%s", c->path);
    error = nng_dialer_create(&dialer, c->socket, url);
    if (error != 0)
        return error;
    /* A session lives and dies with its connection: none is made again behind our back. */
    nng_dialer_set_ms(dialer, NNG_OPT_RECONNMINT, 3600 * 1000);
    nng_dialer_set_ms(dialer, NNG_OPT_RECONNMAXT, 3600 * 1000);
    do
        error = nng_dialer_start(dialer, 0);
    while (error == NNG_EINTR);
    if (error != 0)
        nng_dialer_close(dialer);
    return error;
}
