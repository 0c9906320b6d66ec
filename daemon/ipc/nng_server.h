/*
 * The control plane's socket: a REP socket of NNG's wire protocol (sp_wire.h), at which workers and
 * tools connect with NNG. Takes requests apart into ts_request and puts them into the service's
 * queue; sends what the service answers.
 *
 * The daemon speaks the protocol itself, since NNG 1.5 can't be used towards clients that are not
 * trusted: one that disconnects while it is greeted makes its listener deaf (nanomsg/nng 1518); one
 * that disconnects with requests under way can hang the thread that frees connections, for good;
 * and answers that a client doesn't read hold the contexts that all others need.
 *
 * No client holds up another, and what it may hold is bounded and timed out:
 * - A connection has TS_PEER_REQUESTS in progress. It is read no further while it has, nor while an
 *   answer waits to be read.
 * - Uids have their turn one after another, however many connections each has: a uid gives 4
 *   messages a turn, and no more while the engine has yet to begin 4 of its requests.
 * - All requests of a uid that are in progress take TS_UID_BYTES; its answers that wait as much.
 * - A connection has `idle_ms` for its greeting, for each message, for reading an answer, and to
 *   open a session (again, when that has ended). One that is left unread for its user's other
 *   messages has them anew when it is read on.
 * - The connections of each uid and of all are limited; the last ones are for operators
 *   (peer_limits.h).
 *
 * Thread: started and stopped by main, has one of its own. Any thread may answer a request and call
 * ts_nng_server_end.
 */
#ifndef TS_NNG_SERVER_H
#define TS_NNG_SERVER_H

#include "peer_limits.h"
#include "server.h"

#define TS_PEER_REQUESTS 16u
#define TS_UID_BYTES (64u << 20)

typedef struct ts_nng_server ts_nng_server;

typedef struct ts_nng_server_options {
    const char *path; /* of the socket */
    uint32_t mode;    /* of its file */
    uint32_t connections_max, tenant_connections_max;
    uint32_t idle_ms;
    size_t message_bytes; /* a longer message ends its connection */
} ts_nng_server_options;

/* Makes what listens later. A sentence in `why` if that can't be done. */
ts_status ts_nng_server_start(ts_service *service, const ts_nng_server_options *options,
                              ts_nng_server **out, char *why, size_t why_bytes);

/* Listens: when all else that clients use is there. */
ts_status ts_nng_server_listen(ts_nng_server *server, char *why, size_t why_bytes);

/* Ends the connection soon; if for being idle, not one whose messages wait for their turn. */
void ts_nng_server_end(ts_nng_server *server, uint32_t pipe, bool idle);

/* Receives and sends nothing more; connections stay. While the service still runs, which may answer
 * what was received before: such answers go nowhere. */
void ts_nng_server_stop(ts_nng_server *server);

/* Ends the connections. After the service has answered all requests. */
void ts_nng_server_free(ts_nng_server *server);

#endif
