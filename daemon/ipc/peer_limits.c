#define _GNU_SOURCE
#include "peer_limits.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>

struct ts_crowd_uid {
    ts_crowd_uid *next;
    uint32_t uid, count;
};

bool ts_guest_of(int fd, ts_guest *guest)
{
    struct ucred peer;
    socklen_t size = sizeof peer;
    if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &size) != 0)
        return false;
    *guest = (ts_guest){.uid = peer.uid, .gid = peer.gid, .pid = (uint32_t)peer.pid};
    return true;
}

static ts_crowd_uid **find(ts_crowd *c, uint32_t uid)
{
    ts_crowd_uid **at = &c->uids;
    while (*at != NULL && (*at)->uid != uid)
        at = &(*at)->next;
    return at;
}

/* One uid leaves a quarter to the others, however few connections the process may have. */
static uint32_t tenant_max(const ts_crowd *c)
{
    const uint32_t share = c->max - c->max / 4;
    return c->tenant_max < share ? c->tenant_max : share;
}

bool ts_crowd_enter(ts_crowd *c, const ts_guest *guest, char *why, size_t why_bytes)
{
    ts_crowd_uid **at = find(c, guest->uid), *u = *at;
    uint32_t same = u == NULL ? 0 : u->count;
    if (c->count >= c->max) {
        snprintf(why, why_bytes, "the daemon has %u connections, the most it may have", c->count);
        return false;
    }
    if (!guest->is_operator && c->count + TS_OPERATOR_CONNECTIONS >= c->max) {
        snprintf(why, why_bytes, "the daemon has %u connections; the last %u are for operators",
                 c->count, TS_OPERATOR_CONNECTIONS);
        return false;
    }
    const uint32_t most = tenant_max(c);
    if (!guest->is_operator && same >= most) {
        snprintf(why, why_bytes, "uid %u has %u connections; the limit is %u (%s)", guest->uid,
                 same, most,
                 most == c->tenant_max ? "tenant_connections"
                                       : "three quarters of what the daemon's descriptors allow");
        return false;
    }
    if (u == NULL && (*at = u = calloc(1, sizeof *u)) == NULL) {
        snprintf(why, why_bytes, "no memory for a connection of uid %u", guest->uid);
        return false;
    }
    u->uid = guest->uid;
    u->count++;
    c->count++;
    return true;
}

void ts_crowd_leave(ts_crowd *c, const ts_guest *guest)
{
    ts_crowd_uid **at = find(c, guest->uid), *u = *at;
    c->count--;
    /* NOLINTNEXTLINE(clang-analyzer-core.NullDereference): who leaves has entered */
    if (--u->count > 0)
        return;
    *at = u->next;
    free(u);
}

void ts_crowd_fini(ts_crowd *c)
{
    for (ts_crowd_uid *u = c->uids, *next; u != NULL; u = next) {
        next = u->next;
        free(u);
    }
    c->uids = NULL;
}
