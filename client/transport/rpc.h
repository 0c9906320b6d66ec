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

#endif
