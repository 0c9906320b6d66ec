/*
 * What an operator (operators.h) may do to a running daemon: end a session, free a sequence, make,
 * end and resize a pool, take no new sessions.
 *
 * Thread: the engine's owner.
 */
#ifndef TS_ADMIN_H
#define TS_ADMIN_H

#include "server.h"

/* Does what the request asks for, if it is such a request (true), or refuses. */
bool ts_admin(ts_service *service, ts_connection *connection, const Tspb__Request *request,
              ts_answer *answer);

#endif
