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
 * time keeps them until its answer has come. A posted run is waited for first; TS_ETIMEOUT if that
 * has no answer in this call's time. */
ts_status ts_rings_use(ts_client *client, bool *use);

/* Submits the entry, sets its tag, and waits for its completion. Else the error sentence is set. */
ts_status ts_ring_call(ts_client *client, ts_ring_entry *entry, ts_ring_completion *done);

/* Posts the entry (proto/signals.h), a run on a stream with its number, which isn't 0: it is
 * answered before the rings are used next. The page of signals is open, and so are the rings.
 * *posted: else the daemon that there is now takes none, or not by these rings; nothing was done.
 */
ts_status ts_ring_post(ts_client *client, const ts_ring_entry *run, bool *posted);

/*
 * What the caller must hear before the step goes on: that a posted run of it was refused, which is
 * told once, or TS_ETIMEOUT: one that was late before has no answer in this call's time either.
 * After ts_rings_use.
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
