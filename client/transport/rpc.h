/*
 * Requests by message. Tools of this project use it for the operator's requests, which are not part
 * of the public header.
 *
 * Thread: the client's.
 */
#ifndef TS_RPC_H
#define TS_RPC_H

#include "client.h"

/*
 * Sends the request and waits for its reply. TS_OK: *reply is there, to be freed with
 * tspb__reply__free_unpacked. Else the error sentence is set and there is none.
 */
ts_status ts_call(ts_client *client, Tspb__Request *request, Tspb__Reply **reply);

/* The same where the reply has nothing but its status. */
ts_status ts_call_plain(ts_client *client, Tspb__Request *request);

/* Tells the daemon that something has ended here, which can't fail: it waits for a second at most,
 * also for a daemon that is started again, and the last failure stays what ts_error says. */
void ts_call_end(ts_client *client, Tspb__Request *request);

/* Milliseconds that the present call may take. */
static inline uint32_t ts_call_time(const ts_client *client)
{
    uint64_t ms = (uint64_t)client->timeout_ms + client->wait_ms;
    return ms < INT32_MAX ? (uint32_t)ms : INT32_MAX; /* which is NNG's limit */
}

#endif
