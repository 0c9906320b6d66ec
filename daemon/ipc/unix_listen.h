/*
 * What the daemon's Unix sockets share: listening at a path, and pausing where accepting fails for
 * want of descriptors or memory (else epoll would tell of the waiting connection again and again).
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

#endif
