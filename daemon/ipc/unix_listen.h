/*
 * What the daemon's Unix sockets share: listening at a path, pausing where accepting fails for want
 * of descriptors or memory (else epoll would tell of the waiting connection again and again), and
 * the end of a connection.
 */
#ifndef TS_UNIX_LISTEN_H
#define TS_UNIX_LISTEN_H

#include <stdbool.h>
#include <stdint.h>

/* A non-blocking listener of this type whose file has this mode; -1 with errno. */
int ts_unix_listen(const char *path, int type, uint32_t mode);

/* Whether accepting failed (errno) as it would at once again; says so in the log. */
bool ts_accept_must_pause(int error);

/* Has epoll look for connections or not; `data` is the listener's there. */
void ts_accept_pause(int epoll, int listener, void *data, bool pause);

/* From now on epoll tells nothing of the descriptor. Closing it would do that only if nobody else
 * has the same file, and whoever reads /proc/PID/fd has it for a moment. */
void ts_unwatch(int epoll, int fd);

#endif
