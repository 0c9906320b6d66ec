/*
 * The descriptors that the supervisor holds, by name and in the order in which they came, and how
 * they are passed to a daemon that starts.
 *
 * Thread: the supervisor has one.
 */
#ifndef TS_HELD_FDS_H
#define TS_HELD_FDS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct ts_held_fd {
    char *name;
    int fd;
    bool passed; /* a listening socket that the supervisor was started with: never removed */
} ts_held_fd;

typedef struct ts_held_fds {
    ts_held_fd *items;
    uint32_t count, max;
    size_t names_bytes;
} ts_held_fds;

/* False: no memory. */
bool ts_held_fds_init(ts_held_fds *h, uint32_t max);

/* Closes all. */
void ts_held_fds_fini(ts_held_fds *h);

/* Takes the descriptor, and closes it if it can't be held. NULL, or why that is so. */
const char *ts_held_fds_add(ts_held_fds *h, const char *name, int fd, bool passed);

/* Closes the one of this name; false: there is none. */
bool ts_held_fds_remove(ts_held_fds *h, const char *name);

/* Closes all that came by the store. */
void ts_held_fds_clear(ts_held_fds *h);

/*
 * In a child that is going to execute the daemon: puts the descriptors to numbers 3 and up, closes
 * what else lies there, and sets LISTEN_PID, LISTEN_FDS and LISTEN_FDNAMES. False with errno.
 */
bool ts_held_fds_pass(ts_held_fds *h);

#endif
