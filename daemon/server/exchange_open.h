/*
 * How a session gets its exchange: by a request, device memory that it asks for or passes; by the
 * handle socket, host memory that the daemon makes and the client fills. A new exchange takes the
 * place of the one before.
 *
 * Thread: the engine's owner.
 */
#ifndef TS_EXCHANGE_OPEN_H
#define TS_EXCHANGE_OPEN_H

#include "server.h"

/* Opens the exchange; `command` is the request's TS_OP_EXCHANGE_OPEN. TS_NEED_SWEEP: it waits. */
void ts_exchange_open(ts_service *service, ts_connection *connection,
                      const Tspb__ExchangeOpen *open, ts_command *command, ts_answer *answer);

/* The answer to it, in `opened`. */
void ts_exchange_encode(const ts_connection *connection, Tspb__ExchangeOpened *opened,
                        Tspb__Reply *reply);

/* Takes what the client has filled as the connection's exchange. */
ts_status ts_exchange_taken(ts_service *service, ts_connection *connection, uint64_t *bytes,
                            char *why, size_t why_bytes);

#endif
