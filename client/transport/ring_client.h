/*
 * The client's side of the rings (proto/rings.h).
 *
 * Thread: the client's, unless a function says otherwise.
 */
#ifndef TS_RING_CLIENT_H
#define TS_RING_CLIENT_H

#include "client.h"

/* Rings without room for `count` token ids (at most TS_RING_IDS) are opened anew when used. */
void ts_rings_want_ids(ts_client *client, uint32_t count);

/* Whether steps go by the rings, which are opened at the first need. A call that had no answer in
 * time keeps them until its answer has come; a posted run is waited for. */
ts_status ts_rings_use(ts_client *client, bool *use);

/* Submits the entry, sets its tag, and waits for its completion. Else the error sentence is set. */
ts_status ts_ring_call(ts_client *client, ts_ring_entry *entry, ts_ring_completion *done);

/* Whether the daemon takes posted runs (proto/signals.h) by the rings, which are open. */
bool ts_rings_post(const ts_client *client);

/* Posts the entry, a run on a stream with its number: it is answered before the rings are used
 * next. The page of signals is open. */
ts_status ts_ring_post(ts_client *client, const ts_ring_entry *run);

/*
 * What the caller must hear before the step goes on: that a posted run of it was refused, which is
 * told once, or TS_ETIMEOUT: a posted run is unanswered yet. After ts_rings_use.
 */
ts_status ts_ring_posted_status(ts_client *client, uint64_t step);

/* The completion that has come to the rings, if one has. */
bool ts_ring_take(ts_client *client, ts_ring_completion *done);

/* The same of a call that had no answer in time: the rings can be used again then. */
bool ts_ring_take_late(ts_client *client, ts_ring_completion *done);

/* A call that sleeps looks whether the connection has ended. Any thread. */
void ts_rings_wake(ts_client *client);
void ts_rings_close(ts_client *client);

/* After a restart: opens rings with the next daemon, at the same address and with the same content,
 * since calls have pointers into them. TS_ECONN: that daemon has gone, too. After any other error
 * the session goes on by messages. */
ts_status ts_rings_reopen(ts_client *client);

#endif
