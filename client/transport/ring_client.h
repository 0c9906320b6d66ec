/*
 * The client's side of the rings (proto/rings.h).
 *
 * Thread: the client's, unless a function says otherwise.
 */
#ifndef TS_RING_CLIENT_H
#define TS_RING_CLIENT_H

#include "client.h"

/* The rings that are used next have room for the ids of so many tokens, or of as many as can be. */
void ts_rings_want_ids(ts_client *client, uint32_t count);

/* Whether steps go by the rings, which are opened at the first need. */
ts_status ts_rings_use(ts_client *client, bool *use);

/* Submits the entry, sets its tag, and waits for its completion. Else the error sentence is set. */
ts_status ts_ring_call(ts_client *client, ts_ring_entry *entry, ts_ring_completion *done);

/* The completion that has come to the rings, if one has. */
bool ts_ring_take(ts_client *client, ts_ring_completion *done);

/* A call that sleeps looks whether the connection has ended. Any thread. */
void ts_rings_wake(ts_client *client);
void ts_rings_close(ts_client *client);

/* Another daemon has the session now: opens rings anew, in the memory's place and with what a call
 * has laid out in it. TS_ECONN: that daemon has gone, too. Where rings can't be had else, the
 * session goes on by messages. */
ts_status ts_rings_reopen(ts_client *client);

#endif
