/*
 * What the files about sequences have in common: requests, and answers that are sequences.
 *
 * Thread: the client's.
 */
#ifndef TS_SEQ_CALLS_H
#define TS_SEQ_CALLS_H

#include "client.h"

/* `request`, of which `body` is the body. */
#define TS_REQUEST(kind, CASE)                                                                     \
    Tspb__Request request = TSPB__REQUEST__INIT;                                                   \
    request.body_case = TSPB__REQUEST__BODY_##CASE;                                                \
    request.kind = &body

/* Calls for an answer of exactly `count` sequences; *length, unless that is NULL, is of the first.
 */
ts_status ts_call_for_seqs(ts_pool *pool, Tspb__Request *request, uint32_t count, ts_seq *out,
                           uint32_t *length);

#endif
