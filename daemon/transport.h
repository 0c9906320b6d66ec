/*
 * The control plane's socket: NNG REP over ipc://, many contexts. Takes requests apart into
 * ts_request and puts them into the service's queue; sends what the service answers.
 *
 * Thread: started and stopped by main; works on NNG's own threads.
 */
#ifndef TS_TRANSPORT_H
#define TS_TRANSPORT_H

#include "service.h"

typedef struct ts_transport ts_transport;

/*
 * Makes what listens at `url` ("ipc:///path") later, with the socket's file mode set to `mode`. A
 * message of more than message_bytes ends its connection. A sentence in `why` if that can't be
 * done.
 */
ts_status ts_transport_start(ts_service *service, const char *url, uint32_t mode, uint32_t contexts,
                             size_t message_bytes, ts_transport **out, char *why, size_t why_bytes);

/* Listens: when all else that clients use is there. */
ts_status ts_transport_listen(ts_transport *transport, char *why, size_t why_bytes);

/*
 * Connects to itself, and listens anew if that goes unanswered (true). NNG before 1.6 stops
 * accepting for good when a peer disconnects while it is being greeted (nanomsg/nng issue 1518): a
 * worker that is killed at that moment would lock everybody else out. Any one thread.
 */
bool ts_transport_revive(ts_transport *transport);

/* Receives and sends nothing more; connections stay. While the service still runs, which may answer
 * what was received before: such answers go nowhere. */
void ts_transport_stop(ts_transport *transport);

/* Ends the connections. After the service has ended: NNG 1.5 can hang in nng_close while other
 * threads use the socket's contexts. */
void ts_transport_free(ts_transport *transport);

#endif
