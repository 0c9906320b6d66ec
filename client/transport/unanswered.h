/*
 * Begins of steps whose answer didn't come in time (unanswered.c).
 *
 * Thread: the client's.
 */
#ifndef TS_UNANSWERED_H
#define TS_UNANSWERED_H

#include "client.h"

/* A step's begin got no answer in time: whatever comes of it is undone before a later
 * call. */
void ts_unanswered_by_message(ts_client *client, const Tspb__Request *request);
void ts_unanswered_by_ring(ts_client *client);
void ts_unanswered_close(ts_client *client);

#endif
