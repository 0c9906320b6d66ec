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

/* The same for a request that says what has ended here: the daemon has TS_BRIEF_MS to answer, no
 * other daemon is waited for, and ts_error keeps its sentence. After one that had no answer, or an
 * abort that had none, the next ones are sent and not waited for, until something is answered: to
 * close many things takes no longer than to close one. */
ts_status ts_call_briefly(ts_client *client, Tspb__Request *request);

#define TS_BRIEF_MS 1000u /* of the client's time for a call, at most */
#define TS_TELL_MS 20u    /* the same where the daemon hasn't answered what told of an end before */

/* Milliseconds that the present call may take. */
static inline uint32_t ts_call_time(const ts_client *client)
{
    const uint32_t brief_ms = ts_only_tells(client) ? TS_TELL_MS : TS_BRIEF_MS;
    if (ts_is_brief(client))
        return client->timeout_ms < brief_ms ? client->timeout_ms : brief_ms;
    return (uint32_t)ts_int_ms((uint64_t)client->timeout_ms + client->wait_ms);
}

/* The same with all its retries: a message is sent again after each, a ring is waited for. */
static inline uint64_t ts_call_patience(const ts_client *client)
{
    return ts_call_time(client) * (1 + (ts_is_brief(client) ? 0 : (uint64_t)client->retries));
}

/* How the telling of an end came out. */
static inline void ts_note_end(ts_client *client, ts_status status)
{
    client->end_unheard = client->end_unheard || status == TS_ETIMEOUT || status == TS_ECONN;
}

#endif
