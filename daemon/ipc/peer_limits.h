/*
 * Who is connected to a socket: how many connections each uid has, and whether one more may come
 * in. A uid may have `tenant_max`, and no more than three quarters of `max`, which all together may
 * have, and of which the last TS_OPERATOR_CONNECTIONS are for operators. An operator's uid is bound
 * by `max` alone. Whoever turns one away first lets those leave that have closed: a client that has
 * as many as it may, and closes one, may make another at once, as connecting with NNG does
 * (client/transport/dial.c).
 *
 * Locking: the caller's.
 */
#ifndef TS_PEER_LIMITS_H
#define TS_PEER_LIMITS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define TS_OPERATOR_CONNECTIONS 8u

/* The peer at the other end of a connection, as the kernel tells. */
typedef struct ts_guest {
    uint32_t uid, gid, pid; /* pid 0: of another pid namespace */
    bool is_operator;
} ts_guest;

typedef struct ts_crowd_uid ts_crowd_uid;

typedef struct ts_crowd {
    uint32_t max, tenant_max; /* connections: of all, of one uid */
    uint32_t count;
    ts_crowd_uid *uids;
} ts_crowd;

/* Who is connected to this socket; false: it can't be told. is_operator is not set. */
bool ts_guest_of(int fd, ts_guest *guest);

/* Lets the guest in. False, with a sentence in `why`: it may not come in. */
bool ts_crowd_enter(ts_crowd *crowd, const ts_guest *guest, char *why, size_t why_bytes);
void ts_crowd_leave(ts_crowd *crowd, const ts_guest *guest);
void ts_crowd_fini(ts_crowd *crowd);

#endif
