/*
 * What an operator (operators.h) may do to a running daemon: end a session, free a sequence, make,
 * end and resize a pool, have what is cached forgotten, take no new sessions, have it start again.
 *
 * Thread: the engine's owner.
 */
#ifndef TS_ADMIN_H
#define TS_ADMIN_H

#include "server.h"

/* What answers have beside a status. */
typedef union ts_admin_body {
    Tspb__CacheDropped cache_dropped;
} ts_admin_body;

/* If the request is one of these (true), does what it asks for, or refuses. TS_NEED_SWEEP: only a
 * part of it was done, and it must be asked for again after the next sweep. The reply may point
 * into `body`. */
bool ts_admin(ts_service *service, ts_connection *connection, const Tspb__Request *request,
              ts_answer *answer, Tspb__Reply *reply, ts_admin_body *body);

#endif
