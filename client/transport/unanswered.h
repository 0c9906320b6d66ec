/*
 * Begins of steps, and what makes sequences, whose answer didn't come in time (unanswered.c).
 *
 * Thread: the client's.
 */
#ifndef TS_UNANSWERED_H
#define TS_UNANSWERED_H

#include "client.h"

/* A step's begin, or a request that makes sequences in the pool (by ring: `seqs` of them, 0 for a
 * begin), got no answer in time: whatever comes of it is undone before a later call. */
void ts_unanswered_by_message(ts_client *client, const Tspb__Request *request, uint32_t pool);
void ts_unanswered_by_ring(ts_client *client, uint32_t pool, uint32_t seqs);

/* The same of a selection by ring: what it picked stays, and its forks are freed. */
void ts_unanswered_select_by_ring(ts_client *client, uint32_t pool,
                                  const Tspb__SeqSelect *selection);
void ts_unanswered_close(ts_client *client);

/* The step's abort got no answer. A daemon that lives carries it out some time; the next one is
 * told of it. */
void ts_unanswered_abort(ts_client *client, uint64_t step);

/* The numbers of those calls, `most` at most; how many. */
uint32_t ts_unanswered_calls(const ts_client *client, uint64_t *calls, uint32_t most);

#endif
