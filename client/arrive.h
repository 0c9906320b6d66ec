/*
 * One connection to a daemon, and the session that goes by it: opened, taken up again with a daemon
 * that took over from the one before, ended.
 *
 * Thread: the client's.
 */
#ifndef TS_ARRIVE_H
#define TS_ARRIVE_H

#include "client.h"

/* Connects to the daemon at client->path, opens the session and, if one is wanted, the exchange.
 * client->met says whether there was a daemon, client->absent whether to try again is worth it.
 * TS_ETIMEOUT: it has not taken the connection until then. */
ts_status ts_arrive(ts_client *client, const char *program, size_t exchange_bytes,
                    uint64_t until_ms);

/* client->reconnect: see client.h. */
ts_status ts_arrive_again(ts_client *client, uint64_t until_ms);

/* Has the daemon end the session, or the next one, if it outlives daemons: else it ends with its
 * connection. */
void ts_leave_session(ts_client *client);

/* Ends the connection, if there is one. */
void ts_hang_up(ts_client *client);

#endif
